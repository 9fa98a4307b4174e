import { assert } from '../base/assert.js';
import { ProtocolError } from '../base/errors.js';
import type { BlockFront } from '../io/block-target.js';
import type { Connection, ConnectionHandler } from '../io/ring.js';
import { type AdminDone, Device, type DiskDoors, type VolumeOptions } from './device.js';
import { type Effects, type Mutations, NO_PAYLOAD_OFFSET } from './effects.js';
import { incompatibleProtocol } from './handshake.js';
import { PeerRequestKind, PeerRequestTable } from './peer-request.js';
import { ReceivingEpochs } from './receiving-epochs.js';
import { type Request, RequestFlag, RequestKind, RequestQueue, RequestTable } from './request.js';
import {
  CONNECTION_STATE_NAMES,
  ConnectionState,
  convertPerspective,
  type DeviceState,
  DiskState,
  Role,
  STATE_RESULT_TEXT,
  StateResult,
} from './state.js';
import { TransferLog } from './transfer-log.js';
import {
  BarrierAck,
  BlockAck,
  BlockRange,
  BlockRequest,
  checkHeader,
  checkInsideDevice,
  DataPacket,
  decodeBarrier,
  decodeBarrierAck,
  decodeBlockAck,
  decodeBlockRange,
  decodeData,
  decodeProtocol,
  decodeRequest,
  decodeSizes,
  decodeState,
  decodeStateChange,
  decodeStateChangeReply,
  decodeSyncParam,
  decodeSyncUuid,
  decodeTrim,
  decodeUuids,
  encodeBarrier,
  encodeBarrierAck,
  encodeHeader,
  encodeProtocol,
  encodeStateChange,
  encodeStateChangeReply,
  PacketScratch,
  type ProtocolParameters,
  readLength,
  readVolume,
} from './wire/codec.js';
import {
  dataFrameRule,
  HEADER100_BYTES,
  MAX_DISCARD_BYTES,
  metaFrameRule,
  P_BARRIER,
  P_BARRIER_ACK,
  P_BITMAP,
  P_COMPRESSED_BITMAP,
  P_CONN_ST_CHG_REPLY,
  P_CONN_ST_CHG_REQ,
  P_CSUM_RS_REQUEST,
  P_DATA,
  P_DATA_REPLY,
  P_DATA_REQUEST,
  P_DELAY_PROBE,
  P_NEG_ACK,
  P_NEG_DREPLY,
  P_NEG_RS_DREPLY,
  P_OUT_OF_SYNC,
  P_OV_REQUEST,
  P_OV_RESULT,
  P_PING,
  P_PING_ACK,
  P_PROTOCOL,
  P_RECV_ACK,
  P_RETRY_WRITE,
  P_RS_CANCEL,
  P_RS_DATA_REPLY,
  P_RS_DATA_REQUEST,
  P_RS_THIN_REQ,
  P_RS_WRITE_ACK,
  P_SIZES,
  P_STATE,
  P_STATE_CHG_REPLY,
  P_STATE_CHG_REQ,
  P_SUPERSEDED,
  P_SYNC_PARAM89,
  P_SYNC_UUID,
  P_TRIM,
  P_UNPLUG_REMOTE,
  P_UUIDS,
  P_WRITE_ACK,
  P_ZEROES,
  packetName,
  WireContext,
} from './wire/packets.js';

const C = ConnectionState;
const D = DiskState;
const F = RequestFlag;

const REQUEST_LIMIT = 65536;
/** Send queue beyond which nothing new is produced for the data socket. */
const SEND_QUEUE_FULL_BYTES = 8 * 1024 * 1024;
/** How long administrative wishes are repeated while the state is in transit. */
const TRANSIENT_LIMIT_MS = 10_000;

/** Options of the connection, in engine units. */
export interface NetOptions {
  /** 1 A, 2 B, 3 C. */
  readonly wireProtocol: 1 | 2 | 3;
  readonly timeoutMs: number;
  readonly koCount: number;
  readonly pingIntervalMs: number;
  readonly pingTimeoutMs: number;
  /** Application requests under way at most, and 4 KiB pages of resync or peer requests in flight. */
  readonly maxBuffers: number;
  readonly maxEpochWrites: number;
  readonly useRle: boolean;
  readonly twoPrimaries: boolean;
  /** SplitBrainPolicy numbers. */
  readonly afterSplitBrain0Primaries: number;
  readonly afterSplitBrain1Primary: number;
  readonly afterSplitBrain2Primaries: number;
  readonly alwaysAfterSplitBrain: boolean;
  readonly resyncRoleConflict: number;
  /** Kernel names, '' for none. */
  readonly verifyAlgorithm: string;
  readonly checksumAlgorithm: string;
}

/** What the machine needs of whoever makes connections for it. */
export interface Connector {
  /** Starts establishing; answers with `Resource.linkUp` or `Resource.establishFailed`. */
  start(): void;
  /** Stops establishing. */
  stop(): void;
}

/** One established connection. */
export interface Link {
  readonly data: Connection;
  readonly meta: Connection;
  readonly context: WireContext;
  /** This node accepted the meta socket: it wins ties. */
  readonly resolveConflicts: boolean;
}

interface Retry {
  readonly run: (attempt: (code: StateResult) => void) => void;
  readonly done: (code: StateResult) => void;
  readonly deadlineMs: number;
  busy: boolean;
}

interface LateAnswer {
  readonly front: BlockFront;
  readonly request: number;
  readonly errno: number;
}

/**
 * A resource: its volumes and the one connection to the peer with everything that is ordered on it: write epochs,
 * barriers, pings, and the state of the link. Packets come in through `linkUp`'s handlers, time through `tick`; what
 * must happen goes out through files, connections and `Effects`.
 *
 * @see DRBD 8.4 drbd_receiver.c drbdd, drbd_worker.c drbd_worker, drbd_state.c
 */
