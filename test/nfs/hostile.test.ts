import { readFileSync } from 'node:fs';
import fc from 'fast-check';
import { beforeEach, describe, expect, it } from 'vitest';
import { HandleSigner } from '../../src/nfs/file-handle.js';
import { GETATTR } from '../../src/nfs/nfs3/getattr.js';
import { MKDIR } from '../../src/nfs/nfs3/mkdir.js';
import { NfsStatus as S } from '../../src/nfs/status.js';
import { SipKey } from '../../src/rpc/siphash.js';
import { Bench, bytes, nfs, ROOT_USER, rule } from '../support/nfs-bench.js';

let bench: Bench;
beforeEach(() => {
  bench = new Bench();
  bench.serve();
});

/**
 * Calls of the captured session, their foreign file handles replaced by the root's, so that they get past the handle.
 */
function capturedCalls(root: Uint8Array): Buffer[] {
  const lines = readFileSync(new URL('../vectors/nfs/nfs3-session.txt', import.meta.url), 'utf8')
    .trim()
    .split('\n');
  const foreign = /000000[12][0-9a-f]4300[0-9a-f]{36,44}/;
  const own = `000000${root.length.toString(16)}${Buffer.from(root).toString('hex')}`;
  return lines
    .filter((_, index) => index % 3 === 1)
    .map((hex) => Buffer.from(hex.length < 3000 ? hex.replace(foreign, own) : hex, 'hex'));
}

async function settle(): Promise<void> {
  for (let i = 0; i < 20; i++) await Promise.resolve();
}

describe('hostile records', () => {
  it('whatever a captured call is changed into, it is answered or dropped, and its memory given back', async () => {
    const calls = capturedCalls(bench.handle());
    await fc.assert(
      fc.asyncProperty(
        fc.nat(calls.length - 1),
        fc.array(fc.tuple(fc.nat(2000), fc.nat(255)), { maxLength: 6 }),
        fc.option(fc.nat(2000)),
        async (index, changes, cut) => {
          const record = Buffer.from(calls[index]!);
          for (const [at, value] of changes) record[at % record.length] = value;
          const transport = bench.transport();
          bench.deliver(transport, cut === null ? record : record.subarray(0, cut % (record.length + 1)));
          await settle();
          expect(transport.finishedRecords).toBe(1);
          expect(transport.replies.length + transport.malformedReasons.length).toBeGreaterThan(0);
        },
      ),
      { numRuns: 1000 },
    );
    expect(bench.faults).toEqual([]);
    expect(bench.memory.liveBlocks).toBe(0);
  });

  it('1000 random records never throw out of the dispatcher', async () => {
    await fc.assert(
      fc.asyncProperty(fc.uint8Array({ maxLength: 200 }), fc.boolean(), async (noise, looksLikeACall) => {
        const record = Buffer.from(noise);
        // Half of them get past the first words.
        if (looksLikeACall && record.length > 24)
          Buffer.from('0000000000000002000186a300000003', 'hex').copy(record, 4);
        const transport = bench.transport();
        bench.deliver(transport, record);
        await settle();
        expect(transport.finishedRecords).toBe(1);
      }),
      { numRuns: 1000 },
    );
    expect(bench.faults).toEqual([]);
    expect(bench.memory.liveBlocks).toBe(0);
  });

  it('every truncation of every call gets GARBAGE_ARGS, AUTH_BADCRED or nothing', async () => {
    for (const call of capturedCalls(bench.handle())) {
      if (call.length > 400) continue;
      for (let end = 0; end < call.length; end++) {
        const transport = bench.transport();
        bench.deliver(transport, call.subarray(0, end));
        await settle();
        const reply = transport.replies[0];
        if (reply === undefined) expect(transport.malformedReasons.length).toBe(1);
        else {
          const view = new DataView(reply.buffer, reply.byteOffset);
          const isDenied = view.getUint32(8) === 1;
          // Denied for AUTH_BADCRED, or accepted with GARBAGE_ARGS; only NULL can succeed, it has no arguments.
          if (isDenied) expect(view.getUint32(16)).toBe(1);
          else if (call.readUInt32BE(20) !== 0) expect(view.getUint32(20)).toBe(4);
        }
      }
    }
    expect(bench.memory.liveBlocks).toBe(0);
  });
});

