import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { AssertionError } from '../../src/base/assert.js';
import { crc32c, crc32cRaw } from '../../src/base/crc32c.js';
import { MetadataError } from '../../src/base/errors.js';
import {
  ActivityLog,
  AL_HOT,
  AL_WAIT,
  encodeInitializedBlock,
  maxActivityLogExtents,
  replayActivityLog,
  ringPosition,
} from '../../src/metadata/activity-log.js';

/** A ring on a disk that tells nothing but what was written to it. */
function freshArea(blocks: number): Uint8Array {
  const area = new Uint8Array(blocks * 4096);
  for (let block = 0; block < blocks; block++) encodeInitializedBlock(area.subarray(block * 4096, (block + 1) * 4096));
  return area;
}

/** Opens, writes and commits what is queued. @returns the extents that left */
function commit(log: ActivityLog, area?: Uint8Array): number[] {
  const evicted = Array.from({ length: log.openTransaction() }, (_, index) => log.evictedExtent(index));
  const block = new Uint8Array(4096);
  const position = log.encodeTransaction(block);
  area?.set(block, position * 4096);
  log.transactionCommitted();
  return evicted;
}

/** Builds a transaction without the code under test. */
function transaction(
  number: number,
  updates: readonly (readonly [slot: number, extent: number])[],
  context: readonly number[],
  size = 257,
): Uint8Array {
  const block = Buffer.alloc(4096, 0xff);
  block.fill(0, 0, 36);
  block.writeUInt32BE(0x69cb65a2, 0);
  block.writeUInt32BE(number, 4);
  block.writeUInt16BE(updates.length, 14);
  block.writeUInt16BE(size, 16);
  updates.forEach(([slot, extent], index) => {
    block.writeUInt16BE(slot, 36 + index * 2);
    block.writeUInt32BE(extent, 164 + index * 4);
  });
  context.forEach((extent, index) => {
    block.writeUInt32BE(extent, 420 + index * 4);
  });
  block.writeUInt32BE(crc32cRaw(block), 8);
  return block;
}

describe('crc32c', () => {
  it('has the published values', () => {
    expect(crc32c(Buffer.from('123456789'))).toBe(0xe3069283);
    expect(crc32cRaw(Buffer.from('123456789'))).toBe(0x58e3fa20);
    expect(crc32cRaw(Uint8Array.of(1))).toBe(0xf26b8303);
  });
});

