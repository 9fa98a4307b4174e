import { execFileSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { expect, it } from 'vitest';
import { requires } from '../support/requires.js';
import { describeRing } from '../support/rings.js';

const EIO = 5;
const SIZE_BYTES = 8 << 20;
const MIB = 1 << 20;

/** Loop devices need root. */
const possible =
  process.getuid?.() === 0 && requires('/dev/loop-control', 'util-linux') && requires('losetup', 'mount');

describeRing('block devices', (make) => {
  it.runIf(possible).each([false, true])('read, write, flush, zero and lock; direct %s', async (direct) => {
    const folder = mkdtempSync(join(tmpdir(), 'drbdts-loop-'));
    const image = join(folder, 'image');
    writeFileSync(image, Buffer.alloc(SIZE_BYTES, 0xee));
    const device = execFileSync('losetup', ['-f', '--show', image], { encoding: 'utf8' }).trim();
    const ring = make();
    try {
      const file = ring.openFile(device, { exclusive: true, direct });
      expect(file.sizeBytes).toBe(SIZE_BYTES);
      expect(direct ? [512, 1024, 2048, 4096] : [1]).toContain(file.alignmentBytes);
      expect(() => ring.openFile(device, { exclusive: true })).toThrow(/in use by another process/);
      const waiting = new Map<number, (errno: number) => void>();
      file.setDone((cookie, errno) => waiting.get(cookie)!(errno));
      let cookies = 0;
      const run = (start: (cookie: number) => void) =>
        new Promise<number>((resolve) => {
          waiting.set(++cookies, resolve);
          start(cookies);
        });
      expect(await run((cookie) => file.zero(cookie, 4096, MIB, true, true))).toBe(0);
      expect(await run((cookie) => file.zero(cookie, 4 * MIB, MIB, false, true))).toBe(0);
      const block = ring.memory.allocate(SIZE_BYTES);
      expect(await run((cookie) => file.read(cookie, 0, block, SIZE_BYTES))).toBe(0);
      const expected = Buffer.alloc(SIZE_BYTES, 0xee);
      expected.fill(0, 4096, 4096 + MIB);
      expected.fill(0, 4 * MIB, 5 * MIB);
      expect(Buffer.from(ring.memory.bytes.subarray(block, block + SIZE_BYTES)).equals(expected)).toBe(true);
      ring.memory.bytes.fill(3, block, block + 8192);
      expect(await run((cookie) => file.write(cookie, 0, block, 8192, false))).toBe(0);
      expect(await run((cookie) => file.flush(cookie))).toBe(0);
      expect(await run((cookie) => file.read(cookie, SIZE_BYTES, block, 4096))).toBe(EIO);
      // Flushed through the device: the image has it.
      expect(readFileSync(image).subarray(0, 8192).equals(Buffer.alloc(8192, 3))).toBe(true);
    } finally {
      ring.close();
      await sleep(20);
      execFileSync('losetup', ['-d', device]);
      rmSync(folder, { recursive: true });
    }
  });
});
