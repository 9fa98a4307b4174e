import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { RangeLock } from '../../src/nbd/range-lock.js';

function recorded(): { lock: RangeLock; granted: number[] } {
  const granted: number[] = [];
  return { lock: new RangeLock((id) => granted.push(id)), granted };
}

describe('range lock', () => {
  it('writes of whole sectors never wait for each other', () => {
    const { lock } = recorded();
    expect([lock.acquire(0, 0, 512, false), lock.acquire(1, 0, 512, false)]).toEqual([true, true]);
  });

  it('a read-modify-write waits for overlapping writes, and they for it', () => {
    const { lock, granted } = recorded();
    expect(lock.acquire(0, 0, 1024, false)).toBe(true);
    expect(lock.acquire(1, 512, 1536, true)).toBe(false);
    expect(lock.acquire(2, 1024, 2048, false)).toBe(false);
    expect(lock.acquire(3, 2048, 4096, true)).toBe(true);
    lock.release(0);
    expect(granted).toEqual([1]);
    lock.release(1);
    expect(granted).toEqual([1, 2]);
    lock.release(2);
    lock.release(3);
    expect(lock.isIdle).toBe(true);
  });

  it('ranges that only touch do not overlap', () => {
    const { lock } = recorded();
    expect([lock.acquire(0, 0, 512, true), lock.acquire(1, 512, 1024, true)]).toEqual([true, true]);
  });

  it('nobody overtakes an overlapping waiter', () => {
    const { lock, granted } = recorded();
    lock.acquire(0, 0, 512, false);
    expect(lock.acquire(1, 0, 1024, true)).toBe(false);
    // Overlaps only the waiter.
    expect(lock.acquire(2, 512, 1024, false)).toBe(false);
    lock.release(0);
    lock.release(1);
    expect(granted).toEqual([1, 2]);
  });

  it('who gives up waiting makes room', () => {
    const { lock, granted } = recorded();
    lock.acquire(0, 0, 512, false);
    lock.acquire(1, 0, 1024, true);
    lock.acquire(2, 0, 1024, false);
    lock.release(1);
    expect(granted).toEqual([2]);
  });

  it('a grantee may release at once', () => {
    const granted: number[] = [];
    const lock: RangeLock = new RangeLock((id) => {
      granted.push(id);
      if (id < 9) lock.release(id);
    });
    lock.acquire(0, 0, 10, true);
    for (let id = 1; id < 10; id++) expect(lock.acquire(id, 0, 10, true)).toBe(false);
    lock.release(0);
    expect(granted).toEqual([1, 2, 3, 4, 5, 6, 7, 8, 9]);
  });

  it('refuses a second range for one request and a release of none', () => {
    const { lock } = recorded();
    lock.acquire(0, 0, 512, false);
    expect(() => lock.acquire(0, 512, 1024, false)).toThrow('one range');
    expect(() => lock.release(1)).toThrow('not held');
    expect(() => lock.acquire(1, 5, 5, false)).toThrow('length');
  });

  it('holds nothing that conflicts, forgets nobody, and keeps the order of overlapping requests', () => {
    const step = fc.oneof(
      fc.record({
        kind: fc.constant('acquire' as const),
        start: fc.nat(12),
        length: fc.integer({ min: 1, max: 5 }),
        exclusive: fc.boolean(),
      }),
      fc.record({ kind: fc.constant('release' as const), pick: fc.nat(1000) }),
    );
    fc.assert(
      fc.property(fc.array(step, { maxLength: 80 }), (steps) => {
        interface Holder {
          id: number;
          start: number;
          end: number;
          exclusive: boolean;
        }
        const held: Holder[] = [];
        const waiting: Holder[] = [];
        let count = 0;
        const conflict = (a: Holder, b: Holder) => (a.exclusive || b.exclusive) && a.start < b.end && b.start < a.end;
        const hold = (holder: Holder) => {
          for (const other of held) expect(conflict(holder, other)).toBe(false);
          held.push(holder);
        };
        const lock = new RangeLock((id) => {
          const index = waiting.findIndex((holder) => holder.id === id);
          const holder = waiting[index]!;
          for (const earlier of waiting.slice(0, index)) expect(conflict(holder, earlier)).toBe(false);
          waiting.splice(index, 1);
          hold(holder);
        });
        // Whoever could run, runs: nobody waits without a conflict.
        const nobodyForgotten = () => {
          waiting.forEach((holder, index) => {
            const inTheWay = [...held, ...waiting.slice(0, index)].some((other) => conflict(holder, other));
            expect(inTheWay).toBe(true);
          });
        };
        for (const step of steps) {
          if (step.kind === 'acquire') {
            const holder = { id: count++, start: step.start, end: step.start + step.length, exclusive: step.exclusive };
            if (lock.acquire(holder.id, holder.start, holder.end, holder.exclusive)) hold(holder);
            else waiting.push(holder);
          } else {
            const all = [...held, ...waiting];
            if (all.length === 0) continue;
            const gone = all[step.pick % all.length]!;
            for (const list of [held, waiting]) if (list.includes(gone)) list.splice(list.indexOf(gone), 1);
            lock.release(gone.id);
          }
          nobodyForgotten();
        }
        while (held.length > 0) lock.release(held.shift()!.id);
        expect(waiting).toEqual([]);
        expect(lock.isIdle).toBe(true);
      }),
      { numRuns: 300 },
    );
  });
});
