//! The processor: every operation is one of the kernels', over lent memory, done when it returns. The kernels' threads
//! are theirs.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use lacuna_base::{Mat, MatMut, MatRef};
use lacuna_contract::{Pool, PromptAsk, Select, SelectPrompt, SelectScope};
use lacuna_format::Stored;
use lacuna_kernels as kernels;
use lacuna_kernels::{
    Activations, Attention, Chosen, Group, KEY_BLOCK, KeyPool, KvFormat, KvLayout, KvPool, KvView, Linear, Mass,
    Packing, Recurrence, RopeTable, StateRun,
};
use lacuna_spec::{Activation, Experts, Mixer, Norm, Place, Rope, RouterScore, Temperature};

use super::chosen;
use super::gate::leave;
use super::select::{Blocks, Decided, PooledKeys, asks_at};
use super::{
    Asks, Backend, GateAsk, Host, LEAST_SQUARE, Measure, MixerVectors, NO_CHOICE, Pages, PromptRead, Reads, Routes,
    SlotStates, Tables, Xielu,
};
use crate::lent::Reused;
use crate::{Batch, Lent, ModelError};

/// The processor's kernels.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cpu;

/// A packed matrix and its bias.
#[doc(hidden)]
pub struct Matrix {
    linear: Linear,
    pub(crate) bias: Option<Mat>,
}

/// A normalisation and its vectors.
#[doc(hidden)]
pub struct NormOf {
    pub(crate) norm: Norm,
    pub(crate) width: usize,
    pub(crate) scale: Vec<f32>,
    pub(crate) bias: Option<Vec<f32>>,
}

/// Rows of one step and their block tables.
#[doc(hidden)]
pub struct Step {
    pub(crate) batch: Reused<Batch>,
    tables: Tables,
}

impl Step {
    /// The runs of rows of one sequence, with what each reads.
    fn views<'a>(&'a self, pages: &'a KvPool, layer: usize) -> impl Iterator<Item = (Range<usize>, KvView<'a>)> {
        self.batch
            .runs()
            .zip(self.tables.of(layer))
            .map(move |((_, rows), t)| (rows, KvView { pool: pages, blocks: t.blocks, tokens: t.tokens - t.shift }))
    }
}

