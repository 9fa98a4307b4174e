/**
 * The block engine of one resource: the ring, the disks, the replication runtime, and the front ends over it (NBD
 * server,
 * FUSE file). Obeys the daemon over its control socket. Never touches the mounted tree: the kernel writes that tree
 * back
 * through here.
 */
import { randomBytes } from 'node:crypto';
import type { Logger } from 'pino';
import { OperatorError } from '../base/errors.js';
import type { MetaDisk } from '../config/drbd-conf.js';
import type { ResolvedVolume } from '../config/resource.js';
import type { JsonHandlers } from '../io/json-lines.js';
import type { BlockFile, OpenFileOptions, Ring } from '../io/ring.js';
import { STATE_RESULT_TEXT, StateResult } from '../replication/state.js';
import { checkNbdListen, type EngineOptions } from './engine-options.js';
import { FuseFile } from './fuse-file.js';
import { NbdServer } from './nbd-server.js';
import { type Params, paramsOf, volumeIn } from './params.js';
import { runtimeOptions } from './resource-options.js';
import {
  type DiskDoors,
  type ResourceEvent,
  ResourceRuntime,
  type VolumeStatus as RuntimeVolume,
} from './resource-runtime.js';
import type { ResourceStatus, ResyncStatus, VolumeStatus } from './status.js';

/** Resync budgets are per 100 ms; a finer tick costs nothing and keeps timeouts honest. */
const TICK_MS = 50;
const SECTOR_BYTES = 512;
const CLOSE_POLL_MS = 10;
const CLOSE_LIMIT_MS = 10_000;

/** Connection states in which the peer is not there yet, or not any more. */
const CONNECTING: readonly string[] =
  'Disconnecting Unconnected Timeout BrokenPipe NetworkFailure ProtocolError TearDown WFConnection'.split(' ');

/** Reason of a refused attach, DRBD's number for it (drbd-utils drbdsetup.c error_messages), what to do. */
const ATTACH_FAILURES: readonly (readonly [reason: RegExp, number: number, hint: string])[] = [
  [
    /^No valid meta data found/,
    119,
    'No metadata there. If this disk is new to DRBD, make it with: drbdts create-md NAME\n' +
      'If it is not new, compare disk and meta-disk of the configuration: drbdts dump NAME',
  ],
  [
    /shrank|usable sectors/,
    111,
    'The disk is smaller than what is stored on it, or than the peer. Give it its former size again, or take another ' +
      'disk and make new metadata (drbdts create-md NAME): it then fetches everything from the peer.',
  ],
  [
    /is exposed now/,
    150,
    'This disk does not hold the data that is in use now. Let the peer serve: drbdts down NAME here, primary there; ' +
      'then drbdts up NAME here resyncs this disk.',
  ],
  [
    /slot .* ends at|flexible metadata needs|not enough for internal|is not a valid index/,
    112,
    'Make the metadata disk larger, or configure another meta-disk or index.',
  ],
  [
    /-offset is |md-size-sect|needs .* sectors of bitmap/,
    118,
    'This metadata was made for a disk of another size or for another place. If the disk was swapped or resized, put ' +
      'it back; if its data may be overwritten from the peer: drbdts create-md NAME',
  ],
];

export class Engine {
  private readonly runtime: ResourceRuntime;
  private readonly nbd: NbdServer;
  private readonly files = new Map<number, FuseFile>();
  private readonly closing = new Map<number, Promise<void>>();
  private readonly timer: NodeJS.Timeout;

  constructor(
    private readonly options: EngineOptions,
    private readonly ring: Ring,
    private readonly log: Logger,
    private readonly quit: () => void,
  ) {
    const { resource } = options;
    this.runtime = new ResourceRuntime(
      runtimeOptions(resource),
      {
        memory: ring.memory,
        network: ring,
        fraction: () => randomBytes(4).readUInt32BE() / 2 ** 32,
        randomBytes: (count) => new Uint8Array(randomBytes(count)),
        // A microtask runs when the ring's batch has been delivered: what one turn caused leaves together.
        defer: (run) => queueMicrotask(run),
      },
      { onEvent: (event) => this.event(event) },
    );
    this.nbd = new NbdServer(ring, { log });
    for (const volume of resource.volumes)
      this.nbd.addExport(this.exportName(volume.number), this.runtime.blockTarget(volume.number), {
        description: `DRBD resource ${resource.name}, volume ${volume.number}`,
      });
    // The first tick before anything else: the machine must know the time.
    this.runtime.tick(performance.now());
    this.timer = setInterval(() => this.runtime.tick(performance.now()), TICK_MS);
  }

