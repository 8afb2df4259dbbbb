//! Cutting work into tasks and handing them to threads that wait close by. No result depends on the cut.
//!
//! Decoding a token makes hundreds of calls of some microseconds each, so the hand-over must cost about one: workers
//! look for the next call for a moment before they sleep, and the caller never waits for a worker to wake, because
//! every task is taken from one counter and what nobody else takes, the caller does. A call while another is at work
//! (from a second thread or from within a task) runs alone on its thread.

use std::sync::{Mutex, OnceLock};
use std::thread::Thread;
use std::time::{Duration, Instant};

use crate::gate::Gate;
use crate::sync::{AtomicBool, AtomicUsize, Cell, Ordering};

/// Least arithmetic (fused multiply-adds) worth a task of its own.
const TASK: usize = 1 << 15;
/// How long a worker looks for the next call before it sleeps: longer than the small steps between two products of a
/// decoder.
const LINGER: Duration = Duration::from_micros(40);
/// Looks between two glances at the clock; after the first batch the processor is offered to others between batches.
const LOOKS: u32 = 64;
/// Threads at most, the caller included.
const MOST: usize = 256;

static THREADS: AtomicUsize = AtomicUsize::new(0);

/// Sets how many threads a call may use, its own included, for the whole process; 0 (as at the start): as many as the
/// current rayon pool has.
pub fn set_threads(n: usize) {
    THREADS.store(n.min(MOST), Ordering::Relaxed);
}

/// How many threads a call from here may use, its own included.
pub fn threads() -> usize {
    match THREADS.load(Ordering::Relaxed) {
        0 => rayon::current_num_threads().clamp(1, MOST),
        n => n,
    }
}

/// Calls `f(i)` for each `i` below `n`, on as many threads as are worth it at `cost` multiply-adds an item: for work of
/// those who compute with this crate, in its threads.
pub fn tasks<F: Fn(usize) + Sync>(n: usize, cost: usize, f: F) {
    ranges(n, 1, 1, cost, |from, to| (from..to).for_each(&f));
}

/// Calls `f(from, to)` over ranges that cover `0..n`: whole multiples of `unit` (the last one aside), at most `most`
/// long, each worth a task at `cost` multiply-adds an item.
pub(crate) fn ranges<F: Fn(usize, usize) + Sync>(n: usize, unit: usize, most: usize, cost: usize, f: F) {
    each(n, unit, most, cost, |first, more| std::iter::once(first).chain(more).for_each(|(from, to)| f(from, to)));
}

/// As [`ranges`], but `f` is called once on every thread that takes part, with its first range and what gives it more.
pub(crate) fn each<F: Fn((usize, usize), &mut Tasks<'_>) + Sync>(
    n: usize,
    unit: usize,
    most: usize,
    cost: usize,
    f: F,
) {
    let threads = if n * cost < 4 * TASK { 1 } else { threads() };
    let least = (TASK / cost.max(1)).max(1).next_multiple_of(unit);
    let mut cut = Cut { n, unit, least, most: most.max(unit), threads };
    let tasks = n.div_ceil(least.min(cut.most));
    if threads == 1 || tasks < 2 || !POOL.share(cut, threads.min(tasks) - 1, &f) {
        cut.threads = 1;
        Tasks { cut, next: &AtomicUsize::new(0) }.run(f);
    }
}

/// The ranges of a call that nobody has taken yet; each goes to whoever asks next.
pub(crate) struct Tasks<'a> {
    cut: Cut,
    next: &'a AtomicUsize,
}

impl Iterator for Tasks<'_> {
    type Item = (usize, usize);
    fn next(&mut self) -> Option<(usize, usize)> {
        let end = |from: usize| from + self.cut.length(from);
        let take = |from: usize| (from < self.cut.n).then(|| end(from));
        let from = self.next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).ok()?;
        Some((from, end(from)))
    }
}

impl Tasks<'_> {
    fn run(mut self, f: impl Fn((usize, usize), &mut Self)) {
        if let Some(first) = self.next() {
            f(first, &mut self);
        }
    }
}

/// How a call's items are cut: three quarters of them into one task for every thread, which read what lies together at
/// a stretch; of the rest a task takes its part of what is left, so that they are short in the end, when a thread that
/// lags behind would hold up the others.
#[derive(Clone, Copy)]
struct Cut {
    n: usize,
    unit: usize,
    least: usize,
    most: usize,
    threads: usize,
}

impl Cut {
    /// Items of the task that starts at `from`, which is below `n`.
    fn length(&self, from: usize) -> usize {
        let left = self.n - from;
        if self.threads == 1 {
            return self.most.min(left);
        }
        let first = 3 * self.n / (4 * self.threads) / self.unit * self.unit;
        let fair = if first >= self.least && from < first * self.threads {
            first
        } else {
            left.div_ceil(2 * self.threads).max(self.least).next_multiple_of(self.unit)
        };
        fair.min(self.most).min(left)
    }
}

