/**
 * `make demo`: the reference setup in namespaces. Two heads sync, one serves a client over NFS and is killed in the middle
 * of it, the other takes over, the dead one comes back and catches up, and the service moves back in good order. Ends with
 * a table, and with an error if a single acknowledged byte is missing.
 */
import { createHash } from 'node:crypto';
import { createReadStream } from 'node:fs';
import { resolve } from 'node:path';
import { Cluster, type Machine, VIP } from '../test/support/heads.js';

const PROJECT = resolve(import.meta.dirname, '..');
const DRBDTS = `${PROJECT}/bin/drbdts`;
const DISK_BYTES = 1024 * 1024 * 1024;
const RATE = '1000M';
const MiB = 1024 * 1024;

const started = Date.now();
const rows: [string, string][] = [];

function say(text: string): void {
  process.stdout.write(`[${((Date.now() - started) / 1000).toFixed(1).padStart(5)} s] ${text}\n`);
}

function progress(text: string): void {
  if (process.stdout.isTTY) process.stdout.write(`\r          ${text}\u001b[K`);
  else process.stdout.write(`          ${text}\n`);
}

function row(what: string, value: string): void {
  rows.push([what, value]);
}

const pause = (ms: number) => new Promise((done) => setTimeout(done, ms));

interface Volume {
  readonly diskState: string;
  readonly peerDiskState: string;
  readonly connectionState: string;
  readonly outOfSyncBytes: number;
  readonly resync?: { readonly donePercent: number; readonly speedBytesPerSecond: number };
}

async function volume(head: Machine): Promise<Volume> {
  const [status] = JSON.parse(await head.sh(`${DRBDTS} status data --json`)) as [{ devices: [Volume] }];
  return status.devices[0];
}

/** Waits for two good copies; returns how long it took and what was out of sync at first. */
async function waitForSync(head: Machine, limitMs: number): Promise<{ ms: number; bytes: number }> {
  const from = Date.now();
  let bytes = 0;
  let lastShown = 0;
  for (;;) {
    const now = await volume(head);
    bytes = Math.max(bytes, now.outOfSyncBytes);
    if (now.diskState === 'UpToDate' && now.peerDiskState === 'UpToDate' && now.connectionState === 'Connected') break;
    if (Date.now() - from > limitMs) throw new Error(`no sync within ${limitMs / 1000} s: ${JSON.stringify(now)}`);
    if (now.resync && Date.now() - lastShown > 1000) {
      lastShown = Date.now();
      progress(
        `resync ${now.resync.donePercent.toFixed(0)} %, ${(now.resync.speedBytesPerSecond / MiB).toFixed(0)} MiB/s`,
      );
    }
    await pause(50);
  }
  if (lastShown && process.stdout.isTTY) process.stdout.write('\r\u001b[K');
  return { ms: Date.now() - from, bytes };
}

/** What an operator (later: the cluster manager) does to serve from a head, in this order; the address comes last. */
const SERVE = `set -e
${DRBDTS} primary data
mount /dev/drbd0 /drbd
${DRBDTS} exportfs -a >/dev/null
ip addr add ${VIP}/24 dev eth0
arping -q -c 1 -U -I eth0 ${VIP} || true`;

const WITHDRAW = `set -e
ip addr del ${VIP}/24 dev eth0
${DRBDTS} exportfs -u /drbd >/dev/null
umount /drbd
${DRBDTS} secondary data`;

interface WriterReport {
  readonly files: number;
  readonly bytes: number;
  readonly longestPauseMs: number;
  readonly problems: readonly string[];
}

/** A client that never stops: writes small files, syncs each, and remembers what was acknowledged. */
class Writer {
  private readonly child;
  private output = '';
  private errors = '';
  private readonly ended: Promise<number | null>;

  constructor(client: Machine, folder: string) {
    this.child = client.spawn(['node', `${PROJECT}/build/demo-writer.mjs`, `nfs://${VIP}/drbd`, folder]);
    this.child.stdout!.on('data', (chunk: Buffer) => {
      this.output += chunk.toString();
    });
    this.child.stderr!.on('data', (chunk: Buffer) => {
      this.errors += chunk.toString();
    });
    this.ended = new Promise((done) => this.child.on('close', done));
  }

  /** Lets it finish the file it is at, then has it read everything back. */
  async finish(): Promise<WriterReport> {
    this.child.stdin!.end('stop\n');
    const status = await this.ended;
    if (status !== 0) throw new Error(`the client's writer ended with ${status}: ${this.errors}${this.output}`);
    return JSON.parse(this.output) as WriterReport;
  }
}

function sha256(path: string): Promise<string> {
  return new Promise((done, failed) => {
    const hash = createHash('sha256');
    createReadStream(path, { highWaterMark: MiB })
      .on('data', (chunk) => hash.update(chunk))
      .on('error', failed)
      .on('end', () => done(hash.digest('hex')));
  });
}

function checkReport(what: string, report: WriterReport): void {
  if (report.problems.length > 0) throw new Error(`${what}: data was lost:\n  ${report.problems.join('\n  ')}`);
  if (report.files === 0) throw new Error(`${what}: the client wrote nothing`);
}

