//! A thread's own scratch memory, kept between calls.

use std::cell::RefCell;

#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Line([f32; 16]);

thread_local! {
    /// Buffers not lent out: a call within a call takes the next one, and the same depths meet the same buffers again.
    static BUFFERS: RefCell<Vec<Vec<Line>>> = const { RefCell::new(Vec::new()) };
}

/// Lends `f` at least `len` f32 values, aligned to a cache line, of unspecified content.
pub(crate) fn with<T>(len: usize, f: impl FnOnce(&mut [f32]) -> T) -> T {
    let mut lines = BUFFERS.with(|b| b.borrow_mut().pop()).unwrap_or_default();
    let need = len.div_ceil(16);
    if lines.len() < need {
        lines.resize(need, Line([0.0; 16]));
    }
    // SAFETY: a Line is sixteen f32 without padding, and the slice covers exactly the vector's lines.
    let out = f(unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast::<f32>(), lines.len() * 16) });
    BUFFERS.with(|b| b.borrow_mut().push(lines));
    out
}
