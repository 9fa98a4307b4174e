/**
 * The native addon (`native/`), typed. The only importer of the `.node` file.
 */
import { existsSync } from 'node:fs';
import { createRequire } from 'node:module';
import { fileURLToPath } from 'node:url';
import { OperatorError } from '../base/errors.js';

/** The ring as `native/src/ring.rs` exports it; `native-ring.ts` wraps it. */
export interface NativeRingHandle {
  readonly backend: string;
  /** Bytes in allocated pool blocks. */
  readonly usedBytes: number;
  poolBuffer(): ArrayBuffer;
  poolControl(): ArrayBuffer;
  area(): ArrayBuffer;
  start(deliver: (count: number) => void): void;
  submit(): void;
  allocate(lengthBytes: number): number;
  free(offset: number): void;
  sendBytes(connection: number, bytes: Uint8Array): void;
  setFraming(connection: number, rule: Uint32Array, unconsumed: Uint8Array): void;
  listenTcp(host: string, port: number, receiveBytes: number, sendBytes: number): number;
  listenUnix(path: string): number;
  listenerPort(listener: number): number;
  closeListener(listener: number): void;
  connectTcp(
    host: string,
    port: number,
    localHost: string | undefined,
    receiveBytes: number,
    sendBytes: number,
  ): number;
  connectUnix(path: string): number;
  abort(connection: number, errno: number): void;
  openFile(path: string, flags: number): number;
  fileSize(file: number): number;
  fileAlignment(file: number): number;
  fileSeek(file: number, offsetBytes: number, hole: boolean): number;
  newTarget(): number;
  close(): void;
  crc32cPool(offset: number, lengthBytes: number, seed: number): number;
  crc32cRawPool(offset: number, lengthBytes: number): number;
  poolCopy(destination: number, source: number, lengthBytes: number): void;
  poolIsZero(offset: number, lengthBytes: number): boolean;
  poolZero(offset: number, lengthBytes: number): void;
}

/** One exported filesystem, as `native/src/posix_fs/class.rs` exports it; `posix-filesystem.ts` wraps it. */
export interface NativePosixFsHandle {
  readonly id: Uint8Array;
  readonly maxFileSizeBytes: number;
  readonly rootHandle: Uint8Array;
  /** Closes every descriptor on the tree, then completes `cookie`. */
  withdraw(cookie: number): void;
}

export interface NativeAddon {
  readonly NativeRing: new (poolBytes: number, backend: string) => NativeRingHandle;
  /** Executes the external operations of `target`. Throws a sentence that names path and cause. */
  readonly NativePosixFs: new (
    ring: NativeRingHandle,
    target: number,
    path: string,
    workers: number,
  ) => NativePosixFsHandle;
  /** Ordinary CRC-32C continuing from `seed` (0 to begin). */
  crc32c(bytes: Uint8Array, seed: number): number;
  /** CRC-32C with the register from 0, not inverted. */
  crc32cRaw(bytes: Uint8Array): number;
  /** Mounts a FUSE filesystem. @returns the number of a pseudo-connection, or minus an errno */
  mountFuse(ring: NativeRingHandle, directory: string, subtype: string, maxWriteBytes: number): number;
  /** Keeps touched pages of code, C heap, stack and ring pools in memory (not V8's heap). @returns 0 or an errno */
  lockMemory(): number;
  /** PR_SET_IO_FLUSHER; needs CAP_SYS_RESOURCE. @returns 0 or an errno */
  setIoFlusher(): number;
}

/**
 * Seen from `src/io` or `dist/io`, from a bundle in `build/`, or from a folder below that when tests are compiled too.
 */
const ADDON =
  [1, 2, 3, 4]
    .map((depth) => `${'../'.repeat(depth)}native/drbdts.node`)
    .map((path) => fileURLToPath(new URL(path, import.meta.url)))
    .find((path) => existsSync(path)) ?? 'native/drbdts.node';

let loaded: NativeAddon | undefined;

/**
 * The addon, loaded on first use.
 *
 * @throws OperatorError exit code 20, when it was not built or does not fit this Node
 */
export function native(): NativeAddon {
  if (loaded) return loaded;
  if (!existsSync(ADDON))
    throw new OperatorError(`${ADDON} is missing. Build it with: make build`, 20, 'native addon missing');
  try {
    loaded = createRequire(import.meta.url)(ADDON) as NativeAddon;
    return loaded;
  } catch (error) {
    const cause = (error as Error).message.split('\n')[0];
    throw new OperatorError(
      `The native addon cannot be loaded (${cause}). Build it with: make build`,
      20,
      'native addon missing',
    );
  }
}
