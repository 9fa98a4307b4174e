/**
 * `Ring` over the native addon. Operations are written into memory shared with it, its completions are read from there
 * in batches; neither costs a call or an allocation. The numbers below are those of `native/src/ring_area.rs` and
 * `pool.rs`.
 */
import { getSystemErrorName } from 'node:util';
import { assert } from '../base/assert.js';
import { Errno } from '../base/errors.js';
import { type NativeRingHandle, native } from './native.js';
import {
  type BlockFile,
  type Connection,
  type ConnectionHandler,
  type FileDone,
  type FrameRule,
  type Listener,
  type ListenOptions,
  MAX_INLINE_BYTES,
  type Memory,
  NO_PAYLOAD,
  type OpenFileOptions,
  type Ring,
  type RingOptions,
} from './ring.js';

const RECORD_BYTES = 256;
const RECORD_WORDS = RECORD_BYTES / 4;
const RECORD_HEADER_BYTES = 32;
const SUBMISSIONS = 2048;
const COMPLETIONS = 1024;
const SUBMISSIONS_AT = 4096;
const COMPLETIONS_AT = SUBMISSIONS_AT + SUBMISSIONS * RECORD_BYTES;
const QUEUED_AT = COMPLETIONS_AT + COMPLETIONS * RECORD_BYTES;

const Submit = {
  SEND: 1,
  START: 2,
  PAUSE: 3,
  RESUME: 4,
  END: 5,
  CLOSE: 6,
  READ: 7,
  WRITE: 8,
  FLUSH: 9,
  ZERO: 10,
  CLOSE_FILE: 11,
  EXTERNAL: 12,
} as const;

const Kind = {
  FRAME: 1,
  CLOSED: 2,
  DRAINED: 3,
  ACCEPTED: 4,
  CONNECTED: 5,
  FILE: 6,
  EXTERNAL: 7,
  SENDING_ENDED: 8,
} as const;

const FLAG_DURABLE = 1;
const FLAG_KEEP_ALLOCATED = 2;
const OPEN_DIRECT = 1;
const OPEN_READ_ONLY = 2;
const OPEN_EXCLUSIVE = 4;

const PAGE_SHIFT = 12;
const MAGAZINE_ORDERS = 5;
const MAGAZINE_ENTRIES = 64;
const MAGAZINE_WORDS = MAGAZINE_ENTRIES + 1;
/** Largest block of the pool. */
export const MAX_BLOCK_BYTES = 64 * 1024 * 1024;
/** Staged bytes a raw delivery may hold, and so the most that can be given back. */
const MAX_UNCONSUMED_BYTES = 64 * 1024;

/** How long `end` waits for the peer to close too, after everything was sent. */
const LINGER_MS = 2000;

/** Linux's number, which libuv has no name for. */
const ENOTBLK = 15;

const NO_BYTES = new Uint8Array(0);

/** Receives completions of external operations (filesystem backend and the like). */
export interface ExternalHandler {
  /**
   * @param payload pool offset (the handler owns one reference) or NO_PAYLOAD
   * @param header view of shared memory, valid during the call only; the bytes start at `headerOffset`
   */
  external(
    cookie: number,
    result: number,
    payload: number,
    length: number,
    header: DataView,
    headerOffset: number,
    headerLength: number,
  ): void;
}

function failure(errno: number, what: string): Error {
  const code = errno === ENOTBLK ? 'ENOTBLK' : getSystemErrorName(-errno);
  return Object.assign(new Error(`${what}: ${code}`), { errno, code });
}

class NativeMemory implements Memory {
  readonly bytes: Uint8Array;
  readonly view: DataView;
  readonly #native: NativeRingHandle;
  readonly #counts: Int32Array;
  readonly #magazines: Int32Array;
  readonly #orders: Uint8Array;

  constructor(handle: NativeRingHandle) {
    this.#native = handle;
    const pool = handle.poolBuffer();
    this.bytes = new Uint8Array(pool);
    this.view = new DataView(pool);
    const control = handle.poolControl();
    const pages = pool.byteLength >>> PAGE_SHIFT;
    this.#counts = new Int32Array(control, 0, pages);
    this.#magazines = new Int32Array(control, pages * 4, MAGAZINE_ORDERS * MAGAZINE_WORDS);
    this.#orders = new Uint8Array(control, pages * 4 + MAGAZINE_ORDERS * MAGAZINE_WORDS * 4, pages);
  }

