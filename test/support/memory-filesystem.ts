/**
 * The FileSystem contract over memory, for tests of the programs above it: POSIX permissions, sticky times (a counter),
 * ext4-like handles. It judges like the kernel, but is written for reading, not for speed.
 */
import { Errno } from '../../src/base/errors.js';
import type { Memory } from '../../src/io/ring.js';
import {
  type Attributes,
  type AttributesOutcome,
  type CreateHow,
  type CreateOutcome,
  type Credential,
  type DirectoryEntry,
  type FileSystem,
  FileType,
  type FsStatOutcome,
  type KernelHandle,
  type LookupOutcome,
  type Outcome,
  type PathconfOutcome,
  type ReaddirOutcome,
  type ReadOutcome,
  type SetAttributes,
  Stability,
  type TimeSpec,
  type Wcc,
  type WccOutcome,
  type WriteOutcome,
} from '../../src/nfs/filesystem.js';

const ENOTDIR = 20;
const EISDIR = 21;
const ENOTEMPTY = 39;
const ESTALE = 116;
const ENOTSYNC = 522;
const ROOT = 2;
const READ = 4;
const WRITE = 2;
const EXECUTE = 1;

interface Inode {
  readonly number: number;
  readonly generation: number;
  readonly type: number;
  mode: number;
  uid: number;
  gid: number;
  linkCount: number;
  data: Uint8Array;
  readonly children: Map<string, { readonly inode: number; readonly cookie: bigint }>;
  readonly rdevMajor: number;
  readonly rdevMinor: number;
  atime: TimeSpec;
  mtime: TimeSpec;
  ctime: TimeSpec;
}

const latin1 = (name: Uint8Array) => Buffer.from(name).toString('latin1');

export class MemoryFileSystem implements FileSystem {
  readonly id = Uint8Array.of(1, 2, 3, 4, 5, 6, 7, 8);
  readonly maxFileSizeBytes = 2 ** 44 - 4096;
  readonly rootHandle: KernelHandle;
  isWithdrawn = false;
  /** Operations executed: `mkdir d`, `write 0+5 stability=2`. */
  readonly log: string[] = [];
  /** Every operation waits for this first. */
  gate: Promise<void> = Promise.resolve();
  /** The next operation fails with this errno, doing nothing. */
  failNext = 0;
  private readonly inodes = new Map<number, Inode>();
  private nextInode = ROOT;
  private nextCookie = 0n;
  private clock = 1_000_000_000;

  constructor(private readonly memory: Memory) {
    const root = this.make(FileType.DIR, { uid: 0, gid: 0, groups: [] }, { mode: 0o777 }, 0, 0);
    root.linkCount = 2;
    this.rootHandle = this.handleOf(root);
  }

  // ---- what tests look at -----------------------------------------------------------------------------------------

  handleOf(inode: Inode): KernelHandle {
    const bytes = new Uint8Array(12);
    const view = new DataView(bytes.buffer);
    view.setUint32(0, 1, true);
    view.setUint32(4, inode.number, true);
    view.setUint32(8, inode.generation, true);
    return bytes;
  }

  /** The object at a path of names below the root. */
  at(path: string): Inode {
    let inode = this.inodes.get(ROOT)!;
    for (const name of path.split('/').filter((part) => part !== '')) {
      const child = inode.children.get(name);
      if (child === undefined) throw new Error(`no ${path}`);
      inode = this.inodes.get(child.inode)!;
    }
    return inode;
  }

  text(path: string): string {
    return Buffer.from(this.at(path).data).toString();
  }

  // ---- the contract -----------------------------------------------------------------------------------------------

  async getattr(handle: KernelHandle): Promise<AttributesOutcome> {
    const inode = await this.begin(handle);
    return typeof inode === 'number' ? { errno: inode } : this.with(0, inode);
  }

