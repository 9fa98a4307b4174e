import { readdirSync, readFileSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { describe, expect, it } from 'vitest';
import { applyActivityLog } from '../../src/cli/apply-al.js';
import { dumpMetadata } from '../../src/cli/dump-md.js';
import { parseTarget } from '../../src/cli/metadata-target.js';
import { replayActivityLog } from '../../src/metadata/activity-log.js';
import { Bitmap } from '../../src/metadata/bitmap.js';
import { decodeSuperblock, isClean } from '../../src/metadata/superblock.js';
import { dumpBody, expectSameBytes, imageFolder, makeImage, ours, readAt } from './images.js';

/**
 * Metadata of two nodes running the kernel's drbd 8.4.11, taken at each step of a session, with what drbdmeta 9.22 said
 * about it. External images hold superblock, log and bitmap; internal ones bitmap, log and superblock.
 */
const VECTORS = resolve(import.meta.dirname, '../vectors/metadata');
const NAMES = readdirSync(VECTORS)
  .filter((name) => name.endsWith('.bin'))
  .map((name) => name.slice(0, -4));
const folder = imageFolder();

/** Puts a capture where it was on a device. */
function placed(name: string) {
  const bytes = readFileSync(join(VECTORS, `${name}.bin`));
  const path = join(folder, name);
  if (name.startsWith('internal')) {
    makeImage(path, 8392704, [8351744, bytes]);
    return { path, target: parseTarget(path, 'internal'), bytes, imageOffset: 8351744, superblock: 36864, bitmap: 0 };
  }
  makeImage(path, 2 ** 27, [0, bytes]);
  const target = parseTarget('', name.startsWith('flexible') ? path : `${path}[0]`);
  return { path, target, bytes, imageOffset: 0, superblock: 0, bitmap: 36864 };
}

const dumpOptions = { force: true, now: new Date(0), hostName: 'test' };

describe('metadata written by the kernel', () => {
  it('is there in four kinds', () => {
    expect(NAMES.length).toBe(78);
  });

  it.each(NAMES)('%s is dumped as by drbdmeta', (name) => {
    const { target, bytes, superblock } = placed(name);
    const expected = readFileSync(join(VECTORS, `${name}.txt`), 'utf8');
    const dumped = ours((context) => dumpMetadata(target, dumpOptions, context));
    expect(dumped.status).toBe(0);
    expect(dumpBody(dumped.out).body).toBe(dumpBody(expected).body);
    // This drbdmeta prints flags 0 whatever they are; ours prints what stands in the superblock.
    expect(dumpBody(dumped.out).flags).toBe(
      bytes
        .subarray(superblock + 56, superblock + 60)
        .toString('hex')
        .toUpperCase(),
    );
    const unclean = 'Found meta data is "unclean", please apply-al first';
    expect(dumped.err.includes(unclean)).toBe(expected.includes(unclean));
    const refused = ours((context) => dumpMetadata(target, { ...dumpOptions, force: false }, context));
    expect(refused.status).toBe(expected.includes(unclean) ? 255 : 0);
  });

  it.each(NAMES)('%s has a complete activity log', (name) => {
    const { bytes, superblock } = placed(name);
    const decoded = decodeSuperblock(bytes.subarray(superblock, superblock + 4096));
    const replay = replayActivityLog(bytes.subarray(4096, 36864), decoded.alStripes, decoded.alStripeSize4k);
    expect(replay.corruptBlocks).toBe(0);
    if (isClean(decoded)) expect([replay.transactionBlocks, replay.hotExtents.length]).toEqual([0, 0]);
  });

  it('of a crashed Primary is applied as drbdmeta applied it', () => {
    const { path, target } = placed('crash-05-crashed-node1');
    const applied = ours((context) => applyActivityLog(target, context));
    // What drbdmeta said in that session.
    expect(applied).toEqual({ status: 0, out: '', err: 'Marked additional 28 MB as out-of-sync based on AL.\n' });
    expectSameBytes(readAt(path, 0, 40960), readFileSync(join(VECTORS, 'crash-06-applied-node1.bin')), 'applied image');
  });

  it('of a crashed Primary marks the same blocks in memory', () => {
    const { bytes } = placed('crash-05-crashed-node1');
    const { laSizeSectors } = decodeSuperblock(bytes.subarray(0, 4096));
    const replay = replayActivityLog(bytes.subarray(4096, 36864), 1, 8);
    // The session wrote the blocks 1, 1024, 3000, 5000, 7777, 9000 and 16384, of 4 KiB.
    expect([...replay.hotExtents]).toEqual([0, 1, 2, 4, 7, 8, 16]);
    const bitmap = new Bitmap(laSizeSectors);
    bitmap.loadPage(0, bytes.subarray(36864, 40960));
    bitmap.markExtents(replay.hotExtents);
    // Six whole extents, and of the last one the single block the device has in it.
    expect(bitmap.weight).toBe(6 * 1024 + 1);
  });
});
