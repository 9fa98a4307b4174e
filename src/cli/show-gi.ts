import { formatGenerationIdentifiers, formatGenerationPicture } from '../metadata/dump.js';
import type { Superblock } from '../metadata/superblock.js';
import type { CliCommand, Environment } from './command.js';
import { resolveFromConfig } from './metadata-config.js';
import {
  addTargetOptions,
  EXIT_NO_METADATA,
  forEachTarget,
  isMissingMetadata,
  type MetadataTarget,
  type TargetOptions,
  targetsFrom,
  withStore,
} from './metadata-target.js';

/**
 * Prints the stored generation identifiers of one target. While an engine has it attached the copy on disk is shown and
 * stderr says so.
 *
 * @returns 0, or 255 if there is no metadata
 */
export function showIdentifiers(
  target: MetadataTarget,
  format: (superblock: Superblock) => string,
  environment: Environment,
): number {
  return withStore(target, false, (store) => {
    let superblock: Superblock;
    try {
      superblock = store.readSuperblock().superblock;
    } catch (error) {
      if (!isMissingMetadata(error)) throw error;
      environment.err(`${target.metaDisk.path}: ${error.message}\n`);
      return EXIT_NO_METADATA;
    }
    if (store.heldBy) environment.err(`# Output might be stale, since it is attached by ${store.heldBy}\n`);
    const text = format(superblock);
    environment.out(text.endsWith('\n') ? text : `${text}\n`);
    return 0;
  });
}

function identifierCommand(name: string, description: string, format: (superblock: Superblock) => string): CliCommand {
  return {
    register(program, environment, exit) {
      const command = addTargetOptions(program.command(name))
        .description(description)
        .addHelpText(
          'after',
          `\nExamples:\n  drbdts ${name} data\n  drbdts ${name} --disk /srv/r0.img\n\n` +
            'Exit codes: 0 done, 20 cannot open, 255 no metadata.',
        );
      command.action((resource: string | undefined) => {
        const flags = command.optsWithGlobals<TargetOptions>();
        const targets = targetsFrom(resource, flags, environment, resolveFromConfig);
        exit(forEachTarget(targets, (target) => showIdentifiers(target, format, environment)));
      });
    },
  };
}

export const showGiCommand = identifierCommand(
  'show-gi',
  'explain the stored generation identifiers and flags',
  formatGenerationPicture,
);
export const getGiCommand = identifierCommand(
  'get-gi',
  'print the stored generation identifiers and flags on one line',
  formatGenerationIdentifiers,
);
