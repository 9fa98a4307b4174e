import { beforeEach, describe, expect, it } from 'vitest';
import { MKDIR } from '../../src/nfs/nfs3/mkdir.js';
import { NFS_PROGRAM } from '../../src/nfs/nfs3/program.js';
import { WRITE } from '../../src/nfs/nfs3/write.js';
import { encodeCall } from '../../src/rpc/call.js';
import { ReplyCache } from '../../src/rpc/reply-cache.js';
import { XdrWriter } from '../../src/rpc/xdr.js';
import { Bench, bytes, KEY, ROOT_USER, type TestTransport } from '../support/nfs-bench.js';

let bench: Bench;
let transport: TestTransport;
beforeEach(() => {
  bench = new Bench();
  bench.serve();
  transport = bench.transport();
});

/** A record from words and hex text, second and naive: `record(1, 0, 2, ...)`. */
function record(...words: (number | string)[]): Buffer {
  return Buffer.concat(
    words.map((word) => {
      if (typeof word === 'string') return Buffer.from(word, 'hex');
      const bytes = Buffer.alloc(4);
      bytes.writeUInt32BE(word);
      return bytes;
    }),
  );
}
const NONE = [0, 0, 0, 0];
const hex = (bytes: Uint8Array | undefined) => bytes && Buffer.from(bytes).toString('hex');
const send = async (...words: (number | string)[]) => hex(await bench.exchange(transport, record(...words)));
const reply = (...words: number[]) => record(...words).toString('hex');

describe('validation in the order of RFC 5531 section 9', () => {
  it('NULL succeeds with AUTH_NONE and AUTH_SYS, for every program', async () => {
    for (const [program, version] of [
      [NFS_PROGRAM, 3],
      [100005, 1],
      [100005, 3],
      [100000, 2],
      [100000, 3],
      [100000, 4],
    ] as const) {
      expect(await send(7, 0, 2, program, version, 0, ...NONE)).toBe(reply(7, 1, 0, 0, 0, 0));
      const sys = record(1, 0, 1000, 1000, 0).toString('hex');
      expect(await send(8, 0, 2, program, version, 0, 1, 20, sys, 0, 0)).toBe(reply(8, 1, 0, 0, 0, 0));
    }
  });

  it('another RPC version is RPC_MISMATCH 2 2', async () => {
    expect(await send(7, 0, 3, NFS_PROGRAM, 3, 0, ...NONE)).toBe(reply(7, 1, 1, 0, 2, 2));
  });

  it('a credential or verifier above 400 bytes, cut off, or of an unknown flavor is AUTH_BADCRED', async () => {
    const badCredential = reply(7, 1, 1, 1, 1);
    expect(await send(7, 0, 2, NFS_PROGRAM, 3, 0, 1, 404, '00'.repeat(404), 0, 0)).toBe(badCredential);
    expect(await send(7, 0, 2, NFS_PROGRAM, 3, 0, 0, 0, 0, 404, '00'.repeat(404))).toBe(badCredential);
    expect(await send(7, 0, 2, NFS_PROGRAM, 3, 0, 1, 0xffffffff)).toBe(badCredential);
    expect(await send(7, 0, 2, NFS_PROGRAM, 3, 0, 6, 0, 0, 0)).toBe(badCredential);
    expect(await send(7, 0, 2, NFS_PROGRAM, 3, 0)).toBe(badCredential);
  });

  it('AUTH_SYS with 17 groups or a name of 256 bytes is AUTH_BADCRED', async () => {
    const groups = record(1, 0, 1000, 1000, 17, '00000005'.repeat(17)).toString('hex');
    expect(await send(7, 0, 2, NFS_PROGRAM, 3, 1, 1, 88, groups, 0, 0)).toBe(reply(7, 1, 1, 1, 1));
    const name = record(1, 256, '41'.repeat(256), 0, 0, 0).toString('hex');
    expect(await send(7, 0, 2, NFS_PROGRAM, 3, 1, 1, 276, name, 0, 0)).toBe(reply(7, 1, 1, 1, 1));
  });

  it('unknown program, version, procedure; NFSACL and rquota are not served', async () => {
    for (const program of [100227, 100011, 1])
      expect(await send(7, 0, 2, program, 3, 0, ...NONE)).toBe(reply(7, 1, 0, 0, 0, 1));
    expect(await send(7, 0, 2, NFS_PROGRAM, 4, 0, ...NONE)).toBe(reply(7, 1, 0, 0, 0, 2, 3, 3));
    expect(await send(7, 0, 2, 100005, 2, 0, ...NONE)).toBe(reply(7, 1, 0, 0, 0, 2, 1, 3));
    expect(await send(7, 0, 2, NFS_PROGRAM, 3, 22, ...NONE)).toBe(reply(7, 1, 0, 0, 0, 3));
    expect(await send(7, 0, 2, 100000, 2, 5, ...NONE)).toBe(reply(7, 1, 0, 0, 0, 3));
  });

  it('arguments that do not decode are GARBAGE_ARGS; trailing bytes are tolerated', async () => {
    expect(await send(7, 0, 2, NFS_PROGRAM, 3, 1, ...NONE, 65, '00'.repeat(68))).toBe(reply(7, 1, 0, 0, 0, 4));
    expect(await send(7, 0, 2, NFS_PROGRAM, 3, 1, ...NONE, 4)).toBe(reply(7, 1, 0, 0, 0, 4));
    // BADHANDLE: decoded, and judged.
    expect(await send(7, 0, 2, NFS_PROGRAM, 3, 1, ...NONE, 4, '01020304', 'ffff')).toBe(reply(7, 1, 0, 0, 0, 0, 10001));
  });

  it('what is no call is dropped and counted', async () => {
    expect(await send(7, 1, 0, 0, 0, 0)).toBeUndefined();
    expect(await send(7)).toBeUndefined();
    expect(transport.malformedReasons.length).toBe(2);
  });
});

