/**
 * The doors that move bytes: memory pool, connections, files. The native addon implements them (`native-ring.ts`), over
 * io_uring or, where that is forbidden, over epoll and threads; the simulator implements the same interfaces over
 * simulated disks and links. Nothing here decides anything.
 *
 * Payload bytes live in one pool, outside the JavaScript heap, and are named by their byte offset in it. A pool block
 * has a reference count: `allocate` and every delivery to a handler hand the receiver one reference; every queued
 * operation holds one of its own until it is done; whoever holds one gives it back with `release`.
 *
 * All calls only queue; queued operations are submitted together once per turn of the event loop. No handler is ever
 * called from inside a call to a door.
 */

/** Offset of "no payload". */
export const NO_PAYLOAD = -1;

/** The aligned buffer pool. Blocks are 4096-aligned; contents of a fresh block are undefined. */
export interface Memory {
  /** The whole pool. Indexing it past a block one holds is a bug. */
  readonly bytes: Uint8Array;
  readonly view: DataView;
  /** @returns offset of a block of at least `lengthBytes`, or -1 when the pool has none left (bounded memory) */
  allocate(lengthBytes: number): number;
  retain(offset: number): void;
  release(offset: number): void;
}

/**
 * How a byte stream is cut into messages, as data. All integers in headers are big-endian.
 * - `raw`: whatever arrives is delivered as payload (handshakes). At most 64 KiB a time.
 * - `fixed`: header of `headerBytes`; a length field counts the bytes after it; the first bytes of those may be
 *   delivered inline behind the header (sub-header, digest, small packets), the rest is the payload, in a pool
 *   block of its own.
 * - `record`: RFC 5531 section 11 record marking; fragments are joined; the payload is the record, no header.
 */
export type FrameRule =
  | { readonly kind: 'raw' }
  | {
      readonly kind: 'fixed';
      readonly headerBytes: number;
      /** The header must start with these bytes, else the connection ends with EPROTO (71). */
      readonly magic: readonly number[];
      readonly lengthOffset: number;
      readonly lengthBytes: 2 | 4;
      readonly commandOffset: number;
      readonly commandBytes: 2 | 4;
      /** Only these commands are followed by bytes; absent: every command is (NBD: only WRITE; DRBD: all). */
      readonly payloadCommands?: readonly number[];
      /** Bytes after the header delivered inline, by command; `inlineDefault` for the rest. With it at most 224. */
      readonly inlineDefault: number;
      readonly inlineByCommand: Readonly<Record<number, number>>;
      /** Longer payloads are read and dropped, and the frame is delivered with FRAME_SKIPPED. */
      readonly maxPayloadBytes: number;
      /** Longer than this ends the connection with EMSGSIZE. */
      readonly hardCapBytes: number;
    }
  | { readonly kind: 'record'; readonly maxRecordBytes: number; readonly maxFragments: number }
  /**
   * Messages of the FUSE device (set by `mountFuse`, never by hand): the first 80 bytes of a WRITE (both its headers)
   * or the whole of any other request are the header; a WRITE's data is the payload. A `send` is one whole reply.
   */
  | { readonly kind: 'fuse'; readonly maxPayloadBytes: number };

/** Header plus inline bytes never exceed this. */
export const MAX_INLINE_BYTES = 224;
/** Flag of a frame whose payload exceeded `maxPayloadBytes` and was dropped; `payloadLength` still tells its length. */
export const FRAME_SKIPPED = 1;

export interface ConnectionHandler {
  /**
   * One whole message.
   * @param header view of shared memory, valid during the call only; the header starts at `headerOffset`
   * @param headerLength header plus inline bytes
   * @param payload pool offset (the handler now owns one reference) or NO_PAYLOAD
   */
  frame(
    header: DataView,
    headerOffset: number,
    headerLength: number,
    payload: number,
    payloadLength: number,
    flags: number,
  ): void;
  /** The connection is gone; called exactly once, also after `close`. errno 0: orderly end of stream or own close. */
  closed(errno: number): void;
  /** `queuedBytes` fell below half of SEND_QUEUE_LIMIT after having been above it. */
  drained(): void;
}

/** A sender should stop (apply backpressure) while `queuedBytes` is above this. */
export const SEND_QUEUE_LIMIT_BYTES = 8 * 1024 * 1024;

