/**
 * What the block front ends (NBD server, FUSE file) ask of the engine. The resource runtime implements it; tests may
 * implement it over a plain file. All of it is called on the engine's only thread; `complete` is never called from
 * inside
 * the call that started the request.
 */
export interface BlockTarget {
  readonly sizeBytes: number;
  /** Smallest unit a request may address without a read-modify-write, in bytes (512 for DRBD). */
  readonly sectorBytes: number;
  /**
   * Counts an opener. A Secondary refuses: EROFS for writers, EMEDIUMTYPE for readers (DRBD 8.4 drbd_open).
   * @returns 0 or an errno
   */
  open(write: boolean): number;
  close(write: boolean): void;
  /**
   * Starts a request. `request` is the front end's number and comes back in `complete`. Offsets and lengths are whole
   * sectors inside the device. For a read, `payload` is the block to fill; for a write, the block holding the data; the
   * caller keeps its reference until completion.
   */
  read(front: BlockFront, request: number, offsetBytes: number, lengthBytes: number, payload: number): void;
  write(
    front: BlockFront,
    request: number,
    offsetBytes: number,
    lengthBytes: number,
    payload: number,
    fua: boolean,
  ): void;
  /** Complete when all writes completed before are on stable storage on every connected head. */
  flush(front: BlockFront, request: number): void;
  /** The range reads as zeroes afterwards, on both heads; `unmap` gives the space back. */
  zero(
    front: BlockFront,
    request: number,
    offsetBytes: number,
    lengthBytes: number,
    unmap: boolean,
    fua: boolean,
  ): void;
}

export interface BlockFront {
  complete(request: number, errno: number): void;
}
