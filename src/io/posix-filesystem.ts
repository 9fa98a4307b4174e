/**
 * `FileSystem` over the kernel: operations run on worker threads of the addon, with the caller's identity, on objects
 * named by kernel file handles. Each operation travels in one pool block; `native/src/posix_fs/layout.rs` draws it.
 */
import { assert } from '../base/assert.js';
import { Errno, OperatorError } from '../base/errors.js';
import type {
  Attributes,
  AttributesOutcome,
  CreateHow,
  CreateOutcome,
  Credential,
  DirectoryEntry,
  FileSystem,
  FsStatOutcome,
  KernelHandle,
  LookupOutcome,
  Outcome,
  PathconfOutcome,
  ReaddirOutcome,
  ReadOutcome,
  SetAttributes,
  TimeSpec,
  Wcc,
  WccOutcome,
  WriteOutcome,
} from '../nfs/filesystem.js';
import { type NativePosixFsHandle, native } from './native.js';
import type { NativeRing } from './native-ring.js';
import { type Memory, NO_PAYLOAD } from './ring.js';

/** Offsets and numbers of the request block, by the names of `layout.rs`; a test compares the two. */
export const LAYOUT = {
  BLOCK_BYTES: 16384,
  ATTRIBUTES: 0,
  ATTRIBUTES2: 96,
  ATTRIBUTES3: 192,
  BEFORE: 288,
  BEFORE2: 328,
  HANDLE: 368,
  COUNT: 504,
  RESULT_FLAGS: 508,
  COMMITTED: 512,
  STATISTICS: 520,
  OP: 1024,
  FLAGS: 1028,
  UID: 1032,
  GID: 1036,
  GROUP_COUNT: 1040,
  NAME_LENGTH: 1044,
  TEXT_LENGTH: 1048,
  REQUEST_COUNT: 1052,
  OFFSET: 1056,
  COOKIE: 1064,
  ADDRESS: 1072,
  KIND: 1080,
  LIMIT: 1084,
  SATTR: 1088,
  RDEV: 1136,
  VERIFIER: 1144,
  HANDLE_A: 1152,
  HANDLE_B: 1288,
  NAME: 1424,
  TEXT: 1680,
  GROUPS: 5776,
  MAX_GROUPS: 2048,
  MAX_NAME_BYTES: 256,
  MAX_TEXT_BYTES: 4096,
  FLAG_DURABLE: 1,
  FLAG_PLUS: 2,
  FLAG_GUARD: 4,
  RESULT_EOF: 1,
  SET_MODE: 1,
  SET_UID: 2,
  SET_GID: 4,
  SET_SIZE: 8,
  SET_ATIME_NOW: 16,
  SET_ATIME: 32,
  SET_MTIME_NOW: 64,
  SET_MTIME: 128,
  CREATE_UNCHECKED: 0,
  CREATE_GUARDED: 1,
  CREATE_EXCLUSIVE: 2,
  OP_GETATTR: 1,
  OP_SETATTR: 2,
  OP_LOOKUP: 3,
  OP_ACCESS: 4,
  OP_READLINK: 5,
  OP_READ: 6,
  OP_WRITE: 7,
  OP_CREATE: 8,
  OP_MKDIR: 9,
  OP_SYMLINK: 10,
  OP_MKNOD: 11,
  OP_REMOVE: 12,
  OP_RMDIR: 13,
  OP_RENAME: 14,
  OP_LINK: 15,
  OP_READDIR: 16,
  OP_FSSTAT: 18,
  OP_PATHCONF: 20,
  OP_COMMIT: 21,
  ATTRIBUTES_BYTES: 96,
  ENTRY_BYTES: 32,
} as const;
const L = LAYOUT;

/** struct file_handle's bytes (MAX_HANDLE_SZ) and the type in front of them. */
const MAX_HANDLE_BYTES = 4 + 128;

const NO_BYTES = new Uint8Array(0);

const ESTALE = 116;

