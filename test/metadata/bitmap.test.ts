import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { AssertionError } from '../../src/base/assert.js';
import { MetadataError } from '../../src/base/errors.js';
import { Bitmap, PAGE_HINT, PAGE_LAZY, PAGE_NEED_WRITEOUT } from '../../src/metadata/bitmap.js';

/** The obvious implementation. */
class NaiveBitmap {
  bits: boolean[];
  constructor(public sizeSectors: number) {
    this.bits = Array.from({ length: Math.ceil(sizeSectors / 8) }, () => false);
  }
  touched(sector: number, size: number): number[] {
    return this.bits.flatMap((_, bit) => (bit * 8 < sector + size && bit * 8 + 8 > sector && size > 0 ? [bit] : []));
  }
  covered(sector: number, size: number): number[] {
    return this.bits.flatMap((_, bit) =>
      size > 0 && bit * 8 >= sector && Math.min(bit * 8 + 8, this.sizeSectors) <= sector + size ? [bit] : [],
    );
  }
  write(bits: number[], value: boolean): number {
    const changed = bits.filter((bit) => this.bits[bit] !== value);
    for (const bit of changed) this.bits[bit] = value;
    return changed.length;
  }
  resize(sizeSectors: number, setNew: boolean): void {
    this.sizeSectors = sizeSectors;
    const length = Math.ceil(sizeSectors / 8);
    this.bits = Array.from({ length }, (_, bit) => this.bits[bit] ?? setNew);
  }
  bytes(): Uint8Array {
    const bytes = new Uint8Array(Math.ceil(this.bits.length / 64) * 8);
    this.bits.forEach((value, bit) => {
      if (value) bytes[bit >> 3]! |= 1 << (bit & 7);
    });
    return bytes;
  }
}

function bytesOf(bitmap: Bitmap): Uint8Array {
  const bytes = new Uint8Array(bitmap.byteLength);
  bitmap.copyBytes(0, bytes);
  return bytes;
}

