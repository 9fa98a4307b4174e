import { describe, expect, it } from 'vitest';
import { simulate } from './simulation.js';

const SEEDS = 200;
const PER_TEST = 20;

describe('simulator', () => {
  for (let first = 1; first <= SEEDS; first += PER_TEST)
    it(`seeds ${first} to ${first + PER_TEST - 1} converge, lose nothing and end identical`, () => {
      for (let seed = first; seed < first + PER_TEST; seed++) {
        const verdict = simulate(seed);
        const story =
          verdict.exitCode === 0 ? '' : `SEED=${seed}\n${verdict.message}\n${verdict.log.slice(-60).join('\n')}`;
        expect(story).toBe('');
        expect(verdict.requests).toBeGreaterThan(0);
      }
    }, 120_000);

  it('repeats a seed bit for bit', () => {
    const one = simulate(7);
    const other = simulate(7);
    expect(other.log).toEqual(one.log);
    expect(other.requests).toBe(one.requests);
    expect(simulate(8).log).not.toEqual(one.log);
  }, 30_000);
});
