import { Errno } from '../base/errors.js';
import type { BlockFront, BlockTarget } from '../io/block-target.js';
import type { Memory } from '../io/ring.js';
import { NO_PAYLOAD_OFFSET } from './effects.js';

/** Pieces of one large transfer under way at once. */
const PIECES_IN_FLIGHT = 4;

/** Where a transfer that finds no memory waits for the next tick. */
export interface Stalled {
  retryLater(run: () => void): void;
}

/** A range to zero that is longer than one packet may be: one piece after the other. */
export class LargeZero implements BlockFront {
  constructor(
    private readonly target: BlockTarget,
    private readonly front: BlockFront,
    private readonly frontRequest: number,
    private offset: number,
    private remaining: number,
    private readonly limit: number,
    private readonly unmap: boolean,
    private readonly fua: boolean,
  ) {}

  next(): void {
    const length = Math.min(this.remaining, this.limit);
    const { offset } = this;
    this.offset += length;
    this.remaining -= length;
    this.target.zero(this, 0, offset, length, this.unmap, this.fua);
  }

  complete(_request: number, errno: number): void {
    if (errno !== 0 || this.remaining === 0) this.front.complete(this.frontRequest, errno);
    else this.next();
  }
}

/**
 * A read or write that is longer than a packet may be (1 MiB), cut into pieces. A pool block cannot be referenced in
 * its
 * middle, so the bytes go through blocks of their own; requests of this size are rare and not bound by the copy.
 */
export class LargeTransfer implements BlockFront {
  private next = 0;
  private inFlight = 0;
  private errno = 0;
  private readonly blocks = new Int32Array(PIECES_IN_FLIGHT).fill(NO_PAYLOAD_OFFSET);
  private readonly starts = new Float64Array(PIECES_IN_FLIGHT);

  constructor(
    private readonly target: BlockTarget,
    private readonly memory: Memory,
    private readonly stalled: Stalled,
    private readonly front: BlockFront,
    private readonly frontRequest: number,
    private readonly isWrite: boolean,
    private readonly offset: number,
    private readonly length: number,
    private readonly payload: number,
    private readonly pieceBytes: number,
    private readonly fua: boolean,
  ) {}

  pump(): void {
    const { memory } = this;
    while (this.errno === 0 && this.next < this.length && this.inFlight < PIECES_IN_FLIGHT) {
      const block = memory.allocate(this.pieceBytes);
      if (block < 0) {
        if (this.inFlight === 0) this.stalled.retryLater(() => this.pump());
        return;
      }
      const start = this.next;
      const length = this.lengthAt(start);
      this.next += length;
      this.inFlight++;
      const slot = this.blocks.indexOf(NO_PAYLOAD_OFFSET);
      this.blocks[slot] = block;
      this.starts[slot] = start;
      if (this.isWrite) {
        memory.bytes.copyWithin(block, this.payload + start, this.payload + start + length);
        this.target.write(this, slot, this.offset + start, length, block, this.fua);
      } else {
        this.target.read(this, slot, this.offset + start, length, block);
      }
    }
    if (this.inFlight === 0 && (this.errno !== 0 || this.next >= this.length))
      this.front.complete(this.frontRequest, this.errno);
  }

  private lengthAt(start: number): number {
    return Math.min(this.pieceBytes, this.length - start);
  }

  complete(slot: number, errno: number): void {
    const block = this.blocks[slot]!;
    const start = this.starts[slot]!;
    if (errno !== 0) this.errno ||= errno || Errno.EIO;
    else if (!this.isWrite) this.memory.bytes.copyWithin(this.payload + start, block, block + this.lengthAt(start));
    this.memory.release(block);
    this.blocks[slot] = NO_PAYLOAD_OFFSET;
    this.inFlight--;
    this.pump();
  }
}
