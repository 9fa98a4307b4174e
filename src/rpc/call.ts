/** RPC message headers in both directions (RFC 5531 sections 8 and 9). */
import { ProtocolError } from '../base/errors.js';
import { AuthFlavor, AuthStatus, type AuthSys, encodeAuthSys, MAX_AUTH_BYTES } from './auth.js';
import { type XdrReader, XdrWriter } from './xdr.js';

export const CALL = 0;
export const REPLY = 1;
export const RPC_VERSION = 2;

/** reply_stat */
export const ReplyStatus = { MSG_ACCEPTED: 0, MSG_DENIED: 1 } as const;
/** reject_stat */
export const RejectStatus = { RPC_MISMATCH: 0, AUTH_ERROR: 1 } as const;
/** accept_stat */
export const AcceptStatus = {
  SUCCESS: 0,
  PROG_UNAVAIL: 1,
  PROG_MISMATCH: 2,
  PROC_UNAVAIL: 3,
  GARBAGE_ARGS: 4,
  SYSTEM_ERR: 5,
} as const;

/** Header of a call. One object is reused per dispatcher: fields are overwritten by the next decodeCall. */
export class CallHeader {
  xid = 0;
  messageType = CALL;
  rpcVersion = 0;
  program = 0;
  version = 0;
  procedure = 0;
  flavor = 0;
  /** Position and length of the credential's body in the reader's bytes. */
  credentialStart = 0;
  credentialLength = 0;
  /** The credential's or verifier's announced length is above 400, or it does not fit: AUTH_BADCRED. */
  hasBadCredential = false;
}

/**
 * Decodes a call up to its arguments: `reader` stands at the first of them afterwards, unless `hasBadCredential`, or
 * the message is no version 2 call (then nothing behind the version is decoded).
 *
 * @returns false if the message is too short to be a call at all
 */
export function decodeCall(reader: XdrReader, header: CallHeader): boolean {
  if (reader.remaining < 8) return false;
  header.xid = reader.u32();
  header.messageType = reader.u32();
  if (header.messageType !== CALL) return true;
  if (reader.remaining < 4) return false;
  header.rpcVersion = reader.u32();
  if (header.rpcVersion !== RPC_VERSION) return true;
  if (reader.remaining < 12) return false;
  header.program = reader.u32();
  header.version = reader.u32();
  header.procedure = reader.u32();
  header.hasBadCredential = true;
  if (reader.remaining < 8) return true;
  header.flavor = reader.u32();
  header.credentialLength = reader.u32();
  if (header.credentialLength > MAX_AUTH_BYTES || header.credentialLength > reader.remaining) return true;
  header.credentialStart = reader.position;
  if (((header.credentialLength + 3) & ~3) > reader.remaining) return true;
  reader.skip(header.credentialLength);
  if (reader.remaining < 8) return true;
  reader.u32();
  const verifierLength = reader.u32();
  if (verifierLength > MAX_AUTH_BYTES || ((verifierLength + 3) & ~3) > reader.remaining) return true;
  reader.skip(verifierLength);
  header.hasBadCredential = false;
  return true;
}

/** Writes a call up to its arguments. `auth` undefined: AUTH_NONE. The verifier is AUTH_NONE. */
export function encodeCall(
  writer: XdrWriter,
  xid: number,
  program: number,
  version: number,
  procedure: number,
  auth: AuthSys | undefined,
): void {
  writer.u32(xid);
  writer.u32(CALL);
  writer.u32(RPC_VERSION);
  writer.u32(program);
  writer.u32(version);
  writer.u32(procedure);
  if (auth === undefined) {
    writer.u32(AuthFlavor.AUTH_NONE);
    writer.u32(0);
  } else {
    writer.u32(AuthFlavor.AUTH_SYS);
    const body = new XdrWriter(64 + 4 * auth.groups.length + auth.machineName.length);
    encodeAuthSys(body, auth);
    writer.opaque(body.message());
  }
  writer.u32(AuthFlavor.AUTH_NONE);
  writer.u32(0);
}

/** MSG_ACCEPTED with an AUTH_NONE verifier; SUCCESS is followed by the results, PROG_MISMATCH by low and high. */
export function encodeAccepted(writer: XdrWriter, xid: number, status: number): void {
  writer.u32(xid);
  writer.u32(REPLY);
  writer.u32(ReplyStatus.MSG_ACCEPTED);
  writer.u32(AuthFlavor.AUTH_NONE);
  writer.u32(0);
  writer.u32(status);
}

export function encodeRpcMismatch(writer: XdrWriter, xid: number): void {
  writer.u32(xid);
  writer.u32(REPLY);
  writer.u32(ReplyStatus.MSG_DENIED);
  writer.u32(RejectStatus.RPC_MISMATCH);
  writer.u32(RPC_VERSION);
  writer.u32(RPC_VERSION);
}

export function encodeAuthError(writer: XdrWriter, xid: number, status: number): void {
  writer.u32(xid);
  writer.u32(REPLY);
  writer.u32(ReplyStatus.MSG_DENIED);
  writer.u32(RejectStatus.AUTH_ERROR);
  writer.u32(status);
}

/** A reply that says that the call was not even tried, for a client to report. */
export class RpcRefusedError extends ProtocolError {
  constructor(
    readonly kind: 'prog-unavail' | 'prog-mismatch' | 'proc-unavail' | 'garbage-args' | 'system-err' | 'denied',
    message: string,
  ) {
    super('DRBDTS_RPC_REFUSED', message, 'RFC 5531 section 9');
  }
}

/**
 * Decodes a reply up to its results.
 * @returns the xid; `reader` stands at the results of a successful call
 * @throws RpcRefusedError for every other reply, GarbageError for no reply at all
 */
export function decodeReply(reader: XdrReader): number {
  const xid = reader.u32();
  reader.enumeration(REPLY, REPLY);
  if (reader.enumeration(1) === ReplyStatus.MSG_DENIED) {
    if (reader.enumeration(1) === RejectStatus.RPC_MISMATCH)
      throw new RpcRefusedError('denied', `the server speaks RPC versions ${reader.u32()} to ${reader.u32()} only`);
    const reason = reader.u32();
    const text: Record<number, string> = {
      [AuthStatus.AUTH_BADCRED]: 'the credential is malformed',
      [AuthStatus.AUTH_REJECTEDCRED]: 'the credential is rejected',
      [AuthStatus.AUTH_TOOWEAK]: 'it wants a stronger credential, or a source port below 1024',
    };
    throw new RpcRefusedError('denied', `the server refuses the caller: ${text[reason] ?? `auth_stat ${reason}`}`);
  }
  reader.u32();
  reader.opaque(MAX_AUTH_BYTES);
  const status = reader.u32();
  switch (status) {
    case AcceptStatus.SUCCESS:
      return xid;
    case AcceptStatus.PROG_UNAVAIL:
      throw new RpcRefusedError('prog-unavail', 'the server does not serve this program');
    case AcceptStatus.PROG_MISMATCH:
      throw new RpcRefusedError('prog-mismatch', `the server has versions ${reader.u32()} to ${reader.u32()} only`);
    case AcceptStatus.PROC_UNAVAIL:
      throw new RpcRefusedError('proc-unavail', 'the server does not have this procedure');
    case AcceptStatus.GARBAGE_ARGS:
      throw new RpcRefusedError('garbage-args', 'the server could not decode the arguments');
    default:
      throw new RpcRefusedError('system-err', `the server failed (accept_stat ${status})`);
  }
}
