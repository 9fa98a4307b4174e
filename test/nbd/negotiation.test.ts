import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { NbdNegotiation, type NegotiationEvent } from '../../src/nbd/connection.js';
import type { ExportDescription } from '../../src/nbd/options.js';
import { assertSameForEverySplit } from '../support/splits.js';

interface Session {
  readonly clientPort: number;
  readonly clientNegotiation: string;
  readonly serverNegotiation: string;
  readonly requests: readonly string[];
}
const { sessions } = JSON.parse(readFileSync(join(import.meta.dirname, '../vectors/nbd/sessions.json'), 'utf8')) as {
  sessions: readonly Session[];
};

/** What nbdkit served when the sessions were captured. */
const CAPTURED: ExportDescription = { sizeBytes: 4 << 20, transmissionFlags: 0x0d6d, description: '' };

const SIZED: ExportDescription = {
  ...CAPTURED,
  description: 'mirrored',
  blockSizes: { minimumBytes: 512, preferredBytes: 4096, maximumBytes: 32 << 20 },
};

interface Outcome {
  readonly output: string;
  readonly end: NegotiationEvent['kind'];
  readonly error?: string;
  readonly exportName?: string;
  readonly structured?: boolean;
  readonly allocation?: boolean;
  readonly rest?: string;
}

/** Drives a negotiation with the exports `data` and `other` (and a Secondary's `standby`, a leaving `leaving`). */
function run(chunks: readonly Uint8Array[], description = CAPTURED): Outcome {
  const negotiation = new NbdNegotiation();
  const output: Uint8Array[] = [];
  const rest: Uint8Array[] = [];
  let last: NegotiationEvent = negotiation.nextEvent();
  for (const chunk of [new Uint8Array(0), ...chunks]) {
    if (last.kind === 'transmission') {
      rest.push(chunk);
      continue;
    }
    negotiation.receive(chunk);
    for (;;) {
      last = negotiation.nextEvent();
      if (last.kind === 'list')
        negotiation.listed(['data', 'other'].map((exportName) => ({ exportName, description: '' })));
      else if (last.kind === 'describe' || last.kind === 'open') {
        if (last.exportName === 'standby') negotiation.refused('policy', 'Secondary here');
        else if (last.exportName === 'leaving') negotiation.refused('shutdown', 'going away');
        else if (!['data', 'other'].includes(last.exportName)) negotiation.refused('unknown', 'no such export');
        else negotiation.described(description);
      } else break;
    }
    const bytes = negotiation.takeOutput();
    if (bytes) output.push(bytes);
  }
  const outcome = { output: Buffer.concat(output).toString('hex'), end: last.kind };
  if (last.kind === 'transmission')
    return {
      ...outcome,
      exportName: last.exportName,
      structured: last.structuredReplies,
      allocation: last.baseAllocation,
      rest: Buffer.concat([last.rest, ...rest]).toString('hex'),
    };
  if (last.kind === 'closed' && last.error) return { ...outcome, error: last.error.code };
  return outcome;
}

// A second, naive builder: what a client writes.
const u16 = (value: number) => Buffer.from([value >> 8, value & 255]);
const u32 = (value: number) => Buffer.from(value.toString(16).padStart(8, '0'), 'hex');
const text = (value: string | Buffer) => Buffer.concat([u32(Buffer.byteLength(value)), Buffer.from(value)]);
const HELLO = u32(3);
const option = (number: number, data: Buffer = Buffer.alloc(0)) =>
  Buffer.concat([Buffer.from('IHAVEOPT'), u32(number), u32(data.length), data]);
const go = (name: string | Buffer, types: number[] = [], number = 7) =>
  option(number, Buffer.concat([text(name), u16(types.length), ...types.map(u16)]));
const meta = (number: number, name: string, queries: string[]) =>
  option(number, Buffer.concat([text(name), u32(queries.length), ...queries.map(text)]));
const SR = option(8);
const ABORT = option(2);
const GOOD_GO = go('data');

