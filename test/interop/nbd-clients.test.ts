/**
 * The NBD server before clients that others wrote: libnbd (nbdinfo, nbdcopy, nbdsh), QEMU and fio, over TCP and Unix
 * sockets, on the native doors and a plain file.
 */
import { type ExecFileException, execFile } from 'node:child_process';
import { createHash } from 'node:crypto';
import {
  closeSync,
  ftruncateSync,
  mkdtempSync,
  openSync,
  readFileSync,
  rmSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import { connect } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { NativeRing } from '../../src/io/native-ring.js';
import type { Listener, Ring } from '../../src/io/ring.js';
import { NbdServer } from '../../src/node/nbd-server.js';
import { FileTarget } from '../support/file-target.js';
import { Command, go, HELLO, parseReplies, request, write } from '../support/nbd-bytes.js';
import { requires } from '../support/requires.js';

const MIB = 1 << 20;
const SIZE_BYTES = 128 * MIB;
/** Debian's python3 has the module `nbd`; another python in PATH may not. */
const PYTHON = '/usr/bin/python3';

const nbdinfo = requires('nbdinfo', 'libnbd-bin');
const nbdcopy = requires('nbdcopy', 'libnbd-bin');
const nbdsh = requires('/usr/lib/python3/dist-packages/nbd.py', 'python3-libnbd');
const qemu = requires('qemu-img', 'qemu-utils') && requires('qemu-io', 'qemu-utils');
const fio = requires('fio', 'fio');

let folder: string;
let file: string;
let ring: Ring;
let server: NbdServer;
let target: FileTarget;
let tcp: Listener;
const uris: Record<'tcp' | 'unix', string> = { tcp: '', unix: '' };
/** QEMU writes the same address in another order. */
const qemuUris: Record<'tcp' | 'unix', string> = { tcp: '', unix: '' };

interface Ran {
  readonly status: number;
  readonly output: string;
  readonly errors: string;
}

/** Runs a client to its end, while this process serves it. */
function run(program: string, args: readonly string[], input = ''): Promise<Ran> {
  return new Promise((resolve) => {
    const done = (error: ExecFileException | null, output: string, errors: string) =>
      resolve({ status: error === null ? 0 : Number(error.code ?? -1), output, errors });
    const child = execFile(program, args, { timeout: 25_000, maxBuffer: 16 * MIB, cwd: folder }, done);
    child.stdin!.end(input);
  });
}

async function runWell(program: string, ...args: string[]): Promise<string> {
  const { status, output, errors } = await run(program, args);
  expect(status, `${program} ${args.join(' ')}\n${output}${errors}`).toBe(0);
  return output;
}

/** A python script for libnbd with the connected handle `h`; strict mode off, so that bad requests leave the client. */
async function python(uri: string, script: string): Promise<unknown> {
  const prelude = `
import nbd, json
def connect():
    h = nbd.NBD()
    h.set_strict_mode(0)
    h.add_meta_context("base:allocation")
    h.connect_uri(${JSON.stringify(uri)})
    return h
def errno(call):
    try:
        call()
        return 0
    except nbd.Error as error:
        return error.errnum
h = connect()
`;
  const { status, output, errors } = await run(PYTHON, ['-'], prelude + script);
  expect(status, errors).toBe(0);
  return JSON.parse(output);
}

/** 128 MiB with some data and much hole. */
function makeImage(path: string, seed: number): void {
  const fd = openSync(path, 'w');
  ftruncateSync(fd, SIZE_BYTES);
  const data = Buffer.from(Uint8Array.from({ length: 3 * MIB }, (_, index) => (index * seed + (index >> 9)) & 255));
  for (const [index, at] of [0, 17 * MIB + 4096, 64 * MIB, SIZE_BYTES - data.length].entries())
    writeSync(fd, data, index, data.length - index, at + index);
  closeSync(fd);
}

const hashOf = (path: string) => createHash('sha256').update(readFileSync(path)).digest('hex');

beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'drbdts-nbd-'));
  file = join(folder, 'disk');
  writeFileSync(file, '');
  makeImage(file, 1);
  ring = new NativeRing({ poolBytes: 256 * MIB });
  target = new FileTarget(ring.openFile(file, {}));
  server = new NbdServer(ring);
  server.addExport('data', target, { description: 'a plain file', fastZero: true });
  server.addExport('frozen', target, { readOnly: true });
  tcp = server.listenTcp('127.0.0.1', 0);
  const socket = join(folder, 'socket');
  server.listenUnix(socket);
  uris.tcp = `nbd://127.0.0.1:${tcp.port}/data`;
  uris.unix = `nbd+unix:///data?socket=${socket}`;
  qemuUris.tcp = uris.tcp;
  qemuUris.unix = `nbd:unix:${socket}:exportname=data`;
});