impl Step {
    /// Lends the states of the step's runs of rows.
    fn with_states(
        &self,
        states: &mut SlotStates<f32>,
        layer: usize,
        begin: bool,
        mut f: impl FnMut(&mut [StateRun<'_>]),
    ) {
        states.lend(self.tables.states_of(layer), &self.batch, begin, |runs| {
            f(&mut runs.into_iter().map(|(rows, state)| StateRun { rows, state }).collect::<Vec<_>>());
        });
    }
}

impl Pages for KvPool {
    fn block_bytes(&self) -> usize {
        self.page_bytes()
    }
    fn pool_keys(&mut self, pool: Pool) {
        KvPool::pool_keys(self, kept(pool));
    }
    fn reserve(&mut self, block: u32) {
        KvPool::reserve(self, block);
    }
    fn release(&mut self, block: u32) {
        KvPool::release(self, block);
    }
    fn copy(&mut self, from: u32, to: u32) {
        KvPool::copy(self, from, to);
    }
    fn gather(&mut self, table: &[u32], to: u32, kept: &[&[usize]]) {
        KvPool::gather(self, table, to, kept);
    }
}

/// Rows of one sequence that ask a selector in one task.
const ASKING: usize = 32;

fn kept(pool: Pool) -> KeyPool {
    match pool {
        Pool::Mean => KeyPool::Mean,
        Pool::Bounds => KeyPool::Bounds,
    }
}

/// What a selector answers to each of some rows of one sequence about one key head, as [`PooledKeys::decide`] says it.
fn ask(
    select: &dyn Select,
    (layer, head): (usize, usize),
    (q, slots): (MatRef<'_>, &[usize]),
    rows: &[usize],
    kv: &KvView<'_>,
) -> Result<Vec<Decided>, ModelError> {
    let (plan, dim) = (select.plan(), kv.pool.layout().head_dim);
    let group = q.cols() / dim / kv.pool.layout().kv_heads;
    let last = rows.iter().map(|r| slots[*r]).max().unwrap_or(0);
    let pooled = PooledKeys::new(plan, dim, last, |nth| kv.pooled(head, nth))?;
    let of_row = |r: &usize| {
        let mine = &q.row(*r)[head * group * dim..][..group * dim];
        pooled.decide(select, (layer, head), MatRef::new(group, dim, mine), slots[*r])
    };
    rows.iter().map(of_row).collect()
}

/// The results of `n` independent tasks in their order, or the first error.
fn in_order<T: Send>(
    n: usize,
    cost: usize,
    f: impl Fn(usize) -> Result<T, ModelError> + Sync,
) -> Result<Vec<T>, ModelError> {
    let done: Vec<Mutex<Option<Result<T, ModelError>>>> = (0..n).map(|_| Mutex::new(None)).collect();
    kernels::tasks(n, cost, |i| {
        let result = f(i);
        // Nobody else meets it.
        *done[i].lock().unwrap_or_else(|e| e.into_inner()) = Some(result);
    });
    done.into_iter().filter_map(|d| d.into_inner().unwrap_or_else(|e| e.into_inner())).collect()
}

/// Attention of a step's rows, each of which reads of each key head what `read` says.
fn attend_some(
    how: &Attention,
    (pages, layer): (&KvPool, usize),
    step: &Step,
    q: &Lent,
    read: impl Fn(usize, usize) -> Blocks,
) -> (Lent, Reads) {
    let (layout, slots) = (pages.layout(), step.tables.slots());
    let (mut chosen, mut reads) = (Chosen::new(layout.kv_heads), Reads::default());
    let bytes = (layout.token_bytes(pages.format()) / layout.kv_heads) as u64;
    for (r, &slot) in slots.iter().enumerate() {
        for head in 0..layout.kv_heads {
            let blocks = read(r, head);
            reads.row(slot, blocks.as_deref(), bytes);
            match blocks {
                None => chosen.push(slot, 0..slot / KEY_BLOCK),
                Some(blocks) => chosen.push(slot, blocks),
            }
        }
    }
    let mut out = Lent::new(q.rows(), q.cols());
    how.run_chosen(q.view(), slots, step.views(pages, layer), &chosen, out.view_mut());
    (out, reads)
}

impl Cpu {
    /// [`Backend::products`] of one matrix into memory that is there already.
    #[track_caller]
    pub(crate) fn product_into(self, matrix: &Matrix, x: MatRef<'_>, mut out: MatMut<'_>) {
        matrix.linear.forward(x, out.reborrow());
        if let Some(b) = &matrix.bias {
            kernels::add(out, b.view());
        }
    }

    /// [`Backend::scale`] and [`Backend::softcap`] of memory that is not lent.
    pub(crate) fn finish_logits(self, out: &mut Mat, scale: f32, softcap: Option<f32>) {
        if scale != 1.0 {
            out.data_mut().iter_mut().for_each(|x| *x *= scale);
        }
        if let Some(c) = softcap {
            kernels::softcap(c, out.view_mut());
        }
    }
}

/// Whole rows, or pieces of `width` columns of them, as rows.
pub(crate) fn pieces(x: &Mat, width: usize) -> MatRef<'_> {
    MatRef::new(x.data().len() / width.max(1), width, x.data())
}

/// A layer's xIELU as the kernels take it.
pub(crate) fn factors(of: Xielu) -> kernels::Xielu {
    let [above, below] = of.factors().map(|x| x as f32);
    kernels::Xielu { above, below }
}

/// The mean of the squares of a row.
pub(crate) fn mean_square(row: &[f32]) -> f64 {
    row.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>() / row.len().max(1) as f64
}

/// A row's mean and standard deviation.
pub(crate) fn spread(row: &[f32]) -> (f64, f64) {
    let n = row.len().max(1) as f64;
    let mean = row.iter().map(|x| f64::from(*x)).sum::<f64>() / n;
    let square = row.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>() / n;
    (mean, square.sqrt())
}

/// What a sum of weights is at least before they are divided by it.
const LEAST: f32 = 1e-20;

/// Chooses experts; `logits` become their scores.
pub(crate) fn route(logits: &mut Mat, choice: Experts, correction: Option<&[f32]>, scale: Option<&[f32]>) -> Routes {
    let rows = logits.rows();
    // Sigmoids rise with their logits, and are alike where those are large.
    let by_logits = choice.score == RouterScore::Sigmoid && correction.is_none() && choice.groups.is_none();
    let of_row = |r: usize| {
        let p = logits.row_mut(r);
        let early = by_logits.then(|| chosen(p, choice));
        match choice.score {
            RouterScore::Softmax => kernels::softmax(p),
            RouterScore::Sigmoid => p.iter_mut().for_each(|x| *x = sigmoid(*x)),
        }
        let order = match (early, correction) {
            (Some(order), _) => order,
            (None, None) => chosen(p, choice),
            (None, Some(c)) => chosen(&p.iter().zip(c).map(|(p, c)| p + c).collect::<Vec<f32>>(), choice),
        };
        let total: f32 = if choice.normalize { order.iter().map(|&e| p[e]).sum::<f32>().max(LEAST) } else { 1.0 };
        let own = |e: usize| scale.map_or(1.0, |s| s[e]);
        order.into_iter().map(|e| (e, p[e] / total * choice.scale * own(e))).collect()
    };
    let chosen: Vec<Vec<(usize, f32)>> = (0..rows).map(of_row).collect();
    Routes::new(choice, &chosen)
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// [`Backend::head_products`], of the heads in their order.
pub(crate) fn heads<'a>(all: impl Iterator<Item = &'a Matrix>, x: &Lent) -> Lent {
    let all: Vec<&Matrix> = all.collect();
    let (rows, outputs) = (x.rows(), all.first().map_or(0, |m| m.linear.rows()));
    let inputs = x.cols() / all.len().max(1);
    // Head after head: each one's product writes memory of its own.
    let mut made = Lent::new(all.len() * rows, outputs);
    let mut rest = made.data_mut();
    let mut groups = Vec::new();
    for (h, m) in all.iter().enumerate() {
        let (mine, after) = std::mem::take(&mut rest).split_at_mut(rows * outputs);
        rest = after;
        let x = x.view().columns(h * inputs, (h + 1) * inputs);
        groups.push(Group { all: [&m.linear], x, out: [MatMut::new(rows, outputs, mine)] });
    }
    Linear::forward_groups(groups);
    let mut out = Lent::new(rows, all.len() * outputs);
    for r in 0..rows {
        for (h, to) in out.row_mut(r).chunks_exact_mut(outputs.max(1)).enumerate() {
            to.copy_from_slice(made.row(h * rows + r));
        }
    }
    out
}

/// [`Backend::expert_products`], of the experts in their order.
pub(crate) fn grouped<'a, const N: usize>(
    all: [impl Iterator<Item = &'a Matrix>; N],
    x: &Lent,
    routes: &Routes,
) -> [Lent; N] {
    let all = all.map(Iterator::collect::<Vec<&Matrix>>);
    let outputs = all.each_ref().map(|experts| experts.first().map_or(0, |m| m.linear.rows()));
    let mut out = outputs.map(|n| Lent::new(x.rows(), n));
    let mut rest = out.each_mut().map(|o| o.data_mut());
    let mut groups = Vec::new();
    for (e, rows) in routes.busy() {
        let mine = std::array::from_fn(|i| {
            let (mine, after) = std::mem::take(&mut rest[i]).split_at_mut(rows.len() * outputs[i]);
            rest[i] = after;
            MatMut::new(rows.len(), outputs[i], mine)
        });
        let x = x.view().rows_range(rows.start, rows.end);
        groups.push(Group { all: all.each_ref().map(|experts| &experts[e].linear), x, out: mine });
    }
    Linear::forward_groups(groups);
    for (experts, out) in all.iter().zip(&mut out) {
        for (e, rows) in routes.busy() {
            if let Some(b) = &experts[e].bias {
                let n = b.cols();
                let mine = &mut out.data_mut()[rows.start * n..rows.end * n];
                kernels::add(MatMut::new(rows.len(), n, mine), b.view());
            }
        }
    }
    out
}

impl Backend for Cpu {
    type Matrix = Matrix;
    type Experts = Vec<Matrix>;
    type Norm = NormOf;
    type Table = Arc<Stored>;
    type Rope = RopeTable;
    type Rows = Lent;
    type Ids = Reused<Vec<u32>>;
    type Routes = Routes;
    type Pages = KvPool;
    type Mixer = Recurrence;
    type States = SlotStates<f32>;
    type Step = Step;

    fn matrix(
        &self,
        place: &Place,
        stored: &Stored,
        bias: Option<Vec<f32>>,
        activations: Activations,
        release: &dyn Fn(),
    ) -> Result<Matrix, ModelError> {
        let packing = Packing { activations, ..Packing::default() };
        let linear = Linear::pack_releasing(stored, &packing, release).map_err(|e| ModelError::bad(place, e))?;
        Ok(Matrix { linear, bias: bias.map(|b| Mat::from_vec(1, b.len(), b)) })
    }

    fn keep_columns(&self, matrix: &mut Matrix, stored: &Stored) -> Option<u64> {
        matrix.linear.keep_columns(stored)
    }

    fn experts(&self, all: Vec<Matrix>) -> Vec<Matrix> {
        all
    }

    fn measure(&self, matrix: &Matrix) -> Measure {
        let bias = matrix.bias.as_ref().map_or(0, |b| 4 * b.cols() as u64);
        Measure { work: matrix.linear.work(), bytes: matrix.linear.weights_bytes() + bias }
    }

    fn norm_of(&self, _: &Place, norm: Norm, width: usize, scale: Option<Vec<f32>>, bias: Option<Vec<f32>>) -> NormOf {
        let scale = scale.unwrap_or_else(|| vec![1.0 - norm.offset; width]);
        NormOf { norm, width, scale, bias }
    }

    fn table(&self, stored: Arc<Stored>) -> Arc<Stored> {
        stored
    }

    fn rope_of(&self, rope: &Rope) -> RopeTable {
        RopeTable::new(rope)
    }

    fn pages(&self, layout: KvLayout, format: KvFormat) -> KvPool {
        KvPool::new(layout, format)
    }

    fn mixer_of(&self, _: &Place, mixer: &Mixer, hidden: usize, v: MixerVectors) -> Recurrence {
        Recurrence::new(mixer, hidden, &v.conv, v.bias, v.a, v.d)
    }

    fn states(&self, mixer: &Mixer, hidden: usize) -> SlotStates<f32> {
        SlotStates::new(mixer, hidden)
    }

    fn begin(&self, batch: &Batch, tables: Tables) -> Step {
        let mut mine = Reused::<Batch>::default();
        mine.become_like(batch);
        Step { batch: mine, tables }
    }

    fn finish(&self) -> Result<(), ModelError> {
        Ok(())
    }

    fn upload(&self, x: MatRef<'_>) -> Lent {
        let mut out = Lent::new(x.rows(), x.cols());
        (0..x.rows()).for_each(|r| out.row_mut(r).copy_from_slice(x.row(r)));
        out
    }

    fn upload_ids(&self, ids: &[u32]) -> Reused<Vec<u32>> {
        let mut mine = Reused::<Vec<u32>>::default();
        mine.extend_from_slice(ids);
        mine
    }

    fn download<'a>(&self, x: &'a Lent, rows: Range<usize>) -> Result<Host<'a>, ModelError> {
        Ok(Host::There(x.view().rows_range(rows.start, rows.end)))
    }

