/**
 * `drbdts nfs`: a small NFSv3 client, for looking at an export and moving files without mounting it. A failover of the
 * server shows as a pause: every unanswered request is sent again, unchanged, once the server is back.
 */
import { randomInt } from 'node:crypto';
import { createReadStream } from 'node:fs';
import { open, stat } from 'node:fs/promises';
import { basename } from 'node:path';
import type { Readable } from 'node:stream';
import type { Command } from 'commander';
import { OperatorError, ProtocolError } from '../base/errors.js';
import { RpcLink, type RpcLinkOptions } from '../io/rpc-link.js';
import { askExports, askPort, type FoundObject, mount, Nfs3Client, RpcCaller } from '../nfs/client.js';
import { type Attributes, FileType, Stability } from '../nfs/filesystem.js';
import { MOUNT_PROGRAM } from '../nfs/mount3/results.js';
import { MAX_RECORD_BYTES, MAX_TRANSFER_BYTES } from '../nfs/nfs3/fsinfo.js';
import { NFS_PROGRAM } from '../nfs/nfs3/program.js';
import type { AuthSys } from '../rpc/auth.js';
import { PORTMAP_PORT, Protocol } from '../rpc/portmap.js';
import { frameRecord, RecordReader } from '../rpc/record-marking.js';
import type { CliCommand, Environment } from './command.js';

const MAX_FRAGMENTS = 1024;
const CONNECT_TIMEOUT_MS = 5000;
const SILENCE_MS = 2000;
const DEFAULT_TIMEOUT_S = 120;
const JUKEBOX_PAUSE_MS = 500;
/** READs and WRITEs on their way at once. */
const WINDOW = 4;
const PROGRESS_AFTER_MS = 2000;
const PROGRESS_EVERY_MS = 1000;

/** `nfs://host[:port]/path[?mountport=..&nfsport=..&uid=..&gid=..]` */
export interface NfsUrl {
  readonly host: string;
  readonly path: string;
  /** Undefined: ask the server's port mapper. */
  readonly nfsPort: number | undefined;
  readonly mountPort: number | undefined;
  readonly uid: number;
  readonly gid: number;
}

/** @throws OperatorError (exit code 1) that says what is wrong with the URL */
export function parseNfsUrl(text: string, uid: number, gid: number): NfsUrl {
  const wrong = (why: string) =>
    new OperatorError(`${text}: ${why}, expected nfs://host[:port]/export/path[?mountport=N&nfsport=N]`, 1, 'usage');
  if (!URL.canParse(text)) throw wrong('not a URL');
  const url = new URL(text);
  if (url.protocol !== 'nfs:' || url.hostname === '') throw wrong('not an NFS URL');
  const known = ['mountport', 'nfsport', 'uid', 'gid'];
  for (const key of url.searchParams.keys()) if (!known.includes(key)) throw wrong(`unknown parameter ${key}`);
  const numberOf = (key: string, largest: number) => {
    const value = url.searchParams.get(key);
    if (value === null) return undefined;
    if (!/^\d+$/.test(value) || Number(value) > largest) throw wrong(`${key}=${value} is no number up to ${largest}`);
    return Number(value);
  };
  const nfsPort = numberOf('nfsport', 65535) ?? (url.port === '' ? undefined : Number(url.port));
  return {
    host: url.hostname.replace(/^\[|\]$/g, ''),
    path: decodeURIComponent(url.pathname) || '/',
    nfsPort,
    // Without mountport the port of the URL serves both, as it does with this server.
    mountPort: numberOf('mountport', 65535) ?? nfsPort,
    uid: numberOf('uid', 0xfffffffe) ?? uid,
    gid: numberOf('gid', 0xfffffffe) ?? gid,
  };
}

/** One server, as a command sees it: connected, mounted, path walked. `demo/writer.ts` uses it too. */
export class NfsSession {
  private readonly links: RpcLink[] = [];
  private wasSilent = false;
  private isRepeating = false;

