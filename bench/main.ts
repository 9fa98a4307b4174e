/**
 * `make bench`: figures side by side with other servers, measured in one run on one machine.
 *
 *     node build/bench.mjs [WORKLOAD...] [--seconds N] [--dir FOLDER] [--json]
 *
 * Workloads: nbd, replicated, resync, nfs, memory; all of them without arguments. As root everything runs in namespaces
 * of its own (network, mounts, process ids): nothing reaches the machine's network, nothing is left behind, even if this
 * is killed. Without root the NFS workload is left out. Data is checked before anything is timed.
 */
import { spawn } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { cpus, loadavg, release, tmpdir, totalmem } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { formatTable, Lab, ratioOf, run, type Table } from './lab.js';
import { memory } from './memory.js';
import { nbd, replicated } from './nbd.js';
import { nfs } from './nfs.js';
import { copyMode, resync } from './resync.js';

const WORKLOADS: Readonly<Record<string, (lab: Lab) => Promise<Table[]>>> = { nbd, replicated, resync, nfs, memory };
const INSIDE = 'DRBDTS_BENCH_FOLDER';

function usage(problem: string): never {
  process.stderr.write(
    `bench: ${problem}\nusage: bench.mjs [${Object.keys(WORKLOADS).join('|')}]... [--seconds N] [--dir FOLDER] [--json]\n`,
  );
  process.exit(2);
}

function options() {
  try {
    const { values, positionals } = parseArgs({
      allowPositionals: true,
      options: {
        seconds: { type: 'string', default: '3' },
        dir: { type: 'string', default: tmpdir() },
        json: { type: 'boolean', default: false },
      },
    });
    const unknown = positionals.find((name) => !(name in WORKLOADS));
    if (unknown !== undefined) usage(`no workload ${unknown}`);
    const seconds = Number(values.seconds);
    if (!(seconds >= 1 && seconds <= 3600)) usage('--seconds is 1 to 3600');
    const names = positionals.length > 0 ? positionals : Object.keys(WORKLOADS);
    return { seconds, names, json: values.json, dir: values.dir };
  } catch (error) {
    usage((error as Error).message);
  }
}

/** Runs this program again in namespaces of its own, in a folder that is removed when it ended, however it ended. */
function runInside(dir: string): void {
  const folder = mkdtempSync(join(dir, 'drbdts-bench-'));
  const root = process.getuid?.() === 0;
  const isolate = ['unshare', '--net', '--mount', '--pid', '--fork', '--kill-child', '--mount-proc'];
  const command = [
    ...['setpriv', '--pdeathsig', 'KILL'],
    ...(root ? isolate : []),
    ...[process.execPath, ...process.execArgv, fileURLToPath(import.meta.url), ...process.argv.slice(2)],
  ];
  const child = spawn(command[0]!, command.slice(1), { stdio: 'inherit', env: { ...process.env, [INSIDE]: folder } });
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) process.on(signal, () => child.kill('SIGKILL'));
  child.on('exit', (code) => {
    rmSync(folder, { recursive: true, force: true, maxRetries: 20, retryDelay: 100 });
    process.exitCode = code ?? 130;
  });
}

/** The namespace's own loopback interface, and folders where servers leave their traces. */
function furnish(): void {
  run('ip', 'link', 'set', 'lo', 'up');
  for (const folder of ['/run', '/var/lib/nfs']) {
    run('mkdir', '-p', folder);
    run('mount', '-t', 'tmpfs', 'bench', folder);
  }
}

function machine(): string {
  const model = cpus()[0]?.model ?? 'unknown processor';
  const memoryGib = Math.round(totalmem() / 2 ** 30);
  const load = loadavg()[0]!.toFixed(1);
  return `${cpus().length} x ${model}, ${memoryGib} GiB, Linux ${release()}, Node ${process.version}, load at start ${load}`;
}

async function measure(folder: string): Promise<void> {
  const { seconds, names, json } = options();
  const say = (text: string) => process.stderr.write(`${text}\n`);
  if (process.getuid?.() === 0) furnish();
  const lab = new Lab(folder, seconds, say);
  const about = machine();
  const tables: Table[] = [];
  say(about);
  try {
    for (const name of names) {
      say(`== ${name}`);
      const made = await WORKLOADS[name]!(lab);
      tables.push(...made);
      if (!json) for (const table of made) process.stdout.write(`${formatTable(table)}\n`);
    }
  } finally {
    await lab.close();
  }
  if (!json) return;
  const withRatios = tables.map((table) => ({
    ...table,
    rows: table.rows.map((row) => ({ ...row, ratio: ratioOf(row) })),
  }));
  const version = (JSON.parse(readFileSync(new URL('../package.json', import.meta.url), 'utf8')) as { version: string })
    .version;
  process.stdout.write(`${JSON.stringify({ version, machine: about, seconds, tables: withRatios }, undefined, 2)}\n`);
}

const folder = process.env[INSIDE];
if (process.argv[2] === '--copy') copyMode(process.argv.slice(3));
else if (folder === undefined) {
  options();
  runInside(options().dir);
} else
  measure(folder).then(
    () => process.exit(0),
    (error: unknown) => {
      process.stderr.write(`bench: ${(error as Error).stack ?? String(error)}\n`);
      process.exit(1);
    },
  );
