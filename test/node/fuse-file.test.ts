import { mkdirSync, mkdtempSync, readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, describe, expect, it } from 'vitest';
import { attachLoop, type BlockDevice, detachDevice } from '../../src/io/block-device.js';
import { runCommand } from '../../src/io/command.js';
import { NativeRing } from '../../src/io/native-ring.js';
import { FuseFile } from '../../src/node/fuse-file.js';
import { FileTarget } from '../support/file-target.js';
import { requires } from '../support/requires.js';

const MiB = 1024 * 1024;
const SIZE = 64 * MiB;
const canMount =
  process.getuid?.() === 0 &&
  requires('/dev/fuse', 'linux-image-amd64') &&
  requires('/dev/loop-control', 'linux-image-amd64');

/** Nothing in this process may touch the mount: it is this process that answers. */
async function sh(script: string): Promise<string> {
  const result = await runCommand(['bash', '-ec', script], { timeoutMs: 30_000 });
  if (result.status !== 0) throw new Error(`${script}: ${result.status}\n${result.stderr}${result.stdout}`);
  return result.stdout.trim();
}

interface Setup {
  readonly folder: string;
  readonly disk: string;
  readonly target: FileTarget;
  readonly fuse: FuseFile;
  readonly gone: Promise<void>;
}

const undo: (() => Promise<void> | void)[] = [];
afterEach(async () => {
  for (const step of undo.splice(0).reverse()) await step();
});

function setUp(backend: 'io_uring' | 'epoll'): Setup {
  const folder = mkdtempSync(join(tmpdir(), 'drbdts-fuse-'));
  undo.push(() => rmSync(folder, { recursive: true, force: true }));
  const disk = join(folder, 'disk');
  const mountPoint = join(folder, 'mnt');
  mkdirSync(mountPoint);
  writeFileSync(disk, '');
  truncateSync(disk, SIZE);
  const ring = new NativeRing({ poolBytes: 64 * MiB, backend });
  undo.push(() => ring.close());
  const target = new FileTarget(ring.openFile(disk, {}));
  let closed = () => {};
  const gone = new Promise<void>((done) => {
    closed = done;
  });
  const fuse = new FuseFile(ring, target, mountPoint, 'data', () => closed());
  undo.push(async () => {
    fuse.close();
    await gone;
  });
  return { folder, disk, target, fuse, gone };
}

async function loop(fuse: FuseFile, names: readonly string[] = []): Promise<BlockDevice> {
  const device = await attachLoop(fuse.path, names);
  undo.push(async () => {
    await runCommand(['losetup', '-d', device.node], { timeoutMs: 5000 });
  });
  return device;
}

describe.runIf(canMount).each(['io_uring', 'epoll'] as const)('a block target as a FUSE file (%s)', (backend) => {
  it('is one file of the size of the target, and what is written to it is in the target', async () => {
    const { fuse, disk, target } = setUp(backend);
    expect(await sh(`stat -c '%s %a' ${fuse.path}; ls ${fuse.directory} | wc -l`)).toBe(`${SIZE} 600\n0`);
    await sh(`yes pattern | dd of=${fuse.path} bs=64k count=20 seek=3 conv=notrunc,fsync iflag=fullblock status=none`);
    const expected = Buffer.from('pattern\n'.repeat((20 * 65536) / 8));
    expect(
      readFileSync(disk)
        .subarray(3 * 65536, 23 * 65536)
        .equals(expected),
    ).toBe(true);
    expect(await sh(`dd if=${fuse.path} bs=1M status=none | sha256sum`)).toBe(await sh(`sha256sum <${disk}`));
    expect(target.writers + target.readers).toBe(0);
  });

  it('carries an ext4 on a loop device, with discard, through unmount and remount', async () => {
    const { fuse, disk, target, folder } = setUp(backend);
    const name = join(folder, 'drbd7');
    const device = await loop(fuse, [name]);
    expect(target.writers).toBe(1);
    const mountPoint = join(folder, 'tree');
    await sh(`mkfs.ext4 -q ${name} && mkdir ${mountPoint} && mount ${name} ${mountPoint}`);
    await sh(`head -c 20M /dev/urandom >${mountPoint}/big; sha256sum <${mountPoint}/big >${folder}/sum; sync`);
    await expect(detachDevice(device)).rejects.toThrow(/held open by someone.*mounted on .*tree/s);
    await sh(`rm ${mountPoint}/big; cp ${disk} ${mountPoint}/../copy; fstrim ${mountPoint}; umount ${mountPoint}`);
    await sh(
      `mount ${name} ${mountPoint}; head -c 5M /dev/urandom >${mountPoint}/b; sha256sum <${mountPoint}/b >${folder}/sum; umount ${mountPoint}`,
    );
    await sh(
      `mount -o ro ${name} ${mountPoint}; sha256sum <${mountPoint}/b | cmp - ${folder}/sum; umount ${mountPoint}`,
    );
    await detachDevice(device);
    expect(target.writers).toBe(0);
    await sh(`e2fsck -fn ${disk}`);
  });

  it('cannot be opened on a Secondary', async () => {
    const { fuse, target } = setUp(backend);
    target.role = 'Secondary';
    await expect(sh(`dd if=/dev/zero of=${fuse.path} bs=4k count=1 conv=notrunc`)).rejects.toThrow(
      /Read-only file system/,
    );
    await expect(sh(`dd if=${fuse.path} of=/dev/null bs=4k count=1`)).rejects.toThrow(/Wrong medium type/);
  });

  it('refuses parts of sectors and goes on', async () => {
    const { fuse } = setUp(backend);
    await expect(sh(`printf abc | dd of=${fuse.path} bs=3 conv=notrunc status=none`)).rejects.toThrow(
      /Invalid argument/,
    );
    await sh(`dd if=/dev/zero of=${fuse.path} bs=512 count=1 conv=notrunc status=none`);
  });
});
