import { MetadataError } from '../base/errors.js';

/** Bytes of a sector: the unit of every offset and size in the metadata. */
export const SECTOR_BYTES = 512;
/** Sectors of a metadata block (4 KiB): superblock, activity log transaction, bitmap page. */
export const BLOCK_SECTORS = 8;
/** Bytes of a metadata block. */
export const BLOCK_BYTES = 4096;
/** Data sectors whose bits fill one sector of bitmap: 512 bytes x 8 bits x 8 sectors. */
export const DATA_SECTORS_PER_BITMAP_SECTOR = 32768;
/** Sectors reserved for one slot of an indexed metadata device (128 MiB). */
export const INDEXED_SLOT_SECTORS = 262144;
/** Data sectors an indexed slot can describe: what its bitmap area (128 MiB less 36 KiB) has bits for. */
export const INDEXED_CAPACITY_SECTORS = 8587575296;
/** Smallest device for internal metadata, drbdmeta's limit (68 KiB). */
const MIN_INTERNAL_SECTORS = 136;
/** Smallest flexible metadata device an attach accepts (1 MiB). */
const MIN_FLEXIBLE_SECTORS = 2048;
/** Data sectors no layout may exceed (DRBD_MAX_SECTORS_FLEX). */
const MAX_CAPACITY_SECTORS = 2 ** 51;
const MIN_AL_BLOCKS = 8;
const MAX_AL_BLOCKS = 4194304;
/** Highest slot drbdmeta and the kernel agree on; a wider one would overflow the sector arithmetic of neither. */
const MAX_INDEX = 0x7fff_ffff;

/**
 * Where metadata lives: at the end of the data itself, on a device of its own, or in slot `index` of a shared device.
 */
export type MetaDiskKind = 'internal' | 'flexible' | 'indexed';

/** What a layout is computed from. Sizes in sectors of 512 bytes. */
export interface LayoutRequest {
  readonly kind: MetaDiskKind;
  /** Slot number; only for `indexed`. */
  readonly index?: number;
  /** Whole size of the data device. */
  readonly backingSizeSectors: number;
  /** Whole size of the metadata device; ignored for `internal`. */
  readonly metaSizeSectors: number;
  /** Activity log geometry; 1 x 8 blocks of 4 KiB unless told. */
  readonly alStripes?: number;
  readonly alStripeSize4k?: number;
}

/** Positions on the metadata device. `...Sector` is absolute, `...Offset` is signed and relative to the superblock. */
export interface MetadataLayout {
  readonly kind: MetaDiskKind;
  /** Slot number; -1 internal, -2 flexible external (the numbers DRBD uses). */
  readonly index: number;
  readonly superblockSector: number;
  readonly activityLogSector: number;
  readonly bitmapSector: number;
  readonly mdSizeSectors: number;
  readonly alOffset: number;
  readonly bmOffset: number;
  readonly alStripes: number;
  readonly alStripeSize4k: number;
  /** Blocks of 4 KiB in the activity log ring. */
  readonly alBlocks: number;
  /** Sectors the bitmap may occupy. */
  readonly bitmapAreaSectors: number;
  /** Data sectors that remain usable, or that this metadata can describe. */
  readonly capacitySectors: number;
}

/** Rounds up to whole blocks of 8 sectors. */
function alignToBlock(sectors: number): number {
  return Math.ceil(sectors / BLOCK_SECTORS) * BLOCK_SECTORS;
}

function isSize(value: number): boolean {
  return Number.isSafeInteger(value) && value >= 0;
}

/**
 * Checks an activity log geometry as stored or configured.
 *
 * @returns blocks of 4 KiB in the ring, or 0 if the geometry is invalid (product outside 8..4194304)
 */
export function activityLogBlocks(alStripes: number, alStripeSize4k: number): number {
  if (!isSize(alStripes) || !isSize(alStripeSize4k)) return 0;
  const blocks = alStripes * alStripeSize4k;
  return blocks >= MIN_AL_BLOCKS && blocks <= MAX_AL_BLOCKS ? blocks : 0;
}

/**
 * Computes where superblock, activity log and bitmap lie, and how much data fits.
 *
 * @throws MetadataError `DRBDTS_MD_TOO_SMALL`, `DRBDTS_MD_TOO_LARGE`, `DRBDTS_MD_BAD_INDEX`, `DRBDTS_MD_BAD_STRIPES`,
 *   `DRBDTS_MD_BAD_SIZE`
 * @see DRBD 8.4 drbd_int.h "Meta data layout"; drbdmeta.c re_initialize_md_offsets
 */
