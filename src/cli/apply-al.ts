import { replayActivityLog } from '../metadata/activity-log.js';
import { formatSize } from '../metadata/dump.js';
import { BLOCK_BYTES, bitmapBytes, SECTOR_BYTES } from '../metadata/layout.js';
import { encodeSuperblock, isClean, MAGIC_84_CLEAN, MDF_AL_CLEAN, MDF_PRIMARY_IND } from '../metadata/superblock.js';
import type { CliCommand, Environment } from './command.js';
import { resolveFromConfig } from './metadata-config.js';
import {
  addTargetOptions,
  EXIT_NO_METADATA,
  forEachTarget,
  isMissingMetadata,
  type MetadataStore,
  type MetadataTarget,
  type TargetOptions,
  targetsFrom,
  withStore,
} from './metadata-target.js';

/** Bytes of bitmap of one 4 MiB activity log extent. */
const EXTENT_BITMAP_BYTES = 128;
/** KiB of data a bit stands for. */
const KIB_PER_BIT = 4;
/** drbdmeta's code for an activity log that is needed and cannot be read. */
const EXIT_NO_ACTIVITY_LOG = 1;

/**
 * Makes unclean metadata clean: what the activity log names as possibly in flight is marked out of sync if this node
 * was Primary, then the log is reinitialised. Bitmap, log and superblock are each on stable storage before the next is
 * touched, so a crash in between only means that it is done again.
 *
 * @returns 0, 255 if there is no metadata, 1 if the log is needed and unusable
 * @see DRBD drbdmeta.c apply_al
 */
export function applyActivityLog(target: MetadataTarget, environment: Environment): number {
  return withStore(target, true, (store) => {
    let found: ReturnType<typeof store.readSuperblock>;
    try {
      found = store.readSuperblock();
    } catch (error) {
      if (!isMissingMetadata(error)) throw error;
      environment.err('No valid meta data found\n');
      return EXIT_NO_METADATA;
    }
    const { superblock, layout } = found;
    if (isClean(superblock)) return 0;
    const area = store.file.read(layout.activityLogSector * SECTOR_BYTES, layout.alBlocks * BLOCK_BYTES);
    const replay = replayActivityLog(area, layout.alStripes, layout.alStripeSize4k);
    const wasPrimary = (superblock.flags & MDF_PRIMARY_IND) !== 0;
    if (replay.validBlocks > 0 && replay.corruptBlocks > 0)
      environment.err(`${replay.corruptBlocks} corrupt AL transactions found\n`);
    if (!replay.isUsable) {
      environment.err(
        replay.validBlocks === 0
          ? 'No usable activity log found. Do you need to create-md?\n'
          : 'No valid AL update transaction found.\n',
      );
      if (wasPrimary) return EXIT_NO_ACTIVITY_LOG;
      environment.err('Error ignored, no need to apply the AL\n');
    }
    if (wasPrimary && replay.transactionBlocks > 0) {
      const bits = markOnDisk(store, replay.hotExtents, layout.bitmapSector, bitmapBytes(superblock.laSizeSectors));
      environment.err(
        replay.hotExtents.length > 0
          ? `Marked additional ${formatSize(bits * KIB_PER_BIT)} as out-of-sync based on AL.\n`
          : 'Nothing to do.\n',
      );
      store.file.flush();
    }
    if (replay.transactionBlocks > 0 || !replay.isUsable) {
      store.initializeActivityLog(layout);
      store.file.flush();
    }
    superblock.flags |= MDF_AL_CLEAN;
    superblock.magic = MAGIC_84_CLEAN;
    const block = new Uint8Array(BLOCK_BYTES);
    encodeSuperblock(superblock, block);
    store.file.write(layout.superblockSector * SECTOR_BYTES, block);
    store.file.flush();
    return 0;
  });
}

/**
 * Sets the bits of `extents` (ascending) in the bitmap on disk, a 4 KiB page at a time. @returns bits that were clear
 */
function markOnDisk(store: MetadataStore, extents: Uint32Array, bitmapSector: number, lengthBytes: number): number {
  const start = bitmapSector * SECTOR_BYTES;
  let gained = 0;
  let page: Uint8Array | undefined;
  let pageNumber = -1;
  const writeBack = () => {
    if (page) store.file.write(start + pageNumber * BLOCK_BYTES, page);
  };
  for (const extent of extents) {
    const from = extent * EXTENT_BITMAP_BYTES;
    if (from >= lengthBytes) break;
    const wanted = Math.floor(from / BLOCK_BYTES);
    if (wanted !== pageNumber) {
      writeBack();
      pageNumber = wanted;
      page = store.file.read(start + pageNumber * BLOCK_BYTES, BLOCK_BYTES);
    }
    const at = from % BLOCK_BYTES;
    for (let index = at; index < at + EXTENT_BITMAP_BYTES; index++) {
      for (let clear = ~page![index]! & 0xff; clear !== 0; clear &= clear - 1) gained++;
      page![index] = 0xff;
    }
  }
  writeBack();
  return gained;
}

export const applyAlCommand: CliCommand = {
  register(program, environment, exit) {
    const command = addTargetOptions(program.command('apply-al'))
      .description(
        'after a crash: mark what the activity log names as out of sync; done by itself when a disk is attached',
      )
      .addHelpText(
        'after',
        '\nExamples:\n  drbdts apply-al data\n  drbdts apply-al --disk /srv/r0.img\n\n' +
          'Exit codes: 0 done or nothing to do, 1 unusable activity log, 20 cannot open or in use, 255 no metadata.',
      );
    command.action((resource: string | undefined) => {
      const flags = command.optsWithGlobals<TargetOptions>();
      const targets = targetsFrom(resource, flags, environment, resolveFromConfig);
      exit(forEachTarget(targets, (target) => applyActivityLog(target, environment)));
    });
  },
};
