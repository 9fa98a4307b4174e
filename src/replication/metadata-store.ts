import { assert } from '../base/assert.js';
import { Errno, MetadataError } from '../base/errors.js';
import type { BlockFile, Memory } from '../io/ring.js';
import {
  ActivityLog,
  encodeInitializedBlock,
  maxActivityLogExtents,
  replayActivityLog,
  ringBlockSector,
} from '../metadata/activity-log.js';
import { BITMAP_PAGE_BYTES, Bitmap, PAGE_HINT, PAGE_LAZY } from '../metadata/bitmap.js';
import { GenerationIdentifiers } from '../metadata/generation-identifiers.js';
import {
  BLOCK_BYTES,
  computeLayout,
  type MetaDiskKind,
  type MetadataLayout,
  SECTOR_BYTES,
} from '../metadata/layout.js';
import {
  checkSuperblockLayout,
  decodeSuperblock,
  encodeSuperblock,
  isClean,
  MAGIC_84_UNCLEAN,
  MDF_AL_CLEAN,
  MDF_AL_DISABLED,
  MDF_FULL_SYNC,
  MDF_PRIMARY_IND,
  type Superblock,
} from '../metadata/superblock.js';
import type { Mutations } from './effects.js';

/** Set in every cookie of a metadata operation: data and metadata may live on one file (internal metadata). */
export const METADATA_COOKIE = 0x40000000;
const COOKIE_MASK = METADATA_COOKIE - 1;
/** Bitmap and activity log are read and initialised in pieces of this size. */
const TRANSFER_BYTES = 256 * 1024;
/** Buffers for bitmap pages being written. */
const PAGE_BUFFERS = 4;
/** Up to this many pages of a job are written durably one by one; more are followed by one flush. */
const DURABLE_PAGES = 4;

/** `ok` false: the metadata device failed; the disk is being detached. */
export type WhenDurable = (ok: boolean) => void;

interface PageJob {
  readonly pages: readonly number[];
  readonly whenDone: WhenDurable;
}

export interface MetadataPlace {
  readonly kind: MetaDiskKind;
  readonly index?: number;
  /** Slots of the activity log wanted (al-extents). */
  readonly alExtents: number;
}

/** What the store needs of the device it belongs to. */
export interface MetadataHooks {
  /** The metadata device failed; called once. */
  failed(message: string): void;
  /** An activity log transaction is durable. */
  committed(): void;
  /**
   * Whether data written to these extents (`bitsCleared`: to any) may still lie in the data disk's volatile cache.
   * Then a
   * power loss would change blocks that nothing marks any more.
   */
  needsFlush(evictedExtents: readonly number[], bitsCleared: boolean): boolean;
  /** Flushes the data disk. */
  flush(then: WhenDurable): void;
}

/** What an attach found. */
export interface AttachResult {
  /** Extents the activity log named although the Primary had not stopped in order. */
  readonly replayedExtents: number;
  readonly wasClean: boolean;
}

/**
 * The metadata of one attached disk: superblock, activity log and bitmap in memory, and the writes that keep the disk
 * behind them in a safe order. What depends on a metadata write hangs on it as a callback, so that nobody can do it
 * earlier: requests on an activity log transaction, a new generation on the superblock, a bulk change of the bitmap on
 * the FULL_SYNC flag.
 *
 * Buffers are allocated at attach and kept, so that metadata can be written when the pool is exhausted.
 */
export class MetadataStore {
  layout: MetadataLayout;
  superblock!: Superblock;
  identifiers = new GenerationIdentifiers();
  bitmap!: Bitmap;
  activityLog!: ActivityLog;
  /** Transactions written (`al:` of /proc/drbd). */
  transactionsWritten = 0;
  /** Bulk changes of the bitmap that are not durable yet: new application writes wait. */
  bulkInProgress = 0;
  private readonly waiting = new Map<number, (errno: number) => void>();
  private nextCookie = 0;
  /** Every buffer; the first two belong to superblock and activity log, the rest to bitmap pages. */
  private readonly blocks: number[] = [];
  private pageBlocks: readonly number[] = [];
  private superblockBlock = 0;
  private activityLogBlock = 0;
  private isWritingSuperblock = false;
  private superblockWaiters: WhenDurable[] = [];
  private wantsSuperblock = false;
  private readonly jobs: PageJob[] = [];
  private jobBusy = false;
  private failed = false;
  private closed = false;

