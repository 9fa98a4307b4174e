import { OperatorError } from '../base/errors.js';
import { closestWord } from './diagnostic.js';
import {
  type Address,
  type DrbdConfig,
  deepFreeze,
  type HostConfig,
  type MetaDisk,
  netProblems,
  overrideSettings,
  type ResourceConfig,
  type Setting,
  type VolumeConfig,
} from './drbd-conf.js';
import { parseIpAddress, sameAddress } from './ip-address.js';
import { findOption, HANDLER_NAMES, type HandlerName, type SectionName } from './options.js';

export type Protocol = 'A' | 'B' | 'C';
export type DigestName = 'crc32c' | 'md5' | 'sha1' | 'sha256' | 'sha384' | 'sha512';
export type AfterSplitBrain0 =
  | 'disconnect'
  | 'discard-younger-primary'
  | 'discard-older-primary'
  | 'discard-zero-changes'
  | 'discard-least-changes'
  | 'discard-local'
  | 'discard-remote';
export type AfterSplitBrain1 =
  | 'disconnect'
  | 'consensus'
  | 'discard-secondary'
  | 'call-pri-lost-after-sb'
  | 'violently-as0p';
export type AfterSplitBrain2 = 'disconnect' | 'call-pri-lost-after-sb' | 'violently-as0p';

/** `net` in engine units. Every field has a value; what is off by default is undefined or 0 as said. */
export interface NetOptions {
  readonly timeoutMs: number;
  readonly pingTimeoutMs: number;
  readonly pingIntMs: number;
  readonly connectIntMs: number;
  /** Never 0: an unset socket-check-timeout is the ping-timeout. */
  readonly socketCheckTimeoutMs: number;
  /** Times timeoutMs a write may take; 0 is for ever. */
  readonly koCount: number;
  readonly maxEpochSizeWrites: number;
  /** Of 4 KiB. */
  readonly maxBuffersPages: number;
  readonly unplugWatermarkPages: number;
  /** 0 leaves it to the kernel. */
  readonly sndbufSizeBytes: number;
  readonly rcvbufSizeBytes: number;
  readonly tcpCork: boolean;
  readonly allowTwoPrimaries: boolean;
  readonly cramHmacAlg?: DigestName;
  readonly sharedSecret?: string;
  readonly dataIntegrityAlg?: DigestName;
  readonly verifyAlg?: DigestName;
  readonly csumsAlg?: DigestName;
  readonly csumsAfterCrashOnly: boolean;
  readonly useRle: boolean;
  /** `discard-node-NAME` is translated to discard-local or discard-remote. */
  readonly afterSb0pri: AfterSplitBrain0;
  readonly afterSb1pri: AfterSplitBrain1;
  readonly afterSb2pri: AfterSplitBrain2;
  readonly alwaysAsbp: boolean;
  readonly rrConflict: 'disconnect' | 'call-pri-lost' | 'violently';
  readonly onCongestion: 'block' | 'pull-ahead' | 'disconnect';
  /** Of 512 bytes; 0 is off. */
  readonly congestionFillSectors: number;
  readonly congestionExtents: number;
}

/** `disk` in engine units. */
export interface DiskOptions {
  /** Of 512 bytes; 0 is the whole device. */
  readonly sizeSectors: number;
  readonly onIoError: 'detach' | 'pass-on' | 'call-local-io-error';
  readonly fencing: 'dont-care' | 'resource-only' | 'resource-and-stonith';
  readonly diskBarrier: boolean;
  readonly diskFlushes: boolean;
  readonly diskDrain: boolean;
  readonly mdFlushes: boolean;
  readonly resyncRateKiBps: number;
  /** The minor of the device to wait for, on this host; -1 is none. */
  readonly resyncAfterMinor: number;
  /** 0 turns the controller off: resyncRateKiBps is then the speed. */
  readonly cPlanAheadMs: number;
  readonly cDelayTargetMs: number;
  readonly cFillTargetSectors: number;
  readonly cMaxRateKiBps: number;
  /** 0 never throttles. */
  readonly cMinRateKiBps: number;
  /** Of 4 MiB. */
  readonly alExtents: number;
  readonly alUpdates: boolean;
  readonly discardZeroesIfAligned: boolean;
  readonly disableWriteSame: boolean;
  readonly rsDiscardGranularityBytes: number;
  /** 0 is off. */
  readonly diskTimeoutMs: number;
  readonly readBalancing: string;
  readonly maxBioBvecs: number;
  /** Bypass the page cache of this host (an option of drbdts). */
  readonly directIo: boolean;
}

