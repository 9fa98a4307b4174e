//! Directory listings. The kernel's d_off is the cookie: on ext4 it is a hash position that survives removals,
//! restarts and the move to the other head.

use super::layout::{encode_attributes, ATTRIBUTES_BYTES, EBADCOOKIE, ENTRY_BYTES};
use super::sys::{self, Errno, Handle, Outcome};
use std::ffi::CStr;
use std::os::fd::RawFd;

/// struct linux_dirent64 before its name: u64 inode, i64 d_off, u16 record length, u8 type.
const DIRENT_NAME: usize = 19;

/// Most bytes asked of the kernel at a time.
pub const DIRENT_BUFFER_BYTES: usize = 32 * 1024;

/// What the listing needs to know of a directory that is the export's root: `..` there is the root itself.
pub struct RootEntry {
    pub handle: Handle,
    pub stat: libc::statx,
}

pub struct Listing<'a> {
    /// Opened for this call: its position is its own.
    pub directory: RawFd,
    pub cookie: u64,
    pub max_entries: usize,
    pub plus: bool,
    pub root: Option<RootEntry>,
    pub buffer: &'a mut [u8],
}

#[derive(Debug, PartialEq, Eq)]
pub struct Listed {
    pub entries: usize,
    pub bytes: usize,
    pub eof: bool,
}

impl Listing<'_> {
    /// Fills `out` with entries (layout.rs). EBADCOOKIE for a cookie the kernel never gave. None, and not the end, when
    /// there is no room for all entries that share the first position: the caller must come back with more.
    pub fn fill(&mut self, out: &mut [u8]) -> Outcome<Listed> {
        let position = i64::try_from(self.cookie).map_err(|_| EBADCOOKIE)?;
        if position != 0 {
            sys::seek(self.directory, position)
                .map_err(|errno| if errno.0 == libc::EINVAL { EBADCOOKIE } else { errno })?;
        }
        let (mut entries, mut bytes) = (0, 0);
        // End of the last entry after which a listing may stop, and the cookie of the entry before the next.
        let (mut safe_entries, mut safe_bytes) = (0, 0);
        let mut previous_cookie = (position != 0).then_some(self.cookie);
        let full = loop {
            let wanted = ((self.max_entries - entries) * 48 + 1024).min(self.buffer.len());
            let got = sys::read_directory(self.directory, &mut self.buffer[..wanted])?;
            if got == 0 {
                break false;
            }
            let mut at = 0;
            let mut stopped = false;
            while at < got {
                let record = &self.buffer[at..got];
                let length = usize::from(u16::from_ne_bytes(record[16..18].try_into().unwrap()));
                let record = &record[..length];
                if entries == self.max_entries {
                    stopped = true;
                    break;
                }
                let file_id = u64::from_ne_bytes(record[..8].try_into().unwrap());
                let cookie = u64::from_ne_bytes(record[8..16].try_into().unwrap());
                let name = CStr::from_bytes_until_nul(&record[DIRENT_NAME..]).map_err(|_| Errno(libc::EIO))?;
                let Some(used) = self.write_entry(&mut out[bytes..], file_id, cookie, name) else {
                    stopped = true;
                    break;
                };
                bytes += used;
                entries += 1;
                // A cookie equal to the one before would resume before this entry, not after it.
                if previous_cookie != Some(cookie) {
                    (safe_entries, safe_bytes) = (entries, bytes);
                }
                previous_cookie = Some(cookie);
                at += length;
            }
            if stopped {
                break true;
            }
        };
        if !full {
            return Ok(Listed { entries, bytes, eof: true });
        }
        Ok(Listed { entries: safe_entries, bytes: safe_bytes, eof: false })
    }

    /// None when there is no room.
    fn write_entry(&self, out: &mut [u8], file_id: u64, cookie: u64, name: &CStr) -> Option<usize> {
        let name_bytes = name.to_bytes();
        let is_root_parent = self.root.is_some() && name_bytes == b"..";
        let file_id =
            if is_root_parent { self.root.as_ref().map_or(file_id, |root| root.stat.stx_ino) } else { file_id };
        let (handle, stat) = if self.plus { self.look_at(file_id, name) } else { (None, None) };
        let handle_bytes = handle.as_ref().map_or(0, Handle::wire_length);
        let attributes_bytes = if self.plus { ATTRIBUTES_BYTES } else { 0 };
        let length = (ENTRY_BYTES + attributes_bytes + handle_bytes + name_bytes.len()).next_multiple_of(8);
        let out = out.get_mut(..length)?;
        out[0..4].copy_from_slice(&(length as u32).to_le_bytes());
        out[4..8].copy_from_slice(&(name_bytes.len() as u32).to_le_bytes());
        out[8..16].copy_from_slice(&file_id.to_le_bytes());
        out[16..24].copy_from_slice(&cookie.to_le_bytes());
        out[24..28].copy_from_slice(&(handle_bytes as u32).to_le_bytes());
        out[28..32].fill(0);
        let mut at = ENTRY_BYTES;
        if self.plus {
            match &stat {
                Some(stat) => encode_attributes(&mut out[at..at + ATTRIBUTES_BYTES], stat),
                None => out[at..at + 4].fill(0),
            }
            at += ATTRIBUTES_BYTES;
        }
        if let Some(handle) = &handle {
            handle.write_to(&mut out[at..]);
            at += handle_bytes;
        }
        out[at..at + name_bytes.len()].copy_from_slice(name_bytes);
        out[at + name_bytes.len()..].fill(0);
        Some(length)
    }

    /// Both or nothing: an entry that vanished, was replaced in between, or is covered by a mount is listed by name
    /// only.
    fn look_at(&self, file_id: u64, name: &CStr) -> (Option<Handle>, Option<libc::statx>) {
        if let (Some(root), b"..") = (&self.root, name.to_bytes()) {
            return (Some(root.handle), Some(root.stat));
        }
        let Ok(stat) = sys::statx_at(self.directory, name, 0) else { return (None, None) };
        let is_mount = stat.stx_attributes & libc::STATX_ATTR_MOUNT_ROOT as u64 != 0;
        if is_mount && name.to_bytes() != b"." && name.to_bytes() != b".." {
            return (None, None);
        }
        match sys::handle_at(self.directory, name) {
            Ok(handle) if handle.key().inode == stat.stx_ino && stat.stx_ino == file_id => (Some(handle), Some(stat)),
            _ => (None, None),
        }
    }
}