  /**
   * @param data the data device: its size decides where internal metadata lies
   */
  constructor(
    private readonly file: BlockFile,
    private readonly dataSizeBytes: number,
    private readonly memory: Memory,
    private readonly place: MetadataPlace,
    private readonly mutations: Mutations,
    private readonly hooks: MetadataHooks,
  ) {
    this.layout = this.computeLayout(1, 8);
  }

  /** An operation on the metadata file is done. */
  done(cookie: number, errno: number): void {
    const callback = this.waiting.get(cookie);
    assert(callback !== undefined, `metadata operation ${cookie} is outstanding`);
    this.waiting.delete(cookie);
    callback(errno);
    this.releaseIfIdle();
  }

  /** Nothing new is written; buffers go back when the last operation is done. */
  close(): void {
    this.closed = true;
    this.releaseIfIdle();
  }

  get isIdle(): boolean {
    return this.waiting.size === 0;
  }

  // ---------------------------------------------------------------------------------------------------------- attach

  /**
   * Reads everything, replays the activity log if the last user did not stop in order, and leaves the log initialised.
   * The superblock on disk still is the old one: the caller decides the flags and writes it.
   */
  attach(then: (result: AttachResult | MetadataError) => void): void {
    for (let count = 0; count < PAGE_BUFFERS + 2; count++) {
      const block = this.memory.allocate(BLOCK_BYTES);
      if (block < 0) {
        then(new MetadataError('DRBDTS_MD_NO_MEMORY', 'no memory for metadata buffers'));
        return;
      }
      this.blocks.push(block);
    }
    this.superblockBlock = this.blocks[0]!;
    this.activityLogBlock = this.blocks[1]!;
    this.pageBlocks = this.blocks.slice(2);
    this.readBytes(this.layout.superblockSector * SECTOR_BYTES, BLOCK_BYTES, then, (bytes) => {
      this.superblock = decodeSuperblock(bytes);
      const { alStripes, alStripeSize4k } = this.superblock;
      this.layout = this.computeLayout(alStripes, alStripeSize4k);
      checkSuperblockLayout(this.superblock, this.layout);
      const { currentUuid, bitmapUuid, history0Uuid, history1Uuid } = this.superblock;
      this.identifiers = new GenerationIdentifiers(currentUuid, bitmapUuid, history0Uuid, history1Uuid);
      this.bitmap = new Bitmap(this.superblock.laSizeSectors);
      this.activityLog = new ActivityLog({
        extents: Math.min(this.place.alExtents, maxActivityLogExtents(alStripes, alStripeSize4k)),
        alStripes,
        alStripeSize4k,
      });
      this.loadBitmap(then);
    });
  }

  private computeLayout(alStripes: number, alStripeSize4k: number): MetadataLayout {
    const { kind, index } = this.place;
    return computeLayout({
      kind,
      ...(index === undefined ? {} : { index }),
      backingSizeSectors: Math.floor(this.dataSizeBytes / SECTOR_BYTES),
      metaSizeSectors: Math.floor(this.file.sizeBytes / SECTOR_BYTES),
      alStripes,
      alStripeSize4k,
    });
  }

  private loadBitmap(then: (result: AttachResult | MetadataError) => void): void {
    if (this.superblock.laSizeSectors === 0 || (this.superblock.flags & MDF_FULL_SYNC) !== 0) {
      // Never used, or interrupted while all bits were being set: what is on disk means nothing.
      this.bitmap.setAll();
      this.replay(then);
      return;
    }
    const pages = this.bitmap.pageCount;
    const pagesPerRead = TRANSFER_BYTES / BITMAP_PAGE_BYTES;
    const readFrom = (page: number) => {
      if (page >= pages) {
        this.replay(then);
        return;
      }
      const count = Math.min(pagesPerRead, pages - page);
      const offset = this.layout.bitmapSector * SECTOR_BYTES + page * BITMAP_PAGE_BYTES;
      // The bitmap area may end inside the last page when the device's metadata follows at once; sectors are enough.
      this.readBytes(offset, count * BITMAP_PAGE_BYTES, then, (bytes) => {
        for (let index = 0; index < count; index++)
          this.bitmap.loadPage(
            page + index,
            bytes.subarray(index * BITMAP_PAGE_BYTES, (index + 1) * BITMAP_PAGE_BYTES),
          );
        readFrom(page + count);
      });
    };
    readFrom(0);
  }

