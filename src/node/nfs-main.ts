import { OperatorError } from '../base/errors.js';
import { serveJsonLines } from '../io/json-lines.js';
import { NativeRing } from '../io/native-ring.js';
import { openPosixFileSystem } from '../io/posix-filesystem.js';
import { createLog } from './log.js';
import { readNfsOptions } from './nfs-options.js';
import { NfsRuntime } from './nfs-runtime.js';

const DEFAULT_POOL_BYTES = 1024 * 1024 * 1024;

const log = createLog('nfs');
// Never keep a mounted tree busy by standing in it; modes come from clients, who applied their own masks.
process.chdir('/');
process.umask(0);

async function main(): Promise<void> {
  const options = readNfsOptions(process.argv.slice(2));
  const ring = new NativeRing({ poolBytes: options.poolBytes ?? DEFAULT_POOL_BYTES });
  const runtime = new NfsRuntime(options, { ring, log, openFileSystem: (path) => openPosixFileSystem(ring, path) });
  await runtime.start();
  const quit = (status: number) => {
    log.info('NFS server ends');
    void runtime.stop().then(async () => {
      await control.close();
      process.exit(status);
    });
  };
  const control = await serveJsonLines(options.controlSocket, {
    ...runtime.handlers,
    quit: () => {
      // The caller gets its answer first.
      setTimeout(() => quit(0), 10);
      return { pid: process.pid };
    },
  });
  for (const signal of ['SIGTERM', 'SIGINT'] as const) process.on(signal, () => quit(0));
}

main().catch((error: unknown) => {
  if (!(error instanceof OperatorError)) throw error;
  log.fatal(error.message);
  process.stderr.write(`${error.message}\n`);
  process.exit(error.exitCode);
});
