import { assert } from '../base/assert.js';
import { Errno, type MetadataError, ProtocolError } from '../base/errors.js';
import type { BlockFront, BlockTarget } from '../io/block-target.js';
import type { BlockFile } from '../io/ring.js';
import { AL_HOT, AL_WAIT, extentOfSector } from '../metadata/activity-log.js';
import { UI_BITMAP, UI_CURRENT, UI_HISTORY_END, UI_HISTORY_START } from '../metadata/generation-identifiers.js';
import type { MetaDiskKind } from '../metadata/layout.js';
import {
  MDF_AL_DISABLED,
  MDF_CONNECTED_IND,
  MDF_CONSISTENT,
  MDF_CRASHED_PRIMARY,
  MDF_FULL_SYNC,
  MDF_PEER_OUT_DATED,
  MDF_PRIMARY_IND,
  MDF_WAS_UP_TO_DATE,
} from '../metadata/superblock.js';
import { BitmapExchange } from './bitmap-exchange.js';
import { digestBytes, digestOf, sameDigest } from './digest.js';
import { NO_PAYLOAD_OFFSET } from './effects.js';
import { agreeSize, agreeUserSize, decideSync, peerExportedSize, realPeerDisk } from './handshake.js';
import { IntervalSet } from './interval-set.js';
import { LargeTransfer, LargeZero } from './large-request.js';
import { METADATA_COOKIE, MetadataStore } from './metadata-store.js';
import { type PeerRequest, PeerRequestKind, PeerRequestQueue } from './peer-request.js';
import { type Request, RequestFlag, RequestKind, RequestQueue, RequestStage } from './request.js';
import type { Resource } from './resource.js';
import { Resync } from './resync.js';
import { ACTIVITY_LOG_EXTENTS_PER_RESYNC_EXTENT, ResyncExtents } from './resync-extents.js';
import {
  applyChange,
  type ChangeKind,
  ConnectionState,
  change,
  convertPerspective,
  type DeviceState,
  DiskState,
  describeChange,
  describeState,
  hasUpToDateData,
  INITIAL_STATE,
  isClusterWide,
  isSuspended,
  isSyncOrVerify,
  judgeChange,
  packState,
  Role,
  type StateChange,
  type StateContext,
  StateResult,
  sanitize,
  shouldReplicate,
  shouldSendOutOfSync,
  unpackState,
} from './state.js';
import {
  type BlockAck,
  type BlockRequest,
  checkInsideDevice,
  type DataPacket,
  encodeBlockAck,
  encodeData,
  encodeDataReply,
  encodeOutOfSync,
  encodeRequest,
  encodeSizes,
  encodeState,
  encodeStateChange,
  encodeStateChangeReply,
  encodeSyncParam,
  encodeSyncUuid,
  encodeTrim,
  encodeUuids,
  type Sizes,
  type SyncParameters,
  type Uuids,
} from './wire/codec.js';
import {
  DP_DISCARD,
  DP_FLUSH,
  DP_FUA,
  DP_MAY_SET_IN_SYNC,
  DP_SEND_RECEIVE_ACK,
  DP_SEND_WRITE_ACK,
  DP_ZEROES,
  ID_OUT_OF_SYNC,
  ID_SYNCER_HIGH,
  ID_SYNCER_LOW,
  MAX_REQUEST_BYTES,
  P_DATA_REPLY,
  P_DATA_REQUEST,
  P_NEG_ACK,
  P_NEG_DREPLY,
  P_NEG_RS_DREPLY,
  P_OV_REPLY,
  P_RECV_ACK,
  P_RS_CANCEL,
  P_RS_DATA_REPLY,
  P_RS_IS_IN_SYNC,
  P_RS_WRITE_ACK,
  P_STATE_CHG_REPLY,
  P_STATE_CHG_REQ,
  P_SUPERSEDED,
  P_TRIM,
  P_WRITE_ACK,
  P_ZEROES,
  UUID_FLAG_CRASHED_PRIMARY,
  UUID_FLAG_DISCARD_MY_DATA,
  UUID_FLAG_INCONSISTENT,
  UUID_FLAG_SKIP_INITIAL_SYNC,
} from './wire/packets.js';

const C = ConnectionState;
const D = DiskState;
const F = RequestFlag;

const SECTOR_BYTES = 512;
const SECTORS_PER_BIT = 8;
/** Low bits of a data cookie: whose operation it is. */
const COOKIE_REQUEST = 0;
const COOKIE_PEER_REQUEST = 1;
const COOKIE_FLUSH = 2;
const COOKIE_KINDS = 4;

/** NBD_STATE_HOLE and NBD_STATE_ZERO: the bits of NBD's base:allocation. */
const RUN_HOLE_AND_ZERO = 3;

/** Takes runs one after the other; false: enough. */
export interface AllocationRuns {
  add(lengthBytes: number, state: number): boolean;
}

/** Per-volume options, in engine units. */
export interface VolumeOptions {
  /** Volume number on the wire, 0..65535. */
  readonly number: number;
  readonly minor: number;
  /** Configured size limit in sectors, 0 for none. */
  readonly userSizeSectors: number;
  /** Slots of the activity log, 67..65534. */
  readonly alExtents: number;
  readonly onIoError: 'pass-on' | 'call-local-io-error' | 'detach';
  readonly fencing: 'dont-care' | 'resource-only' | 'resource-and-stonith';
  readonly suspendOnNoData: boolean;
  /** A flush follows every epoch of the peer. False only where the disk has no volatile cache. */
  readonly diskFlushes: boolean;
  /** Fixed resync rate, in force when planAheadTenths is 0. */
  readonly resyncRateKibPerSecond: number;
  readonly planAheadTenths: number;
  readonly delayTargetTenths: number;
  readonly fillTargetSectors: number;
  readonly maxRateKibPerSecond: number;
  readonly minRateKibPerSecond: number;
}

/** The files of one disk. `meta` is the same object as `data` for internal metadata. */
export interface DiskDoors {
  readonly data: BlockFile;
  readonly meta: BlockFile;
  readonly metaKind: MetaDiskKind;
  /** Slot of indexed metadata. */
  readonly metaIndex?: number;
}

/** Outcome of an administrative wish. `code` as on the wire; `reason` in DRBD's words. */
export type AdminDone = (code: StateResult, reason: string) => void;

/** An attached disk. Operations of an old one may still be in flight after a detach. */
interface Backing {
  readonly doors: DiskDoors;
  readonly metadata: MetadataStore;
  /** Data operations in flight. */
  inFlight: number;
}

/** Counters of /proc/drbd, in sectors where it prints KiB. */
export class DeviceCounters {
  sentSectors = 0;
  receivedSectors = 0;
  diskWrittenSectors = 0;
  diskReadSectors = 0;
  /** Requests sent whose answer is outstanding. */
  pending = 0;
  /** Requests of the peer not yet answered. */
  unacked = 0;
  /** Application requests accepted and not completed. */
  applicationRequests = 0;
}

/**
 * One replicated volume: its state, its metadata, the requests in flight on it and what its peer wants from it.
 *
 * The order in which things become durable lives here. Read top down: a write needs its extents in the activity log
 * (`activate`), then leaves for disk and peer side by side (`start`), completes when both have it (`settle`), and is
 * forgotten when the peer made its epoch durable (`destroy`).
 *
 * @see DRBD 8.4 drbd_req.c, drbd_receiver.c, drbd_state.c after_state_ch, drbd_nl.c
 */
export class Device implements BlockTarget {
  readonly sectorBytes = SECTOR_BYTES;
  state: DeviceState = INITIAL_STATE;
  /** Exported size. */
  sizeSectors = 0;
  readonly counters = new DeviceCounters();
  /** The peer's generation identifiers as last received over this connection. */
  peerUuids: Uuids | undefined;
  crashedPrimary = false;
  /** One attempt of connecting with discard-my-data. */
  discardMyData = false;
  readonly resyncExtents = new ResyncExtents();
  readonly resync: Resync;
  readonly exchange: BitmapExchange;
  /** Resync settings in force: own, or as the peer sent them. */
  syncParameters: SyncParameters;

  private backing: Backing | undefined;
  private detaching: { readonly backing: Backing; readonly done: (() => void)[] } | undefined;
  private readonly intervals = new IntervalSet();
  private readonly waiting = new RequestQueue<Device>();
  private readonly overlapping = new RequestQueue<Device>();
  private readonly cold = new RequestQueue<Device>();
  private readonly committing = new RequestQueue<Device>();
  private readonly gated = new RequestQueue<Device>();
  private readonly peerOverlapping = new PeerRequestQueue();
  private readonly peerCold = new PeerRequestQueue();
  private readonly peerReads = new PeerRequestQueue();
  /** What the peer verifies, by sector, from its P_OV_REQUEST to its P_OV_RESULT. */
  private readonly verifying = new Map<number, PeerRequest>();
  /** Blocks whose result the verify by the peer still owes; negative before its first request. */
  private verifyLeftBits = -1;
  private openReaders = 0;
  private openWriters = 0;
  /** Reasons why no application request may start, and why none may complete. */
  private holds = 0;
  private gates = 0;
  private extentsFreed = false;
  private lastReplicated = false;
  private packetSequence = 0;
  private peerSequence = 0;
  private considerResync = false;
  private exposedUuid = 0n;
  /** A generation whose superblock could not be written: the disk may have it or the one before. */
  private unsureUuid = 0n;
  private remembered: { readonly disk: DiskState; readonly peerDisk: DiskState } | undefined;
  private peerSizes: Sizes | undefined;
  private sentBits = 0;
  private pendingChange: { readonly wanted: StateChange; readonly done: (code: StateResult) => void } | undefined;
  private readonly localFlushes = new Map<number, (errno: number) => void>();
  private nextFlush = 0;
  /** Peer writes were lost with a failed disk; the epoch they belong to must never be acknowledged. */
  lostPeerWrites = false;
  /** Order of completed data writes and how far a flush has covered them (see `needsFlushBefore`). */
  private writeOrder = 0;
  private flushedOrder = 0;
  private readonly extentWritten = new Map<number, number>();

  constructor(
    readonly resource: Resource,
    readonly options: VolumeOptions,
  ) {
    this.resync = new Resync(this);
    this.exchange = new BitmapExchange(this);
    this.syncParameters = this.ownSyncParameters();
  }

  get volume(): number {
    return this.options.number;
  }

  get sizeBytes(): number {
    return this.sizeSectors * SECTOR_BYTES;
  }

  /** The attached disk's metadata; undefined without a disk. */
  get metadata(): MetadataStore | undefined {
    return this.state.disk >= D.Negotiating || this.state.disk === D.Failed ? this.backing?.metadata : undefined;
  }

  get outOfSyncBits(): number {
    return this.metadata?.bitmap.weight ?? 0;
  }

  get localOperations(): number {
    return this.backing?.inFlight ?? 0;
  }

  private get hasDisk(): boolean {
    return this.state.disk >= D.Inconsistent;
  }

  // -------------------------------------------------------------------------------------------- the block front ends

  open(write: boolean): number {
    if (this.sizeSectors === 0) return Errno.EMEDIUMTYPE;
    if (this.state.role !== Role.Primary) return write ? Errno.EROFS : Errno.EMEDIUMTYPE;
    if (write) this.openWriters++;
    else this.openReaders++;
    return 0;
  }

  close(write: boolean): void {
    if (write) this.openWriters--;
    else this.openReaders--;
    assert(this.openReaders >= 0 && this.openWriters >= 0, 'whoever closes has opened');
  }

  get openCount(): number {
    return this.openReaders + this.openWriters;
  }

  read(front: BlockFront, frontRequest: number, offsetBytes: number, lengthBytes: number, payload: number): void {
    if (lengthBytes > MAX_REQUEST_BYTES) {
      this.transfer(front, frontRequest, false, offsetBytes, lengthBytes, payload, false);
      return;
    }
    this.accept(front, frontRequest, RequestKind.Read, offsetBytes, lengthBytes, payload, false, false);
  }

  write(
    front: BlockFront,
    frontRequest: number,
    offsetBytes: number,
    lengthBytes: number,
    payload: number,
    fua: boolean,
  ): void {
    if (lengthBytes > MAX_REQUEST_BYTES) {
      this.transfer(front, frontRequest, true, offsetBytes, lengthBytes, payload, fua);
      return;
    }
    this.accept(front, frontRequest, RequestKind.Write, offsetBytes, lengthBytes, payload, fua, false);
  }

  private transfer(
    front: BlockFront,
    frontRequest: number,
    isWrite: boolean,
    offset: number,
    length: number,
    payload: number,
    fua: boolean,
  ): void {
    const { resource } = this;
    const { memory } = resource.effects;
    new LargeTransfer(
      this,
      memory,
      resource,
      front,
      frontRequest,
      isWrite,
      offset,
      length,
      payload,
      MAX_REQUEST_BYTES,
      fua,
    ).pump();
  }

