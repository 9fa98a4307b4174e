//! The kernel filesystem as NFS needs it: objects by kernel file handle, operations with the caller's identity, on
//! threads of its own. `layout.rs` says how an operation travels; `ops.rs` does it; `src/io/posix-filesystem.ts` is
//! the other side.
//!
//! An open filesystem is `PosixFs`. `withdraw` ends it: afterwards no descriptor of this process is on the tree, so
//! that umount succeeds at once.

mod cache;
mod class;
mod identity;
pub mod layout;
mod locks;
mod ops;
mod readdir;
mod sys;
mod workers;

use cache::Cache;
use layout::{Block, BLOCK_BYTES, OP};
use locks::InodeLocks;
use ops::Mount;
use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::sync::atomic::AtomicI32;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use sys::Errno;
use workers::{Job, Queue};

/// What the operations need of the ring: the buffer pool, and a way to say that an operation is done. Any thread.
pub trait Door: Send + Sync {
    fn base(&self) -> *mut u8;
    fn length(&self) -> usize;
    fn allocate(&self, bytes: u32) -> Option<i64>;
    fn release(&self, offset: i64);
    fn complete(&self, cookie: u32, errno: i32, payload: i64, length: u32);
}

/// Cached objects, each with up to three descriptors; less when the process may open few files.
const MAX_CACHED: u64 = 8192;
/// Of the process's descriptor limit: the rest is for sockets and whatever else runs here.
const DESCRIPTORS_PER_CACHED: u64 = 6;
const MIN_CACHED: u64 = 16;

pub const MAX_WORKERS: usize = 256;

/// What does not change while the filesystem is open.
pub struct Facts {
    pub id: [u8; 8],
    pub max_file_size: f64,
    pub root_handle: Vec<u8>,
}

struct Running {
    mount: Arc<Mount>,
    threads: Vec<JoinHandle<()>>,
}

pub struct PosixFs {
    queue: Arc<Queue>,
    door: Arc<dyn Door>,
    /// None once withdrawn.
    running: Mutex<Option<Running>>,
}

pub(crate) fn describe(errno: Errno) -> String {
    std::io::Error::from_raw_os_error(errno.0).to_string()
}

fn cache_capacity() -> usize {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: fills a local.
    let known = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } == 0;
    let allowed = if known { limit.rlim_cur / DESCRIPTORS_PER_CACHED } else { MIN_CACHED };
    allowed.clamp(MIN_CACHED, MAX_CACHED) as usize
}

fn open_root(path: &str) -> Result<OwnedFd, String> {
    let name = CString::new(path).map_err(|_| format!("{path:?}: a path cannot contain NUL"))?;
    sys::open_path(&name, libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NONBLOCK)
        .map_err(|errno| format!("{path}: cannot be opened as a directory: {}", describe(errno)))
}

fn open_mount(path: &str) -> Result<(Mount, Facts), String> {
    let failed = |what: &str, errno: Errno| format!("{path}: {what}: {}", describe(errno));
    let root_fd = open_root(path)?;
    let missing = identity::missing_capability().map_err(|errno| failed("cannot read capabilities", errno))?;
    if let Some(capability) = missing {
        return Err(format!("{path}: serving it needs {capability}; run as root"));
    }
    let root_handle = sys::handle_of(sys::raw(&root_fd))
        .map_err(|errno| failed("its filesystem gives no usable file handles (ext4 and XFS do)", errno))?;
    sys::open_by_handle(sys::raw(&root_fd), &root_handle, libc::O_PATH)
        .map_err(|errno| failed("cannot be opened by file handle (needs CAP_DAC_READ_SEARCH)", errno))?;
    let proc = sys::open_path(c"/proc/self/fd", libc::O_RDONLY | libc::O_DIRECTORY)
        .map_err(|errno| failed("/proc/self/fd is needed to serve it", errno))?;
    let statistics = sys::filesystem_statistics(sys::raw(&root_fd)).map_err(|errno| failed("statfs", errno))?;
    // SAFETY: fsid_t is two 32-bit words without padding; libc keeps them private.
    let id = unsafe { std::mem::transmute::<libc::fsid_t, [u8; 8]>(statistics.f_fsid) };
    let facts = Facts { id, max_file_size: ops::max_file_size(&statistics), root_handle: root_handle.to_vec() };
    let mount = Mount {
        root_fd,
        proc,
        root: root_handle.key(),
        root_handle,
        cache: Cache::new(cache_capacity()),
        locks: InodeLocks::new(),
        unreported: AtomicI32::new(0),
    };
    Ok((mount, facts))
}

impl PosixFs {
    /// # Errors
    /// A sentence that names path and cause.
    pub fn open(path: &str, workers: usize, door: Arc<dyn Door>) -> Result<(PosixFs, Facts), String> {
        assert!((1..=MAX_WORKERS).contains(&workers), "{workers} workers");
        let (mount, facts) = open_mount(path)?;
        let (mount, queue) = (Arc::new(mount), Arc::new(Queue::new(workers)));
        let threads = workers::start(&queue, &mount, &door, workers).map_err(|message| format!("{path}: {message}"))?;
        Ok((PosixFs { queue, door, running: Mutex::new(Some(Running { mount, threads })) }, facts))
    }

    /// Queues operations: cookie and pool offset of the request block each. Never blocks for long. After `withdraw`
    /// each completes with ESTALE.
    pub fn submit(&self, operations: impl Iterator<Item = (u32, usize)> + Clone) {
        let jobs = operations.clone().map(|(cookie, block)| {
            assert!(block <= self.door.length() - BLOCK_BYTES, "a request block inside the pool");
            // SAFETY: inside the pool; the submitter leaves the block alone until the completion.
            let op = unsafe { Block::new(self.door.base().add(block)) }.u32(OP);
            (Job { cookie, block }, op)
        });
        if !self.queue.submit(jobs) {
            operations.for_each(|(cookie, _)| self.door.complete(cookie, libc::ESTALE, -1, 0));
        }
    }

    /// Refuses new operations, ends those queued with ESTALE, waits for those that run, closes every descriptor; then
    /// completes `cookie`. Returns at once.
    pub fn withdraw(&self, cookie: u32) {
        self.queue.close();
        let running = self.running.lock().expect("never poisoned: panics abort").take();
        let door = Arc::clone(&self.door);
        let close = move || {
            if let Some(running) = running {
                running.end();
            }
            door.complete(cookie, 0, -1, 0);
        };
        std::thread::Builder::new()
            .name("posix-fs-end".into())
            .spawn(close)
            .unwrap_or_else(|error| panic!("cannot start the thread that withdraws a filesystem: {error}"));
    }
}

impl Running {
    /// Waits for the workers, then closes every descriptor.
    fn end(self) {
        for thread in self.threads {
            thread.join().expect("panics abort");
        }
        let mount = Arc::into_inner(self.mount);
        assert!(mount.is_some(), "the workers held the only other references to the filesystem");
        drop(mount);
    }
}

impl Drop for PosixFs {
    fn drop(&mut self) {
        self.queue.close();
        let running = self.running.lock().expect("never poisoned: panics abort").take();
        if let Some(running) = running {
            running.end();
        }
    }
}