/**
 * Operations under way at once; more wait in a queue of at most MAX_WAITING, and beyond that are told to come again.
 */
const MAX_SLOTS = 1024;
const MAX_WAITING = 65536;

/** READDIR's block of entries, in bytes: as long as the kernel's longest names need, up to a limit. */
const ENTRY_ESTIMATE_BYTES = 96;
const PLUS_ESTIMATE_BYTES = 192;
const MIN_ENTRIES_BYTES = 4096;
const MAX_ENTRIES_BYTES = 256 * 1024;

const ROOT_CREDENTIAL: Credential = { uid: 0, gid: 0, groups: [] };

/** What the file system needs of the ring. Completions call `PosixFileSystem.complete`, never from inside `submit`. */
export interface OperationDoor {
  readonly memory: Memory;
  /** Queues the operation in the block at pool offset `block`. */
  submit(cookie: number, block: number): void;
  /** Starts the end; completes `cookie` when no descriptor is left. */
  withdraw(cookie: number): void;
}

export interface PosixFacts {
  readonly id: Uint8Array;
  readonly maxFileSizeBytes: number;
  readonly rootHandle: Uint8Array;
}

type Settle = (outcome: never) => void;

const DEFAULT_WORKERS = 8;

export interface PosixFileSystemOptions {
  /** Threads that execute operations, 1 to 256; default 8. A quarter of them never waits for stable storage. */
  readonly workers?: number;
}

/**
 * Opens the tree at `path` (on a mounted ext4 or XFS) for serving. Nothing of this process may stay open on it once the
 * result is withdrawn, so withdraw it before the ring is closed.
 *
 * @throws OperatorError naming path and cause: not a directory, a capability that is missing, no file handles
 */
export async function openPosixFileSystem(
  ring: NativeRing,
  path: string,
  options: PosixFileSystemOptions = {},
): Promise<PosixFileSystem> {
  const target = ring.registerExternal({
    external: (cookie, errno, payload) => filesystem.complete(cookie, errno, payload),
  });
  let backend: NativePosixFsHandle;
  try {
    backend = new (native().NativePosixFs)(ring.handle, target, path, options.workers ?? DEFAULT_WORKERS);
  } catch (error) {
    if (error instanceof OperatorError) throw error;
    throw new OperatorError((error as Error).message, 20, 'cannot serve filesystem');
  }
  const door: OperationDoor = {
    memory: ring.memory,
    submit: (cookie, block) => ring.submitExternal(target, cookie, NO_PAYLOAD, 0, block, 0, NO_BYTES, 0),
    withdraw: (cookie) => backend.withdraw(cookie),
  };
  const filesystem = new PosixFileSystem(door, backend);
  return filesystem;
}

export class PosixFileSystem implements FileSystem {
  readonly id: Uint8Array;
  readonly maxFileSizeBytes: number;
  readonly rootHandle: KernelHandle;
  private readonly memory: Memory;
  /** Pool offset of each slot's block; the slot's number is the operation's cookie. */
  private readonly blocks: number[] = [];
  private readonly settle: (Settle | undefined)[] = [];
  private readonly free: number[] = [];
  private readonly waiting: (() => void)[] = [];
  private withdrawal: Promise<void> | undefined;

  constructor(
    private readonly door: OperationDoor,
    facts: PosixFacts,
  ) {
    this.memory = door.memory;
    this.id = facts.id;
    this.maxFileSizeBytes = facts.maxFileSizeBytes;
    this.rootHandle = facts.rootHandle;
  }

  // ---- operations --------------------------------------------------------------------------------------------------

  getattr(handle: KernelHandle): Promise<AttributesOutcome> {
    return this.run(L.OP_GETATTR, ROOT_CREDENTIAL, handle, nothing);
  }