describe('retransmissions', () => {
  let xid = 100;
  function mkdirRecord(name: string, stamp = 1): Uint8Array {
    const writer = new XdrWriter();
    encodeCall(writer, xid, NFS_PROGRAM, 3, 9, { ...ROOT_USER, stamp });
    MKDIR.args.encode(writer, { directory: bench.handle(), name: bytes(name), attributes: {} });
    return writer.message().slice();
  }
  beforeEach(() => {
    xid++;
  });

  it('a copy gets the first reply, on the same connection, from another port, with another stamp', async () => {
    const first = await bench.exchange(transport, mkdirRecord('d'));
    expect(await bench.exchange(transport, mkdirRecord('d'))).toEqual(first);
    expect(await bench.exchange(bench.transport('10.0.0.1', 900), mkdirRecord('d', 2))).toEqual(first);
    expect(bench.filesystem.log.length).toBe(1);
    expect(bench.cache.replays).toBe(2);
  });

  it('the same number with other arguments, from another address or of another user is another request', async () => {
    await bench.exchange(transport, mkdirRecord('d'));
    const other = await bench.exchange(transport, mkdirRecord('e'));
    expect(new DataView(other!.buffer, other!.byteOffset).getUint32(24)).toBe(0);
    const stranger = await bench.exchange(bench.transport('10.0.0.2'), mkdirRecord('d'));
    expect(new DataView(stranger!.buffer, stranger!.byteOffset).getUint32(24)).toBe(17);
    expect(bench.cache.replays).toBe(0);
  });

  it('of two copies at once one is executed, and the newest connection gets the only reply', async () => {
    let open = () => {};
    bench.filesystem.gate = new Promise((resolve) => {
      open = resolve;
    });
    const later = bench.transport('10.0.0.1', 901);
    bench.deliver(transport, mkdirRecord('d'));
    bench.deliver(later, mkdirRecord('d'));
    transport.isOpen = false;
    open();
    while (later.replies.length === 0) await later.changed();
    expect(bench.filesystem.log.length).toBe(1);
    expect([transport.replies.length, transport.finishedRecords, later.finishedRecords]).toEqual([0, 1, 1]);
    expect(bench.memory.liveBlocks).toBe(0);
  });

  it('a late copy of a WRITE does not undo a newer one', async () => {
    const { handle } = await bench.client().create(bench.handle(), 'f', { kind: 'guarded', attributes: {} }, 'f');
    const write = (number: number, text: string) => {
      const writer = new XdrWriter();
      encodeCall(writer, number, NFS_PROGRAM, 3, 7, ROOT_USER);
      WRITE.args.encode(writer, { handle, offsetBytes: 0, count: 3, stability: 2, data: bytes(text), address: 0 });
      return writer.message().slice();
    };
    await bench.exchange(transport, write(1, 'old'));
    await bench.exchange(transport, write(2, 'new'));
    await bench.exchange(transport, write(1, 'old'));
    expect(bench.filesystem.text('f')).toBe('new');
  });

  it('a JUKEBOX reply is not kept', async () => {
    bench.filesystem.failNext = 11;
    const first = await bench.exchange(transport, mkdirRecord('d'));
    expect(new DataView(first!.buffer, first!.byteOffset).getUint32(24)).toBe(10008);
    const second = await bench.exchange(transport, mkdirRecord('d'));
    expect(new DataView(second!.buffer, second!.byteOffset).getUint32(24)).toBe(0);
  });

  it('an exception inside a procedure costs that call only', async () => {
    bench.filesystem.mkdir = () => Promise.reject(new TypeError('broken'));
    const answer = await bench.exchange(transport, mkdirRecord('d'));
    expect(hex(answer)).toBe(reply(xid, 1, 0, 0, 0, 5));
    expect(bench.faults.length).toBe(1);
    expect(bench.memory.liveBlocks).toBe(0);
  });
});

