/**
 * A load generator for NFSv3: a few connections with many calls in flight each, over the ring, with requests encoded
 * beforehand, so that the server is what is measured.
 */

import type { NativeRing } from '../src/io/native-ring.js';
import type { Connection, ConnectionHandler } from '../src/io/ring.js';
import { NO_PAYLOAD } from '../src/io/ring.js';
import { mount, Nfs3Client, RpcCaller } from '../src/nfs/client.js';
import { NFS_PROGRAM, NFS3_PROCEDURES } from '../src/nfs/nfs3/program.js';
import type { NfsService } from '../src/nfs/service.js';
import type { AuthSys } from '../src/rpc/auth.js';
import { encodeCall } from '../src/rpc/call.js';
import type { Procedure } from '../src/rpc/dispatcher.js';
import { frameRecord, LAST_FRAGMENT } from '../src/rpc/record-marking.js';
import { XdrWriter } from '../src/rpc/xdr.js';

const USER: AuthSys = { stamp: 1, machineName: 'bench', uid: 0, gid: 0, groups: [] };
const MAX_RECORD_BYTES = 2 << 20;
const CONNECT_TIMEOUT_MS = 5000;
const WARM_UP_MS = 300;
/** Of a reply: xid, REPLY, MSG_ACCEPTED, verifier (flavor, length 0), SUCCESS, then the status of NFS. */
const ACCEPT_AT = 20;
const STATUS_AT = 24;
const RESULT_AT = 28;
const XID_AT = 4;
const LANES = 64;

/** A call without its transaction number: record mark, RPC header, arguments; a payload of the pool may follow. */
export class Request {
  readonly bytes: Uint8Array;
  private readonly view: DataView;

  constructor(
    head: Uint8Array,
    readonly payload = NO_PAYLOAD,
    readonly payloadLength = 0,
  ) {
    this.bytes = new Uint8Array(4 + head.length);
    this.bytes.set(head, 4);
    this.view = new DataView(this.bytes.buffer);
    this.view.setUint32(0, (LAST_FRAGMENT | (head.length + payloadLength)) >>> 0);
  }

  send(connection: Connection, xid: number): void {
    this.view.setUint32(XID_AT, xid);
    connection.send(this.bytes, this.bytes.length, this.payload, this.payloadLength);
  }
}

const writer = new XdrWriter();

/** Encodes a call. With a payload, `args` were encoded with no data, and the payload is the data. */
export function request<A, R>(
  procedure: Procedure<NfsService, A, R>,
  args: A,
  payload = NO_PAYLOAD,
  payloadLength = 0,
): Request {
  const number = (NFS3_PROCEDURES as readonly unknown[]).indexOf(procedure);
  writer.reset();
  encodeCall(writer, 0, NFS_PROGRAM, 3, number, USER);
  procedure.args.encode(writer, args);
  if (payload !== NO_PAYLOAD) writer.patchU32(writer.length - 4, payloadLength);
  return new Request(writer.message().slice(), payload, payloadLength);
}

/** What one lane does: a call, and when its reply is here perhaps another that belongs to it. */
export interface Work {
  /** First call of the `turn`-th piece of work. */
  first(turn: number): Request;
  /**
   * The reply was good; its results start at `at`, and the whole reply is `length` bytes long.
   * @returns the next call of this piece, or undefined when it is done
   */
  next?(lane: number, step: number, view: DataView, at: number): Request | undefined;
  /** Shortest good reply. */
  readonly replyBytes?: number;
}

class LoadConnection implements ConnectionHandler {
  connection!: Connection;
  work: Work | undefined;
  running = 0;
  done = 0;
  private stopping = false;
  private readonly steps = new Int32Array(LANES);
  private xid = Math.floor(Math.random() * 2 ** 25);
  private idle: (() => void) | undefined;
  private answer: ((record: Uint8Array) => void) | undefined;
  private lost: Error | undefined;

  constructor(
    private readonly ring: NativeRing,
    private readonly counter: { turn: number },
  ) {}

  start(work: Work, lanes: number): void {
    this.work = work;
    this.stopping = false;
    for (let lane = 0; lane < lanes; lane++) this.begin(lane);
  }

  stop(): Promise<void> {
    this.stopping = true;
    if (this.running === 0) return Promise.resolve();
    return new Promise((resolve) => {
      this.idle = resolve;
    });
  }

