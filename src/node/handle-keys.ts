/**
 * The keys that sign file handles. They lie in the filesystem that the handles are about: it is replicated, so
 * whichever
 * head mounts it has the same keys, and a client's handles stay good.
 */
import { mkdir, open, readFile, rename, stat } from 'node:fs/promises';
import { dirname, join, resolve } from 'node:path';
import { OperatorError } from '../base/errors.js';

const FOLDER = '.drbdts';
const FILE = 'nfs-handle-keys';

/** The root of the filesystem that holds `path`: the last folder upwards on the same device. */
export async function mountPointOf(path: string): Promise<string> {
  const { dev } = await stat(path);
  let here = resolve(path);
  for (let above = dirname(here); above !== here; above = dirname(here)) {
    if ((await stat(above)).dev !== dev) return here;
    here = above;
  }
  return here;
}

/**
 * The keys of the filesystem mounted at `root`, one line each, the signing one first; made if there are none yet. Only
 * root may read
 * them. Nothing is held open afterwards.
 * @throws OperatorError (10) for a file without keys; Error of node:fs if it can be neither read nor made
 */
export async function readHandleKeys(root: string, makeKey: () => string): Promise<readonly string[]> {
  const folder = join(root, FOLDER);
  const file = join(folder, FILE);
  try {
    return keysIn(file, await readFile(file, 'utf8'));
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error;
  }
  await mkdir(folder, { recursive: true, mode: 0o700 });
  const key = makeKey();
  // Whole or not at all, whenever the head dies: written aside, then renamed.
  const handle = await open(`${file}.new`, 'w', 0o600);
  try {
    await handle.writeFile(`${key}\n`);
    await handle.sync();
  } finally {
    await handle.close();
  }
  await rename(`${file}.new`, file);
  // Its name must be durable before a client gets the first handle: another key after a crash makes them all stale.
  const directory = await open(folder, 'r');
  try {
    await directory.sync();
  } finally {
    await directory.close();
  }
  return [key];
}

function keysIn(file: string, text: string): readonly string[] {
  const keys = text.split('\n').flatMap((line) => (line.trim() === '' ? [] : [line.trim()]));
  if (keys.length === 0) throw new OperatorError(`${file}: no key, expected 32 hexadecimal digits`, 10, 'config');
  return keys;
}
