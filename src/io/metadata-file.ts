import { spawnSync } from 'node:child_process';
import { closeSync, constants, fdatasyncSync, fstatSync, openSync, readFileSync, readSync, writeSync } from 'node:fs';
import { OperatorError } from '../base/errors.js';

const SECTOR_BYTES = 512;
/** flock(1): the lock is held by somebody else. */
const FLOCK_CONFLICT = 1;

export type LockKind = 'exclusive' | 'shared' | 'none';

export interface OpenMetadataOptions {
  readonly writable: boolean;
  readonly lock: LockKind;
}

/**
 * Synchronous access to a device or plain file for the offline commands. Short reads and writes are errors. While it is
 * open with a lock, no engine can take the device into use, and it cannot be opened while an engine has it.
 */
export class MetadataFile {
  private constructor(
    readonly path: string,
    private readonly fd: number,
    /** Whole size in sectors of 512 bytes. */
    readonly sizeSectors: number,
    /** Who holds the device if `lock` was `shared`, was not granted, and nothing is going to be written. */
    readonly heldBy: string | undefined,
  ) {}

  /**
   * Opens and locks. Block devices opened for writing are claimed, which a mounted one refuses.
   *
   * @throws OperatorError exit code 20: cannot be opened, is mounted, or is in use by an engine
   */
  static open(path: string, options: OpenMetadataOptions): MetadataFile {
    const fd = openDevice(path, options.writable);
    try {
      const heldBy = options.lock === 'none' ? undefined : lockDevice(fd, path, options);
      return new MetadataFile(path, fd, deviceSizeSectors(fd, path), heldBy);
    } catch (error) {
      closeSync(fd);
      throw error;
    }
  }

  /** Reads `lengthBytes` at `offsetBytes` into a new array. The caller has checked both against the size. */
  read(offsetBytes: number, lengthBytes: number): Uint8Array {
    const into = new Uint8Array(lengthBytes);
    for (let done = 0; done < lengthBytes; ) {
      const count = this.attempt('read', () => readSync(this.fd, into, done, lengthBytes - done, offsetBytes + done));
      if (count === 0)
        throw new OperatorError(`${this.path} ends at byte ${offsetBytes + done}, expected more data there`, 20, 'io');
      done += count;
    }
    return into;
  }

  /** Writes all of `bytes`; durable only after `flush`. */
  write(offsetBytes: number, bytes: Uint8Array): void {
    for (let done = 0; done < bytes.byteLength; )
      done += this.attempt('write', () => writeSync(this.fd, bytes, done, bytes.byteLength - done, offsetBytes + done));
  }

  /** Everything written is on stable storage afterwards. */
  flush(): void {
    this.attempt('flush', () => fdatasyncSync(this.fd));
  }

  /** Closes and unlocks. */
  close(): void {
    closeSync(this.fd);
  }

  private attempt<T>(what: string, operation: () => T): T {
    try {
      return operation();
    } catch (error) {
      throw new OperatorError(`${what} of ${this.path} failed: ${reasonOf(error)}`, 20, 'io');
    }
  }
}

/** Opens a plain file or a block device; the latter is claimed when it is going to be written. */
function openDevice(path: string, writable: boolean): number {
  const mode = writable ? constants.O_RDWR : constants.O_RDONLY;
  let fd: number;
  try {
    // A FIFO or a dead network device must not hang the command.
    fd = openSync(path, mode | constants.O_NONBLOCK | constants.O_NOCTTY);
  } catch (error) {
    throw new OperatorError(`open(${path}) failed: ${reasonOf(error)}`, 20, 'open-failed');
  }
  const stat = fstatSync(fd);
  if (stat.isBlockDevice()) {
    if (!writable) return fd;
    closeSync(fd);
    try {
      return openSync(path, mode | constants.O_EXCL | constants.O_NOCTTY);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === 'EBUSY')
        throw new OperatorError(
          `Device '${path}' is in use: the kernel has it mounted or claimed. ` +
            `Unmount it first (findmnt ${path} and lsblk ${path} show by what)`,
          20,
          'in-use',
        );
      throw new OperatorError(`open(${path}) failed: ${reasonOf(error)}`, 20, 'open-failed');
    }
  }
  if (stat.isFile()) return fd;
  closeSync(fd);
  throw new OperatorError(`'${path}' is not a block device!`, 20, 'open-failed');
}

