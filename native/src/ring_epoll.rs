//! Readiness for kernels and containers that forbid io_uring: one epoll descriptor, edge-triggered for connections.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use crate::ring_workers::last_errno;

const EVENTS: usize = 256;

pub const IN: u32 = libc::EPOLLIN as u32;
pub const OUT: u32 = libc::EPOLLOUT as u32;
/// End of stream or error: receiving will tell.
pub const GONE: u32 = (libc::EPOLLRDHUP | libc::EPOLLHUP | libc::EPOLLERR) as u32;
const EDGE: u32 = libc::EPOLLET as u32;

pub struct Epoll {
    epoll: OwnedFd,
    events: Vec<libc::epoll_event>,
}

impl Epoll {
    pub fn new() -> std::io::Result<Epoll> {
        // SAFETY: plain system call; the descriptor is owned below.
        let fd = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if fd < 0 {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: fresh descriptor.
        let epoll = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Epoll { epoll, events: vec![libc::epoll_event { events: 0, u64: 0 }; EVENTS] })
    }

    fn add(&self, fd: RawFd, events: u32, data: u64) -> Result<(), i32> {
        let mut event = libc::epoll_event { events, u64: data };
        // SAFETY: the event is copied by the kernel.
        if unsafe { libc::epoll_ctl(self.epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, fd, &raw mut event) } == 0 {
            Ok(())
        } else {
            Err(last_errno())
        }
    }

    /// A connection: told once per change, in both directions. Closing the descriptor removes it.
    pub fn add_connection(&self, data: u64, fd: RawFd) -> Result<(), i32> {
        self.add(fd, IN | OUT | libc::EPOLLRDHUP as u32 | EDGE, data)
    }

    /// Told in every wait as long as it is readable.
    pub fn add_readable(&self, data: u64, fd: RawFd) -> Result<(), i32> {
        self.add(fd, IN, data)
    }

    /// Appends (user data, event bits). `timeout_ms` -1: as long as it takes.
    pub fn wait(&mut self, timeout_ms: i32, into: &mut Vec<(u64, i32)>) {
        let (events, limit) = (self.events.as_mut_ptr(), EVENTS as i32);
        // SAFETY: room for EVENTS entries.
        let count = unsafe { libc::epoll_wait(self.epoll.as_raw_fd(), events, limit, timeout_ms) };
        if count < 0 {
            assert!(last_errno() == libc::EINTR, "epoll_wait failed: {}", std::io::Error::last_os_error());
            return;
        }
        for event in &self.events[..count as usize] {
            into.push((event.u64, event.events as i32));
        }
    }
}
