import { beforeEach, describe, expect, it } from 'vitest';
import type { RpcCaller } from '../../src/nfs/client.js';
import { type Attributes, FileType, Stability } from '../../src/nfs/filesystem.js';
import { ACCESS } from '../../src/nfs/nfs3/access.js';
import { COMMIT } from '../../src/nfs/nfs3/commit.js';
import { CREATE } from '../../src/nfs/nfs3/create.js';
import { FSINFO } from '../../src/nfs/nfs3/fsinfo.js';
import { FSSTAT } from '../../src/nfs/nfs3/fsstat.js';
import { GETATTR } from '../../src/nfs/nfs3/getattr.js';
import { LINK } from '../../src/nfs/nfs3/link.js';
import { LOOKUP } from '../../src/nfs/nfs3/lookup.js';
import { MKDIR } from '../../src/nfs/nfs3/mkdir.js';
import { MKNOD } from '../../src/nfs/nfs3/mknod.js';
import { PATHCONF } from '../../src/nfs/nfs3/pathconf.js';
import { READ } from '../../src/nfs/nfs3/read.js';
import { READDIR } from '../../src/nfs/nfs3/readdir.js';
import { READDIRPLUS } from '../../src/nfs/nfs3/readdirplus.js';
import { READLINK } from '../../src/nfs/nfs3/readlink.js';
import { REMOVE } from '../../src/nfs/nfs3/remove.js';
import { RENAME } from '../../src/nfs/nfs3/rename.js';
import { RMDIR } from '../../src/nfs/nfs3/rmdir.js';
import { SETATTR } from '../../src/nfs/nfs3/setattr.js';
import { SYMLINK } from '../../src/nfs/nfs3/symlink.js';
import { WRITE } from '../../src/nfs/nfs3/write.js';
import { NfsStatus as S } from '../../src/nfs/status.js';
import { AuthStatus } from '../../src/rpc/auth.js';
import { Bench, bytes, nfs, ROOT_USER, rule } from '../support/nfs-bench.js';

let bench: Bench;
let caller: RpcCaller;
let root: Uint8Array;
const USER = { ...ROOT_USER, uid: 1000, gid: 1000 };
const NO_VERIFIER = new Uint8Array(8);

beforeEach(() => {
  bench = new Bench();
  bench.serve();
  caller = bench.caller();
  root = bench.handle();
});

const create = (name: string, mode = 0o644) =>
  nfs(caller, CREATE, { directory: root, name: bytes(name), how: { kind: 'unchecked', attributes: { mode } } });
const mkdir = (name: string) => nfs(caller, MKDIR, { directory: root, name: bytes(name), attributes: { mode: 0o755 } });
const write = (handle: Uint8Array, text: string, stability: number = Stability.FILE_SYNC, offsetBytes = 0) =>
  nfs(caller, WRITE, { handle, offsetBytes, count: text.length, stability, data: bytes(text), address: 0 });
const read = (handle: Uint8Array, offsetBytes: number, count: number) =>
  nfs(caller, READ, { handle, offsetBytes, count });
const text = (data: Uint8Array | undefined) => new TextDecoder().decode(data);