  private replay(then: (result: AttachResult | MetadataError) => void): void {
    if (isClean(this.superblock)) {
      then({ replayedExtents: 0, wasClean: true });
      return;
    }
    const { alBlocks, activityLogSector, alStripes, alStripeSize4k } = this.layout;
    const area = new Uint8Array(alBlocks * BLOCK_BYTES);
    const readFrom = (position: number) => {
      if (position < area.length) {
        const length = Math.min(TRANSFER_BYTES, area.length - position);
        this.readBytes(activityLogSector * SECTOR_BYTES + position, length, then, (bytes) => {
          area.set(bytes, position);
          readFrom(position + length);
        });
        return;
      }
      const replay = replayActivityLog(area, alStripes, alStripeSize4k);
      const wasPrimary = (this.superblock.flags & MDF_PRIMARY_IND) !== 0;
      if (wasPrimary && (this.superblock.flags & MDF_AL_DISABLED) !== 0) this.bitmap.setAll();
      else if (wasPrimary && replay.validBlocks === 0)
        throw new MetadataError(
          'DRBDTS_AL_NOT_FOUND',
          'this node was Primary when it stopped, and no activity log block is readable: what was being written is ' +
            'unknown; invalidate this disk',
        );
      let marked = 0;
      if (wasPrimary)
        for (const extent of replay.hotExtents) {
          const first = extent * 1024;
          if (first >= this.bitmap.bits) continue;
          this.bitmap.setBits(first, Math.min(first + 1023, this.bitmap.bits - 1));
          marked++;
        }
      const result = { replayedExtents: marked, wasClean: false };
      // The marks first: an initialised log tells nobody what was being written.
      this.writeChangedPages((ok) => {
        if (!ok) then(new MetadataError('DRBDTS_MD_IO', 'the bitmap could not be written'));
        else if (replay.transactionBlocks === 0 && replay.corruptBlocks === 0) then(result);
        else this.initializeActivityLog(0, (error) => then(error ?? result));
      });
    };
    readFrom(0);
  }

  private initializeActivityLog(block: number, then: (error?: MetadataError) => void): void {
    if (block >= this.layout.alBlocks) {
      then();
      return;
    }
    encodeInitializedBlock(this.memory.bytes.subarray(this.activityLogBlock, this.activityLogBlock + BLOCK_BYTES));
    const sector = ringBlockSector(this.layout.activityLogSector, block);
    const durable = block === this.layout.alBlocks - 1;
    this.writeBlock(sector * SECTOR_BYTES, this.activityLogBlock, true, (errno) => {
      if (errno !== 0) then(new MetadataError('DRBDTS_MD_IO', `activity log: write failed with errno ${errno}`));
      else if (durable) then();
      else this.initializeActivityLog(block + 1, then);
    });
  }

  private readBytes(
    offset: number,
    length: number,
    failed: (error: MetadataError) => void,
    then: (bytes: Uint8Array) => void,
  ): void {
    const payload = this.memory.allocate(length);
    if (payload < 0) {
      failed(new MetadataError('DRBDTS_MD_NO_MEMORY', 'no memory to read metadata'));
      return;
    }
    const cookie = this.expect((errno) => {
      try {
        if (errno === 0) then(this.memory.bytes.subarray(payload, payload + length));
        else failed(new MetadataError('DRBDTS_MD_IO', `reading metadata at byte ${offset} failed with errno ${errno}`));
      } catch (error) {
        if (!(error instanceof MetadataError)) throw error;
        failed(error);
      } finally {
        this.memory.release(payload);
      }
    });
    this.file.read(cookie, offset, payload, length);
  }

