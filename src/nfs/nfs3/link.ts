import type { Procedure } from '../../rpc/dispatcher.js';
import { fsidOf, NO_WCC, readPostOp, readWcc, writePostOp, writeWcc } from '../attributes.js';
import type { Attributes } from '../filesystem.js';
import type { NfsService } from '../service.js';
import { NfsStatus } from '../status.js';
import { checkNewName } from './name.js';
import {
  type DirectoryArgs,
  isJukebox,
  readDirectoryArgs,
  readHandle,
  type WccResult,
  wccRefusal,
  writeDirectoryArgs,
} from './results.js';

export interface LinkArgs extends DirectoryArgs {
  readonly handle: Uint8Array;
}
export interface LinkResult extends WccResult {
  /** The file's; `wcc` is the directory's. */
  readonly attributes: Attributes | undefined;
}

/** RFC 1813 section 3.3.15. */
export const LINK: Procedure<NfsService, LinkArgs, LinkResult> = {
  name: 'LINK',
  replayable: true,
  isTransient: isJukebox,
  args: {
    encode: (writer, args) => {
      writer.opaque(args.handle);
      writeDirectoryArgs(writer, args);
    },
    decode: (reader) => ({ handle: readHandle(reader), ...readDirectoryArgs(reader) }),
  },
  result: {
    encode: (writer, result) => {
      writer.u32(result.status);
      writePostOp(writer, result.attributes, result.fsid);
      writeWcc(writer, result.wcc, result.fsid);
    },
    decode: (reader) => {
      const status = reader.u32();
      const attributes = readPostOp(reader);
      const wcc = readWcc(reader);
      return { status, attributes, wcc, fsid: fsidOf(attributes, wcc.after) };
    },
  },
  run: async (service, args, call) => {
    const file = service.open(call, args.handle);
    if (typeof file === 'number') return { status: file, fsid: 0n, attributes: undefined, wcc: NO_WCC };
    const directory = service.open(call, args.directory);
    if (typeof directory === 'number')
      return { status: directory, fsid: file.fsid, attributes: await file.attributes(), wcc: NO_WCC };
    const isSameTree = file.filesystem === directory.filesystem;
    let status = checkNewName(args.name);
    if (!isSameTree) status = NfsStatus.NFS3ERR_XDEV;
    else if (!directory.options.writable) status = NfsStatus.NFS3ERR_ROFS;
    if (status !== NfsStatus.NFS3_OK) {
      const { wcc } = await wccRefusal(directory, status);
      return { status, fsid: file.fsid, attributes: await file.attributes(), wcc: isSameTree ? wcc : NO_WCC };
    }
    const { filesystem, credential, kernel, durable } = directory;
    const outcome = await filesystem.link(credential, file.kernel, kernel, args.name, durable);
    return {
      status: directory.status(outcome.errno),
      fsid: directory.fsid,
      attributes: outcome.attributes,
      wcc: outcome.wcc,
    };
  },
};
