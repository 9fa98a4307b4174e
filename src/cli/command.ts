import type { Command } from 'commander';

/** Where a command writes; injected so that tests see exactly what an operator sees. */
export interface Streams {
  readonly out: (text: string) => void;
  readonly err: (text: string) => void;
  /** Whether `out` is a terminal (progress bars, colour). */
  readonly isTerminal: boolean;
}

export interface Environment extends Streams {
  readonly env: Readonly<Record<string, string | undefined>>;
}

/**
 * One file per command exports one of these. `register` declares name, arguments, options and help with examples, and
 * sets an action that resolves to the exit code (see docs/operating/exit-codes.md). Operator mistakes are thrown as
 * OperatorError.
 */
export interface CliCommand {
  register(program: Command, environment: Environment, exit: (code: number) => void): void;
}
