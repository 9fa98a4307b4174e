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

/** RFC 1813 section 3.3.12. */
export const REMOVE: Procedure<NfsService, DirectoryArgs, WccResult> = {
  name: 'REMOVE',
  replayable: true,
  isTransient: isJukebox,
  args: DIRECTORY_ARGS,
  result: WCC_RESULT,
  run: async (service, args, call) => {
    const target = service.open(call, args.directory);
    if (typeof target === 'number') return wccFailure(target);
    if (!target.options.writable) return wccRefusal(target, NfsStatus.NFS3ERR_ROFS);
    const isSpecial = isDot(args.name) || isDotDot(args.name);
    const nameStatus = isSpecial ? NfsStatus.NFS3ERR_INVAL : checkName(args.name);
    if (nameStatus !== NfsStatus.NFS3_OK) return wccRefusal(target, nameStatus);
    const { filesystem, credential, kernel, durable } = target;
    const outcome = await filesystem.remove(credential, kernel, args.name, durable);
    return { status: target.status(outcome.errno), fsid: target.fsid, wcc: outcome.wcc };
  },
};
