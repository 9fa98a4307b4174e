//! The operations, one function each. A worker thread runs them one at a time with its own `Identity`.
//!
//! The pattern: find the object as the server (open_by_handle_at needs CAP_DAC_READ_SEARCH), act as the caller, so
//! that the kernel judges permissions, ownership and quota, and look at the result as the server again. Operations
//! that change something hold the locks of the inodes whose `before` they report; waiting for stable storage happens
//! outside the locks, so that callers who wait together share one journal commit.

use super::cache::{Cache, Inode};
use super::identity::{Assumed, Caller, Identity};
use super::layout::*;
use super::locks::InodeLocks;
use super::readdir::{Listing, RootEntry, DIRENT_BUFFER_BYTES};
use super::sys::{self, Errno, Handle, Key, Outcome, ESTALE};
use super::Door;
use std::ffi::CStr;
use std::os::fd::{OwnedFd, RawFd};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::Arc;

/// Most bytes of one READ or WRITE; more is a short transfer, which clients continue.
pub const MAX_IO_BYTES: u32 = 1 << 20;

const MAX_OFFSET: u64 = i64::MAX as u64;
/// linux/fs.h major and minor limits that survive every encoding of dev_t.
const MAX_MAJOR: u32 = 1 << 12;
const MAX_MINOR: u32 = 1 << 20;

const EXT4_SUPER_MAGIC: i64 = 0xef53;
const EXT4_LINK_MAX: f64 = 65000.0;
const OTHER_LINK_MAX: f64 = 2_147_483_647.0;

/// An open filesystem. Dropping it closes every descriptor on the tree.
pub struct Mount {
    /// The export's root, opened for reading: what open_by_handle_at and syncfs start from.
    pub root_fd: OwnedFd,
    /// /proc/self/fd
    pub proc: OwnedFd,
    pub root: Key,
    pub root_handle: Handle,
    pub cache: Cache,
    pub locks: InodeLocks,
    /// Errno of a failed sync that no caller was waiting for; the next COMMIT reports it.
    pub unreported: AtomicI32,
}

impl Mount {
    fn proc(&self) -> RawFd {
        sys::raw(&self.proc)
    }

    fn adopt(&self, key: Key, fd: OwnedFd, stat: &libc::statx) -> Arc<Inode> {
        self.cache.insert(Inode::new(key, u32::from(stat.stx_mode) & libc::S_IFMT, fd))
    }

    /// The object of a handle and its attributes now. ESTALE when it is gone.
    fn look(&self, handle: &Handle) -> Outcome<(Arc<Inode>, libc::statx)> {
        if let Some(inode) = self.cache.get(&handle.key()) {
            let stat = self.live(&inode)?;
            return Ok((inode, stat));
        }
        self.open(handle)
    }

    /// The object of a handle, for those who look at it under its lock.
    fn find(&self, handle: &Handle) -> Outcome<Arc<Inode>> {
        match self.cache.get(&handle.key()) {
            Some(inode) => Ok(inode),
            None => self.open(handle).map(|(inode, _)| inode),
        }
    }

    fn open(&self, handle: &Handle) -> Outcome<(Arc<Inode>, libc::statx)> {
        let key = handle.key();
        let open = || sys::open_by_handle(sys::raw(&self.root_fd), handle, libc::O_PATH);
        let fd = match open() {
            Err(errno) if errno.is_out_of_descriptors() => {
                self.cache.halve();
                open()
            }
            result => result,
        };
        let fd = fd.map_err(|errno| match errno.0 {
            libc::ENOENT | libc::EINVAL => ESTALE,
            _ => errno,
        })?;
        // For ext4 a handle with generation 0 opens whatever lives in that inode. Only an inode whose generation
        // really is 0 (the root, lost+found) has such a handle.
        if key.generation == 0 && sys::handle_of(sys::raw(&fd))?.key() != key {
            return Err(ESTALE);
        }
        let stat = sys::statx_fd(sys::raw(&fd))?;
        if stat.stx_nlink == 0 {
            return Err(ESTALE);
        }
        Ok((self.adopt(key, fd, &stat), stat))
    }

    fn live(&self, inode: &Inode) -> Outcome<libc::statx> {
        let stat = sys::statx_fd(inode.path())?;
        if stat.stx_nlink == 0 {
            self.cache.remove(&inode.key);
            return Err(ESTALE);
        }
        Ok(stat)
    }

    fn sync_directory(&self, directory: &Inode) -> Outcome<()> {
        let fd = directory.read_fd(self.proc())?;
        directory.sync.run(true, |_| sys::sync_file(fd, true))
    }

    /// Stable storage for the attributes of any object. Through a descriptor of its own cursor for writeback errors, so
    /// that a COMMIT still learns of them.
    fn sync_object(&self, inode: &Inode) -> Outcome<()> {
        if inode.is_regular() || inode.is_directory() {
            return sys::sync_file(inode.read_fd(self.proc())?, true);
        }
        // Links and special files cannot be opened, hence not synced alone.
        sys::sync_filesystem(sys::raw(&self.root_fd))
    }

