import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { packetName } from '../../src/replication/wire/packets.js';
import { DEFAULT_NET, DEFAULT_VOLUME, Head } from '../sim/head.js';
import { Fabric } from '../sim/network.js';
import { Prng } from '../sim/prng.js';
import { World } from '../sim/world.js';

// Two fresh nodes, one volume of 999 984 KiB, indexed metadata: what drbd.ko 8.4 sends, packet for packet. The P_STATE
// words, mask/value pairs, bitmap payloads and generation identifiers are those of the kernel's own session.

interface Sent {
  readonly host: string;
  readonly name: string;
  /** Payload bytes behind the header that were not pool payload, as hex. */
  readonly body: string;
  readonly length: number;
}

const SECTORS = 1_999_968;
const world = new World();
const prng = new Prng(0x11);
const fabric = new Fabric(world, prng.fork(), { minimumMs: 0.05, maximumMs: 0.1, bytesPerMs: 2_000_000 });
const disk = { minimumMs: 0.05, maximumMs: 0.1, errorRate: 0 };
const options = {
  dataBytes: SECTORS * 512,
  meta: 'indexed' as const,
  disk,
  metaDisk: disk,
  net: DEFAULT_NET,
  volume: {
    ...DEFAULT_VOLUME,
    planAheadTenths: 0,
    resyncRateKibPerSecond: 4_000_000,
    maxRateKibPerSecond: 4_000_000,
  },
  mutations: {},
};
const alpha = new Head(world, fabric, 'alpha', 'beta', prng.fork(), options);
const beta = new Head(world, fabric, 'beta', 'alpha', prng.fork(), options);
let sent: Sent[] = [];

fabric.tap = (host, bytes, payloadLength) => {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const isOld = view.getUint32(0) === 0x83740267;
  const command = view.getUint16(isOld ? 4 : 6);
  const headerBytes = isOld ? 8 : 16;
  sent.push({
    host,
    name: packetName(command),
    body: Buffer.from(bytes.subarray(headerBytes)).toString('hex'),
    length: bytes.length - headerBytes + payloadLength,
  });
};

const by = (host: string, ...names: string[]) =>
  sent.filter((packet) => packet.host === host && (names.length === 0 || names.includes(packet.name)));
const names = (packets: readonly Sent[]) => packets.map((packet) => packet.name);
const take = () => {
  const all = sent;
  sent = [];
  return all;
};
const hex64 = (value: bigint) => value.toString(16).padStart(16, '0');
const identifiers = (head: Head) => head.status.generationIdentifiers!.map((text) => BigInt(`0x${text}`));
const uuidsOf = (packet: Sent | undefined) =>
  [0, 1, 2, 3].map((index) => BigInt(`0x${packet!.body.slice(index * 16, index * 16 + 16)}`));
const runUntil = (isSo: () => boolean, limitMs: number) => {
  const until = world.nowMs + limitMs;
  while (!isSo() && world.nowMs < until) world.runUntil(world.nowMs + 1);
  expect(isSo()).toBe(true);
};
const both = (connection: string, disks: string) =>
  [alpha, beta].every((head) => {
    const { status } = head;
    return status.connection === connection && `${status.disk}/${status.peerDisk}` === disks;
  });

