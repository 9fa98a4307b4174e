//! A few threads for file operations that would block: everything where io_uring is forbidden, and zeroing everywhere.

use std::collections::VecDeque;
use std::os::fd::RawFd;
use std::sync::{Arc, Condvar, Mutex};

use crate::completer::{Completer, Post, PostKind, HEADER_BYTES};

const THREADS: usize = 4;
static ZEROES: [u8; 1 << 20] = [0; 1 << 20];

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum JobKind {
    Read,
    Write { durable: bool },
    Flush,
    Zero { keep_allocated: bool, durable: bool },
}

/// `memory` points into the pool; the operation holds a reference to the block until its completion was processed.
pub struct Job {
    pub operation: u32,
    pub fd: RawFd,
    pub kind: JobKind,
    pub offset: u64,
    pub memory: *mut u8,
    pub length: u64,
}

// SAFETY: `memory` is a pool range that only this operation uses until it completes.
unsafe impl Send for Job {}

struct Queue {
    jobs: VecDeque<Job>,
    closed: bool,
}

pub struct Workers {
    shared: Arc<(Mutex<Queue>, Condvar)>,
    threads: Vec<std::thread::JoinHandle<()>>,
    completer: Completer,
}

impl Workers {
    pub fn new(completer: Completer) -> Workers {
        let queue = Queue { jobs: VecDeque::new(), closed: false };
        Workers { shared: Arc::new((Mutex::new(queue), Condvar::new())), threads: Vec::new(), completer }
    }

    pub fn submit(&mut self, job: Job) {
        if self.threads.is_empty() {
            for number in 0..THREADS {
                let (shared, completer) = (self.shared.clone(), self.completer.clone());
                let thread = std::thread::Builder::new()
                    .name(format!("ring-{number}"))
                    .stack_size(256 * 1024)
                    .spawn(move || work(&shared, &completer))
                    .expect("starting a worker thread of the ring");
                self.threads.push(thread);
            }
        }
        self.shared.0.lock().expect("never poisoned: panics abort").jobs.push_back(job);
        self.shared.1.notify_one();
    }

    /// Forgets what has not begun and waits for what has: their buffers are about to go.
    pub fn close(&mut self) {
        {
            let mut queue = self.shared.0.lock().expect("never poisoned: panics abort");
            queue.closed = true;
            queue.jobs.clear();
        }
        self.shared.1.notify_all();
        for thread in self.threads.drain(..) {
            thread.join().expect("worker threads do not panic: panics abort");
        }
    }
}

fn work(shared: &(Mutex<Queue>, Condvar), completer: &Completer) {
    loop {
        let job = {
            let mut queue = shared.0.lock().expect("never poisoned: panics abort");
            loop {
                if queue.closed {
                    return;
                }
                if let Some(job) = queue.jobs.pop_front() {
                    break job;
                }
                queue = shared.1.wait(queue).expect("never poisoned: panics abort");
            }
        };
        let result = match run(&job) {
            Ok(()) => 0,
            Err(errno) => errno,
        };
        completer.post(Post {
            kind: PostKind::File,
            target: job.operation,
            cookie: 0,
            result,
            payload: -1,
            length: 0,
            flags: 0,
            header_length: 0,
            header: [0; HEADER_BYTES],
        });
    }
}

pub fn last_errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}

fn run(job: &Job) -> Result<(), i32> {
    match job.kind {
        JobKind::Read => transfer(job.length as usize, |done| {
            // SAFETY: the range is inside a pool block this operation holds.
            unsafe {
                libc::pread(job.fd, job.memory.add(done).cast(), job.length as usize - done, at(job.offset, done))
            }
        }),
        JobKind::Write { durable } => {
            // SAFETY: as above.
            let bytes = unsafe { std::slice::from_raw_parts(job.memory, job.length as usize) };
            write_all(job.fd, bytes, job.offset, durable)
        }
        JobKind::Flush => flush(job.fd),
        JobKind::Zero { keep_allocated, durable } => {
            zero(job.fd, job.offset, job.length, keep_allocated)?;
            if durable {
                flush(job.fd)?;
            }
            Ok(())
        }
    }
}

fn at(offset: u64, done: usize) -> libc::off_t {
    (offset + done as u64) as libc::off_t
}

/// Repeats `step` until `length` bytes are done. Nothing more to read, or nothing taken, is EIO.
fn transfer(length: usize, mut step: impl FnMut(usize) -> isize) -> Result<(), i32> {
    let mut done = 0;
    while done < length {
        match step(done) {
            count if count > 0 => done += count as usize,
            0 => return Err(libc::EIO),
            _ if last_errno() == libc::EINTR => {}
            _ => return Err(last_errno()),
        }
    }
    Ok(())
}

fn write_all(fd: RawFd, bytes: &[u8], offset: u64, durable: bool) -> Result<(), i32> {
    let flags = if durable { libc::RWF_DSYNC } else { 0 };
    transfer(bytes.len(), |done| {
        let rest = &bytes[done..];
        let iov = libc::iovec { iov_base: rest.as_ptr().cast_mut().cast(), iov_len: rest.len() };
        // SAFETY: one iovec over memory that is only read.
        unsafe { libc::pwritev2(fd, &raw const iov, 1, at(offset, done), flags) }
    })
}

fn flush(fd: RawFd) -> Result<(), i32> {
    // SAFETY: plain system call.
    if unsafe { libc::fdatasync(fd) } == 0 {
        Ok(())
    } else {
        Err(last_errno())
    }
}

/// fallocate zeroes files and block devices alike (a block device maps ZERO_RANGE to write-zeroes, never to a discard
/// that might leave old data); what it does not support is written.
fn zero(fd: RawFd, offset: u64, length: u64, keep_allocated: bool) -> Result<(), i32> {
    let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    let range = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
    let modes: &[i32] = if keep_allocated { &[range] } else { &[punch, range] };
    for &mode in modes {
        loop {
            // SAFETY: plain system call.
            if unsafe { libc::fallocate(fd, mode, offset as libc::off_t, length as libc::off_t) } == 0 {
                return Ok(());
            }
            match last_errno() {
                libc::EINTR => {}
                libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV => break,
                errno => return Err(errno),
            }
        }
    }
    let mut done = 0;
    while done < length {
        let step = (length - done).min(ZEROES.len() as u64);
        write_all(fd, &ZEROES[..step as usize], offset + done, false)?;
        done += step;
    }
    Ok(())
}
