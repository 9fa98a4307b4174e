import {
  CONNECTION_STATE_NAMES,
  ConnectionState,
  type DeviceState,
  DISK_STATE_NAMES,
  DiskState,
  isSuspended,
  ROLE_NAMES,
  Role,
} from './state.js';

/**
 * The text of /proc/drbd, byte for byte as drbd.ko 8.4 prints it, because scripts and monitors parse it.
 *
 * @see DRBD 8.4 drbd_proc.c drbd_seq_show, drbd_syncer_progress, drbd_get_syncer_progress
 */

/** Progress of a resync or verify; bits are blocks of 4 KiB. */
export interface ProcProgress {
  /** Bits at the start. */
  readonly totalBits: number;
  /** Bits that could not be synced. */
  readonly failedBits: number;
  /** Verify: bits left to compare. */
  readonly verifyLeftBits: number;
  /** Of the eight marks, a ring: bits left when the mark was set, and whole seconds since. */
  readonly marks: readonly { readonly leftBits: number; readonly ageSeconds: number }[];
  /** Index of the mark set last. */
  readonly lastMark: number;
  /** Whole seconds since the start, pauses excluded. */
  readonly runningSeconds: number;
  /** Rate the controller aims at; KiB/s. */
  readonly wantedKibPerSecond: number;
}

/** One minor of /proc/drbd. Counters as drbd.ko has them; `*Sectors` are halved when printed. */
export interface ProcDevice {
  readonly minor: number;
  readonly state: DeviceState;
  /** A, B, C, or a blank without network configuration. */
  readonly protocol: 'A' | 'B' | 'C' | ' ';
  readonly activityLogSuspended: boolean;
  readonly sentSectors: number;
  readonly receivedSectors: number;
  readonly writtenSectors: number;
  readonly readSectors: number;
  readonly activityLogWrites: number;
  /** lo: operations on the local disk. */
  readonly localInFlight: number;
  /** pe: requests to the peer, not answered. */
  readonly pending: number;
  /** ua: requests of the peer, not answered. */
  readonly unacknowledged: number;
  /** ap: application requests, not completed. */
  readonly applicationInFlight: number;
  /** ep. */
  readonly epochs: number;
  /** wo. */
  readonly writeOrdering: 'n' | 'd' | 'f' | 'b';
  readonly bitsSet: number;
  /** Required in SyncSource, SyncTarget, VerifyS and VerifyT. */
  readonly progress?: ProcProgress;
}

const BAR_CELLS = 20;
const MARKS = 8;
const STALLED_SECONDS = 180;
const KIB_PER_BIT = 4;
/** 4 GiB: from here on sizes are printed in MiB. */
const MIB_FROM_BITS = 2 ** 20;

/** Thousands grouping as in `57,600`. */
function grouped(value: number): string {
  return String(value).replace(/\B(?=(\d{3})+$)/g, ',');
}

/** A sector counter in KiB, 32-bit wrapping as printed by drbd.ko. */
function kib(sectors: number): number {
  return Math.floor(sectors / 2) % 2 ** 32;
}

/** Bits left and thousandths done of a resync or verify. */
export function resyncProgress(
  isVerify: boolean,
  bitsSet: number,
  progress: ProcProgress,
): { readonly leftBits: number; readonly permil: number } {
  const total = progress.totalBits;
  const rawLeft = isVerify ? progress.verifyLeftBits : bitsSet - progress.failedBits;
  // Writes to blocks that are not synced yet may set more bits than there were at the start.
  const leftBits = Math.min(Math.max(rawLeft, 0), total);
  if (total === 0) return { leftBits, permil: 1000 };
  const scale = 2 ** (total > 2 ** 32 - 1 ? 16 : 10);
  const scaledLeft = Math.floor(leftBits / scale);
  const scaledTotal = 1 + Math.floor(total / scale);
  return { leftBits, permil: 1000 - Math.floor((scaledLeft * 1000) / scaledTotal) };
}

