/**
 * Micro-benchmark of the ring alone: round trips of a 28-byte request and a 16-byte reply over loopback TCP, and 4 KiB
 * reads of a cached file, at depths 1 and 32, over both backends. Client and server are processes of their own.
 *
 *     npx tsc -p tsconfig.json --noEmit false --outDir build/ring --rootDir . && node build/ring/bench/ring-echo.js
 *
 * Prints; asserts no times.
 */
import { fork } from 'node:child_process';
import { closeSync, mkdtempSync, openSync, rmSync, writeSync } from 'node:fs';
import { connect } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { NativeRing } from '../src/io/native-ring.js';
import { type FrameRule, NO_PAYLOAD } from '../src/io/ring.js';

const SECONDS = 2;
const REQUEST_BYTES = 28;
const REPLY_BYTES = 16;
const READ_BYTES = 4096;
const FILE_BYTES = 64 << 20;
const POOL_BYTES = 64 << 20;

const REQUESTS: FrameRule = {
  kind: 'fixed',
  headerBytes: REQUEST_BYTES,
  magic: [0x25, 0x60, 0x95, 0x13],
  lengthOffset: 24,
  lengthBytes: 4,
  commandOffset: 6,
  commandBytes: 2,
  payloadCommands: [1],
  inlineDefault: 0,
  inlineByCommand: {},
  maxPayloadBytes: 1 << 20,
  hardCapBytes: 1 << 20,
};

/** The measured side: echoes until its parent goes. */
function serve(backend: 'io_uring' | 'epoll'): void {
  const ring = new NativeRing({ poolBytes: POOL_BYTES, backend });
  const reply = new Uint8Array(REPLY_BYTES);
  const listener = ring.listenTcp('127.0.0.1', 0, (connection) => {
    connection.setFraming(REQUESTS);
    connection.setHandler({
      frame(header, at) {
        for (let index = 0; index < 8; index++) reply[8 + index] = header.getUint8(at + 8 + index);
        connection.send(reply, REPLY_BYTES, NO_PAYLOAD, 0);
      },
      closed() {},
      drained() {},
    });
  });
  process.send?.(listener.port);
  process.on('disconnect', () => process.exit(0));
}

/** Round trips per second that a plain client of Node sees. */
async function echo(backend: string, depth: number): Promise<number> {
  const child = fork(fileURLToPath(import.meta.url), ['serve', backend], { execArgv: process.execArgv });
  const port = await new Promise<number>((resolve) => child.once('message', (message) => resolve(message as number)));
  const socket = connect({ port, host: '127.0.0.1', noDelay: true });
  const request = Buffer.alloc(REQUEST_BYTES);
  request.writeUInt32BE(0x25609513);
  let received = 0;
  let sent = 0;
  const until = performance.now() + SECONDS * 1000;
  await new Promise<void>((resolve) => {
    const sendMore = () => {
      const due = depth - (sent - Math.floor(received / REPLY_BYTES));
      if (performance.now() >= until) {
        if (due === depth) resolve();
        return;
      }
      if (due > 0) socket.write(due === 1 ? request : Buffer.concat(Array.from({ length: due }, () => request)));
      sent += due;
    };
    socket.on('connect', sendMore);
    socket.on('data', (chunk: Buffer) => {
      received += chunk.length;
      sendMore();
    });
  });
  socket.destroy();
  child.disconnect();
  return received / REPLY_BYTES / SECONDS;
}

/** 4 KiB reads per second of a file in the page cache. */
async function reads(backend: 'io_uring' | 'epoll', depth: number, direct: boolean): Promise<number> {
  const folder = mkdtempSync(join(tmpdir(), 'drbdts-bench-'));
  const path = join(folder, 'file');
  const descriptor = openSync(path, 'w');
  for (let at = 0; at < FILE_BYTES; at += 1 << 20) writeSync(descriptor, Buffer.alloc(1 << 20, 1), 0, 1 << 20, at);
  closeSync(descriptor);
  const ring = new NativeRing({ poolBytes: POOL_BYTES, backend });
  const file = ring.openFile(path, { direct });
  const blocks = Array.from({ length: depth }, () => ring.memory.allocate(READ_BYTES));
  let seed = 12345;
  let done = 0;
  const until = performance.now() + SECONDS * 1000;
  await new Promise<void>((resolve) => {
    let running = depth;
    const next = (cookie: number) => {
      seed = (Math.imul(seed, 1103515245) + 12345) >>> 0;
      file.read(cookie, (seed % (FILE_BYTES / READ_BYTES)) * READ_BYTES, blocks[cookie]!, READ_BYTES);
    };
    file.setDone((cookie, errno) => {
      if (errno !== 0) throw new Error(`read failed: errno ${errno}`);
      done++;
      if ((done & 63) === 0 && performance.now() >= until) running = 0;
      if (running > 0) next(cookie);
      else resolve();
    });
    for (let cookie = 0; cookie < depth; cookie++) next(cookie);
  });
  ring.close();
  rmSync(folder, { recursive: true });
  return done / SECONDS;
}

if (process.argv[2] === 'serve') serve(process.argv[3] as 'io_uring' | 'epoll');
else {
  const line = (what: string, rate: number) =>
    console.log(`${what.padEnd(44)} ${Math.round(rate).toString().padStart(9)} /s`);
  for (const backend of ['io_uring', 'epoll'] as const)
    for (const depth of [1, 32]) {
      line(`${backend} echo, depth ${depth}`, await echo(backend, depth));
      line(`${backend} 4 KiB cached reads, depth ${depth}`, await reads(backend, depth, false));
      line(`${backend} 4 KiB direct reads, depth ${depth}`, await reads(backend, depth, true));
    }
}