export class Resource {
  readonly devices: Device[] = [];
  /** The current epoch has completed writes; when an epoch was last closed for that reason. */
  private isEpochDue = false;
  private epochClosedMs = -1;
  readonly requests = new RequestTable<Device>(REQUEST_LIMIT);
  readonly peerRequests = new PeerRequestTable();
  readonly log = new TransferLog<Device>();
  readonly epochs = new ReceivingEpochs();
  readonly scratch = new PacketScratch();
  /** Flushes that wait for the peer. */
  readonly flushes = new RequestQueue<Device>();
  link: Link | undefined;
  /** Grows with every connection made or lost: whatever was begun on an older one is void. */
  linkNumber = 0;
  connectionState: ConnectionState = C.StandAlone;
  stateSent = false;
  dryRun = false;
  nowMs = 0;
  activeRequests = 0;
  /** Why the connection is down, for the operator. */
  lastReason = '';

  private wantsConnection = false;
  private receivedProtocol = false;
  private connectedMs = 0;
  private metaHeardMs = 0;
  private dataHeardMs = 0;
  private pingSentMs = -1;
  private readonly pingWaiters: { readonly sent: number; readonly then: () => void }[] = [];
  private pingsSent = 0;
  private pingsAnswered = 0;
  private sendStallMs = 0;
  private lastQueued = 0;
  private isFlushing = false;
  private isReadingPaused = false;
  /** The peer was told that it may disconnect, and closes the sockets; we do if it has not by then. */
  private peerDisconnects = false;
  private teardownAtMs = 0;
  private wantsTurnEnd = false;
  private readonly settling = new RequestQueue<Device>();
  private lateAnswers: LateAnswer[] = [];
  private readonly stalled: (() => void)[] = [];
  private retries: Retry[] = [];
  private drains: { readonly device: Device; readonly andEpochs: boolean; readonly run: () => void }[] = [];
  private pendingConnectionChange: ((code: StateResult) => void) | undefined;
  private incoming = NO_PAYLOAD_OFFSET;
  private readonly dataPacket = new DataPacket();
  private readonly blockRequest = new BlockRequest();
  private readonly blockAck = new BlockAck();
  private readonly blockRange = new BlockRange();
  private readonly barrierAck = new BarrierAck();

  constructor(
    readonly name: string,
    readonly net: NetOptions,
    volumes: readonly VolumeOptions[],
    readonly effects: Effects,
    private readonly connector: Connector,
    readonly mutations: Mutations = {},
  ) {
    for (const volume of [...volumes].sort((a, b) => a.number - b.number)) this.devices.push(new Device(this, volume));
  }

  device(volume: number): Device | undefined {
    return this.devices.find((device) => device.volume === volume);
  }

  get hasNetConfig(): boolean {
    return this.wantsConnection || this.connectionState !== C.StandAlone;
  }

  get isSendQueueFull(): boolean {
    return this.link !== undefined && this.link.data.queuedBytes > SEND_QUEUE_FULL_BYTES;
  }

  get hasWaiting(): boolean {
    return this.devices.some((device) => device.hasWaiting);
  }

  /** Largest range to zero in one request. */
  get maxZeroBytes(): number {
    return this.link?.context.maxDiscardBytes ?? MAX_DISCARD_BYTES;
  }

  /** Whether the connection and the buffers take another application request. */
  mayAdmit(): boolean {
    return this.activeRequests < this.net.maxBuffers && !this.isSendQueueFull && this.log.hasRoom;
  }

  isPeerPrimaryElsewhere(except: Device): boolean {
    return this.devices.some((device) => device !== except && device.state.peerRole === Role.Primary);
  }

  report(level: 'info' | 'warn' | 'error', message: string): void {
    this.effects.event({ kind: 'log', level, message });
  }

  callHelper(name: string, volume: number): void {
    this.effects.event({ kind: 'helper', name, volume });
  }

  sizeChanged(volume: number, sizeBytes: number): void {
    this.report('info', `volume ${volume}: ${sizeBytes} bytes`);
  }

  // ------------------------------------------------------------------------------------------------------------ turns

  requestTurnEnd(): void {
    if (this.wantsTurnEnd) return;
    this.wantsTurnEnd = true;
    this.effects.requestTurnEnd();
  }

  /** Completes a request that has no part to wait for, but not from inside the call that started it. */
  settleLater(request: Request<Device>): void {
    this.settling.push(request);
    this.requestTurnEnd();
  }

  /** Runs `run` at the next tick: it found no memory. */
  retryLater(run: () => void): void {
    this.stalled.push(run);
  }

  answerLater(front: BlockFront, request: number, errno: number): void {
    this.lateAnswers.push({ front, request, errno });
    this.requestTurnEnd();
  }

  /** The end of a turn of the loop: what leaves in batches leaves now. */
  turnEnd(): void {
    this.wantsTurnEnd = false;
    if (this.lateAnswers.length > 0) {
      const answers = this.lateAnswers;
      this.lateAnswers = [];
      for (const { front, request, errno } of answers) front.complete(request, errno);
    }
    for (let request = this.settling.shift(); request; request = this.settling.shift()) request.owner!.settle(request);
    for (const device of this.devices) device.turnEnd();
    this.sendIdleBarrier();
    this.checkDrains();
    this.epochChanged();
  }

  /**
   * A write of the current epoch was completed, so that later writes may depend on it. drbd.ko starts a new epoch then,
   * and each one costs a barrier, its acknowledgement and a flush of the peer's disk. But whoever needs an order across
   * a loss of power asks for a flush, which closes the epoch (`startFlush`); an epoch only bounds what has to be resent
   * when the link dies. So completions close one at most per tick, and the tick closes the rest.
   */
  writeCompleted(epoch: number): void {
    if (epoch !== this.log.currentEpoch) return;
    this.isEpochDue = true;
    if (this.epochClosedMs !== this.nowMs) this.closeDueEpoch();
  }

