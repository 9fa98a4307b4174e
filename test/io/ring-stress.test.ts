import * as fc from 'fast-check';
import { expect, it } from 'vitest';
import type { Connection, FrameRule } from '../../src/io/ring.js';
import { connectedPair, describeRing, Recorder } from '../support/rings.js';

const RECORDS: FrameRule = { kind: 'record', maxRecordBytes: 256 * 1024, maxFragments: 8 };

type Step =
  | { readonly kind: 'send'; readonly lengthBytes: number; readonly payloadBytes: number }
  | { readonly kind: 'pause' | 'resume' | 'turn' | 'closeClient' | 'closeServer' | 'endClient' };

const step: fc.Arbitrary<Step> = fc.oneof(
  {
    weight: 6,
    arbitrary: fc.record({
      kind: fc.constant('send' as const),
      lengthBytes: fc.oneof(fc.nat(200), fc.nat(70_000)),
      payloadBytes: fc.oneof(fc.constant(0), fc.nat(200_000)),
    }),
  },
  { weight: 2, arbitrary: fc.constant({ kind: 'turn' as const }) },
  {
    weight: 1,
    arbitrary: fc.constantFrom(
      { kind: 'pause' as const },
      { kind: 'resume' as const },
      { kind: 'closeClient' as const },
      { kind: 'closeServer' as const },
      { kind: 'endClient' as const },
    ),
  },
);

const turn = () => new Promise<void>((resolve) => setTimeout(resolve, 1));

describeRing('any sequence of sends, pauses and closes', (make) => {
  it('delivers a prefix of the records in order, ends once, and leaves no block behind', async () => {
    const ring = make(32 * 1024 * 1024);
    await fc.assert(
      fc.asyncProperty(fc.array(step, { maxLength: 40 }), async (steps) => {
        const server = new Recorder(ring);
        const client = new Recorder(ring);
        const { serverSide, clientSide } = await connectedPair(ring, RECORDS, server, client);
        const sent: { length: number; mark: number }[] = [];
        let closed = false;
        for (const next of steps) {
          if (next.kind === 'send') {
            const mark = (sent.length % 255) + 1;
            const length = next.lengthBytes + next.payloadBytes;
            if (length === 0 || length > 256 * 1024) continue;
            const head = Buffer.alloc(4 + next.lengthBytes, mark);
            head.writeUInt32BE((0x80000000 | length) >>> 0);
            clientSide.sendBytes(head);
            if (next.payloadBytes > 0) {
              const block = ring.memory.allocate(next.payloadBytes);
              expect(block).toBeGreaterThanOrEqual(0);
              ring.memory.bytes.fill(mark, block, block + next.payloadBytes);
              clientSide.send(Buffer.alloc(0), 0, block, next.payloadBytes);
              ring.memory.release(block);
            }
            if (!closed) sent.push({ length, mark });
          } else if (next.kind === 'turn') await turn();
          else if (next.kind === 'pause') serverSide.pause();
          else if (next.kind === 'resume') serverSide.resume();
          else {
            if (next.kind === 'closeClient') clientSide.close();
            else if (next.kind === 'closeServer') serverSide.close();
            else clientSide.end();
            closed = true;
          }
        }
        serverSide.resume();
        const orderly = !closed;
        if (orderly) {
          await server.until((all) => all.frames.length === sent.length);
          clientSide.close();
        }
        const both: Connection[] = [clientSide, serverSide];
        if (closed) await turn();
        for (const side of both) side.close();
        await client.until((all) => all.closedCount > 0);
        await server.until((all) => all.closedCount > 0);
        await turn();
        expect([client.closedCount, server.closedCount]).toEqual([1, 1]);
        expect(server.frames.length).toBeLessThanOrEqual(sent.length);
        server.frames.forEach((frame, index) => {
          expect(frame.payloadLength).toBe(sent[index]!.length);
          expect(frame.payload!.every((byte) => byte === sent[index]!.mark)).toBe(true);
        });
        expect(ring.usedBytes).toBe(0);
      }),
      { numRuns: 150 },
    );
  }, 60_000);
});
