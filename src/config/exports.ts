import { matchesGlob } from '../base/glob.js';
import { ConfigError, closestWord, type Diagnostic, DiagnosticList, type Position } from './diagnostic.js';
import { deepFreeze } from './drbd-conf.js';
import { type IpAddress, parseIpAddress, parseIpv4, parseIpv6 } from './ip-address.js';
import { type ConfigSource, MAX_CONFIG_FILE_BYTES } from './source.js';

/** Whom an item of an exports line is for; the order of the kinds here is also their precedence. */
export type ClientSpecifier =
  /** A host name; matches if the address is one of the name's (forward lookup). */
  | { readonly kind: 'host'; readonly name: string }
  /** Also a bare address, as a network of full length. `bytes`: 4 or 16, host bits cleared. */
  | {
      readonly kind: 'network';
      readonly family: 'ipv4' | 'ipv6';
      readonly bytes: readonly number[];
      readonly prefixLength: number;
    }
  /** A shell pattern over the forward-confirmed host names of the address. */
  | { readonly kind: 'wildcard'; readonly pattern: string }
  /** A shell pattern of digits and dots only (`10.96.20.*`), over the dotted address and never over a name. */
  | { readonly kind: 'numeric'; readonly pattern: string }
  | { readonly kind: 'netgroup'; readonly name: string }
  | { readonly kind: 'anonymous' };

/** What a client may do with an export. */
export interface ClientOptions {
  readonly writable: boolean;
  /** Answer modifications only once they are on stable storage. */
  readonly sync: boolean;
  readonly writeDelay: boolean;
  /** Only from source ports below 1024. */
  readonly secure: boolean;
  readonly rootSquash: boolean;
  readonly allSquash: boolean;
  /** 0..4294967294. */
  readonly anonUid: number;
  readonly anonGid: number;
  readonly allowAuthSys: boolean;
  readonly allowAuthNone: boolean;
  readonly subtreeCheck: boolean;
  readonly crossMount: boolean;
  readonly hide: boolean;
  readonly acl: boolean;
  /** Check file access for lock requests. */
  readonly secureLocks: boolean;
  readonly readdirPlus: boolean;
  /** `mp`: the path that must be a mount point for the export to be served. Without it the server decides. */
  readonly mountPoint?: string;
  /** `fsid=` as a number (`root` is 0). */
  readonly fsid?: number;
  /** `fsid=` as a UUID, lower case, 32 hexadecimal digits without dashes. */
  readonly fsUuid?: string;
}

export interface ExportClient {
  readonly specifier: ClientSpecifier;
  /** As written, for lists of exports. */
  readonly text: string;
  readonly options: ClientOptions;
  readonly file: string;
  readonly line: number;
}

export interface ExportEntry {
  /** Absolute, no double or trailing slashes. */
  readonly path: string;
  /** In the order written, over all lines of the path. */
  readonly clients: readonly ExportClient[];
}

/** All exports; plain data (JSON and back changes nothing), deeply frozen. */
export interface ExportTable {
  readonly entries: readonly ExportEntry[];
}

export interface ExportsText {
  readonly path: string;
  readonly text: string;
}

const MAX_LINE_LENGTH = 64 * 1024;
const MAX_ENTRIES = 4096;
const MAX_CLIENTS = 65536;
const MAX_PATH_BYTES = 1024;
const MAX_CLIENT_LENGTH = 255;
const MAX_ID = 4294967294;

const DEFAULT_OPTIONS: ClientOptions = Object.freeze({
  writable: false,
  sync: true,
  writeDelay: true,
  secure: true,
  rootSquash: true,
  allSquash: false,
  anonUid: 65534,
  anonGid: 65534,
  allowAuthSys: true,
  allowAuthNone: false,
  subtreeCheck: false,
  crossMount: false,
  hide: true,
  acl: true,
  secureLocks: true,
  readdirPlus: true,
});

type Draft = { -readonly [Key in keyof ClientOptions]: ClientOptions[Key] };

