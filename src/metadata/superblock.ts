import { assert } from '../base/assert.js';
import { MetadataError } from '../base/errors.js';
import {
  activityLogBlocks,
  BLOCK_BYTES,
  BLOCK_SECTORS,
  bitmapBytes,
  type MetadataLayout,
  SECTOR_BYTES,
} from './layout.js';

/** Superblock flags (DRBD 8.4 enum mdf_flag). */
export const MDF_CONSISTENT = 0x001;
export const MDF_PRIMARY_IND = 0x002;
export const MDF_CONNECTED_IND = 0x004;
export const MDF_FULL_SYNC = 0x008;
export const MDF_WAS_UP_TO_DATE = 0x010;
export const MDF_PEER_OUT_DATED = 0x020;
export const MDF_CRASHED_PRIMARY = 0x040;
export const MDF_AL_CLEAN = 0x080;
export const MDF_AL_DISABLED = 0x100;

/** Written by create-md and apply-al; with MDF_AL_CLEAN the only state a kernel attaches. */
export const MAGIC_84_CLEAN = 0x8374026b;
/** Written by every running driver, also as the last one at an orderly shutdown. */
export const MAGIC_84_UNCLEAN = 0x8374026c;
const MAGIC_07 = 0x8374026a;
const MAGIC_09 = 0x8374026d;

/** Current generation of metadata that never described data. */
export const UUID_JUST_CREATED = 4n;
/** Activity log slots create-md records. */
const AL_EXTENTS_CREATED = 257;
const BYTES_PER_BIT = 4096;
/** Bytes of the superblock that carry fields; the rest of the block is zero. */
const USED_BYTES = 96;

/** A v08 superblock as a value. Identifiers are 64-bit, sizes and offsets are in sectors. */
export interface Superblock {
  /** Last agreed (exported) size; 0 until the first attach. */
  laSizeSectors: number;
  currentUuid: bigint;
  bitmapUuid: bigint;
  history0Uuid: bigint;
  history1Uuid: bigint;
  /** Opaque; preserve it. */
  deviceUuid: bigint;
  /** MDF_* bits. */
  flags: number;
  magic: number;
  mdSizeSectors: number;
  alOffset: number;
  /** Slots of the activity log (al-extents) in use when it was written. */
  alExtents: number;
  bmOffset: number;
  laPeerMaxBioSizeBytes: number;
  alStripes: number;
  alStripeSize4k: number;
}

/** Whether the activity log has been applied, so that bitmap and flags tell everything. */
export function isClean(superblock: Superblock): boolean {
  return superblock.magic === MAGIC_84_CLEAN && (superblock.flags & MDF_AL_CLEAN) !== 0;
}

/** The superblock create-md writes for `layout` (DRBD 8.4: UUID_JUST_CREATED, log clean). */
export function newSuperblock(layout: MetadataLayout, laPeerMaxBioSizeBytes = 0): Superblock {
  return {
    laSizeSectors: 0,
    currentUuid: UUID_JUST_CREATED,
    bitmapUuid: 0n,
    history0Uuid: 0n,
    history1Uuid: 0n,
    deviceUuid: 0n,
    flags: MDF_AL_CLEAN,
    magic: MAGIC_84_CLEAN,
    mdSizeSectors: layout.mdSizeSectors,
    alOffset: layout.alOffset,
    alExtents: AL_EXTENTS_CREATED,
    bmOffset: layout.bmOffset,
    laPeerMaxBioSizeBytes,
    alStripes: layout.alStripes,
    alStripeSize4k: layout.alStripeSize4k,
  };
}

/**
 * Decodes a v08 superblock.
 *
 * @param bytes exactly 4096 bytes; borrowed for the call, never kept
 * @throws MetadataError `DRBDTS_MD_NOT_FOUND` if there is no DRBD magic, `DRBDTS_MD_OTHER_VERSION` for v07 or v09,
 *   `DRBDTS_MD_BAD_STRIPES`, `DRBDTS_MD_BAD_BITMAP_UNIT`, `DRBDTS_MD_BAD_SIZE` for fields no tool writes
 * @see DRBD 8.4 drbd_main.c struct meta_data_on_disk, drbdmeta.c v08_md_disk_to_cpu
 */
