import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { ProtocolError } from '../../src/base/errors.js';
import {
  applyChange,
  BIT_PAUSED_BY_DEPENDENCY,
  BIT_PAUSED_BY_PEER,
  BIT_PAUSED_BY_USER,
  ConnectionState as C,
  CONNECTION_STATE_NAMES,
  change,
  convertPerspective,
  DiskState as D,
  DEFAULT_CONTEXT,
  type DeviceState,
  describeChange,
  describeState,
  forbidden,
  IMPLICATIONS,
  INITIAL_STATE,
  isClusterWide,
  judgeChange,
  packState,
  Role as R,
  refusedHardTransition,
  refusedSoftTransition,
  refusedTransition,
  StateResult as S,
  type StateContext,
  sanitize,
  shouldReplicate,
  shouldSendOutOfSync,
  unpackState,
} from '../../src/replication/state.js';

/** Secondary, Connected, UpToDate/UpToDate unless said otherwise. */
function state(fields: Partial<DeviceState> = {}): DeviceState {
  return {
    ...INITIAL_STATE,
    peerRole: R.Secondary,
    connection: C.Connected,
    disk: D.UpToDate,
    peerDisk: D.UpToDate,
    ...fields,
  };
}

const context = (fields: Partial<StateContext> = {}): StateContext => ({ ...DEFAULT_CONTEXT, ...fields });

const CONNECTIONS = Object.values(C);
const DISKS = Object.values(D);

function* everyState(): Generator<DeviceState> {
  for (const role of [R.Primary, R.Secondary])
    for (const peerRole of Object.values(R))
      for (const connection of CONNECTIONS)
        for (const disk of DISKS)
          for (const peerDisk of DISKS) yield state({ role, peerRole, connection, disk, peerDisk });
}

describe('the packed word', () => {
  // role, peer, conn, disk, pdsk as printed in the wire's description, and seen in recorded sessions
  const words: [number, Partial<DeviceState>][] = [
    [0xc882, { role: R.Secondary, peerRole: R.Unknown, connection: C.WFConnection, disk: 4, peerDisk: 6 }],
    [0x88aa, { role: R.Secondary, peerRole: R.Secondary, connection: C.Connected, disk: 4, peerDisk: 4 }],
    [0x90a9, { role: R.Primary, peerRole: R.Secondary, connection: C.Connected, disk: 8, peerDisk: 4 }],
    [0x108e6, { role: R.Secondary, peerRole: R.Primary, connection: C.WFBitMapT, disk: 4, peerDisk: 8 }],
    [0x110a6, { role: R.Secondary, peerRole: R.Primary, connection: C.Connected, disk: 8, peerDisk: 8 }],
    [0xd081, { role: R.Primary, peerRole: R.Unknown, connection: C.WFConnection, disk: 8, peerDisk: 6 }],
    [0xf0d9, { role: R.Primary, peerRole: R.Secondary, connection: C.WFBitMapS, disk: 8, peerDisk: 7 }],
    [0x10ae6, { role: R.Secondary, peerRole: R.Primary, connection: C.WFBitMapT, disk: 5, peerDisk: 8 }],
  ];
  for (const [word, fields] of words)
    it(`0x${word.toString(16)} is ${describeState(state(fields))}`, () => {
      expect(unpackState(word)).toEqual(state(fields));
      expect(packState(state(fields))).toBe(word);
    });

  it('has each flag at its own bit', () => {
    const bare = packState(state());
    expect(packState(state({ suspended: true }))).toBe(bare | (1 << 17));
    expect(packState(state({ pausedByDependency: true }))).toBe(bare | (1 << 18));
    expect(packState(state({ pausedByPeer: true }))).toBe(bare | (1 << 19));
    expect(packState(state({ pausedByUser: true }))).toBe(bare | (1 << 20));
    expect(packState(state({ suspendedNoData: true }))).toBe(bare | (1 << 21));
    expect(packState(state({ suspendedFencing: true }))).toBe(bare | (1 << 22));
  });

  it('refuses what does not exist, and reads back everything else', () => {
    for (const word of [0x3, 0xe, 0x182 | (31 << 4), 0x2 | (9 << 9), 0x2 | (9 << 13), 0x2 | (1 << 23), 0x80000002, 0])
      expect(() => unpackState(word >>> 0), word.toString(16)).toThrow(ProtocolError);
    fc.assert(
      fc.property(fc.integer({ min: 0, max: 0xffffffff }), (word) => {
        try {
          expect(packState(unpackState(word)) >>> 0).toBe(word);
        } catch (error) {
          if (!(error instanceof ProtocolError)) throw error;
        }
      }),
    );
  });
});

