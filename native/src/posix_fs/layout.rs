//! The request block: how one filesystem operation travels between TypeScript and a worker thread.
//!
//! Each operation owns one pool block of `BLOCK_BYTES` (a slot, reused by the TypeScript side). TypeScript writes the
//! request part and submits the block's offset; a worker reads it, does the work, writes the result part and
//! completes the operation with an errno (0 is success). The completion orders the memory: neither side touches the
//! block while the other owns it. All integers are little-endian; sizes and seconds are f64, because both fit in 53
//! bits and a JavaScript number costs no BigInt; file ids and readdir cookies use all 64 bits and are u64.
//!
//! `src/io/posix-filesystem.ts` has the same constants by the same names; test/io/posix-filesystem.test.ts compares
//! them.
//!
//! ```text
//! RESULT part                            REQUEST part (offset REQUEST)
//! ATTRIBUTES    of the object       96   +OP            u32 number of the NFSv3 procedure
//! ATTRIBUTES2   of the directory    96   +FLAGS         u32 FLAG_*
//! ATTRIBUTES3   of `to` (RENAME)    96   +UID +GID      u32 credential
//! BEFORE        wcc before          40   +GROUP_COUNT   u32, at most MAX_GROUPS
//! BEFORE2       wcc before of `to`  40   +NAME_LENGTH   u32 of NAME
//! HANDLE        u32 length, bytes  136   +TEXT_LENGTH   u32 of TEXT
//! COUNT         u32 bytes, entries       +COUNT         u32 bytes, access mask, most entries
//! RESULT_FLAGS  u32 RESULT_EOF           +OFFSET        f64 file offset; guard seconds
//! COMMITTED     u32 stable_how           +COOKIE        u64 readdir position
//! STATISTICS    6 x f64 (FSSTAT);        +ADDRESS       f64 pool offset of data (WRITE) or entries (READDIR)
//!               2 x f64 (PATHCONF)       +KIND          u32 stable_how; create mode; ftype3 (MKNOD)
//!                                        +LIMIT         u32 bytes at ADDRESS (READDIR); guard nanoseconds
//! attributes (96): u32 present, type     +SATTR         u32 mask SET_*, mode, uid, gid; f64 size, atime s,
//!   (ftype3), mode, links, uid, gid,                    mtime s; u32 atime ns, mtime ns
//!   rdev major, rdev minor; f64 size,    +RDEV          u32 major, minor
//!   used; u64 file id; f64 atime s,      +VERIFIER      8 bytes
//!   mtime s, ctime s; u32 atime ns,      +HANDLE_A      u32 length, handle (u32 type, bytes)
//!   mtime ns, ctime ns, 0                +HANDLE_B      likewise: target directory of RENAME and LINK
//! before (40): u32 present, 0;           +NAME          256 bytes
//!   f64 size, mtime s, ctime s;          +TEXT          4096 bytes: second name, symlink target;
//!   u32 mtime ns, ctime ns                              READLINK answers here, COUNT bytes
//!                                        +GROUPS        u32 each
//!
//! READDIR entries, one after the other at ADDRESS, each a multiple of 8 bytes long:
//!   u32 length of this record, u32 name length, u64 file id, u64 cookie, u32 handle length (0: none), u32 0,
//!   attributes (96; `present` 0: none), handle, name, padding. Without FLAG_PLUS the attributes are left out too.
//! ```

use super::sys::{Errno, Handle, Outcome, MAX_HANDLE_BYTES};

pub const BLOCK_BYTES: usize = 16384;
pub const ATTRIBUTES: usize = 0;
pub const ATTRIBUTES2: usize = 96;
pub const ATTRIBUTES3: usize = 192;
pub const BEFORE: usize = 288;
pub const BEFORE2: usize = 328;
pub const HANDLE: usize = 368;
pub const COUNT: usize = 504;
pub const RESULT_FLAGS: usize = 508;
pub const COMMITTED: usize = 512;
pub const STATISTICS: usize = 520;

pub const OP: usize = 1024;
pub const FLAGS: usize = 1028;
pub const UID: usize = 1032;
pub const GID: usize = 1036;
pub const GROUP_COUNT: usize = 1040;
pub const NAME_LENGTH: usize = 1044;
pub const TEXT_LENGTH: usize = 1048;
pub const REQUEST_COUNT: usize = 1052;
pub const OFFSET: usize = 1056;
pub const COOKIE: usize = 1064;
pub const ADDRESS: usize = 1072;
pub const KIND: usize = 1080;
pub const LIMIT: usize = 1084;
pub const SATTR: usize = 1088;
pub const RDEV: usize = 1136;
pub const VERIFIER: usize = 1144;
pub const HANDLE_A: usize = 1152;
pub const HANDLE_B: usize = 1288;
pub const NAME: usize = 1424;
pub const TEXT: usize = 1680;
pub const GROUPS: usize = 5776;
pub const MAX_GROUPS: usize = 2048;
pub const MAX_NAME_BYTES: usize = 256;
pub const MAX_TEXT_BYTES: usize = 4096;