  setattr(
    credential: Credential,
    handle: KernelHandle,
    changes: SetAttributes,
    guardCtime: TimeSpec | undefined,
    durable: boolean,
  ): Promise<WccOutcome> {
    return this.run(L.OP_SETATTR, credential, handle, (at, view) => {
      this.putSetAttributes(at, changes);
      if (guardCtime) {
        view.setFloat64(at + L.OFFSET, guardCtime.seconds, true);
        view.setUint32(at + L.LIMIT, guardCtime.nanoseconds, true);
      }
      view.setUint32(at + L.FLAGS, (guardCtime ? L.FLAG_GUARD : 0) | (durable ? L.FLAG_DURABLE : 0), true);
    });
  }

  lookup(credential: Credential, directory: KernelHandle, name: Uint8Array): Promise<LookupOutcome> {
    return this.run(L.OP_LOOKUP, credential, directory, (at) => this.putName(at, name));
  }

  access(credential: Credential, handle: KernelHandle, mask: number): Promise<AttributesOutcome & { granted: number }> {
    return this.run(L.OP_ACCESS, credential, handle, (at, view) => view.setUint32(at + L.REQUEST_COUNT, mask, true));
  }

  readlink(credential: Credential, handle: KernelHandle): Promise<AttributesOutcome & { target?: Uint8Array }> {
    return this.run(L.OP_READLINK, credential, handle, nothing);
  }

  read(credential: Credential, handle: KernelHandle, offsetBytes: number, count: number): Promise<ReadOutcome> {
    return this.run(L.OP_READ, credential, handle, (at, view) => {
      view.setFloat64(at + L.OFFSET, offsetBytes, true);
      view.setUint32(at + L.REQUEST_COUNT, count, true);
    });
  }

  write(
    credential: Credential,
    handle: KernelHandle,
    offsetBytes: number,
    address: number,
    count: number,
    stability: number,
  ): Promise<WriteOutcome> {
    return this.run(L.OP_WRITE, credential, handle, (at, view) => {
      view.setFloat64(at + L.OFFSET, offsetBytes, true);
      view.setFloat64(at + L.ADDRESS, address, true);
      view.setUint32(at + L.REQUEST_COUNT, count, true);
      view.setUint32(at + L.KIND, stability, true);
    });
  }

  create(
    credential: Credential,
    directory: KernelHandle,
    name: Uint8Array,
    how: CreateHow,
    durable: boolean,
  ): Promise<CreateOutcome> {
    return this.run(L.OP_CREATE, credential, directory, (at, view) => {
      this.putName(at, name);
      view.setUint32(at + L.FLAGS, durable ? L.FLAG_DURABLE : 0, true);
      if (how.kind === 'exclusive') {
        assert(how.verifier.length === 8, 'a create verifier of 8 bytes');
        this.putSetAttributes(at, {});
        this.memory.bytes.set(how.verifier, at + L.VERIFIER);
        view.setUint32(at + L.KIND, L.CREATE_EXCLUSIVE, true);
      } else {
        this.putSetAttributes(at, how.attributes);
        view.setUint32(at + L.KIND, how.kind === 'guarded' ? L.CREATE_GUARDED : L.CREATE_UNCHECKED, true);
      }
    });
  }

  mkdir(
    credential: Credential,
    directory: KernelHandle,
    name: Uint8Array,
    attributes: SetAttributes,
    durable: boolean,
  ): Promise<CreateOutcome> {
    return this.run(L.OP_MKDIR, credential, directory, (at) => this.putMake(at, name, attributes, durable));
  }

  symlink(
    credential: Credential,
    directory: KernelHandle,
    name: Uint8Array,
    target: Uint8Array,
    attributes: SetAttributes,
    durable: boolean,
  ): Promise<CreateOutcome> {
    return this.run(L.OP_SYMLINK, credential, directory, (at) => {
      this.putMake(at, name, attributes, durable);
      this.putText(at, target, L.MAX_TEXT_BYTES);
    });
  }

