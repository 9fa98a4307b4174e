import { assert } from '../../src/base/assert.js';
import { Errno } from '../../src/base/errors.js';
import {
  type Connection,
  type ConnectionHandler,
  FRAME_SKIPPED,
  type FrameRule,
  type Listener,
  type ListenOptions,
  MAX_INLINE_BYTES,
  type Network,
  NO_PAYLOAD,
  SEND_QUEUE_LIMIT_BYTES,
} from '../../src/io/ring.js';
import type { SimMemory } from './memory.js';
import type { Prng } from './prng.js';
import type { Owner, World } from './world.js';

const ECONNREFUSED = 111;
/** What a kernel takes from a sender while the receiver does not read. */
const WINDOW_BYTES = 256 * 1024;
const RAW_CHUNK_BYTES = 65536;

/** One direction between two hosts. Down means silence: nothing is lost, nothing arrives, until it is up again. */
export class Wire {
  up = true;
  private readonly waiting: (() => void)[] = [];

  constructor(
    private readonly world: World,
    private readonly prng: Prng,
    private minimumMs: number,
    private maximumMs: number,
    readonly bytesPerMs: number,
  ) {}

  latency(): number {
    const spread = this.prng.unit();
    return this.minimumMs + (this.maximumMs - this.minimumMs) * spread * spread;
  }

  /** Carries something across; it arrives after the latency, or after the wire has come back. */
  carry(arrive: () => void, notBeforeMs = 0): number {
    const atMs = Math.max(notBeforeMs, this.world.nowMs + this.latency());
    this.world.after(atMs - this.world.nowMs, undefined, () => {
      if (this.up && this.waiting.length === 0) arrive();
      else this.waiting.push(arrive);
    });
    return atMs;
  }

  setUp(up: boolean): void {
    this.up = up;
    if (!up) return;
    for (const arrive of this.waiting.splice(0)) this.world.after(0, undefined, arrive);
  }
}

/** The cables between hosts, and who listens where. */
export class Fabric {
  private readonly wires = new Map<string, Wire>();
  readonly listeners = new Map<string, { owner: Owner; accept: (remote: Endpoint) => void }>();
  /** Hears every message as it is queued: who sends it, its header and inline bytes, and how much payload follows. */
  tap: (host: string, bytes: Uint8Array, payloadLength: number) => void = () => {};
  /** Endpoints by host, to reset them when a host comes back. */
  private readonly endpoints = new Set<Endpoint>();

  constructor(
    readonly world: World,
    private readonly prng: Prng,
    private readonly timing: { minimumMs: number; maximumMs: number; bytesPerMs: number },
  ) {}

  wire(from: string, to: string): Wire {
    const key = `${from}>${to}`;
    let wire = this.wires.get(key);
    if (!wire) {
      const { minimumMs, maximumMs, bytesPerMs } = this.timing;
      wire = new Wire(this.world, this.prng.fork(), minimumMs, maximumMs, bytesPerMs);
      this.wires.set(key, wire);
    }
    return wire;
  }

  add(endpoint: Endpoint): void {
    this.endpoints.add(endpoint);
  }

  drop(endpoint: Endpoint): void {
    this.endpoints.delete(endpoint);
  }

  /** A firewall or a switch resets every connection. */
  resetConnections(): void {
    for (const endpoint of [...this.endpoints]) endpoint.lost(Errno.ECONNRESET);
  }

  /** A host's kernel is new: whoever still talks to the old one is told so. */
  resetHost(host: string): void {
    for (const endpoint of [...this.endpoints]) {
      if (endpoint.host !== host) continue;
      this.endpoints.delete(endpoint);
      const peer = endpoint.remote;
      if (peer && !peer.isClosed) this.wire(host, peer.host).carry(() => peer.lost(Errno.ECONNRESET));
    }
  }
}

