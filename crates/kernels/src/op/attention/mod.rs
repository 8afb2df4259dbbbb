//! Causal attention over pages, streaming: an online softmax over tiles of 128 absolute positions, never a whole score
//! matrix.
//!
//! Segments of 512 absolute positions are softened apart and then added up in order, so that one long query can be
//! shared between threads. A query's segments, tiles, its bounds in them and every order of summation follow from its
//! own position: its result is the same bits in any company, alone, in a chunk of any size, with any number of threads.
//! All sequences of a call are one region of threads.
//!
//! A query may read only some key blocks ([`Chosen`]): segments and tiles stay where they are, those of which it reads
//! nothing are passed by, and of a tile it meets what it reads, run by run of key blocks. Reading all is reading the
//! one run that there is: the same bits.

mod chosen;
mod cut;
mod element;
mod ops;

use std::ops::Range;
use std::sync::Arc;

use half::f16;
use lacuna_base::{MatMut, MatRef};

use crate::kv::{KEY_BLOCK, KvFormat, KvLayout, KvView};
use crate::simd::dispatch;
use crate::{Isa, parallel, scratch};
pub use chosen::Chosen;
use chosen::{Bits, runs};
use cut::{Part, gather, with_sink};
use element::{Element, Parts};
use ops::{Finish, Merge, Mix, Scores, Soften, Tile, Widen};

/// What attention does with scores.
#[derive(Clone, Debug, PartialEq)]
pub struct Attention {
    /// Query heads; a multiple of the layout's key heads.
    pub heads: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// A query at `p` sees keys `p - window + 1 ..= p`; `None`: all earlier ones.
    pub window: Option<usize>,
    /// A query at `p` sees keys `p / chunk * chunk ..= p` alone; `None`: nothing bounds it so.
    pub chunk: Option<usize>,
    /// `c * tanh(scores / c)`.
    pub softcap: Option<f32>,
    /// ALiBi, by the power of 2 that its slopes reach: see [`Attention::slope`].
    pub alibi: Option<f32>,
    /// A logit for each query head beside those of its keys, as they are after scaling and capping: it takes weight and
    /// gives nothing.
    pub sinks: Option<Arc<[f32]>>,
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
/// Values of partial results that a call may hold, at most: 64 MB. Beyond, segments are not shared between threads.
const PARTIALS: usize = 1 << 24;

impl Attention {
    /// The outputs of the rows of some sequences: `q` and `out` are `[rows, heads * head_dim]`, `positions` the rows'
    /// positions. `sequences` are those rows cut into sequences, in order, each with its keys and values: those of its
    /// positions and all before. Panics where shapes do not fit or a position is not written.
    #[track_caller]
    pub fn run<'a>(
        &self,
        q: MatRef<'_>,
        positions: &[usize],
        sequences: impl IntoIterator<Item = (Range<usize>, KvView<'a>)>,
        out: MatMut<'_>,
    ) {
        self.run_on(Isa::best(), q, positions, sequences, None, out);
    }

    /// The same, where each row reads only the key blocks that are chosen for it, of each key head. Panics also where
    /// they are those of other rows.
    #[track_caller]
    pub fn run_chosen<'a>(
        &self,
        q: MatRef<'_>,
        positions: &[usize],
        sequences: impl IntoIterator<Item = (Range<usize>, KvView<'a>)>,
        chosen: &Chosen,
        out: MatMut<'_>,
    ) {
        self.run_on(Isa::best(), q, positions, sequences, Some(chosen), out);
    }

    #[track_caller]
    fn run_on<'a>(
        &self,
        isa: Isa,
        q: MatRef<'_>,
        positions: &[usize],
        sequences: impl IntoIterator<Item = (Range<usize>, KvView<'a>)>,
        chosen: Option<&Chosen>,
        out: MatMut<'_>,
    ) {
        let mut parts = cut::empty();
        self.cut(positions, sequences, &mut parts);
        self.run_parts(isa, q, positions, &mut parts, chosen, out);
        cut::give_back(parts);
    }

