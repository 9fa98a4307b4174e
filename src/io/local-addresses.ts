/**
 * The IP addresses of this host. Not `os.networkInterfaces()`: that leaves out interfaces without a carrier, and on two
 * heads with a cable between them the interface of the one loses its carrier when the other dies. Its address is no
 * less
 * its own.
 */
import { readFileSync } from 'node:fs';

const IPV4_LEAF = /^\s*\|-- (\d+\.\d+\.\d+\.\d+)$/;
/** As the kernel prints a local address below its leaf; networks and broadcasts have other words there. */
const IPV4_LOCAL = /^\s*\/32 host LOCAL$/;

/** @param text /proc/net/fib_trie @returns each local address once, in the order found */
export function parseFibTrie(text: string): string[] {
  const found = new Set<string>();
  let leaf = '';
  for (const line of text.split('\n')) {
    const match = IPV4_LEAF.exec(line);
    if (match) leaf = match[1]!;
    else if (leaf !== '' && IPV4_LOCAL.test(line)) found.add(leaf);
  }
  return [...found];
}

/** @param text /proc/net/if_inet6 @returns addresses in their usual short form */
export function parseIfInet6(text: string): string[] {
  const found: string[] = [];
  for (const line of text.split('\n')) {
    const digits = /^([0-9a-f]{32}) /.exec(line)?.[1];
    // The URL parser knows RFC 5952.
    if (digits) found.push(new URL(`http://[${digits.match(/.{4}/g)!.join(':')}]`).hostname.slice(1, -1));
  }
  return found;
}

/** Every address of every interface that is up, with or without a carrier. */
export function localAddresses(): string[] {
  return [...parseFibTrie(read('/proc/net/fib_trie')), ...parseIfInet6(read('/proc/net/if_inet6'))];
}

/** A kernel without IPv6 has no if_inet6. */
function read(path: string): string {
  try {
    return readFileSync(path, 'utf8');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return '';
    throw error;
  }
}
