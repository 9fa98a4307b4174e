/**
 * The Linux kernel's own NFSv3 client, in a guest, against drbdts' NFS server over an ext4 on a drbdts device: the whole
 * stack of a head. Locks are left out: mounted with `nolock`.
 */
import { mkdirSync, writeFileSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { requires } from '../support/requires.js';
import { canBootGuests, GUEST_ADDRESS, type Head, HOST_ADDRESS, Lab } from './support/lab.js';

const CHECK_LIMIT_MS = 90_000;

const SOURCE = resolve(import.meta.dirname, '../../src/nfs');

/** In a guest, in the mounted export: real programs over some dozens of names, each result compared with its source. */
const TREES = `set -e
cp -a ${SOURCE} copied
diff -r ${SOURCE} copied
tar cf packed.tar -C ${SOURCE} .
mkdir unpacked
tar xf packed.tar -C unpacked
diff -r copied unpacked
git -c init.defaultBranch=main init -q repository
cd repository
git config user.email guest@example.org
git config user.name guest
git config gc.auto 0
cp -r ../copied/. .
git add .
git commit -qm first
echo more >>service.ts
git commit -qam second
git gc -q
git fsck --full --strict
cd ..
git clone -q repository clone
git -C clone fsck
diff -r -x .git repository clone
rm -r copied packed.tar unpacked repository clone
[ -z "$(ls)" ] || [ "$(ls)" = lost+found ]
echo trees are equal`;

const canRun =
  canBootGuests() &&
  requires('mount.nfs', 'nfs-common') &&
  requires('mkfs.ext4', 'e2fsprogs') &&
  requires('fio', 'fio') &&
  requires('git', 'git');

describe.runIf(canRun)("the kernel's NFSv3 client", () => {
  let lab: Lab;
  let head: Head;
  let tree: string;

  beforeAll(async () => {
    lab = await Lab.start();
    head = lab.addHead({
      name: 'test-master',
      address: HOST_ADDRESS,
      peer: { name: 'test-backup', address: GUEST_ADDRESS },
      sizeKib: 1024 * 1024,
    });
    tree = join(head.directory, 'drbd');
    mkdirSync(tree);
    writeFileSync(head.exportsFile, `${tree} 10.77.0.*(rw,sync,no_root_squash,mp,fsid=2)\n`);
    await head.drbdts('create-md', '--force', 'data');
    await head.drbdts('up', 'data');
    await head.drbdts('primary', '--force', 'data');
    await lab.sh(`mkfs.ext4 -q ${head.device}; mount ${head.device} ${tree}`);
    await head.drbdts('exportfs', '-a');
  });

  afterAll(() => lab?.destroy());

  const check = (...args: string[]) => lab.script('nfs-check', ['-x', tree, '-s', '-L', ...args], CHECK_LIMIT_MS);

  it('does what file systems do, mounted by given ports and by the port mapper', {
    timeout: CHECK_LIMIT_MS + 5000,
  }, async () => {
    const output = await check();
    expect(output).toContain('mounted with the ports from rpcbind');
    expect(output).toContain('PASSED');
  });

  it('copies, packs, unpacks and clones trees', { timeout: CHECK_LIMIT_MS + 5000 }, async () => {
    expect(await check('-r', TREES)).toContain('trees are equal');
  });

  it('lets go of everything: the tree is unmounted at once and the head becomes Secondary', async () => {
    await head.drbdts('exportfs', '-u', tree);
    await lab.sh(`umount ${tree}; e2fsck -fn ${head.device}`);
    await head.drbdts('secondary', 'data');
    await head.drbdts('down', 'data');
  });
});
