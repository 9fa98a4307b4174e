import { describe, expect, it } from 'vitest';
import { digestBytes, digestOf, sameDigest } from '../../src/replication/digest.js';

const hex = (bytes: Uint8Array) => Buffer.from(bytes).toString('hex');

describe('digests of block data', () => {
  // RFC 3720 B.4 prints the bytes in the order they are stored.
  it.each([
    [new Uint8Array(32), 'aa36918a'],
    [new Uint8Array(32).fill(0xff), '43aba862'],
    [Uint8Array.from({ length: 32 }, (_, index) => index), '4e79dd46'],
  ])('crc32c of a vector of RFC 3720', (bytes, expected) => {
    expect(hex(digestOf('crc32c', bytes))).toBe(expected);
  });

  // RFC 1321 A.5, RFC 3174 7.3, FIPS 180-2 B.1: "abc".
  it.each([
    ['md5', '900150983cd24fb0d6963f7d28e17f72'],
    ['sha1', 'a9993e364706816aba3e25717850c26c9cd0d89d'],
    ['sha256', 'ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad'],
  ])('%s of abc', (algorithm, expected) => {
    const digest = digestOf(algorithm, new TextEncoder().encode('abc'));
    expect(hex(digest)).toBe(expected);
    expect(digest.length).toBe(digestBytes(algorithm));
  });

  it('knows no other names, not even those every object has', () => {
    for (const name of ['', 'crc32', 'toString', 'constructor']) expect(digestBytes(name)).toBe(0);
  });

  it('are the same only byte by byte', () => {
    expect(sameDigest(Uint8Array.of(1, 2), Uint8Array.of(1, 2))).toBe(true);
    expect(sameDigest(Uint8Array.of(1, 2), Uint8Array.of(1, 3))).toBe(false);
    expect(sameDigest(Uint8Array.of(1, 2), Uint8Array.of(1))).toBe(false);
  });
});
