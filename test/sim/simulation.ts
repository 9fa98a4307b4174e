import { AssertionError } from '../../src/base/assert.js';
import { AL_MIN_EXTENTS } from '../../src/metadata/activity-log.js';
import type { Mutations, ResourceEvent } from '../../src/replication/effects.js';
import { checkFinalContents } from './checkers/final-contents.js';
import { checkIdenticalDisks } from './checkers/identical-disks.js';
import { checkMetadataDecodes } from './checkers/metadata-decodes.js';
import { SectorModel } from './checkers/sector-model.js';
import type { OperationKind } from './disk.js';
import { EXIT_ASSERTION, EXIT_NO_CONVERGENCE, SimulationFailure, wrongData } from './failure.js';
import { DEFAULT_NET, DEFAULT_VOLUME, Head, type HeadOptions, type MetaPlacement } from './head.js';
import { Fabric } from './network.js';
import { Prng } from './prng.js';
import { Workload, type WorkloadShape } from './workload.js';
import { World } from './world.js';

const MIB = 1024 * 1024;
const STEP_MS = 50;
/** The cluster must be whole and quiet this long after the last fault. */
const CONVERGE_MS = 120_000;
const EXTENT_SECTORS = 8192;
const METADATA_BLOCKS_PER_VOLUME = 6;
/** How long the operator looks at an Inconsistent disk that nobody syncs before he connects anew. */
const INCONSISTENT_PATIENCE_MS = 500;

export interface Verdict {
  readonly seed: number;
  /** 0, 127, 128 or 129. */
  readonly exitCode: number;
  readonly message: string;
  readonly requests: number;
  readonly faults: number;
  readonly log: readonly string[];
}

export type Fault =
  | 'cut'
  | 'cutOneWay'
  | 'reset'
  | 'crashSecondary'
  | 'crashPrimary'
  | 'crashBoth'
  | 'crashInResync'
  | 'crashAfterResync'
  | 'disconnect'
  | 'detachPrimary'
  | 'detachSecondary'
  | 'diskError'
  | 'switchRoles'
  | 'invalidate';

/** How a seed may end: both heads write apart, the link being cut. */
export type Parting = 'splitBrain' | 'lonelyCrash';

/** What a test wants of its seeds instead of leaving it to them. */
export interface Setup {
  readonly faults?: readonly Fault[];
  /** More extents in use than the activity log holds. */
  readonly isLarge?: boolean;
  readonly parting?: Parting;
  /** Power fails while the new disks are attached for the first time. */
  readonly crashWhileNew?: boolean;
}

const FAULTS: readonly Fault[] = [
  'cut',
  'cut',
  'cutOneWay',
  'reset',
  'reset',
  'crashSecondary',
  'crashSecondary',
  'crashPrimary',
  'crashPrimary',
  'crashBoth',
  'crashBoth',
  'crashInResync',
  'crashAfterResync',
  'disconnect',
  'detachPrimary',
  'detachSecondary',
  'diskError',
  'diskError',
  'switchRoles',
  'switchRoles',
  'invalidate',
];

/** Runs one seed. Never throws: what went wrong is in the verdict. */
export function simulate(seed: number, mutations: Mutations = {}, setup: Setup = {}): Verdict {
  const simulation = new Simulation(seed, mutations, setup);
  let exitCode = 0;
  let message = 'converged';
  try {
    simulation.run();
  } catch (error) {
    if (error instanceof SimulationFailure) {
      exitCode = error.exitCode;
      message = error.message;
    } else {
      exitCode = EXIT_ASSERTION;
      const stack = (error as Error).stack ?? '';
      message = `${error instanceof AssertionError ? 'assertion' : 'exception'}: ${(error as Error).message}\n${stack}`;
    }
  }
  return { seed, exitCode, message, requests: simulation.requests, faults: simulation.faults, log: simulation.log };
}

/**
 * Two heads under faults, an operator who repairs what an operator repairs, and an application on whichever head is
 * Primary. First a phase of faults, then everything is healed and must become whole.
 */
export class Simulation {
  readonly log: string[] = [];
  faults = 0;
  private readonly prng: Prng;
  private readonly world = new World();
  private readonly fabric: Fabric;
  private readonly alpha: Head;
  private readonly beta: Head;
  private readonly shape: WorkloadShape;
  private readonly versions = { next: 1 };
  /** What each volume may hold. */
  private readonly models: readonly SectorModel[];
  /** Who shall be Primary. */
  private leader: Head;
  /** The application on each volume of the leader. */
  private applications: (Workload | undefined)[] = [];
  private readonly workloads: Workload[] = [];
  private readonly plans: ReadonlyMap<Head, Plan>;
  private isPromoting = false;
  private promoteAtMs = 0;
  /** The old Primary may come back only when the new one is Primary. */
  private waitingForTakeover = false;
  /** What dies at the next answered flush. */
  private crashAtFlush: 'nobody' | 'leader' | 'both' = 'nobody';
  /** When the follower dies. */
  private crashFollower: 'no' | 'inResync' | 'afterResync' = 'no';
  /** The head that alone has what was answered last; undefined when both have it. */
  private onlyCopy: Head | undefined;
  private crashAtLonelyWrite = false;
  /** Both heads were Primary and wrote: nothing may bring them together but the operator. */
  private split: { readonly loser: Head; readonly loserModel: SectorModel } | undefined;
  private isForced = false;
  /** No new application is started. */
  private isOver = false;
  /** Numbers the link cuts: only the last one is mended by its own timer. */
  private cuts = 0;
  private isLinkUp = true;
  private readonly onIoError: 'pass-on' | 'call-local-io-error' | 'detach';

