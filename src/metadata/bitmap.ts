import { assert } from '../base/assert.js';
import { MetadataError } from '../base/errors.js';
import { bitmapBytes } from './layout.js';

/** Bytes of one page of the on-disk bitmap, the unit in which it is written. */
export const BITMAP_PAGE_BYTES = 4096;
/** Bits in one page: 128 MiB of data. */
export const BITMAP_PAGE_BITS = BITMAP_PAGE_BYTES * 8;
/** Sectors one bit stands for (4 KiB). */
export const SECTORS_PER_BIT = 8;
/** Bits of one 4 MiB activity log extent. */
export const BITS_PER_AL_EXTENT = 1024;
/** Bits of one 16 MiB resync extent. */
export const BITS_PER_RESYNC_EXTENT = 4096;
/** Largest bitmap held in memory: 2^35 bits (128 TiB of data, 4 GiB of memory). */
export const MAX_BITMAP_BITS = 2 ** 35;

/** Bits were set that are not on disk yet. */
export const PAGE_NEED_WRITEOUT = 1;
/** Only bits were cleared, or set in bulk from the peer's bitmap: write when convenient. */
export const PAGE_LAZY = 2;
/** An extent of this page leaves the activity log: write it, if changed, before that transaction. */
export const PAGE_HINT = 4;
const PAGE_CHANGED = PAGE_NEED_WRITEOUT | PAGE_LAZY;

const WORDS_PER_PAGE = BITMAP_PAGE_BYTES / 4;

// The on-disk bitmap is little-endian. Every platform drbdts runs on is too, so pages are copied, not converted.
assert(new Uint8Array(Uint32Array.of(1).buffer)[0] === 1, 'a little-endian machine');

function popcount(word: number): number {
  let count = word - ((word >>> 1) & 0x55555555);
  count = (count & 0x33333333) + ((count >>> 2) & 0x33333333);
  return Math.imul((count + (count >>> 4)) & 0x0f0f0f0f, 0x01010101) >>> 24;
}

/** Index of the lowest set bit of a word that is not 0. */
function lowestBit(word: number): number {
  return 31 - Math.clz32(word & -word);
}

/**
 * The dirty bitmap of a device: one bit per aligned 4 KiB, 1 = must be resynced. Held completely in memory; bit n is
 * bit n & 7 of byte n >> 3, on disk and here. Bits behind the end of the device are always 0. The number of set bits is
 * kept up to date by every change; which 4 KiB pages differ from the disk is tracked in page states.
 *
 * Nothing here allocates except the constructor and `resize`; long ranges are handled a word at a time.
 *
 * @see DRBD 8.4 drbd_bitmap.c
 */
export class Bitmap {
  private words: Uint32Array;
  private bytes: Uint8Array;
  private pages: Uint8Array;
  private setBitsCount = 0;
  private sizeSectorsNow: number;
  private bitsNow: number;

  /** All bits clear. @throws MetadataError `DRBDTS_BM_TOO_LARGE` for more than 2^35 bits */
  constructor(sizeSectors: number) {
    this.sizeSectorsNow = sizeSectors;
    this.bitsNow = bitsFor(sizeSectors);
    const pageCount = Math.ceil(this.bitsNow / BITMAP_PAGE_BITS);
    this.words = new Uint32Array(pageCount * WORDS_PER_PAGE);
    this.bytes = new Uint8Array(this.words.buffer);
    this.pages = new Uint8Array(pageCount);
  }

  get sizeSectors(): number {
    return this.sizeSectorsNow;
  }
  /** Number of bits (blocks of 4 KiB, the last one possibly short). */
  get bits(): number {
    return this.bitsNow;
  }
  /** Number of set bits. */
  get weight(): number {
    return this.setBitsCount;
  }
  get pageCount(): number {
    return this.pages.length;
  }
  /** Bytes of the bitmap in whole 64-bit words: what is exchanged with the peer. */
  get byteLength(): number {
    return bitmapBytes(this.sizeSectorsNow);
  }

  /** Marks every block the sectors touch. @returns bits that changed */
  setRange(sector: number, sizeSectors: number, pageState = PAGE_NEED_WRITEOUT): number {
    this.assertInside(sector, sizeSectors);
    if (sizeSectors === 0) return 0;
    return this.setBits(
      Math.floor(sector / SECTORS_PER_BIT),
      Math.floor((sector + sizeSectors - 1) / SECTORS_PER_BIT),
      pageState,
    );
  }