  constructor(
    private readonly url: NfsUrl,
    private readonly timeoutMs: number,
    private readonly environment: Environment,
  ) {}

  /** @returns the client and the handle of the export that holds the path, and the names below it */
  async open(): Promise<{ client: Nfs3Client; root: Uint8Array; below: string[] }> {
    const { url } = this;
    const mountPort = url.mountPort ?? (await this.portOf(MOUNT_PROGRAM));
    const nfsPort = url.nfsPort ?? (await this.portOf(NFS_PROGRAM));
    const mounter = this.caller(mountPort);
    const exported = exportOf(
      url.path,
      (await askExports(mounter)).map((entry) => entry.path),
    );
    if (exported === undefined)
      throw new OperatorError(`${url.path}: the server exports nothing there to this host`, 20, 'not-exported');
    const root = await mount(mounter, exported);
    // Asked once; only the NFS connection is worth keeping, and worth a word when it is lost.
    this.close();
    const client = new Nfs3Client(
      this.caller(nfsPort),
      () => new Promise((resolve) => setTimeout(resolve, JUKEBOX_PAUSE_MS)),
    );
    const below = namesOf(url.path).slice(namesOf(exported).length);
    return { client, root, below };
  }

  close(): void {
    for (const link of this.links.splice(0)) link.close();
  }

  private async portOf(program: number): Promise<number> {
    const mapping = { program, version: 3, protocol: Protocol.TCP, port: 0 };
    const port = await askPort(this.caller(PORTMAP_PORT), mapping);
    if (port === 0) throw new OperatorError(`${this.url.host}: program ${program} is not registered`, 20, 'portmap');
    return port;
  }

  /** A server that holds calls back (its export is withdrawn) is lost and back every two seconds: said once. */
  private tellPause(message: string): void {
    if (message.startsWith('lost')) {
      const isSilent = message.includes('silent for');
      this.isRepeating = isSilent && this.wasSilent;
      this.wasSilent = isSilent;
    }
    if (this.isRepeating) return;
    const hint = message.startsWith('lost') && this.wasSilent ? ' (it is there; is the export served?)' : '';
    this.environment.err(`${this.url.host}: ${message}${hint}\n`);
  }

  private caller(port: number): RpcCaller {
    const { uid, gid, host } = this.url;
    const options: RpcLinkOptions = {
      ...{ host, port, privileged: process.getuid?.() === 0 },
      ...{ connectTimeoutMs: CONNECT_TIMEOUT_MS, callTimeoutMs: this.timeoutMs, silenceMs: SILENCE_MS },
      onPause: (message) => this.tellPause(message),
    };
    const maxBytes = MAX_RECORD_BYTES;
    const link = new RpcLink(options, {
      frame: frameRecord,
      reader: (record) => new RecordReader(maxBytes, MAX_FRAGMENTS, record),
    });
    this.links.push(link);
    const auth: AuthSys = { stamp: 0, machineName: 'drbdts', uid, gid, groups: [] };
    return new RpcCaller((record) => link.call(record), auth, randomInt(2 ** 32));
  }
}

function namesOf(path: string): string[] {
  return path.split('/').filter((name) => name !== '');
}

/** The longest exported path that is the path or above it. */
export function exportOf(path: string, exported: readonly string[]): string | undefined {
  const names = namesOf(path);
  const isAbove = (candidate: string) => namesOf(candidate).every((name, index) => name === names[index]);
  const above = exported.filter(isAbove);
  return above.sort((a, b) => namesOf(b).length - namesOf(a).length)[0];
}

async function walk(
  client: Nfs3Client,
  root: Uint8Array,
  names: readonly string[],
  path: string,
): Promise<FoundObject> {
  let found: FoundObject = { handle: root, attributes: await client.getattr(root, path) };
  for (const name of names) found = await client.lookup(found.handle, name, path);
  return found;
}

