import { readdirSync, readFileSync } from 'node:fs';
import { dirname, join, relative, resolve } from 'node:path';
import { describe, expect, it } from 'vitest';

const SRC = resolve(import.meta.dirname, '../src');

/** Which folder may import which; `type` marks type-only imports. Imports only point down. */
const MAY_IMPORT: Record<string, readonly string[]> = {
  base: [],
  config: ['base'],
  metadata: ['base'],
  replication: ['base', 'metadata', 'type io'],
  nbd: ['base'],
  rpc: ['base'],
  nfs: ['base', 'rpc'],
  cluster: ['base'],
  io: ['base', 'type replication', 'type nfs', 'type cluster'],
  node: ['base', 'config', 'metadata', 'replication', 'nbd', 'rpc', 'nfs', 'cluster', 'io'],
  cli: ['base', 'config', 'metadata', 'io', 'rpc', 'nfs', 'type node'],
};
const DOORS = ['io', 'node', 'cli'];
const PURE_NODE_MODULES = ['node:buffer', 'node:assert', 'node:crypto'];

function filesUnder(folder: string): string[] {
  return readdirSync(folder, { withFileTypes: true }).flatMap((entry) =>
    entry.isDirectory()
      ? filesUnder(join(folder, entry.name))
      : entry.name.endsWith('.ts')
        ? [join(folder, entry.name)]
        : [],
  );
}

interface Import {
  readonly from: string;
  readonly target: string;
  readonly isType: boolean;
}

function importsOf(file: string): Import[] {
  const text = readFileSync(file, 'utf8');
  const found: Import[] = [];
  for (const match of text.matchAll(/^(?:import|export)\s+(type\s+)?[^'";]*?from\s+'([^']+)'/gms))
    found.push({ from: file, target: match[2]!, isType: match[1] !== undefined });
  for (const match of text.matchAll(/\bimport\(\s*'([^']+)'\s*\)/g))
    found.push({ from: file, target: match[1]!, isType: false });
  return found;
}

const files = filesUnder(SRC);
const folderOf = (file: string) => relative(SRC, file).split('/')[0]!;

describe('tidy', () => {
  it('imports only point down the layers', () => {
    const wrong: string[] = [];
    for (const { from, target, isType } of files.flatMap(importsOf)) {
      if (!target.startsWith('.')) continue;
      const there = folderOf(resolve(dirname(from), target));
      const here = folderOf(from);
      const allowed = MAY_IMPORT[here];
      if (!allowed) wrong.push(`${relative(SRC, from)}: folder ${here} is not in the table`);
      else if (there !== here && !allowed.includes(there) && !(isType && allowed.includes(`type ${there}`)))
        wrong.push(`${relative(SRC, from)} must not import ${target}`);
    }
    expect(wrong).toEqual([]);
  });

  it('pure folders know no sockets, disks, clocks, randomness or promises of the platform', () => {
    const wrong: string[] = [];
    for (const file of files.filter((file) => !DOORS.includes(folderOf(file)))) {
      for (const { target } of importsOf(file))
        if (!target.startsWith('.') && !PURE_NODE_MODULES.includes(target))
          wrong.push(`${relative(SRC, file)}: ${target}`);
      const code = readFileSync(file, 'utf8').replace(/\/\*.*?\*\/|\/\/[^\n]*/gs, '');
      for (const match of code.matchAll(
        /\b(Date\.now|new Date\(\)|performance\.now|Math\.random|setTimeout|setInterval|setImmediate|process\.|randomBytes)/g,
      ))
        wrong.push(`${relative(SRC, file)}: ${match[1]}`);
    }
    expect(wrong).toEqual([]);
  });

  it('every source file is reached from an entry point', () => {
    const entries = ['cli/main.ts', 'node/daemon-main.ts', 'node/engine-main.ts', 'node/nfs-main.ts'];
    const seen = new Set<string>();
    const queue = entries.map((entry) => join(SRC, entry)).filter((file) => files.includes(file));
    for (let file = queue.pop(); file; file = queue.pop()) {
      if (seen.has(file)) continue;
      seen.add(file);
      for (const { target } of importsOf(file))
        if (target.startsWith('.')) queue.push(resolve(dirname(file), target.replace(/\.js$/, '.ts')));
    }
    expect(files.filter((file) => !seen.has(file)).map((file) => relative(SRC, file))).toEqual([]);
  });

  it('no line is longer than 120 columns and nothing is left for later', () => {
    const wrong: string[] = [];
    for (const file of files) {
      readFileSync(file, 'utf8')
        .split('\n')
        .forEach((line, index) => {
          if (line.length > 120 || /\b(FIXME|TODO|XXX)\b/.test(line)) wrong.push(`${relative(SRC, file)}:${index + 1}`);
        });
    }
    expect(wrong).toEqual([]);
  });
});
