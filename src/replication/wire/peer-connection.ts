import { createHmac, timingSafeEqual } from 'node:crypto';
import { assert } from '../../base/assert.js';
import { ProtocolError } from '../../base/errors.js';
import { decodeFeatures, decodeHeader, encodeAuth, encodeFeatures, encodeInitial, PacketScratch } from './codec.js';
import {
  FEATURES_ALL,
  P_AUTH_CHALLENGE,
  P_AUTH_RESPONSE,
  P_CONNECTION_FEATURES,
  P_INITIAL_DATA,
  P_INITIAL_META,
  PROTOCOL_VERSION_MAX,
  PROTOCOL_VERSION_MIN,
  packetName,
} from './packets.js';

/**
 * How two nodes that dial each other end up with two agreed TCP connections, a protocol version and (optionally) proof
 * that both know the shared secret. A pure machine: sockets are numbers, time is passed in, bytes are arrays.
 *
 * Both nodes listen and dial. The first packet on a connection says what it is for; a node that has one connection
 * makes the other. When both dial at once ("crossed"), one connection of the two must go; drbd.ko closes its own, so we
 * keep ours or take theirs by a coin flip: against drbd.ko heads settles it, between two of us each crossing is settled
 * with probability one half, and random waits keep the next dials apart.
 *
 * @see DRBD 8.4 drbd_receiver.c conn_connect, drbd_do_features, drbd_do_auth
 */

/** Chance, injected so that a simulation can repeat it. */
export interface Chance {
  /** Uniform in [0, 1). */
  fraction(): number;
  /** Unpredictable bytes for challenges. */
  bytes(count: number): Uint8Array;
}

/** Shared-secret authentication: `cram-hmac-alg` and `shared-secret`. */
export interface Authentication {
  /** One of AUTH_DIGEST_BYTES. */
  readonly algorithm: string;
  readonly secret: string;
}

/** Kernel names of the hashes that `cram-hmac-alg` may name, and their size in bytes. */
export const AUTH_DIGEST_BYTES: Readonly<Record<string, number>> = {
  md5: 16,
  sha1: 20,
  sha224: 28,
  sha256: 32,
  sha384: 48,
  sha512: 64,
};

export interface PeerConnectionOptions {
  /** connect-int: how long a dial may take, and how long to wait for the peer between dials (plus or minus 1/7). */
  readonly connectIntervalMs: number;
  /** ping-timeout; four times that is how long the peer may take for each answer of the handshake. */
  readonly pingTimeoutMs: number;
  /** socket-check-timeout, or ping-timeout where that is 0: how long both connections must have stood. */
  readonly socketCheckMs: number;
  /** FEATURE_* to announce; default all. */
  readonly features?: number;
  readonly authentication?: Authentication;
}

/** What the driver must do, in order. A closed socket is reported no more. */
export type PeerConnectionEffect =
  /** Accept connections on the own address, until `stopListening`. */
  | { readonly kind: 'listen' }
  | { readonly kind: 'stopListening' }
  /** Connect to the peer; answer with `dialed` or `dialFailed`. At most one is under way. */
  | { readonly kind: 'dial'; readonly timeoutMs: number }
  | { readonly kind: 'send'; readonly socket: number; readonly bytes: Uint8Array }
  | { readonly kind: 'close'; readonly socket: number }
  /**
   * Both sockets are the caller's now, in the agreed format (header100). `unconsumed*` are bytes already received that
   * belong to what follows. `resolveConflicts`: this node wins ties; the peer has the opposite.
   */
  | {
      readonly kind: 'established';
      readonly data: number;
      readonly meta: number;
      readonly version: number;
      readonly features: number;
      readonly resolveConflicts: boolean;
      readonly unconsumedData: Uint8Array;
      readonly unconsumedMeta: Uint8Array;
    }
  /** Everything was closed. With `retry` the next attempt starts by itself after a second; without, go StandAlone. */
  | { readonly kind: 'attemptFailed'; readonly retry: boolean; readonly reason: string };

