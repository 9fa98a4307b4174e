import type { Procedure } from '../../rpc/dispatcher.js';
import { paddedLength } from '../../rpc/xdr.js';
import { fsidOf, readPostOp, writePostOp } from '../attributes.js';
import type { Attributes, DirectoryEntry } from '../filesystem.js';
import type { NfsService, Target } from '../service.js';
import { NfsStatus } from '../status.js';
import { cutEntries, isKnownVerifier, maxEntriesFor, NO_COOKIE_VERIFIER } from './directory-cut.js';
import { isDotDot, MAX_WIRE_NAME_BYTES } from './name.js';
import type { WireEntry } from './readdir.js';
import { type Result, readHandle } from './results.js';

export interface ReaddirplusArgs {
  readonly directory: Uint8Array;
  readonly cookie: bigint;
  readonly verifier: Uint8Array;
  /** Most bytes of names, cookies and file ids: a hint, `maxCount` is what counts. */
  readonly directoryCount: number;
  /** Most bytes of the whole result. */
  readonly maxCount: number;
}
export interface WireEntryPlus extends WireEntry {
  readonly attributes: Attributes | undefined;
  readonly handle: Uint8Array | undefined;
}
export interface ReaddirplusResult extends Result {
  readonly directory: Attributes | undefined;
  readonly verifier: Uint8Array;
  readonly entries: readonly WireEntryPlus[];
  readonly eof: boolean;
}

/** Of a file handle beside its kernel handle: header and MAC. */
const HANDLE_OVERHEAD_BYTES = 20;
/** A short name with attributes and handle. */
const SMALLEST_ENTRY_BYTES = 28 + 88 + 40;

function entryBytes(entry: DirectoryEntry): number {
  const handle = entry.handle === undefined ? 0 : 4 + paddedLength(entry.handle.length + HANDLE_OVERHEAD_BYTES);
  return 24 + paddedLength(entry.name.length) + (entry.attributes === undefined ? 4 : 88) + 4 + handle;
}

function failure(status: number, fsid = 0n, directory?: Attributes): ReaddirplusResult {
  return { status, fsid, directory, verifier: NO_COOKIE_VERIFIER, entries: [], eof: false };
}

function wireEntry(target: Target, isRoot: boolean, entry: DirectoryEntry): WireEntryPlus {
  const { fileId, name, cookie } = entry;
  // What is above an export is nobody's business.
  if (isRoot && isDotDot(name)) return { fileId, name, cookie, attributes: undefined, handle: undefined };
  const handle = entry.handle === undefined ? undefined : target.handleOf(entry.handle);
  return { fileId, name, cookie, attributes: entry.attributes, handle };
}

/** RFC 1813 section 3.3.17. */
export const READDIRPLUS: Procedure<NfsService, ReaddirplusArgs, ReaddirplusResult> = {
  name: 'READDIRPLUS',
  args: {
    encode: (writer, args) => {
      writer.opaque(args.directory);
      writer.u64(args.cookie);
      writer.fixed(args.verifier);
      writer.u32(args.directoryCount);
      writer.u32(args.maxCount);
    },
    decode: (reader) => ({
      directory: readHandle(reader),
      cookie: reader.u64(),
      verifier: reader.fixed(NO_COOKIE_VERIFIER.length),
      directoryCount: reader.u32(),
      maxCount: reader.u32(),
    }),
  },
  result: {
    encode: (writer, result) => {
      writer.u32(result.status);
      writePostOp(writer, result.directory, result.fsid);
      if (result.status !== NfsStatus.NFS3_OK) return;
      writer.fixed(result.verifier);
      for (const entry of result.entries) {
        writer.bool(true);
        writer.u64(entry.fileId);
        writer.opaque(entry.name);
        writer.u64(entry.cookie);
        writePostOp(writer, entry.attributes, result.fsid);
        writer.bool(entry.handle !== undefined);
        if (entry.handle !== undefined) writer.opaque(entry.handle);
      }
      writer.bool(false);
      writer.bool(result.eof);
    },
    decode: (reader) => {
      const status = reader.u32();
      const directory = readPostOp(reader);
      if (status !== NfsStatus.NFS3_OK) return failure(status, fsidOf(directory), directory);
      const verifier = reader.fixed(NO_COOKIE_VERIFIER.length);
      const entries: WireEntryPlus[] = [];
      while (reader.bool())
        entries.push({
          fileId: reader.u64(),
          name: reader.opaque(MAX_WIRE_NAME_BYTES),
          cookie: reader.u64(),
          attributes: readPostOp(reader),
          handle: reader.bool() ? readHandle(reader) : undefined,
        });
      const fsid = fsidOf(directory, ...entries.map((entry) => entry.attributes));
      return { status, fsid, directory, verifier, entries, eof: reader.bool() };
    },
  },
  run: async (service, args, call) => {
    const target = service.open(call, args.directory);
    if (typeof target === 'number') return failure(target);
    const { filesystem, credential, kernel, fsid } = target;
    if (!target.options.readdirPlus) return failure(NfsStatus.NFS3ERR_NOTSUPP, fsid, await target.attributes());
    if (!isKnownVerifier(args.cookie, args.verifier, filesystem.id))
      return failure(NfsStatus.NFS3ERR_BAD_COOKIE, fsid, await target.attributes());
    const maxEntries = maxEntriesFor(args.maxCount, SMALLEST_ENTRY_BYTES);
    const outcome = await filesystem.readdir(credential, kernel, args.cookie, maxEntries, true);
    const status = target.statusOfHandle(outcome.errno);
    if (status !== NfsStatus.NFS3_OK)
      return failure(
        status === NfsStatus.NFS3ERR_INVAL ? NfsStatus.NFS3ERR_BAD_COOKIE : status,
        fsid,
        outcome.attributes,
      );
    const cut = cutEntries(outcome.entries, args.cookie, args.maxCount, entryBytes);
    const eof = outcome.eof && cut === outcome.entries.length;
    if (cut === 0 && !eof) return failure(NfsStatus.NFS3ERR_TOOSMALL, fsid, outcome.attributes);
    const { isRoot } = target;
    const entries = outcome.entries.slice(0, cut).map((entry) => wireEntry(target, isRoot, entry));
    return { status, fsid, directory: outcome.attributes, verifier: filesystem.id, entries, eof };
  },
};
