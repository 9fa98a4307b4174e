/**
 * A block target as one file in a FUSE filesystem, to be the backing file of a loop device: the way to a kernel block
 * device where the kernel has no NBD client. Speaks the FUSE wire protocol 7.31 (Linux include/uapi/linux/fuse.h; host
 * byte order, which on every machine we run on is little-endian) over the ring, in the engine's own event loop.
 */
import { assert } from '../base/assert.js';
import { Errno } from '../base/errors.js';
import type { BlockFront, BlockTarget } from '../io/block-target.js';
import { type Connection, type ConnectionHandler, NO_PAYLOAD, type Ring } from '../io/ring.js';

const FUSE_LOOKUP = 1;
const FUSE_FORGET = 2;
const FUSE_GETATTR = 3;
const FUSE_OPEN = 14;
const FUSE_READ = 15;
const FUSE_WRITE = 16;
const FUSE_STATFS = 17;
const FUSE_RELEASE = 18;
const FUSE_FSYNC = 20;
const FUSE_FLUSH = 25;
const FUSE_INIT = 26;
const FUSE_OPENDIR = 27;
const FUSE_READDIR = 28;
const FUSE_RELEASEDIR = 29;
const FUSE_INTERRUPT = 36;
const FUSE_DESTROY = 38;
const FUSE_BATCH_FORGET = 42;
const FUSE_FALLOCATE = 43;

const ENOSYS = 38;
const ROOT_NODE = 1;
const FILE_NODE = 2;
const IN_HEADER_BYTES = 40;
const OUT_HEADER_BYTES = 16;
const MAX_TRANSFER_BYTES = 1024 * 1024;
const PAGE_BYTES = 4096;
const O_ACCMODE = 3;
/** Attributes never change behind the kernel's back. */
const ATTRIBUTE_VALID_SECONDS = 3600n;

const INIT_ASYNC_READ = 1 << 0;
const INIT_BIG_WRITES = 1 << 5;
const INIT_ASYNC_DIO = 1 << 15;
const INIT_MAX_PAGES = 1 << 22;
const FOPEN_DIRECT_IO = 1 << 0;
const FOPEN_PARALLEL_DIRECT_WRITES = 1 << 6;
const FALLOC_FL_PUNCH_HOLE = 2;
const FALLOC_FL_ZERO_RANGE = 0x10;

/** The kernel keeps at most this many background requests in flight; a few more come from direct callers. */
const MAX_BACKGROUND = 128;
const MAX_REQUESTS = 1024;

const KIND_READ = 0;
const KIND_WRITE = 1;
const KIND_OTHER = 2;

export class FuseFile implements ConnectionHandler, BlockFront {
  private readonly connection: Connection;
  private readonly reply = new Uint8Array(224);
  private readonly replyView = new DataView(this.reply.buffer);
  private readonly name: Uint8Array;
  // One row per request in flight, by request number.
  private readonly kinds = new Uint8Array(MAX_REQUESTS);
  private readonly uniqueLow = new Uint32Array(MAX_REQUESTS);
  private readonly uniqueHigh = new Uint32Array(MAX_REQUESTS);
  private readonly payloads = new Float64Array(MAX_REQUESTS);
  private readonly lengths = new Uint32Array(MAX_REQUESTS);
  private readonly offsets = new Float64Array(MAX_REQUESTS);
  private readonly free = new Int32Array(MAX_REQUESTS);
  private freeCount = MAX_REQUESTS;
  /**
   * Reads that found the pool empty, oldest first; tried again whenever a request ends. Never more than MAX_REQUESTS.
   */
  private readonly starved: number[] = [];
  private openReaders = 0;
  private openWriters = 0;
  private isClosed = false;

