import type { Position, TextFix } from './diagnostic.js';

/** `other` is any character that belongs to no token; `bad` a token the lexer itself refuses (`problem` says why). */
export type TokenKind = 'word' | 'number' | 'ipv4' | 'string' | 'punctuation' | 'other' | 'bad' | 'end';

export interface Token {
  readonly kind: TokenKind;
  /** Decoded text: quotes and backslashes of a quoted string are gone. */
  readonly text: string;
  readonly startOffset: number;
  readonly endOffset: number;
  readonly line: number;
  readonly column: number;
  /** Only for `bad`. */
  readonly problem?: string;
}

const PUNCTUATION = '{};[]:';
const MAX_WORD_LENGTH = 128;
const MAX_STRING_LENGTH = 255;
const NUMBER = /^[0-9]{1,8}[KMGkmgs]?$/;
const IPV4 = /^[0-9]{1,3}(?:\.[0-9]{1,3}){3}$/;

/** Whether a character may stand in an unquoted word. */
function isWordCode(code: number): boolean {
  return (
    (code >= 0x61 && code <= 0x7a) || // a-z
    (code >= 0x41 && code <= 0x5a) || // A-Z
    (code >= 0x2d && code <= 0x39) || // - . / 0-9
    code === 0x5f // _
  );
}

/**
 * Splits the text of one drbd.conf file into tokens, one at a time, with one token of look-ahead.
 *
 * Rules are those of drbdadm 8.4: blanks only separate, `#` comments to the end of the line, punctuation needs no
 * blanks around it, words have up to 128 of `A-Z a-z 0-9 / . _ -`, quoted strings up to 255 characters on one line
 * with backslash protecting the next character. A token is never longer than those limits, whatever the file holds.
 */
export class Lexer {
  #offset = 0;
  #line = 1;
  #lineStart = 0;
  #peeked: Token | undefined;
  /** Whether the text began with a byte order mark, which is skipped. */
  readonly hasByteOrderMark: boolean;

  constructor(
    readonly text: string,
    readonly file: string,
    readonly path: string,
  ) {
    this.hasByteOrderMark = text.charCodeAt(0) === 0xfeff;
    if (this.hasByteOrderMark) {
      this.#offset = 1;
      this.#lineStart = 1;
    }
  }

  /** Where a token stands. */
  at(token: Token): Position {
    return { file: this.file, path: this.path, line: token.line, column: token.column };
  }

  peek(): Token {
    this.#peeked ??= this.#scan();
    return this.#peeked;
  }

  next(): Token {
    const token = this.peek();
    this.#peeked = undefined;
    return token;
  }

  /**
   * After a `[` was taken as the last token: the raw text up to the `]` on the same line, which is consumed too.
   * IPv6 literals are read so, since their colons would fall apart into tokens. Undefined if there is no `]`.
   */
  takeBracketed(): string | undefined {
    const from = this.#peeked?.startOffset ?? this.#offset;
    const limit = Math.min(this.text.length, from + MAX_WORD_LENGTH);
    for (let offset = from; offset < limit; offset++) {
      const code = this.text.charCodeAt(offset);
      if (code === 0x0a) return undefined;
      if (code === 0x5d) {
        // A peeked token may have moved the line count, but only past line breaks, and then no `]` was found here.
        this.#peeked = undefined;
        this.#offset = offset + 1;
        return this.text.slice(from, offset).trim();
      }
    }
    return undefined;
  }

