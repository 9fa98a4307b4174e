import { ProtocolError } from '../base/errors.js';
import type { Device } from './device.js';
import { RESYNC_EXTENT_SECTORS } from './resync-extents.js';
import { ConnectionState } from './state.js';
import { encodeRequest } from './wire/codec.js';
import { ID_SYNCER_HIGH, ID_SYNCER_LOW, MAX_REQUEST_BYTES, P_RS_DATA_REQUEST } from './wire/packets.js';

const SECTORS_PER_BIT = 8;
const BITS_PER_REQUEST_MAX = MAX_REQUEST_BYTES / 4096;
/** Length of the controller's tick. */
const TICK_MS = 100;
const MARKS = 8;
const MARK_INTERVAL_MS = 3000;

/**
 * The copying of out-of-sync blocks. The target asks, at a pace it computes every 100 ms, and keeps as many requests in
 * flight as the buffers allow; within a tick's budget new requests leave as soon as answers arrive, so that the rate is
 * not bounded by the tick. The source only answers.
 *
 * @see DRBD 8.4 drbd_worker.c make_resync_request, drbd_rs_controller, drbd_resync_finished
 */
export class Resync {
  /** Bits set when it began, and bits that could not be copied. */
  totalBits = 0;
  failedBits = 0;
  startedMs = 0;
  pausedMs = 0;
  /** Rate the controller aims at now. */
  wantedKibPerSecond = 0;
  /** Ring of progress marks. */
  readonly markMs = new Float64Array(MARKS);
  readonly markLeft = new Float64Array(MARKS);
  lastMark = 0;

  /** Next bit to look at. */
  private position = 0;
  private isRunning = false;
  private pausedSinceMs = -1;
  /** Blocks that may still be asked for in this tick. */
  private budgetBits = 0;
  /** Blocks that may be asked for in this tick beyond the budget, to keep the fill target in flight. */
  private topUpBits = 0;
  private nextTickMs = 0;
  /** Asked for and not answered: sectors by first sector. */
  private readonly outstanding = new Map<number, number>();
  private outstandingSectors = 0;
  /** Asked for by a resync that has ended since: answers may still be on their way. */
  private readonly abandoned = new Map<number, number>();
  /** Received and being written. */
  private writing = 0;
  /** Extent the position stands in that was refused because it is in use; it refuses writes meanwhile. */
  private halfLocked = -1;
  private readonly plan = new Int32Array(300);
  private planLength = 0;
  private planIndex = 0;
  private planTotal = 0;
  private controllerInFlight = 0;
  private sectorsIn = 0;
  private finishing = false;
  /** Source: the target has said that it is done. */
  private targetDone = false;

  constructor(private readonly device: Device) {}

  extentOf(sector: number): number {
    return Math.floor(sector / RESYNC_EXTENT_SECTORS);
  }

  private get isTarget(): boolean {
    return this.device.state.connection === ConnectionState.SyncTarget;
  }

  private get isSource(): boolean {
    const { connection } = this.device.state;
    return connection === ConnectionState.SyncSource || connection === ConnectionState.PausedSyncS;
  }

  /** The state becomes SyncSource or SyncTarget next. */
  begin(nowMs: number): void {
    this.reset();
    // What the source had sent before it named this resync has arrived.
    this.abandoned.clear();
    this.totalBits = this.device.outOfSyncBits;
    this.startedMs = nowMs;
    this.markMs.fill(nowMs);
    this.markLeft.fill(this.totalBits);
    this.isRunning = true;
    this.nextTickMs = nowMs;
    this.device.resource.requestTurnEnd();
  }

  reset(): void {
    this.isRunning = false;
    this.position = 0;
    this.totalBits = 0;
    this.failedBits = 0;
    this.pausedMs = 0;
    this.pausedSinceMs = -1;
    this.lastMark = 0;
    this.budgetBits = 0;
    this.topUpBits = 0;
    this.outstanding.clear();
    this.outstandingSectors = 0;
    this.writing = 0;
    this.halfLocked = -1;
    this.plan.fill(0);
    this.planIndex = 0;
    this.planTotal = 0;
    this.controllerInFlight = 0;
    this.sectorsIn = 0;
    this.finishing = false;
    this.targetDone = false;
    this.wantedKibPerSecond = 0;
  }

