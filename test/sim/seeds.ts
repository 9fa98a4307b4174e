import { expect, it } from 'vitest';
import { simulate } from './simulation.js';

const PER_TEST = 20;

/** Tests that run the seeds `first` .. `first + count - 1`, a multiple of 20, and tell the story of one that fails. */
export function itSurvives(first: number, count: number): void {
  for (let from = first; from < first + count; from += PER_TEST)
    it(`seeds ${from} to ${from + PER_TEST - 1} converge, lose nothing and end identical`, async () => {
      for (let seed = from; seed < from + PER_TEST; seed++) {
        // A runner that hears nothing for a minute takes the worker for dead.
        await new Promise((resolve) => setImmediate(resolve));
        const verdict = simulate(seed);
        const story =
          verdict.exitCode === 0 ? '' : `SEED=${seed}\n${verdict.message}\n${verdict.log.slice(-60).join('\n')}`;
        expect(story).toBe('');
        expect(verdict.requests).toBeGreaterThan(0);
      }
    }, 120_000);
}
