/** NBD servers under fio, one after the other with the same job, so that the machine's mood hits all alike. */

import { createHash } from 'node:crypto';
import { existsSync, readFileSync, writeFileSync } from 'node:fs';
import { type Head, startAlone, startPair } from './engine.js';
import { has, type Lab, processorMicroseconds, type Row, run, type Server, type Table } from './lab.js';

const SIZE_BYTES = 256 << 20;
const VERIFY_BYTES = 16 << 20;
const WARM_UP_SECONDS = 0.5;
const MIB = 1 << 20;

interface Job {
  readonly name: string;
  readonly readWrite: string;
  readonly blockBytes: number;
  readonly depth: number;
}

const JOBS: readonly Job[] = [
  { name: '4 KiB random read, 1 in flight', readWrite: 'randread', blockBytes: 4096, depth: 1 },
  { name: '4 KiB random write, 1 in flight', readWrite: 'randwrite', blockBytes: 4096, depth: 1 },
  { name: '4 KiB random read, 32 in flight', readWrite: 'randread', blockBytes: 4096, depth: 32 },
  { name: '4 KiB random write, 32 in flight', readWrite: 'randwrite', blockBytes: 4096, depth: 32 },
  { name: '1 MiB sequential read, 8 in flight', readWrite: 'read', blockBytes: 1 << 20, depth: 8 },
  { name: '1 MiB sequential write, 8 in flight', readWrite: 'write', blockBytes: 1 << 20, depth: 8 },
];

/** Something to measure: a name and where it listens. */
export interface Target {
  readonly name: string;
  readonly uri: string;
  /** Its processes, whose processor time is counted. */
  readonly servers: readonly Server[];
}

interface Figure {
  readonly rate: number;
  readonly processorPerOperation: number;
}

function fio(
  uri: string,
  ...args: string[]
): { read: { iops: number; bw: number }; write: { iops: number; bw: number } } {
  const all = ['--name=bench', '--ioengine=nbd', `--uri=${uri}`, '--thread', '--output-format=json', ...args];
  const text = run('fio', ...all);
  const [job] = (JSON.parse(text.slice(text.indexOf('{'))) as { jobs: [{ error: number; read: never; write: never }] })
    .jobs;
  if (job.error !== 0) throw new Error(`fio on ${uri}: error ${job.error}`);
  return job;
}

/** Writes and reads back with checksums: a fast server that loses data is none. Warms the server up, too. */
function verify(target: Target): void {
  for (const blockBytes of ['4k', '1m']) {
    const size = `--size=${VERIFY_BYTES}`;
    fio(target.uri, '--rw=randwrite', `--bs=${blockBytes}`, '--iodepth=32', size, '--verify=crc32c', '--do_verify=1');
  }
}

/** Operations (or MiB, for jobs of whole MiB) per second, and what the server's processes took for each. */
function measure(lab: Lab, target: Target, job: Job): Figure {
  const spent = () => target.servers.reduce((sum, { pid }) => sum + processorMicroseconds(pid), 0);
  const before = spent();
  const result = fio(
    target.uri,
    `--rw=${job.readWrite}`,
    `--bs=${job.blockBytes}`,
    `--iodepth=${job.depth}`,
    `--size=${SIZE_BYTES}`,
    '--time_based',
    `--runtime=${lab.seconds}`,
    `--ramp_time=${WARM_UP_SECONDS * 1000}ms`,
    '--randrepeat=0',
    '--norandommap',
  );
  const direction = job.readWrite.endsWith('read') ? result.read : result.write;
  const rate = job.blockBytes >= MIB ? direction.bw / 1024 : direction.iops;
  return { rate, processorPerOperation: (spent() - before) / (rate * (lab.seconds + WARM_UP_SECONDS)) };
}

interface Measured {
  readonly rates: Row[];
  readonly processor: Row[];
}

