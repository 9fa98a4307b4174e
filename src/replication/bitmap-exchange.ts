import { ProtocolError } from '../base/errors.js';
import type { Device } from './device.js';
import { ConnectionState } from './state.js';
import { BitmapReceiver, BitmapSender } from './wire/bitmap-codec.js';
import { encodeHeader } from './wire/codec.js';
import { BITMAP_CHUNK_BYTES } from './wire/packets.js';

/**
 * Both bitmaps become their union before a resync: the source sends its own, the target merges it and answers with the
 * result. Packets leave as fast as the send queue takes them, so that the bitmap of a large device needs no memory.
 */
export class BitmapExchange {
  private sender: BitmapSender | undefined;
  private receiver: BitmapReceiver | undefined;
  private readonly chunk = new Uint8Array(BITMAP_CHUNK_BYTES);
  private packet = new Uint8Array(0);

  constructor(private readonly device: Device) {}

  /**
   * Entered WFBitMapS, or the target received everything: this side's turn. Writes that began unreplicated set their
   * bits when they end, so those under way must end before the bitmap is read; later ones are announced.
   */
  startSending(): void {
    const { device } = this;
    const { resource } = device;
    const { connection } = device.state;
    if (connection === ConnectionState.WFBitMapS && device.metadata)
      this.receiver = new BitmapReceiver(device.metadata.bitmap);
    const link = resource.linkNumber;
    device.hold();
    resource.drainApplication(device, () => {
      const { metadata, state } = device;
      if (metadata && link === resource.linkNumber && state.connection === connection)
        this.sender = new BitmapSender(metadata.bitmap, resource.net.useRle);
      device.release();
      resource.requestTurnEnd();
    });
  }

  /** Entered WFBitMapT. */
  startReceiving(): void {
    const { metadata } = this.device;
    if (metadata) this.receiver = new BitmapReceiver(metadata.bitmap);
  }

  /** Sends as much as the connection takes. */
  pump(): void {
    const { resource, volume } = this.device;
    while (this.sender && resource.link && !resource.isSendQueueFull) {
      const length = this.sender.next(this.chunk);
      const headerLength = encodeHeader(resource.scratch, this.sender.command, volume, length);
      if (this.packet.length < headerLength + length) this.packet = new Uint8Array(headerLength + BITMAP_CHUNK_BYTES);
      this.packet.set(resource.scratch.bytes.subarray(0, headerLength));
      this.packet.set(this.chunk.subarray(0, length), headerLength);
      resource.sendDataBytes(this.packet.subarray(0, headerLength + length));
      if (!this.sender.done) continue;
      this.sender = undefined;
      if (this.device.state.connection === ConnectionState.WFBitMapT)
        this.device.changeState({ connection: ConnectionState.WFSyncUUID }, 'hard');
    }
  }

  /** P_BITMAP or P_COMPRESSED_BITMAP; `payload` is borrowed. */
  receive(command: number, payload: Uint8Array): void {
    const { connection } = this.device.state;
    if (!this.receiver)
      throw new ProtocolError(
        'DRBDTS_DRBD_UNEXPECTED',
        'a bitmap that nobody waits for',
        'DRBD 8.4 drbd_receiver.c receive_bitmap',
      );
    if (!this.receiver.receive(command, payload)) return;
    this.receiver = undefined;
    if (connection === ConnectionState.WFBitMapT) this.startSending();
    else if (connection === ConnectionState.WFBitMapS) this.device.becomeSource();
  }

  reset(): void {
    this.sender = undefined;
    this.receiver = undefined;
  }
}
