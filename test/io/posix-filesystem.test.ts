import { spawnSync } from 'node:child_process';
import {
  chmodSync,
  chownSync,
  closeSync,
  linkSync,
  lstatSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
  truncateSync,
  unlinkSync,
  writeFileSync,
} from 'node:fs';
import { join, resolve } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { NativeRing } from '../../src/io/native-ring.js';
import { LAYOUT, openPosixFileSystem, type PosixFileSystem } from '../../src/io/posix-filesystem.js';
import { NO_PAYLOAD } from '../../src/io/ring.js';
import {
  type CreateOutcome,
  type Credential,
  type DirectoryEntry,
  FileType,
  type KernelHandle,
  type SetAttributes,
  Stability,
  type Wcc,
} from '../../src/nfs/filesystem.js';
import { canMountImages, Ext4Image, run } from '../support/ext4-image.js';

const E = {
  ...{ PERM: 1, NOENT: 2, ACCES: 13, EXIST: 17, NOTDIR: 20, ISDIR: 21, INVAL: 22, FBIG: 27, NOSPC: 28, ROFS: 30 },
  ...{ NAMETOOLONG: 36, NOTEMPTY: 39, OPNOTSUPP: 95, STALE: 116, NOTSYNC: 522, BADCOOKIE: 523, BADTYPE: 527 },
};
const ROOT: Credential = { uid: 0, gid: 0, groups: [] };
const USER: Credential = { uid: 1000, gid: 1000, groups: [] };
const OTHER: Credential = { uid: 2000, gid: 2000, groups: [] };

const bytes = (text: string): Uint8Array => Buffer.from(text);
const text = (data: Uint8Array | undefined): string => Buffer.from(data ?? []).toString();

describe('the request block', () => {
  it('has the same numbers in layout.rs and posix-filesystem.ts', () => {
    const source = readFileSync(resolve(import.meta.dirname, '../../native/src/posix_fs/layout.rs'), 'utf8');
    const rust = Object.fromEntries(
      [...source.matchAll(/^pub const (\w+): (?:usize|u32) = (\d+);/gm)].map((match) => [match[1], Number(match[2])]),
    );
    expect(rust).toEqual(LAYOUT);
  });
});

