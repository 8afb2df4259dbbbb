//! The slow twin: the decoder's operations in f64, straight loops from their definitions. For tests: it shares no
//! arithmetic with the kernels. Keys and values are kept as they are, whatever the format, and activations are exact.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use lacuna_base::{Mat, Mat64, MatRef};
use lacuna_contract::{Pool, PromptAsk, SelectPrompt, SelectScope};
use lacuna_format::Stored;
use lacuna_kernels::{Activations, Attention, KEY_BLOCK, KvFormat, KvLayout, Mass};
use lacuna_spec::{Activation, Experts, Mixer, Norm, NormKind, Place, Rope, RopeStyle, RouterScore, Temperature};

use super::frequencies::frequencies;
use super::gate::leave;
pub use super::naive_mixer::NaiveMixer;
use super::select::PooledKeys;
use super::{
    Asks, Backend, GateAsk, Host, Measure, MixerVectors, NO_CHOICE, Pages, PromptRead, Reads, Routes, SlotStates,
    Tables, Xielu,
};
use crate::{Batch, ModelError};

/// f64 and loops.
#[derive(Clone, Copy, Debug, Default)]
pub struct Naive;

/// A dense matrix, `[outputs, inputs]`, and its bias.
pub struct Matrix {
    w: Mat64,
    bias: Vec<f64>,
    measure: Measure,
}

/// A normalisation and its vectors.
pub struct NormOf {
    norm: Norm,
    width: usize,
    scale: Vec<f64>,
    bias: Vec<f64>,
}

/// Rows of one step and their block tables.
pub struct Step {
    batch: Batch,
    tables: Tables,
}

impl Step {
    /// What each run of rows gives, row by row, from its state.
    fn mixed(
        &self,
        states: &mut SlotStates<f64>,
        layer: usize,
        begin: bool,
        f: impl Fn(Range<usize>, &mut [f64]) -> Vec<Vec<f64>>,
    ) -> Mat64 {
        let mut out = vec![Vec::new(); self.batch.rows()];
        states.lend(self.tables.states_of(layer), &self.batch, begin, |runs| {
            for (rows, state) in runs {
                rows.clone().zip(f(rows, state)).for_each(|(r, row)| out[r] = row);
            }
        });
        let cols = out.first().map_or(0, Vec::len);
        Mat64::from_vec(out.len(), cols, out.concat())
    }
}

/// Keys and values of each block, `[page_tokens][kv_heads * head_dim]` each.
#[derive(Clone, Debug)]
pub struct NaivePages {
    layout: KvLayout,
    blocks: HashMap<u32, [Vec<f64>; 2]>,
}

impl NaivePages {
    fn width(&self) -> usize {
        self.layout.kv_heads * self.layout.head_dim
    }
}

