import type { Procedure } from '../../rpc/dispatcher.js';
import { isValidTime, SATTR3 } from '../attributes.js';
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

export interface MkdirArgs extends DirectoryArgs {
  readonly attributes: SetAttributes;
}

/** RFC 1813 section 3.3.9. */
export const MKDIR: Procedure<NfsService, MkdirArgs, CreateResult> = {
  name: 'MKDIR',
  replayable: true,
  isTransient: isJukebox,
  args: {
    encode: (writer, args) => {
      writeDirectoryArgs(writer, args);
      SATTR3.encode(writer, args.attributes);
    },
    decode: (reader) => ({ ...readDirectoryArgs(reader), attributes: SATTR3.decode(reader) }),
  },
  result: CREATE_RESULT,
  run: async (service, args, call) => {
    const target = service.open(call, args.directory);
    if (typeof target === 'number') return wccFailure(target);
    if (!target.options.writable) return wccRefusal(target, NfsStatus.NFS3ERR_ROFS);
    const nameStatus = checkNewName(args.name);
    if (nameStatus !== NfsStatus.NFS3_OK) return wccRefusal(target, nameStatus);
    const { atime, mtime, sizeBytes } = args.attributes;
    if (!isValidTime(atime) || !isValidTime(mtime) || sizeBytes !== undefined)
      return wccRefusal(target, NfsStatus.NFS3ERR_INVAL);
    const { filesystem, credential, kernel, durable } = target;
    return createResult(target, await filesystem.mkdir(credential, kernel, args.name, args.attributes, durable));
  },
};