async function demo(cluster: Cluster): Promise<void> {
  const { master, backup, client } = cluster;
  say('two heads and a client are up (three network namespaces, two networks)');

  for (const head of [master, backup]) await head.sh(`${DRBDTS} create-md data`);
  for (const head of [master, backup]) await head.sh(`${DRBDTS} up data`);
  say('metadata created, resource "data" up on both heads');

  await master.sh(`${DRBDTS} primary --force data`);
  say(`test-master is Primary; full sync of ${DISK_BYTES / MiB} MiB`);
  const full = await waitForSync(backup, 120_000);
  const rate = full.bytes / MiB / (full.ms / 1000);
  say(`both disks UpToDate after ${(full.ms / 1000).toFixed(1)} s`);
  row(
    'initial sync',
    `${(full.bytes / MiB).toFixed(0)} MiB in ${(full.ms / 1000).toFixed(1)} s: ${rate.toFixed(0)} MiB/s`,
  );

  await master.sh('mkfs.ext4 -q -b 4096 /dev/drbd0');
  await master.sh(SERVE);
  // Every client is nobody here (all_squash), so the tree must be nobody's.
  await master.sh('chown 65534:65534 /drbd');
  say(`ext4 made, mounted, exported; ${VIP} is on test-master`);

  // A big file by the command line client, checked at the very end.
  await client.sh('head -c 64M /dev/urandom >/tmp/big');
  const sum = (await client.sh('sha256sum </tmp/big')).slice(0, 64);
  const putFrom = Date.now();
  await client.sh(`${DRBDTS} nfs put /tmp/big nfs://${VIP}/drbd/big`, 120_000);
  const putMs = Date.now() - putFrom;
  say(`the client wrote 64 MiB in ${(putMs / 1000).toFixed(1)} s`);
  row(
    'one file over NFS, both disks',
    `64 MiB in ${(putMs / 1000).toFixed(1)} s: ${(64 / (putMs / 1000)).toFixed(0)} MiB/s`,
  );

  const first = new Writer(client, 'before-and-after-the-crash');
  await pause(2000);
  say('the client writes small files all the while; now every process of test-master is killed');
  await master.kill();
  const killedAt = Date.now();
  await backup.sh(SERVE);
  say(`test-backup is Primary, mounted, exported, has ${VIP} (commands took ${Date.now() - killedAt} ms)`);
  await pause(3000);
  const crash = await first.finish();
  checkReport('crash', crash);
  say(
    `${crash.files} files written across the crash, each read back and equal; longest pause ${crash.longestPauseMs} ms`,
  );
  row('files written across the crash', `${crash.files}, all read back equal`);
  row('client pause: head killed', `${crash.longestPauseMs} ms`);

  await cluster.bootHead(master);
  await master.sh(`${DRBDTS} up data`);
  const partial = await waitForSync(backup, 60_000);
  say(`test-master is back and caught up in ${(partial.ms / 1000).toFixed(1)} s`);
  row('resync after the crash', `${(partial.bytes / MiB).toFixed(1)} MiB of ${DISK_BYTES / MiB} MiB`);

  const second = new Writer(client, 'before-and-after-the-switchover');
  await pause(1500);
  const switchFrom = Date.now();
  await backup.sh(WITHDRAW);
  await master.sh(SERVE);
  say(`planned switchover back to test-master (commands took ${Date.now() - switchFrom} ms)`);
  await pause(1500);
  const moved = await second.finish();
  checkReport('switchover', moved);
  row('files written across the switchover', `${moved.files}, all read back equal`);
  row('client pause: planned switchover', `${moved.longestPauseMs} ms`);

  const again = (await client.sh(`${DRBDTS} nfs cat nfs://${VIP}/drbd/big | sha256sum`, 120_000)).slice(0, 64);
  if (again !== sum) throw new Error(`the 64 MiB file changed: ${again} instead of ${sum}`);
  row('checksum of the 64 MiB file', 'equal after crash and switchover');

  await master.sh(WITHDRAW);
  await waitForSync(master, 30_000);
  for (const head of [master, backup]) await head.sh(`${DRBDTS} down data`);
  const [left, right] = await Promise.all([master, backup].map((head) => sha256(cluster.diskPath(head, 'sdb1'))));
  if (left !== right) throw new Error('the two disks differ');
  row('both disks, byte for byte', 'equal');
  say('both disks are byte for byte equal');
}

function table(): string {
  const width = Math.max(...rows.map(([what]) => what.length));
  const line = `+${'-'.repeat(width + 2)}+${'-'.repeat(44)}+`;
  return [line, ...rows.map(([what, value]) => `| ${what.padEnd(width)} | ${value.padEnd(42)} |`), line].join('\n');
}

async function logsOf(cluster: Cluster): Promise<string> {
  const parts: string[] = [];
  for (const head of [cluster.master, cluster.backup]) {
    if (!head.isRunning) continue;
    const result = await head.exec(['bash', '-c', 'tail -n 30 /var/log/drbdts/*.log; dmesg | tail -n 5']);
    parts.push(`--- ${head.name}\n${result.stdout}`);
  }
  return parts.join('\n');
}

if (process.getuid?.() !== 0) {
  process.stderr.write('make demo makes network namespaces and mounts, so it must be run as root: sudo make demo\n');
  process.exit(1);
}
let status = 0;
const cluster = await Cluster.create({ projectDirectory: PROJECT, diskBytes: DISK_BYTES, rate: RATE });
const interrupted = () => {
  void cluster.destroy().then(() => process.exit(130));
};
process.on('SIGINT', interrupted).on('SIGTERM', interrupted);
try {
  await demo(cluster);
  process.stdout.write(`\n${table()}\n\nNothing acknowledged was lost.\n`);
} catch (error) {
  status = 1;
  process.stdout.write(`\nDEMO FAILED: ${(error as Error).message}\n\n${await logsOf(cluster)}\n`);
} finally {
  await cluster.destroy();
}
process.exit(status);
