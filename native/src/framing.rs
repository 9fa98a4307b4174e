//! Cuts a byte stream into messages by a rule that TypeScript hands over as data (FrameRule in src/io/ring.ts).
//!
//! Everything here is hostile input: no length is trusted beyond the caps of the rule, and memory grows with the bytes
//! that really arrived.

use crate::completer::HEADER_BYTES;
use crate::pool::Pool;

pub const STAGING_BYTES: usize = 64 * 1024;
/// A flag of ring.ts: the payload was too long and was dropped.
pub const FRAME_SKIPPED: u32 = 1;
/// First block of a record; a record that proves longer gets one of its announced length.
const RECORD_FIRST_BYTES: usize = 64 * 1024;
/// Payload tails from this size on are received into their block alone, waiting for all of it.
const DIRECT_BYTES: usize = 64 * 1024;

#[derive(Clone, Debug)]
pub struct FixedRule {
    pub header_bytes: usize,
    pub magic: Vec<u8>,
    pub length_offset: usize,
    pub length_bytes: usize,
    pub command_offset: usize,
    pub command_bytes: usize,
    /// Commands that carry bytes; None: all do.
    pub payload_commands: Option<Vec<u32>>,
    pub inline_default: usize,
    pub inline_by_command: Vec<(u32, usize)>,
    pub max_payload_bytes: usize,
    pub hard_cap_bytes: usize,
}

#[derive(Clone, Debug)]
pub enum Rule {
    Raw,
    Fixed(FixedRule),
    Record { max_record_bytes: usize, max_fragments: u32 },
}

impl Rule {
    /// Decodes what `encodeRule` of native-ring.ts wrote; it checked the values, so a bad one is a bug.
    pub fn decode(words: &[u32]) -> Rule {
        match words[0] {
            0 => Rule::Raw,
            1 => {
                let magic_bytes = words[10] as usize;
                let commands_at = 11 + magic_bytes;
                let commands = words[commands_at];
                let list = if commands == u32::MAX { 0 } else { commands as usize };
                let inline_at = commands_at + 1 + list;
                let inline = words[inline_at] as usize;
                let rule = FixedRule {
                    header_bytes: words[1] as usize,
                    length_offset: words[2] as usize,
                    length_bytes: words[3] as usize,
                    command_offset: words[4] as usize,
                    command_bytes: words[5] as usize,
                    inline_default: words[6] as usize,
                    max_payload_bytes: words[7] as usize,
                    hard_cap_bytes: words[8] as usize,
                    magic: words[11..commands_at].iter().map(|&byte| byte as u8).collect(),
                    payload_commands: (commands != u32::MAX).then(|| words[commands_at + 1..inline_at].to_vec()),
                    inline_by_command: words[inline_at + 1..inline_at + 1 + inline * 2]
                        .chunks_exact(2)
                        .map(|pair| (pair[0], pair[1] as usize))
                        .collect(),
                };
                assert!(rule.header_bytes >= 4 && rule.header_bytes <= HEADER_BYTES);
                assert!(rule.length_offset + rule.length_bytes <= rule.header_bytes);
                assert!(rule.command_offset + rule.command_bytes <= rule.header_bytes);
                let inline =
                    rule.inline_by_command.iter().map(|pair| pair.1).max().unwrap_or(0).max(rule.inline_default);
                assert!(rule.header_bytes + inline <= HEADER_BYTES);
                Rule::Fixed(rule)
            }
            2 => Rule::Record { max_record_bytes: words[1] as usize, max_fragments: words[2] },
            other => panic!("frame rule of kind {other}"),
        }
    }
}

/// Where whole frames go.
pub trait FrameSink {
    fn has_room(&self) -> bool;
    /// The sink owns one reference to `payload` (offset or -1).
    fn frame(&mut self, header: &[u8], payload: i64, payload_length: usize, flags: u32);
}

/// Why cutting stopped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cut {
    /// All that is staged is used; receive more.
    NeedMore,
    /// The sink is full, or a raw chunk was delivered that may change the framing: go on after the batch.
    Held,
    /// No pool memory: go on when some was freed.
    Starved,
    /// The stream broke the rule; the connection ends with this errno.
    Broken(i32),
}

