/**
 * A private LAN (test/lab/net) in which heads of drbdts meet the clients and the peer of a real Linux kernel: guests are
 * User-Mode Linux. Everything in it dies with it, and it dies with this process; `destroy` also gives back what lives
 * outside of namespaces: the loop devices and the names in /dev of its heads.
 */
import { type ChildProcess, execFileSync, spawn } from 'node:child_process';
import {
  existsSync,
  lstatSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { requires } from '../../support/requires.js';

const PROJECT = resolve(import.meta.dirname, '../../..');
const LAB = join(PROJECT, 'test/lab');
const DRBDTS = join(PROJECT, 'bin/drbdts');
const MIB = 1024 * 1024;
/** /dev is the machine's; the names by resource are made private, those by minor are unique (see `nextMinor`). */
const INSIDE = 'mkdir -p /dev/drbd; mount -t tmpfs lab /dev/drbd; echo $LAB_DIR; exec sleep 100000';

/** The host side's own address; guests are at 10.77.0.2 and up. */
export const HOST_ADDRESS = '10.77.0.1';
export const GUEST_ADDRESS = '10.77.0.2';

/** Whether guests can boot here; what is missing is told and counted. */
export function canBootGuests(): boolean {
  if (process.getuid?.() !== 0) {
    process.stderr.write('skipped: tests with guest kernels: run as root\n');
    return false;
  }
  return [
    requires('/dev/net/tun', 'linux-image-amd64 (module tun)'),
    requires('/dev/fuse', 'linux-image-amd64 (module fuse)'),
    requires('/dev/loop-control', 'linux-image-amd64 (module loop)'),
    requires('linux.uml', 'user-mode-linux'),
    requires('busybox', 'busybox-static'),
    requires('insmod', 'kmod'),
    requires('ip', 'iproute2'),
    requires('unshare', 'util-linux'),
    requires('losetup', 'mount'),
  ].every((one) => one);
}

export interface Ended {
  readonly status: number;
  /** Standard output and error, in the order of arrival. */
  readonly output: string;
}

export const pause = (ms: number) => new Promise<void>((done) => setTimeout(done, ms));

/** Asks until the answer pleases. @throws Error with the last answer after `limitMs` */
export async function until<T>(
  what: string,
  limitMs: number,
  ask: () => Promise<T> | T,
  pleases: (answer: T) => boolean,
) {
  for (const deadline = Date.now() + limitMs; ; ) {
    const answer = await ask();
    if (pleases(answer)) return answer;
    if (Date.now() > deadline)
      throw new Error(`${what}: not within ${limitMs / 1000} s; last: ${JSON.stringify(answer)}`);
    await pause(50);
  }
}

/** A child's output so far, capped: it is for messages. */
class Running {
  output = '';
  readonly ended: Promise<number>;
  isRunning = true;

  constructor(readonly child: ChildProcess) {
    const collect = (chunk: Buffer) => {
      if (this.output.length < MIB) this.output += chunk.toString();
    };
    child.stdout!.on('data', collect);
    child.stderr!.on('data', collect);
    this.ended = new Promise((done, failed) => {
      child.on('error', failed);
      child.on('close', (code) => {
        this.isRunning = false;
        done(code ?? 137);
      });
    });
  }
}

export class Lab {
  private readonly heads: Head[] = [];

  private constructor(
    private readonly net: Running,
    private readonly initPid: number,
    /** Scratch folder, visible in guests too. */
    readonly directory: string,
  ) {}

  /** @param ports how many guests can be plugged in */
  static async start(ports = 1): Promise<Lab> {
    // net is a shell script: when this process dies, TERM lets it end all in it.
    const net = new Running(
      spawn('setpriv', ['--pdeathsig', 'TERM', join(LAB, 'net'), '-g', String(ports), 'sh', '-ec', INSIDE], {
        stdio: ['ignore', 'pipe', 'pipe'],
        env: withSbin(),
      }),
    );
    await until(
      'a private network',
      20_000,
      () => net.output,
      (text) => text.includes('\n') || !net.isRunning,
    );
    const directory = net.output.trim();
    if (!net.isRunning || !existsSync(directory)) throw new Error(`test/lab/net failed: ${net.output}`);
    const unshare = childrenOf(net.child.pid!)[0]!;
    return new Lab(net, childrenOf(unshare)[0]!, directory);
  }

  /** Starts a program on the host side of the LAN. */
  spawn(argv: readonly string[], env: Readonly<Record<string, string>> = {}): Running {
    return new Running(
      spawn('nsenter', ['-t', String(this.initPid), '-m', '-n', '-p', '--', ...argv], {
        stdio: ['ignore', 'pipe', 'pipe'],
        env: { ...withSbin(), LAB_DIR: this.directory, HOST_IP: HOST_ADDRESS, ...env },
      }),
    );
  }

  /** Runs a program on the host side to its end; kills it after `limitMs` (status 124). */
  async run(argv: readonly string[], limitMs = 60_000, env: Readonly<Record<string, string>> = {}): Promise<Ended> {
    const running = this.spawn(argv, env);
    let late = false;
    const timer = setTimeout(() => {
      late = true;
      // nsenter forks into the process id namespace: its child is what must end.
      for (const pid of childrenOf(running.child.pid!)) process.kill(pid, 'SIGTERM');
      setTimeout(() => running.child.kill('SIGKILL'), 3000).unref();
    }, limitMs);
    const status = await running.ended;
    clearTimeout(timer);
    return { status: late ? 124 : status, output: running.output };
  }

  /** As `run`; throws with what it printed unless it succeeds. */
  async runWell(argv: readonly string[], limitMs = 60_000, env: Readonly<Record<string, string>> = {}) {
    const { status, output } = await this.run(argv, limitMs, env);
    if (status !== 0) throw new Error(`"${argv.join(' ')}" ended with ${status}:\n${output}`);
    return output;
  }

  sh(script: string, limitMs = 60_000): Promise<string> {
    return this.runWell(['sh', '-ec', script], limitMs);
  }

  /** A script of test/lab. */
  script(name: string, args: readonly string[], limitMs: number): Promise<string> {
    return this.runWell([join(LAB, name), ...args], limitMs);
  }

  spawnScript(name: string, args: readonly string[]): Running {
    return this.spawn([join(LAB, name), ...args]);
  }

  /** A head of drbdts that lives in this LAN. */
  addHead(options: HeadOptions): Head {
    const head = new Head(this, options);
    this.heads.push(head);
    return head;
  }

  /** Boots a guest whose DRBD is the peer of `head`; it then obeys `on`. */
  async bootPeer(head: Head, options: PeerOptions = {}): Promise<KernelPeer> {
    const { sizeKib = head.options.sizeKib, layout = head.options.layout ?? 'indexed', data, meta } = options;
    const running = this.spawnScript('drbd-peer', [
      ...['-s', String(sizeKib), '-m', layout, '-N', head.options.peer.name, '-P', head.options.name],
      ...['-a', head.options.address, '-o', head.options.net ?? ''],
      ...(data ? ['-d', data] : []),
      ...(meta ? ['-M', meta] : []),
    ]);
    const peer = new KernelPeer(this, running);
    await peer.on('drbd_state');
    return peer;
  }

  async destroy(): Promise<void> {
    this.net.child.kill('SIGTERM');
    await this.net.ended;
    for (const head of this.heads) await head.releaseDevices();
    for (const head of this.heads) rmSync(head.directory, { recursive: true, force: true });
    rmSync(this.directory, { recursive: true, force: true });
  }
}

export interface PeerOptions {
  readonly sizeKib?: number;
  readonly layout?: Layout;
  /** Images to use instead of the ones it had, or of new empty ones. */
  readonly data?: string;
  readonly meta?: string;
}

/** The kernel's DRBD in guest 1. */
export class KernelPeer {
  constructor(
    private readonly lab: Lab,
    private readonly guest: Running,
  ) {}

  /** Its disk, readable at any time. */
  get data(): string {
    return join(this.lab.directory, 'disk1.data');
  }

  get meta(): string {
    return join(this.lab.directory, 'disk1.meta');
  }

  /** Runs shell code in the guest, with the functions of guest/lib.sh. Throws unless it succeeds. */
  async on(command: string, limitMs = 30_000): Promise<string> {
    try {
      return (
        await this.lab.script('on', ['-t', String(Math.ceil(limitMs / 1000)), '1', command], limitMs + 5000)
      ).trim();
    } catch (error) {
      throw new Error(`${(error as Error).message}\n--- guest\n${this.guest.output}`);
    }
  }

  /** Waits for `CONNECTION OWN-DISK/PEER-DISK`. */
  async wait(state: string, limitMs = 30_000): Promise<void> {
    await this.on(`drbd_wait ${state} ${Math.ceil(limitMs / 1000)}`, limitMs + 10_000);
  }

  /** Ends it as a power failure would (`crash`), or in good order (`stop`). */
  async end(how: 'crash' | 'stop'): Promise<void> {
    await this.on(how);
    await this.guest.ended;
  }

  /** What it printed: each change of its state. */
  get history(): string {
    return this.guest.output;
  }
}

function childrenOf(pid: number): number[] {
  return readFileSync(`/proc/${pid}/task/${pid}/children`, 'utf8').trim().split(' ').filter(Boolean).map(Number);
}

function withSbin(): NodeJS.ProcessEnv {
  return { ...process.env, PATH: `${process.env['PATH'] ?? ''}:/usr/local/sbin:/usr/sbin:/sbin` };
}

/** Names in /dev are the machine's: tests at the same time need minors of their own. */
let nextMinor = 2000 + (process.pid % 5000) * 8;

export type Layout = 'indexed' | 'flexible' | 'internal';

export interface HeadOptions {
  readonly name: string;
  readonly address: string;
  readonly peer: { readonly name: string; readonly address: string };
  readonly sizeKib: number;
  readonly layout?: Layout;
  /** More for the net section. */
  readonly net?: string;
  /** Images to use instead of new empty ones. */
  readonly data?: string;
  readonly meta?: string;
}

export interface VolumeState {
  readonly connectionState: string;
  readonly diskState: string;
  readonly peerDiskState: string;
  readonly sizeBytes: number;
  readonly outOfSyncBytes: number;
  readonly counters: Readonly<Record<string, number>>;
  readonly generationIdentifiers: readonly string[];
}

export interface HeadState extends VolumeState {
  readonly role: string;
  readonly peerRole: string;
}

/** One head: the whole program, from its command line, with folders and a configuration of its own. */
export class Head {
  /** Outside of the LAN's scratch folder, which goes first. */
  readonly directory = mkdtempSync(join(tmpdir(), 'drbdts-lab-'));
  readonly data: string;
  readonly meta: string;
  readonly minor = nextMinor++;
  private readonly env: Readonly<Record<string, string>>;

  constructor(
    private readonly lab: Lab,
    readonly options: HeadOptions,
  ) {
    const { name, address, peer, sizeKib, layout = 'indexed' } = options;
    const folder = (sub: string) => {
      const path = join(this.directory, sub);
      mkdirSync(path);
      return path;
    };
    this.data = options.data ?? image(join(this.directory, 'data'), sizeKib * 1024);
    this.meta = options.meta ?? image(join(this.directory, 'meta'), 128 * MIB);
    this.env = {
      DRBDTS_RUN_DIR: folder('run'),
      DRBDTS_LOG_DIR: folder('log'),
      DRBDTS_STATE_DIR: folder('state'),
      DRBDTS_EXPORTS: join(this.directory, 'exports'),
      DRBDTS_NODE: name,
    };
    const metaDisk = { indexed: `${this.meta}[0]`, flexible: this.meta, internal: 'internal' }[layout];
    const section = (host: string, where: string) =>
      `  on ${host} { device /dev/drbd${this.minor}; disk ${this.data}; address ${where}:7788; meta-disk ${metaDisk}; }\n`;
    writeFileSync(
      this.config,
      `global { usage-count no; }
common { disk { on-io-error detach; } net { ${options.net ?? ''} } syncer { rate 50M; verify-alg crc32c; } }
resource data {
  protocol C;
${section(name, address)}${section(peer.name, peer.address)}}
`,
    );
  }

  private get config(): string {
    return join(this.directory, 'drbd.conf');
  }

  /** The block device that the kernel of this machine sees, while Primary. */
  get device(): string {
    return `/dev/drbd${this.minor}`;
  }

  get exportsFile(): string {
    return this.env['DRBDTS_EXPORTS']!;
  }

  run(args: readonly string[], limitMs = 60_000): Promise<Ended> {
    return this.lab.run([DRBDTS, '-c', this.config, ...args], limitMs, this.env);
  }

  async drbdts(...args: readonly string[]): Promise<string> {
    const { status, output } = await this.run(args);
    if (status !== 0) throw new Error(`drbdts ${args.join(' ')} ended with ${status}:\n${output}\n${this.logs()}`);
    return output;
  }

  /** The ends of the logs, for messages. */
  logs(): string {
    const folder = this.env['DRBDTS_LOG_DIR']!;
    return readdirSync(folder)
      .map((file) => `--- ${file}\n${readFileSync(join(folder, file), 'utf8').split('\n').slice(-24).join('\n')}`)
      .join('\n');
  }

  async state(): Promise<HeadState> {
    const [status] = JSON.parse(await this.drbdts('status', 'data', '--json')) as [
      { role: string; peerRole: string; devices: [VolumeState] },
    ];
    return { role: status.role, peerRole: status.peerRole, ...status.devices[0] };
  }

  /** Waits for `CONNECTION OWN-DISK/PEER-DISK`, e.g. `Connected UpToDate/UpToDate`. */
  async wait(state: string, limitMs = 30_000): Promise<HeadState> {
    try {
      return await until(
        `${this.options.name} ${state}`,
        limitMs,
        () => this.state(),
        (now) => `${now.connectionState} ${now.diskState}/${now.peerDiskState}` === state,
      );
    } catch (error) {
      throw new Error(`${(error as Error).message}\n${this.logs()}`);
    }
  }

  /** Writes blocks of 4 KiB full of lines `text`, each a write of its own, past the page cache, then flushes. */
  async write(firstBlock: number, count: number, text: string): Promise<void> {
    const file = join(this.directory, 'pattern');
    const line = `${text}\n`;
    const bytes = count * 4096;
    writeFileSync(file, line.repeat(Math.ceil(bytes / line.length)).slice(0, bytes));
    await this.lab.runWell([
      ...['dd', `if=${file}`, `of=${this.device}`, 'bs=4k', `seek=${firstBlock}`],
      ...['oflag=direct', 'conv=fsync,notrunc', 'status=none'],
    ]);
  }

  /** MD5 of blocks of 4 KiB, read past the page cache; of the device, or of the data image. */
  async sum(firstBlock: number, count: number, path = this.device): Promise<string> {
    const dd = `dd if=${path} bs=4k skip=${firstBlock} count=${count} iflag=direct status=none | md5sum`;
    return (await this.lab.sh(dd)).slice(0, 32);
  }

  /** Ends all processes of this head at once. */
  async kill(): Promise<void> {
    await this.lab.sh(
      `for p in /proc/[0-9]*; do
         grep -qsz 'DRBDTS_RUN_DIR=${this.env['DRBDTS_RUN_DIR']}$' $p/environ && kill -KILL \${p#/proc/} || true
       done`,
    );
  }

  /** The daemon notes its devices; a head that was killed could not give them back. */
  async releaseDevices(): Promise<void> {
    const state = join(this.env['DRBDTS_RUN_DIR']!, 'daemon-state.json');
    if (existsSync(state)) {
      const { devices } = JSON.parse(readFileSync(state, 'utf8')) as {
        devices: Record<string, { kind: string; node: string }>;
      };
      for (const { kind, node } of Object.values(devices)) {
        if (kind !== 'loop' || !existsSync(`/sys/block/${node.slice(5)}/loop/backing_file`)) continue;
        // Its file was the engine's; if the number has been taken over by someone else meanwhile, it is not ours.
        const backing = readFileSync(`/sys/block/${node.slice(5)}/loop/backing_file`, 'utf8').trim();
        if (!/\/device$/.test(backing)) continue;
        execFileSync('losetup', ['-d', node]);
      }
    }
    if (lstatSync(this.device, { throwIfNoEntry: false })?.isSymbolicLink()) rmSync(this.device);
  }
}

function image(path: string, bytes: number): string {
  writeFileSync(path, '');
  truncateSync(path, bytes);
  return path;
}
