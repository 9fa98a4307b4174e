import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { applyActivityLog } from '../../src/cli/apply-al.js';
import { createMetadata } from '../../src/cli/create-md.js';
import { dumpMetadata } from '../../src/cli/dump-md.js';
import { resolveFromConfig } from '../../src/cli/metadata-config.js';
import { parseTarget } from '../../src/cli/metadata-target.js';
import { wipeMetadata } from '../../src/cli/wipe-md.js';
import { imageFolder, makeImage, ours, readAt, writeAt } from '../metadata/images.js';

const MIB = 2 ** 20;
const folder = imageFolder();

/** The metadata of the dump in the specification: 1 GiB, internal, 71 bits set. */
function specified(path: string) {
  const target = parseTarget(makeImage(path, 1024 * MIB), 'internal');
  ours((context) => createMetadata(target, {}, context));
  const superblock = Buffer.alloc(64);
  superblock.writeBigUInt64BE(2097016n, 0);
  superblock.writeBigUInt64BE(0x8a2f11c03d9e7b41n, 8);
  superblock.writeBigUInt64BE(0x5c17e60fd02b9a36n, 16);
  superblock.writeBigUInt64BE(0x77a1b2c3d4e5f607n, 24);
  superblock.writeBigUInt64BE(0x1122334455667788n, 40);
  superblock.writeUInt32BE(0xb3, 56);
  superblock.writeUInt32BE(0x8374026b, 60);
  writeAt(path, 1073737728, superblock);
  writeAt(path, 1073737728 + 84, Buffer.from('00100000', 'hex'));
  const bitmap = Buffer.alloc(160);
  bitmap.fill(0xff, 0, 8);
  for (const word of [13, 14, 15]) bitmap[word * 8] = 1;
  bitmap[16 * 8] = 0xf0;
  writeAt(path, 1073672192, bitmap);
  return target;
}

