import {
  ConfigError,
  closestWord,
  type Diagnostic,
  DiagnosticList,
  type Position,
  type TextFix,
} from './diagnostic.js';
import { parseIpAddress } from './ip-address.js';
import { Lexer, type Token, typographyHint } from './lexer.js';
import {
  DIGEST_NAMES,
  findLegacySpelling,
  findOption,
  isLegalValue,
  type OptionDefinition,
  type OptionUnit,
  parseNumber,
  type SectionName,
  UNIT_LETTER,
  type WrittenSection,
  writtenNames,
} from './options.js';
import { type ConfigSource, directoryOf, joinPath, MAX_CONFIG_FILE_BYTES } from './source.js';

/** One option as written, under its 8.4 name. */
export interface Setting extends Position {
  readonly name: string;
  /** The text as written (`50M`, `yes`); host names of become-primary-on are joined by blanks; undefined for a flag. */
  readonly value?: string;
  /** For numbers: the value in the option's own unit (see OPTION_CATALOGUE). */
  readonly number?: number;
}

/** The option sections of a scope. Later settings of one name override earlier ones. */
export interface Sections {
  readonly options: readonly Setting[];
  readonly net: readonly Setting[];
  readonly disk: readonly Setting[];
  readonly startup: readonly Setting[];
  readonly handlers: readonly Setting[];
  readonly proxy: readonly Setting[];
  /** The statements of `proxy { plugin { ... } }`, one string each. */
  readonly proxyPlugins: readonly string[];
}

export interface Address {
  readonly family: 'ipv4' | 'ipv6';
  /** Numeric, without brackets; may carry `%zone`. */
  readonly host: string;
  readonly port: number;
}

export interface WrittenDevice {
  /** `/dev/drbd...`; undefined if only `minor N` was written. */
  readonly path?: string;
  readonly minor: number;
}

export type MetaDisk =
  | { readonly kind: 'internal' }
  | { readonly kind: 'flexible'; readonly path: string }
  | { readonly kind: 'indexed'; readonly path: string; readonly index: number };

export interface VolumeConfig extends Position {
  readonly number: number;
  /** Whether device, disk and meta-disk stand directly in the host section, without a volume section. */
  readonly isImplicit: boolean;
  readonly device?: WrittenDevice;
  readonly disk?: string;
  readonly metaDisk?: MetaDisk;
  /** What host sections and volume sections say, the most specific last; not what resource and common say. */
  readonly diskOptions: readonly Setting[];
}

export interface HostConfig extends Position {
  readonly kind: 'on' | 'floating' | 'stacked';
  /** The names behind `on`; for `floating` the address, for `stacked` the hosts are those of the lower resource. */
  readonly names: readonly string[];
  /** For `stacked`: the resource below. */
  readonly lowerResource?: string;
  readonly address?: Address;
  readonly addressPosition?: Position;
  /** Ordered by number; what the resource level says is filled in. */
  readonly volumes: readonly VolumeConfig[];
  readonly options: readonly Setting[];
  readonly proxy?: ProxyConfig;
}

export interface ProxyConfig extends Position {
  readonly names: readonly string[];
  readonly inside?: Address;
  readonly outside?: Address;
}

export interface ResourceConfig extends Position {
  readonly name: string;
  readonly hosts: readonly HostConfig[];
  readonly sections: Sections;
}

/** A configuration as understood: 8.4 spelling, includes followed, nothing inherited yet. Deeply frozen. */
export interface DrbdConfig {
  /** The main file. */
  readonly path: string;
  /** Every file that was read, main file first. */
  readonly files: readonly string[];
  readonly global: readonly Setting[];
  /** Undefined if no `common` section was written. */
  readonly common?: Sections;
  readonly resources: readonly ResourceConfig[];
}

export interface LoadOptions {
  /** A file not yet installed, parsed after the main one and checked against it (`-t FILE`). */
  readonly extraPath?: string;
}

const MAX_INCLUDE_DEPTH = 16;
const MAX_FILES = 1024;
const MAX_TOTAL_BYTES = 16 * 1024 * 1024;
const MAX_VOLUME = 65535;
/** More than any setup has; they bound what a file can make us build, since hosts and volumes multiply. */
const MAX_HOSTS = 32;
const MAX_VOLUMES = 256;
const MAX_SETTINGS = 1000;
const MAX_MINOR = 1048575;

const EXPECTED = {
  top: 'global | common | resource | skip | include',
  resource: 'protocol | on | disk | net | syncer | startup | handlers | ignore-on | stacked-on-top-of',
  host: 'disk | device | address | meta-disk | flexible-meta-disk',
  volume: 'device | disk | meta-disk | flex-meta-disk | }',
  global: 'dialog-refresh | minor-count | disable-ip-verification',
  syncer: 'a syncer option keyword',
  option: 'an option keyword',
  address: 'ssocks | sdp | ipv4 | ipv6 | <ipv4 address> ',
} as const;

/** Words of the grammar itself, which cannot be names without quotes. */
const KEYWORDS: ReadonlySet<string> = new Set([
  'global',
  'common',
  'resource',
  'skip',
  'include',
  'protocol',
  'on',
  'floating',
  'ignore-on',
  'stacked-on-top-of',
  'volume',
  'device',
  'minor',
  'disk',
  'meta-disk',
  'flexible-meta-disk',
  'address',
  'alternate-link-address',
  'internal',
  'net',
  'syncer',
  'startup',
  'handlers',
  'options',
  'proxy',
]);

/** Whether a name must be quoted to be read back as a name. */
export function isKeyword(word: string): boolean {
  return KEYWORDS.has(word);
}

const SECTION_WORDS: ReadonlySet<string> = new Set(['net', 'syncer', 'startup', 'handlers', 'options', 'proxy']);
const COMMAND_LINE_ONLY: ReadonlySet<string> = new Set(['discard-my-data', 'tentative', 'dry-run']);

/** Thrown after a syntax error was recorded: nothing behind it can be trusted. Never leaves this module. */
class SyntaxStop extends Error {}

interface SectionsDraft extends Record<Exclude<SectionName, 'global'>, Setting[]> {
  proxyPlugins: string[];
}

interface VolumeDraft {
  number: number;
  isImplicit: boolean;
  position: Position;
  device?: WrittenDevice;
  disk?: string;
  metaDisk?: MetaDisk;
  diskOptions: Setting[];
  positions: Record<string, Position>;
}

interface HostDraft {
  kind: HostConfig['kind'];
  names: string[];
  position: Position;
  lowerResource?: string;
  address?: Address;
  addressPosition?: Position;
  volumes: Map<number, VolumeDraft>;
  disk: Setting[];
  options: Setting[];
  proxy?: ProxyConfig;
}

interface ResourceDraft {
  name: string;
  /** What keys of once-only things start with: the name, or for a second resource of that name something else. */
  scope: string;
  position: Position;
  volumes: Map<number, VolumeDraft>;
  hosts: HostDraft[];
  sections: SectionsDraft;
  connections: number;
  connectionAddresses: { host: string; address?: Address; port?: number; position: Position }[];
}

const newSections = (): SectionsDraft => ({
  options: [],
  net: [],
  disk: [],
  startup: [],
  handlers: [],
  proxy: [],
  proxyPlugins: [],
});

/**
 * Reads a drbd.conf with everything it includes: the dialects of 8.3 and 8.4, and of version 9 what two nodes need.
 *
 * A syntax error ends the reading; everything else (ranges, conflicts, missing statements) is collected and reported
 * together.
 *
 * @param source how files are reached
 * @param mainPath the file to start with
 * @throws ConfigError with all diagnostics; `exitCode` 20 if the main file cannot be opened, else 10
 */
