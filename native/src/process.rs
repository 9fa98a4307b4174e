//! What a process of drbdts asks of the kernel about itself, and checksums of JavaScript's own bytes.

use napi_derive::napi;

use crate::ring_workers::last_errno;

/// Ordinary CRC-32C of `bytes`, continuing from `seed`. Pure; borrows for the call only.
#[napi(js_name = "crc32c")]
pub fn crc32c(bytes: &[u8], seed: u32) -> u32 {
    crate::crc32c::crc32c(bytes, seed)
}

/// CRC-32C with the register from 0 and no final inversion. Pure; borrows for the call only.
#[napi(js_name = "crc32cRaw")]
pub fn crc32c_raw(bytes: &[u8]) -> u32 {
    crate::crc32c::crc32c_raw(bytes)
}

/// Keeps the process in memory: pages stay once touched, so that writing back through us never waits for our own paging.
/// @returns 0 or an errno
#[napi]
pub fn lock_memory() -> i32 {
    let flags = libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT;
    // SAFETY: plain system call.
    if unsafe { libc::mlockall(flags) } == 0 {
        0
    } else {
        last_errno()
    }
}

/// Marks the process as one that filesystems write through: its allocations never wait for writeback, and it is throttled less.
/// @returns 0 or an errno
#[napi]
pub fn set_io_flusher() -> i32 {
    const PR_SET_IO_FLUSHER: i32 = 57;
    // SAFETY: plain system call.
    if unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) } == 0 {
        0
    } else {
        last_errno()
    }
}
