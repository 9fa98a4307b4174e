import { describe, expect, it } from 'vitest';
import type { Mutations } from '../../src/replication/effects.js';
import { EXIT_NO_CONVERGENCE, EXIT_WRONG_DATA } from './failure.js';
import { simulate } from './simulation.js';

/** Each deliberate mistake, and the most seeds it may survive. */
const MUTANTS: readonly { readonly name: keyof Mutations; readonly seeds: number }[] = [
  { name: 'ackBeforePeer', seeds: 10 },
  { name: 'skipActivityLog', seeds: 20 },
  { name: 'forgetUnackedEpochs', seeds: 60 },
  { name: 'keepGeneration', seeds: 40 },
  { name: 'barrierAckWithoutFlush', seeds: 60 },
  { name: 'ignoreOverlaps', seeds: 20 },
];

describe('simulator, shown a mistake', () => {
  for (const { name, seeds } of MUTANTS)
    it(`notices ${name} within ${seeds} seeds`, () => {
      let caught: number | undefined;
      for (let seed = 1; seed <= seeds && caught === undefined; seed++) {
        const { exitCode } = simulate(seed, { [name]: true });
        if (exitCode !== 0) caught = exitCode;
      }
      // An assertion (127) would mean that the mistake broke the machine instead of the promise.
      expect([EXIT_NO_CONVERGENCE, EXIT_WRONG_DATA]).toContain(caught);
    }, 120_000);
});
