import { spawn } from 'node:child_process';
import { closeSync, openSync } from 'node:fs';

export interface CommandResult {
  /** Exit status; 127 when the program is missing, 124 when it was ended for taking too long, 128+n for a signal. */
  readonly status: number;
  readonly stdout: string;
  readonly stderr: string;
}

const OUTPUT_LIMIT_BYTES = 1024 * 1024;

/** Runs a program to its end, without a shell. Never throws for what the program does; its output is capped. */
export function runCommand(
  argv: readonly string[],
  options: { readonly timeoutMs: number; readonly input?: string },
): Promise<CommandResult> {
  return new Promise((resolve) => {
    const [program, ...args] = argv;
    const child = spawn(program!, args, { stdio: ['pipe', 'pipe', 'pipe'] });
    let stdout = '';
    let stderr = '';
    let timedOut = false;
    const timer = setTimeout(() => {
      timedOut = true;
      child.kill('SIGKILL');
      // A process in uninterruptible sleep does not die of it; the caller must still get its answer.
      setTimeout(() => finish(124), 1000).unref();
    }, options.timeoutMs);
    let finished = false;
    const finish = (status: number) => {
      if (finished) return;
      finished = true;
      clearTimeout(timer);
      resolve({ status, stdout, stderr });
    };
    child.stdout.on('data', (chunk: Buffer) => {
      if (stdout.length < OUTPUT_LIMIT_BYTES) stdout += chunk.toString();
    });
    child.stderr.on('data', (chunk: Buffer) => {
      if (stderr.length < OUTPUT_LIMIT_BYTES) stderr += chunk.toString();
    });
    child.on('error', (error: NodeJS.ErrnoException) => {
      stderr += `${program}: ${error.code === 'ENOENT' ? 'no such program' : error.message}`;
      finish(127);
    });
    child.on('close', (code, signal) => finish(timedOut ? 124 : (code ?? 128 + (signal === 'SIGKILL' ? 9 : 15))));
    // A program that does not read its input closes the pipe; that is its business, not an error of ours.
    child.stdin.on('error', () => undefined);
    child.stdin.end(options.input ?? '');
  });
}

/**
 * Starts a Node program of drbdts that outlives this process: own session, output to `logFile`, `input` on its standard
 * input. Resolves with its pid once it is running.
 */
export function spawnDetached(
  script: string,
  args: readonly string[],
  options: {
    readonly logFile: string;
    readonly input?: string;
    readonly env?: NodeJS.ProcessEnv;
    readonly nodeOptions?: readonly string[];
  },
): Promise<{ readonly pid: number; readonly exited: Promise<string> }> {
  return new Promise((resolve, reject) => {
    const log = openSync(options.logFile, 'a', 0o640);
    const child = spawn(process.execPath, [...(options.nodeOptions ?? []), script, ...args], {
      detached: true,
      stdio: ['pipe', log, log],
      ...(options.env ? { env: options.env } : {}),
    });
    closeSync(log);
    const exited = new Promise<string>((done) => {
      child.on('exit', (code, signal) => done(signal ? `killed by ${signal}` : `exit status ${code}`));
    });
    child.on('error', reject);
    child.on('spawn', () => {
      child.stdin!.on('error', () => undefined);
      child.stdin!.end(options.input ?? '');
      child.unref();
      resolve({ pid: child.pid!, exited });
    });
  });
}
