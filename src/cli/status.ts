import type { ResourceStatus, VolumeStatus } from '../node/status.js';
import type { CliCommand, Environment } from './command.js';
import { callDaemon } from './daemon-client.js';
import { checkResourceName, daemonsPath } from './resource-name.js';

/** `64.0 GiB`; exact below 1 KiB. */
export function formatBytes(bytes: number): string {
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB'];
  let unit = 0;
  let value = bytes;
  // What would be rounded up to 1024.0 belongs to the next unit.
  while (value >= (unit === 0 ? 1024 : 1023.95) && unit < units.length - 1) {
    value /= 1024;
    unit++;
  }
  return unit === 0 ? `${bytes} B` : `${value.toFixed(1)} ${units[unit]}`;
}

/** `h:mm:ss` */
export function formatDuration(seconds: number): string {
  const whole = Math.round(seconds);
  const [h, m, s] = [Math.floor(whole / 3600), Math.floor((whole % 3600) / 60), whole % 60];
  return `${h}:${String(m).padStart(2, '0')}:${String(s).padStart(2, '0')}`;
}

/** Best first. */
const HEALTHS = ['OK', 'SYNCING', 'DEGRADED', 'UNUSABLE', 'UNKNOWN'] as const;
export type Health = (typeof HEALTHS)[number];

function volumeHealth(volume: VolumeStatus): Health {
  const good = [volume.diskState, volume.peerDiskState].filter((state) => state === 'UpToDate').length;
  return good === 2 ? 'OK' : good === 0 ? 'UNUSABLE' : volume.resync ? 'SYNCING' : 'DEGRADED';
}

/** The volume that is worst off. */
function worstVolume(resource: ResourceStatus): VolumeStatus | undefined {
  const rank = (volume: VolumeStatus) => HEALTHS.indexOf(volumeHealth(volume));
  return resource.devices.reduce<VolumeStatus | undefined>(
    (worst, volume) => (worst === undefined || rank(volume) > rank(worst) ? volume : worst),
    undefined,
  );
}

/**
 * Is the data safe? OK: two good copies. SYNCING: on the way there. DEGRADED: one good copy. UNUSABLE: none in reach.
 * UNKNOWN: nobody can tell.
 */
export function healthOf(resource: ResourceStatus): Health {
  if (resource.engineFault !== undefined) return 'UNKNOWN';
  const worst = worstVolume(resource);
  return worst === undefined ? 'UNUSABLE' : volumeHealth(worst);
}

export interface Advice {
  readonly status: string;
  readonly action: string;
}

/** A current generation identifier that says: metadata made, never used. */
const JUST_CREATED = '0000000000000004';

/** What is wrong and what it means for the data; then what to do. Nothing to say when all is well. */
export function adviceFor(resource: ResourceStatus): Advice | undefined {
  const volume = worstVolume(resource);
  const { name } = resource;
  if (!volume) return { status: 'The resource has no volume.', action: `Check its configuration: drbdts dump ${name}` };
  if (resource.engineFault !== undefined) return adviceWithoutEngine(resource, resource.engineFault);
  if (resource.connectionState === 'StandAlone') return adviceStandAlone(resource);
  if (volume.diskState === 'Inconsistent' && volume.peerDiskState === 'Inconsistent')
    return {
      status: 'Both copies are new: neither holds data yet.',
      action: `On the head whose data counts (any, if both disks are empty): drbdts primary --force ${name}`,
    };
  if (volume.resync) {
    const { speedBytesPerSecond, finishSeconds } = volume.resync;
    const whose = volume.diskState !== 'UpToDate' ? "This head's" : "The peer's";
    const wait = speedBytesPerSecond > 0 ? `wait about ${formatDuration(finishSeconds)}` : 'it has just begun';
    return {
      status: `${whose} copy is being brought up to date; until then there is one good copy.`,
      action: `None; ${wait}.`,
    };
  }
  return adviceForDisks(resource, volume);
}

function adviceWithoutEngine(resource: ResourceStatus, fault: string): Advice {
  const { name, devices } = resource;
  if (!resource.engineEnded)
    return { status: `The engine does not answer: ${fault}.`, action: `Look again: drbdts status ${name}` };
  const attached = devices.map((volume) => volume.device).filter((device) => device !== '');
  const unmount =
    `Unmount what is mounted from ${attached.join(' ')} ` +
    '(drbdts exportfs -u PATH; umount PATH, with -l if it hangs), then: ';
  return {
    status: `${fault.split('. ')[0]}. ${resource.peerName} may take over.`,
    action: `${attached.length > 0 ? unmount : ''}drbdts up ${name}`,
  };
}

