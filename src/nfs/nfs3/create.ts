import type { Procedure } from '../../rpc/dispatcher.js';
import { isValidTime, SATTR3 } from '../attributes.js';
import type { CreateHow } from '../filesystem.js';
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

export interface CreateArgs extends DirectoryArgs {
  readonly how: CreateHow;
}

const KINDS = ['unchecked', 'guarded', 'exclusive'] as const;
const CREATE_VERIFIER_BYTES = 8;

/** RFC 1813 section 3.3.8. */
export const CREATE: Procedure<NfsService, CreateArgs, CreateResult> = {
  name: 'CREATE',
  replayable: true,
  isTransient: isJukebox,
  args: {
    encode: (writer, args) => {
      writeDirectoryArgs(writer, args);
      writer.u32(KINDS.indexOf(args.how.kind));
      if (args.how.kind === 'exclusive') writer.fixed(args.how.verifier);
      else SATTR3.encode(writer, args.how.attributes);
    },
    decode: (reader) => {
      const { directory, name } = readDirectoryArgs(reader);
      const kind = KINDS[reader.enumeration(KINDS.length - 1)]!;
      const how: CreateHow =
        kind === 'exclusive'
          ? { kind, verifier: reader.fixed(CREATE_VERIFIER_BYTES) }
          : { kind, attributes: SATTR3.decode(reader) };
      return { directory, name, how };
    },
  },
  result: CREATE_RESULT,
  run: async (service, args, call) => {
    const target = service.open(call, args.directory);
    if (typeof target === 'number') return wccFailure(target);
    if (!target.options.writable) return wccRefusal(target, NfsStatus.NFS3ERR_ROFS);
    const nameStatus = checkNewName(args.name);
    if (nameStatus !== NfsStatus.NFS3_OK) return wccRefusal(target, nameStatus);
    if (args.how.kind !== 'exclusive') {
      const { atime, mtime, sizeBytes } = args.how.attributes;
      if (!isValidTime(atime) || !isValidTime(mtime)) return wccRefusal(target, NfsStatus.NFS3ERR_INVAL);
      if (sizeBytes !== undefined && sizeBytes > Number.MAX_SAFE_INTEGER)
        return wccRefusal(target, NfsStatus.NFS3ERR_FBIG);
    }
    const { filesystem, credential, kernel, durable } = target;
    return createResult(target, await filesystem.create(credential, kernel, args.name, args.how, durable));
  },
};