  /** Somebody waits for what acknowledged epochs release, or it is time. */
  closeDueEpoch(): void {
    if (!this.isEpochDue) return;
    this.isEpochDue = false;
    this.epochClosedMs = this.nowMs;
    this.log.closeEpoch();
    this.requestTurnEnd();
  }

  /** Nothing else is to be sent: an epoch that is closed gets its barrier. */
  private sendIdleBarrier(): void {
    if (this.link && this.log.dueBarrier(this.log.currentEpoch) !== 0) this.sendBarrier();
  }

  // ---------------------------------------------------------------------------------------------------------- sending

  /** Sends what the scratch buffer holds, and optionally a payload, on the data socket. */
  sendData(headerLength: number, payload = NO_PAYLOAD_OFFSET, payloadLength = 0): void {
    this.link!.data.send(this.scratch.bytes, headerLength, payload, payloadLength);
  }

  sendDataBytes(bytes: Uint8Array): void {
    this.link!.data.sendBytes(bytes);
  }

  sendMeta(length: number): void {
    this.link?.meta.send(this.scratch.bytes, length, NO_PAYLOAD_OFFSET, 0);
  }

  /** A barrier leaves before the first packet of another epoch. */
  sendBarrierBefore(epoch: number): void {
    if (this.log.dueBarrier(epoch) !== 0) this.sendBarrier();
  }

  private sendBarrier(): void {
    const due = this.log.dueBarrier(-1);
    assert(due !== 0, 'an epoch with writes is open on the wire');
    this.sendData(encodeBarrier(this.scratch, due));
    this.log.barrierSent();
  }

  /** Sends a ping; `then` when its answer is here: everything the peer sent on meta before has been handled. */
  pingThen(then: () => void): void {
    if (!this.link) return;
    this.sendPing();
    this.pingWaiters.push({ sent: this.pingsSent, then });
  }

  private sendPing(): void {
    this.pingsSent++;
    if (this.pingSentMs < 0) this.pingSentMs = this.nowMs;
    this.sendMeta(encodeHeader(this.scratch, P_PING, 0, 0));
  }

  // -------------------------------------------------------------------------------------------------- link up and down

  /** Both sockets are agreed. Sends the parameters; devices go to WFReportParams. */
  linkUp(
    data: Connection,
    meta: Connection,
    version: number,
    features: number,
    resolveConflicts: boolean,
    unconsumedData: Uint8Array,
    unconsumedMeta: Uint8Array,
  ): void {
    assert(this.link === undefined && this.connectionState === C.WFConnection, 'a link comes up once');
    assert(this.peerRequests.inUse === 0 && this.log.length === 0, 'nothing of the last link is left');
    const number = ++this.linkNumber;
    this.link = { data, meta, context: new WireContext(version, features, 0), resolveConflicts };
    this.epochs.reset();
    this.log.reset();
    this.receivedProtocol = false;
    this.connectedMs = this.nowMs;
    this.metaHeardMs = this.nowMs;
    this.dataHeardMs = this.nowMs;
    this.pingSentMs = -1;
    this.sendStallMs = this.nowMs;
    this.isReadingPaused = false;
    this.isFlushing = false;
    this.peerDisconnects = false;
    data.setHandler(new LinkHandler(this, number, 'data'));
    meta.setHandler(new LinkHandler(this, number, 'meta'));
    data.setFraming(dataFrameRule(version, 0), unconsumedData);
    meta.setFraming(metaFrameRule(version), unconsumedMeta);
    this.report(
      'info',
      `connection established, agreed protocol version ${version}, features 0x${features.toString(16)}`,
    );
    this.sendData(encodeProtocol(this.scratch, P_PROTOCOL, this.protocolParameters()));
    this.stateSent = true;
    for (const device of this.devices) device.sendParameters();
    this.connectionState = C.WFReportParams;
    for (const device of this.devices) device.changeState({ connection: C.WFReportParams }, 'hard');
    this.requestTurnEnd();
  }

  private protocolParameters(): ProtocolParameters {
    const { net } = this;
    return {
      wireProtocol: net.wireProtocol,
      afterSplitBrain0Primaries: net.afterSplitBrain0Primaries,
      afterSplitBrain1Primary: net.afterSplitBrain1Primary,
      afterSplitBrain2Primaries: net.afterSplitBrain2Primaries,
      discardMyData: this.devices.some((device) => device.discardMyData),
      dryRun: this.dryRun,
      twoPrimaries: net.twoPrimaries,
      integrityAlgorithm: '',
    };
  }

  /** The establishment gave up for good. */
  establishFailed(reason: string): void {
    this.lastReason = reason;
    this.wantsConnection = false;
    this.report('error', reason);
    this.standAlone();
  }

  /** A packet that cannot be, or the end of a socket. */
  connectionFailed(state: ConnectionState, reason: string): void {
    if (!this.link) return;
    this.lastReason = reason;
    this.report(state === C.TearDown || state === C.Disconnecting ? 'info' : 'warn', `connection lost: ${reason}`);
    this.loseLink(state);
  }

  /** The peer cannot be talked to without the operator. */
  dropForGood(reason: string): void {
    this.report('error', `${reason}; dropping the connection`);
    this.lastReason = reason;
    this.wantsConnection = false;
    this.loseLink(C.Disconnecting);
  }

