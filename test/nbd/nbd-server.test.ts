import fc from 'fast-check';
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { type NbdExportOptions, NbdServer, type NbdServerOptions, type NbdTarget } from '../../src/node/nbd-server.js';
import { type FakeClient, FakeFile, FakeRing } from '../support/fake-ring.js';
import { FileTarget } from '../support/file-target.js';
import {
  ABORT,
  Command,
  Flag,
  go,
  HELLO,
  meta,
  option,
  parseReplies,
  request,
  STRUCTURED_REPLY,
  u32,
  write,
} from '../support/nbd-bytes.js';

const KIB = 1024;
const MIB = 1024 * KIB;
const EIO = 5;
const EINVAL = 22;
const ENOSPC = 28;
const POOL_BYTES = 160 * MIB;

interface World {
  ring: FakeRing;
  file: FakeFile;
  target: FileTarget & NbdTarget;
  server: NbdServer;
}
let world: World;

function build(
  sizeBytes = 4 * MIB,
  options: NbdServerOptions = {},
  exportOptions: NbdExportOptions = {},
  random?: () => number,
): World {
  const ring = new FakeRing(POOL_BYTES, random);
  const file = new FakeFile(ring, sizeBytes);
  const target = new FileTarget(file);
  const server = new NbdServer(ring, options);
  server.addExport('data', target, exportOptions);
  server.listenTcp('127.0.0.1', 10809);
  world = { ring, file, target, server };
  return world;
}

/** A client in transmission, without structured replies unless asked for. */
function attach(...options: Buffer[]): FakeClient {
  const client = world.ring.connect();
  client.write(Buffer.concat([HELLO, ...options, go('data')]));
  world.ring.settle();
  client.read();
  return client;
}
const structured = () => attach(STRUCTURED_REPLY, meta(10, 'data', ['base:allocation']));

function ask(client: FakeClient, bytes: Buffer, readLength = 0) {
  client.write(bytes);
  world.ring.settle();
  return parseReplies(client.read(), () => readLength);
}
const errorOf = (client: FakeClient, bytes: Buffer) => ask(client, bytes)[0]?.error;

/** What section of the handshake a client sees last: reply type of the last option. */
function lastOptionReply(client: FakeClient): number {
  world.ring.settle();
  const bytes = client.read();
  let type = 0;
  for (let at = 18; at < bytes.length; at += 20 + bytes.readUInt32BE(at + 16)) type = bytes.readUInt32BE(at + 12);
  return type >>> 0;
}

const pattern = (length: number, seed: number) =>
  Buffer.from(Uint8Array.from({ length }, (_, index) => (index * 7 + seed * 13 + (index >> 8)) & 255));

beforeEach(() => {
  build();
});

afterEach(() => {
  // Whatever happened: once all is over, only the server's reserve was kept, and then nothing.
  world.ring.diskStopped = false;
  world.ring.memory.exhausted = false;
  world.server.close();
  world.ring.settle();
  expect(world.ring.memory.liveBlocks).toBe(0);
  expect([world.target.readers, world.target.writers]).toEqual([0, 0]);
});