function measureAll(lab: Lab, targets: readonly Target[], more: Partial<Row>): Measured {
  for (const target of targets) verify(target);
  const [rates, processor]: [Row[], Row[]] = [[], []];
  for (const job of JOBS) {
    const figures = targets.map((target) => measure(lab, target, job));
    const [unit, each] = job.blockBytes >= MIB ? ['MiB/s', 'us/MiB'] : ['IOPS', 'us/op'];
    const told = targets.map(({ name }, at) => `${name} ${Math.round(figures[at]!.rate)}`);
    lab.say(`  ${job.name}: ${told.join(', ')} ${unit}`);
    rates.push({ name: job.name, unit, values: figures.map(({ rate }) => rate), ...more });
    const values = figures.map(({ processorPerOperation }) => processorPerOperation);
    processor.push({ name: job.name, unit: each, values, lessIsBetter: true });
  }
  return { rates, processor };
}

const PROCESSOR_NOTE =
  'User and system time of all processes of the server; it suffers less from other load on the machine.';

const uriOf = (socket: string, name = ''): string => `nbd+unix:///${name}?socket=${socket}`;

async function onSocket(lab: Lab, name: string, socket: string, program: string, args: readonly string[]) {
  const server = lab.start(program, args);
  await lab.ready(server, () => existsSync(socket));
  return { server, target: { name, uri: uriOf(socket), servers: [server] } };
}

async function startPeers(lab: Lab): Promise<{ servers: Server[]; targets: Target[] }> {
  const servers: Server[] = [];
  const targets: Target[] = [];
  const add = ({ server, target }: { server: Server; target: Target }) => {
    servers.push(server);
    targets.push(target);
  };
  if (has(lab, 'nbdkit', 'nbdkit')) {
    const socket = lab.fresh('nbdkit.sock');
    add(
      await onSocket(lab, 'nbdkit', socket, 'nbdkit', ['-f', '-U', socket, 'file', lab.filled('nbdkit', SIZE_BYTES)]),
    );
  }
  if (has(lab, 'qemu-nbd', 'qemu-utils')) {
    const socket = lab.fresh('qemu.sock');
    const args = ['-f', 'raw', '--cache=writeback', '-t', '-e', '16', '-k', socket, lab.filled('qemu', SIZE_BYTES)];
    add(await onSocket(lab, 'qemu-nbd', socket, 'qemu-nbd', args));
  }
  if (has(lab, 'nbd-server', 'nbd-server')) {
    const [socket, file] = [lab.fresh('nbd-server.sock'), lab.fresh('nbd-server.conf')];
    const image = lab.filled('nbd-server', SIZE_BYTES);
    writeFileSync(file, `[generic]\nunixsock = ${socket}\n[bench]\nexportname = ${image}\nflush = true\nfua = true\n`);
    // In the foreground it would serve one connection only.
    const pidFile = lab.fresh('nbd-server.pid');
    const server = await lab.startDaemon('nbd-server', ['-C', file, '-p', pidFile], pidFile);
    await lab.ready(server, () => existsSync(socket));
    add({ server, target: { name: 'nbd-server', uri: uriOf(socket, 'bench'), servers: [server] } });
  }
  return { servers, targets };
}

function targetOf(name: string, ...heads: readonly [Head, ...Head[]]): Target {
  return { name, uri: heads[0].uri, servers: heads.map(({ server }) => server) };
}

/** One resource without a peer beside other NBD servers, all over Unix sockets. */
export async function nbd(lab: Lab): Promise<Table[]> {
  if (!has(lab, 'fio', 'fio')) return [];
  const head = await startAlone(lab, lab.filled('ours', SIZE_BYTES), 7800);
  const peers = await startPeers(lab);
  const targets = [targetOf('drbdts', head), ...peers.targets];
  const { rates, processor } = measureAll(lab, targets, { atLeast: 1 });
  const columns = targets.map((target) => target.name);
  await lab.end(head.server, ...peers.servers);
  return [
    {
      title: 'NBD, one resource without a peer, Unix socket',
      columns,
      rows: rates,
      notes: ['Ratio: drbdts / best of the others. Image of 256 MiB in the page cache; client: fio, ioengine nbd.'],
    },
    {
      title: 'NBD, one resource without a peer: processor time of the server',
      columns,
      rows: processor,
      notes: [PROCESSOR_NOTE],
    },
  ];
}