  /**
   * Unmarks the blocks the sectors cover completely; a short last block counts as covered when the range reaches the
   * end of the device. @returns bits that changed
   */
  clearRange(sector: number, sizeSectors: number): number {
    this.assertInside(sector, sizeSectors);
    const first = Math.ceil(sector / SECTORS_PER_BIT);
    const end = sector + sizeSectors;
    const last = end === this.sizeSectorsNow ? this.bitsNow - 1 : Math.floor(end / SECTORS_PER_BIT) - 1;
    return sizeSectors === 0 || last < first ? 0 : this.clearBits(first, last);
  }

  /** Set bits among the blocks the sectors touch. */
  countRange(sector: number, sizeSectors: number): number {
    this.assertInside(sector, sizeSectors);
    if (sizeSectors === 0) return 0;
    return this.countBits(
      Math.floor(sector / SECTORS_PER_BIT),
      Math.floor((sector + sizeSectors - 1) / SECTORS_PER_BIT),
    );
  }

  /** Whether any block the sectors touch is marked. */
  isAnySet(sector: number, sizeSectors: number): boolean {
    this.assertInside(sector, sizeSectors);
    if (sizeSectors === 0) return false;
    const last = Math.floor((sector + sizeSectors - 1) / SECTORS_PER_BIT);
    const found = this.findNext(Math.floor(sector / SECTORS_PER_BIT));
    return found >= 0 && found <= last;
  }

  isBitSet(bit: number): boolean {
    assert(bit >= 0 && bit < this.bitsNow, 'bit inside the bitmap');
    return ((this.words[Math.floor(bit / 32)]! >>> (bit % 32)) & 1) === 1;
  }

  /** Sets bits `first` to `last`, both included. @returns bits that changed */
  setBits(first: number, last: number, pageState = PAGE_NEED_WRITEOUT): number {
    this.assertBits(first, last);
    const before = this.setBitsCount;
    let word = Math.floor(first / 32);
    const lastWord = Math.floor(last / 32);
    while (word <= lastWord) {
      const page = Math.floor(word / WORDS_PER_PAGE);
      const stop = Math.min(lastWord, (page + 1) * WORDS_PER_PAGE - 1);
      let gained = 0;
      for (; word <= stop; word++) {
        const old = this.words[word]!;
        const wanted = (old | wordMask(word, first, last)) >>> 0;
        if (wanted === old) continue;
        this.words[word] = wanted;
        gained += popcount(wanted ^ old);
      }
      if (gained > 0) {
        this.setBitsCount += gained;
        this.pages[page]! |= pageState;
      }
    }
    return this.setBitsCount - before;
  }

  /** Clears bits `first` to `last`, both included. @returns bits that changed */
  clearBits(first: number, last: number): number {
    this.assertBits(first, last);
    const before = this.setBitsCount;
    let word = Math.floor(first / 32);
    const lastWord = Math.floor(last / 32);
    while (word <= lastWord) {
      const page = Math.floor(word / WORDS_PER_PAGE);
      const stop = Math.min(lastWord, (page + 1) * WORDS_PER_PAGE - 1);
      let lost = 0;
      for (; word <= stop; word++) {
        const old = this.words[word]!;
        if (old === 0) continue;
        const wanted = (old & ~wordMask(word, first, last)) >>> 0;
        if (wanted === old) continue;
        this.words[word] = wanted;
        lost += popcount(wanted ^ old);
      }
      if (lost > 0) {
        this.setBitsCount -= lost;
        this.pages[page]! |= PAGE_LAZY;
      }
    }
    return before - this.setBitsCount;
  }

  /** Set bits from `first` to `last`, both included. */
  countBits(first: number, last: number): number {
    this.assertBits(first, last);
    const firstWord = Math.floor(first / 32);
    const lastWord = Math.floor(last / 32);
    let count = 0;
    for (let word = firstWord; word <= lastWord; word++) {
      const value = this.words[word]!;
      if (value !== 0) count += popcount(value & wordMask(word, first, last));
    }
    return count;
  }

  /** First set bit at or after `bit`, or -1. */
  findNext(bit: number): number {
    if (bit >= this.bitsNow || this.setBitsCount === 0) return -1;
    const lastWord = Math.floor((this.bitsNow - 1) / 32);
    let word = Math.floor(bit / 32);
    let value = this.words[word]! & (-1 << (bit % 32));
    while (value === 0) {
      if (++word > lastWord) return -1;
      value = this.words[word]!;
    }
    return word * 32 + lowestBit(value);
  }

  /** First clear bit at or after `bit`, or -1. */
  findNextClear(bit: number): number {
    if (bit >= this.bitsNow) return -1;
    const lastWord = Math.floor((this.bitsNow - 1) / 32);
    let word = Math.floor(bit / 32);
    let value = ~this.words[word]! & (-1 << (bit % 32));
    while (value === 0) {
      if (++word > lastWord) return -1;
      value = ~this.words[word]!;
    }
    const found = word * 32 + lowestBit(value);
    return found < this.bitsNow ? found : -1;
  }

