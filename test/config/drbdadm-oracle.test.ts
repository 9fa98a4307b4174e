import { spawnSync } from 'node:child_process';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { ConfigError } from '../../src/config/diagnostic.js';
import { loadConfig } from '../../src/config/drbd-conf.js';
import { dumpConfig } from '../../src/config/drbd-dump.js';
import { fileConfigSource } from '../../src/io/config-source.js';
import { requires } from '../support/requires.js';

/** The 8.4 configuration tool of drbd-utils 9.22, which nobody here wrote. It wants to be root even for dump. */
const DRBDADM = '/lib/drbd/drbdadm-84';
const isPossible = requires(DRBDADM, 'drbd-utils') && process.getuid?.() === 0;

const NODE = 'alice';
const GLOBAL = 'global { disable-ip-verification; }\n';
const HOSTS = `
  on alice { device minor 1; disk /dev/a; meta-disk internal; address 10.0.0.1:7788; }
  on bob { device minor 1; disk /dev/a; meta-disk internal; address 10.0.0.2:7788; }`;
const resource = (body: string): string => `${GLOBAL}resource r {\n${body}\n${HOSTS}\n}\n`;

/** Accepted by drbdadm, with the very same dump from us. */
const ACCEPTED: readonly string[] = [
  '',
  '# only a comment',
  'global { usage-count yes; minor-count 64; dialog-refresh 5; cmd-timeout-short 7; disable-ip-verification; }',
  'global{usage-count no;}common{disk{on-io-error detach;}}',
  resource(''),
  resource('protocol C;'),
  resource('protocol B; net { timeout 6; }'),
  resource('net { timeout 6; } protocol a;'),
  resource('net { timeout "60"; verify-alg sha1; cram-hmac-alg "sha1"; shared-secret ""; }'),
  resource('net { shared-secret "a\\"b\\\\c\\n"; }'),
  resource(
    'net { allow-two-primaries; shared-secret "foo bar"; sndbuf-size 512K; rcvbuf-size 0; use-rle no; tcp-cork; }',
  ),
  resource(
    'net { after-sb-0pri discard-zero-changes; after-sb-1pri consensus; after-sb-2pri call-pri-lost-after-sb; }',
  ),
  resource('net { after-sb-0pri discard-node-bob; rr-conflict call-pri-lost; always-asbp; }'),
  resource('net { protocol A; on-congestion pull-ahead; congestion-fill 4; congestion-extents 67; }'),
  resource('net { ping-int 3; ping-int 4; timeout 20; protocol A; protocol B; } protocol C;'),
  resource('net { unplug-watermark 1; max-epoch-size 20000; max-buffers 8k; timeout 060; ko-count 0; }'),
  resource('net { csums-alg md5; csums-after-crash-only; data-integrity-alg crc32c; socket-check-timeout 5; }'),
  resource('net { no-tcp-cork; delay-probe-volume 3; }'),
  resource('disk { no-disk-barrier; no-disk-flushes; no-disk-drain; no-md-flushes; throttle-threshold 4; }'),
  resource('disk { on-io-error pass_on; fencing resource-only; al-updates no; disk-timeout 5; max-bio-bvecs 1; }'),
  resource('disk { size 10G; c-plan-ahead 0; c-fill-target 24k; c-max-rate 1000; c-min-rate 1s; resync-rate 33M; }'),
  resource('disk { al-extents 3389; rs-discard-granularity 64k; read-balancing 32K-striping; disable-write-same; }'),
  resource(
    'disk { discard-zeroes-if-aligned no; resync-rate 100; disk-flushes no; disk-barrier; c-delay-target 100; }',
  ),
  resource('options { cpu-mask 3; on-no-data-accessible suspend-io; }'),
  resource(
    'syncer { rate 4M; after r; verify-alg md5; cpu-mask 5; use-rle; } disk { resync-rate 5M; } net { verify-alg sha1; }',
  ),
  resource('syncer { al-extents 257; c-plan-ahead 1; csums-alg sha1; on-no-data-accessible io-error; }'),
  resource('startup { wfc-timeout 120; become-primary-on bob alice; degr-wfc-timeout 60; wait-after-sb; }'),
  resource('startup { stacked-timeouts; outdated-wfc-timeout 1; become-primary-on bob; wait-after-sb no; }'),
  resource('net { allow-two-primaries yes; } startup { become-primary-on both; }'),
  resource(
    'handlers { split-brain "/usr/lib/drbd/notify-split-brain.sh root"; outdate-peer "/a"; local-io-error "/a:b"; }',
  ),
  resource('handlers { pri-on-incon-degr "echo \\"hi\\" > /x"; out-of-sync abc; before-resync-target "a"; }'),
  resource('proxy { memlimit 100M; }'),
  resource('ignore-on bob;'),
  resource(`net { data-integrity-alg sha256; } handlers { pri-lost ${'x'.repeat(100)}; }`),
  `${GLOBAL}resource "net" {${HOSTS}}`.replace('"net"', '"a b"'),
  `${GLOBAL}resource r {${HOSTS}`,
  `${GLOBAL}skip { anything; "at all" { } }${resource('').slice(GLOBAL.length)}`,
  `${GLOBAL}skip word { }`,
  `${resource('').slice(GLOBAL.length)}${GLOBAL}`,
  `${GLOBAL}common { protocol B; net { csums-alg sha1; } syncer { rate 50M; verify-alg crc32c; } startup { wfc-timeout 9; } }`,
  `${GLOBAL}common { options { cpu-mask 3; } handlers { fence-peer "/a b"; } disk { fencing resource-only; } }`,
  `${GLOBAL}common { net { } disk { } handlers { } }`,
  `${GLOBAL}resource r { device /dev/drbd1; disk /dev/b; meta-disk /dev/md [ 3 ];
     on alice { address 10.0.0.1:4; } on bob { address ipv6 [fd00::1]:7; } }`,
  `${GLOBAL}resource r { device drbd1; disk "/dev/my disk"; flexible-meta-disk /dev/x;
     on alice { address ipv4 10.0.0.1:4; } on bob carol { address ipv6 [fe80::1%eth0]:7; meta-disk internal; } }`,
  `${GLOBAL}resource r { device /dev/drbd_web minor 3; disk /dev/b; flexible-meta-disk internal;
     on alice { address 10.0.0.1:65535; } on bob { address 10.0.0.2:1; } }`,
  `${GLOBAL}resource r { device /dev/drbd3 minor 3; disk /dev/b; meta-disk internal;
     on alice { address 10.0.0.1:4; disk { resync-rate 3M; al-extents 300; } } on bob { address 10.0.0.2:4; }
     disk { resync-rate 1M; } }`,
  `${GLOBAL}resource r { device minor 3; disk /dev/b; meta-disk internal;
     on alice { address 10.0.0.1:4; options { cpu-mask 1; } } on bob { address 10.0.0.2:4; disk /dev/other; } }`,
  `${GLOBAL}resource r { device minor 3; disk /dev/b; meta-disk internal; floating 10.0.0.1:4; floating ipv6 [fd00::2]:4 { } }`,
  `${GLOBAL}resource r { volume 0 { device /dev/drbd1; disk /dev/v0; meta-disk internal; }
     volume 3 { device minor 2; disk /dev/v1; meta-disk /dev/md1[1]; }
     on alice { address 10.0.0.1:4; } on bob { address 10.0.0.2:4; volume 0 { disk /dev/other; } } }`,
  `${GLOBAL}resource r { on alice { address 10.0.0.1:4; volume 1 { device minor 1; disk /dev/v0; meta-disk /dev/md; } }
     on bob { address 10.0.0.2:4; volume 1 { device minor 1; disk /dev/v0; meta-disk internal; } } }`,
  `${GLOBAL}resource r { net { ping-int 5; } device minor 3; disk /dev/b; meta-disk internal;
     on dave { address 10.0.0.1:4; } on bob { address 10.0.0.2:4; } }`,
  `${resource('disk { resync-rate 2M; }')}resource s { disk { resync-after r; }
     on alice { device minor 2; disk /dev/s; meta-disk internal; address 10.0.0.1:7789; }
     on bob { device minor 2; disk /dev/s; meta-disk internal; address 10.0.0.2:7789; } }`,
];

