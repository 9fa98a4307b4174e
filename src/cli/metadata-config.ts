import { hostname } from 'node:os';
import { loadConfig } from '../config/drbd-conf.js';
import { resolveResource, resourcesOfHost } from '../config/resource.js';
import { findConfig } from '../config/search.js';
import { fileConfigSource } from '../io/config-source.js';
import { localAddresses as addressesOfHost } from '../io/local-addresses.js';
import type { MetadataTarget, ResolveTargets } from './metadata-target.js';

/**
 * Finds the metadata of a resource's volumes on this host, by the configuration; `all` means every resource of the
 * host.
 *
 * @throws ConfigError or OperatorError of config/, which say file, line and what was expected
 */
export const resolveFromConfig: ResolveTargets = (name, environment, configFile) => {
  const search = findConfig(fileConfigSource, environment.env, hostname(), configFile);
  if (search.notice) environment.err(search.notice);
  const { config } = loadConfig(fileConfigSource, search.path);
  // A `floating` section belongs to the host that has its address.
  const localAddresses = addressesOfHost();
  const names = name === 'all' ? resourcesOfHost(config, search.nodeName, { localAddresses }) : [name];
  return names.flatMap((resource) =>
    resolveResource(config, resource, search.nodeName, { localAddresses }).volumes.map((volume): MetadataTarget => {
      const { minor, disk, metaDisk } = volume;
      if (metaDisk.kind === 'internal') return { minor, disk, metaDisk: { kind: 'internal', path: disk, index: -1 } };
      const index = metaDisk.kind === 'indexed' ? metaDisk.index : -2;
      return { minor, disk, metaDisk: { kind: metaDisk.kind, path: metaDisk.path, index } };
    }),
  );
};
