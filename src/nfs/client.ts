/**
 * The client's side of MOUNT, NFSv3 and the port mapper: typed calls over anything that carries records. No sockets
 * here.
 */
import { OperatorError } from '../base/errors.js';
import type { AuthSys } from '../rpc/auth.js';
import { decodeReply, encodeCall } from '../rpc/call.js';
import type { Procedure } from '../rpc/dispatcher.js';
import { MAPPING, type Mapping, PORT, PORTMAP_PROGRAM, PortmapProcedure } from '../rpc/portmap.js';
import { type Codec, GarbageError, VOID, XdrReader, XdrWriter } from '../rpc/xdr.js';
import type { Attributes, CreateHow, SetAttributes } from './filesystem.js';
import { MNT } from './mount3/mnt.js';
import { EXPORT_LIST, type ExportListEntry, MOUNT_PROGRAM, type MountResult, MountStatus } from './mount3/results.js';
import { COMMIT, type CommitResult } from './nfs3/commit.js';
import { CREATE, type CreateArgs } from './nfs3/create.js';
import { FSINFO, type FsinfoLimits } from './nfs3/fsinfo.js';
import { GETATTR } from './nfs3/getattr.js';
import { LOOKUP } from './nfs3/lookup.js';
import { NFS_PROGRAM, NFS3_PROCEDURES } from './nfs3/program.js';
import { READ, type ReadResult } from './nfs3/read.js';
import { READDIRPLUS, type WireEntryPlus } from './nfs3/readdirplus.js';
import { READLINK } from './nfs3/readlink.js';
import { SETATTR } from './nfs3/setattr.js';
import { WRITE, type WriteResult } from './nfs3/write.js';
import type { NfsService } from './service.js';
import { NfsStatus, statusName } from './status.js';

/** Carries one call record and brings its reply. */
export type Transmit = (record: Uint8Array) => Promise<Uint8Array>;

/** A failed NFS operation, as an operator reads it. */
export class NfsError extends OperatorError {
  constructor(
    readonly status: number,
    what: string,
  ) {
    super(`${what}: ${statusName(status)}`, status === NfsStatus.NFS3ERR_JUKEBOX ? 5 : 20, statusName(status));
  }
}

/** Calls over one connection: transaction numbers, credential, decoding. */
export class RpcCaller {
  private readonly writer = new XdrWriter();

  /** @param nextXid where the transaction numbers start; random, or two runs of a client may be taken for one */
  constructor(
    private readonly transmit: Transmit,
    private readonly auth: AuthSys | undefined,
    private nextXid: number,
  ) {}

  /** @throws RpcRefusedError when the server did not execute it, GarbageError when the reply makes no sense */
  async call<A, R>(
    program: number,
    version: number,
    procedure: number,
    args: Codec<A>,
    value: A,
    result: Codec<R>,
  ): Promise<R> {
    this.nextXid = (this.nextXid + 1) >>> 0;
    const writer = this.writer.reset();
    encodeCall(writer, this.nextXid, program, version, procedure, this.auth);
    args.encode(writer, value);
    const reader = XdrReader.over(await this.transmit(writer.message().slice()));
    decodeReply(reader);
    return result.decode(reader);
  }
}

/** @returns the port, or 0 if the program is not registered */
export function askPort(caller: RpcCaller, mapping: Mapping): Promise<number> {
  return caller.call(PORTMAP_PROGRAM, 2, PortmapProcedure.GETPORT, MAPPING, mapping, PORT);
}

const MOUNT_MNT = 1;
const MOUNT_EXPORT = 5;

export function askExports(caller: RpcCaller): Promise<readonly ExportListEntry[]> {
  return caller.call(MOUNT_PROGRAM, 3, MOUNT_EXPORT, VOID, undefined, EXPORT_LIST);
}

/** @returns the handle of the exported directory. @throws OperatorError when the server refuses */
export async function mount(caller: RpcCaller, path: string): Promise<Uint8Array> {
  const result: MountResult = await caller.call(MOUNT_PROGRAM, 3, MOUNT_MNT, MNT.args, path, MNT.result);
  if (result.handle !== undefined) return result.handle;
  const name = Object.entries(MountStatus).find(([, value]) => value === result.status)?.[0] ?? result.status;
  throw new OperatorError(`the server does not mount ${path} for this host: ${name}`, 20, 'mount');
}