/** Refused by drbdadm, by us with the same text. */
const REFUSED_ALIKE: readonly string[] = [
  'foo',
  'global { usage-countno; }',
  'global { foo; }',
  'global { usage-count maybe; }',
  'global { minor-count 999; dialog-refresh 9999; }',
  'global {} global {}',
  'common {} common {}',
  'common { foo; }',
  'common { disk { on-io-errordetach; } }',
  'common { syncer { rate50M; } }',
  'common { syncer { verify-algcrc32c; } }',
  'common { net { rate 60K; } }',
  'include "nowhere.conf";',
  'include "/nowhere/at-all.conf";',
  'skip { a b c',
  'resource data {\n\n  ontest-master { }\n}',
  'resource r { }}',
  resource('on-foo;'),
  resource('include "x";'),
  resource('net { use-rle maybe; }'),
  resource('net { timeout 6000; sndbuf-size 20M; ping-int 5s; } disk { resync-rate 9G; }'),
  resource('net { timeout 60K; } disk { c-fill-target 99999999; c-max-rate 1; size 9999999999999; }'),
  resource('net { max-buffers 123456789012; congestion-extents 5; } startup { wfc-timeout 999999; }'),
  resource('net { dry-run; }'),
  resource('net { timeout 6; }\n net { timeout 7; }'),
  resource('syncer { rate 1M; } syncer { rate 1M; }'),
  resource('disk { congestion-fill 4; }'),
  resource('handlers { foo bar; }'),
  resource('net { timeout 60 70; }'),
  resource('disk { al-updates yes no; }'),
  resource('disk { fencing resource-only }'),
  resource('net { shared-secret "abc; } and more of the line'),
  resource(`net { shared-secret "${'x'.repeat(256)}"; }`),
  resource(`net { verify-alg ${'x'.repeat(129)}; }`),
  resource('device foo;'),
  resource('device /dev/drbdx;'),
  resource('device /dev/drbd4 minor 5;'),
  resource('device /dev/drbd3 5;'),
  resource('disk /dev/a { }'),
  'resource r { on b { address foo:1; } }',
  'resource r { on b { address 1.2.3.4; } }',
  'resource r { on b { foo; } }',
  'resource r { on b { address 1.2.3.4:4444 } }',
  'resource r { volume 0 { foo; } }',
  'resource r { volume 0 { device minor 1; } device minor 2; }',
  'resource r { on a { } on b { } on c { } }',
  `${resource('')}${resource('').slice(GLOBAL.length)}`.replace(/(resource r [\s\S]*)resource r/, '$1resource r'),
];

