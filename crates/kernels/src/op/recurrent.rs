//! Recurrent mixers, row after row: a causal convolution of each channel, Mamba-2's selective state space and the gated
//! delta rule.
//!
//! A row's result is made from its sequence's state and the row alone, in one order on every instruction set, so that a
//! prompt whole, in chunks or token by token gives the same bits. Threads share heads and channels, never a sum.
//!
//! A state lies as `[kernel - 1, channels]` inputs of the convolution, the oldest first, and then `[heads, rows, cols]`.

use std::ops::Range;

use lacuna_base::{MatMut, MatRef};
use lacuna_spec::{Delta, Mamba, Mixer, Ssd};

use super::math;

use crate::simd::{Op, Simd, dispatch};
use crate::{Isa, parallel};

/// Columns of a head's state that are worked on at once: what fits into registers.
const LANES: usize = 16;
/// Channels of a convolution in one task.
const CHANNELS: usize = 256;

/// Rows of one sequence in a call, in the order of their positions, and the sequence's state before the first of them.
pub struct StateRun<'a> {
    /// Which rows.
    pub rows: Range<usize>,
    /// The state: that behind the last row afterwards.
    pub state: &'a mut [f32],
}

/// A mixer's own vectors.
#[derive(Clone, Debug)]
pub struct Recurrence {
    mixer: Mixer,
    channels: usize,
    /// `[kernel, channels]`, the row's own position last.
    taps: Vec<f32>,
    bias: Vec<f32>,
    /// Of each head: what a time step is multiplied with in the exponent, below 0. Mamba's, `[state, channels]`.
    decay: Vec<f32>,
    skip: Vec<f32>,
}

impl Recurrence {
    /// From the tensors as they are stored: `conv`, `[channels, kernel]`, its bias, `a` and `d`, `[heads]` (Mamba's
    /// `[channels, state]` and `[channels]`); empty where the mixer has none. `hidden`: channels of the residual stream.
    #[track_caller]
    pub fn new(mixer: &Mixer, hidden: usize, conv: &[f32], bias: Vec<f32>, a: Vec<f32>, d: Vec<f32>) -> Recurrence {
        let (channels, kernel) = (mixer.channels(hidden), mixer.kernel());
        assert_eq!(conv.len(), channels * kernel, "a convolution of {channels} channels over {kernel} positions");
        let mut taps = vec![0.0; conv.len()];
        for (c, weights) in conv.chunks_exact(kernel).enumerate() {
            // A factor of what the convolution reads is as good as one of its weights.
            let factor = factor(mixer, c);
            weights.iter().enumerate().for_each(|(j, w)| taps[j * channels + c] = w * factor);
        }
        let log = match mixer {
            Mixer::ShortConv(_) => false,
            Mixer::Ssd(m) => m.log,
            Mixer::Delta(m) => m.log,
            Mixer::Mamba(m) => m.log,
        };
        let mut decay: Vec<f32> = if log { a.into_iter().map(|a| -a.exp()).collect() } else { a };
        if let Mixer::Mamba(m) = mixer {
            assert_eq!(decay.len(), m.channels * m.state, "decays of {} channels", m.channels);
            let by_channel = std::mem::take(&mut decay);
            decay.extend((0..m.state).flat_map(|k| by_channel[k..].iter().step_by(m.state)));
        }
        Recurrence { mixer: mixer.clone(), channels, taps, bias, decay, skip: d }
    }

    /// The mixer.
    pub fn mixer(&self) -> &Mixer {
        &self.mixer
    }

