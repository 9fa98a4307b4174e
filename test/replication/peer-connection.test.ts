import { createHmac } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import {
  type Chance,
  PeerConnection,
  type PeerConnectionEffect,
  type PeerConnectionOptions,
} from '../../src/replication/wire/peer-connection.js';

const OPTIONS: PeerConnectionOptions = { connectIntervalMs: 10_000, pingTimeoutMs: 500, socketCheckMs: 500 };
const TICK_MS = 100;

const fromHex = (hex: string): Uint8Array => Uint8Array.from(Buffer.from(hex, 'hex'));
const INITIAL_DATA = fromHex('83740267fff20000');
const INITIAL_META = fromHex('83740267fff10000');
/** As drbd.ko 8.4.11 sends it. */
const KERNEL_FEATURES = fromHex(`83740267fffe0048000000560000000f00000065${'00'.repeat(60)}`);
const OUR_FEATURES = `83740267fffe0048000000640000000f00000065${'00'.repeat(60)}`;

/** What happened, chosen from outside: which of `count` possibilities comes next. */
type Choose = (count: number) => number;

interface Delivery {
  readonly to: number;
  readonly kind: 'accepted' | 'dialed' | 'bytes' | 'closed';
  readonly bytes?: Uint8Array;
}

/** One TCP connection; queue [n] holds what is on its way to node n. */
interface Tcp {
  readonly id: number;
  readonly queue: [Delivery[], Delivery[]];
  readonly isClosed: [boolean, boolean];
}

type Established = Extract<PeerConnectionEffect, { kind: 'established' }>;

/** Two machines joined by a fake network in which everything may be late, in any order that TCP allows. */
class Pair {
  nowMs = 0;
  readonly nodes: [PeerConnection, PeerConnection];
  readonly established: [Established | undefined, Established | undefined] = [undefined, undefined];
  readonly failures: [string[], string[]] = [[], []];
  readonly gaveUp = [false, false];
  private readonly isListening = [false, false];
  private readonly dials: number[] = [];
  readonly connections: Tcp[] = [];

  constructor(
    private readonly choose: Choose,
    options: readonly [PeerConnectionOptions, PeerConnectionOptions] = [OPTIONS, OPTIONS],
  ) {
    let fill = 0;
    const chance: Chance = {
      fraction: () => [0.25, 0.75][this.choose(2)]!,
      bytes: (count) => new Uint8Array(count).fill(++fill),
    };
    this.nodes = [new PeerConnection(options[0], chance), new PeerConnection(options[1], chance)];
  }

  start(node: number): void {
    this.nodes[node]!.start(this.nowMs);
    this.carryOut(node);
  }

  /** One thing happens: a delivery, or, when nothing is on its way, a tick of both clocks. */
  step(): void {
    const ready: (() => void)[] = this.dials.map((node, index) => () => {
      this.dials.splice(index, 1);
      this.connect(node);
    });
    for (const tcp of this.connections)
      for (const node of [0, 1] as const) if (tcp.queue[node].length > 0) ready.push(() => this.deliver(tcp, node));
    if (ready.length > 0) {
      ready[ready.length === 1 ? 0 : this.choose(ready.length)]!();
      return;
    }
    this.nowMs += TICK_MS;
    for (const node of [0, 1]) {
      this.nodes[node]!.tick(this.nowMs);
      this.carryOut(node);
    }
  }

  /** The network loses a connection: what is on its way is lost, but a door always tells how a dial ended. */
  cut(tcp: Tcp): void {
    for (const node of [0, 1] as const) {
      if (tcp.isClosed[node]) continue;
      const opening = tcp.queue[node].filter(({ kind }) => kind === 'dialed' || kind === 'accepted');
      tcp.queue[node] = [...opening, { to: node, kind: 'closed' }];
    }
  }

  get agreed(): boolean {
    const [left, right] = this.established;
    return (
      left !== undefined &&
      right !== undefined &&
      left.data === right.data &&
      left.meta === right.meta &&
      left.resolveConflicts !== right.resolveConflicts &&
      left.version === right.version &&
      left.features === right.features
    );
  }

  get isQuiet(): boolean {
    return this.dials.length === 0 && this.connections.every((tcp) => tcp.queue[0].length + tcp.queue[1].length === 0);
  }

