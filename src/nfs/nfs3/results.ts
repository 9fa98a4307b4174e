/** Arguments and results that several procedures share. */
import type { Codec, XdrReader, XdrWriter } from '../../rpc/xdr.js';
import { fsidOf, NO_WCC, readPostOp, readWcc, writePostOp, writeWcc } from '../attributes.js';
import { MAX_HANDLE_BYTES } from '../file-handle.js';
import type { Attributes, CreateOutcome, Wcc } from '../filesystem.js';
import type { Target } from '../service.js';
import { NfsStatus } from '../status.js';
import { MAX_WIRE_NAME_BYTES } from './name.js';

/** Every result: `status` is an nfsstat3, `fsid` goes into each set of attributes. */
export interface Result {
  readonly status: number;
  readonly fsid: bigint;
}

/** "Not executed, ask again": such a reply must not be kept for retransmissions. */
export function isJukebox(result: Result): boolean {
  return result.status === NfsStatus.NFS3ERR_JUKEBOX;
}

export function readHandle(reader: XdrReader): Uint8Array {
  return reader.opaque(MAX_HANDLE_BYTES);
}

export interface HandleArgs {
  readonly handle: Uint8Array;
}
export const HANDLE_ARGS: Codec<HandleArgs> = {
  encode: (writer, args) => writer.opaque(args.handle),
  decode: (reader) => ({ handle: readHandle(reader) }),
};

/** diropargs3 */
export interface DirectoryArgs {
  readonly directory: Uint8Array;
  readonly name: Uint8Array;
}

export function writeDirectoryArgs(writer: XdrWriter, args: DirectoryArgs): void {
  writer.opaque(args.directory);
  writer.opaque(args.name);
}

export function readDirectoryArgs(reader: XdrReader): DirectoryArgs {
  return { directory: readHandle(reader), name: reader.opaque(MAX_WIRE_NAME_BYTES) };
}
export const DIRECTORY_ARGS: Codec<DirectoryArgs> = { encode: writeDirectoryArgs, decode: readDirectoryArgs };

/** SETATTR, REMOVE, RMDIR, and every modifying procedure that failed: the same on success and failure. */
export interface WccResult extends Result {
  readonly wcc: Wcc;
}
export const WCC_RESULT: Codec<WccResult> = {
  encode: (writer, result) => {
    writer.u32(result.status);
    writeWcc(writer, result.wcc, result.fsid);
  },
  decode: (reader) => {
    const status = reader.u32();
    const wcc = readWcc(reader);
    return { status, wcc, fsid: fsidOf(wcc.after) };
  },
};

/** A modifying procedure that did not get to its object. */
export function wccFailure(status: number): WccResult {
  return { status, fsid: 0n, wcc: NO_WCC };
}

/** One that opened its object but tried nothing: attributes save the client a GETATTR. */
export async function wccRefusal(target: Target, status: number): Promise<WccResult> {
  const after = await target.attributes();
  return { status, fsid: target.fsid, wcc: after === undefined ? NO_WCC : { after } };
}

/** CREATE, MKDIR, SYMLINK, MKNOD. */
export interface CreateResult extends WccResult {
  readonly handle?: Uint8Array;
  readonly attributes?: Attributes;
}
export const CREATE_RESULT: Codec<CreateResult> = {
  encode: (writer, result) => {
    writer.u32(result.status);
    if (result.status === NfsStatus.NFS3_OK) {
      writer.bool(result.handle !== undefined);
      if (result.handle !== undefined) writer.opaque(result.handle);
      writePostOp(writer, result.attributes, result.fsid);
    }
    writeWcc(writer, result.wcc, result.fsid);
  },
  decode: (reader) => {
    const status = reader.u32();
    let handle: Uint8Array | undefined;
    let attributes: Attributes | undefined;
    if (status === NfsStatus.NFS3_OK) {
      handle = reader.bool() ? readHandle(reader) : undefined;
      attributes = readPostOp(reader);
    }
    const wcc = readWcc(reader);
    return {
      ...{ status, wcc, fsid: fsidOf(attributes, wcc.after) },
      ...(handle && { handle }),
      ...(attributes && { attributes }),
    };
  },
};

export function createResult(target: Target, outcome: CreateOutcome): CreateResult {
  return {
    status: target.status(outcome.errno),
    fsid: target.fsid,
    wcc: outcome.wcc,
    ...(outcome.handle && { handle: target.handleOf(outcome.handle) }),
    ...(outcome.attributes && { attributes: outcome.attributes }),
  };
}
