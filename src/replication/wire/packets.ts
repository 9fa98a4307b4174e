import { assert } from '../../base/assert.js';
import type { FrameRule } from '../../io/ring.js';

/**
 * The packets of DRBD 8.4 as data: command numbers, headers, flags, lengths, and the rules by which a door cuts the two
 * byte streams into packets. Everything is big-endian, except `block_id` and barrier numbers, which are opaque.
 *
 * drbdts announces protocol versions 100..101 (every drbd.ko 8.4 speaks 101), so past the features exchange every
 * packet has the 16-byte header100.
 *
 * @see DRBD 8.4 drbd_protocol.h (packet layouts), drbd_receiver.c drbd_cmd_handler and ack_receiver_tbl (dispatch)
 */

/** Command numbers, spelled as in DRBD 8.4 enum drbd_packet. */
export const P_DATA = 0x00;
export const P_DATA_REPLY = 0x01;
export const P_RS_DATA_REPLY = 0x02;
export const P_BARRIER = 0x03;
export const P_BITMAP = 0x04;
export const P_UNPLUG_REMOTE = 0x07;
export const P_DATA_REQUEST = 0x08;
export const P_RS_DATA_REQUEST = 0x09;
export const P_PROTOCOL = 0x0b;
export const P_UUIDS = 0x0c;
export const P_SIZES = 0x0d;
export const P_STATE = 0x0e;
export const P_SYNC_UUID = 0x0f;
export const P_AUTH_CHALLENGE = 0x10;
export const P_AUTH_RESPONSE = 0x11;
export const P_STATE_CHG_REQ = 0x12;
export const P_PING = 0x13;
export const P_PING_ACK = 0x14;
export const P_RECV_ACK = 0x15;
export const P_WRITE_ACK = 0x16;
export const P_RS_WRITE_ACK = 0x17;
export const P_SUPERSEDED = 0x18;
export const P_NEG_ACK = 0x19;
export const P_NEG_DREPLY = 0x1a;
export const P_NEG_RS_DREPLY = 0x1b;
export const P_BARRIER_ACK = 0x1c;
export const P_STATE_CHG_REPLY = 0x1d;
export const P_OV_REQUEST = 0x1e;
export const P_OV_REPLY = 0x1f;
export const P_OV_RESULT = 0x20;
export const P_CSUM_RS_REQUEST = 0x21;
export const P_RS_IS_IN_SYNC = 0x22;
/** P_SYNC_PARAM89: the form of P_SYNC_PARAM that every version from 89 on uses. */
export const P_SYNC_PARAM89 = 0x23;
export const P_COMPRESSED_BITMAP = 0x24;
export const P_DELAY_PROBE = 0x27;
export const P_OUT_OF_SYNC = 0x28;
export const P_RS_CANCEL = 0x29;
export const P_CONN_ST_CHG_REQ = 0x2a;
export const P_CONN_ST_CHG_REPLY = 0x2b;
export const P_RETRY_WRITE = 0x2c;
export const P_PROTOCOL_UPDATE = 0x2d;
export const P_TRIM = 0x31;
export const P_RS_THIN_REQ = 0x32;
export const P_RS_DEALLOCATED = 0x33;
export const P_ZEROES = 0x36;
export const P_INITIAL_META = 0xfff1;
export const P_INITIAL_DATA = 0xfff2;
export const P_CONNECTION_FEATURES = 0xfffe;

/** header80: u32 magic, u16 command, u16 length. Before version agreement. */
export const HEADER80_BYTES = 8;
export const HEADER80_MAGIC = 0x83740267;
/** header95: u16 magic, u16 command, u32 length. Only ever agreed with versions 95..99; decoded for traces. */
export const HEADER95_BYTES = 8;
export const HEADER95_MAGIC = 0x835a;
/** header100: u32 magic, u16 volume, u16 command, u32 length, u32 pad 0. */
export const HEADER100_BYTES = 16;
export const HEADER100_MAGIC = 0x8620ec20;

/** What drbdts announces: the versions with header100 and volumes. */
export const PROTOCOL_VERSION_MIN = 100;
export const PROTOCOL_VERSION_MAX = 101;

