/**
 * The NBD server: connections over the doors of `io/ring.ts`, requests into a `BlockTarget`.
 *
 * All protocol is in `nbd/`; here is what needs doors: who may connect, how much one client may have in flight, where
 * payloads live and when they are given back, and requests that touch parts of sectors. A request is a slot of a table
 * that only grows to what was once in flight: no promise, closure or timer is made for one.
 */
import { assert } from '../base/assert.js';
import { Errno } from '../base/errors.js';
import type { BlockFront, BlockTarget } from '../io/block-target.js';
import {
  type Connection,
  type ConnectionHandler,
  FRAME_SKIPPED,
  type Listener,
  type ListenOptions,
  type Memory,
  NO_PAYLOAD,
  type Ring,
  SEND_QUEUE_LIMIT_BYTES,
} from '../io/ring.js';
import { NbdNegotiation, type Refusal } from '../nbd/connection.js';
import {
  BASE_ALLOCATION_ID,
  MAX_PAYLOAD_BYTES,
  MAXIMUM_BLOCK_BYTES,
  NBD_CMD_BLOCK_STATUS,
  NBD_CMD_CACHE,
  NBD_CMD_DISC,
  NBD_CMD_FLAG_FUA,
  NBD_CMD_FLAG_NO_HOLE,
  NBD_CMD_FLAG_REQ_ONE,
  NBD_CMD_FLUSH,
  NBD_CMD_READ,
  NBD_CMD_TRIM,
  NBD_CMD_WRITE,
  NBD_CMD_WRITE_ZEROES,
  NBD_FLAG_CAN_MULTI_CONN,
  NBD_FLAG_HAS_FLAGS,
  NBD_FLAG_READ_ONLY,
  NBD_FLAG_ROTATIONAL,
  NBD_FLAG_SEND_CACHE,
  NBD_FLAG_SEND_FAST_ZERO,
  NBD_FLAG_SEND_FLUSH,
  NBD_FLAG_SEND_FUA,
  NBD_FLAG_SEND_TRIM,
  NBD_FLAG_SEND_WRITE_ZEROES,
  PREFERRED_BLOCK_BYTES,
} from '../nbd/constants.js';
import { NBD_EINVAL, nbdErrorOf } from '../nbd/errno.js';
import type { ExportDescription } from '../nbd/options.js';
import { RangeLock } from '../nbd/range-lock.js';
import {
  BlockStatusRuns,
  REQUEST_COMMAND,
  REQUEST_COOKIE,
  REQUEST_FLAGS,
  REQUEST_FRAMING,
  REQUEST_LENGTH,
  REQUEST_OFFSET,
  ReplyBuilder,
  type RequestRules,
  validateRequest,
} from '../nbd/requests.js';

/** One client may have this much in flight; what arrives beyond waits, and the connection is not read meanwhile. */
export const MAX_IN_FLIGHT_REQUESTS = 128;
export const MAX_IN_FLIGHT_BYTES = 64 * 1024 * 1024;
/**
 * Requests of one client that wait for their turn. A connection stops being read at the first, so more than what the
 * ring had already cut out of its receive buffer means that reading does not stop; the client is let go.
 */
export const MAX_WAITING_REQUESTS = 65_536;
/** TRIM and WRITE_ZEROES go to the engine in pieces of this size: one may cover 4 GiB, and others want a turn. */
export const ZERO_PIECE_BYTES = 32 * 1024 * 1024;
/** Unaligned writes go through a block of this size. */
export const UNALIGNED_PIECE_BYTES = 256 * 1024;

const TWO_32 = 0x1_0000_0000;
/** How soon a client that waits for pool memory is looked at again when no request of ours ends meanwhile. */
const STARVED_RETRY_MS = 5;

/** A BlockTarget that can tell what is allocated. */
export interface NbdTarget extends BlockTarget {
  /**
   * Tells the runs from `offsetBytes` on, at least one; may stop early or go on past `lengthBytes`. Advisory: never
   * claim NBD_STATE_ZERO for what is not certain. Absent: all of it is allocated data.
   */
  blockStatus?(offsetBytes: number, lengthBytes: number, runs: BlockStatusRuns): void;
}

export interface NbdExportOptions {
  readonly description?: string;
  readonly readOnly?: boolean;
  /** The backing store punches holes, so zeroes with NBD_CMD_FLAG_FAST_ZERO are quick. */
  readonly fastZero?: boolean;
  readonly rotational?: boolean;
}

/** The part of a pino logger used here. */
export interface NbdLog {
  info(fields: object, message: string): void;
  warn(fields: object, message: string): void;
}

export interface NbdServerOptions {
  readonly log?: NbdLog;
  /** All listeners together. When full, the oldest client still in its handshake makes room. Default 100. */
  readonly maxConnections?: number;
  /** From accept to transmission. Default 10 s. */
  readonly handshakeMs?: number;
  /** A client that takes no byte of its replies for so long is let go. Default 300 s: kernels may stall for a while. */
  readonly writeStallMs?: number;
  /** Resolution of both. Default 1 s. */
  readonly tickMs?: number;
}

/** What a request is waiting for. */
enum Step {
  Free,
  /** In its connection's queue: not started, holds nothing but a WRITE's payload. */
  Queued,
  /** In the range lock. */
  Locking,
  /** Holds its range, waits for the reserve block. */
  Reserve,
  /** At the target, in one go. */
  Whole,
  /** At the target: one piece of whole sectors to zero. */
  ZeroPiece,
  /** At the target: old content of sectors that are partly overwritten, and then those sectors. */
  ReadOld,
  WriteNew,
}

