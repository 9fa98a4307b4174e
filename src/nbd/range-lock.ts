/**
 * Serialises requests that may not overlap, for one device.
 *
 * A whole-sector write goes straight to the engine, which itself orders overlapping writes; such writes take the lock
 * *shared* and never wait for each other. A request that reads, changes and writes a sector back takes it *exclusive*:
 * an overlapping write between its read and its write would be lost. Who cannot be served waits in order of arrival,
 * and nobody overtakes an overlapping waiter, so nobody starves.
 *
 * The common case, no exclusive request anywhere, costs a list insertion. Holders are named by the caller's small
 * numbers (request slots); all state is in typed arrays indexed by them.
 */
import { assert } from '../base/assert.js';

const NONE = -1;

const FREE = 0;
const HELD = 1;
const WAITING = 2;

export class RangeLock {
  #starts = new Float64Array(0);
  #ends = new Float64Array(0);
  #previous = new Int32Array(0);
  #next = new Int32Array(0);
  #exclusive = new Uint8Array(0);
  #state = new Uint8Array(0);
  #heldHead = NONE;
  #heldTail = NONE;
  #waitingHead = NONE;
  #waitingTail = NONE;
  /** Exclusive requests held or waiting; 0 means that shared ones need not look. */
  #exclusiveCount = 0;
  #granting = false;
  #grantAgain = false;

  /** @param granted called when a request that had to wait now holds its range, never from inside `acquire` */
  constructor(private readonly granted: (id: number) => void) {}

  /** Whether anything is held or waits. */
  get isIdle(): boolean {
    return this.#heldHead === NONE && this.#waitingHead === NONE;
  }

  /**
   * Asks for [startBytes, endBytes).
   * @param id a number the caller reuses only after `release`
   * @returns true when it is held now; else `granted(id)` follows
   */
  acquire(id: number, startBytes: number, endBytes: number, exclusive: boolean): boolean {
    assert(startBytes >= 0 && startBytes < endBytes, 'a range has a length');
    if (id >= this.#state.length) this.#grow(id + 1);
    assert(this.#state[id] === FREE, 'one range for each request');
    this.#starts[id] = startBytes;
    this.#ends[id] = endBytes;
    this.#exclusive[id] = exclusive ? 1 : 0;
    if (exclusive) this.#exclusiveCount++;
    const free =
      this.#exclusiveCount === 0 ||
      (!this.#conflicts(this.#heldHead, id, NONE) && !this.#conflicts(this.#waitingHead, id, NONE));
    if (free) this.#hold(id);
    else this.#wait(id);
    return free;
  }

  /** Gives the range back, or gives up waiting for it; may call `granted` for others. */
  release(id: number): void {
    const state = this.#state[id];
    assert(state === HELD || state === WAITING, 'released a range that is not held');
    if (state === HELD) this.#unlinkHeld(id);
    else this.#unlinkWaiting(id);
    if (this.#exclusive[id] === 1) this.#exclusiveCount--;
    this.#state[id] = FREE;
    if (this.#waitingHead !== NONE) this.#grant();
  }

  /** Whether the request still waits. */
  isWaiting(id: number): boolean {
    return this.#state[id] === WAITING;
  }

  #grant(): void {
    // A grantee may release at once, from inside `granted`: then the pass that runs goes round once more.
    if (this.#granting) {
      this.#grantAgain = true;
      return;
    }
    this.#granting = true;
    do {
      this.#grantAgain = false;
      for (let id = this.#waitingHead; id !== NONE && !this.#grantAgain; ) {
        const following = this.#next[id]!;
        if (!this.#conflicts(this.#heldHead, id, NONE) && !this.#conflicts(this.#waitingHead, id, id)) {
          this.#unlinkWaiting(id);
          this.#hold(id);
          this.granted(id);
        }
        id = following;
      }
    } while (this.#grantAgain);
    this.#granting = false;
  }

  /** Whether `id` may not run beside one of the list from `head` up to (not including) `until`. */
  #conflicts(head: number, id: number, until: number): boolean {
    const start = this.#starts[id]!;
    const end = this.#ends[id]!;
    const exclusive = this.#exclusive[id] === 1;
    for (let other = head; other !== until && other !== NONE; other = this.#next[other]!)
      if ((exclusive || this.#exclusive[other] === 1) && this.#starts[other]! < end && start < this.#ends[other]!)
        return true;
    return false;
  }

  #hold(id: number): void {
    this.#state[id] = HELD;
    this.#previous[id] = this.#heldTail;
    this.#next[id] = NONE;
    if (this.#heldTail === NONE) this.#heldHead = id;
    else this.#next[this.#heldTail] = id;
    this.#heldTail = id;
  }

  #wait(id: number): void {
    this.#state[id] = WAITING;
    this.#previous[id] = this.#waitingTail;
    this.#next[id] = NONE;
    if (this.#waitingTail === NONE) this.#waitingHead = id;
    else this.#next[this.#waitingTail] = id;
    this.#waitingTail = id;
  }

  #unlinkHeld(id: number): void {
    const previous = this.#previous[id]!;
    const next = this.#next[id]!;
    if (previous === NONE) this.#heldHead = next;
    else this.#next[previous] = next;
    if (next === NONE) this.#heldTail = previous;
    else this.#previous[next] = previous;
  }

  #unlinkWaiting(id: number): void {
    const previous = this.#previous[id]!;
    const next = this.#next[id]!;
    if (previous === NONE) this.#waitingHead = next;
    else this.#next[previous] = next;
    if (next === NONE) this.#waitingTail = previous;
    else this.#previous[next] = previous;
  }

  #grow(atLeast: number): void {
    let capacity = Math.max(64, this.#state.length);
    while (capacity < atLeast) capacity *= 2;
    this.#starts = copied(this.#starts, new Float64Array(capacity));
    this.#ends = copied(this.#ends, new Float64Array(capacity));
    this.#previous = copied(this.#previous, new Int32Array(capacity));
    this.#next = copied(this.#next, new Int32Array(capacity));
    this.#exclusive = copied(this.#exclusive, new Uint8Array(capacity));
    this.#state = copied(this.#state, new Uint8Array(capacity));
  }
}

function copied<T extends Float64Array | Int32Array | Uint8Array>(from: T, to: T): T {
  to.set(from);
  return to;
}