  /**
   * Mounts on `directory` and shows `target` there as the file `fileName`.
   * @param onClosed called once when the mount is gone (unmounted, or `close`)
   */
  constructor(
    private readonly ring: Ring,
    private readonly target: BlockTarget,
    readonly directory: string,
    readonly fileName: string,
    private readonly onClosed: () => void,
  ) {
    this.name = new TextEncoder().encode(fileName);
    for (let i = 0; i < MAX_REQUESTS; i++) this.free[i] = MAX_REQUESTS - 1 - i;
    this.connection = ring.mountFuse(directory, { subtype: 'drbdts', maxWriteBytes: MAX_TRANSFER_BYTES });
    this.connection.setHandler(this);
  }

  get path(): string {
    return `${this.directory}/${this.fileName}`;
  }

  /** Whether the kernel holds the file open. */
  get isOpen(): boolean {
    return this.openReaders + this.openWriters > 0;
  }

  close(): void {
    this.connection.close();
  }

  closed(_errno: number): void {
    if (this.isClosed) return;
    this.isClosed = true;
    for (; this.openWriters > 0; this.openWriters--) this.target.close(true);
    for (; this.openReaders > 0; this.openReaders--) this.target.close(false);
    this.onClosed();
  }

  drained(): void {
    // The kernel bounds what is in flight, and with it what we have to send.
  }

  frame(header: DataView, at: number, length: number, payload: number, payloadLength: number, _flags: number): void {
    const opcode = header.getUint32(at + 4, true);
    const low = header.getUint32(at + 8, true);
    const high = header.getUint32(at + 12, true);
    const node = header.getUint32(at + 16, true);
    const body = at + IN_HEADER_BYTES;
    switch (opcode) {
      case FUSE_WRITE:
        this.write(header, body, low, high, payload, payloadLength);
        return;
      case FUSE_READ:
        this.read(header, body, low, high);
        return;
      case FUSE_FSYNC:
      case FUSE_FLUSH:
        this.target.flush(this, this.begin(KIND_OTHER, low, high, NO_PAYLOAD, 0, 0));
        return;
      case FUSE_FALLOCATE:
        this.fallocate(header, body, low, high);
        return;
      case FUSE_FORGET:
      case FUSE_BATCH_FORGET:
      case FUSE_INTERRUPT:
        return;
      case FUSE_INIT:
        this.init(header, body, low, high);
        return;
      case FUSE_LOOKUP:
        this.lookup(header, body, at + length, node, low, high);
        return;
      case FUSE_GETATTR:
        this.getattr(node, low, high);
        return;
      case FUSE_OPEN:
        this.open(header, body, low, high);
        return;
      case FUSE_RELEASE:
        this.release(header, body, low, high);
        return;
      case FUSE_STATFS:
        this.reply.fill(0);
        this.replyView.setUint32(OUT_HEADER_BYTES + 40, PAGE_BYTES, true);
        this.replyView.setUint32(OUT_HEADER_BYTES + 44, 255, true);
        this.answer(low, high, 0, 80);
        return;
      case FUSE_OPENDIR:
        this.reply.fill(0);
        this.answer(low, high, 0, 16);
        return;
      case FUSE_READDIR:
        this.answer(low, high, 0, 0);
        return;
      case FUSE_RELEASEDIR:
      case FUSE_DESTROY:
        this.answer(low, high, 0, 0);
        return;
      default:
        this.answer(low, high, ENOSYS, 0);
    }
  }

  complete(request: number, errno: number): void {
    const kind = this.kinds[request]!;
    const payload = this.payloads[request]!;
    const low = this.uniqueLow[request]!;
    const high = this.uniqueHigh[request]!;
    if (errno !== 0) this.answer(low, high, errno, 0);
    else if (kind === KIND_READ) this.answerData(low, high, payload, this.lengths[request]!);
    else if (kind === KIND_WRITE) {
      this.replyView.setUint32(OUT_HEADER_BYTES, this.lengths[request]!, true);
      this.answer(low, high, 0, 8);
    } else this.answer(low, high, 0, 0);
    if (payload !== NO_PAYLOAD) this.ring.memory.release(payload);
    this.free[this.freeCount++] = request;
    if (this.starved.length > 0) this.startRead(this.starved.shift()!);
  }

