import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { ConfigError } from '../../src/config/diagnostic.js';
import { loadConfig } from '../../src/config/drbd-conf.js';
import { dumpConfig } from '../../src/config/drbd-dump.js';
import { describeRepair, lintConfig, repairTypography } from '../../src/config/lint.js';
import { isLegalValue, OPTION_CATALOGUE, parseNumber, UNIT_LETTER } from '../../src/config/options.js';
import { errorsOf, HOSTS, mapSource, parse, warningsOf } from './support.js';

const VECTORS = join(import.meta.dirname, '../vectors/config');
const vector = (name: string): string => readFileSync(join(VECTORS, name), 'utf8');

/** The files of a head as they stand under /etc. */
function etc(folder: string): Record<string, string> {
  return {
    '/etc/drbd.conf': vector(`${folder}/drbd.conf`),
    '/etc/drbd.d/global_common.conf': vector(`${folder}/drbd.d/global_common.conf`),
    '/etc/drbd.d/data.res': vector(`${folder}/drbd.d/data.res`),
  };
}

const dump = (text: string): string =>
  dumpConfig(parse(text), { nodeName: 'alice', showSecrets: true, mainPath: '/t.conf' });

describe('the reference setup', () => {
  it('dumps in 8.4 form, byte for byte as drbdadm prints it', () => {
    const { config, warnings } = loadConfig(mapSource(etc('reference')), '/etc/drbd.conf');
    expect(warnings).toEqual([]);
    expect(dumpConfig(config, { nodeName: 'test-master' })).toBe(vector('reference.dump'));
  });

  it('is deeply frozen', () => {
    const { config } = loadConfig(mapSource(etc('reference')), '/etc/drbd.conf');
    expect(Object.isFrozen(config.resources[0]!.hosts[0]!.volumes[0]!.device)).toBe(true);
    expect(Object.isFrozen(config.common!.disk)).toBe(true);
  });
});

describe('words that grew together', () => {
  it.each([
    ['global { usage-countno; }', 'usage-count no'],
    ['common { syncer { rate50M; } }', 'rate 50M'],
    ['common { syncer { verify-algcrc32c; } }', 'verify-alg crc32c'],
    ['common { disk { on-io-errordetach; } }', 'on-io-error detach'],
    ['resource data { ontest-master { } }', 'on test-master'],
    ['resource data { protocolC; }', 'protocol C'],
    ['resource data { on a { device/dev/drbd0; } }', 'device /dev/drbd0'],
    ['resource data { on a { meta-diskinternal; } }', 'meta-disk internal'],
    ['resourcedata { }', 'resource data'],
  ])('%s', (text, split) => {
    expect(errorsOf(text)).toContain(`hint: did you mean "${split}"? (missing blank)`);
  });

  it('lint --fix makes the copied files of the web those of the reference setup', () => {
    const glued = mapSource(etc('glued'));
    const { found, repaired, remaining } = lintConfig(glued, '/etc/drbd.conf');
    expect(found.at(-1)!.message).toBe(
      "Parse error: 'dialog-refresh | minor-count | disable-ip-verification' expected,\n\tbut got 'usage-countno'",
    );
    expect(remaining).toEqual([]);
    const fixed = { ...etc('glued'), ...Object.fromEntries(repaired.map((file) => [file.path, file.after])) };
    const { config } = loadConfig(mapSource(fixed), '/etc/drbd.conf');
    expect(dumpConfig(config, { nodeName: 'test-master' })).toBe(vector('reference.dump'));
    expect(describeRepair(repaired[0]!)).toContain('-rate50M;\n+rate 50M;');
  });

  it('a repair never invents a value', () => {
    const files = { '/t.conf': 'common { syncer { rateXYZ; } }' };
    const { repaired, remaining } = lintConfig(mapSource(files), '/t.conf');
    expect(repaired).toEqual([]);
    expect(remaining).toHaveLength(1);
  });
});