describe('implied changes, over the whole joint space', () => {
  const contexts: StateContext[] = [
    context(),
    context({ fencing: 'resource-and-stonith', suspendOnNoData: true }),
    context({ remembered: { disk: D.UpToDate, peerDisk: D.Outdated } }),
  ];

  it('settle, are idempotent, and respect what the connection state says about the disks', () => {
    // min and max of disk and peer disk, retyped from the documentation
    const target = [4, 5, 8, 8];
    const source = [8, 8, 4, 7];
    const bounds: Record<string, number[]> = {
      WFBitMapT: target,
      PausedSyncT: target,
      StartingSyncT: target,
      WFSyncUUID: target,
      Behind: target,
      VerifyS: [8, 8, 8, 8],
      VerifyT: [8, 8, 8, 8],
      Connected: [0, 8, 0, 8],
      WFBitMapS: source,
      PausedSyncS: source,
      StartingSyncS: source,
      Ahead: source,
      SyncTarget: [4, 4, 8, 8],
      SyncSource: [8, 8, 4, 4],
    };
    let visited = 0;
    for (const some of contexts)
      for (const wanted of everyState())
        for (const paused of [false, true]) {
          const asked = { ...wanted, pausedByUser: paused };
          const got = sanitize(asked, INITIAL_STATE, some);
          if (packState(sanitize(got, INITIAL_STATE, some)) !== packState(got))
            expect.fail(`${describeState(asked)}: not idempotent`);
          const [diskMin, diskMax, peerMin, peerMax] = bounds[CONNECTION_STATE_NAMES[got.connection]!] ?? [0, 8, 4, 6];
          const fits =
            got.disk >= diskMin! && got.disk <= diskMax! && got.peerDisk >= peerMin! && got.peerDisk <= peerMax!;
          if (!fits) expect.fail(`${describeState(asked)} became ${describeState(got)}`);
          visited++;
        }
    expect(visited).toBe(2 * 3 * 24 * 9 * 9 * contexts.length * 2);
  });

  it('never leave a state that the link alone forbids', () => {
    const never: number[] = [S.NoLocalDisk, S.NoRemoteDisk];
    for (const wanted of everyState()) {
      const got = sanitize(wanted, INITIAL_STATE, DEFAULT_CONTEXT);
      const verdict = forbidden({ ...got, role: R.Secondary }, context({ hasVerifyAlgorithm: true }));
      if (never.includes(verdict)) expect.fail(`${describeState(wanted)} -> ${describeState(got)}: ${verdict}`);
      // The one way to be forbidden for an idle Secondary: connected to a peer whose disk nobody knows.
      if (verdict !== S.Success && !(got.connection >= C.Connected && got.peerDisk === D.DUnknown))
        expect.fail(`${describeState(got)}: ${verdict}`);
    }
  });

  it('leave roles alone, and resync only ever moves towards Connected or a pause', () => {
    for (const wanted of everyState()) {
      const got = sanitize(wanted, INITIAL_STATE, DEFAULT_CONTEXT);
      if (got.role !== wanted.role) expect.fail(describeState(wanted));
      const turned: Record<number, number> = { [C.PausedSyncS]: C.SyncSource, [C.PausedSyncT]: C.SyncTarget };
      if (![wanted.connection, turned[wanted.connection], C.Connected].includes(got.connection))
        expect.fail(`${describeState(wanted)} became ${describeState(got)}`);
    }
  });

  it('has a reason for every row: each one applies somewhere', () => {
    for (const row of IMPLICATIONS) {
      const old = state();
      const flags = [{}, { pausedByUser: true }, { pausedByPeer: true }, { pausedByDependency: true }];
      const found = contexts.some((some) =>
        [...everyState()].some((wanted) => flags.some((flag) => row.when({ ...wanted, ...flag }, some, old))),
      );
      expect(found, row.name).toBe(true);
    }
  });
});