  flush(front: BlockFront, frontRequest: number): void {
    this.accept(front, frontRequest, RequestKind.Flush, 0, 0, NO_PAYLOAD_OFFSET, false, false);
  }

  zero(
    front: BlockFront,
    frontRequest: number,
    offsetBytes: number,
    lengthBytes: number,
    unmap: boolean,
    fua: boolean,
  ): void {
    const limit = this.resource.maxZeroBytes;
    if (lengthBytes > limit) {
      new LargeZero(this, front, frontRequest, offsetBytes, lengthBytes, limit, unmap, fua).next();
      return;
    }
    this.accept(front, frontRequest, RequestKind.Zero, offsetBytes, lengthBytes, NO_PAYLOAD_OFFSET, fua, unmap);
  }

  /**
   * Which parts of a range the own disk holds no data for (they read as zeroes). Advice, as NBD's base:allocation is:
   * only
   * an UpToDate disk is asked, for what is being synced is not known to be zero.
   */
  blockStatus(offsetBytes: number, lengthBytes: number, runs: AllocationRuns): void {
    const file = this.state.disk === D.UpToDate ? this.backing?.doors.data : undefined;
    const end = offsetBytes + lengthBytes;
    for (let at = offsetBytes; at < end; ) {
      const data = file?.seek?.(at, 'data') ?? -1;
      const hole = data === at ? (file?.seek?.(at, 'hole') ?? -1) : -1;
      const isHole = data > at;
      // Where nobody can say, it is data.
      const next = Math.min(end, isHole ? data : hole > at ? hole : end);
      if (!runs.add(next - at, isHole ? RUN_HOLE_AND_ZERO : 0)) return;
      at = next;
    }
  }

  private accept(
    front: BlockFront,
    frontRequest: number,
    kind: number,
    offsetBytes: number,
    lengthBytes: number,
    payload: number,
    fua: boolean,
    unmap: boolean,
  ): void {
    assert(offsetBytes % SECTOR_BYTES === 0 && lengthBytes % SECTOR_BYTES === 0, 'requests are whole sectors');
    assert(offsetBytes + lengthBytes <= this.sizeBytes, 'the front end keeps requests inside the device');
    assert(kind === RequestKind.Zero || lengthBytes <= MAX_REQUEST_BYTES, 'reads and writes are at most 1 MiB');
    const request = this.resource.requests.allocate();
    if (!request) {
      this.resource.answerLater(front, frontRequest, Errno.ENOMEM);
      return;
    }
    request.owner = this;
    request.front = front;
    request.frontRequest = frontRequest;
    request.kind = kind;
    request.sector = offsetBytes / SECTOR_BYTES;
    request.sectors = lengthBytes / SECTOR_BYTES;
    request.payload = payload;
    request.fua = fua;
    request.unmap = unmap;
    request.stage = RequestStage.Waiting;
    request.startedMs = this.resource.nowMs;
    this.counters.applicationRequests++;
    if (this.waiting.head || !this.mayAdmit()) this.waiting.push(request);
    else this.admit(request);
  }

  private mayAdmit(): boolean {
    const { state } = this;
    return (
      this.holds === 0 &&
      !isSuspended(state) &&
      state.connection !== C.WFBitMapT &&
      state.connection !== C.WFSyncUUID &&
      state.disk !== D.Attaching &&
      state.disk !== D.Negotiating &&
      (this.backing === undefined || this.backing.metadata.bulkInProgress === 0) &&
      this.resource.mayAdmit()
    );
  }

  /** Something this device's requests wait for may have become free; they try again at the end of the turn. */
  extentsReleased(): void {
    this.extentsFreed = true;
    this.resource.requestTurnEnd();
  }

  /** Starts what waits for admission, as far as it may. */
  pump(): void {
    while (this.waiting.head && this.mayAdmit()) this.admit(this.waiting.shift()!);
  }

  get hasWaiting(): boolean {
    return this.waiting.length > 0;
  }

  private admit(request: Request<Device>): void {
    this.resource.activeRequests++;
    switch (request.kind) {
      case RequestKind.Read:
        request.stage = RequestStage.Running;
        this.startRead(request);
        return;
      case RequestKind.Flush:
        request.stage = RequestStage.Running;
        this.startFlush(request);
        return;
    }
    this.activate(request);
  }

  private isBlocked(sector: number, sectors: number, age: number): boolean {
    return !this.resource.mutations.ignoreOverlaps && this.intervals.isBlocked(sector, sector + sectors, age);
  }

  // ------------------------------------------------------------------------------------------------ the activity log

  /** Brings the extents of a write into the activity log; goes on when that is durable. */
  private activate(request: Request<Device>): void {
    if (!this.hasDisk) {
      this.takeTurn(request);
      return;
    }
    request.stage = RequestStage.ActivityLog;
    if (!this.tryActivate(request)) this.cold.push(request);
  }

  private tryActivate(request: Request<Device>): boolean {
    const metadata = this.metadata;
    if (!metadata || !this.hasDisk) {
      this.takeTurn(request);
      return true;
    }
    const first = extentOfSector(request.sector);
    const last = extentOfSector(request.sector + request.sectors - 1);
    if (this.isRefusedByResync(first, last)) return false;
    const ordinal = metadata.activityLog.begin(first, last);
    if (ordinal === AL_WAIT) {
      // Writes keep their extents until their epoch is acknowledged.
      this.resource.closeDueEpoch();
      return false;
    }
    request.flags |= F.ActivityLogHeld;
    if (ordinal === AL_HOT) {
      this.takeTurn(request);
    } else {
      request.epoch = ordinal;
      this.committing.push(request);
      // At the end of the turn, so that the misses of a batch share one transaction.
      this.resource.requestTurnEnd();
    }
    return true;
  }

  private isRefusedByResync(first: number, last: number): boolean {
    for (let extent = first; extent <= last; extent++) if (this.resyncExtents.refusesWrite(extent)) return true;
    return false;
  }

  private activityLogCommitted(metadata: MetadataStore): void {
    if (this.backing?.metadata !== metadata) return;
    const committed = metadata.activityLog.transactionsCommitted;
    this.committing.removeIf((request) => {
      if (request.epoch > committed) return false;
      this.takeTurn(request);
      return true;
    });
    this.peerCold.removeIf((request) => {
      if (request.ordinal === 0 || request.ordinal > committed) return false;
      this.startPeerWrite(request);
      return true;
    });
    this.retryCold();
  }

  /** Extents became idle or free: whoever waited for them tries again, oldest first. */
  retryCold(): void {
    this.cold.removeIf((request) => this.tryActivate(request));
    this.peerCold.removeIf((request) => request.ordinal === 0 && this.tryActivatePeer(request));
  }

  private releaseExtents(sector: number, sectors: number): void {
    const metadata = this.backing?.metadata;
    assert(metadata !== undefined, 'references on extents die before their disk');
    const first = extentOfSector(sector);
    const last = extentOfSector(sector + sectors - 1);
    if (metadata.activityLog.release(first, last)) this.extentsReleased();
  }

  // -------------------------------------------------------------------------------------------------------- a write

  /**
   * Starts a write unless an older one that overlaps it is not completed. The activity log comes first: a write that
   * waits here for its extents must not hold up a resync write that keeps them locked.
   */
  private takeTurn(request: Request<Device>): void {
    request.age = this.intervals.insert(request.sector, request.sector + request.sectors);
    request.flags |= F.Interval;
    if (this.isBlocked(request.sector, request.sectors, request.age)) {
      request.stage = RequestStage.Overlap;
      this.overlapping.push(request);
    } else {
      this.start(request);
    }
  }

  /** Sends a write to the own disk and to the peer, side by side. */
  private start(request: Request<Device>): void {
    request.stage = RequestStage.Running;
    const { state, resource } = this;
    const local = this.hasDisk;
    const mayWrite = hasUpToDateData(state);
    const remote = mayWrite && resource.link !== undefined && shouldReplicate(state);
    if (remote !== this.lastReplicated) {
      // Replicated and unreplicated writes never share an epoch.
      resource.log.closeEpoch();
      this.lastReplicated = remote;
    }
    resource.log.admit(request, resource.net.maxEpochWrites);
    if (mayWrite && local) this.writeLocally(request);
    if (remote) this.sendWrite(request);
    else if (mayWrite && resource.link && shouldSendOutOfSync(state)) this.announce(request.sector, request.sectors);
    if (!request.has(F.LocalPending) && !request.has(F.NetPending)) resource.settleLater(request);
  }

  private writeLocally(request: Request<Device>): void {
    const backing = this.beginOperation();
    request.flags |= F.LocalPending;
    this.counters.diskWrittenSectors += request.sectors;
    const cookie = request.slot * COOKIE_KINDS + COOKIE_REQUEST;
    const offset = request.sector * SECTOR_BYTES;
    const length = request.sectors * SECTOR_BYTES;
    if (request.kind === RequestKind.Zero) backing.doors.data.zero(cookie, offset, length, !request.unmap, request.fua);
    else backing.doors.data.write(cookie, offset, request.payload, length, request.fua);
  }

  private sendWrite(request: Request<Device>): void {
    const { resource } = this;
    const { context } = resource.link!;
    resource.sendBarrierBefore(request.epoch);
    request.flags |= F.NetPending | F.InEpoch;
    request.sentMs = resource.nowMs;
    resource.log.writeSent(request);
    this.counters.pending++;
    const inSync = isSyncOrVerify(this.state.connection);
    let flags = request.fua ? DP_FUA : 0;
    if (inSync) flags |= DP_MAY_SET_IN_SYNC;
    if (resource.net.wireProtocol === 3 || inSync) flags |= DP_SEND_WRITE_ACK;
    if (resource.net.wireProtocol === 2) flags |= DP_SEND_RECEIVE_ACK;
    const sequence = ++this.packetSequence >>> 0;
    const length = request.sectors * SECTOR_BYTES;
    const { sector, incarnation, slot } = request;
    if (request.kind === RequestKind.Write) {
      resource.sendData(
        encodeData(resource.scratch, this.volume, sector, incarnation, slot, sequence, flags, length),
        request.payload,
        length,
      );
      this.counters.sentSectors += request.sectors;
    } else {
      const zeroes = context.hasWriteZeroes;
      flags |= zeroes ? DP_ZEROES | (request.unmap ? DP_DISCARD : 0) : DP_DISCARD;
      const command = zeroes ? P_ZEROES : P_TRIM;
      resource.sendData(
        encodeTrim(resource.scratch, command, this.volume, sector, incarnation, slot, sequence, flags, length),
      );
    }
  }

  /** The peer must know that it lacks this, while bitmaps are being exchanged. */
  private announce(sector: number, sectors: number): void {
    const { resource } = this;
    if (this.markOutOfSync(sector, sectors) === 0) return;
    resource.sendBarrierBefore(resource.log.currentEpoch);
    resource.sendData(encodeOutOfSync(resource.scratch, this.volume, sector, sectors * SECTOR_BYTES));
  }

  /** @returns bits that were clear before */
  markOutOfSync(sector: number, sectors: number): number {
    return this.metadata?.bitmap.setRange(sector, sectors) ?? 0;
  }

  /** The own disk is done with an application request. */
  private localDone(request: Request<Device>, errno: number): void {
    request.flags &= ~F.LocalPending;
    if (errno === 0) {
      request.flags |= F.LocalOk;
      if (request.kind === RequestKind.Write || request.kind === RequestKind.Zero)
        this.noteWritten(request.sector, request.sectors);
    } else {
      // At once: with pass-on the disk goes on serving the blocks that are good.
      if (request.kind !== RequestKind.Flush) this.markOutOfSync(request.sector, request.sectors);
      request.flags |= F.LocalFailed;
      if (request.kind === RequestKind.Flush) this.flushFailed(errno);
      else this.diskFailed(`errno ${errno} at sector ${request.sector} + ${request.sectors}`);
      if (request.kind === RequestKind.Read) {
        this.startRead(request);
        return;
      }
    }
    this.settle(request);
  }

  /** The peer has a request, or never will. */
  netDone(request: Request<Device>, ok: boolean): void {
    if (!request.has(F.NetPending)) return;
    request.flags &= ~F.NetPending;
    if (ok) request.flags |= F.NetOk;
    this.counters.pending--;
    this.settle(request);
  }

  /** Completes a request whose parts are done, and forgets it when nothing remembers it. */
  settle(request: Request<Device>): void {
    const awaited = this.resource.mutations.ackBeforePeer ? F.LocalPending : F.LocalPending | F.NetPending;
    if ((request.flags & awaited) !== 0) return;
    if (!request.has(F.Completed)) {
      if (this.gates > 0) {
        if (request.has(F.Gated)) return;
        request.flags |= F.Gated;
        this.gated.push(request);
        return;
      }
      this.complete(request);
    }
    if (!request.has(F.InEpoch) && !request.has(F.NetPending) && !request.has(F.LocalPending)) this.destroy(request);
  }

