import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { ConfigError } from '../../src/config/diagnostic.js';
import {
  type ClientNames,
  type ExportTable,
  matchExport,
  NO_NAMES,
  parseExports,
  readExports,
} from '../../src/config/exports.js';
import { mapSource } from './support.js';

const FILE = '/etc/exports';

const parse = (text: string): ExportTable => parseExports([{ path: FILE, text }]).table;
const warningsOf = (text: string): string[] =>
  parseExports([{ path: FILE, text }]).warnings.map((warning) => `${warning.line}: ${warning.message}`);

function errorsOf(text: string): string {
  try {
    parseExports([{ path: FILE, text }]);
  } catch (error) {
    if (error instanceof ConfigError) return error.message;
    throw error;
  }
  throw new Error(`accepted: ${text.slice(0, 100)}`);
}

/** `rw`, `ro`, or undefined if the client gets nothing. */
function access(
  table: ExportTable,
  path: string,
  address: string,
  names: Partial<ClientNames> = {},
): string | undefined {
  const client = matchExport(table, path, address, { ...NO_NAMES, ...names });
  return client && (client.options.writable ? 'rw' : 'ro');
}

describe('the reference setup', () => {
  const text = readFileSync(join(import.meta.dirname, '../vectors/config/reference/exports'), 'utf8');
  const table = parse(text);

  it('gives every host of 10.96.20 read and write as nobody, under one fsid, when the filesystem is mounted', () => {
    expect(matchExport(table, '/drbd', '10.96.20.115')!.options).toEqual({
      writable: true,
      sync: true,
      writeDelay: true,
      secure: true,
      rootSquash: true,
      allSquash: true,
      anonUid: 65534,
      anonGid: 65534,
      allowAuthSys: true,
      allowAuthNone: false,
      subtreeCheck: false,
      crossMount: false,
      hide: true,
      acl: true,
      secureLocks: true,
      readdirPlus: true,
      mountPoint: '/drbd',
      fsid: 2,
    });
    expect(warningsOf(text)).toEqual([]);
  });

  it('nobody else gets anything, whatever their name says', () => {
    const liar: Partial<ClientNames> = { confirmed: ['10.96.20.5', '10.96.20.5.evil.example'] };
    expect(access(table, '/drbd', '10.96.21.5', liar)).toBeUndefined();
    expect(access(table, '/drbd', '110.96.20.5')).toBeUndefined();
    expect(access(table, '/other', '10.96.20.5')).toBeUndefined();
    expect(access(table, '/drbd', 'fd00::1')).toBeUndefined();
    expect(access(table, '/drbd', 'nonsense')).toBeUndefined();
  });

  it('an IPv4 address in IPv6 clothes is the same address; the path may have slashes to spare', () => {
    expect(access(table, '/drbd', '::ffff:10.96.20.5')).toBe('rw');
    expect(access(table, '//drbd/', '10.96.20.5')).toBe('rw');
  });
});

describe('paths', () => {
  it.each([
    ['"/a b" h(rw)', '/a b'],
    ['/a\\040b h(rw)', '/a b'],
    ['/a\\043b h(rw)', '/a#b'],
    ['/a\\134b h(rw)', '/a\\b'],
    ['/\\303\\251 h(rw)', '/é'],
    ['//a///b/ h', '/a/b'],
    ['/ h', '/'],
    ['/a \\\n  h(rw)', '/a'],
  ])('%j is %s', (line, path) => {
    expect(parse(line).entries.map((entry) => entry.path)).toEqual([path]);
  });

  it.each([
    ['relative h', 'relative h'],
    ['/a/../b h', 'contains . or ..'],
    ['/a\\9b h', 'bad escape'],
    ['"/a b h(rw)', 'unterminated quote'],
    ['/a\\000b h', 'NUL'],
    [`/${'x'.repeat(1025)} h`, 'at most 1024'],
  ])('%j is refused', (line, message) => {
    if (line === message) message = 'expected an absolute path';
    expect(errorsOf(`# first\n${line}`)).toMatch(/^\/etc\/exports:2: /);
    expect(errorsOf(line)).toContain(message);
  });
});

