//! How a call's work is cut: by sequence, then into jobs; and how what segments gave is put together.

use std::cell::RefCell;
use std::ops::Range;

use super::ops::{Finish, Merge};
use super::{Attention, PARTIAL, SEGMENT, Shared};
use crate::Isa;
use crate::kv::{KvLayout, KvView};
use crate::simd::dispatch;

/// One sequence's part of a call: which rows are its, and how the work on them is cut.
pub(super) struct Part<'a> {
    pub(super) rows: Range<usize>,
    pub(super) kv: KvView<'a>,
    /// Segments that any of the rows sees.
    pub(super) segments: Range<usize>,
    /// Tasks for all of its segments.
    pub(super) tasks: usize,
    /// Where its partial results begin, where each segment is a job of its own.
    pub(super) split: Option<usize>,
    /// The number of its first job.
    pub(super) first: usize,
}

impl Part<'_> {
    pub(super) fn jobs(&self) -> usize {
        if self.split.is_some() { self.tasks * self.segments.len() } else { self.tasks }
    }
}

thread_local! {
    /// Memory of parts that nobody uses: a step allocates nothing.
    static FREE: RefCell<Vec<Part<'static>>> = const { RefCell::new(Vec::new()) };
}

/// No parts yet.
pub(super) fn empty<'a>() -> Vec<Part<'a>> {
    FREE.take()
}

/// Keeps the memory of parts for the next call.
pub(super) fn give_back(mut parts: Vec<Part<'_>>) {
    parts.clear();
    // The same memory for parts of any lifetime: there are none in it.
    FREE.set(parts.into_iter().map(|_| -> Part<'static> { unreachable!("cleared") }).collect());
}

/// The sum of a query's weights relative to its largest score, with that of a sink.
pub(super) fn with_sink(sink: Option<f32>, (top, sum): (f32, f32)) -> f32 {
    // Far above all scores it becomes infinite, and what is divided by it nothing, as it should.
    sink.map_or(sum, |s| sum + (s - top).exp())
}

impl Attention {
    /// The logit that stands beside the keys of head `h`.
    pub(crate) fn sink(&self, h: usize) -> Option<f32> {
        self.sinks.as_ref().map(|s| s[h])
    }

    /// The parts of a call.
    #[track_caller]
    pub(super) fn cut<'a>(
        &self,
        positions: &[usize],
        sequences: impl IntoIterator<Item = (Range<usize>, KvView<'a>)>,
        parts: &mut Vec<Part<'a>>,
    ) {
        let mut end = 0;
        for (rows, kv) in sequences {
            assert_eq!(rows.start, end, "sequences that follow each other");
            end = rows.end;
            let (layout, format) = (kv.pool.layout(), kv.pool.format());
            let alike = |p: &Part<'_>| p.kv.pool.layout() == layout && p.kv.pool.format() == format;
            assert!(parts.first().is_none_or(alike), "pages of one layout");
            let mine = &positions[rows.clone()];
            let (Some(low), Some(last)) = (mine.iter().map(|&p| self.low(p)).min(), mine.iter().max()) else {
                continue;
            };
            assert!(
                *last < kv.tokens && kv.tokens <= kv.blocks.len() * layout.page_tokens,
                "position {last} of {}",
                kv.tokens
            );
            let segments = low / SEGMENT..last / SEGMENT + 1;
            parts.push(Part { rows, kv, segments, tasks: 0, split: None, first: 0 });
        }
        assert_eq!(end, positions.len(), "every row is of a sequence");
    }
}

/// Adds up a query's partial results, segment by segment, as [`super::State::settle`] does; the first one's place holds the
/// totals.
/// # Safety
/// Segments lie `stride` values apart; all of `segments`, at least one, have `layout`'s sums; `out` has room for a head.
pub(super) unsafe fn gather(
    isa: Isa,
    partial: Shared,
    stride: usize,
    mut segments: impl Iterator<Item = usize>,
    out: *mut f32,
    (layout, sink): (KvLayout, Option<f32>),
) {
    let at = |segment: usize| partial.after(segment * stride).0;
    // SAFETY: as the caller promises.
    unsafe {
        let first = at(segments.next().expect("a query reads its own key block"));
        let (mut top, mut sum) = (*first, *first.add(1));
        let total = first.add(PARTIAL);
        for segment in segments {
            let seen = at(segment);
            let both = [(top, sum), (*seen, *seen.add(1))];
            (top, sum) = dispatch(isa, Merge { both, total, seen: seen.add(PARTIAL), padded: layout.padded() });
        }
        dispatch(isa, Finish { total, sum: with_sink(sink, (top, sum)), out, dim: layout.head_dim });
    }
}