const CHALLENGE_BYTES = 64;
const CHALLENGE_BYTES_MAX = 128;
const RETRY_DELAY_MS = 1000;
/** Accepted connections whose first packet is awaited; as many as drbd.ko has backlog. */
const PENDING_MAX = 5;
/** What a peer may have sent before it has heard our answer; more is not DRBD. */
const EARLY_BYTES_MAX = 64 * 1024;
const NO_BYTES = new Uint8Array(0);

/** One TCP connection as the machine sees it. */
interface Socket {
  readonly id: number;
  /** We dialed it. */
  readonly isOutgoing: boolean;
  /** Received and not yet understood. */
  bytes: Uint8Array;
  /** For an accepted one: when its first packet must be here. */
  readonly deadlineMs: number;
}

type Phase = 'idle' | 'connecting' | 'features' | 'challenge' | 'response' | 'pausing';

function concatenate(left: Uint8Array, right: Uint8Array): Uint8Array {
  const both = new Uint8Array(left.length + right.length);
  both.set(left);
  both.set(right, left.length);
  return both;
}

/** One packet cut off the front of received bytes. */
interface EarlyPacket {
  readonly format: 80 | 95 | 100;
  readonly command: number;
  readonly payload: Uint8Array;
  readonly rest: Uint8Array;
}

/** @returns undefined while incomplete. @throws ProtocolError for a bad header */
function cutPacket(bytes: Uint8Array): EarlyPacket | undefined {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const header = decodeHeader(view, 0, bytes.length);
  if (header === undefined) return undefined;
  if (header.length > CHALLENGE_BYTES_MAX)
    return { format: header.format, command: header.command, payload: NO_BYTES, rest: NO_BYTES };
  const end = header.headerBytes + header.length;
  if (bytes.length < end) return undefined;
  return {
    format: header.format,
    command: header.command,
    payload: bytes.subarray(header.headerBytes, end),
    rest: bytes.subarray(end),
  };
}

/** The establishment of one connection to the peer; see the head of this file. */
export class PeerConnection {
  private phase: Phase = 'idle';
  private effects: PeerConnectionEffect[] = [];
  private readonly scratch = new PacketScratch();
  private nowMs = 0;

  private data: Socket | undefined;
  private meta: Socket | undefined;
  private pending: Socket[] = [];
  private isListening = false;
  private isDialing = false;
  /** connecting, one socket missing: when to dial again. */
  private dialAtMs = 0;
  /** connecting, both sockets there: since when they must have stood. features .. response: when to give up. */
  private deadlineMs = 0;

  private version = 0;
  private features = 0;
  private ownChallenge: Uint8Array = NO_BYTES;

  constructor(
    private readonly options: PeerConnectionOptions,
    private readonly chance: Chance,
  ) {
    const algorithm = options.authentication?.algorithm;
    assert(algorithm === undefined || algorithm in AUTH_DIGEST_BYTES, `cram-hmac-alg ${algorithm} was checked before`);
  }

  /** Hands over the effects due since the last call, oldest first. */
  takeEffects(): readonly PeerConnectionEffect[] {
    const due = this.effects;
    this.effects = [];
    return due;
  }

  /** An attempt is under way (WFConnection). */
  get isActive(): boolean {
    return this.phase !== 'idle';
  }

  /** Starts connecting; attempts repeat until one is established, fails for good, or `stop`. */
  start(nowMs: number): void {
    assert(this.phase === 'idle', 'one establishment at a time');
    this.nowMs = nowMs;
    this.beginAttempt();
  }

  /** Closes everything and does nothing more. */
  stop(): void {
    this.closeAll();
    this.phase = 'idle';
  }

  /** Time passes. Call every 100 ms or so. */
  tick(nowMs: number): void {
    this.nowMs = nowMs;
    for (const socket of this.pending.filter((candidate) => nowMs >= candidate.deadlineMs)) this.dropPending(socket);
    switch (this.phase) {
      case 'connecting':
        if (this.data !== undefined && this.meta !== undefined) {
          if (nowMs >= this.deadlineMs) this.beginHandshake();
        } else if (nowMs >= this.dialAtMs) this.dial();
        break;
      case 'features':
      case 'challenge':
      case 'response':
        if (nowMs >= this.deadlineMs) this.failAttempt(true, `the peer did not answer (${this.phase})`);
        break;
      case 'pausing':
        if (nowMs >= this.deadlineMs) this.beginAttempt();
        break;
      case 'idle':
        break;
    }
  }