export function decodeSuperblock(bytes: Uint8Array): Superblock {
  assert(bytes.byteLength === BLOCK_BYTES, 'a superblock is 4096 bytes');
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const magic = view.getUint32(60);
  if (magic === MAGIC_07 || magic === MAGIC_09)
    throw new MetadataError(
      'DRBDTS_MD_OTHER_VERSION',
      `this is DRBD metadata of version ${magic === MAGIC_09 ? 'v09' : 'v07'}, expected v08`,
    );
  if (magic !== MAGIC_84_CLEAN && magic !== MAGIC_84_UNCLEAN)
    throw new MetadataError('DRBDTS_MD_NOT_FOUND', 'No valid meta data found');
  let alStripes = view.getUint32(88);
  let alStripeSize4k = view.getUint32(92);
  if (alStripes === 0 && alStripeSize4k === 0) {
    // Written before stripes existed: the classic log of 8 blocks.
    alStripes = 1;
    alStripeSize4k = 8;
  }
  if (activityLogBlocks(alStripes, alStripeSize4k) === 0)
    throw new MetadataError(
      'DRBDTS_MD_BAD_STRIPES',
      `invalid al-stripes: ${alStripes}, al-stripe-size-4k: ${alStripeSize4k}`,
    );
  const bytesPerBit = view.getUint32(80);
  if (bytesPerBit !== BYTES_PER_BIT)
    throw new MetadataError('DRBDTS_MD_BAD_BITMAP_UNIT', `unexpected bm_bytes_per_bit: ${bytesPerBit} (expected 4096)`);
  const laSize = view.getBigUint64(0);
  if (laSize > BigInt(Number.MAX_SAFE_INTEGER) >> 9n)
    throw new MetadataError('DRBDTS_MD_BAD_SIZE', `la-size-sect ${laSize} is larger than any device`);
  return {
    laSizeSectors: Number(laSize),
    currentUuid: view.getBigUint64(8),
    bitmapUuid: view.getBigUint64(16),
    history0Uuid: view.getBigUint64(24),
    history1Uuid: view.getBigUint64(32),
    deviceUuid: view.getBigUint64(40),
    flags: view.getUint32(56),
    magic,
    mdSizeSectors: view.getUint32(64),
    alOffset: view.getInt32(68),
    alExtents: view.getUint32(72),
    bmOffset: view.getInt32(76),
    laPeerMaxBioSizeBytes: view.getUint32(84),
    alStripes,
    alStripeSize4k,
  };
}

/**
 * Encodes a superblock into a whole block; everything behind the last field becomes zero.
 *
 * @param into exactly 4096 bytes, overwritten; the caller keeps it
 */
export function encodeSuperblock(superblock: Superblock, into: Uint8Array): void {
  assert(into.byteLength === BLOCK_BYTES, 'a superblock is 4096 bytes');
  const view = new DataView(into.buffer, into.byteOffset, into.byteLength);
  into.fill(0, USED_BYTES);
  view.setBigUint64(0, BigInt(superblock.laSizeSectors));
  view.setBigUint64(8, superblock.currentUuid);
  view.setBigUint64(16, superblock.bitmapUuid);
  view.setBigUint64(24, superblock.history0Uuid);
  view.setBigUint64(32, superblock.history1Uuid);
  view.setBigUint64(40, superblock.deviceUuid);
  view.setBigUint64(48, 0n);
  view.setUint32(56, superblock.flags);
  view.setUint32(60, superblock.magic);
  view.setUint32(64, superblock.mdSizeSectors);
  view.setInt32(68, superblock.alOffset);
  view.setUint32(72, superblock.alExtents);
  view.setInt32(76, superblock.bmOffset);
  view.setUint32(80, BYTES_PER_BIT);
  view.setUint32(84, superblock.laPeerMaxBioSizeBytes);
  view.setUint32(88, superblock.alStripes);
  view.setUint32(92, superblock.alStripeSize4k);
}

/**
 * Checks that the stored offsets are those of the device the superblock was found on, and that the bitmap area has room
 * for the agreed size. `layout` must have been computed with the superblock's own stripes.
 *
 * @throws MetadataError `DRBDTS_MD_BAD_OFFSET`, `DRBDTS_MD_TOO_SMALL`
 * @see DRBD 8.4 drbdmeta.c is_valid_md, drbd_nl.c check_offsets_and_sizes
 */
export function checkSuperblockLayout(superblock: Superblock, layout: MetadataLayout): void {
  const expectExact = (name: string, actual: number, expected: number) => {
    if (actual !== expected)
      throw new MetadataError('DRBDTS_MD_BAD_OFFSET', `${name} is ${actual}, expected ${expected} on this device`);
  };
  expectExact('al-offset', superblock.alOffset, layout.alOffset);
  expectExact('bm-offset', superblock.bmOffset, layout.bmOffset);
  if (layout.kind !== 'flexible') expectExact('md_size_sect', superblock.mdSizeSectors, layout.mdSizeSectors);
  const area = layout.kind === 'flexible' ? superblock.mdSizeSectors - superblock.bmOffset : layout.bitmapAreaSectors;
  const needed = Math.ceil(bitmapBytes(superblock.laSizeSectors) / SECTOR_BYTES);
  if (needed > Math.min(area, Math.max(layout.bitmapAreaSectors, BLOCK_SECTORS)))
    throw new MetadataError(
      'DRBDTS_MD_TOO_SMALL',
      `la-size-sect ${superblock.laSizeSectors} needs ${needed} sectors of bitmap, there is room for ${area}`,
    );
}
