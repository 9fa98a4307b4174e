/**
 * Micro-benchmark of the filesystem door alone: operations per second on a loop-mounted ext4 in the page cache, with
 * many in flight, as an NFS server has them, and one at a time. Needs root.
 *
 * Run: npx esbuild bench/posix-fs.ts --bundle --platform=node --format=esm --packages=external \
 *   --outfile=build/bench/posix-fs.mjs && node build/bench/posix-fs.mjs
 */
import assert from 'node:assert/strict';
import { NativeRing } from '../src/io/native-ring.js';
import { openPosixFileSystem } from '../src/io/posix-filesystem.js';
import { NO_PAYLOAD } from '../src/io/ring.js';
import { type Credential, type KernelHandle, Stability } from '../src/nfs/filesystem.js';
import { Ext4Image } from '../test/support/ext4-image.js';

const SECONDS = 2;
const DEPTHS = [1, 64];
const FILES = 1000;
const KIB4 = 4096;
const MIB = 1 << 20;
const FILE_BYTES = 16 * MIB;
const POOL_BYTES = 256 * MIB;
const USER: Credential = { uid: 1000, gid: 1000, groups: [1000, 1001, 1002] };

/** Runs `one` in `depth` lanes for a while. @returns operations per second */
async function rate(depth: number, one: (turn: number) => Promise<{ errno: number }>): Promise<number> {
  let done = 0;
  let turn = 0;
  const start = process.hrtime.bigint();
  const end = start + BigInt(SECONDS) * 1_000_000_000n;
  const lane = async (): Promise<void> => {
    while (process.hrtime.bigint() < end) {
      const { errno } = await one(turn++);
      assert.equal(errno, 0);
      done++;
    }
  };
  await Promise.all(Array.from({ length: depth }, lane));
  return (done * 1e9) / Number(process.hrtime.bigint() - start);
}

const image = Ext4Image.make(1024, '-N', '500000');
image.mount();
const ring = new NativeRing({ poolBytes: POOL_BYTES });
const fs = await openPosixFileSystem(ring, image.mountPoint);
const root = await fs.setattr({ ...USER, uid: 0 }, fs.rootHandle, { mode: 0o777 }, undefined, false);
assert.equal(root.errno, 0);

const names: Uint8Array[] = [];
const handles: KernelHandle[] = [];
for (let index = 0; index < FILES; index++) {
  const name = Buffer.from(`file-${index}`);
  const made = await fs.create(USER, fs.rootHandle, name, { kind: 'guarded', attributes: { mode: 0o644 } }, false);
  assert.equal(made.errno, 0);
  names.push(name);
  handles.push(made.handle!);
}
const block = ring.memory.allocate(MIB);
ring.memory.bytes.fill(0x5a, block, block + MIB);
const big = handles[0]!;
for (let offset = 0; offset < FILE_BYTES; offset += MIB)
  assert.equal((await fs.write(USER, big, offset, block, MIB, Stability.UNSTABLE)).count, MIB);
const sample = await fs.read(USER, big, MIB - 10, 100);
assert(
  ring.memory.bytes.subarray(sample.payload, sample.payload + 100).every((byte) => byte === 0x5a),
  'what was written',
);
ring.memory.release(sample.payload);

async function read(offsetBytes: number, count: number): Promise<{ errno: number }> {
  const { errno, payload } = await fs.read(USER, big, offsetBytes, count);
  if (payload !== NO_PAYLOAD) ring.memory.release(payload);
  return { errno };
}
const at = (turn: number, length: number) => ((turn * 7919) % (FILE_BYTES / length)) * length;
let created = 0;
async function createAndRemove(durable: boolean): Promise<{ errno: number }> {
  const name = Buffer.from(`c${created++}`);
  const made = await fs.create(USER, fs.rootHandle, name, { kind: 'guarded', attributes: { mode: 0o644 } }, durable);
  return made.errno === 0 ? fs.remove(USER, fs.rootHandle, name, durable) : made;
}

const workloads: readonly (readonly [string, (turn: number) => Promise<{ errno: number }>])[] = [
  ['getattr', (turn) => fs.getattr(handles[turn % FILES]!)],
  ['lookup', (turn) => fs.lookup(USER, fs.rootHandle, names[turn % FILES]!)],
  ['access', (turn) => fs.access(USER, handles[turn % FILES]!, 63)],
  ['read 4 KiB', (turn) => read(at(turn, KIB4), KIB4)],
  ['write 4 KiB', (turn) => fs.write(USER, big, at(turn, KIB4), block, KIB4, Stability.UNSTABLE)],
  ['read 1 MiB', (turn) => read(at(turn, MIB), MIB)],
  ['write 1 MiB', (turn) => fs.write(USER, big, at(turn, MIB), block, MIB, Stability.UNSTABLE)],
  ['write 4 KiB, FILE_SYNC', (turn) => fs.write(USER, big, at(turn, KIB4), block, KIB4, Stability.FILE_SYNC)],
  ['create + remove', () => createAndRemove(false)],
  ['create + remove, durable', () => createAndRemove(true)],
  ['readdirplus of 100', () => fs.readdir(USER, fs.rootHandle, 0n, 100, true)],
];

console.log(
  `${'operations per second, in flight:'.padEnd(36)}${DEPTHS.map((depth) => String(depth).padStart(10)).join('')}`,
);
for (const [name, one] of workloads) {
  const rates: number[] = [];
  for (const depth of DEPTHS) rates.push(await rate(depth, one));
  console.log(`${name.padEnd(36)}${rates.map((figure) => figure.toFixed(0).padStart(10)).join('')}`);
}

ring.memory.release(block);
await fs.withdraw();
ring.close();
image.unmount();
image.dispose();
