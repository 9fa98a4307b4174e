import { describe, expect, it } from 'vitest';
import { ProtocolError } from '../../src/base/errors.js';
import { IntervalSet } from '../../src/replication/interval-set.js';
import { ReceivingEpochs } from '../../src/replication/receiving-epochs.js';
import { RequestTable } from '../../src/replication/request.js';
import { ResyncExtents } from '../../src/replication/resync-extents.js';
import { TransferLog } from '../../src/replication/transfer-log.js';

const MAX_EPOCH = 2048;

function logWith(epochs: readonly number[]) {
  const table = new RequestTable<object>(100);
  const log = new TransferLog<object>();
  const barriers: number[] = [];
  for (const writes of epochs) {
    for (let index = 0; index < writes; index++) {
      const request = table.allocate()!;
      log.admit(request, MAX_EPOCH);
      const due = log.dueBarrier(request.epoch);
      if (due !== 0) {
        barriers.push(due);
        log.barrierSent();
      }
      log.writeSent(request);
    }
    log.closeEpoch();
  }
  return { log, table, barriers };
}

describe('transfer log', () => {
  it('sends no barrier before the first write and one before the first write of another epoch', () => {
    const { log, barriers } = logWith([2, 1]);
    expect(barriers).toEqual([1]);
    expect(log.dueBarrier(log.currentEpoch)).toBe(2);
    expect(log.pendingBarriers).toBe(1);
  });

  it('closes no empty epoch', () => {
    const { log } = logWith([1]);
    const epoch = log.currentEpoch;
    log.closeEpoch();
    log.closeEpoch();
    expect(log.currentEpoch).toBe(epoch);
  });

  it('starts a new epoch at max-epoch-size', () => {
    const table = new RequestTable<object>(10);
    const log = new TransferLog<object>();
    const epochs = Array.from({ length: 5 }, () => {
      const request = table.allocate()!;
      log.admit(request, 2);
      return request.epoch;
    });
    expect(epochs).toEqual([1, 1, 2, 2, 3]);
  });

  it('refuses an acknowledgement of another number, another size, or of nothing', () => {
    const { log } = logWith([2, 1]);
    expect(() => log.barrierAcked(1, 3)).toThrow(ProtocolError);
    expect(() => log.barrierAcked(2, 1)).toThrow(ProtocolError);
    log.barrierAcked(1, 2);
    expect(() => log.barrierAcked(2, 1)).toThrow(/none is outstanding/);
  });

  it('knows which epochs are still open at the peer', () => {
    const { log } = logWith([1, 1]);
    expect(log.isOpen(1)).toBe(true);
    log.remove(log.head!);
    expect(log.isOpen(1)).toBe(false);
    expect(log.isOpen(2)).toBe(true);
  });
});

describe('receiving epochs', () => {
  const acknowledged = (epochs: ReceivingEpochs, covered: number) => {
    const got: [number, number][] = [];
    epochs.takeAcknowledged(covered, (barrier, size) => got.push([barrier, size]));
    return got;
  };

  it('acknowledges an epoch only when its barrier is here and its writes are done', () => {
    const epochs = new ReceivingEpochs();
    const first = epochs.writeReceived();
    epochs.writeReceived();
    epochs.barrierReceived(77);
    epochs.writeDone(first);
    expect(epochs.wantsFlush).toBe(false);
    epochs.writeDone(first);
    expect(epochs.wantsFlush).toBe(true);
    expect(acknowledged(epochs, epochs.flushStarted())).toEqual([[77, 2]]);
    expect(epochs.wantsFlush).toBe(false);
  });

  it('one flush serves every epoch that was ready when it began, and none that became ready later', () => {
    const epochs = new ReceivingEpochs();
    for (const barrier of [1, 2]) {
      epochs.writeDone(epochs.writeReceived());
      epochs.barrierReceived(barrier);
    }
    const covered = epochs.flushStarted();
    epochs.writeDone(epochs.writeReceived());
    epochs.barrierReceived(3);
    expect(acknowledged(epochs, covered)).toEqual([
      [1, 1],
      [2, 1],
    ]);
    expect(acknowledged(epochs, epochs.flushStarted())).toEqual([[3, 1]]);
  });

  it('keeps the order when a later epoch is done first', () => {
    const epochs = new ReceivingEpochs();
    const slow = epochs.writeReceived();
    epochs.barrierReceived(1);
    epochs.writeDone(epochs.writeReceived());
    epochs.barrierReceived(2);
    expect(epochs.wantsFlush).toBe(false);
    epochs.writeDone(slow);
    expect(acknowledged(epochs, epochs.flushStarted()).map(([barrier]) => barrier)).toEqual([1, 2]);
  });
});

describe('interval set', () => {
  it('a write waits for older ones that overlap it, also for those that wait themselves', () => {
    const set = new IntervalSet();
    const first = set.insert(0, 10);
    const second = set.insert(5, 20);
    const third = set.insert(15, 30);
    const apart = set.insert(30, 40);
    expect(set.isBlocked(0, 10, first)).toBe(false);
    expect(set.isBlocked(5, 20, second)).toBe(true);
    expect(set.isBlocked(15, 30, third)).toBe(true);
    expect(set.isBlocked(30, 40, apart)).toBe(false);
    set.remove(first);
    expect(set.isBlocked(5, 20, second)).toBe(false);
    expect(set.isBlocked(15, 30, third)).toBe(true);
    expect(() => set.remove(first)).toThrow();
  });
});

describe('resync extents', () => {
  it('refuse writes into the four activity log extents from the first reference to the last', () => {
    const extents = new ResyncExtents();
    expect(extents.refusesWrite(4)).toBe(false);
    extents.enter(1);
    extents.enter(1);
    expect([3, 4, 7, 8].map((extent) => extents.refusesWrite(extent))).toEqual([false, true, true, false]);
    expect(extents.isWanted(1)).toBe(true);
    expect(extents.leave(1)).toBe(false);
    expect(extents.refusesWrite(4)).toBe(true);
    expect(extents.leave(1)).toBe(true);
    expect(extents.refusesWrite(4)).toBe(false);
  });

  it('takes at most half of the 61 elements', () => {
    const extents = new ResyncExtents();
    const taken = Array.from({ length: 61 }, (_, extent) => extents.enter(extent)).filter(Boolean);
    expect(taken).toHaveLength(30);
  });
});
