/**
 * Payloads of negotiation options: decoding what a client sent, encoding what we answer. Nothing here remembers
 * anything.
 */
import { assert } from '../base/assert.js';
import {
  BASE_ALLOCATION,
  MAX_ERROR_TEXT_BYTES,
  MAX_META_QUERIES,
  NBD_INFO_BLOCK_SIZE,
  type NBD_INFO_DESCRIPTION,
  NBD_INFO_EXPORT,
  type NBD_INFO_NAME,
  NBD_MAX_STRING_BYTES,
  NBD_OPTION_REPLY_MAGIC,
} from './constants.js';

const utf8 = new TextDecoder('utf-8', { fatal: true });
const encoder = new TextEncoder();

/** What a client is told about an export. */
export interface ExportDescription {
  readonly sizeBytes: number;
  /** NBD_FLAG_* bits; NBD_FLAG_SEND_DF is added here when structured replies were negotiated. */
  readonly transmissionFlags: number;
  /** Human text, empty for none. */
  readonly description: string;
  /** Answer to NBD_INFO_BLOCK_SIZE; absent: say nothing, which means 1 / 4096 / 32 MiB. */
  readonly blockSizes?: {
    readonly minimumBytes: number;
    readonly preferredBytes: number;
    readonly maximumBytes: number;
  };
}

/** NBD_OPT_INFO and NBD_OPT_GO. */
export interface InfoRequest {
  readonly exportName: string;
  readonly infoTypes: readonly number[];
}

/** NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT. */
export interface MetaContextRequest {
  readonly exportName: string;
  readonly queries: readonly string[];
}

/** Why an option payload is refused with NBD_REP_ERR_INVALID (or TOO_BIG); the text goes to the client. */
export class OptionRefusal {
  constructor(
    readonly text: string,
    readonly tooBig: boolean = false,
  ) {}
}

/** @returns the string, or undefined unless it is UTF-8 of at most 4096 bytes without NUL (proto.md "Conventions") */
export function decodeString(bytes: Uint8Array): string | undefined {
  if (bytes.length > NBD_MAX_STRING_BYTES || bytes.includes(0)) return undefined;
  try {
    return utf8.decode(bytes);
  } catch {
    return undefined; // not UTF-8: the decoder throws nothing else
  }
}

/**
 * Decodes { u32 name length, name, u16 count, count x u16 type }. Lengths are checked against the payload before any is
 * used; the sums cannot overflow, because 32-bit lengths are added as doubles.
 */
export function decodeInfoRequest(data: Uint8Array): InfoRequest | OptionRefusal {
  if (data.length < 6) return new OptionRefusal('option data is too short');
  const view = viewOf(data);
  const nameLength = view.getUint32(0);
  if (nameLength > data.length - 6) return new OptionRefusal('name length exceeds the option data');
  const infoCount = view.getUint16(4 + nameLength);
  if (data.length !== 6 + nameLength + 2 * infoCount)
    return new OptionRefusal('count of information requests does not match the option data');
  const exportName = decodeString(data.subarray(4, 4 + nameLength));
  if (exportName === undefined) return new OptionRefusal('export name is not a valid string');
  const infoTypes: number[] = [];
  for (let at = 6 + nameLength; at < data.length; at += 2) infoTypes.push(view.getUint16(at));
  return { exportName, infoTypes };
}

/** Decodes { u32 name length, name, u32 count, count x { u32 length, query } }. */
export function decodeMetaContextRequest(data: Uint8Array): MetaContextRequest | OptionRefusal {
  if (data.length < 8) return new OptionRefusal('option data is too short');
  const view = viewOf(data);
  const nameLength = view.getUint32(0);
  if (nameLength > data.length - 8) return new OptionRefusal('name length exceeds the option data');
  const exportName = decodeString(data.subarray(4, 4 + nameLength));
  if (exportName === undefined) return new OptionRefusal('export name is not a valid string');
  const queryCount = view.getUint32(4 + nameLength);
  const queries: string[] = [];
  let at = 8 + nameLength;
  if (queryCount > (data.length - at) / 4) return new OptionRefusal('count of queries exceeds the option data');
  if (queryCount > MAX_META_QUERIES) return new OptionRefusal(`more than ${MAX_META_QUERIES} queries`, true);
  for (let index = 0; index < queryCount; index++) {
    if (data.length - at < 4) return new OptionRefusal('count of queries exceeds the option data');
    const queryLength = view.getUint32(at);
    at += 4;
    if (queryLength > data.length - at) return new OptionRefusal('query length exceeds the option data');
    const query = decodeString(data.subarray(at, at + queryLength));
    if (query === undefined) return new OptionRefusal('query is not a valid string');
    queries.push(query);
    at += queryLength;
  }
  if (at !== data.length) return new OptionRefusal('data after the last query');
  return { exportName, queries };
}

