/** What an engine of a large device costs: resident memory, and the time until it serves. */

import { Cluster } from './engine.js';
import { has, type Lab, residentMib, run, type Table } from './lab.js';

const TIB = 2 ** 40;
const PORT = 7870;
const BUDGET_MIB = 150;

export async function memory(lab: Lab): Promise<Table[]> {
  const disk = lab.sparse('tebibyte', TIB);
  const cluster = new Cluster(lab, { alpha: disk, beta: lab.sparse('unused', 1 << 20) }, PORT);
  const before = performance.now();
  const head = await cluster.start('alpha');
  const startMs = performance.now() - before;
  const afterStart = residentMib(head.server.pid);
  await head.call('disconnect');
  await head.call('primary', { force: true });
  let underLoad: number | undefined;
  if (has(lab, 'fio', 'fio')) {
    const load = [
      '--rw=randwrite',
      '--bs=4k',
      '--iodepth=32',
      `--size=${TIB}`,
      '--time_based',
      `--runtime=${lab.seconds}`,
    ];
    run('fio', '--name=bench', '--ioengine=nbd', `--uri=${head.uri}`, '--thread', '--norandommap', ...load);
    underLoad = residentMib(head.server.pid);
  }
  await head.end();
  run('rm', disk);
  const row = (name: string, value: number | undefined) => ({
    ...{ name, unit: 'MiB', values: [value, BUDGET_MIB], lessIsBetter: true, atLeast: 1 },
  });
  return [
    {
      title: 'An engine for a device of 1 TiB',
      columns: ['drbdts', 'limit'],
      rows: [
        row('resident, attached', afterStart),
        row('resident, after random 4 KiB writes all over it', underLoad),
        { name: 'start of the process until it serves', unit: 'ms', values: [startMs, undefined] },
      ],
    },
  ];
}
