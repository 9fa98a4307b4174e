/**
 * Control channel between processes of one head: requests and answers as JSON, one per line, over a Unix socket.
 *
 *   -> {"id":1,"method":"serve","params":{...}}
 *   <- {"id":1,"progress":...}                                     any number, only if the handler reports
 *   <- {"id":1,"result":...}                                       or
 *   <- {"id":1,"error":{"code":"...","message":"...","exitCode":20}}
 *
 * Calls of one connection run side by side; answers come in the order they finish. The socket is mode 0600, so whoever
 * can connect may command.
 */
import { rmSync } from 'node:fs';
import { createConnection, createServer, type Socket } from 'node:net';
import { AssertionError } from '../base/assert.js';
import { OperatorError } from '../base/errors.js';

/** A line longer than this ends the connection. */
export const MAX_LINE_BYTES = 1024 * 1024;
const MAX_CONNECTIONS = 256;
const MAX_CALLS_PER_CONNECTION = 64;
/** Progress is dropped while a reader is this far behind. */
const MAX_UNSENT_PROGRESS_BYTES = 64 * 1024;
/** A reader that leaves this much unread is cut off. */
const MAX_UNSENT_BYTES = 8 * MAX_LINE_BYTES;

/** What a handler may do besides returning: report progress, learn that the caller went away. */
export interface JsonCall {
  progress(value: unknown): void;
  readonly signal: AbortSignal;
}
/** Throws OperatorError for what the caller must read (`reason` becomes `code`). The result must be JSON. */
export type JsonHandler = (params: unknown, call: JsonCall) => unknown;
export type JsonHandlers = Readonly<Record<string, JsonHandler>>;

export interface JsonLinesServer {
  readonly path: string;
  /** Stops listening, ends every connection and removes the socket file. */
  close(): Promise<void>;
}

/** A failed call, as the other side (or this one: `unreachable`, `timeout`, `protocol`) tells it. */
export class JsonCallError extends OperatorError {
  constructor(
    readonly code: string,
    message: string,
    exitCode: number,
  ) {
    super(message, exitCode, code);
  }
}

/** Cuts a byte stream into lines. `false` from `push`: a line exceeds MAX_LINE_BYTES. */
class LineReader {
  private parts: Buffer[] = [];
  private lengthBytes = 0;

  constructor(private readonly line: (text: string) => void) {}

  push(chunk: Buffer): boolean {
    let rest = chunk;
    for (let end = rest.indexOf(10); end >= 0; end = rest.indexOf(10)) {
      if (this.lengthBytes + end > MAX_LINE_BYTES) return false;
      this.parts.push(rest.subarray(0, end));
      const text = Buffer.concat(this.parts).toString('utf8');
      this.parts = [];
      this.lengthBytes = 0;
      rest = rest.subarray(end + 1);
      if (text.length > 0) this.line(text);
    }
    if (rest.length === 0) return true;
    this.parts.push(rest);
    this.lengthBytes += rest.length;
    return this.lengthBytes <= MAX_LINE_BYTES;
  }
}

type Message = { readonly [key: string]: unknown };

function parseMessage(text: string): Message | undefined {
  try {
    const value: unknown = JSON.parse(text);
    return typeof value === 'object' && value !== null && !Array.isArray(value) ? (value as Message) : undefined;
  } catch (error) {
    if (error instanceof SyntaxError) return undefined;
    throw error;
  }
}

function describeError(error: unknown): { code: string; message: string; exitCode: number } {
  if (error instanceof OperatorError) return { code: error.reason, message: error.message, exitCode: error.exitCode };
  return { code: 'internal', message: error instanceof Error ? error.message : String(error), exitCode: 20 };
}

class ServerConnection {
  private calls = 0;
  private readonly aborter = new AbortController();