    fn download_ids(&self, ids: &Reused<Vec<u32>>) -> Result<Vec<u32>, ModelError> {
        Ok(ids.to_vec())
    }

    fn download_starts(&self, routes: &Routes) -> Result<Vec<usize>, ModelError> {
        Ok(routes.starts.clone())
    }

    fn shape(&self, x: &Lent) -> (usize, usize) {
        (x.rows(), x.cols())
    }

    fn copy(&self, x: &Lent) -> Lent {
        self.upload(x.view())
    }

    fn pick(&self, x: &Lent, rows: &[usize]) -> Lent {
        let mut out = Lent::new(rows.len(), x.cols());
        rows.iter().enumerate().for_each(|(i, &r)| out.row_mut(i).copy_from_slice(x.row(r)));
        out
    }

    fn embed(&self, table: &Arc<Stored>, ids: &Reused<Vec<u32>>) -> Lent {
        let mut out = Lent::new(ids.len(), table.cols);
        for (r, &id) in ids.iter().enumerate() {
            let t = if (id as usize) < table.rows { id as usize } else { 0 };
            table.decode_rows(t, t + 1, MatMut::new(1, table.cols, out.row_mut(r)));
        }
        out
    }

    fn products<const N: usize>(&self, all: [&Matrix; N], x: &Lent) -> [Lent; N] {
        let mut out = all.map(|m| Lent::new(x.rows(), m.linear.rows()));
        let mut views = out.each_mut().map(|o| o.view_mut());
        Linear::forward_all(all.map(|m| &m.linear), x.view(), &mut views);
        for (m, out) in all.iter().zip(&mut out) {
            if let Some(b) = &m.bias {
                kernels::add(out.view_mut(), b.view());
            }
        }
        out
    }