describe('implied changes, one by one', () => {
  const implied = (
    fields: Partial<DeviceState>,
    expected: Partial<DeviceState>,
    some = DEFAULT_CONTEXT,
    old: DeviceState = state(),
  ): void => {
    expect(sanitize(state(fields), old, some)).toEqual({ ...state(fields), ...expected });
  };

  it('link lost: the peer has no role, pauses nothing, and its good disk is unknown', () =>
    implied(
      { connection: C.Unconnected, pausedByPeer: true },
      { peerRole: R.Unknown, pausedByPeer: false, peerDisk: D.DUnknown },
    ));
  it('link lost: that the peer is Outdated or Inconsistent is remembered', () => {
    implied({ connection: C.WFConnection, peerDisk: D.Outdated }, { peerRole: R.Unknown });
    implied({ connection: C.WFConnection, peerDisk: D.Inconsistent }, { peerRole: R.Unknown });
    implied({ connection: C.WFConnection, peerDisk: D.Failed }, { peerRole: R.Unknown, peerDisk: D.DUnknown });
  });
  it('unconfigured: waits for no other device', () =>
    implied(
      { connection: C.StandAlone, disk: D.Diskless, pausedByDependency: true },
      { peerRole: R.Unknown, peerDisk: D.DUnknown, pausedByDependency: false },
    ));
  it('a failed disk ends resync and verify', () => {
    implied({ connection: C.SyncTarget, disk: D.Failed }, { connection: C.Connected });
    implied({ connection: C.VerifyS, peerDisk: D.Diskless }, { connection: C.Connected });
  });
  it('link lost while Negotiating: what attach remembered, if the data is still the exposed data', () => {
    const lost = { connection: C.Unconnected, disk: D.Negotiating } as const;
    implied(
      lost,
      { peerRole: R.Unknown, disk: D.UpToDate, peerDisk: D.Outdated },
      context({ remembered: { disk: D.UpToDate, peerDisk: D.Outdated } }),
    );
    implied(lost, { peerRole: R.Unknown, disk: D.Diskless, peerDisk: D.DUnknown });
  });
  it('Consistent and Outdated vanish with the link up, on both sides', () => {
    implied({ disk: D.Consistent, peerDisk: D.Outdated }, { disk: D.UpToDate, peerDisk: D.UpToDate });
    implied({ disk: D.Outdated, peerDisk: D.Consistent }, { disk: D.UpToDate, peerDisk: D.UpToDate });
  });
  it('WFBitMapT shows good data as Outdated, WFBitMapS shows the peer as Consistent', () => {
    implied({ connection: C.WFBitMapT }, { disk: D.Outdated });
    implied({ connection: C.WFBitMapS }, { peerDisk: D.Consistent });
  });
  it('SyncSource and SyncTarget have one Inconsistent disk', () => {
    implied({ connection: C.SyncSource }, { peerDisk: D.Inconsistent });
    implied({ connection: C.SyncTarget }, { disk: D.Inconsistent });
  });
  it('fencing: a Primary that loses its peer freezes, once', () => {
    const lost = { role: R.Primary, connection: C.NetworkFailure } as const;
    const after = { peerRole: R.Unknown, peerDisk: D.DUnknown } as const;
    implied(lost, { ...after, suspendedFencing: true }, context({ fencing: 'resource-and-stonith' }));
    implied(lost, after, context({ fencing: 'resource-only' }));
    const thawed = state({ ...lost, ...after });
    expect(sanitize(thawed, thawed, context({ fencing: 'resource-and-stonith' })).suspendedFencing).toBe(false);
  });
  it('no data: a Primary freezes when it loses the last good disk, if so configured', () => {
    const lost = { role: R.Primary, disk: D.Failed, peerDisk: D.Inconsistent } as const;
    implied(lost, { suspendedNoData: true }, context({ suspendOnNoData: true }));
    implied(lost, {});
  });
  it('any pause bit pauses, none resumes', () => {
    for (const bit of ['pausedByDependency', 'pausedByPeer', 'pausedByUser'] as const) {
      implied({ connection: C.SyncSource, peerDisk: 4, [bit]: true }, { connection: C.PausedSyncS });
      implied({ connection: C.SyncTarget, disk: 4, [bit]: true }, { connection: C.PausedSyncT });
    }
    implied({ connection: C.PausedSyncS, peerDisk: 4 }, { connection: C.SyncSource });
    implied({ connection: C.PausedSyncT, disk: 4 }, { connection: C.SyncTarget });
  });
});