  mknod(
    credential: Credential,
    directory: KernelHandle,
    name: Uint8Array,
    type: number,
    attributes: SetAttributes,
    rdevMajor: number,
    rdevMinor: number,
    durable: boolean,
  ): Promise<CreateOutcome> {
    return this.run(L.OP_MKNOD, credential, directory, (at, view) => {
      this.putMake(at, name, attributes, durable);
      view.setUint32(at + L.KIND, type, true);
      view.setUint32(at + L.RDEV, rdevMajor, true);
      view.setUint32(at + L.RDEV + 4, rdevMinor, true);
    });
  }

  remove(credential: Credential, directory: KernelHandle, name: Uint8Array, durable: boolean): Promise<WccOutcome> {
    return this.unlink(L.OP_REMOVE, credential, directory, name, durable);
  }

  rmdir(credential: Credential, directory: KernelHandle, name: Uint8Array, durable: boolean): Promise<WccOutcome> {
    return this.unlink(L.OP_RMDIR, credential, directory, name, durable);
  }

  private unlink(
    op: number,
    credential: Credential,
    directory: KernelHandle,
    name: Uint8Array,
    durable: boolean,
  ): Promise<WccOutcome> {
    return this.run(op, credential, directory, (at, view) => {
      this.putName(at, name);
      view.setUint32(at + L.FLAGS, durable ? L.FLAG_DURABLE : 0, true);
    });
  }

  rename(
    credential: Credential,
    fromDirectory: KernelHandle,
    fromName: Uint8Array,
    toDirectory: KernelHandle,
    toName: Uint8Array,
    durable: boolean,
  ): Promise<Outcome & { readonly from: Wcc; readonly to: Wcc }> {
    return this.run(
      L.OP_RENAME,
      credential,
      fromDirectory,
      (at, view) => {
        this.putName(at, fromName);
        this.putText(at, toName, L.MAX_NAME_BYTES);
        view.setUint32(at + L.FLAGS, durable ? L.FLAG_DURABLE : 0, true);
      },
      toDirectory,
    );
  }

  link(
    credential: Credential,
    handle: KernelHandle,
    directory: KernelHandle,
    name: Uint8Array,
    durable: boolean,
  ): Promise<WccOutcome & AttributesOutcome> {
    return this.run(
      L.OP_LINK,
      credential,
      handle,
      (at, view) => {
        this.putName(at, name);
        view.setUint32(at + L.FLAGS, durable ? L.FLAG_DURABLE : 0, true);
      },
      directory,
    );
  }

  readdir(
    credential: Credential,
    directory: KernelHandle,
    cookie: bigint,
    maxEntries: number,
    plus: boolean,
  ): Promise<ReaddirOutcome> {
    assert(maxEntries >= 0, 'a number of entries');
    const wantedBytes = maxEntries * (plus ? ENTRY_ESTIMATE_BYTES + PLUS_ESTIMATE_BYTES : ENTRY_ESTIMATE_BYTES);
    const limitBytes = Math.min(MAX_ENTRIES_BYTES, Math.max(MIN_ENTRIES_BYTES, wantedBytes));
    const address = this.memory.allocate(limitBytes);
    if (address < 0) return Promise.resolve({ errno: Errno.ENOMEM, entries: [], eof: false });
    const listed = this.run<ReaddirOutcome>(L.OP_READDIR, credential, directory, (at, view) => {
      view.setUint32(at + L.FLAGS, plus ? L.FLAG_PLUS : 0, true);
      view.setBigUint64(at + L.COOKIE, cookie, true);
      view.setUint32(at + L.REQUEST_COUNT, maxEntries, true);
      view.setFloat64(at + L.ADDRESS, address, true);
      view.setUint32(at + L.LIMIT, limitBytes, true);
    });
    // The entries were decoded before the promise was settled.
    return listed.finally(() => this.memory.release(address));
  }

  fsstat(credential: Credential, handle: KernelHandle): Promise<FsStatOutcome> {
    return this.run(L.OP_FSSTAT, credential, handle, nothing);
  }

