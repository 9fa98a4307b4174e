import { execFile, spawn } from 'node:child_process';
import { closeSync, mkdtempSync, openSync, rmSync, truncateSync, writeFileSync, writeSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { pino } from 'pino';
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { createMetadata } from '../../src/cli/create-md.js';
import type { MetadataContext } from '../../src/cli/metadata-target.js';
import { parseTarget } from '../../src/cli/metadata-target.js';
import { loadConfig } from '../../src/config/drbd-conf.js';
import { resolveResource } from '../../src/config/resource.js';
import { NativeRing } from '../../src/io/native-ring.js';
import { Engine } from '../../src/node/engine.js';
import { requires } from '../support/requires.js';

const run = promisify(execFile);
const MiB = 1024 * 1024;
const hasTools =
  requires('nbdinfo', 'libnbd-bin') &&
  requires('qemu-img', 'qemu-utils') &&
  requires('/usr/lib/python3/dist-packages/nbd.py', 'python3-libnbd');

let folder: string;
let disk: string;
let uri: string;
let ring: NativeRing;
let engine: Engine;

/** One head alone: a sparse file of 64 MiB with data at 8 MiB and at 40 MiB, its metadata beside it. */
beforeEach(async () => {
  folder = mkdtempSync(join(tmpdir(), 'drbdts-engine-'));
  disk = join(folder, 'disk');
  const meta = join(folder, 'meta');
  for (const [path, size] of [
    [disk, 64 * MiB],
    [meta, 4 * MiB],
  ] as const) {
    writeFileSync(path, '');
    truncateSync(path, size);
  }
  const fd = openSync(disk, 'r+');
  for (const at of [8, 40]) writeSync(fd, Buffer.alloc(MiB, 0x5a), 0, MiB, at * MiB);
  closeSync(fd);
  const text = `resource r {
    on a { device minor 0; disk ${disk}; meta-disk ${meta}; address 127.0.0.1:17788; }
    on b { device minor 0; disk ${disk}; meta-disk ${meta}; address 127.0.0.2:17788; }
  }`;
  const source = {
    read: (path: string) => (path === '/r' ? text : undefined),
    glob: () => [],
    realPath: (p: string) => p,
  };
  const resource = resolveResource(loadConfig(source, '/r').config, 'r', 'a');
  const quiet = { out: () => {}, err: () => {} };
  createMetadata(parseTarget(disk, meta), { force: true }, quiet as unknown as MetadataContext);
  ring = new NativeRing({ poolBytes: 256 * MiB });
  const nbdSocket = join(folder, 'nbd');
  const log = pino({ level: 'silent' });
  engine = new Engine({ resource, controlSocket: join(folder, 'control'), nbdSocket }, ring, log, () => {});
  await engine.start();
  uri = `nbd+unix:///r?socket=${nbdSocket}`;
});

afterEach(async () => {
  await engine.stop();
  ring.close();
  rmSync(folder, { recursive: true });
});

const NO_CALL = { progress: () => {}, signal: new AbortController().signal };
const call = (method: string, params: object = {}) => engine.handlers[method]!(params, NO_CALL);

describe.runIf(hasTools)('the engine over NBD', () => {
  it('refuses clients while it is Secondary, with the reason', async () => {
    await expect(run('nbdinfo', [uri])).rejects.toThrow(/nbd_opt_go: server replied with error/);
  });

  it('tells holes from data once it is Primary, and what qemu-img copies out is the disk', async () => {
    await call('primary', { force: true });
    const map = JSON.parse((await run('nbdinfo', ['--map', '--json', uri])).stdout) as {
      offset: number;
      length: number;
      type: number;
    }[];
    const expected = [
      [0, 8, 3],
      [8, 1, 0],
      [9, 31, 3],
      [40, 1, 0],
      [41, 23, 3],
    ];
    expect(map.map(({ offset, length, type }) => [offset / MiB, length / MiB, type])).toEqual(expected);
    await run('qemu-img', ['convert', '-O', 'raw', uri, join(folder, 'copy')]);
    expect((await run('cmp', [disk, join(folder, 'copy')])).stdout).toBe('');
    await call('secondary');
  });

  it('is not demoted while a client has it open, and says who', async () => {
    await call('primary', { force: true });
    const script = "print('open', flush=True); import time; time.sleep(60)";
    const client = spawn('nbdsh', ['-u', uri, '-c', script], {
      stdio: ['ignore', 'pipe', 'ignore'],
      // Debian's python3, the one that has the module, before any other.
      env: { ...process.env, PATH: `/usr/bin:${process.env.PATH}` },
    });
    await new Promise<void>((resolve, reject) => {
      client.stdout.once('data', () => resolve());
      client.once('exit', () => reject(new Error('nbdsh ended')));
    });
    await expect(call('secondary')).rejects.toThrow(/\(-12\) Device is held open by someone[\s\S]*1 NBD client/);
    const gone = new Promise((resolve) => client.once('exit', resolve));
    client.kill('SIGKILL');
    await gone;
    await vi.waitFor(() => call('secondary'), { timeout: 10_000 });
  });
});