  private connect(node: number): void {
    const peer = 1 - node;
    if (!this.isListening[peer]) {
      this.nodes[node]!.dialFailed(this.nowMs);
      this.carryOut(node);
      return;
    }
    const tcp: Tcp = { id: this.connections.length + 1, queue: [[], []], isClosed: [false, false] };
    tcp.queue[node as 0 | 1].push({ to: node, kind: 'dialed' });
    tcp.queue[peer as 0 | 1].push({ to: peer, kind: 'accepted' });
    this.connections.push(tcp);
  }

  private deliver(tcp: Tcp, node: 0 | 1): void {
    const delivery = tcp.queue[node].shift()!;
    const machine = this.nodes[node];
    if (delivery.kind === 'dialed') machine.dialed(tcp.id, this.nowMs);
    else if (delivery.kind === 'accepted') machine.accepted(tcp.id, this.nowMs);
    else if (delivery.kind === 'closed') {
      tcp.isClosed[node] = true;
      this.lost(tcp, node);
      machine.closed(tcp.id, this.nowMs);
    } else machine.received(tcp.id, delivery.bytes!, this.nowMs);
    this.carryOut(node);
  }

  /** What runs above the machine: a connection that breaks later ends both sockets and starts over. */
  private lost(tcp: Tcp, node: 0 | 1): void {
    const owned = this.established[node];
    if (owned === undefined || (owned.data !== tcp.id && owned.meta !== tcp.id)) return;
    this.established[node] = undefined;
    for (const id of [owned.data, owned.meta]) this.close(node, id);
    this.nodes[node].start(this.nowMs);
  }

  private close(node: number, id: number): void {
    const tcp = this.connections[id - 1]!;
    if (tcp.isClosed[node as 0 | 1]) return;
    tcp.isClosed[node as 0 | 1] = true;
    tcp.queue[node as 0 | 1].length = 0;
    const peer = (1 - node) as 0 | 1;
    if (!tcp.isClosed[peer]) tcp.queue[peer].push({ to: peer, kind: 'closed' });
  }

  private carryOut(node: number): void {
    for (const effect of this.nodes[node]!.takeEffects()) {
      switch (effect.kind) {
        case 'listen':
          this.isListening[node] = true;
          break;
        case 'stopListening':
          this.isListening[node] = false;
          break;
        case 'dial':
          expect(this.dials.includes(node), 'one dial at a time').toBe(false);
          this.dials.push(node);
          break;
        case 'send': {
          const tcp = this.connections[effect.socket - 1]!;
          const peer = (1 - node) as 0 | 1;
          expect(tcp.isClosed[node as 0 | 1], 'nothing is sent on a closed socket').toBe(false);
          if (!tcp.isClosed[peer]) tcp.queue[peer].push({ to: peer, kind: 'bytes', bytes: effect.bytes });
          break;
        }
        case 'close':
          this.close(node, effect.socket);
          break;
        case 'established':
          this.established[node as 0 | 1] = effect;
          break;
        case 'attemptFailed':
          this.failures[node as 0 | 1].push(effect.reason);
          if (!effect.retry) this.gaveUp[node] = true;
          break;
      }
    }
  }
}

/** Runs until both agree and nothing is on its way, or two minutes of simulated time are over. */
function settle(pair: Pair): void {
  while (!(pair.agreed && pair.isQuiet) && pair.nowMs < 120_000) pair.step();
}

/** A fixed stream of small numbers, for what the explored schedule leaves open. */
function lcg(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state >>> 16;
  };
}

