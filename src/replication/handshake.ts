import { assert } from '../base/assert.js';
import {
  mirrorPolicy,
  type RecoveryVerdict,
  recover0Primaries,
  recover1Primary,
  recover2Primaries,
  type SplitBrainFacts,
  SplitBrainPolicy,
} from './split-brain.js';
import { DiskState, Role } from './state.js';
import type { ProtocolParameters, Sizes } from './wire/codec.js';
import { UUID_FLAG_CRASHED_PRIMARY, UUID_FLAG_DISCARD_MY_DATA, UUID_FLAG_INCONSISTENT } from './wire/packets.js';

/**
 * Decisions two nodes make when they meet, each from what both know, so that both come to mirrored results: are the
 * parameters compatible, how large is the device, who has the newer data, and what is to be copied.
 *
 * @see DRBD 8.4 drbd_receiver.c: drbd_uuid_compare, drbd_sync_handshake, receive_protocol; drbd_main.c
 * drbd_new_dev_size
 */

const D = DiskState;

/** "Created and never used" in the current slot. */
const JUST_CREATED = 4n;
const NEW_BITMAP_OFFSET = 1n << 48n;
const U64 = 0xffff_ffff_ffff_ffffn;

/** Four generation identifiers by value. GenerationIdentifiers of metadata and Uuids of the codec both are one. */
export interface Generations {
  readonly current: bigint;
  readonly bitmap: bigint;
  readonly history0: bigint;
  readonly history1: bigint;
}

/** What decides between equal generations. */
export interface CompareContext {
  /** This node crashed as Primary and has not been whole since. */
  readonly selfCrashed: boolean;
  /** The same of the peer (UUID_FLAG_CRASHED_PRIMARY). */
  readonly peerCrashed: boolean;
  readonly role: Role;
  readonly peerRole: Role;
  /** Feature WSAME is agreed (both know rule 41). */
  readonly hasWriteSame: boolean;
  readonly resolveConflicts: boolean;
}

/** `result` of data that have no common ancestor. */
export const UNRELATED = -1000;
/** `result` when the peer's version of DRBD cannot take the same decision. */
export const INCOMPATIBLE = -0x10000;

/**
 * +2 / +1 this node is the source of a full / bitmap-based resync, 0 no resync, -1 / -2 it is the target,
 * 100 split brain, -100 split brain with ambiguous generations, or one of the two refusals.
 */
export type ComparisonResult = 2 | 1 | 0 | -1 | -2 | 100 | -100 | typeof UNRELATED | typeof INCOMPATIBLE;

/** What `compareGenerations` found. */
export interface Comparison {
  /** Number of the rule, as DRBD logs it: `uuid_compare()=-1 by rule 50`. */
  readonly rule: number;
  readonly result: ComparisonResult;
  /** Corrected identifiers of this node, to be stored. */
  readonly fixSelf?: Generations;
  /** Corrected copy of the peer's identifiers. */
  readonly fixPeer?: Generations;
}

const identity = (uuid: bigint): bigint => uuid & U64 & ~1n;
const same = (a: bigint, b: bigint): boolean => identity(a) === identity(b);
const derived = (uuid: bigint): bigint => (identity(uuid) + NEW_BITMAP_OFFSET) & U64;

interface CompareRow {
  readonly rule: number;
  when(self: Generations, peer: Generations, context: CompareContext): boolean;
  verdict(self: Generations, peer: Generations, context: CompareContext): Omit<Comparison, 'rule'>;
}

const result = (value: ComparisonResult) => () => ({ result: value });
const isFresh = (uuid: bigint): boolean => identity(uuid) === JUST_CREATED;
const isNone = (uuid: bigint): boolean => identity(uuid) === 0n;
const equalCurrent = (self: Generations, peer: Generations): boolean => same(self.current, peer.current);
/** We know of a resync that the peer has finished: only our bitmap slot is still in use. */
const onlySelfHasBitmap = (self: Generations, peer: Generations): boolean =>
  equalCurrent(self, peer) && peer.bitmap === 0n && self.bitmap !== 0n;
