/**
 * drbd.ko as the peer while much goes on: writes beside a resync in either direction, discards, verify, disks that come
 * and go, split brain. After each step both disks are the same, byte by byte.
 */
import { execFileSync } from 'node:child_process';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { requires } from '../support/requires.js';
import { type Head, type KernelPeer, type Lab, until } from './support/lab.js';
import { canPair, connectPair, patternSum } from './support/pair.js';

const SIZE_KIB = 64 * 1024 + 4;
const MIB = 1 << 20;

const canRun = canPair() && requires('fio', 'fio') && requires('blkdiscard', 'util-linux');

/** Random writes at depth, each read back and checked by fio itself; with a flush now and then. */
const fio = (device: string) =>
  `fio --name=load --filename=${device} --size=48M --rw=randrw --bsrange=4k-128k --direct=1 --ioengine=libaio \
   --iodepth=32 --fsync=16 --verify=crc32c --verify_fatal=1 --verify_state_save=0 --minimal >/dev/null`;

describe.runIf(canRun)('with drbd.ko as the peer, under load', { timeout: 60_000 }, () => {
  let lab: Lab;
  let head: Head;
  let kernel: KernelPeer;

  beforeAll(async () => {
    ({ lab, head, kernel } = await connectPair({ sizeKib: SIZE_KIB }));
    await head.wait('Connected Inconsistent/Inconsistent');
  });

  afterAll(() => lab?.destroy());

  const inStep = async () => {
    await head.wait('Connected UpToDate/UpToDate');
    await kernel.wait('Connected UpToDate/UpToDate');
    execFileSync('cmp', [head.data, kernel.data]);
  };

  it('writes during its initial sync to the kernel', async () => {
    await head.drbdts('primary', '--force', 'data');
    await lab.sh(fio(head.device));
    await inStep();
  });

  it('writes during a resync to the kernel', async () => {
    await head.drbdts('disconnect', 'data');
    await lab.sh(`dd if=/dev/urandom of=${head.device} bs=1M count=60 oflag=direct status=none`);
    const load = lab.sh(fio(head.device));
    await head.drbdts('connect', 'data');
    await load;
    await inStep();
  });

  it('discards and zeroes here', async () => {
    await lab.sh(`blkdiscard -f -o 4096 -l ${10 * MIB} ${head.device}`);
    await lab.sh(`blkdiscard -f -z -o ${20 * MIB} -l ${5 * MIB} ${head.device}`);
    expect(await kernel.on('sum_blocks 5120 1280 /dev/ubda')).toBe(await zeroSum(1280));
    await inStep();
  });

  it('takes the writes, flushes, discards and zeroes of a Primary kernel', async () => {
    await head.drbdts('secondary', 'data');
    await kernel.on(`drbdadm primary data && ${fio('/dev/drbd0')}`, 60_000);
    await inStep();
    await kernel.on(`blkdiscard -f -o 4096 -l ${10 * MIB} /dev/drbd0`);
    await kernel.on(`blkdiscard -f -z -o ${30 * MIB} -l ${5 * MIB} /dev/drbd0`);
    expect(await head.sum(7680, 1280, head.data)).toBe(await zeroSum(1280));
    await inStep();
  });

  it('is the target of a resync while the kernel writes', async () => {
    await kernel.on(
      `drbdadm disconnect data && dd if=/dev/urandom of=/dev/drbd0 bs=1M count=60 oflag=direct status=none &&
       drbdadm connect data && ${fio('/dev/drbd0')}`,
      60_000,
    );
    await inStep();
  });

  it("carries the kernel's file system", async () => {
    await kernel.on('mkfs.ext4 -q /dev/drbd0 && mount /dev/drbd0 /mnt && cp -a /etc/drbd.d /mnt/ && umount /mnt');
    await inStep();
    execFileSync('e2fsck', ['-fn', head.data], { stdio: 'ignore' });
  });

  it('lets the kernel verify: exactly the spoilt blocks are found, and repaired by the next resync', async () => {
    await kernel.on('drbdadm verify data && sleep 0.3 && drbd_wait Connected UpToDate/UpToDate');
    expect((await head.state()).outOfSyncBytes).toBe(0);
    execFileSync('dd', [
      ...['if=/dev/urandom', `of=${head.data}`, 'bs=4k', 'count=3', 'seek=777'],
      ...['conv=notrunc', 'status=none'],
    ]);
    await kernel.on('drbdadm verify data && sleep 0.3 && drbd_wait Connected UpToDate/UpToDate');
    expect(await kernel.on('dmesg')).toContain('Out of sync: start=6216, size=24 (sectors)');
    expect((await head.state()).outOfSyncBytes).toBe(3 * 4096);
    await kernel.on('drbdadm disconnect data && drbdadm connect data');
    await inStep();
  });

  it('is invalidated, and fetches everything; and the same for the kernel', async () => {
    await head.drbdts('invalidate', 'data');
    await inStep();
    await kernel.on('drbdadm secondary data && drbdadm invalidate data');
    await inStep();
  });

  it('goes on without a disk on either side', async () => {
    await head.drbdts('primary', 'data');
    await kernel.on('drbdadm detach data');
    await head.wait('Connected UpToDate/Diskless');
    await head.write(5, 50, 'kernel without disk');
    await kernel.on('drbdadm attach data');
    await inStep();
    await head.drbdts('detach', 'data');
    await head.wait('Connected Diskless/UpToDate');
    await head.write(5, 70, 'head without disk');
    expect(await head.sum(5, 70)).toBe(patternSum('head without disk', 70));
    expect(await kernel.on('sum_blocks 5 70 /dev/ubda')).toBe(patternSum('head without disk', 70));
    await head.drbdts('attach', 'data');
    await inStep();
  });

  it('goes on when the disk of the kernel fails under a write', async () => {
    const faults = '/sys/module/drbd/parameters';
    await kernel.on(`cd ${faults}; echo 1 >fault_devs; echo 16 >enable_faults; echo 100 >fault_rate`);
    await head.write(50, 100, 'faulty');
    await head.wait('Connected UpToDate/Diskless');
    await kernel.on(`echo 0 >${faults}/fault_rate; drbdadm attach data`);
    await inStep();
    expect(await kernel.on('sum_blocks 50 100 /dev/ubda')).toBe(patternSum('faulty', 100));
  });

  const standAlone = () =>
    until(
      'a split brain',
      15_000,
      () => head.state(),
      (now) => now.connectionState === 'StandAlone',
    );

  it('finds a split brain, and the kernel gives up what it wrote', async () => {
    await kernel.on('drbdadm disconnect data');
    await head.write(5, 5, 'here');
    await kernel.on('drbdadm primary --force data && write_blocks 7 5 there && drbdadm secondary data');
    await kernel.on('drbdadm connect data');
    await standAlone();
    await kernel.on('drbdadm disconnect data; drbdadm connect --discard-my-data data');
    await head.drbdts('connect', 'data');
    await inStep();
    expect(await head.sum(5, 5)).toBe(patternSum('here', 5));
    expect(await kernel.on('sum_blocks 5 5 /dev/ubda')).toBe(patternSum('here', 5));
  });

  it('finds a split brain, and gives up what was written here', async () => {
    await kernel.on('drbdadm disconnect data');
    await head.write(5, 5, 'here again');
    await head.drbdts('secondary', 'data');
    await kernel.on('drbdadm primary --force data && write_blocks 7 5 there && drbdadm connect data');
    await standAlone();
    await head.drbdts('connect', '--discard-my-data', 'data');
    await kernel.on('drbdadm disconnect data; drbdadm connect data');
    await inStep();
    expect(await head.sum(7, 5, head.data)).toBe(patternSum('there', 5));
  });

  const zeroSum = async (blocks: number) => (await lab.sh(`head -c ${blocks * 4096} /dev/zero | md5sum`)).slice(0, 32);
});
