/**
 * The server over TCP and UDP sockets of this machine, its ring a small stand-in that cuts records with our own reader.
 */
import { createSocket } from 'node:dgram';
import { once } from 'node:events';
import { createConnection, createServer, type Socket } from 'node:net';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { Connection, ConnectionHandler, FrameRule, Listener } from '../../src/io/ring.js';
import { MAX_RECORD_BYTES } from '../../src/nfs/nfs3/fsinfo.js';
import { MAX_IN_FLIGHT_CALLS, parsePeer, RpcServer } from '../../src/node/rpc-server.js';
import { frameRecord, RecordReader } from '../../src/rpc/record-marking.js';
import type { FakeMemory } from '../support/fake-ring.js';
import { Bench } from '../support/nfs-bench.js';

class SocketConnection implements Connection {
  readonly peer: string;
  isPaused = false;
  private handler!: ConnectionHandler;

  constructor(
    private readonly memory: FakeMemory,
    readonly socket: Socket,
  ) {
    this.peer = `[${socket.remoteAddress}]:${socket.remotePort}`;
    socket.on('error', () => {});
    socket.on('close', () => this.handler.closed(0));
    socket.on('drain', () => this.handler.drained());
  }

  get queuedBytes(): number {
    return this.socket.writableLength;
  }
  setHandler(handler: ConnectionHandler): void {
    this.handler = handler;
  }
  setFraming(rule: FrameRule): void {
    if (rule.kind !== 'record') throw new Error('RPC frames records');
    const reader = new RecordReader(rule.maxRecordBytes, rule.maxFragments, (record) => {
      const block = this.memory.allocate(record.length);
      this.memory.bytes.set(record, block);
      this.handler.frame(this.memory.view, 0, 0, block, record.length, 0);
    });
    this.socket.on('data', (chunk) => {
      try {
        reader.push(chunk);
      } catch {
        this.socket.destroy();
      }
    });
  }
  send(header: Uint8Array, headerLength: number, payload: number, payloadLength: number): void {
    this.socket.write(header.slice(0, headerLength));
    if (payload >= 0) this.socket.write(this.memory.bytes.slice(payload, payload + payloadLength));
  }
  sendBytes(bytes: Uint8Array): void {
    this.socket.write(bytes.slice());
  }
  pause(): void {
    this.isPaused = true;
    this.socket.pause();
  }
  resume(): void {
    this.isPaused = false;
    this.socket.resume();
  }
  end(): void {
    this.socket.end();
  }
  close(): void {
    this.socket.destroy();
  }
}

let bench: Bench;
let server: RpcServer;
let port: number;
const accepted: SocketConnection[] = [];
const messages: string[] = [];
let listener: ReturnType<typeof createServer>;

beforeEach(async () => {
  bench = new Bench();
  bench.serve();
  accepted.length = 0;
  messages.length = 0;
  listener = createServer();
  listener.listen(0, '127.0.0.1');
  await once(listener, 'listening');
  port = (listener.address() as { port: number }).port;
  const ring = {
    memory: bench.memory,
    listenTcp: (_host: string, _port: number, accept: (connection: Connection) => void): Listener => {
      listener.on('connection', (socket) => {
        const connection = new SocketConnection(bench.memory, socket);
        accepted.push(connection);
        accept(connection);
      });
      return { port, close: () => listener.close() };
    },
  };
  server = new RpcServer(ring, MAX_RECORD_BYTES, {
    malformed: (_peer, reason) => messages.push(reason),
    refused: (_peer, reason) => messages.push(reason),
  });
  expect(server.listenTcp('127.0.0.1', port, bench.dispatcher)).toBe(port);
  server.tick(1000);
});
afterEach(() => server.close());

async function connect(): Promise<{ socket: Socket; replies: Uint8Array[]; reply: () => Promise<Uint8Array> }> {
  const socket = createConnection(port, '127.0.0.1');
  socket.on('error', () => {});
  await once(socket, 'connect');
  const replies: Uint8Array[] = [];
  const reader = new RecordReader(MAX_RECORD_BYTES, 10, (record) => replies.push(record));
  socket.on('data', (chunk) => reader.push(chunk));
  const reply = async () => {
    while (replies.length === 0) await once(socket, 'data');
    return replies.shift()!;
  };
  return { socket, replies, reply };
}

function nullCall(xid: number): Uint8Array {
  const call = Buffer.alloc(40);
  for (const [index, word] of [xid, 0, 2, 100003, 3, 0, 0, 0, 0, 0].entries()) call.writeUInt32BE(word, index * 4);
  return call;
}