describe('dump-md', () => {
  it('prints the dump of the specification, with the stripes newer tools require', () => {
    const target = specified(join(folder, 'specified'));
    const now = new Date(1795358354_000);
    const dumped = ours((context) => dumpMetadata(target, { now, hostName: 'test-master' }, context));
    expect(dumped).toEqual({
      status: 0,
      err: '',
      out: `# DRBD meta data dump
# 2026-11-22 14:39:14 +0000 [1795358354]
# test-master> drbdmeta 0 v08 ${target.disk} internal dump-md
#

version "v08";

# md_size_sect 136
# md_offset 1073737728
# al_offset 1073704960
# bm_offset 1073672192

uuid {
    0x8A2F11C03D9E7B41; 0x5C17E60FD02B9A36; 0x77A1B2C3D4E5F607; 0x0000000000000000;
    flags 0x000000B3;
}
# al-extents 257;
la-size-sect 2097016;
bm-byte-per-bit 4096;
device-uuid 0x1122334455667788;
la-peer-max-bio-size 1048576;
al-stripes 1;
al-stripe-size-4k 8;
# bm-bytes 32768;
bm {
   # at 0kB
    0xFFFFFFFFFFFFFFFF; 0x0000000000000000; 0x0000000000000000; 0x0000000000000000;
    8 times 0x0000000000000000;
    0x0000000000000000; 0x0000000000000001; 0x0000000000000001; 0x0000000000000001;
    0x00000000000000F0; 0x0000000000000000; 0x0000000000000000; 0x0000000000000000;
    4076 times 0x0000000000000000;
}
# bits-set 71;
`,
    });
    const json = ours((context) => dumpMetadata(target, { now, hostName: 'test', json: true }, context));
    expect(JSON.parse(json.out)).toMatchObject({ currentUuid: '0x8A2F11C03D9E7B41', flags: 0xb3, clean: true });
  });

  it('refuses unclean metadata unless forced, and then spoils the dump for restoring', () => {
    const path = join(folder, 'unclean');
    const target = specified(path);
    writeAt(path, 1073737728 + 56, Buffer.from('000000118374026c', 'hex'));
    const options = { now: new Date(0), hostName: 'test' };
    const refused = ours((context) => dumpMetadata(target, options, context));
    expect(refused).toEqual({ status: 255, out: '', err: 'Found meta data is "unclean", please apply-al first\n' });
    const forced = ours((context) => dumpMetadata(target, { ...options, force: true }, context));
    expect(forced.status).toBe(0);
    expect(forced.out).toContain("\nThis_is_an_unclean_meta_data_dump._Don't_trust_the_bitmap.\n");
    expect(ours((context) => applyActivityLog(target, context))).toEqual({ status: 0, out: '', err: '' });
    expect(readAt(path, 1073737728 + 56, 8).toString('hex')).toBe('000000918374026b');
    expect(ours((context) => dumpMetadata(target, options, context)).status).toBe(0);
  });

  it('shows the copy on disk while an engine has it, and says so', async () => {
    const target = specified(join(folder, 'attached'));
    const holder = spawn('flock', ['--no-fork', '--exclusive', target.disk, 'sh', '-c', 'echo locked; exec sleep 60']);
    try {
      await once(holder.stdout, 'data');
      const dumped = ours((context) => dumpMetadata(target, { now: new Date(0), hostName: 'test' }, context));
      expect(dumped.status).toBe(0);
      expect(dumped.out).toMatch(/^# Output might be stale, since minor 0 is attached\n# DRBD meta data dump\n/);
      expect(() => ours((context) => applyActivityLog(target, context))).toThrow(/is in use by process/);
    } finally {
      holder.kill('SIGTERM');
      await once(holder, 'exit');
    }
  });

  it('notices an engine by the data disk too, since slots share a metadata device; a missing data disk does no harm', async () => {
    const data = makeImage(join(folder, 'slot-data'), MIB);
    const meta = makeImage(join(folder, 'slot-meta'), 128 * MIB);
    const target = parseTarget(data, `${meta}[0]`);
    ours((context) => createMetadata(target, {}, context));
    const dump = (from: typeof target) =>
      ours((context) => dumpMetadata(from, { now: new Date(0), hostName: 'test' }, context));
    const holder = spawn('flock', ['--no-fork', '--exclusive', data, 'sh', '-c', 'echo locked; exec sleep 60']);
    try {
      await once(holder.stdout, 'data');
      expect(dump(target).out).toMatch(/^# Output might be stale/);
      expect(() => ours((context) => createMetadata(target, {}, context))).toThrow(/is in use by process/);
    } finally {
      holder.kill('SIGTERM');
      await once(holder, 'exit');
    }
    expect(dump(target).out).toMatch(/^# DRBD meta data dump/);
    expect(dump(parseTarget(join(folder, 'gone'), `${meta}[0]`))).toMatchObject({ status: 0, err: '' });
  });

  it('and the others have an answer for a device without metadata', () => {
    const target = parseTarget(makeImage(join(folder, 'blank'), MIB), 'internal');
    const options = { now: new Date(0), hostName: 'test' };
    expect(ours((context) => dumpMetadata(target, options, context))).toEqual({
      status: 255,
      out: '',
      err: 'No valid meta data found\n',
    });
    expect(ours((context) => applyActivityLog(target, context)).status).toBe(255);
    expect(ours((context) => wipeMetadata(target, context)).status).toBe(0);
  });

  it('finds the devices of a resource in the configuration', () => {
    const configFolder = join(folder, 'etc');
    mkdirSync(configFolder);
    const configPath = join(configFolder, 'drbd.conf');
    writeFileSync(
      configPath,
      `resource data {
  protocol C;
  on test-master {
    address 172.16.1.113:7788;
    volume 0 { device /dev/drbd3; disk /dev/sdb1; meta-disk /dev/sdc1[1]; }
    volume 1 { device /dev/drbd4; disk /dev/sdb2; meta-disk internal; }
  }
  on test-backup {
    address 172.16.1.114:7788;
    volume 0 { device /dev/drbd3; disk /dev/sdb1; meta-disk /dev/sdc1[1]; }
    volume 1 { device /dev/drbd4; disk /dev/sdb2; meta-disk internal; }
  }
}
`,
    );
    const environment = { out: () => {}, err: () => {}, isTerminal: false, env: { DRBDTS_NODE: 'test-master' } };
    expect(resolveFromConfig('data', environment, configPath)).toEqual([
      { minor: 3, disk: '/dev/sdb1', metaDisk: { kind: 'indexed', path: '/dev/sdc1', index: 1 } },
      { minor: 4, disk: '/dev/sdb2', metaDisk: { kind: 'internal', path: '/dev/sdb2', index: -1 } },
    ]);
    expect(resolveFromConfig('all', environment, configPath).length).toBe(2);
    expect(() => resolveFromConfig('nosuch', environment, configPath)).toThrow(/nosuch/);
  });
});
