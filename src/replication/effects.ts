import type { Memory } from '../io/ring.js';

/** "No payload", as in `io/ring.ts` (this folder imports only types from there). */
export const NO_PAYLOAD_OFFSET = -1;

/** What the machine tells its owner, apart from answers to requests: for the log, the status and the helpers. */
export type ResourceEvent =
  | { readonly kind: 'state'; readonly volume: number; readonly from: string; readonly to: string }
  | { readonly kind: 'helper'; readonly name: string; readonly volume: number }
  | { readonly kind: 'log'; readonly level: 'info' | 'warn' | 'error'; readonly message: string }
  | { readonly kind: 'splitBrain'; readonly volume: number; readonly message: string }
  | { readonly kind: 'connection'; readonly state: string; readonly reason: string };

/**
 * What the machine asks of the world besides its files and connections. Everything is called on the engine's only
 * thread; nothing calls back before it returns.
 */
export interface Effects {
  readonly memory: Memory;
  /** 64 random bits, for generation identifiers. */
  random64(): bigint;
  /** Calls `Resource.turnEnd` once, after what is being handled now: barriers and refusals leave there in batches. */
  requestTurnEnd(): void;
  event(event: ResourceEvent): void;
}

/**
 * Deliberate mistakes, for the tests that prove that the simulator notices them. Empty in production.
 */
export interface Mutations {
  /** Complete a write without waiting for the peer's acknowledgement. */
  readonly ackBeforePeer?: boolean;
  /** Start a write into a cold extent without the activity log transaction. */
  readonly skipActivityLog?: boolean;
  /** Forget, instead of marking, what the peer had not made durable when the link broke. */
  readonly forgetUnackedEpochs?: boolean;
  /** Keep the generation identifiers when the peer is lost. */
  readonly keepGeneration?: boolean;
  /** Acknowledge a barrier before the disk is flushed. */
  readonly barrierAckWithoutFlush?: boolean;
  /** Let overlapping writes run side by side. */
  readonly ignoreOverlaps?: boolean;
  /** Answer a flush before the peer has made the epoch durable. */
  readonly flushWithoutPeer?: boolean;
  /** Clear the bits of a resynced block when it arrives instead of when it is written. */
  readonly clearBeforeResyncWrite?: boolean;
  /** Complete a lonely write before the new generation identifiers are durable. */
  readonly completeBeforeRotation?: boolean;
  /** Evict extents from the activity log without writing their bitmap pages first. */
  readonly skipEvictedPages?: boolean;
  /** Say that a resynced disk is UpToDate before its cache is flushed. */
  readonly announceBeforeFlush?: boolean;
}
