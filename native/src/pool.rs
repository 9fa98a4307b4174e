//! The buffer pool: one anonymous mapping cut by a buddy allocator into blocks of 4 KiB to 64 MiB.
//!
//! A block is named by its byte offset. Reference counts live in an array that JavaScript shares, so that
//! `retain` and `release` cost no call; small free blocks go through magazines (little stacks) in the same shared
//! array, which belong to the ring's thread alone. The buddy lists behind them are locked, so that worker threads
//! may allocate too.

use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use crate::completer::Completer;
use crate::process::lock_range;

pub const PAGE_BYTES: usize = 4096;
const PAGE_SHIFT: usize = 12;
/// Largest block: 2^14 pages of 4 KiB are 64 MiB.
const MAX_ORDER: usize = 14;
/// Blocks above this (1 MiB) are given back to the kernel when freed.
const KEEP_ORDER: usize = 8;
/// Magazines serve blocks of 4, 8, 16, 32 and 64 KiB.
pub const MAGAZINE_ORDERS: usize = 5;
pub const MAGAZINE_ENTRIES: usize = 64;
/// Shared words per magazine: the count, then page numbers.
pub const MAGAZINE_WORDS: usize = MAGAZINE_ENTRIES + 1;
/// Offsets are handed to JavaScript as 32-bit integers.
pub const MAX_POOL_BYTES: usize = 1 << 31;

const NONE: u32 = u32::MAX;

/// Free lists of the buddy system. Indices are page numbers.
struct Buddy {
    heads: [u32; MAX_ORDER + 1],
    next: Vec<u32>,
    previous: Vec<u32>,
    /// One more than the order of the free block that starts at this page; 0 where none starts.
    free_order: Vec<u8>,
    free_pages: usize,
}

impl Buddy {
    fn new(pages: usize) -> Buddy {
        let mut buddy = Buddy {
            heads: [NONE; MAX_ORDER + 1],
            // Zeroed memory is only touched when used, so a large pool costs nothing up front.
            next: vec![0; pages],
            previous: vec![0; pages],
            free_order: vec![0; pages],
            free_pages: 0,
        };
        let mut blocks = Vec::new();
        let mut page = 0;
        while page < pages {
            let mut order = MAX_ORDER;
            while page & ((1 << order) - 1) != 0 || page + (1 << order) > pages {
                order -= 1;
            }
            blocks.push((page as u32, order));
            page += 1 << order;
        }
        // Low addresses first in the lists: keeps the touched part of the pool small.
        for (page, order) in blocks.into_iter().rev() {
            buddy.insert(page, order);
            buddy.free_pages += 1 << order;
        }
        buddy
    }

    fn insert(&mut self, page: u32, order: usize) {
        let head = self.heads[order];
        self.next[page as usize] = head;
        self.previous[page as usize] = NONE;
        if head != NONE {
            self.previous[head as usize] = page;
        }
        self.heads[order] = page;
        self.free_order[page as usize] = order as u8 + 1;
    }

    fn remove(&mut self, page: u32, order: usize) {
        let (next, previous) = (self.next[page as usize], self.previous[page as usize]);
        if previous == NONE {
            self.heads[order] = next;
        } else {
            self.next[previous as usize] = next;
        }
        if next != NONE {
            self.previous[next as usize] = previous;
        }
        self.free_order[page as usize] = 0;
    }

    fn allocate(&mut self, order: usize) -> Option<u32> {
        let mut found = order;
        while found <= MAX_ORDER && self.heads[found] == NONE {
            found += 1;
        }
        if found > MAX_ORDER {
            return None;
        }
        let page = self.heads[found];
        self.remove(page, found);
        while found > order {
            found -= 1;
            self.insert(page + (1 << found), found);
        }
        self.free_pages -= 1 << order;
        Some(page)
    }

