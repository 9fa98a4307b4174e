import { readFileSync } from 'node:fs';
import { Command, CommanderError } from 'commander';
import { OperatorError } from '../base/errors.js';
import { applyAlCommand } from './apply-al.js';
import type { CliCommand, Environment } from './command.js';
import { createMdCommand } from './create-md.js';
import { dumpCommand } from './dump.js';
import { dumpMdCommand } from './dump-md.js';
import { exportfsCommand } from './exportfs.js';
import { lintCommand } from './lint.js';
import { nfsCommand } from './nfs.js';
import { resourceCommands } from './resource-commands.js';
import { getGiCommand, showGiCommand } from './show-gi.js';
import { procCommand, stateCommands, statusCommand } from './status.js';
import { wipeMdCommand } from './wipe-md.js';

const COMMANDS: readonly CliCommand[] = [
  ...resourceCommands,
  statusCommand,
  ...stateCommands,
  procCommand,
  exportfsCommand,
  nfsCommand,
  createMdCommand,
  dumpMdCommand,
  showGiCommand,
  getGiCommand,
  applyAlCommand,
  wipeMdCommand,
  dumpCommand,
  lintCommand,
];

const EXIT_CODES = `
Exit codes: 0 done, 1 wrong usage, 5 timed out or too late, 10 invalid configuration, 11 refused in this state,
16 no local disk, 17 no up-to-date data, 20 cannot run.

First steps on each head: write /etc/drbd.d/data.res, then
  drbdts create-md data
  drbdts up data
and on the head whose data counts
  drbdts primary --force data`;

/** The command line as declared; `exit` is told the code of the command that ran. */
export function createProgram(environment: Environment, exit: (code: number) => void): Command {
  const { version } = JSON.parse(readFileSync(new URL('../../package.json', import.meta.url), 'utf8')) as {
    version: string;
  };
  const program = new Command('drbdts');
  program
    .description('Two ordinary machines as one NFS server that survives the death of either.')
    .version(version)
    .option('-c, --config-file <file>', 'configuration to read instead of /etc/drbd.conf')
    .configureOutput({ writeOut: environment.out, writeErr: environment.err })
    .exitOverride()
    .showSuggestionAfterError()
    .addHelpText('after', EXIT_CODES);
  for (const command of COMMANDS) command.register(program, environment, exit);
  for (const command of program.commands)
    command.exitOverride().configureOutput({ writeOut: environment.out, writeErr: environment.err });
  return program;
}

/** Runs one command line; resolves to the exit code. Prints errors as sentences, never as stack traces. */
export async function run(argv: readonly string[], environment: Environment): Promise<number> {
  let exitCode = 0;
  const program = createProgram(environment, (code) => {
    exitCode = code;
  });
  try {
    await program.parseAsync([...argv], { from: 'user' });
    return exitCode;
  } catch (error) {
    if (error instanceof CommanderError) return error.exitCode === 0 ? 0 : 1;
    if (error instanceof OperatorError) {
      environment.err(`drbdts: ${error.message}\n`);
      return error.exitCode;
    }
    throw error;
  }
}
