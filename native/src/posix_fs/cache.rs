//! Open descriptors by inode: a bounded LRU. A descriptor found here grants nothing by itself; every operation asks the
//! kernel anew whether its caller may. Entries leave when their name is unlinked (an open descriptor would keep the
//! space of a removed file), when they were not used for a while, and all together when the filesystem is withdrawn.

use super::sys::{self, Errno, Key, Outcome};
use lru::LruCache;
use std::num::NonZeroUsize;
use std::os::fd::{OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};

/// One object of the filesystem, held open by up to three descriptors.
pub struct Inode {
    pub key: Key,
    /// S_IFMT bits: they never change while the inode lives.
    pub kind: u32,
    path: OwnedFd,
    read: OnceLock<OwnedFd>,
    write: OnceLock<OwnedFd>,
    /// Written through `write` and not yet synced: must be synced before `write` is closed, because the kernel
    /// reports a failed writeback to descriptors that were open at the time.
    pub dirty: AtomicBool,
    pub sync: SyncGate,
    used: AtomicU32,
}

impl Inode {
    pub fn new(key: Key, kind: u32, path: OwnedFd) -> Inode {
        Inode {
            key,
            kind,
            path,
            read: OnceLock::new(),
            write: OnceLock::new(),
            dirty: AtomicBool::new(false),
            sync: SyncGate::default(),
            used: AtomicU32::new(0),
        }
    }

    /// With the descriptor that created the file.
    pub fn with_write(self, write: OwnedFd) -> Inode {
        Inode { write: OnceLock::from(write), ..self }
    }

    /// O_PATH: good for names below it, attributes and permission questions.
    pub fn path(&self) -> RawFd {
        sys::raw(&self.path)
    }

    pub fn is_directory(&self) -> bool {
        self.kind == libc::S_IFDIR
    }

    pub fn is_regular(&self) -> bool {
        self.kind == libc::S_IFREG
    }

    /// Opened with the server's identity (the caller's is checked per request). Regular files and directories only:
    /// opening a FIFO or device could block or have effects.
    pub fn read_fd(&self, proc: RawFd) -> Outcome<RawFd> {
        assert!(self.is_regular() || self.is_directory(), "special files are never opened");
        self.open_once(&self.read, proc, libc::O_RDONLY)
    }

    pub fn write_fd(&self, proc: RawFd) -> Outcome<RawFd> {
        assert!(self.is_regular(), "only regular files are opened for writing");
        self.open_once(&self.write, proc, libc::O_WRONLY)
    }

    fn open_once(&self, slot: &OnceLock<OwnedFd>, proc: RawFd, mode: libc::c_int) -> Outcome<RawFd> {
        if let Some(fd) = slot.get() {
            return Ok(sys::raw(fd));
        }
        let fd = sys::reopen(proc, self.path(), mode | libc::O_NONBLOCK | libc::O_NOCTTY)?;
        // Another worker may have been faster: its descriptor is used and ours closed.
        Ok(sys::raw(slot.get_or_init(|| fd)))
    }

    /// Puts everything written so far on stable storage; concurrent callers share one fsync and its result.
    pub fn sync_written(&self, proc: RawFd, with_metadata: bool) -> Outcome<()> {
        let fd = self.write_fd(proc)?;
        self.sync.run(with_metadata, |with_metadata| {
            // Cleared first: what is written from here on may not be covered.
            self.dirty.store(false, Ordering::SeqCst);
            sys::sync_file(fd, with_metadata)
        })
    }
}

/// Lets callers share fsync calls. The kernel reports a writeback error once per descriptor, so when several wait for
/// the same descriptor all must learn what the one call said; and whoever comes while a call runs needs the next one,
/// as the running one may have passed their data already.
#[derive(Default)]
pub struct SyncGate {
    state: Mutex<GateState>,
    turn: Condvar,
}

#[derive(Default)]
struct GateState {
    running: bool,
    next: Option<Arc<Round>>,
}

struct Round {
    with_metadata: AtomicBool,
    result: OnceLock<Outcome<()>>,
}

