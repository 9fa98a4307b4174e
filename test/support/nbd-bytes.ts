/** What an NBD client writes and reads, built the naive way: the second opinion of the server's tests. */
import assert from 'node:assert/strict';

export const u16 = (value: number) => Buffer.from([value >> 8, value & 255]);
export const u32 = (value: number) => Buffer.from((value >>> 0).toString(16).padStart(8, '0'), 'hex');
export const u64 = (value: number | bigint) => Buffer.from(BigInt(value).toString(16).padStart(16, '0'), 'hex');
export const text = (value: string | Buffer) => Buffer.concat([u32(Buffer.byteLength(value)), Buffer.from(value)]);

/** Client flags FIXED_NEWSTYLE and NO_ZEROES. */
export const HELLO = u32(3);
export const option = (number: number, data: Buffer = Buffer.alloc(0)) =>
  Buffer.concat([Buffer.from('IHAVEOPT'), u32(number), u32(data.length), data]);
export const go = (name: string | Buffer, types: number[] = [], number = 7) =>
  option(number, Buffer.concat([text(name), u16(types.length), ...types.map(u16)]));
export const meta = (number: number, name: string, queries: string[]) =>
  option(number, Buffer.concat([text(name), u32(queries.length), ...queries.map(text)]));
export const STRUCTURED_REPLY = option(8);
export const ABORT = option(2);

export const Command = {
  READ: 0,
  WRITE: 1,
  DISC: 2,
  FLUSH: 3,
  TRIM: 4,
  CACHE: 5,
  WRITE_ZEROES: 6,
  BLOCK_STATUS: 7,
} as const;
export const Flag = { FUA: 1, NO_HOLE: 2, DF: 4, REQ_ONE: 8, FAST_ZERO: 16 } as const;

/** One request; `data` follows it (also where it should not: then the stream is broken on purpose). */
export function request(
  command: number,
  cookie: number,
  offset: number | bigint,
  length: number,
  flags = 0,
  data: Uint8Array = new Uint8Array(0),
): Buffer {
  return Buffer.concat([u32(0x25609513), u16(flags), u16(command), u64(cookie), u64(offset), u32(length), data]);
}

export const write = (cookie: number, offset: number, data: Uint8Array, flags = 0) =>
  request(Command.WRITE, cookie, offset, data.length, flags, data);

export interface Reply {
  readonly cookie: number;
  readonly error: number;
  readonly kind: 'simple' | 'structured';
  readonly data: Buffer;
}

/**
 * Cuts a stream of replies. Simple replies do not tell their length, so the caller does.
 * @param readLength length of the READ with this cookie, 0 for other commands
 */
export function parseReplies(stream: Buffer, readLength: (cookie: number) => number = () => 0): Reply[] {
  const replies: Reply[] = [];
  for (let at = 0; at < stream.length; ) {
    const magic = stream.readUInt32BE(at);
    if (magic === 0x67446698) {
      const error = stream.readUInt32BE(at + 4);
      const cookie = Number(stream.readBigUInt64BE(at + 8));
      const length = error === 0 ? readLength(cookie) : 0;
      assert(at + 16 + length <= stream.length, 'a whole reply');
      replies.push({ cookie, error, kind: 'simple', data: stream.subarray(at + 16, at + 16 + length) });
      at += 16 + length;
      continue;
    }
    assert.equal(magic, 0x668e33ef, `magic of a reply at ${at} of ${stream.length}`);
    assert.equal(stream.readUInt16BE(at + 4), 1, 'the only chunk says DONE');
    const type = stream.readUInt16BE(at + 6);
    const cookie = Number(stream.readBigUInt64BE(at + 8));
    const length = stream.readUInt32BE(at + 16);
    assert(at + 20 + length <= stream.length, 'a whole chunk');
    const content = stream.subarray(at + 20, at + 20 + length);
    const error = type === 0x8001 ? content.readUInt32BE(0) : 0;
    // OFFSET_DATA starts with the offset; BLOCK_STATUS with the context.
    const data = error !== 0 ? Buffer.alloc(0) : content.subarray(type === 1 ? 8 : 0);
    replies.push({ cookie, error, kind: 'structured', data });
    at += 20 + length;
  }
  return replies;
}
