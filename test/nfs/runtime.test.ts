import { mkdirSync, mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { pino } from 'pino';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { exportOf, parseNfsUrl } from '../../src/cli/nfs.js';
import { parseExports } from '../../src/config/exports.js';
import type { JsonCall } from '../../src/io/json-lines.js';
import { HostNames, rulesOf, unsupportedClients } from '../../src/node/export-rules.js';
import { readHandleKeys } from '../../src/node/handle-keys.js';
import type { NfsOptions } from '../../src/node/nfs-options.js';
import { NfsRuntime } from '../../src/node/nfs-runtime.js';
import { FakeMemory } from '../support/fake-ring.js';
import { MemoryFileSystem } from '../support/memory-filesystem.js';

const NO_CALL: JsonCall = { progress: () => {}, signal: new AbortController().signal };
const tableOf = (text: string) => parseExports([{ path: 'exports', text }]).table;

let folder: string;
let filesystem: MemoryFileSystem;
let opened: string[];
let runtime: NfsRuntime;
let logged: string[];

function make(options: Partial<NfsOptions> = {}): NfsRuntime {
  const memory = new FakeMemory(1024 * 1024);
  filesystem = new MemoryFileSystem(memory);
  opened = [];
  logged = [];
  const log = pino({ level: 'warn' }, { write: (line: string) => void logged.push(line) });
  const ring = { memory, backend: 'fake', listenTcp: (_host: string, port: number) => ({ port, close: () => {} }) };
  return new NfsRuntime(
    {
      ...{ exports: tableOf('/proc *(rw)\n/ 10.0.0.0/8(ro)\n/tmp/nowhere-at-all *(rw)\n'), portmap: 'none' },
      ...{ controlSocket: join(folder, 'control'), handleKeys: ['00'.repeat(16)], bind: ['127.0.0.1'] },
      ...{ ports: { nfs: 2049, mount: 0 } },
      ...options,
    },
    {
      ring,
      log,
      openFileSystem: async (path) => {
        opened.push(path);
        return filesystem;
      },
    },
  );
}
const control = async (method: string, params: object): Promise<unknown> => runtime.handlers[method]!(params, NO_CALL);

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'nfs-runtime-'));
  runtime = make();
});
afterEach(async () => {
  await runtime.stop();
  rmSync(folder, { recursive: true });
});

describe('the control channel', () => {
  it('serves a mounted path once, withdraws it, and serves it again', async () => {
    expect(await control('serve', { path: '/proc' })).toMatchObject({ path: '/proc' });
    await control('serve', { path: '/proc/' });
    expect(opened).toEqual(['/proc']);
    expect(await control('status', {})).toMatchObject({ exports: [{ path: '/proc', isServed: true }, {}, {}] });
    expect(await control('withdraw', { path: '/proc' })).toEqual({ path: '/proc', wasServed: true });
    expect(filesystem.isWithdrawn).toBe(true);
    expect(await control('withdraw', { path: '/proc' })).toEqual({ path: '/proc', wasServed: false });
    await control('serve', { path: '/proc' });
    expect(opened.length).toBe(2);
  });

  it('refuses what is not exported, not there, or on the root filesystem', async () => {
    await expect(control('serve', { path: '/srv' })).rejects.toMatchObject({ reason: 'not-exported', exitCode: 10 });
    await expect(control('serve', { path: '/tmp/nowhere-at-all' })).rejects.toMatchObject({ reason: 'stat' });
    await expect(control('serve', {})).rejects.toMatchObject({ exitCode: 1 });
    runtime = make({ exports: tableOf(`${folder} *(rw,mp)\n`) });
    await expect(control('serve', { path: folder })).rejects.toMatchObject({ reason: 'not-mounted', exitCode: 11 });
    if (statSync(folder).dev === statSync('/').dev) {
      runtime = make({ exports: tableOf(`${folder} *(rw)\n`) });
      await expect(control('serve', { path: folder })).rejects.toMatchObject({ reason: 'not-mounted' });
    }
    expect(opened).toEqual([]);
  });

  it('a withdrawal that comes while the tree is being opened wins', async () => {
    let finish = () => {};
    const gate = new Promise<void>((resolve) => {
      finish = resolve;
    });
    const doors = (runtime as unknown as { doors: { openFileSystem: unknown } }).doors;
    doors.openFileSystem = async () => {
      opened.push('late');
      await gate;
      return filesystem;
    };
    const serving = expect(control('serve', { path: '/proc' })).rejects.toMatchObject({ reason: 'withdrawn' });
    while (opened.length === 0) await new Promise((resolve) => setImmediate(resolve));
    await control('withdraw', { path: '/proc' });
    finish();
    await serving;
    expect(filesystem.isWithdrawn).toBe(true);
  });

  it('a new table takes force as a whole; trees of exports that went are withdrawn', async () => {
    await control('serve', { path: '/proc' });
    await expect(control('exports', {})).rejects.toMatchObject({ exitCode: 1 });
    expect(await control('exports', { table: tableOf('/proc 10.1.0.0/16(ro)\n') })).toEqual({ withdrawn: [] });
    expect(filesystem.isWithdrawn).toBe(false);
    expect(await control('exports', { table: tableOf('/sys *(ro)\n') })).toEqual({ withdrawn: ['/proc'] });
    expect(filesystem.isWithdrawn).toBe(true);
  });
});