  /** The state left resync while the connection stands. */
  stopped(): void {
    if (!this.isRunning) return;
    const { device } = this;
    for (const [sector, sectors] of this.outstanding) this.abandoned.set(sector, sectors);
    device.counters.pending -= this.outstanding.size;
    this.reset();
    device.resyncExtents.clear();
    device.extentsReleased();
  }

  /** The connection is gone, and with it every answer. */
  linkLost(): void {
    this.reset();
    this.abandoned.clear();
  }

  paused(isPaused: boolean, nowMs: number): void {
    if (isPaused) this.pausedSinceMs = nowMs;
    else if (this.pausedSinceMs >= 0) {
      this.pausedMs += nowMs - this.pausedSinceMs;
      this.pausedSinceMs = -1;
      this.nextTickMs = nowMs;
    }
  }

  /** Called every 100 ms or so. */
  tick(nowMs: number): void {
    if (!this.isRunning) return;
    this.mark(nowMs);
    if (!this.isTarget) return;
    if (this.device.outOfSyncBits <= this.failedBits && this.isIdle) {
      this.finish();
      return;
    }
    // Bits were set again behind the position (a failed write): look from the start.
    if (this.isIdle && this.position >= this.device.metadata!.bitmap.bits) this.position = 0;
    if (nowMs < this.nextTickMs) return;
    this.nextTickMs = nowMs + TICK_MS;
    // What remained of the last tick is not carried over: the rate is a limit, not a debt.
    this.budgetBits = this.control();
    this.pump();
  }

  private mark(nowMs: number): void {
    const left = this.device.outOfSyncBits - this.failedBits;
    if (nowMs - this.markMs[this.lastMark]! < MARK_INTERVAL_MS || this.markLeft[this.lastMark] === left) return;
    this.lastMark = (this.lastMark + 1) % MARKS;
    this.markMs[this.lastMark] = nowMs;
    this.markLeft[this.lastMark] = left;
  }

  /** Blocks to ask for in this tick. @see DRBD 8.4 drbd_worker.c drbd_rs_controller */
  private control(): number {
    const parameters = this.device.syncParameters;
    const received = this.sectorsIn;
    this.sectorsIn = 0;
    this.controllerInFlight -= received;
    const steps = Math.min(parameters.planAheadTenths, this.plan.length);
    this.topUpBits = 0;
    if (steps === 0) {
      this.wantedKibPerSecond = parameters.resyncRateKibPerSecond;
      return Math.max(1, Math.floor(parameters.resyncRateKibPerSecond / 40));
    }
    if (steps !== this.planLength) {
      this.plan.fill(0);
      this.planTotal = 0;
      this.planIndex = 0;
      this.planLength = steps;
    }
    const inFlight = this.controllerInFlight;
    let wanted: number;
    if (inFlight + received === 0) wanted = Math.floor((parameters.resyncRateKibPerSecond * 2) / 10) * steps;
    else if (parameters.fillTargetSectors > 0) wanted = parameters.fillTargetSectors;
    else wanted = received * parameters.delayTargetTenths;
    const correction = wanted - inFlight - this.planTotal;
    const perStep = Math.trunc(correction / steps);
    for (let step = 0; step < steps; step++) this.plan[step]! += perStep;
    this.planTotal += perStep * steps;
    const current = this.plan[this.planIndex]!;
    this.plan[this.planIndex] = 0;
    this.planIndex = (this.planIndex + 1) % steps;
    this.planTotal -= current;
    const limit = Math.floor((parameters.maxRateKibPerSecond * 2) / 10);
    const sectors = Math.max(0, Math.min(received + current, limit));
    const blocks = sectors >> 3;
    // On a link that answers within the tick the kernel's controller, which looks once per tick, sees nothing in flight
    // and speeds up by a few blocks a second. Keeping the fill target in flight all the time is what it steers for.
    if (parameters.fillTargetSectors > 0) this.topUpBits = Math.max(0, (limit >> 3) - blocks);
    this.wantedKibPerSecond = blocks * 40;
    return blocks;
  }

