/**
 * The whole NFS server in this process, over the native ring and a real ext4 on a loop device; its clients are libnfs
 * (which no one here wrote), our own command, and the port mapper's `rpcinfo`.
 */
import { execFileSync, spawn } from 'node:child_process';
import { createHash, randomBytes } from 'node:crypto';
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  rmSync,
  statSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Command } from 'commander';
import { pino } from 'pino';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { nfsCommand } from '../../src/cli/nfs.js';
import { parseExports } from '../../src/config/exports.js';
import type { JsonCall } from '../../src/io/json-lines.js';
import { NativeRing } from '../../src/io/native-ring.js';
import { openPosixFileSystem } from '../../src/io/posix-filesystem.js';
import { NfsRuntime } from '../../src/node/nfs-runtime.js';
import { requires } from '../support/requires.js';

const canMount = process.getuid?.() === 0 && existsSync('/dev/loop-control') && requires('mkfs.ext4', 'e2fsprogs');
const hasLibnfs = canMount && requires('nfs-ls', 'libnfs-utils');
const ADDON = new URL('../../native/drbdts.node', import.meta.url);

const POOL_BYTES = 64 * 1024 * 1024;
const NO_CALL: JsonCall = { progress: () => {}, signal: new AbortController().signal };

/** Runs a program without holding up the server, which lives on this thread. */
function run(program: string, ...args: string[]): Promise<{ status: number | null; out: Buffer; err: string }> {
  return new Promise((resolve, reject) => {
    const child = spawn(program, args, { timeout: 20_000 });
    const out: Buffer[] = [];
    let err = '';
    child.stdout.on('data', (chunk: Buffer) => out.push(chunk));
    child.stderr.on('data', (chunk: Buffer) => {
      err += chunk.toString();
    });
    child.on('error', reject);
    child.on('close', (status) => resolve({ status, out: Buffer.concat(out), err }));
  });
}

/** Runs `drbdts nfs ...` in this process. */
async function command(...args: string[]): Promise<{ status: number; out: string; err: string }> {
  const seen = { status: -1, out: '', err: '' };
  const program = new Command('drbdts').exitOverride();
  const environment = {
    out: (text: string) => {
      seen.out += text;
    },
    err: (text: string) => {
      seen.err += text;
    },
    isTerminal: false,
    env: {},
  };
  nfsCommand.register(program, environment, (code) => {
    seen.status = code;
  });
  await program.parseAsync(['nfs', ...args], { from: 'user' });
  return seen;
}

