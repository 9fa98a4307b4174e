//! Stream connections of a ring: one receive and one send under way at most, frames cut while reaping, sends of a turn
//! joined into one system call.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use crate::external::{PseudoHandler, PseudoSend};
use crate::framing::{Cut, Receiver, Rule};
use crate::pool::Pool;
use crate::ring_area::{ConnectionSink, MAX_CONNECTIONS};
use crate::ring_core::{Backend, Core, Event};
use crate::ring_epoll::{GONE, IN, OUT};
use crate::ring_socket;
use crate::ring_uring::{user_data, Tag};
use crate::ring_workers::last_errno;

/// SEND_QUEUE_LIMIT_BYTES of ring.ts: senders should stop above, and hear `drained` below half.
const SEND_QUEUE_LIMIT: f64 = 8.0 * 1024.0 * 1024.0;
/// A sender that ignores the limit this far loses its connection (ENOBUFS) rather than our memory.
const SEND_QUEUE_HARD_LIMIT: f64 = 128.0 * 1024.0 * 1024.0;
/// Pieces per system call.
const MAX_PIECES: usize = 256;
/// Header buffers above this are given back after use.
const KEEP_HEADER_BYTES: usize = 1 << 20;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Connecting,
    /// Connected; JavaScript has not set a handler yet.
    Idle,
    Open,
    /// Waiting for the kernel to let go of our memory.
    Closing,
    /// JavaScript is being told.
    Closed,
}

#[derive(Clone, Copy)]
enum Piece {
    /// A range of the queue's header bytes.
    Header { start: usize, length: usize },
    /// A range of the pool; the piece holds a reference.
    Payload { offset: usize, length: usize },
}

/// What waits to be sent: header bytes in one buffer, pieces in order.
#[derive(Default)]
struct SendQueue {
    headers: Vec<u8>,
    pieces: Vec<Piece>,
    /// First piece not fully sent, and how much of it is.
    next: usize,
    sent: usize,
}

impl SendQueue {
    fn push_header(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        let start = self.headers.len();
        self.headers.extend_from_slice(bytes);
        // Replies without payload lie side by side and leave as one piece.
        if let Some(Piece::Header { length, .. }) = self.pieces.last_mut() {
            *length += bytes.len();
        } else {
            self.pieces.push(Piece::Header { start, length: bytes.len() });
        }
    }

    fn is_empty(&self) -> bool {
        self.next == self.pieces.len()
    }

    fn fill(&self, pool: &Pool, iov: &mut Vec<libc::iovec>) {
        iov.clear();
        let mut skip = self.sent;
        for piece in self.pieces[self.next..].iter().take(MAX_PIECES) {
            let (base, length) = match *piece {
                Piece::Header { start, length } => (self.headers[start..start + length].as_ptr().cast_mut(), length),
                Piece::Payload { offset, length } => (pool.range(offset, length), length),
            };
            // SAFETY: `skip` is less than the length of the first piece.
            iov.push(libc::iovec { iov_base: unsafe { base.add(skip) }.cast(), iov_len: length - skip });
            skip = 0;
        }
    }

    fn advance(&mut self, pool: &Pool, mut count: usize) {
        while count > 0 {
            let (length, payload) = match self.pieces[self.next] {
                Piece::Header { length, .. } => (length, None),
                Piece::Payload { offset, length } => (length, Some(offset)),
            };
            let left = length - self.sent;
            if count < left {
                self.sent += count;
                return;
            }
            count -= left;
            self.sent = 0;
            self.next += 1;
            if let Some(offset) = payload {
                pool.release_from_ring(offset);
            }
        }
    }

    /// Forgets everything, giving back references.
    fn clear(&mut self, pool: &Pool) {
        for piece in &self.pieces[self.next..] {
            if let Piece::Payload { offset, .. } = *piece {
                pool.release_from_ring(offset);
            }
        }
        self.reset();
    }

    fn reset(&mut self) {
        self.pieces.clear();
        self.next = 0;
        self.sent = 0;
        if self.headers.capacity() > KEEP_HEADER_BYTES {
            self.headers = Vec::new();
        } else {
            self.headers.clear();
        }
    }
}