  #scan(): Token {
    this.#skipBlanksAndComments();
    const start = this.#offset;
    if (start >= this.text.length) return this.#token('end', '', start);
    const code = this.text.charCodeAt(start);
    if (isWordCode(code)) return this.#scanWord(start);
    if (code === 0x22) return this.#scanQuoted(start);
    if (PUNCTUATION.includes(this.text[start]!)) return this.#token('punctuation', this.text[start]!, start + 1);
    const character = String.fromCodePoint(this.text.codePointAt(start)!);
    return this.#token('other', character, start + character.length);
  }

  #skipBlanksAndComments(): void {
    const { text } = this;
    for (; this.#offset < text.length; this.#offset++) {
      const code = text.charCodeAt(this.#offset);
      if (code === 0x0a) {
        this.#line++;
        this.#lineStart = this.#offset + 1;
      } else if (code === 0x23) {
        const end = text.indexOf('\n', this.#offset);
        this.#offset = (end < 0 ? text.length : end) - 1;
      } else if (code !== 0x20 && code !== 0x09 && code !== 0x0d) return;
    }
  }

  #scanWord(start: number): Token {
    let end = start + 1;
    while (end < this.text.length && isWordCode(this.text.charCodeAt(end))) end++;
    if (end - start > MAX_WORD_LENGTH)
      return this.#token(
        'bad',
        this.text.slice(start, start + 20),
        end,
        `Token too long >>>${this.text.slice(start, start + 20)}...<<<`,
      );
    const text = this.text.slice(start, end);
    return this.#token(NUMBER.test(text) ? 'number' : IPV4.test(text) ? 'ipv4' : 'word', text, end);
  }

  #scanQuoted(start: number): Token {
    let decoded = '';
    let runStart = start + 1;
    for (let offset = start + 1; offset < this.text.length; offset++) {
      const code = this.text.charCodeAt(offset);
      if (code === 0x0a) break;
      if (code === 0x22) {
        decoded += this.text.slice(runStart, offset);
        if (offset - start - 1 > MAX_STRING_LENGTH) return this.#badString(start, offset + 1, 'too long');
        return this.#token('string', decoded, offset + 1);
      }
      if (code === 0x5c) {
        decoded += this.text.slice(runStart, offset);
        offset++;
        if (offset >= this.text.length || this.text.charCodeAt(offset) === 0x0a) break;
        runStart = offset;
      }
    }
    return this.#badString(start, this.text.length, 'unterminated');
  }

  #badString(start: number, end: number, what: 'too long' | 'unterminated'): Token {
    const excerpt = this.text.slice(start, start + 20).split('\n', 1)[0]!;
    return this.#token(
      'bad',
      excerpt,
      end,
      what === 'too long'
        ? `Double quoted string too long >>>${excerpt}...<<<`
        : `Unterminated double quoted string\n  we don't allow embedded newlines\n  >>>${excerpt}...<<<`,
    );
  }

  #token(kind: TokenKind, text: string, endOffset: number, problem?: string): Token {
    const startOffset = this.#offset;
    this.#offset = endOffset;
    const column = startOffset - this.#lineStart + 1;
    const token = { kind, text, startOffset, endOffset, line: this.#line, column };
    return problem === undefined ? token : { ...token, problem };
  }
}

/** What a typographically damaged character stands for in a config file; undefined if it is not known damage. */
export function plainCharacter(character: string): string | undefined {
  const code = character.codePointAt(0)!;
  if (code >= 0xff01 && code <= 0xff5e) return String.fromCharCode(code - 0xfee0);
  return TYPOGRAPHY[character];
}

const TYPOGRAPHY: Readonly<Record<string, string>> = {
  '\u00a0': ' ',
  '\u2002': ' ',
  '\u2003': ' ',
  '\u2009': ' ',
  '\u202f': ' ',
  '\u3000': ' ',
  '\u200b': '',
  '\u200c': '',
  '\u200d': '',
  '\ufeff': '',
  '\u201c': '"',
  '\u201d': '"',
  '\u201e': '"',
  '\u00ab': '"',
  '\u00bb': '"',
  '\u2010': '-',
  '\u2011': '-',
  '\u2012': '-',
  '\u2013': '-',
  '\u2014': '-',
  '\u2212': '-',
};

/** The hint and repair for a token that is a typographically damaged character, if it is one. */
export function typographyHint(token: Token, path: string): { hint: string; fix: TextFix } | undefined {
  if (token.kind !== 'other') return undefined;
  const plain = plainCharacter(token.text);
  if (plain === undefined) return undefined;
  const code = token.text.codePointAt(0)!.toString(16).toUpperCase().padStart(4, '0');
  const meant = plain === '' ? 'nothing' : plain === ' ' ? 'a blank' : `"${plain}"`;
  return {
    hint: `U+${code} stands where ${meant} is meant; "drbdts lint --fix" replaces it`,
    fix: { path, startOffset: token.startOffset, endOffset: token.endOffset, replacement: plain },
  };
}