  private begin(kind: number, low: number, high: number, payload: number, offset: number, length: number): number {
    assert(this.freeCount > 0, `the kernel has more than ${MAX_REQUESTS} FUSE requests in flight`);
    const request = this.free[--this.freeCount]!;
    this.kinds[request] = kind;
    this.uniqueLow[request] = low;
    this.uniqueHigh[request] = high;
    this.payloads[request] = payload;
    this.offsets[request] = offset;
    this.lengths[request] = length;
    return request;
  }

  private isInside(offsetBytes: number, lengthBytes: number): boolean {
    const unit = this.target.sectorBytes;
    return offsetBytes % unit === 0 && lengthBytes % unit === 0 && offsetBytes + lengthBytes <= this.target.sizeBytes;
  }

  private read(header: DataView, body: number, low: number, high: number): void {
    const offset = readUint64(header, body + 8);
    const wanted = header.getUint32(body + 16, true);
    const length = Math.max(0, Math.min(wanted, this.target.sizeBytes - offset));
    if (length === 0) this.answer(low, high, 0, 0);
    else if (!this.isInside(offset, length)) this.answer(low, high, Errno.EINVAL, 0);
    else this.startRead(this.begin(KIND_READ, low, high, NO_PAYLOAD, offset, length));
  }

  private startRead(request: number): void {
    const length = this.lengths[request]!;
    const payload = this.ring.memory.allocate(length);
    if (payload === NO_PAYLOAD) {
      this.starved.push(request);
      return;
    }
    this.payloads[request] = payload;
    this.target.read(this, request, this.offsets[request]!, length, payload);
  }

  private write(header: DataView, body: number, low: number, high: number, payload: number, length: number): void {
    const offset = readUint64(header, body + 8);
    if (length === 0 || header.getUint32(body + 16, true) !== length || !this.isInside(offset, length)) {
      if (payload !== NO_PAYLOAD) this.ring.memory.release(payload);
      this.answer(low, high, Errno.EINVAL, 0);
      return;
    }
    this.target.write(this, this.begin(KIND_WRITE, low, high, payload, offset, length), offset, length, payload, false);
  }

  private fallocate(header: DataView, body: number, low: number, high: number): void {
    const offset = readUint64(header, body + 8);
    const length = readUint64(header, body + 16);
    const mode = header.getUint32(body + 24, true);
    if ((mode & (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE)) === 0) this.answer(low, high, Errno.EOPNOTSUPP, 0);
    else if (length === 0 || !this.isInside(offset, length)) this.answer(low, high, Errno.EINVAL, 0);
    else {
      const request = this.begin(KIND_OTHER, low, high, NO_PAYLOAD, offset, 0);
      this.target.zero(this, request, offset, length, (mode & FALLOC_FL_PUNCH_HOLE) !== 0, false);
    }
  }

  private init(header: DataView, body: number, low: number, high: number): void {
    const minor = header.getUint32(body + 4, true);
    const offered = header.getUint32(body + 12, true);
    const flags = offered & (INIT_ASYNC_READ | INIT_BIG_WRITES | INIT_ASYNC_DIO | INIT_MAX_PAGES);
    const view = this.replyView;
    this.reply.fill(0);
    const out = OUT_HEADER_BYTES;
    view.setUint32(out, 7, true);
    view.setUint32(out + 4, Math.min(31, minor), true);
    view.setUint32(out + 8, header.getUint32(body + 8, true), true);
    view.setUint32(out + 12, flags, true);
    view.setUint16(out + 16, MAX_BACKGROUND, true);
    view.setUint16(out + 18, (MAX_BACKGROUND * 3) / 4, true);
    view.setUint32(out + 20, MAX_TRANSFER_BYTES, true);
    view.setUint32(out + 24, 1, true);
    view.setUint16(out + 28, MAX_TRANSFER_BYTES / PAGE_BYTES, true);
    this.answer(low, high, 0, 64);
  }

