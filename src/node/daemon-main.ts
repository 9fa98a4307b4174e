import { mkdirSync } from 'node:fs';
import { serveJsonLines } from '../io/json-lines.js';
import { daemonSocket, pathsFrom } from '../io/paths.js';
import { Daemon } from './daemon.js';
import { createLog } from './log.js';

const paths = pathsFrom(process.env);
const log = createLog('drbdts');
// Never keep a mounted tree busy by standing in it.
process.chdir('/');
for (const directory of [paths.runDirectory, paths.logDirectory, paths.stateDirectory])
  mkdirSync(directory, { recursive: true, mode: 0o755 });

const daemon = new Daemon(paths, process.env, log, () => void leave(0));
await daemon.adopt();
const server = await serveJsonLines(daemonSocket(paths), daemon.handlers);
log.info({ socket: daemonSocket(paths) }, 'daemon ready');

let leaving = false;
async function leave(status: number): Promise<void> {
  if (leaving) return;
  leaving = true;
  await server.close();
  daemon.leave();
  process.exit(status);
}

// Engines and the NFS server go on without the daemon; the next one adopts them.
for (const signal of ['SIGTERM', 'SIGINT'] as const)
  process.on(signal, () => {
    log.info({ signal }, 'daemon ends; engines go on');
    void leave(0);
  });
