import { MetadataError, OperatorError } from '../base/errors.js';
import { findForeignData, SIGNATURE_BYTES } from '../metadata/foreign-signature.js';
import {
  activityLogBlocks,
  BLOCK_BYTES,
  BLOCK_SECTORS,
  bitmapBytes,
  type MetadataLayout,
  SECTOR_BYTES,
} from '../metadata/layout.js';
import { encodeSuperblock, newSuperblock, type Superblock, UUID_JUST_CREATED } from '../metadata/superblock.js';
import type { CliCommand, Environment } from './command.js';
import { resolveFromConfig } from './metadata-config.js';
import {
  addTargetOptions,
  askOnStdin,
  EXIT_CANNOT_RUN,
  EXIT_DECLINED,
  EXIT_REFUSED,
  EXIT_TOO_SMALL,
  forEachTarget,
  isMissingMetadata,
  type MetadataContext,
  type MetadataStore,
  type MetadataTarget,
  type TargetOptions,
  targetsFrom,
  withStore,
} from './metadata-target.js';

export interface CreateOptions {
  /** With --force: do not look for foreign data at all. */
  readonly ignoreSanityChecks?: boolean;
  readonly force?: boolean;
  /** Succeed quietly if our metadata is there and was never used. */
  readonly ifNeeded?: boolean;
  readonly alStripes?: number;
  readonly alStripeSizeKib?: number;
  readonly peerMaxBioSizeBytes?: number;
  readonly json?: boolean;
}

const ZERO_CHUNK_BYTES = 1 << 20;
const STYLES = {
  internal: 'flexible-size internal',
  indexed: 'fixed-size external',
  flexible: 'flexible-size external',
} as const;

/**
 * Creates metadata on one target, in drbdmeta's words and with its exit codes (0, 1 declined, 10 too small, 20 cannot
 * open or in use, 40 would destroy data). Nothing is written before every question is answered.
 *
 * @see drbd-utils drbdmeta.c meta_create_md
 */
export function createMetadata(target: MetadataTarget, options: CreateOptions, context: MetadataContext): number {
  return withStore(target, true, (store) => {
    const layout = layoutFor(store, options);
    const existing = existingMetadata(store);
    if (existing) {
      const { superblock, problem } = existing;
      if (options.ifNeeded && superblock?.currentUuid === UUID_JUST_CREATED && superblock.laSizeSectors === 0) {
        context.out(`${target.metaDisk.path}: already initialised\n`);
        return 0;
      }
      const style = STYLES[layout.kind];
      context.err(
        `You want me to create a v08 style ${style} meta data block.\n` +
          `There appears to be a ${problem === undefined ? `v08 ${style}` : 'different'} meta data block\n` +
          `already in place on ${target.metaDisk.path} at byte offset ${layout.superblockSector * SECTOR_BYTES}\n` +
          `${problem === undefined ? '' : `(${problem})\n`}`,
      );
      const version = problem === undefined ? 'v08 ' : '';
      if (!context.confirm(`Do you really want to overwrite the existing ${version}meta-data?\n`)) {
        context.out('Operation cancelled.\n');
        return EXIT_DECLINED;
      }
    } else {
      const refused = checkForeignData(store, layout, options, context);
      if (refused !== 0) return refused;
    }
    writeFreshMetadata(store, layout, options, context);
    return 0;
  });
}

function layoutFor(store: MetadataStore, options: CreateOptions): MetadataLayout {
  const stripes = options.alStripes ?? 1;
  const stripeSize4k = (options.alStripeSizeKib ?? 32) / 4;
  if (activityLogBlocks(stripes, stripeSize4k) === 0)
    throw new OperatorError('invalid (too small) al-stripe* settings', EXIT_TOO_SMALL, 'usage');
  try {
    return store.layout(stripes, stripeSize4k);
  } catch (error) {
    if (!(error instanceof MetadataError)) throw error;
    const { path, kind, index } = store.target.metaDisk;
    const sizeBytes = store.file.sizeSectors * SECTOR_BYTES;
    if (error.code !== 'DRBDTS_MD_TOO_SMALL')
      throw new OperatorError(error.message, error.code === 'DRBDTS_MD_BAD_INDEX' ? EXIT_CANNOT_RUN : EXIT_TOO_SMALL);
    throw new OperatorError(
      kind === 'indexed'
        ? `Device too small: expecting meta data block at\nbyte offset ${index * 2 ** 27}, ` +
            `but ${path} is only ${sizeBytes} bytes.`
        : `${path} is only ${sizeBytes} bytes. That's not enough. (${error.message})`,
      EXIT_TOO_SMALL,
      'too-small',
    );
  }
}

