//! The ring as JavaScript sees it: a napi class, and the turn of the event loop that drives it.
//!
//! There is one event loop per process: Node's. A prepare handle of libuv runs `turn` before libuv would wait. The ring
//! waits itself, for libuv's descriptor too, so that a turn under load is a single system call; it returns to libuv
//! whenever libuv has something to do.

use std::cell::{Cell, RefCell};
use std::ffi::c_void;
use std::ptr;
use std::rc::Rc;
use std::sync::Arc;

use napi::bindgen_prelude::{ToNapiValue, Uint32Array, Uint8Array};
use napi::{sys, Env, Error, Result, Status};
use napi_derive::napi;

use crate::completer::Completer;
use crate::external::{ExternalHandler, PseudoHandler};
use crate::framing::Rule;
use crate::pool::{Pool, PoolHandle, MAX_POOL_BYTES, PAGE_BYTES};
use crate::ring_area::{Area, AREA_BYTES};
use crate::ring_core::{Backend, Core};
use crate::ring_epoll::Epoll;
use crate::ring_file::File;
use crate::ring_socket::{self, SocketFile};
use crate::ring_uring::Uring;
use crate::ring_uv::{Handle, Hook};

/// Batches per turn of libuv's loop; then its own descriptors are looked at.
const MAX_BATCHES: u32 = 64;
/// How long `close` waits for the kernel to let go of our memory.
const CLOSE_PATIENCE: std::time::Duration = std::time::Duration::from_secs(2);

/// A value made with the raw interface.
pub struct RawValue(sys::napi_value);

impl ToNapiValue for RawValue {
    unsafe fn to_napi_value(_: sys::napi_env, value: Self) -> Result<sys::napi_value> {
        Ok(value.0)
    }
}

fn check(status: sys::napi_status, what: &str) -> Result<()> {
    if status == sys::Status::napi_ok {
        Ok(())
    } else {
        Err(Error::new(Status::from(status), format!("{what} failed")))
    }
}

struct Shared {
    env: sys::napi_env,
    core: RefCell<Option<Core>>,
    hook: RefCell<Option<Hook>>,
    /// Called with the number of completion records.
    deliver: Cell<sys::napi_ref>,
    context: Cell<sys::napi_async_context>,
    /// The reference that the environment's cleanup hook holds, as it was given to it.
    kept: Cell<*const Shared>,
    pool: Arc<Pool>,
    /// Zeroed memory of AREA_BYTES; owned here and by the ArrayBuffer over it.
    area: Arc<AreaMemory>,
}

struct AreaMemory(*mut u8);

// Only the ring's thread reads and writes it; whoever drops the last reference only frees it.
unsafe impl Send for AreaMemory {}
unsafe impl Sync for AreaMemory {}

impl AreaMemory {
    fn layout() -> std::alloc::Layout {
        std::alloc::Layout::from_size_align(AREA_BYTES, PAGE_BYTES).expect("a valid layout")
    }

    fn new() -> AreaMemory {
        // SAFETY: the layout is not empty.
        let base = unsafe { std::alloc::alloc_zeroed(Self::layout()) };
        assert!(!base.is_null(), "out of memory for the ring's shared area");
        AreaMemory(base)
    }
}

impl Drop for AreaMemory {
    fn drop(&mut self) {
        // SAFETY: made by `new` with the same layout; no one refers to it any more.
        unsafe { std::alloc::dealloc(self.0, Self::layout()) };
    }
}

/// An ArrayBuffer over `owner`'s memory, which it keeps alive.
fn external_buffer<T>(env: sys::napi_env, owner: Arc<T>, base: *mut u8, length: usize) -> Result<RawValue> {
    unsafe extern "C" fn release<T>(_: sys::napi_env, _: *mut c_void, hint: *mut c_void) {
        // SAFETY: `hint` came from Arc::into_raw below.
        drop(unsafe { Arc::from_raw(hint.cast::<T>().cast_const()) });
    }
    let mut value = ptr::null_mut();
    let hint = Arc::into_raw(owner).cast_mut().cast();
    // SAFETY: the memory lives until `release`.
    let status = unsafe {
        sys::napi_create_external_arraybuffer(env, base.cast(), length, Some(release::<T>), hint, &raw mut value)
    };
    check(status, "napi_create_external_arraybuffer")?;
    Ok(RawValue(value))
}

impl Shared {
    /// Runs with the core, or does nothing once the ring is closed.
    fn with<R>(&self, run: impl FnOnce(&mut Core) -> R) -> Option<R> {
        self.core.borrow_mut().as_mut().map(run)
    }

