import { assert } from '../base/assert.js';
import type { BlockFile, FileDone } from './ring.js';

const SECTOR_BYTES = 512;
const MAX_COOKIE = 2 ** 31 - 1;

/**
 * The contract of a BlockFile, checked on both sides of every operation: whole sectors inside the file, aligned where
 * the
 * file asks for it, each operation finished exactly once, none after `close`. Always on: a request to the wrong place
 * is
 * worse than a stopped process.
 */
export function withContract(file: BlockFile): BlockFile {
  return new ContractFile(file);
}

class ContractFile implements BlockFile {
  readonly sizeBytes: number;
  readonly alignmentBytes: number;
  private readonly outstanding = new Set<number>();
  private done: FileDone | undefined;
  private isClosed = false;

  constructor(private readonly file: BlockFile) {
    this.sizeBytes = file.sizeBytes;
    this.alignmentBytes = file.alignmentBytes;
  }

  setDone(done: FileDone): void {
    this.done = done;
    this.file.setDone((cookie, errno) => {
      assert(this.outstanding.delete(cookie), `operation ${cookie} is finished once, and was begun`);
      assert(Number.isInteger(errno) && errno >= 0, `errno ${errno}`);
      done(cookie, errno);
    });
  }

  read(cookie: number, offsetBytes: number, payload: number, lengthBytes: number): void {
    this.begin(cookie, offsetBytes, lengthBytes, payload);
    this.file.read(cookie, offsetBytes, payload, lengthBytes);
  }

  write(cookie: number, offsetBytes: number, payload: number, lengthBytes: number, durable: boolean): void {
    this.begin(cookie, offsetBytes, lengthBytes, payload);
    this.file.write(cookie, offsetBytes, payload, lengthBytes, durable);
  }

  flush(cookie: number): void {
    this.note(cookie);
    this.file.flush(cookie);
  }

  seek(offsetBytes: number, what: 'data' | 'hole'): number {
    assert(offsetBytes >= 0 && offsetBytes < this.sizeBytes, 'looked for inside the file');
    return this.file.seek?.(offsetBytes, what) ?? -1;
  }

  zero(cookie: number, offsetBytes: number, lengthBytes: number, keepAllocated: boolean, durable: boolean): void {
    this.begin(cookie, offsetBytes, lengthBytes, 0);
    this.file.zero(cookie, offsetBytes, lengthBytes, keepAllocated, durable);
  }

  close(): void {
    assert(!this.isClosed, 'a file is closed once');
    this.isClosed = true;
    this.file.close();
  }

  private begin(cookie: number, offset: number, length: number, payload: number): void {
    assert(offset % SECTOR_BYTES === 0 && length % SECTOR_BYTES === 0, `whole sectors: ${offset} + ${length}`);
    assert(length > 0 && offset >= 0 && offset + length <= this.sizeBytes, `inside the file: ${offset} + ${length}`);
    assert(payload >= 0, 'a payload block');
    this.note(cookie);
  }

  private note(cookie: number): void {
    assert(this.done !== undefined && !this.isClosed, 'the file is in use');
    assert(Number.isInteger(cookie) && cookie >= 0 && cookie <= MAX_COOKIE, `cookie ${cookie}`);
    assert(!this.outstanding.has(cookie), `operation ${cookie} is not under way already`);
    this.outstanding.add(cookie);
  }
}
