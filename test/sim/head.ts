import { encodeInitializedBlock } from '../../src/metadata/activity-log.js';
import { computeLayout } from '../../src/metadata/layout.js';
import { encodeSuperblock, newSuperblock } from '../../src/metadata/superblock.js';
import {
  type EstablishOptions,
  type NetOptions,
  type ResourceEvent,
  ResourceRuntime,
  type VolumeOptions,
} from '../../src/node/resource-runtime.js';
import type { Mutations } from '../../src/replication/effects.js';
import { type DiskTiming, Platter, SimFile } from './disk.js';
import { SimMemory } from './memory.js';
import { type Fabric, SimNetwork } from './network.js';
import type { Prng } from './prng.js';
import type { Owner, World } from './world.js';

const POOL_BYTES = 64 * 1024 * 1024;
const PORT = 7788;

export const DEFAULT_NET: NetOptions & EstablishOptions = {
  wireProtocol: 3,
  timeoutMs: 6000,
  koCount: 7,
  pingIntervalMs: 10_000,
  pingTimeoutMs: 500,
  maxBuffers: 2048,
  maxEpochWrites: 2048,
  useRle: true,
  twoPrimaries: false,
  afterSplitBrain0Primaries: 0,
  afterSplitBrain1Primary: 0,
  afterSplitBrain2Primaries: 0,
  alwaysAfterSplitBrain: false,
  resyncRoleConflict: 0,
  verifyAlgorithm: '',
  checksumAlgorithm: '',
  connectIntervalMs: 10_000,
  socketCheckMs: 0,
  sendBufferBytes: 0,
  receiveBufferBytes: 0,
};

export const DEFAULT_VOLUME: VolumeOptions = {
  number: 0,
  minor: 0,
  userSizeSectors: 0,
  alExtents: 1237,
  onIoError: 'detach',
  fencing: 'dont-care',
  suspendOnNoData: false,
  diskFlushes: true,
  resyncRateKibPerSecond: 250,
  planAheadTenths: 20,
  delayTargetTenths: 10,
  fillTargetSectors: 100,
  maxRateKibPerSecond: 102_400,
  minRateKibPerSecond: 250,
};

export type MetaPlacement = 'internal' | 'flexible' | 'indexed';

export interface HeadOptions {
  readonly dataBytes: number;
  readonly meta: MetaPlacement;
  readonly disk: DiskTiming;
  readonly metaDisk: DiskTiming;
  readonly net: NetOptions & EstablishOptions;
  readonly volume: VolumeOptions;
  /** Volumes of the resource, alike; 1 if absent. */
  readonly volumes?: number;
  readonly mutations: Mutations;
}

/** The disk of one volume: platters that survive the process, and its open files. */
export interface HeadDisk {
  readonly data: Platter;
  /** The same as `data` for internal metadata. */
  readonly meta: Platter;
  dataFile: SimFile | undefined;
  metaFile: SimFile | undefined;
}

/** One machine: platters that survive, and at most one process that runs the production driver over them. */
export class Head {
  readonly disks: readonly HeadDisk[];
  readonly log: string[] = [];
  runtime: ResourceRuntime | undefined;
  memory: SimMemory | undefined;
  process: Owner = { alive: false };
  /** Grows with every connection made or lost. */
  linkChanges = 0;
  /** Grows with every start. */
  incarnation = 0;
  onEvent: (event: ResourceEvent) => void = () => {};

  constructor(
    readonly world: World,
    readonly fabric: Fabric,
    readonly name: string,
    readonly peerName: string,
    private readonly prng: Prng,
    readonly options: HeadOptions,
  ) {
    this.disks = Array.from({ length: options.volumes ?? 1 }, () => {
      const data = new Platter(options.dataBytes, prng.fork());
      const meta = options.meta === 'internal' ? data : new Platter(metaBytes(options), prng.fork());
      return { data, meta, dataFile: undefined, metaFile: undefined };
    });
    for (const { meta } of this.disks) this.createMetadata(meta);
  }

  /** Platter of the first volume. */
  get data(): Platter {
    return this.disks[0]!.data;
  }

  get dataFile(): SimFile | undefined {
    return this.disks[0]!.dataFile;
  }

