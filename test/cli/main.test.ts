import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import type { Command } from 'commander';
import { afterAll, describe, expect, it } from 'vitest';
import { createProgram, run } from '../../src/cli/main.js';

const folder = mkdtempSync(join(tmpdir(), 'drbdts-cli-'));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

const config = join(folder, 'drbd.conf');
writeFileSync(
  config,
  `resource data {
  device /dev/drbd0; disk ${folder}/disk; meta-disk internal;
  on here { address 127.0.0.1:7788; }
  on there { address 127.0.0.2:7788; }
}
`,
);

async function cli(...argv: string[]): Promise<{ status: number; out: string; err: string }> {
  let out = '';
  let err = '';
  const status = await run(argv, {
    out: (text) => {
      out += text;
    },
    err: (text) => {
      err += text;
    },
    isTerminal: false,
    env: { DRBDTS_RUN_DIR: join(folder, 'run'), DRBDTS_LOG_DIR: join(folder, 'log'), DRBDTS_NODE: 'here' },
  });
  return { status, out, err };
}

const silent = { out: () => {}, err: () => {}, isTerminal: false, env: {} };
/** Every command with its path: `up`, `nfs ls`. */
function commandsOf(program: Command, prefix: readonly string[] = []): string[][] {
  return program.commands.flatMap((command) => {
    const path = [...prefix, command.name()];
    return [path, ...commandsOf(command, path)];
  });
}
const COMMANDS = commandsOf(createProgram(silent, () => {})).filter((path) => path.at(-1) !== 'help');

describe('help', () => {
  it('lists every command with a summary, the first steps and the exit codes', async () => {
    const { status, out } = await cli('--help');
    expect(status).toBe(0);
    for (const [name] of COMMANDS) expect(out).toMatch(new RegExp(`^ {2}${name} .*\\S`, 'm'));
    expect(out).toMatch(/create-md data\n {2}drbdts up data/);
    expect(out).toMatch(/Exit codes: 0 done, 1 wrong usage/);
  });

  it.each(COMMANDS.map((path) => [path.join(' ')]))('%s --help has a sentence and an example', async (name) => {
    const { status, out, err } = await cli(...name.split(' '), '--help');
    expect([status, err]).toEqual([0, '']);
    expect(out).toContain(`Usage: drbdts ${name} `);
    expect(out).toMatch(/^Examples?:\n {2}.*\bdrbdts /m);
    for (const line of out.split('\n')) expect(line.length, line).toBeLessThanOrEqual(120);
  });

  it('every command that prints something knows --json', async () => {
    for (const name of ['status', 'role', 'cstate', 'dstate', 'proc', 'exportfs', 'dump', 'dump-md', 'up', 'down'])
      expect((await cli(name, '--help')).out, name).toContain('--json');
  });
});

describe('documentation', () => {
  const page = (name: string) => readFileSync(resolve(import.meta.dirname, '../../docs/operating', name), 'utf8');

  it('commands.md describes every command', () => {
    const text = page('commands.md');
    for (const path of COMMANDS) expect(text, path.join(' ')).toContain(`drbdts ${path.join(' ')}`);
  });

  it('commands.md names no command and no option that does not exist', () => {
    const known = new Set(COMMANDS.map(([name]) => name));
    const text = page('commands.md');
    for (const [, name] of text.matchAll(/\bdrbdts ([a-z][a-z-]*)/g)) expect(known, name).toContain(name);
    const program = createProgram(silent, () => {});
    for (const [, name, rest] of text.matchAll(/^#+ `drbdts ([a-z-]+)([^`]*)`/gm)) {
      const command = program.commands.find((one) => one.name() === name)!;
      const options = command.options.map((option) => option.long);
      for (const [option] of rest!.matchAll(/--[a-z-]+/g)) expect(options, `${name} ${option}`).toContain(option);
    }
  });

  it('troubleshooting.md names no command that does not exist', () => {
    const known = new Set(COMMANDS.map(([name]) => name));
    for (const [, name] of page('troubleshooting.md').matchAll(/\bdrbdts ([a-z][a-z-]*)/g))
      expect(known, name).toContain(name);
  });

  it('exit-codes.md has a row for every code that the program help names', async () => {
    const { out } = await cli('--help');
    const named = /Exit codes: ([\s\S]*?)\.\n/.exec(out)![1]!.matchAll(/(?:^|,\s+)(\d+) /g);
    const text = page('exit-codes.md');
    for (const [, code] of named) expect(text).toMatch(new RegExp(`^\\| ${code} \\|`, 'm'));
  });
});

describe('exit codes without a daemon', () => {
  it('wrong usage is 1, and says what is right', async () => {
    expect(await cli('up')).toMatchObject({ status: 1, err: expect.stringMatching(/missing required argument/) });
    expect(await cli('statsu')).toMatchObject({ status: 1, err: expect.stringMatching(/Did you mean status/) });
    expect(await cli('up', '--frobnicate', 'data')).toMatchObject({ status: 1 });
    expect(await cli('exportfs', '-u')).toMatchObject({ status: 1, err: expect.stringMatching(/or -a for all/) });
    expect(await cli('exportfs', '-u', '-r', '/drbd')).toMatchObject({ status: 1 });
    expect(await cli('exportfs', '-a', '/drbd')).toMatchObject({ status: 1 });
    expect(await cli('-c', '-', 'up', 'data')).toMatchObject({
      status: 1,
      err: expect.stringMatching(/reads files only/),
    });
  });

  it('asking is 20, with the command that starts it', async () => {
    for (const name of ['status', 'proc'])
      expect(await cli(name)).toMatchObject({ status: 20, err: expect.stringMatching(/does not run .* drbdts up/) });
    for (const name of ['primary', 'connect', 'attach', 'invalidate'])
      expect(await cli('-c', config, name, 'data'), name).toMatchObject({ status: 20 });
  });

  it('stopping is done already, and says so in JSON', async () => {
    for (const name of ['down', 'secondary', 'disconnect', 'detach']) {
      expect(await cli(name, '-c', config, 'data'), name).toEqual({ status: 0, out: '', err: '' });
      const { out } = await cli(name, '-c', config, '--json', 'data');
      expect(JSON.parse(out), name).toEqual([{ resource: 'data', done: false, why: 'data is not up on this head' }]);
    }
    expect(await cli('exportfs', '-u', '-a', '--json')).toEqual({ status: 0, out: '[]\n', err: '' });
  });

  it('stopping does not fail for want of a configuration, but a wrong name is 1', async () => {
    expect(await cli('down', '-c', join(folder, 'absent.conf'), 'data')).toMatchObject({ status: 0 });
    expect(await cli('down', '-c', config, 'dtaa')).toMatchObject({
      status: 1,
      err: expect.stringMatching(/not defined/),
    });
  });

  it('role, cstate and dstate of what is not up', async () => {
    for (const name of ['role', 'cstate', 'dstate']) {
      expect(await cli(name, '-c', config, 'data')).toEqual({ status: 0, out: 'Unconfigured\n', err: '' });
      expect(await cli(name, '-c', config, '--json', 'data')).toMatchObject({ out: '["Unconfigured"]\n' });
      expect(await cli(name, '-c', config, 'dtaa')).toMatchObject({ status: 1 });
    }
  });
});
