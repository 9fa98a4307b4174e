//! System calls as the filesystem operations need them: thin, no policy, errors as `Errno`.

use super::layout::CName;
use std::ffi::CStr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// A positive Linux error number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Errno(pub i32);

pub type Outcome<T> = Result<T, Errno>;

impl Errno {
    pub fn last() -> Errno {
        Errno(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO))
    }
}

pub const ESTALE: Errno = Errno(libc::ESTALE);

fn check(result: libc::c_long) -> Outcome<libc::c_long> {
    if result < 0 {
        Err(Errno::last())
    } else {
        Ok(result)
    }
}

fn check_int(result: libc::c_int) -> Outcome<libc::c_int> {
    if result < 0 {
        Err(Errno::last())
    } else {
        Ok(result)
    }
}

fn owned(fd: libc::c_long) -> OwnedFd {
    // SAFETY: a descriptor the kernel just made for us.
    unsafe { OwnedFd::from_raw_fd(fd as RawFd) }
}

/// MAX_HANDLE_SZ of the kernel.
pub const MAX_HANDLE_BYTES: usize = 128;

/// inode number and generation, low word first (ext4 and most others; 8 bytes).
const FILEID_INO32_GEN: i32 = 1;
/// XFS: 64-bit inode number, generation (12 bytes).
const FILEID_XFS_INO64_GEN: i32 = 0x81;

/// A kernel file handle (struct file_handle of open_by_handle_at(2)) of a form that names inode and generation.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Handle {
    length: u32,
    kind: i32,
    bytes: [u8; MAX_HANDLE_BYTES],
}

/// What a handle names: one object for ever, on either head.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Key {
    pub inode: u64,
    pub generation: u32,
}

impl Handle {
    /// ESTALE for whatever this kernel never handed out.
    pub fn from_bytes(wire: &[u8]) -> Outcome<Handle> {
        if wire.len() < 4 || wire.len() > 4 + MAX_HANDLE_BYTES {
            return Err(ESTALE);
        }
        let (kind, body) = wire.split_at(4);
        let mut handle =
            Handle { length: body.len() as u32, kind: i32::from_le_bytes(kind.try_into().unwrap()), bytes: [0; 128] };
        handle.bytes[..body.len()].copy_from_slice(body);
        if handle.key_of().is_none() {
            return Err(ESTALE);
        }
        Ok(handle)
    }

    fn key_of(&self) -> Option<Key> {
        let word = |offset: usize| u32::from_ne_bytes(self.bytes[offset..offset + 4].try_into().unwrap());
        match (self.kind, self.length) {
            (FILEID_INO32_GEN, 8) => Some(Key { inode: u64::from(word(0)), generation: word(4) }),
            (FILEID_XFS_INO64_GEN, 12) => {
                Some(Key { inode: u64::from(word(0)) | u64::from(word(4)) << 32, generation: word(8) })
            }
            _ => None,
        }
    }

    pub fn key(&self) -> Key {
        self.key_of().expect("checked when the handle was made")
    }

    pub fn wire_length(&self) -> usize {
        4 + self.length as usize
    }

    pub fn write_to(&self, into: &mut [u8]) {
        into[..4].copy_from_slice(&self.kind.to_le_bytes());
        into[4..self.wire_length()].copy_from_slice(&self.bytes[..self.length as usize]);
    }

    pub fn to_vec(self) -> Vec<u8> {
        let mut wire = vec![0; self.wire_length()];
        self.write_to(&mut wire);
        wire
    }
}

const EMPTY: &CStr = c"";

fn name_to_handle(fd: RawFd, name: *const libc::c_char, flags: libc::c_int) -> Outcome<Handle> {
    let mut handle = Handle { length: MAX_HANDLE_BYTES as u32, kind: 0, bytes: [0; MAX_HANDLE_BYTES] };
    let mut mount_id: libc::c_int = 0;
    // SAFETY: `handle` has the layout of struct file_handle with room for the length it announces.
    check(unsafe { libc::syscall(libc::SYS_name_to_handle_at, fd, name, &raw mut handle, &raw mut mount_id, flags) })?;
    if handle.key_of().is_none() {
        return Err(Errno(libc::EOPNOTSUPP));
    }
    Ok(handle)
}

