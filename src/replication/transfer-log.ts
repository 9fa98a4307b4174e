import { assert } from '../base/assert.js';
import { ProtocolError } from '../base/errors.js';
import type { Request } from './request.js';

/** Epochs that may be unacknowledged at once; with one write each (queue depth 1) this is how far the peer may lag. */
const EPOCH_RING = 65536;

/**
 * The replicated writes the peer has not yet made durable, oldest first, cut into epochs. One log per connection,
 * shared
 * by its volumes. A write enters when it is sent and leaves when the peer acknowledges the barrier behind it.
 * @see DRBD 8.4 drbd_main.c tl_release, tl_clear; drbd_req.c
 */
export class TransferLog<Owner> {
  /** Epoch that new writes belong to. */
  currentEpoch = 1;
  /** Writes in `currentEpoch` so far. */
  private currentWrites = 0;
  /** Epoch of the last write handed to the connection, and how many of it were. */
  private sentEpoch = 0;
  private sentWrites = 0;
  /** Epochs whose barrier is on its way, oldest first: a ring of numbers and sizes. */
  private readonly barrierNumbers = new Uint32Array(EPOCH_RING);
  private readonly barrierSizes = new Uint32Array(EPOCH_RING);
  private barrierHead = 0;
  private barrierTail = 0;
  private first: Request<Owner> | undefined = undefined;
  private last: Request<Owner> | undefined = undefined;
  length = 0;

  get head(): Request<Owner> | undefined {
    return this.first;
  }

  /** Barriers sent and not acknowledged. */
  get pendingBarriers(): number {
    return this.barrierTail - this.barrierHead;
  }

  get hasRoom(): boolean {
    return this.pendingBarriers < EPOCH_RING - 1;
  }

  /** Whether a write sent in `epoch` is not yet known to be durable at the peer. */
  isOpen(epoch: number): boolean {
    return this.first !== undefined && !isAfter(this.first.epoch, epoch);
  }

  /** Puts a write into the current epoch. */
  admit(request: Request<Owner>, maxEpochWrites: number): void {
    if (this.currentWrites >= maxEpochWrites) this.closeEpoch();
    request.epoch = this.currentEpoch;
    this.currentWrites++;
  }

  /** New writes belong to a new epoch from now on, unless the current one is empty. */
  closeEpoch(): void {
    if (this.currentWrites === 0) return;
    this.currentEpoch = (this.currentEpoch + 1) >>> 0;
    this.currentWrites = 0;
  }

  /**
   * Whether a barrier has to leave before anything of `epoch`.
   * @returns the number of the epoch to close on the wire, or 0
   */
  dueBarrier(epoch: number): number {
    return this.sentWrites > 0 && this.sentEpoch !== epoch ? this.sentEpoch : 0;
  }

  barrierSent(): void {
    assert(this.sentWrites > 0 && this.hasRoom, 'only epochs with writes get a barrier');
    const slot = this.barrierTail++ % EPOCH_RING;
    this.barrierNumbers[slot] = this.sentEpoch;
    this.barrierSizes[slot] = this.sentWrites;
    this.sentWrites = 0;
  }

  /** A write was handed to the connection; barriers of older epochs must have left before. */
  writeSent(request: Request<Owner>): void {
    assert(this.dueBarrier(request.epoch) === 0, 'a barrier is due before this write');
    this.sentEpoch = request.epoch;
    this.sentWrites++;
    request.previous = this.last;
    request.next = undefined;
    if (this.last) this.last.next = request;
    else this.first = request;
    this.last = request;
    this.length++;
  }

  /**
   * The peer made an epoch durable. The caller then takes the epoch's requests from the head.
   * @throws ProtocolError if it is not the oldest one, or of another size
   */
  barrierAcked(barrierNumber: number, size: number): void {
    const slot = this.barrierHead % EPOCH_RING;
    if (this.pendingBarriers === 0 || this.barrierNumbers[slot] !== barrierNumber || this.barrierSizes[slot] !== size)
      throw new ProtocolError(
        'DRBDTS_DRBD_BAD_BARRIER_ACK',
        `barrier ${barrierNumber} with ${size} writes acknowledged, but ` +
          (this.pendingBarriers === 0
            ? 'none is outstanding'
            : `the oldest is ${this.barrierNumbers[slot]} with ${this.barrierSizes[slot]} writes`),
        'DRBD 8.4 drbd_main.c tl_release',
      );
    this.barrierHead++;
  }

  remove(request: Request<Owner>): void {
    if (request.previous) request.previous.next = request.next;
    else this.first = request.next;
    if (request.next) request.next.previous = request.previous;
    else this.last = request.previous;
    request.previous = undefined;
    request.next = undefined;
    this.length--;
  }

  /** The connection is gone: its barriers are forgotten. The caller has emptied the log. */
  reset(): void {
    assert(this.length === 0, 'the log is emptied first');
    this.closeEpoch();
    this.barrierHead = 0;
    this.barrierTail = 0;
    this.sentWrites = 0;
    this.sentEpoch = 0;
  }
}

/** Whether epoch `one` is younger than `other`; epoch numbers wrap at 2^32. */
function isAfter(one: number, other: number): boolean {
  return ((one - other) | 0) > 0;
}
