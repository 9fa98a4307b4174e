import { OperatorError } from '../base/errors.js';
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

/** Splits `HOST:PORT` or `[HOST]:PORT`. @throws OperatorError (1) when it is neither */
export function checkNbdListen(where: unknown): { readonly host: string; readonly port: number } {
  const match = /^(?:\[([^\]]+)\]|([^:]+)):(\d{1,5})$/.exec(String(where));
  const port = Number(match?.[3]);
  if (!match || port < 1 || port > 65535)
    throw new OperatorError(`NBD address ${String(where)}: expected HOST:PORT or [HOST]:PORT`, 1, 'usage');
  return { host: match[1] ?? match[2]!, port };
}