afterAll(() => {
  server.close();
  ring.close();
  rmSync(folder, { recursive: true, force: true });
});

describe.each(['tcp', 'unix'] as const)('over %s', (kind) => {
  it.runIf(nbdinfo)('nbdinfo sees what is offered', async () => {
    const told = JSON.parse(await runWell('nbdinfo', '--json', uris[kind]));
    expect(told).toMatchObject({
      protocol: 'newstyle-fixed',
      TLS: false,
      structured: true,
      exports: [
        {
          'export-name': 'data',
          description: 'a plain file',
          'export-size': SIZE_BYTES,
          contexts: ['base:allocation'],
          is_read_only: false,
          can_cache: true,
          can_df: true,
          can_fast_zero: true,
          can_flush: true,
          can_fua: true,
          can_multi_conn: true,
          can_trim: true,
          can_zero: true,
          block_size_minimum: 512,
          block_size_preferred: 4096,
          block_size_maximum: 32 * MIB,
        },
      ],
    });
    const list = JSON.parse(await runWell('nbdinfo', '--list', '--json', uris[kind]));
    expect(list.exports.map((each: Record<string, unknown>) => [each['export-name'], each.is_read_only])).toEqual([
      ['data', false],
      ['frozen', true],
    ]);
    const map = JSON.parse(await runWell('nbdinfo', '--map', '--json', uris[kind]));
    expect(map).toEqual([{ offset: 0, length: SIZE_BYTES, type: 0, description: 'data' }]);
    expect((await run('nbdinfo', [uris[kind].replace('/data', '/nosuch')])).status).not.toBe(0);
  });

  it.runIf(nbdcopy)('nbdcopy carries an image with holes in and out over four connections', async () => {
    const image = join(folder, `image-${kind}`);
    const back = join(folder, `back-${kind}`);
    makeImage(image, kind === 'tcp' ? 3 : 5);
    await runWell('nbdcopy', '--connections=4', '--flush', image, uris[kind]);
    await runWell('nbdcopy', '--connections=4', uris[kind], back);
    expect(hashOf(back)).toBe(hashOf(image));
    expect(hashOf(file)).toBe(hashOf(image));
  });

  it.runIf(qemu)('qemu-img and qemu-io read, write, zero and discard', async () => {
    const uri = qemuUris[kind];
    const info = JSON.parse(await runWell('qemu-img', 'info', '--output=json', '-f', 'raw', uri));
    expect(info['virtual-size']).toBe(SIZE_BYTES);
    const copy = join(folder, `qemu-${kind}`);
    await runWell('qemu-img', 'convert', '-f', 'raw', '-O', 'raw', uri, copy);
    expect(await runWell('qemu-img', 'compare', '-f', 'raw', '-F', 'raw', uri, copy)).toContain('identical');
    const commands = [
      'write -P 1 0 1M',
      'write -f -P 2 1M 4k',
      'write -z 256k 128k',
      'write -z -u 512k 128k',
      'discard 768k 128k',
      'write -P 3 1000 5000', // parts of sectors
      'flush',
      'read -P 1 0 1000',
      'read -P 3 1000 5000',
      'read -P 1 6000 250k',
      'read -P 0 256k 128k',
      'read -P 1 384k 128k',
      'read -P 0 512k 128k',
      'read -P 0 768k 128k',
      'read -P 1 896k 128k',
      'read -P 2 1M 4k',
    ];
    const output = await runWell('qemu-io', '-f', 'raw', ...commands.flatMap((command) => ['-c', command]), uri);
    expect(output).not.toMatch(/failed|error/i);
    await runWell('qemu-img', 'convert', '-n', '-f', 'raw', '-O', 'raw', copy, uri);
    expect(await runWell('qemu-img', 'compare', '-f', 'raw', '-F', 'raw', uri, copy)).toContain('identical');
  });

  it.runIf(nbdsh)('libnbd without its own checks gets the errors of the protocol, and goes on', async () => {
    const found = await python(
      uris[kind],
      `
size = h.get_size()
result = {
  "past end": errno(lambda: h.pread(512, size)),
  "write past end": errno(lambda: h.pwrite(b"x" * 512, size - 511)),
  "zero past end": errno(lambda: h.zero(512, size)),
  "trim past end": errno(lambda: h.trim(512, size)),
  "wrap": errno(lambda: h.pread(1024, 2**64 - 512)),
  "empty": errno(lambda: h.pread(0, 0)),
  "empty write": errno(lambda: h.pwrite(b"", 0)),
  "unknown flag": errno(lambda: h.pwrite(b"x" * 512, 0, 0x80)),
  "unaligned": errno(lambda: h.pwrite(b"unaligned", 4000003)),
}
result["read back"] = bytes(h.pread(9, 4000003)).decode()
runs = []
h.block_status(1 << 20, 512, lambda name, offset, entries, err: runs.append([name, offset, list(entries)]))
result["status"] = runs
print(json.dumps(result))
`,
    );
    expect(found).toEqual({
      'past end': 22,
      'write past end': 28,
      'zero past end': 28,
      'trim past end': 22,
      wrap: 22,
      empty: 22,
      'empty write': 22,
      'unknown flag': 22,
      unaligned: 0,
      'read back': 'unaligned',
      status: [['base:allocation', 512, [MIB, 0]]],
    });
  });

  it.runIf(nbdsh)('single requests of up to 49 865 728 bytes keep their content, several in flight', async () => {
    const found = await python(
      uris[kind],
      `
import os, hashlib
lengths = [49865728, 33554432, 12345344, 512, 49865728 - 512]
same = []
for round in range(2):
    pending = []
    offset = 0
    for length in lengths[round * 2:round * 2 + 2]:
        data = os.urandom(1 << 16) * (length // 65536) + b"tail" * ((length % 65536) // 4)
        buffer = nbd.Buffer.from_bytearray(bytearray(data))
        pending.append((offset, data, buffer, h.aio_pwrite(buffer, offset)))
        offset += length
    while h.aio_in_flight() > 0: h.poll(-1)
    h.flush()
    reads = [(data, nbd.Buffer(len(data)), offset) for offset, data, _, _ in pending]
    for data, buffer, offset in reads: h.aio_pread(buffer, offset)
    while h.aio_in_flight() > 0: h.poll(-1)
    sha = lambda data: hashlib.sha256(data).digest()
    same += [sha(data) == sha(buffer.to_bytearray()) for data, buffer, _ in reads]
print(json.dumps(same))
`,
    );
    expect(found).toEqual([true, true, true, true]);
  });

  it.runIf(nbdsh)('a flush on one connection covers the writes answered on another, and both see them', async () => {
    const found = await python(
      uris[kind],
      `
other = connect()
h.pwrite(b"first" + bytes(507), 8192)
other.flush()
print(json.dumps([bytes(other.pread(5, 8192)).decode(), h.can_multi_conn()]))
`,
    );
    expect(found).toEqual(['first', true]);
  });

  it.runIf(fio)('fio verifies random reads and writes of many sizes', async () => {
    const output = await runWell(
      'fio',
      '--name=verify',
      '--ioengine=nbd',
      `--uri=${uris[kind]}`,
      '--rw=randrw',
      '--bsrange=4k-256k',
      '--size=64M',
      '--io_size=64M',
      '--iodepth=32',
      '--fsync=32',
      '--verify=crc32c',
      '--verify_fatal=1',
    );
    expect(output).toMatch(/err= 0/);
  });
});

