/**
 * A head of drbdts with drbd.ko 8.4 as its peer: a guest kernel that no one here wrote. Each step goes on from the last.
 */
import { execFileSync } from 'node:child_process';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { type Head, type KernelPeer, type Lab, until } from './support/lab.js';
import { canPair, connectPair, patternSum } from './support/pair.js';

const SIZE_KIB = 32 * 1024 + 4;

const canRun = canPair();

describe.runIf(canRun)('with drbd.ko as the peer', { timeout: 60_000 }, () => {
  let lab: Lab;
  let head: Head;
  let kernel: KernelPeer;

  beforeAll(async () => {
    ({ lab, head, kernel } = await connectPair({ sizeKib: SIZE_KIB }));
  });

  afterAll(() => lab?.destroy());

  const disksAreEqual = () => execFileSync('cmp', [head.data, kernel.data]);

  it('connects with fresh metadata on both sides', async () => {
    await head.wait('Connected Inconsistent/Inconsistent');
    await kernel.wait('Connected Inconsistent/Inconsistent');
  });

  it('is made Primary and syncs all of its disk to the kernel', async () => {
    await head.drbdts('primary', '--force', 'data');
    await head.wait('Connected UpToDate/UpToDate');
    await kernel.wait('Connected UpToDate/UpToDate');
    disksAreEqual();
  });

  it('replicates writes and flushes', async () => {
    await head.write(16, 4, 'hello');
    expect(await kernel.on('sum_blocks 16 4 /dev/ubda')).toBe(patternSum('hello', 4));
    disksAreEqual();
  });

  it('remembers what it wrote while disconnected, and sends only that', async () => {
    await head.drbdts('disconnect', 'data');
    await kernel.wait('WFConnection UpToDate/DUnknown');
    await head.write(100, 8, 'apart');
    await head.write(5000, 1, 'far');
    const apart = await head.state();
    expect(apart.outOfSyncBytes).toBe(9 * 4096);
    await head.drbdts('connect', 'data');
    const again = await head.wait('Connected UpToDate/UpToDate');
    expect(again.counters['sentKiB']! - apart.counters['sentKiB']!).toBeLessThanOrEqual(9 * 4);
    await kernel.wait('Connected UpToDate/UpToDate');
    expect(await kernel.on('sum_blocks 5000 1 /dev/ubda')).toBe(patternSum('far', 1));
    disksAreEqual();
  });

  it('takes what the kernel wrote while disconnected', async () => {
    await head.drbdts('secondary', 'data');
    await kernel.on('drbdadm primary data && write_blocks 16 4 role');
    expect(await head.sum(16, 4, head.data)).toBe(patternSum('role', 4));
    await kernel.on('drbdadm disconnect data && write_blocks 200 5 lonely && drbdadm connect data');
    await head.wait('Connected UpToDate/UpToDate');
    await kernel.wait('Connected UpToDate/UpToDate');
    expect(await head.sum(200, 5, head.data)).toBe(patternSum('lonely', 5));
    disksAreEqual();
  });

  it('refuses to be Primary beside a Primary kernel, in the words of DRBD', async () => {
    const { status, output } = await head.run(['primary', 'data']);
    expect(status).toBe(11);
    expect(output).toContain('Multiple primaries not allowed by config');
  });

  it('has a Primary kernel crash in mid-write, and gets back in step with it', async () => {
    const before = (await head.state()).counters['receivedKiB']!;
    const writer = kernel.on('write_blocks 1000 6000 crash').catch(() => 'crashed');
    await until(
      'writes',
      10_000,
      () => head.state(),
      (now) => now.counters['receivedKiB']! > before + 1000,
    );
    await kernel.end('crash');
    await writer;
    await head.wait('WFConnection UpToDate/DUnknown');
    kernel = await lab.bootPeer(head);
    await head.wait('Connected UpToDate/UpToDate');
    await kernel.wait('Connected UpToDate/UpToDate');
    disksAreEqual();
  });

  it('goes on when a Secondary kernel crashes in mid-write, and syncs it later', async () => {
    await head.drbdts('primary', 'data');
    const writer = head.write(1000, 2000, 'go on');
    await kernel.end('crash');
    await writer;
    await head.wait('WFConnection UpToDate/DUnknown');
    expect(await head.sum(1000, 2000)).toBe(patternSum('go on', 2000));
    kernel = await lab.bootPeer(head);
    await head.wait('Connected UpToDate/UpToDate');
    await kernel.wait('Connected UpToDate/UpToDate');
    disksAreEqual();
  });

  it('finds a cut cable by itself, goes on, and syncs when it is joined', async () => {
    await lab.script('on', ['1', 'cut'], 5000);
    const started = Date.now();
    await head.write(300, 10, 'cut');
    // ping-int and ping-timeout, or the timeout of a write: whichever ends first.
    expect(Date.now() - started).toBeLessThan(10_000);
    await head.wait('WFConnection UpToDate/DUnknown');
    await kernel.on('drbd_wait WFConnection');
    await lab.script('on', ['1', 'join'], 5000);
    await head.wait('Connected UpToDate/UpToDate');
    await kernel.wait('Connected UpToDate/UpToDate');
    expect(await kernel.on('sum_blocks 300 10 /dev/ubda')).toBe(patternSum('cut', 10));
    disksAreEqual();
  });

  /** Kills every process of the head while it writes, after at least 1000 KiB. */
  const dieInMidWrite = async (text: string) => {
    const before = (await head.state()).counters['sentKiB']!;
    const writer = head.write(1000, 4000, text).catch(() => undefined);
    await until(
      'writes',
      10_000,
      () => head.state(),
      (now) => now.counters['sentKiB']! > before + 1000,
    );
    await head.kill();
    await writer;
    await kernel.wait('WFConnection UpToDate/DUnknown');
  };

  it('is killed as Primary in mid-write, and gets back in step', async () => {
    await dieInMidWrite('mine');
    await head.drbdts('up', 'data');
    await head.wait('Connected UpToDate/UpToDate');
    await kernel.wait('Connected UpToDate/UpToDate');
    disksAreEqual();
  });

  it('is killed as Primary in mid-write; the kernel takes over, and its data counts', async () => {
    await head.drbdts('primary', 'data');
    await dieInMidWrite('never acknowledged');
    await kernel.on('drbdadm primary data && write_blocks 10 50 over');
    await head.drbdts('up', 'data');
    await head.wait('Connected UpToDate/UpToDate');
    await kernel.wait('Connected UpToDate/UpToDate');
    expect(await head.sum(10, 50, head.data)).toBe(patternSum('over', 50));
    disksAreEqual();
  });

  it('takes over from a Primary kernel that died, and its data counts', async () => {
    await kernel.end('crash');
    await head.wait('WFConnection UpToDate/DUnknown');
    await head.drbdts('primary', 'data');
    await head.write(20, 50, 'back');
    kernel = await lab.bootPeer(head);
    await head.wait('Connected UpToDate/UpToDate');
    await kernel.wait('Connected UpToDate/UpToDate');
    expect(await kernel.on('sum_blocks 20 50 /dev/ubda')).toBe(patternSum('back', 50));
    disksAreEqual();
  });
});