    fn free(&mut self, mut page: u32, mut order: usize) {
        self.free_pages += 1 << order;
        while order < MAX_ORDER {
            let buddy = page ^ (1 << order);
            if buddy as usize + (1 << order) > self.free_order.len()
                || self.free_order[buddy as usize] != order as u8 + 1
            {
                break;
            }
            self.remove(buddy, order);
            page = page.min(buddy);
            order += 1;
        }
        self.insert(page, order);
    }
}

/// The mapping and its allocator. Shared by the ring, worker threads and the ArrayBuffers that JavaScript holds;
/// unmapped when the last of them lets go.
pub struct Pool {
    base: *mut u8,
    length: usize,
    /// Shared with JavaScript: reference counts per page, then magazines, then block orders (bytes). One mapping.
    control: *mut u8,
    control_bytes: usize,
    buddy: Mutex<Buddy>,
    /// A connection waits for memory: freeing must wake the ring.
    pub starved: AtomicBool,
    /// Wakes the ring when a block is freed while `starved`; none once the ring is closed.
    waker: Mutex<Option<Completer>>,
}

// The raw pointers name mappings that live as long as the Pool; the buddy lists are locked, counts are atomic, and the
// magazines are touched by the ring's thread alone (Pool::allocate and free_from_ring, which PoolHandle does not
// expose).
unsafe impl Send for Pool {}
unsafe impl Sync for Pool {}

/// Address and length of every pool of this process, and whether they are to be locked.
struct Registry {
    pools: Vec<(usize, usize)>,
    locked: bool,
}

static REGISTRY: Mutex<Registry> = Mutex::new(Registry { pools: Vec::new(), locked: false });

/// Keeps touched pages of every pool in memory, also of those made later. Returns 0 or an errno.
pub fn lock_pools() -> i32 {
    let mut registry = REGISTRY.lock().expect("never poisoned: panics abort");
    registry.locked = true;
    let results = registry.pools.iter().map(|&(base, length)| lock_range(base as *const libc::c_void, length));
    results.fold(0, |first, errno| if first == 0 { errno } else { first })
}