describe('nbd server: requests', () => {
  it('reads what it wrote, with simple replies before and structured ones after STRUCTURED_REPLY', () => {
    const data = pattern(8 * KIB, 1);
    for (const [client, kind] of [
      [attach(), 'simple'],
      [structured(), 'structured'],
    ] as const) {
      expect(ask(client, write(7, 4096, data))).toEqual([
        { cookie: 7, error: 0, kind: 'simple', data: Buffer.alloc(0) },
      ]);
      expect(ask(client, request(Command.READ, 8, 4096, data.length), data.length)).toEqual([
        { cookie: 8, error: 0, kind, data },
      ]);
    }
    expect(Buffer.from(world.file.data.subarray(4096, 4096 + data.length))).toEqual(data);
  });

  it('answers to each cookie, also when the disk answers in another order', () => {
    let next = 0;
    build(4 * MIB, {}, {}, () => [0.9, 0.1, 0.7, 0.3][next++ % 4]!);
    const client = attach();
    const many = Array.from({ length: 20 }, (_, index) => write(index, index * 512, pattern(512, index)));
    const answered = ask(client, Buffer.concat(many)).map(({ cookie }) => cookie);
    expect(answered).not.toEqual([...answered].sort((a, b) => a - b));
    expect([...answered].sort((a, b) => a - b)).toEqual(many.map((_, index) => index));
    for (const index of many.keys())
      expect(Buffer.from(world.file.data.subarray(index * 512, index * 512 + 512))).toEqual(pattern(512, index));
  });

  it('hands FUA and FLUSH to the target', () => {
    const client = attach();
    ask(client, write(1, 0, pattern(512, 1), Flag.FUA));
    ask(client, request(Command.FLUSH, 2, 0, 0));
    ask(client, request(Command.TRIM, 3, 0, 512, Flag.FUA));
    expect(world.file.log).toEqual(['write 0+512 durable', 'flush', 'zero 0+512 durable']);
  });

  it('zeroes on TRIM and WRITE_ZEROES, giving the space back unless told to keep it', () => {
    const client = attach();
    world.file.data.fill(1);
    expect(errorOf(client, request(Command.TRIM, 1, 0, 4096))).toBe(0);
    expect(errorOf(client, request(Command.WRITE_ZEROES, 2, 8192, 4096))).toBe(0);
    expect(errorOf(client, request(Command.WRITE_ZEROES, 3, 16384, 4096, Flag.NO_HOLE))).toBe(0);
    expect(world.file.log).toEqual(['zero 0+4096', 'zero 8192+4096', 'zero 16384+4096 keep']);
    for (const offset of [0, 8192, 16384])
      expect(world.file.data.subarray(offset, offset + 4096).every((byte) => byte === 0)).toBe(true);
  });

  it('splits a large TRIM into pieces of 32 MiB and answers once', () => {
    build(100 * MIB);
    const client = attach();
    expect(ask(client, request(Command.TRIM, 1, 512, 80 * MIB))).toHaveLength(1);
    expect(world.file.log).toEqual([
      `zero 512+${32 * MIB}`,
      `zero ${512 + 32 * MIB}+${32 * MIB}`,
      `zero ${512 + 64 * MIB}+${16 * MIB}`,
    ]);
  });

  it('tells disk errors in the way the client can hear', () => {
    const [simple, chunked] = [attach(), structured()];
    world.file.failWith = EIO;
    for (const command of [Command.READ, Command.FLUSH, Command.TRIM, Command.WRITE_ZEROES]) {
      const kind = command === Command.READ ? 'structured' : 'simple';
      expect(ask(simple, request(command, 1, 0, 512))).toMatchObject([{ error: EIO, kind: 'simple' }]);
      expect(ask(chunked, request(command, 1, 0, 512))).toMatchObject([{ error: EIO, kind }]);
    }
    expect(errorOf(simple, write(1, 0, pattern(512, 1)))).toBe(EIO);
    expect(errorOf(simple, write(1, 3, pattern(512, 1)))).toBe(EIO);
    expect(errorOf(simple, request(Command.TRIM, 1, 3, 5))).toBe(EIO);
    world.file.failWith = 122; // EDQUOT
    expect(errorOf(simple, write(1, 0, pattern(512, 1)))).toBe(ENOSPC);
  });

  it('CACHE succeeds without effect', () => {
    expect(errorOf(attach(), request(Command.CACHE, 1, 0, 1 * MIB))).toBe(0);
    expect(world.file.log).toEqual([]);
  });

  it('BLOCK_STATUS says allocated data when the target does not know better', () => {
    const client = structured();
    const [reply] = ask(client, request(Command.BLOCK_STATUS, 1, 512, 64 * KIB));
    expect(reply).toMatchObject({ kind: 'structured', error: 0 });
    expect(reply!.data).toEqual(Buffer.concat([u32(1), u32(64 * KIB), u32(0)]));
    expect(ask(client, request(Command.BLOCK_STATUS, 1, 4 * MIB, 512))).toMatchObject([
      { error: EINVAL, kind: 'structured' },
    ]);
  });

  it('BLOCK_STATUS asks the target, cuts to what was asked, and to one run on REQ_ONE', () => {
    world.target.blockStatus = (offset, _length, runs) => {
      expect(offset).toBe(512);
      runs.add(512, 0);
      runs.add(4096, 3);
    };
    const client = structured();
    const runs = (flags: number) => ask(client, request(Command.BLOCK_STATUS, 1, 512, 1024, flags))[0]!.data;
    expect(runs(0)).toEqual(Buffer.concat([u32(1), u32(512), u32(0), u32(512), u32(3)]));
    expect(runs(Flag.REQ_ONE)).toEqual(Buffer.concat([u32(1), u32(512), u32(0)]));
  });
});

