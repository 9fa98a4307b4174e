/** From the operator's exports to the rules of `nfs/export-table.ts`; resolves the host names in them. */
import { lookup } from 'node:dns/promises';
import {
  type ClientNames,
  type ClientOptions,
  type ExportEntry,
  type ExportTable,
  matchClient,
  NO_NAMES,
} from '../config/exports.js';
import type { ExportOptions, ExportRule } from '../nfs/export-table.js';

/** Addresses of host names written in the exports. A name that is not resolved (yet) matches nobody. */
export class HostNames {
  private addresses = new Map<string, ReadonlySet<string>>();

  /** Looks every host name of the table up again. @returns whether anything changed */
  async resolve(table: ExportTable): Promise<boolean> {
    const names = new Set<string>();
    for (const entry of table.entries)
      for (const { specifier } of entry.clients) if (specifier.kind === 'host') names.add(specifier.name);
    const next = new Map<string, ReadonlySet<string>>();
    await Promise.all(
      [...names].map(async (name) => {
        const found = await lookup(name, { all: true }).catch(() => undefined);
        // A resolver that is down for a moment must not lock out clients that were let in before.
        const known = this.addresses.get(name);
        if (found !== undefined) next.set(name, new Set(found.map(({ address }) => address)));
        else if (known !== undefined) next.set(name, known);
      }),
    );
    const isSame =
      next.size === this.addresses.size && [...next].every(([name, set]) => isEqual(set, this.addresses.get(name)));
    this.addresses = next;
    return !isSame;
  }

  namesOf(address: string): ClientNames {
    return { ...NO_NAMES, resolvesTo: (name) => this.addresses.get(name)?.has(address) ?? false };
  }
}

function isEqual(a: ReadonlySet<string>, b: ReadonlySet<string> | undefined): boolean {
  return b !== undefined && a.size === b.size && [...a].every((value) => b.has(value));
}

/** Kinds of client specifications that this server cannot decide yet: they match nobody, and the operator must know. */
export function unsupportedClients(table: ExportTable): readonly string[] {
  return table.entries.flatMap((entry) =>
    entry.clients
      .filter(({ specifier }) => specifier.kind === 'wildcard' || specifier.kind === 'netgroup')
      .map(
        ({ file, line, text }) => `${file}:${line}: ${text} matches nobody, expected an address, a network or a host`,
      ),
  );
}

function optionsOf(options: ClientOptions): ExportOptions {
  const { writable, sync, secure, rootSquash, allSquash, anonUid, anonGid } = options;
  const { allowAuthNone, allowAuthSys, readdirPlus } = options;
  return {
    ...{ writable, sync, secure, rootSquash, allSquash, anonUid, anonGid },
    ...{ allowAuthNone, allowAuthSys, readdirPlus },
  };
}

/**
 * The path that must be a mount point while the entry is exported; undefined: any mount but the root filesystem will
 * do.
 */
export function mountPointOf(entry: ExportEntry): string | undefined {
  return entry.clients.find(({ options }) => options.mountPoint !== undefined)?.options.mountPoint;
}

export function rulesOf(table: ExportTable, names: HostNames): ExportRule[] {
  return table.entries.map((entry) => {
    const fsid = entry.clients.find(({ options }) => options.fsid !== undefined)?.options.fsid;
    // One options object per item: what is derived from it (squashed identities) is found by its identity.
    const options = new Map(entry.clients.map((client) => [client, optionsOf(client.options)]));
    return {
      path: entry.path,
      ...(fsid !== undefined && { fsid }),
      clients: entry.clients.map(({ text }) => text),
      optionsFor: (address) => {
        const client = matchClient(entry, address, names.namesOf(address));
        return client && options.get(client);
      },
    };
  });
}