describe('forbidden states', () => {
  const cases: [string, Partial<DeviceState>, Partial<StateContext>, number][] = [
    ['two Primaries', { role: 1, peerRole: 1 }, {}, -1],
    ['two Primaries where allowed', { role: 1, peerRole: 1 }, { twoPrimaries: true }, 1],
    ['Primary while the peer is Primary on another volume', { role: 1 }, { otherVolumePeerPrimary: true }, -20],
    ['Secondary while open', {}, { isOpen: true }, -12],
    ['a lonely Primary without good data', { role: 1, connection: 8, disk: 7, peerDisk: 5 }, {}, -2],
    ['a lonely Primary before fencing', { role: 1, connection: 8, peerDisk: 6 }, { fencing: 'resource-only' }, -7],
    ['a lonely Primary after fencing', { role: 1, connection: 8, peerDisk: 5 }, { fencing: 'resource-only' }, 1],
    ['a Primary with two bad disks', { role: 1, disk: 4, peerDisk: 4 }, {}, -2],
    ['resync without a disk', { connection: 17, disk: 0 }, {}, -4],
    ['resync without the peer disk', { connection: 16, peerDisk: 3 }, {}, -5],
    ['resync without good data', { connection: 16, disk: 4, peerDisk: 4 }, {}, -2],
    ['Outdated while Connected', { disk: 5 }, {}, -6],
    ['Outdated as the source', { connection: 13, disk: 5, peerDisk: 8 }, {}, -6],
    ['verify without an algorithm', { connection: 18 }, {}, -14],
    ['verify with one', { connection: 19 }, { hasVerifyAlgorithm: true }, 1],
    ['a Primary with an Inconsistent disk and an Outdated peer', { role: 1, disk: 4, peerDisk: 5 }, {}, -2],
    ['full resync with a peer nobody knows', { connection: 11, peerDisk: 6 }, {}, -15],
    ['Connected to a disk nobody knows', { peerDisk: 6 }, {}, -6],
    ['healthy', {}, {}, 1],
  ];
  for (const [name, fields, some, expected] of cases)
    it(name, () => expect(forbidden(state(fields), context(some))).toBe(expected));
});