  constructor(
    seed: number,
    mutations: Mutations,
    private readonly setup: Setup,
  ) {
    const prng = new Prng(seed);
    this.prng = prng;
    const isLarge = setup.isLarge ?? prng.chance(0.1);
    const volumes = !isLarge && !setup.parting && prng.chance(0.2) ? 2 : 1;
    this.onIoError = prng.pick(['detach', 'detach', 'pass-on', 'call-local-io-error']);
    const dataBytes = isLarge
      ? (AL_MIN_EXTENTS + prng.between(4, 12)) * 4 * MIB
      : prng.between(3, 9) * MIB + prng.between(0, 7) * 512;
    const meta = prng.pick<MetaPlacement>(['internal', 'flexible', 'indexed']);
    const slow = prng.chance(0.3);
    const options: HeadOptions = {
      dataBytes,
      meta,
      disk: { minimumMs: 0.05, maximumMs: slow ? 30 : 3, errorRate: 0 },
      metaDisk: { minimumMs: 0.05, maximumMs: slow ? 30 : 3, errorRate: 0 },
      net: {
        ...DEFAULT_NET,
        timeoutMs: 1000,
        koCount: 3,
        pingIntervalMs: 1000,
        pingTimeoutMs: 300,
        connectIntervalMs: 1000,
        maxBuffers: prng.pick([64, 512, 2048]),
        maxEpochWrites: prng.pick([1, 20, 2048]),
        useRle: prng.chance(0.7),
      },
      volume: {
        ...DEFAULT_VOLUME,
        alExtents: isLarge ? AL_MIN_EXTENTS : 1237,
        onIoError: this.onIoError,
        resyncRateKibPerSecond: 200_000,
        planAheadTenths: prng.chance(0.5) ? 0 : 20,
        fillTargetSectors: prng.pick([0, 400, 8192]),
        maxRateKibPerSecond: 4_000_000,
      },
      volumes,
      mutations,
    };
    this.models = Array.from({ length: volumes }, () => new SectorModel());
    this.fabric = new Fabric(this.world, prng.fork(), {
      minimumMs: 0.05,
      maximumMs: prng.pick([0.5, 2, 8]),
      bytesPerMs: 200_000,
    });
    this.alpha = new Head(this.world, this.fabric, 'alpha', 'beta', prng.fork(), options);
    this.beta = new Head(this.world, this.fabric, 'beta', 'alpha', prng.fork(), options);
    this.leader = this.alpha;
    const plan = (): Plan => ({
      restartAtMs: 0,
      connectAtMs: 0,
      inconsistentSinceMs: -1,
      attachAtMs: this.models.map(() => 0),
      isAttaching: this.models.map(() => false),
    });
    this.plans = new Map([
      [this.alpha, plan()],
      [this.beta, plan()],
    ]);
    const windowSectors = prng.pick(isLarge ? [256, 2048, 5000] : [16, 64, 256, 2048, 5000]) + 32;
    const sectors = Math.floor(this.alpha.layout.capacitySectors);
    const count = isLarge ? Math.ceil(sectors / EXTENT_SECTORS) : prng.between(1, 6);
    const windows = Array.from({ length: count }, (_, index) => {
      if (!isLarge) return prng.between(0, sectors - windowSectors);
      // In every extent one, so that all are in use.
      const inExtent = prng.between(0, EXTENT_SECTORS - 1);
      return Math.min(index * EXTENT_SECTORS + inExtent, sectors - windowSectors);
    });
    const depth = isLarge ? prng.between(4, 8) : prng.between(1, 8);
    this.shape = { depth, windows, windowSectors, thinkMs: isLarge ? 40 : prng.pick([40, 100, 250]) };
    for (const head of [this.alpha, this.beta])
      head.onEvent = (event) => {
        this.note(head.log[head.log.length - 1]!);
        this.heard(head, event);
      };
    // The second disk is not empty: a resync that forgets a block is seen.
    const junk = new Uint8Array(4096).fill(0x77);
    for (
      let offset = 0;
      offset + 4096 <= (sectors - (sectors % 8)) * 512 && !isLarge;
      offset += 4096 * prng.between(1, 40)
    )
      for (const { data } of this.beta.disks) data.fill(offset, junk);
    this.note(
      `seed ${seed}: ${volumes} x ${dataBytes} bytes, meta ${meta}, ${this.onIoError}, depth ${this.shape.depth}, ` +
        `${count} windows of ${windowSectors}`,
    );
  }

