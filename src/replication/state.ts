import { assert } from '../base/assert.js';
import { ProtocolError } from '../base/errors.js';

/**
 * The state of one replicated device, and every rule about it: what a state implies (`sanitize`), which states are
 * forbidden (`forbidden`), which moves are refused (`refusedTransition`). All rules are rows of tables in DRBD's order;
 * nothing else in drbdts decides what state may follow which.
 *
 * @see DRBD 8.4 drbd_state.c: sanitize_state, is_valid_state, is_valid_conn_transition, is_valid_transition,
 *      is_valid_soft_transition; drbd.h for the numbers
 */

export const Role = { Unknown: 0, Primary: 1, Secondary: 2 } as const;
export type Role = (typeof Role)[keyof typeof Role];

export const ConnectionState = {
  StandAlone: 0,
  Disconnecting: 1,
  Unconnected: 2,
  Timeout: 3,
  BrokenPipe: 4,
  NetworkFailure: 5,
  ProtocolError: 6,
  TearDown: 7,
  WFConnection: 8,
  WFReportParams: 9,
  Connected: 10,
  StartingSyncS: 11,
  StartingSyncT: 12,
  WFBitMapS: 13,
  WFBitMapT: 14,
  WFSyncUUID: 15,
  SyncSource: 16,
  SyncTarget: 17,
  VerifyS: 18,
  VerifyT: 19,
  PausedSyncS: 20,
  PausedSyncT: 21,
  Ahead: 22,
  Behind: 23,
} as const;
export type ConnectionState = (typeof ConnectionState)[keyof typeof ConnectionState];

export const DiskState = {
  Diskless: 0,
  Attaching: 1,
  Failed: 2,
  Negotiating: 3,
  Inconsistent: 4,
  Outdated: 5,
  DUnknown: 6,
  Consistent: 7,
  UpToDate: 8,
} as const;
export type DiskState = (typeof DiskState)[keyof typeof DiskState];

/** Names as DRBD prints them, by number. */
export const ROLE_NAMES: readonly string[] = Object.keys(Role);
export const CONNECTION_STATE_NAMES: readonly string[] = Object.keys(ConnectionState);
export const DISK_STATE_NAMES: readonly string[] = Object.keys(DiskState);

/** Result of a state change (retcode on the wire): positive is success. Names are DRBD's without SS_. */
export const StateResult = {
  CwNoNeed: 4,
  CwSuccess: 3,
  NothingToDo: 2,
  Success: 1,
  UnknownError: 0,
  TwoPrimaries: -1,
  NoUpToDateDisk: -2,
  NoLocalDisk: -4,
  NoRemoteDisk: -5,
  ConnectedOutdates: -6,
  PrimaryNop: -7,
  ResyncRunning: -8,
  AlreadyStandalone: -9,
  CwFailedByPeer: -10,
  IsDiskless: -11,
  DeviceInUse: -12,
  NoNetConfig: -13,
  NoVerifyAlg: -14,
  NeedConnection: -15,
  LowerThanOutdated: -16,
  NotSupported: -17,
  InTransientState: -18,
  ConcurrentStateChange: -19,
  OtherVolumePeerPrimary: -20,
  OutdateWithoutConnection: -21,
} as const;
export type StateResult = (typeof StateResult)[keyof typeof StateResult];

/** What drbdadm prints for a refused change, by StateResult. @see DRBD 8.4 drbd_strings.c drbd_state_sw_err_names */
export const STATE_RESULT_TEXT: Readonly<Record<StateResult, string>> = {
  [StateResult.CwNoNeed]: 'Cluster wide state change: nothing to do',
  [StateResult.CwSuccess]: 'Cluster wide state change: success',
  [StateResult.NothingToDo]: 'State change: nothing to do',
  [StateResult.Success]: 'State change: success',
  [StateResult.UnknownError]: 'State change failed',
  [StateResult.TwoPrimaries]: 'Multiple primaries not allowed by config',
  [StateResult.NoUpToDateDisk]: 'Need access to UpToDate data',
  [StateResult.NoLocalDisk]: 'Can not resync without local disk',
  [StateResult.NoRemoteDisk]: 'Can not resync without remote disk',
  [StateResult.ConnectedOutdates]: 'Refusing to be Outdated while Connected',
  [StateResult.PrimaryNop]: 'Refusing to be Primary while peer is not outdated',
  [StateResult.ResyncRunning]: 'Can not start OV/resync since it is already active',
  [StateResult.AlreadyStandalone]: 'Can not disconnect a StandAlone device',
  [StateResult.CwFailedByPeer]: 'State change was refused by peer node',
  [StateResult.IsDiskless]: 'Device is diskless, the requested operation requires a disk',
  [StateResult.DeviceInUse]: 'Device is held open by someone',
  [StateResult.NoNetConfig]: 'Have no net/connection configuration',
  [StateResult.NoVerifyAlg]: 'Need a verify algorithm to start online verify',
  [StateResult.NeedConnection]: 'Need a connection to start verify or resync',
  [StateResult.LowerThanOutdated]: 'Disk state is lower than outdated',
  [StateResult.NotSupported]: 'Peer does not support protocol',
  [StateResult.InTransientState]: 'In transient state, retry after next state change',
  [StateResult.ConcurrentStateChange]: 'Concurrent state changes detected and aborted',
  [StateResult.OtherVolumePeerPrimary]: 'Other vol primary on peer not allowed by config',
  [StateResult.OutdateWithoutConnection]: 'Need a connection for a graceful disconnect/outdate peer',
};

