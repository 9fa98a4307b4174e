import { assert } from '../../base/assert.js';
import { ProtocolError } from '../../base/errors.js';
import {
  ALGORITHM_NAME_BYTES,
  COMMAND_LIMIT,
  DIGEST_BYTES_MAX,
  DP_FLUSH,
  HEADER80_BYTES,
  HEADER80_MAGIC,
  HEADER95_BYTES,
  HEADER95_MAGIC,
  HEADER100_BYTES,
  HEADER100_MAGIC,
  MAX_REQUEST_BYTES,
  P_BARRIER,
  P_BARRIER_ACK,
  P_CONNECTION_FEATURES,
  P_DATA,
  P_DATA_BYTES,
  type P_INITIAL_DATA,
  type P_INITIAL_META,
  P_OUT_OF_SYNC,
  P_RS_DEALLOCATED,
  P_SIZES,
  P_STATE,
  P_SYNC_PARAM89,
  P_SYNC_UUID,
  P_TRIM,
  P_TRIM_BYTES,
  P_UUIDS,
  packetName,
  type SocketRole,
  type WireContext,
} from './packets.js';

/**
 * Bytes <-> values of DRBD packets. Encoders write one packet, header first, at offset 0 of a caller's PacketScratch
 * and return its length; what follows it on the wire (block data) is the caller's payload. Decoders read a payload at
 * (view, offset) of `length` bytes, where `length` is the header's (fixed part + digest + data, wherever they lie), and
 * throw ProtocolError on anything a correct peer cannot send.
 *
 * The block path (P_DATA and replies, requests, acks, barriers) allocates nothing: its decoders fill objects that the
 * caller keeps. Sectors are safe integers; `block_id` is two u32; UUIDs are bigint.
 */

/** Room for the largest inline packet; `bytes` is what goes to `Connection.send`. One per connection is enough. */
export class PacketScratch {
  readonly bytes = new Uint8Array(224);
  readonly view = new DataView(this.bytes.buffer);
}

const TWO_32 = 0x1_0000_0000;
const LAYOUT = 'DRBD 8.4 drbd_protocol.h';
const DECODE_HEADER = 'DRBD 8.4 drbd_main.c decode_header';
const RECEIVER = 'DRBD 8.4 drbd_receiver.c';

function fail(code: string, message: string, section: string): never {
  throw new ProtocolError(`DRBDTS_DRBD_${code}`, message, section);
}

// ---------------------------------------------------------------------------------------------------------------------
// Headers

function writeHeader(scratch: PacketScratch, command: number, volume: number, length: number): void {
  const { view } = scratch;
  view.setUint32(0, HEADER100_MAGIC);
  view.setUint16(4, volume);
  view.setUint16(6, command);
  view.setUint32(8, length);
  view.setUint32(12, 0);
}

/** A packet without payload, or the header in front of a payload of `length` bytes that the caller sends (bitmaps). */
export function encodeHeader(scratch: PacketScratch, command: number, volume: number, length: number): number {
  writeHeader(scratch, command, volume, length);
  return HEADER100_BYTES;
}

/** P_INITIAL_DATA or P_INITIAL_META: the first packet on a new socket, always in the oldest header format. */
export function encodeInitial(scratch: PacketScratch, command: typeof P_INITIAL_DATA | typeof P_INITIAL_META): number {
  scratch.view.setUint32(0, HEADER80_MAGIC);
  scratch.view.setUint16(4, command);
  scratch.view.setUint16(6, 0);
  return HEADER80_BYTES;
}

/** A header of any format, for handshakes and traces. */
export interface PacketHeader {
  readonly format: 80 | 95 | 100;
  readonly headerBytes: number;
  readonly command: number;
  /** 0 in formats 80 and 95. */
  readonly volume: number;
  /** Payload bytes that follow; not yet judged. */
  readonly length: number;
}

/**
 * Decodes a header of any of the three formats, told apart by their magic.
 * @param available bytes that may be read at `offset`
 * @returns undefined when more bytes are needed
 * @throws ProtocolError DRBDTS_DRBD_BAD_MAGIC, DRBDTS_DRBD_BAD_PAD
 */
export function decodeHeader(view: DataView, offset: number, available: number): PacketHeader | undefined {
  if (available < HEADER80_BYTES) return undefined;
  const magic = view.getUint32(offset);
  if (magic === HEADER80_MAGIC)
    return {
      format: 80,
      headerBytes: HEADER80_BYTES,
      command: view.getUint16(offset + 4),
      volume: 0,
      length: view.getUint16(offset + 6),
    };
  if (magic >>> 16 === HEADER95_MAGIC)
    return {
      format: 95,
      headerBytes: HEADER95_BYTES,
      command: magic & 0xffff,
      volume: 0,
      length: view.getUint32(offset + 4),
    };
  if (magic !== HEADER100_MAGIC) fail('BAD_MAGIC', `magic 0x${magic.toString(16)} starts no packet`, DECODE_HEADER);
  if (available < HEADER100_BYTES) return undefined;
  if (view.getUint32(offset + 12) !== 0) fail('BAD_PAD', 'header pad is not zero', DECODE_HEADER);
  return {
    format: 100,
    headerBytes: HEADER100_BYTES,
    command: view.getUint16(offset + 6),
    volume: view.getUint16(offset + 4),
    length: view.getUint32(offset + 8),
  };
}