/** Option replies after the greeting, as [option, type name, data]. */
function replies(outcome: Outcome): [number, string, Buffer][] {
  const names: Record<number, string> = {
    1: 'ACK',
    2: 'SERVER',
    3: 'INFO',
    4: 'META',
    2147483649: 'UNSUP',
    2147483650: 'POLICY',
    2147483651: 'INVALID',
    2147483654: 'UNKNOWN',
    2147483655: 'SHUTDOWN',
    2147483657: 'TOO_BIG',
  };
  const bytes = Buffer.from(outcome.output, 'hex');
  const found: [number, string, Buffer][] = [];
  for (let at = 18; at < bytes.length; ) {
    expect(bytes.subarray(at, at + 8).toString('hex')).toBe('0003e889045565a9');
    const length = bytes.readUInt32BE(at + 16);
    const type = bytes.readUInt32BE(at + 12);
    found.push([
      bytes.readUInt32BE(at + 8),
      names[type] ?? type.toString(16),
      bytes.subarray(at + 20, at + 20 + length),
    ]);
    at += 20 + length;
  }
  return found;
}
const kinds = (...parts: Buffer[]) => replies(run([Buffer.concat([HELLO, ...parts])])).map(([, type]) => type);
const endOf = (...parts: Buffer[]) => {
  const { end, error } = run([Buffer.concat([HELLO, ...parts])]);
  return error ?? end;
};

describe('negotiation: captured sessions', () => {
  const clients = sessions.map((session, index) => ({ ...session, index }));
  it.each(clients)('connection $index (port $clientPort) gets the bytes nbdkit sent', (session) => {
    const client = Buffer.from(session.clientNegotiation, 'hex');
    const first = Buffer.from(session.requests[0] ?? '', 'hex');
    const outcome = assertSameForEverySplit(Buffer.concat([client, first]), (chunks) => run(chunks));
    if (session.serverNegotiation.includes('0000000780000006')) {
      // The text of an error is each server's own.
      expect(replies(outcome).map(([, type]) => type)).toEqual(['UNKNOWN']);
      return;
    }
    expect(outcome.output).toBe(session.serverNegotiation);
    if (session.requests.length > 0) {
      expect(outcome).toMatchObject({ end: 'transmission', exportName: 'data', rest: session.requests[0] });
      const types = session.requests.map((request) => request.slice(12, 16));
      if (types.includes('0007')) expect(outcome.allocation).toBe(true);
    }
  });
});

