import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { formatProc, type ProcDevice, type ProcProgress, resyncProgress } from '../../src/replication/proc-text.js';
import { ConnectionState as C, DiskState as D, INITIAL_STATE, Role as R } from '../../src/replication/state.js';

const HEAD = 'version: 8.4.11 (api:1/proto:86-101)\nsrcversion: 059B1B470318F053F5077D5\n';
const text = (...devices: ProcDevice[]): string => {
  const all = formatProc(devices, '8.4.11', 'srcversion: 059B1B470318F053F5077D5');
  expect(all.startsWith(HEAD)).toBe(true);
  return all.slice(HEAD.length);
};

const IDLE: ProcDevice = {
  minor: 0,
  state: {
    ...INITIAL_STATE,
    role: R.Primary,
    peerRole: R.Secondary,
    connection: C.Connected,
    disk: D.UpToDate,
    peerDisk: D.UpToDate,
  },
  protocol: 'C',
  activityLogSuspended: false,
  sentSectors: 0,
  receivedSectors: 0,
  writtenSectors: 0,
  readSectors: 0,
  activityLogWrites: 0,
  localInFlight: 0,
  pending: 0,
  unacknowledged: 0,
  applicationInFlight: 0,
  epochs: 1,
  writeOrdering: 'f',
  bitsSet: 0,
};

const NAMES = { role: R, connection: C, disk: D } as const;
const numberOf = <T extends number>(table: Readonly<Record<string, T>>, name: string): T => {
  const value = table[name];
  if (value === undefined) throw new Error(`${name} is no state`);
  return value;
};

/** Marks that all say the same: one run of `leftBits`, `ageSeconds` ago. */
const marks = (leftBits: number, ageSeconds: number): ProcProgress['marks'] => Array(8).fill({ leftBits, ageSeconds });

/** Reads what a kernel printed; the inverse of the formatter, by regular expressions. */
function parse(lines: readonly string[]): ProcDevice {
  const head = /^ *(\d+): cs:(\w+) ro:(\w+)\/(\w+) ds:(\w+)\/(\w+) (.) (.)(.)(.)(.)(.)(.)$/.exec(lines[0]!)!;
  const counters = [...lines[1]!.matchAll(/(\w+):(\S+)/g)].map((match) => [match[1]!, match[2]!] as const);
  const counter = (name: string): number => Number(counters.find(([key]) => key === name)![1]);
  const progress = lines.length > 2 ? /\((\d+)\/(\d+)\)K\n.*speed: (\S+) \((\S+)\)(?: want: (\S+))?/ : undefined;
  const found = progress?.exec(lines.slice(2).join('\n'));
  const plain = (value: string | undefined): number => Number((value ?? '0').replaceAll(',', ''));
  return {
    ...IDLE,
    minor: Number(head[1]),
    state: {
      role: numberOf(NAMES.role, head[3]!),
      peerRole: numberOf(NAMES.role, head[4]!),
      connection: numberOf(NAMES.connection, head[2]!),
      disk: numberOf(NAMES.disk, head[5]!),
      peerDisk: numberOf(NAMES.disk, head[6]!),
      suspended: head[8] === 's',
      pausedByDependency: head[9] === 'a',
      pausedByPeer: head[10] === 'p',
      pausedByUser: head[11] === 'u',
      suspendedNoData: false,
      suspendedFencing: false,
    },
    protocol: head[7] as ProcDevice['protocol'],
    activityLogSuspended: head[13] === 's',
    sentSectors: counter('ns') * 2,
    receivedSectors: counter('nr') * 2,
    writtenSectors: counter('dw') * 2,
    readSectors: counter('dr') * 2,
    activityLogWrites: counter('al'),
    localInFlight: counter('lo'),
    pending: counter('pe'),
    unacknowledged: counter('ua'),
    applicationInFlight: counter('ap'),
    epochs: counter('ep'),
    writeOrdering: counters.find(([key]) => key === 'wo')![1] as ProcDevice['writeOrdering'],
    bitsSet: counter('oos') / 4,
    ...(found
      ? {
          progress: {
            totalBits: plain(found[2]) / 4,
            failedBits: 0,
            verifyLeftBits: 0,
            // These samples were taken one second after the start: rates are what is done so far.
            marks: marks(plain(found[2]) / 4, 1),
            lastMark: 0,
            runningSeconds: 1,
            wantedKibPerSecond: plain(found[5]),
          },
        }
      : {}),
  };
}

describe('/proc/drbd as recorded from drbd.ko 8.4.11', () => {
  const blocks = readFileSync(join(import.meta.dirname, '../vectors/drbd/proc-drbd.txt'), 'utf8')
    .split(/\n(?= ?\d+: cs:)/)
    .map((block) => block.replace(/\n$/, ''));
  it('is printed alike', () => {
    expect(blocks.length).toBeGreaterThan(40);
    for (const block of blocks) expect(text(parse(block.split('\n')))).toBe(`${block}\n`);
  });
  it('has samples of a resync in it, on both sides', () => {
    const progress = blocks.filter((block) => block.includes("sync'ed:"));
    expect(progress.some((block) => block.includes('cs:SyncSource'))).toBe(true);
    expect(progress.some((block) => block.includes('want:'))).toBe(true);
  });
});