    fn products_gated(&self, all: &[&Matrix], x: &Lent, ask: &GateAsk<'_>) -> Result<(Vec<Lent>, Reads), ModelError> {
        let answers = in_order(x.rows(), 16 * x.cols(), |r| ask.channels(x.row(r)))?;
        let mut x = self.copy(x);
        for (r, channels) in answers.iter().enumerate() {
            channels.iter().for_each(|channels| leave(x.row_mut(r), channels));
        }
        let linears: Vec<&Linear> = all.iter().map(|m| &m.linear).collect();
        let kept: Vec<Option<&[u32]>> = answers.iter().map(Option::as_deref).collect();
        let mut out: Vec<Lent> = all.iter().map(|m| Lent::new(x.rows(), m.linear.rows())).collect();
        let mut views: Vec<MatMut<'_>> = out.iter_mut().map(|o| o.view_mut()).collect();
        let read = Linear::forward_chosen(&linears, x.view(), &kept, &mut views);
        for (m, out) in all.iter().zip(&mut out) {
            if let Some(b) = &m.bias {
                kernels::add(out.view_mut(), b.view());
            }
        }
        Ok((out, Reads { read, all: linears.iter().map(|l| l.weights_bytes()).sum() }))
    }

    fn norm(&self, norm: &NormOf, x: &Lent) -> Lent {
        let mut out = Lent::new(x.rows(), x.cols());
        let from = pieces(x, norm.width);
        let to = MatMut::new(from.rows(), from.cols(), out.data_mut());
        kernels::norm(norm.norm, &norm.scale, norm.bias.as_deref(), from, to);
        out
    }