/** Refused by both; we say it in our own words (with a place, a reason or the words that would be right). */
const REFUSED_OTHERWISE: readonly string[] = [
  resource('net { protocol D; }'),
  resource('protocol D;'),
  resource('disk { resync-rate 10T; }'),
  resource('disk { size 33MB; }'),
  resource('net { ko-count 0x10; }'),
  resource('net { verify-alg; }'),
  resource('startup { become-primary-on both; }'),
  resource('startup { become-primary-on mallory; }'),
  resource('options { cpu-mask 3,4; }'),
  'resource { }',
  'resource net { }',
  'resource 12 { }',
  'resource r foo { }',
  'resource r { on { address 1.2.3.4:1; } }',
  'resource r { on b { address 1.2.3.4:foo; } }',
  'resource r { on b { address 1.2.3.4:99999; } }',
  'resource r { on b { address [::1]:7; } }',
  'resource r { on b { meta-disk /dev/f[x]; } }',
  'resource r { volume { device minor 1; } }',
  'common { on a { } }',
  'global { minor-count abc; }',
  `${GLOBAL}resource r { on a { device minor 4; address 1.1.1.1:4; } on b { address 1.1.1.2:4; disk /dev/f; } }`,
  `${GLOBAL}resource r { device minor 1; disk /dev/a; meta-disk internal; on a { address 1.1.1.1:4; } on a { address 1.1.1.2:4; } }`,
  `${GLOBAL}resource r { device minor 1; disk /dev/a; meta-disk /dev/m[0]; on a { address 1.1.1.1:4; } on b { address 1.1.1.2:4; } }
   resource q { device minor 2; disk /dev/b; meta-disk /dev/m[0]; on a { address 1.1.1.1:5; } on b { address 1.1.1.2:5; } }`,
  `${GLOBAL}resource r { device minor 1; disk /dev/a; meta-disk internal; on a { address 1.1.1.1:4; } on b { address 1.1.1.2:4; } }
   resource q { device minor 2; disk /dev/b; meta-disk internal; on a { address 1.1.1.1:4; } on b { address 1.1.1.2:5; } }`,
  `${GLOBAL}resource r { volume 0 { device minor 1; disk /dev/a; meta-disk internal; } on a { address 1.1.1.1:4; }
     on b { address 1.1.1.2:4; volume 1 { device minor 2; disk /dev/c; meta-disk internal; } } }`,
  `${GLOBAL}resource r { stacked-on-top-of s { address 1.1.1.1:4; device minor 3; }
     on c { address 1.1.1.2:4; device minor 3; meta-disk internal; disk /dev/q; } }`,
  `${GLOBAL}include foo`,
];