export function loadConfig(
  source: ConfigSource,
  mainPath: string,
  options: LoadOptions = {},
): { config: DrbdConfig; warnings: readonly Diagnostic[] } {
  const parser = new Parser(source, mainPath);
  const config = parser.load(options.extraPath);
  return { config, warnings: parser.diagnostics.warnings };
}

class Parser {
  readonly diagnostics = new DiagnosticList();
  readonly #seenFiles = new Set<string>();
  readonly #files: string[] = [];
  #totalBytes = 0;
  readonly #claims = new Map<string, Position>();
  readonly #warnedWords = new Set<string>();
  readonly #global: Setting[] = [];
  #common: SectionsDraft | undefined;
  readonly #resources: ResourceDraft[] = [];
  #lexer!: Lexer;

  constructor(
    readonly source: ConfigSource,
    readonly mainPath: string,
  ) {}

  load(extraPath: string | undefined): DrbdConfig {
    const paths = extraPath === undefined ? [this.mainPath] : [this.mainPath, extraPath];
    let resources: ResourceConfig[] = [];
    try {
      for (const path of paths) {
        const text = this.source.read(path);
        if (text === undefined) throw new ConfigError(this.diagnostics.items, 20, `Can not open '${path}'.`);
        this.#parseFile(text, path, path, 0);
      }
      resources = this.#resources.map((resource) => this.#finishResource(resource));
      this.#checkReferences(resources);
    } catch (error) {
      if (!(error instanceof SyntaxStop)) throw error;
    }
    if (this.diagnostics.hasErrors) throw new ConfigError(Object.freeze([...this.diagnostics.items]));
    return deepFreeze({
      path: this.mainPath,
      files: this.#files,
      global: this.#global,
      ...(this.#common === undefined ? {} : { common: this.#common }),
      resources,
    });
  }

  // ---- words and punctuation -------------------------------------------------------------------------------------

  /** Records a syntax error and stops. */
  #fail(token: Token, expected: string, hint?: { hint: string; fix?: TextFix }): never {
    const at = this.#lexer.at(token);
    const got = token.kind === 'end' ? '' : token.text;
    const help = hint ?? typographyHint(token, this.#lexer.path);
    if (token.kind === 'bad') this.diagnostics.error(at, token.problem!);
    else this.diagnostics.error(at, `Parse error: '${expected}' expected,\n\tbut got '${got}'`, help?.hint, help?.fix);
    throw new SyntaxStop();
  }

  #expect(punctuation: string): Token {
    const token = this.#lexer.next();
    if (token.kind !== 'punctuation' || token.text !== punctuation) {
      const hint = this.#valueHint(token);
      this.#fail(token, punctuation, hint);
    }
    return token;
  }

