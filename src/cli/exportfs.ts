import { OperatorError } from '../base/errors.js';
import type { CliCommand } from './command.js';
import { callDaemon } from './daemon-client.js';

interface ExportReport {
  readonly path: string;
  readonly state: string;
  readonly clients: string;
}

/** exportfs(8) for drbdts' own NFS server: same letters, same file. */
export const exportfsCommand: CliCommand = {
  register(program, environment, exit) {
    program
      .command('exportfs')
      .argument('[path]', 'one exported folder')
      .summary('serve, withdraw or list what /etc/exports names')
      .description(
        "Serve the folders of /etc/exports over drbdts' own NFS server, or withdraw them. " +
          'Without options: list them.\n' +
          'A withdrawn folder is held open by nothing, so that umount succeeds at once.',
      )
      .option('-a, --all', 'serve all (or with -u withdraw all)')
      .option('-u, --unexport', 'withdraw PATH, or all with -a')
      .option('-r, --reexport', 'read /etc/exports again')
      .option('--json', 'as JSON')
      .addHelpText(
        'after',
        '\nExamples:\n  drbdts exportfs -a          # after mount\n' +
          '  drbdts exportfs -u /drbd    # before umount\n  drbdts exportfs',
      )
      .action(
        async (
          path: string | undefined,
          options: { all?: boolean; unexport?: boolean; reexport?: boolean; json?: boolean },
        ) => {
          if (path !== undefined && options.all)
            throw new OperatorError('give either a PATH or -a, not both', 1, 'usage');
          if (options.unexport && path === undefined && !options.all)
            throw new OperatorError('-u needs the PATH to withdraw, or -a for all', 1, 'usage');
          if (options.unexport && options.reexport) throw new OperatorError('-u and -r exclude each other', 1, 'usage');
          const action = options.unexport ? 'withdraw' : options.all || options.reexport || path ? 'serve' : 'list';
          const params = { action, ...(path ? { path } : {}) };
          let reports: ExportReport[] = [];
          try {
            reports = await callDaemon<ExportReport[]>(environment, 'exportfs', params, { start: action === 'serve' });
          } catch (error) {
            // Where nothing runs nothing is served: a stop script is done.
            if (action !== 'withdraw' || (error as { reason?: string }).reason !== 'daemon-not-running') throw error;
          }
          if (options.json) environment.out(`${JSON.stringify(reports)}\n`);
          else for (const row of reports) environment.out(`${row.path}\t${row.state}\t${row.clients}\n`);
          exit(0);
        },
      );
  },
};
