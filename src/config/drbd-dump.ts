import {
  type Address,
  type DrbdConfig,
  deepFreeze,
  type HostConfig,
  isKeyword,
  type ResourceConfig,
  type Sections,
  type Setting,
  type VolumeConfig,
} from './drbd-conf.js';
import { isForHost, type ResolveOptions } from './resource.js';

/**
 * The format of `drbdadm dump`: indent 4, names padded so that values start in one column, values right-aligned to 3,
 * quotes only where needed, old spellings in their 8.4 form. What it prints reads back to the same dump.
 */

const VALUE_COLUMN = 24;
const MIN_VALUE_WIDTH = 3;
const MAX_BARE_LENGTH = 80;

/** What stands in place of a shared secret unless it is asked for. */
const MASKED_SECRET = '"********"';

export interface DumpOptions {
  readonly nodeName: string;
  /** Only these resources, without the global and common sections; all (and those sections) if undefined. */
  readonly resources?: readonly string[];
  /** Fill in what each resource inherits, as `drbdadm -d dump` does. */
  readonly isExpanded?: boolean;
  /** Print shared secrets instead of stars. */
  readonly showSecrets?: boolean;
  readonly localAddresses?: readonly string[];
  /** The full path of the main file for the first line; the path as given without it. */
  readonly mainPath?: string;
}

/** Renders a configuration as text. */
export function dumpConfig(config: DrbdConfig, options: DumpOptions): string {
  const out: string[] = [];
  if (options.resources === undefined) {
    out.push(`# ${options.mainPath ?? config.path}`);
    dumpGlobal(config.global, out);
    if (config.common) {
      out.push('common {');
      dumpSections(config.common, options, out);
      out.push('}', '');
    }
  }
  for (const resource of config.resources) {
    if (options.resources !== undefined && !options.resources.includes(resource.name)) continue;
    dumpResource(options.isExpanded === true ? expandResource(config, resource) : resource, options, out);
  }
  return `${out.join('\n')}\n`;
}

/** Quotes a text where the grammar needs it. */
export function quoteValue(text: string): string {
  const isBare = text.length > 0 && text.length <= MAX_BARE_LENGTH && /^[A-Za-z0-9/._-]+$/.test(text);
  return isBare ? text : `"${text.replaceAll(/["\\]/g, '\\$&')}"`;
}

/** A name additionally needs quotes where a bare word would be read as a keyword or a number. */
function quoteName(text: string): string {
  return isKeyword(text) || /^[0-9]{1,8}[KMGkmgs]?$/.test(text) || /^[0-9]+(\.[0-9]+){3}$/.test(text)
    ? `"${text}"`
    : quoteValue(text);
}

/** One statement with its value in the value column, however deeply it is indented. */
function statement(indent: number, name: string, value: string): string {
  const width = Math.max(0, VALUE_COLUMN - indent);
  return `${' '.repeat(indent)}${name.padEnd(width)} ${value};`;
}

const GLOBAL_ORDER = [
  'disable-ip-verification',
  'minor-count',
  'dialog-refresh',
  'usage-count',
  'udev-always-use-vnr',
  'cmd-timeout-short',
  'cmd-timeout-medium',
  'cmd-timeout-long',
];

function dumpGlobal(settings: readonly Setting[], out: string[]): void {
  const last = new Map(settings.map((setting) => [setting.name, setting]));
  const lines = GLOBAL_ORDER.flatMap((name) => {
    const setting = last.get(name);
    if (!setting) return [];
    return [setting.value === undefined ? `    ${name};` : `    ${name} ${quoteValue(setting.value)};`];
  });
  if (lines.length > 0) out.push('global {', ...lines, '}', '');
}

function dumpSettings(
  section: string,
  settings: readonly Setting[],
  indent: number,
  options: DumpOptions,
  out: string[],
): void {
  if (settings.length === 0) return;
  out.push(`${' '.repeat(indent)}${section} {`, ...settings.map((setting) => optionLine(setting, indent + 4, options)));
  out.push(`${' '.repeat(indent)}}`);
}

function optionLine(setting: Setting, indent: number, options: DumpOptions): string {
  if (setting.value === undefined) return `${' '.repeat(indent)}${setting.name};`;
  const hosts = setting.name === 'become-primary-on';
  const isSecret = setting.name === 'shared-secret' && options.showSecrets !== true;
  const value = isSecret ? MASKED_SECRET : hosts ? setting.value : quoteValue(setting.value);
  return statement(indent, setting.name, hosts ? value : value.padStart(MIN_VALUE_WIDTH));
}

function dumpSections(sections: Sections, options: DumpOptions, out: string[]): void {
  dumpSettings('options', sections.options, 4, options, out);
  dumpSettings('net', sections.net, 4, options, out);
  dumpSettings('disk', sections.disk, 4, options, out);
  dumpSettings('startup', startupOrder(sections.startup), 4, options, out);
  if (sections.proxy.length > 0 || sections.proxyPlugins.length > 0) {
    out.push('    proxy {', ...sections.proxy.map((setting) => optionLine(setting, 8, options)));
    if (sections.proxyPlugins.length > 0)
      out.push('        plugin {', ...sections.proxyPlugins.map((line) => `            ${line};`), '        }');
    out.push('    }');
  }
  dumpSettings('handlers', sections.handlers, 4, options, out);
}

