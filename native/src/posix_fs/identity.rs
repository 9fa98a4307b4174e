//! The caller's identity on a worker thread.
//!
//! The kernel keeps credentials per thread; glibc hides that by changing all threads, hence raw system calls. A worker
//! rests with fsuid 0, which holds the filesystem capabilities; `assume` takes the caller's identity for a scope and
//! its guard gives fsuid 0 (and with it the capabilities) back. The filesystem gid and the supplementary groups stay
//! what they were last set to: with fsuid 0 they grant nothing that the capabilities do not, nothing is created at
//! rest, and callers who come in a row with one identity save the calls.

use super::sys::{Errno, Outcome};

/// An already squashed caller.
pub struct Caller<'a> {
    pub uid: u32,
    pub gid: u32,
    pub groups: &'a [u32],
}

/// Credentials of this thread as last set. Not Send: it describes the thread that made it.
pub struct Identity {
    fsgid: u32,
    groups: Vec<u32>,
    not_send: std::marker::PhantomData<*const ()>,
}

fn set_fsuid(uid: u32) -> u32 {
    // SAFETY: no pointers. Returns the previous value, whether or not it changed anything.
    unsafe { libc::syscall(libc::SYS_setfsuid, uid) as u32 }
}

fn set_fsgid(gid: u32) -> u32 {
    // SAFETY: as above.
    unsafe { libc::syscall(libc::SYS_setfsgid, gid) as u32 }
}

/// -1 is no valid id, so it changes nothing and the call only tells.
const TELL: u32 = u32::MAX;

const CAP_SYS_RESOURCE: u32 = 24;

#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapabilityWords {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

const CAPABILITY_VERSION_3: u32 = 0x2008_0522;

fn capabilities() -> Outcome<[CapabilityWords; 2]> {
    let mut header = CapabilityHeader { version: CAPABILITY_VERSION_3, pid: 0 };
    let mut words = [CapabilityWords::default(); 2];
    // SAFETY: version 3 fills two triples.
    if unsafe { libc::syscall(libc::SYS_capget, &raw mut header, words.as_mut_ptr()) } != 0 {
        return Err(Errno::last());
    }
    Ok(words)
}

/// The first of the capabilities that serving needs and this thread has not.
pub fn missing_capability() -> Outcome<Option<&'static str>> {
    const NEEDED: [(u32, &str); 8] = [
        (2, "CAP_DAC_READ_SEARCH"),
        (1, "CAP_DAC_OVERRIDE"),
        (7, "CAP_SETUID"),
        (6, "CAP_SETGID"),
        (0, "CAP_CHOWN"),
        (3, "CAP_FOWNER"),
        (4, "CAP_FSETID"),
        (27, "CAP_MKNOD"),
    ];
    let effective = capabilities()?[0].effective;
    Ok(NEEDED.iter().find(|(bit, _)| effective & (1 << bit) == 0).map(|(_, name)| *name))
}

impl Identity {
    /// Prepares the calling thread for serving: no signals, an own umask of 0 and working directory `/`, no
    /// CAP_SYS_RESOURCE (it would let every user into ext4's reserved blocks and past quotas), fsuid 0.
    pub fn prepare_thread() -> Outcome<Identity> {
        // SAFETY: plain system calls on this thread; `mask` is initialised by sigfillset.
        unsafe {
            let mut mask = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
            libc::sigfillset(mask.as_mut_ptr());
            libc::pthread_sigmask(libc::SIG_SETMASK, mask.as_ptr(), std::ptr::null_mut());
            if libc::unshare(libc::CLONE_FS) != 0 {
                return Err(Errno::last());
            }
            libc::umask(0);
            if libc::chdir(c"/".as_ptr()) != 0 {
                return Err(Errno::last());
            }
        }
        let mut words = capabilities()?;
        for set in [&mut words[0].effective, &mut words[0].permitted, &mut words[0].inheritable] {
            *set &= !(1 << CAP_SYS_RESOURCE);
        }
        let header = CapabilityHeader { version: CAPABILITY_VERSION_3, pid: 0 };
        // SAFETY: two triples, as version 3 wants.
        if unsafe { libc::syscall(libc::SYS_capset, &raw const header, words.as_ptr()) } != 0 {
            return Err(Errno::last());
        }
        set_fsuid(0);
        if set_fsuid(TELL) != 0 {
            return Err(Errno(libc::EPERM));
        }
        let mut identity = Identity { fsgid: set_fsgid(TELL), groups: vec![TELL], not_send: std::marker::PhantomData };
        identity.set_groups(&[])?;
        Ok(identity)
    }

