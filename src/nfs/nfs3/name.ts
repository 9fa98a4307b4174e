/** Names in directories (filename3). */
import { NfsStatus } from '../status.js';

/** Longer ones are no names at all but GARBAGE_ARGS; up to here clients expect NFS3ERR_NAMETOOLONG. */
export const MAX_WIRE_NAME_BYTES = 4096;
/** What every Linux filesystem takes. */
const MAX_NAME_BYTES = 255;
const DOT = 0x2e;
const SLASH = 0x2f;

/** NFS3_OK, or why no directory can have this name. */
export function checkName(name: Uint8Array): number {
  if (name.length === 0 || name.includes(0)) return NfsStatus.NFS3ERR_INVAL;
  if (name.includes(SLASH)) return NfsStatus.NFS3ERR_ACCES;
  return name.length > MAX_NAME_BYTES ? NfsStatus.NFS3ERR_NAMETOOLONG : NfsStatus.NFS3_OK;
}

export function isDot(name: Uint8Array): boolean {
  return name.length === 1 && name[0] === DOT;
}

export function isDotDot(name: Uint8Array): boolean {
  return name.length === 2 && name[0] === DOT && name[1] === DOT;
}

/** As checkName, for names that are to be made: `.` and `..` exist already. */
export function checkNewName(name: Uint8Array): number {
  return isDot(name) || isDotDot(name) ? NfsStatus.NFS3ERR_EXIST : checkName(name);
}
