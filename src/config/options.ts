/**
 * The option catalogue of drbd.conf as data: what may be written where, its unit and limits, what drbdts does with it.
 *
 * Numbers are DRBD 8.4's (drbd_limits.h and the option tables of drbdadm 8.4); where drbdts differs a comment says so.
 */

export type SectionName = 'global' | 'options' | 'net' | 'disk' | 'startup' | 'handlers' | 'proxy';

/** What the number of an option counts; it decides the unit of a bare number and the letter in range messages. */
export type OptionUnit = 'bytes' | 'KiB' | 'KiB/s' | 'sectors' | 's' | '0.1 s' | 'count';

/**
 * `use`: same meaning as in DRBD. `emulate`: same effect by other means. `note`: stored, shown by dump, no effect.
 * `refuse`: parsed and shown by dump, but a resource that needs it does not start. `ignore`: read and forgotten (old
 * spellings without any effect in 8.4 either, and version 9 options outside the two-node subset).
 */
export type OptionTreatment = 'use' | 'emulate' | 'note' | 'refuse' | 'ignore';

export type OptionType =
  | {
      readonly kind: 'number';
      readonly unit: OptionUnit;
      readonly min: number;
      readonly default: number;
      readonly max: number;
    }
  | { readonly kind: 'boolean'; readonly default: boolean }
  /** Present or not, never with a value (global and startup). */
  | { readonly kind: 'flag' }
  | { readonly kind: 'enum'; readonly words: readonly string[]; readonly default: string; readonly prefix?: string }
  | { readonly kind: 'digest' }
  | { readonly kind: 'string'; readonly maxLength: number }
  | { readonly kind: 'cpu-mask' }
  /** RESOURCE or RESOURCE/VOLUME. */
  | { readonly kind: 'resource' }
  /** One or more host names. */
  | { readonly kind: 'hosts' };

export interface OptionDefinition {
  readonly name: string;
  readonly section: SectionName;
  readonly type: OptionType;
  readonly treatment: OptionTreatment;
  /** Which generation's configuration knows the word; 8.3 words are aliases and stand in LEGACY_SPELLINGS. */
  readonly since: '8.4' | '9' | 'drbdts';
}

const GIB = 1024 ** 3;
const definitions: OptionDefinition[] = [];
const bySection = new Map<SectionName, Map<string, OptionDefinition>>();

function define(
  section: SectionName,
  name: string,
  type: OptionType,
  treatment: OptionTreatment = 'use',
  since: OptionDefinition['since'] = '8.4',
): void {
  const definition = Object.freeze({ name, section, type: Object.freeze(type), treatment, since });
  definitions.push(definition);
  const names = bySection.get(section) ?? new Map<string, OptionDefinition>();
  names.set(name, definition);
  bySection.set(section, names);
}

const number = (unit: OptionUnit, min: number, byDefault: number, max: number): OptionType => ({
  kind: 'number',
  unit,
  min,
  default: byDefault,
  max,
});
const boolean = (byDefault: boolean): OptionType => ({ kind: 'boolean', default: byDefault });
const words = (...allowed: readonly [string, ...string[]]): OptionType => ({
  kind: 'enum',
  words: allowed,
  default: allowed[0],
});
const FLAG: OptionType = { kind: 'flag' };
const DIGEST: OptionType = { kind: 'digest' };
const text = (maxLength: number): OptionType => ({ kind: 'string', maxLength });

define('global', 'disable-ip-verification', FLAG);
define('global', 'minor-count', number('count', 1, 32, 255), 'note');
define('global', 'dialog-refresh', number('s', 0, 1, 600));
define('global', 'usage-count', words('ask', 'yes', 'no'), 'note');
define('global', 'udev-always-use-vnr', FLAG);
define('global', 'cmd-timeout-short', number('s', 0, 5, 900));
define('global', 'cmd-timeout-medium', number('s', 0, 121, 900));
define('global', 'cmd-timeout-long', number('s', 0, 600, 900));

