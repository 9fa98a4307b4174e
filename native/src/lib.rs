//! The native addon of drbdts: it reads, writes, sends, receives, checksums and frames. It knows no policy.
//!
//! One file per job: `ring*` the event loop's doors, `pool` their memory, `framing` how streams are cut, `completer` and
//! `external` how other parts join in.

mod completer;
mod crc32c;
mod external;
mod framing;
mod fuse_file;
mod pool;
mod posix_fs;
mod process;
mod ring;
mod ring_area;
mod ring_connection;
mod ring_core;
mod ring_epoll;
mod ring_file;
mod ring_socket;
mod ring_uring;
mod ring_uv;
mod ring_workers;
