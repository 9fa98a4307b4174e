import { hostname } from 'node:os';
import { dumpedBitmapBytes, writeDump } from '../metadata/dump.js';
import { SECTOR_BYTES } from '../metadata/layout.js';
import { isClean } from '../metadata/superblock.js';
import type { CliCommand, Environment } from './command.js';
import { resolveFromConfig } from './metadata-config.js';
import {
  addTargetOptions,
  EXIT_NO_METADATA,
  forEachTarget,
  indexWord,
  isMissingMetadata,
  type MetadataTarget,
  type TargetOptions,
  targetsFrom,
  withStore,
} from './metadata-target.js';

export interface DumpMetadataOptions {
  /** Dump unclean metadata too. */
  readonly force?: boolean;
  readonly json?: boolean;
  /** For the header; the clock is injected so that a test sees the same text twice. */
  readonly now: Date;
  readonly hostName: string;
}

const READ_CHUNK_BYTES = 1 << 24;

/** `2026-11-22 14:39:14 +0000 [1795358354]`, in UTC. */
function formatTime(now: Date): string {
  const [day, time] = now.toISOString().split('T');
  return `${day} ${time!.slice(0, 8)} +0000 [${Math.floor(now.getTime() / 1000)}]`;
}

/** Prints one target's metadata. @returns 0, or 255 if there is none or it is unclean and `force` is not given */
export function dumpMetadata(target: MetadataTarget, options: DumpMetadataOptions, environment: Environment): number {
  return withStore(target, false, (store) => {
    let found: ReturnType<typeof store.readSuperblock>;
    try {
      found = store.readSuperblock();
    } catch (error) {
      if (!isMissingMetadata(error)) throw error;
      environment.err('No valid meta data found\n');
      if (error.code !== 'DRBDTS_MD_NOT_FOUND') environment.err(`${error.message}\n`);
      return EXIT_NO_METADATA;
    }
    const { superblock, layout } = found;
    if (!isClean(superblock)) {
      environment.err('Found meta data is "unclean", please apply-al first\n');
      if (!options.force) {
        if (store.heldBy) environment.err(`It is attached by ${store.heldBy}; --force shows the copy on disk.\n`);
        return EXIT_NO_METADATA;
      }
    }
    const bitmap = new Uint8Array(
      Math.min(dumpedBitmapBytes(superblock.laSizeSectors), layout.bitmapAreaSectors * SECTOR_BYTES),
    );
    for (let at = 0; at < bitmap.byteLength; at += READ_CHUNK_BYTES)
      bitmap.set(
        store.file.read(layout.bitmapSector * SECTOR_BYTES + at, Math.min(READ_CHUNK_BYTES, bitmap.byteLength - at)),
        at,
      );
    if (options.json) {
      const text = JSON.stringify(
        { minor: target.minor, ...superblock, clean: isClean(superblock), attached: store.heldBy !== undefined },
        (_key, value) =>
          typeof value === 'bigint' ? `0x${value.toString(16).toUpperCase().padStart(16, '0')}` : value,
      );
      environment.out(`${text}\n`);
      return 0;
    }
    if (store.heldBy) environment.out(`# Output might be stale, since minor ${target.minor} is attached\n`);
    writeDump(
      {
        superblock,
        layout,
        bitmap,
        comments: [
          formatTime(options.now),
          `${options.hostName}> drbdmeta ${target.minor} v08 ${target.metaDisk.path} ${indexWord(layout)} dump-md`,
        ],
      },
      environment.out,
    );
    return 0;
  });
}

export const dumpMdCommand: CliCommand = {
  register(program, environment, exit) {
    const command = addTargetOptions(program.command('dump-md'))
      .description('print the metadata as text, bitmap included; restorable with drbdmeta restore-md')
      .option('--force', 'also when it is unclean (needs apply-al)')
      .option('--json', 'print the superblock as one JSON object per volume')
      .addHelpText(
        'after',
        '\nExamples:\n  drbdts dump-md data > data.md\n  drbdts dump-md --disk /srv/r0.img\n\n' +
          'Exit codes: 0 done, 20 cannot open, 255 no metadata, or unclean without --force.',
      );
    command.action((resource: string | undefined) => {
      const flags = command.optsWithGlobals<TargetOptions & { readonly force?: boolean; readonly json?: boolean }>();
      const options: DumpMetadataOptions = {
        force: flags.force ?? false,
        json: flags.json ?? false,
        now: new Date(),
        hostName: hostname(),
      };
      const targets = targetsFrom(resource, flags, environment, resolveFromConfig);
      exit(forEachTarget(targets, (target) => dumpMetadata(target, options, environment)));
    });
  },
};
