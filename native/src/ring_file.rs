//! Files and block devices of a ring.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::ring_area::submit;
use crate::ring_core::{Backend, Core, Event};
use crate::ring_uring::{read_cached, user_data, Tag};
use crate::ring_workers::{last_errno, Job, JobKind};

/// Buffered writes up to this are done at once while that is fast.
const INLINE_WRITE_BYTES: u32 = 64 * 1024;
/// A write at once that took longer than this, and slept...
const INLINE_SLOW: Duration = Duration::from_millis(1);
/// ...sends the following ones to the background for this long (the page cache is being throttled). A thread that was
/// only preempted does not count: on a busy machine that is no reason to burden it with a second thread.
const INLINE_PAUSE: Duration = Duration::from_millis(100);

/// Flags of `openFile`.
pub const OPEN_DIRECT: u32 = 1;
pub const OPEN_READ_ONLY: u32 = 2;
pub const OPEN_EXCLUSIVE: u32 = 4;

const BLKSSZGET: libc::c_ulong = 0x1268;
const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;
/// Without better knowledge: what every disk and filesystem accepts.
const DEFAULT_DIRECT_ALIGNMENT: u32 = 4096;

pub struct File {
    descriptor: OwnedFd,
    direct: bool,
    pub size: u64,
    pub alignment: u32,
    in_flight: u32,
    closing: bool,
    /// The operation number of the flush under way.
    flushing: bool,
    /// Those that the flush under way will answer, and those that wait for the next: a flush only covers what was
    /// written before it began.
    flush_cookies: Vec<u32>,
    next_flush_cookies: Vec<u32>,
}

#[derive(Clone, Copy)]
pub struct FileOperation {
    file: u32,
    cookie: u32,
    kind: JobKind,
    offset: u64,
    /// Pool offset or -1; the operation holds a reference.
    payload: i32,
    length: u64,
    done: u64,
}

impl File {
    /// See `file_seek` of ring.rs.
    pub fn seek(&self, offset: f64, hole: bool) -> f64 {
        let whence = if hole { libc::SEEK_HOLE } else { libc::SEEK_DATA };
        // SAFETY: plain system call. All I/O is positional: nobody uses the position that this moves.
        let found = unsafe { libc::lseek(self.descriptor.as_raw_fd(), offset as i64, whence) };
        match found {
            0.. => (found as f64).min(self.size as f64),
            _ if last_errno() == libc::ENXIO => self.size as f64,
            _ => -f64::from(last_errno()),
        }
    }

    /// Opens and, on request, locks. EBUSY: another process holds the lock, or the block device is in use.
    pub fn open(path: &str, flags: u32) -> Result<File, i32> {
        let path = std::ffi::CString::new(Path::new(path).as_os_str().as_bytes()).map_err(|_| libc::EINVAL)?;
        let mut mode = libc::O_CLOEXEC | libc::O_NOCTTY;
        mode |= if flags & OPEN_READ_ONLY != 0 { libc::O_RDONLY } else { libc::O_RDWR };
        if flags & OPEN_DIRECT != 0 {
            mode |= libc::O_DIRECT;
        }
        // Asked of the path first: O_EXCL without O_CREAT means "not mounted, no other holder" on block devices only.
        // SAFETY: all-zero is a valid stat buffer; the path ends with a zero byte.
        let mut stat: libc::stat = unsafe { std::mem::zeroed() };
        if unsafe { libc::stat(path.as_ptr(), &raw mut stat) } < 0 {
            return Err(last_errno());
        }
        let is_block = stat.st_mode & libc::S_IFMT == libc::S_IFBLK;
        if !is_block && stat.st_mode & libc::S_IFMT != libc::S_IFREG {
            return Err(if stat.st_mode & libc::S_IFMT == libc::S_IFDIR { libc::EISDIR } else { libc::ENOTBLK });
        }
        if is_block && flags & OPEN_EXCLUSIVE != 0 {
            mode |= libc::O_EXCL;
        }
        // SAFETY: the descriptor is owned at once.
        let fd = unsafe { libc::open(path.as_ptr(), mode) };
        if fd < 0 {
            return Err(last_errno());
        }
        // SAFETY: fresh descriptor.
        let descriptor = unsafe { OwnedFd::from_raw_fd(fd) };
        if flags & OPEN_EXCLUSIVE != 0 {
            // SAFETY: plain system call.
            if unsafe { libc::flock(fd, libc::LOCK_EX | libc::LOCK_NB) } < 0 {
                let errno = last_errno();
                return Err(if errno == libc::EWOULDBLOCK { libc::EBUSY } else { errno });
            }
        }
        let size = if is_block {
            let mut bytes: u64 = 0;
            // SAFETY: the call writes a u64.
            if unsafe { libc::ioctl(fd, BLKGETSIZE64, &raw mut bytes) } < 0 {
                return Err(last_errno());
            }
            bytes
        } else {
            // SAFETY: as for the first stat.
            if unsafe { libc::fstat(fd, &raw mut stat) } < 0 {
                return Err(last_errno());
            }
            stat.st_size as u64
        };
        let direct = flags & OPEN_DIRECT != 0;
        let alignment = if direct { direct_alignment(fd, is_block) } else { 1 };
        Ok(File {
            descriptor,
            direct,
            size,
            alignment,
            in_flight: 0,
            closing: false,
            flushing: false,
            flush_cookies: Vec::new(),
            next_flush_cookies: Vec::new(),
        })
    }