/** The joint state of a device. A value: never changed in place. */
export interface DeviceState {
  /** Never Unknown. */
  readonly role: Role;
  readonly peerRole: Role;
  readonly connection: ConnectionState;
  readonly disk: DiskState;
  readonly peerDisk: DiskState;
  /** susp: by the administrator. */
  readonly suspended: boolean;
  /** aftr_isp: resync paused because a device named by resync-after is busy. */
  readonly pausedByDependency: boolean;
  /** peer_isp: resync paused by the peer. */
  readonly pausedByPeer: boolean;
  /** user_isp: resync paused by the administrator. */
  readonly pausedByUser: boolean;
  /** susp_nod: no UpToDate data anywhere. */
  readonly suspendedNoData: boolean;
  /** susp_fen: waiting for fencing. */
  readonly suspendedFencing: boolean;
}

/** Of a device that has nothing configured yet. */
export const INITIAL_STATE: DeviceState = Object.freeze({
  role: Role.Secondary,
  peerRole: Role.Unknown,
  connection: ConnectionState.StandAlone,
  disk: DiskState.Diskless,
  peerDisk: DiskState.DUnknown,
  suspended: false,
  pausedByDependency: false,
  pausedByPeer: false,
  pausedByUser: false,
  suspendedNoData: false,
  suspendedFencing: false,
});

/** `fencing` of the configuration. */
export type FencingPolicy = 'dont-care' | 'resource-only' | 'resource-and-stonith';

/** What the rules need to know besides the two states. */
export interface StateContext {
  /** Network configuration present (the device has, or had, a peer to talk to). */
  readonly hasNetConfig: boolean;
  readonly twoPrimaries: boolean;
  /** Of the attached disk; `dont-care` without one. */
  readonly fencing: FencingPolicy;
  /** on-no-data-accessible suspend-io. */
  readonly suspendOnNoData: boolean;
  /** verify-alg is configured. */
  readonly hasVerifyAlgorithm: boolean;
  /** Someone has the device open. */
  readonly isOpen: boolean;
  /** The peer is Primary on another volume of the connection. */
  readonly otherVolumePeerPrimary: boolean;
  /** STATE_SENT: our parameters are out, the handshake is not decided yet. */
  readonly stateSent: boolean;
  /**
   * What disk and peer disk become when the connection breaks before Negotiating was decided: the states remembered at
   * attach, if the exposed-data UUID equals the disk's current UUID; undefined if it does not.
   */
  readonly remembered: { readonly disk: DiskState; readonly peerDisk: DiskState } | undefined;
}

export const DEFAULT_CONTEXT: StateContext = Object.freeze({
  hasNetConfig: true,
  twoPrimaries: false,
  fencing: 'dont-care',
  suspendOnNoData: false,
  hasVerifyAlgorithm: false,
  isOpen: false,
  otherVolumePeerPrimary: false,
  stateSent: false,
  remembered: undefined,
});

// ---------------------------------------------------------------------------------------------------------------------
// Questions, so that nobody compares numbers

const C = ConnectionState;
const D = DiskState;

/** Connected or more: both sides know each other's state. */
export function isConnected(connection: ConnectionState): boolean {
  return connection >= C.Connected;
}

/** I/O is suspended for any reason. */
export function isSuspended(state: DeviceState): boolean {
  return state.suspended || state.suspendedNoData || state.suspendedFencing;
}

/** Some pause bit is set. */
export function isResyncPaused(state: DeviceState): boolean {
  return state.pausedByDependency || state.pausedByPeer || state.pausedByUser;
}

/** SyncSource .. PausedSyncT: resync or verify is under way (`dp_flags` MAY_SET_IN_SYNC, P_RS_WRITE_ACK). */
export function isSyncOrVerify(connection: ConnectionState): boolean {
  return connection >= C.SyncSource && connection <= C.PausedSyncT;
}

/** VerifyS or VerifyT. */
export function isVerifying(connection: ConnectionState): boolean {
  return connection === C.VerifyS || connection === C.VerifyT;
}

/** A write travels to the peer as data. @see DRBD 8.4 drbd_req.c drbd_should_do_remote */
export function shouldReplicate(state: DeviceState): boolean {
  return (
    state.peerDisk === D.UpToDate ||
    (state.peerDisk >= D.Inconsistent && state.connection >= C.WFBitMapT && state.connection < C.Ahead)
  );
}