  /** The dial succeeded. What the connection is for is decided now, by what is missing now. */
  dialed(socket: number, nowMs: number): void {
    this.nowMs = nowMs;
    this.isDialing = false;
    const connection: Socket = { id: socket, isOutgoing: true, bytes: NO_BYTES, deadlineMs: 0 };
    if (this.phase !== 'connecting' || (this.data !== undefined && this.meta !== undefined)) {
      this.close(connection);
    } else if (this.data === undefined) {
      this.data = connection;
      this.send(connection, encodeInitial(this.scratch, P_INITIAL_DATA));
      this.afterSocketChange();
    } else {
      this.meta = connection;
      this.send(connection, encodeInitial(this.scratch, P_INITIAL_META));
      this.afterSocketChange();
    }
  }

  /**
   * The dial failed. drbd.ko gives up for good on errors such as an address that cannot be bound; we try again, because
   * an interface that is not up yet comes up.
   */
  dialFailed(nowMs: number): void {
    this.nowMs = nowMs;
    this.isDialing = false;
    if (this.phase === 'connecting') this.waitForPeer();
  }

  /** A connection came in. */
  accepted(socket: number, nowMs: number): void {
    this.nowMs = nowMs;
    const deadlineMs = nowMs + 4 * this.options.pingTimeoutMs;
    const connection: Socket = { id: socket, isOutgoing: false, bytes: NO_BYTES, deadlineMs };
    if (this.phase !== 'connecting') {
      this.close(connection);
      return;
    }
    // Whoever connects and says nothing must not keep the peer out.
    if (this.pending.length === PENDING_MAX) this.dropPending(this.pending[0]!);
    this.pending.push(connection);
  }

  /** Bytes arrived on a socket that is still ours. They are copied if kept. */
  received(socket: number, bytes: Uint8Array, nowMs: number): void {
    this.nowMs = nowMs;
    const connection = this.find(socket);
    if (connection === undefined) return;
    if (connection.bytes.length + bytes.length > EARLY_BYTES_MAX) {
      if (this.pending.includes(connection)) this.dropPending(connection);
      else this.failAttempt(true, 'the peer sent more than a handshake before the handshake');
      return;
    }
    connection.bytes = concatenate(connection.bytes, bytes);
    if (this.pending.includes(connection)) this.judgeFirstPacket(connection);
    else if (connection === this.data) this.advance();
  }

  /** The socket was closed by the peer or the network. */
  closed(socket: number, nowMs: number): void {
    this.nowMs = nowMs;
    const connection = this.find(socket);
    if (connection === undefined) return;
    this.pending = this.pending.filter((candidate) => candidate !== connection);
    if (connection !== this.data && connection !== this.meta) return;
    if (connection === this.data) this.data = undefined;
    else this.meta = undefined;
    if (this.phase === 'connecting') this.waitAfterCrossing();
    else this.failAttempt(true, 'the peer closed the connection');
  }

  // -------------------------------------------------------------------------------------------------------------------
  // Two sockets

  private find(socket: number): Socket | undefined {
    if (this.data?.id === socket) return this.data;
    if (this.meta?.id === socket) return this.meta;
    return this.pending.find((candidate) => candidate.id === socket);
  }

  private beginAttempt(): void {
    this.phase = 'connecting';
    this.isListening = true;
    this.effects.push({ kind: 'listen' });
    this.dial();
  }

  private dial(): void {
    if (this.isDialing) return;
    this.isDialing = true;
    this.effects.push({ kind: 'dial', timeoutMs: this.options.connectIntervalMs });
  }

  /** The passive step: a whole interval, so that two nodes do not go on dialing in step. */
  private waitForPeer(): void {
    const sign = this.chance.fraction() < 0.5 ? -1 : 1;
    this.dialAtMs = this.nowMs + Math.round(this.options.connectIntervalMs * (1 + sign / 7));
  }

