//! The adjoints of recurrent mixers: of the convolution, and of each head through the whole sequence, from its last row
//! to its first.
//!
//! A head's states are made again in chunks of rows, from one kept before each chunk, so that a long sequence costs
//! little memory. Sums are in f64, head by head, and do not depend on threads.

use lacuna_base::MatRef;
use lacuna_spec::{Delta, Mamba, Mixer, Ssd};
use rayon::prelude::*;

use super::rows::zeros;
use crate::Lent;
use crate::backend::MixerVectors;

/// Rows between two states that are kept.
const CHUNK: usize = 64;
/// Channels of Mamba in one task.
const CHANNELS: usize = 64;

/// Gradients of a mixer's convolution.
pub(super) struct ConvolutionGradients {
    /// Of what it read.
    pub x: Lent,
    /// Of its weights, `[channels, kernel]`.
    pub conv: Vec<f32>,
    /// Of its bias; empty where it has none.
    pub bias: Vec<f32>,
}

/// Gradients of a mixer's heads.
pub(super) struct ScanGradients {
    /// Of what the convolution put out, behind its activation.
    pub x: Lent,
    /// Of the time steps.
    pub dt: Lent,
    /// Of `beta`, where there is one.
    pub beta: Option<Lent>,
    /// Of `mixer.a` as it is stored.
    pub a: Vec<f32>,
    /// Of `mixer.d`; empty where there is none.
    pub d: Vec<f32>,
}

/// Falcon-H1's factor of what goes into a channel.
fn factor(mixer: &Mixer, channel: usize) -> f64 {
    let Mixer::Ssd(Ssd { factors: Some(f), heads, head_dim, groups, state, .. }) = mixer else { return 1.0 };
    let x = heads * head_dim;
    f64::from(f[if channel < x { 1 } else { 2 + (channel - x) / (groups * state) }])
}

/// From the gradients `dy`, `[rows, channels]`, of what a convolution of a whole sequence put out, that of `x`, which it
/// read.
pub(super) fn convolution(
    mixer: &Mixer,
    channels: usize,
    v: &MixerVectors,
    x: MatRef<'_>,
    dy: MatRef<'_>,
) -> ConvolutionGradients {
    let (rows, kernel) = (x.rows(), mixer.kernel());
    let short = matches!(mixer, Mixer::ShortConv(_));
    let one = |c: usize| {
        let factor = factor(mixer, c);
        let weights: Vec<f64> = v.conv[c * kernel..][..kernel].iter().map(|&w| f64::from(w)).collect();
        let at = |r: usize, part: usize| f64::from(x.at(r, part * channels + c));
        let read: Vec<f64> = (0..rows).map(|r| if short { at(r, 0) * at(r, 2) } else { at(r, 0) * factor }).collect();
        // Of what the row `r` of the convolution reads, the `j`th is row `r + j + 1 - kernel`.
        let seen = |r: usize, j: usize| (r + j + 1).checked_sub(kernel);
        let mut d: Vec<f64> = (0..rows).map(|r| f64::from(dy.at(r, c))).collect();
        let mut gate = Vec::new();
        if short {
            let bias = v.bias.get(c).map_or(0.0, |&b| f64::from(b));
            for (r, d) in d.iter_mut().enumerate() {
                let y: f64 = (0..kernel).filter_map(|j| Some(weights[j] * read[seen(r, j)?])).sum();
                gate.push(*d * (y + bias));
                *d *= at(r, 1);
            }
        }
        let (mut taps, mut inputs) = (vec![0.0; kernel], vec![0.0; rows]);
        for (r, d) in d.iter().enumerate() {
            for (j, tap) in taps.iter_mut().enumerate() {
                if let Some(from) = seen(r, j) {
                    *tap += d * read[from];
                    inputs[from] += d * weights[j];
                }
            }
        }
        let bias: f64 = d.iter().sum();
        let columns: Vec<Vec<f64>> = if short {
            let of = |part: usize| inputs.iter().enumerate().map(|(r, d)| d * at(r, part)).collect();
            vec![of(2), gate, of(0)]
        } else {
            vec![inputs.iter().map(|d| d * factor).collect()]
        };
        (columns, taps, bias)
    };
    let all: Vec<_> = (0..channels).into_par_iter().map(one).collect();
    let mut dx = zeros(rows, x.cols());
    let (mut conv, mut bias) = (Vec::with_capacity(channels * kernel), Vec::new());
    for (c, (columns, taps, sum)) in all.into_iter().enumerate() {
        for (part, column) in columns.into_iter().enumerate() {
            column.into_iter().enumerate().for_each(|(r, d)| dx.row_mut(r)[part * channels + c] = d as f32);
        }
        conv.extend(taps.into_iter().map(|t| t as f32));
        bias.extend((!v.bias.is_empty()).then_some(sum as f32));
    }
    ConvolutionGradients { x: dx, conv, bias }
}