    /// The convolution: of each channel `sum over j of taps[j] x[t - kernel + 1 + j] + bias`. A short convolution's rows
    /// are `[b; c; x]`: what is read is `b x`, and what comes out is multiplied with `c`.
    #[track_caller]
    pub fn convolve(&self, runs: &mut [StateRun<'_>], x: MatRef<'_>, mut out: MatMut<'_>) {
        let (channels, kernel) = (self.channels, self.mixer.kernel());
        let gated = matches!(self.mixer, Mixer::ShortConv(_));
        let wide = if gated { 3 * channels } else { channels };
        assert_eq!((x.cols(), out.cols(), x.rows()), (wide, channels, out.rows()), "the columns of a convolution");
        let longest = runs.iter().map(|r| r.rows.len()).max().unwrap_or(0);
        let pieces = channels.div_ceil(CHANNELS);
        let runs = shared(runs, (kernel - 1) * channels);
        let (stride, height) = (out.stride(), out.rows());
        let out = Shared(out.raw_mut().as_mut_ptr());
        parallel::tasks(runs.len() * pieces, longest * CHANNELS * kernel, |i| {
            let (run, from) = (&runs[i / pieces], i % pieces * CHANNELS);
            let to = (from + CHANNELS).min(channels);
            assert!(run.rows.end <= height, "rows {:?} of {height}", run.rows);
            dispatch(Isa::best(), Convolve { of: self, x, run, channels: from..to, gated, out: &out, stride });
        });
    }

    /// The heads: `x` is what came out of the convolution, its activation applied, with Mamba's b and c beside it; `dt`
    /// has a column for each head (Mamba's: for each channel), its bias added, and so has `beta` (the delta rule's).
    #[track_caller]
    pub fn scan(&self, runs: &mut [StateRun<'_>], [x, dt, beta]: [MatRef<'_>; 3], mut out: MatMut<'_>) {
        let (heads, high, wide) = self.mixer.heads().expect("a mixer with heads");
        let beside = if let Mixer::Mamba(m) = self.mixer { 2 * m.state } else { 0 };
        let read = (self.channels + beside, self.mixer.steps());
        assert_eq!((x.cols(), dt.cols(), out.cols()), (read.0, read.1, heads * wide), "the columns of a scan");
        assert!(beta.cols() == heads || !matches!(self.mixer, Mixer::Delta(_)), "{} columns of beta", beta.cols());
        let longest = runs.iter().map(|r| r.rows.len()).max().unwrap_or(0);
        let before = (self.mixer.kernel() - 1) * self.channels;
        let runs = shared(runs, before + heads * high * wide);
        let (stride, height) = (out.stride(), out.rows());
        let out = Shared(out.raw_mut().as_mut_ptr());
        if let Mixer::Mamba(m) = &self.mixer {
            let pieces = wide.div_ceil(CHANNELS);
            return parallel::tasks(runs.len() * pieces, longest * high * CHANNELS * 4, |i| {
                let (run, from) = (&runs[i / pieces], i % pieces * CHANNELS);
                assert!(run.rows.end <= height, "rows {:?} of {height}", run.rows);
                let channels = from..(from + CHANNELS).min(wide);
                dispatch(Isa::best(), MambaChannels { of: self, m, x, dt, run, before, channels, out: &out, stride });
            });
        }
        parallel::tasks(runs.len() * heads, longest * high * wide * 2, |i| {
            let (run, head) = (&runs[i / heads], i % heads);
            assert!(run.rows.end <= height, "rows {:?} of {height}", run.rows);
            // SAFETY: a task has its own head of its own run: nobody else touches that part of the state, whose length
            // was checked.
            let state =
                unsafe { std::slice::from_raw_parts_mut(run.state.add(before + head * high * wide), high * wide) };
            match &self.mixer {
                Mixer::Ssd(m) => {
                    let skip = self.skip.get(head).copied().unwrap_or(0.0);
                    let decay = self.decay[head];
                    let rows = run.rows.clone();
                    dispatch(Isa::best(), SsdHead { m, head, rows, x, dt, decay, skip, state, out: &out, stride });
                }
                Mixer::Delta(m) => {
                    let (rows, decay) = (run.rows.clone(), self.decay[head]);
                    dispatch(Isa::best(), DeltaHead { m, head, rows, x, dt, beta, decay, state, out: &out, stride });
                }
                Mixer::ShortConv(_) | Mixer::Mamba(_) => {}
            }
        });
    }
}

/// Falcon-H1's factor of a channel that goes into the convolution.
fn factor(mixer: &Mixer, channel: usize) -> f32 {
    let Mixer::Ssd(Ssd { factors: Some(factors), heads, head_dim, groups, state, .. }) = mixer else { return 1.0 };
    let (x, each) = (heads * head_dim, groups * state);
    match channel {
        c if c < x => factors[1],
        c if c < x + each => factors[2],
        _ => factors[3],
    }
}

/// `ln(1 + e^x)`.
#[inline(always)]
fn softplus(x: f32) -> f32 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}

