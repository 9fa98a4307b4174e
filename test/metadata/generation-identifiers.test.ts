import { describe, expect, it } from 'vitest';
import {
  GenerationIdentifiers,
  sameGeneration,
  UI_BITMAP,
  UI_CURRENT,
} from '../../src/metadata/generation-identifiers.js';

const all = (ids: GenerationIdentifiers) => [ids.current, ids.bitmap, ids.history0, ids.history1];

describe('generation identifiers', () => {
  it('start as just created', () => {
    expect(all(new GenerationIdentifiers())).toEqual([4n, 0n, 0n, 0n]);
  });

  it('rawSet puts the role into bit 0 of the current one only', () => {
    const ids = new GenerationIdentifiers();
    ids.rawSet(UI_CURRENT, 0xabcdn, false);
    ids.rawSet(UI_BITMAP, 0x1235n, false);
    expect(all(ids)).toEqual([0xabccn, 0x1235n, 0n, 0n]);
    ids.setPrimaryBit(true);
    expect(ids.current).toBe(0xabcdn);
    ids.setPrimaryBit(false);
    expect(ids.current).toBe(0xabccn);
    expect(sameGeneration(0xabccn, 0xabcdn)).toBe(true);
    expect(sameGeneration(0xabccn, 0xabcen)).toBe(false);
  });

  it('set moves a value that is replaced into history, and 0 leaves no trace', () => {
    const ids = new GenerationIdentifiers(0x10n, 0n, 0x20n, 0x30n);
    ids.set(UI_BITMAP, 0x40n, false);
    expect(all(ids)).toEqual([0x10n, 0x40n, 0x20n, 0x30n]);
    ids.set(UI_BITMAP, 0x50n, false);
    expect(all(ids)).toEqual([0x10n, 0x50n, 0x40n, 0x20n]);
  });

  it('clearBitmap archives the base once', () => {
    const ids = new GenerationIdentifiers(0x10n, 0x40n, 0x20n, 0x30n);
    ids.clearBitmap();
    expect(all(ids)).toEqual([0x10n, 0n, 0x40n, 0x20n]);
    ids.clearBitmap();
    expect(all(ids)).toEqual([0x10n, 0n, 0x40n, 0x20n]);
  });

  it('newCurrent keeps bit 0 in the base and tells which base was lost', () => {
    const ids = new GenerationIdentifiers(0x11n, 0n, 0x20n, 0x30n);
    expect(ids.newCurrent(0xffeen, true)).toBe(0n);
    expect(all(ids)).toEqual([0xffefn, 0x11n, 0x20n, 0x30n]);
    expect(ids.newCurrent(0x100n, false)).toBe(0x11n);
    expect(all(ids)).toEqual([0x100n, 0xffefn, 0x20n, 0x30n]);
  });

  it('a resync source derives its bitmap identifier from the base, wrapping at 64 bits', () => {
    expect(new GenerationIdentifiers(1n, 0x1234n).resyncUuid(9n)).toBe(0x1000000001234n);
    expect(new GenerationIdentifiers(1n, 0xffff_0000_0000_0007n).resyncUuid(9n)).toBe(7n);
    expect(new GenerationIdentifiers(1n, 0n).resyncUuid(9n)).toBe(9n);
    expect(new GenerationIdentifiers(1n, 4n).resyncUuid(9n)).toBe(9n);
  });

  it('both sides of a finished resync end with the same four (spec 7.3)', () => {
    // Source lost its peer as Primary, wrote alone, and syncs the peer that stayed at the old generation.
    const source = new GenerationIdentifiers(0xa0n, 0n, 0xb0n, 0xc0n);
    const target = new GenerationIdentifiers(0xa0n, 0n, 0xb0n, 0xc0n);
    source.newCurrent(0xd00n, true);
    const sync = source.resyncUuid(0n);
    source.set(UI_BITMAP, sync, true);
    source.clearBitmap();
    expect(all(source)).toEqual([0xd01n, 0n, sync, 0xa0n]);
    target.rawSet(UI_CURRENT, sync, false);
    target.rawSet(UI_BITMAP, 0n, false);
    expect(all(target)).toEqual([sync, 0n, 0xb0n, 0xc0n]);
  });
});
