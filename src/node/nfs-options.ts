import { readFileSync } from 'node:fs';
import { OperatorError } from '../base/errors.js';
import type { ExportTable } from '../config/exports.js';

/** What the daemon hands the NFS server, as JSON on its standard input or as its only argument. */
export interface NfsOptions {
  /** The parsed exports files; plain data. */
  readonly exports: ExportTable;
  readonly controlSocket: string;
  /** Addresses to listen on; default every IPv4 address. */
  readonly bind?: readonly string[];
  /** Default 2049, 20048, 111. 0 takes any free port. */
  readonly ports?: { readonly nfs?: number; readonly mount?: number; readonly portmap?: number };
  /**
   * `auto` (default): register with a running rpcbind, else serve the portmap port here; `register`, `own`: only the
   * one; `none`: neither (clients name the ports themselves).
   */
  readonly portmap?: 'auto' | 'register' | 'own' | 'none';
  /**
   * Keys of file handles, 32 hexadecimal digits each: the first signs, all are accepted. Default: each tree has its
   * own,
   * in `.drbdts/nfs-handle-keys` at the root of its filesystem, which is replicated; made when it is first served.
   */
  readonly handleKeys?: readonly string[];
  /** How long requests of a tree that is not there wait before they get JUKEBOX. Default 10 s. */
  readonly holdMs?: number;
  /** Size of the buffer pool; address space only until used. Default 1 GiB. */
  readonly poolBytes?: number;
}

/** The options of this process: the only argument, or standard input. */
export function readNfsOptions(argv: readonly string[]): NfsOptions {
  const text = argv[0] ?? readFileSync(0, 'utf8');
  try {
    return JSON.parse(text) as NfsOptions;
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error;
    throw new OperatorError(`the options of the NFS server are not JSON: ${error.message}`, 1, 'usage');
  }
}