    fn fd(&self) -> RawFd {
        self.descriptor.as_raw_fd()
    }
}

fn direct_alignment(fd: RawFd, is_block: bool) -> u32 {
    const STATX_DIOALIGN: u32 = 0x2000;
    // SAFETY: all-zero is a valid statx buffer; the empty path with AT_EMPTY_PATH names the descriptor.
    unsafe {
        let mut buffer: libc::statx = std::mem::zeroed();
        let flags = libc::AT_EMPTY_PATH;
        if libc::statx(fd, c"".as_ptr(), flags, STATX_DIOALIGN, &raw mut buffer) == 0
            && buffer.stx_mask & STATX_DIOALIGN != 0
            && buffer.stx_dio_offset_align > 0
        {
            return buffer.stx_dio_offset_align.max(buffer.stx_dio_mem_align.min(4096));
        }
        let mut sector: i32 = 0;
        if is_block && libc::ioctl(fd, BLKSSZGET, &raw mut sector) == 0 && sector > 0 {
            return sector as u32;
        }
    }
    DEFAULT_DIRECT_ALIGNMENT
}

/// How often this thread went to sleep by itself so far.
fn voluntary_switches() -> i64 {
    // SAFETY: all-zero is a valid rusage, which the call fills in.
    unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage);
        usage.ru_nvcsw
    }
}

impl Core {
    fn file(&mut self, id: u32) -> &mut File {
        self.files[id as usize].as_mut().expect("an open file")
    }

    pub fn add_file(&mut self, file: File) -> u32 {
        self.files.push(Some(file));
        self.files.len() as u32 - 1
    }

    /// Takes over a file record; reads and writes hold a reference to their payload.
    pub fn start_file_operation(&mut self, index: usize) {
        let record = self.area.submission(index);
        let flag = |bit: u32| record.flags() & bit != 0;
        let mut operation = FileOperation {
            file: record.id,
            cookie: record.cookie,
            kind: JobKind::Read,
            offset: record.argument as u64,
            payload: record.payload,
            length: u64::from(record.length),
            done: 0,
        };
        match record.kind {
            submit::READ => {}
            submit::WRITE => operation.kind = JobKind::Write { durable: flag(1) },
            submit::ZERO => {
                operation.kind = JobKind::Zero { keep_allocated: flag(2), durable: flag(1) };
                operation.length = record.second_argument() as u64;
            }
            _ => operation.kind = JobKind::Flush,
        }
        let cookie = operation.cookie;
        let open = self.files.get(operation.file as usize).and_then(Option::as_ref);
        let Some(file) = open.filter(|file| !file.closing) else {
            panic!("operation on file {}, which is closed", operation.file)
        };
        let (fd, direct) = (file.fd(), file.direct);
        self.file(operation.file).in_flight += 1;
        match operation.kind {
            JobKind::Flush => {
                let file = self.file(operation.file);
                file.next_flush_cookies.push(cookie);
                if !file.flushing {
                    self.start_flush(operation.file);
                }
                return;
            }
            JobKind::Read | JobKind::Write { .. } if operation.length == 0 => {
                self.finish_operation(&operation, 0);
                return;
            }
            JobKind::Read if !direct => {
                let memory = self.pool.range(operation.payload as usize, operation.length as usize);
                if read_cached(fd, memory, operation.length as usize, operation.offset) {
                    self.finish_operation(&operation, 0);
                    return;
                }
            }
            JobKind::Write { durable: false }
                if !direct
                    && operation.length <= u64::from(INLINE_WRITE_BYTES)
                    && self.write_inline(fd, &operation) =>
            {
                self.finish_operation(&operation, 0);
                return;
            }
            _ => {}
        }
        let number = match self.free_operations.pop() {
            Some(number) => number,
            None => {
                self.operations.push(None);
                self.operations.len() as u32 - 1
            }
        };
        self.operations[number as usize] = Some(operation);
        self.issue(number);
    }

