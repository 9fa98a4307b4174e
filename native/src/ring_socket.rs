//! Sockets: addresses, listeners, the calls that have no queue.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;

use crate::ring_workers::last_errno;

const BACKLOG: i32 = 512;

/// A socket address as the kernel wants it.
pub struct Address {
    storage: libc::sockaddr_storage,
    length: libc::socklen_t,
}

impl Address {
    fn zeroed() -> Address {
        // SAFETY: all-zero is a valid sockaddr_storage.
        Address { storage: unsafe { std::mem::zeroed() }, length: 0 }
    }

    /// `host`: an IPv4 or IPv6 literal, `localhost`, or empty or `*` for every address.
    pub fn tcp(host: &str, port: u16) -> Result<Address, i32> {
        let ip = match host {
            "" | "*" => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            "localhost" => IpAddr::V4(Ipv4Addr::LOCALHOST),
            _ => host.trim_matches(['[', ']']).parse().map_err(|_| libc::EADDRNOTAVAIL)?,
        };
        let mut address = Address::zeroed();
        let storage = (&raw mut address.storage).cast::<u8>();
        match ip {
            IpAddr::V4(ip) => {
                let value = libc::sockaddr_in {
                    sin_family: libc::AF_INET as u16,
                    sin_port: port.to_be(),
                    sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(ip.octets()) },
                    sin_zero: [0; 8],
                };
                // SAFETY: sockaddr_storage is larger and stricter aligned than any address.
                unsafe { storage.cast::<libc::sockaddr_in>().write(value) };
                address.length = size_of::<libc::sockaddr_in>() as u32;
            }
            IpAddr::V6(ip) => {
                let value = libc::sockaddr_in6 {
                    sin6_family: libc::AF_INET6 as u16,
                    sin6_port: port.to_be(),
                    sin6_flowinfo: 0,
                    sin6_addr: libc::in6_addr { s6_addr: ip.octets() },
                    sin6_scope_id: 0,
                };
                // SAFETY: as above.
                unsafe { storage.cast::<libc::sockaddr_in6>().write(value) };
                address.length = size_of::<libc::sockaddr_in6>() as u32;
            }
        }
        Ok(address)
    }

    pub fn unix(path: &str) -> Result<Address, i32> {
        let bytes = path.as_bytes();
        let mut address = Address::zeroed();
        // SAFETY: sockaddr_storage is larger than sockaddr_un.
        let value = unsafe { &mut *(&raw mut address.storage).cast::<libc::sockaddr_un>() };
        if bytes.is_empty() || bytes.len() >= value.sun_path.len() || bytes.contains(&0) {
            return Err(libc::ENAMETOOLONG);
        }
        value.sun_family = libc::AF_UNIX as u16;
        for (to, from) in value.sun_path.iter_mut().zip(bytes) {
            *to = *from as libc::c_char;
        }
        address.length = size_of::<libc::sockaddr_un>() as u32;
        Ok(address)
    }

    fn family(&self) -> i32 {
        i32::from(self.storage.ss_family)
    }

    fn pointer(&self) -> *const libc::sockaddr {
        (&raw const self.storage).cast()
    }

    fn port(&self) -> u16 {
        match self.family() {
            // SAFETY: the family says which address it is.
            libc::AF_INET => u16::from_be(unsafe { (*self.pointer().cast::<libc::sockaddr_in>()).sin_port }),
            // SAFETY: as above.
            libc::AF_INET6 => u16::from_be(unsafe { (*self.pointer().cast::<libc::sockaddr_in6>()).sin6_port }),
            _ => 0,
        }
    }

    /// Text for logs.
    pub fn text(&self) -> String {
        match self.family() {
            libc::AF_INET => {
                // SAFETY: the family says so.
                let address = unsafe { *self.pointer().cast::<libc::sockaddr_in>() };
                let ip = IpAddr::from(address.sin_addr.s_addr.to_ne_bytes());
                SocketAddr::new(ip, self.port()).to_string()
            }
            libc::AF_INET6 => {
                // SAFETY: the family says so.
                let address = unsafe { *self.pointer().cast::<libc::sockaddr_in6>() };
                let ip = IpAddr::from(address.sin6_addr.s6_addr).to_canonical();
                SocketAddr::new(ip, self.port()).to_string()
            }
            _ => "unix".to_string(),
        }
    }
}

