import { assert } from '../base/assert.js';
import { ProtocolError } from '../base/errors.js';

/** Unacknowledged epochs a peer may have open here; a kernel has two. */
const RING = 65536;

/**
 * The peer's write epochs as this side receives them. An epoch is ready when its barrier arrived and its writes are
 * done; ready epochs are acknowledged in order, after one flush of every disk that started when they were ready (so a
 * flush serves all epochs that became ready while the previous one ran).
 * @see DRBD 8.4 drbd_receiver.c, receive_Barrier and drbd_may_finish_epoch
 */
export class ReceivingEpochs {
  private readonly barriers = new Uint32Array(RING);
  private readonly sizes = new Uint32Array(RING);
  private readonly active = new Uint32Array(RING);
  /** Oldest unacknowledged, first that is not covered by a flush, and the open one. */
  private head = 0;
  private flushed = 0;
  private open = 0;
  /** Writes of the peer that are not done. */
  activeWrites = 0;

  /** Epochs that exist here, the open one included (`ep:` in /proc/drbd). */
  get count(): number {
    return this.open - this.head + 1;
  }

  /** A write arrived. @returns the epoch it belongs to, for `writeDone` */
  writeReceived(): number {
    const slot = this.open % RING;
    this.sizes[slot]!++;
    this.active[slot]!++;
    this.activeWrites++;
    return this.open;
  }

  writeDone(epoch: number): void {
    assert(
      epoch >= this.head && epoch <= this.open && this.active[epoch % RING]! > 0,
      `epoch ${epoch} has active writes`,
    );
    this.active[epoch % RING]!--;
    this.activeWrites--;
  }

  /** @throws ProtocolError when the peer has more epochs open than any sane one would */
  barrierReceived(barrier: number): void {
    if (this.open - this.head >= RING - 1)
      throw new ProtocolError(
        'DRBDTS_DRBD_TOO_MANY_EPOCHS',
        `${RING} epochs unacknowledged`,
        'DRBD 8.4 receive_Barrier',
      );
    this.barriers[this.open % RING] = barrier;
    this.open++;
    this.sizes[this.open % RING] = 0;
    this.active[this.open % RING] = 0;
  }

  /** Ready epochs that no flush has covered yet. */
  get wantsFlush(): boolean {
    return this.flushed < this.open && this.active[this.flushed % RING] === 0;
  }

  /** A flush of every disk starts now. @returns the first epoch it does not cover, for `takeAcknowledged` */
  flushStarted(): number {
    while (this.wantsFlush) this.flushed++;
    return this.flushed;
  }

  /** The flush is done: calls `acknowledge` for each epoch it covered, oldest first. */
  takeAcknowledged(covered: number, acknowledge: (barrier: number, size: number) => void): void {
    while (this.head < covered) {
      const slot = this.head % RING;
      acknowledge(this.barriers[slot]!, this.sizes[slot]!);
      this.head++;
    }
  }

  reset(): void {
    this.activeWrites = 0;
    this.head = 0;
    this.flushed = 0;
    this.open = 0;
    this.sizes[0] = 0;
    this.active[0] = 0;
  }
}
