/**
 * The reference cluster as namespaces on this machine: two heads and a client, each with its own network, host name,
 * processes and file system (an overlay over this machine's, thrown away at the end). `kill` ends every process of a head
 * at once, as a power failure would. Needs root. Nothing is left behind by `destroy`, nor when this process is killed:
 * the machines' first processes die with it.
 */
import { type ChildProcess, execFileSync, spawn, spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';

export interface Result {
  readonly status: number;
  readonly stdout: string;
  readonly stderr: string;
}

export const VIP = '10.96.20.8';
const PROBE_TIMEOUT_MS = 3000;

const GLOBAL_COMMON = `global { usage-count no; }
common {
  handlers { }
  startup { }
  options { }
  disk { on-io-error detach; DISK }
  net { }
  syncer { rate RATE; verify-alg crc32c; }
}
`;
const DATA_RES = `resource data {
  protocol C;
  on test-master {
    device /dev/drbd0;
    disk /dev/sdb1;
    address 172.16.1.113:7788;
    meta-disk /dev/sdb2[0];
  }
  on test-backup {
    device /dev/drbd0;
    disk /dev/sdb1;
    address 172.16.1.114:7788;
    meta-disk /dev/sdb2[0];
  }
}
`;
const EXPORTS = '/drbd 10.96.20.*(rw,sync,all_squash,anonuid=65534,anongid=65534,mp,fsid=2)\n';

/** What a machine's first process does: private devices, then wait, reaping whatever is orphaned. */
const INIT = `
set -e
root=$1 name=$2
mount --make-rprivate /
mount -t overlay overlay -o "lowerdir=/,upperdir=$root/upper,workdir=$root/work" "$root/root"
cd "$root/root"
mount -t tmpfs -o mode=755 dev dev
mkdir dev/shm dev/pts dev/net
for node in null zero full random urandom tty fuse loop-control net/tun; do
  [ -e "/dev/$node" ] || continue
  touch "dev/$node"
  mount --bind "/dev/$node" "dev/$node"
done
ln -s /proc/self/fd dev/fd
for disk in "$root"/disks/*; do
  [ -e "$disk" ] || continue
  touch "dev/\${disk##*/}"
  mount --bind "$disk" "dev/\${disk##*/}"
done
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t tmpfs run run
mount -t tmpfs tmp tmp
mkdir -p run/lock ".$3"
mount --bind "$3" ".$3"
hostname "$name"
ip link set lo up
exec chroot . bash -c 'echo ready; trap : TERM INT; while sleep 1; do :; done'
`;

export class Machine {
  private init: ChildProcess | undefined;
  private initPid = 0;

  constructor(
    readonly name: string,
    readonly directory: string,
    private readonly projectDirectory: string,
  ) {
    for (const folder of ['upper', 'work', 'root', 'disks'])
      mkdirSync(join(directory, folder), { recursive: true, mode: 0o755 });
  }

  get isRunning(): boolean {
    return this.init !== undefined;
  }

  /** Boots it: a fresh kernel view on the same files and disks as before. */
  async boot(): Promise<void> {
    const child = spawn(
      'setpriv',
      // biome-ignore format: one option a line says less
      ['--pdeathsig', 'KILL', 'unshare', '--mount', '--net', '--uts', '--pid', '--ipc', '--fork', '--kill-child',
        'bash', '-c', INIT, 'init', this.directory, this.name, this.projectDirectory],
      { stdio: ['ignore', 'pipe', 'pipe'] },
    );
    let errors = '';
    child.stderr.on('data', (chunk: Buffer) => {
      errors += chunk.toString();
    });
    await new Promise<void>((resolve, reject) => {
      child.stdout.once('data', () => resolve());
      child.once('exit', (code) => reject(new Error(`${this.name} did not boot (status ${code}): ${errors}`)));
    });
    this.init = child;
    const children = readFileSync(`/proc/${child.pid}/task/${child.pid}/children`, 'utf8').trim().split(' ');
    this.initPid = Number(children[0]);
  }

  private argv(command: readonly string[]): string[] {
    if (!this.init) throw new Error(`${this.name} is down`);
    return ['-t', String(this.initPid), '-m', '-u', '-i', '-n', '-p', '-r', '-w', '--', ...command];
  }

  /** Starts a program in it; the caller waits or kills. */
  spawn(command: readonly string[]): ChildProcess {
    return spawn('nsenter', this.argv(command), { stdio: ['pipe', 'pipe', 'pipe'] });
  }

  /** Runs a program in it to its end. */
  exec(
    command: readonly string[],
    options: { readonly timeoutMs?: number; readonly input?: string } = {},
  ): Promise<Result> {
    return new Promise((resolve) => {
      const child = this.spawn(command);
      let stdout = '';
      let stderr = '';
      child.stdout!.on('data', (chunk: Buffer) => {
        stdout += chunk.toString();
      });
      child.stderr!.on('data', (chunk: Buffer) => {
        stderr += chunk.toString();
      });
      child.stdin!.on('error', () => undefined);
      child.stdin!.end(options.input ?? '');
      const timer = setTimeout(() => {
        stderr += `\n(killed after ${options.timeoutMs ?? 60_000} ms)`;
        child.kill('SIGKILL');
      }, options.timeoutMs ?? 60_000);
      child.on('close', (code) => {
        clearTimeout(timer);
        resolve({ status: code ?? 137, stdout, stderr });
      });
    });
  }

  /** As `exec`, of a shell script; throws with what it printed unless it succeeds. Returns its output. */
  async sh(script: string, timeoutMs = 60_000): Promise<string> {
    const result = await this.exec(['bash', '-c', script], { timeoutMs });
    if (result.status !== 0)
      throw new Error(`${this.name}: "${script}" ended with ${result.status}\n${result.stdout}${result.stderr}`);
    return result.stdout;
  }

  /** Ends every process in it at once. */
  async kill(): Promise<void> {
    const init = this.init;
    if (!init) return;
    this.init = undefined;
    const gone = new Promise((resolve) => init.once('exit', resolve));
    process.kill(this.initPid, 'SIGKILL');
    await gone;
  }

  /** Its first process, for those who put network devices into it. */
  get pid(): number {
    return this.initPid;
  }
}

export interface ClusterOptions {
  readonly projectDirectory: string;
  /** Size of each head's data disk. */
  readonly diskBytes: number;
  /** `syncer { rate }` with a fixed rate; default 50M and the controller, as in the reference setup. */
  readonly rate?: string;
}

export class Cluster {
  private constructor(
    readonly directory: string,
    readonly master: Machine,
    readonly backup: Machine,
    readonly client: Machine,
    private readonly lan: Machine,
  ) {}

  static async create(options: ClusterOptions): Promise<Cluster> {
    const directory = mkdtempSync(join(process.env['DRBDTS_SCRATCH'] || tmpdir(), 'drbdts-heads-'));
    const projectDirectory = resolve(options.projectDirectory);
    const machine = (name: string) => new Machine(name, join(directory, name), projectDirectory);
    const cluster = new Cluster(
      directory,
      machine('test-master'),
      machine('test-backup'),
      machine('test-client'),
      machine('test-switch'),
    );
    for (const head of [cluster.master, cluster.backup]) {
      const etc = join(head.directory, 'upper', 'etc');
      mkdirSync(join(etc, 'drbd.d'), { recursive: true, mode: 0o755 });
      mkdirSync(join(head.directory, 'upper', 'drbd'), { mode: 0o755 });
      writeFileSync(join(etc, 'drbd.conf'), 'include "drbd.d/global_common.conf";\ninclude "drbd.d/*.res";\n');
      // With a rate of one's own the controller is off: the rate is what the sync gets.
      const common = GLOBAL_COMMON.replace('RATE', options.rate ?? '50M').replace(
        'DISK ',
        options.rate ? 'c-plan-ahead 0; ' : '',
      );
      writeFileSync(join(etc, 'drbd.d', 'global_common.conf'), common);
      writeFileSync(join(etc, 'drbd.d', 'data.res'), DATA_RES);
      writeFileSync(join(etc, 'exports'), EXPORTS);
      for (const [disk, size] of [
        ['sdb1', options.diskBytes],
        ['sdb2', 128 * 1024 * 1024],
      ] as const) {
        const path = join(head.directory, 'disks', disk);
        writeFileSync(path, '');
        truncateSync(path, size);
      }
    }
    try {
      await cluster.lan.boot();
      await cluster.lan.sh(
        'ip link add br0 type bridge && ip link add br1 type bridge && ip link set br0 up && ip link set br1 up',
      );
      await cluster.client.boot();
      await cluster.plug(cluster.client, 'eth0', 'br0', '10.96.20.20/24');
      await cluster.bootHead(cluster.master);
      await cluster.bootHead(cluster.backup);
    } catch (error) {
      await cluster.destroy();
      throw error;
    }
    return cluster;
  }

  /** Boots a head that is down, with its addresses of the reference setup. */
  async bootHead(head: Machine): Promise<void> {
    const last = head === this.master ? 113 : 114;
    await head.boot();
    await this.plug(head, 'eth0', 'br0', `10.96.20.${last}/24`);
    await this.plug(head, 'eth1', 'br1', `172.16.1.${last}/24`);
  }

  private async plug(machine: Machine, device: string, bridge: string, address: string): Promise<void> {
    const port = `p${machine.pid}${device}`.slice(0, 15);
    await this.lan.sh(`ip link add ${port} type veth peer name x${port} && ip link set ${port} master ${bridge} up`);
    // The LAN cannot see the machine's process ids: this machine moves the other end over.
    execFileSync('nsenter', [
      '-t',
      String(this.lan.pid),
      '-n',
      'ip',
      'link',
      'set',
      `x${port}`,
      'netns',
      String(machine.pid),
    ]);
    await machine.sh(
      `ip link set x${port} name ${device} && ip addr add ${address} dev ${device} && ip link set ${device} up`,
    );
  }

  /** Takes a head's cable out, or puts it back. */
  async cable(head: Machine, device: 'eth0' | 'eth1', isIn: boolean): Promise<void> {
    await head.sh(`ip link set ${device} ${isIn ? 'up' : 'down'}`);
  }

  /** The disk behind /dev/sdb1 (or sdb2) of a head, as a file of this machine. */
  diskPath(head: Machine, disk: 'sdb1' | 'sdb2'): string {
    return join(head.directory, 'disks', disk);
  }

  async destroy(): Promise<void> {
    for (const machine of [this.client, this.master, this.backup, this.lan]) await machine.kill();
    releaseLoopDevices();
    rmSync(this.directory, { recursive: true, force: true });
  }
}

/**
 * Frees the loop devices of killed heads: their backing file was a FUSE file that is gone with its engine. Those of heads
 * that live, of other clusters on this machine, still answer and are left alone.
 */
export function releaseLoopDevices(): void {
  const rows = execFileSync('losetup', ['-l', '-n', '-O', 'NAME,BACK-FILE'], { encoding: 'utf8' }).trim().split('\n');
  for (const row of rows) {
    const [device, ...file] = row.trim().split(/\s+/);
    if (!device || !existsSync(device) || !/(^|\/fuse-[\w.-]+-\d+)\/device$/.test(file.join(' '))) continue;
    const probe = [`if=${device}`, 'of=/dev/null', 'bs=4096', 'count=1', 'iflag=direct'];
    if (spawnSync('dd', probe, { timeout: PROBE_TIMEOUT_MS }).status === 0) continue;
    // Somebody who cleans up at the same time may have been faster.
    spawnSync('losetup', ['-d', device]);
  }
}