enum State {
    /// Between frames, or inside a header.
    Header,
    /// Filling the payload of a fixed frame.
    Payload {
        block: usize,
        length: usize,
        filled: usize,
    },
    /// Dropping the payload of a fixed frame.
    Skip {
        length: usize,
        remaining: usize,
    },
    Record(Record),
}

#[derive(Clone, Copy)]
struct Record {
    block: Option<usize>,
    capacity: usize,
    filled: usize,
    /// Bytes of the current fragment still to come; `in_fragment` false: a fragment header is next.
    remaining: usize,
    in_fragment: bool,
    last: bool,
    fragments: u32,
}

const NO_RECORD: Record =
    Record { block: None, capacity: 0, filled: 0, remaining: 0, in_fragment: false, last: false, fragments: 0 };

/// What the next receive should fill: the tail of a pool block first, then the staging buffer.
pub struct Target {
    pub block: *mut u8,
    pub block_length: usize,
    pub staging: *mut u8,
    /// 0: only the block, and wait for all of it.
    pub staging_length: usize,
}

pub struct Receiver {
    rule: Rule,
    staging: Vec<u8>,
    start: usize,
    end: usize,
    state: State,
    header: [u8; HEADER_BYTES],
    header_length: usize,
}

fn big_endian(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0, |value, &byte| value << 8 | u32::from(byte))
}

impl Receiver {
    pub fn new() -> Receiver {
        Receiver {
            rule: Rule::Raw,
            staging: Vec::new(),
            start: 0,
            end: 0,
            state: State::Header,
            header: [0; HEADER_BYTES],
            header_length: 0,
        }
    }

    /// Switches the rule for everything not yet cut; `unconsumed` is put in front of what is staged.
    pub fn set_rule(&mut self, rule: Rule, unconsumed: &[u8]) {
        let idle = match &self.state {
            State::Header => true,
            State::Record(record) => !record.in_fragment && record.fragments == 0,
            _ => false,
        };
        assert!(idle && unconsumed.len() <= STAGING_BYTES, "framing switched inside a frame");
        self.state = match rule {
            Rule::Record { .. } => State::Record(NO_RECORD),
            _ => State::Header,
        };
        self.rule = rule;
        if !unconsumed.is_empty() {
            let mut staged = unconsumed.to_vec();
            staged.extend_from_slice(&self.staging[self.start..self.end]);
            self.start = 0;
            self.end = staged.len();
            // Longer than the usual staging only until these bytes are cut.
            if staged.len() < STAGING_BYTES {
                staged.resize(STAGING_BYTES, 0);
            }
            self.staging = staged;
        }
    }

    /// True if the stream may end here without a torn frame.
    pub fn is_between_frames(&self) -> bool {
        let idle = match &self.state {
            State::Header => true,
            State::Record(record) => !record.in_fragment && record.fragments == 0,
            _ => false,
        };
        idle && self.start == self.end
    }

    /// Where to receive next. Only after `cut` said NeedMore.
    pub fn target(&mut self, pool: &Pool) -> Target {
        if self.staging.is_empty() {
            self.staging = vec![0; STAGING_BYTES];
        }
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        } else if self.start > 0 {
            // What is left is less than a header: cheap to move.
            self.staging.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        let (block, block_length) = match &self.state {
            State::Payload { block, length, filled } => (pool.range(block + filled, length - filled), length - filled),
            State::Record(Record { block: Some(block), capacity, filled, remaining, in_fragment: true, .. }) => {
                let room = (*remaining).min(capacity - filled);
                (pool.range(block + filled, room), room)
            }
            _ => (std::ptr::null_mut(), 0),
        };
        let staging_length = if block_length >= DIRECT_BYTES { 0 } else { self.staging.len() - self.end };
        let end = self.end;
        Target { block, block_length, staging: self.staging[end..].as_mut_ptr(), staging_length }
    }