    /// The same, where the sequences are known and their work is not cut yet.
    #[track_caller]
    fn run_parts(
        &self,
        isa: Isa,
        q: MatRef<'_>,
        positions: &[usize],
        parts: &mut [Part<'_>],
        chosen: Option<&Chosen>,
        mut out: MatMut<'_>,
    ) {
        assert_eq!((q.rows(), q.cols()), (out.rows(), out.cols()), "two shapes");
        assert_eq!(q.rows(), positions.len(), "a position for each row");
        let Some(first) = parts.first() else { return };
        let (layout, format) = (first.kv.pool.layout(), first.kv.pool.format());
        assert_eq!(q.cols(), self.heads * layout.head_dim, "query heads of another width");
        assert!(self.heads.is_multiple_of(layout.kv_heads), "{} heads over {}", self.heads, layout.kv_heads);
        assert!(self.sinks.as_ref().is_none_or(|s| s.len() == self.heads), "a sink for each of {} heads", self.heads);
        assert!(chosen.is_none_or(|c| c.count() == (q.rows(), layout.kv_heads)), "chosen blocks of every row and head");
        let group = self.heads / layout.kv_heads;
        let side = group.min(QUERIES);
        let rows = QUERIES / side;
        let sides = group.div_ceil(side);
        let mut tasks = 0;
        for part in parts.iter_mut() {
            part.tasks = layout.kv_heads * sides * part.rows.len().div_ceil(rows);
            tasks += part.tasks;
        }
        let width = layout.padded() + PARTIAL;
        // One query of a long text is little to share but its segments.
        let mut partials = 0;
        if tasks < 4 * parallel::threads() {
            for part in parts.iter_mut().filter(|p| p.segments.len() > 1) {
                let need = part.segments.len() * part.rows.len() * self.heads * width;
                if partials + need <= PARTIALS {
                    part.split = Some(partials);
                    partials += need;
                }
            }
        }
        let (mut jobs, mut cost) = (0, 0);
        for part in parts.iter_mut() {
            part.first = jobs;
            jobs += part.jobs();
            let mean = part.kv.tokens.min(self.window.or(self.chunk).unwrap_or(usize::MAX));
            cost += part.tasks * 2 * rows.min(part.rows.len()) * side * layout.head_dim * mean;
        }
        let parts = &*parts;
        let at = Shared(out.raw_mut().as_mut_ptr(), out.stride());
        scratch::with(partials, |partial| {
            let partial = Shared(partial.as_mut_ptr(), width);
            let job = |i: usize| {
                let part = &parts[parts.partition_point(|p| p.first <= i) - 1];
                let (i, n) = (i - part.first, part.segments.len());
                let (i, segments, sink) = match part.split {
                    None => (i, part.segments.clone(), Sink::Out(at)),
                    Some(begin) => {
                        let (segment, stride) = (i % n, part.rows.len() * self.heads * width);
                        let whole = part.segments.start + segment;
                        (i / n, whole..whole + 1, Sink::Partial(partial.after(begin + segment * stride)))
                    }
                };
                let chunks = part.rows.len().div_ceil(rows);
                let ((i, chunk), from) = ((i / chunks, i % chunks), part.rows.start);
                let (head, part_of_head) = (i / sides, i % sides);
                let first = head * group + part_of_head * side;
                let task = Task {
                    p: self,
                    q,
                    positions,
                    kv: &part.kv,
                    layout,
                    chosen,
                    head,
                    heads: (first, (first + side).min((head + 1) * group)),
                    rows: (from + chunk * rows, (from + (chunk + 1) * rows).min(part.rows.end)),
                    first_row: from,
                };
                match format {
                    KvFormat::F32 => task.run::<f32>(isa, segments, sink),
                    KvFormat::F16 => task.run::<f16>(isa, segments, sink),
                    KvFormat::Q8 => task.run::<i8>(isa, segments, sink),
                }
            };
            // Jobs of a sequence cut into segments are many and small.
            let most = if parts.iter().all(|p| p.split.is_some()) { usize::MAX } else { 1 };
            parallel::ranges(jobs, 1, most, cost / jobs.max(1), |from, to| (from..to).for_each(job));
            for part in parts {
                let Some(begin) = part.split else { continue };
                let stride = part.rows.len() * self.heads * width;
                let cost = part.segments.len() * layout.padded();
                parallel::ranges(part.rows.len() * self.heads, 1, usize::MAX, cost, |from, to| {
                    for i in from..to {
                        let (r, h) = (part.rows.start + i / self.heads, i % self.heads);
                        let within = |p: usize| p / SEGMENT - part.segments.start;
                        let bits = chosen.map_or(Bits(None), |c| c.of(r, h / group));
                        let segments = (within(self.low(positions[r]))..within(positions[r]) + 1)
                            .filter(|s| bits.any_in(part.segments.start + s));
                        let partial = partial.after(begin + i * width);
                        let (out, sink) = (at.at(r, h * layout.head_dim), self.sink(h));
                        // SAFETY: the jobs above wrote all segments that the query sees; every row and head is met
                        // once.
                        unsafe { gather(isa, partial, stride, segments, out, (layout, sink)) };
                    }
                });
            }
        });
    }

    /// What head `head` adds to a score for each position that the key lies nearer; 0 without ALiBi. With a power of 2
    /// of heads `2^(-alibi (head + 1) / heads)`; else so for the power below, and for the heads above it every second
    /// one of the power above.
    pub fn slope(&self, head: usize) -> f32 {
        let Some(most) = self.alibi else { return 0.0 };
        let below = 1usize << self.heads.ilog2();
        let (nth, of) = if head < below { (head + 1, below) } else { (2 * (head - below) + 1, 2 * below) };
        (-f64::from(most) * nth as f64 / of as f64).exp2() as f32
    }

    /// The first position that a query at `p` sees.
    pub(crate) fn low(&self, p: usize) -> usize {
        let window = self.window.map_or(0, |w| (p + 1).saturating_sub(w));
        window.max(self.chunk.map_or(0, |c| p / c * c))
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
///
/// What follows says which queries meet which keys and in which order; the arithmetic is in operations of their own,
/// each compiled apart for every instruction set: inlined into one function they would take minutes to compile.
#[derive(Clone, Copy)]
struct Task<'a> {
    p: &'a Attention,
    q: MatRef<'a>,
    positions: &'a [usize],
    kv: &'a KvView<'a>,
    layout: KvLayout,
    /// What each row reads of each head; none: all.
    chosen: Option<&'a Chosen>,
    /// The key head.
    head: usize,
    /// Its query heads, from and to.
    heads: (usize, usize),
    /// Rows from and to.
    rows: (usize, usize),
    /// The first row of the sequence, from which partial results are counted.
    first_row: usize,
}

/// Where a task's results go.
#[derive(Clone, Copy)]
enum Sink {
    /// Finished, to the rows of the output.
    Out(Shared),
    /// Largest score, sum and sums of the only segment, for each row and head.
    Partial(Shared),
}

/// What a query carries from tile to tile.
struct State<'a> {
    q: &'a [f32],
    /// Sums of this segment, and of those before.
    acc: &'a mut [f32],
    total: &'a mut [f32],
    /// First and last visible position, and the key blocks that are read.
    low: usize,
    high: usize,
    bits: Bits<'a>,
    /// What a score gets for each position that its key lies nearer.
    slope: f32,
    top: f32,
    sum: f32,
    total_top: f32,
    total_sum: f32,
    /// Whether `total` holds anything.
    begun: bool,
}

impl State<'_> {
    /// The visible part of the tile that starts at `start`, counted within it; empty where it sees nothing.
    #[inline(always)]
    fn bounds(&self, start: usize) -> (usize, usize) {
        let end = (self.high + 1).saturating_sub(start).min(TILE);
        (self.low.saturating_sub(start).min(end), end)
    }

