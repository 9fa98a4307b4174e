import { ConfigError, type Diagnostic } from './diagnostic.js';
import { loadConfig } from './drbd-conf.js';
import { plainCharacter } from './lexer.js';
import type { ConfigSource } from './source.js';

/** One file whose text `lint` would change. */
export interface RepairedFile {
  readonly path: string;
  readonly before: string;
  readonly after: string;
}

export interface LintResult {
  /** What is wrong with the files as they are; empty if nothing. */
  readonly found: readonly Diagnostic[];
  /** The texts after every repair that could be made, in the order first touched. */
  readonly repaired: readonly RepairedFile[];
  /** What is still wrong after the repairs. */
  readonly remaining: readonly Diagnostic[];
}

/** One repair per syntax error, so this is also how many glued words one run untangles. */
const MAX_REPAIRS = 1000;

/**
 * Checks a configuration and works out what `lint --fix` would write: typographic damage translated, words that grew
 * together split, stray semicolons removed; nothing that would be a guess.
 *
 * @throws ConfigError with exit code 20 if the main file cannot be opened
 */
export function lintConfig(source: ConfigSource, mainPath: string): LintResult {
  const found = check(source, mainPath);
  const changed = new Map<string, { before: string; after: string }>();
  const overlay: ConfigSource = {
    read: (path) => {
      const known = changed.get(path);
      if (known) return known.after;
      const text = source.read(path);
      if (text === undefined) return undefined;
      const after = repairTypography(text);
      if (after !== text) changed.set(path, { before: text, after });
      return after;
    },
    glob: (pattern) => source.glob(pattern),
    realPath: (path) => source.realPath(path),
  };
  let remaining = check(overlay, mainPath);
  for (let repairs = 0; repairs < MAX_REPAIRS; repairs++) {
    const fix = remaining.find((diagnostic) => diagnostic.fix)?.fix;
    if (!fix) break;
    const before = changed.get(fix.path)?.before ?? source.read(fix.path)!;
    const current = changed.get(fix.path)?.after ?? before;
    const after = current.slice(0, fix.startOffset) + fix.replacement + current.slice(fix.endOffset);
    changed.set(fix.path, { before, after });
    remaining = check(overlay, mainPath);
  }
  const repaired = [...changed]
    .map(([path, texts]) => ({ path, ...texts }))
    .filter((file) => file.before !== file.after);
  return { found, repaired, remaining };
}

function check(source: ConfigSource, mainPath: string): readonly Diagnostic[] {
  try {
    return loadConfig(source, mainPath).warnings;
  } catch (error) {
    if (error instanceof ConfigError && error.diagnostics.length > 0) return error.diagnostics;
    throw error;
  }
}

/**
 * Replaces what word processors and web pages put for plain characters: full-width punctuation, curly quotes, dashes,
 * unusual blanks, a byte order mark, DOS line ends. Comments and texts in straight quotes stay as they are.
 */
export function repairTypography(text: string): string {
  let result = '';
  let state: 'plain' | 'comment' | 'quoted' = 'plain';
  const withoutMark = text.charCodeAt(0) === 0xfeff ? text.slice(1) : text;
  for (let index = 0; index < withoutMark.length; index++) {
    const character = withoutMark[index]!;
    if (character === '\r' && withoutMark[index + 1] === '\n') continue;
    if (state === 'plain') {
      const plain = character > '\u007f' ? (plainCharacter(character) ?? character) : character;
      if (plain === '#') state = 'comment';
      else if (character === '"') state = 'quoted';
      result += plain;
      continue;
    }
    if (character === '\n') state = 'plain';
    else if (state === 'quoted' && character === '"') state = 'plain';
    else if (state === 'quoted' && character === '\\' && index + 1 < withoutMark.length) {
      // The protected character cannot close the string.
      result += character + withoutMark[++index]!;
      if (withoutMark[index] === '\n') state = 'plain';
      continue;
    }
    result += character;
  }
  return result;
}

/**
 * A line diff for people: removed lines with `-`, added ones with `+`, under `--- path` and `+++ path`. Repairs never
 * change the number of lines, so lines are compared one by one.
 */
export function describeRepair(file: RepairedFile): string {
  const before = file.before.replace(/^\ufeff/, '').split('\n');
  const after = file.after.split('\n');
  const lines = [`--- ${file.path}`, `+++ ${file.path}`];
  let lineEnds = 0;
  for (let index = 0; index < Math.max(before.length, after.length); index++) {
    const old = before[index] ?? '';
    const fresh = after[index] ?? '';
    if (old === fresh) continue;
    if (old === `${fresh}\r`) {
      lineEnds++;
      continue;
    }
    lines.push(`@@ line ${index + 1} @@`, `-${old}`, `+${fresh}`);
  }
  if (lineEnds > 0) lines.push(`@@ DOS line ends of ${lineEnds} lines @@`);
  if (file.before.startsWith('\ufeff')) lines.push('@@ byte order mark @@');
  return `${lines.join('\n')}\n`;
}