/// The handle of an open object; EOPNOTSUPP when the filesystem has none, or none of a form that names a generation.
pub fn handle_of(fd: RawFd) -> Outcome<Handle> {
    name_to_handle(fd, EMPTY.as_ptr(), libc::AT_EMPTY_PATH)
}

/// The handle of an entry; symbolic links are not followed.
pub fn handle_at(directory: RawFd, name: &CStr) -> Outcome<Handle> {
    name_to_handle(directory, name.as_ptr(), 0)
}

pub fn handle_at_name(directory: RawFd, name: &CName) -> Outcome<Handle> {
    name_to_handle(directory, name.as_ptr(), 0)
}

pub fn open_by_handle(mount: RawFd, handle: &Handle, flags: libc::c_int) -> Outcome<OwnedFd> {
    // SAFETY: as in name_to_handle.
    check(unsafe { libc::syscall(libc::SYS_open_by_handle_at, mount, &raw const *handle, flags | libc::O_CLOEXEC) })
        .map(owned)
}

/// Looks up one component: never out of the directory, never through a link, never into another mount.
pub const RESOLVE_NAME: u64 =
    libc::RESOLVE_BENEATH | libc::RESOLVE_NO_SYMLINKS | libc::RESOLVE_NO_MAGICLINKS | libc::RESOLVE_NO_XDEV;
/// The same for `..`, which RESOLVE_BENEATH would refuse.
pub const RESOLVE_PARENT: u64 = libc::RESOLVE_NO_SYMLINKS | libc::RESOLVE_NO_MAGICLINKS | libc::RESOLVE_NO_XDEV;

pub fn open_name(directory: RawFd, name: &CName, flags: libc::c_int, mode: u32, resolve: u64) -> Outcome<OwnedFd> {
    // SAFETY: open_how is plain data; zero is its neutral value.
    let mut how: libc::open_how = unsafe { std::mem::zeroed() };
    how.flags = (flags | libc::O_CLOEXEC) as u64;
    how.mode = u64::from(mode);
    how.resolve = resolve;
    // SAFETY: valid pointers for the call.
    check(unsafe {
        libc::syscall(libc::SYS_openat2, directory, name.as_ptr(), &raw const how, size_of::<libc::open_how>())
    })
    .map(owned)
}

/// Text of a descriptor's entry in /proc/self/fd.
struct FdName([u8; 12]);

impl FdName {
    fn new(fd: RawFd) -> FdName {
        let mut text = [0; 12];
        let mut digits = [0; 11];
        let (mut rest, mut count) = (fd, 0);
        while rest > 0 || count == 0 {
            digits[count] = b'0' + (rest % 10) as u8;
            rest /= 10;
            count += 1;
        }
        for index in 0..count {
            text[index] = digits[count - 1 - index];
        }
        FdName(text)
    }

    fn as_ptr(&self) -> *const libc::c_char {
        self.0.as_ptr().cast()
    }
}

/// Opens the object of another descriptor anew (`proc` is /proc/self/fd): only the inode's own permissions are checked.
pub fn reopen(proc: RawFd, fd: RawFd, flags: libc::c_int) -> Outcome<OwnedFd> {
    let name = FdName::new(fd);
    // SAFETY: a NUL-terminated name for the call.
    check_int(unsafe { libc::openat(proc, name.as_ptr(), flags | libc::O_CLOEXEC) }).map(|fd| owned(fd.into()))
}

pub fn statx_fd(fd: RawFd) -> Outcome<libc::statx> {
    statx_at(fd, EMPTY, libc::AT_EMPTY_PATH)
}

