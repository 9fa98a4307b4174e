import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import type { Logger } from 'pino';
import { OperatorError } from '../base/errors.js';
import type { ExportTable } from '../config/exports.js';
import { spawnDetached } from '../io/command.js';
import { callJsonLines } from '../io/json-lines.js';
import { nfsSocket, type Paths } from '../io/paths.js';
import type { NfsOptions } from './nfs-options.js';

const START_TIMEOUT_MS = 15_000;
/** Withdrawing waits for the operations in flight, which may wait for the disk. */
const CALL_TIMEOUT_MS = 60_000;
const POLL_MS = 10;

interface NfsStatus {
  readonly exports: readonly { readonly path: string; readonly isServed: boolean }[];
}

export interface ExportReport {
  readonly path: string;
  readonly state: 'served' | 'not served';
  readonly clients: string;
}

/** Starts the head's one NFS server when there is something to serve, and passes on what to serve and withdraw. */
export class NfsServer {
  constructor(
    private readonly paths: Paths,
    private readonly log: Logger,
  ) {}

  private running = false;

  get isRunning(): boolean {
    return this.running;
  }

  /** Finds the server that an earlier daemon started. */
  async adopt(): Promise<void> {
    this.running = await this.answers();
  }

  private call<T>(method: string, params: object = {}): Promise<T> {
    return callJsonLines(nfsSocket(this.paths), method, params, CALL_TIMEOUT_MS) as Promise<T>;
  }

  private async answers(): Promise<boolean> {
    if (!existsSync(nfsSocket(this.paths))) return false;
    try {
      await callJsonLines(nfsSocket(this.paths), 'status', {}, 5000);
      return true;
    } catch (error) {
      if ((error as OperatorError).reason === 'unreachable') return false;
      throw error;
    }
  }

  private async start(table: ExportTable): Promise<void> {
    const options: NfsOptions = { exports: table, controlSocket: nfsSocket(this.paths) };
    const logFile = join(this.paths.logDirectory, 'nfs.log');
    const child = await spawnDetached(fileURLToPath(new URL('./nfs-main.js', import.meta.url)), [], {
      logFile,
      input: JSON.stringify(options),
    });
    let ended: string | undefined;
    void child.exited.then((how) => {
      ended = how;
      this.running = false;
      this.log.warn({ pid: child.pid, how }, 'the NFS server ended');
    });
    for (const deadline = Date.now() + START_TIMEOUT_MS; Date.now() < deadline && ended === undefined; ) {
      if (await this.answers()) {
        this.running = true;
        return;
      }
      await new Promise((resolve) => setTimeout(resolve, POLL_MS));
    }
    const tail = readFileSync(logFile, 'utf8').trimEnd().split('\n').slice(-5).join('\n');
    throw new OperatorError(
      `the NFS server did not start (${ended ?? 'no answer'}); ${logFile} ends:\n${tail}`,
      20,
      'nfs',
    );
  }

  /** What exportfs(8) does: `serve` and `withdraw` one path or all, `list`. Always reads the table afresh. */
  async exportfs(action: string, path: string | undefined, table: ExportTable, file: string): Promise<ExportReport[]> {
    if (action === 'serve') {
      if (table.entries.length === 0) throw new OperatorError(`${file} exports nothing`, 10, 'no-exports');
      if (!(await this.answers())) await this.start(table);
      else await this.call('exports', { table });
      const wanted = path ? [path] : table.entries.map((entry) => entry.path);
      for (const one of wanted) await this.call('serve', { path: one });
    } else if (action === 'withdraw' && (await this.answers())) {
      const wanted = path ? [path] : (await this.call<NfsStatus>('status')).exports.map((one) => one.path);
      for (const one of wanted) await this.call('withdraw', { path: one });
    }
    return this.list(table);
  }

  private async list(table: ExportTable): Promise<ExportReport[]> {
    const served = new Set<string>();
    if (await this.answers())
      for (const one of (await this.call<NfsStatus>('status')).exports) if (one.isServed) served.add(one.path);
    return table.entries.map((entry) => ({
      path: entry.path,
      state: served.has(entry.path) ? 'served' : 'not served',
      clients: entry.clients.map((client) => client.text).join(' '),
    }));
  }

  async stop(): Promise<void> {
    if (!(await this.answers())) return;
    await this.call('quit');
    for (const deadline = Date.now() + START_TIMEOUT_MS; Date.now() < deadline; ) {
      if (!(await this.answers())) return;
      await new Promise((resolve) => setTimeout(resolve, POLL_MS));
    }
    throw new OperatorError('the NFS server does not end', 20, 'nfs');
  }
}