export interface StartupOptions {
  /** 0 waits for ever. */
  readonly wfcTimeoutMs: number;
  readonly degrWfcTimeoutMs: number;
  readonly outdatedWfcTimeoutMs: number;
  readonly waitAfterSb: boolean;
  /** Host names, or `both`. */
  readonly becomePrimaryOn: readonly string[];
  readonly stackedTimeouts: boolean;
}

export interface ResourceOptions {
  readonly cpuMask?: string;
  readonly onNoDataAccessible: 'io-error' | 'suspend-io';
}

export interface ResolvedVolume {
  readonly number: number;
  /** The name users open: `/dev/drbd0`, or as written. */
  readonly device: string;
  readonly minor: number;
  /** The backing device or file on this host. */
  readonly disk: string;
  readonly metaDisk: MetaDisk;
  readonly diskOptions: DiskOptions;
}

export interface ResolvedHost {
  /** The name that matched for `self`; the first one for `peer`. */
  readonly host: string;
  readonly address: Address;
}

/** One resource as this host runs it: defaults filled in, engine units, plain data (JSON and back changes nothing). */
export interface ResolvedResource {
  readonly name: string;
  readonly protocol: Protocol;
  /** Ordered by number; at least one. */
  readonly volumes: readonly ResolvedVolume[];
  readonly self: ResolvedHost;
  readonly peer: ResolvedHost;
  readonly net: NetOptions;
  /** What holds for volumes that say nothing of their own. */
  readonly disk: DiskOptions;
  readonly startup: StartupOptions;
  /** Shell command lines. */
  readonly handlers: Readonly<Partial<Record<HandlerName, string>>>;
  readonly options: ResourceOptions;
  /** `FILE` and line of the definition, as in dump. */
  readonly definedAt: { readonly path: string; readonly line: number };
}

export interface GlobalOptions {
  readonly minorCount: number;
  /** 0 never redraws. */
  readonly dialogRefreshMs: number;
  readonly disableIpVerification: boolean;
  readonly udevAlwaysUseVnr: boolean;
  /** 0 is no limit. */
  readonly cmdTimeoutShortMs: number;
  readonly cmdTimeoutMediumMs: number;
  readonly cmdTimeoutLongMs: number;
}

export interface ResolveOptions {
  /** Addresses configured on this host; needed for `floating` sections only. */
  readonly localAddresses?: readonly string[];
  /** Which peer, if the resource names more than two hosts (`--peer`). */
  readonly peer?: string;
}

type SectionWithSettings = Exclude<SectionName, 'global'>;

/**
 * One resource as `nodeName` runs it, with common and defaults filled in.
 *
 * @throws OperatorError (exit code 1, reason `not-defined`) if the resource is not in the config or not for this host,
 *   saying which names are; (10, `config-invalid`) if it is but cannot run
 */
export function resolveResource(
  config: DrbdConfig,
  name: string,
  nodeName: string,
  options: ResolveOptions = {},
): ResolvedResource {
  const resource = config.resources.find((candidate) => candidate.name === name);
  if (!resource) throw notDefined(config, name);
  const self = findSelf(resource, nodeName, options);
  if (!self) throw notForThisHost(resource, nodeName);
  const peer = findPeer(resource, self, options.peer);
  if (self.proxy)
    throw invalid(resource, `in resource ${name}: DRBD Proxy is not part of drbdts; remove "proxy on" sections`);
  if (!self.address || !peer.address) throw invalid(resource, `in resource ${name}: a host has no address`);
  if (self.volumes.length === 0) throw invalid(resource, `in resource ${name}: on ${nodeName} there is no volume`);
  const settings = (section: SectionWithSettings): Setting[] =>
    overrideSettings(config.common?.[section] ?? [], resource.sections[section]);
  const problem = netProblems((section, word) => settings(section).findLast((setting) => setting.name === word))[0];
  if (problem) throw invalid(problem.setting, `in resource ${name}: ${problem.message}`);
  const net = new Reader('net', settings('net'));
  const disk = settings('disk');
  return deepFreeze({
    name,
    protocol: net.word('protocol') as Protocol,
    volumes: self.volumes.map((volume) => resolveVolume(config, resource, volume, disk, nodeName, options)),
    self: { host: self.kind === 'on' ? nodeName : self.names[0]!, address: self.address },
    peer: { host: peer.names[0]!, address: peer.address },
    net: netOptions(net, self),
    disk: diskOptions(new Reader('disk', disk), config, nodeName, options),
    startup: startupOptions(new Reader('startup', settings('startup'))),
    handlers: handlerCommands(settings('handlers')),
    options: resourceOptions(new Reader('options', overrideSettings(settings('options'), self.options))),
    definedAt: { path: resource.path, line: resource.line },
  });
}

