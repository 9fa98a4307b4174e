import { hostname } from 'node:os';
import { resolve } from 'node:path';
import { ConfigError, formatDiagnostic } from '../config/diagnostic.js';
import { type DrbdConfig, loadConfig } from '../config/drbd-conf.js';
import { dumpConfig } from '../config/drbd-dump.js';
import { isForHost, missingAddresses, resolveResource, resourcesOfHost } from '../config/resource.js';
import { findConfig } from '../config/search.js';
import { fileConfigSource } from '../io/config-source.js';
import { localAddresses as addressesOfHost } from '../io/local-addresses.js';
import type { CliCommand, Environment } from './command.js';

interface Flags {
  readonly configFile?: string;
  readonly configToTest?: string;
  readonly dryRun?: boolean;
  readonly json?: boolean;
  readonly showSecrets?: boolean;
}

const HELP = `
Prints global, common and every resource in DRBD 8.4's own format; what it prints reads back as the same configuration.

Examples:
  drbdts dump                     what /etc/drbd.conf (or /etc/drbdts.conf) says
  drbdts dump data                one resource
  drbdts dump -d data             with everything it inherits, and without looking for its IP address here
  drbdts dump --json data         what this host will run: defaults filled in, units named
  drbdts -c new.conf dump -d      a file that is not installed yet

Exit codes: 0 printed, 1 no such resource, 10 invalid configuration or an address that is not on this host,
20 no file.`;

/** `drbdts dump`: what was understood of the configuration. */
export const dumpCommand: CliCommand = {
  register(program, environment, exit) {
    const command = program
      .command('dump')
      .description('print the configuration as understood')
      .argument('[resources...]', 'names of resources, or all')
      .option('-c, --config-file <file>', 'read this file instead of the usual ones ("-" is standard input)')
      .option('-t, --config-to-test <file>', 'read this file too, checking it against the others')
      .option('-d, --dry-run', 'fill in inherited options, and do not look for the addresses on this host')
      .option('--json', 'print what this host will run, as JSON')
      .option('--show-secrets', 'print shared secrets instead of stars')
      .addHelpText('after', HELP);
    command.action((resources: string[]) => {
      exit(dump(resources, command.optsWithGlobals<Flags>(), environment));
    });
  },
};

function dump(names: readonly string[], flags: Flags, environment: Environment): number {
  const search = findConfig(fileConfigSource, environment.env, hostname(), flags.configFile);
  if (search.notice !== undefined) environment.err(search.notice);
  try {
    const extra = flags.configToTest === undefined ? {} : { extraPath: flags.configToTest };
    const { config, warnings } = loadConfig(fileConfigSource, search.path, extra);
    for (const warning of warnings) environment.err(`${formatDiagnostic(warning)}\n`);
    const localAddresses = addressesOfHost();
    const missing = flags.dryRun === true ? [] : missingAddresses(config, search.nodeName, localAddresses);
    if (missing.length > 0) {
      for (const text of missing) environment.err(`${text}\n`);
      environment.err(`this host has ${localAddresses.join(', ')}; dump -d skips this check\n`);
      return 10;
    }
    const isAll = names.length === 0 || names.includes('all');
    const resources = isAll ? undefined : chooseResources(config, names, search.nodeName, localAddresses);
    if (flags.json === true) {
      environment.out(dumpJson(config, resources, search.nodeName, localAddresses, flags.showSecrets === true));
      return 0;
    }
    environment.out(
      dumpConfig(config, {
        nodeName: search.nodeName,
        ...(resources === undefined ? {} : { resources }),
        isExpanded: flags.dryRun === true,
        showSecrets: flags.showSecrets === true,
        localAddresses,
        mainPath: search.path === '-' ? 'STDIN' : resolve(search.path),
      }),
    );
    return 0;
  } catch (error) {
    if (!(error instanceof ConfigError)) throw error;
    // Without a prefix: the lines start with FILE:LINE, for people's editors and for whoever greps drbdadm's output.
    environment.err(`${error.message}\n`);
    return error.exitCode;
  }
}

/** @throws OperatorError (1) for the first name that is not defined for this host */
function chooseResources(
  config: DrbdConfig,
  names: readonly string[],
  nodeName: string,
  localAddresses: readonly string[],
): readonly string[] {
  for (const name of names) {
    const resource = config.resources.find((candidate) => candidate.name === name);
    // resolveResource has the sentence that says which names are known.
    if (!resource || !isForHost(resource, nodeName, { localAddresses }))
      resolveResource(config, name, nodeName, { localAddresses });
  }
  return names;
}

function dumpJson(
  config: DrbdConfig,
  resources: readonly string[] | undefined,
  nodeName: string,
  localAddresses: readonly string[],
  showSecrets: boolean,
): string {
  const names = resources ?? resourcesOfHost(config, nodeName, { localAddresses });
  const resolved = names.map((name) => {
    const resource = resolveResource(config, name, nodeName, { localAddresses });
    if (resource.net.sharedSecret === undefined || showSecrets) return resource;
    return { ...resource, net: { ...resource.net, sharedSecret: '********' } };
  });
  return `${JSON.stringify({ node: nodeName, files: config.files, resources: resolved }, null, 2)}\n`;
}