describe('files', () => {
  it('CREATE, WRITE, READ, GETATTR: what is written is read, with attributes after each', async () => {
    const created = await create('a', 0o640);
    expect(created).toMatchObject({ status: S.NFS3_OK, attributes: { type: FileType.REG, mode: 0o640, uid: 0 } });
    expect(created.wcc.before).toBeDefined();
    expect(created.wcc.after!.mtime).not.toEqual(created.wcc.before!.mtime);
    const handle = created.handle!;
    const written = await write(handle, 'hello world');
    expect(written).toMatchObject({ status: S.NFS3_OK, count: 11, committed: Stability.FILE_SYNC });
    expect(written.wcc.before!.sizeBytes).toBe(0);
    expect(written.wcc.after!.sizeBytes).toBe(11);
    const part = await read(handle, 6, 3);
    expect([text(part.data), part.count, part.eof]).toEqual(['wor', 3, false]);
    const rest = await read(handle, 6, 100);
    expect([text(rest.data), rest.count, rest.eof]).toEqual(['world', 5, true]);
    expect(rest.attributes!.sizeBytes).toBe(11);
    const beyond = await read(handle, Number.MAX_SAFE_INTEGER, 100);
    expect([beyond.status, beyond.count, beyond.eof]).toEqual([S.NFS3_OK, 0, true]);
    const got = await nfs(caller, GETATTR, { handle });
    expect(got.attributes).toMatchObject({ sizeBytes: 11, fsid: 0x0102030405060708n });
    expect(bench.memory.liveBlocks).toBe(0);
  });

  it('READ gives back its pool block and pads with zeroes', async () => {
    const { handle } = await create('a');
    await write(handle!, 'abcde');
    const transport = bench.transport();
    const reply = await (async () => {
      await nfs(bench.caller(ROOT_USER, transport), READ, { handle: handle!, offsetBytes: 0, count: 5 });
      return transport.replies.at(-1)!;
    })();
    expect(Buffer.from(reply.subarray(-8)).toString('latin1')).toBe('abcde\0\0\0');
    expect(bench.memory.liveBlocks).toBe(0);
  });

  it('READ is clipped to 1 MiB; directories are ISDIR, others INVAL', async () => {
    const { handle } = await create('a');
    await nfs(caller, SETATTR, { handle: handle!, changes: { sizeBytes: 3_000_000 }, guard: undefined });
    expect((await read(handle!, 0, 0xffffffff)).count).toBe(1048576);
    expect((await read(root, 0, 10)).status).toBe(S.NFS3ERR_ISDIR);
    await nfs(caller, MKNOD, {
      ...{ directory: root, name: bytes('p'), type: FileType.FIFO, attributes: {}, rdevMajor: 0, rdevMinor: 0 },
    });
    expect((await read(bench.handle('p'), 0, 10)).status).toBe(S.NFS3ERR_INVAL);
  });

  it('WRITE with a count above its data is INVAL, with one below writes that much', async () => {
    const { handle } = await create('a');
    const args = { handle: handle!, offsetBytes: 0, stability: Stability.UNSTABLE, data: bytes('abc'), address: 0 };
    expect((await nfs(caller, WRITE, { ...args, count: 4 })).status).toBe(S.NFS3ERR_INVAL);
    expect(await nfs(caller, WRITE, { ...args, count: 2 })).toMatchObject({ count: 2, committed: 0 });
    expect(bench.filesystem.text('a')).toBe('ab');
  });

  it('the write verifier is the same in WRITE and COMMIT, and another after the next start', async () => {
    const { handle } = await create('a');
    const written = await write(handle!, 'x', Stability.UNSTABLE);
    const committed = await nfs(caller, COMMIT, { handle: handle!, offsetBytes: 0, count: 0 });
    expect(committed.verifier).toEqual(written.verifier);
    bench.exports.byPath('/drbd')!.withdraw();
    bench.serve();
    expect((await write(handle!, 'x', Stability.UNSTABLE)).verifier).not.toEqual(written.verifier);
  });

  it('a COMMIT that fails changes the verifier: everybody sends again', async () => {
    const { handle } = await create('a');
    const written = await write(handle!, 'x', Stability.UNSTABLE);
    bench.filesystem.failNext = 5;
    const failed = await nfs(caller, COMMIT, { handle: handle!, offsetBytes: 0, count: 0 });
    expect([failed.status, failed.verifier]).toEqual([S.NFS3ERR_IO, undefined]);
    const next = await nfs(caller, COMMIT, { handle: handle!, offsetBytes: 0, count: 0 });
    expect(next.verifier).not.toEqual(written.verifier);
  });

  it('CREATE: guarded refuses what is there, exclusive takes its own file again and no other', async () => {
    const how = (kind: 'guarded' | 'unchecked') => ({ kind, attributes: { mode: 0o600 } });
    const args = { directory: root, name: bytes('a') };
    expect((await nfs(caller, CREATE, { ...args, how: how('guarded') })).status).toBe(S.NFS3_OK);
    expect((await nfs(caller, CREATE, { ...args, how: how('guarded') })).status).toBe(S.NFS3ERR_EXIST);
    expect((await nfs(caller, CREATE, { ...args, how: how('unchecked') })).status).toBe(S.NFS3_OK);
    const exclusive = (last: number) => ({
      ...{ directory: root, name: bytes('x') },
      how: { kind: 'exclusive' as const, verifier: Uint8Array.of(1, 2, 3, 4, 5, 6, 7, last) },
    });
    const first = await nfs(caller, CREATE, exclusive(8));
    const again = await nfs(caller, CREATE, exclusive(8));
    expect([first.status, again.status]).toEqual([S.NFS3_OK, S.NFS3_OK]);
    expect(again.handle).toEqual(first.handle);
    const other = await nfs(caller, CREATE, exclusive(9));
    expect(other.status).toBe(S.NFS3ERR_EXIST);
    expect(other.wcc.after).toBeDefined();
  });

  it('SETATTR changes what it says, checks its guard, and refuses impossible times', async () => {
    const { handle, attributes } = await create('a');
    const changes = { mode: 0o600, uid: 1000, gid: 100, sizeBytes: 10, mtime: { seconds: 981176706, nanoseconds: 5 } };
    const wrongGuard = { seconds: 1, nanoseconds: 1 };
    const refused = await nfs(caller, SETATTR, { handle: handle!, changes, guard: wrongGuard });
    expect(refused.status).toBe(S.NFS3ERR_NOT_SYNC);
    expect(refused.wcc.after).toBeDefined();
    const done = await nfs(caller, SETATTR, { handle: handle!, changes, guard: attributes!.ctime });
    expect(done.status).toBe(S.NFS3_OK);
    expect(done.wcc.after).toMatchObject(changes);
    const bad = { mtime: { seconds: 1, nanoseconds: 1_000_000_000 } };
    expect((await nfs(caller, SETATTR, { handle: handle!, changes: bad, guard: undefined })).status).toBe(
      S.NFS3ERR_INVAL,
    );
  });

  it('ACCESS answers the bits asked for and no others', async () => {
    const { handle } = await create('a', 0o640);
    expect((await nfs(caller, ACCESS, { handle: handle!, mask: 0xffffffff })).granted & ~0x3f).toBe(0);
    const user = bench.caller(USER);
    const answer = await nfs(user, ACCESS, { handle: handle!, mask: 0x3f });
    expect([answer.status, answer.granted]).toEqual([S.NFS3_OK, 0]);
    expect((await nfs(caller, ACCESS, { handle: handle!, mask: 1 })).granted).toBe(1);
  });

  it('SYMLINK and READLINK keep the target; READLINK of a file is INVAL', async () => {
    const made = await nfs(caller, SYMLINK, {
      ...{ directory: root, name: bytes('s'), target: bytes('../../etc/passwd'), attributes: {} },
    });
    expect(made.status).toBe(S.NFS3_OK);
    expect(text((await nfs(caller, READLINK, { handle: made.handle! })).target)).toBe('../../etc/passwd');
    const { handle } = await create('a');
    expect((await nfs(caller, READLINK, { handle: handle! })).status).toBe(S.NFS3ERR_INVAL);
    const long = { directory: root, name: bytes('t'), target: new Uint8Array(4096).fill(65), attributes: {} };
    expect((await nfs(caller, SYMLINK, long)).status).toBe(S.NFS3ERR_NAMETOOLONG);
    expect((await nfs(caller, SYMLINK, { ...long, target: bytes('') })).status).toBe(S.NFS3ERR_INVAL);
  });

  it('MKNOD: pipes for anybody, devices for root, nothing else', async () => {
    const base = { directory: root, name: bytes('n'), attributes: { mode: 0o600 }, rdevMajor: 0, rdevMinor: 0 };
    const user = bench.caller(USER);
    const device = { ...base, type: FileType.CHR, rdevMajor: 1, rdevMinor: 3 };
    expect((await nfs(user, MKNOD, device)).status).toBe(S.NFS3ERR_PERM);
    expect((await nfs(caller, MKNOD, device)).attributes).toMatchObject({ type: 4, rdevMajor: 1, rdevMinor: 3 });
    expect((await nfs(user, MKNOD, { ...base, name: bytes('p'), type: FileType.FIFO })).status).toBe(S.NFS3_OK);
    expect((await nfs(caller, MKNOD, { ...base, name: bytes('d'), type: FileType.DIR })).status).toBe(
      S.NFS3ERR_BADTYPE,
    );
    expect((await nfs(caller, MKNOD, { ...device, name: bytes('m'), rdevMajor: 4096 })).status).toBe(S.NFS3ERR_INVAL);
  });
});

