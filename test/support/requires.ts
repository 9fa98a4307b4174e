import { appendFileSync, existsSync } from 'node:fs';
import { delimiter, join } from 'node:path';

/** Where `make test` collects what was skipped for want of a package, one line each; it prints them at the end. */
const SKIPPED_FILE = process.env.DRBDTS_SKIPPED;

/** @returns the path of an executable in PATH (and the sbin folders), or undefined */
export function findProgram(program: string): string | undefined {
  const folders = [...(process.env.PATH ?? '').split(delimiter), '/usr/sbin', '/sbin', '/usr/local/sbin'];
  return folders.map((folder) => join(folder, program)).find((path) => existsSync(path));
}

const told = new Set<string>();

/**
 * Whether an independent tool is here; a test that needs it is skipped otherwise, counted and named:
 *
 * ```ts
 * it.runIf(requires('nbdinfo', 'libnbd-bin'))('is described by nbdinfo', ...)
 * ```
 *
 * `make test` installs these packages when run as root. With DRBDTS_INSTALL=1 they must be there, and a missing one
 * fails the test file.
 *
 * @param need a program in PATH, or an absolute path (a device, a module's file)
 * @param packageName the Debian package that brings it
 */
export function requires(need: string, packageName: string): boolean {
  if (need.startsWith('/') ? existsSync(need) : findProgram(need) !== undefined) return true;
  if (process.env.DRBDTS_INSTALL === '1') throw new Error(`${need} is missing: apt-get install ${packageName}`);
  const line = `tests that need ${need}: apt-get install ${packageName}`;
  if (!told.has(line)) {
    told.add(line);
    if (SKIPPED_FILE !== undefined) appendFileSync(SKIPPED_FILE, `${line}\n`);
    else process.stderr.write(`skipped: ${line}\n`);
  }
  return false;
}
