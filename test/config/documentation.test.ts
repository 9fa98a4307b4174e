import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { loadConfig } from '../../src/config/drbd-conf.js';
import { dumpConfig } from '../../src/config/drbd-dump.js';
import { parseExports } from '../../src/config/exports.js';
import { OPTION_CATALOGUE, type OptionDefinition } from '../../src/config/options.js';
import { resolveResource } from '../../src/config/resource.js';
import { mapSource } from './support.js';

const PAGE = readFileSync(join(import.meta.dirname, '../../docs/operating/configuration.md'), 'utf8');

interface Block {
  readonly language: string;
  readonly file: string;
  readonly text: string;
}

const BLOCKS: readonly Block[] = [...PAGE.matchAll(/^```(\w+) ?(\S*)\n(.*?)^```$/gms)].map((match) => ({
  language: match[1]!,
  file: match[2]!,
  text: match[3]!,
}));
const files = (language: string): Record<string, string> =>
  Object.fromEntries(BLOCKS.filter((block) => block.language === language).map((block) => [block.file, block.text]));

/** One row of the option table as the page must have it. */
function optionRow(option: OptionDefinition): string {
  const { type } = option;
  const value =
    type.kind === 'number'
      ? `${type.unit} | ${type.min} | ${type.default} | ${type.max}`
      : type.kind === 'enum'
        ? `${type.words.join(', ')}${type.prefix === undefined ? '' : `, ${type.prefix}NAME`} | | ${type.default} |`
        : type.kind === 'boolean'
          ? `yes, no | | ${type.default ? 'yes' : 'no'} |`
          : `${type.kind === 'string' ? `up to ${type.maxLength} bytes` : type.kind} | | |`;
  return `| ${option.name} | ${value} | ${option.treatment} |`.replaceAll('|  |', '| |');
}

describe('docs/operating/configuration.md', () => {
  it('the reference setup of the page loads without a word and dumps as the page says', () => {
    const { config, warnings } = loadConfig(mapSource(files('drbd')), '/etc/drbd.conf');
    expect(warnings).toEqual([]);
    const dump = BLOCKS.find((block) => block.language === 'dump')!.text;
    expect(dumpConfig(config, { nodeName: 'test-master' }).trimEnd()).toBe(dump.trimEnd());
  });

  it('the other example is a resource that runs', () => {
    const { config, warnings } = loadConfig(mapSource(files('drbd')), 'example.conf');
    expect(warnings).toEqual([]);
    const web = resolveResource(config, 'web', 'alice');
    expect(web.volumes.map((volume) => volume.diskOptions.resyncRateKiBps)).toEqual([250, 10240]);
    expect(web.volumes[0]!.diskOptions.directIo).toBe(true);
  });

  it('the exports of the page are a table without warnings', () => {
    const texts = Object.entries(files('exports')).map(([path, text]) => ({ path, text }));
    const { table, warnings } = parseExports(texts);
    expect(warnings).toEqual([]);
    expect(table.entries.map((entry) => entry.path)).toEqual(['/drbd', '/srv/my files', '/srv/scratch']);
  });

  it('every option of 8.4 and of drbdts stands in the tables with its limits, and no other', () => {
    const rows = PAGE.slice(PAGE.indexOf('## Options'), PAGE.indexOf('## exports'))
      .split('\n')
      .filter((line) => /^\| [a-z]/.test(line) && !line.startsWith('| option'));
    const expected = OPTION_CATALOGUE.filter((option) => option.since !== '9').map(optionRow);
    expect(rows).toEqual(expected);
  });
});
