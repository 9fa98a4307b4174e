import { UUID_JUST_CREATED } from './superblock.js';

/** Bit 0 of the current identifier: its writer was Primary. Never part of the identity. */
export const UUID_PRIMARY_BIT = 1n;
/** Distance between a bitmap identifier and the one a resync source derives from it. */
export const UUID_NEW_BM_OFFSET = 1n << 48n;
const UUID_MASK = 0xffff_ffff_ffff_ffffn;

/** Numbers of the four slots, as on the wire (P_UUIDS) and in DRBD 8.4 enum drbd_uuid_index. */
export const UI_CURRENT = 0;
export const UI_BITMAP = 1;
export const UI_HISTORY_START = 2;
export const UI_HISTORY_END = 3;
export type UuidSlot = typeof UI_CURRENT | typeof UI_BITMAP | typeof UI_HISTORY_START | typeof UI_HISTORY_END;

/** Whether two identifiers name the same generation (bit 0 aside). */
export function sameGeneration(left: bigint, right: bigint): boolean {
  return (left | UUID_PRIMARY_BIT) === (right | UUID_PRIMARY_BIT);
}

/**
 * The four generation identifiers of a device: current, bitmap, younger and older history. 64-bit, held as bigint; they
 * change a few times per failover, never per request. A value of 0 means none; 4 means created and never used.
 *
 * @see DRBD 8.4 drbd_main.c _drbd_uuid_set, drbd_uuid_set, drbd_uuid_set_bm, drbd_uuid_new_current
 */
export class GenerationIdentifiers {
  private readonly slots: [bigint, bigint, bigint, bigint];

  constructor(current: bigint = UUID_JUST_CREATED, bitmap = 0n, history0 = 0n, history1 = 0n) {
    this.slots = [current, bitmap, history0, history1];
  }

  get current(): bigint {
    return this.slots[UI_CURRENT];
  }
  get bitmap(): bigint {
    return this.slots[UI_BITMAP];
  }
  get history0(): bigint {
    return this.slots[UI_HISTORY_START];
  }
  get history1(): bigint {
    return this.slots[UI_HISTORY_END];
  }

  get(slot: UuidSlot): bigint {
    return this.slots[slot];
  }

  /** Stores without moving history. For the current slot bit 0 becomes `isPrimary`; other slots ignore it. */
  rawSet(slot: UuidSlot, value: bigint, isPrimary: boolean): void {
    let stored = value & UUID_MASK;
    if (slot === UI_CURRENT) stored = isPrimary ? stored | UUID_PRIMARY_BIT : stored & ~UUID_PRIMARY_BIT;
    this.slots[slot] = stored;
  }

  /** Stores; a value that was there before becomes the younger history. */
  set(slot: UuidSlot, value: bigint, isPrimary: boolean): void {
    if (this.slots[slot] !== 0n) this.pushHistory(this.slots[slot]);
    this.rawSet(slot, value, isPrimary);
  }

  /** The bitmap describes nothing any more: its identifier becomes history. No-op when there is none. */
  clearBitmap(): void {
    if (this.slots[UI_BITMAP] === 0n) return;
    this.pushHistory(this.slots[UI_BITMAP]);
    this.slots[UI_BITMAP] = 0n;
  }

  /**
   * Starts a new data generation: the current one (bit 0 included) becomes the base of the bitmap. The caller makes it
   * durable before anything that belongs to the new generation completes.
   *
   * @param random 64 random bits
   * @returns the bitmap identifier that was overwritten: 0n, or a base the caller should log as lost
   */
  newCurrent(random: bigint, isPrimary: boolean): bigint {
    const lost = this.slots[UI_BITMAP];
    this.slots[UI_BITMAP] = this.slots[UI_CURRENT];
    this.rawSet(UI_CURRENT, random, isPrimary);
    return lost;
  }

  /**
   * The bitmap identifier a resync source hands out (P_SYNC_UUID): derived from the base it syncs from, so that both
   * sides recognise the generation if the resync is cut, or random when there is no such base.
   */
  resyncUuid(random: bigint): bigint {
    const base = this.slots[UI_BITMAP];
    if (base === 0n || base === UUID_JUST_CREATED) return random & UUID_MASK;
    return (base + UUID_NEW_BM_OFFSET) & UUID_MASK;
  }

  /** Marks the current generation with the role (promotion and demotion). */
  setPrimaryBit(isPrimary: boolean): void {
    this.rawSet(UI_CURRENT, this.slots[UI_CURRENT], isPrimary);
  }

  private pushHistory(value: bigint): void {
    this.slots[UI_HISTORY_END] = this.slots[UI_HISTORY_START];
    this.slots[UI_HISTORY_START] = value;
  }
}