/// A run as several tasks see it.
struct Part {
    rows: Range<usize>,
    state: *mut f32,
}
// SAFETY: tasks touch disjoint parts of a state.
unsafe impl Sync for Part {}

fn shared(runs: &mut [StateRun<'_>], least: usize) -> Vec<Part> {
    let part = |r: &mut StateRun<'_>| {
        assert!(r.state.len() >= least, "a state of {} values, {least} expected", r.state.len());
        Part { rows: r.rows.clone(), state: r.state.as_mut_ptr() }
    };
    runs.iter_mut().map(part).collect()
}

struct Shared(*mut f32);
// SAFETY: used for disjoint columns only.
unsafe impl Sync for Shared {}

impl Shared {
    /// `n` columns of a row from `col` on.
    ///
    /// # Safety
    /// They lie in the matrix, and nobody else touches them while the slice lives.
    #[allow(clippy::mut_from_ref)]
    #[inline(always)]
    unsafe fn columns(&self, row: usize, stride: usize, col: usize, n: usize) -> &mut [f32] {
        // SAFETY: as the caller promises.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(row * stride + col), n) }
    }
}

/// Some channels of one run.
struct Convolve<'a> {
    of: &'a Recurrence,
    x: MatRef<'a>,
    run: &'a Part,
    channels: Range<usize>,
    gated: bool,
    out: &'a Shared,
    stride: usize,
}

impl Op for Convolve<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let (all, kernel) = (self.of.channels, self.of.mixer.kernel());
        let (from, n) = (self.channels.start, self.channels.len());
        // The inputs still to be read, the oldest first, and the row's own behind them.
        let mut seen = vec![0.0f32; kernel * n];
        for j in 0..kernel - 1 {
            // SAFETY: these channels of the state are this task's alone, and its length was checked.
            let was = unsafe { std::slice::from_raw_parts(self.run.state.add(j * all + from), n) };
            seen[j * n..][..n].copy_from_slice(was);
        }
        for r in self.run.rows.clone() {
            let row = self.x.row(r);
            let own = &mut seen[(kernel - 1) * n..];
            if self.gated {
                let (b, x) = (&row[from..][..n], &row[2 * all + from..][..n]);
                own.iter_mut().zip(b).zip(x).for_each(|((o, b), x)| *o = b * x);
            } else {
                own.copy_from_slice(&row[from..][..n]);
            }
            // SAFETY: these columns of these rows are this task's alone, and lie in the matrix.
            let y = unsafe { self.out.columns(r, self.stride, from, n) };
            y.fill(0.0);
            for (j, was) in seen.chunks_exact(n).enumerate() {
                let taps = &self.of.taps[j * all + from..][..n];
                y.iter_mut().zip(was).zip(taps).for_each(|((y, x), w)| *y += w * x);
            }
            if !self.of.bias.is_empty() {
                y.iter_mut().zip(&self.of.bias[from..][..n]).for_each(|(y, b)| *y += b);
            }
            if self.gated {
                y.iter_mut().zip(&row[all + from..][..n]).for_each(|(y, c)| *y *= c);
            }
            seen.copy_within(n.., 0);
        }
        for j in 0..kernel - 1 {
            // SAFETY: as above.
            let now = unsafe { std::slice::from_raw_parts_mut(self.run.state.add(j * all + from), n) };
            now.copy_from_slice(&seen[j * n..][..n]);
        }
    }
}

/// Some channels of Mamba over one run.
struct MambaChannels<'a> {
    of: &'a Recurrence,
    m: &'a Mamba,
    x: MatRef<'a>,
    dt: MatRef<'a>,
    run: &'a Part,
    /// Where the channels' states begin in the run's, `[state, channels]`.
    before: usize,
    channels: Range<usize>,
    out: &'a Shared,
    stride: usize,
}

/// Channels of Mamba that are worked on at once, whole vectors on every instruction set.
const BLOCK: usize = 32;

