/**
 * A BlockTarget over one file: no replication, no metadata. What front ends are tested on, and the floor under the
 * replicated figures of the benchmarks.
 */
import { assert } from '../../src/base/assert.js';
import { Errno } from '../../src/base/errors.js';
import type { BlockFront, BlockTarget } from '../../src/io/block-target.js';
import type { BlockFile } from '../../src/io/ring.js';

const SECTOR_BYTES = 512;

export class FileTarget implements BlockTarget {
  readonly sizeBytes: number;
  readonly sectorBytes: number;
  /** Opened for reading and for writing. */
  readers = 0;
  writers = 0;
  /** What `open(true)` answers. */
  role: 'Primary' | 'Secondary' = 'Primary';
  /** Who waits for the operation with this cookie, and under which number; and the cookies that are free. */
  private readonly fronts: (BlockFront | undefined)[] = [];
  private readonly requests: number[] = [];
  private readonly free: number[] = [];

  constructor(private readonly file: BlockFile) {
    this.sectorBytes = Math.max(SECTOR_BYTES, file.alignmentBytes);
    this.sizeBytes = file.sizeBytes - (file.sizeBytes % this.sectorBytes);
    file.setDone((cookie, errno) => this.done(cookie, errno));
  }

  open(write: boolean): number {
    if (this.role === 'Secondary') return write ? Errno.EROFS : Errno.EMEDIUMTYPE;
    if (write) this.writers++;
    else this.readers++;
    return 0;
  }

  close(write: boolean): void {
    if (write) this.writers--;
    else this.readers--;
    assert(this.readers >= 0 && this.writers >= 0, 'closed more often than opened');
  }

  read(front: BlockFront, request: number, offsetBytes: number, lengthBytes: number, payload: number): void {
    this.file.read(this.cookie(front, request), offsetBytes, payload, lengthBytes);
  }

  write(
    front: BlockFront,
    request: number,
    offsetBytes: number,
    lengthBytes: number,
    payload: number,
    fua: boolean,
  ): void {
    this.file.write(this.cookie(front, request), offsetBytes, payload, lengthBytes, fua);
  }

  flush(front: BlockFront, request: number): void {
    this.file.flush(this.cookie(front, request));
  }

  zero(
    front: BlockFront,
    request: number,
    offsetBytes: number,
    lengthBytes: number,
    unmap: boolean,
    fua: boolean,
  ): void {
    this.file.zero(this.cookie(front, request), offsetBytes, lengthBytes, !unmap, fua);
  }

  private cookie(front: BlockFront, request: number): number {
    const cookie = this.free.pop() ?? this.fronts.length;
    this.fronts[cookie] = front;
    this.requests[cookie] = request;
    return cookie;
  }

  private done(cookie: number, errno: number): void {
    const front = this.fronts[cookie];
    assert(front !== undefined, 'an operation ends once');
    this.fronts[cookie] = undefined;
    this.free.push(cookie);
    front.complete(this.requests[cookie]!, errno);
  }
}
