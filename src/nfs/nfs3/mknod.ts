import type { Procedure } from '../../rpc/dispatcher.js';
import { SATTR3 } from '../attributes.js';
import { FileType, type SetAttributes } from '../filesystem.js';
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

export interface MknodArgs extends DirectoryArgs {
  /** FileType.* */
  readonly type: number;
  readonly attributes: SetAttributes;
  readonly rdevMajor: number;
  readonly rdevMinor: number;
}

/** Linux device numbers: 12 and 20 bits. */
const MAX_MAJOR = 0xfff;
const MAX_MINOR = 0xfffff;

const isDevice = (type: number) => type === FileType.CHR || type === FileType.BLK;
const isPipe = (type: number) => type === FileType.SOCK || type === FileType.FIFO;

/** RFC 1813 section 3.3.11. The server never opens what it makes here. */
export const MKNOD: Procedure<NfsService, MknodArgs, CreateResult> = {
  name: 'MKNOD',
  replayable: true,
  isTransient: isJukebox,
  args: {
    encode: (writer, args) => {
      writeDirectoryArgs(writer, args);
      writer.u32(args.type);
      if (isDevice(args.type) || isPipe(args.type)) SATTR3.encode(writer, args.attributes);
      if (!isDevice(args.type)) return;
      writer.u32(args.rdevMajor);
      writer.u32(args.rdevMinor);
    },
    decode: (reader) => {
      const base = readDirectoryArgs(reader);
      const type = reader.enumeration(FileType.FIFO, FileType.REG);
      const attributes = isDevice(type) || isPipe(type) ? SATTR3.decode(reader) : {};
      const rdevMajor = isDevice(type) ? reader.u32() : 0;
      const rdevMinor = isDevice(type) ? reader.u32() : 0;
      return { ...base, type, attributes, rdevMajor, rdevMinor };
    },
  },
  result: CREATE_RESULT,
  run: async (service, args, call) => {
    const target = service.open(call, args.directory);
    if (typeof target === 'number') return wccFailure(target);
    if (!target.options.writable) return wccRefusal(target, NfsStatus.NFS3ERR_ROFS);
    const nameStatus = checkNewName(args.name);
    if (nameStatus !== NfsStatus.NFS3_OK) return wccRefusal(target, nameStatus);
    if (!isDevice(args.type) && !isPipe(args.type)) return wccRefusal(target, NfsStatus.NFS3ERR_BADTYPE);
    if (args.rdevMajor > MAX_MAJOR || args.rdevMinor > MAX_MINOR) return wccRefusal(target, NfsStatus.NFS3ERR_INVAL);
    const { filesystem, credential, kernel, durable } = target;
    const { name, type, attributes, rdevMajor, rdevMinor } = args;
    return createResult(
      target,
      await filesystem.mknod(credential, kernel, name, type, attributes, rdevMajor, rdevMinor, durable),
    );
  },
};
