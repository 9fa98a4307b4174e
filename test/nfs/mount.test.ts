import { beforeEach, describe, expect, it } from 'vitest';
import { askExports, mount } from '../../src/nfs/client.js';
import { type ExportOptions, exportIdOf } from '../../src/nfs/export-table.js';
import { MOUNT_LIST, MOUNT_PROGRAM, MountStatus, PATH } from '../../src/nfs/mount3/results.js';
import { CREATE } from '../../src/nfs/nfs3/create.js';
import { MKDIR } from '../../src/nfs/nfs3/mkdir.js';
import { squash } from '../../src/nfs/squash.js';
import { VOID } from '../../src/rpc/xdr.js';
import { Bench, bytes, nfs, OPEN, ROOT_USER, rule } from '../support/nfs-bench.js';

let bench: Bench;
beforeEach(() => {
  bench = new Bench([rule('/drbd'), rule('/closed', {}, { optionsFor: () => undefined, clients: ['10.9.9.9'] })]);
  bench.serve();
});

describe('MOUNT', () => {
  it('MNT gives the root handle, also without credential; directories below can be mounted', async () => {
    const caller = bench.caller();
    expect(await mount(caller, '/drbd')).toEqual(bench.handle());
    expect(await mount(bench.caller(undefined), '//drbd/')).toEqual(bench.handle());
    await nfs(caller, MKDIR, { directory: bench.handle(), name: bytes('d'), attributes: {} });
    expect(await mount(caller, '/drbd/d')).toEqual(bench.handle('d'));
  });

  it('MNT refuses: not exported and not for you look alike; what is no directory, what leaves the export', async () => {
    const caller = bench.caller();
    const how = { kind: 'unchecked', attributes: {} } as const;
    await nfs(caller, CREATE, { directory: bench.handle(), name: bytes('f'), how });
    for (const path of ['/nosuch', '/closed', '/closed/x', '/', 'drbd', '/drbd/../etc', '/drbdx'])
      await expect(mount(caller, path)).rejects.toThrow(/MNT3ERR_ACCES/);
    await expect(mount(caller, '/drbd/f')).rejects.toThrow(/MNT3ERR_NOTDIR/);
    await expect(mount(caller, '/drbd/nosuch')).rejects.toThrow(/MNT3ERR_NOENT/);
    await expect(mount(caller, `/${'x'.repeat(1024)}`)).rejects.toThrow(/could not decode/);
  });

  it('MNT of a tree that is not there yet waits for it', async () => {
    bench.exports.byPath('/drbd')!.withdraw();
    const waiting = mount(bench.caller(), '/drbd');
    await new Promise((resolve) => setImmediate(resolve));
    bench.serve();
    expect(await waiting).toEqual(bench.handle());
  });

  it('EXPORT lists only what the asker may mount', async () => {
    expect(await askExports(bench.caller())).toEqual([{ path: '/drbd', clients: ['*'] }]);
  });

  it('DUMP, UMNT and UMNTALL keep a list per address, and version 1 has them too, but no MNT', async () => {
    const first = bench.caller();
    const second = bench.caller(ROOT_USER, bench.transport('10.0.0.2'));
    const dump = () => first.call(MOUNT_PROGRAM, 1, 2, VOID, undefined, MOUNT_LIST);
    await mount(first, '/drbd');
    await mount(first, '/drbd');
    await mount(second, '/drbd');
    expect(await dump()).toEqual([
      { host: '10.0.0.1', path: '/drbd' },
      { host: '10.0.0.2', path: '/drbd' },
    ]);
    await first.call(MOUNT_PROGRAM, 3, 3, PATH, '/drbd', VOID);
    expect(await dump()).toEqual([{ host: '10.0.0.2', path: '/drbd' }]);
    await second.call(MOUNT_PROGRAM, 3, 4, VOID, undefined, VOID);
    expect(await dump()).toEqual([]);
    const status = { encode: () => {}, decode: (reader: { u32(): number }) => reader.u32() };
    expect(await first.call(MOUNT_PROGRAM, 1, 1, PATH, '/drbd', status)).toBe(MountStatus.MNT3ERR_ACCES);
  });
});

describe('squashing', () => {
  const auth = { stamp: 0, machineName: 'c', uid: 0, gid: 0, groups: [0, 5, 0xffffffff] };
  const options = (change: Partial<ExportOptions>): ExportOptions => ({ ...OPEN, anonUid: 99, anonGid: 98, ...change });

  it('follows knfsd: root_squash, all_squash, and ids that mean "unchanged"', () => {
    expect(squash(options({ rootSquash: true }), auth)).toEqual({ uid: 99, gid: 98, groups: [98, 5, 98] });
    expect(squash(options({}), auth)).toEqual({ uid: 0, gid: 0, groups: [0, 5, 98] });
    expect(squash(options({ allSquash: true }), { ...auth, uid: 1000 })).toEqual({ uid: 99, gid: 98, groups: [] });
    expect(squash(options({}), { ...auth, uid: 0xffffffff })).toMatchObject({ uid: 99 });
    expect(squash(options({}), undefined)).toEqual({ uid: 99, gid: 98, groups: [] });
  });
});

describe('export ids', () => {
  it('come from fsid= or the path alone', () => {
    expect(exportIdOf({ path: '/drbd', fsid: 2 })).toBe(2);
    expect(exportIdOf({ path: '/drbd' })).toBe(exportIdOf({ path: '/drbd' }));
    expect(exportIdOf({ path: '/drbd' })).not.toBe(exportIdOf({ path: '/drbe' }));
    const large = exportIdOf({ path: '/drbd', fsid: 70000 });
    expect(large).toBeGreaterThanOrEqual(0);
    expect(large).toBeLessThan(65536);
  });
});