describe('names', () => {
  it('LOOKUP finds, and .. of the export root is the root', async () => {
    await mkdir('d');
    const directory = (await nfs(caller, LOOKUP, { directory: root, name: bytes('d') })).handle!;
    expect((await nfs(caller, LOOKUP, { directory, name: bytes('..') })).handle).toEqual(root);
    expect((await nfs(caller, LOOKUP, { directory: root, name: bytes('..') })).handle).toEqual(root);
    expect((await nfs(caller, LOOKUP, { directory: root, name: bytes('.') })).handle).toEqual(root);
  });

  it('bad names have statuses, with attributes of the directory', async () => {
    const lookup = (name: Uint8Array) => nfs(caller, LOOKUP, { directory: root, name });
    for (const [name, status] of [
      [bytes('nosuch'), S.NFS3ERR_NOENT],
      [bytes(''), S.NFS3ERR_INVAL],
      [bytes('a\0b'), S.NFS3ERR_INVAL],
      [bytes('a/b'), S.NFS3ERR_ACCES],
      [new Uint8Array(256).fill(65), S.NFS3ERR_NAMETOOLONG],
    ] as const) {
      const result = await lookup(name);
      expect(result.status).toBe(status);
      expect(result.directory).toBeDefined();
    }
    const { handle } = await create('f');
    expect((await nfs(caller, LOOKUP, { directory: handle!, name: bytes('x') })).status).toBe(S.NFS3ERR_NOTDIR);
    for (const special of ['.', '..']) {
      expect((await create(special)).status).toBe(S.NFS3ERR_EXIST);
      expect((await mkdir(special)).status).toBe(S.NFS3ERR_EXIST);
      expect((await nfs(caller, REMOVE, { directory: root, name: bytes(special) })).status).toBe(S.NFS3ERR_INVAL);
    }
    expect((await nfs(caller, RMDIR, { directory: root, name: bytes('.') })).status).toBe(S.NFS3ERR_INVAL);
    expect((await nfs(caller, RMDIR, { directory: root, name: bytes('..') })).status).toBe(S.NFS3ERR_NOTEMPTY);
  });

  it('REMOVE and RMDIR know files from directories; a removed file is STALE', async () => {
    const { handle } = await create('f');
    await mkdir('d');
    expect((await nfs(caller, REMOVE, { directory: root, name: bytes('d') })).status).toBe(S.NFS3ERR_ISDIR);
    expect((await nfs(caller, RMDIR, { directory: root, name: bytes('f') })).status).toBe(S.NFS3ERR_NOTDIR);
    const inside = { directory: bench.handle('d'), name: bytes('x') };
    await nfs(caller, CREATE, { ...inside, how: { kind: 'unchecked', attributes: {} } });
    expect((await nfs(caller, RMDIR, { directory: root, name: bytes('d') })).status).toBe(S.NFS3ERR_NOTEMPTY);
    expect((await nfs(caller, REMOVE, inside)).status).toBe(S.NFS3_OK);
    expect((await nfs(caller, RMDIR, { directory: root, name: bytes('d') })).status).toBe(S.NFS3_OK);
    expect((await nfs(caller, REMOVE, { directory: root, name: bytes('f') })).status).toBe(S.NFS3_OK);
    expect((await nfs(caller, GETATTR, { handle: handle! })).status).toBe(S.NFS3ERR_STALE);
  });

  it('RENAME moves, replaces, and keeps the handle good', async () => {
    const { handle } = await create('a');
    await mkdir('d');
    const to = { directory: bench.handle('d'), name: bytes('b') };
    const moved = await nfs(caller, RENAME, { from: { directory: root, name: bytes('a') }, to });
    expect(moved.status).toBe(S.NFS3_OK);
    expect(moved.from.after).toBeDefined();
    expect(moved.to.before).toBeDefined();
    expect((await nfs(caller, GETATTR, { handle: handle! })).status).toBe(S.NFS3_OK);
    expect((await nfs(caller, RENAME, { from: { directory: root, name: bytes('a') }, to })).status).toBe(
      S.NFS3ERR_NOENT,
    );
    expect((await nfs(caller, RENAME, { from: { directory: root, name: bytes('..') }, to })).status).toBe(
      S.NFS3ERR_INVAL,
    );
  });

  it('LINK adds a name; directories cannot have two', async () => {
    const { handle } = await create('a');
    const linked = await nfs(caller, LINK, { handle: handle!, directory: root, name: bytes('l') });
    expect([linked.status, linked.attributes!.linkCount]).toEqual([S.NFS3_OK, 2]);
    expect((await nfs(caller, LINK, { handle: handle!, directory: root, name: bytes('l') })).status).toBe(
      S.NFS3ERR_EXIST,
    );
    await mkdir('d');
    const directory = await nfs(caller, LINK, { handle: bench.handle('d'), directory: root, name: bytes('e') });
    expect(directory.status).toBe(S.NFS3ERR_ISDIR);
  });
});

