/**
 * Gives the kernel a block device whose requests the engine serves: the kernel's NBD client where there is one, else a
 * loop device over a FUSE file. The device's usual name (/dev/drbd0) becomes a symlink to it.
 */
import { existsSync, lstatSync, mkdirSync, readdirSync, readlinkSync, rmSync, symlinkSync } from 'node:fs';
import { dirname } from 'node:path';
import { OperatorError } from '../base/errors.js';
import { runCommand } from './command.js';
import { deviceHolders, isClaimed } from './device-use.js';

const COMMAND_TIMEOUT_MS = 20_000;
const LOOP_MAJOR = 7;
/** Another process may take the free loop device between asking and binding. */
const LOOP_ATTEMPTS = 16;
/** udev and blkid look at new devices for some milliseconds. */
const RELEASE_ATTEMPTS = 25;
const RELEASE_PAUSE_MS = 100;

export interface BlockDevice {
  readonly kind: 'nbd' | 'loop';
  /** `/dev/nbd0` or `/dev/loop0`. */
  readonly node: string;
  /** `/dev/drbd0` and by-res names, all symlinks to `node`. */
  readonly names: readonly string[];
}

async function run(argv: readonly string[]): Promise<string> {
  const result = await runCommand(argv, { timeoutMs: COMMAND_TIMEOUT_MS });
  if (result.status !== 0)
    throw new OperatorError(
      `"${argv.join(' ')}" failed with status ${result.status}: ${(result.stderr || result.stdout).trim()}`,
      20,
      'command-failed',
    );
  return result.stdout.trim();
}

/** Whether this kernel has, or can load, an NBD client and the program to drive it is installed. */
export async function kernelNbdUsable(): Promise<boolean> {
  if (!existsSync('/sys/module/nbd')) {
    const loaded = await runCommand(['modprobe', '-q', 'nbd'], { timeoutMs: COMMAND_TIMEOUT_MS });
    if (loaded.status !== 0 || !existsSync('/sys/module/nbd')) return false;
  }
  return (await runCommand(['nbd-client', '--version'], { timeoutMs: COMMAND_TIMEOUT_MS })).status !== 127;
}

/** Binds a free /dev/nbdN to the export `name` on the engine's Unix socket. */
export async function attachNbd(socketPath: string, name: string, names: readonly string[]): Promise<BlockDevice> {
  const free = readdirSync('/sys/block')
    .filter((device) => /^nbd\d+$/.test(device) && !existsSync(`/sys/block/${device}/pid`))
    .sort((a, b) => Number(a.slice(3)) - Number(b.slice(3)));
  let failure = 'every /dev/nbdN is in use; load the module with more: modprobe nbd nbds_max=64';
  for (const device of free) {
    const node = `/dev/${device}`;
    const result = await runCommand(
      ['nbd-client', '-unix', socketPath, node, '-N', name, '-b', '512', '-timeout', '0'],
      { timeoutMs: COMMAND_TIMEOUT_MS },
    );
    if (result.status === 0) {
      linkNames(node, names);
      return { kind: 'nbd', node, names };
    }
    failure = (result.stderr || result.stdout).trim();
  }
  throw new OperatorError(`no NBD device could be attached: ${failure}`, 20, 'attach-failed');
}

/** Binds a free loop device to the engine's FUSE file, with direct I/O: no second layer of dirty pages. */
export async function attachLoop(file: string, names: readonly string[]): Promise<BlockDevice> {
  let failure = '';
  for (let attempt = 0; attempt < LOOP_ATTEMPTS; attempt++) {
    const node = (await run(['losetup', '-f'])).split(/\s/)[0]!;
    // A private /dev (container, own namespace) does not get the nodes of new loop devices.
    if (!existsSync(node)) await run(['mknod', '-m', '0660', node, 'b', String(LOOP_MAJOR), node.replace(/\D/g, '')]);
    const result = await runCommand(['losetup', '--direct-io=on', node, file], { timeoutMs: COMMAND_TIMEOUT_MS });
    if (result.status === 0) {
      linkNames(node, names);
      return { kind: 'loop', node, names };
    }
    failure = (result.stderr || result.stdout).trim();
    if (!/busy/i.test(failure)) break;
  }
  throw new OperatorError(`no loop device could be attached to ${file}: ${failure}`, 20, 'attach-failed');
}

/**
 * Takes the device away from the kernel.
 * @throws OperatorError (exit code 11, reason `in-use`) naming each holder, while anybody uses it
 */
export async function detachDevice(device: BlockDevice): Promise<void> {
  for (let attempt = 0; isBound(device); attempt++) {
    if (!existsSync(device.node)) break;
    if (!isClaimed(device.node) && deviceHolders(device.node).length === 0) break;
    if (attempt >= RELEASE_ATTEMPTS || isMounted(device.node)) throw inUse(device);
    await new Promise((resolve) => setTimeout(resolve, RELEASE_PAUSE_MS));
  }
  if (isBound(device)) {
    await run(device.kind === 'nbd' ? ['nbd-client', '-d', device.node] : ['losetup', '-d', device.node]);
    await waitUntilReleased(device);
  }
  unlinkNames(device);
}

function isMounted(node: string): boolean {
  return deviceHolders(node).some((holder) => holder.startsWith('mounted'));
}

function inUse(device: BlockDevice): OperatorError {
  const holders = deviceHolders(device.node);
  const text = holders.length > 0 ? holders.map((holder) => `\n  ${holder}`).join('') : '\n  claimed by the kernel';
  const next = holders.some((holder) => holder.startsWith('mounted'))
    ? 'Withdraw its export and unmount it first (drbdts exportfs -u PATH; umount PATH).'
    : 'End what uses it first.';
  return new OperatorError(
    `State change failed: (-12) Device is held open by someone: ${device.names[0] ?? device.node}${text}\n${next}`,
    11,
    'in-use',
  );
}

/** Whether the kernel still has the device; somebody may have taken it away by hand. */
export function isBound(device: BlockDevice): boolean {
  return existsSync(boundFile(device));
}

function boundFile(device: BlockDevice): string {
  const name = device.node.split('/').pop()!;
  return device.kind === 'nbd' ? `/sys/block/${name}/pid` : `/sys/block/${name}/loop/backing_file`;
}

/** losetup -d of a device that somebody still has open only marks it; it must really be gone. */
async function waitUntilReleased(device: BlockDevice): Promise<void> {
  for (let attempt = 0; isBound(device); attempt++) {
    if (attempt >= RELEASE_ATTEMPTS) throw inUse(device);
    await new Promise((resolve) => setTimeout(resolve, RELEASE_PAUSE_MS));
  }
}

function linkNames(node: string, names: readonly string[]): void {
  for (const name of names) {
    mkdirSync(dirname(name), { recursive: true });
    if (isLink(name)) rmSync(name);
    else if (existsSync(name))
      throw new OperatorError(
        `${name} exists and is not a symlink; is the kernel's drbd loaded? Remove it or unload drbd`,
        20,
        'name-taken',
      );
    symlinkSync(node, name);
  }
}

function isLink(path: string): boolean {
  try {
    return lstatSync(path).isSymbolicLink();
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return false;
    throw error;
  }
}

function unlinkNames(device: BlockDevice): void {
  for (const name of device.names) if (isLink(name) && readlinkSync(name) === device.node) rmSync(name);
}
