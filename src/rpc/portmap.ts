/**
 * Port mapping, program 100000: version 2 (RFC 1833 section 3) and, for clients that do not fall back, GETADDR and DUMP
 * of versions 3 and 4 (section 2). Forwarding (CALLIT, BCAST, INDIRECT) is not served: it amplifies, and hides who
 * asks.
 */
import { NULL_PROCEDURE, type Procedure, type Program, type RpcCall } from './dispatcher.js';
import { type Codec, VOID } from './xdr.js';

export const PORTMAP_PROGRAM = 100000;
export const PORTMAP_PORT = 111;
export const Protocol = { TCP: 6, UDP: 17 } as const;

/** RFC 1833 struct mapping. */
export interface Mapping {
  readonly program: number;
  readonly version: number;
  /** Protocol.TCP or Protocol.UDP. */
  readonly protocol: number;
  readonly port: number;
}

export const MAPPING: Codec<Mapping> = {
  encode: (writer, mapping) => {
    writer.u32(mapping.program);
    writer.u32(mapping.version);
    writer.u32(mapping.protocol);
    writer.u32(mapping.port);
  },
  decode: (reader) => ({
    program: reader.u32(),
    version: reader.u32(),
    protocol: reader.u32(),
    port: reader.u32(),
  }),
};

export const PORT: Codec<number> = {
  encode: (writer, value) => writer.u32(value),
  decode: (reader) => reader.u32(),
};

export const BOOLEAN: Codec<boolean> = {
  encode: (writer, value) => writer.bool(value),
  decode: (reader) => reader.bool(),
};

const MAX_MAPPINGS = 256;

/** A list as XDR's linked list: TRUE before each entry, FALSE at the end. */
function listOf<T>(entry: Codec<T>): Codec<readonly T[]> {
  return {
    encode: (writer, values) => {
      for (const value of values) {
        writer.bool(true);
        entry.encode(writer, value);
      }
      writer.bool(false);
    },
    decode: (reader) => {
      const values: T[] = [];
      while (reader.bool()) values.push(entry.decode(reader));
      return values;
    },
  };
}
export const MAPPINGS = listOf(MAPPING);

/** RFC 1833 struct rpcb: addresses are universal addresses, `h1.h2.h3.h4.p1.p2`. */
export interface RpcbEntry {
  readonly program: number;
  readonly version: number;
  readonly netid: string;
  readonly address: string;
  readonly owner: string;
}

const MAX_RPCB_TEXT_BYTES = 1024;
export const RPCB: Codec<RpcbEntry> = {
  encode: (writer, entry) => {
    writer.u32(entry.program);
    writer.u32(entry.version);
    writer.text(entry.netid);
    writer.text(entry.address);
    writer.text(entry.owner);
  },
  decode: (reader) => ({
    program: reader.u32(),
    version: reader.u32(),
    netid: reader.text(MAX_RPCB_TEXT_BYTES),
    address: reader.text(MAX_RPCB_TEXT_BYTES),
    owner: reader.text(MAX_RPCB_TEXT_BYTES),
  }),
};
export const RPCB_LIST = listOf(RPCB);
export const UNIVERSAL_ADDRESS: Codec<string> = {
  encode: (writer, value) => writer.text(value),
  decode: (reader) => reader.text(MAX_RPCB_TEXT_BYTES),
};

/** `10.96.20.8` and 2049 → `10.96.20.8.8.1`; the same form for IPv6 (RFC 5665 section 5.2.3). */
export function universalAddress(host: string, port: number): string {
  return `${host}.${port >> 8}.${port & 255}`;
}

/** The mappings that this process serves. */
export class PortmapService {
  private mappings: Mapping[] = [];

  /** @param localAddress the address at which a peer reaches this machine, for GETADDR */
  constructor(private readonly localAddress: (peer: string) => string) {}

  list(): readonly Mapping[] {
    return this.mappings;
  }

  port(program: number, version: number, protocol: number): number {
    const ofProgram = this.mappings.filter((entry) => entry.program === program && entry.protocol === protocol);
    // Any version's port will do: the program itself then answers PROG_MISMATCH with what it has (RFC 1833 section
    // 3.2).
    return (ofProgram.find((entry) => entry.version === version) ?? ofProgram[0])?.port ?? 0;
  }