describe('nbd server: bad requests, and what three servers do with them', () => {
  const rows: [string, number | 'closed', (big: number) => Buffer][] = [
    ['read past the end', EINVAL, (size) => request(Command.READ, 1, size - 511, 512)],
    ['read that wraps round', EINVAL, () => request(Command.READ, 1, 0xffff_ffff_ffff_fe00n, 1024)],
    ['write past the end', ENOSPC, (size) => write(1, size - 511, pattern(512, 1))],
    ['zeroes past the end', ENOSPC, (size) => request(Command.WRITE_ZEROES, 1, size, 512)],
    ['READ 0', EINVAL, () => request(Command.READ, 1, 0, 0)],
    ['WRITE 0', EINVAL, () => write(1, 0, Buffer.alloc(0))],
    ['unknown command', EINVAL, () => request(77, 1, 0, 512)],
    ['unknown flag', EINVAL, () => request(Command.READ, 1, 0, 512, 0x8000)],
    ['WRITE with an unknown flag', EINVAL, () => write(1, 0, pattern(512, 1), 0x40)],
    ['FAST_ZERO that was not offered', EINVAL, () => request(Command.WRITE_ZEROES, 1, 0, 512, Flag.FAST_ZERO)],
    ['CACHE', 0, () => request(Command.CACHE, 1, 0, 512)],
    ['DF without structured replies', EINVAL, () => request(Command.READ, 1, 0, 512, Flag.DF)],
    ['BLOCK_STATUS without a context', EINVAL, () => request(Command.BLOCK_STATUS, 1, 0, 512)],
    ['FLUSH with offset and length', 0, () => request(Command.FLUSH, 1, 4096, 4096)],
    ['READ 64 MiB + 512', EINVAL, () => request(Command.READ, 1, 0, 64 * MIB + 512)],
    ['WRITE 65 MiB, payload skipped', EINVAL, () => write(1, 0, Buffer.alloc(65 * MIB))],
    ['bad request magic', 'closed', () => Buffer.alloc(28, 0x5a)],
    ['WRITE 4 GiB - 1 without data', 'closed', () => request(Command.WRITE, 1, 0, 0xffff_ffff)],
  ];
  it.each(rows)('%s: %s', (_, expected, bytes) => {
    const [client, other] = [attach(), attach()];
    client.write(bytes(world.file.sizeBytes));
    world.ring.settle();
    if (expected === 'closed') {
      expect(client.isClosed).toBe(true);
      expect(client.read()).toHaveLength(0);
    } else {
      expect(parseReplies(client.read())).toMatchObject([{ cookie: 1, error: expected }]);
      expect(errorOf(client, write(2, 0, pattern(512, 2)))).toBe(0);
    }
    expect(errorOf(other, write(2, 0, pattern(512, 2)))).toBe(0);
  });

  it('zeroes of 256 MiB and reads and writes of 32 MiB + 512 succeed', () => {
    build(256 * MIB);
    const client = attach();
    const length = 32 * MIB + 512;
    expect(errorOf(client, write(1, 512, Buffer.alloc(length, 7)))).toBe(0);
    const [reply] = ask(client, request(Command.READ, 2, 512, length), length);
    expect(reply!.data.equals(Buffer.alloc(length, 7))).toBe(true);
    expect(errorOf(client, request(Command.WRITE_ZEROES, 3, 0, 256 * MIB))).toBe(0);
    expect(world.file.data.every((byte) => byte === 0)).toBe(true);
  });

  it('a read-only export refuses writes with EPERM and still flushes', () => {
    build(4 * MIB, {}, { readOnly: true });
    const client = attach();
    expect(world.target.readers).toBe(1);
    expect(errorOf(client, write(1, 0, pattern(512, 1)))).toBe(1);
    expect(errorOf(client, request(Command.TRIM, 1, 0, 512))).toBe(1);
    expect(errorOf(client, request(Command.FLUSH, 1, 0, 0))).toBe(0);
  });

  it('fast zeroes are served when the backing store punches holes, and refused when it must write', () => {
    build(4 * MIB, {}, { fastZero: true });
    const client = attach();
    expect(errorOf(client, request(Command.WRITE_ZEROES, 1, 0, 4096, Flag.FAST_ZERO))).toBe(0);
    expect(errorOf(client, request(Command.WRITE_ZEROES, 1, 0, 4096, Flag.FAST_ZERO | Flag.NO_HOLE))).toBe(95);
  });

  it('random and mutated requests never hurt anyone but their sender', () => {
    const other = attach();
    const one = fc.oneof(
      fc.uint8Array({ minLength: 1, maxLength: 60 }).map((bytes) => Buffer.from(bytes)),
      fc
        .record({
          command: fc.oneof(fc.nat(9), fc.nat(0xffff)),
          flags: fc.oneof(fc.constant(0), fc.nat(0xff)),
          offset: fc.oneof(fc.nat(5 * MIB), fc.bigInt({ min: 0n, max: 0xffff_ffff_ffff_ffffn })),
          length: fc.oneof(fc.nat(4096), fc.nat(80 * MIB)),
          data: fc.uint8Array({ maxLength: 600 }),
        })
        .map(({ command, flags, offset, length, data }) => request(command, 5, offset, length, flags, data)),
    );
    fc.assert(
      fc.property(fc.array(one, { maxLength: 6 }), fc.boolean(), (requests, sr) => {
        const client = sr ? structured() : attach();
        client.write(Buffer.concat(requests));
        world.ring.settle();
        expect(errorOf(other, write(2, 0, pattern(512, 2)))).toBe(0);
        client.close(104);
        world.ring.settle();
        expect(world.server.clientCount('data')).toBe(1);
      }),
      { numRuns: 200 },
    );
  });
});