  private loseLink(state: ConnectionState): void {
    const { link } = this;
    if (!link) return;
    this.link = undefined;
    this.linkNumber++;
    this.stateSent = false;
    this.connectionState = state;
    link.data.close();
    link.meta.close();
    this.pingWaiters.length = 0;
    this.pingsSent = 0;
    this.pingsAnswered = 0;
    // First the states: they hold back every completion until a new generation is durable.
    for (const device of this.devices) device.changeState({ connection: state }, 'hard');
    for (let request = this.log.head; request; request = this.log.head) {
      this.log.remove(request);
      request.owner!.epochLost(request);
    }
    this.log.reset();
    this.flushes.removeIf((request) => {
      request.flags &= ~F.WaitsForEpoch;
      request.owner!.netDone(request, false);
      return true;
    });
    this.requests.forEachInUse((request) => {
      if (request.kind === RequestKind.Read && request.has(F.NetPending)) request.owner!.readFailed(request);
    });
    for (const device of this.devices) device.resetPending();
    const pending = this.pendingConnectionChange;
    this.pendingConnectionChange = undefined;
    pending?.(StateResult.Success);
    this.effects.event({ kind: 'connection', state: CONNECTION_STATE_NAMES[state]!, reason: this.lastReason });
    if (state === C.Disconnecting || !this.wantsConnection) this.standAlone();
    else this.unconnected();
    this.requestTurnEnd();
  }

  private unconnected(): void {
    this.connectionState = C.Unconnected;
    for (const device of this.devices) device.changeState({ connection: C.Unconnected }, 'hard');
    this.maybeStartConnecting();
  }

  /** Connects again when nothing of the last connection is under way any more. */
  private maybeStartConnecting(): void {
    if (this.connectionState !== C.Unconnected || this.peerRequests.inUse > 0) return;
    this.connectionState = C.WFConnection;
    for (const device of this.devices) device.changeState({ connection: C.WFConnection }, 'hard');
    this.connector.start();
  }

  private standAlone(): void {
    this.connector.stop();
    this.wantsConnection = false;
    for (const device of this.devices) {
      if (device.state.connection === C.StandAlone) continue;
      device.changeState({ connection: C.Disconnecting }, 'hard');
      device.changeState({ connection: C.StandAlone }, 'hard');
      device.discardMyData = false;
    }
    this.connectionState = C.StandAlone;
  }

  deviceNegotiated(): void {
    if (!this.devices.some((device) => device.state.connection === C.WFReportParams)) {
      this.stateSent = false;
      for (const device of this.devices) device.pump();
    }
  }

  stateEntered(_device: Device, os: DeviceState, ns: DeviceState): void {
    if (os.role !== ns.role || os.connection !== ns.connection || os.disk !== ns.disk) this.requestTurnEnd();
  }

  // -------------------------------------------------------------------------------------------------------- receiving

  /** One packet. @throws ProtocolError */
  receive(
    socket: 'data' | 'meta',
    view: DataView,
    offset: number,
    payload: number,
    payloadLength: number,
    flags: number,
  ): void {
    const { context } = this.link!;
    this.incoming = payload;
    const command = checkHeader(context, socket, view, offset);
    if (flags !== 0)
      throw new ProtocolError(
        'DRBDTS_DRBD_BAD_LENGTH',
        `${packetName(command)} is too long`,
        'DRBD 8.4 drbd_receiver.c',
      );
    const length = readLength(view, offset);
    const at = offset + HEADER100_BYTES;
    if (socket === 'meta') {
      this.metaHeardMs = this.nowMs;
      this.receiveMeta(command, view, offset, at, length);
    } else {
      this.dataHeardMs = this.nowMs;
      if (!this.receivedProtocol && command !== P_PROTOCOL)
        throw new ProtocolError(
          'DRBDTS_DRBD_UNEXPECTED',
          `${packetName(command)} before P_PROTOCOL`,
          'DRBD 8.4 drbd_receiver.c conn_connect',
        );
      this.receiveData(context, command, view, offset, at, length, payloadLength);
    }
    this.releaseIncoming();
  }

  releaseIncoming(): void {
    if (this.incoming !== NO_PAYLOAD_OFFSET) this.effects.memory.release(this.incoming);
    this.incoming = NO_PAYLOAD_OFFSET;
  }

  private takeIncoming(): number {
    const payload = this.incoming;
    this.incoming = NO_PAYLOAD_OFFSET;
    return payload;
  }

