import type { Procedure } from '../../rpc/dispatcher.js';
import type { NfsService } from '../service.js';
import { NfsStatus } from '../status.js';
import { checkName, isDot, isDotDot } from './name.js';
import {
  DIRECTORY_ARGS,
  type DirectoryArgs,
  isJukebox,
  WCC_RESULT,
  type WccResult,
  wccFailure,
  wccRefusal,
} from './results.js';

function checkRemovable(name: Uint8Array): number {
  if (isDot(name)) return NfsStatus.NFS3ERR_INVAL;
  // A directory's parent holds at least the directory.
  return isDotDot(name) ? NfsStatus.NFS3ERR_NOTEMPTY : checkName(name);
}

/** RFC 1813 section 3.3.13. */
export const RMDIR: Procedure<NfsService, DirectoryArgs, WccResult> = {
  name: 'RMDIR',
  replayable: true,
  isTransient: isJukebox,
  args: DIRECTORY_ARGS,
  result: WCC_RESULT,
  run: async (service, args, call) => {
    const target = service.open(call, args.directory);
    if (typeof target === 'number') return wccFailure(target);
    if (!target.options.writable) return wccRefusal(target, NfsStatus.NFS3ERR_ROFS);
    const nameStatus = checkRemovable(args.name);
    if (nameStatus !== NfsStatus.NFS3_OK) return wccRefusal(target, nameStatus);
    const { filesystem, credential, kernel, durable } = target;
    const outcome = await filesystem.rmdir(credential, kernel, args.name, durable);
    return { status: target.status(outcome.errno), fsid: target.fsid, wcc: outcome.wcc };
  },
};
