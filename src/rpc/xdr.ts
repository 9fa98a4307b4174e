/**
 * XDR (RFC 4506), the part ONC RPC and NFSv3 use: 32 and 64 bit integers, booleans, opaques and strings, big-endian,
 * every item padded to four bytes.
 */
import { assert } from '../base/assert.js';
import { ProtocolError } from '../base/errors.js';

/** Arguments that are not what the procedure's XDR says. The dispatcher answers GARBAGE_ARGS (RFC 5531 section 9). */
export class GarbageError extends ProtocolError {
  constructor(message: string, section = 'RFC 4506') {
    super('DRBDTS_RPC_GARBAGE_ARGS', message, section);
  }
}

/** Bytes after padding to the XDR unit. */
export function paddedLength(lengthBytes: number): number {
  return (lengthBytes + 3) & ~3;
}

/**
 * Reads one message in place. One reader is reused for many messages: `reset` points it at bytes, which stay the
 * caller's. Opaques are returned as views of those bytes, never copied.
 *
 * Every read throws GarbageError when the message ends first; lengths are checked before anything is made of them.
 */
export class XdrReader {
  /** Bytes of the next item, counted from the start of `bytes`. */
  position = 0;
  /** First byte behind the message. */
  end = 0;
  bytes: Uint8Array = EMPTY;
  private view: DataView = EMPTY_VIEW;

  /** A reader of its own over all of `bytes`. */
  static over(bytes: Uint8Array): XdrReader {
    const reader = new XdrReader();
    reader.reset(bytes, new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength), 0, bytes.length);
    return reader;
  }

  /** @param view covers exactly the same memory as `bytes` */
  reset(bytes: Uint8Array, view: DataView, offset: number, length: number): void {
    assert(offset >= 0 && length >= 0 && offset + length <= bytes.length, 'XDR message lies outside its bytes');
    this.bytes = bytes;
    this.view = view;
    this.position = offset;
    this.end = offset + length;
  }

  get remaining(): number {
    return this.end - this.position;
  }

  u32(): number {
    const at = this.take(4);
    return this.view.getUint32(at);
  }

  u64(): bigint {
    const at = this.take(8);
    return this.view.getBigUint64(at);
  }

  /** A u64 as a number: exact up to 2^53 - 1, above that only known to be above. For offsets and sizes. */
  size64(): number {
    const at = this.take(8);
    return this.view.getUint32(at) * 0x1_0000_0000 + this.view.getUint32(at + 4);
  }

  /** Exactly 0 or 1 (RFC 4506 section 4.4). */
  bool(): boolean {
    const value = this.u32();
    if (value > 1) throw new GarbageError(`a boolean is ${value}`, 'RFC 4506 section 4.4');
    return value === 1;
  }

  /** An enum whose values are 0..`largest`, or 1..`largest` with `smallest` 1. */
  enumeration(largest: number, smallest = 0): number {
    const value = this.u32();
    if (value < smallest || value > largest)
      throw new GarbageError(`an enum of ${smallest}..${largest} is ${value}`, 'RFC 4506 section 4.3');
    return value;
  }

  /** Fixed-length opaque: a view. */
  fixed(lengthBytes: number): Uint8Array {
    const at = this.take(paddedLength(lengthBytes));
    return this.bytes.subarray(at, at + lengthBytes);
  }

  /** Variable-length opaque of at most `maxBytes`: a view. */
  opaque(maxBytes: number): Uint8Array {
    const lengthBytes = this.opaqueLength(maxBytes);
    return this.fixed(lengthBytes);
  }

  /** Only the length of an opaque whose bytes are used in place: `position` stands at its first byte afterwards. */
  opaqueLength(maxBytes: number): number {
    const lengthBytes = this.u32();
    if (lengthBytes > maxBytes)
      throw new GarbageError(`an opaque has ${lengthBytes} bytes, at most ${maxBytes}`, 'RFC 4506 section 4.10');
    if (lengthBytes > this.remaining)
      throw new GarbageError(`an opaque of ${lengthBytes} bytes exceeds its message`, 'RFC 4506 section 4.10');
    return lengthBytes;
  }

  /** A string as text; bytes that are no UTF-8 become U+FFFD. For names in logs and tables, not for file names. */
  text(maxBytes: number): string {
    return TEXT.decode(this.opaque(maxBytes));
  }

  skip(lengthBytes: number): void {
    this.take(paddedLength(lengthBytes));
  }

  private take(lengthBytes: number): number {
    const at = this.position;
    if (lengthBytes > this.end - at)
      throw new GarbageError(`the message ends ${lengthBytes - (this.end - at)} bytes early`, 'RFC 4506 section 3');
    this.position = at + lengthBytes;
    return at;
  }
}