    fn turn(&self) {
        self.allow_sleep(true);
        for batch in 0..MAX_BATCHES {
            let timeout_ms = match (batch + 1 < MAX_BATCHES, &*self.hook.borrow()) {
                (true, Some(hook)) => hook.timeout_ms(),
                _ => 0,
            };
            let ran = self.with(|core| {
                core.consume();
                let any = core.poll(timeout_ms);
                core.fill();
                (any, core.area.take_batch(), std::mem::take(&mut core.uv_ready))
            });
            let Some((any, count, uv_ready)) = ran else { return };
            if count > 0 {
                self.call_javascript(count as u32);
            }
            if uv_ready || timeout_ms == 0 || !any {
                break;
            }
        }
        self.allow_sleep(false);
    }

    fn allow_sleep(&self, allowed: bool) {
        if let Some(hook) = &*self.hook.borrow() {
            hook.allow_sleep(allowed);
        }
    }

    fn call_javascript(&self, count: u32) {
        let env = self.env;
        // SAFETY: this runs on the environment's thread, with no JavaScript on the stack; the scope bounds every
        // handle.
        unsafe {
            let mut scope = ptr::null_mut();
            if sys::napi_open_handle_scope(env, &raw mut scope) != sys::Status::napi_ok {
                return;
            }
            let (mut function, mut receiver, mut argument, mut result) =
                (ptr::null_mut(), ptr::null_mut(), ptr::null_mut(), ptr::null_mut());
            let ready = sys::napi_get_reference_value(env, self.deliver.get(), &raw mut function)
                == sys::Status::napi_ok
                && sys::napi_get_global(env, &raw mut receiver) == sys::Status::napi_ok
                && sys::napi_create_uint32(env, count, &raw mut argument) == sys::Status::napi_ok;
            if ready {
                let context = self.context.get();
                // Runs microtasks and process.nextTick afterwards.
                let status =
                    sys::napi_make_callback(env, context, receiver, function, 1, &raw const argument, &raw mut result);
                if status == sys::Status::napi_pending_exception {
                    let mut error = ptr::null_mut();
                    if sys::napi_get_and_clear_last_exception(env, &raw mut error) == sys::Status::napi_ok {
                        // As if thrown by a timer: 'uncaughtException', which ends the process unless handled.
                        sys::napi_fatal_exception(env, error);
                    }
                }
            }
            sys::napi_close_handle_scope(env, scope);
        }
    }

    fn close(&self) {
        if let Some(hook) = self.hook.borrow_mut().take() {
            hook.close();
        }
        if let Some(mut core) = self.core.borrow_mut().take() {
            if !core.close(CLOSE_PATIENCE) {
                // The kernel may still write into our buffers (a disk that does not answer): leak them rather than let
                // it write into memory that someone else got. The descriptors stay too.
                std::mem::forget(core);
                std::mem::forget(self.pool.clone());
            }
        }
        let (deliver, context) = (self.deliver.replace(ptr::null_mut()), self.context.replace(ptr::null_mut()));
        // SAFETY: made by `start` in this environment, and taken out so that this happens once.
        unsafe {
            if !deliver.is_null() {
                sys::napi_delete_reference(self.env, deliver);
            }
            if !context.is_null() {
                sys::napi_async_destroy(self.env, context);
            }
        }
        let kept = self.kept.replace(ptr::null());
        if !kept.is_null() {
            // SAFETY: the pair that `start` registered; whoever called us holds another reference.
            unsafe {
                let data = kept.cast_mut().cast();
                sys::napi_remove_env_cleanup_hook(self.env, Some(on_environment_end), data);
                drop(Rc::from_raw(kept));
            }
        }
    }
}

unsafe extern "C" fn on_prepare(handle: *mut Handle) {
    // SAFETY: the handle's data is the Shared that owns the hook; a reference is held while it runs, because JavaScript
    // may close and drop the ring meanwhile.
    let shared = unsafe {
        let shared = Hook::data(handle).cast::<Shared>().cast_const();
        Rc::increment_strong_count(shared);
        Rc::from_raw(shared)
    };
    shared.turn();
}

unsafe extern "C" fn on_environment_end(data: *mut c_void) {
    // SAFETY: `data` came from Rc::into_raw in `start`; `close` gives that reference back, so one more is held here.
    let shared = unsafe {
        let shared = data.cast::<Shared>().cast_const();
        Rc::increment_strong_count(shared);
        Rc::from_raw(shared)
    };
    shared.close();
}

