/**
 * The doors in memory, for tests of what stands behind them: deterministic, one step at a time, strict about ownership.
 * Framing is cut by a second, naive implementation of the rules.
 */
import assert from 'node:assert/strict';
import {
  type BlockFile,
  type Connection,
  type ConnectionHandler,
  type FileDone,
  FRAME_SKIPPED,
  type FrameRule,
  type Listener,
  type Memory,
  NO_PAYLOAD,
  type OpenFileOptions,
  type Ring,
  SEND_QUEUE_LIMIT_BYTES,
} from '../../src/io/ring.js';

const ALIGNMENT = 4096;

/** First fit over one buffer; counts references, refuses what the contract forbids. */
export class FakeMemory implements Memory {
  readonly bytes: Uint8Array;
  readonly view: DataView;
  readonly #blocks: { offset: number; length: number; references: number }[] = [];
  /** When set, `allocate` finds nothing. */
  exhausted = false;

  constructor(poolBytes: number) {
    this.bytes = new Uint8Array(new ArrayBuffer(poolBytes));
    this.view = new DataView(this.bytes.buffer);
  }

  get liveBlocks(): number {
    return this.#blocks.length;
  }

  allocate(lengthBytes: number): number {
    assert(lengthBytes > 0 && lengthBytes <= 64 << 20, 'a pool block has at most 64 MiB');
    if (this.exhausted) return -1;
    const length = Math.ceil(lengthBytes / ALIGNMENT) * ALIGNMENT;
    let offset = 0;
    let index = 0;
    for (; index < this.#blocks.length; index++) {
      if (this.#blocks[index]!.offset - offset >= length) break;
      offset = this.#blocks[index]!.offset + this.#blocks[index]!.length;
    }
    if (offset + length > this.bytes.length) return -1;
    this.#blocks.splice(index, 0, { offset, length, references: 1 });
    this.bytes.fill(0xee, offset, offset + length);
    return offset;
  }

  retain(offset: number): void {
    this.#find(offset).references++;
  }

  release(offset: number): void {
    const block = this.#find(offset);
    if (--block.references > 0) return;
    this.bytes.fill(0xdd, block.offset, block.offset + block.length);
    this.#blocks.splice(this.#blocks.indexOf(block), 1);
  }

  /** Checks that [offset, offset + length) is in one live block. */
  check(offset: number, length: number): void {
    assert(length <= this.#find(offset).length, 'inside the block');
  }

  #find(offset: number): { offset: number; length: number; references: number } {
    const block = this.#blocks.find((block) => block.offset === offset);
    assert(block, `no block at ${offset}`);
    return block;
  }
}

/** The server's end; the test holds the other one. */
class FakeConnection implements Connection {
  readonly peer = 'fake';
  queuedBytes = 0;
  #handler: ConnectionHandler | undefined;
  #rule: FrameRule | undefined;
  #input: Uint8Array[] = [];
  #paused = false;
  #closed = false;
  #ending = false;
  #above = false;
  #scheduled = false;

  constructor(
    readonly ring: FakeRing,
    readonly client: FakeClient,
  ) {}

  setHandler(handler: ConnectionHandler): void {
    this.#handler = handler;
  }

  setFraming(rule: FrameRule, unconsumed?: Uint8Array): void {
    this.#rule = rule;
    if (unconsumed && unconsumed.length > 0) this.#input.unshift(unconsumed.slice());
    this.#schedule();
  }

  send(header: Uint8Array, headerLength: number, payload: number, payloadLength: number): void {
    assert(headerLength > 0 && headerLength <= 224, 'header fits');
    this.#queue(header.slice(0, headerLength));
    if (payload === NO_PAYLOAD) return;
    this.ring.memory.check(payload, payloadLength);
    this.ring.memory.retain(payload);
    this.queuedBytes += payloadLength;
    this.client.outgoing.push({
      take: () => {
        const bytes = this.ring.memory.bytes.slice(payload, payload + payloadLength);
        this.ring.memory.release(payload);
        return bytes;
      },
      length: payloadLength,
    });
    this.#flush();
  }

  sendBytes(bytes: Uint8Array): void {
    this.#queue(bytes.slice());
  }

  pause(): void {
    this.#paused = true;
  }

  resume(): void {
    this.#paused = false;
    this.#schedule();
  }

  end(): void {
    this.#ending = true;
    this.#flush();
  }

  close(): void {
    this.drop(0);
  }

  get isPaused(): boolean {
    return this.#paused;
  }

  /** Bytes from the client. */
  arrive(bytes: Uint8Array): void {
    this.#input.push(bytes.slice());
    this.#schedule();
  }

