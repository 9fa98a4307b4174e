import type { ConfigSource } from './source.js';

/** Where the main configuration is looked for, in this order. */
export const DEFAULT_CONFIG_PATHS: readonly string[] = [
  '/etc/drbdts.conf',
  '/etc/drbd-84.conf',
  '/etc/drbd-83.conf',
  '/etc/drbd-82.conf',
  '/etc/drbd-08.conf',
  '/etc/drbd.conf',
];

export interface ConfigSearch {
  /** The main file; if nothing exists, the last place looked at, so that "Can not open" names the usual file. */
  readonly path: string;
  readonly nodeName: string;
  /** What drbdadm says on stderr when __DRBD_NODE__ is set; DRBDTS_NODE does the same without the noise. */
  readonly notice?: string;
}

/**
 * Finds the main configuration file and the name this host goes by in it.
 *
 * @param env the environment: `DRBDTS_NODE` or `__DRBD_NODE__` replace the host name
 * @param hostName what `uname -n` says
 * @param explicitPath `-c FILE`, which replaces the search
 */
export function findConfig(
  source: ConfigSource,
  env: Readonly<Record<string, string | undefined>>,
  hostName: string,
  explicitPath?: string,
): ConfigSearch {
  const path =
    explicitPath ??
    DEFAULT_CONFIG_PATHS.find((candidate) => source.read(candidate) !== undefined) ??
    DEFAULT_CONFIG_PATHS.at(-1)!;
  const quiet = env['DRBDTS_NODE'];
  if (quiet) return { path, nodeName: quiet };
  const pretended = env['__DRBD_NODE__'];
  if (!pretended) return { path, nodeName: hostName };
  return {
    path,
    nodeName: pretended,
    notice: `\n   found __DRBD_NODE__ in environment\n   PRETENDING that I am >>${pretended}<<\n\n`,
  };
}