/** The network as one process sees it. */
export class SimNetwork implements Network {
  constructor(
    private readonly fabric: Fabric,
    private readonly host: string,
    private readonly owner: Owner,
    private readonly memory: SimMemory,
    private readonly prng: Prng,
  ) {}

  listenTcp(
    _host: string,
    port: number,
    accepted: (connection: Connection) => void,
    _options?: ListenOptions,
  ): Listener {
    const key = `${this.host}:${port}`;
    const existing = this.fabric.listeners.get(key);
    if (existing?.owner.alive) throw Object.assign(new Error(`address ${key} in use`), { errno: 98 });
    const entry = {
      owner: this.owner,
      accept: (remote: Endpoint) => {
        const endpoint = this.endpoint(remote.host);
        endpoint.join(remote);
        accepted(endpoint);
      },
    };
    this.fabric.listeners.set(key, entry);
    return {
      port,
      close: () => {
        if (this.fabric.listeners.get(key) === entry) this.fabric.listeners.delete(key);
      },
    };
  }

  listenUnix(): Listener {
    throw new Error('the simulator has no Unix sockets');
  }

  connectUnix(): void {
    throw new Error('the simulator has no Unix sockets');
  }

  connectTcp(
    host: string,
    port: number,
    options: ListenOptions & { readonly localHost?: string; readonly timeoutMs: number },
    connected: (connection: Connection | undefined, errno: number) => void,
  ): void {
    const world = this.fabric.world;
    const there = this.fabric.wire(this.host, host);
    const back = this.fabric.wire(host, this.host);
    let answered = false;
    const answer = (connection: Endpoint | undefined, errno: number) => {
      if (answered) {
        connection?.close();
        return;
      }
      answered = true;
      if (this.owner.alive) connected(connection, errno);
    };
    world.after(options.timeoutMs, this.owner, () => answer(undefined, Errno.ETIMEDOUT));
    there.carry(() => {
      const listener = this.fabric.listeners.get(`${host}:${port}`);
      if (!listener?.owner.alive || !this.owner.alive || answered) {
        back.carry(() => answer(undefined, ECONNREFUSED));
        return;
      }
      const mine = this.endpoint(host);
      listener.accept(mine);
      back.carry(() => answer(mine, 0));
    });
  }

  private endpoint(remoteHost: string): Endpoint {
    const endpoint = new Endpoint(this.fabric, this.host, remoteHost, this.owner, this.memory, this.prng.fork());
    this.fabric.add(endpoint);
    return endpoint;
  }
}

interface Queued {
  readonly bytes: Uint8Array;
  readonly payload: number;
  readonly payloadLength: number;
}

/** One end of a stream. */
export class Endpoint implements Connection {
  remote: Endpoint | undefined;
  queuedBytes = 0;
  isClosed = false;
  private handler: ConnectionHandler | undefined;
  private framing: FrameRule = { kind: 'raw' };
  private readonly out: Queued[] = [];
  private pumping = false;
  private ending = false;
  private wasFull = false;
  /** Taken by this side's kernel, not yet read by the other side's process. */
  private unread = 0;
  private lastArrivalMs = 0;
  private received = new Uint8Array(4096);
  private start = 0;
  private end_ = 0;
  private paused = false;
  private parsing = false;
  private gone: number | undefined;
  private readonly header = new DataView(new ArrayBuffer(MAX_INLINE_BYTES + 8));

  constructor(
    private readonly fabric: Fabric,
    readonly host: string,
    readonly remoteHost: string,
    private readonly owner: Owner,
    private readonly memory: SimMemory,
    private readonly prng: Prng,
  ) {}

  get peer(): string {
    return `${this.remoteHost}:0`;
  }

  join(remote: Endpoint): void {
    this.remote = remote;
    remote.remote = this;
  }

  setHandler(handler: ConnectionHandler): void {
    this.handler = handler;
    this.parseSoon();
  }

