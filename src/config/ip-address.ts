/** An address as bytes: 4 for IPv4, 16 for IPv6. IPv4-mapped IPv6 (`::ffff:a.b.c.d`) is always normalised to IPv4. */
export interface IpAddress {
  readonly family: 'ipv4' | 'ipv6';
  readonly bytes: Uint8Array;
  /** The interface of a link-local IPv6 address (`fe80::1%eth1`). */
  readonly zone?: string;
}

/** Reads dotted decimal with four groups of 0..255; undefined if it is anything else, short forms included. */
export function parseIpv4(text: string): Uint8Array | undefined {
  const match = /^([0-9]{1,3})\.([0-9]{1,3})\.([0-9]{1,3})\.([0-9]{1,3})$/.exec(text);
  if (!match) return undefined;
  const bytes = new Uint8Array(4);
  for (let index = 0; index < 4; index++) {
    const value = Number(match[index + 1]);
    if (value > 255) return undefined;
    bytes[index] = value;
  }
  return bytes;
}

/** Reads an IPv6 literal (RFC 4291 section 2.2, with `::` and a dotted tail), without zone and brackets. */
export function parseIpv6(text: string): Uint8Array | undefined {
  if (text.length > 45 || !/^[0-9a-fA-F:.]+$/.test(text)) return undefined;
  const halves = text.split('::');
  if (halves.length > 2) return undefined;
  const head = groupsOf(halves[0]!, halves.length === 1);
  const tail = halves.length === 2 ? groupsOf(halves[1]!, true) : [];
  if (!head || !tail) return undefined;
  const missing = 8 - head.length - tail.length;
  if (halves.length === 1 ? missing !== 0 : missing < 1) return undefined;
  const groups = [...head, ...new Array<number>(missing).fill(0), ...tail];
  const bytes = new Uint8Array(16);
  groups.forEach((group, index) => {
    bytes[2 * index] = group >> 8;
    bytes[2 * index + 1] = group & 0xff;
  });
  return bytes;
}

function groupsOf(text: string, mayEndDotted: boolean): number[] | undefined {
  if (text === '') return [];
  const groups: number[] = [];
  const parts = text.split(':');
  for (const [index, part] of parts.entries()) {
    if (/^[0-9a-fA-F]{1,4}$/.test(part)) groups.push(Number.parseInt(part, 16));
    else {
      const dotted = mayEndDotted && index === parts.length - 1 ? parseIpv4(part) : undefined;
      if (!dotted) return undefined;
      groups.push((dotted[0]! << 8) | dotted[1]!, (dotted[2]! << 8) | dotted[3]!);
    }
  }
  return groups;
}

/** Reads an IPv4 or IPv6 literal, the latter with an optional `%zone`; undefined if it is neither. */
export function parseIpAddress(text: string): IpAddress | undefined {
  const v4 = parseIpv4(text);
  if (v4) return { family: 'ipv4', bytes: v4 };
  const percent = text.indexOf('%');
  const zone = percent < 0 ? undefined : text.slice(percent + 1);
  if (zone !== undefined && !/^[A-Za-z0-9._-]{1,15}$/.test(zone)) return undefined;
  const bytes = parseIpv6(percent < 0 ? text : text.slice(0, percent));
  if (!bytes) return undefined;
  if (bytes.subarray(0, 10).every((byte) => byte === 0) && bytes[10] === 0xff && bytes[11] === 0xff)
    return { family: 'ipv4', bytes: bytes.slice(12) };
  return zone === undefined ? { family: 'ipv6', bytes } : { family: 'ipv6', bytes, zone };
}

/** Whether two addresses are the same host address; zones are compared only if both have one. */
export function sameAddress(left: IpAddress, right: IpAddress): boolean {
  if (left.bytes.length !== right.bytes.length) return false;
  if (left.zone !== undefined && right.zone !== undefined && left.zone !== right.zone) return false;
  return left.bytes.every((byte, index) => byte === right.bytes[index]);
}