describe('two of us', () => {
  it('one after the other: up at once, the second node makes the meta socket', () => {
    const pair = new Pair(() => 0);
    pair.start(0);
    for (let i = 0; i < 5; i++) pair.step();
    pair.start(1);
    const startedMs = pair.nowMs;
    settle(pair);
    expect(pair.agreed).toBe(true);
    expect(pair.nowMs - startedMs).toBeLessThanOrEqual(600);
    expect(pair.established[0]).toMatchObject({ version: 101, features: 15 });
    const { resolveConflicts } = pair.established[0]!;
    // Node 1 dialed the data socket, node 0 the meta socket: who accepted that one decides conflicts.
    expect(resolveConflicts).toBe(false);
  });

  it('every interleaving of the first eleven choices, both starting at once, ends in agreement', () => {
    const DEPTH = 11;
    let runs = 0;
    let crossed = 0;
    let slowestMs = 0;
    const path: number[] = [];
    const widths: number[] = [];
    for (;;) {
      let taken = 0;
      const later = lcg(runs);
      const pair = new Pair((count) => {
        if (taken >= DEPTH) return later() % count;
        if (taken === path.length) {
          path.push(0);
          widths.push(count);
        }
        widths[taken] = count;
        return path[taken++]!;
      });
      pair.start(0);
      pair.start(1);
      settle(pair);
      if (!pair.agreed) expect.fail(`no agreement after choices ${path.join(' ')}: ${pair.failures.join('; ')}`);
      expect(pair.gaveUp).toEqual([false, false]);
      runs++;
      if (pair.connections.length > 2) crossed++;
      slowestMs = Math.max(slowestMs, pair.nowMs);
      // The next path in order.
      path.length = taken;
      widths.length = taken;
      while (path.length > 0 && path.at(-1)! + 1 >= widths.at(-1)!) {
        path.pop();
        widths.pop();
      }
      if (path.length === 0) break;
      path[path.length - 1]!++;
    }
    expect(runs).toBeGreaterThan(1000);
    expect(crossed).toBeGreaterThan(100);
    expect(slowestMs).toBeLessThan(60_000);
  });

  it('random schedules with connections lost on the way end in agreement once the losses stop', () => {
    fc.assert(
      fc.property(
        fc.integer(),
        fc.array(fc.nat(40), { maxLength: 12 }),
        fc.nat(30),
        (seed, cutsAfter, secondStartsAfter) => {
          const random = lcg(seed);
          const pair = new Pair((count) => random() % count);
          pair.start(0);
          for (let i = 0; i < secondStartsAfter; i++) pair.step();
          pair.start(1);
          for (const steps of cutsAfter) {
            for (let i = 0; i < steps; i++) pair.step();
            const victim = pair.connections[random() % Math.max(1, pair.connections.length)];
            if (victim !== undefined) pair.cut(victim);
          }
          settle(pair);
          expect(pair.agreed).toBe(true);
          expect(pair.gaveUp).toEqual([false, false]);
        },
      ),
      { numRuns: 400 },
    );
  });

  it('with the same secret authenticate; the meta socket stays as agreed', () => {
    const authentication = { algorithm: 'sha256', secret: 'FooFunFactory' };
    const options = { ...OPTIONS, authentication };
    const pair = new Pair(() => 0, [options, options]);
    pair.start(0);
    pair.start(1);
    settle(pair);
    expect(pair.agreed).toBe(true);
  });

  it('with different secrets give up for good, both', () => {
    const left = { ...OPTIONS, authentication: { algorithm: 'sha1', secret: 'left' } };
    const right = { ...OPTIONS, authentication: { algorithm: 'sha1', secret: 'right' } };
    const pair = new Pair(() => 0, [left, right]);
    pair.start(0);
    for (let i = 0; i < 5; i++) pair.step();
    pair.start(1);
    for (let i = 0; i < 200; i++) pair.step();
    expect(pair.established).toEqual([undefined, undefined]);
    expect(pair.gaveUp).toContain(true);
    expect(pair.failures.flat()).toContain('Authentication of peer failed');
  });
});

/** One machine, driven by hand. */
class Single {
  readonly machine: PeerConnection;
  nowMs = 0;

  constructor(options: Partial<PeerConnectionOptions> = {}, fraction = 0.75) {
    this.machine = new PeerConnection(
      { ...OPTIONS, ...options },
      { fraction: () => fraction, bytes: (count) => new Uint8Array(count).fill(7) },
    );
  }

  effects(): PeerConnectionEffect[] {
    return [...this.machine.takeEffects()];
  }

  kinds(): string[] {
    return this.effects().map((effect) => effect.kind);
  }

  pass(ms: number): void {
    for (const end = this.nowMs + ms; this.nowMs < end; ) {
      this.nowMs += TICK_MS;
      this.machine.tick(this.nowMs);
    }
  }

  /** Up to the features packet being sent: 1 is data (accepted), 2 is meta (dialed). */
  toFeatures(): void {
    this.machine.start(0);
    this.machine.accepted(1, 0);
    this.machine.received(1, INITIAL_DATA, 0);
    this.machine.dialed(2, 0);
    this.pass(500);
  }
}