  // ------------------------------------------------------------------------------------------------------ superblock

  /** Writes the superblock as it is now (identifiers included); `then` when it is on stable storage. */
  writeSuperblock(then?: WhenDurable): void {
    if (this.failed || this.closed) {
      then?.(false);
      return;
    }
    if (then) this.superblockWaiters.push(then);
    this.wantsSuperblock = true;
    if (!this.isWritingSuperblock) this.startSuperblock();
  }

  private startSuperblock(): void {
    this.isWritingSuperblock = true;
    this.wantsSuperblock = false;
    const waiters = this.superblockWaiters;
    this.superblockWaiters = [];
    const superblock = this.superblock;
    superblock.currentUuid = this.identifiers.current;
    superblock.bitmapUuid = this.identifiers.bitmap;
    superblock.history0Uuid = this.identifiers.history0;
    superblock.history1Uuid = this.identifiers.history1;
    superblock.alExtents = this.activityLog.extents;
    superblock.magic = MAGIC_84_UNCLEAN;
    superblock.flags &= ~MDF_AL_CLEAN;
    const block = this.superblockBlock;
    encodeSuperblock(superblock, this.memory.bytes.subarray(block, block + BLOCK_BYTES));
    this.writeBlock(this.layout.superblockSector * SECTOR_BYTES, block, true, (errno) => {
      this.isWritingSuperblock = false;
      if (errno !== 0) this.fail(`superblock: write failed with errno ${errno}`);
      for (const waiter of waiters) waiter(errno === 0);
      if (this.wantsSuperblock && !this.failed && !this.isWritingSuperblock) this.startSuperblock();
    });
  }

  // ---------------------------------------------------------------------------------------------------------- bitmap

  /** Writes every page that changed; `then` when those changes are on stable storage. */
  writeChangedPages(then: WhenDurable = () => {}): void {
    const pages: number[] = [];
    for (let page = this.bitmap.nextPage(0); page >= 0; page = this.bitmap.nextPage(page + 1)) pages.push(page);
    this.addJob({ pages, whenDone: then });
  }

  /**
   * Changes the whole bitmap under the protection of the FULL_SYNC flag: a crash in between sets all bits at the next
   * attach. New writes have to wait while `bulkInProgress`.
   */
  setAllBits(then: WhenDurable = () => {}): void {
    this.bulkInProgress++;
    this.bitmap.setAll();
    this.superblock.flags |= MDF_FULL_SYNC;
    this.writeSuperblock(() => {
      this.writeChangedPages((ok) => {
        this.bulkInProgress--;
        if (ok && this.bulkInProgress === 0) this.superblock.flags &= ~MDF_FULL_SYNC;
        if (!ok) then(false);
        else this.writeSuperblock(then);
      });
    });
  }

  private addJob(job: PageJob): void {
    if (this.failed || this.closed) {
      job.whenDone(false);
      return;
    }
    if (job.pages.length === 0 && !this.jobBusy) {
      job.whenDone(true);
      return;
    }
    this.jobs.push(job);
    if (!this.jobBusy) this.startJob();
  }

  /**
   * One job at a time: two writes of one page are never in flight together, and an empty job waits for those before.
   */
  private startJob(): void {
    const job = this.jobs.shift();
    if (!job) return;
    this.jobBusy = true;
    const durable = job.pages.length <= DURABLE_PAGES;
    const free = [...this.pageBlocks];
    let next = 0;
    let inFlight = 0;
    let failure = 0;
    const finish = (ok: boolean) => {
      this.jobBusy = false;
      if (!ok) this.fail(`bitmap: write failed with errno ${failure}`);
      job.whenDone(ok);
      if (!this.jobBusy) this.startJob();
    };
    const more = () => {
      while (failure === 0 && next < job.pages.length && free.length > 0) {
        const page = job.pages[next++]!;
        const block = free.pop()!;
        const mayHaveCleared = (this.bitmap.pageState(page) & PAGE_LAZY) !== 0;
        this.bitmap.takePage(page, this.memory.bytes.subarray(block, block + BITMAP_PAGE_BYTES));
        inFlight++;
        const offset = this.layout.bitmapSector * SECTOR_BYTES + page * BITMAP_PAGE_BYTES;
        const written = (errno: number) => {
          inFlight--;
          free.push(block);
          if (errno !== 0) failure = errno;
          more();
        };
        const write = (flushed: boolean) => {
          if (flushed) this.writeBlock(offset, block, durable, written);
          else written(Errno.EIO);
        };
        // A cleared bit says that the block is good here: it must be so on the platter before the bitmap says it there.
        if (mayHaveCleared && this.hooks.needsFlush([], true)) this.hooks.flush(write);
        else write(true);
      }
      if (inFlight > 0 || (failure === 0 && next < job.pages.length)) return;
      if (failure !== 0 || durable || job.pages.length === 0) finish(failure === 0);
      else
        this.file.flush(
          this.expect((errno) => {
            failure = errno;
            finish(errno === 0);
          }),
        );
    };
    more();
  }