impl SyncGate {
    pub fn run(&self, with_metadata: bool, sync: impl FnOnce(bool) -> Outcome<()>) -> Outcome<()> {
        let mut state = self.state.lock().expect("never poisoned: panics abort");
        let round =
            Arc::clone(state.next.get_or_insert_with(|| {
                Arc::new(Round { with_metadata: AtomicBool::new(false), result: OnceLock::new() })
            }));
        if with_metadata {
            round.with_metadata.store(true, Ordering::Relaxed);
        }
        loop {
            if let Some(result) = round.result.get() {
                return *result;
            }
            if state.running {
                state = self.turn.wait(state).expect("never poisoned: panics abort");
                continue;
            }
            state.running = true;
            let started = state.next.take();
            assert!(started.is_some_and(|started| Arc::ptr_eq(&started, &round)), "rounds run in order");
            drop(state);
            let result = sync(round.with_metadata.load(Ordering::Relaxed));
            state = self.state.lock().expect("never poisoned: panics abort");
            state.running = false;
            round.result.set(result).expect("each round runs once");
            drop(state);
            self.turn.notify_all();
            return result;
        }
    }
}

pub struct Cache {
    entries: Mutex<LruCache<Key, Arc<Inode>>>,
    /// Dropped from the LRU while dirty; a worker syncs and closes them.
    retired: Mutex<Vec<Arc<Inode>>>,
    has_retired: AtomicBool,
    tick: AtomicU32,
}

impl Cache {
    pub fn new(capacity: usize) -> Cache {
        Cache {
            entries: Mutex::new(LruCache::new(NonZeroUsize::new(capacity).expect("a positive capacity"))),
            retired: Mutex::new(Vec::new()),
            has_retired: AtomicBool::new(false),
            tick: AtomicU32::new(0),
        }
    }

    fn lock(&self) -> MutexGuard<'_, LruCache<Key, Arc<Inode>>> {
        self.entries.lock().expect("never poisoned: panics abort")
    }

    pub fn get(&self, key: &Key) -> Option<Arc<Inode>> {
        let mut entries = self.lock();
        let inode = entries.get(key)?;
        inode.used.store(self.tick.load(Ordering::Relaxed), Ordering::Relaxed);
        Some(Arc::clone(inode))
    }

    /// An entry that is there already wins, and the given one is closed.
    pub fn insert(&self, inode: Inode) -> Arc<Inode> {
        inode.used.store(self.tick.load(Ordering::Relaxed), Ordering::Relaxed);
        let inode = Arc::new(inode);
        let mut entries = self.lock();
        if let Some(present) = entries.get(&inode.key) {
            return Arc::clone(present);
        }
        let evicted = entries.push(inode.key, Arc::clone(&inode));
        drop(entries);
        if let Some((_, evicted)) = evicted {
            self.retire(evicted);
        }
        inode
    }

    pub fn remove(&self, key: &Key) {
        let removed = self.lock().pop(key);
        // Closed outside the lock: the last descriptor of a removed file frees its blocks.
        drop(removed);
    }

    /// For a file that lost one of its names and may live on under others.
    pub fn remove_synced(&self, key: &Key) {
        let removed = self.lock().pop(key);
        if let Some(inode) = removed {
            match sys::statx_fd(inode.path()) {
                Ok(stat) if stat.stx_nlink > 0 => self.retire(inode),
                _ => drop(inode),
            }
        }
    }

    fn retire(&self, inode: Arc<Inode>) {
        if inode.dirty.load(Ordering::SeqCst) {
            self.retired.lock().expect("never poisoned: panics abort").push(inode);
            self.has_retired.store(true, Ordering::SeqCst);
        }
    }

    /// One entry that must be synced before it is closed.
    pub fn take_retired(&self) -> Option<Arc<Inode>> {
        if !self.has_retired.load(Ordering::SeqCst) {
            return None;
        }
        let mut retired = self.retired.lock().expect("never poisoned: panics abort");
        let inode = retired.pop();
        self.has_retired.store(!retired.is_empty(), Ordering::SeqCst);
        inode
    }

    /// Called at a steady pace: lets go of entries that were not used for `idle_ticks` calls.
    pub fn expire(&self, idle_ticks: u32) {
        let now = self.tick.fetch_add(1, Ordering::Relaxed) + 1;
        loop {
            let mut entries = self.lock();
            match entries.peek_lru() {
                Some((_, oldest)) if now.wrapping_sub(oldest.used.load(Ordering::Relaxed)) > idle_ticks => {}
                _ => return,
            }
            let (_, inode) = entries.pop_lru().expect("peeked at it");
            drop(entries);
            self.retire(inode);
        }
    }

    /// Out of descriptors: gives back about half.
    pub fn halve(&self) {
        let keep = self.lock().len() / 2;
        loop {
            let mut entries = self.lock();
            if entries.len() <= keep {
                return;
            }
            let (_, inode) = entries.pop_lru().expect("more than `keep`");
            drop(entries);
            self.retire(inode);
        }
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.lock().len()
    }
}

