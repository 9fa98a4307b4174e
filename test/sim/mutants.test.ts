import { describe, expect, it } from 'vitest';
import type { Mutations } from '../../src/replication/effects.js';
import { EXIT_NO_CONVERGENCE, EXIT_WRONG_DATA } from './failure.js';
import { type Setup, simulate } from './simulation.js';

interface Mutant {
  readonly name: keyof Mutations;
  /** The first seed, 1 if absent, and the most it may survive. */
  readonly from?: number;
  readonly seeds: number;
  /** Faults in which it shows; without, whatever the seeds bring. */
  readonly setup?: Setup;
}

/** Each deliberate mistake. */
const MUTANTS: readonly Mutant[] = [
  { name: 'ackBeforePeer', seeds: 10 },
  { name: 'skipActivityLog', seeds: 20 },
  { name: 'forgetUnackedEpochs', seeds: 40, setup: { faults: ['cut', 'reset', 'crashSecondary'] } },
  { name: 'keepGeneration', seeds: 40 },
  { name: 'barrierAckWithoutFlush', seeds: 40, setup: { faults: ['crashSecondary', 'crashBoth'] } },
  { name: 'ignoreOverlaps', seeds: 20 },
  { name: 'flushWithoutPeer', seeds: 20, setup: { faults: ['crashBoth'] } },
  { name: 'clearBeforeResyncWrite', seeds: 30, setup: { faults: ['detachPrimary'] } },
  { name: 'completeBeforeRotation', seeds: 10, setup: { faults: ['reset'], parting: 'lonelyCrash' } },
  { name: 'announceBeforeFlush', seeds: 30, setup: { faults: ['crashAfterResync'] } },
  // Rare: of some 75 extents the activity log holds 67, and what is lost must not be written again.
  { name: 'skipEvictedPages', from: 45, seeds: 10, setup: { isLarge: true, faults: ['cut', 'cut', 'crashPrimary'] } },
];

describe('simulator, shown a mistake', () => {
  for (const { name, from = 1, seeds, setup } of MUTANTS)
    it(`notices ${name} within ${seeds} seeds`, async () => {
      let caught: number | undefined;
      for (let seed = from; seed < from + seeds && caught === undefined; seed++) {
        await new Promise((resolve) => setImmediate(resolve));
        const { exitCode } = simulate(seed, { [name]: true }, setup);
        if (exitCode !== 0) caught = exitCode;
      }
      // An assertion (127) would mean that the mistake broke the machine instead of the promise.
      expect([EXIT_NO_CONVERGENCE, EXIT_WRONG_DATA]).toContain(caught);
    }, 120_000);
});
