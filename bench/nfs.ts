/** Our NFS server beside nfs-ganesha (FSAL VFS) on the same loop-mounted ext4. */
import { existsSync, mkdirSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { parseExports } from '../src/config/exports.js';
import { callJsonLines } from '../src/io/json-lines.js';
import { NativeRing } from '../src/io/native-ring.js';
import { Stability } from '../src/nfs/filesystem.js';
import { COMMIT } from '../src/nfs/nfs3/commit.js';
import { CREATE } from '../src/nfs/nfs3/create.js';
import { GETATTR } from '../src/nfs/nfs3/getattr.js';
import { LOOKUP } from '../src/nfs/nfs3/lookup.js';
import { READ } from '../src/nfs/nfs3/read.js';
import { READDIRPLUS } from '../src/nfs/nfs3/readdirplus.js';
import { WRITE } from '../src/nfs/nfs3/write.js';
import { DIST } from './engine.js';
import { answers, has, type Lab, type Row, run, type Server, type Table } from './lab.js';
import { NfsLoad, type Request, request, type Work } from './nfs-load.js';

const MIB = 1 << 20;
const KIB4 = 4096;
const IMAGE_BYTES = 8 * 2 ** 30;
const POOL_BYTES = 512 * MIB;
const FILES = 1000;
const FILE_BYTES = 64 * MIB;
const SMALL_BYTES = 50_000;
const CONNECTIONS = 4;
const CALL_TIMEOUT_MS = 30_000;
const MODE = 0o644;

interface Subject {
  readonly name: string;
  readonly server: Server;
  readonly load: NfsLoad;
  /** Folder of its own on the common filesystem. */
  readonly folder: string;
}

/** Mounts a fresh ext4. Both loop device and mount go with the namespace. */
function mountImage(lab: Lab): string {
  const image = lab.sparse('ext4', IMAGE_BYTES);
  run('mkfs.ext4', '-q', '-F', '-b', '4096', '-N', '1000000', image);
  const mountPoint = lab.path('tree');
  mkdirSync(mountPoint);
  const device = run('losetup', '--find').trim();
  if (!existsSync(device)) run('mknod', device, 'b', '7', device.replace(/\D/g, ''));
  run('losetup', device, image);
  try {
    run('mount', '-t', 'ext4', '-o', 'noatime', device, mountPoint);
  } finally {
    // The device goes when the mount does.
    run('losetup', '--detach', device);
  }
  return mountPoint;
}

async function startOurs(lab: Lab, tree: string, mode: 'sync' | 'async', ports: { nfs: number; mount: number }) {
  const text = `${tree} 127.0.0.1(rw,${mode},no_root_squash,insecure,no_subtree_check)\n`;
  const { table } = parseExports([{ path: 'exports', text }]);
  const controlSocket = lab.fresh('nfs.control');
  const input = JSON.stringify({ exports: table, controlSocket, ports, portmap: 'none', bind: ['127.0.0.1'] });
  const server = lab.start(process.execPath, [`${DIST}/node/nfs-main.js`], input);
  await lab.ready(server, () => answers(controlSocket));
  await callJsonLines(controlSocket, 'serve', { path: tree }, CALL_TIMEOUT_MS);
  return server;
}

async function startGanesha(lab: Lab, tree: string): Promise<Server | undefined> {
  const library = '/usr/lib/x86_64-linux-gnu/ganesha/libfsalvfs.so';
  if (!has(lab, 'ganesha.nfsd', 'nfs-ganesha') || !has(lab, 'rpcbind', 'rpcbind')) return undefined;
  if (process.arch === 'x64' && !has(lab, library, 'nfs-ganesha-vfs')) return undefined;
  for (const folder of ['/run/ganesha', '/var/lib/nfs/ganesha']) mkdirSync(folder, { recursive: true });
  const binder = lab.start('rpcbind', ['-f', '-w']);
  await lab.ready(binder, () => run('ss', '-Hltn', 'sport = :111') !== '');
  const file = lab.fresh('ganesha.conf');
  writeFileSync(
    file,
    `NFS_CORE_PARAM {
  Protocols = 3; Enable_UDP = false; Enable_NLM = false; Enable_RQUOTA = false;
  NFS_Port = 2049; MNT_Port = 20048; Mount_Path_Pseudo = true;
}
NFSV4 { Graceless = true; }
EXPORT {
  Export_Id = 1; Path = ${tree}; Pseudo = ${tree}; Protocols = 3; Transports = TCP; SecType = sys;
  Access_Type = RW; Squash = No_Root_Squash;
  FSAL { Name = VFS; }
}
`,
  );
  const pid = lab.fresh('ganesha.pid');
  const server = lab.start('ganesha.nfsd', ['-F', '-f', file, '-L', 'STDERR', '-p', pid, '-N', 'NIV_CRIT']);
  await lab.ready(server, () => run('ss', '-Hltn', 'sport = :2049 or sport = :20048').split('\n').length > 2);
  return server;
}

const bytesOf = (text: string): Uint8Array => new TextEncoder().encode(text);

/** Writes through the server and reads back through it: what is measured must also be right. */
async function verify({ load, name }: Subject): Promise<void> {
  const { client, root } = load;
  const { handle } = await client.create(
    root,
    `check-${name}`,
    { kind: 'unchecked', attributes: { mode: MODE } },
    name,
  );
  const data = Uint8Array.from({ length: 100_003 }, (_, index) => (index * 31) >>> 3);
  await client.write(handle, 7, data, Stability.UNSTABLE, name);
  await client.commit(handle, name);
  const back = await client.read(handle, 7, data.length + 10, name);
  if (!back.eof || back.data === undefined || Buffer.compare(back.data.subarray(0, back.count), data) !== 0)
    throw new Error(`${name} does not give back what was written`);
}

interface Prepared {
  readonly directory: Uint8Array;
  readonly handles: readonly Uint8Array[];
  readonly big: Uint8Array;
}

const fileName = (index: number): string => `file-${index}`;

async function prepare({ load, folder }: Subject): Promise<Prepared> {
  const { client, root } = load;
  const directory = (await client.lookup(root, folder.split('/').pop()!, folder)).handle;
  const handles: Uint8Array[] = [];
  for (let index = 0; index < FILES; index++) {
    const how = { kind: 'unchecked', attributes: { mode: MODE } } as const;
    handles.push((await client.create(directory, fileName(index), how, folder)).handle);
  }
  const big = handles[0]!;
  const block = new Uint8Array(MIB).fill(0x5a);
  for (let at = 0; at < FILE_BYTES; at += MIB) await client.write(big, at, block, Stability.UNSTABLE, folder);
  await client.commit(big, folder);
  return { directory, handles, big };
}

/** CREATE, WRITE, COMMIT of one small file after the other, in each lane. */
class SmallFiles implements Work {
  private readonly handles: Uint8Array[] = [];
  private made = 0;

  constructor(
    private readonly directory: Uint8Array,
    private readonly block: number,
  ) {}

  first(): Request {
    const how = { kind: 'guarded', attributes: { mode: MODE } } as const;
    return request(CREATE, { directory: this.directory, name: bytesOf(`small-${this.made++}`), how });
  }

  next(lane: number, step: number, view: DataView, at: number): Request | undefined {
    if (step === 1) {
      if (view.getUint32(at) !== 1) throw new Error('CREATE answered without a handle');
      const start = view.byteOffset + at + 8;
      const handle = new Uint8Array(view.buffer, start, view.getUint32(at + 4)).slice();
      this.handles[lane] = handle;
      return request(
        WRITE,
        {
          handle,
          offsetBytes: 0,
          count: SMALL_BYTES,
          stability: Stability.UNSTABLE,
          data: new Uint8Array(0),
          address: 0,
        },
        this.block,
        SMALL_BYTES,
      );
    }
    return step === 2 ? request(COMMIT, { handle: this.handles[lane]!, offsetBytes: 0, count: 0 }) : undefined;
  }
}

class Repeated implements Work {
  constructor(
    private readonly requests: readonly Request[],
    readonly replyBytes: number,
  ) {}

  first(turn: number): Request {
    return this.requests[(turn * 7919) % this.requests.length]!;
  }
}

interface Job {
  readonly name: string;
  readonly unit: 'calls/s' | 'MiB/s' | 'files/s';
  readonly inFlight: number;
  make(prepared: Prepared, block: number): Work;
}

function offsets(length: number): number[] {
  return Array.from({ length: FILE_BYTES / length }, (_, index) => index * length);
}

function reads(length: number): (prepared: Prepared) => Work {
  return ({ big }) =>
    new Repeated(
      offsets(length).map((offsetBytes) => request(READ, { handle: big, offsetBytes, count: length })),
      length,
    );
}

function writes(length: number): (prepared: Prepared, block: number) => Work {
  return ({ big }, block) =>
    new Repeated(
      offsets(length).map((offsetBytes) => {
        const data = new Uint8Array(0);
        const args = { handle: big, offsetBytes, count: length, stability: Stability.UNSTABLE, data, address: 0 };
        return request(WRITE, args, block, length);
      }),
      0,
    );
}

const getattrs = ({ handles }: Prepared): Work =>
  new Repeated(
    handles.map((handle) => request(GETATTR, { handle })),
    0,
  );

const lookups = ({ directory, handles }: Prepared): Work =>
  new Repeated(
    handles.map((_, index) => request(LOOKUP, { directory, name: bytesOf(fileName(index)) })),
    0,
  );

const listings = ({ directory }: Prepared): Work => {
  const args = { directory, cookie: 0n, verifier: new Uint8Array(8), directoryCount: 8192, maxCount: 32_768 };
  return new Repeated([request(READDIRPLUS, args)], KIB4);
};

const JOBS: readonly Job[] = [
  { name: 'GETATTR, 1 in flight', unit: 'calls/s', inFlight: 1, make: getattrs },
  { name: 'GETATTR, 64 in flight', unit: 'calls/s', inFlight: 64, make: getattrs },
  { name: 'LOOKUP, 64 in flight', unit: 'calls/s', inFlight: 64, make: lookups },
  { name: 'READ 1 MiB, 8 in flight', unit: 'MiB/s', inFlight: 8, make: reads(MIB) },
  { name: 'WRITE 1 MiB unstable, 8 in flight', unit: 'MiB/s', inFlight: 8, make: writes(MIB) },
  { name: 'READ 4 KiB, random, 1 in flight', unit: 'calls/s', inFlight: 1, make: reads(KIB4) },
  { name: 'READ 4 KiB, random, 64 in flight', unit: 'calls/s', inFlight: 64, make: reads(KIB4) },
  { name: 'WRITE 4 KiB unstable, random, 64 in flight', unit: 'calls/s', inFlight: 64, make: writes(KIB4) },
  { name: 'READDIRPLUS 32 KiB, 16 in flight', unit: 'calls/s', inFlight: 16, make: listings },
  {
    name: 'CREATE + WRITE 50 KB + COMMIT, 16 in flight',
    unit: 'files/s',
    inFlight: 16,
    make: ({ directory }, block) => new SmallFiles(directory, block),
  },
];

export async function nfs(lab: Lab): Promise<Table[]> {
  if (process.getuid?.() !== 0) {
    lab.say('skipped: NFS needs root (it mounts a filesystem)');
    return [];
  }
  if (!has(lab, 'mkfs.ext4', 'e2fsprogs') || !has(lab, '/dev/loop-control', 'linux-image-amd64 (module loop)'))
    return [];
  const tree = mountImage(lab);
  const ring = new NativeRing({ poolBytes: POOL_BYTES });
  const block = ring.memory.allocate(MIB);
  ring.memory.bytes.fill(0xa5, block, block + MIB);
  const subjects: Subject[] = [];
  const add = async (name: string, server: Server, port: number, mountPort: number) => {
    const folder = join(tree, name.replace(/\W+/g, '-'));
    mkdirSync(folder);
    const load = await NfsLoad.connect(ring, port, mountPort, tree, CONNECTIONS);
    subjects.push({ name, server, load, folder });
  };
  await add('drbdts async', await startOurs(lab, tree, 'async', { nfs: 12049, mount: 12048 }), 12049, 12048);
  const ganesha = await startGanesha(lab, tree);
  if (ganesha) await add('nfs-ganesha', ganesha, 2049, 20048);
  await add('drbdts sync', await startOurs(lab, tree, 'sync', { nfs: 13049, mount: 13048 }), 13049, 13048);
  const prepared: Prepared[] = [];
  for (const subject of subjects) {
    await verify(subject);
    prepared.push(await prepare(subject));
  }
  const rows: Row[] = [];
  for (const job of JOBS) {
    const values: number[] = [];
    for (const [index, subject] of subjects.entries()) {
      values.push(await subject.load.rate(job.make(prepared[index]!, block), job.inFlight, lab.seconds));
      for (const name of readdirSync(subject.folder)) if (name.startsWith('small-')) rmSync(join(subject.folder, name));
      // What one leaves to be written back must not burden the next.
      run('sync', '-f', tree);
    }
    lab.say(
      `  ${job.name}: ${subjects.map(({ name }, at) => `${name} ${Math.round(values[at]!)}`).join(', ')} ${job.unit}`,
    );
    rows.push({ name: job.name, unit: job.unit, values, ...(ganesha ? { against: 1 } : {}), atLeast: 1 });
  }
  for (const { load } of subjects) load.close();
  await lab.end(...subjects.map(({ server }) => server));
  ring.memory.release(block);
  ring.close();
  return [
    {
      title: 'NFSv3 over loopback TCP on one ext4',
      columns: subjects.map(({ name }) => name),
      rows,
      notes: [
        'Ratio: drbdts with an `async` export / nfs-ganesha, because ganesha does not sync what CREATE did. The last',
        'column is an export with `sync`, the default. Four connections; the client is the same for all.',
      ],
    },
  ];
}
