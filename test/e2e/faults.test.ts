/**
 * What breaks while two heads serve, and what the operator does about it: refused role changes, processes killed one by
 * one, a lost disk, a full disk, a split brain. `drbdts status` must say each time whether the data is safe and what to do.
 */
import { execFileSync } from 'node:child_process';
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
import { Cluster, type Machine } from '../support/heads.js';

const DISK_BYTES = 128 * MiB;

/** A second resource, whose disk on test-master is a sparse file in a tmpfs that is too small for it. */
const TINY = `resource tiny {
  protocol C;
  device /dev/drbd1;
  disk /tiny/disk;
  meta-disk internal;
  disk { on-io-error detach; resync-rate 1000M; }
  on test-master { address 172.16.1.113:7789; }
  on test-backup { address 172.16.1.114:7789; }
}
`;

const kill = (head: Machine, what: string) => head.sh(`kill -9 $(pgrep -f '[/]${what}-main.js')`);
const pidOf = async (head: Machine, what: string) => (await head.sh(`pgrep -f '[/]${what}-main.js' || true`)).trim();

describe.runIf(canRunHeads())('faults of a serving cluster', () => {
  let cluster: Cluster;
  let master: Machine;
  let backup: Machine;
  let keeper: HandleKeeper | undefined;

  beforeAll(async () => {
    cluster = await Cluster.create({
      projectDirectory: `${import.meta.dirname}/../..`,
      diskBytes: DISK_BYTES,
      rate: '1000M',
    });
    ({ master, backup } = cluster);
    for (const head of [master, backup]) await head.sh(`${DRBDTS} create-md data && ${DRBDTS} up data`);
    await master.sh(`${DRBDTS} primary --force data`);
    await master.sh('mkfs.ext4 -q -b 4096 /dev/drbd0');
    await master.sh(SERVE);
    await master.sh('chown 65534:65534 /drbd');
    await untilInSync(master, 30_000);
    keeper = await HandleKeeper.start(cluster.client, 'kept');
  }, 90_000);
  afterAll(() => cluster?.destroy(), 30_000);

  it('secondary while mounted: 11, and names the mount', async () => {
    for (const command of ['secondary', 'down']) {
      const { status, stderr } = await drbdts(master, command, 'data');
      expect(status, command).toBe(11);
      expect(stderr).toMatch(/State change failed: \(-12\) Device is held open by someone/);
      expect(stderr).toMatch(/mounted on \/drbd/);
      expect(stderr).toMatch(/drbdts exportfs -u PATH; umount PATH/);
    }
    await keeper!.progress(10_000);
  }, 30_000);

  it('primary on both: 11, and says where it is Primary', async () => {
    const { status, stderr } = await drbdts(backup, 'primary', 'data');
    expect(status).toBe(11);
    expect(stderr).toMatch(/\(-1\) Multiple primaries not allowed by config/);
    expect(stderr).toMatch(/test-master is Primary/);
    expect((await drbdts(backup, 'primary', '--force', 'data')).status).toBe(11);
  });

  it('a Secondary gives no device, and its NBD export refuses', async () => {
    expect(await backup.sh('ls /dev/drbd0 2>/dev/null || echo none')).toBe('none\n');
    // NBD_FLAG_C_FIXED_NEWSTYLE, then NBD_OPT_GO of "data".
    const script = `const s = require('net').connect('/run/drbdts/nbd-data.sock');
      let got = Buffer.alloc(0);
      s.on('data', (c) => { got = Buffer.concat([got, c]); if (got.length >= 38) { console.log(got.subarray(30, 34).toString('hex')); process.exit(); } });
      s.write(Buffer.from('00000001' + '49484156454f5054' + '00000007' + '0000000a' + '00000004' + '64617461' + '0000', 'hex'));
      setTimeout(() => process.exit(1), 5000)`;
    // An NBD_REP_ERR_*: the top bit of the reply type is set (proto.md, "Option reply types").
    expect((await backup.exec([process.execPath, '-e', script])).stdout).toMatch(/^80/);
  });

  it('a killed NFS server: exportfs -a starts another, clients go on', async () => {
    await kill(master, 'nfs');
    expect(JSON.parse((await drbdts(master, 'exportfs', '--json')).stdout)).toMatchObject([{ state: 'not served' }]);
    expect((await drbdts(master, 'exportfs', '-a')).status).toBe(0);
    await keeper!.progress(15_000);
  }, 30_000);

  it('a killed daemon: the head serves on, and the next command finds everything as it was', async () => {
    const engine = await pidOf(master, 'engine');
    await kill(master, 'daemon');
    await keeper!.progress(10_000);
    const { status, stderr } = await drbdts(master, 'secondary', 'data');
    expect(status).toBe(11);
    expect(stderr).toMatch(/mounted on \/drbd/);
    expect(await resourceStatus(master)).toMatchObject({ role: 'Primary', connectionState: 'Connected' });
    expect(await pidOf(master, 'engine')).toBe(engine);
    expect(JSON.parse((await drbdts(master, 'exportfs', '--json')).stdout)).toMatchObject([{ state: 'served' }]);
  }, 30_000);

  it('a daemon that is asked to end leaves the engine and the export alone too', async () => {
    await master.sh(`kill $(pgrep -f '[/]daemon-main.js')`);
    await until(
      'the daemon has ended',
      5000,
      () => pidOf(master, 'daemon'),
      (pid) => pid === '',
    );
    await keeper!.progress(10_000);
    expect(await resourceStatus(master)).toMatchObject({ role: 'Primary' });
  }, 30_000);

  it('a lost disk: the peer serves on; attach fetches what was missed', async () => {
    expect((await drbdts(master, 'detach', 'data')).status).toBe(0);
    await keeper!.progress(10_000);
    const here = (await drbdts(master, 'status')).stdout;
    expect(here).toMatch(/^data {2}DEGRADED/);
    expect(here).toMatch(/no disk attached; the only good copy is on the peer/);
    expect(here).toMatch(/action: Mend the disk \/dev\/sdb1, then: drbdts attach data/);
    const there = (await drbdts(backup, 'status')).stdout;
    expect(there).toMatch(/test-master has no disk attached/);
    expect((await drbdts(backup, 'detach', 'data')).status, 'the last good copy stays').not.toBe(0);
    const alone = await drbdts(master, 'disconnect', 'data');
    expect(alone.status, 'a Primary that lives on the peer stays connected').toBe(17);
    expect(alone.stderr).toMatch(/\(-2\) Need access to UpToDate data/);
    expect((await drbdts(master, 'attach', 'data')).status).toBe(0);
    await untilInSync(master, 30_000);
    await keeper!.progress(10_000);
  }, 60_000);

  it('a killed engine: status says so, up refuses while its device is mounted, then all comes back', async () => {
    const report = await keeper!.finish();
    keeper = undefined;
    expect(report.problems).toEqual([]);
    await kill(master, 'engine');
    await until(
      'seen',
      5000,
      () => drbdts(master, 'status'),
      ({ stdout }) => /^data {2}UNKNOWN/.test(stdout),
    );
    const { stdout } = await drbdts(master, 'status');
    expect(stdout).toMatch(/status: the engine of data ended/);
    expect(stdout).toMatch(/action: Unmount what is mounted from \/dev\/drbd0 .* drbdts up data/);
    expect((await drbdts(backup, 'status')).stdout).toMatch(/^data {2}DEGRADED {2}Secondary/);
    const refused = await drbdts(master, 'up', 'data');
    expect(refused.status).toBe(11);
    expect(refused.stderr).toMatch(/mounted on \/drbd/);
    const asked = await drbdts(master, 'connect', 'data');
    expect(asked.status).toBe(20);
    expect(asked.stderr).toMatch(/the engine of data ended/);
    await master.sh(`${DRBDTS} exportfs -u /drbd && timeout 20 umount /drbd`);
    await master.sh(`${DRBDTS} up data && ${DRBDTS} primary data && mount /dev/drbd0 /drbd && ${DRBDTS} exportfs -a`);
    await untilInSync(master, 30_000);
    expect((await master.sh('ls /drbd')).split('\n')).toContain('kept-0');
    keeper = await HandleKeeper.start(cluster.client, 'again');
    await keeper.progress(10_000);
  }, 60_000);

  it('everything killed at once: up, primary, mount', async () => {
    const report = await keeper!.finish();
    expect(report.problems).toEqual([]);
    await master.sh(`kill -9 $(pgrep -f -- '-main[.]js')`);
    expect((await drbdts(master, 'secondary', 'data')).status).toBe(11);
    await master.sh('timeout 20 umount /drbd');
    expect((await drbdts(master, 'secondary', 'data')).status).toBe(0);
    await master.sh(`${DRBDTS} up data && ${DRBDTS} primary data && mount /dev/drbd0 /drbd && ${DRBDTS} exportfs -a`);
    await untilInSync(master, 30_000);
    // Loop devices are the machine's, not the namespace's: those of other clusters do not count.
    const loops = execFileSync('losetup', ['-n', '-O', 'BACK-FILE'], { encoding: 'utf8' }).split('\n');
    expect(loops.filter((file) => file.includes(`${cluster.directory}/test-master/`))).toHaveLength(1);
  }, 60_000);

  it('split brain: both say so; the recipe that status gives ends it', async () => {
    await master.sh('echo before >/drbd/split && sync');
    await cluster.cable(master, 'eth1', false);
    await until(
      'apart',
      30_000,
      () => resourceStatus(backup),
      (one) => one.connectionState === 'WFConnection',
    );
    await backup.sh(`${DRBDTS} primary data && mount /dev/drbd0 /drbd && echo backup >/drbd/split && umount /drbd`);
    await master.sh('echo master >/drbd/split && sync');
    await cluster.cable(master, 'eth1', true);
    await backup.sh(`${DRBDTS} secondary data`);
    // The head that is told first closes the connection, perhaps before the other knew (as DRBD's do).
    const standAlone = await until(
      'a head in StandAlone',
      30_000,
      async () => {
        const all = await Promise.all([master, backup].map(resourceStatus));
        return [master, backup].filter((_head, index) => all[index]!.connectionState === 'StandAlone');
      },
      (heads) => heads.length > 0,
    );
    const told = (await drbdts(standAlone[0]!, 'status')).stdout;
    expect(told).toMatch(/status: Split brain/);
    expect(told).toMatch(/LOST\. There: drbdts secondary data; drbdts connect --discard-my-data data/);
    for (const head of [master, backup].filter((one) => !standAlone.includes(one)))
      expect((await drbdts(head, 'status')).stdout).toMatch(/If it is up, see there why not: drbdts status data/);
    expect(await master.sh('cat /drbd/split')).toBe('master\n');
    await backup.sh(`${DRBDTS} secondary data; ${DRBDTS} connect --discard-my-data data`);
    await master.sh(`${DRBDTS} connect data`);
    await untilInSync(master, 40_000);
    expect(await master.sh('cat /drbd/split')).toBe('master\n');
  }, 120_000);

  it('a full disk below a sparse file: the disk is dropped, the peer serves, nothing acknowledged is lost', async () => {
    await master.sh('mkdir /tiny && mount -t tmpfs -o size=24M tmpfs /tiny');
    await backup.sh('mkdir /tiny');
    for (const head of [master, backup]) {
      await head.exec(['tee', '/etc/drbd.d/tiny.res'], { input: TINY });
      await head.sh(`truncate -s 64M /tiny/disk && ${DRBDTS} create-md tiny && ${DRBDTS} up tiny`);
    }
    await backup.sh(`${DRBDTS} primary --force tiny`);
    await until(
      'tiny in sync',
      40_000,
      async () => JSON.parse((await drbdts(backup, 'status', 'tiny', '--json')).stdout)[0],
      (one) => one.devices[0].peerDiskState === 'UpToDate' || one.devices[0].peerDiskState === 'Diskless',
    );
    await backup.sh(`${DRBDTS} secondary tiny`);
    await master.sh(`${DRBDTS} primary tiny && head -c 40M /dev/urandom >/tmp/random`);
    await master.sh('dd if=/tmp/random of=/dev/drbd1 bs=64K oflag=direct conv=fsync status=none');
    await master.sh('cmp -n 41943040 /tmp/random /dev/drbd1');
    const { stdout } = await drbdts(master, 'status', 'tiny');
    expect(stdout).toMatch(/local {3}Diskless/);
    expect(stdout).toMatch(/action: Mend the disk \/tiny\/disk, then: drbdts attach tiny/);
    expect((await drbdts(master, 'dstate', 'tiny')).stdout).toBe('Diskless/UpToDate\n');
    await master.sh(`${DRBDTS} down tiny`);
    const written = (await master.sh('sha256sum </tmp/random')).slice(0, 64);
    expect(await backup.sh(`${DRBDTS} primary tiny && head -c 41943040 /dev/drbd1 | sha256sum`)).toContain(written);
    await backup.sh(`${DRBDTS} secondary tiny && ${DRBDTS} down tiny`);
    await master.sh('umount /tiny; rm /etc/drbd.d/tiny.res');
    await backup.sh('rm /etc/drbd.d/tiny.res');
  }, 120_000);

  it('after all that the disks are equal byte for byte and nothing is left', async () => {
    await master.sh(WITHDRAW);
    await untilInSync(master, 30_000);
    expect((await volumeStatus(master)).outOfSyncBytes).toBe(0);
    for (const head of [master, backup]) {
      await head.sh(`${DRBDTS} down data`);
      expect(await head.sh('pgrep -f -- engine-main[.]js || true; grep fuse-data /proc/mounts || true')).toBe('');
    }
    const [one, other] = await Promise.all([master, backup].map((head) => sha256(cluster.diskPath(head, 'sdb1'))));
    expect(one).toBe(other);
  }, 60_000);
});
