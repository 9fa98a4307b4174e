/** Contents of sectors: every written sector tells its version and its place, in every word. */

/** All zero: never written, or zeroed. */
export const VERSION_ZERO = 0;
/** No version: torn, foreign, or of another sector. */
export const VERSION_GARBAGE = -2;

const WORDS = 128;

export function fillSector(bytes: Uint8Array, offset: number, sector: number, version: number): void {
  const view = new DataView(bytes.buffer, bytes.byteOffset + offset, WORDS * 4);
  for (let word = 0; word < WORDS; word += 2) {
    view.setUint32(word * 4, version, true);
    view.setUint32(word * 4 + 4, sector ^ 0x5eed, true);
  }
}

export function versionOf(bytes: Uint8Array, offset: number, sector: number): number {
  const view = new DataView(bytes.buffer, bytes.byteOffset + offset, WORDS * 4);
  const version = view.getUint32(0, true);
  const second = version === 0 ? 0 : (sector ^ 0x5eed) >>> 0;
  for (let word = 0; word < WORDS; word += 2) {
    if (view.getUint32(word * 4, true) !== version || view.getUint32(word * 4 + 4, true) !== second)
      return VERSION_GARBAGE;
  }
  return version;
}