describe('items', () => {
  it('options behind a dash hold for the items that follow, and add up', () => {
    const [entry] = parse('/x -rw,async,anonuid=7 a(insecure) b(ro) -ro c d(rw)').entries;
    const seen = entry!.clients.map((client) => {
      const { writable, sync, secure, anonUid } = client.options;
      return [client.text, writable, sync, secure, anonUid];
    });
    expect(seen).toEqual([
      ['a', true, false, false, 7],
      ['b', false, false, true, 7],
      ['c', false, false, true, 7],
      ['d', true, false, true, 7],
    ]);
  });

  it("one item's options are not the next one's", () => {
    const [entry] = parse('/x host1(rw,no_root_squash) host2').entries;
    expect(entry!.clients[1]!.options).toMatchObject({ writable: false, rootSquash: true });
  });

  it('the blank trap is read as nfs-utils reads it, and called out', () => {
    const table = parse('/x host (rw)');
    expect(access(table, '/x', '192.0.2.1')).toBe('rw');
    expect(access(table, '/x', '192.0.2.1', { resolvesTo: (name) => name === 'host' })).toBe('ro');
    const { warnings } = parseExports([{ path: FILE, text: '/x host (rw)' }]);
    expect(warnings.map((warning) => [warning.message, warning.hint])).toEqual([
      ['(rw) stands alone and is granted to everybody', 'for "host" only, write host(rw) without a blank'],
    ]);
  });

  it('a path alone is exported to everybody, with a warning', () => {
    expect(access(parse('/x'), '/x', '192.0.2.1')).toBe('ro');
    expect(warningsOf('/x')[0]).toContain('1: /x names no client and is exported to everybody');
  });

  it('lines of one path add up; the first of equal clients holds', () => {
    const text = '/x 10.0.0.0/8(ro)\n/y *\n/x 10.0.0.0/255.0.0.0(rw) 192.0.2.1(rw)';
    const table = parse(text);
    expect(table.entries.map((entry) => [entry.path, entry.clients.length])).toEqual([
      ['/x', 2],
      ['/y', 1],
    ]);
    expect(access(table, '/x', '10.1.1.1')).toBe('ro');
    expect(warningsOf(text)).toEqual([
      '3: /x is exported to 10.0.0.0/255.0.0.0 a second time (first in line 1), the first one holds',
    ]);
  });

  it.each([
    ['/x *(rw', 'bad option list'],
    ['/x h(rw)x', 'bad option list'],
    ['/x h(rw)(ro)', 'bad option list'],
    ['/x h)', "')' without '('"],
    ['/x h(rw,bogus)', "unknown option 'bogus'"],
    ['/x h(rw,no_rot_squash)', 'did you mean "no_root_squash"?'],
    ['/x 10.0.0.0/33', 'is no mask'],
    ['/x 10.0.0.0/255.0.255.0', 'is no mask'],
    ['/x 10.0.0/24', 'is no network'],
    ['/x 10.0.0.256', 'is no address'],
    ['/x 2001:db8::/129', 'is no mask'],
    ['/x 2001:db8:::1', 'is no address'],
    ['/x @', 'is no netgroup'],
    ['/x ho$t', 'is no client'],
    ['/x h(anonuid=4294967295)', 'not an id'],
    ['/x h(anonuid=-1)', 'not an id'],
    ['/x h(anongid=x)', 'not an id'],
    ['/x h(fsid=4294967296)', 'not an fsid'],
    ['/x h(mp=rel)', 'the path is relative'],
    ['/x h(sec=krb5)', "security flavor 'krb5' is not available"],
    ['/x h(sec=sys,rw,sec=none,ro)', 'sec= twice'],
    ['/x h(xprtsec=mtls)', 'transport security is not available'],
    ['/x h(refer=/a@b)', 'referrals need NFSv4'],
    ['/x h(squash_uids=0-10)', 'is refused'],
    ['/x a(fsid=1) b(fsid=2)', 'two different fsid'],
    ['/x a(fsid=1)\n/y a(fsid=1)', 'fsid=1 is that of /x already'],
  ])('%j is refused', (line, message) => {
    expect(errorsOf(line)).toContain(message);
  });

  it('one bad line keeps the whole table out, and every bad line is named', () => {
    expect(
      errorsOf('/a *(rw)\n/b h(bogus)\nc h\n')
        .split('\n')
        .map((line) => line.slice(0, 15)),
    ).toEqual(['/etc/exports:2:', '/etc/exports:3:']);
  });

  it.each([
    ['anonuid=-2', { anonUid: 4294967294 }],
    ['all_squash,no_all_squash', { allSquash: false }],
    ['fsid=root', { fsid: 0 }],
    ['fsid=0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0', { fsUuid: '0f1e2d3c4b5a69788796a5b4c3d2e1f0' }],
    ['mountpoint=/srv/', { mountPoint: '/srv' }],
    ['mp', { mountPoint: '/x' }],
    ['sec=sys:none', { allowAuthSys: true, allowAuthNone: true }],
    ['sec=none,rw', { allowAuthSys: false, allowAuthNone: true, writable: true }],
    ['no_auth_nlm,no_acl,nordirplus', { secureLocks: false, acl: false, readdirPlus: false }],
    ['nohide,crossmnt,no_wdelay,insecure', { hide: false, crossMount: true, writeDelay: false, secure: false }],
    ['xprtsec=none', {}],
  ])('%s', (options, expected) => {
    expect(parse(`/x h(${options})`).entries[0]!.clients[0]!.options).toMatchObject(expected);
  });

  it.each([
    ['/x h(async)', 'a crash loses acknowledged writes'],
    ['/x h(subtree_check)', 'breaks clients that hold renamed files open'],
    ['/x h(pnfs)', 'no effect on an NFSv3 server'],
    ['/x 10.0.0.7/24', 'has bits set behind the mask'],
  ])('%s is warned about', (line, message) => {
    expect(warningsOf(line).join()).toContain(message);
  });
});