describe('typographic damage', () => {
  it('is named with its code point', () => {
    expect(errorsOf('global\u00a0{ usage-count no; }')).toContain('hint: U+00A0 stands where a blank is meant');
    expect(errorsOf('global { usage-count no；}')).toContain('hint: U+FF1B stands where ";" is meant');
  });

  it('is repaired outside of comments and straight quotes only', () => {
    const damaged = '\ufeffresource r ｛ # “stay”\r\nnet { shared-secret "“x” – y"; cram–hmac–alg “sha1”； ｝';
    expect(repairTypography(damaged)).toBe(
      'resource r { # “stay”\nnet { shared-secret "“x” – y"; cram-hmac-alg "sha1"; }',
    );
  });
});

describe('syntax errors', () => {
  it('stop at the first one, with the line in which it stands', () => {
    expect(errorsOf('global {\n}\n\nresource r {\n  on alice {\n    wrong;\n')).toBe(
      "t.conf:6: Parse error: 'disk | device | address | meta-disk | flexible-meta-disk' expected,\n\tbut got 'wrong'",
    );
  });

  it.each([
    ['a name that is a keyword', 'resource net { }', 'put it in double quotes to use it as a name: "net"'],
    ['a host name as address', 'resource r { on a { address node1:7788; } }', 'write the numeric address'],
    ['IPv6 without brackets', 'resource r { on a { address ipv6 fd00::1:7788; } }', 'ipv6 [fd00::1]:7788'],
    ['a command line option', 'resource r { net { discard-my-data; } }', 'belongs on the command line'],
    ['a misspelt option', 'resource r { net { timeuot 60; } }', 'did you mean "timeout"?'],
    ['an unquoted list', 'resource r { options { cpu-mask 3,4; } }', 'a value with a comma needs double quotes'],
  ])('%s gets a hint', (_, text, hint) => {
    expect(errorsOf(text)).toContain(hint);
  });
});

describe('everything else that is wrong is listed together', () => {
  it('ranges with their unit, then the missing statements', () => {
    const text = 'resource r {\n net { timeout 6000; ping-int 5s; }\n on a { device minor 1; }\n on b { } }';
    expect(errorsOf(text).split('\n')).toEqual([
      't.conf:2: timeout 6000 => 6000 out of range [1..600].',
      'hint: timeout counts tenths of a second (0.1 s)',
      't.conf:2: ping-int 5s => 2560 out of range [1..120].',
      'hint: "s" means sectors of 512 bytes, not seconds; ping-int counts seconds',
      "t.conf:3: in resource r, on a { ... }: 'address' keyword missing.",
      "t.conf:3: in resource r, on a { ... }: 'disk' keyword missing.",
      "t.conf:3: in resource r, on a { ... }: 'meta-disk' keyword missing.",
      "t.conf:4: in resource r, on b { ... }: 'address' keyword missing.",
      't.conf:3: in resource r, on a { ... }: volume 0 not defined on b',
    ]);
  });

  it.each([
    ['a unit that is none', `resource r { disk { size 10T; } ${HOSTS} }`, 'T is not a unit here; write 10240G'],
    ['an unknown word', `resource r { disk { on-io-error detatch; } ${HOSTS} }`, 'hint: did you mean "detach"?'],
    ['a digest nobody has', `resource r { net { verify-alg rot13; } ${HOSTS} }`, "unknown digest 'rot13'"],
    ['crc32c as an HMAC', `resource r { net { cram-hmac-alg crc32c; } ${HOSTS} }`, "unknown digest 'crc32c'"],
    ['a secret of 65', `resource r { net { shared-secret ${'x'.repeat(65)}; } ${HOSTS} }`, 'at most 64'],
    ['special hardware', 'resource r { on a { address sdp 10.0.0.1:1; } }', 'not available in userspace'],
    ['hosts in common', 'common { on a { disk "{"; } }', 'there are no host sections allowed.'],
    [
      'both without two primaries',
      `resource r { startup { become-primary-on both; } ${HOSTS} }`,
      'allow-two-primaries is not set',
    ],
    ['a loser that is no host', `resource r { net { after-sb-0pri discard-node-eve; } ${HOSTS} }`, "names 'eve'"],
    [
      'an unknown resync-after',
      `resource r { disk { resync-after q; } ${HOSTS} }`,
      "resource 'q' mentioned in 'resync-after'",
    ],
  ])('%s', (_, text, message) => {
    expect(errorsOf(text)).toContain(message);
  });

  it('the same backing disk in two resources of a host is a conflict with both places', () => {
    const second = HOSTS.replaceAll('minor 1', 'minor 2').replaceAll(':7788', ':7789');
    const message = errorsOf(`resource r {\n${HOSTS}\n}\nresource s {\n${second}\n}`);
    expect(message).toBe(
      "t.conf:6: conflicting use of disk 'disk:alice:/dev/a' ...\nt.conf:2: disk 'disk:alice:/dev/a' first used here.\n" +
        "t.conf:7: conflicting use of disk 'disk:bob:/dev/a' ...\nt.conf:3: disk 'disk:bob:/dev/a' first used here.",
    );
  });
});

