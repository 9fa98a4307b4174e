//! The few functions of libuv that the ring needs. The node binary exports them; handles are opaque here and sized by
//! `uv_handle_size`.

use std::os::raw::{c_int, c_void};

pub type Loop = c_void;
pub type Handle = c_void;
pub type HandleCallback = unsafe extern "C" fn(*mut Handle);

const UV_IDLE: c_int = 6;
const UV_PREPARE: c_int = 9;

extern "C" {
    fn uv_handle_size(kind: c_int) -> usize;
    fn uv_handle_set_data(handle: *mut Handle, data: *mut c_void);
    fn uv_handle_get_data(handle: *const Handle) -> *mut c_void;
    fn uv_prepare_init(event_loop: *mut Loop, handle: *mut Handle) -> c_int;
    fn uv_prepare_start(handle: *mut Handle, callback: HandleCallback) -> c_int;
    fn uv_idle_init(event_loop: *mut Loop, handle: *mut Handle) -> c_int;
    fn uv_idle_start(handle: *mut Handle, callback: HandleCallback) -> c_int;
    fn uv_idle_stop(handle: *mut Handle) -> c_int;
    fn uv_close(handle: *mut Handle, callback: Option<HandleCallback>);
    fn uv_unref(handle: *mut Handle);
    fn uv_backend_fd(event_loop: *const Loop) -> c_int;
    fn uv_backend_timeout(event_loop: *const Loop) -> c_int;
    fn uv_update_time(event_loop: *mut Loop);
}

unsafe extern "C" fn nothing(_: *mut Handle) {}

unsafe extern "C" fn free_handle(handle: *mut Handle) {
    // SAFETY: every handle here was allocated by `allocate` and libuv is done with it.
    unsafe { libc::free(handle) };
}

fn allocate(kind: c_int) -> *mut Handle {
    // SAFETY: plain allocation of the size libuv asks for.
    let handle = unsafe { libc::calloc(1, uv_handle_size(kind)) };
    assert!(!handle.is_null(), "out of memory for a libuv handle");
    handle
}

/// A prepare handle that runs the ring once per turn of Node's loop, and an idle handle that keeps libuv from blocking
/// by itself (the ring has already waited, for libuv's descriptors too).
pub struct Hook {
    event_loop: *mut Loop,
    prepare: *mut Handle,
    idle: *mut Handle,
}

impl Hook {
    /// # Safety
    /// `event_loop` is the running loop of this thread, and `data` stays valid until `close`.
    pub unsafe fn start(event_loop: *mut Loop, callback: HandleCallback, data: *mut c_void) -> Hook {
        let (prepare, idle) = (allocate(UV_PREPARE), allocate(UV_IDLE));
        // SAFETY: fresh handles of the right size; init and start of these kinds cannot fail.
        unsafe {
            uv_prepare_init(event_loop, prepare);
            uv_handle_set_data(prepare, data);
            uv_prepare_start(prepare, callback);
            uv_idle_init(event_loop, idle);
            uv_unref(idle);
        }
        Hook { event_loop, prepare, idle }
    }

    /// # Safety
    /// `handle` is the prepare handle of a Hook that is not closed.
    pub unsafe fn data(handle: *mut Handle) -> *mut c_void {
        // SAFETY: the caller's promise.
        unsafe { uv_handle_get_data(handle) }
    }

    pub fn backend_fd(&self) -> i32 {
        // SAFETY: the loop outlives the hook.
        unsafe { uv_backend_fd(self.event_loop) }
    }

    /// Milliseconds until libuv has something to do, -1: nothing planned, 0: at once.
    pub fn timeout_ms(&self) -> i32 {
        // SAFETY: the loop outlives the hook.
        unsafe {
            uv_update_time(self.event_loop);
            uv_backend_timeout(self.event_loop)
        }
    }

    /// While not allowed, libuv polls without waiting.
    pub fn allow_sleep(&self, allowed: bool) {
        // SAFETY: the handle is open until `close`.
        unsafe {
            if allowed {
                uv_idle_stop(self.idle);
            } else {
                uv_idle_start(self.idle, nothing);
            }
        }
    }

    /// libuv frees the handles when its loop next runs.
    pub fn close(self) {
        // SAFETY: both handles are open; a Hook is closed once because this takes it.
        unsafe {
            uv_close(self.prepare, Some(free_handle));
            uv_close(self.idle, Some(free_handle));
        }
    }
}
