import { describe, expect, it } from 'vitest';
import { OperatorError } from '../../src/base/errors.js';
import { resolveResource } from '../../src/config/resource.js';
import { runtimeOptions } from '../../src/node/resource-options.js';
import { HOSTS, parse } from '../config/support.js';

const resolve = (net: string) => {
  const config = parse(`resource r { net { ${net} } ${HOSTS} }`);
  return resolveResource(config, 'r', 'alice');
};

describe('what the engine is told of a resource', () => {
  it('is in milliseconds, with the algorithms by name', () => {
    const { net } = runtimeOptions(resolve('ping-int 3; timeout 25; verify-alg sha1; csums-alg crc32c;'));
    expect(net).toMatchObject({
      pingIntervalMs: 3000,
      timeoutMs: 2500,
      verifyAlgorithm: 'sha1',
      checksumAlgorithm: 'crc32c',
    });
  });

  it('is refused, in a sentence with exit code 10, where it promises a check that is not made', () => {
    const options = () => runtimeOptions(resolve('data-integrity-alg sha1;'));
    expect(options).toThrow(OperatorError);
    expect(options).toThrow(/^r: drbdts does not have data-integrity-alg \(sha1\)\. Remove it from the net section/);
  });
});