const onlyPeerHasBitmap = (self: Generations, peer: Generations): boolean =>
  equalCurrent(self, peer) && self.bitmap === 0n && peer.bitmap !== 0n;
const crashed = (context: CompareContext): boolean => context.selfCrashed || context.peerCrashed;
const somePrimary = (context: CompareContext): boolean =>
  context.role === Role.Primary || context.peerRole === Role.Primary;

/** The rules in order of precedence; the first that applies decides. The bare bitmap slots are compared with bit 0. */
const COMPARE_ROWS: readonly CompareRow[] = [
  { rule: 10, when: (s, p) => isFresh(s.current) && isFresh(p.current), verdict: result(0) },
  {
    rule: 20,
    when: (s, p) => (isFresh(s.current) || isNone(s.current)) && !isFresh(p.current),
    verdict: result(-2),
  },
  {
    rule: 30,
    when: (s, p) => !isFresh(s.current) && (isFresh(p.current) || isNone(p.current)),
    verdict: result(2),
  },
  {
    // I was the source and missed that the resync finished.
    rule: 34,
    when: (s, p) => onlySelfHasBitmap(s, p) && same(s.bitmap, p.history0) && same(s.history0, p.history1),
    verdict: (s) => ({
      result: 1,
      fixSelf: { current: s.current, bitmap: 0n, history0: s.bitmap, history1: s.history0 },
    }),
  },
  // The peer never stored the sync UUID.
  { rule: 36, when: onlySelfHasBitmap, verdict: result(1) },
  {
    // I was the target, and the peer missed that the resync finished.
    rule: 35,
    when: (s, p) => onlyPeerHasBitmap(s, p) && same(s.history0, p.bitmap) && same(s.history1, p.history0),
    verdict: (_, p) => ({
      result: -1,
      fixPeer: { current: p.current, bitmap: 0n, history0: p.bitmap, history1: p.history0 },
    }),
  },
  { rule: 37, when: onlyPeerHasBitmap, verdict: result(-1) },
  // The link failed; nobody crashed.
  { rule: 40, when: (s, p, c) => equalCurrent(s, p) && !crashed(c), verdict: result(0) },
  {
    rule: 41,
    when: (s, p, c) => equalCurrent(s, p) && somePrimary(c),
    verdict: (_, __, c) => ({
      result: !c.hasWriteSame
        ? INCOMPATIBLE
        : c.role === Role.Primary && c.peerRole === Role.Primary
          ? -100
          : c.role === Role.Primary
            ? 1
            : -1,
    }),
  },
  {
    rule: 40,
    when: equalCurrent,
    verdict: (_, __, c) => ({
      result: !c.peerCrashed ? 1 : !c.selfCrashed ? -1 : c.resolveConflicts ? -1 : 1,
    }),
  },
  { rule: 50, when: (s, p) => same(s.current, p.bitmap), verdict: result(-1) },
  {
    // The peer stored a sync UUID, but its P_SYNC_UUID never arrived here.
    rule: 51,
    when: (s, p) => same(s.current, p.history0) && derived(p.history0) === identity(p.bitmap),
    verdict: (_, p) => ({
      result: -1,
      fixPeer: { current: p.current, bitmap: p.history0, history0: p.history1, history1: p.history1 },
    }),
  },
  { rule: 60, when: (s, p) => same(s.current, p.history0) || same(s.current, p.history1), verdict: result(-2) },
  { rule: 70, when: (s, p) => same(s.bitmap, p.current), verdict: result(1) },
  {
    // My P_SYNC_UUID never arrived at the peer.
    rule: 71,
    when: (s, p) => same(s.history0, p.current) && derived(s.history0) === identity(s.bitmap),
    verdict: (s) => ({
      result: 1,
      fixSelf: { current: s.current, bitmap: s.history0, history0: s.history1, history1: s.history1 },
    }),
  },
  { rule: 80, when: (s, p) => same(s.history0, p.current) || same(s.history1, p.current), verdict: result(2) },
  { rule: 90, when: (s, p) => same(s.bitmap, p.bitmap) && !isNone(s.bitmap), verdict: result(100) },
  {
    // Unused slots are 0 and equal each other, as in DRBD: data without history count as ambiguous, not as unrelated.
    rule: 100,
    when: (s, p) =>
      same(s.history0, p.history0) ||
      same(s.history0, p.history1) ||
      same(s.history1, p.history0) ||
      same(s.history1, p.history1),
    verdict: result(-100),
  },
  { rule: 100, when: () => true, verdict: result(UNRELATED) },
];