  /** A short random wait: both nodes are there and must not dial in step again. */
  private waitAfterCrossing(): void {
    this.dialAtMs = this.nowMs + Math.round(this.options.pingTimeoutMs * this.chance.fraction());
  }

  /** A socket was gained: both there, or the other one is to come. */
  private afterSocketChange(): void {
    if (this.data !== undefined && this.meta !== undefined) {
      this.deadlineMs = this.nowMs + this.options.socketCheckMs;
      this.advance();
    } else this.waitForPeer();
  }

  private judgeFirstPacket(connection: Socket): void {
    let packet: EarlyPacket | undefined;
    try {
      packet = cutPacket(connection.bytes);
    } catch (error) {
      if (!(error instanceof ProtocolError)) throw error;
      this.dropPending(connection);
      return;
    }
    if (packet === undefined) return;
    const isInitial = packet.command === P_INITIAL_DATA || packet.command === P_INITIAL_META;
    if (packet.format !== 80 || !isInitial || packet.payload.length > 0) {
      this.dropPending(connection);
      return;
    }
    this.pending = this.pending.filter((candidate) => candidate !== connection);
    connection.bytes = packet.rest;
    const existing = packet.command === P_INITIAL_DATA ? this.data : this.meta;
    if (existing?.isOutgoing && this.chance.fraction() < 0.5) {
      this.close(connection);
      if (this.data === undefined || this.meta === undefined) this.waitAfterCrossing();
      return;
    }
    // A second one from the peer means that it gave the first one up.
    if (existing !== undefined) this.close(existing);
    if (packet.command === P_INITIAL_DATA) this.data = connection;
    else this.meta = connection;
    this.afterSocketChange();
    // The peer waits for us to make the other one; a dial under way will become it.
    if (this.data === undefined || this.meta === undefined) this.dial();
  }

  private dropPending(socket: Socket): void {
    this.pending = this.pending.filter((candidate) => candidate !== socket);
    this.close(socket);
  }

  private close(socket: Socket): void {
    this.effects.push({ kind: 'close', socket: socket.id });
  }

  private closeAll(): void {
    for (const socket of this.pending) this.close(socket);
    this.pending = [];
    if (this.data !== undefined) this.close(this.data);
    if (this.meta !== undefined) this.close(this.meta);
    this.data = undefined;
    this.meta = undefined;
    if (this.isListening) this.effects.push({ kind: 'stopListening' });
    this.isListening = false;
  }

  private failAttempt(retry: boolean, reason: string): void {
    this.closeAll();
    this.effects.push({ kind: 'attemptFailed', retry, reason });
    this.phase = retry ? 'pausing' : 'idle';
    this.deadlineMs = this.nowMs + RETRY_DELAY_MS;
  }

  // -------------------------------------------------------------------------------------------------------------------
  // Features and authentication, on the data socket

  private send(socket: Socket, length: number): void {
    this.effects.push({ kind: 'send', socket: socket.id, bytes: this.scratch.bytes.slice(0, length) });
  }

  private beginHandshake(): void {
    for (const socket of this.pending) this.close(socket);
    this.pending = [];
    this.isListening = false;
    this.effects.push({ kind: 'stopListening' });
    const features = this.options.features ?? FEATURES_ALL;
    const length = encodeFeatures(this.scratch, {
      versionMin: PROTOCOL_VERSION_MIN,
      versionMax: PROTOCOL_VERSION_MAX,
      features,
    });
    this.send(this.data!, length);
    this.enter('features');
    this.advance();
  }

  private enter(phase: 'features' | 'challenge' | 'response'): void {
    this.phase = phase;
    this.deadlineMs = this.nowMs + 4 * this.options.pingTimeoutMs;
  }

