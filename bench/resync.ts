/** A full resync beside a plain copy of the same bytes from file to file over loopback TCP. */
import { closeSync, createReadStream, fdatasyncSync, openSync, writeSync } from 'node:fs';
import { connect, createServer } from 'node:net';
import { fileURLToPath } from 'node:url';
import { Cluster } from './engine.js';
import { type Lab, run, type Table, until } from './lab.js';

const SIZE_BYTES = 1 << 30;
const MIB = 1 << 20;
const ROUNDS = 3;
const PORT = 7840;
const POLL_MS = 2;

/** The two ends of the plain copy are processes of their own, as the two heads are. */
export function copyMode([end, path, port]: readonly string[]): void {
  if (end === 'send') {
    const socket = connect({ host: '127.0.0.2', port: Number(port), noDelay: true });
    createReadStream(path!, { highWaterMark: MIB }).pipe(socket);
    // The receiver closes when everything is written.
    socket.resume().on('close', () => process.exit(0));
    return;
  }
  const file = openSync(path!, 'r+');
  const server = createServer({ allowHalfOpen: true, noDelay: true }, (socket) => {
    let at = 0;
    socket.on('data', (chunk: Buffer) => {
      for (let done = 0; done < chunk.length; ) done += writeSync(file, chunk, done, chunk.length - done, at + done);
      at += chunk.length;
    });
    socket.on('end', () => {
      // As a resync, which ends with what it copied on stable storage.
      fdatasyncSync(file);
      closeSync(file);
      socket.end(() => process.exit(0));
    });
  });
  server.listen(Number(port), '127.0.0.2');
}

async function plainCopy(lab: Lab, from: string): Promise<number> {
  const to = lab.zeroes('copy', SIZE_BYTES);
  const self = fileURLToPath(import.meta.url);
  const receiver = lab.start(process.execPath, [self, '--copy', 'receive', to, String(PORT)]);
  await lab.ready(receiver, () => run('ss', '-Hltn', `sport = :${PORT}`).includes('127.0.0.2:'));
  const sender = lab.start(process.execPath, [self, '--copy', 'send', from, String(PORT)]);
  // The start of a process is not part of a copy.
  let started = 0;
  await until('the copy has begun', () => {
    started = performance.now();
    return run('ss', '-Htn', `dport = :${PORT}`).includes('ESTAB');
  });
  while (!sender.hasEnded) await new Promise((resolve) => setTimeout(resolve, POLL_MS));
  const seconds = (performance.now() - started) / 1000;
  await lab.end(receiver);
  run('cmp', from, to);
  run('rm', to);
  return SIZE_BYTES / MIB / seconds;
}

async function fullSync(lab: Lab, from: string, port: number): Promise<number> {
  const to = lab.zeroes('target', SIZE_BYTES);
  const cluster = new Cluster(lab, { alpha: from, beta: to }, port);
  const [alpha, beta] = [await cluster.start('alpha'), await cluster.start('beta')];
  await alpha.waitConnected();
  const started = performance.now();
  await alpha.call('primary', { force: true });
  await alpha.waitInSync();
  const seconds = (performance.now() - started) / 1000;
  await lab.end(alpha.server, beta.server);
  run('cmp', from, to);
  run('rm', to);
  return SIZE_BYTES / MIB / seconds;
}

const median = (values: readonly number[]): number => [...values].sort((a, b) => a - b)[values.length >> 1]!;

export async function resync(lab: Lab): Promise<Table[]> {
  const from = lab.filled('source', SIZE_BYTES);
  const [ours, copy]: [number[], number[]] = [[], []];
  for (let round = 0; round < ROUNDS; round++) {
    copy.push(await plainCopy(lab, from));
    ours.push(await fullSync(lab, from, 7850 + 2 * round));
    lab.say(`  resync ${Math.round(ours.at(-1)!)} MiB/s, plain copy ${Math.round(copy.at(-1)!)} MiB/s`);
  }
  run('rm', from);
  return [
    {
      title: `Resync of ${SIZE_BYTES / MIB} MiB over loopback TCP`,
      columns: ['drbdts', 'plain copy'],
      rows: [
        { name: 'full sync, resync-rate 4096M', unit: 'MiB/s', values: [median(ours), median(copy)], atLeast: 0.8 },
      ],
      notes: [
        `Median of ${ROUNDS}. The copies were compared byte by byte. Plain copy: one process reads and sends, another writes. Both end with fdatasync. Source and target are in the page cache.`,
      ],
    },
  ];
}
