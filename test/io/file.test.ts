import { spawnSync } from 'node:child_process';
import { closeSync, mkdtempSync, openSync, readFileSync, rmSync, statSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, it } from 'vitest';
import type { NativeRing } from '../../src/io/native-ring.js';
import type { BlockFile } from '../../src/io/ring.js';
import { describeRing } from '../support/rings.js';

const EIO = 5;
const EBUSY = 16;
const EBADF = 9;

/** Collects completions by cookie. */
class Completions {
  readonly order: number[] = [];
  readonly #waiting = new Map<number, (errno: number) => void>();
  readonly #early = new Map<number, number>();

  constructor(file: BlockFile) {
    file.setDone((cookie, errno) => {
      this.order.push(cookie);
      const resolve = this.#waiting.get(cookie);
      if (resolve) resolve(errno);
      else {
        expect(this.#early.has(cookie)).toBe(false);
        this.#early.set(cookie, errno);
      }
    });
  }

  of(cookie: number): Promise<number> {
    const errno = this.#early.get(cookie);
    if (errno !== undefined) return Promise.resolve(errno);
    return new Promise((resolve) => this.#waiting.set(cookie, resolve));
  }
}

describeRing('files', (make) => {
  let folder: string;
  let path: string;
  beforeEach(() => {
    folder = mkdtempSync(join(tmpdir(), 'drbdts-file-'));
    path = join(folder, 'disk');
  });
  afterEach(() => rmSync(folder, { recursive: true, force: true }));

  function open(ring: NativeRing, sizeBytes: number, options = {}): { file: BlockFile; done: Completions } {
    writeFileSync(path, '');
    truncateSync(path, sizeBytes);
    const file = ring.openFile(path, options);
    return { file, done: new Completions(file) };
  }

  it('writes and reads back, small and large, many at a time', async () => {
    const ring = make();
    const { file, done } = open(ring, 16 << 20);
    expect(file.sizeBytes).toBe(16 << 20);
    const model = Buffer.alloc(16 << 20);
    const lengths = [1, 512, 4096, 65536, 65537, 1 << 20];
    let at = 3;
    let cookie = 0;
    const pending: Promise<number>[] = [];
    for (let round = 0; round < 60; round++) {
      const length = lengths[round % lengths.length]!;
      const block = ring.memory.allocate(length);
      ring.memory.bytes.fill(round + 1, block, block + length);
      model.fill(round + 1, at, at + length);
      file.write(cookie, at, block, length, round % 5 === 0);
      // The operation holds the block by itself.
      ring.memory.release(block);
      pending.push(done.of(cookie++));
      at += length;
    }
    expect(new Set(await Promise.all(pending))).toEqual(new Set([0]));
    expect(ring.usedBytes).toBe(0);
    expect(readFileSync(path).equals(model)).toBe(true);
    const block = ring.memory.allocate(1 << 20);
    file.read(5000, 1000, block, 1 << 20);
    expect(await done.of(5000)).toBe(0);
    expect(
      Buffer.from(ring.memory.bytes.subarray(block, block + (1 << 20))).equals(model.subarray(1000, 1000 + (1 << 20))),
    ).toBe(true);
    ring.memory.release(block);
    file.close();
  });

  it('never completes from inside the call', async () => {
    const ring = make();
    const { file, done } = open(ring, 1 << 20);
    const block = ring.memory.allocate(4096);
    for (let cookie = 0; cookie < 5000; cookie++) {
      if (cookie % 2) file.read(cookie, 0, block, 4096);
      else file.write(cookie, 4096, block, 4096, false);
      expect(done.order.length).toBe(0);
    }
    await Promise.all(Array.from({ length: 5000 }, (_, cookie) => done.of(cookie)));
    expect(done.order.length).toBe(5000);
    ring.memory.release(block);
    expect(ring.usedBytes).toBe(0);
  });

  it('takes more operations at once than its queues hold', async () => {
    const ring = make();
    const { file, done } = open(ring, 1 << 20);
    const block = ring.memory.allocate(4096);
    const count = 12_000;
    // Durable writes never happen at once, so all of these wait in the kernel or for a worker.
    for (let cookie = 0; cookie < count; cookie++)
      file.write(cookie, (cookie % 256) * 4096, block, 512, cookie % 50 === 0);
    for (let cookie = count; cookie < 2 * count; cookie++) file.read(cookie, (1 << 20) - 100, block, 200);
    const errnos = await Promise.all(Array.from({ length: 2 * count }, (_, cookie) => done.of(cookie)));
    expect(errnos.slice(0, count).every((errno) => errno === 0)).toBe(true);
    expect(errnos.slice(count).every((errno) => errno === EIO)).toBe(true);
    expect(done.order.length).toBe(2 * count);
    ring.memory.release(block);
    expect(ring.usedBytes).toBe(0);
  });

  it('reports a read past the end as EIO, also when partly inside', async () => {
    const ring = make();
    const { file, done } = open(ring, 10_000);
    const block = ring.memory.allocate(8192);
    file.read(1, 8192, block, 4096);
    file.read(2, 20_000, block, 4096);
    file.read(3, 8192, block, 10_000 - 8192);
    expect([await done.of(1), await done.of(2), await done.of(3)]).toEqual([EIO, EIO, 0]);
  });

  it('reports the errno of a write that cannot be', async () => {
    const ring = make();
    writeFileSync(path, Buffer.alloc(4096, 1));
    const file = ring.openFile(path, { readOnly: true });
    const done = new Completions(file);
    const block = ring.memory.allocate(4096);
    file.write(1, 0, block, 4096, false);
    file.write(2, 0, block, 4096, true);
    expect([await done.of(1), await done.of(2)]).toEqual([EBADF, EBADF]);
    file.read(3, 0, block, 4096);
    expect(await done.of(3)).toBe(0);
    expect(ring.memory.bytes[block]).toBe(1);
  });

  it('answers every flush, joined while one runs', async () => {
    const ring = make();
    const { file, done } = open(ring, 1 << 20);
    const block = ring.memory.allocate(65536);
    file.write(1, 0, block, 65536, false);
    expect(await done.of(1)).toBe(0);
    for (let cookie = 10; cookie < 200; cookie++) file.flush(cookie);
    const all = Array.from({ length: 190 }, (_, index) => done.of(index + 10));
    expect(new Set(await Promise.all(all))).toEqual(new Set([0]));
    expect(done.order.slice(1)).toEqual(Array.from({ length: 190 }, (_, index) => index + 10));
  });

  it('zeroes ranges, keeping the space or giving it back', async () => {
    const ring = make();
    const { file, done } = open(ring, 4 << 20);
    writeFileSync(path, Buffer.alloc(4 << 20, 0xee));
    const full = statSync(path).blocks;
    file.zero(1, 4096, 1 << 20, true, true);
    expect(await done.of(1)).toBe(0);
    expect(statSync(path).blocks).toBeGreaterThanOrEqual(full - 16);
    file.zero(2, 2 << 20, 1 << 20, false, false);
    expect(await done.of(2)).toBe(0);
    expect(statSync(path).blocks).toBeLessThanOrEqual(full - 2000);
    file.zero(3, 100, 7, false, false);
    expect(await done.of(3)).toBe(0);
    const expected = Buffer.alloc(4 << 20, 0xee);
    expected.fill(0, 4096, 4096 + (1 << 20));
    expected.fill(0, 2 << 20, 3 << 20);
    expected.fill(0, 100, 107);
    expect(readFileSync(path).equals(expected)).toBe(true);
    expect(file.sizeBytes).toBe(4 << 20);
  });

  it('writes and reads around the page cache', async () => {
    const ring = make();
    let opened: ReturnType<typeof open>;
    try {
      opened = open(ring, 1 << 20, { direct: true });
    } catch (error) {
      // tmpfs before Linux 6.6 and a few others cannot.
      expect((error as Error).message).toMatch(/direct I\/O/);
      return;
    }
    const { file, done } = opened;
    expect([512, 1024, 2048, 4096]).toContain(file.alignmentBytes);
    const block = ring.memory.allocate(131072);
    ring.memory.bytes.fill(9, block, block + 131072);
    file.write(1, 4096, block, 131072, true);
    expect(await done.of(1)).toBe(0);
    ring.memory.bytes.fill(0, block, block + 131072);
    file.read(2, 4096, block, 131072);
    expect(await done.of(2)).toBe(0);
    expect(
      readFileSync(path)
        .subarray(4096, 4096 + 131072)
        .every((byte) => byte === 9),
    ).toBe(true);
    expect(ring.memory.bytes[block + 131071]).toBe(9);
  });

  it('locks: one engine per disk', () => {
    const ring = make();
    const { file } = open(ring, 4096, { exclusive: true });
    const other = make();
    expect(() => other.openFile(path, { exclusive: true })).toThrow(/in use by another process/);
    try {
      other.openFile(path, { exclusive: true });
    } catch (error) {
      expect((error as { errno: number }).errno).toBe(EBUSY);
    }
    // An independent witness: flock(1) cannot have it either.
    const taken = () => spawnSync('flock', ['-n', path, 'true']).status;
    expect(taken()).toBe(1);
    other.openFile(path, { exclusive: false });
    file.close();
    ring.handle.submit();
    expect(taken()).toBe(0);
    other.openFile(path, { exclusive: true });
  });

  it('says what is wrong with a path', () => {
    const ring = make();
    expect(() => ring.openFile(join(folder, 'none'), {})).toThrow(/open .*none: ENOENT/);
    expect(() => ring.openFile(folder, {})).toThrow(/EISDIR/);
    expect(() => ring.openFile('/dev/null', {})).toThrow(/ENOTBLK/);
  });

  it('finishes what is under way when a file or the ring closes', async () => {
    const ring = make();
    const { file, done } = open(ring, 8 << 20);
    const block = ring.memory.allocate(1 << 20);
    for (let cookie = 0; cookie < 8; cookie++) file.write(cookie, cookie << 20, block, 1 << 20, true);
    file.flush(8);
    file.close();
    await Promise.all(Array.from({ length: 9 }, (_, cookie) => done.of(cookie)));
    const descriptor = openSync(path, 'r');
    closeSync(descriptor);
    const again = ring.openFile(path, { exclusive: true });
    let told = 0;
    again.setDone(() => told++);
    for (let cookie = 0; cookie < 8; cookie++) again.write(cookie, cookie << 20, block, 1 << 20, true);
    ring.handle.submit();
    ring.close();
    const before = told;
    await new Promise((resolve) => setTimeout(resolve, 30));
    expect(told).toBe(before);
  });
});