  /** The hint for what often stands unquoted behind a value. */
  #valueHint(token: Token): { hint: string } | undefined {
    if (token.kind === 'other' && token.text === ',') return { hint: 'a value with a comma needs double quotes' };
    return undefined;
  }

  #is(token: Token, punctuation: string): boolean {
    return token.kind === 'punctuation' && token.text === punctuation;
  }

  /** Takes `token` if it is a stray semicolon, with a warning. */
  #skipEmptyStatement(): boolean {
    const token = this.#lexer.peek();
    if (!this.#is(token, ';')) return false;
    this.#lexer.next();
    this.diagnostics.warn(this.#lexer.at(token), 'empty statement: this ";" belongs to nothing', undefined, {
      path: this.#lexer.path,
      startOffset: token.startOffset,
      endOffset: token.endOffset,
      replacement: '',
    });
    return true;
  }

  /** A name: a bare word that is no keyword, or anything in quotes. */
  #name(expected: string): Token {
    const token = this.#lexer.next();
    if (token.kind === 'string' && token.text.length > 0) return token;
    if (token.kind === 'word' && !KEYWORDS.has(token.text)) return token;
    if ((token.kind === 'word' && KEYWORDS.has(token.text)) || token.kind === 'number')
      this.#fail(token, expected, { hint: `put it in double quotes to use it as a name: "${token.text}"` });
    return this.#fail(token, expected);
  }

  /** A value: a word, number, address or quoted string. */
  #value(expected: string): Token {
    const token = this.#lexer.next();
    if (token.kind === 'word' || token.kind === 'number' || token.kind === 'ipv4' || token.kind === 'string')
      return token;
    return this.#fail(token, expected);
  }

  /** A plain decimal number within limits; out of range is recorded, and the smallest legal value returned. */
  #integer(what: string, min: number, max: number): number {
    const token = this.#lexer.next();
    if (!/^[0-9]{1,128}$/.test(token.text) || token.kind === 'string') this.#fail(token, 'a number');
    const value = Math.min(Number(token.text), Number.MAX_SAFE_INTEGER);
    if (value >= min && value <= max) return value;
    this.diagnostics.error(this.#lexer.at(token), `${what} ${token.text} => ${value} out of range [${min}..${max}].`);
    return min;
  }

  /** Stops where a file asks for more of something than anyone needs. */
  #limit(what: string, count: number, most: number, at: Position): void {
    if (count <= most) return;
    this.diagnostics.error(at, `too many ${what}, expected at most ${most}`);
    throw new SyntaxStop();
  }

  /** Registers something that may exist once, and records a conflict with both places if it exists already. */
  #claim(kind: string, key: string, at: Position): boolean {
    const full = `${kind} '${key}'`;
    const first = this.#claims.get(full);
    if (first === undefined) {
      this.#claims.set(full, at);
      return true;
    }
    this.diagnostics.error(at, `conflicting use of ${full} ...\n${first.file}:${first.line}: ${full} first used here.`);
    return false;
  }

  /**
   * The hint for a token in which keyword and value grew together (`rate50M`), as copies from web pages have it: the
   * longest word of the scope that starts the token and leaves a legal value behind.
   */
  #glueHint(
    token: Token,
    statements: Readonly<Record<string, RegExp>>,
    section?: WrittenSection,
  ): { hint: string; fix?: TextFix } | undefined {
    if (token.kind !== 'word') return undefined;
    let best = '';
    const consider = (word: string, isLegal: (rest: string) => boolean): void => {
      if (word.length > best.length && token.text.length > word.length && token.text.startsWith(word))
        if (isLegal(token.text.slice(word.length))) best = word;
    };
    for (const [word, rest] of Object.entries(statements)) consider(word, (value) => rest.test(value));
    const known = section === undefined ? [] : writtenNames(section);
    if (section !== undefined)
      for (const word of known) {
        const definition = definitionOf(section, word);
        if (definition) consider(word, (value) => isLegalValue(definition, value));
      }
    if (best !== '') {
      const split = `${best} ${token.text.slice(best.length)}`;
      const { startOffset, endOffset } = token;
      return {
        hint: `did you mean "${split}"? (missing blank)`,
        fix: { path: this.#lexer.path, startOffset, endOffset, replacement: split },
      };
    }
    if (COMMAND_LINE_ONLY.has(token.text))
      return { hint: `"${token.text}" belongs on the command line, not in a file` };
    const close = closestWord(token.text, [...known, ...Object.keys(statements)]);
    return close === undefined ? undefined : { hint: `did you mean "${close}"?` };
  }

  // ---- files ------------------------------------------------------------------------------------------------------

  #parseFile(text: string, file: string, path: string, depth: number): void {
    const real = this.source.realPath(path);
    if (this.#seenFiles.has(real)) return;
    this.#seenFiles.add(real);
    this.#files.push(path);
    this.#totalBytes += text.length;
    const top: Position = { file, path, line: 1, column: 1 };
    if (text.length > MAX_CONFIG_FILE_BYTES || this.#totalBytes > MAX_TOTAL_BYTES || this.#files.length > MAX_FILES) {
      this.diagnostics.error(
        top,
        `too much configuration, expected at most ${MAX_CONFIG_FILE_BYTES} bytes in a file, ` +
          `${MAX_TOTAL_BYTES} in all, ${MAX_FILES} files`,
      );
      throw new SyntaxStop();
    }
    const outer = this.#lexer;
    this.#lexer = new Lexer(text, file, path);
    if (this.#lexer.hasByteOrderMark)
      this.diagnostics.warn(top, 'the file starts with a byte order mark, expected plain UTF-8', undefined, {
        path,
        startOffset: 0,
        endOffset: 1,
        replacement: '',
      });
    this.#parseTop(depth);
    this.#lexer = outer;
  }

  #parseTop(depth: number): void {
    for (;;) {
      if (this.#skipEmptyStatement()) continue;
      const token = this.#lexer.next();
      if (token.kind === 'end') return;
      const word = token.kind === 'word' ? token.text : '';
      const at = this.#lexer.at(token);
      if (word === 'global') this.#parseGlobal(at);
      else if (word === 'common') this.#parseCommon(at);
      else if (word === 'resource') this.#parseResource();
      else if (word === 'skip') this.#parseSkip();
      else if (word === 'include') this.#parseInclude(depth);
      else this.#fail(token, EXPECTED.top, this.#glueHint(token, TOP_STATEMENTS));
    }
  }

  #parseInclude(depth: number): void {
    const lexer = this.#lexer;
    const token = this.#value('a file name');
    this.#expect(';');
    const at = lexer.at(token);
    if (depth >= MAX_INCLUDE_DEPTH) {
      this.diagnostics.error(at, `includes are nested too deeply, expected at most ${MAX_INCLUDE_DEPTH} levels`);
      return;
    }
    if (token.text.includes('\0')) {
      this.diagnostics.error(at, 'the name of an include file holds a NUL, expected a path');
      return;
    }
    const directory = directoryOf(lexer.path);
    const full = joinPath(directory, token.text);
    const isPattern = /[*?[]/.test(token.text);
    const paths = isPattern ? this.source.glob(full) : [full];
    const prefix = token.text.startsWith('/') || directory === '.' ? '' : joinPath(directory, 'x').slice(0, -1);
    for (const path of paths) {
      const text = this.source.read(path);
      const file = prefix !== '' && path.startsWith(prefix) ? path.slice(prefix.length) : path;
      if (text === undefined) this.diagnostics.error(at, `Failed to open include file '${file}'.`);
      else this.#parseFile(text, file, path, depth + 1);
    }
  }

  /** `skip ... { ... }`: anything with balanced braces. DRBD takes at most one word before the brace, we any number. */
  #parseSkip(): void {
    let depth = 0;
    for (;;) {
      const token = this.#lexer.next();
      if (token.kind === 'end' || token.kind === 'bad') {
        if (token.kind === 'bad') this.#fail(token, '');
        this.diagnostics.error(this.#lexer.at(token), 'reached eof while parsing this skip block.');
        throw new SyntaxStop();
      }
      if (this.#is(token, '{')) depth++;
      else if (this.#is(token, '}') && --depth <= 0) {
        if (depth < 0) this.#fail(token, '{');
        return;
      }
    }
  }

  // ---- sections of options ----------------------------------------------------------------------------------------

  #parseGlobal(at: Position): void {
    this.#claim('global section', 'global', at);
    if (this.#resources.length > 0)
      this.diagnostics.warn(at, 'You should put the global {} section\n\tin front of any resource {} section');
    this.#expect('{');
    this.#parseOptions('global', (_, setting) => this.#global.push(setting));
    this.#warnDuplicates(this.#global);
  }

  /** Reads `{ options }` of one section (the brace is next) into the 8.4 sections the words belong to. */
  #parseSection(section: WrittenSection, into: SectionsDraft, scope: string, at: Position): void {
    this.#claim(`${section} section`, `${scope}:${section}`, at);
    this.#expect('{');
    this.#parseOptions(
      section,
      (target, setting) => {
        if (target !== 'global') into[target].push(setting);
      },
      into,
    );
  }

  /** The options of a section whose opening brace was taken, up to and including the closing one. */
  #parseOptions(
    section: WrittenSection,
    emit: (section: SectionName, setting: Setting) => void,
    sections?: SectionsDraft,
  ): void {
    const expected = section === 'global' ? EXPECTED.global : section === 'syncer' ? EXPECTED.syncer : EXPECTED.option;
    for (let count = 0; ; count++) {
      const token = this.#lexer.peek();
      this.#limit('statements in one section', count, MAX_SETTINGS, this.#lexer.at(token));
      if (this.#is(token, ';')) {
        this.#skipEmptyStatement();
        continue;
      }
      this.#lexer.next();
      if (this.#is(token, '}')) return;
      if (token.kind === 'word' && section === 'proxy' && token.text === 'plugin' && sections) {
        this.#parseProxyPlugins(sections.proxyPlugins);
        continue;
      }
      if (token.kind !== 'word') this.#fail(token, expected);
      const legacy = findLegacySpelling(section, token.text);
      if (legacy && legacy.name === undefined) {
        this.#value('a value');
        this.#expect(';');
        this.#warnOnce(token, `"${token.text}" has had no effect since DRBD 8.4 and is left out`);
        continue;
      }
      const definition = definitionOf(section, token.text);
      if (!definition) this.#fail(token, expected, this.#glueHint(token, {}, section));
      if (definition.treatment === 'ignore') this.#skipForeignOption(token);
      else {
        const setting = this.#parseSetting(definition, token, legacy?.value !== undefined);
        this.#noteIfWithoutEffect(definition, token, setting);
        emit(definition.section, setting);
      }
    }
  }

  #warnOnce(token: Token, message: string): void {
    if (this.#warnedWords.has(token.text)) return;
    this.#warnedWords.add(token.text);
    this.diagnostics.warn(this.#lexer.at(token), message);
  }

  /** Says once of a net or disk option that it is kept but does nothing, if it asks for anything but the default. */
  #noteIfWithoutEffect(definition: OptionDefinition, token: Token, setting: Setting): void {
    const { section, type, treatment, name } = definition;
    if (treatment !== 'note' || (section !== 'net' && section !== 'disk')) return;
    const isDefault =
      type.kind === 'boolean'
        ? setting.value === (type.default ? 'yes' : 'no')
        : type.kind === 'number' && setting.number === type.default;
    if (!isDefault) this.#warnOnce(token, `${name} is kept and shown by dump, but has no effect in drbdts`);
  }

  #skipForeignOption(token: Token): void {
    while (!this.#is(this.#lexer.peek(), ';')) this.#value(';');
    this.#expect(';');
    this.#warnOnce(token, `"${token.text}" is an option of DRBD 9; drbdts reads it and does nothing with it`);
  }

  #parseProxyPlugins(into: string[]): void {
    this.#expect('{');
    while (!this.#is(this.#lexer.peek(), '}')) {
      this.#limit('plugin statements', into.length + 1, MAX_SETTINGS, this.#lexer.at(this.#lexer.peek()));
      const statement = [];
      while (!this.#is(this.#lexer.peek(), ';')) statement.push(this.#value('a plugin option').text);
      this.#expect(';');
      into.push(statement.join(' '));
    }
    this.#expect('}');
  }

  /** The value of an option whose name was taken, and its semicolon. */
  #parseSetting(definition: OptionDefinition, nameToken: Token, isNegated: boolean): Setting {
    const { type, name } = definition;
    const at = this.#lexer.at(nameToken);
    if (type.kind === 'flag') {
      this.#expect(';');
      return { ...at, name };
    }
    if (type.kind === 'boolean') {
      const token = this.#lexer.next();
      const isBare = this.#is(token, ';');
      if (!isBare && !(token.kind === 'word' && (token.text === 'yes' || token.text === 'no')))
        this.#fail(token, 'yes | no | ;');
      if (!isBare) this.#expect(';');
      const isYes = (isBare || token.text === 'yes') !== isNegated;
      return { ...at, name, value: isYes ? 'yes' : 'no' };
    }
    if (type.kind === 'hosts') {
      const hosts = [this.#value('a host name').text];
      while (!this.#is(this.#lexer.peek(), ';')) hosts.push(this.#value('a host name or ;').text);
      this.#expect(';');
      return { ...at, name, value: hosts.join(' ') };
    }
    const token = this.#value('a value');
    this.#expect(';');
    return this.#checkValue(definition, at, token);
  }

  #checkValue(definition: OptionDefinition, at: Position, token: Token): Setting {
    const { name, type } = definition;
    const value = token.text;
    if (type.kind === 'number') {
      const parsed = parseNumber(value, type.unit);
      if (parsed === undefined) {
        const isTera = /^[0-9]+T$/i.test(value);
        this.diagnostics.error(
          at,
          `${name}: ${value} is not a valid number, expected digits and at most one of s K M G behind them`,
          isTera ? `T is not a unit here; write ${Number(value.slice(0, -1)) * 1024}G` : undefined,
        );
        return { ...at, name, value };
      }
      if (parsed < type.min || parsed > type.max) {
        const letter = UNIT_LETTER[type.unit];
        this.diagnostics.error(
          at,
          `${name} ${value} => ${parsed}${letter} out of range [${type.min}..${type.max}]${letter}.`,
          unitHint(name, type.unit, value),
        );
      }
      return { ...at, name, value, number: parsed };
    }
    if (name === 'usage-count' && !isLegalValue(definition, value)) this.#fail(token, 'yes | no | ask');
    if (name === 'protocol') {
      const letter = value.toUpperCase();
      if (!['A', 'B', 'C'].includes(letter))
        this.diagnostics.error(at, `unknown protocol '${value}', should be one of A,B,C`);
      return { ...at, name, value: letter };
    }
    if (type.kind === 'enum' && !isLegalValue(definition, value)) {
      const close = closestWord(value, type.words);
      const prefixed = type.prefix === undefined ? '' : ` | ${type.prefix}NAME`;
      this.diagnostics.error(
        at,
        `${name}: unknown word '${value}', expected '${type.words.join(' | ')}${prefixed}'`,
        close === undefined ? undefined : `did you mean "${close}"?`,
      );
    } else if (type.kind === 'digest') {
      const known = name === 'cram-hmac-alg' ? DIGEST_NAMES.filter((digest) => digest !== 'crc32c') : DIGEST_NAMES;
      if (!known.includes(value.toLowerCase()))
        this.diagnostics.error(at, `${name}: unknown digest '${value}', expected '${known.join(' | ')}'`);
    } else if (type.kind === 'cpu-mask' && !/^[0-9a-fA-F,]*$/.test(value)) {
      this.diagnostics.error(at, `${name}: '${value}' is no mask, expected hexadecimal digits`);
    } else if (type.kind === 'string' && Buffer.byteLength(value) > type.maxLength) {
      this.diagnostics.error(
        at,
        `${name} is ${Buffer.byteLength(value)} bytes long, expected at most ${type.maxLength}`,
      );
    } else if (type.kind === 'resource' && !/^[^/]+(?:\/[0-9]{1,5})?$/.test(value)) {
      this.diagnostics.error(at, `${name}: '${value}' names no resource, expected RESOURCE or RESOURCE/VOLUME`);
    }
    return { ...at, name, value };
  }

  /** DRBD passes both and takes the last one in `net`, the first one in `disk`; here the last one always wins. */
  #warnDuplicates(settings: readonly Setting[]): void {
    // Behind an error they are noise: a section that was written twice repeats its options too.
    if (this.diagnostics.hasErrors) return;
    const last = new Map<string, Setting>();
    for (const setting of settings) {
      const earlier = last.get(setting.name);
      if (earlier)
        this.diagnostics.warn(
          setting,
          `${setting.name} is set a second time (first in line ${earlier.line}), the last one wins`,
        );
      last.set(setting.name, setting);
    }
  }

  #finishSections(sections: SectionsDraft): void {
    for (const name of ['options', 'net', 'disk', 'startup', 'handlers', 'proxy'] as const)
      this.#warnDuplicates(sections[name]);
  }

  /** `protocol X;` where 8.3 wrote it, directly in common or a resource. */
  #parseProtocolStatement(sections: SectionsDraft, keyword: Token): void {
    sections.net.push(this.#parseSetting(findOption('net', 'protocol')!, keyword, false));
  }

  #parseCommon(at: Position): void {
    this.#claim('resource section', 'common', at);
    const sections = newSections();
    this.#expect('{');
    for (;;) {
      if (this.#skipEmptyStatement()) continue;
      const token = this.#lexer.next();
      if (this.#is(token, '}')) break;
      const word = token.kind === 'word' ? token.text : '';
      const position = this.#lexer.at(token);
      if (word === 'disk' || SECTION_WORDS.has(word))
        this.#parseSection(word as WrittenSection, sections, 'common', position);
      else if (word === 'protocol') this.#parseProtocolStatement(sections, token);
      else if (word === 'on' || word === 'floating' || word === 'stacked-on-top-of') {
        this.diagnostics.error(position, 'in the common section, there are no host sections allowed.');
        this.#parseSkip();
      } else this.#fail(token, EXPECTED.resource, this.#glueHint(token, COMMON_STATEMENTS));
    }
    this.#finishSections(sections);
    this.#common ??= sections;
  }

  // ---- resources --------------------------------------------------------------------------------------------------

  #parseResource(): void {
    const nameToken = this.#name('a resource name');
    const position = this.#lexer.at(nameToken);
    const isFirst = this.#claim('resource section', nameToken.text, position);
    const resource: ResourceDraft = {
      name: nameToken.text,
      scope: isFirst ? nameToken.text : `${nameToken.text} of line ${position.line}`,
      position,
      volumes: new Map(),
      hosts: [],
      sections: newSections(),
      connections: 0,
      connectionAddresses: [],
    };
    if (/[/\p{Cc}]/u.test(resource.name) || resource.name === 'all')
      this.diagnostics.error(
        position,
        `'${resource.name}' cannot name a resource, expected a name without "/" that is not "all"`,
      );
    this.#expect('{');
    if (isFirst) this.#resources.push(resource);
    for (;;) {
      if (this.#skipEmptyStatement()) continue;
      const token = this.#lexer.next();
      if (this.#is(token, '}')) break;
      if (token.kind === 'end') {
        this.diagnostics.warn(
          this.#lexer.at(token),
          `the file ends inside resource ${resource.name}, expected '}' for the brace opened in line ${position.line}`,
        );
        break;
      }
      this.#parseResourceItem(resource, token);
    }
    this.#finishSections(resource.sections);
  }

  #parseResourceItem(resource: ResourceDraft, token: Token): void {
    const word = token.kind === 'word' ? token.text : '';
    const at = this.#lexer.at(token);
    if (SECTION_WORDS.has(word)) this.#parseSection(word as WrittenSection, resource.sections, resource.scope, at);
    else if (word === 'disk' && this.#is(this.#lexer.peek(), '{'))
      this.#parseSection('disk', resource.sections, resource.scope, at);
    else if (word === 'protocol') this.#parseProtocolStatement(resource.sections, token);
    else if (word === 'on') this.#parseOn(resource, at);
    else if (word === 'floating') this.#parseFloating(resource, at);
    else if (word === 'stacked-on-top-of') this.#parseStacked(resource, at);
    else if (word === 'ignore-on') {
      this.#value('a host name');
      this.#expect(';');
      this.diagnostics.warn(at, `in resource ${resource.name}, WARN: The 'ignore-on' keyword is deprecated.`);
    } else if (word === 'volume') this.#parseVolume(resource.volumes, resource.scope, at);
    else if (VOLUME_WORDS.has(word))
      this.#parseVolumeStatement(this.#implicitVolume(resource.volumes, at), token, resource.scope);
    else if (word === 'connection-mesh' || word === 'connection') this.#parseConnection(resource, word, at);
    else this.#fail(token, EXPECTED.resource, this.#glueHint(token, RESOURCE_STATEMENTS));
  }

  #newHost(resource: ResourceDraft, kind: HostConfig['kind'], names: string[], position: Position): HostDraft {
    const host: HostDraft = { kind, names, position, volumes: new Map(), disk: [], options: [] };
    resource.hosts.push(host);
    this.#limit('hosts', resource.hosts.length, MAX_HOSTS, position);
    this.#limit('names of one host', names.length, MAX_HOSTS, position);
    for (const name of names) this.#claim('host section', `${resource.scope}: on ${name}`, position);
    return host;
  }

  #parseOn(resource: ResourceDraft, at: Position): void {
    const names = [this.#name('a host name').text];
    while (!this.#is(this.#lexer.peek(), '{')) names.push(this.#name('a host name | {').text);
    const host = this.#newHost(resource, 'on', names, at);
    this.#parseHostBlock(resource, host);
  }

  #parseFloating(resource: ResourceDraft, at: Position): void {
    const address = this.#parseEndpoint();
    const host = this.#newHost(resource, 'floating', [addressText(address)], at);
    host.address = address;
    host.addressPosition = at;
    if (this.#is(this.#lexer.peek(), ';')) this.#lexer.next();
    else this.#parseHostBlock(resource, host);
  }

  #parseStacked(resource: ResourceDraft, at: Position): void {
    const lower = this.#name('a resource name');
    const host = this.#newHost(resource, 'stacked', [`stacked-on-top-of ${lower.text}`], at);
    host.lowerResource = lower.text;
    this.#parseHostBlock(resource, host);
  }

  #parseHostBlock(resource: ResourceDraft, host: HostDraft): void {
    const scope = `${resource.scope}:${host.names[0]}`;
    this.#expect('{');
    for (;;) {
      if (this.#skipEmptyStatement()) continue;
      const token = this.#lexer.next();
      if (this.#is(token, '}')) break;
      const word = token.kind === 'word' ? token.text : '';
      const at = this.#lexer.at(token);
      if (word === 'address') {
        this.#claim('address statement', `${scope}:address`, at);
        host.address = this.#parseEndpoint();
        host.addressPosition = at;
        this.#expect(';');
      } else if (word === 'alternate-link-address') {
        this.#parseEndpoint();
        this.#expect(';');
        this.diagnostics.warn(at, 'alternate-link-address has no effect');
      } else if (word === 'options') {
        const sections = newSections();
        this.#parseSection('options', sections, scope, at);
        host.options.push(...sections.options);
      } else if (word === 'disk' && this.#is(this.#lexer.peek(), '{')) {
        const sections = newSections();
        this.#parseSection('disk', sections, scope, at);
        host.disk.push(...sections.disk);
      } else if (word === 'proxy') this.#parseHostProxy(host, scope, at);
      else if (word === 'node-id') {
        this.#integer('node-id', 0, 31);
        this.#expect(';');
        this.#warnOnce(token, '"node-id" is a statement of DRBD 9; drbdts reads it and does nothing with it');
      } else if (word === 'volume') this.#parseVolume(host.volumes, scope, at);
      else if (VOLUME_WORDS.has(word)) this.#parseVolumeStatement(this.#implicitVolume(host.volumes, at), token, scope);
      else this.#fail(token, EXPECTED.host, this.#glueHint(token, HOST_STATEMENTS));
    }
    this.#warnDuplicates(host.disk);
    this.#warnDuplicates(host.options);
  }

  #parseHostProxy(host: HostDraft, scope: string, at: Position): void {
    this.#claim('proxy section', `${scope}:proxy`, at);
    const on = this.#lexer.next();
    if (on.text !== 'on') this.#fail(on, 'on');
    const names = [this.#name('a host name').text];
    while (!this.#is(this.#lexer.peek(), '{')) names.push(this.#name('a host name | {').text);
    this.#expect('{');
    const proxy: { inside?: Address; outside?: Address } = {};
    for (let token = this.#lexer.next(); !this.#is(token, '}'); token = this.#lexer.next()) {
      if (token.text === 'options' && token.kind === 'word') {
        this.#parseSection('proxy', newSections(), scope, this.#lexer.at(token));
        continue;
      }
      if (token.kind !== 'word' || (token.text !== 'inside' && token.text !== 'outside'))
        this.#fail(token, 'inside | outside');
      proxy[token.text as 'inside' | 'outside'] = this.#parseEndpoint();
      this.#expect(';');
    }
    host.proxy = { ...at, names, ...proxy };
  }

  /** An endpoint: `[ipv4|ipv6] ADDRESS:PORT`, numeric only. */
  #parseEndpoint(): Address {
    let token = this.#lexer.next();
    const at = this.#lexer.at(token);
    const family = token.kind === 'word' ? token.text : '';
    if (family === 'ssocks' || family === 'sdp' || family === 'sci')
      this.diagnostics.error(at, `the ${family} transport is not available in userspace, expected ipv4 or ipv6`);
    if (['ipv4', 'ipv6', 'ssocks', 'sdp', 'sci'].includes(family)) token = this.#lexer.next();
    let host = token.text;
    if (this.#is(token, '[')) {
      const bracketed = this.#lexer.takeBracketed();
      if (family !== 'ipv6' || bracketed === undefined)
        this.#fail(token, EXPECTED.address, { hint: 'an IPv6 address is written ipv6 [fd00::1]:7788' });
      host = bracketed;
    } else if (token.kind !== 'ipv4' || family === 'ipv6') {
      const hint =
        family === 'ipv6'
          ? 'an IPv6 address stands in brackets: ipv6 [fd00::1]:7788'
          : token.kind === 'word'
            ? 'host names are not resolved here; write the numeric address'
            : undefined;
      this.#fail(token, family === 'ipv6' ? '[' : EXPECTED.address, hint === undefined ? undefined : { hint });
    }
    const parsed = parseIpAddress(host);
    if (!parsed)
      this.diagnostics.error(
        this.#lexer.at(token),
        `'${host}' is not an address, expected for example 10.0.0.1 or [fd00::1]`,
      );
    this.#expect(':');
    const port = this.#integer('port', 1, 65535);
    return { family: family === 'ipv6' ? 'ipv6' : 'ipv4', host, port };
  }

  #implicitVolume(volumes: Map<number, VolumeDraft>, at: Position): VolumeDraft {
    let volume = volumes.get(0);
    if (!volume) {
      volume = { number: 0, isImplicit: true, position: at, diskOptions: [], positions: {} };
      if (volumes.size > 0) this.diagnostics.error(at, 'mixing explicit and implicit volumes is not allowed');
      volumes.set(0, volume);
    } else if (!volume.isImplicit) this.diagnostics.error(at, 'mixing explicit and implicit volumes is not allowed');
    return volume;
  }

  #parseVolume(volumes: Map<number, VolumeDraft>, scope: string, at: Position): void {
    const number = this.#integer('volume', 0, MAX_VOLUME);
    this.#claim('volume section', `${scope}:volume ${number}`, at);
    // Either there is one implicit volume or all are explicit; any of them tells which.
    if (volumes.values().next().value?.isImplicit === true)
      this.diagnostics.error(at, 'mixing explicit and implicit volumes is not allowed');
    const volume: VolumeDraft = { number, isImplicit: false, position: at, diskOptions: [], positions: {} };
    volumes.set(number, volume);
    this.#limit('volumes', volumes.size, MAX_VOLUMES, at);
    this.#expect('{');
    for (;;) {
      if (this.#skipEmptyStatement()) continue;
      const token = this.#lexer.next();
      if (this.#is(token, '}')) break;
      const word = token.kind === 'word' ? token.text : '';
      if (word === 'disk' && this.#is(this.#lexer.peek(), '{')) {
        const sections = newSections();
        this.#parseSection('disk', sections, `${scope}/${number}`, this.#lexer.at(token));
        volume.diskOptions.push(...sections.disk);
      } else if (VOLUME_WORDS.has(word)) this.#parseVolumeStatement(volume, token, `${scope}/${number}`);
      else this.#fail(token, EXPECTED.volume, this.#glueHint(token, VOLUME_STATEMENTS));
    }
    this.#warnDuplicates(volume.diskOptions);
  }

  #parseVolumeStatement(volume: VolumeDraft, keyword: Token, scope: string): void {
    const at = this.#lexer.at(keyword);
    const kind = keyword.text === 'flexible-meta-disk' ? 'meta-disk' : keyword.text;
    this.#claim(`${kind} statement`, `${scope}:${kind}`, at);
    volume.positions[kind] = at;
    if (kind === 'device') {
      const device = this.#parseDevice(at);
      if (device) volume.device = device;
    } else if (kind === 'disk') {
      volume.disk = this.#diskPath('a backing device | {').text;
      this.#expect(';');
    } else this.#parseMetaDisk(volume, keyword.text === 'meta-disk');
  }

  #diskPath(expected: string): Token {
    const token = this.#value(expected);
    if (token.text === '' || token.text.includes('\0')) this.#fail(token, expected);
    return token;
  }

  #parseMetaDisk(volume: VolumeDraft, mayHaveIndex: boolean): void {
    const path = this.#diskPath('internal | a device').text;
    if (path === 'internal') volume.metaDisk = { kind: 'internal' };
    else if (mayHaveIndex && this.#is(this.#lexer.peek(), '[')) {
      this.#lexer.next();
      // 128 MiB slots; the bound keeps every offset of a slot a safe integer with room to spare.
      const index = this.#integer('meta-disk index', 0, 65535);
      this.#expect(']');
      volume.metaDisk = { kind: 'indexed', path, index };
    } else volume.metaDisk = { kind: 'flexible', path };
    this.#expect(';');
  }

  /** `device NAME [minor N];` or `device minor N;`. Undefined (with an error recorded) if no minor can be found. */
  #parseDevice(at: Position): WrittenDevice | undefined {
    const token = this.#value('a device name | minor');
    if (token.kind === 'word' && token.text === 'minor') {
      const minor = this.#integer('minor', 0, MAX_MINOR);
      this.#expect(';');
      return { minor };
    }
    let path = token.text;
    let minor: number | undefined;
    const next = this.#lexer.next();
    if (next.kind === 'word' && next.text === 'minor') {
      minor = this.#integer('minor', 0, MAX_MINOR);
      this.#expect(';');
    } else if (!this.#is(next, ';')) this.#fail(next, 'minor | ;');
    if (path.startsWith('drbd')) path = `/dev/${path}`;
    if (!path.startsWith('/dev/drbd'))
      this.diagnostics.error(at, 'device name must start with /dev/drbd\n\t(/dev/ is optional, but drbd is required)');
    const fromName = /^\/dev\/drbd([0-9]{1,7})$/.exec(path);
    const named = fromName ? Number(fromName[1]) : undefined;
    if (named !== undefined && named > MAX_MINOR) {
      this.diagnostics.error(at, `minor ${named} => ${named} out of range [0..${MAX_MINOR}].`);
      return undefined;
    }
    if (minor === undefined && named === undefined) {
      this.diagnostics.error(at, 'no minor given nor device name contains a minor number');
      return undefined;
    }
    if (minor !== undefined && named !== minor) {
      if (!path.startsWith('/dev/drbd_')) {
        this.diagnostics.error(
          at,
          `explicit minor number must match with device name\n\tTry "device /dev/drbd${minor} minor ${minor};",\n` +
            '\tor leave off either device name or explicit minor.\n' +
            '\tArbitrary device names must start with /dev/drbd_\n' +
            "\tmind the '_'! (/dev/ is optional, but drbd_ is required)",
        );
        return undefined;
      }
      this.diagnostics.warn(at, `${path} is kept as a name only, expected users to open /dev/drbd${minor}`);
    }
    return { path, minor: (minor ?? named)! };
  }

  /** `connection-mesh` and `connection` of version 9, as far as two nodes need them. */
  #parseConnection(resource: ResourceDraft, word: string, at: Position): void {
    if (word === 'connection' && !this.#is(this.#lexer.peek(), '{')) this.#name('a connection name | {');
    if (++resource.connections > 1)
      this.diagnostics.error(
        at,
        `resource ${resource.name} has a second connection, expected one: drbdts pairs two nodes`,
      );
    this.#parseConnectionBlock(resource, `${resource.scope}:${word} ${resource.connections}`, 0);
  }

  #parseConnectionBlock(resource: ResourceDraft, scope: string, depth: number): void {
    this.#expect('{');
    for (;;) {
      if (this.#skipEmptyStatement()) continue;
      const token = this.#lexer.next();
      if (this.#is(token, '}')) return;
      const word = token.kind === 'word' ? token.text : '';
      const at = this.#lexer.at(token);
      if (word === 'net') this.#parseSection('net', resource.sections, scope, at);
      else if (word === 'hosts') {
        while (!this.#is(this.#lexer.peek(), ';'))
          resource.connectionAddresses.push({ host: this.#name('a host name').text, position: at });
        this.#expect(';');
      } else if (word === 'host') this.#parseConnectionHost(resource, at);
      else if (word === 'path' && depth === 0) this.#parseConnectionBlock(resource, `${scope}:path`, 1);
      else this.#fail(token, 'host | hosts | net | path');
    }
  }

  #parseConnectionHost(resource: ResourceDraft, position: Position): void {
    const host = this.#name('a host name').text;
    const entry: ResourceDraft['connectionAddresses'][number] = { host, position };
    for (let token = this.#lexer.next(); !this.#is(token, ';'); token = this.#lexer.next()) {
      if (token.kind === 'word' && token.text === 'address') entry.address = this.#parseEndpoint();
      else if (token.kind === 'word' && token.text === 'port') entry.port = this.#integer('port', 1, 65535);
      else this.#fail(token, 'address | port | ;');
    }
    resource.connectionAddresses.push(entry);
  }

  // ---- after the reading ------------------------------------------------------------------------------------------

  #finishResource(resource: ResourceDraft): ResourceConfig {
    this.#applyConnection(resource);
    const hosts = resource.hosts.map((host) => this.#finishHost(resource, host));
    for (const host of hosts) {
      const other = hosts.find((candidate) => candidate !== host && candidate.kind !== 'stacked');
      if (!other || host.kind === 'stacked') continue;
      for (const volume of host.volumes) {
        const peer = other.volumes.find((candidate) => candidate.number === volume.number);
        if (!peer)
          this.diagnostics.error(
            host,
            `in resource ${resource.name}, on ${host.names[0]} { ... }: ` +
              `volume ${volume.number} not defined on ${other.names[0]}`,
          );
        else if (peer.isImplicit !== volume.isImplicit && hosts.indexOf(host) < hosts.indexOf(other))
          this.diagnostics.error(
            host,
            `in resource ${resource.name}, on ${host.names[0]} resp. ${other.names[0]}: ` +
              `volume ${volume.number} must not be implicit on one but not the other`,
          );
      }
    }
    return { ...resource.position, name: resource.name, hosts, sections: resource.sections };
  }

  #applyConnection(resource: ResourceDraft): void {
    for (const entry of resource.connectionAddresses) {
      const host = resource.hosts.find((candidate) => candidate.names.includes(entry.host));
      if (!host) {
        const known = resource.hosts.map((candidate) => candidate.names[0]).join(', ');
        this.diagnostics.error(entry.position, `connection names host '${entry.host}', expected one of: ${known}`);
        continue;
      }
      if (entry.address) host.address = entry.address;
      else if (entry.port !== undefined && host.address) host.address = { ...host.address, port: entry.port };
      if (entry.address) host.addressPosition = entry.position;
    }
  }

  #finishHost(resource: ResourceDraft, host: HostDraft): HostConfig {
    const where = `in resource ${resource.name}, ${host.kind === 'on' ? 'on ' : ''}${host.names.join(' ')} { ... }`;
    if (!host.address) this.diagnostics.error(host.position, `${where}: 'address' keyword missing.`);
    else if (host.kind !== 'stacked' || host.address)
      this.#claim('IP', `${addressText(host.address)}`, host.addressPosition ?? host.position);
    const volumes = this.#mergeVolumes(resource, host).map((volume) => this.#finishVolume(host, volume, where));
    if (volumes.length === 0 && !this.diagnostics.hasErrors)
      this.diagnostics.warn(host.position, `${where}: no volume, expected device, disk and meta-disk`);
    return {
      ...host.position,
      kind: host.kind,
      names: host.names,
      ...(host.lowerResource === undefined ? {} : { lowerResource: host.lowerResource }),
      ...(host.address === undefined ? {} : { address: host.address }),
      ...(host.addressPosition === undefined ? {} : { addressPosition: host.addressPosition }),
      volumes,
      options: host.options,
      ...(host.proxy === undefined ? {} : { proxy: host.proxy }),
    };
  }

  /** A host's volumes with what the resource level says about the same volume filled in, ordered by number. */
  #mergeVolumes(resource: ResourceDraft, host: HostDraft): VolumeDraft[] {
    const numbers = [...new Set([...resource.volumes.keys(), ...host.volumes.keys()])].sort(
      (left, right) => left - right,
    );
    return numbers.map((number) => {
      const outer = resource.volumes.get(number);
      const inner = host.volumes.get(number);
      if (outer && inner && outer.isImplicit !== inner.isImplicit)
        this.diagnostics.error(inner.position, 'mixing explicit and implicit volumes is not allowed');
      const volume = (inner ?? outer)!;
      const merged: VolumeDraft = {
        ...outer,
        ...inner,
        number,
        isImplicit: volume.isImplicit,
        position: inner?.position ?? host.position,
        positions: { ...outer?.positions, ...inner?.positions },
        diskOptions: overrideSettings(overrideSettings(outer?.diskOptions ?? [], host.disk), inner?.diskOptions ?? []),
      };
      return merged;
    });
  }

  #finishVolume(host: HostDraft, volume: VolumeDraft, where: string): VolumeConfig {
    const { positions } = volume;
    const missing = (keyword: string): void =>
      this.diagnostics.error(host.position, `${where}: '${keyword}' keyword missing.`);
    if (host.kind === 'stacked') {
      // The upper device sits on the lower one and keeps its metadata there.
      volume.metaDisk ??= { kind: 'internal' };
    } else if (!volume.disk) missing('disk');
    if (!volume.device && !positions['device']) missing('device');
    if (!volume.metaDisk) missing('meta-disk');
    for (const name of host.kind === 'stacked' ? [] : host.names) {
      const owner = host.kind === 'floating' ? `floating ${name}` : name;
      if (volume.device)
        this.#claim('device-minor', `device-minor:${owner}:${volume.device.minor}`, positions['device']!);
      if (volume.disk !== undefined) this.#claim('disk', `disk:${owner}:${volume.disk}`, positions['disk']!);
      if (volume.metaDisk && volume.metaDisk.kind !== 'internal') {
        const slot = volume.metaDisk.kind === 'indexed' ? `[${volume.metaDisk.index}]` : '';
        this.#claim('meta-disk', `${owner}:${volume.metaDisk.path}${slot}`, positions['meta-disk']!);
      }
    }
    return {
      ...volume.position,
      number: volume.number,
      isImplicit: volume.isImplicit,
      ...(volume.device === undefined ? {} : { device: volume.device }),
      ...(volume.disk === undefined ? {} : { disk: volume.disk }),
      ...(volume.metaDisk === undefined ? {} : { metaDisk: volume.metaDisk }),
      diskOptions: volume.diskOptions,
    };
  }

  /** What only holds between sections: names that must exist, options that need or exclude each other. */
  #checkReferences(resources: readonly ResourceConfig[]): void {
    const byName = new Map(resources.map((resource) => [resource.name, resource]));
    for (const resource of resources) {
      for (const host of resource.hosts)
        if (host.lowerResource !== undefined && !byName.has(host.lowerResource))
          this.diagnostics.error(
            host,
            `in resource ${resource.name}, referenced resource '${host.lowerResource}' not defined.`,
          );
      this.#checkBecomePrimary(resource);
      this.#checkSplitBrainNode(resource);
      this.#checkNet(resource);
      for (const setting of [
        ...resource.sections.disk,
        ...resource.hosts.flatMap((host) => host.volumes.flatMap((volume) => volume.diskOptions)),
      ]) {
        if (setting.name !== 'resync-after' || setting.value === undefined) continue;
        const [name, volume] = setting.value.split('/');
        const target = byName.get(name!);
        const isKnown = target?.hosts.some((host) =>
          host.volumes.some((candidate) => volume === undefined || candidate.number === Number(volume)),
        );
        if (!isKnown)
          this.diagnostics.error(
            setting,
            `in resource ${resource.name}:\n` +
              `\tresource '${setting.value}' mentioned in 'resync-after' option is not known.`,
          );
      }
    }
  }

  #effective(resource: ResourceConfig, section: Exclude<SectionName, 'global'>, name: string): Setting | undefined {
    const matches = (setting: Setting): boolean => setting.name === name;
    return resource.sections[section].findLast(matches) ?? this.#common?.[section].findLast(matches);
  }

  #checkBecomePrimary(resource: ResourceConfig): void {
    const setting = this.#effective(resource, 'startup', 'become-primary-on');
    if (!setting) return;
    const names = setting.value!.split(' ');
    if (names.includes('both')) {
      if (this.#effective(resource, 'net', 'allow-two-primaries')?.value !== 'yes')
        this.diagnostics.error(
          setting,
          `in resource ${resource.name}:\n\tbecome-primary-on is set to both, but allow-two-primaries is not set.`,
        );
      return;
    }
    const hosts = new Set(resource.hosts.flatMap((host) => host.names));
    for (const name of names)
      if (!hosts.has(name) && resource.hosts.some((host) => host.kind === 'on'))
        this.diagnostics.error(
          setting,
          `in resource ${resource.name}:\n` +
            `\tbecome-primary-on contains '${name}', which is not named with the 'on' sections.`,
        );
  }

  #checkSplitBrainNode(resource: ResourceConfig): void {
    const setting = this.#effective(resource, 'net', 'after-sb-0pri');
    const prefix = 'discard-node-';
    if (!setting?.value?.startsWith(prefix)) return;
    const name = setting.value.slice(prefix.length);
    if (!resource.hosts.some((host) => host.names.includes(name)))
      this.diagnostics.error(
        setting,
        `in resource ${resource.name}:\n\tafter-sb-0pri names '${name}', expected a host of the resource`,
      );
  }

  /** Combinations that DRBD refuses when the resource starts; warned about here, refused by resolveResource. */
  #checkNet(resource: ResourceConfig): void {
    if (this.diagnostics.hasErrors) return;
    for (const problem of netProblems((section, name) => this.#effective(resource, section, name)))
      this.diagnostics.warn(problem.setting, `in resource ${resource.name}:\n\t${problem.message}`);
    const net = (name: string): Setting | undefined => this.#effective(resource, 'net', name);
    for (const name of ['after-sb-1pri', 'after-sb-2pri', 'rr-conflict']) {
      const setting = net(name);
      if (setting?.value?.startsWith('violently'))
        this.diagnostics.warn(
          setting,
          `in resource ${resource.name}:\n\t${name} ${setting.value} changes data under a mounted filesystem`,
        );
    }
    const timeout = net('timeout');
    if (timeout?.number !== undefined)
      for (const other of ['connect-int', 'ping-int']) {
        const seconds = net(other)?.number ?? 10;
        if (timeout.number >= seconds * 10)
          this.diagnostics.warn(
            timeout,
            `in resource ${resource.name}:\n` +
              `\ttimeout ${timeout.number} (0.1 s) is not shorter than ${other} ${seconds} (s)`,
          );
      }
  }
}