export interface FoundObject {
  readonly handle: Uint8Array;
  readonly attributes: Attributes;
}

const NEVER = Uint8Array.of(0, 0, 0, 0, 0, 0, 0, 0);
const LISTING_BYTES = 64 * 1024;

/** NFSv3 operations. Those that fail throw NfsError. */
export class Nfs3Client {
  /**
   * @param pause waits before an operation that got JUKEBOX is tried again
   */
  constructor(
    private readonly caller: RpcCaller,
    private readonly pause: () => Promise<void>,
  ) {}

  async getattr(handle: Uint8Array, what: string): Promise<Attributes> {
    const result = await this.call(GETATTR, { handle }, what);
    if (result.attributes === undefined) throw new GarbageError('GETATTR succeeded without attributes');
    return result.attributes;
  }

  async lookup(directory: Uint8Array, name: string, what: string): Promise<FoundObject> {
    const result = await this.call(LOOKUP, { directory, name: encodeName(name) }, what);
    if (result.handle === undefined) throw new GarbageError('LOOKUP succeeded without a handle');
    return { handle: result.handle, attributes: result.attributes ?? (await this.getattr(result.handle, what)) };
  }

  async fsinfo(handle: Uint8Array): Promise<FsinfoLimits> {
    const result = await this.call(FSINFO, { handle }, 'FSINFO');
    if (result.limits === undefined) throw new GarbageError('FSINFO succeeded without limits');
    return result.limits;
  }

  async readlink(handle: Uint8Array, what: string): Promise<string> {
    const result = await this.call(READLINK, { handle }, what);
    return new TextDecoder().decode(result.target);
  }

  read(handle: Uint8Array, offsetBytes: number, count: number, what: string): Promise<ReadResult> {
    return this.call(READ, { handle, offsetBytes, count }, what);
  }

  write(
    handle: Uint8Array,
    offsetBytes: number,
    data: Uint8Array,
    stability: number,
    what: string,
  ): Promise<WriteResult> {
    return this.call(WRITE, { handle, offsetBytes, count: data.length, stability, data, address: 0 }, what);
  }

  commit(handle: Uint8Array, what: string): Promise<CommitResult> {
    return this.call(COMMIT, { handle, offsetBytes: 0, count: 0 }, what);
  }

  /** Creates or opens a file; an existing one keeps its mode, and its content unless `attributes` has a size. */
  async create(directory: Uint8Array, name: string, how: CreateHow, what: string): Promise<FoundObject> {
    const args: CreateArgs = { directory, name: encodeName(name), how };
    const { handle, attributes } = await this.call(CREATE, args, what);
    if (handle === undefined) return this.lookup(directory, name, what);
    return { handle, attributes: attributes ?? (await this.getattr(handle, what)) };
  }

  async setattr(handle: Uint8Array, changes: SetAttributes, what: string): Promise<void> {
    await this.call(SETATTR, { handle, changes, guard: undefined }, what);
  }

  /** Every entry of a directory, in the server's order. */
  async *list(directory: Uint8Array, what: string): AsyncGenerator<WireEntryPlus> {
    let cookie = 0n;
    let verifier: Uint8Array = NEVER;
    for (;;) {
      const args = { directory, cookie, verifier, directoryCount: LISTING_BYTES, maxCount: LISTING_BYTES };
      const result = await this.call(READDIRPLUS, args, what);
      yield* result.entries;
      if (result.eof) return;
      const last = result.entries.at(-1);
      if (last === undefined) throw new GarbageError('a listing goes on without entries', 'RFC 1813 section 3.3.17');
      cookie = last.cookie;
      verifier = result.verifier;
    }
  }

  private async call<A, R extends { readonly status: number }>(
    procedure: Procedure<NfsService, A, R>,
    args: A,
    what: string,
  ): Promise<R> {
    const number = (NFS3_PROCEDURES as readonly unknown[]).indexOf(procedure);
    for (;;) {
      const result = await this.caller.call(NFS_PROGRAM, 3, number, procedure.args, args, procedure.result);
      if (result.status === NfsStatus.NFS3_OK) return result;
      if (result.status !== NfsStatus.NFS3ERR_JUKEBOX) throw new NfsError(result.status, what);
      await this.pause();
    }
  }
}

function encodeName(name: string): Uint8Array {
  return new TextEncoder().encode(name);
}