impl Op for MambaChannels<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (all, high) = (self.m.channels, self.m.state);
        // Lanes beyond the last channel count with zeros.
        let (mut states, mut decays) = (vec![[0.0f32; BLOCK]; high], vec![[0.0f32; BLOCK]; high]);
        for from in self.channels.clone().step_by(BLOCK) {
            let n = BLOCK.min(self.channels.end - from);
            for k in 0..high {
                // SAFETY: these channels of the state are this task's alone, and its length was checked.
                let was = unsafe { std::slice::from_raw_parts(self.run.state.add(self.before + k * all + from), n) };
                states[k] = [0.0; BLOCK];
                states[k][..n].copy_from_slice(was);
                decays[k] = [0.0; BLOCK];
                decays[k][..n].copy_from_slice(&self.of.decay[k * all + from..][..n]);
            }
            for r in self.run.rows.clone() {
                let (row, steps) = (self.x.row(r), &self.dt.row(r)[from..][..n]);
                let (b, c) = (&row[all..][..high], &row[all + high..][..high]);
                let (mut dt, mut dx, mut sum) = ([0.0f32; BLOCK], [0.0f32; BLOCK], [0.0f32; BLOCK]);
                dt.iter_mut().zip(steps).for_each(|(dt, step)| *dt = softplus(*step));
                dx.iter_mut().zip(&dt).zip(&row[from..][..n]).for_each(|((dx, dt), x)| *dx = dt * x);
                for (k, (state, decay)) in states.iter_mut().zip(&decays).enumerate() {
                    let (b, c) = (s.splat(b[k]), s.splat(c[k]));
                    for at in (0..BLOCK).step_by(S::LANES) {
                        // SAFETY: all of these have BLOCK values, and LANES divides that.
                        unsafe {
                            let forget = s.mul(s.load(decay.as_ptr().add(at)), s.load(dt.as_ptr().add(at)));
                            let write = s.mul(b, s.load(dx.as_ptr().add(at)));
                            let to = state.as_mut_ptr().add(at);
                            let now = s.add(s.mul(s.load(to), math::exp(s, forget)), write);
                            s.store(to, now);
                            let total = sum.as_mut_ptr().add(at);
                            s.store(total, s.add(s.load(total), s.mul(c, now)));
                        }
                    }
                }
                // SAFETY: these columns of these rows are this task's alone, and lie in the matrix.
                let y = unsafe { self.out.columns(r, self.stride, from, n) };
                let skip = &self.of.skip[from..][..n];
                y.iter_mut().zip(&sum).zip(skip).zip(&row[from..]).for_each(|(((y, s), d), x)| *y = s + d * x);
            }
            for (k, state) in states.iter().enumerate() {
                // SAFETY: as above.
                let now =
                    unsafe { std::slice::from_raw_parts_mut(self.run.state.add(self.before + k * all + from), n) };
                now.copy_from_slice(&state[..n]);
            }
        }
    }
}

/// One head of Mamba-2 over one run.
struct SsdHead<'a> {
    m: &'a Ssd,
    head: usize,
    rows: Range<usize>,
    x: MatRef<'a>,
    dt: MatRef<'a>,
    decay: f32,
    skip: f32,
    /// `[state, head_dim]`.
    state: &'a mut [f32],
    out: &'a Shared,
    stride: usize,
}

impl Op for SsdHead<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let (m, wide) = (self.m, self.m.head_dim);
        let group = self.head / (m.heads / m.groups);
        let b_at = m.heads * wide + group * m.state;
        let c_at = b_at + m.groups * m.state;
        for r in self.rows {
            let row = self.x.row(r);
            let (x, b, c) = (&row[self.head * wide..][..wide], &row[b_at..][..m.state], &row[c_at..][..m.state]);
            let dt = softplus(self.dt.at(r, self.head)).max(m.dt_limit.0);
            let dt = m.dt_limit.1.map_or(dt, |most| dt.min(most));
            let decay = (self.decay * dt).exp();
            // SAFETY: a head's columns of these rows are this task's alone, and lie in the matrix.
            let y = unsafe { self.out.columns(r, self.stride, self.head * wide, wide) };
            let mut at = 0;
            while at < wide {
                let n = LANES.min(wide - at);
                let (mut dx, mut sum) = ([0.0f32; LANES], [0.0f32; LANES]);
                (0..n).for_each(|i| dx[i] = dt * x[at + i]);
                for (k, (b, c)) in b.iter().zip(c).enumerate() {
                    let s = &mut self.state[k * wide + at..][..n];
                    if let Ok(s) = <&mut [f32; LANES]>::try_from(&mut *s) {
                        for i in 0..LANES {
                            s[i] = s[i] * decay + b * dx[i];
                            sum[i] += c * s[i];
                        }
                    } else {
                        for i in 0..n {
                            s[i] = s[i] * decay + b * dx[i];
                            sum[i] += c * s[i];
                        }
                    }
                }
                (0..n).for_each(|i| y[at + i] = sum[i] + self.skip * x[at + i]);
                at += n;
            }
        }
    }
}

