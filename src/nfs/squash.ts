/**
 * From the identity a call claims to the one it is judged with (exports(5): root_squash, all_squash; knfsd
 * nfsd_setuser).
 */
import type { AuthSys } from '../rpc/auth.js';
import type { ExportOptions } from './export-table.js';
import type { Credential } from './filesystem.js';

/** (u32)-1 means "leave unchanged" to setfsuid and chown: it must never reach them. */
const NO_ID = 0xffff_ffff;

/** @param auth undefined: AUTH_NONE, which is anonymous */
export function squash(options: ExportOptions, auth: AuthSys | undefined): Credential {
  const { anonUid, anonGid } = options;
  if (auth === undefined || options.allSquash) return { uid: anonUid, gid: anonGid, groups: [] };
  const isUidSquashed = auth.uid === NO_ID || (options.rootSquash && auth.uid === 0);
  const squashGid = (gid: number) => (gid === NO_ID || (options.rootSquash && gid === 0) ? anonGid : gid);
  return {
    uid: isUidSquashed ? anonUid : auth.uid,
    gid: squashGid(auth.gid),
    groups: auth.groups.map(squashGid),
  };
}
