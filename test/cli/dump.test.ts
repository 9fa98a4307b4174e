import { chmodSync, mkdirSync, mkdtempSync, readFileSync, rmSync, statSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Command } from 'commander';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { OperatorError } from '../../src/base/errors.js';
import { dumpCommand } from '../../src/cli/dump.js';
import { lintCommand } from '../../src/cli/lint.js';
import { readExports } from '../../src/config/exports.js';
import { fileConfigSource } from '../../src/io/config-source.js';

const VECTORS = join(import.meta.dirname, '../vectors/config');
const vector = (name: string): string => readFileSync(join(VECTORS, name), 'utf8');

let folder: string;
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'drbdts-dump-'));
});
afterEach(() => rmSync(folder, { recursive: true }));

/** Writes the files of a head into the folder and returns the main one. */
function install(set: string): string {
  mkdirSync(join(folder, 'drbd.d'), { recursive: true });
  for (const name of ['drbd.conf', 'drbd.d/global_common.conf', 'drbd.d/data.res'])
    writeFileSync(join(folder, name), vector(`${set}/${name}`));
  return join(folder, 'drbd.conf');
}

interface Outcome {
  readonly code: number;
  readonly out: string;
  readonly err: string;
}

/** Runs one command line as an operator on `node` would. */
async function run(
  args: readonly string[],
  env: Record<string, string> = { DRBDTS_NODE: 'test-master' },
): Promise<Outcome> {
  let out = '';
  let err = '';
  let code = -1;
  const environment = {
    out: (text: string) => {
      out += text;
    },
    err: (text: string) => {
      err += text;
    },
    isTerminal: false,
    env,
  };
  const program = new Command('drbdts').exitOverride();
  for (const command of [dumpCommand, lintCommand])
    command.register(program, environment, (value) => {
      code = value;
    });
  try {
    await program.parseAsync([...args], { from: 'user' });
  } catch (error) {
    if (!(error instanceof OperatorError)) throw error;
    return { code: error.exitCode, out, err: err + error.message };
  }
  return { code, out, err };
}

describe('drbdts dump', () => {
  it('one resource with what it inherits, addresses unchecked, with -d', async () => {
    const main = install('reference');
    const { code, out, err } = await run(['dump', '-d', '-c', main, 'data']);
    expect([code, err]).toEqual([0, '']);
    // Captured from drbdadm 8.4 -d dump data of drbd-utils 9.22, but for the folder.
    expect(out).toBe(vector('reference-expanded.dump').replace('@FOLDER@', folder));
  });

  it('a missing address of this host is exit code 10, with the way out', async () => {
    const { code, out, err } = await run(['dump', '-c', install('reference')]);
    expect([code, out]).toEqual([10, '']);
    expect(err).toContain(
      'drbd.d/data.res:6: in resource data, on test-master:\n\tIP 172.16.1.113 not found on this host.\n',
    );
    expect(err).toContain('127.0.0.1');
    expect(err).toContain('dump -d skips this check');
  });

  it('everything, if the addresses are not this host’s business', async () => {
    const main = install('reference');
    const { code, out } = await run(['dump', '-c', main], { DRBDTS_NODE: 'elsewhere' });
    expect(code).toBe(0);
    const expected = vector('reference.dump')
      .replace('/etc/drbd.conf', main)
      .replace('on test-master: not ignored', 'on elsewhere: ignored')
      .replace('/etc/drbd.d', join(folder, 'drbd.d'));
    expect(out).toBe(expected);
  });

  it('--json prints what this host runs', async () => {
    const { code, out } = await run(['dump', '-d', '--json', '-c', install('reference'), 'data']);
    expect(code).toBe(0);
    const { node, resources } = JSON.parse(out) as { node: string; resources: Record<string, unknown>[] };
    expect(node).toBe('test-master');
    expect(resources[0]).toMatchObject({
      name: 'data',
      protocol: 'C',
      peer: { host: 'test-backup', address: { family: 'ipv4', host: '172.16.1.114', port: 7788 } },
      net: { verifyAlg: 'crc32c', timeoutMs: 6000 },
      disk: { onIoError: 'detach', resyncRateKiBps: 51200 },
    });
  });

  it('a shared secret is printed only when asked for', async () => {
    const main = join(folder, 'drbd.conf');
    const hosts = 'on a { address 127.0.0.1:1; } on b { address 10.0.0.2:1; }';
    writeFileSync(
      main,
      `resource r { net { shared-secret hush; } device minor 1; disk /dev/x; meta-disk internal; ${hosts} }`,
    );
    const env = { DRBDTS_NODE: 'a' };
    for (const flags of [[], ['--json'], ['-d']]) {
      const masked = await run(['dump', '-c', main, ...flags, 'r'], env);
      expect([masked.code, masked.out.includes('hush'), masked.out.includes('********')]).toEqual([0, false, true]);
      const shown = await run(['dump', '-c', main, '--show-secrets', ...flags, 'r'], env);
      expect(shown.out).toContain('hush');
    }
  });

  it('an invalid config is exit code 10 and prints nothing but where and what', async () => {
    const { code, out, err } = await run(['dump', '-c', install('glued')]);
    expect([code, out]).toEqual([10, '']);
    expect(err).toBe(
      "drbd.d/global_common.conf:2: Parse error: 'dialog-refresh | minor-count | disable-ip-verification' expected,\n" +
        '\tbut got \'usage-countno\'\nhint: did you mean "usage-count no"? (missing blank)\n',
    );
  });

  it('a missing file is exit code 20', async () => {
    const main = join(folder, 'nowhere.conf');
    expect(await run(['dump', '-c', main])).toEqual({ code: 20, out: '', err: `Can not open '${main}'.\n` });
  });

  it('an unknown resource is exit code 1, a host the config does not know is told the names', async () => {
    const main = install('reference');
    expect(await run(['dump', '-d', '-c', main, 'dta'])).toEqual({
      code: 1,
      out: '',
      err: '\'dta\' not defined in your config (for this host).\ndid you mean "data"?',
    });
    const fqdn = await run(['dump', '-d', '-c', main, 'data'], { DRBDTS_NODE: 'test-master.example.com' });
    expect(fqdn.code).toBe(1);
    expect(fqdn.err).toContain('this host is "test-master.example.com", the config knows "test-master", "test-backup"');
  });

  it('-t checks a file that is not installed yet against those that are', async () => {
    const main = install('reference');
    const extra = join(folder, 'new.res');
    writeFileSync(extra, vector('reference/drbd.d/data.res').replace('resource data', 'resource more'));
    const { code, err } = await run(['dump', '-d', '-c', main, '-t', extra]);
    expect(code).toBe(10);
    expect(err).toContain("conflicting use of IP '172.16.1.113:7788' ...\ndrbd.d/data.res:6: IP");
  });

  it('announces a pretended name as drbdadm does', async () => {
    const { err } = await run(['dump', '-d', '-c', install('reference')], { __DRBD_NODE__: 'test-master' });
    expect(err).toContain('PRETENDING that I am >>test-master<<');
  });
});