  private complete(request: Request<Device>): void {
    const { resource } = this;
    request.flags |= F.Completed;
    if (request.has(F.Interval)) this.leaveIntervals(request);
    const isWrite = request.kind === RequestKind.Write || request.kind === RequestKind.Zero;
    if (isWrite) resource.writeCompleted(request.epoch);
    const ok = this.succeeded(request);
    resource.activeRequests--;
    this.counters.applicationRequests--;
    const { front, frontRequest } = request;
    assert(front !== undefined, 'a request has a front end');
    front.complete(frontRequest, ok ? 0 : request.errno || Errno.EIO);
    if (resource.hasWaiting) resource.requestTurnEnd();
  }

  /**
   * Whether a request is where it must be. One side is enough if that side's data is good; what only an Inconsistent
   * disk
   * has, the next resync overwrites. (drbd.ko calls that a success too.)
   */
  private succeeded(request: Request<Device>): boolean {
    const local = request.has(F.LocalOk);
    const net = request.has(F.NetOk);
    if (request.kind === RequestKind.Read || (local && net)) return local || net;
    return (local && this.state.disk === D.UpToDate) || (net && this.state.peerDisk === D.UpToDate);
  }

  private leaveIntervals(request: Request<Device>): void {
    request.flags &= ~F.Interval;
    this.intervals.remove(request.age);
    this.retryOverlapping();
  }

  private retryOverlapping(): void {
    if (this.overlapping.length > 0)
      this.overlapping.removeIf((waiter) => {
        if (this.isBlocked(waiter.sector, waiter.sectors, waiter.age)) return false;
        this.start(waiter);
        return true;
      });
    if (this.peerOverlapping.length > 0)
      this.peerOverlapping.removeIf((waiter) => {
        if (this.isBlocked(waiter.sector, waiter.sectors, waiter.age)) return false;
        this.coverPeerWrite(waiter);
        return true;
      });
  }

  /** The last trace of a request: what it left behind goes into the bitmap. */
  private destroy(request: Request<Device>): void {
    if (request.kind === RequestKind.Write || request.kind === RequestKind.Zero) {
      if (!request.has(F.LocalOk) || !request.has(F.NetOk)) this.markOutOfSync(request.sector, request.sectors);
      else if (request.has(F.SetInSync)) this.clearOutOfSync(request.sector, request.sectors);
      if (request.has(F.ActivityLogHeld)) this.releaseExtents(request.sector, request.sectors);
    }
    this.resource.requests.release(request);
  }

  private clearOutOfSync(sector: number, sectors: number): void {
    const cleared = this.metadata?.bitmap.clearRange(sector, sectors) ?? 0;
    if (cleared > 0) this.resync.bitsCleared();
  }

  /** The epoch a write belongs to is durable at the peer. */
  epochAcked(request: Request<Device>): void {
    if (request.has(F.NetPending))
      throw new ProtocolError(
        'DRBDTS_DRBD_EPOCH_NOT_ACKED',
        `barrier acknowledged before the write at sector ${request.sector}`,
        'DRBD 8.4 drbd_receiver.c drbd_may_finish_epoch',
      );
    request.flags &= ~F.InEpoch;
    this.settle(request);
  }

  /** The connection broke before the peer made the request's epoch durable: it counts as not written there. */
  epochLost(request: Request<Device>): void {
    request.flags &= ~F.InEpoch;
    if (!this.resource.mutations.forgetUnackedEpochs) request.flags &= ~F.NetOk;
    else request.flags |= F.NetOk;
    if (request.has(F.NetPending)) {
      request.flags &= ~F.NetPending;
      this.counters.pending--;
    }
    this.settle(request);
  }

  // ---------------------------------------------------------------------------------------------------------- reads

  private startRead(request: Request<Device>): void {
    const { state, resource } = this;
    request.flags &= ~F.LocalOk;
    const localPossible =
      !request.has(F.LocalFailed) &&
      (state.disk === D.UpToDate ||
        (state.disk === D.Inconsistent && !this.metadata!.bitmap.isAnySet(request.sector, request.sectors)));
    if (localPossible) {
      const backing = this.beginOperation();
      request.flags |= F.LocalPending;
      this.counters.diskReadSectors += request.sectors;
      const cookie = request.slot * COOKIE_KINDS + COOKIE_REQUEST;
      const offset = request.sector * SECTOR_BYTES;
      backing.doors.data.read(cookie, offset, request.payload, request.sectors * SECTOR_BYTES);
    } else if (resource.link && state.peerDisk === D.UpToDate && state.connection >= C.Connected) {
      resource.sendBarrierBefore(resource.log.currentEpoch);
      request.flags |= F.NetPending;
      request.sentMs = resource.nowMs;
      this.counters.pending++;
      const { sector, incarnation, slot } = request;
      const length = request.sectors * SECTOR_BYTES;
      resource.sendData(
        encodeRequest(resource.scratch, P_DATA_REQUEST, this.volume, sector, incarnation, slot, length),
      );
    } else {
      resource.settleLater(request);
    }
  }

  /** P_DATA_REPLY: `payload` is ours. */
  receiveDataReply(packet: DataPacket, payload: number): void {
    const { memory } = this.resource.effects;
    const request = this.resource.requests.at(packet.blockIdLow);
    if (
      request?.incarnation !== packet.blockIdHigh ||
      request.owner !== this ||
      request.kind !== RequestKind.Read ||
      !request.has(F.NetPending) ||
      request.sector !== packet.sector ||
      request.sectors * SECTOR_BYTES !== packet.sizeBytes
    ) {
      memory.release(payload);
      throw new ProtocolError(
        'DRBDTS_DRBD_UNKNOWN_REPLY',
        `P_DATA_REPLY for sector ${packet.sector}, which nobody asked for`,
        'DRBD 8.4 drbd_receiver.c receive_DataReply',
      );
    }
    this.counters.receivedSectors += request.sectors;
    memory.bytes.copyWithin(request.payload, payload, payload + packet.sizeBytes);
    memory.release(payload);
    this.netDone(request, true);
  }

  /** A read at the peer failed, or the connection did: elsewhere if possible. */
  readFailed(request: Request<Device>): void {
    request.flags &= ~F.NetPending;
    this.counters.pending--;
    this.startRead(request);
  }

  // --------------------------------------------------------------------------------------------------------- flushes

  /**
   * A flush: the own disk's cache, and the peer's acknowledgement that every epoch up to now is durable there. The
   * kernel answers without the latter; waiting for it costs one round trip and survives the loss of both heads.
   */
  private startFlush(request: Request<Device>): void {
    const { resource } = this;
    request.epoch = resource.log.currentEpoch;
    resource.log.closeEpoch();
    if (this.hasDisk) {
      const backing = this.beginOperation();
      request.flags |= F.LocalPending;
      request.age = this.writeOrder;
      backing.doors.data.flush(request.slot * COOKIE_KINDS + COOKIE_REQUEST);
    }
    if (resource.link && resource.log.isOpen(request.epoch) && !resource.mutations.flushWithoutPeer) {
      request.flags |= F.NetPending | F.WaitsForEpoch;
      this.counters.pending++;
      resource.flushes.push(request);
      resource.requestTurnEnd();
    } else if (resource.link && this.state.peerDisk === D.UpToDate) {
      // Everything the peer ever acknowledged is durable there already.
      request.flags |= F.NetOk;
    }
    if (!request.has(F.LocalPending) && !request.has(F.NetPending)) resource.settleLater(request);
  }

  // ----------------------------------------------------------------------------------------------------- the own disk

  private beginOperation(): Backing {
    const { backing } = this;
    assert(backing !== undefined, 'a disk is attached');
    backing.inFlight++;
    return backing;
  }

  private dataDone(backing: Backing, cookie: number, errno: number): void {
    backing.inFlight--;
    const slot = Math.floor(cookie / COOKIE_KINDS);
    switch (cookie % COOKIE_KINDS) {
      case COOKIE_REQUEST: {
        const request = this.resource.requests.at(slot);
        assert(request !== undefined, `request ${slot} is in use`);
        if (request.kind === RequestKind.Flush && errno === 0)
          this.flushedOrder = Math.max(this.flushedOrder, request.age);
        this.localDone(request, errno);
        break;
      }
      case COOKIE_PEER_REQUEST:
        this.peerOperationDone(this.resource.peerRequests.at(slot), errno);
        break;
      case COOKIE_FLUSH: {
        const then = this.localFlushes.get(slot);
        assert(then !== undefined, `flush ${slot} is outstanding`);
        this.localFlushes.delete(slot);
        then(errno);
        break;
      }
    }
    this.maybeFinishDetach();
  }

  /** Flushes the own disk's cache, if there is one. `then` gets 0 when there is no disk to flush. */
  flushLocally(then: (errno: number) => void): void {
    if (this.hasDisk) this.flushBacking(then);
    else then(0);
  }

  /** Flushes the attached disk whatever its state: metadata is still written while it is being detached. */
  private flushBacking(then: (errno: number) => void): void {
    const backing = this.beginOperation();
    const order = this.writeOrder;
    this.nextFlush = (this.nextFlush + 1) & 0xffffff;
    this.localFlushes.set(this.nextFlush, (errno) => {
      if (errno === 0) this.flushedOrder = Math.max(this.flushedOrder, order);
      else this.flushFailed(errno);
      then(errno);
    });
    backing.doors.data.flush(this.nextFlush * COOKIE_KINDS + COOKIE_FLUSH);
  }

  private noteWritten(sector: number, sectors: number): void {
    this.writeOrder++;
    const last = extentOfSector(sector + sectors - 1);
    for (let extent = extentOfSector(sector); extent <= last; extent++) this.extentWritten.set(extent, this.writeOrder);
  }

  /**
   * Whether data lies in the disk's cache that must be stable before metadata may forget it: an extent that leaves the
   * activity log, or a block whose bit was cleared, would differ from the peer's after a power loss and nobody would
   * know.
   */
  private needsFlushBefore(evicted: readonly number[], bitmapChanged: boolean): boolean {
    if (bitmapChanged) return this.writeOrder > this.flushedOrder;
    return evicted.some((extent) => (this.extentWritten.get(extent) ?? 0) > this.flushedOrder);
  }

  /** An operation on the own disk failed. */
  diskFailed(message: string): void {
    if (this.state.disk <= D.Failed) return;
    this.resource.report('error', `volume ${this.volume}: local disk: ${message}`);
    if (this.options.onIoError === 'pass-on') {
      if (this.state.disk > D.Inconsistent) this.changeState({ disk: D.Inconsistent }, 'hard');
      return;
    }
    if (this.options.onIoError === 'call-local-io-error') this.resource.callHelper('local-io-error', this.volume);
    this.loseDisk();
  }

  /** What a disk lost that could not flush is not known, so on-io-error pass-on, which marks blocks, cannot serve. */
  private flushFailed(errno: number): void {
    if (this.state.disk <= D.Failed) return;
    this.resource.report('error', `volume ${this.volume}: local disk: flush failed with errno ${errno}`);
    if (this.options.onIoError === 'call-local-io-error') this.resource.callHelper('local-io-error', this.volume);
    this.loseDisk();
  }

  private metadataFailed(metadata: MetadataStore, message: string): void {
    if (this.backing?.metadata !== metadata || this.state.disk <= D.Failed) return;
    this.resource.report('error', `volume ${this.volume}: metadata: ${message}`);
    this.loseDisk();
  }

  private loseDisk(): void {
    this.changeState({ disk: D.Failed }, 'hard');
    this.beginDetach(() => {});
  }

  private beginDetach(done: () => void): void {
    const { backing } = this;
    if (!backing) {
      done();
      return;
    }
    if (this.detaching) {
      this.detaching.done.push(done);
      return;
    }
    this.detaching = { backing, done: [done] };
    // What waits for the activity log of this disk goes on without it.
    this.committing.removeIf((request) => {
      this.takeTurn(request);
      return true;
    });
    this.cold.removeIf((request) => {
      this.takeTurn(request);
      return true;
    });
    this.peerCold.removeIf((request) => {
      this.refusePeerWrite(request);
      return true;
    });
    this.peerReads.removeIf((request) => {
      this.refusePeerRead(request);
      return true;
    });
    this.resource.requestTurnEnd();
  }

  /** The last operation on a failed disk is done: it is gone. */
  maybeFinishDetach(): void {
    const { detaching } = this;
    if (!detaching || detaching.backing.inFlight > 0 || !detaching.backing.metadata.isIdle) return;
    if (this.resource.holdsExtents(this)) return;
    this.detaching = undefined;
    this.backing = undefined;
    detaching.backing.metadata.close();
    detaching.backing.doors.data.close();
    if (detaching.backing.doors.meta !== detaching.backing.doors.data) detaching.backing.doors.meta.close();
    this.extentWritten.clear();
    this.changeState({ disk: D.Diskless }, 'hard');
    for (const done of detaching.done) done();
  }

  // ---------------------------------------------------------------------------------------------- writes of the peer