impl Errno {
    pub fn is_out_of_descriptors(self) -> bool {
        self.0 == libc::EMFILE || self.0 == libc::ENFILE
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    fn inode(number: u64) -> Inode {
        let fd = sys::open_path(c"/", libc::O_PATH).unwrap();
        Inode::new(Key { inode: number, generation: 1 }, libc::S_IFDIR, fd)
    }

    fn is_open(fd: RawFd) -> bool {
        // SAFETY: no pointers.
        unsafe { libc::fcntl(fd, libc::F_GETFD) != -1 }
    }

    #[test]
    fn capacity_holds_and_what_leaves_is_closed() {
        let cache = Cache::new(2);
        let weak: Vec<_> = (0..3).map(|number| Arc::downgrade(&cache.insert(inode(number)))).collect();
        assert_eq!(cache.len(), 2);
        assert!(weak[0].upgrade().is_none() && weak[2].upgrade().is_some());
        cache.expire(1);
        assert_eq!(cache.len(), 2, "used within one tick");
        assert!(cache.get(&Key { inode: 2, generation: 1 }).is_some());
        cache.expire(1);
        assert_eq!(cache.len(), 1, "only what was asked for stays");
        let fd = weak[2].upgrade().unwrap().path();
        assert!(is_open(fd));
        cache.remove(&Key { inode: 2, generation: 1 });
        assert!(weak[2].upgrade().is_none());
    }

    #[test]
    fn dirty_entries_are_handed_over_for_syncing() {
        let cache = Cache::new(1);
        cache.insert(inode(1)).dirty.store(true, Ordering::SeqCst);
        cache.insert(inode(2));
        assert_eq!(cache.take_retired().map(|inode| inode.key.inode), Some(1));
        assert!(cache.take_retired().is_none());
    }

    #[test]
    fn callers_of_one_round_share_its_result_and_latecomers_get_a_new_one() {
        let gate = SyncGate::default();
        let (calls, arrived) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let first_started = std::sync::Barrier::new(2);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let result = gate.run(false, |_| {
                    first_started.wait();
                    // Until the others wait for the next round.
                    while arrived.load(Ordering::SeqCst) < 4 {
                        std::thread::yield_now();
                    }
                    std::thread::sleep(std::time::Duration::from_millis(20));
                    calls.fetch_add(1, Ordering::SeqCst);
                    Ok(())
                });
                assert_eq!(result, Ok(()));
            });
            first_started.wait();
            for index in 0..4 {
                let (gate, calls, arrived) = (&gate, &calls, &arrived);
                scope.spawn(move || {
                    arrived.fetch_add(1, Ordering::SeqCst);
                    let result = gate.run(index == 3, |with_metadata| {
                        calls.fetch_add(1, Ordering::SeqCst);
                        assert!(with_metadata, "one of the four needs metadata");
                        Err(Errno(libc::EIO))
                    });
                    assert_eq!(result, Err(Errno(libc::EIO)), "all who waited learn of the error");
                });
            }
        });
        assert_eq!(calls.load(Ordering::SeqCst), 2);
    }
}
