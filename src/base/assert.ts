/**
 * Stops on a broken invariant. For our own bugs only: a wrong replica is worse than a dead one, so an uncaught
 * AssertionError ends the process. What a peer, client, disk or operator can cause is never an assert.
 */
export function assert(condition: unknown, message: string): asserts condition {
  if (!condition) throw new AssertionError(message);
}

/** A broken invariant of drbdts itself. Never caught, except by the process's last handler, which logs and exits. */
export class AssertionError extends Error {
  override readonly name = 'AssertionError';
}
