/** Block engines as the daemon starts them, without the daemon: two heads on addresses of the loopback interface. */
import { writeFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { createMetadata } from '../src/cli/create-md.js';
import { parseTarget } from '../src/cli/metadata-target.js';
import { loadConfig } from '../src/config/drbd-conf.js';
import { resolveResource } from '../src/config/resource.js';
import { fileConfigSource } from '../src/io/config-source.js';
import { callJsonLines } from '../src/io/json-lines.js';
import type { EngineOptions } from '../src/node/engine-options.js';
import type { ResourceStatus } from '../src/node/status.js';
import { answers, type Lab, type Server, until } from './lab.js';

/** The program as built, found from build/bench.mjs. */
export const DIST = process.env['DRBDTS_DIST'] ?? fileURLToPath(new URL('../dist', import.meta.url));
const RESOURCE = 'data';
const CALL_TIMEOUT_MS = 60_000;
const SYNC_PATIENCE_MS = 300_000;
const META_BYTES = 48 << 20;
/** As `src/node/daemon.ts` starts engines. */
const NODE_OPTIONS = ['--max-old-space-size=256', '--max-semi-space-size=8'];
const EXTRA_NODE_OPTIONS = (process.env['DRBDTS_BENCH_NODE_OPTIONS'] ?? '').split(' ').filter((word) => word !== '');

export class Head {
  constructor(
    private readonly lab: Lab,
    readonly name: string,
    readonly server: Server,
    private readonly control: string,
    readonly nbdSocket: string,
    readonly disk: string,
  ) {}

  get uri(): string {
    return `nbd+unix:///${RESOURCE}?socket=${this.nbdSocket}`;
  }

  call<T>(method: string, params: object = {}): Promise<T> {
    return callJsonLines(this.control, method, params, CALL_TIMEOUT_MS) as Promise<T>;
  }

  status(): Promise<ResourceStatus> {
    return this.call('status');
  }

  async isUpToDateWithPeer(): Promise<boolean> {
    const [device] = (await this.status()).devices;
    return device!.diskState === 'UpToDate' && device!.peerDiskState === 'UpToDate';
  }

  async waitConnected(): Promise<void> {
    await until('the heads are connected', async () => (await this.status()).connectionState !== 'WFConnection');
  }

  async waitInSync(): Promise<void> {
    await until('both disks are UpToDate', () => this.isUpToDateWithPeer(), SYNC_PATIENCE_MS);
  }

  end(): Promise<void> {
    return this.lab.end(this.server);
  }
}

export interface HeadOptions {
  readonly disk: string;
  readonly sizeBytes: number;
}

/** Makes the configuration of two heads, `alpha` with the first disk and `beta` with the second. */
export class Cluster {
  private readonly configFile: string;

  constructor(
    private readonly lab: Lab,
    private readonly disks: Readonly<Record<'alpha' | 'beta', string>>,
    private readonly port: number,
    metaBytes = META_BYTES,
  ) {
    const metas = { alpha: lab.sparse('alpha.meta', metaBytes), beta: lab.sparse('beta.meta', metaBytes) };
    const host = (name: 'alpha' | 'beta', address: string) =>
      `on ${name} { device /dev/drbd0; disk ${disks[name]}; meta-disk ${metas[name]}; address ${address}:${port}; }`;
    this.configFile = lab.fresh('drbd.conf');
    writeFileSync(
      this.configFile,
      `global { usage-count no; disable-ip-verification; }
resource ${RESOURCE} {
  protocol C;
  disk { resync-rate 4096M; c-plan-ahead 0; c-min-rate 0; }
  ${host('alpha', '127.0.0.1')}
  ${host('beta', '127.0.0.2')}
}
`,
    );
    for (const name of ['alpha', 'beta'] as const) {
      const code = createMetadata(
        parseTarget(disks[name], metas[name]),
        { force: true, ignoreSanityChecks: true },
        { out: () => {}, err: () => {}, isTerminal: false, env: {}, confirm: () => true },
      );
      if (code !== 0) throw new Error(`create-md of ${disks[name]} failed: ${code}`);
    }
  }

  async start(name: 'alpha' | 'beta'): Promise<Head> {
    const { lab } = this;
    const { config } = loadConfig(fileConfigSource, this.configFile, {});
    const options: EngineOptions = {
      resource: resolveResource(config, RESOURCE, name),
      controlSocket: lab.fresh(`${name}.control`),
      nbdSocket: lab.fresh(`${name}.nbd`),
      nbdListen: `${name === 'alpha' ? '127.0.0.1' : '127.0.0.2'}:${this.port + 1}`,
    };
    const args = [...NODE_OPTIONS, ...EXTRA_NODE_OPTIONS, `${DIST}/node/engine-main.js`, name];
    const server = lab.start(process.execPath, args, JSON.stringify(options));
    // The control socket comes last.
    await lab.ready(server, () => answers(options.controlSocket));
    const head = new Head(lab, name, server, options.controlSocket, options.nbdSocket, this.disks[name]);
    await head.call('ping');
    return head;
  }
}

/** A Primary without a peer. */
export async function startAlone(lab: Lab, disk: string, port: number): Promise<Head> {
  const beta = lab.sparse('unused', 1 << 20);
  const head = await new Cluster(lab, { alpha: disk, beta }, port).start('alpha');
  await head.call('disconnect');
  await head.call('primary', { force: true });
  return head;
}

/** Two heads in sync; alpha is Primary. */
export async function startPair(lab: Lab, alphaDisk: string, betaDisk: string, port: number): Promise<[Head, Head]> {
  const cluster = new Cluster(lab, { alpha: alphaDisk, beta: betaDisk }, port);
  const [alpha, beta] = [await cluster.start('alpha'), await cluster.start('beta')];
  await alpha.waitConnected();
  await alpha.call('primary', { force: true });
  await alpha.waitInSync();
  return [alpha, beta];
}
