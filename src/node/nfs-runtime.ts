/**
 * The NFS server of one head: listeners, programs, exported trees, and the control channel by which the daemon opens
 * and withdraws them. `docs/internals/nfs.md` describes the channel.
 */
import { randomBytes } from 'node:crypto';
import { stat } from 'node:fs/promises';
import { createConnection } from 'node:net';
import { networkInterfaces } from 'node:os';
import { dirname } from 'node:path';
import type { Logger } from 'pino';
import { Errno, OperatorError } from '../base/errors.js';
import type { ExportTable as ConfiguredExports } from '../config/exports.js';
import type { JsonHandlers } from '../io/json-lines.js';
import type { Ring } from '../io/ring.js';
import { type Export, ExportTable, normalizePath } from '../nfs/export-table.js';
import { HandleSigner } from '../nfs/file-handle.js';
import type { FileSystem } from '../nfs/filesystem.js';
import { MountService, mountPrograms } from '../nfs/mount3/program.js';
import { MOUNT_PORT, MOUNT_PROGRAM } from '../nfs/mount3/results.js';
import { MAX_RECORD_BYTES } from '../nfs/nfs3/fsinfo.js';
import { NFS_PORT, NFS_PROGRAM, nfs3Program } from '../nfs/nfs3/program.js';
import { HOLD_LIMITS, NfsService } from '../nfs/service.js';
import { WRITE_VERIFIER_BYTES } from '../nfs/write-verifier.js';
import { Dispatcher, type RpcTransport } from '../rpc/dispatcher.js';
import {
  type Mapping,
  PORTMAP_PORT,
  PORTMAP_PROGRAM,
  PortmapService,
  Protocol,
  portmapPrograms,
} from '../rpc/portmap.js';
import { ReplyCache } from '../rpc/reply-cache.js';
import { SipKey } from '../rpc/siphash.js';
import { HostNames, mountPointOf, rulesOf, unsupportedClients } from './export-rules.js';
import { readHandleKeys, mountPointOf as rootOfFilesystem } from './handle-keys.js';
import type { NfsOptions } from './nfs-options.js';
import { PortmapClient } from './portmap-client.js';
import { RpcServer } from './rpc-server.js';

/** What the runtime cannot do itself. */
export interface NfsDoors {
  readonly ring: Pick<Ring, 'listenTcp' | 'memory' | 'backend'>;
  openFileSystem(path: string): FileSystem | Promise<FileSystem>;
  readonly log: Logger;
}

const TICK_MS = 100;
const SERVER_TICK_MS = 1000;
const RESOLVE_MS = 60_000;
/** Per minute. */
const MAX_PEER_WARNINGS = 60;
const KEY_BYTES = 16;
const PROBE_TIMEOUT_MS = 1000;

export class NfsRuntime {
  readonly ports = { nfs: 0, mount: 0, portmap: 0 };
  private configured: ConfiguredExports;
  private readonly names = new HostNames();
  private readonly exports: ExportTable;
  private readonly service: NfsService;
  private readonly cache: ReplyCache<RpcTransport>;
  private readonly server: RpcServer;
  private readonly nfs: Dispatcher;
  private readonly mount: Dispatcher;
  private readonly portmap: Dispatcher;
  private readonly mapper: PortmapService;
  private readonly timers: NodeJS.Timeout[] = [];
  private registered: readonly Mapping[] = [];
  private readonly configuredSigner: HandleSigner | undefined;
  private peerWarnings = 0;
  /** Trees being opened; a withdrawal meanwhile takes its export out. */
  private readonly opening = new Set<Export>();