define('startup', 'wfc-timeout', number('s', 0, 0, 300000));
define('startup', 'degr-wfc-timeout', number('s', 0, 0, 300000));
define('startup', 'outdated-wfc-timeout', number('s', 0, 0, 300000));
define('startup', 'wait-after-sb', boolean(false));
define('startup', 'become-primary-on', { kind: 'hosts' });
define('startup', 'stacked-timeouts', FLAG, 'note');

define('options', 'cpu-mask', { kind: 'cpu-mask' }, 'note');
define('options', 'on-no-data-accessible', words('io-error', 'suspend-io'));

define('net', 'protocol', words('C', 'A', 'B'));
define('net', 'timeout', number('0.1 s', 1, 60, 600));
define('net', 'ping-timeout', number('0.1 s', 1, 5, 300));
define('net', 'ping-int', number('s', 1, 10, 120));
define('net', 'connect-int', number('s', 1, 10, 120));
define('net', 'ko-count', number('count', 0, 7, 200));
define('net', 'max-epoch-size', number('count', 1, 2048, 20000));
define('net', 'max-buffers', number('count', 32, 2048, 131072));
define('net', 'unplug-watermark', number('count', 1, 128, 131072), 'note');
define('net', 'sndbuf-size', number('bytes', 0, 0, 10 * 1024 * 1024), 'emulate');
define('net', 'rcvbuf-size', number('bytes', 0, 0, 10 * 1024 * 1024), 'emulate');
define('net', 'tcp-cork', boolean(true), 'emulate');
define('net', 'allow-two-primaries', boolean(false));
define('net', 'cram-hmac-alg', DIGEST);
define('net', 'shared-secret', text(64));
define('net', 'data-integrity-alg', DIGEST);
define('net', 'verify-alg', DIGEST);
define('net', 'csums-alg', DIGEST);
define('net', 'csums-after-crash-only', boolean(false));
define('net', 'use-rle', boolean(true));
define('net', 'after-sb-0pri', {
  kind: 'enum',
  words: [
    'disconnect',
    'discard-younger-primary',
    'discard-older-primary',
    'discard-zero-changes',
    'discard-least-changes',
    'discard-local',
    'discard-remote',
  ],
  default: 'disconnect',
  prefix: 'discard-node-',
});
define(
  'net',
  'after-sb-1pri',
  words('disconnect', 'consensus', 'discard-secondary', 'call-pri-lost-after-sb', 'violently-as0p'),
);
define('net', 'after-sb-2pri', words('disconnect', 'call-pri-lost-after-sb', 'violently-as0p'));
define('net', 'always-asbp', boolean(false));
define('net', 'rr-conflict', words('disconnect', 'call-pri-lost', 'violently'));
define('net', 'on-congestion', words('block', 'pull-ahead', 'disconnect'));
define('net', 'congestion-fill', number('sectors', 0, 0, (10 * GIB) / 512));
define('net', 'congestion-extents', number('count', 67, 1237, 65534));
define('net', 'socket-check-timeout', number('0.1 s', 0, 0, 300));

define('disk', 'size', number('sectors', 0, 0, 2 ** 41));
define('disk', 'on-io-error', words('detach', 'pass_on', 'pass-on', 'call-local-io-error'));
define('disk', 'fencing', words('dont-care', 'resource-only', 'resource-and-stonith'));
define('disk', 'disk-barrier', boolean(false), 'note');
define('disk', 'disk-flushes', boolean(true));
define('disk', 'disk-drain', boolean(true));
define('disk', 'md-flushes', boolean(true));
define('disk', 'resync-rate', number('KiB/s', 1, 250, 4194304));
define('disk', 'resync-after', { kind: 'resource' });
define('disk', 'c-plan-ahead', number('0.1 s', 0, 20, 300));
define('disk', 'c-delay-target', number('0.1 s', 1, 10, 100));
define('disk', 'c-fill-target', number('sectors', 0, 100, 1048576));
define('disk', 'c-max-rate', number('KiB/s', 250, 102400, 4194304));
define('disk', 'c-min-rate', number('KiB/s', 0, 250, 4194304));
// drbdadm leaves this one to the kernel, which wants at least 67; 7 is what its manual page allows.
define('disk', 'al-extents', number('count', 7, 1237, 65534));
define('disk', 'al-updates', boolean(true));
define('disk', 'discard-zeroes-if-aligned', boolean(true), 'emulate');
define('disk', 'disable-write-same', boolean(false), 'note');
define('disk', 'rs-discard-granularity', number('bytes', 0, 0, 1048576));
define('disk', 'disk-timeout', number('0.1 s', 0, 0, 6000));
define(
  'disk',
  'read-balancing',
  words(
    'prefer-local',
    'prefer-remote',
    'round-robin',
    'least-pending',
    'when-congested-remote',
    '32K-striping',
    '64K-striping',
    '128K-striping',
    '256K-striping',
    '512K-striping',
    '1M-striping',
  ),
);
define('disk', 'max-bio-bvecs', number('count', 0, 0, 128), 'note');
define('disk', 'direct-io', boolean(false), 'use', 'drbdts');