/// The ring. `src/io/native-ring.ts` is its only user in JavaScript; other native classes take a reference to it in
/// their constructors.
#[napi]
pub struct NativeRing {
    shared: Rc<Shared>,
    backend: &'static str,
}

/// What follows is for the other native parts of drbdts.
#[allow(dead_code)]
impl NativeRing {
    /// Executes the operations that JavaScript queues for `target` (from `newTarget`).
    pub fn register_external(&self, target: u32, handler: ExternalHandler) {
        self.shared.with(|core| core.set_external(target, handler));
    }

    /// For finishing external operations and injecting frames from any thread. None once the ring is closed.
    pub fn completer(&self) -> Option<Completer> {
        self.shared.with(|core| core.completer.clone())
    }

    pub fn pool(&self) -> PoolHandle {
        PoolHandle(self.shared.pool.clone())
    }

    /// A connection without a socket: frames come from `Completer::inject_frame`, what JavaScript sends goes to
    /// `handler`. `src/io/native-ring.ts` makes a Connection of the number with `adoptConnection`.
    pub fn register_pseudo_connection(&self, handler: PseudoHandler) -> Option<u32> {
        self.shared.with(|core| core.add_pseudo_connection(handler)).flatten()
    }
}

/// A result for JavaScript: a number, or minus an errno.
fn or_errno(result: Option<std::result::Result<u32, i32>>) -> i32 {
    match result {
        Some(Ok(id)) => id as i32,
        Some(Err(errno)) => -errno,
        None => -libc::ESHUTDOWN,
    }
}

#[napi]
impl NativeRing {
    /// @param backend `auto`, `io_uring` or `epoll`
    #[napi(constructor)]
    pub fn new(env: Env, pool_bytes: f64, backend: String) -> Result<NativeRing> {
        if !(PAGE_BYTES as f64..=MAX_POOL_BYTES as f64).contains(&pool_bytes) {
            return Err(Error::new(Status::InvalidArg, format!("pool of {pool_bytes} bytes")));
        }
        let uring = if backend == "epoll" { None } else { Some(Uring::new()) };
        let (backend, name) = match uring {
            Some(Ok(uring)) => (Backend::Uring(uring), "io_uring"),
            Some(Err(error)) if backend == "io_uring" => {
                return Err(Error::new(Status::GenericFailure, format!("io_uring cannot be used here: {error}")));
            }
            _ => {
                let epoll = Epoll::new().map_err(|error| Error::new(Status::GenericFailure, error.to_string()))?;
                (Backend::Epoll(epoll), "epoll")
            }
        };
        let pool = Arc::new(Pool::new(pool_bytes as usize));
        let memory = Arc::new(AreaMemory::new());
        let core = Core::new(pool.clone(), Area::new(memory.0), backend)
            .map_err(|error| Error::new(Status::GenericFailure, error.to_string()))?;
        let shared = Shared {
            env: env.raw(),
            core: RefCell::new(Some(core)),
            hook: RefCell::new(None),
            deliver: Cell::new(ptr::null_mut()),
            context: Cell::new(ptr::null_mut()),
            kept: Cell::new(ptr::null()),
            pool,
            area: memory,
        };
        Ok(NativeRing { shared: Rc::new(shared), backend: name })
    }

