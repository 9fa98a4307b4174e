import { hostname } from 'node:os';
import { OperatorError } from '../base/errors.js';
import { ConfigError, formatDiagnostic } from '../config/diagnostic.js';
import { type DrbdConfig, loadConfig } from '../config/drbd-conf.js';
import { type ExportTable, parseExports, readExports } from '../config/exports.js';
import { missingAddresses, type ResolvedResource, resolveResource, resourcesOfHost } from '../config/resource.js';
import { findConfig } from '../config/search.js';
import { fileConfigSource } from '../io/config-source.js';
import { localAddresses } from '../io/local-addresses.js';

const EXIT_INVALID = 10;

function load(
  env: Readonly<Record<string, string | undefined>>,
  configFile: string | undefined,
): { config: DrbdConfig; nodeName: string; warnings: string[]; addresses: string[] } {
  const search = findConfig(fileConfigSource, env, hostname(), configFile);
  const addresses = localAddresses();
  try {
    const { config, warnings } = loadConfig(fileConfigSource, search.path, {});
    return { config, nodeName: search.nodeName, warnings: warnings.map(formatDiagnostic), addresses };
  } catch (error) {
    throw asOperatorError(error);
  }
}

function asOperatorError(error: unknown): unknown {
  return error instanceof ConfigError ? new OperatorError(error.message, EXIT_INVALID, 'invalid-config') : error;
}

/** @throws OperatorError (10) with every mistake in the exports files; nothing is half taken */
export function loadExports(file: string): { readonly table: ExportTable; readonly warnings: readonly string[] } {
  try {
    const { table, warnings } = parseExports(readExports(fileConfigSource, file));
    return { table, warnings: warnings.map(formatDiagnostic) };
  } catch (error) {
    throw asOperatorError(error);
  }
}

/**
 * One resource as this host runs it, read afresh.
 * @throws OperatorError: 10 invalid configuration or an own address that this host does not have, 1 no such resource
 */
export function loadResource(
  env: Readonly<Record<string, string | undefined>>,
  configFile: string | undefined,
  name: string,
): { readonly resource: ResolvedResource; readonly warnings: readonly string[] } {
  const { config, nodeName, warnings, addresses } = load(env, configFile);
  const resource = resolveResource(config, name, nodeName, { localAddresses: addresses });
  const missing = missingAddresses(
    { ...config, resources: config.resources.filter((one) => one.name === name) },
    nodeName,
    addresses,
  );
  if (missing.length > 0)
    throw new OperatorError(`${missing.join('\n')}\nThis host has: ${addresses.join(' ')}`, EXIT_INVALID, 'no-address');
  return { resource, warnings };
}

/** The resources that have a section for this host. */
export function resourceNames(
  env: Readonly<Record<string, string | undefined>>,
  configFile: string | undefined,
): string[] {
  const { config, nodeName, addresses } = load(env, configFile);
  return resourcesOfHost(config, nodeName, { localAddresses: addresses });
}