/** The names of the resources this host takes part in, in the order of the config. */
export function resourcesOfHost(config: DrbdConfig, nodeName: string, options: ResolveOptions = {}): string[] {
  return config.resources.filter((resource) => findSelf(resource, nodeName, options)).map((resource) => resource.name);
}

/** Whether a resource has a section for this host, stacked sections aside. */
export function isForHost(resource: ResourceConfig, nodeName: string, options: ResolveOptions = {}): boolean {
  return findSelf(resource, nodeName, options) !== undefined;
}

/** The `global` section with defaults. */
export function resolveGlobal(config: DrbdConfig): GlobalOptions {
  const reader = new Reader('global', config.global);
  return deepFreeze({
    minorCount: reader.number('minor-count'),
    dialogRefreshMs: reader.number('dialog-refresh') * 1000,
    disableIpVerification: reader.has('disable-ip-verification'),
    udevAlwaysUseVnr: reader.has('udev-always-use-vnr'),
    cmdTimeoutShortMs: reader.number('cmd-timeout-short') * 1000,
    cmdTimeoutMediumMs: reader.number('cmd-timeout-medium') * 1000,
    cmdTimeoutLongMs: reader.number('cmd-timeout-long') * 1000,
  });
}

/**
 * Whether the addresses this host should listen on are configured here. Empty if all are, or if the config says
 * `disable-ip-verification`.
 *
 * @returns one text per missing address: `file:line: in resource data, on HOST:\n\tIP ... not found on this host.`
 */
export function missingAddresses(config: DrbdConfig, nodeName: string, localAddresses: readonly string[]): string[] {
  if (config.global.some((setting) => setting.name === 'disable-ip-verification')) return [];
  const local = localAddresses.map(parseIpAddress).filter((address) => address !== undefined);
  const missing: string[] = [];
  for (const resource of config.resources)
    for (const host of resource.hosts) {
      if (host.kind !== 'on' || !host.names.includes(nodeName) || !host.address) continue;
      const wanted = parseIpAddress(host.address.host);
      if (wanted && local.some((address) => sameAddress(address, wanted))) continue;
      const at = host.addressPosition ?? host;
      missing.push(
        `${at.file}:${at.line}: in resource ${resource.name}, on ${host.names.join(' ')}:\n` +
          `\tIP ${host.address.host} not found on this host.`,
      );
    }
  return missing;
}

function notDefined(config: DrbdConfig, name: string): OperatorError {
  const names = config.resources.map((resource) => resource.name);
  const close = closestWord(name, names);
  const hint =
    names.length === 0
      ? `${config.path} defines no resource`
      : close !== undefined
        ? `did you mean "${close}"?`
        : `the config knows ${names.join(', ')}`;
  return new OperatorError(`'${name}' not defined in your config (for this host).\n${hint}`, 1, 'not-defined');
}

function notForThisHost(resource: ResourceConfig, nodeName: string): OperatorError {
  const names = resource.hosts.filter((host) => host.kind === 'on').flatMap((host) => host.names);
  const short = nodeName.split('.')[0]!;
  const close =
    names.find(
      (name) => name === short || name.split('.')[0] === nodeName || name.toLowerCase() === nodeName.toLowerCase(),
    ) ?? closestWord(nodeName, names);
  const lines = [`'${resource.name}' not defined in your config (for this host).`];
  if (names.length > 0) lines.push(`this host is "${nodeName}", the config knows "${names.join('", "')}"`);
  if (close !== undefined)
    lines.push(
      `if this host is meant by "${close}", write "on ${nodeName}" in ${resource.path} on both hosts, ` +
        'or rename the host',
    );
  return new OperatorError(lines.join('\n'), 1, 'not-defined');
}

function invalid(at: { file: string; line: number }, message: string): OperatorError {
  return new OperatorError(`${at.file}:${at.line}: ${message}`, 10, 'config-invalid');
}

function findSelf(resource: ResourceConfig, nodeName: string, options: ResolveOptions): HostConfig | undefined {
  return resource.hosts.find((host) => {
    if (host.kind === 'on') return host.names.includes(nodeName);
    if (host.kind !== 'floating' || !host.address) return false;
    const wanted = parseIpAddress(host.address.host);
    return (options.localAddresses ?? []).some((text) => {
      const local = parseIpAddress(text);
      return local !== undefined && wanted !== undefined && sameAddress(local, wanted);
    });
  });
}

