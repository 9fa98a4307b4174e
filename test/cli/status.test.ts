import { describe, expect, it } from 'vitest';
import { adviceFor, formatBytes, formatDuration, healthOf, renderStatus } from '../../src/cli/status.js';
import type { ResourceStatus, ResyncStatus, VolumeStatus } from '../../src/node/status.js';

const GiB = 2 ** 30;
const MiB = 2 ** 20;

const GOOD: VolumeStatus = {
  ...{ volume: 0, minor: 0, device: '/dev/drbd0', backingDisk: '/dev/sdb1' },
  ...{ connectionState: 'Connected', diskState: 'UpToDate', peerDiskState: 'UpToDate' },
  ...{ sizeBytes: 64 * GiB, outOfSyncBytes: 0 },
  counters: {
    ...{ sentKiB: 0, receivedKiB: 0, writtenKiB: 0, readKiB: 0, activityLogWrites: 0 },
    ...{ localPending: 0, peerPending: 0, unacknowledged: 0, applicationPending: 0 },
  },
  generationIdentifiers: ['551466F062CFDD19', '0000000000000000', '0C4B90D64ABC324A', '0C4A90D64ABC324A'],
};

function resource(volume: Partial<VolumeStatus> = {}, more: Partial<ResourceStatus> = {}): ResourceStatus {
  const one = { ...GOOD, ...volume };
  return {
    ...{ name: 'data', role: 'Primary', peerRole: 'Secondary', nodeName: 'alpha', peerName: 'beta' },
    ...{ connectionState: one.connectionState, reason: '', peerAddress: '172.16.1.114:7788' },
    ...{ suspended: false, writeOrdering: 'flush', devices: [one] },
    ...more,
  };
}

const resync = (donePercent: number, more: Partial<ResyncStatus> = {}): ResyncStatus => ({
  ...{ donePercent, leftBytes: 16 * GiB, totalBytes: 64 * GiB, speedBytesPerSecond: 100 * MiB, finishSeconds: 163.8 },
  ...more,
});

describe('sizes and times', () => {
  it('prints sizes with one digit, and never 1024 of a unit', () => {
    expect([0, 1, 1023, 1024, 1536, 64 * GiB].map(formatBytes)).toEqual([
      '0 B',
      '1 B',
      '1023 B',
      '1.0 KiB',
      '1.5 KiB',
      '64.0 GiB',
    ]);
    expect(formatBytes(MiB - 1)).toBe('1.0 MiB');
    expect(formatBytes(2 ** 60)).toBe('1024.0 PiB');
  });

  it('prints times as h:mm:ss, and never 60 seconds', () => {
    expect([0, 59.4, 59.6, 3599.7, 3661, 360_000].map(formatDuration)).toEqual([
      '0:00:00',
      '0:00:59',
      '0:01:00',
      '1:00:00',
      '1:01:01',
      '100:00:00',
    ]);
  });
});

