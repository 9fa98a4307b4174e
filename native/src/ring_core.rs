//! The state of one ring: connections, files, and what JavaScript is to be told. Runs on the thread of its event loop
//! only; other threads speak to it through the completer.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::Arc;

use crate::completer::{Completer, Post, PostKind};
use crate::external::{ExternalHandler, ExternalOp};
use crate::pool::Pool;
use crate::ring_area::{submit, Area, Completion, Kind, SUBMISSIONS};
use crate::ring_connection::Connection;
use crate::ring_epoll::Epoll;
use crate::ring_file::{File, FileOperation};
use crate::ring_socket::{self, SocketFile};
use crate::ring_uring::{split_user_data, user_data, Tag, Uring};
use crate::ring_workers::Workers;

/// Connections taken from one listener before others get their turn.
const ACCEPT_BURST: usize = 64;
/// Turns that may pass without a system call while completions keep coming by themselves.
const LAZY_TURNS: u32 = 4;

/// One per ring, so the size difference costs nothing.
#[allow(clippy::large_enum_variant)]
pub enum Backend {
    Uring(Uring),
    Epoll(Epoll),
}

/// Something JavaScript is to be told, other than a frame.
pub enum Event {
    Closed { connection: u32, errno: i32 },
    Drained { connection: u32 },
    SendingEnded { connection: u32 },
    Accepted { listener: u32, connection: u32, peer: String },
    Connected { connection: u32, errno: i32, peer: String },
    File { file: u32, cookie: u32, errno: i32 },
    Posted(Box<Post>),
}

pub struct Listener {
    pub socket: OwnedFd,
    pub port: u16,
    pub file: Option<SocketFile>,
    /// io_uring: a poll is queued.
    pub armed: bool,
}

pub struct Core {
    pub pool: Arc<Pool>,
    pub area: Area,
    pub backend: Backend,
    pub completer: Completer,
    pub workers: Workers,
    pub connections: Vec<Option<Box<Connection>>>,
    pub free_connections: Vec<u32>,
    /// Told to JavaScript as closed in the batch under way; their numbers are free once it returned.
    pub told_closed: Vec<u32>,
    pub listeners: Vec<Option<Listener>>,
    pub files: Vec<Option<File>>,
    pub operations: Vec<Option<FileOperation>>,
    pub free_operations: Vec<u32>,
    pub events: VecDeque<Event>,
    /// Connections whose cutting goes on after the batch.
    pub held: Vec<u32>,
    /// Connections that wait for pool memory.
    pub starved: Vec<u32>,
    /// Connections with something new to send.
    pub to_send: Vec<u32>,
    /// epoll: connections that may receive now.
    pub ready: Vec<u32>,
    external: Vec<Option<ExternalHandler>>,
    external_batch: Vec<ExternalOp>,
    posts: Vec<Post>,
    reaped: Vec<(u64, i32)>,
    /// io_uring operations whose memory the kernel may still touch.
    pub in_flight: u32,
    uv_fd: i32,
    uv_armed: bool,
    event_armed: bool,
    /// libuv has something to do.
    pub uv_ready: bool,
    lazy_turns: u32,
    /// Descriptor kept aside so that a connection can be accepted and closed when descriptors run out.
    reserve: Option<std::fs::File>,
    pub inline_after: Option<std::time::Instant>,
    /// Voluntary context switches of this thread when it first wrote in this batch.
    pub sleeps: Option<i64>,
}

impl Core {
    pub fn new(pool: Arc<Pool>, area: Area, backend: Backend) -> std::io::Result<Core> {
        let completer = Completer::new()?;
        pool.set_waker(Some(completer.clone()));
        Ok(Core {
            pool,
            area,
            backend,
            workers: Workers::new(completer.clone()),
            completer,
            connections: Vec::new(),
            free_connections: Vec::new(),
            told_closed: Vec::new(),
            listeners: Vec::new(),
            files: Vec::new(),
            operations: Vec::new(),
            free_operations: Vec::new(),
            events: VecDeque::new(),
            held: Vec::new(),
            starved: Vec::new(),
            to_send: Vec::new(),
            ready: Vec::new(),
            external: Vec::new(),
            external_batch: Vec::new(),
            posts: Vec::new(),
            reaped: Vec::new(),
            in_flight: 0,
            uv_fd: -1,
            uv_armed: false,
            event_armed: false,
            uv_ready: false,
            lazy_turns: 0,
            reserve: std::fs::File::open("/dev/null").ok(),
            inline_after: None,
            sleeps: None,
        })
    }

