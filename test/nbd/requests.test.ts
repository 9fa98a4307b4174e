import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { nbdErrorOf } from '../../src/nbd/errno.js';
import {
  BlockStatusRuns,
  MAX_BLOCK_STATUS_RUNS,
  REQUEST_FRAMING,
  ReplyBuilder,
  type RequestRules,
  validateRequest,
} from '../../src/nbd/requests.js';

const MIB = 1 << 20;
const OK = 0;
const EPERM = 1;
const EINVAL = 22;
const ENOSPC = 28;
const ENOTSUP = 95;
const [READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS] = [0, 1, 2, 3, 4, 5, 6, 7] as const;
const [FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN] = [1, 2, 4, 8, 16, 32] as const;

/** HAS_FLAGS, FLUSH, FUA, TRIM, WRITE_ZEROES, DF, MULTI_CONN, CACHE, FAST_ZERO: what the captured server said. */
const ALL: RequestRules = { sizeBytes: 4 * MIB, transmissionFlags: 0x0ded, baseAllocation: true };

const judge = (command: number, flags: number, offset: number | bigint, length: number, rules = ALL) => {
  const wide = BigInt(offset);
  return validateRequest(rules, command, flags, Number(wide >> 32n), Number(wide & 0xffffffffn), length);
};

