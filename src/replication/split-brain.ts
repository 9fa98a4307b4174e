import { Role } from './state.js';

/**
 * Automatic recovery from a split brain: whose changes are thrown away, by policy and by how many nodes are Primary.
 *
 * @see DRBD 8.4 drbd_receiver.c drbd_asb_recover_0p, drbd_asb_recover_1p, drbd_asb_recover_2p
 */

/** after-sb-0pri, after-sb-1pri, after-sb-2pri and rr-conflict, as numbered in P_PROTOCOL. */
export const SplitBrainPolicy = {
  Disconnect: 0,
  DiscardYoungerPrimary: 1,
  DiscardOlderPrimary: 2,
  DiscardZeroChanges: 3,
  DiscardLeastChanges: 4,
  DiscardLocal: 5,
  DiscardRemote: 6,
  Consensus: 7,
  DiscardSecondary: 8,
  CallPriLost: 9,
  Violently: 10,
} as const;
export type SplitBrainPolicy = (typeof SplitBrainPolicy)[keyof typeof SplitBrainPolicy];

const P = SplitBrainPolicy;

/** The word of the configuration for each policy, by option. */
export const SPLIT_BRAIN_POLICY_BY_NAME: Readonly<
  Record<
    'after-sb-0pri' | 'after-sb-1pri' | 'after-sb-2pri' | 'rr-conflict',
    Readonly<Record<string, SplitBrainPolicy>>
  >
> = {
  'after-sb-0pri': {
    disconnect: P.Disconnect,
    'discard-younger-primary': P.DiscardYoungerPrimary,
    'discard-older-primary': P.DiscardOlderPrimary,
    'discard-zero-changes': P.DiscardZeroChanges,
    'discard-least-changes': P.DiscardLeastChanges,
    'discard-local': P.DiscardLocal,
    'discard-remote': P.DiscardRemote,
  },
  'after-sb-1pri': {
    disconnect: P.Disconnect,
    consensus: P.Consensus,
    'discard-secondary': P.DiscardSecondary,
    'call-pri-lost-after-sb': P.CallPriLost,
    'violently-as0p': P.Violently,
  },
  'after-sb-2pri': {
    disconnect: P.Disconnect,
    'call-pri-lost-after-sb': P.CallPriLost,
    'violently-as0p': P.Violently,
  },
  'rr-conflict': {
    disconnect: P.Disconnect,
    'call-pri-lost': P.CallPriLost,
    violently: P.Violently,
  },
};

/** What the peer's policy is called on our side: discard-local and discard-remote swap. */
export function mirrorPolicy(policy: number): number {
  return policy === P.DiscardLocal ? P.DiscardRemote : policy === P.DiscardRemote ? P.DiscardLocal : policy;
}

/** +1: this node is the source; -1: it is the target; -100: no decision. */
export type Verdict = 1 | -1 | -100;

/** What the policies look at. */
export interface SplitBrainFacts {
  /** Bitmap generation identifiers; bit 0 says that the node was Primary when the generations split. */
  readonly selfBitmap: bigint;
  readonly peerBitmap: bigint;
  /** Bits set, as last sent to and received from the peer in P_UUIDS. */
  readonly selfChanges: number;
  readonly peerChanges: number;
  /** This node accepted the meta socket; the tie-breaker. */
  readonly resolveConflicts: boolean;
  readonly role: Role;
}

const OPPOSITE: Readonly<Record<1 | -1, Verdict>> = { 1: -1, [-1]: 1 };

function byChanges(facts: SplitBrainFacts, leastChanges: boolean): Verdict {
  const { selfChanges, peerChanges } = facts;
  const tie: Verdict = facts.resolveConflicts ? -1 : 1;
  if (selfChanges === 0 && peerChanges === 0) return tie;
  if (peerChanges === 0) return 1;
  if (selfChanges === 0) return -1;
  if (!leastChanges) return -100;
  return selfChanges < peerChanges ? -1 : selfChanges > peerChanges ? 1 : tie;
}

/** after-sb-0pri: no node is Primary now. */
export function recover0Primaries(policy: number, facts: SplitBrainFacts): Verdict {
  switch (policy) {
    case P.DiscardYoungerPrimary:
    case P.DiscardOlderPrimary: {
      const self = facts.selfBitmap & 1n;
      const peer = facts.peerBitmap & 1n;
      if (self === peer) return byChanges(facts, true);
      // The node whose bitmap identifier has the bit was Primary first; the other became Primary after the split.
      const younger: 1 | -1 = self === 0n ? -1 : 1;
      return policy === P.DiscardYoungerPrimary ? younger : OPPOSITE[younger];
    }
    case P.DiscardZeroChanges:
      return byChanges(facts, false);
    case P.DiscardLeastChanges: {
      const { selfChanges, peerChanges } = facts;
      if (selfChanges === peerChanges) return facts.resolveConflicts ? -1 : 1;
      return selfChanges < peerChanges ? -1 : 1;
    }
    case P.DiscardLocal:
      return -1;
    case P.DiscardRemote:
      return 1;
    default:
      // disconnect, and the policies that only make sense with a Primary
      return -100;
  }
}

/** A verdict, and whether it stands only if this node can give up being Primary first (call-pri-lost-after-sb). */
export interface RecoveryVerdict {
  readonly verdict: Verdict;
  readonly mustDemote: boolean;
}

const plain = (verdict: Verdict): RecoveryVerdict => ({ verdict, mustDemote: false });

/** after-sb-1pri: exactly one node is Primary now. @param zeroPolicy after-sb-0pri */
export function recover1Primary(policy: number, zeroPolicy: number, facts: SplitBrainFacts): RecoveryVerdict {
  const isPrimary = facts.role === Role.Primary;
  switch (policy) {
    case P.Consensus: {
      const verdict = recover0Primaries(zeroPolicy, facts);
      const victimIsSecondary = (verdict === -1 && !isPrimary) || (verdict === 1 && isPrimary);
      return plain(victimIsSecondary ? verdict : -100);
    }
    case P.Violently:
      return plain(recover0Primaries(zeroPolicy, facts));
    case P.DiscardSecondary:
      return plain(isPrimary ? 1 : -1);
    case P.CallPriLost: {
      const verdict = recover0Primaries(zeroPolicy, facts);
      return { verdict, mustDemote: verdict === -1 && isPrimary };
    }
    default:
      return plain(-100);
  }
}

/** after-sb-2pri: both nodes are Primary now. @param zeroPolicy after-sb-0pri */
export function recover2Primaries(policy: number, zeroPolicy: number, facts: SplitBrainFacts): RecoveryVerdict {
  switch (policy) {
    case P.Violently:
      return plain(recover0Primaries(zeroPolicy, facts));
    case P.CallPriLost: {
      const verdict = recover0Primaries(zeroPolicy, facts);
      return { verdict, mustDemote: verdict === -1 };
    }
    default:
      return plain(-100);
  }
}