describe('negotiation: rules of proto.md', () => {
  it('greets with fixed newstyle and NO_ZEROES, and says nothing else unasked', () => {
    expect(run([]).output).toBe(`${Buffer.from('NBDMAGICIHAVEOPT').toString('hex')}0003`);
  });

  it('EXPORT_NAME answers size, flags and 124 zeroes, or no zeroes when so agreed', () => {
    const name = option(1, Buffer.from('data'));
    const answer = '00000000004000000d6d';
    expect(run([Buffer.concat([u32(1), name])]).output.slice(36)).toBe(answer + '00'.repeat(124));
    expect(run([Buffer.concat([u32(3), name])]).output.slice(36)).toBe(answer);
    // A client without C_FIXED_NEWSTYLE may use EXPORT_NAME, and nothing else.
    expect(run([Buffer.concat([u32(0), name])])).toMatchObject({ end: 'transmission', structured: false });
    expect(run([Buffer.concat([u32(0), GOOD_GO])])).toMatchObject({ end: 'closed', error: 'DRBDTS_NBD_NOT_FIXED' });
  });

  it('EXPORT_NAME of what is not to be had closes without a word', () => {
    for (const name of ['nosuch', 'standby', 'leaving', 'a\0b', 'n'.repeat(5000)]) {
      const outcome = run([Buffer.concat([HELLO, option(1, Buffer.from(name))])]);
      expect(outcome.end).toBe('closed');
      expect(outcome.output).toHaveLength(36);
    }
  });

  it('GO gives what was asked for, EXPORT always, unknown types never', () => {
    const outcome = run([Buffer.concat([HELLO, SR, go('data', [3, 1, 2, 77])])], SIZED);
    expect(replies(outcome).map(([, type, data]) => [type, data.toString('hex')])).toEqual([
      ['ACK', ''],
      ['INFO', '000000000000004000000ded'], // 0x0d6d and SEND_DF
      ['INFO', `0001${Buffer.from('data').toString('hex')}`],
      ['INFO', `0002${Buffer.from('mirrored').toString('hex')}`],
      ['INFO', '0003000002000000100002000000'],
      ['ACK', ''],
    ]);
    expect(outcome).toMatchObject({ end: 'transmission', structured: true, allocation: false });
  });

  it('the size of an export beyond 4 GiB is told whole', () => {
    const big = { ...CAPTURED, sizeBytes: 2 ** 44 + 512 };
    const outcome = run([Buffer.concat([HELLO, GOOD_GO])], big);
    expect(replies(outcome)[0]![2].toString('hex')).toBe('000000001000000002000d6d');
  });

  it('a refused GO leaves the connection good for another', () => {
    expect(kinds(go('nosuch'), go('standby'), go('leaving'), GOOD_GO)).toEqual([
      'UNKNOWN',
      'POLICY',
      'SHUTDOWN',
      'INFO',
      'ACK',
    ]);
    expect(endOf(go('nosuch'), GOOD_GO)).toBe('transmission');
    const [, , data] = replies(run([Buffer.concat([HELLO, go('standby')])]))[0]!;
    expect(data.toString()).toBe('Secondary here');
  });

  it('INFO does not enter transmission', () => {
    expect(kinds(go('data', [], 6), go('data', [], 6))).toEqual(['INFO', 'ACK', 'INFO', 'ACK']);
    expect(endOf(go('data', [], 6))).toBe('needData');
  });

  it('a selected context is bound to the export it was selected for', () => {
    const allocation = (...parts: Buffer[]) => run([Buffer.concat([HELLO, SR, ...parts])]).allocation;
    const select = (name: string, queries = ['base:allocation']) => meta(10, name, queries);
    expect(allocation(select('data'), GOOD_GO)).toBe(true);
    expect(allocation(select('data', ['x:y', 'base:allocation']), GOOD_GO)).toBe(true);
    expect(allocation(select('other'), GOOD_GO)).toBe(false);
    // A later selection replaces the earlier one, also when it finds nothing or fails.
    expect(allocation(select('data'), select('data', []), GOOD_GO)).toBe(false);
    expect(allocation(select('data'), select('nosuch'), GOOD_GO)).toBe(false);
    expect(allocation(select('data'), option(10, u32(9)), GOOD_GO)).toBe(false);
    expect(allocation(select('data', ['base:']), GOOD_GO)).toBe(false);
  });

  it('contexts are listed with id 0 and selected with another', () => {
    const listed = (queries: string[]) => replies(run([Buffer.concat([HELLO, SR, meta(9, 'data', queries)])])).slice(1);
    const hit = [9, 'META', Buffer.concat([u32(0), Buffer.from('base:allocation')])];
    for (const queries of [[], ['base:'], ['base:allocation'], ['q:z', 'base:allocation']])
      expect(listed(queries)).toEqual([hit, [9, 'ACK', Buffer.alloc(0)]]);
    for (const queries of [['qemu:'], ['no colon'], ['base:other']])
      expect(listed(queries)).toEqual([[9, 'ACK', Buffer.alloc(0)]]);
    const selected = replies(run([Buffer.concat([HELLO, SR, meta(10, 'data', ['base:allocation'])])]));
    expect(selected[1]![2].readUInt32BE(0)).toBe(1);
    expect(kinds(SR, meta(10, 'nosuch', ['base:allocation']))).toEqual(['ACK', 'UNKNOWN']);
  });
});

