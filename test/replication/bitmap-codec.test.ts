import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { ProtocolError } from '../../src/base/errors.js';
import { Bitmap } from '../../src/metadata/bitmap.js';
import { BitmapReceiver, BitmapSender, RUN_LENGTH_LEVELS } from '../../src/replication/wire/bitmap-codec.js';
import { BITMAP_CHUNK_BYTES, P_BITMAP, P_COMPRESSED_BITMAP } from '../../src/replication/wire/packets.js';

interface Packet {
  readonly command: number;
  readonly payload: Uint8Array;
}

const hex = (bytes: Uint8Array): string => Buffer.from(bytes).toString('hex');
const fromHex = (text: string): Uint8Array => Uint8Array.from(Buffer.from(text.replaceAll(' ', ''), 'hex'));
const bitmapOf = (bits: number): Bitmap => new Bitmap(bits * 8);

/** Runs of alternating polarity, starting with `startsSet`. */
function fromRuns(startsSet: boolean, ...runs: number[]): Bitmap {
  const bitmap = bitmapOf(runs.reduce((sum, run) => sum + run, 0));
  let at = 0;
  runs.forEach((run, index) => {
    if ((index % 2 === 0) === startsSet) bitmap.setBits(at, at + run - 1);
    at += run;
  });
  return bitmap;
}

function send(bitmap: Bitmap, useRle: boolean): Packet[] {
  const sender = new BitmapSender(bitmap, useRle);
  const sent: Packet[] = [];
  const into = new Uint8Array(BITMAP_CHUNK_BYTES);
  while (!sender.done) {
    const length = sender.next(into);
    sent.push({ command: sender.command, payload: into.slice(0, length) });
  }
  return sent;
}

function receive(bits: number, sent: readonly Packet[], before: readonly number[] = []): Bitmap {
  const bitmap = bitmapOf(bits);
  for (const bit of before) bitmap.setBits(bit, bit);
  const receiver = new BitmapReceiver(bitmap);
  sent.forEach(({ command, payload }, index) => {
    expect(receiver.receive(command, payload)).toBe(index === sent.length - 1);
  });
  return bitmap;
}

const bytesOf = (bitmap: Bitmap): Uint8Array => {
  const bytes = new Uint8Array(bitmap.byteLength);
  bitmap.copyBytes(0, bytes);
  return bytes;
};

describe('run lengths', () => {
  const vectors: [string, Bitmap, string][] = [
    ['249996 set', fromRuns(true, 249996), 'b2 7f5baf03'],
    ['249996 clear', fromRuns(false, 249996), '32 7f5baf03'],
    ['64 clear, 1 set, 249931 clear', fromRuns(false, 64, 1, 249931), '32 df037f1aaf03'],
    ['8 clear, 8 set, 16 clear, 249964 set', fromRuns(false, 8, 8, 16, 249964), '22 7bdfff765e07'],
  ];
  for (const [name, bitmap, payload] of vectors)
    it(`${name} is ${payload}`, () => {
      expect(send(bitmap, true).map((packet) => [packet.command, hex(packet.payload)])).toEqual([
        [P_COMPRESSED_BITMAP, hex(fromHex(payload))],
      ]);
      const got = receive(bitmap.bits, [{ command: P_COMPRESSED_BITMAP, payload: fromHex(payload) }]);
      expect(bytesOf(got)).toEqual(bytesOf(bitmap));
    });

  it('1 set, 2 clear, 3 set, 4 clear is read, though a sender would find it incompressible', () => {
    const bitmap = fromRuns(true, 1, 2, 3, 4);
    const got = receive(10, [{ command: P_COMPRESSED_BITMAP, payload: fromHex('e2 9802') }]);
    expect(bytesOf(got)).toEqual(bytesOf(bitmap));
    expect(send(bitmap, true).map((packet) => packet.command)).toEqual([P_BITMAP, P_BITMAP]);
  });

  it('the code has the levels of DRBD 8.4 drbd_vli.h', () => {
    // total bits, prefix bits, shortest, longest
    const expected = [
      [2, 1, 1, 2],
      [3, 2, 3, 4],
      [5, 3, 5, 8],
      [7, 4, 9, 16],
      [10, 5, 17, 48],
      [14, 6, 49, 304],
      [21, 8, 305, 8496],
      [29, 8, 8497, 2105648],
      [42, 8, 2105649, 17181974832],
      [64, 8, 17181974833, 72057611219902768],
    ];
    expect(RUN_LENGTH_LEVELS.map((row) => [row.prefixBits + row.dataBits, row.prefixBits, row.from, row.to])).toEqual(
      expected,
    );
  });

  it('both ends of every level survive', () => {
    for (const { from, to } of RUN_LENGTH_LEVELS.slice(0, 9))
      for (const run of [from, Math.min(to, 3_000_000)]) {
        const bitmap = fromRuns(false, run, 1, 100_000);
        expect(receive(bitmap.bits, send(bitmap, true)).findNext(0)).toBe(run);
      }
  });
});