describe('warnings', () => {
  it('for what is accepted but surely not meant', () => {
    const text = `resource r {\n;\nnet { timeout 6; timeout 7; }\n${HOSTS}`;
    expect(warningsOf(text)).toEqual([
      '2: empty statement: this ";" belongs to nothing',
      "5: the file ends inside resource r, expected '}' for the brace opened in line 1",
      '3: timeout is set a second time (first in line 3), the last one wins',
    ]);
  });

  it('for what has no effect here, once, and not for asking for the default', () => {
    const text = `common { disk { no-disk-barrier; max-bio-bvecs 1; } } resource r { disk { max-bio-bvecs 2; } ${HOSTS} }`;
    expect(warningsOf(text)).toEqual(['1: max-bio-bvecs is kept and shown by dump, but has no effect in drbdts']);
  });

  it('for a policy that changes data in use', () => {
    expect(warningsOf(`common { net { after-sb-2pri violently-as0p; } } resource r { ${HOSTS} }`)).toEqual([
      '1: in resource r:\n\tafter-sb-2pri violently-as0p changes data under a mounted filesystem',
    ]);
  });

  it('for combinations the engine will refuse, and a timeout that outlives the keep-alive', () => {
    expect(warningsOf(`resource r { net { protocol A; allow-two-primaries; timeout 100; } ${HOSTS} }`)).toEqual([
      '1: in resource r:\n\tallow-two-primaries with protocol A, expected protocol C',
      '1: in resource r:\n\ttimeout 100 (0.1 s) is not shorter than connect-int 10 (s)',
      '1: in resource r:\n\ttimeout 100 (0.1 s) is not shorter than ping-int 10 (s)',
    ]);
  });
});

