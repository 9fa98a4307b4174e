import { execFileSync } from 'node:child_process';
import { describe, expect, it } from 'vitest';
import { matchesGlob } from '../../src/base/glob.js';

/** Every word of up to `length` letters of an alphabet. */
function words(alphabet: string, length: number): string[] {
  const shorter = length === 0 ? [''] : words(alphabet, length - 1);
  return length === 0
    ? shorter
    : [...new Set([...shorter, ...shorter.flatMap((word) => [...alphabet].map((letter) => word + letter))])];
}

describe('matchesGlob', () => {
  it('agrees with bash on every short pattern and text', () => {
    const patterns = [...words('ab*?', 4), '[ab]', '[!a]b', '[a-c]*', 'a[]b]', '\\*', '\\a*', '[b-a]', 'a[!b-c]?'];
    const texts = words('ab.', 3);
    // One process; extglob off so that nothing but the classic patterns is special.
    const script =
      'shopt -u extglob; while IFS= read -r p; IFS= read -r t; do [[ $t == $p ]] && echo 1 || echo 0; done';
    const pairs = patterns.flatMap((pattern) => texts.map((text) => [pattern, text] as const));
    const input = pairs.map(([pattern, text]) => `${pattern}\n${text}\n`).join('');
    const env = { PATH: '/usr/bin:/bin', LC_ALL: 'C' };
    const verdicts = execFileSync('bash', ['-c', script], { input, encoding: 'utf8', env }).trim().split('\n');
    expect(verdicts).toHaveLength(pairs.length);
    const wrong = pairs.filter(([pattern, text], index) => matchesGlob(pattern, text) !== (verdicts[index] === '1'));
    expect(wrong).toEqual([]);
  });

  it('an unclosed bracket is a bracket', () => {
    expect(matchesGlob('[a', '[a')).toBe(true);
    expect(matchesGlob('[a', 'a')).toBe(false);
  });
});
