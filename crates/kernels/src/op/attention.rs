//! Causal attention over pages, streaming: an online softmax over tiles of 128 absolute positions, never a whole score matrix.
//!
//! Segments of 512 absolute positions are softened apart and then added up in order, so that one long query can be shared between threads. A
//! query's segments, tiles, its bounds in them and every order of summation follow from its own position: its result is the same bits in any
//! company, alone, in a chunk of any size, with any number of threads.

use half::f16;
use lacuna_base::{MatMut, MatRef};

use super::math;
use crate::kv::{Data, KEY_BLOCK, KvLayout, KvView};
use crate::panel::fetch;
use crate::simd::{Op, Simd, dispatch};
use crate::{Isa, parallel, scratch};

/// What attention does with scores.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    /// Query heads; a multiple of the layout's key heads.
    pub heads: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// A query at `p` sees keys `p - window + 1 ..= p`; `None`: all earlier ones.
    pub window: Option<usize>,
    /// `c * tanh(scores / c)`.
    pub softcap: Option<f32>,
}

/// Queries a task handles together for one key head, at most.
const QUERIES: usize = 96;
/// Positions softened together.
const TILE: usize = 128;
/// Key blocks of a tile.
const SUBS: usize = TILE / KEY_BLOCK;
/// Positions of a segment.
const SEGMENT: usize = 4 * TILE;
/// Queries whose scores are computed side by side, at most.
const SIDE: usize = 8;
/// From how many queries on a tile's keys and values are widened to f32 once, for all of them.
const WIDEN: usize = 16;

impl Attention {
    /// The outputs of one sequence's rows: `q` and `out` are `[rows, heads * head_dim]`, `positions` the rows' positions, whose keys
    /// (and all before) are in `kv`. Panics where shapes do not fit or a position is not written.
    #[track_caller]
    pub fn run(&self, q: MatRef<'_>, positions: &[usize], kv: &KvView<'_>, out: MatMut<'_>) {
        self.run_on(Isa::best(), q, positions, kv, out);
    }

    #[track_caller]
    fn run_on(&self, isa: Isa, q: MatRef<'_>, positions: &[usize], kv: &KvView<'_>, mut out: MatMut<'_>) {
        assert_eq!((q.rows(), q.cols()), (out.rows(), out.cols()), "two shapes");
        assert_eq!(q.rows(), positions.len(), "a position for each row");
        let Some(last) = positions.iter().max() else { return };
        let layout = kv.pages.first().expect("a sequence with queries has a page").layout();
        assert!(kv.pages.iter().all(|p| p.layout() == layout), "pages of one layout");
        assert!(
            *last < kv.tokens && kv.tokens <= kv.pages.len() * layout.page_tokens,
            "position {last} of {}",
            kv.tokens
        );
        assert_eq!(q.cols(), self.heads * layout.head_dim, "query heads of another width");
        assert!(self.heads.is_multiple_of(layout.kv_heads), "{} heads over {}", self.heads, layout.kv_heads);
        let group = self.heads / layout.kv_heads;
        let side = group.min(QUERIES);
        let rows = QUERIES / side;
        let (parts, chunks) = (group.div_ceil(side), q.rows().div_ceil(rows));
        let low = positions.iter().map(|&p| self.low(p)).min().unwrap_or(0);
        let segments = low / SEGMENT..last / SEGMENT + 1;
        let at = Shared(out.raw_mut().as_mut_ptr(), out.stride());
        let tasks = layout.kv_heads * parts * chunks;
        let task = |i: usize| {
            let (i, chunk) = (i / chunks, i % chunks);
            let (head, part) = (i / parts, i % parts);
            let first = head * group + part * side;
            let heads = (first, (first + side).min((head + 1) * group));
            Task {
                p: self,
                q,
                positions,
                kv,
                layout,
                head,
                heads,
                rows: (chunk * rows, ((chunk + 1) * rows).min(q.rows())),
            }
        };
        let mean = kv.tokens.min(self.window.unwrap_or(usize::MAX));
        let cost = 2 * rows.min(q.rows()) * side * layout.head_dim * mean;
        // One query of a long text is little to share but its segments.
        if segments.len() > 1 && tasks < 4 * parallel::threads() {
            let width = layout.padded() + PARTIAL;
            let stride = q.rows() * self.heads * width;
            return scratch::with(segments.len() * stride, |partial| {
                let parts = Shared(partial.as_mut_ptr(), width);
                let n = segments.len();
                parallel::ranges(tasks * n, 1, 1, cost / n, |from, to| {
                    for i in from..to {
                        let (task, segment) = (task(i / n), segments.start + i % n);
                        let into = parts.after(i % n * stride);
                        scratch::with(task.room(), |buffer| {
                            Run { isa, task, segments: segment..segment + 1, into: Into::Partial(into), buffer }.run();
                        });
                    }
                });
                let low = |r: usize| self.low(positions[r]) / SEGMENT - segments.start;
                let high = |r: usize| positions[r] / SEGMENT - segments.start;
                for r in 0..q.rows() {
                    for h in 0..self.heads {
                        let partial = parts.after((r * self.heads + h) * width);
                        let segments = (low(r), high(r));
                        // SAFETY: the tasks above wrote all segments that the query sees.
                        unsafe { gather(isa, partial, stride, segments, at.at(r, h * layout.head_dim), layout) };
                    }
                }
            });
        }
        parallel::ranges(tasks, 1, 1, cost, |from, to| {
            for i in from..to {
                let (task, segments, into) = (task(i), segments.clone(), Into::Out(at));
                scratch::with(task.room(), |buffer| Run { isa, task, segments, into, buffer }.run());
            }
        });
    }

