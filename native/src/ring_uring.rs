//! The io_uring of a ring: sends, receives and file operations are queued here, entered once per turn, and reaped in
//! batches. One system call may submit a turn's work and wait for the next.

use std::os::fd::RawFd;

use io_uring::{opcode, squeue, types, IoUring};

use crate::ring_workers::last_errno;

const SUBMISSION_ENTRIES: u32 = 512;
const COMPLETION_ENTRIES: u32 = 8192;
/// io_uring_enter: look for completions although none is waited for.
const ENTER_GETEVENTS: u32 = 1;

/// What a completion belongs to; with a slot or operation number it makes the 64-bit user data.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Tag {
    Receive = 1,
    Send = 2,
    Connect = 3,
    Listen = 4,
    File = 5,
    Uv = 6,
    Event = 7,
    /// Cancellations and other operations whose own outcome does not matter.
    Ignore = 8,
}

const TAGS: [Tag; 8] =
    [Tag::Receive, Tag::Send, Tag::Connect, Tag::Listen, Tag::File, Tag::Uv, Tag::Event, Tag::Ignore];

pub fn user_data(tag: Tag, number: u32) -> u64 {
    (tag as u64) << 56 | u64::from(number)
}

pub fn split_user_data(data: u64) -> (Tag, u32) {
    (TAGS[(data >> 56) as usize - 1], data as u32)
}

pub struct Uring {
    ring: IoUring,
    event_value: Box<u64>,
    /// Completions taken early to make room.
    early: Vec<(u64, i32)>,
}

impl Uring {
    /// Fails where the kernel or its policy forbids io_uring or lacks what we need (Linux 5.11 and newer have it).
    pub fn new() -> std::io::Result<Uring> {
        let ring = Self::build()?;
        let parameters = ring.params();
        let supported = parameters.is_feature_ext_arg()
            && parameters.is_feature_nodrop()
            && parameters.is_feature_submit_stable()
            && parameters.is_feature_fast_poll();
        let mut probe = io_uring::Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let wanted = [
            opcode::RecvMsg::CODE,
            opcode::SendMsg::CODE,
            opcode::PollAdd::CODE,
            opcode::AsyncCancel::CODE,
            opcode::Read::CODE,
            opcode::Write::CODE,
            opcode::Fsync::CODE,
        ];
        if !supported || !wanted.iter().all(|&code| probe.is_supported(code)) {
            return Err(std::io::Error::from_raw_os_error(libc::ENOSYS));
        }
        Ok(Uring { ring, event_value: Box::new(0), early: Vec::new() })
    }

    fn build() -> std::io::Result<IoUring> {
        // Deferred task work runs only when we enter: no interrupts, and completions come in batches (Linux 6.1).
        IoUring::builder()
            .setup_cqsize(COMPLETION_ENTRIES)
            .setup_clamp()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .build(SUBMISSION_ENTRIES)
            .or_else(|_| IoUring::builder().setup_cqsize(COMPLETION_ENTRIES).setup_clamp().build(SUBMISSION_ENTRIES))
    }