/**
 * Compares the generation identifiers of two nodes. Pure; the fixes it returns are the caller's to store.
 * @see DRBD 8.4 drbd_receiver.c drbd_uuid_compare
 */
export function compareGenerations(self: Generations, peer: Generations, context: CompareContext): Comparison {
  for (const row of COMPARE_ROWS)
    if (row.when(self, peer, context)) return { rule: row.rule, ...row.verdict(self, peer, context) };
  assert(false, 'the last row always applies');
}

/** Handlers of the configuration that a handshake may call, in the order they are to be called. */
export type HandshakeHelper = 'initial-split-brain' | 'split-brain' | 'pri-lost' | 'pri-lost-after-sb';

/** What `decideSync` needs to know of both nodes. */
export interface SyncFacts {
  readonly self: Generations;
  readonly peer: Generations;
  readonly role: Role;
  readonly peerRole: Role;
  /** Own disk; while Negotiating, the state remembered at attach. */
  readonly disk: DiskState;
  /** Own disk as it is in the device's state (may be Negotiating). */
  readonly currentDisk: DiskState;
  /** The peer's disk from its P_STATE. */
  readonly peerDisk: DiskState;
  /** UUID_FLAG_* of the peer's P_UUIDS. */
  readonly peerFlags: number;
  readonly selfCrashed: boolean;
  /** Bits in the bitmap: as last sent to the peer in P_UUIDS, and as the peer sent it. */
  readonly selfChanges: number;
  readonly peerChanges: number;
  /** This connection attempt was made with discard-my-data. */
  readonly discardMyData: boolean;
  /** Own or the peer's P_PROTOCOL asked for a dry run. */
  readonly dryRun: boolean;
  readonly resolveConflicts: boolean;
  readonly hasWriteSame: boolean;
  readonly afterSplitBrain0Primaries: number;
  readonly afterSplitBrain1Primary: number;
  readonly afterSplitBrain2Primaries: number;
  readonly alwaysAfterSplitBrain: boolean;
  /** rr-conflict: Disconnect, CallPriLost or Violently. */
  readonly resyncRoleConflict: number;
  /** Set when a decision with `mustDemote` could not be carried out and is asked for again. */
  readonly demotionFailed?: boolean;
}

/** What the nodes shall do. */
export interface SyncDecision {
  /**
   * `none`, `source`, `target`: stay connected (Connected, WFBitMapS, WFBitMapT). The others end the connection for
   * good, or, where a disk was Negotiating, only refuse that disk.
   */
  readonly kind: 'none' | 'source' | 'target' | 'splitBrain' | 'unrelated' | 'refused';
  /** Set all bits first. */
  readonly full: boolean;
  readonly comparison: Comparison;
  /** A sentence for the log. */
  readonly reason: string;
  /** Handlers to call, in this order, before acting on the decision. */
  readonly helpers: readonly HandshakeHelper[];
  /**
   * This node is the victim of a split brain while Primary: it must become Secondary before it may be the target. If
   * that fails, ask again with `demotionFailed`.
   */
  readonly mustDemote: boolean;
  /** Only a dry run: retry is pointless but nothing is wrong. */
  readonly dryRun: boolean;
}

/** The peer's disk as it counts in decisions: one that is Negotiating is Inconsistent or Consistent by a flag. */
export function realPeerDisk(peerDisk: DiskState, peerFlags: number): DiskState {
  if (peerDisk !== D.Negotiating) return peerDisk;
  return (peerFlags & UUID_FLAG_INCONSISTENT) !== 0 ? D.Inconsistent : D.Consistent;
}