describe('requests: what is allowed', () => {
  it('every request of the captured sessions is', () => {
    const path = join(import.meta.dirname, '../vectors/nbd/sessions.json');
    const { sessions } = JSON.parse(readFileSync(path, 'utf8')) as { sessions: { requests: string[] }[] };
    const commands = new Set<number>();
    for (const hex of sessions.flatMap(({ requests }) => requests)) {
      const bytes = Buffer.from(hex, 'hex');
      const command = bytes.readUInt16BE(6);
      commands.add(command);
      if (command === DISC) continue;
      expect(judge(command, bytes.readUInt16BE(4), bytes.readBigUInt64BE(16), bytes.readUInt32BE(24)), hex).toBe(OK);
    }
    expect([...commands].sort()).toEqual([READ, WRITE, DISC, FLUSH, TRIM, WRITE_ZEROES, BLOCK_STATUS]);
  });

  it.each<[string, number, number, number, number | bigint, number, Partial<RequestRules>?]>([
    ['read to the last byte', OK, READ, 0, 4 * MIB - 1, 1],
    ['read past the end', EINVAL, READ, 0, 4 * MIB - 511, 512],
    ['read beyond the end', EINVAL, READ, 0, 8 * MIB, 512],
    ['read that wraps round 2^64', EINVAL, READ, 0, 0xffff_ffff_ffff_fe00n, 0x400],
    ['read at the very end of 2^64', EINVAL, READ, 0, 0xffff_ffff_ffff_fe00n, 0x200],
    ['read at 2^63', EINVAL, READ, 0, 1n << 63n, 512],
    ['read of 0 bytes', EINVAL, READ, 0, 0, 0],
    ['read of 32 MiB + 512', OK, READ, 0, 0, 32 * MIB + 512, { sizeBytes: 256 * MIB }],
    ['read of 64 MiB', OK, READ, 0, 0, 64 * MIB, { sizeBytes: 256 * MIB }],
    ['read of 64 MiB + 512', EINVAL, READ, 0, 0, 64 * MIB + 512, { sizeBytes: 256 * MIB }],
    ['read with FUA', OK, READ, FUA, 0, 512],
    ['read with DF', OK, READ, DF, 0, 512],
    ['read with DF without structured replies', EINVAL, READ, DF, 0, 512, { transmissionFlags: 0x0d6d }],
    ['read with REQ_ONE', EINVAL, READ, REQ_ONE, 0, 512],
    ['read with PAYLOAD_LEN', EINVAL, READ, PAYLOAD_LEN, 0, 512],
    ['write past the end', ENOSPC, WRITE, 0, 4 * MIB - 511, 512],
    ['write that wraps round 2^64', EINVAL, WRITE, 0, 0xffff_ffff_ffff_fe00n, 0x400],
    ['write of 0 bytes', EINVAL, WRITE, 0, 0, 0],
    ['write of 65 MiB', EINVAL, WRITE, 0, 0, 65 * MIB, { sizeBytes: 256 * MIB }],
    ['write to a read-only export', EPERM, WRITE, 0, 0, 512, { transmissionFlags: 0x0def }],
    ['write past the end of a read-only export', EPERM, WRITE, 0, 5 * MIB, 512, { transmissionFlags: 0x0def }],
    ['write with FUA that was not offered', EINVAL, WRITE, FUA, 0, 512, { transmissionFlags: 0x0de5 }],
    ['write with NO_HOLE', EINVAL, WRITE, NO_HOLE, 0, 512],
    ['flush', OK, FLUSH, 0, 0, 0],
    ['flush with offset and length', OK, FLUSH, 0, 99 * MIB, 77],
    ['flush with FUA', OK, FLUSH, FUA, 0, 0],
    ['flush of a read-only export', OK, FLUSH, 0, 0, 0, { transmissionFlags: 0x0def }],
    ['flush that was not offered', EINVAL, FLUSH, 0, 0, 0, { transmissionFlags: 0x0de9 }],
    ['trim', OK, TRIM, FUA, 1, 5],
    ['trim past the end', EINVAL, TRIM, 0, 4 * MIB - 511, 512],
    ['trim of a read-only export', EPERM, TRIM, 0, 0, 512, { transmissionFlags: 0x0def }],
    ['trim that was not offered', EINVAL, TRIM, 0, 0, 512, { transmissionFlags: 0x0dcd }],
    ['trim of 4 GiB - 512', OK, TRIM, 0, 0, 2 ** 32 - 512, { sizeBytes: 2 ** 33 }],
    ['cache', OK, CACHE, 0, 0, 512],
    ['cache that was not offered', EINVAL, CACHE, 0, 0, 512, { transmissionFlags: 0x09ed }],
    ['zeroes past the end', ENOSPC, WRITE_ZEROES, 0, 4 * MIB - 511, 512],
    ['zeroes of 256 MiB', OK, WRITE_ZEROES, NO_HOLE, 0, 256 * MIB, { sizeBytes: 256 * MIB }],
    ['zeroes of a read-only export', EPERM, WRITE_ZEROES, 0, 0, 512, { transmissionFlags: 0x0def }],
    ['fast zeroes', OK, WRITE_ZEROES, FAST_ZERO, 0, 512],
    ['fast zeroes that were not offered', EINVAL, WRITE_ZEROES, FAST_ZERO, 0, 512, { transmissionFlags: 0x056d }],
    ['fast zeroes that must stay allocated', ENOTSUP, WRITE_ZEROES, FAST_ZERO | NO_HOLE, 0, 512],
    ['block status', OK, BLOCK_STATUS, REQ_ONE, 0, 4 * MIB],
    ['block status without a context', EINVAL, BLOCK_STATUS, 0, 0, 512, { baseAllocation: false }],
    ['block status past the end', EINVAL, BLOCK_STATUS, 0, 0, 4 * MIB + 1],
    ['resize, which nobody offers', EINVAL, 8, 0, 0, 512],
    ['an unknown command', EINVAL, 0xffff, 0, 0, 512],
    ['all flags at once', EINVAL, WRITE, 0xffff, 0, 512],
  ])('%s: %i', (_, expected, command, flags, offset, length, rules = {}) => {
    expect(judge(command, flags, offset, length, { ...ALL, ...rules })).toBe(expected);
  });

  it('the framing knows that only WRITE is followed by bytes, up to 64 MiB, and never beyond 128 MiB', () => {
    const write = Buffer.from('256095130000000100000063000000010000000000000000000100006b65726e', 'hex');
    expect(write.subarray(0, 4)).toEqual(Buffer.from(REQUEST_FRAMING.magic));
    expect(write.readUInt16BE(REQUEST_FRAMING.commandOffset)).toBe(WRITE);
    expect(write.readUInt32BE(REQUEST_FRAMING.lengthOffset)).toBe(65536);
    expect(write.subarray(REQUEST_FRAMING.headerBytes).toString()).toBe('kern');
    expect(REQUEST_FRAMING.payloadCommands).toEqual([WRITE]);
    expect([REQUEST_FRAMING.maxPayloadBytes, REQUEST_FRAMING.hardCapBytes]).toEqual([64 * MIB, 128 * MIB]);
  });
});

