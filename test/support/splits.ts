import assert from 'node:assert/strict';

/** A byte stream must mean the same however it is cut: whole, at every place in two, and byte by byte. */
export function assertSameForEverySplit<T>(bytes: Uint8Array, parse: (chunks: readonly Uint8Array[]) => T): T {
  const whole = parse([bytes]);
  for (let cut = 1; cut < bytes.length; cut++)
    assert.deepEqual(parse([bytes.subarray(0, cut), bytes.subarray(cut)]), whole, `cut at byte ${cut}`);
  assert.deepEqual(parse(Array.from(bytes, (byte) => Uint8Array.of(byte))), whole, 'byte by byte');
  return whole;
}
