import { assert } from '../base/assert.js';

/** 16 MiB of storage: the unit in which resync and application writes keep out of each other's way. */
export const RESYNC_EXTENT_SECTORS = 32768;
/** Activity log extents (4 MiB) in a resync extent. */
export const ACTIVITY_LOG_EXTENTS_PER_RESYNC_EXTENT = 4;
/** Elements of the kernel's table. */
export const RESYNC_EXTENT_SLOTS = 61;

const FREE = -1;

/**
 * The resync extents in use: each has references (resync blocks being processed) and is either *locked* (no activity
 * log extent in it is in use) or still waiting for that while it refuses new writes.
 * @see DRBD 8.4 drbd_actlog.c, drbd_rs_begin_io and drbd_try_rs_begin_io
 */
export class ResyncExtents {
  private readonly numbers = new Int32Array(RESYNC_EXTENT_SLOTS).fill(FREE);
  private readonly references = new Int32Array(RESYNC_EXTENT_SLOTS);
  private readonly locked = new Uint8Array(RESYNC_EXTENT_SLOTS);
  private readonly wanted = new Uint8Array(RESYNC_EXTENT_SLOTS);
  private used = 0;
  /** Grows with every `clear`: references taken before are not given back after it. */
  generation = 1;

  /** Extents that refuse writes. */
  get count(): number {
    return this.used;
  }

  isLocked(extent: number): boolean {
    const slot = this.numbers.indexOf(extent);
    return slot >= 0 && this.locked[slot] === 1;
  }

  /** Whether a write into `activityLogExtent` has to wait; remembers that one does. */
  refusesWrite(activityLogExtent: number): boolean {
    if (this.used === 0) return false;
    const slot = this.numbers.indexOf(Math.floor(activityLogExtent / ACTIVITY_LOG_EXTENTS_PER_RESYNC_EXTENT));
    if (slot < 0) return false;
    this.wanted[slot] = 1;
    return true;
  }

  /** A write waits for this extent: finish it first and do not throttle it. */
  isWanted(extent: number): boolean {
    const slot = this.numbers.indexOf(extent);
    return slot >= 0 && this.wanted[slot] === 1;
  }

  /**
   * Takes a reference: new writes into the extent are refused from now on.
   * @returns false when the table is full
   */
  enter(extent: number): boolean {
    let slot = this.numbers.indexOf(extent);
    if (slot < 0) {
      // At most half of the table, as the kernel does: the rest stays for the other direction.
      if (this.used >= RESYNC_EXTENT_SLOTS >> 1) return false;
      slot = this.numbers.indexOf(FREE);
      this.numbers[slot] = extent;
      this.locked[slot] = 0;
      this.wanted[slot] = 0;
      this.used++;
    }
    this.references[slot]!++;
    return true;
  }

  /** All writes that were in the extent are gone. */
  lock(extent: number): void {
    const slot = this.numbers.indexOf(extent);
    assert(slot >= 0, `resync extent ${extent} is in the table`);
    this.locked[slot] = 1;
  }

  /** Gives a reference back. @returns whether writes may enter the extent again */
  leave(extent: number): boolean {
    const slot = this.numbers.indexOf(extent);
    assert(slot >= 0, `resync extent ${extent} is in the table`);
    if (--this.references[slot]! > 0) return false;
    this.numbers[slot] = FREE;
    this.used--;
    return true;
  }

  clear(): void {
    this.numbers.fill(FREE);
    this.references.fill(0);
    this.generation++;
    this.used = 0;
  }
}
