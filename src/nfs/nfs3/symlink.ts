import type { Procedure } from '../../rpc/dispatcher.js';
import { SATTR3 } from '../attributes.js';
import type { SetAttributes } from '../filesystem.js';
import type { NfsService } from '../service.js';
import { NfsStatus } from '../status.js';
import { checkNewName } from './name.js';
import {
  CREATE_RESULT,
  type CreateResult,
  createResult,
  type DirectoryArgs,
  isJukebox,
  readDirectoryArgs,
  wccFailure,
  wccRefusal,
  writeDirectoryArgs,
} from './results.js';

export interface SymlinkArgs extends DirectoryArgs {
  readonly attributes: SetAttributes;
  readonly target: Uint8Array;
}

/** Up to here a target is NFS3ERR_NAMETOOLONG, beyond GARBAGE_ARGS. */
const MAX_WIRE_TARGET_BYTES = 65536;
/** PATH_MAX of Linux, which counts a final NUL. */
const MAX_TARGET_BYTES = 4095;

function checkTarget(target: Uint8Array): number {
  if (target.length === 0 || target.includes(0)) return NfsStatus.NFS3ERR_INVAL;
  return target.length > MAX_TARGET_BYTES ? NfsStatus.NFS3ERR_NAMETOOLONG : NfsStatus.NFS3_OK;
}

/** RFC 1813 section 3.3.10. The target is kept as it is. */
export const SYMLINK: Procedure<NfsService, SymlinkArgs, CreateResult> = {
  name: 'SYMLINK',
  replayable: true,
  isTransient: isJukebox,
  args: {
    encode: (writer, args) => {
      writeDirectoryArgs(writer, args);
      SATTR3.encode(writer, args.attributes);
      writer.opaque(args.target);
    },
    decode: (reader) => ({
      ...readDirectoryArgs(reader),
      attributes: SATTR3.decode(reader),
      target: reader.opaque(MAX_WIRE_TARGET_BYTES),
    }),
  },
  result: CREATE_RESULT,
  run: async (service, args, call) => {
    const target = service.open(call, args.directory);
    if (typeof target === 'number') return wccFailure(target);
    if (!target.options.writable) return wccRefusal(target, NfsStatus.NFS3ERR_ROFS);
    const status = checkNewName(args.name) || checkTarget(args.target);
    if (status !== NfsStatus.NFS3_OK) return wccRefusal(target, status);
    const { filesystem, credential, kernel, durable } = target;
    const outcome = await filesystem.symlink(credential, kernel, args.name, args.target, args.attributes, durable);
    return createResult(target, outcome);
  },
};
