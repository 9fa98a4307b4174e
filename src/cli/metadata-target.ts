import { readSync } from 'node:fs';
import type { Command } from 'commander';
import { MetadataError, OperatorError } from '../base/errors.js';
import { type LockKind, MetadataFile } from '../io/metadata-file.js';
import { encodeInitializedBlock } from '../metadata/activity-log.js';
import {
  BLOCK_BYTES,
  computeLayout,
  type MetaDiskKind,
  type MetadataLayout,
  SECTOR_BYTES,
} from '../metadata/layout.js';
import { checkSuperblockLayout, decodeSuperblock, type Superblock } from '../metadata/superblock.js';
import type { Environment } from './command.js';

/** Exit codes of drbdmeta. */
export const EXIT_DECLINED = 1;
export const EXIT_TOO_SMALL = 10;
export const EXIT_CANNOT_RUN = 20;
export const EXIT_REFUSED = 40;
export const EXIT_NO_METADATA = 255;

/** One volume's metadata: where it is. */
export interface MetadataTarget {
  readonly minor: number;
  /** Backing disk. */
  readonly disk: string;
  readonly metaDisk: { readonly kind: MetaDiskKind; readonly path: string; readonly index: number };
}

/** Answers a question; only the word `yes` counts. */
export type Confirm = (question: string) => boolean;

/** What the metadata commands share: streams and the way to ask. */
export interface MetadataContext extends Environment {
  readonly confirm: Confirm;
}

export interface TargetOptions {
  /** Configuration to read instead of the usual ones. */
  readonly configFile?: string;
  readonly disk?: string;
  readonly metaDisk?: string;
}

/** Resolves a resource name to its volumes' metadata, in volume order. */
export type ResolveTargets = (
  resource: string,
  environment: Environment,
  configFile: string | undefined,
) => readonly MetadataTarget[];

const ACTIVITY_LOG_CHUNK_BLOCKS = 256;

/** The backing disk an external layout is computed for when it does not matter how much data there is. */
const UNLIMITED_SECTORS = 2 ** 51;

/**
 * Parses `--meta-disk`: `internal`, `PATH` or `PATH[external]` (flexible), `PATH[INDEX]`.
 * @throws OperatorError exit code 20 with drbdmeta's words for a bad index
 */
export function parseTarget(disk: string, metaDisk: string, minor = 0): MetadataTarget {
  if (metaDisk === 'internal') return { minor, disk, metaDisk: { kind: 'internal', path: disk, index: -1 } };
  const match = /^(.+?)(?:\[([^\]]*)\])?$/s.exec(metaDisk);
  const path = match?.[1] ?? metaDisk;
  const index = match?.[2];
  if (index === undefined || index === 'external' || index === 'flex-external')
    return { minor, disk, metaDisk: { kind: 'flexible', path, index: -2 } };
  if (!/^\d{1,9}$/.test(index)) throw new OperatorError(`'${index}' is not a valid index number.`, EXIT_CANNOT_RUN);
  return { minor, disk, metaDisk: { kind: 'indexed', path, index: Number(index) } };
}

/** The targets a command line names: by resource, or by `--disk` and `--meta-disk`. */
export function targetsFrom(
  resource: string | undefined,
  options: TargetOptions,
  environment: Environment,
  resolve: ResolveTargets,
): readonly MetadataTarget[] {
  if (options.disk !== undefined || options.metaDisk !== undefined) {
    if (resource !== undefined)
      throw new OperatorError('give either a resource or --disk and --meta-disk, not both', 1, 'usage');
    const metaDisk = options.metaDisk ?? 'internal';
    if (options.disk === undefined && metaDisk === 'internal')
      throw new OperatorError('--meta-disk internal needs --disk PATH', 1, 'usage');
    return [parseTarget(options.disk ?? '', metaDisk)];
  }
  if (resource === undefined)
    throw new OperatorError('name a resource, or give --disk PATH [--meta-disk internal|PATH|PATH[INDEX]]', 1, 'usage');
  return resolve(resource, environment, options.configFile);
}

/** Declares what all metadata commands take. */
export function addTargetOptions(command: Command): Command {
  return command
    .argument('[resource]', 'a resource of the configuration, or all')
    .option('-c, --config-file <file>', 'configuration to read instead of /etc/drbd.conf')
    .option('--disk <path>', 'the backing disk, instead of a resource')
    .option('--meta-disk <where>', 'internal (default), PATH (flexible) or PATH[INDEX], with --disk');
}

/** An opened metadata device, and the data disk when it is another one. */
export class MetadataStore {
  private constructor(
    readonly target: MetadataTarget,
    readonly file: MetadataFile,
    private readonly dataFile: MetadataFile | undefined,
  ) {}

  /**
   * Opens and locks both devices, so that no engine can start on them meanwhile. For reading, a running engine does not
   * matter (`heldBy`), nor does a broken data disk: its metadata may tell why.
   */
  static open(target: MetadataTarget, writable: boolean): MetadataStore {
    const { kind, path } = target.metaDisk;
    // Slots of other resources share an indexed device; there the data disk's lock keeps engines out.
    const lock: LockKind = writable && kind !== 'indexed' ? 'exclusive' : 'shared';
    const file = MetadataFile.open(path, { writable, lock });
    if (kind === 'internal' || target.disk === '') return new MetadataStore(target, file, undefined);
    if (!writable) return new MetadataStore(target, file, openIfPossible(target.disk));
    try {
      return new MetadataStore(target, file, MetadataFile.open(target.disk, { writable: true, lock: 'exclusive' }));
    } catch (error) {
      file.close();
      throw error;
    }
  }

