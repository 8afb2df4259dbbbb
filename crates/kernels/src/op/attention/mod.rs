//! Causal attention over pages, streaming: an online softmax over tiles of 128 absolute positions, never a whole score
//! matrix.
//!
//! Segments of 512 absolute positions are softened apart and then added up in order, so that one long query can be
//! shared between threads. A query's segments, tiles, its bounds in them and every order of summation follow from its
//! own position: its result is the same bits in any company, alone, in a chunk of any size, with any number of threads.

mod ops;

use std::sync::Arc;

use lacuna_base::{MatMut, MatRef};

use crate::kv::{Data, KEY_BLOCK, KvLayout, KvPage, KvView};
use crate::simd::dispatch;
use crate::{Isa, parallel, scratch};
use ops::{Element, Finish, Merge, Mix, Scores, Soften, Tile, Widen};

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
/// As many as one row has for one key head, mostly.
const FEW: usize = 8;
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
    /// The outputs of one sequence's rows: `q` and `out` are `[rows, heads * head_dim]`, `positions` the rows'
    /// positions, whose keys (and all before) are in `kv`. Panics where shapes do not fit or a position is not written.
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
                parallel::ranges(tasks * n, 1, usize::MAX, cost / n, |from, to| {
                    for i in from..to {
                        let (task, segment) = (task(i / n), segments.start + i % n);
                        let into = parts.after(i % n * stride);
                        scratch::with(task.room(), |buffer| {
                            Run { isa, task, segments: segment..segment + 1, into: Sink::Partial(into), buffer }.run();
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
                let (task, segments, into) = (task(i), segments.clone(), Sink::Out(at));
                scratch::with(task.room(), |buffer| Run { isa, task, segments, into, buffer }.run());
            }
        });
    }

    /// As [`Attention::run`] for nodes of a tree that continues a text of `base` tokens, such as drafts to be verified:
    /// the key of node `i` lies at position `base + i` of `kv`, and row `r` of `q` sees the text and the nodes
    /// `paths[r]`, the tree's root first, itself last. The same bits as if the text had gone on with that path alone.
    #[track_caller]
    pub fn run_tree(&self, q: MatRef<'_>, base: usize, paths: &[&[usize]], kv: &KvView<'_>, out: MatMut<'_>) {
        self.run_tree_on(Isa::best(), q, base, paths, kv, out);
    }

    #[track_caller]
    fn run_tree_on(
        &self,
        isa: Isa,
        q: MatRef<'_>,
        base: usize,
        paths: &[&[usize]],
        kv: &KvView<'_>,
        mut out: MatMut<'_>,
    ) {
        assert_eq!(q.rows(), paths.len(), "a path for each row");
        for (r, path) in paths.iter().enumerate() {
            assert!(path.iter().all(|node| base + node < kv.tokens), "path {path:?} after {base} of {}", kv.tokens);
            let Some(last) = (base + path.len()).checked_sub(1) else { panic!("row {r} sees nothing") };
            // The page that the text ends in, and what follows, as if only the path had been written.
            let layout = kv.pages[0].layout();
            let (whole, n) = (base / layout.page_tokens, layout.page_tokens);
            let mut pages: Vec<Arc<KvPage>> = kv.pages[..whole].to_vec();
            let mut tail: Vec<KvPage> = (whole..last / n + 1).map(|_| kv.pages[0].empty()).collect();
            let text = (whole * n..base).map(|p| (p, p));
            for (to, from) in text.chain(path.iter().enumerate().map(|(i, node)| (base + i, base + node))) {
                tail[to / n - whole].copy(to % n, &kv.pages[from / n], from % n);
            }
            pages.extend(tail.into_iter().map(Arc::new));
            let view = KvView { pages: &pages, tokens: last + 1 };
            let width = q.cols();
            let row = MatMut::new(1, width, out.row_mut(r));
            self.run_on(isa, q.rows_range(r, r + 1), &[last], &view, row);
        }
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
enum Sink {
    /// Finished, to the rows of the output.
    Out(Shared),
    /// Largest score, sum and sums of the only segment, for each row and head.
    Partial(Shared),
}

/// Some segments of a task.
///
/// What follows says which queries meet which keys and in which order; the arithmetic is in operations of their own,
/// each compiled apart for every instruction set: inlined into one function they would take minutes to compile.
struct Run<'a> {
    isa: Isa,
    task: Task<'a>,
    segments: std::ops::Range<usize>,
    into: Sink,
    buffer: &'a mut [f32],
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
        // Those of one row are all that a decoding step has: to prepare more would take a good part of its time.
        let (mut few, mut all);
        let states = if count <= FEW {
            few = [State::NONE; FEW];
            &mut few[..count]
        } else {
            all = [State::NONE; QUERIES];
            &mut all[..count]
        };
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
            // SAFETY: the states point into this buffer and into q; run_on checked that the pages hold every visible
            // position.
            unsafe { task.segment(isa, states, segment, weights.as_mut_ptr(), wide) };
            if let Sink::Out(_) = into {
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
                    Sink::Out(out) => {
                        dispatch(
                            isa,
                            Finish { total: state.total, sum: state.total_sum, out: out.at(r, h * dim), dim },
                        );
                    }
                    Sink::Partial(parts) => {
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

/// Adds up a query's partial results, segment by segment, as [`Run`] does; the first one's place holds the totals.
/// # Safety
/// Segments lie `stride` values apart; all from the first to the last of `segments` have `layout`'s sums; `out` has
/// room for a head.
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
    /// States are as [`Run`] makes them; `weights` has room for [`SIDE`] tiles, `wide` for a widened one where the task
    /// widens.
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
        let mut tile =
            Tile { keys: [none; SUBS], values: [none; SUBS], scales: None, next: [[std::ptr::null(); SUBS]; 2] };
        for i in subs.0..subs.1 {
            let at = start + i * KEY_BLOCK;
            let (page, slot) = (&self.kv.pages[at / l.page_tokens], at % l.page_tokens);
            let row = self.head * l.page_tokens + slot;
            let (k, v, scales) = parts(&page.data);
            // SAFETY: as the caller promises.
            unsafe {
                (tile.keys[i], tile.values[i]) = (k.add(row * l.head_dim), v.add(row * l.padded()));
                let mut next = (tile.keys[i], tile.values[i]);
                let later = at + TILE;
                if later < self.kv.tokens {
                    let (page, slot) = (&self.kv.pages[later / l.page_tokens], later % l.page_tokens);
                    let (row, (k, v, _)) = (self.head * l.page_tokens + slot, parts(&page.data));
                    next = (k.add(row * l.head_dim), v.add(row * l.padded()));
                }
                (tile.next[0][i], tile.next[1][i]) = (next.0.cast(), next.1.cast());
                if let Some([ks, vs]) = scales {
                    let all = tile.scales.get_or_insert([[std::ptr::null(); SUBS]; 2]);
                    (all[0][i], all[1][i]) = (ks.add(row), vs.add(row));
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
        let mut out = Tile { keys: [none; SUBS], values: [none; SUBS], scales: tile.scales, next: tile.next };
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
                    6.. if isa.lanes() == 8 => {
                        self.side::<E, 6>(isa, &mut states[i..i + 6], start, subs, tile, weights)
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
        dispatch(isa, Scores { q, keys: tile.keys, next: tile.next[0], subs, dim, weights });
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

#[cfg(test)]
mod tests;