  async setattr(
    credential: Credential,
    handle: KernelHandle,
    changes: SetAttributes,
    guardCtime: TimeSpec | undefined,
    durable: boolean,
  ): Promise<WccOutcome> {
    const inode = await this.begin(handle, `setattr ${JSON.stringify(changes)} durable=${durable}`);
    if (typeof inode === 'number') return { errno: inode, wcc: {} };
    const before = this.before(inode);
    const isOwner = credential.uid === 0 || credential.uid === inode.uid;
    const wantsOwner = changes.mode !== undefined || changes.uid !== undefined || changes.gid !== undefined;
    let errno = 0;
    if (guardCtime && !isSameTime(guardCtime, inode.ctime)) errno = ENOTSYNC;
    else if (wantsOwner && !isOwner) errno = Errno.EPERM;
    else if (changes.uid !== undefined && changes.uid !== inode.uid && credential.uid !== 0) errno = Errno.EPERM;
    else if (changes.sizeBytes !== undefined && inode.type !== FileType.REG) errno = Errno.EINVAL;
    else if (changes.sizeBytes !== undefined && !isOwner && !this.may(credential, inode, WRITE)) errno = Errno.EACCES;
    if (errno === 0) this.apply(inode, changes);
    return { errno, wcc: { before, after: this.attributes(inode) } };
  }

  async lookup(credential: Credential, directory: KernelHandle, name: Uint8Array): Promise<LookupOutcome> {
    const parent = await this.begin(directory);
    if (typeof parent === 'number') return { errno: parent };
    if (parent.type !== FileType.DIR) return { errno: ENOTDIR };
    const base = { directory: this.attributes(parent) };
    if (!this.may(credential, parent, EXECUTE)) return { errno: Errno.EACCES, ...base };
    const text = latin1(name);
    if (text === '.') return { errno: 0, handle: directory.slice(), attributes: this.attributes(parent), ...base };
    const child = text === '..' ? { inode: this.parentOf(parent) } : parent.children.get(text);
    if (child === undefined) return { errno: Errno.ENOENT, ...base };
    const inode = this.inodes.get(child.inode)!;
    return { errno: 0, handle: this.handleOf(inode), attributes: this.attributes(inode), ...base };
  }

  async access(
    credential: Credential,
    handle: KernelHandle,
    mask: number,
  ): Promise<AttributesOutcome & { granted: number }> {
    const inode = await this.begin(handle);
    if (typeof inode === 'number') return { errno: inode, granted: 0 };
    const isDirectory = inode.type === FileType.DIR;
    let granted = 0;
    if (this.may(credential, inode, READ)) granted |= 1;
    if (this.may(credential, inode, WRITE)) granted |= 4 | 8 | (isDirectory ? 16 : 0);
    if (this.may(credential, inode, EXECUTE)) granted |= isDirectory ? 2 : 32;
    return { ...this.with(0, inode), granted: granted & mask };
  }

  async readlink(_credential: Credential, handle: KernelHandle): Promise<AttributesOutcome & { target?: Uint8Array }> {
    const inode = await this.begin(handle);
    if (typeof inode === 'number') return { errno: inode };
    if (inode.type !== FileType.LNK) return this.with(Errno.EINVAL, inode);
    return { ...this.with(0, inode), target: inode.data };
  }

  async read(credential: Credential, handle: KernelHandle, offsetBytes: number, count: number): Promise<ReadOutcome> {
    const nothing = { payload: -1, count: 0, eof: false };
    const inode = await this.begin(handle);
    if (typeof inode === 'number') return { errno: inode, ...nothing };
    if (inode.type !== FileType.REG)
      return { ...this.with(inode.type === FileType.DIR ? EISDIR : Errno.EINVAL, inode), ...nothing };
    if (!this.may(credential, inode, READ)) return { ...this.with(Errno.EACCES, inode), ...nothing };
    const data = inode.data.subarray(offsetBytes, offsetBytes + count);
    const eof = offsetBytes + data.length >= inode.data.length;
    if (data.length === 0) return { ...this.with(0, inode), payload: -1, count: 0, eof };
    const payload = this.memory.allocate(data.length);
    if (payload < 0) return { ...this.with(Errno.ENOMEM, inode), ...nothing };
    this.memory.bytes.set(data, payload);
    return { ...this.with(0, inode), payload, count: data.length, eof };
  }

  async write(
    credential: Credential,
    handle: KernelHandle,
    offsetBytes: number,
    address: number,
    count: number,
    stability: number,
  ): Promise<WriteOutcome> {
    const nothing = { count: 0, committed: Stability.UNSTABLE };
    const inode = await this.begin(handle, `write ${offsetBytes}+${count} stability=${stability}`);
    if (typeof inode === 'number') return { errno: inode, wcc: {}, ...nothing };
    const before = this.before(inode);
    let errno = 0;
    if (inode.type !== FileType.REG) errno = inode.type === FileType.DIR ? EISDIR : Errno.EINVAL;
    else if (credential.uid !== inode.uid && !this.may(credential, inode, WRITE)) errno = Errno.EACCES;
    if (errno !== 0) return { errno, wcc: { after: this.attributes(inode) }, ...nothing };
    if (offsetBytes + count > inode.data.length) this.resize(inode, offsetBytes + count);
    inode.data.set(this.memory.bytes.subarray(address, address + count), offsetBytes);
    this.touch(inode);
    return { errno: 0, wcc: { before, after: this.attributes(inode) }, count, committed: stability };
  }

