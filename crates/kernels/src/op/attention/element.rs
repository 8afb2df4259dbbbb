//! What a page's elements are: their type, where they lie, and how they come into lanes.

use half::f16;

use crate::kv::{Data, KvPage};
use crate::simd::Simd;

/// A cached element.
pub(super) trait Element: Copy + Send + Sync {
    /// Whether many queries had better read it widened to f32.
    const NARROW: bool;

    /// The parts of a page of such elements.
    fn parts(page: &KvPage) -> Parts<'_, Self>;

    /// # Safety
    /// `p` is readable for LANES elements.
    unsafe fn lanes<S: Simd>(s: S, p: *const Self) -> S::V;
}

/// Keys, values and the factors of both, where a page has them.
pub(super) struct Parts<'a, E> {
    pub(super) keys: &'a [E],
    pub(super) values: &'a [E],
    pub(super) scales: Option<[&'a [f32]; 2]>,
}

/// The pages of a pool are of its format.
const FORMAT: &str = "pages of one format";

impl Element for f32 {
    const NARROW: bool = false;
    fn parts(page: &KvPage) -> Parts<'_, f32> {
        let Data::F32(keys, values) = &page.data else { unreachable!("{FORMAT}") };
        Parts { keys, values, scales: None }
    }
    #[inline(always)]
    unsafe fn lanes<S: Simd>(s: S, p: *const f32) -> S::V {
        // SAFETY: as the caller promises.
        unsafe { s.load(p) }
    }
}

impl Element for f16 {
    const NARROW: bool = true;
    fn parts(page: &KvPage) -> Parts<'_, f16> {
        let Data::F16(keys, values) = &page.data else { unreachable!("{FORMAT}") };
        Parts { keys, values, scales: None }
    }
    #[inline(always)]
    unsafe fn lanes<S: Simd>(s: S, p: *const f16) -> S::V {
        // SAFETY: as the caller promises.
        unsafe { s.load_f16(p.cast()) }
    }
}

impl Element for i8 {
    const NARROW: bool = true;
    fn parts(page: &KvPage) -> Parts<'_, i8> {
        let Data::Q8 { k, v, k_scales, v_scales } = &page.data else { unreachable!("{FORMAT}") };
        Parts { keys: k, values: v, scales: Some([k_scales, v_scales]) }
    }
    #[inline(always)]
    unsafe fn lanes<S: Simd>(s: S, p: *const i8) -> S::V {
        // SAFETY: as the caller promises.
        unsafe { s.load_i8(p) }
    }
}
