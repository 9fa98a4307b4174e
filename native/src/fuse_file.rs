//! The FUSE device as a pseudo-connection of the ring: a thread reads requests and injects them as frames, replies are
//! written from the ring's thread. What the requests mean is JavaScript's business (src/node/fuse-file.ts).

use std::ffi::CString;
use std::fs::OpenOptions;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use napi_derive::napi;

use crate::completer::{Completer, HEADER_BYTES};
use crate::external::PseudoSend;
use crate::pool::PoolHandle;
use crate::ring::NativeRing;
use crate::ring_workers::last_errno;

/// struct fuse_in_header, and behind it in a WRITE struct fuse_write_in.
const WRITE_HEADERS: usize = 80;
const OPCODE_OFFSET: usize = 4;
const FUSE_WRITE: u32 = 16;
/// The kernel refuses to read into less than this (FUSE_MIN_READ_BUFFER).
const MIN_READ_BUFFER: usize = 8192;
/// How long to wait for the pool to have room again.
const POOL_PAUSE: Duration = Duration::from_millis(1);

/// Mounts a FUSE filesystem on `directory` and reads its requests.
/// @returns the number of a pseudo-connection, or minus an errno
#[napi]
pub fn mount_fuse(ring: &NativeRing, directory: String, subtype: String, max_write_bytes: u32) -> i32 {
    match mount(&directory, &subtype) {
        Ok(device) => serve(ring, device, directory, max_write_bytes as usize),
        Err(errno) => -errno,
    }
}

fn mount(directory: &str, subtype: &str) -> Result<OwnedFd, i32> {
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_CLOEXEC)
        .open("/dev/fuse")
        .map_err(|error| error.raw_os_error().unwrap_or(libc::EIO))?;
    let text = |value: String| CString::new(value).map_err(|_| libc::EINVAL);
    let source = text(subtype.to_owned())?;
    let kind = text(format!("fuse.{subtype}"))?;
    let target = text(directory.to_owned())?;
    let options = text(format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd()))?;
    // SAFETY: all strings live until the call returns.
    let status = unsafe {
        libc::mount(
            source.as_ptr(),
            target.as_ptr(),
            kind.as_ptr(),
            libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOATIME,
            options.as_ptr().cast(),
        )
    };
    if status == 0 {
        Ok(device.into())
    } else {
        Err(last_errno())
    }
}

/// Detaches the mount; when nothing uses it any more the device reports ENODEV and the reading thread ends.
fn unmount(directory: &str) {
    if let Ok(target) = CString::new(directory) {
        // SAFETY: the string lives until the call returns. An error means that it is unmounted already.
        unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
    }
}

fn serve(ring: &NativeRing, device: OwnedFd, directory: String, max_write_bytes: usize) -> i32 {
    let Some(completer) = ring.completer() else { return -libc::ESHUTDOWN };
    let pool = ring.pool();
    let device = Arc::new(device);
    let writer = device.clone();
    let writer_pool = ring.pool();
    let unmounted = directory.clone();
    let handler = Box::new(move |what: PseudoSend<'_>| match what {
        PseudoSend::Bytes { header, payload, length } => reply(&writer, &writer_pool, header, payload, length as usize),
        // The kernel bounds what is in flight; there is nothing to stop.
        PseudoSend::Pause(_) => {}
        PseudoSend::Close => {
            // On a thread of its own: the kernel may talk to us while it unmounts.
            let directory = unmounted.clone();
            thread::spawn(move || unmount(&directory));
        }
    });
    let Some(connection) = ring.register_pseudo_connection(handler) else { return -libc::ENOBUFS };
    let reader = Reader { device, pool, completer, connection, max_write_bytes };
    let spawned = thread::Builder::new().name("fuse".into()).spawn(move || reader.run());
    match spawned {
        Ok(_) => connection as i32,
        Err(_) => {
            unmount(&directory);
            -libc::EAGAIN
        }
    }
}

/// One reply is one writev; the kernel takes it whole. ENOENT: the request was interrupted and is forgotten; ENODEV: the
/// mount is gone, which the reader reports.
fn reply(device: &OwnedFd, pool: &PoolHandle, header: &[u8], payload: i64, length: usize) {
    let mut parts = [
        libc::iovec { iov_base: header.as_ptr().cast_mut().cast(), iov_len: header.len() },
        libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 },
    ];
    let count = if payload >= 0 && length > 0 {
        parts[1] = libc::iovec { iov_base: pool.range(payload, length).cast(), iov_len: length };
        2
    } else {
        1
    };
    // SAFETY: the parts point to live memory for the call.
    let written = unsafe { libc::writev(device.as_raw_fd(), parts.as_ptr(), count) };
    if written < 0 {
        let errno = last_errno();
        assert!(
            matches!(errno, libc::ENOENT | libc::ENODEV | libc::EINTR),
            "the kernel refuses a FUSE reply of {} bytes: errno {errno}",
            header.len() + length
        );
    }
}

struct Reader {
    device: Arc<OwnedFd>,
    pool: PoolHandle,
    completer: Completer,
    connection: u32,
    max_write_bytes: usize,
}

impl Reader {
    fn run(self) {
        let mut buffer = vec![0u8; MIN_READ_BUFFER.max(WRITE_HEADERS + self.max_write_bytes)];
        let errno = loop {
            // SAFETY: reads into our own buffer.
            let length =
                unsafe { libc::read(self.device.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
            if length < 0 {
                match last_errno() {
                    // Interrupted requests and signals; the next one counts.
                    libc::ENOENT | libc::EINTR | libc::EAGAIN => continue,
                    libc::ENODEV => break 0,
                    errno => break errno,
                }
            }
            self.inject(&buffer[..length as usize]);
        };
        self.completer.inject_closed(self.connection, errno);
    }

    fn inject(&self, message: &[u8]) {
        let opcode = u32::from_ne_bytes(message[OPCODE_OFFSET..OPCODE_OFFSET + 4].try_into().expect("four bytes"));
        if opcode != FUSE_WRITE || message.len() <= WRITE_HEADERS {
            let header = &message[..message.len().min(HEADER_BYTES)];
            self.completer.inject_frame(self.connection, header, -1, 0, 0);
            return;
        }
        let (header, data) = message.split_at(WRITE_HEADERS);
        let payload = loop {
            match self.pool.alloc(data.len()) {
                Some(offset) => break offset,
                // Bounded memory: the kernel waits with us until requests are done.
                None => thread::sleep(POOL_PAUSE),
            }
        };
        // SAFETY: the block was just allocated with this length and nobody else knows it yet.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), self.pool.range(payload, data.len()), data.len()) };
        self.completer.inject_frame(self.connection, header, payload, data.len() as u32, 0);
    }
}