  pathconf(handle: KernelHandle): Promise<PathconfOutcome> {
    return this.run(L.OP_PATHCONF, ROOT_CREDENTIAL, handle, nothing);
  }

  commit(credential: Credential, handle: KernelHandle): Promise<WccOutcome> {
    return this.run(L.OP_COMMIT, credential, handle, nothing);
  }

  withdraw(): Promise<void> {
    this.withdrawal ??= new Promise<void>((resolve) => {
      const slot = this.blocks.length;
      this.blocks.push(NO_PAYLOAD);
      this.settle.push(resolve as Settle);
      this.door.withdraw(slot);
    });
    for (const start of this.waiting.splice(0)) start();
    return this.withdrawal;
  }

  // ---- slots -------------------------------------------------------------------------------------------------------

  private run<T extends Outcome>(
    op: number,
    credential: Credential,
    handle: KernelHandle,
    fill: (at: number, view: DataView) => void,
    secondHandle?: KernelHandle,
  ): Promise<T> {
    return new Promise<T>((resolve) => {
      const start = (): void => {
        if (this.withdrawal) {
          resolve(refusal(op, ESTALE) as T);
          return;
        }
        const slot = this.takeSlot();
        if (slot < 0) {
          if (this.waiting.length < MAX_WAITING && this.blocks.length > 0) this.waiting.push(start);
          else resolve(refusal(op, Errno.EAGAIN) as T);
          return;
        }
        const at = this.blocks[slot]!;
        const view = this.memory.view;
        view.setUint32(at + L.OP, op, true);
        view.setUint32(at + L.FLAGS, 0, true);
        this.putCredential(at, credential);
        if (
          !this.putHandle(at + L.HANDLE_A, handle) ||
          (secondHandle && !this.putHandle(at + L.HANDLE_B, secondHandle))
        ) {
          this.free.push(slot);
          resolve(refusal(op, ESTALE) as T);
          return;
        }
        fill(at, view);
        this.settle[slot] = resolve as Settle;
        this.door.submit(slot, at);
      };
      start();
    });
  }

  /** -1 when all are in use or the pool is empty. */
  private takeSlot(): number {
    const slot = this.free.pop();
    if (slot !== undefined) return slot;
    if (this.blocks.length >= MAX_SLOTS) return -1;
    const block = this.memory.allocate(L.BLOCK_BYTES);
    if (block < 0) return -1;
    this.settle.push(undefined);
    return this.blocks.push(block) - 1;
  }

  /** The operation `cookie` is done. `payload` is READ's block or NO_PAYLOAD. */
  complete(cookie: number, errno: number, payload: number): void {
    const settle = this.settle[cookie];
    assert(settle, `completion of operation ${cookie}, which is not under way`);
    this.settle[cookie] = undefined;
    const at = this.blocks[cookie]!;
    if (at === NO_PAYLOAD) {
      // The withdrawal itself, after everything that was under way.
      for (const block of this.blocks) if (block !== NO_PAYLOAD) this.memory.release(block);
      (settle as unknown as () => void)();
      return;
    }
    const outcome = this.decode(at, errno, payload);
    this.free.push(cookie);
    (settle as (outcome: Outcome) => void)(outcome);
    // One that is refused leaves its slot to the next.
    while (this.waiting.length > 0 && this.free.length > 0) this.waiting.shift()!();
  }

  // ---- arguments ---------------------------------------------------------------------------------------------------

  private putCredential(at: number, { uid, gid, groups }: Credential): void {
    assert(groups.length <= L.MAX_GROUPS, `${groups.length} groups; at most ${L.MAX_GROUPS} travel`);
    const view = this.memory.view;
    view.setUint32(at + L.UID, uid, true);
    view.setUint32(at + L.GID, gid, true);
    view.setUint32(at + L.GROUP_COUNT, groups.length, true);
    for (let index = 0; index < groups.length; index++) view.setUint32(at + L.GROUPS + 4 * index, groups[index]!, true);
  }

