import type { Procedure } from '../../rpc/dispatcher.js';
import { fsidOf, readPostOp, writePostOp } from '../attributes.js';
import type { Attributes } from '../filesystem.js';
import type { NfsService } from '../service.js';
import { NfsStatus } from '../status.js';
import { HANDLE_ARGS, type HandleArgs, type Result } from './results.js';

/** PATH_MAX of Linux; symbolic links are shorter. */
export const MAX_TARGET_BYTES = 4096;

export interface ReadlinkResult extends Result {
  readonly attributes: Attributes | undefined;
  /** Present exactly when the status is NFS3_OK. The text as it was made; the server never follows it. */
  readonly target: Uint8Array | undefined;
}

/** RFC 1813 section 3.3.5. */
export const READLINK: Procedure<NfsService, HandleArgs, ReadlinkResult> = {
  name: 'READLINK',
  args: HANDLE_ARGS,
  result: {
    encode: (writer, result) => {
      writer.u32(result.status);
      writePostOp(writer, result.attributes, result.fsid);
      if (result.target !== undefined) writer.opaque(result.target);
    },
    decode: (reader) => {
      const status = reader.u32();
      const attributes = readPostOp(reader);
      const target = status === NfsStatus.NFS3_OK ? reader.opaque(MAX_TARGET_BYTES) : undefined;
      return { status, attributes, target, fsid: fsidOf(attributes) };
    },
  },
  run: async (service, args, call) => {
    const target = service.open(call, args.handle);
    if (typeof target === 'number') return { status: target, fsid: 0n, attributes: undefined, target: undefined };
    const outcome = await target.filesystem.readlink(target.credential, target.kernel);
    const status = target.statusOfHandle(outcome.errno);
    const { attributes } = outcome;
    if (status !== NfsStatus.NFS3_OK || outcome.target === undefined)
      return { status: status || NfsStatus.NFS3ERR_IO, fsid: target.fsid, attributes, target: undefined };
    return { status, fsid: target.fsid, attributes, target: outcome.target };
  },
};