enum Stream {
    Socket(OwnedFd),
    Pseudo(PseudoHandler),
}

pub struct Connection {
    stream: Stream,
    state: State,
    errno: i32,
    paused: bool,
    receiver: Receiver,
    /// Framing to switch to, and bytes to put first, once the receive under way is back.
    next_rule: Option<(Rule, Vec<u8>)>,
    /// io_uring: a receive is under way. epoll: one is wanted.
    receiving: bool,
    /// io_uring: a send or connect is under way. epoll: waiting to become writable.
    sending: bool,
    /// In the list of connections with something to send.
    listed: bool,
    /// In the list of held or starved connections.
    waiting: bool,
    readable: bool,
    /// epoll saw the end: a short receive does not mean "drained".
    gone: bool,
    ending: bool,
    above_limit: bool,
    pending: SendQueue,
    outgoing: SendQueue,
    peer: String,
    receive_iov: [libc::iovec; 2],
    receive_message: libc::msghdr,
    send_iov: Vec<libc::iovec>,
    send_message: libc::msghdr,
}

impl Connection {
    fn new(stream: Stream, state: State) -> Box<Connection> {
        // SAFETY: all-zero is a valid msghdr and iovec.
        let (message, iov) = unsafe { (std::mem::zeroed::<libc::msghdr>(), std::mem::zeroed::<libc::iovec>()) };
        Box::new(Connection {
            stream,
            state,
            errno: 0,
            paused: false,
            receiver: Receiver::new(),
            next_rule: None,
            receiving: false,
            sending: false,
            listed: false,
            waiting: false,
            readable: false,
            gone: false,
            ending: false,
            above_limit: false,
            pending: SendQueue::default(),
            outgoing: SendQueue::default(),
            peer: String::new(),
            receive_iov: [iov; 2],
            receive_message: message,
            send_iov: Vec::new(),
            send_message: message,
        })
    }

    fn fd(&self) -> RawFd {
        match &self.stream {
            Stream::Socket(socket) => socket.as_raw_fd(),
            Stream::Pseudo(_) => -1,
        }
    }

    pub fn shut_down(&self) {
        if let Stream::Socket(socket) = &self.stream {
            ring_socket::shut_down(socket.as_raw_fd(), libc::SHUT_RDWR);
        }
    }

    /// Points the message at the receiver's target. Returns whether to wait for all of it.
    fn prepare_receive(&mut self, pool: &Pool) -> bool {
        let target = self.receiver.target(pool);
        let mut count = 0;
        if target.block_length > 0 {
            self.receive_iov[0] = libc::iovec { iov_base: target.block.cast(), iov_len: target.block_length };
            count = 1;
        }
        if target.staging_length > 0 {
            self.receive_iov[count] = libc::iovec { iov_base: target.staging.cast(), iov_len: target.staging_length };
            count += 1;
        }
        self.receive_message.msg_iov = self.receive_iov.as_mut_ptr();
        self.receive_message.msg_iovlen = count;
        target.staging_length == 0
    }

    fn wanted_bytes(&self) -> usize {
        self.receive_iov[..self.receive_message.msg_iovlen].iter().map(|iov| iov.iov_len).sum()
    }

    fn prepare_send(&mut self, pool: &Pool) {
        self.outgoing.fill(pool, &mut self.send_iov);
        self.send_message.msg_iov = self.send_iov.as_mut_ptr();
        self.send_message.msg_iovlen = self.send_iov.len();
    }
}

impl Core {
    fn connection(&mut self, id: u32) -> Option<&mut Connection> {
        self.connections.get_mut(id as usize).and_then(Option::as_deref_mut)
    }

    pub fn is_open(&self, id: u32) -> bool {
        let connection = self.connections.get(id as usize).and_then(Option::as_deref);
        connection.is_some_and(|connection| matches!(connection.state, State::Idle | State::Open))
    }

    fn new_slot(&mut self, connection: Box<Connection>) -> Option<u32> {
        let id = match self.free_connections.pop() {
            Some(id) => id,
            None if self.connections.len() < MAX_CONNECTIONS => {
                self.connections.push(None);
                self.connections.len() as u32 - 1
            }
            None => return None,
        };
        self.connections[id as usize] = Some(connection);
        self.area.set_queued(id, 0.0);
        Some(id)
    }