const TYPE_LETTERS = '?-dbclsp';
const TYPE_NAMES = ['unknown', 'file', 'directory', 'block device', 'character device', 'symlink', 'socket', 'fifo'];

function modeText(attributes: Attributes): string {
  const { mode } = attributes;
  const letters = [...'rwxrwxrwx'].map((letter, index) => (mode & (0o400 >> index) ? letter : '-'));
  for (const [bit, at, letter] of [
    [0o4000, 2, 's'],
    [0o2000, 5, 's'],
    [0o1000, 8, 't'],
  ] as const)
    if (mode & bit) letters[at] = letters[at] === 'x' ? letter : letter.toUpperCase();
  return (TYPE_LETTERS[attributes.type] ?? '?') + letters.join('');
}

function timeText(seconds: number): string {
  return new Date(seconds * 1000).toISOString().slice(0, 19).replace('T', ' ');
}

/** Attributes as JSON: numbers where they fit, names for types, ISO times. */
function jsonOf(name: string, attributes: Attributes): Record<string, unknown> {
  return {
    name,
    type: TYPE_NAMES[attributes.type] ?? 'unknown',
    mode: attributes.mode.toString(8).padStart(4, '0'),
    links: attributes.linkCount,
    uid: attributes.uid,
    gid: attributes.gid,
    sizeBytes: attributes.sizeBytes,
    usedBytes: attributes.usedBytes,
    fileId: attributes.fileId.toString(),
    mtime: new Date(attributes.mtime.seconds * 1000).toISOString(),
  };
}

/** Says how far a transfer is, once it takes longer than two seconds. */
class Progress {
  private readonly startedMs = performance.now();
  private lastMs = this.startedMs + PROGRESS_AFTER_MS - PROGRESS_EVERY_MS;

  constructor(
    private readonly environment: Environment,
    private readonly verb: string,
    private readonly totalBytes: number | undefined,
  ) {}

  at(doneBytes: number): void {
    const now = performance.now();
    if (now - this.lastMs < PROGRESS_EVERY_MS) return;
    this.lastMs = now;
    const mib = (bytes: number) => (bytes / 1048576).toFixed(1);
    const of = this.totalBytes === undefined ? '' : ` of ${mib(this.totalBytes)}`;
    const rate = mib(doneBytes / ((now - this.startedMs) / 1000));
    this.environment.err(`${this.verb} ${mib(doneBytes)}${of} MiB, ${rate} MiB/s\n`);
  }
}

/** Reads a file in order, a few READs ahead. `sink` gets each piece and says when to go on. */
async function readAll(
  client: Nfs3Client,
  file: FoundObject,
  path: string,
  progress: Progress,
  sink: (bytes: Uint8Array) => Promise<void>,
): Promise<void> {
  const piece = Math.min(MAX_TRANSFER_BYTES, (await client.fsinfo(file.handle)).readPreferred || MAX_TRANSFER_BYTES);
  const ahead: { offsetBytes: number; result: ReturnType<Nfs3Client['read']> }[] = [];
  let next = 0;
  for (;;) {
    while (ahead.length < WINDOW && (next < file.attributes.sizeBytes || ahead.length === 0)) {
      const result = client.read(file.handle, next, piece, path);
      // A failure is reported when its turn comes; until then it must not count as unhandled.
      result.catch(() => {});
      ahead.push({ offsetBytes: next, result });
      next += piece;
    }
    const { offsetBytes, result } = ahead.shift()!;
    const { data, eof } = await result;
    const bytes = data ?? new Uint8Array(0);
    if (bytes.length > 0) await sink(bytes);
    progress.at(offsetBytes + bytes.length);
    if (eof) return;
    if (bytes.length === piece) continue;
    // A short read in the middle: what was read ahead starts at the wrong place.
    if (bytes.length === 0) throw new OperatorError(`${path}: the server reads nothing before the end`, 20, 'protocol');
    ahead.length = 0;
    next = offsetBytes + bytes.length;
  }
}