pub const FLAG_DURABLE: u32 = 1;
pub const FLAG_PLUS: u32 = 2;
pub const FLAG_GUARD: u32 = 4;

pub const RESULT_EOF: u32 = 1;

pub const SET_MODE: u32 = 1;
pub const SET_UID: u32 = 2;
pub const SET_GID: u32 = 4;
pub const SET_SIZE: u32 = 8;
pub const SET_ATIME_NOW: u32 = 16;
pub const SET_ATIME: u32 = 32;
pub const SET_MTIME_NOW: u32 = 64;
pub const SET_MTIME: u32 = 128;

pub const CREATE_UNCHECKED: u32 = 0;
pub const CREATE_GUARDED: u32 = 1;
pub const CREATE_EXCLUSIVE: u32 = 2;

pub const OP_GETATTR: u32 = 1;
pub const OP_SETATTR: u32 = 2;
pub const OP_LOOKUP: u32 = 3;
pub const OP_ACCESS: u32 = 4;
pub const OP_READLINK: u32 = 5;
pub const OP_READ: u32 = 6;
pub const OP_WRITE: u32 = 7;
pub const OP_CREATE: u32 = 8;
pub const OP_MKDIR: u32 = 9;
pub const OP_SYMLINK: u32 = 10;
pub const OP_MKNOD: u32 = 11;
pub const OP_REMOVE: u32 = 12;
pub const OP_RMDIR: u32 = 13;
pub const OP_RENAME: u32 = 14;
pub const OP_LINK: u32 = 15;
pub const OP_READDIR: u32 = 16;
pub const OP_FSSTAT: u32 = 18;
pub const OP_PATHCONF: u32 = 20;
pub const OP_COMMIT: u32 = 21;

pub const ATTRIBUTES_BYTES: usize = 96;
pub const ENTRY_BYTES: usize = 32;

/// What NFSv3 has a status for and Linux no errno for programs: the kernel's own numbers (linux/errno.h).
/// A guarded SETATTR whose ctime differs.
pub const ENOTSYNC: Errno = Errno(522);
/// A readdir position the kernel never gave.
pub const EBADCOOKIE: Errno = Errno(523);
/// MKNOD of a type that MKNOD does not make.
pub const EBADTYPE: Errno = Errno(527);

const _: () = assert!(GROUPS + 4 * MAX_GROUPS <= BLOCK_BYTES);
const _: () = assert!(HANDLE_A + 4 + 4 + MAX_HANDLE_BYTES <= HANDLE_B && HANDLE_B + 8 + MAX_HANDLE_BYTES <= NAME);

/// The new attributes of SETATTR and the creating operations.
#[derive(Clone, Copy, Debug, Default)]
pub struct SetAttributes {
    pub mask: u32,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub size: u64,
    pub atime: Time,
    pub mtime: Time,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Time {
    pub seconds: i64,
    pub nanoseconds: u32,
}

impl SetAttributes {
    pub fn has(&self, bits: u32) -> bool {
        self.mask & bits != 0
    }

    /// What the kernel would misread is refused before anything is done: -1 means "unchanged" to chown, and utimensat
    /// has special meanings for large nanoseconds.
    pub fn check(&self) -> Outcome<()> {
        let bad_owner = self.has(SET_UID) && self.uid == u32::MAX || self.has(SET_GID) && self.gid == u32::MAX;
        let bad_time = self.has(SET_ATIME) && self.atime.nanoseconds > 999_999_999
            || self.has(SET_MTIME) && self.mtime.nanoseconds > 999_999_999;
        let bad_mode = self.has(SET_MODE) && self.mode > 0o7777;
        if bad_owner || bad_time || bad_mode {
            return Err(Errno(libc::EINVAL));
        }
        if self.has(SET_SIZE) && self.size > i64::MAX as u64 {
            return Err(Errno(libc::EFBIG));
        }
        Ok(())
    }
}

/// One request block. The pointer stays valid and unshared until the operation is completed.
pub struct Block(*mut u8);

// One worker at a time owns the block, from submission to completion.
unsafe impl Send for Block {}

impl Block {
    /// # Safety
    /// `base` points to BLOCK_BYTES bytes that nobody else touches until the operation is completed.
    pub unsafe fn new(base: *mut u8) -> Block {
        Block(base)
    }

    fn get<const N: usize>(&self, offset: usize) -> [u8; N] {
        assert!(offset + N <= BLOCK_BYTES, "inside the block");
        // SAFETY: inside the block, checked above.
        unsafe { self.0.add(offset).cast::<[u8; N]>().read_unaligned() }
    }