describe('the reply cache', () => {
  const fill = (cache: ReplyCache<number>, client: string, count: number, size = 100) => {
    for (let i = 0; i < count; i++) cache.finish(cache.insert(client, `${i}`, 0), new Uint8Array(size));
  };

  it('stays within its bounds; no client takes more than a quarter; running requests stay', () => {
    const cache = new ReplyCache<number>(KEY, { maxBytes: 40_000, maxAgeMs: 1000 });
    const running = cache.insert('a', 'running', 0);
    fill(cache, 'a', 1000);
    expect(cache.costBytes).toBeLessThanOrEqual(10_000);
    expect(cache.find('a', 'running')).toBe(running);
    expect(cache.find('a', '0')).toBeUndefined();
    expect(cache.find('a', '999')).toBeDefined();
    for (const client of ['b', 'c', 'd', 'e', 'f']) fill(cache, client, 1000);
    expect(cache.costBytes).toBeLessThanOrEqual(40_000);
    expect(cache.find('f', '999')).toBeDefined();
  });

  it('forgets what is old, and replies that are too long to keep', () => {
    const cache = new ReplyCache<number>(KEY, { maxBytes: 1e6, maxAgeMs: 1000 });
    cache.tick(5000);
    fill(cache, 'a', 3);
    fill(cache, 'b', 1, 513);
    expect(cache.find('b', '0')).toBeUndefined();
    cache.tick(5999);
    expect(cache.find('a', '0')).toBeDefined();
    cache.tick(6000);
    expect([cache.find('a', '0'), cache.costBytes]).toEqual([undefined, 0]);
  });

  it('the key covers head and tail of long arguments', () => {
    const cache = new ReplyCache<number>(KEY);
    const long = new Uint8Array(100_000);
    const key = () => cache.keyOf(1, 'p', long, 0, long.length);
    const before = key();
    long[50_000] = 1;
    expect(key()).toBe(before);
    long[99_950] = 1;
    const tail = key();
    expect(tail).not.toBe(before);
    long[1000] = 1;
    expect(key()).not.toBe(tail);
  });
});
