import { execFileSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { resolve } from 'node:path';
import { expect, it } from 'vitest';

const ADDON = resolve(import.meta.dirname, '../../native/drbdts.node');
const CAP_IPC_LOCK = 14n;
const CAP_SYS_RESOURCE = 24n;
const EPERM = 1;

function hasCapability(bit: bigint): boolean {
  const [, mask] = /CapEff:\s+([0-9a-f]+)/.exec(readFileSync('/proc/self/status', 'utf8'))!;
  return ((BigInt(`0x${mask}`) >> bit) & 1n) === 1n;
}

function run(script: string): unknown {
  const whole = `const addon = require(${JSON.stringify(ADDON)}); ${script}`;
  return JSON.parse(execFileSync(process.execPath, ['--expose-gc', '-e', whole], { encoding: 'utf8' }));
}

it('marks the process as an I/O flusher where it may', () => {
  expect(run('console.log(addon.setIoFlusher())')).toBe(hasCapability(CAP_SYS_RESOURCE) ? 0 : EPERM);
});

it.skipIf(!hasCapability(CAP_IPC_LOCK))('locks code and pools, and V8 can still give memory back', () => {
  // mlockall would lock V8's heap too, and V8 aborts when the kernel refuses MADV_DONTNEED on it: grow and collect.
  const result = run(`
    const before = new addon.NativeRing(64 << 20, 'epoll');
    const errno = addon.lockMemory();
    const after = new addon.NativeRing(32 << 20, 'epoll');
    for (let round = 0; round < 20; round++) {
      let hold = [];
      for (let index = 0; index < 200000; index++) hold.push({ index });
      hold = undefined;
      gc();
    }
    const status = require('node:fs').readFileSync('/proc/self/status', 'utf8');
    console.log(JSON.stringify({ errno, lockedKiB: Number(/VmLck:\\s+(\\d+)/.exec(status)[1]) }));
    before.close();
    after.close();`) as { errno: number; lockedKiB: number };
  expect(result.errno).toBe(0);
  // Both pools, and the node binary with its libraries.
  expect(result.lockedKiB).toBeGreaterThan((96 + 40) * 1024);
});