async function startQuorum(lab: Lab): Promise<{ servers: Server[]; target: Target } | undefined> {
  if (!has(lab, 'qemu-nbd', 'qemu-utils')) return undefined;
  const servers: Server[] = [];
  const children = ['127.0.0.1', '127.0.0.2'].map((host, index) => {
    const image = lab.filled('quorum', SIZE_BYTES);
    servers.push(lab.start('qemu-nbd', ['-f', 'raw', '--cache=writeback', '-t', '-b', host, '-p', '10810', image]));
    return `children.${index}.driver=nbd,children.${index}.server.type=inet,children.${index}.server.host=${host},children.${index}.server.port=10810`;
  });
  for (const [index, server] of servers.entries())
    await lab.ready(server, () => run('ss', '-Hltn', 'sport = :10810').includes(`127.0.0.${index + 1}:`));
  const socket = lab.fresh('quorum.sock');
  const options = `driver=quorum,vote-threshold=2,${children.join(',')}`;
  const front = lab.start('qemu-nbd', ['-t', '-e', '16', '-k', socket, '--image-opts', options]);
  servers.push(front);
  try {
    await lab.ready(front, () => existsSync(socket));
  } catch (error) {
    if (!/Unknown driver 'quorum'/.test(front.tail)) throw error;
    lab.say('skipped: this qemu-nbd is built without the quorum driver');
    await lab.end(...servers);
    return undefined;
  }
  return { servers, target: { name: 'QEMU quorum', uri: uriOf(socket), servers } };
}

function digest(path: string): string {
  return createHash('sha256').update(readFileSync(path)).digest('hex');
}

/** Two heads, protocol C over loopback TCP, beside the same engine alone and QEMU's way to write two copies. */
export async function replicated(lab: Lab): Promise<Table[]> {
  if (!has(lab, 'fio', 'fio')) return [];
  const image = lab.filled('alpha', SIZE_BYTES);
  const [alpha, beta] = await startPair(lab, image, lab.filled('beta', SIZE_BYTES), 7810);
  const alone = await startAlone(lab, lab.filled('alone', SIZE_BYTES), 7820);
  const quorum = await startQuorum(lab);
  const targets = [
    targetOf('drbdts C', alpha, beta),
    targetOf('drbdts alone', alone),
    ...(quorum ? [quorum.target] : []),
  ];
  const { rates, processor } = measureAll(lab, targets, {});
  if (!(await alpha.isUpToDateWithPeer())) throw new Error('the heads are not in sync after the load');
  await lab.end(alpha.server, beta.server, alone.server, ...(quorum?.servers ?? []));
  if (digest(alpha.disk) !== digest(beta.disk)) throw new Error('the disks of the two heads differ');
  return [
    {
      title: 'Protocol C over loopback TCP, against QEMU quorum (vote-threshold 2, two NBD children over TCP)',
      columns: ['drbdts C', 'QEMU quorum'],
      rows: quorum
        ? rates.map((row) => ({ ...row, values: [row.values[0], row.values[2]], atLeast: 2 }))
        : rates.map((row) => ({ ...row, values: [row.values[0], undefined] })),
      notes: ['Both disks were compared byte by byte afterwards.'],
    },
    {
      title: 'Protocol C over loopback TCP, against the same engine without a peer',
      columns: ['drbdts C', 'drbdts alone'],
      rows: rates.map((row) => ({ ...row, values: [row.values[0], row.values[1]], atLeast: 0.6 })),
    },
    {
      title: 'Protocol C: processor time of all servers together',
      columns: targets.map(({ name }) => name),
      rows: processor.map((row) => ({ ...row, ...(quorum ? { against: 2 } : {}) })),
      notes: [PROCESSOR_NOTE, 'Ratio: QEMU quorum / drbdts C.'],
    },
  ];
}