  // ---------------------------------------------------------------------------------------------------- activity log

  /** Starts the next transaction if changes are queued and none is under way. */
  commitActivityLog(): void {
    const log = this.activityLog;
    if (!log.hasQueuedChanges || log.isTransactionOpen || this.failed || this.closed) return;
    const evictedCount = log.openTransaction();
    const pages: number[] = [];
    const evicted: number[] = [];
    for (let index = 0; index < evictedCount; index++) {
      evicted.push(log.evictedExtent(index));
      // The extent may lie behind the end after the device shrank.
      const page = this.bitmap.pageOfExtent(evicted[index]!);
      if (page >= this.bitmap.pageCount) continue;
      this.bitmap.markPage(page, PAGE_HINT);
      if (this.bitmap.takeHint(page) && !pages.includes(page)) pages.push(page);
    }
    if (this.mutations.skipEvictedPages) pages.length = 0;
    const go = (flushed: boolean) => {
      if (!flushed) {
        this.fail('activity log: the data it would forget could not be flushed');
        return;
      }
      this.addJob({
        pages,
        whenDone: (ok) => {
          if (ok) this.writeTransaction();
        },
      });
    };
    // What was written to an extent must survive a power loss before the log forgets the extent.
    if (this.hooks.needsFlush(evicted, false)) this.hooks.flush(go);
    else go(true);
  }

  private writeTransaction(): void {
    const block = this.activityLogBlock;
    const position = this.activityLog.encodeTransaction(this.memory.bytes.subarray(block, block + BLOCK_BYTES));
    const committed = (errno: number) => {
      if (errno !== 0) {
        this.fail(`activity log: write failed with errno ${errno}`);
        return;
      }
      this.activityLog.transactionCommitted();
      this.transactionsWritten++;
      this.hooks.committed();
      this.commitActivityLog();
    };
    if (this.mutations.skipActivityLog) {
      committed(0);
      return;
    }
    this.writeBlock(ringBlockSector(this.layout.activityLogSector, position) * SECTOR_BYTES, block, true, committed);
  }

  // ----------------------------------------------------------------------------------------------------------- basics

  private writeBlock(offset: number, block: number, durable: boolean, then: (errno: number) => void): void {
    this.file.write(this.expect(then), offset, block, BLOCK_BYTES, durable);
  }

  private expect(then: (errno: number) => void): number {
    let cookie: number;
    do {
      this.nextCookie = (this.nextCookie + 1) & COOKIE_MASK;
      cookie = METADATA_COOKIE | this.nextCookie;
    } while (this.waiting.has(cookie));
    this.waiting.set(cookie, then);
    return cookie;
  }

  private fail(message: string): void {
    if (this.failed) return;
    this.failed = true;
    // The state first: what is completed because of the failure must not count this disk's copy as a good one.
    this.hooks.failed(message);
    for (const waiter of this.superblockWaiters.splice(0)) waiter(false);
    for (const job of this.jobs.splice(0)) job.whenDone(false);
  }

  private releaseIfIdle(): void {
    if (!this.closed || this.waiting.size > 0) return;
    for (const block of this.blocks.splice(0)) this.memory.release(block);
  }
}
