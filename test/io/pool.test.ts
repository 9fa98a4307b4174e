import * as fc from 'fast-check';
import { afterEach, describe, expect, it } from 'vitest';
import { AssertionError } from '../../src/base/assert.js';
import { NativeRing } from '../../src/io/native-ring.js';

const PAGE = 4096;

describe('the pool', () => {
  let ring: NativeRing;
  afterEach(() => ring.close());

  /** The block size the buddy system gives for a length. */
  function blockBytes(length: number): number {
    let size = PAGE;
    while (size < length) size *= 2;
    return size;
  }

  it('behaves like a naive model under any sequence of allocate, retain and release', () => {
    fc.assert(
      fc.property(
        fc.array(fc.tuple(fc.constantFrom('allocate', 'retain', 'release'), fc.nat(200_000), fc.nat()), {
          maxLength: 300,
        }),
        (steps) => {
          ring = new NativeRing({ poolBytes: 2 << 20 });
          const { memory } = ring;
          const model = new Map<number, { size: number; references: number; stamp: number }>();
          let stamps = 0;
          for (const [step, length, pick] of steps) {
            if (step === 'allocate') {
              const offset = memory.allocate(length);
              if (offset < 0) continue;
              const size = blockBytes(length);
              expect(offset % PAGE).toBe(0);
              expect(offset + size).toBeLessThanOrEqual(memory.bytes.length);
              for (const [other, block] of model)
                expect(offset + size <= other || other + block.size <= offset).toBe(true);
              const stamp = (stamps++ % 255) + 1;
              memory.bytes.fill(stamp, offset, offset + size);
              model.set(offset, { size, references: 1, stamp });
              continue;
            }
            const offsets = [...model.keys()];
            const offset = offsets[pick % Math.max(1, offsets.length)];
            if (offset === undefined) continue;
            const block = model.get(offset)!;
            if (step === 'retain') {
              memory.retain(offset);
              block.references++;
            } else {
              expect(memory.bytes[offset]).toBe(block.stamp);
              expect(memory.bytes[offset + block.size - 1]).toBe(block.stamp);
              memory.release(offset);
              if (--block.references === 0) model.delete(offset);
            }
          }
          let used = 0;
          for (const block of model.values()) used += block.size;
          expect(ring.usedBytes).toBe(used);
          for (const [offset, block] of model)
            for (let count = 0; count < block.references; count++) memory.release(offset);
          expect(ring.usedBytes).toBe(0);
          // Everything merged again: the largest block can be had.
          const whole = memory.allocate(2 << 20);
          expect(whole).toBe(0);
          memory.release(whole);
          ring.close();
        },
      ),
      { numRuns: 60 },
    );
  });

  it('says -1 when exhausted and recovers, also when small blocks sit in magazines', () => {
    ring = new NativeRing({ poolBytes: 1 << 20 });
    const { memory } = ring;
    const pages = Array.from({ length: 256 }, () => memory.allocate(1));
    expect(new Set(pages).size).toBe(256);
    expect(pages).not.toContain(-1);
    expect(memory.allocate(1)).toBe(-1);
    for (const page of pages) memory.release(page);
    const whole = memory.allocate(1 << 20);
    expect(whole).toBe(0);
    expect(memory.allocate(1)).toBe(-1);
    memory.release(whole);
    expect(memory.allocate(1)).toBeGreaterThanOrEqual(0);
  });

  it('serves sizes that are no power of two and pools that are not either', () => {
    ring = new NativeRing({ poolBytes: 7 * PAGE + 100 });
    const { memory } = ring;
    expect(memory.bytes.length).toBe(7 * PAGE);
    const blocks = [memory.allocate(3 * PAGE), memory.allocate(2 * PAGE), memory.allocate(PAGE)];
    expect(blocks.every((offset) => offset >= 0)).toBe(true);
    expect(memory.allocate(1)).toBe(-1);
  });

  it('stops on a release too many', () => {
    ring = new NativeRing({ poolBytes: 1 << 20 });
    const block = ring.memory.allocate(1);
    ring.memory.release(block);
    expect(() => ring.memory.release(block)).toThrow(AssertionError);
  });

  it('gives blocks above 1 MiB back to the kernel', () => {
    ring = new NativeRing({ poolBytes: 16 << 20 });
    const { memory } = ring;
    const block = memory.allocate(8 << 20);
    memory.bytes.fill(7, block, block + (8 << 20));
    memory.release(block);
    const again = memory.allocate(8 << 20);
    expect(again).toBe(block);
    // Given back means zero on the next touch.
    expect(ring.handle.poolIsZero(again, 8 << 20)).toBe(true);
  });

  it('copies, zeroes and compares ranges', () => {
    ring = new NativeRing({ poolBytes: 1 << 20 });
    const { memory, handle } = ring;
    const block = memory.allocate(8192);
    handle.poolZero(block, 8192);
    expect(handle.poolIsZero(block, 8192)).toBe(true);
    for (const at of [0, 1, 7, 8, 511, 512, 4095, 8191]) {
      memory.bytes[block + at] = 1;
      expect(handle.poolIsZero(block, 8192)).toBe(false);
      expect(handle.poolIsZero(block + at + 1, 8192 - at - 1)).toBe(true);
      expect(handle.poolIsZero(block, at)).toBe(true);
      memory.bytes[block + at] = 0;
    }
    memory.bytes.set([1, 2, 3, 4], block);
    handle.poolCopy(block + 2, block, 4);
    expect([...memory.bytes.subarray(block, block + 6)]).toEqual([1, 2, 1, 2, 3, 4]);
  });
});
