import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { OperatorError } from '../../src/base/errors.js';
import { loadConfig } from '../../src/config/drbd-conf.js';
import { missingAddresses, resolveGlobal, resolveResource, resourcesOfHost } from '../../src/config/resource.js';
import { DEFAULT_CONFIG_PATHS, findConfig } from '../../src/config/search.js';
import { HOSTS, mapSource, parse } from './support.js';

const VECTORS = join(import.meta.dirname, '../vectors/config/reference');
const reference = loadConfig(
  mapSource({
    '/etc/drbd.conf': readFileSync(join(VECTORS, 'drbd.conf'), 'utf8'),
    '/etc/drbd.d/global_common.conf': readFileSync(join(VECTORS, 'drbd.d/global_common.conf'), 'utf8'),
    '/etc/drbd.d/data.res': readFileSync(join(VECTORS, 'drbd.d/data.res'), 'utf8'),
  }),
  '/etc/drbd.conf',
).config;

/** The refusal of a resource, which must be one. */
function refusal(action: () => unknown): OperatorError {
  try {
    action();
  } catch (error) {
    if (error instanceof OperatorError) return error;
    throw error;
  }
  throw new Error('was accepted');
}

describe('the reference setup, resolved', () => {
  const data = resolveResource(reference, 'data', 'test-backup');

  it('has both ends, the device and where its metadata is', () => {
    expect(data.self).toEqual({ host: 'test-backup', address: { family: 'ipv4', host: '172.16.1.114', port: 7788 } });
    expect(data.peer).toEqual({ host: 'test-master', address: { family: 'ipv4', host: '172.16.1.113', port: 7788 } });
    expect(data.protocol).toBe('C');
    const [volume] = data.volumes;
    expect(volume).toMatchObject({
      number: 0,
      device: '/dev/drbd0',
      minor: 0,
      disk: '/dev/sdb1',
      metaDisk: { kind: 'indexed', path: '/dev/sdb2', index: 0 },
    });
    expect(volume!.diskOptions).toMatchObject({ onIoError: 'detach', resyncRateKiBps: 51200 });
  });

  it('has DRBD 8.4 defaults in engine units for what nobody wrote', () => {
    expect(data.net).toEqual({
      timeoutMs: 6000,
      pingTimeoutMs: 500,
      pingIntMs: 10_000,
      connectIntMs: 10_000,
      socketCheckTimeoutMs: 500,
      koCount: 7,
      maxEpochSizeWrites: 2048,
      maxBuffersPages: 2048,
      unplugWatermarkPages: 128,
      sndbufSizeBytes: 0,
      rcvbufSizeBytes: 0,
      tcpCork: true,
      allowTwoPrimaries: false,
      verifyAlg: 'crc32c',
      csumsAfterCrashOnly: false,
      useRle: true,
      afterSb0pri: 'disconnect',
      afterSb1pri: 'disconnect',
      afterSb2pri: 'disconnect',
      alwaysAsbp: false,
      rrConflict: 'disconnect',
      onCongestion: 'block',
      congestionFillSectors: 0,
      congestionExtents: 1237,
    });
    expect(data.disk).toEqual({
      sizeSectors: 0,
      onIoError: 'detach',
      fencing: 'dont-care',
      diskBarrier: false,
      diskFlushes: true,
      diskDrain: true,
      mdFlushes: true,
      resyncRateKiBps: 51200,
      resyncAfterMinor: -1,
      cPlanAheadMs: 2000,
      cDelayTargetMs: 1000,
      cFillTargetSectors: 100,
      cMaxRateKiBps: 102400,
      cMinRateKiBps: 250,
      alExtents: 1237,
      alUpdates: true,
      discardZeroesIfAligned: true,
      disableWriteSame: false,
      rsDiscardGranularityBytes: 0,
      diskTimeoutMs: 0,
      readBalancing: 'prefer-local',
      maxBioBvecs: 0,
      directIo: false,
    });
    expect(data.startup).toEqual({
      wfcTimeoutMs: 0,
      degrWfcTimeoutMs: 0,
      outdatedWfcTimeoutMs: 0,
      waitAfterSb: false,
      becomePrimaryOn: [],
      stackedTimeouts: false,
    });
    expect(data.options).toEqual({ onNoDataAccessible: 'io-error' });
    expect(data.handlers).toEqual({});
  });

  it('survives JSON and cannot be changed', () => {
    expect(JSON.parse(JSON.stringify(data))).toEqual(data);
    expect(Object.isFrozen(data.volumes[0]!.diskOptions)).toBe(true);
  });

  it('global defaults', () => {
    expect(resolveGlobal(reference)).toEqual({
      minorCount: 32,
      dialogRefreshMs: 1000,
      disableIpVerification: false,
      udevAlwaysUseVnr: false,
      cmdTimeoutShortMs: 5000,
      cmdTimeoutMediumMs: 121_000,
      cmdTimeoutLongMs: 600_000,
    });
  });
});

