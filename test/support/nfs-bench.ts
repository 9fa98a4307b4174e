/**
 * A dispatcher with NFS, MOUNT and the port mapper over a filesystem in memory, and clients that talk to it in records.
 */
import { expect } from 'vitest';
import { askPort, mount, Nfs3Client, RpcCaller } from '../../src/nfs/client.js';
import { type ExportOptions, type ExportRule, ExportTable } from '../../src/nfs/export-table.js';
import { HandleSigner } from '../../src/nfs/file-handle.js';
import { MountService, mountPrograms } from '../../src/nfs/mount3/program.js';
import { NFS_PROGRAM, NFS3_PROCEDURES, nfs3Program } from '../../src/nfs/nfs3/program.js';
import { NfsService } from '../../src/nfs/service.js';
import { type AuthSys, CredentialCache } from '../../src/rpc/auth.js';
import { Dispatcher, type Procedure, REPLY_ROOM_BYTES, type RpcTransport } from '../../src/rpc/dispatcher.js';
import { PortmapService, portmapPrograms } from '../../src/rpc/portmap.js';
import { ReplyCache } from '../../src/rpc/reply-cache.js';
import { SipKey } from '../../src/rpc/siphash.js';
import type { XdrWriter } from '../../src/rpc/xdr.js';
import { FakeMemory } from './fake-ring.js';
import { MemoryFileSystem } from './memory-filesystem.js';

export const OPEN: ExportOptions = {
  ...{ writable: true, sync: true, secure: false, rootSquash: false, allSquash: false },
  ...{ anonUid: 65534, anonGid: 65534, allowAuthNone: false, allowAuthSys: true, readdirPlus: true },
};
export const KEY = new SipKey(Uint8Array.from({ length: 16 }, (_, index) => index));
export const ROOT_USER: AuthSys = { stamp: 1, machineName: 'client', uid: 0, gid: 0, groups: [] };

export function rule(path: string, options: Partial<ExportOptions> = {}, more: Partial<ExportRule> = {}): ExportRule {
  const all = { ...OPEN, ...options };
  return { path, clients: ['*'], optionsFor: () => all, ...more };
}

/** One connection as the dispatcher sees it. Replies are kept; every record must be given back. */
export class TestTransport implements RpcTransport {
  readonly kind = 'tcp';
  readonly credentials = new CredentialCache();
  isOpen = true;
  readonly replies: Uint8Array[] = [];
  readonly malformedReasons: string[] = [];
  finishedRecords = 0;
  private waiters: (() => void)[] = [];

  constructor(
    private readonly memory: FakeMemory,
    readonly address = '10.0.0.1',
    readonly port = 700,
  ) {}

  send(reply: XdrWriter): void {
    const head = reply.bytes.slice(REPLY_ROOM_BYTES, reply.length);
    let whole = head;
    if (reply.payload >= 0) {
      this.memory.check(reply.payload, reply.payloadLength);
      const payload = this.memory.bytes.slice(reply.payload, reply.payload + reply.payloadLength);
      whole = Buffer.concat([head, payload]);
      this.memory.release(reply.payload);
    }
    if (this.isOpen) this.replies.push(whole);
    this.wake();
  }

  finished(record: number): void {
    this.memory.release(record);
    this.finishedRecords++;
    this.wake();
  }

  malformed(reason: string): void {
    this.malformedReasons.push(reason);
  }

  changed(): Promise<void> {
    return new Promise((resolve) => this.waiters.push(resolve));
  }

  private wake(): void {
    for (const waiter of this.waiters.splice(0)) waiter();
  }
}

export class Bench {
  readonly memory = new FakeMemory(16 * 1024 * 1024);
  filesystem = new MemoryFileSystem(this.memory);
  readonly exports: ExportTable;
  readonly signer = new HandleSigner([KEY]);
  readonly service: NfsService;
  readonly cache = new ReplyCache<RpcTransport>(KEY);
  readonly dispatcher: Dispatcher;
  readonly faults: unknown[] = [];
  readonly mapper = new PortmapService(() => '10.0.0.9');
  private verifiers = 0;

  constructor(rules: readonly ExportRule[] = [rule('/drbd')]) {
    this.exports = new ExportTable(rules);
    this.service = new NfsService(this.exports, this.memory, { maxHeldCalls: 4, holdMs: 1000 });
    this.dispatcher = new Dispatcher(
      [nfs3Program(this.service), ...mountPrograms(new MountService(this.service)), ...portmapPrograms(this.mapper)],
      this.cache,
      (_procedure, error) => this.faults.push(error),
    );
  }

  /** Serves the filesystem under an export; every time with another write verifier. */
  serve(path = '/drbd', filesystem = this.filesystem): void {
    this.exports
      .byPath(path)!
      .serve(filesystem, this.signer, () => Uint8Array.of(0, 0, 0, 0, 0, 0, 0, ++this.verifiers));
  }

  transport(address?: string, port?: number): TestTransport {
    return new TestTransport(this.memory, address, port);
  }

  /** Hands a record over as the ring does: in a pool block of its own. */
  deliver(transport: TestTransport, record: Uint8Array): void {
    const block = this.memory.allocate(Math.max(1, record.length));
    expect(block).toBeGreaterThanOrEqual(0);
    this.memory.bytes.set(record, block);
    this.dispatcher.dispatch(transport, this.memory.bytes, this.memory.view, block, record.length, block);
  }

  /** The reply to a record, or undefined when it is finished without one. */
  async exchange(transport: TestTransport, record: Uint8Array): Promise<Uint8Array | undefined> {
    const before = transport.replies.length;
    const finishedBefore = transport.finishedRecords;
    this.deliver(transport, record);
    while (transport.replies.length === before && transport.finishedRecords === finishedBefore)
      await transport.changed();
    return transport.replies[before];
  }

  caller(auth: AuthSys | undefined = ROOT_USER, transport = this.transport()): RpcCaller {
    return new RpcCaller(
      async (record) => {
        const reply = await this.exchange(transport, record);
        if (reply === undefined) throw new Error('no reply');
        return reply;
      },
      auth,
      1000,
    );
  }

  client(auth?: AuthSys, transport?: TestTransport): Nfs3Client {
    return new Nfs3Client(this.caller(auth, transport), async () => {
      throw new Error('JUKEBOX');
    });
  }

  /** The handle of an object below the root of `/drbd`. */
  handle(path = ''): Uint8Array {
    const kernel = this.filesystem.handleOf(this.filesystem.at(path));
    return this.signer.encode(this.exports.list()[0]!.id, this.filesystem.id, kernel);
  }
}

/** One NFS call, whatever its status. */
export function nfs<A, R>(caller: RpcCaller, procedure: Procedure<NfsService, A, R>, args: A): Promise<R> {
  const number = (NFS3_PROCEDURES as readonly unknown[]).indexOf(procedure);
  expect(number).toBeGreaterThan(0);
  return caller.call(NFS_PROGRAM, 3, number, procedure.args, args, procedure.result);
}

export const bytes = (text: string): Uint8Array => new TextEncoder().encode(text);
export { askPort, mount };