describe('refused moves', () => {
  const hard: [string, Partial<DeviceState>, Partial<DeviceState>, number][] = [
    ['StandAlone goes to Unconnected', { connection: 0 }, { connection: 2 }, 1],
    ['StandAlone goes nowhere else', { connection: 0 }, { connection: 8 }, -15],
    ['StandAlone cannot disconnect', { connection: 0 }, { connection: 1 }, -9],
    ['no jump over the handshake', { connection: 8 }, { connection: 10 }, -15],
    ['out of the handshake', { connection: 9 }, { connection: 14 }, 1],
    ['after a network failure not back', { connection: 5 }, { connection: 8 }, -18],
    ['after a network failure another try', { connection: 5 }, { connection: 2 }, 1],
    ['after a timeout give up', { connection: 3 }, { connection: 1 }, 1],
    ['staying torn down is no move', { connection: 7 }, { connection: 7, peerDisk: 6 }, 1],
    ['Disconnecting ends in StandAlone', { connection: 1 }, { connection: 0 }, 1],
    ['Disconnecting ends nowhere else', { connection: 1 }, { connection: 2 }, -18],
    ['what is not there cannot fail', { disk: 0 }, { disk: 2 }, -11],
  ];
  for (const [name, from, to, expected] of hard)
    it(`hard: ${name}`, () => {
      expect(refusedHardTransition(state(from), state(to), DEFAULT_CONTEXT)).toBe(expected);
      expect(refusedTransition(state(from), state(to), DEFAULT_CONTEXT, 'hard')).toBe(expected);
      if (expected < 0) expect(refusedTransition(state(from), state(to), DEFAULT_CONTEXT, 'soft')).toBe(expected);
    });

  const soft: [string, Partial<DeviceState>, Partial<DeviceState>, Partial<StateContext>, number][] = [
    ['full resync during resync', { connection: 16 }, { connection: 12 }, {}, -8],
    ['disconnect when StandAlone', { connection: 0 }, { connection: 1 }, {}, -9],
    ['a disk state without a disk', { disk: 0 }, { disk: 8 }, {}, -11],
    ['attach', { disk: 0 }, { disk: 1 }, {}, 1],
    ['connect without a network configuration', { connection: 0 }, { connection: 8 }, {}, -13],
    ['outdate bad data', { disk: 4 }, { disk: 5 }, {}, -16],
    ['attach outdated data', { disk: 1 }, { disk: 5 }, {}, 1],
    ['disconnect before the attempt began', { connection: 2 }, { connection: 1 }, {}, -18],
    ['promotion during the handshake', { connection: 9 }, { connection: 9, role: 1 }, { stateSent: true }, -18],
    ['the handshake itself', { connection: 8 }, { connection: 9 }, { stateSent: true }, 1],
    ['the end of the handshake', { connection: 9 }, { connection: 13 }, { stateSent: true }, 1],
    [
      'promotion of a target before resync runs',
      { connection: 14, disk: 5 },
      { connection: 14, disk: 5, role: 1 },
      {},
      -18,
    ],
    ['promotion of a running target', { connection: 17, disk: 4 }, { connection: 17, disk: 4, role: 1 }, {}, 1],
    ['promotion of a diskless client', { disk: 0 }, { disk: 0, role: 1 }, {}, 1],
    ['verify without a connection', { connection: 8 }, { connection: 18 }, {}, -15],
    ['verify during resync', { connection: 16 }, { connection: 18 }, {}, -8],
    ['verify when it runs', { connection: 18 }, { connection: 18, pausedByUser: true }, {}, 1],
    ['full resync without a connection', { connection: 8 }, { connection: 11 }, {}, -15],
    ['resync out of nothing', { connection: 5 }, { connection: 17 }, {}, -15],
    ['graceful outdate without a connection', { connection: 8, peerDisk: 6 }, { connection: 1, peerDisk: 5 }, {}, -21],
    ['a plain disconnect', {}, { connection: 1 }, {}, 1],
  ];
  for (const [name, from, to, some, expected] of soft)
    it(`soft: ${name}`, () => expect(refusedSoftTransition(state(from), state(to), context(some))).toBe(expected));

  it('the last soft row that holds wins', () => {
    // StartingSyncT from SyncSource during a handshake: RESYNC_RUNNING, then overridden.
    const verdict = refusedSoftTransition(
      state({ connection: 16 }),
      state({ connection: 12 }),
      context({ stateSent: true }),
    );
    expect(verdict).toBe(S.InTransientState);
  });
});