describe('nbd server: parts of sectors', () => {
  it('an unaligned read is cut out of whole sectors', () => {
    world.file.data.set(pattern(4096, 3), 0);
    for (const client of [attach(), structured()]) {
      const [reply] = ask(client, request(Command.READ, 1, 511, 1026), 1026);
      expect(reply!.data).toEqual(pattern(4096, 3).subarray(511, 1537));
    }
    expect(world.file.log[0]).toBe('read 0+2048');
  });

  it('an unaligned read of 64 MiB would need a block larger than there are', () => {
    build(80 * MIB);
    expect(errorOf(attach(), request(Command.READ, 1, 1, 64 * MIB))).toBe(EINVAL);
    expect(ask(attach(), request(Command.READ, 1, 1, 64 * MIB - 1), 64 * MIB - 1)).toMatchObject([{ error: 0 }]);
  });

  it('an unaligned write changes only its bytes', () => {
    world.file.data.fill(9);
    const data = pattern(600 * KIB + 100, 4);
    expect(ask(attach(), write(1, 1000, data, Flag.FUA))).toMatchObject([{ error: 0 }]);
    const expected = Buffer.alloc(world.file.sizeBytes, 9);
    data.copy(expected, 1000);
    expect(Buffer.compare(expected, world.file.data)).toBe(0);
    // Only the sectors at both ends need their old content: the piece in the middle is not read.
    expect(world.file.log.filter((line) => line.startsWith('read'))).toHaveLength(2);
    expect(world.file.log.filter((line) => line.startsWith('write')).every((line) => line.endsWith('durable'))).toBe(
      true,
    );
  });

  it.each([
    [100, 50],
    [100, 412],
    [0, 100],
    [100, 512],
    [100, 4000],
    [512, 700],
    [1, 3 * MIB],
  ])('zeroes from %i, %i bytes, change only their bytes', (offset, length) => {
    world.file.data.fill(9);
    expect(ask(attach(), request(Command.TRIM, 1, offset, length))).toMatchObject([{ error: 0 }]);
    const expected = Buffer.alloc(world.file.sizeBytes, 9).fill(0, offset, offset + length);
    expect(Buffer.compare(expected, world.file.data)).toBe(0);
  });

  it('clients that each own some bytes of shared sectors never lose any, in any order of the disk', () => {
    const CLIENTS = 4;
    const stepArbitrary = fc.record({
      client: fc.nat(CLIENTS - 1),
      kind: fc.constantFrom('write', 'trim', 'zeroes'),
      slice: fc.nat(30),
      slices: fc.integer({ min: 1, max: 4 }),
    });
    fc.assert(
      fc.property(fc.array(stepArbitrary, { maxLength: 40 }), fc.infiniteStream(fc.nat(999)), (steps, luck) => {
        build(16 * KIB, {}, {}, () => luck.next().value / 1000);
        const { file, ring } = world;
        file.data.fill(0xaa);
        const model = Buffer.alloc(file.sizeBytes, 0xaa);
        const clients = Array.from({ length: CLIENTS }, () => attach());
        // The disk is cut into slices of 300 bytes, so that neighbours share sectors. Client 0 writes the whole sectors
        // inside its slices: the fast path beside the slow one.
        const busy = new Set<number>();
        steps.forEach(({ client, kind, slice, slices }, cookie) => {
          const wanted = Array.from({ length: slices }, (_, index) => slice + index);
          // Requests in flight at the same time write different bytes, else no outcome would be wrong.
          if (wanted.some((each) => busy.has(each))) {
            ring.settle();
            busy.clear();
          }
          for (const each of wanted) busy.add(each);
          const aligned = client === 0;
          const width = aligned ? 512 : 300;
          const offset = aligned ? Math.ceil((slice * 300) / 512) * 512 : slice * width;
          const end = aligned ? Math.floor(((slice + slices) * 300) / 512) * 512 : (slice + slices) * width;
          if (end <= offset) return;
          const length = end - offset;
          const data = pattern(length, cookie + 1);
          if (kind === 'write') {
            data.copy(model, offset);
            clients[client]!.write(write(cookie, offset, data));
          } else {
            model.fill(0, offset, end);
            const command = kind === 'trim' ? Command.TRIM : Command.WRITE_ZEROES;
            clients[client]!.write(request(command, cookie, offset, length));
          }
        });
        ring.settle();
        expect(Buffer.compare(model, file.data)).toBe(0);
        for (const client of clients) client.close();
        ring.settle();
        expect(ring.memory.liveBlocks).toBe(1);
      }),
      { numRuns: 200 },
    );
  });

  it('unaligned writes get on, one after another, when the pool is empty', () => {
    const clients = [attach(), attach()];
    for (const [index, client] of clients.entries())
      for (let each = 0; each < 3; each++)
        client.write(write(each, (index * 3 + each) * 1000 + 1, pattern(700, index * 3 + each)));
    world.ring.diskStopped = true;
    world.ring.settle();
    world.ring.memory.exhausted = true;
    world.ring.diskStopped = false;
    world.ring.settle();
    for (const client of clients) expect(parseReplies(client.read()).map(({ error }) => error)).toEqual([0, 0, 0]);
    for (let each = 0; each < 6; each++)
      expect(Buffer.from(world.file.data.subarray(each * 1000 + 1, each * 1000 + 701))).toEqual(pattern(700, each));
  });
});