/** One request. Slots are reused; `id` is the number the target and the range lock know it by. */
class RequestSlot {
  client: NbdClient | undefined = undefined;
  /** Links free slots, a connection's queue, or the queue for the reserve block. */
  next: RequestSlot | undefined = undefined;
  step = Step.Free;
  command = 0;
  flags = 0;
  cookieHigh = 0;
  cookieLow = 0;
  offsetHigh = 0;
  offsetLow = 0;
  offsetBytes = 0;
  lengthBytes = 0;
  /** Counted in `inFlightBytes`: payload of a READ or WRITE. */
  chargedBytes = 0;
  /** READ: the block being filled. WRITE: the data received. */
  payload = NO_PAYLOAD;
  locked = false;
  aligned = true;
  /** For what goes in pieces: done up to here; the piece at the target; the block it uses. */
  cursorBytes = 0;
  pieceStartBytes = 0;
  pieceEndBytes = 0;
  block = NO_PAYLOAD;

  constructor(readonly id: number) {}
}

/** What is exported under one name. */
class NbdExport {
  readonly lock: RangeLock;
  readonly clients = new Set<NbdClient>();
  /** Set while clients are being sent away; called when the last is gone and nothing of theirs is at the target. */
  closing: (() => void)[] | undefined = undefined;
  removed = false;
  readonly write: boolean;

  constructor(
    server: NbdServer,
    readonly name: string,
    readonly target: NbdTarget,
    readonly options: NbdExportOptions,
  ) {
    const { sectorBytes, sizeBytes } = target;
    assert(
      sectorBytes >= 512 && (sectorBytes & (sectorBytes - 1)) === 0,
      'sector size is a power of two, at least 512',
    );
    assert(sizeBytes % sectorBytes === 0, 'a device has whole sectors');
    this.lock = new RangeLock((id) => server.lockGranted(id));
    this.write = options.readOnly !== true;
  }

  describe(): ExportDescription {
    const { readOnly, fastZero, rotational, description } = this.options;
    let transmissionFlags =
      NBD_FLAG_HAS_FLAGS |
      NBD_FLAG_SEND_FLUSH |
      NBD_FLAG_SEND_FUA |
      NBD_FLAG_SEND_TRIM |
      NBD_FLAG_SEND_WRITE_ZEROES |
      NBD_FLAG_SEND_CACHE |
      NBD_FLAG_CAN_MULTI_CONN;
    if (readOnly === true) transmissionFlags |= NBD_FLAG_READ_ONLY;
    if (fastZero === true) transmissionFlags |= NBD_FLAG_SEND_FAST_ZERO;
    if (rotational === true) transmissionFlags |= NBD_FLAG_ROTATIONAL;
    return {
      sizeBytes: this.target.sizeBytes,
      transmissionFlags,
      description: description ?? '',
      blockSizes: {
        minimumBytes: this.target.sectorBytes,
        preferredBytes: Math.max(PREFERRED_BLOCK_BYTES, this.target.sectorBytes),
        maximumBytes: MAXIMUM_BLOCK_BYTES,
      },
    };
  }
}

/** One connection, from its handshake to the end of its last request. */
class NbdClient implements ConnectionHandler {
  private negotiation: NbdNegotiation | undefined = new NbdNegotiation();
  exported: NbdExport | undefined = undefined;
  private rules: RequestRules = { sizeBytes: 0, transmissionFlags: 0, baseAllocation: false };
  private structuredReplies = false;
  private sectorMask = 511;
  private readonly memory: Memory;

  inFlight = 0;
  inFlightBytes = 0;
  private queueHead: RequestSlot | undefined = undefined;
  private queueTail: RequestSlot | undefined = undefined;
  private queueLength = 0;
  private pumping = false;
  private paused = false;
  /** In the server's list of those waiting for memory that others hold. */
  starved = false;
  /** The connection ends when all that was taken is answered. */
  private finishing = false;
  /** What still arrives is dropped: after DISC, ABORT, a violation, or the end of `finishing`. */
  private deaf = false;
  private endSent = false;
  private closeAsked = false;
  isClosed = false;

  /** Bytes ever handed to the connection, to see whether the client takes any. */
  private sentBytes = 0;
  private takenBytes = 0;
  /** This client's part of the server's `unsentBytes`. */
  private unsentBytes = 0;
  private idleTicks = 0;

  constructor(
    private readonly server: NbdServer,
    private readonly connection: Connection,
  ) {
    this.memory = server.memory;
    connection.setHandler(this);
    connection.setFraming({ kind: 'raw' });
    this.negotiate();
  }

  get peer(): string {
    return this.connection.peer;
  }

  get isHandshaking(): boolean {
    return this.negotiation !== undefined && !this.isClosed && !this.closeAsked;
  }

