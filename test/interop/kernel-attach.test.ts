/**
 * A whole head inside a guest: where the kernel has an NBD client, `drbdts primary` makes the block device with it. (This
 * machine's kernel may have none; here the other way, FUSE and loop, is what every other test uses.)
 */
import { execFile } from 'node:child_process';
import { resolve } from 'node:path';
import { promisify } from 'node:util';
import { describe, expect, it } from 'vitest';
import { requires } from '../support/requires.js';
import { canBootGuests } from './support/lab.js';

const PROJECT = resolve(import.meta.dirname, '../..');
const LIMIT_MS = 90_000;
const canRun = canBootGuests() && requires('nbd-client', 'nbd-client') && requires('mkfs.ext4', 'e2fsprogs');

describe.runIf(canRun)('a head whose kernel has an NBD client', () => {
  it('attaches with it, and the device comes and goes with the role', { timeout: LIMIT_MS + 5000 }, async () => {
    const guest = [`${PROJECT}/test/lab/nbd-attach`, `${PROJECT}/bin/drbdts`];
    const { stdout } = await promisify(execFile)(`${PROJECT}/test/lab/uml`, ['-m', '768M', '-t', '80', ...guest], {
      timeout: LIMIT_MS,
    });
    expect(stdout).toContain('device: /dev/nbd0');
    expect(stdout).toContain('secondary while mounted: 11, 1 holder');
    expect(stdout).toContain('PASSED');
  });
});