/** What DRBD left there: a superblock of ours, or one that somebody else may still need, with what is wrong with it. */
function existingMetadata(
  store: MetadataStore,
): { readonly superblock?: Superblock; readonly problem?: string } | undefined {
  try {
    return { superblock: store.readSuperblock().superblock };
  } catch (error) {
    if (!isMissingMetadata(error)) throw error;
    return error.code === 'DRBDTS_MD_NOT_FOUND' ? undefined : { problem: error.message };
  }
}

/** @returns 0 to go on, or the exit code */
function checkForeignData(
  store: MetadataStore,
  layout: MetadataLayout,
  options: CreateOptions,
  context: MetadataContext,
): number {
  // An indexed slot is looked at where it begins: what stands at the start of the device belongs to slot 0.
  const start = layout.kind === 'internal' ? 0 : layout.superblockSector * SECTOR_BYTES;
  const length = Math.min(SIGNATURE_BYTES, store.file.sizeSectors * SECTOR_BYTES - start);
  const found = findForeignData(store.file.read(start, length));
  if (!found) return 0;
  const base = layout.superblockSector;
  context.out(
    `md_offset ${base * SECTOR_BYTES}\n` +
      `al_offset ${layout.activityLogSector * SECTOR_BYTES}\n` +
      `bm_offset ${layout.bitmapSector * SECTOR_BYTES}\n\n` +
      `Found ${found.name}\n`,
  );
  const { path } = store.target.metaDisk;
  const isIgnored = options.force && options.ignoreSanityChecks;
  if (layout.kind !== 'internal' && found.name !== 'some data') {
    context.out('\nThis would corrupt existing data.\n');
    if (isIgnored) {
      context.out('\nIgnoring sanity check on user request.\n\n');
      return 0;
    }
    context.out(
      'If you want me to do this, you need to zero out the first part\n' +
        'of the device (destroy the content).\n' +
        'You should be very sure that you mean it.\n' +
        'Operation refused.\n\n' +
        `To destroy what is there:\n   wipefs -a ${path}\n   dd if=/dev/zero of=${path} bs=1M count=1` +
        `${start === 0 ? '' : ` seek=${start / 2 ** 20}`}\n`,
    );
    return EXIT_REFUSED;
  }
  if (found.usedKib === undefined) {
    context.out('\n ==> This might destroy existing data! <==\n');
    return confirmGuess(context);
  }
  const leftKib = Math.floor(layout.capacitySectors / 2);
  context.out(
    `${String(found.usedKib).padStart(12)} kB data area apparently used\n` +
      `${String(leftKib).padStart(12)} kB left usable by current configuration\n\n`,
  );
  if (found.usedKib <= leftKib) {
    context.out(
      'Even though it looks like this would place the new meta data into\n' +
        'unused space, you still need to confirm, as this is only a guess.\n',
    );
    return confirmGuess(context);
  }
  context.out(
    'Device size would be truncated, which\n' +
      'would corrupt data and result in\n' +
      "'access beyond end of device' errors.\n",
  );
  if (isIgnored) {
    context.out('\nIgnoring sanity check on user request.\n\n');
    return 0;
  }
  context.out(
    'You need to either\n' +
      '   * use external meta data (recommended)\n' +
      '   * shrink that filesystem first\n' +
      '   * zero out the device (destroy the filesystem)\n' +
      'Operation refused.\n\n' +
      'That is, one of\n' +
      '   meta-disk /dev/OTHER;            in the resource, with a device of its own for the meta data\n' +
      `${shrinkHint(found.name, path, leftKib)}` +
      `   wipefs -a ${path}    and then zero its first MiB (destroys the filesystem)\n`,
  );
  return EXIT_REFUSED;
}

function shrinkHint(name: string, path: string, leftKib: number): string {
  return /^ext/.test(name) ? `   e2fsck -f ${path} && resize2fs ${path} ${leftKib}K\n` : '';
}

function confirmGuess(context: MetadataContext): number {
  if (context.confirm('\nDo you want to proceed?\n')) return 0;
  context.out('Operation canceled.\n');
  return EXIT_DECLINED;
}

