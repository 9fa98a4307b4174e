import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, readdirSync, renameSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { connect, createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterEach, beforeEach, expect, it } from 'vitest';
import type { NativeRing } from '../../src/io/native-ring.js';
import { type Connection, type FrameRule, NO_PAYLOAD, SEND_QUEUE_LIMIT_BYTES } from '../../src/io/ring.js';
import { connectedPair, describeRing, Recorder } from '../support/rings.js';

const RAW: FrameRule = { kind: 'raw' };
const openDescriptors = () => readdirSync('/proc/self/fd').length;

async function eventually(condition: () => boolean): Promise<void> {
  for (let tries = 0; tries < 1000 && !condition(); tries++) await sleep(5);
  expect(condition()).toBe(true);
}

describeRing('connections', (make) => {
  let folder: string;
  beforeEach(() => {
    folder = mkdtempSync(join(tmpdir(), 'drbdts-ring-'));
  });
  afterEach(() => rmSync(folder, { recursive: true, force: true }));

  function dial(ring: NativeRing, port: number, timeoutMs = 2000, host = '127.0.0.1'): Promise<Connection | number> {
    return new Promise((resolve) =>
      ring.connectTcp(host, port, { timeoutMs }, (connection, errno) => resolve(connection ?? errno)),
    );
  }

  it('sends headers, payloads and bytes in order, and counts references', async () => {
    const ring = make();
    const server = new Recorder(ring);
    const { clientSide } = await connectedPair(ring, RAW, server, new Recorder(ring));
    let expected = '';
    for (let round = 0; round < 3000; round++) {
      const header = Buffer.from(`<${round}>`);
      const payload = ring.memory.allocate(5000);
      ring.memory.bytes.fill(97 + (round % 26), payload, payload + (round % 50));
      clientSide.send(header, header.length, payload, round % 50);
      ring.memory.release(payload);
      expected += `<${round}>${String.fromCharCode(97 + (round % 26)).repeat(round % 50)}`;
      if (round % 1000 === 500) {
        clientSide.sendBytes(Buffer.alloc(100_000, 'x'));
        expected += 'x'.repeat(100_000);
      }
      if (round % 700 === 699) await sleep(1);
    }
    await server.until((all) => all.text.length >= expected.length);
    expect(server.text === expected).toBe(true);
    expect(clientSide.queuedBytes).toBe(0);
    expect(ring.usedBytes).toBe(0);
  });

  it('reports pressure of a peer that never reads, and drained once it does', async () => {
    const ring = make(128 * 1024 * 1024);
    const client = new Recorder(ring);
    const server = new Recorder(ring);
    const { clientSide, serverSide } = await connectedPair(ring, RAW, server, client);
    serverSide.pause();
    await sleep(20);
    const payload = ring.memory.allocate(1 << 20);
    let sent = 0;
    while (clientSide.queuedBytes <= SEND_QUEUE_LIMIT_BYTES) {
      clientSide.send(Buffer.alloc(8), 8, payload, 1 << 20);
      sent += 8 + (1 << 20);
      if (sent % 7 === 0) await sleep(1);
      expect(sent).toBeLessThan(200 << 20);
    }
    await sleep(50);
    // The kernel took some; the rest stays, and nobody is told that it drained.
    expect(clientSide.queuedBytes).toBeGreaterThan(SEND_QUEUE_LIMIT_BYTES / 2);
    expect(client.drainedCount).toBe(0);
    serverSide.resume();
    await client.until((all) => all.drainedCount > 0);
    await eventually(() => clientSide.queuedBytes === 0);
    expect(client.drainedCount).toBe(1);
    await eventually(() => server.frames.reduce((sum, frame) => sum + frame.payloadLength, 0) === sent);
    ring.memory.release(payload);
    expect(ring.usedBytes).toBe(0);
  });

  it('really stops reading while paused', async () => {
    const ring = make();
    const server = new Recorder(ring);
    const { clientSide, serverSide } = await connectedPair(ring, RAW, server, new Recorder(ring));
    serverSide.pause();
    await sleep(10);
    clientSide.sendBytes(Buffer.alloc(32 << 20));
    await sleep(100);
    // At most the receive that was under way.
    expect(server.frames.length).toBeLessThanOrEqual(1);
    expect(clientSide.queuedBytes).toBeGreaterThan(8 << 20);
    serverSide.resume();
    await server.until((all) => all.frames.reduce((sum, frame) => sum + frame.payloadLength, 0) === 32 << 20);
  });

  it('waits for pool memory and goes on when some is released', async () => {
    const ring = make(1 << 20);
    const server = new Recorder(ring);
    server.releases = false;
    const { clientSide } = await connectedPair(ring, RAW, server, new Recorder(ring));
    clientSide.sendBytes(Buffer.alloc(4 << 20, 'y'));
    await eventually(() => ring.memory.allocate(64 * 1024) === NO_PAYLOAD);
    const before = server.frames.length;
    await sleep(30);
    expect(server.frames.length).toBe(before);
    expect(server.closedCount).toBe(0);
    server.releases = true;
    for (const offset of server.held.splice(0)) ring.memory.release(offset);
    await server.until((all) => all.text.length === 4 << 20);
  });

  it('refuses, times out and reaches nobody in the ordinary ways', async () => {
    const ring = make();
    const listener = ring.listenTcp('127.0.0.1', 0, () => {});
    const { port } = listener;
    listener.close();
    await sleep(10);
    expect(await dial(ring, port)).toBe(111);
    expect(await dial(ring, port, 100, 'not an address')).toBe(99);
    expect(await new Promise((resolve) => ring.connectUnix(join(folder, 'none'), (_, errno) => resolve(errno)))).toBe(
      2,
    );
  });

  it('gives up after the timeout', async () => {
    const ring = make();
    // A process that listens but never accepts: once its backlog is full, the kernel drops what newcomers send.
    const script = `
      const server = require('node:net').createServer().listen({ port: 0, host: '127.0.0.1', backlog: 1 }, () => {
        require('node:fs').writeSync(1, String(server.address().port));
        Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0);
      });`;
    const child = spawn(process.execPath, ['-e', script], { stdio: ['ignore', 'pipe', 'inherit'] });
    const [text] = await once(child.stdout, 'data');
    const results: (Connection | number)[] = [];
    let tookMs = 0;
    while (results.length < 8 && !results.includes(110)) {
      const before = performance.now();
      results.push(await dial(ring, Number(text), 150));
      tookMs = performance.now() - before;
    }
    expect(results.at(-1)).toBe(110);
    expect(tookMs).toBeGreaterThanOrEqual(140);
    expect(tookMs).toBeLessThan(1000);
    for (const result of results) if (typeof result === 'object') result.close();
    child.kill('SIGKILL');
    await once(child, 'exit');
  });

  it('reports a bind that fails with errno and address', () => {
    const ring = make();
    const { port } = ring.listenTcp('127.0.0.1', 0, () => {});
    expect(() => ring.listenTcp('127.0.0.1', port, () => {})).toThrow(/listen on 127\.0\.0\.1:\d+: EADDRINUSE/);
    try {
      ring.listenTcp('127.0.0.1', port, () => {});
    } catch (error) {
      expect((error as { errno: number }).errno).toBe(98);
    }
  });

  it('listens on Unix sockets of mode 0600 and replaces stale ones only', async () => {
    const ring = make();
    const path = join(folder, 'socket');
    const first = ring.listenUnix(path, (connection) => connection.setHandler(new Recorder(ring)));
    expect(statSync(path).mode & 0o777).toBe(0o600);
    expect(() => ring.listenUnix(path, () => {})).toThrow(/EADDRINUSE/);
    const client = new Recorder(ring);
    const connection = await new Promise<Connection | undefined>((resolve) => ring.connectUnix(path, resolve));
    expect(connection!.peer).toBe('unix');
    connection!.setHandler(client);
    first.close();
    expect(readdirSync(folder)).toEqual([]);
    const stale = createServer().listen(path);
    await once(stale, 'listening');
    // A crashed server leaves its file behind: rename it so that closing does not remove it.
    const left = join(folder, 'left');
    renameSync(path, left);
    stale.close();
    ring.listenUnix(left, () => {}).close();
    writeFileSync(path, '');
    expect(() => ring.listenUnix(path, () => {})).toThrow(/EEXIST/);
  });

  it('tells closed exactly once: own close, peer close, reset', async () => {
    const ring = make();
    const sides: Recorder[] = [];
    const connections: Connection[] = [];
    const listener = ring.listenTcp('127.0.0.1', 0, (connection) => {
      const recorder = new Recorder(ring);
      sides.push(recorder);
      connections.push(connection);
      connection.setHandler(recorder);
    });
    const [ended, reset, own] = [connect(listener.port), connect(listener.port), connect(listener.port)];
    await eventually(() => sides.length === 3);
    await Promise.all([ended, reset, own].map(async (socket) => socket.on('error', () => {})));
    ended.end();
    await eventually(() => sides.some((side) => side.closedCount === 1));
    reset.resetAndDestroy();
    await eventually(() => sides.filter((side) => side.closedCount === 1).length === 2);
    for (const connection of connections) {
      connection.close();
      connection.close();
      connection.end();
    }
    await eventually(() => sides.every((side) => side.closedCount === 1));
    await sleep(20);
    expect(sides.map((side) => side.closedCount)).toEqual([1, 1, 1]);
    expect(sides.map((side) => side.closedWith).sort()).toEqual([0, 0, 104]);
    own.destroy();
  });

  it('sends everything before it ends', async () => {
    const ring = make();
    const listener = ring.listenTcp('127.0.0.1', 0, (connection) => {
      connection.setHandler(new Recorder(ring));
      connection.sendBytes(Buffer.alloc(20 << 20, 'z'));
      connection.end();
      connection.sendBytes(Buffer.from('too late'));
    });
    const socket = connect(listener.port);
    let received = 0;
    socket.on('data', (chunk: Buffer) => (received += chunk.length));
    await once(socket, 'end');
    expect(received).toBe(20 << 20);
  });

  it('keeps a flood on one connection from starving another', async () => {
    const ring = make();
    const flood = new Recorder(ring);
    const calm = new Recorder(ring);
    const a = await connectedPair(ring, RAW, flood, new Recorder(ring));
    const echo = new Recorder(ring);
    const b = await connectedPair(ring, RAW, calm, echo);
    a.clientSide.sendBytes(Buffer.alloc(60 << 20));
    for (let round = 1; round <= 20; round++) {
      b.clientSide.sendBytes(Buffer.from('p'));
      await calm.until((all) => all.text.length === round);
    }
    expect(flood.frames.reduce((sum, frame) => sum + frame.payloadLength, 0)).toBeLessThan(60 << 20);
  });

  it('opens and closes a thousand connections without leaking a descriptor', async () => {
    const ring = make();
    let open = 0;
    const listener = ring.listenTcp('127.0.0.1', 0, (connection) => {
      open++;
      connection.setHandler({
        frame(_view, _at, _length, payload, payloadLength) {
          connection.send(Buffer.alloc(0), 0, payload, payloadLength);
          ring.memory.release(payload);
        },
        closed: () => open--,
        drained() {},
      });
    });
    const roundTrip = async () => {
      const connection = (await dial(ring, listener.port)) as Connection;
      const recorder = new Recorder(ring, () => connection.close());
      connection.setHandler(recorder);
      connection.sendBytes(Buffer.from('ping'));
      await recorder.until((all) => all.closedCount === 1);
      expect(recorder.text).toBe('ping');
      expect(recorder.closedWith).toBe(0);
    };
    await roundTrip();
    await eventually(() => open === 0);
    const before = openDescriptors();
    for (let batch = 0; batch < 20; batch++) await Promise.all(Array.from({ length: 50 }, roundTrip));
    await eventually(() => open === 0);
    expect(openDescriptors()).toBeLessThanOrEqual(before);
    expect(ring.usedBytes).toBe(0);
  });

  it('leaves no descriptor behind when it closes with everything open', async () => {
    const warm = make();
    warm.close();
    await sleep(5);
    const before = openDescriptors();
    const ring = make();
    await connectedPair(ring, RAW, new Recorder(ring), new Recorder(ring));
    ring.listenTcp('127.0.0.1', 0, () => {});
    ring.close();
    await eventually(() => openDescriptors() <= before);
  });

  it('runs beside the timers, promises and sockets of Node', async () => {
    const ring = make();
    const listener = ring.listenTcp('127.0.0.1', 0, (connection) => {
      connection.setHandler({
        frame(_view, _at, _length, payload, payloadLength) {
          // From a microtask, an immediate and a timer: all must leave.
          Promise.resolve().then(() =>
            setImmediate(() =>
              setTimeout(() => {
                connection.send(Buffer.from('>'), 1, payload, payloadLength);
                ring.memory.release(payload);
              }, 1),
            ),
          );
        },
        closed() {},
        drained() {},
      });
    });
    const socket = connect(listener.port);
    for (let round = 0; round < 50; round++) {
      socket.write('abc');
      const [chunk] = await once(socket, 'data');
      expect(String(chunk)).toBe('>abc');
    }
    socket.destroy();
  });
});
