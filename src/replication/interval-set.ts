import { assert } from '../base/assert.js';

const INITIAL_CAPACITY = 256;

/**
 * The writes a device has accepted and not yet completed, each a sector range with an age. A write may start only when
 * no older one overlaps it; so overlapping writes take effect in the order they came, on both heads alike, also while
 * some of them still wait for something else.
 *
 * A dense table scanned from end to end: the number of writes in flight is bounded (max-buffers) and usually a few
 * dozen, for which a scan of typed arrays beats a tree, and nothing is allocated per write.
 */
export class IntervalSet {
  private starts = new Float64Array(INITIAL_CAPACITY);
  private ends = new Float64Array(INITIAL_CAPACITY);
  private ages = new Float64Array(INITIAL_CAPACITY);
  private count = 0;
  private nextAge = 1;

  get size(): number {
    return this.count;
  }

  /**
   * Adds sectors `start`..`end - 1`.
   * @returns the age that names the interval in the other calls
   */
  insert(start: number, end: number): number {
    assert(end > start, `an interval has sectors: ${start}..${end}`);
    if (this.count === this.starts.length) this.grow();
    const age = this.nextAge++;
    this.starts[this.count] = start;
    this.ends[this.count] = end;
    this.ages[this.count] = age;
    this.count++;
    return age;
  }

  /** @returns whether an interval older than `age` overlaps `start`..`end - 1` */
  isBlocked(start: number, end: number, age: number): boolean {
    for (let index = 0; index < this.count; index++) {
      if (this.ages[index]! < age && this.starts[index]! < end && start < this.ends[index]!) return true;
    }
    return false;
  }

  remove(age: number): void {
    for (let index = 0; index < this.count; index++) {
      if (this.ages[index] !== age) continue;
      this.count--;
      this.starts[index] = this.starts[this.count]!;
      this.ends[index] = this.ends[this.count]!;
      this.ages[index] = this.ages[this.count]!;
      return;
    }
    assert(false, `interval ${age} is not in the set`);
  }

  private grow(): void {
    const capacity = this.starts.length * 2;
    const copy = (from: Float64Array) => {
      const to = new Float64Array(capacity);
      to.set(from);
      return to;
    };
    this.starts = copy(this.starts);
    this.ends = copy(this.ends);
    this.ages = copy(this.ages);
  }
}
