//! Operations that other parts of the addon execute (the filesystem backend, the FUSE file): JavaScript queues them in
//! the ring's submission area like any other, and they are handed over in batches, in order, on the ring's thread.

use crate::completer::HEADER_BYTES;

/// One operation as JavaScript queued it. The operation holds one reference to `payload` (if any): whoever executes it
/// releases that, or passes it on as the payload of the completion.
#[derive(Clone, Copy)]
#[allow(dead_code)]
pub struct ExternalOp {
    pub target: u32,
    pub cookie: u32,
    /// Pool offset or -1.
    pub payload: i64,
    pub length: u32,
    /// Any number JavaScript gives, an exact integer up to 2^53; a file offset, say.
    pub arg: f64,
    pub flags: u32,
    pub header_length: u32,
    pub header: [u8; HEADER_BYTES],
}

#[allow(dead_code)]
impl ExternalOp {
    pub fn header(&self) -> &[u8] {
        &self.header[..self.header_length as usize]
    }
}

/// Executes a batch. Called on the ring's thread: it must not block; hand the work to threads and finish each operation
/// with `Completer::complete`.
pub type ExternalHandler = Box<dyn FnMut(&[ExternalOp]) + Send>;

/// What JavaScript does with a pseudo-connection.
#[allow(dead_code)]
pub enum PseudoSend<'a> {
    /// Send these bytes. `payload` (pool offset or -1) is borrowed for the call; retain it to keep it longer.
    Bytes { header: &'a [u8], payload: i64, length: u32 },
    /// Stop (true) or go on (false) injecting frames.
    Pause(bool),
    /// `end` or `close` was called: answer with `Completer::inject_closed` when nothing more will be injected.
    Close,
}

/// Takes what JavaScript sends on a pseudo-connection. Called on the ring's thread: it must not block for long.
/// Returns how many of the bytes are already done with; a sender that queues reports none here.
pub type PseudoHandler = Box<dyn FnMut(PseudoSend<'_>) + Send>;