  /** Takes as many packets off the data socket as the handshake is ready for. */
  private advance(): void {
    // A peer that sends its features has seen both sockets stand: no need to go on watching them.
    if (this.phase === 'connecting' && this.meta !== undefined && this.data !== undefined && this.data.bytes.length > 0)
      this.beginHandshake();
    while (this.phase === 'features' || this.phase === 'challenge' || this.phase === 'response') {
      const socket = this.data!;
      let packet: EarlyPacket | undefined;
      try {
        packet = cutPacket(socket.bytes);
        if (packet === undefined) return;
        socket.bytes = packet.rest;
        if (this.phase === 'features') this.receiveFeatures(packet);
        else if (this.phase === 'challenge') this.receiveChallenge(packet);
        else this.receiveResponse(packet);
      } catch (error) {
        if (!(error instanceof ProtocolError)) throw error;
        this.failAttempt(true, error.message);
      }
    }
  }

  /**
   * Anything but features fails the attempt only; drbd.ko goes StandAlone, but then a stray connection from a port
   * scanner could end replication.
   */
  private receiveFeatures(packet: EarlyPacket): void {
    if (packet.format !== 80 || packet.command !== P_CONNECTION_FEATURES) {
      this.failAttempt(true, `expected P_CONNECTION_FEATURES, received ${packetName(packet.command)}`);
      return;
    }
    const { payload } = packet;
    const peer = decodeFeatures(
      new DataView(payload.buffer, payload.byteOffset, payload.byteLength),
      0,
      payload.byteLength,
    );
    if (PROTOCOL_VERSION_MAX < peer.versionMin || PROTOCOL_VERSION_MIN > peer.versionMax) {
      this.failAttempt(
        false,
        `incompatible DRBD dialects: I support ${PROTOCOL_VERSION_MIN}-${PROTOCOL_VERSION_MAX}, ` +
          `peer supports ${peer.versionMin}-${peer.versionMax}`,
      );
      return;
    }
    this.version = Math.min(PROTOCOL_VERSION_MAX, peer.versionMax);
    this.features = ((this.options.features ?? FEATURES_ALL) & peer.features) >>> 0;
    if (this.options.authentication === undefined) {
      this.establish();
      return;
    }
    this.ownChallenge = this.chance.bytes(CHALLENGE_BYTES);
    assert(this.ownChallenge.length === CHALLENGE_BYTES, 'as many bytes as asked for');
    this.send(this.data!, encodeAuth(this.scratch, P_AUTH_CHALLENGE, this.ownChallenge));
    this.enter('challenge');
  }

  private receiveChallenge(packet: EarlyPacket): void {
    const { payload } = packet;
    if (packet.format !== 100 || packet.command !== P_AUTH_CHALLENGE || payload.length < CHALLENGE_BYTES) {
      this.failAttempt(false, `expected P_AUTH_CHALLENGE, received ${packetName(packet.command)}`);
      return;
    }
    // Someone who mirrors our challenge wants us to compute the answer.
    if (timingSafeEqual(payload.subarray(0, CHALLENGE_BYTES), this.ownChallenge)) {
      this.failAttempt(false, 'the peer presented our own challenge');
      return;
    }
    this.send(this.data!, encodeAuth(this.scratch, P_AUTH_RESPONSE, this.digest(payload)));
    this.enter('response');
  }

  private receiveResponse(packet: EarlyPacket): void {
    const expected = this.digest(this.ownChallenge);
    const { payload } = packet;
    if (packet.format !== 100 || packet.command !== P_AUTH_RESPONSE || payload.length !== expected.length) {
      this.failAttempt(true, `expected P_AUTH_RESPONSE, received ${packetName(packet.command)}`);
      return;
    }
    if (!timingSafeEqual(payload, expected)) {
      this.failAttempt(false, 'Authentication of peer failed');
      return;
    }
    this.establish();
  }

  private digest(message: Uint8Array): Uint8Array {
    const { algorithm, secret } = this.options.authentication!;
    return createHmac(algorithm, secret).update(message).digest();
  }

  private establish(): void {
    const data = this.data!;
    const meta = this.meta!;
    this.data = undefined;
    this.meta = undefined;
    this.phase = 'idle';
    this.effects.push({
      kind: 'established',
      data: data.id,
      meta: meta.id,
      version: this.version,
      features: this.features,
      resolveConflicts: !meta.isOutgoing,
      unconsumedData: data.bytes,
      unconsumedMeta: meta.bytes,
    });
  }
}