describe('against drbd.ko', () => {
  it('dials back at once when the kernel made the data socket, waits half a second, then speaks', () => {
    const single = new Single();
    single.machine.start(0);
    expect(single.effects()).toEqual([{ kind: 'listen' }, { kind: 'dial', timeoutMs: 10_000 }]);
    single.machine.dialFailed(0);
    single.pass(3000);
    expect(single.effects()).toEqual([]);
    single.machine.accepted(1, single.nowMs);
    single.machine.received(1, INITIAL_DATA, single.nowMs);
    expect(single.effects()).toEqual([{ kind: 'dial', timeoutMs: 10_000 }]);
    single.machine.dialed(2, single.nowMs);
    expect(single.effects()).toEqual([{ kind: 'send', socket: 2, bytes: INITIAL_META }]);
    single.pass(400);
    expect(single.effects()).toEqual([]);
    single.pass(100);
    expect(single.effects()).toEqual([
      { kind: 'stopListening' },
      { kind: 'send', socket: 1, bytes: fromHex(OUR_FEATURES) },
    ]);
    const next = fromHex('8620ec200000000b');
    single.machine.received(1, Uint8Array.from([...KERNEL_FEATURES, ...next]), single.nowMs);
    expect(single.effects()).toEqual([
      {
        kind: 'established',
        data: 1,
        meta: 2,
        version: 101,
        features: 15,
        resolveConflicts: false,
        unconsumedData: next,
        unconsumedMeta: new Uint8Array(0),
      },
    ]);
  });

  it('makes the data socket when it dials first, and takes the meta socket that comes back', () => {
    const single = new Single();
    single.machine.start(0);
    single.machine.dialed(1, 0);
    expect(single.effects().at(-1)).toEqual({ kind: 'send', socket: 1, bytes: INITIAL_DATA });
    single.machine.accepted(2, 0);
    single.machine.received(2, INITIAL_META, 0);
    single.pass(500);
    single.machine.received(1, KERNEL_FEATURES, single.nowMs);
    expect(single.effects().at(-1)).toMatchObject({ kind: 'established', data: 1, meta: 2, resolveConflicts: true });
  });

  it('crossed: keeps its own or takes theirs, by a coin', () => {
    for (const [fraction, closed] of [
      [0.25, 2],
      [0.75, 1],
    ] as const) {
      const single = new Single({}, fraction);
      single.machine.start(0);
      single.machine.dialed(1, 0);
      single.machine.accepted(2, 0);
      single.effects();
      single.machine.received(2, INITIAL_DATA, 0);
      expect(single.effects().filter((effect) => effect.kind === 'close')).toEqual([{ kind: 'close', socket: closed }]);
    }
  });

  it('dials again after an interval with a seventh added or taken away', () => {
    for (const [fraction, afterMs] of [
      [0.75, 11_500],
      [0.25, 8600],
    ] as const) {
      const single = new Single({}, fraction);
      single.machine.start(0);
      single.effects();
      single.machine.dialFailed(0);
      single.pass(afterMs - TICK_MS);
      expect(single.kinds()).toEqual([]);
      single.pass(TICK_MS);
      expect(single.kinds()).toEqual(['dial']);
    }
  });

  it('starts over after a second when the peer says nothing for four ping timeouts', () => {
    const single = new Single();
    single.toFeatures();
    single.effects();
    single.pass(1900);
    expect(single.kinds()).toEqual([]);
    single.pass(100);
    const effects = single.effects();
    expect(effects.map((effect) => effect.kind)).toEqual(['close', 'close', 'attemptFailed']);
    expect(effects.at(-1)).toMatchObject({ retry: true });
    single.pass(1000);
    expect(single.kinds()).toEqual(['listen', 'dial']);
  });

  it('gives up for good when no version fits', () => {
    for (const [min, max] of [
      [86, 99],
      [102, 118],
    ]) {
      const single = new Single();
      single.toFeatures();
      const features = KERNEL_FEATURES.slice();
      features[11] = min!;
      features[19] = max!;
      single.machine.received(1, features, single.nowMs);
      expect(single.effects().at(-1)).toMatchObject({ kind: 'attemptFailed', retry: false });
      expect(single.machine.isActive).toBe(false);
    }
  });

  it('agrees on less: version 100, no write-zeroes', () => {
    const single = new Single();
    single.toFeatures();
    const features = KERNEL_FEATURES.slice();
    features[15] = 7;
    features[19] = 100;
    single.machine.received(1, features, single.nowMs);
    expect(single.effects().at(-1)).toMatchObject({ kind: 'established', version: 100, features: 7 });
  });

  it('drops connections that say nothing or something else, and at most five are waited for', () => {
    const single = new Single();
    single.machine.start(0);
    single.machine.dialFailed(0);
    single.effects();
    single.machine.accepted(1, 0);
    single.machine.received(1, Buffer.from('GET / HTTP/1.1\r\n'), 0);
    expect(single.effects()).toEqual([{ kind: 'close', socket: 1 }]);
    for (let socket = 2; socket <= 7; socket++) single.machine.accepted(socket, 0);
    expect(single.effects()).toEqual([{ kind: 'close', socket: 2 }]);
    single.pass(2000);
    expect(single.effects().length).toBe(5);
    single.machine.received(7, INITIAL_DATA, single.nowMs);
    expect(single.effects()).toEqual([]);
  });

  it('stop closes everything', () => {
    const single = new Single();
    single.machine.start(0);
    single.machine.dialed(1, 0);
    single.machine.accepted(2, 0);
    single.effects();
    single.machine.stop();
    expect(single.kinds().sort()).toEqual(['close', 'close', 'stopListening']);
    expect(single.machine.isActive).toBe(false);
  });
});

