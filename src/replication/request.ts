import { assert } from '../base/assert.js';
import type { BlockFront } from '../io/block-target.js';
import { NO_PAYLOAD_OFFSET } from './effects.js';

/** What an application asked for. */
export const RequestKind = { Read: 0, Write: 1, Zero: 2, Flush: 3 } as const;
export type RequestKind = (typeof RequestKind)[keyof typeof RequestKind];

/** What has happened to a request so far; bits of `Request.flags`. */
export const RequestFlag = {
  /** The own disk works on it. */
  LocalPending: 1,
  LocalOk: 2,
  /** Handed to the connection, answer outstanding. */
  NetPending: 4,
  /** The peer has it. */
  NetOk: 8,
  /** It was sent in an epoch and stays in the transfer log until that epoch is acknowledged. */
  InEpoch: 16,
  /** Answered to the application. */
  Completed: 32,
  /** Both parts are done, but something must become durable before the application hears of it. */
  Gated: 64,
  /** The peer's acknowledgement says that the blocks are in sync now. */
  SetInSync: 128,
  /** Holds references to the activity log extents it touches. */
  ActivityLogHeld: 256,
  /** Set in the interval set. */
  Interval: 512,
  /** A read that already failed on the own disk. */
  LocalFailed: 1024,
  /** A flush waits for the acknowledgement of the epoch in `epoch`. */
  WaitsForEpoch: 2048,
} as const;

/** Where a request stands before it is under way. */
export const RequestStage = { Free: 0, Waiting: 1, Overlap: 2, ActivityLog: 3, Running: 4 } as const;

/**
 * One application request from admission until nothing remembers it: for a replicated write that is the acknowledgement
 * of its epoch, long after the application was answered. Slots are reused.
 */
export class Request<Owner> {
  owner: Owner | undefined = undefined;
  front: BlockFront | undefined = undefined;
  frontRequest = 0;
  kind: number = RequestKind.Read;
  stage: number = RequestStage.Free;
  flags = 0;
  sector = 0;
  sectors = 0;
  payload = NO_PAYLOAD_OFFSET;
  fua = false;
  unmap = false;
  epoch = 0;
  /** Name in the interval set. */
  age = 0;
  sentMs = 0;
  startedMs = 0;
  errno = 0;
  /** Transfer log. */
  previous: Request<Owner> | undefined = undefined;
  next: Request<Owner> | undefined = undefined;
  /** Whichever queue it waits in: admission, overlap, activity log, gate, flush. */
  queued: Request<Owner> | undefined = undefined;
  /** Distinguishes the uses of a slot, so that a late answer to an earlier one is not mistaken for this. */
  incarnation = 0;

  constructor(readonly slot: number) {}

  has(flag: number): boolean {
    return (this.flags & flag) !== 0;
  }
}

/** Singly linked queue through `Request.queued`; a request is in one queue at a time. */
export class RequestQueue<Owner> {
  private first: Request<Owner> | undefined = undefined;
  private last: Request<Owner> | undefined = undefined;
  length = 0;

  get head(): Request<Owner> | undefined {
    return this.first;
  }

  push(request: Request<Owner>): void {
    request.queued = undefined;
    if (this.last) this.last.queued = request;
    else this.first = request;
    this.last = request;
    this.length++;
  }

  shift(): Request<Owner> | undefined {
    const request = this.first;
    if (!request) return undefined;
    this.first = request.queued;
    if (!this.first) this.last = undefined;
    request.queued = undefined;
    this.length--;
    return request;
  }

  /** Takes out what `take` says true to, oldest first; the rest keeps its order. */
  removeIf(take: (request: Request<Owner>) => boolean): void {
    let remaining = this.length;
    while (remaining-- > 0) {
      // Taking one may have taken others.
      const request = this.shift();
      if (!request) return;
      if (!take(request)) this.push(request);
    }
  }
}

/** The slots. Grows to what the front ends have in flight, never beyond `limit`. */
export class RequestTable<Owner> {
  private readonly slots: Request<Owner>[] = [];
  private readonly free: Request<Owner>[] = [];
  inUse = 0;

  constructor(private readonly limit: number) {}

  allocate(): Request<Owner> | undefined {
    let request = this.free.pop();
    if (!request) {
      if (this.slots.length >= this.limit) return undefined;
      request = new Request<Owner>(this.slots.length);
      this.slots.push(request);
    }
    request.incarnation = (request.incarnation + 1) & 0x7fffffff;
    this.inUse++;
    return request;
  }

  release(request: Request<Owner>): void {
    assert(request.stage !== RequestStage.Free, 'a request is released once');
    request.stage = RequestStage.Free;
    request.flags = 0;
    request.front = undefined;
    request.owner = undefined;
    request.payload = NO_PAYLOAD_OFFSET;
    request.errno = 0;
    this.inUse--;
    this.free.push(request);
  }

  /** Calls `visit` for every request in use. For rare events: looks at every slot. */
  forEachInUse(visit: (request: Request<Owner>) => void): void {
    for (const request of this.slots) if (request.stage !== RequestStage.Free) visit(request);
  }

  /** @returns the request of a slot that is in use, or undefined */
  at(slot: number): Request<Owner> | undefined {
    const request = this.slots[slot];
    return request && request.stage !== RequestStage.Free ? request : undefined;
  }
}