function getattrCall(xid: number): Uint8Array {
  const call = Buffer.concat([nullCall(xid), Buffer.of(0, 0, 0, 32), bench.handle()]);
  call.writeUInt32BE(1, 20);
  return call;
}

describe('the RPC server', () => {
  it('answers a record in one-byte fragments', async () => {
    const { socket, reply } = await connect();
    const call = nullCall(7);
    for (const [index, byte] of call.entries())
      socket.write(Buffer.of(index === call.length - 1 ? 0x80 : 0, 0, 0, 1, byte));
    expect(Buffer.from(await reply()).toString('hex')).toBe(
      '00000007' + '00000001' + '00000000' + '0000000000000000' + '00000000',
    );
  });

  it('closes only the connection whose record is too long, and one that sends replies instead of calls', async () => {
    const good = await connect();
    const long = await connect();
    long.socket.write(Buffer.from('80101001', 'hex'));
    await once(long.socket, 'close');
    const strange = await connect();
    for (let i = 0; i < 3; i++) strange.socket.write(frameRecord(Buffer.from('0000000100000001', 'hex')));
    await once(strange.socket, 'close');
    expect(messages).toEqual(Array(3).fill('a record that is no call'));
    good.socket.write(frameRecord(nullCall(1)));
    await good.reply();
    expect(server.connectionCount).toBe(1);
  });

  it('stops reading a client with too much in flight, and answers everything in the end', async () => {
    bench.exports.replace([{ ...ruleOf(), path: '/drbd' }]);
    let open = () => {};
    bench.filesystem.gate = new Promise((resolve) => {
      open = resolve;
    });
    const { socket, replies } = await connect();
    const calls = MAX_IN_FLIGHT_CALLS + 50;
    for (let xid = 0; xid < calls; xid++) socket.write(frameRecord(getattrCall(xid)));
    while (!accepted[0]!.isPaused) await new Promise((resolve) => setImmediate(resolve));
    expect(bench.memory.liveBlocks).toBeGreaterThanOrEqual(MAX_IN_FLIGHT_CALLS);
    open();
    while (replies.length < calls) await once(socket, 'data');
    expect(accepted[0]!.isPaused).toBe(false);
    expect(bench.memory.liveBlocks).toBe(0);
  });

  it('a client that leaves while its call runs costs nothing', async () => {
    let open = () => {};
    bench.filesystem.gate = new Promise((resolve) => {
      open = resolve;
    });
    bench.exports.replace([{ ...ruleOf(), path: '/drbd' }]);
    const { socket } = await connect();
    socket.write(frameRecord(getattrCall(1)));
    while (bench.memory.liveBlocks === 0) await new Promise((resolve) => setImmediate(resolve));
    socket.destroy();
    while (server.connectionCount > 0) await new Promise((resolve) => setImmediate(resolve));
    open();
    while (bench.memory.liveBlocks > 0) await new Promise((resolve) => setImmediate(resolve));
  });

  it('ends idle connections after six minutes, and all of them when told', async () => {
    const idle = await connect();
    const busy = await connect();
    while (accepted.length < 2) await new Promise((resolve) => setImmediate(resolve));
    server.tick(300_000);
    busy.socket.write(frameRecord(nullCall(1)));
    await busy.reply();
    server.tick(361_001);
    await once(idle.socket, 'close');
    expect(server.connectionCount).toBe(1);
    expect(server.dropConnections()).toBe(1);
    await once(busy.socket, 'close');
  });

  it('answers datagrams', async () => {
    const udpPort = await server.listenUdp('127.0.0.1', 0, bench.dispatcher);
    const client = createSocket('udp4');
    client.send(Buffer.from('garbage'), udpPort, '127.0.0.1');
    client.send(nullCall(9), udpPort, '127.0.0.1');
    const [answer] = (await once(client, 'message')) as [Buffer];
    expect(answer.readUInt32BE(0)).toBe(9);
    client.close();
  });

  it('reads peers in every form the ring writes them', () => {
    expect(parsePeer('10.0.0.1:4711')).toEqual({ address: '10.0.0.1', port: 4711 });
    expect(parsePeer('[::ffff:10.0.0.1]:700')).toEqual({ address: '10.0.0.1', port: 700 });
    expect(parsePeer('[fe80::1]:1')).toEqual({ address: 'fe80::1', port: 1 });
  });
});

/** Lets AUTH_NONE in, so that the calls above need no credential. */
function ruleOf() {
  const options = {
    ...{ writable: true, sync: true, secure: false, rootSquash: true, allSquash: true },
    ...{ anonUid: 65534, anonGid: 65534, allowAuthNone: true, allowAuthSys: true, readdirPlus: true },
  };
  return { clients: ['*'], optionsFor: () => options };
}