    #[napi(getter)]
    pub fn backend(&self) -> &'static str {
        self.backend
    }

    /// The pool itself.
    #[napi(ts_return_type = "ArrayBuffer")]
    pub fn pool_buffer(&self, env: Env) -> Result<RawValue> {
        let pool = &self.shared.pool;
        external_buffer(env.raw(), pool.clone(), pool.base(), pool.length())
    }

    /// Reference counts (32 bits per page), magazines, block orders (8 bits per page).
    #[napi(ts_return_type = "ArrayBuffer")]
    pub fn pool_control(&self, env: Env) -> Result<RawValue> {
        let pool = &self.shared.pool;
        let (base, length) = pool.control();
        external_buffer(env.raw(), pool.clone(), base, length)
    }

    /// Submission and completion records and counters.
    #[napi(ts_return_type = "ArrayBuffer")]
    pub fn area(&self, env: Env) -> Result<RawValue> {
        external_buffer(env.raw(), self.shared.area.clone(), self.shared.area.0, AREA_BYTES)
    }

    /// Hooks the ring into this thread's event loop; `deliver(count)` is called with batches from now on.
    #[napi(ts_args_type = "deliver: (count: number) => void")]
    pub fn start(&self, env: Env, deliver: napi::bindgen_prelude::Unknown<'_>) -> Result<()> {
        use napi::JsValue;
        let raw = env.raw();
        let (mut event_loop, mut reference) = (ptr::null_mut(), ptr::null_mut());
        let (mut name, mut context) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: plain calls of the raw interface on this thread; every result is checked.
        unsafe {
            check(sys::napi_get_uv_event_loop(raw, &raw mut event_loop), "napi_get_uv_event_loop")?;
            check(sys::napi_create_reference(raw, deliver.raw(), 1, &raw mut reference), "napi_create_reference")?;
            let text = c"drbdts-ring";
            let status = sys::napi_create_string_utf8(raw, text.as_ptr(), 11, &raw mut name);
            check(status, "napi_create_string_utf8")?;
            check(sys::napi_async_init(raw, ptr::null_mut(), name, &raw mut context), "napi_async_init")?;
        }
        self.shared.deliver.set(reference);
        self.shared.context.set(context);
        let data = Rc::as_ptr(&self.shared);
        // SAFETY: the loop is this thread's; the cleanup hook below holds a reference to `data` until the end.
        let hook = unsafe { Hook::start(event_loop.cast(), on_prepare, data.cast_mut().cast()) };
        let fd = hook.backend_fd();
        *self.shared.hook.borrow_mut() = Some(hook);
        self.shared.with(|core| core.watch(fd));
        let kept = Rc::into_raw(self.shared.clone());
        self.shared.kept.set(kept);
        // SAFETY: `kept` stays valid until `close` takes it back and removes the hook.
        let status = unsafe { sys::napi_add_env_cleanup_hook(raw, Some(on_environment_end), kept.cast_mut().cast()) };
        check(status, "napi_add_env_cleanup_hook")
    }

    /// Takes over what is queued now, to make room in the submission area.
    #[napi]
    pub fn submit(&self) {
        self.shared.with(Core::consume);
    }

    /// @returns offset of a block of at least `length` bytes with one reference, or -1
    #[napi]
    pub fn allocate(&self, length: f64) -> i32 {
        self.shared.pool.allocate(length as usize).map_or(-1, |offset| offset as i32)
    }

    /// Frees a block whose reference count JavaScript brought to zero.
    #[napi]
    pub fn free(&self, offset: u32) {
        self.shared.pool.free(offset as usize);
    }

    /// Bytes in allocated blocks.
    #[napi(getter)]
    pub fn used_bytes(&self) -> f64 {
        self.shared.pool.used_bytes() as f64
    }

    /// Queues bytes of any length on a connection, behind everything queued before.
    #[napi]
    pub fn send_bytes(&self, connection: u32, bytes: &[u8]) {
        self.shared.with(|core| {
            core.consume();
            core.queue_bytes(connection, bytes);
        });
    }

    #[napi]
    pub fn set_framing(&self, connection: u32, rule: Uint32Array, unconsumed: Uint8Array) {
        self.shared.with(|core| {
            core.consume();
            core.set_framing(connection, Rule::decode(&rule), &unconsumed);
        });
    }

    /// @returns listener number, or minus an errno
    #[napi]
    pub fn listen_tcp(&self, host: String, port: u32, receive_bytes: i32, send_bytes: i32) -> i32 {
        or_errno(self.shared.with(|core| {
            let port = u16::try_from(port).map_err(|_| libc::EINVAL)?;
            let (socket, port) = ring_socket::listen_tcp(&host, port, receive_bytes, send_bytes)?;
            core.add_listener(socket, port, None)
        }))
    }

    /// @returns listener number, or minus an errno
    #[napi]
    pub fn listen_unix(&self, path: String) -> i32 {
        or_errno(self.shared.with(|core| {
            let socket = ring_socket::listen_unix(&path)?;
            core.add_listener(socket, 0, Some(SocketFile::new(&path)?))
        }))
    }

    #[napi]
    pub fn listener_port(&self, listener: u32) -> u32 {
        self.shared
            .with(|core| core.listeners[listener as usize].as_ref().map(|listener| u32::from(listener.port)))
            .flatten()
            .unwrap_or(0)
    }

    #[napi]
    pub fn close_listener(&self, listener: u32) {
        self.shared.with(|core| core.close_listener(listener));
    }

    /// @returns connection number, or minus an errno; the outcome follows as a record
    #[napi]
    pub fn connect_tcp(
        &self,
        host: String,
        port: u32,
        local_host: Option<String>,
        receive_bytes: i32,
        send_bytes: i32,
    ) -> i32 {
        or_errno(self.shared.with(|core| {
            let port = u16::try_from(port).map_err(|_| libc::EINVAL)?;
            let (socket, peer) =
                ring_socket::connect_tcp(&host, port, local_host.as_deref(), receive_bytes, send_bytes)?;
            let id = core.add_connection(socket, true).ok_or(libc::EMFILE)?;
            core.set_peer(id, peer);
            Ok(id)
        }))
    }

    /// @returns connection number, or minus an errno; the outcome follows as a record
    #[napi]
    pub fn connect_unix(&self, path: String) -> i32 {
        or_errno(self.shared.with(|core| {
            let (socket, peer) = ring_socket::connect_unix(&path)?;
            let id = core.add_connection(socket, true).ok_or(libc::EMFILE)?;
            core.set_peer(id, peer);
            Ok(id)
        }))
    }

    /// Ends a connection, also one that is still connecting; it is told as closed with this errno.
    #[napi]
    pub fn abort(&self, connection: u32, errno: i32) {
        self.shared.with(|core| core.close_connection(connection, errno));
    }

    /// @param flags 1: O_DIRECT, 2: read-only, 4: exclusive
    /// @returns file number, or minus an errno
    #[napi]
    pub fn open_file(&self, path: String, flags: u32) -> i32 {
        or_errno(self.shared.with(|core| Ok(core.add_file(File::open(&path, flags)?))))
    }

    #[napi]
    pub fn file_size(&self, file: u32) -> f64 {
        self.shared.with(|core| core.files[file as usize].as_ref().map_or(0.0, |file| file.size as f64)).unwrap_or(0.0)
    }

    #[napi]
    pub fn file_alignment(&self, file: u32) -> u32 {
        self.shared.with(|core| core.files[file as usize].as_ref().map_or(1, |file| file.alignment)).unwrap_or(1)
    }

    /// Where the next data (or hole) at or after `offset` begins: lseek(2) SEEK_DATA, SEEK_HOLE. The file's size where there
    /// is none; minus an errno where the filesystem cannot say. Looks at extents in memory; does not read data.
    #[napi]
    pub fn file_seek(&self, file: u32, offset: f64, hole: bool) -> f64 {
        self.shared
            .with(|core| core.files[file as usize].as_ref().map_or(-f64::from(libc::EBADF), |file| file.seek(offset, hole)))
            .unwrap_or(-f64::from(libc::EBADF))
    }

    /// A number for external operations; a native class then registers who executes them.
    #[napi]
    pub fn new_target(&self) -> u32 {
        self.shared.with(Core::new_target).unwrap_or(0)
    }

    /// Stops everything. Nothing is delivered afterwards.
    #[napi]
    pub fn close(&self) {
        self.shared.close();
    }

    /// Ordinary CRC-32C of a pool range, continuing from `seed`.
    #[napi(js_name = "crc32cPool")]
    pub fn crc32c_pool(&self, offset: u32, length: u32, seed: u32) -> u32 {
        crate::crc32c::crc32c(self.slice(offset, length), seed)
    }

    /// CRC-32C of a pool range, register from 0 and not inverted.
    #[napi(js_name = "crc32cRawPool")]
    pub fn crc32c_raw_pool(&self, offset: u32, length: u32) -> u32 {
        crate::crc32c::crc32c_raw(self.slice(offset, length))
    }

    /// Copies inside the pool; the ranges may overlap.
    #[napi]
    pub fn pool_copy(&self, destination: u32, source: u32, length: u32) {
        let pool = &self.shared.pool;
        let to = pool.range(destination as usize, length as usize);
        let from = pool.range(source as usize, length as usize);
        // SAFETY: both ranges were checked.
        unsafe { ptr::copy(from, to, length as usize) };
    }

    #[napi]
    pub fn pool_is_zero(&self, offset: u32, length: u32) -> bool {
        // SAFETY: any bytes are valid u64s; align_to keeps the pieces inside.
        let (head, words, tail) = unsafe { self.slice(offset, length).align_to::<u64>() };
        head.iter().all(|&byte| byte == 0)
            && words.chunks(64).all(|chunk| chunk.iter().fold(0, |all, &word| all | word) == 0)
            && tail.iter().all(|&byte| byte == 0)
    }

    #[napi]
    pub fn pool_zero(&self, offset: u32, length: u32) {
        // SAFETY: the range was checked.
        unsafe { ptr::write_bytes(self.shared.pool.range(offset as usize, length as usize), 0, length as usize) };
    }

    fn slice(&self, offset: u32, length: u32) -> &[u8] {
        let base = self.shared.pool.range(offset as usize, length as usize);
        // SAFETY: checked; the caller holds the block, so nobody frees it during this call.
        unsafe { std::slice::from_raw_parts(base, length as usize) }
    }
}