    /// Closes what left the cache with unsynced data.
    pub fn sync_retired(&self) {
        while let Some(inode) = self.cache.take_retired() {
            if let Err(errno) = inode.sync_written(self.proc(), true) {
                self.unreported.store(errno.0, Ordering::SeqCst);
            }
        }
    }
}

/// What a finished operation hands over besides its block.
pub struct Done {
    pub errno: i32,
    /// READ: the block with the data, else -1.
    pub payload: i64,
    pub length: u32,
}

struct Payload {
    offset: i64,
    length: u32,
}

pub struct Worker {
    mount: Arc<Mount>,
    door: Arc<dyn Door>,
    identity: Identity,
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
    dirents: Box<[u8]>,
}

/// As the caller: a macro, because the guard borrows two fields of the worker and nothing else of it.
macro_rules! assume {
    ($worker:expr) => {{
        let caller = Caller { uid: $worker.uid, gid: $worker.gid, groups: &$worker.groups };
        $worker.identity.assume(&caller)
    }};
}

fn not_permitted_crossing(errno: Errno) -> Errno {
    // Something is mounted there: not ours to serve.
    if errno.0 == libc::EXDEV {
        Errno(libc::EACCES)
    } else {
        errno
    }
}

fn nothing_at(errno: Errno) -> bool {
    errno.0 == libc::ENOENT
}

/// May write: the kernel's answer, or ownership. A client that opened a file and then lost permission (chmod,
/// creation with mode 0444) keeps writing, as on knfsd (NFSD_MAY_OWNER_OVERRIDE).
fn may_write(_as_caller: &Assumed<'_>, inode: &Inode, stat: &libc::statx, uid: u32) -> Outcome<()> {
    match sys::may(inode.path(), libc::W_OK) {
        Err(Errno(libc::EACCES)) if stat.stx_uid == uid => Ok(()),
        result => result,
    }
}

/// May read: likewise; execute permission is enough too, because a client pages programs in by reading.
fn may_read(_as_caller: &Assumed<'_>, inode: &Inode, stat: &libc::statx, uid: u32) -> Outcome<()> {
    match sys::may(inode.path(), libc::R_OK) {
        Err(Errno(libc::EACCES)) if stat.stx_uid == uid || sys::may(inode.path(), libc::X_OK).is_ok() => Ok(()),
        result => result,
    }
}

fn data_file_only(inode: &Inode) -> Outcome<()> {
    if inode.is_regular() {
        return Ok(());
    }
    Err(Errno(if inode.is_directory() { libc::EISDIR } else { libc::EINVAL }))
}

fn directory_only(inode: &Inode) -> Outcome<()> {
    if inode.is_directory() {
        Ok(())
    } else {
        Err(Errno(libc::ENOTDIR))
    }
}

impl Worker {
    pub fn new(mount: Arc<Mount>, door: Arc<dyn Door>, identity: Identity) -> Worker {
        let dirents = vec![0; DIRENT_BUFFER_BYTES].into_boxed_slice();
        Worker { mount, door, identity, uid: 0, gid: 0, groups: Vec::new(), dirents }
    }

    pub fn mount(&self) -> &Mount {
        &self.mount
    }

    /// Runs the operation in `block` and leaves its results there.
    pub fn run(&mut self, block: &mut Block) -> Done {
        block.clear_results();
        self.uid = block.u32(UID);
        self.gid = block.u32(GID);
        block.groups(&mut self.groups);
        let mut payload = None;
        let outcome = match block.u32(OP) {
            OP_GETATTR => self.getattr(block),
            OP_SETATTR => self.setattr(block),
            OP_LOOKUP => self.lookup(block),
            OP_ACCESS => self.access(block),
            OP_READLINK => self.readlink(block),
            OP_READ => self.read(block).map(|read| payload = read),
            OP_WRITE => self.write(block),
            OP_CREATE => self.create(block),
            OP_MKDIR => self.mkdir(block),
            OP_SYMLINK => self.symlink(block),
            OP_MKNOD => self.mknod(block),
            OP_REMOVE => self.remove(block, 0),
            OP_RMDIR => self.remove(block, libc::AT_REMOVEDIR),
            OP_RENAME => self.rename(block),
            OP_LINK => self.link(block),
            OP_READDIR => self.readdir(block),
            OP_FSSTAT => self.fsstat(block),
            OP_PATHCONF => self.pathconf(block),
            OP_COMMIT => self.commit(block),
            unknown => panic!("operation {unknown} in a request block"),
        };
        let (offset, length) = payload.map_or((-1, 0), |payload: Payload| (payload.offset, payload.length));
        Done { errno: outcome.err().map_or(0, |errno| errno.0), payload: offset, length }
    }

    fn getattr(&mut self, block: &mut Block) -> Outcome<()> {
        let (_, stat) = self.mount.look(&block.handle(HANDLE_A)?)?;
        block.set_attributes_at(ATTRIBUTES, &stat);
        Ok(())
    }

