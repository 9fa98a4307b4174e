/**
 * How the parsers of this folder reach files; they never open one themselves. The production door is
 * `io/config-source.ts`, tests use maps.
 */
export interface ConfigSource {
  /**
   * The text of a file (UTF-8, damaged bytes replaced), or undefined if there is none.
   *
   * @throws OperatorError if there is one and it cannot be read
   */
  read(path: string): string | undefined;
  /** Paths matching a shell pattern (`*`, `?`, `[...]`), sorted; a leading dot of a name is only matched literally. */
  glob(pattern: string): string[];
  /** The path with symbolic links resolved; the same file has one real path. Returns `path` if it does not exist. */
  realPath(path: string): string;
}

/** The largest file that is read, in bytes. drbd.conf files are a few KiB. */
export const MAX_CONFIG_FILE_BYTES = 1024 * 1024;

/** The directory part of a POSIX path; '.' if there is none. */
export function directoryOf(path: string): string {
  const slash = path.lastIndexOf('/');
  if (slash < 0) return '.';
  return slash === 0 ? '/' : path.slice(0, slash);
}

/** Resolves `path` against `directory` unless it is absolute. */
export function joinPath(directory: string, path: string): string {
  if (path.startsWith('/') || directory === '.') return path;
  return directory.endsWith('/') ? directory + path : `${directory}/${path}`;
}