/** Command of a header100. */
export function readCommand(view: DataView, offset: number): number {
  return view.getUint16(offset + 6);
}

/** Volume of a header100. */
export function readVolume(view: DataView, offset: number): number {
  return view.getUint16(offset + 4);
}

/** Payload length of a header100: everything after the 16 bytes, inline or not. */
export function readLength(view: DataView, offset: number): number {
  return view.getUint32(offset + 8);
}

/**
 * Judges a header100 (its magic was checked by the frame rule): the packet is known, legal on this socket with what was
 * agreed, and its length is one it can have.
 * @returns the command
 * @throws ProtocolError DRBDTS_DRBD_BAD_PAD, DRBDTS_DRBD_UNKNOWN_PACKET, DRBDTS_DRBD_BAD_LENGTH, DRBDTS_DRBD_BAD_VOLUME
 */
export function checkHeader(context: WireContext, socket: SocketRole, view: DataView, offset: number): number {
  const command = view.getUint16(offset + 6);
  const length = view.getUint32(offset + 8);
  const minima = socket === 'data' ? context.dataMinBytes : context.metaMinBytes;
  const maxima = socket === 'data' ? context.dataMaxBytes : context.metaMaxBytes;
  const min = command < COMMAND_LIMIT ? minima[command]! : -1;
  if (view.getUint32(offset + 12) !== 0) fail('BAD_PAD', 'header pad is not zero', DECODE_HEADER);
  if (min < 0) fail('UNKNOWN_PACKET', `${packetName(command)} is not a packet of the ${socket} socket`, RECEIVER);
  if (length < min || length > maxima[command]!)
    fail('BAD_LENGTH', `${packetName(command)} with ${length} bytes, expected ${min}..${maxima[command]}`, RECEIVER);
  if (context.hasVolume[command] === 0 && view.getUint16(offset + 4) !== 0)
    fail(
      'BAD_VOLUME',
      `${packetName(command)} belongs to the connection, not to volume ${readVolume(view, offset)}`,
      RECEIVER,
    );
  return command;
}

// ---------------------------------------------------------------------------------------------------------------------
// Pieces shared by the block packets

/** A sector number; safe because no device has 2^53 sectors. */
function readSector(view: DataView, offset: number): number {
  const high = view.getUint32(offset);
  if (high >= 0x20_0000) fail('BAD_SECTOR', 'sector number beyond 2^53', LAYOUT);
  return high * TWO_32 + view.getUint32(offset + 4);
}

function writeSector(view: DataView, offset: number, sector: number): void {
  const low = sector >>> 0;
  view.setUint32(offset, (sector - low) / TWO_32);
  view.setUint32(offset + 4, low);
}

/** High half of the `block_id` of a block packet (p_data, p_block_req, p_block_ack), its payload at `offset`. */
export function readBlockIdHigh(view: DataView, offset: number): number {
  return view.getUint32(offset + 8);
}

/** Low half of the `block_id`. */
export function readBlockIdLow(view: DataView, offset: number): number {
  return view.getUint32(offset + 12);
}

/**
 * Judges a range against a device.
 * @throws ProtocolError DRBDTS_DRBD_BEYOND_DEVICE
 */
export function checkInsideDevice(sector: number, sizeBytes: number, capacitySectors: number): void {
  if (sector + sizeBytes / 512 > capacitySectors)
    fail('BEYOND_DEVICE', `sector ${sector} + ${sizeBytes} bytes ends beyond ${capacitySectors} sectors`, RECEIVER);
}

function checkRequestSize(sizeBytes: number, maxBytes: number): void {
  if (sizeBytes === 0 || (sizeBytes & 511) !== 0 || sizeBytes > maxBytes)
    fail('BAD_SIZE', `${sizeBytes} bytes are not 1..${maxBytes / 512} whole sectors`, RECEIVER);
}

function expectLength(length: number, expected: number, command: number): void {
  if (length !== expected)
    fail('BAD_LENGTH', `${packetName(command)} with ${length} bytes, expected ${expected}`, LAYOUT);
}

// ---------------------------------------------------------------------------------------------------------------------
// P_DATA, P_DATA_REPLY, P_RS_DATA_REPLY, P_TRIM, P_ZEROES

/** Decoded p_data or p_trim. One per receiver, filled again for each packet. */
export class DataPacket {
  sector = 0;
  blockIdHigh = 0;
  blockIdLow = 0;
  /** 0 in replies. */
  sequence = 0;
  dpFlags = 0;
  /** Bytes of data (without digest), or of the range to discard. 0 only for an empty flush. */
  sizeBytes = 0;
}

/**
 * Writes header, p_data and digest of P_DATA or a reply; `dataBytes` bytes of data must follow.
 * @param digest exactly as long as the context's digestBytes; absent without a data-integrity-alg
 */
