import type { BlockTarget } from '../io/block-target.js';
import { withContract } from '../io/disk-contract.js';
import type { Connection, ConnectionHandler, Listener, Memory, Network } from '../io/ring.js';
import type { AdminDone, Device, DiskDoors, VolumeOptions } from '../replication/device.js';
import type { Mutations, ResourceEvent } from '../replication/effects.js';
import type { ProcDevice, ProcProgress } from '../replication/proc-text.js';
import { type Connector, type NetOptions, Resource } from '../replication/resource.js';
import {
  CONNECTION_STATE_NAMES,
  ConnectionState,
  DISK_STATE_NAMES,
  isSyncOrVerify,
  ROLE_NAMES,
} from '../replication/state.js';
import { type Authentication, PeerConnection } from '../replication/wire/peer-connection.js';

export type { AdminDone, DiskDoors, VolumeOptions } from '../replication/device.js';
export type { ResourceEvent } from '../replication/effects.js';
export type { NetOptions } from '../replication/resource.js';

const NO_PAYLOAD = -1;
const PROTOCOL_LETTERS = ['A', 'B', 'C'] as const;

/** A resource in engine units: what the configuration says, resolved for this node. */
export interface ResourceOptions {
  readonly name: string;
  readonly self: { readonly host: string; readonly port: number };
  readonly peer: { readonly host: string; readonly port: number };
  readonly net: NetOptions & EstablishOptions;
  readonly volumes: readonly VolumeOptions[];
}

/** What concerns the making of connections only. */
export interface EstablishOptions {
  readonly connectIntervalMs: number;
  /** 0: pingTimeoutMs. */
  readonly socketCheckMs: number;
  /** 0: the kernel's choice. */
  readonly sendBufferBytes: number;
  readonly receiveBufferBytes: number;
  readonly authentication?: Authentication;
}

/** The world as the runtime sees it: the native ring in production, simulated doors in tests. */
export interface ResourceDoors {
  readonly memory: Memory;
  readonly network: Network;
  /** Uniform in [0, 1). */
  fraction(): number;
  randomBytes(count: number): Uint8Array;
  /** Runs `run` once, soon, but not from inside the call that asked (setImmediate, or the end of the ring's turn). */
  defer(run: () => void): void;
}

export interface ResourceListener {
  readonly onEvent: (event: ResourceEvent) => void;
}

/** Everything `status()` tells of one volume. */
export interface VolumeStatus {
  readonly number: number;
  readonly minor: number;
  readonly connection: string;
  readonly role: string;
  readonly peerRole: string;
  readonly disk: string;
  readonly peerDisk: string;
  readonly sizeBytes: number;
  readonly openCount: number;
  readonly outOfSyncBytes: number;
  /** current, bitmap, history 0, history 1 as 16 hex digits; absent without a disk. */
  readonly generationIdentifiers?: readonly [string, string, string, string];
  /** Counters and progress as /proc/drbd prints them (`renderProc` of proc-text.ts). */
  readonly proc: ProcDevice;
}

export interface ResourceStatus {
  readonly name: string;
  readonly connection: string;
  /** Why the connection is down, '' if it is not. */
  readonly reason: string;
  readonly volumes: readonly VolumeStatus[];
}

/**
 * The production driver of one resource: makes and accepts the connections that the pure machine asks for, hands it
 * time
 * and turns, and offers the engine one BlockTarget per volume. Knows no clock: `tick` is called every 100 ms or less.
 */
export class ResourceRuntime implements Connector {
  private readonly resource: Resource;
  private readonly establishment: PeerConnection;
  private readonly sockets = new Map<number, EstablishingSocket>();
  private nextSocket = 1;
  private listener: Listener | undefined;
  private isClosed = false;
  private nowMs = 0;
  private readonly turnEnd = (): void => {
    if (!this.isClosed) this.resource.turnEnd();
  };

  constructor(
    private readonly options: ResourceOptions,
    private readonly doors: ResourceDoors,
    private readonly listenerOfEvents: ResourceListener,
    mutations: Mutations = {},
  ) {
    const { net } = options;
    this.resource = new Resource(
      options.name,
      net,
      options.volumes,
      {
        memory: doors.memory,
        random64: () => {
          const view = new DataView(doors.randomBytes(8).buffer);
          return view.getBigUint64(0);
        },
        requestTurnEnd: () => doors.defer(this.turnEnd),
        event: (event) => listenerOfEvents.onEvent(event),
      },
      this,
      mutations,
    );
    this.establishment = new PeerConnection(
      {
        connectIntervalMs: net.connectIntervalMs,
        pingTimeoutMs: net.pingTimeoutMs,
        socketCheckMs: net.socketCheckMs || net.pingTimeoutMs,
        ...(net.authentication ? { authentication: net.authentication } : {}),
      },
      { fraction: () => doors.fraction(), bytes: (count) => doors.randomBytes(count) },
    );
  }