function progressLines(device: ProcDevice, progress: ProcProgress): string {
  const { connection } = device.state;
  const isVerify = connection === ConnectionState.VerifyS || connection === ConnectionState.VerifyT;
  const { leftBits, permil } = resyncProgress(isVerify, device.bitsSet, progress);
  const total = progress.totalBits;

  const done = Math.floor(permil / 50);
  const bar = `[${'='.repeat(Math.max(done - 1, 0))}>${'.'.repeat(BAR_CELLS - done)}]`;
  const percent = `${String(Math.floor(permil / 10)).padStart(3)}.${permil % 10}%`;
  const size =
    total > MIB_FROM_BITS
      ? `(${Math.floor(leftBits / 1024) * KIB_PER_BIT}/${Math.floor(total / 1024) * KIB_PER_BIT})M`
      : `(${leftBits * KIB_PER_BIT}/${total * KIB_PER_BIT})K`;

  const mark = progress.marks[(progress.lastMark + 2) % MARKS]!;
  const stalled = mark.ageSeconds > STALLED_SECONDS;
  const seconds = Math.max(mark.ageSeconds, 1);
  // drbd.ko's unsigned difference wraps when bits were added meanwhile; nobody can use that number.
  const gained = Math.max(mark.leftBits - leftBits, 0);
  const remaining = Math.trunc((seconds * Math.trunc(leftBits / (Math.trunc(gained / 100) + 1))) / 100);
  const two = (value: number): string => String(value).padStart(2, '0');
  const finish = `${Math.floor(remaining / 3600)}:${two(Math.floor(remaining / 60) % 60)}:${two(remaining % 60)}`;
  const speed = Math.trunc(gained / seconds) * KIB_PER_BIT;
  const average = Math.trunc((total - leftBits) / Math.max(1, progress.runningSeconds)) * KIB_PER_BIT;
  const wants = connection === ConnectionState.SyncTarget || connection === ConnectionState.VerifyS;
  return (
    `\t${bar} ${isVerify ? 'verified:' : "sync'ed:"}${percent} ${size}\n` +
    `\tfinish: ${finish} speed: ${grouped(speed)} (${grouped(average)})` +
    `${wants ? ` want: ${grouped(progress.wantedKibPerSecond)}` : ''} K/sec${stalled ? ' (stalled)' : ''}\n`
  );
}

function deviceLines(device: ProcDevice): string {
  const { state } = device;
  const minor = String(device.minor).padStart(2);
  if (
    state.connection === ConnectionState.StandAlone &&
    state.disk === DiskState.Diskless &&
    state.role === Role.Secondary
  )
    return `${minor}: cs:Unconfigured\n`;
  const flags =
    (isSuspended(state) ? 's' : 'r') +
    (state.pausedByDependency ? 'a' : '-') +
    (state.pausedByPeer ? 'p' : '-') +
    (state.pausedByUser ? 'u' : '-') +
    // What blocks the disk below is not visible from userspace; drbd.ko on recent kernels prints a dash, too.
    '-' +
    (device.activityLogSuspended ? 's' : '-');
  const head =
    `${minor}: cs:${CONNECTION_STATE_NAMES[state.connection]} ` +
    `ro:${ROLE_NAMES[state.role]}/${ROLE_NAMES[state.peerRole]} ` +
    `ds:${DISK_STATE_NAMES[state.disk]}/${DISK_STATE_NAMES[state.peerDisk]} ${device.protocol} ${flags}\n`;
  const counters =
    `    ns:${kib(device.sentSectors)} nr:${kib(device.receivedSectors)} ` +
    `dw:${kib(device.writtenSectors)} dr:${kib(device.readSectors)} ` +
    `al:${device.activityLogWrites} bm:0 lo:${device.localInFlight} pe:${device.pending} ` +
    `ua:${device.unacknowledged} ap:${device.applicationInFlight} ep:${device.epochs} ` +
    `wo:${device.writeOrdering} oos:${device.bitsSet * KIB_PER_BIT}\n`;
  const hasProgress = state.connection >= ConnectionState.SyncSource && state.connection <= ConnectionState.VerifyT;
  return head + counters + (hasProgress && device.progress ? progressLines(device, device.progress) : '');
}

/**
 * All of /proc/drbd.
 * @param devices in ascending order of minor
 * @param buildLine second line, such as `srcversion: 059B1B470318F053F5077D5`
 * @param version first line's version, such as `8.4.11`
 */
export function formatProc(devices: readonly ProcDevice[], version: string, buildLine: string): string {
  let text = `version: ${version} (api:1/proto:86-101)\n${buildLine}\n`;
  let previous = -1;
  for (const device of devices) {
    if (device.minor !== previous + 1) text += '\n';
    text += deviceLines(device);
    previous = device.minor;
  }
  return text;
}
