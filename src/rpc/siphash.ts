/**
 * SipHash-2-4 (Aumasson and Bernstein, 2012) with a 64-bit result, on 32-bit halves: BigInt would cost an allocation
 * per step, and file handles are checked on every request.
 */
import { assert } from '../base/assert.js';

/** The 16-byte key, split once. */
export class SipKey {
  readonly k0lo: number;
  readonly k0hi: number;
  readonly k1lo: number;
  readonly k1hi: number;

  constructor(key: Uint8Array) {
    assert(key.length === 16, `a SipHash key has 16 bytes, not ${key.length}`);
    const view = new DataView(key.buffer, key.byteOffset, 16);
    this.k0lo = view.getInt32(0, true);
    this.k0hi = view.getInt32(4, true);
    this.k1lo = view.getInt32(8, true);
    this.k1hi = view.getInt32(12, true);
  }
}

/** State words v0..v3 as low and high halves; shared because hashing never nests. */
const v = new Int32Array(8);

function add(to: number, from: number): void {
  const low = (v[to]! >>> 0) + (v[from]! >>> 0);
  v[to + 1] = (v[to + 1]! + v[from + 1]! + (low > 0xffffffff ? 1 : 0)) | 0;
  v[to] = low | 0;
}

/** Rotates left by fewer than 32 bits, then xors with another word. */
function rotateXor(word: number, bits: number, other: number): void {
  const low = v[word]!;
  const high = v[word + 1]!;
  v[word] = ((low << bits) | (high >>> (32 - bits))) ^ v[other]!;
  v[word + 1] = ((high << bits) | (low >>> (32 - bits))) ^ v[other + 1]!;
}

function swapHalves(word: number): void {
  const low = v[word]!;
  v[word] = v[word + 1]!;
  v[word + 1] = low;
}

function round(): void {
  add(0, 2);
  rotateXor(2, 13, 0);
  swapHalves(0);
  add(4, 6);
  rotateXor(6, 16, 4);
  add(0, 6);
  rotateXor(6, 21, 0);
  add(4, 2);
  rotateXor(2, 17, 4);
  swapHalves(4);
}

function compress(low: number, high: number): void {
  v[6] = v[6]! ^ low;
  v[7] = v[7]! ^ high;
  round();
  round();
  v[0] = v[0]! ^ low;
  v[1] = v[1]! ^ high;
}

/**
 * Hashes `bytes[start, end)`, optionally followed by `bytes[secondStart, secondEnd)`, into `out` (low half, high half,
 * as signed 32-bit numbers).
 */
export function sipHash(
  key: SipKey,
  bytes: Uint8Array,
  start: number,
  end: number,
  out: Int32Array,
  secondStart = 0,
  secondEnd = 0,
): void {
  v[0] = key.k0lo ^ 0x70736575;
  v[1] = key.k0hi ^ 0x736f6d65;
  v[2] = key.k1lo ^ 0x6e646f6d;
  v[3] = key.k1hi ^ 0x646f7261;
  v[4] = key.k0lo ^ 0x6e657261;
  v[5] = key.k0hi ^ 0x6c796765;
  v[6] = key.k1lo ^ 0x79746573;
  v[7] = key.k1hi ^ 0x74656462;
  let low = 0;
  let high = 0;
  let filled = 0;
  for (let part = 0; part < 2; part++) {
    const stop = part === 0 ? end : secondEnd;
    for (let at = part === 0 ? start : secondStart; at < stop; at++) {
      const byte = bytes[at]!;
      if (filled < 4) low |= byte << (8 * filled);
      else high |= byte << (8 * (filled - 4));
      if (++filled === 8) {
        compress(low, high);
        low = 0;
        high = 0;
        filled = 0;
      }
    }
  }
  compress(low, high | ((end - start + secondEnd - secondStart) << 24));
  v[4] = v[4]! ^ 0xff;
  for (let i = 0; i < 4; i++) round();
  out[0] = v[0]! ^ v[2]! ^ v[4]! ^ v[6]!;
  out[1] = v[1]! ^ v[3]! ^ v[5]! ^ v[7]!;
}
