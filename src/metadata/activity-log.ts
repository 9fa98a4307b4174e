import { assert } from '../base/assert.js';
import { crc32cRaw } from '../base/crc32c.js';
import { MetadataError } from '../base/errors.js';
import { activityLogBlocks, BLOCK_BYTES, BLOCK_SECTORS } from './layout.js';

/** Sectors of one activity log extent (4 MiB); extent number = sector / 8192. */
export const AL_EXTENT_SECTORS = 8192;
/** Changes one transaction can carry. */
export const AL_UPDATES_PER_TRANSACTION = 64;
/** Slots whose old contents one transaction carries. */
export const AL_CONTEXT_PER_TRANSACTION = 919;
/** Extent number of a free slot. */
export const AL_FREE = 0xffff_ffff;
/** Slots at least and at most (al-extents). */
export const AL_MIN_EXTENTS = 67;
export const AL_MAX_EXTENTS = 65534;
export const AL_DEFAULT_EXTENTS = 1237;

const AL_MAGIC = 0x69cb65a2;
const AL_TYPE_UPDATE = 0;
const AL_TYPE_INITIALIZED = 0xffff;
const NO_SLOT = 0xffff;
const OFFSET_CRC = 8;
const OFFSET_SLOTS = 36;
const OFFSET_EXTENTS = 164;
const OFFSET_CONTEXT = 420;
/** Rings beyond this (64 MiB) are not read: no tool writes them by default and they must fit in memory. */
const MAX_REPLAY_BLOCKS = 16384;

/** `begin`: every extent is hot and referenced, data may be submitted now. */
export const AL_HOT = 0;
/** `begin`: nothing was taken; try again after `release` or `transactionCommitted` reported room. */
export const AL_WAIT = -1;

/** Slots the ring can describe completely at any time; al-extents above it is cut down to it. */
export function maxActivityLogExtents(alStripes: number, alStripeSize4k: number): number {
  const blocks = activityLogBlocks(alStripes, alStripeSize4k);
  return blocks > 72 ? AL_MAX_EXTENTS : Math.min(AL_MAX_EXTENTS, (blocks - 1) * AL_CONTEXT_PER_TRANSACTION);
}

export interface ActivityLogOptions {
  /** Slots (al-extents), 67 to 65534. */
  readonly extents: number;
  readonly alStripes?: number;
  readonly alStripeSize4k?: number;
  /** Number of the first transaction; 0 for a new device object (DRBD never reads it back from disk). */
  readonly firstTransaction?: number;
}

/**
 * The activity log: the set of 4 MiB extents that may have writes in flight, kept on disk so that after a crash of the
 * Primary exactly those are resynced. A write takes a reference on every extent it touches and gives it back when it is
 * forgotten. A hit costs a table look-up; a miss takes a free or the least recently used idle slot and queues a change.
 *
 * Protocol of use:
 * 1. `begin(first, last)` answers AL_HOT, AL_WAIT, or an ordinal > 0: references are taken, but the data must wait
 *    until `transactionsCommitted` has reached the ordinal.
 * 2. While `hasQueuedChanges` and not `isTransactionOpen`: `openTransaction()`, write the bitmap pages of
 *    `evictedExtent(0..)` that changed, then `encodeTransaction(block)`, write the block durably, then
 *    `transactionCommitted()`. Changes that arrive meanwhile are queued for the next one. A failed write is a metadata
 *    I/O error: the disk is detached.
 * 3. `release(first, last)` once per successful `begin`.
 *
 * No method allocates after construction.
 *
 * @see DRBD 8.4 drbd_actlog.c, lru_cache.c
 */
export class ActivityLog {
  /** Slots (al-extents). */
  readonly extents: number;
  readonly alStripes: number;
  readonly alStripeSize4k: number;
  /** Counters for the status view. */
  hits = 0;
  misses = 0;
  starvations = 0;

