//! Where the time of forward passes goes, for reports: off unless asked for.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

static ON: AtomicBool = AtomicBool::new(false);
static SPENT: Mutex<BTreeMap<&'static str, (u64, Duration)>> = Mutex::new(BTreeMap::new());

/// Begins to count, for the whole process, from nothing.
pub fn start_profile() {
    SPENT.lock().unwrap_or_else(|e| e.into_inner()).clear();
    ON.store(true, Ordering::Relaxed);
}

/// Ends it: every operation with its calls and its time, the largest first.
pub fn end_profile() -> Vec<(&'static str, u64, Duration)> {
    ON.store(false, Ordering::Relaxed);
    let spent = std::mem::take(&mut *SPENT.lock().unwrap_or_else(|e| e.into_inner()));
    let mut all: Vec<_> = spent.into_iter().map(|(name, (calls, time))| (name, calls, time)).collect();
    all.sort_by_key(|&(_, _, time)| std::cmp::Reverse(time));
    all
}

/// Runs `f` as the operation `name`.
pub(crate) fn span<T>(name: &'static str, f: impl FnOnce() -> T) -> T {
    if !ON.load(Ordering::Relaxed) {
        return f();
    }
    let start = Instant::now();
    let out = f();
    let time = start.elapsed();
    let mut spent = SPENT.lock().unwrap_or_else(|e| e.into_inner());
    let entry = spent.entry(name).or_default();
    *entry = (entry.0 + 1, entry.1 + time);
    out
}