/** Feature flags of P_CONNECTION_FEATURES. */
export const FEATURE_TRIM = 1;
export const FEATURE_THIN_RESYNC = 2;
/** Means: 56-byte P_SIZES, discards up to 128 MiB, UUID rule 41. drbdts never sends or accepts P_WSAME itself. */
export const FEATURE_WSAME = 4;
export const FEATURE_WZEROES = 8;
export const FEATURES_ALL = FEATURE_TRIM | FEATURE_THIN_RESYNC | FEATURE_WSAME | FEATURE_WZEROES;

/** dp_flags of P_DATA, P_TRIM and P_ZEROES. */
export const DP_HARDBARRIER = 1;
export const DP_RW_SYNC = 2;
export const DP_MAY_SET_IN_SYNC = 4;
export const DP_UNPLUG = 8;
export const DP_FUA = 16;
export const DP_FLUSH = 32;
export const DP_DISCARD = 64;
export const DP_SEND_RECEIVE_ACK = 128;
export const DP_SEND_WRITE_ACK = 256;
export const DP_WSAME = 512;
export const DP_ZEROES = 1024;

/** Flags of P_UUIDS. */
export const UUID_FLAG_DISCARD_MY_DATA = 1;
export const UUID_FLAG_CRASHED_PRIMARY = 2;
export const UUID_FLAG_INCONSISTENT = 4;
export const UUID_FLAG_SKIP_INITIAL_SYNC = 8;

/** Flags of P_PROTOCOL. */
export const CONN_FLAG_DISCARD_MY_DATA = 1;
export const CONN_FLAG_DRY_RUN = 2;

/** dds_flags of P_SIZES. */
export const DDS_FORCED = 1;
export const DDS_NO_RESYNC = 2;

/** `block_id` of resync traffic (ID_SYNCER): all ones in both halves. Never the id of an application request. */
export const ID_SYNCER_HIGH = 0xffffffff;
export const ID_SYNCER_LOW = 0xffffffff;
/** `block_id` of P_OV_RESULT, the only one that is a number (high half 0). */
export const ID_IN_SYNC = 4711;
export const ID_OUT_OF_SYNC = 4712;

/** Largest write, read or resync request in bytes with version >= 100, whatever max_bio_size was announced. */
export const MAX_REQUEST_BYTES = 1024 * 1024;
/** Largest P_TRIM / P_ZEROES with feature WSAME, and without it. */
export const MAX_DISCARD_BYTES = 128 * 1024 * 1024;
export const MAX_DISCARD_BYTES_OLD = 4 * 1024 * 1024;
/** Fixed sub-headers: p_data, p_trim. */
export const P_DATA_BYTES = 24;
export const P_TRIM_BYTES = 28;
/** Payload of a plain or compressed bitmap packet at most: one page less the header. */
export const BITMAP_CHUNK_BYTES = 4096 - HEADER100_BYTES;
/** Algorithm names on the wire, NUL included. */
export const ALGORITHM_NAME_BYTES = 64;
/** The largest digest that any algorithm we accept makes (sha512). */
export const DIGEST_BYTES_MAX = 64;

/** Which of the two TCP connections a packet travels on. */
export type SocketRole = 'data' | 'meta';

/** One row of the packet table. */
export interface PacketDescription {
  readonly command: number;
  readonly name: string;
  readonly socket: SocketRole | 'both';
  /** The header names a volume; else it must be 0. */
  readonly hasVolume: boolean;
  /** Payload bytes every such packet has. */
  readonly fixedBytes: number;
  /** Payload bytes beyond the fixed part that it may have at most. */
  readonly tailBytes: number;
  /** Only legal when these features were agreed. */
  readonly features: number;
}

function row(
  command: number,
  name: string,
  socket: SocketRole | 'both',
  hasVolume: boolean,
  fixedBytes: number,
  tailBytes = 0,
  features = 0,
): PacketDescription {
  return { command, name, socket, hasVolume, fixedBytes, tailBytes, features };
}