describe('file handles', () => {
  const getattr = async (handle: Uint8Array) => (await nfs(bench.caller(), GETATTR, { handle })).status;

  it('one flipped bit anywhere makes a handle STALE or BADHANDLE, never another object', async () => {
    const handle = bench.handle();
    expect(handle.length).toBe(32);
    for (let bit = 0; bit < handle.length * 8; bit++) {
      const forged = handle.slice();
      forged[bit >> 3]! ^= 1 << (bit & 7);
      expect(await getattr(forged)).toBe(bit < 16 ? S.NFS3ERR_BADHANDLE : S.NFS3ERR_STALE);
    }
  });

  it('a handle of another key is STALE; after a change of keys the old one is still good', async () => {
    const other = new SipKey(new Uint8Array(16).fill(9));
    const { id, rootHandle } = bench.filesystem;
    const exportId = bench.exports.list()[0]!.id;
    expect(await getattr(new HandleSigner([other]).encode(exportId, id, rootHandle))).toBe(S.NFS3ERR_STALE);
    const own = new SipKey(Uint8Array.from({ length: 16 }, (_, index) => index));
    const rotated = new HandleSigner([other, own]);
    expect(rotated.isSigned(bench.handle())).toBe(true);
    expect(new HandleSigner([other]).isSigned(rotated.encode(exportId, id, rootHandle))).toBe(true);
    expect(new HandleSigner([own]).isSigned(rotated.encode(exportId, id, rootHandle))).toBe(false);
  });

  it('generation 0, which the kernel takes for any, opens nothing but the root', async () => {
    await nfs(bench.caller(), MKDIR, { directory: bench.handle(), name: bytes('d'), attributes: {} });
    const kernel = bench.filesystem.handleOf(bench.filesystem.at('d'));
    kernel.fill(0, 8);
    const forged = bench.signer.encode(bench.exports.list()[0]!.id, bench.filesystem.id, kernel);
    expect(await getattr(forged)).toBe(S.NFS3ERR_STALE);
    expect(await getattr(bench.handle())).toBe(S.NFS3_OK);
  });

  it('of another filesystem, too short, too long or of another version', async () => {
    const { rootHandle } = bench.filesystem;
    const exportId = bench.exports.list()[0]!.id;
    const elsewhere = bench.signer.encode(exportId, new Uint8Array(8).fill(1), rootHandle);
    expect(await getattr(elsewhere)).toBe(S.NFS3ERR_STALE);
    for (const length of [0, 1, 23, 57, 64]) expect(await getattr(new Uint8Array(length))).toBe(S.NFS3ERR_BADHANDLE);
    await expect(getattr(new Uint8Array(65))).rejects.toThrow(/could not decode/);
  });

  it('are the same on both heads, and do not depend on the order of the exports', () => {
    const other = new Bench([rule('/zzz'), rule('/drbd')]);
    other.serve();
    const { id, rootHandle } = bench.filesystem;
    const there = other.signer.encode(other.exports.byPath('/drbd')!.id, id, rootHandle);
    expect(there).toEqual(bench.handle());
  });
});

describe('an export that is not there', () => {
  const getattr = (transport = bench.transport()) =>
    nfs(bench.caller(ROOT_USER, transport), GETATTR, { handle: bench.handle() });
  const entry = () => bench.exports.byPath('/drbd')!;

  it('holds requests until it is served again: no STALE, no error', async () => {
    bench.service.tick(5000);
    entry().withdraw();
    const waiting = getattr();
    await settle();
    expect(entry().waiting).toBe(1);
    bench.service.tick(5900);
    await settle();
    expect(entry().waiting).toBe(1);
    bench.serve();
    expect((await waiting).status).toBe(S.NFS3_OK);
  });

  it('answers JUKEBOX after the hold time, and at once when too many wait', async () => {
    bench.service.tick(5000);
    entry().withdraw();
    const waiting = [1, 2, 3, 4].map(() => getattr());
    await settle();
    expect(entry().waiting).toBe(4);
    expect((await getattr()).status).toBe(S.NFS3ERR_JUKEBOX);
    bench.service.tick(6001);
    for (const one of waiting) expect((await one).status).toBe(S.NFS3ERR_JUKEBOX);
  });

  it('an operation that the withdrawal stopped is run again, not answered STALE', async () => {
    let open = () => {};
    bench.filesystem.gate = new Promise((resolve) => {
      open = resolve;
    });
    const running = getattr();
    await settle();
    const tree = entry().withdraw()!;
    await tree.withdraw();
    open();
    await settle();
    bench.filesystem.isWithdrawn = false;
    bench.serve();
    expect((await running).status).toBe(S.NFS3_OK);
  });

  it('a held request whose connection is gone is not executed any more', async () => {
    entry().withdraw();
    const transport = bench.transport();
    const args = { directory: bench.handle(), name: bytes('d'), attributes: {} };
    const call = nfs(bench.caller(ROOT_USER, transport), MKDIR, args);
    await settle();
    transport.isOpen = false;
    bench.serve();
    await expect(call).rejects.toThrow('no reply');
    expect(bench.filesystem.log).toEqual([]);
    expect(bench.memory.liveBlocks).toBe(0);
  });

  it('holds are STALE once the export leaves the table', async () => {
    entry().withdraw();
    const waiting = getattr();
    await settle();
    bench.exports.replace([]);
    expect((await waiting).status).toBe(S.NFS3ERR_STALE);
  });
});