interface Piece {
  readonly offsetBytes: number;
  readonly data: Uint8Array;
}

/**
 * Writes pieces unstable, then commits. Pieces are kept until they are committed with the verifier they were written
 * with: a server that restarted in between gets them again (RFC 1813 section 4.8).
 */
class Uploader {
  private readonly uncommitted: { piece: Piece; verifier: Uint8Array }[] = [];
  private uncommittedBytes = 0;
  private readonly inFlight = new Set<Promise<void>>();

  constructor(
    private readonly client: Nfs3Client,
    private readonly handle: Uint8Array,
    private readonly path: string,
  ) {}

  async add(piece: Piece): Promise<void> {
    while (this.inFlight.size >= WINDOW) await Promise.race(this.inFlight);
    const sent = this.send(piece).finally(() => this.inFlight.delete(sent));
    sent.catch(() => {});
    this.inFlight.add(sent);
    if (this.uncommittedBytes >= MAX_UNCOMMITTED_BYTES) await this.commit();
  }

  /** When this resolves, everything added is on stable storage. */
  async commit(): Promise<void> {
    for (;;) {
      await Promise.all(this.inFlight);
      if (this.uncommitted.length === 0) return;
      const { verifier } = await this.client.commit(this.handle, this.path);
      const lost = this.uncommitted.splice(0).filter((entry) => !isSame(entry.verifier, verifier!));
      this.uncommittedBytes = 0;
      for (const { piece } of lost) await this.send(piece);
    }
  }

  private async send(piece: Piece): Promise<void> {
    let { offsetBytes, data } = piece;
    while (data.length > 0) {
      const result = await this.client.write(this.handle, offsetBytes, data, Stability.UNSTABLE, this.path);
      if (result.count === 0) throw new OperatorError(`${this.path}: the server writes nothing`, 20, 'protocol');
      if (result.committed === Stability.UNSTABLE) {
        this.uncommitted.push({
          piece: { offsetBytes, data: data.subarray(0, result.count) },
          verifier: result.verifier,
        });
        this.uncommittedBytes += result.count;
      }
      offsetBytes += result.count;
      data = data.subarray(result.count);
    }
  }
}

const MAX_UNCOMMITTED_BYTES = 64 * 1024 * 1024;

function isSame(a: Uint8Array, b: Uint8Array): boolean {
  return Buffer.compare(a, b) === 0;
}

/** Cuts a stream into pieces of exactly `pieceBytes`, the last one shorter. */
async function* piecesOf(input: Readable, pieceBytes: number): AsyncGenerator<Piece> {
  let buffered: Buffer[] = [];
  let bufferedBytes = 0;
  let offsetBytes = 0;
  for await (const chunk of input as AsyncIterable<Buffer>) {
    buffered.push(chunk);
    bufferedBytes += chunk.length;
    if (bufferedBytes < pieceBytes) continue;
    const all = Buffer.concat(buffered);
    let at = 0;
    for (; all.length - at >= pieceBytes; at += pieceBytes) {
      yield { offsetBytes, data: all.subarray(at, at + pieceBytes) };
      offsetBytes += pieceBytes;
    }
    buffered = [all.subarray(at)];
    bufferedBytes = all.length - at;
  }
  if (bufferedBytes > 0) yield { offsetBytes, data: Buffer.concat(buffered) };
}

interface CommonOptions {
  readonly timeout: string;
  readonly json?: boolean;
}

type Action = (session: Awaited<ReturnType<NfsSession['open']>>, url: NfsUrl, options: CommonOptions) => Promise<void>;

