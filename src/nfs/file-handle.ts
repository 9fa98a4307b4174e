/**
 * File handles: what a client keeps for an object, good on either head, after a restart and after a rename.
 *
 *   0       format version, 1
 *   1       flags, 0
 *   2..3    export id
 *   4..11   identity of the filesystem (the same on both heads)
 *   12..    kernel handle: u32 LE type, then the bytes of name_to_handle_at(2); 12 bytes on ext4
 *   last 8  SipHash-2-4 over everything before, with the tree's key (which lies in the tree, so both heads have it)
 *
 * At most 56 bytes, because one client (VMware ESXi) takes no more. The MAC keeps clients from naming objects that they
 * were never shown; it does not replace the check of the export on every request.
 */
import { assert } from '../base/assert.js';
import { type SipKey, sipHash } from '../rpc/siphash.js';
import type { KernelHandle } from './filesystem.js';

/** NFS3_FHSIZE: the longest handle XDR lets through. */
export const MAX_HANDLE_BYTES = 64;
const VERSION = 1;
const KERNEL_OFFSET = 12;
const MAC_BYTES = 8;
const MAX_OWN_HANDLE_BYTES = 56;
const MIN_OWN_HANDLE_BYTES = KERNEL_OFFSET + 4 + MAC_BYTES;
/** FILEID_INO32_GEN, what ext4 uses: u32 inode number, u32 generation. */
const FILEID_INO32_GEN = 1;

const hash = new Int32Array(2);

export interface FileHandle {
  readonly exportId: number;
  /** Views of the handle's bytes. */
  readonly filesystemId: Uint8Array;
  readonly kernel: KernelHandle;
}

/** Takes a handle apart without believing it: which export's key must have signed it stands in it. */
export function decodeHandle(bytes: Uint8Array): FileHandle | 'malformed' {
  const { length } = bytes;
  if (length < MIN_OWN_HANDLE_BYTES || length > MAX_OWN_HANDLE_BYTES) return 'malformed';
  if (bytes[0] !== VERSION || bytes[1] !== 0) return 'malformed';
  const kernel = bytes.subarray(KERNEL_OFFSET, length - MAC_BYTES);
  return { exportId: (bytes[2]! << 8) | bytes[3]!, filesystemId: bytes.subarray(4, KERNEL_OFFSET), kernel };
}

/** Makes and checks handles with a tree's keys: the first signs, all verify (so a key can be replaced). */
export class HandleSigner {
  constructor(private readonly keys: readonly SipKey[]) {
    assert(keys.length > 0, 'file handles need a key');
  }

  encode(exportId: number, filesystemId: Uint8Array, kernel: KernelHandle): Uint8Array {
    const macOffset = KERNEL_OFFSET + kernel.length;
    assert(filesystemId.length === 8, 'a filesystem identity has 8 bytes');
    assert(kernel.length >= 4 && macOffset + MAC_BYTES <= MAX_OWN_HANDLE_BYTES, 'the kernel handle has 4 to 36 bytes');
    const bytes = new Uint8Array(macOffset + MAC_BYTES);
    const view = new DataView(bytes.buffer);
    bytes[0] = VERSION;
    view.setUint16(2, exportId);
    bytes.set(filesystemId, 4);
    bytes.set(kernel, KERNEL_OFFSET);
    sipHash(this.keys[0]!, bytes, 0, macOffset, hash);
    view.setInt32(macOffset, hash[0]!, true);
    view.setInt32(macOffset + 4, hash[1]!, true);
    return bytes;
  }

  /**
   * Whether one of the keys signed the handle. Compares without a data-dependent branch, so that time does not tell how
   * many bytes of a guess are right.
   */
  isSigned(bytes: Uint8Array): boolean {
    const macOffset = bytes.length - MAC_BYTES;
    for (const key of this.keys) {
      sipHash(key, bytes, 0, macOffset, hash);
      let difference = 0;
      for (let i = 0; i < MAC_BYTES; i++)
        difference |= bytes[macOffset + i]! ^ ((hash[i >> 2]! >>> (8 * (i & 3))) & 255);
      if (difference === 0) return true;
    }
    return false;
  }
}

/**
 * A generation of 0 makes ext4 open whatever inode has the number now. Only the root directory has it by right.
 * @param root the root's kernel handle
 */
export function isWildcardGeneration(kernel: KernelHandle, root: KernelHandle): boolean {
  if (kernel.length !== 12 || kernel[0] !== FILEID_INO32_GEN || kernel[1] !== 0 || kernel[2] !== 0) return false;
  const hasGeneration = (kernel[8]! | kernel[9]! | kernel[10]! | kernel[11]!) !== 0;
  return !hasGeneration && !isSameBytes(kernel, root);
}

export function isSameBytes(a: Uint8Array, b: Uint8Array): boolean {
  if (a.length !== b.length) return false;
  for (let i = 0; i < a.length; i++) if (a[i] !== b[i]) return false;
  return true;
}
