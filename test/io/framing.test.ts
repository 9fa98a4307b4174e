import { expect, it } from 'vitest';
import { FRAME_SKIPPED, type FrameRule } from '../../src/io/ring.js';
import { connectedPair, describeRing, type Frame, Recorder } from '../support/rings.js';

const EMSGSIZE = 90;
const EPROTO = 71;
const ECONNRESET = 104;

/** NBD requests (proto.md "Request message"): 28 bytes, only WRITE (1) is followed by data. */
const NBD: FrameRule = {
  kind: 'fixed',
  headerBytes: 28,
  magic: [0x25, 0x60, 0x95, 0x13],
  lengthOffset: 24,
  lengthBytes: 4,
  commandOffset: 6,
  commandBytes: 2,
  payloadCommands: [1],
  inlineDefault: 0,
  inlineByCommand: {},
  maxPayloadBytes: 256 * 1024,
  hardCapBytes: 1024 * 1024,
};

/** DRBD packets with the 8-byte header: magic, 16-bit command and length, sub-headers inline. */
const DRBD: FrameRule = {
  kind: 'fixed',
  headerBytes: 8,
  magic: [0x83, 0x74, 0x02, 0x67],
  commandOffset: 4,
  commandBytes: 2,
  lengthOffset: 6,
  lengthBytes: 2,
  inlineDefault: 200,
  inlineByCommand: { 0: 24 },
  maxPayloadBytes: 64 * 1024,
  hardCapBytes: 64 * 1024,
};

const RECORDS: FrameRule = { kind: 'record', maxRecordBytes: 1024 * 1024, maxFragments: 16 };

function nbd(command: number, length: number, data: Uint8Array = Buffer.alloc(0)): Buffer {
  const header = Buffer.alloc(28);
  header.writeUInt32BE(0x25609513, 0);
  header.writeUInt16BE(command, 6);
  header.writeBigUInt64BE(0x1122334455667788n, 8);
  header.writeUInt32BE(length, 24);
  return Buffer.concat([header, data]);
}

function drbd(command: number, data: Uint8Array): Buffer {
  const header = Buffer.alloc(8);
  header.writeUInt32BE(0x83740267, 0);
  header.writeUInt16BE(command, 4);
  header.writeUInt16BE(data.length, 6);
  return Buffer.concat([header, data]);
}

/** RFC 5531 section 11: a fragment is its length, the top bit set on the last, and its bytes. */
function fragment(data: Uint8Array, last: boolean): Buffer {
  const mark = Buffer.alloc(4);
  mark.writeUInt32BE((data.length | (last ? 0x80000000 : 0)) >>> 0);
  return Buffer.concat([mark, data]);
}

function pattern(length: number, seed: number): Buffer {
  return Buffer.from(Uint8Array.from({ length }, (_, index) => (index * 7 + seed + (index >> 8)) & 0xff));
}

const turn = () => new Promise<void>((resolve) => setTimeout(resolve, 1));