    /// Watches libuv's descriptor and the completer's from now on.
    pub fn watch(&mut self, uv_fd: i32) {
        self.uv_fd = uv_fd;
        if let Backend::Epoll(epoll) = &self.backend {
            let watched = epoll
                .add_readable(user_data(Tag::Uv, 0), uv_fd)
                .and_then(|()| epoll.add_readable(user_data(Tag::Event, 0), self.completer.event_fd()));
            assert!(watched.is_ok(), "epoll_ctl failed: errno {watched:?}");
        }
    }

    pub fn new_target(&mut self) -> u32 {
        self.external.push(None);
        self.external.len() as u32 - 1
    }

    pub fn set_external(&mut self, target: u32, handler: ExternalHandler) {
        let slot = self.external.get_mut(target as usize).expect("a target made by newTarget");
        assert!(slot.is_none(), "target {target} has a handler already");
        *slot = Some(handler);
    }

    /// Takes over everything JavaScript queued.
    pub fn consume(&mut self) {
        let count = self.area.submitted();
        // Since the last batch we waited in the kernel.
        self.sleeps = None;
        for index in 0..count {
            // The kinds below never run JavaScript, so the record stays as it is; copied for the borrow checker only
            // where a whole header is needed.
            let (kind, id) = {
                let record = self.area.submission(index);
                (record.kind, record.id)
            };
            if kind != submit::EXTERNAL && !self.external_batch.is_empty() {
                self.hand_over_external();
            }
            match kind {
                submit::SEND => self.queue_send(id, index),
                submit::START => self.start_connection(id),
                submit::PAUSE => self.pause(id),
                submit::RESUME => self.resume(id),
                submit::END => self.end(id),
                submit::CLOSE => self.close_connection(id, 0),
                submit::READ | submit::WRITE | submit::FLUSH | submit::ZERO => self.start_file_operation(index),
                submit::CLOSE_FILE => self.close_file(id),
                submit::EXTERNAL => self.queue_external(index),
                other => panic!("submission record of kind {other}"),
            }
        }
        self.area.clear_submissions();
        if !self.external_batch.is_empty() {
            self.hand_over_external();
        }
        debug_assert!(count <= SUBMISSIONS);
        let mut to_send = std::mem::take(&mut self.to_send);
        for id in to_send.drain(..) {
            self.send_queued(id);
        }
        self.to_send = to_send;
        self.free_told();
    }

    fn queue_external(&mut self, index: usize) {
        let record = self.area.submission(index);
        let operation = ExternalOp {
            target: record.id,
            cookie: record.cookie,
            payload: i64::from(record.payload),
            length: record.length,
            arg: record.argument,
            flags: record.flags(),
            header_length: record.header().len() as u32,
            header: record.header,
        };
        if self.external_batch.first().is_some_and(|first| first.target != operation.target) {
            self.hand_over_external();
        }
        self.external_batch.push(operation);
    }

    fn hand_over_external(&mut self) {
        let target = self.external_batch[0].target as usize;
        let handler = self.external.get_mut(target).and_then(Option::as_mut);
        let handler = handler.unwrap_or_else(|| panic!("no handler for external target {target}"));
        handler(&self.external_batch);
        self.external_batch.clear();
    }

    /// True if the next turn has work without waiting for the kernel.
    fn has_work(&self) -> bool {
        !self.events.is_empty() || !self.held.is_empty() || !self.posts.is_empty() || self.area.count() > 0
    }

    /// Submits what is queued, waits up to `timeout_ms` (-1: as long as it takes) if there is nothing to do, and takes
    /// in what the kernel finished. Returns false if the wait ran out.
    pub fn poll(&mut self, timeout_ms: i32) -> bool {
        self.cut_held();
        self.feed_starved();
        let busy = self.has_work() || !self.ready.is_empty();
        let mut reaped = std::mem::take(&mut self.reaped);
        match &mut self.backend {
            Backend::Uring(uring) => {
                if !self.uv_armed {
                    uring.poll(user_data(Tag::Uv, 0), self.uv_fd, libc::POLLIN);
                    self.uv_armed = true;
                }
                if !self.event_armed {
                    uring.read_event(user_data(Tag::Event, 0), self.completer.event_fd());
                    self.event_armed = true;
                    self.in_flight += 1;
                }
                if busy {
                    // Inline file I/O keeps a batch going by itself: spare the system call, but not for long.
                    self.lazy_turns += 1;
                    if self.lazy_turns >= LAZY_TURNS {
                        uring.enter_without_waiting();
                        self.lazy_turns = 0;
                    }
                } else {
                    self.lazy_turns = 0;
                    if timeout_ms == 0 {
                        uring.enter_without_waiting();
                    } else {
                        uring.wait(timeout_ms);
                    }
                }
                uring.reap(&mut reaped);
            }
            Backend::Epoll(epoll) => {
                self.lazy_turns += 1;
                if !busy || self.lazy_turns >= LAZY_TURNS {
                    self.lazy_turns = 0;
                    epoll.wait(if busy { 0 } else { timeout_ms }, &mut reaped);
                }
            }
        }
        let any = busy || !reaped.is_empty();
        for (data, result) in reaped.drain(..) {
            self.dispatch(data, result);
        }
        self.reaped = reaped;
        self.receive_ready();
        any
    }

