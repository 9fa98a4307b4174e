/**
 * Bytes that no honest client sends, at every door of two heads that serve: the replication port, NBD, NFS, MOUNT, the port
 * mapper, the control sockets. Each attacker loses its own connection and nothing else happens: a client's writes go on,
 * the processes are the same, and they did not grow.
 */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import {
  canRunHeads,
  DRBDTS,
  HandleKeeper,
  MiB,
  resourceStatus,
  SERVE,
  until,
  untilInSync,
} from '../support/head-tests.js';
import { Cluster, type Machine } from '../support/heads.js';

const DISK_BYTES = 128 * MiB;
const NBD_PORT = 10809;
/** Resident memory may grow by so much from one round of everything to the next. */
const GROWTH_BYTES = 48 * MiB;

interface Attack {
  readonly name: string;
  /** A path, or host and port. */
  readonly path?: string;
  readonly host?: string;
  readonly port?: number;
  readonly udp?: boolean;
  /** Base64. */
  readonly bytes: string;
  /** How often the bytes are sent, one after the other. */
  readonly times?: number;
  /** What is waited for: the end of the connection (default), or an answer. */
  readonly until?: 'closed' | 'answer';
}

interface Outcome {
  readonly name: string;
  readonly connected: boolean;
  /** The other side ended the connection within the limit. */
  readonly closed: boolean;
  readonly answer: string;
}

const CLOSE_LIMIT_MS = 4000;

/** Runs inside a machine: all attacks at once, one connection each, JSON in, JSON out. */
const ATTACKER = `
const net = require('node:net'), dgram = require('node:dgram');
const attacks = JSON.parse(require('node:fs').readFileSync(0, 'utf8'));
const one = (attack) => new Promise((done) => {
  const bytes = Buffer.from(attack.bytes, 'base64');
  if (attack.udp) {
    const socket = dgram.createSocket('udp4');
    socket.send(bytes, attack.port, attack.host, () => setTimeout(() => {
      socket.close();
      done({ name: attack.name, connected: true, closed: true, answer: '' });
    }, 200));
    return;
  }
  let connected = false, answer = Buffer.alloc(0);
  const socket = attack.path ? net.connect(attack.path) : net.connect(attack.port, attack.host);
  const finish = (closed) => {
    clearTimeout(timer);
    socket.destroy();
    done({ name: attack.name, connected, closed, answer: answer.subarray(0, 2000).toString('latin1') });
  };
  const timer = setTimeout(() => finish(false), ${CLOSE_LIMIT_MS});
  socket.on('connect', () => {
    connected = true;
    for (let i = 0; i < (attack.times ?? 1); i++) socket.write(bytes);
  });
  socket.on('data', (chunk) => {
    if (answer.length < 4096) answer = Buffer.concat([answer, chunk]);
    if (attack.until === 'answer') finish(false);
  });
  socket.on('error', () => {});
  socket.on('close', () => finish(true));
});
Promise.all(attacks.map(one)).then((all) => process.stdout.write(JSON.stringify(all)));
`;

async function attackFrom(machine: Machine, attacks: readonly Attack[]): Promise<Outcome[]> {
  const { status, stdout, stderr } = await machine.exec([process.execPath, '-e', ATTACKER], {
    input: JSON.stringify(attacks),
    timeoutMs: 30_000,
  });
  if (status !== 0) throw new Error(`the attacker failed: ${stderr}`);
  return JSON.parse(stdout) as Outcome[];
}

const base64 = (bytes: Uint8Array): string => Buffer.from(bytes).toString('base64');
const hex = (text: string): Buffer => Buffer.from(text.replaceAll(/\s/g, ''), 'hex');
/** The same on every run. */
function noise(length: number, seed: number): Buffer {
  const bytes = Buffer.alloc(length);
  let state = seed;
  for (let at = 0; at < length; at++) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    bytes[at] = state >>> 24;
  }
  return bytes;
}

/** Newstyle negotiation up to the options (proto.md, "Fixed newstyle negotiation"): client flags. */
const NBD_HELLO = hex('00000001');
const nbdOption = (option: number, length: number, data: Buffer = Buffer.alloc(0)) =>
  Buffer.concat([hex('49484156454f5054'), uint32(option), uint32(length), data]);
const NBD_GO = (name: string) => {
  const data = Buffer.concat([uint32(name.length), Buffer.from(name), hex('0000')]);
  return Buffer.concat([NBD_HELLO, nbdOption(7, data.length, data)]);
};
const nbdRequest = (magic: string, command: string, length: number) =>
  Buffer.concat([hex(magic), hex('0000'), hex(command), hex('0000000000000001 0000000000000000'), uint32(length)]);