describe('listings', () => {
  async function listAll(count: number): Promise<string[]> {
    const names: string[] = [];
    let cookie = 0n;
    let verifier: Uint8Array = NO_VERIFIER;
    for (let round = 0; round < 1000; round++) {
      const result = await nfs(caller, READDIR, { directory: root, cookie, verifier, count });
      expect(result.status).toBe(S.NFS3_OK);
      names.push(...result.entries.map((entry) => text(entry.name)));
      if (result.eof) return names;
      cookie = result.entries.at(-1)!.cookie;
      verifier = result.verifier;
    }
    throw new Error('endless listing');
  }

  it('READDIR in pieces of any size gives every name once', async () => {
    for (let i = 0; i < 50; i++) await create(`file-${i}`);
    const expected = ['.', '..', ...Array.from({ length: 50 }, (_, i) => `file-${i}`)].sort();
    for (const count of [200, 512, 1000, 65536, 0xffffffff]) expect((await listAll(count)).sort()).toEqual(expected);
  });

  it('a reply never exceeds the size asked for, and one that holds nothing is TOOSMALL', async () => {
    for (let i = 0; i < 50; i++) await create(`file-${i}`);
    const transport = bench.transport();
    const limited = bench.caller(ROOT_USER, transport);
    for (const count of [0, 100, 200, 777, 4096]) {
      const result = await nfs(limited, READDIR, { directory: root, cookie: 0n, verifier: NO_VERIFIER, count });
      if (count < 132) expect(result.status).toBe(S.NFS3ERR_TOOSMALL);
      else {
        // 24 bytes of RPC header, 4 of status.
        expect(transport.replies.at(-1)!.length - 28).toBeLessThanOrEqual(count);
        expect(result.entries.length).toBeGreaterThan(0);
      }
      const plus = { directory: root, cookie: 0n, verifier: NO_VERIFIER, directoryCount: count, maxCount: count };
      const resultPlus = await nfs(limited, READDIRPLUS, plus);
      if (count < 300) expect(resultPlus.status).toBe(S.NFS3ERR_TOOSMALL);
      else expect(transport.replies.at(-1)!.length - 28).toBeLessThanOrEqual(count);
    }
  });

  it('a reply does not end inside a group of entries with one position', async () => {
    const entry = (name: string, cookie: bigint) => ({ fileId: 1n, name: bytes(name), cookie });
    const entries = [entry('a', 10n), entry('b', 20n), entry('c', 20n), entry('d', 20n), entry('e', 30n)];
    bench.filesystem.readdir = async () => ({ errno: 0, entries, eof: true });
    // Without directory attributes in the reply the sums differ; the bound counts them all the same: 104 + 28 each.
    const answer = (count: number) =>
      nfs(caller, READDIR, { directory: root, cookie: 0n, verifier: NO_VERIFIER, count });
    const names = async (count: number) => (await answer(count)).entries.map((one) => text(one.name)).join('');
    expect(await names(104 + 28 * 4)).toBe('ab');
    expect(await names(104 + 28 * 3)).toBe('ab');
    expect(await names(104 + 28 * 2)).toBe('ab');
    expect(await names(104 + 28 * 5)).toBe('abcde');
  });

  it('READDIRPLUS has handles that work, and none for what is above the export', async () => {
    await create('a');
    const args = { directory: root, cookie: 0n, verifier: NO_VERIFIER, directoryCount: 8192, maxCount: 8192 };
    const { entries, eof } = await nfs(caller, READDIRPLUS, args);
    expect(eof).toBe(true);
    const byName = new Map(entries.map((entry) => [text(entry.name), entry]));
    expect(byName.get('..')).toMatchObject({ handle: undefined, attributes: undefined });
    const { attributes } = await nfs(caller, GETATTR, { handle: byName.get('a')!.handle! });
    expect(attributes).toEqual(byName.get('a')!.attributes as Attributes);
  });

  it('a verifier that is neither zero nor ours, and a position that cannot be, are BAD_COOKIE', async () => {
    const args = { directory: root, cookie: 5n, count: 4096 };
    expect((await nfs(caller, READDIR, { ...args, verifier: new Uint8Array(8).fill(9) })).status).toBe(
      S.NFS3ERR_BAD_COOKIE,
    );
    const negative = { ...args, cookie: 2n ** 64n - 1n, verifier: NO_VERIFIER };
    expect((await nfs(caller, READDIR, negative)).status).toBe(S.NFS3ERR_BAD_COOKIE);
  });

  it('READDIRPLUS of a nordirplus export is NOTSUPP', async () => {
    bench.exports.replace([rule('/drbd', { readdirPlus: false })]);
    const args = { directory: root, cookie: 0n, verifier: NO_VERIFIER, directoryCount: 8192, maxCount: 8192 };
    expect((await nfs(caller, READDIRPLUS, args)).status).toBe(S.NFS3ERR_NOTSUPP);
  });
});