describe('a change from wish to state', () => {
  it('promotes, demotes, and says when there is nothing to do', () => {
    const promoted = judgeChange(state(), change({ role: R.Primary }), DEFAULT_CONTEXT, 'soft');
    expect(promoted).toEqual({ result: S.Success, state: state({ role: R.Primary }) });
    const again = judgeChange(promoted.state, change({ role: R.Primary }), DEFAULT_CONTEXT, 'soft');
    expect(again.result).toBe(S.NothingToDo);
  });

  it('keeps the old state when refused', () => {
    const old = state({ peerRole: R.Primary });
    const refused = judgeChange(old, change({ role: R.Primary }), DEFAULT_CONTEXT, 'soft');
    expect(refused.result).toBe(S.TwoPrimaries);
    expect(refused.state).toBe(old);
  });

  it('lets a state that is already wrong change in other ways', () => {
    const degraded = state({
      role: R.Primary,
      connection: C.WFConnection,
      peerRole: 0,
      disk: D.Inconsistent,
      peerDisk: 6,
    });
    expect(forbidden(degraded, DEFAULT_CONTEXT)).toBe(S.NoUpToDateDisk);
    expect(judgeChange(degraded, change({ pausedByUser: true }), DEFAULT_CONTEXT, 'soft').result).toBe(S.Success);
  });

  it('a hard change asks only the hard rows', () => {
    const primary = state({ role: R.Primary });
    const failed = judgeChange(primary, change({ disk: D.Failed, peerDisk: D.Inconsistent }), DEFAULT_CONTEXT, 'hard');
    expect(failed.result).toBe(S.Success);
    expect(failed.state.disk).toBe(D.Failed);
  });

  it('prints as drbd.ko logs it', () => {
    const before = state({ disk: D.Inconsistent, role: R.Secondary });
    expect(describeChange(before, { ...before, role: R.Primary, disk: D.UpToDate })).toBe(
      'role( Secondary -> Primary ) disk( Inconsistent -> UpToDate )',
    );
    const params = state({ peerRole: 0, connection: C.WFReportParams, peerDisk: 6, disk: 4 });
    expect(describeChange(params, { ...params, peerRole: 2, connection: C.Connected, peerDisk: 4 })).toBe(
      'peer( Unknown -> Secondary ) conn( WFReportParams -> Connected ) pdsk( DUnknown -> Inconsistent )',
    );
  });
});