describe('includes', () => {
  const res = (name: string, number: number): string =>
    `resource ${name} { ${HOSTS.replaceAll('minor 1', `minor ${number}`)
      .replaceAll('/dev/a', `/dev/${name}`)
      .replaceAll('7788', `${7000 + number}`)} }`;

  it('are relative to the including file, in sorted order, each file once', () => {
    const source = mapSource({
      '/etc/drbd.conf': 'include "drbd.d/*.res"; include "drbd.d/a.res";',
      '/etc/drbd.d/b.res': res('b', 2),
      '/etc/drbd.d/a.res': `${res('a', 1)} include "more/c.res";`,
      '/etc/drbd.d/more/c.res': `${res('c', 3)} include "/etc/drbd.conf";`,
    });
    const { config } = loadConfig(source, '/etc/drbd.conf');
    expect(config.resources.map((resource) => resource.name)).toEqual(['a', 'c', 'b']);
    expect(config.files).toEqual([
      '/etc/drbd.conf',
      '/etc/drbd.d/a.res',
      '/etc/drbd.d/more/c.res',
      '/etc/drbd.d/b.res',
    ]);
  });

  it('a missing file is an error, a pattern without matches is not', () => {
    expect(errorsOf('include "x.res";')).toBe("t.conf:1: Failed to open include file 'x.res'.");
    expect(parse('include "x*.res";').resources).toEqual([]);
  });

  it('errors name an included file as its include statement does', () => {
    const source = mapSource({ '/etc/drbd.conf': 'include "drbd.d/x.res";', '/etc/drbd.d/x.res': '\nfoo' });
    expect(() => loadConfig(source, '/etc/drbd.conf')).toThrow("drbd.d/x.res:2: Parse error: 'global | common");
  });

  it.each([
    ['hosts', `resource r { ${Array.from({ length: 33 }, (_, n) => `on h${n} { }`).join(' ')} }`],
    ['volumes', `resource r { ${Array.from({ length: 257 }, (_, n) => `volume ${n} { }`).join(' ')} }`],
    ['statements in one section', `common { net { ${'timeout 60; '.repeat(1001)} } }`],
  ])('too many %s are refused', (what, text) => {
    expect(errorsOf(text)).toContain(`too many ${what}, expected at most`);
  });

  it('end at 16 levels', () => {
    const files: Record<string, string> = {};
    for (let level = 0; level < 40; level++) files[`/f${level}`] = `include "/f${level + 1}";`;
    expect(() => loadConfig(mapSource(files), '/f0')).toThrow('f16:1: includes are nested too deeply');
  });

  it('a missing main file is exit code 20', () => {
    try {
      loadConfig(mapSource({}), '/etc/drbd.conf');
      expect.unreachable();
    } catch (error) {
      expect(error).toBeInstanceOf(ConfigError);
      expect((error as ConfigError).exitCode).toBe(20);
      expect((error as ConfigError).message).toBe("Can not open '/etc/drbd.conf'.");
    }
  });
});

describe('DRBD 9 configurations of two nodes', () => {
  it('are read, and what has no effect is named once per word', () => {
    const text = `resource r {
      options { auto-promote yes; quorum majority; }
      net { transport tcp; fencing resource-only; }
      on alice { node-id 0; device minor 1; disk /dev/a; meta-disk internal; }
      on bob { node-id 1; device minor 1; disk /dev/a; meta-disk internal; }
      connection { host alice address 10.0.0.1:7000; host bob address ipv4 10.0.0.2:7000; net { protocol B; } }
    }`;
    expect(warningsOf(text).map((line) => line.replace(/ is .*/, ''))).toEqual([
      '2: "auto-promote"',
      '2: "quorum"',
      '3: "transport"',
      '4: "node-id"',
    ]);
    const [resource] = parse(text).resources;
    expect(resource!.hosts.map((host) => host.address)).toEqual([
      { family: 'ipv4', host: '10.0.0.1', port: 7000 },
      { family: 'ipv4', host: '10.0.0.2', port: 7000 },
    ]);
    expect(resource!.sections.net.map((setting) => `${setting.name} ${setting.value}`)).toEqual(['protocol B']);
    expect(resource!.sections.disk.map((setting) => `${setting.name} ${setting.value}`)).toEqual([
      'fencing resource-only',
    ]);
  });

  it('a mesh of known hosts is fine, a second connection is not', () => {
    expect(
      parse(`resource r { connection-mesh { hosts alice bob; net { timeout 6; } } ${HOSTS} }`).resources,
    ).toHaveLength(1);
    expect(errorsOf(`resource r { connection-mesh { hosts alice eve; } ${HOSTS} }`)).toContain(
      "host 'eve', expected one of: alice, bob",
    );
    expect(errorsOf(`resource r { connection { } connection { } ${HOSTS} }`)).toContain('drbdts pairs two nodes');
  });
});

