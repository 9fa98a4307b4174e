/**
 * Virtual time and the order of everything: a heap of due calls. Two calls due at the same moment run in the order they
 * were made, so a seed repeats bit for bit.
 */
export class World {
  /** Milliseconds of virtual time; fractions are microseconds. */
  nowMs = 0;
  private readonly due: Call[] = [];
  private sequence = 0;

  /** Runs `run` after `delayMs`, unless `owner` has died by then. */
  after(delayMs: number, owner: Owner | undefined, run: () => void): void {
    const call = { atMs: this.nowMs + delayMs, sequence: this.sequence++, owner, run };
    const heap = this.due;
    let index = heap.push(call) - 1;
    while (index > 0) {
      const parent = (index - 1) >> 1;
      if (isBefore(heap[parent]!, call)) break;
      heap[index] = heap[parent]!;
      index = parent;
    }
    heap[index] = call;
  }

  /** Runs everything due until `untilMs`; the clock stands there afterwards. */
  runUntil(untilMs: number): void {
    for (let call = this.due[0]; call && call.atMs <= untilMs; call = this.due[0]) {
      this.pop();
      this.nowMs = call.atMs;
      if (!call.owner || call.owner.alive) call.run();
    }
    this.nowMs = untilMs;
  }

  private pop(): void {
    const heap = this.due;
    const last = heap.pop()!;
    if (heap.length === 0) return;
    let index = 0;
    for (;;) {
      let child = index * 2 + 1;
      if (child >= heap.length) break;
      if (child + 1 < heap.length && isBefore(heap[child + 1]!, heap[child]!)) child++;
      if (isBefore(last, heap[child]!)) break;
      heap[index] = heap[child]!;
      index = child;
    }
    heap[index] = last;
  }
}

/** A process: what it scheduled dies with it. */
export interface Owner {
  alive: boolean;
}

interface Call {
  readonly atMs: number;
  readonly sequence: number;
  readonly owner: Owner | undefined;
  readonly run: () => void;
}

function isBefore(one: Call, other: Call): boolean {
  return one.atMs < other.atMs || (one.atMs === other.atMs && one.sequence < other.sequence);
}
