import { NULL_PROCEDURE, type Procedure, type Program } from '../../rpc/dispatcher.js';
import { VOID } from '../../rpc/xdr.js';
import type { NfsService } from '../service.js';
import { MNT, MNT1 } from './mnt.js';
import { EXPORT_LIST, type ExportListEntry, MOUNT_LIST, MOUNT_PROGRAM, type MountListEntry, PATH } from './results.js';

const MAX_NOTED_MOUNTS = 4096;

/** The MOUNT program. The list of mounts is advice for `showmount`: bounded, and nothing depends on it. */
export class MountService {
  /** Oldest first. */
  private readonly mounts = new Map<string, MountListEntry>();

  constructor(readonly nfs: NfsService) {}

  noteMount(host: string, path: string): void {
    const key = `${host} ${path}`;
    this.mounts.delete(key);
    this.mounts.set(key, { host, path });
    if (this.mounts.size > MAX_NOTED_MOUNTS) this.mounts.delete(this.mounts.keys().next().value!);
  }

  forget(host: string, path?: string): void {
    for (const [key, entry] of this.mounts)
      if (entry.host === host && (path === undefined || entry.path === path)) this.mounts.delete(key);
  }

  list(): readonly MountListEntry[] {
    return [...this.mounts.values()];
  }
}

/** RFC 1813 section 5.2.2. */
const DUMP: Procedure<MountService, void, readonly MountListEntry[]> = {
  name: 'DUMP',
  args: VOID,
  result: MOUNT_LIST,
  run: (service) => service.list(),
};
/** RFC 1813 section 5.2.3. Never touches handles. */
const UMNT: Procedure<MountService, string, void> = {
  name: 'UMNT',
  args: PATH,
  result: VOID,
  run: (service, path, call) => service.forget(call.transport.address, path),
};
/** RFC 1813 section 5.2.4. */
const UMNTALL: Procedure<MountService, void, void> = {
  name: 'UMNTALL',
  args: VOID,
  result: VOID,
  run: (service, _none, call) => service.forget(call.transport.address),
};
/** RFC 1813 section 5.2.5. Only the exports that the asker may mount. */
const EXPORT: Procedure<MountService, void, readonly ExportListEntry[]> = {
  name: 'EXPORT',
  args: VOID,
  result: EXPORT_LIST,
  run: (service, _none, call) =>
    service.nfs.exports
      .list()
      .filter((entry) => entry.optionsFor(call.transport.address) !== undefined)
      .map((entry) => ({ path: entry.path, clients: entry.clients })),
};

/** RFC 1813 section 5.2 in procedure order. */
export const MOUNT3_PROCEDURES = [NULL_PROCEDURE, MNT, DUMP, UMNT, UMNTALL, EXPORT] as const;

/** Version 3, and of version 1 what `showmount` and old `umount` use. */
export function mountPrograms(service: MountService): readonly Program<MountService>[] {
  const base = { name: 'MOUNT', number: MOUNT_PROGRAM, service };
  return [
    { ...base, version: 3, procedures: MOUNT3_PROCEDURES },
    { ...base, version: 1, procedures: [NULL_PROCEDURE, MNT1, DUMP, UMNT, UMNTALL, EXPORT] },
  ];
}