  /** P_DATA, P_TRIM or P_ZEROES. `payload` is ours, or NO_PAYLOAD_OFFSET. */
  receiveWrite(packet: DataPacket, isZero: boolean, payload: number): void {
    const { resource } = this;
    const sectors = packet.sizeBytes / SECTOR_BYTES;
    if (isZero === false) this.counters.receivedSectors += sectors;
    if (!isAfterWrap(this.peerSequence, packet.sequence)) this.peerSequence = packet.sequence;
    const epoch = resource.epochs.writeReceived();
    if (!this.hasDisk) {
      if (payload !== NO_PAYLOAD_OFFSET) resource.effects.memory.release(payload);
      this.sendAck(P_NEG_ACK, packet.sector, packet.blockIdHigh, packet.blockIdLow, packet.sizeBytes);
      resource.epochs.writeDone(epoch);
      resource.epochChanged();
      return;
    }
    const request = resource.peerRequests.allocate(packet.sector, sectors);
    request.kind = isZero ? PeerRequestKind.Zero : PeerRequestKind.Write;
    request.payload = payload;
    request.blockIdHigh = packet.blockIdHigh;
    request.blockIdLow = packet.blockIdLow;
    request.dpFlags = packet.dpFlags;
    request.epoch = epoch;
    request.link = resource.linkNumber;
    this.counters.unacked++;
    if ((packet.dpFlags & DP_SEND_RECEIVE_ACK) !== 0)
      this.sendAck(P_RECV_ACK, packet.sector, packet.blockIdHigh, packet.blockIdLow, packet.sizeBytes);
    if (sectors === 0) {
      this.startPeerWrite(request);
      return;
    }
    request.age = this.intervals.insert(request.sector, request.sector + request.sectors);
    if (this.isBlocked(request.sector, request.sectors, request.age)) this.peerOverlapping.push(request);
    else this.coverPeerWrite(request);
  }

  /** A peer without a disk writes through ours: then our activity log covers the write. */
  private coverPeerWrite(request: PeerRequest): void {
    if (!this.hasDisk) {
      this.refusePeerWrite(request);
      return;
    }
    if (request.kind === PeerRequestKind.ResyncWrite || this.state.peerDisk >= D.Inconsistent) {
      this.startPeerWrite(request);
      return;
    }
    this.markOutOfSync(request.sector, request.sectors);
    request.dpFlags &= ~DP_MAY_SET_IN_SYNC;
    if (!this.tryActivatePeer(request)) this.peerCold.push(request);
  }

  private tryActivatePeer(request: PeerRequest): boolean {
    const metadata = this.metadata;
    if (!metadata || !this.hasDisk) {
      this.refusePeerWrite(request);
      return true;
    }
    // PRIMARY_IND must be on disk first: without it nobody would replay the activity log.
    if (this.holds > 0) return false;
    const first = extentOfSector(request.sector);
    const last = extentOfSector(request.sector + request.sectors - 1);
    if (this.isRefusedByResync(first, last)) return false;
    const ordinal = metadata.activityLog.begin(first, last);
    if (ordinal === AL_WAIT) {
      // Writes keep their extents until their epoch is acknowledged.
      this.resource.closeDueEpoch();
      return false;
    }
    request.activityLogHeld = true;
    if (ordinal === AL_HOT) {
      this.startPeerWrite(request);
      return true;
    }
    request.ordinal = ordinal;
    this.peerCold.push(request);
    this.resource.requestTurnEnd();
    return true;
  }

  private startPeerWrite(request: PeerRequest): void {
    if (!this.hasDisk) {
      this.refusePeerWrite(request);
      return;
    }
    if ((request.dpFlags & DP_FLUSH) !== 0) {
      request.dpFlags &= ~DP_FLUSH;
      this.flushLocally((errno) => {
        if (errno !== 0 || request.sectors === 0) this.peerOperationDone(request, errno);
        else this.startPeerWrite(request);
      });
      return;
    }
    const backing = this.beginOperation();
    this.counters.diskWrittenSectors += request.sectors;
    const cookie = request.slot * COOKIE_KINDS + COOKIE_PEER_REQUEST;
    const offset = request.sector * SECTOR_BYTES;
    const durable = (request.dpFlags & DP_FUA) !== 0;
    if (request.kind === PeerRequestKind.Zero) {
      const keepAllocated = (request.dpFlags & DP_DISCARD) === 0;
      backing.doors.data.zero(cookie, offset, request.lengthBytes, keepAllocated, durable);
    } else {
      backing.doors.data.write(cookie, offset, request.payload, request.lengthBytes, durable);
    }
  }

  private refusePeerWrite(request: PeerRequest): void {
    this.peerOperationDone(request, Errno.EIO);
  }

  /** The own disk is done with something the peer asked for. */
  private peerOperationDone(request: PeerRequest, errno: number): void {
    switch (request.kind) {
      case PeerRequestKind.Read:
      case PeerRequestKind.ResyncRead:
      case PeerRequestKind.ChecksumRead:
      case PeerRequestKind.VerifyRead:
        this.peerReadDone(request, errno);
        return;
      case PeerRequestKind.ResyncWrite:
        this.resyncWriteDone(request, errno);
        return;
    }
    const { resource } = this;
    const { sector, sectors, blockIdHigh, blockIdLow } = request;
    let command: number;
    if (errno === 0) {
      if (sectors > 0) this.noteWritten(sector, sectors);
      const setsInSync = isSyncOrVerify(this.state.connection) && (request.dpFlags & DP_MAY_SET_IN_SYNC) !== 0;
      if (setsInSync) this.clearOutOfSync(sector, sectors);
      command = setsInSync ? P_RS_WRITE_ACK : P_WRITE_ACK;
    } else {
      if (sectors > 0) this.markOutOfSync(sector, sectors);
      this.diskFailed(`errno ${errno} at sector ${sector} + ${sectors}`);
      command = P_NEG_ACK;
    }
    if (request.link === resource.linkNumber && (errno !== 0 || (request.dpFlags & DP_SEND_WRITE_ACK) !== 0))
      this.sendAck(command, sector, blockIdHigh, blockIdLow, request.lengthBytes);
    if (request.activityLogHeld) this.releaseExtents(sector, sectors);
    this.finishPeerWrite(request);
    resource.epochs.writeDone(request.epoch);
    resource.peerRequests.release(request);
    resource.epochChanged();
    resource.peerRequestDone();
  }

  private finishPeerWrite(request: PeerRequest): void {
    this.counters.unacked--;
    if (request.payload !== NO_PAYLOAD_OFFSET) this.resource.effects.memory.release(request.payload);
    if (request.age === 0) return;
    this.intervals.remove(request.age);
    this.retryOverlapping();
  }

  private sendAck(command: number, sector: number, idHigh: number, idLow: number, sizeBytes: number): void {
    const { resource } = this;
    if (!resource.link || this.state.connection < C.Connected) return;
    const sequence = ++this.packetSequence >>> 0;
    resource.sendMeta(
      encodeBlockAck(resource.scratch, command, this.volume, sector, idHigh, idLow, sizeBytes, sequence),
    );
  }

  // ------------------------------------------------------------------------------------- reads and resync of the peer

  /**
   * P_DATA_REQUEST, P_RS_DATA_REQUEST, P_RS_THIN_REQ, P_CSUM_RS_REQUEST or P_OV_REQUEST.
   * @param digest of P_CSUM_RS_REQUEST; ours from now on
   */
  receiveReadRequest(packet: BlockRequest, kind: number, digest?: Uint8Array): void {
    const { resource } = this;
    checkInsideDevice(packet.sector, packet.sizeBytes, this.sizeSectors);
    if (kind === PeerRequestKind.VerifyRead) this.expectVerifyRequest(packet);
    if (this.state.disk !== D.UpToDate) {
      const command = kind === PeerRequestKind.Read ? P_NEG_DREPLY : P_NEG_RS_DREPLY;
      this.sendAck(command, packet.sector, packet.blockIdHigh, packet.blockIdLow, packet.sizeBytes);
      return;
    }
    const request = resource.peerRequests.allocate(packet.sector, packet.sizeBytes / SECTOR_BYTES);
    request.kind = kind;
    request.blockIdHigh = packet.blockIdHigh;
    request.blockIdLow = packet.blockIdLow;
    request.digest = digest;
    request.link = resource.linkNumber;
    if (kind === PeerRequestKind.VerifyRead) this.verifying.set(request.sector, request);
    this.counters.unacked++;
    this.peerReads.push(request);
    this.retryPeerReads();
  }

  /** Starts reads for the peer as far as extents, memory and the send queue allow, in the order they came. */
  retryPeerReads(): void {
    const { memory } = this.resource.effects;
    while (this.peerReads.head && !this.resource.isSendQueueFull) {
      const request = this.peerReads.head;
      if (!this.hasDisk) {
        this.peerReads.shift();
        this.refusePeerRead(request);
        continue;
      }
      if (request.kind !== PeerRequestKind.Read && !this.lockForRead(request)) return;
      const payload = memory.allocate(request.lengthBytes);
      if (payload < 0) return;
      this.peerReads.shift();
      request.payload = payload;
      const backing = this.beginOperation();
      this.counters.diskReadSectors += request.sectors;
      const cookie = request.slot * COOKIE_KINDS + COOKIE_PEER_REQUEST;
      backing.doors.data.read(cookie, request.sector * SECTOR_BYTES, payload, request.lengthBytes);
    }
  }

  /** Keeps writes out of the extent of a resync read until the data is on its way, in order, behind it. */
  private lockForRead(request: PeerRequest): boolean {
    const extent = this.resync.extentOf(request.sector);
    if (request.ordinal !== this.resyncExtents.generation) {
      if (!this.resyncExtents.enter(extent)) return false;
      request.ordinal = this.resyncExtents.generation;
    }
    if (this.isExtentInUse(extent)) return false;
    this.resyncExtents.lock(extent);
    return true;
  }

  /** Whether some application write holds an activity log extent inside a resync extent. */
  isExtentInUse(extent: number): boolean {
    const first = extent * ACTIVITY_LOG_EXTENTS_PER_RESYNC_EXTENT;
    const last = first + ACTIVITY_LOG_EXTENTS_PER_RESYNC_EXTENT - 1;
    return this.metadata?.activityLog.isAnyReferenced(first, last) ?? false;
  }

  /** Gives a resync extent back; writes that waited for it go on. */
  leaveExtent(extent: number): void {
    if (this.resyncExtents.leave(extent)) this.extentsReleased();
  }

  private peerReadDone(request: PeerRequest, errno: number): void {
    const { resource } = this;
    if (request.kind === PeerRequestKind.VerifyRead) {
      this.verifyReadDone(request, errno);
      return;
    }
    const isResync = request.kind !== PeerRequestKind.Read;
    const { sector, sectors, blockIdHigh, blockIdLow, payload, lengthBytes } = request;
    const alive = request.link === resource.linkNumber && resource.link !== undefined;
    if (errno !== 0) {
      this.markOutOfSync(sector, sectors);
      if (alive) this.sendAck(isResync ? P_NEG_RS_DREPLY : P_NEG_DREPLY, sector, blockIdHigh, blockIdLow, lengthBytes);
      if (isResync && alive) this.resync.failedAtSource(sectors);
      this.diskFailed(`errno ${errno} at sector ${sector} + ${sectors}`);
    } else if (alive && isResync && this.state.connection === C.Ahead) {
      this.sendAck(P_RS_CANCEL, sector, blockIdHigh, blockIdLow, lengthBytes);
    } else if (alive && request.kind === PeerRequestKind.ChecksumRead && this.hasSameChecksum(request)) {
      this.clearOutOfSync(sector, sectors);
      this.sendAck(P_RS_IS_IN_SYNC, sector, blockIdHigh, blockIdLow, lengthBytes);
    } else if (alive && (!isResync || request.ordinal === this.resyncExtents.generation)) {
      // What was read for a resync that has ended may be older than what was written since.
      const command = isResync ? P_RS_DATA_REPLY : P_DATA_REPLY;
      resource.sendData(
        encodeDataReply(resource.scratch, command, this.volume, sector, blockIdHigh, blockIdLow, lengthBytes),
        payload,
        lengthBytes,
      );
      this.counters.sentSectors += sectors;
      if (isResync) this.counters.pending++;
    }
    if (payload !== NO_PAYLOAD_OFFSET) resource.effects.memory.release(payload);
    this.counters.unacked--;
    this.releasePeerRead(request);
    this.retryPeerReads();
  }

  /** Gives back a read of the peer with the extent that it held. */
  private releasePeerRead(request: PeerRequest): void {
    const { resource } = this;
    if (request.kind !== PeerRequestKind.Read && request.ordinal === this.resyncExtents.generation)
      this.leaveExtent(this.resync.extentOf(request.sector));
    resource.peerRequests.release(request);
    resource.peerRequestDone();
  }