describe('nbd server: limits', () => {
  it('keeps 128 requests at the target, reads no further, and answers all', () => {
    const client = attach();
    world.ring.diskStopped = true;
    client.write(Buffer.concat(Array.from({ length: 500 }, (_, cookie) => request(Command.READ, cookie, 0, 512))));
    world.ring.settle();
    expect(world.ring.disk).toHaveLength(128);
    expect(client.connection.isPaused).toBe(true);
    world.ring.diskStopped = false;
    world.ring.settle();
    const replies = parseReplies(client.read(), () => 512);
    expect(new Set(replies.map(({ cookie }) => cookie)).size).toBe(500);
    expect(client.connection.isPaused).toBe(false);
  });

  it('keeps 64 MiB of a client in flight', () => {
    build(64 * MIB);
    const client = attach();
    world.ring.diskStopped = true;
    client.write(Buffer.concat([0, 1, 2].map((cookie) => request(Command.READ, cookie, 0, 32 * MIB))));
    world.ring.settle();
    expect(world.ring.disk).toHaveLength(2);
    world.ring.diskStopped = false;
    world.ring.settle();
    expect(parseReplies(client.read(), () => 32 * MIB).map(({ cookie }) => cookie)).toEqual([0, 1, 2]);
  });

  it('all clients together keep half of the pool free, but everyone may have one request', () => {
    build(64 * MIB);
    const clients = [attach(), attach(), attach()];
    world.ring.diskStopped = true;
    const reads = Buffer.concat([0, 1].map((cookie) => request(Command.READ, cookie, 0, 32 * MIB)));
    for (const client of clients) {
      client.write(reads);
      world.ring.settle();
    }
    // Half of 160 MiB: the first client has both, the others one each.
    expect(world.ring.disk).toHaveLength(4);
    world.ring.diskStopped = false;
    world.ring.settle();
    for (const client of clients) expect(parseReplies(client.read(), () => 32 * MIB)).toHaveLength(2);
  });

  it('replies that nobody takes count, until they are taken', () => {
    build(64 * MIB);
    const [stuck, other] = [attach(), attach()];
    stuck.reads = false;
    const reads = (count: number) =>
      Buffer.concat(Array.from({ length: count }, (_, cookie) => request(Command.READ, cookie, 0, 32 * MIB)));
    stuck.write(reads(2));
    world.ring.settle();
    world.ring.diskStopped = true;
    other.write(reads(2));
    world.ring.settle();
    expect(world.ring.disk).toHaveLength(1);
    stuck.startReading();
    world.ring.diskStopped = false;
    world.ring.settle();
    expect(parseReplies(other.read(), () => 32 * MIB)).toHaveLength(2);
    expect(parseReplies(stuck.read(), () => 32 * MIB)).toHaveLength(2);
  });

  it('a client that does not read its replies stops being served, others go on', () => {
    const [slow, other] = [attach(), attach()];
    slow.reads = false;
    slow.write(Buffer.concat(Array.from({ length: 100 }, (_, cookie) => request(Command.READ, cookie, 0, 1 * MIB))));
    world.ring.settle();
    // At most what was in flight when the queue passed its limit.
    expect(slow.connection.queuedBytes).toBeGreaterThan(8 * MIB);
    expect(slow.connection.queuedBytes).toBeLessThan(66 * MIB);
    expect(errorOf(other, write(1, 0, pattern(512, 1)))).toBe(0);
    slow.startReading();
    world.ring.settle();
    expect(parseReplies(slow.read(), () => 1 * MIB)).toHaveLength(100);
  });

  it('bad requests of a client that does not read are not answered without end', () => {
    const client = attach();
    client.reads = false;
    const bad = Buffer.concat(Array.from({ length: 10_000 }, () => request(99, 1, 0, 512)));
    for (let round = 0; round < 80; round++) {
      client.write(bad);
      world.ring.settle();
    }
    expect(client.connection.queuedBytes).toBeLessThan(9 * MIB);
    expect(client.connection.isPaused).toBe(true);
    client.startReading();
    world.ring.settle();
    expect(client.read()).toHaveLength(800_000 * 16);
  });

  it('a read waits for memory that others hold', async () => {
    const client = attach();
    world.ring.memory.exhausted = true;
    client.write(request(Command.READ, 1, 0, 512));
    world.ring.settle();
    expect(world.ring.disk).toHaveLength(0);
    expect(client.connection.isPaused).toBe(true);
    world.ring.memory.exhausted = false;
    await new Promise((resolve) => setTimeout(resolve, 30));
    world.ring.settle();
    expect(parseReplies(client.read(), () => 512)).toMatchObject([{ cookie: 1, error: 0 }]);
  });
});

