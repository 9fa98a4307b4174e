/**
 * The negotiation of one NBD connection as a value: bytes in, events and bytes out. Fixed newstyle only (oldstyle has
 * no export names). No sockets, no time: whoever drives it sets the deadline.
 *
 * @see proto.md "Fixed newstyle negotiation", "Option types"
 */
import { assert } from '../base/assert.js';
import { ProtocolError } from '../base/errors.js';
import {
  BASE_ALLOCATION,
  BASE_ALLOCATION_ID,
  MAX_OPTION_BYTES,
  MAX_OPTIONS,
  MAX_SKIPPED_OPTION_BYTES,
  NBD_FLAG_FIXED_NEWSTYLE,
  NBD_FLAG_NO_ZEROES,
  NBD_FLAG_SEND_DF,
  NBD_INFO_BLOCK_SIZE,
  NBD_INFO_DESCRIPTION,
  NBD_INFO_NAME,
  NBD_MAGIC,
  NBD_OPT_ABORT,
  NBD_OPT_EXPORT_NAME,
  NBD_OPT_GO,
  NBD_OPT_INFO,
  NBD_OPT_LIST,
  NBD_OPT_LIST_META_CONTEXT,
  NBD_OPT_SET_META_CONTEXT,
  NBD_OPT_STARTTLS,
  NBD_OPT_STRUCTURED_REPLY,
  NBD_OPTION_MAGIC,
  NBD_REP_ACK,
  NBD_REP_ERR_INVALID,
  NBD_REP_ERR_POLICY,
  NBD_REP_ERR_SHUTDOWN,
  NBD_REP_ERR_TOO_BIG,
  NBD_REP_ERR_UNKNOWN,
  NBD_REP_ERR_UNSUP,
  NBD_REP_INFO,
  NBD_REP_META_CONTEXT,
  NBD_REP_SERVER,
} from './constants.js';
import {
  decodeInfoRequest,
  decodeMetaContextRequest,
  decodeString,
  type ExportDescription,
  encodeErrorText,
  encodeExportNameAnswer,
  encodeInfoBlockSize,
  encodeInfoExport,
  encodeInfoText,
  encodeMetaContext,
  encodeOptionReply,
  encodeServer,
  OptionRefusal,
  selectsBaseAllocation,
} from './options.js';

/** How an export is refused: it does not exist, it may not be used here (a Secondary), it is going away. */
export type Refusal = 'unknown' | 'policy' | 'shutdown';

/**
 * What negotiation wants next.
 * - `needData`: call `receive`.
 * - `list`: answer with `listed`.
 * - `describe`: does this export exist, and what is it? Answer with `described` or `refused`.
 * - `open`: as `describe`, and after `described` the connection enters transmission, so count it as an opener first.
 * - `transmission`: done. `rest` are bytes that follow the handshake: the first requests.
 * - `closed`: send what `takeOutput` gives, then close. With an error when the client broke the protocol.
 */
export type NegotiationEvent =
  | { readonly kind: 'needData' }
  | { readonly kind: 'list' }
  | { readonly kind: 'describe'; readonly exportName: string }
  | { readonly kind: 'open'; readonly exportName: string }
  | {
      readonly kind: 'transmission';
      readonly exportName: string;
      readonly transmissionFlags: number;
      readonly structuredReplies: boolean;
      readonly baseAllocation: boolean;
      readonly rest: Uint8Array;
    }
  | { readonly kind: 'closed'; readonly error?: ProtocolError };

const NEED_DATA: NegotiationEvent = { kind: 'needData' };

/** What we ask the driver about, to go on when it answers. */
type Question =
  | { readonly kind: 'list' }
  | { readonly kind: 'exportName'; readonly exportName: string }
  | {
      readonly kind: 'info';
      readonly option: number;
      readonly exportName: string;
      readonly infoTypes: readonly number[];
    }
  | {
      readonly kind: 'meta';
      readonly option: number;
      readonly exportName: string;
      readonly queries: readonly string[];
    };

type Phase = 'clientFlags' | 'options' | 'asking' | 'transmission' | 'closed';

const SECTION = 'proto.md "Fixed newstyle negotiation"';
const OPTION_HEADER_BYTES = 16;