describe('is my data safe, and what do I do?', () => {
  it('two good copies: one line, no advice', () => {
    expect(adviceFor(resource())).toBeUndefined();
    expect(renderStatus(resource())).toBe(
      'data  OK  Primary on alpha   /dev/drbd0   64.0 GiB   peer beta Secondary UpToDate\n',
    );
  });

  it('a Secondary has no device: its minor is named', () => {
    const text = renderStatus(resource({ device: '' }, { role: 'Secondary', peerRole: 'Primary' }));
    expect(text).toBe('data  OK  Secondary on alpha   minor 0   64.0 GiB   peer beta Primary UpToDate\n');
  });

  it('the peer is brought up to date', () => {
    const status = resource({ connectionState: 'SyncSource', peerDiskState: 'Inconsistent', resync: resync(75) });
    expect(renderStatus(status)).toBe(
      `data  SYNCING  Primary on alpha   /dev/drbd0   64.0 GiB
    local   UpToDate       /dev/sdb1
    peer    SyncSource     beta 172.16.1.114:7788   peer disk Inconsistent
    resync  75.0 %   16.0 GiB of 64.0 GiB left   100.0 MiB/s   finish 0:02:44
  status: The peer's copy is being brought up to date; until then there is one good copy.
  action: None; wait about 0:02:44.
`,
    );
  });

  it('this head is brought up to date; a resync that has just begun names no time', () => {
    const begun = resync(0, { speedBytesPerSecond: 0, finishSeconds: 0 });
    const status = resource({ connectionState: 'SyncTarget', diskState: 'Inconsistent', resync: begun });
    expect(healthOf(status)).toBe('SYNCING');
    expect(adviceFor(status)).toEqual({
      status: "This head's copy is being brought up to date; until then there is one good copy.",
      action: 'None; it has just begun.',
    });
  });

  it('fresh disks on both: choose the head whose data counts', () => {
    const status = resource({ diskState: 'Inconsistent', peerDiskState: 'Inconsistent' }, { role: 'Secondary' });
    expect(healthOf(status)).toBe('UNUSABLE');
    expect(adviceFor(status)!.action).toMatch(/whose data counts.*: drbdts primary --force data$/);
  });

  it('a fresh disk and no peer: bring it up first', () => {
    const status = resource({
      ...{ connectionState: 'WFConnection', diskState: 'Inconsistent', peerDiskState: 'DUnknown' },
      generationIdentifiers: ['0000000000000004', '0000000000000000', '0000000000000000', '0000000000000000'],
    });
    expect(adviceFor(status)!.status).toBe('The copy here is new and holds no data yet.');
    expect(adviceFor(status)!.action).toMatch(/^Bring beta up: drbdts up data\./);
  });

  it('the peer is gone: what is written is here only', () => {
    const status = resource({
      ...{ connectionState: 'WFConnection', peerDiskState: 'DUnknown', outOfSyncBytes: 3 * GiB },
    });
    expect(healthOf(status)).toBe('DEGRADED');
    expect(adviceFor(status)!.status).toBe('Writes are on this head only. 3.0 GiB are out of sync.');
    expect(adviceFor(status)!.action).toMatch(/^None; resync starts by itself when beta returns\./);
    expect(adviceFor({ ...status, role: 'Secondary' })!.status).toMatch(/^The peer cannot be seen/);
  });

  it('a split brain: the recipe, with the word LOST', () => {
    const reason = 'Split-Brain detected but unresolved, dropping connection!';
    const status = resource({ connectionState: 'StandAlone', peerDiskState: 'DUnknown' }, { reason });
    expect(adviceFor(status)!.status).toMatch(/^Split brain: both heads were written to while apart/);
    expect(adviceFor(status)!.action).toBe(
      'Choose the head whose changes are to be LOST. There: drbdts secondary data; ' +
        'drbdts connect --discard-my-data data. On the other: drbdts connect data',
    );
  });

  it('disconnected by the operator: connect', () => {
    const reason = 'disconnected by the operator';
    const status = resource({ connectionState: 'StandAlone', peerDiskState: 'DUnknown' }, { reason });
    expect(adviceFor(status)).toEqual({
      status: 'This head does not talk to its peer: disconnected by the operator. 0 B are out of sync.',
      action: 'drbdts connect data',
    });
  });

  it('no disk here, a good one there', () => {
    const status = resource({ diskState: 'Diskless' });
    expect(healthOf(status)).toBe('DEGRADED');
    expect(adviceFor(status)!.status).toMatch(/the only good copy is on the peer/);
    expect(adviceFor(status)!.action).toBe('Mend the disk /dev/sdb1, then: drbdts attach data');
  });

  it('no disk here and none there: nothing in reach', () => {
    const status = resource({ diskState: 'Diskless', peerDiskState: 'DUnknown', connectionState: 'WFConnection' });
    expect(healthOf(status)).toBe('UNUSABLE');
    expect(adviceFor(status)!.status).toMatch(/no good copy is in reach/);
  });

  it('no disk there: the peer is to be mended, not waited for', () => {
    const status = resource({ peerDiskState: 'Diskless' });
    expect(adviceFor(status)).toEqual({
      status: 'beta has no disk attached; the only good copy is here.',
      action: 'Mend the disk of beta, then there: drbdts attach data',
    });
  });

  it('an outdated copy: the peer first, force only when it is lost for ever', () => {
    const status = resource({ connectionState: 'WFConnection', diskState: 'Outdated', peerDiskState: 'DUnknown' });
    expect(adviceFor(status)!.status).toBe("This head's copy is Outdated and may be old.");
    expect(adviceFor(status)!.action).toMatch(
      /^Bring beta back\. Only if it is lost for ever: drbdts primary --force data$/,
    );
  });

  it('a dead engine: unknown, and how to get it back', () => {
    const engineFault = 'the engine of data ended (killed by SIGKILL); see /l. Start it again with: drbdts up data';
    const dead = resource(
      { diskState: 'DUnknown', peerDiskState: 'DUnknown', connectionState: 'Unknown', sizeBytes: 0 },
      { role: 'Unknown', engineFault, engineEnded: true },
    );
    expect(healthOf(dead)).toBe('UNKNOWN');
    expect(adviceFor(dead)!.status).toBe('the engine of data ended (killed by SIGKILL); see /l. beta may take over.');
    expect(adviceFor(dead)!.action).toMatch(/^Unmount what is mounted from \/dev\/drbd0 .* then: drbdts up data$/);
    const free = { ...dead, devices: [{ ...dead.devices[0]!, device: '' }] };
    expect(adviceFor(free)!.action).toBe('drbdts up data');
  });

  it('an engine that does not answer is not declared dead', () => {
    const status = resource({}, { engineFault: 'no answer to status within 5000 ms', engineEnded: false });
    expect(healthOf(status)).toBe('UNKNOWN');
    expect(adviceFor(status)!.action).toBe('Look again: drbdts status data');
  });

  it('of several volumes the worst decides, whichever it is', () => {
    const worse: VolumeStatus = { ...GOOD, volume: 1, minor: 1, device: '/dev/drbd1', diskState: 'Diskless' };
    for (const devices of [
      [GOOD, worse],
      [worse, GOOD],
    ]) {
      const status = resource({}, { devices });
      expect(healthOf(status)).toBe('DEGRADED');
      expect(adviceFor(status)!.action).toMatch(/^Mend the disk/);
      expect(renderStatus(status)).toMatch(/ {4}1 local {3}Diskless/);
    }
  });
});
