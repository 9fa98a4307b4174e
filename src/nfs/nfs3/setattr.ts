import type { Procedure } from '../../rpc/dispatcher.js';
import { isValidTime, SATTR3, TIME } from '../attributes.js';
import type { SetAttributes, TimeSpec } from '../filesystem.js';
import type { NfsService } from '../service.js';
import { NfsStatus } from '../status.js';
import { isJukebox, readHandle, WCC_RESULT, type WccResult, wccFailure, wccRefusal } from './results.js';

export interface SetattrArgs {
  readonly handle: Uint8Array;
  readonly changes: SetAttributes;
  /** The object's ctime must be this, else NFS3ERR_NOT_SYNC. */
  readonly guard: TimeSpec | undefined;
}

/** RFC 1813 section 3.3.2. */
export const SETATTR: Procedure<NfsService, SetattrArgs, WccResult> = {
  name: 'SETATTR',
  replayable: true,
  isTransient: isJukebox,
  args: {
    encode: (writer, args) => {
      writer.opaque(args.handle);
      SATTR3.encode(writer, args.changes);
      writer.bool(args.guard !== undefined);
      if (args.guard !== undefined) TIME.encode(writer, args.guard);
    },
    decode: (reader) => ({
      handle: readHandle(reader),
      changes: SATTR3.decode(reader),
      guard: reader.bool() ? TIME.decode(reader) : undefined,
    }),
  },
  result: WCC_RESULT,
  run: async (service, args, call) => {
    const target = service.open(call, args.handle);
    if (typeof target === 'number') return wccFailure(target);
    if (!target.options.writable) return wccRefusal(target, NfsStatus.NFS3ERR_ROFS);
    const { changes } = args;
    if (!isValidTime(changes.atime) || !isValidTime(changes.mtime)) return wccRefusal(target, NfsStatus.NFS3ERR_INVAL);
    if (changes.sizeBytes !== undefined && changes.sizeBytes > Number.MAX_SAFE_INTEGER)
      return wccRefusal(target, NfsStatus.NFS3ERR_FBIG);
    const { filesystem, credential, kernel, durable } = target;
    const outcome = await filesystem.setattr(credential, kernel, changes, args.guard, durable);
    return { status: target.statusOfHandle(outcome.errno), fsid: target.fsid, wcc: outcome.wcc };
  },
};