  /**
   * Marks what was hot when the Primary crashed: all blocks of the given 4 MiB activity log extents. Extents behind the
   * end of the device are ignored (the device may have shrunk since). @returns bits that changed
   */
  markExtents(extents: Uint32Array): number {
    let gained = 0;
    for (const extent of extents) {
      const first = extent * BITS_PER_AL_EXTENT;
      if (first < this.bitsNow) gained += this.setBits(first, Math.min(first + BITS_PER_AL_EXTENT, this.bitsNow) - 1);
    }
    return gained;
  }

  /** Marks the whole device; every page must be written. */
  setAll(): void {
    this.words.fill(0xffffffff);
    this.clearBehindEnd();
    this.setBitsCount = this.bitsNow;
    for (let page = 0; page < this.pages.length; page++) this.pages[page]! |= PAGE_NEED_WRITEOUT;
  }

  /** Unmarks the whole device; pages that had bits become lazy. */
  clearAll(): void {
    if (this.bitsNow > 0) this.clearBits(0, this.bitsNow - 1);
  }

  /** Page states (PAGE_* bits) of one page. */
  pageState(page: number): number {
    assert(page >= 0 && page < this.pages.length, 'page inside the bitmap');
    return this.pages[page]!;
  }

  /** Page that holds the bits of a 4 MiB activity log extent. */
  pageOfExtent(extent: number): number {
    return Math.floor((extent * BITS_PER_AL_EXTENT) / BITMAP_PAGE_BITS);
  }

  /** Adds a page state: PAGE_HINT before an eviction, PAGE_NEED_WRITEOUT to force a rewrite (metadata moved). */
  markPage(page: number, state: number): void {
    assert(page >= 0 && page < this.pages.length, 'page inside the bitmap');
    this.pages[page]! |= state;
  }

  /** Marks every page for writing, whatever it holds (metadata moved, full rewrite). */
  markAllPages(): void {
    for (let page = 0; page < this.pages.length; page++) this.pages[page]! |= PAGE_NEED_WRITEOUT;
  }

  /** First page at or after `from` with one of the states in `mask`, or -1. */
  nextPage(from: number, mask = PAGE_CHANGED): number {
    for (let page = from; page < this.pages.length; page++) if ((this.pages[page]! & mask) !== 0) return page;
    return -1;
  }

  /** Takes the eviction hint off a page. @returns whether the page differs from the disk and must be written */
  takeHint(page: number): boolean {
    assert(page >= 0 && page < this.pages.length, 'page inside the bitmap');
    this.pages[page]! &= ~PAGE_HINT;
    return (this.pages[page]! & PAGE_CHANGED) !== 0;
  }

  /**
   * Copies a page out to be written and clears its states: bits changed from now on mark it again, so a write in flight
   * never hides a later change. A failed write is a metadata I/O error and ends this bitmap's attachment.
   *
   * @param into at least 4096 bytes; owned by the caller
   */
  takePage(page: number, into: Uint8Array): void {
    this.copyPage(page, into);
    this.pages[page] = 0;
  }

  /** Copies a page out and leaves its states alone. */
  copyPage(page: number, into: Uint8Array): void {
    assert(page >= 0 && page < this.pages.length, 'page inside the bitmap');
    assert(into.byteLength >= BITMAP_PAGE_BYTES, 'a page fits');
    into.set(this.bytes.subarray(page * BITMAP_PAGE_BYTES, (page + 1) * BITMAP_PAGE_BYTES));
  }

  /**
   * Replaces a page by what was read from disk. Bits behind the end of the device are ignored; the page counts as
   * unchanged. Set bits are counted at once.
   */
  loadPage(page: number, from: Uint8Array): void {
    assert(page >= 0 && page < this.pages.length, 'page inside the bitmap');
    assert(from.byteLength >= BITMAP_PAGE_BYTES, 'a whole page');
    const firstWord = page * WORDS_PER_PAGE;
    this.setBitsCount -= this.countWords(firstWord, firstWord + WORDS_PER_PAGE);
    this.bytes.set(from.subarray(0, BITMAP_PAGE_BYTES), page * BITMAP_PAGE_BYTES);
    if (page === this.pages.length - 1) this.clearBehindEnd();
    this.setBitsCount += this.countWords(firstWord, firstWord + WORDS_PER_PAGE);
    this.pages[page] = 0;
  }