function recover(facts: SyncFacts): RecoveryVerdict {
  const asked: SplitBrainFacts = {
    selfBitmap: facts.self.bitmap,
    peerBitmap: facts.peer.bitmap,
    selfChanges: facts.selfChanges,
    peerChanges: facts.peerChanges,
    resolveConflicts: facts.resolveConflicts,
    role: facts.role,
  };
  const zero = facts.afterSplitBrain0Primaries;
  const primaries = Number(facts.role === Role.Primary) + Number(facts.peerRole === Role.Primary);
  if (primaries === 0) return { verdict: recover0Primaries(zero, asked), mustDemote: false };
  if (primaries === 1) return recover1Primary(facts.afterSplitBrain1Primary, zero, asked);
  return recover2Primaries(facts.afterSplitBrain2Primaries, zero, asked);
}

/**
 * Decides who copies what to whom when two nodes with disks meet, in DRBD's order of steps.
 * @see DRBD 8.4 drbd_receiver.c drbd_sync_handshake
 */
export function decideSync(facts: SyncFacts): SyncDecision {
  const comparison = compareGenerations(facts.self, facts.peer, {
    selfCrashed: facts.selfCrashed,
    peerCrashed: (facts.peerFlags & UUID_FLAG_CRASHED_PRIMARY) !== 0,
    role: facts.role,
    peerRole: facts.peerRole,
    hasWriteSame: facts.hasWriteSame,
    resolveConflicts: facts.resolveConflicts,
  });
  const helpers: HandshakeHelper[] = [];
  let mustDemote = false;
  const decide = (kind: SyncDecision['kind'], reason: string, full = false, dryRun = false): SyncDecision => ({
    kind,
    full,
    comparison,
    reason,
    helpers,
    mustDemote,
    dryRun,
  });

  // 1. No common ancestor, or a peer that cannot decide alike.
  if (comparison.result === UNRELATED) return decide('unrelated', 'Unrelated data, aborting!');
  if (comparison.result === INCOMPATIBLE)
    return decide('refused', 'To resolve this both sides have to support feature WRITE_SAME');
  let direction: number = comparison.result;
  let how = `uuid_compare()=${comparison.result} by rule ${comparison.rule}`;

  // 2. An inconsistent disk is never better than a consistent one.
  const peerDisk = realPeerDisk(facts.peerDisk, facts.peerFlags);
  if (
    (facts.disk === D.Inconsistent && peerDisk > D.Inconsistent) ||
    (peerDisk === D.Inconsistent && facts.disk > D.Inconsistent)
  ) {
    const full = direction === -100 || Math.abs(direction) === 2;
    direction = (facts.disk > D.Inconsistent ? 1 : -1) * (full ? 2 : 1);
    how = `Becoming sync ${direction > 0 ? 'source' : 'target'} due to disk states.`;
  }

  // 3. to 6. Split brain.
  if (Math.abs(direction) === 100) helpers.push('initial-split-brain');
  if (direction === 100 || (direction === -100 && facts.alwaysAfterSplitBrain)) {
    const recovery = recover(facts);
    const ambiguous = direction === -100;
    direction = recovery.verdict;
    if (recovery.mustDemote && facts.demotionFailed) {
      helpers.push('pri-lost-after-sb');
      direction = -100;
    } else if (Math.abs(direction) < 100) {
      mustDemote = recovery.mustDemote;
      if (ambiguous) direction *= 2;
      how = `Split-Brain detected, automatically solved. Sync from ${direction < 0 ? 'peer' : 'this'} node`;
    }
  }
  if (direction === -100) {
    const peerDiscards = (facts.peerFlags & UUID_FLAG_DISCARD_MY_DATA) !== 0;
    if (facts.discardMyData && !peerDiscards) direction = -1;
    if (!facts.discardMyData && peerDiscards) direction = 1;
    if (direction !== -100)
      how = `Split-Brain detected, manually solved. Sync from ${direction < 0 ? 'peer' : 'this'} node`;
  }
  if (direction === -100) {
    helpers.push('split-brain');
    return decide('splitBrain', 'Split-Brain detected but unresolved, dropping connection!');
  }

  // 7. and 8. Neither give away bad data nor take data away under a Primary.
  if (direction > 0 && facts.disk <= D.Inconsistent)
    return decide('refused', 'I shall become SyncSource, but I am inconsistent!');
  if (direction < 0 && facts.role === Role.Primary && !mustDemote && facts.currentDisk >= D.Consistent) {
    if (facts.resyncRoleConflict === SplitBrainPolicy.CallPriLost) helpers.push('pri-lost');
    if (facts.resyncRoleConflict !== SplitBrainPolicy.Violently)
      return decide('refused', 'I shall become SyncTarget, but I am primary!');
    how += '; becoming SyncTarget, violating the stable-data assumption';
  }

  // 9. to 11.
  const full = Math.abs(direction) === 2;
  if (facts.dryRun) {
    const side = direction > 0 ? 'SyncSource' : 'SyncTarget';
    const verdict =
      direction === 0
        ? 'No resync, would become Connected immediately.'
        : `Would become ${side}, doing a ${full ? 'full' : 'bit-map based'} resync.`;
    return decide('refused', `dry-run connect: ${verdict}`, full, true);
  }
  return decide(direction > 0 ? 'source' : direction < 0 ? 'target' : 'none', how, full);
}