describe('the worked trace: two fresh nodes', () => {
  let r1 = 0n;
  let v1 = 0n;

  beforeAll(() => {
    for (const head of [alpha, beta]) {
      head.start();
      head.attach(() => {});
    }
    world.runUntil(500);
  });

  afterAll(() => {
    alpha.runtime?.close();
    beta.runtime?.close();
  });

  it('first attach: everything is out of sync, generation just created', () => {
    for (const head of [alpha, beta]) {
      expect(head.status.outOfSyncBytes).toBe(249_996 * 4096);
      expect(head.status.disk).toBe('Inconsistent');
      expect(identifiers(head)).toEqual([4n, 0n, 0n, 0n]);
    }
    take();
  });

  it('connects with DRBD 8.4 packets in its order', () => {
    alpha.runtime!.connect({}, () => {});
    world.runUntil(world.nowMs + 5);
    beta.runtime!.connect({}, () => {});
    runUntil(() => both('Connected', 'Inconsistent/Inconsistent'), 30_000);
    world.runUntil(world.nowMs + 50);
    const handshake = ['P_PROTOCOL', 'P_SYNC_PARAM89', 'P_SIZES', 'P_UUIDS', 'P_STATE', 'P_STATE'];
    for (const host of ['alpha', 'beta']) {
      const packets = by(host).filter(({ name }) => !name.startsWith('P_INITIAL'));
      expect(names(packets)).toEqual(['P_CONNECTION_FEATURES', ...handshake]);
      const [features, protocol, syncParam, sizes, uuids, first, second] = packets;
      expect(features!.length).toBe(72);
      expect(features!.body.slice(0, 24)).toBe('000000640000000f00000065');
      expect(protocol!.body).toBe(`00000003${'00000000'.repeat(5)}00`);
      expect(syncParam!.length).toBe(148);
      expect(sizes!.length).toBe(56);
      expect(sizes!.body.slice(0, 48)).toBe(`${hex64(1_999_968n)}${hex64(0n)}${hex64(1_999_968n)}`);
      expect(uuids!.body).toBe([4n, 0n, 0n, 0n, 249_996n, 0n].map(hex64).join(''));
      expect(first!.body).toBe('0000c882');
      expect(second!.body).toBe('000088aa');
    }
    expect(
      names(sent)
        .filter((name) => name.startsWith('P_INITIAL'))
        .sort(),
    ).toContain('P_INITIAL_META');
    take();
  });

  it('primary --force: one cluster-wide request, new generation, both decide for a full sync', () => {
    let code = 0;
    alpha.runtime!.primary(true, (result) => {
      code = result;
    });
    runUntil(() => alpha.status.connection === 'SyncSource' && beta.status.connection === 'SyncTarget', 5000);
    expect(code).toBe(1);
    const [ping] = by('alpha');
    expect(ping!.name).toBe('P_PING');
    expect(by('beta', 'P_PING_ACK').length).toBeGreaterThan(0);
    expect(by('alpha', 'P_STATE_CHG_REQ').map(({ body }) => body)).toEqual(['00001e0300001001']);
    expect(by('beta', 'P_STATE_CHG_REPLY').map(({ body }) => body)).toEqual(['00000001']);
    const order = names(by('alpha')).filter((name) => name !== 'P_RS_DATA_REPLY');
    expect(order).toEqual(['P_PING', 'P_STATE_CHG_REQ', 'P_UUIDS', 'P_STATE', 'P_COMPRESSED_BITMAP', 'P_SYNC_UUID']);
    const announced = uuidsOf(by('alpha', 'P_UUIDS')[0]);
    [r1] = identifiers(alpha) as [bigint, bigint, bigint, bigint];
    expect(r1 & 1n).toBe(1n);
    expect(announced).toEqual([r1, 4n, 0n, 0n]);
    expect(by('alpha', 'P_STATE')[0]!.body).toBe('000090a9');
    expect(uuidsOf(by('beta', 'P_UUIDS')[0])).toEqual([4n, 0n, 0n, 0n]);
    expect(by('beta', 'P_STATE')[0]!.body).toBe('000108e6');
    // One set run of 249 996 bits, and the merged bitmap back.
    expect(by('alpha', 'P_COMPRESSED_BITMAP').map(({ body }) => body)).toEqual(['b27f5baf03']);
    expect(by('beta', 'P_COMPRESSED_BITMAP').map(({ body }) => body)).toEqual(['b27f5baf03']);
    v1 = BigInt(`0x${by('alpha', 'P_SYNC_UUID')[0]!.body}`);
    expect(identifiers(alpha)).toEqual([r1, v1, 4n, 0n]);
    expect(identifiers(beta)).toEqual([v1 & ~1n, 0n, 0n, 0n]);
  });

  it('full sync: request, data, acknowledgement by ID_SYNCER, and the target says when it is done', () => {
    runUntil(() => both('Connected', 'UpToDate/UpToDate'), 60_000);
    world.runUntil(world.nowMs + 20);
    const [request] = by('beta', 'P_RS_DATA_REQUEST');
    expect(request!.body.slice(0, 32)).toBe(`${hex64(0n)}${'ff'.repeat(8)}`);
    const [reply] = by('alpha', 'P_RS_DATA_REPLY');
    expect(reply!.body.slice(16)).toBe(`${'ff'.repeat(8)}${'00'.repeat(8)}`);
    const acks = by('beta', 'P_RS_WRITE_ACK');
    expect(acks[0]!.body.slice(16, 32)).toBe('ff'.repeat(8));
    expect(acks[0]!.body.slice(40)).toBe('00000001');
    const bytes = acks.reduce((sum, { body }) => sum + Number(`0x${body.slice(32, 40)}`), 0);
    expect(bytes).toBe(SECTORS * 512);
    // Target: ping, then the explicit end; source: a ping of its own, and no packet more.
    expect(names(by('beta')).slice(-3)).toEqual(['P_PING', 'P_STATE', 'P_PING_ACK']);
    expect(by('beta', 'P_STATE').at(-1)!.body).toBe('000110a6');
    expect(names(by('alpha')).slice(-2)).toEqual(['P_PING_ACK', 'P_PING']);
    // The sync identifier went through the target's current slot, which keeps bit 0 for the role.
    expect(identifiers(beta)).toEqual([r1 & ~1n, 0n, v1 & ~1n, 4n]);
    expect(identifiers(alpha)).toEqual([r1, 0n, v1, 4n]);
    take();
  });

  it('a 4 KiB write: activity log, data and disk side by side, ack, barrier; a flush then needs no packet', () => {
    const target = alpha.runtime!.blockTarget(0);
    expect(target.open(true)).toBe(0);
    const memory = alpha.memory!;
    const payload = memory.allocate(4096);
    memory.bytes.fill(0xab, payload, payload + 4096);
    const disksBefore = alpha.dataFile!.writes + beta.dataFile!.writes;
    const answers: number[] = [];
    const front = { complete: (_request: number, errno: number) => answers.push(errno) };
    target.write(front, 1, 512 * 512, 4096, payload, false);
    runUntil(() => answers.length === 1, 1000);
    world.runUntil(world.nowMs + 50);
    expect(answers).toEqual([0]);
    expect(alpha.status.proc.activityLogWrites).toBe(1);
    expect(names(by('alpha'))).toEqual(['P_DATA', 'P_BARRIER']);
    expect(names(by('beta'))).toEqual(['P_WRITE_ACK', 'P_BARRIER_ACK']);
    const [data] = by('alpha', 'P_DATA');
    expect(data!.length).toBe(24 + 4096);
    const id = data!.body.slice(16, 32);
    expect(data!.body).toBe(`${hex64(512n)}${id}00000001` + '00000100');
    const [ack] = by('beta', 'P_WRITE_ACK');
    expect(ack!.body.slice(0, 40)).toBe(`${hex64(512n)}${id}00001000`);
    const [barrier] = by('alpha', 'P_BARRIER');
    expect(by('beta', 'P_BARRIER_ACK')[0]!.body).toBe(`${barrier!.body.slice(0, 8)}00000001`);
    expect(alpha.dataFile!.writes + beta.dataFile!.writes).toBe(disksBefore + 2);
    take();
    target.flush(front, 2);
    runUntil(() => answers.length === 2, 1000);
    expect(sent).toEqual([]);
    // A second write to the now hot extent: one packet out, one ack, no metadata.
    target.write(front, 3, 512 * 512, 4096, payload, false);
    runUntil(() => answers.length === 3, 1000);
    expect(alpha.status.proc.activityLogWrites).toBe(1);
    memory.release(payload);
    world.runUntil(world.nowMs + 50);
    expect(names(take())).toEqual(['P_DATA', 'P_WRITE_ACK', 'P_BARRIER', 'P_BARRIER_ACK']);
    expect(beta.runtime!.blockTarget(0).open(true)).toBe(30);
    expect(beta.runtime!.blockTarget(0).open(false)).toBe(124);
  });

  it('writes completed one after the other share an epoch until the tick; a flush does not wait for it', () => {
    const target = alpha.runtime!.blockTarget(0);
    const memory = alpha.memory!;
    const payload = memory.allocate(4096);
    let answers = 0;
    const front = { complete: (_request: number, errno: number) => (answers += errno === 0 ? 1 : 1000) };
    const write = () => {
      const before = answers;
      target.write(front, 9, 512 * 512, 4096, payload, false);
      runUntil(() => answers > before, 10);
    };
    for (let count = 0; count < 6; count++) write();
    world.runUntil(world.nowMs + 200);
    const acks = by('beta', 'P_BARRIER_ACK').map(({ body }) => Number.parseInt(body.slice(8, 16), 16));
    // drbd.ko would send six. The first may close one, the tick closes the rest, and one may fall in between.
    expect(acks.length).toBeLessThanOrEqual(3);
    expect(acks.reduce((sum, writes) => sum + writes, 0)).toBe(6);
    write();
    write();
    target.flush(front, 10);
    runUntil(() => answers === 9, 10);
    expect(by('beta', 'P_BARRIER_ACK').length).toBeGreaterThan(acks.length);
    memory.release(payload);
    world.runUntil(world.nowMs + 200);
    take();
  });

  it('disconnect, one write alone, reconnect: only that block is copied', () => {
    alpha.runtime!.disconnect(false, () => {});
    runUntil(() => alpha.status.connection === 'StandAlone', 3000);
    expect(by('alpha', 'P_CONN_ST_CHG_REQ').map(({ body }) => body)).toEqual(['000001f000000010']);
    expect(by('beta', 'P_CONN_ST_CHG_REPLY').map(({ body }) => body)).toEqual(['00000001']);
    const memory = alpha.memory!;
    const payload = memory.allocate(4096);
    memory.bytes.fill(0xcd, payload, payload + 4096);
    let answered = false;
    const front = { complete: () => (answered = true) };
    alpha.runtime!.blockTarget(0).write(front, 4, 512 * 512, 4096, payload, false);
    runUntil(() => answered, 1000);
    memory.release(payload);
    const r2 = identifiers(alpha)[0]!;
    expect(r2).not.toBe(r1);
    expect(identifiers(alpha)).toEqual([r2, r1, v1, 4n]);
    expect(alpha.status.outOfSyncBytes).toBe(4096);
    runUntil(() => beta.status.connection === 'WFConnection', 3000);
    take();

    alpha.runtime!.connect({}, () => {});
    runUntil(() => both('Connected', 'UpToDate/UpToDate'), 30_000);
    expect(by('alpha', 'P_UUIDS')[0]!.body).toBe([r2, r1, v1, 4n, 1n, 0n].map(hex64).join(''));
    expect(by('beta', 'P_UUIDS')[0]!.body).toBe([r1 & ~1n, 0n, v1 & ~1n, 4n, 0n, 0n].map(hex64).join(''));
    expect(by('alpha', 'P_STATE').map(({ body }) => body)).toEqual(['0000d081', '0000f0d9']);
    expect(by('beta', 'P_STATE').map(({ body }) => body)).toEqual(['0000d082', '00010ae6', '000110a6']);
    // Clear 64, set 1, clear the rest.
    expect(by('alpha', 'P_COMPRESSED_BITMAP').map(({ body }) => body)).toEqual(['32df037f1aaf03']);
    expect(by('beta', 'P_COMPRESSED_BITMAP').map(({ body }) => body)).toEqual(['32df037f1aaf03']);
    const syncUuid = BigInt(`0x${by('alpha', 'P_SYNC_UUID')[0]!.body}`);
    expect(syncUuid).toBe(r1 + (1n << 48n));
    const requests = by('beta', 'P_RS_DATA_REQUEST');
    expect(requests.map(({ body }) => body.slice(0, 40))).toEqual([`${hex64(512n)}${'ff'.repeat(8)}00001000`]);
    expect(by('alpha', 'P_RS_DATA_REPLY')).toHaveLength(1);
    expect(identifiers(alpha)).toEqual([r2, 0n, syncUuid, r1]);
    expect(identifiers(beta)).toEqual([r2 & ~1n, 0n, syncUuid & ~1n, r1]);
    expect(alpha.data.firstDifference(beta.data, SECTORS * 512)).toBe(-1);
  });
});