/** The handlers drbdts runs; each value is a shell command line. */
export const HANDLER_NAMES = [
  'pri-on-incon-degr',
  'pri-lost-after-sb',
  'pri-lost',
  'initial-split-brain',
  'split-brain',
  'fence-peer',
  'unfence-peer',
  'local-io-error',
  'before-resync-target',
  'after-resync-target',
  'before-resync-source',
  'out-of-sync',
] as const;
export type HandlerName = (typeof HANDLER_NAMES)[number];
for (const name of HANDLER_NAMES) define('handlers', name, text(255));

for (const name of ['memlimit', 'compression', 'bwlimit', 'sndbuf-size', 'rcvbuf-size', 'ping-timeout', 'read-loops'])
  define('proxy', name, text(255), 'refuse');

// The words of version 9 that two-node configurations use. Read so that the file loads; drbdts has no use for them.
for (const name of [
  'auto-promote',
  'auto-promote-timeout',
  'on-no-quorum',
  'on-suspended-primary-outdated',
  'peer-ack-delay',
  'peer-ack-window',
  'quorum',
  'quorum-minimum-redundancy',
  'twopc-retry-timeout',
  'twopc-timeout',
])
  define('options', name, text(255), 'ignore', '9');
for (const name of [
  '_name',
  'load-balance-paths',
  'rdma-ctrl-rcvbuf-size',
  'rdma-ctrl-sndbuf-size',
  'tls',
  'transport',
])
  define('net', name, text(255), 'ignore', '9');
for (const name of ['bitmap', 'block-size']) define('disk', name, text(255), 'ignore', '9');

/** Every option, in the order of the catalogue. */
export const OPTION_CATALOGUE: readonly OptionDefinition[] = Object.freeze(definitions);

/** The definition of `name` in `section`, or undefined. */
export function findOption(section: SectionName, name: string): OptionDefinition | undefined {
  return bySection.get(section)?.get(name);
}

/** The names known in a section. */
export function optionNames(section: SectionName): Iterable<string> {
  return bySection.get(section)?.keys() ?? [];
}

/** The sections a file may open, including the 8.3 `syncer`, whose options belong to three sections of 8.4. */
export type WrittenSection = SectionName | 'syncer';

export interface LegacySpelling {
  readonly section: SectionName;
  /** The 8.4 name; undefined if 8.4 reads the word and forgets it. */
  readonly name?: string;
  /** Set where the old spelling was a bare negation. */
  readonly value?: string;
}

const FORGOTTEN: readonly string[] = [
  'delay-probe-volume',
  'delay-probe-interval',
  'throttle-threshold',
  'hold-off-threshold',
];

const legacy = new Map<string, LegacySpelling>();
for (const name of ['disk-barrier', 'disk-flushes', 'disk-drain', 'md-flushes'])
  legacy.set(`disk:no-${name}`, { section: 'disk', name, value: 'no' });
legacy.set('net:no-tcp-cork', { section: 'net', name: 'tcp-cork', value: 'no' });
legacy.set('handlers:outdate-peer', { section: 'handlers', name: 'fence-peer' });
for (const name of FORGOTTEN) {
  legacy.set(`disk:${name}`, { section: 'disk' });
  legacy.set(`net:${name}`, { section: 'net' });
}
legacy.set('syncer:rate', { section: 'disk', name: 'resync-rate' });
legacy.set('syncer:after', { section: 'disk', name: 'resync-after' });
for (const name of ['al-extents', 'c-plan-ahead', 'c-fill-target', 'c-delay-target', 'c-max-rate', 'c-min-rate'])
  legacy.set(`syncer:${name}`, { section: 'disk', name });