  /** The process that has the device attached, while it is only read. */
  get heldBy(): string | undefined {
    return this.file.heldBy ?? this.dataFile?.heldBy;
  }

  /** Size of the data disk in sectors, or undefined if it is not open. */
  get dataSizeSectors(): number | undefined {
    return this.target.metaDisk.kind === 'internal' ? this.file.sizeSectors : this.dataFile?.sizeSectors;
  }

  /** @throws MetadataError as `computeLayout` */
  layout(alStripes = 1, alStripeSize4k = 8): MetadataLayout {
    return computeLayout({
      kind: this.target.metaDisk.kind,
      index: this.target.metaDisk.index,
      backingSizeSectors: this.dataSizeSectors ?? UNLIMITED_SECTORS,
      metaSizeSectors: this.file.sizeSectors,
      alStripes,
      alStripeSize4k,
    });
  }

  /**
   * Reads the superblock and checks it against the device.
   * @throws MetadataError if there is none, or one that does not belong here
   */
  readSuperblock(): { superblock: Superblock; layout: MetadataLayout } {
    // Where the superblock stands depends on no other property of the activity log.
    const { superblockSector } = this.layout();
    const superblock = decodeSuperblock(this.file.read(superblockSector * SECTOR_BYTES, BLOCK_BYTES));
    const layout = this.layout(superblock.alStripes, superblock.alStripeSize4k);
    checkSuperblockLayout(superblock, layout);
    return { superblock, layout };
  }

  /** Writes every block of the activity log as freshly initialised. Not flushed. */
  initializeActivityLog(layout: MetadataLayout): void {
    const chunk = new Uint8Array(BLOCK_BYTES * Math.min(layout.alBlocks, ACTIVITY_LOG_CHUNK_BLOCKS));
    encodeInitializedBlock(chunk.subarray(0, BLOCK_BYTES));
    for (let at = BLOCK_BYTES; at < chunk.byteLength; at += BLOCK_BYTES) chunk.copyWithin(at, 0, BLOCK_BYTES);
    for (let block = 0; block < layout.alBlocks; block += ACTIVITY_LOG_CHUNK_BLOCKS)
      this.file.write(
        layout.activityLogSector * SECTOR_BYTES + block * BLOCK_BYTES,
        chunk.subarray(0, Math.min(ACTIVITY_LOG_CHUNK_BLOCKS, layout.alBlocks - block) * BLOCK_BYTES),
      );
  }

  close(): void {
    this.file.close();
    this.dataFile?.close();
  }
}

/** The data disk of metadata that is only read. It may be the very disk that broke; then it is left out. */
function openIfPossible(disk: string): MetadataFile | undefined {
  try {
    return MetadataFile.open(disk, { writable: false, lock: 'shared' });
  } catch (error) {
    if (error instanceof OperatorError) return undefined;
    throw error;
  }
}

/** Opens, runs, closes. */
export function withStore<T>(target: MetadataTarget, writable: boolean, use: (store: MetadataStore) => T): T {
  const store = MetadataStore.open(target, writable);
  try {
    return use(store);
  } finally {
    store.close();
  }
}

/** Where the superblock of `layout` stands, as an operator names it: drbdmeta's INDEX argument. */
export function indexWord(layout: MetadataLayout): string {
  if (layout.kind === 'internal') return 'internal';
  return layout.kind === 'flexible' ? 'flex-external' : String(layout.index);
}

/** Whether an error only says that there is no (usable) metadata; anything else is not ours to explain. */
export function isMissingMetadata(error: unknown): error is MetadataError {
  return error instanceof MetadataError;
}

/** Runs `each` for every target and answers the highest exit code. */
export function forEachTarget(targets: readonly MetadataTarget[], each: (target: MetadataTarget) => number): number {
  return targets.reduce((worst, target) => Math.max(worst, each(target)), 0);
}

/** Asks on the terminal or reads the answer from a pipe, as `yes yes | drbdadm create-md` does. */
export function askOnStdin(environment: Environment, force: boolean): Confirm {
  return (question) => {
    environment.out(question);
    if (force) {
      environment.out('*** confirmation forced via --force option ***\n');
      return true;
    }
    environment.out("[need to type 'yes' to confirm] ");
    const answer = readLineFromStdin();
    if (!process.stdin.isTTY) environment.out('\n');
    return answer === 'yes';
  };
}

function readLineFromStdin(): string {
  const byte = new Uint8Array(1);
  let line = '';
  while (line.length < 80) {
    let count: number;
    try {
      count = readSync(0, byte);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === 'EOF') break;
      if ((error as NodeJS.ErrnoException).code !== 'EAGAIN') throw error;
      // A terminal somebody made non-blocking: wait a moment without spinning.
      Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 50);
      continue;
    }
    if (count === 0 || byte[0] === 10) break;
    line += String.fromCharCode(byte[0]!);
  }
  return line;
}