  private receiveData(
    context: WireContext,
    command: number,
    view: DataView,
    offset: number,
    at: number,
    length: number,
    payloadLength: number,
  ): void {
    switch (command) {
      case P_BARRIER:
        this.epochs.barrierReceived(decodeBarrier(view, at, length));
        this.epochChanged();
        return;
      case P_PROTOCOL:
        this.receiveProtocol(decodeProtocol(command, view, at, length));
        return;
      case P_CONN_ST_CHG_REQ:
        this.receiveConnectionChange(view, at, length);
        return;
      case P_UNPLUG_REMOTE:
      case P_DELAY_PROBE:
        return;
    }
    const volume = readVolume(view, offset);
    const device = this.device(volume);
    if (!device) {
      if (command === P_SYNC_PARAM89 || command === P_SIZES || command === P_UUIDS || command === P_STATE) {
        this.report('warn', `${packetName(command)} for volume ${volume}, which is not configured here`);
        return;
      }
      throw new ProtocolError(
        'DRBDTS_DRBD_UNKNOWN_VOLUME',
        `${packetName(command)} for volume ${volume}`,
        'DRBD 8.4 drbd_receiver.c',
      );
    }
    const { dataPacket: packet } = this;
    switch (command) {
      case P_DATA:
      case P_TRIM:
      case P_ZEROES:
        if (command === P_DATA) decodeData(context, command, view, at, length, packet);
        else decodeTrim(context, view, at, length, packet);
        this.expectConnected(device, command);
        checkInsideDevice(packet.sector, packet.sizeBytes, device.sizeSectors);
        device.receiveWrite(packet, command !== P_DATA, this.takeIncoming());
        this.checkReadingPause();
        return;
      case P_DATA_REPLY:
        decodeData(context, command, view, at, length, packet);
        device.receiveDataReply(packet, this.takeIncoming());
        return;
      case P_RS_DATA_REPLY:
        decodeData(context, command, view, at, length, packet);
        checkInsideDevice(packet.sector, packet.sizeBytes, device.sizeSectors);
        device.receiveResyncData(packet, this.takeIncoming());
        this.checkReadingPause();
        return;
      case P_DATA_REQUEST:
      case P_RS_DATA_REQUEST:
      // The target would also take "all zero" for an answer; data is always one.
      case P_RS_THIN_REQ:
        decodeRequest(command, view, at, length, 0, this.blockRequest);
        this.expectConnected(device, command);
        device.receiveReadRequest(
          this.blockRequest,
          command === P_DATA_REQUEST ? PeerRequestKind.Read : PeerRequestKind.ResyncRead,
        );
        this.checkReadingPause();
        return;
      case P_CSUM_RS_REQUEST: {
        const size = device.digestBytesOfChecksum;
        decodeRequest(command, view, at, length, size, this.blockRequest);
        this.expectConnected(device, command);
        const start = view.byteOffset + at + length - size;
        const digest = new Uint8Array(view.buffer, start, size).slice();
        device.receiveReadRequest(this.blockRequest, PeerRequestKind.ChecksumRead, digest);
        this.checkReadingPause();
        return;
      }
      case P_OV_REQUEST:
        decodeRequest(command, view, at, length, 0, this.blockRequest);
        this.expectConnected(device, command);
        device.receiveReadRequest(this.blockRequest, PeerRequestKind.VerifyRead);
        this.checkReadingPause();
        return;
      case P_OUT_OF_SYNC:
        decodeBlockRange(context, command, view, at, length, this.blockRange);
        device.receiveOutOfSync(this.blockRange.sector, this.blockRange.sizeBytes);
        return;
      case P_BITMAP:
      case P_COMPRESSED_BITMAP: {
        const start = this.incoming;
        const { bytes } = this.effects.memory;
        device.exchange.receive(
          command,
          start < 0 ? bytes.subarray(0, 0) : bytes.subarray(start, start + payloadLength),
        );
        return;
      }
      case P_SYNC_PARAM89:
        device.receiveSyncParameters(decodeSyncParam(view, at, length));
        return;
      case P_SIZES:
        device.receiveSizes(decodeSizes(context, view, at, length));
        return;
      case P_UUIDS:
        device.receiveUuids(decodeUuids(view, at, length));
        return;
      case P_STATE:
        device.receiveState(decodeState(view, at, length));
        return;
      case P_SYNC_UUID:
        device.receiveSyncUuid(decodeSyncUuid(view, at, length));
        return;
      case P_STATE_CHG_REQ: {
        const { mask, value } = decodeStateChange(command, view, at, length);
        device.receiveStateChange(mask, value);
        return;
      }
    }
    throw new ProtocolError(
      'DRBDTS_DRBD_UNEXPECTED',
      `${packetName(command)} was not agreed on`,
      'DRBD 8.4 drbd_receiver.c drbd_cmd_handler',
    );
  }

  private expectConnected(device: Device, command: number): void {
    if (device.state.connection < C.Connected)
      throw new ProtocolError(
        'DRBDTS_DRBD_UNEXPECTED',
        `${packetName(command)} before the handshake was decided`,
        'DRBD 8.4 drbd_receiver.c',
      );
  }

  private receiveMeta(command: number, view: DataView, offset: number, at: number, length: number): void {
    switch (command) {
      case P_PING:
        this.sendMeta(encodeHeader(this.scratch, P_PING_ACK, 0, 0));
        return;
      case P_PING_ACK:
        this.pingSentMs = -1;
        this.pingsAnswered++;
        while (this.pingWaiters.length > 0 && this.pingWaiters[0]!.sent <= this.pingsAnswered)
          this.pingWaiters.shift()!.then();
        return;
      case P_BARRIER_ACK:
        decodeBarrierAck(view, at, length, this.barrierAck);
        this.barrierAcked(this.barrierAck.barrier, this.barrierAck.writeCount);
        return;
      case P_CONN_ST_CHG_REPLY: {
        const result = decodeStateChangeReply(command, view, at, length);
        const pending = this.pendingConnectionChange;
        this.pendingConnectionChange = undefined;
        pending?.(result >= StateResult.Success ? StateResult.Success : StateResult.CwFailedByPeer);
        return;
      }
      case P_DELAY_PROBE:
        return;
    }
    const device = this.device(readVolume(view, offset));
    if (!device)
      throw new ProtocolError(
        'DRBDTS_DRBD_UNKNOWN_VOLUME',
        `${packetName(command)} for volume ${readVolume(view, offset)}`,
        'DRBD 8.4 drbd_receiver.c',
      );
    switch (command) {
      case P_STATE_CHG_REPLY:
        device.receiveStateChangeReply(decodeStateChangeReply(command, view, at, length));
        return;
      case P_RECV_ACK:
      case P_WRITE_ACK:
      case P_RS_WRITE_ACK:
      case P_SUPERSEDED:
      case P_RETRY_WRITE:
      case P_NEG_ACK:
      case P_NEG_DREPLY:
      case P_NEG_RS_DREPLY:
      case P_RS_CANCEL:
        decodeBlockAck(this.link!.context, command, view, at, length, this.blockAck);
        device.receiveAck(command, this.blockAck);
        return;
      case P_OV_RESULT:
        decodeBlockAck(this.link!.context, command, view, at, length, this.blockAck);
        device.receiveVerifyResult(this.blockAck);
        return;
    }
    throw new ProtocolError(
      'DRBDTS_DRBD_UNEXPECTED',
      `${packetName(command)} was not agreed on`,
      'DRBD 8.4 drbd_receiver.c ack_receiver_tbl',
    );
  }

  private receiveProtocol(parameters: ProtocolParameters): void {
    this.receivedProtocol = true;
    const problem = incompatibleProtocol(this.protocolParameters(), parameters);
    if (problem) this.dropForGood(problem);
    else if (parameters.dryRun) this.dryRun = true;
  }