for (const name of ['verify-alg', 'csums-alg', 'use-rle', 'data-integrity-alg'])
  legacy.set(`syncer:${name}`, { section: 'net', name });
for (const name of ['cpu-mask', 'on-no-data-accessible']) legacy.set(`syncer:${name}`, { section: 'options', name });
// Version 9 moved these two; a file for both generations may carry them in the new place.
legacy.set('net:fencing', { section: 'disk', name: 'fencing' });

/** How a word of the 8.3 dialect (or one that version 9 moved) reads in 8.4, or undefined. */
export function findLegacySpelling(section: WrittenSection, name: string): LegacySpelling | undefined {
  return legacy.get(`${section}:${name}`);
}

/** All words a section of a file accepts, old spellings included. */
export function writtenNames(section: WrittenSection): string[] {
  const names = section === 'syncer' ? [] : [...optionNames(section)];
  for (const key of legacy.keys()) if (key.startsWith(`${section}:`)) names.push(key.slice(section.length + 1));
  return names;
}

/** Digests drbdts can compute. */
export const DIGEST_NAMES: readonly string[] = ['crc32c', 'md5', 'sha1', 'sha256', 'sha384', 'sha512'];

/** Bytes per unit of a bare number; 1 for what has no size. */
const UNIT_SIZE: Readonly<Record<OptionUnit, number>> = {
  bytes: 1,
  KiB: 1024,
  'KiB/s': 1024,
  sectors: 512,
  s: 1,
  '0.1 s': 1,
  count: 1,
};

/** The letter drbdadm puts behind a number in that unit. */
export const UNIT_LETTER: Readonly<Record<OptionUnit, string>> = {
  bytes: '',
  KiB: 'k',
  'KiB/s': 'k',
  sectors: 's',
  s: '',
  '0.1 s': '',
  count: '',
};

const SUFFIX_SIZE: Readonly<Record<string, number>> = { s: 512, k: 1024, m: 1024 ** 2, g: GIB };

/**
 * Reads a number with at most one suffix letter (`s` sectors, K, M, G powers of 1024) into an option's own unit; finer
 * than the unit is rounded up, as DRBD does. A bare number is in the unit already.
 *
 * @returns the number, a safe integer (capped at 2^53 - 1, which every range check refuses); undefined if `raw` is none
 */
export function parseNumber(raw: string, unit: OptionUnit): number | undefined {
  const match = /^([0-9]{1,32})([KMGkmgs]?)$/.exec(raw);
  if (!match) return undefined;
  const digits = Number(match[1]);
  if (match[2] === '') return Math.min(digits, Number.MAX_SAFE_INTEGER);
  const bytes = digits * SUFFIX_SIZE[match[2]!.toLowerCase()]!;
  return Math.min(Math.ceil(bytes / UNIT_SIZE[unit]), Number.MAX_SAFE_INTEGER);
}

/** Whether a text is a legal value for an option, as far as the text alone tells. Used to propose missing blanks. */
export function isLegalValue(definition: OptionDefinition, value: string): boolean {
  const { type } = definition;
  switch (type.kind) {
    case 'number': {
      const parsed = parseNumber(value, type.unit);
      return parsed !== undefined && parsed >= type.min && parsed <= type.max;
    }
    case 'boolean':
      return value === 'yes' || value === 'no';
    case 'flag':
      return false;
    case 'enum':
      return (
        type.words.includes(value) ||
        (type.prefix !== undefined && value.length > type.prefix.length && value.startsWith(type.prefix))
      );
    case 'digest':
      return DIGEST_NAMES.includes(value.toLowerCase());
    case 'cpu-mask':
      return /^[0-9a-fA-F]{1,128}$/.test(value);
    case 'string':
    case 'resource':
    case 'hosts':
      return value.length > 0 && !value.startsWith('-') && !value.startsWith('_');
  }
}
