import type { Codec } from '../../rpc/xdr.js';
import { MAX_HANDLE_BYTES } from '../file-handle.js';

export const MOUNT_PROGRAM = 100005;
/** The port that firewalls know. */
export const MOUNT_PORT = 20048;

/** mountstat3 (RFC 1813 section 5.1.5). */
export const MountStatus = {
  MNT3_OK: 0,
  MNT3ERR_PERM: 1,
  MNT3ERR_NOENT: 2,
  MNT3ERR_IO: 5,
  MNT3ERR_ACCES: 13,
  MNT3ERR_NOTDIR: 20,
  MNT3ERR_INVAL: 22,
  MNT3ERR_NAMETOOLONG: 63,
  MNT3ERR_NOTSUPP: 10004,
  MNT3ERR_SERVERFAULT: 10006,
} as const;

/** MNTPATHLEN */
export const MAX_PATH_BYTES = 1024;
const MAX_NAME_BYTES = 255;
const MAX_FLAVORS = 32;

/** dirpath */
export const PATH: Codec<string> = {
  encode: (writer, path) => writer.text(path),
  decode: (reader) => reader.text(MAX_PATH_BYTES),
};

export interface MountResult {
  /** MountStatus.* */
  readonly status: number;
  /** Present exactly when the status is MNT3_OK. */
  readonly handle: Uint8Array | undefined;
  /** AuthFlavor.* that the export takes. */
  readonly flavors: readonly number[];
}
export const MOUNT_RESULT: Codec<MountResult> = {
  encode: (writer, result) => {
    writer.u32(result.status);
    if (result.handle === undefined) return;
    writer.opaque(result.handle);
    writer.u32(result.flavors.length);
    for (const flavor of result.flavors) writer.u32(flavor);
  },
  decode: (reader) => {
    const status = reader.u32();
    if (status !== MountStatus.MNT3_OK) return { status, handle: undefined, flavors: [] };
    const handle = reader.opaque(MAX_HANDLE_BYTES);
    const flavors: number[] = [];
    for (let left = Math.min(reader.u32(), MAX_FLAVORS); left > 0; left--) flavors.push(reader.u32());
    return { status, handle, flavors };
  },
};

export interface MountListEntry {
  readonly host: string;
  readonly path: string;
}
export const MOUNT_LIST: Codec<readonly MountListEntry[]> = {
  encode: (writer, entries) => {
    for (const entry of entries) {
      writer.bool(true);
      writer.text(entry.host);
      writer.text(entry.path);
    }
    writer.bool(false);
  },
  decode: (reader) => {
    const entries: MountListEntry[] = [];
    while (reader.bool()) entries.push({ host: reader.text(MAX_NAME_BYTES), path: reader.text(MAX_PATH_BYTES) });
    return entries;
  },
};

export interface ExportListEntry {
  readonly path: string;
  readonly clients: readonly string[];
}
export const EXPORT_LIST: Codec<readonly ExportListEntry[]> = {
  encode: (writer, entries) => {
    for (const entry of entries) {
      writer.bool(true);
      writer.text(entry.path);
      for (const client of entry.clients) {
        writer.bool(true);
        writer.text(client);
      }
      writer.bool(false);
    }
    writer.bool(false);
  },
  decode: (reader) => {
    const entries: ExportListEntry[] = [];
    while (reader.bool()) {
      const path = reader.text(MAX_PATH_BYTES);
      const clients: string[] = [];
      while (reader.bool()) clients.push(reader.text(MAX_NAME_BYTES));
      entries.push({ path, clients });
    }
    return entries;
  },
};
