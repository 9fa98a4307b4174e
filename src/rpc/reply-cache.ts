/**
 * Replies to requests that must not be executed twice, kept while their client may still retransmit (RFC 1813 section
 * 4.5).
 *
 * A client that got no reply sends the same xid again, on the same connection or on a new one with another source port.
 * Its first copy may still be running (the copy then takes over the reply), or be done (the reply is sent again).
 * Entries are found by client address, xid, procedure, length and a hash of credential and arguments; the port is not
 * part of it, and neither is the credential's stamp, in which old clients put a clock.
 */
import { assert } from '../base/assert.js';
import { type SipKey, sipHash } from './siphash.js';

/** Longest reply worth keeping: CREATE with two sets of attributes and a handle has about 280 bytes. */
export const MAX_CACHED_REPLY_BYTES = 512;
/** What an entry costs besides its reply. */
const ENTRY_BYTES = 256;
/** The hash covers this much of the beginning and of the end of credential and arguments. */
const HASHED_HEAD_BYTES = 1024;
const HASHED_TAIL_BYTES = 64;

/** `T` is whatever the dispatcher needs to send a reply: where the newest copy of the request came from. */
export class ReplyCacheEntry<T> {
  /** Undefined while the request runs. */
  reply: Uint8Array | undefined;
  finishedMs = 0;

  constructor(
    readonly client: string,
    readonly key: string,
    public origin: T,
  ) {}

  get costBytes(): number {
    return ENTRY_BYTES + (this.reply?.length ?? 0);
  }
}

class ClientEntries<T> {
  /** Oldest first. */
  readonly byKey = new Map<string, ReplyCacheEntry<T>>();
  costBytes = 0;
}

export interface ReplyCacheLimits {
  readonly maxBytes: number;
  /** Entries are dropped after this much time; it must exceed a client's retransmission time. */
  readonly maxAgeMs: number;
}

export const REPLY_CACHE_LIMITS: ReplyCacheLimits = { maxBytes: 16 * 1024 * 1024, maxAgeMs: 600_000 };

export class ReplyCache<T> {
  private readonly clients = new Map<string, ClientEntries<T>>();
  private readonly hash = new Int32Array(2);
  private nowMs = 0;
  costBytes = 0;
  /** How often a stored reply was sent again. */
  replays = 0;

  /** @param key random, so that nobody can prepare arguments with equal hashes */
  constructor(
    private readonly sipKey: SipKey,
    private readonly limits: ReplyCacheLimits = REPLY_CACHE_LIMITS,
  ) {}

  /**
   * The key of a request whose credential (without stamp) and arguments are `bytes[start, end)`.
   * `procedure` identifies program, version and procedure.
   */
  keyOf(xid: number, procedure: string, bytes: Uint8Array, start: number, end: number): string {
    const headEnd = Math.min(end, start + HASHED_HEAD_BYTES);
    const tailStart = Math.max(headEnd, end - HASHED_TAIL_BYTES);
    sipHash(this.sipKey, bytes, start, headEnd, this.hash, tailStart, end);
    return `${xid},${procedure},${end - start},${this.hash[0]},${this.hash[1]}`;
  }

  find(client: string, key: string): ReplyCacheEntry<T> | undefined {
    return this.clients.get(client)?.byKey.get(key);
  }

  /** Notes a request that starts now. */
  insert(client: string, key: string, origin: T): ReplyCacheEntry<T> {
    let entries = this.clients.get(client);
    if (entries === undefined) {
      entries = new ClientEntries();
      this.clients.set(client, entries);
    }
    assert(!entries.byKey.has(key), 'a request is entered into the reply cache once');
    const entry = new ReplyCacheEntry(client, key, origin);
    entries.byKey.set(key, entry);
    this.charge(entries, entry.costBytes);
    this.makeRoom(entries);
    return entry;
  }

  /**
   * Keeps the reply (copied) of a request that is done. A reply too long to keep makes the cache forget the request.
   */
  finish(entry: ReplyCacheEntry<T>, reply: Uint8Array): void {
    if (reply.length > MAX_CACHED_REPLY_BYTES) {
      this.forget(entry);
      return;
    }
    const entries = this.clients.get(entry.client);
    assert(entries?.byKey.get(entry.key) === entry && entry.reply === undefined, 'a running request is in the cache');
    entry.reply = reply.slice();
    entry.finishedMs = this.nowMs;
    this.charge(entries, reply.length);
    // Newest last: the order in which requests were done is the order in which they may be dropped.
    entries.byKey.delete(entry.key);
    entries.byKey.set(entry.key, entry);
    this.makeRoom(entries);
  }

  /** Removes a request that was not executed: its next copy is to be tried afresh. */
  forget(entry: ReplyCacheEntry<T>): void {
    const entries = this.clients.get(entry.client);
    if (entries?.byKey.get(entry.key) !== entry) return;
    entries.byKey.delete(entry.key);
    this.charge(entries, -entry.costBytes);
    if (entries.byKey.size === 0) this.clients.delete(entry.client);
  }

  /** Tells the time (any monotonic milliseconds) and drops what is too old. */
  tick(nowMs: number): void {
    this.nowMs = nowMs;
    for (const entries of [...this.clients.values()])
      for (const entry of entries.byKey.values()) {
        if (entry.reply === undefined) continue;
        if (entry.finishedMs + this.limits.maxAgeMs > nowMs) break;
        this.forget(entry);
      }
  }

  private charge(entries: ClientEntries<T>, bytes: number): void {
    entries.costBytes += bytes;
    this.costBytes += bytes;
  }

  /** One client may fill a quarter; above the whole, the client that holds most pays. Running requests always stay. */
  private makeRoom(entries: ClientEntries<T>): void {
    while (entries.costBytes > this.limits.maxBytes / 4 && this.dropOldest(entries));
    while (this.costBytes > this.limits.maxBytes) {
      let largest = entries;
      for (const other of this.clients.values()) if (other.costBytes > largest.costBytes) largest = other;
      if (!this.dropOldest(largest)) break;
    }
  }

  private dropOldest(entries: ClientEntries<T>): boolean {
    for (const entry of entries.byKey.values()) {
      if (entry.reply === undefined) continue;
      this.forget(entry);
      return true;
    }
    return false;
  }
}
