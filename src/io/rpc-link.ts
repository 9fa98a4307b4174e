/**
 * A TCP connection that carries records with a transaction number in their first four bytes, and survives its server:
 * after a loss it connects again and sends every unanswered record again, unchanged. A failover is a pause, nothing
 * more.
 */
import { createConnection, type Socket } from 'node:net';
import { OperatorError } from '../base/errors.js';

/** How records are cut out of the byte stream. */
export interface RecordFraming {
  frame(record: Uint8Array): Uint8Array;
  /** A reader for one connection. `push` throws when the stream makes no sense. */
  reader(record: (bytes: Uint8Array) => void): { push(chunk: Uint8Array): void };
}

export interface RpcLinkOptions {
  readonly host: string;
  readonly port: number;
  /** Connect from a port below 1024, as servers with `secure` exports want it (needs root). */
  readonly privileged: boolean;
  /** How long the first connection may take in all. */
  readonly connectTimeoutMs: number;
  /** How long a call may take in all, reconnections included. */
  readonly callTimeoutMs: number;
  /** Nothing heard for this long while a call waits: the connection is taken for dead. */
  readonly silenceMs: number;
  /** Told when the server is lost and when it is back. */
  readonly onPause?: (message: string) => void;
}

const RETRY_MS = 100;
const ATTEMPT_TIMEOUT_MS = 1000;
const LOWEST_PRIVILEGED_PORT = 665;
const HIGHEST_PRIVILEGED_PORT = 1023;

interface PendingCall {
  readonly framed: Uint8Array;
  readonly deadlineMs: number;
  readonly resolve: (reply: Uint8Array) => void;
  readonly reject: (error: Error) => void;
}

export class RpcLink {
  /** By transaction number, oldest first. */
  private readonly pending = new Map<number, PendingCall>();
  private socket: Socket | undefined;
  private isConnected = false;
  private hasEverConnected = false;
  private isClosed = false;
  private lastHeardMs = 0;
  private lostAtMs = 0;
  private lastError = '';
  private privilegedPort = LOWEST_PRIVILEGED_PORT + Math.floor(Math.random() * 300);
  private retryTimer: NodeJS.Timeout | undefined;
  private readonly watch: NodeJS.Timeout;
  private readonly startedMs = performance.now();

  constructor(
    private readonly options: RpcLinkOptions,
    private readonly framing: RecordFraming,
  ) {
    this.watch = setInterval(() => this.look(), RETRY_MS);
    this.connect();
  }

  /**
   * Sends a record and waits for the one with the same first four bytes.
   * @throws OperatorError (exit code 5) when the server does not answer in time
   */
  call(record: Uint8Array): Promise<Uint8Array> {
    const number = new DataView(record.buffer, record.byteOffset).getUint32(0);
    return new Promise((resolve, reject) => {
      const framed = this.framing.frame(record);
      const now = performance.now();
      if (this.pending.size === 0) this.lastHeardMs = now;
      this.pending.set(number, { framed, deadlineMs: now + this.options.callTimeoutMs, resolve, reject });
      if (this.isConnected) this.socket!.write(framed);
    });
  }

  close(): void {
    this.isClosed = true;
    clearInterval(this.watch);
    clearTimeout(this.retryTimer);
    this.socket?.destroy();
    this.failAll(new OperatorError('the connection was closed', 5, 'closed'));
  }

  private connect(): void {
    const { host, port, privileged } = this.options;
    if (privileged && ++this.privilegedPort > HIGHEST_PRIVILEGED_PORT) this.privilegedPort = LOWEST_PRIVILEGED_PORT;
    const socket = createConnection({
      host,
      port,
      noDelay: true,
      ...(privileged && { localPort: this.privilegedPort }),
    });
    this.socket = socket;
    socket.setTimeout(ATTEMPT_TIMEOUT_MS, () => socket.destroy(new Error('no answer to the connection attempt')));
    socket.on('error', (error) => {
      this.lastError = error.message;
    });
    socket.on('close', () => this.lost());
    socket.on('connect', () => {
      socket.setTimeout(0);
      this.connected(socket);
    });
    const reader = this.framing.reader((record) => this.reply(record));
    socket.on('data', (chunk) => {
      this.lastHeardMs = performance.now();
      try {
        reader.push(chunk);
      } catch (error) {
        socket.destroy(error instanceof Error ? error : new Error(String(error)));
      }
    });
  }

  private connected(socket: Socket): void {
    this.isConnected = true;
    this.lastHeardMs = performance.now();
    if (this.hasEverConnected)
      this.options.onPause?.(`server is back after ${((performance.now() - this.lostAtMs) / 1000).toFixed(2)} s`);
    this.hasEverConnected = true;
    for (const call of this.pending.values()) socket.write(call.framed);
  }

  private lost(): void {
    if (this.isConnected && !this.isClosed) {
      this.lostAtMs = performance.now();
      this.options.onPause?.(`lost the server${this.lastError ? ` (${this.lastError})` : ''}; trying again`);
    }
    this.isConnected = false;
    if (!this.isClosed) this.retryTimer = setTimeout(() => this.connect(), RETRY_MS);
  }

  private reply(record: Uint8Array): void {
    if (record.length < 4) return;
    const number = new DataView(record.buffer, record.byteOffset).getUint32(0);
    const call = this.pending.get(number);
    // A second answer to a record that was sent twice.
    if (call === undefined) return;
    this.pending.delete(number);
    call.resolve(record);
  }

  /** Ends calls that waited too long, and connections that fell silent. */
  private look(): void {
    const now = performance.now();
    const { host, port, connectTimeoutMs, silenceMs } = this.options;
    if (!this.hasEverConnected && now - this.startedMs > connectTimeoutMs) {
      const reason = this.lastError || 'no answer';
      this.failAll(new OperatorError(`cannot reach ${host} port ${port}: ${reason}`, 5, 'unreachable'));
      return;
    }
    for (const [number, call] of this.pending) {
      if (call.deadlineMs > now) continue;
      this.pending.delete(number);
      call.reject(new OperatorError(`no answer from ${host} port ${port} in time`, 5, 'timeout'));
    }
    if (this.isConnected && this.pending.size > 0 && now - this.lastHeardMs > silenceMs) {
      this.lastError = `silent for ${silenceMs} ms`;
      this.socket!.destroy();
    }
  }

  private failAll(error: OperatorError): void {
    for (const call of this.pending.values()) call.reject(error);
    this.pending.clear();
  }
}