    fn lookup(&mut self, block: &mut Block) -> Outcome<()> {
        let (directory, stat) = self.mount.look(&block.handle(HANDLE_A)?)?;
        block.set_attributes_at(ATTRIBUTES2, &stat);
        directory_only(&directory)?;
        let mut name = block.name()?;
        if name.is_dot_dot() && directory.key == self.mount.root {
            name = CName::new(b".")?;
        }
        let resolve = if name.is_dot_dot() { sys::RESOLVE_PARENT } else { sys::RESOLVE_NAME };
        let found = {
            let _as_caller = assume!(self)?;
            sys::open_name(directory.path(), &name, libc::O_PATH | libc::O_NOFOLLOW, 0, resolve)
        };
        let fd = match found {
            Err(errno) if errno.is_out_of_descriptors() => {
                self.mount.cache.halve();
                return Err(errno);
            }
            result => result.map_err(not_permitted_crossing)?,
        };
        self.found(block, fd).map(|_| ())
    }

    /// Answers with handle and attributes of an object just opened with O_PATH.
    fn found(&self, block: &mut Block, fd: OwnedFd) -> Outcome<Arc<Inode>> {
        let stat = sys::statx_fd(sys::raw(&fd))?;
        let handle = sys::handle_of(sys::raw(&fd))?;
        block.set_attributes_at(ATTRIBUTES, &stat);
        block.set_handle(&handle);
        Ok(self.mount.adopt(handle.key(), fd, &stat))
    }

    fn access(&mut self, block: &mut Block) -> Outcome<()> {
        const READ: u32 = 1;
        const LOOKUP: u32 = 2;
        const MODIFY: u32 = 4;
        const EXTEND: u32 = 8;
        const DELETE: u32 = 16;
        const EXECUTE: u32 = 32;
        let (inode, stat) = self.mount.look(&block.handle(HANDLE_A)?)?;
        block.set_attributes_at(ATTRIBUTES, &stat);
        let asked = block.u32(REQUEST_COUNT);
        let _as_caller = assume!(self)?;
        let may = |mode| sys::may(inode.path(), mode).is_ok();
        let mut granted = 0;
        if inode.is_directory() {
            if asked & READ != 0 && may(libc::R_OK) {
                granted |= READ;
            }
            if asked & LOOKUP != 0 && may(libc::X_OK) {
                granted |= LOOKUP;
            }
            // To change entries one must reach them.
            if asked & (MODIFY | EXTEND | DELETE) != 0 && may(libc::W_OK | libc::X_OK) {
                granted |= MODIFY | EXTEND | DELETE;
            }
        } else {
            if asked & READ != 0 && may(libc::R_OK) {
                granted |= READ;
            }
            if asked & (MODIFY | EXTEND) != 0 && may(libc::W_OK) {
                granted |= MODIFY | EXTEND;
            }
            if asked & EXECUTE != 0 && inode.is_regular() && may(libc::X_OK) {
                granted |= EXECUTE;
            }
        }
        block.set_u32(COUNT, granted & asked);
        Ok(())
    }

    fn readlink(&mut self, block: &mut Block) -> Outcome<()> {
        let (inode, stat) = self.mount.look(&block.handle(HANDLE_A)?)?;
        block.set_attributes_at(ATTRIBUTES, &stat);
        if inode.kind != libc::S_IFLNK {
            return Err(Errno(libc::EINVAL));
        }
        let length = sys::read_link(inode.path(), block.bytes_mut(TEXT, MAX_TEXT_BYTES))?;
        block.set_u32(COUNT, length as u32);
        Ok(())
    }

    fn read(&mut self, block: &mut Block) -> Outcome<Option<Payload>> {
        let (inode, stat) = self.mount.look(&block.handle(HANDLE_A)?)?;
        block.set_attributes_at(ATTRIBUTES, &stat);
        data_file_only(&inode)?;
        let fd = inode.read_fd(self.mount.proc());
        may_read(&assume!(self)?, &inode, &stat, self.uid)?;
        let fd = fd?;
        let count = block.u32(REQUEST_COUNT).min(MAX_IO_BYTES) as usize;
        let offset = block.f64(OFFSET) as u64;
        if count == 0 || offset >= stat.stx_size {
            let eof = offset >= stat.stx_size;
            block.set_u32(RESULT_FLAGS, if eof { RESULT_EOF } else { 0 });
            return Ok(None);
        }
        // Clients ask for 1 MiB of small files too: no more of the pool than there is to read.
        let count = count.min((stat.stx_size - offset) as usize);
        let payload = self.door.allocate(count as u32).ok_or(Errno(libc::ENOMEM))?;
        let mut done = 0;
        let outcome = loop {
            // SAFETY: the block is ours until it is handed over and holds at least `count` bytes.
            let read = unsafe {
                let into = self.door.base().add(payload as usize + done);
                sys::read_at(fd, into, count - done, offset + done as u64)
            };
            match read {
                Ok(0) => break Ok(()),
                Ok(length) => done += length,
                Err(errno) => break Err(errno),
            }
            if done == count {
                break Ok(());
            }
        };
        // After the data: eof must hold for the file as it was when the last byte was read, or later.
        let outcome = outcome.and_then(|()| sys::statx_fd(inode.path()));
        let stat = match outcome {
            Ok(stat) if done > 0 => stat,
            other => {
                self.door.release(payload);
                if let Ok(stat) = &other {
                    // Truncated since the first look.
                    block.set_attributes_at(ATTRIBUTES, stat);
                    block.set_u32(RESULT_FLAGS, if offset >= stat.stx_size { RESULT_EOF } else { 0 });
                }
                return other.map(|_| None);
            }
        };
        block.set_attributes_at(ATTRIBUTES, &stat);
        block.set_u32(COUNT, done as u32);
        block.set_u32(RESULT_FLAGS, if offset + done as u64 >= stat.stx_size { RESULT_EOF } else { 0 });
        Ok(Some(Payload { offset: payload, length: done as u32 }))
    }