    /// Accounts for `count` received bytes, which filled the last target in order.
    pub fn received(&mut self, count: usize) {
        let mut left = count;
        match &mut self.state {
            State::Payload { length, filled, .. } => {
                let taken = left.min(*length - *filled);
                *filled += taken;
                left -= taken;
            }
            State::Record(Record { block: Some(_), capacity, filled, remaining, in_fragment: true, .. }) => {
                let taken = left.min((*remaining).min(*capacity - *filled));
                *filled += taken;
                *remaining -= taken;
                left -= taken;
            }
            _ => {}
        }
        self.end += left;
        assert!(self.end <= self.staging.len(), "more received than there was room for");
    }

    /// Cuts frames out of what is staged.
    pub fn cut(&mut self, pool: &Pool, sink: &mut dyn FrameSink) -> Cut {
        loop {
            if !sink.has_room() {
                return Cut::Held;
            }
            let stop = match self.rule {
                Rule::Raw => self.cut_raw(pool, sink),
                Rule::Fixed(_) => self.cut_fixed(pool, sink),
                Rule::Record { max_record_bytes, max_fragments } => {
                    self.cut_record(pool, sink, max_record_bytes, max_fragments)
                }
            };
            if let Some(cut) = stop {
                return cut;
            }
        }
    }

    fn staged(&self) -> usize {
        self.end - self.start
    }

    /// Copies up to `wanted` staged bytes to a pool offset.
    fn take_into(&mut self, pool: &Pool, offset: usize, wanted: usize) -> usize {
        let taken = wanted.min(self.staged());
        let destination = pool.range(offset, taken);
        // SAFETY: `destination` is `taken` bytes of a block this receiver owns; staging is other memory.
        unsafe { std::ptr::copy_nonoverlapping(self.staging[self.start..].as_ptr(), destination, taken) };
        self.start += taken;
        taken
    }

    fn cut_raw(&mut self, pool: &Pool, sink: &mut dyn FrameSink) -> Option<Cut> {
        if self.staged() == 0 {
            return Some(Cut::NeedMore);
        }
        let length = self.staged().min(STAGING_BYTES);
        let Some(block) = pool.allocate(length) else { return Some(Cut::Starved) };
        self.take_into(pool, block, length);
        sink.frame(&[], block as i64, length, 0);
        Some(Cut::Held)
    }

    fn cut_fixed(&mut self, pool: &Pool, sink: &mut dyn FrameSink) -> Option<Cut> {
        match self.state {
            State::Header => self.cut_header(pool, sink),
            State::Payload { block, length, mut filled } => {
                filled += self.take_into(pool, block + filled, length - filled);
                if filled < length {
                    self.state = State::Payload { block, length, filled };
                    return Some(Cut::NeedMore);
                }
                self.state = State::Header;
                sink.frame(&self.header[..self.header_length], block as i64, length, 0);
                None
            }
            State::Skip { length, mut remaining } => {
                let taken = remaining.min(self.staged());
                self.start += taken;
                remaining -= taken;
                if remaining > 0 {
                    self.state = State::Skip { length, remaining };
                    return Some(Cut::NeedMore);
                }
                self.state = State::Header;
                sink.frame(&self.header[..self.header_length], -1, length, FRAME_SKIPPED);
                None
            }
            State::Record(_) => unreachable!("a record state under a fixed rule"),
        }
    }

    fn cut_header(&mut self, pool: &Pool, sink: &mut dyn FrameSink) -> Option<Cut> {
        const EPROTO: i32 = libc::EPROTO;
        let Rule::Fixed(rule) = &self.rule else { unreachable!("a fixed header under another rule") };
        let staged = &self.staging[self.start..self.end];
        let magic_seen = staged.len().min(rule.magic.len());
        if staged[..magic_seen] != rule.magic[..magic_seen] {
            return Some(Cut::Broken(EPROTO));
        }
        if staged.len() < rule.header_bytes {
            return Some(Cut::NeedMore);
        }
        let command = big_endian(&staged[rule.command_offset..rule.command_offset + rule.command_bytes]);
        let announced = big_endian(&staged[rule.length_offset..rule.length_offset + rule.length_bytes]) as usize;
        let carries = rule.payload_commands.as_ref().is_none_or(|commands| commands.contains(&command));
        let follows = if carries { announced } else { 0 };
        let inline = rule
            .inline_by_command
            .iter()
            .find(|(listed, _)| *listed == command)
            .map_or(rule.inline_default, |(_, bytes)| *bytes)
            .min(follows);
        let payload = follows - inline;
        if payload > rule.hard_cap_bytes {
            return Some(Cut::Broken(libc::EMSGSIZE));
        }
        let header_length = rule.header_bytes + inline;
        if staged.len() < header_length {
            return Some(Cut::NeedMore);
        }
        let skipped = payload > rule.max_payload_bytes;
        let block = if payload == 0 || skipped {
            None
        } else {
            match pool.allocate(payload) {
                Some(block) => Some(block),
                None => return Some(Cut::Starved),
            }
        };
        self.header[..header_length].copy_from_slice(&staged[..header_length]);
        self.header_length = header_length;
        self.start += header_length;
        match block {
            Some(block) => self.state = State::Payload { block, length: payload, filled: 0 },
            None if skipped => self.state = State::Skip { length: payload, remaining: payload },
            None => sink.frame(&self.header[..header_length], -1, 0, 0),
        }
        None
    }