  drop(errno: number): void {
    if (this.#closed) return;
    this.#closed = true;
    for (const part of this.client.outgoing.splice(0)) part.take();
    this.queuedBytes = 0;
    this.client.isClosed = true;
    this.ring.later(() => this.#handler?.closed(errno));
  }

  #queue(bytes: Uint8Array): void {
    this.queuedBytes += bytes.length;
    this.client.outgoing.push({ take: () => bytes, length: bytes.length });
    this.#flush();
  }

  #flush(): void {
    if (this.queuedBytes > SEND_QUEUE_LIMIT_BYTES) this.#above = true;
    this.ring.later(() => this.flushNow());
  }

  flushNow(): void {
    if (this.#closed || !this.client.reads) return;
    for (const part of this.client.outgoing.splice(0)) {
      this.client.received.push(part.take());
      this.queuedBytes -= part.length;
    }
    if (this.#above) {
      this.#above = false;
      this.ring.later(() => {
        if (!this.#closed) this.#handler!.drained();
      });
    }
    if (this.#ending) this.drop(0);
  }

  #schedule(): void {
    if (this.#scheduled) return;
    this.#scheduled = true;
    this.ring.later(() => {
      this.#scheduled = false;
      this.#deliver();
    });
  }

  /** Like a real ring it cuts all it has, even after a `pause` in between. */
  #deliver(): void {
    if (this.#closed || this.#paused || this.#rule === undefined || this.#input.length === 0) return;
    const handler = this.#handler!;
    let input = Buffer.concat(this.#input.splice(0));
    while (input.length > 0 && !this.#closed) {
      const rule: FrameRule = this.#rule!;
      if (rule.kind === 'raw') {
        const piece = input.subarray(0, 65536);
        input = input.subarray(piece.length);
        handler.frame(this.ring.memory.view, 0, 0, this.#store(piece), piece.length, 0);
        if (this.#rule !== rule) {
          // What setFraming put back comes before what is still here.
          input = Buffer.concat([...this.#input.splice(0), input]);
          if (input.length > 0) this.arrive(input);
          return;
        }
        continue;
      }
      assert(rule.kind === 'fixed', 'record marking is not needed here');
      const begin = Buffer.from(rule.magic);
      if (Buffer.compare(input.subarray(0, 4), begin.subarray(0, Math.min(4, input.length))) !== 0) {
        this.drop(71);
        return;
      }
      if (input.length < rule.headerBytes) break;
      const command = input.readUIntBE(rule.commandOffset, rule.commandBytes);
      const announced = input.readUIntBE(rule.lengthOffset, rule.lengthBytes);
      const length = (rule.payloadCommands?.includes(command) ?? true) ? announced : 0;
      if (length > rule.hardCapBytes) {
        this.drop(90);
        return;
      }
      if (input.length < rule.headerBytes + length) break;
      const header = input.subarray(0, rule.headerBytes);
      const data = input.subarray(rule.headerBytes, rule.headerBytes + length);
      input = input.subarray(rule.headerBytes + length);
      const skipped = length > rule.maxPayloadBytes;
      handler.frame(
        new DataView(header.buffer, header.byteOffset, header.length),
        0,
        header.length,
        skipped || length === 0 ? NO_PAYLOAD : this.#store(data),
        length,
        skipped ? FRAME_SKIPPED : 0,
      );
    }
    if (input.length > 0) this.#input.unshift(input);
  }

  #store(bytes: Uint8Array): number {
    const block = this.ring.memory.allocate(bytes.length);
    assert(block >= 0, 'the fake pool is full');
    this.ring.memory.bytes.set(bytes, block);
    return block;
  }
}

/** The test's end of a connection. */
export class FakeClient {
  readonly received: Uint8Array[] = [];
  readonly outgoing: { take(): Uint8Array; length: number }[] = [];
  isClosed = false;
  /** False: takes nothing, so that replies pile up at the server. */
  reads = true;
  readonly connection: FakeConnection;

  constructor(ring: FakeRing) {
    this.connection = new FakeConnection(ring, this);
  }

  write(bytes: Uint8Array): void {
    this.connection.arrive(bytes);
  }

  /** Takes all bytes received so far. */
  read(): Buffer {
    return Buffer.concat(this.received.splice(0));
  }

  startReading(): void {
    this.reads = true;
    this.connection.flushNow();
  }

  close(errno = 0): void {
    this.connection.drop(errno);
  }
}

/** A disk in memory. Operations take effect when they complete, in an order the ring chooses. */
export class FakeFile implements BlockFile {
  readonly alignmentBytes = 512;
  readonly data: Uint8Array;
  #done: FileDone = () => assert.fail('no done');
  /** Errno for the operations to come. */
  failWith = 0;
  /** Every operation, as text: `write 0+512 durable`. */
  readonly log: string[] = [];

  constructor(
    private readonly ring: FakeRing,
    readonly sizeBytes: number,
  ) {
    this.data = new Uint8Array(sizeBytes);
  }

  setDone(done: FileDone): void {
    this.#done = done;
  }

  read(cookie: number, offset: number, payload: number, length: number): void {
    this.#check(offset, length);
    this.ring.memory.check(payload, length);
    this.#queue(cookie, `read ${offset}+${length}`, payload, () =>
      this.ring.memory.bytes.set(this.data.subarray(offset, offset + length), payload),
    );
  }

  write(cookie: number, offset: number, payload: number, length: number, durable: boolean): void {
    this.#check(offset, length);
    this.ring.memory.check(payload, length);
    this.#queue(cookie, `write ${offset}+${length}${durable ? ' durable' : ''}`, payload, () =>
      this.data.set(this.ring.memory.bytes.subarray(payload, payload + length), offset),
    );
  }

  flush(cookie: number): void {
    this.#queue(cookie, 'flush', NO_PAYLOAD, () => {});
  }

  zero(cookie: number, offset: number, length: number, keepAllocated: boolean, durable: boolean): void {
    this.#check(offset, length);
    const text = `zero ${offset}+${length}${keepAllocated ? ' keep' : ''}${durable ? ' durable' : ''}`;
    this.#queue(cookie, text, NO_PAYLOAD, () => this.data.fill(0, offset, offset + length));
  }

  close(): void {}

  #check(offset: number, length: number): void {
    assert(offset % 512 === 0 && length % 512 === 0 && length > 0, 'whole sectors');
    assert(offset + length <= this.sizeBytes, 'inside the disk');
  }

  #queue(cookie: number, text: string, payload: number, effect: () => void): void {
    this.log.push(text);
    if (payload !== NO_PAYLOAD) this.ring.memory.retain(payload);
    this.ring.disk.push(() => {
      const errno = this.failWith;
      if (errno === 0) effect();
      if (payload !== NO_PAYLOAD) this.ring.memory.release(payload);
      this.#done(cookie, errno);
    });
  }
}

/** Nothing happens until `settle`. */
export class FakeRing implements Ring {
  readonly memory: FakeMemory;
  readonly backend = 'fake';
  /** Operations at disks. While `diskStopped`, they stay there. */
  readonly disk: (() => void)[] = [];
  diskStopped = false;
  #events: (() => void)[] = [];
  #nextEvent = 0;
  #accepted: ((connection: Connection) => void) | undefined;

  /** @param random 0 <= x < 1: which disk operation ends next; default: the oldest */
  constructor(
    poolBytes: number,
    private readonly random: () => number = () => 0,
  ) {
    this.memory = new FakeMemory(poolBytes);
  }

  later(event: () => void): void {
    this.#events.push(event);
  }

  /** Runs until nothing is left to do. */
  settle(): void {
    for (;;) {
      const diskRuns = !this.diskStopped && this.disk.length > 0;
      if (this.#nextEvent < this.#events.length && !(diskRuns && this.random() > 0.5))
        this.#events[this.#nextEvent++]!();
      else if (diskRuns) this.disk.splice(Math.floor(this.random() * this.disk.length), 1)[0]!();
      else if (this.#nextEvent === this.#events.length) {
        this.#events = [];
        this.#nextEvent = 0;
        return;
      }
    }
  }

  connect(): FakeClient {
    assert(this.#accepted, 'nobody listens');
    const client = new FakeClient(this);
    const accepted = this.#accepted;
    this.later(() => accepted(client.connection));
    return client;
  }

  listenTcp(_host: string, port: number, accepted: (connection: Connection) => void): Listener {
    this.#accepted = accepted;
    return { port, close: () => {} };
  }

  listenUnix(_path: string, accepted: (connection: Connection) => void): Listener {
    this.#accepted = accepted;
    return { port: 0, close: () => {} };
  }

  connectTcp(): void {
    assert.fail('the fake ring does not connect');
  }

  connectUnix(): void {
    assert.fail('the fake ring does not connect');
  }

  mountFuse(): Connection {
    assert.fail('the fake ring has no FUSE');
  }

  openFile(_path: string, _options: OpenFileOptions): BlockFile {
    assert.fail('the fake ring has no files: make a FakeFile');
  }

  close(): void {}
}