it.runIf(nbdsh)('a client that dies in the middle of its writes hurts nobody', async () => {
  const alive = await python(
    uris.tcp,
    `
import os
child = os.fork()
if child == 0:
    mine = connect()
    for n in range(64): mine.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(1 << 20)), n << 20)
    os.kill(os.getpid(), 9)
os.waitpid(child, 0)
print(json.dumps(errno(lambda: h.pwrite(b"alive" * 1024, 100 << 20))))
`,
  );
  expect(alive).toBe(0);
});

/** A client of our own, for what libnbd refuses to send even with its checks off. */
function rawExchange(bytes: Uint8Array, until: number): Promise<Buffer> {
  const attachedBytes = 18 + 32 + 20;
  return new Promise((resolve, reject) => {
    const socket = connect(tcp.port, '127.0.0.1');
    let received = Buffer.alloc(0);
    socket.on('data', (data) => {
      const before = received.length;
      received = Buffer.concat([received, data]);
      if (before < attachedBytes && received.length >= attachedBytes) socket.write(bytes);
      if (received.length >= attachedBytes + until) socket.destroy();
    });
    socket.on('error', reject);
    socket.on('close', () => resolve(received.subarray(attachedBytes)));
    socket.write(Buffer.concat([HELLO, go('data')]));
  });
}