  async create(
    credential: Credential,
    directory: KernelHandle,
    name: Uint8Array,
    how: CreateHow,
    durable: boolean,
  ): Promise<CreateOutcome> {
    const parent = await this.begin(directory, `create ${latin1(name)} ${how.kind} durable=${durable}`);
    if (typeof parent === 'number') return { errno: parent, wcc: {} };
    const known = parent.children.get(latin1(name));
    const existing = known && this.inodes.get(known.inode)!;
    if (existing === undefined) {
      const attributes = how.kind === 'exclusive' ? { mode: 0 } : how.attributes;
      const outcome = this.enter(credential, parent, name, FileType.REG, attributes);
      if (how.kind === 'exclusive' && outcome.errno === 0) {
        const inode = this.at2(parent, name);
        const view = new DataView(how.verifier.buffer, how.verifier.byteOffset, 8);
        inode.mtime = { seconds: view.getUint32(0) & 0x7fffffff, nanoseconds: 0 };
        inode.atime = { seconds: view.getUint32(4) & 0x7fffffff, nanoseconds: 0 };
      }
      return outcome;
    }
    const before = this.before(parent);
    const wcc = { before, after: this.attributes(parent) };
    const same = { errno: 0, handle: this.handleOf(existing), attributes: this.attributes(existing), wcc };
    if (existing.type !== FileType.REG || how.kind === 'guarded') return { errno: Errno.EEXIST, wcc };
    if (how.kind === 'exclusive') {
      const view = new DataView(how.verifier.buffer, how.verifier.byteOffset, 8);
      const isSame =
        existing.mtime.seconds === (view.getUint32(0) & 0x7fffffff) &&
        existing.atime.seconds === (view.getUint32(4) & 0x7fffffff) &&
        existing.data.length === 0;
      return isSame ? same : { errno: Errno.EEXIST, wcc };
    }
    if (how.attributes.sizeBytes !== undefined) {
      if (!this.may(credential, existing, WRITE)) return { errno: Errno.EACCES, wcc };
      this.apply(existing, { sizeBytes: how.attributes.sizeBytes });
    }
    return { ...same, attributes: this.attributes(existing) };
  }

  async mkdir(
    credential: Credential,
    directory: KernelHandle,
    name: Uint8Array,
    attributes: SetAttributes,
    durable: boolean,
  ): Promise<CreateOutcome> {
    const parent = await this.begin(directory, `mkdir ${latin1(name)} durable=${durable}`);
    if (typeof parent === 'number') return { errno: parent, wcc: {} };
    return this.enter(credential, parent, name, FileType.DIR, attributes);
  }

  async symlink(
    credential: Credential,
    directory: KernelHandle,
    name: Uint8Array,
    target: Uint8Array,
    _attributes: SetAttributes,
    durable: boolean,
  ): Promise<CreateOutcome> {
    const parent = await this.begin(directory, `symlink ${latin1(name)} durable=${durable}`);
    if (typeof parent === 'number') return { errno: parent, wcc: {} };
    // The target is the caller's memory: kept means copied.
    return this.enter(credential, parent, name, FileType.LNK, { mode: 0o777 }, target.slice());
  }

  async mknod(
    credential: Credential,
    directory: KernelHandle,
    name: Uint8Array,
    type: number,
    attributes: SetAttributes,
    rdevMajor: number,
    rdevMinor: number,
    durable: boolean,
  ): Promise<CreateOutcome> {
    const parent = await this.begin(directory, `mknod ${latin1(name)} durable=${durable}`);
    if (typeof parent === 'number') return { errno: parent, wcc: {} };
    const isDevice = type === FileType.CHR || type === FileType.BLK;
    if (isDevice && credential.uid !== 0) return { errno: Errno.EPERM, wcc: { after: this.attributes(parent) } };
    return this.enter(credential, parent, name, type, attributes, undefined, rdevMajor, rdevMinor);
  }