describe.runIf(canMountImages())('the filesystem door over ext4', () => {
  let image: Ext4Image;
  let ring: NativeRing;
  let fs: PosixFileSystem;
  /** A folder of the test's own, mode 0777, and its handle. */
  let folder: string;
  let root: KernelHandle;
  let tests = 0;

  beforeAll(async () => {
    image = Ext4Image.make();
    image.mount();
    ring = new NativeRing({ poolBytes: 128 * 1024 * 1024 });
    fs = await openPosixFileSystem(ring, image.mountPoint, { workers: 4 });
  });

  afterAll(async () => {
    await fs?.withdraw();
    ring?.close();
    image?.unmount();
    image?.dispose();
  });

  async function fresh(): Promise<void> {
    const name = `t${++tests}`;
    folder = join(image.mountPoint, name);
    mkdirSync(folder);
    chmodSync(folder, 0o777);
    root = await handleOf(fs.rootHandle, name);
  }

  async function handleOf(directory: KernelHandle, name: string): Promise<KernelHandle> {
    const found = await fs.lookup(ROOT, directory, bytes(name));
    expect(found.errno, `lookup of ${name}`).toBe(0);
    return found.handle!;
  }

  /** Makes a file behind the server's back and returns its handle. */
  async function file(name: string, content = '', mode = 0o644, owner = 0): Promise<KernelHandle> {
    const path = join(folder, name);
    writeFileSync(path, content);
    chownSync(path, owner, owner);
    chmodSync(path, mode);
    return handleOf(root, name);
  }

  async function write(
    who: Credential,
    handle: KernelHandle,
    offset: number,
    data: Uint8Array,
    stability: number = Stability.UNSTABLE,
  ) {
    const block = ring.memory.allocate(Math.max(1, data.length));
    ring.memory.bytes.set(data, block);
    const written = await fs.write(who, handle, offset, block, data.length, stability);
    ring.memory.release(block);
    return written;
  }

  async function read(who: Credential, handle: KernelHandle, offset: number, count: number) {
    const { payload, ...outcome } = await fs.read(who, handle, offset, count);
    const data = payload === NO_PAYLOAD ? '' : text(ring.memory.bytes.slice(payload, payload + outcome.count));
    if (payload !== NO_PAYLOAD) ring.memory.release(payload);
    return { ...outcome, data };
  }

  async function list(directory: KernelHandle, most = 1000, plus = false): Promise<DirectoryEntry[]> {
    const entries: DirectoryEntry[] = [];
    for (let cookie = 0n; ; ) {
      const part = await fs.readdir(ROOT, directory, cookie, most, plus);
      expect(part.errno).toBe(0);
      entries.push(...part.entries);
      if (part.eof) return entries;
      expect(part.entries.length).toBeGreaterThan(0);
      cookie = part.entries.at(-1)!.cookie;
    }
  }

  const unchecked = (attributes: SetAttributes) => ({ kind: 'unchecked', attributes }) as const;
  const guarded = (attributes: SetAttributes) => ({ kind: 'guarded', attributes }) as const;

  // ---- objects and names -------------------------------------------------------------------------------------------

  it('tells attributes as stat(1) does', async () => {
    await fresh();
    const handle = await file('a', 'hello', 0o4751, 1000);
    const { attributes } = await fs.getattr(handle);
    const [inode, mode, links, uid, gid, size, blocks, atime, mtime, ctime] = run(
      'stat',
      '--format=%i %a %h %u %g %s %b %.9X %.9Y %.9Z',
      join(folder, 'a'),
    )
      .trim()
      .split(' ');
    const time = (text: string | undefined) => {
      const [seconds, nanoseconds] = text!.split('.');
      return { seconds: Number(seconds), nanoseconds: Number(nanoseconds) };
    };
    expect(attributes).toEqual({
      type: FileType.REG,
      mode: Number.parseInt(mode!, 8),
      linkCount: Number(links),
      uid: Number(uid),
      gid: Number(gid),
      sizeBytes: Number(size),
      usedBytes: Number(blocks) * 512,
      rdevMajor: 0,
      rdevMinor: 0,
      fileId: BigInt(inode!),
      atime: time(atime),
      mtime: time(mtime),
      ctime: time(ctime),
    });
  });

  it('has an identity from the UUID and the limits of ext4', async () => {
    const hex = run('stat', '--file-system', '--format=%i', image.mountPoint).trim().padStart(16, '0');
    const words = Buffer.alloc(8);
    // stat prints the two words as one number, the first as the high half.
    words.writeUInt32LE(Number.parseInt(hex.slice(0, 8), 16), 0);
    words.writeUInt32LE(Number.parseInt(hex.slice(8), 16), 4);
    const swapped = Buffer.concat([words.subarray(4), words.subarray(0, 4)]);
    expect([words.toString('hex'), swapped.toString('hex')]).toContain(Buffer.from(fs.id).toString('hex'));
    expect(Buffer.from(fs.rootHandle).toString('hex')).toBe('010000000200000000000000');
    const limits = await fs.pathconf(fs.rootHandle);
    expect(limits).toMatchObject({ errno: 0, linkMax: 65000, nameMax: 255 });
    await expectLargest(fs);
    const small = Ext4Image.make(8, '-b', '1024');
    let there: PosixFileSystem | undefined;
    try {
      small.mount();
      there = await openPosixFileSystem(ring, small.mountPoint, { workers: 1 });
      await expectLargest(there);
    } finally {
      await there?.withdraw();
      small.unmount();
      small.dispose();
    }
  });

  /** `maxFileSizeBytes` is a possible size, and one byte more is not. */
  async function expectLargest(there: PosixFileSystem): Promise<void> {
    const made = await there.create(ROOT, there.rootHandle, bytes('largest'), guarded({ mode: 0o600 }), false);
    const grow = (sizeBytes: number) => there.setattr(ROOT, made.handle!, { sizeBytes }, undefined, false);
    expect((await grow(there.maxFileSizeBytes)).errno, 'the largest size').toBe(0);
    expect((await grow(there.maxFileSizeBytes + 1)).errno, 'one byte more').toBe(E.FBIG);
    await there.remove(ROOT, there.rootHandle, bytes('largest'), false);
  }

  it('counts space as df does', async () => {
    const [total, free, available, files, freeFiles] = run('stat', '-f', '--format=%b %f %a %c %d %S', image.mountPoint)
      .trim()
      .split(' ')
      .map(Number);
    const unit = Number(run('stat', '-f', '--format=%S', image.mountPoint));
    const told = await fs.fsstat(ROOT, fs.rootHandle);
    expect(told).toMatchObject({
      ...{ errno: 0, totalBytes: total! * unit, freeBytes: free! * unit, availableBytes: available! * unit },
      ...{ totalFiles: files, freeFiles, availableFiles: freeFiles },
    });
  });

  it('looks names up, . and .. too, and stays inside the export', async () => {
    await fresh();
    mkdirSync(join(folder, 'd'));
    const inner = await handleOf(root, 'd');
    expect(await handleOf(inner, '.')).toEqual(inner);
    expect(await handleOf(inner, '..')).toEqual(root);
    expect(await handleOf(fs.rootHandle, '..')).toEqual(fs.rootHandle);
    expect(await handleOf(fs.rootHandle, '.')).toEqual(fs.rootHandle);
    const missing = await fs.lookup(ROOT, root, bytes('missing'));
    expect(missing.errno).toBe(E.NOENT);
    expect(missing.directory?.type, 'the directory is told on errors too').toBe(FileType.DIR);
    expect((await fs.lookup(ROOT, root, bytes('x'.repeat(255)))).errno).toBe(E.NOENT);
    expect((await fs.lookup(ROOT, root, bytes('x'.repeat(256)))).errno).toBe(E.NAMETOOLONG);
    expect((await fs.lookup(ROOT, root, bytes('x'.repeat(4000)))).errno).toBe(E.NAMETOOLONG);
    for (const bad of ['', 'd/d', '/', 'd\0'])
      expect((await fs.lookup(ROOT, root, bytes(bad))).errno, JSON.stringify(bad)).toBe(E.INVAL);
    const plain = await file('plain');
    expect((await fs.lookup(ROOT, plain, bytes('x'))).errno).toBe(E.NOTDIR);
  });

  it('does not follow links and does not enter other mounts', async () => {
    await fresh();
    symlinkSync('/etc', join(folder, 'link'));
    const link = await fs.lookup(ROOT, root, bytes('link'));
    expect(link.attributes?.type).toBe(FileType.LNK);
    expect(text((await fs.readlink(USER, link.handle!)).target)).toBe('/etc');
    expect((await fs.lookup(ROOT, link.handle!, bytes('passwd'))).errno).toBe(E.NOTDIR);
    expect((await fs.readlink(ROOT, root)).errno).toBe(E.INVAL);
    mkdirSync(join(folder, 'covered'));
    run('mount', '-t', 'tmpfs', 'none', join(folder, 'covered'));
    try {
      expect((await fs.lookup(ROOT, root, bytes('covered'))).errno).toBe(E.ACCES);
      const entry = (await list(root, 10, true)).find(({ name }) => text(name) === 'covered')!;
      expect([entry.handle, entry.attributes]).toEqual([undefined, undefined]);
    } finally {
      run('umount', join(folder, 'covered'));
    }
  });

  // ---- handles -----------------------------------------------------------------------------------------------------

  it('keeps handles good over renames, and stale after the last unlink', async () => {
    await fresh();
    const handle = await file('a', 'content');
    renameSync(join(folder, 'a'), join(image.mountPoint, `moved${tests}`));
    expect((await read(ROOT, handle, 0, 100)).data).toBe('content');
    linkSync(join(image.mountPoint, `moved${tests}`), join(folder, 'second'));
    unlinkSync(join(image.mountPoint, `moved${tests}`));
    expect((await fs.getattr(handle)).attributes?.linkCount).toBe(1);
    const held = openSync(join(folder, 'second'), 'r');
    unlinkSync(join(folder, 'second'));
    // Still open somewhere: the inode lives, with no name.
    expect((await fs.getattr(handle)).errno).toBe(E.STALE);
    closeSync(held);
    for (const answer of [
      await fs.getattr(handle),
      await read(ROOT, handle, 0, 1),
      await write(ROOT, handle, 0, bytes('x')),
      await fs.commit(ROOT, handle),
      await fs.access(ROOT, handle, 63),
      await fs.setattr(ROOT, handle, { mode: 0 }, undefined, false),
    ])
      expect(answer.errno).toBe(E.STALE);
    // The inode number comes back with another generation.
    for (let index = 0; index < 50; index++) writeFileSync(join(folder, `n${index}`), '');
    expect((await fs.getattr(handle)).errno).toBe(E.STALE);
  });

  it('refuses forged and malformed handles', async () => {
    await fresh();
    const handle = await file('secret', 'x', 0o600);
    const forged = Buffer.from(handle);
    forged.writeUInt32LE(0, 8);
    expect((await fs.getattr(forged)).errno, 'generation 0 is a wildcard for ext4').toBe(E.STALE);
    const wrong = Buffer.from(handle);
    wrong.writeUInt32LE((wrong.readUInt32LE(8) ^ 1) >>> 0, 8);
    expect((await fs.getattr(wrong)).errno, 'another generation').toBe(E.STALE);
    for (const inode of [0, 1, 3, 8, 0xffffffff]) {
      const reserved = Buffer.from('010000000000000000000000', 'hex');
      reserved.writeUInt32LE(inode, 4);
      expect((await fs.getattr(reserved)).errno, `inode ${inode}`).toBe(E.STALE);
    }
    for (const bad of [
      Buffer.alloc(0),
      Buffer.alloc(4),
      Buffer.alloc(64, 0xff),
      Buffer.alloc(132, 1),
      Buffer.alloc(200),
    ])
      expect((await fs.getattr(bad)).errno).toBe(E.STALE);
    // mkfs gave lost+found generation 0: its true handle is good.
    const found = await fs.lookup(ROOT, fs.rootHandle, bytes('lost+found'));
    expect((await fs.getattr(found.handle!)).attributes?.fileId).toBe(11n);
  });

  it('finds the same objects on a byte copy of the image, on the other head', async () => {
    await fresh();
    const handles = [
      await file('file', 'replicated'),
      (await fs.mkdir(ROOT, root, bytes('dir'), { mode: 0o755 }, true)).handle!,
      (await fs.symlink(ROOT, root, bytes('link'), bytes('file'), {}, true)).handle!,
      (await fs.mknod(ROOT, root, bytes('fifo'), FileType.FIFO, { mode: 0o600 }, 0, 0, true)).handle!,
    ];
    const exclusive = { kind: 'exclusive', verifier: Buffer.from('fedcba9876543210', 'hex') } as const;
    const made = await fs.create(USER, root, bytes('exclusive'), exclusive, true);
    for (let index = 0; index < 300; index++) writeFileSync(join(folder, 'dir', `entry${index}`), '');
    const first = await fs.readdir(ROOT, handles[1]!, 0n, 100, false);
    const rest = await fs.readdir(ROOT, handles[1]!, first.entries.at(-1)!.cookie, 1000, false);
    run('sync', '--file-system', image.mountPoint);
    const copy = image.copy();
    let other: PosixFileSystem | undefined;
    try {
      copy.mount();
      other = await openPosixFileSystem(ring, copy.mountPoint, { workers: 2 });
      expect(other.id).toEqual(fs.id);
      for (const handle of handles) {
        const there = await other.getattr(handle);
        expect(there.attributes).toEqual((await fs.getattr(handle)).attributes);
      }
      expect((await other.readdir(ROOT, handles[1]!, first.entries.at(-1)!.cookie, 1000, false)).entries).toEqual(
        rest.entries,
      );
      // Cold inodes: the other head's kernel has seen no name of them yet.
      expect((await other.link(ROOT, handles[0]!, handles[1]!, bytes('cold'), true)).errno).toBe(0);
      expect((await other.setattr(ROOT, handles[0]!, { mode: 0o600 }, undefined, true)).wcc.after).toMatchObject({
        ...{ mode: 0o600, linkCount: 2 },
      });
      expect((await other.lookup(ROOT, handles[1]!, bytes('..'))).handle).toEqual(root);
      expect((await other.remove(ROOT, root, bytes('file'), true)).errno).toBe(0);
      expect((await other.getattr(handles[0]!)).attributes?.linkCount).toBe(1);
      const again = await other.create(USER, root, bytes('exclusive'), exclusive, true);
      expect([again.errno, again.handle]).toEqual([0, made.handle]);
    } finally {
      await other?.withdraw();
      copy.unmount();
      copy.dispose();
    }
  });

  // ---- data --------------------------------------------------------------------------------------------------------

  it('reads with exact ends, clipped counts and holes as zeroes', async () => {
    await fresh();
    const handle = await file('a', '0123456789');
    expect(await read(ROOT, handle, 0, 10)).toMatchObject({ errno: 0, data: '0123456789', eof: true });
    expect(await read(ROOT, handle, 0, 9)).toMatchObject({ data: '012345678', eof: false });
    expect(await read(ROOT, handle, 5, 100)).toMatchObject({ data: '56789', count: 5, eof: true });
    expect(await read(ROOT, handle, 10, 5)).toMatchObject({ errno: 0, count: 0, eof: true });
    expect(await read(ROOT, handle, 2 ** 52, 5)).toMatchObject({ errno: 0, count: 0, eof: true });
    expect(await read(ROOT, handle, 9, 0)).toMatchObject({ errno: 0, count: 0, eof: false });
    expect(await read(ROOT, handle, 10, 0)).toMatchObject({ errno: 0, count: 0, eof: true });
    expect((await read(ROOT, root, 0, 1)).errno).toBe(E.ISDIR);
    truncateSync(join(folder, 'a'), 8 * 1024 * 1024);
    const hole = await fs.read(ROOT, handle, 4096, 4 * 1024 * 1024);
    expect([hole.errno, hole.count, hole.eof], 'clipped to 1 MiB').toEqual([0, 1048576, false]);
    expect(ring.memory.bytes.subarray(hole.payload, hole.payload + hole.count).every((byte) => byte === 0)).toBe(true);
    ring.memory.release(hole.payload);
    expect(hole.attributes!.usedBytes, 'nothing was allocated for it').toBeLessThan(65536);
  });

  it('writes with each stability, leaves holes, and reports wcc around it', async () => {
    await fresh();
    const handle = await file('a', 'abc');
    const before = (await fs.getattr(handle)).attributes!;
    for (const [index, stability] of [Stability.UNSTABLE, Stability.DATA_SYNC, Stability.FILE_SYNC].entries()) {
      const written = await write(ROOT, handle, 10 * (index + 1), bytes('xyz'), stability);
      expect(written).toMatchObject({ errno: 0, count: 3, committed: stability });
      expect(written.wcc.before!.sizeBytes).toBe(index === 0 ? 3 : 10 * index + 3);
      expect(written.wcc.after!.sizeBytes).toBe(10 * (index + 1) + 3);
      if (index === 0) expect(written.wcc.before).toEqual({ sizeBytes: 3, mtime: before.mtime, ctime: before.ctime });
    }
    expect(readFileSync(join(folder, 'a'), 'latin1')).toBe('abc\0\0\0\0\0\0\0xyz\0\0\0\0\0\0\0xyz\0\0\0\0\0\0\0xyz');
    const far = await write(ROOT, handle, 3 * 2 ** 30, bytes('far'));
    expect(far).toMatchObject({ errno: 0, count: 3 });
    expect(far.wcc.after!.usedBytes).toBeLessThan(1048576);
    const committed = await fs.commit(ROOT, handle);
    expect(committed.errno).toBe(0);
    expect(committed.wcc.before).toMatchObject({ sizeBytes: 3 * 2 ** 30 + 3 });
    expect((await write(ROOT, handle, fs.maxFileSizeBytes, bytes('x'))).errno).toBe(E.FBIG);
    expect((await write(ROOT, handle, 2 ** 63, bytes('x'))).errno).toBe(E.FBIG);
    expect(await write(ROOT, handle, 0, bytes(''))).toMatchObject({ errno: 0, count: 0 });
    expect((await write(ROOT, root, 0, bytes('x'))).errno).toBe(E.ISDIR);
    expect((await fs.commit(ROOT, root)).errno).toBe(E.ISDIR);
  });

  it('answers nothing as durable that a crash right afterwards would lose', async () => {
    const disk = Ext4Image.make(16);
    let there: PosixFileSystem | undefined;
    /** What a head finds that takes over now: the image as it is, its journal replayed by the mount. */
    const afterCrash = (look: (folder: string) => unknown): unknown => {
      const copy = disk.copy();
      try {
        copy.mount();
        const seen = look(copy.mountPoint);
        copy.unmount();
        return seen;
      } finally {
        copy.dispose();
      }
    };
    const has = (name: string) => afterCrash((folder) => readdirSync(folder).includes(name));
    try {
      disk.mount();
      there = await openPosixFileSystem(ring, disk.mountPoint, { workers: 2 });
      const home = there.rootHandle;
      const at = (name: string) => bytes(name);
      await there.create(ROOT, home, at('lost'), guarded({}), false);
      expect(has('lost'), 'a crash does lose what was not made durable').toBe(false);
      const made = await there.create(
        ROOT,
        home,
        at('a'),
        guarded({ mode: 0o600, mtime: { seconds: 5, nanoseconds: 0 } }),
        true,
      );
      expect(afterCrash((folder) => statSync(join(folder, 'a')).mtimeMs)).toBe(5000);
      await there.mkdir(ROOT, home, at('d'), {}, true);
      expect(has('d')).toBe(true);
      await there.symlink(ROOT, home, at('l'), bytes('target'), {}, true);
      expect(afterCrash((folder) => readlinkSync(join(folder, 'l')))).toBe('target');
      await there.mknod(ROOT, home, at('p'), FileType.FIFO, {}, 0, 0, true);
      expect(has('p')).toBe(true);
      await there.link(ROOT, made.handle!, home, at('b'), true);
      expect(has('b')).toBe(true);
      await there.rename(ROOT, home, at('b'), (await there.lookup(ROOT, home, at('d'))).handle!, at('c'), true);
      expect(afterCrash((folder) => [readdirSync(folder).includes('b'), readdirSync(join(folder, 'd'))])).toEqual([
        false,
        ['c'],
      ]);
      await there.setattr(ROOT, made.handle!, { mode: 0o640 }, undefined, true);
      expect(afterCrash((folder) => statSync(join(folder, 'a')).mode & 0o7777)).toBe(0o640);
      const link = (await there.lookup(ROOT, home, at('l'))).handle!;
      await there.setattr(ROOT, link, { uid: 77 }, undefined, true);
      expect(afterCrash((folder) => lstatSync(join(folder, 'l')).uid)).toBe(77);
      await there.remove(ROOT, home, at('p'), true);
      expect(has('p')).toBe(false);
      const content = () => afterCrash((folder) => readFileSync(join(folder, 'a'), 'utf8'));
      const put = async (offset: number, data: string, stability: number) => {
        const block = ring.memory.allocate(64);
        ring.memory.bytes.set(bytes(data), block);
        const written = await there!.write(ROOT, made.handle!, offset, block, data.length, stability);
        ring.memory.release(block);
        expect(written).toMatchObject({ errno: 0, committed: stability });
      };
      await put(0, 'one', Stability.UNSTABLE);
      expect(content()).toBe('');
      await there.commit(ROOT, made.handle!);
      expect(content()).toBe('one');
      await put(3, 'two', Stability.DATA_SYNC);
      expect(content()).toBe('onetwo');
      await put(6, 'three', Stability.FILE_SYNC);
      expect(content()).toBe('onetwothree');
    } finally {
      await there?.withdraw();
      disk.unmount();
      disk.dispose();
    }
  });

  it('fails the COMMIT of data that the disk did not take', async () => {
    // A disk that promises more than it has: the image's sparse file stands on a full tmpfs.
    const disk = Ext4Image.makeOvercommitted(24, 64);
    let there: PosixFileSystem | undefined;
    try {
      disk.mount();
      there = await openPosixFileSystem(ring, disk.mountPoint, { workers: 2 });
      const made = await there.create(ROOT, there.rootHandle, bytes('a'), guarded({ mode: 0o600 }), true);
      const block = ring.memory.allocate(1048576);
      ring.memory.bytes.fill(1, block, block + 1048576);
      for (let index = 0; index < 32; index++) {
        const { errno } = await there.write(ROOT, made.handle!, index * 1048576, block, 1048576, Stability.UNSTABLE);
        expect(errno).toBe(0);
      }
      ring.memory.release(block);
      const failed = await there.commit(ROOT, made.handle!);
      expect([5, E.NOSPC]).toContain(failed.errno);
      expect(failed.wcc.after?.sizeBytes).toBe(32 * 1048576);
    } finally {
      await there?.withdraw();
      disk.unmount();
      disk.dispose();
    }
  });

  it('answers a short count, not an error, when the disk fills up in the middle', async () => {
    const small = Ext4Image.make(8, '-m', '0', '-O', '^has_journal');
    let there: PosixFileSystem | undefined;
    try {
      small.mount();
      there = await openPosixFileSystem(ring, small.mountPoint, { workers: 1 });
      const made = await there.create(ROOT, there.rootHandle, bytes('a'), guarded({ mode: 0o600 }), false);
      const block = ring.memory.allocate(1048576);
      const counts: number[] = [];
      let errno = 0;
      for (let offset = 0; errno === 0; ) {
        const written = await there.write(ROOT, made.handle!, offset, block, 1048576 - 512, Stability.UNSTABLE);
        errno = written.errno;
        if (errno === 0) counts.push(written.count);
        offset += written.count;
        expect(counts.length).toBeLessThan(20);
      }
      ring.memory.release(block);
      expect(errno).toBe(E.NOSPC);
      expect(counts.some((count) => count > 0 && count < 1048576 - 512)).toBe(true);
      expect(statSync(join(small.mountPoint, 'a')).size).toBe(counts.reduce((sum, count) => sum + count, 0));
    } finally {
      await there?.withdraw();
      small.unmount();
      small.dispose();
    }
  });

  it('never opens special files', async () => {
    await fresh();
    const fifo = await fs.mknod(ROOT, root, bytes('fifo'), FileType.FIFO, { mode: 0o666 }, 0, 0, true);
    const device = await fs.mknod(ROOT, root, bytes('null'), FileType.CHR, { mode: 0o666 }, 1, 3, true);
    const socket = await fs.mknod(ROOT, root, bytes('socket'), FileType.SOCK, { mode: 0o666 }, 0, 0, true);
    const block = await fs.mknod(ROOT, root, bytes('block'), FileType.BLK, { mode: 0o600 }, 259, 1048575, true);
    expect([fifo, device, socket, block].map((made) => [made.errno, made.attributes?.type])).toEqual([
      [0, FileType.FIFO],
      [0, FileType.CHR],
      [0, FileType.SOCK],
      [0, FileType.BLK],
    ]);
    expect(device.attributes).toMatchObject({ rdevMajor: 1, rdevMinor: 3, mode: 0o666 });
    expect(block.attributes).toMatchObject({ rdevMajor: 259, rdevMinor: 1048575, mode: 0o600 });
    for (const { handle } of [fifo, device, socket, block]) {
      expect((await read(ROOT, handle!, 0, 1)).errno).toBe(E.INVAL);
      expect((await write(ROOT, handle!, 0, bytes('x'))).errno).toBe(E.INVAL);
      expect((await fs.commit(ROOT, handle!)).errno).toBe(E.INVAL);
      expect((await fs.setattr(ROOT, handle!, { sizeBytes: 0 }, undefined, false)).errno).toBe(E.INVAL);
      expect((await fs.setattr(ROOT, handle!, { mode: 0o640 }, undefined, true)).wcc.after!.mode).toBe(0o640);
    }
    const make = (type: number, major: number, minor: number, who = ROOT) =>
      fs.mknod(who, root, bytes('x'), type, { mode: 0o600 }, major, minor, false);
    expect((await make(FileType.CHR, 4096, 0)).errno).toBe(E.INVAL);
    expect((await make(FileType.CHR, 0, 1048576)).errno).toBe(E.INVAL);
    expect((await make(FileType.CHR, 1, 3, USER)).errno).toBe(E.PERM);
    expect((await make(FileType.FIFO, 0, 0, USER)).errno).toBe(0);
    for (const type of [FileType.REG, FileType.DIR, FileType.LNK])
      expect((await make(type, 0, 0)).errno).toBe(E.BADTYPE);
  });

  // ---- creation and removal ----------------------------------------------------------------------------------------

  it('creates unchecked, guarded and exclusive', async () => {
    await fresh();
    const made = await fs.create(USER, root, bytes('a'), guarded({ mode: 0o640, sizeBytes: 10 }), true);
    expect(made).toMatchObject({ errno: 0, attributes: { mode: 0o640, uid: 1000, gid: 1000, sizeBytes: 10 } });
    const special = await fs.create(USER, root, bytes('s'), guarded({ mode: 0o6751 }), true);
    expect(special).toMatchObject({ errno: 0, attributes: { mode: 0o6751, sizeBytes: 0 } });
    expect(made.wcc.before!.mtime).not.toEqual(made.wcc.after!.mtime);
    expect((await fs.create(USER, root, bytes('a'), guarded({ mode: 0o644 }), true)).errno).toBe(E.EXIST);
    const again = await fs.create(USER, root, bytes('a'), unchecked({ mode: 0o600, sizeBytes: 4 }), true);
    expect(again, 'only the size is set').toMatchObject({ errno: 0, attributes: { mode: 0o640, sizeBytes: 4 } });
    expect(again.handle).toEqual(made.handle);
    expect((await fs.create(OTHER, root, bytes('a'), unchecked({ sizeBytes: 0 }), true)).errno).toBe(E.ACCES);
    mkdirSync(join(folder, 'd'));
    symlinkSync('a', join(folder, 'l'));
    for (const name of ['d', 'l', '.', '..'])
      expect((await fs.create(USER, root, bytes(name), unchecked({}), true)).errno, name).toBe(E.EXIST);
    const times = { seconds: 1_000_000_000, nanoseconds: 5 };
    const dated = await fs.create(
      ROOT,
      root,
      bytes('dated'),
      unchecked({ uid: 7, gid: 8, mode: 0o4755, mtime: times }),
      true,
    );
    expect(dated.attributes).toMatchObject({ uid: 7, gid: 8, mode: 0o4755, mtime: times });
    const foreign = await fs.create(USER, root, bytes('gid'), unchecked({ uid: 0, gid: 0, mode: 0o600 }), true);
    expect(foreign, 'ownership that is not his to give stays').toMatchObject({
      errno: 0,
      attributes: { uid: 1000, gid: 1000 },
    });
  });

  it('replays an exclusive create by its verifier, which stands in the times', async () => {
    await fresh();
    const verifier = Buffer.from('01020384050607ff', 'hex');
    const create = (name: string, verifier: Uint8Array) =>
      fs.create(USER, root, bytes(name), { kind: 'exclusive', verifier }, true);
    const made = await create('a', verifier);
    expect(made).toMatchObject({ errno: 0, attributes: { mode: 0, uid: 1000, sizeBytes: 0 } });
    const stat = statSync(join(folder, 'a'));
    // knfsd: little-endian words, 31 bits: 0x84030201 and 0xff070605.
    expect([stat.mtimeMs / 1000, stat.atimeMs / 1000]).toEqual([0x04030201, 0x7f070605]);
    const replayed = await create('a', verifier);
    expect([replayed.errno, replayed.handle]).toEqual([0, made.handle]);
    expect((await create('a', Buffer.from('0102038405060700', 'hex'))).errno).toBe(E.EXIST);
    expect((await write(USER, made.handle!, 0, bytes('x'))).errno, 'the owner may write, mode 0 or not').toBe(0);
    expect((await create('a', verifier)).errno, 'no longer empty').toBe(E.EXIST);
  });

  it('creates in a sticky world-writable folder whatever fs.protected_regular says', async () => {
    await fresh();
    chmodSync(folder, 0o1777);
    await file('a', 'old', 0o666, 1000);
    const before = readFileSync('/proc/sys/fs/protected_regular', 'utf8').trim();
    writeFileSync('/proc/sys/fs/protected_regular', '2');
    try {
      const opened = await fs.create(OTHER, root, bytes('a'), unchecked({ sizeBytes: 0 }), false);
      expect(opened).toMatchObject({ errno: 0, attributes: { sizeBytes: 0, uid: 1000 } });
    } finally {
      writeFileSync('/proc/sys/fs/protected_regular', before);
    }
  });

  it('makes directories and links, inheriting as the kernel does', async () => {
    await fresh();
    chownSync(folder, 0, 3000);
    chmodSync(folder, 0o2777);
    const made = await fs.mkdir(USER, root, bytes('d'), { mode: 0o750 }, true);
    expect(made).toMatchObject({ errno: 0, attributes: { type: FileType.DIR, mode: 0o2750, uid: 1000, gid: 3000 } });
    expect(made.wcc.after!.linkCount).toBe(made.directory!.linkCount);
    expect((await fs.mkdir(USER, root, bytes('d'), { mode: 0o750 }, true)).errno).toBe(E.EXIST);
    for (const name of ['.', '..']) expect((await fs.mkdir(USER, root, bytes(name), {}, true)).errno).toBe(E.EXIST);
    const link = await fs.symlink(USER, root, bytes('l'), bytes('../\xff target'), { mode: 0o600 }, true);
    expect(link).toMatchObject({ errno: 0, attributes: { type: FileType.LNK, mode: 0o777, uid: 1000 } });
    expect(readlinkSync(join(folder, 'l'))).toBe('../\xff target');
    const longest = 'x'.repeat(4095);
    const symlink = (target: string) => fs.symlink(USER, root, bytes(`s${target.length}`), bytes(target), {}, false);
    expect(text((await fs.readlink(USER, (await symlink(longest)).handle!)).target)).toBe(longest);
    expect((await symlink(`${longest}y`)).errno).toBe(E.NAMETOOLONG);
    expect((await symlink('')).errno).toBe(E.NOENT);
  });

  it('removes, and tells directories from files', async () => {
    await fresh();
    await file('a', 'x');
    mkdirSync(join(folder, 'd'));
    mkdirSync(join(folder, 'full/x'), { recursive: true });
    expect((await fs.remove(ROOT, root, bytes('d'), true)).errno).toBe(E.ISDIR);
    expect((await fs.rmdir(ROOT, root, bytes('a'), true)).errno).toBe(E.NOTDIR);
    expect((await fs.rmdir(ROOT, root, bytes('full'), true)).errno).toBe(E.NOTEMPTY);
    expect((await fs.rmdir(ROOT, root, bytes('.'), true)).errno).toBe(E.INVAL);
    expect((await fs.rmdir(ROOT, root, bytes('..'), true)).errno).toBe(E.NOTEMPTY);
    for (const name of ['.', '..']) expect((await fs.remove(ROOT, root, bytes(name), true)).errno).toBe(E.INVAL);
    expect((await fs.remove(ROOT, root, bytes('missing'), true)).errno).toBe(E.NOENT);
    const removed = await fs.remove(ROOT, root, bytes('a'), true);
    expect(removed.errno).toBe(0);
    expect(removed.wcc.before!.ctime).not.toEqual(removed.wcc.after!.ctime);
    const handle = await handleOf(root, 'd');
    expect((await fs.rmdir(ROOT, root, bytes('d'), true)).errno).toBe(0);
    expect((await fs.getattr(handle)).errno).toBe(E.STALE);
    expect((await fs.create(ROOT, handle, bytes('x'), unchecked({}), true)).errno).toBe(E.STALE);
    expect((await fs.readdir(ROOT, handle, 0n, 10, false)).errno).toBe(E.STALE);
    expect(readdirSync(folder)).toEqual(['full']);
  });

  it('gives the space of a removed file back at once, though it was open in the cache', async () => {
    await fresh();
    const made = await fs.create(ROOT, root, bytes('a'), guarded({ mode: 0o600 }), false);
    const block = ring.memory.allocate(1048576);
    const free = async () => {
      run('sync', '--file-system', image.mountPoint);
      return (await fs.fsstat(ROOT, root)).freeBytes;
    };
    const before = await free();
    for (let index = 0; index < 4; index++)
      await fs.write(ROOT, made.handle!, index * 1048576, block, 1048576, Stability.UNSTABLE);
    const full = await free();
    expect(before - full).toBeGreaterThanOrEqual(4 * 1048576);
    await fs.remove(ROOT, root, bytes('a'), false);
    expect(await free()).toBe(before);
    // Likewise when a rename replaces it.
    const replaced = await fs.create(ROOT, root, bytes('b'), guarded({ mode: 0o600 }), false);
    await fs.write(ROOT, replaced.handle!, 0, block, 1048576, Stability.UNSTABLE);
    await fs.create(ROOT, root, bytes('c'), guarded({ mode: 0o600 }), false);
    await fs.rename(ROOT, root, bytes('c'), root, bytes('b'), false);
    expect(await free()).toBe(before);
    ring.memory.release(block);
  });

  it('renames with wcc of both directories', async () => {
    await fresh();
    mkdirSync(join(folder, 'one'));
    mkdirSync(join(folder, 'two'));
    mkdirSync(join(folder, 'one/sub'));
    writeFileSync(join(folder, 'one/f'), 'x');
    writeFileSync(join(folder, 'two/g'), 'y');
    const one = await handleOf(root, 'one');
    const two = await handleOf(root, 'two');
    const rename = (a: KernelHandle, from: string, b: KernelHandle, to: string, who = ROOT) =>
      fs.rename(who, a, bytes(from), b, bytes(to), true);
    const moved = await rename(one, 'f', two, 'g');
    expect(moved.errno).toBe(0);
    expect(readFileSync(join(folder, 'two/g'), 'utf8')).toBe('x');
    for (const wcc of [moved.from, moved.to]) expect(wcc.before!.mtime).not.toEqual(wcc.after!.mtime);
    const same = await rename(two, 'g', two, 'h');
    expect(same.errno).toBe(0);
    expect(same.from).toEqual(same.to);
    expect((await rename(one, 'sub', two, 'h')).errno).toBe(E.NOTDIR);
    expect((await rename(two, 'h', one, 'sub')).errno).toBe(E.ISDIR);
    expect((await rename(root, 'one', one, 'sub')).errno).toBe(E.INVAL);
    expect((await rename(root, 'two', root, 'one')).errno).toBe(E.NOTEMPTY);
    expect((await rename(one, 'missing', two, 'x')).errno).toBe(E.NOENT);
    expect((await rename(one, '.', two, 'x')).errno).toBe(E.INVAL);
    chmodSync(join(folder, 'two'), 0o755);
    expect((await rename(two, 'h', two, 'i', USER)).errno).toBe(E.ACCES);
    linkSync(join(folder, 'two/h'), join(folder, 'two/same'));
    expect((await rename(two, 'h', two, 'same')).errno, 'two names of one file: nothing happens').toBe(0);
    expect(readdirSync(join(folder, 'two')).sort()).toEqual(['h', 'same']);
  });

  it('makes hard links, of symbolic links too', async () => {
    await fresh();
    const handle = await file('a', 'x', 0o644, 1000);
    const linked = await fs.link(USER, handle, root, bytes('b'), true);
    expect(linked).toMatchObject({ errno: 0, attributes: { linkCount: 2 } });
    expect(linked.wcc.before!.mtime).not.toEqual(linked.wcc.after!.mtime);
    expect(statSync(join(folder, 'b')).ino).toBe(statSync(join(folder, 'a')).ino);
    expect((await fs.link(USER, handle, root, bytes('b'), true)).errno).toBe(E.EXIST);
    expect((await fs.link(USER, root, root, bytes('c'), true)).errno).toBe(E.PERM);
    symlinkSync('nowhere', join(folder, 'l'));
    const symbolic = await fs.link(ROOT, await handleOf(root, 'l'), root, bytes('m'), true);
    expect(symbolic).toMatchObject({ errno: 0, attributes: { type: FileType.LNK, linkCount: 2 } });
    expect(lstatSync(join(folder, 'm')).isSymbolicLink()).toBe(true);
    // A handle of which the kernel holds no name in memory.
    run('sync', '--file-system', image.mountPoint);
    expect((await fs.link(ROOT, handle, root, bytes('cold'), true)).errno).toBe(0);
  });

  // ---- attributes --------------------------------------------------------------------------------------------------

  it('sets attributes in the order that keeps what was asked for', async () => {
    await fresh();
    const handle = await file('a', 'content', 0o644, 1000);
    const times = { atime: { seconds: 1, nanoseconds: 2 }, mtime: { seconds: 0xffffffff, nanoseconds: 999999999 } };
    const set = await fs.setattr(
      ROOT,
      handle,
      { sizeBytes: 3, uid: 5, gid: 6, mode: 0o6755, ...times },
      undefined,
      true,
    );
    expect(set).toMatchObject({
      errno: 0,
      wcc: { before: { sizeBytes: 7 }, after: { sizeBytes: 3, uid: 5, gid: 6, mode: 0o6755, ...times } },
    });
    const chowned = await fs.setattr(ROOT, handle, { uid: 1000 }, undefined, false);
    expect(chowned.wcc.after!.mode, 'chown clears setuid and setgid, and nobody brings them back').toBe(0o755);
    const change = (changes: SetAttributes, target = handle, who = ROOT) =>
      fs.setattr(who, target, changes, undefined, false).then(({ errno }) => errno);
    expect(await change({ mtime: { seconds: 1, nanoseconds: 1e9 } })).toBe(E.INVAL);
    expect(await change({ uid: 0xffffffff })).toBe(E.INVAL);
    expect(await change({ sizeBytes: 0 }, root)).toBe(E.INVAL);
    symlinkSync('x', join(folder, 'l'));
    const link = await handleOf(root, 'l');
    expect(await change({ mode: 0o600 }, link)).toBe(E.OPNOTSUPP);
    expect((await fs.setattr(ROOT, link, { uid: 9, mtime: times.mtime }, undefined, true)).wcc.after).toMatchObject({
      uid: 9,
      mtime: times.mtime,
    });
    expect(await change({ mode: 0o600 }, handle, OTHER)).toBe(E.PERM);
    expect(await change({ uid: 2000 }, handle, USER)).toBe(E.PERM);
    expect(await change({ gid: 2000 }, handle, USER)).toBe(E.PERM);
    expect(await change({ gid: 2000 }, handle, { uid: 1000, gid: 1000, groups: [2000] })).toBe(0);
  });

  it('guards by ctime', async () => {
    await fresh();
    const handle = await file('a');
    const { ctime } = (await fs.getattr(handle)).attributes!;
    const wrong = await fs.setattr(
      ROOT,
      handle,
      { mode: 0o600 },
      { ...ctime, nanoseconds: ctime.nanoseconds ^ 1 },
      true,
    );
    expect(wrong.errno).toBe(E.NOTSYNC);
    expect(wrong.wcc.before!.ctime).toEqual(ctime);
    expect(wrong.wcc.after!.mode).toBe(0o644);
    expect((await fs.setattr(ROOT, handle, { mode: 0o600 }, ctime, true)).errno).toBe(0);
    expect((await fs.setattr(ROOT, handle, { mode: 0o644 }, ctime, true)).errno).toBe(E.NOTSYNC);
  });

  it('lets a writer set times to now, together or one alone, and only the owner set others', async () => {
    await fresh();
    const handle = await file('a', '', 0o666, 1000);
    const old = { seconds: 1000, nanoseconds: 0 };
    const set = (who: Credential, changes: SetAttributes) => fs.setattr(who, handle, changes, undefined, false);
    const reset = () => set(USER, { atime: old, mtime: old });
    expect((await reset()).errno).toBe(0);
    expect((await set(OTHER, { atime: 'now', mtime: 'now' })).errno).toBe(0);
    await reset();
    const one = await set(OTHER, { mtime: 'now' });
    expect(one).toMatchObject({ errno: 0, wcc: { after: { atime: old } } });
    expect(Math.abs(one.wcc.after!.mtime.seconds - Date.now() / 1000)).toBeLessThan(60);
    expect((await set(OTHER, { mtime: old })).errno).toBe(E.PERM);
    expect((await set(OTHER, { atime: 'now', mtime: old })).errno).toBe(E.PERM);
    chmodSync(join(folder, 'a'), 0o644);
    expect((await set(OTHER, { atime: 'now', mtime: 'now' })).errno).toBe(E.ACCES);
    expect((await set(OTHER, { mtime: 'now' })).errno).toBe(E.PERM);
  });

  // ---- permissions -------------------------------------------------------------------------------------------------

  /** What a shell as that user says of the same thing: 0, or the errno of its message. */
  function asUser(who: Credential, script: string, ...args: string[]): number {
    const groups = who.groups.length > 0 ? [`--groups=${who.groups.join(',')}`] : ['--clear-groups'];
    const identity = [`--reuid=${who.uid}`, `--regid=${who.gid}`, ...groups];
    const { status, stderr } = spawnSync('setpriv', [...identity, '--', 'sh', '-c', script, 'sh', ...args], {
      encoding: 'utf8',
      env: { ...process.env, LC_ALL: 'C' },
    });
    if (status === 0) return 0;
    if (/Permission denied/.test(stderr)) return E.ACCES;
    if (/Operation not permitted/.test(stderr)) return E.PERM;
    throw new Error(`${script}: ${stderr}`);
  }

  it('refuses what the kernel refuses the same user', async () => {
    const members: Credential = { uid: 1000, gid: 1000, groups: [3000, 4000] };
    const verdicts: string[] = [];
    for (const [who, label] of [
      [USER, 'owner or other'],
      [members, 'member of 3000'],
    ] as const) {
      for (const [uid, gid] of [
        [1000, 1000],
        [0, 3000],
        [0, 0],
      ] as const) {
        for (const mode of [0o777, 0o755, 0o700, 0o770, 0o775, 0o711, 0o733, 0o1777, 0o555, 0o000]) {
          await fresh();
          const setup = (): void => {
            rmSync(join(folder, 'd'), { recursive: true, force: true });
            mkdirSync(join(folder, 'd'));
            for (const name of ['f', 'gone', 'from']) writeFileSync(join(folder, 'd', name), 'data');
            mkdirSync(join(folder, 'd/sub'));
            chownSync(join(folder, 'd'), uid, gid);
            chmodSync(join(folder, 'd'), mode);
          };
          const here = join(folder, 'd');
          const operations: readonly (readonly [string, string, (d: KernelHandle) => Promise<{ errno: number }>])[] = [
            ['lookup', 'stat "$1/f"', (d) => fs.lookup(who, d, bytes('f'))],
            ['create', ': > "$1/new"', (d) => fs.create(who, d, bytes('new'), guarded({ mode: 0o644 }), false)],
            ['mkdir', 'mkdir "$1/new"', (d) => fs.mkdir(who, d, bytes('new'), { mode: 0o755 }, false)],
            ['symlink', 'ln -s x "$1/new"', (d) => fs.symlink(who, d, bytes('new'), bytes('x'), {}, false)],
            ['mkfifo', 'mkfifo "$1/new"', (d) => fs.mknod(who, d, bytes('new'), FileType.FIFO, {}, 0, 0, false)],
            ['remove', 'unlink "$1/gone"', (d) => fs.remove(who, d, bytes('gone'), false)],
            ['rmdir', 'rmdir "$1/sub"', (d) => fs.rmdir(who, d, bytes('sub'), false)],
            ['rename', 'mv -T "$1/from" "$1/to"', (d) => fs.rename(who, d, bytes('from'), d, bytes('to'), false)],
            ['readdir', 'ls "$1" >/dev/null', (d) => fs.readdir(who, d, 0n, 10, false)],
          ];
          for (const [name, script, operation] of operations) {
            setup();
            const theirs = asUser(who, script, here);
            setup();
            const { errno } = await operation(await handleOf(root, 'd'));
            if (errno !== theirs)
              verdicts.push(
                `${name} ${mode.toString(8)} of ${uid}:${gid} as ${label}: ${errno}, the kernel says ${theirs}`,
              );
          }
        }
      }
    }
    expect(verdicts).toEqual([]);
  }, 300_000);

  it('judges READ and WRITE per request: the mode, the owner who lost it, and execute for reading', async () => {
    await fresh();
    const verdicts: string[] = [];
    for (const mode of [0o644, 0o600, 0o000, 0o666, 0o222, 0o111, 0o444, 0o640, 0o620]) {
      const handle = await file('f', 'data', mode, 1000);
      const check = (what: string, errno: number, expected: number) => {
        if (errno !== expected) verdicts.push(`${what} ${mode.toString(8)}: ${errno}, expected ${expected}`);
      };
      const path = join(folder, 'f');
      const mayRead = asUser(OTHER, 'cat "$1" >/dev/null', path);
      check('other reads', (await read(OTHER, handle, 0, 4)).errno, mode & 0o001 ? 0 : mayRead);
      check('other writes', (await write(OTHER, handle, 0, bytes('x'))).errno, asUser(OTHER, ': >> "$1"', path));
      const sized = await fs.setattr(OTHER, handle, { sizeBytes: 2 }, undefined, false);
      check('other truncates', sized.errno, asUser(OTHER, ': >> "$1"', path));
      check('other commits', (await fs.commit(OTHER, handle)).errno, asUser(OTHER, ': >> "$1"', path));
      check('owner reads', (await read(USER, handle, 0, 4)).errno, 0);
      check('owner writes', (await write(USER, handle, 0, bytes('x'))).errno, 0);
      check('owner truncates', (await fs.setattr(USER, handle, { sizeBytes: 2 }, undefined, false)).errno, 0);
      check('root reads', (await read(ROOT, handle, 0, 4)).errno, 0);
      check('root writes', (await write(ROOT, handle, 0, bytes('x'))).errno, 0);
    }
    expect(verdicts).toEqual([]);
  });

  it('answers ACCESS as test(1) does', async () => {
    await fresh();
    const verdicts: string[] = [];
    for (const who of [ROOT, USER, OTHER, { uid: 2000, gid: 2000, groups: [1000] }]) {
      for (const mode of [0o000, 0o777, 0o754, 0o640, 0o111, 0o421, 0o124]) {
        const handle = await file('f', '', mode, 1000);
        const test = (flag: string) => asUserBoolean(who, `test ${flag} "$1"`, join(folder, 'f'));
        const expected = (test('-r') ? 1 : 0) | (test('-w') ? 4 | 8 : 0) | (test('-x') ? 32 : 0);
        const { granted } = await fs.access(who, handle, 0xffffffff);
        if (granted !== expected) verdicts.push(`file ${mode.toString(8)} as ${who.uid}: ${granted}, not ${expected}`);
        const directory = join(folder, 'd');
        rmSync(directory, { recursive: true, force: true });
        mkdirSync(directory);
        chownSync(directory, 1000, 1000);
        chmodSync(directory, mode);
        const at = (flag: string) => asUserBoolean(who, `test ${flag} "$1"`, directory);
        const wanted = (at('-r') ? 1 : 0) | (at('-x') ? 2 : 0) | (at('-w') && at('-x') ? 4 | 8 | 16 : 0);
        const told = await fs.access(who, await handleOf(root, 'd'), 0xffffffff);
        if (told.granted !== wanted)
          verdicts.push(`dir ${mode.toString(8)} as ${who.uid}: ${told.granted}, not ${wanted}`);
      }
    }
    expect(verdicts).toEqual([]);
    expect((await fs.access(ROOT, root, 2)).granted, 'only what was asked for').toBe(2);
  });

  function asUserBoolean(who: Credential, script: string, ...args: string[]): boolean {
    const groups = who.groups.length > 0 ? [`--groups=${who.groups.join(',')}`] : ['--clear-groups'];
    const identity = [`--reuid=${who.uid}`, `--regid=${who.gid}`, ...groups];
    return spawnSync('setpriv', [...identity, '--', 'sh', '-c', script, 'sh', ...args]).status === 0;
  }

  it('clears setuid and setgid when someone else writes or truncates', async () => {
    await fresh();
    const handle = await file('a', 'binary', 0o6777, 0);
    const changed = await write(USER, handle, 0, bytes('x'));
    expect(changed).toMatchObject({ errno: 0, wcc: { before: { sizeBytes: 6 }, after: { mode: 0o777 } } });
    const second = await file('b', 'binary', 0o6777, 0);
    expect((await fs.setattr(USER, second, { sizeBytes: 1 }, undefined, false)).wcc.after!.mode).toBe(0o777);
    const third = await file('c', 'binary', 0o4777, 0);
    expect((await write(ROOT, third, 0, bytes('x'))).wcc.after!.mode, 'root may keep it').toBe(0o4777);
  });

  it('keeps users out of the reserved blocks', async () => {
    const small = Ext4Image.make(16, '-m', '20');
    let there: PosixFileSystem | undefined;
    try {
      small.mount();
      there = await openPosixFileSystem(ring, small.mountPoint, { workers: 1 });
      chmodSync(small.mountPoint, 0o777);
      const made = await there.create(USER, there.rootHandle, bytes('a'), guarded({ mode: 0o600 }), false);
      const block = ring.memory.allocate(65536);
      let errno = 0;
      for (let offset = 0; errno === 0; offset += 65536)
        ({ errno } = await there.write(USER, made.handle!, offset, block, 65536, Stability.UNSTABLE));
      ring.memory.release(block);
      expect(errno).toBe(E.NOSPC);
      const { freeBytes, availableBytes } = await there.fsstat(USER, there.rootHandle);
      expect(availableBytes).toBeLessThan(65536);
      expect(freeBytes, 'the reserve is untouched').toBeGreaterThan(2 * 1024 * 1024);
    } finally {
      await there?.withdraw();
      small.unmount();
      small.dispose();
    }
  });

  it('refuses ids that would mean "unchanged" to the kernel', async () => {
    await fresh();
    const handle = await file('a', 'secret', 0o600, 0);
    for (const who of [
      { uid: 0xffffffff, gid: 0, groups: [] },
      { uid: 0, gid: 0xffffffff, groups: [] },
    ])
      expect((await read(who, handle, 0, 6)).errno).toBe(E.PERM);
  });

  it('says ROFS on a read-only mount', async () => {
    const sealed = Ext4Image.make(8);
    let there: PosixFileSystem | undefined;
    try {
      sealed.mount();
      writeFileSync(join(sealed.mountPoint, 'a'), 'x');
      chmodSync(join(sealed.mountPoint, 'a'), 0o666);
      sealed.unmount();
      sealed.mount('ro');
      there = await openPosixFileSystem(ring, sealed.mountPoint, { workers: 1 });
      const home = there.rootHandle;
      const handle = (await there.lookup(ROOT, home, bytes('a'))).handle!;
      const block = ring.memory.allocate(1);
      expect((await there.write(ROOT, handle, 0, block, 1, Stability.UNSTABLE)).errno).toBe(E.ROFS);
      ring.memory.release(block);
      expect((await there.setattr(ROOT, handle, { mode: 0 }, undefined, false)).errno).toBe(E.ROFS);
      expect((await there.create(ROOT, home, bytes('b'), unchecked({}), false)).errno).toBe(E.ROFS);
      expect((await there.remove(ROOT, home, bytes('a'), false)).errno).toBe(E.ROFS);
      expect((await there.access(ROOT, handle, 63)).granted).toBe(1);
      const data = await there.read(USER, handle, 0, 10);
      expect([data.errno, data.count, data.eof]).toEqual([0, 1, true]);
      ring.memory.release(data.payload);
    } finally {
      await there?.withdraw();
      sealed.unmount();
      sealed.dispose();
    }
  });

  // ---- directories -------------------------------------------------------------------------------------------------

  it('lists everything once, with attributes and handles, in parts of any size', async () => {
    await fresh();
    const names = ['.', '..'];
    for (let index = 0; index < 500; index++) {
      names.push(`file-${index}-${'x'.repeat(index % 200)}`);
      writeFileSync(join(folder, names.at(-1)!), '');
    }
    names.sort();
    for (const [most, plus] of [
      [1, false],
      [7, true],
      [10_000, false],
      [10_000, true],
    ] as const) {
      const entries = await list(root, most, plus);
      expect(entries.map(({ name }) => text(name)).sort()).toEqual(names);
      for (const { name, fileId, handle, attributes } of plus ? entries : []) {
        const found = await fs.lookup(ROOT, root, name);
        expect([handle, attributes, fileId]).toEqual([found.handle, found.attributes, found.attributes!.fileId]);
      }
    }
    const top = await list(fs.rootHandle, 100, true);
    const parent = top.find(({ name }) => text(name) === '..')!;
    expect([parent.handle, parent.fileId]).toEqual([fs.rootHandle, 2n]);
  });

  it('refuses positions that were never given', async () => {
    await fresh();
    for (const cookie of [0x8000000000000000n, 0xffffffffffffffffn])
      expect((await fs.readdir(ROOT, root, cookie, 10, false)).errno).toBe(E.BADCOOKIE);
    const plain = await file('f');
    expect((await fs.readdir(ROOT, plain, 0n, 10, false)).errno).toBe(E.NOTDIR);
  });

  it('loses no entry that stays, whatever else comes and goes', async () => {
    await fresh();
    const stable = new Set<string>();
    for (let index = 0; index < 2000; index++) {
      stable.add(`stays-${index}`);
      writeFileSync(join(folder, `stays-${index}`), '');
    }
    let round = 0;
    const seen = new Map<string, number>();
    for (let cookie = 0n; ; ) {
      const part = await fs.readdir(ROOT, root, cookie, 50, true);
      expect(part.errno).toBe(0);
      for (const { name } of part.entries) seen.set(text(name), (seen.get(text(name)) ?? 0) + 1);
      for (let index = 0; index < 40; index++) {
        const name = bytes(`comes-${round}-${index}`);
        await fs.create(ROOT, root, name, guarded({}), false);
        if (index % 2 === 0) await fs.remove(ROOT, root, name, false);
      }
      round++;
      if (part.eof) break;
      // The very entry that the position names disappears.
      const last = part.entries.at(-1)!;
      if (text(last.name).startsWith('comes-')) await fs.remove(ROOT, root, last.name, false);
      cookie = last.cookie;
    }
    for (const name of stable) expect(seen.get(name), name).toBe(1);
  });

  /** dx_hack_hash of fs/ext4/hash.c, the `legacy` directory hash, for ASCII names. */
  function legacyHash(name: string): number {
    let hash0 = 0x12a3fe2d;
    let hash1 = 0x37abe8f9;
    for (const character of name) {
      let hash = (hash1 + (hash0 ^ Math.imul(character.charCodeAt(0), 7152373))) >>> 0;
      if (hash & 0x80000000) hash = (hash - 0x7fffffff) >>> 0;
      hash1 = hash0;
      hash0 = hash;
    }
    return (hash0 << 1) >>> 0;
  }

  it('neither skips nor repeats entries that share a position', async () => {
    const byHash = new Map<number, string>();
    let pair: readonly [string, string] | undefined;
    for (let index = 0; !pair; index++) {
      const name = `n${index}`;
      const other = byHash.get(legacyHash(name));
      if (other !== undefined) pair = [other, name];
      byHash.set(legacyHash(name), name);
    }
    const disk = Ext4Image.make(16);
    let there: PosixFileSystem | undefined;
    try {
      run('tune2fs', '-E', 'hash_alg=legacy', disk.image);
      disk.mount();
      const names = [...pair, '.', '..'];
      mkdirSync(join(disk.mountPoint, 'd'));
      // Enough for a second block: only then are entries in hash order.
      for (let index = 0; index < 400; index++) names.push(`filler-${index}-${'x'.repeat(20)}`);
      for (const name of names.filter((name) => !name.startsWith('.')))
        writeFileSync(join(disk.mountPoint, 'd', name), '');
      names.sort();
      there = await openPosixFileSystem(ring, disk.mountPoint, { workers: 1 });
      const directory = (await there.lookup(ROOT, there.rootHandle, bytes('d'))).handle!;
      const whole = await there.readdir(ROOT, directory, 0n, 1000, false);
      const positions = whole.entries.map(({ cookie }) => cookie);
      expect(
        positions.some((cookie, index) => cookie === positions[index - 1]),
        'the two do collide',
      ).toBe(true);
      for (const most of [2, 3, 7, 1000]) {
        const seen: string[] = [];
        for (let cookie = 0n; ; ) {
          const part = await there.readdir(ROOT, directory, cookie, most, false);
          expect([part.errno, part.entries.length > 0 || part.eof]).toEqual([0, true]);
          seen.push(...part.entries.map(({ name }) => text(name)));
          if (part.eof) break;
          cookie = part.entries.at(-1)!.cookie;
        }
        expect(seen.sort(), `${most} at a time`).toEqual(names);
      }
      // One at a time there is no position between the two.
      const first = positions.findIndex((cookie, index) => cookie === positions[index - 1]) - 1;
      const stuck = await there.readdir(ROOT, directory, positions[first]!, 1, false);
      expect([stuck.errno, stuck.entries.length, stuck.eof]).toEqual([0, 0, false]);
    } finally {
      await there?.withdraw();
      disk.unmount();
      disk.dispose();
    }
  });

  it('lists 100,000 entries', async () => {
    const large = Ext4Image.make(64, '-N', '110000');
    let there: PosixFileSystem | undefined;
    try {
      large.mount();
      there = await openPosixFileSystem(ring, large.mountPoint);
      const target = there;
      const made = await target.create(ROOT, target.rootHandle, bytes('original'), guarded({ mode: 0o644 }), false);
      expect(made.errno).toBe(0);
      const wanted = 100_000;
      for (let start = 0; start < wanted; start += 1000) {
        const results = await Promise.all(
          Array.from({ length: 1000 }, (_, index) =>
            target.create(ROOT, target.rootHandle, bytes(`file-${start + index}`), guarded({ mode: 0o644 }), false),
          ),
        );
        expect(results.every(({ errno }) => errno === 0)).toBe(true);
      }
      const names = new Set<string>();
      let count = 0;
      for (let cookie = 0n; ; ) {
        const part = await target.readdir(ROOT, target.rootHandle, cookie, 2000, true);
        expect(part.errno).toBe(0);
        for (const entry of part.entries) {
          names.add(text(entry.name));
          count++;
        }
        if (part.eof) break;
        cookie = part.entries.at(-1)!.cookie;
      }
      // With . .. lost+found original.
      expect([count, names.size]).toEqual([wanted + 4, wanted + 4]);
    } finally {
      await there?.withdraw();
      large.unmount();
      large.dispose();
    }
  }, 120_000);

  // ---- concurrency -------------------------------------------------------------------------------------------------

  it('reports wcc that chains: each `before` is the `after` of the change before it', async () => {
    await fresh();
    const stamp = ({ sizeBytes, mtime, ctime }: NonNullable<Wcc['before']>) =>
      `${sizeBytes} ${mtime.seconds}.${mtime.nanoseconds} ${ctime.seconds}.${ctime.nanoseconds}`;
    /** Changes that do not overlap form one chain from `first` to the state now, in whatever order they ran. */
    const expectChain = async (handle: KernelHandle, first: string, changes: readonly Wcc[]) => {
      const last = stamp((await fs.getattr(handle)).attributes!);
      const befores = changes.map(({ before }) => stamp(before!));
      const afters = changes.map(({ after }) => stamp(after!));
      expect([...befores, last].sort()).toEqual([first, ...afters].sort());
    };
    const now = async (handle: KernelHandle) => stamp((await fs.getattr(handle)).attributes!);
    const emptyFolder = await now(root);
    const made: CreateOutcome[] = await Promise.all(
      Array.from({ length: 300 }, (_, index) =>
        fs.create(USER, root, bytes(`c${index}`), guarded({}), index % 50 === 0),
      ),
    );
    await expectChain(
      root,
      emptyFolder,
      made.map(({ wcc }) => wcc),
    );
    const handle = made[0]!.handle!;
    const emptyFile = await now(handle);
    const changes = await Promise.all(
      Array.from({ length: 300 }, (_, index) =>
        index % 10 === 0
          ? fs.setattr(ROOT, handle, { mode: 0o600 + (index % 8) }, undefined, false)
          : write(
              ROOT,
              handle,
              index * 10,
              bytes('0123456789'),
              index % 30 === 1 ? Stability.FILE_SYNC : Stability.UNSTABLE,
            ),
      ),
    );
    await expectChain(
      handle,
      emptyFile,
      changes.map(({ wcc }) => wcc),
    );
  });

  it('renames both ways between two directories at once', async () => {
    await fresh();
    mkdirSync(join(folder, 'x'));
    mkdirSync(join(folder, 'y'));
    const [x, y] = [await handleOf(root, 'x'), await handleOf(root, 'y')];
    for (let index = 0; index < 20; index++) {
      writeFileSync(join(folder, 'x', `a${index}`), '');
      writeFileSync(join(folder, 'y', `b${index}`), '');
    }
    for (let round = 0; round < 20; round++) {
      const [p, q] = round % 2 === 0 ? [x, y] : [y, x];
      const results = await Promise.all(
        Array.from({ length: 20 }, (_, index) => [
          fs.rename(USER, p, bytes(`a${index}`), q, bytes(`a${index}`), false),
          fs.rename(ROOT, p, bytes(`a${index}`), q, bytes(`a${index}`), false),
          fs.rename(ROOT, q, bytes(`b${index}`), p, bytes(`b${index}`), false),
        ]).flat(),
      );
      expect(results.filter(({ errno }) => errno === 0)).toHaveLength(40);
    }
    expect(readdirSync(join(folder, 'x'))).toHaveLength(20);
    expect(readdirSync(join(folder, 'y'))).toHaveLength(20);
  });

  it('takes more operations at once than it has slots for, refused ones among them', async () => {
    const oversized = Buffer.alloc(200);
    const answers = await Promise.all(
      Array.from({ length: 5000 }, (_, index) =>
        fs.getattr(index < 1100 ? fs.rootHandle : index < 4900 ? oversized : root),
      ),
    );
    const wanted = answers.map((_, index) => (index >= 1100 && index < 4900 ? E.STALE : 0));
    expect(answers.map(({ errno }) => errno)).toEqual(wanted);
  });

  // ---- the end -----------------------------------------------------------------------------------------------------

  const descriptorsBelow = (path: string) =>
    readdirSync('/proc/self/fd').filter((fd) => {
      try {
        return readlinkSync(`/proc/self/fd/${fd}`).startsWith(path);
      } catch {
        return false;
      }
    });

  /** Devices of all open descriptors, however their paths read (a cold inode shows as `/`). */
  const openDevices = (): number[] =>
    readdirSync('/proc/self/fd').flatMap((fd) => {
      try {
        return [statSync(`/proc/self/fd/${fd}`).dev];
      } catch {
        // Closed since.
        return [];
      }
    });
  const descriptorsOn = (device: number) => openDevices().filter((dev) => dev === device);

  it('withdraws under full load, and umount succeeds at once, 50 times', async () => {
    const victim = Ext4Image.make();
    try {
      const blocksBefore = ring.usedBytes;
      // The other filesystem's cache comes and goes meanwhile.
      const ours = statSync(image.mountPoint).dev;
      const descriptors = () => openDevices().filter((dev) => dev !== ours).length;
      const before = descriptors();
      for (let round = 0; round < 50; round++) {
        victim.mount();
        // What the last round could not remove any more.
        rmSync(join(victim.mountPoint, `r${round - 1}`), { recursive: true, force: true });
        const there = await openPosixFileSystem(ring, victim.mountPoint);
        const device = statSync(victim.mountPoint).dev;
        const home = await there.mkdir(ROOT, there.rootHandle, bytes(`r${round}`), { mode: 0o777 }, false);
        let ended = false;
        const tally = new Map<number, number>();
        const load = Array.from({ length: 64 }, async (_, lane) => {
          const block = ring.memory.allocate(65536);
          for (let turn = 0; !ended; turn++) {
            const name = bytes(`l${lane}-${turn}`);
            const made = await there.create(USER, home.handle!, name, guarded({ mode: 0o644 }), lane % 4 === 0);
            const outcomes: { errno: number }[] = [made];
            if (made.handle) {
              const stability = lane % 8 === 0 ? Stability.FILE_SYNC : Stability.UNSTABLE;
              outcomes.push(await there.write(USER, made.handle, 0, block, 65536, stability));
              const data = await there.read(USER, made.handle, 0, 65536);
              if (data.payload !== NO_PAYLOAD) ring.memory.release(data.payload);
              outcomes.push(data, await there.readdir(USER, home.handle!, 0n, 100, true));
              outcomes.push(await there.getattr(made.handle), await there.remove(USER, home.handle!, name, false));
            }
            for (const { errno } of outcomes) tally.set(errno, (tally.get(errno) ?? 0) + 1);
            ended ||= outcomes.some(({ errno }) => errno === E.STALE);
          }
          ring.memory.release(block);
        });
        await new Promise((done) => setTimeout(done, 20 + (round % 5) * 10));
        expect(descriptorsOn(device).length, 'it was in use').toBeGreaterThan(0);
        await there.withdraw();
        expect(descriptorsOn(device)).toEqual([]);
        expect(descriptorsBelow(victim.mountPoint)).toEqual([]);
        victim.unmount();
        await Promise.all(load);
        expect([...tally.keys()].filter((errno) => errno !== 0 && errno !== E.STALE)).toEqual([]);
        expect((await there.getattr(there.rootHandle)).errno).toBe(E.STALE);
        expect((await there.fsstat(ROOT, there.rootHandle)).errno).toBe(E.STALE);
        await there.withdraw();
      }
      expect(descriptors(), 'no descriptor leaked').toBe(before);
      expect(ring.usedBytes, 'no pool block leaked').toBeLessThanOrEqual(blocksBefore + 64 * 65536);
      await victim.untilFree();
      expect(run('fsck.ext4', '-f', '-n', victim.image)).toMatch(/files/);
    } finally {
      victim.dispose();
    }
  }, 180_000);

  it('says why a tree cannot be served', async () => {
    await fresh();
    const open = (path: string) => openPosixFileSystem(ring, path);
    await expect(open(join(folder, 'missing'))).rejects.toThrow(
      /missing: cannot be opened as a directory: No such file/,
    );
    writeFileSync(join(folder, 'plain'), '');
    await expect(open(join(folder, 'plain'))).rejects.toThrow(
      /plain: cannot be opened as a directory: Not a directory/,
    );
    await expect(open('/proc')).rejects.toThrow(/\/proc: its filesystem gives no usable file handles/);
    const script = `
      const { NativeRing, NativePosixFs } = require(process.argv[1]);
      const ring = new NativeRing(16 * 1024 * 1024, 'epoll');
      try {
        new NativePosixFs(ring, ring.newTarget(), process.argv[2], 1);
      } catch (error) {
        console.log(error.message);
      }
      process.exit(0);`;
    const addon = resolve(import.meta.dirname, '../../native/drbdts.node');
    const without = (capability: string) =>
      run(
        'setpriv',
        `--bounding-set=-${capability}`,
        `--inh-caps=-${capability}`,
        process.execPath,
        '-e',
        script,
        addon,
        folder,
      );
    expect(without('dac_read_search')).toContain('serving it needs CAP_DAC_READ_SEARCH');
    expect(without('setuid')).toContain('serving it needs CAP_SETUID');
  });
});