  allocate(lengthBytes: number): number {
    assert(lengthBytes >= 0 && lengthBytes <= MAX_BLOCK_BYTES, 'a pool block has at most 64 MiB');
    const order = lengthBytes <= 4096 ? 0 : 32 - Math.clz32((lengthBytes - 1) >>> PAGE_SHIFT);
    if (order < MAGAZINE_ORDERS) {
      const magazine = order * MAGAZINE_WORDS;
      const count = this.#magazines[magazine]!;
      if (count > 0) {
        const page = this.#magazines[magazine + count]!;
        this.#magazines[magazine] = count - 1;
        assert(this.#counts[page] === 0, 'a free block has no references');
        Atomics.store(this.#counts, page, 1);
        return page * 4096;
      }
    }
    return this.#native.allocate(lengthBytes);
  }

  retain(offset: number): void {
    const before = Atomics.add(this.#counts, offset >>> PAGE_SHIFT, 1);
    assert(before > 0, 'retain of a free pool block');
  }

  release(offset: number): void {
    const page = offset >>> PAGE_SHIFT;
    const before = Atomics.sub(this.#counts, page, 1);
    assert(before > 0, 'release of a free pool block');
    if (before > 1) return;
    const order = this.#orders[page]!;
    if (order < MAGAZINE_ORDERS) {
      const magazine = order * MAGAZINE_WORDS;
      const count = this.#magazines[magazine]!;
      if (count < MAGAZINE_ENTRIES) {
        this.#magazines[magazine + 1 + count] = page;
        this.#magazines[magazine] = count + 1;
        return;
      }
    }
    this.#native.free(offset);
  }
}

/** The rule as 32-bit words, for `Rule::decode` of `native/src/framing.rs`. */
function encodeRule(rule: FrameRule, poolBytes: number): Uint32Array {
  if (rule.kind === 'raw') return Uint32Array.of(0);
  assert(rule.kind !== 'fuse', 'the framing of the FUSE device is set by mountFuse');
  if (rule.kind === 'record') {
    assert(rule.maxRecordBytes > 0 && rule.maxRecordBytes <= Math.min(MAX_BLOCK_BYTES, poolBytes), 'record cap');
    assert(rule.maxFragments > 0, 'fragment cap');
    return Uint32Array.of(2, rule.maxRecordBytes, rule.maxFragments);
  }
  assert(rule.maxPayloadBytes <= Math.min(MAX_BLOCK_BYTES, poolBytes), 'payload cap beyond the largest block');
  assert(rule.maxPayloadBytes <= rule.hardCapBytes && rule.hardCapBytes <= 0xffffffff, 'hard cap below payload cap');
  assert(rule.magic.length <= rule.headerBytes, 'magic longer than the header');
  const inline = Object.entries(rule.inlineByCommand).map(([command, bytes]) => [Number(command), bytes] as const);
  for (const bytes of [rule.inlineDefault, ...inline.map((entry) => entry[1])])
    assert(bytes >= 0 && rule.headerBytes + bytes <= MAX_INLINE_BYTES, 'header and inline bytes beyond 224');
  const commands = rule.payloadCommands;
  return Uint32Array.from([
    1,
    rule.headerBytes,
    rule.lengthOffset,
    rule.lengthBytes,
    rule.commandOffset,
    rule.commandBytes,
    rule.inlineDefault,
    rule.maxPayloadBytes,
    rule.hardCapBytes,
    0,
    rule.magic.length,
    ...rule.magic,
    commands ? commands.length : 0xffffffff,
    ...(commands ?? []),
    inline.length,
    ...inline.flat(),
  ]);
}

class NativeConnection implements Connection {
  handler: ConnectionHandler | undefined;
  gone = false;
  ending = false;
  lingering: NodeJS.Timeout | undefined;

  constructor(
    private readonly ring: NativeRing,
    readonly id: number,
    readonly peer: string,
  ) {}

  get queuedBytes(): number {
    return this.gone ? 0 : this.ring.queued[this.id]!;
  }

  setHandler(handler: ConnectionHandler): void {
    const first = this.handler === undefined;
    this.handler = handler;
    if (first) this.#queue(Submit.START);
  }

  setFraming(rule: FrameRule, unconsumed: Uint8Array = NO_BYTES): void {
    assert(unconsumed.length <= MAX_UNCONSUMED_BYTES, 'more unconsumed bytes than a raw delivery holds');
    const words = encodeRule(rule, this.ring.memory.bytes.length);
    if (!this.gone) this.ring.handle.setFraming(this.id, words, unconsumed);
  }

  send(header: Uint8Array, headerLength: number, payload: number, payloadLength: number): void {
    assert(headerLength <= MAX_INLINE_BYTES && headerLength <= header.length, 'header of at most 224 bytes');
    if (this.gone || this.ending) return;
    const ring = this.ring;
    const record = ring.nextRecord();
    const words = ring.words;
    const at = record * RECORD_WORDS;
    words[at] = Submit.SEND;
    words[at + 1] = this.id;
    words[at + 3] = payload;
    words[at + 4] = payloadLength;
    words[at + 5] = headerLength;
    const bytes = ring.bytes;
    const to = record * RECORD_BYTES + RECORD_HEADER_BYTES;
    for (let index = 0; index < headerLength; index++) bytes[to + index] = header[index]!;
    if (payload !== NO_PAYLOAD) ring.memory.retain(payload);
    ring.queued[this.id]! += headerLength + (payload === NO_PAYLOAD ? 0 : payloadLength);
  }

  sendBytes(bytes: Uint8Array): void {
    if (this.gone || this.ending || bytes.length === 0) return;
    if (bytes.length <= MAX_INLINE_BYTES) {
      this.send(bytes, bytes.length, NO_PAYLOAD, 0);
      return;
    }
    this.ring.queued[this.id]! += bytes.length;
    this.ring.handle.sendBytes(this.id, bytes);
  }

  pause(): void {
    this.#queue(Submit.PAUSE);
  }

  resume(): void {
    this.#queue(Submit.RESUME);
  }

  end(): void {
    if (this.ending) return;
    this.#queue(Submit.END);
    this.ending = true;
  }

  close(): void {
    this.#queue(Submit.CLOSE);
  }

  /** Everything is sent and the peer was told; it has a moment to close before we do. */
  sendingEnded(): void {
    this.lingering = setTimeout(() => this.close(), LINGER_MS);
  }

  ended(errno: number): void {
    this.gone = true;
    clearTimeout(this.lingering);
    this.handler?.closed(errno);
  }

  #queue(kind: number): void {
    if (this.gone) return;
    const ring = this.ring;
    const at = ring.nextRecord() * RECORD_WORDS;
    ring.words[at] = kind;
    ring.words[at + 1] = this.id;
  }
}

class NativeFile implements BlockFile {
  done: FileDone | undefined;
  #closed = false;

  constructor(
    private readonly ring: NativeRing,
    private readonly id: number,
    readonly sizeBytes: number,
    readonly alignmentBytes: number,
  ) {}

  setDone(done: FileDone): void {
    this.done = done;
  }

  read(cookie: number, offsetBytes: number, payload: number, lengthBytes: number): void {
    this.#transfer(Submit.READ, cookie, offsetBytes, payload, lengthBytes, 0);
  }

  write(cookie: number, offsetBytes: number, payload: number, lengthBytes: number, durable: boolean): void {
    this.#transfer(Submit.WRITE, cookie, offsetBytes, payload, lengthBytes, durable ? FLAG_DURABLE : 0);
  }

  flush(cookie: number): void {
    this.#queue(Submit.FLUSH, cookie, 0, NO_PAYLOAD, 0, 0);
  }

  seek(offsetBytes: number, what: 'data' | 'hole'): number {
    return this.ring.handle.fileSeek(this.id, offsetBytes, what === 'hole');
  }

  zero(cookie: number, offsetBytes: number, lengthBytes: number, keepAllocated: boolean, durable: boolean): void {
    const flags = (durable ? FLAG_DURABLE : 0) | (keepAllocated ? FLAG_KEEP_ALLOCATED : 0);
    assert(lengthBytes > 0, 'zeroing nothing');
    const record = this.#queue(Submit.ZERO, cookie, offsetBytes, NO_PAYLOAD, 0, flags);
    this.ring.doubles[(record * RECORD_BYTES + RECORD_HEADER_BYTES) / 8] = lengthBytes;
  }

  close(): void {
    if (this.#closed || this.ring.closed) return;
    this.#queue(Submit.CLOSE_FILE, 0, 0, NO_PAYLOAD, 0, 0);
    this.#closed = true;
  }

  #transfer(kind: number, cookie: number, offset: number, payload: number, length: number, flags: number): void {
    assert(payload >= 0 && payload + length <= this.ring.memory.bytes.length, 'payload inside the pool');
    this.ring.memory.retain(payload);
    this.#queue(kind, cookie, offset, payload, length, flags);
  }

  #queue(kind: number, cookie: number, offset: number, payload: number, length: number, flags: number): number {
    assert(!this.#closed, 'operation on a closed file');
    assert(offset >= 0 && Number.isSafeInteger(offset), 'file offset');
    const ring = this.ring;
    const record = ring.nextRecord();
    const at = record * RECORD_WORDS;
    const words = ring.words;
    words[at] = kind;
    words[at + 1] = this.id;
    words[at + 2] = cookie;
    words[at + 3] = payload;
    words[at + 4] = length;
    words[at + 5] = flags << 8;
    ring.doubles[at / 2 + 3] = offset;
    return record;
  }
}

interface Connecting {
  readonly connected: (connection: Connection | undefined, errno: number) => void;
  readonly timer: NodeJS.Timeout | undefined;
}

/** The ring of this process. See `Ring` for the contract; what is more than that serves the other native classes. */
export class NativeRing implements Ring {
  readonly memory: NativeMemory;
  readonly backend: string;
  /** For the constructors of other native classes. */
  readonly handle: NativeRingHandle;
  closed = false;

  /** Submission records; shared by the classes of this file. */
  readonly words: Int32Array;
  readonly doubles: Float64Array;
  readonly bytes: Uint8Array;
  readonly queued: Float64Array;

  readonly #control: Int32Array;
  readonly #completions: Int32Array;
  readonly #view: DataView;
  readonly #connections: (NativeConnection | undefined)[] = [];
  readonly #connecting = new Map<number, Connecting>();
  readonly #accepting: (((connection: Connection) => void) | undefined)[] = [];
  readonly #files: (NativeFile | undefined)[] = [];
  readonly #external: (ExternalHandler | undefined)[] = [];

  /** @throws Error when the backend asked for cannot be used here; OperatorError when the addon is not built */
  constructor(options: RingOptions) {
    this.handle = new (native().NativeRing)(options.poolBytes, options.backend ?? 'auto');
    this.backend = this.handle.backend;
    this.memory = new NativeMemory(this.handle);
    const area = this.handle.area();
    this.#control = new Int32Array(area, 0, 2);
    this.words = new Int32Array(area, SUBMISSIONS_AT, SUBMISSIONS * RECORD_WORDS);
    this.doubles = new Float64Array(area, SUBMISSIONS_AT, SUBMISSIONS * (RECORD_BYTES / 8));
    this.bytes = new Uint8Array(area, SUBMISSIONS_AT, SUBMISSIONS * RECORD_BYTES);
    this.queued = new Float64Array(area, QUEUED_AT);
    this.#completions = new Int32Array(area, COMPLETIONS_AT, COMPLETIONS * RECORD_WORDS);
    this.#view = new DataView(area, COMPLETIONS_AT, COMPLETIONS * RECORD_BYTES);
    this.handle.start((count) => this.#deliver(count));
  }

  /** Bytes in pool blocks that someone holds. */
  get usedBytes(): number {
    return this.handle.usedBytes;
  }

  listenTcp(host: string, port: number, accepted: (connection: Connection) => void, options?: ListenOptions): Listener {
    const result = this.handle.listenTcp(host, port, options?.receiveBufferBytes ?? 0, options?.sendBufferBytes ?? 0);
    if (result < 0) throw failure(-result, `listen on ${host}:${port}`);
    return this.#listener(result, accepted);
  }

  listenUnix(path: string, accepted: (connection: Connection) => void): Listener {
    const result = this.handle.listenUnix(path);
    if (result < 0) throw failure(-result, `listen on ${path}`);
    return this.#listener(result, accepted);
  }

  #listener(id: number, accepted: (connection: Connection) => void): Listener {
    this.#accepting[id] = accepted;
    return {
      port: this.handle.listenerPort(id),
      close: () => {
        if (this.#accepting[id] === undefined) return;
        this.#accepting[id] = undefined;
        this.handle.closeListener(id);
      },
    };
  }

  /** `host` and `localHost` are address literals or `localhost`: names are resolved elsewhere. */
  connectTcp(
    host: string,
    port: number,
    options: ListenOptions & { readonly localHost?: string; readonly timeoutMs: number },
    connected: (connection: Connection | undefined, errno: number) => void,
  ): void {
    const id = this.handle.connectTcp(
      host,
      port,
      options.localHost,
      options.receiveBufferBytes ?? 0,
      options.sendBufferBytes ?? 0,
    );
    this.#connect(id, connected, options.timeoutMs);
  }

  connectUnix(path: string, connected: (connection: Connection | undefined, errno: number) => void): void {
    this.#connect(this.handle.connectUnix(path), connected, undefined);
  }

  #connect(
    id: number,
    connected: (connection: Connection | undefined, errno: number) => void,
    timeoutMs: number | undefined,
  ): void {
    if (id < 0) {
      // Refused at once; told later all the same.
      setImmediate(() => {
        if (!this.closed) connected(undefined, -id);
      });
      return;
    }
    const timer =
      timeoutMs === undefined ? undefined : setTimeout(() => this.handle.abort(id, Errno.ETIMEDOUT), timeoutMs);
    this.#connecting.set(id, { connected, timer });
  }

  openFile(path: string, options: OpenFileOptions): BlockFile {
    const flags =
      (options.direct ? OPEN_DIRECT : 0) |
      (options.readOnly ? OPEN_READ_ONLY : 0) |
      (options.exclusive ? OPEN_EXCLUSIVE : 0);
    const id = this.handle.openFile(path, flags);
    if (id === -Errno.EBUSY) throw failure(Errno.EBUSY, `${path} is in use by another process`);
    if (id === -Errno.EINVAL && options.direct)
      throw failure(Errno.EINVAL, `open ${path}: its filesystem does not support direct I/O`);
    if (id === -ENOTBLK) throw failure(ENOTBLK, `open ${path}: neither a regular file nor a block device`);
    if (id < 0) throw failure(-id, `open ${path}`);
    const file = new NativeFile(this, id, this.handle.fileSize(id), this.handle.fileAlignment(id));
    this.#files[id] = file;
    return file;
  }

  mountFuse(directory: string, options: { readonly subtype: string; readonly maxWriteBytes: number }): Connection {
    const id = native().mountFuse(this.handle, directory, options.subtype, options.maxWriteBytes);
    if (id < 0) throw failure(-id, `mount a FUSE filesystem on ${directory}`);
    return this.adoptConnection(id, 'fuse');
  }

  /** @returns the target number that a native class needs to execute operations and complete them */
  registerExternal(handler: ExternalHandler): number {
    const target = this.handle.newTarget();
    this.#external[target] = handler;
    return target;
  }

  /**
   * Queues an operation for the native class that serves `target`. A payload block is retained for it: the class
   * releases it or hands it on as the payload of the completion.
   *
   * @param argument any exact integer, a file offset for instance
   * @param header at most 224 bytes, copied now
   */
  submitExternal(
    target: number,
    cookie: number,
    payload: number,
    length: number,
    argument: number,
    flags: number,
    header: Uint8Array,
    headerLength: number,
  ): void {
    assert(headerLength <= MAX_INLINE_BYTES && headerLength <= header.length, 'header of at most 224 bytes');
    const record = this.nextRecord();
    const at = record * RECORD_WORDS;
    this.words[at] = Submit.EXTERNAL;
    this.words[at + 1] = target;
    this.words[at + 2] = cookie;
    this.words[at + 3] = payload;
    this.words[at + 4] = length;
    this.words[at + 5] = headerLength | (flags << 8);
    this.doubles[at / 2 + 3] = argument;
    const to = record * RECORD_BYTES + RECORD_HEADER_BYTES;
    for (let index = 0; index < headerLength; index++) this.bytes[to + index] = header[index]!;
    if (payload !== NO_PAYLOAD) this.memory.retain(payload);
  }

  /** A Connection over a pseudo-connection that a native class registered (the FUSE file). */
  adoptConnection(id: number, peer: string): Connection {
    const connection = new NativeConnection(this, id, peer);
    this.#connections[id] = connection;
    return connection;
  }

  close(): void {
    if (this.closed) return;
    this.closed = true;
    for (const { timer } of this.#connecting.values()) clearTimeout(timer);
    for (const connection of this.#connections) clearTimeout(connection?.lingering);
    this.handle.close();
  }

  /** Room for one more operation; for the classes of this file. */
  nextRecord(): number {
    let record = this.#control[0]!;
    if (record === SUBMISSIONS) {
      this.handle.submit();
      record = this.#control[0]!;
      assert(record < SUBMISSIONS || this.closed, 'room in the submission area');
      // A closed ring takes nothing any more: what is queued goes nowhere.
      if (this.closed) record = 0;
    }
    this.#control[0] = record + 1;
    return record;
  }

  #deliver(count: number): void {
    const words = this.#completions;
    for (let record = 0; record < count && !this.closed; record++) {
      const at = record * RECORD_WORDS;
      const id = words[at + 1]!;
      switch (words[at]) {
        case Kind.FRAME: {
          const connection = this.#connections[id];
          const handler = connection?.handler;
          if (handler !== undefined && !connection!.gone)
            handler.frame(
              this.#view,
              record * RECORD_BYTES + RECORD_HEADER_BYTES,
              words[at + 7]!,
              words[at + 4]!,
              words[at + 5]! >>> 0,
              words[at + 6]!,
            );
          else if (words[at + 4] !== NO_PAYLOAD) this.memory.release(words[at + 4]!);
          break;
        }
        case Kind.FILE:
          this.#files[id]!.done?.(words[at + 2]!, words[at + 3]!);
          break;
        case Kind.EXTERNAL:
          this.#external[id]!.external(
            words[at + 2]!,
            words[at + 3]!,
            words[at + 4]!,
            words[at + 5]! >>> 0,
            this.#view,
            record * RECORD_BYTES + RECORD_HEADER_BYTES,
            words[at + 7]!,
          );
          break;
        case Kind.DRAINED:
          this.#connections[id]?.handler?.drained();
          break;
        case Kind.SENDING_ENDED:
          this.#connections[id]?.sendingEnded();
          break;
        case Kind.CLOSED:
          this.#ended(id, words[at + 3]!);
          break;
        case Kind.ACCEPTED:
          this.#accepted(words[at + 2]!, id, this.#text(record));
          break;
        case Kind.CONNECTED:
          this.#connected(id, words[at + 3]!, this.#text(record));
          break;
        default:
          assert(false, `completion record of kind ${words[at]}`);
      }
    }
  }

  #text(record: number): string {
    const at = record * RECORD_BYTES + RECORD_HEADER_BYTES;
    const length = this.#completions[record * RECORD_WORDS + 7]!;
    return Buffer.from(this.#view.buffer, this.#view.byteOffset + at, length).toString();
  }

  #accepted(listener: number, id: number, peer: string): void {
    const connection = this.adoptConnection(id, peer);
    const accepted = this.#accepting[listener];
    if (accepted) accepted(connection);
    else connection.close();
  }

  #connected(id: number, errno: number, peer: string): void {
    const { connected, timer } = this.#connecting.get(id)!;
    this.#connecting.delete(id);
    clearTimeout(timer);
    if (errno !== 0) connected(undefined, errno);
    else connected(this.adoptConnection(id, peer), 0);
  }

  #ended(id: number, errno: number): void {
    const connecting = this.#connecting.get(id);
    if (connecting) {
      this.#connecting.delete(id);
      clearTimeout(connecting.timer);
      connecting.connected(undefined, errno);
      return;
    }
    const connection = this.#connections[id];
    this.#connections[id] = undefined;
    connection?.ended(errno);
  }
}
