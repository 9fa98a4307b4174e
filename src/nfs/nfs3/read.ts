import type { Procedure } from '../../rpc/dispatcher.js';
import { paddedLength } from '../../rpc/xdr.js';
import { fsidOf, readPostOp, writePostOp } from '../attributes.js';
import type { Attributes } from '../filesystem.js';
import type { NfsService } from '../service.js';
import { NfsStatus } from '../status.js';
import { MAX_TRANSFER_BYTES } from './fsinfo.js';
import { type Result, readHandle } from './results.js';

export interface ReadArgs {
  readonly handle: Uint8Array;
  readonly offsetBytes: number;
  readonly count: number;
}
export interface ReadResult extends Result {
  readonly attributes: Attributes | undefined;
  readonly count: number;
  readonly eof: boolean;
  /** The server's data: a pool block (one reference, which goes with the reply), or -1. */
  readonly payload: number;
  /** The client's data: a view of the reply. */
  readonly data?: Uint8Array;
}

const NO_PAYLOAD = -1;
/** Beyond every file, and small enough that adding a count stays exact. */
const MAX_OFFSET_BYTES = Number.MAX_SAFE_INTEGER - MAX_TRANSFER_BYTES;

function failure(status: number, fsid = 0n, attributes?: Attributes): ReadResult {
  return { status, fsid, attributes, count: 0, eof: false, payload: NO_PAYLOAD };
}

/** RFC 1813 section 3.3.6. The data goes from the filesystem to the socket in one pool block, never through a copy. */
export const READ: Procedure<NfsService, ReadArgs, ReadResult> = {
  name: 'READ',
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
      writePostOp(writer, result.attributes, result.fsid);
      if (result.status !== NfsStatus.NFS3_OK) return;
      writer.u32(result.count);
      writer.bool(result.eof);
      if (result.data !== undefined) writer.opaque(result.data);
      else {
        writer.u32(result.count);
        if (result.payload !== NO_PAYLOAD) writer.attach(result.payload, paddedLength(result.count));
      }
    },
    decode: (reader) => {
      const status = reader.u32();
      const attributes = readPostOp(reader);
      const fsid = fsidOf(attributes);
      if (status !== NfsStatus.NFS3_OK) return failure(status, fsid, attributes);
      const count = reader.u32();
      const eof = reader.bool();
      const data = reader.opaque(MAX_TRANSFER_BYTES);
      return { status, fsid, attributes, count, eof, payload: NO_PAYLOAD, data };
    },
  },
  run: async (service, args, call) => {
    const target = service.open(call, args.handle);
    if (typeof target === 'number') return failure(target);
    const offsetBytes = Math.min(args.offsetBytes, MAX_OFFSET_BYTES);
    const count = Math.min(args.count, MAX_TRANSFER_BYTES);
    const { filesystem, credential, kernel } = target;
    const outcome = await filesystem.read(credential, kernel, offsetBytes, count);
    const status = target.statusOfHandle(outcome.errno);
    if (status !== NfsStatus.NFS3_OK) return failure(status, target.fsid, outcome.attributes);
    const { payload } = outcome;
    // Pool blocks are multiples of 4096 long, so that padding always fits behind the data.
    if (payload !== NO_PAYLOAD)
      service.memory.bytes.fill(0, payload + outcome.count, payload + paddedLength(outcome.count));
    return {
      status,
      fsid: target.fsid,
      attributes: outcome.attributes,
      count: outcome.count,
      eof: outcome.eof,
      payload,
    };
  },
};