export function encodeDataPacket(
  scratch: PacketScratch,
  command: number,
  volume: number,
  sector: number,
  blockIdHigh: number,
  blockIdLow: number,
  sequence: number,
  dpFlags: number,
  dataBytes: number,
  digest?: Uint8Array,
): number {
  const digestBytes = digest === undefined ? 0 : digest.length;
  const { view } = scratch;
  writeHeader(scratch, command, volume, P_DATA_BYTES + digestBytes + dataBytes);
  writeSector(view, 16, sector);
  view.setUint32(24, blockIdHigh);
  view.setUint32(28, blockIdLow);
  view.setUint32(32, sequence);
  view.setUint32(36, dpFlags);
  if (digest !== undefined) scratch.bytes.set(digest, HEADER100_BYTES + P_DATA_BYTES);
  return HEADER100_BYTES + P_DATA_BYTES + digestBytes;
}

/** P_DATA: a replicated write. `dataBytes` bytes of data must follow. */
export function encodeData(
  scratch: PacketScratch,
  volume: number,
  sector: number,
  blockIdHigh: number,
  blockIdLow: number,
  sequence: number,
  dpFlags: number,
  dataBytes: number,
  digest?: Uint8Array,
): number {
  return encodeDataPacket(
    scratch,
    P_DATA,
    volume,
    sector,
    blockIdHigh,
    blockIdLow,
    sequence,
    dpFlags,
    dataBytes,
    digest,
  );
}

/**
 * P_DATA_REPLY or P_RS_DATA_REPLY: the answer to a read or resync request, with sequence and flags 0.
 * @param command P_DATA_REPLY or P_RS_DATA_REPLY
 */
export function encodeDataReply(
  scratch: PacketScratch,
  command: number,
  volume: number,
  sector: number,
  blockIdHigh: number,
  blockIdLow: number,
  dataBytes: number,
  digest?: Uint8Array,
): number {
  return encodeDataPacket(scratch, command, volume, sector, blockIdHigh, blockIdLow, 0, 0, dataBytes, digest);
}

/**
 * Decodes p_data of P_DATA, P_DATA_REPLY or P_RS_DATA_REPLY. The digest lies at `offset + 24` (context.digestBytes
 * long).
 * @param length the header's length: 24 + digest + data
 * @throws ProtocolError DRBDTS_DRBD_BAD_LENGTH, DRBDTS_DRBD_BAD_SIZE, DRBDTS_DRBD_BAD_SECTOR
 */
export function decodeData(
  context: WireContext,
  command: number,
  view: DataView,
  offset: number,
  length: number,
  into: DataPacket,
): void {
  const sizeBytes = length - P_DATA_BYTES - context.digestBytes;
  if (sizeBytes < 0) fail('BAD_LENGTH', `${packetName(command)} with ${length} bytes is too short`, LAYOUT);
  into.sector = readSector(view, offset);
  into.blockIdHigh = view.getUint32(offset + 8);
  into.blockIdLow = view.getUint32(offset + 12);
  into.sequence = view.getUint32(offset + 16);
  into.dpFlags = view.getUint32(offset + 20);
  into.sizeBytes = sizeBytes;
  // An empty write is how a flush without data once travelled; without the flush it means nothing.
  if (sizeBytes === 0 && command === P_DATA && (into.dpFlags & DP_FLUSH) !== 0) return;
  checkRequestSize(sizeBytes, MAX_REQUEST_BYTES);
}

/** P_TRIM or P_ZEROES (`command`): discard or zero `sizeBytes`; no data, no digest. */
export function encodeTrim(
  scratch: PacketScratch,
  command: number,
  volume: number,
  sector: number,
  blockIdHigh: number,
  blockIdLow: number,
  sequence: number,
  dpFlags: number,
  sizeBytes: number,
): number {
  const { view } = scratch;
  writeHeader(scratch, command, volume, P_TRIM_BYTES);
  writeSector(view, 16, sector);
  view.setUint32(24, blockIdHigh);
  view.setUint32(28, blockIdLow);
  view.setUint32(32, sequence);
  view.setUint32(36, dpFlags);
  view.setUint32(40, sizeBytes);
  return HEADER100_BYTES + P_TRIM_BYTES;
}

/**
 * Decodes P_TRIM or P_ZEROES.
 * @throws ProtocolError DRBDTS_DRBD_BAD_LENGTH, DRBDTS_DRBD_BAD_SIZE, DRBDTS_DRBD_BAD_SECTOR
 */
export function decodeTrim(
  context: WireContext,
  view: DataView,
  offset: number,
  length: number,
  into: DataPacket,
): void {
  expectLength(length, P_TRIM_BYTES, P_TRIM);
  into.sector = readSector(view, offset);
  into.blockIdHigh = view.getUint32(offset + 8);
  into.blockIdLow = view.getUint32(offset + 12);
  into.sequence = view.getUint32(offset + 16);
  into.dpFlags = view.getUint32(offset + 20);
  into.sizeBytes = view.getUint32(offset + 24);
  checkRequestSize(into.sizeBytes, context.maxDiscardBytes);
}