    /// The first position that a query at `p` sees.
    fn low(&self, p: usize) -> usize {
        self.window.map_or(0, |w| (p + 1).saturating_sub(w))
    }
}

/// Numbers of a segment's partial result before its sums: the largest score, and the sum of the weights.
const PARTIAL: usize = 16;

/// Memory that tasks write disjoint parts of, and the distance of its rows.
#[derive(Clone, Copy)]
struct Shared(*mut f32, usize);
// SAFETY: tasks write disjoint (row, head) pairs.
unsafe impl Sync for Shared {}
// SAFETY: see above.
unsafe impl Send for Shared {}

impl Shared {
    fn after(self, n: usize) -> Shared {
        Shared(self.0.wrapping_add(n), self.1)
    }
    fn at(self, r: usize, c: usize) -> *mut f32 {
        self.0.wrapping_add(r * self.1 + c)
    }
}

/// One key head and the queries of some rows that share it.
#[derive(Clone, Copy)]
struct Task<'a> {
    p: &'a Attention,
    q: MatRef<'a>,
    positions: &'a [usize],
    kv: &'a KvView<'a>,
    layout: KvLayout,
    /// The key head.
    head: usize,
    /// Its query heads, from and to.
    heads: (usize, usize),
    /// Rows from and to.
    rows: (usize, usize),
}

impl Task<'_> {
    fn count(&self) -> usize {
        (self.rows.1 - self.rows.0) * (self.heads.1 - self.heads.0)
    }

    fn widens(&self) -> bool {
        self.count() >= WIDEN && !matches!(self.kv.pages[0].data, Data::F32(..))
    }

    /// Scratch for [`Run`]: every query's sums twice, weights of a tile for those side by side, a widened tile.
    fn room(&self) -> usize {
        let l = self.layout;
        let wide = if self.widens() { TILE * (l.head_dim + l.padded()) } else { 0 };
        2 * self.count() * l.padded() + SIDE * TILE + wide
    }
}

/// Where a task's results go.
#[derive(Clone, Copy)]
enum Into {
    /// Finished, to the rows of the output.
    Out(Shared),
    /// Largest score, sum and sums of the only segment, for each row and head.
    Partial(Shared),
}

/// Some segments of a task.
///
/// What follows says which queries meet which keys and in which order; the arithmetic is in operations of their own, each compiled apart for
/// every instruction set: inlined into one function they would take minutes to compile.
struct Run<'a> {
    isa: Isa,
    task: Task<'a>,
    segments: std::ops::Range<usize>,
    into: Into,
    buffer: &'a mut [f32],
}

/// A cached element.
trait Element: Copy + Send + Sync {
    /// # Safety
    /// `p` is readable for LANES elements.
    unsafe fn lanes<S: Simd>(s: S, p: *const Self) -> S::V;
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn lanes<S: Simd>(s: S, p: *const f32) -> S::V {
        // SAFETY: as the caller promises.
        unsafe { s.load(p) }
    }
}

impl Element for f16 {
    #[inline(always)]
    unsafe fn lanes<S: Simd>(s: S, p: *const f16) -> S::V {
        // SAFETY: as the caller promises.
        unsafe { s.load_f16(p.cast()) }
    }
}

impl Element for i8 {
    #[inline(always)]
    unsafe fn lanes<S: Simd>(s: S, p: *const i8) -> S::V {
        // SAFETY: as the caller promises.
        unsafe { s.load_i8(p) }
    }
}

/// A tile where it lies, key block by key block; those that nobody sees are dangling.
#[derive(Clone, Copy)]
struct Tile<E> {
    keys: [*const E; SUBS],
    values: [*const E; SUBS],
    /// Factors of every position's keys and values, where the cache has them.
    scales: Option<[[*const f32; SUBS]; 2]>,
    /// Keys of the tile after it, null where there are none.
    next: [*const u8; SUBS],
}

/// What a query carries from tile to tile.
#[derive(Clone, Copy)]
struct State {
    q: *const f32,
    /// Sums of this segment, and of those before.
    acc: *mut f32,
    total: *mut f32,
    /// First and last visible position.
    low: usize,
    high: usize,
    top: f32,
    sum: f32,
    total_top: f32,
    total_sum: f32,
    /// Whether `total` holds anything.
    begun: bool,
}

impl State {
    const NONE: State = State {
        q: std::ptr::null(),
        acc: std::ptr::null_mut(),
        total: std::ptr::null_mut(),
        low: 0,
        high: 0,
        top: f32::NEG_INFINITY,
        sum: 0.0,
        total_top: f32::NEG_INFINITY,
        total_sum: 0.0,
        begun: false,
    };

