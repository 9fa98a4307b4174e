/**
 * The node daemon: one per head. Starts and stops the engines and the NFS server, gives the kernel its block devices,
 * and answers the command line. It never touches a disk or the mounted tree itself: whatever could block on them is a
 * process or a command with a time limit.
 */
import { existsSync, mkdirSync, readFileSync, renameSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import type { Logger } from 'pino';
import { OperatorError } from '../base/errors.js';
import { attachLoop, attachNbd, type BlockDevice, detachDevice, isBound, kernelNbdUsable } from '../io/block-device.js';
import { runCommand, spawnDetached } from '../io/command.js';
import { deviceHolders } from '../io/device-use.js';
import { callJsonLines, type JsonHandlers } from '../io/json-lines.js';
import { daemonSocket, daemonState, engineSocket, fuseDirectory, nbdSocket, type Paths } from '../io/paths.js';
import { formatProc, type ProcDevice } from '../replication/proc-text.js';
import { loadExports, loadResource, resourceNames } from './configuration.js';
import { checkNbdListen, type EngineOptions } from './engine-options.js';
import { NfsServer } from './nfs-supervisor.js';
import { type Params, paramsOf } from './params.js';
import { type ResourceStatus, statusWithoutEngine } from './status.js';

const ENGINE_START_TIMEOUT_MS = 30_000;
const ENGINE_CALL_TIMEOUT_MS = 30_000;
/** Promotion may wait for the peer's answer and for the old Primary to be found dead. */
const ROLE_TIMEOUT_MS = 90_000;
const ENGINE_STOP_TIMEOUT_MS = 20_000;
const STATUS_TIMEOUT_MS = 5000;
const POLL_MS = 25;

interface EngineHandle {
  readonly name: string;
  readonly options: EngineOptions;
  readonly pid: number;
  /** How it ended, once it did. */
  ended: string | undefined;
}

/** What survives a restart of the daemon, in the run directory (gone after a reboot, as the devices are). */
interface SavedState {
  readonly engines: Readonly<Record<string, { readonly pid: number; readonly options: EngineOptions }>>;
  readonly devices: Readonly<Record<string, BlockDevice>>;
}

export class Daemon {
  private readonly engines = new Map<string, EngineHandle>();
  /** By `RESOURCE/VOLUME`. */
  private readonly devices = new Map<string, BlockDevice>();
  /** One change at a time per resource: commands wait for each other here. */
  private readonly busy = new Map<string, Promise<unknown>>();
  private readonly nfs: NfsServer;

  constructor(
    private readonly paths: Paths,
    private readonly env: Readonly<Record<string, string | undefined>>,
    private readonly log: Logger,
    private readonly stop: () => void,
  ) {
    this.nfs = new NfsServer(paths, log);
  }

  readonly handlers: JsonHandlers = {
    version: () => ({ pid: process.pid }),
    up: (params) => this.forEach(paramsOf(params), (name, p) => this.up(name, p)),
    down: (params) => this.forEach(paramsOf(params), (name, p) => this.down(name, p)),
    primary: (params) => this.forEach(paramsOf(params), (name, p) => this.primary(name, p)),
    secondary: (params) => this.forEach(paramsOf(params), (name) => this.secondary(name)),
    connect: (params) => this.forEach(paramsOf(params), (name, p) => this.forward(name, 'connect', p)),
    disconnect: (params) => this.forEach(paramsOf(params), (name, p) => this.forward(name, 'disconnect', p)),
    attach: (params) => this.forEach(paramsOf(params), (name, p) => this.forward(name, 'attach', p)),
    detach: (params) => this.forEach(paramsOf(params), (name, p) => this.forward(name, 'detach', p)),
    invalidate: (params) => this.forEach(paramsOf(params), (name, p) => this.forward(name, 'invalidate', p)),
    status: (params) => this.status(paramsOf(params)),
    proc: () => this.proc(),
    exportfs: (params) => this.exportfs(paramsOf(params)),
    shutdown: () => this.shutdown(),
  };

  /** Takes over the engines and devices that an earlier daemon left running. */
  async adopt(): Promise<void> {
    const saved = this.readState();
    for (const [name, { pid, options }] of Object.entries(saved.engines)) {
      let ended: string | undefined;
      try {
        await callJsonLines(engineSocket(this.paths, name), 'ping', {}, 2000);
      } catch (error) {
        // One that is there and does not answer is not gone: it still holds the disk.
        if ((error as OperatorError).reason !== 'timeout') ended = 'while no daemon ran';
        this.log.warn({ resource: name, pid, err: error }, 'the engine of an earlier daemon does not answer');
      }
      this.engines.set(name, { name, options, pid, ended });
      if (ended === undefined) this.log.info({ resource: name, pid }, 'adopted a running engine');
    }
    for (const [key, device] of Object.entries(saved.devices)) this.devices.set(key, device);
    await this.nfs.adopt();
  }

  private readState(): SavedState {
    if (!existsSync(daemonState(this.paths))) return { engines: {}, devices: {} };
    return JSON.parse(readFileSync(daemonState(this.paths), 'utf8')) as SavedState;
  }

  private saveState(): void {
    const engines = Object.fromEntries(
      [...this.engines.values()].map((engine) => [engine.name, { pid: engine.pid, options: engine.options }]),
    );
    const state: SavedState = { engines, devices: Object.fromEntries(this.devices) };
    // A daemon killed in the middle of this must leave the old text or the new, or the next one could adopt nothing.
    const path = daemonState(this.paths);
    writeFileSync(`${path}.new`, JSON.stringify(state), { mode: 0o600 });
    renameSync(`${path}.new`, path);
  }

  /** Runs `action` for the named resource, or for `all`; changes of one resource never overlap. */
  private async forEach<T>(params: Params, action: (name: string, params: Params) => Promise<T>): Promise<T[]> {
    const wanted = params['resource'];
    if (typeof wanted !== 'string' || wanted === '') throw new OperatorError('no resource named', 1, 'usage');
    const names = wanted === 'all' ? resourceNames(this.env, params['configFile'] as string | undefined) : [wanted];
    const results: T[] = [];
    for (const name of names) {
      const previous = this.busy.get(name) ?? Promise.resolve();
      const turn = previous.then(
        () => action(name, params),
        () => action(name, params),
      );
      this.busy.set(name, turn);
      try {
        results.push(await turn);
      } finally {
        if (this.busy.get(name) === turn) this.busy.delete(name);
        this.stopIfIdle();
      }
    }
    return results;
  }

  private engine(name: string, configFile?: string): EngineHandle {
    const engine = this.engines.get(name);
    if (!engine) {
      this.checkName(name, configFile);
      throw new OperatorError(
        `resource ${name} is not up on this head. Start it with: drbdts up ${name}`,
        10,
        'not-up',
      );
    }
    if (!this.isAlive(name)) throw this.engineEnded(engine);
    return engine;
  }

  /**
   * A name that is in no configuration is a typing mistake, which `up` would not mend; nor must it look stopped.
   * @throws OperatorError (1)
   */
  private checkName(name: string, configFile: string | undefined): void {
    try {
      loadResource(this.env, configFile, name);
    } catch (error) {
      // A broken configuration is no reason for a stop to fail.
      if ((error as OperatorError).reason === 'not-defined') throw error;
    }
  }

  private isAlive(name: string): boolean {
    const engine = this.engines.get(name);
    if (!engine || engine.ended !== undefined) return false;
    // Of an adopted engine nobody tells us when it ends.
    if (!isRunning(engine.pid)) this.lost(engine, 'killed or crashed');
    return engine.ended === undefined;
  }

  private lost(engine: EngineHandle, how: string): void {
    engine.ended = how;
    this.log.error({ resource: engine.name, pid: engine.pid, how }, 'an engine ended');
  }

  private engineEnded({ name, ended }: EngineHandle): OperatorError {
    return new OperatorError(
      `the engine of ${name} ended (${ended}); see ${this.engineLog(name)}. Start it again with: drbdts up ${name}`,
      20,
      'engine-ended',
    );
  }

  private async call<T>(
    name: string,
    method: string,
    params: Params = {},
    timeoutMs = ENGINE_CALL_TIMEOUT_MS,
  ): Promise<T> {
    const engine = this.engine(name, params['configFile'] as string | undefined);
    try {
      return (await callJsonLines(engineSocket(this.paths, name), method, params, timeoutMs)) as T;
    } catch (error) {
      // To the command line "unreachable" would be this daemon.
      if ((error as OperatorError).reason !== 'unreachable') throw error;
      if (engine.ended === undefined) this.lost(engine, 'in the middle of a call');
      throw this.engineEnded(engine);
    }
  }

  private forward(name: string, method: string, params: Params): Promise<unknown> {
    return this.call(name, method, params, ROLE_TIMEOUT_MS);
  }

  private engineLog(name: string): string {
    return join(this.paths.logDirectory, `engine-${name}.log`);
  }

  private async up(name: string, params: Params): Promise<unknown> {
    if (params['nbdListen'] !== undefined) checkNbdListen(params['nbdListen']);
    if (this.isAlive(name)) {
      try {
        return await this.adjust(name, params);
      } catch (error) {
        if ((error as OperatorError).reason !== 'engine-ended') throw error;
      }
    }
    const { resource, warnings } = loadResource(this.env, params['configFile'] as string | undefined, name);
    for (const warning of warnings) this.log.warn({ resource: name }, warning);
    await this.cleanUpAfter(
      name,
      resource.volumes.map((volume) => volume.number),
    );
    const options: EngineOptions = {
      resource,
      controlSocket: engineSocket(this.paths, name),
      nbdSocket: nbdSocket(this.paths, name),
      ...(typeof params['nbdListen'] === 'string' ? { nbdListen: params['nbdListen'] } : {}),
    };
    const logFile = this.engineLog(name);
    const logStart = existsSync(logFile) ? statSync(logFile).size : 0;
    const child = await spawnDetached(fileURLToPath(new URL('./engine-main.js', import.meta.url)), [name], {
      logFile,
      input: JSON.stringify(options),
      // The engine's heap is small; the pool is outside of it. A young generation that is collected rarely keeps
      // pauses off.
      nodeOptions: ['--max-old-space-size=256', '--max-semi-space-size=8'],
    });
    const engine: EngineHandle = { name, options, pid: child.pid, ended: undefined };
    void child.exited.then((how) => this.lost(engine, how));
    await this.waitForEngine(engine, logStart);
    this.engines.set(name, engine);
    this.saveState();
    this.log.info({ resource: name, pid: child.pid }, 'engine started');
    return { resource: name, done: true };
  }

  /** Already up: see to it that disk and connection are there too, and that what was asked for is what runs. */
  private adjust(name: string, params: Params): Promise<unknown> {
    const { nbdListen } = this.engine(name).options;
    if (params['nbdListen'] !== undefined && params['nbdListen'] !== nbdListen)
      throw new OperatorError(
        `${name} is up already, ${nbdListen === undefined ? 'without' : `with ${nbdListen} as`} --nbd-listen. ` +
          `To change that: drbdts down ${name}, then up again`,
        11,
        'is-up',
      );
    return this.call(name, 'adjust');
  }

  private async waitForEngine(engine: EngineHandle, logStart: number): Promise<void> {
    for (const deadline = Date.now() + ENGINE_START_TIMEOUT_MS; Date.now() < deadline; ) {
      if (existsSync(engine.options.controlSocket)) {
        try {
          await callJsonLines(engine.options.controlSocket, 'ping', {}, 2000);
          return;
        } catch (error) {
          if ((error as OperatorError).reason !== 'unreachable') throw error;
        }
      }
      if (engine.ended !== undefined) throw this.startFailure(engine.name, logStart, engine.ended);
      await new Promise((resolve) => setTimeout(resolve, POLL_MS));
    }
    process.kill(engine.pid, 'SIGKILL');
    throw this.startFailure(engine.name, logStart, `no answer within ${ENGINE_START_TIMEOUT_MS / 1000} s`);
  }

  /**
   * The engine writes why it refuses to start as one line: {"fatal": sentence, "exitCode": n, "reason": word}. Lines
   * of its log may come after it.
   */
  private startFailure(name: string, logStart: number, how: string): OperatorError {
    const logFile = this.engineLog(name);
    const lines = readFileSync(logFile).subarray(logStart).toString('utf8').trimEnd().split('\n');
    const refusal = lines.find((line) => line.startsWith('{"fatal":'));
    if (refusal !== undefined) {
      const { fatal, exitCode, reason } = JSON.parse(refusal) as { fatal: string; exitCode: number; reason: string };
      return new OperatorError(fatal, exitCode, reason);
    }
    return new OperatorError(
      `the engine of ${name} did not start (${how}); ${logFile} ends:\n${lines.slice(-8).join('\n')}`,
      20,
      'engine-start-failed',
    );
  }

  /** Removes what a killed engine left: loop devices over a dead FUSE file, the dead FUSE mount. */
  private async cleanUpAfter(name: string, volumes: readonly number[]): Promise<void> {
    for (const volume of volumes) {
      const key = `${name}/${volume}`;
      const device = this.devices.get(key);
      if (device) {
        const holders = deviceHolders(device.node);
        if (holders.length > 0)
          throw new OperatorError(
            `${device.names[0] ?? device.node} of the engine that ended is still in use:\n  ${holders.join('\n  ')}\n` +
              'Its I/O fails. Unmount it (umount -l if it hangs) and try again.',
            11,
            'in-use',
          );
        await detachDevice(device);
        this.devices.delete(key);
      }
      const folder = fuseDirectory(this.paths, name, volume);
      if (readFileSync('/proc/self/mountinfo', 'utf8').includes(` ${folder} `))
        await runCommand(['umount', '-l', folder], { timeoutMs: 5000 });
    }
    this.saveState();
  }

  private async down(name: string, params: Params = {}): Promise<unknown> {
    const engine = this.engines.get(name);
    if (!engine) {
      this.checkName(name, params['configFile'] as string | undefined);
      return { resource: name, done: false };
    }
    if (!this.isAlive(name)) {
      await this.cleanUpAfter(name, volumeNumbers(engine));
      this.engines.delete(name);
      this.saveState();
      return { resource: name, done: true };
    }
    await this.releaseDevices(name);
    await this.call(name, 'down', {}, ROLE_TIMEOUT_MS);
    for (const deadline = Date.now() + ENGINE_STOP_TIMEOUT_MS; engine.ended === undefined && isRunning(engine.pid); ) {
      if (Date.now() > deadline) {
        this.log.error({ resource: name, pid: engine.pid }, 'the engine does not end; killing it');
        process.kill(engine.pid, 'SIGKILL');
        break;
      }
      await new Promise((resolve) => setTimeout(resolve, POLL_MS));
    }
    this.engines.delete(name);
    this.saveState();
    return { resource: name, done: true };
  }

  /** A daemon with nothing to look after ends, once the answer that made it idle is out. */
  private stopIfIdle(): void {
    setImmediate(() => {
      const things = this.engines.size + this.devices.size + this.busy.size;
      if (things === 0 && !this.nfs.isRunning) this.stop();
    });
  }

  private async primary(name: string, params: Params): Promise<unknown> {
    await this.call(name, 'primary', params, ROLE_TIMEOUT_MS);
    try {
      for (const volume of this.engine(name).options.resource.volumes) await this.attachDevice(name, volume.number);
    } catch (error) {
      this.log.error({ resource: name, err: error }, 'the kernel got no block device; going back to Secondary');
      await this.secondary(name);
      throw error;
    }
    return { resource: name, done: true };
  }

  private async secondary(name: string): Promise<unknown> {
    const engine = this.engines.get(name);
    if (engine && !this.isAlive(name)) {
      // A dead engine is no Primary any more; what is left of it must not stay in use.
      await this.cleanUpAfter(name, volumeNumbers(engine));
      return { resource: name, done: true };
    }
    await this.releaseDevices(name);
    await this.call(name, 'secondary', {}, ROLE_TIMEOUT_MS);
    return { resource: name, done: true };
  }

  private async attachDevice(name: string, volume: number): Promise<void> {
    const key = `${name}/${volume}`;
    const known = this.devices.get(key);
    if (known && isBound(known)) return;
    const { options } = this.engine(name);
    const minor = options.resource.volumes.find((one) => one.number === volume)!.minor;
    const names = [`/dev/drbd${minor}`, `/dev/drbd/by-res/${name}/${volume}`];
    const device = (await kernelNbdUsable())
      ? await attachNbd(options.nbdSocket, volume === 0 ? name : `${name}/${volume}`, names)
      : await attachLoop(await this.showFile(name, volume), names);
    this.devices.set(key, device);
    this.saveState();
    this.log.info({ resource: name, volume, ...device }, 'block device attached');
  }

  private showFile(name: string, volume: number): Promise<string> {
    const directory = fuseDirectory(this.paths, name, volume);
    mkdirSync(directory, { recursive: true, mode: 0o700 });
    return this.call<string>(name, 'show-file', { volume, directory });
  }

  private async releaseDevices(name: string): Promise<void> {
    for (const volume of this.engine(name).options.resource.volumes) {
      const key = `${name}/${volume.number}`;
      const device = this.devices.get(key);
      if (!device) continue;
      await detachDevice(device);
      if (device.kind === 'loop') await this.call(name, 'hide-file', { volume: volume.number });
      this.devices.delete(key);
      this.saveState();
      this.log.info({ resource: name, volume: volume.number }, 'block device released');
    }
  }

  private async status(params: Params): Promise<ResourceStatus[]> {
    const resource = params['resource'];
    const names = typeof resource === 'string' && resource !== 'all' ? [resource] : [...this.engines.keys()];
    const all: ResourceStatus[] = [];
    for (const name of names) {
      const status = await this.engineStatus(name, params);
      all.push({
        ...status,
        devices: status.devices.map((volume) => ({
          ...volume,
          device: this.devices.get(`${name}/${volume.volume}`)?.names[0] ?? '',
        })),
      });
    }
    return all;
  }

  /** What the engine says; of one that cannot be asked, what is known without it. */
  private async engineStatus(name: string, params: Params): Promise<ResourceStatus> {
    try {
      return await this.call<ResourceStatus>(name, 'status', params, STATUS_TIMEOUT_MS);
    } catch (error) {
      const engine = this.engines.get(name);
      if (!engine) throw error;
      return statusWithoutEngine(engine.options.resource, (error as Error).message, engine.ended !== undefined);
    }
  }

  /** One text for all minors, as the kernel's /proc/drbd. */
  private async proc(): Promise<string> {
    const devices: ProcDevice[] = [];
    // As in the kernel, what is not configured has no lines.
    for (const name of this.engines.keys())
      if (this.isAlive(name)) devices.push(...(await this.call<ProcDevice[]>(name, 'proc', {}, STATUS_TIMEOUT_MS)));
    devices.sort((a, b) => a.minor - b.minor);
    return formatProc(devices, '8.4.11', 'srcversion: drbdts');
  }

  private async exportfs({ action, path }: Params): Promise<unknown> {
    if (!isExportAction(action) || (path !== undefined && typeof path !== 'string'))
      throw new OperatorError('expected {"action":"serve", "withdraw" or "list", "path":"/exported"}', 1, 'usage');
    const file = this.paths.exportsFile;
    const { table, warnings } = loadExports(file);
    for (const warning of warnings) this.log.warn(warning);
    return this.nfs.exportfs(action, path, table, file);
  }

  private async shutdown(): Promise<unknown> {
    await this.nfs.stop();
    for (const name of [...this.engines.keys()]) await this.down(name);
    setImmediate(() => this.stop());
    return { done: true };
  }

  /** Removes this daemon's own socket and, when nothing is left to adopt, its state. */
  leave(): void {
    if (this.engines.size === 0 && this.devices.size === 0) rmSync(daemonState(this.paths), { force: true });
    rmSync(daemonSocket(this.paths), { force: true });
  }
}

type ExportAction = 'serve' | 'withdraw' | 'list';

function isExportAction(action: unknown): action is ExportAction {
  return action === 'serve' || action === 'withdraw' || action === 'list';
}

function volumeNumbers(engine: EngineHandle): number[] {
  return engine.options.resource.volumes.map((volume) => volume.number);
}

function isRunning(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ESRCH') return false;
    throw error;
  }
}
