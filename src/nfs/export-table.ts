/**
 * Who may do what with which exported tree, and whether the tree is there now.
 *
 * The rules come from the operator's exports file; the trees come and go with the cluster's resources. A handle of an
 * export that is in the rules but not there yet (or not any more) is never stale: its requests wait.
 */
import { assert } from '../base/assert.js';
import { OperatorError } from '../base/errors.js';
import type { AuthSys } from '../rpc/auth.js';
import type { HandleSigner } from './file-handle.js';
import type { Credential, FileSystem, KernelHandle } from './filesystem.js';
import { squash } from './squash.js';
import { WriteVerifier } from './write-verifier.js';

/** What one client may do with one export. */
export interface ExportOptions {
  readonly writable: boolean;
  /** Answer modifications only once they are on stable storage. */
  readonly sync: boolean;
  /** Only from source ports below 1024. */
  readonly secure: boolean;
  readonly rootSquash: boolean;
  readonly allSquash: boolean;
  /** Not 4294967295. */
  readonly anonUid: number;
  readonly anonGid: number;
  /** AUTH_NONE callers are let in, as anonymous (sec=none). */
  readonly allowAuthNone: boolean;
  /** AUTH_SYS callers are let in with the identity they claim (sec=sys). */
  readonly allowAuthSys: boolean;
  readonly readdirPlus: boolean;
}

/** One exported directory, as the operator wrote it. */
export interface ExportRule {
  /** Absolute, without trailing or double slashes. */
  readonly path: string;
  /** `fsid=`: the number in handles and attributes; without it they are made from the path and the filesystem. */
  readonly fsid?: number;
  /** The client specifications, for EXPORT. */
  readonly clients: readonly string[];
  /** @returns undefined: this address may not even know that the export exists */
  optionsFor(address: string): ExportOptions | undefined;
}

/** 16 bits that depend on nothing but fsid or path, so that both heads and every order of lines agree. */
export function exportIdOf(rule: Pick<ExportRule, 'path' | 'fsid'>): number {
  if (rule.fsid !== undefined && rule.fsid < 0x10000) return rule.fsid;
  const text = rule.fsid !== undefined ? `fsid=${rule.fsid}` : rule.path;
  // FNV-1a: well known, so that another implementation can name the same export.
  let hash = 0x811c9dc5;
  for (const byte of new TextEncoder().encode(text)) hash = Math.imul(hash ^ byte, 0x01000193) >>> 0;
  return (hash >>> 16) ^ (hash & 0xffff);
}

/** Doubled and trailing slashes do not change what a path names; `.` and `..` are not resolved. */
export function normalizePath(path: string): string {
  const parts = path.split('/').filter((part) => part !== '');
  return `/${parts.join('/')}`;
}

const MAX_DECISIONS = 4096;

/** One exported directory and the tree behind it. */
export class Export {
  readonly id: number;
  /** The tree, while it is served. */
  filesystem: FileSystem | undefined;
  /** fattr3.fsid */
  fsid = 0n;
  verifier: WriteVerifier | undefined;
  private signer: HandleSigner | undefined;
  private rule: ExportRule;
  private readonly decisions = new Map<string, ExportOptions | null>();
  private identities = new WeakMap<ExportOptions, WeakMap<object, Credential>>();
  private waiters: (() => void)[] = [];

  constructor(rule: ExportRule) {
    this.id = exportIdOf(rule);
    this.rule = rule;
  }

  get path(): string {
    return this.rule.path;
  }

  get clients(): readonly string[] {
    return this.rule.clients;
  }

  /** Puts new rules in force; the tree and its handles stay. */
  replaceRule(rule: ExportRule): void {
    assert(exportIdOf(rule) === this.id, 'an export keeps its id');
    this.rule = rule;
    this.decisions.clear();
    this.identities = new WeakMap();
  }

  optionsFor(address: string): ExportOptions | undefined {
    const known = this.decisions.get(address);
    if (known !== undefined) return known ?? undefined;
    const options = this.rule.optionsFor(address);
    if (this.decisions.size >= MAX_DECISIONS) this.decisions.clear();
    this.decisions.set(address, options ?? null);
    return options;
  }