    /// The visible part of the tile that starts at `start`, counted within it; empty where it sees nothing.
    #[inline(always)]
    fn bounds(&self, start: usize) -> (usize, usize) {
        let end = (self.high + 1).saturating_sub(start).min(TILE);
        (self.low.saturating_sub(start).min(end), end)
    }

    /// The key blocks of that part, from and to.
    #[inline(always)]
    fn blocks(&self, start: usize) -> (usize, usize) {
        let (lo, hi) = self.bounds(start);
        if lo == hi { (0, 0) } else { (lo / KEY_BLOCK, hi.div_ceil(KEY_BLOCK)) }
    }
}

impl Run<'_> {
    fn run(self) {
        let Run { isa, task, segments, into, buffer } = self;
        let (dim, padded, count) = (task.layout.head_dim, task.layout.padded(), task.count());
        let (sums, rest) = buffer.split_at_mut(2 * count * padded);
        let (weights, wide) = rest.split_at_mut(SIDE * TILE);
        let mut all = [State::NONE; QUERIES];
        let states = &mut all[..count];
        let heads = task.heads.1 - task.heads.0;
        for (i, state) in states.iter_mut().enumerate() {
            let (r, h) = (task.rows.0 + i / heads, task.heads.0 + i % heads);
            state.q = task.q.row(r)[h * dim..(h + 1) * dim].as_ptr();
            state.acc = sums[2 * i * padded..].as_mut_ptr();
            state.total = sums[(2 * i + 1) * padded..].as_mut_ptr();
            state.high = task.positions[r];
            state.low = task.p.low(state.high);
        }
        for segment in segments {
            // SAFETY: the states point into this buffer and into q; run_on checked that the pages hold every visible position.
            unsafe { task.segment(isa, states, segment, weights.as_mut_ptr(), wide) };
            if let Into::Out(_) = into {
                for state in states.iter_mut().filter(|q| saw(q, segment)) {
                    // SAFETY: as above.
                    unsafe { state.settle(isa, padded) };
                }
            }
        }
        for (i, state) in states.iter().enumerate() {
            let (r, h) = (task.rows.0 + i / heads, task.heads.0 + i % heads);
            // SAFETY: as above; run_on made room for these rows and heads.
            unsafe {
                match into {
                    Into::Out(out) => {
                        dispatch(
                            isa,
                            Finish { total: state.total, sum: state.total_sum, out: out.at(r, h * dim), dim },
                        );
                    }
                    Into::Partial(parts) => {
                        let at = parts.0.add((r * task.p.heads + h) * parts.1);
                        *at = state.top;
                        *at.add(1) = state.sum;
                        std::ptr::copy_nonoverlapping(state.acc, at.add(PARTIAL), padded);
                    }
                }
            }
        }
    }
}

/// Whether a query sees any of a segment.
#[inline(always)]
fn saw(state: &State, segment: usize) -> bool {
    state.low / SEGMENT <= segment && segment <= state.high / SEGMENT
}

impl State {
    /// Brings this segment's largest score, sum and sums to those of the segments before.
    /// # Safety
    /// `acc` and `total` have `padded` values.
    unsafe fn settle(&mut self, isa: Isa, padded: usize) {
        if self.begun {
            let both = [(self.total_top, self.total_sum), (self.top, self.sum)];
            let merge = Merge { both, total: self.total, seen: self.acc, padded };
            (self.total_top, self.total_sum) = dispatch(isa, merge);
        } else {
            (self.total_top, self.total_sum, self.begun) = (self.top, self.sum, true);
            // SAFETY: as the caller promises.
            unsafe { std::ptr::copy_nonoverlapping(self.acc, self.total, padded) };
        }
    }
}

/// Adds a segment to those before; gives their largest score and sum.
struct Merge {
    /// Largest score and sum of those before, and of this one.
    both: [(f32, f32); 2],
    total: *mut f32,
    seen: *const f32,
    padded: usize,
}

impl Op for Merge {
    type Out = (f32, f32);
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> (f32, f32) {
        let [(top, sum), (seen_top, seen_sum)] = self.both;
        let most = if seen_top > top { seen_top } else { top };
        let before = lane(s, math::exp(s, s.splat(top - most)));
        let now = lane(s, math::exp(s, s.splat(seen_top - most)));
        let mut d = 0;
        while d < self.padded {
            // SAFETY: the maker has as many values in both.
            unsafe {
                let v = s.mul(s.load(self.total.add(d)), s.splat(before));
                s.store(self.total.add(d), s.fma(s.load(self.seen.add(d)), s.splat(now), v));
            }
            d += S::LANES;
        }
        (most, sum * before + seen_sum * now)
    }
}

/// Sums over their sum, to the output.
struct Finish {
    total: *const f32,
    sum: f32,
    out: *mut f32,
    dim: usize,
}

impl Op for Finish {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut d = 0;
        while d < self.dim {
            // SAFETY: the maker has room for `dim` values, and as many sums, padded.
            unsafe {
                let v = s.div(s.load(self.total.add(d)), s.splat(self.sum));
                if d + S::LANES <= self.dim {
                    s.store(self.out.add(d), v);
                } else {
                    let mut rest = [0.0f32; 16];
                    s.store(rest.as_mut_ptr(), v);
                    std::ptr::copy_nonoverlapping(rest.as_ptr(), self.out.add(d), self.dim - d);
                }
            }
            d += S::LANES;
        }
    }
}

