import type { Procedure } from '../../rpc/dispatcher.js';
import { fsidOf, readPostOp, writePostOp } from '../attributes.js';
import type { Attributes, FsStatOutcome } from '../filesystem.js';
import type { NfsService } from '../service.js';
import { NfsStatus } from '../status.js';
import { HANDLE_ARGS, type HandleArgs, type Result } from './results.js';

export interface FsstatResult extends Result {
  readonly attributes: Attributes | undefined;
  readonly totalBytes: number;
  readonly freeBytes: number;
  /** Without what is reserved for root. */
  readonly availableBytes: number;
  readonly totalFiles: number;
  readonly freeFiles: number;
  readonly availableFiles: number;
  /** Seconds for which nothing here changes. */
  readonly invariantSeconds: number;
}

const NOTHING = { totalBytes: 0, freeBytes: 0, availableBytes: 0, totalFiles: 0, freeFiles: 0, availableFiles: 0 };

function sizesOf(outcome: FsStatOutcome): typeof NOTHING {
  const { totalBytes, freeBytes, availableBytes, totalFiles, freeFiles, availableFiles } = outcome;
  return { totalBytes, freeBytes, availableBytes, totalFiles, freeFiles, availableFiles };
}

/** RFC 1813 section 3.3.18. */
export const FSSTAT: Procedure<NfsService, HandleArgs, FsstatResult> = {
  name: 'FSSTAT',
  args: HANDLE_ARGS,
  result: {
    encode: (writer, result) => {
      writer.u32(result.status);
      writePostOp(writer, result.attributes, result.fsid);
      if (result.status !== NfsStatus.NFS3_OK) return;
      writer.size64(result.totalBytes);
      writer.size64(result.freeBytes);
      writer.size64(result.availableBytes);
      writer.size64(result.totalFiles);
      writer.size64(result.freeFiles);
      writer.size64(result.availableFiles);
      writer.u32(result.invariantSeconds);
    },
    decode: (reader) => {
      const status = reader.u32();
      const attributes = readPostOp(reader);
      const base = { status, attributes, fsid: fsidOf(attributes) };
      if (status !== NfsStatus.NFS3_OK) return { ...base, ...NOTHING, invariantSeconds: 0 };
      return {
        ...base,
        totalBytes: reader.size64(),
        freeBytes: reader.size64(),
        availableBytes: reader.size64(),
        totalFiles: reader.size64(),
        freeFiles: reader.size64(),
        availableFiles: reader.size64(),
        invariantSeconds: reader.u32(),
      };
    },
  },
  run: async (service, args, call) => {
    const target = service.open(call, args.handle);
    if (typeof target === 'number')
      return { status: target, fsid: 0n, attributes: undefined, ...NOTHING, invariantSeconds: 0 };
    const outcome = await target.filesystem.fsstat(target.credential, target.kernel);
    const status = target.statusOfHandle(outcome.errno);
    const { attributes } = outcome;
    return { status, fsid: target.fsid, attributes, ...sizesOf(outcome), invariantSeconds: 0 };
  },
};