  /** Asks for blocks while budget, buffers, extents and the connection allow. */
  pump(): void {
    const { device } = this;
    const { resource } = device;
    const bitmap = device.metadata?.bitmap;
    if (!this.isRunning || !this.isTarget || !bitmap || !resource.link) return;
    const inFlightMaxBits = resource.net.maxBuffers / 2;
    while (!resource.isSendQueueFull) {
      const inFlightBits = Math.ceil(this.outstandingSectors / SECTORS_PER_BIT);
      const fillBits = Math.min(this.topUpBits, (device.syncParameters.fillTargetSectors >> 3) - inFlightBits);
      const allowed = Math.max(this.budgetBits, fillBits);
      const room = Math.min(allowed, inFlightMaxBits - inFlightBits, BITS_PER_REQUEST_MAX);
      if (room <= 0) return;
      const bit = bitmap.findNext(this.position);
      if (bit < 0) {
        this.position = bitmap.bits;
        return;
      }
      const sector = bit * SECTORS_PER_BIT;
      if (!this.lockExtent(this.extentOf(sector))) {
        this.position = bit;
        return;
      }
      const bits = this.mergeFrom(bit, room);
      this.position = bit + bits;
      if (this.budgetBits > 0) this.budgetBits = Math.max(0, this.budgetBits - bits);
      else this.topUpBits -= bits;
      const sectors = Math.min(bits * SECTORS_PER_BIT, device.sizeSectors - sector);
      this.outstanding.set(sector, sectors);
      this.outstandingSectors += sectors;
      this.controllerInFlight += bits * SECTORS_PER_BIT;
      device.counters.pending++;
      resource.sendData(
        encodeRequest(
          resource.scratch,
          P_RS_DATA_REQUEST,
          device.volume,
          sector,
          ID_SYNCER_HIGH,
          ID_SYNCER_LOW,
          sectors * 512,
        ),
      );
    }
  }

  /** Takes one reference on the extent, if no write is in it; else keeps new writes out and tries again later. */
  private lockExtent(extent: number): boolean {
    const { device } = this;
    if (this.halfLocked >= 0 && this.halfLocked !== extent) {
      device.leaveExtent(this.halfLocked);
      this.halfLocked = -1;
    }
    if (this.halfLocked < 0 && !device.resyncExtents.enter(extent)) return false;
    if (device.isExtentInUse(extent)) {
      this.halfLocked = extent;
      return false;
    }
    this.halfLocked = -1;
    device.resyncExtents.lock(extent);
    return true;
  }

  /** How many bits from `bit` on one request covers: aligned to its size, inside one extent. */
  private mergeFrom(bit: number, limit: number): number {
    const bitmap = this.device.metadata!.bitmap;
    const bitsPerExtent = RESYNC_EXTENT_SECTORS / SECTORS_PER_BIT;
    const extentEnd = (Math.floor(bit / bitsPerExtent) + 1) * bitsPerExtent;
    let bits = 1;
    let align = 1;
    while (bits < limit && bit + bits < extentEnd && bit + bits < bitmap.bits && bitmap.isBitSet(bit + bits)) {
      // To grow beyond a power of two the start must be aligned to the next one.
      if (bits === align) {
        if (bit % (align * 2) !== 0) break;
        align *= 2;
      }
      bits++;
    }
    return bits;
  }