    fn dispatch(&mut self, data: u64, result: i32) {
        let (tag, number) = split_user_data(data);
        let uring = matches!(self.backend, Backend::Uring(_));
        match tag {
            Tag::Uv => {
                self.uv_ready = true;
                self.uv_armed = false;
            }
            Tag::Event => {
                if uring {
                    self.event_armed = false;
                    self.in_flight -= 1;
                } else {
                    let mut value: u64 = 0;
                    // SAFETY: reads eight bytes into a local; it is readable, and only we read it.
                    unsafe { libc::read(self.completer.event_fd(), (&raw mut value).cast(), 8) };
                }
                self.take_posts();
            }
            Tag::Listen => self.accept_waiting(number),
            Tag::Ignore => {}
            Tag::File => {
                self.in_flight -= 1;
                self.file_done(number, result);
            }
            Tag::Receive => {
                if uring {
                    self.in_flight -= 1;
                    self.receive_done(number, result);
                } else {
                    self.connection_ready(number, result as u32);
                }
            }
            Tag::Send => {
                self.in_flight -= 1;
                self.send_done(number, result);
            }
            Tag::Connect => {
                self.in_flight -= 1;
                self.connect_ready(number);
            }
        }
    }

    fn take_posts(&mut self) {
        let mut posts = std::mem::take(&mut self.posts);
        self.completer.drain(&mut posts);
        for post in posts.drain(..) {
            match post.kind {
                PostKind::File => self.worker_done(post.target, post.result),
                PostKind::Closed => self.pseudo_closed(post.target, post.result),
                PostKind::External | PostKind::Frame => self.deliver_post(post),
            }
        }
        self.posts = posts;
    }

    fn deliver_post(&mut self, post: Post) {
        if self.area.room() > 0 && self.events.is_empty() {
            self.push_post(&post);
        } else {
            self.events.push_back(Event::Posted(Box::new(post)));
        }
    }

    fn push_post(&mut self, post: &Post) {
        let kind = if post.kind == PostKind::Frame { Kind::Frame } else { Kind::External };
        if kind == Kind::Frame && !self.is_open(post.target) {
            // JavaScript closed the pseudo-connection meanwhile.
            if post.payload >= 0 {
                self.pool.release_from_ring(post.payload as usize);
            }
            return;
        }
        let completion = Completion {
            kind,
            id: post.target,
            cookie: post.cookie,
            result: post.result,
            payload: post.payload as i32,
            length: post.length,
            flags: post.flags,
        };
        self.area.push(completion, &post.header[..post.header_length as usize]);
    }

    /// Writes waiting events into the completion area as far as they fit.
    pub fn fill(&mut self) {
        while self.area.room() > 0 {
            let Some(event) = self.events.pop_front() else { break };
            let mut completion =
                Completion { kind: Kind::Closed, id: 0, cookie: 0, result: 0, payload: -1, length: 0, flags: 0 };
            match event {
                Event::Closed { connection, errno } => {
                    completion.id = connection;
                    completion.result = errno;
                    self.area.push(completion, &[]);
                    self.told_closed.push(connection);
                }
                Event::Drained { connection } => {
                    completion.kind = Kind::Drained;
                    completion.id = connection;
                    self.area.push(completion, &[]);
                }
                Event::SendingEnded { connection } => {
                    completion.kind = Kind::SendingEnded;
                    completion.id = connection;
                    self.area.push(completion, &[]);
                }
                Event::Accepted { listener, connection, peer } => {
                    completion.kind = Kind::Accepted;
                    completion.id = connection;
                    completion.cookie = listener;
                    self.area.push(completion, peer.as_bytes());
                }
                Event::Connected { connection, errno, peer } => {
                    completion.kind = Kind::Connected;
                    completion.id = connection;
                    completion.result = errno;
                    self.area.push(completion, peer.as_bytes());
                    if errno != 0 {
                        self.told_closed.push(connection);
                    }
                }
                Event::File { file, cookie, errno } => {
                    completion.kind = Kind::File;
                    completion.id = file;
                    completion.cookie = cookie;
                    completion.result = errno;
                    self.area.push(completion, &[]);
                }
                Event::Posted(post) => self.push_post(&post),
            }
        }
    }