/// One lane of a vector whose lanes are equal.
#[inline(always)]
fn lane<S: Simd>(s: S, v: S::V) -> f32 {
    let mut all = [0.0f32; 16];
    // SAFETY: 16 lanes at most.
    unsafe { s.store(all.as_mut_ptr(), v) };
    all[0]
}

/// Adds up a query's partial results, segment by segment, as [`Run`] does; the first one's place holds the totals.
/// # Safety
/// Segments lie `stride` values apart; all from the first to the last of `segments` have `layout`'s sums; `out` has room for a head.
unsafe fn gather(isa: Isa, partial: Shared, stride: usize, segments: (usize, usize), out: *mut f32, layout: KvLayout) {
    let at = |segment: usize| partial.after(segment * stride).0;
    // SAFETY: as the caller promises.
    unsafe {
        let first = at(segments.0);
        let (mut top, mut sum) = (*first, *first.add(1));
        let total = first.add(PARTIAL);
        for segment in segments.0 + 1..=segments.1 {
            let seen = at(segment);
            let both = [(top, sum), (*seen, *seen.add(1))];
            (top, sum) = dispatch(isa, Merge { both, total, seen: seen.add(PARTIAL), padded: layout.padded() });
        }
        dispatch(isa, Finish { total, sum, out, dim: layout.head_dim });
    }
}