  private exportName(volume: number): string {
    const { name } = this.options.resource;
    return volume === 0 ? name : `${name}/${volume}`;
  }

  private event(event: ResourceEvent): void {
    if (event.kind === 'log') this.log[event.level](event.message);
    else this.log.info(event, event.kind);
  }

  /** Attaches every disk, connects, serves NBD. @throws OperatorError that says which disk or address is at fault */
  async start(): Promise<void> {
    for (const volume of this.options.resource.volumes) await this.attach(volume);
    await this.admin('connect', (done) => this.runtime.connect({}, done));
    this.nbd.listenUnix(this.options.nbdSocket);
    if (this.options.nbdListen !== undefined) this.listenTcp(this.options.nbdListen);
  }

  private listenTcp(where: string): void {
    const { host, port } = checkNbdListen(where);
    try {
      this.nbd.listenTcp(host, port);
    } catch (error) {
      throw new OperatorError(`cannot serve NBD on ${where}: ${(error as Error).message}`, 20, 'bind');
    }
  }

  readonly handlers: JsonHandlers = {
    ping: () => ({ pid: process.pid }),
    status: () => this.status(),
    proc: () => this.runtime.status().volumes.map((volume) => volume.proc),
    adjust: () => this.adjust(),
    primary: (params) =>
      this.admin('primary', (done) => this.runtime.primary(paramsOf(params)['force'] === true, done)),
    secondary: () => this.admin('secondary', (done) => this.runtime.secondary(done)),
    connect: (params) => this.connect(paramsOf(params)['discardMyData'] === true),
    disconnect: (params) => this.disconnect(paramsOf(params)['force'] === true),
    attach: () => this.attachAll(),
    detach: (params) =>
      this.eachVolume('detach', (volume, done) =>
        this.runtime.detach(volume, paramsOf(params)['force'] === true, done),
      ),
    invalidate: () => this.eachVolume('invalidate', (volume, done) => this.runtime.invalidate(volume, done)),
    'show-file': (params) => this.showFile(paramsOf(params)),
    'hide-file': (params) => this.hideFile(volumeIn(paramsOf(params))),
    down: () => this.down(),
  };

  /** One administrative wish as a promise. @throws OperatorError with DRBD's words, our hint and drbdadm's exit code */
  private admin(what: string, start: (done: (code: StateResult, reason: string) => void) => void): Promise<object> {
    return new Promise((resolve, reject) => {
      start((code, reason) => {
        this.log.info({ what, code, reason }, 'administrative request answered');
        if (code >= StateResult.Success) resolve({ resource: this.options.resource.name, done: true });
        else reject(this.refusal(what, code, reason));
      });
    });
  }

  /** @throws OperatorError (10, DRBD's code 125) when data is to be discarded and the peer is connected already */
  private async connect(discardMyData: boolean): Promise<object> {
    const { connection } = this.runtime.status().volumes[0]!;
    // A head that was told of a split brain too late goes on connecting, without the wish to give up its data. To say
    // "done" to that wish and drop it would leave the operator with two heads that never connect.
    if (discardMyData && connection !== 'StandAlone') {
      if (!CONNECTING.includes(connection))
        throw new OperatorError(
          `${this.options.resource.name}: Failure: (125) Device has a net-config (use disconnect first)\n` +
            `It is ${connection}: there is no split brain to resolve.`,
          10,
          'connected',
        );
      await this.admin('disconnect', (done) => this.runtime.disconnect(true, done));
    }
    return this.admin('connect', (done) => this.runtime.connect({ discardMyData }, done));
  }