describe('/proc/drbd', () => {
  it('shows what is not configured, and an empty line where minors are missing', () => {
    const unconfigured = { ...IDLE, state: INITIAL_STATE };
    expect(text({ ...unconfigured, minor: 0 }, { ...unconfigured, minor: 1 }, { ...unconfigured, minor: 12 })).toBe(
      ' 0: cs:Unconfigured\n 1: cs:Unconfigured\n\n12: cs:Unconfigured\n',
    );
    expect(text({ ...unconfigured, minor: 3 })).toBe('\n 3: cs:Unconfigured\n');
  });

  it('shows every flag at its place', () => {
    const flags = (state: Partial<ProcDevice['state']>, device: Partial<ProcDevice> = {}): string =>
      text({ ...IDLE, ...device, state: { ...IDLE.state, ...state } })
        .split('\n')[0]!
        .slice(-8);
    expect(flags({})).toBe('C r-----');
    expect(flags({ suspended: true })).toBe('C s-----');
    expect(flags({ suspendedFencing: true })).toBe('C s-----');
    expect(flags({ suspendedNoData: true })).toBe('C s-----');
    expect(flags({ pausedByDependency: true })).toBe('C ra----');
    expect(flags({ pausedByPeer: true })).toBe('C r-p---');
    expect(flags({ pausedByUser: true })).toBe('C r--u--');
    expect(flags({}, { activityLogSuspended: true })).toBe('C r----s');
    expect(flags({}, { protocol: ' ' })).toBe('  r-----');
  });

  it('counts sectors in KiB, rounded down, and wraps at 32 bits', () => {
    const line = text({ ...IDLE, sentSectors: 3, receivedSectors: 2 ** 33 + 8, bitsSet: 2 ** 32 }).split('\n')[1];
    expect(line).toBe('    ns:1 nr:4 dw:0 dr:0 al:0 bm:0 lo:0 pe:0 ua:0 ap:0 ep:1 wo:f oos:17179869184');
  });
});

describe('progress', () => {
  const total = 249_996;
  const progress: ProcProgress = {
    totalBits: total,
    failedBits: 0,
    verifyLeftBits: 0,
    marks: marks(total, 6),
    lastMark: 0,
    runningSeconds: 6,
    wantedKibPerSecond: 0,
  };
  const source = (bitsSet: number, fields: Partial<ProcProgress> = {}, connection: number = C.SyncSource): string[] =>
    text({
      ...IDLE,
      state: { ...IDLE.state, connection: connection as C, peerDisk: D.Inconsistent },
      bitsSet,
      progress: { ...progress, ...fields },
    })
      .split('\n')
      .slice(2, -1);

  it('matches the sample: 999984 KiB, 654384 KiB to go after six seconds', () => {
    expect(source(654_384 / 4)).toEqual([
      "\t[======>.............] sync'ed: 35.2% (654384/999984)K",
      '\tfinish: 0:00:11 speed: 57,600 (57,600) K/sec',
    ]);
  });
  it('a fresh full resync starts at 0.5 %, with a bar one longer', () => {
    expect(source(total)[0]).toBe("\t[>....................] sync'ed:  0.5% (999984/999984)K");
  });
  it('a finished one is full', () => {
    expect(source(0)[0]).toBe("\t[===================>] sync'ed:100.0% (0/999984)K");
    expect(source(0, { totalBits: 0 })[0]).toBe("\t[===================>] sync'ed:100.0% (0/0)K");
  });
  it('more than 4 GiB in MiB', () => {
    expect(source(2 ** 20, { totalBits: 2 ** 21 })[0]).toContain(' (4096/8192)M');
    expect(source(2 ** 19, { totalBits: 2 ** 20 })[0]).toContain(' (2097152/4194304)K');
  });
  it('stalled after three minutes without a mark', () => {
    expect(source(total, { marks: marks(total, 180) })[1]).toMatch(/K\/sec$/);
    expect(source(total, { marks: marks(total, 181) })[1]).toMatch(/K\/sec \(stalled\)$/);
  });
  it('reads the mark two behind the last, in a ring', () => {
    const ring = marks(total, 6).map((mark, index) => (index === 1 ? { leftBits: 1000 + 250, ageSeconds: 10 } : mark));
    expect(source(1000, { marks: ring, lastMark: 7 })[1]).toContain('speed: 100 (');
    expect(source(1000, { marks: ring, lastMark: 6 })[1]).not.toContain('speed: 100 (');
  });
  it('says what it wants on the side that requests, and nothing outside of sync and verify', () => {
    expect(source(0, { wantedKibPerSecond: 102_400 }, C.SyncTarget)[1]).toContain(' want: 102,400 K/sec');
    expect(source(0, { wantedKibPerSecond: 102_400 }, C.VerifyS)[1]).toContain(' want: 102,400 K/sec');
    expect(source(0, {}, C.VerifyT)[1]).not.toContain('want');
    expect(source(0, {}, C.VerifyT)[0]).toContain('] verified:100.0% ');
    expect(source(0, {}, C.PausedSyncS)).toEqual([]);
  });
  it('counts what failed as done, and never more left than there was', () => {
    expect(resyncProgress(false, 500, { ...progress, failedBits: 500 }).leftBits).toBe(0);
    expect(resyncProgress(false, total + 9, progress).leftBits).toBe(total);
    expect(resyncProgress(true, 7, { ...progress, verifyLeftBits: 99 }).leftBits).toBe(99);
  });
  it('hours, minutes and seconds', () => {
    // 1000 bits in 10 s leave 249996 - 1000 bits: 10 * (248996 / 11) / 100 = 2263 s
    expect(source(total - 1000, { marks: marks(total, 10) })[1]).toContain('finish: 0:37:43 ');
    expect(source(total - 10, { marks: marks(total, 10) })[1]).toContain('finish: 6:56:38 ');
  });
});
