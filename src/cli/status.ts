import type { ResourceStatus, VolumeStatus } from '../node/status.js';
import type { CliCommand, Environment } from './command.js';
import { callDaemon } from './daemon-client.js';

/** `64.0 GiB`; exact below 1 KiB. */
export function formatBytes(bytes: number): string {
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB'];
  let unit = 0;
  let value = bytes;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit++;
  }
  return unit === 0 ? `${bytes} B` : `${value.toFixed(1)} ${units[unit]}`;
}

function formatDuration(seconds: number): string {
  const h = Math.floor(seconds / 3600);
  const m = Math.floor((seconds % 3600) / 60);
  return `${h}:${String(m).padStart(2, '0')}:${String(Math.round(seconds % 60)).padStart(2, '0')}`;
}

type Health = 'OK' | 'SYNCING' | 'DEGRADED' | 'UNUSABLE';

/**
 * Is the data safe? OK: two good copies. SYNCING: on the way there. DEGRADED: one good copy. UNUSABLE: none reachable.
 */
export function healthOf(resource: ResourceStatus): Health {
  const rank: readonly Health[] = ['OK', 'SYNCING', 'DEGRADED', 'UNUSABLE'];
  let worst: Health = 'OK';
  for (const volume of resource.devices) {
    const good = [volume.diskState, volume.peerDiskState].filter((state) => state === 'UpToDate').length;
    const health: Health = good === 2 ? 'OK' : good === 0 ? 'UNUSABLE' : volume.resync ? 'SYNCING' : 'DEGRADED';
    if (rank.indexOf(health) > rank.indexOf(worst)) worst = health;
  }
  return worst;
}

/** What is wrong and what it means for the data; then what to do. Nothing to say when all is well. */
export function adviceFor(resource: ResourceStatus): { readonly status: string; readonly action: string } | undefined {
  const volume = resource.devices[0];
  const name = resource.name;
  if (!volume) return { status: 'The resource has no volume.', action: `Check its configuration: drbdts dump ${name}` };
  const outOfSync = resource.devices.reduce((sum, device) => sum + device.outOfSyncBytes, 0);
  if (volume.diskState === 'Inconsistent' && volume.peerDiskState === 'Inconsistent')
    return {
      status: 'Both copies are new: neither holds data yet.',
      action: `On the head whose data counts (any, if both disks are empty): drbdts primary --force ${name}`,
    };
  const resync = resource.devices.find((device) => device.resync)?.resync;
  if (resync) {
    const here = volume.diskState !== 'UpToDate';
    return {
      status:
        `${here ? "This head's" : "The peer's"} copy is being brought up to date; ` +
        'until then there is one good copy.',
      action: `None; wait about ${formatDuration(resync.finishSeconds)}.`,
    };
  }
  if (volume.diskState === 'Diskless')
    return {
      status: 'This head has no disk attached; the data is only on the peer.',
      action: `Mend the disk ${volume.backingDisk}, then: drbdts attach ${name}`,
    };
  if (resource.connectionState === 'StandAlone')
    return {
      status:
        `This head does not talk to its peer: ${resource.reason || 'it was told to disconnect'}. ` +
        `${formatBytes(outOfSync)} are out of sync.`,
      action: /split.brain/i.test(resource.reason)
        ? `Choose the head whose changes are to be lost; there: drbdts connect --discard-my-data ${name}; ` +
          `here: drbdts connect ${name}`
        : `drbdts connect ${name}`,
    };
  if (volume.peerDiskState !== 'UpToDate' && volume.diskState === 'UpToDate')
    return {
      status:
        `${resource.role === 'Primary' ? 'Writes are on this head only' : 'The peer cannot be seen'}. ` +
        `${formatBytes(outOfSync)} are out of sync.`,
      action:
        `None; resync starts by itself when ${resource.peerName} returns. ` +
        `If it is gone for good: drbdts disconnect ${name}`,
    };
  if (volume.diskState !== 'UpToDate')
    return {
      status: `This head's copy is ${volume.diskState} and may be old.`,
      action: `Bring ${resource.peerName} back. Only if it is lost for ever: drbdts primary --force ${name}`,
    };
  return undefined;
}

/** DRBD's words verbatim, so that manuals and search engines help. One line when healthy. */
export function renderStatus(resource: ResourceStatus): string {
  const health = healthOf(resource);
  const devices = resource.devices.map((volume) => volume.device || `minor ${volume.minor}`).join(' ');
  const size = formatBytes(resource.devices.reduce((sum, volume) => sum + volume.sizeBytes, 0));
  const lines = [
    `${resource.name}  ${health}  ${resource.role} on ${resource.nodeName}   ${devices}   ${size}` +
      (health === 'OK' ? `   peer ${resource.peerName} ${resource.peerRole} UpToDate` : ''),
  ];
  if (health === 'OK') return `${lines[0]}\n`;
  for (const volume of resource.devices) lines.push(...renderVolume(resource, volume));
  const advice = adviceFor(resource);
  if (advice) lines.push(`  status: ${advice.status}`, `  action: ${advice.action}`);
  return `${lines.join('\n')}\n`;
}

