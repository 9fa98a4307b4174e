/**
 * The write verifier (RFC 1813 section 3.3.7): it differs between any two lives of a server between which unstable data
 * may have been lost, and stays the same within one. Random, so that it also differs between heads. Never stored.
 */
import { assert } from '../base/assert.js';

export const WRITE_VERIFIER_BYTES = 8;

export class WriteVerifier {
  private value: Uint8Array;

  /** @param random draws 8 fresh random bytes */
  constructor(private readonly random: () => Uint8Array) {
    this.value = this.draw();
  }

  /**
   * The value to answer with. A WRITE takes it before it writes: if it changes meanwhile, the client must send again.
   */
  get current(): Uint8Array {
    return this.value;
  }

  /**
   * Unstable data may have been lost though this process lives (a failed fsync or writeback): clients must send again.
   */
  renew(): void {
    this.value = this.draw();
  }

  private draw(): Uint8Array {
    const value = this.random();
    assert(value.length === WRITE_VERIFIER_BYTES, 'a write verifier has 8 bytes');
    return value;
  }
}