describe('nbd server: connections come and go', () => {
  it('options in one segment with the first requests, and byte by byte, work alike', () => {
    const bytes = Buffer.concat([HELLO, STRUCTURED_REPLY, go('data'), write(1, 0, pattern(512, 5))]);
    const whole = world.ring.connect();
    whole.write(bytes);
    world.ring.settle();
    const slow = world.ring.connect();
    for (const byte of bytes) {
      slow.write(Buffer.of(byte));
      world.ring.settle();
    }
    const expected = whole.read();
    expect(parseReplies(expected.subarray(expected.length - 16))).toMatchObject([{ cookie: 1, error: 0 }]);
    expect(slow.read()).toEqual(expected);
  });

  it('DISC answers what is outstanding, then closes', () => {
    const client = attach();
    world.ring.diskStopped = true;
    client.write(Buffer.concat([write(1, 0, pattern(512, 1)), request(Command.DISC, 2, 0, 0)]));
    client.write(request(Command.READ, 3, 0, 512));
    world.ring.settle();
    expect(client.isClosed).toBe(false);
    world.ring.diskStopped = false;
    world.ring.settle();
    expect(parseReplies(client.read())).toMatchObject([{ cookie: 1, error: 0 }]);
    expect([client.isClosed, client.connection.isPaused]).toEqual([true, false]);
    expect(world.target.writers).toBe(0);
  });

  it('ABORT is acknowledged, then the connection closes', () => {
    const client = world.ring.connect();
    client.write(Buffer.concat([HELLO, ABORT]));
    expect(lastOptionReply(client)).toBe(1);
    expect(client.isClosed).toBe(true);
  });

  it('what a dead client had waiting never reaches the target, what was there keeps its range', () => {
    const client = attach();
    world.ring.diskStopped = true;
    const many = Array.from({ length: 300 }, (_, cookie) => write(cookie, 0, pattern(512, cookie)));
    client.write(Buffer.concat([write(999, 1, pattern(100, 1)), ...many]));
    world.ring.settle();
    client.close(104);
    world.ring.settle();
    // Its unaligned write still holds the first sector, so the same write sent again waits behind it.
    const again = attach();
    again.write(write(1, 0, pattern(512, 77)));
    world.ring.settle();
    expect(world.target.writers).toBe(2);
    world.ring.diskStopped = false;
    world.ring.settle();
    expect(world.target.writers).toBe(1);
    expect(parseReplies(again.read())).toMatchObject([{ cookie: 1, error: 0 }]);
    expect(Buffer.from(world.file.data.subarray(0, 512))).toEqual(pattern(512, 77));
    // The read of the unaligned write and one write: nothing of what waited.
    expect(world.file.log).toEqual(['read 0+512', 'write 0+512']);
  });

  it('a Secondary refuses by policy and says so; the refused client may stay', () => {
    world.target.role = 'Secondary';
    const client = world.ring.connect();
    client.write(Buffer.concat([HELLO, go('data')]));
    world.ring.settle();
    const bytes = client.read();
    expect(bytes.readUInt32BE(18 + 12)).toBe(0x80000002);
    expect(bytes.subarray(18 + 20).toString()).toContain('Secondary');
    world.target.role = 'Primary';
    client.write(go('data'));
    world.ring.settle();
    expect(world.server.clientCount('data')).toBe(1);
  });

  it('INFO and LIST do not count as openers', () => {
    const client = world.ring.connect();
    client.write(Buffer.concat([HELLO, option(3), go('data', [3], 6)]));
    expect(lastOptionReply(client)).toBe(1);
    expect(world.target.writers).toBe(0);
  });

  it('drain answers what was received, sends the clients away, and refuses new ones meanwhile', () => {
    const client = attach();
    world.ring.diskStopped = true;
    client.write(
      Buffer.concat(Array.from({ length: 200 }, (_, cookie) => write(cookie, cookie * 512, pattern(512, 1)))),
    );
    world.ring.settle();
    const done = vi.fn();
    world.server.drain('data', done);
    const late = world.ring.connect();
    late.write(Buffer.concat([HELLO, go('data')]));
    expect(lastOptionReply(late)).toBe(0x80000007);
    expect(done).not.toHaveBeenCalled();
    world.ring.diskStopped = false;
    world.ring.settle();
    expect(done).toHaveBeenCalledOnce();
    expect(parseReplies(client.read())).toHaveLength(200);
    // A connection that is not read from would not see its client hang up.
    expect([client.isClosed, client.connection.isPaused]).toEqual([true, false]);
    expect(world.target.writers).toBe(0);
    // Afterwards the target decides again.
    late.write(go('data'));
    world.ring.settle();
    expect(world.target.writers).toBe(1);
  });

  it('closeAll closes at once and reports when the target has nothing left', async () => {
    const client = attach();
    world.ring.diskStopped = true;
    client.write(write(1, 0, pattern(512, 1)));
    world.ring.settle();
    const done = vi.fn();
    world.server.closeAll('data', done);
    world.ring.settle();
    expect(client.isClosed).toBe(true);
    expect(done).not.toHaveBeenCalled();
    world.ring.diskStopped = false;
    world.ring.settle();
    expect(done).toHaveBeenCalledOnce();
    const idle = vi.fn();
    world.server.closeAll('data', idle);
    await new Promise(setImmediate);
    expect(idle).toHaveBeenCalledOnce();
  });

  it('a removed export is unknown once its clients are gone', () => {
    const client = attach();
    const done = vi.fn();
    world.server.removeExport('data', done);
    world.ring.settle();
    expect(client.isClosed).toBe(true);
    expect(done).toHaveBeenCalledOnce();
    const late = world.ring.connect();
    late.write(Buffer.concat([HELLO, go('data')]));
    expect(lastOptionReply(late)).toBe(0x80000006);
  });

  it('a full house refuses, unless someone dawdles in the handshake', () => {
    build(4 * MIB, { maxConnections: 3 });
    const dawdler = world.ring.connect();
    const [first, second] = [attach(), attach()];
    const third = attach();
    expect([dawdler.isClosed, first.isClosed, second.isClosed, third.isClosed]).toEqual([true, false, false, false]);
    const fourth = world.ring.connect();
    world.ring.settle();
    expect(fourth.isClosed).toBe(true);
    expect(errorOf(first, write(1, 0, pattern(512, 1)))).toBe(0);
  });
});