  private bytesOf(request: PeerRequest): Uint8Array {
    return this.resource.effects.memory.bytes.subarray(request.payload, request.payload + request.lengthBytes);
  }

  // The peer's algorithms are adopted with its P_SYNC_PARAM; at connect they were equal to ours.
  private get checksumAlgorithm(): string {
    return this.syncParameters?.checksumAlgorithm ?? this.resource.net.checksumAlgorithm;
  }

  private get verifyAlgorithm(): string {
    return this.syncParameters?.verifyAlgorithm ?? this.resource.net.verifyAlgorithm;
  }

  /** What a P_CSUM_RS_REQUEST must carry. @throws ProtocolError without an algorithm */
  get digestBytesOfChecksum(): number {
    const size = digestBytes(this.checksumAlgorithm);
    if (size === 0)
      throw new ProtocolError(
        'DRBDTS_DRBD_UNEXPECTED',
        `P_CSUM_RS_REQUEST with csums-alg '${this.checksumAlgorithm}'`,
        'DRBD 8.4 drbd_receiver.c receive_DataRequest',
      );
    return size;
  }

  private hasSameChecksum(request: PeerRequest): boolean {
    return sameDigest(digestOf(this.checksumAlgorithm, this.bytesOf(request)), request.digest!);
  }

  // ---------------------------------------------------------------------------------------------- verify for the peer

  private expectVerifyRequest(packet: BlockRequest): void {
    if (digestBytes(this.verifyAlgorithm) === 0 || this.verifying.has(packet.sector))
      throw new ProtocolError(
        'DRBDTS_DRBD_UNEXPECTED',
        `P_OV_REQUEST for sector ${packet.sector} with verify-alg '${this.verifyAlgorithm}'`,
        'DRBD 8.4 drbd_receiver.c receive_DataRequest',
      );
    // The peer begins where it likes and goes on to the end, a bit at a time.
    if (this.verifyLeftBits < 0)
      this.verifyLeftBits = (this.metadata?.bitmap.bits ?? 0) - Math.floor(packet.sector / SECTORS_PER_BIT);
  }

  /** The digest goes to the peer; the extent stays locked until the peer has compared, lest a write comes between. */
  private verifyReadDone(request: PeerRequest, errno: number): void {
    const { resource } = this;
    const { sector, payload, blockIdHigh, blockIdLow, lengthBytes } = request;
    const alive = request.link === resource.linkNumber && resource.link !== undefined;
    const algorithm = this.verifyAlgorithm;
    if (alive) {
      const digest = errno === 0 ? digestOf(algorithm, this.bytesOf(request)) : new Uint8Array(digestBytes(algorithm));
      resource.sendData(
        encodeRequest(resource.scratch, P_OV_REPLY, this.volume, sector, blockIdHigh, blockIdLow, lengthBytes, digest),
      );
      this.counters.pending++;
    }
    if (payload !== NO_PAYLOAD_OFFSET) resource.effects.memory.release(payload);
    request.payload = NO_PAYLOAD_OFFSET;
    this.counters.unacked--;
    // Verify may have ended while the disk was at it.
    if (this.verifying.get(sector) === request) request.isRead = true;
    else this.releasePeerRead(request);
    if (errno !== 0) this.diskFailed(`errno ${errno} at sector ${sector} + ${request.sectors}`);
    this.retryPeerReads();
  }

  /** P_OV_RESULT. The last ones may come after the P_STATE that ends the verify: it travels on the other socket. */
  receiveVerifyResult(ack: BlockAck): void {
    if (!isAfterWrap(this.peerSequence, ack.sequence)) this.peerSequence = ack.sequence;
    checkInsideDevice(ack.sector, ack.sizeBytes, this.sizeSectors);
    if (ack.blockIdLow === ID_OUT_OF_SYNC && ack.blockIdHigh === 0)
      this.markOutOfSync(ack.sector, ack.sizeBytes / SECTOR_BYTES);
    const request = this.verifying.get(ack.sector);
    if (!request?.isRead) return;
    this.counters.pending--;
    this.verifying.delete(ack.sector);
    this.releasePeerRead(request);
    if (--this.verifyLeftBits === 0) this.finishVerify();
  }

  private finishVerify(): void {
    this.resource.report(
      'info',
      `volume ${this.volume}: verify by the peer ended, ${this.outOfSyncBits} blocks differ`,
    );
    this.changeState({ connection: C.Connected }, 'hard');
  }

  /** The verify has ended or the link is gone: no more results are waited for. */
  private stopVerify(): void {
    this.verifyLeftBits = -1;
    for (const request of this.verifying.values()) {
      if (!request.isRead) continue;
      this.counters.pending--;
      this.releasePeerRead(request);
    }
    this.verifying.clear();
  }

  private refusePeerRead(request: PeerRequest): void {
    this.peerReadDone(request, Errno.EIO);
  }

  /** P_RS_DATA_REPLY at the target; `payload` is ours. */
  receiveResyncData(packet: DataPacket, payload: number): void {
    const { resource } = this;
    const sectors = packet.sizeBytes / SECTOR_BYTES;
    this.counters.receivedSectors += sectors;
    if (!this.resync.dataReceived(packet.sector, sectors) || !this.hasDisk) {
      // The disk failed, and the resync with it, while this was on its way.
      resource.effects.memory.release(payload);
      this.sendAck(P_NEG_ACK, packet.sector, ID_SYNCER_HIGH, ID_SYNCER_LOW, packet.sizeBytes);
      return;
    }
    const request = resource.peerRequests.allocate(packet.sector, sectors);
    request.kind = PeerRequestKind.ResyncWrite;
    request.epoch = this.resyncExtents.generation;
    request.payload = payload;
    request.blockIdHigh = ID_SYNCER_HIGH;
    request.blockIdLow = ID_SYNCER_LOW;
    request.link = resource.linkNumber;
    this.counters.unacked++;
    if (resource.mutations.clearBeforeResyncWrite) this.metadata?.bitmap.clearRange(request.sector, sectors);
    request.age = this.intervals.insert(request.sector, request.sector + sectors);
    if (this.isBlocked(request.sector, sectors, request.age)) this.peerOverlapping.push(request);
    else this.coverPeerWrite(request);
  }

  private resyncWriteDone(request: PeerRequest, errno: number): void {
    const { resource } = this;
    const { sector, sectors } = request;
    const alive = request.link === resource.linkNumber;
    if (errno === 0) this.noteWritten(sector, sectors);
    if (alive) {
      if (errno === 0) this.metadata?.bitmap.clearRange(sector, sectors);
      this.sendAck(
        errno === 0 ? P_RS_WRITE_ACK : P_NEG_ACK,
        sector,
        ID_SYNCER_HIGH,
        ID_SYNCER_LOW,
        request.lengthBytes,
      );
    }
    this.finishPeerWrite(request);
    resource.peerRequests.release(request);
    if (errno !== 0) this.diskFailed(`errno ${errno} at sector ${sector} + ${sectors}`);
    if (request.epoch === this.resyncExtents.generation) this.resync.blockDone(sector, sectors, errno === 0);
    resource.peerRequestDone();
  }

  // ------------------------------------------------------------------------------------------------------------ acks

  /** P_RECV_ACK .. P_NEG_RS_DREPLY, P_RS_CANCEL from the meta socket. */
  receiveAck(command: number, ack: BlockAck): void {
    const sectors = ack.sizeBytes / SECTOR_BYTES;
    if (!isAfterWrap(this.peerSequence, ack.sequence)) this.peerSequence = ack.sequence;
    if (command === P_NEG_RS_DREPLY || command === P_RS_CANCEL) {
      this.resync.refused(ack.sector, sectors, command === P_NEG_RS_DREPLY);
      return;
    }
    if (ack.blockIdHigh === ID_SYNCER_HIGH && ack.blockIdLow === ID_SYNCER_LOW) {
      checkInsideDevice(ack.sector, ack.sizeBytes, this.sizeSectors);
      this.counters.pending--;
      if (command === P_RS_WRITE_ACK) this.clearOutOfSync(ack.sector, sectors);
      else if (command === P_NEG_ACK) this.resync.failedAtSource(sectors);
      return;
    }
    const request = this.resource.requests.at(ack.blockIdLow);
    if (request?.incarnation !== ack.blockIdHigh || request.owner !== this || request.sector !== ack.sector) {
      if (command === P_NEG_ACK) {
        checkInsideDevice(ack.sector, ack.sizeBytes, this.sizeSectors);
        this.markOutOfSync(ack.sector, sectors);
        return;
      }
      throw new ProtocolError(
        'DRBDTS_DRBD_UNKNOWN_ACK',
        `acknowledgement for sector ${ack.sector}, which names no request`,
        'DRBD 8.4 drbd_receiver.c validate_req_change_req_state',
      );
    }
    if (command === P_NEG_DREPLY) {
      if (request.kind !== RequestKind.Read || !request.has(F.NetPending))
        throw new ProtocolError('DRBDTS_DRBD_UNKNOWN_ACK', 'P_NEG_DREPLY for no read', 'DRBD 8.4 got_NegDReply');
      // The peer's disk is not what we thought; a P_STATE will say so. Until then this read has no other source.
      request.flags &= ~F.NetPending;
      this.counters.pending--;
      if (this.state.disk === D.UpToDate && !request.has(F.LocalFailed)) this.startRead(request);
      else this.resource.settleLater(request);
      return;
    }
    if (!request.has(F.InEpoch))
      throw new ProtocolError('DRBDTS_DRBD_UNKNOWN_ACK', 'acknowledgement for a read', 'DRBD 8.4 got_BlockAck');
    switch (command) {
      case P_NEG_ACK:
        request.flags &= ~F.NetOk;
        this.netDone(request, false);
        break;
      case P_RS_WRITE_ACK:
        request.flags |= F.SetInSync;
        this.netDone(request, true);
        break;
      case P_WRITE_ACK:
      case P_RECV_ACK:
      case P_SUPERSEDED:
        this.netDone(request, true);
        break;
      default:
        throw new ProtocolError(
          'DRBDTS_DRBD_UNEXPECTED',
          'an acknowledgement of two Primaries',
          'DRBD 8.4 got_BlockAck',
        );
    }
  }

  /** P_OUT_OF_SYNC. */
  receiveOutOfSync(sector: number, sizeBytes: number): void {
    checkInsideDevice(sector, sizeBytes, this.sizeSectors);
    this.markOutOfSync(sector, sizeBytes / SECTOR_BYTES);
  }

  // ----------------------------------------------------------------------------------------------------- connecting

  /** Both sockets are up and the features agreed: sends what the peer must know first (P_PROTOCOL has been sent). */
  sendParameters(): void {
    this.packetSequence = 0;
    this.peerSequence = 0;
    this.peerUuids = undefined;
    this.peerSizes = undefined;
    this.counters.sentSectors = 0;
    this.counters.receivedSectors = 0;
    this.sendSyncParameters();
    this.sendSizes(0);
    if (this.state.disk >= D.Negotiating) this.sendUuids(0);
    this.sendState();
  }

  private ownSyncParameters(): SyncParameters {
    const { options, resource } = this;
    return {
      resyncRateKibPerSecond: options.resyncRateKibPerSecond,
      verifyAlgorithm: resource.net.verifyAlgorithm,
      checksumAlgorithm: resource.net.checksumAlgorithm,
      planAheadTenths: options.planAheadTenths,
      delayTargetTenths: options.delayTargetTenths,
      fillTargetSectors: options.fillTargetSectors,
      maxRateKibPerSecond: options.maxRateKibPerSecond,
    };
  }

  private sendSyncParameters(): void {
    const { resource } = this;
    resource.sendData(encodeSyncParam(resource.scratch, this.volume, this.ownSyncParameters()));
  }

  receiveSyncParameters(parameters: SyncParameters): void {
    const own = this.ownSyncParameters();
    if (this.state.connection === C.WFReportParams) {
      if (parameters.verifyAlgorithm !== own.verifyAlgorithm)
        this.resource.dropForGood(`incompatible verify-alg settings: '${parameters.verifyAlgorithm}'`);
      else if (parameters.checksumAlgorithm !== own.checksumAlgorithm)
        this.resource.dropForGood(`incompatible csums-alg settings: '${parameters.checksumAlgorithm}'`);
    }
    // Each side adopts the other's settings, as drbd.ko does: the source's operator decides how fast the target asks.
    if (this.state.disk >= D.Negotiating) this.syncParameters = parameters;
  }

  private sendSizes(ddsFlags: number): void {
    const { resource } = this;
    const metadata = this.state.disk >= D.Negotiating ? this.backing?.metadata : undefined;
    resource.sendData(
      encodeSizes(resource.scratch, resource.link!.context, this.volume, {
        diskSectors: metadata?.layout.capacitySectors ?? 0,
        userSectors: this.options.userSizeSectors,
        currentSectors: this.sizeSectors,
        maxRequestBytes: MAX_REQUEST_BYTES,
        queueOrderType: 0,
        ddsFlags,
        limits: {
          physicalBlockBytes: 512,
          logicalBlockBytes: 512,
          alignmentOffsetBytes: 0,
          minimumIoBytes: 512,
          optimalIoBytes: 0,
          discardEnabled: true,
          discardZeroes: true,
          writeSameCapable: false,
        },
      }),
    );
  }