describe('who gets what', () => {
  it('host name, network, pattern, netgroup, everybody: in this order, however written', () => {
    const table = parse(
      '/x *(ro,anonuid=1) @ng(rw,anonuid=2) *.lan(ro,anonuid=3) 10.0.0.0/8(rw,anonuid=4) nfs1.lan(anonuid=5)',
    );
    const uid = (address: string, names: Partial<ClientNames>): number =>
      matchExport(table, '/x', address, { ...NO_NAMES, ...names })!.options.anonUid;
    const all: ClientNames = {
      confirmed: ['nfs1.lan'],
      resolvesTo: (name) => name === 'nfs1.lan',
      isInNetgroup: () => true,
    };
    expect(uid('10.0.0.1', all)).toBe(5);
    expect(uid('10.0.0.1', { ...all, resolvesTo: () => false })).toBe(4);
    expect(uid('192.0.2.1', { ...all, resolvesTo: () => false })).toBe(3);
    expect(uid('192.0.2.1', { isInNetgroup: (name) => name === 'ng' })).toBe(2);
    expect(uid('192.0.2.1', {})).toBe(1);
  });

  it('a network outranks a numeric pattern', () => {
    const table = parse('/x 10.96.20.*(rw) 10.96.20.9(ro)');
    expect(access(table, '/x', '10.96.20.9')).toBe('ro');
    expect(access(table, '/x', '10.96.20.8')).toBe('rw');
  });

  it('among networks the first one written holds, with a warning about the one it hides', () => {
    const text = '/x 10.96.20.0/24(rw) 10.96.20.9(ro)';
    expect(access(parse(text), '/x', '10.96.20.9')).toBe('rw');
    expect(warningsOf(text)).toEqual(['1: /x: 10.96.20.9 is never reached, 10.96.20.0/24 before it covers it']);
    expect(warningsOf('/x 10.96.20.9(ro) 10.96.20.0/24(rw)')).toEqual([]);
  });

  it('addresses are compared as numbers: 10.0.0.1 is not the start of 10.0.0.10', () => {
    const table = parse('/x 10.0.0.1(rw)');
    expect(access(table, '/x', '10.0.0.1')).toBe('rw');
    expect(access(table, '/x', '10.0.0.10')).toBeUndefined();
  });

  it.each([
    ['10.0.0.0/255.0.0.0', '10.255.0.1', '11.0.0.1'],
    ['10.0.0.128/25', '10.0.0.129', '10.0.0.127'],
    ['0.0.0.0/0', '203.0.113.5', '2001:db8::1'],
    ['2001:db8::/33', '2001:db8:7fff::1', '2001:db8:8000::1'],
    ['::1', '0:0:0:0:0:0:0:1', '::2'],
    ['::ffff:10.0.0.0/120', '10.0.0.200', '10.0.1.1'],
    ['10.0.[0-3].?', '10.0.2.7', '10.0.2.77'],
  ])('%s covers %s and not %s', (client, inside, outside) => {
    const table = parse(`/x ${client}(rw)`);
    expect(access(table, '/x', inside)).toBe('rw');
    expect(access(table, '/x', outside)).toBeUndefined();
  });

  it('name patterns see confirmed names only, with dots, in any case', () => {
    const table = parse('/x web[0-9]?.Lan(rw) *.example.org(rw)');
    expect(access(table, '/x', '192.0.2.1', { confirmed: ['WEB12.lan'] })).toBe('rw');
    expect(access(table, '/x', '192.0.2.1', { confirmed: ['a.b.example.org'] })).toBe('rw');
    expect(access(table, '/x', '192.0.2.1', { confirmed: ['webx2.lan'] })).toBeUndefined();
    expect(access(table, '/x', '192.0.2.1')).toBeUndefined();
  });
});