/**
 * What DRBD 8.4 refuses to start: two primaries or stonith fencing without the protocol for it (errors 139 and 154),
 * congestion policies without protocol A (155).
 */
export function netProblems(
  effective: (section: 'net' | 'disk', name: string) => Setting | undefined,
): { setting: Setting; message: string }[] {
  const protocol = effective('net', 'protocol')?.value ?? 'C';
  const problems: { setting: Setting; message: string }[] = [];
  const two = effective('net', 'allow-two-primaries');
  if (two?.value === 'yes' && protocol !== 'C')
    problems.push({ setting: two, message: `allow-two-primaries with protocol ${protocol}, expected protocol C` });
  const fencing = effective('disk', 'fencing');
  if (fencing?.value === 'resource-and-stonith' && protocol === 'A')
    problems.push({
      setting: fencing,
      message: 'fencing resource-and-stonith with protocol A, expected protocol B or C',
    });
  const congestion = effective('net', 'on-congestion');
  if (congestion && congestion.value !== 'block' && protocol !== 'A')
    problems.push({
      setting: congestion,
      message: `on-congestion ${congestion.value} with protocol ${protocol}, expected protocol A`,
    });
  return problems;
}

/** The definition behind a word of a file's section, old spellings included. */
function definitionOf(section: WrittenSection, word: string): OptionDefinition | undefined {
  const legacy = findLegacySpelling(section, word);
  if (legacy) return legacy.name === undefined ? undefined : findOption(legacy.section, legacy.name);
  return section === 'syncer' ? undefined : findOption(section, word);
}

