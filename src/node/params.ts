import { OperatorError } from '../base/errors.js';

/** Parameters of a call on a control socket, by name. */
export type Params = Readonly<Record<string, unknown>>;

/** @throws OperatorError (1) unless it is an object; none is as good as an empty one */
export function paramsOf(params: unknown): Params {
  if (params === undefined || params === null) return {};
  if (typeof params !== 'object' || Array.isArray(params))
    throw new OperatorError('the parameters of a call are a JSON object', 1, 'usage');
  return params as Params;
}

/** @throws OperatorError (1) unless it is a whole number from 0 to 65535 */
export function volumeIn(params: Params): number {
  const volume = params['volume'];
  if (typeof volume !== 'number' || !Number.isInteger(volume) || volume < 0 || volume > 65535)
    throw new OperatorError('expected {"volume":N}', 1, 'usage');
  return volume;
}
