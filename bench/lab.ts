/**
 * What the benchmarks stand on: a folder, processes that end with this one whatever happens, and figures as tables.
 */
import { spawn, spawnSync } from 'node:child_process';
import { closeSync, existsSync, openSync, readFileSync, writeSync } from 'node:fs';
import { connect } from 'node:net';
import { join } from 'node:path';
import { findProgram } from '../test/support/requires.js';

const END_PATIENCE_MS = 5000;
const READY_PATIENCE_MS = 20_000;
const POLL_MS = 5;
const MIB = 1 << 20;

export const sleep = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));

/** Repeats `look` until it holds. @throws Error naming `what` after `patienceMs` */
export async function until(what: string, look: () => boolean | Promise<boolean>, patienceMs = READY_PATIENCE_MS) {
  for (const deadline = performance.now() + patienceMs; performance.now() < deadline; await sleep(POLL_MS))
    if (await look()) return;
  throw new Error(`${what}: not within ${patienceMs / 1000} s`);
}

/** @returns standard output. @throws Error with both outputs when the program fails */
export function run(program: string, ...args: string[]): string {
  const { status, stdout, stderr, error } = spawnSync(program, args, { encoding: 'utf8', maxBuffer: 64 * MIB });
  if (error) throw error;
  if (status !== 0) throw new Error(`${program} ${args.join(' ')} failed (${status}): ${`${stdout}${stderr}`.trim()}`);
  return stdout;
}

/** A process of ours. */
export class Server {
  constructor(
    readonly name: string,
    readonly pid: number,
    readonly logFile: string,
    private readonly ended: () => boolean,
  ) {}

  get hasEnded(): boolean {
    return this.ended();
  }

  /** Last lines of what it said. */
  get tail(): string {
    return readFileSync(this.logFile, 'utf8').trimEnd().split('\n').slice(-8).join('\n');
  }

  async end(): Promise<void> {
    if (this.hasEnded) return;
    process.kill(this.pid, 'SIGTERM');
    try {
      await until(`end of ${this.name}`, () => this.hasEnded, END_PATIENCE_MS);
    } catch {
      process.kill(this.pid, 'SIGKILL');
      await until(`end of ${this.name}`, () => this.hasEnded);
    }
  }
}

/** Also true for a zombie that nobody waits for. */
function isGone(pid: number): boolean {
  const stat = `/proc/${pid}/stat`;
  return !existsSync(stat) || / Z /.test(readFileSync(stat, 'utf8'));
}

/** One run: a folder, and every process that was started in it. */
export class Lab {
  private readonly servers: Server[] = [];
  private files = 0;

  constructor(
    readonly folder: string,
    readonly seconds: number,
    readonly say: (text: string) => void,
  ) {}

  path(name: string): string {
    return join(this.folder, name);
  }

  fresh(name: string): string {
    return this.path(`${name}-${++this.files}`);
  }

  /** A sparse file. */
  sparse(name: string, sizeBytes: number): string {
    const path = this.fresh(name);
    run('truncate', '-s', String(sizeBytes), path);
    return path;
  }

  /** A file of zeroes that are in the page cache. */
  zeroes(name: string, sizeBytes: number): string {
    const path = this.fresh(name);
    run('dd', 'if=/dev/zero', `of=${path}`, 'bs=1M', `count=${sizeBytes / MIB}`);
    return path;
  }

  /** A file of bytes that do not compress, written through the page cache. */
  filled(name: string, sizeBytes: number): string {
    const path = this.fresh(name);
    const words = new Uint32Array(MIB / 4);
    const file = openSync(path, 'w');
    let seed = 0x9e3779b9;
    for (let at = 0; at < sizeBytes; at += MIB) {
      for (let index = 0; index < words.length; index++) {
        seed ^= seed << 13;
        seed ^= seed >>> 17;
        seed ^= seed << 5;
        words[index] = seed;
      }
      writeSync(file, words, 0, Math.min(MIB, sizeBytes - at), at);
    }
    closeSync(file);
    return path;
  }

  /** Starts a program that ends when we do. Its output goes to a file. */
  start(program: string, args: readonly string[], input?: string, env?: NodeJS.ProcessEnv): Server {
    const name = program.split('/').pop()!;
    const logFile = this.fresh(`${name}.log`);
    const log = openSync(logFile, 'w');
    const child = spawn('setpriv', ['--pdeathsig', 'KILL', program, ...args], {
      stdio: [input === undefined ? 'ignore' : 'pipe', log, log],
      cwd: this.folder,
      ...(env ? { env } : {}),
    });
    closeSync(log);
    child.stdin?.end(input);
    const ended = () => child.exitCode !== null || child.signalCode !== null;
    const server = new Server(name, child.pid!, logFile, ended);
    this.servers.push(server);
    return server;
  }