    fn write(&mut self, block: &mut Block) -> Outcome<()> {
        let mount = Arc::clone(&self.mount);
        let inode = mount.find(&block.handle(HANDLE_A)?)?;
        let stability = block.u32(KIND);
        assert!(stability <= 2, "stable_how {stability} in a request block");
        let held = mount.locks.one(inode.key.inode);
        let before = mount.live(&inode)?;
        block.set_before(BEFORE, &before);
        block.set_attributes_at(ATTRIBUTES, &before);
        data_file_only(&inode)?;
        let fd = inode.write_fd(mount.proc());
        let written = self.write_data(block, &inode, &before, fd);
        let after = sys::statx_fd(inode.path());
        drop(held);
        if let Ok(after) = &after {
            block.set_attributes_at(ATTRIBUTES, after);
        }
        let count = written?;
        // Outside the lock, so that stable writes to one file share their flushes. More than the range is synced then,
        // never less: RWF_DSYNC and RWF_SYNC would sync just the range, but one write after the other.
        if stability != 0 && count > 0 {
            inode.sync_written(mount.proc(), stability == 2)?;
        }
        block.set_u32(COUNT, count);
        block.set_u32(COMMITTED, stability);
        Ok(())
    }

    /// How many bytes were written; an error only when none were.
    fn write_data(&mut self, block: &Block, inode: &Inode, stat: &libc::statx, fd: Outcome<RawFd>) -> Outcome<u32> {
        // The data must be written as the caller too: that is what makes the kernel clear setuid and setgid.
        let as_caller = assume!(self)?;
        may_write(&as_caller, inode, stat, self.uid)?;
        let fd = fd?;
        let count = block.u32(REQUEST_COUNT).min(MAX_IO_BYTES) as usize;
        let offset = block.f64(OFFSET) as u64;
        if offset > MAX_OFFSET - count as u64 {
            return Err(Errno(libc::EFBIG));
        }
        let address = block.f64(ADDRESS) as usize;
        assert!(count == 0 || address <= self.door.length() - count, "data inside the pool");
        let mut done = 0;
        if count > 0 {
            inode.dirty.store(true, Ordering::SeqCst);
        }
        while done < count {
            // SAFETY: inside the pool, checked above; the submitter holds the block until the operation is completed.
            let written =
                unsafe { sys::write_at(fd, self.door.base().add(address + done), count - done, offset + done as u64) };
            match written {
                Ok(0) => break,
                Ok(length) => done += length,
                Err(errno) if done == 0 => return Err(errno),
                Err(_) => break,
            }
        }
        if done == 0 && count > 0 {
            return Err(Errno(libc::EIO));
        }
        Ok(done as u32)
    }

    fn commit(&mut self, block: &mut Block) -> Outcome<()> {
        let (inode, stat) = self.mount.look(&block.handle(HANDLE_A)?)?;
        block.set_attributes_at(ATTRIBUTES, &stat);
        data_file_only(&inode)?;
        may_write(&assume!(self)?, &inode, &stat, self.uid)?;
        let synced = inode.sync_written(self.mount.proc(), true);
        // COMMIT changes none of these, so what is seen once is both before and after.
        let stat = self.mount.live(&inode)?;
        block.set_before(BEFORE, &stat);
        block.set_attributes_at(ATTRIBUTES, &stat);
        synced?;
        match self.mount.unreported.swap(0, Ordering::SeqCst) {
            0 => Ok(()),
            errno => Err(Errno(errno)),
        }
    }

    fn setattr(&mut self, block: &mut Block) -> Outcome<()> {
        let mount = Arc::clone(&self.mount);
        let inode = mount.find(&block.handle(HANDLE_A)?)?;
        let held = mount.locks.one(inode.key.inode);
        let before = mount.live(&inode)?;
        block.set_before(BEFORE, &before);
        block.set_attributes_at(ATTRIBUTES, &before);
        let changes = block.set_attributes_request();
        let guard_differs = block.flag(FLAG_GUARD)
            && (before.stx_ctime.tv_sec != block.f64(OFFSET) as i64 || before.stx_ctime.tv_nsec != block.u32(LIMIT));
        let changed = if guard_differs { Err(ENOTSYNC) } else { self.apply(&inode, &before, &changes) };
        let after = sys::statx_fd(inode.path());
        drop(held);
        if let Ok(after) = &after {
            block.set_attributes_at(ATTRIBUTES, after);
        }
        changed?;
        if block.flag(FLAG_DURABLE) {
            mount.sync_object(&inode)?;
        }
        Ok(())
    }