  constructor(
    private readonly options: NfsOptions,
    private readonly doors: NfsDoors,
  ) {
    const { ring, log } = doors;
    this.configured = options.exports;
    this.exports = new ExportTable(rulesOf(this.configured, this.names));
    this.configuredSigner = options.handleKeys ? new HandleSigner(options.handleKeys.map(parseKey)) : undefined;
    this.service = new NfsService(this.exports, ring.memory, {
      ...HOLD_LIMITS,
      ...(options.holdMs !== undefined && { holdMs: options.holdMs }),
    });
    this.cache = new ReplyCache(new SipKey(randomBytes(KEY_BYTES)));
    const fault = (procedure: string, error: unknown) => log.error({ procedure, err: error }, 'a call failed inside');
    const mounts = mountPrograms(new MountService(this.service));
    // MOUNT also answers on the NFS port, so that one open port is enough for clients that name their ports.
    this.nfs = new Dispatcher([nfs3Program(this.service), ...mounts], this.cache, fault);
    this.mount = new Dispatcher(mounts, this.cache, fault);
    this.mapper = new PortmapService((peer) => this.localAddress(peer));
    this.portmap = new Dispatcher(portmapPrograms(this.mapper), this.cache, fault);
    this.server = new RpcServer(ring, MAX_RECORD_BYTES, {
      malformed: (peer, reason) => this.warnOfPeer(peer, reason),
      refused: (peer, reason) => this.warnOfPeer(peer, reason),
    });
  }

  /** Resolves names, listens, registers. @throws OperatorError that says which port or program is taken */
  async start(): Promise<void> {
    const { log } = this.doors;
    for (const warning of unsupportedClients(this.configured)) log.warn(warning);
    await this.resolveNames();
    await this.listen();
    await this.announce();
    this.every(TICK_MS, () => this.service.tick(performance.now()));
    this.every(SERVER_TICK_MS, () => {
      this.server.tick(performance.now());
      this.cache.tick(performance.now());
    });
    this.every(RESOLVE_MS, () => {
      void this.resolveNames();
      this.peerWarnings = 0;
    });
    log.info({ ports: this.ports, backend: this.doors.ring.backend }, 'NFS server ready');
  }

  /** What peers do wrong goes to the log, but nobody can fill the disk with it. */
  private warnOfPeer(peer: string, reason: string): void {
    if (this.peerWarnings++ < MAX_PEER_WARNINGS) this.doors.log.warn({ peer, reason }, 'a peer breaks the protocol');
  }

  private every(ms: number, run: () => void): void {
    run();
    this.timers.push(setInterval(run, ms));
  }

  private async listen(): Promise<void> {
    const { bind = ['0.0.0.0'], ports = {} } = this.options;
    const { nfs = NFS_PORT, mount = MOUNT_PORT } = ports;
    for (const host of bind) {
      this.ports.nfs = this.bind(host, this.ports.nfs || nfs, this.nfs);
      this.ports.mount = this.bind(host, this.ports.mount || mount, this.mount);
      await this.bindUdp(host, this.ports.mount, this.mount);
    }
  }

  private bind(host: string, port: number, dispatcher: Dispatcher): number {
    try {
      return this.server.listenTcp(host, port, dispatcher);
    } catch (error) {
      throw bindError(host, port, 'tcp', error);
    }
  }

  private async bindUdp(host: string, port: number, dispatcher: Dispatcher): Promise<void> {
    await this.server.listenUdp(host, port, dispatcher).catch((error: unknown) => {
      throw bindError(host, port, 'udp', error);
    });
  }

  /** Tells clients the ports: through rpcbind, or by answering its port here. */
  private async announce(): Promise<void> {
    const { portmap = 'auto' } = this.options;
    if (portmap === 'none') return;
    const { nfs, mount } = this.ports;
    const mappings: readonly Mapping[] = [
      { program: NFS_PROGRAM, version: 3, protocol: Protocol.TCP, port: nfs },
      ...[1, 3].flatMap((version) =>
        [Protocol.TCP, Protocol.UDP].map((protocol) => ({ program: MOUNT_PROGRAM, version, protocol, port: mount })),
      ),
    ];
    if (portmap === 'register' || (portmap === 'auto' && (await isListening('127.0.0.1', PORTMAP_PORT)))) {
      await this.withRpcbind((client) => client.register(mappings));
      this.registered = mappings;
      return;
    }
    const wanted = this.options.ports?.portmap ?? PORTMAP_PORT;
    for (const host of this.options.bind ?? ['0.0.0.0']) {
      this.ports.portmap = this.bind(host, this.ports.portmap || wanted, this.portmap);
      await this.bindUdp(host, this.ports.portmap, this.portmap);
    }
    const own = [Protocol.TCP, Protocol.UDP].flatMap((protocol) =>
      [2, 3, 4].map((version) => ({ program: PORTMAP_PROGRAM, version, protocol, port: this.ports.portmap })),
    );
    for (const mapping of [...own, ...mappings]) this.mapper.set(mapping);
  }

