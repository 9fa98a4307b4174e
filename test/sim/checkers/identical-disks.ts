import { wrongData } from '../failure.js';
import type { Head } from '../head.js';

/** Two connected UpToDate disks, once quiet, hold the same bytes. */
export function checkIdenticalDisks(alpha: Head, beta: Head): void {
  const length = alpha.status.sizeBytes;
  const at = alpha.data.firstDifference(beta.data, length);
  if (at >= 0) wrongData('identical disks', `alpha and beta differ at byte ${at} (sector ${Math.floor(at / 512)})`);
}