    fn norm_pieces(&self, norm: &NormOf, pieces: usize, x: &Lent) -> Lent {
        if pieces == 1 {
            return self.norm(norm, x);
        }
        let (rows, cols) = (x.rows(), x.cols());
        let mut out = Lent::new(rows, cols);
        let wide = cols / pieces;
        for from in (0..cols).step_by(wide.max(1)).filter(|_| rows > 0) {
            let scale = &norm.scale[from..from + wide];
            let bias = norm.bias.as_ref().map(|b| &b[from..from + wide]);
            let to = MatMut::with_stride(rows, wide, cols, &mut out.data_mut()[from..]);
            kernels::norm(norm.norm, scale, bias, x.view().columns(from, from + wide), to);
        }
        out
    }

    fn rope<const N: usize>(&self, rope: &RopeTable, head_dim: usize, step: &Step, x: [&mut Lent; N]) {
        rope.with(step.batch.places(), |angles| x.into_iter().for_each(|x| angles.apply(head_dim, x.view_mut())));
    }

    fn activate(&self, act: Activation, x: &mut Lent, up: Option<&Lent>) {
        match up {
            Some(up) => kernels::gated_activation(act, x.view_mut(), up.view()),
            None => kernels::activation(act, x.view_mut()),
        }
    }

    fn xielu(&self, of: Xielu, x: &mut Lent) {
        kernels::xielu(factors(of), x.view_mut());
    }

    fn clip(&self, x: &mut Lent, by: f32) {
        kernels::clip(by, x.view_mut());
    }

    fn temper(&self, by: Temperature, step: &Step, x: &mut Lent) {
        for (r, &p) in step.batch.positions().iter().enumerate() {
            let factor = by.at(p) as f32;
            x.row_mut(r).iter_mut().for_each(|x| *x *= factor);
        }
    }