impl Pages for NaivePages {
    fn block_bytes(&self) -> usize {
        2 * 8 * self.layout.page_tokens * self.width()
    }
    fn reserve(&mut self, block: u32) {
        let empty = || vec![0.0; self.layout.page_tokens * self.layout.kv_heads * self.layout.head_dim];
        self.blocks.entry(block).or_insert_with(|| [empty(), empty()]);
    }
    fn release(&mut self, block: u32) {
        self.blocks.remove(&block);
    }
    fn copy(&mut self, from: u32, to: u32) {
        if let Some(page) = self.blocks.get(&from).cloned() {
            self.blocks.insert(to, page);
        }
    }
    fn gather(&mut self, table: &[u32], to: u32, kept: &[&[usize]]) {
        let (n, dim, width) = (self.layout.page_tokens, self.layout.head_dim, self.width());
        for (head, kept) in kept.iter().enumerate() {
            for (i, slot) in kept.iter().enumerate() {
                for side in 0..2 {
                    let from = &self.blocks[&table[slot / n]][side][slot % n * width + head * dim..][..dim];
                    let entry = from.to_vec();
                    let page = self.blocks.get_mut(&to).expect("a block that was reserved");
                    page[side][i * width + head * dim..][..dim].copy_from_slice(&entry);
                }
            }
        }
    }
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// `x · Wᵀ + b` of rows of `inputs` values; `w` is `[outputs, inputs]`, `b` empty or `[outputs]`.
pub(crate) fn linear(x: &[f64], w: &[f64], b: &[f64], inputs: usize) -> Vec<f64> {
    let row = |x: &[f64]| -> Vec<f64> {
        let one = |(o, w): (usize, &[f64])| {
            x.iter().zip(w).map(|(x, w)| x * w).sum::<f64>() + b.get(o).copied().unwrap_or(0.0)
        };
        w.chunks(inputs).enumerate().map(one).collect()
    };
    x.chunks(inputs).flat_map(row).collect()
}

/// Rows of `cols`, normalised; `scale` has as many values, or as many for each of some rows, which take turns; `bias`
/// is empty or has as many values as `scale`.
pub(crate) fn norm(n: Norm, cols: usize, scale: &[f64], bias: &[f64], x: &[f64]) -> Vec<f64> {
    let row = |(r, x): (usize, &[f64])| -> Vec<f64> {
        let turn = r % (scale.len() / cols) * cols;
        let mean = if n.kind == NormKind::Layer { x.iter().sum::<f64>() / cols as f64 } else { 0.0 };
        let var = x.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / n.divisor.unwrap_or(cols) as f64;
        let by = (var + f64::from(n.eps)).sqrt();
        let one = |(i, v): (usize, &f64)| {
            (v - mean) / by * (scale[turn + i] + f64::from(n.offset)) + bias.get(turn + i).copied().unwrap_or(0.0)
        };
        x.iter().enumerate().map(one).collect()
    };
    x.chunks(cols).enumerate().flat_map(row).collect()
}

/// The error function, by its Maclaurin series.
fn erf(x: f64) -> f64 {
    if x.abs() > 5.0 {
        return x.signum();
    }
    let (mut term, mut sum) = (x, x);
    for n in 1..200 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    sum * std::f64::consts::FRAC_2_SQRT_PI
}

/// One value's activation.
pub(crate) fn activation(act: Activation, x: f64) -> f64 {
    match act {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::Gelu => 0.5 * x * (1.0 + erf(x * std::f64::consts::FRAC_1_SQRT_2)),
        Activation::GeluTanh => {
            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh())
        }
        Activation::Relu => x.max(0.0),
        Activation::SwigluOai => x.min(7.0) / (1.0 + (-1.702 * x.min(7.0)).exp()),
        Activation::Relu2 => x.max(0.0).powi(2),
        Activation::Xielu => unreachable!("its numbers are a layer's own: `xielu`"),
        Activation::Sigmoid => 1.0 / (1.0 + (-x).exp()),
    }
}

/// One value's xIELU with its two factors.
pub(crate) fn xielu([above, below]: [f64; 2], x: f64) -> f64 {
    if x > 0.0 { above * x * x + 0.5 * x } else { (x.min(-1e-6).exp_m1() - x) * below + 0.5 * x }
}

/// ALiBi's slope of a head.
fn slope(p: &Attention, head: usize) -> f64 {
    let Some(most) = p.alibi else { return 0.0 };
    let list = |n: usize| (1..=n).map(move |i| (-f64::from(most) * i as f64 / n as f64).exp2());
    let mut below = 1;
    while 2 * below <= p.heads {
        below *= 2;
    }
    list(below).chain(list(2 * below).step_by(2)).nth(head).expect("a head of so many")
}

/// What an activation is multiplied with.
pub(crate) fn beside(act: Activation, up: f64) -> f64 {
    if act == Activation::SwigluOai { up.clamp(-7.0, 7.0) + 1.0 } else { up }
}

/// The softmax of a row.
pub(crate) fn softmax(row: &[f64]) -> Vec<f64> {
    let top = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = row.iter().map(|x| (x - top).exp()).sum();
    row.iter().map(|x| (x - top).exp() / total).collect()
}

/// Causal attention of one query row, `[heads * dim]`, at `position`: `key(t)` and `value(t)` are `[kv_heads * dim]`.
fn attend<'a>(
    p: &Attention,
    dim: usize,
    kv_heads: usize,
    (q, position): (&[f64], usize),
    key: impl Fn(usize) -> &'a [f64],
    value: impl Fn(usize) -> &'a [f64],
) -> Vec<f64> {
    attend_seen(p, dim, kv_heads, (q, position), key, value, |_, _| true)
}

/// The same over the keys that `seen(key head, position)` says.
fn attend_seen<'a>(
    p: &Attention,
    dim: usize,
    kv_heads: usize,
    (q, position): (&[f64], usize),
    key: impl Fn(usize) -> &'a [f64],
    value: impl Fn(usize) -> &'a [f64],
    seen: impl Fn(usize, usize) -> bool,
) -> Vec<f64> {
    let mut out = vec![0.0; p.heads * dim];
    for (h, out) in out.chunks_mut(dim).enumerate() {
        let kv_head = h / (p.heads / kv_heads);
        let at = kv_head * dim;
        let (weights, sink) = weights(p, dim, kv_heads, (q, position), h, &key);
        let weights: Vec<(usize, f64)> = weights.into_iter().filter(|(t, _)| seen(kv_head, *t)).collect();
        // Weights of the softmax over all keys, divided by what those that are seen, and the sink, have of it.
        let total: f64 = sink + weights.iter().map(|(_, w)| w).sum::<f64>();
        for (t, w) in weights.into_iter().map(|(t, w)| (t, w / total)) {
            out.iter_mut().zip(&value(t)[at..]).for_each(|(o, v)| *o += w * v);
        }
    }
    out
}

