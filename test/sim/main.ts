import { simulate } from './simulation.js';

/**
 * Runs seeds until one fails: from a random one on, or `SEED=0x1234` one, `COUNT=500` so many.
 * Exit codes: 127 assertion, 128 no convergence, 129 wrong data.
 */
const first = process.env['SEED'] ? Number(process.env['SEED']) : Math.floor(Math.random() * 0x7fffffff);
const count = process.env['COUNT'] ? Number(process.env['COUNT']) : process.env['SEED'] ? 1 : Number.POSITIVE_INFINITY;
const verbose = process.env['VERBOSE'] === '1';
console.log(`simulator: SEED=${first} COUNT=${count}`);
let requests = 0;
let faults = 0;
let failed = 0;
let exitCode = 0;
let last = first;
const started = Date.now();
let shown = started;
for (let seed = first; seed < first + count; seed++) {
  last = seed;
  const verdict = simulate(seed);
  requests += verdict.requests;
  faults += verdict.faults;
  if (verdict.exitCode !== 0) {
    failed++;
    exitCode ||= verdict.exitCode;
    if (verbose || count === 1) for (const line of verdict.log) console.log(line);
    console.log(`SEED=${seed}: exit ${verdict.exitCode}: ${verdict.message}`);
    if (process.env['KEEP_GOING'] !== '1') break;
  } else if (verbose) for (const line of verdict.log) console.log(line);
  if (Date.now() - shown > 2000) {
    shown = Date.now();
    console.log(`  seed ${seed}: ${requests} requests, ${faults} faults so far`);
  }
}
const seconds = ((Date.now() - started) / 1000).toFixed(1);
console.log(`simulator: ${failed} failures, ${requests} requests, ${faults} faults, ${seconds} s, last SEED=${last}`);
process.exitCode = exitCode;