describe('replies: bytes as captured', () => {
  const replies = new ReplyBuilder();
  const hex = (length: number) => Buffer.from(replies.bytes.subarray(0, length)).toString('hex');

  it('a simple reply', () => expect(hex(replies.simple(0, 0x60, 1))).toBe('67446698000000000000006000000001'));
  it('a simple error', () => expect(hex(replies.simple(22, 0xffffffff, 7))).toBe('6744669800000016ffffffff00000007'));
  it('the chunk of a READ of 512 bytes', () =>
    expect(hex(replies.offsetData(0x55, 0x2ad1d920, 0, 0, 512))).toBe(
      '668e33ef00010001000000552ad1d920000002080000000000000000',
    ));
  it('a block status of two runs', () => {
    const runs = new BlockStatusRuns();
    runs.add(65536, 0);
    runs.add(196608, 3);
    expect(hex(replies.blockStatus(0, 1, 1, runs))).toBe(
      '668e33ef0001000500000000000000010000001400000001000100000000000000030000' + '00000003',
    );
  });
  it('a final error chunk without text', () =>
    expect(hex(replies.error(28, 1, 2))).toBe('668e33ef000180010000000100000002000000060000001c0000'));
});

describe('block status runs', () => {
  const list = (runs: BlockStatusRuns) =>
    Array.from({ length: runs.count }, (_, index) => [runs.lengthBytes(index), runs.state(index)]);

  it('merge when equal, are cut to what was asked, and to one on request', () => {
    const runs = new BlockStatusRuns();
    for (const [length, state] of [
      [512, 0],
      [512, 0],
      [1024, 3],
      [4096, 0],
    ] as const)
      expect(runs.add(length, state)).toBe(true);
    runs.clip(3000, false);
    expect(list(runs)).toEqual([
      [1024, 0],
      [1024, 3],
      [952, 0],
    ]);
    runs.clip(2048, false);
    expect(list(runs)).toEqual([
      [1024, 0],
      [1024, 3],
    ]);
    runs.clip(2048, true);
    expect(list(runs)).toEqual([[1024, 0]]);
  });

  it('are no more than fit into a reply', () => {
    const runs = new BlockStatusRuns();
    for (let index = 0; index < MAX_BLOCK_STATUS_RUNS; index++) expect(runs.add(512, index % 2)).toBe(true);
    expect(runs.add(512, 0)).toBe(false);
    expect(runs.add(512, 1)).toBe(true); // grows the last one
    const replies = new ReplyBuilder();
    expect(replies.blockStatus(0, 0, 1, runs)).toBeLessThanOrEqual(replies.bytes.length);
  });
});

describe('errno', () => {
  it.each([
    [0, 0],
    [1, 1], // EPERM
    [30, 1], // EROFS
    [13, 1], // EACCES
    [5, 5], // EIO
    [12, 5], // ENOMEM is never sent
    [22, 22], // EINVAL
    [28, 28], // ENOSPC
    [122, 28], // EDQUOT
    [27, 28], // EFBIG
    [108, 108], // ESHUTDOWN
    [110, 5], // ETIMEDOUT
    [65536, 5],
    [-1, 5],
  ])('%i is told as %i', (errno, told) => expect(nbdErrorOf(errno)).toBe(told));
});