describe('transfers', () => {
  it('plain: chunks of 4080 bytes, a shorter last one, and an empty packet', () => {
    const bitmap = bitmapOf(4080 * 8 + 65);
    bitmap.setBits(0, 0);
    bitmap.setBits(bitmap.bits - 1, bitmap.bits - 1);
    const sent = send(bitmap, false);
    expect(sent.map((packet) => [packet.command, packet.payload.length])).toEqual([
      [P_BITMAP, 4080],
      [P_BITMAP, 16],
      [P_BITMAP, 0],
    ]);
    expect(hex(sent[0]!.payload.subarray(0, 8))).toBe('0100000000000000');
    expect(hex(sent[1]!.payload)).toBe('00000000000000000100000000000000');
    expect(bytesOf(receive(bitmap.bits, sent))).toEqual(bytesOf(bitmap));
  });

  it('mixed: a plain chunk restarts at the word that holds the position', () => {
    // A long run compresses; then alternating bits do not.
    const bitmap = bitmapOf(100_000 + 200_000);
    bitmap.setBits(3, 50_002);
    for (let bit = 100_001; bit < 300_000; bit += 2) bitmap.setBits(bit, bit);
    const sent = send(bitmap, true);
    const commands = new Set(sent.map((packet) => packet.command));
    expect(commands).toEqual(new Set([P_BITMAP, P_COMPRESSED_BITMAP]));
    expect(bytesOf(receive(bitmap.bits, sent))).toEqual(bytesOf(bitmap));
  });

  it('merges: what the receiver had stays set', () => {
    const bitmap = fromRuns(false, 1000, 8, 9000);
    expect(receive(bitmap.bits, send(bitmap, true), [5, 1000]).weight).toBe(9);
    expect(receive(bitmap.bits, send(bitmap, false), [5, 1000]).weight).toBe(9);
  });

  it('any bitmap arrives, compressed or not', () => {
    const runs = fc.array(fc.oneof(fc.integer({ min: 1, max: 5 }), fc.integer({ min: 1, max: 60_000 })), {
      minLength: 1,
      maxLength: 200,
    });
    fc.assert(
      fc.property(runs, fc.boolean(), fc.boolean(), fc.nat(3), (lengths, startsSet, useRle, noise) => {
        const bitmap = fromRuns(startsSet, ...lengths);
        // A stretch that no run length code can shorten.
        for (let bit = 0; bit < Math.min(bitmap.bits, noise * 20_000); bit += 2) bitmap.setBits(bit, bit);
        const sent = send(bitmap, useRle);
        const got = receive(bitmap.bits, sent);
        expect(got.weight).toBe(bitmap.weight);
        expect(hex(bytesOf(got))).toBe(hex(bytesOf(bitmap)));
        for (const packet of sent) expect(packet.payload.length).toBeLessThanOrEqual(4080);
        if (!useRle) expect(sent.length).toBe(Math.ceil(bitmap.byteLength / 4080) + 1);
      }),
      { numRuns: 60 },
    );
  });
});

