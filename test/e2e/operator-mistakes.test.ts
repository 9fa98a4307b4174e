/**
 * What an operator gets wrong before anything runs: every mistake is refused with its exit code and a sentence that says
 * what to do, and changes nothing.
 */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { canRunHeads, DRBDTS, drbdts, MiB } from '../support/head-tests.js';
import { Cluster, type Machine } from '../support/heads.js';

/** A resource of this head alone; its peer never answers. */
const conf = (name: string, disk: string, metaDisk = 'internal', minor = 7) => `resource ${name} {
  protocol C;
  device /dev/drbd${minor};
  disk ${disk};
  meta-disk ${metaDisk};
  on test-master {
    address 172.16.1.113:77${10 + minor};
  }
  on test-backup {
    address 172.16.1.114:77${10 + minor};
  }
}
`;

describe.runIf(canRunHeads())('operator mistakes', () => {
  let cluster: Cluster;
  let head: Machine;

  beforeAll(async () => {
    cluster = await Cluster.create({ projectDirectory: `${import.meta.dirname}/../..`, diskBytes: 64 * MiB });
    head = cluster.master;
  }, 30_000);
  afterAll(() => cluster?.destroy(), 30_000);

  const write = (path: string, text: string) => head.exec(['tee', path], { input: text });

  describe('nothing runs yet', () => {
    it('commands that ask say that drbdts does not run, with 20', async () => {
      for (const command of [['status'], ['proc'], ['status', 'data'], ['primary', 'data'], ['attach', 'data']]) {
        const { status, stderr } = await drbdts(head, ...command);
        expect(status, command.join(' ')).toBe(20);
        expect(stderr).toMatch(/does not run on this head .*drbdts up/);
      }
    });

    it('commands that stop have nothing to do, and succeed', async () => {
      for (const command of [
        ['down', 'data'],
        ['secondary', 'data'],
        ['disconnect', 'data'],
        ['detach', 'data'],
        ['exportfs', '-u', '-a'],
        ['exportfs', '-u', '/drbd'],
      ])
        expect((await drbdts(head, ...command)).status, command.join(' ')).toBe(0);
    });

    it('role, cstate and dstate say Unconfigured', async () => {
      for (const command of ['role', 'cstate', 'dstate'])
        expect(await drbdts(head, command, 'data')).toMatchObject({ status: 0, stdout: 'Unconfigured\n' });
    });
  });

  it('wrong usage is 1, with the right usage', async () => {
    for (const command of [
      ['up'],
      ['frobnicate', 'data'],
      ['connect', '--frobnicate', 'data'],
      ['exportfs', '-u'],
      ['exportfs', '-a', '/drbd'],
      ['up', '--nbd-listen', 'banana', 'data'],
      ['up', '-c', '-', 'data'],
      ['nfs', 'ls', 'banana'],
      ['create-md'],
    ]) {
      const { status, stderr } = await drbdts(head, ...command);
      expect(status, command.join(' ')).toBe(1);
      expect(stderr).not.toMatch(/\n {4}at /);
      expect(stderr.length).toBeGreaterThan(10);
    }
  });

  it('an unknown resource is 1 and names the known ones, in every command', async () => {
    for (const command of [
      'up',
      'down',
      'primary',
      'secondary',
      'connect',
      'disconnect',
      'attach',
      'detach',
      'invalidate',
    ])
      for (const name of ['dtaa', '../../etc/passwd']) {
        const { status, stderr } = await drbdts(head, command, name);
        // Where no daemon runs, those that need one say so first.
        const needsDaemon = ['primary', 'connect', 'attach', 'invalidate'].includes(command);
        expect(status, `${command} ${name}`).toBe(needsDaemon ? 20 : 1);
        if (status === 1) expect(stderr).toMatch(/not defined in your config \(for this host\)/);
      }
    for (const command of ['up', 'down', 'secondary', 'create-md', 'dump', 'dump-md', 'show-gi', 'role']) {
      const { status, stderr } = await drbdts(head, command, 'dtaa');
      expect(status, command).toBe(1);
      expect(stderr).toMatch(/not defined in your config[\s\S]*data/);
    }
  });

  it('a mistake in the configuration is 10 and names file and line', async () => {
    await write('/root/bad.conf', conf('data', '/dev/sdb1').replace('meta-disk', 'meta-dikc'));
    for (const command of ['up', 'create-md', 'dump']) {
      const { status, stderr } = await drbdts(head, command, '-c', '/root/bad.conf', 'data');
      expect(status, command).toBe(10);
      expect(stderr).toMatch(/\/root\/bad\.conf:5: [\s\S]*meta-dikc/);
    }
  });

  it('a mistake in the exports is 10 and names file and line', async () => {
    await head.sh('cp /etc/exports /etc/exports.good; echo "/drbd *(rw,frobnicate)" >/etc/exports');
    const { status, stderr } = await drbdts(head, 'exportfs', '-a');
    await head.sh('mv /etc/exports.good /etc/exports');
    expect(status).toBe(10);
    expect(stderr).toMatch(/\/etc\/exports:1: .*frobnicate/);
  });

  it('a configuration path may be relative', async () => {
    await write('/root/rel.conf', conf('rel', '/dev/nosuch'));
    const { stderr } = await head.exec(['bash', '-c', `cd /root && ${DRBDTS} -c rel.conf up rel`]);
    expect(stderr).toMatch(/\/dev\/nosuch/);
  });

  it('an export that is not mounted is refused', async () => {
    const { status, stderr } = await drbdts(head, 'exportfs', '-a');
    expect(stderr).toMatch(/\/drbd.* is not mounted/);
    expect(status).toBe(11);
    const list = await drbdts(head, 'exportfs', '--json');
    expect(JSON.parse(list.stdout)).toMatchObject([{ path: '/drbd', state: 'not served' }]);
    expect((await drbdts(head, 'exportfs', '/nope')).status).toBe(10);
  });

  describe('disks', () => {
    it('a disk that is not there', async () => {
      await write('/root/gone.conf', conf('gone', '/dev/nosuch'));
      const created = await drbdts(head, 'create-md', '-c', '/root/gone.conf', 'gone');
      expect(created.status).toBe(20);
      expect(created.stderr).toMatch(/\/dev\/nosuch/);
      const up = await drbdts(head, 'up', '-c', '/root/gone.conf', 'gone');
      expect(up.status).toBe(10);
      expect(up.stderr).toMatch(/cannot open the backing disk: .*\/dev\/nosuch/);
      expect(await drbdts(head, 'role', '-c', '/root/gone.conf', 'gone')).toMatchObject({ stdout: 'Unconfigured\n' });
    });

    it('a disk too small for metadata', async () => {
      await head.sh('truncate -s 16K /root/small.img');
      await write('/root/small.conf', conf('small', '/root/small.img'));
      const created = await drbdts(head, 'create-md', '-c', '/root/small.conf', 'small');
      expect(created.status).toBe(10);
      expect(created.stderr).toMatch(/16384 bytes\. That's not enough/);
      expect((await drbdts(head, 'up', '-c', '/root/small.conf', 'small')).status).toBe(10);
    });

    it('a disk without metadata: (119), create-md', async () => {
      const { status, stderr } = await drbdts(head, 'up', 'data');
      expect(status).toBe(10);
      expect(stderr).toMatch(/data: Failure: \(119\) No valid meta data found/);
      expect(stderr).toMatch(/drbdts create-md data/);
    });

    it('a filesystem that internal metadata would cut: refused, with the ways out', async () => {
      await head.sh('truncate -s 32M /root/full.img && mkfs.ext4 -q -F /root/full.img');
      await write('/root/full.conf', conf('full', '/root/full.img'));
      const { status, stdout } = await drbdts(head, 'create-md', '-c', '/root/full.conf', 'full');
      expect(status).toBe(40);
      expect(stdout).toMatch(/resize2fs/);
    });

    it('a disk that another engine has', async () => {
      await head.sh('truncate -s 32M /root/one.img');
      await write('/root/one.conf', conf('one', '/root/one.img', 'internal', 1));
      await write('/root/two.conf', conf('two', '/root/one.img', 'internal', 2));
      await head.sh(`${DRBDTS} create-md -c /root/one.conf one && ${DRBDTS} up -c /root/one.conf one`);
      const up = await drbdts(head, 'up', '-c', '/root/two.conf', 'two');
      expect(up.status).toBe(10);
      expect(up.stderr).toMatch(/in use.*\n.*[Aa]nother engine/);
      for (const command of ['create-md', 'wipe-md', 'apply-al']) {
        const { status, stderr } = await drbdts(head, command, '-c', '/root/two.conf', 'two');
        expect(status, command).toBe(20);
        expect(stderr).toMatch(/in use by process \d+/);
      }
    });

    it('a disk that is up already: up does nothing, attach says (124)', async () => {
      expect((await drbdts(head, 'up', '-c', '/root/one.conf', 'one')).status).toBe(0);
      const attach = await drbdts(head, 'attach', '-c', '/root/one.conf', 'one');
      expect(attach.status).toBe(10);
      expect(attach.stderr).toMatch(/\(124\) Device is attached to a disk/);
      const listen = await drbdts(head, 'up', '--nbd-listen', '127.0.0.1:10809', '-c', '/root/one.conf', 'one');
      expect(listen.status).toBe(11);
    });

    it('a disk that shrank', async () => {
      await head.sh(`${DRBDTS} primary --force -c /root/one.conf one`);
      await head.sh(`${DRBDTS} down -c /root/one.conf one`);
      // Metadata of the former size at the end of what is left, as after a copy to a smaller disk.
      await head.sh(
        'cp /root/one.img /root/shrunk.img; tail -c 64K /root/one.img >/tmp/tail; truncate -s 24M /root/shrunk.img; ' +
          'dd if=/tmp/tail of=/root/shrunk.img bs=64K seek=383 conv=notrunc status=none',
      );
      await write('/root/shrunk.conf', conf('shrunk', '/root/shrunk.img', 'internal', 3));
      const { status, stderr } = await drbdts(head, 'up', '-c', '/root/shrunk.conf', 'shrunk');
      expect(status).toBe(10);
      expect(stderr).toMatch(/Failure: \(1\d\d\) .*\n.*create-md shrunk/);
    });

    it('a mounted disk', async () => {
      await head.sh(`truncate -s 32M /root/mounted.img && mkfs.ext4 -q -F /root/mounted.img && mkdir -p /mnt/here
        loop=$(losetup -f); [ -e $loop ] || mknod $loop b 7 \${loop#/dev/loop}
        losetup $loop /root/mounted.img && mount $loop /mnt/here; losetup -d $loop; ln -s $loop /dev/taken`);
      await write('/root/mounted.conf', conf('mounted', '/dev/taken', 'internal', 4));
      const up = await drbdts(head, 'up', '-c', '/root/mounted.conf', 'mounted');
      const created = await drbdts(head, 'create-md', '-c', '/root/mounted.conf', 'mounted');
      await head.sh('umount /mnt/here');
      expect(up.status).toBe(10);
      expect(up.stderr).toMatch(/in use[\s\S]*mounted/);
      expect(created.status).toBe(20);
    });
  });

  it('after all that nothing runs and nothing is attached', async () => {
    const left = await head.sh(
      'pgrep -fa engine-main || true; grep fuse /proc/mounts || true; ls /dev/drbd* 2>&1 || true',
    );
    expect(left).not.toMatch(/engine-main\.js|fuse-|drbd\d/);
  });
});
