import type { Procedure } from '../../rpc/dispatcher.js';
import { fsidOf, readPostOp, TIME, writePostOp } from '../attributes.js';
import type { Attributes, TimeSpec } from '../filesystem.js';
import type { NfsService } from '../service.js';
import { NfsStatus } from '../status.js';
import { HANDLE_ARGS, type HandleArgs, type Result } from './results.js';

/** Longest READ and WRITE, and what the Linux client uses at most. */
export const MAX_TRANSFER_BYTES = 1024 * 1024;
/** Longest call: a WRITE with everything around its data. */
export const MAX_RECORD_BYTES = MAX_TRANSFER_BYTES + 4096;
/** Hard links, symbolic links, same PATHCONF everywhere, times can be set. */
const PROPERTIES = 0x01 | 0x02 | 0x08 | 0x10;
const DIRECTORY_PREFERENCE_BYTES = 64 * 1024;
const MULTIPLE_BYTES = 4096;

export interface FsinfoLimits {
  readonly readMax: number;
  readonly readPreferred: number;
  readonly readMultiple: number;
  readonly writeMax: number;
  readonly writePreferred: number;
  readonly writeMultiple: number;
  readonly directoryPreferred: number;
  readonly maxFileSize: bigint;
  readonly timeDelta: TimeSpec;
  readonly properties: number;
}
export interface FsinfoResult extends Result {
  readonly attributes: Attributes | undefined;
  /** Present exactly when the status is NFS3_OK. */
  readonly limits: FsinfoLimits | undefined;
}

/** RFC 1813 section 3.3.19. */
export const FSINFO: Procedure<NfsService, HandleArgs, FsinfoResult> = {
  name: 'FSINFO',
  args: HANDLE_ARGS,
  result: {
    encode: (writer, { status, fsid, attributes, limits }) => {
      writer.u32(status);
      writePostOp(writer, attributes, fsid);
      if (limits === undefined) return;
      writer.u32(limits.readMax);
      writer.u32(limits.readPreferred);
      writer.u32(limits.readMultiple);
      writer.u32(limits.writeMax);
      writer.u32(limits.writePreferred);
      writer.u32(limits.writeMultiple);
      writer.u32(limits.directoryPreferred);
      writer.u64(limits.maxFileSize);
      TIME.encode(writer, limits.timeDelta);
      writer.u32(limits.properties);
    },
    decode: (reader) => {
      const status = reader.u32();
      const attributes = readPostOp(reader);
      const base = { status, attributes, fsid: fsidOf(attributes) };
      if (status !== NfsStatus.NFS3_OK) return { ...base, limits: undefined };
      const limits = {
        readMax: reader.u32(),
        readPreferred: reader.u32(),
        readMultiple: reader.u32(),
        writeMax: reader.u32(),
        writePreferred: reader.u32(),
        writeMultiple: reader.u32(),
        directoryPreferred: reader.u32(),
        maxFileSize: reader.u64(),
        timeDelta: TIME.decode(reader),
        properties: reader.u32(),
      };
      return { ...base, limits };
    },
  },
  run: async (service, args, call) => {
    const target = service.open(call, args.handle, true);
    if (typeof target === 'number') return { status: target, fsid: 0n, attributes: undefined, limits: undefined };
    const outcome = await target.filesystem.getattr(target.kernel);
    const status = target.statusOfHandle(outcome.errno);
    const { attributes } = outcome;
    if (status !== NfsStatus.NFS3_OK) return { status, fsid: target.fsid, attributes, limits: undefined };
    const limits: FsinfoLimits = {
      readMax: MAX_TRANSFER_BYTES,
      readPreferred: MAX_TRANSFER_BYTES,
      readMultiple: MULTIPLE_BYTES,
      writeMax: MAX_TRANSFER_BYTES,
      writePreferred: MAX_TRANSFER_BYTES,
      writeMultiple: MULTIPLE_BYTES,
      directoryPreferred: DIRECTORY_PREFERENCE_BYTES,
      maxFileSize: BigInt(target.filesystem.maxFileSizeBytes),
      timeDelta: { seconds: 0, nanoseconds: 1 },
      properties: PROPERTIES,
    };
    return { status, fsid: target.fsid, attributes, limits };
  },
};
