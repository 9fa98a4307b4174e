/**
 * Requests and replies of the transmission phase: how the stream is cut, what a request must be, how replies look.
 *
 * @see proto.md "Transmission", "Request types"
 */
import { assert } from '../base/assert.js';
import {
  HARD_CAP_PAYLOAD_BYTES,
  MAX_PAYLOAD_BYTES,
  NBD_CMD_BLOCK_STATUS,
  NBD_CMD_CACHE,
  NBD_CMD_DISC,
  NBD_CMD_FLAG_DF,
  NBD_CMD_FLAG_FAST_ZERO,
  NBD_CMD_FLAG_FUA,
  NBD_CMD_FLAG_NO_HOLE,
  NBD_CMD_FLAG_REQ_ONE,
  NBD_CMD_FLUSH,
  NBD_CMD_READ,
  NBD_CMD_TRIM,
  NBD_CMD_WRITE,
  NBD_CMD_WRITE_ZEROES,
  NBD_FLAG_READ_ONLY,
  NBD_FLAG_SEND_CACHE,
  NBD_FLAG_SEND_DF,
  NBD_FLAG_SEND_FAST_ZERO,
  NBD_FLAG_SEND_FLUSH,
  NBD_FLAG_SEND_FUA,
  NBD_FLAG_SEND_TRIM,
  NBD_FLAG_SEND_WRITE_ZEROES,
  NBD_REPLY_FLAG_DONE,
  NBD_REPLY_TYPE_BLOCK_STATUS,
  NBD_REPLY_TYPE_ERROR,
  NBD_REPLY_TYPE_OFFSET_DATA,
  NBD_SIMPLE_REPLY_MAGIC,
  NBD_STRUCTURED_REPLY_MAGIC,
} from './constants.js';
import { NBD_EINVAL, NBD_ENOSPC, NBD_ENOTSUP, NBD_EPERM } from './errno.js';

export const REQUEST_BYTES = 28;

/** Where the fields of a request stand: u32 magic, u16 flags, u16 command, u64 cookie, u64 offset, u32 length. */
export const REQUEST_FLAGS = 4;
export const REQUEST_COMMAND = 6;
export const REQUEST_COOKIE = 8;
export const REQUEST_OFFSET = 16;
export const REQUEST_LENGTH = 24;

/** How requests are cut out of the stream, as data for the ring (a `FrameRule`). Only WRITE is followed by bytes. */
export const REQUEST_FRAMING = {
  kind: 'fixed',
  headerBytes: REQUEST_BYTES,
  magic: [0x25, 0x60, 0x95, 0x13],
  lengthOffset: REQUEST_LENGTH,
  lengthBytes: 4,
  commandOffset: REQUEST_COMMAND,
  commandBytes: 2,
  payloadCommands: [NBD_CMD_WRITE],
  inlineDefault: 0,
  inlineByCommand: {},
  maxPayloadBytes: MAX_PAYLOAD_BYTES,
  hardCapBytes: HARD_CAP_PAYLOAD_BYTES,
} as const;

/** What negotiation settled about one connection; validation needs nothing else. */
export interface RequestRules {
  readonly sizeBytes: number;
  readonly transmissionFlags: number;
  readonly baseAllocation: boolean;
}

/** NBD_CMD_FLAG_* bits that may be set, by command. FUA is valid on all once advertised. */
const ALLOWED_FLAGS: readonly number[] = [
  /* READ */ NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_DF,
  /* WRITE */ NBD_CMD_FLAG_FUA,
  /* DISC */ NBD_CMD_FLAG_FUA,
  /* FLUSH */ NBD_CMD_FLAG_FUA,
  /* TRIM */ NBD_CMD_FLAG_FUA,
  /* CACHE */ NBD_CMD_FLAG_FUA,
  /* WRITE_ZEROES */ NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO,
  /* BLOCK_STATUS */ NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_REQ_ONE,
];

const TWO_32 = 0x1_0000_0000;

/**
 * Judges one request, payload consumed or not. DISC never comes here: it has no reply.
 *
 * The offset is given as its two halves: joined they may exceed the safe integers, which is why wrapping round is
 * judged on the halves; for everything else the rounded sum is beyond any size we export.
 *
 * @returns 0 or the NBD error to reply
 */