  frame(
    header: DataView,
    headerOffset: number,
    _headerLength: number,
    payload: number,
    payloadLength: number,
    flags: number,
  ): void {
    if (this.negotiation !== undefined) {
      this.handshakeBytes(payload, payloadLength);
      return;
    }
    if (this.deaf || this.isClosed) {
      if (payload !== NO_PAYLOAD) this.memory.release(payload);
      return;
    }
    const command = header.getUint16(headerOffset + REQUEST_COMMAND);
    if (command === NBD_CMD_DISC) {
      this.finishUp(true);
      return;
    }
    const commandFlags = header.getUint16(headerOffset + REQUEST_FLAGS);
    const cookieHigh = header.getUint32(headerOffset + REQUEST_COOKIE);
    const cookieLow = header.getUint32(headerOffset + REQUEST_COOKIE + 4);
    const offsetHigh = header.getUint32(headerOffset + REQUEST_OFFSET);
    const offsetLow = header.getUint32(headerOffset + REQUEST_OFFSET + 4);
    const lengthBytes = header.getUint32(headerOffset + REQUEST_LENGTH);
    let error = validateRequest(this.rules, command, commandFlags, offsetHigh, offsetLow, lengthBytes);
    // The sectors around an unaligned read must fit into one block, too.
    if (error === 0 && command === NBD_CMD_READ && this.coverBytes(offsetLow, lengthBytes) > MAX_PAYLOAD_BYTES)
      error = NBD_EINVAL;
    if (error !== 0) {
      if (payload !== NO_PAYLOAD) this.memory.release(payload);
      this.replyError(command, error, cookieHigh, cookieLow);
      if (this.connection.queuedBytes > SEND_QUEUE_LIMIT_BYTES) this.pause();
      return;
    }
    assert((flags & FRAME_SKIPPED) === 0, 'a skipped payload is longer than validateRequest lets pass');
    assert((command === NBD_CMD_WRITE) === (payload !== NO_PAYLOAD), 'WRITE and only WRITE has a payload');

    const slot = this.server.takeSlot();
    slot.client = this;
    slot.command = command;
    slot.flags = commandFlags;
    slot.cookieHigh = cookieHigh;
    slot.cookieLow = cookieLow;
    slot.offsetHigh = offsetHigh;
    slot.offsetLow = offsetLow;
    slot.offsetBytes = offsetHigh * TWO_32 + offsetLow;
    slot.lengthBytes = lengthBytes;
    slot.chargedBytes = command === NBD_CMD_READ || command === NBD_CMD_WRITE ? lengthBytes : 0;
    slot.payload = payload;
    slot.locked = false;
    slot.aligned = ((offsetLow | lengthBytes) & this.sectorMask) === 0;
    slot.step = Step.Queued;
    if (this.queueHead !== undefined || !this.start(slot)) this.enqueue(slot);
  }

  closed(errno: number): void {
    assert(!this.isClosed, 'a connection closes once');
    this.isClosed = true;
    if (errno !== 0) this.server.log?.info({ peer: this.peer, errno }, 'nbd: connection lost');
    this.server.unsentBytes -= this.unsentBytes;
    this.unsentBytes = 0;
    // What was not started is dropped before it reaches the engine: the client may send it again on a new connection,
    // and a leftover must not land on top of newer data. What was submitted keeps its range until it is done.
    while (this.queueHead !== undefined) {
      const slot = this.dequeue();
      if (slot.payload !== NO_PAYLOAD) this.memory.release(slot.payload);
      this.server.freeSlot(slot);
    }
    if (this.inFlight === 0) this.server.clientGone(this);
  }

  drained(): void {
    this.pump();
  }

  /** Called by the server's coarse clock. */
  tick(handshakeTicks: number, stallTicks: number): void {
    if (this.isClosed) return;
    const taken = this.sentBytes - this.connection.queuedBytes;
    const moves = this.negotiation === undefined && (this.connection.queuedBytes === 0 || taken !== this.takenBytes);
    this.takenBytes = taken;
    this.idleTicks = moves ? 0 : this.idleTicks + 1;
    if (this.idleTicks < (this.negotiation !== undefined ? handshakeTicks : stallTicks)) return;
    const why = this.negotiation !== undefined ? 'handshake takes too long' : 'client does not read its replies';
    this.server.log?.warn({ peer: this.peer }, `nbd: ${why}, closing`);
    this.close();
  }

  /**
   * Answers what was received, then closes.
   * @param deaf requests that still arrive are dropped (after DISC there are none)
   */
  finishUp(deaf: boolean): void {
    this.deaf ||= deaf;
    this.finishing = true;
    this.pause();
    this.maybeEnd();
  }

  close(): void {
    if (this.isClosed || this.closeAsked) return;
    this.closeAsked = true;
    this.connection.close();
  }

  private maybeEnd(): void {
    if (!this.finishing || this.endSent || this.isClosed || this.inFlight > 0 || this.queueHead !== undefined) return;
    this.endSent = true;
    this.deaf = true;
    // Who is not read from is not seen to hang up.
    if (this.paused) this.connection.resume();
    this.paused = false;
    this.connection.end();
  }

  // --- handshake ---

  private handshakeBytes(payload: number, payloadLength: number): void {
    const negotiation = this.negotiation!;
    // After ABORT or a violation the connection is on its way out, and what still comes is of no interest.
    if (!this.deaf) negotiation.receive(this.memory.bytes.subarray(payload, payload + payloadLength));
    this.memory.release(payload);
    if (!this.deaf) this.negotiate();
  }

