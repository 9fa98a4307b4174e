import { existsSync, mkdtempSync, rmSync, statSync } from 'node:fs';
import { createConnection, createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { OperatorError } from '../../src/base/errors.js';
import { callJsonLines, JsonLinesClient, type JsonLinesServer, serveJsonLines } from '../../src/io/json-lines.js';

let folder: string;
let path: string;
let server: JsonLinesServer | undefined;
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'json-lines-'));
  path = join(folder, 'control');
});
afterEach(async () => {
  await server?.close();
  server = undefined;
  rmSync(folder, { recursive: true });
});

/** Sends raw bytes and returns everything the server answered until it closed or fell silent. */
function raw(bytes: Uint8Array | string): Promise<string> {
  return new Promise((resolve, reject) => {
    const socket = createConnection(path, () => socket.write(bytes));
    let text = '';
    socket.on('data', (chunk) => {
      text += chunk.toString();
    });
    socket.on('close', () => resolve(text));
    socket.on('error', reject);
    setTimeout(() => socket.destroy(), 300);
  });
}

describe('json lines: calls', () => {
  it('answers with the result, after progress, and calls run side by side', async () => {
    let releaseSlow = () => {};
    const slow = new Promise<void>((resolve) => {
      releaseSlow = resolve;
    });
    server = await serveJsonLines(path, {
      add: (params) => (params as number[]).reduce((sum, next) => sum + next, 0),
      slow: async (_params, call) => {
        call.progress({ percent: 50 });
        await slow;
        return 'late';
      },
    });
    const client = await JsonLinesClient.connect(path);
    const seen: unknown[] = [];
    const late = client.call('slow', {}, 5000, (value) => seen.push(value));
    expect(await client.call('add', [1, 2, 3], 5000)).toBe(6);
    releaseSlow();
    expect(await late).toBe('late');
    expect(seen).toEqual([{ percent: 50 }]);
    client.close();
  });

  it('carries an operator error with code, message and exit code', async () => {
    server = await serveJsonLines(path, {
      fail: () => {
        throw new OperatorError('resource data is StandAlone', 11, 'refused');
      },
    });
    await expect(callJsonLines(path, 'fail', {}, 1000)).rejects.toMatchObject({
      code: 'refused',
      message: 'resource data is StandAlone',
      exitCode: 11,
    });
  });

  it('says that a method does not exist, also for names every object has', async () => {
    server = await serveJsonLines(path, {});
    await expect(callJsonLines(path, 'toString', {}, 1000)).rejects.toMatchObject({ code: 'unknown-method' });
  });

  it('fails with timeout when the answer does not come, and unreachable when nobody serves', async () => {
    server = await serveJsonLines(path, { never: () => new Promise(() => {}) });
    await expect(callJsonLines(path, 'never', {}, 50)).rejects.toMatchObject({ code: 'timeout', exitCode: 5 });
    await expect(callJsonLines(join(folder, 'nobody'), 'x', {}, 50)).rejects.toMatchObject({ code: 'unreachable' });
  });

  it('fails the calls in flight when the serving process goes away', async () => {
    server = await serveJsonLines(path, { never: () => new Promise(() => {}) });
    const client = await JsonLinesClient.connect(path);
    const call = expect(client.call('never', {}, 5000)).rejects.toMatchObject({ code: 'unreachable' });
    await new Promise((resolve) => setTimeout(resolve, 20));
    await server.close();
    await call;
    await expect(client.call('never', {}, 5000)).rejects.toMatchObject({ code: 'unreachable' });
  });

  it('tells the handler that its caller went away', async () => {
    let aborted = () => {};
    const seen = new Promise<void>((resolve) => {
      aborted = resolve;
    });
    server = await serveJsonLines(path, {
      wait: (_params, call) => new Promise(() => call.signal.addEventListener('abort', aborted)),
    });
    await expect(callJsonLines(path, 'wait', {}, 30)).rejects.toMatchObject({ code: 'timeout' });
    await seen;
  });
});

describe('json lines: the socket', () => {
  it('is readable by its owner only and goes away at close', async () => {
    server = await serveJsonLines(path, {});
    expect(statSync(path).mode & 0o777).toBe(0o600);
    await server.close();
    server = undefined;
    expect(existsSync(path)).toBe(false);
  });

  it('refuses to take over a served socket, and replaces a dead one', async () => {
    server = await serveJsonLines(path, { who: () => 1 });
    await expect(serveJsonLines(path, {})).rejects.toMatchObject({ reason: 'in-use' });
    expect(await callJsonLines(path, 'who', {}, 1000)).toBe(1);
    await server.close();
    const dead = createServer().listen(path);
    await new Promise((resolve) => dead.once('listening', resolve));
    // A killed process leaves its file behind: closing the handle below the library does the same.
    (dead as unknown as { _handle: { close(): void; unref(): void } })._handle.close();
    server = await serveJsonLines(path, { who: () => 2 });
    expect(await callJsonLines(path, 'who', {}, 1000)).toBe(2);
  });

  it('ends a connection that sends no JSON or a line without end, and goes on serving others', async () => {
    server = await serveJsonLines(path, { ping: () => 'pong' });
    expect(await raw('hello\n')).toContain('"code":"protocol"');
    expect(await raw('[1]\n')).toContain('"code":"protocol"');
    expect(await raw(new Uint8Array(1024 * 1024 + 2).fill(65))).toContain('at most 1048576 bytes');
    expect(await callJsonLines(path, 'ping', {}, 1000)).toBe('pong');
  });

  it('joins a line that arrives byte by byte, with characters of several bytes', async () => {
    server = await serveJsonLines(path, { echo: (params) => params });
    const bytes = Buffer.from('{"id":7,"method":"echo","params":"größer ✓"}\n');
    const answer = await new Promise<string>((resolve) => {
      const socket = createConnection(path, async () => {
        for (const byte of bytes) {
          socket.write(Uint8Array.of(byte));
          await new Promise((next) => setImmediate(next));
        }
      });
      socket.once('data', (chunk) => {
        socket.destroy();
        resolve(chunk.toString());
      });
    });
    expect(JSON.parse(answer)).toEqual({ id: 7, result: 'größer ✓' });
  });
});
