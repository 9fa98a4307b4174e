import { BLOCK_BYTES, SECTOR_BYTES } from '../metadata/layout.js';
import type { CliCommand } from './command.js';
import { resolveFromConfig } from './metadata-config.js';
import {
  addTargetOptions,
  askOnStdin,
  EXIT_DECLINED,
  forEachTarget,
  isMissingMetadata,
  type MetadataContext,
  type MetadataTarget,
  type TargetOptions,
  targetsFrom,
  withStore,
} from './metadata-target.js';

/**
 * Removes the superblock of one target, so that nothing takes it for DRBD's any more. Data is not touched.
 *
 * @returns 0 (also if nothing is there), 1 if declined
 * @see DRBD drbdmeta.c meta_wipe_md
 */
export function wipeMetadata(target: MetadataTarget, context: MetadataContext): number {
  return withStore(target, true, (store) => {
    let superblockSector: number;
    try {
      superblockSector = store.readSuperblock().layout.superblockSector;
    } catch (error) {
      if (!isMissingMetadata(error)) throw error;
      context.out('There appears to be no drbd meta data to wipe out?\n');
      return 0;
    }
    if (!context.confirm('Do you really want to wipe out the DRBD meta data?\n')) {
      context.out('Operation cancelled.\n');
      return EXIT_DECLINED;
    }
    context.out('Wiping meta data...\n');
    store.file.write(superblockSector * SECTOR_BYTES, new Uint8Array(BLOCK_BYTES));
    store.file.flush();
    context.out('DRBD meta data block successfully wiped out.\n');
    return 0;
  });
}

export const wipeMdCommand: CliCommand = {
  register(program, environment, exit) {
    const command = addTargetOptions(program.command('wipe-md'))
      .description('remove the metadata; the data stays')
      .option('--force', 'do not ask')
      .option('-y, --yes', 'the same')
      .addHelpText(
        'after',
        '\nExamples:\n  drbdts wipe-md data\n  drbdts wipe-md --yes --disk /srv/r0.img\n\n' +
          'Exit codes: 0 done or nothing there, 1 declined, 20 cannot open or in use.',
      );
    command.action((resource: string | undefined) => {
      const flags = command.optsWithGlobals<TargetOptions & { force?: boolean; yes?: boolean }>();
      const context = {
        ...environment,
        confirm: askOnStdin(environment, flags.force === true || flags.yes === true),
      };
      const targets = targetsFrom(resource, flags, environment, resolveFromConfig);
      exit(forEachTarget(targets, (target) => wipeMetadata(target, context)));
    });
  },
};