export function validateRequest(
  rules: RequestRules,
  command: number,
  flags: number,
  offsetHigh: number,
  offsetLow: number,
  lengthBytes: number,
): number {
  const advertised = rules.transmissionFlags;
  const offsetBytes = offsetHigh * TWO_32 + offsetLow;

  // "unknown command" and "bits on the wrong command": the connection is kept.
  const allowedFlags = ALLOWED_FLAGS[command];
  if (allowedFlags === undefined || command === NBD_CMD_DISC) return NBD_EINVAL;
  if ((flags & ~allowedFlags) !== 0) return NBD_EINVAL;

  // A client must not use what was not advertised.
  if ((flags & NBD_CMD_FLAG_FUA) !== 0 && (advertised & NBD_FLAG_SEND_FUA) === 0) return NBD_EINVAL;
  if ((flags & NBD_CMD_FLAG_DF) !== 0 && (advertised & NBD_FLAG_SEND_DF) === 0) return NBD_EINVAL;
  if ((flags & NBD_CMD_FLAG_FAST_ZERO) !== 0 && (advertised & NBD_FLAG_SEND_FAST_ZERO) === 0) return NBD_EINVAL;
  if (command === NBD_CMD_FLUSH && (advertised & NBD_FLAG_SEND_FLUSH) === 0) return NBD_EINVAL;
  if (command === NBD_CMD_TRIM && (advertised & NBD_FLAG_SEND_TRIM) === 0) return NBD_EINVAL;
  if (command === NBD_CMD_CACHE && (advertised & NBD_FLAG_SEND_CACHE) === 0) return NBD_EINVAL;
  if (command === NBD_CMD_WRITE_ZEROES && (advertised & NBD_FLAG_SEND_WRITE_ZEROES) === 0) return NBD_EINVAL;
  if (command === NBD_CMD_BLOCK_STATUS && !rules.baseAllocation) return NBD_EINVAL;

  // FLUSH covers the whole device; offset and length are reserved, and QEMU and nbd-server ignore them too.
  if (command === NBD_CMD_FLUSH) return 0;

  // A read-only export refuses whatever writes, wherever it points.
  const writes = command === NBD_CMD_WRITE || command === NBD_CMD_TRIM || command === NBD_CMD_WRITE_ZEROES;
  if (writes && (advertised & NBD_FLAG_READ_ONLY) !== 0) return NBD_EPERM;

  // Length 0 is unspecified; we refuse it and stay.
  if (lengthBytes === 0) return NBD_EINVAL;
  if ((command === NBD_CMD_READ || command === NBD_CMD_WRITE) && lengthBytes > MAX_PAYLOAD_BYTES) return NBD_EINVAL;

  // "offset + length" beyond 2^64 is nonsense for every command.
  if (offsetHigh === 0xffff_ffff && offsetLow + lengthBytes >= TWO_32) return NBD_EINVAL;
  // Past the end: ENOSPC for what would need the space, EINVAL for the rest.
  const needsSpace = command === NBD_CMD_WRITE || command === NBD_CMD_WRITE_ZEROES;
  if (lengthBytes > rules.sizeBytes - offsetBytes) return needsSpace ? NBD_ENOSPC : NBD_EINVAL;

  // Zeroes that must stay allocated are not promised to be faster than writing them.
  const fastAllocated = NBD_CMD_FLAG_FAST_ZERO | NBD_CMD_FLAG_NO_HOLE;
  if ((flags & fastAllocated) === fastAllocated) return NBD_ENOTSUP;
  return 0;
}

/** Most runs told in one BLOCK_STATUS reply. Fewer than asked for is allowed; the client asks on. */
export const MAX_BLOCK_STATUS_RUNS = 512;

/**
 * Collects the runs of one BLOCK_STATUS reply: merges equal neighbours, stops at MAX_BLOCK_STATUS_RUNS. One object
 * serves all requests.
 */
export class BlockStatusRuns {
  #count = 0;
  readonly #lengths = new Float64Array(MAX_BLOCK_STATUS_RUNS);
  readonly #states = new Uint32Array(MAX_BLOCK_STATUS_RUNS);

  get count(): number {
    return this.#count;
  }

  clear(): void {
    this.#count = 0;
  }

