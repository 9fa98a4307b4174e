import type { Procedure } from '../../rpc/dispatcher.js';
import { paddedLength } from '../../rpc/xdr.js';
import { fsidOf, NO_WCC, readWcc, writeWcc } from '../attributes.js';
import { Stability, type Wcc } from '../filesystem.js';
import type { NfsService } from '../service.js';
import { NfsStatus } from '../status.js';
import { WRITE_VERIFIER_BYTES } from '../write-verifier.js';
import { MAX_TRANSFER_BYTES } from './fsinfo.js';
import { isJukebox, type Result, readHandle, type WccResult, wccRefusal } from './results.js';

export interface WriteArgs {
  readonly handle: Uint8Array;
  readonly offsetBytes: number;
  readonly count: number;
  /** Stability.* */
  readonly stability: number;
  readonly data: Uint8Array;
  /** Where the data stands in the received record's memory: a pool address at the server. */
  readonly address: number;
}
export interface WriteResult extends Result {
  readonly wcc: Wcc;
  readonly count: number;
  /** Stability.*: what was really done. */
  readonly committed: number;
  readonly verifier: Uint8Array;
}

const NO_VERIFIER = new Uint8Array(WRITE_VERIFIER_BYTES);
const MAX_FILE_OFFSET = 2 ** 63;

function failure({ status, fsid, wcc }: WccResult): WriteResult {
  return { status, fsid, wcc, count: 0, committed: Stability.UNSTABLE, verifier: NO_VERIFIER };
}

/** RFC 1813 section 3.3.7. The data stays in the record's pool block; only its address goes to the filesystem. */
export const WRITE: Procedure<NfsService, WriteArgs, WriteResult> = {
  name: 'WRITE',
  // A late copy must not roll back what a newer WRITE wrote.
  replayable: true,
  isTransient: isJukebox,
  args: {
    encode: (writer, args) => {
      writer.opaque(args.handle);
      writer.size64(args.offsetBytes);
      writer.u32(args.count);
      writer.u32(args.stability);
      writer.opaque(args.data);
    },
    decode: (reader) => {
      const handle = readHandle(reader);
      const offsetBytes = reader.size64();
      const count = reader.u32();
      const stability = reader.enumeration(Stability.FILE_SYNC);
      const length = reader.opaqueLength(reader.remaining);
      const address = reader.position;
      reader.skip(paddedLength(length));
      return { handle, offsetBytes, count, stability, data: reader.bytes.subarray(address, address + length), address };
    },
  },
  result: {
    encode: (writer, result) => {
      writer.u32(result.status);
      writeWcc(writer, result.wcc, result.fsid);
      if (result.status !== NfsStatus.NFS3_OK) return;
      writer.u32(result.count);
      writer.u32(result.committed);
      writer.fixed(result.verifier);
    },
    decode: (reader) => {
      const status = reader.u32();
      const wcc = readWcc(reader);
      const fsid = fsidOf(wcc.after);
      if (status !== NfsStatus.NFS3_OK) return failure({ status, fsid, wcc });
      const count = reader.u32();
      const committed = reader.enumeration(Stability.FILE_SYNC);
      return { status, fsid, wcc, count, committed, verifier: reader.fixed(WRITE_VERIFIER_BYTES) };
    },
  },
  run: async (service, args, call) => {
    const target = service.open(call, args.handle);
    if (typeof target === 'number') return failure({ status: target, fsid: 0n, wcc: NO_WCC });
    if (!target.options.writable) return failure(await wccRefusal(target, NfsStatus.NFS3ERR_ROFS));
    if (args.count > args.data.length) return failure(await wccRefusal(target, NfsStatus.NFS3ERR_INVAL));
    if (args.offsetBytes + args.count >= MAX_FILE_OFFSET || args.offsetBytes > Number.MAX_SAFE_INTEGER)
      return failure(await wccRefusal(target, NfsStatus.NFS3ERR_FBIG));
    const count = Math.min(args.count, MAX_TRANSFER_BYTES);
    const { filesystem, credential, kernel, durable, verifier } = target;
    // Taken before the data is: if data is lost meanwhile, the client sees a value that is no longer current.
    const sample = verifier.current;
    const stability = durable ? args.stability : Stability.UNSTABLE;
    const outcome = await filesystem.write(credential, kernel, args.offsetBytes, args.address, count, stability);
    const status = target.statusOfHandle(outcome.errno);
    // Earlier unstable data may have gone the same way: everybody must send again.
    if (status === NfsStatus.NFS3ERR_IO) verifier.renew();
    return {
      status,
      fsid: target.fsid,
      wcc: outcome.wcc,
      count: outcome.count,
      committed: durable ? outcome.committed : args.stability,
      verifier: sample,
    };
  },
};