  private negotiate(): void {
    const negotiation = this.negotiation!;
    for (;;) {
      const event = negotiation.nextEvent();
      switch (event.kind) {
        case 'list':
          negotiation.listed(this.server.listExports());
          continue;
        case 'describe':
        case 'open':
          this.answer(negotiation, event.exportName, event.kind === 'open');
          continue;
        case 'needData':
          this.sendOutput(negotiation);
          return;
        case 'transmission':
          this.sendOutput(negotiation);
          this.negotiation = undefined;
          this.idleTicks = 0;
          this.structuredReplies = event.structuredReplies;
          this.rules = {
            sizeBytes: this.rules.sizeBytes,
            transmissionFlags: event.transmissionFlags,
            baseAllocation: event.baseAllocation,
          };
          this.sectorMask = this.exported!.target.sectorBytes - 1;
          this.connection.setFraming(REQUEST_FRAMING, event.rest);
          this.server.log?.info({ peer: this.peer, export: event.exportName }, 'nbd: client attached');
          return;
        case 'closed':
          this.sendOutput(negotiation);
          this.deaf = true;
          if (event.error !== undefined) {
            const { code, message } = event.error;
            this.server.log?.info({ peer: this.peer, code }, `nbd: ${message}, closing`);
          }
          this.connection.end();
          return;
      }
    }
  }

  /** Answers whether an export is to be had. For `open` it is then ours until the connection and its requests end. */
  private answer(negotiation: NbdNegotiation, exportName: string, open: boolean): void {
    const exported = this.server.findExport(exportName);
    if (exported === undefined) {
      negotiation.refused('unknown', 'no export of this name');
      return;
    }
    if (exported.closing !== undefined) {
      negotiation.refused('shutdown', 'this export is being withdrawn');
      return;
    }
    const errno = exported.target.open(exported.write);
    if (errno !== 0) {
      const [refusal, text] = refusalOf(errno);
      this.server.log?.info({ peer: this.peer, export: exportName, errno }, `nbd: refused: ${text}`);
      negotiation.refused(refusal, text);
      return;
    }
    const description = exported.describe();
    if (open) {
      this.exported = exported;
      exported.clients.add(this);
      this.rules = { sizeBytes: description.sizeBytes, transmissionFlags: 0, baseAllocation: false };
    } else exported.target.close(exported.write);
    negotiation.described(description);
  }

  private sendOutput(negotiation: NbdNegotiation): void {
    const bytes = negotiation.takeOutput();
    if (bytes === undefined) return;
    this.connection.sendBytes(bytes);
    this.sentBytes += bytes.length;
  }

  // --- transmission: admission ---

  private enqueue(slot: RequestSlot): void {
    slot.next = undefined;
    if (this.queueTail === undefined) this.queueHead = slot;
    else this.queueTail.next = slot;
    this.queueTail = slot;
    this.queueLength++;
    this.pause();
    if (this.queueLength > MAX_WAITING_REQUESTS) {
      this.server.log?.warn({ peer: this.peer }, 'nbd: too many requests at once, closing');
      this.close();
    }
  }

  private dequeue(): RequestSlot {
    const slot = this.queueHead!;
    this.queueHead = slot.next;
    if (this.queueHead === undefined) this.queueTail = undefined;
    slot.next = undefined;
    this.queueLength--;
    return slot;
  }

  /** Starts what may be started of the queue, then reads on. */
  pump(): void {
    if (this.pumping || this.isClosed) return;
    this.pumping = true;
    while (this.queueHead !== undefined) {
      const slot = this.queueHead;
      if (!this.start(slot, true)) break;
    }
    this.pumping = false;
    if (this.queueHead === undefined) {
      if (this.finishing) this.maybeEnd();
      else if (this.paused && this.connection.queuedBytes <= SEND_QUEUE_LIMIT_BYTES) {
        this.paused = false;
        this.connection.resume();
      }
    }
  }

  private pause(): void {
    if (this.paused) return;
    this.paused = true;
    this.connection.pause();
  }

  /** Starts a request, unless limits or memory say that it must wait. */
  private start(slot: RequestSlot, queued = false): boolean {
    if (this.inFlight >= MAX_IN_FLIGHT_REQUESTS) return false;
    const queuedBytes = this.connection.queuedBytes;
    if (queuedBytes > SEND_QUEUE_LIMIT_BYTES) return false;
    const charged = slot.chargedBytes;
    if (charged > 0 && this.inFlight > 0 && this.inFlightBytes + queuedBytes + charged > MAX_IN_FLIGHT_BYTES)
      return false;
    if (slot.command === NBD_CMD_READ) {
      const mask = this.sectorMask;
      const cover = slot.aligned ? slot.lengthBytes : ((slot.offsetLow & mask) + slot.lengthBytes + mask) & ~mask;
      const block = this.server.admits(this, charged) ? this.memory.allocate(cover) : NO_PAYLOAD;
      if (block < 0) {
        this.server.starve(this);
        return false;
      }
      slot.payload = block;
    }
    if (queued) this.dequeue();
    this.inFlight++;
    this.inFlightBytes += charged;
    this.server.inFlightBytes += charged;
    this.submit(slot);
    return true;
  }

  // --- transmission: work ---