describe('keys of file handles', () => {
  it('are made once, in the tree itself, readable by root only, and are the same for whoever mounts it', async () => {
    const tree = join(folder, 'tree');
    mkdirSync(tree, { recursive: true });
    const first = await readHandleKeys(tree, () => 'aa'.repeat(16));
    expect(first).toEqual(['aa'.repeat(16)]);
    expect(await readHandleKeys(tree, () => 'bb'.repeat(16))).toEqual(first);
    const file = join(tree, '.drbdts', 'nfs-handle-keys');
    expect(readFileSync(file, 'utf8')).toBe(`${'aa'.repeat(16)}\n`);
    expect(statSync(file).mode & 0o777).toBe(0o600);
    writeFileSync(file, `${'cc'.repeat(16)}\n${'aa'.repeat(16)}\n`);
    expect(await readHandleKeys(tree, () => 'bb'.repeat(16))).toEqual(['cc'.repeat(16), 'aa'.repeat(16)]);
    writeFileSync(file, '\n');
    await expect(readHandleKeys(tree, () => 'bb'.repeat(16))).rejects.toThrow(/no key/);
  });

  it('a bad key is refused', () => {
    expect(() => make({ handleKeys: ['xyz'] })).toThrow(/32 hexadecimal digits/);
  });
});

describe('exports from the operator', () => {
  it('become rules: options, fsid, host names', async () => {
    const table = tableOf('/a 10.0.0.0/8(rw,no_root_squash,fsid=7) localhost(ro,insecure) *.example(rw) @net(rw)\n');
    const names = new HostNames();
    const [before] = rulesOf(table, names);
    expect(before).toMatchObject({ path: '/a', fsid: 7 });
    expect(before!.optionsFor('10.2.3.4')).toMatchObject({ writable: true, rootSquash: false, secure: true });
    expect(before!.optionsFor('127.0.0.1')).toBeUndefined();
    expect(await names.resolve(table)).toBe(true);
    expect(await names.resolve(table)).toBe(false);
    const [after] = rulesOf(table, names);
    expect(after!.optionsFor('127.0.0.1')).toMatchObject({ writable: false, secure: false });
    expect(after!.optionsFor('192.168.0.1')).toBeUndefined();
    expect(unsupportedClients(table).length).toBe(2);
  });
});

describe('the client command', () => {
  it('reads URLs', () => {
    expect(parseNfsUrl('nfs://h/a%20b/c?mountport=5&nfsport=6&uid=7', 0, 9)).toEqual({
      ...{ host: 'h', path: '/a b/c', nfsPort: 6, mountPort: 5, uid: 7, gid: 9 },
    });
    expect(parseNfsUrl('nfs://[fe80::1]:99/x', 1, 2)).toMatchObject({ host: 'fe80::1', nfsPort: 99, mountPort: 99 });
    expect(parseNfsUrl('nfs://h', 1, 2)).toMatchObject({ path: '/', nfsPort: undefined, mountPort: undefined });
    for (const wrong of ['http://h/', 'h:/x', 'nfs:///x', 'nfs://h/x?foo=1', 'nfs://h/x?nfsport=65536'])
      expect(() => parseNfsUrl(wrong, 0, 0)).toThrow(/expected nfs:\/\//);
  });

  it('finds the export that holds a path by whole names', () => {
    const exported = ['/', '/srv', '/srv/data', '/srv/dat'];
    expect(exportOf('/srv/data/x', exported)).toBe('/srv/data');
    expect(exportOf('/srv/database', exported)).toBe('/srv');
    expect(exportOf('/etc', exported)).toBe('/');
    expect(exportOf('/etc', ['/srv'])).toBeUndefined();
  });
});