  receiveSizes(sizes: Sizes): void {
    const connecting = this.state.connection === C.WFReportParams;
    this.peerSizes = sizes;
    const metadata = this.state.disk >= D.Negotiating ? this.backing?.metadata : undefined;
    if (!metadata) {
      const offered = peerExportedSize(sizes);
      if (offered === 0 || (sizes.diskSectors === 0 && this.sizeSectors > 0)) return;
      if (offered < this.sizeSectors && this.state.role === Role.Primary) {
        this.resource.dropForGood(`the peer's device is smaller (${offered} sectors) than what is in use`);
        return;
      }
      this.sizeSectors = offered;
      return;
    }
    const user = connecting ? agreeUserSize(this.options.userSizeSectors, sizes.userSectors) : sizes.userSectors;
    const { sectors, userTooLarge } = agreeSize({
      ownMax: metadata.layout.capacitySectors,
      peerMax: sizes.diskSectors,
      lastAgreed: metadata.superblock.laSizeSectors,
      user,
    });
    if (userTooLarge) this.resource.report('error', `volume ${this.volume}: configured size is larger than both disks`);
    if (
      sectors < this.sizeSectors &&
      this.state.disk >= D.Outdated &&
      (this.state.connection < C.Connected || this.state.peerDisk === D.Diskless)
    ) {
      this.resource.dropForGood(`the peer's disk size is too small (${sizes.diskSectors} sectors)`);
      return;
    }
    this.resize(sectors);
    if (this.state.connection > C.WFReportParams && sizes.currentSectors !== this.sizeSectors) this.sendSizes(0);
  }

  private resize(sectors: number): void {
    const metadata = this.backing!.metadata;
    if (sectors === metadata.superblock.laSizeSectors && sectors === this.sizeSectors) return;
    const grown = sectors > this.sizeSectors;
    this.sizeSectors = sectors;
    if (sectors === metadata.superblock.laSizeSectors) return;
    metadata.bitmap.resize(sectors, true);
    metadata.superblock.laSizeSectors = sectors;
    this.resource.report('info', `volume ${this.volume}: size is now ${sectors / 2} KiB`);
    this.holds++;
    // The new bits first, then the size: a crash in between finds a bitmap that is larger than needed.
    metadata.writeChangedPages(() => metadata.writeSuperblock(() => this.unhold()));
    if (grown) this.resource.sizeChanged(this.volume, this.sizeBytes);
  }

  sendUuids(extraFlags: number): void {
    const { resource } = this;
    const metadata = this.backing?.metadata;
    if (!metadata || !resource.link || this.state.disk < D.Negotiating) return;
    if (this.state.connection < C.WFConnection) return;
    const { current, bitmap, history0, history1 } = metadata.identifiers;
    this.sentBits = metadata.bitmap.weight;
    const isNegotiatingBad = this.state.disk === D.Negotiating && this.remembered!.disk === D.Inconsistent;
    const flags =
      extraFlags |
      (this.discardMyData ? UUID_FLAG_DISCARD_MY_DATA : 0) |
      (this.crashedPrimary ? UUID_FLAG_CRASHED_PRIMARY : 0) |
      (isNegotiatingBad ? UUID_FLAG_INCONSISTENT : 0);
    const uuids = { current, bitmap, history0, history1, bitsSet: this.sentBits, flags };
    resource.sendData(encodeUuids(resource.scratch, this.volume, uuids));
  }

  receiveUuids(uuids: Uuids): void {
    const { state } = this;
    this.peerUuids = uuids;
    if (
      state.role === Role.Primary &&
      state.disk < D.Inconsistent &&
      (state.connection < C.Connected || state.peerDisk === D.Diskless) &&
      !this.isExposed(uuids.current)
    ) {
      this.resource.dropForGood('can only connect to data with the generation identifier that is exposed here');
      return;
    }
    const metadata = this.metadata;
    if (metadata && state.connection === C.Connected) {
      const skips = (uuids.flags & UUID_FLAG_SKIP_INITIAL_SYNC) !== 0 && metadata.identifiers.current === 4n;
      if (skips) {
        metadata.bitmap.clearAll();
        metadata.identifiers.set(UI_CURRENT, uuids.current, false);
        metadata.identifiers.rawSet(UI_BITMAP, 0n, false);
        metadata.writeChangedPages(() => {
          metadata.writeSuperblock();
        });
        this.changeState({ disk: D.UpToDate, peerDisk: D.UpToDate }, 'hard');
      }
    }
    if (state.disk < D.Inconsistent && (state.role === Role.Primary || state.connection >= C.Connected))
      this.exposedUuid = uuids.current;
  }

  sendState(): void {
    const { resource } = this;
    if (!resource.link) return;
    resource.sendData(encodeState(resource.scratch, this.volume, packState(this.state)));
  }

  /** P_STATE. @see DRBD 8.4 drbd_receiver.c receive_state */
  receiveState(word: number): void {
    const peer = unpackState(word);
    const os = this.state;
    if (os.connection <= C.TearDown) return;
    let realDisk = realPeerDisk(peer.disk, this.peerUuids?.flags ?? 0);
    if (
      (os.peerDisk === D.Inconsistent || os.peerDisk === D.Consistent) &&
      realDisk === D.UpToDate &&
      os.connection > C.Connected &&
      os.disk === D.UpToDate
    ) {
      // The peer is still preparing the resync: no flapping.
      if (peer.connection > C.Connected && peer.connection < C.SyncSource) realDisk = D.Inconsistent;
      else if (os.connection >= C.SyncSource && peer.connection === C.Connected) {
        this.resync.peerFinished();
        return;
      }
    }
    if (
      os.connection === C.VerifyT &&
      os.disk === D.UpToDate &&
      peer.connection === C.Connected &&
      realDisk === D.UpToDate
    ) {
      this.finishVerify();
      return;
    }
    if (
      os.peerDisk === D.UpToDate &&
      realDisk === D.Inconsistent &&
      os.connection === C.Connected &&
      peer.connection > C.SyncSource
    )
      realDisk = D.UpToDate;
    let connection: ConnectionState = os.connection === C.WFReportParams ? C.Connected : os.connection;
    if (peer.connection === C.Ahead) connection = C.Behind;
    const negotiates =
      os.connection < C.Connected ||
      (os.connection === C.Connected && (peer.disk === D.Negotiating || os.disk === D.Negotiating)) ||
      this.considerResync ||
      (os.connection === C.Connected && peer.connection >= C.StartingSyncS && peer.connection <= C.WFBitMapT);
    let disk: DiskState = os.disk;
    let full = false;
    if (this.peerUuids && peer.disk >= D.Negotiating && os.disk >= D.Negotiating && negotiates) {
      const decided = this.negotiate(peer, realDisk);
      if (decided === undefined) return;
      connection = decided.connection;
      full = decided.full;
      if (decided.refusedOwn) disk = D.Diskless;
      if (decided.refusedPeer) realDisk = D.Diskless;
    }
    this.considerResync = false;
    if ((connection === C.Connected || connection === C.WFBitMapS) && disk === D.Negotiating)
      disk = this.remembered!.disk;
    const fields: Partial<DeviceState> = {
      connection,
      disk,
      peerRole: peer.role,
      peerDisk: realDisk,
      pausedByPeer: peer.pausedByDependency || peer.pausedByUser,
    };
    if (full) this.backing!.metadata.setAllBits();
    const result = this.changeState(fields, os.connection < C.Connected ? 'soft' : 'hard');
    if (result < StateResult.Success) {
      this.resource.dropForGood(`the peer's state is not acceptable here: ${describeState({ ...os, ...fields })}`);
      return;
    }
    if (
      os.connection > C.WFReportParams &&
      this.state.connection > C.Connected &&
      peer.connection <= C.Connected &&
      peer.disk !== D.Negotiating
    ) {
      // We want a resync, the peer has not decided yet.
      this.sendUuids(0);
      this.sendState();
    }
    this.discardMyData = false;
    this.resource.deviceNegotiated();
  }

  private negotiate(
    peer: DeviceState,
    peerDisk: DiskState,
  ): { connection: ConnectionState; full: boolean; refusedOwn?: boolean; refusedPeer?: boolean } | undefined {
    const { resource, state } = this;
    const metadata = this.backing!.metadata;
    const uuids = this.peerUuids!;
    const facts = {
      self: metadata.identifiers,
      peer: uuids,
      role: state.role,
      peerRole: peer.role,
      disk: state.disk === D.Negotiating ? this.remembered!.disk : state.disk,
      currentDisk: state.disk,
      peerDisk,
      peerFlags: uuids.flags,
      selfCrashed: this.crashedPrimary,
      selfChanges: this.sentBits,
      peerChanges: uuids.bitsSet,
      discardMyData: this.discardMyData,
      dryRun: resource.dryRun,
      resolveConflicts: resource.link!.resolveConflicts,
      hasWriteSame: resource.link!.context.hasWriteSame,
      afterSplitBrain0Primaries: resource.net.afterSplitBrain0Primaries,
      afterSplitBrain1Primary: resource.net.afterSplitBrain1Primary,
      afterSplitBrain2Primaries: resource.net.afterSplitBrain2Primaries,
      alwaysAfterSplitBrain: resource.net.alwaysAfterSplitBrain,
      resyncRoleConflict: resource.net.resyncRoleConflict,
    };
    let decision = decideSync(facts);
    if (decision.mustDemote && this.changeState({ role: Role.Secondary }, 'soft') < StateResult.Success)
      decision = decideSync({ ...facts, demotionFailed: true });
    for (const helper of decision.helpers) resource.callHelper(helper, this.volume);
    resource.report('info', `volume ${this.volume}: ${decision.reason}`);
    const { fixSelf, fixPeer } = decision.comparison;
    if (fixSelf) {
      metadata.identifiers.rawSet(UI_BITMAP, fixSelf.bitmap, false);
      metadata.identifiers.rawSet(UI_HISTORY_START, fixSelf.history0, false);
      metadata.identifiers.rawSet(UI_HISTORY_END, fixSelf.history1, false);
      metadata.writeSuperblock();
    }
    if (fixPeer) this.peerUuids = { ...uuids, ...fixPeer };
    switch (decision.kind) {
      case 'none':
        return { connection: C.Connected, full: false };
      case 'source':
        return { connection: C.WFBitMapS, full: decision.full };
      case 'target':
        return { connection: C.WFBitMapT, full: decision.full };
    }
    if (decision.kind === 'splitBrain')
      resource.effects.event({ kind: 'splitBrain', volume: this.volume, message: decision.reason });
    if (state.disk === D.Negotiating) return { connection: C.Connected, full: false, refusedOwn: true };
    if (peer.disk === D.Negotiating) return { connection: C.Connected, full: false, refusedPeer: true };
    resource.dropForGood(decision.reason);
    return undefined;
  }

  // ----------------------------------------------------------------------------------------- cluster-wide changes

  /** P_STATE_CHG_REQ. */
  receiveStateChange(mask: number, value: number): void {
    const { resource } = this;
    if (this.pendingChange && resource.link!.resolveConflicts) {
      this.replyStateChange(StateResult.ConcurrentStateChange);
      return;
    }
    const wanted = convertPerspective(mask, value);
    this.replyStateChange(this.applyPeerChange(wanted, 'soft'));
  }

  private applyPeerChange(wanted: StateChange, kind: ChangeKind): StateResult {
    const old = this.state;
    const judged = judgeChange(old, wanted, this.context(), kind);
    if (judged.result !== StateResult.Success) return judged.result;
    this.enter(judged.state);
    return StateResult.Success;
  }

  private replyStateChange(result: StateResult): void {
    const { resource } = this;
    resource.sendMeta(encodeStateChangeReply(resource.scratch, P_STATE_CHG_REPLY, this.volume, result));
  }

  receiveStateChangeReply(result: number): void {
    const pending = this.pendingChange;
    if (!pending)
      throw new ProtocolError('DRBDTS_DRBD_UNEXPECTED', 'P_STATE_CHG_REPLY to no request', 'DRBD 8.4 got_RqSReply');
    this.pendingChange = undefined;
    if (result < StateResult.Success) {
      this.resource.report('info', `volume ${this.volume}: state change was refused by peer: ${result}`);
      pending.done(
        result === StateResult.InTransientState || result === StateResult.ConcurrentStateChange
          ? StateResult.InTransientState
          : StateResult.CwFailedByPeer,
      );
      return;
    }
    pending.done(this.applyPeerChange(pending.wanted, 'soft'));
  }