  async remove(
    credential: Credential,
    directory: KernelHandle,
    name: Uint8Array,
    durable: boolean,
  ): Promise<WccOutcome> {
    return this.unlink(credential, directory, name, false, `remove ${latin1(name)} durable=${durable}`);
  }

  async rmdir(
    credential: Credential,
    directory: KernelHandle,
    name: Uint8Array,
    durable: boolean,
  ): Promise<WccOutcome> {
    return this.unlink(credential, directory, name, true, `rmdir ${latin1(name)} durable=${durable}`);
  }

  async rename(
    credential: Credential,
    fromDirectory: KernelHandle,
    fromName: Uint8Array,
    toDirectory: KernelHandle,
    toName: Uint8Array,
    durable: boolean,
  ): Promise<Outcome & { readonly from: Wcc; readonly to: Wcc }> {
    const log = `rename ${latin1(fromName)} ${latin1(toName)} durable=${durable}`;
    const from = await this.begin(fromDirectory, log);
    const to = await this.begin(toDirectory);
    if (typeof from === 'number') return { errno: from, from: {}, to: {} };
    if (typeof to === 'number') return { errno: to, from: {}, to: {} };
    const before = [this.before(from), this.before(to)] as const;
    const errno = this.move(credential, from, fromName, to, toName);
    return {
      errno,
      from: { before: before[0], after: this.attributes(from) },
      to: { before: before[1], after: this.attributes(to) },
    };
  }

  async link(
    credential: Credential,
    handle: KernelHandle,
    directory: KernelHandle,
    name: Uint8Array,
    durable: boolean,
  ): Promise<WccOutcome & AttributesOutcome> {
    const inode = await this.begin(handle, `link ${latin1(name)} durable=${durable}`);
    const parent = await this.begin(directory);
    if (typeof inode === 'number') return { errno: inode, wcc: {} };
    if (typeof parent === 'number') return { ...this.with(parent, inode), wcc: {} };
    const before = this.before(parent);
    let errno = 0;
    if (inode.type === FileType.DIR) errno = EISDIR;
    else if (parent.children.has(latin1(name))) errno = Errno.EEXIST;
    else if (!this.may(credential, parent, WRITE | EXECUTE)) errno = Errno.EACCES;
    if (errno === 0) {
      parent.children.set(latin1(name), { inode: inode.number, cookie: ++this.nextCookie });
      inode.linkCount++;
      this.touch(parent);
    }
    return { ...this.with(errno, inode), wcc: { before, after: this.attributes(parent) } };
  }

  async readdir(
    credential: Credential,
    directory: KernelHandle,
    cookie: bigint,
    maxEntries: number,
    plus: boolean,
  ): Promise<ReaddirOutcome> {
    const parent = await this.begin(directory);
    if (typeof parent === 'number') return { errno: parent, entries: [], eof: false };
    if (parent.type !== FileType.DIR) return { ...this.with(ENOTDIR, parent), entries: [], eof: false };
    if (!this.may(credential, parent, READ)) return { ...this.with(Errno.EACCES, parent), entries: [], eof: false };
    // The kernel refuses positions it cannot seek to.
    if (cookie > 0x7fffffffffffffffn) return { ...this.with(Errno.EINVAL, parent), entries: [], eof: false };
    const entry = (name: string, inode: Inode, at: bigint): DirectoryEntry => ({
      fileId: BigInt(inode.number),
      name: Buffer.from(name, 'latin1'),
      cookie: at,
      ...(plus && { handle: this.handleOf(inode), attributes: this.attributes(inode) }),
    });
    const base = 1n << 40n;
    const all = [
      entry('.', parent, base),
      entry('..', this.inodes.get(this.parentOf(parent))!, base + 1n),
      ...[...parent.children].map(([name, child]) =>
        entry(name, this.inodes.get(child.inode)!, base + 1n + child.cookie),
      ),
    ];
    const rest = all.filter((one) => one.cookie > cookie);
    return { ...this.with(0, parent), entries: rest.slice(0, maxEntries), eof: rest.length <= maxEntries };
  }

  async fsstat(_credential: Credential, handle: KernelHandle): Promise<FsStatOutcome> {
    const inode = await this.begin(handle);
    const sizes = {
      ...{ totalBytes: 1000 * 4096, freeBytes: 900 * 4096, availableBytes: 850 * 4096 },
      ...{ totalFiles: 500, freeFiles: 500 - this.inodes.size, availableFiles: 500 - this.inodes.size },
    };
    return typeof inode === 'number' ? { errno: inode, ...sizes } : { ...this.with(0, inode), ...sizes };
  }