// ---------------------------------------------------------------------------------------------------------------------
// Requests: P_DATA_REQUEST, P_RS_DATA_REQUEST, P_RS_THIN_REQ, P_OV_REQUEST, P_OV_REPLY, P_CSUM_RS_REQUEST

/** Decoded p_block_req. */
export class BlockRequest {
  sector = 0;
  blockIdHigh = 0;
  blockIdLow = 0;
  sizeBytes = 0;
  /** Bytes of the digest at `offset + 24` of the payload; 0 where the packet has none. */
  digestBytes = 0;
}

/**
 * Any of the request packets.
 * @param digest only for P_OV_REPLY and P_CSUM_RS_REQUEST
 */
export function encodeRequest(
  scratch: PacketScratch,
  command: number,
  volume: number,
  sector: number,
  blockIdHigh: number,
  blockIdLow: number,
  sizeBytes: number,
  digest?: Uint8Array,
): number {
  const digestBytes = digest === undefined ? 0 : digest.length;
  const { view } = scratch;
  writeHeader(scratch, command, volume, 24 + digestBytes);
  writeSector(view, 16, sector);
  view.setUint32(24, blockIdHigh);
  view.setUint32(28, blockIdLow);
  view.setUint32(32, sizeBytes);
  view.setUint32(36, 0);
  if (digest !== undefined) scratch.bytes.set(digest, HEADER100_BYTES + 24);
  return HEADER100_BYTES + 24 + digestBytes;
}

/**
 * Decodes any request packet.
 * @param digestBytes what the packet must carry behind p_block_req: 0, or the size of the verify or csums digest
 * @throws ProtocolError DRBDTS_DRBD_BAD_LENGTH, DRBDTS_DRBD_BAD_SIZE, DRBDTS_DRBD_BAD_SECTOR
 */
export function decodeRequest(
  command: number,
  view: DataView,
  offset: number,
  length: number,
  digestBytes: number,
  into: BlockRequest,
): void {
  expectLength(length, 24 + digestBytes, command);
  into.sector = readSector(view, offset);
  into.blockIdHigh = view.getUint32(offset + 8);
  into.blockIdLow = view.getUint32(offset + 12);
  into.sizeBytes = view.getUint32(offset + 16);
  into.digestBytes = digestBytes;
  checkRequestSize(into.sizeBytes, MAX_REQUEST_BYTES);
}

// ---------------------------------------------------------------------------------------------------------------------
// Block acks on the meta socket

/** Decoded p_block_ack. */
export class BlockAck {
  sector = 0;
  blockIdHigh = 0;
  blockIdLow = 0;
  sizeBytes = 0;
  sequence = 0;
}

/** Any packet with a p_block_ack: P_RECV_ACK .. P_NEG_RS_DREPLY, P_OV_RESULT, P_RS_IS_IN_SYNC, P_RS_CANCEL, ... */
export function encodeBlockAck(
  scratch: PacketScratch,
  command: number,
  volume: number,
  sector: number,
  blockIdHigh: number,
  blockIdLow: number,
  sizeBytes: number,
  sequence: number,
): number {
  const { view } = scratch;
  writeHeader(scratch, command, volume, 24);
  writeSector(view, 16, sector);
  view.setUint32(24, blockIdHigh);
  view.setUint32(28, blockIdLow);
  view.setUint32(32, sizeBytes);
  view.setUint32(36, sequence);
  return HEADER100_BYTES + 24;
}

/**
 * Decodes p_block_ack. Sizes up to the largest discard are legal; 0 is the ack of an empty flush.
 * @throws ProtocolError DRBDTS_DRBD_BAD_LENGTH, DRBDTS_DRBD_BAD_SIZE, DRBDTS_DRBD_BAD_SECTOR
 */
export function decodeBlockAck(
  context: WireContext,
  command: number,
  view: DataView,
  offset: number,
  length: number,
  into: BlockAck,
): void {
  expectLength(length, 24, command);
  into.sector = readSector(view, offset);
  into.blockIdHigh = view.getUint32(offset + 8);
  into.blockIdLow = view.getUint32(offset + 12);
  into.sizeBytes = view.getUint32(offset + 16);
  into.sequence = view.getUint32(offset + 20);
  if (into.sizeBytes !== 0) checkRequestSize(into.sizeBytes, context.maxDiscardBytes);
}

// ---------------------------------------------------------------------------------------------------------------------
// Barriers

/** P_BARRIER: closes the epoch. `barrier` is opaque to the peer, who echoes its 4 bytes. */
export function encodeBarrier(scratch: PacketScratch, barrier: number): number {
  writeHeader(scratch, P_BARRIER, 0, 8);
  scratch.view.setUint32(16, barrier);
  scratch.view.setUint32(20, 0);
  return HEADER100_BYTES + 8;
}