/**
 * Reads exports(5) files: /etc/exports first, then those of /etc/exports.d, as one table.
 *
 * Unlike nfs-utils, which stops at the first bad line and exports what came before, a file with any error yields no
 * table at all: the caller keeps the one it has, and no half-read line widens access.
 *
 * @throws ConfigError listing every bad line
 */
export function parseExports(texts: readonly ExportsText[]): { table: ExportTable; warnings: readonly Diagnostic[] } {
  const diagnostics = new DiagnosticList();
  const entries = new Map<string, ExportClient[]>();
  const seen = new Map<string, ExportClient>();
  let clientCount = 0;
  for (const { path: file, text } of texts) {
    if (Buffer.byteLength(text) > MAX_CONFIG_FILE_BYTES) {
      const at = { file, path: file, line: 1, column: 1 };
      diagnostics.error(at, `the file is too large, expected at most ${MAX_CONFIG_FILE_BYTES} bytes`);
      continue;
    }
    for (const line of logicalLines(text, file, diagnostics)) {
      const parsed = parseLine(line, diagnostics);
      if (!parsed) continue;
      const clients = entries.get(parsed.path) ?? [];
      for (const client of parsed.clients) {
        clientCount++;
        addClient(clients, seen, client, line.at, parsed.path, diagnostics);
      }
      entries.set(parsed.path, clients);
      if (entries.size > MAX_ENTRIES || clientCount > MAX_CLIENTS) {
        diagnostics.error(
          line.at,
          `too many exports, expected at most ${MAX_ENTRIES} paths and ${MAX_CLIENTS} clients`,
        );
        throw new ConfigError(Object.freeze([...diagnostics.items]));
      }
    }
  }
  for (const [path, clients] of entries) checkEntry(path, clients, diagnostics);
  checkFsids(entries, diagnostics);
  if (diagnostics.hasErrors) throw new ConfigError(Object.freeze([...diagnostics.items]));
  const table = { entries: [...entries].map(([path, clients]) => ({ path, clients })) };
  return { table: deepFreeze(table), warnings: diagnostics.warnings };
}

/** Reads /etc/exports (or `mainPath`) and `mainPath.d/*.exports`, in exportfs's order. No file is no exports. */
export function readExports(source: ConfigSource, mainPath = '/etc/exports'): ExportsText[] {
  const paths = [mainPath, ...source.glob(`${mainPath}.d/*.exports`)];
  return paths.flatMap((path) => {
    const text = source.read(path);
    return text === undefined ? [] : [{ path, text }];
  });
}

// ---- lines --------------------------------------------------------------------------------------------------------

interface LogicalLine {
  readonly text: string;
  readonly at: Position;
}

/** Joins lines that end in a backslash and drops comments' lines of nothing. A line's number is that of its start. */
function* logicalLines(text: string, file: string, diagnostics: DiagnosticList): Generator<LogicalLine> {
  const lines = (text.charCodeAt(0) === 0xfeff ? text.slice(1) : text).split('\n');
  let parts: string[] = [];
  let length = 0;
  let first = 0;
  for (let index = 0; index < lines.length; index++) {
    const line = lines[index]!.endsWith('\r') ? lines[index]!.slice(0, -1) : lines[index]!;
    if (parts.length === 0) {
      first = index + 1;
      length = 0;
    }
    const continues = line.endsWith('\\') && index + 1 < lines.length;
    const part = continues ? line.slice(0, -1) : line;
    length += part.length;
    parts.push(length <= MAX_LINE_LENGTH ? part : '');
    if (continues) continue;
    const at: Position = { file, path: file, line: first, column: 1 };
    if (length > MAX_LINE_LENGTH)
      diagnostics.error(at, `the line is ${length} characters long, expected at most ${MAX_LINE_LENGTH}`);
    else yield { text: parts.join(''), at };
    parts = [];
  }
}

interface Word {
  readonly text: string;
  readonly column: number;
}