    /// Takes over a socket. None when there are too many connections: then it is closed.
    pub fn add_connection(&mut self, socket: OwnedFd, connecting: bool) -> Option<u32> {
        let fd = socket.as_raw_fd();
        let state = if connecting { State::Connecting } else { State::Idle };
        let id = self.new_slot(Connection::new(Stream::Socket(socket), state))?;
        match &mut self.backend {
            Backend::Uring(uring) => {
                if connecting {
                    uring.poll(user_data(Tag::Connect, id), fd, libc::POLLOUT);
                    self.in_flight += 1;
                    self.connections[id as usize].as_mut().expect("just made").sending = true;
                } else {
                    ring_socket::make_blocking(fd);
                }
            }
            Backend::Epoll(epoll) => {
                if epoll.add_connection(user_data(Tag::Receive, id), fd).is_err() {
                    // Out of kernel memory for one more watch.
                    self.connections[id as usize] = None;
                    self.free_connections.push(id);
                    return None;
                }
            }
        }
        Some(id)
    }

    pub fn set_peer(&mut self, id: u32, peer: String) {
        if let Some(connection) = self.connection(id) {
            connection.peer = peer;
        }
    }

    /// A connection whose frames other parts of the addon inject, and whose sends they take.
    pub fn add_pseudo_connection(&mut self, handler: PseudoHandler) -> Option<u32> {
        self.new_slot(Connection::new(Stream::Pseudo(handler), State::Idle))
    }

    pub fn pseudo_closed(&mut self, id: u32, errno: i32) {
        let Some(connection) = self.connection(id) else { return };
        if connection.state != State::Closed {
            // Behind every frame that was posted before.
            connection.state = State::Closed;
            self.events.push_back(Event::Closed { connection: id, errno });
        }
    }

    fn pseudo_send(&mut self, id: u32, what: PseudoSend<'_>) {
        if let Some(Connection { stream: Stream::Pseudo(handler), .. }) = self.connection(id) {
            handler(what);
        }
    }

    /// The connect of `id` was decided.
    pub fn connect_ready(&mut self, id: u32) {
        let uring = matches!(self.backend, Backend::Uring(_));
        let Some(connection) = self.connection(id) else { return };
        connection.sending = false;
        if connection.state != State::Connecting {
            self.finish_closing(id);
            return;
        }
        let fd = connection.fd();
        let errno = ring_socket::connect_result(fd);
        let peer = std::mem::take(&mut connection.peer);
        if errno != 0 {
            connection.state = State::Closed;
            self.connections[id as usize] = None;
        } else {
            connection.state = State::Idle;
            if uring {
                ring_socket::make_blocking(fd);
            }
        }
        self.events.push_back(Event::Connected { connection: id, errno, peer });
    }

    /// JavaScript set a handler: begin to receive.
    pub fn start_connection(&mut self, id: u32) {
        let Some(connection) = self.connection(id) else { return };
        if connection.state != State::Idle {
            return;
        }
        connection.state = State::Open;
        if matches!(connection.stream, Stream::Socket(_)) {
            self.cut(id);
        }
    }

    pub fn pause(&mut self, id: u32) {
        if let Some(connection) = self.connection(id) {
            connection.paused = true;
        }
        self.pseudo_send(id, PseudoSend::Pause(true));
    }

    pub fn resume(&mut self, id: u32) {
        let Some(connection) = self.connection(id) else { return };
        connection.paused = false;
        if matches!(connection.stream, Stream::Pseudo(_)) {
            self.pseudo_send(id, PseudoSend::Pause(false));
        } else if !connection.receiving && !connection.waiting {
            self.cut(id);
        }
    }

