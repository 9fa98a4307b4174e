/**
 * The demo's client: writes small files one after the other, each acknowledged as stable before the next, until told to
 * stop; then reads every one back. Prints one JSON object: how many, the longest pause, and what is not as it was written.
 */
import { createHash } from 'node:crypto';
import { NfsSession, parseNfsUrl } from '../src/cli/nfs.js';
import { Stability } from '../src/nfs/filesystem.js';

const FILE_BYTES = 50_000;
const CALL_TIMEOUT_MS = 60_000;
const NONE = new Uint8Array(8);
const OTHER = new Uint8Array(0);

const [, , urlText, prefix] = process.argv;
const url = parseNfsUrl(urlText!, 65534, 65534);
const toStderr = (text: string): void => {
  process.stderr.write(text);
};
const session = new NfsSession(url, CALL_TIMEOUT_MS, {
  out: toStderr,
  err: toStderr,
  isTerminal: false,
  env: process.env,
});

let isStopped = false;
process.stdin.on('data', () => {
  isStopped = true;
});

/** What file `number` holds: different for each, and known to whoever knows the number. */
function contentOf(number: number): Uint8Array {
  const seed = createHash('sha256').update(`${prefix} ${number}`).digest();
  const content = new Uint8Array(FILE_BYTES);
  for (let i = 0; i < FILE_BYTES; i++) content[i] = seed[i % 32]! ^ (i >> 5);
  return content;
}

const { client, root } = await session.open();
const nameOf = (number: number) => `${prefix}-${number}`;

/** UNSTABLE and COMMIT, and again if the server lost its memory in between (RFC 1813 section 4.8). */
async function writeFile(number: number): Promise<void> {
  const content = contentOf(number);
  const name = nameOf(number);
  const { handle } = await client.create(root, name, { kind: 'unchecked', attributes: { mode: 0o644 } }, name);
  for (;;) {
    const written = await client.write(handle, 0, content, Stability.UNSTABLE, name);
    const committed = await client.commit(handle, name);
    const isSameLife = Buffer.compare(written.verifier ?? NONE, committed.verifier ?? OTHER) === 0;
    if (isSameLife && written.count === content.length) return;
  }
}

let files = 0;
let longestPauseMs = 0;
for (; !isStopped; files++) {
  const from = performance.now();
  await writeFile(files);
  longestPauseMs = Math.max(longestPauseMs, performance.now() - from);
}

const problems: string[] = [];
for (let number = 0; number < files; number++) {
  const name = nameOf(number);
  try {
    const { handle } = await client.lookup(root, name, name);
    const { data } = await client.read(handle, 0, FILE_BYTES, name);
    if (data === undefined || Buffer.compare(data, contentOf(number)) !== 0) problems.push(`${name} has other content`);
  } catch (error) {
    problems.push(`${name}: ${(error as Error).message}`);
  }
}
session.close();
process.stdin.destroy();
process.stdout.write(
  JSON.stringify({ files, bytes: files * FILE_BYTES, longestPauseMs: Math.round(longestPauseMs), problems }),
);
