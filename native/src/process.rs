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

/// Keeps in memory, page by page once touched, what the block path needs: the code and data of node and its libraries,
/// the C heap, the stack, and the pools of rings (those made later too).
///
/// Not mlockall: V8 gives pages back with MADV_DONTNEED, which the kernel refuses on locked memory, and V8 then aborts
/// the process. Its heap therefore stays unlocked; on a host without swap it is never paged anyway.
/// @returns 0 or the first errno
#[napi]
pub fn lock_memory() -> i32 {
    let Ok(maps) = std::fs::read_to_string("/proc/self/maps") else { return libc::ENOENT };
    let mut errno = crate::pool::lock_pools();
    for line in maps.lines() {
        if let Some((start, length)) = lockable(line) {
            let result = lock_range(start as *const libc::c_void, length);
            if errno == 0 {
                errno = result;
            }
        }
    }
    errno
}

/// Locks a range on fault. Returns 0 or an errno.
pub fn lock_range(start: *const libc::c_void, length: usize) -> i32 {
    // SAFETY: locking changes no contents; a range that is gone meanwhile is only an error.
    if unsafe { libc::mlock2(start, length, libc::MLOCK_ONFAULT) } == 0 {
        0
    } else {
        last_errno()
    }
}

/// Start and length of a line of /proc/self/maps that backs a file, the C heap or the stack and may be touched at all.
fn lockable(line: &str) -> Option<(usize, usize)> {
    let mut fields = line.split_ascii_whitespace();
    let (range, permissions) = (fields.next()?, fields.next()?);
    let name = fields.nth(3)?;
    let wanted = name.starts_with('/') || name == "[heap]" || name == "[stack]";
    if !wanted || !permissions.starts_with('r') || name.starts_with("/dev/") || name.starts_with("/memfd:") {
        return None;
    }
    let (start, end) = range.split_once('-')?;
    let (start, end) = (usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?);
    Some((start, end - start))
}

/// Marks the process as one that filesystems write through: its allocations never wait for writeback, and it is
/// throttled less.
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
