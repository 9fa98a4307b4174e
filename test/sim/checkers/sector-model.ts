import { VERSION_ZERO } from '../sector-pattern.js';

interface Entry {
  readonly version: number;
  readonly issued: number;
  /** Infinity while in flight. */
  acked: number;
  /** Acknowledged with success: what it replaced is gone. A weak one may or may not be there. */
  strong: boolean;
  readonly fua: boolean;
}

/**
 * What a device may contain, sector by sector, given what its application was told.
 *
 * Two writes in flight together may take effect in either order. Whatever was acknowledged before another write of the
 * same sector was issued is replaced by it. A power loss may bring back everything younger than the last flush.
 */
export class SectorModel {
  private readonly sectors = new Map<number, Entry[]>();
  /** Sectors that may hold anything (torn by a power loss, or from before a split brain). */
  private readonly anything = new Set<number>();
  private time = 1;
  private flushedAt = 0;
  private readonly readsInFlight = new Set<number>();

  /** @param knowsNothing sectors that were never written through this model may hold anything */
  constructor(private readonly knowsNothing = false) {}

  get knownSectors(): IterableIterator<number> {
    return this.sectors.keys();
  }

  /** @returns handle of the write */
  writeIssued(sector: number, sectors: number, version: number, fua: boolean): number {
    const issued = this.time++;
    for (let at = sector; at < sector + sectors; at++) {
      let entries = this.sectors.get(at);
      if (!entries) {
        entries = this.knowsNothing ? [] : [{ version: VERSION_ZERO, issued: 0, acked: 0, strong: true, fua: true }];
        if (this.knowsNothing) this.anything.add(at);
        this.sectors.set(at, entries);
      }
      entries.push({ version, issued, acked: Number.POSITIVE_INFINITY, strong: false, fua });
    }
    return issued;
  }

  writeDone(sector: number, sectors: number, issued: number, ok: boolean): void {
    const now = this.time++;
    for (let at = sector; at < sector + sectors; at++) {
      const entries = this.sectors.get(at);
      const entry = entries?.find((candidate) => candidate.issued === issued);
      if (!entries || !entry) continue;
      entry.acked = now;
      entry.strong = ok;
      if (ok) this.anything.delete(at);
      this.prune(at, entries);
    }
  }

  /** @returns handle of the flush */
  flushIssued(): number {
    return this.time++;
  }

  flushDone(issued: number, ok: boolean): void {
    if (ok) this.flushedAt = Math.max(this.flushedAt, issued);
  }

  readIssued(): number {
    const now = this.time++;
    this.readsInFlight.add(now);
    return now;
  }

  readDone(issued: number): void {
    this.readsInFlight.delete(issued);
  }

  /** Whether a read issued at `since` (default: now) may see this version. */
  isLegal(sector: number, version: number, since = Number.POSITIVE_INFINITY): boolean {
    if (this.anything.has(sector)) return true;
    const entries = this.sectors.get(sector);
    if (!entries) return this.knowsNothing || version === VERSION_ZERO;
    return entries.some(
      (entry) =>
        entry.version === version &&
        !entries.some((other) => other.strong && other.acked < since && other.issued > entry.acked),
    );
  }

  describe(sector: number): string {
    const entries = this.sectors.get(sector) ?? [];
    return entries
      .map(({ version, issued, acked, strong }) => `v${version}@${issued}-${acked}${strong ? '' : '?'}`)
      .join(' ');
  }

  /** The node died and a whole copy took over: what was in flight may or may not be there. */
  takenOver(): void {
    const now = this.time++;
    for (const entries of this.sectors.values())
      for (const entry of entries) if (entry.acked === Number.POSITIVE_INFINITY) entry.acked = now;
    this.readsInFlight.clear();
  }

  /** The only copy lost what it had not flushed. */
  powerLost(): void {
    const now = this.time++;
    this.readsInFlight.clear();
    for (const [sector, all] of this.sectors) {
      const entries = this.prune(sector, all);
      if (entries.length > 1) this.anything.add(sector);
      for (const entry of entries) {
        entry.acked = now;
        entry.strong = false;
      }
    }
  }

  /** @returns what is left */
  private prune(sector: number, entries: Entry[]): Entry[] {
    const horizon = Math.min(this.flushedAt, ...this.readsInFlight);
    const isDurable = (entry: Entry) =>
      entry.strong && (entry.acked <= horizon || (entry.fua && this.readsInFlight.size === 0));
    if (entries.length < 2) return entries;
    const kept = entries.filter((entry) => !entries.some((other) => isDurable(other) && other.issued > entry.acked));
    if (kept.length < entries.length) this.sectors.set(sector, kept);
    return kept;
  }
}