/** A write is announced by P_OUT_OF_SYNC only. @see DRBD 8.4 drbd_req.c drbd_should_send_out_of_sync */
export function shouldSendOutOfSync(state: DeviceState): boolean {
  return state.connection === C.Ahead || state.connection === C.WFBitMapS;
}

/** There is UpToDate data to read from and to write to. */
export function hasUpToDateData(state: DeviceState): boolean {
  return state.disk === D.UpToDate || state.peerDisk === D.UpToDate;
}

/** `cs:Connected ro:Primary/Secondary ds:UpToDate/UpToDate`, for logs and asserts. */
export function describeState(state: DeviceState): string {
  return (
    `cs:${CONNECTION_STATE_NAMES[state.connection]} ` +
    `ro:${ROLE_NAMES[state.role]}/${ROLE_NAMES[state.peerRole]} ` +
    `ds:${DISK_STATE_NAMES[state.disk]}/${DISK_STATE_NAMES[state.peerDisk]}`
  );
}

/**
 * What changed, as DRBD logs it: `role( Secondary -> Primary ) disk( Inconsistent -> UpToDate )`; '' for no change.
 * @see DRBD 8.4 drbd_state.c print_state_change
 */
export function describeChange(old: DeviceState, next: DeviceState): string {
  const parts: string[] = [];
  const note = (label: string, names: readonly string[], from: number, to: number): void => {
    if (from !== to) parts.push(`${label}( ${names[from]} -> ${names[to]} )`);
  };
  const bits = ['0', '1'];
  note('peer', ROLE_NAMES, old.peerRole, next.peerRole);
  note('role', ROLE_NAMES, old.role, next.role);
  note('conn', CONNECTION_STATE_NAMES, old.connection, next.connection);
  note('disk', DISK_STATE_NAMES, old.disk, next.disk);
  note('pdsk', DISK_STATE_NAMES, old.peerDisk, next.peerDisk);
  note('susp', bits, Number(isSuspended(old)), Number(isSuspended(next)));
  note('aftr_isp', bits, Number(old.pausedByDependency), Number(next.pausedByDependency));
  note('peer_isp', bits, Number(old.pausedByPeer), Number(next.pausedByPeer));
  note('user_isp', bits, Number(old.pausedByUser), Number(next.pausedByUser));
  return parts.join(' ');
}

// ---------------------------------------------------------------------------------------------------------------------
// The packed word of P_STATE and P_STATE_CHG_REQ

export const MASK_ROLE = 0x3;
export const MASK_PEER_ROLE = 0x3 << 2;
export const MASK_CONNECTION = 0x1f << 4;
export const MASK_DISK = 0xf << 9;
export const MASK_PEER_DISK = 0xf << 13;
const BIT_SUSPENDED = 1 << 17;
export const BIT_PAUSED_BY_DEPENDENCY = 1 << 18;
export const BIT_PAUSED_BY_PEER = 1 << 19;
export const BIT_PAUSED_BY_USER = 1 << 20;
const BIT_SUSPENDED_NO_DATA = 1 << 21;
const BIT_SUSPENDED_FENCING = 1 << 22;
const STATE_BITS = (1 << 23) - 1;

/** Packs a state as P_STATE carries it (from the owner's perspective). */
export function packState(state: DeviceState): number {
  return (
    state.role |
    (state.peerRole << 2) |
    (state.connection << 4) |
    (state.disk << 9) |
    (state.peerDisk << 13) |
    (state.suspended ? BIT_SUSPENDED : 0) |
    (state.pausedByDependency ? BIT_PAUSED_BY_DEPENDENCY : 0) |
    (state.pausedByPeer ? BIT_PAUSED_BY_PEER : 0) |
    (state.pausedByUser ? BIT_PAUSED_BY_USER : 0) |
    (state.suspendedNoData ? BIT_SUSPENDED_NO_DATA : 0) |
    (state.suspendedFencing ? BIT_SUSPENDED_FENCING : 0)
  );
}

const STATE_SECTION = 'DRBD 8.4 drbd.h union drbd_state';

function checkFields(word: number): void {
  const problem =
    (word & ~STATE_BITS) !== 0
      ? 'reserved bits'
      : (word & MASK_ROLE) === 3 || (word & MASK_PEER_ROLE) === 12
        ? 'role 3'
        : (word & MASK_CONNECTION) >>> 4 > C.Behind
          ? 'connection state beyond Behind'
          : (word & MASK_DISK) >>> 9 > D.UpToDate || (word & MASK_PEER_DISK) >>> 13 > D.UpToDate
            ? 'disk state beyond UpToDate'
            : undefined;
  if (problem !== undefined)
    throw new ProtocolError(
      'DRBDTS_DRBD_BAD_STATE',
      `state 0x${(word >>> 0).toString(16)} has ${problem}`,
      STATE_SECTION,
    );
}

