//! The filesystem as JavaScript sees it. `src/io/posix-filesystem.ts` is its only user.

use super::{Door, Facts, PosixFs, MAX_WORKERS};
use crate::completer::Completer;
use crate::pool::PoolHandle;
use crate::ring::NativeRing;
use napi::bindgen_prelude::Uint8Array;
use napi::{Error, Result, Status};
use napi_derive::napi;
use std::sync::Arc;

/// The operations' view of the ring.
struct RingDoor {
    target: u32,
    pool: PoolHandle,
    completer: Completer,
}

impl Door for RingDoor {
    fn base(&self) -> *mut u8 {
        self.pool.base()
    }

    fn length(&self) -> usize {
        self.pool.length()
    }

    fn allocate(&self, bytes: u32) -> Option<i64> {
        self.pool.alloc(bytes as usize)
    }

    fn release(&self, offset: i64) {
        self.pool.release(offset);
    }

    fn complete(&self, cookie: u32, errno: i32, payload: i64, length: u32) {
        self.completer.complete(self.target, cookie, errno, payload, length, &[]);
    }
}

/// One exported filesystem. Its operations are external operations of `target`: the record's argument is the pool
/// offset of the request block, its cookie comes back in the completion, whose result is an errno.
#[napi]
pub struct NativePosixFs {
    filesystem: Arc<PosixFs>,
    facts: Facts,
}

#[napi]
impl NativePosixFs {
    /// @param target from the ring's `newTarget`
    /// @param workers 1 to 256 threads
    /// @throws with a sentence that names path and cause
    #[napi(constructor)]
    pub fn new(ring: &NativeRing, target: u32, path: String, workers: u32) -> Result<NativePosixFs> {
        if !(1..=MAX_WORKERS as u32).contains(&workers) {
            return Err(Error::new(Status::InvalidArg, format!("{workers} workers; 1 to {MAX_WORKERS} are possible")));
        }
        let Some(completer) = ring.completer() else {
            return Err(Error::new(Status::GenericFailure, "the ring is closed"));
        };
        let door = Arc::new(RingDoor { target, pool: ring.pool(), completer });
        let (filesystem, facts) = PosixFs::open(&path, workers as usize, door)
            .map_err(|message| Error::new(Status::GenericFailure, message))?;
        let filesystem = Arc::new(filesystem);
        let executor = Arc::clone(&filesystem);
        ring.register_external(
            target,
            Box::new(move |operations| {
                executor.submit(operations.iter().map(|operation| (operation.cookie, operation.arg as usize)));
            }),
        );
        Ok(NativePosixFs { filesystem, facts })
    }

    /// Eight bytes that are the same on both heads.
    #[napi(getter)]
    pub fn id(&self) -> Uint8Array {
        self.facts.id.to_vec().into()
    }

    #[napi(getter)]
    pub fn max_file_size_bytes(&self) -> f64 {
        self.facts.max_file_size
    }

    #[napi(getter)]
    pub fn root_handle(&self) -> Uint8Array {
        self.facts.root_handle.clone().into()
    }

    /// Closes every descriptor on the tree, then completes `cookie`.
    #[napi]
    pub fn withdraw(&self, cookie: u32) {
        self.filesystem.withdraw(cookie);
    }
}
