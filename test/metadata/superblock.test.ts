import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { MetadataError } from '../../src/base/errors.js';
import { computeLayout } from '../../src/metadata/layout.js';
import {
  checkSuperblockLayout,
  decodeSuperblock,
  encodeSuperblock,
  isClean,
  MAGIC_84_UNCLEAN,
  newSuperblock,
} from '../../src/metadata/superblock.js';

const INDEXED = computeLayout({ kind: 'indexed', index: 0, backingSizeSectors: 1999968, metaSizeSectors: 262144 });

/** What drbdmeta 9.22 writes for `create-md` with index 0. */
const CREATED = Buffer.concat([
  Buffer.from(
    '000000000000000000000000000000040000000000000000000000000000000000000000000000000000000000000000' +
      '0000000000000000000000808374026b' +
      '0004000000000008000001010000004800001000000000000000000100000008',
    'hex',
  ),
  Buffer.alloc(4096 - 96),
]);

const codeOf = (bytes: Uint8Array): string => {
  try {
    decodeSuperblock(bytes);
    return 'accepted';
  } catch (error) {
    if (error instanceof MetadataError) return error.code;
    throw error;
  }
};

describe('superblock', () => {
  it('of create-md is the one drbdmeta writes, byte for byte', () => {
    const into = new Uint8Array(4096).fill(0xaa);
    encodeSuperblock(newSuperblock(INDEXED), into);
    expect(Buffer.from(into).equals(CREATED)).toBe(true);
    const decoded = decodeSuperblock(CREATED);
    expect(decoded).toEqual(newSuperblock(INDEXED));
    expect(isClean(decoded)).toBe(true);
    checkSuperblockLayout(decoded, INDEXED);
  });

  it('is unclean with the running magic or without the flag', () => {
    const superblock = newSuperblock(INDEXED);
    expect(isClean({ ...superblock, magic: MAGIC_84_UNCLEAN })).toBe(false);
    expect(isClean({ ...superblock, flags: 0x17 })).toBe(false);
  });

  it('says what is wrong', () => {
    const broken = (offset: number, word: number) => {
      const bytes = Uint8Array.from(CREATED);
      new DataView(bytes.buffer).setUint32(offset, word);
      return codeOf(bytes);
    };
    expect(codeOf(new Uint8Array(4096))).toBe('DRBDTS_MD_NOT_FOUND');
    expect(broken(60, 0x8374026a)).toBe('DRBDTS_MD_OTHER_VERSION');
    expect(broken(60, 0x8374026d)).toBe('DRBDTS_MD_OTHER_VERSION');
    expect(broken(80, 512)).toBe('DRBDTS_MD_BAD_BITMAP_UNIT');
    expect(broken(88, 0)).toBe('DRBDTS_MD_BAD_STRIPES');
    expect(broken(92, 0xffffffff)).toBe('DRBDTS_MD_BAD_STRIPES');
    expect(broken(0, 0xffffffff)).toBe('DRBDTS_MD_BAD_SIZE');
    const unstriped = Uint8Array.from(CREATED);
    unstriped.fill(0, 88, 96);
    expect(decodeSuperblock(unstriped)).toMatchObject({ alStripes: 1, alStripeSize4k: 8 });
  });

  it('belongs only to the device whose offsets it has', () => {
    const grown = computeLayout({ kind: 'internal', backingSizeSectors: 2 ** 22, metaSizeSectors: 0 });
    const shrunk = computeLayout({ kind: 'internal', backingSizeSectors: 2 ** 21, metaSizeSectors: 0 });
    expect(() => checkSuperblockLayout(newSuperblock(shrunk), grown)).toThrow(/bm-offset is -128, expected -192/);
    expect(() => checkSuperblockLayout(newSuperblock(INDEXED), grown)).toThrow(MetadataError);
    const small = computeLayout({ kind: 'flexible', backingSizeSectors: 2 ** 40, metaSizeSectors: 2048 });
    const tooLarge = { ...newSuperblock(small), laSizeSectors: (2048 - 72) * 32768 + 8 };
    expect(() => checkSuperblockLayout(tooLarge, small)).toThrow(/there is room for 1976/);
    checkSuperblockLayout({ ...tooLarge, laSizeSectors: (2048 - 72) * 32768 }, small);
  });

  it('throws nothing but MetadataError, and gives back what it accepts, for any bytes', () => {
    const magics = fc.constantFrom(0x8374026b, 0x8374026c, 0x8374026a, 0x12345678);
    fc.assert(
      fc.property(
        magics,
        fc.uint8Array({ minLength: 96, maxLength: 96 }),
        fc.array(fc.integer({ min: 0, max: 95 })),
        (magic, noise, kept) => {
          const bytes = new Uint8Array(4096);
          bytes.set(noise);
          // Mutations of a good block reach deeper than noise does.
          for (let at = 0; at < 96; at++) if (!kept.includes(at)) bytes[at] = CREATED[at]!;
          new DataView(bytes.buffer).setUint32(60, magic);
          if (codeOf(bytes) !== 'accepted') return;
          const again = new Uint8Array(4096);
          encodeSuperblock(decodeSuperblock(bytes), again);
          bytes.fill(0, 48, 56);
          if (bytes.subarray(88, 96).every((byte) => byte === 0)) bytes.set([0, 0, 0, 1, 0, 0, 0, 8], 88);
          expect(Buffer.from(again).equals(bytes)).toBe(true);
        },
      ),
      { numRuns: 2000 },
    );
  });
});
