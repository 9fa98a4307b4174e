import type { Procedure } from '../../rpc/dispatcher.js';
import { fsidOf, NO_WCC, readWcc, writeWcc } from '../attributes.js';
import type { NfsService } from '../service.js';
import { NfsStatus } from '../status.js';
import { WRITE_VERIFIER_BYTES } from '../write-verifier.js';
import { readHandle, type WccResult } from './results.js';

export interface CommitArgs {
  readonly handle: Uint8Array;
  /** The whole file is committed, whatever the range. */
  readonly offsetBytes: number;
  readonly count: number;
}
export interface CommitResult extends WccResult {
  /** Present exactly when the status is NFS3_OK. */
  readonly verifier: Uint8Array | undefined;
}

/**
 * RFC 1813 section 3.3.21. OK only when everything written to the file before is on stable storage, on every connected
 * head.
 */
export const COMMIT: Procedure<NfsService, CommitArgs, CommitResult> = {
  name: 'COMMIT',
  args: {
    encode: (writer, args) => {
      writer.opaque(args.handle);
      writer.size64(args.offsetBytes);
      writer.u32(args.count);
    },
    decode: (reader) => ({ handle: readHandle(reader), offsetBytes: reader.size64(), count: reader.u32() }),
  },
  result: {
    encode: (writer, result) => {
      writer.u32(result.status);
      writeWcc(writer, result.wcc, result.fsid);
      if (result.verifier !== undefined) writer.fixed(result.verifier);
    },
    decode: (reader) => {
      const status = reader.u32();
      const wcc = readWcc(reader);
      const verifier = status === NfsStatus.NFS3_OK ? reader.fixed(WRITE_VERIFIER_BYTES) : undefined;
      return { status, wcc, verifier, fsid: fsidOf(wcc.after) };
    },
  },
  run: async (service, args, call) => {
    const target = service.open(call, args.handle);
    if (typeof target === 'number') return { status: target, fsid: 0n, wcc: NO_WCC, verifier: undefined };
    const sample = target.verifier.current;
    const outcome = await target.filesystem.commit(target.credential, target.kernel);
    const status = target.statusOfHandle(outcome.errno);
    const { fsid } = target;
    if (status === NfsStatus.NFS3_OK) return { status, fsid, wcc: outcome.wcc, verifier: sample };
    // What the kernel could not write back it may have dropped: every client must send its unstable data again, and
    // must know before it sees this failure.
    const isDataLost =
      status === NfsStatus.NFS3ERR_IO || status === NfsStatus.NFS3ERR_NOSPC || status === NfsStatus.NFS3ERR_DQUOT;
    if (isDataLost) target.verifier.renew();
    return { status, fsid, wcc: outcome.wcc, verifier: undefined };
  },
};