  private submit(slot: RequestSlot): void {
    const exported = this.exported!;
    const { target } = exported;
    const { offsetBytes, lengthBytes } = slot;
    slot.step = Step.Whole;
    switch (slot.command) {
      case NBD_CMD_READ:
        if (slot.aligned) target.read(this.server, slot.id, offsetBytes, lengthBytes, slot.payload);
        else {
          const start = this.sectorFloor(offsetBytes);
          target.read(this.server, slot.id, start, this.sectorCeil(offsetBytes + lengthBytes) - start, slot.payload);
        }
        return;
      case NBD_CMD_WRITE:
      case NBD_CMD_TRIM:
      case NBD_CMD_WRITE_ZEROES: {
        slot.locked = true;
        slot.step = Step.Locking;
        slot.cursorBytes = offsetBytes;
        const held = slot.aligned
          ? exported.lock.acquire(slot.id, offsetBytes, offsetBytes + lengthBytes, false)
          : exported.lock.acquire(
              slot.id,
              this.sectorFloor(offsetBytes),
              this.sectorCeil(offsetBytes + lengthBytes),
              true,
            );
        if (held) this.modify(slot);
        return;
      }
      case NBD_CMD_FLUSH:
        target.flush(this.server, slot.id);
        return;
      case NBD_CMD_CACHE:
        this.finish(slot, 0);
        return;
      case NBD_CMD_BLOCK_STATUS:
        this.blockStatus(slot);
        return;
      default:
        assert(false, 'validateRequest knows the commands');
    }
  }

  /** The range is held: goes on with WRITE, TRIM and WRITE_ZEROES from `cursorBytes`. */
  modify(slot: RequestSlot): void {
    const end = slot.offsetBytes + slot.lengthBytes;
    if (this.isClosed || slot.cursorBytes === end) {
      this.finish(slot, 0);
      return;
    }
    const { target } = this.exported!;
    const fua = (slot.flags & NBD_CMD_FLAG_FUA) !== 0;
    const cursor = slot.cursorBytes;
    if (slot.command === NBD_CMD_WRITE && slot.aligned) {
      slot.step = Step.Whole;
      target.write(this.server, slot.id, slot.offsetBytes, slot.lengthBytes, slot.payload, fua);
      return;
    }
    if (slot.command !== NBD_CMD_WRITE && cursor === this.sectorFloor(cursor) && end - cursor > this.sectorMask) {
      slot.step = Step.ZeroPiece;
      slot.pieceEndBytes = Math.min(cursor + ZERO_PIECE_BYTES, this.sectorFloor(end));
      // NO_HOLE asks to keep the space; TRIM reads back as zeroes here, on both heads alike.
      const unmap = slot.command === NBD_CMD_TRIM || (slot.flags & NBD_CMD_FLAG_NO_HOLE) === 0;
      target.zero(this.server, slot.id, cursor, slot.pieceEndBytes - cursor, unmap, fua);
      return;
    }
    const pieceBytes = slot.command === NBD_CMD_WRITE ? UNALIGNED_PIECE_BYTES : this.sectorMask + 1;
    slot.pieceStartBytes = this.sectorFloor(cursor);
    slot.pieceEndBytes = Math.min(slot.pieceStartBytes + pieceBytes, this.sectorCeil(end));
    slot.block = this.memory.allocate(slot.pieceEndBytes - slot.pieceStartBytes);
    if (slot.block >= 0) this.readOld(slot);
    else {
      slot.step = Step.Reserve;
      this.server.waitForReserve(slot);
    }
  }

  /** Has a block: reads the sectors that are only partly overwritten. */
  readOld(slot: RequestSlot): void {
    const { pieceStartBytes, pieceEndBytes } = slot;
    const partly = slot.cursorBytes > pieceStartBytes || slot.offsetBytes + slot.lengthBytes < pieceEndBytes;
    if (!partly || this.isClosed) {
      this.writeNew(slot);
      return;
    }
    slot.step = Step.ReadOld;
    const length = pieceEndBytes - pieceStartBytes;
    this.exported!.target.read(this.server, slot.id, pieceStartBytes, length, slot.block);
  }

  private writeNew(slot: RequestSlot): void {
    if (this.isClosed) {
      this.finish(slot, 0);
      return;
    }
    const { bytes } = this.memory;
    const { pieceStartBytes, pieceEndBytes, cursorBytes, offsetBytes, block } = slot;
    const until = Math.min(pieceEndBytes, offsetBytes + slot.lengthBytes);
    const into = block + (cursorBytes - pieceStartBytes);
    if (slot.command === NBD_CMD_WRITE)
      bytes.copyWithin(into, slot.payload + (cursorBytes - offsetBytes), slot.payload + (until - offsetBytes));
    else bytes.fill(0, into, into + (until - cursorBytes));
    slot.step = Step.WriteNew;
    const fua = (slot.flags & NBD_CMD_FLAG_FUA) !== 0;
    this.exported!.target.write(this.server, slot.id, pieceStartBytes, pieceEndBytes - pieceStartBytes, block, fua);
  }

  /** The target is done with a slot of ours. */
  completed(slot: RequestSlot, errno: number): void {
    if (slot.step === Step.Whole || errno !== 0) {
      this.finish(slot, errno);
      return;
    }
    switch (slot.step) {
      case Step.ReadOld:
        this.writeNew(slot);
        return;
      case Step.WriteNew:
        this.server.releaseBlock(slot);
        slot.cursorBytes = Math.min(slot.pieceEndBytes, slot.offsetBytes + slot.lengthBytes);
        this.modify(slot);
        return;
      case Step.ZeroPiece:
        slot.cursorBytes = slot.pieceEndBytes;
        this.modify(slot);
        return;
      default:
        assert(false, 'completion of a request that is not at the target');
    }
  }