    fn put<const N: usize>(&mut self, offset: usize, bytes: [u8; N]) {
        assert!(offset + N <= BLOCK_BYTES, "inside the block");
        // SAFETY: inside the block, checked above.
        unsafe { self.0.add(offset).cast::<[u8; N]>().write_unaligned(bytes) }
    }

    pub fn u32(&self, offset: usize) -> u32 {
        u32::from_le_bytes(self.get(offset))
    }

    pub fn u64(&self, offset: usize) -> u64 {
        u64::from_le_bytes(self.get(offset))
    }

    pub fn f64(&self, offset: usize) -> f64 {
        f64::from_le_bytes(self.get(offset))
    }

    pub fn set_u32(&mut self, offset: usize, value: u32) {
        self.put(offset, value.to_le_bytes());
    }

    pub fn set_f64(&mut self, offset: usize, value: f64) {
        self.put(offset, value.to_le_bytes());
    }

    pub fn bytes(&self, offset: usize, length: usize) -> &[u8] {
        assert!(offset <= BLOCK_BYTES && length <= BLOCK_BYTES - offset, "inside the block");
        // SAFETY: inside the block, checked above; the worker owns it.
        unsafe { std::slice::from_raw_parts(self.0.add(offset), length) }
    }

    pub fn bytes_mut(&mut self, offset: usize, length: usize) -> &mut [u8] {
        assert!(offset <= BLOCK_BYTES && length <= BLOCK_BYTES - offset, "inside the block");
        // SAFETY: as above, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(offset), length) }
    }

    /// Nothing present yet: what the last operation in this slot left must not be taken for a result.
    pub fn clear_results(&mut self) {
        for offset in [ATTRIBUTES, ATTRIBUTES2, ATTRIBUTES3, BEFORE, BEFORE2, HANDLE, COUNT, RESULT_FLAGS, COMMITTED] {
            self.set_u32(offset, 0);
        }
    }

    pub fn flag(&self, bit: u32) -> bool {
        self.u32(FLAGS) & bit != 0
    }

    /// The single path component of the request, NUL-terminated for the kernel. One byte more than any filesystem
    /// allows passes, so that the kernel says ENAMETOOLONG itself, after its other checks.
    pub fn name(&self) -> Outcome<CName> {
        CName::new(self.bytes(NAME, self.length(NAME_LENGTH, MAX_NAME_BYTES)))
    }

    pub fn second_name(&self) -> Outcome<CName> {
        CName::new(self.bytes(TEXT, self.length(TEXT_LENGTH, MAX_NAME_BYTES)))
    }

    pub fn symlink_target(&self) -> Outcome<Vec<u8>> {
        let target = self.bytes(TEXT, self.length(TEXT_LENGTH, MAX_TEXT_BYTES));
        if target.contains(&0) {
            return Err(Errno(libc::EINVAL));
        }
        let mut terminated = Vec::with_capacity(target.len() + 1);
        terminated.extend_from_slice(target);
        terminated.push(0);
        Ok(terminated)
    }

    fn length(&self, offset: usize, most: usize) -> usize {
        let length = self.u32(offset) as usize;
        assert!(length <= most, "a name or text of {length} bytes in a request block");
        length
    }

    pub fn handle(&self, offset: usize) -> Outcome<Handle> {
        let length = self.u32(offset) as usize;
        assert!(length <= 4 + MAX_HANDLE_BYTES, "a handle of {length} bytes in a request block");
        Handle::from_bytes(self.bytes(offset + 4, length))
    }

    pub fn set_handle(&mut self, handle: &Handle) {
        let length = handle.wire_length();
        self.set_u32(HANDLE, length as u32);
        handle.write_to(self.bytes_mut(HANDLE + 4, length));
    }

    pub fn set_attributes_at(&mut self, offset: usize, stat: &libc::statx) {
        encode_attributes(self.bytes_mut(offset, ATTRIBUTES_BYTES), stat);
    }

    pub fn set_before(&mut self, offset: usize, stat: &libc::statx) {
        self.set_u32(offset, 1);
        self.set_f64(offset + 8, stat.stx_size as f64);
        self.set_f64(offset + 16, stat.stx_mtime.tv_sec as f64);
        self.set_f64(offset + 24, stat.stx_ctime.tv_sec as f64);
        self.set_u32(offset + 32, stat.stx_mtime.tv_nsec);
        self.set_u32(offset + 36, stat.stx_ctime.tv_nsec);
    }

    pub fn groups(&self, into: &mut Vec<u32>) {
        let count = self.u32(GROUP_COUNT) as usize;
        assert!(count <= MAX_GROUPS, "{count} groups in a request block");
        into.clear();
        into.extend((0..count).map(|index| self.u32(GROUPS + 4 * index)));
    }