  private readonly blocks: number;
  /** Extent of each slot as of the last committed transaction. */
  private readonly committed: Uint32Array;
  /** Extent of each slot including changes not committed yet. */
  private readonly wanted: Uint32Array;
  private readonly references: Uint32Array;
  /** Ordinal of the transaction that makes the slot's extent durable; 0 once it is. */
  private readonly ordinalOf: Float64Array;
  /** Doubly linked list of idle slots, least recently used first. Entry `extents` is the list's head. */
  private readonly next: Int32Array;
  private readonly previous: Int32Array;
  /** Open-addressing hash table of slot + 1 by extent; 0 is empty. */
  private readonly table: Int32Array;
  private readonly tableMask: number;
  private readonly queued = new Uint16Array(AL_UPDATES_PER_TRANSACTION);
  private queuedCount = 0;
  private readonly open = new Uint16Array(AL_UPDATES_PER_TRANSACTION);
  private openCount = 0;
  private isOpen = false;
  private readonly evicted = new Uint32Array(AL_UPDATES_PER_TRANSACTION);
  private evictedNow = 0;
  private idleCount: number;
  private isStarvingNow = false;
  private transactionNumber: number;
  private contextStart = 0;
  private committedCount = 0;

  constructor(options: ActivityLogOptions) {
    this.alStripes = options.alStripes ?? 1;
    this.alStripeSize4k = options.alStripeSize4k ?? 8;
    this.extents = options.extents;
    this.blocks = activityLogBlocks(this.alStripes, this.alStripeSize4k);
    assert(this.blocks > 0, 'a valid activity log geometry');
    assert(
      this.extents >= AL_MIN_EXTENTS && this.extents <= maxActivityLogExtents(this.alStripes, this.alStripeSize4k),
      'al-extents within what the ring can describe',
    );
    this.committed = new Uint32Array(this.extents).fill(AL_FREE);
    this.wanted = new Uint32Array(this.extents).fill(AL_FREE);
    this.references = new Uint32Array(this.extents);
    this.ordinalOf = new Float64Array(this.extents);
    this.next = new Int32Array(this.extents + 1);
    this.previous = new Int32Array(this.extents + 1);
    // All slots start free, and free slots stand first in the idle list, lowest number first.
    for (let slot = 0; slot <= this.extents; slot++) {
      this.next[slot] = slot === this.extents ? 0 : slot + 1;
      this.previous[slot] = slot === 0 ? this.extents : slot - 1;
    }
    this.idleCount = this.extents;
    this.tableMask = 2 ** Math.ceil(Math.log2(this.extents * 2 + 2)) - 1;
    this.table = new Int32Array(this.tableMask + 1);
    this.transactionNumber = (options.firstTransaction ?? 0) >>> 0;
  }

  /** Slots with references. */
  get used(): number {
    return this.extents - this.idleCount - this.pendingUnreferenced();
  }
  /** No reference is handed out until some slot becomes idle. */
  get isStarving(): boolean {
    return this.isStarvingNow;
  }
  get hasQueuedChanges(): boolean {
    return this.queuedCount > 0;
  }
  get isTransactionOpen(): boolean {
    return this.isOpen;
  }
  /** Transactions committed since construction; compare with the ordinals of `begin`. */
  get transactionsCommitted(): number {
    return this.committedCount;
  }
  /** Number the next (or the open) transaction carries on disk. */
  get nextTransaction(): number {
    return this.transactionNumber;
  }

  /** Whether the extent is in the log durably. */
  isHot(extent: number): boolean {
    const slot = this.find(extent);
    return slot >= 0 && this.ordinalOf[slot] === 0;
  }

  /** References on an extent; 0 if it is idle or not in the log (resync may lock it then). */
  referencesOf(extent: number): number {
    const slot = this.find(extent);
    return slot < 0 ? 0 : this.references[slot]!;
  }

  /** Whether any extent in `first` to `last` is referenced. */
  isAnyReferenced(first: number, last: number): boolean {
    for (let extent = first; extent <= last; extent++) if (this.referencesOf(extent) > 0) return true;
    return false;
  }