describe('inheritance', () => {
  const config = parse(`
common { disk { resync-rate 1M; c-max-rate 500; } options { cpu-mask 1; } handlers { split-brain "common"; } }
resource r {
  disk { resync-rate 2M; al-extents 100; }
  handlers { split-brain "own"; fence-peer ""; }
  volume 0 { device minor 1; disk /dev/a; meta-disk internal; disk { resync-rate 3M; al-updates no; } }
  volume 7 { device minor 2; disk /dev/b; meta-disk /dev/m; }
  on alice { address 10.0.0.1:1; options { cpu-mask 2; } volume 0 { disk { resync-rate 4M; } } disk { c-plan-ahead 0; } }
  on bob { address 10.0.0.2:1; }
  net { after-sb-0pri discard-node-bob; ping-timeout 9; socket-check-timeout 0; }
}`);

  it('the most specific of common, resource, resource volume and host volume wins', () => {
    const alice = resolveResource(config, 'r', 'alice');
    expect(alice.volumes.map((volume) => volume.diskOptions.resyncRateKiBps)).toEqual([4096, 2048]);
    expect(alice.volumes[0]!.diskOptions).toMatchObject({
      cMaxRateKiBps: 500,
      alExtents: 100,
      alUpdates: false,
      cPlanAheadMs: 0,
    });
    expect(resolveResource(config, 'r', 'bob').volumes[0]!.diskOptions.resyncRateKiBps).toBe(3072);
  });

  it('options of a host section are applied, on that host only', () => {
    expect(resolveResource(config, 'r', 'alice').options.cpuMask).toBe('2');
    expect(resolveResource(config, 'r', 'bob').options.cpuMask).toBe('1');
  });

  it('an inner handler replaces the outer one, an empty one is none', () => {
    expect(resolveResource(config, 'r', 'bob').handlers).toEqual({ 'split-brain': 'own' });
  });

  it('discard-node-NAME means the same node on both sides', () => {
    expect(resolveResource(config, 'r', 'alice').net.afterSb0pri).toBe('discard-remote');
    expect(resolveResource(config, 'r', 'bob').net.afterSb0pri).toBe('discard-local');
  });

  it('socket-check-timeout 0 is the ping timeout', () => {
    expect(resolveResource(config, 'r', 'alice').net.socketCheckTimeoutMs).toBe(900);
  });

  it('the last of two equal options wins, in disk as in net', () => {
    const twice = parse(`resource r { disk { resync-rate 1; resync-rate 2; } net { timeout 7; timeout 8; } ${HOSTS} }`);
    const { disk, net } = resolveResource(twice, 'r', 'alice');
    expect([disk.resyncRateKiBps, net.timeoutMs]).toEqual([2, 800]);
  });

  it('resync-after becomes the minor on this host', () => {
    const text = `resource r { ${HOSTS} } resource s { disk { resync-after r; }
      on alice { device minor 5; disk /dev/s; meta-disk internal; address 10.0.0.1:9; }
      on bob { device minor 6; disk /dev/s; meta-disk internal; address 10.0.0.2:9; } }`;
    expect(resolveResource(parse(text), 's', 'bob').disk.resyncAfterMinor).toBe(1);
  });
});