function uint32(value: number) {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32BE(value >>> 0);
  return bytes;
}

const NBD_ATTACKS: readonly (readonly [string, Buffer])[] = [
  ['noise instead of flags', noise(64 * 1024, 1)],
  ['unknown client flags', hex('ffffffff')],
  ['an option of 4 GiB', Buffer.concat([NBD_HELLO, nbdOption(7, 0xffffffff)])],
  ['an option with a wrong magic', Buffer.concat([NBD_HELLO, noise(16, 2)])],
  ['a request with a wrong magic', Buffer.concat([NBD_GO('data'), nbdRequest('deadbeef', '0000', 4096)])],
  ['a write of 4 GiB', Buffer.concat([NBD_GO('data'), nbdRequest('25609513', '0001', 0xffffffff)])],
  ['noise after the handshake', Buffer.concat([NBD_GO('data'), noise(256 * 1024, 3)])],
];

/** DRBD 8.4 packets, header of protocol 80: magic, command, length (drbd_main.c prepare_header80). */
const packet = (command: string, length: string, body: Buffer = Buffer.alloc(0)) =>
  Buffer.concat([hex('83740267'), hex(command), hex(length), body]);
const INITIAL_DATA = packet('fff2', '0000');
const INITIAL_META = packet('fff1', '0000');
const PEER_ATTACKS: readonly (readonly [string, Buffer])[] = [
  ['noise', noise(64 * 1024, 4)],
  ['an initial packet that claims a body', packet('fff1', 'ffff', noise(65535, 5))],
  ['no initial packet at all', packet('fffe', '0050', noise(80, 6))],
  ['features that make no sense', Buffer.concat([INITIAL_DATA, packet('fffe', '0050', noise(80, 7))])],
  ['a truncated header', hex('837402')],
  ['data before the handshake', Buffer.concat([INITIAL_META, packet('0000', '1000', noise(4096, 8))])],
];

const fragment = (length: number, body: Buffer = Buffer.alloc(0)) => Buffer.concat([uint32(length), body]);
const rpcCall = (program: number, procedure: number, body: Buffer) => {
  const call = Buffer.concat([uint32(7), uint32(0), uint32(2), uint32(program), uint32(3), uint32(procedure), body]);
  return fragment(0x80000000 + call.length, call);
};
const NO_AUTH = Buffer.alloc(16);
const RPC_ATTACKS: readonly (readonly [string, Buffer, boolean])[] = [
  ['a fragment of 2 GiB', fragment(0xffffffff, noise(4096, 9)), true],
  ['a fragment of 2 GiB that is not the last', fragment(0x7fffffff, noise(4096, 10)), true],
  ['endless empty fragments', Buffer.alloc(64 * 1024), true],
  ['an empty record', fragment(0x80000000), true],
  ['HTTP', Buffer.from('GET / HTTP/1.1\r\nHost: x\r\n\r\n'), true],
  ['noise', noise(256 * 1024, 11), true],
  ['a call whose credential is 4 GiB', rpcCall(100003, 1, Buffer.concat([uint32(1), uint32(0xffffffff)])), false],
  ['a file handle of 4 GiB', rpcCall(100003, 1, Buffer.concat([NO_AUTH, uint32(0xffffffff)])), false],
  ['a path of 4 GiB', rpcCall(100005, 1, Buffer.concat([NO_AUTH, uint32(0xffffffff)])), false],
  ['a WRITE without its data', rpcCall(100003, 7, Buffer.concat([NO_AUTH, noise(40, 12)])), false],
  ['a procedure that does not exist', rpcCall(100003, 4000000000, NO_AUTH), false],
];

const rpcAttacks = (port: number, times = 1): Attack[] =>
  RPC_ATTACKS.map(([name, bytes, ends]) => ({
    ...{ name, host: '10.96.20.8', port, bytes: base64(bytes), times, until: ends ? 'closed' : 'answer' },
  }));

const LINE = (text: string) => Buffer.from(`${text}\n`);
/** The last word: whether the connection must end. */
const CONTROL_ATTACKS: readonly (readonly [string, Buffer, boolean])[] = [
  ['noise', noise(64 * 1024, 13), true],
  ['a line without end', Buffer.alloc(3 * MiB, 0x61), true],
  ['not an object', LINE('[1,2,3]'), true],
  ['no method', LINE('{"id":1}'), true],
  ['a method of the prototype', LINE('{"id":1,"method":"constructor"}'), false],
  ['an unknown method', LINE('{"id":1,"method":"frobnicate"}'), false],
  ['no parameters', LINE('{"id":1,"method":"primary"}'), false],
  ['parameters of a wrong kind', LINE('{"id":1,"method":"status","params":[[]]}'), false],
  ['a resource that is an object', LINE('{"id":1,"method":"down","params":{"resource":{"a":1}}}'), false],
  ['a resource that is a path', LINE('{"id":1,"method":"attach","params":{"resource":"../../etc/passwd"}}'), false],
];