it('a write of 65 MiB is skipped and refused, and the next request is understood', async () => {
  const bytes = Buffer.concat([write(1, 0, Buffer.alloc(65 * MIB)), write(2, 0, Buffer.alloc(512))]);
  expect(parseReplies(await rawExchange(bytes, 32))).toMatchObject([
    { cookie: 1, error: 22 },
    { cookie: 2, error: 0 },
  ]);
});

it.each([
  ['a write of 4 GiB - 1', request(Command.WRITE, 1, 0, 0xffff_ffff)],
  ['a bad magic', Buffer.alloc(28, 0x5a)],
])('%s ends the connection', async (_, bytes) => {
  expect(await rawExchange(bytes, 1)).toHaveLength(0);
});

it('sessions of real clients, with bytes changed, end one connection each and hurt nobody', async () => {
  const path = join(import.meta.dirname, '../vectors/nbd/sessions.json');
  const { sessions } = JSON.parse(readFileSync(path, 'utf8')) as {
    sessions: { clientNegotiation: string; requests: string[] }[];
  };
  let state = 20261122;
  const random = (below: number) => {
    state = (Math.imul(state, 1103515245) + 12345) >>> 0;
    return Math.floor((state / 2 ** 32) * below);
  };
  const one = (index: number) =>
    new Promise<void>((resolve, reject) => {
      const { clientNegotiation, requests } = sessions[index % sessions.length]!;
      const bytes = Buffer.from(clientNegotiation + requests.join(''), 'hex');
      for (let change = 0; change < 3; change++) bytes[random(bytes.length)] = random(256);
      const socket = connect(tcp.port, '127.0.0.1', () => {
        const cut = random(bytes.length);
        socket.write(bytes.subarray(0, cut));
        socket.write(bytes.subarray(cut));
        setTimeout(() => socket.destroy(), 20);
      });
      socket.on('data', () => {});
      socket.on('error', (error: NodeJS.ErrnoException) => (error.code === 'ECONNRESET' ? undefined : reject(error)));
      socket.on('close', () => resolve());
    });
  for (let round = 0; round < 10; round++)
    await Promise.all(Array.from({ length: 20 }, (_, index) => one(round * 20 + index)));
  expect(parseReplies(await rawExchange(write(2, 0, Buffer.alloc(512)), 16))).toMatchObject([{ cookie: 2, error: 0 }]);
});

it('200 connections that never say anything keep nobody out', async () => {
  const idle = Array.from({ length: 200 }, () => connect(tcp.port, '127.0.0.1').on('error', () => {}));
  await Promise.all(idle.map((socket) => new Promise((resolve) => socket.once('connect', resolve))));
  expect(parseReplies(await rawExchange(write(2, 0, Buffer.alloc(512)), 16))).toMatchObject([{ cookie: 2, error: 0 }]);
  for (const socket of idle) socket.destroy();
});

it.runIf(nbdsh)('a client that reads late gets all its replies', async () => {
  const found = await python(
    uris.unix,
    `
import time
buffers = [nbd.Buffer(1 << 20) for _ in range(100)]
for n, buffer in enumerate(buffers): h.aio_pread(buffer, n << 20)
time.sleep(0.3)
while h.aio_in_flight() > 0: h.poll(-1)
print(json.dumps(sum(len(buffer.to_bytearray()) for buffer in buffers)))
`,
  );
  expect(found).toBe(100 * MIB);
});

it('a client that disconnects is an opener no more, at once', async () => {
  const attached = Buffer.concat([HELLO, go('data')]);
  const socket = connect(tcp.port, '127.0.0.1', () => socket.write(attached));
  socket.on('error', () => {});
  await expect.poll(() => target.writers).toBe(1);
  const begin = performance.now();
  socket.write(Buffer.concat([write(1, 0, Buffer.alloc(512)), request(Command.DISC, 2, 0, 0)]));
  await new Promise((resolve) => socket.on('data', () => {}).on('close', resolve));
  await expect.poll(() => target.writers, { interval: 5 }).toBe(0);
  expect(performance.now() - begin).toBeLessThan(1000);
});

it('is left by all clients', async () => {
  for (let round = 0; round < 100 && server.clientCount('data') > 0; round++)
    await new Promise((resolve) => setTimeout(resolve, 20));
  expect([server.clientCount('data'), server.clientCount('frozen')]).toEqual([0, 0]);
  expect([target.readers, target.writers]).toEqual([0, 0]);
});