  /** The identity of a caller here. Derived once per decoded credential. */
  credentialFor(options: ExportOptions, auth: AuthSys | undefined): Credential {
    let byAuth = this.identities.get(options);
    if (byAuth === undefined) {
      byAuth = new WeakMap();
      this.identities.set(options, byAuth);
    }
    const key = auth ?? NOBODY;
    let credential = byAuth.get(key);
    if (credential === undefined) {
      credential = squash(options, auth);
      byAuth.set(key, credential);
    }
    return credential;
  }

  /** @param signer with the keys of this tree */
  serve(filesystem: FileSystem, signer: HandleSigner, random: () => Uint8Array): void {
    assert(this.filesystem === undefined, `${this.path} is served already`);
    this.filesystem = filesystem;
    this.signer = signer;
    this.fsid = this.rule.fsid !== undefined ? BigInt(this.rule.fsid) : fsidOfFilesystem(filesystem.id);
    this.verifier = new WriteVerifier(random);
    this.wake();
  }

  /** What a client gets for an object of the tree. Only while it is served. */
  handleOf(filesystem: FileSystem, kernel: KernelHandle): Uint8Array {
    return this.signer!.encode(this.id, filesystem.id, kernel);
  }

  /** Whether a handle of this export was made with the tree's key. */
  isSigned(handle: Uint8Array): boolean {
    return this.signer?.isSigned(handle) ?? false;
  }

  /** From now on requests wait. The tree is the caller's to withdraw. */
  withdraw(): FileSystem | undefined {
    const { filesystem } = this;
    this.filesystem = undefined;
    return filesystem;
  }

  /** Settles when something changed: served, removed, or `wake` by the clock. */
  changed(): Promise<void> {
    return new Promise((resolve) => this.waiters.push(resolve));
  }

  /** Lets waiting requests look again. */
  wake(): void {
    const { waiters } = this;
    this.waiters = [];
    for (const waiter of waiters) waiter();
  }

  get waiting(): number {
    return this.waiters.length;
  }
}

const NOBODY = {};

function fsidOfFilesystem(id: Uint8Array): bigint {
  return new DataView(id.buffer, id.byteOffset, 8).getBigUint64(0);
}

export class ExportTable {
  private byId = new Map<number, Export>();

  constructor(rules: readonly ExportRule[]) {
    this.replace(rules);
  }

  list(): readonly Export[] {
    return [...this.byId.values()];
  }

  get(id: number): Export | undefined {
    return this.byId.get(id);
  }

  byPath(path: string): Export | undefined {
    const wanted = normalizePath(path);
    for (const entry of this.byId.values()) if (entry.path === wanted) return entry;
    return undefined;
  }

  /** The export at `path` or the nearest one above it, and the rest of the path below it. */
  containing(path: string): { readonly entry: Export; readonly below: readonly string[] } | undefined {
    const parts = normalizePath(path)
      .split('/')
      .filter((part) => part !== '');
    for (let length = parts.length; length >= 0; length--) {
      const entry = this.byPath(`/${parts.slice(0, length).join('/')}`);
      if (entry !== undefined) return { entry, below: parts.slice(length) };
    }
    return undefined;
  }

  /**
   * Puts a whole new table in force, or none of it. Exports that stay keep their trees; the trees of those that went
   * are returned, to be withdrawn, and their handles are stale at once.
   * @throws OperatorError when two exports would have the same id
   */
  replace(rules: readonly ExportRule[]): readonly FileSystem[] {
    const next = new Map<number, ExportRule>();
    for (const rule of rules) {
      const id = exportIdOf(rule);
      const other = next.get(id);
      if (other !== undefined)
        throw new OperatorError(
          `exports ${other.path} and ${rule.path} have the same identity in file handles (${id}): give one of them ` +
            'another fsid= below 65536',
          10,
        );
      next.set(id, rule);
    }
    const table = new Map<number, Export>();
    for (const [id, rule] of next) {
      const known = this.byId.get(id);
      if (known !== undefined && known.path === rule.path) {
        known.replaceRule(rule);
        table.set(id, known);
      } else table.set(id, new Export(rule));
    }
    const gone = [...this.byId.values()].filter((entry) => table.get(entry.id) !== entry);
    this.byId = table;
    const trees: FileSystem[] = [];
    for (const entry of gone) {
      const tree = entry.withdraw();
      if (tree !== undefined) trees.push(tree);
      entry.wake();
    }
    return trees;
  }
}