interface Process {
  readonly pid: number;
  readonly residentBytes: number;
}

/** The drbdts processes of a head, by what they are. */
async function processesOf(head: Machine): Promise<Record<string, Process>> {
  const rows = await head.sh(`for p in $(pgrep -f -- -main.js); do
    echo "$p $(awk '/VmRSS/ { print $2 }' /proc/$p/status) $(tr '\\0' ' ' </proc/$p/cmdline)"
  done`);
  const found: Record<string, Process> = {};
  for (const row of rows.trim().split('\n')) {
    const match = /^(\d+) (\d+) .*\/(\w+)-main\.js/.exec(row);
    if (match) found[match[3]!] = { pid: Number(match[1]), residentBytes: Number(match[2]) * 1024 };
  }
  return found;
}

const pidsOf = (found: Record<string, Process>) =>
  Object.fromEntries(Object.entries(found).map(([name, { pid }]) => [name, pid]));

describe.runIf(canRunHeads())('hostile bytes', () => {
  let cluster: Cluster;
  let keeper: HandleKeeper;
  let before: Record<string, Process>;

  beforeAll(async () => {
    cluster = await Cluster.create({
      projectDirectory: `${import.meta.dirname}/../..`,
      diskBytes: DISK_BYTES,
      rate: '1000M',
    });
    for (const head of [cluster.master, cluster.backup]) await head.sh(`${DRBDTS} create-md data`);
    await cluster.master.sh(`${DRBDTS} up --nbd-listen 0.0.0.0:${NBD_PORT} data`);
  }, 60_000);
  afterAll(() => cluster?.destroy(), 30_000);

  it('a rogue peer before the real one: it does not get in, the real one does', async () => {
    const from = cluster.backup;
    const attacks = PEER_ATTACKS.map(
      ([name, bytes]): Attack => ({
        ...{ name, host: '172.16.1.113', port: 7788, bytes: base64(bytes) },
      }),
    );
    const outcomes = await attackFrom(from, attacks);
    expect(outcomes.every((one) => one.connected)).toBe(true);
    // Another network may not even try: the peer's address is configured.
    const stranger = await attackFrom(cluster.client, [
      { name: 'stranger', host: '10.96.20.113', port: 7788, bytes: base64(INITIAL_DATA) },
    ]);
    expect(stranger[0]!.connected).toBe(false);
    expect((await resourceStatus(cluster.master)).connectionState).toBe('WFConnection');
    // The real one comes while rogues keep its port busy.
    const busy = attackFrom(from, [
      ...Array.from({ length: 20 }, (_, index): Attack => ({ ...attacks[0]!, name: `silent ${index}`, bytes: '' })),
      ...attacks,
    ]);
    await cluster.backup.sh(`${DRBDTS} up data`);
    await until(
      'connected',
      20_000,
      () => resourceStatus(cluster.master),
      (one) => one.connectionState === 'Connected',
    );
    await cluster.master.sh(`${DRBDTS} primary --force data`);
    await untilInSync(cluster.master, 60_000);
    await busy;
  }, 100_000);

  it('the cluster serves, a client writes', async () => {
    await cluster.master.sh('mkfs.ext4 -q -b 4096 /dev/drbd0');
    await cluster.master.sh(SERVE);
    await cluster.master.sh('chown 65534:65534 /drbd');
    keeper = await HandleKeeper.start(cluster.client, 'undisturbed');
    await keeper.progress(10_000);
    before = await processesOf(cluster.master);
    expect(Object.keys(before).sort()).toEqual(['daemon', 'engine', 'nfs']);
  }, 60_000);

  it('a rogue peer beside the real one changes nothing', async () => {
    const attacks = PEER_ATTACKS.map(
      ([name, bytes]): Attack => ({
        ...{ name, host: '172.16.1.113', port: 7788, bytes: base64(bytes) },
      }),
    );
    for (const outcome of await attackFrom(cluster.backup, attacks)) expect(outcome.closed, outcome.name).toBe(true);
    expect(await resourceStatus(cluster.master)).toMatchObject({ connectionState: 'Connected', role: 'Primary' });
    await keeper.progress(10_000);
  }, 40_000);

  it('NBD: each attacker loses its connection', async () => {
    const outcomes = await attackFrom(cluster.client, [
      ...NBD_ATTACKS.map(([name, bytes]) => ({ name, host: '10.96.20.113', port: NBD_PORT, bytes: base64(bytes) })),
    ]);
    for (const outcome of outcomes) expect(outcome, outcome.name).toMatchObject({ connected: true, closed: true });
    const local = await attackFrom(cluster.master, [
      ...NBD_ATTACKS.map(([name, bytes]) => ({ name, path: '/run/drbdts/nbd-data.sock', bytes: base64(bytes) })),
    ]);
    for (const outcome of local) expect(outcome, outcome.name).toMatchObject({ connected: true, closed: true });
    await keeper.progress(10_000);
  }, 40_000);

  it('NFS, MOUNT and port mapper: a broken stream ends, a broken call is answered', async () => {
    const check = async (port: number) => {
      const outcomes = await attackFrom(cluster.client, [
        ...rpcAttacks(port),
        ...RPC_ATTACKS.map(([name, bytes]) => ({
          ...{ name: `udp ${name}`, host: '10.96.20.8', port, udp: true },
          bytes: base64(bytes.subarray(0, 1400)),
        })),
      ]);
      const byName = new Map(outcomes.map((outcome) => [outcome.name, outcome]));
      for (const [name, , ends] of RPC_ATTACKS) {
        const outcome = byName.get(name)!;
        expect(outcome.connected, `${port} ${name}`).toBe(true);
        if (ends) expect(outcome.closed, `${port} ${name}`).toBe(true);
        // A whole record gets a reply with its transaction number: GARBAGE_ARGS, PROG_UNAVAIL or the like.
        else expect(outcome.answer.slice(4, 8), `${port} ${name}`).toBe('\0\0\0\x07');
      }
    };
    await Promise.all([2049, 20048, 111].map(check));
    await keeper.progress(10_000);
  }, 60_000);

  it('control sockets: every line gets its error, or the connection ends', async () => {
    const check = async (socket: string) => {
      const outcomes = await attackFrom(cluster.master, [
        ...CONTROL_ATTACKS.map(
          ([name, bytes, ends]): Attack => ({
            ...{ name, path: `/run/drbdts/${socket}.sock`, bytes: base64(bytes), until: ends ? 'closed' : 'answer' },
          }),
        ),
      ]);
      for (const [index, [name, , ends]] of CONTROL_ATTACKS.entries()) {
        const { answer, closed } = outcomes[index]!;
        if (ends) expect(closed, `${socket} ${name}`).toBe(true);
        else if (socket === 'daemon')
          expect(JSON.parse(answer), `${socket} ${name}`).toMatchObject({
            id: 1,
            error: { exitCode: expect.any(Number) },
          });
        expect(answer, `${socket} ${name}`).not.toMatch(/Cannot read properties|is not a function/);
      }
    };
    await Promise.all(['daemon', 'engine-data', 'nfs'].map(check));
    expect(await resourceStatus(cluster.master)).toMatchObject({ connectionState: 'Connected', role: 'Primary' });
    await keeper.progress(10_000);
  }, 60_000);

  it('nobody but root reaches the control sockets', async () => {
    for (const socket of ['daemon', 'engine-data', 'nfs', 'nbd-data'])
      expect(await cluster.master.sh(`stat -c %a /run/drbdts/${socket}.sock`), socket).toBe('600\n');
  });

  it('connections that say nothing do not keep others out', async () => {
    const silent = (port: number): Attack[] =>
      Array.from({ length: 60 }, (_, index) => ({ name: `silent ${index}`, host: '10.96.20.8', port, bytes: '' }));
    const waiting = attackFrom(cluster.client, [...silent(2049), ...silent(NBD_PORT), ...silent(20048)]);
    await keeper.progress(10_000);
    expect(await cluster.client.sh(`${DRBDTS} nfs ls nfs://10.96.20.8/drbd`)).toMatch(/undisturbed-0/);
    await waiting;
  }, 40_000);

  it('the processes are the same ones, of the same size, and nothing was lost', async () => {
    await attackFrom(cluster.client, [
      ...NBD_ATTACKS.map(([name, bytes]) => ({ name, host: '10.96.20.113', port: NBD_PORT, bytes: base64(bytes) })),
      ...rpcAttacks(2049, 8),
    ]);
    const after = await processesOf(cluster.master);
    expect(pidsOf(after)).toEqual(pidsOf(before));
    for (const [name, { residentBytes }] of Object.entries(after))
      expect(residentBytes - before[name]!.residentBytes, `growth of ${name}`).toBeLessThan(GROWTH_BYTES);
    const report = await keeper.finish();
    expect(report.problems).toEqual([]);
    // What an attacker may cost a client: less than a failover would.
    expect(report.longestPauseMs).toBeLessThan(3000);
  }, 60_000);
});