impl Task<'_> {
    /// One segment against every query that sees some of it, from fresh sums.
    /// # Safety
    /// States are as [`Run`] makes them; `weights` has room for [`SIDE`] tiles, `wide` for a widened one where the task widens.
    #[inline(always)]
    unsafe fn segment(&self, isa: Isa, states: &mut [State], segment: usize, weights: *mut f32, wide: &mut [f32]) {
        let padded = self.layout.padded();
        let (mut low, mut high) = (usize::MAX, 0);
        for state in states.iter_mut() {
            (state.top, state.sum) = (f32::NEG_INFINITY, 0.0);
            // SAFETY: as the caller promises.
            unsafe { std::slice::from_raw_parts_mut(state.acc, padded) }.fill(0.0);
            low = low.min(state.low);
            high = high.max(state.high);
        }
        let from = (low / TILE).max(segment * SEGMENT / TILE);
        let to = (high / TILE + 1).min((segment + 1) * SEGMENT / TILE);
        for t in from..to {
            let start = t * TILE;
            let subs = (low.saturating_sub(start) / KEY_BLOCK, (high + 1 - start).div_ceil(KEY_BLOCK).min(SUBS));
            // SAFETY: as the caller promises; the visible key blocks lie inside the pages.
            unsafe {
                match &self.kv.pages[0].data {
                    Data::F32(..) => {
                        let tile = self.tile(start, subs, |d| match d {
                            Data::F32(k, v) => (k.as_ptr(), v.as_ptr(), None),
                            _ => unreachable!("pages of one format"),
                        });
                        self.queries(isa, states, start, &tile, weights);
                    }
                    Data::F16(..) => {
                        let tile = self.tile(start, subs, |d| match d {
                            Data::F16(k, v) => (k.as_ptr(), v.as_ptr(), None),
                            _ => unreachable!("pages of one format"),
                        });
                        self.narrow(isa, states, start, subs, &tile, weights, wide);
                    }
                    Data::Q8 { .. } => {
                        let tile = self.tile(start, subs, |d| match d {
                            Data::Q8 { k, v, k_scales, v_scales } => {
                                (k.as_ptr(), v.as_ptr(), Some([k_scales.as_ptr(), v_scales.as_ptr()]))
                            }
                            _ => unreachable!("pages of one format"),
                        });
                        self.narrow(isa, states, start, subs, &tile, weights, wide);
                    }
                }
            }
        }
    }

    /// As [`Task::queries`], on a tile widened first where many queries will read it.
    /// # Safety
    /// As for [`Task::segment`]; `tile` has key blocks `subs`.
    #[expect(clippy::too_many_arguments, reason = "what a tile is met by, and where it goes")]
    unsafe fn narrow<E: Element>(
        &self,
        isa: Isa,
        states: &mut [State],
        start: usize,
        subs: (usize, usize),
        tile: &Tile<E>,
        weights: *mut f32,
        wide: &mut [f32],
    ) {
        // SAFETY: as the caller promises.
        unsafe {
            if self.widens() {
                let tile = self.widened(isa, subs, tile, wide);
                self.queries(isa, states, start, &tile, weights);
            } else {
                self.queries(isa, states, start, tile, weights);
            }
        }
    }

    /// Where key blocks `subs` of the tile at `start` lie, `parts` telling a page's keys, values and their factors.
    /// # Safety
    /// They are inside the pages.
    unsafe fn tile<E>(
        &self,
        start: usize,
        subs: (usize, usize),
        parts: impl Fn(&Data) -> (*const E, *const E, Option<[*const f32; 2]>),
    ) -> Tile<E> {
        let l = self.layout;
        let none = std::ptr::null();
        let mut tile = Tile { keys: [none; SUBS], values: [none; SUBS], scales: None, next: [std::ptr::null(); SUBS] };
        for i in subs.0..subs.1 {
            let at = start + i * KEY_BLOCK;
            let (page, slot) = (&self.kv.pages[at / l.page_tokens], at % l.page_tokens);
            let row = self.head * l.page_tokens + slot;
            let (k, v, scales) = parts(&page.data);
            // SAFETY: as the caller promises.
            unsafe {
                tile.keys[i] = k.add(row * l.head_dim);
                tile.values[i] = v.add(row * l.padded());
                let later = at + TILE;
                if later < self.kv.tokens {
                    let (page, slot) = (&self.kv.pages[later / l.page_tokens], later % l.page_tokens);
                    tile.next[i] = parts(&page.data).0.add((self.head * l.page_tokens + slot) * l.head_dim).cast();
                }
                if let Some([ks, vs]) = scales {
                    let all = tile.scales.get_or_insert([[std::ptr::null(); SUBS]; 2]);
                    all[0][i] = ks.add(row);
                    all[1][i] = vs.add(row);
                }
            }
        }
        tile
    }

    /// The tile in f32: exactly the same values.
    /// # Safety
    /// `tile` has key blocks `subs`.
    unsafe fn widened<E: Element>(
        &self,
        isa: Isa,
        subs: (usize, usize),
        tile: &Tile<E>,
        wide: &mut [f32],
    ) -> Tile<f32> {
        let (k, v) = (KEY_BLOCK * self.layout.head_dim, KEY_BLOCK * self.layout.padded());
        assert!(wide.len() >= SUBS * (k + v), "room for a tile");
        let none = std::ptr::null();
        let mut out =
            Tile { keys: [none; SUBS], values: [none; SUBS], scales: tile.scales, next: [std::ptr::null(); SUBS] };
        let mut at = wide.as_mut_ptr();
        for i in subs.0..subs.1 {
            (out.keys[i], out.values[i]) = (at, at.wrapping_add(k));
            dispatch(isa, Widen { from: tile.keys[i], to: at, n: k });
            dispatch(isa, Widen { from: tile.values[i], to: at.wrapping_add(k), n: v });
            at = at.wrapping_add(k + v);
        }
        out
    }

    /// One tile against every query that sees some of it.
    /// # Safety
    /// As for [`Task::segment`]; `tile` has the key blocks that they see.
    unsafe fn queries<E: Element>(
        &self,
        isa: Isa,
        states: &mut [State],
        start: usize,
        tile: &Tile<E>,
        weights: *mut f32,
    ) {
        let n = states.len();
        let mut i = 0;
        while i < n {
            let subs = states[i].blocks(start);
            let mut same = 1;
            while same < SIDE && i + same < n && states[i + same].blocks(start) == subs {
                same += 1;
            }
            if subs.0 == subs.1 {
                i += same;
                continue;
            }
            // SAFETY: as the caller promises.
            unsafe {
                i += match same {
                    SIDE if isa.lanes() == 16 => {
                        self.side::<E, SIDE>(isa, &mut states[i..i + SIDE], start, subs, tile, weights)
                    }
                    4.. => self.side::<E, 4>(isa, &mut states[i..i + 4], start, subs, tile, weights),
                    3 => self.side::<E, 3>(isa, &mut states[i..i + 3], start, subs, tile, weights),
                    _ => self.side::<E, 1>(isa, &mut states[i..i + 1], start, subs, tile, weights),
                };
            }
        }
    }

    /// One tile against `M` queries that see some of the same key blocks `subs`; gives `M`.
    /// # Safety
    /// As for [`Task::queries`].
    unsafe fn side<E: Element, const M: usize>(
        &self,
        isa: Isa,
        states: &mut [State],
        start: usize,
        subs: (usize, usize),
        tile: &Tile<E>,
        weights: *mut f32,
    ) -> usize {
        let (dim, padded) = (self.layout.head_dim, self.layout.padded());
        let mut q = [std::ptr::null(); M];
        let mut acc = [std::ptr::null_mut(); M];
        for (m, state) in states.iter().enumerate() {
            (q[m], acc[m]) = (state.q, state.acc);
        }
        dispatch(isa, Scores { q, keys: tile.keys, values: tile.values, subs, dim, weights });
        // Key blocks that all of the queries see whole.
        let mut whole = subs;
        for (m, state) in states.iter_mut().enumerate() {
            let (lo, hi) = state.bounds(start);
            let w = weights.wrapping_add(m * TILE);
            let (top, sum, acc) = (state.top, state.sum, state.acc);
            let soften = Soften { p: self.p, top, sum, acc, padded, bounds: (lo, hi), subs, scales: tile.scales, w };
            (state.top, state.sum) = dispatch(isa, soften);
            whole = (whole.0.max(lo.div_ceil(KEY_BLOCK)), whole.1.min(hi / KEY_BLOCK));
        }
        let mut i = subs.0;
        while i < subs.1 {
            if i == whole.0 && whole.1 > whole.0 {
                dispatch(isa, Mix { acc, tile: *tile, subs: whole, js: (0, KEY_BLOCK), padded, weights });
                i = whole.1;
                continue;
            }
            // Only what a query sees takes part: a weight of zero times whatever else lies there need not be zero.
            for (m, state) in states.iter().enumerate() {
                let (lo, hi) = state.bounds(start);
                let within = |at: usize| at.saturating_sub(i * KEY_BLOCK).min(KEY_BLOCK);
                let (js, weights) = ((within(lo), within(hi)), weights.wrapping_add(m * TILE));
                dispatch(isa, Mix { acc: [state.acc], tile: *tile, subs: (i, i + 1), js, padded, weights });
            }
            i += 1;
        }
        M
    }
}

