/** What the tests over the two-head reference cluster share. */
import type { ChildProcess } from 'node:child_process';
import { createHash } from 'node:crypto';
import { createReadStream, existsSync } from 'node:fs';
import { resolve } from 'node:path';
import { build } from 'esbuild';
import type { ResourceStatus, VolumeStatus } from '../../src/node/status.js';
import type { KeeperReport } from './handle-keeper.js';
import { type Machine, type Result, VIP } from './heads.js';
import { requires } from './requires.js';

export const PROJECT = resolve(import.meta.dirname, '../..');
export const DRBDTS = `${PROJECT}/bin/drbdts`;
export const MiB = 1024 * 1024;

/** Can namespaces with block devices be made here? What is missing is told and counted (see `requires`). */
export function canRunHeads(): boolean {
  if (process.getuid?.() !== 0) {
    process.stderr.write('skipped: tests over two heads: run as root\n');
    return false;
  }
  if (!existsSync(`${PROJECT}/dist/cli/main.js`)) throw new Error('build first: make build');
  return (
    requires('/dev/fuse', 'linux-image-amd64 (module fuse)') &&
    requires('/dev/loop-control', 'linux-image-amd64 (module loop)') &&
    requires('ip', 'iproute2') &&
    requires('unshare', 'util-linux') &&
    requires('losetup', 'mount') &&
    requires('arping', 'iputils-arping') &&
    requires('mkfs.ext4', 'e2fsprogs')
  );
}

/** What an operator does to serve from a head; the address comes last. */
export const SERVE = `set -e
${DRBDTS} primary data
mount /dev/drbd0 /drbd
${DRBDTS} exportfs -a >/dev/null
ip addr add ${VIP}/24 dev eth0
arping -q -c 1 -U -I eth0 ${VIP} || true`;

/** And to stop; the address goes first, so that no client sees the export go. */
export const WITHDRAW = `set -e
ip addr del ${VIP}/24 dev eth0
${DRBDTS} exportfs -u /drbd >/dev/null
umount /drbd
${DRBDTS} secondary data`;

export function drbdts(head: Machine, ...args: string[]): Promise<Result> {
  return head.exec([DRBDTS, ...args]);
}

export async function resourceStatus(head: Machine): Promise<ResourceStatus> {
  const [status] = JSON.parse(await head.sh(`${DRBDTS} status data --json`)) as [ResourceStatus];
  return status;
}

export async function volumeStatus(head: Machine): Promise<VolumeStatus> {
  return (await resourceStatus(head)).devices[0]!;
}

/** Polls until `condition`; fails with what it saw last. */
export async function until<T>(
  what: string,
  limitMs: number,
  look: () => Promise<T> | T,
  condition: (seen: T) => boolean,
): Promise<T> {
  for (const deadline = Date.now() + limitMs; ; ) {
    const seen = await look();
    if (condition(seen)) return seen;
    if (Date.now() > deadline) throw new Error(`${what}: not within ${limitMs} ms; last seen: ${JSON.stringify(seen)}`);
    await new Promise((done) => setTimeout(done, 50));
  }
}

/** Waits for two good copies, connected. */
export function untilInSync(head: Machine, limitMs: number): Promise<VolumeStatus> {
  return until(
    `${head.name}: in sync`,
    limitMs,
    () => volumeStatus(head),
    ({ connectionState, diskState, peerDiskState }) =>
      connectionState === 'Connected' && diskState === 'UpToDate' && peerDiskState === 'UpToDate',
  );
}

export function sha256(path: string): Promise<string> {
  return new Promise((done, failed) => {
    const hash = createHash('sha256');
    createReadStream(path, { highWaterMark: MiB })
      .on('data', (chunk) => hash.update(chunk))
      .on('error', failed)
      .on('end', () => done(hash.digest('hex')));
  });
}

/** Runs `test/support/handle-keeper.ts` in a machine. */
export class HandleKeeper {
  private output: string[] = [];
  private errors = '';
  private ended = false;

  private constructor(private readonly child: ChildProcess) {
    let rest = '';
    child.stdout!.on('data', (chunk: Buffer) => {
      const lines = (rest + chunk.toString()).split('\n');
      rest = lines.pop()!;
      this.output.push(...lines);
    });
    child.stderr!.on('data', (chunk: Buffer) => {
      this.errors += chunk.toString();
    });
    child.on('close', () => {
      this.ended = true;
    });
  }

  /** Resolves when it has its handles and writes. */
  static async start(client: Machine, name: string): Promise<HandleKeeper> {
    const program = `${PROJECT}/build/handle-keeper.mjs`;
    await build({
      ...{ entryPoints: [`${PROJECT}/test/support/handle-keeper.ts`], outfile: program },
      ...{ bundle: true, platform: 'node', format: 'esm', logLevel: 'warning' },
    });
    const keeper = new HandleKeeper(client.spawn([process.execPath, program, VIP, '/drbd', name]));
    await keeper.line(15_000, (text) => text === 'ready');
    return keeper;
  }

  private async line(limitMs: number, wanted: (text: string) => boolean): Promise<string> {
    const at = await until(
      'an answer of the handle keeper',
      limitMs,
      () => {
        const index = this.output.findIndex(wanted);
        if (index < 0 && this.ended) throw new Error(`the handle keeper ended: ${this.errors}`);
        return index;
      },
      (index) => index >= 0,
    );
    return this.output.splice(at, 1)[0]!;
  }

  /** Writes acknowledged so far. */
  async count(): Promise<number> {
    this.child.stdin!.write('count\n');
    return Number(await this.line(5000, (text) => /^\d+$/.test(text)));
  }

  /** Waits until something more is acknowledged. */
  async progress(limitMs: number): Promise<void> {
    const before = await this.count();
    await until(
      'more acknowledged writes',
      limitMs,
      () => this.count(),
      (now) => now > before + 4,
    );
  }

  async finish(): Promise<KeeperReport> {
    this.child.stdin!.write('stop\n');
    return JSON.parse(await this.line(60_000, (text) => text.startsWith('{'))) as KeeperReport;
  }
}