  /**
   * Appends a run where the last one ended.
   * @param state NBD_STATE_* bits
   * @returns false when there is no room left: stop telling
   */
  add(lengthBytes: number, state: number): boolean {
    assert(lengthBytes > 0 && Number.isSafeInteger(lengthBytes), 'a run has a length');
    const last = this.#count - 1;
    if (last >= 0 && this.#states[last] === state) {
      this.#lengths[last] = this.#lengths[last]! + lengthBytes;
      return true;
    }
    if (this.#count === MAX_BLOCK_STATUS_RUNS) return false;
    this.#lengths[this.#count] = lengthBytes;
    this.#states[this.#count] = state;
    this.#count++;
    return true;
  }

  /** Cuts the runs to `lengthBytes` in all, and to the first one when `requireOne`. */
  clip(lengthBytes: number, requireOne: boolean): void {
    if (requireOne && this.#count > 1) this.#count = 1;
    let left = lengthBytes;
    for (let index = 0; index < this.#count; index++) {
      if (this.#lengths[index]! >= left) {
        this.#lengths[index] = left;
        this.#count = index + 1;
        return;
      }
      left -= this.#lengths[index]!;
    }
  }

  lengthBytes(index: number): number {
    return this.#lengths[index]!;
  }

  state(index: number): number {
    return this.#states[index]!;
  }
}

/**
 * Builds replies into one scratch buffer, which is good until the next call. The cookie is passed as its two halves and
 * given back as it came.
 */
export class ReplyBuilder {
  /** Hand this to the door together with the length the builders return. */
  readonly bytes = new Uint8Array(24 + 8 * MAX_BLOCK_STATUS_RUNS);
  readonly #view = new DataView(this.bytes.buffer);

  /** Simple reply: 16 bytes; the data of a successful READ follows. */
  simple(error: number, cookieHigh: number, cookieLow: number): number {
    const view = this.#view;
    view.setUint32(0, NBD_SIMPLE_REPLY_MAGIC);
    view.setUint32(4, error);
    view.setUint32(8, cookieHigh);
    view.setUint32(12, cookieLow);
    return 16;
  }

  /** The only chunk of a successful READ: 28 bytes, then the data. Nothing can fail any more, so it says DONE. */
  offsetData(cookieHigh: number, cookieLow: number, offsetHigh: number, offsetLow: number, dataBytes: number): number {
    const view = this.#view;
    this.#chunk(NBD_REPLY_TYPE_OFFSET_DATA, cookieHigh, cookieLow, 8 + dataBytes);
    view.setUint32(20, offsetHigh);
    view.setUint32(24, offsetLow);
    return 28;
  }

  /** A final error chunk without text. After STRUCTURED_REPLY a READ may never be answered by a simple reply. */
  error(error: number, cookieHigh: number, cookieLow: number): number {
    assert(error !== 0, 'an error chunk carries an error');
    this.#chunk(NBD_REPLY_TYPE_ERROR, cookieHigh, cookieLow, 6);
    this.#view.setUint32(20, error);
    this.#view.setUint16(24, 0);
    return 26;
  }

  /** The chunk of a successful BLOCK_STATUS. */
  blockStatus(cookieHigh: number, cookieLow: number, contextId: number, runs: BlockStatusRuns): number {
    assert(runs.count > 0, 'a block status reply has at least one run');
    const view = this.#view;
    this.#chunk(NBD_REPLY_TYPE_BLOCK_STATUS, cookieHigh, cookieLow, 4 + 8 * runs.count);
    view.setUint32(20, contextId);
    for (let index = 0; index < runs.count; index++) {
      view.setUint32(24 + 8 * index, runs.lengthBytes(index));
      view.setUint32(28 + 8 * index, runs.state(index));
    }
    return 24 + 8 * runs.count;
  }

  #chunk(type: number, cookieHigh: number, cookieLow: number, lengthBytes: number): void {
    const view = this.#view;
    view.setUint32(0, NBD_STRUCTURED_REPLY_MAGIC);
    view.setUint16(4, NBD_REPLY_FLAG_DONE);
    view.setUint16(6, type);
    view.setUint32(8, cookieHigh);
    view.setUint32(12, cookieLow);
    view.setUint32(16, lengthBytes);
  }
}