describe('activity log on disk', () => {
  it('starts with initialised blocks as drbdmeta writes them', () => {
    const block = new Uint8Array(4096).fill(0x55);
    encodeInitializedBlock(block);
    expect(Buffer.from(block.subarray(0, 20)).toString('hex')).toBe('69cb65a200000000709cc651ffff000000000000');
    expect(block.subarray(20).every((byte) => byte === 0)).toBe(true);
  });

  it('spreads transactions over stripes (spec 4.3)', () => {
    expect([0, 1, 2, 3, 4, 5, 6, 7, 8].map((number) => ringPosition(number, 1, 8))).toEqual([
      0, 1, 2, 3, 4, 5, 6, 7, 0,
    ]);
    // Four stripes of 16 blocks: neighbours are 16 blocks apart.
    expect([0, 1, 2, 3, 4, 63, 64].map((number) => ringPosition(number, 4, 16))).toEqual([0, 16, 32, 48, 1, 63, 0]);
  });

  it('bounds al-extents by what the ring can hold', () => {
    expect(maxActivityLogExtents(1, 8)).toBe(6433);
    expect(maxActivityLogExtents(1, 72)).toBe(65249);
    expect(maxActivityLogExtents(4, 64)).toBe(65534);
  });

  it('encodes slots, extents and the context before the transaction', () => {
    const log = new ActivityLog({ extents: 67 });
    expect(log.begin(5, 5)).toBe(1);
    expect(log.begin(243, 243)).toBe(1);
    log.openTransaction();
    const block = new Uint8Array(4096);
    expect(log.encodeTransaction(block)).toBe(0);
    expect(
      Buffer.from(block).equals(
        transaction(
          0,
          [
            [0, 5],
            [1, 243],
          ],
          [],
          67,
        ),
      ),
    ).toBe(true);
    log.transactionCommitted();
    log.release(5, 5);
    expect(log.begin(9, 9)).toBe(2);
    log.openTransaction();
    expect(log.encodeTransaction(block)).toBe(1);
    expect(Buffer.from(block).equals(transaction(1, [[2, 9]], [5, 243], 67))).toBe(true);
  });

  it('moves the context window over all slots and back', () => {
    const log = new ActivityLog({ extents: 1900 });
    const block = new Uint8Array(4096);
    const starts = Array.from({ length: 4 }, () => {
      log.openTransaction();
      log.encodeTransaction(block);
      log.transactionCommitted();
      return Buffer.from(block).readUInt16BE(18);
    });
    expect(starts).toEqual([0, 919, 1838, 0]);
  });

  it('replays the published history (spec appendix C)', () => {
    const area = freshArea(8);
    area.set(
      transaction(
        0,
        [
          [0, 5],
          [1, 243],
        ],
        [],
      ),
      0,
    );
    area.set(transaction(1, [[2, 9]], [5, 243]), 4096);
    area.set(transaction(2, [[0, 7]], [5, 243, 9]), 8192);
    expect(replayActivityLog(area, 1, 8)).toEqual({
      hotExtents: Uint32Array.of(7, 9, 243),
      validBlocks: 8,
      transactionBlocks: 3,
      corruptBlocks: 0,
      newestTransaction: 2,
      isUsable: true,
    });
  });

  it('leaves a torn block out: the transaction never took effect', () => {
    const area = freshArea(8);
    area.set(transaction(0, [[0, 5]], []), 0);
    area.set(transaction(1, [[1, 9]], [5]), 4096);
    area.set(transaction(2, [[0, 7]], [5, 9]).subarray(0, 512), 8192);
    expect(replayActivityLog(area, 1, 8)).toMatchObject({ hotExtents: Uint32Array.of(5, 9), corruptBlocks: 1 });
    expect(replayActivityLog(new Uint8Array(8 * 4096), 1, 8)).toMatchObject({
      validBlocks: 0,
      newestTransaction: -1,
      isUsable: false,
    });
  });

  it('believes a fresh log whose very first transaction is torn, and no other without a transaction', () => {
    // As drbdmeta 9.22 does: exit code 0 for a Primary in the first case, 1 in the others.
    const damagedAt = (...blocks: number[]) => {
      const area = freshArea(8);
      for (const block of blocks) area.set(transaction(block, [[0, 5]], []).subarray(0, 512), block * 4096);
      return replayActivityLog(area, 1, 8).isUsable;
    };
    expect([damagedAt(), damagedAt(0), damagedAt(1), damagedAt(7), damagedAt(0, 1)]).toEqual([
      true,
      true,
      false,
      false,
      false,
    ]);
  });

  it('finds the newest transaction across the wrap of its number', () => {
    const log = new ActivityLog({ extents: 67, firstTransaction: 0xffff_fffa });
    const area = freshArea(8);
    for (let extent = 0; extent < 12; extent++) {
      log.begin(extent, extent);
      commit(log, area);
    }
    expect(replayActivityLog(area, 1, 8)).toMatchObject({
      newestTransaction: 5,
      hotExtents: Uint32Array.from({ length: 12 }, (_, extent) => extent),
    });
  });

  it('answers any bytes with a replay or a MetadataError', () => {
    expect(() => replayActivityLog(new Uint8Array(4096), 1, 8)).toThrow(MetadataError);
    expect(() => replayActivityLog(new Uint8Array(0), 0, 8)).toThrow(MetadataError);
    fc.assert(
      fc.property(
        fc.array(fc.tuple(fc.integer({ min: 0, max: 7 }), fc.integer({ min: 0, max: 4095 }), fc.nat(255)), {
          minLength: 1,
          maxLength: 60,
        }),
        fc.boolean(),
        (mutations, fixChecksums) => {
          const area = freshArea(8);
          for (let number = 0; number < 8; number++)
            area.set(transaction(number, [[number, number * 3]], [1, 2, 3]), number * 4096);
          for (const [block, at, value] of mutations) area[block * 4096 + at] = value;
          if (fixChecksums)
            for (let block = 0; block < 8; block++) {
              const bytes = Buffer.from(area.buffer, block * 4096, 4096);
              bytes.writeUInt32BE(0, 8);
              bytes.writeUInt32BE(crc32cRaw(bytes), 8);
            }
          const replay = replayActivityLog(area, 1, 8);
          expect(replay.validBlocks + replay.corruptBlocks).toBe(8);
          expect(replay.hotExtents.length).toBeLessThanOrEqual(65534);
          expect(replay.hotExtents).toEqual(Uint32Array.from(new Set(replay.hotExtents)).sort());
        },
      ),
      { numRuns: 200 },
    );
  });
});

