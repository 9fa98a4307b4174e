import { wrongData } from '../failure.js';
import type { Head } from '../head.js';
import { versionOf } from '../sector-pattern.js';
import type { SectorModel } from './sector-model.js';

/** At the moment a write is acknowledged over a whole connection, the peer's disk has it (protocol C). */
export function checkReplicatedBeforeReply(
  peer: Head,
  volume: number,
  model: SectorModel,
  sector: number,
  sectors: number,
): void {
  const bytes = new Uint8Array(512);
  for (let at = sector; at < sector + sectors; at++) {
    peer.disks[volume]!.data.read(at * 512, bytes);
    const version = versionOf(bytes, 0, at);
    if (version >= 0 && !model.isLegal(at, version))
      wrongData(
        'replicated before reply',
        `${peer.name}/${volume} sector ${at} holds ${version}: ${model.describe(at)}`,
      );
  }
}