/** Refused by drbdadm 8.4, accepted here on purpose: each is said to be so in docs/operating/configuration.md. */
const ACCEPTED_HERE_ONLY: readonly string[] = [
  `${GLOBAL}skip resource r9 { device; }`,
  resource(';'),
  resource('net { ; timeout 6; ; }'),
  '\ufeffglobal { usage-count no; }',
];

/** Accepted by drbdadm 8.4, refused here on purpose: what would only fail later, or not do what it says. */
const REFUSED_HERE_ONLY: readonly string[] = [
  resource('disk { on-io-error explode; }'),
  resource('disk { al-extents 1; }'),
  resource('disk { resync-after nothing; }'),
  resource('net { verify-alg rot13; }'),
  resource('device minor 1048576;'),
  `${GLOBAL}resource r { device minor 1; disk /dev/a; meta-disk internal; on a { address ssocks 1.1.1.1:4; } on b { address 1.1.1.2:4; } }`,
  `${GLOBAL}resource r { device minor 1; disk /dev/a; meta-disk internal; on a { address 999.1.1.1:4; } on b { address 1.1.1.2:4; } }`,
];

describe.runIf(isPossible)('drbdadm 8.4 as the judge', { timeout: 60_000 }, () => {
  let folder: string;
  beforeAll(() => {
    folder = mkdtempSync(join(tmpdir(), 'drbdts-oracle-'));
  });
  afterAll(() => rmSync(folder, { recursive: true }));

  /** What drbdadm says of a config, without its note about the pretended name and its token numbers. */
  function ask(text: string): { status: number | null; out: string; err: string } {
    writeFileSync(join(folder, 't.conf'), text);
    const result = spawnSync(DRBDADM, ['-c', 't.conf', 'dump'], {
      cwd: folder,
      env: { PATH: '/usr/sbin:/usr/bin:/sbin:/bin', __DRBD_NODE__: NODE },
      encoding: 'utf8',
      timeout: 10_000,
    });
    const err = result.stderr
      .split('\n')
      .filter((line) => !/__DRBD_NODE__|PRETENDING|^$|modinfo/.test(line))
      .map((line) => line.replace(/ \(TK \d+\)$/, ''))
      .join('\n');
    // Two lines nobody wrote, an initialisation slip of this release; and the section if they were all of it.
    const out = result.stdout
      .replace('    cmd-timeout-medium 600;\n    cmd-timeout-long 0;\n', '')
      .replace('global {\n}\n\n', '');
    return { status: result.status, out, err };
  }

  /** What we say, in the same terms; `err` without hints. */
  function answer(text: string): { status: number; out: string; err: string } {
    const path = join(folder, 't.conf');
    writeFileSync(path, text);
    try {
      const { config } = loadConfig(fileConfigSource, path);
      const options = { nodeName: NODE, showSecrets: true, mainPath: resolve(path) };
      return { status: 0, out: dumpConfig(config, options), err: '' };
    } catch (error) {
      if (!(error instanceof ConfigError)) throw error;
      const lines = error.message.replaceAll(`${folder}/`, '').split('\n');
      return { status: error.exitCode, out: '', err: lines.filter((line) => !line.startsWith('hint: ')).join('\n') };
    }
  }

  it.each(ACCEPTED)('accepts and dumps alike: %j', (text) => {
    const theirs = ask(text);
    expect(theirs.status).toBe(0);
    const ours = answer(text);
    expect(ours.err).toBe('');
    // On "floating" sections drbdadm looks at the real interfaces of the machine; the verdict is not the format.
    const neutral = (out: string): string =>
      text.includes('floating') ? out.replace(/(not )?ignored,/, 'ignored,') : out;
    expect(neutral(ours.out)).toBe(neutral(theirs.out));
  });

  it.each(REFUSED_ALIKE)('refuses with the same words: %j', (text) => {
    const theirs = ask(text);
    expect(theirs.status).toBe(10);
    const ours = answer(text);
    expect({ status: ours.status, err: ours.err }).toEqual({ status: 10, err: theirs.err });
  });

  it.each(REFUSED_OTHERWISE)('refuses too: %j', (text) => {
    expect(ask(text).status).toBeGreaterThanOrEqual(10);
    const ours = answer(text);
    expect(ours.status).toBe(10);
    expect(ours.err).toMatch(/^t\.conf:\d+: /);
  });

  it.each(ACCEPTED_HERE_ONLY)('is more lenient on purpose: %j', (text) => {
    expect(ask(text).status).toBe(10);
    expect(answer(text).status).toBe(0);
  });

  it.each(REFUSED_HERE_ONLY)('is stricter on purpose: %j', (text) => {
    expect(ask(text).status).toBe(0);
    expect(answer(text).status).toBe(10);
  });

  it('reads our dumps as it reads its own', () => {
    for (const text of ACCEPTED) {
      const ours = answer(text).out;
      if (text.includes('floating')) continue;
      const place = (out: string): string => out.replaceAll(/(# defined at .*:)\d+/g, '$1');
      const again = ask(ours);
      // drbdadm trips over its own dump of a disk section in a host section; ours is that same text.
      const own = ask(ask(text).out);
      expect({ text, status: again.status, out: place(again.out) }).toEqual({
        text,
        status: own.status,
        out: place(own.out),
      });
    }
  });

  it('expands inherited options in the same order (dump -d)', () => {
    const text = `global { usage-count no; }
common { disk { on-io-error detach; } syncer { rate 50M; verify-alg crc32c; } startup { wfc-timeout 9; wait-after-sb; } }
resource r { protocol C; disk { no-disk-barrier; disk-flushes no; resync-rate 33M; } handlers { split-brain "a b"; }
${HOSTS} }`;
    writeFileSync(join(folder, 't.conf'), text);
    const theirs = spawnSync(DRBDADM, ['-c', 't.conf', '-d', 'dump', 'r'], {
      cwd: folder,
      env: { PATH: '/usr/sbin:/usr/bin:/sbin:/bin', __DRBD_NODE__: NODE },
      encoding: 'utf8',
    });
    expect(theirs.status).toBe(0);
    const { config } = loadConfig(fileConfigSource, join(folder, 't.conf'));
    expect(dumpConfig(config, { nodeName: NODE, resources: ['r'], isExpanded: true })).toBe(theirs.stdout);
  });
});
