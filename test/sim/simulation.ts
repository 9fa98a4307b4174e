import { AssertionError } from '../../src/base/assert.js';
import { AL_MIN_EXTENTS } from '../../src/metadata/activity-log.js';
import type { Mutations } from '../../src/replication/effects.js';
import { checkFinalContents } from './checkers/final-contents.js';
import { checkIdenticalDisks } from './checkers/identical-disks.js';
import { checkMetadataDecodes } from './checkers/metadata-decodes.js';
import { SectorModel } from './checkers/sector-model.js';
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
const METADATA_BLOCKS = 6;

export interface Verdict {
  readonly seed: number;
  /** 0, 127, 128 or 129. */
  readonly exitCode: number;
  readonly message: string;
  readonly requests: number;
  readonly faults: number;
  readonly log: readonly string[];
}

type Fault =
  | 'cut'
  | 'cutOneWay'
  | 'reset'
  | 'crashSecondary'
  | 'crashPrimary'
  | 'crashBoth'
  | 'disconnect'
  | 'detachPrimary'
  | 'detachSecondary'
  | 'diskError'
  | 'switchRoles'
  | 'invalidate'
  | 'splitBrain';

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
  'disconnect',
  'detachPrimary',
  'detachSecondary',
  'diskError',
  'switchRoles',
  'switchRoles',
  'invalidate',
];

