/** nfsstat3 (RFC 1813 section 2.6): the only table from errno to the wire. */
export const NfsStatus = {
  NFS3_OK: 0,
  NFS3ERR_PERM: 1,
  NFS3ERR_NOENT: 2,
  NFS3ERR_IO: 5,
  NFS3ERR_NXIO: 6,
  NFS3ERR_ACCES: 13,
  NFS3ERR_EXIST: 17,
  NFS3ERR_XDEV: 18,
  NFS3ERR_NODEV: 19,
  NFS3ERR_NOTDIR: 20,
  NFS3ERR_ISDIR: 21,
  NFS3ERR_INVAL: 22,
  NFS3ERR_FBIG: 27,
  NFS3ERR_NOSPC: 28,
  NFS3ERR_ROFS: 30,
  NFS3ERR_MLINK: 31,
  NFS3ERR_NAMETOOLONG: 63,
  NFS3ERR_NOTEMPTY: 66,
  NFS3ERR_DQUOT: 69,
  NFS3ERR_STALE: 70,
  NFS3ERR_REMOTE: 71,
  NFS3ERR_BADHANDLE: 10001,
  NFS3ERR_NOT_SYNC: 10002,
  NFS3ERR_BAD_COOKIE: 10003,
  NFS3ERR_NOTSUPP: 10004,
  NFS3ERR_TOOSMALL: 10005,
  NFS3ERR_SERVERFAULT: 10006,
  NFS3ERR_BADTYPE: 10007,
  NFS3ERR_JUKEBOX: 10008,
} as const;

/** `NFS3ERR_STALE` for 70; the number for one that RFC 1813 does not have. */
export function statusName(status: number): string {
  return Object.entries(NfsStatus).find(([, value]) => value === status)?.[0] ?? `nfsstat3 ${status}`;
}

/** Linux errno numbers that filesystems answer with, beside those of `base/errors.ts`. */
export const FsErrno = {
  EBADF: 9,
  EXDEV: 18,
  ENODEV: 19,
  ENOTDIR: 20,
  EISDIR: 21,
  ENXIO: 6,
  ENFILE: 23,
  EMFILE: 24,
  EMLINK: 31,
  EINTR: 4,
  ENAMETOOLONG: 36,
  ENOTEMPTY: 39,
  ELOOP: 40,
  EOVERFLOW: 75,
  ESTALE: 116,
  EDQUOT: 122,
  /** The kernel's own numbers for what NFS alone can say (include/linux/errno.h). */
  ENOTSYNC: 522,
  EBADCOOKIE: 523,
  EBADTYPE: 527,
} as const;

const STATUS_BY_ERRNO: ReadonlyMap<number, number> = new Map<number, number>([
  [0, NfsStatus.NFS3_OK],
  [1, NfsStatus.NFS3ERR_PERM],
  [2, NfsStatus.NFS3ERR_NOENT],
  [FsErrno.EINTR, NfsStatus.NFS3ERR_JUKEBOX],
  [5, NfsStatus.NFS3ERR_IO],
  [FsErrno.ENXIO, NfsStatus.NFS3ERR_NXIO],
  // A full table of this process or machine passes: the client waits and asks again (nothing was executed).
  [11, NfsStatus.NFS3ERR_JUKEBOX],
  [12, NfsStatus.NFS3ERR_JUKEBOX],
  [13, NfsStatus.NFS3ERR_ACCES],
  [16, NfsStatus.NFS3ERR_JUKEBOX],
  [17, NfsStatus.NFS3ERR_EXIST],
  [FsErrno.EXDEV, NfsStatus.NFS3ERR_XDEV],
  [FsErrno.ENODEV, NfsStatus.NFS3ERR_NODEV],
  [FsErrno.ENOTDIR, NfsStatus.NFS3ERR_NOTDIR],
  [FsErrno.EISDIR, NfsStatus.NFS3ERR_ISDIR],
  [22, NfsStatus.NFS3ERR_INVAL],
  [FsErrno.ENFILE, NfsStatus.NFS3ERR_JUKEBOX],
  [FsErrno.EMFILE, NfsStatus.NFS3ERR_JUKEBOX],
  [27, NfsStatus.NFS3ERR_FBIG],
  [28, NfsStatus.NFS3ERR_NOSPC],
  [30, NfsStatus.NFS3ERR_ROFS],
  [FsErrno.EMLINK, NfsStatus.NFS3ERR_MLINK],
  [FsErrno.ENAMETOOLONG, NfsStatus.NFS3ERR_NAMETOOLONG],
  [FsErrno.ENOTEMPTY, NfsStatus.NFS3ERR_NOTEMPTY],
  // A symbolic link where an object was expected: the server follows none.
  [FsErrno.ELOOP, NfsStatus.NFS3ERR_INVAL],
  [FsErrno.EOVERFLOW, NfsStatus.NFS3ERR_FBIG],
  [95, NfsStatus.NFS3ERR_NOTSUPP],
  [FsErrno.ESTALE, NfsStatus.NFS3ERR_STALE],
  [FsErrno.EDQUOT, NfsStatus.NFS3ERR_DQUOT],
  [FsErrno.ENOTSYNC, NfsStatus.NFS3ERR_NOT_SYNC],
  [FsErrno.EBADCOOKIE, NfsStatus.NFS3ERR_BAD_COOKIE],
  [FsErrno.EBADTYPE, NfsStatus.NFS3ERR_BADTYPE],
]);

/** Total: what is not in the table is NFS3ERR_IO. */
export function statusOfErrno(errno: number): number {
  return STATUS_BY_ERRNO.get(errno) ?? NfsStatus.NFS3ERR_IO;
}