export class NbdNegotiation {
  #phase: Phase = 'clientFlags';
  #input = new Uint8Array(0);
  /** Data of an option too long to hold that is still to be dropped. */
  #skipBytes = 0;
  #output: Uint8Array[] = [];
  #outcome: NegotiationEvent | undefined;
  #question: Question | undefined;
  #optionCount = 0;
  #fixedNewstyle = false;
  #noZeroes = false;
  #structuredReplies = false;
  /** The export SET_META_CONTEXT selected base:allocation for; a GO for another one voids it. */
  #baseAllocationFor: string | undefined;

  constructor() {
    const greeting = new Uint8Array(18);
    const view = new DataView(greeting.buffer);
    view.setUint32(0, NBD_MAGIC[0]);
    view.setUint32(4, NBD_MAGIC[1]);
    view.setUint32(8, NBD_OPTION_MAGIC[0]);
    view.setUint32(12, NBD_OPTION_MAGIC[1]);
    view.setUint16(16, NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);
    this.#output.push(greeting);
  }

  /** Takes bytes from the client (copied). Never throws for anything a client can send. */
  receive(bytes: Uint8Array): void {
    assert(this.#phase !== 'transmission', 'bytes after the handshake belong to the request framing');
    if (this.#phase === 'closed') return;
    const joined = new Uint8Array(this.#input.length + bytes.length);
    joined.set(this.#input);
    joined.set(bytes, this.#input.length);
    this.#input = joined;
  }

  /** The next event. `list`, `describe` and `open` repeat until answered; `transmission` and `closed` for ever. */
  nextEvent(): NegotiationEvent {
    while (this.#question === undefined && this.#outcome === undefined) if (!this.#step()) return NEED_DATA;
    if (this.#outcome !== undefined) return this.#outcome;
    const question = this.#question!;
    if (question.kind === 'list') return { kind: 'list' };
    const opens = question.kind === 'exportName' || (question.kind === 'info' && question.option === NBD_OPT_GO);
    return { kind: opens ? 'open' : 'describe', exportName: question.exportName };
  }

  /** Bytes to send now, in order, or undefined. */
  takeOutput(): Uint8Array | undefined {
    const due = this.#output;
    if (due.length === 0) return undefined;
    this.#output = [];
    const bytes = new Uint8Array(due.reduce((sum, part) => sum + part.length, 0));
    let at = 0;
    for (const part of due) {
      bytes.set(part, at);
      at += part.length;
    }
    return bytes;
  }

  /** Answers `list`. */
  listed(exports: readonly { readonly exportName: string; readonly description: string }[]): void {
    assert(this.#question?.kind === 'list', 'nobody asked for the list of exports');
    for (const { exportName, description } of exports)
      this.#reply(NBD_OPT_LIST, NBD_REP_SERVER, encodeServer(exportName, description));
    this.#reply(NBD_OPT_LIST, NBD_REP_ACK);
    this.#answered();
  }

  /** Answers `describe` and `open`: the export exists (and is open). */
  described(description: ExportDescription): void {
    const question = this.#question;
    assert(question !== undefined && question.kind !== 'list', 'nobody asked for an export');
    const transmissionFlags = description.transmissionFlags | (this.#structuredReplies ? NBD_FLAG_SEND_DF : 0);
    this.#answered();
    switch (question.kind) {
      case 'exportName':
        this.#output.push(encodeExportNameAnswer(description.sizeBytes, transmissionFlags, this.#noZeroes));
        this.#transmit(question.exportName, transmissionFlags);
        break;
      case 'info':
        this.#reply(question.option, NBD_REP_INFO, encodeInfoExport(description.sizeBytes, transmissionFlags));
        if (question.infoTypes.includes(NBD_INFO_NAME))
          this.#reply(question.option, NBD_REP_INFO, encodeInfoText(NBD_INFO_NAME, question.exportName));
        if (question.infoTypes.includes(NBD_INFO_DESCRIPTION) && description.description !== '')
          this.#reply(question.option, NBD_REP_INFO, encodeInfoText(NBD_INFO_DESCRIPTION, description.description));
        if (question.infoTypes.includes(NBD_INFO_BLOCK_SIZE) && description.blockSizes !== undefined)
          this.#reply(question.option, NBD_REP_INFO, encodeInfoBlockSize(description.blockSizes));
        this.#reply(question.option, NBD_REP_ACK);
        if (question.option === NBD_OPT_GO) this.#transmit(question.exportName, transmissionFlags);
        break;
      case 'meta': {
        const listing = question.option === NBD_OPT_LIST_META_CONTEXT;
        if (selectsBaseAllocation(question.queries, listing)) {
          const id = listing ? 0 : BASE_ALLOCATION_ID;
          this.#reply(question.option, NBD_REP_META_CONTEXT, encodeMetaContext(id, BASE_ALLOCATION));
          if (!listing) this.#baseAllocationFor = question.exportName;
        }
        this.#reply(question.option, NBD_REP_ACK);
      }
    }
  }

  /** Answers `describe` and `open`: no. EXPORT_NAME has no way to say so but to close. */
  refused(refusal: Refusal, text: string): void {
    const question = this.#question;
    assert(question !== undefined && question.kind !== 'list', 'nobody asked for an export');
    this.#answered();
    if (question.kind === 'exportName') {
      this.#outcome = { kind: 'closed' };
      this.#phase = 'closed';
      return;
    }
    const replyType =
      refusal === 'unknown' ? NBD_REP_ERR_UNKNOWN : refusal === 'policy' ? NBD_REP_ERR_POLICY : NBD_REP_ERR_SHUTDOWN;
    this.#reply(question.option, replyType, encodeErrorText(text));
  }

  /** Consumes one piece of input. @returns false when more is needed for that */
  #step(): boolean {
    if (this.#skipBytes > 0) {
      const dropped = Math.min(this.#skipBytes, this.#input.length);
      this.#consume(dropped);
      this.#skipBytes -= dropped;
      return this.#skipBytes === 0;
    }
    const view = new DataView(this.#input.buffer, this.#input.byteOffset, this.#input.byteLength);
    if (this.#phase === 'clientFlags') {
      if (view.byteLength < 4) return false;
      this.#clientFlags(view.getUint32(0));
      this.#consume(4);
      return true;
    }
    // The magic is judged as soon as it is here: a client that speaks something else may never send 16 bytes.
    if (view.byteLength < 8) return false;
    if (view.getUint32(0) !== NBD_OPTION_MAGIC[0] || view.getUint32(4) !== NBD_OPTION_MAGIC[1]) {
      this.#fail('DRBDTS_NBD_BAD_OPTION_MAGIC', 'option does not start with IHAVEOPT');
      return true;
    }
    if (view.byteLength < OPTION_HEADER_BYTES) return false;
    const option = view.getUint32(8);
    const length = view.getUint32(12);
    if (!this.#fixedNewstyle && option !== NBD_OPT_EXPORT_NAME) {
      this.#fail('DRBDTS_NBD_NOT_FIXED', `option ${option} from a client that did not set C_FIXED_NEWSTYLE`);
      return true;
    }
    if (length > MAX_SKIPPED_OPTION_BYTES) {
      this.#fail('DRBDTS_NBD_OPTION_TOO_LONG', `option ${option} announces ${length} bytes of data`);
      return true;
    }
    if (length > MAX_OPTION_BYTES && option === NBD_OPT_EXPORT_NAME) {
      this.#fail('DRBDTS_NBD_OPTION_TOO_LONG', `export name of ${length} bytes`);
      return true;
    }
    if (length > MAX_OPTION_BYTES) {
      if (!this.#countOption()) return true;
      this.#consume(OPTION_HEADER_BYTES);
      this.#skipBytes = length;
      this.#reply(option, NBD_REP_ERR_TOO_BIG, encodeErrorText(`option data exceeds ${MAX_OPTION_BYTES} bytes`));
      return true;
    }
    if (view.byteLength < OPTION_HEADER_BYTES + length) return false;
    if (!this.#countOption()) return true;
    const data = this.#input.slice(OPTION_HEADER_BYTES, OPTION_HEADER_BYTES + length);
    this.#consume(OPTION_HEADER_BYTES + length);
    this.#option(option, data);
    return true;
  }

  #clientFlags(flags: number): void {
    if ((flags & ~(NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES)) !== 0) {
      this.#fail('DRBDTS_NBD_BAD_CLIENT_FLAGS', `unknown client flags 0x${flags.toString(16)}`);
      return;
    }
    this.#fixedNewstyle = (flags & NBD_FLAG_FIXED_NEWSTYLE) !== 0;
    this.#noZeroes = (flags & NBD_FLAG_NO_ZEROES) !== 0;
    this.#phase = 'options';
  }

  #countOption(): boolean {
    this.#optionCount++;
    if (this.#optionCount <= MAX_OPTIONS) return true;
    this.#fail('DRBDTS_NBD_TOO_MANY_OPTIONS', `more than ${MAX_OPTIONS} options`);
    return false;
  }

  #option(option: number, data: Uint8Array): void {
    switch (option) {
      case NBD_OPT_EXPORT_NAME: {
        const exportName = decodeString(data);
        if (exportName === undefined) this.#fail('DRBDTS_NBD_BAD_NAME', 'export name is not a valid string');
        else this.#ask({ kind: 'exportName', exportName });
        break;
      }
      case NBD_OPT_ABORT:
        this.#reply(option, NBD_REP_ACK);
        this.#outcome = { kind: 'closed' };
        this.#phase = 'closed';
        break;
      case NBD_OPT_LIST:
        if (this.#refuseData(option, data)) break;
        this.#ask({ kind: 'list' });
        break;
      case NBD_OPT_STARTTLS:
        if (this.#refuseData(option, data)) break;
        this.#reply(option, NBD_REP_ERR_POLICY, encodeErrorText('TLS is not configured on this server'));
        break;
      case NBD_OPT_INFO:
      case NBD_OPT_GO: {
        const request = decodeInfoRequest(data);
        if (request instanceof OptionRefusal) this.#refuse(option, request);
        else this.#ask({ kind: 'info', option, ...request });
        break;
      }
      case NBD_OPT_STRUCTURED_REPLY:
        if (this.#refuseData(option, data)) break;
        this.#structuredReplies = true;
        this.#reply(option, NBD_REP_ACK);
        break;
      case NBD_OPT_LIST_META_CONTEXT:
      case NBD_OPT_SET_META_CONTEXT: {
        // SET replaces the earlier selection even when it fails.
        if (option === NBD_OPT_SET_META_CONTEXT) this.#baseAllocationFor = undefined;
        if (!this.#structuredReplies) {
          this.#refuse(option, new OptionRefusal('structured replies must be negotiated first'));
          break;
        }
        const request = decodeMetaContextRequest(data);
        if (request instanceof OptionRefusal) this.#refuse(option, request);
        else this.#ask({ kind: 'meta', option, ...request });
        break;
      }
      default:
        this.#reply(option, NBD_REP_ERR_UNSUP, encodeErrorText(`option ${option} is not supported`));
    }
  }

  #refuseData(option: number, data: Uint8Array): boolean {
    if (data.length === 0) return false;
    this.#refuse(option, new OptionRefusal('this option takes no data'));
    return true;
  }

  #refuse(option: number, refusal: OptionRefusal): void {
    this.#reply(option, refusal.tooBig ? NBD_REP_ERR_TOO_BIG : NBD_REP_ERR_INVALID, encodeErrorText(refusal.text));
  }

  #ask(question: Question): void {
    this.#question = question;
    this.#phase = 'asking';
  }

  #answered(): void {
    this.#question = undefined;
    this.#phase = 'options';
  }

  #transmit(exportName: string, transmissionFlags: number): void {
    this.#outcome = {
      kind: 'transmission',
      exportName,
      transmissionFlags,
      structuredReplies: this.#structuredReplies,
      baseAllocation: this.#baseAllocationFor === exportName,
      rest: this.#input,
    };
    this.#phase = 'transmission';
  }

  #fail(code: string, message: string): void {
    this.#outcome = { kind: 'closed', error: new ProtocolError(code, message, SECTION) };
    this.#phase = 'closed';
  }

  #consume(bytes: number): void {
    this.#input = this.#input.subarray(bytes);
  }

  #reply(option: number, replyType: number, data?: Uint8Array): void {
    this.#output.push(encodeOptionReply(option, replyType, data));
  }
}