  get requests(): number {
    return this.workloads.reduce((sum, workload) => sum + workload.completed, 0);
  }

  private note(line: string): void {
    this.log.push(line);
    if (this.log.length > 30000) this.log.splice(0, 1000);
  }

  private say(text: string): void {
    this.note(`${this.world.nowMs.toFixed(3)} ---- ${text}`);
  }

  // ----------------------------------------------------------------------------------------------------------- phases

  run(): void {
    const { prng } = this;
    const heads = [this.alpha, this.beta];
    for (const head of heads) {
      head.start();
      this.attachAll(head);
    }
    if (this.setup.crashWhileNew ?? prng.chance(0.1)) this.crashWhileNew();
    this.waitUntil(5000, 'both are attached', () =>
      heads.every((head) => head.statuses.every(({ disk }) => disk === 'Inconsistent')),
    );
    for (const head of heads) this.connect(head);
    this.waitUntil(30_000, 'both are connected', () => this.bothAre('Connected'));
    this.isForced = true;
    this.waitUntil(300_000, 'the first sync is done', () => {
      this.operate();
      return this.isWhole();
    });
    this.isForced = false;
    const until = this.world.nowMs + prng.between(4_000, 10_000);
    let nextFaultMs = this.world.nowMs + prng.between(100, 1500);
    const faults = this.setup.faults ?? FAULTS;
    while (this.world.nowMs < until) {
      this.step();
      if (this.world.nowMs < nextFaultMs) continue;
      this.inject(prng.pick(faults));
      nextFaultMs = this.world.nowMs + prng.between(50, 2500);
    }
    const parting = prng.chance(0.15) ? prng.pick<Parting>(['splitBrain', 'lonelyCrash']) : undefined;
    this.part(this.setup.parting ?? parting);
    this.heal();
  }

  /** Power fails while disks that nobody ever used are being attached. */
  private crashWhileNew(): void {
    const heads = [this.alpha, this.beta].filter(() => this.prng.chance(0.8));
    for (const head of heads) {
      // Superblock, bitmap, superblock: somewhere in between.
      const writes = this.prng.between(1, 3);
      const watch = () => {
        if ((head.disks[0]!.metaFile?.writes ?? 0) >= writes) head.crash();
        else this.world.after(0.1, undefined, watch);
      };
      watch();
    }
    this.runFor(500, () => {});
    for (const head of heads) {
      this.restart(head);
      this.attachAll(head);
    }
  }

  private heal(): void {
    this.say('healing');
    this.disarm();
    for (const head of [this.alpha, this.beta]) {
      for (const [volume, { data, meta }] of head.disks.entries()) {
        // It may have forgotten writes and nobody has noticed yet: the operator pulls it.
        if (head.isRunning && (data.broken || meta.broken)) head.runtime!.detach(volume, true, () => {});
        data.mend();
        meta.mend();
      }
    }
    this.setWires(true, true);
    if (this.split) this.checkSplitIsNoticed();
    this.waitUntil(CONVERGE_MS, 'both disks are UpToDate', () => {
      this.operate();
      return this.isWhole();
    });
    this.runFor(500, () => this.operate());
    this.isOver = true;
    for (const workload of this.applications) workload?.stop();
    this.waitUntil(30_000, 'every request is answered', () => this.workloads.every((workload) => workload.isClosed));
    this.waitUntil(CONVERGE_MS, 'both disks are UpToDate and quiet', () => {
      this.operate();
      return this.isWhole() && this.isQuiet();
    });
    for (const [volume, model] of this.models.entries()) {
      checkIdenticalDisks(this.alpha, this.beta, volume);
      for (const head of [this.alpha, this.beta]) checkFinalContents(head, volume, model);
    }
    for (const head of [this.alpha, this.beta]) {
      checkMetadataDecodes(head);
      if (head.memory!.held !== this.metadataBlocks)
        wrongData('no leak', `${head.name} holds ${head.memory!.held} pool blocks, expected ${this.metadataBlocks}`);
    }
  }

  private get metadataBlocks(): number {
    return METADATA_BLOCKS_PER_VOLUME * this.models.length;
  }

  private disarm(): void {
    this.crashAtFlush = 'nobody';
    this.crashFollower = 'no';
    this.crashAtLonelyWrite = false;
  }

  private isWhole(): boolean {
    return [this.alpha, this.beta].every(
      (head) =>
        head.isRunning &&
        head.statuses.every(
          ({ connection, disk, peerDisk }) =>
            connection === 'Connected' && disk === 'UpToDate' && peerDisk === 'UpToDate',
        ),
    );
  }