  /** What `drbdadm create-md` leaves. */
  private createMetadata(platter: Platter): void {
    const layout = this.layout;
    const block = new Uint8Array(4096);
    encodeInitializedBlock(block);
    for (let index = 0; index < layout.alBlocks; index++)
      platter.fill((layout.activityLogSector + index * 8) * 512, block);
    encodeSuperblock(newSuperblock(layout), block);
    platter.fill(layout.superblockSector * 512, block);
  }

  get layout() {
    return computeLayout({
      kind: this.options.meta,
      ...(this.options.meta === 'indexed' ? { index: 0 } : {}),
      backingSizeSectors: this.data.sizeBytes / 512,
      metaSizeSectors: this.disks[0]!.meta.sizeBytes / 512,
    });
  }

  get isRunning(): boolean {
    return this.process.alive;
  }

  /** Starts the process; nothing is attached or connected yet. */
  start(): void {
    const owner: Owner = { alive: true };
    this.process = owner;
    this.incarnation++;
    const { world, options } = this;
    const prng = this.prng.fork();
    const memory = new SimMemory(POOL_BYTES);
    this.memory = memory;
    const network = new SimNetwork(this.fabric, this.name, owner, memory, prng.fork());
    this.runtime = new ResourceRuntime(
      {
        name: 'data',
        self: { host: this.name, port: PORT },
        peer: { host: this.peerName, port: PORT },
        net: options.net,
        volumes: this.disks.map((_disk, number) => ({ ...options.volume, number, minor: number })),
      },
      {
        memory,
        network,
        fraction: () => prng.unit(),
        randomBytes: (count) => Uint8Array.from({ length: count }, () => prng.between(0, 255)),
        defer: (run) => world.after(0, owner, run),
      },
      {
        onEvent: (event) => {
          this.log.push(`${world.nowMs.toFixed(3)} ${this.name} ${describeEvent(event)}`);
          if (this.log.length > 400) this.log.shift();
          if (event.kind === 'state' && event.to.includes('conn(')) this.linkChanges++;
          this.onEvent(event);
        },
      },
      options.mutations,
    );
    this.tick();
  }

  private tick(): void {
    const { runtime, process } = this;
    runtime!.tick(this.world.nowMs);
    this.world.after(100, process, () => this.tick());
  }

  attach(done: (code: number, reason: string) => void, volume = 0): void {
    const { world, process, memory, options } = this;
    const disk = this.disks[volume]!;
    const data = new SimFile(world, process, memory!, this.prng.fork(), disk.data, options.disk);
    disk.dataFile = data;
    const meta =
      disk.meta === disk.data
        ? data
        : new SimFile(world, process, memory!, this.prng.fork(), disk.meta, options.metaDisk);
    disk.metaFile = meta;
    this.runtime!.attach(
      volume,
      { data, meta, metaKind: options.meta, ...(options.meta === 'indexed' ? { metaIndex: 0 } : {}) },
      done,
    );
  }

  /** The machine loses power: the process is gone, so is what its disks had not flushed. */
  crash(): void {
    this.process.alive = false;
    this.runtime = undefined;
    for (const { data, meta } of this.disks) {
      data.powerLoss();
      if (meta !== data) meta.powerLoss();
    }
  }

  /** The kernel is up again: old connections are answered with a reset. */
  reboot(): void {
    this.fabric.resetHost(this.name);
    this.start();
  }

  /** Of the first volume. */
  get status() {
    return this.statuses[0]!;
  }

  get statuses() {
    return this.runtime!.status().volumes;
  }
}

function metaBytes(options: HeadOptions): number {
  return options.meta === 'indexed' ? 128 * 1024 * 1024 : 4 * 1024 * 1024;
}

function describeEvent(event: ResourceEvent): string {
  switch (event.kind) {
    case 'state':
      return `state ${event.to}`;
    case 'log':
      return `${event.level}: ${event.message}`;
    case 'helper':
      return `helper ${event.name}`;
    case 'splitBrain':
      return `split brain: ${event.message}`;
    case 'connection':
      return `connection ${event.state}: ${event.reason}`;
  }
}