    /// Size, owner, mode, times, in this order: truncation stamps mtime, and a change of owner clears setuid and
    /// setgid.
    fn apply(&mut self, inode: &Inode, stat: &libc::statx, changes: &SetAttributes) -> Outcome<()> {
        changes.check()?;
        if changes.has(SET_MODE) && inode.kind == libc::S_IFLNK {
            return Err(Errno(libc::EOPNOTSUPP));
        }
        if changes.has(SET_SIZE) && !inode.is_regular() {
            return Err(Errno(libc::EINVAL));
        }
        let proc = self.mount.proc();
        let write_fd = if changes.has(SET_SIZE) { Some(inode.write_fd(proc)) } else { None };
        let as_caller = assume!(self)?;
        if let Some(fd) = write_fd {
            may_write(&as_caller, inode, stat, self.uid)?;
            sys::truncate(fd?, changes.size)?;
        }
        if changes.has(SET_UID | SET_GID) {
            let uid = changes.has(SET_UID).then_some(changes.uid);
            let gid = changes.has(SET_GID).then_some(changes.gid);
            sys::change_owner(inode.path(), uid, gid)?;
        }
        if changes.has(SET_MODE) {
            sys::change_mode(proc, inode.path(), changes.mode)?;
        }
        if !changes.has(SET_ATIME | SET_ATIME_NOW | SET_MTIME | SET_MTIME_NOW) {
            return Ok(());
        }
        let time = |now, set, value: Time| libc::timespec {
            tv_sec: if changes.has(set) { value.seconds } else { 0 },
            tv_nsec: match (changes.has(now), changes.has(set)) {
                (true, _) => libc::UTIME_NOW,
                (false, true) => i64::from(value.nanoseconds),
                (false, false) => libc::UTIME_OMIT,
            },
        };
        let times = [time(SET_ATIME_NOW, SET_ATIME, changes.atime), time(SET_MTIME_NOW, SET_MTIME, changes.mtime)];
        let refused = match sys::change_times(inode.path(), &times) {
            Err(errno) if errno.0 == libc::EPERM || errno.0 == libc::EACCES => errno,
            result => return result,
        };
        // One stamp "now" and the other untouched needs ownership of utimensat, but NFSv3 lets a mere writer do it.
        if changes.has(SET_ATIME | SET_MTIME) || sys::may(inode.path(), libc::W_OK).is_err() {
            return Err(refused);
        }
        drop(as_caller);
        sys::change_times(inode.path(), &times)
    }

    /// Runs `work` on a directory with its wcc data around it, then makes it durable if asked for.
    fn change_directory(
        &mut self,
        block: &mut Block,
        work: impl FnOnce(&mut Worker, &mut Block, &Inode) -> Outcome<Option<Arc<Inode>>>,
    ) -> Outcome<()> {
        let directory = self.mount.find(&block.handle(HANDLE_A)?)?;
        let mount = Arc::clone(&self.mount);
        let held = mount.locks.one(directory.key.inode);
        let before = mount.live(&directory)?;
        block.set_before(BEFORE, &before);
        let done = directory_only(&directory).and_then(|()| work(self, block, &directory));
        if let Ok(after) = sys::statx_fd(directory.path()) {
            block.set_attributes_at(ATTRIBUTES2, &after);
        }
        drop(held);
        let also = done?;
        if block.flag(FLAG_DURABLE) {
            mount.sync_directory(&directory)?;
            // Attributes set after the creation may stand in a later journal transaction than the directory's.
            if let Some(inode) = also {
                mount.sync_object(&inode)?;
            }
        }
        Ok(())
    }

    fn create(&mut self, block: &mut Block) -> Outcome<()> {
        self.change_directory(block, |worker, block, directory| worker.create_in(block, directory))
    }

    fn create_in(&mut self, block: &mut Block, directory: &Inode) -> Outcome<Option<Arc<Inode>>> {
        let name = block.name()?;
        let how = block.u32(KIND);
        let known = [CREATE_UNCHECKED, CREATE_GUARDED, CREATE_EXCLUSIVE].contains(&how);
        assert!(known, "create mode {how} in a request block");
        let changes = block.set_attributes_request();
        changes.check()?;
        if name.is_dots() {
            return Err(Errno(libc::EEXIST));
        }
        let mode = if how == CREATE_EXCLUSIVE || !changes.has(SET_MODE) { 0 } else { changes.mode };
        let verifier = verifier_times(block.u64(VERIFIER).to_le_bytes());
        // Another process on this head may remove the file between the two steps; three tries tell that from a riddle.
        for _ in 0..3 {
            // O_EXCL first: O_CREAT on a file that exists would run into fs.protected_regular in sticky directories.
            let flags =
                libc::O_CREAT | libc::O_EXCL | libc::O_WRONLY | libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
            let created = {
                let _as_caller = assume!(self)?;
                sys::open_name(directory.path(), &name, flags, mode, sys::RESOLVE_NAME)
            };
            match created {
                Ok(fd) => {
                    let times = (how == CREATE_EXCLUSIVE).then_some(verifier);
                    return self.finish_file(block, directory, &name, fd, &changes, times);
                }
                Err(Errno(libc::EEXIST)) if how != CREATE_GUARDED => {}
                Err(errno) => return Err(not_permitted_crossing(errno)),
            }
            let existing = {
                let _as_caller = assume!(self)?;
                sys::open_name(directory.path(), &name, libc::O_PATH | libc::O_NOFOLLOW, 0, sys::RESOLVE_NAME)
            };
            match existing {
                Ok(fd) => {
                    return self.finish_existing(block, fd, &changes, (how == CREATE_EXCLUSIVE).then_some(verifier))
                }
                Err(errno) if nothing_at(errno) => {}
                Err(errno) => return Err(not_permitted_crossing(errno)),
            }
        }
        Err(Errno(libc::EEXIST))
    }

