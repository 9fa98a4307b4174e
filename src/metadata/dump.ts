import { BLOCK_BYTES, bitmapBytes, type MetadataLayout, SECTOR_BYTES } from './layout.js';
import {
  isClean,
  MDF_CONNECTED_IND,
  MDF_CONSISTENT,
  MDF_CRASHED_PRIMARY,
  MDF_FULL_SYNC,
  MDF_PEER_OUT_DATED,
  MDF_PRIMARY_IND,
  MDF_WAS_UP_TO_DATE,
  type Superblock,
} from './superblock.js';

/** Words of 64 bits on one line of a dump. */
const WORDS_PER_LINE = 4;
/** A line whose first word is a multiple of this is preceded by its position. */
const WORDS_PER_COMMENT = 32;
/** KiB of data one 64-bit word of bitmap stands for. */
const KIB_PER_WORD = 256;
/** Text handed to the writer at once. */
const CHUNK_CHARS = 1 << 16;

/** Bytes of bitmap a dump shows for a device of `sizeSectors`: whole blocks of 4 KiB. */
export function dumpedBitmapBytes(sizeSectors: number): number {
  return Math.ceil(bitmapBytes(sizeSectors) / BLOCK_BYTES) * BLOCK_BYTES;
}

const hex = (value: bigint | number, digits: number) => value.toString(16).toUpperCase().padStart(digits, '0');
const hex64 = (value: bigint) => `0x${hex(value, 16)}`;

export interface DumpOptions {
  readonly superblock: Superblock;
  readonly layout: MetadataLayout;
  /** `dumpedBitmapBytes` bytes as they are on disk, 4-byte aligned. */
  readonly bitmap: Uint8Array;
  /** Comment lines behind the first one, without `# `: when, where and by which command line it was made. */
  readonly comments: readonly string[];
}

/**
 * Writes metadata as text in the format of `drbdmeta dump-md` (and `restore-md`), in pieces of some 64 KiB. An unclean
 * dump contains a line that is a syntax error on purpose, so that nobody restores it.
 *
 * @see DRBD drbdmeta.c meta_dump_md; the bitmap is shown as little-endian 64-bit words
 */
export function writeDump(options: DumpOptions, write: (text: string) => void): void {
  const { superblock, layout } = options;
  const base = layout.superblockSector;
  let text = '# DRBD meta data dump\n';
  for (const comment of options.comments) text += `# ${comment}\n`;
  text += '#\n\nversion "v08";\n\n';
  if (!isClean(superblock))
    text +=
      "This_is_an_unclean_meta_data_dump._Don't_trust_the_bitmap.\n" +
      '# You should "apply-al" first, if you plan to restore this.\n\n';
  text +=
    `# md_size_sect ${superblock.mdSizeSectors}\n` +
    `# md_offset ${base * SECTOR_BYTES}\n` +
    `# al_offset ${(base + superblock.alOffset) * SECTOR_BYTES}\n` +
    `# bm_offset ${(base + superblock.bmOffset) * SECTOR_BYTES}\n\n` +
    'uuid {\n' +
    `    ${hex64(superblock.currentUuid)}; ${hex64(superblock.bitmapUuid)}; ` +
    `${hex64(superblock.history0Uuid)}; ${hex64(superblock.history1Uuid)};\n` +
    `    flags 0x${hex(superblock.flags, 8)};\n` +
    '}\n' +
    `# al-extents ${superblock.alExtents};\n` +
    `la-size-sect ${superblock.laSizeSectors};\n` +
    'bm-byte-per-bit 4096;\n' +
    `device-uuid ${hex64(superblock.deviceUuid)};\n` +
    `la-peer-max-bio-size ${superblock.laPeerMaxBioSizeBytes};\n` +
    `al-stripes ${superblock.alStripes};\n` +
    `al-stripe-size-4k ${superblock.alStripeSize4k};\n` +
    `# bm-bytes ${options.bitmap.byteLength};\n` +
    'bm {\n';
  const halves = new Uint32Array(options.bitmap.buffer, options.bitmap.byteOffset, options.bitmap.byteLength / 4);
  const words = halves.length / 2;
  let bitsSet = 0;
  for (let word = 0; word < words; ) {
    if (word % WORDS_PER_COMMENT === 0) text += `   # at ${word * KIB_PER_WORD}kB\n`;
    const run = runLength(halves, word, words);
    const times = run - (run % WORDS_PER_LINE);
    if (times > WORDS_PER_LINE) {
      text += `    ${times} times ${wordText(halves, word)};\n`;
      bitsSet += times * wordWeight(halves, word);
      word += times;
    } else {
      const end = Math.min(word + WORDS_PER_LINE, words);
      text += '   ';
      for (; word < end; word++) {
        text += ` ${wordText(halves, word)};`;
        bitsSet += wordWeight(halves, word);
      }
      text += '\n';
    }
    if (text.length >= CHUNK_CHARS) {
      write(text);
      text = '';
    }
  }
  write(`${text}}\n# bits-set ${bitsSet};\n`);
}