  /**
   * Takes one reference on each extent from `first` to `last` (at most 64), all or none.
   *
   * @returns AL_HOT, AL_WAIT, or the ordinal of the transaction to wait for
   */
  begin(first: number, last: number): number {
    assert(first >= 0 && last >= first && last < AL_FREE, 'an extent range');
    assert(last - first < AL_UPDATES_PER_TRANSACTION, 'all extents of a request fit in one transaction');
    if (this.isStarvingNow) {
      this.starvations++;
      return AL_WAIT;
    }
    if (first === last) {
      // The steady state: one extent, hot.
      const slot = this.find(first);
      if (slot >= 0) {
        this.hits++;
        const pending = this.ordinalOf[slot]!;
        if (this.references[slot]!++ === 0 && pending === 0) this.unlink(slot);
        return pending;
      }
    }
    let missing = 0;
    let idleHits = 0;
    for (let extent = first; extent <= last; extent++) {
      const slot = this.find(extent);
      if (slot < 0) missing++;
      else if (this.references[slot] === 0 && this.ordinalOf[slot] === 0) idleHits++;
    }
    if (missing > 0) {
      if (missing > this.idleCount - idleHits) {
        // Requests to hot extents could keep all slots in use for ever: stop handing out references until one is idle.
        this.isStarvingNow = true;
        this.starvations++;
        return AL_WAIT;
      }
      if (missing > AL_UPDATES_PER_TRANSACTION - this.queuedCount) return AL_WAIT;
    }
    // Hits first, so that no slot of this request is chosen as a victim for another of its extents.
    let ordinal = AL_HOT;
    for (let extent = first; extent <= last; extent++) {
      const slot = this.find(extent);
      if (slot < 0) continue;
      this.hits++;
      const pending = this.ordinalOf[slot]!;
      if (this.references[slot]!++ === 0 && pending === 0) this.unlink(slot);
      if (pending > ordinal) ordinal = pending;
    }
    if (missing === 0) return ordinal;
    const nextOrdinal = this.committedCount + (this.isOpen ? 2 : 1);
    for (let extent = first; extent <= last; extent++) {
      if (this.find(extent) >= 0) continue;
      this.misses++;
      const slot = this.next[this.extents]!;
      assert(slot !== this.extents, 'an idle slot was counted');
      this.unlink(slot);
      if (this.wanted[slot] !== AL_FREE) this.forget(slot);
      this.wanted[slot] = extent;
      this.references[slot] = 1;
      this.ordinalOf[slot] = nextOrdinal;
      this.remember(slot);
      this.queued[this.queuedCount++] = slot;
    }
    return nextOrdinal;
  }

  /**
   * Gives back the references of one successful `begin`.
   *
   * @returns whether a slot became idle, so that waiting requests should be tried again
   */
  release(first: number, last: number): boolean {
    let becameIdle = false;
    for (let extent = first; extent <= last; extent++) {
      const slot = this.find(extent);
      assert(slot >= 0 && this.references[slot]! > 0, 'only referenced extents are released');
      if (--this.references[slot]! > 0) continue;
      if (this.ordinalOf[slot] === 0) this.append(slot);
      becameIdle = true;
    }
    if (becameIdle) this.isStarvingNow = false;
    return becameIdle;
  }

  /**
   * Closes the queue of changes into a transaction. May be empty: attaching after a size change writes `ringBlocks`
   * empty ones to fill the ring.
   *
   * @returns number of extents that leave the log; their changed bitmap pages must be on disk before the transaction
   */
  openTransaction(): number {
    assert(!this.isOpen, 'one transaction at a time');
    this.isOpen = true;
    this.openCount = this.queuedCount;
    this.evictedNow = 0;
    for (let index = 0; index < this.queuedCount; index++) {
      const slot = this.queued[index]!;
      this.open[index] = slot;
      const old = this.committed[slot]!;
      if (old !== AL_FREE) this.evicted[this.evictedNow++] = old;
    }
    this.queuedCount = 0;
    return this.evictedNow;
  }

  /** Extent that leaves the log with the open transaction; `index` below the number `openTransaction` returned. */
  evictedExtent(index: number): number {
    assert(this.isOpen && index >= 0 && index < this.evictedNow, 'an evicted extent');
    return this.evicted[index]!;
  }

