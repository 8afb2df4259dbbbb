//! How a caller lets workers into its call and sees them out, apart from what they do inside: `tests/gate.rs` tries
//! every interleaving.

use super::sync::{AtomicBool, AtomicUsize, Cell, Ordering, pause};

/// Set in [`Gate::state`] while workers may join.
const OPEN: usize = 1 << (usize::BITS - 1);
/// One worker more that may join.
const TICKET: usize = 1 << 16;
/// Workers inside.
const INSIDE: usize = TICKET - 1;

/// One call at a time, whose job only those inside can see.
pub(crate) struct Gate<J> {
    /// A call is at work.
    pub(crate) busy: AtomicBool,
    /// Counts calls, so that workers see a new one.
    pub(crate) epoch: AtomicUsize,
    /// `OPEN`, tickets left and workers inside: joining is one exchange, so nobody can join a call that has ended.
    pub(crate) state: AtomicUsize,
    pub(crate) job: Cell<Option<J>>,
}

// SAFETY: `job` is written by the caller that holds `busy` while the gate is shut and nobody is inside, and read by
// those inside. That what it points to may be used by several threads is for who opens the gate to know.
unsafe impl<J> Sync for Gate<J> {}

impl<J: Copy> Gate<J> {
    /// Begins a call; false where another is at work. [`Gate::shut`] ends it.
    pub(crate) fn take(&self) -> bool {
        self.busy.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_ok()
    }

    /// Lets up to `workers` in, who find `job`.
    ///
    /// # Safety
    /// The caller has taken the gate and not opened it yet; what `job` points to lives until it is shut.
    pub(crate) unsafe fn open(&self, job: J, workers: usize) {
        // SAFETY: the gate is shut with nobody inside, as the last call left it, and nobody else writes.
        unsafe { self.job.set(Some(job)) };
        self.state.store(OPEN | (workers * TICKET), Ordering::Release);
        self.epoch.fetch_add(1, Ordering::SeqCst);
    }

    /// Lets nobody in any more, waits for those inside, and ends the call.
    pub(crate) fn shut(&self) {
        self.state.fetch_and(INSIDE, Ordering::AcqRel);
        let mut looks = 0u32;
        while self.state.load(Ordering::Acquire) & INSIDE != 0 {
            looks += 1;
            pause(looks);
        }
        self.busy.store(false, Ordering::Release);
    }

    /// Goes inside where the gate is open and has a ticket left; [`Gate::leave`] must follow.
    pub(crate) fn join(&self) -> Option<J> {
        let enter = |g: usize| (g & OPEN != 0 && g & !OPEN >= TICKET).then(|| g - TICKET + 1);
        self.state.fetch_update(Ordering::AcqRel, Ordering::Relaxed, enter).ok()?;
        // SAFETY: inside, the job stays.
        unsafe { self.job.get() }
    }

    /// Goes out; the job may be gone after that.
    pub(crate) fn leave(&self) {
        self.state.fetch_sub(1, Ordering::AcqRel);
    }
}