    fn push(&mut self, entry: &squeue::Entry) {
        loop {
            // SAFETY: whoever queues an operation keeps its memory until the completion (see the callers in ring.rs).
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return;
            }
            self.enter_without_waiting();
            // With its completion queue overflowing, the kernel takes nothing more until some were reaped.
            let mut early = std::mem::take(&mut self.early);
            self.reap(&mut early);
            self.early = early;
        }
    }

    pub fn receive(&mut self, data: u64, fd: RawFd, message: *mut libc::msghdr, wait_all: bool) {
        let flags = if wait_all { libc::MSG_WAITALL } else { 0 };
        let entry = opcode::RecvMsg::new(types::Fd(fd), message).flags(flags as u32).build();
        self.push(&entry.user_data(data));
    }

    pub fn send(&mut self, data: u64, fd: RawFd, message: *const libc::msghdr) {
        let flags = libc::MSG_NOSIGNAL | libc::MSG_WAITALL;
        let entry = opcode::SendMsg::new(types::Fd(fd), message).flags(flags as u32).build();
        self.push(&entry.user_data(data));
    }

    /// One completion when `fd` is ready for `events` (POLLIN, POLLOUT).
    pub fn poll(&mut self, data: u64, fd: RawFd, events: i16) {
        let entry = opcode::PollAdd::new(types::Fd(fd), events as u32).build();
        self.push(&entry.user_data(data));
    }

    /// Reads the completer's eventfd, which clears it.
    pub fn read_event(&mut self, data: u64, fd: RawFd) {
        let entry = opcode::Read::new(types::Fd(fd), (&raw mut *self.event_value).cast(), 8).build();
        self.push(&entry.user_data(data));
    }

    pub fn cancel(&mut self, data: u64) {
        let entry = opcode::AsyncCancel::new(data).build();
        self.push(&entry.user_data(user_data(Tag::Ignore, 0)));
    }

    pub fn read_file(&mut self, data: u64, fd: RawFd, memory: *mut u8, length: u32, offset: u64) {
        let entry = opcode::Read::new(types::Fd(fd), memory, length).offset(offset).build();
        self.push(&entry.user_data(data));
    }

    pub fn write_file(&mut self, data: u64, fd: RawFd, memory: *const u8, length: u32, offset: u64, durable: bool) {
        let flags = if durable { libc::RWF_DSYNC } else { 0 };
        let entry = opcode::Write::new(types::Fd(fd), memory, length).offset(offset).rw_flags(flags).build();
        self.push(&entry.user_data(data));
    }

    pub fn flush_file(&mut self, data: u64, fd: RawFd) {
        let entry = opcode::Fsync::new(types::Fd(fd)).flags(types::FsyncFlags::DATASYNC).build();
        self.push(&entry.user_data(data));
    }

    /// Submits what is queued and runs pending completions, without waiting.
    pub fn enter_without_waiting(&mut self) {
        let (queued, work) = {
            let submission = self.ring.submission();
            (submission.len(), submission.taskrun() || submission.cq_overflow())
        };
        if queued == 0 && !work {
            return;
        }
        // SAFETY: no argument is passed; the entries were queued by `push`.
        let result = unsafe { self.ring.submitter().enter::<libc::sigset_t>(queued as u32, 0, ENTER_GETEVENTS, None) };
        tolerate(result);
    }

    /// Submits what is queued and waits for a completion. `timeout_ms` -1: as long as it takes.
    pub fn wait(&mut self, timeout_ms: i32) {
        if !self.early.is_empty() || !self.ring.completion().is_empty() {
            self.enter_without_waiting();
            return;
        }
        let timespec = types::Timespec::new()
            .sec(timeout_ms.max(0) as u64 / 1000)
            .nsec(timeout_ms.max(0) as u32 % 1000 * 1_000_000);
        let result = if timeout_ms < 0 {
            self.ring.submit_and_wait(1)
        } else {
            self.ring.submitter().submit_with_args(1, &types::SubmitArgs::new().timespec(&timespec))
        };
        tolerate(result);
    }

    /// Moves reaped completions (user data, result) into `into`.
    pub fn reap(&mut self, into: &mut Vec<(u64, i32)>) {
        into.append(&mut self.early);
        let mut completion = self.ring.completion();
        completion.sync();
        for entry in &mut completion {
            into.push((entry.user_data(), entry.result()));
        }
    }
}

/// Timeouts and signals end a wait; EBUSY and EAGAIN mean "reap first". Anything else would lose operations.
fn tolerate(result: std::io::Result<usize>) {
    if let Err(error) = result {
        match error.raw_os_error() {
            Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN) => {}
            _ => panic!("io_uring_enter failed: {error}"),
        }
    }
}

/// True if the page cache had all of it: then the data is in `memory` and no asynchronous read is needed.
pub fn read_cached(fd: RawFd, memory: *mut u8, length: usize, offset: u64) -> bool {
    let iov = libc::iovec { iov_base: memory.cast(), iov_len: length };
    loop {
        // SAFETY: `memory` is a pool range of `length` bytes that the operation holds.
        let count = unsafe { libc::preadv2(fd, &raw const iov, 1, offset as libc::off_t, libc::RWF_NOWAIT) };
        if count < 0 && last_errno() == libc::EINTR {
            continue;
        }
        // Less than all: partly cached or end of file; the asynchronous read sorts it out.
        return count == length as isize;
    }
}