    pub fn cut_held(&mut self) {
        if self.held.is_empty() {
            return;
        }
        let held = std::mem::take(&mut self.held);
        for id in held {
            self.cut(id);
        }
    }

    /// Lets waiting connections try again; the flag makes releases on other threads wake us.
    fn feed_starved(&mut self) {
        if self.starved.is_empty() {
            return;
        }
        let starved = std::mem::take(&mut self.starved);
        for id in starved {
            self.cut(id);
        }
        self.pool.starved.store(!self.starved.is_empty(), Ordering::Release);
    }

    pub fn note_starved(&mut self, id: u32) {
        self.starved.push(id);
        self.pool.starved.store(true, Ordering::Release);
    }

    // --- listeners ---------------------------------------------------------------------------------------------------

    pub fn add_listener(&mut self, socket: OwnedFd, port: u16, file: Option<SocketFile>) -> Result<u32, i32> {
        let id = self.listeners.len() as u32;
        let fd = socket.as_raw_fd();
        let armed = match &mut self.backend {
            Backend::Uring(uring) => {
                uring.poll(user_data(Tag::Listen, id), fd, libc::POLLIN);
                true
            }
            Backend::Epoll(epoll) => {
                epoll.add_readable(user_data(Tag::Listen, id), fd)?;
                false
            }
        };
        self.listeners.push(Some(Listener { socket, port, file, armed }));
        Ok(id)
    }

    pub fn close_listener(&mut self, id: u32) {
        if let Some(listener) = self.listeners[id as usize].take() {
            if let Some(file) = &listener.file {
                file.remove();
            }
            // A queued poll keeps the socket alive: shutting it down ends the poll and refuses newcomers at once.
            ring_socket::shut_down(listener.socket.as_raw_fd(), libc::SHUT_RDWR);
            if let (true, Backend::Uring(uring)) = (listener.armed, &mut self.backend) {
                uring.cancel(user_data(Tag::Listen, id));
            }
        }
    }

    fn accept_waiting(&mut self, id: u32) {
        let Some(listener) = &mut self.listeners[id as usize] else { return };
        listener.armed = false;
        let fd = listener.socket.as_raw_fd();
        for _ in 0..ACCEPT_BURST {
            match ring_socket::accept(fd) {
                Ok((socket, peer)) => {
                    // Beyond MAX_CONNECTIONS the newcomer is closed at once.
                    if let Some(connection) = self.add_connection(socket, false) {
                        self.events.push_back(Event::Accepted { listener: id, connection, peer });
                    }
                }
                Err(libc::EMFILE | libc::ENFILE) => {
                    // Out of descriptors: refuse by accepting and closing, else the listener stays readable for ever.
                    self.reserve = None;
                    drop(ring_socket::accept(fd));
                    self.reserve = std::fs::File::open("/dev/null").ok();
                }
                Err(libc::EAGAIN) => break,
                // The newcomer gave up already.
                Err(_) => {}
            }
        }
        if let Backend::Uring(uring) = &mut self.backend {
            uring.poll(user_data(Tag::Listen, id), fd, libc::POLLIN);
            if let Some(listener) = &mut self.listeners[id as usize] {
                listener.armed = true;
            }
        }
    }

    // --- end ---------------------------------------------------------------------------------------------------------

    /// Ends everything. False if the kernel still works on our memory after `patience`: then it must not be freed.
    pub fn close(&mut self, patience: std::time::Duration) -> bool {
        self.pool.set_waker(None);
        self.workers.close();
        for id in 0..self.listeners.len() as u32 {
            self.close_listener(id);
        }
        for connection in self.connections.iter().flatten() {
            connection.shut_down();
        }
        let deadline = std::time::Instant::now() + patience;
        if let Backend::Uring(uring) = &mut self.backend {
            if self.event_armed {
                uring.cancel(user_data(Tag::Event, 0));
            }
            if self.uv_armed {
                uring.cancel(user_data(Tag::Uv, 0));
            }
            let mut reaped = Vec::new();
            while self.in_flight > 0 && std::time::Instant::now() < deadline {
                uring.wait(10);
                uring.reap(&mut reaped);
                for (data, _) in reaped.drain(..) {
                    let (tag, _) = split_user_data(data);
                    if !matches!(tag, Tag::Ignore | Tag::Uv | Tag::Listen) {
                        self.in_flight -= 1;
                    }
                }
            }
        }
        self.external.clear();
        self.in_flight == 0
    }
}