describe('nbd server: time', () => {
  beforeEach(() => {
    vi.useFakeTimers();
    build();
  });
  afterEach(() => vi.useRealTimers());

  const pass = (milliseconds: number) => {
    vi.advanceTimersByTime(milliseconds);
    world.ring.settle();
  };

  it('a handshake has 10 s, even when it trickles; a client in transmission may idle for days', () => {
    const busy = attach();
    const dawdler = world.ring.connect();
    for (let second = 0; second < 9; second++) {
      dawdler.write(HELLO.subarray(second, second + 1));
      pass(1000);
    }
    expect(dawdler.isClosed).toBe(false);
    pass(2000);
    expect(dawdler.isClosed).toBe(true);
    pass(3 * 86_400_000);
    expect(busy.isClosed).toBe(false);
  });

  it('a client that takes no reply for 300 s is let go, one that takes some is not', () => {
    const [stuck, slow] = [attach(), attach()];
    stuck.reads = false;
    slow.reads = false;
    stuck.write(request(Command.READ, 1, 0, 4096));
    for (let second = 0; second < 290; second++) {
      slow.write(request(Command.READ, second, 0, 512));
      world.ring.settle();
      slow.startReading();
      slow.reads = false;
      pass(1000);
    }
    expect([stuck.isClosed, slow.isClosed]).toEqual([false, false]);
    pass(12_000);
    expect([stuck.isClosed, slow.isClosed]).toEqual([true, false]);
  });
});