    fn cut_record(
        &mut self,
        pool: &Pool,
        sink: &mut dyn FrameSink,
        max_record_bytes: usize,
        max_fragments: u32,
    ) -> Option<Cut> {
        let State::Record(mut record) = self.state else { unreachable!("another state under the record rule") };
        if !record.in_fragment {
            if self.staged() < 4 {
                return Some(Cut::NeedMore);
            }
            let mark = big_endian(&self.staging[self.start..self.start + 4]);
            let length = (mark & 0x7fff_ffff) as usize;
            if length > max_record_bytes - record.filled {
                return Some(Cut::Broken(libc::EMSGSIZE));
            }
            record.fragments += 1;
            if record.fragments > max_fragments {
                return Some(Cut::Broken(libc::EMSGSIZE));
            }
            record.last = mark >> 31 == 1;
            if record.last && record.filled + length == 0 {
                // An empty record is no RPC message; a stream of them would cost us work for four bytes each.
                return Some(Cut::Broken(libc::EPROTO));
            }
            self.start += 4;
            record.remaining = length;
            record.in_fragment = true;
            self.state = State::Record(record);
        }
        if record.remaining > 0 {
            if record.filled == record.capacity && !grow(pool, &mut record) {
                return Some(Cut::Starved);
            }
            let block = record.block.expect("a grown record has a block");
            let taken =
                self.take_into(pool, block + record.filled, record.remaining.min(record.capacity - record.filled));
            record.filled += taken;
            record.remaining -= taken;
            self.state = State::Record(record);
            if record.remaining > 0 {
                return (self.staged() == 0 && record.filled < record.capacity).then_some(Cut::NeedMore);
            }
        }
        record.in_fragment = false;
        if record.last {
            self.state = State::Record(NO_RECORD);
            let block = record.block.expect("a record that is not empty has a block");
            sink.frame(&[], block as i64, record.filled, 0);
        } else {
            self.state = State::Record(record);
        }
        None
    }

    /// Gives back what an unfinished frame holds.
    pub fn release(&mut self, pool: &Pool) {
        match self.state {
            State::Payload { block, .. } => pool.release_from_ring(block),
            State::Record(Record { block: Some(block), .. }) => pool.release_from_ring(block),
            _ => {}
        }
        self.state = State::Header;
        self.start = self.end;
    }
}

/// Makes room behind `filled`. The first block is small; once it is full the announced length is believed.
fn grow(pool: &Pool, record: &mut Record) -> bool {
    let announced = record.filled + record.remaining;
    let wanted = if record.filled == 0 { announced.min(RECORD_FIRST_BYTES) } else { announced };
    let Some(block) = pool.allocate(wanted) else { return false };
    if let Some(old) = record.block {
        // SAFETY: both blocks are owned by this receiver and are distinct; `filled` bytes fit both.
        unsafe {
            std::ptr::copy_nonoverlapping(
                pool.range(old, record.filled),
                pool.range(block, record.filled),
                record.filled,
            );
        }
        pool.release_from_ring(old);
    }
    record.block = Some(block);
    record.capacity = wanted.next_power_of_two().max(crate::pool::PAGE_BYTES);
    true
}
