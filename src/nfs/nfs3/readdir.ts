import type { Procedure } from '../../rpc/dispatcher.js';
import { paddedLength } from '../../rpc/xdr.js';
import { fsidOf, readPostOp, writePostOp } from '../attributes.js';
import type { Attributes } from '../filesystem.js';
import type { NfsService } from '../service.js';
import { NfsStatus } from '../status.js';
import { cutEntries, isKnownVerifier, maxEntriesFor, NO_COOKIE_VERIFIER } from './directory-cut.js';
import { MAX_WIRE_NAME_BYTES } from './name.js';
import { type Result, readHandle } from './results.js';

export interface ReaddirArgs {
  readonly directory: Uint8Array;
  readonly cookie: bigint;
  readonly verifier: Uint8Array;
  /** Most bytes of the whole result. */
  readonly count: number;
}
export interface WireEntry {
  readonly fileId: bigint;
  readonly name: Uint8Array;
  readonly cookie: bigint;
}
export interface ReaddirResult extends Result {
  readonly directory: Attributes | undefined;
  readonly verifier: Uint8Array;
  readonly entries: readonly WireEntry[];
  readonly eof: boolean;
}

/** Value follows, fileid, name, cookie. */
const entryBytes = (entry: WireEntry) => 24 + paddedLength(entry.name.length);
const SMALLEST_ENTRY_BYTES = 28;

function failure(status: number, fsid = 0n, directory?: Attributes): ReaddirResult {
  return { status, fsid, directory, verifier: NO_COOKIE_VERIFIER, entries: [], eof: false };
}

/** RFC 1813 section 3.3.16. Cookies are the kernel's positions: good after a restart and on the other head. */
export const READDIR: Procedure<NfsService, ReaddirArgs, ReaddirResult> = {
  name: 'READDIR',
  args: {
    encode: (writer, args) => {
      writer.opaque(args.directory);
      writer.u64(args.cookie);
      writer.fixed(args.verifier);
      writer.u32(args.count);
    },
    decode: (reader) => ({
      directory: readHandle(reader),
      cookie: reader.u64(),
      verifier: reader.fixed(NO_COOKIE_VERIFIER.length),
      count: reader.u32(),
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
      }
      writer.bool(false);
      writer.bool(result.eof);
    },
    decode: (reader) => {
      const status = reader.u32();
      const directory = readPostOp(reader);
      const fsid = fsidOf(directory);
      if (status !== NfsStatus.NFS3_OK) return failure(status, fsid, directory);
      const verifier = reader.fixed(NO_COOKIE_VERIFIER.length);
      const entries: WireEntry[] = [];
      while (reader.bool())
        entries.push({ fileId: reader.u64(), name: reader.opaque(MAX_WIRE_NAME_BYTES), cookie: reader.u64() });
      return { status, fsid, directory, verifier, entries, eof: reader.bool() };
    },
  },
  run: async (service, args, call) => {
    const target = service.open(call, args.directory);
    if (typeof target === 'number') return failure(target);
    const { filesystem, credential, kernel, fsid } = target;
    if (!isKnownVerifier(args.cookie, args.verifier, filesystem.id))
      return failure(NfsStatus.NFS3ERR_BAD_COOKIE, fsid, await target.attributes());
    const maxEntries = maxEntriesFor(args.count, SMALLEST_ENTRY_BYTES);
    const outcome = await filesystem.readdir(credential, kernel, args.cookie, maxEntries, false);
    const status = target.statusOfHandle(outcome.errno);
    if (status !== NfsStatus.NFS3_OK)
      return failure(
        // The kernel's word for a position that no directory has.
        status === NfsStatus.NFS3ERR_INVAL ? NfsStatus.NFS3ERR_BAD_COOKIE : status,
        fsid,
        outcome.attributes,
      );
    const cut = cutEntries(outcome.entries, args.cookie, args.count, entryBytes);
    const eof = outcome.eof && cut === outcome.entries.length;
    if (cut === 0 && !eof) return failure(NfsStatus.NFS3ERR_TOOSMALL, fsid, outcome.attributes);
    const entries = outcome.entries.slice(0, cut);
    return { status, fsid, directory: outcome.attributes, verifier: filesystem.id, entries, eof };
  },
};