function writeFreshMetadata(
  store: MetadataStore,
  layout: MetadataLayout,
  options: CreateOptions,
  context: MetadataContext,
): void {
  const { file } = store;
  const superblockBytes = layout.superblockSector * SECTOR_BYTES;
  const block = new Uint8Array(BLOCK_BYTES);
  // An old superblock over a cleared bitmap would claim that everything is in sync. It goes first, the new one comes
  // last.
  file.write(superblockBytes, block);
  file.flush();
  if (!options.json) context.out('initializing activity log\n');
  store.initializeActivityLog(layout);
  const bitmapArea = layout.bitmapAreaSectors * SECTOR_BYTES;
  const wanted = layout.kind === 'internal' ? bitmapArea : bitmapBytes(store.dataSizeSectors ?? 0);
  const zeroBytes = Math.min(bitmapArea, Math.max(1, Math.ceil(wanted / BLOCK_BYTES)) * BLOCK_BYTES);
  if (!options.json) context.err(`initializing bitmap (${zeroBytes / 1024} KB) to all zero\n`);
  const zeroes = new Uint8Array(Math.min(zeroBytes, ZERO_CHUNK_BYTES));
  for (let done = 0; done < zeroBytes; done += zeroes.byteLength)
    file.write(
      layout.bitmapSector * SECTOR_BYTES + done,
      zeroes.subarray(0, Math.min(zeroes.byteLength, zeroBytes - done)),
    );
  file.flush();
  if (!options.json) context.out('Writing meta data...\n');
  encodeSuperblock(newSuperblock(layout, options.peerMaxBioSizeBytes ?? 0), block);
  file.write(superblockBytes, block);
  file.flush();
  if (options.json)
    context.out(
      `${JSON.stringify({
        metaDisk: store.target.metaDisk.path,
        created: true,
        superblockOffsetBytes: superblockBytes,
        activityLogOffsetBytes: layout.activityLogSector * SECTOR_BYTES,
        bitmapOffsetBytes: layout.bitmapSector * SECTOR_BYTES,
        mdSizeSectors: layout.mdSizeSectors,
        capacitySectors: layout.capacitySectors - (layout.capacitySectors % BLOCK_SECTORS),
      })}\n`,
    );
  else context.out('New drbd meta data block successfully created.\n');
}

function wholeNumber(text: string, what: string): number {
  if (!/^\d{1,9}$/.test(text)) throw new OperatorError(`${what}: '${text}' is not a number`, 1, 'usage');
  return Number(text);
}

interface CreateFlags extends TargetOptions {
  readonly force?: boolean;
  readonly yes?: boolean;
  readonly ifNeeded?: boolean;
  readonly ignoreSanityChecks?: boolean;
  readonly json?: boolean;
  readonly alStripes?: string;
  readonly alStripeSizeKB?: string;
  readonly peerMaxBioSize?: string;
}

export const createMdCommand: CliCommand = {
  register(program, environment: Environment, exit) {
    const command = addTargetOptions(program.command('create-md'))
      .description("write fresh metadata; the resource's first step on each head")
      .option('--force', 'answer yes to every question')
      .option('-y, --yes', 'the same')
      .option('--if-needed', 'succeed if unused metadata is there already')
      .option('--ignore-sanity-checks', 'with --force: even over a filesystem')
      .option('--al-stripes <n>', 'stripes of the activity log (1)')
      .option('--al-stripe-size-kB <n>', 'size of one stripe in KiB (32)')
      .option('--peer-max-bio-size <bytes>', "the peer's largest request, if known")
      .option('--json', 'print one JSON object per volume')
      .addHelpText(
        'after',
        '\nExamples:\n  drbdts create-md data\n' +
          '  drbdts create-md --disk /srv/r0.img --meta-disk internal\n' +
          '  drbdts create-md --disk /dev/sdb1 --meta-disk /dev/sdc1[0]\n\n' +
          'Exit codes: 0 done, 1 declined, 10 device too small, 20 cannot open or in use, 40 would destroy data.',
      );
    command.action((resource: string | undefined) => {
      const flags = command.optsWithGlobals<CreateFlags>();
      const force = flags.force === true || flags.yes === true;
      const options: CreateOptions = {
        force,
        ignoreSanityChecks: flags.ignoreSanityChecks ?? false,
        ifNeeded: flags.ifNeeded ?? false,
        json: flags.json ?? false,
        alStripes: wholeNumber(flags.alStripes ?? '1', '--al-stripes'),
        alStripeSizeKib: wholeNumber(flags.alStripeSizeKB ?? '32', '--al-stripe-size-kB'),
        peerMaxBioSizeBytes: wholeNumber(flags.peerMaxBioSize ?? '0', '--peer-max-bio-size'),
      };
      const context = {
        ...environment,
        // What a script parses stays free of questions.
        confirm: askOnStdin(flags.json ? { ...environment, out: environment.err } : environment, force),
      };
      const targets = targetsFrom(resource, flags, environment, resolveFromConfig);
      exit(forEachTarget(targets, (target) => createMetadata(target, options, context)));
    });
  },
};
