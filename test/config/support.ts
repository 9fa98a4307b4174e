import { matchesGlob } from '../../src/base/glob.js';
import { ConfigError } from '../../src/config/diagnostic.js';
import { type DrbdConfig, loadConfig } from '../../src/config/drbd-conf.js';
import type { ConfigSource } from '../../src/config/source.js';

/** Files that exist only in the test; keys are full paths. */
export function mapSource(files: Readonly<Record<string, string>>): ConfigSource {
  return {
    read: (path) => (Object.hasOwn(files, path) ? files[path] : undefined),
    glob: (pattern) =>
      Object.keys(files)
        .filter((path) => matchesGlob(pattern, path))
        .sort(),
    realPath: (path) => path,
  };
}

/** The two host sections most tests need, and nothing else. */
export const HOSTS =
  'on alice { device minor 1; disk /dev/a; meta-disk internal; address 10.0.0.1:7788; }\n' +
  'on bob { device minor 1; disk /dev/a; meta-disk internal; address 10.0.0.2:7788; }';

/** A config in one file called t.conf. */
export function parse(text: string): DrbdConfig {
  return loadConfig(mapSource({ 't.conf': text }), 't.conf').config;
}

/** The diagnostics of a config that must be refused, as the operator reads them. */
export function errorsOf(text: string, files: Readonly<Record<string, string>> = {}): string {
  try {
    loadConfig(mapSource({ ...files, 't.conf': text }), 't.conf');
  } catch (error) {
    if (error instanceof ConfigError) return error.message;
    throw error;
  }
  throw new Error(`accepted: ${text}`);
}

/** The messages of the warnings of a config that must be accepted. */
export function warningsOf(text: string): string[] {
  return loadConfig(mapSource({ 't.conf': text }), 't.conf').warnings.map(
    (warning) => `${warning.line}: ${warning.message}`,
  );
}
