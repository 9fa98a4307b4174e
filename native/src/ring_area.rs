//! The memory through which JavaScript and the ring talk: fixed-size records both ways, no call and no allocation per
//! operation. `src/io/native-ring.ts` has the same numbers.

use crate::completer::HEADER_BYTES;
use crate::framing::FrameSink;

pub const RECORD_BYTES: usize = 256;
const RECORD_HEADER_AT: usize = 32;
pub const SUBMISSIONS: usize = 2048;
pub const COMPLETIONS: usize = 1024;
pub const MAX_CONNECTIONS: usize = 16384;
/// Words 0 and 1: records queued by JavaScript, records delivered by the ring.
const CONTROL_BYTES: usize = 4096;
const COMPLETIONS_AT: usize = CONTROL_BYTES + SUBMISSIONS * RECORD_BYTES;
const QUEUED_AT: usize = COMPLETIONS_AT + COMPLETIONS * RECORD_BYTES;
pub const AREA_BYTES: usize = QUEUED_AT + MAX_CONNECTIONS * 8;

/// Kinds of submission records.
pub mod submit {
    pub const SEND: u32 = 1;
    pub const START: u32 = 2;
    pub const PAUSE: u32 = 3;
    pub const RESUME: u32 = 4;
    pub const END: u32 = 5;
    pub const CLOSE: u32 = 6;
    pub const READ: u32 = 7;
    pub const WRITE: u32 = 8;
    pub const FLUSH: u32 = 9;
    pub const ZERO: u32 = 10;
    pub const CLOSE_FILE: u32 = 11;
    pub const EXTERNAL: u32 = 12;
}

/// Kinds of completion records.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Kind {
    Frame = 1,
    Closed = 2,
    Drained = 3,
    Accepted = 4,
    Connected = 5,
    File = 6,
    External = 7,
    SendingEnded = 8,
}

/// One queued operation. Words: kind, id, cookie, payload, length, flags, then the argument as a double at byte 24.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
pub struct Submission {
    pub kind: u32,
    pub id: u32,
    pub cookie: u32,
    pub payload: i32,
    pub length: u32,
    /// Low byte: header length; from bit 8 on: flags of the operation.
    pub header_and_flags: u32,
    pub argument: f64,
    pub header: [u8; HEADER_BYTES],
}

impl Submission {
    pub fn header(&self) -> &[u8] {
        &self.header[..(self.header_and_flags & 0xff) as usize]
    }

    pub fn flags(&self) -> u32 {
        self.header_and_flags >> 8
    }

    /// A second number, in the first eight header bytes (little-endian double).
    pub fn second_argument(&self) -> f64 {
        f64::from_le_bytes(self.header[..8].try_into().expect("eight bytes"))
    }
}

/// Words of a completion record before its header bytes.
#[derive(Clone, Copy)]
pub struct Completion {
    pub kind: Kind,
    pub id: u32,
    pub cookie: u32,
    pub result: i32,
    pub payload: i32,
    pub length: u32,
    pub flags: u32,
}

pub struct Area {
    base: *mut u8,
    count: usize,
}

impl Area {
    /// `base` is AREA_BYTES of zeroed, 8-aligned memory that outlives the area.
    pub fn new(base: *mut u8) -> Area {
        Area { base, count: 0 }
    }

    fn word(&self, index: usize) -> *mut u32 {
        // SAFETY: inside the control page.
        unsafe { self.base.cast::<u32>().add(index) }
    }

    /// Number of operations JavaScript queued since the last `clear_submissions`.
    pub fn submitted(&self) -> usize {
        // SAFETY: JavaScript writes it on this same thread.
        let count = unsafe { *self.word(0) } as usize;
        assert!(count <= SUBMISSIONS, "{count} records in the submission area");
        count
    }

    pub fn clear_submissions(&mut self) {
        // SAFETY: as above.
        unsafe { *self.word(0) = 0 };
    }

    /// Valid until JavaScript runs again.
    pub fn submission(&self, index: usize) -> &Submission {
        assert!(index < SUBMISSIONS);
        // SAFETY: inside the area, aligned, and plain data for any bit pattern.
        unsafe { &*self.base.add(CONTROL_BYTES + index * RECORD_BYTES).cast::<Submission>() }
    }

    pub fn room(&self) -> usize {
        COMPLETIONS - self.count
    }

    pub fn count(&self) -> usize {
        self.count
    }

    /// Publishes the batch and makes room for the next one.
    pub fn take_batch(&mut self) -> usize {
        // SAFETY: inside the control page.
        unsafe { *self.word(1) = self.count as u32 };
        std::mem::take(&mut self.count)
    }

    pub fn push(&mut self, completion: Completion, header: &[u8]) {
        assert!(self.count < COMPLETIONS && header.len() <= HEADER_BYTES);
        let words = [
            completion.kind as u32,
            completion.id,
            completion.cookie,
            completion.result as u32,
            completion.payload as u32,
            completion.length,
            completion.flags,
            header.len() as u32,
        ];
        // SAFETY: inside the area; record and header fit RECORD_BYTES.
        unsafe {
            let record = self.base.add(COMPLETIONS_AT + self.count * RECORD_BYTES);
            std::ptr::copy_nonoverlapping(words.as_ptr(), record.cast(), words.len());
            std::ptr::copy_nonoverlapping(header.as_ptr(), record.add(RECORD_HEADER_AT), header.len());
        }
        self.count += 1;
    }

    /// Bytes queued for sending on a connection, as JavaScript sees and adds to them.
    pub fn queued(&self, connection: u32) -> f64 {
        // SAFETY: connection numbers are below MAX_CONNECTIONS.
        unsafe { *self.queued_word(connection) }
    }

    pub fn set_queued(&mut self, connection: u32, bytes: f64) {
        // SAFETY: as above.
        unsafe { *self.queued_word(connection) = bytes };
    }

    fn queued_word(&self, connection: u32) -> *mut f64 {
        assert!((connection as usize) < MAX_CONNECTIONS);
        // SAFETY: checked just above.
        unsafe { self.base.add(QUEUED_AT).cast::<f64>().add(connection as usize) }
    }
}

/// Delivers the frames of one connection.
pub struct ConnectionSink<'a> {
    pub area: &'a mut Area,
    pub connection: u32,
}

impl FrameSink for ConnectionSink<'_> {
    fn has_room(&self) -> bool {
        self.area.room() > 0
    }

    fn frame(&mut self, header: &[u8], payload: i64, payload_length: usize, flags: u32) {
        let completion = Completion {
            kind: Kind::Frame,
            id: self.connection,
            cookie: 0,
            result: 0,
            payload: payload as i32,
            length: payload_length as u32,
            flags,
        };
        self.area.push(completion, header);
    }
}
