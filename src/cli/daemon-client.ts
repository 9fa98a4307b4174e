import { existsSync, mkdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { OperatorError } from '../base/errors.js';
import { spawnDetached } from '../io/command.js';
import { callJsonLines, JsonLinesClient } from '../io/json-lines.js';
import { daemonSocket, daemonState, nfsSocket, type Paths, pathsFrom } from '../io/paths.js';
import type { Environment } from './command.js';

const START_TIMEOUT_MS = 15_000;

export class DaemonNotRunning extends OperatorError {
  constructor(paths: Paths) {
    super(
      `drbdts does not run on this head (nothing answers on ${daemonSocket(paths)}). ` +
        'Start a resource with: drbdts up RESOURCE',
      20,
      'daemon-not-running',
    );
  }
}

export interface CallOptions {
  /** Start the daemon when it does not run. */
  readonly start?: boolean;
  readonly timeoutMs?: number;
}

/**
 * Asks the node daemon. Prints a note on standard error when the answer takes more than two seconds.
 * @throws OperatorError as the daemon sent it, or DaemonNotRunning (exit code 20)
 */
export async function callDaemon<T>(
  environment: Environment,
  method: string,
  params: Readonly<Record<string, unknown>>,
  options: CallOptions = {},
): Promise<T> {
  const paths = pathsFrom(environment.env);
  if (options.start || (await hasLeftovers(paths))) await ensureDaemon(environment, paths);
  const client = await connect(paths);
  const started = Date.now();
  const patience = setInterval(() => {
    environment.err(`still working on "${method}" (${Math.round((Date.now() - started) / 1000)} s) ...\n`);
  }, 2000);
  try {
    return (await client.call(method, params, options.timeoutMs ?? 60_000)) as T;
  } finally {
    clearInterval(patience);
    client.close();
  }
}

/**
 * Nobody listening is told apart from a daemon that ends in the middle of a call: only the former means that there was
 * nothing to stop.
 */
async function connect(paths: Paths): Promise<JsonLinesClient> {
  try {
    return await JsonLinesClient.connect(daemonSocket(paths));
  } catch (error) {
    if (isNotListening(error)) throw new DaemonNotRunning(paths);
    throw error;
  }
}

function isNotListening(error: unknown): boolean {
  return error instanceof OperatorError && error.reason === 'unreachable';
}

/**
 * Whether a daemon that died left something running or attached. Then every command starts a daemon that adopts it: to
 * a stop script, "not running" would mean that this head no longer has the data in use.
 */
async function hasLeftovers(paths: Paths): Promise<boolean> {
  // A daemon that ended with nothing left to adopt has removed the file.
  if (existsSync(daemonState(paths))) return true;
  return existsSync(nfsSocket(paths)) && (await isServed(nfsSocket(paths)));
}

async function isServed(socketPath: string): Promise<boolean> {
  try {
    (await JsonLinesClient.connect(socketPath)).close();
    return true;
  } catch (error) {
    if (isNotListening(error)) return false;
    throw error;
  }
}

/** Starts the daemon unless it answers already, and waits until it does. */
export async function ensureDaemon(environment: Environment, paths: Paths): Promise<void> {
  if (await answers(paths)) return;
  mkdirSync(paths.runDirectory, { recursive: true, mode: 0o755 });
  mkdirSync(paths.logDirectory, { recursive: true, mode: 0o755 });
  const logFile = join(paths.logDirectory, 'daemon.log');
  const daemon = await spawnDetached(fileURLToPath(new URL('../node/daemon-main.js', import.meta.url)), [], {
    logFile,
    env: { ...process.env, ...environment.env } as NodeJS.ProcessEnv,
  });
  let ended: string | undefined;
  void daemon.exited.then((how) => {
    ended = how;
  });
  for (const deadline = Date.now() + START_TIMEOUT_MS; Date.now() < deadline; ) {
    if (await answers(paths)) return;
    if (ended) break;
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  throw new OperatorError(
    `the drbdts daemon did not start (${ended ?? `no answer within ${START_TIMEOUT_MS / 1000} s`}); ` +
      `its log ends:\n${tail(logFile)}`,
    20,
    'daemon-start-failed',
  );
}

async function answers(paths: Paths): Promise<boolean> {
  try {
    await callJsonLines(daemonSocket(paths), 'version', {}, 2000);
    return true;
  } catch (error) {
    if (isNotListening(error)) return false;
    throw error;
  }
}

function tail(file: string): string {
  try {
    return readFileSync(file, 'utf8').split('\n').slice(-12).join('\n');
  } catch (error) {
    return `(${file}: ${(error as Error).message})`;
  }
}
