import type { ResolvedResource } from '../config/resource.js';

/** What the daemon hands an engine on its standard input, as JSON. */
export interface EngineOptions {
  readonly resource: ResolvedResource;
  readonly controlSocket: string;
  /** Unix socket on which each volume is served over NBD: volume 0 under the resource's name, others as NAME/VOLUME. */
  readonly nbdSocket: string;
  /** `HOST:PORT` to serve NBD over TCP too. */
  readonly nbdListen?: string;
}