    pub fn set_framing(&mut self, id: u32, rule: Rule, unconsumed: &[u8]) {
        let uring = matches!(self.backend, Backend::Uring(_));
        let Some(connection) = self.connection(id) else { return };
        if !matches!(connection.state, State::Idle | State::Open) {
            return;
        }
        if uring && connection.receiving {
            // The kernel may be filling the staging buffer, which must not move: take it back first.
            let mut bytes = unconsumed.to_vec();
            if let Some((_, earlier)) = connection.next_rule.take() {
                bytes.extend_from_slice(&earlier);
            }
            connection.next_rule = Some((rule, bytes));
            if let Backend::Uring(uring) = &mut self.backend {
                uring.cancel(user_data(Tag::Receive, id));
            }
            return;
        }
        connection.receiver.set_rule(rule, unconsumed);
        connection.receiving = false;
        if connection.state == State::Open && !connection.waiting {
            connection.waiting = true;
            self.held.push(id);
        }
    }

    // --- receiving ---------------------------------------------------------------------------------------------------

    /// Cuts what is staged and, when more is needed, goes on receiving.
    pub fn cut(&mut self, id: u32) {
        let Some(connection) = self.connections.get_mut(id as usize).and_then(Option::as_deref_mut) else { return };
        connection.waiting = false;
        if connection.state != State::Open || connection.paused || connection.receiving {
            return;
        }
        let mut sink = ConnectionSink { area: &mut self.area, connection: id };
        match connection.receiver.cut(&self.pool, &mut sink) {
            Cut::NeedMore => self.receive(id),
            Cut::Held => {
                connection.waiting = true;
                self.held.push(id);
            }
            Cut::Starved => {
                connection.waiting = true;
                self.note_starved(id);
            }
            Cut::Broken(errno) => self.close_connection(id, errno),
        }
    }

    fn receive(&mut self, id: u32) {
        let connection = self.connections[id as usize].as_deref_mut().expect("an open connection");
        connection.receiving = true;
        match &mut self.backend {
            Backend::Uring(uring) => {
                let wait_all = connection.prepare_receive(&self.pool);
                let message = &raw mut connection.receive_message;
                uring.receive(user_data(Tag::Receive, id), connection.fd(), message, wait_all);
                self.in_flight += 1;
            }
            Backend::Epoll(_) => {
                if connection.readable {
                    self.ready.push(id);
                }
            }
        }
    }

    pub fn receive_done(&mut self, id: u32, result: i32) {
        let Some(connection) = self.connection(id) else { return };
        connection.receiving = false;
        if connection.state != State::Open {
            self.finish_closing(id);
            return;
        }
        if result > 0 {
            connection.receiver.received(result as usize);
        }
        if let Some((rule, bytes)) = connection.next_rule.take() {
            connection.receiver.set_rule(rule, &bytes);
            if result == -libc::ECANCELED {
                self.cut(id);
                return;
            }
        }
        match result {
            0 => {
                let errno = if connection.receiver.is_between_frames() { 0 } else { libc::ECONNRESET };
                self.close_connection(id, errno);
            }
            count if count > 0 => self.cut(id),
            // ECANCELED: a cancelled receive whose switch of framing was served by an earlier completion.
            error if error == -libc::EINTR || error == -libc::ECANCELED || error == -libc::EAGAIN => self.receive(id),
            error => self.close_connection(id, -error),
        }
    }

    /// epoll: the connection changed.
    pub fn connection_ready(&mut self, id: u32, events: u32) {
        let Some(connection) = self.connection(id) else { return };
        if connection.state == State::Connecting {
            if events & (OUT | GONE) != 0 {
                self.connect_ready(id);
            }
            return;
        }
        if events & GONE != 0 {
            connection.gone = true;
        }
        let (receiving, sending) = (connection.receiving, connection.sending);
        if events & (IN | GONE) != 0 && !connection.readable {
            connection.readable = true;
            if receiving {
                self.ready.push(id);
            }
        }
        if events & (OUT | GONE) != 0 && sending {
            self.send_outgoing(id);
        }
    }