function unpackUnchecked(word: number): DeviceState {
  return {
    role: (word & MASK_ROLE) as Role,
    peerRole: ((word & MASK_PEER_ROLE) >>> 2) as Role,
    connection: ((word & MASK_CONNECTION) >>> 4) as ConnectionState,
    disk: ((word & MASK_DISK) >>> 9) as DiskState,
    peerDisk: ((word & MASK_PEER_DISK) >>> 13) as DiskState,
    suspended: (word & BIT_SUSPENDED) !== 0,
    pausedByDependency: (word & BIT_PAUSED_BY_DEPENDENCY) !== 0,
    pausedByPeer: (word & BIT_PAUSED_BY_PEER) !== 0,
    pausedByUser: (word & BIT_PAUSED_BY_USER) !== 0,
    suspendedNoData: (word & BIT_SUSPENDED_NO_DATA) !== 0,
    suspendedFencing: (word & BIT_SUSPENDED_FENCING) !== 0,
  };
}

/**
 * Unpacks a received P_STATE; still from the sender's perspective.
 * @throws ProtocolError DRBDTS_DRBD_BAD_STATE for reserved bits, or a role or state that does not exist
 */
export function unpackState(word: number): DeviceState {
  checkFields(word);
  if ((word & MASK_ROLE) === Role.Unknown)
    throw new ProtocolError('DRBDTS_DRBD_BAD_STATE', 'the peer does not know its own role', STATE_SECTION);
  return unpackUnchecked(word);
}

/** A requested change: where `mask` has ones the state takes the bits of `value`. Own perspective. */
export interface StateChange {
  readonly mask: number;
  readonly value: number;
}

/**
 * Applies a change to a state.
 * @param change as made by `change`, or turned and judged by `convertPerspective`
 */
export function applyChange(state: DeviceState, change: StateChange): DeviceState {
  const word = (packState(state) & ~change.mask) | (change.value & change.mask);
  const next = unpackUnchecked(word);
  assert(next.connection <= C.Behind && next.disk <= D.UpToDate && next.peerDisk <= D.UpToDate, 'a state that exists');
  return next;
}

/** Makes a change of the named fields: `change({ role: Role.Primary })` is mask 0x3 value 0x1. */
export function change(fields: Partial<DeviceState>): StateChange {
  const none: DeviceState = {
    ...INITIAL_STATE,
    role: 0,
    peerRole: 0,
    connection: 0,
    disk: 0,
    peerDisk: 0,
  };
  const full = {
    role: MASK_ROLE,
    peerRole: MASK_PEER_ROLE,
    connection: MASK_CONNECTION,
    disk: MASK_DISK,
    peerDisk: MASK_PEER_DISK,
    suspended: BIT_SUSPENDED,
    pausedByDependency: BIT_PAUSED_BY_DEPENDENCY,
    pausedByPeer: BIT_PAUSED_BY_PEER,
    pausedByUser: BIT_PAUSED_BY_USER,
    suspendedNoData: BIT_SUSPENDED_NO_DATA,
    suspendedFencing: BIT_SUSPENDED_FENCING,
  } as const;
  let mask = 0;
  for (const key of Object.keys(fields) as (keyof DeviceState)[]) mask |= full[key];
  return { mask, value: packState({ ...none, ...fields }) };
}

/** Which connection state a change by the peer means here; what is not listed means StandAlone (0). */
const TURNED_CONNECTION: Readonly<Record<number, number>> = {
  [C.WFReportParams]: C.WFReportParams,
  [C.Connected]: C.Connected,
  [C.StartingSyncS]: C.StartingSyncT,
  [C.StartingSyncT]: C.StartingSyncS,
  [C.Disconnecting]: C.TearDown,
  [C.VerifyS]: C.VerifyT,
  31: 31,
};

function turn(word: number): number {
  const paused = (word & (BIT_PAUSED_BY_DEPENDENCY | BIT_PAUSED_BY_USER)) !== 0;
  return (
    ((word & MASK_ROLE) << 2) |
    ((word & MASK_PEER_ROLE) >>> 2) |
    ((TURNED_CONNECTION[(word & MASK_CONNECTION) >>> 4] ?? 0) << 4) |
    ((word & MASK_DISK) << 4) |
    ((word & MASK_PEER_DISK) >>> 4) |
    (paused ? BIT_PAUSED_BY_PEER : 0)
  );
}

/**
 * Turns a change the peer requested (P_STATE_CHG_REQ, P_CONN_ST_CHG_REQ) into our perspective: roles and disks swap,
 * connection states map, the peer's own pause bits become our `pausedByPeer`. Its suspend bits are its own business.
 * @throws ProtocolError DRBDTS_DRBD_BAD_STATE when a mask covers part of a field or the value does not exist
 * @see DRBD 8.4 drbd_receiver.c convert_state
 */