describe('drbdts lint', () => {
  it('shows what it would repair and writes nothing', async () => {
    const main = install('glued');
    const { code, out, err } = await run(['lint', main]);
    expect(code).toBe(10);
    expect(out).toContain('@@ line 17 @@\n-rate50M;\n+rate 50M;\n');
    expect(err).toContain('drbdts lint --fix writes the changes above');
    expect(readFileSync(join(folder, 'drbd.d/data.res'), 'utf8')).toBe(vector('glued/drbd.d/data.res'));
  });

  it('--fix repairs, keeps the old text and the mode, and then there is nothing left to say', async () => {
    const main = install('glued');
    const res = join(folder, 'drbd.d/data.res');
    chmodSync(res, 0o640);
    expect((await run(['lint', main, '--fix'])).code).toBe(0);
    expect(readFileSync(`${res}.orig`, 'utf8')).toBe(vector('glued/drbd.d/data.res'));
    expect(readFileSync(res, 'utf8')).toContain('on test-master {');
    expect(statSync(res).mode & 0o777).toBe(0o640);
    expect(await run(['lint', main])).toEqual({ code: 0, out: '', err: '' });
    expect((await run(['dump', '-d', '-c', main])).code).toBe(0);
  });

  it('a backup is not taken for configuration', async () => {
    const main = install('glued');
    await run(['lint', main, '--fix']);
    expect(fileConfigSource.glob(join(folder, 'drbd.d/*.res'))).toEqual([join(folder, 'drbd.d/data.res')]);
  });
});

describe('the door to configuration files', () => {
  it('globs like the shell: sorted, dot files only when asked for, wildcards in any component', () => {
    mkdirSync(join(folder, 'a1'));
    mkdirSync(join(folder, 'a2'));
    for (const name of ['a1/y.res', 'a2/x.res', 'a1/.hidden.res', 'a1/z.res~']) writeFileSync(join(folder, name), '');
    expect(fileConfigSource.glob(`${folder}/a?/*.res`)).toEqual([join(folder, 'a1/y.res'), join(folder, 'a2/x.res')]);
    expect(fileConfigSource.glob(`${folder}/a1/.*.res`)).toEqual([join(folder, 'a1/.hidden.res')]);
    expect(fileConfigSource.glob(`${folder}/none/*`)).toEqual([]);
  });

  it('reads files, never directories or devices, and at most a byte more than is accepted', () => {
    const big = join(folder, 'big');
    writeFileSync(big, Buffer.alloc(3 * 1024 * 1024, 0x20));
    expect(fileConfigSource.read(big)).toHaveLength(1024 * 1024 + 1);
    expect(() => fileConfigSource.read(folder)).toThrow('expected a regular file');
    expect(() => fileConfigSource.read('/dev/zero')).toThrow('expected a regular file');
    expect(fileConfigSource.read(join(folder, 'nowhere'))).toBeUndefined();
    expect(fileConfigSource.read(join(big, 'below-a-file'))).toBeUndefined();
  });

  it('a file that is there but cannot be read is an error, not an absence', () => {
    symlinkSync('loop', join(folder, 'loop'));
    expect(() => fileConfigSource.read(join(folder, 'loop'))).toThrow(/Can not open .*ELOOP/);
    expect(readExports(fileConfigSource, join(folder, 'exports'))).toEqual([]);
    symlinkSync('exports', join(folder, 'exports'));
    expect(() => readExports(fileConfigSource, join(folder, 'exports'))).toThrow(OperatorError);
  });

  it('knows a file by its real path', () => {
    writeFileSync(join(folder, 'real'), '');
    symlinkSync(join(folder, 'real'), join(folder, 'link'));
    expect(fileConfigSource.realPath(join(folder, 'link'))).toBe(fileConfigSource.realPath(join(folder, 'real')));
  });
});