  private isQuiet(): boolean {
    return [this.alpha, this.beta].every(
      (head) =>
        head.memory!.held === this.metadataBlocks &&
        head.statuses.every(
          ({ proc }) =>
            proc.pending + proc.unacknowledged + proc.applicationInFlight + proc.localInFlight + proc.bitsSet === 0,
        ),
    );
  }

  private hasFaultyDisk(): boolean {
    return [this.alpha, this.beta].some((head) => isFaulty(head));
  }

  private bothAre(connection: string): boolean {
    return [this.alpha, this.beta].every((head) => head.statuses.every((status) => status.connection === connection));
  }

  private step(): void {
    this.world.runUntil(this.world.nowMs + STEP_MS);
    this.operate();
  }

  private runFor(ms: number, act: () => void): void {
    const until = this.world.nowMs + ms;
    while (this.world.nowMs < until) {
      this.world.runUntil(Math.min(until, this.world.nowMs + STEP_MS));
      act();
    }
  }

  private waitUntil(limitMs: number, what: string, isSo: () => boolean): void {
    const until = this.world.nowMs + limitMs;
    while (!isSo()) {
      if (this.world.nowMs > until) {
        const states = [this.alpha, this.beta].map((head) =>
          head.isRunning
            ? head.statuses
                .map(
                  ({ connection, role, disk, peerDisk, proc }, volume) =>
                    `${head.name}/${volume} ${connection} ${role} ${disk}/${peerDisk} ` +
                    JSON.stringify({ ...proc, state: undefined, held: head.memory!.held }),
                )
                .join('\n')
            : `${head.name} down`,
        );
        throw new SimulationFailure(
          EXIT_NO_CONVERGENCE,
          'convergence',
          `not within ${limitMs} ms: ${what}\n${states.join('\n')}`,
        );
      }
      this.world.runUntil(this.world.nowMs + STEP_MS);
    }
  }

  // --------------------------------------------------------------------------------------------------------- operator

  private other(head: Head): Head {
    return head === this.alpha ? this.beta : this.alpha;
  }

  /** What a careful operator (or cluster manager) does about the state of things, a few times a second. */
  private operate(): void {
    const now = this.world.nowMs;
    for (const [head, plan] of this.plans) {
      if (!head.isRunning) {
        const mayReturn = !this.waitingForTakeover || head === this.leader;
        if (mayReturn && now >= plan.restartAtMs) this.restart(head);
        continue;
      }
      const { statuses } = head;
      for (const [volume, { disk }] of statuses.entries())
        if (disk === 'Diskless' && !plan.isAttaching[volume] && now >= plan.attachAtMs[volume]!)
          this.attach(head, volume);
      const isReady = statuses.every(
        ({ disk }) => disk !== 'Attaching' && (disk !== 'Diskless' || this.prng.chance(0.02)),
      );
      const isAlone = statuses[0]!.connection === 'StandAlone';
      if (isAlone && isReady && now >= plan.connectAtMs && !this.split) this.connect(head);
      this.connectAnew(head, plan);
    }
    this.lead();
  }

  /** on-io-error pass-on leaves an Inconsistent disk attached; the next handshake syncs it. */
  private connectAnew(head: Head, plan: Plan): void {
    const now = this.world.nowMs;
    const isStuck = head.statuses.some(
      ({ connection, disk, peerDisk }) =>
        connection === 'Connected' && disk === 'Inconsistent' && peerDisk === 'UpToDate',
    );
    if (!isStuck) plan.inconsistentSinceMs = -1;
    else if (plan.inconsistentSinceMs < 0) plan.inconsistentSinceMs = now;
    else if (now - plan.inconsistentSinceMs > INCONSISTENT_PATIENCE_MS) {
      plan.inconsistentSinceMs = -1;
      plan.connectAtMs = now + 200;
      this.say(`${head.name} connects anew`);
      head.runtime!.disconnect(false, (code, reason) => this.say(`disconnect: ${code} ${reason}`));
    }
  }

  private lead(): void {
    const { leader } = this;
    if (!leader.isRunning) return;
    const { statuses } = leader;
    if (statuses.every(({ role }) => role === 'Primary')) {
      this.waitingForTakeover = false;
      if (!this.isOver) for (const volume of this.models.keys()) this.startApplication(volume);
      return;
    }
    const hasData =
      this.isForced || statuses.every(({ disk, peerDisk }) => disk === 'UpToDate' || peerDisk === 'UpToDate');
    if (this.isPromoting || this.world.nowMs < this.promoteAtMs || !hasData) return;
    this.isPromoting = true;
    this.promoteAtMs = this.world.nowMs + 300;
    const { incarnation } = leader;
    leader.runtime!.primary(this.isForced, (code, reason) => {
      if (leader.incarnation !== incarnation) return;
      this.isPromoting = false;
      this.say(`${leader.name} primary: ${code} ${reason}`);
    });
  }