/// The means of some keys, or the least of each component and then the greatest.
fn pool(by: Pool, dim: usize, keys: &[&[f64]]) -> Vec<f32> {
    let each = |f: &dyn Fn(&mut dyn Iterator<Item = f64>) -> f64| -> Vec<f32> {
        (0..dim).map(|d| f(&mut keys.iter().map(|k| k[d])) as f32).collect()
    };
    match by {
        Pool::Mean => each(&|k| k.sum::<f64>() / keys.len() as f64),
        Pool::Bounds => {
            [each(&|k| k.fold(f64::INFINITY, f64::min)), each(&|k| k.fold(f64::NEG_INFINITY, f64::max))].concat()
        }
    }
}

/// The keys that one head of a query sees, with their weights, and the weight of its sink.
fn weights<'a>(
    p: &Attention,
    dim: usize,
    kv_heads: usize,
    (q, position): (&[f64], usize),
    head: usize,
    key: &impl Fn(usize) -> &'a [f64],
) -> (Vec<(usize, f64)>, f64) {
    let at = head / (p.heads / kv_heads) * dim;
    let low = p.window.map_or(0, |w| (position + 1).saturating_sub(w));
    let low = (low..=position).find(|t| p.chunk.is_none_or(|c| t / c == position / c)).unwrap_or(position);
    let score = |t: usize| {
        let s: f64 = q[head * dim..][..dim].iter().zip(&key(t)[at..]).map(|(q, k)| q * k).sum();
        let s = s * f64::from(p.scale);
        let s = p.softcap.map_or(s, |c| f64::from(c) * (s / f64::from(c)).tanh());
        s - slope(p, head) * (position - t) as f64
    };
    let sink = p.sinks.as_ref().map_or(f64::NEG_INFINITY, |s| f64::from(s[head]));
    let mut all = softmax(&(low..=position).map(score).chain([sink]).collect::<Vec<_>>());
    let sink = all.pop().unwrap_or(0.0);
    ((low..=position).zip(all).collect(), sink)
}

/// Causal attention of one sequence from its start: `q` is `[tokens, heads * dim]`, `k` and `v`
/// `[tokens, kv_heads * dim]`.
#[cfg(test)]
pub(crate) fn attention(p: &Attention, dim: usize, kv_heads: usize, q: &[f64], k: &[f64], v: &[f64]) -> Vec<f64> {
    let narrow = kv_heads * dim;
    let row = |(t, q): (usize, &[f64])| {
        attend(p, dim, kv_heads, (q, t), |t| &k[t * narrow..][..narrow], |t| &v[t * narrow..][..narrow])
    };
    q.chunks(p.heads * dim).enumerate().flat_map(row).collect()
}

impl Backend for Naive {
    type Matrix = Matrix;
    type Experts = Vec<Matrix>;
    type Norm = NormOf;
    type Table = Arc<Stored>;
    type Rope = Rope;
    type Rows = Mat64;
    type Ids = Vec<u32>;
    type Routes = Routes<f64>;
    type Pages = NaivePages;
    type Mixer = NaiveMixer;
    type States = SlotStates<f64>;
    type Step = Step;

    fn matrix(
        &self,
        place: &Place,
        stored: &Stored,
        bias: Option<Vec<f32>>,
        _: Activations,
        release: &dyn Fn(),
    ) -> Result<Matrix, ModelError> {
        stored.check().map_err(|e| ModelError::bad(place, e))?;
        let w = Mat64::from_f32(stored.to_mat().view());
        release();
        let measure = Measure { work: [(w.rows() * w.cols()) as u64, 0], bytes: 8 * (w.rows() * w.cols()) as u64 };
        Ok(Matrix { w, bias: wide(&bias.unwrap_or_default()), measure })
    }

    fn experts(&self, all: Vec<Matrix>) -> Vec<Matrix> {
        all
    }

    fn measure(&self, matrix: &Matrix) -> Measure {
        matrix.measure
    }