  /**
   * P_RS_DATA_REPLY arrived.
   * @returns false if it belongs to a resync that has ended: it must not be written
   * @throws ProtocolError for data nobody asked for
   */
  dataReceived(sector: number, sectors: number): boolean {
    if (this.abandoned.get(sector) === sectors && this.abandoned.delete(sector)) return false;
    this.take(sector, sectors);
    this.sectorsIn += sectors;
    this.writing++;
    return true;
  }

  private take(sector: number, sectors: number): void {
    if (this.outstanding.get(sector) !== sectors)
      throw new ProtocolError(
        'DRBDTS_DRBD_UNEXPECTED',
        `resync data for sector ${sector} + ${sectors}, which nobody asked for`,
        'DRBD 8.4 drbd_receiver.c receive_RSDataReply',
      );
    this.outstanding.delete(sector);
    this.outstandingSectors -= sectors;
    this.device.counters.pending--;
  }

  /** A received block is written (or could not be). */
  blockDone(sector: number, sectors: number, ok: boolean): void {
    if (!this.isRunning) return;
    this.writing--;
    if (!ok) this.failedBits += Math.ceil(sectors / SECTORS_PER_BIT);
    this.device.leaveExtent(this.extentOf(sector));
    this.afterBlock();
  }

  /** P_NEG_RS_DREPLY or P_RS_CANCEL instead of data. */
  refused(sector: number, sectors: number, failed: boolean): void {
    if (this.abandoned.get(sector) === sectors && this.abandoned.delete(sector)) return;
    if (!this.isRunning) return;
    this.take(sector, sectors);
    if (failed) this.failedBits += Math.ceil(sectors / SECTORS_PER_BIT);
    this.device.leaveExtent(this.extentOf(sector));
    this.afterBlock();
  }

  failedAtSource(sectors: number): void {
    if (this.isRunning && this.isSource) this.failedBits += Math.ceil(sectors / SECTORS_PER_BIT);
  }

  private get isIdle(): boolean {
    return this.outstanding.size === 0 && this.writing === 0;
  }

  private afterBlock(): void {
    if (this.isTarget && this.device.outOfSyncBits <= this.failedBits && this.isIdle) this.finish();
    else this.device.resource.requestTurnEnd();
  }

  /** Bits were cleared by application writes: the last ones may have been among them. */
  bitsCleared(): void {
    if (!this.isRunning || this.device.outOfSyncBits > this.failedBits) return;
    if (this.isTarget && this.isIdle) this.finish();
    else if (this.targetDone) this.peerFinished();
  }

  /**
   * The target has everything: makes it durable, lets acks in flight arrive, and says so. The data must be on the
   * platter before the superblock claims that this disk is UpToDate.
   */
  private finish(): void {
    if (this.finishing) return;
    this.finishing = true;
    const { device } = this;
    const { resource } = device;
    const link = resource.linkNumber;
    if (this.halfLocked >= 0) {
      device.leaveExtent(this.halfLocked);
      this.halfLocked = -1;
    }
    const flush = (then: (errno: number) => void) =>
      resource.mutations.announceBeforeFlush ? then(0) : device.flushLocally(then);
    flush((errno) => {
      if (errno !== 0 || link !== resource.linkNumber || !this.isRunning) return;
      resource.pingThen(() => {
        if (link !== resource.linkNumber || !this.isRunning) return;
        if (device.outOfSyncBits > this.failedBits) {
          this.finishing = false;
          this.position = 0;
          return;
        }
        device.finishResync(this.failedBits);
      });
    });
  }

  /** The target says that it is done; the source is, when its bits agree. */
  peerFinished(): void {
    if (this.finishing || !this.isRunning) return;
    this.targetDone = true;
    const { device } = this;
    const { resource } = device;
    const link = resource.linkNumber;
    this.finishing = true;
    // Acknowledgements that were sent before are on the other socket: the ping flushes them out.
    resource.pingThen(() => {
      if (link !== resource.linkNumber || !this.isRunning) return;
      this.finishing = false;
      if (device.outOfSyncBits <= this.failedBits) device.finishResync(this.failedBits);
    });
  }
}