describe('authentication', () => {
  interface Row {
    readonly connection: number;
    readonly socket: string;
    readonly from: string;
    readonly bytes: string;
  }
  const rows = readFileSync(join(import.meta.dirname, '../vectors/drbd/session-options.jsonl'), 'utf8')
    .trim()
    .split('\n')
    .map((line) => JSON.parse(line) as Row);
  const find = (connection: number, from: string, command: string): Row =>
    rows.find((row) => row.connection === connection && row.from === from && row.bytes.slice(12, 16) === command)!;

  for (const connection of [1, 2])
    it(`answers the challenge as drbd.ko did in the recorded session (connection ${connection})`, () => {
      // We are test-master: its recorded challenge is our randomness.
      const own = fromHex(find(connection, 'test-master', '0010').bytes).subarray(16);
      const machine = new PeerConnection(
        { ...OPTIONS, authentication: { algorithm: 'sha1', secret: 'lab secret' } },
        { fraction: () => 0.75, bytes: () => own },
      );
      machine.start(0);
      machine.accepted(1, 0);
      machine.received(1, INITIAL_DATA, 0);
      machine.dialed(2, 0);
      for (const command of ['fffe', '0010', '0011']) {
        const row = rows.find(
          (candidate) =>
            candidate.connection === connection &&
            candidate.from === 'test-backup' &&
            (command === 'fffe' ? candidate.bytes.slice(8, 12) : candidate.bytes.slice(12, 16)) === command,
        )!;
        machine.received(1, fromHex(row.bytes), 0);
      }
      const effects = machine.takeEffects();
      const sent = effects.filter((effect) => effect.kind === 'send').map((effect) => Buffer.from(effect.bytes));
      expect(sent.at(-2)!.toString('hex')).toBe(find(connection, 'test-master', '0010').bytes);
      expect(sent.at(-1)!.toString('hex')).toBe(find(connection, 'test-master', '0011').bytes);
      expect(effects.at(-1)).toMatchObject({ kind: 'established', version: 101 });
    });

  const packet = (command: number, payload: Uint8Array): Uint8Array =>
    Uint8Array.from([0x86, 0x20, 0xec, 0x20, 0, 0, 0, command, 0, 0, 0, payload.length, 0, 0, 0, 0, ...payload]);
  const own = new Uint8Array(64).fill(7);
  const theirs = new Uint8Array(64).fill(9);
  const hmac = (secret: string, message: Uint8Array): Uint8Array => createHmac('sha1', secret).update(message).digest();
  const cases: [string, Uint8Array[], boolean][] = [
    ['a peer without authentication ends it for good', [packet(0x0b, new Uint8Array(25))], false],
    ['a short challenge ends it for good', [packet(0x10, new Uint8Array(63))], false],
    ['a challenge that is too long ends it for good', [packet(0x10, new Uint8Array(129))], false],
    ['our own challenge ends it for good', [packet(0x10, own)], false],
    ['a wrong response ends it for good', [packet(0x10, theirs), packet(0x11, hmac('other', own))], false],
    ['a response of another length is tried again', [packet(0x10, theirs), packet(0x11, own.subarray(0, 16))], true],
    ['no response but another packet is tried again', [packet(0x10, theirs), packet(0x0b, new Uint8Array(25))], true],
    ['garbage is tried again', [new Uint8Array(16)], true],
  ];
  for (const [name, received, retry] of cases)
    it(name, () => {
      const single = new Single({ authentication: { algorithm: 'sha1', secret: 'lab secret' } });
      single.toFeatures();
      single.machine.received(1, KERNEL_FEATURES, single.nowMs);
      for (const bytes of received) single.machine.received(1, bytes, single.nowMs);
      expect(single.effects().at(-1)).toMatchObject({ kind: 'attemptFailed', retry });
    });

  it('a longer challenge is answered whole', () => {
    const long = new Uint8Array(128).fill(3);
    const single = new Single({ authentication: { algorithm: 'sha1', secret: 'lab secret' } });
    single.toFeatures();
    single.machine.received(1, KERNEL_FEATURES, single.nowMs);
    single.machine.received(1, packet(0x10, long), single.nowMs);
    expect(single.effects().at(-1)).toEqual({
      kind: 'send',
      socket: 1,
      bytes: packet(0x11, hmac('lab secret', long)),
    });
    single.machine.received(1, packet(0x11, hmac('lab secret', own)), single.nowMs);
    expect(single.effects().at(-1)).toMatchObject({ kind: 'established' });
  });
});