pub fn statx_at(fd: RawFd, name: &CStr, flags: libc::c_int) -> Outcome<libc::statx> {
    let mut stat = std::mem::MaybeUninit::<libc::statx>::uninit();
    // SAFETY: the kernel fills the whole structure on success.
    unsafe {
        check_int(libc::statx(
            fd,
            name.as_ptr(),
            flags | libc::AT_SYMLINK_NOFOLLOW | libc::AT_NO_AUTOMOUNT,
            libc::STATX_BASIC_STATS,
            stat.as_mut_ptr(),
        ))?;
        Ok(stat.assume_init())
    }
}

/// Would the thread's filesystem identity be granted `mode` (R_OK, W_OK, X_OK)?
pub fn may(fd: RawFd, mode: libc::c_int) -> Outcome<()> {
    let flags = libc::AT_EACCESS | libc::AT_EMPTY_PATH;
    // SAFETY: no pointers but a literal.
    check(unsafe { libc::syscall(libc::SYS_faccessat2, fd, EMPTY.as_ptr(), mode, flags) }).map(|_| ())
}

pub fn read_link(fd: RawFd, into: &mut [u8]) -> Outcome<usize> {
    // SAFETY: `into` bounds the write.
    let length = unsafe { libc::readlinkat(fd, EMPTY.as_ptr(), into.as_mut_ptr().cast(), into.len()) };
    check(length as libc::c_long).map(|length| length as usize)
}

/// # Safety
/// `into` points to `length` writable bytes.
pub unsafe fn read_at(fd: RawFd, into: *mut u8, length: usize, offset: u64) -> Outcome<usize> {
    check(libc::pread(fd, into.cast(), length, offset as libc::off_t) as libc::c_long).map(|count| count as usize)
}

/// # Safety
/// `from` points to `length` readable bytes.
pub unsafe fn write_at(fd: RawFd, from: *const u8, length: usize, offset: u64) -> Outcome<usize> {
    check(libc::pwrite(fd, from.cast(), length, offset as libc::off_t) as libc::c_long).map(|count| count as usize)
}

pub fn truncate(fd: RawFd, size: u64) -> Outcome<()> {
    // SAFETY: no pointers.
    check_int(unsafe { libc::ftruncate(fd, size as libc::off_t) }).map(|_| ())
}

pub fn change_owner(fd: RawFd, uid: Option<u32>, gid: Option<u32>) -> Outcome<()> {
    let (uid, gid) = (uid.unwrap_or(u32::MAX), gid.unwrap_or(u32::MAX));
    // SAFETY: no pointers but a literal.
    check_int(unsafe { libc::fchownat(fd, EMPTY.as_ptr(), uid, gid, libc::AT_EMPTY_PATH) }).map(|_| ())
}

/// Through /proc/self/fd, because fchmod refuses O_PATH descriptors and fchmodat2 is younger than the kernels we serve.
/// Never call it for a symbolic link.
pub fn change_mode(proc: RawFd, fd: RawFd, mode: u32) -> Outcome<()> {
    let name = FdName::new(fd);
    // SAFETY: a NUL-terminated name for the call.
    check_int(unsafe { libc::fchmodat(proc, name.as_ptr(), mode, 0) }).map(|_| ())
}

pub fn change_times(fd: RawFd, times: &[libc::timespec; 2]) -> Outcome<()> {
    // SAFETY: two timespecs for the call.
    check_int(unsafe { libc::utimensat(fd, EMPTY.as_ptr(), times.as_ptr(), libc::AT_EMPTY_PATH) }).map(|_| ())
}

pub fn make_directory(directory: RawFd, name: &CName, mode: u32) -> Outcome<()> {
    // SAFETY: a NUL-terminated name for the call; the same below.
    check_int(unsafe { libc::mkdirat(directory, name.as_ptr(), mode) }).map(|_| ())
}

pub fn make_symlink(target: &CStr, directory: RawFd, name: &CName) -> Outcome<()> {
    check_int(unsafe { libc::symlinkat(target.as_ptr(), directory, name.as_ptr()) }).map(|_| ())
}