fn check(result: i32) -> Result<i32, i32> {
    if result < 0 {
        Err(last_errno())
    } else {
        Ok(result)
    }
}

fn set_option(fd: RawFd, level: i32, option: i32, value: i32) -> Result<(), i32> {
    // SAFETY: the value is copied by the kernel.
    check(unsafe { libc::setsockopt(fd, level, option, (&raw const value).cast(), size_of::<i32>() as u32) })
        .map(|_| ())
}

/// No delay for small messages, and probes on a silent connection: a peer that lost power without a word is noticed
/// after about two minutes even where the protocol above never asks.
fn tune_tcp(socket: &OwnedFd) -> Result<(), i32> {
    const IDLE_SECONDS: i32 = 60;
    const INTERVAL_SECONDS: i32 = 10;
    const PROBES: i32 = 6;
    let fd = socket.as_raw_fd();
    set_option(fd, libc::IPPROTO_TCP, libc::TCP_NODELAY, 1)?;
    set_option(fd, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1)?;
    set_option(fd, libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, IDLE_SECONDS)?;
    set_option(fd, libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, INTERVAL_SECONDS)?;
    set_option(fd, libc::IPPROTO_TCP, libc::TCP_KEEPCNT, PROBES)
}

/// A non-blocking stream socket with its buffers set (0 leaves the kernel's). Sizes must stand before listen or
/// connect, because the TCP window scale is agreed on then.
fn new_socket(family: i32, receive_bytes: i32, send_bytes: i32) -> Result<OwnedFd, i32> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: plain system call; the descriptor is owned at once.
    let socket = unsafe { OwnedFd::from_raw_fd(check(libc::socket(family, kind, 0))?) };
    if receive_bytes > 0 {
        set_option(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_RCVBUF, receive_bytes)?;
    }
    if send_bytes > 0 {
        set_option(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_SNDBUF, send_bytes)?;
    }
    Ok(socket)
}

fn bind(socket: &OwnedFd, address: &Address) -> Result<(), i32> {
    // SAFETY: the address is copied by the kernel.
    check(unsafe { libc::bind(socket.as_raw_fd(), address.pointer(), address.length) }).map(|_| ())
}

fn listen(socket: &OwnedFd) -> Result<(), i32> {
    // SAFETY: plain system call.
    check(unsafe { libc::listen(socket.as_raw_fd(), BACKLOG) }).map(|_| ())
}

