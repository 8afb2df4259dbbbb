//! Memory for panels, and for keys and values, in huge pages where the system grants them.
//!
//! Multiplying streams through the whole matrix once a token; with pages of 4 KiB a good part of that time goes to
//! finding pages. Most matrices are smaller than a huge page, so they share pieces of memory, which go back to the
//! system when the last of their users has gone.

use std::alloc::Layout;
use std::sync::{Arc, Mutex};

/// Spare bytes after the last one asked for, so that a vector load that starts inside may end outside.
const SLACK: usize = 128;
/// The size of a huge page.
const HUGE: usize = 2 << 20;
/// A piece that several users share; what is larger has a piece of its own.
const SHARED: usize = 8 * HUGE;

/// Zeroed bytes, aligned to a cache line at least.
pub(crate) struct Memory {
    data: *mut u8,
    len: usize,
    _piece: Arc<Piece>,
}

// SAFETY: plain bytes that nobody else holds.
unsafe impl Send for Memory {}
// SAFETY: see above.
unsafe impl Sync for Memory {}

/// The piece that small requests are cut from, and how much of it is given away.
static OPEN: Mutex<Option<(Arc<Piece>, usize)>> = Mutex::new(None);

impl Memory {
    /// `len` zero bytes.
    pub(crate) fn zeroed(len: usize) -> Memory {
        let need = (len.checked_add(SLACK).expect("a matrix that fits memory")).next_multiple_of(64);
        if need > SHARED / 4 {
            let piece = Arc::new(Piece::new(need));
            return Memory { data: piece.data, len, _piece: piece };
        }
        let mut open = OPEN.lock().unwrap_or_else(|e| e.into_inner());
        let (piece, used) = match open.take() {
            Some((piece, used)) if SHARED - used >= need => (piece, used),
            _ => (Arc::new(Piece::new(SHARED)), 0),
        };
        // SAFETY: the piece has SHARED bytes, and nobody has had these.
        let data = unsafe { piece.data.add(used) };
        *open = Some((piece.clone(), used + need));
        Memory { data, len, _piece: piece }
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

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: owned, initialised, borrowed.
        unsafe { std::slice::from_raw_parts(self.data, self.len) }
    }
}

/// Zero bytes of the system's.
struct Piece {
    data: *mut u8,
    layout: Layout,
}

// SAFETY: handed out in parts that do not overlap.
unsafe impl Send for Piece {}
// SAFETY: see above.
unsafe impl Sync for Piece {}

impl Piece {
    fn new(len: usize) -> Piece {
        let layout = Layout::from_size_align(len.next_multiple_of(HUGE), HUGE).expect("a matrix that fits memory");
        // SAFETY: the size is not zero.
        let data = unsafe { map(layout) };
        if data.is_null() {
            std::alloc::handle_alloc_error(layout);
        }
        Piece { data, layout }
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        // SAFETY: mapped with this layout.
        unsafe { unmap(self.data, self.layout) }
    }
}

/// Pages of zeros that exist when they are first touched, huge ones where the system grants them; null where there are
/// none.
/// # Safety
/// The layout's size is not zero, and a multiple of its alignment.
#[cfg(target_os = "linux")]
unsafe fn map(layout: Layout) -> *mut u8 {
    let (size, align) = (layout.size(), layout.align());
    let Some(room) = size.checked_add(align) else { return std::ptr::null_mut() };
    // SAFETY: a new private mapping; what it has too much on both sides is given back, whole pages as sizes and
    // alignments are.
    unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let all = libc::mmap(std::ptr::null_mut(), room, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
        if all == libc::MAP_FAILED {
            return std::ptr::null_mut();
        }
        let all = all.cast::<u8>();
        let before = all.align_offset(align);
        let data = all.add(before);
        if before > 0 {
            libc::munmap(all.cast(), before);
        }
        if align > before {
            libc::munmap(data.add(size).cast(), align - before);
        }
        // Before the first touch. Where the system declines, ordinary pages do.
        libc::madvise(data.cast(), size, libc::MADV_HUGEPAGE);
        data
    }
}

/// # Safety
/// `data` came from `map` with this layout.
#[cfg(target_os = "linux")]
unsafe fn unmap(data: *mut u8, layout: Layout) {
    // SAFETY: as the caller promises.
    unsafe { libc::munmap(data.cast(), layout.size()) };
}

/// # Safety
/// The layout's size is not zero.
#[cfg(not(target_os = "linux"))]
unsafe fn map(layout: Layout) -> *mut u8 {
    // SAFETY: as the caller promises.
    unsafe { std::alloc::alloc_zeroed(layout) }
}

/// # Safety
/// `data` came from `map` with this layout.
#[cfg(not(target_os = "linux"))]
unsafe fn unmap(data: *mut u8, layout: Layout) {
    // SAFETY: as the caller promises.
    unsafe { std::alloc::dealloc(data, layout) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_of_any_length_that_do_not_overlap() {
        let lengths = [0, 1, 63, 4096, HUGE - 1, HUGE, 3 * HUGE + 5, SHARED / 4, SHARED, 70_000];
        let mut all: Vec<Memory> = (0..40).map(|i| Memory::zeroed(lengths[i % lengths.len()])).collect();
        for (i, m) in all.iter_mut().enumerate() {
            assert_eq!((m.len(), m.ptr() as usize % 64), (lengths[i % lengths.len()], 0));
            assert!(m.bytes().iter().all(|&b| b == 0), "of {i}");
            m.bytes_mut().fill(i as u8 + 1);
        }
        for (i, m) in all.iter().enumerate() {
            assert!(m.bytes().iter().all(|&b| b == i as u8 + 1), "of {i}");
        }
    }
}
