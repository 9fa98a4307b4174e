import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import {
  agreeSize,
  agreeUserSize,
  type CompareContext,
  compareGenerations,
  decideSync,
  type Generations,
  INCOMPATIBLE,
  incompatibleProtocol,
  realPeerDisk,
  type SyncFacts,
  UNRELATED,
} from '../../src/replication/handshake.js';
import {
  mirrorPolicy,
  SplitBrainPolicy as P,
  recover0Primaries,
  recover1Primary,
  recover2Primaries,
  type SplitBrainFacts,
} from '../../src/replication/split-brain.js';
import { DiskState as D, Role as R } from '../../src/replication/state.js';
import type { ProtocolParameters } from '../../src/replication/wire/codec.js';

const OFFSET = 1n << 48n;
/** Identifiers of unrelated generations, bit 0 clear. */
const [A, B, X, Y, Z, W] = [0xa000n, 0xb000n, 0x1_0000n, 0x2_0000n, 0x3_0000n, 0x4_0000n] as const;
const ids = (current: bigint, bitmap = 0n, history0 = 0n, history1 = 0n): Generations => ({
  current,
  bitmap,
  history0,
  history1,
});

const QUIET: CompareContext = {
  selfCrashed: false,
  peerCrashed: false,
  role: R.Secondary,
  peerRole: R.Secondary,
  hasWriteSame: true,
  resolveConflicts: false,
};

describe('generation identifiers, rule by rule', () => {
  const both = { selfCrashed: true, peerCrashed: true };
  const cases: [number, number, string, Generations, Generations, Partial<CompareContext>?][] = [
    [10, 0, 'both just created', ids(4n), ids(4n)],
    [20, -2, 'I am just created', ids(4n), ids(A)],
    [20, -2, 'I have nothing', ids(0n), ids(A)],
    [30, 2, 'the peer is just created', ids(A), ids(4n)],
    [30, 2, 'the peer has nothing', ids(A), ids(0n)],
    [34, 1, 'I missed the finish as source', ids(A, X, Y, Z), ids(A, 0n, X, Y)],
    [36, 1, 'only the bitmap slot fits, not the history', ids(A, X, Y, Z), ids(A, 0n, X, W)],
    [36, 1, 'the peer did not store the sync identifier', ids(A, X, Y, Z), ids(A, 0n, Y, Z)],
    [35, -1, 'the peer missed the finish as source', ids(A, 0n, X, Y), ids(A, X, Y, Z)],
    [37, -1, 'only the history slot fits, not the older', ids(A, 0n, X, W), ids(A, X, Y, Z)],
    [37, -1, 'I did not store the sync identifier', ids(A, 0n, Y, Z), ids(A, X, Y, Z)],
    [40, 0, 'equal, nobody crashed', ids(A | 1n, 0n, X), ids(A, 0n, X)],
    [40, 0, 'equal with equal bitmap slots', ids(A, X), ids(A, X)],
    [40, 1, 'I crashed as Primary', ids(A), ids(A), { selfCrashed: true }],
    [40, -1, 'the peer crashed as Primary', ids(A), ids(A), { peerCrashed: true }],
    [40, -1, 'both crashed, I resolve conflicts', ids(A), ids(A), { ...both, resolveConflicts: true }],
    [40, 1, 'both crashed, the peer resolves conflicts', ids(A), ids(A), both],
    [41, 1, 'a crash, and I am Primary again', ids(A), ids(A), { peerCrashed: true, role: R.Primary }],
    [41, -1, 'a crash, and the peer is Primary again', ids(A), ids(A), { selfCrashed: true, peerRole: R.Primary }],
    [41, -100, 'a crash, and both are Primary', ids(A), ids(A), { ...both, role: R.Primary, peerRole: R.Primary }],
    [41, INCOMPATIBLE, 'an old peer', ids(A), ids(A), { peerCrashed: true, role: R.Primary, hasWriteSame: false }],
    [50, -1, 'the peer wrote without me', ids(A), ids(B | 1n, A | 1n)],
    [51, -1, 'the sync identifier never arrived here', ids(A), ids(B, A + OFFSET, A, X)],
    [60, -2, 'I am the younger history of the peer', ids(A), ids(B, Y, A, X)],
    [60, -2, 'I am the older history of the peer', ids(A), ids(B, Y, X, A)],
    [70, 1, 'I wrote without the peer', ids(B | 1n, A | 1n), ids(A)],
    [71, 1, 'the sync identifier never arrived there', ids(B, A + OFFSET, A, X), ids(A)],
    [80, 2, 'the peer is my younger history', ids(B, Y, A, X), ids(A)],
    [80, 2, 'the peer is my older history', ids(B, Y, X, A), ids(A)],
    [90, 100, 'both wrote alone since the same generation', ids(A, X | 1n), ids(B, X)],
    [100, -100, 'a common ancestor further back', ids(A, Y, X, Z), ids(B, 0n, X, W)],
    [100, -100, 'no history at all counts as common', ids(A), ids(B)],
    [100, UNRELATED, 'nothing in common', ids(A, 0n, X, Y), ids(B, 0n, Z, W)],
  ];
  for (const [rule, result, name, self, peer, context] of cases)
    it(`${rule}: ${name}`, () => {
      expect(compareGenerations(self, peer, { ...QUIET, ...context })).toMatchObject({ rule, result });
    });

  it('34, 35, 51 and 71 say how to put the identifiers right', () => {
    const fix = (self: Generations, peer: Generations) => compareGenerations(self, peer, QUIET);
    expect(fix(ids(A, X, Y, Z), ids(A, 0n, X, Y)).fixSelf).toEqual(ids(A, 0n, X, Y));
    expect(fix(ids(A, 0n, X, Y), ids(A, X, Y, Z)).fixPeer).toEqual(ids(A, 0n, X, Y));
    expect(fix(ids(A), ids(B, A + OFFSET, A, X)).fixPeer).toEqual(ids(B, A, X, X));
    expect(fix(ids(B, A + OFFSET, A, X), ids(A)).fixSelf).toEqual(ids(B, A, X, X));
    expect(fix(ids(A), ids(B, A)).fixPeer).toBeUndefined();
  });

  it('51 needs the exact offset, also where it wraps', () => {
    expect(compareGenerations(ids(A), ids(B, A + OFFSET + 2n, A, X), QUIET).rule).toBe(60);
    const high = 0xffff_ffff_0000_0000n;
    const wrapped = BigInt.asUintN(64, high + OFFSET);
    expect(compareGenerations(ids(high), ids(B, wrapped, high, X), QUIET).rule).toBe(51);
  });
});