  private receiveConnectionChange(view: DataView, at: number, length: number): void {
    const { mask, value } = decodeStateChange(P_CONN_ST_CHG_REQ, view, at, length);
    const reply = (result: StateResult) =>
      this.sendMeta(encodeStateChangeReply(this.scratch, P_CONN_ST_CHG_REPLY, 0, result));
    if (this.pendingConnectionChange && this.link!.resolveConflicts) {
      reply(StateResult.ConcurrentStateChange);
      return;
    }
    const wanted = convertPerspective(mask, value);
    const connection = ((wanted.value & wanted.mask) >>> 4) & 31;
    if (connection !== C.TearDown) {
      reply(StateResult.NotSupported);
      return;
    }
    reply(StateResult.Success);
    // The peer closes the sockets; who closes first may cut off the reply.
    this.lastReason = 'the peer disconnected';
    this.teardownAtMs = this.nowMs + this.net.pingTimeoutMs;
    this.peerDisconnects = true;
  }

  /** Sockets ended. */
  socketClosed(number: number, socket: 'data' | 'meta', errno: number): void {
    if (number !== this.linkNumber || !this.link) return;
    if (this.peerDisconnects) {
      this.peerDisconnects = false;
      this.connectionFailed(C.TearDown, 'the peer disconnected');
      return;
    }
    if (this.connectionState === C.Disconnecting) {
      this.loseLink(C.Disconnecting);
      return;
    }
    const why = errno === 0 ? 'the peer closed it' : `errno ${errno}`;
    // A frame that cannot be (EPROTO, EMSGSIZE) is the peer's mistake, everything else the network's.
    const isFrameError = errno === 71 || errno === 90;
    this.connectionFailed(isFrameError ? C.ProtocolError : C.BrokenPipe, `${socket} socket: ${why}`);
  }

  // ----------------------------------------------------------------------------------------------------------- epochs

  private barrierAcked(barrier: number, writeCount: number): void {
    this.log.barrierAcked(barrier, writeCount);
    for (let request = this.log.head; request && request.epoch === barrier; request = this.log.head) {
      this.log.remove(request);
      request.owner!.epochAcked(request);
    }
    if (this.flushes.length > 0)
      this.flushes.removeIf((request) => {
        if (this.log.isOpen(request.epoch)) return false;
        request.flags &= ~F.WaitsForEpoch;
        request.owner!.netDone(request, true);
        return true;
      });
    if (this.drains.length > 0) this.requestTurnEnd();
  }

  /** A write of the peer is done, or a barrier arrived: flush and acknowledge what is ready, one flush at a time. */
  epochChanged(): void {
    if (this.isFlushing || !this.link || !this.epochs.wantsFlush) return;
    if (this.devices.some((device) => device.lostPeerWrites)) {
      this.connectionFailed(C.NetworkFailure, 'a disk failed before it had stored what the peer wrote');
      return;
    }
    const number = this.linkNumber;
    const covered = this.epochs.flushStarted();
    let pending = 1;
    let failed = false;
    const finish = (errno: number) => {
      if (errno !== 0) failed = true;
      if (--pending > 0 || number !== this.linkNumber) return;
      this.isFlushing = false;
      if (failed) {
        this.connectionFailed(C.NetworkFailure, 'a flush failed: what the peer wrote is not durable here');
        return;
      }
      this.epochs.takeAcknowledged(covered, this.acknowledgeBarrier);
      this.epochChanged();
    };
    this.isFlushing = true;
    for (const device of this.devices) {
      if (!device.options.diskFlushes || this.mutations.barrierAckWithoutFlush) continue;
      pending++;
      device.flushLocally(finish);
    }
    finish(0);
  }

  private readonly acknowledgeBarrier = (barrier: number, size: number): void => {
    this.sendMeta(encodeBarrierAck(this.scratch, barrier, size));
  };

  peerRequestDone(): void {
    this.checkReadingPause();
    this.maybeStartConnecting();
  }

  /** The peer waits while more than max-buffers of its requests are under way here. */
  private checkReadingPause(): void {
    const limit = this.net.maxBuffers * 4096;
    if (!this.link) return;
    if (!this.isReadingPaused && this.peerRequests.bytes > limit) {
      this.isReadingPaused = true;
      this.link.data.pause();
    } else if (this.isReadingPaused && this.peerRequests.bytes <= limit / 2) {
      this.isReadingPaused = false;
      this.link.data.resume();
    }
  }

  /** The data socket takes more. */
  drained(): void {
    this.requestTurnEnd();
  }

  // ------------------------------------------------------------------------------------------------------------- time

  tick(nowMs: number): void {
    this.nowMs = nowMs;
    this.closeDueEpoch();
    this.tickLink(nowMs);
    for (const device of this.devices) device.resync.tick(nowMs);
    for (const run of this.stalled.splice(0)) run();
    for (const retry of [...this.retries]) if (!retry.busy) this.attempt(retry);
    this.maybeStartConnecting();
    this.requestTurnEnd();
  }

  private tickLink(nowMs: number): void {
    const { link, net } = this;
    if (!link) return;
    if (this.peerDisconnects && nowMs >= this.teardownAtMs) {
      this.peerDisconnects = false;
      this.connectionFailed(C.TearDown, 'the peer disconnected');
      return;
    }
    if (this.pingSentMs >= 0) {
      const silentMs = nowMs - Math.max(this.pingSentMs, this.dataHeardMs, this.metaHeardMs);
      if (silentMs > net.pingTimeoutMs) {
        this.connectionFailed(C.NetworkFailure, 'PingAck did not arrive in time');
        return;
      }
      // Anything heard is a life sign; the question is asked again.
      if (nowMs - this.pingSentMs > net.pingTimeoutMs) {
        this.pingSentMs = -1;
        this.sendPing();
      }
    } else if (nowMs - this.metaHeardMs >= net.pingIntervalMs) {
      this.sendPing();
      this.metaHeardMs = nowMs;
    }
    const queued = link.data.queuedBytes;
    if (queued === 0 || queued < this.lastQueued) this.sendStallMs = nowMs;
    this.lastQueued = queued;
    const patienceMs = net.timeoutMs * net.koCount;
    if (net.koCount === 0) return;
    if (nowMs - this.sendStallMs > patienceMs) {
      this.connectionFailed(C.Timeout, 'the peer does not take data');
      return;
    }
    const oldest = this.log.head;
    if (!oldest || nowMs - this.connectedMs <= patienceMs) return;
    if (oldest.has(F.NetPending) && nowMs - oldest.sentMs > patienceMs)
      this.connectionFailed(C.Timeout, `no answer to a write for ${patienceMs} ms`);
  }