  /** @returns false if the program, version and protocol have a port already */
  set(mapping: Mapping): boolean {
    const isTaken = this.mappings.some((entry) => isSameService(entry, mapping));
    if (isTaken || mapping.port < 1 || mapping.port > 65535 || this.mappings.length >= MAX_MAPPINGS) return false;
    this.mappings.push(mapping);
    return true;
  }

  /** Removes a program and version for every protocol. */
  unset(mapping: Mapping): boolean {
    const rest = this.mappings.filter(
      (entry) => entry.program !== mapping.program || entry.version !== mapping.version,
    );
    const isChanged = rest.length !== this.mappings.length;
    this.mappings = rest;
    return isChanged;
  }

  rpcb(entry: Mapping, peer: string): RpcbEntry {
    return {
      program: entry.program,
      version: entry.version,
      netid: netidOf(entry.protocol, peer),
      address: universalAddress(this.localAddress(peer), entry.port),
      owner: 'superuser',
    };
  }
}

function isSameService(a: Mapping, b: Mapping): boolean {
  return a.program === b.program && a.version === b.version && a.protocol === b.protocol;
}

function netidOf(protocol: number, peer: string): string {
  return (protocol === Protocol.TCP ? 'tcp' : 'udp') + (peer.includes(':') ? '6' : '');
}

/** Other programs of this machine may register; nobody else, and no unprivileged user. */
function mayRegister(call: RpcCall): boolean {
  const { address, port } = call.transport;
  return (address === '127.0.0.1' || address === '::1') && port < 1024;
}

const SET: Procedure<PortmapService, Mapping, boolean> = {
  name: 'SET',
  args: MAPPING,
  result: BOOLEAN,
  run: (service, mapping, call) => mayRegister(call) && service.set(mapping),
};
const UNSET: Procedure<PortmapService, Mapping, boolean> = {
  name: 'UNSET',
  args: MAPPING,
  result: BOOLEAN,
  run: (service, mapping, call) => mayRegister(call) && service.unset(mapping),
};
const GETPORT: Procedure<PortmapService, Mapping, number> = {
  name: 'GETPORT',
  args: MAPPING,
  result: PORT,
  run: (service, { program, version, protocol }) => service.port(program, version, protocol),
};
const DUMP: Procedure<PortmapService, void, readonly Mapping[]> = {
  name: 'DUMP',
  args: VOID,
  result: MAPPINGS,
  run: (service) => service.list(),
};
const GETADDR: Procedure<PortmapService, RpcbEntry, string> = {
  name: 'GETADDR',
  args: RPCB,
  result: UNIVERSAL_ADDRESS,
  run: (service, { program, version, netid }, call) => {
    const protocol = netid.startsWith('udp') ? Protocol.UDP : Protocol.TCP;
    const port = service.port(program, version, protocol);
    return port === 0 ? '' : service.rpcb({ program, version, protocol, port }, call.transport.address).address;
  },
};
const RPCB_DUMP: Procedure<PortmapService, void, readonly RpcbEntry[]> = {
  name: 'DUMP',
  args: VOID,
  result: RPCB_LIST,
  run: (service, _none, call) => service.list().map((entry) => service.rpcb(entry, call.transport.address)),
};

/** Procedure numbers of version 2. */
export const PortmapProcedure = { NULL: 0, SET: 1, UNSET: 2, GETPORT: 3, DUMP: 4 } as const;

export function portmapPrograms(service: PortmapService): readonly Program<PortmapService>[] {
  const base = { name: 'PORTMAP', number: PORTMAP_PROGRAM, service };
  return [
    { ...base, version: 2, procedures: [NULL_PROCEDURE, SET, UNSET, GETPORT, DUMP] },
    { ...base, version: 3, procedures: [NULL_PROCEDURE, undefined, undefined, GETADDR, RPCB_DUMP] },
    {
      ...base,
      version: 4,
      procedures: [NULL_PROCEDURE, undefined, undefined, GETADDR, RPCB_DUMP, ...Array(4).fill(undefined), GETADDR],
    },
  ];
}