    /// The key blocks of that part which it reads, a bit each.
    #[inline(always)]
    fn blocks(&self, start: usize) -> usize {
        let (lo, hi) = self.bounds(start);
        let seen = if lo == hi { 0 } else { (1 << hi.div_ceil(KEY_BLOCK)) - (1 << (lo / KEY_BLOCK)) };
        seen & self.bits.tile(start)
    }

    /// Whether it reads any of a segment.
    #[inline(always)]
    fn saw(&self, segment: usize) -> bool {
        self.low / SEGMENT <= segment && segment <= self.high / SEGMENT && self.bits.any_in(segment)
    }

    /// Brings this segment's largest score, sum and sums to those of the segments before.
    fn settle(&mut self, isa: Isa) {
        if self.begun {
            let both = [(self.total_top, self.total_sum), (self.top, self.sum)];
            let padded = self.total.len();
            let merge = Merge { both, total: self.total.as_mut_ptr(), seen: self.acc.as_ptr(), padded };
            (self.total_top, self.total_sum) = dispatch(isa, merge);
        } else {
            (self.total_top, self.total_sum, self.begun) = (self.top, self.sum, true);
            self.total.copy_from_slice(self.acc);
        }
    }
}

impl<'a> Task<'a> {
    fn count(&self) -> usize {
        (self.rows.1 - self.rows.0) * (self.heads.1 - self.heads.0)
    }

