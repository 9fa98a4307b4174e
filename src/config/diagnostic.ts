import { OperatorError } from '../base/errors.js';

/** Where something stands in a file an operator wrote. */
export interface Position {
  /** The file as the operator would name it: the main path as given, others as their include statement spells them. */
  readonly file: string;
  /** The full path, for tools that must open the file again. */
  readonly path: string;
  /** Counted from 1. */
  readonly line: number;
  /** Counted from 1, in UTF-16 units. */
  readonly column: number;
}

/** A mechanical repair of the text, for `drbdts lint --fix`: replace [startOffset, endOffset) of `path`. */
export interface TextFix {
  readonly path: string;
  /** UTF-16 units from the start of the file's text. */
  readonly startOffset: number;
  readonly endOffset: number;
  readonly replacement: string;
}

/** One sentence about one place: what is wrong, what was expected, and where known, what to do about it. */
export interface Diagnostic extends Position {
  readonly severity: 'error' | 'warning';
  /** May span lines; continuation lines start with a tab, as in drbdadm's own messages. */
  readonly message: string;
  readonly hint?: string;
  readonly fix?: TextFix;
}

/** Renders a diagnostic as `file:line: message`, followed by its hint on a line of its own. No trailing newline. */
export function formatDiagnostic(diagnostic: Diagnostic): string {
  const warning = diagnostic.severity === 'warning' ? 'WARN: ' : '';
  const hint = diagnostic.hint === undefined ? '' : `\nhint: ${diagnostic.hint}`;
  return `${diagnostic.file}:${diagnostic.line}: ${warning}${diagnostic.message}${hint}`;
}

/**
 * A configuration that cannot be used. `diagnostics` holds every error (and the warnings met on the way) in the order
 * in which they were found; a syntax error is always the last one. `exitCode` is 10 (invalid) or 20
 * (main file missing).
 */
export class ConfigError extends OperatorError {
  constructor(
    readonly diagnostics: readonly Diagnostic[],
    exitCode: 10 | 20 = 10,
    message = diagnostics.map(formatDiagnostic).join('\n'),
  ) {
    super(message, exitCode, exitCode === 20 ? 'config-missing' : 'config-invalid');
  }
}

/** How many diagnostics one run keeps; a hostile or hopeless file must not fill memory or the terminal. */
export const MAX_DIAGNOSTICS = 200;

/** Collects diagnostics up to MAX_DIAGNOSTICS. */
export class DiagnosticList {
  readonly items: Diagnostic[] = [];
  #errorCount = 0;

  get hasErrors(): boolean {
    return this.#errorCount > 0;
  }

  get warnings(): readonly Diagnostic[] {
    return this.items.filter((item) => item.severity === 'warning');
  }

  error(at: Position, message: string, hint?: string, fix?: TextFix): void {
    this.#errorCount++;
    this.#push('error', at, message, hint, fix);
  }

  warn(at: Position, message: string, hint?: string, fix?: TextFix): void {
    this.#push('warning', at, message, hint, fix);
  }

  #push(severity: 'error' | 'warning', at: Position, message: string, hint?: string, fix?: TextFix): void {
    if (this.items.length >= MAX_DIAGNOSTICS) {
      // An error must never be crowded out by warnings: it is the answer to "why does it not load".
      const dropped = severity === 'error' ? this.items.findLastIndex((item) => item.severity === 'warning') : -1;
      if (dropped < 0) return;
      this.items.splice(dropped, 1);
    }
    this.items.push(
      Object.freeze({
        severity,
        file: at.file,
        path: at.path,
        line: at.line,
        column: at.column,
        message,
        ...(hint === undefined ? {} : { hint }),
        ...(fix === undefined ? {} : { fix }),
      }),
    );
  }
}

/** The candidate closest to `word` by edit distance, or undefined if none is close (more than a third differs). */
export function closestWord(word: string, candidates: Iterable<string>): string | undefined {
  let best: string | undefined;
  let bestDistance = Math.max(1, Math.floor(word.length / 3)) + 1;
  for (const candidate of candidates) {
    if (Math.abs(candidate.length - word.length) >= bestDistance || candidate.length > 128) continue;
    const distance = editDistance(word, candidate);
    if (distance < bestDistance) {
      best = candidate;
      bestDistance = distance;
    }
  }
  return best;
}

/** Insertions, deletions, substitutions and swaps of neighbours (the commonest slip), each counting one. */
function editDistance(left: string, right: string): number {
  let beforePrevious: number[] = [];
  let previous = Array.from({ length: right.length + 1 }, (_, index) => index);
  for (let row = 1; row <= left.length; row++) {
    const current = [row];
    for (let column = 1; column <= right.length; column++) {
      const isSame = left[row - 1] === right[column - 1];
      const isSwap = left[row - 1] === right[column - 2] && left[row - 2] === right[column - 1];
      const substitution = previous[column - 1]! + (isSame ? 0 : 1);
      const swap = row > 1 && column > 1 && isSwap ? beforePrevious[column - 2]! + 1 : Number.POSITIVE_INFINITY;
      current.push(Math.min(substitution, previous[column]! + 1, current[column - 1]! + 1, swap));
    }
    beforePrevious = previous;
    previous = current;
  }
  return previous[right.length]!;
}
