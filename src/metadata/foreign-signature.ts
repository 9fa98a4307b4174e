/** What a device holds besides DRBD metadata, as far as its first bytes tell. */
export interface ForeignData {
  /** The words DRBD's tools use for it. */
  readonly name: string;
  /** KiB the filesystem occupies from the start of the device, if its superblock says so. */
  readonly usedKib?: number;
}

/** Bytes from the start of a device that `findForeignData` looks at. */
export const SIGNATURE_BYTES = 128 * 1024;

const KIB = 1024;

/**
 * Looks for filesystems, swap, and LVM at the start of a device, then for anything that is not zero.
 *
 * @param head the first SIGNATURE_BYTES of the device, or fewer if it is smaller; untrusted
 * @see util-linux libblkid superblocks; DRBD drbdmeta.c check_for_existing_data
 */
export function findForeignData(head: Uint8Array): ForeignData | undefined {
  const view = new DataView(head.buffer, head.byteOffset, head.byteLength);
  const textAt = (offset: number, length: number) =>
    offset + length <= head.byteLength ? String.fromCharCode(...head.subarray(offset, offset + length)) : '';
  const has = (offset: number) => offset <= head.byteLength;

  // ext: superblock at 1 KiB; a journal makes it ext3 (ext4 is not told apart, as in the original).
  if (has(KIB + 0x64) && view.getUint16(KIB + 0x38, true) === 0xef53) {
    const blocks = view.getUint32(KIB + 4, true);
    const is64Bit = (view.getUint32(KIB + 0x60, true) & 0x80) !== 0 && has(KIB + 0x154);
    const blocksHigh = is64Bit ? view.getUint32(KIB + 0x150, true) : 0;
    const blockKib = 2 ** Math.min(view.getUint32(KIB + 0x18, true), 16);
    const hasJournal = (view.getUint32(KIB + 0x5c, true) & 0x4) !== 0;
    return {
      name: hasJournal ? 'ext3 filesystem' : 'ext2 filesystem',
      usedKib: (blocksHigh * 2 ** 32 + blocks) * blockKib,
    };
  }
  if (textAt(0, 4) === 'XFSB' && has(16))
    return {
      name: 'xfs filesystem',
      usedKib: Math.ceil((view.getUint32(4) * Number(view.getBigUint64(8))) / KIB),
    };
  for (const offset of [64 * KIB, 8 * KIB])
    if (/^ReIsEr(Fs|2Fs|3Fs)/.test(textAt(offset + 52, 8)))
      return {
        name: 'reiser filesystem',
        usedKib: (view.getUint32(offset, true) * view.getUint16(offset + 44, true)) / KIB,
      };
  if (textAt(32 * KIB, 4) === 'JFS1' && has(32 * KIB + 24))
    return {
      name: 'JFS filesystem',
      usedKib: Math.ceil((Number(view.getBigUint64(32 * KIB + 8, true)) * view.getUint32(32 * KIB + 20, true)) / KIB),
    };
  if (textAt(64 * KIB + 64, 8) === '_BHRfS_M' && has(64 * KIB + 120))
    return { name: 'btrfs filesystem', usedKib: Math.ceil(Number(view.getBigUint64(64 * KIB + 112, true)) / KIB) };
  for (const page of [4 * KIB, 8 * KIB, 16 * KIB, 64 * KIB])
    if (['SWAPSPACE2', 'SWAP-SPACE'].includes(textAt(page - 10, 10))) return { name: 'swap space signature' };
  for (let sector = 0; sector < 4; sector++)
    if (textAt(sector * 512, 8) === 'LABELONE' && textAt(sector * 512 + 24, 8) === 'LVM2 001')
      return { name: 'LVM2 physical volume signature' };
  return head.every((byte) => byte === 0) ? undefined : { name: 'some data' };
}
