/** Registers programs with the host's rpcbind (RFC 1833 section 3.2), as rpc.mountd and the kernel's server do. */
import { randomInt } from 'node:crypto';
import { OperatorError } from '../base/errors.js';
import { RpcLink } from '../io/rpc-link.js';
import { askPort, RpcCaller } from '../nfs/client.js';
import { BOOLEAN, MAPPING, type Mapping, PORTMAP_PORT, PORTMAP_PROGRAM, PortmapProcedure } from '../rpc/portmap.js';
import { frameRecord, RecordReader } from '../rpc/record-marking.js';

const MAX_RECORD_BYTES = 65536;
const MAX_FRAGMENTS = 64;
const TIMEOUT_MS = 2000;

/** rpcbind takes registrations only over loopback from a privileged port. */
export class PortmapClient {
  private readonly link: RpcLink;
  private readonly caller: RpcCaller;

  constructor() {
    this.link = new RpcLink(
      {
        ...{ host: '127.0.0.1', port: PORTMAP_PORT, privileged: true },
        ...{ connectTimeoutMs: TIMEOUT_MS, callTimeoutMs: TIMEOUT_MS, silenceMs: TIMEOUT_MS },
      },
      { frame: frameRecord, reader: (record) => new RecordReader(MAX_RECORD_BYTES, MAX_FRAGMENTS, record) },
    );
    this.caller = new RpcCaller((record) => this.link.call(record), undefined, randomInt(2 ** 32));
  }

  close(): void {
    this.link.close();
  }

  /**
   * Registers, after removing what a killed server of ours may have left.
   * @throws OperatorError when another server owns the program
   */
  async register(mappings: readonly Mapping[]): Promise<void> {
    await this.unregister(mappings);
    for (const mapping of mappings) {
      if (await this.call(PortmapProcedure.SET, mapping)) continue;
      const { program, version, protocol } = mapping;
      const owner = await askPort(this.caller, mapping);
      throw new OperatorError(
        `rpcbind has another server for program ${program} version ${version} (protocol ${protocol}, port ${owner}): ` +
          'stop it first, for example with systemctl stop nfs-server',
        20,
        'portmap',
      );
    }
  }

  async unregister(mappings: readonly Mapping[]): Promise<void> {
    for (const mapping of mappings) await this.call(PortmapProcedure.UNSET, mapping);
  }

  private call(procedure: number, mapping: Mapping): Promise<boolean> {
    return this.caller.call(PORTMAP_PROGRAM, 2, procedure, MAPPING, mapping, BOOLEAN);
  }
}
