import type { Procedure } from '../../rpc/dispatcher.js';
import { fsidOf, readPostOp, writePostOp } from '../attributes.js';
import type { Attributes } from '../filesystem.js';
import type { NfsService } from '../service.js';
import { NfsStatus } from '../status.js';
import { type Result, readHandle } from './results.js';

/** ACCESS3_* bits (RFC 1813 section 3.3.4). */
export const Access = { READ: 1, LOOKUP: 2, MODIFY: 4, EXTEND: 8, DELETE: 16, EXECUTE: 32 } as const;
const ALL = 0x3f;
const CHANGES = Access.MODIFY | Access.EXTEND | Access.DELETE;

export interface AccessArgs {
  readonly handle: Uint8Array;
  readonly mask: number;
}
export interface AccessResult extends Result {
  readonly attributes: Attributes | undefined;
  /** The bits asked for that are granted. */
  readonly granted: number;
}

/** RFC 1813 section 3.3.4. Advice to the client; every operation is judged on its own. */
export const ACCESS: Procedure<NfsService, AccessArgs, AccessResult> = {
  name: 'ACCESS',
  args: {
    encode: (writer, args) => {
      writer.opaque(args.handle);
      writer.u32(args.mask);
    },
    decode: (reader) => ({ handle: readHandle(reader), mask: reader.u32() }),
  },
  result: {
    encode: (writer, result) => {
      writer.u32(result.status);
      writePostOp(writer, result.attributes, result.fsid);
      if (result.status === NfsStatus.NFS3_OK) writer.u32(result.granted);
    },
    decode: (reader) => {
      const status = reader.u32();
      const attributes = readPostOp(reader);
      const granted = status === NfsStatus.NFS3_OK ? reader.u32() : 0;
      return { status, attributes, granted, fsid: fsidOf(attributes) };
    },
  },
  run: async (service, args, call) => {
    const target = service.open(call, args.handle);
    if (typeof target === 'number') return { status: target, fsid: 0n, attributes: undefined, granted: 0 };
    const mask = args.mask & (target.options.writable ? ALL : ALL & ~CHANGES);
    const outcome = await target.filesystem.access(target.credential, target.kernel, mask);
    return {
      status: target.statusOfHandle(outcome.errno),
      fsid: target.fsid,
      attributes: outcome.attributes,
      granted: outcome.granted & mask,
    };
  },
};
