/** What every NFS and MOUNT procedure stands on: from the bytes of a handle to an open tree and a squashed caller. */
import { AuthStatus } from '../rpc/auth.js';
import { AuthRefused, NotNow, type RpcCall } from '../rpc/dispatcher.js';
import type { Export, ExportOptions, ExportTable } from './export-table.js';
import { decodeHandle, isSameBytes, isWildcardGeneration } from './file-handle.js';
import type { Attributes, Credential, FileSystem, KernelHandle } from './filesystem.js';
import { FsErrno, NfsStatus, statusOfErrno } from './status.js';
import type { WriteVerifier } from './write-verifier.js';

/** The part of the ring's pool that procedures touch: READ payloads are padded in place. */
export interface PayloadMemory {
  readonly bytes: Uint8Array;
}

/** Requests of trees that are not there (takeover running, export withdrawn) wait this long, then get JUKEBOX. */
export interface HoldLimits {
  readonly maxHeldCalls: number;
  readonly holdMs: number;
}

/** Calls with more bytes than this (WRITEs) hold much memory: only a sixteenth of the held calls may be such. */
const LARGE_CALL_BYTES = 64 * 1024;
const LARGE_CALL_SHARE = 16;

export const HOLD_LIMITS: HoldLimits = { maxHeldCalls: 1024, holdMs: 10_000 };

/** An object of a served tree and its caller. Lives for one call. */
export class Target {
  constructor(
    private readonly service: NfsService,
    private readonly call: RpcCall,
    readonly entry: Export,
    readonly filesystem: FileSystem,
    readonly kernel: KernelHandle,
    readonly options: ExportOptions,
    readonly credential: Credential,
  ) {}

  get fsid(): bigint {
    return this.entry.fsid;
  }

  /** Modifications wait for stable storage. */
  get durable(): boolean {
    return this.options.sync;
  }

  get verifier(): WriteVerifier {
    return this.entry.verifier!;
  }

  get isRoot(): boolean {
    return isSameBytes(this.kernel, this.filesystem.rootHandle);
  }

  handleOf(kernel: KernelHandle): Uint8Array {
    return this.entry.handleOf(this.filesystem, kernel);
  }

  /**
   * The status of an operation on this object.
   * @throws NotNow when the tree was withdrawn under the operation, which then did nothing: ESTALE would be a lie
   */
  status(errno: number): number {
    if (errno === FsErrno.ESTALE && this.entry.filesystem !== this.filesystem)
      return this.service.hold(this.call, this.entry);
    return statusOfErrno(errno);
  }

  /**
   * As `status`, where the handle alone names the object: what is not there is a stale handle (RFC 1813 section 2.6).
   */
  statusOfHandle(errno: number): number {
    return this.status(errno === 2 ? FsErrno.ESTALE : errno);
  }

  /** The object's attributes now, for replies to requests that went no further. */
  async attributes(): Promise<Attributes | undefined> {
    return (await this.filesystem.getattr(this.kernel)).attributes;
  }
}

export class NfsService {
  private nowMs = 0;

  constructor(
    readonly exports: ExportTable,
    readonly memory: PayloadMemory,
    private readonly limits: HoldLimits = HOLD_LIMITS,
  ) {}

  /** Tells the time (monotonic milliseconds): a few times per second. */
  tick(nowMs: number): void {
    this.nowMs = nowMs;
    for (const entry of this.exports.list()) if (entry.waiting > 0) entry.wake();
  }

  /**
   * Opens a handle for the caller.
   * @param isOpenToAll the request may come without a credential if it is about an export's root (FSINFO, GETATTR while
   * mounting)
   * @returns the object, or an nfsstat3
   * @throws AuthRefused for a flavor or source port the export does not take; NotNow while the tree is not there
   */
  open(call: RpcCall, handle: Uint8Array, isOpenToAll = false): Target | number {
    const decoded = decodeHandle(handle);
    if (decoded === 'malformed') return NfsStatus.NFS3ERR_BADHANDLE;
    const entry = this.exports.get(decoded.exportId);
    if (entry === undefined) return NfsStatus.NFS3ERR_STALE;
    const options = entry.optionsFor(call.transport.address);
    if (options === undefined) return NfsStatus.NFS3ERR_ACCES;
    if (options.secure && call.transport.port >= 1024) throw new AuthRefused(AuthStatus.AUTH_TOOWEAK);
    const { filesystem } = entry;
    // The key comes with the tree: before that nobody can say whether the handle is good, only that it must wait.
    if (filesystem === undefined) return this.hold(call, entry);
    if (!entry.isSigned(handle)) return NfsStatus.NFS3ERR_STALE;
    const isRoot = isSameBytes(decoded.kernel, filesystem.rootHandle);
    const isAllowed = call.auth === undefined ? options.allowAuthNone : options.allowAuthSys;
    if (!isAllowed && !(isOpenToAll && isRoot)) throw new AuthRefused(AuthStatus.AUTH_TOOWEAK);
    if (!isSameBytes(decoded.filesystemId, filesystem.id)) return NfsStatus.NFS3ERR_STALE;
    if (isWildcardGeneration(decoded.kernel, filesystem.rootHandle)) return NfsStatus.NFS3ERR_STALE;
    const credential = entry.credentialFor(options, call.auth);
    return new Target(this, call, entry, filesystem, decoded.kernel, options, credential);
  }

  /**
   * Makes a call wait for its tree.
   * @returns JUKEBOX once it has waited long enough or too many wait
   */
  hold(call: RpcCall, entry: Export): number {
    if (this.exports.get(entry.id) !== entry) return NfsStatus.NFS3ERR_STALE;
    if (call.heldUntilMs === 0) {
      let held = 0;
      for (const other of this.exports.list()) held += other.waiting;
      const share = call.recordBytes > LARGE_CALL_BYTES ? LARGE_CALL_SHARE : 1;
      if (held >= this.limits.maxHeldCalls / share) return NfsStatus.NFS3ERR_JUKEBOX;
      call.heldUntilMs = this.nowMs + this.limits.holdMs;
    } else if (this.nowMs >= call.heldUntilMs) return NfsStatus.NFS3ERR_JUKEBOX;
    // Served again already (withdrawn and back while an operation ran): look again at once.
    throw new NotNow(entry.filesystem === undefined ? entry.changed() : Promise.resolve());
  }
}
