//! Striped per-inode locks: what makes `wcc_data.before` atomic with its operation (RFC 1813 section 2.6). Bounded: two
//! inodes may share a stripe, which costs waiting and nothing else.

use std::sync::{Mutex, MutexGuard};

const STRIPES: usize = 512;

pub struct InodeLocks(Box<[Mutex<()>]>);

/// Held stripes: one, or two taken in ascending order.
pub struct Held<'a>(#[allow(dead_code)] MutexGuard<'a, ()>, #[allow(dead_code)] Option<MutexGuard<'a, ()>>);

impl InodeLocks {
    pub fn new() -> InodeLocks {
        InodeLocks((0..STRIPES).map(|_| Mutex::new(())).collect())
    }

    fn stripe(inode: u64) -> usize {
        (inode.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as usize % STRIPES
    }

    fn take(&self, stripe: usize) -> MutexGuard<'_, ()> {
        self.0[stripe].lock().expect("never poisoned: panics abort")
    }

    pub fn one(&self, inode: u64) -> Held<'_> {
        Held(self.take(Self::stripe(inode)), None)
    }

    /// Both, in the order that every caller uses, so that two renames cannot wait for each other.
    pub fn two(&self, left: u64, right: u64) -> Held<'_> {
        let (left, right) = (Self::stripe(left), Self::stripe(right));
        let low = self.take(left.min(right));
        Held(low, (left != right).then(|| self.take(left.max(right))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opposite_pairs_do_not_deadlock_and_equal_stripes_lock_once() {
        let locks = InodeLocks::new();
        drop(locks.two(5, 5));
        std::thread::scope(|scope| {
            for (left, right) in [(12u64, 13u64), (13, 12)] {
                let locks = &locks;
                scope.spawn(move || (0..20_000).for_each(|_| drop(locks.two(left, right))));
            }
        });
    }
}
