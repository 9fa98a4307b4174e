/**
 * The NBD server over one plain file, without replication: the floor that the replicated figures stand on.
 *
 *     node nbd-file-server.js FILE SOCKET [TCP-PORT [io_uring|epoll]]
 *
 * Prints one line, `ready BACKEND PORT`, and serves the export `data` until it is terminated.
 */
import { NativeRing } from '../src/io/native-ring.js';
import { NbdServer } from '../src/node/nbd-server.js';
import { FileTarget } from '../test/support/file-target.js';

const POOL_BYTES = 512 * 1024 * 1024;

const [file, socket, port = '0', backend = 'auto'] = process.argv.slice(2);
if (file === undefined || socket === undefined || !['auto', 'io_uring', 'epoll'].includes(backend)) {
  process.stderr.write('usage: nbd-file-server FILE SOCKET [TCP-PORT [io_uring|epoll]]\n');
  process.exit(1);
}
const ring = new NativeRing({ poolBytes: POOL_BYTES, backend: backend as 'auto' | 'io_uring' | 'epoll' });
const server = new NbdServer(ring);
server.addExport('data', new FileTarget(ring.openFile(file, { exclusive: true })));
server.listenUnix(socket);
const listener = server.listenTcp('127.0.0.1', Number(port));
process.stdout.write(`ready ${ring.backend} ${listener.port}\n`);
for (const signal of ['SIGINT', 'SIGTERM'] as const)
  process.on(signal, () => {
    server.close();
    ring.close();
    process.exit(0);
  });
