/** Slicing tables of CRC-32C (Castagnoli, reflected polynomial 0x82f63b78), eight bytes at a time. */
const TABLES: readonly Uint32Array[] = buildTables();

function buildTables(): Uint32Array[] {
  const tables = Array.from({ length: 8 }, () => new Uint32Array(256));
  for (let value = 0; value < 256; value++) {
    let crc = value;
    for (let bit = 0; bit < 8; bit++) crc = crc & 1 ? (crc >>> 1) ^ 0x82f63b78 : crc >>> 1;
    tables[0]![value] = crc;
  }
  for (let slice = 1; slice < 8; slice++)
    for (let value = 0; value < 256; value++) {
      const before = tables[slice - 1]![value]!;
      tables[slice]![value] = (before >>> 8) ^ tables[0]![before & 0xff]!;
    }
  return tables;
}

/** CRC-32C with initial value `seed` and no final inversion: what the kernel's crc32c() and the activity log use. */
export function crc32cRaw(bytes: Uint8Array, seed = 0): number {
  const [t0, t1, t2, t3, t4, t5, t6, t7] = TABLES as [
    Uint32Array,
    Uint32Array,
    Uint32Array,
    Uint32Array,
    Uint32Array,
    Uint32Array,
    Uint32Array,
    Uint32Array,
  ];
  let crc = seed >>> 0;
  let at = 0;
  for (const end = bytes.length - 7; at < end; at += 8) {
    crc ^= bytes[at]! | (bytes[at + 1]! << 8) | (bytes[at + 2]! << 16) | (bytes[at + 3]! << 24);
    crc =
      t7[crc & 0xff]! ^
      t6[(crc >>> 8) & 0xff]! ^
      t5[(crc >>> 16) & 0xff]! ^
      t4[crc >>> 24]! ^
      t3[bytes[at + 4]!]! ^
      t2[bytes[at + 5]!]! ^
      t1[bytes[at + 6]!]! ^
      t0[bytes[at + 7]!]!;
  }
  for (; at < bytes.length; at++) crc = t0[(crc ^ bytes[at]!) & 0xff]! ^ (crc >>> 8);
  return crc >>> 0;
}

/** Ordinary CRC-32C of `bytes`, continuing from `seed` (the CRC of what came before). */
export function crc32c(bytes: Uint8Array, seed = 0): number {
  return ~crc32cRaw(bytes, ~seed >>> 0) >>> 0;
}