  setFraming(rule: FrameRule, unconsumed?: Uint8Array): void {
    this.framing = rule;
    if (unconsumed && unconsumed.length > 0) {
      const rest = this.received.subarray(this.start, this.end_);
      const joined = new Uint8Array(unconsumed.length + rest.length + 4096);
      joined.set(unconsumed);
      joined.set(rest, unconsumed.length);
      this.end_ = unconsumed.length + rest.length;
      this.start = 0;
      this.received = joined;
    }
    this.parseSoon();
  }

  send(header: Uint8Array, headerLength: number, payload: number, payloadLength: number): void {
    assert(headerLength <= MAX_INLINE_BYTES, `header of ${headerLength} bytes`);
    if (this.isClosed || this.ending) return;
    if (payload !== NO_PAYLOAD) this.memory.retain(payload);
    this.enqueue({ bytes: header.slice(0, headerLength), payload, payloadLength });
  }

  sendBytes(bytes: Uint8Array): void {
    if (this.isClosed || this.ending) return;
    this.enqueue({ bytes: bytes.slice(), payload: NO_PAYLOAD, payloadLength: 0 });
  }

  pause(): void {
    this.paused = true;
  }

  resume(): void {
    this.paused = false;
    this.parseSoon();
  }

  end(): void {
    this.ending = true;
    this.pump();
  }

  close(): void {
    if (this.isClosed) return;
    this.shut();
    this.fabric.drop(this);
    this.fabric.world.after(0, this.owner, () => this.handler?.closed(0));
    const remote = this.remote;
    if (remote && !remote.isClosed)
      this.lastArrivalMs = this.fabric
        .wire(this.host, this.remoteHost)
        .carry(() => remote.lost(this.prng.chance(0.5) ? 0 : Errno.ECONNRESET), this.lastArrivalMs);
  }

  /** The other side is gone; what arrived before is delivered first. */
  lost(errno: number): void {
    if (this.isClosed || this.gone !== undefined) return;
    this.gone = errno;
    this.parseSoon();
  }

  private shut(): void {
    this.isClosed = true;
    for (const item of this.out) if (item.payload !== NO_PAYLOAD) this.memory.release(item.payload);
    this.out.length = 0;
    this.queuedBytes = 0;
  }

  private enqueue(item: Queued): void {
    this.fabric.tap(this.host, item.bytes, item.payloadLength);
    this.out.push(item);
    this.queuedBytes += item.bytes.length + item.payloadLength;
    if (this.queuedBytes > SEND_QUEUE_LIMIT_BYTES) this.wasFull = true;
    this.pump();
  }

  private pump(): void {
    if (this.pumping || this.isClosed) return;
    if (this.out.length === 0) {
      if (this.ending) this.close();
      return;
    }
    if (this.unread >= WINDOW_BYTES) return;
    this.pumping = true;
    const wire = this.fabric.wire(this.host, this.remoteHost);
    const item = this.out[0]!;
    const length = item.bytes.length + item.payloadLength;
    this.fabric.world.after(length / wire.bytesPerMs, this.owner, () => {
      this.pumping = false;
      if (this.isClosed) return;
      this.out.shift();
      this.queuedBytes -= length;
      const bytes = new Uint8Array(length);
      bytes.set(item.bytes);
      if (item.payload !== NO_PAYLOAD) {
        bytes.set(this.memory.bytes.subarray(item.payload, item.payload + item.payloadLength), item.bytes.length);
        this.memory.release(item.payload);
      }
      this.unread += length;
      const remote = this.remote;
      this.lastArrivalMs = wire.carry(() => remote?.arrive(bytes), this.lastArrivalMs);
      if (this.wasFull && this.queuedBytes < SEND_QUEUE_LIMIT_BYTES / 2) {
        this.wasFull = false;
        this.fabric.world.after(0, this.owner, () => {
          if (!this.isClosed) this.handler?.drained();
        });
      }
      this.pump();
    });
  }

