/**
 * Record marking (RFC 5531 section 11): a record is 1..n fragments, a fragment is a header (top bit: the last one; 31
 * bits of length) and its bytes. The ring does this for the server; this is its twin for the client and the tests.
 */
import { ProtocolError } from '../base/errors.js';

/** Top bit of a fragment header. */
export const LAST_FRAGMENT = 0x8000_0000;

/** Cuts a byte stream into records. Memory grows with the bytes that arrived, never with an announced length. */
export class RecordReader {
  private readonly header = new Uint8Array(4);
  private headerFilled = 0;
  private fragmentLeft = 0;
  private isLast = false;
  private fragments = 0;
  private parts: Uint8Array[] = [];
  private recordBytes = 0;

  constructor(
    private readonly maxRecordBytes: number,
    private readonly maxFragments: number,
    private readonly record: (bytes: Uint8Array) => void,
  ) {}

  /**
   * Consumes bytes and calls `record` once for every record they complete; the record is the receiver's to keep.
   * @throws ProtocolError when a record is too long, has too many fragments, or is empty: close the stream
   */
  push(chunk: Uint8Array): void {
    let at = 0;
    while (at < chunk.length) {
      if (this.headerFilled < 4) {
        this.header[this.headerFilled++] = chunk[at++]!;
        if (this.headerFilled === 4) this.startFragment();
        continue;
      }
      const taken = Math.min(this.fragmentLeft, chunk.length - at);
      this.parts.push(chunk.slice(at, at + taken));
      this.fragmentLeft -= taken;
      at += taken;
      if (this.fragmentLeft === 0) this.endFragment();
    }
  }

  private startFragment(): void {
    const word = new DataView(this.header.buffer).getUint32(0);
    this.isLast = word >= LAST_FRAGMENT;
    this.fragmentLeft = word % LAST_FRAGMENT;
    this.recordBytes += this.fragmentLeft;
    if (++this.fragments > this.maxFragments)
      throw new ProtocolError(
        'DRBDTS_RPC_TOO_MANY_FRAGMENTS',
        `a record has more than ${this.maxFragments} fragments`,
        'RFC 5531 section 11',
      );
    if (this.recordBytes > this.maxRecordBytes)
      throw new ProtocolError(
        'DRBDTS_RPC_RECORD_TOO_LONG',
        `a record has ${this.recordBytes} bytes or more, at most ${this.maxRecordBytes}`,
        'RFC 5531 section 11',
      );
    if (this.fragmentLeft === 0) this.endFragment();
  }

  private endFragment(): void {
    this.headerFilled = 0;
    if (!this.isLast) return;
    if (this.recordBytes === 0)
      throw new ProtocolError('DRBDTS_RPC_EMPTY_RECORD', 'a record is empty', 'RFC 5531 section 11');
    const record = this.parts.length === 1 ? this.parts[0]! : Buffer.concat(this.parts);
    this.parts = [];
    this.recordBytes = 0;
    this.fragments = 0;
    this.record(record);
  }
}

/** One record as one fragment. */
export function frameRecord(record: Uint8Array): Uint8Array {
  const framed = new Uint8Array(4 + record.length);
  new DataView(framed.buffer).setUint32(0, LAST_FRAGMENT + record.length);
  framed.set(record, 4);
  return framed;
}