    /// Writes at once unless a recent write was slow. False: not (wholly) done, do it in the background.
    fn write_inline(&mut self, fd: RawFd, operation: &FileOperation) -> bool {
        let before = Instant::now();
        if self.inline_after.is_some_and(|after| before < after) {
            return false;
        }
        let sleeps_before = *self.sleeps.get_or_insert_with(voluntary_switches);
        let memory = self.pool.range(operation.payload as usize, operation.length as usize);
        // SAFETY: a pool range that the operation holds.
        let count =
            unsafe { libc::pwrite(fd, memory.cast(), operation.length as usize, operation.offset as libc::off_t) };
        let took = before.elapsed();
        if took > INLINE_SLOW {
            let sleeps = voluntary_switches();
            self.sleeps = Some(sleeps);
            if sleeps != sleeps_before {
                self.inline_after = Some(before + took + INLINE_PAUSE);
            }
        }
        // An error comes again in the background and is reported from there.
        count == operation.length as isize
    }

    fn start_flush(&mut self, id: u32) {
        let file = self.file(id);
        debug_assert!(!file.flushing && file.flush_cookies.is_empty());
        file.flushing = true;
        std::mem::swap(&mut file.flush_cookies, &mut file.next_flush_cookies);
        let operation =
            FileOperation { file: id, cookie: 0, kind: JobKind::Flush, offset: 0, payload: -1, length: 0, done: 0 };
        let number = match self.free_operations.pop() {
            Some(number) => number,
            None => {
                self.operations.push(None);
                self.operations.len() as u32 - 1
            }
        };
        self.operations[number as usize] = Some(operation);
        self.issue(number);
    }

    /// Gives an operation, or the rest of it, to the kernel or to a worker.
    fn issue(&mut self, number: u32) {
        let operation = self.operations[number as usize].expect("an operation under way");
        let fd = self.file(operation.file).fd();
        let memory = if operation.payload >= 0 {
            let (at, left) = (operation.payload as u64 + operation.done, operation.length - operation.done);
            self.pool.range(at as usize, left as usize)
        } else {
            std::ptr::null_mut()
        };
        let (offset, length) = (operation.offset + operation.done, operation.length - operation.done);
        let data = user_data(Tag::File, number);
        match (&mut self.backend, operation.kind) {
            (Backend::Uring(uring), JobKind::Read) => uring.read_file(data, fd, memory, length as u32, offset),
            (Backend::Uring(uring), JobKind::Write { durable }) => {
                uring.write_file(data, fd, memory, length as u32, offset, durable);
            }
            (Backend::Uring(uring), JobKind::Flush) => uring.flush_file(data, fd),
            (_, kind) => {
                self.workers.submit(Job { operation: number, fd, kind, offset, memory, length });
                return;
            }
        }
        self.in_flight += 1;
    }

    /// io_uring finished a step.
    pub fn file_done(&mut self, number: u32, result: i32) {
        let operation = self.operations[number as usize].as_mut().expect("an operation under way");
        let errno = match (operation.kind, result) {
            (_, error) if error == -libc::EINTR || error == -libc::EAGAIN => {
                self.issue(number);
                return;
            }
            (_, error) if error < 0 => -error,
            (JobKind::Flush, _) => 0,
            // Past the end of the file, or nothing taken.
            (_, 0) => libc::EIO,
            (_, count) => {
                operation.done += count as u64;
                if operation.done < operation.length {
                    self.issue(number);
                    return;
                }
                0
            }
        };
        self.worker_done(number, errno);
    }

    pub fn worker_done(&mut self, number: u32, errno: i32) {
        let operation = self.operations[number as usize].take().expect("an operation under way");
        self.free_operations.push(number);
        if operation.kind != JobKind::Flush {
            self.finish_operation(&operation, errno);
            return;
        }
        let file = self.file(operation.file);
        file.flushing = false;
        let mut cookies = std::mem::take(&mut file.flush_cookies);
        file.in_flight -= cookies.len() as u32;
        let more = !file.next_flush_cookies.is_empty();
        for &cookie in &cookies {
            self.events.push_back(Event::File { file: operation.file, cookie, errno });
        }
        cookies.clear();
        self.file(operation.file).flush_cookies = cookies;
        if more {
            self.start_flush(operation.file);
        }
        self.close_if_idle(operation.file);
    }

    fn finish_operation(&mut self, operation: &FileOperation, errno: i32) {
        if operation.payload >= 0 {
            self.pool.release_from_ring(operation.payload as usize);
        }
        self.events.push_back(Event::File { file: operation.file, cookie: operation.cookie, errno });
        self.file(operation.file).in_flight -= 1;
        self.close_if_idle(operation.file);
    }

    pub fn close_file(&mut self, id: u32) {
        self.file(id).closing = true;
        self.close_if_idle(id);
    }

    /// The descriptor (and with it the lock) goes when the last operation is done.
    fn close_if_idle(&mut self, id: u32) {
        let file = self.file(id);
        if file.closing && file.in_flight == 0 {
            self.files[id as usize] = None;
        }
    }
}