async function withSession(
  environment: Environment,
  text: string,
  options: CommonOptions,
  action: Action,
): Promise<number> {
  const url = parseNfsUrl(text, process.getuid?.() ?? 65534, process.getgid?.() ?? 65534);
  const seconds = Number(options.timeout);
  if (!(seconds > 0)) throw new OperatorError(`--timeout ${options.timeout}: expected seconds`, 1, 'usage');
  const session = new NfsSession(url, seconds * 1000, environment);
  try {
    await action(await session.open(), url, options);
    return 0;
  } catch (error) {
    if (error instanceof ProtocolError) throw new OperatorError(`${text}: ${error.message}`, 20, error.code);
    // A local file that is not there, a full disk, a closed pipe.
    const { code, syscall, message } = error as NodeJS.ErrnoException;
    if (code !== undefined && syscall !== undefined) throw new OperatorError(message, 20, code);
    throw error;
  } finally {
    session.close();
  }
}

const list =
  (environment: Environment): Action =>
  async ({ client, root, below }, url, options) => {
    const found = await walk(client, root, below, url.path);
    const rows: { name: string; attributes: Attributes }[] = [];
    if (found.attributes.type !== FileType.DIR) rows.push({ name: basename(url.path), attributes: found.attributes });
    else
      for await (const entry of client.list(found.handle, url.path)) {
        const name = new TextDecoder().decode(entry.name);
        if (name === '.' || name === '..') continue;
        const attributes = entry.attributes ?? (await client.lookup(found.handle, name, name)).attributes;
        rows.push({ name, attributes });
      }
    rows.sort((a, b) => (a.name < b.name ? -1 : 1));
    if (options.json) {
      environment.out(`${JSON.stringify(rows.map((row) => jsonOf(row.name, row.attributes)))}\n`);
      return;
    }
    for (const { name, attributes } of rows) {
      const owner = `${attributes.uid}:${attributes.gid}`.padEnd(12);
      const size = String(attributes.sizeBytes).padStart(14);
      environment.out(`${modeText(attributes)} ${owner}${size} ${timeText(attributes.mtime.seconds)} ${name}\n`);
    }
  };

const showStat =
  (environment: Environment): Action =>
  async ({ client, root, below }, url, options) => {
    const { handle, attributes } = await walk(client, root, below, url.path);
    const object = jsonOf(url.path, attributes);
    const target = attributes.type === FileType.LNK ? await client.readlink(handle, url.path) : undefined;
    if (target !== undefined) object.target = target;
    if (options.json) environment.out(`${JSON.stringify(object)}\n`);
    else for (const [key, value] of Object.entries(object)) environment.out(`${key.padEnd(10)} ${String(value)}\n`);
  };

/** Standard output as a sink that waits when the reader is slow. */
function toStdout(bytes: Uint8Array): Promise<void> {
  return new Promise((resolve, reject) => {
    // The stream also emits what the callback gets; with a listener that does not end the process.
    process.stdout.once('error', reject);
    process.stdout.write(bytes, (error) => {
      process.stdout.off('error', reject);
      if (error) {
        process.stdout.on('error', () => {});
        reject(error);
      } else resolve();
    });
  });
}

const cat =
  (environment: Environment): Action =>
  async ({ client, root, below }, url) => {
    const file = await walk(client, root, below, url.path);
    await readAll(client, file, url.path, new Progress(environment, 'read', file.attributes.sizeBytes), toStdout);
  };

const get =
  (environment: Environment, localPath: string | undefined): Action =>
  async ({ client, root, below }, url) => {
    const file = await walk(client, root, below, url.path);
    const local = await open(localPath ?? basename(url.path), 'w');
    try {
      const progress = new Progress(environment, 'received', file.attributes.sizeBytes);
      await readAll(client, file, url.path, progress, async (bytes) => void (await local.write(bytes)));
    } finally {
      await local.close();
    }
  };