describeRing('framing', (make) => {
  /** Sends the pieces with a pause between them and returns what the server side got. */
  async function deliver(rule: FrameRule, pieces: Uint8Array[], frames: number): Promise<Frame[]> {
    const ring = make();
    const recorder = new Recorder(ring);
    const { clientSide, serverSide } = await connectedPair(ring, rule, recorder, new Recorder(ring));
    for (const piece of pieces) {
      clientSide.sendBytes(piece);
      if (pieces.length > 1) await turn();
    }
    await recorder.until((all) => all.frames.length >= frames || all.closedCount > 0);
    serverSide.close();
    await recorder.until((all) => all.closedCount > 0);
    expect(recorder.closedCount).toBe(1);
    // Nothing is left in blocks that nobody holds.
    expect(ring.usedBytes).toBe(0);
    return recorder.frames;
  }

  async function breaks(rule: FrameRule, bytes: Uint8Array): Promise<Recorder> {
    const ring = make();
    const recorder = new Recorder(ring);
    const client = new Recorder(ring);
    const { clientSide } = await connectedPair(ring, rule, recorder, client);
    clientSide.sendBytes(bytes);
    await recorder.until((all) => all.closedCount > 0);
    await client.until((all) => all.closedCount > 0);
    expect(ring.usedBytes).toBe(0);
    return recorder;
  }

  it('cuts NBD requests wherever the stream is cut', async () => {
    const data = pattern(40, 1);
    const stream = Buffer.concat([nbd(0, 4096), nbd(1, 40, data), nbd(3, 0), nbd(1, 40, data), nbd(2, 0)]);
    const ring = make();
    const recorder = new Recorder(ring);
    const { clientSide } = await connectedPair(ring, NBD, recorder, new Recorder(ring));
    let expected = 0;
    for (let cut = 1; cut < stream.length; cut++) {
      clientSide.sendBytes(stream.subarray(0, cut));
      await turn();
      clientSide.sendBytes(stream.subarray(cut));
      expected += 5;
      await recorder.until((all) => all.frames.length >= expected);
      const [read, write, flush, again, disconnect] = recorder.frames.splice(0);
      expected = 0;
      expect(read!.header).toEqual(nbd(0, 4096));
      expect(read!.payload).toBeUndefined();
      expect(write!.header).toEqual(nbd(1, 40));
      expect(write!.payload).toEqual(data);
      expect(flush!.header).toEqual(nbd(3, 0));
      expect(again!.payload).toEqual(data);
      expect(disconnect!.header).toEqual(nbd(2, 0));
    }
  });

  it('cuts NBD requests arriving byte by byte', async () => {
    const data = pattern(5, 9);
    const stream = Buffer.concat([nbd(1, 5, data), nbd(0, 8)]);
    const frames = await deliver(
      NBD,
      [...stream].map((byte) => Buffer.from([byte])),
      2,
    );
    expect(frames[0]!.payload).toEqual(data);
    expect(frames[1]!.header).toEqual(nbd(0, 8));
  });

  it('receives large payloads straight into their block, many frames in a row', async () => {
    const sizes = [1, 4096, 65535, 65536, 65537, 131072, 262144, 100_000, 4096, 4096];
    const payloads = sizes.map((size, index) => pattern(size, index));
    const frames = await deliver(NBD, [Buffer.concat(payloads.map((data) => nbd(1, data.length, data)))], sizes.length);
    expect(frames.map((frame) => frame.payloadLength)).toEqual(sizes);
    frames.forEach((frame, index) => {
      expect(frame.payload!.equals(payloads[index]!)).toBe(true);
    });
  });

  it('delivers DRBD sub-headers inline and the rest as payload', async () => {
    const body = pattern(24 + 512, 3);
    const small = pattern(12, 4);
    const frames = await deliver(DRBD, [Buffer.concat([drbd(0, body), drbd(7, small), drbd(9, Buffer.alloc(0))])], 3);
    expect(frames[0]!.header).toEqual(Buffer.concat([drbd(0, body).subarray(0, 8), body.subarray(0, 24)]));
    expect(frames[0]!.payload).toEqual(body.subarray(24));
    expect(frames[1]!.header).toEqual(drbd(7, small));
    expect(frames[1]!.payload).toBeUndefined();
    expect(frames[2]!.header).toEqual(drbd(9, Buffer.alloc(0)));
  });

  it('drops a payload beyond the limit, says so, and goes on', async () => {
    const frames = await deliver(NBD, [nbd(1, 300_000, pattern(300_000, 1)), nbd(0, 1)], 2);
    expect(frames[0]).toMatchObject({ payload: undefined, payloadLength: 300_000, flags: FRAME_SKIPPED });
    expect(frames[0]!.header).toEqual(nbd(1, 300_000));
    expect(frames[1]).toMatchObject({ flags: 0 });
  });

  it('closes on a length beyond the hard cap, without waiting for the bytes', async () => {
    expect((await breaks(NBD, nbd(1, 1024 * 1024 + 1))).closedWith).toBe(EMSGSIZE);
    expect((await breaks(NBD, nbd(1, 0xffffffff))).closedWith).toBe(EMSGSIZE);
  });

  it('closes on wrong magic at the first wrong byte', async () => {
    const recorder = await breaks(NBD, Buffer.from([0x25, 0x60, 0x96]));
    expect(recorder.closedWith).toBe(EPROTO);
    expect(recorder.frames).toEqual([]);
  });

  it('delivers what came before a broken frame', async () => {
    const recorder = await breaks(NBD, Buffer.concat([nbd(0, 1), nbd(1, 3, pattern(3, 0)), Buffer.alloc(28)]));
    expect(recorder.frames.length).toBe(2);
    expect(recorder.closedWith).toBe(EPROTO);
  });

  it('joins record fragments wherever the stream is cut', async () => {
    const record = pattern(30, 5);
    const stream = Buffer.concat([
      fragment(record.subarray(0, 10), false),
      fragment(Buffer.alloc(0), false),
      fragment(record.subarray(10, 11), false),
      fragment(record.subarray(11), true),
      fragment(record, true),
    ]);
    const ring = make();
    const recorder = new Recorder(ring);
    const { clientSide } = await connectedPair(ring, RECORDS, recorder, new Recorder(ring));
    for (let cut = 1; cut < stream.length; cut++) {
      clientSide.sendBytes(stream.subarray(0, cut));
      await turn();
      clientSide.sendBytes(stream.subarray(cut));
      await recorder.until((all) => all.frames.length >= 2);
      for (const frame of recorder.frames.splice(0)) expect(frame.payload).toEqual(record);
    }
  });

  it('grows records of any size as they arrive', async () => {
    const sizes = [1, 65535, 65536, 65537, 70_000, 1024 * 1024];
    const records = sizes.map((size, index) => pattern(size, index));
    const frames = await deliver(
      RECORDS,
      [Buffer.concat(records.map((record) => fragment(record, true)))],
      sizes.length,
    );
    frames.forEach((frame, index) => {
      expect(frame.payload!.equals(records[index]!)).toBe(true);
    });
    const parts = Array.from({ length: 15 }, (_, index) => pattern(60_000 + index, index));
    const split = await deliver(RECORDS, [Buffer.concat(parts.map((part, index) => fragment(part, index === 14)))], 1);
    expect(split[0]!.payload!.equals(Buffer.concat(parts))).toBe(true);
  });

  it('takes little memory for a record that only announces to be long', async () => {
    const ring = make();
    const recorder = new Recorder(ring);
    const { clientSide } = await connectedPair(ring, RECORDS, recorder, new Recorder(ring));
    clientSide.sendBytes(fragment(pattern(1024 * 1024, 1), true).subarray(0, 1000));
    for (let count = 0; count < 20; count++) await turn();
    expect(ring.usedBytes).toBeGreaterThan(0);
    expect(ring.usedBytes).toBeLessThanOrEqual(64 * 1024);
  });

  it('closes on hostile record marks', async () => {
    const mark = (value: number) => {
      const bytes = Buffer.alloc(4);
      bytes.writeUInt32BE(value >>> 0);
      return bytes;
    };
    // Too long at once, too long in sum, too many fragments, empty fragments for ever, empty records.
    expect((await breaks(RECORDS, mark(0xffffffff))).closedWith).toBe(EMSGSIZE);
    expect((await breaks(RECORDS, mark(0x80000000 + 1024 * 1024 + 1))).closedWith).toBe(EMSGSIZE);
    const half = pattern(600 * 1024, 1);
    expect((await breaks(RECORDS, Buffer.concat([fragment(half, false), mark(600 * 1024)]))).closedWith).toBe(EMSGSIZE);
    const bits = Array.from({ length: 17 }, () => fragment(Buffer.from([1]), false));
    expect((await breaks(RECORDS, Buffer.concat(bits))).closedWith).toBe(EMSGSIZE);
    expect((await breaks(RECORDS, Buffer.alloc(4 * 17))).closedWith).toBe(EMSGSIZE);
    expect((await breaks(RECORDS, mark(0x80000000))).closedWith).toBe(EPROTO);
  });

  it('tells a torn frame from an orderly end', async () => {
    for (const [bytes, errno] of [
      [nbd(0, 1), 0],
      [nbd(0, 1).subarray(0, 20), ECONNRESET],
      [nbd(1, 100, pattern(50, 1)), ECONNRESET],
    ] as const) {
      const ring = make();
      const recorder = new Recorder(ring);
      const { clientSide } = await connectedPair(ring, NBD, recorder, new Recorder(ring));
      clientSide.sendBytes(bytes);
      clientSide.end();
      await recorder.until((all) => all.closedCount > 0);
      expect(recorder.closedWith).toBe(errno);
      expect(ring.usedBytes).toBe(0);
    }
  });

  it('switches from raw to frames inside the bytes of one delivery', async () => {
    const ring = make();
    const got: Frame[] = [];
    let raw = '';
    const accepted = new Promise<void>((resolve) => {
      const listener = ring.listenTcp('127.0.0.1', 0, (connection) => {
        let framed = false;
        connection.setHandler({
          frame(view, at, length, payload, payloadLength) {
            const bytes =
              payload < 0 ? Buffer.alloc(0) : Buffer.from(ring.memory.bytes.subarray(payload, payload + payloadLength));
            if (payload >= 0) ring.memory.release(payload);
            if (!framed) {
              raw += bytes.subarray(0, 5).toString();
              connection.setFraming(NBD, bytes.subarray(5));
              framed = true;
              return;
            }
            const header = Buffer.from(Buffer.from(view.buffer, view.byteOffset + at, length));
            got.push({ header, payload: bytes, payloadLength, flags: 0 });
            if (got.length === 3) resolve();
          },
          closed() {},
          drained() {},
        });
      });
      ring.connectTcp('127.0.0.1', listener.port, { timeoutMs: 1000 }, (connection) => {
        connection!.setHandler(new Recorder(ring));
        connection!.sendBytes(
          Buffer.concat([Buffer.from('hello'), nbd(0, 1), nbd(1, 4, pattern(4, 4)), nbd(1, 9, pattern(9, 9))]),
        );
      });
    });
    await accepted;
    expect(raw).toBe('hello');
    expect(got.map((frame) => frame.payload!.length)).toEqual([0, 4, 9]);
    expect(got[2]!.payload).toEqual(pattern(9, 9));
  });

  it('takes bytes back also later, while a receive is already under way', async () => {
    const ring = make();
    const server = new Recorder(ring);
    const { serverSide, clientSide } = await connectedPair(ring, { kind: 'raw' }, server, new Recorder(ring));
    const stream = Buffer.concat([Buffer.from('login'), nbd(1, 6, pattern(6, 6)), nbd(0, 1).subarray(0, 10)]);
    clientSide.sendBytes(stream);
    await server.until((all) => all.text.length === stream.length);
    await turn();
    await turn();
    server.frames.splice(0);
    serverSide.setFraming(NBD, stream.subarray(5));
    await server.until((all) => all.frames.length === 1);
    expect(server.frames[0]!.payload).toEqual(pattern(6, 6));
    clientSide.sendBytes(nbd(0, 1).subarray(10));
    await server.until((all) => all.frames.length === 2);
    expect(server.frames[1]!.header).toEqual(nbd(0, 1));
  });
});
