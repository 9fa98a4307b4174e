/**
 * Loop-mounted ext4 images, for tests that need the kernel's filesystem. Everything made here is unmade by `dispose`.
 */
import { spawnSync } from 'node:child_process';
import { chmodSync, closeSync, constants, existsSync, mkdirSync, mkdtempSync, openSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { requires } from './requires.js';

export function run(program: string, ...args: string[]): string {
  const { status, stdout, stderr, error } = spawnSync(program, args, { encoding: 'utf8' });
  if (error) throw error;
  if (status !== 0) throw new Error(`${program} ${args.join(' ')} failed (${status}): ${`${stdout}${stderr}`.trim()}`);
  return stdout;
}

/** Can images be mounted here? What is missing is told and counted (see `requires`). */
export function canMountImages(): boolean {
  if (process.getuid?.() !== 0) {
    process.stderr.write('skipped: tests that mount images: run as root\n');
    return false;
  }
  return (
    requires('mkfs.ext4', 'e2fsprogs') &&
    requires('losetup', 'mount') &&
    requires('setpriv', 'util-linux') &&
    requires('/dev/loop-control', 'linux-image-amd64 (module loop)')
  );
}

/** Attaches a loop device, making its node when /dev lacks it. */
function attach(image: string): string {
  for (let attempt = 0; ; attempt++) {
    const free = run('losetup', '--find').trim();
    const number = /^\/dev\/loop(\d+)$/.exec(free)?.[1];
    if (number !== undefined && !existsSync(free)) run('mknod', free, 'b', '7', number);
    try {
      run('losetup', free, image);
      return free;
    } catch (error) {
      // Someone else took it between the two calls.
      if (attempt === 10) throw error;
    }
  }
}

export class Ext4Image {
  readonly mountPoint: string;
  private device: string | undefined;
  private isMounted = false;

  private constructor(
    readonly image: string,
    readonly folder: string,
    private readonly store?: string,
  ) {
    this.mountPoint = join(folder, 'mnt');
    // Other users must get through to what is mounted below.
    chmodSync(folder, 0o755);
    mkdirSync(this.mountPoint, { recursive: true });
  }

  static make(sizeMiB = 64, ...mkfsOptions: string[]): Ext4Image {
    const folder = mkdtempSync(join(tmpdir(), 'drbdts-ext4-'));
    const image = join(folder, 'image');
    run('truncate', '-s', `${sizeMiB}M`, image);
    // Blocks of 4 KiB as on any real volume; mkfs gives small images 1 KiB.
    run('mkfs.ext4', '-q', '-F', '-b', '4096', ...mkfsOptions, image);
    return new Ext4Image(image, folder);
  }

  /** Like `make`, on a tmpfs of less room than the image pretends to have: writes fail once it is full. */
  static makeOvercommitted(roomMiB: number, sizeMiB: number): Ext4Image {
    const folder = mkdtempSync(join(tmpdir(), 'drbdts-ext4-'));
    const store = join(folder, 'store');
    mkdirSync(store);
    run('mount', '-t', 'tmpfs', '-o', `size=${roomMiB}M`, 'none', store);
    const image = join(store, 'image');
    run('truncate', '-s', `${sizeMiB}M`, image);
    run('mkfs.ext4', '-q', '-F', '-b', '4096', image);
    return new Ext4Image(image, folder, store);
  }

  /** A byte copy, as the other head has it. */
  copy(): Ext4Image {
    const folder = mkdtempSync(join(tmpdir(), 'drbdts-ext4-'));
    const image = join(folder, 'image');
    run('cp', '--sparse=always', this.image, image);
    return new Ext4Image(image, folder);
  }

  mount(options = 'noatime'): void {
    this.device ??= attach(this.image);
    run('mount', '-t', 'ext4', '-o', options, this.device, this.mountPoint);
    this.isMounted = true;
  }

  /** No -l, no -f, no retry: it must succeed at once. */
  unmount(): void {
    run('umount', this.mountPoint);
    this.isMounted = false;
  }

  /**
   * Waits until the kernel let go of the filesystem: a mount namespace that someone else made meanwhile keeps a copy of
   * the mount, and with it the superblock, after our umount.
   */
  async untilFree(): Promise<void> {
    for (let attempt = 0; this.device; attempt++) {
      try {
        // O_EXCL without O_CREAT on a block device: EBUSY while it is mounted anywhere.
        closeSync(openSync(this.device, constants.O_RDONLY | constants.O_EXCL));
        return;
      } catch (error) {
        if ((error as NodeJS.ErrnoException).code !== 'EBUSY' || attempt === 300) throw error;
        await new Promise((done) => setTimeout(done, 100));
      }
    }
  }

  dispose(): void {
    if (this.isMounted) run('umount', '--lazy', this.mountPoint);
    if (this.device) run('losetup', '--detach', this.device);
    if (this.store) run('umount', this.store);
    rmSync(this.folder, { recursive: true });
  }
}
