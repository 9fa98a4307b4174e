import type { Procedure } from '../../rpc/dispatcher.js';
import { fsidOf, readPostOp, writePostOp } from '../attributes.js';
import type { Attributes } from '../filesystem.js';
import type { NfsService } from '../service.js';
import { NfsStatus } from '../status.js';
import { HANDLE_ARGS, type HandleArgs, type Result } from './results.js';

export interface PathconfResult extends Result {
  readonly attributes: Attributes | undefined;
  readonly linkMax: number;
  readonly nameMax: number;
  /** Names that are too long are refused, not cut. */
  readonly noTrunc: boolean;
  readonly chownRestricted: boolean;
  readonly caseInsensitive: boolean;
  readonly casePreserving: boolean;
}

/** What every Linux filesystem of ours is. */
const LINUX = { noTrunc: true, chownRestricted: true, caseInsensitive: false, casePreserving: true } as const;

/** RFC 1813 section 3.3.20. */
export const PATHCONF: Procedure<NfsService, HandleArgs, PathconfResult> = {
  name: 'PATHCONF',
  args: HANDLE_ARGS,
  result: {
    encode: (writer, result) => {
      writer.u32(result.status);
      writePostOp(writer, result.attributes, result.fsid);
      if (result.status !== NfsStatus.NFS3_OK) return;
      writer.u32(result.linkMax);
      writer.u32(result.nameMax);
      writer.bool(result.noTrunc);
      writer.bool(result.chownRestricted);
      writer.bool(result.caseInsensitive);
      writer.bool(result.casePreserving);
    },
    decode: (reader) => {
      const status = reader.u32();
      const attributes = readPostOp(reader);
      const base = { status, attributes, fsid: fsidOf(attributes) };
      if (status !== NfsStatus.NFS3_OK) return { ...base, linkMax: 0, nameMax: 0, ...LINUX };
      return {
        ...base,
        linkMax: reader.u32(),
        nameMax: reader.u32(),
        noTrunc: reader.bool(),
        chownRestricted: reader.bool(),
        caseInsensitive: reader.bool(),
        casePreserving: reader.bool(),
      };
    },
  },
  run: async (service, args, call) => {
    const target = service.open(call, args.handle);
    if (typeof target === 'number')
      return { status: target, fsid: 0n, attributes: undefined, linkMax: 0, nameMax: 0, ...LINUX };
    const { errno, attributes, linkMax, nameMax } = await target.filesystem.pathconf(target.kernel);
    return { status: target.statusOfHandle(errno), fsid: target.fsid, attributes, linkMax, nameMax, ...LINUX };
  },
};
