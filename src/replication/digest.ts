/**
 * Digests of block data by their names in drbd.conf (verify-alg, csums-alg), as Linux's crypto API computes them.
 */
import { createHash } from 'node:crypto';
import { assert } from '../base/assert.js';
import { crc32c } from '../base/crc32c.js';

const DIGEST_BYTES: Readonly<Record<string, number>> = {
  crc32c: 4,
  md5: 16,
  sha1: 20,
  sha256: 32,
  sha384: 48,
  sha512: 64,
};

/** Size of a digest; 0 for an algorithm that drbdts does not have. */
export function digestBytes(algorithm: string): number {
  return Object.hasOwn(DIGEST_BYTES, algorithm) ? DIGEST_BYTES[algorithm]! : 0;
}

/**
 * The digest of `bytes`, which are borrowed.
 * @param algorithm one that has a size
 * @see Linux crypto/crc32c_generic.c: register from all ones, inverted at the end, stored little-endian
 */
export function digestOf(algorithm: string, bytes: Uint8Array): Uint8Array {
  assert(digestBytes(algorithm) > 0, `no digest ${algorithm}`);
  if (algorithm !== 'crc32c') return createHash(algorithm).update(bytes).digest();
  const digest = new Uint8Array(4);
  new DataView(digest.buffer).setUint32(0, crc32c(bytes), true);
  return digest;
}

export function sameDigest(a: Uint8Array, b: Uint8Array): boolean {
  return a.length === b.length && a.every((byte, index) => byte === b[index]);
}