/** One stream connection (TCP, Unix, or the FUSE device speaking through the same handler). */
export interface Connection {
  /** Text for logs: `10.0.0.1:4711` or `unix`. */
  readonly peer: string;
  /** Bytes handed to `send` and not yet taken by the kernel. */
  readonly queuedBytes: number;
  setHandler(handler: ConnectionHandler): void;
  /** Switches framing; `unconsumed` are raw bytes already delivered that belong to what follows. */
  setFraming(rule: FrameRule, unconsumed?: Uint8Array): void;
  /**
   * Queues header bytes (copied now, at most 224 bytes) and optionally a payload, in order, without a gap.
   * The payload block is retained until sent. Sends of one loop turn leave in one system call.
   */
  send(header: Uint8Array, headerLength: number, payload: number, payloadLength: number): void;
  /** Queues any bytes (copied now). For handshakes and rare messages. */
  sendBytes(bytes: Uint8Array): void;
  /** Stops and resumes reading (backpressure). Frames already cut may still arrive after `pause`. */
  pause(): void;
  resume(): void;
  /** Sends what is queued, then closes. */
  end(): void;
  /** Closes at once; what is queued is lost. */
  close(): void;
}

export interface ListenOptions {
  /** SO_RCVBUF / SO_SNDBUF in bytes; 0 leaves the kernel's. */
  readonly receiveBufferBytes?: number;
  readonly sendBufferBytes?: number;
}

export interface Listener {
  /** The bound TCP port (useful after listening on port 0), or 0 for a Unix socket. */
  readonly port: number;
  close(): void;
}

/** TCP (TCP_NODELAY always set, SO_REUSEADDR on listeners) and Unix stream sockets. */
export interface Network {
  /** @throws Error with `errno` number when the address cannot be bound */
  listenTcp(host: string, port: number, accepted: (connection: Connection) => void, options?: ListenOptions): Listener;
  /** Mode 0600. A stale socket file is replaced. */
  listenUnix(path: string, accepted: (connection: Connection) => void): Listener;
  /** `connected` is called once: with a connection and 0, or undefined and an errno (ETIMEDOUT after `timeoutMs`). */
  connectTcp(
    host: string,
    port: number,
    options: ListenOptions & { readonly localHost?: string; readonly timeoutMs: number },
    connected: (connection: Connection | undefined, errno: number) => void,
  ): void;
  connectUnix(path: string, connected: (connection: Connection | undefined, errno: number) => void): void;
}

/** Called once for each finished file operation. `errno` 0 is success. A short read or write is an error (EIO). */
export type FileDone = (cookie: number, errno: number) => void;

/**
 * A backing file or block device with positional I/O. Offsets and lengths in bytes; any number of operations in flight,
 * unordered. `cookie` is the caller's (0..2^31-1) and comes back in `done`.
 */
export interface BlockFile {
  readonly sizeBytes: number;
  /** O_DIRECT in use: offsets, lengths and pool offsets must be multiples of `alignmentBytes`. */
  readonly alignmentBytes: number;
  setDone(done: FileDone): void;
  read(cookie: number, offsetBytes: number, payload: number, lengthBytes: number): void;
  /** `durable`: as if followed by `flush` of just this range (RWF_DSYNC). */
  write(cookie: number, offsetBytes: number, payload: number, lengthBytes: number, durable: boolean): void;
  /** Everything whose `done` was called before is on stable storage afterwards (fdatasync). */
  flush(cookie: number): void;
  /**
   * Where the next data (or the next hole) at or after `offsetBytes` begins; the size where there is none, a negative
   * number
   * where nobody can say. Holes read as zeroes. Immediate; no data is read.
   */
  seek?(offsetBytes: number, what: 'data' | 'hole'): number;
  /** The range reads as zeroes afterwards. `keepAllocated` false: give the space back where possible (punch hole). */
  zero(cookie: number, offsetBytes: number, lengthBytes: number, keepAllocated: boolean, durable: boolean): void;
  close(): void;
}

export interface OpenFileOptions {
  readonly direct?: boolean;
  readonly readOnly?: boolean;
  /**
   * Take an exclusive lock (flock on files, also O_EXCL on block devices, which a mounted one refuses): two engines
   * must never write one disk.
   */
  readonly exclusive?: boolean;
}

/** Everything an engine process touches. */
export interface Ring extends Network {
  readonly memory: Memory;
  /** `io_uring` or `epoll`. */
  readonly backend: string;
  /** @throws Error with `errno` and a message that names path and cause */
  openFile(path: string, options: OpenFileOptions): BlockFile;
  /**
   * Mounts a FUSE filesystem on the existing folder `directory` and returns its device as a connection (frame rule
   * `fuse`). Closing the connection unmounts (lazily, when something still uses it).
   * @throws Error with `errno` and a message that names the folder
   */
  mountFuse(directory: string, options: { readonly subtype: string; readonly maxWriteBytes: number }): Connection;
  /** Stops everything; no handler is called afterwards. */
  close(): void;
}

export interface RingOptions {
  /** Size of the pool; address space only until used. */
  readonly poolBytes: number;
  /** Force a backend; default `auto`: io_uring where the kernel allows it. */
  readonly backend?: 'auto' | 'io_uring' | 'epoll';
}