const DATA_TAIL_BYTES = DIGEST_BYTES_MAX + MAX_REQUEST_BYTES;

/** Every packet that drbdts knows with an agreed version of 100 or 101, and the three that precede the agreement. */
export const PACKETS: readonly PacketDescription[] = [
  row(P_DATA, 'P_DATA', 'data', true, 24, DATA_TAIL_BYTES),
  row(P_DATA_REPLY, 'P_DATA_REPLY', 'data', true, 24, DATA_TAIL_BYTES),
  row(P_RS_DATA_REPLY, 'P_RS_DATA_REPLY', 'data', true, 24, DATA_TAIL_BYTES),
  row(P_BARRIER, 'P_BARRIER', 'data', false, 8),
  row(P_BITMAP, 'P_BITMAP', 'data', true, 0, BITMAP_CHUNK_BYTES),
  row(P_UNPLUG_REMOTE, 'P_UNPLUG_REMOTE', 'data', true, 0),
  row(P_DATA_REQUEST, 'P_DATA_REQUEST', 'data', true, 24),
  row(P_RS_DATA_REQUEST, 'P_RS_DATA_REQUEST', 'data', true, 24),
  row(P_PROTOCOL, 'P_PROTOCOL', 'data', false, 25, ALGORITHM_NAME_BYTES - 1),
  row(P_UUIDS, 'P_UUIDS', 'data', true, 48),
  row(P_SIZES, 'P_SIZES', 'data', true, 32, 24),
  row(P_STATE, 'P_STATE', 'data', true, 4),
  row(P_SYNC_UUID, 'P_SYNC_UUID', 'data', true, 8),
  row(P_AUTH_CHALLENGE, 'P_AUTH_CHALLENGE', 'data', false, 64, 64),
  row(P_AUTH_RESPONSE, 'P_AUTH_RESPONSE', 'data', false, 1, DIGEST_BYTES_MAX - 1),
  row(P_STATE_CHG_REQ, 'P_STATE_CHG_REQ', 'data', true, 8),
  row(P_PING, 'P_PING', 'meta', false, 0),
  row(P_PING_ACK, 'P_PING_ACK', 'meta', false, 0),
  row(P_RECV_ACK, 'P_RECV_ACK', 'meta', true, 24),
  row(P_WRITE_ACK, 'P_WRITE_ACK', 'meta', true, 24),
  row(P_RS_WRITE_ACK, 'P_RS_WRITE_ACK', 'meta', true, 24),
  row(P_SUPERSEDED, 'P_SUPERSEDED', 'meta', true, 24),
  row(P_NEG_ACK, 'P_NEG_ACK', 'meta', true, 24),
  row(P_NEG_DREPLY, 'P_NEG_DREPLY', 'meta', true, 24),
  row(P_NEG_RS_DREPLY, 'P_NEG_RS_DREPLY', 'meta', true, 24),
  row(P_BARRIER_ACK, 'P_BARRIER_ACK', 'meta', false, 8),
  row(P_STATE_CHG_REPLY, 'P_STATE_CHG_REPLY', 'meta', true, 4),
  row(P_OV_REQUEST, 'P_OV_REQUEST', 'data', true, 24),
  row(P_OV_REPLY, 'P_OV_REPLY', 'data', true, 24, DIGEST_BYTES_MAX),
  row(P_OV_RESULT, 'P_OV_RESULT', 'meta', true, 24),
  row(P_CSUM_RS_REQUEST, 'P_CSUM_RS_REQUEST', 'data', true, 24, DIGEST_BYTES_MAX),
  row(P_RS_IS_IN_SYNC, 'P_RS_IS_IN_SYNC', 'meta', true, 24),
  row(P_SYNC_PARAM89, 'P_SYNC_PARAM89', 'data', true, 148),
  row(P_COMPRESSED_BITMAP, 'P_COMPRESSED_BITMAP', 'data', true, 2, BITMAP_CHUNK_BYTES - 2),
  row(P_DELAY_PROBE, 'P_DELAY_PROBE', 'both', true, 8),
  row(P_OUT_OF_SYNC, 'P_OUT_OF_SYNC', 'data', true, 16),
  row(P_RS_CANCEL, 'P_RS_CANCEL', 'meta', true, 24),
  row(P_CONN_ST_CHG_REQ, 'P_CONN_ST_CHG_REQ', 'data', false, 8),
  row(P_CONN_ST_CHG_REPLY, 'P_CONN_ST_CHG_REPLY', 'meta', false, 4),
  row(P_RETRY_WRITE, 'P_RETRY_WRITE', 'meta', true, 24),
  row(P_PROTOCOL_UPDATE, 'P_PROTOCOL_UPDATE', 'data', false, 25, ALGORITHM_NAME_BYTES - 1),
  row(P_TRIM, 'P_TRIM', 'data', true, 28, 0, FEATURE_TRIM),
  row(P_RS_THIN_REQ, 'P_RS_THIN_REQ', 'data', true, 24, 0, FEATURE_THIN_RESYNC),
  row(P_RS_DEALLOCATED, 'P_RS_DEALLOCATED', 'data', true, 16, 0, FEATURE_THIN_RESYNC),
  row(P_ZEROES, 'P_ZEROES', 'data', true, 28, 0, FEATURE_WZEROES),
  row(P_INITIAL_META, 'P_INITIAL_META', 'meta', false, 0),
  row(P_INITIAL_DATA, 'P_INITIAL_DATA', 'data', false, 0),
  row(P_CONNECTION_FEATURES, 'P_CONNECTION_FEATURES', 'data', false, 72),
];

