import {
  closeSync,
  constants,
  copyFileSync,
  existsSync,
  fsyncSync,
  openSync,
  renameSync,
  statSync,
  writeFileSync,
} from 'node:fs';
import { hostname } from 'node:os';
import { OperatorError } from '../base/errors.js';
import { formatDiagnostic } from '../config/diagnostic.js';
import { describeRepair, lintConfig, type RepairedFile } from '../config/lint.js';
import { findConfig } from '../config/search.js';
import { fileConfigSource } from '../io/config-source.js';
import type { CliCommand, Environment } from './command.js';

const HELP = `
Finds what drbdts dump would refuse or warn about, and repairs what has only one meaning: words that lost the blank
between them ("rate50M"), full-width and curly punctuation, stray semicolons, DOS line ends.
With --fix each changed file is kept as FILE.orig.

Examples:
  drbdts lint
  drbdts lint /etc/drbd.d/data.res --fix

Exit codes: 0 nothing to complain about (or all of it repaired), 1 a file cannot be written, 10 something is wrong,
20 no file.`;

/** `drbdts lint [FILE] [--fix]`: checks a configuration and repairs mechanical damage. */
export const lintCommand: CliCommand = {
  register(program, environment, exit) {
    const command = program
      .command('lint')
      .description('check a configuration, and repair what has only one meaning')
      .argument('[file]', 'the file to check with all it includes; the usual one without it')
      .option('--fix', 'write the repairs, keeping each changed file as FILE.orig')
      .addHelpText('after', HELP);
    command.action((file: string | undefined) => {
      const flags = command.optsWithGlobals<{ fix?: boolean; configFile?: string }>();
      exit(lint(file ?? flags.configFile, flags.fix === true, environment));
    });
  },
};

function lint(file: string | undefined, isFixing: boolean, environment: Environment): number {
  const { path } = findConfig(fileConfigSource, environment.env, hostname(), file);
  const result = lintConfig(fileConfigSource, path);
  for (const repaired of result.repaired) environment.out(describeRepair(repaired));
  if (isFixing) {
    for (const repaired of result.repaired) {
      const backup = writeRepaired(repaired);
      environment.err(`${repaired.path}: repaired, the old text is in ${backup}\n`);
    }
    for (const diagnostic of result.remaining) environment.err(`${formatDiagnostic(diagnostic)}\n`);
    return result.remaining.length > 0 ? 10 : 0;
  }
  for (const diagnostic of result.found) environment.err(`${formatDiagnostic(diagnostic)}\n`);
  if (result.repaired.length > 0) environment.err('drbdts lint --fix writes the changes above\n');
  return result.found.length > 0 || result.repaired.length > 0 ? 10 : 0;
}

/** Replaces a file so that a crash leaves the old or the new text, never half of one. Returns the backup's path. */
function writeRepaired(file: RepairedFile): string {
  // Behind a symbolic link it is the file that changes, not the link.
  const path = fileConfigSource.realPath(file.path);
  let backup = `${path}.orig`;
  // The first backup is the text from before all repairs: never overwrite it.
  for (let number = 1; existsSync(backup); number++) backup = `${path}.orig.${number}`;
  const fresh = `${path}.new`;
  try {
    copyFileSync(path, backup, constants.COPYFILE_EXCL);
    const { mode } = statSync(path);
    const fd = openSync(fresh, 'w', mode & 0o777);
    try {
      writeFileSync(fd, file.after);
      fsyncSync(fd);
    } finally {
      closeSync(fd);
    }
    renameSync(fresh, path);
  } catch (error) {
    throw new OperatorError(`cannot repair ${file.path}: ${(error as Error).message}`, 1);
  }
  return backup;
}