    /// A file that `fd` just created for writing. Undone when its attributes cannot be set.
    fn finish_file(
        &mut self,
        block: &mut Block,
        directory: &Inode,
        name: &CName,
        fd: OwnedFd,
        changes: &SetAttributes,
        exclusive: Option<[libc::timespec; 2]>,
    ) -> Outcome<Option<Arc<Inode>>> {
        let proc = self.mount.proc();
        let handle = sys::handle_of(sys::raw(&fd))?;
        let path = sys::reopen(proc, sys::raw(&fd), libc::O_PATH)?;
        let inode = self.mount.cache.insert(Inode::new(handle.key(), libc::S_IFREG, path).with_write(fd));
        let finished = match exclusive {
            Some(times) => sys::change_times(inode.path(), &times).map(|()| true),
            None => self.apply_to_new(&inode, changes),
        };
        let more = match finished {
            Ok(more) => more,
            Err(errno) => {
                self.mount.cache.remove(&inode.key);
                sys::unlink(directory.path(), name, 0)?;
                return Err(errno);
            }
        };
        block.set_attributes_at(ATTRIBUTES, &sys::statx_fd(inode.path())?);
        block.set_handle(&handle);
        Ok(more.then_some(inode))
    }

    /// CREATE of a name that exists: UNCHECKED only truncates; EXCLUSIVE succeeds for the file this very request made.
    fn finish_existing(
        &mut self,
        block: &mut Block,
        fd: OwnedFd,
        changes: &SetAttributes,
        exclusive: Option<[libc::timespec; 2]>,
    ) -> Outcome<Option<Arc<Inode>>> {
        let stat = sys::statx_fd(sys::raw(&fd))?;
        if u32::from(stat.stx_mode) & libc::S_IFMT != libc::S_IFREG {
            return Err(Errno(libc::EEXIST));
        }
        if let Some([atime, mtime]) = exclusive {
            let is_replay =
                stat.stx_size == 0 && stat.stx_atime.tv_sec == atime.tv_sec && stat.stx_mtime.tv_sec == mtime.tv_sec;
            if !is_replay {
                return Err(Errno(libc::EEXIST));
            }
        }
        let handle = sys::handle_of(sys::raw(&fd))?;
        let inode = self.mount.adopt(handle.key(), fd, &stat);
        let truncates = exclusive.is_none() && changes.has(SET_SIZE);
        if truncates {
            self.apply(&inode, &stat, &SetAttributes { mask: SET_SIZE, ..*changes })?;
        }
        block.set_attributes_at(ATTRIBUTES, &sys::statx_fd(inode.path())?);
        block.set_handle(&handle);
        // A replayed EXCLUSIVE may have to make durable what the first one did not get to.
        Ok((truncates || exclusive.is_some()).then_some(inode))
    }

    /// Sets what creation itself could not. Returns whether anything was left to set.
    fn apply_to_new(&mut self, inode: &Inode, changes: &SetAttributes) -> Outcome<bool> {
        let mut changes = *changes;
        // The kernel gave mode and, from the caller, owner. mkdir drops setuid and setgid, and so may a change of
        // owner or size; setting the other bits again would only disturb a default ACL.
        if changes.mode & 0o6000 == 0 || inode.kind == libc::S_IFLNK {
            changes.mask &= !SET_MODE;
        }
        if !inode.is_regular() {
            changes.mask &= !SET_SIZE;
        }
        if changes.mask == 0 {
            return Ok(false);
        }
        let stat = sys::statx_fd(inode.path())?;
        let owner = SetAttributes { mask: changes.mask & (SET_UID | SET_GID), ..changes };
        let wants_owner =
            owner.has(SET_UID) && owner.uid != stat.stx_uid || owner.has(SET_GID) && owner.gid != stat.stx_gid;
        if wants_owner {
            match self.apply(inode, &stat, &owner) {
                // Clients send their own idea of the group along; what the caller may not set stays as created (knfsd).
                Ok(()) | Err(Errno(libc::EPERM)) => {}
                Err(errno) => return Err(errno),
            }
        }
        changes.mask &= !(SET_UID | SET_GID);
        if changes.mask != 0 {
            self.apply(inode, &sys::statx_fd(inode.path())?, &changes)?;
        }
        Ok(true)
    }

    fn mkdir(&mut self, block: &mut Block) -> Outcome<()> {
        self.make(block, |directory, name, changes, _| {
            sys::make_directory(directory, name, if changes.has(SET_MODE) { changes.mode & 0o1777 } else { 0 })
        })
    }

    fn symlink(&mut self, block: &mut Block) -> Outcome<()> {
        self.make(block, |directory, name, _, block| {
            let target = block.symlink_target()?;
            let target = CStr::from_bytes_with_nul(&target).map_err(|_| Errno(libc::EINVAL))?;
            sys::make_symlink(target, directory, name)
        })
    }