/// Turns a query's raw scores of a tile into weights, brings its sums to the new largest score, and gives that and the sum of weights.
struct Soften<'a> {
    p: &'a Attention,
    top: f32,
    sum: f32,
    acc: *mut f32,
    padded: usize,
    /// What it sees of the tile.
    bounds: (usize, usize),
    /// The key blocks of that.
    subs: (usize, usize),
    scales: Option<[[*const f32; SUBS]; 2]>,
    /// Raw scores of those key blocks.
    w: *mut f32,
}

impl Op for Soften<'_> {
    type Out = (f32, f32);
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> (f32, f32) {
        let Soften { p, top: before, mut sum, acc, padded, bounds: (lo, hi), subs, scales, w } = self;
        let (from, to) = (subs.0 * KEY_BLOCK, subs.1 * KEY_BLOCK);
        // SAFETY: weights hold a tile, acc `padded` values.
        unsafe {
            let none = s.splat(f32::NEG_INFINITY);
            let mut top = none;
            let mut j = from;
            while j < to {
                let mut v = s.mul(s.load(w.add(j)), s.splat(p.scale));
                if let Some([keys, _]) = scales {
                    v = s.mul(v, s.load(keys[j / KEY_BLOCK].add(j % KEY_BLOCK)));
                }
                if let Some(c) = p.softcap {
                    v = s.mul(s.splat(c), math::tanh(s, s.div(v, s.splat(c))));
                }
                if j < lo || j + S::LANES > hi {
                    let at = s.load(COUNT.0.as_ptr().add(j));
                    v = s.select_lt(at, s.splat(lo as f32), none, v);
                    v = s.select_lt(at, s.splat(hi as f32), v, none);
                }
                // The second where one is NaN: a NaN never becomes the largest.
                top = s.max(v, top);
                s.store(w.add(j), v);
                j += S::LANES;
            }
            let top = s.top(top);
            let top = if top > before { top } else { before };
            let mut total = s.splat(0.0);
            let mut j = from;
            while j < to {
                let mut v = math::exp(s, s.sub(s.load(w.add(j)), s.splat(top)));
                total = s.add(total, v);
                if let Some([_, values]) = scales {
                    v = s.mul(v, s.load(values[j / KEY_BLOCK].add(j % KEY_BLOCK)));
                }
                s.store(w.add(j), v);
                j += S::LANES;
            }
            if top > before {
                // The first time both the sums and the factor are zero.
                let shrink = lane(s, math::exp(s, s.splat(before - top)));
                sum *= shrink;
                let mut d = 0;
                while d < padded {
                    s.store(acc.add(d), s.mul(s.load(acc.add(d)), s.splat(shrink)));
                    d += S::LANES;
                }
            }
            (top, sum + s.sum(total))
        }
    }
}

/// 0, 1, 2, ...
#[repr(align(64))]
struct Count([f32; TILE]);
static COUNT: Count = {
    let mut all = [0.0; TILE];
    let mut i = 0;
    while i < TILE {
        all[i] = i as f32;
        i += 1;
    }
    Count(all)
};

/// Writes `n` elements, a multiple of 16, as f32.
struct Widen<E> {
    from: *const E,
    to: *mut f32,
    n: usize,
}

impl<E: Element> Op for Widen<E> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut i = 0;
        while i < self.n {
            // SAFETY: the maker has as many in both.
            unsafe { s.store(self.to.add(i), E::lanes(s, self.from.add(i))) };
            i += S::LANES;
        }
    }
}

/// Raw scores of `M` queries against key blocks `subs`, those of query `m` to `weights[m * 128..]`.
struct Scores<E, const M: usize> {
    q: [*const f32; M],
    /// `[dim][32]` each.
    keys: [*const E; SUBS],
    /// What is needed next: asked for meanwhile.
    values: [*const E; SUBS],
    subs: (usize, usize),
    dim: usize,
    weights: *mut f32,
}