  /** False for what can be no handle of the kernel's. */
  private putHandle(at: number, handle: KernelHandle): boolean {
    if (handle.length > MAX_HANDLE_BYTES) return false;
    this.memory.view.setUint32(at, handle.length, true);
    this.memory.bytes.set(handle, at + 4);
    return true;
  }

  /** A byte more than any filesystem allows is passed on, so that the kernel answers ENAMETOOLONG in its turn. */
  private putName(at: number, name: Uint8Array): void {
    const length = Math.min(name.length, L.MAX_NAME_BYTES);
    this.memory.view.setUint32(at + L.NAME_LENGTH, length, true);
    this.memory.bytes.set(length < name.length ? name.subarray(0, length) : name, at + L.NAME);
  }

  /** Cut likewise: the kernel refuses a name of 256 and a symlink target of 4096 bytes. */
  private putText(at: number, text: Uint8Array, mostBytes: number): void {
    const length = Math.min(text.length, mostBytes);
    this.memory.view.setUint32(at + L.TEXT_LENGTH, length, true);
    this.memory.bytes.set(length < text.length ? text.subarray(0, length) : text, at + L.TEXT);
  }

  private putMake(at: number, name: Uint8Array, attributes: SetAttributes, durable: boolean): void {
    this.putName(at, name);
    this.putSetAttributes(at, attributes);
    this.memory.view.setUint32(at + L.FLAGS, durable ? L.FLAG_DURABLE : 0, true);
  }

  private putSetAttributes(at: number, { mode, uid, gid, sizeBytes, atime, mtime }: SetAttributes): void {
    const view = this.memory.view;
    const base = at + L.SATTR;
    let mask = 0;
    if (mode !== undefined) {
      mask |= L.SET_MODE;
      view.setUint32(base + 4, mode, true);
    }
    if (uid !== undefined) {
      mask |= L.SET_UID;
      view.setUint32(base + 8, uid, true);
    }
    if (gid !== undefined) {
      mask |= L.SET_GID;
      view.setUint32(base + 12, gid, true);
    }
    if (sizeBytes !== undefined) {
      mask |= L.SET_SIZE;
      view.setFloat64(base + 16, sizeBytes, true);
    }
    if (atime === 'now') mask |= L.SET_ATIME_NOW;
    else if (atime) {
      mask |= L.SET_ATIME;
      view.setFloat64(base + 24, atime.seconds, true);
      view.setUint32(base + 40, atime.nanoseconds, true);
    }
    if (mtime === 'now') mask |= L.SET_MTIME_NOW;
    else if (mtime) {
      mask |= L.SET_MTIME;
      view.setFloat64(base + 32, mtime.seconds, true);
      view.setUint32(base + 44, mtime.nanoseconds, true);
    }
    view.setUint32(base, mask, true);
  }

  // ---- results -----------------------------------------------------------------------------------------------------