describe.runIf(canRun)('with a disk of drbd.ko', { timeout: 60_000 }, () => {
  let lab: Lab;
  let head: Head;
  let kernel: KernelPeer;

  beforeAll(async () => {
    ({ lab, head, kernel } = await connectPair({ sizeKib: SIZE_KIB }));
  });

  afterAll(() => lab?.destroy());

  it('is the target of an initial sync from the kernel', async () => {
    await head.wait('Connected Inconsistent/Inconsistent');
    await kernel.on('drbdadm primary --force data');
    await head.wait('Connected UpToDate/UpToDate');
    await kernel.wait('Connected UpToDate/UpToDate');
    await kernel.on('write_blocks 16 4 kernel');
    expect(await head.sum(16, 4, head.data)).toBe(patternSum('kernel', 4));
    execFileSync('cmp', [head.data, kernel.data]);
  });

  it("takes over the kernel's disk and metadata, and gives its own to a kernel, without a resync", async () => {
    await kernel.on('write_blocks 500 3 last && drbdadm secondary data');
    const before = await head.state();
    await kernel.on('drbdadm down data');
    await kernel.end('stop');
    await head.drbdts('down', 'data');

    // The two change places: drbdts runs on what was the kernel's, a kernel on what was drbdts'.
    const { data, meta } = kernel;
    const migrated = lab.addHead({ ...head.options, data, meta });
    kernel = await lab.bootPeer(migrated, { data: head.data, meta: head.meta });
    await migrated.drbdts('up', 'data');
    const state = await migrated.wait('Connected UpToDate/UpToDate');
    await kernel.wait('Connected UpToDate/UpToDate');
    expect(state.generationIdentifiers[0]).toBe(before.generationIdentifiers[0]);
    expect(state.counters['sentKiB']! + state.counters['receivedKiB']!).toBe(0);
    expect(migrated.logs()).not.toContain('SyncTarget');
    expect(migrated.logs()).not.toContain('SyncSource');

    // Both go on to write with what they took over.
    await migrated.drbdts('primary', 'data');
    expect(await migrated.sum(500, 3)).toBe(patternSum('last', 3));
    await migrated.write(600, 2, 'migrated');
    expect(await kernel.on('sum_blocks 600 2 /dev/ubda')).toBe(patternSum('migrated', 2));
    await migrated.drbdts('secondary', 'data');
    await kernel.on('drbdadm primary data && write_blocks 700 2 back && drbdadm secondary data');
    expect(await migrated.sum(700, 2, migrated.data)).toBe(patternSum('back', 2));
    await migrated.drbdts('down', 'data');
    await kernel.on('drbdadm down data');
    execFileSync('cmp', [migrated.data, head.data]);
  });
});