    pub fn set_attributes_request(&self) -> SetAttributes {
        SetAttributes {
            mask: self.u32(SATTR),
            mode: self.u32(SATTR + 4),
            uid: self.u32(SATTR + 8),
            gid: self.u32(SATTR + 12),
            size: self.f64(SATTR + 16) as u64,
            atime: Time { seconds: self.f64(SATTR + 24) as i64, nanoseconds: self.u32(SATTR + 40) },
            mtime: Time { seconds: self.f64(SATTR + 32) as i64, nanoseconds: self.u32(SATTR + 44) },
        }
    }
}

/// ftype3 of a file mode (RFC 1813 section 2.6); 0 for what NFSv3 has no name for.
fn file_type(mode: u16) -> u32 {
    match u32::from(mode) & libc::S_IFMT {
        libc::S_IFREG => 1,
        libc::S_IFDIR => 2,
        libc::S_IFBLK => 3,
        libc::S_IFCHR => 4,
        libc::S_IFLNK => 5,
        libc::S_IFSOCK => 6,
        libc::S_IFIFO => 7,
        _ => 0,
    }
}

pub fn encode_attributes(into: &mut [u8], stat: &libc::statx) {
    let words = [
        1,
        file_type(stat.stx_mode),
        u32::from(stat.stx_mode) & 0o7777,
        stat.stx_nlink,
        stat.stx_uid,
        stat.stx_gid,
        stat.stx_rdev_major,
        stat.stx_rdev_minor,
    ];
    for (index, word) in words.into_iter().enumerate() {
        into[4 * index..4 * index + 4].copy_from_slice(&word.to_le_bytes());
    }
    into[32..40].copy_from_slice(&(stat.stx_size as f64).to_le_bytes());
    into[40..48].copy_from_slice(&((stat.stx_blocks * 512) as f64).to_le_bytes());
    into[48..56].copy_from_slice(&stat.stx_ino.to_le_bytes());
    for (index, time) in [stat.stx_atime, stat.stx_mtime, stat.stx_ctime].into_iter().enumerate() {
        into[56 + 8 * index..64 + 8 * index].copy_from_slice(&(time.tv_sec as f64).to_le_bytes());
        into[80 + 4 * index..84 + 4 * index].copy_from_slice(&time.tv_nsec.to_le_bytes());
    }
}

/// One path component with its NUL, on the stack.
pub struct CName {
    bytes: [u8; MAX_NAME_BYTES + 1],
    length: usize,
}

impl CName {
    /// EINVAL for an empty name and for `/` or NUL inside: those never reach the kernel.
    pub fn new(name: &[u8]) -> Outcome<CName> {
        if name.is_empty() || name.len() > MAX_NAME_BYTES || name.contains(&0) || name.contains(&b'/') {
            return Err(Errno(libc::EINVAL));
        }
        let mut bytes = [0; MAX_NAME_BYTES + 1];
        bytes[..name.len()].copy_from_slice(name);
        Ok(CName { bytes, length: name.len() })
    }

    pub fn as_ptr(&self) -> *const libc::c_char {
        self.bytes.as_ptr().cast()
    }

    fn name(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    pub fn is_dot(&self) -> bool {
        self.name() == b"."
    }

    pub fn is_dot_dot(&self) -> bool {
        self.name() == b".."
    }

    pub fn is_dots(&self) -> bool {
        self.is_dot() || self.is_dot_dot()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_would_escape_the_directory_are_refused() {
        for bad in [&b""[..], b"a/b", b"/", b"a\0b", &[b'x'; 257]] {
            assert_eq!(CName::new(bad).err(), Some(Errno(libc::EINVAL)));
        }
        assert!(CName::new(&[b'x'; 256]).is_ok(), "the kernel refuses this one itself");
        assert!(CName::new(b"..").unwrap().is_dot_dot());
    }

    #[test]
    fn attributes_the_kernel_would_misread_are_refused() {
        let set = |mask, change: fn(&mut SetAttributes)| {
            let mut attributes = SetAttributes { mask, ..Default::default() };
            change(&mut attributes);
            attributes.check()
        };
        assert_eq!(set(SET_UID, |a| a.uid = u32::MAX), Err(Errno(libc::EINVAL)));
        assert_eq!(set(SET_MTIME, |a| a.mtime.nanoseconds = 1_000_000_000), Err(Errno(libc::EINVAL)));
        assert_eq!(set(SET_SIZE, |a| a.size = 1 << 63), Err(Errno(libc::EFBIG)));
        assert_eq!(set(0, |a| a.uid = u32::MAX), Ok(()), "only what is asked for counts");
    }
}