  async pathconf(handle: KernelHandle): Promise<PathconfOutcome> {
    const inode = await this.begin(handle);
    const limits = { linkMax: 65000, nameMax: 255 };
    return typeof inode === 'number' ? { errno: inode, ...limits } : { ...this.with(0, inode), ...limits };
  }

  async commit(_credential: Credential, handle: KernelHandle): Promise<WccOutcome> {
    const inode = await this.begin(handle, 'commit');
    if (typeof inode === 'number') return { errno: inode, wcc: {} };
    const wcc = { before: this.before(inode), after: this.attributes(inode) };
    return { errno: inode.type === FileType.DIR ? EISDIR : 0, wcc };
  }

  async withdraw(): Promise<void> {
    this.isWithdrawn = true;
  }

  // ---- inside -----------------------------------------------------------------------------------------------------

  private async begin(handle: KernelHandle, log?: string): Promise<Inode | number> {
    // Handles are views of memory that others reuse; keep nothing of them.
    const bytes = handle.slice();
    await this.gate;
    if (this.isWithdrawn) return ESTALE;
    const { failNext } = this;
    this.failNext = 0;
    if (failNext !== 0) return failNext;
    const view = new DataView(bytes.buffer);
    if (bytes.length !== 12 || view.getUint32(0, true) !== 1) return ESTALE;
    const inode = this.inodes.get(view.getUint32(4, true));
    if (inode === undefined || inode.generation !== view.getUint32(8, true) || inode.linkCount === 0) return ESTALE;
    if (log !== undefined) this.log.push(log);
    return inode;
  }

  private now(): TimeSpec {
    return { seconds: ++this.clock, nanoseconds: 7 };
  }

  private touch(inode: Inode): void {
    inode.mtime = this.now();
    inode.ctime = inode.mtime;
  }

  private may(credential: Credential, inode: Inode, want: number): boolean {
    if (credential.uid === 0) return true;
    const isGroup = credential.gid === inode.gid || credential.groups.includes(inode.gid);
    const shift = credential.uid === inode.uid ? 6 : isGroup ? 3 : 0;
    return ((inode.mode >> shift) & want) === want;
  }

  private make(
    type: number,
    credential: Credential,
    attributes: SetAttributes,
    rdevMajor: number,
    rdevMinor: number,
  ): Inode {
    const number = this.nextInode++;
    const now = this.now();
    const inode: Inode = {
      ...{ number, type, rdevMajor, rdevMinor, linkCount: type === FileType.DIR ? 2 : 1 },
      generation: number === ROOT ? 0 : 1000 + number,
      mode: attributes.mode ?? 0o644,
      uid: credential.uid,
      gid: credential.gid,
      data: new Uint8Array(0),
      children: new Map(),
      ...{ atime: now, mtime: now, ctime: now },
    };
    this.inodes.set(number, inode);
    return inode;
  }

  private enter(
    credential: Credential,
    parent: Inode,
    name: Uint8Array,
    type: number,
    attributes: SetAttributes,
    data?: Uint8Array,
    rdevMajor = 0,
    rdevMinor = 0,
  ): CreateOutcome {
    const before = this.before(parent);
    let errno = 0;
    if (parent.type !== FileType.DIR) errno = ENOTDIR;
    else if (parent.children.has(latin1(name))) errno = Errno.EEXIST;
    else if (!this.may(credential, parent, WRITE | EXECUTE)) errno = Errno.EACCES;
    if (errno !== 0) return { errno, wcc: { before, after: this.attributes(parent) } };
    const inode = this.make(type, credential, attributes, rdevMajor, rdevMinor);
    if (data !== undefined) inode.data = data;
    parent.children.set(latin1(name), { inode: inode.number, cookie: ++this.nextCookie });
    if (type === FileType.DIR) parent.linkCount++;
    this.apply(inode, attributes);
    this.touch(parent);
    return {
      errno: 0,
      handle: this.handleOf(inode),
      attributes: this.attributes(inode),
      wcc: { before, after: this.attributes(parent) },
    };
  }

  private at2(parent: Inode, name: Uint8Array): Inode {
    return this.inodes.get(parent.children.get(latin1(name))!.inode)!;
  }

