/** Whose mistake a protocol error is: `local` is ours (a bug), `remote` came from the wire. */
export type Blame = 'local' | 'remote';

/**
 * A violation of a wire protocol. Ends the connection it happened on, and nothing else.
 *
 * `code` is stable and greppable (`DRBDTS_NBD_BAD_MAGIC`); `section` says where the violated rule stands
 * (`proto.md "Fixed newstyle negotiation"`, `RFC 5531 section 9`, `DRBD 8.4 drbd_receiver.c decode_header`).
 */
export class ProtocolError extends Error {
  override readonly name = 'ProtocolError';
  constructor(
    readonly code: string,
    message: string,
    readonly section: string,
    readonly blame: Blame = 'remote',
  ) {
    super(message);
  }
}

/** Metadata that cannot be what it should be: torn, foreign, too small. `code` as in ProtocolError. */
export class MetadataError extends Error {
  override readonly name = 'MetadataError';
  constructor(
    readonly code: string,
    message: string,
  ) {
    super(message);
  }
}

/**
 * What an operator must read: a sentence that says what is wrong and what to do next, and the exit code of the command.
 * Exit codes are drbdadm's (0 ok, 1 usage, 5, 10 config, 11 refused, 16 no disk, 17 no UpToDate data, 20 cannot run).
 */
export class OperatorError extends Error {
  override readonly name = 'OperatorError';
  constructor(
    message: string,
    readonly exitCode: number,
    readonly reason: string = 'failed',
  ) {
    super(message);
  }
}

/** Errno numbers of Linux used across drbdts. Doors report failures as these (positive) numbers; 0 is success. */
export const Errno = {
  EPERM: 1,
  ENOENT: 2,
  EIO: 5,
  EAGAIN: 11,
  ENOMEM: 12,
  EACCES: 13,
  EBUSY: 16,
  EEXIST: 17,
  EINVAL: 22,
  EFBIG: 27,
  ENOSPC: 28,
  EROFS: 30,
  EMSGSIZE: 90,
  EOPNOTSUPP: 95,
  ECONNRESET: 104,
  ESHUTDOWN: 108,
  ETIMEDOUT: 110,
  EMEDIUMTYPE: 124,
} as const;
