/** Flavors of RPC credentials (RFC 5531 section 8.2 and appendix A). */
import { GarbageError, type XdrReader, type XdrWriter } from './xdr.js';

export const AuthFlavor = { AUTH_NONE: 0, AUTH_SYS: 1 } as const;

/** auth_stat, the reasons of MSG_DENIED / AUTH_ERROR (RFC 5531 section 9). */
export const AuthStatus = { AUTH_BADCRED: 1, AUTH_REJECTEDCRED: 2, AUTH_BADVERF: 3, AUTH_TOOWEAK: 5 } as const;

/** Longest body of a credential or verifier (RFC 5531 section 8.2). */
export const MAX_AUTH_BYTES = 400;
const MAX_MACHINE_NAME_BYTES = 255;
const MAX_GROUPS = 16;

/** Who a call says it comes from. Nothing here is proven: any host can claim any uid. */
export interface AuthSys {
  readonly stamp: number;
  /** For logs and to tell clients behind one address apart; never for access. */
  readonly machineName: string;
  readonly uid: number;
  readonly gid: number;
  readonly groups: readonly number[];
}

/** @throws GarbageError for a name above 255 bytes, more than 16 groups, or trailing bytes missing (AUTH_BADCRED) */
export function decodeAuthSys(reader: XdrReader): AuthSys {
  const stamp = reader.u32();
  const machineName = reader.text(MAX_MACHINE_NAME_BYTES);
  const uid = reader.u32();
  const gid = reader.u32();
  const count = reader.u32();
  if (count > MAX_GROUPS) throw new GarbageError(`AUTH_SYS with ${count} groups, at most 16`, 'RFC 5531 appendix A');
  const groups: number[] = [];
  for (let i = 0; i < count; i++) groups.push(reader.u32());
  return { stamp, machineName, uid, gid, groups };
}

export function encodeAuthSys(writer: XdrWriter, auth: AuthSys): void {
  writer.u32(auth.stamp);
  writer.text(auth.machineName);
  writer.u32(auth.uid);
  writer.u32(auth.gid);
  writer.u32(auth.groups.length);
  for (const group of auth.groups) writer.u32(group);
}

/**
 * Credentials one peer sent before. A client sends the same bytes with every call of a user, so decoding once per
 * connection and user is enough, and the decoded object's identity lets others cache what they derived from it.
 */
export class CredentialCache {
  private readonly entries: { bytes: Uint8Array; auth: AuthSys }[] = [];
  private next = 0;

  /** @param body the credential's body within `reader`: from `start`, `length` bytes */
  find(bytes: Uint8Array, start: number, length: number): AuthSys | undefined {
    for (const entry of this.entries) if (isSame(entry.bytes, bytes, start, length)) return entry.auth;
    return undefined;
  }

  add(body: Uint8Array, auth: AuthSys): void {
    this.entries[this.next] = { bytes: body.slice(), auth };
    this.next = (this.next + 1) % MAX_CACHED;
  }
}

const MAX_CACHED = 8;

function isSame(known: Uint8Array, bytes: Uint8Array, start: number, length: number): boolean {
  if (known.length !== length) return false;
  for (let i = 0; i < length; i++) if (known[i] !== bytes[start + i]) return false;
  return true;
}
