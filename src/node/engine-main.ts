import { readFileSync, writeFileSync } from 'node:fs';
import { OperatorError } from '../base/errors.js';
import { serveJsonLines } from '../io/json-lines.js';
import { native } from '../io/native.js';
import { NativeRing } from '../io/native-ring.js';
import { Engine } from './engine.js';
import type { EngineOptions } from './engine-options.js';
import { createLog } from './log.js';

/** Address space; memory only as far as used. */
const POOL_BYTES = 512 * 1024 * 1024;

const log = createLog(`engine-${process.argv[2] ?? ''}`);
// Never keep a mounted tree busy by standing in it.
process.chdir('/');

/** The kernel writes a filesystem back through this process: it must not wait for memory that waits for it. */
function holdMemory(): void {
  for (const [what, errno] of [
    ['mlockall', native().lockMemory()],
    ['PR_SET_IO_FLUSHER', native().setIoFlusher()],
  ] as const)
    if (errno !== 0) log.warn({ what, errno }, 'not permitted here; memory pressure may slow this engine');
  try {
    writeFileSync('/proc/self/oom_score_adj', '-1000');
  } catch (error) {
    log.warn({ why: (error as Error).message }, 'the kernel may kill this engine when memory is short');
  }
}

async function main(): Promise<void> {
  const options = JSON.parse(readFileSync(0, 'utf8')) as EngineOptions;
  const wanted = process.env['DRBDTS_RING'];
  const backend = wanted === 'io_uring' || wanted === 'epoll' ? wanted : 'auto';
  const ring = new NativeRing({ poolBytes: POOL_BYTES, backend });
  holdMemory();
  const engine = new Engine(options, ring, log, () => {
    log.info('engine ends');
    process.exit(0);
  });
  await engine.start();
  await serveJsonLines(options.controlSocket, engine.handlers);
  log.info({ backend: ring.backend, controlSocket: options.controlSocket }, 'engine ready');
  for (const signal of ['SIGTERM', 'SIGINT'] as const)
    process.on(signal, () => {
      log.info({ signal }, 'asked to end');
      engine.stop().catch((error: unknown) => {
        // In use: an orderly end is not possible, and ending all the same would cut off the mounted filesystem.
        log.error({ err: error }, 'cannot end now');
      });
    });
}

main().catch((error: unknown) => {
  const known = error instanceof OperatorError;
  if (!known) log.fatal({ err: error }, 'the engine stops');
  const fatal = known ? error.message : `the engine stopped: ${(error as Error).stack ?? String(error)}`;
  process.stdout.write(
    `${JSON.stringify({ fatal, exitCode: known ? error.exitCode : 20, reason: known ? error.reason : 'internal' })}\n`,
    () => process.exit(20),
  );
});