    /// Whether tiles are widened before the queries read them.
    fn widens<E: Element>(&self) -> bool {
        E::NARROW && self.count() >= WIDEN
    }

    /// Scratch: every query's sums twice, weights of a tile for those side by side, a widened tile.
    fn room<E: Element>(&self) -> usize {
        let l = self.layout;
        let wide = if self.widens::<E>() { TILE * (l.head_dim + l.padded()) } else { 0 };
        2 * self.count() * l.padded() + SIDE * TILE + wide
    }

    /// The row and the head of query `i`.
    fn query(&self, i: usize) -> (usize, usize) {
        let heads = self.heads.1 - self.heads.0;
        (self.rows.0 + i / heads, self.heads.0 + i % heads)
    }

    /// Query `i` before its first tile; `sums` has room for its sums twice.
    fn state<'b>(&self, i: usize, sums: Option<&'b mut [f32]>) -> State<'b>
    where
        'a: 'b,
    {
        let (mut q, mut low, mut high, mut bits): (&[f32], _, _, _) = (&[], 0, 0, Bits(None));
        let mut slope = 0.0;
        if sums.is_some() {
            let (r, h) = self.query(i);
            let dim = self.layout.head_dim;
            q = &self.q.row(r)[h * dim..(h + 1) * dim];
            high = self.positions[r];
            low = self.p.low(high);
            bits = self.chosen.map_or(bits, |c| c.of(r, self.head));
            slope = self.p.slope(h);
        }
        let sums = sums.unwrap_or_default();
        let (acc, total) = sums.split_at_mut(sums.len() / 2);
        let none = f32::NEG_INFINITY;
        let (top, total_top) = (none, none);
        State { q, acc, total, low, high, bits, slope, top, sum: 0.0, total_top, total_sum: 0.0, begun: false }
    }

