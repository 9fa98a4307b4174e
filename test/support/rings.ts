import { afterEach, describe } from 'vitest';
import { NativeRing } from '../../src/io/native-ring.js';
import type { Connection, ConnectionHandler, FrameRule } from '../../src/io/ring.js';

export const BACKENDS = ['io_uring', 'epoll'] as const;
export type BackendName = (typeof BACKENDS)[number];

/** Runs a suite over both backends; rings made with `make` are closed after each test. */
export function describeRing(name: string, suite: (make: (poolBytes?: number) => NativeRing) => void): void {
  describe.each(BACKENDS)(`${name} over %s`, (backend) => {
    const open: NativeRing[] = [];
    afterEach(() => {
      for (const ring of open.splice(0)) ring.close();
    });
    suite((poolBytes = 64 * 1024 * 1024) => {
      const ring = new NativeRing({ poolBytes, backend });
      open.push(ring);
      return ring;
    });
  });
}

export interface Frame {
  readonly header: Buffer;
  readonly payload: Buffer | undefined;
  readonly payloadLength: number;
  readonly flags: number;
}

/** Keeps what arrives, as copies, and lets a test wait for it. */
export class Recorder implements ConnectionHandler {
  readonly frames: Frame[] = [];
  closedWith: number | undefined;
  closedCount = 0;
  drainedCount = 0;
  /** When false, payload blocks stay with `held`. */
  releases = true;
  readonly held: number[] = [];
  #wake: (() => void) | undefined;

  constructor(
    private readonly ring: NativeRing,
    private readonly onFrame?: (frame: Frame) => void,
  ) {}

  frame(view: DataView, at: number, length: number, payload: number, payloadLength: number, flags: number): void {
    const frame = {
      header: Buffer.from(Buffer.from(view.buffer, view.byteOffset + at, length)),
      payload: payload < 0 ? undefined : Buffer.from(this.ring.memory.bytes.subarray(payload, payload + payloadLength)),
      payloadLength,
      flags,
    };
    if (payload >= 0) {
      if (this.releases) this.ring.memory.release(payload);
      else this.held.push(payload);
    }
    this.frames.push(frame);
    this.onFrame?.(frame);
    this.#wake?.();
  }

  closed(errno: number): void {
    this.closedWith = errno;
    this.closedCount++;
    this.#wake?.();
  }

  drained(): void {
    this.drainedCount++;
    this.#wake?.();
  }

  /** Raw bytes so far. */
  get text(): string {
    return Buffer.concat(this.frames.map((frame) => frame.payload ?? Buffer.alloc(0))).toString('latin1');
  }

  async until(condition: (recorder: this) => boolean): Promise<void> {
    while (!condition(this)) await new Promise<void>((resolve) => (this.#wake = resolve));
  }
}

/** Two connected ends inside one ring, over loopback TCP: the server's side frames by `rule`. */
export async function connectedPair(
  ring: NativeRing,
  rule: FrameRule,
  server: ConnectionHandler,
  client: ConnectionHandler,
): Promise<{ serverSide: Connection; clientSide: Connection }> {
  let listener: { close(): void } | undefined;
  const accepted = new Promise<Connection>((resolve) => {
    const made = ring.listenTcp('127.0.0.1', 0, (connection) => {
      connection.setFraming(rule);
      connection.setHandler(server);
      resolve(connection);
    });
    listener = made;
    ring.connectTcp('127.0.0.1', made.port, { timeoutMs: 5000 }, (connection, errno) => {
      if (!connection) throw new Error(`connect failed: errno ${errno}`);
      connection.setHandler(client);
      connectedResolve(connection);
    });
  });
  let connectedResolve: (connection: Connection) => void = () => {};
  const connected = new Promise<Connection>((resolve) => (connectedResolve = resolve));
  const [serverSide, clientSide] = await Promise.all([accepted, connected]);
  listener?.close();
  return { serverSide, clientSide };
}