export function convertPerspective(mask: number, value: number): StateChange {
  for (const field of [MASK_ROLE, MASK_PEER_ROLE, MASK_CONNECTION, MASK_DISK, MASK_PEER_DISK])
    if ((mask & field) !== 0 && (mask & field) !== field)
      throw new ProtocolError(
        'DRBDTS_DRBD_BAD_STATE',
        `mask 0x${mask.toString(16)} covers part of a field`,
        'DRBD 8.4 drbd_receiver.c receive_req_state',
      );
  if ((mask & ~STATE_BITS) !== 0) checkFields(mask);
  checkFields(value & mask);
  for (const field of [MASK_ROLE, MASK_PEER_ROLE])
    if ((mask & field) !== 0 && (value & field) === 0)
      throw new ProtocolError('DRBDTS_DRBD_BAD_STATE', 'a role is to become Unknown', STATE_SECTION);
  const turnedMask = turn(mask);
  return { mask: turnedMask, value: turn(value & mask) & turnedMask };
}

// ---------------------------------------------------------------------------------------------------------------------
// Implied changes

/** One implication: when it holds, these fields change. */
export interface Implication {
  readonly name: string;
  /** `old` is the state before the change; some implications arise only from entering a situation. */
  when(state: DeviceState, context: StateContext, old: DeviceState): boolean;
  change(state: DeviceState, context: StateContext): Partial<DeviceState>;
}

interface DiskBounds {
  readonly disk: readonly [DiskState, DiskState];
  readonly peerDisk: readonly [DiskState, DiskState];
}

const UNCONNECTED_BOUNDS: DiskBounds = { disk: [D.Diskless, D.UpToDate], peerDisk: [D.Inconsistent, D.DUnknown] };
const BECOMING_TARGET: DiskBounds = { disk: [D.Inconsistent, D.Outdated], peerDisk: [D.UpToDate, D.UpToDate] };
const BECOMING_SOURCE: DiskBounds = { disk: [D.UpToDate, D.UpToDate], peerDisk: [D.Inconsistent, D.Consistent] };
const BOTH_GOOD: DiskBounds = { disk: [D.UpToDate, D.UpToDate], peerDisk: [D.UpToDate, D.UpToDate] };
const ANY_DISKS: DiskBounds = { disk: [D.Diskless, D.UpToDate], peerDisk: [D.Diskless, D.UpToDate] };

/** What the connection state says about the disks: lowest and highest disk and peer disk. Not listed: not connected. */
export const DISK_BOUNDS: Readonly<Partial<Record<ConnectionState, DiskBounds>>> = {
  [C.Connected]: ANY_DISKS,
  [C.StartingSyncS]: BECOMING_SOURCE,
  [C.StartingSyncT]: BECOMING_TARGET,
  [C.WFBitMapS]: BECOMING_SOURCE,
  [C.WFBitMapT]: BECOMING_TARGET,
  [C.WFSyncUUID]: BECOMING_TARGET,
  [C.SyncSource]: { disk: [D.UpToDate, D.UpToDate], peerDisk: [D.Inconsistent, D.Inconsistent] },
  [C.SyncTarget]: { disk: [D.Inconsistent, D.Inconsistent], peerDisk: [D.UpToDate, D.UpToDate] },
  [C.VerifyS]: BOTH_GOOD,
  [C.VerifyT]: BOTH_GOOD,
  [C.PausedSyncS]: BECOMING_SOURCE,
  [C.PausedSyncT]: BECOMING_TARGET,
  [C.Ahead]: BECOMING_SOURCE,
  [C.Behind]: BECOMING_TARGET,
};

function clamp(value: DiskState, [min, max]: readonly [DiskState, DiskState]): DiskState {
  return value < min ? min : value > max ? max : value;
}

function bounds(state: DeviceState): DiskBounds {
  return DISK_BOUNDS[state.connection] ?? UNCONNECTED_BOUNDS;
}

const needsFence = (state: DeviceState): boolean =>
  state.role === Role.Primary && state.connection < C.Connected && state.peerDisk > D.Outdated;

const lacksData = (state: DeviceState): boolean =>
  state.role === Role.Primary && state.disk < D.UpToDate && state.peerDisk < D.UpToDate;