function renderVolume(resource: ResourceStatus, volume: VolumeStatus): string[] {
  const prefix = resource.devices.length > 1 ? `${volume.volume} ` : '';
  const lines = [
    `    ${prefix}local   ${volume.diskState.padEnd(14)} ${volume.backingDisk}`,
    `    ${prefix}peer    ${volume.connectionState.padEnd(14)} ${resource.peerName} ${resource.peerAddress}` +
      `   peer disk ${volume.peerDiskState}`,
  ];
  if (volume.resync) {
    const { donePercent, leftBytes, totalBytes, speedBytesPerSecond, finishSeconds } = volume.resync;
    lines.push(
      `    ${prefix}resync  ${donePercent.toFixed(1)} %   ` +
        `${formatBytes(leftBytes)} of ${formatBytes(totalBytes)} left   ` +
        `${formatBytes(speedBytesPerSecond)}/s   finish ${formatDuration(finishSeconds)}`,
    );
  }
  return lines;
}

export async function fetchStatus(environment: Environment, resource: string | undefined): Promise<ResourceStatus[]> {
  return callDaemon<ResourceStatus[]>(environment, 'status', resource ? { resource } : {});
}

export const statusCommand: CliCommand = {
  register(program, environment, exit) {
    program
      .command('status')
      .argument('[resource]', 'one resource; default: all that are up')
      .summary('is my data safe, and what do I do?')
      .description('Say for each resource whether two good copies exist, and if not, what to do.')
      .option('--json', 'the same as JSON: an array of resources')
      .addHelpText('after', '\nExamples:\n  drbdts status\n  drbdts status data --json')
      .action(async (resource: string | undefined, options: { json?: boolean }) => {
        const all = await fetchStatus(environment, resource);
        if (options.json) environment.out(`${JSON.stringify(all)}\n`);
        else if (all.length === 0) environment.out('No resource is up. Start one with: drbdts up RESOURCE\n');
        else environment.out(all.map(renderStatus).join('\n'));
        exit(0);
      });
  },
};

/** role, cstate, dstate: one line per volume, as drbdadm prints them. `Unconfigured` where the resource is not up. */
function stateCommand(
  name: 'role' | 'cstate' | 'dstate',
  summary: string,
  line: (resource: ResourceStatus, volume: VolumeStatus) => string,
): CliCommand {
  return {
    register(program, environment, exit) {
      program
        .command(name)
        .argument('<resource>')
        .summary(summary)
        .description(`Print ${summary}.`)
        .option('--json', 'as JSON')
        .addHelpText('after', `\nExample:\n  drbdts ${name} data`)
        .action(async (resource: string, options: { json?: boolean }) => {
          let lines: string[];
          try {
            const [status] = await fetchStatus(environment, resource);
            lines = status!.devices.map((volume) => line(status!, volume));
          } catch (error) {
            const reason = (error as { reason?: string }).reason;
            if (reason !== 'daemon-not-running' && reason !== 'not-up') throw error;
            lines = ['Unconfigured'];
          }
          environment.out(options.json ? `${JSON.stringify(lines)}\n` : `${lines.join('\n')}\n`);
          exit(0);
        });
    },
  };
}

export const stateCommands: readonly CliCommand[] = [
  stateCommand('role', 'the roles of both heads: own/peer', (resource) => `${resource.role}/${resource.peerRole}`),
  stateCommand('cstate', 'the connection state', (_resource, volume) => volume.connectionState),
  stateCommand(
    'dstate',
    'the disk states: own/peer',
    (_resource, volume) => `${volume.diskState}/${volume.peerDiskState}`,
  ),
];

export const procCommand: CliCommand = {
  register(program, environment, exit) {
    program
      .command('proc')
      .summary("the text of DRBD's /proc/drbd")
      .description("Print what the kernel's DRBD shows in /proc/drbd, for eyes and scripts that know it.")
      .option('--json', 'as JSON: { "text": ... }')
      .addHelpText('after', '\nExample:\n  watch -n1 drbdts proc')
      .action(async (options: { json?: boolean }) => {
        const text = await callDaemon<string>(environment, 'proc', {});
        environment.out(options.json ? `${JSON.stringify({ text })}\n` : text);
        exit(0);
      });
  },
};