  /**
   * Asks for a change of state, of the peer too where that is needed.
   * @param done called once, possibly at once
   */
  requestChange(fields: Partial<DeviceState>, done: (code: StateResult) => void): void {
    const { resource } = this;
    const wanted = change(fields);
    const judged = judgeChange(this.state, wanted, this.context(), 'soft');
    if (judged.result !== StateResult.Success) {
      done(judged.result);
      return;
    }
    if (!isClusterWide(this.state, judged.state)) {
      this.enter(judged.state);
      done(StateResult.Success);
      return;
    }
    if (this.pendingChange || !resource.link) {
      done(StateResult.InTransientState);
      return;
    }
    this.pendingChange = { wanted, done };
    resource.sendData(encodeStateChange(resource.scratch, P_STATE_CHG_REQ, this.volume, wanted.mask, wanted.value));
  }

  // ------------------------------------------------------------------------------------------------- state and effects

  private context(): StateContext {
    const { resource } = this;
    return {
      hasNetConfig: resource.hasNetConfig,
      twoPrimaries: resource.net.twoPrimaries,
      fencing: this.hasDisk ? this.options.fencing : 'dont-care',
      suspendOnNoData: this.options.suspendOnNoData,
      hasVerifyAlgorithm: resource.net.verifyAlgorithm !== '',
      isOpen: this.openCount > 0,
      otherVolumePeerPrimary: resource.isPeerPrimaryElsewhere(this),
      stateSent: resource.stateSent,
      remembered: this.isDataCurrent ? this.remembered : undefined,
    };
  }

  /** Whether the attached disk holds the data that applications here, or the peer, have seen last. */
  private get isDataCurrent(): boolean {
    const current = this.backing?.metadata.identifiers.current;
    return current !== undefined && this.isExposed(current);
  }

  /** Whether this names the data that applications have seen. Bit 0 only says who was Primary. */
  private isExposed(uuid: bigint): boolean {
    return (
      (uuid | 1n) === (this.exposedUuid | 1n) || (this.unsureUuid !== 0n && (uuid | 1n) === (this.unsureUuid | 1n))
    );
  }

  /** Applies a change that is not, or no longer, the peer's to consent to. */
  changeState(fields: Partial<DeviceState>, kind: ChangeKind): StateResult {
    const judged = judgeChange(this.state, change(fields), this.context(), kind);
    if (judged.result === StateResult.Success) this.enter(judged.state);
    return judged.result;
  }

  /** What a change would lead to, without making it. */
  wouldBe(fields: Partial<DeviceState>): DeviceState {
    return sanitize(applyChange(this.state, change(fields)), this.state, this.context());
  }

  private enter(ns: DeviceState): void {
    const os = this.state;
    this.state = ns;
    this.resource.effects.event({
      kind: 'state',
      volume: this.volume,
      from: describeState(os),
      to: describeChange(os, ns),
    });
    this.afterStateChange(os, ns);
    this.pump();
  }

  /** Everything a change of state entails. @see DRBD 8.4 drbd_state.c after_state_ch */
  private afterStateChange(os: DeviceState, ns: DeviceState): void {
    const { resource } = this;
    const metadata = this.backing?.metadata;
    const connected = ns.connection >= C.Connected;
    const wasWhole = os.disk === D.UpToDate && os.peerDisk === D.UpToDate;
    if (!wasWhole && ns.disk === D.UpToDate && ns.peerDisk === D.UpToDate) {
      this.crashedPrimary = false;
      if (this.peerUuids)
        this.peerUuids = { ...this.peerUuids, flags: this.peerUuids.flags & ~UUID_FLAG_CRASHED_PRIMARY };
    }
    if (
      os.disk === D.Inconsistent &&
      os.peerDisk === D.Inconsistent &&
      os.peerRole === Role.Secondary &&
      ns.peerRole === Role.Primary
    )
      this.considerResync = true;

    if (metadata && os.disk < D.Consistent && ns.disk >= D.Consistent) this.exposedUuid = metadata.identifiers.current;
    // From now on applications see the peer's data; its identifiers may have arrived before our disk was gone.
    if (ns.disk < D.Inconsistent && os.disk !== ns.disk && connected && this.peerUuids)
      this.exposedUuid = this.peerUuids.current;
    // The handshake did not want the disk, or the link broke before it was decided.
    if (os.disk === D.Negotiating && ns.disk === D.Diskless) this.beginDetach(() => {});
    if (os.disk >= D.Inconsistent && ns.disk < D.Inconsistent && this.writeOrder > this.flushedOrder)
      this.lostPeerWrites = true;

    if (metadata && ns.disk >= D.Inconsistent) this.updateFlags(os, ns, metadata);

    // Bitmap before identifiers: what the new generation means must be known before it exists.
    const lostPeerData =
      ((os.peerDisk === D.Inconsistent || os.peerDisk === D.Consistent || os.peerDisk === D.UpToDate) &&
        (ns.peerDisk < D.Inconsistent || ns.peerDisk === D.DUnknown || ns.peerDisk === D.Outdated)) ||
      (os.peerDisk === D.DUnknown &&
        (ns.peerDisk < D.Inconsistent || ns.peerDisk === D.Outdated) &&
        os.connection < C.Connected &&
        connected === false);
    const somePrimary = ns.role === Role.Primary || ns.peerRole === Role.Primary;
    if (metadata && lostPeerData && somePrimary && metadata.identifiers.bitmap === 0n && ns.disk >= D.UpToDate)
      this.newCurrentUuid(() => this.sendUuids(0));
    else if (
      metadata &&
      ns.peerDisk < D.Inconsistent &&
      os.peerRole !== Role.Primary &&
      ns.peerRole === Role.Primary &&
      metadata.identifiers.bitmap === 0n &&
      ns.disk >= D.UpToDate
    )
      this.newCurrentUuid(() => this.sendUuids(0));

    if (
      os.peerDisk === D.Diskless &&
      ns.peerDisk > D.Diskless &&
      ns.peerDisk !== D.DUnknown &&
      connected &&
      os.connection >= C.Connected
    ) {
      this.sendUuids(0);
      this.sendState();
    }
    if (os.connection !== C.WFBitMapS && ns.connection === C.WFBitMapS) this.exchange.startSending();
    if (os.connection !== C.WFBitMapT && ns.connection === C.WFBitMapT) this.exchange.startReceiving();
    if (metadata && os.peerRole === Role.Primary && ns.peerRole !== Role.Primary && ns.peerDisk < D.Inconsistent)
      metadata.writeChangedPages();
    if (metadata && os.role === Role.Primary && ns.role === Role.Secondary && ns.connection <= C.Connected)
      metadata.writeChangedPages();
    if (os.disk === D.Attaching && ns.disk === D.Negotiating && connected) {
      this.sendSizes(0);
      this.sendUuids(0);
      this.sendState();
    }
    const pausedChanged = os.pausedByDependency !== ns.pausedByDependency || os.pausedByUser !== ns.pausedByUser;
    if (connected && os.connection >= C.Connected && pausedChanged) this.sendState();
    if (os.connection === C.WFReportParams && connected) this.sendState();
    if (os.connection !== C.Ahead && ns.connection === C.Ahead) this.sendState();
    if (os.connection !== ns.connection && (ns.connection === C.StartingSyncS || ns.connection === C.StartingSyncT))
      this.startFullSync(ns.connection === C.StartingSyncS);
    if (os.disk > D.Failed && ns.disk === D.Failed && connected) this.sendState();
    if (os.disk === D.Failed && ns.disk === D.Diskless && connected) this.sendState();
    if (os.disk === D.UpToDate && ns.disk === D.Inconsistent && os.connection === C.Connected && connected)
      this.sendState();
    if (os.disk < D.UpToDate && os.connection >= C.SyncSource && ns.connection === C.Connected) this.sendState();
    if (os.connection > C.Connected && ns.connection <= C.Connected) {
      this.resync.stopped();
      this.stopVerify();
      metadata?.writeChangedPages();
    }
    const isPausedTarget = (state: DeviceState) => state.connection === C.PausedSyncT;
    if (isPausedTarget(os) !== isPausedTarget(ns)) this.resync.paused(isPausedTarget(ns), resource.nowMs);
    if (os.connection >= C.Connected && ns.connection < C.Connected) this.linkLost();
    resource.stateEntered(this, os, ns);
  }

  private updateFlags(os: DeviceState, ns: DeviceState, metadata: MetadataStore): void {
    const { superblock } = metadata;
    const managed =
      MDF_CONSISTENT |
      MDF_PRIMARY_IND |
      MDF_CONNECTED_IND |
      MDF_WAS_UP_TO_DATE |
      MDF_PEER_OUT_DATED |
      MDF_CRASHED_PRIMARY;
    let flags = superblock.flags & ~managed;
    if (this.crashedPrimary) flags |= MDF_CRASHED_PRIMARY;
    if (ns.role === Role.Primary || (ns.peerDisk < D.Inconsistent && ns.peerRole === Role.Primary))
      flags |= MDF_PRIMARY_IND;
    if (ns.connection > C.WFReportParams) flags |= MDF_CONNECTED_IND;
    if (ns.disk > D.Inconsistent) flags |= MDF_CONSISTENT;
    if (ns.disk > D.Outdated) flags |= MDF_WAS_UP_TO_DATE;
    if (ns.peerDisk <= D.Outdated && ns.peerDisk >= D.Inconsistent) flags |= MDF_PEER_OUT_DATED;
    const changed = flags !== superblock.flags;
    const becomesPrimary = (flags & MDF_PRIMARY_IND) !== 0 && (superblock.flags & MDF_PRIMARY_IND) === 0;
    const isNew = os.disk < D.Inconsistent;
    superblock.flags = flags;
    if (!changed && !isNew) return;
    // Nothing may be written before the superblock says that this node must replay its activity log.
    if (becomesPrimary) this.holds++;
    metadata.writeSuperblock(() => {
      if (becomesPrimary) this.unhold();
    });
  }

  private unhold(): void {
    this.holds--;
    if (this.holds > 0) return;
    this.retryCold();
    this.pump();
  }

  /** A new data generation; nothing written in it is acknowledged before it is durable. */
  newCurrentUuid(then: () => void): void {
    const metadata = this.backing?.metadata;
    if (!metadata || this.resource.mutations.keepGeneration) {
      then();
      return;
    }
    const { exposedUuid } = this;
    const { mutations } = this.resource;
    const lost = metadata.identifiers.newCurrent(this.resource.effects.random64(), this.state.role === Role.Primary);
    const { current } = metadata.identifiers;
    this.exposedUuid = current;
    if (lost !== 0n) this.resource.report('warn', `volume ${this.volume}: bitmap generation overwritten`);
    if (!mutations.completeBeforeRotation) this.gates++;
    metadata.writeSuperblock((ok) => {
      if (!mutations.completeBeforeRotation) this.gates--;
      if (!ok && this.exposedUuid === current) {
        // Nothing of the new generation was answered: the disk of the old one is as good, and maybe all there is.
        this.exposedUuid = exposedUuid;
        this.unsureUuid = current;
      }
      if (this.gates === 0)
        this.gated.removeIf((request) => {
          request.flags &= ~F.Gated;
          this.settle(request);
          return true;
        });
      then();
    });
  }

  /** StartingSync*: everything is to be copied. */
  private startFullSync(asSource: boolean): void {
    const metadata = this.backing!.metadata;
    metadata.setAllBits((ok) => {
      if (!ok) return;
      if (asSource && this.state.connection === C.StartingSyncS) this.becomeSource();
      else if (!asSource && this.state.connection === C.StartingSyncT)
        this.changeState({ connection: C.WFSyncUUID }, 'hard');
    });
  }

  /** Bitmaps are equal on both sides: names the generation to be copied and starts. */
  becomeSource(): void {
    const metadata = this.backing?.metadata;
    if (!metadata) return;
    const link = this.resource.linkNumber;
    const { identifiers } = metadata;
    metadata.writeChangedPages((written) => {
      if (!written || link !== this.resource.linkNumber || this.state.connection < C.Connected) return;
      const uuid = identifiers.resyncUuid(this.resource.effects.random64());
      identifiers.set(UI_BITMAP, uuid, false);
      metadata.writeSuperblock((ok) => {
        if (!ok || link !== this.resource.linkNumber || this.state.connection < C.Connected) return;
        this.resource.sendBarrierBefore(this.resource.log.currentEpoch);
        this.resource.sendData(encodeSyncUuid(this.resource.scratch, this.volume, uuid));
        this.resource.callHelper('before-resync-source', this.volume);
        this.resync.begin(this.resource.nowMs);
        this.changeState({ connection: C.SyncSource }, 'hard');
      });
    });
  }