  private lookup(header: DataView, body: number, end: number, node: number, low: number, high: number): void {
    const name = new Uint8Array(header.buffer, header.byteOffset + body, Math.max(0, end - body - 1));
    const isOurs = node === ROOT_NODE && name.length === this.name.length && name.every((b, i) => b === this.name[i]);
    if (!isOurs) {
      this.answer(low, high, Errno.ENOENT, 0);
      return;
    }
    const view = this.replyView;
    this.reply.fill(0);
    view.setBigUint64(OUT_HEADER_BYTES, BigInt(FILE_NODE), true);
    view.setBigUint64(OUT_HEADER_BYTES + 16, ATTRIBUTE_VALID_SECONDS, true);
    view.setBigUint64(OUT_HEADER_BYTES + 24, ATTRIBUTE_VALID_SECONDS, true);
    this.putAttributes(OUT_HEADER_BYTES + 40, FILE_NODE);
    this.answer(low, high, 0, 128);
  }

  private getattr(node: number, low: number, high: number): void {
    this.reply.fill(0);
    this.replyView.setBigUint64(OUT_HEADER_BYTES, ATTRIBUTE_VALID_SECONDS, true);
    this.putAttributes(OUT_HEADER_BYTES + 16, node);
    this.answer(low, high, 0, 104);
  }

  private putAttributes(at: number, node: number): void {
    const view = this.replyView;
    const isFile = node === FILE_NODE;
    view.setBigUint64(at, BigInt(node), true);
    view.setBigUint64(at + 8, BigInt(isFile ? this.target.sizeBytes : 0), true);
    view.setBigUint64(at + 16, BigInt(isFile ? Math.ceil(this.target.sizeBytes / 512) : 0), true);
    view.setUint32(at + 60, isFile ? 0o100600 : 0o040700, true);
    view.setUint32(at + 64, isFile ? 1 : 2, true);
    view.setUint32(at + 80, PAGE_BYTES, true);
  }

  private open(header: DataView, body: number, low: number, high: number): void {
    const isWriter = (header.getUint32(body, true) & O_ACCMODE) !== 0;
    const errno = this.target.open(isWriter);
    if (errno !== 0) {
      this.answer(low, high, errno, 0);
      return;
    }
    if (isWriter) this.openWriters++;
    else this.openReaders++;
    this.reply.fill(0);
    this.replyView.setUint32(OUT_HEADER_BYTES, isWriter ? 1 : 0, true);
    this.replyView.setUint32(OUT_HEADER_BYTES + 8, FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES, true);
    this.answer(low, high, 0, 16);
  }

  private release(header: DataView, body: number, low: number, high: number): void {
    const isWriter = header.getUint32(body, true) === 1;
    if (isWriter) this.openWriters--;
    else this.openReaders--;
    this.target.close(isWriter);
    this.answer(low, high, 0, 0);
  }

  private answer(low: number, high: number, errno: number, bodyBytes: number): void {
    this.replyView.setUint32(0, OUT_HEADER_BYTES + bodyBytes, true);
    this.replyView.setInt32(4, -errno, true);
    this.replyView.setUint32(8, low, true);
    this.replyView.setUint32(12, high, true);
    this.connection.send(this.reply, OUT_HEADER_BYTES + bodyBytes, NO_PAYLOAD, 0);
  }

  private answerData(low: number, high: number, payload: number, length: number): void {
    this.replyView.setUint32(0, OUT_HEADER_BYTES + length, true);
    this.replyView.setInt32(4, 0, true);
    this.replyView.setUint32(8, low, true);
    this.replyView.setUint32(12, high, true);
    this.connection.send(this.reply, OUT_HEADER_BYTES, payload, length);
  }
}

/** Device offsets are below 2^53; a larger one is out of every device's range and fails the range check. */
function readUint64(view: DataView, at: number): number {
  return view.getUint32(at, true) + view.getUint32(at + 4, true) * 4294967296;
}