  private decode(at: number, errno: number, payload: number): Outcome {
    const view = this.memory.view;
    const op = view.getUint32(at + L.OP, true);
    // Refused without being run: the block holds no results.
    if (errno === ESTALE && this.withdrawal) return refusal(op, ESTALE);
    switch (op) {
      case L.OP_GETATTR:
        return withAttributes(errno, this.attributes(at + L.ATTRIBUTES));
      case L.OP_SETATTR:
      case L.OP_COMMIT:
        return { errno, wcc: this.wcc(at + L.BEFORE, at + L.ATTRIBUTES) } satisfies WccOutcome as Outcome;
      case L.OP_LOOKUP:
        return this.lookupOutcome(at, errno);
      case L.OP_CREATE:
      case L.OP_MKDIR:
      case L.OP_SYMLINK:
      case L.OP_MKNOD:
        return {
          ...this.lookupOutcome(at, errno),
          wcc: this.wcc(at + L.BEFORE, at + L.ATTRIBUTES2),
        } satisfies CreateOutcome as Outcome;
      case L.OP_REMOVE:
      case L.OP_RMDIR:
        return { errno, wcc: this.wcc(at + L.BEFORE, at + L.ATTRIBUTES2) } satisfies WccOutcome as Outcome;
      case L.OP_RENAME:
        return {
          errno,
          from: this.wcc(at + L.BEFORE, at + L.ATTRIBUTES2),
          to: this.wcc(at + L.BEFORE2, at + L.ATTRIBUTES3),
        } as Outcome;
      case L.OP_LINK:
        return {
          ...withAttributes(errno, this.attributes(at + L.ATTRIBUTES)),
          wcc: this.wcc(at + L.BEFORE, at + L.ATTRIBUTES2),
        } as Outcome;
      case L.OP_WRITE:
        return {
          errno,
          wcc: this.wcc(at + L.BEFORE, at + L.ATTRIBUTES),
          count: view.getUint32(at + L.COUNT, true),
          committed: view.getUint32(at + L.COMMITTED, true),
        } satisfies WriteOutcome as Outcome;
      default:
        return this.decodeReading(op, at, errno, payload);
    }
  }

  private decodeReading(op: number, at: number, errno: number, payload: number): Outcome {
    const view = this.memory.view;
    const head = withAttributes(errno, this.attributes(at + L.ATTRIBUTES));
    const count = view.getUint32(at + L.COUNT, true);
    const eof = (view.getUint32(at + L.RESULT_FLAGS, true) & L.RESULT_EOF) !== 0;
    switch (op) {
      case L.OP_ACCESS:
        return { ...head, granted: errno === 0 ? count : 0 } as Outcome;
      case L.OP_READLINK:
        return errno === 0
          ? ({ ...head, target: this.memory.bytes.slice(at + L.TEXT, at + L.TEXT + count) } as Outcome)
          : head;
      case L.OP_READ:
        return { ...head, payload, count, eof } satisfies ReadOutcome as Outcome;
      case L.OP_READDIR: {
        const entries = errno === 0 ? this.directoryEntries(at, count) : [];
        return { ...head, entries, eof: errno === 0 && eof } satisfies ReaddirOutcome as Outcome;
      }
      case L.OP_FSSTAT:
        return {
          ...head,
          totalBytes: this.statistic(at, errno, 0),
          freeBytes: this.statistic(at, errno, 1),
          availableBytes: this.statistic(at, errno, 2),
          totalFiles: this.statistic(at, errno, 3),
          freeFiles: this.statistic(at, errno, 4),
          availableFiles: this.statistic(at, errno, 5),
        } satisfies FsStatOutcome as Outcome;
      case L.OP_PATHCONF:
        return {
          ...head,
          linkMax: this.statistic(at, errno, 0),
          nameMax: this.statistic(at, errno, 1),
        } satisfies PathconfOutcome as Outcome;
      default:
        assert(false, `operation ${op} in a completed block`);
    }
  }

  private statistic(at: number, errno: number, index: number): number {
    return errno === 0 ? this.memory.view.getFloat64(at + L.STATISTICS + 8 * index, true) : 0;
  }

  private lookupOutcome(at: number, errno: number): LookupOutcome {
    const attributes = this.attributes(at + L.ATTRIBUTES);
    const directory = this.attributes(at + L.ATTRIBUTES2);
    const length = this.memory.view.getUint32(at + L.HANDLE, true);
    const handle = length > 0 ? this.memory.bytes.slice(at + L.HANDLE + 4, at + L.HANDLE + 4 + length) : undefined;
    if (errno === 0 && attributes && directory && handle) return { errno, attributes, handle, directory };
    // An object that was found or made is not told of when the operation failed after all.
    return directory ? { errno, directory } : { errno };
  }