describe('the filesystem', () => {
  it('FSSTAT, FSINFO, PATHCONF', async () => {
    expect(await nfs(caller, FSSTAT, { handle: root })).toMatchObject({
      ...{ status: 0, totalBytes: 4096000, freeBytes: 900 * 4096, availableBytes: 850 * 4096, totalFiles: 500 },
    });
    const { limits } = await nfs(caller, FSINFO, { handle: root });
    expect(limits).toMatchObject({ readMax: 1048576, writeMax: 1048576, properties: 0x1b, directoryPreferred: 65536 });
    expect(limits!.maxFileSize).toBe(2n ** 44n - 4096n);
    expect(await nfs(caller, PATHCONF, { handle: root })).toMatchObject({
      linkMax: 65000,
      nameMax: 255,
      noTrunc: true,
    });
  });

  it('a sync export asks for durability, an async one does not but promises it', async () => {
    const { handle } = await create('a');
    await write(handle!, 'x', Stability.FILE_SYNC);
    bench.exports.replace([rule('/drbd', { sync: false })]);
    await mkdir('d');
    const result = await write(handle!, 'y', Stability.FILE_SYNC);
    expect(result.committed).toBe(Stability.FILE_SYNC);
    expect(bench.filesystem.log).toEqual([
      'create a unchecked durable=true',
      'write 0+1 stability=2',
      'mkdir d durable=false',
      'write 0+1 stability=0',
    ]);
  });
});