    /// epoll: one receive for each connection that can and wants to, so that none keeps the others waiting.
    pub fn receive_ready(&mut self) {
        if self.ready.is_empty() {
            return;
        }
        let mut ready = std::mem::take(&mut self.ready);
        for id in ready.drain(..) {
            let Some(connection) = self.connections[id as usize].as_deref_mut() else { continue };
            if !connection.receiving || !connection.readable || connection.state != State::Open {
                continue;
            }
            connection.prepare_receive(&self.pool);
            // SAFETY: the message names memory of this connection and of a block it holds.
            let count =
                unsafe { libc::recvmsg(connection.fd(), &raw mut connection.receive_message, libc::MSG_DONTWAIT) };
            let result = if count < 0 { -last_errno() } else { count as i32 };
            if result == -libc::EAGAIN {
                connection.readable = false;
                continue;
            }
            // Less than asked for: the socket is drained, and more will be announced.
            if result > 0 && (result as usize) < connection.wanted_bytes() && !connection.gone {
                connection.readable = false;
            }
            self.receive_done(id, result);
        }
        if self.ready.is_empty() {
            self.ready = ready;
        }
    }

    // --- sending -----------------------------------------------------------------------------------------------------

    /// Takes over a send record; it holds a reference to its payload.
    pub fn queue_send(&mut self, id: u32, index: usize) {
        let record = self.area.submission(index);
        let (payload, length) = (record.payload, record.length as usize);
        let connection = self.connections.get_mut(id as usize).and_then(Option::as_deref_mut);
        let Some(connection) =
            connection.filter(|connection| matches!(connection.state, State::Idle | State::Open) && !connection.ending)
        else {
            if payload >= 0 {
                self.pool.release_from_ring(payload as usize);
            }
            return;
        };
        if let Stream::Pseudo(handler) = &mut connection.stream {
            handler(PseudoSend::Bytes { header: record.header(), payload: i64::from(payload), length: length as u32 });
            if payload >= 0 {
                self.pool.release_from_ring(payload as usize);
            }
            self.area.set_queued(id, 0.0);
            return;
        }
        connection.pending.push_header(record.header());
        if payload >= 0 && length > 0 {
            connection.pending.pieces.push(Piece::Payload { offset: payload as usize, length });
        } else if payload >= 0 {
            self.pool.release_from_ring(payload as usize);
        }
        self.note_to_send(id);
    }

    /// Queues bytes of any length; JavaScript has counted them.
    pub fn queue_bytes(&mut self, id: u32, bytes: &[u8]) {
        let Some(connection) = self.connection(id) else { return };
        if !matches!(connection.state, State::Idle | State::Open) || connection.ending {
            return;
        }
        if let Stream::Pseudo(handler) = &mut connection.stream {
            handler(PseudoSend::Bytes { header: bytes, payload: -1, length: 0 });
            self.area.set_queued(id, 0.0);
            return;
        }
        connection.pending.push_header(bytes);
        self.note_to_send(id);
    }

    fn note_to_send(&mut self, id: u32) {
        let queued = self.area.queued(id);
        let connection = self.connections[id as usize].as_deref_mut().expect("an open connection");
        if queued > SEND_QUEUE_LIMIT {
            connection.above_limit = true;
        }
        if !connection.listed {
            connection.listed = true;
            self.to_send.push(id);
        }
        if queued > SEND_QUEUE_HARD_LIMIT {
            self.close_connection(id, libc::ENOBUFS);
        }
    }

    pub fn send_queued(&mut self, id: u32) {
        let Some(connection) = self.connection(id) else { return };
        connection.listed = false;
        if connection.sending || !matches!(connection.state, State::Idle | State::Open) {
            return;
        }
        if connection.outgoing.is_empty() {
            connection.outgoing.reset();
            std::mem::swap(&mut connection.pending, &mut connection.outgoing);
        }
        if !connection.outgoing.is_empty() {
            self.send_outgoing(id);
        } else if connection.ending {
            self.end_sending(id);
        }
    }

    fn send_outgoing(&mut self, id: u32) {
        let Some(connection) = self.connections[id as usize].as_deref_mut() else { return };
        if matches!(connection.state, State::Closing | State::Closed) {
            return;
        }
        connection.sending = true;
        connection.prepare_send(&self.pool);
        match &mut self.backend {
            Backend::Uring(uring) => {
                uring.send(user_data(Tag::Send, id), connection.fd(), &raw const connection.send_message);
                self.in_flight += 1;
            }
            Backend::Epoll(_) => {
                let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
                // SAFETY: the message names memory that the queue and its references keep.
                let count = unsafe { libc::sendmsg(connection.fd(), &raw const connection.send_message, flags) };
                let result = if count < 0 { -last_errno() } else { count as i32 };
                // EAGAIN: the edge to "writable" is still to come; `sending` remembers that we wait for it.
                if result != -libc::EAGAIN {
                    self.send_done(id, result);
                }
            }
        }
    }