export function computeLayout(request: LayoutRequest): MetadataLayout {
  const alStripes = request.alStripes ?? 1;
  const alStripeSize4k = request.alStripeSize4k ?? 8;
  const backing = request.backingSizeSectors;
  const alBlocks = activityLogBlocks(alStripes, alStripeSize4k);
  if (alBlocks === 0)
    throw new MetadataError(
      'DRBDTS_MD_BAD_STRIPES',
      `an activity log of ${alStripes} stripes of ${alStripeSize4k} x 4 KiB: expected 32 KiB to 16 GiB in all`,
    );
  if (!isSize(backing) || (request.kind !== 'internal' && !isSize(request.metaSizeSectors)))
    throw new MetadataError('DRBDTS_MD_BAD_SIZE', 'a device size must be a whole number of sectors');
  const alSectors = alBlocks * BLOCK_SECTORS;
  if (request.kind === 'internal') return internalLayout(backing, alStripes, alStripeSize4k, alBlocks);

  const metaSize = request.metaSizeSectors;
  let index = -2;
  let superblockSector = 0;
  let mdSizeSectors: number;
  let limit: number;
  if (request.kind === 'indexed') {
    index = request.index ?? -1;
    if (!isSize(index) || index > MAX_INDEX)
      throw new MetadataError('DRBDTS_MD_BAD_INDEX', `'${index}' is not a valid index number.`);
    if (alStripes !== 1 || alStripeSize4k !== 8)
      throw new MetadataError(
        'DRBDTS_MD_BAD_STRIPES',
        'an indexed metadata slot has room for one activity log stripe of 32 KiB only; use flexible metadata',
      );
    superblockSector = INDEXED_SLOT_SECTORS * index;
    mdSizeSectors = INDEXED_SLOT_SECTORS;
    limit = INDEXED_CAPACITY_SECTORS;
    if (metaSize < superblockSector + mdSizeSectors)
      throw new MetadataError(
        'DRBDTS_MD_TOO_SMALL',
        `slot ${index} ends at byte ${(superblockSector + mdSizeSectors) * SECTOR_BYTES}, ` +
          `but the metadata device has only ${metaSize * SECTOR_BYTES} bytes`,
      );
  } else {
    mdSizeSectors = metaSize - (metaSize % BLOCK_SECTORS);
    const needed = Math.max(MIN_FLEXIBLE_SECTORS, 2 * BLOCK_SECTORS + alSectors);
    if (metaSize < needed)
      throw new MetadataError(
        'DRBDTS_MD_TOO_SMALL',
        `flexible metadata needs at least ${needed * SECTOR_BYTES} bytes, ` +
          `but the metadata device has only ${metaSize * SECTOR_BYTES} bytes`,
      );
    // The superblock stores the size in 32 bits. What lies beyond 2 TiB of metadata is simply not used.
    mdSizeSectors = Math.min(mdSizeSectors, 0xffff_fff8);
    limit = MAX_CAPACITY_SECTORS;
  }
  const bmOffset = BLOCK_SECTORS + alSectors;
  const bitmapAreaSectors = mdSizeSectors - bmOffset;
  return {
    kind: request.kind,
    index,
    superblockSector,
    activityLogSector: superblockSector + BLOCK_SECTORS,
    bitmapSector: superblockSector + bmOffset,
    mdSizeSectors,
    alOffset: BLOCK_SECTORS,
    bmOffset,
    alStripes,
    alStripeSize4k,
    alBlocks,
    bitmapAreaSectors,
    capacitySectors: Math.min(backing, limit, bitmapAreaSectors * DATA_SECTORS_PER_BITMAP_SECTOR),
  };
}

function internalLayout(backing: number, alStripes: number, alStripeSize4k: number, alBlocks: number): MetadataLayout {
  const alSectors = alBlocks * BLOCK_SECTORS;
  // From the whole device, not from what remains usable: so does DRBD, and the position must agree to the byte.
  const bitmapAreaSectors = alignToBlock(Math.ceil(backing / DATA_SECTORS_PER_BITMAP_SECTOR));
  const mdSizeSectors = bitmapAreaSectors + BLOCK_SECTORS + alSectors;
  const superblockSector = backing - (backing % BLOCK_SECTORS) - BLOCK_SECTORS;
  const bmOffset = -mdSizeSectors + BLOCK_SECTORS;
  if (backing < MIN_INTERNAL_SECTORS || superblockSector + bmOffset <= 0)
    throw new MetadataError(
      'DRBDTS_MD_TOO_SMALL',
      `${backing * SECTOR_BYTES} bytes are not enough for internal metadata of ${mdSizeSectors * SECTOR_BYTES} bytes ` +
        'and data',
    );
  if (mdSizeSectors > 0x7fff_ffff)
    throw new MetadataError('DRBDTS_MD_TOO_LARGE', 'the device is larger than internal metadata can describe');
  return {
    kind: 'internal',
    index: -1,
    superblockSector,
    activityLogSector: superblockSector - alSectors,
    bitmapSector: superblockSector + bmOffset,
    mdSizeSectors,
    alOffset: -alSectors,
    bmOffset,
    alStripes,
    alStripeSize4k,
    alBlocks,
    bitmapAreaSectors,
    capacitySectors: Math.min(superblockSector + bmOffset, MAX_CAPACITY_SECTORS),
  };
}

/** Bytes of bitmap for a device of `sizeSectors`: one bit per 4 KiB, in whole 64-bit words. */
export function bitmapBytes(sizeSectors: number): number {
  return Math.ceil(Math.ceil(sizeSectors / 8) / 64) * 8;
}
