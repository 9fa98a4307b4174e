import { wrongData } from '../failure.js';
import type { Head } from '../head.js';

/** Two connected UpToDate disks, once quiet, hold the same bytes. */
export function checkIdenticalDisks(alpha: Head, beta: Head, volume: number): void {
  const length = alpha.statuses[volume]!.sizeBytes;
  const at = alpha.disks[volume]!.data.firstDifference(beta.disks[volume]!.data, length);
  if (at >= 0)
    wrongData(
      'identical disks',
      `volume ${volume}: alpha and beta differ at byte ${at} (sector ${Math.floor(at / 512)})`,
    );
}