fn map_anonymous(bytes: usize) -> *mut u8 {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a fresh anonymous mapping; nothing existing is touched.
    let base = unsafe { libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    assert!(base != libc::MAP_FAILED, "mmap of {bytes} bytes failed: {}", std::io::Error::last_os_error());
    base.cast()
}

impl Pool {
    /// `length` is rounded down to whole pages.
    pub fn new(length: usize) -> Pool {
        let length = length & !(PAGE_BYTES - 1);
        assert!((PAGE_BYTES..=MAX_POOL_BYTES).contains(&length), "pool of {length} bytes");
        let pages = length >> PAGE_SHIFT;
        let control_bytes = pages * 4 + MAGAZINE_ORDERS * MAGAZINE_WORDS * 4 + pages;
        let base = map_anonymous(length);
        // Payloads of 1 MiB are copied somewhat faster with fewer, larger pages. A refusal only costs that.
        // SAFETY: advice about our own fresh mapping.
        unsafe { libc::madvise(base.cast(), length, libc::MADV_HUGEPAGE) };
        let mut registry = REGISTRY.lock().expect("never poisoned: panics abort");
        registry.pools.push((base as usize, length));
        if registry.locked {
            // A refusal was reported by lock_pools already; the limit is the same now.
            lock_range(base.cast(), length);
        }
        drop(registry);
        Pool {
            base,
            length,
            control: map_anonymous(control_bytes),
            control_bytes,
            buddy: Mutex::new(Buddy::new(pages)),
            starved: AtomicBool::new(false),
            waker: Mutex::new(None),
        }
    }

    pub fn base(&self) -> *mut u8 {
        self.base
    }

    pub fn length(&self) -> usize {
        self.length
    }

    pub fn control(&self) -> (*mut u8, usize) {
        (self.control, self.control_bytes)
    }

    pub fn set_waker(&self, completer: Option<Completer>) {
        *self.waker.lock().expect("never poisoned: panics abort") = completer;
    }

    fn pages(&self) -> usize {
        self.length >> PAGE_SHIFT
    }

    fn count(&self, page: u32) -> &AtomicI32 {
        assert!((page as usize) < self.pages(), "page {page} is outside the pool");
        // SAFETY: inside the control mapping, 4-aligned, and only ever accessed atomically.
        unsafe { &*self.control.cast::<AtomicI32>().add(page as usize) }
    }

    fn order(&self, page: u32) -> *mut u8 {
        // SAFETY: the orders are the last `pages` bytes of the control mapping.
        unsafe { self.control.add(self.pages() * 4 + MAGAZINE_ORDERS * MAGAZINE_WORDS * 4 + page as usize) }
    }

    fn magazine(&self, order: usize) -> *mut i32 {
        // SAFETY: the magazines follow the counts.
        unsafe { self.control.add(self.pages() * 4).cast::<i32>().add(order * MAGAZINE_WORDS) }
    }

    fn lock(&self) -> MutexGuard<'_, Buddy> {
        self.buddy.lock().expect("the pool's lock is never poisoned: panics abort")
    }

    fn order_for(length: usize) -> Option<usize> {
        let pages = length.max(1).div_ceil(PAGE_BYTES);
        let order = pages.next_power_of_two().trailing_zeros() as usize;
        (order <= MAX_ORDER).then_some(order)
    }

    fn claim(&self, page: u32, order: usize) -> usize {
        let before = self.count(page).swap(1, Ordering::AcqRel);
        assert!(before == 0, "a free block at page {page} had {before} references");
        // SAFETY: this block is ours alone from here on.
        unsafe { *self.order(page) = order as u8 };
        (page as usize) << PAGE_SHIFT
    }

    /// Any thread. One reference belongs to the caller.
    fn allocate_shared(&self, length: usize) -> Option<usize> {
        let order = Self::order_for(length)?;
        let page = self.lock().allocate(order)?;
        Some(self.claim(page, order))
    }

    /// The ring's thread only: may empty the magazines when the buddy lists have nothing left.
    pub fn allocate(&self, length: usize) -> Option<usize> {
        let order = Self::order_for(length)?;
        if order < MAGAZINE_ORDERS {
            let magazine = self.magazine(order);
            // SAFETY: magazines belong to this thread.
            unsafe {
                if *magazine > 0 {
                    *magazine -= 1;
                    let page = *magazine.add(1 + *magazine as usize) as u32;
                    return Some(self.claim(page, order));
                }
            }
        }
        if let Some(offset) = self.allocate_shared(length) {
            return Some(offset);
        }
        self.empty_magazines();
        self.allocate_shared(length)
    }

    fn empty_magazines(&self) {
        let mut buddy = self.lock();
        for order in 0..MAGAZINE_ORDERS {
            let magazine = self.magazine(order);
            // SAFETY: magazines belong to this thread.
            unsafe {
                while *magazine > 0 {
                    *magazine -= 1;
                    buddy.free(*magazine.add(1 + *magazine as usize) as u32, order);
                }
            }
        }
    }

    /// Puts a block whose last reference is gone back into the buddy lists. Any thread.
    pub fn free(&self, offset: usize) {
        let page = (offset >> PAGE_SHIFT) as u32;
        assert!(self.count(page).load(Ordering::Acquire) == 0, "freeing the block at {offset}, which is in use");
        // SAFETY: no one else holds this block.
        let order = unsafe { *self.order(page) } as usize;
        if order > KEEP_ORDER {
            self.give_back(offset, PAGE_BYTES << order);
        }
        self.lock().free(page, order);
        if self.starved.load(Ordering::Acquire) {
            if let Some(completer) = &*self.waker.lock().expect("never poisoned: panics abort") {
                completer.wake();
            }
        }
    }

    fn give_back(&self, offset: usize, length: usize) {
        // 24 is MADV_DONTNEED_LOCKED (Linux 5.18), which also works on memory under mlockall.
        // SAFETY: a free block inside the mapping; its contents may become zeroes.
        unsafe {
            if libc::madvise(self.base.add(offset).cast(), length, 24) != 0 {
                // Refused for locked memory on older kernels: the block then stays resident, which is only a cost.
                libc::madvise(self.base.add(offset).cast(), length, libc::MADV_DONTNEED);
            }
        }
    }

    pub fn retain(&self, offset: usize) {
        let before = self.count((offset >> PAGE_SHIFT) as u32).fetch_add(1, Ordering::AcqRel);
        assert!(before > 0, "retain of the free block at {offset}");
    }

    /// Any thread.
    pub fn release(&self, offset: usize) {
        let before = self.count((offset >> PAGE_SHIFT) as u32).fetch_sub(1, Ordering::AcqRel);
        assert!(before > 0, "release of the free block at {offset}");
        if before == 1 {
            self.free(offset);
        }
    }

    /// The ring's thread only: small blocks go to the magazine.
    pub fn release_from_ring(&self, offset: usize) {
        let page = (offset >> PAGE_SHIFT) as u32;
        let before = self.count(page).fetch_sub(1, Ordering::AcqRel);
        assert!(before > 0, "release of the free block at {offset}");
        if before > 1 {
            return;
        }
        // SAFETY: no one else holds this block; magazines belong to this thread.
        unsafe {
            let order = *self.order(page) as usize;
            if order < MAGAZINE_ORDERS && !self.starved.load(Ordering::Acquire) {
                let magazine = self.magazine(order);
                if (*magazine as usize) < MAGAZINE_ENTRIES {
                    *magazine.add(1 + *magazine as usize) = page as i32;
                    *magazine += 1;
                    return;
                }
            }
        }
        self.free(offset);
    }

    /// Bytes in blocks that are neither free nor in a magazine. The ring's thread only.
    pub fn used_bytes(&self) -> usize {
        let free_pages = self.lock().free_pages;
        let cached: usize = (0..MAGAZINE_ORDERS)
            // SAFETY: magazines belong to this thread.
            .map(|order| (unsafe { *self.magazine(order) } as usize) << order)
            .sum();
        self.length - ((free_pages + cached) << PAGE_SHIFT)
    }

    /// Checks that a range lies inside the pool and returns its start.
    pub fn range(&self, offset: usize, length: usize) -> *mut u8 {
        assert!(
            offset.checked_add(length).is_some_and(|end| end <= self.length),
            "range {offset}+{length} is outside the pool"
        );
        // SAFETY: checked just above.
        unsafe { self.base.add(offset) }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let mut registry = REGISTRY.lock().expect("never poisoned: panics abort");
        registry.pools.retain(|&(base, _)| base != self.base as usize);
        drop(registry);
        // SAFETY: both mappings were made by `new` and no one refers to them any more.
        unsafe {
            libc::munmap(self.base.cast(), self.length);
            libc::munmap(self.control.cast(), self.control_bytes);
        }
    }
}

/// The pool as worker threads see it.
#[derive(Clone)]
pub struct PoolHandle(pub(crate) Arc<Pool>);

#[allow(dead_code)]
impl PoolHandle {
    /// Start of the pool; valid as long as this handle.
    pub fn base(&self) -> *mut u8 {
        self.0.base()
    }

    pub fn length(&self) -> usize {
        self.0.length()
    }

    /// A block of at least `length` bytes with one reference, 4096-aligned; None when the pool is exhausted.
    pub fn alloc(&self, length: usize) -> Option<i64> {
        self.0.allocate_shared(length).map(|offset| offset as i64)
    }

    pub fn retain(&self, offset: i64) {
        self.0.retain(offset as usize);
    }

    pub fn release(&self, offset: i64) {
        self.0.release(offset as usize);
    }

    /// The address of a range, checked to lie inside the pool.
    pub fn range(&self, offset: i64, length: usize) -> *mut u8 {
        self.0.range(usize::try_from(offset).expect("a payload offset"), length)
    }
}
