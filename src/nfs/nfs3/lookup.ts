import type { Procedure } from '../../rpc/dispatcher.js';
import { fsidOf, readPostOp, writePostOp } from '../attributes.js';
import type { Attributes } from '../filesystem.js';
import type { NfsService } from '../service.js';
import { NfsStatus } from '../status.js';
import { checkName, isDotDot } from './name.js';
import { DIRECTORY_ARGS, type DirectoryArgs, type Result, readHandle } from './results.js';

export interface LookupResult extends Result {
  /** Present exactly when the status is NFS3_OK. */
  readonly handle: Uint8Array | undefined;
  readonly attributes: Attributes | undefined;
  readonly directory: Attributes | undefined;
}

const DOT = Uint8Array.of(0x2e);

function failure(status: number, fsid = 0n, directory?: Attributes): LookupResult {
  return { status, fsid, handle: undefined, attributes: undefined, directory };
}

/** RFC 1813 section 3.3.3. `..` of an export's root is the root itself. */
export const LOOKUP: Procedure<NfsService, DirectoryArgs, LookupResult> = {
  name: 'LOOKUP',
  args: DIRECTORY_ARGS,
  result: {
    encode: (writer, result) => {
      writer.u32(result.status);
      if (result.handle !== undefined) {
        writer.opaque(result.handle);
        writePostOp(writer, result.attributes, result.fsid);
      }
      writePostOp(writer, result.directory, result.fsid);
    },
    decode: (reader) => {
      const status = reader.u32();
      const isFound = status === NfsStatus.NFS3_OK;
      const handle = isFound ? readHandle(reader) : undefined;
      const attributes = isFound ? readPostOp(reader) : undefined;
      const directory = readPostOp(reader);
      return { status, handle, attributes, directory, fsid: fsidOf(attributes, directory) };
    },
  },
  run: async (service, args, call) => {
    const target = service.open(call, args.directory);
    if (typeof target === 'number') return failure(target);
    const nameStatus = checkName(args.name);
    if (nameStatus !== NfsStatus.NFS3_OK) return failure(nameStatus, target.fsid, await target.attributes());
    const name = isDotDot(args.name) && target.isRoot ? DOT : args.name;
    const outcome = await target.filesystem.lookup(target.credential, target.kernel, name);
    const status = target.status(outcome.errno);
    if (status !== NfsStatus.NFS3_OK) return failure(status, target.fsid, outcome.directory);
    if (outcome.handle === undefined) return failure(NfsStatus.NFS3ERR_IO, target.fsid, outcome.directory);
    return {
      status,
      fsid: target.fsid,
      handle: target.handleOf(outcome.handle),
      attributes: outcome.attributes,
      directory: outcome.directory,
    };
  },
};
