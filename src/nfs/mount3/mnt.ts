import { AuthFlavor } from '../../rpc/auth.js';
import { DropCall, type Procedure, type RpcCall } from '../../rpc/dispatcher.js';
import type { Export, ExportOptions } from '../export-table.js';
import { type FileSystem, FileType, type KernelHandle } from '../filesystem.js';
import { NfsStatus } from '../status.js';
import type { MountService } from './program.js';
import { MOUNT_RESULT, type MountResult, MountStatus, PATH } from './results.js';

function refusal(status: number): MountResult {
  return { status, handle: undefined, flavors: [] };
}

/** errno to mountstat3. */
function statusOf(errno: number): number {
  switch (errno) {
    case 2:
      return MountStatus.MNT3ERR_NOENT;
    case 13:
      return MountStatus.MNT3ERR_ACCES;
    case 20:
      return MountStatus.MNT3ERR_NOTDIR;
    case 36:
      return MountStatus.MNT3ERR_NAMETOOLONG;
    default:
      return MountStatus.MNT3ERR_IO;
  }
}

/**
 * Names are walked as root: whoever may mount the export may mount what is below; permissions count at each operation.
 */
const WALKER = { uid: 0, gid: 0, groups: [] } as const;

/** The tree of an export, when it is there. A call held too long is dropped: MOUNT has no word for "later". */
function treeOf(service: MountService, call: RpcCall, entry: Export): FileSystem {
  if (entry.filesystem !== undefined) return entry.filesystem;
  const status = service.nfs.hold(call, entry);
  throw new DropCall(status === NfsStatus.NFS3ERR_STALE ? 'the export is gone' : 'the export is not there yet');
}

/**
 * Walks from the root, without following symbolic links.
 * @returns the directory's kernel handle, or a mountstat3
 */
async function walk(filesystem: FileSystem, below: readonly string[]): Promise<KernelHandle | number> {
  let kernel = filesystem.rootHandle;
  for (const part of below) {
    if (part === '..') return MountStatus.MNT3ERR_ACCES;
    if (part === '.') continue;
    if (part.includes('\0')) return MountStatus.MNT3ERR_INVAL;
    const outcome = await filesystem.lookup(WALKER, kernel, new TextEncoder().encode(part));
    if (outcome.errno !== 0 || outcome.handle === undefined) return statusOf(outcome.errno);
    if (outcome.attributes?.type !== FileType.DIR) return MountStatus.MNT3ERR_NOTDIR;
    kernel = outcome.handle;
  }
  return kernel;
}

function flavorsOf(options: ExportOptions): number[] {
  const flavors: number[] = [];
  if (options.allowAuthSys) flavors.push(AuthFlavor.AUTH_SYS);
  if (options.allowAuthNone) flavors.push(AuthFlavor.AUTH_NONE);
  return flavors;
}

/** RFC 1813 section 5.2.1. Who matches no export learns nothing about which paths exist. */
export const MNT: Procedure<MountService, string, MountResult> = {
  name: 'MNT',
  args: PATH,
  result: MOUNT_RESULT,
  run: async (service, path, call) => {
    if (!path.startsWith('/')) return refusal(MountStatus.MNT3ERR_ACCES);
    const found = service.nfs.exports.containing(path);
    const options = found?.entry.optionsFor(call.transport.address);
    if (found === undefined || options === undefined) return refusal(MountStatus.MNT3ERR_ACCES);
    if (options.secure && call.transport.port >= 1024) return refusal(MountStatus.MNT3ERR_ACCES);
    const filesystem = treeOf(service, call, found.entry);
    const kernel = await walk(filesystem, found.below);
    if (typeof kernel === 'number') return refusal(kernel);
    service.noteMount(call.transport.address, path);
    const handle = found.entry.handleOf(filesystem, kernel);
    return { status: MountStatus.MNT3_OK, handle, flavors: flavorsOf(options) };
  },
};

/** MOUNT version 1 would answer a 32-byte handle for NFS version 2, which is not served. */
export const MNT1: Procedure<MountService, string, number> = {
  name: 'MNT',
  args: PATH,
  result: { encode: (writer, status) => writer.u32(status), decode: (reader) => reader.u32() },
  run: () => MountStatus.MNT3ERR_ACCES,
};