/** drbdadm keeps these two apart from the other startup options and prints them last, each once. */
function startupOrder(settings: readonly Setting[]): Setting[] {
  const special = ['stacked-timeouts', 'become-primary-on'];
  return [
    ...settings.filter((setting) => !special.includes(setting.name)),
    ...special.flatMap((name) => settings.findLast((setting) => setting.name === name) ?? []),
  ];
}

function dumpResource(resource: ResourceConfig, options: DumpOptions, out: string[]): void {
  const where: ResolveOptions = options.localAddresses === undefined ? {} : { localAddresses: options.localAddresses };
  const isStacked = resource.hosts.some((host) => host.kind === 'stacked');
  out.push(
    `# resource ${quoteValue(resource.name)} on ${options.nodeName}: ` +
      `${isForHost(resource, options.nodeName, where) ? 'not ignored' : 'ignored'}, ` +
      (isStacked ? 'stacked' : 'not stacked'),
    `# defined at ${resource.path}:${resource.line}`,
    `resource ${quoteName(resource.name)} {`,
  );
  for (const host of resource.hosts) dumpHost(host, options, out);
  dumpSections(resource.sections, options, out);
  out.push('}', '');
}

/** `ipv4 10.0.0.1:7788`, `ipv6 [fd00::1]:7788`. */
export function dumpAddress(address: Address): string {
  return address.family === 'ipv6' ? `ipv6 [${address.host}]:${address.port}` : `ipv4 ${address.host}:${address.port}`;
}

function dumpHost(host: HostConfig, options: DumpOptions, out: string[]): void {
  const names = host.names.map(quoteName).join(' ');
  if (host.kind === 'stacked') out.push(`    stacked-on-top-of ${quoteName(host.lowerResource!)} {`);
  else if (host.kind === 'floating') out.push(`    floating ${dumpAddress(host.address!)} {`);
  else out.push(`    on ${names} {`);
  dumpSettings('options', host.options, 8, options, out);
  for (const volume of host.volumes) dumpVolume(volume, host.kind === 'stacked', options, out);
  if (host.kind !== 'floating' && host.address) out.push(statement(8, 'address', dumpAddress(host.address)));
  if (host.proxy) {
    out.push(`        proxy on ${host.proxy.names.map(quoteName).join(' ')} {`);
    if (host.proxy.inside) out.push(statement(12, 'inside', dumpAddress(host.proxy.inside)));
    if (host.proxy.outside) out.push(statement(12, 'outside', dumpAddress(host.proxy.outside)));
    out.push('        }');
  }
  out.push('    }');
}

function dumpVolume(volume: VolumeConfig, isStacked: boolean, options: DumpOptions, out: string[]): void {
  const indent = volume.isImplicit ? 8 : 12;
  if (!volume.isImplicit) out.push(`        volume ${volume.number} {`);
  dumpSettings('disk', volume.diskOptions, indent, options, out);
  if (volume.device) {
    const { path, minor } = volume.device;
    out.push(statement(indent, 'device', path === undefined ? `minor ${minor}` : `${quoteValue(path)} minor ${minor}`));
  }
  if (!isStacked) {
    if (volume.disk !== undefined) out.push(statement(indent, 'disk', quoteValue(volume.disk)));
    if (volume.metaDisk?.kind === 'internal') out.push(statement(indent, 'meta-disk', 'internal'));
    else if (volume.metaDisk) {
      const slot = volume.metaDisk.kind === 'indexed' ? ` [${volume.metaDisk.index}]` : '';
      // A path named `internal` cannot be written; drbdadm pads this line as if it were not indented, and so do we.
      out.push(`${' '.repeat(indent)}${'meta-disk'.padEnd(16)} ${quoteValue(volume.metaDisk.path)}${slot};`);
    }
  }
  if (!volume.isImplicit) out.push('        }');
}

/**
 * Fills in what a resource inherits, in drbdadm's order: inherited settings in front of own ones, each step reversing
 * the outer ones.
 */
export function expandResource(config: DrbdConfig, resource: ResourceConfig): ResourceConfig {
  const { common } = config;
  const inherited = (inner: readonly Setting[], outer: readonly Setting[] | undefined): Setting[] => {
    const result = [...inner];
    for (const setting of outer ?? [])
      if (!result.some((other) => other.name === setting.name)) result.unshift(setting);
    return result;
  };
  const sections: Sections = {
    options: inherited(resource.sections.options, common?.options),
    net: inherited(resource.sections.net, common?.net),
    disk: inherited(resource.sections.disk, common?.disk),
    startup: inherited(resource.sections.startup, common?.startup),
    handlers: inherited(resource.sections.handlers, common?.handlers),
    proxy: inherited(resource.sections.proxy, common?.proxy),
    proxyPlugins:
      resource.sections.proxyPlugins.length > 0 ? resource.sections.proxyPlugins : (common?.proxyPlugins ?? []),
  };
  const hosts = resource.hosts.map((host) => ({
    ...host,
    volumes: host.volumes.map((volume) => {
      const device = volume.device && { path: `/dev/drbd${volume.device.minor}`, ...volume.device };
      return {
        ...volume,
        ...(device === undefined ? {} : { device }),
        diskOptions: inherited(volume.diskOptions, sections.disk),
      };
    }),
  }));
  return deepFreeze({ ...resource, sections, hosts });
}