  private blockStatus(slot: RequestSlot): void {
    const { target } = this.exported!;
    const { runs, replies } = this.server;
    runs.clear();
    if (target.blockStatus === undefined) runs.add(slot.lengthBytes, 0);
    else target.blockStatus(slot.offsetBytes, slot.lengthBytes, runs);
    runs.clip(slot.lengthBytes, (slot.flags & NBD_CMD_FLAG_REQ_ONE) !== 0);
    const length = replies.blockStatus(slot.cookieHigh, slot.cookieLow, BASE_ALLOCATION_ID, runs);
    this.connection.sendBytes(replies.bytes.subarray(0, length));
    this.sentBytes += length;
    this.release(slot);
  }

  /** Answers (unless the client is gone) and gives everything back. */
  private finish(slot: RequestSlot, errno: number): void {
    if (!this.isClosed) {
      if (errno !== 0) this.replyError(slot.command, nbdErrorOf(errno), slot.cookieHigh, slot.cookieLow);
      else if (slot.command === NBD_CMD_READ) this.replyData(slot);
      else this.send(this.server.replies.simple(0, slot.cookieHigh, slot.cookieLow), NO_PAYLOAD, 0);
    }
    this.release(slot);
  }

  private release(slot: RequestSlot): void {
    const { server } = this;
    if (slot.payload !== NO_PAYLOAD) this.memory.release(slot.payload);
    server.releaseBlock(slot);
    if (slot.locked) this.exported!.lock.release(slot.id);
    this.inFlight--;
    this.inFlightBytes -= slot.chargedBytes;
    server.inFlightBytes -= slot.chargedBytes;
    server.freeSlot(slot);
    server.feedStarved();
    if (this.isClosed) {
      if (this.inFlight === 0) server.clientGone(this);
    } else if (this.queueHead !== undefined || this.paused || this.finishing) this.pump();
  }

  private replyData(slot: RequestSlot): void {
    const { replies } = this.server;
    const { cookieHigh, cookieLow, lengthBytes } = slot;
    if (!slot.aligned) {
      const skip = slot.offsetLow & this.sectorMask;
      this.memory.bytes.copyWithin(slot.payload, slot.payload + skip, slot.payload + skip + lengthBytes);
    }
    const length = this.structuredReplies
      ? replies.offsetData(cookieHigh, cookieLow, slot.offsetHigh, slot.offsetLow, lengthBytes)
      : replies.simple(0, cookieHigh, cookieLow);
    this.send(length, slot.payload, lengthBytes);
  }

  private replyError(command: number, error: number, cookieHigh: number, cookieLow: number): void {
    const { replies } = this.server;
    const structured = this.structuredReplies && (command === NBD_CMD_READ || command === NBD_CMD_BLOCK_STATUS);
    const length = structured
      ? replies.error(error, cookieHigh, cookieLow)
      : replies.simple(error, cookieHigh, cookieLow);
    this.send(length, NO_PAYLOAD, 0);
  }

  private send(headerLength: number, payload: number, payloadLength: number): void {
    this.connection.send(this.server.replies.bytes, headerLength, payload, payloadLength);
    this.sentBytes += headerLength + payloadLength;
    if (payload !== NO_PAYLOAD) this.noteUnsent();
  }

  /** Brings the server's sum of unsent bytes up to date with this connection. */
  noteUnsent(): void {
    const queuedBytes = this.connection.queuedBytes;
    this.server.unsentBytes += queuedBytes - this.unsentBytes;
    this.unsentBytes = queuedBytes;
  }

  /** Bytes of the whole sectors that a READ or WRITE touches. */
  private coverBytes(offsetLow: number, lengthBytes: number): number {
    const mask = this.sectorMask;
    return ((offsetLow & mask) + lengthBytes + mask) & ~mask;
  }

  private sectorFloor(bytes: number): number {
    return bytes - (bytes % (this.sectorMask + 1));
  }

  private sectorCeil(bytes: number): number {
    return this.sectorFloor(bytes + this.sectorMask);
  }
}

/**
 * Serves exports to any number of clients. Lives on the engine's only thread, over doors it does not own.
 *
 * ```ts
 * const server = new NbdServer(ring, { log });
 * server.addExport('data', target);
 * server.listenUnix('/run/drbdts/data.nbd');
 * server.listenTcp('0.0.0.0', 10809);
 * ```
 */
export class NbdServer implements BlockFront {
  /** @internal */
  readonly memory: Memory;
  /** @internal */
  readonly log: NbdLog | undefined;
  /** @internal Scratch for replies: the doors copy it at once. */
  readonly replies = new ReplyBuilder();
  /** @internal */
  readonly runs = new BlockStatusRuns();
  /** @internal Payload bytes of all clients at the target. */
  inFlightBytes = 0;
  /** @internal Replies queued at connections, as last seen; see `noteUnsent`. */
  unsentBytes = 0;

  readonly #ring: Ring;
  readonly #exports = new Map<string, NbdExport>();
  readonly #listeners = new Set<Listener>();
  readonly #clients = new Set<NbdClient>();
  readonly #slots: RequestSlot[] = [];
  #freeSlots: RequestSlot | undefined = undefined;
  /** Unaligned writes that find the pool empty take turns on this block, so that they always end. */
  readonly #reserve: number;
  #reserveTaken = false;
  #reserveHead: RequestSlot | undefined = undefined;
  #reserveTail: RequestSlot | undefined = undefined;
  #starved: NbdClient[] = [];
  #feeding = false;
  #starvedTimer: NodeJS.Timeout | undefined = undefined;
  #clock: NodeJS.Timeout | undefined = undefined;
  readonly #maxConnections: number;
  readonly #tickMs: number;
  readonly #handshakeTicks: number;
  readonly #stallTicks: number;
  readonly #maxInFlightBytes: number;
  #isClosed = false;

