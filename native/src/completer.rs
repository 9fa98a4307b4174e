//! Completions from other threads. Workers queue them here; the ring is woken through an eventfd and delivers them to
//! JavaScript in its next batch.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// Header bytes of one frame, completion or operation.
pub const HEADER_BYTES: usize = 224;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PostKind {
    /// To the handler of an external target.
    External,
    /// A frame for a pseudo-connection.
    Frame,
    /// The end of a pseudo-connection.
    Closed,
    /// A file operation that a worker thread of the ring finished.
    File,
}

/// One posted completion.
#[derive(Clone, Copy)]
pub struct Post {
    pub kind: PostKind,
    /// Target, pseudo-connection, or operation number of the ring.
    pub target: u32,
    pub cookie: u32,
    pub result: i32,
    pub payload: i64,
    pub length: u32,
    pub flags: u32,
    pub header_length: u32,
    pub header: [u8; HEADER_BYTES],
}

struct Shared {
    queue: Mutex<Vec<Post>>,
    signalled: AtomicBool,
    event: OwnedFd,
}

/// Hands completions from any thread to the ring. Cheap to clone. Its queue is bounded by what was submitted: a worker
/// completes each operation once. Posts after the ring closed are dropped with the ring.
#[derive(Clone)]
pub struct Completer(Arc<Shared>);

impl Completer {
    pub(crate) fn new() -> std::io::Result<Completer> {
        // SAFETY: plain system call; the descriptor is owned below.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        if fd < 0 {
            return Err(std::io::Error::last_os_error());
        }
        Ok(Completer(Arc::new(Shared {
            queue: Mutex::new(Vec::with_capacity(64)),
            signalled: AtomicBool::new(false),
            // SAFETY: fresh descriptor, owned by nobody else.
            event: unsafe { OwnedFd::from_raw_fd(fd) },
        })))
    }

    pub(crate) fn event_fd(&self) -> RawFd {
        self.0.event.as_raw_fd()
    }

    pub(crate) fn post(&self, post: Post) {
        self.0.queue.lock().expect("never poisoned: panics abort").push(post);
        self.wake();
    }

    /// Makes the ring run a turn. Any thread.
    pub(crate) fn wake(&self) {
        if !self.0.signalled.swap(true, Ordering::AcqRel) {
            let one: u64 = 1;
            // SAFETY: writes eight bytes of a local.
            unsafe { libc::write(self.event_fd(), (&raw const one).cast(), 8) };
        }
    }

    /// Moves everything posted into `into` (which must be empty). The ring's thread only.
    pub(crate) fn drain(&self, into: &mut Vec<Post>) {
        debug_assert!(into.is_empty());
        // Cleared before taking: a post after the swap signals again.
        self.0.signalled.store(false, Ordering::Release);
        std::mem::swap(&mut *self.0.queue.lock().expect("never poisoned: panics abort"), into);
    }

    #[allow(clippy::too_many_arguments)]
    fn post_parts(
        &self,
        kind: PostKind,
        target: u32,
        cookie: u32,
        result: i32,
        payload: i64,
        length: u32,
        flags: u32,
        header: &[u8],
    ) {
        assert!(header.len() <= HEADER_BYTES, "header of {} bytes", header.len());
        let mut post = Post {
            kind,
            target,
            cookie,
            result,
            payload,
            length,
            flags,
            header_length: header.len() as u32,
            header: [0; HEADER_BYTES],
        };
        post.header[..header.len()].copy_from_slice(header);
        self.post(post);
    }

    /// Finishes the external operation `cookie` of `target`. `payload` is a pool offset (the JavaScript handler gets
    /// one reference) or -1; `header` at most 224 bytes. Any thread.
    #[allow(dead_code)]
    pub fn complete(&self, target: u32, cookie: u32, result: i32, payload: i64, length: u32, header: &[u8]) {
        self.post_parts(PostKind::External, target, cookie, result, payload, length, 0, header);
    }

    /// Delivers a frame on a pseudo-connection. The JavaScript handler gets one reference to `payload`. Any thread.
    #[allow(dead_code)]
    pub fn inject_frame(&self, connection: u32, header: &[u8], payload: i64, length: u32, flags: u32) {
        self.post_parts(PostKind::Frame, connection, 0, 0, payload, length, flags, header);
    }

    /// Ends a pseudo-connection with an errno (0: orderly). Nothing may be injected afterwards. Any thread.
    #[allow(dead_code)]
    pub fn inject_closed(&self, connection: u32, errno: i32) {
        self.post_parts(PostKind::Closed, connection, 0, errno, -1, 0, 0, &[]);
    }
}