  /** What a front end serves. @throws RangeError for a volume the resource does not have */
  blockTarget(volume: number): BlockTarget & Pick<Device, 'blockStatus'> {
    return this.device(volume);
  }

  private device(volume: number): Device {
    const device = this.resource.device(volume);
    if (!device) throw new RangeError(`resource ${this.options.name} has no volume ${volume}`);
    return device;
  }

  /** Attaches the disk of a volume. The files belong to the runtime from now on; it closes them. */
  attach(volume: number, doors: DiskDoors, done: AdminDone): void {
    this.device(volume);
    const data = withContract(doors.data);
    const meta = doors.meta === doors.data ? data : withContract(doors.meta);
    this.resource.attach(volume, { ...doors, data, meta }, done);
  }

  detach(volume: number, force: boolean, done: AdminDone): void {
    this.device(volume);
    this.resource.detach(volume, force, done);
  }

  /** Starts connecting and keeps connecting; does not wait for the peer. */
  connect(options: { readonly discardMyData?: boolean; readonly dryRun?: boolean }, done: AdminDone): void {
    this.resource.connect(options, done);
  }

  disconnect(force: boolean, done: AdminDone): void {
    this.resource.disconnect(force, done);
  }

  primary(force: boolean, done: AdminDone): void {
    this.resource.primary(force, done);
  }

  secondary(done: AdminDone): void {
    this.resource.secondary(done);
  }

  invalidate(volume: number, done: AdminDone): void {
    this.device(volume);
    this.resource.invalidate(volume, done);
  }

  down(done: AdminDone): void {
    this.resource.down(done);
  }

  /** Time passes. @param nowMs monotonic milliseconds */
  tick(nowMs: number): void {
    this.nowMs = nowMs;
    this.establishment.tick(nowMs);
    this.runEstablishment();
    this.resource.tick(nowMs);
  }

  /** Stops at once, as a crash would, but orderly for the doors: sockets and listener are closed. Disks stay open. */
  close(): void {
    this.isClosed = true;
    this.stop();
    this.resource.link?.data.close();
    this.resource.link?.meta.close();
  }

  // ----------------------------------------------------------------------------------------------------- establishment

  /** Connector: the machine wants a connection. */
  start(): void {
    if (this.establishment.isActive || this.isClosed) return;
    this.establishment.start(this.nowMs);
    this.runEstablishment();
  }

  /** Connector: the machine wants none any more. */
  stop(): void {
    this.establishment.stop();
    this.runEstablishment();
    this.listener?.close();
    this.listener = undefined;
  }

  private runEstablishment(): void {
    for (const effect of this.establishment.takeEffects()) {
      switch (effect.kind) {
        case 'listen':
          this.listen();
          break;
        case 'stopListening':
          this.listener?.close();
          this.listener = undefined;
          break;
        case 'dial':
          this.dial(effect.timeoutMs);
          break;
        case 'send':
          this.sockets.get(effect.socket)?.connection.sendBytes(effect.bytes);
          break;
        case 'close':
          this.sockets.get(effect.socket)?.connection.close();
          this.sockets.delete(effect.socket);
          break;
        case 'established': {
          const data = this.sockets.get(effect.data)!.connection;
          const meta = this.sockets.get(effect.meta)!.connection;
          this.sockets.delete(effect.data);
          this.sockets.delete(effect.meta);
          this.listener?.close();
          this.listener = undefined;
          const { version, features, resolveConflicts, unconsumedData, unconsumedMeta } = effect;
          this.resource.linkUp(data, meta, version, features, resolveConflicts, unconsumedData, unconsumedMeta);
          break;
        }
        case 'attemptFailed':
          if (effect.retry) this.log('info', `connecting: ${effect.reason}`);
          else this.resource.establishFailed(effect.reason);
          break;
      }
    }
  }

  private log(level: 'info' | 'warn', message: string): void {
    this.listenerOfEvents.onEvent({ kind: 'log', level, message });
  }

  private get buffers(): { receiveBufferBytes: number; sendBufferBytes: number } {
    const { receiveBufferBytes, sendBufferBytes } = this.options.net;
    return { receiveBufferBytes, sendBufferBytes };
  }

  private listen(): void {
    if (this.listener) return;
    const { host, port } = this.options.self;
    try {
      this.listener = this.doors.network.listenTcp(
        host,
        port,
        (connection) => {
          const socket = this.adopt(connection);
          this.establishment.accepted(socket, this.nowMs);
          this.runEstablishment();
        },
        this.buffers,
      );
    } catch (error) {
      // The address may not be there yet; dialing goes on, and the next attempt listens again.
      this.log('warn', `cannot listen on ${host}:${port}: ${(error as Error).message}`);
    }
  }