  private arrive(bytes: Uint8Array): void {
    if (this.isClosed || this.gone !== undefined || !this.owner.alive) return;
    if (this.end_ + bytes.length > this.received.length) {
      const kept = this.end_ - this.start;
      if ((kept + bytes.length) * 2 <= this.received.length) {
        this.received.copyWithin(0, this.start, this.end_);
      } else {
        const grown = new Uint8Array((kept + bytes.length) * 2 + 4096);
        grown.set(this.received.subarray(this.start, this.end_));
        this.received = grown;
      }
      this.end_ = kept;
      this.start = 0;
    }
    this.received.set(bytes, this.end_);
    this.end_ += bytes.length;
    this.parseSoon();
  }

  private parseSoon(): void {
    if (this.parsing || this.isClosed) return;
    this.parsing = true;
    this.fabric.world.after(0, this.owner, () => {
      this.parsing = false;
      this.parse();
    });
  }

  private parse(): void {
    while (!this.isClosed && !this.paused && this.handler) {
      const consumed = this.parseOne(this.handler);
      if (consumed < 0) {
        this.parsing = true;
        this.fabric.world.after(1, this.owner, () => {
          this.parsing = false;
          this.parse();
        });
        return;
      }
      if (consumed === 0) break;
      const remote = this.remote;
      if (remote) {
        remote.unread = Math.max(0, remote.unread - consumed);
        remote.pump();
      }
    }
    if (this.gone !== undefined && !this.isClosed && !this.paused) {
      this.shut();
      this.fabric.drop(this);
      this.handler?.closed(this.gone);
    }
  }

  /** @returns bytes consumed, 0 when more are needed, -1 when the pool is empty */
  private parseOne(handler: ConnectionHandler): number {
    const available = this.end_ - this.start;
    if (available === 0) return 0;
    const rule = this.framing;
    if (rule.kind === 'raw') {
      let length = Math.min(available, RAW_CHUNK_BYTES);
      if (this.prng.chance(0.2)) length = this.prng.between(1, length);
      const payload = this.memory.allocate(length);
      if (payload < 0) return -1;
      this.memory.bytes.set(this.received.subarray(this.start, this.start + length), payload);
      this.start += length;
      handler.frame(this.header, 0, 0, payload, length, 0);
      return length;
    }
    assert(rule.kind === 'fixed', 'the simulator frames raw and fixed streams');
    if (available < rule.headerBytes) return 0;
    const view = new DataView(this.received.buffer, this.received.byteOffset + this.start, available);
    for (let index = 0; index < rule.magic.length; index++) {
      if (view.getUint8(index) === rule.magic[index]) continue;
      this.shut();
      handler.closed(71);
      return 0;
    }
    const command = rule.commandBytes === 2 ? view.getUint16(rule.commandOffset) : view.getUint32(rule.commandOffset);
    let body = rule.lengthBytes === 2 ? view.getUint16(rule.lengthOffset) : view.getUint32(rule.lengthOffset);
    if (rule.payloadCommands && !rule.payloadCommands.includes(command)) body = 0;
    if (body > rule.hardCapBytes) {
      this.shut();
      handler.closed(Errno.EMSGSIZE);
      return 0;
    }
    const total = rule.headerBytes + body;
    if (available < total) return 0;
    const inline = Math.min(body, rule.inlineByCommand[command] ?? rule.inlineDefault);
    const headerLength = rule.headerBytes + inline;
    const payloadLength = body - inline;
    let payload = NO_PAYLOAD;
    let flags = 0;
    if (payloadLength > rule.maxPayloadBytes) {
      flags = FRAME_SKIPPED;
    } else if (payloadLength > 0) {
      payload = this.memory.allocate(payloadLength);
      if (payload < 0) return -1;
      this.memory.bytes.set(this.received.subarray(this.start + headerLength, this.start + total), payload);
    }
    for (let index = 0; index < headerLength; index++) this.header.setUint8(index, view.getUint8(index));
    this.start += total;
    handler.frame(this.header, 0, headerLength, payload, payloadLength, flags);
    return total;
  }
}