impl<E: Element, const M: usize> Op for Scores<E, M> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut i = self.subs.0;
        while i < self.subs.1 {
            let keys = self.keys[i];
            let values = self.values[i].cast::<u8>();
            let mut j = 0;
            while j < KEY_BLOCK {
                let mut acc = [[s.splat(0.0); 2]; M];
                let mut d = 0;
                // SAFETY: the maker has queries of `dim` values, these key blocks, and room for a tile of each query's weights.
                unsafe {
                    while d < self.dim {
                        if M <= 4 && size_of::<E>() < 4 && j == 0 {
                            fetch(values.wrapping_add(d * KEY_BLOCK * size_of::<E>()));
                        }
                        let k = keys.add(d * KEY_BLOCK + j);
                        let k = [E::lanes(s, k), E::lanes(s, k.add(S::LANES))];
                        let mut m = 0;
                        while m < M {
                            let q = s.splat(*self.q[m].add(d));
                            acc[m][0] = s.fma(q, k[0], acc[m][0]);
                            acc[m][1] = s.fma(q, k[1], acc[m][1]);
                            m += 1;
                        }
                        d += 1;
                    }
                    let mut m = 0;
                    while m < M {
                        let at = self.weights.add(m * TILE + i * KEY_BLOCK + j);
                        s.store(at, acc[m][0]);
                        s.store(at.add(S::LANES), acc[m][1]);
                        m += 1;
                    }
                }
                j += 2 * S::LANES;
            }
            i += 1;
        }
    }
}

/// Adds the weighted values of positions `js` of each of key blocks `subs` to `M` queries' sums.
struct Mix<E, const M: usize> {
    /// `padded` values each.
    acc: [*mut f32; M],
    tile: Tile<E>,
    subs: (usize, usize),
    js: (usize, usize),
    padded: usize,
    /// A tile for each query.
    weights: *const f32,
}

impl<E: Element, const M: usize> Op for Mix<E, M> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut d = 0;
        // `padded` is a multiple of 16 and so of LANES.
        while d < self.padded {
            if d + 2 * S::LANES <= self.padded {
                self.columns::<S, 2>(s, d);
                d += 2 * S::LANES;
            } else {
                self.columns::<S, 1>(s, d);
                d += S::LANES;
            }
        }
    }
}