    fn run<E: Element>(&self, isa: Isa, segments: Range<usize>, sink: Sink) {
        scratch::with(self.room::<E>(), |buffer| {
            let (count, padded) = (self.count(), self.layout.padded());
            let (sums, rest) = buffer.split_at_mut(2 * count * padded);
            let (weights, wide) = rest.split_at_mut(SIDE * TILE);
            let mut sums = sums.chunks_exact_mut(2 * padded);
            // Those of one row are all that a decoding step has: to prepare more would take a good part of its time.
            if count <= FEW {
                let mut states: [State<'_>; FEW] = std::array::from_fn(|i| self.state(i, sums.next()));
                self.meet::<E>(isa, segments, sink, &mut states[..count], weights, wide);
            } else {
                let mut states: [State<'_>; QUERIES] = std::array::from_fn(|i| self.state(i, sums.next()));
                self.meet::<E>(isa, segments, sink, &mut states[..count], weights, wide);
            }
        });
    }

    fn meet<E: Element>(
        &self,
        isa: Isa,
        segments: Range<usize>,
        sink: Sink,
        states: &mut [State<'_>],
        weights: &mut [f32],
        wide: &mut [f32],
    ) {
        let (dim, padded) = (self.layout.head_dim, self.layout.padded());
        for segment in segments {
            self.segment::<E>(isa, states, segment, weights, wide);
            if let Sink::Out(_) = sink {
                states.iter_mut().filter(|q| q.saw(segment)).for_each(|q| q.settle(isa));
            }
        }
        for (i, state) in states.iter().enumerate() {
            let (r, h) = self.query(i);
            match sink {
                Sink::Out(out) => {
                    let sum = with_sink(self.p.sink(h), (state.total_top, state.total_sum));
                    let total = state.total.as_ptr();
                    dispatch(isa, Finish { total, sum, out: out.at(r, h * dim), dim });
                }
                Sink::Partial(parts) => {
                    let at = parts.at((r - self.first_row) * self.p.heads + h, 0);
                    // SAFETY: run_on made room for every row and head of this segment, and each is written by one task.
                    let at = unsafe { std::slice::from_raw_parts_mut(at, PARTIAL + padded) };
                    (at[0], at[1]) = (state.top, state.sum);
                    at[PARTIAL..].copy_from_slice(state.acc);
                }
            }
        }
    }

    /// One segment against every query that sees some of it, from fresh sums. `weights` has room for [`SIDE`] tiles,
    /// `wide` for a widened one where the task widens.
    fn segment<E: Element>(
        &self,
        isa: Isa,
        states: &mut [State<'_>],
        segment: usize,
        weights: &mut [f32],
        wide: &mut [f32],
    ) {
        let (mut low, mut high) = (usize::MAX, 0);
        for state in states.iter_mut() {
            (state.top, state.sum) = (f32::NEG_INFINITY, 0.0);
            state.acc.fill(0.0);
            low = low.min(state.low);
            high = high.max(state.high);
        }
        let from = (low / TILE).max(segment * SEGMENT / TILE);
        let to = (high / TILE + 1).min((segment + 1) * SEGMENT / TILE);
        // Key blocks of a tile that any of them reads, a bit each.
        let wanted = |states: &[State<'_>], start: usize| {
            if self.chosen.is_some() {
                return states.iter().fold(0, |all, s| all | s.blocks(start));
            }
            let (from, to) = (low.saturating_sub(start) / KEY_BLOCK, (high + 1 - start).div_ceil(KEY_BLOCK).min(SUBS));
            (1 << to) - (1 << from)
        };
        for t in from..to {
            let start = t * TILE;
            let subs = wanted(states, start);
            let next = self.chosen.map_or((1 << SUBS) - 1, |_| wanted(states, start + TILE));
            let tile = self.tile::<E>(start, subs, next);
            // SAFETY: the tile has the key blocks that any of the queries sees.
            unsafe {
                if self.widens::<E>() {
                    let tile = self.widened(isa, subs, &tile, wide);
                    self.queries(isa, states, start, &tile, weights);
                } else {
                    self.queries(isa, states, start, &tile, weights);
                }
            }
        }
    }

    /// Where key blocks `subs` of the tile at `start` lie, and those that are wanted of the tile after it: a bit each.
    fn tile<E: Element>(&self, start: usize, subs: usize, wanted: usize) -> Tile<E> {
        let l = self.layout;
        let none = std::ptr::null();
        let mut tile =
            Tile { keys: [none; SUBS], values: [none; SUBS], scales: None, next: [[std::ptr::null(); SUBS]; 2] };
        // The key block at a position: its page's parts, and its first row there.
        let block = |at: usize| (E::parts(self.kv.page_of(at)), self.head * l.page_tokens + at % l.page_tokens);
        let lies = |parts: &Parts<'_, E>, row: usize| {
            (parts.keys[row * l.head_dim..].as_ptr(), parts.values[row * l.padded()..].as_ptr())
        };
        for i in (0..SUBS).filter(|i| subs >> i & 1 == 1) {
            let at = start + i * KEY_BLOCK;
            let (parts, row) = block(at);
            (tile.keys[i], tile.values[i]) = lies(&parts, row);
            let mut next = (tile.keys[i], tile.values[i]);
            if wanted >> i & 1 == 1 && at + TILE < self.kv.tokens {
                let (parts, row) = block(at + TILE);
                next = lies(&parts, row);
            }
            (tile.next[0][i], tile.next[1][i]) = (next.0.cast(), next.1.cast());
            if let Some(scales) = parts.scales {
                let all = tile.scales.get_or_insert([[std::ptr::null(); SUBS]; 2]);
                for (all, scales) in all.iter_mut().zip(scales) {
                    all[i] = scales[row..].as_ptr();
                }
            }
        }
        tile
    }

    /// The tile in f32: exactly the same values.
    /// # Safety
    /// `tile` has key blocks `subs`.
    unsafe fn widened<E: Element>(&self, isa: Isa, subs: usize, tile: &Tile<E>, wide: &mut [f32]) -> Tile<f32> {
        let (k, v) = (KEY_BLOCK * self.layout.head_dim, KEY_BLOCK * self.layout.padded());
        assert!(wide.len() >= SUBS * (k + v), "room for a tile");
        let none = std::ptr::null();
        let mut out = Tile { keys: [none; SUBS], values: [none; SUBS], scales: tile.scales, next: tile.next };
        let mut at = wide.as_mut_ptr();
        for i in (0..SUBS).filter(|i| subs >> i & 1 == 1) {
            (out.keys[i], out.values[i]) = (at, at.wrapping_add(k));
            dispatch(isa, Widen { from: tile.keys[i], to: at, n: k });
            dispatch(isa, Widen { from: tile.values[i], to: at.wrapping_add(k), n: v });
            at = at.wrapping_add(k + v);
        }
        out
    }

    /// One tile against every query that sees some of it. `weights` has room for [`SIDE`] tiles.
    /// # Safety
    /// `tile` has the key blocks that they see.
    unsafe fn queries<E: Element>(
        &self,
        isa: Isa,
        states: &mut [State<'_>],
        start: usize,
        tile: &Tile<E>,
        weights: &mut [f32],
    ) {
        let n = states.len();
        let mut i = 0;
        while i < n {
            let mask = states[i].blocks(start);
            let mut same = 1;
            while same < SIDE && i + same < n && states[i + same].blocks(start) == mask {
                same += 1;
            }
            if mask == 0 {
                i += same;
                continue;
            }
            let m = match same {
                SIDE if isa.lanes() == 16 => SIDE,
                6.. if isa.lanes() == 8 => 6,
                4.. => 4,
                3 => 3,
                _ => 1,
            };
            for subs in runs(mask) {
                let some = &mut states[i..i + m];
                // SAFETY: as the caller promises.
                unsafe {
                    match m {
                        SIDE => self.side::<E, SIDE>(isa, some, start, subs, tile, weights),
                        6 => self.side::<E, 6>(isa, some, start, subs, tile, weights),
                        4 => self.side::<E, 4>(isa, some, start, subs, tile, weights),
                        3 => self.side::<E, 3>(isa, some, start, subs, tile, weights),
                        _ => self.side::<E, 1>(isa, some, start, subs, tile, weights),
                    }
                }
            }
            i += m;
        }
    }

    /// One tile against `M` queries that read the same key blocks `subs` of it, of which they see some.
    /// # Safety
    /// As for [`Task::queries`].
    unsafe fn side<E: Element, const M: usize>(
        &self,
        isa: Isa,
        states: &mut [State<'_>],
        start: usize,
        subs: (usize, usize),
        tile: &Tile<E>,
        weights: &mut [f32],
    ) {
        let (dim, padded) = (self.layout.head_dim, self.layout.padded());
        let mut q = [std::ptr::null(); M];
        let mut acc = [std::ptr::null_mut(); M];
        for (m, state) in states.iter_mut().enumerate() {
            (q[m], acc[m]) = (state.q.as_ptr(), state.acc.as_mut_ptr());
        }
        let weights = weights[..M * TILE].as_mut_ptr();
        // What a query sees of them, counted within the tile.
        let seen = |state: &State<'_>| {
            let (lo, hi) = state.bounds(start);
            (lo.max(subs.0 * KEY_BLOCK), hi.min(subs.1 * KEY_BLOCK))
        };
        dispatch(isa, Scores { q, keys: tile.keys, next: tile.next[0], subs, dim, weights });
        // Key blocks that all of the queries see whole.
        let mut whole = subs;
        for (m, state) in states.iter_mut().enumerate() {
            let (lo, hi) = seen(state);
            let w = weights.wrapping_add(m * TILE);
            let (top, sum, acc) = (state.top, state.sum, acc[m]);
            // The tile's first key as the query sees it: a whole number, small enough to be exact.
            let near = (state.slope, start as f32 - state.high as f32);
            let soften =
                Soften { p: self.p, top, sum, acc, padded, bounds: (lo, hi), subs, scales: tile.scales, near, w };
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
                let (lo, hi) = seen(state);
                let within = |at: usize| at.saturating_sub(i * KEY_BLOCK).min(KEY_BLOCK);
                let (js, weights) = ((within(lo), within(hi)), weights.wrapping_add(m * TILE));
                dispatch(isa, Mix { acc: [acc[m]], tile: *tile, subs: (i, i + 1), js, padded, weights });
            }
            i += 1;
        }
    }
}

#[cfg(test)]
mod tests;
