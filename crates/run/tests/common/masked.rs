//! What a keeper means, from its definition: a decoder in f64 that keeps every key and value, and whose queries see
//! those positions alone that were not evicted from their head. Whole texts of one sequence.

use std::ops::Range;
use std::sync::Arc;

use lacuna_base::{Mat64, MatRef};
use lacuna_format::Stored;
use lacuna_kernels::{Activations, Attention, KvFormat, KvLayout, Mass};
use lacuna_model::backend::{Host, Measure, MixerVectors, Xielu};
use lacuna_model::{Backend, Batch, ModelError, Naive, Pages, Tables};
use lacuna_spec::{Activation, Experts, Mixer, Norm, Place, Rope, Temperature};

/// Which positions stay, whenever the text's length is a multiple of `every` and more than `budget`.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    pub budget: usize,
    pub every: usize,
    pub by: By,
}

#[derive(Clone, Copy, Debug)]
pub enum By {
    /// So many first ones, and the newest.
    Sinks(usize),
    /// So many newest ones, and those that got most attention.
    Mass { newest: usize },
}

impl Rule {
    /// Evicts among `alive` positions below `length`.
    fn cut(self, alive: &mut [bool], mass: &[f64], length: usize) {
        let held: Vec<usize> = (0..length).filter(|t| alive[*t]).collect();
        if held.len() <= self.budget {
            return;
        }
        let stay: Vec<usize> = match self.by {
            By::Sinks(sinks) => {
                let first = held.iter().filter(|t| **t < sinks).count();
                let newest = held.len() - (self.budget - first);
                held.iter().enumerate().filter(|(i, _)| *i < first || *i >= newest).map(|(_, t)| *t).collect()
            }
            By::Mass { newest } => {
                let (old, new) = held.split_at(held.len() - newest);
                let mut old = old.to_vec();
                old.sort_by(|a, b| mass[*b].total_cmp(&mass[*a]));
                old.truncate(self.budget - newest);
                [&old, new].concat()
            }
        };
        held.iter().for_each(|t| alive[*t] = stay.contains(t));
    }
}

/// The slow twin under a rule.
#[derive(Clone)]
pub struct Masked(pub Rule);

/// Keys and values of all positions.
pub struct Written {
    layout: KvLayout,
    both: Option<[Mat64; 2]>,
}

impl Pages for Written {
    fn block_bytes(&self) -> usize {
        1
    }
    fn reserve(&mut self, _: u32) {}
    fn release(&mut self, _: u32) {}
    fn copy(&mut self, _: u32, _: u32) {
        unreachable!("nothing is shared");
    }
    fn gather(&mut self, _: &[u32], _: u32, _: &[&[usize]]) {
        unreachable!("nothing is moved");
    }
}

impl Backend for Masked {
    type Matrix = <Naive as Backend>::Matrix;
    type Experts = <Naive as Backend>::Experts;
    type Norm = <Naive as Backend>::Norm;
    type Table = <Naive as Backend>::Table;
    type Rope = <Naive as Backend>::Rope;
    type Rows = Mat64;
    type Ids = Vec<u32>;
    type Routes = <Naive as Backend>::Routes;
    type Pages = Written;
    type Mixer = <Naive as Backend>::Mixer;
    type States = <Naive as Backend>::States;
    type Step = (<Naive as Backend>::Step, Batch);

