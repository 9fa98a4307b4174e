import { assert } from '../../src/base/assert.js';
import type { Memory } from '../../src/io/ring.js';

const ALIGNMENT = 4096;
const POISON = 0xdb;

/** The pool of one simulated process. Released blocks are poisoned, so that whoever still uses one reads garbage. */
export class SimMemory implements Memory {
  readonly bytes: Uint8Array;
  readonly view: DataView;
  /** References per 4096-byte page; only the first page of a block counts. */
  private readonly references: Int32Array;
  private readonly lengths: Int32Array;
  private readonly free = new Map<number, number[]>();
  private next = 0;
  /** Blocks somebody still holds. */
  held = 0;

  constructor(readonly poolBytes: number) {
    this.bytes = new Uint8Array(poolBytes);
    this.view = new DataView(this.bytes.buffer);
    this.references = new Int32Array(poolBytes / ALIGNMENT);
    this.lengths = new Int32Array(poolBytes / ALIGNMENT);
  }

  allocate(lengthBytes: number): number {
    assert(lengthBytes > 0, 'a block has bytes');
    let size = ALIGNMENT;
    while (size < lengthBytes) size *= 2;
    let offset = this.free.get(size)?.pop();
    if (offset === undefined) {
      if (this.next + size > this.poolBytes) return -1;
      offset = this.next;
      this.next += size;
    }
    this.references[offset / ALIGNMENT] = 1;
    this.lengths[offset / ALIGNMENT] = size;
    this.held++;
    return offset;
  }

  retain(offset: number): void {
    const page = this.pageOf(offset);
    this.references[page]!++;
  }

  release(offset: number): void {
    const page = this.pageOf(offset);
    if (--this.references[page]! > 0) return;
    const size = this.lengths[page]!;
    this.bytes.fill(POISON, offset, offset + size);
    const list = this.free.get(size);
    if (list) list.push(offset);
    else this.free.set(size, [offset]);
    this.held--;
  }

  private pageOf(offset: number): number {
    assert(offset >= 0 && offset % ALIGNMENT === 0, `block offset ${offset}`);
    const page = offset / ALIGNMENT;
    assert(this.references[page]! > 0, `block ${offset} is used after its last reference`);
    return page;
  }
}
