/**
 * The Linux kernel's own NBD client, in a guest, against a resource of drbdts served over TCP: alone, and with every write
 * replicated to a second head. test/lab/nbd-check writes and compares, makes an ext4, has fio verify, discards, zeroes.
 */
import { execFileSync } from 'node:child_process';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { requires } from '../support/requires.js';
import { canBootGuests, type Head, HOST_ADDRESS, Lab } from './support/lab.js';

const SECOND_ADDRESS = '10.77.0.101';
const SIZE_KIB = 192 * 1024 + 4;
const CHECK_LIMIT_MS = 60_000;

const canRun =
  canBootGuests() &&
  requires('nbd-client', 'nbd-client') &&
  requires('mkfs.ext4', 'e2fsprogs') &&
  requires('fio', 'fio');

describe.runIf(canRun)("the kernel's NBD client", () => {
  let lab: Lab;
  let master: Head;
  let backup: Head;

  beforeAll(async () => {
    lab = await Lab.start();
    await lab.sh(`ip addr add ${SECOND_ADDRESS}/24 dev br0`);
    const masterPlace = { name: 'test-master', address: HOST_ADDRESS };
    const backupPlace = { name: 'test-backup', address: SECOND_ADDRESS };
    master = lab.addHead({ ...masterPlace, peer: backupPlace, sizeKib: SIZE_KIB });
    backup = lab.addHead({ ...backupPlace, peer: masterPlace, sizeKib: SIZE_KIB });
    for (const head of [master, backup]) await head.drbdts('create-md', '--force', 'data');
    await master.drbdts('up', '--nbd-listen', `${HOST_ADDRESS}:10809`, 'data');
    await master.drbdts('primary', '--force', 'data');
  });

  afterAll(() => lab?.destroy());

  const check = (connections: number) =>
    lab.script('nbd-check', ['-x', 'data', '-c', String(connections), '-s'], CHECK_LIMIT_MS);

  it('with one connection, to a head without its peer', { timeout: CHECK_LIMIT_MS + 5000 }, async () => {
    expect(await check(1)).toMatch(/discarded 64 MiB[\s\S]*PASSED/);
    const state = await master.state();
    expect(`${state.connectionState} ${state.diskState}/${state.peerDiskState}`).toBe('WFConnection UpToDate/DUnknown');
    // What it wrote is what the peer will have to get: the whole pattern at least.
    expect(state.outOfSyncBytes).toBeGreaterThanOrEqual(96 << 20);
  });

  it('with four connections, replicated', { timeout: CHECK_LIMIT_MS + 40_000 }, async () => {
    await backup.drbdts('up', 'data');
    await master.wait('Connected UpToDate/UpToDate', 30_000);
    const before = await master.state();
    expect(await check(4)).toMatch(/discarded 64 MiB[\s\S]*PASSED/);
    const state = await master.wait('Connected UpToDate/UpToDate');
    expect(state.counters['sentKiB']! - before.counters['sentKiB']!).toBeGreaterThan(64 << 10);
    expect(state.outOfSyncBytes).toBe(0);
    await master.drbdts('down', 'data');
    await backup.drbdts('down', 'data');
    // Two UpToDate disks are the same, byte by byte.
    execFileSync('cmp', [master.data, backup.data]);
  });
});