  /** P_SYNC_UUID at the target. */
  receiveSyncUuid(uuid: bigint): void {
    const metadata = this.backing?.metadata;
    if (this.state.connection !== C.WFSyncUUID && this.state.connection !== C.Behind) {
      if (this.state.disk < D.Inconsistent || this.state.connection < C.Connected) return;
      throw new ProtocolError(
        'DRBDTS_DRBD_UNEXPECTED',
        `P_SYNC_UUID in ${describeState(this.state)}`,
        'DRBD 8.4 drbd_receiver.c receive_sync_uuid',
      );
    }
    assert(metadata !== undefined, 'a resync target has a disk');
    const link = this.resource.linkNumber;
    // The merged bitmap first: with the new identifiers and an old bitmap a crash would lose what must be copied.
    metadata.writeChangedPages((written) => {
      if (!written || link !== this.resource.linkNumber || this.state.connection < C.Connected) return;
      metadata.identifiers.rawSet(UI_CURRENT, uuid, this.state.role === Role.Primary);
      metadata.identifiers.rawSet(UI_BITMAP, 0n, false);
      this.exposedUuid = metadata.identifiers.current;
      this.resource.callHelper('before-resync-target', this.volume);
      this.resync.begin(this.resource.nowMs);
      this.changeState({ connection: C.SyncTarget }, 'hard');
      metadata.writeSuperblock();
    });
  }

  /** Resync is complete on this side. @param failed blocks that could not be copied */
  finishResync(failed: number): void {
    const metadata = this.backing?.metadata;
    const { connection } = this.state;
    if (!metadata || connection <= C.Connected) return;
    const asTarget = connection === C.SyncTarget || connection === C.PausedSyncT;
    const { identifiers } = metadata;
    if (failed > 0) {
      this.resource.report('warn', `volume ${this.volume}: resync done, ${failed} blocks failed`);
      this.changeState(
        {
          connection: C.Connected,
          disk: asTarget ? D.Inconsistent : D.UpToDate,
          peerDisk: asTarget ? D.UpToDate : D.Inconsistent,
        },
        'hard',
      );
      return;
    }
    if (asTarget) {
      const peer = this.peerUuids;
      if (peer) {
        const own = identifiers.current;
        identifiers.rawSet(UI_BITMAP, peer.bitmap, false);
        identifiers.rawSet(UI_HISTORY_START, peer.history0, false);
        identifiers.rawSet(UI_HISTORY_END, peer.history1, false);
        identifiers.set(UI_BITMAP, own, false);
        identifiers.rawSet(UI_CURRENT, peer.current, this.state.role === Role.Primary);
        this.exposedUuid = identifiers.current;
      }
      identifiers.clearBitmap();
    } else {
      identifiers.clearBitmap();
    }
    if (this.peerUuids) {
      const { current, bitmap, history0, history1 } = identifiers;
      this.peerUuids = { ...this.peerUuids, current, bitmap, history0, history1 };
    }
    const whole = { connection: C.Connected, disk: D.UpToDate, peerDisk: D.UpToDate } as const;
    if (!asTarget) {
      // State and identifiers at once: with the bitmap's identifier gone, only the loss of an UpToDate peer starts a
      // new
      // generation.
      this.changeState(whole, 'hard');
      metadata.writeSuperblock();
      return;
    }
    const link = this.resource.linkNumber;
    metadata.superblock.flags |= MDF_CONSISTENT | MDF_WAS_UP_TO_DATE;
    metadata.writeSuperblock((ok) => {
      // Durable before it is announced: a target that says it is UpToDate must still be so after a crash.
      if (!ok || link !== this.resource.linkNumber || this.state.connection <= C.Connected) return;
      this.changeState(whole, 'hard');
      this.resource.callHelper('after-resync-target', this.volume);
    });
  }

  /** The connection is gone; the transfer log has been cleared by the resource. */
  private linkLost(): void {
    this.peerUuids = undefined;
    this.peerSizes = undefined;
    this.considerResync = false;
    this.exchange.reset();
    this.resync.linkLost();
    this.resyncExtents.clear();
    this.peerReads.removeIf((request) => {
      this.counters.unacked--;
      this.resource.peerRequests.release(request);
      return true;
    });
    const pending = this.pendingChange;
    this.pendingChange = undefined;
    pending?.done(StateResult.InTransientState);
    this.lastReplicated = false;
    const metadata = this.backing?.metadata;
    if (metadata && this.hasDisk) metadata.writeChangedPages(() => metadata.writeSuperblock());
    this.retryCold();
  }

  /** After the transfer log was cleared: what counted answers on the lost link starts from nothing. */
  resetPending(): void {
    this.counters.pending = 0;
    this.lostPeerWrites = false;
  }

  // -------------------------------------------------------------------------------------------------- attach, detach

  /** Attaches a disk. @see DRBD 8.4 drbd_nl.c drbd_adm_attach */
  attach(doors: DiskDoors, done: AdminDone): void {
    const { resource } = this;
    if (this.state.disk !== D.Diskless || this.backing) {
      done(StateResult.UnknownError, 'a disk is attached already');
      return;
    }
    const attaching = this.changeState({ disk: D.Attaching }, 'soft');
    if (attaching < StateResult.Success) {
      done(attaching, 'the disk cannot be attached now');
      return;
    }
    let metadata: MetadataStore;
    const backing: Backing = {
      doors,
      inFlight: 0,
      get metadata() {
        return metadata;
      },
    };
    const failed = (reason: string) => {
      this.backing = undefined;
      metadata?.close();
      doors.data.close();
      if (doors.meta !== doors.data) doors.meta.close();
      this.changeState({ disk: D.Diskless }, 'hard');
      done(StateResult.UnknownError, reason);
    };
    try {
      metadata = new MetadataStore(
        doors.meta,
        doors.data.sizeBytes,
        resource.effects.memory,
        {
          kind: doors.metaKind,
          ...(doors.metaIndex === undefined ? {} : { index: doors.metaIndex }),
          alExtents: this.options.alExtents,
        },
        resource.mutations,
        {
          failed: (message) => this.metadataFailed(metadata, message),
          committed: () => this.activityLogCommitted(metadata),
          needsFlush: (evicted, cleared) => this.needsFlushBefore(evicted, cleared),
          flush: (then) => this.flushBacking((errno) => then(errno === 0)),
        },
      );
    } catch (error) {
      metadata = undefined as never;
      failed((error as MetadataError).message);
      return;
    }
    const metaDone = (cookie: number, errno: number) => {
      metadata.done(cookie, errno);
      this.maybeFinishDetach();
    };
    const dataDone = (cookie: number, errno: number) => this.dataDone(backing, cookie, errno);
    if (doors.meta === doors.data)
      doors.data.setDone((cookie, errno) =>
        (cookie & METADATA_COOKIE) !== 0 ? metaDone(cookie, errno) : dataDone(cookie, errno),
      );
    else {
      doors.data.setDone(dataDone);
      doors.meta.setDone(metaDone);
    }
    this.backing = backing;
    this.writeOrder = 0;
    this.flushedOrder = 0;
    metadata.attach((result) => {
      if (result instanceof Error) {
        failed(result.message);
        return;
      }
      const refused = this.attachRefused(metadata);
      if (refused) failed(refused);
      else this.attached(metadata, done, failed);
    });
  }

  private attachRefused(metadata: MetadataStore): string | undefined {
    const { superblock, layout, identifiers } = metadata;
    const { options, state } = this;
    if (layout.capacitySectors < options.userSizeSectors)
      return `the disk has ${layout.capacitySectors} usable sectors, configured are ${options.userSizeSectors}`;
    if (layout.capacitySectors < this.sizeSectors)
      return `the disk has ${layout.capacitySectors} usable sectors, in use are ${this.sizeSectors}`;
    if (
      (superblock.flags & MDF_CONSISTENT) !== 0 &&
      layout.capacitySectors < superblock.laSizeSectors &&
      options.userSizeSectors === 0
    )
      return `the disk shrank from ${superblock.laSizeSectors} to ${layout.capacitySectors} sectors; refusing`;
    if (
      state.peerDisk !== D.UpToDate &&
      this.exposedUuid !== 0n &&
      (state.role === Role.Primary || state.peerRole === Role.Primary) &&
      !this.isExposed(identifiers.current)
    )
      return 'can only attach to data with the generation identifier that is exposed now';
    return undefined;
  }

  private attached(metadata: MetadataStore, done: AdminDone, failed: (reason: string) => void): void {
    const { superblock } = metadata;
    const { state } = this;
    const wasPrimary = (superblock.flags & MDF_PRIMARY_IND) !== 0;
    this.crashedPrimary = (superblock.flags & MDF_CRASHED_PRIMARY) !== 0 || wasPrimary;
    const { sectors } = agreeSize({
      ownMax: metadata.layout.capacitySectors,
      peerMax: this.peerSizes?.diskSectors ?? 0,
      lastAgreed: superblock.laSizeSectors,
      user: this.options.userSizeSectors,
    });
    const needsSetAll =
      superblock.laSizeSectors === 0 ||
      (superblock.flags & MDF_FULL_SYNC) !== 0 ||
      (wasPrimary && (superblock.flags & MDF_AL_DISABLED) !== 0);
    const old = superblock.laSizeSectors;
    if (sectors !== old) metadata.bitmap.resize(sectors, true);
    superblock.flags &= ~MDF_AL_DISABLED;
    this.sizeSectors = sectors;
    let disk: DiskState =
      (superblock.flags & MDF_CONSISTENT) === 0
        ? D.Inconsistent
        : (superblock.flags & MDF_WAS_UP_TO_DATE) !== 0
          ? D.Consistent
          : D.Outdated;
    const peerDisk = (superblock.flags & MDF_PEER_OUT_DATED) !== 0 ? D.Outdated : D.DUnknown;
    if (disk === D.Consistent && (peerDisk === D.Outdated || this.options.fencing === 'dont-care')) disk = D.UpToDate;
    const finish = (ok: boolean) => {
      if (!ok) {
        done(StateResult.UnknownError, 'writing the metadata failed');
        return;
      }
      // Again: the peer with the good data may have gone while the metadata was being written.
      const refused = this.attachRefused(metadata);
      if (refused) {
        failed(refused);
        return;
      }
      metadata.identifiers.setPrimaryBit(this.state.role === Role.Primary);
      this.remembered = { disk, peerDisk };
      const result =
        this.state.connection >= C.Connected
          ? this.changeState({ disk: D.Negotiating }, 'hard')
          : this.changeState({ disk, ...(state.connection < C.Connected ? { peerDisk } : {}) }, 'hard');
      if (this.state.connection >= C.Connected) this.peerUuids = undefined;
      this.resource.sizeChanged(this.volume, this.sizeBytes);
      metadata.writeSuperblock((stored) => {
        if (result >= StateResult.Success && stored) done(StateResult.Success, '');
        else done(StateResult.UnknownError, 'the state does not allow this disk');
      });
    };
    superblock.laSizeSectors = sectors;
    if (needsSetAll) metadata.setAllBits(finish);
    else metadata.writeChangedPages((ok) => (ok ? metadata.writeSuperblock(finish) : finish(false)));
  }

  /** Detaches the disk in order: flushed, bitmap written, then gone. */
  detach(force: boolean, done: AdminDone): void {
    if (this.state.disk === D.Diskless) {
      done(StateResult.NothingToDo, '');
      return;
    }
    if (force) {
      this.loseDisk();
      this.beginDetach(() => done(StateResult.Success, ''));
      return;
    }
    this.resource.retryTransient(
      (attempt) => {
        this.holds++;
        this.resource.drain(this, () => {
          this.flushLocally(() => {
            const finish = (code: StateResult) => {
              this.unhold();
              attempt(code);
            };
            this.requestChange({ disk: D.Failed }, (code) => {
              if (code < StateResult.Success || code === StateResult.NothingToDo) {
                finish(code);
                return;
              }
              const metadata = this.backing?.metadata;
              if (!metadata) {
                finish(StateResult.Success);
                return;
              }
              metadata.writeChangedPages(() =>
                metadata.writeSuperblock(() => this.beginDetach(() => finish(StateResult.Success))),
              );
            });
          });
        });
      },
      (code) => done(code, ''),
    );
  }

  /** What still happens on the disk's behalf once a turn: activity log transactions, reads that lacked memory. */
  turnEnd(): void {
    if (this.extentsFreed) {
      this.extentsFreed = false;
      this.retryCold();
    }
    this.metadata?.commitActivityLog();
    this.exchange.pump();
    if (this.peerReads.length > 0) this.retryPeerReads();
    this.resync.pump();
    this.maybeFinishDetach();
    this.pump();
  }

  /** Whether application requests are under way, those that wait for admission aside. */
  get hasApplicationRequests(): boolean {
    return this.counters.applicationRequests > this.waiting.length;
  }

  setPrimaryBit(): void {
    this.backing?.metadata.identifiers.setPrimaryBit(this.state.role === Role.Primary);
  }

  hold(): void {
    this.holds++;
  }

  release(): void {
    this.unhold();
  }
}

/** Whether 32-bit sequence number `one` is younger than `other`, with wrap-around. */
function isAfterWrap(one: number, other: number): boolean {
  return ((one - other) | 0) > 0;
}
