/** Where a listing that does not fit into one reply is cut. */
import type { DirectoryEntry } from '../filesystem.js';

/** cookieverf3 of the first request, and of clients that do not echo it. */
export const NO_COOKIE_VERIFIER = new Uint8Array(8);
/** Longest listing in one reply, whatever a client asks for. */
const MAX_LISTING_BYTES = 256 * 1024;
const MAX_ENTRIES = 4096;
/** Attributes of the directory, verifier, end of list, eof. The status is outside of what `count` bounds. */
const RESULT_BYTES = 88 + 8 + 4 + 4;

/**
 * The verifier is the filesystem's identity: positions stay good as long as the filesystem is the same, on either head.
 * A verifier made from mtime would restart every listing at each concurrent create.
 */
export function isKnownVerifier(cookie: bigint, verifier: Uint8Array, filesystemId: Uint8Array): boolean {
  if (cookie === 0n) return true;
  return verifier.every((byte) => byte === 0) || verifier.every((byte, index) => byte === filesystemId[index]);
}

/** How many entries may fit, so that not many more are read than are sent. */
export function maxEntriesFor(count: number, smallestEntryBytes: number): number {
  const room = Math.min(count, MAX_LISTING_BYTES) - RESULT_BYTES;
  return Math.max(2, Math.min(MAX_ENTRIES, Math.ceil(room / smallestEntryBytes)));
}

/**
 * How many of `entries` go into a result of `count` bytes.
 *
 * Entries whose names collide share one position, and a listing resumed there starts again at the first of them. So a
 * reply must not end on an entry that has the position of the entry before it.
 *
 * @param cookie the position that the listing started at
 */
export function cutEntries(
  entries: readonly DirectoryEntry[],
  cookie: bigint,
  count: number,
  sizeOf: (entry: DirectoryEntry) => number,
): number {
  let room = Math.min(count, MAX_LISTING_BYTES) - RESULT_BYTES;
  let cut = 0;
  while (cut < entries.length) {
    room -= sizeOf(entries[cut]!);
    if (room < 0) break;
    cut++;
  }
  if (cut === entries.length) return cut;
  while (cut > 0 && entries[cut - 1]!.cookie === (cut > 1 ? entries[cut - 2]!.cookie : cookie)) cut--;
  return cut;
}
