import { wrongData } from '../failure.js';
import type { Head } from '../head.js';
import { versionOf } from '../sector-pattern.js';
import type { SectorModel } from './sector-model.js';

/** Every sector that was ever written holds something the application may find there. */
export function checkFinalContents(head: Head, volume: number, model: SectorModel): void {
  const bytes = new Uint8Array(512);
  for (const sector of model.knownSectors) {
    head.disks[volume]!.data.read(sector * 512, bytes);
    const version = versionOf(bytes, 0, sector);
    if (!model.isLegal(sector, version))
      wrongData(
        'no acknowledged write lost',
        `${head.name}/${volume} sector ${sector} holds ${version}: ${model.describe(sector)}`,
      );
  }
}