describe('negotiation: bad input, and what three servers do with it', () => {
  it('an unknown client flag closes', () => {
    expect(run([u32(7)])).toMatchObject({ end: 'closed', error: 'DRBDTS_NBD_BAD_CLIENT_FLAGS' });
    expect(run([u32(0x80000003)]).end).toBe('closed');
  });
  it('bad option magic closes before the rest of the header is there', () => {
    expect(endOf(Buffer.from('GET / HT'))).toBe('DRBDTS_NBD_BAD_OPTION_MAGIC');
  });
  it('LIST with payload is INVALID and stays in sync', () =>
    expect(kinds(option(3, Buffer.from('junk')), GOOD_GO)).toEqual(['INVALID', 'INFO', 'ACK']));
  it('LIST twice is answered twice', () =>
    expect(kinds(option(3), option(3))).toEqual(['SERVER', 'SERVER', 'ACK', 'SERVER', 'SERVER', 'ACK']));
  it('STRUCTURED_REPLY twice is fine, with payload INVALID', () =>
    expect(kinds(SR, SR, option(8, u32(1)))).toEqual(['ACK', 'ACK', 'INVALID']));
  it('unknown options are UNSUP, until there are more than 256 of them', () => {
    expect(kinds(...Array<Buffer>(200).fill(option(0x7654321, Buffer.from('payload'))), GOOD_GO)).toEqual([
      ...Array<string>(200).fill('UNSUP'),
      'INFO',
      'ACK',
    ]);
    expect(kinds(option(4), option(11), option(0))).toEqual(['UNSUP', 'UNSUP', 'UNSUP']);
    expect(endOf(...Array<Buffer>(256).fill(option(99)))).toBe('needData');
    expect(endOf(...Array<Buffer>(257).fill(option(99)))).toBe('DRBDTS_NBD_TOO_MANY_OPTIONS');
  });
  it('STARTTLS without TLS is refused by policy, with payload INVALID', () =>
    expect(kinds(option(5), option(5, u32(0)), GOOD_GO)).toEqual(['POLICY', 'INVALID', 'INFO', 'ACK']));
  it('meta contexts without structured replies are INVALID', () =>
    expect(kinds(meta(10, 'data', ['base:allocation']), meta(9, 'data', []))).toEqual(['INVALID', 'INVALID']));
  it('a meta query count that lies is INVALID and nothing else', () => {
    for (const [count, queries] of [
      [2, ['base:allocation']],
      [0xffffffff, ['base:allocation']],
      [0, ['base:allocation']],
      [1, ['base:allocation', 'extra:']],
    ] as const) {
      const data = Buffer.concat([text('data'), u32(count), ...queries.map(text)]);
      expect(kinds(SR, option(10, data), GOOD_GO)).toEqual(['ACK', 'INVALID', 'INFO', 'ACK']);
    }
    const longQuery = Buffer.concat([text('data'), u32(1), u32(0xfffffff0), Buffer.from('base:')]);
    expect(kinds(SR, option(10, longQuery))).toEqual(['ACK', 'INVALID']);
    expect(kinds(SR, option(10, Buffer.concat([u32(0xffffffff), Buffer.from('data'), u32(0)])))).toEqual([
      'ACK',
      'INVALID',
    ]);
    expect(kinds(SR, meta(9, 'data', Array<string>(64).fill('a:b')))).toEqual(['ACK', 'ACK']);
    expect(kinds(SR, meta(9, 'data', Array<string>(65).fill('a:b')))).toEqual(['ACK', 'TOO_BIG']);
  });
  it.each<[string, Buffer]>([
    ['name length 0xffffffff', Buffer.concat([u32(0xffffffff), Buffer.from('data'), u16(0)])],
    ['name length one too long', Buffer.concat([u32(5), Buffer.from('data'), u16(0)])],
    ['two bytes of data', u16(0)],
    ['no data', Buffer.alloc(0)],
    ['more information types than sent', Buffer.concat([text('data'), u16(9)])],
    ['fewer information types than sent', Buffer.concat([text('data'), u16(0), u16(3)])],
    ['a name of 5000 bytes', Buffer.concat([text('n'.repeat(5000)), u16(0)])],
    ['NUL in the name', Buffer.concat([text('da\0ta'), u16(0)])],
    ['a name that is not UTF-8', Buffer.concat([text(Buffer.from([0xff, 0xfe])), u16(0)])],
  ])('GO with %s is INVALID and stays in sync', (_, data) => {
    for (const number of [6, 7]) expect(kinds(option(number, data), GOOD_GO)).toEqual(['INVALID', 'INFO', 'ACK']);
  });
  it('a name of 4096 bytes is a name', () => expect(kinds(go('n'.repeat(4096)))).toEqual(['UNKNOWN']));
  it('option data beyond 16 KiB is skipped, beyond 64 KiB closes', () => {
    expect(kinds(option(99, Buffer.alloc(16384)), GOOD_GO)).toEqual(['UNSUP', 'INFO', 'ACK']);
    expect(kinds(option(7, Buffer.alloc(16385)), GOOD_GO)).toEqual(['TOO_BIG', 'INFO', 'ACK']);
    expect(kinds(option(99, Buffer.alloc(65536)), GOOD_GO)).toEqual(['TOO_BIG', 'INFO', 'ACK']);
    for (const length of [65537, 0x7fffffff, 0xffffffff]) {
      const header = Buffer.concat([Buffer.from('IHAVEOPT'), u32(7), u32(length)]);
      expect(endOf(header)).toBe('DRBDTS_NBD_OPTION_TOO_LONG');
    }
  });
  it('ABORT is acknowledged and closes, whatever comes with it', () => {
    expect(kinds(ABORT)).toEqual(['ACK']);
    expect(kinds(option(2, Buffer.from('junk')), GOOD_GO)).toEqual(['ACK']);
    expect(endOf(ABORT)).toBe('closed');
  });
  it('texts of errors stay within 256 bytes of UTF-8', () => {
    const negotiation = new NbdNegotiation();
    negotiation.receive(Buffer.concat([HELLO, GOOD_GO]));
    expect(negotiation.nextEvent().kind).toBe('open');
    negotiation.refused('policy', 'ä'.repeat(300));
    const sent = negotiation.takeOutput()!;
    expect(sent.length - 18 - 20).toBe(256);
    negotiation.receive(GOOD_GO);
    expect(negotiation.nextEvent().kind).toBe('open');
    negotiation.refused('policy', `a${'ä'.repeat(300)}`);
    expect(Buffer.from(negotiation.takeOutput()!.subarray(20)).toString()).toBe(`a${'ä'.repeat(127)}`);
  });
});

