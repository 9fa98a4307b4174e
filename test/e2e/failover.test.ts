/**
 * The reference cluster from two empty disks to two equal ones, as its operator sees it, failing over by hand: a
 * switchover, a head that loses power, a takeover, its return. Steps build on each other.
 */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import {
  canRunHeads,
  DRBDTS,
  drbdts,
  HandleKeeper,
  MiB,
  resourceStatus,
  SERVE,
  sha256,
  until,
  untilInSync,
  volumeStatus,
  WITHDRAW,
} from '../support/head-tests.js';
import { Cluster, VIP } from '../support/heads.js';
import { requires } from '../support/requires.js';

const DISK_BYTES = 256 * MiB;
const URL = `nfs://${VIP}/drbd`;

describe.runIf(canRunHeads())('failover by hand', () => {
  let cluster: Cluster;
  let keeper: HandleKeeper;
  let bigFileSum = '';

  beforeAll(async () => {
    cluster = await Cluster.create({
      projectDirectory: `${import.meta.dirname}/../..`,
      diskBytes: DISK_BYTES,
      rate: '1000M',
    });
  }, 30_000);
  afterAll(() => cluster?.destroy(), 30_000);

  it('a head does not come up without metadata, and says how to make it', async () => {
    const refused = await drbdts(cluster.master, 'up', 'data');
    expect(refused.stderr).toMatch(/create-md data/);
    expect(refused.status).toBeGreaterThanOrEqual(10);
    expect(await drbdts(cluster.master, 'role', 'data')).toMatchObject({ status: 0, stdout: 'Unconfigured\n' });
  });

  it('two empty disks: create-md, up, and neither head may be Primary without --force', async () => {
    for (const head of [cluster.master, cluster.backup]) {
      await head.sh(`${DRBDTS} create-md data`);
      await head.sh(`${DRBDTS} up data`);
    }
    await until(
      'connected',
      10_000,
      () => volumeStatus(cluster.master),
      (one) => one.connectionState === 'Connected',
    );
    const refused = await drbdts(cluster.master, 'primary', 'data');
    expect(refused.status).toBe(17);
    expect(refused.stderr).toMatch(/\(-2\) Need access to UpToDate data/);
    expect(refused.stderr).toMatch(/drbdts primary --force data/);
    const { stdout } = await drbdts(cluster.backup, 'status');
    expect(stdout).toMatch(/action: .*primary --force data/);
  });

  it('primary --force copies the whole disk to the other head', async () => {
    await cluster.master.sh(`${DRBDTS} primary --force data`);
    await untilInSync(cluster.backup, 60_000);
    const { sentKiB } = (await volumeStatus(cluster.master)).counters;
    expect(sentKiB * 1024).toBeGreaterThanOrEqual(DISK_BYTES);
    expect((await drbdts(cluster.master, 'status')).stdout).toMatch(/^data {2}OK {2}Primary on test-master .*\n$/);
  }, 70_000);

  it('a client writes by the address', async () => {
    await cluster.master.sh('mkfs.ext4 -q -b 4096 /dev/drbd0');
    await cluster.master.sh(SERVE);
    await cluster.master.sh('chown 65534:65534 /drbd');
    await cluster.client.sh('head -c 32M /dev/urandom >/tmp/big');
    bigFileSum = (await cluster.client.sh('sha256sum </tmp/big')).slice(0, 64);
    await cluster.client.sh(`${DRBDTS} nfs put /tmp/big ${URL}/big`);
    expect(await cluster.client.sh(`${DRBDTS} nfs cat ${URL}/big | sha256sum`)).toContain(bigFileSum);
    keeper = await HandleKeeper.start(cluster.client, 'kept');
    await keeper.progress(5000);
  }, 60_000);

  it.runIf(requires('nfs-cp', 'libnfs-utils'))('so does libnfs', async () => {
    await cluster.client.sh(`nfs-cp /tmp/big '${URL}/by-libnfs?uid=65534'`);
    expect(await cluster.client.sh(`nfs-cat ${URL}/by-libnfs | sha256sum`)).toContain(bigFileSum);
  });

  it('switchover: the client goes on with the handles it has', async () => {
    await cluster.master.sh(WITHDRAW);
    await cluster.backup.sh(SERVE);
    await keeper.progress(15_000);
    expect(await resourceStatus(cluster.backup)).toMatchObject({ role: 'Primary', peerRole: 'Secondary' });
    expect(await cluster.client.sh(`${DRBDTS} nfs cat ${URL}/big | sha256sum`)).toContain(bigFileSum);
    // Nothing of the kernel's stays behind where it was.
    expect(await cluster.master.sh('readlink /dev/drbd0 || echo none')).toBe('none\n');
  }, 60_000);

  it('a killed head: takeover by hand, the client goes on', async () => {
    await keeper.progress(5000);
    await cluster.backup.kill();
    await cluster.master.sh(SERVE);
    await keeper.progress(20_000);
    const { stdout } = await drbdts(cluster.master, 'status');
    expect(stdout).toMatch(/^data {2}DEGRADED {2}Primary on test-master/);
    expect(stdout).toMatch(/status: Writes are on this head only/);
    expect(await cluster.client.sh(`${DRBDTS} nfs cat ${URL}/big | sha256sum`)).toContain(bigFileSum);
    await cluster.client.sh(`${DRBDTS} nfs put /tmp/big ${URL}/while-alone`);
  }, 60_000);

  it('the head that was killed returns and fetches what changed, not everything', async () => {
    const outOfSync = (await volumeStatus(cluster.master)).outOfSyncBytes;
    expect(outOfSync).toBeGreaterThanOrEqual(32 * MiB);
    await cluster.bootHead(cluster.backup);
    await cluster.backup.sh(`${DRBDTS} up data`);
    await untilInSync(cluster.master, 60_000);
    const received = (await volumeStatus(cluster.backup)).counters.receivedKiB * 1024;
    expect(received).toBeGreaterThanOrEqual(32 * MiB);
    // What its activity log named, what was written while it was away, and what is written now.
    expect(received).toBeLessThan(0.75 * DISK_BYTES);
  }, 70_000);

  it('nothing acknowledged is lost, handles are what they were, and the disks are equal byte for byte', async () => {
    const report = await keeper.finish();
    expect(report.problems).toEqual([]);
    expect(report.acknowledged).toBeGreaterThan(20);
    expect(await cluster.client.sh(`${DRBDTS} nfs cat ${URL}/while-alone | sha256sum`)).toContain(bigFileSum);
    await cluster.master.sh(WITHDRAW);
    await untilInSync(cluster.master, 30_000);
    for (const head of [cluster.master, cluster.backup]) await head.sh(`${DRBDTS} down data`);
    const [master, backup] = await Promise.all(
      [cluster.master, cluster.backup].map((head) => sha256(cluster.diskPath(head, 'sdb1'))),
    );
    expect(master).toBe(backup);
  }, 90_000);

  it('after down nothing of it is left on the heads', async () => {
    for (const head of [cluster.master, cluster.backup]) {
      const left = await head.sh(
        'pgrep -fl engine-main || true; grep fuse-data /proc/mounts || true; ls /dev/drbd* 2>&1 || true',
      );
      expect(left).not.toMatch(/engine-main|fuse-data|drbd0/);
    }
  });
});
