import { spawnSync } from 'node:child_process';
import { closeSync, ftruncateSync, mkdtempSync, openSync, readSync, rmSync, writeSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, expect } from 'vitest';
import type { MetadataContext } from '../../src/cli/metadata-target.js';

/** A folder for images that goes away with the test file. */
export function imageFolder(): string {
  const folder = mkdtempSync(join(tmpdir(), 'drbdts-metadata-'));
  afterAll(() => rmSync(folder, { recursive: true, force: true }));
  return folder;
}

/** Makes a sparse image and writes the given pieces into it. */
export function makeImage(
  path: string,
  sizeBytes: number,
  ...pieces: readonly (readonly [number, Uint8Array])[]
): string {
  const fd = openSync(path, 'w+');
  ftruncateSync(fd, sizeBytes);
  for (const [offset, bytes] of pieces) writeSync(fd, bytes, 0, bytes.byteLength, offset);
  closeSync(fd);
  return path;
}

export function writeAt(path: string, offset: number, bytes: Uint8Array): void {
  const fd = openSync(path, 'r+');
  writeSync(fd, bytes, 0, bytes.byteLength, offset);
  closeSync(fd);
}

export function readAt(path: string, offset: number, length: number): Buffer {
  const fd = openSync(path, 'r');
  const bytes = Buffer.alloc(length);
  const count = readSync(fd, bytes, 0, length, offset);
  closeSync(fd);
  return bytes.subarray(0, count);
}

/** Fails with the first byte that differs instead of printing megabytes. */
export function expectSameBytes(actual: Uint8Array, expected: Uint8Array, what: string): void {
  expect(actual.length, `${what}: length`).toBe(expected.length);
  if (Buffer.compare(actual, expected) === 0) return;
  const at = actual.findIndex((byte, index) => byte !== expected[index]);
  expect.fail(`${what}: byte ${at} is ${actual[at]}, expected ${expected[at]}`);
}

export interface Outcome {
  readonly status: number;
  readonly out: string;
  readonly err: string;
}

/** Runs one of our commands and collects what it says; questions get `answer`. */
export function ours(command: (context: MetadataContext) => number, answer = false): Outcome {
  let out = '';
  let err = '';
  const status = command({
    out: (text) => {
      out += text;
    },
    err: (text) => {
      err += text;
    },
    isTerminal: false,
    env: {},
    confirm: (question) => {
      out += question;
      return answer;
    },
  });
  return { status, out, err };
}

/** Runs drbdmeta on a plain file. Its remarks about not having a block device are left out. */
export function drbdmeta(image: string, index: string, ...command: readonly string[]): Outcome {
  const result = spawnSync('drbdmeta', ['--force', '0', 'v08', image, index, ...command], {
    encoding: 'utf8',
    env: { ...process.env, PATH: `${process.env.PATH}:/usr/sbin:/sbin` },
    maxBuffer: 1 << 28,
  });
  if (result.error) throw result.error;
  const err = result.stderr
    .split('\n')
    .filter((line) => !/^ioctl\(|using pwrite$/.test(line))
    .join('\n');
  return { status: result.status ?? -1, out: result.stdout, err };
}

/** The part of a dump that depends on neither clock nor command line; with the flags line apart. */
export function dumpBody(text: string): { body: string; flags: string | undefined } {
  const body = text.slice(text.indexOf('\nversion "v08";'));
  return {
    body: body.replace(/^ {4}flags 0x[0-9A-F]{8};$/m, '    flags;'),
    flags: /^ {4}flags 0x([0-9A-F]{8});$/m.exec(body)?.[1],
  };
}