describe('bytes', () => {
  it('mean the same however they are cut', () => {
    const whole = Uint8Array.from([...INITIAL_DATA, ...KERNEL_FEATURES, 1, 2, 3]);
    const outcome = (chunks: readonly Uint8Array[]): PeerConnectionEffect[] => {
      const single = new Single();
      single.machine.start(0);
      single.machine.accepted(1, 0);
      single.machine.dialed(2, 0);
      // The dial became the data socket; the peer's is crossed and taken.
      for (const chunk of chunks) single.machine.received(1, chunk, 0);
      single.machine.dialed(3, 0);
      const effects = single.effects();
      const last = effects.at(-1) as Established;
      return [...effects.slice(0, -1), { ...last, unconsumedData: new Uint8Array(0) }];
    };
    const expected = outcome([whole]);
    expect(expected.at(-1)).toMatchObject({ kind: 'established', data: 1, meta: 3 });
    for (let cut = 1; cut < whole.length; cut++)
      expect(outcome([whole.subarray(0, cut), whole.subarray(cut)]), `cut at ${cut}`).toEqual(expected);
    expect(outcome(Array.from(whole, (byte) => Uint8Array.of(byte)))).toEqual(expected);
  });

  it('at random never do more than fail the attempt', () => {
    fc.assert(
      fc.property(
        fc.array(fc.tuple(fc.integer({ min: 1, max: 2 }), fc.uint8Array({ maxLength: 200 })), { maxLength: 20 }),
        fc.boolean(),
        (chunks, authenticated) => {
          const single = new Single(
            authenticated ? { authentication: { algorithm: 'md5', secret: 'lab secret' } } : {},
          );
          single.toFeatures();
          for (const [socket, bytes] of chunks) single.machine.received(socket, bytes, single.nowMs);
          const outcomes = single.effects().filter((effect) => effect.kind !== 'send');
          expect(outcomes.some((effect) => effect.kind === 'established')).toBe(false);
          for (const effect of outcomes) if (effect.kind === 'attemptFailed') expect(effect.retry).toBe(true);
          expect(single.machine.isActive).toBe(true);
        },
      ),
    );
  });

  it('are not hoarded', () => {
    const single = new Single();
    single.machine.start(0);
    single.machine.dialed(1, 0);
    single.machine.accepted(2, 0);
    single.effects();
    // The rest of a flood behind a first packet, before the other socket is there.
    single.machine.received(2, INITIAL_META, 0);
    single.effects();
    for (let i = 0; i < 16; i++) single.machine.received(2, new Uint8Array(4096), 0);
    expect(single.kinds()).toEqual([]);
    single.machine.received(2, new Uint8Array(1), 0);
    expect(single.effects().at(-1)).toMatchObject({ kind: 'attemptFailed', retry: true });
  });
});
