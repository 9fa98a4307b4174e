import { Errno } from '../base/errors.js';

/** The only error numbers a reply may carry (proto.md "Error values"). They happen to be Linux's. */
export const NBD_SUCCESS = 0;
export const NBD_EPERM = 1;
export const NBD_EIO = 5;
export const NBD_ENOMEM = 12;
export const NBD_EINVAL = 22;
export const NBD_ENOSPC = 28;
export const NBD_EOVERFLOW = 75;
export const NBD_ENOTSUP = 95;
export const NBD_ESHUTDOWN = 108;

const EDQUOT = 122;

/**
 * The one table from an errno of ours (a door's or the engine's) to what the wire can say.
 *
 * ENOMEM is never sent: Linux turns any error into an I/O error, and a request we have no memory for waits instead.
 *
 * @param errno positive Linux errno, 0 for success
 */
export function nbdErrorOf(errno: number): number {
  switch (errno) {
    case 0:
      return NBD_SUCCESS;
    case Errno.EPERM:
    case Errno.EROFS:
    case Errno.EACCES:
      return NBD_EPERM;
    case Errno.EINVAL:
      return NBD_EINVAL;
    case Errno.ENOSPC:
    case Errno.EFBIG:
    case EDQUOT:
      return NBD_ENOSPC;
    case Errno.ESHUTDOWN:
      return NBD_ESHUTDOWN;
    default:
      return NBD_EIO;
  }
}
