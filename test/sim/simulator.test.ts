import { describe, expect, it } from 'vitest';
import { itSurvives } from './seeds.js';
import { simulate } from './simulation.js';

describe('simulator', () => {
  // The second hundred is in simulator-more.test.ts: files run side by side.
  itSurvives(1, 100);

  it('repeats a seed bit for bit', () => {
    const one = simulate(7);
    const other = simulate(7);
    expect(other.log).toEqual(one.log);
    expect(other.requests).toBe(one.requests);
    expect(simulate(8).log).not.toEqual(one.log);
  }, 30_000);
});