  private async unlink(
    credential: Credential,
    directory: KernelHandle,
    name: Uint8Array,
    wantsDirectory: boolean,
    log: string,
  ): Promise<WccOutcome> {
    const parent = await this.begin(directory, log);
    if (typeof parent === 'number') return { errno: parent, wcc: {} };
    const before = this.before(parent);
    const child = parent.children.get(latin1(name));
    const inode = child && this.inodes.get(child.inode)!;
    let errno = 0;
    if (inode === undefined) errno = Errno.ENOENT;
    else if (!this.may(credential, parent, WRITE | EXECUTE)) errno = Errno.EACCES;
    else if (wantsDirectory && inode.type !== FileType.DIR) errno = ENOTDIR;
    else if (!wantsDirectory && inode.type === FileType.DIR) errno = EISDIR;
    else if (inode.children.size > 0) errno = ENOTEMPTY;
    else {
      parent.children.delete(latin1(name));
      inode.linkCount -= wantsDirectory ? 2 : 1;
      if (wantsDirectory) parent.linkCount--;
      this.touch(parent);
    }
    return { errno, wcc: { before, after: this.attributes(parent) } };
  }

  private move(credential: Credential, from: Inode, fromName: Uint8Array, to: Inode, toName: Uint8Array): number {
    const source = from.children.get(latin1(fromName));
    if (source === undefined) return Errno.ENOENT;
    if (!this.may(credential, from, WRITE | EXECUTE) || !this.may(credential, to, WRITE | EXECUTE)) return Errno.EACCES;
    const moved = this.inodes.get(source.inode)!;
    const known = to.children.get(latin1(toName));
    const target = known && this.inodes.get(known.inode)!;
    if (target === moved) return 0;
    if (target !== undefined) {
      if (moved.type === FileType.DIR && target.type !== FileType.DIR) return ENOTDIR;
      if (moved.type !== FileType.DIR && target.type === FileType.DIR) return EISDIR;
      if (target.children.size > 0) return ENOTEMPTY;
      target.linkCount = 0;
    }
    from.children.delete(latin1(fromName));
    to.children.set(latin1(toName), { inode: moved.number, cookie: ++this.nextCookie });
    this.touch(from);
    this.touch(to);
    return 0;
  }

  private resize(inode: Inode, sizeBytes: number): void {
    const data = new Uint8Array(sizeBytes);
    data.set(inode.data.subarray(0, sizeBytes));
    inode.data = data;
  }

  private apply(inode: Inode, changes: SetAttributes): void {
    if (changes.sizeBytes !== undefined) {
      this.resize(inode, changes.sizeBytes);
      inode.mtime = this.now();
    }
    if (changes.uid !== undefined) inode.uid = changes.uid;
    if (changes.gid !== undefined) inode.gid = changes.gid;
    if (changes.mode !== undefined) inode.mode = changes.mode;
    if (changes.atime !== undefined) inode.atime = changes.atime === 'now' ? this.now() : changes.atime;
    if (changes.mtime !== undefined) inode.mtime = changes.mtime === 'now' ? this.now() : changes.mtime;
    inode.ctime = this.now();
  }

  private parentOf(inode: Inode): number {
    for (const other of this.inodes.values())
      for (const child of other.children.values()) if (child.inode === inode.number) return other.number;
    return ROOT;
  }

  private before(inode: Inode): NonNullable<Wcc['before']> {
    return { sizeBytes: inode.data.length, mtime: inode.mtime, ctime: inode.ctime };
  }

  private with(errno: number, inode: Inode): AttributesOutcome {
    return { errno, attributes: this.attributes(inode) };
  }

  private attributes(inode: Inode): Attributes {
    const { type, mode, linkCount, uid, gid, rdevMajor, rdevMinor, atime, mtime, ctime } = inode;
    const sizeBytes = type === FileType.DIR ? 4096 : inode.data.length;
    const usedBytes = Math.ceil(sizeBytes / 4096) * 4096;
    const fileId = BigInt(inode.number);
    return { type, mode, linkCount, uid, gid, sizeBytes, usedBytes, rdevMajor, rdevMinor, fileId, atime, mtime, ctime };
  }
}

function isSameTime(a: TimeSpec, b: TimeSpec): boolean {
  return a.seconds === b.seconds && a.nanoseconds === b.nanoseconds;
}
