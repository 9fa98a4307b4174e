/**
 * Numbers of the NBD protocol, in the spelling of `doc/proto.md` of NetworkBlockDevice/nbd, so that grep finds both.
 * All integers on the wire are big-endian.
 */

/** "NBDMAGIC", "IHAVEOPT" and the magic of option replies, as the two 32-bit halves in which we read and write them. */
export const NBD_MAGIC = [0x4e42444d, 0x41474943] as const;
export const NBD_OPTION_MAGIC = [0x49484156, 0x454f5054] as const;
export const NBD_OPTION_REPLY_MAGIC = [0x0003e889, 0x045565a9] as const;

export const NBD_REQUEST_MAGIC = 0x25609513;
export const NBD_SIMPLE_REPLY_MAGIC = 0x67446698;
export const NBD_STRUCTURED_REPLY_MAGIC = 0x668e33ef;

/** Handshake flags of the server, and the flags a client answers with (same bits). */
export const NBD_FLAG_FIXED_NEWSTYLE = 1 << 0;
export const NBD_FLAG_NO_ZEROES = 1 << 1;

export const NBD_OPT_EXPORT_NAME = 1;
export const NBD_OPT_ABORT = 2;
export const NBD_OPT_LIST = 3;
export const NBD_OPT_STARTTLS = 5;
export const NBD_OPT_INFO = 6;
export const NBD_OPT_GO = 7;
export const NBD_OPT_STRUCTURED_REPLY = 8;
export const NBD_OPT_LIST_META_CONTEXT = 9;
export const NBD_OPT_SET_META_CONTEXT = 10;

export const NBD_REP_ACK = 1;
export const NBD_REP_SERVER = 2;
export const NBD_REP_INFO = 3;
export const NBD_REP_META_CONTEXT = 4;
export const NBD_REP_ERR_UNSUP = 0x80000001;
export const NBD_REP_ERR_POLICY = 0x80000002;
export const NBD_REP_ERR_INVALID = 0x80000003;
export const NBD_REP_ERR_UNKNOWN = 0x80000006;
export const NBD_REP_ERR_SHUTDOWN = 0x80000007;
export const NBD_REP_ERR_TOO_BIG = 0x80000009;

export const NBD_INFO_EXPORT = 0;
export const NBD_INFO_NAME = 1;
export const NBD_INFO_DESCRIPTION = 2;
export const NBD_INFO_BLOCK_SIZE = 3;

/** Transmission flags (u16), sent with the size of an export. */
export const NBD_FLAG_HAS_FLAGS = 1 << 0;
export const NBD_FLAG_READ_ONLY = 1 << 1;
export const NBD_FLAG_SEND_FLUSH = 1 << 2;
export const NBD_FLAG_SEND_FUA = 1 << 3;
export const NBD_FLAG_ROTATIONAL = 1 << 4;
export const NBD_FLAG_SEND_TRIM = 1 << 5;
export const NBD_FLAG_SEND_WRITE_ZEROES = 1 << 6;
export const NBD_FLAG_SEND_DF = 1 << 7;
export const NBD_FLAG_CAN_MULTI_CONN = 1 << 8;
export const NBD_FLAG_SEND_CACHE = 1 << 10;
export const NBD_FLAG_SEND_FAST_ZERO = 1 << 11;

export const NBD_CMD_READ = 0;
export const NBD_CMD_WRITE = 1;
export const NBD_CMD_DISC = 2;
export const NBD_CMD_FLUSH = 3;
export const NBD_CMD_TRIM = 4;
export const NBD_CMD_CACHE = 5;
export const NBD_CMD_WRITE_ZEROES = 6;
export const NBD_CMD_BLOCK_STATUS = 7;

export const NBD_CMD_FLAG_FUA = 1 << 0;
export const NBD_CMD_FLAG_NO_HOLE = 1 << 1;
export const NBD_CMD_FLAG_DF = 1 << 2;
export const NBD_CMD_FLAG_REQ_ONE = 1 << 3;
export const NBD_CMD_FLAG_FAST_ZERO = 1 << 4;

export const NBD_REPLY_FLAG_DONE = 1 << 0;
export const NBD_REPLY_TYPE_NONE = 0;
export const NBD_REPLY_TYPE_OFFSET_DATA = 1;
export const NBD_REPLY_TYPE_BLOCK_STATUS = 5;
export const NBD_REPLY_TYPE_ERROR = 0x8001;

/** States of the `base:allocation` context. */
export const NBD_STATE_HOLE = 1 << 0;
export const NBD_STATE_ZERO = 1 << 1;

export const BASE_ALLOCATION = 'base:allocation';
/** The id we give `base:allocation` in SET_META_CONTEXT; clients treat it as opaque. */
export const BASE_ALLOCATION_ID = 1;

/** Strings on the wire are at most this long (proto.md "Conventions", a MUST). */
export const NBD_MAX_STRING_BYTES = 4096;

/** Our own limits: what an unauthenticated client may make us hold, skip or do before it has chosen an export. */
export const MAX_OPTION_BYTES = 16 * 1024;
export const MAX_SKIPPED_OPTION_BYTES = 64 * 1024;
export const MAX_OPTIONS = 256;
export const MAX_META_QUERIES = 64;
/** Texts of ours in option errors: QEMU once asserted over a longer one of its own making (CVE-2020-10761). */
export const MAX_ERROR_TEXT_BYTES = 256;

/** READ and WRITE carry at most this much; longer payloads are skipped, and beyond the hard cap the connection ends. */
export const MAX_PAYLOAD_BYTES = 64 * 1024 * 1024;
export const HARD_CAP_PAYLOAD_BYTES = 128 * 1024 * 1024;

/** Advertised in NBD_INFO_BLOCK_SIZE to those who ask. Requests that do not keep to it are still served. */
export const MINIMUM_BLOCK_BYTES = 512;
export const PREFERRED_BLOCK_BYTES = 4096;
export const MAXIMUM_BLOCK_BYTES = 32 * 1024 * 1024;