describe('files', () => {
  it('/etc/exports.d is read behind /etc/exports, sorted, without dot files and other names', () => {
    const source = mapSource({
      '/etc/exports': '/a *',
      '/etc/exports.d/2.exports': '/c *',
      '/etc/exports.d/1.exports': '/b *',
      '/etc/exports.d/readme': 'not one',
    });
    const { table } = parseExports(readExports(source));
    expect(table.entries.map((entry) => entry.path)).toEqual(['/a', '/b', '/c']);
    expect(parseExports(readExports(mapSource({}))).table.entries).toEqual([]);
  });

  it('DOS line ends, a byte order mark and comments are no matter', () => {
    const text = '\ufeff# exports\r\n/a h(rw) # nightly\r\n\r\n/b h(ro)\r\n';
    expect(parse(text).entries.map((entry) => entry.clients[0]!.line)).toEqual([2, 4]);
  });

  it('a line of more than 64 KiB is refused, also one pieced together', () => {
    expect(errorsOf(`/a ${'h '.repeat(40_000)}`)).toContain('expected at most 65536');
    expect(errorsOf('/a h \\\n'.repeat(20_000))).toContain('expected at most 65536');
    expect(
      parse(`/a ${Array.from({ length: 5000 }, (_, index) => `h${index}`).join(' ')}`).entries[0]!.clients,
    ).toHaveLength(5000);
  });

  it('the table is plain frozen data', () => {
    const table = parse('/a 10.0.0.0/8(rw,fsid=3) *.x @n h');
    expect(JSON.parse(JSON.stringify(table))).toEqual(table);
    expect(Object.isFrozen(table.entries[0]!.clients[0]!.options)).toBe(true);
  });
});

describe('hostile input', { timeout: 60_000 }, () => {
  const pieces = fc.constantFrom(
    ...'/a /b * (rw) h(rw) ( ) , - -ro @x 10.0.0.0/8 ::/0 " \\ \\040 # \n \r\n fsid= fsid=1 mp sec=sys [a-z]* 1.*'.split(
      ' ',
    ),
  );

  it('only ever a table or a ConfigError, and no client without a line that names it', () => {
    fc.assert(
      fc.property(
        fc.array(fc.oneof(pieces, fc.string({ maxLength: 8 })), { maxLength: 40 }),
        fc.ipV4(),
        (parts, address) => {
          const text = parts.join(' ');
          try {
            const table = parse(text);
            for (const entry of table.entries) {
              expect(entry.path.startsWith('/')).toBe(true);
              const client = matchExport(table, entry.path, address);
              if (client) expect(entry.clients).toContain(client);
            }
          } catch (error) {
            if (!(error instanceof ConfigError)) throw error;
          }
        },
      ),
      { numRuns: 500 },
    );
  });

  it('a slow pattern stays quick', () => {
    const table = parse(`/x ${'*a'.repeat(120)}(rw)`);
    const started = performance.now();
    expect(access(table, '/x', '192.0.2.1', { confirmed: ['a'.repeat(254)] })).toBe('rw');
    expect(access(table, '/x', '192.0.2.1', { confirmed: ['b'.repeat(254)] })).toBeUndefined();
    expect(performance.now() - started).toBeLessThan(5000);
  });
});
