import type { Procedure } from '../../rpc/dispatcher.js';
import { fsidOf, NO_WCC, readWcc, writeWcc } from '../attributes.js';
import type { Wcc } from '../filesystem.js';
import type { NfsService } from '../service.js';
import { NfsStatus } from '../status.js';
import { checkName, isDot, isDotDot } from './name.js';
import {
  type DirectoryArgs,
  isJukebox,
  type Result,
  readDirectoryArgs,
  wccRefusal,
  writeDirectoryArgs,
} from './results.js';

export interface RenameArgs {
  readonly from: DirectoryArgs;
  readonly to: DirectoryArgs;
}
export interface RenameResult extends Result {
  readonly from: Wcc;
  readonly to: Wcc;
}

function checkEnd(name: Uint8Array): number {
  return isDot(name) || isDotDot(name) ? NfsStatus.NFS3ERR_INVAL : checkName(name);
}

/** RFC 1813 section 3.3.14. */
export const RENAME: Procedure<NfsService, RenameArgs, RenameResult> = {
  name: 'RENAME',
  replayable: true,
  isTransient: isJukebox,
  args: {
    encode: (writer, args) => {
      writeDirectoryArgs(writer, args.from);
      writeDirectoryArgs(writer, args.to);
    },
    decode: (reader) => ({ from: readDirectoryArgs(reader), to: readDirectoryArgs(reader) }),
  },
  result: {
    encode: (writer, result) => {
      writer.u32(result.status);
      writeWcc(writer, result.from, result.fsid);
      writeWcc(writer, result.to, result.fsid);
    },
    decode: (reader) => {
      const status = reader.u32();
      const from = readWcc(reader);
      const to = readWcc(reader);
      return { status, from, to, fsid: fsidOf(from.after, to.after) };
    },
  },
  run: async (service, args, call) => {
    const from = service.open(call, args.from.directory);
    if (typeof from === 'number') return { status: from, fsid: 0n, from: NO_WCC, to: NO_WCC };
    const to = service.open(call, args.to.directory);
    if (typeof to === 'number') {
      const { fsid, wcc } = await wccRefusal(from, to);
      return { status: to, fsid, from: wcc, to: NO_WCC };
    }
    let status = checkEnd(args.from.name) || checkEnd(args.to.name);
    if (from.filesystem !== to.filesystem) status = NfsStatus.NFS3ERR_XDEV;
    else if (!from.options.writable) status = NfsStatus.NFS3ERR_ROFS;
    if (status !== NfsStatus.NFS3_OK) {
      const left = await wccRefusal(from, status);
      const right = await wccRefusal(to, status);
      // Attributes of another filesystem carry another fsid: leave them out.
      return { status, fsid: left.fsid, from: left.wcc, to: from.filesystem === to.filesystem ? right.wcc : NO_WCC };
    }
    const { filesystem, credential, kernel, durable } = from;
    const outcome = await filesystem.rename(credential, kernel, args.from.name, to.kernel, args.to.name, durable);
    return { status: from.status(outcome.errno), fsid: from.fsid, from: outcome.from, to: outcome.to };
  },
};