describe('exports', () => {
  it('a read-only export is ROFS for every change, and ACCESS says so', async () => {
    const { handle } = await create('a');
    bench.exports.replace([rule('/drbd', { writable: false })]);
    const name = bytes('n');
    const refused = [
      await create('b'),
      await mkdir('d'),
      await write(handle!, 'x'),
      await nfs(caller, SETATTR, { handle: handle!, changes: { mode: 0 }, guard: undefined }),
      await nfs(caller, SYMLINK, { directory: root, name, target: name, attributes: {} }),
      await nfs(caller, REMOVE, { directory: root, name: bytes('a') }),
      await nfs(caller, RMDIR, { directory: root, name }),
      await nfs(caller, LINK, { handle: handle!, directory: root, name }),
      await nfs(caller, RENAME, { from: { directory: root, name: bytes('a') }, to: { directory: root, name } }),
      await nfs(caller, MKNOD, { directory: root, name, type: 7, attributes: {}, rdevMajor: 0, rdevMinor: 0 }),
    ];
    expect(refused.map((result) => result.status)).toEqual(refused.map(() => S.NFS3ERR_ROFS));
    expect((await nfs(caller, ACCESS, { handle: root, mask: 0x3f })).granted).toBe(1 | 2);
    expect((await read(handle!, 0, 1)).status).toBe(S.NFS3_OK);
  });

  it('root is squashed: a root-owned 0600 file is closed to it', async () => {
    const { handle } = await create('secret', 0o600);
    bench.exports.replace([rule('/drbd', { rootSquash: true })]);
    expect((await read(handle!, 0, 1)).status).toBe(S.NFS3ERR_ACCES);
    const made = await create('mine');
    expect(made.attributes).toMatchObject({ uid: 65534, gid: 65534 });
  });

  it('an address that matches nothing is refused, also with a good handle', async () => {
    bench.exports.replace([rule('/drbd', {}, { optionsFor: () => undefined })]);
    expect((await nfs(caller, GETATTR, { handle: root })).status).toBe(S.NFS3ERR_ACCES);
  });

  it('a secure export refuses source ports above 1023; one with sec=sys refuses AUTH_NONE', async () => {
    bench.exports.replace([rule('/drbd', { secure: true })]);
    const high = bench.caller(ROOT_USER, bench.transport('10.0.0.1', 1024));
    await expect(nfs(high, GETATTR, { handle: root })).rejects.toThrow(/below 1024/);
    expect((await nfs(caller, GETATTR, { handle: root })).status).toBe(S.NFS3_OK);
    expect(AuthStatus.AUTH_TOOWEAK).toBe(5);
  });

  it('an export that left the table is STALE at once', async () => {
    bench.exports.replace([rule('/other')]);
    expect((await nfs(caller, GETATTR, { handle: root })).status).toBe(S.NFS3ERR_STALE);
  });

  it('two exports with one identity are refused as a whole, and the old table stays', () => {
    const clash = [rule('/a', {}, { fsid: 7 }), rule('/b', {}, { fsid: 7 })];
    expect(() => bench.exports.replace(clash)).toThrow(/same identity/);
    expect(bench.exports.byPath('/drbd')).toBeDefined();
  });

  it('RENAME and LINK across exports are XDEV', async () => {
    bench = new Bench([rule('/drbd'), rule('/other')]);
    bench.serve();
    const other = new (bench.filesystem.constructor as new (memory: unknown) => typeof bench.filesystem)(bench.memory);
    bench.serve('/other', other);
    caller = bench.caller();
    root = bench.handle();
    const { handle } = await create('a');
    const there = bench.signer.encode(bench.exports.byPath('/other')!.id, other.id, other.rootHandle);
    const from = { directory: root, name: bytes('a') };
    const to = { directory: there, name: bytes('a') };
    expect((await nfs(caller, RENAME, { from, to })).status).toBe(S.NFS3ERR_XDEV);
    expect((await nfs(caller, LINK, { handle: handle!, ...to })).status).toBe(S.NFS3ERR_XDEV);
  });
});