const BY_COMMAND = new Map(PACKETS.map((packet) => [packet.command, packet]));

/** The row of a command, or undefined for a command that drbdts does not know. */
export function describePacket(command: number): PacketDescription | undefined {
  return BY_COMMAND.get(command);
}

/** The name of a command for logs and traces: `P_DATA`, or `0x1234` for one we do not know. */
export function packetName(command: number): string {
  return BY_COMMAND.get(command)?.name ?? `0x${command.toString(16)}`;
}

/** How many commands the dense tables of WireContext hold; every command of an agreed connection is below. */
export const COMMAND_LIMIT = 0x40;

/**
 * What both sides agreed on, once per connection, and the limits that follow from it. Made at the end of the handshake
 * and again when P_PROTOCOL or P_PROTOCOL_UPDATE names a data integrity algorithm; nothing later asks for a version.
 */
export class WireContext {
  /** Agreed feature `TRIM`, ... as booleans, so that nobody tests bits. */
  readonly hasTrim: boolean;
  readonly hasThinResync: boolean;
  readonly hasWriteSame: boolean;
  readonly hasWriteZeroes: boolean;
  /** Largest discard or write-zeroes in one packet. */
  readonly maxDiscardBytes: number;
  /** 56 with WSAME, else 32. */
  readonly sizesBytes: number;
  /** Verify end is announced with an explicit P_STATE (versions >= 97 except 100). */
  readonly hasVerifyStopSector: boolean;
  /** By command: smallest and largest legal payload on each socket; -1: not legal there. */
  readonly dataMinBytes = new Int32Array(COMMAND_LIMIT).fill(-1);
  readonly dataMaxBytes = new Int32Array(COMMAND_LIMIT).fill(-1);
  readonly metaMinBytes = new Int32Array(COMMAND_LIMIT).fill(-1);
  readonly metaMaxBytes = new Int32Array(COMMAND_LIMIT).fill(-1);
  /** 1 where the header of the command carries a volume. */
  readonly hasVolume = new Uint8Array(COMMAND_LIMIT);