    fn set_groups(&mut self, groups: &[u32]) -> Outcome<()> {
        if self.groups == groups {
            return Ok(());
        }
        // SAFETY: `groups` bounds the read.
        if unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) } != 0 {
            return Err(Errno::last());
        }
        self.groups.clear();
        self.groups.extend_from_slice(groups);
        Ok(())
    }

    /// Takes the caller's identity until the guard is dropped. EPERM for ids that mean "unchanged" to the kernel.
    pub fn assume(&mut self, caller: &Caller<'_>) -> Outcome<Assumed<'_>> {
        if caller.uid == u32::MAX || caller.gid == u32::MAX {
            return Err(Errno(libc::EPERM));
        }
        self.set_groups(caller.groups)?;
        if self.fsgid != caller.gid {
            set_fsgid(caller.gid);
            self.fsgid = set_fsgid(TELL);
            if self.fsgid != caller.gid {
                return Err(Errno(libc::EIO));
            }
        }
        let guard = Assumed { uid: caller.uid, _thread: std::marker::PhantomData };
        if caller.uid != 0 {
            set_fsuid(caller.uid);
            if set_fsuid(TELL) != caller.uid {
                return Err(Errno(libc::EIO));
            }
        }
        Ok(guard)
    }
}

/// The thread acts as the caller while this lives.
pub struct Assumed<'a> {
    uid: u32,
    _thread: std::marker::PhantomData<(&'a mut Identity, *const ())>,
}

impl Drop for Assumed<'_> {
    fn drop(&mut self) {
        if self.uid == 0 {
            return;
        }
        set_fsuid(0);
        if set_fsuid(TELL) != 0 {
            // The next operation would run as a stranger.
            eprintln!("drbdts: cannot leave the identity of uid {}; stopping", self.uid);
            std::process::abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(field: &str) -> String {
        let text = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let line = text.lines().find(|line| line.starts_with(field)).unwrap();
        line[field.len()..].split_whitespace().collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn the_identity_is_the_callers_inside_the_guard_only() {
        // SAFETY: no pointers.
        if unsafe { libc::geteuid() } != 0 {
            eprintln!("skipped: needs root");
            return;
        }
        std::thread::spawn(|| {
            let mut identity = Identity::prepare_thread().unwrap();
            let rest = status("CapEff:");
            assert_eq!(u64::from_str_radix(&rest, 16).unwrap() >> CAP_SYS_RESOURCE & 1, 0);
            {
                let _guard = identity.assume(&Caller { uid: 1000, gid: 1001, groups: &[5, 7] }).unwrap();
                assert_eq!(status("Uid:"), "0 0 0 1000");
                assert_eq!(status("Gid:"), "0 0 0 1001");
                assert_eq!(status("Groups:"), "5 7");
                let capabilities = u64::from_str_radix(&status("CapEff:"), 16).unwrap();
                assert_eq!(capabilities & 0b1_1111, 0, "CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID are gone");
            }
            assert_eq!(status("Uid:"), "0 0 0 0");
            assert_eq!(status("CapEff:"), rest);
            assert_eq!(identity.assume(&Caller { uid: u32::MAX, gid: 1, groups: &[] }).err(), Some(Errno(libc::EPERM)));
        })
        .join()
        .unwrap();
        assert_eq!(status("Groups:"), status("Groups:"));
        assert_ne!(status("CapEff:"), "0000000000000000", "other threads keep theirs");
    }
}
