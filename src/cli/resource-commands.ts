import type { Command } from 'commander';
import type { CliCommand, Environment } from './command.js';
import { callDaemon } from './daemon-client.js';
import { checkResourceName, daemonsPath } from './resource-name.js';

/** A command that the daemon carries out on whole resources; the words and options are drbdadm's. */
interface ResourceCommand {
  readonly name: string;
  readonly summary: string;
  readonly options?: readonly (readonly [flags: string, description: string])[];
  readonly examples: readonly string[];
  /** Starts the daemon when it does not run. The others say how to start it. */
  readonly starts?: boolean;
  /**
   * A stop command on a head where nothing runs has nothing to do, and succeeds silently (stop scripts are idempotent).
   */
  readonly nothingToStop?: boolean;
  readonly timeoutMs?: number;
}

const COMMANDS: readonly ResourceCommand[] = [
  {
    name: 'up',
    summary: 'start a resource: attach its disks and connect to the peer; starts the daemon when needed',
    options: [['--nbd-listen <host:port>', 'serve the resource over NBD on TCP too, for other hosts and tools']],
    examples: ['drbdts up data', 'drbdts up all', 'drbdts up --nbd-listen 127.0.0.1:10809 data'],
    starts: true,
  },
  {
    name: 'down',
    summary: 'stop a resource: demote, disconnect, detach; refused while its device is in use',
    examples: ['drbdts down data'],
    nothingToStop: true,
  },
  {
    name: 'primary',
    summary: 'become Primary and give the kernel the block device',
    options: [['--force', "declare this head's data good although it is not UpToDate; the peer's data is overwritten"]],
    examples: ['drbdts primary data', 'drbdts primary --force data    # once, on the head whose data counts'],
    timeoutMs: 120_000,
  },
  {
    name: 'secondary',
    summary: 'become Secondary; refused while the device is mounted or open',
    examples: ['drbdts secondary data'],
    nothingToStop: true,
    timeoutMs: 120_000,
  },
  {
    name: 'connect',
    summary: 'connect to the peer (after disconnect, or when StandAlone)',
    options: [['--discard-my-data', 'after a split brain: give up what this head wrote while apart']],
    examples: ['drbdts connect data', 'drbdts connect --discard-my-data data'],
  },
  {
    name: 'disconnect',
    summary: 'stop replicating; the head goes on alone',
    options: [['--force', 'do not wait for the peer']],
    examples: ['drbdts disconnect data'],
    nothingToStop: true,
  },
  {
    name: 'attach',
    summary: 'take the backing disk into use again',
    examples: ['drbdts attach data'],
  },
  {
    name: 'detach',
    summary: 'let go of the backing disk; the peer serves the data',
    options: [['--force', 'drop the disk at once, whatever is in flight']],
    examples: ['drbdts detach data'],
    nothingToStop: true,
  },
  {
    name: 'invalidate',
    summary: "throw away this head's copy and fetch everything from the peer",
    examples: ['drbdts invalidate data'],
  },
];

function registerResourceCommand(
  row: ResourceCommand,
  program: Command,
  environment: Environment,
  exit: (code: number) => void,
): void {
  const command = program
    .command(row.name)
    .argument('<resource...>', 'resource names, or "all"')
    .summary(row.summary)
    .description(`${row.summary[0]!.toUpperCase()}${row.summary.slice(1)}.`)
    .option('-c, --config-file <file>', 'configuration to read instead of /etc/drbd.conf')
    .option('--json', 'print the answer as JSON');
  for (const [flags, description] of row.options ?? []) command.option(flags, description);
  command.addHelpText('after', `\nExamples:\n${row.examples.map((line) => `  ${line}`).join('\n')}`);
  command.action(async (resources: string[]) => {
    const { configFile: given, json, ...rest } = command.optsWithGlobals<Record<string, unknown>>();
    const configFile = given === undefined ? undefined : daemonsPath(given as string);
    const answers: unknown[] = [];
    for (const resource of resources) {
      try {
        answers.push(
          ...(await callDaemon<object[]>(
            environment,
            row.name,
            { resource, ...(configFile ? { configFile } : {}), ...rest },
            { start: row.starts ?? false, timeoutMs: row.timeoutMs ?? 60_000 },
          )),
        );
      } catch (error) {
        const { reason } = error as { reason?: string };
        if (!row.nothingToStop || (reason !== 'daemon-not-running' && reason !== 'not-up')) throw error;
        checkResourceName(resource, environment, configFile);
        answers.push({ resource, done: false, why: `${resource} is not up on this head` });
      }
    }
    if (json) environment.out(`${JSON.stringify(answers)}\n`);
    exit(0);
  });
}

export const resourceCommands: readonly CliCommand[] = COMMANDS.map((row) => ({
  register: (program, environment, exit) => registerResourceCommand(row, program, environment, exit),
}));