function findPeer(resource: ResourceConfig, self: HostConfig, wanted: string | undefined): HostConfig {
  if (resource.hosts.some((host) => host.kind === 'stacked'))
    throw invalid(resource, `resource ${resource.name} is stacked; drbdts does not run stacked resources`);
  const others = resource.hosts.filter((host) => host !== self);
  if (others.length === 0)
    throw invalid(resource, `in resource ${resource.name}: Missing section 'on <PEER> { ... }'.`);
  if (wanted !== undefined) {
    const peer = others.find((host) => host.names.includes(wanted));
    if (peer) return peer;
    throw invalid(resource, `in resource ${resource.name}: there is no peer section for '${wanted}'`);
  }
  if (others.length > 1) {
    const names = others.map((host) => host.names[0]).join(', ');
    throw invalid(
      resource,
      `resource ${resource.name} has more than two hosts; choose the peer with --peer (${names})`,
    );
  }
  return others[0]!;
}

/** Reads effective settings of one section, with the catalogue's defaults for what is not set. */
class Reader {
  readonly #settings = new Map<string, Setting>();

  constructor(
    readonly section: SectionName,
    settings: readonly Setting[],
  ) {
    for (const setting of settings) this.#settings.set(setting.name, setting);
  }

  has(name: string): boolean {
    return this.#settings.has(name);
  }

  text(name: string): string | undefined {
    return this.#settings.get(name)?.value;
  }

  number(name: string): number {
    const type = findOption(this.section, name)?.type;
    if (type?.kind !== 'number') throw new TypeError(`${this.section} ${name} is no number`);
    return this.#settings.get(name)?.number ?? type.default;
  }

  boolean(name: string): boolean {
    const type = findOption(this.section, name)?.type;
    if (type?.kind !== 'boolean') throw new TypeError(`${this.section} ${name} is no boolean`);
    const value = this.text(name);
    return value === undefined ? type.default : value === 'yes';
  }

  word(name: string): string {
    const type = findOption(this.section, name)?.type;
    if (type?.kind !== 'enum') throw new TypeError(`${this.section} ${name} is no enumeration`);
    return this.text(name) ?? type.default;
  }
}

function netOptions(reader: Reader, self: HostConfig): NetOptions {
  const pingTimeoutMs = reader.number('ping-timeout') * 100;
  const digest = (name: string): DigestName | undefined => reader.text(name)?.toLowerCase() as DigestName | undefined;
  const cramHmacAlg = digest('cram-hmac-alg');
  const sharedSecret = reader.text('shared-secret');
  const dataIntegrityAlg = digest('data-integrity-alg');
  const verifyAlg = digest('verify-alg');
  const csumsAlg = digest('csums-alg');
  return {
    timeoutMs: reader.number('timeout') * 100,
    pingTimeoutMs,
    pingIntMs: reader.number('ping-int') * 1000,
    connectIntMs: reader.number('connect-int') * 1000,
    socketCheckTimeoutMs: reader.number('socket-check-timeout') * 100 || pingTimeoutMs,
    koCount: reader.number('ko-count'),
    maxEpochSizeWrites: reader.number('max-epoch-size'),
    maxBuffersPages: reader.number('max-buffers'),
    unplugWatermarkPages: reader.number('unplug-watermark'),
    sndbufSizeBytes: reader.number('sndbuf-size'),
    rcvbufSizeBytes: reader.number('rcvbuf-size'),
    tcpCork: reader.boolean('tcp-cork'),
    allowTwoPrimaries: reader.boolean('allow-two-primaries'),
    ...(cramHmacAlg === undefined ? {} : { cramHmacAlg }),
    ...(sharedSecret === undefined ? {} : { sharedSecret }),
    ...(dataIntegrityAlg === undefined ? {} : { dataIntegrityAlg }),
    ...(verifyAlg === undefined ? {} : { verifyAlg }),
    ...(csumsAlg === undefined ? {} : { csumsAlg }),
    csumsAfterCrashOnly: reader.boolean('csums-after-crash-only'),
    useRle: reader.boolean('use-rle'),
    afterSb0pri: afterSplitBrain0(reader.word('after-sb-0pri'), self),
    afterSb1pri: reader.word('after-sb-1pri') as AfterSplitBrain1,
    afterSb2pri: reader.word('after-sb-2pri') as AfterSplitBrain2,
    alwaysAsbp: reader.boolean('always-asbp'),
    rrConflict: reader.word('rr-conflict') as NetOptions['rrConflict'],
    onCongestion: reader.word('on-congestion') as NetOptions['onCongestion'],
    congestionFillSectors: reader.number('congestion-fill'),
    congestionExtents: reader.number('congestion-extents'),
  };
}

