import { join } from 'node:path';

/**
 * Where a head keeps its sockets, logs and state. Every part can be moved, so that several heads fit on one machine.
 */
export interface Paths {
  /** Sockets and what must not survive a reboot. `DRBDTS_RUN_DIR`, default /run/drbdts. */
  readonly runDirectory: string;
  /** `DRBDTS_LOG_DIR`, default /var/log/drbdts. */
  readonly logDirectory: string;
  /** What must survive a reboot of this head. `DRBDTS_STATE_DIR`, default /var/lib/drbdts. */
  readonly stateDirectory: string;
  /** exports(5) file. `DRBDTS_EXPORTS`, default /etc/exports. */
  readonly exportsFile: string;
}

export function pathsFrom(env: Readonly<Record<string, string | undefined>>): Paths {
  return {
    runDirectory: env['DRBDTS_RUN_DIR'] || '/run/drbdts',
    logDirectory: env['DRBDTS_LOG_DIR'] || '/var/log/drbdts',
    stateDirectory: env['DRBDTS_STATE_DIR'] || '/var/lib/drbdts',
    exportsFile: env['DRBDTS_EXPORTS'] || '/etc/exports',
  };
}

export const daemonSocket = (paths: Paths) => join(paths.runDirectory, 'daemon.sock');
/** What a running daemon wrote down for the next one, should it die: engines and devices. */
export const daemonState = (paths: Paths) => join(paths.runDirectory, 'daemon-state.json');
export const engineSocket = (paths: Paths, resource: string) => join(paths.runDirectory, `engine-${resource}.sock`);
export const nfsSocket = (paths: Paths) => join(paths.runDirectory, 'nfs.sock');
/**
 * The Unix socket on which an engine serves a volume over NBD; the export is called `RESOURCE` or `RESOURCE/VOLUME`.
 */
export const nbdSocket = (paths: Paths, resource: string) => join(paths.runDirectory, `nbd-${resource}.sock`);
/** The folder in which an engine shows volume N as a file (FUSE), to be a loop device's backing. */
export const fuseDirectory = (paths: Paths, resource: string, volume: number) =>
  join(paths.runDirectory, `fuse-${resource}-${volume}`);
