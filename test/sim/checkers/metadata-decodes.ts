import { replayActivityLog } from '../../../src/metadata/activity-log.js';
import { checkSuperblockLayout, decodeSuperblock } from '../../../src/metadata/superblock.js';
import type { Platter } from '../disk.js';
import { SimulationFailure, wrongData } from '../failure.js';
import type { Head } from '../head.js';

/** After any crash superblock and activity log decode; at most the block being written is torn. */
export function checkMetadataDecodes(head: Head): void {
  for (const { meta } of head.disks) checkOne(head, meta);
}

function checkOne(head: Head, platter: Platter): void {
  const { layout } = head;
  try {
    const block = new Uint8Array(4096);
    platter.read(layout.superblockSector * 512, block);
    checkSuperblockLayout(decodeSuperblock(block), layout);
    const area = new Uint8Array(layout.alBlocks * 4096);
    platter.read(layout.activityLogSector * 512, area);
    const replay = replayActivityLog(area, layout.alStripes, layout.alStripeSize4k);
    if (replay.corruptBlocks > 1)
      wrongData('metadata decodes', `${head.name}: ${replay.corruptBlocks} torn log blocks`);
  } catch (error) {
    if (error instanceof SimulationFailure) throw error;
    wrongData('metadata decodes', `${head.name}: ${(error as Error).message}`);
  }
}