/** Every implied change of state, applied in this order. */
export const IMPLICATIONS: readonly Implication[] = [
  {
    name: 'without a link the peer has no role and pauses nothing',
    when: (s) => s.connection < C.Connected && (s.pausedByPeer || s.peerRole !== Role.Unknown),
    change: () => ({ pausedByPeer: false, peerRole: Role.Unknown }),
  },
  {
    name: 'without a link only bad news of the peer disk is kept',
    when: (s) => s.connection < C.Connected && (s.peerDisk > D.DUnknown || s.peerDisk < D.Inconsistent),
    change: () => ({ peerDisk: D.DUnknown }),
  },
  {
    name: 'an unconfigured device waits for no other device',
    when: (s) =>
      s.connection === C.StandAlone && s.disk === D.Diskless && s.role === Role.Secondary && s.pausedByDependency,
    change: () => ({ pausedByDependency: false }),
  },
  {
    name: 'resync and verify end when either disk is gone',
    when: (s) => s.connection > C.Connected && (s.disk <= D.Failed || s.peerDisk <= D.Failed),
    change: () => ({ connection: C.Connected }),
  },
  {
    name: 'a link lost while negotiating restores what attach remembered, or gives the disk up',
    when: (s) => s.connection < C.Connected && s.disk === D.Negotiating,
    change: (_, context) => context.remembered ?? { disk: D.Diskless, peerDisk: D.DUnknown },
  },
  {
    name: 'Consistent and Outdated vanish with the link up',
    when: (s) =>
      s.connection >= C.Connected && s.connection < C.Ahead && (s.disk === D.Consistent || s.disk === D.Outdated),
    change: () => ({ disk: D.UpToDate }),
  },
  {
    name: 'Consistent and Outdated of the peer vanish with the link up',
    when: (s) =>
      s.connection >= C.Connected &&
      s.connection < C.Ahead &&
      (s.peerDisk === D.Consistent || s.peerDisk === D.Outdated),
    change: () => ({ peerDisk: D.UpToDate }),
  },
  {
    name: 'the disk is within what the connection state says',
    when: (s) => clamp(s.disk, bounds(s).disk) !== s.disk,
    change: (s) => ({ disk: clamp(s.disk, bounds(s).disk) }),
  },
  {
    name: 'the peer disk is within what the connection state says',
    when: (s) => clamp(s.peerDisk, bounds(s).peerDisk) !== s.peerDisk,
    change: (s) => ({ peerDisk: clamp(s.peerDisk, bounds(s).peerDisk) }),
  },
  {
    name: 'a Primary freezes until the peer it lost is fenced',
    when: (s, context, old) =>
      context.fencing === 'resource-and-stonith' && needsFence(s) && !needsFence(old) && !s.suspendedFencing,
    change: () => ({ suspendedFencing: true }),
  },
  {
    name: 'a Primary freezes when no good data is left',
    when: (s, context, old) => context.suspendOnNoData && lacksData(s) && !lacksData(old) && !s.suspendedNoData,
    change: () => ({ suspendedNoData: true }),
  },
  {
    name: 'a pause bit pauses the source',
    when: (s) => s.connection === C.SyncSource && isResyncPaused(s),
    change: () => ({ connection: C.PausedSyncS }),
  },
  {
    name: 'a pause bit pauses the target',
    when: (s) => s.connection === C.SyncTarget && isResyncPaused(s),
    change: () => ({ connection: C.PausedSyncT }),
  },
  {
    name: 'without a pause bit the source goes on',
    when: (s) => s.connection === C.PausedSyncS && !isResyncPaused(s),
    change: () => ({ connection: C.SyncSource }),
  },
  {
    name: 'without a pause bit the target goes on',
    when: (s) => s.connection === C.PausedSyncT && !isResyncPaused(s),
    change: () => ({ connection: C.SyncTarget }),
  },
];

function onePass(state: DeviceState, old: DeviceState, context: StateContext): DeviceState {
  let next = state;
  for (const row of IMPLICATIONS) if (row.when(next, context, old)) next = { ...next, ...row.change(next, context) };
  return next;
}

/**
 * Completes a wanted state with everything it implies. DRBD makes one pass over the implications; we repeat the pass
 * until nothing changes, which only matters where the last rows resume a paused resync with a disk that the clamps of
 * the unpaused state would not allow. (The rows cannot be applied to a fixed point one by one: in WFBitMapT the row
 * that lifts Outdated and the clamp that lowers UpToDate undo each other, by design, within one pass.)
 * @param next the wanted state
 * @param old the state it replaces
 */
export function sanitize(next: DeviceState, old: DeviceState, context: StateContext): DeviceState {
  let state = next;
  for (let round = 0; round < 4; round++) {
    const passed = onePass(state, old, context);
    if (packState(passed) === packState(state)) return state;
    state = passed;
  }
  assert(false, `implications do not settle: ${describeState(next)}`);
}

// ---------------------------------------------------------------------------------------------------------------------
// Forbidden states

interface ForbiddenRow {
  readonly result: StateResult;
  when(state: DeviceState, context: StateContext): boolean;
}

const isAnyOf = (value: number, ...values: readonly number[]): boolean => values.includes(value);