describe('the lexer', () => {
  it('takes 128 characters as a word and 255 in quotes, and not one more', () => {
    const verify = (value: string): string => `resource r { handlers { pri-lost ${value}; } ${HOSTS} }`;
    expect(parse(verify('x'.repeat(128))).resources).toHaveLength(1);
    expect(errorsOf(verify('x'.repeat(129)))).toContain('Token too long');
    expect(parse(verify(`"${'x'.repeat(255)}"`)).resources).toHaveLength(1);
    expect(errorsOf(verify(`"${'x'.repeat(256)}"`))).toContain('Double quoted string too long');
  });

  it('blanks and comments around punctuation change nothing', () => {
    const tokens = [
      'resource',
      'r',
      '{',
      'net',
      '{',
      'timeout',
      '20',
      ';',
      '}',
      ...HOSTS.split(/(?<=[{};])|(?=[{};])|\s+/),
      '}',
    ].filter((token) => token.trim() !== '');
    const plain = dump(tokens.join(' '));
    const gap = fc.constantFrom(' ', '\t', '\n', '\r\n', ' # } ; {\n', '  ');
    fc.assert(
      fc.property(fc.array(gap, { minLength: tokens.length, maxLength: tokens.length }), (gaps) => {
        const text = tokens.map((token, index) => gaps[index]! + token).join(' ');
        const place = (out: string): string => out.replace(/:\d+\n/, ':\n');
        expect(place(dump(text))).toBe(place(plain));
      }),
      { numRuns: 50 },
    );
  });
});

describe('the option catalogue', () => {
  const numbers = OPTION_CATALOGUE.flatMap((option) =>
    option.type.kind === 'number' ? [{ ...option, type: option.type }] : [],
  );

  it.each(numbers.map((option) => [`${option.section} ${option.name}`, option] as const))(
    '%s: limits hold at both ends',
    (_, option) => {
      const { min, max, default: byDefault } = option.type;
      const text = (value: number): string =>
        option.section === 'global'
          ? `global { ${option.name} ${value}; }`
          : `resource r { ${option.section} { ${option.name} ${value}; } ${HOSTS} }`;
      expect(byDefault).toBeGreaterThanOrEqual(min);
      expect(byDefault).toBeLessThanOrEqual(max);
      for (const value of [min, max]) expect(() => parse(text(value))).not.toThrow();
      const letter = UNIT_LETTER[option.type.unit];
      expect(errorsOf(text(max + 1))).toContain(
        `${option.name} ${max + 1} => ${max + 1}${letter} out of range [${min}..${max}]${letter}.`,
      );
      if (min > 0) expect(errorsOf(text(min - 1))).toContain(`out of range [${min}..${max}]`);
    },
  );

  it('reads units as DRBD does: powers of 1024, sectors of 512, rounded up', () => {
    expect(parseNumber('33M', 'KiB/s')).toBe(33 * 1024);
    expect(parseNumber('50m', 'KiB/s')).toBe(51200);
    expect(parseNumber('1s', 'KiB/s')).toBe(1);
    expect(parseNumber('3s', 'KiB/s')).toBe(2);
    expect(parseNumber('10G', 'sectors')).toBe(10 * 2 ** 21);
    expect(parseNumber('512K', 'bytes')).toBe(524288);
    expect(parseNumber('5s', 's')).toBe(2560);
    for (const bad of ['', 'K', '10T', '33MB', '0x10', '-1', '5.', ' 5'])
      expect(parseNumber(bad, 'bytes')).toBeUndefined();
  });

  it('every default is a legal value', () => {
    for (const option of OPTION_CATALOGUE)
      if (option.type.kind === 'enum' || option.type.kind === 'number')
        expect(isLegalValue(option, String(option.type.default)), option.name).toBe(true);
  });
});