describe('recorded sessions', () => {
  const BITS: Record<string, number> = { session: 2049, 'session-options': 2049, 'session-splitbrain': 257 };
  for (const [name, bits] of Object.entries(BITS))
    it(`${name}: each transfer is read, and sent again as the kernel sent it`, () => {
      const lines = readFileSync(join(import.meta.dirname, `../vectors/drbd/${name}.jsonl`), 'utf8')
        .trim()
        .split('\n');
      const streams = new Map<string, Packet[]>();
      for (const line of lines) {
        const row = JSON.parse(line) as { connection: number; from: string; bytes: string };
        const bytes = fromHex(row.bytes);
        const command = bytes[0] === 0x86 ? bytes[7]! : -1;
        if (command !== P_BITMAP && command !== P_COMPRESSED_BITMAP) continue;
        const key = `${row.connection} ${row.from}`;
        streams.set(key, [...(streams.get(key) ?? []), { command, payload: bytes.subarray(16) }]);
      }
      expect(streams.size).toBe(4);
      for (const [key, sent] of streams) {
        const bitmap = receive(bits, sent);
        expect(bitmap.weight, key).toBeGreaterThan(0);
        const again = send(bitmap, sent[0]!.command === P_COMPRESSED_BITMAP);
        expect(again.map((packet) => [packet.command, hex(packet.payload)])).toEqual(
          sent.map((packet) => [packet.command, hex(packet.payload)]),
        );
      }
    });
});

describe('refusals', () => {
  const cases: [string, string, number, string][] = [
    ['a plain chunk that is too short', 'BITMAP_LENGTH', P_BITMAP, '00'.repeat(8)],
    ['a plain chunk that is too long', 'BITMAP_LENGTH', P_BITMAP, '00'.repeat(24)],
    ['an empty chunk before the end', 'BITMAP_LENGTH', P_BITMAP, ''],
    ['a compressed packet without a code', 'BITMAP_LENGTH', P_COMPRESSED_BITMAP, '82'],
    ['a compressed packet longer than a page', 'BITMAP_LENGTH', P_COMPRESSED_BITMAP, `02${'00'.repeat(4080)}`],
    ['another encoding', 'BITMAP_CODE', P_COMPRESSED_BITMAP, '8300'],
    ['a run that is cut off', 'BITMAP_CODE', P_COMPRESSED_BITMAP, '8203'],
    ['a set run beyond the end', 'BITMAP_OVERFLOW', P_COMPRESSED_BITMAP, 'b27f5baf03'],
    ['a clear run beyond the end', 'BITMAP_OVERFLOW', P_COMPRESSED_BITMAP, '327f5baf03'],
    ['the longest run there is', 'BITMAP_OVERFLOW', P_COMPRESSED_BITMAP, '82ffffffffffffffff'],
  ];
  for (const [name, code, command, payload] of cases)
    it(name, () => {
      const receiver = new BitmapReceiver(bitmapOf(100));
      expect(() => receiver.receive(command, fromHex(payload))).toThrow(
        expect.objectContaining({ name: 'ProtocolError', code: `DRBDTS_DRBD_${code}` }),
      );
    });

  it('any bytes set bits inside the bitmap or are refused', () => {
    fc.assert(
      fc.property(fc.uint8Array({ minLength: 1, maxLength: 64 }), fc.integer({ min: 1, max: 5000 }), (bytes, bits) => {
        const payload = bytes.slice();
        payload[0] = (payload[0]! & 0xf0) | 2;
        try {
          new BitmapReceiver(bitmapOf(bits)).receive(P_COMPRESSED_BITMAP, payload);
        } catch (error) {
          if (!(error instanceof ProtocolError)) throw error;
        }
      }),
      { numRuns: 2000 },
    );
  });
});