impl<E: Element, const M: usize> Mix<E, M> {
    /// `C` vectors of columns from `d` on.
    #[inline(always)]
    fn columns<S: Simd, const C: usize>(&self, s: S, d: usize) {
        // SAFETY: the maker has sums and values of `padded` columns, these key blocks and their weights.
        unsafe {
            let mut acc = [[s.splat(0.0); C]; M];
            let mut m = 0;
            while m < M {
                let mut c = 0;
                while c < C {
                    acc[m][c] = s.load(self.acc[m].add(d + c * S::LANES));
                    c += 1;
                }
                m += 1;
            }
            let mut i = self.subs.0;
            while i < self.subs.1 {
                let (values, w) = (self.tile.values[i].add(d), self.weights.add(i * KEY_BLOCK));
                let mut j = self.js.0;
                while j < self.js.1 {
                    if M <= 4 && size_of::<E>() < 4 && !self.tile.next[i].is_null() {
                        // As many bytes as the columns at hand have: all of a key block in the end.
                        let bytes = C * S::LANES * size_of::<E>();
                        fetch(self.tile.next[i].wrapping_add((j * self.padded + d) * size_of::<E>() / bytes * bytes));
                    }
                    let mut v = [s.splat(0.0); C];
                    let mut c = 0;
                    while c < C {
                        v[c] = E::lanes(s, values.add(j * self.padded + c * S::LANES));
                        c += 1;
                    }
                    let mut m = 0;
                    while m < M {
                        let w = s.splat(*w.add(m * TILE + j));
                        let mut c = 0;
                        while c < C {
                            acc[m][c] = s.fma(w, v[c], acc[m][c]);
                            c += 1;
                        }
                        m += 1;
                    }
                    j += 1;
                }
                i += 1;
            }
            let mut m = 0;
            while m < M {
                let mut c = 0;
                while c < C {
                    s.store(self.acc[m].add(d + c * S::LANES), acc[m][c]);
                    c += 1;
                }
                m += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::kv::{KvFormat, KvPage};
    use lacuna_base::Mat;
    use lacuna_base::testkit::{max_abs_diff, random};

    fn pages(layout: KvLayout, format: KvFormat, k: &Mat, v: &Mat) -> Vec<Arc<KvPage>> {
        let mut pages: Vec<KvPage> =
            (0..k.rows().div_ceil(layout.page_tokens)).map(|_| KvPage::new(layout, format)).collect();
        for p in 0..k.rows() {
            pages[p / layout.page_tokens].write(p % layout.page_tokens, k.row(p), v.row(p));
        }
        pages.into_iter().map(Arc::new).collect()
    }

    fn reference(a: &Attention, kv_heads: usize, q: &Mat, positions: &[usize], k: &Mat, v: &Mat) -> Mat {
        let dim = k.cols() / kv_heads;
        let mut out = Mat::zeros(q.rows(), q.cols());
        for (r, &p) in positions.iter().enumerate() {
            for h in 0..a.heads {
                let g = h / (a.heads / kv_heads);
                let low = a.window.map_or(0, |w| (p + 1).saturating_sub(w));
                let scores: Vec<f64> = (low..=p)
                    .map(|t| {
                        let dot: f64 =
                            (0..dim).map(|d| f64::from(q[(r, h * dim + d)]) * f64::from(k[(t, g * dim + d)])).sum();
                        let x = dot * f64::from(a.scale);
                        a.softcap.map_or(x, |c| f64::from(c) * (x / f64::from(c)).tanh())
                    })
                    .collect();
                let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let total: f64 = scores.iter().map(|x| (x - top).exp()).sum();
                for d in 0..dim {
                    let y: f64 = scores
                        .iter()
                        .enumerate()
                        .map(|(i, x)| (x - top).exp() * f64::from(v[(low + i, g * dim + d)]))
                        .sum();
                    out[(r, h * dim + d)] = (y / total) as f32;
                }
            }
        }
        out
    }

    #[test]
    fn matches_f64_and_does_not_see_its_company() {
        for (heads, kv_heads, dim, tokens, window, softcap) in [
            (1, 1, 1, 1, None, None),
            (3, 1, 5, 40, None, None),
            (4, 2, 16, 100, Some(10), Some(3.0)),
            (9, 3, 64, 130, None, None),
            (2, 2, 80, 97, Some(33), None),
            (8, 1, 36, 70, None, Some(1.0)),
            (3, 1, 8, 1300, None, None),
            (100, 1, 4, 600, Some(520), None),
        ] {
            let a = Attention { heads, scale: 0.3, window, softcap };
            let layout = KvLayout { kv_heads, head_dim: dim, page_tokens: 64 };
            let (q, k, v) =
                (random(tokens, heads * dim, 1), random(tokens, kv_heads * dim, 2), random(tokens, kv_heads * dim, 3));
            let all: Vec<usize> = (0..tokens).collect();
            for format in [KvFormat::F32, KvFormat::F16, KvFormat::Q8] {
                let pages = pages(layout, format, &k, &v);
                let view = KvView { pages: &pages, tokens };
                // Exact attention over what the cache holds.
                let (mut held_k, mut held_v) = (k.clone(), v.clone());
                for p in 0..tokens {
                    pages[p / 64].read(p % 64, held_k.row_mut(p), held_v.row_mut(p));
                }
                let coarse = max_abs_diff(held_k.view(), k.view()).max(max_abs_diff(held_v.view(), v.view()));
                assert!(
                    coarse
                        <= match format {
                            KvFormat::F32 => 0.0,
                            KvFormat::F16 => 2e-3,
                            KvFormat::Q8 => 2e-2,
                        }
                );
                let want = reference(&a, kv_heads, &q, &all, &held_k, &held_v);
                for isa in Isa::here() {
                    let mut whole = Mat::zeros(tokens, heads * dim);
                    a.run_on(isa, q.view(), &all, &view, whole.view_mut());
                    let off = max_abs_diff(whole.view(), want.view());
                    assert!(off < 2e-5, "{isa} {format:?} {heads} {dim}: {off}");
                    for step in [1, 7, 33] {
                        // Of a long text only the end alone: it has every part that the rest has.
                        let mut from = if step == 1 { tokens.saturating_sub(40) } else { 0 };
                        while from < tokens {
                            let to = (from + step).min(tokens);
                            let mut part = Mat::zeros(to - from, heads * dim);
                            a.run_on(isa, q.view().rows_range(from, to), &all[from..to], &view, part.view_mut());
                            assert_eq!(
                                part.view().to_mat(),
                                whole.view().rows_range(from, to).to_mat(),
                                "{isa} step {step}"
                            );
                            from = to;
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn later_positions_cannot_leak() {
        let a = Attention { heads: 2, scale: 1.0, window: None, softcap: None };
        let layout = KvLayout { kv_heads: 1, head_dim: 16, page_tokens: 32 };
        let (q, k, v) = (random(20, 32, 1), random(20, 16, 2), random(20, 16, 3));
        let (mut k2, mut v2) = (k.clone(), v.clone());
        k2.row_mut(19).fill(f32::NAN);
        v2.row_mut(19).fill(f32::NAN);
        let run = |k: &Mat, v: &Mat| {
            let pages = pages(layout, KvFormat::F32, k, v);
            let mut out = Mat::zeros(20, 32);
            let view = KvView { pages: &pages, tokens: 20 };
            a.run(q.view(), &(0..20).collect::<Vec<_>>(), &view, out.view_mut());
            out
        };
        let (clean, dirty) = (run(&k, &v), run(&k2, &v2));
        assert_eq!(clean.view().rows_range(0, 19).to_mat(), dirty.view().rows_range(0, 19).to_mat());
        assert!(dirty.row(19).iter().all(|x| x.is_nan()));
    }

    #[test]
    fn pages_read_back() {
        let layout = KvLayout { kv_heads: 3, head_dim: 5, page_tokens: 64 };
        let (k, v) = (random(64, 15, 1), random(64, 15, 2));
        let pages = pages(layout, KvFormat::F32, &k, &v);
        let (mut a, mut b) = (vec![0.0; 15], vec![0.0; 15]);
        for p in 0..64 {
            pages[0].read(p, &mut a, &mut b);
            assert_eq!((&a[..], &b[..]), (k.row(p), v.row(p)));
        }
        assert_eq!(layout.page_bytes(KvFormat::F16), 2 * 3 * 64 * (5 + 16));
        assert_eq!(layout.page_bytes(KvFormat::Q8), 3 * 64 * (5 + 16 + 8));
        assert_eq!((layout.token_bytes(KvFormat::F16), layout.token_bytes(KvFormat::Q8)), (60, 54));
    }
}