/**
 * Whether queries name `base:allocation`, the only context there is. Unknown name spaces and queries without a colon
 * are no hits and no errors. Listing knows two wildcards, no query at all and `base:`; selecting knows none.
 */
export function selectsBaseAllocation(queries: readonly string[], listing: boolean): boolean {
  if (listing && (queries.length === 0 || queries.includes('base:'))) return true;
  return queries.includes(BASE_ALLOCATION);
}

/** One option reply: header and data. */
export function encodeOptionReply(option: number, replyType: number, data: Uint8Array = new Uint8Array(0)): Uint8Array {
  const bytes = new Uint8Array(20 + data.length);
  const view = viewOf(bytes);
  view.setUint32(0, NBD_OPTION_REPLY_MAGIC[0]);
  view.setUint32(4, NBD_OPTION_REPLY_MAGIC[1]);
  view.setUint32(8, option);
  view.setUint32(12, replyType);
  view.setUint32(16, data.length);
  bytes.set(data, 20);
  return bytes;
}

/** UTF-8 of a text for humans, cut to 256 bytes at a character's end. */
export function encodeErrorText(text: string): Uint8Array {
  const bytes = encoder.encode(text);
  if (bytes.length <= MAX_ERROR_TEXT_BYTES) return bytes;
  let end = MAX_ERROR_TEXT_BYTES;
  while ((bytes[end]! & 0xc0) === 0x80) end--;
  return bytes.subarray(0, end);
}

/** Data of NBD_REP_SERVER. */
export function encodeServer(exportName: string, description: string): Uint8Array {
  const name = encoder.encode(exportName);
  const details = encoder.encode(description);
  const data = new Uint8Array(4 + name.length + details.length);
  viewOf(data).setUint32(0, name.length);
  data.set(name, 4);
  data.set(details, 4 + name.length);
  return data;
}

/** Data of NBD_REP_META_CONTEXT. */
export function encodeMetaContext(id: number, name: string): Uint8Array {
  const text = encoder.encode(name);
  const data = new Uint8Array(4 + text.length);
  viewOf(data).setUint32(0, id);
  data.set(text, 4);
  return data;
}

/** Data of NBD_REP_INFO for NBD_INFO_EXPORT. */
export function encodeInfoExport(sizeBytes: number, transmissionFlags: number): Uint8Array {
  const data = new Uint8Array(12);
  const view = viewOf(data);
  view.setUint16(0, NBD_INFO_EXPORT);
  view.setBigUint64(2, BigInt(sizeBytes));
  view.setUint16(10, transmissionFlags);
  return data;
}

/** Data of NBD_REP_INFO for NBD_INFO_NAME and NBD_INFO_DESCRIPTION. */
export function encodeInfoText(infoType: typeof NBD_INFO_NAME | typeof NBD_INFO_DESCRIPTION, text: string): Uint8Array {
  const bytes = encoder.encode(text);
  const data = new Uint8Array(2 + bytes.length);
  viewOf(data).setUint16(0, infoType);
  data.set(bytes, 2);
  return data;
}

/** Data of NBD_REP_INFO for NBD_INFO_BLOCK_SIZE; checks the rules of proto.md "Size constraints". */
export function encodeInfoBlockSize(sizes: NonNullable<ExportDescription['blockSizes']>): Uint8Array {
  const { minimumBytes, preferredBytes, maximumBytes } = sizes;
  assert(isPowerOfTwo(minimumBytes) && minimumBytes <= 65536, 'minimum block size: power of two, at most 64 KiB');
  assert(
    isPowerOfTwo(preferredBytes) && preferredBytes >= Math.max(512, minimumBytes),
    'preferred block size: power of two, at least 512 and the minimum',
  );
  assert(
    maximumBytes >= preferredBytes && maximumBytes % minimumBytes === 0,
    'maximum block size: multiple of the minimum, at least the preferred size',
  );
  const data = new Uint8Array(14);
  const view = viewOf(data);
  view.setUint16(0, NBD_INFO_BLOCK_SIZE);
  view.setUint32(2, minimumBytes);
  view.setUint32(6, preferredBytes);
  view.setUint32(10, maximumBytes);
  return data;
}

/** The answer to NBD_OPT_EXPORT_NAME, which has no reply header. */
export function encodeExportNameAnswer(sizeBytes: number, transmissionFlags: number, noZeroes: boolean): Uint8Array {
  const bytes = new Uint8Array(noZeroes ? 10 : 134);
  const view = viewOf(bytes);
  view.setBigUint64(0, BigInt(sizeBytes));
  view.setUint16(8, transmissionFlags);
  return bytes;
}

function isPowerOfTwo(value: number): boolean {
  return Number.isSafeInteger(value) && value > 0 && 2 ** Math.round(Math.log2(value)) === value;
}

function viewOf(bytes: Uint8Array): DataView {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}
