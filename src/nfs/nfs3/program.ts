import { NULL_PROCEDURE, type Program } from '../../rpc/dispatcher.js';
import type { NfsService } from '../service.js';
import { ACCESS } from './access.js';
import { COMMIT } from './commit.js';
import { CREATE } from './create.js';
import { FSINFO } from './fsinfo.js';
import { FSSTAT } from './fsstat.js';
import { GETATTR } from './getattr.js';
import { LINK } from './link.js';
import { LOOKUP } from './lookup.js';
import { MKDIR } from './mkdir.js';
import { MKNOD } from './mknod.js';
import { PATHCONF } from './pathconf.js';
import { READ } from './read.js';
import { READDIR } from './readdir.js';
import { READDIRPLUS } from './readdirplus.js';
import { READLINK } from './readlink.js';
import { REMOVE } from './remove.js';
import { RENAME } from './rename.js';
import { RMDIR } from './rmdir.js';
import { SETATTR } from './setattr.js';
import { SYMLINK } from './symlink.js';
import { WRITE } from './write.js';

export const NFS_PROGRAM = 100003;
export const NFS_PORT = 2049;

/** RFC 1813 section 3.3 in procedure order; the dispatcher reads the flags. */
export const NFS3_PROCEDURES = [
  /*  0 */ NULL_PROCEDURE,
  /*  1 */ GETATTR,
  /*  2 */ SETATTR,
  /*  3 */ LOOKUP,
  /*  4 */ ACCESS,
  /*  5 */ READLINK,
  /*  6 */ READ,
  /*  7 */ WRITE,
  /*  8 */ CREATE,
  /*  9 */ MKDIR,
  /* 10 */ SYMLINK,
  /* 11 */ MKNOD,
  /* 12 */ REMOVE,
  /* 13 */ RMDIR,
  /* 14 */ RENAME,
  /* 15 */ LINK,
  /* 16 */ READDIR,
  /* 17 */ READDIRPLUS,
  /* 18 */ FSSTAT,
  /* 19 */ FSINFO,
  /* 20 */ PATHCONF,
  /* 21 */ COMMIT,
] as const;

export function nfs3Program(service: NfsService): Program<NfsService> {
  return { name: 'NFS', number: NFS_PROGRAM, version: 3, service, procedures: NFS3_PROCEDURES };
}
