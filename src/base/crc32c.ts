/**
 * CRC-32C (Castagnoli, polynomial 0x1EDC6F41 reflected): the pure twin of the addon's, for what must run without it.
 */

const TABLE = makeTable();

function makeTable(): Uint32Array {
  const table = new Uint32Array(256);
  for (let index = 0; index < 256; index++) {
    let value = index;
    for (let bit = 0; bit < 8; bit++) value = value & 1 ? (value >>> 1) ^ 0x82f63b78 : value >>> 1;
    table[index] = value >>> 0;
  }
  return table;
}

function update(register: number, bytes: Uint8Array): number {
  let value = register;
  for (let index = 0; index < bytes.length; index++) value = TABLE[(value ^ bytes[index]!) & 0xff]! ^ (value >>> 8);
  return value;
}

/**
 * The ordinary checksum: register from all ones, inverted at the end (RFC 3720 appendix B.4).
 *
 * @param seed result for the bytes before these; 0 to begin
 * @returns unsigned 32-bit number
 */
export function crc32c(bytes: Uint8Array, seed = 0): number {
  return ~update(~seed, bytes) >>> 0;
}

/**
 * Register from 0, no inversion: as in the activity log. Digests (verify-alg) are the ordinary one.
 *
 * @param register result for the bytes before these; 0 to begin
 * @returns unsigned 32-bit number
 */
export function crc32cRaw(bytes: Uint8Array, register = 0): number {
  return update(register, bytes) >>> 0;
}