/** States that must not be entered by a soft change; the first row that holds wins. */
export const FORBIDDEN: readonly ForbiddenRow[] = [
  {
    result: StateResult.TwoPrimaries,
    when: (s, c) => c.hasNetConfig && !c.twoPrimaries && s.role === Role.Primary && s.peerRole === Role.Primary,
  },
  {
    result: StateResult.OtherVolumePeerPrimary,
    when: (s, c) => c.hasNetConfig && !c.twoPrimaries && s.role === Role.Primary && c.otherVolumePeerPrimary,
  },
  { result: StateResult.DeviceInUse, when: (s, c) => s.role === Role.Secondary && c.isOpen },
  {
    result: StateResult.NoUpToDateDisk,
    when: (s) => s.role === Role.Primary && s.connection < C.Connected && s.disk < D.UpToDate,
  },
  {
    result: StateResult.PrimaryNop,
    when: (s, c) =>
      c.fencing !== 'dont-care' && s.role === Role.Primary && s.connection < C.Connected && s.peerDisk >= D.DUnknown,
  },
  {
    result: StateResult.NoUpToDateDisk,
    when: (s) => s.role === Role.Primary && s.disk <= D.Inconsistent && s.peerDisk <= D.Inconsistent,
  },
  { result: StateResult.NoLocalDisk, when: (s) => s.connection > C.Connected && s.disk < D.Inconsistent },
  { result: StateResult.NoRemoteDisk, when: (s) => s.connection > C.Connected && s.peerDisk < D.Inconsistent },
  {
    result: StateResult.NoUpToDateDisk,
    when: (s) => s.connection > C.Connected && s.disk < D.UpToDate && s.peerDisk < D.UpToDate,
  },
  {
    result: StateResult.ConnectedOutdates,
    when: (s) => isAnyOf(s.connection, C.Connected, C.WFBitMapS, C.SyncSource, C.PausedSyncS) && s.disk === D.Outdated,
  },
  { result: StateResult.NoVerifyAlg, when: (s, c) => isVerifying(s.connection) && !c.hasVerifyAlgorithm },
  {
    result: StateResult.NoUpToDateDisk,
    when: (s) => s.role === Role.Primary && s.disk < D.UpToDate && s.peerDisk < D.UpToDate,
  },
  {
    result: StateResult.NeedConnection,
    when: (s) => isAnyOf(s.connection, C.StartingSyncS, C.StartingSyncT) && s.peerDisk === D.DUnknown,
  },
  {
    result: StateResult.ConnectedOutdates,
    when: (s) => s.connection >= C.Connected && s.peerDisk === D.DUnknown,
  },
];

/**
 * Judges a (sanitized) state by itself.
 * @returns StateResult.Success, or why the state must not be entered by a soft change
 */
export function forbidden(state: DeviceState, context: StateContext): StateResult {
  for (const row of FORBIDDEN) if (row.when(state, context)) return row.result;
  return StateResult.Success;
}

// ---------------------------------------------------------------------------------------------------------------------
// Refused moves

interface TransitionRow {
  readonly result: StateResult;
  when(old: DeviceState, next: DeviceState, context: StateContext): boolean;
}

/** Moves that never happen, not even forced. The first row that holds wins. */
export const HARD_TRANSITIONS: readonly TransitionRow[] = [
  {
    result: StateResult.AlreadyStandalone,
    when: (o, n) => o.connection === C.StandAlone && n.connection === C.Disconnecting,
  },
  {
    result: StateResult.NeedConnection,
    when: (o, n) => o.connection === C.StandAlone && !isAnyOf(n.connection, C.StandAlone, C.Unconnected),
  },
  {
    result: StateResult.NeedConnection,
    when: (o, n) => o.connection < C.WFReportParams && n.connection >= C.Connected,
  },
  {
    result: StateResult.InTransientState,
    when: (o, n) =>
      o.connection !== n.connection &&
      o.connection >= C.Timeout &&
      o.connection <= C.TearDown &&
      !isAnyOf(n.connection, C.Unconnected, C.Disconnecting),
  },
  {
    result: StateResult.InTransientState,
    when: (o, n) => o.connection === C.Disconnecting && !isAnyOf(n.connection, C.Disconnecting, C.StandAlone),
  },
  { result: StateResult.IsDiskless, when: (o, n) => o.disk === D.Diskless && n.disk === D.Failed },
];

const isStartingSync = (connection: ConnectionState): boolean => isAnyOf(connection, C.StartingSyncS, C.StartingSyncT);