  /** Blocks of 4 KiB in the ring. */
  get ringBlocks(): number {
    return this.blocks;
  }

  /**
   * Encodes the open transaction.
   *
   * @param into exactly 4096 bytes, overwritten; owned by the caller
   * @returns block index in the activity log area where it belongs (sector = activityLogSector + 8 x index)
   */
  encodeTransaction(into: Uint8Array): number {
    assert(this.isOpen, 'a transaction is open');
    assert(into.byteLength === BLOCK_BYTES, 'a transaction is 4096 bytes');
    const view = new DataView(into.buffer, into.byteOffset, BLOCK_BYTES);
    view.setUint32(0, AL_MAGIC);
    view.setUint32(4, this.transactionNumber);
    view.setUint32(OFFSET_CRC, 0);
    view.setUint16(12, AL_TYPE_UPDATE);
    view.setUint16(14, this.openCount);
    view.setUint16(16, this.extents);
    view.setUint16(18, this.contextStart);
    into.fill(0, 20, OFFSET_SLOTS);
    for (let index = 0; index < AL_UPDATES_PER_TRANSACTION; index++) {
      const isUsed = index < this.openCount;
      const slot = this.open[index]!;
      view.setUint16(OFFSET_SLOTS + index * 2, isUsed ? slot : NO_SLOT);
      view.setUint32(OFFSET_EXTENTS + index * 4, isUsed ? this.wanted[slot]! : AL_FREE);
    }
    for (let index = 0; index < AL_CONTEXT_PER_TRANSACTION; index++) {
      const slot = this.contextStart + index;
      view.setUint32(OFFSET_CONTEXT + index * 4, slot < this.extents ? this.committed[slot]! : AL_FREE);
    }
    view.setUint32(OFFSET_CRC, crc32cRaw(into));
    return ringPosition(this.transactionNumber, this.alStripes, this.alStripeSize4k);
  }

  /**
   * The open transaction is on stable storage: its extents are hot. Requests whose ordinal is reached may go on;
   * waiting ones should be tried again.
   */
  transactionCommitted(): void {
    assert(this.isOpen, 'a transaction is open');
    this.isOpen = false;
    for (let index = 0; index < this.openCount; index++) {
      const slot = this.open[index]!;
      this.committed[slot] = this.wanted[slot]!;
      this.ordinalOf[slot] = 0;
      if (this.references[slot] === 0) this.append(slot);
    }
    this.openCount = 0;
    this.evictedNow = 0;
    this.transactionNumber = (this.transactionNumber + 1) >>> 0;
    this.contextStart += AL_CONTEXT_PER_TRANSACTION;
    if (this.contextStart >= this.extents) this.contextStart = 0;
    this.committedCount++;
  }

  /** Extents that are durably in the log, in slot order. For status and tests; allocates. */
  hotExtents(): number[] {
    return Array.from(this.committed).filter((extent) => extent !== AL_FREE);
  }

  /** Slots in a queued or open transaction whose requests have gone already. */
  private pendingUnreferenced(): number {
    let count = 0;
    for (let index = 0; index < this.queuedCount; index++) if (this.references[this.queued[index]!] === 0) count++;
    for (let index = 0; index < this.openCount; index++) if (this.references[this.open[index]!] === 0) count++;
    return count;
  }

  private hash(extent: number): number {
    return (Math.imul(extent, 0x9e3779b1) >>> 7) & this.tableMask;
  }

  private find(extent: number): number {
    for (let at = this.hash(extent); ; at = (at + 1) & this.tableMask) {
      const entry = this.table[at]!;
      if (entry === 0) return -1;
      if (this.wanted[entry - 1] === extent) return entry - 1;
    }
  }

  private remember(slot: number): void {
    let at = this.hash(this.wanted[slot]!);
    while (this.table[at] !== 0) at = (at + 1) & this.tableMask;
    this.table[at] = slot + 1;
  }

