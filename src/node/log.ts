import { type Logger, pino } from 'pino';

/** JSON lines on standard output, which the starter sends to a file or the journal. Level by `DRBDTS_LOG_LEVEL`. */
export function createLog(name: string): Logger {
  return pino({ name, level: process.env['DRBDTS_LOG_LEVEL'] || 'info', base: { name, pid: process.pid } });
}