  private async withRpcbind(action: (client: PortmapClient) => Promise<void>): Promise<void> {
    const client = new PortmapClient();
    try {
      await action(client);
    } finally {
      client.close();
    }
  }

  /** The address by which a peer reaches this machine: the one listened on, or the one in the peer's network. */
  private localAddress(peer: string): string {
    const bound = this.options.bind?.find((host) => host !== '0.0.0.0' && host !== '::');
    if (bound !== undefined) return bound;
    const own = Object.values(networkInterfaces()).flatMap((addresses) => addresses ?? []);
    const family = peer.includes(':') ? 'IPv6' : 'IPv4';
    const same = own.filter((address) => address.family === family);
    return (
      (same.find(({ address, netmask }) => isInSameNetwork(peer, address, netmask)) ?? same[0])?.address ?? '0.0.0.0'
    );
  }

  private async resolveNames(): Promise<void> {
    if (await this.names.resolve(this.configured)) await this.putInForce(this.configured);
  }

  private async putInForce(table: ConfiguredExports): Promise<readonly string[]> {
    const before = this.exports.list().filter((entry) => entry.filesystem !== undefined);
    const gone = this.exports.replace(rulesOf(table, this.names));
    this.configured = table;
    await Promise.all(gone.map((tree) => tree.withdraw()));
    const after = new Set(this.exports.list());
    return before.filter((entry) => !after.has(entry)).map((entry) => entry.path);
  }

  /** The control channel. */
  readonly handlers: JsonHandlers = {
    serve: (params) => this.serve(pathIn(params)),
    withdraw: (params) => this.withdraw(pathIn(params)),
    exports: (params) => this.replaceExports(params),
    status: () => this.status(),
    dropConnections: () => ({ dropped: this.server.dropConnections() }),
  };

  private async serve(path: string): Promise<unknown> {
    const entry = this.find(path);
    if (entry.filesystem === undefined) {
      await this.checkMounted(path);
      if (this.opening.has(entry)) throw new OperatorError(`${path}: is being opened already`, 11, 'busy');
      this.opening.add(entry);
      const signer = await this.signerOf(entry);
      const filesystem = await this.open(entry);
      if (!this.opening.delete(entry) || this.exports.get(entry.id) !== entry) {
        await filesystem.withdraw();
        throw new OperatorError(`${path}: withdrawn while it was being opened`, 11, 'withdrawn');
      }
      entry.serve(filesystem, signer, () => randomBytes(WRITE_VERIFIER_BYTES));
      this.doors.log.info({ path, exportId: entry.id }, 'export is served');
    }
    return { path: entry.path, exportId: entry.id, fsid: entry.fsid.toString(16) };
  }

  /** Read, or made, before anything of the tree is held open: `withdraw` has nothing to do with this file. */
  private async signerOf(entry: Export): Promise<HandleSigner> {
    if (this.configuredSigner) return this.configuredSigner;
    try {
      const lines = await readHandleKeys(await rootOfFilesystem(entry.path), () =>
        randomBytes(KEY_BYTES).toString('hex'),
      );
      return new HandleSigner(lines.map(parseKey));
    } catch (error) {
      this.opening.delete(entry);
      if (error instanceof OperatorError) throw error;
      throw new OperatorError(`${entry.path}: the key of its file handles: ${(error as Error).message}`, 20, 'key');
    }
  }

  private async open(entry: Export): Promise<FileSystem> {
    try {
      return await this.doors.openFileSystem(entry.path);
    } catch (error) {
      this.opening.delete(entry);
      if (error instanceof OperatorError) throw error;
      throw new OperatorError(`${entry.path}: cannot be opened: ${(error as Error).message}`, 20, 'open');
    }
  }

  /** After this nothing of this process holds the tree: umount succeeds. Its clients' requests wait. */
  private async withdraw(path: string): Promise<unknown> {
    const entry = this.find(path);
    this.opening.delete(entry);
    const filesystem = entry.withdraw();
    if (filesystem !== undefined) {
      await filesystem.withdraw();
      this.doors.log.info({ path }, 'export is withdrawn');
    }
    return { path: entry.path, wasServed: filesystem !== undefined };
  }