describe('hostile input', { timeout: 60_000 }, () => {
  const base = Object.values(etc('reference')).slice(1).join('\n');

  /** Only a ConfigError may come out, and soon. */
  function survives(text: string): void {
    const started = performance.now();
    try {
      const first = dump(text);
      expect(dump(first).replaceAll(/:\d+\n/g, '\n')).toBe(first.replaceAll(/:\d+\n/g, '\n'));
    } catch (error) {
      if (!(error instanceof ConfigError)) throw error;
      expect(error.diagnostics.length).toBeGreaterThan(0);
      expect(error.diagnostics.length).toBeLessThanOrEqual(200);
      expect(error.message.length).toBeLessThan(200_000);
    }
    // Generous, since the machine may be busy: what is caught here is quadratic time, which takes minutes.
    expect(performance.now() - started).toBeLessThan(15_000);
  }

  it('random bytes never do anything but be refused or read', () => {
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 400 }), (bytes) => survives(Buffer.from(bytes).toString('utf8'))),
      { numRuns: 300 },
    );
  });

  it('random words of the grammar neither', () => {
    const words = fc.constantFrom(
      ...'{ { } } ; ; ; [ ] : resource r global common skip include on alice bob net disk syncer startup handlers options proxy plugin'.split(
        ' ',
      ),
      ...'volume 0 1 device minor meta-disk internal address ipv6 10.0.0.1 7788 floating timeout rate "x y" connection host path'.split(
        ' ',
      ),
      'stacked-on-top-of',
      'protocol',
      'C',
      '"',
    );
    fc.assert(
      fc.property(fc.array(words, { maxLength: 60 }), (list) => survives(list.join(' '))),
      { numRuns: 500 },
    );
  });

  it('mutations of a good config are read or refused, and a dump of what is read reads back to itself', () => {
    const edit = fc.record({ at: fc.nat(base.length), remove: fc.nat(12), insert: fc.string({ maxLength: 6 }) });
    fc.assert(
      fc.property(fc.array(edit, { minLength: 1, maxLength: 4 }), (edits) => {
        let text = base;
        for (const { at, remove, insert } of edits) text = text.slice(0, at) + insert + text.slice(at + remove);
        survives(text);
      }),
      { numRuns: 400 },
    );
  });

  it('lint ends on anything, and has nothing to repair in what it repaired', () => {
    fc.assert(
      fc.property(fc.nat(base.length), fc.nat(6), (at, remove) => {
        const text = base.slice(0, at) + base.slice(at + remove);
        const { repaired } = lintConfig(mapSource({ '/t.conf': text }), '/t.conf');
        const after = repaired[0]?.after ?? text;
        expect(lintConfig(mapSource({ '/t.conf': after }), '/t.conf').repaired).toEqual([]);
      }),
      { numRuns: 100 },
    );
  });

  it.each([
    ['a megabyte of opening braces', `skip ${'{'.repeat(1_000_000)}`],
    ['a megabyte of digits', `resource r { disk { size ${'9'.repeat(1_000_000)}; } }`],
    ['a quote that never closes', `"${'x'.repeat(1_000_000)}`],
    ['ninety thousand warnings', `resource r { ${';'.repeat(900_000)} ${HOSTS} }`],
    ['a hundred thousand bad options', `resource r { net { ${'timeout 0; '.repeat(90_000)} } ${HOSTS} }`],
    ['sixty thousand volumes', `resource r { ${Array.from({ length: 60_000 }, (_, n) => `volume ${n}{}`).join('')} }`],
    ['sixty thousand hosts', `resource r { ${Array.from({ length: 60_000 }, (_, n) => `on h${n}{}`).join('')} }`],
    ['a host of many names', `resource r { on ${Array.from({ length: 60_000 }, (_, n) => `h${n}`).join(' ')} { } }`],
    ['a comment that is all', `#${'x'.repeat(1_000_000)}`],
    ['more than a mebibyte', ' '.repeat(1024 * 1024 + 1)],
  ])('%s', (_, text) => survives(text));
});