  private begin(lane: number): void {
    this.running++;
    this.steps[lane] = 0;
    this.send(this.work!.first(this.counter.turn++), lane);
  }

  private send(call: Request, lane: number): void {
    this.xid = (this.xid + 1) & 0x3ffffff;
    call.send(this.connection, ((this.xid << 6) | lane) >>> 0);
  }

  /** One call of any size, outside of the load. */
  call(record: Uint8Array): Promise<Uint8Array> {
    if (this.lost) return Promise.reject(this.lost);
    return new Promise((resolve) => {
      this.answer = resolve;
      this.connection.sendBytes(frameRecord(record));
    });
  }

  frame(_header: DataView, _at: number, _length: number, payload: number, payloadLength: number): void {
    const { view, bytes } = this.ring.memory;
    if (this.answer !== undefined) {
      const resolve = this.answer;
      this.answer = undefined;
      const record = bytes.slice(payload, payload + payloadLength);
      this.ring.memory.release(payload);
      resolve(record);
      return;
    }
    const work = this.work!;
    const lane = view.getUint32(payload) & (LANES - 1);
    const [accepted, status] = [view.getUint32(payload + ACCEPT_AT), view.getUint32(payload + STATUS_AT)];
    if (accepted !== 0 || status !== 0)
      throw new Error(`a call failed under load: accept_stat ${accepted}, nfsstat3 ${status}`);
    const step = ++this.steps[lane]!;
    const following = work.next?.(lane, step, view, payload + RESULT_AT);
    if (following === undefined && payloadLength < (work.replyBytes ?? 0))
      throw new Error(`a reply of ${payloadLength} bytes, expected ${work.replyBytes}`);
    this.ring.memory.release(payload);
    if (following !== undefined) {
      this.send(following, lane);
      return;
    }
    this.running--;
    this.done++;
    if (!this.stopping) this.begin(lane);
    else if (this.running === 0) this.idle?.();
  }

  closed(errno: number): void {
    this.lost = new Error(`the server closed the connection (errno ${errno})`);
    if (this.running > 0) throw this.lost;
  }

  drained(): void {}
}

/** Connections to one server. */
export class NfsLoad {
  private readonly connections: LoadConnection[] = [];
  private readonly counter = { turn: 0 };
  root: Uint8Array = new Uint8Array(0);
  readonly client: Nfs3Client;

  private constructor(private readonly ring: NativeRing) {
    const caller = new RpcCaller((record) => this.connections[0]!.call(record), USER, 1);
    this.client = new Nfs3Client(caller, () => new Promise((resolve) => setTimeout(resolve, 20)));
  }

  static async connect(ring: NativeRing, port: number, mountPort: number, path: string, count: number) {
    const load = new NfsLoad(ring);
    const mounting = await load.open(mountPort);
    load.root = await mount(new RpcCaller((record) => mounting.call(record), USER, 1), path);
    mounting.connection.close();
    for (let index = 0; index < count; index++) load.connections.push(await load.open(port));
    return load;
  }

  private open(port: number): Promise<LoadConnection> {
    return new Promise((resolve, reject) => {
      this.ring.connectTcp('127.0.0.1', port, { timeoutMs: CONNECT_TIMEOUT_MS }, (connection, errno) => {
        if (!connection) {
          reject(new Error(`connect to port ${port}: errno ${errno}`));
          return;
        }
        const handler = new LoadConnection(this.ring, this.counter);
        handler.connection = connection;
        connection.setFraming({ kind: 'record', maxRecordBytes: MAX_RECORD_BYTES, maxFragments: 64 });
        connection.setHandler(handler);
        resolve(handler);
      });
    });
  }

  /** @returns pieces of work per second with `inFlight` calls at a time over all connections */
  async rate(work: Work, inFlight: number, seconds: number): Promise<number> {
    const used = this.connections.slice(0, Math.min(inFlight, this.connections.length));
    for (const connection of used) connection.start(work, inFlight / used.length);
    await new Promise((resolve) => setTimeout(resolve, WARM_UP_MS));
    const sum = () => used.reduce((total, connection) => total + connection.done, 0);
    const [before, start] = [sum(), performance.now()];
    await new Promise((resolve) => setTimeout(resolve, seconds * 1000));
    const rate = ((sum() - before) * 1000) / (performance.now() - start);
    await Promise.all(used.map((connection) => connection.stop()));
    return rate;
  }

  close(): void {
    for (const { connection } of this.connections) connection.close();
  }
}