const FACTS: SyncFacts = {
  self: ids(A, 0n, X),
  peer: ids(A, 0n, X),
  role: R.Secondary,
  peerRole: R.Secondary,
  disk: D.UpToDate,
  currentDisk: D.UpToDate,
  peerDisk: D.UpToDate,
  peerFlags: 0,
  selfCrashed: false,
  selfChanges: 0,
  peerChanges: 0,
  discardMyData: false,
  dryRun: false,
  resolveConflicts: false,
  hasWriteSame: true,
  afterSplitBrain0Primaries: P.Disconnect,
  afterSplitBrain1Primary: P.Disconnect,
  afterSplitBrain2Primaries: P.Disconnect,
  alwaysAfterSplitBrain: false,
  resyncRoleConflict: P.Disconnect,
};
const decide = (facts: Partial<SyncFacts>) => decideSync({ ...FACTS, ...facts });
/** Both wrote alone since generation X: rule 90. */
const SPLIT = { self: ids(A, X), peer: ids(B, X) };
/** Ambiguous: rule 100. */
const AMBIGUOUS = { self: ids(A, Y, X, Z), peer: ids(B, 0n, X, W) };

describe('handshakes that drbd.ko 8.4.11 logged', () => {
  interface Logged {
    readonly session: string;
    readonly self: { readonly uuids: string[]; readonly bits: number; readonly flags: number };
    readonly peer: { readonly uuids: string[]; readonly bits: number; readonly flags: number };
    readonly result: number;
    readonly rule: number;
    readonly log: string[];
  }
  const lines = readFileSync(join(import.meta.dirname, '../vectors/drbd/handshakes.jsonl'), 'utf8')
    .trim()
    .split('\n');
  const toIds = (uuids: string[]) => {
    const [current, bitmap, history0, history1] = uuids.map((uuid) => BigInt(`0x${uuid}`));
    return ids(current!, bitmap!, history0!, history1!);
  };
  lines.forEach((line, index) => {
    const row = JSON.parse(line) as Logged;
    it(`${row.session} ${index + 1}: uuid_compare()=${row.result} by rule ${row.rule}`, () => {
      const isFresh = row.rule === 10 || row.rule === 20;
      const decision = decide({
        self: toIds(row.self.uuids),
        peer: toIds(row.peer.uuids),
        selfChanges: row.self.bits,
        peerChanges: row.peer.bits,
        selfCrashed: (row.self.flags & 2) !== 0,
        // drbd.ko does not print its own flag.
        discardMyData: row.log.some((entry) => entry.includes('Sync from peer node')),
        peerFlags: row.peer.flags,
        disk: isFresh ? D.Inconsistent : D.UpToDate,
        peerDisk: row.rule === 10 || row.rule === 30 ? D.Inconsistent : D.UpToDate,
      });
      expect(decision.comparison).toMatchObject({ result: row.result, rule: row.rule });
      const log = row.log.join('\n');
      const helpers = [...log.matchAll(/\/bin\/true (\S+) minor/g)].map((match) => match[1]);
      expect(decision.helpers).toEqual(helpers);
      for (const word of ['Becoming sync source due to disk states.', 'Becoming sync target due to disk states.'])
        if (log.includes(word)) expect(decision.reason).toBe(word);
      if (log.includes('manually solved')) expect(decision.reason).toContain('manually solved');
      const entered = /conn\( WFReportParams -> (\w+)/.exec(log)?.[1];
      const kinds: Record<string, string> = { Connected: 'none', WFBitMapS: 'source', WFBitMapT: 'target' };
      if (entered !== undefined) expect(decision.kind).toBe(kinds[entered]);
      else if (log.includes('unresolved')) expect(decision.kind).toBe('splitBrain');
      else expect(decision).toMatchObject({ kind: row.result > 0 ? 'source' : 'target', full: true });
    });
  });
  it('are all there', () => expect(lines.length).toBe(23));
});

describe('from comparison to decision', () => {
  it('equal: nothing to do', () => expect(decide({})).toMatchObject({ kind: 'none', full: false, helpers: [] }));
  it('unrelated data is refused', () =>
    expect(decide({ self: ids(A, 0n, X, Y), peer: ids(B, 0n, Z, W) })).toMatchObject({ kind: 'unrelated' }));
  it('a peer that decides otherwise is refused', () =>
    expect(decide({ selfCrashed: true, role: R.Primary, hasWriteSame: false })).toMatchObject({ kind: 'refused' }));
  it('an Inconsistent disk follows the better one, whatever the identifiers say', () => {
    expect(decide({ self: ids(B, A), peer: ids(A), disk: D.Inconsistent })).toMatchObject({
      kind: 'target',
      full: false,
    });
    expect(decide({ peerDisk: D.Inconsistent })).toMatchObject({ kind: 'source', full: false });
    expect(decide({ ...AMBIGUOUS, peerDisk: D.Inconsistent })).toMatchObject({
      kind: 'source',
      full: true,
      helpers: [],
    });
  });
  it('a peer that is negotiating counts by its flag', () => {
    expect(realPeerDisk(D.Negotiating, 4)).toBe(D.Inconsistent);
    expect(realPeerDisk(D.Negotiating, 0)).toBe(D.Consistent);
    expect(realPeerDisk(D.Outdated, 4)).toBe(D.Outdated);
    expect(decide({ peerDisk: D.Negotiating, peerFlags: 4 }).kind).toBe('source');
    expect(decide({ peerDisk: D.Negotiating, disk: D.Inconsistent }).kind).toBe('target');
  });
  it('nobody gives away bad data', () =>
    expect(decide({ self: ids(B, A), peer: ids(A), disk: D.Inconsistent, peerDisk: D.Inconsistent })).toMatchObject({
      kind: 'refused',
      reason: 'I shall become SyncSource, but I am inconsistent!',
    }));

  it('split brain without a policy calls both handlers and drops the connection', () =>
    expect(decide(SPLIT)).toMatchObject({ kind: 'splitBrain', helpers: ['initial-split-brain', 'split-brain'] }));
  it('split brain with a policy is solved with the bitmap', () =>
    expect(decide({ ...SPLIT, afterSplitBrain0Primaries: P.DiscardLocal })).toMatchObject({
      kind: 'target',
      full: false,
      helpers: ['initial-split-brain'],
    }));
  it('an ambiguous one only with always-asbp, and in full', () => {
    const policy = { ...AMBIGUOUS, afterSplitBrain0Primaries: P.DiscardRemote };
    expect(decide(policy).kind).toBe('splitBrain');
    expect(decide({ ...policy, alwaysAfterSplitBrain: true })).toMatchObject({ kind: 'source', full: true });
  });
  it('discard-my-data on one side solves it by hand; on both it does not', () => {
    expect(decide({ ...SPLIT, discardMyData: true })).toMatchObject({ kind: 'target', full: false });
    expect(decide({ ...SPLIT, peerFlags: 1 })).toMatchObject({ kind: 'source', full: false });
    expect(decide({ ...AMBIGUOUS, discardMyData: true }).kind).toBe('target');
    expect(decide({ ...SPLIT, discardMyData: true, peerFlags: 1 }).kind).toBe('splitBrain');
  });

  it('a Primary does not become target, unless violently', () => {
    const losing = { self: ids(A), peer: ids(B, A), role: R.Primary };
    expect(decide(losing)).toMatchObject({ kind: 'refused', helpers: [] });
    expect(decide({ ...losing, resyncRoleConflict: P.CallPriLost })).toMatchObject({
      kind: 'refused',
      helpers: ['pri-lost'],
    });
    expect(decide({ ...losing, resyncRoleConflict: P.Violently })).toMatchObject({ kind: 'target' });
    expect(decide({ ...losing, disk: D.Inconsistent, currentDisk: D.Inconsistent }).kind).toBe('target');
  });
  it('a Primary that loses a split brain gives up its role first, or the split brain stays', () => {
    const losing = {
      ...SPLIT,
      role: R.Primary,
      afterSplitBrain0Primaries: P.DiscardLocal,
      afterSplitBrain1Primary: P.CallPriLost,
    };
    expect(decide(losing)).toMatchObject({ kind: 'target', mustDemote: true });
    expect(decide({ ...losing, demotionFailed: true })).toMatchObject({
      kind: 'splitBrain',
      mustDemote: false,
      helpers: ['initial-split-brain', 'pri-lost-after-sb', 'split-brain'],
    });
  });
  it('a dry run only tells', () => {
    expect(decide({ dryRun: true })).toMatchObject({ kind: 'refused', dryRun: true });
    expect(decide({ dryRun: true, self: ids(4n), disk: D.Inconsistent }).reason).toBe(
      'dry-run connect: Would become SyncTarget, doing a full resync.',
    );
  });
});

describe('after-split-brain policies', () => {
  const facts = (fields: Partial<SplitBrainFacts>): SplitBrainFacts => ({
    selfBitmap: 0n,
    peerBitmap: 0n,
    selfChanges: 1,
    peerChanges: 1,
    resolveConflicts: false,
    role: R.Secondary,
    ...fields,
  });
  const rc = { resolveConflicts: true };
  const young = { selfBitmap: X, peerBitmap: X | 1n };
  const old = { selfBitmap: X | 1n, peerBitmap: X };
  const zero: [string, number, Partial<SplitBrainFacts>, number][] = [
    ['disconnect', P.Disconnect, { selfChanges: 0 }, -100],
    ['younger: I am', P.DiscardYoungerPrimary, young, -1],
    ['younger: the peer is', P.DiscardYoungerPrimary, old, 1],
    ['younger: unknown, least changes decide', P.DiscardYoungerPrimary, { peerChanges: 2 }, -1],
    ['younger: unknown, zero changes decide first', P.DiscardYoungerPrimary, { peerChanges: 0 }, 1],
    ['older: the peer is', P.DiscardOlderPrimary, young, 1],
    ['older: I am', P.DiscardOlderPrimary, old, -1],
    ['older: unknown, tie', P.DiscardOlderPrimary, rc, -1],
    ['zero: both', P.DiscardZeroChanges, { selfChanges: 0, peerChanges: 0 }, 1],
    ['zero: both, tie broken', P.DiscardZeroChanges, { selfChanges: 0, peerChanges: 0, ...rc }, -1],
    ['zero: the peer', P.DiscardZeroChanges, { peerChanges: 0 }, 1],
    ['zero: I', P.DiscardZeroChanges, { selfChanges: 0 }, -1],
    ['zero: nobody', P.DiscardZeroChanges, { selfChanges: 5 }, -100],
    ['least: I', P.DiscardLeastChanges, { peerChanges: 2 }, -1],
    ['least: the peer', P.DiscardLeastChanges, { selfChanges: 2 }, 1],
    ['least: tie', P.DiscardLeastChanges, {}, 1],
    ['least: tie broken', P.DiscardLeastChanges, rc, -1],
    ['local', P.DiscardLocal, {}, -1],
    ['remote', P.DiscardRemote, {}, 1],
    ['a policy that needs a Primary', P.Consensus, {}, -100],
    ['violently', P.Violently, {}, -100],
  ];
  for (const [name, policy, fields, verdict] of zero)
    it(`0 primaries, ${name}`, () => expect(recover0Primaries(policy, facts(fields))).toBe(verdict));

  const primary = { role: R.Primary };
  const one: [string, number, number, Partial<SplitBrainFacts>, number, boolean][] = [
    ['disconnect', P.Disconnect, P.DiscardLocal, {}, -100, false],
    ['consensus: the Secondary loses', P.Consensus, P.DiscardLocal, {}, -1, false],
    ['consensus: seen from the Primary', P.Consensus, P.DiscardRemote, primary, 1, false],
    ['consensus: the Primary would lose', P.Consensus, P.DiscardLocal, primary, -100, false],
    ['consensus: seen from the Secondary', P.Consensus, P.DiscardRemote, {}, -100, false],
    ['violently', P.Violently, P.DiscardLocal, primary, -1, false],
    ['discard-secondary: I am Primary', P.DiscardSecondary, P.Disconnect, primary, 1, false],
    ['discard-secondary: I am not', P.DiscardSecondary, P.Disconnect, {}, -1, false],
    ['call-pri-lost: I lose', P.CallPriLost, P.DiscardLocal, primary, -1, true],
    ['call-pri-lost: I win', P.CallPriLost, P.DiscardRemote, primary, 1, false],
    ['call-pri-lost: I lose as Secondary', P.CallPriLost, P.DiscardLocal, {}, -1, false],
    ['a policy for none', P.DiscardLocal, P.DiscardLocal, {}, -100, false],
  ];
  for (const [name, policy, zeroPolicy, fields, verdict, mustDemote] of one)
    it(`1 primary, ${name}`, () =>
      expect(recover1Primary(policy, zeroPolicy, facts(fields))).toEqual({ verdict, mustDemote }));

  const two: [string, number, number, number, boolean][] = [
    ['disconnect', P.Disconnect, P.DiscardLocal, -100, false],
    ['violently', P.Violently, P.DiscardLocal, -1, false],
    ['call-pri-lost: I lose', P.CallPriLost, P.DiscardLocal, -1, true],
    ['call-pri-lost: I win', P.CallPriLost, P.DiscardRemote, 1, false],
    ['consensus is for one', P.Consensus, P.DiscardLocal, -100, false],
    ['discard-secondary is for one', P.DiscardSecondary, P.DiscardLocal, -100, false],
  ];
  for (const [name, policy, zeroPolicy, verdict, mustDemote] of two)
    it(`2 primaries, ${name}`, () =>
      expect(recover2Primaries(policy, zeroPolicy, facts(primary))).toEqual({ verdict, mustDemote }));

  it('both nodes come to opposite verdicts', () => {
    const policies = fc.constantFrom(1, 2, 3, 4, 5, 6);
    const count = fc.nat(2);
    fc.assert(
      fc.property(policies, count, count, fc.boolean(), fc.boolean(), fc.boolean(), (policy, mine, theirs, a, b, c) => {
        const left = facts({
          selfChanges: mine,
          peerChanges: theirs,
          selfBitmap: a ? 1n : 0n,
          peerBitmap: b ? 1n : 0n,
          resolveConflicts: c,
        });
        const right = facts({
          selfChanges: theirs,
          peerChanges: mine,
          selfBitmap: left.peerBitmap,
          peerBitmap: left.selfBitmap,
          resolveConflicts: !c,
        });
        const verdict = recover0Primaries(policy, left);
        expect(recover0Primaries(mirrorPolicy(policy), right)).toBe(verdict === -100 ? -100 : -verdict);
      }),
    );
  });
});

describe('histories', () => {
  /** A node of a naive model: identifiers, and whether it holds writes that the other one lacks. */
  interface Node {
    ids: Generations;
    isAhead: boolean;
    /** A resync towards this node was cut short: it cannot be Primary. */
    isInconsistent: boolean;
    /** A resync from this node was cut short: its bitmap identifier is in use, so lonely writes do not rotate. */
    isUnfinishedSource: boolean;
  }
  let nextId = 0n;
  const fresh = (): bigint => {
    nextId += 0x10n;
    return 0x1234_0000_0000n + nextId;
  };
  /** drbd_uuid_set of the bitmap slot. */
  const setBitmap = (old: Generations, value: bigint): Generations =>
    old.bitmap === 0n
      ? { ...old, bitmap: value }
      : { ...old, bitmap: value, history0: old.bitmap, history1: old.history0 };
  const clearBitmap = (old: Generations): Generations =>
    old.bitmap === 0n ? old : ids(old.current, 0n, old.bitmap, old.history0);

  function writeAlone(node: Node): void {
    if (node.isInconsistent) return;
    if (node.ids.bitmap === 0n) node.ids = { ...node.ids, bitmap: node.ids.current, current: fresh() };
    node.isAhead = true;
  }

  /** How far a resync gets: 0 only the source stored the sync identifier, 1 the target too, 2 target done, 3 both. */
  function resync(source: Node, target: Node, progress: number): void {
    const announced = source.ids;
    const { bitmap } = source.ids;
    const value = bitmap !== 0n && bitmap !== 4n ? BigInt.asUintN(64, bitmap + OFFSET) : fresh();
    source.ids = setBitmap(source.ids, value);
    source.isUnfinishedSource = true;
    if (progress === 0) return;
    target.isInconsistent = true;
    target.ids = { ...target.ids, current: value & ~1n, bitmap: 0n };
    target.isAhead = false;
    if (progress === 1) return;
    const finished = setBitmap({ ...target.ids, ...announced, current: target.ids.current }, target.ids.current);
    target.ids = clearBitmap({ ...finished, current: announced.current & ~1n });
    source.isAhead = false;
    target.isInconsistent = false;
    target.isUnfinishedSource = false;
    if (progress === 2) return;
    source.ids = clearBitmap(source.ids);
    source.isUnfinishedSource = false;
  }

  it('the node that wrote alone is the source, both alone is a split brain, and both nodes see it alike', () => {
    const steps = fc.array(fc.constantFrom('left', 'right', 'meet 0', 'meet 1', 'meet 2', 'meet 3'), { maxLength: 12 });
    fc.assert(
      fc.property(steps, (plan) => {
        const generations = ids(fresh(), 0n, Y, Z);
        const pristine = { ids: generations, isAhead: false, isInconsistent: false, isUnfinishedSource: false };
        const left: Node = { ...pristine };
        const right: Node = { ...pristine };
        for (const step of [...plan, 'meet 3', 'meet 3']) {
          if (step === 'left') writeAlone(left);
          else if (step === 'right') writeAlone(right);
          else {
            const mine = compareGenerations(left.ids, right.ids, QUIET);
            const theirs = compareGenerations(right.ids, left.ids, { ...QUIET, resolveConflicts: true });
            expect(Math.abs(theirs.result)).toBe(Math.abs(mine.result));
            if (Math.abs(mine.result) < 100) expect(theirs.result + mine.result).toBe(0);
            if (left.isAhead && right.isAhead) {
              // DRBD cannot tell when the target finished, the source never heard of it, and then both wrote alone:
              // the source does not rotate its identifiers a second time.
              if (left.isUnfinishedSource || right.isUnfinishedSource) return;
              expect(Math.abs(mine.result)).toBe(100);
              return;
            }
            if (left.isAhead) expect(mine.result).toBeGreaterThan(0);
            if (right.isAhead) expect(mine.result).toBeLessThan(0);
            if (mine.fixSelf !== undefined) left.ids = mine.fixSelf;
            if (theirs.fixSelf !== undefined) right.ids = theirs.fixSelf;
            const progress = Number(step.slice(5));
            if (mine.result > 0) resync(left, right, progress);
            if (mine.result < 0) resync(right, left, progress);
          }
        }
        expect(compareGenerations(left.ids, right.ids, QUIET).result).toBe(0);
      }),
      { numRuns: 2000 },
    );
  });
});

describe('parameters', () => {
  const own: ProtocolParameters = {
    wireProtocol: 3,
    afterSplitBrain0Primaries: P.DiscardLocal,
    afterSplitBrain1Primary: P.Consensus,
    afterSplitBrain2Primaries: P.Disconnect,
    discardMyData: false,
    dryRun: false,
    twoPrimaries: false,
    integrityAlgorithm: 'crc32c',
  };
  const peer = { ...own, afterSplitBrain0Primaries: P.DiscardRemote };
  const cases: [string, Partial<ProtocolParameters>][] = [
    ['protocol', { wireProtocol: 1 }],
    ['after-sb-0pri', { afterSplitBrain0Primaries: P.DiscardLocal }],
    ['after-sb-1pri', { afterSplitBrain1Primary: P.Disconnect }],
    ['after-sb-2pri', { afterSplitBrain2Primaries: P.Violently }],
    ['allow-two-primaries', { twoPrimaries: true }],
    ['data-integrity-alg', { integrityAlgorithm: '' }],
  ];
  it('that mirror each other fit', () => {
    expect(incompatibleProtocol(own, peer)).toBeUndefined();
    expect(incompatibleProtocol({ ...own, dryRun: true, discardMyData: true }, peer)).toBeUndefined();
  });
  for (const [option, fields] of cases)
    it(`with another ${option} do not`, () =>
      expect(incompatibleProtocol(own, { ...peer, ...fields })).toBe(`incompatible ${option} settings`));
  it('discard-my-data on both sides does not fit', () =>
    expect(incompatibleProtocol({ ...own, discardMyData: true }, { ...peer, discardMyData: true })).toBe(
      'incompatible discard-my-data settings',
    ));

  it('the size is the smaller disk, the last agreed, or what there is, and what was configured if it fits', () => {
    const size = (ownMax: number, peerMax: number, lastAgreed: number, user: number) =>
      agreeSize({ ownMax, peerMax, lastAgreed, user });
    expect(size(2000, 1000, 500, 0)).toEqual({ sectors: 1000, userTooLarge: false });
    expect(size(2000, 0, 500, 0)).toEqual({ sectors: 500, userTooLarge: false });
    expect(size(400, 0, 500, 0)).toEqual({ sectors: 400, userTooLarge: false });
    expect(size(0, 300, 500, 0)).toEqual({ sectors: 300, userTooLarge: false });
    expect(size(2000, 0, 0, 0)).toEqual({ sectors: 2000, userTooLarge: false });
    expect(size(0, 1000, 0, 0)).toEqual({ sectors: 1000, userTooLarge: false });
    expect(size(2000, 1000, 0, 800)).toEqual({ sectors: 800, userTooLarge: false });
    expect(size(2000, 1000, 0, 1001)).toEqual({ sectors: 1000, userTooLarge: true });
    expect(agreeUserSize(0, 5)).toBe(5);
    expect(agreeUserSize(7, 5)).toBe(5);
    expect(agreeUserSize(7, 0)).toBe(7);
  });
});