/** @returns the barrier's 4 opaque bytes as a u32, to be echoed by `encodeBarrierAck` */
export function decodeBarrier(view: DataView, offset: number, length: number): number {
  expectLength(length, 8, P_BARRIER);
  return view.getUint32(offset);
}

/** P_BARRIER_ACK: the epoch of `writeCount` writes is durable. */
export function encodeBarrierAck(scratch: PacketScratch, barrier: number, writeCount: number): number {
  writeHeader(scratch, P_BARRIER_ACK, 0, 8);
  scratch.view.setUint32(16, barrier);
  scratch.view.setUint32(20, writeCount);
  return HEADER100_BYTES + 8;
}

/** Decoded p_barrier_ack. */
export class BarrierAck {
  barrier = 0;
  /** Writes of the epoch, as the receiver counted them; must equal the sender's count. */
  writeCount = 0;
}

export function decodeBarrierAck(view: DataView, offset: number, length: number, into: BarrierAck): void {
  expectLength(length, 8, P_BARRIER_ACK);
  into.barrier = view.getUint32(offset);
  into.writeCount = view.getUint32(offset + 4);
}

// ---------------------------------------------------------------------------------------------------------------------
// P_OUT_OF_SYNC, P_RS_DEALLOCATED

/** Decoded p_block_desc. */
export class BlockRange {
  sector = 0;
  sizeBytes = 0;
}

function encodeBlockRange(
  scratch: PacketScratch,
  command: number,
  volume: number,
  sector: number,
  size: number,
): number {
  writeHeader(scratch, command, volume, 16);
  writeSector(scratch.view, 16, sector);
  scratch.view.setUint32(24, size);
  scratch.view.setUint32(28, 0);
  return HEADER100_BYTES + 16;
}

/** P_OUT_OF_SYNC: "I changed this without sending it". */
export function encodeOutOfSync(scratch: PacketScratch, volume: number, sector: number, sizeBytes: number): number {
  return encodeBlockRange(scratch, P_OUT_OF_SYNC, volume, sector, sizeBytes);
}

/** P_RS_DEALLOCATED: the answer to P_RS_THIN_REQ when all of the range is zero. */
export function encodeDeallocated(scratch: PacketScratch, volume: number, sector: number, sizeBytes: number): number {
  return encodeBlockRange(scratch, P_RS_DEALLOCATED, volume, sector, sizeBytes);
}

/** Decodes P_OUT_OF_SYNC or P_RS_DEALLOCATED (`command`). A changed range may be as long as a discard. */
export function decodeBlockRange(
  context: WireContext,
  command: number,
  view: DataView,
  offset: number,
  length: number,
  into: BlockRange,
): void {
  expectLength(length, 16, command);
  into.sector = readSector(view, offset);
  into.sizeBytes = view.getUint32(offset + 8);
  checkRequestSize(into.sizeBytes, command === P_OUT_OF_SYNC ? context.maxDiscardBytes : MAX_REQUEST_BYTES);
}

// ---------------------------------------------------------------------------------------------------------------------
// Connection parameters

/** P_CONNECTION_FEATURES. */
export interface ConnectionFeatures {
  readonly versionMin: number;
  readonly versionMax: number;
  readonly features: number;
}

/** P_CONNECTION_FEATURES, with the 8-byte header80 that everything before the agreement has. */
export function encodeFeatures(scratch: PacketScratch, features: ConnectionFeatures): number {
  const { view } = scratch;
  scratch.bytes.fill(0, 0, HEADER80_BYTES + 72);
  view.setUint32(0, HEADER80_MAGIC);
  view.setUint16(4, P_CONNECTION_FEATURES);
  view.setUint16(6, 72);
  view.setUint32(8, features.versionMin);
  view.setUint32(12, features.features);
  view.setUint32(16, features.versionMax);
  return HEADER80_BYTES + 72;
}

/** Decodes P_CONNECTION_FEATURES. A maximum of 0 means the minimum; the reserved words are for later and not judged. */
export function decodeFeatures(view: DataView, offset: number, length: number): ConnectionFeatures {
  expectLength(length, 72, P_CONNECTION_FEATURES);
  const versionMin = view.getUint32(offset);
  const versionMax = view.getUint32(offset + 8);
  return { versionMin, versionMax: versionMax === 0 ? versionMin : versionMax, features: view.getUint32(offset + 4) };
}

/** P_PROTOCOL and P_PROTOCOL_UPDATE. Policies are the wire numbers of split-brain.ts. */
export interface ProtocolParameters {
  /** 1 A, 2 B, 3 C. */
  readonly wireProtocol: number;
  readonly afterSplitBrain0Primaries: number;
  readonly afterSplitBrain1Primary: number;
  readonly afterSplitBrain2Primaries: number;
  readonly discardMyData: boolean;
  readonly dryRun: boolean;
  readonly twoPrimaries: boolean;
  /** Kernel name of the data-integrity algorithm, '' for none. */
  readonly integrityAlgorithm: string;
}