const put =
  (environment: Environment, localPath: string): Action =>
  async ({ client, root, below }, url) => {
    const name = below.at(-1);
    if (name === undefined) throw new OperatorError(`${url.path}: names the export, not a file in it`, 1, 'usage');
    const isStdin = localPath === '-';
    const sizeBytes = isStdin ? undefined : (await stat(localPath)).size;
    const input: Readable = isStdin
      ? process.stdin
      : createReadStream(localPath, { highWaterMark: MAX_TRANSFER_BYTES });
    const directory = await walk(client, root, below.slice(0, -1), url.path);
    const how = { kind: 'unchecked', attributes: { mode: 0o644, sizeBytes: 0 } } as const;
    const file = await client.create(directory.handle, name, how, url.path);
    const pieceBytes = Math.min(MAX_TRANSFER_BYTES, (await client.fsinfo(file.handle)).writePreferred);
    const uploader = new Uploader(client, file.handle, url.path);
    const progress = new Progress(environment, 'sent', sizeBytes);
    for await (const piece of piecesOf(input, pieceBytes)) {
      await uploader.add(piece);
      progress.at(piece.offsetBytes + piece.data.length);
    }
    await uploader.commit();
  };

const EXAMPLES = `
Examples:
  drbdts nfs ls nfs://10.96.20.8/drbd
  drbdts nfs put backup.tar nfs://10.96.20.8/drbd/backup.tar
  drbdts nfs cat nfs://10.96.20.8/drbd/backup.tar | sha256sum
  drbdts nfs stat --json 'nfs://localhost:2049/drbd/file?mountport=20048'
Exit codes: 0 done, 1 wrong usage, 5 the server did not answer in time, 20 the server refused.`;

const SUBCOMMAND_EXAMPLES: Readonly<Record<string, string>> = {
  ls: 'drbdts nfs ls nfs://10.96.20.8/drbd',
  stat: 'drbdts nfs stat --json nfs://10.96.20.8/drbd/file',
  cat: 'drbdts nfs cat nfs://10.96.20.8/drbd/file | sha256sum',
  get: 'drbdts nfs get nfs://10.96.20.8/drbd/file /tmp/file',
  put: 'drbdts nfs put backup.tar nfs://10.96.20.8/drbd/backup.tar',
};

export const nfsCommand: CliCommand = {
  register(program: Command, environment: Environment, exit: (code: number) => void): void {
    const nfs = program
      .command('nfs')
      .description('look at an NFSv3 export and move files, without mounting it')
      .addHelpText('after', EXAMPLES);
    const common = (command: Command) =>
      command
        .option('--timeout <seconds>', 'how long one request may wait for the server', String(DEFAULT_TIMEOUT_S))
        .addHelpText('after', `\nExample:\n  ${SUBCOMMAND_EXAMPLES[command.name()]}`);
    common(nfs.command('ls <url>').description('list a directory').option('--json', 'as JSON')).action(
      async (url: string, options: CommonOptions) =>
        exit(await withSession(environment, url, options, list(environment))),
    );
    common(nfs.command('stat <url>').description('attributes of one object').option('--json', 'as JSON')).action(
      async (url: string, options: CommonOptions) =>
        exit(await withSession(environment, url, options, showStat(environment))),
    );
    common(nfs.command('cat <url>').description('write a file to standard output')).action(
      async (url: string, options: CommonOptions) =>
        exit(await withSession(environment, url, options, cat(environment))),
    );
    common(nfs.command('get <url> [local]').description('copy a file from the server')).action(
      async (url: string, local: string | undefined, options: CommonOptions) =>
        exit(await withSession(environment, url, options, get(environment, local))),
    );
    common(nfs.command('put <local> <url>').description('copy a file (or - for standard input) to the server')).action(
      async (local: string, url: string, options: CommonOptions) =>
        exit(await withSession(environment, url, options, put(environment, local))),
    );
    for (const command of nfs.commands)
      command.exitOverride().configureOutput({ writeOut: environment.out, writeErr: environment.err });
  },
};