  constructor(ring: Ring, options: NbdServerOptions = {}) {
    this.#ring = ring;
    this.memory = ring.memory;
    this.log = options.log;
    this.#maxConnections = options.maxConnections ?? 100;
    this.#tickMs = options.tickMs ?? 1000;
    this.#handshakeTicks = Math.ceil((options.handshakeMs ?? 10_000) / this.#tickMs);
    this.#stallTicks = Math.ceil((options.writeStallMs ?? 300_000) / this.#tickMs);
    // The replication link lives in the same pool.
    this.#maxInFlightBytes = this.memory.bytes.length / 2;
    assert(this.#maxInFlightBytes >= MAX_PAYLOAD_BYTES, 'the pool holds two requests of the largest size');
    this.#reserve = this.memory.allocate(UNALIGNED_PIECE_BYTES);
    assert(this.#reserve >= 0, 'the pool has room at start');
  }

  /** Offers a target under a name (the empty name is the default export). Names are unique. */
  addExport(name: string, target: NbdTarget, options: NbdExportOptions = {}): void {
    assert(!this.#exports.has(name), `export ${name} exists`);
    this.#exports.set(name, new NbdExport(this, name, target, options));
  }

  /**
   * Withdraws an export for good: closes its connections at once, and refuses new ones (ERR_SHUTDOWN until `done`, then
   * ERR_UNKNOWN).
   * @param done called when nothing of its clients is at the target any more
   */
  removeExport(name: string, done: () => void = () => {}): void {
    const exported = this.#existing(name);
    exported.removed = true;
    this.#sendAway(exported, (client) => client.close(), done);
  }

  /**
   * Planned demotion: answers what was received, then closes. Meanwhile new clients get ERR_SHUTDOWN; afterwards the
   * target's `open` decides.
   * @param done called when the last client is gone and its requests are done
   */
  drain(name: string, done: () => void): void {
    this.#sendAway(this.#existing(name), (client) => client.finishUp(false), done);
  }

  /** Forced demotion: as `drain`, but closes at once; what is at the target ends there, what waits is dropped. */
  closeAll(name: string, done: () => void): void {
    this.#sendAway(this.#existing(name), (client) => client.close(), done);
  }

  /** Clients in transmission on an export. */
  clientCount(name: string): number {
    return this.#existing(name).clients.size;
  }

  /** @throws Error with `errno` when the address cannot be bound */
  listenTcp(host: string, port: number, options?: ListenOptions): Listener {
    return this.#listening(this.#ring.listenTcp(host, port, (connection) => this.#accepted(connection), options));
  }

  /** @throws Error with `errno` when the path cannot be bound */
  listenUnix(path: string): Listener {
    return this.#listening(this.#ring.listenUnix(path, (connection) => this.#accepted(connection)));
  }

  /** Stops listening and closes every connection at once. Requests at targets still complete into nothing. */
  close(): void {
    this.#isClosed = true;
    for (const listener of this.#listeners) listener.close();
    for (const client of this.#clients) client.close();
    clearTimeout(this.#starvedTimer);
    this.#starvedTimer = undefined;
    clearInterval(this.#clock);
    this.#clock = undefined;
    if (!this.#reserveTaken) this.#freeReserve();
  }

  /** From a target. */
  complete(request: number, errno: number): void {
    const slot = this.#slots[request];
    assert(slot !== undefined && slot.client !== undefined, 'completion of a request that is not in flight');
    slot.client.completed(slot, errno);
  }

  // --- for NbdClient and NbdExport only ---

  /** @internal */
  listExports(): { readonly exportName: string; readonly description: string }[] {
    return Array.from(this.#exports.values(), ({ name, options }) => ({
      exportName: name,
      description: options.description ?? '',
    }));
  }

  /** @internal */
  findExport(name: string): NbdExport | undefined {
    return this.#exports.get(name);
  }

  /** @internal */
  takeSlot(): RequestSlot {
    const slot = this.#freeSlots;
    if (slot !== undefined) {
      this.#freeSlots = slot.next;
      slot.next = undefined;
      return slot;
    }
    const made = new RequestSlot(this.#slots.length);
    this.#slots.push(made);
    return made;
  }

  /** @internal */
  freeSlot(slot: RequestSlot): void {
    slot.client = undefined;
    slot.payload = NO_PAYLOAD;
    slot.step = Step.Free;
    slot.next = this.#freeSlots;
    this.#freeSlots = slot;
  }

  /** @internal */
  lockGranted(id: number): void {
    const slot = this.#slots[id]!;
    assert(slot.step === Step.Locking, 'a range was granted to a request that did not wait for it');
    slot.client!.modify(slot);
  }

  /**
   * @internal Whether a client may have so much more in flight. All together, unsent replies included, keep half of the
   * pool free for others, but nobody is kept from having one request.
   */
  admits(client: NbdClient, bytes: number): boolean {
    if (client.inFlight === 0) return true;
    if (this.inFlightBytes + this.unsentBytes + bytes <= this.#maxInFlightBytes) return true;
    // What clients took since they were last sent something is not in the sum yet.
    for (const each of this.#clients) if (!each.isClosed) each.noteUnsent();
    return this.inFlightBytes + this.unsentBytes + bytes <= this.#maxInFlightBytes;
  }

  /** @internal The client is looked at again when something ends, or a little later: others use the pool, too. */
  starve(client: NbdClient): void {
    if (!client.starved) {
      client.starved = true;
      this.#starved.push(client);
    }
    if (this.#starvedTimer === undefined && !this.#isClosed)
      this.#starvedTimer = setTimeout(() => {
        this.#starvedTimer = undefined;
        this.feedStarved();
      }, STARVED_RETRY_MS);
  }

  /** @internal */
  feedStarved(): void {
    if (this.#starved.length === 0 || this.#feeding) return;
    this.#feeding = true;
    const hungry = this.#starved;
    this.#starved = [];
    for (const client of hungry) {
      client.starved = false;
      client.pump();
    }
    this.#feeding = false;
  }

  /** @internal */
  waitForReserve(slot: RequestSlot): void {
    slot.next = undefined;
    if (this.#reserveTail === undefined) this.#reserveHead = slot;
    else this.#reserveTail.next = slot;
    this.#reserveTail = slot;
    if (!this.#reserveTaken) this.#lendReserve();
  }

  /** @internal */
  releaseBlock(slot: RequestSlot): void {
    const { block } = slot;
    if (block === NO_PAYLOAD) return;
    slot.block = NO_PAYLOAD;
    if (block !== this.#reserve) {
      this.memory.release(block);
      return;
    }
    this.#reserveTaken = false;
    if (this.#reserveHead !== undefined) this.#lendReserve();
    else if (this.#isClosed) this.#freeReserve();
  }

  /** @internal The connection is closed and nothing of it is at the target. */
  clientGone(client: NbdClient): void {
    this.#clients.delete(client);
    if (this.#clients.size === 0) {
      clearInterval(this.#clock);
      this.#clock = undefined;
    }
    const { exported } = client;
    if (exported === undefined) return;
    exported.clients.delete(client);
    exported.target.close(exported.write);
    this.log?.info({ peer: client.peer, export: exported.name }, 'nbd: client gone');
    this.#maybeEmpty(exported);
  }

  #existing(name: string): NbdExport {
    const exported = this.#exports.get(name);
    assert(exported !== undefined, `no export ${name}`);
    return exported;
  }

  #sendAway(exported: NbdExport, how: (client: NbdClient) => void, done: () => void): void {
    exported.closing ??= [];
    exported.closing.push(done);
    for (const client of exported.clients) how(client);
    if (exported.clients.size === 0) setImmediate(() => this.#maybeEmpty(exported));
  }

  #maybeEmpty(exported: NbdExport): void {
    const { closing } = exported;
    if (closing === undefined || exported.clients.size > 0) return;
    exported.closing = undefined;
    if (exported.removed) this.#exports.delete(exported.name);
    for (const done of closing) done();
  }

  /** @returns the listener such that it may be closed by its user, by `close`, or by both */
  #listening(listener: Listener): Listener {
    const once: Listener = {
      port: listener.port,
      close: () => {
        if (this.#listeners.delete(once)) listener.close();
      },
    };
    this.#listeners.add(once);
    return once;
  }

  #accepted(connection: Connection): void {
    if (this.#isClosed) {
      connection.close();
      return;
    }
    if (this.#clients.size >= this.#maxConnections) {
      // Port scanners and half-open handshakes must not lock out who wants to work. Sets keep the order of arrival.
      let oldest: NbdClient | undefined;
      for (const client of this.#clients)
        if (client.isHandshaking) {
          oldest = client;
          break;
        }
      if (oldest === undefined || this.#clients.size > 2 * this.#maxConnections) {
        this.log?.warn({ peer: connection.peer }, 'nbd: too many connections, refused');
        connection.close();
        return;
      }
      this.log?.warn({ peer: oldest.peer }, 'nbd: too many connections, a handshake makes room');
      oldest.close();
    }
    this.#clients.add(new NbdClient(this, connection));
    this.#clock ??= setInterval(() => {
      for (const client of this.#clients) client.tick(this.#handshakeTicks, this.#stallTicks);
    }, this.#tickMs).unref();
  }

  #lendReserve(): void {
    const slot = this.#reserveHead!;
    this.#reserveHead = slot.next;
    if (this.#reserveHead === undefined) this.#reserveTail = undefined;
    slot.next = undefined;
    this.#reserveTaken = true;
    slot.block = this.#reserve;
    slot.client!.readOld(slot);
  }

  #reserveFreed = false;
  #freeReserve(): void {
    if (this.#reserveFreed) return;
    this.#reserveFreed = true;
    this.memory.release(this.#reserve);
  }
}

/** How a target's refusal to open is told to clients. */
function refusalOf(errno: number): [Refusal, string] {
  switch (errno) {
    case Errno.EROFS:
      return ['policy', 'this head is Secondary: only a Primary opens the device for writing'];
    case Errno.EMEDIUMTYPE:
      return ['policy', 'this head is Secondary: only a Primary opens the device'];
    case Errno.ESHUTDOWN:
      return ['shutdown', 'the device is going away'];
    default:
      return ['policy', `the device cannot be opened now (errno ${errno})`];
  }
}