function runLength(halves: Uint32Array, from: number, words: number): number {
  const low = halves[from * 2]!;
  const high = halves[from * 2 + 1]!;
  let end = from + 1;
  while (end < words && halves[end * 2] === low && halves[end * 2 + 1] === high) end++;
  return end - from;
}

const wordText = (halves: Uint32Array, word: number) =>
  `0x${hex(halves[word * 2 + 1]!, 8)}${hex(halves[word * 2]!, 8)}`;

const wordWeight = (halves: Uint32Array, word: number) => weight(halves[word * 2]!) + weight(halves[word * 2 + 1]!);

function weight(half: number): number {
  let count = 0;
  for (let rest = half; rest !== 0; rest &= rest - 1) count++;
  return count;
}

const SHOWN_FLAGS = [
  MDF_CONSISTENT,
  MDF_WAS_UP_TO_DATE,
  MDF_PRIMARY_IND,
  MDF_CONNECTED_IND,
  MDF_FULL_SYNC,
  MDF_PEER_OUT_DATED,
  MDF_CRASHED_PRIMARY,
];

/** The line of `get-gi`: four identifiers and seven flag digits. No newline. */
export function formatGenerationIdentifiers(superblock: Superblock): string {
  return [
    hex(superblock.currentUuid, 16),
    hex(superblock.bitmapUuid, 16),
    hex(superblock.history0Uuid, 16),
    hex(superblock.history1Uuid, 16),
    ...SHOWN_FLAGS.map((flag) => ((superblock.flags & flag) === 0 ? '0' : '1')),
  ].join(':');
}

/** The disk state the flags stand for while nothing is attached. */
export function storedDiskState(superblock: Superblock): 'Inconsistent' | 'Outdated' | 'Consistent' | 'UpToDate' {
  if ((superblock.flags & MDF_CONSISTENT) === 0) return 'Inconsistent';
  if ((superblock.flags & MDF_WAS_UP_TO_DATE) === 0) return 'Outdated';
  return (superblock.flags & MDF_PEER_OUT_DATED) === 0 ? 'Consistent' : 'UpToDate';
}

/** `1024 MB`: the largest unit that leaves at most four digits, as DRBD's tools print sizes. */
export function formatSize(sizeKib: number): string {
  const units = ['KB', 'MB', 'GB', 'TB', 'PB', 'EB'];
  let size = sizeKib;
  let unit = 0;
  while (size >= 10000 && unit < units.length - 1) {
    size = Math.floor((size + 512) / 1024);
    unit++;
  }
  return `${size} ${units[unit]}`;
}

/** The drawing of `show-gi`. Like the original's it does not end in a newline when the size is known. */
export function formatGenerationPicture(superblock: Superblock): string {
  const has = (flag: number) => (superblock.flags & flag) !== 0;
  const words = [
    `${has(MDF_CRASHED_PRIMARY) ? 'crashed ' : ''}${has(MDF_PRIMARY_IND) ? 'Primary' : 'Secondary'}`,
    has(MDF_CONNECTED_IND) ? 'Connected' : 'StandAlone',
    has(MDF_CONSISTENT) ? (has(MDF_WAS_UP_TO_DATE) ? 'UpToDate' : 'Outdated') : 'Inconsistent',
    ...(has(MDF_FULL_SYNC) ? ['need full sync'] : []),
    ...(has(MDF_PEER_OUT_DATED) ? ['peer Outdated'] : []),
  ];
  const size = superblock.laSizeSectors;
  const tail =
    size === 0
      ? 'zero size device -- never seen peer yet?\n'
      : `last agreed size: ${formatSize(Math.floor(size / 2))} (${size} sectors)\n` +
        `last agreed max bio size: ${superblock.laPeerMaxBioSizeBytes} Byte`;
  return `
       +--<  Current data generation UUID  >-
       |               +--<  Bitmap's base data generation UUID  >-
       |               |                 +--<  younger history UUID  >-
       |               |                 |         +-<  older history  >-
       V               V                 V         V
${formatGenerationIdentifiers(superblock)}
                                                                    ^ ^ ^ ^ ^ ^ ^
                                      -<  Data consistency flag  >--+ | | | | | |
                             -<  Data was/is currently up-to-date  >--+ | | | | |
                                  -<  Node was/is currently primary  >--+ | | | |
                                  -<  Node was/is currently connected  >--+ | | |
         -<  Node was in the progress of setting all bits in the bitmap  >--+ | |
                        -<  The peer's disk was out-dated or inconsistent  >--+ |
      -<  This node was a crashed primary, and has not seen its peer since   >--+

flags: ${words.join(', ')}
meta-data: ${isClean(superblock) ? 'clean' : 'need apply-al'}
${tail}`;
}
