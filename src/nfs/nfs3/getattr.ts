import type { Procedure } from '../../rpc/dispatcher.js';
import { readFattr3, writeFattr3 } from '../attributes.js';
import type { Attributes } from '../filesystem.js';
import type { NfsService } from '../service.js';
import { NfsStatus } from '../status.js';
import { HANDLE_ARGS, type HandleArgs, type Result } from './results.js';

export interface GetattrResult extends Result {
  /** Present exactly when the status is NFS3_OK. */
  readonly attributes: Attributes | undefined;
}

/** RFC 1813 section 3.3.1. Needs no permission on the object. */
export const GETATTR: Procedure<NfsService, HandleArgs, GetattrResult> = {
  name: 'GETATTR',
  args: HANDLE_ARGS,
  result: {
    encode: (writer, result) => {
      writer.u32(result.status);
      if (result.attributes !== undefined) writeFattr3(writer, result.attributes, result.fsid);
    },
    decode: (reader) => {
      const status = reader.u32();
      if (status !== NfsStatus.NFS3_OK) return { status, fsid: 0n, attributes: undefined };
      const attributes = readFattr3(reader);
      return { status, fsid: attributes.fsid, attributes };
    },
  },
  run: async (service, args, call) => {
    const target = service.open(call, args.handle, true);
    if (typeof target === 'number') return { status: target, fsid: 0n, attributes: undefined };
    const outcome = await target.filesystem.getattr(target.kernel);
    const status = target.statusOfHandle(outcome.errno);
    if (status !== NfsStatus.NFS3_OK) return { status, fsid: 0n, attributes: undefined };
    if (outcome.attributes === undefined) return { status: NfsStatus.NFS3ERR_IO, fsid: 0n, attributes: undefined };
    return { status, fsid: target.fsid, attributes: outcome.attributes };
  },
};