const EMPTY = new Uint8Array(0);
const EMPTY_VIEW = new DataView(EMPTY.buffer);
const TEXT = new TextDecoder();

/** "No payload", as in the ring. */
const NONE = -1;

/**
 * Writes one message into a scratch that is reused (and grows up to `maxBytes`). Whoever takes the bytes copies or
 * sends them before the next `reset`. A message may end in a payload that is not in the scratch: a block of the ring's
 * pool.
 */
export class XdrWriter {
  bytes: Uint8Array;
  length = 0;
  /** Pool offset of the message's last bytes, or -1. */
  payload = NONE;
  /** Bytes at `payload`, padding included. */
  payloadLength = 0;
  private view: DataView;

  constructor(
    initialBytes = 4096,
    private readonly maxBytes = 2 * 1024 * 1024,
  ) {
    this.bytes = new Uint8Array(initialBytes);
    this.view = new DataView(this.bytes.buffer);
  }

  reset(): this {
    this.length = 0;
    this.payload = NONE;
    this.payloadLength = 0;
    return this;
  }

  /** The message so far: a view of the scratch. */
  message(): Uint8Array {
    return this.bytes.subarray(0, this.length);
  }

  u32(value: number): void {
    const at = this.grow(4);
    this.view.setUint32(at, value);
  }

  u64(value: bigint): void {
    const at = this.grow(8);
    this.view.setBigUint64(at, value);
  }

  /** A u64 from a number of at most 2^53 - 1. */
  size64(value: number): void {
    assert(Number.isSafeInteger(value) && value >= 0, `${value} is no size`);
    const at = this.grow(8);
    this.view.setUint32(at, Math.floor(value / 0x1_0000_0000));
    this.view.setUint32(at + 4, value % 0x1_0000_0000);
  }

  bool(value: boolean): void {
    this.u32(value ? 1 : 0);
  }

  fixed(bytes: Uint8Array): void {
    const padded = paddedLength(bytes.length);
    const at = this.grow(padded);
    this.bytes.set(bytes, at);
    this.bytes.fill(0, at + bytes.length, at + padded);
  }

  opaque(bytes: Uint8Array): void {
    this.u32(bytes.length);
    this.fixed(bytes);
  }

  text(value: string): void {
    this.opaque(UTF8.encode(value));
  }

  /** Overwrites a u32 written before. */
  patchU32(at: number, value: number): void {
    assert(at + 4 <= this.length, 'patch behind the message');
    this.view.setUint32(at, value);
  }

  /** Takes back everything from `length` on. */
  truncate(length: number): void {
    assert(length <= this.length, 'truncate behind the message');
    this.length = length;
  }

  /** Ends the message with bytes of the pool (their length has been written, padding is in `payloadLength`). */
  attach(payload: number, payloadLength: number): void {
    assert(this.payload === NONE && payloadLength % 4 === 0, 'one payload, padded');
    this.payload = payload;
    this.payloadLength = payloadLength;
  }

  private grow(lengthBytes: number): number {
    const at = this.length;
    const needed = at + lengthBytes;
    if (needed > this.bytes.length) {
      assert(needed <= this.maxBytes, `an XDR message of ${needed} bytes exceeds ${this.maxBytes}`);
      const larger = new Uint8Array(Math.min(this.maxBytes, Math.max(needed, this.bytes.length * 2)));
      larger.set(this.bytes.subarray(0, at));
      this.bytes = larger;
      this.view = new DataView(larger.buffer);
    }
    this.length = needed;
    return at;
  }
}

const UTF8 = new TextEncoder();

/** Both directions of one XDR type: a server decodes arguments and encodes results, a client the reverse. */
export interface Codec<T> {
  encode(writer: XdrWriter, value: T): void;
  decode(reader: XdrReader): T;
}

/** XDR void. */
export const VOID: Codec<void> = { encode: () => {}, decode: () => {} };