  constructor(
    private readonly socket: Socket,
    private readonly handlers: JsonHandlers,
  ) {
    const reader = new LineReader((text) => this.line(text));
    socket.on('data', (chunk: Buffer) => {
      if (!reader.push(chunk)) this.refuse(0, 'protocol', `a line may have at most ${MAX_LINE_BYTES} bytes`);
    });
    socket.on('error', () => socket.destroy());
    socket.on('close', () => this.aborter.abort());
  }

  private refuse(id: unknown, code: string, message: string): void {
    this.answerError(id, code, message);
    this.socket.end();
  }

  private send(message: object): void {
    if (this.socket.destroyed || this.socket.writableEnded) return;
    this.socket.write(`${JSON.stringify(message)}\n`);
    if (this.socket.writableLength > MAX_UNSENT_BYTES) this.socket.destroy();
  }

  private line(text: string): void {
    const message = parseMessage(text);
    if (message === undefined || typeof message.method !== 'string') {
      this.refuse(message?.id ?? 0, 'protocol', 'expected one JSON object with "id" and "method" per line');
      return;
    }
    const { id, method } = message;
    const handler = Object.hasOwn(this.handlers, method) ? this.handlers[method] : undefined;
    if (handler === undefined) this.answerError(id, 'unknown-method', `unknown method ${method}`);
    else if (this.calls >= MAX_CALLS_PER_CONNECTION) this.answerError(id, 'busy', 'too many calls at once');
    else void this.run(id, handler, message.params);
  }

  private answerError(id: unknown, code: string, message: string): void {
    this.send({ id, error: { code, message, exitCode: 20 } });
  }

  /** Rejects only for an AssertionError, which as an unhandled rejection ends the process: our own bug. */
  private async run(id: unknown, handler: JsonHandler, params: unknown): Promise<void> {
    const call: JsonCall = {
      signal: this.aborter.signal,
      progress: (value) => {
        if (this.socket.writableLength < MAX_UNSENT_PROGRESS_BYTES) this.send({ id, progress: value });
      },
    };
    this.calls++;
    try {
      const result = await handler(params, call);
      this.send({ id, result: result ?? null });
    } catch (error) {
      if (error instanceof AssertionError) throw error;
      this.send({ id, error: describeError(error) });
    } finally {
      this.calls--;
    }
  }
}

/** Whether a process listens on the socket; a file that nobody serves is left over from a killed process. */
function isServed(path: string): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = createConnection(path);
    socket.once('connect', () => {
      socket.destroy();
      resolve(true);
    });
    socket.once('error', () => resolve(false));
  });
}

/**
 * Serves `handlers` on the Unix socket `path` (mode 0600). A socket file left by a killed process is replaced.
 * @throws OperatorError (`in-use`) if another process serves it; Error of node:net if it cannot be bound
 */
export async function serveJsonLines(path: string, handlers: JsonHandlers): Promise<JsonLinesServer> {
  if (await isServed(path))
    throw new OperatorError(`${path}: another process serves this socket; stop it first`, 20, 'in-use');
  rmSync(path, { force: true });
  const sockets = new Set<Socket>();
  const server = createServer((socket) => {
    sockets.add(socket);
    socket.on('close', () => sockets.delete(socket));
    new ServerConnection(socket, handlers);
  });
  server.maxConnections = MAX_CONNECTIONS;
  await new Promise<void>((resolve, reject) => {
    server.once('error', reject);
    // The file is created inside listen(); the umask closes the moment between bind and chmod.
    const previous = process.umask(0o177);
    server.listen(path, () => {
      server.off('error', reject);
      resolve();
    });
    process.umask(previous);
  });
  return {
    path,
    close: () =>
      new Promise((resolve) => {
        server.close(() => resolve());
        for (const socket of sockets) socket.destroySoon();
      }),
  };
}

interface PendingCall {
  readonly resolve: (value: unknown) => void;
  readonly reject: (error: JsonCallError) => void;
  readonly progress: ((value: unknown) => void) | undefined;
}

/** A kept connection to a control socket, for many calls. */
export class JsonLinesClient {
  private readonly pending = new Map<number, PendingCall>();
  private nextId = 1;
  private gone: JsonCallError | undefined;

