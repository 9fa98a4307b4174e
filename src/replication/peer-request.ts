import { assert } from '../base/assert.js';
import { NO_PAYLOAD_OFFSET } from './effects.js';

/** Work on the own disk that the peer asked for. */
export const PeerRequestKind = {
  /** P_DATA */
  Write: 0,
  /** P_TRIM, P_ZEROES */
  Zero: 1,
  /** P_DATA_REQUEST */
  Read: 2,
  /** P_RS_DATA_REQUEST at the source */
  ResyncRead: 3,
  /** P_RS_DATA_REPLY at the target */
  ResyncWrite: 4,
  /** P_CSUM_RS_REQUEST at the source */
  ChecksumRead: 5,
  /** P_OV_REQUEST, until its P_OV_RESULT */
  VerifyRead: 6,
} as const;

/** One request of the peer from its packet to its answer. Slots are reused. */
export class PeerRequest {
  kind = 0;
  sector = 0;
  sectors = 0;
  payload = NO_PAYLOAD_OFFSET;
  blockIdHigh = 0;
  blockIdLow = 0;
  dpFlags = 0;
  /** ChecksumRead: the digest of what the target has. */
  digest: Uint8Array | undefined = undefined;
  /** VerifyRead: the digest is on its way; the peer's result is waited for. */
  isRead = false;
  /** Epoch of a write, as ReceivingEpochs counts. */
  epoch = 0;
  /** Name in the interval set; 0 when not in it. */
  age = 0;
  /** Connection it came over: an answer must not travel on a later one. */
  link = 0;
  /** Holds activity log references (writes through a disk whose peer has none). */
  activityLogHeld = false;
  /** Transaction of the activity log it waits for. */
  ordinal = 0;
  isUsed = false;
  queued: PeerRequest | undefined = undefined;

  constructor(readonly slot: number) {}

  get lengthBytes(): number {
    return this.sectors * 512;
  }
}

/** The slots; the number in use is bounded by pausing the peer's connection. */
export class PeerRequestTable {
  private readonly slots: PeerRequest[] = [];
  private readonly free: PeerRequest[] = [];
  inUse = 0;
  /** Bytes the requests in use read or write. */
  bytes = 0;

  allocate(sector: number, sectors: number): PeerRequest {
    let request = this.free.pop();
    if (!request) {
      request = new PeerRequest(this.slots.length);
      this.slots.push(request);
    }
    request.isUsed = true;
    request.sector = sector;
    request.sectors = sectors;
    this.bytes += request.lengthBytes;
    request.age = 0;
    request.epoch = 0;
    request.dpFlags = 0;
    request.digest = undefined;
    request.isRead = false;
    request.payload = NO_PAYLOAD_OFFSET;
    request.activityLogHeld = false;
    request.ordinal = 0;
    this.inUse++;
    return request;
  }

  release(request: PeerRequest): void {
    assert(request.isUsed, 'a peer request is released once');
    request.isUsed = false;
    this.bytes -= request.lengthBytes;
    this.inUse--;
    this.free.push(request);
  }

  at(slot: number): PeerRequest {
    const request = this.slots[slot];
    assert(request?.isUsed === true, `peer request ${slot} is in use`);
    return request;
  }
}

/** Singly linked queue through `PeerRequest.queued`. */
export class PeerRequestQueue {
  private first: PeerRequest | undefined = undefined;
  private last: PeerRequest | undefined = undefined;
  length = 0;

  get head(): PeerRequest | undefined {
    return this.first;
  }

  push(request: PeerRequest): void {
    request.queued = undefined;
    if (this.last) this.last.queued = request;
    else this.first = request;
    this.last = request;
    this.length++;
  }

  shift(): PeerRequest | undefined {
    const request = this.first;
    if (!request) return undefined;
    this.first = request.queued;
    if (!this.first) this.last = undefined;
    request.queued = undefined;
    this.length--;
    return request;
  }

  /** Takes out what `take` says true to, oldest first. */
  removeIf(take: (request: PeerRequest) => boolean): void {
    let remaining = this.length;
    while (remaining-- > 0) {
      // Taking one may have taken others.
      const request = this.shift();
      if (!request) return;
      if (!take(request)) this.push(request);
    }
  }
}
