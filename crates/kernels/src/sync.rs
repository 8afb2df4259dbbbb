//! What [`crate::gate`] stands on; its test puts a model checker's in this place.

use std::cell::UnsafeCell;
pub(crate) use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// A value that several threads reach.
pub(crate) struct Cell<T>(UnsafeCell<T>);

impl<T: Copy> Cell<T> {
    pub(crate) const fn new(value: T) -> Cell<T> {
        Cell(UnsafeCell::new(value))
    }

    /// # Safety
    /// Nobody writes meanwhile.
    pub(crate) unsafe fn get(&self) -> T {
        // SAFETY: as the caller promises.
        unsafe { *self.0.get() }
    }

    /// # Safety
    /// Nobody reads or writes meanwhile.
    pub(crate) unsafe fn set(&self, value: T) {
        // SAFETY: as the caller promises.
        unsafe { *self.0.get() = value }
    }
}

/// Between two looks at something that changes soon.
pub(crate) fn pause(looks: u32) {
    // A worker inside may have lost its core to another process: then it needs ours more than we do.
    if looks > 2000 { std::thread::yield_now() } else { std::hint::spin_loop() }
}