  /** Copies `into.byteLength` bytes of the bitmap, starting at `byteOffset`, for a plain P_BITMAP. */
  copyBytes(byteOffset: number, into: Uint8Array): void {
    assert(byteOffset >= 0 && byteOffset + into.byteLength <= this.byteLength, 'inside the bitmap');
    into.set(this.bytes.subarray(byteOffset, byteOffset + into.byteLength));
  }

  /**
   * ORs little-endian bitmap bytes of the peer in, starting at `byteOffset`. Bits behind the end of the device are
   * ignored. Changed pages become lazy. Offset and length are multiples of 4 (P_BITMAP sends whole 64-bit words), and
   * the caller has checked them against `byteLength`. @returns bits gained
   */
  mergeBytes(byteOffset: number, from: Uint8Array): number {
    assert(byteOffset >= 0 && byteOffset + from.byteLength <= this.byteLength, 'inside the bitmap');
    assert(byteOffset % 4 === 0 && from.byteLength % 4 === 0, 'whole words');
    const view = new DataView(from.buffer, from.byteOffset, from.byteLength);
    const firstWord = byteOffset / 4;
    const lastBit = this.bitsNow - 1;
    let gained = 0;
    for (let index = 0; index < from.byteLength; index += 4) {
      const word = firstWord + index / 4;
      const old = this.words[word]!;
      let added = view.getUint32(index, true) & ~old;
      if (added === 0) continue;
      if (word * 32 + 31 > lastBit) {
        // The exchanged bitmap is padded to whole 64-bit words.
        added &= word * 32 > lastBit ? 0 : wordMask(word, 0, lastBit);
        if (added === 0) continue;
      }
      this.words[word] = old | added;
      gained += popcount(added);
      this.pages[Math.floor(word / WORDS_PER_PAGE)]! |= PAGE_LAZY;
    }
    this.setBitsCount += gained;
    return gained;
  }

  /**
   * Follows a size change of the device. Bits of a new area are set, or clear if `setNew` is false (assume-clean); bits
   * of a lost area vanish. Page states survive. All pages that changed need writing.
   */
  resize(sizeSectors: number, setNew: boolean): void {
    const oldBits = this.bitsNow;
    const newBits = bitsFor(sizeSectors);
    const pageCount = Math.ceil(newBits / BITMAP_PAGE_BITS);
    if (newBits < oldBits) {
      this.clearBits(newBits, oldBits - 1);
    }
    if (pageCount !== this.pages.length) {
      const words = new Uint32Array(pageCount * WORDS_PER_PAGE);
      words.set(this.words.subarray(0, Math.min(words.length, this.words.length)));
      const pages = new Uint8Array(pageCount);
      pages.set(this.pages.subarray(0, Math.min(pageCount, this.pages.length)));
      // A page that did not exist before holds whatever was on disk there.
      for (let page = this.pages.length; page < pageCount; page++) pages[page] = PAGE_NEED_WRITEOUT;
      this.words = words;
      this.bytes = new Uint8Array(words.buffer);
      this.pages = pages;
    }
    this.sizeSectorsNow = sizeSectors;
    this.bitsNow = newBits;
    if (newBits > oldBits && setNew) this.setBits(oldBits, newBits - 1);
  }

  private countWords(from: number, end: number): number {
    let count = 0;
    for (let word = from; word < end; word++) {
      const value = this.words[word]!;
      if (value !== 0) count += popcount(value);
    }
    return count;
  }

  private clearBehindEnd(): void {
    const word = Math.floor(this.bitsNow / 32);
    if (word >= this.words.length) return;
    this.words[word]! &= (1 << (this.bitsNow % 32)) - 1;
    this.words.fill(0, word + 1);
  }

  private assertInside(sector: number, sizeSectors: number): void {
    assert(sector >= 0 && sizeSectors >= 0 && sector + sizeSectors <= this.sizeSectorsNow, 'inside the device');
  }

  private assertBits(first: number, last: number): void {
    assert(first >= 0 && first <= last && last < this.bitsNow, 'bits inside the bitmap');
  }
}

/** Mask of the bits of word `word` that lie in the bit range `first` to `last`. */
function wordMask(word: number, first: number, last: number): number {
  const base = word * 32;
  let mask = -1;
  if (first > base) mask = -1 << (first - base);
  if (last < base + 31) mask &= -1 >>> (31 - (last - base));
  return mask;
}

function bitsFor(sizeSectors: number): number {
  assert(Number.isSafeInteger(sizeSectors) && sizeSectors >= 0, 'a size in sectors');
  const bits = Math.ceil(sizeSectors / SECTORS_PER_BIT);
  if (bits > MAX_BITMAP_BITS)
    throw new MetadataError('DRBDTS_BM_TOO_LARGE', `a device of ${sizeSectors} sectors is larger than 128 TiB`);
  return bits;
}
