import { describe, expect, it } from 'vitest';
import {
  BOOLEAN,
  MAPPING,
  MAPPINGS,
  type Mapping,
  PORT,
  PortmapService,
  Protocol,
  portmapPrograms,
  RPCB,
  RPCB_LIST,
  UNIVERSAL_ADDRESS,
  universalAddress,
} from '../../src/rpc/portmap.js';
import { frameRecord, RecordReader } from '../../src/rpc/record-marking.js';
import { SipKey, sipHash } from '../../src/rpc/siphash.js';
import { GarbageError, VOID, XdrReader, XdrWriter } from '../../src/rpc/xdr.js';
import { Bench } from '../support/nfs-bench.js';
import { assertSameForEverySplit } from '../support/splits.js';

const from = (hex: string) => XdrReader.over(Buffer.from(hex.replaceAll(' ', ''), 'hex'));

describe('XDR', () => {
  it('writes what RFC 4506 draws', () => {
    const writer = new XdrWriter(4);
    writer.u32(0xfffffffe);
    writer.u64(0x0102030405060708n);
    writer.size64(2 ** 53 - 1);
    writer.bool(true);
    writer.text('sillyprog');
    writer.opaque(new Uint8Array(0));
    writer.fixed(Uint8Array.of(9));
    expect(Buffer.from(writer.message()).toString('hex')).toBe(
      'fffffffe010203040506070800' + '1fffffffffffff000000010000000973696c6c7970726f67000000' + '0000000009000000',
    );
  });

  it('refuses booleans of 2, enums out of range, opaques beyond cap or message; ignores padding bytes', () => {
    expect(() => from('00000002').bool()).toThrow(GarbageError);
    expect(() => from('00000003').enumeration(2)).toThrow(GarbageError);
    expect(() => from('00000000').enumeration(2, 1)).toThrow(GarbageError);
    expect(() => from('00000005 0102030405000000').opaque(4)).toThrow(/at most 4/);
    expect(() => from('ffffffff 01020304').opaque(0xffffffff)).toThrow(/exceeds its message/);
    expect(() => from('00000003 010203').opaque(8)).toThrow(/early/);
    expect(Buffer.from(from('00000003 010203ff').opaque(8))).toEqual(Buffer.of(1, 2, 3));
    expect(() => from('000000').u32()).toThrow(GarbageError);
    expect(() => from('00000000000000').u64()).toThrow(GarbageError);
  });
});

describe('SipHash-2-4', () => {
  // openssl mac -macopt hexkey:000102030405060708090a0b0c0d0e0f -macopt size:8 SIPHASH, of the bytes 0, 1, 2, ...
  const expected: Record<number, string> = {
    0: '310e0edd47db6f72',
    1: 'fd67dc93c539f874',
    8: '6224939a79f5f593',
    15: 'e545be4961ca29a1',
    63: '724506eb4c328a95',
  };
  const key = new SipKey(Uint8Array.from({ length: 16 }, (_, index) => index));
  const out = new Int32Array(2);
  const text = () => Buffer.from(out.buffer).toString('hex');

  for (const [length, mac] of Object.entries(expected))
    it(`of ${length} bytes, whole and in two parts`, () => {
      const message = Uint8Array.from({ length: Number(length) }, (_, index) => index);
      sipHash(key, message, 0, message.length, out);
      expect(text()).toBe(mac);
      const middle = message.length >> 1;
      sipHash(key, message, 0, middle, out, middle, message.length);
      expect(text()).toBe(mac);
    });
});

describe('record marking', () => {
  const read = (chunks: readonly Uint8Array[], maxRecordBytes = 100, maxFragments = 8) => {
    const records: string[] = [];
    const reader = new RecordReader(maxRecordBytes, maxFragments, (record) =>
      records.push(Buffer.from(record).toString('latin1')),
    );
    for (const chunk of chunks) reader.push(chunk);
    return records;
  };
  const hex = (text: string) => Buffer.from(text.replaceAll(' ', ''), 'hex');

  it('joins fragments, also empty ones, however the stream is cut', () => {
    const stream = Buffer.concat([
      frameRecord(Buffer.from('one')),
      hex('00000002 7477 00000000 80000001 6f'),
      hex('00000003 666f75 80000000'),
      frameRecord(Buffer.from('last')),
    ]);
    expect(assertSameForEverySplit(stream, read)).toEqual(['one', 'two', 'fou', 'last']);
  });

  it('ends a stream whose record is empty, too long, or in too many fragments, before it takes memory', () => {
    expect(() => read([hex('80000000')])).toThrow(/empty/);
    expect(() => read([hex('ffffffff')])).toThrow(/at most 100/);
    expect(() => read([hex('00000040'), new Uint8Array(64), hex('80000040')])).toThrow(/at most 100/);
    expect(() => read([hex('00000000'.repeat(9))])).toThrow(/more than 8 fragments/);
  });
});

describe('port mapping', () => {
  const mapping: Mapping = { program: 100003, version: 3, protocol: Protocol.TCP, port: 2049 };

  it('GETPORT, GETADDR and DUMP tell what is registered', async () => {
    const bench = new Bench();
    bench.mapper.set(mapping);
    const caller = bench.caller(undefined);
    const getport = (value: Mapping) => caller.call(100000, 2, 3, MAPPING, value, PORT);
    expect(await getport({ ...mapping, port: 0 })).toBe(2049);
    // Another version of a known program: its port, so that the program can say what it has.
    expect(await getport({ ...mapping, version: 4 })).toBe(2049);
    expect(await getport({ ...mapping, protocol: Protocol.UDP })).toBe(0);
    expect(await getport({ ...mapping, program: 5 })).toBe(0);
    expect(await caller.call(100000, 2, 4, VOID, undefined, MAPPINGS)).toEqual([mapping]);
    const asked = { program: 100003, version: 3, netid: 'tcp', address: '', owner: '' };
    expect(await caller.call(100000, 4, 3, RPCB, asked, UNIVERSAL_ADDRESS)).toBe('10.0.0.9.8.1');
    expect(await caller.call(100000, 3, 3, RPCB, { ...asked, program: 5 }, UNIVERSAL_ADDRESS)).toBe('');
    expect(await caller.call(100000, 4, 4, VOID, undefined, RPCB_LIST)).toMatchObject([
      { netid: 'tcp', address: '10.0.0.9.8.1' },
    ]);
  });

  it('SET and UNSET are for privileged programs of this machine', async () => {
    const bench = new Bench();
    const set = (address: string, port: number) =>
      bench.caller(undefined, bench.transport(address, port)).call(100000, 2, 1, MAPPING, mapping, BOOLEAN);
    expect(await set('10.0.0.1', 700)).toBe(false);
    expect(await set('127.0.0.1', 1024)).toBe(false);
    expect(await set('127.0.0.1', 1023)).toBe(true);
    expect(await set('127.0.0.1', 1023)).toBe(false);
    expect(bench.mapper.list()).toEqual([mapping]);
  });

  it('is bounded', () => {
    const service = new PortmapService(() => '');
    for (let port = 1; port <= 300; port++) service.set({ ...mapping, program: port, port });
    expect(service.list().length).toBe(256);
    expect(portmapPrograms(service).map((program) => program.version)).toEqual([2, 3, 4]);
  });

  it('universal addresses are RFC 5665', () => {
    expect(universalAddress('10.1.3.7', 0x7d1)).toBe('10.1.3.7.7.209');
  });
});