/// A call's work as workers see it: a function of tasks, its type forgotten.
#[derive(Clone, Copy)]
struct Job {
    call: unsafe fn(*const (), Tasks<'_>),
    data: *const (),
    cut: Cut,
}

struct Pool {
    gate: Gate<Job>,
    /// The next item to take.
    next: AtomicUsize,
    failed: AtomicBool,
    workers: [OnceLock<Worker>; MOST],
    /// Held while workers are started.
    starting: Mutex<usize>,
}

struct Worker {
    thread: Thread,
    asleep: AtomicBool,
}

static POOL: Pool = Pool {
    gate: Gate {
        busy: AtomicBool::new(false),
        epoch: AtomicUsize::new(0),
        state: AtomicUsize::new(0),
        job: Cell::new(None),
    },
    next: AtomicUsize::new(0),
    failed: AtomicBool::new(false),
    workers: [const { OnceLock::new() }; MOST],
    starting: Mutex::new(0),
};

/// # Safety
/// `data` points to an `F` that lives through the call.
unsafe fn call_of<F: Fn((usize, usize), &mut Tasks<'_>) + Sync>(data: *const (), tasks: Tasks<'_>) {
    // SAFETY: as the caller promises.
    tasks.run(unsafe { &*data.cast::<F>() });
}

/// Shuts the gate and waits for those inside, also when the caller's own task panics: the job lives on the caller's
/// stack.
struct Shut;

impl Drop for Shut {
    fn drop(&mut self) {
        POOL.gate.shut();
    }
}

impl Pool {
    /// Runs `f` over all items with up to `helpers` workers; false, and nothing done, where another call is at work.
    fn share<F: Fn((usize, usize), &mut Tasks<'_>) + Sync>(&'static self, cut: Cut, helpers: usize, f: &F) -> bool {
        if !self.gate.take() {
            return false;
        }
        let helpers = helpers.min(self.started(helpers));
        self.failed.store(false, Ordering::Relaxed);
        self.next.store(0, Ordering::Relaxed);
        {
            let _shut = Shut;
            // SAFETY: taken above; `f` outlives the guard that shuts the gate.
            unsafe { self.gate.open(Job { call: call_of::<F>, data: (&raw const *f).cast(), cut }, helpers) };
            for w in self.workers[..helpers].iter().filter_map(OnceLock::get) {
                if w.asleep.load(Ordering::SeqCst) {
                    w.thread.unpark();
                }
            }
            Tasks { cut, next: &self.next }.run(f);
        }
        assert!(!self.failed.load(Ordering::Relaxed), "a task of this call panicked on another thread");
        true
    }

    /// Starts workers until there are `want`, and gives how many there are: fewer where the system refuses threads.
    fn started(&'static self, want: usize) -> usize {
        let mut have = self.starting.lock().unwrap_or_else(|e| e.into_inner());
        while *have < want.min(MOST) {
            let i = *have;
            let made = std::thread::Builder::new().name(format!("kernels-{i}")).spawn(move || self.worker(i));
            let Ok(handle) = made else { break };
            let _ = self.workers[i].set(Worker { thread: handle.thread().clone(), asleep: AtomicBool::new(false) });
            *have += 1;
        }
        *have
    }

    fn worker(&'static self, i: usize) {
        let mut seen = 0;
        loop {
            seen = self.wait(i, seen);
            let Some(job) = self.gate.join() else { continue };
            let tasks = Tasks { cut: job.cut, next: &self.next };
            // SAFETY: the job's function lives until nobody is inside.
            let run = || unsafe { (job.call)(job.data, tasks) };
            if std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_err() {
                self.failed.store(true, Ordering::Relaxed);
            }
            self.gate.leave();
        }
    }

    /// Waits until the epoch is no longer `seen` and gives the new one: awake for a moment, then asleep.
    fn wait(&self, i: usize, seen: usize) -> usize {
        let started = Instant::now();
        loop {
            for _ in 0..LOOKS {
                let now = self.gate.epoch.load(Ordering::Acquire);
                if now != seen {
                    return now;
                }
                std::hint::spin_loop();
            }
            if started.elapsed() > LINGER {
                break;
            }
            std::thread::yield_now();
        }
        // The maker of this thread stores its handle just after it starts.
        let me = self.workers[i].wait();
        me.asleep.store(true, Ordering::SeqCst);
        // Either the caller sees `asleep` after its step of the epoch, or this sees the step: never neither.
        loop {
            let now = self.gate.epoch.load(Ordering::SeqCst);
            if now != seen {
                me.asleep.store(false, Ordering::SeqCst);
                return now;
            }
            std::thread::park();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;

    fn sum(n: usize) -> u64 {
        let total = AtomicU64::new(0);
        ranges(n, 3, usize::MAX, 1 << 16, |a, b| {
            total.fetch_add((a..b).map(|i| i as u64).sum(), Ordering::Relaxed);
        });
        total.into_inner()
    }

    fn on<T: Send>(threads: usize, f: impl FnOnce() -> T + Send) -> T {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(f)
    }

    #[test]
    fn every_item_once_whatever_the_threads() {
        for threads in [1, 2, 3, 9] {
            on(threads, || {
                for n in [0, 1, 2, 5, 100, 1001] {
                    for _ in 0..200 {
                        assert_eq!(sum(n), (n as u64 * n.saturating_sub(1) as u64) / 2);
                    }
                }
            });
        }
    }

    #[test]
    fn calls_within_calls_and_beside_calls() {
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..300 {
                        let total = AtomicU64::new(0);
                        ranges(20, 1, 1, 1 << 16, |a, _| {
                            total.fetch_add(sum(a), Ordering::Relaxed);
                        });
                        assert_eq!(total.into_inner(), (0..20u64).map(|a| a * a.saturating_sub(1) / 2).sum::<u64>());
                    }
                });
            }
        });
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        on(3, || {
            for _ in 0..50 {
                let run = || ranges(64, 1, 1, 1 << 16, |a, _| assert!(a != 40, "as planned"));
                assert!(std::panic::catch_unwind(run).is_err());
                assert_eq!(sum(10), 45);
            }
        });
    }

    #[test]
    fn a_sleeping_worker_wakes() {
        on(2, || {
            for _ in 0..5 {
                assert_eq!(sum(100), 4950);
                std::thread::sleep(Duration::from_millis(2));
            }
        });
    }
}