/** Moves refused to whoever asks politely. The last row that holds wins. */
export const SOFT_TRANSITIONS: readonly TransitionRow[] = [
  {
    result: StateResult.ResyncRunning,
    when: (o, n) => isStartingSync(n.connection) && o.connection > C.Connected,
  },
  {
    result: StateResult.AlreadyStandalone,
    when: (o, n) => n.connection === C.Disconnecting && o.connection === C.StandAlone,
  },
  { result: StateResult.IsDiskless, when: (o, n) => n.disk > D.Attaching && o.disk === D.Diskless },
  {
    result: StateResult.NoNetConfig,
    when: (o, n) => n.connection === C.WFConnection && o.connection < C.Unconnected,
  },
  {
    result: StateResult.LowerThanOutdated,
    when: (o, n) => n.disk === D.Outdated && o.disk < D.Outdated && o.disk !== D.Attaching,
  },
  {
    result: StateResult.InTransientState,
    when: (o, n) => n.connection === C.Disconnecting && o.connection === C.Unconnected,
  },
  {
    result: StateResult.InTransientState,
    when: (o, n, c) =>
      c.stateSent &&
      !(n.connection === C.WFReportParams && o.connection === C.WFConnection) &&
      !(n.connection >= C.Connected && o.connection === C.WFReportParams),
  },
  {
    result: StateResult.InTransientState,
    when: (o, n) =>
      o.role !== Role.Primary &&
      n.role === Role.Primary &&
      n.peerDisk === D.UpToDate &&
      n.disk !== D.UpToDate &&
      n.disk !== D.Diskless &&
      (n.connection <= C.WFSyncUUID || n.connection !== o.connection),
  },
  {
    result: StateResult.NeedConnection,
    when: (o, n) => isVerifying(n.connection) && o.connection < C.Connected,
  },
  {
    result: StateResult.ResyncRunning,
    when: (o, n) => isVerifying(n.connection) && n.connection !== o.connection && o.connection > C.Connected,
  },
  {
    result: StateResult.NeedConnection,
    when: (o, n) => isStartingSync(n.connection) && o.connection < C.Connected,
  },
  {
    result: StateResult.NeedConnection,
    when: (o, n) => isAnyOf(n.connection, C.SyncTarget, C.SyncSource) && o.connection < C.WFReportParams,
  },
  {
    result: StateResult.OutdateWithoutConnection,
    when: (o, n) =>
      n.connection === C.Disconnecting &&
      n.peerDisk === D.Outdated &&
      o.connection < C.Connected &&
      o.peerDisk > D.Outdated,
  },
];

/** Judges a move that is enforced even for hard changes (connection loss, disk failure). */
export function refusedHardTransition(old: DeviceState, next: DeviceState, context: StateContext): StateResult {
  for (const row of HARD_TRANSITIONS) if (row.when(old, next, context)) return row.result;
  return StateResult.Success;
}

/** Judges a move by the rules for soft changes alone. */
export function refusedSoftTransition(old: DeviceState, next: DeviceState, context: StateContext): StateResult {
  let result: StateResult = StateResult.Success;
  for (const row of SOFT_TRANSITIONS) if (row.when(old, next, context)) result = row.result;
  return result;
}

/** How a change is asked for: `hard` for what has already happened (link lost, disk failed), `soft` for a wish. */
export type ChangeKind = 'hard' | 'soft';

/** Judges a move from `old` to the sanitized `next` by its kind; both kinds obey the hard rows. */
export function refusedTransition(
  old: DeviceState,
  next: DeviceState,
  context: StateContext,
  kind: ChangeKind,
): StateResult {
  const hard = refusedHardTransition(old, next, context);
  return hard !== StateResult.Success || kind === 'hard' ? hard : refusedSoftTransition(old, next, context);
}

/** The outcome of asking for a change: what the device's state becomes, or why it stays. */
export interface JudgedChange {
  readonly result: StateResult;
  /** The sanitized new state when `result` is positive, else the old one. */
  readonly state: DeviceState;
}

/**
 * The whole of a change of state: apply, sanitize, judge. A soft change into a forbidden state passes when the old
 * state breaks the very same rule (one cannot ask a degraded device to be healthy before it may change anything).
 * @see DRBD 8.4 drbd_state.c _drbd_set_state
 */
export function judgeChange(
  old: DeviceState,
  wanted: StateChange,
  context: StateContext,
  kind: ChangeKind,
): JudgedChange {
  const next = sanitize(applyChange(old, wanted), old, context);
  if (packState(next) === packState(old)) return { result: StateResult.NothingToDo, state: old };
  const hard = refusedHardTransition(old, next, context);
  if (hard !== StateResult.Success) return { result: hard, state: old };
  if (kind === 'hard') return { result: StateResult.Success, state: next };
  const invalid = forbidden(next, context);
  if (invalid !== StateResult.Success && forbidden(old, context) !== invalid) return { result: invalid, state: old };
  const soft = refusedSoftTransition(old, next, context);
  return soft === StateResult.Success ? { result: soft, state: next } : { result: soft, state: old };
}

/**
 * Whether a soft change needs the peer's consent first (P_STATE_CHG_REQ), by the old and the sanitized new state.
 * @see DRBD 8.4 drbd_state.c cl_wide_st_chg
 */
export function isClusterWide(old: DeviceState, next: DeviceState): boolean {
  const entersStartingSync = (connection: ConnectionState): boolean =>
    next.connection === connection && old.connection !== connection;
  if (old.connection < C.Connected) return false;
  if (
    next.connection >= C.Connected &&
    ((old.role !== Role.Primary && next.role === Role.Primary) ||
      entersStartingSync(C.StartingSyncT) ||
      entersStartingSync(C.StartingSyncS) ||
      (old.disk !== D.Failed && next.disk === D.Failed))
  )
    return true;
  return (
    next.connection === C.Disconnecting ||
    (old.connection === C.Connected && (next.connection === C.VerifyS || next.connection === C.WFReportParams))
  );
}
