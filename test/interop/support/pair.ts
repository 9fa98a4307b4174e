/** A head of drbdts and a guest kernel with drbd.ko, connected, with fresh metadata. */
import { createHash, randomBytes } from 'node:crypto';
import { writeFileSync } from 'node:fs';
import { requires } from '../../support/requires.js';
import { canBootGuests, GUEST_ADDRESS, type Head, HOST_ADDRESS, type KernelPeer, Lab, type Layout } from './lab.js';

/** Finds a dead peer within seconds, not in the ten that are the default. */
const NET = 'ping-int 2; ping-timeout 10; timeout 19; connect-int 2;';

export interface Pair {
  readonly lab: Lab;
  readonly head: Head;
  readonly kernel: KernelPeer;
}

export function canPair(): boolean {
  return [canBootGuests(), requires('drbdadm', 'drbd-utils')].every((one) => one);
}

/**
 * @param options.sizeKib must not be a multiple of 256: drbd.ko takes the last 64 bits of such a bitmap for clear
 * @param options.net more for the net section of both
 */
export async function connectPair(options: { sizeKib: number; layout?: Layout; net?: string }): Promise<Pair> {
  const { sizeKib, layout = 'indexed', net = '' } = options;
  const lab = await Lab.start();
  try {
    const head = lab.addHead({
      name: 'test-master',
      address: HOST_ADDRESS,
      peer: { name: 'test-backup', address: GUEST_ADDRESS },
      sizeKib,
      layout,
      net: `${NET} ${net}`,
    });
    // Something to copy, also behind the last whole extent.
    writeFileSync(head.data, randomBytes(sizeKib * 1024));
    await head.drbdts('create-md', '--force', 'data');
    await head.drbdts('up', 'data');
    return { lab, head, kernel: await lab.bootPeer(head) };
  } catch (error) {
    await lab.destroy();
    throw error;
  }
}

/** What `write_blocks FIRST COUNT text` writes, and its sum, by another hand. */
export function patternSum(text: string, count: number): string {
  return createHash('md5')
    .update(Buffer.alloc(count * 4096, `${text}\n`))
    .digest('hex');
}