/** The outer settings that the inner ones do not name, followed by the inner ones. */
export function overrideSettings(outer: readonly Setting[], inner: readonly Setting[]): Setting[] {
  const names = new Set(inner.map((setting) => setting.name));
  return [...outer.filter((setting) => !names.has(setting.name)), ...inner];
}

/** `10.0.0.1:7788`, `[fd00::1]:7788`. */
export function addressText(address: Address): string {
  return address.family === 'ipv6' ? `[${address.host}]:${address.port}` : `${address.host}:${address.port}`;
}

function unitHint(name: string, unit: OptionUnit, value: string): string | undefined {
  if (/^[0-9]+s$/.test(value) && unit !== 'sectors')
    return `"s" means sectors of 512 bytes, not seconds; ${name} counts ${unitText(unit)}`;
  return unit === 'count' ? undefined : `${name} counts ${unitText(unit)}`;
}

function unitText(unit: OptionUnit): string {
  switch (unit) {
    case 's':
      return 'seconds';
    case '0.1 s':
      return 'tenths of a second (0.1 s)';
    case 'sectors':
      return 'sectors of 512 bytes';
    default:
      return unit;
  }
}

const VOLUME_WORDS: ReadonlySet<string> = new Set(['device', 'disk', 'meta-disk', 'flexible-meta-disk']);

