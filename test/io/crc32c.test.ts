import * as fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { crc32c, crc32cRaw } from '../../src/base/crc32c.js';
import { native } from '../../src/io/native.js';
import { NativeRing } from '../../src/io/native-ring.js';

const bytes = (text: string) => new TextEncoder().encode(text);

/** RFC 3720 appendix B.4; the checksums there are printed as they lie on the wire, little-endian. */
const RFC3720: [string, Uint8Array, number][] = [
  ['32 zeroes', new Uint8Array(32), 0x8a9136aa],
  ['32 ones', new Uint8Array(32).fill(0xff), 0x62a8ab43],
  ['32 ascending', Uint8Array.from({ length: 32 }, (_, index) => index), 0x46dd794e],
  ['32 descending', Uint8Array.from({ length: 32 }, (_, index) => 31 - index), 0x113fdb5c],
];

describe('crc32c', () => {
  it.each(RFC3720)('of %s is what RFC 3720 says', (_, input, expected) => {
    expect(crc32c(input)).toBe(expected);
    expect(native().crc32c(input, 0)).toBe(expected);
  });

  it('of "123456789" in both flavours', () => {
    const input = bytes('123456789');
    expect(crc32c(input)).toBe(0xe3069283);
    expect(native().crc32c(input, 0)).toBe(0xe3069283);
    expect(crc32cRaw(input)).toBe(0x58e3fa20);
    expect(native().crc32cRaw(input)).toBe(0x58e3fa20);
  });

  it('twin and addon agree on anything, whole or in two parts', () => {
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 3000 }), fc.nat(), (input, cut) => {
        const at = input.length === 0 ? 0 : cut % input.length;
        const [head, tail] = [input.subarray(0, at), input.subarray(at)];
        const whole = native().crc32c(input, 0);
        expect(crc32c(input)).toBe(whole);
        expect(crc32c(tail, crc32c(head))).toBe(whole);
        expect(native().crc32c(tail, native().crc32c(head, 0))).toBe(whole);
        expect(crc32cRaw(input)).toBe(native().crc32cRaw(input));
        expect(crc32cRaw(tail, crc32cRaw(head))).toBe(crc32cRaw(input));
      }),
    );
  });

  it('of pool ranges is that of the same bytes', () => {
    const ring = new NativeRing({ poolBytes: 1 << 20 });
    const block = ring.memory.allocate(4096);
    const input = bytes('123456789');
    ring.memory.bytes.set(input, block + 5);
    expect(ring.handle.crc32cPool(block + 5, 9, 0)).toBe(0xe3069283);
    expect(ring.handle.crc32cPool(block + 9, 5, crc32c(input.subarray(0, 4)))).toBe(0xe3069283);
    expect(ring.handle.crc32cRawPool(block + 5, 9)).toBe(0x58e3fa20);
    ring.close();
  });
});
