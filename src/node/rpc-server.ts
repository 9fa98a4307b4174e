/**
 * RPC over the doors: TCP through the ring (which cuts records), UDP through node:dgram for the small programs. All
 * protocol is in `rpc/`; here is who may connect, how much one client may have in flight, and where records live.
 */
import { createSocket, type RemoteInfo, type Socket } from 'node:dgram';
import { assert } from '../base/assert.js';
import {
  type Connection,
  type ConnectionHandler,
  type Listener,
  MAX_INLINE_BYTES,
  type Memory,
  NO_PAYLOAD,
  type Ring,
  SEND_QUEUE_LIMIT_BYTES,
} from '../io/ring.js';
import { CredentialCache } from '../rpc/auth.js';
import { type Dispatcher, REPLY_ROOM_BYTES, type RpcTransport } from '../rpc/dispatcher.js';
import { LAST_FRAGMENT } from '../rpc/record-marking.js';
import type { XdrWriter } from '../rpc/xdr.js';

/** One client may have this much in flight; then its connection is not read until something is answered. */
export const MAX_IN_FLIGHT_CALLS = 128;
export const MAX_IN_FLIGHT_BYTES = 32 * 1024 * 1024;
/** A record in thousands of pieces is an attack on the processor. */
const MAX_FRAGMENTS = 1024;
const MAX_CONNECTIONS = 2048;
const MAX_CONNECTIONS_PER_ADDRESS = 256;
/**
 * Clients close idle connections after about five minutes themselves; this is for those that vanished (sunrpc: 360 s).
 */
const IDLE_TIMEOUT_MS = 360_000;
/** A client that does not read its replies for this long is gone. */
const SEND_STALL_TIMEOUT_MS = 120_000;
/** Records that are no calls, before a connection is closed. */
const MAX_MALFORMED = 3;
/** Longest UDP reply; more than that is for TCP. */
const MAX_DATAGRAM_BYTES = 8192;
const MAX_UDP_CALLS = 256;

/** `10.0.0.1:4711`, `[fe80::1]:4711` → address and port; an IPv4 address in IPv6 clothes becomes IPv4. */
export function parsePeer(peer: string): { readonly address: string; readonly port: number } {
  const colon = peer.lastIndexOf(':');
  const host = peer.slice(0, colon).replace(/^\[|\]$/g, '');
  return { address: plainAddress(host), port: Number(peer.slice(colon + 1)) };
}

function plainAddress(host: string): string {
  return /^::ffff:\d+\.\d+\.\d+\.\d+$/i.test(host) ? host.slice(7) : host;
}

class RpcConnection implements ConnectionHandler, RpcTransport {
  readonly kind = 'tcp';
  readonly address: string;
  readonly port: number;
  readonly credentials = new CredentialCache();
  isOpen = true;
  private inFlightCalls = 0;
  private inFlightBytes = 0;
  private isPaused = false;
  private malformedRecords = 0;
  private lastFrameMs: number;
  /** Since when the send queue has not become shorter. */
  private stalledSinceMs: number;
  private lastQueuedBytes = 0;

  constructor(
    private readonly server: RpcServer,
    private readonly dispatcher: Dispatcher,
    readonly connection: Connection,
    private readonly memory: Memory,
    nowMs: number,
  ) {
    const { address, port } = parsePeer(connection.peer);
    this.address = address;
    this.port = port;
    this.lastFrameMs = nowMs;
    this.stalledSinceMs = nowMs;
  }

  frame(_header: DataView, _headerOffset: number, _headerLength: number, payload: number, length: number): void {
    this.lastFrameMs = this.server.nowMs;
    if (payload === NO_PAYLOAD) {
      this.malformed('an empty record');
      return;
    }
    this.inFlightCalls++;
    this.inFlightBytes += length;
    this.regulate();
    this.dispatcher.dispatch(this, this.memory.bytes, this.memory.view, payload, length, payload);
  }

  send(reply: XdrWriter): void {
    const { payload } = reply;
    if (this.isOpen) {
      const { bytes, length } = reply;
      const recordBytes = length - REPLY_ROOM_BYTES + reply.payloadLength;
      reply.patchU32(0, LAST_FRAGMENT + recordBytes);
      if (length <= MAX_INLINE_BYTES) this.connection.send(bytes, length, payload, reply.payloadLength);
      else {
        assert(payload === NO_PAYLOAD, 'a reply with a payload has a short header');
        this.connection.sendBytes(bytes.subarray(0, length));
      }
      this.regulate();
    }
    if (payload !== NO_PAYLOAD) this.memory.release(payload);
  }

  finished(record: number, lengthBytes: number): void {
    this.memory.release(record);
    this.inFlightCalls--;
    this.inFlightBytes -= lengthBytes;
    this.regulate();
  }

  malformed(reason: string): void {
    this.server.observer.malformed(this.connection.peer, reason);
    if (++this.malformedRecords >= MAX_MALFORMED) this.close();
  }

  closed(_errno: number): void {
    this.isOpen = false;
    this.server.forget(this);
  }

  drained(): void {
    this.regulate();
  }

  close(): void {
    this.isOpen = false;
    this.connection.close();
  }

  /** Stops reading while too much is in flight or unsent, and starts again when it is not. */
  private regulate(): void {
    if (!this.isOpen) return;
    const isFull =
      this.inFlightCalls >= MAX_IN_FLIGHT_CALLS ||
      this.inFlightBytes >= MAX_IN_FLIGHT_BYTES ||
      this.connection.queuedBytes > SEND_QUEUE_LIMIT_BYTES;
    if (isFull === this.isPaused) return;
    this.isPaused = isFull;
    if (isFull) this.connection.pause();
    else this.connection.resume();
  }

