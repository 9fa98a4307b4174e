import { assert } from '../../src/base/assert.js';
import { Errno } from '../../src/base/errors.js';
import type { BlockFront, BlockTarget } from '../../src/io/block-target.js';
import { checkReplicatedBeforeReply } from './checkers/replicated-before-reply.js';
import type { SectorModel } from './checkers/sector-model.js';
import { wrongData } from './failure.js';
import type { Head } from './head.js';
import type { Prng } from './prng.js';
import { fillSector, VERSION_ZERO, versionOf } from './sector-pattern.js';

export interface WorkloadShape {
  /** Requests in flight. */
  readonly depth: number;
  /** Sector windows the requests fall into. */
  readonly windows: readonly number[];
  readonly windowSectors: number;
  readonly thinkMs: number;
}

/** The moments at which a crash is most interesting. */
export interface WorkloadListener {
  /** A flush succeeded. */
  flushed(): void;
  /** A write succeeded; how the disks are here and at the peer. */
  written(disk: string, peerDisk: string): void;
}

interface Slot {
  kind: 'idle' | 'read' | 'write' | 'zero' | 'flush';
  sector: number;
  sectors: number;
  payload: number;
  handle: number;
  /** The peer was a whole copy when this was issued: its incarnation then. */
  peerIncarnation: number;
  /** Connections made and lost on this head when this was issued. */
  linkChanges: number;
}

/** One application on one Primary: keeps requests in flight and judges every answer. */
export class Workload implements BlockFront {
  private readonly target: BlockTarget;
  private readonly slots: Slot[] = [];
  private readonly incarnation: number;
  private stopping = false;
  completed = 0;
  errors = 0;

  constructor(
    private readonly head: Head,
    private readonly peer: Head,
    readonly volume: number,
    readonly model: SectorModel,
    private readonly prng: Prng,
    private readonly shape: WorkloadShape,
    private readonly versions: { next: number },
    private readonly listener: WorkloadListener,
  ) {
    this.target = head.runtime!.blockTarget(volume);
    this.incarnation = head.incarnation;
    for (let index = 0; index < shape.depth; index++)
      this.slots.push({
        kind: 'idle',
        sector: 0,
        sectors: 0,
        payload: -1,
        handle: 0,
        peerIncarnation: 0,
        linkChanges: 0,
      });
  }

  /** @returns 0 or an errno, as open(2) of the device would */
  start(): number {
    const errno = this.target.open(true);
    if (errno === 0) for (let index = 0; index < this.slots.length; index++) this.issueSoon(index);
    return errno;
  }

  /** No new requests; when the last is answered the device is closed. */
  stop(): void {
    if (this.stopping) return;
    this.stopping = true;
    this.closeIfIdle();
  }

  get isIdle(): boolean {
    return this.slots.every((slot) => slot.kind === 'idle');
  }

  get isGone(): boolean {
    return this.head.incarnation !== this.incarnation || !this.head.isRunning;
  }

  private closed = false;
  get isClosed(): boolean {
    return this.closed || this.isGone;
  }

  private closeIfIdle(): void {
    if (!this.stopping || this.closed || !this.isIdle) return;
    this.closed = true;
    this.target.close(true);
  }

  private issueSoon(index: number, hasWritten = false): void {
    const { prng, head, shape } = this;
    // What is written is often flushed at once, as databases do.
    const flushes = hasWritten && prng.chance(0.25);
    // A Primary that is being synced: which of its blocks are good already is the question to ask.
    const isTarget = head.statuses[this.volume]!.disk === 'Inconsistent';
    const thinkMs = flushes ? 0 : prng.unit() * (isTarget ? 3 : shape.thinkMs);
    head.world.after(thinkMs, head.process, () => {
      if (this.stopping) this.closeIfIdle();
      else this.issue(index, flushes ? 0 : isTarget && prng.chance(0.6) ? 0.3 : prng.unit());
    });
  }

