/**
 * The filesystem that the NFS programs call. `io/posix-filesystem.ts` implements it over the kernel (through the
 * addon's worker threads), tests over memory. Every operation runs with the caller's credential, so that the kernel
 * judges.
 *
 * No operation throws for what a client, disk or permission can cause: `errno` (Linux, positive; 0 is success) tells.
 * Attributes are present whenever they could be obtained, also on errors.
 */

/** Already squashed identity. `groups` at most 16 (AUTH_SYS) or what the server looked up. */
export interface Credential {
  readonly uid: number;
  readonly gid: number;
  readonly groups: readonly number[];
}

/** Kernel file handle: u32 LE handle type, then the bytes of name_to_handle_at(2). The same object on either head. */
export type KernelHandle = Uint8Array;

export interface TimeSpec {
  readonly seconds: number;
  readonly nanoseconds: number;
}

/** NFSv3 ftype3 numbers. */
export const FileType = { REG: 1, DIR: 2, BLK: 3, CHR: 4, LNK: 5, SOCK: 6, FIFO: 7 } as const;

export interface Attributes {
  readonly type: number;
  /** Permission bits incl. setuid, setgid, sticky (07777). */
  readonly mode: number;
  readonly linkCount: number;
  readonly uid: number;
  readonly gid: number;
  readonly sizeBytes: number;
  readonly usedBytes: number;
  readonly rdevMajor: number;
  readonly rdevMinor: number;
  readonly fileId: bigint;
  readonly atime: TimeSpec;
  readonly mtime: TimeSpec;
  readonly ctime: TimeSpec;
}

/**
 * What changed around an operation. `before` is only present if it is atomic with the operation (RFC 1813 section 2.6).
 */
export interface Wcc {
  readonly before?: { readonly sizeBytes: number; readonly mtime: TimeSpec; readonly ctime: TimeSpec };
  readonly after?: Attributes;
}

export interface SetAttributes {
  readonly mode?: number;
  readonly uid?: number;
  readonly gid?: number;
  readonly sizeBytes?: number;
  readonly atime?: 'now' | TimeSpec;
  readonly mtime?: 'now' | TimeSpec;
}

export interface Outcome {
  readonly errno: number;
}
export interface AttributesOutcome extends Outcome {
  readonly attributes?: Attributes;
}
export interface WccOutcome extends Outcome {
  readonly wcc: Wcc;
}
export interface LookupOutcome extends AttributesOutcome {
  readonly handle?: KernelHandle;
  readonly directory?: Attributes;
}
/** CREATE, MKDIR, SYMLINK, MKNOD: `wcc` is the directory's. */
export interface CreateOutcome extends LookupOutcome {
  readonly wcc: Wcc;
}
export interface ReadOutcome extends AttributesOutcome {
  /** Pool block holding the data (the caller owns one reference), or -1 when there is none. */
  readonly payload: number;
  readonly count: number;
  readonly eof: boolean;
}
/** NFSv3 stable_how numbers. */
export const Stability = { UNSTABLE: 0, DATA_SYNC: 1, FILE_SYNC: 2 } as const;
export interface WriteOutcome extends WccOutcome {
  readonly count: number;
  readonly committed: number;
}
export interface DirectoryEntry {
  readonly fileId: bigint;
  readonly name: Uint8Array;
  /** Position after this entry; nonzero, stable across restarts and heads (the kernel's d_off). */
  readonly cookie: bigint;
  /** Only for `readdirPlus`, and only when the entry could be looked at. */
  readonly handle?: KernelHandle;
  readonly attributes?: Attributes;
}
export interface ReaddirOutcome extends AttributesOutcome {
  readonly entries: readonly DirectoryEntry[];
  readonly eof: boolean;
}
export interface FsStatOutcome extends AttributesOutcome {
  readonly totalBytes: number;
  readonly freeBytes: number;
  readonly availableBytes: number;
  readonly totalFiles: number;
  readonly freeFiles: number;
  readonly availableFiles: number;
}
export interface PathconfOutcome extends AttributesOutcome {
  readonly linkMax: number;
  readonly nameMax: number;
}
export type CreateHow =
  | { readonly kind: 'unchecked' | 'guarded'; readonly attributes: SetAttributes }
  /** The verifier is kept with the file, in mtime and atime seconds (as knfsd does). */
  | { readonly kind: 'exclusive'; readonly verifier: Uint8Array };

