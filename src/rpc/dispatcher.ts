/**
 * From a received record to a reply: validation in the order of RFC 5531 section 9, then the procedure that the
 * program's table names. Tables say what a procedure needs; nothing here knows NFS.
 */
import { AssertionError, assert } from '../base/assert.js';
import { AuthFlavor, AuthStatus, type AuthSys, type CredentialCache, decodeAuthSys } from './auth.js';
import {
  AcceptStatus,
  CALL,
  CallHeader,
  decodeCall,
  encodeAccepted,
  encodeAuthError,
  encodeRpcMismatch,
  RPC_VERSION,
} from './call.js';
import type { ReplyCache, ReplyCacheEntry } from './reply-cache.js';
import { type Codec, GarbageError, VOID, XdrReader, XdrWriter } from './xdr.js';

/** Bytes in front of a reply that the transport may use for its record mark. */
export const REPLY_ROOM_BYTES = 4;

/** Where a record came from and where its reply goes. */
export interface RpcTransport {
  readonly kind: 'tcp' | 'udp';
  /** The peer's address without port; IPv4 in dotted form also when it came through an IPv6 socket. */
  readonly address: string;
  readonly port: number;
  /** False once replies can no longer reach the peer. */
  readonly isOpen: boolean;
  readonly credentials: CredentialCache;
  /**
   * Takes a reply: it starts REPLY_ROOM_BYTES into `reply.bytes`, and may end in a pool payload, whose reference passes
   * to the transport. Everything else is only valid during the call. A closed transport ignores the reply.
   */
  send(reply: XdrWriter): void;
  /** The record handed to `dispatch` is no longer used. Called exactly once per record. */
  finished(record: number, lengthBytes: number): void;
  /** The peer sent what is no call. */
  malformed(reason: string): void;
}

/** One call while it is served. */
export class RpcCall {
  /** While an answer is held back (export not there yet): when to stop waiting, in the service's time. 0: not held. */
  heldUntilMs = 0;

  constructor(
    readonly transport: RpcTransport,
    readonly xid: number,
    /** Undefined: AUTH_NONE. */
    readonly auth: AuthSys | undefined,
    /** What the transport knows the record by. */
    readonly record: number,
    readonly recordBytes: number,
    /** Where the record's bytes lie; the ring's pool for TCP, so that positions in it are pool addresses. */
    readonly bytes: Uint8Array,
  ) {}
}

/** One row of a program's table. `S` is the program's service, `A` and `R` are arguments and results. */
export interface Procedure<S, A, R> {
  readonly name: string;
  readonly args: Codec<A>;
  readonly result: Codec<R>;
  /** Executed at most once per request: its reply is kept and sent again to a retransmission. */
  readonly replayable?: boolean;
  /** The result says "not executed, try later": such a reply is never kept. */
  readonly isTransient?: (result: R) => boolean;
  run(service: S, args: A, call: RpcCall): R | Promise<R>;
}

// biome-ignore lint/suspicious/noExplicitAny: rows differ in arguments and results; each is checked where it is written
export type AnyProcedure<S> = Procedure<S, any, any>;

/** A program at one version: procedures by number, holes undefined. */
export interface Program<S> {
  readonly name: string;
  readonly number: number;
  readonly version: number;
  readonly service: S;
  readonly procedures: readonly (AnyProcedure<S> | undefined)[];
}

/** Procedure 0 of every program: always succeeds, whoever asks (health checks ping with it). */
export const NULL_PROCEDURE: Procedure<unknown, void, void> = {
  name: 'NULL',
  args: VOID,
  result: VOID,
  run: () => {},
};

/** Thrown by a procedure: MSG_DENIED / AUTH_ERROR with this auth_stat. */
export class AuthRefused extends Error {
  override readonly name = 'AuthRefused';
  constructor(readonly status: number) {
    super(`auth_stat ${status}`);
  }
}

/** Thrown by a procedure that did nothing yet: run it again when `until` settles. */
export class NotNow extends Error {
  override readonly name = 'NotNow';
  constructor(readonly until: Promise<unknown>) {
    super('not now');
  }
}

/** Thrown by a procedure: no reply at all; the client will ask again. */
export class DropCall extends Error {
  override readonly name = 'DropCall';
}

// biome-ignore lint/suspicious/noExplicitAny: programs of different services share one dispatcher
type AnyProgram = Program<any>;

interface Row {
  readonly program: AnyProgram;
  readonly procedure: AnyProcedure<unknown>;
  /** Of program, version and procedure, for the reply cache. */
  readonly key: string;
  calls: number;
}