  private attributes(at: number): Attributes | undefined {
    const view = this.memory.view;
    if (view.getUint32(at, true) === 0) return undefined;
    return {
      type: view.getUint32(at + 4, true),
      mode: view.getUint32(at + 8, true),
      linkCount: view.getUint32(at + 12, true),
      uid: view.getUint32(at + 16, true),
      gid: view.getUint32(at + 20, true),
      sizeBytes: view.getFloat64(at + 32, true),
      usedBytes: view.getFloat64(at + 40, true),
      rdevMajor: view.getUint32(at + 24, true),
      rdevMinor: view.getUint32(at + 28, true),
      fileId: view.getBigUint64(at + 48, true),
      atime: this.time(at + 56, at + 80),
      mtime: this.time(at + 64, at + 84),
      ctime: this.time(at + 72, at + 88),
    };
  }

  private time(secondsAt: number, nanosecondsAt: number): TimeSpec {
    const view = this.memory.view;
    return { seconds: view.getFloat64(secondsAt, true), nanoseconds: view.getUint32(nanosecondsAt, true) };
  }

  private wcc(beforeAt: number, afterAt: number): Wcc {
    const after = this.attributes(afterAt);
    const view = this.memory.view;
    if (view.getUint32(beforeAt, true) === 0) return after ? { after } : {};
    const before = {
      sizeBytes: view.getFloat64(beforeAt + 8, true),
      mtime: this.time(beforeAt + 16, beforeAt + 32),
      ctime: this.time(beforeAt + 24, beforeAt + 36),
    };
    return after ? { before, after } : { before };
  }

  private directoryEntries(at: number, count: number): DirectoryEntry[] {
    const { view, bytes } = this.memory;
    const plus = (view.getUint32(at + L.FLAGS, true) & L.FLAG_PLUS) !== 0;
    let entry = view.getFloat64(at + L.ADDRESS, true);
    const entries: DirectoryEntry[] = [];
    for (let index = 0; index < count; index++) {
      const handleLength = view.getUint32(entry + 24, true);
      const handleAt = entry + L.ENTRY_BYTES + (plus ? L.ATTRIBUTES_BYTES : 0);
      const nameAt = handleAt + handleLength;
      const fileId = view.getBigUint64(entry + 8, true);
      const cookie = view.getBigUint64(entry + 16, true);
      const name = bytes.slice(nameAt, nameAt + view.getUint32(entry + 4, true));
      const attributes = plus ? this.attributes(entry + L.ENTRY_BYTES) : undefined;
      if (attributes && handleLength > 0)
        entries.push({ fileId, name, cookie, handle: bytes.slice(handleAt, nameAt), attributes });
      else entries.push({ fileId, name, cookie });
      entry += view.getUint32(entry, true);
    }
    return entries;
  }
}

function nothing(): void {}

function withAttributes(errno: number, attributes: Attributes | undefined): AttributesOutcome {
  return attributes ? { errno, attributes } : { errno };
}

/** The outcome of an operation that was not run. */
function refusal(op: number, errno: number): Outcome {
  const wcc: Wcc = {};
  switch (op) {
    case L.OP_ACCESS:
      return { errno, granted: 0 } as Outcome;
    case L.OP_READ:
      return { errno, payload: NO_PAYLOAD, count: 0, eof: false } satisfies ReadOutcome as Outcome;
    case L.OP_WRITE:
      return { errno, wcc, count: 0, committed: 0 } satisfies WriteOutcome as Outcome;
    case L.OP_READDIR:
      return { errno, entries: [], eof: false } satisfies ReaddirOutcome as Outcome;
    case L.OP_RENAME:
      return { errno, from: wcc, to: wcc } as Outcome;
    case L.OP_FSSTAT:
      return {
        ...{ errno, totalBytes: 0, freeBytes: 0, availableBytes: 0 },
        ...{ totalFiles: 0, freeFiles: 0, availableFiles: 0 },
      } satisfies FsStatOutcome as Outcome;
    case L.OP_PATHCONF:
      return { errno, linkMax: 0, nameMax: 0 } satisfies PathconfOutcome as Outcome;
    default:
      return { errno, wcc } as Outcome;
  }
}