function adviceStandAlone(resource: ResourceStatus): Advice {
  const { name } = resource;
  const apart = `${formatBytes(totalOutOfSync(resource))} are out of sync.`;
  if (/split.brain/i.test(resource.reason))
    return {
      status: `Split brain: both heads were written to while apart, and do not connect any more. ${apart}`,
      action:
        `Choose the head whose changes are to be LOST. There: drbdts secondary ${name}; ` +
        `drbdts connect --discard-my-data ${name}. On the other: drbdts connect ${name}`,
    };
  return {
    status: `This head does not talk to its peer: ${resource.reason || 'it was told to disconnect'}. ${apart}`,
    action: `drbdts connect ${name}`,
  };
}

function totalOutOfSync(resource: ResourceStatus): number {
  return resource.devices.reduce((sum, device) => sum + device.outOfSyncBytes, 0);
}

function adviceForDisks(resource: ResourceStatus, volume: VolumeStatus): Advice | undefined {
  const { name, peerName } = resource;
  const { diskState, peerDiskState } = volume;
  if (diskState === 'UpToDate') {
    if (peerDiskState === 'UpToDate') return undefined;
    if (peerDiskState === 'Diskless')
      return {
        status: `${peerName} has no disk attached; the only good copy is here.`,
        action: `Mend the disk of ${peerName}, then there: drbdts attach ${name}`,
      };
    const apart = `${formatBytes(totalOutOfSync(resource))} are out of sync.`;
    return {
      status: `${resource.role === 'Primary' ? 'Writes are on this head only' : 'The peer cannot be seen'}. ${apart}`,
      action:
        `None; resync starts by itself when ${peerName} returns. ` +
        `If it is up, see there why not: drbdts status ${name}. ` +
        `If it is gone for good: drbdts disconnect ${name}`,
    };
  }
  if (diskState === 'Diskless')
    return {
      status:
        peerDiskState === 'UpToDate'
          ? 'This head has no disk attached; the only good copy is on the peer, which serves it.'
          : 'This head has no disk attached, and no good copy is in reach.',
      action: `Mend the disk ${volume.backingDisk}, then: drbdts attach ${name}`,
    };
  if (volume.generationIdentifiers[0] === JUST_CREATED)
    return {
      status: 'The copy here is new and holds no data yet.',
      action:
        `Bring ${peerName} up: drbdts up ${name}. ` +
        `Without it, and if what is on this disk counts: drbdts primary --force ${name}`,
    };
  return {
    status: `This head's copy is ${diskState} and may be old.`,
    action: `Bring ${peerName} back. Only if it is lost for ever: drbdts primary --force ${name}`,
  };
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

function fetchStatus(
  environment: Environment,
  resource: string | undefined,
  configFile: string | undefined,
): Promise<ResourceStatus[]> {
  const params = { ...(resource ? { resource } : {}), ...(configFile ? { configFile: daemonsPath(configFile) } : {}) };
  return callDaemon<ResourceStatus[]>(environment, 'status', params);
}

interface StatusFlags {
  readonly json?: boolean;
  readonly configFile?: string;
}

const CONFIG_OPTION = ['-c, --config-file <file>', 'configuration to read instead of /etc/drbd.conf'] as const;

export const statusCommand: CliCommand = {
  register(program, environment, exit) {
    const command = program
      .command('status')
      .argument('[resource]', 'one resource; default: all that are up')
      .summary('is my data safe, and what do I do?')
      .description('Say for each resource whether two good copies exist, and if not, what to do.')
      .option(...CONFIG_OPTION)
      .option('--json', 'the same as JSON: an array of resources')
      .addHelpText('after', '\nExamples:\n  drbdts status\n  drbdts status data --json');
    command.action(async (resource: string | undefined) => {
      const { json, configFile } = command.optsWithGlobals<StatusFlags>();
      const all = await fetchStatus(environment, resource, configFile);
      if (json) environment.out(`${JSON.stringify(all)}\n`);
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
      const command = program
        .command(name)
        .argument('<resource>', 'one resource, or "all" that are up')
        .summary(summary)
        .description(`Print ${summary}.`)
        .option(...CONFIG_OPTION)
        .option('--json', 'as JSON: an array of the lines')
        .addHelpText('after', `\nExample:\n  drbdts ${name} data`);
      command.action(async (resource: string) => {
        const { json, configFile } = command.optsWithGlobals<StatusFlags>();
        let lines: string[];
        try {
          const all = await fetchStatus(environment, resource, configFile);
          lines = all.flatMap((one) => one.devices.map((volume) => line(one, volume)));
        } catch (error) {
          const { reason } = error as { reason?: string };
          if (reason !== 'daemon-not-running' && reason !== 'not-up') throw error;
          checkResourceName(resource, environment, configFile);
          lines = ['Unconfigured'];
        }
        environment.out(json ? `${JSON.stringify(lines)}\n` : lines.map((text) => `${text}\n`).join(''));
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