describe.runIf(canMount && existsSync(ADDON))('NFS over ext4', () => {
  let folder: string;
  let tree: string;
  let ring: NativeRing;
  let runtime: NfsRuntime;

  async function start(ports: { nfs: number; mount: number }): Promise<void> {
    const { table } = parseExports([
      { path: 'exports', text: `${tree} 127.0.0.0/8(rw,sync,insecure,no_root_squash,fsid=2)\n` },
    ]);
    ring = new NativeRing({ poolBytes: POOL_BYTES });
    runtime = new NfsRuntime(
      {
        ...{ exports: table, controlSocket: join(folder, 'control'), bind: ['127.0.0.1'] },
        ...{ ports: { ...ports, portmap: 0 }, portmap: 'own', handleKeys: ['00112233445566778899aabbccddeeff'] },
      },
      { ring, log: pino({ level: 'silent' }), openFileSystem: (path) => openPosixFileSystem(ring, path) },
    );
    await runtime.start();
    await control('serve');
  }

  async function stop(): Promise<void> {
    await runtime.stop();
    ring.close();
  }

  const control = (method: string, params: object = { path: tree }) =>
    Promise.resolve(runtime.handlers[method]!(params, NO_CALL));
  const mountTree = () => execFileSync('mount', ['-o', 'loop,noatime', join(folder, 'image'), tree]);
  const ourUrl = (path = '') => `nfs://127.0.0.1:${runtime.ports.nfs}${tree}${path}`;
  const libnfsUrl = (path = '/') =>
    `nfs://127.0.0.1${tree}${path}?nfsport=${runtime.ports.nfs}&mountport=${runtime.ports.mount}`;

  beforeAll(async () => {
    folder = mkdtempSync(join(tmpdir(), 'nfs-interop-'));
    tree = join(folder, 'tree');
    mkdirSync(tree);
    writeFileSync(join(folder, 'image'), '');
    truncateSync(join(folder, 'image'), 128 * 1024 * 1024);
    execFileSync('mkfs.ext4', ['-q', '-F', '-m', '0', join(folder, 'image')]);
    mountTree();
    await start({ nfs: 0, mount: 0 });
  });
  afterAll(async () => {
    await stop();
    execFileSync('umount', [tree]);
    rmSync(folder, { recursive: true });
  });

  it.runIf(hasLibnfs)('libnfs lists, copies there and reads back', async () => {
    const local = join(folder, 'local');
    writeFileSync(local, randomBytes(5_000_001));
    expect((await run('nfs-cp', local, libnfsUrl('/copied'))).out.toString()).toContain('copied 5000001 bytes');
    expect(readFileSync(join(tree, 'copied')).equals(readFileSync(local))).toBe(true);
    const back = await run('nfs-cat', libnfsUrl('/copied'));
    expect([back.status, back.out.equals(readFileSync(local))]).toEqual([0, true]);
    const listing = (await run('nfs-ls', libnfsUrl())).out.toString();
    expect(listing).toMatch(/^-.* 5000001 copied$/m);
    expect(listing).toMatch(/^d.* lost\+found$/m);
  });

  it.runIf(hasLibnfs)('libnfs sees that a file does not exist', async () => {
    const result = await run('nfs-cat', libnfsUrl('/nosuch'));
    expect(result.status).not.toBe(0);
    expect(result.err).toContain('NFS3ERR_NOENT');
  });

  it('our own command puts, lists, stats and gets, and says what does not exist', async () => {
    const local = join(folder, 'put');
    writeFileSync(local, randomBytes(3_333_333));
    expect((await command('put', local, ourUrl('/put'))).status).toBe(0);
    const rows = JSON.parse((await command('ls', '--json', ourUrl())).out) as { name: string; sizeBytes: number }[];
    expect(rows.find((row) => row.name === 'put')).toMatchObject({ sizeBytes: 3_333_333, mode: '0644', type: 'file' });
    const stat = JSON.parse((await command('stat', '--json', ourUrl('/put'))).out) as { fileId: string };
    expect(stat.fileId).toBe(String(statSync(join(tree, 'put')).ino));
    expect((await command('get', ourUrl('/put'), join(folder, 'got'))).status).toBe(0);
    expect(readFileSync(join(folder, 'got')).equals(readFileSync(local))).toBe(true);
    await expect(command('get', ourUrl('/nosuch'), join(folder, 'no'))).rejects.toMatchObject({ exitCode: 20 });
    await expect(command('put', join(folder, 'not-here'), ourUrl('/x'))).rejects.toMatchObject({
      ...{ name: 'OperatorError', exitCode: 20 },
    });
    expect(existsSync(join(tree, 'x'))).toBe(false);
    await expect(command('ls', 'nfs://127.0.0.1/x?nfsport=99999')).rejects.toMatchObject({ exitCode: 1 });
  });

  it('a listing of 3000 names is complete', async () => {
    mkdirSync(join(tree, 'many'));
    const names = Array.from({ length: 3000 }, (_, index) => `a-name-of-some-length-${index}`);
    for (const name of names) writeFileSync(join(tree, 'many', name), '');
    const rows = JSON.parse((await command('ls', '--json', ourUrl('/many'))).out) as { name: string }[];
    expect(rows.map((row) => row.name)).toEqual([...names].sort());
  });

  it('withdrawn in the middle of an upload: umount succeeds, the client only pauses', async () => {
    const local = join(folder, 'large');
    writeFileSync(local, randomBytes(30_000_000));
    const upload = command('put', local, ourUrl('/large'));
    while (!existsSync(join(tree, 'large'))) await new Promise((resolve) => setTimeout(resolve, 1));
    expect(await control('withdraw')).toMatchObject({ wasServed: true });
    execFileSync('umount', [tree]);
    await expect(control('serve')).rejects.toMatchObject({ reason: 'not-mounted' });
    mountTree();
    await control('serve');
    expect((await upload).status).toBe(0);
    expect(readFileSync(join(tree, 'large')).equals(readFileSync(local))).toBe(true);
  });

  it('another server takes over in the middle of an upload: same handles, a short pause, nothing lost', async () => {
    const local = join(folder, 'large');
    const upload = command('put', local, ourUrl('/taken-over'));
    while (!existsSync(join(tree, 'taken-over'))) await new Promise((resolve) => setTimeout(resolve, 1));
    const { nfs, mount } = runtime.ports;
    await stop();
    execFileSync('umount', [tree]);
    mountTree();
    await start({ nfs, mount });
    const result = await upload;
    expect(result.status).toBe(0);
    expect(result.err).toMatch(/server is back after/);
    const sum = (path: string) => createHash('sha256').update(readFileSync(path)).digest('hex');
    expect(sum(join(tree, 'taken-over'))).toBe(sum(local));
  });
});