    pub fn send_done(&mut self, id: u32, result: i32) {
        let Some(connection) = self.connections.get_mut(id as usize).and_then(Option::as_deref_mut) else { return };
        connection.sending = false;
        if matches!(connection.state, State::Closing | State::Closed) {
            self.finish_closing(id);
            return;
        }
        if result < 0 && result != -libc::EINTR && result != -libc::EAGAIN {
            self.close_connection(id, -result);
            return;
        }
        if result > 0 {
            connection.outgoing.advance(&self.pool, result as usize);
            let queued = (self.area.queued(id) - f64::from(result)).max(0.0);
            self.area.set_queued(id, queued);
            if connection.above_limit && queued < SEND_QUEUE_LIMIT / 2.0 {
                connection.above_limit = false;
                self.events.push_back(Event::Drained { connection: id });
            }
        }
        self.send_queued(id);
    }

    /// `end`: sends what is queued, then says so to the peer.
    pub fn end(&mut self, id: u32) {
        let Some(connection) = self.connection(id) else { return };
        if !matches!(connection.state, State::Idle | State::Open) || connection.ending {
            return;
        }
        connection.ending = true;
        if matches!(connection.stream, Stream::Pseudo(_)) {
            self.pseudo_send(id, PseudoSend::Close);
        } else {
            self.note_to_send(id);
        }
    }

    /// Everything is sent. JavaScript closes when the peer closed too, or after a while: closing at once could reset
    /// the connection and destroy what the peer has not read yet.
    fn end_sending(&mut self, id: u32) {
        let Some(connection) = self.connection(id) else { return };
        ring_socket::shut_down(connection.fd(), libc::SHUT_WR);
        self.events.push_back(Event::SendingEnded { connection: id });
    }

    // --- closing -----------------------------------------------------------------------------------------------------

    /// Ends a connection; `closed(errno)` follows once.
    pub fn close_connection(&mut self, id: u32, errno: i32) {
        let Some(connection) = self.connections.get_mut(id as usize).and_then(Option::as_deref_mut) else { return };
        if matches!(connection.state, State::Closing | State::Closed) {
            return;
        }
        if let Stream::Pseudo(handler) = &mut connection.stream {
            if !connection.ending {
                connection.ending = true;
                handler(PseudoSend::Close);
            }
            return;
        }
        let connecting = connection.state == State::Connecting;
        connection.state = State::Closing;
        connection.errno = errno;
        connection.pending.clear(&self.pool);
        connection.shut_down();
        match &mut self.backend {
            Backend::Uring(uring) => {
                if connecting {
                    uring.cancel(user_data(Tag::Connect, id));
                }
            }
            Backend::Epoll(_) => {
                // Nothing is in the kernel's hands.
                connection.receiving = false;
                connection.sending = false;
            }
        }
        self.finish_closing(id);
    }

    fn finish_closing(&mut self, id: u32) {
        let Some(connection) = self.connections[id as usize].as_deref_mut() else { return };
        if connection.state != State::Closing || connection.receiving || connection.sending {
            return;
        }
        connection.state = State::Closed;
        connection.outgoing.clear(&self.pool);
        connection.receiver.release(&self.pool);
        let errno = connection.errno;
        // Closes the descriptor; the number stays taken until JavaScript was told.
        self.connections[id as usize] = None;
        self.area.set_queued(id, 0.0);
        self.events.push_back(Event::Closed { connection: id, errno });
    }

    /// JavaScript has handled these ends: their numbers may be used again.
    pub fn free_told(&mut self) {
        while let Some(id) = self.told_closed.pop() {
            self.connections[id as usize] = None;
            self.free_connections.push(id);
        }
    }
}
