import { describe, expect, it } from 'vitest';
import { localAddresses, parseFibTrie, parseIfInet6 } from '../../src/io/local-addresses.js';

// /proc/net/fib_trie of a host with lo, eth0 and a bridge without a carrier.
const FIB_TRIE = `Main:
  +-- 0.0.0.0/0 3 0 5
     |-- 0.0.0.0
        /0 universe UNICAST
     +-- 10.77.0.0/24 2 0 2
        +-- 10.77.0.0/30 2 0 2
           |-- 10.77.0.0
              /24 link UNICAST
           |-- 10.77.0.1
              /32 host LOCAL
        |-- 10.77.0.255
           /32 link BROADCAST
Local:
     +-- 127.0.0.0/8 2 0 2
        +-- 127.0.0.0/31 1 0 0
           |-- 127.0.0.0
              /8 host LOCAL
           |-- 127.0.0.1
              /32 host LOCAL
           |-- 10.77.0.1
              /32 host LOCAL
           |-- 192.0.2.2
              /32 host LOCAL
`;

describe('the addresses of this host', () => {
  it('are the local leaves of the routing tree, each once; networks and broadcasts are none', () => {
    expect(parseFibTrie(FIB_TRIE)).toEqual(['10.77.0.1', '127.0.0.1', '192.0.2.2']);
  });

  it('are, for IPv6, in their short form', () => {
    const text = `fd000099000000000000000000000001 05 40 00 c0      brx
00000000000000000000000000000001 01 80 10 80       lo
`;
    expect(parseIfInet6(text)).toEqual(['fd00:99::1', '::1']);
  });

  it('include the loopback address here', () => {
    expect(localAddresses()).toContain('127.0.0.1');
  });
});