    fn add(&self, x: &mut Lent, y: &Lent) {
        kernels::add(x.view_mut(), y.view());
    }

    fn scale(&self, x: &mut Lent, by: f32) {
        x.data_mut().iter_mut().for_each(|x| *x *= by);
    }

    fn softcap(&self, x: &mut Lent, cap: f32) {
        kernels::softcap(cap, x.view_mut());
    }

    fn weigh_rows(&self, x: &mut Lent, by: &Lent) {
        for r in 0..x.rows() {
            let by = sigmoid(by.row(r)[0]);
            x.row_mut(r).iter_mut().for_each(|x| *x *= by);
        }
    }

    fn mix(&self, x: &Lent, ins: usize, by: &Lent) -> Lent {
        let (width, outs) = (x.cols() / ins, by.cols() / ins);
        let mut out = Lent::new(x.rows(), outs * width);
        out.data_mut().fill(0.0);
        for r in 0..x.rows() {
            let (x, by) = (x.row(r), by.row(r));
            for (to, by) in out.row_mut(r).chunks_exact_mut(width).zip(by.chunks_exact(ins)) {
                x.chunks_exact(width).zip(by).for_each(|(x, by)| kernels::add_scaled(to, *by, x));
            }
        }
        out
    }

    fn scale_columns(&self, _: &Place, x: &mut Lent, by: &Lent) {
        for r in 0..x.rows() {
            x.row_mut(r).iter_mut().zip(by.row(0)).for_each(|(x, by)| *x *= by);
        }
    }

    fn match_magnitude(&self, x: &mut Lent, like: &Lent) {
        for r in 0..x.rows() {
            let by = (mean_square(like.row(r)).sqrt() / mean_square(x.row(r)).max(LEAST_SQUARE).sqrt()) as f32;
            x.row_mut(r).iter_mut().for_each(|x| *x *= by);
        }
    }

    fn cut_off(&self, x: &mut Lent, by: f32) {
        for r in 0..x.rows() {
            let (mean, deviation) = spread(x.row(r));
            let cutoff = (mean + f64::from(by) * deviation) as f32;
            x.row_mut(r).iter_mut().for_each(|x| *x = (*x - cutoff).max(0.0));
        }
    }

    fn columns(&self, x: &Lent, width: usize, which: Range<usize>) -> Lent {
        let mut out = Lent::new(x.rows(), x.cols() / width * which.len());
        for r in 0..x.rows() {
            let pieces = x.row(r).chunks_exact(width);
            out.row_mut(r).chunks_exact_mut(which.len()).zip(pieces).for_each(|(to, from)| {
                to.copy_from_slice(&from[which.clone()]);
            });
        }
        out
    }

    fn beside(&self, all: [&Lent; 2], widths: [usize; 2]) -> Lent {
        let mut out = Lent::new(all[0].rows(), all[0].cols() + all[1].cols());
        for r in 0..out.rows() {
            let pieces = all[0].row(r).chunks_exact(widths[0]).zip(all[1].row(r).chunks_exact(widths[1]));
            out.row_mut(r).chunks_exact_mut(widths[0] + widths[1]).zip(pieces).for_each(|(to, (a, b))| {
                to[..widths[0]].copy_from_slice(a);
                to[widths[0]..].copy_from_slice(b);
            });
        }
        out
    }

    fn head_products(&self, all: &Vec<Matrix>, x: &Lent) -> Lent {
        heads(all.iter(), x)
    }

    fn write(&self, pages: &mut KvPool, layer: usize, step: &Step, keys: &Lent, values: &Lent) {
        let page_tokens = pages.layout().page_tokens;
        for ((sequence, rows), table) in step.batch.runs().zip(step.tables.of(layer)) {
            for r in step.batch.written(sequence, rows) {
                let slot = step.batch.positions()[r] - table.shift;
                let page = pages.page_mut(table.blocks[slot / page_tokens]);
                page.write(slot % page_tokens, keys.row(r), values.row(r));
            }
        }
    }

    fn attend(&self, how: &Attention, pages: &KvPool, layer: usize, step: &Step, q: &Lent) -> Lent {
        let mut out = Lent::new(q.rows(), q.cols());
        how.run(q.view(), step.tables.slots(), step.views(pages, layer), out.view_mut());
        out
    }

