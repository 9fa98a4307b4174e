import { closeSync, constants, openSync, readdirSync, readFileSync, readlinkSync, statSync } from 'node:fs';

/** Who keeps a block device from being let go, one sentence each. Empty: nobody that /proc shows. */
export function deviceHolders(device: string): string[] {
  const holders: string[] = [];
  let rdev: number;
  try {
    rdev = statSync(device).rdev;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return [];
    throw error;
  }
  const major = Number((BigInt(rdev) >> 8n) & 0xfffn);
  const minor = Number((BigInt(rdev) & 0xffn) | ((BigInt(rdev) >> 12n) & 0xfff00n));
  const number = `${major}:${minor}`;
  const seen = new Set<string>();
  for (const pid of processIds()) {
    // A mount in any namespace counts: it keeps the filesystem alive after a umount here.
    for (const line of readLines(`/proc/${pid}/mountinfo`)) {
      const fields = line.split(' ');
      if (fields[2] !== number || seen.has(fields[4]!)) continue;
      seen.add(fields[4]!);
      holders.push(`mounted on ${fields[4]} (seen by process ${pid})`);
    }
    for (const target of openBlockDevices(pid, rdev))
      holders.push(`open in process ${pid} (${processName(pid)}) as descriptor ${target}`);
  }
  const name = device.split('/').pop()!;
  for (const holder of listDirectory(`/sys/block/${name}/holders`)) holders.push(`used by block device ${holder}`);
  return holders;
}

/** Whether somebody has the block device claimed or mounted: an exclusive open fails with EBUSY. */
export function isClaimed(device: string): boolean {
  try {
    closeSync(openSync(device, constants.O_RDONLY | constants.O_EXCL));
    return false;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'EBUSY') return true;
    throw error;
  }
}

function processIds(): string[] {
  return readdirSync('/proc').filter((name) => /^\d+$/.test(name));
}

/** Processes come and go while one looks: what has vanished holds nothing. */
function vanished(error: unknown): boolean {
  return ['ENOENT', 'ESRCH', 'EACCES', 'EPERM', 'EINVAL'].includes((error as NodeJS.ErrnoException).code ?? '');
}

function readLines(path: string): string[] {
  try {
    return readFileSync(path, 'utf8').split('\n');
  } catch (error) {
    if (vanished(error)) return [];
    throw error;
  }
}

function listDirectory(path: string): string[] {
  try {
    return readdirSync(path);
  } catch (error) {
    if (vanished(error)) return [];
    throw error;
  }
}

function openBlockDevices(pid: string, rdev: number): string[] {
  return listDirectory(`/proc/${pid}/fd`).filter((fd) => {
    try {
      // The link's text first: stat of a file on a hung mount would hang us with it.
      if (!readlinkSync(`/proc/${pid}/fd/${fd}`).startsWith('/dev/')) return false;
      const stat = statSync(`/proc/${pid}/fd/${fd}`);
      return stat.isBlockDevice() && stat.rdev === rdev;
    } catch (error) {
      if (vanished(error)) return false;
      throw error;
    }
  });
}

function processName(pid: string): string {
  return readLines(`/proc/${pid}/comm`)[0] || 'gone';
}
