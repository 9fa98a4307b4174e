/**
 * An NFS client that looks everything up once and then goes on with the handles it has, whatever happens to the server:
 * it writes small blocks, each on stable storage before the next, and remembers what was acknowledged.
 *
 *   node handle-keeper.mjs HOST EXPORT NAME
 *
 * Lines on standard input: `count` prints how many writes were acknowledged; `stop` (or the end) reads everything back
 * through the same handles, looks every name up again, prints a KeeperReport and ends.
 */
import { randomInt } from 'node:crypto';
import { createInterface } from 'node:readline';
import { RpcLink } from '../../src/io/rpc-link.js';
import { mount, Nfs3Client, RpcCaller } from '../../src/nfs/client.js';
import { Stability } from '../../src/nfs/filesystem.js';
import { frameRecord, RecordReader } from '../../src/rpc/record-marking.js';

export interface KeeperReport {
  readonly acknowledged: number;
  readonly longestPauseMs: number;
  /** What was acknowledged and is not there, or a handle that is not what it was. */
  readonly problems: readonly string[];
}

const NFS_PORT = 2049;
const FILES = 4;
const BLOCK_BYTES = 4096;
const MAX_RECORD_BYTES = 2 * 1024 * 1024;
const JUKEBOX_PAUSE_MS = 100;
/** So many blocks per file, then from the start again: the file stays small, the last write counts. */
const BLOCKS_PER_FILE = 64;

const [host, exported, name] = process.argv.slice(2) as [string, string, string];
const link = new RpcLink(
  {
    ...{ host, port: NFS_PORT, privileged: true },
    ...{ connectTimeoutMs: 10_000, callTimeoutMs: 60_000, silenceMs: 1000 },
  },
  { frame: frameRecord, reader: (record) => new RecordReader(MAX_RECORD_BYTES, 64, record) },
);
const caller = new RpcCaller(
  (record) => link.call(record),
  { stamp: 0, machineName: 'keeper', uid: 65534, gid: 65534, groups: [] },
  randomInt(2 ** 32),
);
const client = new Nfs3Client(caller, () => new Promise((done) => setTimeout(done, JUKEBOX_PAUSE_MS)));

const root = await mount(caller, exported);
const files: { readonly name: string; readonly handle: Uint8Array }[] = [];
for (let index = 0; index < FILES; index++) {
  const file = `${name}-${index}`;
  const how = { kind: 'unchecked', attributes: { mode: 0o644, sizeBytes: 0 } } as const;
  files.push({ name: file, handle: (await client.create(root, file, how, file)).handle });
}

function contentOf(sequence: number): Buffer {
  const block = Buffer.alloc(BLOCK_BYTES, `${name} block ${sequence} `);
  block.writeUInt32BE(sequence, 0);
  return block;
}

let acknowledged = 0;
let longestPauseMs = 0;
let stopping = false;
const input = createInterface({ input: process.stdin });
input.on('line', (line) => {
  if (line === 'count') process.stdout.write(`${acknowledged}\n`);
  else if (line === 'stop') stopping = true;
});
input.on('close', () => {
  stopping = true;
});

/** Sequence number of the last acknowledged write of each block, by `file * BLOCKS_PER_FILE + block`. */
const last = new Map<number, number>();
process.stdout.write('ready\n');
for (let sequence = 0; !stopping; sequence++) {
  const file = sequence % FILES;
  const block = Math.floor(sequence / FILES) % BLOCKS_PER_FILE;
  const from = performance.now();
  const { name: what, handle } = files[file]!;
  const { count } = await client.write(handle, block * BLOCK_BYTES, contentOf(sequence), Stability.FILE_SYNC, what);
  if (count !== BLOCK_BYTES) throw new Error(`${what}: wrote ${count} of ${BLOCK_BYTES} bytes`);
  longestPauseMs = Math.max(longestPauseMs, performance.now() - from);
  last.set(file * BLOCKS_PER_FILE + block, sequence);
  acknowledged++;
}

const problems: string[] = [];
for (const [place, sequence] of last) {
  const file = files[Math.floor(place / BLOCKS_PER_FILE)]!;
  const offsetBytes = (place % BLOCKS_PER_FILE) * BLOCK_BYTES;
  const { data } = await client.read(file.handle, offsetBytes, BLOCK_BYTES, file.name);
  if (data === undefined || !contentOf(sequence).equals(data))
    problems.push(`${file.name} at ${offsetBytes}: not write ${sequence}`);
}
for (const { name: what, handle } of files) {
  const found = await client.lookup(root, what, what);
  if (Buffer.compare(found.handle, handle) !== 0) problems.push(`${what}: has another handle now`);
}
const report: KeeperReport = { acknowledged, longestPauseMs: Math.round(longestPauseMs), problems };
process.stdout.write(`${JSON.stringify(report)}\n`);
link.close();
input.close();