  /**
   * A Primary that lives on its peer's copy would be left with a device that only fails: refused as every state change
   * to "Primary, not connected, not UpToDate" is.
   *
   * @see DRBD 8.4 drbd_state.c is_valid_state, drbd_nl.c conn_try_disconnect
   */
  private disconnect(force: boolean): Promise<object> {
    const needsPeer = this.runtime
      .status()
      .volumes.some(({ role, disk, peerDisk }) => role === 'Primary' && disk !== 'UpToDate' && peerDisk === 'UpToDate');
    if (needsPeer && !force) return Promise.reject(this.refusal('disconnect', StateResult.NoUpToDateDisk, ''));
    return this.admin('disconnect', (done) => this.runtime.disconnect(force, done));
  }

  private async eachVolume(
    what: string,
    start: (volume: number, done: (code: StateResult, reason: string) => void) => void,
  ): Promise<object> {
    for (const volume of this.options.resource.volumes) await this.admin(what, (done) => start(volume.number, done));
    return { resource: this.options.resource.name, done: true };
  }

  private refusal(what: string, code: StateResult, reason: string): OperatorError {
    const { name } = this.options.resource;
    const [exitCode, hint] = this.hintFor(what, code);
    const text = reason || STATE_RESULT_TEXT[code];
    return new OperatorError(
      `${name}: ${what}: State change failed: (${code}) ${text}${hint ? `\n${hint}` : ''}`,
      exitCode,
      `state${code}`,
    );
  }

  /** drbdsetup's exit codes, and what to do next. */
  private hintFor(what: string, code: StateResult): readonly [number, string] {
    const { name, peer } = this.options.resource;
    switch (code) {
      case StateResult.TwoPrimaries:
        return [11, `${peer.host} is Primary. There first: drbdts secondary ${name}`];
      case StateResult.NoUpToDateDisk:
        if (what === 'disconnect')
          return [
            17,
            `This head is Primary and lives on the peer's copy: its own is not UpToDate. Wait until it is ` +
              `(drbdts status ${name}), or let go of the role first: drbdts secondary ${name}`,
          ];
        if (what !== 'primary')
          return [
            17,
            `This head is Primary and no other copy is good. Wait until both are UpToDate (drbdts status ${name}), ` +
              `or let go of the role first: drbdts secondary ${name}`,
          ];
        return [
          17,
          `If both disks are new, choose the head with the good data and there: drbdts primary --force ${name}\n` +
            `Otherwise bring ${peer.host} back: its copy is newer.`,
        ];
      case StateResult.NoLocalDisk:
        return [16, `Attach the disk first: drbdts attach ${name}`];
      case StateResult.LowerThanOutdated:
        return [5, ''];
      case StateResult.DeviceInUse:
        return [11, this.openersText()];
      case StateResult.IsDiskless:
        return [11, `Attach the disk first: drbdts attach ${name}`];
      case StateResult.NeedConnection:
      case StateResult.NoNetConfig:
        return [11, `Connect first: drbdts connect ${name}`];
      case StateResult.CwFailedByPeer:
        return [11, `The log of ${peer.host} has the reason.`];
      default:
        return [11, ''];
    }
  }

  private openersText(): string {
    const lines = this.options.resource.volumes.flatMap((volume) => {
      const clients = this.nbd.clientCount(this.exportName(volume.number));
      return [
        ...(clients > 0 ? [`  ${clients} NBD client(s) of ${this.exportName(volume.number)}`] : []),
        ...(this.files.get(volume.number)?.isOpen ? [`  the loop device of volume ${volume.number}`] : []),
      ];
    });
    return lines.length > 0 ? `Open by:\n${lines.join('\n')}\nEnd these first.` : '';
  }

  private openFile(path: string, what: string, options: OpenFileOptions): BlockFile {
    try {
      return this.ring.openFile(path, options);
    } catch (error) {
      const { message } = error as Error;
      const busy = /in use/.test(message);
      const hint = busy
        ? 'Another engine or a mounted filesystem has it; end that first.'
        : `Check the path in the configuration: drbdts dump ${this.options.resource.name}`;
      throw new OperatorError(`cannot open the ${what}: ${message}\n${hint}`, 10, busy ? 'in-use' : 'open');
    }
  }