  private startApplication(volume: number): void {
    const running = this.applications[volume];
    if (running && !running.isGone) return;
    const workload = this.workload(this.leader, volume, this.models[volume]!);
    if (workload.start() !== 0) return;
    this.applications[volume] = workload;
    this.workloads.push(workload);
  }

  private workload(head: Head, volume: number, model: SectorModel): Workload {
    return new Workload(head, this.other(head), volume, model, this.prng.fork(), this.shape, this.versions, {
      flushed: () => this.flushed(),
      written: (disk, peerDisk) => this.written(head, disk, peerDisk),
    });
  }

  private restart(head: Head): void {
    const plan = this.plans.get(head)!;
    this.say(`${head.name} starts`);
    checkMetadataDecodes(head);
    head.reboot();
    plan.isAttaching.fill(false);
    plan.attachAtMs.fill(this.world.nowMs);
    plan.inconsistentSinceMs = -1;
    plan.connectAtMs = this.world.nowMs + this.prng.between(0, 300);
  }

  private attachAll(head: Head): void {
    for (const volume of this.models.keys()) this.attach(head, volume);
  }

  private attach(head: Head, volume: number): void {
    const plan = this.plans.get(head)!;
    plan.isAttaching[volume] = true;
    const { incarnation } = head;
    head.attach((code, reason) => {
      if (head.incarnation !== incarnation) return;
      plan.isAttaching[volume] = false;
      this.say(`${head.name}/${volume} attach: ${code} ${reason}`);
      if (code < 1) plan.attachAtMs[volume] = this.world.nowMs + 1000;
      else this.tryWrongPromotion(head);
    }, volume);
  }

  /** An operator in a hurry: a disk that is not whole must not become the data. */
  private tryWrongPromotion(head: Head): void {
    const { statuses } = head;
    const isAlone = statuses.every(({ connection }) => connection === 'StandAlone' || connection === 'WFConnection');
    const isBad = statuses.every(({ disk, role }) => disk === 'Inconsistent' && role === 'Secondary');
    if (!isAlone || !isBad || this.isForced || !this.prng.chance(0.5)) return;
    head.runtime!.primary(false, (code, reason) => {
      this.say(`${head.name} promotion in a hurry: ${code} ${reason}`);
      if (code >= 1) wrongData('an Inconsistent disk is not promoted', `${head.name} became Primary`);
    });
  }

  private connect(head: Head, discardMyData = false): void {
    this.plans.get(head)!.connectAtMs = this.world.nowMs + 1000;
    head.runtime!.connect({ discardMyData }, (code, reason) => {
      if (code < 1) this.say(`${head.name} connect: ${code} ${reason}`);
    });
  }

  // ----------------------------------------------------------------------------------------------------------- faults

  private setWires(forth: boolean, back: boolean): void {
    this.isLinkUp = forth && back;
    this.fabric.wire('alpha', 'beta').setUp(forth);
    this.fabric.wire('beta', 'alpha').setUp(back);
  }

  private cutFor(ms: number, forth = false, back = false): void {
    this.setWires(forth, back);
    const cut = ++this.cuts;
    this.world.after(ms, undefined, () => {
      if (this.cuts === cut) this.setWires(true, true);
    });
  }

  private inject(fault: Fault): void {
    const { leader, prng, world } = this;
    const follower = this.other(leader);
    this.faults++;
    this.say(`fault: ${fault}`);
    switch (fault) {
      case 'cut':
      case 'cutOneWay': {
        const forth = fault === 'cut' ? false : prng.chance(0.5);
        const ms = prng.chance(0.3) ? prng.between(20, 200) : prng.between(200, 6000);
        this.cutFor(ms, forth, fault === 'cut' ? false : !forth);
        return;
      }
      case 'reset':
        this.fabric.resetConnections();
        return;
      case 'crashSecondary':
        if (follower.isRunning) this.crash(follower);
        return;
      case 'crashPrimary':
        if (!leader.isRunning) return;
        // Right behind an answered flush, where a lie about durability shows.
        if (prng.chance(0.5)) this.crashAtFlush = 'leader';
        else this.crash(leader);
        return;
      case 'crashBoth':
        if (prng.chance(0.7)) this.crashAtFlush = 'both';
        else this.crashBoth();
        return;
      case 'crashInResync':
      case 'crashAfterResync':
        this.crashFollower = fault === 'crashInResync' ? 'inResync' : 'afterResync';
        // The follower must have missed something.
        this.cutFor(prng.between(500, 2500));
        return;
      case 'disconnect': {
        const head = prng.pick([leader, follower]);
        if (!head.isRunning) return;
        this.plans.get(head)!.connectAtMs = world.nowMs + prng.between(100, 3000);
        head.runtime!.disconnect(prng.chance(0.3), (code, reason) => this.say(`disconnect: ${code} ${reason}`));
        return;
      }
      case 'detachPrimary':
        if (this.isWhole() && !this.hasFaultyDisk()) this.detach(leader);
        return;
      case 'detachSecondary':
        if (this.isWhole()) this.detach(follower);
        return;
      case 'diskError':
        this.diskError(prng.pick([leader, follower, follower]));
        return;
      case 'switchRoles':
        if (!this.isWhole() || leader.status.role !== 'Primary' || this.isPromoting) return;
        this.switchRoles();
        return;
      case 'invalidate':
        if (this.isWhole()) this.invalidate(follower);
        return;
    }
  }