interface Versions {
  low: number;
  high: number;
  readonly byVersion: Map<number, readonly (Row | undefined)[]>;
}

export class Dispatcher {
  private readonly programs = new Map<number, Versions>();
  private readonly header = new CallHeader();
  private readonly reader = new XdrReader();
  private readonly writer = new XdrWriter();

  /**
   * @param fault told about exceptions that are bugs of ours but cost only one call (answered SYSTEM_ERR)
   */
  constructor(
    programs: readonly AnyProgram[],
    private readonly cache: ReplyCache<RpcTransport>,
    private readonly fault: (procedure: string, error: unknown) => void,
  ) {
    for (const program of programs) this.add(program);
  }

  private add(program: AnyProgram): void {
    let versions = this.programs.get(program.number);
    if (versions === undefined) {
      versions = { low: program.version, high: program.version, byVersion: new Map() };
      this.programs.set(program.number, versions);
    }
    assert(!versions.byVersion.has(program.version), `${program.name} version ${program.version} is registered twice`);
    versions.low = Math.min(versions.low, program.version);
    versions.high = Math.max(versions.high, program.version);
    versions.byVersion.set(
      program.version,
      program.procedures.map(
        (procedure, number) =>
          procedure && { program, procedure, key: `${program.number}.${program.version}.${number}`, calls: 0 },
      ),
    );
  }

  /** Calls so far: `NFS.GETATTR` → count. */
  counters(): Record<string, number> {
    const counters: Record<string, number> = {};
    for (const versions of this.programs.values())
      for (const rows of versions.byVersion.values())
        for (const row of rows)
          if (row !== undefined && row.calls > 0) {
            const name = `${row.program.name}${row.program.version}.${row.procedure.name}`;
            counters[name] = (counters[name] ?? 0) + row.calls;
          }
    return counters;
  }

  /**
   * Takes one record: `bytes[offset, offset + length)`, which stays untouched until `transport.finished(record,
   * length)`. Never throws for anything the bytes say. The reply may be sent before this returns.
   * @param view over the same memory as `bytes`
   */
  dispatch(
    transport: RpcTransport,
    bytes: Uint8Array,
    view: DataView,
    offset: number,
    length: number,
    record: number,
  ): void {
    const { reader, header } = this;
    reader.reset(bytes, view, offset, length);
    if (!decodeCall(reader, header) || header.messageType !== CALL) {
      transport.malformed(header.messageType === CALL ? 'a record too short to be a call' : 'a record that is no call');
      transport.finished(record, length);
      return;
    }
    const row = this.select(transport);
    if (row === undefined) {
      transport.finished(record, length);
      return;
    }
    this.begin(transport, row, bytes, record, length);
  }

  /** The row that the header names; undefined when a refusal was sent. */
  private select(transport: RpcTransport): Row | undefined {
    const { header } = this;
    const reply = this.fresh();
    if (header.rpcVersion !== RPC_VERSION) {
      encodeRpcMismatch(reply, header.xid);
      transport.send(reply);
      return undefined;
    }
    const isKnownFlavor = header.flavor === AuthFlavor.AUTH_NONE || header.flavor === AuthFlavor.AUTH_SYS;
    if (header.hasBadCredential || !isKnownFlavor) {
      encodeAuthError(reply, header.xid, AuthStatus.AUTH_BADCRED);
      transport.send(reply);
      return undefined;
    }
    const versions = this.programs.get(header.program);
    if (versions === undefined) {
      encodeAccepted(reply, header.xid, AcceptStatus.PROG_UNAVAIL);
      transport.send(reply);
      return undefined;
    }
    const rows = versions.byVersion.get(header.version);
    if (rows === undefined) {
      encodeAccepted(reply, header.xid, AcceptStatus.PROG_MISMATCH);
      reply.u32(versions.low);
      reply.u32(versions.high);
      transport.send(reply);
      return undefined;
    }
    const row = rows[header.procedure];
    if (row === undefined) {
      encodeAccepted(reply, header.xid, AcceptStatus.PROC_UNAVAIL);
      transport.send(reply);
    }
    return row;
  }