  /** The metadata file, unless it lies on the data disk itself. */
  private openMetadata(metaDisk: MetaDisk, data: BlockFile, options: OpenFileOptions): BlockFile {
    if (metaDisk.kind === 'internal') return data;
    // Indexed metadata of several resources shares one device; each engine owns its slot only.
    return this.openFile(metaDisk.path, 'metadata disk', { ...options, exclusive: metaDisk.kind !== 'indexed' });
  }

  /** Attaches what has no disk. @throws OperatorError (10) when every volume has one, as DRBD's code 124 */
  private async attachAll(): Promise<object> {
    const { name, volumes } = this.options.resource;
    const status = this.runtime.status();
    const diskless = volumes.filter(
      (volume) => status.volumes.find((one) => one.number === volume.number)?.disk === 'Diskless',
    );
    if (diskless.length === 0)
      throw new OperatorError(
        `${name}: Failure: (124) Device is attached to a disk (use detach first)`,
        10,
        'attached',
      );
    for (const volume of diskless) await this.attach(volume);
    return { resource: name, done: true };
  }

  private async attach(volume: ResolvedVolume): Promise<object> {
    const options: OpenFileOptions = { exclusive: true, direct: volume.diskOptions.directIo };
    const data = this.openFile(volume.disk, 'backing disk', options);
    let meta: BlockFile;
    try {
      meta = this.openMetadata(volume.metaDisk, data, options);
    } catch (error) {
      data.close();
      throw error;
    }
    const doors: DiskDoors = {
      data,
      meta,
      metaKind: volume.metaDisk.kind,
      ...(volume.metaDisk.kind === 'indexed' ? { metaIndex: volume.metaDisk.index } : {}),
    };
    return new Promise((resolve, reject) => {
      this.runtime.attach(volume.number, doors, (code, reason) => {
        this.log.info({ what: 'attach', code, reason }, 'administrative request answered');
        if (code >= StateResult.Success) resolve({ resource: this.options.resource.name, done: true });
        else if (code !== StateResult.UnknownError) reject(this.refusal('attach', code, reason));
        else reject(this.attachFailure(volume, reason));
      });
    });
  }

  /** What is wrong with a disk or its metadata, with DRBD's number where it has one. */
  private attachFailure(volume: ResolvedVolume, reason: string): OperatorError {
    const { name } = this.options.resource;
    const meta = volume.metaDisk.kind === 'internal' ? volume.disk : volume.metaDisk.path;
    const known = ATTACH_FAILURES.find(([pattern]) => pattern.test(reason));
    const number = known ? `(${known[1]}) ` : '';
    const hint = known
      ? known[2]
      : 'drbdts dump-md NAME and drbdts dump NAME show what is there and what is configured.';
    return new OperatorError(
      `${name}: Failure: ${number}${reason} (disk ${volume.disk}, metadata on ${meta})\n` +
        hint.replaceAll('NAME', name),
      10,
      'attach',
    );
  }

  /** What `up` does on a resource that is up: puts back disk and connection where they are missing. */
  private async adjust(): Promise<object> {
    const status = this.runtime.status();
    for (const volume of this.options.resource.volumes)
      if (status.volumes.find((one) => one.number === volume.number)?.disk === 'Diskless') await this.attach(volume);
    if (status.connection === 'StandAlone') await this.admin('connect', (done) => this.runtime.connect({}, done));
    return { resource: this.options.resource.name, done: true };
  }

  private showFile(params: Params): string {
    const volume = volumeIn(params);
    const directory = params['directory'];
    if (typeof directory !== 'string') throw new OperatorError('expected {"volume":N,"directory":PATH}', 1, 'usage');
    const existing = this.files.get(volume);
    if (existing) return existing.path;
    let gone = () => {};
    this.closing.set(
      volume,
      new Promise((resolve) => {
        gone = resolve;
      }),
    );
    const file = new FuseFile(this.ring, this.runtime.blockTarget(volume), directory, 'device', () => {
      this.files.delete(volume);
      gone();
    });
    this.files.set(volume, file);
    return file.path;
  }