describe('cluster-wide changes', () => {
  it('encode as mask and value', () => {
    expect(change({ role: R.Primary })).toEqual({ mask: 0x3, value: 0x1 });
    expect(change({ role: R.Primary, disk: D.UpToDate })).toEqual({ mask: 0x1e03, value: 0x1001 });
    expect(change({ disk: D.Failed })).toEqual({ mask: 0x1e00, value: 0x0400 });
    expect(change({ connection: C.StartingSyncT })).toEqual({ mask: 0x1f0, value: 0x0c0 });
    expect(change({ connection: C.VerifyS })).toEqual({ mask: 0x1f0, value: 0x120 });
    expect(change({ connection: C.Disconnecting })).toEqual({ mask: 0x1f0, value: 0x010 });
  });

  it('need the peer for exactly the moves that concern it', () => {
    const yes: [Partial<DeviceState>, Partial<DeviceState>][] = [
      [{}, { role: 1 }],
      [{}, { connection: C.StartingSyncS }],
      [{}, { connection: C.StartingSyncT }],
      [{}, { disk: D.Failed }],
      [{ connection: C.SyncSource }, { connection: C.Disconnecting }],
      [{}, { connection: C.VerifyS }],
      [{}, { connection: C.WFReportParams }],
    ];
    const no: [Partial<DeviceState>, Partial<DeviceState>][] = [
      [{ role: 1 }, { role: 2 }],
      [{ connection: C.WFConnection }, { connection: C.WFConnection, role: 1 }],
      [{ connection: C.WFConnection }, { connection: C.Disconnecting }],
      [{}, { connection: C.VerifyT }],
      [{}, { connection: C.NetworkFailure }],
      [{ disk: D.Failed }, { disk: D.Diskless }],
    ];
    for (const [from, to] of yes) expect(isClusterWide(state(from), state(to)), JSON.stringify(to)).toBe(true);
    for (const [from, to] of no) expect(isClusterWide(state(from), state(to)), JSON.stringify(to)).toBe(false);
  });

  it('turn into the perspective of the peer', () => {
    const turned = (fields: Partial<DeviceState>) => {
      const wish = change(fields);
      return convertPerspective(wish.mask, wish.value);
    };
    expect(turned({ role: R.Primary })).toEqual(change({ peerRole: R.Primary }));
    expect(turned({ role: R.Primary, disk: D.UpToDate })).toEqual(change({ peerRole: 1, peerDisk: D.UpToDate }));
    expect(turned({ peerDisk: D.Outdated })).toEqual(change({ disk: D.Outdated }));
    expect(turned({ connection: C.StartingSyncT })).toEqual(change({ connection: C.StartingSyncS }));
    expect(turned({ connection: C.StartingSyncS })).toEqual(change({ connection: C.StartingSyncT }));
    expect(turned({ connection: C.VerifyS })).toEqual(change({ connection: C.VerifyT }));
    expect(turned({ connection: C.Disconnecting })).toEqual(change({ connection: C.TearDown }));
    expect(turned({ connection: C.WFReportParams })).toEqual(change({ connection: C.WFReportParams }));
    expect(turned({ connection: C.Connected })).toEqual(change({ connection: C.Connected }));
    expect(turned({ connection: C.Ahead })).toEqual(change({ connection: C.StandAlone }));
    expect(turned({ pausedByUser: true })).toEqual(change({ pausedByPeer: true }));
    expect(turned({ pausedByDependency: true })).toEqual(change({ pausedByPeer: true }));
    expect(turned({ suspended: true })).toEqual({ mask: 0, value: 0 });
  });

  it('are refused when they name half a field or a state that does not exist', () => {
    expect(() => convertPerspective(0x1, 0x1)).toThrow(ProtocolError);
    expect(() => convertPerspective(0x1f0, 24 << 4)).toThrow(ProtocolError);
    expect(() => convertPerspective(0x1e00, 9 << 9)).toThrow(ProtocolError);
    expect(() => convertPerspective(1 << 23, 0)).toThrow(ProtocolError);
    // Nobody's role can be made Unknown.
    expect(() => convertPerspective(0xc, 0)).toThrow(ProtocolError);
    expect(() => convertPerspective(0x3, 0)).toThrow(ProtocolError);
  });

  it('whatever a peer sends becomes a state that exists, or is refused', () => {
    fc.assert(
      fc.property(
        fc.constantFrom(...everyState()),
        fc.integer({ min: 0, max: 0xffffffff }),
        fc.integer({ min: 0, max: 0xffffffff }),
        (old, mask, value) => {
          try {
            const wish = convertPerspective(mask, value);
            const judged = judgeChange(old, wish, DEFAULT_CONTEXT, 'soft');
            expect(CONNECTION_STATE_NAMES[judged.state.connection]).toBeDefined();
          } catch (error) {
            if (!(error instanceof ProtocolError)) throw error;
          }
        },
      ),
    );
    // Full fields, so that most are not refused.
    const fields = [0x3, 0xc, 0x1f0, 0x1e00, 0x1e000, BIT_PAUSED_BY_DEPENDENCY, BIT_PAUSED_BY_PEER, BIT_PAUSED_BY_USER];
    fc.assert(
      fc.property(fc.subarray(fields), fc.integer({ min: 0, max: 0x7fffff }), (masks, value) => {
        const mask = masks.reduce((all, one) => all | one, 0);
        try {
          const next = applyChange(state(), convertPerspective(mask, value));
          expect(unpackState(packState(next))).toEqual(next);
        } catch (error) {
          if (!(error instanceof ProtocolError)) throw error;
        }
      }),
      { numRuns: 1000 },
    );
  });
});

describe('where a write goes', () => {
  const cases: [Partial<DeviceState>, boolean, boolean][] = [
    [{}, true, false],
    [{ connection: C.WFConnection, peerDisk: D.DUnknown }, false, false],
    [{ peerDisk: D.Inconsistent }, false, false],
    [{ connection: C.WFBitMapS, peerDisk: D.Consistent }, false, true],
    [{ connection: C.WFBitMapT, disk: D.Outdated }, true, false],
    [{ connection: C.SyncSource, peerDisk: D.Inconsistent }, true, false],
    [{ connection: C.Ahead, peerDisk: D.Inconsistent }, false, true],
  ];
  for (const [fields, replicates, outOfSync] of cases)
    it(describeState(state(fields)), () => {
      expect(shouldReplicate(state(fields))).toBe(replicates);
      expect(shouldSendOutOfSync(state(fields))).toBe(outOfSync);
    });
});