  /** Deletes a slot's entry and moves later entries of the same run up, so that look-ups never meet a hole. */
  private forget(slot: number): void {
    let hole = this.hash(this.wanted[slot]!);
    while (this.table[hole] !== slot + 1) hole = (hole + 1) & this.tableMask;
    for (let at = (hole + 1) & this.tableMask; this.table[at] !== 0; at = (at + 1) & this.tableMask) {
      const home = this.hash(this.wanted[this.table[at]! - 1]!);
      if (((at - home) & this.tableMask) >= ((at - hole) & this.tableMask)) {
        this.table[hole] = this.table[at]!;
        hole = at;
      }
    }
    this.table[hole] = 0;
  }

  private unlink(slot: number): void {
    const before = this.previous[slot]!;
    const after = this.next[slot]!;
    this.next[before] = after;
    this.previous[after] = before;
    this.idleCount--;
  }

  /** Puts a slot at the recently used end of the idle list. */
  private append(slot: number): void {
    const head = this.extents;
    const last = this.previous[head]!;
    this.next[last] = slot;
    this.previous[slot] = last;
    this.next[slot] = head;
    this.previous[head] = slot;
    this.idleCount++;
  }
}

/** Block index in the activity log area of transaction `number`: consecutive ones go to different stripes. */
export function ringPosition(number: number, alStripes: number, alStripeSize4k: number): number {
  const turn = number % (alStripes * alStripeSize4k);
  return (turn % alStripes) * alStripeSize4k + Math.floor(turn / alStripes);
}

/**
 * Fills a block with what create-md and apply-al leave in every block of the log.
 *
 * @param into exactly 4096 bytes, overwritten
 */
export function encodeInitializedBlock(into: Uint8Array): void {
  assert(into.byteLength === BLOCK_BYTES, 'an activity log block is 4096 bytes');
  const view = new DataView(into.buffer, into.byteOffset, BLOCK_BYTES);
  into.fill(0);
  view.setUint32(0, AL_MAGIC);
  view.setUint16(12, AL_TYPE_INITIALIZED);
  view.setUint32(OFFSET_CRC, crc32cRaw(into));
}

/** What an activity log area says. */
export interface ActivityLogReplay {
  /** Extents that may have had writes in flight, ascending, each once. */
  readonly hotExtents: Uint32Array;
  /** Blocks with magic and checksum right; 0 means that there is no activity log here. */
  readonly validBlocks: number;
  /** Valid blocks that hold transactions; the rest are freshly initialised. */
  readonly transactionBlocks: number;
  /** Blocks with a bad magic or checksum: at most one (a torn write) in a log that only ever crashed. */
  readonly corruptBlocks: number;
  /** Number of the newest transaction, or -1 if there is none. */
  readonly newestTransaction: number;
  /**
   * Whether `hotExtents` can be believed. False if there is no valid block, or no valid transaction although some block
   * is damaged; only the very first transaction of a fresh log (block 0) may be torn without another one to go by,
   * because nothing was written under it yet. If a Primary crashed with an unusable log, everything may be out of sync.
   */
  readonly isUsable: boolean;
}

/**
 * Reads an activity log area and computes which extents were hot. Torn and foreign blocks are left out; that is safe
 * for the one block a crash can tear, since a transaction takes effect only once its block is complete.
 *
 * @param area all blocks in the order they lie on disk; borrowed for the call
 * @throws MetadataError `DRBDTS_AL_BAD_SIZE` if `area` is not the ring of the given geometry, or larger than 64 MiB
 * @see DRBD 8.4 drbdmeta.c apply_al, v84_al_disk_to_cpu
 */
