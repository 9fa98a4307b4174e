import type { ResolvedResource } from '../config/resource.js';

/** What `drbdts status --json` prints per resource; the daemon gathers it from the engines. Sizes in bytes. */
export interface ResourceStatus {
  readonly name: string;
  readonly role: string;
  readonly peerRole: string;
  readonly nodeName: string;
  readonly peerName: string;
  /** DRBD 8.4's connection state word (`Connected`, `WFConnection`, `SyncSource` ...). */
  readonly connectionState: string;
  /** Why it is StandAlone or not connected, in a sentence; empty when there is nothing to say. */
  readonly reason: string;
  readonly peerAddress: string;
  /** Why the engine cannot be asked; everything that only it knows is then `Unknown`, `DUnknown` or 0. */
  readonly engineFault?: string;
  /** With `engineFault`: it has ended, rather than being slow. */
  readonly engineEnded?: boolean;
  readonly suspended: boolean;
  readonly writeOrdering: string;
  readonly devices: readonly VolumeStatus[];
}

export interface VolumeStatus {
  readonly volume: number;
  readonly minor: number;
  /** `/dev/drbd0`, or empty while the kernel has no device of it. */
  readonly device: string;
  readonly backingDisk: string;
  readonly connectionState: string;
  readonly diskState: string;
  readonly peerDiskState: string;
  readonly sizeBytes: number;
  readonly outOfSyncBytes: number;
  /** Only during a resync. */
  readonly resync?: ResyncStatus;
  readonly counters: VolumeCounters;
  /** Current, bitmap, two history UUIDs: 16 upper-case hex digits each. */
  readonly generationIdentifiers: readonly string[];
}

export interface ResyncStatus {
  readonly donePercent: number;
  readonly leftBytes: number;
  readonly totalBytes: number;
  readonly speedBytesPerSecond: number;
  readonly finishSeconds: number;
}

/** /proc/drbd's numbers: ns, nr, dw, dr in KiB; the rest are counts. */
export interface VolumeCounters {
  readonly sentKiB: number;
  readonly receivedKiB: number;
  readonly writtenKiB: number;
  readonly readKiB: number;
  readonly activityLogWrites: number;
  readonly localPending: number;
  readonly peerPending: number;
  readonly unacknowledged: number;
  readonly applicationPending: number;
}

/** What a head knows of a resource whose engine cannot be asked. */
export function statusWithoutEngine(resource: ResolvedResource, fault: string, ended: boolean): ResourceStatus {
  const { self, peer } = resource;
  return {
    name: resource.name,
    role: 'Unknown',
    peerRole: 'Unknown',
    nodeName: self.host,
    peerName: peer.host,
    connectionState: 'Unknown',
    reason: fault,
    peerAddress: `${peer.address.host}:${peer.address.port}`,
    engineFault: fault,
    engineEnded: ended,
    suspended: false,
    writeOrdering: 'none',
    devices: resource.volumes.map((volume) => ({
      volume: volume.number,
      minor: volume.minor,
      device: '',
      backingDisk: volume.disk,
      connectionState: 'Unknown',
      diskState: 'DUnknown',
      peerDiskState: 'DUnknown',
      sizeBytes: 0,
      outOfSyncBytes: 0,
      counters: NO_COUNTERS,
      generationIdentifiers: [],
    })),
  };
}

const NO_COUNTERS: VolumeCounters = {
  ...{ sentKiB: 0, receivedKiB: 0, writtenKiB: 0, readKiB: 0, activityLogWrites: 0 },
  ...{ localPending: 0, peerPending: 0, unacknowledged: 0, applicationPending: 0 },
};