  private invalidate(head: Head): void {
    const volume = this.prng.between(0, this.models.length - 1);
    head.runtime!.invalidate(volume, (code, reason) => this.say(`invalidate: ${code} ${reason}`));
  }

  private detach(head: Head): void {
    const volume = this.prng.between(0, this.models.length - 1);
    if (head === this.leader && !this.mayLoseLeadersDisk()) return;
    this.plans.get(head)!.attachAtMs[volume] = this.world.nowMs + this.prng.between(100, 3000);
    head.runtime!.detach(volume, false, (code, reason) => this.say(`${head.name}/${volume} detach: ${code} ${reason}`));
    if (head === this.leader && this.models.length > 1) this.recover();
  }

  /**
   * With two volumes the new data could come to lie apart on the two heads, and pass-on leaves a lonely Primary with
   * the only new data on a disk that nobody may sync from: then nothing else may happen until all is whole again.
   */
  private mayLoseLeadersDisk(): boolean {
    const needsCare = this.models.length > 1 || this.onIoError === 'pass-on';
    return !needsCare || (this.isLinkUp && !this.isPromoting && this.plansNothing);
  }

  private get plansNothing(): boolean {
    return [...this.plans.values()].every(({ connectAtMs }) => connectAtMs <= this.world.nowMs);
  }

  private recover(): void {
    this.disarm();
    this.waitUntil(CONVERGE_MS, 'the disk is back', () => {
      this.operate();
      return this.isWhole() && !this.hasFaultyDisk();
    });
  }

  /** Bad sectors, or a disk that is dead until it is attached again; a Secondary's may forget its cache with that. */
  private diskError(head: Head): void {
    const { leader, prng, world, onIoError } = this;
    const isLeader = head === leader;
    if (isLeader && (!this.isWhole() || this.hasFaultyDisk() || !this.mayLoseLeadersDisk())) return;
    if (!isLeader && !this.isDataSafeWithLeader()) return;
    const volume = prng.between(0, this.models.length - 1);
    const { data, meta } = head.disks[volume]!;
    const plan = this.plans.get(head)!;
    plan.attachAtMs[volume] = world.nowMs + prng.between(1000, 3000);
    if (prng.chance(0.5)) {
      const kind = prng.pick<OperationKind>(['read', 'write', 'write', 'flush']);
      const platter = kind === 'read' || prng.chance(0.8) ? data : meta;
      platter.badNext[kind] = prng.between(1, 3);
      this.say(
        `${head.name}/${volume}: ${platter.badNext[kind]} bad ${kind}s of ${platter === data ? 'data' : 'meta'}`,
      );
    } else {
      const platter = prng.chance(0.7) ? data : meta;
      platter.broken = true;
      const forgets = !isLeader && onIoError !== 'pass-on' && platter === data && prng.chance(0.5);
      this.say(`${head.name}/${volume}: dead ${platter === data ? 'data' : 'meta'}${forgets ? ', cache lost' : ''}`);
      if (forgets) data.powerLoss();
    }
    const mend = () => {
      const isNoticed = !head.isRunning || ['Failed', 'Diskless', 'Attaching'].includes(head.statuses[volume]!.disk);
      if (!isNoticed && onIoError !== 'pass-on' && (data.broken || meta.broken)) {
        world.after(50, undefined, mend);
        return;
      }
      data.mend();
      meta.mend();
    };
    world.after(prng.between(1, 300), undefined, mend);
    if (isLeader && (this.models.length > 1 || onIoError === 'pass-on')) this.recover();
  }

  private isDataSafeWithLeader(): boolean {
    const { leader } = this;
    return (
      this.other(leader).isRunning &&
      leader.isRunning &&
      !isFaulty(leader) &&
      leader.statuses.every(
        ({ role, disk, connection }) =>
          role === 'Primary' && disk === 'UpToDate' && (connection === 'Connected' || connection === 'SyncSource'),
      )
    );
  }

