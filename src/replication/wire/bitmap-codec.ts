import { assert } from '../../base/assert.js';
import { ProtocolError } from '../../base/errors.js';
import { PAGE_LAZY } from '../../metadata/bitmap.js';
import { BITMAP_CHUNK_BYTES, P_BITMAP, P_COMPRESSED_BITMAP } from './packets.js';

/**
 * The exchange of out-of-sync bitmaps: a bitmap as a sequence of P_BITMAP (plain little-endian words) and
 * P_COMPRESSED_BITMAP (run lengths, variable length coded) payloads, and back.
 *
 * @see DRBD 8.4 drbd_vli.h, drbd_main.c send_bitmap_rle_or_plain, drbd_receiver.c receive_bitmap
 */

/** What the sender reads. The Bitmap of metadata is one. Bit numbers count blocks of 4 KiB. */
export interface BitSource {
  /** Number of bits. */
  readonly bits: number;
  /** Whole 64-bit words in bytes. */
  readonly byteLength: number;
  isBitSet(bit: number): boolean;
  /** First set bit at or after `bit`, or -1. */
  findNext(bit: number): number;
  /** First clear bit at or after `bit`, or -1. */
  findNextClear(bit: number): number;
  copyBytes(byteOffset: number, into: Uint8Array): void;
}

/** Where the receiver merges into. The Bitmap of metadata is one. */
export interface BitSink {
  readonly bits: number;
  readonly byteLength: number;
  /** Sets bits `first` to `last`, both included. */
  setBits(first: number, last: number, pageState: number): number;
  /** ORs little-endian bytes in; ignores bits beyond the end. */
  mergeBytes(byteOffset: number, from: Uint8Array): number;
}

/** Low four bits of the encoding byte: RLE_VLI_Bits, the only code there is. */
const CODE_RLE_VLI = 2;
const WORD_BYTES = 8;
const WORD_BITS = 64;

interface Level {
  readonly prefixBits: number;
  readonly prefix: number;
  readonly dataBits: number;
  /** Shortest run of the level. */
  readonly from: number;
  /** Longest run of the level. */
  readonly to: number;
}

function level(prefixBits: number, prefix: number, dataBits: number, from: number): Level {
  return { prefixBits, prefix, dataBits, from, to: from + 2 ** dataBits - 1 };
}

/** The code of run lengths (VLI_L_1_X). Prefixes are tested in this order, low bits first. */
export const RUN_LENGTH_LEVELS: readonly Level[] = [
  level(1, 0x00, 1, 1),
  level(2, 0x01, 1, 3),
  level(3, 0x03, 2, 5),
  level(4, 0x07, 3, 9),
  level(5, 0x0f, 5, 17),
  level(6, 0x1f, 8, 49),
  level(8, 0x3f, 13, 305),
  level(8, 0x7f, 21, 8497),
  level(8, 0xbf, 34, 2105649),
  level(8, 0xff, 56, 17181974833),
];

/** Writes codes into bytes, least significant bit of each byte first. */
class BitWriter {
  usedBits = 0;
  private bytes: Uint8Array = new Uint8Array(0);

  reset(bytes: Uint8Array): void {
    this.bytes = bytes;
    this.usedBits = 0;
    bytes.fill(0);
  }

  /** @returns false, with nothing written, when the code no longer fits */
  put(runLength: number): boolean {
    const row = RUN_LENGTH_LEVELS.find((candidate) => runLength <= candidate.to);
    assert(row !== undefined && runLength > 0, 'a run has a length');
    if (this.usedBits + row.prefixBits + row.dataBits > this.bytes.length * 8) return false;
    this.write(row.prefix, row.prefixBits);
    this.write(runLength - row.from, row.dataBits);
    return true;
  }

  private write(value: number, bitCount: number): void {
    let rest = value;
    let left = bitCount;
    while (left > 0) {
      const shift = this.usedBits & 7;
      const taken = Math.min(8 - shift, left);
      const modulus = 2 ** taken;
      this.bytes[this.usedBits >>> 3]! |= (rest % modulus) << shift;
      rest = Math.floor(rest / modulus);
      this.usedBits += taken;
      left -= taken;
    }
  }
}

/** Cuts one bitmap into packets. Bits that change behind the position while sending reach the peer as P_OUT_OF_SYNC. */
export class BitmapSender {
  /** Command of the payload that `next` made last. */
  command = P_BITMAP;
  /** The payload that `next` made last ends the transfer. */
  done = false;
  /** First bit that is not sent yet. */
  private position = 0;
  private readonly writer = new BitWriter();

  /** @param useRle compress where it saves anything (`use-rle`) */
  constructor(
    private readonly source: BitSource,
    private readonly useRle: boolean,
  ) {}

  /**
   * Makes the next payload.
   * @param into at least BITMAP_CHUNK_BYTES; borrowed for the call
   * @returns payload length in bytes (0: the empty P_BITMAP that ends a transfer); `command` and `done` tell the rest
   */
  next(into: Uint8Array): number {
    assert(!this.done, 'the transfer has ended');
    assert(into.length >= BITMAP_CHUNK_BYTES, 'room for a whole packet');
    const compressedBytes = this.useRle && this.position < this.source.bits ? this.compress(into) : 0;
    if (compressedBytes > 0) {
      this.command = P_COMPRESSED_BITMAP;
      this.done = this.position === this.source.bits;
      return compressedBytes;
    }
    this.command = P_BITMAP;
    // From the word that holds the position: bits of it that went out compressed go out twice, which is harmless.
    const byteOffset = Math.floor(this.position / WORD_BITS) * WORD_BYTES;
    const left = this.position === this.source.bits ? 0 : this.source.byteLength - byteOffset;
    const length = Math.min(left, BITMAP_CHUNK_BYTES);
    if (length > 0) this.source.copyBytes(byteOffset, into.subarray(0, length));
    this.position = Math.min((byteOffset + length) * 8, this.source.bits);
    this.done = length === 0;
    return length;
  }