    fn norm_of(&self, _: &Place, norm: Norm, width: usize, scale: Option<Vec<f32>>, bias: Option<Vec<f32>>) -> NormOf {
        let scale = scale.map_or_else(|| vec![1.0 - f64::from(norm.offset); width], |s| wide(&s));
        NormOf { norm, width, scale, bias: wide(&bias.unwrap_or_default()) }
    }

    fn table(&self, stored: Arc<Stored>) -> Arc<Stored> {
        stored
    }

    fn rope_of(&self, rope: &Rope) -> Rope {
        rope.clone()
    }

    fn pages(&self, layout: KvLayout, _: KvFormat) -> NaivePages {
        NaivePages { layout, blocks: HashMap::new() }
    }

    fn mixer_of(&self, _: &Place, mixer: &Mixer, hidden: usize, vectors: MixerVectors) -> NaiveMixer {
        NaiveMixer::new(mixer, hidden, vectors)
    }

    fn states(&self, mixer: &Mixer, hidden: usize) -> SlotStates<f64> {
        SlotStates::new(mixer, hidden)
    }

    fn begin(&self, batch: &Batch, tables: Tables) -> Step {
        Step { batch: batch.clone(), tables }
    }

    fn finish(&self) -> Result<(), ModelError> {
        Ok(())
    }

    fn upload(&self, x: MatRef<'_>) -> Mat64 {
        Mat64::from_f32(x)
    }

    fn upload_ids(&self, ids: &[u32]) -> Vec<u32> {
        ids.to_vec()
    }

