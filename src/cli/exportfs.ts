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
        "Serve the folders of /etc/exports over drbdts' own NFS server, or withdraw them. Without options: list them.\n" +
          'A withdrawn folder is held open by nothing, so that umount succeeds at once.',
      )
      .option('-a, --all', 'serve all (or with -u withdraw all)')
      .option('-u, --unexport', 'withdraw PATH, or all with -a')
      .option('-r, --reexport', 'read /etc/exports again')
      .option('--json', 'as JSON')
      .addHelpText(
        'after',
        '\nExamples:\n  drbdts exportfs -a          # after mount\n  drbdts exportfs -u /drbd    # before umount\n  drbdts exportfs',
      )
      .action(
        async (
          path: string | undefined,
          options: { all?: boolean; unexport?: boolean; reexport?: boolean; json?: boolean },
        ) => {
          const action = options.unexport ? 'withdraw' : options.all || options.reexport || path ? 'serve' : 'list';
          const reports = await callDaemon<ExportReport[]>(
            environment,
            'exportfs',
            { action, ...(path ? { path } : {}) },
            { start: action === 'serve' },
          );
          if (options.json) environment.out(`${JSON.stringify(reports)}\n`);
          else for (const row of reports) environment.out(`${row.path}\t${row.state}\t${row.clients}\n`);
          exit(0);
        },
      );
  },
};