  // ------------------------------------------------------------------------------------------------------------ admin

  /** Repeats a wish while the answer is "in transient state". */
  retryTransient(run: Retry['run'], done: Retry['done']): void {
    const retry: Retry = { run, done, deadlineMs: this.nowMs + TRANSIENT_LIMIT_MS, busy: false };
    this.retries.push(retry);
    this.attempt(retry);
  }

  private attempt(retry: Retry): void {
    retry.busy = true;
    retry.run((code) => {
      retry.busy = false;
      if (code === StateResult.InTransientState && this.nowMs < retry.deadlineMs) return;
      this.retries = this.retries.filter((other) => other !== retry);
      retry.done(code);
    });
  }

  /** Calls `then` when no application request of the device is under way and the peer has made all durable. */
  drain(device: Device, then: () => void): void {
    this.log.closeEpoch();
    this.drains.push({ device, andEpochs: true, run: then });
    this.requestTurnEnd();
  }

  /** Calls `then` when no application request of the device is under way. New ones must be held back meanwhile. */
  drainApplication(device: Device, then: () => void): void {
    this.drains.push({ device, andEpochs: false, run: then });
    this.requestTurnEnd();
  }

  private checkDrains(): void {
    if (this.drains.length === 0) return;
    const ready = this.drains.filter(
      ({ device, andEpochs }) => !device.hasApplicationRequests && !(andEpochs && this.hasEpochWrites(device)),
    );
    if (ready.length === 0) return;
    this.drains = this.drains.filter((drain) => !ready.includes(drain));
    for (const { run } of ready) run();
  }

  private hasEpochWrites(device: Device): boolean {
    for (let request = this.log.head; request; request = request.next) if (request.owner === device) return true;
    return false;
  }

  /** Whether requests of this device still hold references on its activity log. */
  holdsExtents(device: Device): boolean {
    let holds = false;
    this.requests.forEachInUse((request) => {
      if (request.owner === device && request.has(F.ActivityLogHeld)) holds = true;
    });
    return holds;
  }

  attach(volume: number, doors: DiskDoors, done: AdminDone): void {
    const device = this.device(volume);
    assert(device !== undefined, 'the volume exists');
    device.attach(doors, done);
  }

  detach(volume: number, force: boolean, done: AdminDone): void {
    const device = this.device(volume);
    assert(device !== undefined, 'the volume exists');
    device.detach(force, done);
  }

  /** Starts connecting. The answer does not wait for the peer. */
  connect(options: { readonly discardMyData?: boolean; readonly dryRun?: boolean }, done: AdminDone): void {
    if (this.wantsConnection) {
      done(StateResult.NothingToDo, 'the connection is configured already');
      return;
    }
    if (options.discardMyData && this.devices.some((device) => device.state.role === Role.Primary)) {
      done(StateResult.UnknownError, 'cannot discard the data of a Primary');
      return;
    }
    this.wantsConnection = true;
    this.dryRun = options.dryRun ?? false;
    this.lastReason = '';
    for (const device of this.devices) device.discardMyData = options.discardMyData ?? false;
    this.unconnected();
    done(StateResult.Success, '');
  }

  disconnect(force: boolean, done: AdminDone): void {
    if (this.connectionState === C.StandAlone) {
      done(StateResult.NothingToDo, '');
      return;
    }
    const finish = () => {
      this.wantsConnection = false;
      this.lastReason = 'disconnected by the operator';
      if (this.link) this.loseLink(C.Disconnecting);
      else this.standAlone();
      done(StateResult.Success, '');
    };
    if (force || !this.link || this.connectionState < C.WFReportParams) {
      finish();
      return;
    }
    this.retryTransient(
      (attempt) => {
        if (!this.link) {
          attempt(StateResult.Success);
          return;
        }
        if (this.stateSent || this.pendingConnectionChange) {
          attempt(StateResult.InTransientState);
          return;
        }
        this.pendingConnectionChange = attempt;
        this.sendData(encodeStateChange(this.scratch, P_CONN_ST_CHG_REQ, 0, 0x1f0, C.Disconnecting << 4));
      },
      (code) => {
        if (code >= StateResult.Success || code === StateResult.InTransientState) finish();
        else done(code, STATE_RESULT_TEXT[code]);
      },
    );
  }

  /** Promotes every volume. */
  primary(force: boolean, done: AdminDone): void {
    if (this.link) this.sendPing();
    this.forEachDevice((device, next) => this.promote(device, force, next), done);
  }

  private forEachDevice(run: (device: Device, next: AdminDone) => void, done: AdminDone): void {
    const step = (index: number) => {
      const device = this.devices[index];
      if (!device) {
        done(StateResult.Success, '');
        return;
      }
      run(device, (code, reason) => {
        if (code < StateResult.Success) done(code, reason || STATE_RESULT_TEXT[code]);
        else step(index + 1);
      });
    };
    step(0);
  }

