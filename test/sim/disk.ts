import { assert } from '../../src/base/assert.js';
import { Errno } from '../../src/base/errors.js';
import type { BlockFile, FileDone } from '../../src/io/ring.js';
import type { SimMemory } from './memory.js';
import type { Prng } from './prng.js';
import type { Owner, World } from './world.js';

export type OperationKind = 'read' | 'write' | 'flush';

const SECTOR = 512;
const PAGE = 4096;

/**
 * The platter and its volatile cache; survives the process that writes it. Sparse: what nobody wrote is zero. For every
 * sector that was not flushed, power loss decides on its own whether it is kept, lost or torn in the middle.
 */
export class Platter {
  private readonly pages = new Map<number, Uint8Array>();
  /** Unflushed sectors: the sequence of the last write, and what is stable instead. */
  private readonly unflushed = new Map<number, { written: number; readonly stable: Uint8Array }>();
  private readonly spare: Uint8Array[] = [];
  private sequence = 0;
  /** Every operation fails (a dead disk). */
  broken = false;
  /** The next so many operations of this kind fail (bad sectors). */
  readonly badNext: Record<OperationKind, number> = { read: 0, write: 0, flush: 0 };

  constructor(
    readonly sizeBytes: number,
    private readonly prng: Prng,
  ) {
    assert(sizeBytes % SECTOR === 0, 'a disk has whole sectors');
  }

  /** What was on the disk before anybody used it: not subject to power loss. */
  fill(offset: number, bytes: Uint8Array): void {
    this.put(offset, bytes);
  }

  read(offset: number, into: Uint8Array): void {
    for (let done = 0; done < into.length; ) {
      const at = offset + done;
      const inPage = at % PAGE;
      const length = Math.min(PAGE - inPage, into.length - done);
      const page = this.pages.get(at - inPage);
      if (page) into.set(page.subarray(inPage, inPage + length), done);
      else into.fill(0, done, done + length);
      done += length;
    }
  }

  write(offset: number, bytes: Uint8Array): void {
    for (let done = 0; done < bytes.length; ) {
      const at = offset + done;
      const length = Math.min(PAGE - (at % PAGE), bytes.length - done);
      const part = bytes.subarray(done, done + length);
      // Zeroes where nothing ever was change nothing, now or after a power loss.
      if (this.pages.has(at - (at % PAGE)) || !isZero(part)) {
        this.touch(at, length);
        this.put(at, part);
      }
      done += length;
    }
  }

  zero(offset: number, length: number): void {
    for (let done = 0; done < length; ) {
      const at = offset + done;
      const inPage = at % PAGE;
      const part = Math.min(PAGE - inPage, length - done);
      const page = this.pages.get(at - inPage);
      if (page) {
        this.touch(at, part);
        page.fill(0, inPage, inPage + part);
      }
      done += part;
    }
  }

  private put(offset: number, bytes: Uint8Array): void {
    for (let done = 0; done < bytes.length; ) {
      const at = offset + done;
      const inPage = at % PAGE;
      const length = Math.min(PAGE - inPage, bytes.length - done);
      const part = bytes.subarray(done, done + length);
      let page = this.pages.get(at - inPage);
      if (!page && !isZero(part)) {
        page = new Uint8Array(PAGE);
        this.pages.set(at - inPage, page);
      }
      page?.set(part, inPage);
      done += length;
    }
  }

  private touch(offset: number, length: number): void {
    this.sequence++;
    for (let sector = offset / SECTOR; sector < (offset + length) / SECTOR; sector++) {
      const entry = this.unflushed.get(sector);
      if (entry) {
        entry.written = this.sequence;
        continue;
      }
      const stable = this.spare.pop() ?? new Uint8Array(SECTOR);
      this.read(sector * SECTOR, stable);
      this.unflushed.set(sector, { written: this.sequence, stable });
    }
  }

  get writeSequence(): number {
    return this.sequence;
  }

  /** What was written up to `sequence` becomes stable. */
  settle(sequence: number): void {
    for (const [sector, { written }] of this.unflushed) if (written <= sequence) this.settleSector(sector);
  }

  settleRange(offset: number, length: number): void {
    for (let sector = offset / SECTOR; sector < (offset + length) / SECTOR; sector++) this.settleSector(sector);
  }

  private settleSector(sector: number): void {
    const entry = this.unflushed.get(sector);
    if (!entry) return;
    this.unflushed.delete(sector);
    this.spare.push(entry.stable);
  }

  /** Whether the next operation of this kind fails. */
  takeFault(kind: OperationKind): boolean {
    if (this.broken) return true;
    if (this.badNext[kind] === 0) return false;
    this.badNext[kind]--;
    return true;
  }

  get isFaulty(): boolean {
    return this.broken || this.badNext.read + this.badNext.write + this.badNext.flush > 0;
  }

  /** Every fault is mended. */
  mend(): void {
    this.broken = false;
    for (const kind of ['read', 'write', 'flush'] as const) this.badNext[kind] = 0;
  }

  powerLoss(): void {
    for (const [sector, { stable }] of this.unflushed) {
      const start = sector * SECTOR;
      const fate = this.prng.between(0, 9);
      if (fate < 5) {
        this.put(start, stable);
      } else if (fate < 6) {
        const cut = 8 * this.prng.between(1, SECTOR / 8 - 1);
        this.put(start + cut, stable.subarray(cut));
      }
    }
    this.unflushed.clear();
  }