  private dial(timeoutMs: number): void {
    const { self, peer } = this.options;
    const options = { localHost: self.host, timeoutMs, ...this.buffers };
    this.doors.network.connectTcp(peer.host, peer.port, options, (connection) => {
      if (this.isClosed) {
        connection?.close();
        return;
      }
      if (connection) this.establishment.dialed(this.adopt(connection), this.nowMs);
      else this.establishment.dialFailed(this.nowMs);
      this.runEstablishment();
    });
  }

  private adopt(connection: Connection): number {
    const socket = this.nextSocket++;
    const entry = new EstablishingSocket(this, socket, connection);
    this.sockets.set(socket, entry);
    connection.setFraming({ kind: 'raw' });
    connection.setHandler(entry);
    return socket;
  }

  /** Bytes of a handshake; `payload` is given back here. */
  received(socket: number, payload: number, length: number): void {
    const { memory } = this.doors;
    if (payload === NO_PAYLOAD) return;
    const bytes = memory.bytes.slice(payload, payload + length);
    memory.release(payload);
    if (!this.sockets.has(socket)) return;
    this.establishment.received(socket, bytes, this.nowMs);
    this.runEstablishment();
  }

  socketClosed(socket: number): void {
    if (!this.sockets.delete(socket)) return;
    this.establishment.closed(socket, this.nowMs);
    this.runEstablishment();
  }

  // ------------------------------------------------------------------------------------------------------------ status

  status(): ResourceStatus {
    const { resource } = this;
    return {
      name: resource.name,
      connection: CONNECTION_STATE_NAMES[resource.connectionState]!,
      reason: resource.link ? '' : resource.lastReason,
      volumes: resource.devices.map((device) => this.volumeStatus(device)),
    };
  }

  private volumeStatus(device: Device): VolumeStatus {
    const { state, metadata } = device;
    const hex = (value: bigint) => value.toString(16).padStart(16, '0').toUpperCase();
    const identifiers = metadata?.identifiers;
    return {
      number: device.volume,
      minor: device.options.minor,
      connection: CONNECTION_STATE_NAMES[state.connection]!,
      role: ROLE_NAMES[state.role]!,
      peerRole: ROLE_NAMES[state.peerRole]!,
      disk: DISK_STATE_NAMES[state.disk]!,
      peerDisk: DISK_STATE_NAMES[state.peerDisk]!,
      sizeBytes: device.sizeBytes,
      openCount: device.openCount,
      outOfSyncBytes: device.outOfSyncBits * 4096,
      ...(identifiers
        ? {
            generationIdentifiers: [
              hex(identifiers.current),
              hex(identifiers.bitmap),
              hex(identifiers.history0),
              hex(identifiers.history1),
            ] as const,
          }
        : {}),
      proc: this.procDevice(device),
    };
  }

  private procDevice(device: Device): ProcDevice {
    const { resource } = this;
    const { counters, state, options } = device;
    return {
      minor: options.minor,
      state,
      protocol: resource.hasNetConfig ? PROTOCOL_LETTERS[resource.net.wireProtocol - 1]! : ' ',
      activityLogSuspended: false,
      sentSectors: counters.sentSectors,
      receivedSectors: counters.receivedSectors,
      writtenSectors: counters.diskWrittenSectors,
      readSectors: counters.diskReadSectors,
      activityLogWrites: device.metadata?.transactionsWritten ?? 0,
      localInFlight: device.localOperations,
      pending: counters.pending,
      unacknowledged: counters.unacked,
      applicationInFlight: counters.applicationRequests,
      epochs: resource.epochs.count,
      writeOrdering: options.diskFlushes ? 'f' : 'd',
      bitsSet: device.outOfSyncBits,
      ...(isSyncOrVerify(state.connection) ? { progress: this.progress(device) } : {}),
    };
  }

  private progress(device: Device): ProcProgress {
    const { resync } = device;
    const now = this.nowMs;
    const marks = Array.from(resync.markMs, (markMs, index) => ({
      leftBits: resync.markLeft[index]!,
      ageSeconds: Math.floor((now - markMs) / 1000),
    }));
    const isTarget = device.state.connection === ConnectionState.SyncTarget;
    return {
      totalBits: resync.totalBits,
      failedBits: resync.failedBits,
      verifyLeftBits: 0,
      marks,
      lastMark: resync.lastMark,
      runningSeconds: Math.floor((now - resync.startedMs - resync.pausedMs) / 1000),
      wantedKibPerSecond: isTarget ? resync.wantedKibPerSecond : 0,
    };
  }
}

/** A socket whose purpose is still being found out. */
class EstablishingSocket implements ConnectionHandler {
  constructor(
    private readonly runtime: ResourceRuntime,
    private readonly socket: number,
    readonly connection: Connection,
  ) {}

  frame(_header: DataView, _headerOffset: number, _headerLength: number, payload: number, length: number): void {
    this.runtime.received(this.socket, payload, length);
  }

  closed(): void {
    this.runtime.socketClosed(this.socket);
  }

  drained(): void {}
}