/// What one head's way back gives, by row.
struct Head {
    /// Of its own columns, x or v.
    own: Vec<f64>,
    /// Of b or k, and of c or q, which heads share.
    shared: [Vec<f64>; 2],
    dt: Vec<f64>,
    beta: Vec<f64>,
    a: f64,
    d: f64,
}

/// What a mixer's heads read, and the gradients of what they put out.
#[derive(Clone, Copy)]
pub(super) struct Scanned<'a> {
    pub x: MatRef<'a>,
    pub dt: MatRef<'a>,
    pub beta: Option<MatRef<'a>>,
    pub dy: MatRef<'a>,
}

fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// `out[k][i] += by[k] * x[i]`.
fn outer(out: &mut [f64], by: &[f64], x: &[f64]) {
    for (row, by) in out.chunks_exact_mut(x.len()).zip(by) {
        row.iter_mut().zip(x).for_each(|(o, x)| *o += by * x);
    }
}

/// `m x`, of `[high, wide]`.
fn times(m: &[f64], x: &[f64]) -> Vec<f64> {
    m.chunks_exact(x.len()).map(|row| dot(row, x)).collect()
}

/// `mᵀ by`, of `[high, wide]`.
fn times_back(m: &[f64], by: &[f64]) -> Vec<f64> {
    let cols = m.len() / by.len();
    let mut out = vec![0.0; cols];
    for (row, by) in m.chunks_exact(cols).zip(by) {
        out.iter_mut().zip(row).for_each(|(o, m)| *o += by * m);
    }
    out
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Calls `back(row, state before it, state behind it)` from the last row to the first; `step` brings a state over a row.
fn backward(
    rows: usize,
    values: usize,
    step: impl Fn(usize, &mut Vec<f64>),
    mut back: impl FnMut(usize, &[f64], &[f64]),
) {
    let mut state = vec![0.0; values];
    let mut kept = Vec::with_capacity(rows.div_ceil(CHUNK));
    for r in 0..rows {
        if r % CHUNK == 0 {
            kept.push(state.clone());
        }
        step(r, &mut state);
    }
    for (chunk, start) in kept.into_iter().enumerate().rev() {
        let (from, to) = (chunk * CHUNK, ((chunk + 1) * CHUNK).min(rows));
        let mut states = vec![start];
        for r in from..to {
            let mut next = states[r - from].clone();
            step(r, &mut next);
            states.push(next);
        }
        for r in (from..to).rev() {
            back(r, &states[r - from], &states[r - from + 1]);
        }
    }
}

/// `a` as it is stored to the `a` below 0 of the exponent, and the slope of that.
fn exponent(log: bool, stored: f32) -> (f64, f64) {
    let stored = f64::from(stored);
    if log { (-stored.exp(), -stored.exp()) } else { (stored, 1.0) }
}

fn ssd(m: &Ssd, v: &MixerVectors, head: usize, s: Scanned<'_>) -> Head {
    let (rows, high, cols) = (s.x.rows(), m.state, m.head_dim);
    let group = head / (m.heads / m.groups);
    let b_at = m.heads * cols + group * high;
    let c_at = b_at + m.groups * high;
    let part = |r: usize, at: usize, n: usize| wide(&s.x.row(r)[at..at + n]);
    let (a, slope) = exponent(m.log, v.a[head]);
    let skip = f64::from(v.d[head]);
    let (least, most) = (f64::from(m.dt_limit.0), m.dt_limit.1.map_or(f64::INFINITY, f64::from));
    let time = |r: usize| softplus(f64::from(s.dt.at(r, head)));
    let step = |r: usize, state: &mut Vec<f64>| {
        let dt = time(r).clamp(least, most);
        let decay = (a * dt).exp();
        state.iter_mut().for_each(|s| *s *= decay);
        let x: Vec<f64> = part(r, head * cols, cols).iter().map(|x| dt * x).collect();
        outer(state, &part(r, b_at, high), &x);
    };
    let zero = |n: usize| vec![0.0; rows * n];
    let mut out =
        Head { own: zero(cols), shared: [zero(high), zero(high)], dt: zero(1), beta: Vec::new(), a: 0.0, d: 0.0 };
    let mut z = vec![0.0; high * cols];
    backward(rows, high * cols, step, |r, before, after| {
        let (x, b, c) = (part(r, head * cols, cols), part(r, b_at, high), part(r, c_at, high));
        let dy = wide(&s.dy.row(r)[head * cols..][..cols]);
        let dt = time(r).clamp(least, most);
        let decay = (a * dt).exp();
        outer(&mut z, &c, &dy);
        let (by_b, by_x) = (times_back(&z, &b), times(&z, &x));
        let own = &mut out.own[r * cols..][..cols];
        own.iter_mut().zip(&by_b).zip(&dy).for_each(|((o, z), dy)| *o = dt * z + skip * dy);
        out.shared[0][r * high..][..high].iter_mut().zip(&by_x).for_each(|(o, z)| *o = dt * z);
        out.shared[1][r * high..][..high].copy_from_slice(&times(after, &dy));
        out.d += dot(&x, &dy);
        let of_decay = dot(&z, before) * decay;
        out.a += of_decay * dt * slope;
        let of_dt = dot(&by_x, &b) + a * of_decay;
        let raw = time(r);
        out.dt[r] = if raw > least && raw < most { of_dt * sigmoid(f64::from(s.dt.at(r, head))) } else { 0.0 };
        z.iter_mut().for_each(|z| *z *= decay);
    });
    out
}

/// A vector of length 1, and 1 over the length.
fn unit(x: &[f64]) -> (Vec<f64>, f64) {
    let by = 1.0 / (dot(x, x) + 1e-6).sqrt();
    (x.iter().map(|x| x * by).collect(), by)
}

/// The gradient of what [`unit`] read, times `scale`.
fn of_unit((unit, by): &(Vec<f64>, f64), d: &[f64], scale: f64) -> Vec<f64> {
    let along = dot(unit, d);
    unit.iter().zip(d).map(|(u, d)| scale * by * (d - u * along)).collect()
}

fn delta(m: &Delta, v: &MixerVectors, head: usize, s: Scanned<'_>) -> Head {
    let (rows, high, cols) = (s.x.rows(), m.key_dim, m.value_dim);
    let key = key_head(m, head);
    let keys = m.key_heads * high;
    let part = |r: usize, at: usize, n: usize| wide(&s.x.row(r)[at..at + n]);
    let (a, slope) = exponent(m.log, v.a[head]);
    let scale = 1.0 / (high as f64).sqrt();
    let time = |r: usize| softplus(f64::from(s.dt.at(r, head)));
    let write = |r: usize| sigmoid(s.beta.map_or(0.0, |b| f64::from(b.at(r, head))));
    // The state decayed, the key, and what is written of it.
    let parts = |r: usize, before: &[f64]| {
        let decay = (a * time(r)).exp();
        let decayed: Vec<f64> = before.iter().map(|s| s * decay).collect();
        let k = unit(&part(r, keys + key * high, high));
        let told = times_back(&decayed, &k.0);
        let off: Vec<f64> = part(r, 2 * keys + head * cols, cols).iter().zip(&told).map(|(v, told)| v - told).collect();
        (decay, decayed, k, off)
    };
    let step = |r: usize, state: &mut Vec<f64>| {
        let (_, decayed, k, off) = parts(r, state);
        *state = decayed;
        let by = write(r);
        outer(state, &k.0, &off.iter().map(|o| by * o).collect::<Vec<_>>());
    };
    let zero = |n: usize| vec![0.0; rows * n];
    let mut out =
        Head { own: zero(cols), shared: [zero(high), zero(high)], dt: zero(1), beta: zero(1), a: 0.0, d: 0.0 };
    let mut z = vec![0.0; high * cols];
    backward(rows, high * cols, step, |r, before, after| {
        let (decay, decayed, k, off) = parts(r, before);
        let q = unit(&part(r, key * high, high));
        let (by, dy) = (write(r), wide(&s.dy.row(r)[head * cols..][..cols]));
        outer(&mut z, &q.0.iter().map(|q| q * scale).collect::<Vec<_>>(), &dy);
        out.shared[1][r * high..][..high].copy_from_slice(&of_unit(&q, &times(after, &dy), scale));
        let of_written = times_back(&z, &k.0);
        let mut of_key = times(&z, &off.iter().map(|o| by * o).collect::<Vec<_>>());
        out.beta[r] = dot(&of_written, &off) * by * (1.0 - by);
        let of_value: Vec<f64> = of_written.iter().map(|d| by * d).collect();
        out.own[r * cols..][..cols].copy_from_slice(&of_value);
        let of_told: Vec<f64> = of_value.iter().map(|d| -d).collect();
        of_key.iter_mut().zip(times(&decayed, &of_told)).for_each(|(k, d)| *k += d);
        out.shared[0][r * high..][..high].copy_from_slice(&of_unit(&k, &of_key, 1.0));
        outer(&mut z, &k.0, &of_told);
        let of_decay = dot(&z, before) * decay;
        out.a += of_decay * time(r) * slope;
        out.dt[r] = of_decay * a * sigmoid(f64::from(s.dt.at(r, head)));
        z.iter_mut().for_each(|z| *z *= decay);
    });
    out
}

/// What some of Mamba's channels give.
struct Channels {
    /// Of x and of time steps, channel by channel and then row by row.
    own: Vec<f64>,
    dt: Vec<f64>,
    /// Of b and c, `[rows, state]`, of these channels alone.
    shared: [Vec<f64>; 2],
    a: Vec<f32>,
    d: Vec<f32>,
}

/// The channels `from..to` of Mamba.
fn channels(m: &Mamba, v: &MixerVectors, (from, to): (usize, usize), s: Scanned<'_>) -> Channels {
    let (rows, high) = (s.x.rows(), m.state);
    let empty = || vec![0.0; rows * high];
    let (a, d) = (Vec::new(), Vec::new());
    let mut out = Channels { own: Vec::new(), dt: Vec::new(), shared: [empty(), empty()], a, d };
    for i in from..to {
        let x = |r: usize| f64::from(s.x.at(r, i));
        let b = |r: usize, k: usize| f64::from(s.x.at(r, m.channels + k));
        let c = |r: usize, k: usize| f64::from(s.x.at(r, m.channels + high + k));
        let time = |r: usize| softplus(f64::from(s.dt.at(r, i)));
        let a: Vec<(f64, f64)> = (0..high).map(|k| exponent(m.log, v.a[i * high + k])).collect();
        let step = |r: usize, state: &mut Vec<f64>| {
            let dt = time(r);
            state.iter_mut().enumerate().for_each(|(k, s)| *s = (a[k].0 * dt).exp() * *s + dt * x(r) * b(r, k));
        };
        let (mut own, mut of_dt) = (vec![0.0; rows], vec![0.0; rows]);
        let (mut of_a, mut of_d, skip) = (vec![0.0; high], 0.0, f64::from(v.d[i]));
        let mut z = vec![0.0; high];
        backward(rows, high, step, |r, before, after| {
            let (dy, dt) = (f64::from(s.dy.at(r, i)), time(r));
            let mut written = 0.0;
            for k in 0..high {
                z[k] += c(r, k) * dy;
                out.shared[1][r * high + k] += dy * after[k];
                out.shared[0][r * high + k] += dt * x(r) * z[k];
                written += z[k] * b(r, k);
                let decay = (a[k].0 * dt).exp();
                let of_decay = z[k] * before[k] * decay;
                of_a[k] += of_decay * dt * a[k].1;
                of_dt[r] += of_decay * a[k].0;
                z[k] *= decay;
            }
            own[r] = dt * written + skip * dy;
            of_d += x(r) * dy;
            of_dt[r] = (of_dt[r] + written * x(r)) * sigmoid(f64::from(s.dt.at(r, i)));
        });
        out.own.extend(own);
        out.dt.extend(of_dt);
        out.a.extend(of_a.into_iter().map(|a| a as f32));
        out.d.push(of_d as f32);
    }
    out
}

/// Mamba's channels, as many at once as a task has: what b and c get is summed task after task.
fn mamba(m: &Mamba, v: &MixerVectors, s: Scanned<'_>) -> ScanGradients {
    let (rows, high) = (s.x.rows(), m.state);
    let ends: Vec<(usize, usize)> =
        (0..m.channels).step_by(CHANNELS).map(|from| (from, (from + CHANNELS).min(m.channels))).collect();
    let all: Vec<Channels> = ends.par_iter().map(|&ends| channels(m, v, ends, s)).collect();
    let (mut x, mut dt) = (zeros(rows, s.x.cols()), zeros(rows, m.channels));
    let mut shared = vec![0.0f64; rows * 2 * high];
    let (mut a, mut d) = (Vec::new(), Vec::new());
    for (of, (from, to)) in all.into_iter().zip(ends) {
        for r in 0..rows {
            for i in from..to {
                x.row_mut(r)[i] = of.own[(i - from) * rows + r] as f32;
                dt.row_mut(r)[i] = of.dt[(i - from) * rows + r] as f32;
            }
            for (part, sums) in of.shared.iter().enumerate() {
                let to = &mut shared[(2 * r + part) * high..][..high];
                to.iter_mut().zip(&sums[r * high..]).for_each(|(o, d)| *o += d);
            }
        }
        a.extend(of.a);
        d.extend(of.d);
    }
    for r in 0..rows {
        let beside = &mut x.row_mut(r)[m.channels..];
        beside.iter_mut().zip(&shared[r * 2 * high..]).for_each(|(o, d)| *o = *d as f32);
    }
    ScanGradients { x, dt, beta: None, a, d }
}

fn key_head(m: &Delta, head: usize) -> usize {
    if m.tiled { head % m.key_heads } else { head / (m.value_heads / m.key_heads) }
}

/// The gradients of everything that a mixer's heads read of a whole sequence.
pub(super) fn scan(mixer: &Mixer, v: &MixerVectors, s: Scanned<'_>) -> ScanGradients {
    if let Mixer::Mamba(m) = mixer {
        return mamba(m, v, s);
    }
    let (heads, high, cols) = mixer.heads().unwrap_or_default();
    let one = |head: usize| match mixer {
        Mixer::Ssd(m) => Some(ssd(m, v, head, s)),
        Mixer::Delta(m) => Some(delta(m, v, head, s)),
        Mixer::ShortConv(_) | Mixer::Mamba(_) => None,
    };
    let all: Vec<Option<Head>> = (0..heads).into_par_iter().map(one).collect();
    // Where the shared columns of a head begin: those of b or k, and of c or q.
    let places = |head: usize| match mixer {
        Mixer::Ssd(m) => {
            let b = heads * cols + head / (m.heads / m.groups) * high;
            (head * cols, [b, b + m.groups * high])
        }
        Mixer::Delta(m) => {
            let (key, keys) = (key_head(m, head) * high, m.key_heads * high);
            (2 * keys + head * cols, [keys + key, key])
        }
        Mixer::ShortConv(_) | Mixer::Mamba(_) => (0, [0, 0]),
    };
    let rows = s.x.rows();
    let mut sums = vec![0.0f64; rows * s.x.cols()];
    let (mut dt, mut beta) = (zeros(rows, heads), s.beta.map(|_| zeros(rows, heads)));
    let (mut a, mut d) = (Vec::new(), Vec::new());
    for (head, of) in all.into_iter().enumerate() {
        let Some(of) = of else { continue };
        let (own, shared) = places(head);
        for r in 0..rows {
            let row = &mut sums[r * s.x.cols()..][..s.x.cols()];
            let mut add = |at: usize, n: usize, from: &[f64]| {
                row[at..at + n].iter_mut().zip(&from[r * n..]).for_each(|(o, d)| *o += d);
            };
            add(own, cols, &of.own);
            shared.iter().zip(&of.shared).for_each(|(at, from)| add(*at, high, from));
            dt.row_mut(r)[head] = of.dt[r] as f32;
            if let Some(beta) = &mut beta {
                beta.row_mut(r)[head] = of.beta[r] as f32;
            }
        }
        a.push(of.a as f32);
        d.extend((!v.d.is_empty()).then_some(of.d as f32));
    }
    let mut x = zeros(rows, s.x.cols());
    x.data_mut().iter_mut().zip(sums).for_each(|(o, d)| *o = d as f32);
    ScanGradients { x, dt, beta, a, d }
}