  /** A head says something: the moment for a crash may have come. */
  private heard(head: Head, event: ResourceEvent): void {
    if (event.kind !== 'state' || head === this.leader || this.crashFollower === 'no') return;
    const isTarget = event.to.includes('-> SyncTarget )');
    const isDone = event.to.includes('SyncTarget -> Connected )');
    if (!(this.crashFollower === 'inResync' ? isTarget : isDone)) return;
    this.crashFollower = 'no';
    const { incarnation } = head;
    this.world.after(this.prng.unit() * (isTarget ? 60 : 10), undefined, () => {
      if (head.incarnation !== incarnation || !head.isRunning || head === this.leader) return;
      if (!isTarget && this.isCopyWhole() && this.prng.chance(0.5)) this.crashBoth(true);
      else this.crash(head);
    });
  }

  private flushed(): void {
    const which = this.crashAtFlush;
    if (which === 'nobody') return;
    this.crashAtFlush = 'nobody';
    // Not from inside the answer: the process dies between two turns.
    this.world.after(0, undefined, () => {
      if (which === 'both') this.crashBoth();
      else if (this.leader.isRunning) this.crash(this.leader);
    });
  }

  private written(head: Head, disk: string, peerDisk: string): void {
    if (head !== this.leader) return;
    if (disk !== 'UpToDate') this.onlyCopy = this.other(head);
    else this.onlyCopy = peerDisk === 'UpToDate' ? undefined : head;
    if (!this.crashAtLonelyWrite || peerDisk !== 'DUnknown') return;
    this.crashAtLonelyWrite = false;
    this.world.after(0, undefined, () => this.leaderGone());
  }

  /** Whether the other head has everything the leader acknowledged. */
  private isCopyWhole(): boolean {
    const follower = this.other(this.leader);
    if (!follower.isRunning || !this.leader.isRunning || isFaulty(follower)) return false;
    const isThere = this.leader.statuses.every(
      ({ connection, peerDisk, role }) =>
        role === 'Primary' &&
        (connection === 'Connected' || connection === 'SyncTarget' || connection === 'WFBitMapT') &&
        peerDisk === 'UpToDate',
    );
    return isThere && follower.statuses.every(({ disk }) => disk === 'UpToDate');
  }

  /** Whether a Primary lost its disk while the other head had all, and so left its data there, connected or not. */
  private hasLeftItsData(head: Head): boolean {
    return this.onlyCopy !== head && head.statuses.some(({ role, disk }) => role === 'Primary' && disk !== 'UpToDate');
  }

  private hasData(head: Head): boolean {
    return head.isRunning && head.statuses.every(({ disk }) => disk === 'UpToDate');
  }

  private leaderGone(): void {
    this.say(`${this.leader.name} crashes`);
    this.leader.crash();
    this.applications = [];
    this.isPromoting = false;
    for (const model of this.models) model.powerLost();
  }

  private crash(head: Head): void {
    const { leader } = this;
    const follower = this.other(leader);
    if (head === leader) {
      const takeover = this.isCopyWhole() && this.prng.chance(0.6);
      const onlyCopyIsThere = this.hasLeftItsData(leader) && this.hasData(follower);
      if (takeover || onlyCopyIsThere) {
        this.say(`${head.name} crashes, ${follower.name} takes over`);
        head.crash();
        this.applications = [];
        this.isPromoting = false;
        for (const model of this.models) model.takenOver();
        this.leader = follower;
        this.waitingForTakeover = true;
        this.promoteAtMs = this.world.nowMs;
      } else {
        this.leaderGone();
      }
    } else {
      this.say(`${head.name} crashes`);
      const isOnlyCopy = leader.isRunning && this.hasLeftItsData(leader);
      head.crash();
      if (isOnlyCopy) {
        // The application goes on against a device that has just lost its data: start over with what is left.
        this.crash(leader);
        this.leader = head;
      }
    }
    this.plans.get(head)!.restartAtMs = this.world.nowMs + this.prng.between(10, 4000);
  }

  private crashBoth(mustTakeOver = false): void {
    const { leader } = this;
    const follower = this.other(leader);
    if (!leader.isRunning || !follower.isRunning) return;
    const leaderLostDisk = this.hasLeftItsData(leader) && this.hasData(follower);
    // The other head may be the one that comes back, or comes back first: what was flushed is on both.
    const isOtherChosen = this.isCopyWhole() && (mustTakeOver || this.prng.chance(0.5));
    this.say(`both crash${isOtherChosen ? `, ${follower.name} takes over` : ''}`);
    this.leaderGone();
    follower.crash();
    this.waitingForTakeover = false;
    if (leaderLostDisk || isOtherChosen) this.leader = follower;
    if (isOtherChosen) this.waitingForTakeover = this.models.length > 1 || this.prng.chance(0.7);
    for (const head of [leader, follower])
      this.plans.get(head)!.restartAtMs = this.world.nowMs + this.prng.between(10, 3000);
  }