/**
 * One exported filesystem, open. `durable` on modifying operations: answered only once on stable storage (export
 * `sync`). Names are raw bytes without `/` and NUL, not empty; `.` and `..` are allowed in `lookup` only.
 */
export interface FileSystem {
  /** Identity that is the same on both heads (8 bytes, from the filesystem's UUID). */
  readonly id: Uint8Array;
  readonly maxFileSizeBytes: number;
  readonly rootHandle: KernelHandle;
  getattr(handle: KernelHandle): Promise<AttributesOutcome>;
  setattr(
    credential: Credential,
    handle: KernelHandle,
    changes: SetAttributes,
    guardCtime: TimeSpec | undefined,
    durable: boolean,
  ): Promise<WccOutcome>;
  lookup(credential: Credential, directory: KernelHandle, name: Uint8Array): Promise<LookupOutcome>;
  /** Answers with the subset of `mask` (RFC 1813 ACCESS3_*) that is granted. */
  access(credential: Credential, handle: KernelHandle, mask: number): Promise<AttributesOutcome & { granted: number }>;
  readlink(credential: Credential, handle: KernelHandle): Promise<AttributesOutcome & { target?: Uint8Array }>;
  read(credential: Credential, handle: KernelHandle, offsetBytes: number, count: number): Promise<ReadOutcome>;
  /** Data: `count` bytes at pool address `address` (inside a block that the caller holds until the promise settles). */
  write(
    credential: Credential,
    handle: KernelHandle,
    offsetBytes: number,
    address: number,
    count: number,
    stability: number,
  ): Promise<WriteOutcome>;
  create(
    credential: Credential,
    directory: KernelHandle,
    name: Uint8Array,
    how: CreateHow,
    durable: boolean,
  ): Promise<CreateOutcome>;
  mkdir(
    credential: Credential,
    directory: KernelHandle,
    name: Uint8Array,
    attributes: SetAttributes,
    durable: boolean,
  ): Promise<CreateOutcome>;
  symlink(
    credential: Credential,
    directory: KernelHandle,
    name: Uint8Array,
    target: Uint8Array,
    attributes: SetAttributes,
    durable: boolean,
  ): Promise<CreateOutcome>;
  mknod(
    credential: Credential,
    directory: KernelHandle,
    name: Uint8Array,
    type: number,
    attributes: SetAttributes,
    rdevMajor: number,
    rdevMinor: number,
    durable: boolean,
  ): Promise<CreateOutcome>;
  remove(credential: Credential, directory: KernelHandle, name: Uint8Array, durable: boolean): Promise<WccOutcome>;
  rmdir(credential: Credential, directory: KernelHandle, name: Uint8Array, durable: boolean): Promise<WccOutcome>;
  rename(
    credential: Credential,
    fromDirectory: KernelHandle,
    fromName: Uint8Array,
    toDirectory: KernelHandle,
    toName: Uint8Array,
    durable: boolean,
  ): Promise<Outcome & { readonly from: Wcc; readonly to: Wcc }>;
  /** `wcc` is the directory's, `attributes` the file's. */
  link(
    credential: Credential,
    handle: KernelHandle,
    directory: KernelHandle,
    name: Uint8Array,
    durable: boolean,
  ): Promise<WccOutcome & AttributesOutcome>;
  /**
   * At most `maxEntries` entries after `cookie` (0: from the start), without `.` and `..` left out: both are included.
   */
  readdir(
    credential: Credential,
    directory: KernelHandle,
    cookie: bigint,
    maxEntries: number,
    plus: boolean,
  ): Promise<ReaddirOutcome>;
  fsstat(credential: Credential, handle: KernelHandle): Promise<FsStatOutcome>;
  pathconf(handle: KernelHandle): Promise<PathconfOutcome>;
  commit(credential: Credential, handle: KernelHandle): Promise<WccOutcome>;
  /**
   * Ends every operation in flight, closes every descriptor; afterwards each call answers ESTALE. When it resolves,
   * nothing of this process holds the mount, so that umount succeeds.
   */
  withdraw(): Promise<void>;
}