/** Which parameter of P_PROTOCOL does not fit, as DRBD logs it; undefined when the two nodes are compatible. */
export function incompatibleProtocol(own: ProtocolParameters, peer: ProtocolParameters): string | undefined {
  const incompatible = (option: string): string => `incompatible ${option} settings`;
  if (own.wireProtocol !== peer.wireProtocol) return incompatible('protocol');
  if (own.afterSplitBrain0Primaries !== mirrorPolicy(peer.afterSplitBrain0Primaries))
    return incompatible('after-sb-0pri');
  if (own.afterSplitBrain1Primary !== mirrorPolicy(peer.afterSplitBrain1Primary)) return incompatible('after-sb-1pri');
  if (own.afterSplitBrain2Primaries !== mirrorPolicy(peer.afterSplitBrain2Primaries))
    return incompatible('after-sb-2pri');
  if (own.discardMyData && peer.discardMyData) return incompatible('discard-my-data');
  if (own.twoPrimaries !== peer.twoPrimaries) return incompatible('allow-two-primaries');
  if (own.integrityAlgorithm !== peer.integrityAlgorithm) return incompatible('data-integrity-alg');
  return undefined;
}

/** What bounds the size of a device; sectors, 0 for unknown or none. */
export interface SizeFacts {
  /** Usable sectors of the own backing device, 0 if diskless. */
  readonly ownMax: number;
  /** d_size of the peer's P_SIZES. */
  readonly peerMax: number;
  /** Last agreed size in the metadata. */
  readonly lastAgreed: number;
  /** Configured size. */
  readonly user: number;
}

/**
 * The size two nodes agree on.
 * @returns sectors, and whether the configured size could not be honoured because it is larger than what exists
 * @see DRBD 8.4 drbd_receiver.c drbd_new_dev_size
 */
export function agreeSize(facts: SizeFacts): { readonly sectors: number; readonly userTooLarge: boolean } {
  const { ownMax, peerMax, lastAgreed, user } = facts;
  let sectors: number;
  if (peerMax > 0 && ownMax > 0) sectors = Math.min(peerMax, ownMax);
  else if (lastAgreed > 0) {
    sectors = lastAgreed;
    if (ownMax > 0) sectors = Math.min(sectors, ownMax);
    if (peerMax > 0) sectors = Math.min(sectors, peerMax);
  } else sectors = ownMax || peerMax;
  if (user > sectors) return { sectors, userTooLarge: true };
  return { sectors: user > 0 ? user : sectors, userTooLarge: false };
}

/** User size in force while two nodes meet: the smaller of both, ignoring 0. */
export function agreeUserSize(own: number, peer: number): number {
  return own > 0 && peer > 0 ? Math.min(own, peer) : own || peer;
}

/** The size a diskless node takes from its peer: current, configured or disk size, the first that is not 0. */
export function peerExportedSize(sizes: Sizes): number {
  return sizes.currentSectors || sizes.userSectors || sizes.diskSectors;
}