  tick(nowMs: number): void {
    const { queuedBytes } = this.connection;
    if (queuedBytes === 0 || queuedBytes < this.lastQueuedBytes) this.stalledSinceMs = nowMs;
    this.lastQueuedBytes = queuedBytes;
    const isIdle = this.inFlightCalls === 0 && nowMs - this.lastFrameMs > IDLE_TIMEOUT_MS;
    if (isIdle || nowMs - this.stalledSinceMs > SEND_STALL_TIMEOUT_MS) this.close();
    // A ring may report a drained queue only once; look again in case replies left between two looks.
    else this.regulate();
  }
}

/** What a server tells its owner, for the log. */
export interface RpcObserver {
  malformed(peer: string, reason: string): void;
  refused(peer: string, reason: string): void;
}

/** Reply by datagram. One per received datagram. */
class DatagramTransport implements RpcTransport {
  readonly kind = 'udp';
  readonly address: string;
  readonly port: number;
  readonly isOpen = true;

  constructor(
    private readonly endpoint: DatagramEndpoint,
    private readonly remote: RemoteInfo,
    readonly credentials: CredentialCache,
  ) {
    this.address = plainAddress(remote.address);
    this.port = remote.port;
  }

  send(reply: XdrWriter): void {
    assert(reply.payload === NO_PAYLOAD, 'datagrams have no payload');
    if (reply.length > MAX_DATAGRAM_BYTES) return;
    this.endpoint.send(reply.bytes.slice(REPLY_ROOM_BYTES, reply.length), this.remote);
  }

  finished(): void {
    this.endpoint.calls--;
  }

  malformed(): void {
    // A datagram has no connection to close, and logging it would let anybody fill the disk.
  }
}

class DatagramEndpoint {
  calls = 0;
  private readonly credentials = new CredentialCache();

  constructor(
    readonly socket: Socket,
    dispatcher: Dispatcher,
  ) {
    socket.on('message', (message, remote) => {
      if (this.calls >= MAX_UDP_CALLS) return;
      this.calls++;
      const view = new DataView(message.buffer, message.byteOffset, message.length);
      const transport = new DatagramTransport(this, remote, this.credentials);
      dispatcher.dispatch(transport, message, view, 0, message.length, NO_PAYLOAD);
    });
  }

  send(bytes: Uint8Array, remote: RemoteInfo): void {
    // A reply that cannot leave is a lost datagram: the client asks again.
    this.socket.send(bytes, remote.port, remote.address, () => {});
  }
}

/** Listeners, connections and datagram sockets of one process. */
export class RpcServer {
  nowMs = 0;
  private readonly connections = new Set<RpcConnection>();
  private readonly listeners: Listener[] = [];
  private readonly sockets: Socket[] = [];

  constructor(
    private readonly ring: Pick<Ring, 'listenTcp' | 'memory'>,
    private readonly maxRecordBytes: number,
    readonly observer: RpcObserver,
  ) {}

  get connectionCount(): number {
    return this.connections.size;
  }

  /** @returns the bound port. @throws Error with `errno` when the address cannot be bound */
  listenTcp(host: string, port: number, dispatcher: Dispatcher): number {
    const listener = this.ring.listenTcp(host, port, (connection) => this.accept(connection, dispatcher));
    this.listeners.push(listener);
    return listener.port;
  }

  listenUdp(host: string, port: number, dispatcher: Dispatcher): Promise<number> {
    return new Promise((resolve, reject) => {
      const socket = createSocket(host.includes(':') ? 'udp6' : 'udp4');
      socket.once('error', reject);
      socket.bind(port, host, () => {
        socket.off('error', reject);
        // A peer's ICMP "port unreachable" is reported here; it concerns one reply that nobody waits for.
        socket.on('error', (error) => this.observer.refused(`udp ${host}:${port}`, error.message));
        new DatagramEndpoint(socket, dispatcher);
        this.sockets.push(socket);
        resolve(socket.address().port);
      });
    });
  }

  /** Tells the time (monotonic milliseconds) and ends what is idle or stuck: about once a second. */
  tick(nowMs: number): void {
    this.nowMs = nowMs;
    for (const connection of this.connections) connection.tick(nowMs);
  }

  /**
   * Ends every connection at once. After the address moved to the other head, old connections would only disturb: their
   * sequence numbers make no sense when the address comes back.
   */
  dropConnections(): number {
    const dropped = this.connections.size;
    for (const connection of this.connections) connection.close();
    return dropped;
  }

  close(): void {
    for (const listener of this.listeners.splice(0)) listener.close();
    for (const socket of this.sockets.splice(0)) socket.close();
    this.dropConnections();
  }

  forget(connection: RpcConnection): void {
    this.connections.delete(connection);
  }

  private accept(connection: Connection, dispatcher: Dispatcher): void {
    const made = new RpcConnection(this, dispatcher, connection, this.ring.memory, this.nowMs);
    connection.setHandler(made);
    let sameAddress = 0;
    for (const other of this.connections) if (other.address === made.address) sameAddress++;
    if (this.connections.size >= MAX_CONNECTIONS || sameAddress >= MAX_CONNECTIONS_PER_ADDRESS) {
      this.observer.refused(connection.peer, 'too many connections');
      made.close();
      return;
    }
    this.connections.add(made);
    connection.setFraming({ kind: 'record', maxRecordBytes: this.maxRecordBytes, maxFragments: MAX_FRAGMENTS });
  }
}