  /** @returns payload length, or 0 with the position where it was when plain bits would be shorter */
  private compress(into: Uint8Array): number {
    const { source, writer } = this;
    const start = this.position;
    const startsSet = source.isBitSet(start);
    writer.reset(into.subarray(1, BITMAP_CHUNK_BYTES));
    let isSet = startsSet;
    let position = start;
    while (position < source.bits) {
      const found = isSet ? source.findNextClear(position) : source.findNext(position);
      const end = found < 0 ? source.bits : found;
      if (!writer.put(end - position)) break;
      position = end;
      isSet = !isSet;
    }
    const streamBytes = Math.ceil(writer.usedBits / 8);
    if (position - start < streamBytes * 8) return 0;
    const padBits = streamBytes * 8 - writer.usedBits;
    into[0] = CODE_RLE_VLI | (padBits << 4) | (startsSet ? 0x80 : 0);
    this.position = position;
    return 1 + streamBytes;
  }
}

const RECEIVE_BITMAP = 'DRBD 8.4 drbd_receiver.c receive_bitmap';

function fail(code: string, message: string): never {
  throw new ProtocolError(`DRBDTS_DRBD_${code}`, message, RECEIVE_BITMAP);
}

/** Merges the packets of one transfer into a bitmap. Each `receive` returns whether the transfer is complete. */
export class BitmapReceiver {
  private position = 0;
  private isDone = false;

  constructor(private readonly sink: BitSink) {}

  /**
   * @param command P_BITMAP or P_COMPRESSED_BITMAP
   * @param payload borrowed for the call
   * @throws ProtocolError DRBDTS_DRBD_BITMAP_LENGTH, DRBDTS_DRBD_BITMAP_CODE, DRBDTS_DRBD_BITMAP_OVERFLOW; bits merged
   *   before stay set, which costs a little resync and no data
   */
  receive(command: number, payload: Uint8Array): boolean {
    assert(command === P_BITMAP || command === P_COMPRESSED_BITMAP, 'a bitmap packet');
    assert(!this.isDone, 'the caller stops at the end of the transfer');
    this.isDone = command === P_BITMAP ? this.receivePlain(payload) : this.receiveCompressed(payload);
    return this.isDone;
  }

  private receivePlain(payload: Uint8Array): boolean {
    const byteOffset = Math.floor(this.position / WORD_BITS) * WORD_BYTES;
    const left = this.position === this.sink.bits ? 0 : this.sink.byteLength - byteOffset;
    const expected = Math.min(left, BITMAP_CHUNK_BYTES);
    if (payload.length !== expected)
      fail('BITMAP_LENGTH', `P_BITMAP with ${payload.length} bytes at bit ${this.position}, expected ${expected}`);
    if (expected === 0) return true;
    this.sink.mergeBytes(byteOffset, payload);
    this.position = Math.min((byteOffset + expected) * 8, this.sink.bits);
    return false;
  }

  private receiveCompressed(payload: Uint8Array): boolean {
    if (payload.length < 2 || payload.length > BITMAP_CHUNK_BYTES)
      fail('BITMAP_LENGTH', `P_COMPRESSED_BITMAP with ${payload.length} bytes`);
    const encoding = payload[0]!;
    if ((encoding & 0x0f) !== CODE_RLE_VLI) fail('BITMAP_CODE', `unknown encoding 0x${encoding.toString(16)}`);
    const streamBits = (payload.length - 1) * 8 - ((encoding >>> 4) & 7);
    let isSet = (encoding & 0x80) !== 0;
    let position = this.position;
    let at = 0;
    while (at < streamBits) {
      const row = levelAt(payload, at);
      const codeBits = row.prefixBits + row.dataBits;
      if (at + codeBits > streamBits) fail('BITMAP_CODE', `a run length at bit ${at} is cut off`);
      const runLength = row.from + readBits(payload, at + row.prefixBits, row.dataBits);
      if (runLength > this.sink.bits - position)
        fail('BITMAP_OVERFLOW', `a run of ${runLength} bits at ${position} ends beyond ${this.sink.bits}`);
      if (isSet) this.sink.setBits(position, position + runLength - 1, PAGE_LAZY);
      position += runLength;
      at += codeBits;
      isSet = !isSet;
    }
    this.position = position;
    return position === this.sink.bits;
  }
}

/** `count` bits (at most 56) of the stream behind the encoding byte, from stream bit `at`, LSB first. */
function readBits(payload: Uint8Array, at: number, count: number): number {
  let value = 0;
  let weight = 1;
  let position = at;
  const end = at + count;
  while (position < end) {
    const shift = position & 7;
    const taken = Math.min(8 - shift, end - position);
    const byte = payload[1 + (position >>> 3)] ?? 0;
    value += ((byte >>> shift) & ((1 << taken) - 1)) * weight;
    weight *= 2 ** taken;
    position += taken;
  }
  return value;
}

/** The level whose prefix stands at stream bit `at`; bits behind the end read as zero and are refused by length. */
function levelAt(payload: Uint8Array, at: number): Level {
  const prefix = readBits(payload, at, 8);
  for (const row of RUN_LENGTH_LEVELS) if ((prefix & ((1 << row.prefixBits) - 1)) === row.prefix) return row;
  assert(false, 'every eight bits start with the prefix of a level');
}