  /** First byte in which two platters differ within `length`, or -1. */
  firstDifference(other: Platter, length: number): number {
    const offsets = [...new Set([...this.pages.keys(), ...other.pages.keys()])].sort((a, b) => a - b);
    for (const offset of offsets) {
      if (offset >= length) break;
      const mine = this.pages.get(offset) ?? ZEROES;
      const its = other.pages.get(offset) ?? ZEROES;
      if (Buffer.compare(mine, its) === 0) continue;
      for (let at = 0; at < Math.min(PAGE, length - offset); at++) if (mine[at] !== its[at]) return offset + at;
    }
    return -1;
  }
}

const ZEROES = new Uint8Array(PAGE);

function isZero(bytes: Uint8Array): boolean {
  return Buffer.compare(bytes, ZEROES.subarray(0, bytes.length)) === 0;
}

export interface DiskTiming {
  readonly minimumMs: number;
  readonly maximumMs: number;
  /** Share of operations that fail with EIO. */
  errorRate: number;
}

/** One process's open handle on a platter. */
export class SimFile implements BlockFile {
  readonly alignmentBytes = 1;
  private done: FileDone | undefined;
  private closed = false;
  /** Operations begun, by kind, for tests that count. */
  writes = 0;
  reads = 0;
  flushes = 0;
  inFlight = 0;

  constructor(
    private readonly world: World,
    private readonly owner: Owner,
    private readonly memory: SimMemory,
    private readonly prng: Prng,
    readonly platter: Platter,
    private readonly timing: DiskTiming,
    /** Hears every finished operation, before the caller does. */
    private readonly trace: (line: string) => void = () => {},
  ) {}

  get sizeBytes(): number {
    return this.platter.sizeBytes;
  }

  setDone(done: FileDone): void {
    this.done = done;
  }

  read(cookie: number, offset: number, payload: number, length: number): void {
    this.check(cookie, offset, length);
    this.memory.retain(payload);
    this.reads++;
    const failed = this.fails('read');
    // The moment at which the data is fetched lies somewhere before completion.
    this.finishLater(cookie, () => {
      if (!failed) this.platter.read(offset, this.memory.bytes.subarray(payload, payload + length));
      this.memory.release(payload);
      return failed ? Errno.EIO : 0;
    });
  }

  write(cookie: number, offset: number, payload: number, length: number, durable: boolean): void {
    this.check(cookie, offset, length);
    this.memory.retain(payload);
    this.writes++;
    const failed = this.fails('write');
    const bytes = this.memory.bytes;
    // A write reaches the cache in two steps at two moments: a crash in between tears it, also between sectors.
    const half = Math.floor(this.prng.between(0, length / SECTOR)) * SECTOR;
    const delay = this.delay();
    this.inFlight++;
    this.world.after(delay / 2, this.owner, () => {
      if (half > 0) this.platter.write(offset, bytes.subarray(payload, payload + half));
      this.world.after(delay / 2, this.owner, () => {
        if (half < length && !failed)
          this.platter.write(offset + half, bytes.subarray(payload + half, payload + length));
        if (durable && !failed) this.platter.settleRange(offset, length);
        this.memory.release(payload);
        this.finish(cookie, failed ? Errno.EIO : 0);
      });
    });
  }

  flush(cookie: number): void {
    this.check(cookie, 0, 0);
    this.flushes++;
    const sequence = this.platter.writeSequence;
    const failed = this.fails('flush');
    this.finishLater(cookie, () => {
      if (!failed) this.platter.settle(sequence);
      return failed ? Errno.EIO : 0;
    });
  }

  zero(cookie: number, offset: number, length: number, _keepAllocated: boolean, durable: boolean): void {
    this.check(cookie, offset, length);
    this.writes++;
    const failed = this.fails('write');
    this.finishLater(cookie, () => {
      if (!failed) this.platter.zero(offset, length);
      if (durable && !failed) this.platter.settleRange(offset, length);
      return failed ? Errno.EIO : 0;
    });
  }

  close(): void {
    this.closed = true;
  }

  private fails(kind: OperationKind): boolean {
    return this.platter.takeFault(kind) || (this.timing.errorRate > 0 && this.prng.chance(this.timing.errorRate));
  }

  private delay(): number {
    const { minimumMs, maximumMs } = this.timing;
    const spread = this.prng.unit();
    return minimumMs + (maximumMs - minimumMs) * spread * spread * spread;
  }

  private finishLater(cookie: number, act: () => number): void {
    this.inFlight++;
    this.world.after(this.delay(), this.owner, () => this.finish(cookie, act()));
  }

  private finish(cookie: number, errno: number): void {
    this.inFlight--;
    this.trace(`done ${cookie} ${errno}`);
    if (!this.closed) this.done?.(cookie, errno);
  }

  private check(cookie: number, offset: number, length: number): void {
    assert(!this.closed, 'an operation on a closed file');
    assert(this.done !== undefined, 'an operation before setDone');
    assert(Number.isInteger(cookie) && cookie >= 0 && cookie < 2 ** 31, `cookie ${cookie}`);
    assert(offset % SECTOR === 0 && length % SECTOR === 0, `whole sectors: ${offset} + ${length}`);
    assert(offset >= 0 && offset + length <= this.sizeBytes, `inside the disk: ${offset} + ${length}`);
  }
}