/** `discard-node-NAME` names the loser; each host knows it as itself or as the other one. */
function afterSplitBrain0(word: string, self: HostConfig): AfterSplitBrain0 {
  const prefix = 'discard-node-';
  if (!word.startsWith(prefix)) return word as AfterSplitBrain0;
  return self.names.includes(word.slice(prefix.length)) ? 'discard-local' : 'discard-remote';
}

function diskOptions(reader: Reader, config: DrbdConfig, nodeName: string, options: ResolveOptions): DiskOptions {
  const onIoError = reader.word('on-io-error');
  return {
    sizeSectors: reader.number('size'),
    onIoError: (onIoError === 'pass_on' ? 'pass-on' : onIoError) as DiskOptions['onIoError'],
    fencing: reader.word('fencing') as DiskOptions['fencing'],
    diskBarrier: reader.boolean('disk-barrier'),
    diskFlushes: reader.boolean('disk-flushes'),
    diskDrain: reader.boolean('disk-drain'),
    mdFlushes: reader.boolean('md-flushes'),
    resyncRateKiBps: reader.number('resync-rate'),
    resyncAfterMinor: resyncAfterMinor(reader.text('resync-after'), config, nodeName, options),
    cPlanAheadMs: reader.number('c-plan-ahead') * 100,
    cDelayTargetMs: reader.number('c-delay-target') * 100,
    cFillTargetSectors: reader.number('c-fill-target'),
    cMaxRateKiBps: reader.number('c-max-rate'),
    cMinRateKiBps: reader.number('c-min-rate'),
    alExtents: reader.number('al-extents'),
    alUpdates: reader.boolean('al-updates'),
    discardZeroesIfAligned: reader.boolean('discard-zeroes-if-aligned'),
    disableWriteSame: reader.boolean('disable-write-same'),
    rsDiscardGranularityBytes: reader.number('rs-discard-granularity'),
    diskTimeoutMs: reader.number('disk-timeout') * 100,
    readBalancing: reader.word('read-balancing'),
    maxBioBvecs: reader.number('max-bio-bvecs'),
    directIo: reader.boolean('direct-io'),
  };
}

/** A resource that is not for this host delays nothing here. */
function resyncAfterMinor(
  value: string | undefined,
  config: DrbdConfig,
  nodeName: string,
  options: ResolveOptions,
): number {
  if (value === undefined) return -1;
  const [name, volumeNumber] = value.split('/');
  const target = config.resources.find((resource) => resource.name === name);
  const self = target && findSelf(target, nodeName, options);
  const volume = self?.volumes.find(
    (candidate) => volumeNumber === undefined || candidate.number === Number(volumeNumber),
  );
  return volume?.device?.minor ?? -1;
}

function startupOptions(reader: Reader): StartupOptions {
  return {
    wfcTimeoutMs: reader.number('wfc-timeout') * 1000,
    degrWfcTimeoutMs: reader.number('degr-wfc-timeout') * 1000,
    outdatedWfcTimeoutMs: reader.number('outdated-wfc-timeout') * 1000,
    waitAfterSb: reader.boolean('wait-after-sb'),
    becomePrimaryOn: reader.text('become-primary-on')?.split(' ') ?? [],
    stackedTimeouts: reader.has('stacked-timeouts'),
  };
}

function resourceOptions(reader: Reader): ResourceOptions {
  const cpuMask = reader.text('cpu-mask');
  return {
    ...(cpuMask === undefined || cpuMask === '' ? {} : { cpuMask }),
    onNoDataAccessible: reader.word('on-no-data-accessible') as ResourceOptions['onNoDataAccessible'],
  };
}

function handlerCommands(settings: readonly Setting[]): Partial<Record<HandlerName, string>> {
  const commands: Partial<Record<HandlerName, string>> = {};
  for (const name of HANDLER_NAMES) {
    const command = settings.findLast((setting) => setting.name === name)?.value;
    if (command !== undefined && command !== '') commands[name] = command;
  }
  return commands;
}

function resolveVolume(
  config: DrbdConfig,
  resource: ResourceConfig,
  volume: VolumeConfig,
  disk: readonly Setting[],
  nodeName: string,
  options: ResolveOptions,
): ResolvedVolume {
  if (!volume.device || volume.disk === undefined || !volume.metaDisk)
    throw invalid(volume, `in resource ${resource.name}: volume ${volume.number} needs device, disk and meta-disk`);
  const { minor } = volume.device;
  return {
    number: volume.number,
    device: volume.device.path ?? `/dev/drbd${minor}`,
    minor,
    disk: volume.disk,
    metaDisk: volume.metaDisk,
    diskOptions: diskOptions(new Reader('disk', overrideSettings(disk, volume.diskOptions)), config, nodeName, options),
  };
}