/// One value head of the delta rule over one run.
struct DeltaHead<'a> {
    m: &'a Delta,
    head: usize,
    rows: Range<usize>,
    x: MatRef<'a>,
    dt: MatRef<'a>,
    beta: MatRef<'a>,
    decay: f32,
    /// `[key_dim, value_dim]`.
    state: &'a mut [f32],
    out: &'a Shared,
    stride: usize,
}

/// `out = x by / |x|`, the length with 1e-6 under its root.
#[inline(always)]
fn unit(x: &[f32], by: f32, out: &mut [f32]) {
    let mut sums = [0.0f32; LANES];
    for part in x.chunks(LANES) {
        part.iter().zip(&mut sums).for_each(|(x, s)| *s += x * x);
    }
    let by = by / (sums.iter().sum::<f32>() + 1e-6).sqrt();
    out.iter_mut().zip(x).for_each(|(o, x)| *o = x * by);
}

impl Op for DeltaHead<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let (m, high, wide) = (self.m, self.m.key_dim, self.m.value_dim);
        let key = if m.tiled { self.head % m.key_heads } else { self.head / (m.value_heads / m.key_heads) };
        let k_at = m.key_heads * high;
        let mut both = vec![0.0f32; 2 * high];
        let (q, k) = both.split_at_mut(high);
        let scale = 1.0 / (high as f32).sqrt();
        for r in self.rows {
            let row = self.x.row(r);
            unit(&row[key * high..][..high], scale, q);
            unit(&row[k_at + key * high..][..high], 1.0, k);
            let v = &row[2 * k_at + self.head * wide..][..wide];
            let decay = (self.decay * softplus(self.dt.at(r, self.head))).exp();
            let beta = 1.0 / (1.0 + (-self.beta.at(r, self.head)).exp());
            // SAFETY: a head's columns of these rows are this task's alone, and lie in the matrix.
            let y = unsafe { self.out.columns(r, self.stride, self.head * wide, wide) };
            let mut at = 0;
            while at < wide {
                let n = LANES.min(wide - at);
                let mut sum = [0.0f32; LANES];
                for (i, k) in k.iter().enumerate() {
                    let s = &self.state[i * wide + at..][..n];
                    if let Ok(s) = <&[f32; LANES]>::try_from(s) {
                        (0..LANES).for_each(|j| sum[j] += k * s[j]);
                    } else {
                        (0..n).for_each(|j| sum[j] += k * s[j]);
                    }
                }
                let mut delta = [0.0f32; LANES];
                (0..n).for_each(|j| delta[j] = (v[at + j] - decay * sum[j]) * beta);
                sum = [0.0; LANES];
                for (i, (k, q)) in k.iter().zip(q.iter()).enumerate() {
                    let s = &mut self.state[i * wide + at..][..n];
                    if let Ok(s) = <&mut [f32; LANES]>::try_from(&mut *s) {
                        for j in 0..LANES {
                            s[j] = s[j] * decay + k * delta[j];
                            sum[j] += q * s[j];
                        }
                    } else {
                        for j in 0..n {
                            s[j] = s[j] * decay + k * delta[j];
                            sum[j] += q * s[j];
                        }
                    }
                }
                y[at..][..n].copy_from_slice(&sum[..n]);
                at += n;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::Mat;
    use lacuna_base::testkit::random;
    use lacuna_spec::{GateNorm, ShortConv};

    const ROWS: usize = 23;

    fn ssd() -> Mixer {
        Mixer::Ssd(Ssd {
            heads: 6,
            head_dim: 19,
            state: 5,
            groups: 2,
            kernel: 4,
            conv_bias: true,
            dt_limit: (0.1, Some(2.0)),
            gate: GateNorm::Gate,
            log: true,
            factors: Some([1.0, 0.5, 2.0, 3.0, 1.0, 1.0]),
        })
    }

    fn delta(tiled: bool) -> Mixer {
        let (key_heads, value_heads) = (2, 6);
        Mixer::Delta(Delta { key_heads, value_heads, key_dim: 7, value_dim: 37, kernel: 3, log: false, tiled })
    }

    /// Channels that fill neither a task nor what a processor takes at once.
    fn mamba() -> Mixer {
        Mixer::Mamba(Mamba { channels: CHANNELS + 45, state: 5, rank: 3, kernel: 4, conv_bias: true, log: true })
    }

    fn made(mixer: &Mixer, hidden: usize) -> Recurrence {
        let (channels, heads) = (mixer.channels(hidden), mixer.steps());
        let states = if let Mixer::Mamba(m) = mixer { m.state } else { 1 };
        let conv = random(channels, mixer.kernel(), 3);
        let a = random(1, heads * states, 4)
            .data()
            .iter()
            .map(|a| if matches!(mixer, Mixer::Delta(_)) { -a.abs() } else { *a })
            .collect();
        Recurrence::new(
            mixer,
            hidden,
            conv.data(),
            random(1, channels, 5).into_vec(),
            a,
            random(1, heads, 6).into_vec(),
        )
    }

    /// All rows at once, or cut into pieces, of two sequences side by side.
    fn ran(of: &Recurrence, hidden: usize, cuts: &[usize]) -> [Mat; 2] {
        let (channels, heads) = (of.mixer().channels(hidden), of.mixer().heads());
        let wide = if heads.is_none() { 3 * hidden } else { channels };
        let n = of.mixer().steps();
        let x = [1, 2].map(|seed| random(ROWS, wide, seed));
        let z = [7, 8].map(|seed| random(ROWS, of.mixer().scanned(hidden), seed));
        let dt = [9, 10].map(|seed| random(ROWS, 2 * n, seed));
        let mut states = [1, 2].map(|_| vec![0.0; of.mixer().state_values(hidden)]);
        let mut conv = Mat::zeros(2 * ROWS, channels);
        let mut out = Mat::zeros(2 * ROWS, heads.map_or(0, |h| h.0 * h.2));
        let mut from = 0;
        for &to in cuts.iter().chain([&ROWS]) {
            let rows = to - from;
            let both = |of: &[Mat; 2]| {
                Mat::from_fn(2 * rows, of[0].cols(), |r, c| of[r / rows.max(1)][(from + r % rows.max(1), c)])
            };
            let (x, z, dt) = (both(&x), both(&z), both(&dt));
            let (mut y, mut w) = (Mat::zeros(2 * rows, channels), Mat::zeros(2 * rows, out.cols()));
            let [a, b] = &mut states;
            let mut runs = [StateRun { rows: 0..rows, state: a }, StateRun { rows: rows..2 * rows, state: b }];
            of.convolve(&mut runs, x.view(), y.view_mut());
            if heads.is_some() {
                let (dt, beta) = (dt.view().columns(0, n), dt.view().columns(n, 2 * n));
                of.scan(&mut runs, [z.view(), dt, beta], w.view_mut());
            }
            for r in 0..2 * rows {
                let to = r / rows * ROWS + from + r % rows;
                conv.row_mut(to).copy_from_slice(y.row(r));
                out.row_mut(to).copy_from_slice(w.row(r));
            }
            from = to;
        }
        [conv, out]
    }

    #[test]
    fn rows_do_not_depend_on_how_a_sequence_is_cut() {
        for mixer in [ssd(), delta(true), delta(false), mamba(), Mixer::ShortConv(ShortConv { kernel: 3, bias: true })]
        {
            let of = made(&mixer, 300);
            let whole = ran(&of, 300, &[]);
            for cuts in [&[1usize, 2, 3, 4, 5, 6, 7][..], &[11], &[20, 21, 22]] {
                let again = ran(&of, 300, cuts);
                assert!(whole.iter().zip(&again).all(|(a, b)| a.data() == b.data()), "{mixer:?} {cuts:?}");
            }
            assert!(whole[0].data().iter().any(|x| *x != 0.0));
        }
    }

    #[test]
    fn a_channel_is_what_its_definition_says() {
        let soft = |x: f64| (1.0 + x.exp()).ln();
        let mixer = mamba();
        let Mixer::Mamba(m) = &mixer else { unreachable!() };
        let of = made(&mixer, 16);
        let [_, out] = ran(&of, 16, &[]);
        let (z, dt) = (random(ROWS, mixer.scanned(16), 7), random(ROWS, 2 * m.channels, 9));
        let a = random(1, m.channels * m.state, 4);
        let at = |r: usize, c: usize| f64::from(z[(r, c)]);
        for i in 0..m.channels {
            let mut state = vec![0.0f64; m.state];
            for r in 0..ROWS {
                let step = soft(f64::from(dt[(r, i)]));
                let mut want = f64::from(of.skip[i]) * at(r, i);
                for (k, s) in state.iter_mut().enumerate() {
                    let decay = (-f64::from(a[(0, i * m.state + k)]).exp() * step).exp();
                    *s = decay * *s + step * at(r, i) * at(r, m.channels + k);
                    want += at(r, m.channels + m.state + k) * *s;
                }
                let have = f64::from(out[(r, i)]);
                assert!((have - want).abs() < 1e-4 * (1.0 + want.abs()), "{r} {i}: {have} {want}");
            }
        }
    }

    #[test]
    fn a_head_is_what_its_definition_says() {
        let soft = |x: f64| (1.0 + x.exp()).ln();
        for mixer in [ssd(), delta(true), delta(false)] {
            let of = made(&mixer, 16);
            let (heads, high, wide) = mixer.heads().unwrap();
            let [_, out] = ran(&of, 16, &[]);
            let (z, dt) = (random(ROWS, mixer.channels(16), 7), random(ROWS, 2 * heads, 9));
            let at = |r: usize, c: usize| f64::from(z[(r, c)]);
            for h in 0..heads {
                let mut state = vec![vec![0.0f64; wide]; high];
                for r in 0..ROWS {
                    let step = soft(f64::from(dt[(r, h)]));
                    let decay = |step: f64| (f64::from(of.decay[h]) * step).exp();
                    let mut want = vec![0.0; wide];
                    match &mixer {
                        Mixer::Ssd(m) => {
                            let step = step.clamp(0.1f32.into(), 2.0);
                            let b = heads * wide + h / (heads / m.groups) * high;
                            for (k, s) in state.iter_mut().enumerate() {
                                for (i, s) in s.iter_mut().enumerate() {
                                    *s = decay(step) * *s + step * at(r, b + k) * at(r, h * wide + i);
                                    want[i] += at(r, b + m.groups * high + k) * *s;
                                }
                            }
                            (0..wide).for_each(|i| want[i] += f64::from(of.skip[h]) * at(r, h * wide + i));
                        }
                        Mixer::Delta(m) => {
                            let key = if m.tiled { h % m.key_heads } else { h * m.key_heads / heads };
                            let unit = |from: usize| {
                                let x: Vec<f64> = (0..high).map(|k| at(r, from + key * high + k)).collect();
                                let length = (x.iter().map(|x| x * x).sum::<f64>() + 1e-6).sqrt();
                                x.into_iter().map(|x| x / length).collect::<Vec<f64>>()
                            };
                            let (q, k) = (unit(0), unit(m.key_heads * high));
                            let beta = 1.0 / (1.0 + (-f64::from(dt[(r, heads + h)])).exp());
                            for i in 0..wide {
                                let told: f64 = (0..high).map(|j| k[j] * decay(step) * state[j][i]).sum();
                                let v = at(r, 2 * m.key_heads * high + h * wide + i);
                                for j in 0..high {
                                    state[j][i] = decay(step) * state[j][i] + k[j] * beta * (v - told);
                                    want[i] += q[j] * state[j][i] / (high as f64).sqrt();
                                }
                            }
                        }
                        Mixer::ShortConv(_) | Mixer::Mamba(_) => unreachable!(),
                    }
                    for (i, want) in want.iter().enumerate() {
                        let have = f64::from(out[(r, h * wide + i)]);
                        assert!(
                            (have - want).abs() < 1e-4 * (1.0 + want.abs()),
                            "{mixer:?} {r} {h} {i}: {have} {want}"
                        );
                    }
                }
            }
        }
    }
}