describe('negotiation: hostile bytes', () => {
  it('random bytes and mutated sessions end in an outcome, the same for every cut', () => {
    const valid = sessions.map((session) => Buffer.from(session.clientNegotiation, 'hex'));
    const mutated = fc
      .tuple(
        fc.constantFrom(...valid),
        fc.array(fc.tuple(fc.nat(200), fc.nat(255)), { maxLength: 4 }),
        fc.uint8Array({ maxLength: 40 }),
      )
      .map(([bytes, changes, tail]) => {
        const copy = Buffer.concat([bytes, tail]);
        for (const [at, value] of changes) if (at < copy.length) copy[at] = value;
        return new Uint8Array(copy);
      });
    const random = fc.uint8Array({ maxLength: 120 }).map((bytes) => new Uint8Array(Buffer.concat([HELLO, bytes])));
    fc.assert(
      fc.property(fc.oneof(mutated, random), fc.array(fc.nat(150), { maxLength: 4 }), (bytes, cuts) => {
        const whole = run([bytes]);
        const marks = [...new Set([0, ...cuts.filter((cut) => cut < bytes.length), bytes.length])].sort(
          (a, b) => a - b,
        );
        const chunks = marks.slice(1).map((end, index) => bytes.subarray(marks[index], end));
        expect(run(chunks)).toEqual(whole);
      }),
      { numRuns: 500 },
    );
  });
});
