/** drbd.ko as the peer with other metadata layouts and net options than those of the reference setup. */
import { execFileSync } from 'node:child_process';
import { describe, expect, it } from 'vitest';
import { until } from './support/lab.js';
import { canPair, connectPair, patternSum } from './support/pair.js';

const SIZE_KIB = 32 * 1024 + 4;

const canRun = canPair();

describe.runIf(canRun)('with drbd.ko as the peer', { timeout: 60_000 }, () => {
  it('internal metadata, shared secret, checksum resync, plain bitmaps, protocol A', async () => {
    const net = 'protocol A; cram-hmac-alg sha1; shared-secret "not so secret"; csums-alg crc32c; use-rle no;';
    const { lab, head, kernel } = await connectPair({ sizeKib: SIZE_KIB, layout: 'internal', net });
    try {
      await head.wait('Connected Inconsistent/Inconsistent');
      await head.drbdts('primary', '--force', 'data');
      const synced = await head.wait('Connected UpToDate/UpToDate');
      await kernel.wait('Connected UpToDate/UpToDate');
      // Every block is asked for with its checksum; all are equal but the two that are spoilt.
      execFileSync('dd', ['if=/dev/urandom', `of=${head.data}`, 'bs=4k', 'count=2', 'seek=99', 'conv=notrunc']);
      await kernel.on('drbdadm invalidate data');
      const again = await head.wait('Connected UpToDate/UpToDate');
      await kernel.wait('Connected UpToDate/UpToDate');
      const sentKib = again.counters['sentKiB']! - synced.counters['sentKiB']!;
      expect(sentKib).toBeGreaterThanOrEqual(8);
      expect(sentKib).toBeLessThan(1024);
      await head.write(30, 40, 'two');
      await head.drbdts('disconnect', 'data');
      await head.write(50, 40, 'three');
      await head.drbdts('connect', 'data');
      await head.wait('Connected UpToDate/UpToDate');
      await kernel.wait('Connected UpToDate/UpToDate');
      expect(await kernel.on('sum_blocks 50 40 /dev/ubda')).toBe(patternSum('three', 40));
      execFileSync('cmp', ['-n', String(again.sizeBytes), head.data, kernel.data]);
    } finally {
      await lab.destroy();
    }
  });

  it('flexible metadata, shared secret with SHA-256, protocol B, another direction of the first sync', async () => {
    const net = 'protocol B; cram-hmac-alg sha256; shared-secret "other";';
    const { lab, head, kernel } = await connectPair({ sizeKib: SIZE_KIB, layout: 'flexible', net });
    try {
      await head.wait('Connected Inconsistent/Inconsistent');
      await kernel.on('drbdadm primary --force data && write_blocks 30 40 one');
      await head.wait('Connected UpToDate/UpToDate');
      await kernel.wait('Connected UpToDate/UpToDate');
      await kernel.on('drbdadm secondary data');
      await head.drbdts('primary', 'data');
      expect(await head.sum(30, 40)).toBe(patternSum('one', 40));
      execFileSync('cmp', [head.data, kernel.data]);
    } finally {
      await lab.destroy();
    }
  });

  it('a wrong shared secret keeps both apart, and the log says why', async () => {
    const net = 'cram-hmac-alg sha1; shared-secret "right";';
    const { lab, head, kernel } = await connectPair({ sizeKib: SIZE_KIB, net });
    try {
      await head.wait('Connected Inconsistent/Inconsistent');
      await kernel.on(
        'drbdadm disconnect data; sed -i s/right/wrong/ /run/drbd.d/global_common.conf; drbdadm adjust data || true',
      );
      await until(
        'refusal',
        15_000,
        () => head.state(),
        (now) => now.connectionState === 'StandAlone',
      );
      expect(head.logs()).toMatch(/authenticat/i);
    } finally {
      await lab.destroy();
    }
  });
});