  /**
   * @param version agreed protocol version, 100 or 101
   * @param features agreed feature flags
   * @param digestBytes size of the digest in front of the data of P_DATA and its replies; 0 without data-integrity-alg
   */
  constructor(
    readonly version: number,
    readonly features: number,
    readonly digestBytes: number,
  ) {
    assert(
      version >= PROTOCOL_VERSION_MIN && version <= PROTOCOL_VERSION_MAX,
      `version ${version} was never announced`,
    );
    assert(digestBytes >= 0 && digestBytes <= DIGEST_BYTES_MAX, `digest of ${digestBytes} bytes`);
    this.hasTrim = (features & FEATURE_TRIM) !== 0;
    this.hasThinResync = (features & FEATURE_THIN_RESYNC) !== 0;
    this.hasWriteSame = (features & FEATURE_WSAME) !== 0;
    this.hasWriteZeroes = (features & FEATURE_WZEROES) !== 0;
    this.maxDiscardBytes = this.hasWriteSame ? MAX_DISCARD_BYTES : MAX_DISCARD_BYTES_OLD;
    this.sizesBytes = this.hasWriteSame ? 56 : 32;
    this.hasVerifyStopSector = version !== 100;
    for (const packet of PACKETS) {
      if (packet.command >= COMMAND_LIMIT) continue;
      if ((packet.features & features) !== packet.features) continue;
      let min = packet.fixedBytes;
      let max = packet.fixedBytes + packet.tailBytes;
      if (packet.command === P_SIZES) min = max = this.sizesBytes;
      if (packet.command === P_DATA || packet.command === P_DATA_REPLY || packet.command === P_RS_DATA_REPLY) {
        min = P_DATA_BYTES + digestBytes;
        max = min + MAX_REQUEST_BYTES;
      }
      this.hasVolume[packet.command] = packet.hasVolume ? 1 : 0;
      if (packet.socket !== 'meta') {
        this.dataMinBytes[packet.command] = min;
        this.dataMaxBytes[packet.command] = max;
      }
      if (packet.socket !== 'data') {
        this.metaMinBytes[packet.command] = min;
        this.metaMaxBytes[packet.command] = max;
      }
    }
  }
}

const HEADER100_MAGIC_BYTES = [0x86, 0x20, 0xec, 0x20];
/** Small packets are delivered whole behind the header (MAX_INLINE_BYTES - header of src/io/ring.ts). */
const SMALL_PACKET_BYTES = 224 - HEADER100_BYTES;

/**
 * How the data socket is cut into packets after the features exchange. Block data lands alone in its pool block:
 * header, p_data and digest of P_DATA and the two replies are inline. Bitmap packets come as payload, everything else
 * inline.
 * @param digestBytes size of the data-integrity digest, 0 without; switch the rule when P_PROTOCOL(_UPDATE) changes it
 */
export function dataFrameRule(agreedVersion: number, digestBytes: number): FrameRule {
  assert(agreedVersion >= PROTOCOL_VERSION_MIN, `no frame rule for version ${agreedVersion}`);
  const data = P_DATA_BYTES + digestBytes;
  return {
    kind: 'fixed',
    headerBytes: HEADER100_BYTES,
    magic: HEADER100_MAGIC_BYTES,
    lengthOffset: 8,
    lengthBytes: 4,
    commandOffset: 6,
    commandBytes: 2,
    inlineDefault: SMALL_PACKET_BYTES,
    inlineByCommand: {
      [P_DATA]: data,
      [P_DATA_REPLY]: data,
      [P_RS_DATA_REPLY]: data,
      [P_BITMAP]: 0,
      [P_COMPRESSED_BITMAP]: 0,
    },
    maxPayloadBytes: MAX_REQUEST_BYTES,
    hardCapBytes: data + MAX_REQUEST_BYTES,
  };
}

/** How the meta socket is cut into packets after the features exchange: at most 24 bytes follow a header, inline. */
export function metaFrameRule(agreedVersion: number): FrameRule {
  assert(agreedVersion >= PROTOCOL_VERSION_MIN, `no frame rule for version ${agreedVersion}`);
  return {
    kind: 'fixed',
    headerBytes: HEADER100_BYTES,
    magic: HEADER100_MAGIC_BYTES,
    lengthOffset: 8,
    lengthBytes: 4,
    commandOffset: 6,
    commandBytes: 2,
    inlineDefault: SMALL_PACKET_BYTES,
    inlineByCommand: {},
    maxPayloadBytes: 0,
    hardCapBytes: SMALL_PACKET_BYTES,
  };
}