describe('activity log in memory', () => {
  it('costs metadata only on a miss', () => {
    const log = new ActivityLog({ extents: 67 });
    expect(log.begin(10, 12)).toBe(1);
    expect(log.hasQueuedChanges).toBe(true);
    expect(log.isHot(11)).toBe(false);
    // A second writer to the same extent waits for the same transaction.
    expect(log.begin(11, 11)).toBe(1);
    expect(commit(log)).toEqual([]);
    expect(log.transactionsCommitted).toBe(1);
    expect(log.begin(10, 11)).toBe(AL_HOT);
    expect(log.hasQueuedChanges).toBe(false);
    expect([log.referencesOf(10), log.referencesOf(11), log.referencesOf(12), log.referencesOf(13)]).toEqual([
      2, 3, 1, 0,
    ]);
    expect(log.isAnyReferenced(8, 11)).toBe(true);
    expect(log.isAnyReferenced(13, 20)).toBe(false);
  });

  it('queues changes while a transaction is being written', () => {
    const log = new ActivityLog({ extents: 67 });
    expect(log.begin(1, 1)).toBe(1);
    log.openTransaction();
    expect(log.begin(2, 2)).toBe(2);
    expect(log.begin(1, 2)).toBe(2);
    expect(log.begin(1, 1)).toBe(1);
    log.transactionCommitted();
    expect(log.begin(1, 1)).toBe(AL_HOT);
    expect(log.begin(1, 2)).toBe(2);
    expect(commit(log)).toEqual([]);
    expect(log.begin(1, 2)).toBe(AL_HOT);
  });

  it('evicts the least recently used idle extent, and names it', () => {
    const log = new ActivityLog({ extents: 67 });
    for (let extent = 0; extent < 67; extent++) {
      log.begin(extent, extent);
      commit(log);
    }
    for (let extent = 66; extent >= 0; extent--) if (extent !== 66) log.release(extent, extent);
    // 65 was released first; using it again makes 64 the oldest.
    expect(log.begin(65, 65)).toBe(AL_HOT);
    log.release(65, 65);
    log.begin(100, 101);
    expect(commit(log)).toEqual([64, 63]);
    expect(log.isHot(64)).toBe(false);
    expect(log.isHot(65)).toBe(true);
  });

  it('starves rather than lets hot requests keep a cold one out for ever', () => {
    const log = new ActivityLog({ extents: 67 });
    for (let extent = 0; extent < 67; extent++) {
      log.begin(extent, extent);
      commit(log);
    }
    log.begin(3, 3);
    expect(log.begin(500, 500)).toBe(AL_WAIT);
    expect(log.isStarving).toBe(true);
    expect(log.begin(3, 3)).toBe(AL_WAIT);
    expect(log.release(3, 3)).toBe(false);
    expect(log.isStarving).toBe(true);
    expect(log.release(7, 7)).toBe(true);
    expect(log.isStarving).toBe(false);
    expect(log.begin(500, 500)).toBe(68);
    expect(commit(log)).toEqual([7]);
  });

  it('puts at most 64 changes into a transaction, and all of a request into one', () => {
    const log = new ActivityLog({ extents: 200 });
    expect(log.begin(0, 31)).toBe(1);
    expect(log.begin(100, 130)).toBe(1);
    expect(log.begin(200, 201)).toBe(AL_WAIT);
    expect(log.isStarving).toBe(false);
    expect(log.referencesOf(200)).toBe(0);
    expect(log.begin(200, 200)).toBe(1);
    log.openTransaction();
    expect(log.begin(300, 363)).toBe(2);
    log.transactionCommitted();
    commit(log);
    expect(log.hotExtents().length).toBe(128);
  });

  it('refuses to release what nobody holds', () => {
    const log = new ActivityLog({ extents: 67 });
    expect(() => log.release(1, 1)).toThrow(AssertionError);
    log.begin(1, 1);
    log.release(1, 1);
    expect(() => log.release(1, 1)).toThrow(AssertionError);
    expect(() => log.transactionCommitted()).toThrow(AssertionError);
  });

  it('behaves like the naive model, and a crash at any point loses no extent with writes in flight', () => {
    const operation = fc.oneof(
      { weight: 6, arbitrary: fc.tuple(fc.constant('begin'), fc.nat(400), fc.nat(6)) },
      { weight: 5, arbitrary: fc.tuple(fc.constant('release'), fc.nat(1000), fc.constant(0)) },
      { weight: 3, arbitrary: fc.tuple(fc.constantFrom('open', 'commit'), fc.constant(0), fc.constant(0)) },
    );
    fc.assert(
      fc.property(
        fc.constantFrom([1, 8] as const, [2, 8] as const, [4, 3] as const),
        fc.array(operation, { minLength: 50, maxLength: 600 }),
        ([stripes, size], operations) => {
          const slots = 67;
          const log = new ActivityLog({ extents: slots, alStripes: stripes, alStripeSize4k: size });
          const area = freshArea(stripes * size);
          const block = new Uint8Array(4096);
          // The model: recency of idle extents in an array, references in a map, what is durable in a set.
          const references = new Map<number, number>();
          const idle: number[] = [];
          const durable = new Set<number>();
          let queued = new Map<number, number | undefined>();
          let open: Map<number, number | undefined> | undefined;
          const held: { first: number; last: number; ordinal: number }[] = [];
          let committed = 0;
          let isStarving = false;
          const isKnown = (extent: number) => references.has(extent);
          for (const [kind, a, b] of operations) {
            if (kind === 'begin') {
              const extents = Array.from({ length: b + 1 }, (_, index) => a + index);
              const missing = extents.filter((extent) => !isKnown(extent));
              const idleOthers = idle.filter((extent) => !extents.includes(extent)).length;
              const room = slots - references.size + idleOthers;
              const answer = log.begin(a, a + b);
              if (isStarving || (missing.length > 0 && missing.length > room)) {
                isStarving = true;
                expect(answer).toBe(AL_WAIT);
                continue;
              }
              if (missing.length > 64 - queued.size) {
                expect(answer).toBe(AL_WAIT);
                continue;
              }
              let expected = AL_HOT;
              for (const extent of extents.filter(isKnown)) {
                references.set(extent, references.get(extent)! + 1);
                if (idle.includes(extent)) idle.splice(idle.indexOf(extent), 1);
                if (open?.has(extent)) expected = Math.max(expected, committed + 1);
                if (queued.has(extent)) expected = Math.max(expected, committed + (open ? 2 : 1));
              }
              for (const extent of missing) {
                const victim = references.size >= slots ? idle.shift() : undefined;
                if (victim !== undefined) references.delete(victim);
                references.set(extent, 1);
                queued.set(extent, victim);
                expected = committed + (open ? 2 : 1);
              }
              expect(answer).toBe(expected);
              held.push({ first: a, last: a + b, ordinal: answer });
            } else if (kind === 'release' && held.length > 0) {
              const [{ first, last }] = held.splice(a % held.length, 1) as [(typeof held)[0]];
              let becameIdle = false;
              for (let extent = first; extent <= last; extent++) {
                const left = references.get(extent)! - 1;
                references.set(extent, left);
                if (left > 0) continue;
                becameIdle = true;
                if (!queued.has(extent) && !open?.has(extent)) idle.push(extent);
              }
              if (becameIdle) isStarving = false;
              expect(log.release(first, last)).toBe(becameIdle);
            } else if (kind === 'open' && !open) {
              const evicted = Array.from({ length: log.openTransaction() }, (_, index) => log.evictedExtent(index));
              expect(evicted).toEqual([...queued.values()].filter((victim) => victim !== undefined));
              open = queued;
              queued = new Map();
            } else if (kind === 'commit' && open) {
              const position = log.encodeTransaction(block) * 4096;
              // Crash while the block is being written: its first sectors are new, the rest is what was there.
              const torn = Uint8Array.from(area);
              torn.set(block.subarray(0, 512), position);
              expect([...replayActivityLog(torn, stripes, size).hotExtents].sort()).toEqual([...durable].sort());
              area.set(block, position);
              log.transactionCommitted();
              committed++;
              for (const [extent, victim] of open) {
                if (victim !== undefined) durable.delete(victim);
                durable.add(extent);
                if (references.get(extent) === 0) idle.push(extent);
              }
              open = undefined;
              expect([...log.hotExtents()].sort()).toEqual([...durable].sort());
              // Crash now: what the disk says is exactly what is durable, so nothing in flight is missed.
              expect([...replayActivityLog(area, stripes, size).hotExtents].sort()).toEqual([...durable].sort());
            }
            expect(log.isStarving).toBe(isStarving);
            for (const { first, last, ordinal } of held)
              if (ordinal <= committed)
                for (let extent = first; extent <= last; extent++) expect(durable.has(extent)).toBe(true);
          }
          expect(log.used).toBe([...references.values()].filter((count) => count > 0).length);
        },
      ),
      { numRuns: 60 },
    );
  });
});