    fn download<'a>(&self, x: &'a Mat64, rows: Range<usize>) -> Result<Host<'a>, ModelError> {
        let all: Vec<usize> = rows.collect();
        Ok(Host::Brought(self.pick(x, &all).to_f32()))
    }

    fn download_ids(&self, ids: &Vec<u32>) -> Result<Vec<u32>, ModelError> {
        Ok(ids.clone())
    }

    fn download_starts(&self, routes: &Routes<f64>) -> Result<Vec<usize>, ModelError> {
        Ok(routes.starts.clone())
    }

    fn shape(&self, x: &Mat64) -> (usize, usize) {
        (x.rows(), x.cols())
    }

    fn copy(&self, x: &Mat64) -> Mat64 {
        x.clone()
    }

    fn pick(&self, x: &Mat64, rows: &[usize]) -> Mat64 {
        Mat64::from_fn(rows.len(), x.cols(), |r, c| x.row(rows[r])[c])
    }

    fn embed(&self, table: &Arc<Stored>, ids: &Vec<u32>) -> Mat64 {
        let all = table.to_mat();
        let row = |id: u32| if (id as usize) < table.rows { id as usize } else { 0 };
        Mat64::from_fn(ids.len(), table.cols, |r, c| f64::from(all[(row(ids[r]), c)]))
    }

    fn products<const N: usize>(&self, all: [&Matrix; N], x: &Mat64) -> [Mat64; N] {
        all.map(|m| {
            let out = linear(x.data(), m.w.data(), &m.bias, x.cols());
            Mat64::from_vec(x.rows(), m.w.rows(), out)
        })
    }

    fn products_gated(&self, all: &[&Matrix], x: &Mat64, ask: &GateAsk<'_>) -> Result<(Vec<Mat64>, Reads), ModelError> {
        let (mut x, mut reads) = (x.clone(), Reads::default());
        for r in 0..x.rows() {
            let row: Vec<f32> = x.row(r).iter().map(|&x| x as f32).collect();
            let channels = ask.channels(&row)?;
            let outputs = 8 * all.iter().map(|m| m.w.rows() as u64).sum::<u64>();
            reads.read += outputs * channels.as_ref().map_or(row.len(), Vec::len) as u64;
            reads.all += outputs * row.len() as u64;
            channels.iter().for_each(|channels| leave(x.row_mut(r), channels));
        }
        let one = |m: &&Matrix| {
            let [out] = self.products([*m], &x);
            out
        };
        Ok((all.iter().map(one).collect(), reads))
    }

    fn norm(&self, n: &NormOf, x: &Mat64) -> Mat64 {
        Mat64::from_vec(x.rows(), x.cols(), norm(n.norm, n.width, &n.scale, &n.bias, x.data()))
    }

    fn norm_pieces(&self, n: &NormOf, pieces: usize, x: &Mat64) -> Mat64 {
        if pieces == 1 {
            return self.norm(n, x);
        }
        let wide = x.cols() / pieces;
        let mut out = Mat64::zeros(x.rows(), x.cols());
        for r in 0..x.rows() {
            for from in (0..x.cols()).step_by(wide) {
                let bias = n.bias.get(from..from + wide).unwrap_or_default();
                let piece = norm(n.norm, wide, &n.scale[from..from + wide], bias, &x.row(r)[from..from + wide]);
                out.row_mut(r)[from..from + wide].copy_from_slice(&piece);
            }
        }
        out
    }

    fn convolve(
        &self,
        mixer: &NaiveMixer,
        states: &mut SlotStates<f64>,
        layer: usize,
        step: &Step,
        x: &Mat64,
    ) -> Mat64 {
        step.mixed(states, layer, true, |rows, state| rows.map(|r| mixer.convolve(state, x.row(r))).collect())
    }

    fn scan(
        &self,
        mixer: &NaiveMixer,
        states: &mut SlotStates<f64>,
        layer: usize,
        step: &Step,
        [x, dt]: [&Mat64; 2],
        beta: Option<&Mat64>,
    ) -> Mat64 {
        step.mixed(states, layer, false, |rows, state| {
            rows.map(|r| mixer.heads(state, x.row(r), dt.row(r), beta.map(|b| b.row(r)))).collect()
        })
    }

    fn rope<const N: usize>(&self, rope: &Rope, head_dim: usize, step: &Step, x: [&mut Mat64; N]) {
        for x in x {
            for (r, (position, length)) in step.batch.places().enumerate() {
                let (freq, factor) = frequencies(rope, length);
                for head in x.row_mut(r).chunks_mut(head_dim) {
                    for (i, f) in freq.iter().enumerate() {
                        let (a, b) = match rope.style {
                            RopeStyle::Half => (i, i + freq.len()),
                            RopeStyle::Interleaved => (2 * i, 2 * i + 1),
                        };
                        let (s, c) = (position as f64 * f).sin_cos();
                        let (u, v) = (head[a], head[b]);
                        (head[a], head[b]) = (factor * (u * c - v * s), factor * (v * c + u * s));
                    }
                }
            }
        }
    }

    fn activate(&self, act: Activation, x: &mut Mat64, up: Option<&Mat64>) {
        x.data_mut().iter_mut().for_each(|x| *x = activation(act, *x));
        if let Some(up) = up {
            x.data_mut().iter_mut().zip(up.data()).for_each(|(x, up)| *x *= beside(act, *up));
        }
    }

    fn xielu(&self, of: Xielu, x: &mut Mat64) {
        x.data_mut().iter_mut().for_each(|x| *x = xielu(of.factors(), *x));
    }

    fn clip(&self, x: &mut Mat64, by: f32) {
        x.data_mut().iter_mut().for_each(|x| *x = x.clamp(-f64::from(by), f64::from(by)));
    }

    fn temper(&self, by: Temperature, step: &Step, x: &mut Mat64) {
        for (r, &p) in step.batch.positions().iter().enumerate() {
            x.row_mut(r).iter_mut().for_each(|x| *x *= by.at(p));
        }
    }

    fn add(&self, x: &mut Mat64, y: &Mat64) {
        x.data_mut().iter_mut().zip(y.data()).for_each(|(x, y)| *x += y);
    }

    fn scale(&self, x: &mut Mat64, by: f32) {
        x.data_mut().iter_mut().for_each(|x| *x *= f64::from(by));
    }

    fn softcap(&self, x: &mut Mat64, cap: f32) {
        let cap = f64::from(cap);
        x.data_mut().iter_mut().for_each(|x| *x = cap * (*x / cap).tanh());
    }

    fn weigh_rows(&self, x: &mut Mat64, by: &Mat64) {
        for r in 0..x.rows() {
            let by = 1.0 / (1.0 + (-by.row(r)[0]).exp());
            x.row_mut(r).iter_mut().for_each(|x| *x *= by);
        }
    }

    fn mix(&self, x: &Mat64, ins: usize, by: &Mat64) -> Mat64 {
        let (width, outs) = (x.cols() / ins, by.cols() / ins);
        Mat64::from_fn(x.rows(), outs * width, |r, c| {
            (0..ins).map(|j| by.row(r)[c / width * ins + j] * x.row(r)[j * width + c % width]).sum()
        })
    }

    fn scale_columns(&self, _: &Place, x: &mut Mat64, by: &Mat64) {
        *x = Mat64::from_fn(x.rows(), x.cols(), |r, c| x.row(r)[c] * by.row(0)[c]);
    }

    fn match_magnitude(&self, x: &mut Mat64, like: &Mat64) {
        for r in 0..x.rows() {
            let square = |row: &[f64]| row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64;
            let by = (square(like.row(r)) / square(x.row(r)).max(1e-5)).sqrt();
            x.row_mut(r).iter_mut().for_each(|x| *x *= by);
        }
    }

    fn cut_off(&self, x: &mut Mat64, by: f32) {
        for r in 0..x.rows() {
            let n = x.cols() as f64;
            let mean = x.row(r).iter().sum::<f64>() / n;
            let square = x.row(r).iter().map(|x| x * x).sum::<f64>() / n;
            let cutoff = mean + f64::from(by) * (square - mean * mean).sqrt();
            x.row_mut(r).iter_mut().for_each(|x| *x = if *x > cutoff { *x - cutoff } else { 0.0 });
        }
    }

    fn columns(&self, x: &Mat64, width: usize, which: Range<usize>) -> Mat64 {
        let n = which.len();
        Mat64::from_fn(x.rows(), x.cols() / width * n, |r, c| x.row(r)[c / n * width + which.start + c % n])
    }

    fn beside(&self, all: [&Mat64; 2], [a, b]: [usize; 2]) -> Mat64 {
        Mat64::from_fn(all[0].rows(), all[0].cols() + all[1].cols(), |r, c| {
            let (piece, c) = (c / (a + b), c % (a + b));
            if c < a { all[0].row(r)[piece * a + c] } else { all[1].row(r)[piece * b + c - a] }
        })
    }

    fn head_products(&self, all: &Vec<Matrix>, x: &Mat64) -> Mat64 {
        let inputs = x.cols() / all.len();
        let one = |(h, m): (usize, &Matrix)| {
            let mine = self.columns(x, x.cols(), h * inputs..(h + 1) * inputs);
            linear(mine.data(), m.w.data(), &m.bias, inputs)
        };
        let made: Vec<Vec<f64>> = all.iter().enumerate().map(one).collect();
        let n = all[0].w.rows();
        Mat64::from_fn(x.rows(), all.len() * n, |r, c| made[c / n][r * n + c % n])
    }

    fn write(&self, pages: &mut NaivePages, layer: usize, step: &Step, keys: &Mat64, values: &Mat64) {
        let (n, width) = (pages.layout.page_tokens, pages.width());
        for ((sequence, rows), table) in step.batch.runs().zip(step.tables.of(layer)) {
            for r in step.batch.written(sequence, rows) {
                let p = step.batch.positions()[r] - table.shift;
                let block = pages.blocks.get_mut(&table.blocks[p / n]).expect("a block that was reserved");
                for (to, from) in block.iter_mut().zip([keys, values]) {
                    to[p % n * width..][..width].copy_from_slice(from.row(r));
                }
            }
        }
    }

    fn attend(&self, how: &Attention, pages: &NaivePages, layer: usize, step: &Step, q: &Mat64) -> Mat64 {
        let (n, width) = (pages.layout.page_tokens, pages.width());
        let mut out = Mat64::zeros(q.rows(), q.cols());
        for ((_, rows), table) in step.batch.runs().zip(step.tables.of(layer)) {
            for r in rows {
                let slot = step.batch.positions()[r] - table.shift;
                let of =
                    |side: usize| move |t: usize| &pages.blocks[&table.blocks[t / n]][side][t % n * width..][..width];
                let (dim, kv_heads) = (pages.layout.head_dim, pages.layout.kv_heads);
                let mixed = attend(how, dim, kv_heads, (q.row(r), slot), of(0), of(1));
                out.row_mut(r).copy_from_slice(&mixed);
            }
        }
        out
    }

    fn attend_chosen(
        &self,
        how: &Attention,
        pages: &NaivePages,
        layer: usize,
        step: &Step,
        q: &Mat64,
        asks: Asks<'_>,
    ) -> Result<(Mat64, Reads), ModelError> {
        let (n, width, plan) = (pages.layout.page_tokens, pages.width(), asks.select.plan());
        let (dim, kv_heads) = (pages.layout.head_dim, pages.layout.kv_heads);
        let (group, mut reads) = (how.heads / kv_heads, Reads::default());
        let mut out = Mat64::zeros(q.rows(), q.cols());
        for ((_, rows), table) in step.batch.runs().zip(step.tables.of(layer)) {
            for r in rows.clone() {
                let (slot, at) = (step.batch.positions()[r] - table.shift, step.batch.positions()[r]);
                // The row that asks: this one, or the first of its tile, which must be in the same call.
                let back = if let SelectScope::Tile(tile) = plan.scope { at % tile.max(1) } else { 0 };
                let Some(asking) = r.checked_sub(back).filter(|first| rows.contains(first)) else {
                    let what = format!("position {at} reads what was decided {back} positions before, in another call");
                    return Err(ModelError::Store { what });
                };
                let first = slot - back;
                let of =
                    |side: usize| move |t: usize| &pages.blocks[&table.blocks[t / n]][side][t % n * width..][..width];
                let mut read = Vec::with_capacity(kv_heads);
                for head in 0..kv_heads {
                    let pooled: Vec<Vec<f32>> = (0..first / KEY_BLOCK)
                        .map(|block| {
                            let keys = (0..KEY_BLOCK).map(|i| &of(0)(block * KEY_BLOCK + i)[head * dim..][..dim]);
                            pool(plan.pool, dim, &keys.collect::<Vec<_>>())
                        })
                        .collect();
                    let pooled = PooledKeys::new(plan, dim, first, |nth| pooled.get(nth).map(Vec::as_slice))?;
                    let mine = &q.row(asking)[head * group * dim..][..group * dim];
                    let queries = Mat::from_fn(group, dim, |i, c| mine[i * dim + c] as f32);
                    let blocks = pooled.decide(asks.select, (layer, head), queries.view(), first)?.at(slot);
                    reads.row(slot, blocks.as_deref(), 2 * 8 * dim as u64);
                    read.push(blocks);
                }
                let seen = |head: usize, t: usize| {
                    let block = t / KEY_BLOCK;
                    block == slot / KEY_BLOCK || read[head].as_ref().is_none_or(|blocks| blocks.contains(&block))
                };
                let mixed = attend_seen(how, dim, kv_heads, (q.row(r), slot), of(0), of(1), seen);
                out.row_mut(r).copy_from_slice(&mixed);
            }
        }
        Ok((out, reads))
    }

    fn foresee(
        &self,
        how: &Attention,
        pages: &NaivePages,
        layer: usize,
        step: &Step,
        q: &[&Mat64],
        by: &dyn SelectPrompt,
    ) -> Result<PromptRead, ModelError> {
        let (n, width) = (pages.layout.page_tokens, pages.width());
        let (dim, kv_heads) = (pages.layout.head_dim, pages.layout.kv_heads);
        let wide = how.heads / kv_heads * dim;
        let Some(table) = step.tables.of(layer).next() else { return Ok(PromptRead::ALL) };
        let rows: Vec<&[f64]> = q.iter().flat_map(|q| (0..q.rows()).map(move |r| q.row(r))).collect();
        let mut answers = Vec::with_capacity(kv_heads);
        for head in 0..kv_heads {
            let queries = Mat::from_fn(rows.len(), wide, |r, c| rows[r][head * wide + c] as f32);
            let keys = Mat::from_fn(rows.len(), dim, |t, c| {
                pages.blocks[&table.blocks[t / n]][0][t % n * width + head * dim + c] as f32
            });
            let ask = PromptAsk { layer, head, scale: how.scale, queries: queries.view(), keys: keys.view() };
            answers.push(by.select(&ask).map_err(|e| ModelError::Select { what: e.to_string() })?);
        }
        PromptRead::new(layer, (by.tile(), rows.len()), answers)
    }

    fn attend_foreseen(
        &self,
        how: &Attention,
        pages: &NaivePages,
        layer: usize,
        step: &Step,
        q: &Mat64,
        read: &PromptRead,
    ) -> Result<(Mat64, Reads), ModelError> {
        let (n, width) = (pages.layout.page_tokens, pages.width());
        let (dim, kv_heads) = (pages.layout.head_dim, pages.layout.kv_heads);
        let (mut out, mut reads) = (Mat64::zeros(q.rows(), q.cols()), Reads::default());
        for ((_, rows), table) in step.batch.runs().zip(step.tables.of(layer)) {
            for r in rows {
                let at = step.batch.positions()[r];
                let of =
                    |side: usize| move |t: usize| &pages.blocks[&table.blocks[t / n]][side][t % n * width..][..width];
                let blocks: Vec<_> = (0..kv_heads).map(|head| read.at(head, at)).collect();
                blocks.iter().for_each(|blocks| reads.row(at, blocks.as_deref(), 2 * 8 * dim as u64));
                let seen = |head: usize, t: usize| {
                    let block = t / KEY_BLOCK;
                    block == at / KEY_BLOCK || blocks[head].as_ref().is_none_or(|blocks| blocks.contains(&block))
                };
                let mixed = attend_seen(how, dim, kv_heads, (q.row(r), at), of(0), of(1), seen);
                out.row_mut(r).copy_from_slice(&mixed);
            }
        }
        Ok((out, reads))
    }

    fn weigh(&self, how: &Attention, pages: &NaivePages, layer: usize, step: &Step, q: &Mat64, mass: &mut [Mass]) {
        let (n, width) = (pages.layout.page_tokens, pages.width());
        let (dim, kv_heads) = (pages.layout.head_dim, pages.layout.kv_heads);
        for (((_, rows), table), mass) in step.batch.runs().zip(step.tables.of(layer)).zip(mass) {
            for r in rows {
                let slot = step.batch.positions()[r] - table.shift;
                let key = |t: usize| &pages.blocks[&table.blocks[t / n]][0][t % n * width..][..width];
                for (g, of_head) in mass.heads.iter_mut().enumerate() {
                    let mut given = vec![0.0; slot + 1];
                    for h in 0..how.heads / kv_heads {
                        let head = g * (how.heads / kv_heads) + h;
                        let (weights, _) = weights(how, dim, kv_heads, (q.row(r), slot), head, &key);
                        weights.into_iter().for_each(|(t, w)| given[t] += w);
                    }
                    let given: Vec<f32> = given.iter().map(|g| *g as f32).collect();
                    of_head.take(slot, mass.certain, &given);
                }
            }
        }
    }

    fn route(&self, logits: &Mat64, choice: Experts, correction: Option<&Mat64>, scale: Option<&Mat64>) -> Routes<f64> {
        let of_row = |r: usize| {
            let p = match choice.score {
                RouterScore::Softmax => softmax(logits.row(r)),
                RouterScore::Sigmoid => logits.row(r).iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect(),
            };
            let by = |e: usize| p[e] + correction.map_or(0.0, |c| c.row(0)[e]);
            let mut order: Vec<usize> = (0..p.len()).collect();
            order.sort_by(|&a, &b| by(b).total_cmp(&by(a)));
            if let Some(g) = choice.groups {
                let group = |e: usize| e * g.count / p.len();
                // Best first, so that a group's first ones are what it is compared by.
                let of = |i: usize| order.iter().filter(|e| group(**e) == i).take(g.by).map(|e| by(*e)).sum::<f64>();
                let better = |i: usize, j: usize| of(j) > of(i) || (of(j) == of(i) && j < i);
                let ahead = |i: usize| (0..g.count).filter(|j| better(i, *j)).count();
                let stays: Vec<bool> = (0..g.count).map(|i| ahead(i) < g.used).collect();
                order.retain(|e| stays[group(*e)]);
            }
            order.truncate(choice.used);
            let total: f64 = if choice.normalize { order.iter().map(|&e| p[e]).sum() } else { 1.0 };
            let own = |e: usize| scale.map_or(1.0, |s| s.row(0)[e]);
            order.into_iter().map(|e| (e, p[e] / total * f64::from(choice.scale) * own(e))).collect()
        };
        let chosen: Vec<Vec<(usize, f64)>> = (0..logits.rows()).map(of_row).collect();
        Routes::new(choice, &chosen)
    }

    fn gather(&self, x: &Mat64, routes: &Routes<f64>) -> Mat64 {
        let by = |i: usize| if routes.weigh_inputs { routes.weights[i] } else { 1.0 };
        Mat64::from_fn(routes.rows.len(), x.cols(), |i, c| by(i) * x.row(routes.rows[i])[c])
    }

    fn expert_products<const N: usize>(&self, all: [&Vec<Matrix>; N], x: &Mat64, routes: &Routes<f64>) -> [Mat64; N] {
        all.map(|experts| {
            let mut out = Vec::new();
            for (e, rows) in routes.busy() {
                let mine = self.pick(x, &rows.collect::<Vec<_>>());
                let [y] = self.products([&experts[e]], &mine);
                out.extend_from_slice(y.data());
            }
            let outputs = experts.first().map_or(0, |m| m.w.rows());
            Mat64::from_vec(x.rows(), outputs, out)
        })
    }

    fn scatter(&self, y: &Mat64, routes: &Routes<f64>) -> Mat64 {
        let mut out = Mat64::zeros(routes.routed, y.cols());
        for (i, (&r, weight)) in routes.rows.iter().zip(&routes.weights).enumerate() {
            let by = if routes.weigh_inputs { 1.0 } else { *weight };
            out.row_mut(r).iter_mut().zip(y.row(i)).for_each(|(o, y)| *o += by * y);
        }
        out
    }

    fn argmax(&self, x: &Mat64) -> Vec<u32> {
        let best = |row: &[f64]| {
            let mut best = 0;
            for (c, &v) in row.iter().enumerate() {
                if v.is_nan() || v == f64::INFINITY {
                    return NO_CHOICE;
                }
                if v > row[best] {
                    best = c;
                }
            }
            best as u32
        };
        (0..x.rows()).map(|r| best(x.row(r))).collect()
    }
}