/** P_PROTOCOL or P_PROTOCOL_UPDATE (`command`). */
export function encodeProtocol(scratch: PacketScratch, command: number, parameters: ProtocolParameters): number {
  const { view } = scratch;
  const nameBytes = parameters.integrityAlgorithm.length;
  assert(nameBytes < ALGORITHM_NAME_BYTES, 'algorithm name fits its field');
  writeHeader(scratch, command, 0, 24 + nameBytes + 1);
  view.setUint32(16, parameters.wireProtocol);
  view.setUint32(20, parameters.afterSplitBrain0Primaries);
  view.setUint32(24, parameters.afterSplitBrain1Primary);
  view.setUint32(28, parameters.afterSplitBrain2Primaries);
  view.setUint32(32, (parameters.discardMyData ? 1 : 0) | (parameters.dryRun ? 2 : 0));
  view.setUint32(36, parameters.twoPrimaries ? 1 : 0);
  writeName(scratch, 40, parameters.integrityAlgorithm, nameBytes + 1);
  return HEADER100_BYTES + 24 + nameBytes + 1;
}

/** Decodes P_PROTOCOL or P_PROTOCOL_UPDATE (`command`). */
export function decodeProtocol(command: number, view: DataView, offset: number, length: number): ProtocolParameters {
  if (length < 25 || length > 24 + ALGORITHM_NAME_BYTES)
    fail('BAD_LENGTH', `${packetName(command)} with ${length} bytes, expected 25..88`, LAYOUT);
  const section = `${RECEIVER} receive_protocol`;
  const wireProtocol = view.getUint32(offset);
  if (wireProtocol < 1 || wireProtocol > 3) fail('BAD_PROTOCOL', `wire protocol ${wireProtocol}`, section);
  const policies = [view.getUint32(offset + 4), view.getUint32(offset + 8), view.getUint32(offset + 12)] as const;
  for (const policy of policies) if (policy > 10) fail('BAD_PROTOCOL', `after-split-brain policy ${policy}`, section);
  const flags = view.getUint32(offset + 16);
  if (flags > 3) fail('BAD_PROTOCOL', `connection flags 0x${flags.toString(16)}`, section);
  const twoPrimaries = view.getUint32(offset + 20);
  if (twoPrimaries > 1) fail('BAD_PROTOCOL', `allow-two-primaries ${twoPrimaries}`, section);
  return {
    wireProtocol,
    afterSplitBrain0Primaries: policies[0],
    afterSplitBrain1Primary: policies[1],
    afterSplitBrain2Primaries: policies[2],
    discardMyData: (flags & 1) !== 0,
    dryRun: (flags & 2) !== 0,
    twoPrimaries: twoPrimaries === 1,
    integrityAlgorithm: readName(view, offset + 24, length - 24, section),
  };
}

/** P_SYNC_PARAM89. */
export interface SyncParameters {
  readonly resyncRateKibPerSecond: number;
  /** Kernel names, '' for none. */
  readonly verifyAlgorithm: string;
  readonly checksumAlgorithm: string;
  readonly planAheadTenths: number;
  readonly delayTargetTenths: number;
  readonly fillTargetSectors: number;
  readonly maxRateKibPerSecond: number;
}

/** P_SYNC_PARAM89 in the 148-byte form of version 95 and later. */
export function encodeSyncParam(scratch: PacketScratch, volume: number, parameters: SyncParameters): number {
  const { view } = scratch;
  writeHeader(scratch, P_SYNC_PARAM89, volume, 148);
  view.setUint32(16, parameters.resyncRateKibPerSecond);
  writeName(scratch, 20, parameters.verifyAlgorithm, ALGORITHM_NAME_BYTES);
  writeName(scratch, 84, parameters.checksumAlgorithm, ALGORITHM_NAME_BYTES);
  view.setUint32(148, parameters.planAheadTenths);
  view.setUint32(152, parameters.delayTargetTenths);
  view.setUint32(156, parameters.fillTargetSectors);
  view.setUint32(160, parameters.maxRateKibPerSecond);
  return HEADER100_BYTES + 148;
}

/** Decodes P_SYNC_PARAM89. Rates are the peer's wish; the resync clamps them, so any u32 is legal. */
export function decodeSyncParam(view: DataView, offset: number, length: number): SyncParameters {
  expectLength(length, 148, P_SYNC_PARAM89);
  const section = `${RECEIVER} receive_SyncParam`;
  return {
    resyncRateKibPerSecond: view.getUint32(offset),
    verifyAlgorithm: readName(view, offset + 4, ALGORITHM_NAME_BYTES, section),
    checksumAlgorithm: readName(view, offset + 68, ALGORITHM_NAME_BYTES, section),
    planAheadTenths: view.getUint32(offset + 132),
    delayTargetTenths: view.getUint32(offset + 136),
    fillTargetSectors: view.getUint32(offset + 140),
    maxRateKibPerSecond: view.getUint32(offset + 144),
  };
}

/** Limits of the sender's request queue: the tail of P_SIZES with feature WSAME. All sizes in bytes. */
export interface QueueLimits {
  readonly physicalBlockBytes: number;
  readonly logicalBlockBytes: number;
  readonly alignmentOffsetBytes: number;
  readonly minimumIoBytes: number;
  readonly optimalIoBytes: number;
  readonly discardEnabled: boolean;
  readonly discardZeroes: boolean;
  readonly writeSameCapable: boolean;
}

