import { spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { join } from 'node:path';
import { Command } from 'commander';
import { describe, expect, it } from 'vitest';
import { OperatorError } from '../../src/base/errors.js';
import { type CreateOptions, createMdCommand, createMetadata } from '../../src/cli/create-md.js';
import { MetadataStore, parseTarget, targetsFrom } from '../../src/cli/metadata-target.js';
import { showGiCommand } from '../../src/cli/show-gi.js';
import { wipeMdCommand } from '../../src/cli/wipe-md.js';
import { imageFolder, makeImage, ours, readAt, writeAt } from '../metadata/images.js';
import { requires } from '../support/requires.js';

const MIB = 2 ** 20;
const folder = imageFolder();
let imageCount = 0;

/** A file like an empty disk. */
const blank = (sizeBytes: number) => makeImage(join(folder, `image-${imageCount++}`), sizeBytes);

const create = (path: string, metaDisk = 'internal', options: CreateOptions = {}, answer = false) =>
  ours(
    (context) => createMetadata(parseTarget(metaDisk === 'internal' ? path : '', metaDisk), options, context),
    answer,
  );

/** Runs a command line as main does. */
function runCommand(command: { register: typeof createMdCommand.register }, argv: string[]) {
  let status = -1;
  const outcome = ours((context) => {
    const program = new Command('drbdts').exitOverride();
    command.register(program, context, (code) => {
      status = code;
    });
    program.parse(argv, { from: 'user' });
    return 0;
  });
  return { ...outcome, status };
}

function thrownBy(action: () => unknown): OperatorError {
  try {
    action();
  } catch (error) {
    if (error instanceof OperatorError) return error;
    throw error;
  }
  throw new Error('nothing was thrown');
}

describe('create-md', () => {
  it('says on an empty disk what drbdmeta says, and asks nothing', () => {
    const image = blank(1000000 * 1024);
    expect(create(image)).toEqual({
      status: 0,
      out: 'initializing activity log\nWriting meta data...\nNew drbd meta data block successfully created.\n',
      err: 'initializing bitmap (32 KB) to all zero\n',
    });
    expect(readAt(image, 1999992 * 512 + 60, 4).toString('hex')).toBe('8374026b');
  });

  it('clears stale bits under the new metadata', () => {
    const image = blank(8 * MIB);
    const bitmapOffset = 8 * MIB - 40960;
    writeAt(image, bitmapOffset, new Uint8Array(4096).fill(0xff));
    create(image);
    expect(readAt(image, bitmapOffset, 4096).every((byte) => byte === 0)).toBe(true);
  });

  it('asks before it overwrites metadata; only yes goes on', () => {
    const image = blank(8 * MIB);
    create(image);
    writeAt(image, 8 * MIB - 4096 + 8, Buffer.from('8a2f11c03d9e7b41', 'hex'));
    const declined = create(image);
    expect(declined).toEqual({
      status: 1,
      out: 'Do you really want to overwrite the existing v08 meta-data?\nOperation cancelled.\n',
      err:
        'You want me to create a v08 style flexible-size internal meta data block.\n' +
        'There appears to be a v08 flexible-size internal meta data block\n' +
        `already in place on ${image} at byte offset ${8 * MIB - 4096}\n`,
    });
    expect(readAt(image, 8 * MIB - 4096 + 8, 8).toString('hex')).toBe('8a2f11c03d9e7b41');
    expect(create(image, 'internal', { ifNeeded: true }).status).toBe(1);
    expect(create(image, 'internal', {}, true).status).toBe(0);
    expect(readAt(image, 8 * MIB - 4096 + 8, 8).toString('hex')).toBe('0000000000000004');
    expect(create(image, 'internal', { ifNeeded: true })).toMatchObject({
      status: 0,
      out: `${image}: already initialised\n`,
    });
  });

  it('asks before it overwrites metadata of another version or place', () => {
    const image = blank(8 * MIB);
    create(image);
    writeAt(image, 8 * MIB - 4096 + 60, Buffer.from('8374026d', 'hex'));
    expect(create(image)).toMatchObject({
      status: 1,
      out: 'Do you really want to overwrite the existing meta-data?\nOperation cancelled.\n',
      err: expect.stringContaining('(this is DRBD metadata of version v09, expected v08)'),
    });
    expect(readAt(image, 8 * MIB - 4096 + 60, 4).toString('hex')).toBe('8374026d');
    expect(create(image, 'internal', {}, true).status).toBe(0);
  });

  it.runIf(requires('mkfs.ext4', 'e2fsprogs'))('refuses to cut off a filesystem, and shows the ways out', () => {
    const image = blank(64 * MIB);
    expect(spawnSync('mkfs.ext4', ['-q', image]).status).toBe(0);
    const before = readAt(image, 0, 64 * MIB);
    const refused = create(image, 'internal', { force: true }, true);
    expect(refused.status).toBe(40);
    // The words of drbdmeta 9.22 on such an image.
    expect(refused.out).toContain(
      'md_offset 67104768\nal_offset 67072000\nbm_offset 67067904\n\nFound ext3 filesystem\n' +
        '       65536 kB data area apparently used\n       65496 kB left usable by current configuration\n\n' +
        'Device size would be truncated, which\nwould corrupt data and result in\n' +
        "'access beyond end of device' errors.\nYou need to either\n   * use external meta data (recommended)\n" +
        '   * shrink that filesystem first\n   * zero out the device (destroy the filesystem)\nOperation refused.\n\n',
    );
    expect(refused.out).toContain(`resize2fs ${image} 65496K\n`);
    expect(readAt(image, 0, 64 * MIB).equals(before)).toBe(true);
    const external = create(image, image);
    expect(external.status).toBe(40);
    expect(external.out).toContain('Found ext3 filesystem\n\nThis would corrupt existing data.\n');
    expect(readAt(image, 0, 64 * MIB).equals(before)).toBe(true);
    expect(create(image, 'internal', { force: true, ignoreSanityChecks: true }).status).toBe(0);
  });

  it.runIf(requires('mkfs.ext4', 'e2fsprogs'))('asks when a filesystem was shrunk to make room', () => {
    const image = blank(64 * MIB);
    expect(spawnSync('mkfs.ext4', ['-q', image, '60M']).status).toBe(0);
    const declined = create(image);
    expect(declined.status).toBe(1);
    expect(declined.out).toContain('       61440 kB data area apparently used\n');
    expect(declined.out).toContain('\nDo you want to proceed?\nOperation canceled.\n');
    expect(create(image, 'internal', {}, true).status).toBe(0);
    expect(spawnSync('e2fsck', ['-fn', image]).status).toBe(0);
  });

  it.runIf(requires('mkswap', 'util-linux'))('knows swap space, and warns of anything it does not know', () => {
    const swap = blank(8 * MIB);
    expect(spawnSync('mkswap', [swap]).status).toBe(0);
    expect(create(swap).out).toContain('Found swap space signature\n\n ==> This might destroy existing data! <==\n');
    const noise = blank(8 * MIB);
    writeAt(noise, 4000, Buffer.from('hello'));
    expect(create(noise)).toMatchObject({ status: 1, out: expect.stringContaining('Found some data\n') });
    expect(create(noise, 'internal', {}, true).status).toBe(0);
  });

  it('looks for foreign data in its own slot of a shared device', () => {
    const shared = blank(256 * MIB);
    expect(create(shared, `${shared}[0]`).status).toBe(0);
    const slot0 = readAt(shared, 0, 128 * MIB);
    // Slot 0 is in use; slot 1 is not.
    expect(create(shared, `${shared}[1]`).out).not.toContain('Found');
    expect(readAt(shared, 0, 128 * MIB).equals(slot0)).toBe(true);
    expect(readAt(shared, 128 * MIB + 60, 4).toString('hex')).toBe('8374026b');
  });

  it('explains what cannot work, with the exit code of drbdmeta', () => {
    expect(thrownBy(() => create(join(folder, 'none')))).toMatchObject({
      exitCode: 20,
      message: `open(${folder}/none) failed: No such file or directory`,
    });
    expect(thrownBy(() => create(folder))).toMatchObject({ exitCode: 20 });
    expect(thrownBy(() => create(blank(60 * 1024))).exitCode).toBe(10);
    expect(thrownBy(() => create(blank(MIB), 'internal', { alStripes: 0 }))).toMatchObject({
      exitCode: 10,
      message: 'invalid (too small) al-stripe* settings',
    });
    expect(thrownBy(() => parseTarget('', '/dev/sdb[foo]'))).toMatchObject({
      exitCode: 20,
      message: "'foo' is not a valid index number.",
    });
    const noConfig = () => [];
    const environment = { out: () => {}, err: () => {}, isTerminal: false, env: {} };
    expect(thrownBy(() => targetsFrom(undefined, {}, environment, noConfig)).exitCode).toBe(1);
    expect(thrownBy(() => targetsFrom('data', { disk: '/x' }, environment, noConfig)).exitCode).toBe(1);
    expect(thrownBy(() => targetsFrom(undefined, { metaDisk: 'internal' }, environment, noConfig)).exitCode).toBe(1);
  });

  it('keeps away from a device an engine holds, and says who it is and what to do', async () => {
    const image = blank(8 * MIB);
    const holder = spawn('flock', ['--no-fork', '--exclusive', image, 'sh', '-c', 'echo locked; exec sleep 60']);
    try {
      await once(holder.stdout, 'data');
      const refused = thrownBy(() => create(image));
      expect(refused.exitCode).toBe(20);
      expect(refused.message).toMatch(/is configured! It is in use by process \d+ \(.+\)\. Stop the resource/);
      expect(readAt(image, 8 * MIB - 4096, 4096).every((byte) => byte === 0)).toBe(true);
    } finally {
      holder.kill('SIGTERM');
      await once(holder, 'exit');
    }
  });

  it('keeps engines away while it works, data disk included', () => {
    const data = blank(8 * MIB);
    const meta = blank(MIB);
    const isLocked = (path: string) => spawnSync('flock', ['--nonblock', path, 'true']).status === 1;
    const store = MetadataStore.open(parseTarget(data, meta), true);
    try {
      expect([isLocked(data), isLocked(meta)]).toEqual([true, true]);
    } finally {
      store.close();
    }
    expect([isLocked(data), isLocked(meta)]).toEqual([false, false]);
  });

  it('is a command with options, JSON and a meta-disk of its own', () => {
    const data = blank(300 * MIB);
    const meta = blank(2 * MIB);
    const created = runCommand(createMdCommand, ['create-md', '--json', '--disk', data, '--meta-disk', meta]);
    expect(created.status).toBe(0);
    expect(JSON.parse(created.out)).toEqual({
      metaDisk: meta,
      created: true,
      superblockOffsetBytes: 0,
      activityLogOffsetBytes: 4096,
      bitmapOffsetBytes: 36864,
      mdSizeSectors: 4096,
      capacitySectors: 614400,
    });
    expect(runCommand(showGiCommand, ['show-gi', '--disk', data, '--meta-disk', meta]).out).toContain(
      'meta-data: clean\nzero size device -- never seen peer yet?\n',
    );
    const forced = runCommand(createMdCommand, ['create-md', '--force', '--disk', data, '--meta-disk', meta]);
    expect(forced.status).toBe(0);
    expect(forced.out).toContain('*** confirmation forced via --force option ***\n');
    expect(runCommand(wipeMdCommand, ['wipe-md', '--yes', '--disk', data, '--meta-disk', meta]).status).toBe(0);
    expect(runCommand(wipeMdCommand, ['wipe-md', '--yes', '--disk', data, '--meta-disk', meta])).toMatchObject({
      status: 0,
      out: 'There appears to be no drbd meta data to wipe out?\n',
    });
    expect(runCommand(showGiCommand, ['show-gi', '--disk', data, '--meta-disk', meta]).status).toBe(255);
  });
});
