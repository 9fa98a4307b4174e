import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { MetadataError } from '../../src/base/errors.js';
import { bitmapBytes, computeLayout, type LayoutRequest } from '../../src/metadata/layout.js';

const codeOf = (request: LayoutRequest): string => {
  try {
    computeLayout(request);
    return 'accepted';
  } catch (error) {
    if (error instanceof MetadataError) return error.code;
    throw error;
  }
};

describe('layout', () => {
  it('places internal metadata where drbdmeta does', () => {
    // drbdmeta 9.22 on files of these sizes: 1000000 KiB, 1 GiB, and 4 MiB with two stripes of 64 KiB.
    expect(computeLayout({ kind: 'internal', backingSizeSectors: 2000000, metaSizeSectors: 0 })).toMatchObject({
      superblockSector: 1999992,
      alOffset: -64,
      bmOffset: -128,
      mdSizeSectors: 136,
      capacitySectors: 1999864,
    });
    expect(computeLayout({ kind: 'internal', backingSizeSectors: 2097152, metaSizeSectors: 0 })).toMatchObject({
      superblockSector: 1073737728 / 512,
      activityLogSector: 1073704960 / 512,
      bitmapSector: 1073672192 / 512,
      mdSizeSectors: 136,
      capacitySectors: 1048508 * 2,
    });
    const striped = { alStripes: 2, alStripeSize4k: 16 };
    expect(computeLayout({ kind: 'internal', backingSizeSectors: 8192, metaSizeSectors: 0, ...striped })).toMatchObject(
      {
        superblockSector: 4190208 / 512,
        activityLogSector: 4059136 / 512,
        bitmapSector: 4055040 / 512,
        mdSizeSectors: 272,
      },
    );
    expect(
      computeLayout({
        kind: 'internal',
        backingSizeSectors: 1048576,
        metaSizeSectors: 0,
        alStripes: 4,
        alStripeSize4k: 16,
      }),
    ).toMatchObject({ alOffset: -512, bmOffset: -544, mdSizeSectors: 552, superblockSector: 536866816 / 512 });
  });

  it('places external metadata from its start or its slot', () => {
    const backingSizeSectors = 1999968;
    expect(computeLayout({ kind: 'indexed', index: 0, backingSizeSectors, metaSizeSectors: 262144 })).toMatchObject({
      superblockSector: 0,
      activityLogSector: 8,
      bitmapSector: 72,
      mdSizeSectors: 262144,
      capacitySectors: backingSizeSectors,
    });
    expect(
      computeLayout({ kind: 'indexed', index: 3, backingSizeSectors: 2 ** 40, metaSizeSectors: 262144 * 4 }),
    ).toMatchObject({ superblockSector: 786432, bitmapSector: 786504, capacitySectors: 8587575296 });
    expect(computeLayout({ kind: 'flexible', backingSizeSectors: 2 ** 40, metaSizeSectors: 4096 + 7 })).toMatchObject({
      superblockSector: 0,
      bmOffset: 72,
      mdSizeSectors: 4096,
      capacitySectors: (4096 - 72) * 32768,
    });
  });

  it('refuses devices and geometries that cannot be', () => {
    const internal = (backingSizeSectors: number, alStripes = 1, alStripeSize4k = 8): LayoutRequest => ({
      kind: 'internal',
      backingSizeSectors,
      metaSizeSectors: 0,
      alStripes,
      alStripeSize4k,
    });
    expect(codeOf(internal(135))).toBe('DRBDTS_MD_TOO_SMALL');
    expect(codeOf(internal(136))).toBe('accepted');
    expect(codeOf(internal(8192, 128, 8))).toBe('DRBDTS_MD_TOO_SMALL');
    expect(codeOf(internal(8192, 0, 8))).toBe('DRBDTS_MD_BAD_STRIPES');
    expect(codeOf(internal(8192, 1, 7))).toBe('DRBDTS_MD_BAD_STRIPES');
    expect(codeOf(internal(8192, 4194305, 1))).toBe('DRBDTS_MD_BAD_STRIPES');
    expect(codeOf(internal(-8))).toBe('DRBDTS_MD_BAD_SIZE');
    expect(codeOf(internal(Number.NaN))).toBe('DRBDTS_MD_BAD_SIZE');
    const external = { backingSizeSectors: 8192 } as const;
    expect(codeOf({ kind: 'flexible', metaSizeSectors: 2047, ...external })).toBe('DRBDTS_MD_TOO_SMALL');
    expect(codeOf({ kind: 'indexed', index: 1, metaSizeSectors: 524287, ...external })).toBe('DRBDTS_MD_TOO_SMALL');
    expect(codeOf({ kind: 'indexed', index: -1, metaSizeSectors: 524288, ...external })).toBe('DRBDTS_MD_BAD_INDEX');
    expect(codeOf({ kind: 'indexed', index: 0, metaSizeSectors: 524288, alStripes: 2, ...external })).toBe(
      'DRBDTS_MD_BAD_STRIPES',
    );
  });

  it('never lets parts overlap, whatever the sizes', () => {
    fc.assert(
      fc.property(
        fc.constantFrom('internal' as const, 'flexible' as const, 'indexed' as const),
        fc.integer({ min: 0, max: 2 ** 42 }),
        fc.integer({ min: 0, max: 2 ** 34 }),
        fc.integer({ min: 0, max: 5 }),
        fc.integer({ min: 1, max: 8 }),
        fc.integer({ min: 1, max: 64 }),
        (kind, backingSizeSectors, metaSizeSectors, index, alStripes, alStripeSize4k) => {
          const request = { kind, index, backingSizeSectors, metaSizeSectors, alStripes, alStripeSize4k };
          if (codeOf(request) !== 'accepted') return;
          const layout = computeLayout(request);
          const parts = [
            [layout.superblockSector, 8],
            [layout.activityLogSector, layout.alBlocks * 8],
            [layout.bitmapSector, layout.bitmapAreaSectors],
            ...(kind === 'internal' ? [[0, layout.capacitySectors]] : []),
          ].sort((left, right) => left[0]! - right[0]!);
          for (let part = 1; part < parts.length; part++)
            expect(parts[part - 1]![0]! + parts[part - 1]![1]!).toBeLessThanOrEqual(parts[part]![0]!);
          const [lastStart, lastSize] = parts.at(-1)!;
          expect(lastStart! + lastSize!).toBeLessThanOrEqual(
            kind === 'internal' ? backingSizeSectors : metaSizeSectors,
          );
          expect(bitmapBytes(layout.capacitySectors)).toBeLessThanOrEqual(layout.bitmapAreaSectors * 512);
          for (const sector of [layout.superblockSector, layout.activityLogSector, layout.bitmapSector])
            expect(sector % 8).toBe(0);
        },
      ),
      { numRuns: 500 },
    );
  });
});