    fn mknod(&mut self, block: &mut Block) -> Outcome<()> {
        self.make(block, |directory, name, changes, block| {
            let (major, minor) = (block.u32(RDEV), block.u32(RDEV + 4));
            let (kind, device) = match block.u32(KIND) {
                3 => (libc::S_IFBLK, true),
                4 => (libc::S_IFCHR, true),
                6 => (libc::S_IFSOCK, false),
                7 => (libc::S_IFIFO, false),
                _ => return Err(EBADTYPE),
            };
            if device && (major >= MAX_MAJOR || minor >= MAX_MINOR) {
                return Err(Errno(libc::EINVAL));
            }
            let device = if device { libc::makedev(major, minor) } else { 0 };
            sys::make_node(directory, name, kind | if changes.has(SET_MODE) { changes.mode } else { 0 }, device)
        })
    }

    /// MKDIR, SYMLINK, MKNOD: `make` runs as the caller.
    fn make(
        &mut self,
        block: &mut Block,
        make: impl FnOnce(RawFd, &CName, &SetAttributes, &Block) -> Outcome<()>,
    ) -> Outcome<()> {
        self.change_directory(block, |worker, block, directory| {
            let name = block.name()?;
            let changes = block.set_attributes_request();
            changes.check()?;
            if name.is_dots() {
                return Err(Errno(libc::EEXIST));
            }
            {
                let _as_caller = assume!(worker)?;
                make(directory.path(), &name, &changes, block)?;
            }
            // As the server: the caller may not be allowed to look at what it made (a directory without x).
            let flags = libc::O_PATH | libc::O_NOFOLLOW;
            let fd = sys::open_name(directory.path(), &name, flags, 0, sys::RESOLVE_NAME)?;
            let inode = worker.found(block, fd)?;
            if !worker.apply_to_new(&inode, &changes)? {
                return Ok(None);
            }
            block.set_attributes_at(ATTRIBUTES, &sys::statx_fd(inode.path())?);
            Ok(Some(inode))
        })
    }

    fn remove(&mut self, block: &mut Block, flags: libc::c_int) -> Outcome<()> {
        self.change_directory(block, |worker, block, directory| {
            let name = block.name()?;
            if name.is_dots() && flags == 0 {
                return Err(Errno(libc::EINVAL));
            }
            // Known before it is gone: an open descriptor would keep its space.
            let victim = sys::handle_at_name(directory.path(), &name).map(|handle| handle.key());
            {
                let _as_caller = assume!(worker)?;
                sys::unlink(directory.path(), &name, flags)?;
            }
            if let Ok(key) = victim {
                worker.mount.cache.remove_synced(&key);
            }
            Ok(None)
        })
    }

    fn rename(&mut self, block: &mut Block) -> Outcome<()> {
        let mount = Arc::clone(&self.mount);
        let from = mount.find(&block.handle(HANDLE_A)?)?;
        let to = mount.find(&block.handle(HANDLE_B)?)?;
        let held = mount.locks.two(from.key.inode, to.key.inode);
        let (before_from, before_to) = (mount.live(&from)?, mount.live(&to)?);
        block.set_before(BEFORE, &before_from);
        block.set_before(BEFORE2, &before_to);
        let renamed = self.rename_between(block, &from, &to);
        if let Ok(after) = sys::statx_fd(from.path()) {
            block.set_attributes_at(ATTRIBUTES2, &after);
        }
        if let Ok(after) = sys::statx_fd(to.path()) {
            block.set_attributes_at(ATTRIBUTES3, &after);
        }
        drop(held);
        renamed?;
        if block.flag(FLAG_DURABLE) {
            mount.sync_directory(&to)?;
            if from.key != to.key {
                mount.sync_directory(&from)?;
            }
        }
        Ok(())
    }

    fn rename_between(&mut self, block: &Block, from: &Inode, to: &Inode) -> Outcome<()> {
        directory_only(from)?;
        directory_only(to)?;
        let (from_name, to_name) = (block.name()?, block.second_name()?);
        if from_name.is_dots() || to_name.is_dots() {
            return Err(Errno(libc::EINVAL));
        }
        let victim = sys::handle_at_name(to.path(), &to_name).map(|handle| handle.key());
        {
            let _as_caller = assume!(self)?;
            sys::rename(from.path(), &from_name, to.path(), &to_name)?;
        }
        if let Ok(key) = victim {
            self.mount.cache.remove_synced(&key);
        }
        Ok(())
    }

    fn link(&mut self, block: &mut Block) -> Outcome<()> {
        let mount = Arc::clone(&self.mount);
        let (inode, stat) = mount.look(&block.handle(HANDLE_A)?)?;
        block.set_attributes_at(ATTRIBUTES, &stat);
        let directory = mount.find(&block.handle(HANDLE_B)?)?;
        let held = mount.locks.two(inode.key.inode, directory.key.inode);
        let before = mount.live(&directory)?;
        block.set_before(BEFORE, &before);
        let linked = self.link_in(block, &inode, &directory);
        if let Ok(after) = sys::statx_fd(directory.path()) {
            block.set_attributes_at(ATTRIBUTES2, &after);
        }
        if let Ok(after) = sys::statx_fd(inode.path()) {
            block.set_attributes_at(ATTRIBUTES, &after);
        }
        drop(held);
        linked?;
        if block.flag(FLAG_DURABLE) {
            mount.sync_directory(&directory)?;
        }
        Ok(())
    }