function deviceSizeSectors(fd: number, path: string): number {
  const stat = fstatSync(fd);
  if (stat.isFile()) return Math.floor(stat.size / SECTOR_BYTES);
  const major = Number((BigInt(stat.rdev) >> 8n) & 0xfffn);
  const minor = Number((BigInt(stat.rdev) & 0xffn) | ((BigInt(stat.rdev) >> 12n) & 0xfff00n));
  try {
    return Number(readFileSync(`/sys/dev/block/${major}:${minor}/size`, 'utf8'));
  } catch (error) {
    throw new OperatorError(`the size of ${path} is unknown: ${reasonOf(error)}`, 20, 'open-failed');
  }
}

/**
 * Takes a flock. Node has none, but a lock belongs to the open file, not to the process: flock(1) takes it on the
 * descriptor it inherits, and it stays when flock(1) has gone.
 *
 * @returns who holds the device, if that does not matter because nothing is written
 */
function lockDevice(fd: number, path: string, options: OpenMetadataOptions): string | undefined {
  const result = spawnSync('flock', [options.lock === 'shared' ? '--shared' : '--exclusive', '--nonblock', '3'], {
    stdio: ['ignore', 'ignore', 'pipe', fd],
  });
  if (result.error)
    throw new OperatorError(
      `cannot lock ${path}: flock(1) does not start (${reasonOf(result.error)}); install util-linux`,
      20,
      'lock-failed',
    );
  if (result.status === 0) return undefined;
  if (result.status !== FLOCK_CONFLICT)
    throw new OperatorError(`cannot lock ${path}: ${result.stderr.toString().trim()}`, 20, 'lock-failed');
  const holder = lockHolder(fd);
  if (!options.writable) return holder;
  throw new OperatorError(
    `Device '${path}' is configured! It is in use by ${holder}. ` +
      'Stop the resource that has it attached first (drbdts down RESOURCE), then repeat the command',
    20,
    'in-use',
  );
}

/** Who has a flock on the file, by /proc/locks: `process 123 (drbdts)`. */
function lockHolder(fd: number): string {
  const inode = fstatSync(fd).ino;
  for (const line of readFileSync('/proc/locks', 'utf8').split('\n')) {
    const fields = line.trim().split(/\s+/);
    if (fields[1] !== 'FLOCK' || fields[5]?.split(':')[2] !== String(inode)) continue;
    const pid = fields[4]!;
    return `process ${pid} (${processName(pid)})`;
  }
  return 'another process';
}

function processName(pid: string): string {
  try {
    return readFileSync(`/proc/${pid}/comm`, 'utf8').trim();
  } catch {
    // It may end at any moment, or live in another namespace; its number still helps.
    return 'name unknown';
  }
}

const REASONS: Readonly<Record<string, string>> = {
  ENOENT: 'No such file or directory',
  EACCES: 'Permission denied',
  EPERM: 'Operation not permitted',
  EBUSY: 'Device or resource busy',
  EISDIR: 'Is a directory',
  ENXIO: 'No such device or address',
  ENODEV: 'No such device',
  ENOMEDIUM: 'No medium found',
  EROFS: 'Read-only file system',
  EIO: 'Input/output error',
  ENOSPC: 'No space left on device',
  ENOTDIR: 'Not a directory',
};

function reasonOf(error: unknown): string {
  const { code, message } = error as NodeJS.ErrnoException;
  return (code !== undefined && REASONS[code]) || message;
}
