import { resolve } from 'node:path';
import { OperatorError } from '../base/errors.js';
import type { Environment } from './command.js';
import { resolveFromConfig } from './metadata-config.js';

/**
 * A configuration file as the daemon finds it, which stands in another folder and has another standard input.
 * @throws OperatorError (1) for `-`
 */
export function daemonsPath(file: string): string {
  if (file === '-') throw new OperatorError('-c -: the daemon reads files only', 1, 'usage');
  return resolve(file);
}

/**
 * That nothing runs under a name does not make it a good name: a mistyped one must not look stopped.
 * @throws OperatorError (1) when the configuration has no such resource for this host
 */
export function checkResourceName(name: string, environment: Environment, configFile: string | undefined): void {
  try {
    resolveFromConfig(name, environment, configFile);
  } catch (error) {
    // A broken or missing configuration is no reason for a stop to fail.
    if ((error as { reason?: string }).reason === 'not-defined') throw error;
  }
}