pub fn make_node(directory: RawFd, name: &CName, mode: u32, device: libc::dev_t) -> Outcome<()> {
    check_int(unsafe { libc::mknodat(directory, name.as_ptr(), mode, device) }).map(|_| ())
}

pub fn unlink(directory: RawFd, name: &CName, flags: libc::c_int) -> Outcome<()> {
    check_int(unsafe { libc::unlinkat(directory, name.as_ptr(), flags) }).map(|_| ())
}

pub fn rename(from: RawFd, from_name: &CName, to: RawFd, to_name: &CName) -> Outcome<()> {
    check_int(unsafe { libc::renameat(from, from_name.as_ptr(), to, to_name.as_ptr()) }).map(|_| ())
}

/// Links the object of `fd`. AT_EMPTY_PATH would need CAP_DAC_READ_SEARCH, which the caller's identity has not.
pub fn link(proc: RawFd, fd: RawFd, directory: RawFd, name: &CName) -> Outcome<()> {
    let old = FdName::new(fd);
    check_int(unsafe { libc::linkat(proc, old.as_ptr(), directory, name.as_ptr(), libc::AT_SYMLINK_FOLLOW) })
        .map(|_| ())
}

pub fn sync_file(fd: RawFd, with_metadata: bool) -> Outcome<()> {
    // SAFETY: no pointers.
    check_int(unsafe {
        if with_metadata {
            libc::fsync(fd)
        } else {
            libc::fdatasync(fd)
        }
    })
    .map(|_| ())
}

pub fn sync_filesystem(fd: RawFd) -> Outcome<()> {
    // SAFETY: no pointers.
    check_int(unsafe { libc::syncfs(fd) }).map(|_| ())
}

pub fn seek(fd: RawFd, position: i64) -> Outcome<()> {
    // SAFETY: no pointers.
    check(unsafe { libc::lseek(fd, position, libc::SEEK_SET) }).map(|_| ())
}

pub fn read_directory(fd: RawFd, into: &mut [u8]) -> Outcome<usize> {
    // SAFETY: `into` bounds the write.
    check(unsafe { libc::syscall(libc::SYS_getdents64, fd, into.as_mut_ptr(), into.len()) }).map(|count| count as usize)
}

pub fn filesystem_statistics(fd: RawFd) -> Outcome<libc::statfs> {
    let mut statistics = std::mem::MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: the kernel fills the whole structure on success.
    unsafe {
        check_int(libc::fstatfs(fd, statistics.as_mut_ptr()))?;
        Ok(statistics.assume_init())
    }
}

pub fn open_path(path: &CStr, flags: libc::c_int) -> Outcome<OwnedFd> {
    // SAFETY: a NUL-terminated path for the call.
    check_int(unsafe { libc::open(path.as_ptr(), flags | libc::O_CLOEXEC) }).map(|fd| owned(fd.into()))
}

pub fn raw(fd: &OwnedFd) -> RawFd {
    fd.as_raw_fd()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_handles_that_name_a_generation_are_taken() {
        let key = Handle::from_bytes(&[1, 0, 0, 0, 12, 0, 0, 0, 7, 0, 0, 1]).map(|handle| handle.key());
        assert_eq!(key, Ok(Key { inode: 12, generation: 0x0100_0007 }));
        for bad in
            [&[][..], &[1, 0, 0, 0], &[1, 0, 0, 0, 12, 0, 0, 0], &[9, 0, 0, 0, 12, 0, 0, 0, 7, 0, 0, 1], &[0; 133]]
        {
            assert_eq!(Handle::from_bytes(bad).map(|handle| handle.key()), Err(ESTALE));
        }
    }

    #[test]
    fn descriptors_have_decimal_names() {
        for fd in [0, 7, 10, 1048575, i32::MAX] {
            let text = FdName::new(fd);
            // SAFETY: NUL-terminated by construction.
            assert_eq!(unsafe { CStr::from_ptr(text.as_ptr()) }.to_str().unwrap(), fd.to_string());
        }
    }
}