/** P_SIZES; sizes in sectors. */
export interface Sizes {
  /** Backing device, 0 if diskless. */
  readonly diskSectors: number;
  /** Configured limit, 0 for none. */
  readonly userSectors: number;
  /** Size the sender exports now; 0 in the first packet of an online resize. */
  readonly currentSectors: number;
  readonly maxRequestBytes: number;
  readonly queueOrderType: number;
  /** DDS_FORCED | DDS_NO_RESYNC. */
  readonly ddsFlags: number;
  /** Present if and only if WSAME was agreed. */
  readonly limits?: QueueLimits;
}

/** P_SIZES: 56 bytes with WSAME (`sizes.limits` is then required), else 32. */
export function encodeSizes(scratch: PacketScratch, context: WireContext, volume: number, sizes: Sizes): number {
  const { view } = scratch;
  writeHeader(scratch, P_SIZES, volume, context.sizesBytes);
  writeSector(view, 16, sizes.diskSectors);
  writeSector(view, 24, sizes.userSectors);
  writeSector(view, 32, sizes.currentSectors);
  view.setUint32(40, sizes.maxRequestBytes);
  view.setUint16(44, sizes.queueOrderType);
  view.setUint16(46, sizes.ddsFlags);
  if (context.hasWriteSame) {
    const limits = sizes.limits;
    assert(limits !== undefined, 'with WSAME agreed P_SIZES carries queue limits');
    view.setUint32(48, limits.physicalBlockBytes);
    view.setUint32(52, limits.logicalBlockBytes);
    view.setUint32(56, limits.alignmentOffsetBytes);
    view.setUint32(60, limits.minimumIoBytes);
    view.setUint32(64, limits.optimalIoBytes);
    view.setUint8(68, limits.discardEnabled ? 1 : 0);
    view.setUint8(69, limits.discardZeroes ? 1 : 0);
    view.setUint8(70, limits.writeSameCapable ? 1 : 0);
    view.setUint8(71, 0);
  }
  return HEADER100_BYTES + context.sizesBytes;
}

/** Decodes P_SIZES. */
export function decodeSizes(context: WireContext, view: DataView, offset: number, length: number): Sizes {
  expectLength(length, context.sizesBytes, P_SIZES);
  const ddsFlags = view.getUint16(offset + 30);
  if (ddsFlags > 3) fail('BAD_SIZES', `dds_flags 0x${ddsFlags.toString(16)}`, `${RECEIVER} receive_sizes`);
  const sizes: Sizes = {
    diskSectors: readSector(view, offset),
    userSectors: readSector(view, offset + 8),
    currentSectors: readSector(view, offset + 16),
    maxRequestBytes: view.getUint32(offset + 24),
    queueOrderType: view.getUint16(offset + 28),
    ddsFlags,
  };
  if (!context.hasWriteSame) return sizes;
  return {
    ...sizes,
    limits: {
      physicalBlockBytes: view.getUint32(offset + 32),
      logicalBlockBytes: view.getUint32(offset + 36),
      alignmentOffsetBytes: view.getUint32(offset + 40),
      minimumIoBytes: view.getUint32(offset + 44),
      optimalIoBytes: view.getUint32(offset + 48),
      discardEnabled: view.getUint8(offset + 52) !== 0,
      discardZeroes: view.getUint8(offset + 53) !== 0,
      writeSameCapable: view.getUint8(offset + 54) !== 0,
    },
  };
}

/** P_UUIDS: generation identifiers, how many bits are set, and UUID_FLAG_*. */
export interface Uuids {
  readonly current: bigint;
  readonly bitmap: bigint;
  /** The younger history slot, then the older. */
  readonly history0: bigint;
  readonly history1: bigint;
  readonly bitsSet: number;
  readonly flags: number;
}

export function encodeUuids(scratch: PacketScratch, volume: number, uuids: Uuids): number {
  const { view } = scratch;
  writeHeader(scratch, P_UUIDS, volume, 48);
  view.setBigUint64(16, uuids.current);
  view.setBigUint64(24, uuids.bitmap);
  view.setBigUint64(32, uuids.history0);
  view.setBigUint64(40, uuids.history1);
  writeSector(view, 48, uuids.bitsSet);
  writeSector(view, 56, uuids.flags);
  return HEADER100_BYTES + 48;
}

/** Decodes P_UUIDS. */
export function decodeUuids(view: DataView, offset: number, length: number): Uuids {
  expectLength(length, 48, P_UUIDS);
  const flags = view.getBigUint64(offset + 40);
  if (flags > 15n) fail('BAD_UUIDS', `flags 0x${flags.toString(16)}`, `${RECEIVER} receive_uuids`);
  const bitsSet = view.getBigUint64(offset + 32);
  if (bitsSet > 0x1f_ffff_ffff_ffffn) fail('BAD_UUIDS', `${bitsSet} bits set`, `${RECEIVER} receive_uuids`);
  return {
    current: view.getBigUint64(offset),
    bitmap: view.getBigUint64(offset + 8),
    history0: view.getBigUint64(offset + 16),
    history1: view.getBigUint64(offset + 24),
    bitsSet: Number(bitsSet),
    flags: Number(flags),
  };
}