export function replayActivityLog(area: Uint8Array, alStripes: number, alStripeSize4k: number): ActivityLogReplay {
  const blocks = activityLogBlocks(alStripes, alStripeSize4k);
  if (blocks === 0 || blocks > MAX_REPLAY_BLOCKS || area.byteLength !== blocks * BLOCK_BYTES)
    throw new MetadataError('DRBDTS_AL_BAD_SIZE', `an activity log of ${area.byteLength} bytes cannot be replayed`);
  const view = new DataView(area.buffer, area.byteOffset, area.byteLength);
  /** By ring order: byte position of a valid transaction, or -1. */
  const transactionAt = new Int32Array(blocks).fill(-1);
  let validBlocks = 0;
  let transactionBlocks = 0;
  let oldest = -1;
  let newest = -1;
  let isFirstDamaged = false;
  for (let turn = 0; turn < blocks; turn++) {
    const at = ringPosition(turn, alStripes, alStripeSize4k) * BLOCK_BYTES;
    if (view.getUint32(at) !== AL_MAGIC || !hasGoodChecksum(area, view, at)) {
      if (turn === 0) isFirstDamaged = true;
      continue;
    }
    validBlocks++;
    if (view.getUint16(at + 12) === AL_TYPE_INITIALIZED) continue;
    transactionBlocks++;
    transactionAt[turn] = at;
    const number = view.getUint32(at + 4) | 0;
    // Transaction numbers wrap at 2^32, so only their signed difference says which came first.
    if (oldest < 0 || ((number - view.getUint32(transactionAt[oldest]! + 4)) | 0) < 0) oldest = turn;
    if (newest < 0 || ((number - view.getUint32(transactionAt[newest]! + 4)) | 0) > 0) newest = turn;
  }
  const slots = new Uint32Array(AL_MAX_EXTENTS).fill(AL_FREE);
  for (let turn = oldest; oldest >= 0; turn = (turn + 1) % blocks) {
    if (transactionAt[turn]! >= 0) applyTransaction(view, transactionAt[turn]!, slots);
    if (turn === newest) break;
  }
  const corruptBlocks = blocks - validBlocks;
  return {
    hotExtents: sortedUnique(slots),
    validBlocks,
    transactionBlocks,
    corruptBlocks,
    isUsable:
      validBlocks > 0 && (transactionBlocks > 0 || corruptBlocks === 0 || (corruptBlocks === 1 && isFirstDamaged)),
    newestTransaction: newest < 0 ? -1 : view.getUint32(transactionAt[newest]! + 4),
  };
}

/** Copy of the block under test: its checksum is that of the block with the field zero. */
const scratch = new Uint8Array(BLOCK_BYTES);

function hasGoodChecksum(area: Uint8Array, view: DataView, at: number): boolean {
  scratch.set(area.subarray(at, at + BLOCK_BYTES));
  scratch.fill(0, OFFSET_CRC, OFFSET_CRC + 4);
  return crc32cRaw(scratch) === view.getUint32(at + OFFSET_CRC);
}

function applyTransaction(view: DataView, at: number, slots: Uint32Array): void {
  const updates = view.getUint16(at + 14);
  const contextSize = view.getUint16(at + 16);
  const contextStart = view.getUint16(at + 18);
  for (let index = 0; index < AL_CONTEXT_PER_TRANSACTION; index++) {
    const slot = contextStart + index;
    const extent = view.getUint32(at + OFFSET_CONTEXT + index * 4);
    if (extent === AL_FREE && slot >= contextSize) continue;
    if (slot < AL_MAX_EXTENTS) slots[slot] = extent;
  }
  for (let index = 0; index < AL_UPDATES_PER_TRANSACTION; index++) {
    const slot = view.getUint16(at + OFFSET_SLOTS + index * 2);
    if (index >= updates && slot === NO_SLOT) continue;
    if (slot < AL_MAX_EXTENTS) slots[slot] = view.getUint32(at + OFFSET_EXTENTS + index * 4);
  }
}

function sortedUnique(slots: Uint32Array): Uint32Array {
  const used = slots.filter((extent) => extent !== AL_FREE).sort();
  return used.filter((extent, index) => index === 0 || used[index - 1] !== extent);
}

/** First and last activity log extent a request touches are `sector / 8192`; sectors of the whole log block are 8. */
export function extentOfSector(sector: number): number {
  return Math.floor(sector / AL_EXTENT_SECTORS);
}

/** Sector of a ring block, given the sector where the activity log area starts. */
export function ringBlockSector(activityLogSector: number, block: number): number {
  return activityLogSector + block * BLOCK_SECTORS;
}