    /// The host's fs.protected_hardlinks holds here too (EPERM for a foreign file one cannot write), unlike on knfsd.
    fn link_in(&mut self, block: &Block, inode: &Inode, directory: &Inode) -> Outcome<()> {
        directory_only(directory)?;
        let name = block.name()?;
        if name.is_dots() {
            return Err(Errno(libc::EEXIST));
        }
        let _as_caller = assume!(self)?;
        sys::link(self.mount.proc(), inode.path(), directory.path(), &name)
    }

    fn readdir(&mut self, block: &mut Block) -> Outcome<()> {
        let (directory, stat) = self.mount.look(&block.handle(HANDLE_A)?)?;
        block.set_attributes_at(ATTRIBUTES, &stat);
        directory_only(&directory)?;
        let fd = {
            let _as_caller = assume!(self)?;
            sys::reopen(self.mount.proc(), directory.path(), libc::O_RDONLY | libc::O_DIRECTORY)?
        };
        let (address, length) = (block.f64(ADDRESS) as usize, block.u32(LIMIT) as usize);
        assert!(length <= self.door.length() && address <= self.door.length() - length, "entries inside the pool");
        // SAFETY: inside the pool, checked above; the submitter owns the block and reads it after completion.
        let out = unsafe { std::slice::from_raw_parts_mut(self.door.base().add(address), length) };
        let is_root = directory.key == self.mount.root;
        let listed = Listing {
            directory: sys::raw(&fd),
            cookie: block.u64(COOKIE),
            max_entries: block.u32(REQUEST_COUNT) as usize,
            plus: block.flag(FLAG_PLUS),
            root: is_root.then_some(RootEntry { handle: self.mount.root_handle, stat }),
            buffer: &mut self.dirents,
        }
        .fill(out);
        // A directory removed while it is listed says ENOENT.
        let listed = listed.map_err(|errno| if nothing_at(errno) { ESTALE } else { errno })?;
        block.set_attributes_at(ATTRIBUTES, &self.mount.live(&directory)?);
        block.set_u32(COUNT, listed.entries as u32);
        block.set_u32(RESULT_FLAGS, if listed.eof { RESULT_EOF } else { 0 });
        Ok(())
    }

    fn fsstat(&mut self, block: &mut Block) -> Outcome<()> {
        let (inode, stat) = self.mount.look(&block.handle(HANDLE_A)?)?;
        block.set_attributes_at(ATTRIBUTES, &stat);
        let statistics = sys::filesystem_statistics(inode.path())?;
        let unit = statistics.f_frsize as f64;
        let figures = [
            statistics.f_blocks as f64 * unit,
            statistics.f_bfree as f64 * unit,
            statistics.f_bavail as f64 * unit,
            statistics.f_files as f64,
            statistics.f_ffree as f64,
            statistics.f_ffree as f64,
        ];
        for (index, figure) in figures.into_iter().enumerate() {
            block.set_f64(STATISTICS + 8 * index, figure);
        }
        Ok(())
    }

    fn pathconf(&mut self, block: &mut Block) -> Outcome<()> {
        let (inode, stat) = self.mount.look(&block.handle(HANDLE_A)?)?;
        block.set_attributes_at(ATTRIBUTES, &stat);
        let statistics = sys::filesystem_statistics(inode.path())?;
        let link_max = if statistics.f_type == EXT4_SUPER_MAGIC { EXT4_LINK_MAX } else { OTHER_LINK_MAX };
        block.set_f64(STATISTICS, link_max);
        block.set_f64(STATISTICS + 8, statistics.f_namelen as f64);
        Ok(())
    }
}

/// The verifier of an EXCLUSIVE create as knfsd keeps it: first word in mtime, second in atime, as seconds; 31 bits
/// each, because ext4 with 128-byte inodes stores no more. Returns (atime, mtime) in the order of utimensat.
fn verifier_times(verifier: [u8; 8]) -> [libc::timespec; 2] {
    let word = |bytes: &[u8]| libc::timespec {
        tv_sec: i64::from(u32::from_le_bytes(bytes.try_into().unwrap()) & 0x7fff_ffff),
        tv_nsec: 0,
    };
    [word(&verifier[4..]), word(&verifier[..4])]
}

/// The largest file: what ext4 computes for s_maxbytes with extents (2^32 - 1 blocks), else the largest exact number.
pub fn max_file_size(statistics: &libc::statfs) -> f64 {
    const MAX_EXACT: f64 = 9_007_199_254_740_991.0;
    if statistics.f_type == EXT4_SUPER_MAGIC {
        f64::from(u32::MAX) * statistics.f_bsize as f64
    } else {
        MAX_EXACT
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exclusive_verifiers_become_seconds_of_31_bits() {
        let [atime, mtime] = verifier_times([1, 0, 0, 0x80, 0xff, 0xff, 0xff, 0xff]);
        assert_eq!((mtime.tv_sec, atime.tv_sec), (1, 0x7fff_ffff));
    }
}