describe('which hosts', () => {
  it('a host section may have several names, and floating sections go by address', () => {
    const text = `resource r { device minor 3; disk /dev/b; meta-disk internal; floating 10.0.0.1:4; floating ipv6 [fd00::2]:4; }
      resource s { device minor 4; disk /dev/c; meta-disk internal; on alice carol { address 10.0.0.1:5; } on bob { address 10.0.0.2:5; } }`;
    const config = parse(text);
    const localAddresses = ['127.0.0.1', 'FD00:0::2'];
    expect(resolveResource(config, 'r', 'any', { localAddresses }).peer.address.host).toBe('10.0.0.1');
    expect(resolveResource(config, 's', 'carol').self.host).toBe('carol');
    expect(resourcesOfHost(config, 'bob')).toEqual(['s']);
    expect(resourcesOfHost(config, 'bob', { localAddresses })).toEqual(['r', 's']);
  });

  it('an unknown resource names the close one', () => {
    const error = refusal(() => resolveResource(reference, 'daat', 'test-master'));
    expect(error.message).toBe('\'daat\' not defined in your config (for this host).\ndid you mean "data"?');
    expect(error.exitCode).toBe(1);
  });

  it.each(['test-master.example.com', 'TEST-MASTER', 'test-maste'])('%s is told which names there are', (node) => {
    const error = refusal(() => resolveResource(reference, 'data', node));
    expect(error.exitCode).toBe(1);
    expect(error.message.split('\n').slice(0, 2)).toEqual([
      "'data' not defined in your config (for this host).",
      `this host is "${node}", the config knows "test-master", "test-backup"`,
    ]);
    expect(error.message).toContain(`if this host is meant by "test-master", write "on ${node}"`);
  });

  it.each([
    ['one host', 'on alice { address 10.0.0.1:1; }', "Missing section 'on <PEER> { ... }'."],
    [
      'three hosts',
      `on alice { address 10.0.0.1:1; } on b { address 10.0.0.2:1; } on c { address 10.0.0.3:1; }`,
      '--peer (b, c)',
    ],
    [
      'a combination the protocol cannot do',
      `net { protocol A; allow-two-primaries; } on alice { address 10.0.0.1:1; } on b { address 10.0.0.2:1; }`,
      'expected protocol C',
    ],
    [
      'a proxy',
      `on alice { address 10.0.0.1:1; proxy on alice { inside 10.0.0.1:2; outside 10.0.0.1:3; } } on b { address 10.0.0.2:1; }`,
      'DRBD Proxy',
    ],
  ])('%s is refused with exit code 10', (_, hosts, message) => {
    const config = parse(`resource r { device minor 1; disk /dev/a; meta-disk internal; ${hosts} }`);
    const error = refusal(() => resolveResource(config, 'r', 'alice'));
    expect(error.exitCode).toBe(10);
    expect(error.message).toContain(message);
  });

  it('stacked resources are read and not run', () => {
    const config = parse(`resource r { ${HOSTS} }
      resource u { stacked-on-top-of r { device minor 9; address 10.0.0.9:1; } on dave { device minor 9; disk /dev/d; meta-disk internal; address 10.0.0.4:1; } }`);
    expect(refusal(() => resolveResource(config, 'u', 'dave')).message).toContain('does not run stacked resources');
  });

  it('--peer chooses among three', () => {
    const config = parse(`resource r { device minor 1; disk /dev/a; meta-disk internal;
      on a { address 10.0.0.1:1; } on b { address 10.0.0.2:1; } on c { address 10.0.0.3:1; } }`);
    expect(resolveResource(config, 'r', 'a', { peer: 'c' }).peer.address.host).toBe('10.0.0.3');
  });
});

describe('the address check', () => {
  it('names the file, the line and the address, in the words of drbdadm', () => {
    expect(missingAddresses(reference, 'test-master', ['127.0.0.1', '10.96.20.113'])).toEqual([
      'drbd.d/data.res:6: in resource data, on test-master:\n\tIP 172.16.1.113 not found on this host.',
    ]);
    expect(missingAddresses(reference, 'test-master', ['172.16.1.113'])).toEqual([]);
    expect(missingAddresses(reference, 'elsewhere', [])).toEqual([]);
  });

  it('is off with disable-ip-verification', () => {
    const config = parse(`global { disable-ip-verification; } resource r { ${HOSTS} }`);
    expect(missingAddresses(config, 'alice', [])).toEqual([]);
  });
});

describe('the search for the main file', () => {
  it('takes the first that exists, drbdts.conf before all of DRBD', () => {
    const order = [
      '/etc/drbdts.conf',
      '/etc/drbd-84.conf',
      '/etc/drbd-83.conf',
      '/etc/drbd-82.conf',
      '/etc/drbd-08.conf',
      '/etc/drbd.conf',
    ];
    expect(DEFAULT_CONFIG_PATHS).toEqual(order);
    for (let first = 0; first < order.length; first++) {
      const source = mapSource(Object.fromEntries(order.slice(first).map((path) => [path, ''])));
      expect(findConfig(source, {}, 'host')).toEqual({ path: order[first], nodeName: 'host' });
    }
    expect(findConfig(mapSource({}), {}, 'host').path).toBe('/etc/drbd.conf');
    expect(findConfig(mapSource({ '/etc/drbd.conf': '' }), {}, 'host', 'mine.conf').path).toBe('mine.conf');
  });

  it('a pretended name is announced, unless asked for in our own way', () => {
    const source = mapSource({});
    expect(findConfig(source, { __DRBD_NODE__: 'alice' }, 'host')).toMatchObject({
      nodeName: 'alice',
      notice: '\n   found __DRBD_NODE__ in environment\n   PRETENDING that I am >>alice<<\n\n',
    });
    const quiet = findConfig(source, { DRBDTS_NODE: 'bob', __DRBD_NODE__: 'alice' }, 'host');
    expect(quiet).toEqual({ path: '/etc/drbd.conf', nodeName: 'bob' });
  });
});