/// Returns the listening socket and its port.
pub fn listen_tcp(host: &str, port: u16, receive_bytes: i32, send_bytes: i32) -> Result<(OwnedFd, u16), i32> {
    let address = Address::tcp(host, port)?;
    let socket = new_socket(address.family(), receive_bytes, send_bytes)?;
    set_option(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
    bind(&socket, &address)?;
    listen(&socket)?;
    let mut bound = Address::zeroed();
    bound.length = size_of::<libc::sockaddr_storage>() as u32;
    // SAFETY: room for any address.
    check(unsafe { libc::getsockname(socket.as_raw_fd(), (&raw mut bound.storage).cast(), &raw mut bound.length) })?;
    Ok((socket, bound.port()))
}

/// Replaces a stale socket file; one that still answers is EADDRINUSE, anything else that stands there is EEXIST.
pub fn listen_unix(path: &str) -> Result<OwnedFd, i32> {
    let address = Address::unix(path)?;
    if let Ok(metadata) = std::fs::symlink_metadata(path) {
        if !metadata.file_type().is_socket() {
            return Err(libc::EEXIST);
        }
        let probe = new_socket(libc::AF_UNIX, 0, 0)?;
        // SAFETY: the address is copied by the kernel.
        let result = check(unsafe { libc::connect(probe.as_raw_fd(), address.pointer(), address.length) });
        if matches!(result, Ok(_) | Err(libc::EAGAIN)) {
            return Err(libc::EADDRINUSE);
        }
        std::fs::remove_file(path).map_err(|error| error.raw_os_error().unwrap_or(libc::EIO))?;
    }
    let socket = new_socket(libc::AF_UNIX, 0, 0)?;
    // A Unix socket takes its mode from the descriptor at bind time: no moment at which others may connect.
    // SAFETY: plain system call.
    check(unsafe { libc::fchmod(socket.as_raw_fd(), 0o600) })?;
    bind(&socket, &address)?;
    std::fs::set_permissions(Path::new(path), std::fs::Permissions::from_mode(0o600))
        .map_err(|error| error.raw_os_error().unwrap_or(libc::EIO))?;
    listen(&socket)?;
    Ok(socket)
}

/// Starts to connect; the socket becomes writable when it is decided.
pub fn connect_tcp(
    host: &str,
    port: u16,
    local_host: Option<&str>,
    receive_bytes: i32,
    send_bytes: i32,
) -> Result<(OwnedFd, String), i32> {
    let address = Address::tcp(host, port)?;
    let socket = new_socket(address.family(), receive_bytes, send_bytes)?;
    if let Some(local) = local_host {
        // The port is chosen at connect time, so that many connections may share it.
        const IP_BIND_ADDRESS_NO_PORT: i32 = 24;
        set_option(socket.as_raw_fd(), libc::SOL_IP, IP_BIND_ADDRESS_NO_PORT, 1)?;
        bind(&socket, &Address::tcp(local, 0)?)?;
    }
    tune_tcp(&socket)?;
    start_connect(socket, &address)
}

pub fn connect_unix(path: &str) -> Result<(OwnedFd, String), i32> {
    let address = Address::unix(path)?;
    start_connect(new_socket(libc::AF_UNIX, 0, 0)?, &address)
}

fn start_connect(socket: OwnedFd, address: &Address) -> Result<(OwnedFd, String), i32> {
    // SAFETY: the address is copied by the kernel.
    match check(unsafe { libc::connect(socket.as_raw_fd(), address.pointer(), address.length) }) {
        Ok(_) | Err(libc::EINPROGRESS | libc::EINTR) => Ok((socket, address.text())),
        Err(errno) => Err(errno),
    }
}

/// The outcome of a connect: 0 or an errno.
pub fn connect_result(fd: RawFd) -> i32 {
    let mut value: i32 = 0;
    let mut length = size_of::<i32>() as u32;
    // SAFETY: room for one int.
    let result =
        unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_ERROR, (&raw mut value).cast(), &raw mut length) };
    if result < 0 {
        last_errno()
    } else {
        value
    }
}

/// One waiting connection, non-blocking, with its text.
pub fn accept(listener: RawFd) -> Result<(OwnedFd, String), i32> {
    let mut address = Address::zeroed();
    address.length = size_of::<libc::sockaddr_storage>() as u32;
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: room for any address; the descriptor is owned at once.
    let socket = unsafe {
        let storage = (&raw mut address.storage).cast();
        OwnedFd::from_raw_fd(check(libc::accept4(listener, storage, &raw mut address.length, flags))?)
    };
    if address.family() == libc::AF_INET || address.family() == libc::AF_INET6 {
        // Fails only if the peer is gone already, which receiving will tell.
        let _ = tune_tcp(&socket);
    }
    Ok((socket, address.text()))
}

/// io_uring waits by itself; on a non-blocking socket it would answer EAGAIN instead.
pub fn make_blocking(fd: RawFd) {
    // SAFETY: plain system calls on a descriptor we own.
    unsafe {
        let flags = libc::fcntl(fd, libc::F_GETFL);
        assert!(flags >= 0 && libc::fcntl(fd, libc::F_SETFL, flags & !libc::O_NONBLOCK) == 0, "fcntl of a socket");
    }
}

pub fn shut_down(fd: RawFd, how: i32) {
    // SAFETY: plain system call. ENOTCONN means the peer was faster.
    unsafe { libc::shutdown(fd, how) };
}

/// The socket file of a listener, known by its inode so that closing never removes a successor's.
pub struct SocketFile {
    path: String,
    inode: (u64, u64),
}

impl SocketFile {
    pub fn new(path: &str) -> Result<SocketFile, i32> {
        let metadata = std::fs::symlink_metadata(path).map_err(|error| error.raw_os_error().unwrap_or(libc::EIO))?;
        Ok(SocketFile { path: path.to_string(), inode: (metadata.dev(), metadata.ino()) })
    }

    pub fn remove(&self) {
        let same =
            std::fs::symlink_metadata(&self.path).is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.inode);
        if same {
            // Someone else removing it first is as good.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}