  private constructor(
    private readonly socket: Socket,
    private readonly path: string,
    private readonly onClosed: (() => void) | undefined,
  ) {
    const reader = new LineReader((text) => this.line(text));
    socket.on('data', (chunk: Buffer) => {
      if (!reader.push(chunk)) this.fail('protocol', `an answer of ${path} is longer than ${MAX_LINE_BYTES} bytes`);
    });
    socket.on('error', (error) => this.fail('unreachable', `${path}: ${error.message}`));
    socket.on('close', () => {
      this.fail('unreachable', `${path}: the process behind this socket ended before it answered`);
      this.onClosed?.();
    });
  }

  /** @throws JsonCallError `unreachable` when nobody serves `path` */
  static connect(path: string, onClosed?: () => void): Promise<JsonLinesClient> {
    return new Promise((resolve, reject) => {
      const socket = createConnection(path);
      const refused = (error: Error) =>
        reject(new JsonCallError('unreachable', `${path}: ${error.message}; is the process running?`, 20));
      socket.once('error', refused);
      socket.once('connect', () => {
        socket.off('error', refused);
        resolve(new JsonLinesClient(socket, path, onClosed));
      });
    });
  }

  /**
   * @param timeoutMs how long to wait for the answer; 0 waits for ever
   * @throws JsonCallError with the other side's code, message and exit code, or `timeout`, `unreachable`, `protocol`
   */
  call(method: string, params: unknown, timeoutMs: number, progress?: (value: unknown) => void): Promise<unknown> {
    if (this.gone !== undefined) return Promise.reject(this.gone);
    const id = this.nextId++;
    return new Promise((resolve, reject) => {
      const expire = () => {
        this.pending.delete(id);
        reject(new JsonCallError('timeout', `${this.path}: no answer to ${method} within ${timeoutMs} ms`, 5));
      };
      const timer = timeoutMs > 0 ? setTimeout(expire, timeoutMs) : undefined;
      this.pending.set(id, {
        resolve: (value) => {
          clearTimeout(timer);
          resolve(value);
        },
        reject: (error) => {
          clearTimeout(timer);
          reject(error);
        },
        progress,
      });
      this.socket.write(`${JSON.stringify({ id, method, params })}\n`);
    });
  }

  close(): void {
    this.fail('unreachable', `${this.path}: closed`);
    this.socket.destroy();
  }

  private line(text: string): void {
    const message = parseMessage(text);
    if (message === undefined) {
      this.fail('protocol', `${this.path}: an answer is not a JSON object`);
      return;
    }
    const id = Number(message.id);
    const call = this.pending.get(id);
    if ('progress' in message) {
      call?.progress?.(message.progress);
      return;
    }
    this.pending.delete(id);
    if (!('error' in message)) {
      call?.resolve(message.result);
      return;
    }
    const error = message.error as { code?: unknown; message?: unknown; exitCode?: unknown };
    const exitCode = typeof error?.exitCode === 'number' ? error.exitCode : 20;
    if (call !== undefined) call.reject(new JsonCallError(String(error?.code), String(error?.message), exitCode));
    // The other side could not even read a call (id 0): no answer to it will ever come.
    else if (message.id === 0) this.fail(String(error?.code), String(error?.message));
  }

  private fail(code: string, text: string): void {
    if (this.gone !== undefined) return;
    this.gone = new JsonCallError(code, text, 20);
    for (const call of this.pending.values()) call.reject(this.gone);
    this.pending.clear();
    this.socket.destroy();
  }
}

/** One call over a connection of its own. Errors and `timeoutMs` as in JsonLinesClient.call. */
export async function callJsonLines(
  path: string,
  method: string,
  params: unknown,
  timeoutMs: number,
  progress?: (value: unknown) => void,
): Promise<unknown> {
  const client = await JsonLinesClient.connect(path);
  try {
    return await client.call(method, params, timeoutMs, progress);
  } finally {
    client.close();
  }
}