  private begin(transport: RpcTransport, row: Row, bytes: Uint8Array, record: number, length: number): void {
    const { header, reader } = this;
    row.calls++;
    let auth: AuthSys | undefined;
    let args: unknown;
    const argsStart = reader.position;
    try {
      if (header.flavor === AuthFlavor.AUTH_SYS) auth = this.credential(transport);
    } catch (error) {
      if (!(error instanceof GarbageError)) throw error;
      const reply = this.fresh();
      encodeAuthError(reply, header.xid, AuthStatus.AUTH_BADCRED);
      transport.send(reply);
      transport.finished(record, length);
      return;
    }
    reader.position = argsStart;
    try {
      args = row.procedure.args.decode(reader);
    } catch (error) {
      if (!(error instanceof GarbageError)) throw error;
      const reply = this.fresh();
      encodeAccepted(reply, header.xid, AcceptStatus.GARBAGE_ARGS);
      transport.send(reply);
      transport.finished(record, length);
      return;
    }
    let entry: ReplyCacheEntry<RpcTransport> | undefined;
    if (row.procedure.replayable) {
      // Behind the stamp: machine name, uid, gid and groups tell clients behind one address apart.
      const start = header.flavor === AuthFlavor.AUTH_SYS ? header.credentialStart + 4 : argsStart;
      const key = this.cache.keyOf(header.xid, row.key, bytes, start, reader.end);
      entry = this.cache.find(transport.address, key);
      if (entry !== undefined) {
        this.repeat(entry, transport);
        transport.finished(record, length);
        return;
      }
      entry = this.cache.insert(transport.address, key, transport);
    }
    void this.execute(new RpcCall(transport, header.xid, auth, record, length, bytes), row, args, entry);
  }

  private credential(transport: RpcTransport): AuthSys {
    const { header, reader } = this;
    const { credentialStart, credentialLength } = header;
    const known = transport.credentials.find(reader.bytes, credentialStart, credentialLength);
    if (known !== undefined) return known;
    const messageEnd = reader.end;
    reader.position = credentialStart;
    reader.end = credentialStart + credentialLength;
    try {
      const auth = decodeAuthSys(reader);
      transport.credentials.add(reader.bytes.subarray(credentialStart, credentialStart + credentialLength), auth);
      return auth;
    } finally {
      reader.end = messageEnd;
    }
  }

  /** A copy of a request: the newest copy's transport gets the reply, now or when the first one is done. */
  private repeat(entry: ReplyCacheEntry<RpcTransport>, transport: RpcTransport): void {
    entry.origin = transport;
    if (entry.reply === undefined) return;
    this.cache.replays++;
    const reply = this.fresh();
    reply.fixed(entry.reply);
    transport.send(reply);
  }

  /** Rejects only for broken invariants, which as unhandled rejections end the process. */
  private async execute(
    call: RpcCall,
    row: Row,
    args: unknown,
    entry: ReplyCacheEntry<RpcTransport> | undefined,
  ): Promise<void> {
    for (;;) {
      try {
        const result: unknown = await row.procedure.run(row.program.service, args, call);
        this.answer(call, row, result, entry);
        return;
      } catch (error) {
        if (error instanceof NotNow) {
          await error.until;
          // Its client is gone: executing it now could undo what the client did meanwhile over another connection.
          if ((entry?.origin ?? call.transport).isOpen) continue;
          this.drop(call, entry);
          return;
        }
        this.refuse(call, row, error, entry);
        return;
      }
    }
  }

  private answer(call: RpcCall, row: Row, result: unknown, entry: ReplyCacheEntry<RpcTransport> | undefined): void {
    const reply = this.fresh();
    encodeAccepted(reply, call.xid, AcceptStatus.SUCCESS);
    row.procedure.result.encode(reply, result);
    if (entry !== undefined) {
      assert(reply.payloadLength === 0, 'a replayable reply has no payload');
      if (row.procedure.isTransient?.(result)) this.cache.forget(entry);
      else this.cache.finish(entry, reply.message().subarray(REPLY_ROOM_BYTES));
    }
    (entry?.origin ?? call.transport).send(reply);
    call.transport.finished(call.record, call.recordBytes);
  }

  private refuse(call: RpcCall, row: Row, error: unknown, entry: ReplyCacheEntry<RpcTransport> | undefined): void {
    if (error instanceof AssertionError) throw error;
    if (!(error instanceof DropCall)) {
      const reply = this.fresh();
      if (error instanceof AuthRefused) encodeAuthError(reply, call.xid, error.status);
      else {
        this.fault(row.procedure.name, error);
        encodeAccepted(reply, call.xid, AcceptStatus.SYSTEM_ERR);
      }
      (entry?.origin ?? call.transport).send(reply);
    }
    this.drop(call, entry);
  }

  private drop(call: RpcCall, entry: ReplyCacheEntry<RpcTransport> | undefined): void {
    if (entry !== undefined) this.cache.forget(entry);
    call.transport.finished(call.record, call.recordBytes);
  }

  private fresh(): XdrWriter {
    const reply = this.writer.reset();
    reply.u32(0);
    return reply;
  }
}