  private promote(device: Device, force: boolean, done: AdminDone): void {
    if (device.state.role === Role.Primary) {
      done(StateResult.NothingToDo, '');
      return;
    }
    let lifted = false;
    let waitedForPeer = false;
    const fields: { role: typeof Role.Primary; disk?: DiskState; peerDisk?: DiskState } = { role: Role.Primary };
    this.retryTransient(
      (attempt) => {
        const ask = (triesLeft: number) => {
          device.requestChange(fields, (code) => {
            const { disk } = device.state;
            if (triesLeft > 0 && force) {
              if (code === StateResult.NoUpToDateDisk && !lifted && disk >= D.Inconsistent && disk < D.UpToDate) {
                fields.disk = D.UpToDate;
                lifted = true;
                ask(triesLeft - 1);
                return;
              }
              if (code === StateResult.PrimaryNop) {
                fields.peerDisk = D.Outdated;
                ask(triesLeft - 1);
                return;
              }
            }
            if (code === StateResult.CwFailedByPeer && fields.peerDisk !== undefined && triesLeft > 0) {
              delete fields.peerDisk;
              ask(triesLeft - 1);
              return;
            }
            if (code === StateResult.TwoPrimaries && !waitedForPeer) {
              // The peer may be demoting right now.
              waitedForPeer = true;
              attempt(StateResult.InTransientState);
              return;
            }
            attempt(code);
          });
        };
        ask(4);
      },
      (code) => {
        if (code < StateResult.Success) {
          done(code, STATE_RESULT_TEXT[code]);
          return;
        }
        this.promoted(device, lifted, done);
      },
    );
  }

  private promoted(device: Device, forced: boolean, done: AdminDone): void {
    const { state } = device;
    const metadata = device.metadata;
    const finish = () => {
      if (this.link && device.state.connection >= C.Connected) {
        if (forced) device.sendUuids(0);
        device.sendState();
      }
      done(StateResult.Success, '');
    };
    if (!metadata) {
      finish();
      return;
    }
    device.hold();
    const ready = () => {
      device.release();
      finish();
    };
    const lonely = state.connection < C.Connected || state.peerDisk <= D.Failed;
    if ((lonely && metadata.identifiers.bitmap === 0n) || forced) {
      device.newCurrentUuid(ready);
    } else {
      device.setPrimaryBit();
      metadata.writeSuperblock(ready);
    }
  }

  /** Demotes every volume: refused while open. Writes under way are finished and durable on both sides first. */
  secondary(done: AdminDone): void {
    this.forEachDevice((device, next) => {
      if (device.state.role !== Role.Primary) {
        next(StateResult.NothingToDo, '');
        return;
      }
      if (device.openCount > 0) {
        next(StateResult.DeviceInUse, STATE_RESULT_TEXT[StateResult.DeviceInUse]);
        return;
      }
      device.hold();
      this.drain(device, () =>
        device.flushLocally(() => {
          const finish = (code: StateResult) => {
            device.release();
            next(code, code < StateResult.Success ? STATE_RESULT_TEXT[code] : '');
          };
          this.retryTransient(
            (attempt) => device.requestChange({ role: Role.Secondary }, attempt),
            (code) => {
              if (code < StateResult.Success) {
                finish(code);
                return;
              }
              const announce = () => {
                if (this.link && device.state.connection >= C.Connected) device.sendState();
                finish(StateResult.Success);
              };
              device.setPrimaryBit();
              const { metadata } = device;
              if (!metadata) announce();
              else metadata.writeChangedPages(() => metadata.writeSuperblock(announce));
            },
          );
        }),
      );
    }, done);
  }

  /** Throws the own data away and copies the peer's. */
  invalidate(volume: number, done: AdminDone): void {
    const device = this.device(volume);
    assert(device !== undefined, 'the volume exists');
    const { metadata } = device;
    if (!metadata) {
      done(StateResult.NoLocalDisk, STATE_RESULT_TEXT[StateResult.NoLocalDisk]);
      return;
    }
    if (this.connectionState === C.StandAlone && device.state.role === Role.Secondary) {
      device.requestChange({ disk: D.Inconsistent }, (code) => {
        if (code < StateResult.Success) done(code, STATE_RESULT_TEXT[code]);
        else metadata.setAllBits((ok) => done(ok ? StateResult.Success : StateResult.UnknownError, ''));
      });
      return;
    }
    this.retryTransient(
      (attempt) => device.requestChange({ connection: C.StartingSyncT }, attempt),
      (code) => done(code, code < StateResult.Success ? STATE_RESULT_TEXT[code] : ''),
    );
  }

  /** Makes every volume Secondary, disconnects and detaches: nothing is left running. */
  down(done: AdminDone): void {
    this.secondary((code, reason) => {
      if (code < StateResult.Success) {
        done(code, reason);
        return;
      }
      this.disconnect(false, (disconnected, why) => {
        if (disconnected < StateResult.Success) {
          done(disconnected, why);
          return;
        }
        this.forEachDevice((device, next) => device.detach(false, next), done);
      });
    });
  }
}

/** The two ends of a link as the doors call them. A handler outlives its link; then it only gives payloads back. */
class LinkHandler implements ConnectionHandler {
  constructor(
    private readonly resource: Resource,
    private readonly number: number,
    private readonly socket: 'data' | 'meta',
  ) {}

  frame(
    header: DataView,
    headerOffset: number,
    _headerLength: number,
    payload: number,
    payloadLength: number,
    flags: number,
  ): void {
    const { resource } = this;
    if (resource.linkNumber !== this.number || !resource.link) {
      if (payload !== NO_PAYLOAD_OFFSET) resource.effects.memory.release(payload);
      return;
    }
    try {
      resource.receive(this.socket, header, headerOffset, payload, payloadLength, flags);
    } catch (error) {
      resource.releaseIncoming();
      if (!(error instanceof ProtocolError)) throw error;
      resource.connectionFailed(C.ProtocolError, `${error.code}: ${error.message} (${error.section})`);
    }
  }

  closed(errno: number): void {
    this.resource.socketClosed(this.number, this.socket, errno);
  }

  drained(): void {
    if (this.resource.linkNumber === this.number) this.resource.drained();
  }
}