    fn matrix(
        &self,
        place: &Place,
        stored: &Stored,
        bias: Option<Vec<f32>>,
        activations: Activations,
        release: &dyn Fn(),
    ) -> Result<Self::Matrix, ModelError> {
        Naive.matrix(place, stored, bias, activations, release)
    }
    fn experts(&self, all: Vec<Self::Matrix>) -> Self::Experts {
        Naive.experts(all)
    }
    fn measure(&self, matrix: &Self::Matrix) -> Measure {
        Naive.measure(matrix)
    }
    fn norm_of(
        &self,
        place: &Place,
        norm: Norm,
        width: usize,
        scale: Option<Vec<f32>>,
        bias: Option<Vec<f32>>,
    ) -> Self::Norm {
        Naive.norm_of(place, norm, width, scale, bias)
    }
    fn table(&self, stored: Arc<Stored>) -> Self::Table {
        Naive.table(stored)
    }
    fn rope_of(&self, rope: &Rope) -> Self::Rope {
        Naive.rope_of(rope)
    }
    fn pages(&self, layout: KvLayout, _: KvFormat) -> Written {
        Written { layout, both: None }
    }
    fn mixer_of(&self, place: &Place, mixer: &Mixer, hidden: usize, vectors: MixerVectors) -> Self::Mixer {
        Naive.mixer_of(place, mixer, hidden, vectors)
    }
    fn states(&self, mixer: &Mixer, hidden: usize) -> Self::States {
        Naive.states(mixer, hidden)
    }
    fn norm_pieces(&self, norm: &Self::Norm, pieces: usize, x: &Self::Rows) -> Self::Rows {
        Naive.norm_pieces(norm, pieces, x)
    }
    fn convolve(
        &self,
        mixer: &Self::Mixer,
        states: &mut Self::States,
        layer: usize,
        step: &Self::Step,
        x: &Self::Rows,
    ) -> Self::Rows {
        Naive.convolve(mixer, states, layer, &step.0, x)
    }
    fn scan(
        &self,
        mixer: &Self::Mixer,
        states: &mut Self::States,
        layer: usize,
        step: &Self::Step,
        read: [&Self::Rows; 2],
        beta: Option<&Self::Rows>,
    ) -> Self::Rows {
        Naive.scan(mixer, states, layer, &step.0, read, beta)
    }
    fn begin(&self, batch: &Batch, tables: Tables) -> (<Naive as Backend>::Step, Batch) {
        (Naive.begin(batch, tables), batch.clone())
    }
    fn finish(&self) -> Result<(), ModelError> {
        Naive.finish()
    }
    fn upload(&self, x: MatRef<'_>) -> Self::Rows {
        Naive.upload(x)
    }
    fn upload_ids(&self, ids: &[u32]) -> Self::Ids {
        Naive.upload_ids(ids)
    }
    fn download<'a>(&self, x: &'a Self::Rows, rows: Range<usize>) -> Result<Host<'a>, ModelError> {
        Naive.download(x, rows)
    }
    fn download_ids(&self, ids: &Self::Ids) -> Result<Vec<u32>, ModelError> {
        Naive.download_ids(ids)
    }
    fn download_starts(&self, routes: &Self::Routes) -> Result<Vec<usize>, ModelError> {
        Naive.download_starts(routes)
    }
    fn shape(&self, x: &Self::Rows) -> (usize, usize) {
        Naive.shape(x)
    }
    fn copy(&self, x: &Self::Rows) -> Self::Rows {
        Naive.copy(x)
    }
    fn pick(&self, x: &Self::Rows, rows: &[usize]) -> Self::Rows {
        Naive.pick(x, rows)
    }
    fn embed(&self, table: &Self::Table, ids: &Self::Ids) -> Self::Rows {
        Naive.embed(table, ids)
    }
    fn products<const N: usize>(&self, all: [&Self::Matrix; N], x: &Self::Rows) -> [Self::Rows; N] {
        Naive.products(all, x)
    }
    fn norm(&self, norm: &Self::Norm, x: &Self::Rows) -> Self::Rows {
        Naive.norm(norm, x)
    }
    fn rope<const N: usize>(&self, rope: &Self::Rope, head_dim: usize, step: &Self::Step, x: [&mut Self::Rows; N]) {
        Naive.rope(rope, head_dim, &step.0, x);
    }
    fn activate(&self, act: Activation, x: &mut Self::Rows, up: Option<&Self::Rows>) {
        Naive.activate(act, x, up);
    }
    fn xielu(&self, of: Xielu, x: &mut Self::Rows) {
        Naive.xielu(of, x);
    }
    fn clip(&self, x: &mut Self::Rows, by: f32) {
        Naive.clip(x, by);
    }
    fn temper(&self, by: Temperature, step: &Self::Step, x: &mut Self::Rows) {
        Naive.temper(by, &step.0, x);
    }
    fn add(&self, x: &mut Self::Rows, y: &Self::Rows) {
        Naive.add(x, y);
    }
    fn scale(&self, x: &mut Self::Rows, by: f32) {
        Naive.scale(x, by);
    }
    fn softcap(&self, x: &mut Self::Rows, cap: f32) {
        Naive.softcap(x, cap);
    }
    fn write(&self, pages: &mut Written, _: usize, step: &Self::Step, keys: &Mat64, values: &Mat64) {
        assert!(step.1.positions().iter().copied().eq(0..keys.rows()), "a whole text");
        pages.both = Some([keys.clone(), values.clone()]);
    }
    fn attend(&self, how: &Attention, pages: &Written, _: usize, _: &Self::Step, q: &Mat64) -> Mat64 {
        let [keys, values] = pages.both.as_ref().unwrap();
        let (dim, heads) = (pages.layout.head_dim, pages.layout.kv_heads);
        let (n, group) = (q.rows(), how.heads / heads);
        let mut out = Mat64::zeros(n, q.cols());
        for g in 0..heads {
            let (mut alive, mut mass) = (vec![false; n], vec![0.0; n]);
            for p in 0..n {
                // A layer that sees a window loses nothing of it.
                if how.window.is_none() && p > self.0.budget && p.is_multiple_of(self.0.every) {
                    self.0.cut(&mut alive, &mass, p);
                }
                alive[p] = true;
                let low = how.window.map_or(0, |w| (p + 1).saturating_sub(w));
                let seen: Vec<usize> = (low..=p).filter(|t| alive[*t]).collect();
                for h in g * group..(g + 1) * group {
                    let score = |t: &usize| {
                        let dot: f64 = (0..dim).map(|d| q.row(p)[h * dim + d] * keys.row(*t)[g * dim + d]).sum();
                        let x = dot * f64::from(how.scale);
                        how.softcap.map_or(x, |c| f64::from(c) * (x / f64::from(c)).tanh()).exp()
                    };
                    let scores: Vec<f64> = seen.iter().map(score).collect();
                    let total: f64 = scores.iter().sum();
                    for (&t, x) in seen.iter().zip(scores) {
                        mass[t] += x / total;
                        for d in 0..dim {
                            out.row_mut(p)[h * dim + d] += x / total * values.row(t)[g * dim + d];
                        }
                    }
                }
            }
        }
        out
    }
    fn weigh(&self, _: &Attention, _: &Written, _: usize, _: &Self::Step, _: &Mat64, _: &mut [Mass]) {
        unreachable!("attention adds up by itself");
    }
    fn weigh_rows(&self, x: &mut Self::Rows, by: &Self::Rows) {
        Naive.weigh_rows(x, by);
    }
    fn mix(&self, x: &Self::Rows, ins: usize, by: &Self::Rows) -> Self::Rows {
        Naive.mix(x, ins, by)
    }
    fn scale_columns(&self, place: &Place, x: &mut Self::Rows, by: &Self::Rows) {
        Naive.scale_columns(place, x, by);
    }
    fn match_magnitude(&self, x: &mut Self::Rows, like: &Self::Rows) {
        Naive.match_magnitude(x, like);
    }
    fn cut_off(&self, x: &mut Self::Rows, by: f32) {
        Naive.cut_off(x, by);
    }
    fn columns(&self, x: &Self::Rows, width: usize, which: Range<usize>) -> Self::Rows {
        Naive.columns(x, width, which)
    }
    fn beside(&self, all: [&Self::Rows; 2], widths: [usize; 2]) -> Self::Rows {
        Naive.beside(all, widths)
    }
    fn head_products(&self, all: &Self::Experts, x: &Self::Rows) -> Self::Rows {
        Naive.head_products(all, x)
    }
    fn route(
        &self,
        logits: &Self::Rows,
        choice: Experts,
        correction: Option<&Self::Rows>,
        scale: Option<&Self::Rows>,
    ) -> Self::Routes {
        Naive.route(logits, choice, correction, scale)
    }
    fn gather(&self, x: &Self::Rows, routes: &Self::Routes) -> Self::Rows {
        Naive.gather(x, routes)
    }
    fn expert_products<const N: usize>(
        &self,
        all: [&Self::Experts; N],
        x: &Self::Rows,
        routes: &Self::Routes,
    ) -> [Self::Rows; N] {
        Naive.expert_products(all, x, routes)
    }
    fn scatter(&self, y: &Self::Rows, routes: &Self::Routes) -> Self::Rows {
        Naive.scatter(y, routes)
    }
    fn argmax(&self, x: &Self::Rows) -> Self::Ids {
        Naive.argmax(x)
    }
}