/** Statements per scope, with what a value glued to them must look like for the hint to be worth giving. */
const NAME = /^[A-Za-z0-9][A-Za-z0-9._-]*$/;
const ENDPOINT = /^(?:ipv[46]|[0-9]{1,3}(?:\.[0-9]{1,3}){3})$/;
const TOP_STATEMENTS: Readonly<Record<string, RegExp>> = {
  resource: NAME,
  global: /^$/,
  common: /^$/,
  skip: NAME,
  include: /^[/.]?[A-Za-z]/,
};
const SECTION_STATEMENTS: Readonly<Record<string, RegExp>> = {
  net: /^$/,
  syncer: /^$/,
  startup: /^$/,
  handlers: /^$/,
  options: /^$/,
  proxy: /^$/,
};
const VOLUME_STATEMENTS: Readonly<Record<string, RegExp>> = {
  device: /^(?:\/dev\/)?drbd/,
  disk: /^\//,
  'meta-disk': /^(?:\/|internal$)/,
  'flexible-meta-disk': /^(?:\/|internal$)/,
};
const HOST_STATEMENTS: Readonly<Record<string, RegExp>> = {
  ...VOLUME_STATEMENTS,
  address: ENDPOINT,
  volume: /^[0-9]{1,5}$/,
  options: /^$/,
};
const COMMON_STATEMENTS: Readonly<Record<string, RegExp>> = {
  ...SECTION_STATEMENTS,
  disk: /^$/,
  protocol: /^[A-Ca-c]$/,
};
const RESOURCE_STATEMENTS: Readonly<Record<string, RegExp>> = {
  ...SECTION_STATEMENTS,
  ...VOLUME_STATEMENTS,
  protocol: /^[A-Ca-c]$/,
  on: NAME,
  floating: ENDPOINT,
  volume: /^[0-9]{1,5}$/,
};

/** Freezes a value and everything it holds. Configurations are trees of plain objects and arrays. */
export function deepFreeze<T>(value: T): T {
  if (typeof value === 'object' && value !== null && !Object.isFrozen(value)) {
    Object.freeze(value);
    for (const inner of Object.values(value)) deepFreeze(inner);
  }
  return value;
}