  private issue(index: number, roll: number): void {
    const slot = this.slots[index]!;
    const { prng, head, target, model } = this;
    const memory = head.memory!;
    const window = prng.pick(this.shape.windows);
    const long = prng.chance(0.03);
    slot.sectors = long ? prng.between(1, Math.min(5000, this.shape.windowSectors)) : prng.between(1, 32);
    slot.sector = window + prng.between(0, this.shape.windowSectors - slot.sectors);
    const status = head.statuses[this.volume]!;
    slot.peerIncarnation =
      status.connection === 'Connected' && status.peerDisk === 'UpToDate' ? this.peer.incarnation : 0;
    slot.linkChanges = head.linkChanges;
    const offset = slot.sector * 512;
    const length = slot.sectors * 512;
    assert(offset + length <= target.sizeBytes, 'windows lie inside the device');
    if (roll < 0.1) {
      slot.kind = 'flush';
      slot.handle = model.flushIssued();
      target.flush(this, index);
      return;
    }
    if (roll < 0.17) {
      slot.kind = 'zero';
      const fua = prng.chance(0.2);
      slot.handle = model.writeIssued(slot.sector, slot.sectors, VERSION_ZERO, fua);
      target.zero(this, index, offset, length, prng.chance(0.5), fua);
      return;
    }
    const payload = memory.allocate(length);
    assert(payload >= 0, 'the pool is large enough for the workload');
    slot.payload = payload;
    if (roll < 0.4) {
      slot.kind = 'read';
      slot.handle = model.readIssued();
      target.read(this, index, offset, length, payload);
      return;
    }
    slot.kind = 'write';
    const fua = prng.chance(0.1);
    const version = this.versions.next++;
    for (let at = 0; at < slot.sectors; at++) fillSector(memory.bytes, payload + at * 512, slot.sector + at, version);
    slot.handle = model.writeIssued(slot.sector, slot.sectors, version, fua);
    target.write(this, index, offset, length, payload, fua);
  }

  complete(index: number, errno: number): void {
    const slot = this.slots[index]!;
    const { model, head } = this;
    const { kind } = slot;
    assert(kind !== 'idle', `request ${index} is answered once`);
    slot.kind = 'idle';
    this.completed++;
    if (errno !== 0) {
      this.errors++;
      this.checkError(slot, errno, kind);
    }
    switch (kind) {
      case 'flush':
        model.flushDone(slot.handle, errno === 0);
        break;
      case 'read':
        if (errno === 0) this.checkRead(slot);
        model.readDone(slot.handle);
        break;
      default:
        model.writeDone(slot.sector, slot.sectors, slot.handle, errno === 0);
        if (errno === 0) {
          this.checkReplicated(slot);
          const { disk, peerDisk } = head.statuses[this.volume]!;
          this.listener.written(disk, peerDisk);
        }
    }
    if (slot.payload >= 0) head.memory!.release(slot.payload);
    slot.payload = -1;
    if (kind === 'flush' && errno === 0) this.listener.flushed();
    if (this.stopping) this.closeIfIdle();
    else this.issueSoon(index, kind === 'write');
  }

  /** An error is right only if neither disk was in reach with good data from the question to the answer. */
  private checkError(slot: Slot, errno: number, kind: Slot['kind']): void {
    const { head, peer, volume } = this;
    const { disk, peerDisk, connection } = head.statuses[volume]!;
    const peerHasIt =
      slot.peerIncarnation !== 0 &&
      slot.peerIncarnation === peer.incarnation &&
      slot.linkChanges === head.linkChanges &&
      connection === 'Connected' &&
      peerDisk === 'UpToDate' &&
      peer.isRunning &&
      peer.statuses[volume]!.disk === 'UpToDate';
    if (errno !== Errno.EIO || disk === 'UpToDate' || peerHasIt)
      wrongData(
        'no error with good data',
        `${head.name}/${volume} answered ${kind} with errno ${errno}, disk ${disk}, peer's ${peerDisk}`,
      );
  }

  private checkRead(slot: Slot): void {
    const { bytes } = this.head.memory!;
    for (let at = 0; at < slot.sectors; at++) {
      const sector = slot.sector + at;
      const version = versionOf(bytes, slot.payload + at * 512, sector);
      if (!this.model.isLegal(sector, version, slot.handle))
        wrongData(
          'reads return a legal value',
          `${this.head.name}/${this.volume} sector ${sector} read as ${version}: ${this.model.describe(sector)}`,
        );
    }
  }

  private checkReplicated(slot: Slot): void {
    const { peer, head, volume } = this;
    const { connection, peerDisk } = head.statuses[volume]!;
    const isWhole = connection === 'Connected' && peerDisk === 'UpToDate';
    if (!isWhole || slot.peerIncarnation === 0 || slot.peerIncarnation !== peer.incarnation || !peer.isRunning) return;
    const there = peer.statuses[volume]!;
    if (there.disk !== 'UpToDate' || there.connection !== 'Connected') return;
    // A dying disk may have forgotten it since.
    if (peer.disks[volume]!.data.isFaulty) return;
    checkReplicatedBeforeReply(peer, volume, this.model, slot.sector, slot.sectors);
  }
}