describe('bitmap', () => {
  it('has the sizes of the worked example (spec 5.3)', () => {
    const bitmap = new Bitmap(1999968);
    expect([bitmap.bits, bitmap.byteLength, bitmap.pageCount]).toEqual([249996, 31256, 8]);
    bitmap.setAll();
    expect(bitmap.weight * 4).toBe(999984);
    const last = new Uint8Array(4096);
    bitmap.copyPage(7, last);
    // Last meaningful byte 31249 has four bits, everything behind it is zero.
    expect(last[31248 - 7 * 4096]).toBe(0xff);
    expect(last[31249 - 7 * 4096]).toBe(0x0f);
    expect(last.subarray(31250 - 7 * 4096).every((byte) => byte === 0)).toBe(true);
  });

  it('rounds outwards when setting, inwards when clearing, and lets the end of the device count as covered', () => {
    const bitmap = new Bitmap(8 * 10 + 3);
    expect(bitmap.bits).toBe(11);
    expect(bitmap.setRange(7, 2)).toBe(2);
    expect(bitmap.clearRange(1, 14)).toBe(0);
    expect(bitmap.clearRange(1, 15)).toBe(1);
    expect(bitmap.isBitSet(0)).toBe(true);
    expect(bitmap.setRange(82, 1)).toBe(1);
    expect(bitmap.clearRange(80, 2)).toBe(0);
    expect(bitmap.clearRange(80, 3)).toBe(1);
    expect(bitmap.weight).toBe(1);
  });

  it('does what the naive one does under any history', () => {
    const size = fc.integer({ min: 0, max: 70_000 });
    const range = fc.tuple(fc.double({ min: 0, max: 1, noNaN: true }), fc.double({ min: 0, max: 1, noNaN: true }));
    const step = fc.oneof(
      { weight: 4, arbitrary: fc.record({ kind: fc.constant('set' as const), range }) },
      { weight: 4, arbitrary: fc.record({ kind: fc.constant('clear' as const), range }) },
      { weight: 2, arbitrary: fc.record({ kind: fc.constant('ask' as const), range }) },
      { weight: 1, arbitrary: fc.record({ kind: fc.constant('merge' as const), bytes: fc.uint8Array(), range }) },
      { weight: 1, arbitrary: fc.record({ kind: fc.constant('resize' as const), size, setNew: fc.boolean() }) },
      { weight: 1, arbitrary: fc.record({ kind: fc.constantFrom('setAll' as const, 'clearAll' as const) }) },
    );
    fc.assert(
      fc.property(size, fc.array(step, { maxLength: 12 }), (sizeSectors, steps) => {
        const bitmap = new Bitmap(sizeSectors);
        const naive = new NaiveBitmap(sizeSectors);
        const sectors = ([from, length]: readonly [number, number]): [number, number] => {
          const sector = Math.floor(from * naive.sizeSectors);
          // Short ranges matter as much as long ones.
          return [sector, Math.floor(length ** 4 * (naive.sizeSectors - sector))];
        };
        for (const step of steps) {
          switch (step.kind) {
            case 'set': {
              const [sector, length] = sectors(step.range);
              expect(bitmap.setRange(sector, length)).toBe(naive.write(naive.touched(sector, length), true));
              break;
            }
            case 'clear': {
              const [sector, length] = sectors(step.range);
              expect(bitmap.clearRange(sector, length)).toBe(naive.write(naive.covered(sector, length), false));
              break;
            }
            case 'ask': {
              const [sector, length] = sectors(step.range);
              const count = naive.touched(sector, length).filter((bit) => naive.bits[bit]).length;
              expect(bitmap.countRange(sector, length)).toBe(count);
              expect(bitmap.isAnySet(sector, length)).toBe(count > 0);
              const bit = Math.floor(sector / 8);
              expect(bitmap.findNext(bit)).toBe(naive.bits.indexOf(true, bit));
              expect(bitmap.findNextClear(bit)).toBe(naive.bits.indexOf(false, bit));
              break;
            }
            case 'merge': {
              const bytes = step.bytes.subarray(0, Math.min(step.bytes.length, bitmap.byteLength) & ~3);
              const offset = Math.floor((step.range[0] * (bitmap.byteLength - bytes.length)) / 4) * 4;
              const set = naive.bits.flatMap((_, bit) =>
                ((bytes[(bit >> 3) - offset] ?? 0) >> (bit & 7)) & 1 ? [bit] : [],
              );
              expect(bitmap.mergeBytes(offset, bytes)).toBe(naive.write(set, true));
              break;
            }
            case 'resize':
              bitmap.resize(step.size, step.setNew);
              naive.resize(step.size, step.setNew);
              break;
            case 'setAll':
              bitmap.setAll();
              naive.bits.fill(true);
              break;
            case 'clearAll':
              bitmap.clearAll();
              naive.bits.fill(false);
              break;
          }
          expect(bitmap.weight).toBe(naive.bits.filter(Boolean).length);
          expect(Buffer.from(bytesOf(bitmap)).equals(naive.bytes())).toBe(true);
        }
      }),
      { numRuns: 150 },
    );
  });

  it('on disk is never behind what the page states claim', () => {
    const pages = 3;
    const sizeSectors = pages * 32768 * 8 - 100;
    const operation = fc.tuple(
      fc.constantFrom('set', 'clear', 'takeOne', 'takeAll', 'load'),
      fc.integer({ min: 0, max: sizeSectors - 1 }),
      fc.integer({ min: 1, max: 400_000 }),
    );
    fc.assert(
      fc.property(fc.array(operation, { maxLength: 20 }), (operations) => {
        const bitmap = new Bitmap(sizeSectors);
        const disk = Array.from({ length: pages }, () => new Uint8Array(4096));
        for (const [kind, sector, length] of operations) {
          const size = Math.min(length, sizeSectors - sector);
          const page = sector % pages;
          if (kind === 'set') bitmap.setRange(sector, size);
          else if (kind === 'clear') bitmap.clearRange(sector, size);
          else if (kind === 'takeOne') bitmap.takePage(page, disk[page]!);
          else if (kind === 'load') bitmap.loadPage(page, disk[page]!);
          else for (let at = bitmap.nextPage(0); at >= 0; at = bitmap.nextPage(at + 1)) bitmap.takePage(at, disk[at]!);
          const now = new Uint8Array(4096);
          let weight = 0;
          for (let at = 0; at < pages; at++) {
            bitmap.copyPage(at, now);
            for (const byte of now) for (let rest = byte; rest; rest &= rest - 1) weight++;
            if (bitmap.pageState(at) === 0) expect(Buffer.from(now).equals(disk[at]!)).toBe(true);
          }
          expect(bitmap.weight).toBe(weight);
        }
      }),
      { numRuns: 60 },
    );
  });

  it('marks pages by why they changed (spec 5.4)', () => {
    const bitmap = new Bitmap(3 * 32768 * 8);
    const into = new Uint8Array(4096);
    bitmap.setBits(32767, 32768);
    expect([0, 1, 2].map((page) => bitmap.pageState(page))).toEqual([PAGE_NEED_WRITEOUT, PAGE_NEED_WRITEOUT, 0]);
    bitmap.takePage(0, into);
    expect(into[4095]).toBe(0x80);
    bitmap.clearBits(0, 32767);
    expect(bitmap.pageState(0)).toBe(PAGE_LAZY);
    expect(bitmap.nextPage(0, PAGE_NEED_WRITEOUT)).toBe(1);
    // Extent 64 is the first of page 2: 32 extents per page.
    expect([bitmap.pageOfExtent(31), bitmap.pageOfExtent(32), bitmap.pageOfExtent(64)]).toEqual([0, 1, 2]);
    bitmap.markPage(2, PAGE_HINT);
    expect(bitmap.takeHint(2)).toBe(false);
    expect(bitmap.pageState(2)).toBe(0);
    bitmap.markPage(1, PAGE_HINT);
    expect(bitmap.takeHint(1)).toBe(true);
    expect(bitmap.mergeBytes(8192, Uint8Array.of(1, 0, 0, 0))).toBe(1);
    expect(bitmap.pageState(2)).toBe(PAGE_LAZY);
    // Setting what is set changes nothing on disk.
    bitmap.takePage(2, into);
    expect(bitmap.setBits(65536, 65536)).toBe(0);
    expect(bitmap.pageState(2)).toBe(0);
  });

  it('ignores bits behind the end of the device, from disk and from the peer', () => {
    const bitmap = new Bitmap(8 * 70);
    bitmap.loadPage(0, new Uint8Array(4096).fill(0xff));
    expect(bitmap.weight).toBe(70);
    bitmap.clearAll();
    expect(bitmap.mergeBytes(8, new Uint8Array(8).fill(0xff))).toBe(6);
    expect(bitmap.weight).toBe(6);
  });

  it('marks hot extents up to the end of the device', () => {
    const bitmap = new Bitmap(8192 * 3 + 8);
    expect(bitmap.markExtents(Uint32Array.of(1, 3, 4, 0xfffffffe))).toBe(1025);
    expect(bitmap.countBits(1024, 2047)).toBe(1024);
    expect(bitmap.isBitSet(3072)).toBe(true);
  });

  it('holds a 1 TiB device in 32 MiB and never walks it bit by bit', () => {
    const bitmap = new Bitmap(2 ** 31);
    const started = process.hrtime.bigint();
    bitmap.setAll();
    expect(bitmap.weight).toBe(2 ** 28);
    expect(bitmap.clearBits(5, 2 ** 28 - 7)).toBe(2 ** 28 - 11);
    expect(bitmap.findNext(5)).toBe(2 ** 28 - 6);
    expect(bitmap.countBits(0, 2 ** 28 - 1)).toBe(11);
    // 2^28 steps would take longer than this even on a fast machine; words take some tens of milliseconds.
    expect(Number(process.hrtime.bigint() - started) / 1e6).toBeLessThan(2000);
    expect(bitmap.byteLength).toBe(32 * 2 ** 20);
  });

  it('refuses ranges outside and sizes beyond memory', () => {
    const bitmap = new Bitmap(100);
    expect(() => bitmap.setRange(96, 5)).toThrow(AssertionError);
    expect(() => bitmap.mergeBytes(8, new Uint8Array(12))).toThrow(AssertionError);
    expect(() => new Bitmap(2 ** 39)).toThrow(MetadataError);
  });
});
