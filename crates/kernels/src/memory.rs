//! One block of memory for a matrix's panels, in huge pages where the system grants them.
//!
//! Multiplying streams through the whole matrix once a token; with pages of 4 KiB a good part of that time goes to finding pages.

use std::alloc::Layout;

/// Spare bytes after the last one asked for, so that a vector load that starts inside may end outside.
const SLACK: usize = 128;
/// From here on memory comes in whole huge pages.
const HUGE: usize = 2 << 20;

/// Zeroed bytes, aligned to a cache line at least.
pub(crate) struct Memory {
    data: *mut u8,
    len: usize,
    layout: Layout,
}

// SAFETY: plain owned bytes.
unsafe impl Send for Memory {}
// SAFETY: see above.
unsafe impl Sync for Memory {}

impl Memory {
    /// `len` zero bytes.
    pub(crate) fn zeroed(len: usize) -> Memory {
        let align = if len >= HUGE { HUGE } else { 64 };
        let layout = Layout::from_size_align(len + SLACK, align).expect("a matrix that fits memory");
        // SAFETY: the size is not zero.
        let data = unsafe { std::alloc::alloc(layout) };
        if data.is_null() {
            std::alloc::handle_alloc_error(layout);
        }
        // Before the first touch, or the pages are there already. Where the system declines, ordinary pages do.
        #[cfg(target_os = "linux")]
        if len >= HUGE {
            // SAFETY: the range was just allocated.
            unsafe { libc::madvise(data.cast(), (len + SLACK) / HUGE * HUGE, libc::MADV_HUGEPAGE) };
        }
        // SAFETY: as long as allocated.
        unsafe { data.write_bytes(0, len + SLACK) };
        Memory { data, len, layout }
    }

    pub(crate) fn ptr(&self) -> *const u8 {
        self.data
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: owned, initialised, borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.data, self.len) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { std::alloc::dealloc(self.data, self.layout) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_of_any_length() {
        for len in [0, 1, 63, 4096, HUGE - 1, HUGE, 3 * HUGE + 5] {
            let mut m = Memory::zeroed(len);
            assert_eq!((m.len(), m.ptr() as usize % 64), (len, 0));
            assert!(m.bytes_mut().iter().all(|&b| b == 0));
        }
    }
}
