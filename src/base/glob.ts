/**
 * Whether `text` matches a shell pattern: `*` any run (also empty), `?` any one character, `[a-z]`, `[!a-z]` a set,
 * backslash takes the next character literally. Nothing is special about dots or slashes. An unclosed `[` is a literal.
 *
 * Takes at most pattern length times text length steps, so callers cap both where they are
 * hostile.
 */
export function matchesGlob(pattern: string, text: string): boolean {
  let patternIndex = 0;
  let textIndex = 0;
  let starIndex = -1;
  let starTextIndex = 0;
  while (textIndex < text.length) {
    const next = stepAfterMatch(pattern, patternIndex, text[textIndex]!);
    if (next >= 0) {
      patternIndex = next;
      textIndex++;
    } else if (pattern[patternIndex] === '*') {
      starIndex = patternIndex++;
      starTextIndex = textIndex;
    } else if (starIndex >= 0) {
      // Let the last star take one character more; earlier stars never need to grow again.
      patternIndex = starIndex + 1;
      textIndex = ++starTextIndex;
    } else return false;
  }
  while (pattern[patternIndex] === '*') patternIndex++;
  return patternIndex === pattern.length;
}

/** The pattern index behind the one-character element at `index` if it matches `character`, else -1 (also for `*`). */
function stepAfterMatch(pattern: string, index: number, character: string): number {
  const element = pattern[index];
  if (element === undefined || element === '*') return -1;
  if (element === '?') return index + 1;
  if (element === '\\' && index + 1 < pattern.length) return pattern[index + 1] === character ? index + 2 : -1;
  if (element === '[') {
    const isNegated = pattern[index + 1] === '!' || pattern[index + 1] === '^';
    const first = index + (isNegated ? 2 : 1);
    // A `]` in first place is a member of the set.
    const end = pattern.indexOf(']', first + 1);
    if (end >= 0) return isInSet(pattern, first, end, character) !== isNegated ? end + 1 : -1;
  }
  return element === character ? index + 1 : -1;
}

function isInSet(pattern: string, first: number, end: number, character: string): boolean {
  for (let index = first; index < end; index++) {
    if (pattern[index + 1] === '-' && index + 2 < end) {
      if (character >= pattern[index]! && character <= pattern[index + 2]!) return true;
      index += 2;
    } else if (pattern[index] === character) return true;
  }
  return false;
}