/** P_SYNC_UUID: start resync with this current UUID. */
export function encodeSyncUuid(scratch: PacketScratch, volume: number, uuid: bigint): number {
  writeHeader(scratch, P_SYNC_UUID, volume, 8);
  scratch.view.setBigUint64(16, uuid);
  return HEADER100_BYTES + 8;
}

export function decodeSyncUuid(view: DataView, offset: number, length: number): bigint {
  expectLength(length, 8, P_SYNC_UUID);
  return view.getBigUint64(offset);
}

// ---------------------------------------------------------------------------------------------------------------------
// State

/** P_STATE: the packed state word of state.ts, seen from the sender. */
export function encodeState(scratch: PacketScratch, volume: number, packedState: number): number {
  writeHeader(scratch, P_STATE, volume, 4);
  scratch.view.setUint32(16, packedState);
  return HEADER100_BYTES + 4;
}

/** @returns the state word; `unpackState` judges it */
export function decodeState(view: DataView, offset: number, length: number): number {
  expectLength(length, 4, P_STATE);
  return view.getUint32(offset);
}

/** P_STATE_CHG_REQ or P_CONN_ST_CHG_REQ (`command`; the latter with volume 0): mask and value, seen from the sender. */
export function encodeStateChange(
  scratch: PacketScratch,
  command: number,
  volume: number,
  mask: number,
  value: number,
): number {
  writeHeader(scratch, command, volume, 8);
  scratch.view.setUint32(16, mask);
  scratch.view.setUint32(20, value);
  return HEADER100_BYTES + 8;
}

/** Mask and value of a requested state change; `convertPerspective` of state.ts judges and turns them. */
export function decodeStateChange(
  command: number,
  view: DataView,
  offset: number,
  length: number,
): { readonly mask: number; readonly value: number } {
  expectLength(length, 8, command);
  return { mask: view.getUint32(offset), value: view.getUint32(offset + 4) };
}

/** P_STATE_CHG_REPLY or P_CONN_ST_CHG_REPLY (`command`) with a StateResult. */
export function encodeStateChangeReply(
  scratch: PacketScratch,
  command: number,
  volume: number,
  result: number,
): number {
  writeHeader(scratch, command, volume, 4);
  scratch.view.setInt32(16, result);
  return HEADER100_BYTES + 4;
}

/** @returns the StateResult, one of Appendix B's numbers */
export function decodeStateChangeReply(command: number, view: DataView, offset: number, length: number): number {
  expectLength(length, 4, command);
  const result = view.getInt32(offset);
  if (result < -21 || result > 4) fail('BAD_RESULT', `state change result ${result}`, 'DRBD 8.4 enum drbd_state_rv');
  return result;
}

// ---------------------------------------------------------------------------------------------------------------------
// Authentication

/** P_AUTH_CHALLENGE or P_AUTH_RESPONSE (`command`): just bytes. */
export function encodeAuth(scratch: PacketScratch, command: number, bytes: Uint8Array): number {
  assert(bytes.length > 0 && bytes.length <= 128, 'challenges and responses have 1..128 bytes');
  writeHeader(scratch, command, 0, bytes.length);
  scratch.bytes.set(bytes, HEADER100_BYTES);
  return HEADER100_BYTES + bytes.length;
}

/** Copies the digest behind a p_data or p_block_req sub-header (24 bytes) out of a packet. Not for the hot path. */
export function readDigest(view: DataView, offset: number, digestBytes: number): Uint8Array {
  assert(digestBytes > 0 && digestBytes <= DIGEST_BYTES_MAX, 'digest length was checked');
  return new Uint8Array(view.buffer, view.byteOffset + offset + 24, digestBytes).slice();
}

// ---------------------------------------------------------------------------------------------------------------------
// Names

function writeName(scratch: PacketScratch, offset: number, name: string, fieldBytes: number): void {
  assert(name.length < fieldBytes, `algorithm name ${name} fits its field`);
  scratch.bytes.fill(0, offset, offset + fieldBytes);
  for (let i = 0; i < name.length; i++) scratch.bytes[offset + i] = name.charCodeAt(i);
}

/** A NUL-terminated kernel crypto name; graphic ASCII only, so that it may stand in a log line. */
function readName(view: DataView, offset: number, fieldBytes: number, section: string): string {
  let name = '';
  for (let i = 0; i < fieldBytes; i++) {
    const code = view.getUint8(offset + i);
    if (code === 0) return name;
    if (code < 0x21 || code > 0x7e) fail('BAD_NAME', `algorithm name has byte 0x${code.toString(16)}`, section);
    name += String.fromCharCode(code);
  }
  return fail('BAD_NAME', 'algorithm name is not NUL-terminated', section);
}
