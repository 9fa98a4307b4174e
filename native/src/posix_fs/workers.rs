//! The queue and its threads. Bounded by the submitter: TypeScript has at most so many slots, each submitted once.

use super::identity::Identity;
use super::layout::*;
use super::ops::{Mount, Worker};
use super::Door;
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Pace of the descriptor cache's clock, and after how many ticks without use an entry is closed.
const TICK: Duration = Duration::from_secs(5);
const IDLE_TICKS: u32 = 3;

/// Quick operations a worker takes at once when many wait.
const MAX_BATCH: usize = 8;

const STACK_BYTES: usize = 256 * 1024;

#[derive(Clone, Copy)]
pub struct Job {
    pub cookie: u32,
    /// Pool offset of the request block.
    pub block: usize,
}

#[derive(Default)]
struct State {
    /// Operations that never wait for stable storage and move no data.
    quick: VecDeque<Job>,
    slow: VecDeque<Job>,
    slow_running: usize,
    sleeping: usize,
    closing: bool,
}

pub struct Queue {
    state: Mutex<State>,
    ready: Condvar,
    /// The rest of the threads stays free for quick operations: a full disk queue must not stop GETATTR.
    slow_limit: usize,
}

fn is_quick(op: u32) -> bool {
    matches!(op, OP_GETATTR | OP_LOOKUP | OP_ACCESS | OP_READLINK | OP_FSSTAT | OP_PATHCONF)
}

impl Queue {
    pub fn new(workers: usize) -> Queue {
        let slow_limit = if workers == 1 { 1 } else { workers - (workers / 4).max(1) };
        Queue { state: Mutex::default(), ready: Condvar::new(), slow_limit }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("never poisoned: panics abort")
    }

    /// False when the filesystem is being withdrawn; nothing was queued then.
    pub fn submit(&self, jobs: impl Iterator<Item = (Job, u32)>) -> bool {
        let mut state = self.lock();
        if state.closing {
            return false;
        }
        let mut added = 0;
        for (job, op) in jobs {
            if is_quick(op) { &mut state.quick } else { &mut state.slow }.push_back(job);
            added += 1;
        }
        let wake = added.min(state.sleeping);
        drop(state);
        (0..wake).for_each(|_| self.ready.notify_one());
        true
    }

    pub fn close(&self) {
        self.lock().closing = true;
        self.ready.notify_all();
    }
}

fn take(state: &mut State, slow_limit: usize, workers: usize, batch: &mut Vec<Job>) -> bool {
    // Slow ones first when they may run: they wait longest.
    if state.slow_running < slow_limit {
        if let Some(job) = state.slow.pop_front() {
            state.slow_running += 1;
            batch.push(job);
            return true;
        }
    }
    let share = (state.quick.len() / workers).clamp(1, MAX_BATCH);
    for _ in 0..share {
        let Some(job) = state.quick.pop_front() else { break };
        batch.push(job);
    }
    false
}

fn serve(queue: &Queue, workers: usize, mut worker: Worker, door: &dyn Door, keeps_time: bool) {
    let mut batch = Vec::with_capacity(MAX_BATCH);
    let mut next_tick = Instant::now() + TICK;
    let mut state = queue.lock();
    loop {
        let is_slow = take(&mut state, queue.slow_limit, workers, &mut batch);
        if batch.is_empty() {
            if state.closing {
                return;
            }
            state.sleeping += 1;
            if keeps_time {
                let pause = next_tick.saturating_duration_since(Instant::now());
                state = queue.ready.wait_timeout(state, pause).expect("never poisoned: panics abort").0;
            } else {
                state = queue.ready.wait(state).expect("never poisoned: panics abort");
            }
            state.sleeping -= 1;
            if !(keeps_time && Instant::now() >= next_tick) {
                continue;
            }
        }
        let closing = state.closing;
        drop(state);
        for job in batch.drain(..) {
            if closing {
                door.complete(job.cookie, libc::ESTALE, -1, 0);
                continue;
            }
            // SAFETY: the submitter checked the offset and leaves the block alone until the completion.
            let mut block = unsafe { Block::new(door.base().add(job.block)) };
            let done = worker.run(&mut block);
            door.complete(job.cookie, done.errno, done.payload, done.length);
        }
        if !closing {
            worker.mount().sync_retired();
            if keeps_time && Instant::now() >= next_tick {
                worker.mount().cache.expire(IDLE_TICKS);
                worker.mount().sync_retired();
                next_tick = Instant::now() + TICK;
            }
        }
        state = queue.lock();
        if is_slow {
            state.slow_running -= 1;
            if !state.slow.is_empty() && state.sleeping > 0 {
                queue.ready.notify_one();
            }
        }
    }
}

/// Starts the threads. An error (with its cause) when one cannot be prepared; those already started are ended then.
pub fn start(
    queue: &Arc<Queue>,
    mount: &Arc<Mount>,
    door: &Arc<dyn Door>,
    workers: usize,
) -> Result<Vec<JoinHandle<()>>, String> {
    let mut threads: Vec<JoinHandle<()>> = Vec::with_capacity(workers);
    let mut failure = None;
    for index in 0..workers {
        let (queue, mount, door) = (Arc::clone(queue), Arc::clone(mount), Arc::clone(door));
        let (ready, started) = std::sync::mpsc::channel();
        let spawned =
            std::thread::Builder::new().name(format!("posix-fs-{index}")).stack_size(STACK_BYTES).spawn(move || {
                let identity = match Identity::prepare_thread() {
                    Ok(identity) => identity,
                    Err(errno) => {
                        let _ = ready.send(Err(errno));
                        return;
                    }
                };
                let _ = ready.send(Ok(()));
                drop(ready);
                let worker = Worker::new(mount, Arc::clone(&door), identity);
                serve(&queue, workers, worker, &*door, index == 0);
            });
        match spawned {
            Ok(thread) => threads.push(thread),
            Err(error) => failure = Some(format!("cannot start a worker thread: {error}")),
        }
        if failure.is_none() {
            match started.recv() {
                Ok(Ok(())) => continue,
                Ok(Err(errno)) => failure = Some(format!("cannot prepare a worker thread: {}", super::describe(errno))),
                Err(_) => failure = Some("a worker thread ended while it started".into()),
            }
        }
        break;
    }
    match failure {
        None => Ok(threads),
        Some(message) => {
            queue.close();
            for thread in threads {
                let _ = thread.join();
            }
            Err(message)
        }
    }
}