    fn attend_chosen(
        &self,
        how: &Attention,
        pages: &KvPool,
        layer: usize,
        step: &Step,
        q: &Lent,
        asks: Asks<'_>,
    ) -> Result<(Lent, Reads), ModelError> {
        let Asks { select, decisions } = asks;
        let (plan, layout) = (select.plan(), pages.layout());
        let (slots, positions, heads) = (step.tables.slots(), step.batch.positions(), layout.kv_heads);
        let (mut asking, mut views): (Vec<Vec<usize>>, Vec<KvView<'_>>) = (Vec::new(), Vec::new());
        for (rows, kv) in step.views(pages, layer) {
            let mine: Vec<usize> = rows.filter(|r| asks_at(plan, positions[*r])).collect();
            for piece in mine.chunks(ASKING) {
                asking.push(piece.to_vec());
                views.push(kv);
            }
        }
        let longest = views.iter().map(|kv| kv.tokens).max().unwrap_or(0);
        let most = asking.iter().map(Vec::len).max().unwrap_or(0);
        let cost = 4 * most * q.cols() / heads * longest / plan.block.max(1);
        let answers = in_order(asking.len() * heads, cost, |i| {
            let piece = i / heads;
            ask(select, (layer, i % heads), (q.view(), slots), &asking[piece], &views[piece])
        })?;
        // What each row goes by: its own answers, or those of its tile's first row.
        let mut by: Vec<Option<Arc<[Decided]>>> = vec![None; slots.len()];
        let mut answers = answers.into_iter();
        for rows in &asking {
            let mut of_heads: Vec<_> = answers.by_ref().take(heads).map(Vec::into_iter).collect();
            for &r in rows {
                by[r] = Some(of_heads.iter_mut().filter_map(Iterator::next).collect());
            }
        }
        if let SelectScope::Tile(tile) = plan.scope {
            let page_tokens = layout.page_tokens;
            for ((sequence, rows), table) in step.batch.runs().zip(step.tables.of(layer)) {
                for r in step.batch.written(sequence, rows) {
                    let answers = by[r].iter().filter(|_| asks_at(plan, positions[r]));
                    answers.for_each(|a| decisions.put(table, page_tokens, positions[r] - table.shift, a));
                }
            }
            for ((_, rows), table) in step.batch.runs().zip(step.tables.of(layer)) {
                for r in rows {
                    by[r] = Some(Arc::clone(decisions.of(table, page_tokens, (positions[r], tile.max(1)))?));
                }
            }
        }
        let read = |r: usize, head: usize| by[r].as_ref().and_then(|d| d.get(head)?.at(slots[r]));
        Ok(attend_some(how, (pages, layer), step, q, read))
    }

    fn foresee(
        &self,
        how: &Attention,
        pages: &KvPool,
        layer: usize,
        step: &Step,
        q: &[&Lent],
        by: &dyn SelectPrompt,
    ) -> Result<PromptRead, ModelError> {
        let layout = pages.layout();
        let (dim, heads) = (layout.head_dim, layout.kv_heads);
        let width = how.heads / heads * dim;
        let Some((_, kv)) = step.views(pages, layer).next() else { return Ok(PromptRead::ALL) };
        let tokens: usize = q.iter().map(|q| q.rows()).sum();
        // As they are kept: attention meets the same ones.
        let (mut keys, mut values) = (Mat::zeros(tokens, heads * dim), vec![0.0; heads * dim]);
        for t in 0..tokens {
            let page = pages.page(kv.blocks[t / layout.page_tokens]);
            page.read(t % layout.page_tokens, keys.row_mut(t), &mut values);
        }
        let broken = |x: MatRef<'_>| (0..x.rows()).any(|r| x.row(r).iter().any(|v| !v.is_finite()));
        let answers = in_order(heads, tokens.saturating_mul(width), |head| {
            let mut queries = Mat::zeros(tokens, width);
            let rows = q.iter().flat_map(|q| (0..q.rows()).map(move |r| &q.row(r)[head * width..][..width]));
            rows.enumerate().for_each(|(r, row)| queries.row_mut(r).copy_from_slice(row));
            let keys = keys.view().columns(head * dim, (head + 1) * dim);
            if broken(queries.view()) || broken(keys) {
                return Ok(None);
            }
            let ask = PromptAsk { layer, head, scale: how.scale, queries: queries.view(), keys };
            by.select(&ask).map(Some).map_err(|e| ModelError::Select { what: e.to_string() })
        })?;
        // As with rows: where a number is not finite, what is wrong shows as it does without a selector.
        answers
            .into_iter()
            .collect::<Option<Vec<_>>>()
            .map_or(Ok(PromptRead::ALL), |answers| PromptRead::new(layer, (by.tile(), tokens), answers))
    }

    fn attend_foreseen(
        &self,
        how: &Attention,
        pages: &KvPool,
        layer: usize,
        step: &Step,
        q: &Lent,
        read: &PromptRead,
    ) -> Result<(Lent, Reads), ModelError> {
        let slots = step.tables.slots();
        Ok(attend_some(how, (pages, layer), step, q, |r, head| read.at(head, slots[r])))
    }

    fn weigh(&self, how: &Attention, pages: &KvPool, layer: usize, step: &Step, q: &Lent, mass: &mut [Mass]) {
        let views = step.views(pages, layer).zip(mass);
        let mut sequences: Vec<_> = views.map(|((rows, kv), mass)| (rows, kv, mass)).collect();
        how.weigh(q.view(), step.tables.slots(), &mut sequences);
    }

    fn convolve(&self, mixer: &Recurrence, states: &mut SlotStates<f32>, layer: usize, step: &Step, x: &Lent) -> Lent {
        let gates = if matches!(mixer.mixer(), Mixer::ShortConv(_)) { 3 } else { 1 };
        let mut out = Lent::new(x.rows(), x.cols() / gates);
        step.with_states(states, layer, true, |runs| mixer.convolve(runs, x.view(), out.view_mut()));
        out
    }

    fn scan(
        &self,
        mixer: &Recurrence,
        states: &mut SlotStates<f32>,
        layer: usize,
        step: &Step,
        [x, dt]: [&Lent; 2],
        beta: Option<&Lent>,
    ) -> Lent {
        let (heads, _, wide) = mixer.mixer().heads().unwrap_or_default();
        let mut out = Lent::new(x.rows(), heads * wide);
        let read = [x.view(), dt.view(), beta.unwrap_or(dt).view()];
        step.with_states(states, layer, false, |runs| mixer.scan(runs, read, out.view_mut()));
        out
    }

    fn route(&self, logits: &Lent, choice: Experts, correction: Option<&Lent>, scale: Option<&Lent>) -> Routes {
        route(&mut self.copy(logits), choice, correction.map(|c| c.data()), scale.map(|s| s.data()))
    }

    fn gather(&self, x: &Lent, routes: &Routes) -> Lent {
        let mut out = self.pick(x, &routes.rows);
        if routes.weigh_inputs {
            for (i, by) in routes.weights.iter().enumerate() {
                out.row_mut(i).iter_mut().for_each(|x| *x *= by);
            }
        }
        out
    }

    fn expert_products<const N: usize>(&self, all: [&Vec<Matrix>; N], x: &Lent, routes: &Routes) -> [Lent; N] {
        grouped(all.map(|experts| experts.iter()), x, routes)
    }

    fn scatter(&self, y: &Lent, routes: &Routes) -> Lent {
        let mut out = Lent::new(routes.routed, y.cols());
        out.data_mut().fill(0.0);
        // Gathered rows come expert after expert, so that a row's sum does not depend on what else is routed where.
        for (i, (&r, &weight)) in routes.rows.iter().zip(&routes.weights).enumerate() {
            let by = if routes.weigh_inputs { 1.0 } else { weight };
            kernels::add_scaled(out.row_mut(r), by, y.row(i));
        }
        out
    }

    fn argmax(&self, x: &Lent) -> Reused<Vec<u32>> {
        let best = |row: &[f32]| {
            if row.iter().any(|x| x.is_nan() || *x == f32::INFINITY) {
                return NO_CHOICE;
            }
            (1..row.len()).fold(0, |best, c| if row[c] > row[best] { c } else { best }) as u32
        };
        let mut ids = Reused::<Vec<u32>>::default();
        ids.extend((0..x.rows()).map(|r| best(x.row(r))));
        ids
    }
}
