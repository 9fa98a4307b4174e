import { closeSync, constants, fstatSync, openSync, readdirSync, readSync, realpathSync } from 'node:fs';
import { join } from 'node:path';
import { OperatorError } from '../base/errors.js';
import { matchesGlob } from '../base/glob.js';

/**
 * The most that is read of one file, in bytes: one more than the parsers accept, so that they see and refuse what is
 * too large. Standard input and special files cannot make us read for ever either.
 */
const MAX_READ_BYTES = 1024 * 1024 + 1;
const MAX_GLOB_RESULTS = 4096;
/** Error codes that mean there is no such file. */
const ABSENT: ReadonlySet<string> = new Set(['ENOENT', 'ENOTDIR']);

/** The real files behind config/'s parsers (its `ConfigSource`, to which this class conforms by shape). */
export class FileConfigSource {
  /**
   * The text of a file; `-` is standard input. Undefined if there is none.
   *
   * @throws OperatorError (20) if it is there and cannot be read: an unreadable file must not pass for an absent one,
   *   or a wrong permission would quietly withdraw every export
   */
  read(path: string): string | undefined {
    let fd = 0;
    try {
      // Not blocking: a FIFO in a configuration directory must not hang the command.
      if (path !== '-') fd = openSync(path, constants.O_RDONLY | constants.O_NONBLOCK);
    } catch (error) {
      if (ABSENT.has((error as NodeJS.ErrnoException).code ?? '')) return undefined;
      throw new OperatorError(`Can not open '${path}': ${(error as Error).message}`, 20, 'unreadable');
    }
    try {
      if (fd !== 0 && !fstatSync(fd).isFile())
        throw new OperatorError(`Can not read '${path}', expected a regular file (or - for standard input).`, 20);
      const buffer = Buffer.allocUnsafe(MAX_READ_BYTES);
      let length = 0;
      while (length < MAX_READ_BYTES) {
        const count = readSync(fd, buffer, length, MAX_READ_BYTES - length, null);
        if (count === 0) break;
        length += count;
      }
      return buffer.toString('utf8', 0, length);
    } catch (error) {
      if (error instanceof OperatorError) throw error;
      throw new OperatorError(`Can not read '${path}': ${(error as Error).message}`, 20, 'unreadable');
    } finally {
      if (fd !== 0) closeSync(fd);
    }
  }

  /** Paths matching a shell pattern, sorted by byte order; wildcards may stand in any component. */
  glob(pattern: string): string[] {
    const isAbsolute = pattern.startsWith('/');
    let found = [isAbsolute ? '/' : ''];
    for (const component of pattern.split('/').filter((part) => part !== ''))
      found = found.flatMap((base) => this.#expand(base, component)).slice(0, MAX_GLOB_RESULTS);
    return found.sort();
  }

  realPath(path: string): string {
    try {
      return path === '-' ? path : realpathSync(path);
    } catch {
      return path;
    }
  }

  #expand(base: string, component: string): string[] {
    const under = (name: string): string => (base === '' ? name : join(base, name));
    if (!/[*?[]/.test(component)) return [under(component)];
    if (component.length > 255) return [];
    let names: string[];
    try {
      names = readdirSync(base === '' ? '.' : base);
    } catch {
      // Like glob(3): a directory that is not there or not readable matches nothing.
      return [];
    }
    return names
      .filter((name) => (component.startsWith('.') || !name.startsWith('.')) && matchesGlob(component, name))
      .map(under);
  }
}

/** The one instance there need be: it holds nothing. */
export const fileConfigSource: FileConfigSource = new FileConfigSource();