  /** Starts a program that goes to the background by itself and leaves its number in `pidFile`. */
  async startDaemon(program: string, args: readonly string[], pidFile: string): Promise<Server> {
    run(program, ...args);
    await until(
      `${program} wrote its number`,
      () => existsSync(pidFile) && readFileSync(pidFile, 'utf8').trim() !== '',
    );
    const pid = Number(readFileSync(pidFile, 'utf8'));
    const server = new Server(program, pid, pidFile, () => isGone(pid));
    this.servers.push(server);
    return server;
  }

  /** Waits until `look` holds for a server that must live. */
  async ready(server: Server, look: () => boolean | Promise<boolean>): Promise<void> {
    await until(`${server.name} is ready`, async () => {
      if (server.hasEnded) throw new Error(`${server.name} ended at once:\n${server.tail}`);
      return look();
    });
  }

  async end(...servers: readonly Server[]): Promise<void> {
    for (const server of [...servers].reverse()) await server.end();
  }

  async close(): Promise<void> {
    await this.end(...this.servers);
  }
}

/** Whether a program or file is there; what is not is said once, with its package. */
export function has(lab: Lab, need: string, packageName: string): boolean {
  if (need.startsWith('/') ? existsSync(need) : findProgram(need) !== undefined) return true;
  lab.say(`skipped: ${need} is missing: apt-get install ${packageName}`);
  return false;
}

export interface Row {
  readonly name: string;
  readonly unit: string;
  /** One figure per column; undefined: not measured. More is better, unless `lessIsBetter`. */
  readonly values: readonly (number | undefined)[];
  readonly lessIsBetter?: boolean;
  /** What the ratio of the first column to the best of the others must be; absent: no budget. */
  readonly atLeast?: number;
  /** The column the ratio is with; absent: the best of all others. */
  readonly against?: number;
}

export interface Table {
  readonly title: string;
  /** The first is ours. */
  readonly columns: readonly string[];
  readonly rows: readonly Row[];
  readonly notes?: readonly string[];
}

/** Ours divided by the best peer's (inverted where less is better): 1 and more is good. */
export function ratioOf(row: Row): number | undefined {
  const [ours, ...others] = row.values;
  const peers = (row.against === undefined ? others : [row.values[row.against]]).filter((value) => value !== undefined);
  if (ours === undefined || peers.length === 0) return undefined;
  return row.lessIsBetter ? Math.min(...peers) / ours : ours / Math.max(...peers);
}

function formatFigure(value: number | undefined): string {
  if (value === undefined) return '-';
  const digits = value < 10 ? 2 : value < 100 ? 1 : 0;
  return value.toLocaleString('en-US', { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

/** As Markdown, which also reads well on a terminal. */
export function formatTable(table: Table): string {
  const hasRatio = table.rows.some((row) => ratioOf(row) !== undefined);
  const head = ['', 'unit', ...table.columns, ...(hasRatio ? ['ratio', 'budget', ''] : [])];
  const body = table.rows.map((row) => {
    const ratio = ratioOf(row);
    const verdict = ratio === undefined || row.atLeast === undefined ? '' : ratio >= row.atLeast ? 'ok' : 'behind';
    return [
      row.name,
      row.unit,
      ...table.columns.map((_, column) => formatFigure(row.values[column])),
      ...(hasRatio ? [ratio?.toFixed(2) ?? '-', row.atLeast?.toFixed(1) ?? '-', verdict] : []),
    ];
  });
  const widths = head.map((_, column) => Math.max(...[head, ...body].map((line) => line[column]!.length)));
  const line = (cells: readonly string[]) =>
    `| ${cells.map((cell, column) => (column < 2 ? cell.padEnd(widths[column]!) : cell.padStart(widths[column]!))).join(' | ')} |`;
  const rule = `|${widths.map((width, column) => (column < 2 ? '-'.repeat(width + 2) : `${'-'.repeat(width + 1)}:`)).join('|')}|`;
  return [
    `### ${table.title}`,
    '',
    line(head),
    rule,
    ...body.map(line),
    ...(table.notes?.length ? ['', ...table.notes] : []),
    '',
  ].join('\n');
}

/** Whether a Unix socket takes connections: its file is there a moment earlier. */
export function answers(path: string): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = connect(path);
    socket.on('connect', () => {
      socket.destroy();
      resolve(true);
    });
    socket.on('error', () => resolve(false));
  });
}

/** Processor time in microseconds that a process took so far, with its threads and the children it has waited for. */
export function processorMicroseconds(pid: number): number {
  const fields = readFileSync(`/proc/${pid}/stat`, 'utf8')
    .replace(/^.*\) /s, '')
    .split(' ');
  // utime, stime, cutime, cstime in ticks of 10 ms (proc(5) counts from 1; three fields are cut off here).
  return fields.slice(11, 15).reduce((sum, ticks) => sum + Number(ticks) * 10_000, 0);
}

/** Resident memory of a process in MiB. */
export function residentMib(pid: number): number {
  const match = /^VmRSS:\s+(\d+) kB$/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8'));
  return Number(match![1]) / 1024;
}
