/** From the configuration's resource to the runtime's options. */
import { OperatorError } from '../base/errors.js';
import type { ResolvedResource } from '../config/resource.js';
import { SPLIT_BRAIN_POLICY_BY_NAME } from '../replication/split-brain.js';
import type { ResourceOptions } from './resource-runtime.js';

const WIRE_PROTOCOL = { A: 1, B: 2, C: 3 } as const;

/** @throws OperatorError (10) for what the resource asks for and the engine does not have */
export function runtimeOptions(resource: ResolvedResource): ResourceOptions {
  const { net } = resource;
  // To leave it out silently would promise a check that nobody makes, and a peer that makes it refuses us anyway.
  if (net.dataIntegrityAlg !== undefined)
    throw new OperatorError(
      `${resource.name}: drbdts does not have data-integrity-alg (${net.dataIntegrityAlg}). ` +
        'Remove it from the net section on both heads.',
      10,
      'not-supported',
    );
  const policies = SPLIT_BRAIN_POLICY_BY_NAME;
  return {
    name: resource.name,
    self: { host: resource.self.address.host, port: resource.self.address.port },
    peer: { host: resource.peer.address.host, port: resource.peer.address.port },
    net: {
      wireProtocol: WIRE_PROTOCOL[resource.protocol],
      timeoutMs: net.timeoutMs,
      koCount: net.koCount,
      pingIntervalMs: net.pingIntMs,
      pingTimeoutMs: net.pingTimeoutMs,
      maxBuffers: net.maxBuffersPages,
      maxEpochWrites: net.maxEpochSizeWrites,
      useRle: net.useRle,
      twoPrimaries: net.allowTwoPrimaries,
      afterSplitBrain0Primaries: policies['after-sb-0pri'][net.afterSb0pri]!,
      afterSplitBrain1Primary: policies['after-sb-1pri'][net.afterSb1pri]!,
      afterSplitBrain2Primaries: policies['after-sb-2pri'][net.afterSb2pri]!,
      alwaysAfterSplitBrain: net.alwaysAsbp,
      resyncRoleConflict: policies['rr-conflict'][net.rrConflict]!,
      verifyAlgorithm: net.verifyAlg ?? '',
      checksumAlgorithm: net.csumsAlg ?? '',
      connectIntervalMs: net.connectIntMs,
      socketCheckMs: net.socketCheckTimeoutMs,
      sendBufferBytes: net.sndbufSizeBytes,
      receiveBufferBytes: net.rcvbufSizeBytes,
      ...(net.cramHmacAlg ? { authentication: { algorithm: net.cramHmacAlg, secret: net.sharedSecret ?? '' } } : {}),
    },
    volumes: resource.volumes.map((volume) => {
      const disk = volume.diskOptions;
      return {
        number: volume.number,
        minor: volume.minor,
        userSizeSectors: disk.sizeSectors,
        alExtents: disk.alExtents,
        onIoError: disk.onIoError,
        fencing: disk.fencing,
        suspendOnNoData: resource.options.onNoDataAccessible === 'suspend-io',
        diskFlushes: disk.diskFlushes,
        resyncRateKibPerSecond: disk.resyncRateKiBps,
        planAheadTenths: disk.cPlanAheadMs / 100,
        delayTargetTenths: disk.cDelayTargetMs / 100,
        fillTargetSectors: disk.cFillTargetSectors,
        maxRateKibPerSecond: disk.cMaxRateKiBps,
        minRateKibPerSecond: disk.cMinRateKiBps,
      };
    }),
  };
}