  private switchRoles(): void {
    const { leader, applications } = this;
    const follower = this.other(leader);
    if (applications.length === 0) return;
    this.isPromoting = true;
    for (const workload of applications) workload?.stop();
    const { incarnation } = leader;
    const poll = () => {
      if (leader.incarnation !== incarnation || !leader.isRunning) return;
      if (!applications.every((workload) => workload?.isClosed ?? true)) {
        this.world.after(20, undefined, poll);
        return;
      }
      leader.runtime!.secondary((code, reason) => {
        if (leader.incarnation !== incarnation || this.leader !== leader) return;
        this.say(`${leader.name} secondary: ${code} ${reason}`);
        this.isPromoting = false;
        this.applications = [];
        // A copy that is not whole must not become the data.
        const mayMove = code >= 1 && this.isWhole() && !this.hasFaultyDisk();
        if (mayMove) this.leader = follower;
      });
    };
    poll();
  }

  /** The link is cut, and the other head is promoted too: both write apart. */
  private part(how: Parting | undefined): void {
    const { leader } = this;
    const follower = this.other(leader);
    if (!how || this.models.length > 1 || !this.isWhole() || leader.status.role !== 'Primary') return;
    if (this.applications.length === 0 || this.isPromoting || this.hasFaultyDisk() || !this.plansNothing) return;
    this.faults++;
    this.say(`fault: ${how}`);
    this.disarm();
    this.cuts++;
    this.setWires(false, false);
    const isLonely = (head: Head) => head.isRunning && head.status.connection === 'WFConnection';
    if (how === 'lonelyCrash') {
      // What was answered last is on this disk alone, and its generation must be too.
      this.crashAtLonelyWrite = true;
      this.waitUntil(30_000, 'a write is answered by one head alone', () => !leader.isRunning);
    } else {
      this.waitUntil(30_000, 'the leader notices that the link is gone', () => isLonely(leader));
    }
    this.waitUntil(30_000, 'the other notices that the link is gone', () => isLonely(follower));
    let promoted = false;
    follower.runtime!.primary(false, (code) => {
      promoted = code >= 1;
    });
    this.waitUntil(5000, 'the other head is Primary too', () => promoted);
    const loserModel = new SectorModel(true);
    const second = this.workload(follower, 0, loserModel);
    second.start();
    this.workloads.push(second);
    this.split = { loser: follower, loserModel };
    const before = this.applications[0]?.completed ?? 0;
    this.runFor(2000, () => {});
    this.waitUntil(
      30_000,
      'both write apart',
      () => (this.applications[0]?.completed ?? Number.POSITIVE_INFINITY) > before + 20 && second.completed > 20,
    );
    second.stop();
    this.waitUntil(5000, 'the second writer stops', () => second.isClosed);
    if (this.prng.chance(0.5)) {
      let demoted = false;
      follower.runtime!.secondary((code) => {
        demoted = code >= 1;
      });
      this.waitUntil(5000, 'the second writer is Secondary', () => demoted);
    }
    if (leader.isRunning) return;
    this.restart(leader);
    this.attachAll(leader);
    this.waitUntil(5000, 'the crashed head has its disk again', () => leader.status.disk === 'UpToDate');
    this.connect(leader);
  }

  private checkSplitIsNoticed(): void {
    const { loser } = this.split!;
    const winner = this.leader;
    const deadline = this.world.nowMs + 20_000;
    const isDown = (head: Head) => head.status.connection === 'StandAlone';
    while (!(isDown(winner) && isDown(loser)) && this.world.nowMs < deadline) {
      this.world.runUntil(this.world.nowMs + STEP_MS);
      for (const head of [winner, loser]) {
        const { connection } = head.status;
        if (connection === 'Connected' || connection.startsWith('Sync') || connection.startsWith('WFBitMap'))
          wrongData('split brain is noticed', `${head.name} became ${connection} after both had written apart`);
      }
    }
    if (!isDown(winner) && !isDown(loser))
      wrongData('split brain is noticed', `neither head stands alone: ${winner.status.connection}`);
    let demoted = loser.status.role === 'Secondary';
    if (!demoted)
      loser.runtime!.secondary((code) => {
        demoted = code >= 1;
      });
    this.waitUntil(5000, 'the loser is Secondary', () => demoted);
    for (const head of [winner, loser]) if (!isDown(head)) head.runtime!.disconnect(true, () => {});
    this.runFor(200, () => {});
    this.split = undefined;
    this.connect(loser, true);
    this.connect(winner);
  }
}

/** What the operator intends to do about a head. */
interface Plan {
  restartAtMs: number;
  connectAtMs: number;
  /** Since when a disk has been Inconsistent without being synced; -1 if none. */
  inconsistentSinceMs: number;
  /** By volume. */
  readonly attachAtMs: number[];
  readonly isAttaching: boolean[];
}

function isFaulty(head: Head): boolean {
  return head.disks.some(({ data, meta }) => data.isFaulty || meta.isFaulty);
}
