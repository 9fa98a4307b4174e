/** The attribute types of RFC 1813 section 2.6 as XDR, in both directions. */
import type { Codec, XdrReader, XdrWriter } from '../rpc/xdr.js';
import type { Attributes, SetAttributes, TimeSpec, Wcc } from './filesystem.js';

/** Attributes as they stand in a reply: with the filesystem's identity, which a result carries once for all of them. */
export interface WireAttributes extends Attributes {
  readonly fsid: bigint;
}

const U32_MAX = 0xffff_ffff;
const U64_MAX = 0xffff_ffff_ffff_ffffn;

/**
 * Seconds before 1970 or after 2106 cannot be said: the nearest that can (a wrapped year is worse than a clamped one).
 */
function writeTime(writer: XdrWriter, time: TimeSpec): void {
  writer.u32(Math.min(U32_MAX, Math.max(0, time.seconds)));
  writer.u32(time.nanoseconds);
}

function readTime(reader: XdrReader): TimeSpec {
  return { seconds: reader.u32(), nanoseconds: reader.u32() };
}
export const TIME: Codec<TimeSpec> = { encode: writeTime, decode: readTime };

/** fattr3: 84 bytes. */
export function writeFattr3(writer: XdrWriter, attributes: Attributes, fsid: bigint): void {
  writer.u32(attributes.type);
  writer.u32(attributes.mode);
  writer.u32(attributes.linkCount);
  writer.u32(attributes.uid);
  writer.u32(attributes.gid);
  writer.size64(attributes.sizeBytes);
  writer.size64(attributes.usedBytes);
  writer.u32(attributes.rdevMajor);
  writer.u32(attributes.rdevMinor);
  writer.u64(fsid & U64_MAX);
  writer.u64(attributes.fileId & U64_MAX);
  writeTime(writer, attributes.atime);
  writeTime(writer, attributes.mtime);
  writeTime(writer, attributes.ctime);
}

export function readFattr3(reader: XdrReader): WireAttributes {
  const type = reader.enumeration(7, 1);
  const mode = reader.u32();
  const linkCount = reader.u32();
  const uid = reader.u32();
  const gid = reader.u32();
  const sizeBytes = reader.size64();
  const usedBytes = reader.size64();
  const rdevMajor = reader.u32();
  const rdevMinor = reader.u32();
  const fsid = reader.u64();
  const fileId = reader.u64();
  const atime = readTime(reader);
  const mtime = readTime(reader);
  const ctime = readTime(reader);
  return {
    ...{ type, mode, linkCount, uid, gid, sizeBytes, usedBytes, rdevMajor, rdevMinor, fsid, fileId },
    ...{ atime, mtime, ctime },
  };
}

/** post_op_attr */
export function writePostOp(writer: XdrWriter, attributes: Attributes | undefined, fsid: bigint): void {
  writer.bool(attributes !== undefined);
  if (attributes !== undefined) writeFattr3(writer, attributes, fsid);
}

export function readPostOp(reader: XdrReader): WireAttributes | undefined {
  return reader.bool() ? readFattr3(reader) : undefined;
}

/** wcc_data */
export function writeWcc(writer: XdrWriter, wcc: Wcc, fsid: bigint): void {
  const { before } = wcc;
  writer.bool(before !== undefined);
  if (before !== undefined) {
    writer.size64(before.sizeBytes);
    writeTime(writer, before.mtime);
    writeTime(writer, before.ctime);
  }
  writePostOp(writer, wcc.after, fsid);
}

export function readWcc(reader: XdrReader): Wcc {
  const before = reader.bool()
    ? { sizeBytes: reader.size64(), mtime: readTime(reader), ctime: readTime(reader) }
    : undefined;
  const after = readPostOp(reader);
  return { ...(before && { before }), ...(after && { after }) };
}

/** What is known about a directory or file when nothing could be obtained. */
export const NO_WCC: Wcc = {};

/** The fsid of the first attributes that a decoded result has; they all have the same. */
export function fsidOf(...candidates: readonly (Attributes | undefined)[]): bigint {
  for (const candidate of candidates) if (candidate !== undefined) return (candidate as WireAttributes).fsid;
  return 0n;
}

const TimeHow = { DONT_CHANGE: 0, SET_TO_SERVER_TIME: 1, SET_TO_CLIENT_TIME: 2 } as const;

function writeSetTime(writer: XdrWriter, time: 'now' | TimeSpec | undefined): void {
  if (time === undefined) writer.u32(TimeHow.DONT_CHANGE);
  else if (time === 'now') writer.u32(TimeHow.SET_TO_SERVER_TIME);
  else {
    writer.u32(TimeHow.SET_TO_CLIENT_TIME);
    writeTime(writer, time);
  }
}

function readSetTime(reader: XdrReader): 'now' | TimeSpec | undefined {
  const how = reader.enumeration(TimeHow.SET_TO_CLIENT_TIME);
  if (how === TimeHow.DONT_CHANGE) return undefined;
  return how === TimeHow.SET_TO_SERVER_TIME ? 'now' : readTime(reader);
}

function writeOptionalU32(writer: XdrWriter, value: number | undefined): void {
  writer.bool(value !== undefined);
  if (value !== undefined) writer.u32(value);
}

/** sattr3. Mode bits beyond 07777 are dropped: some clients send the file type in them. */
export const SATTR3: Codec<SetAttributes> = {
  encode: (writer, changes) => {
    writeOptionalU32(writer, changes.mode);
    writeOptionalU32(writer, changes.uid);
    writeOptionalU32(writer, changes.gid);
    writer.bool(changes.sizeBytes !== undefined);
    if (changes.sizeBytes !== undefined) writer.size64(changes.sizeBytes);
    writeSetTime(writer, changes.atime);
    writeSetTime(writer, changes.mtime);
  },
  decode: (reader) => {
    const mode = reader.bool() ? reader.u32() & 0o7777 : undefined;
    const uid = reader.bool() ? reader.u32() : undefined;
    const gid = reader.bool() ? reader.u32() : undefined;
    const sizeBytes = reader.bool() ? reader.size64() : undefined;
    const atime = readSetTime(reader);
    const mtime = readSetTime(reader);
    return {
      ...(mode !== undefined && { mode }),
      ...(uid !== undefined && { uid }),
      ...(gid !== undefined && { gid }),
      ...(sizeBytes !== undefined && { sizeBytes }),
      ...(atime !== undefined && { atime }),
      ...(mtime !== undefined && { mtime }),
    };
  },
};

/** Whether a client's time can be set: nanoseconds below a second. */
export function isValidTime(time: 'now' | TimeSpec | undefined): boolean {
  return time === undefined || time === 'now' || time.nanoseconds < 1_000_000_000;
}