/** Runs one seed. Never throws: what went wrong is in the verdict. */
export function simulate(seed: number, mutations: Mutations = {}): Verdict {
  const simulation = new Simulation(seed, mutations);
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
  private model = new SectorModel();
  /** Who shall be Primary. */
  private leader: Head;
  private workload: Workload | undefined;
  private readonly workloads: Workload[] = [];
  /** When the operator next does something about a head: restart, attach, connect. */
  private readonly restartAtMs = new Map<Head, number>();
  private readonly attachAtMs = new Map<Head, number>();
  private readonly connectAtMs = new Map<Head, number>();
  private readonly attaching = new Set<Head>();
  private isPromoting = false;
  private promoteAtMs = 0;
  /** The old Primary may come back only when the new one is Primary. */
  private waitingForTakeover = false;
  private crashAtFlush = 0;
  /** Both heads were Primary and wrote: nothing may bring them together but the operator. */
  private split: { readonly loser: Head; readonly loserModel: SectorModel } | undefined;
  private isForced = false;
  /** No new application is started. */
  private isOver = false;
  /** Numbers the link cuts: only the last one is mended by its own timer. */
  private cuts = 0;

  constructor(
    private readonly seed: number,
    mutations: Mutations,
  ) {
    const prng = new Prng(seed);
    this.prng = prng;
    const isLarge = prng.chance(0.15);
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
        onIoError: 'detach',
        resyncRateKibPerSecond: 200_000,
        planAheadTenths: prng.chance(0.5) ? 0 : 20,
        fillTargetSectors: prng.pick([0, 400, 8192]),
        maxRateKibPerSecond: 4_000_000,
      },
      mutations,
    };
    this.fabric = new Fabric(this.world, prng.fork(), {
      minimumMs: 0.05,
      maximumMs: prng.pick([0.5, 2, 8]),
      bytesPerMs: 200_000,
    });
    this.alpha = new Head(this.world, this.fabric, 'alpha', 'beta', prng.fork(), options);
    this.beta = new Head(this.world, this.fabric, 'beta', 'alpha', prng.fork(), options);
    this.leader = this.alpha;
    const windowSectors = prng.pick([16, 64, 256, 2048, 5000]) + 32;
    const sectors = Math.floor(this.alpha.layout.capacitySectors);
    const count = isLarge ? 80 : prng.between(1, 6);
    const windows = Array.from({ length: count }, () => prng.between(0, sectors - windowSectors));
    this.shape = { depth: prng.between(1, 8), windows, windowSectors, thinkMs: prng.pick([40, 100, 250]) };
    for (const head of [this.alpha, this.beta]) head.onEvent = () => this.note(head.log[head.log.length - 1]!);
    // The second disk is not empty: a resync that forgets a block is seen.
    const junk = new Uint8Array(4096).fill(0x77);
    for (
      let offset = 0;
      offset + 4096 <= (sectors - (sectors % 8)) * 512 && !isLarge;
      offset += 4096 * prng.between(1, 40)
    )
      this.beta.data.fill(offset, junk);
    this.note(
      `seed ${seed}: ${dataBytes} bytes, meta ${meta}, depth ${this.shape.depth}, ${count} windows of ${windowSectors}`,
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
    for (const head of [this.alpha, this.beta]) {
      head.start();
      this.attach(head);
    }
    this.runFor(200, () => {});
    for (const head of [this.alpha, this.beta]) this.connect(head);
    this.waitUntil(30_000, 'both are connected', () => this.bothAre('Connected'));
    this.isForced = true;
    this.waitUntil(300_000, 'the first sync is done', () => {
      this.operate();
      return this.isWhole();
    });
    this.isForced = false;
    const until = this.world.nowMs + this.prng.between(4_000, 10_000);
    let nextFaultMs = this.world.nowMs + this.prng.between(100, 1500);
    while (this.world.nowMs < until && !this.split) {
      this.step();
      if (this.world.nowMs < nextFaultMs) continue;
      nextFaultMs = this.world.nowMs + this.prng.between(50, 2500);
      this.inject(this.prng.pick(FAULTS));
    }
    if (!this.split && this.prng.chance(0.12)) this.inject('splitBrain');
    this.heal();
  }

  private heal(): void {
    this.say('healing');
    this.crashAtFlush = 0;
    for (const head of [this.alpha, this.beta]) {
      head.data.broken = false;
      head.metaPlatter.broken = false;
    }
    this.setWires(true, true);
    if (this.split) this.checkSplitIsNoticed();
    this.waitUntil(CONVERGE_MS, 'both disks are UpToDate', () => {
      this.operate();
      return this.isWhole();
    });
    this.runFor(500, () => this.operate());
    this.isOver = true;
    this.workload?.stop();
    this.waitUntil(30_000, 'every request is answered', () => this.workloads.every((workload) => workload.isClosed));
    this.waitUntil(CONVERGE_MS, 'both disks are UpToDate and quiet', () => {
      this.operate();
      return this.isWhole() && this.isQuiet();
    });
    checkIdenticalDisks(this.alpha, this.beta);
    for (const head of [this.alpha, this.beta]) {
      checkFinalContents(head, this.model);
      checkMetadataDecodes(head);
      if (head.memory!.held !== METADATA_BLOCKS)
        wrongData('no leak', `${head.name} holds ${head.memory!.held} pool blocks, expected ${METADATA_BLOCKS}`);
    }
  }

  private isWhole(): boolean {
    return [this.alpha, this.beta].every((head) => {
      if (!head.isRunning) return false;
      const { connection, disk, peerDisk } = head.status;
      return connection === 'Connected' && disk === 'UpToDate' && peerDisk === 'UpToDate';
    });
  }

  private isQuiet(): boolean {
    return [this.alpha, this.beta].every((head) => {
      const { proc } = head.status;
      return (
        proc.pending + proc.unacknowledged + proc.applicationInFlight + proc.localInFlight + proc.bitsSet === 0 &&
        head.memory!.held === METADATA_BLOCKS
      );
    });
  }

  private bothAre(connection: string): boolean {
    return [this.alpha, this.beta].every((head) => head.status.connection === connection);
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
            ? `${head.name} ${head.status.connection} ${head.status.role} ${head.status.disk}/${head.status.peerDisk} ` +
              JSON.stringify({ ...head.status.proc, state: undefined, held: head.memory!.held })
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
    for (const head of [this.alpha, this.beta]) {
      if (!head.isRunning) {
        const mayReturn = !this.waitingForTakeover || head === this.leader;
        if (mayReturn && now >= (this.restartAtMs.get(head) ?? 0)) this.restart(head);
        continue;
      }
      const { status } = head;
      if (status.disk === 'Diskless' && !this.attaching.has(head) && now >= (this.attachAtMs.get(head) ?? 0))
        this.attach(head);
      const mayConnect = status.disk !== 'Attaching' && (status.disk !== 'Diskless' || this.prng.chance(0.02));
      if (status.connection === 'StandAlone' && mayConnect && now >= (this.connectAtMs.get(head) ?? 0) && !this.split)
        this.connect(head);
    }
    this.lead();
  }

  private lead(): void {
    const { leader } = this;
    if (!leader.isRunning) return;
    const { role, disk, peerDisk } = leader.status;
    if (role === 'Primary') {
      this.waitingForTakeover = false;
      if (this.isOver || (this.workload && !this.workload.isGone)) return;
      const workload = new Workload(
        leader,
        this.other(leader),
        this.model,
        this.prng.fork(),
        this.shape,
        this.versions,
        () => this.flushed(),
      );
      const errno = workload.start();
      if (errno === 0) {
        this.workload = workload;
        this.workloads.push(workload);
      }
      return;
    }
    const hasData = disk === 'UpToDate' || peerDisk === 'UpToDate' || this.isForced;
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

  private restart(head: Head): void {
    this.say(`${head.name} starts`);
    checkMetadataDecodes(head);
    head.reboot();
    this.attaching.delete(head);
    this.attachAtMs.set(head, this.world.nowMs);
    this.connectAtMs.set(head, this.world.nowMs + this.prng.between(0, 300));
  }

  private attach(head: Head): void {
    this.attaching.add(head);
    const { incarnation } = head;
    head.attach((code, reason) => {
      if (head.incarnation !== incarnation) return;
      this.attaching.delete(head);
      this.say(`${head.name} attach: ${code} ${reason}`);
      if (code < 1) this.attachAtMs.set(head, this.world.nowMs + 1000);
    });
  }

  private connect(head: Head, discardMyData = false): void {
    this.connectAtMs.set(head, this.world.nowMs + 1000);
    head.runtime!.connect({ discardMyData }, (code, reason) => {
      if (code < 1) this.say(`${head.name} connect: ${code} ${reason}`);
    });
  }

  // ----------------------------------------------------------------------------------------------------------- faults

  private setWires(forth: boolean, back: boolean): void {
    this.fabric.wire('alpha', 'beta').setUp(forth);
    this.fabric.wire('beta', 'alpha').setUp(back);
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
        this.setWires(forth, fault === 'cut' ? false : !forth);
        const ms = prng.chance(0.3) ? prng.between(20, 200) : prng.between(200, 6000);
        const cut = ++this.cuts;
        world.after(ms, undefined, () => {
          if (this.cuts === cut) this.setWires(true, true);
        });
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
        if (prng.chance(0.5)) this.crashAtFlush = 1;
        else this.crash(leader);
        return;
      case 'crashBoth':
        if (prng.chance(0.5)) this.crashAtFlush = 2;
        else this.crashBoth();
        return;
      case 'disconnect': {
        const head = prng.pick([leader, follower]);
        if (!head.isRunning) return;
        this.connectAtMs.set(head, world.nowMs + prng.between(100, 3000));
        head.runtime!.disconnect(prng.chance(0.3), (code, reason) => this.say(`disconnect: ${code} ${reason}`));
        return;
      }
      case 'detachPrimary':
      case 'detachSecondary': {
        const head = fault === 'detachPrimary' ? leader : follower;
        if (!this.isWhole()) return;
        this.attachAtMs.set(head, world.nowMs + prng.between(100, 3000));
        head.runtime!.detach(0, false, (code, reason) => this.say(`${head.name} detach: ${code} ${reason}`));
        return;
      }
      case 'diskError': {
        const head = prng.pick([leader, follower]);
        if (!this.isWhole()) return;
        const platter = prng.chance(0.7) ? head.data : head.metaPlatter;
        platter.broken = true;
        this.attachAtMs.set(head, world.nowMs + prng.between(1000, 3000));
        world.after(prng.between(1, 300), undefined, () => {
          platter.broken = false;
        });
        return;
      }
      case 'switchRoles':
        if (!this.isWhole() || leader.status.role !== 'Primary' || this.isPromoting) return;
        this.switchRoles();
        return;
      case 'invalidate':
        if (!this.isWhole()) return;
        follower.runtime!.invalidate(0, (code, reason) => this.say(`invalidate: ${code} ${reason}`));
        return;
      case 'splitBrain':
        this.splitBrain();
        return;
    }
  }

  private flushed(): void {
    if (this.crashAtFlush === 0) return;
    const which = this.crashAtFlush;
    this.crashAtFlush = 0;
    // Not from inside the answer: the process dies between two turns.
    this.world.after(0, undefined, () => {
      if (which === 2) this.crashBoth();
      else if (this.leader.isRunning) this.crash(this.leader);
    });
  }

  /** Whether the other head has everything the leader acknowledged. */
  private isCopyWhole(): boolean {
    const follower = this.other(this.leader);
    if (!follower.isRunning || !this.leader.isRunning) return false;
    const { connection, peerDisk, role } = this.leader.status;
    const isReplicating = connection === 'Connected' || connection === 'SyncTarget' || connection === 'WFBitMapT';
    return role === 'Primary' && isReplicating && peerDisk === 'UpToDate' && follower.status.disk === 'UpToDate';
  }

  private crash(head: Head): void {
    const { leader } = this;
    const follower = this.other(leader);
    if (head === leader) {
      const takeover = this.isCopyWhole() && this.prng.chance(0.6);
      // A Primary without a disk leaves its data with the other head, connected or not.
      const onlyCopyIsThere =
        leader.status.role === 'Primary' &&
        leader.status.disk !== 'UpToDate' &&
        follower.isRunning &&
        follower.status.disk === 'UpToDate';
      head.crash();
      this.workload = undefined;
      this.isPromoting = false;
      if (takeover || onlyCopyIsThere) {
        this.say(`${head.name} crashes, ${follower.name} takes over`);
        this.model.takenOver();
        this.leader = follower;
        this.waitingForTakeover = true;
        this.promoteAtMs = this.world.nowMs;
      } else {
        this.say(`${head.name} crashes`);
        this.model.powerLost();
      }
    } else {
      this.say(`${head.name} crashes`);
      const isOnlyCopy = leader.isRunning && leader.status.role === 'Primary' && leader.status.disk !== 'UpToDate';
      head.crash();
      if (isOnlyCopy) {
        // The application goes on against a device that has just lost its data: start over with what is left.
        this.crash(leader);
        this.leader = head;
      }
    }
    this.restartAtMs.set(head, this.world.nowMs + this.prng.between(10, 4000));
  }

  private crashBoth(): void {
    const { leader } = this;
    const follower = this.other(leader);
    if (!leader.isRunning || !follower.isRunning) return;
    this.say('both crash');
    // A Primary that has lost its disk knows only through its peer what is new.
    const leaderLostDisk = leader.status.role === 'Primary' && leader.status.disk !== 'UpToDate';
    const followerHasData = follower.status.disk === 'UpToDate';
    leader.crash();
    follower.crash();
    this.workload = undefined;
    this.isPromoting = false;
    this.waitingForTakeover = false;
    this.model.powerLost();
    if (leaderLostDisk && followerHasData) this.leader = follower;
    for (const head of [leader, follower]) this.restartAtMs.set(head, this.world.nowMs + this.prng.between(10, 3000));
  }

  private switchRoles(): void {
    const { leader, workload } = this;
    const follower = this.other(leader);
    if (!workload) return;
    this.isPromoting = true;
    workload.stop();
    const { incarnation } = leader;
    const poll = () => {
      if (leader.incarnation !== incarnation || !leader.isRunning) return;
      if (!workload.isClosed) {
        this.world.after(20, undefined, poll);
        return;
      }
      leader.runtime!.secondary((code, reason) => {
        if (leader.incarnation !== incarnation || this.leader !== leader) return;
        this.say(`${leader.name} secondary: ${code} ${reason}`);
        this.isPromoting = false;
        this.workload = undefined;
        // A copy that is not whole must not become the data.
        const mayMove = code >= 1 && this.isWhole();
        if (mayMove) this.leader = follower;
      });
    };
    poll();
  }

  /** Two heads that do not see each other, both told to be Primary. */
  private splitBrain(): void {
    const { leader } = this;
    const follower = this.other(leader);
    if (!this.isWhole() || leader.status.role !== 'Primary' || !this.workload || this.isPromoting) return;
    this.cuts++;
    this.setWires(false, false);
    const lonely = (head: Head) => head.isRunning && head.status.connection === 'WFConnection';
    this.waitUntil(30_000, 'both notice that the link is gone', () => lonely(leader) && lonely(follower));
    let promoted = false;
    follower.runtime!.primary(false, (code) => {
      promoted = code >= 1;
    });
    this.waitUntil(5000, 'the other head is Primary too', () => promoted);
    const loserModel = new SectorModel(true);
    const second = new Workload(follower, leader, loserModel, this.prng.fork(), this.shape, this.versions, () => {});
    second.start();
    this.workloads.push(second);
    this.split = { loser: follower, loserModel };
    const before = [this.workload.completed, second.completed];
    this.runFor(2000, () => {});
    this.waitUntil(
      30_000,
      'both write apart',
      () => this.workload!.completed > before[0]! + 20 && second.completed > 20,
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
