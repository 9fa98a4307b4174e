import { describe } from 'vitest';
import { itSurvives } from './seeds.js';

describe('simulator, the second hundred', () => {
  itSurvives(101, 100);
});
