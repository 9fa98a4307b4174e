import { readFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { MOUNT3_PROCEDURES } from '../../src/nfs/mount3/program.js';
import { FSINFO } from '../../src/nfs/nfs3/fsinfo.js';
import { PATHCONF } from '../../src/nfs/nfs3/pathconf.js';
import { NFS3_PROCEDURES } from '../../src/nfs/nfs3/program.js';
import { READDIRPLUS } from '../../src/nfs/nfs3/readdirplus.js';
import { decodeAuthSys } from '../../src/rpc/auth.js';
import { CallHeader, decodeCall, decodeReply, encodeAccepted, encodeCall } from '../../src/rpc/call.js';
import type { AnyProcedure } from '../../src/rpc/dispatcher.js';
import { MAPPING, PORT } from '../../src/rpc/portmap.js';
import { GarbageError, XdrReader, XdrWriter } from '../../src/rpc/xdr.js';

interface Vector {
  readonly program: number;
  readonly procedure: number;
  readonly status: number;
  readonly call: Uint8Array;
  readonly reply: Uint8Array;
}

const lines = readFileSync(new URL('../vectors/nfs/nfs3-session.txt', import.meta.url), 'utf8')
  .trim()
  .split('\n');
const vectors: Vector[] = [];
for (let at = 0; at < lines.length; at += 3) {
  const [name, status] = lines[at]!.split(' ');
  const [program, , procedure] = name!.split('.').map(Number);
  const [call, reply] = [lines[at + 1]!, lines[at + 2]!].map((hex) => Buffer.from(hex, 'hex'));
  vectors.push({ program: program!, procedure: procedure!, status: Number(status), call: call!, reply: reply! });
}

const GETPORT = { name: 'GETPORT', args: MAPPING, result: PORT } as unknown as AnyProcedure<unknown>;
const tables: Record<number, readonly (AnyProcedure<unknown> | undefined)[]> = {
  100000: [undefined, undefined, undefined, GETPORT],
  100003: NFS3_PROCEDURES as unknown as AnyProcedure<unknown>[],
  100005: MOUNT3_PROCEDURES as unknown as AnyProcedure<unknown>[],
};
const procedureOf = (vector: Vector) => tables[vector.program]![vector.procedure]!;
const find = (procedure: number, status = 0) =>
  vectors.find((vector) => vector.program === 100003 && vector.procedure === procedure && vector.status === status)!;

function reencodeCall(vector: Vector): Uint8Array {
  const reader = XdrReader.over(vector.call);
  const header = new CallHeader();
  expect(decodeCall(reader, header)).toBe(true);
  expect(header.hasBadCredential).toBe(false);
  const body = vector.call.subarray(header.credentialStart, header.credentialStart + header.credentialLength);
  const auth = header.flavor === 1 ? decodeAuthSys(XdrReader.over(body)) : undefined;
  const { args } = procedureOf(vector);
  const value: unknown = args.decode(reader);
  expect(reader.remaining).toBe(0);
  const writer = new XdrWriter();
  encodeCall(writer, header.xid, header.program, header.version, header.procedure, auth);
  args.encode(writer, value);
  return writer.message();
}

describe('vectors: a Linux client and ganesha', () => {
  it('hold all 22 procedures', () => {
    const seen = new Set(vectors.filter((vector) => vector.program === 100003).map((vector) => vector.procedure));
    expect([...seen].sort((a, b) => a - b)).toEqual(Array.from({ length: 22 }, (_, index) => index));
    expect(vectors.length).toBeGreaterThan(70);
  });

  for (const [index, vector] of vectors.entries()) {
    const title = `${vector.program} ${procedureOf(vector).name} status ${vector.status} (${index})`;
    it(`call decodes and encodes to the same bytes: ${title}`, () => {
      expect(Buffer.from(reencodeCall(vector)).toString('hex')).toBe(Buffer.from(vector.call).toString('hex'));
    });
    it(`reply decodes and encodes to the same bytes: ${title}`, () => {
      const reader = XdrReader.over(vector.reply);
      const xid = decodeReply(reader);
      const { result } = procedureOf(vector);
      const value: unknown = result.decode(reader);
      expect(reader.remaining).toBe(0);
      const writer = new XdrWriter();
      encodeAccepted(writer, xid, 0);
      result.encode(writer, value);
      expect(Buffer.from(writer.message()).toString('hex')).toBe(Buffer.from(vector.reply).toString('hex'));
    });
  }

  it('every truncation of a call is refused, not misread', () => {
    for (const vector of vectors) {
      const header = new CallHeader();
      const whole = XdrReader.over(vector.call);
      decodeCall(whole, header);
      const argsStart = whole.position;
      if (vector.call.length > 1500) continue;
      for (let end = argsStart; end < vector.call.length; end++) {
        const reader = XdrReader.over(vector.call.subarray(0, end));
        reader.position = argsStart;
        expect(() => procedureOf(vector).args.decode(reader)).toThrow(GarbageError);
      }
    }
  });
});

describe('vectors: what tshark reads in them', () => {
  it('READDIRPLUS of the fresh export', () => {
    const vector = find(17);
    const reader = XdrReader.over(vector.call);
    decodeCall(reader, new CallHeader());
    const args = READDIRPLUS.args.decode(reader);
    expect(Buffer.from(args.directory).toString('hex')).toBe('4300000112449a6365d56957bb63011e8021009231a1a400');
    expect(args).toMatchObject({ cookie: 0n, directoryCount: 16384, maxCount: 16384 });
    const replyReader = XdrReader.over(vector.reply);
    decodeReply(replyReader);
    const result = READDIRPLUS.result.decode(replyReader);
    expect(result.directory).toMatchObject({ type: 2, mode: 0o755, linkCount: 2, uid: 0, gid: 0, sizeBytes: 4096 });
  });

  it('FSINFO and PATHCONF of ganesha', () => {
    const reader = XdrReader.over(find(19).reply);
    decodeReply(reader);
    const { attributes, limits, fsid } = FSINFO.result.decode(reader);
    const time = { seconds: 1795364281, nanoseconds: 769335245 };
    expect(fsid).toBe(7186433742463132570n);
    expect(attributes).toMatchObject({ fileId: 2195486n, atime: time, mtime: time, ctime: time, usedBytes: 4096 });
    expect(limits).toEqual({
      ...{ readMax: 67108864, readPreferred: 67108864, readMultiple: 512 },
      ...{ writeMax: 67108864, writePreferred: 67108864, writeMultiple: 512 },
      directoryPreferred: 16384,
      maxFileSize: 9223372036854775807n,
      timeDelta: { seconds: 0, nanoseconds: 100 },
      properties: 0x1b,
    });
    const second = XdrReader.over(find(20).reply);
    decodeReply(second);
    expect(PATHCONF.result.decode(second)).toMatchObject({
      ...{ linkMax: 8, nameMax: 1024, noTrunc: true, chownRestricted: true },
      ...{ caseInsensitive: false, casePreserving: true },
    });
  });
});