/**
 * Splits a line into words at blanks outside quotes; a `#` starts a comment where a word could start. The words are
 * raw: quotes and escapes are still in them. Undefined (with an error recorded) if a quote is not closed.
 */
function splitWords(line: LogicalLine, diagnostics: DiagnosticList): Word[] | undefined {
  const words: Word[] = [];
  const { text } = line;
  for (let index = 0; index < text.length; ) {
    const character = text[index]!;
    if (character === ' ' || character === '\t') {
      index++;
      continue;
    }
    if (character === '#') break;
    const start = index;
    let isQuoted = false;
    for (; index < text.length; index++) {
      if (text[index] === '"') isQuoted = !isQuoted;
      else if (!isQuoted && (text[index] === ' ' || text[index] === '\t')) break;
    }
    if (isQuoted) {
      diagnostics.error(
        { ...line.at, column: start + 1 },
        `unterminated quote, expected '"' before the end of the line`,
      );
      return undefined;
    }
    words.push({ text: text.slice(start, index), column: start + 1 });
  }
  return words;
}

/** Takes quotes away and decodes `\ooo`. Undefined if an escape is no three octal digits below 0400. */
function decode(raw: string): string | undefined {
  if (!/["\\]/.test(raw)) return raw;
  const bytes: Buffer[] = [];
  let run = '';
  for (let index = 0; index < raw.length; index++) {
    const character = raw[index]!;
    if (character === '"') continue;
    if (character !== '\\') {
      run += character;
      continue;
    }
    const octal = raw.slice(index + 1, index + 4);
    if (!/^[0-3][0-7]{2}$/.test(octal)) return undefined;
    bytes.push(Buffer.from(run), Buffer.from([Number.parseInt(octal, 8)]));
    run = '';
    index += 3;
  }
  return Buffer.concat([...bytes, Buffer.from(run)]).toString('utf8');
}

function parseLine(line: LogicalLine, diagnostics: DiagnosticList): ExportEntry | undefined {
  const words = splitWords(line, diagnostics);
  const first = words?.[0];
  if (!words || !first) return undefined;
  const path = parsePath(first, line.at, diagnostics);
  let defaults: ClientOptions = DEFAULT_OPTIONS;
  const clients: ExportClient[] = [];
  let isOk = path !== undefined;
  let hasItem = false;
  for (const [index, word] of words.entries()) {
    if (index === 0) continue;
    const at = { ...line.at, column: word.column };
    if (word.text.startsWith('-')) {
      const options = parseOptions(word.text.slice(1), defaults, at, diagnostics);
      if (options) defaults = options;
      else isOk = false;
      continue;
    }
    hasItem = true;
    const client = parseItem(word.text, defaults, at, diagnostics, words[index - 1]!.text);
    if (client) clients.push(client);
    else isOk = false;
  }
  if (!isOk || path === undefined) return undefined;
  if (!hasItem) {
    diagnostics.warn(
      line.at,
      `${path} names no client and is exported to everybody, expected for example ${path} 10.0.0.0/24(rw)`,
    );
    const { file, line: number } = line.at;
    clients.push({ specifier: { kind: 'anonymous' }, text: '*', options: defaults, file, line: number });
  }
  return { path, clients };
}

function parsePath(word: Word, at: Position, diagnostics: DiagnosticList): string | undefined {
  const here = { ...at, column: word.column };
  const path = decode(word.text);
  if (path === undefined)
    diagnostics.error(here, `bad escape in '${word.text.slice(0, 80)}', expected \\ and three octal digits`);
  else if (!path.startsWith('/'))
    diagnostics.error(here, `the path '${path.slice(0, 80)}' is relative, expected an absolute path`);
  else if (path.includes('\0')) diagnostics.error(here, 'the path holds a NUL, expected a path');
  else if (Buffer.byteLength(path) > MAX_PATH_BYTES)
    diagnostics.error(here, `the path is ${Buffer.byteLength(path)} bytes long, expected at most ${MAX_PATH_BYTES}`);
  else if (path.split('/').some((part) => part === '.' || part === '..'))
    diagnostics.error(here, `the path '${path.slice(0, 80)}' contains . or .., expected the directory itself`);
  else return normalizeExportPath(path);
  return undefined;
}

/** Doubled and trailing slashes do not change what a path names. */
export function normalizeExportPath(path: string): string {
  return `/${path
    .split('/')
    .filter((part) => part !== '')
    .join('/')}`;
}

function parseItem(
  raw: string,
  defaults: ClientOptions,
  at: Position,
  diagnostics: DiagnosticList,
  before: string,
): ExportClient | undefined {
  const open = raw.indexOf('(');
  const name = open < 0 ? raw : raw.slice(0, open);
  let options: ClientOptions | undefined = defaults;
  if (open >= 0) {
    if (!raw.endsWith(')') || raw.indexOf(')') !== raw.length - 1) {
      diagnostics.error(at, `bad option list in '${raw.slice(0, 80)}', expected CLIENT(OPTION,OPTION) and a blank`);
      return undefined;
    }
    if (name === '') warnOpenToAll(raw, before, at, diagnostics);
    options = parseOptions(raw.slice(open + 1, -1), defaults, at, diagnostics);
  } else if (raw.includes(')')) {
    diagnostics.error(at, `')' without '(' in '${raw.slice(0, 80)}', expected CLIENT(OPTION,OPTION)`);
    return undefined;
  }
  const specifier = parseClient(name, at, diagnostics);
  if (!specifier || !options) return undefined;
  return { specifier, text: name === '' ? '*' : name, options, file: at.file, line: at.line };
}

/** The classic mistake: a blank between the client and its options gives the options to the whole world. */
function warnOpenToAll(raw: string, before: string, at: Position, diagnostics: DiagnosticList): void {
  const isTrap = !before.startsWith('-') && !before.startsWith('/') && !before.startsWith('"') && !before.includes('(');
  diagnostics.warn(
    at,
    `${raw.slice(0, 80)} stands alone and is granted to everybody`,
    isTrap
      ? `for "${before}" only, write ${before}${raw.slice(0, 80)} without a blank`
      : `write *${raw.slice(0, 80)} if that is meant`,
  );
}

/** Reads a client specifier; undefined with an error recorded if it is none. */
function parseClient(text: string, at: Position, diagnostics: DiagnosticList): ClientSpecifier | undefined {
  if (text === '' || text === '*') return { kind: 'anonymous' };
  const shown = text.slice(0, 80);
  if (text.length > MAX_CLIENT_LENGTH) {
    diagnostics.error(at, `the client '${shown}...' is too long, expected at most ${MAX_CLIENT_LENGTH} characters`);
    return undefined;
  }
  if (text.startsWith('@')) {
    if (/^@[^\s@/()"]+$/.test(text)) return { kind: 'netgroup', name: text.slice(1) };
    diagnostics.error(at, `'${shown}' is no netgroup, expected @NAME`);
    return undefined;
  }
  if (text.includes('/') || parseIpAddress(text)) return parseNetwork(text, at, diagnostics);
  if (/[*?[]/.test(text)) {
    if (/^[0-9.*?[\]!^-]+$/.test(text)) return { kind: 'numeric', pattern: text };
    return { kind: 'wildcard', pattern: text.toLowerCase() };
  }
  if (/^[0-9.]+$/.test(text) || text.includes(':')) {
    diagnostics.error(at, `'${shown}' is no address, expected for example 10.0.0.7, 10.0.0.0/24 or 2001:db8::/64`);
    return undefined;
  }
  if (/^[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?$/.test(text)) return { kind: 'host', name: text.toLowerCase() };
  diagnostics.error(at, `'${shown}' is no client, expected a host, an address, a network, a pattern, @NETGROUP or *`);
  return undefined;
}

function parseNetwork(text: string, at: Position, diagnostics: DiagnosticList): ClientSpecifier | undefined {
  const slash = text.indexOf('/');
  const address = slash < 0 ? text : text.slice(0, slash);
  const mask = slash < 0 ? undefined : text.slice(slash + 1);
  const v4 = parseIpv4(address);
  const bytes = v4 ?? parseIpv6(address);
  const shown = text.slice(0, 80);
  if (!bytes) {
    diagnostics.error(at, `'${shown}' is no network, expected ADDRESS/LENGTH or ADDRESS/MASK`);
    return undefined;
  }
  const bits = bytes.length * 8;
  const prefixLength = mask === undefined ? bits : prefixOf(mask, bits);
  if (prefixLength === undefined) {
    diagnostics.error(
      at,
      `'${mask!.slice(0, 40)}' is no mask, expected 0..${bits}` +
        (v4 ? ' or a contiguous mask such as 255.255.255.0' : ''),
    );
    return undefined;
  }
  let hasHostBits = false;
  const network = [...bytes].map((byte, index) => {
    const keep = Math.min(8, Math.max(0, prefixLength - index * 8));
    const kept = byte & (0xff00 >> keep) & 0xff;
    if (kept !== byte) hasHostBits = true;
    return kept;
  });
  if (hasHostBits) diagnostics.warn(at, `${shown} has bits set behind the mask, which are ignored`);
  return normalizeMapped(v4 ? 'ipv4' : 'ipv6', network, prefixLength);
}

/** `::ffff:10.0.0.0/120` is 10.0.0.0/24: sources are normalised to IPv4, so networks must be too. */
function normalizeMapped(family: 'ipv4' | 'ipv6', bytes: number[], prefixLength: number): ClientSpecifier {
  const isMapped =
    family === 'ipv6' &&
    prefixLength >= 96 &&
    bytes.slice(0, 10).every((byte) => byte === 0) &&
    bytes[10] === 0xff &&
    bytes[11] === 0xff;
  if (!isMapped) return { kind: 'network', family, bytes, prefixLength };
  return { kind: 'network', family: 'ipv4', bytes: bytes.slice(12), prefixLength: prefixLength - 96 };
}

function prefixOf(mask: string, bits: number): number | undefined {
  if (/^[0-9]{1,3}$/.test(mask)) return Number(mask) <= bits ? Number(mask) : undefined;
  const dotted = bits === 32 ? parseIpv4(mask) : undefined;
  if (!dotted) return undefined;
  const value = ((dotted[0]! << 24) | (dotted[1]! << 16) | (dotted[2]! << 8) | dotted[3]!) >>> 0;
  const inverse = ~value >>> 0;
  // Contiguous exactly if the inverse is one less than a power of two.
  if ((inverse & (inverse + 1)) !== 0) return undefined;
  return Math.clz32(inverse);
}

// ---- options ------------------------------------------------------------------------------------------------------

/** What each plain word sets. */
const WORDS: Readonly<Record<string, Partial<ClientOptions>>> = {
  ro: { writable: false },
  rw: { writable: true },
  sync: { sync: true },
  async: { sync: false },
  wdelay: { writeDelay: true },
  no_wdelay: { writeDelay: false },
  secure: { secure: true },
  insecure: { secure: false },
  root_squash: { rootSquash: true },
  no_root_squash: { rootSquash: false },
  all_squash: { allSquash: true },
  no_all_squash: { allSquash: false },
  no_subtree_check: { subtreeCheck: false },
  subtree_check: { subtreeCheck: true },
  hide: { hide: true },
  nohide: { hide: false },
  nocrossmnt: { crossMount: false },
  crossmnt: { crossMount: true },
  secure_locks: { secureLocks: true },
  auth_nlm: { secureLocks: true },
  insecure_locks: { secureLocks: false },
  no_auth_nlm: { secureLocks: false },
  acl: { acl: true },
  no_acl: { acl: false },
  nordirplus: { readdirPlus: false },
};

/** Known to exports(5), without meaning for an NFSv3 server. */
const WITHOUT_EFFECT: ReadonlySet<string> = new Set(['pnfs', 'no_pnfs', 'security_label', 'reexport', 'replicas']);

/** Known elsewhere, with a meaning that leaving out would change who may do what. */
const REFUSED: Readonly<Record<string, string>> = {
  refer: 'referrals need NFSv4',
  squash_uids: 'use all_squash, anonuid and anongid',
  squash_gids: 'use all_squash, anonuid and anongid',
  map_daemon: 'identities are not mapped',
  map_identity: 'identities are not mapped',
  map_static: 'identities are not mapped',
  map_nis: 'identities are not mapped',
  removable: 'this is an option of unfs3',
  fixed: 'this is an option of unfs3',
  password: 'this is an option of unfs3',
};

function splitOptions(list: string): string[] {
  const parts: string[] = [];
  let start = 0;
  let isQuoted = false;
  for (let index = 0; index <= list.length; index++) {
    if (list[index] === '"') isQuoted = !isQuoted;
    if (index === list.length || (list[index] === ',' && !isQuoted)) {
      parts.push(list.slice(start, index));
      start = index + 1;
    }
  }
  return parts.filter((part) => part !== '');
}

/** Applies an option list to a set of options. Undefined if any option is bad, with an error recorded for each. */
function parseOptions(
  list: string,
  base: ClientOptions,
  at: Position,
  diagnostics: DiagnosticList,
): ClientOptions | undefined {
  const options: Draft = { ...base };
  let isOk = true;
  let hasFlavors = false;
  const fail = (message: string, hint?: string): void => {
    isOk = false;
    diagnostics.error(at, message, hint);
  };
  for (const part of splitOptions(list)) {
    const equals = part.indexOf('=');
    const word = equals < 0 ? part : part.slice(0, equals);
    const value = equals < 0 ? undefined : decode(part.slice(equals + 1));
    const shown = part.slice(0, 80);
    const plain = Object.hasOwn(WORDS, word) ? WORDS[word] : undefined;
    if (plain && equals < 0) {
      Object.assign(options, plain);
      if (word === 'async')
        diagnostics.warn(at, 'async answers before data is on disk: a crash loses acknowledged writes');
      if (word === 'subtree_check') diagnostics.warn(at, 'subtree_check breaks clients that hold renamed files open');
    } else if (word === 'anonuid' || word === 'anongid') {
      const id = parseId(value);
      if (id === undefined) fail(`${shown}: not an id, expected ${word}=NUMBER (-2 or 0..${MAX_ID})`);
      else options[word === 'anonuid' ? 'anonUid' : 'anonGid'] = id;
    } else if (word === 'fsid') {
      const fsid = parseFsid(value);
      if (!fsid) fail(`${shown}: not an fsid, expected fsid=NUMBER, fsid=root or fsid=UUID`);
      else {
        delete options.fsid;
        delete options.fsUuid;
        Object.assign(options, fsid);
      }
    } else if (word === 'mp' || word === 'mountpoint') {
      if (value !== undefined && !value.startsWith('/')) fail(`${shown}: the path is relative, expected ${word}=/PATH`);
      else options.mountPoint = value === undefined ? '' : normalizeExportPath(value);
    } else if (word === 'sec') {
      const flavors = (value ?? '').split(':');
      const unknown = flavors.find((flavor) => flavor !== 'sys' && flavor !== 'none');
      if (unknown !== undefined) fail(`${shown}: security flavor '${unknown}' is not available, expected sys or none`);
      else {
        options.allowAuthSys = flavors.includes('sys');
        options.allowAuthNone = flavors.includes('none');
        // With one sec= the options behind it hold for all flavors there are; with two they would differ per flavor.
        if (hasFlavors) fail('sec= twice in one list, expected one list of flavors such as sec=sys:none');
        hasFlavors = true;
      }
    } else if (word === 'xprtsec') {
      if (value !== 'none') fail(`${shown}: transport security is not available, expected xprtsec=none`);
    } else if (WITHOUT_EFFECT.has(word)) diagnostics.warn(at, `${shown} has no effect on an NFSv3 server`);
    else if (Object.hasOwn(REFUSED, word)) fail(`${shown} is refused: ${REFUSED[word]}`);
    else {
      const close = closestWord(word.slice(0, 40), OPTION_WORDS);
      fail(
        `unknown option '${shown}', expected one of exports(5)`,
        close === undefined ? undefined : `did you mean "${close}"?`,
      );
    }
  }
  return isOk ? options : undefined;
}

const OPTION_WORDS = [...Object.keys(WORDS), 'anonuid', 'anongid', 'fsid', 'mp', 'mountpoint', 'sec'];

/** Decimal; negative numbers count from the end of 32 bits, as strtol into a uid_t has it. -1 is no identity. */
function parseId(text: string | undefined): number | undefined {
  if (text === undefined || !/^-?[0-9]{1,10}$/.test(text)) return undefined;
  const value = Number(text);
  const id = value < 0 ? value + 2 ** 32 : value;
  return id >= 0 && id <= MAX_ID ? id : undefined;
}

function parseFsid(text: string | undefined): { fsid: number } | { fsUuid: string } | undefined {
  if (text === undefined) return undefined;
  if (text === 'root') return { fsid: 0 };
  if (/^[0-9]{1,10}$/.test(text)) return Number(text) <= 0xffffffff ? { fsid: Number(text) } : undefined;
  const digits = text.replaceAll(/[-:]/g, '').toLowerCase();
  return /^[0-9a-f]{32}$/.test(digits) ? { fsUuid: digits } : undefined;
}

// ---- checks over a path's clients ---------------------------------------------------------------------------------

function addClient(
  clients: ExportClient[],
  seen: Map<string, ExportClient>,
  client: ExportClient,
  at: Position,
  path: string,
  diagnostics: DiagnosticList,
): void {
  // `mp` without a path means the export itself, which only this place knows.
  const resolved =
    client.options.mountPoint === '' ? { ...client, options: { ...client.options, mountPoint: path } } : client;
  const key = `${path}\0${specifierKey(resolved.specifier)}`;
  const first = seen.get(key);
  if (first)
    diagnostics.warn(
      at,
      `${path} is exported to ${client.text} a second time (first in line ${first.line}), the first one holds`,
    );
  else {
    seen.set(key, resolved);
    clients.push(resolved);
  }
}

function specifierKey(specifier: ClientSpecifier): string {
  switch (specifier.kind) {
    case 'network':
      return `network ${specifier.bytes.join('.')}/${specifier.prefixLength}`;
    case 'wildcard':
    case 'numeric':
      return `${specifier.kind} ${specifier.pattern}`;
    case 'host':
    case 'netgroup':
      return `${specifier.kind} ${specifier.name}`;
    case 'anonymous':
      return 'anonymous';
  }
}

/** Networks are tried in the order written, so a wide one hides a narrower one behind it. */
function checkEntry(path: string, clients: readonly ExportClient[], diagnostics: DiagnosticList): void {
  const networks = clients.filter((client) => client.specifier.kind === 'network').slice(0, 1000);
  for (const [index, later] of networks.entries()) {
    const earlier = networks.slice(0, index).find((wide) => covers(wide.specifier, later.specifier));
    if (earlier)
      diagnostics.warn(
        { file: later.file, path: later.file, line: later.line, column: 1 },
        `${path}: ${later.text} is never reached, ${earlier.text} before it covers it`,
        'write the narrower network first',
      );
  }
}

function covers(wide: ClientSpecifier, narrow: ClientSpecifier): boolean {
  if (wide.kind !== 'network' || narrow.kind !== 'network' || wide.family !== narrow.family) return false;
  return wide.prefixLength <= narrow.prefixLength && isInNetwork(narrow.bytes, wide.bytes, wide.prefixLength);
}

/** One fsid names one filesystem in every handle: two paths with the same number would be mixed up by clients. */
function checkFsids(entries: ReadonlyMap<string, readonly ExportClient[]>, diagnostics: DiagnosticList): void {
  const owners = new Map<string, string>();
  for (const [path, clients] of entries) {
    const values = new Set<string>();
    for (const { options, file, line } of clients) {
      const value = options.fsid === undefined ? options.fsUuid : String(options.fsid);
      const at = { file, path: file, line, column: 1 };
      if (value === undefined) continue;
      values.add(value);
      if (values.size > 1) diagnostics.error(at, `${path} has two different fsid, expected one for all its clients`);
      const owner = owners.get(value);
      if (owner !== undefined && owner !== path)
        diagnostics.error(at, `fsid=${value} is that of ${owner} already, expected a number of its own for ${path}`);
      owners.set(value, path);
    }
  }
}

// ---- matching -----------------------------------------------------------------------------------------------------

/**
 * What is known about a client's names when a request comes in. The caller looks them up beforehand and asynchronously;
 * a name that is not known yet must be left out, so that nothing is granted on a guess.
 */
export interface ClientNames {
  /** Names of the address whose forward lookup gives the address again, in lower case. */
  readonly confirmed: readonly string[];
  /** Whether a host name written in the exports resolves to the address. */
  resolvesTo(name: string): boolean;
  /** Whether the client's confirmed names are in a netgroup. */
  isInNetgroup(netgroup: string): boolean;
}

export const NO_NAMES: ClientNames = Object.freeze({
  confirmed: Object.freeze([]),
  resolvesTo: () => false,
  isInNetgroup: () => false,
});

const PRECEDENCE: readonly (readonly ClientSpecifier['kind'][])[] = [
  ['host'],
  ['network'],
  ['wildcard', 'numeric'],
  ['netgroup'],
  ['anonymous'],
];

/**
 * The item that holds for a client: by kind (host, network, pattern, netgroup, everybody), within a kind the first one
 * written, as knfsd does it.
 *
 * @param path of the export, as in the table
 * @param clientAddress numeric; `::ffff:a.b.c.d` counts as IPv4
 * @returns undefined if the path is not exported or not to this client
 */
export function matchExport(
  table: ExportTable,
  path: string,
  clientAddress: string,
  names: ClientNames = NO_NAMES,
): ExportClient | undefined {
  const entry = table.entries.find((candidate) => candidate.path === normalizeExportPath(path));
  return entry && matchClient(entry, clientAddress, names);
}

/** As matchExport, for an entry at hand. */
export function matchClient(
  entry: ExportEntry,
  clientAddress: string,
  names: ClientNames = NO_NAMES,
): ExportClient | undefined {
  const address = parseIpAddress(clientAddress);
  if (!address) return undefined;
  const dotted = address.family === 'ipv4' ? address.bytes.join('.') : undefined;
  for (const kinds of PRECEDENCE) {
    const found = entry.clients.find(
      (client) => kinds.includes(client.specifier.kind) && matchesSpecifier(client.specifier, address, dotted, names),
    );
    if (found) return found;
  }
  return undefined;
}

function matchesSpecifier(
  specifier: ClientSpecifier,
  address: IpAddress,
  dotted: string | undefined,
  names: ClientNames,
): boolean {
  switch (specifier.kind) {
    case 'host':
      return names.resolvesTo(specifier.name);
    case 'network':
      return specifier.family === address.family && isInNetwork(address.bytes, specifier.bytes, specifier.prefixLength);
    case 'wildcard':
      return names.confirmed.some((name) => matchesGlob(specifier.pattern, name.slice(0, 255).toLowerCase()));
    case 'numeric':
      return dotted !== undefined && matchesGlob(specifier.pattern, dotted);
    case 'netgroup':
      return names.isInNetgroup(specifier.name);
    case 'anonymous':
      return true;
  }
}

function isInNetwork(address: ArrayLike<number>, network: readonly number[], prefixLength: number): boolean {
  for (let index = 0; index * 8 < prefixLength; index++) {
    const mask = (0xff00 >> Math.min(8, prefixLength - index * 8)) & 0xff;
    if ((address[index]! & mask) !== network[index]) return false;
  }
  return true;
}