  private async replaceExports(params: unknown): Promise<unknown> {
    const table = (params as { table?: ConfiguredExports } | null)?.table;
    if (!Array.isArray(table?.entries))
      throw new OperatorError('exports needs {"table":{"entries":[...]}}', 1, 'usage');
    for (const warning of unsupportedClients(table)) this.doors.log.warn(warning);
    await this.names.resolve(table);
    return { withdrawn: await this.putInForce(table) };
  }

  private status(): unknown {
    return {
      pid: process.pid,
      ports: this.ports,
      backend: this.doors.ring.backend,
      exports: this.exports.list().map((entry) => ({
        path: entry.path,
        exportId: entry.id,
        isServed: entry.filesystem !== undefined,
        heldCalls: entry.waiting,
      })),
      connections: this.server.connectionCount,
      calls: { ...this.nfs.counters(), ...this.mount.counters(), ...this.portmap.counters() },
      replyCache: { bytes: this.cache.costBytes, replays: this.cache.replays },
    };
  }

  private find(path: string): Export {
    const entry = this.exports.byPath(path);
    if (entry === undefined)
      throw new OperatorError(`${normalizePath(path)} is not in the exports`, 10, 'not-exported');
    return entry;
  }

  /**
   * Exporting the empty directory below a filesystem that is not mounted would show clients an empty tree, make all
   * their handles stale, and take their writes to the wrong disk.
   */
  private async checkMounted(path: string): Promise<void> {
    const entry = this.configured.entries.find((candidate) => candidate.path === normalizePath(path));
    const mountPoint = entry && mountPointOf(entry);
    const required = mountPoint ?? path;
    const here = await deviceOf(required);
    const above = await deviceOf(mountPoint !== undefined ? dirname(mountPoint) : '/');
    if (here !== above || required === '/') return;
    throw new OperatorError(`${path}: ${required} is not mounted, nothing is exported`, 11, 'not-mounted');
  }

  /** Withdraws every tree, unregisters, closes. */
  async stop(): Promise<void> {
    for (const timer of this.timers.splice(0)) clearInterval(timer);
    this.server.close();
    for (const entry of this.exports.list()) {
      this.opening.delete(entry);
      await entry.withdraw()?.withdraw();
    }
    if (this.registered.length > 0)
      await this.withRpcbind((client) => client.unregister(this.registered)).catch((error: unknown) =>
        this.doors.log.warn({ err: error }, 'rpcbind did not take back the registrations'),
      );
  }
}

function parseKey(text: string): SipKey {
  if (!/^[0-9a-f]{32}$/i.test(text))
    throw new OperatorError('a key for file handles is not 32 hexadecimal digits', 10, 'config');
  return new SipKey(Buffer.from(text, 'hex'));
}

function pathIn(params: unknown): string {
  const path = (params as { path?: unknown } | null)?.path;
  if (typeof path !== 'string' || !path.startsWith('/'))
    throw new OperatorError('expected {"path":"/exported/directory"}', 1, 'usage');
  return path;
}

async function deviceOf(path: string): Promise<number> {
  try {
    return (await stat(path)).dev;
  } catch (error) {
    throw new OperatorError(`${path}: ${(error as Error).message}`, 20, 'stat');
  }
}

function bindError(host: string, port: number, protocol: string, error: unknown): OperatorError {
  const { errno, message } = error as { errno?: number; message?: string };
  const hint = Math.abs(errno ?? 0) === Errno.EACCES ? ' (ports below 1024 need root)' : '';
  return new OperatorError(`cannot listen on ${host} port ${port}/${protocol}: ${message}${hint}`, 20, 'bind');
}

/** Whether anybody accepts connections there. */
function isListening(host: string, port: number): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = createConnection({ host, port });
    const end = (answer: boolean) => {
      socket.destroy();
      resolve(answer);
    };
    socket.setTimeout(PROBE_TIMEOUT_MS, () => end(false));
    socket.once('connect', () => end(true));
    socket.once('error', () => end(false));
  });
}

function isInSameNetwork(a: string, b: string, netmask: string): boolean {
  const [left, right, mask] = [a, b, netmask].map((text) => text.split('.').map(Number));
  return mask!.length === 4 && mask!.every((bits, index) => (left![index]! & bits) === (right![index]! & bits));
}