  private async hideFile(volume: number): Promise<void> {
    const file = this.files.get(volume);
    if (!file) return;
    file.close();
    await this.closing.get(volume);
  }

  private async down(): Promise<object> {
    await this.admin('secondary', (done) => this.runtime.secondary(done));
    for (const volume of [...this.files.keys()]) await this.hideFile(volume);
    this.nbd.close();
    await this.admin('down', (done) => this.runtime.down(done));
    clearInterval(this.timer);
    // The caller gets its answer first.
    setTimeout(() => this.quit(), CLOSE_POLL_MS);
    return { resource: this.options.resource.name, done: true };
  }

  /** Ends in good order if that is possible at once: for SIGTERM. */
  async stop(): Promise<void> {
    await Promise.race([
      this.down(),
      new Promise((_resolve, reject) =>
        setTimeout(() => reject(new Error(`no orderly end within ${CLOSE_LIMIT_MS} ms`)), CLOSE_LIMIT_MS).unref(),
      ),
    ]);
  }

  private status(): ResourceStatus {
    const { resource } = this.options;
    const status = this.runtime.status();
    const first = status.volumes[0]!;
    return {
      name: resource.name,
      role: first.role,
      peerRole: first.peerRole,
      nodeName: resource.self.host,
      peerName: resource.peer.host,
      connectionState: first.connection,
      reason: status.reason,
      peerAddress: `${resource.peer.address.host}:${resource.peer.address.port}`,
      suspended: first.proc.state.suspended,
      writeOrdering: { n: 'none', d: 'drain', f: 'flush', b: 'barrier' }[first.proc.writeOrdering],
      devices: status.volumes.map((volume) => this.volumeStatus(volume)),
    };
  }

  private volumeStatus(volume: RuntimeVolume): VolumeStatus {
    const { proc } = volume;
    const resync = resyncStatus(volume);
    return {
      volume: volume.number,
      minor: volume.minor,
      device: '',
      backingDisk: this.options.resource.volumes.find((one) => one.number === volume.number)!.disk,
      connectionState: volume.connection,
      diskState: volume.disk,
      peerDiskState: volume.peerDisk,
      sizeBytes: volume.sizeBytes,
      outOfSyncBytes: volume.outOfSyncBytes,
      ...(resync ? { resync } : {}),
      counters: {
        sentKiB: Math.floor((proc.sentSectors * SECTOR_BYTES) / 1024),
        receivedKiB: Math.floor((proc.receivedSectors * SECTOR_BYTES) / 1024),
        writtenKiB: Math.floor((proc.writtenSectors * SECTOR_BYTES) / 1024),
        readKiB: Math.floor((proc.readSectors * SECTOR_BYTES) / 1024),
        activityLogWrites: proc.activityLogWrites,
        localPending: proc.localInFlight,
        peerPending: proc.pending,
        unacknowledged: proc.unacknowledged,
        applicationPending: proc.applicationInFlight,
      },
      generationIdentifiers: volume.generationIdentifiers ?? [],
    };
  }
}

const BIT_BYTES = 4096;

function resyncStatus(volume: RuntimeVolume): ResyncStatus | undefined {
  const { progress } = volume.proc;
  if (!progress) return undefined;
  const totalBytes = progress.totalBits * BIT_BYTES;
  const leftBytes = Math.min(totalBytes, Math.max(0, volume.proc.bitsSet - progress.failedBits) * BIT_BYTES);
  const speed = (totalBytes - leftBytes) / Math.max(1, progress.runningSeconds);
  return {
    donePercent: totalBytes === 0 ? 100 : (100 * (totalBytes - leftBytes)) / totalBytes,
    leftBytes,
    totalBytes,
    speedBytesPerSecond: speed,
    finishSeconds: speed > 0 ? leftBytes / speed : 0,
  };
}
