//! The recorder: a backend over the processor's whose every operation keeps what its adjoint reads, so that a step can
//! be walked back.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use lacuna_base::MatRef;
use lacuna_format::Stored;
use lacuna_kernels::{Activations, Attention, KvFormat, KvLayout, KvPool, Mass, RopeTable, Transposed};
use lacuna_spec::{Activation, Experts, Mixer, Norm, Place, Rope, Temperature};

use super::tape::{Entry, Node, Tape};
use crate::backend::{
    self, Backend, Cpu, Host, Measure, MixerVectors, NormOf, Pages, Routes, SlotStates, Tables, Xielu,
};
use crate::{Batch, Lent, ModelError};

/// Records over [`Cpu`]: the same kernels, the same bits. Steps are whole sequences, from their first position on.
#[derive(Clone, Default)]
pub(crate) struct Recorder {
    state: Rc<RefCell<State>>,
}

#[derive(Default)]
struct State {
    next: usize,
    entries: Vec<Entry>,
}

/// A matrix from both sides; the other side shares the stored buffers.
pub(crate) struct Matrix {
    pub(super) place: Place,
    pub(super) forward: backend::Matrix,
    pub(super) back: Transposed,
}

/// A normalisation and where its vectors are from.
pub(crate) struct PlacedNorm {
    pub(super) place: Place,
    /// Whether its scale is a tensor.
    pub(super) scaled: bool,
    pub(super) of: NormOf,
}

/// A recurrent mixer, where its convolution is from, and its vectors as they are stored.
pub(crate) struct RecordedMixer {
    pub(super) place: Place,
    pub(super) mixer: Mixer,
    pub(super) channels: usize,
    pub(super) vectors: MixerVectors,
    forward: <Cpu as Backend>::Mixer,
}

/// Pages, and the keys and values that were written last.
pub(crate) struct RecordedPages {
    pool: KvPool,
    written: Option<[Node; 2]>,
}

impl Pages for RecordedPages {
    fn block_bytes(&self) -> usize {
        self.pool.block_bytes()
    }
    fn reserve(&mut self, block: u32) {
        self.pool.reserve(block);
    }
    fn release(&mut self, block: u32) {
        self.pool.release(block);
    }
    fn copy(&mut self, from: u32, to: u32) {
        self.pool.copy(from, to);
    }
    fn gather(&mut self, table: &[u32], to: u32, kept: &[&[usize]]) {
        self.pool.gather(table, to, kept);
    }
}

/// Routes, and the number of their weights as a value that has a gradient.
pub(crate) struct RecordedRoutes {
    routes: Rc<Routes>,
    weights: usize,
}

impl Recorder {
    /// What was recorded since the last call.
    pub(super) fn take(&self) -> Tape {
        Tape::new(std::mem::take(&mut self.state.borrow_mut().entries))
    }

    /// A new value.
    fn node(&self, value: Lent) -> Node {
        let mut state = self.state.borrow_mut();
        state.next += 1;
        Node { id: state.next, value: Rc::new(value) }
    }

    fn record(&self, entry: Entry) {
        self.state.borrow_mut().entries.push(entry);
    }

    /// Changes a value, in place where nothing else holds it; gives the ids before and after.
    fn change(&self, x: &mut Node, f: impl FnOnce(&mut Lent)) -> (usize, usize) {
        let before = x.id;
        if Rc::get_mut(&mut x.value).is_none() {
            x.value = Rc::new(Cpu.copy(&x.value));
        }
        f(Rc::get_mut(&mut x.value).expect("its only holder"));
        let mut state = self.state.borrow_mut();
        state.next += 1;
        x.id = state.next;
        (before, x.id)
    }
}

impl Backend for Recorder {
    type Matrix = Rc<Matrix>;
    type Experts = Vec<Rc<Matrix>>;
    type Norm = Rc<PlacedNorm>;
    type Table = <Cpu as Backend>::Table;
    type Rope = RopeTable;
    type Rows = Node;
    type Ids = <Cpu as Backend>::Ids;
    type Routes = RecordedRoutes;
    type Pages = RecordedPages;
    type Mixer = Rc<RecordedMixer>;
    type States = SlotStates<f32>;
    type Step = <Cpu as Backend>::Step;

    fn matrix(
        &self,
        place: &Place,
        stored: &Stored,
        bias: Option<Vec<f32>>,
        activations: Activations,
        release: &dyn Fn(),
    ) -> Result<Rc<Matrix>, ModelError> {
        let forward = Cpu.matrix(place, stored, bias, activations, release)?;
        let back = Transposed::new(stored).map_err(|e| ModelError::bad(place, e))?;
        Ok(Rc::new(Matrix { place: *place, forward, back }))
    }

    fn experts(&self, all: Vec<Rc<Matrix>>) -> Vec<Rc<Matrix>> {
        all
    }

    fn measure(&self, matrix: &Rc<Matrix>) -> Measure {
        Cpu.measure(&matrix.forward)
    }

    fn norm_of(
        &self,
        place: &Place,
        norm: Norm,
        width: usize,
        scale: Option<Vec<f32>>,
        bias: Option<Vec<f32>>,
    ) -> Rc<PlacedNorm> {
        let scaled = scale.is_some();
        Rc::new(PlacedNorm { place: *place, scaled, of: Cpu.norm_of(place, norm, width, scale, bias) })
    }

    fn table(&self, stored: Arc<Stored>) -> Self::Table {
        Cpu.table(stored)
    }

    fn rope_of(&self, rope: &Rope) -> RopeTable {
        Cpu.rope_of(rope)
    }

    fn pages(&self, layout: KvLayout, format: KvFormat) -> RecordedPages {
        RecordedPages { pool: Cpu.pages(layout, format), written: None }
    }

    fn mixer_of(&self, place: &Place, mixer: &Mixer, hidden: usize, vectors: MixerVectors) -> Rc<RecordedMixer> {
        let forward = Cpu.mixer_of(place, mixer, hidden, vectors.clone());
        let (mixer, channels) = (mixer.clone(), mixer.channels(hidden));
        Rc::new(RecordedMixer { place: *place, mixer, channels, vectors, forward })
    }

    fn states(&self, mixer: &Mixer, hidden: usize) -> SlotStates<f32> {
        Cpu.states(mixer, hidden)
    }

    fn begin(&self, batch: &Batch, tables: Tables) -> Self::Step {
        assert!(batch.positions().iter().copied().eq(0..batch.rows()), "a whole sequence from its first position on");
        Cpu.begin(batch, tables)
    }

    fn finish(&self) -> Result<(), ModelError> {
        Cpu.finish()
    }

    fn upload(&self, x: MatRef<'_>) -> Node {
        self.node(Cpu.upload(x))
    }

    fn upload_ids(&self, ids: &[u32]) -> Self::Ids {
        Cpu.upload_ids(ids)
    }

    fn download<'a>(&self, x: &'a Node, rows: Range<usize>) -> Result<Host<'a>, ModelError> {
        Cpu.download(&x.value, rows)
    }

    fn download_ids(&self, ids: &Self::Ids) -> Result<Vec<u32>, ModelError> {
        Cpu.download_ids(ids)
    }

    fn download_starts(&self, routes: &RecordedRoutes) -> Result<Vec<usize>, ModelError> {
        Cpu.download_starts(&routes.routes)
    }

    fn shape(&self, x: &Node) -> (usize, usize) {
        Cpu.shape(&x.value)
    }

    fn copy(&self, x: &Node) -> Node {
        // Values do not change while several hold them.
        x.clone()
    }

    fn pick(&self, x: &Node, rows: &[usize]) -> Node {
        let out = self.node(Cpu.pick(&x.value, rows));
        self.record(Entry::Pick { x: x.id, of: x.value.rows(), rows: rows.to_vec(), out: out.id });
        out
    }

    fn embed(&self, table: &Self::Table, ids: &Self::Ids) -> Node {
        // Gradients of the embedding are not taken: the way back ends here.
        self.node(Cpu.embed(table, ids))
    }

    fn products<const N: usize>(&self, all: [&Rc<Matrix>; N], x: &Node) -> [Node; N] {
        let out = Cpu.products(all.map(|m| &m.forward), &x.value).map(|y| self.node(y));
        let ids = out.each_ref().map(|y| y.id).to_vec();
        self.record(Entry::Products { matrices: all.map(Rc::clone).to_vec(), x: x.clone(), out: ids });
        out
    }

    fn norm(&self, norm: &Rc<PlacedNorm>, x: &Node) -> Node {
        let out = self.node(Cpu.norm(&norm.of, &x.value));
        self.record(Entry::Norm { norm: norm.clone(), x: x.clone(), out: out.id });
        out
    }

    fn norm_pieces(&self, norm: &Rc<PlacedNorm>, pieces: usize, x: &Node) -> Node {
        if pieces == 1 {
            return self.norm(norm, x);
        }
        let out = self.node(Cpu.norm_pieces(&norm.of, pieces, &x.value));
        self.record(Entry::NormPieces { norm: norm.clone(), pieces, x: x.clone(), out: out.id });
        out
    }

    fn convolve(
        &self,
        mixer: &Rc<RecordedMixer>,
        states: &mut SlotStates<f32>,
        layer: usize,
        step: &Self::Step,
        x: &Node,
    ) -> Node {
        let out = self.node(Cpu.convolve(&mixer.forward, states, layer, step, &x.value));
        self.record(Entry::Convolve { mixer: mixer.clone(), x: x.clone(), out: out.id });
        out
    }

    fn scan(
        &self,
        mixer: &Rc<RecordedMixer>,
        states: &mut SlotStates<f32>,
        layer: usize,
        step: &Self::Step,
        [x, dt]: [&Node; 2],
        beta: Option<&Node>,
    ) -> Node {
        let read = [&*x.value, &*dt.value];
        let out = self.node(Cpu.scan(&mixer.forward, states, layer, step, read, beta.map(|b| &*b.value)));
        let (kept, x, dt) = (mixer.clone(), x.clone(), dt.clone());
        self.record(Entry::Scan { mixer: kept, x, dt, beta: beta.cloned(), out: out.id });
        out
    }

    fn rope<const N: usize>(&self, rope: &RopeTable, head_dim: usize, step: &Self::Step, x: [&mut Node; N]) {
        for x in x {
            let at: Vec<(usize, usize)> = step.batch.places().collect();
            let turn = |y: &mut Lent| {
                rope.with(at.iter().copied(), |angles| angles.apply(head_dim, y.view_mut()));
            };
            let (x, out) = self.change(x, turn);
            self.record(Entry::Rope { table: rope.clone(), head_dim, at, x, out });
        }
    }

    fn activate(&self, act: Activation, x: &mut Node, up: Option<&Node>) {
        let read = x.clone();
        let (_, out) = self.change(x, |y| Cpu.activate(act, y, up.map(|up| &*up.value)));
        self.record(Entry::Activate { act, x: read, up: up.cloned(), out });
    }

    fn xielu(&self, of: Xielu, x: &mut Node) {
        let read = x.clone();
        let (_, out) = self.change(x, |y| Cpu.xielu(of, y));
        self.record(Entry::Xielu { of, x: read, out });
    }

    fn clip(&self, x: &mut Node, by: f32) {
        let read = x.clone();
        let (_, out) = self.change(x, |y| Cpu.clip(y, by));
        self.record(Entry::Clip { by, x: read, out });
    }

    fn temper(&self, by: Temperature, step: &Self::Step, x: &mut Node) {
        let factors = step.batch.positions().iter().map(|&p| by.at(p) as f32).collect();
        let (x, out) = self.change(x, |y| Cpu.temper(by, step, y));
        self.record(Entry::Temper { by: factors, x, out });
    }

    fn add(&self, x: &mut Node, y: &Node) {
        let (before, out) = self.change(x, |x| Cpu.add(x, &y.value));
        self.record(Entry::Add { x: before, y: y.id, out });
    }

    fn scale(&self, x: &mut Node, by: f32) {
        let (x, out) = self.change(x, |x| Cpu.scale(x, by));
        self.record(Entry::Scale { x, by, out });
    }

    fn softcap(&self, x: &mut Node, cap: f32) {
        let (before, out) = self.change(x, |x| Cpu.softcap(x, cap));
        self.record(Entry::Softcap { x: before, cap, y: x.value.clone(), out });
    }

    fn weigh_rows(&self, x: &mut Node, by: &Node) {
        let read = x.clone();
        let (_, out) = self.change(x, |x| Cpu.weigh_rows(x, &by.value));
        self.record(Entry::WeighRows { x: read, by: by.clone(), out });
    }

    fn mix(&self, x: &Node, ins: usize, by: &Node) -> Node {
        let out = self.node(Cpu.mix(&x.value, ins, &by.value));
        self.record(Entry::Mix { x: x.clone(), ins, by: by.clone(), out: out.id });
        out
    }

    fn scale_columns(&self, place: &Place, x: &mut Node, by: &Node) {
        let read = x.clone();
        let (_, out) = self.change(x, |x| Cpu.scale_columns(place, x, &by.value));
        self.record(Entry::ScaleColumns { place: *place, x: read, by: by.clone(), out });
    }

    fn match_magnitude(&self, x: &mut Node, like: &Node) {
        let read = x.clone();
        let (_, out) = self.change(x, |x| Cpu.match_magnitude(x, &like.value));
        self.record(Entry::MatchMagnitude { x: read, like: like.clone(), out });
    }

    fn cut_off(&self, x: &mut Node, by: f32) {
        let read = x.clone();
        let (_, out) = self.change(x, |x| Cpu.cut_off(x, by));
        self.record(Entry::CutOff { x: read, by, out });
    }

    fn columns(&self, x: &Node, width: usize, which: Range<usize>) -> Node {
        let out = self.node(Cpu.columns(&x.value, width, which.clone()));
        self.record(Entry::Columns { x: x.id, width, which, out: out.id });
        out
    }

    fn beside(&self, all: [&Node; 2], widths: [usize; 2]) -> Node {
        let out = self.node(Cpu.beside(all.map(|x| &*x.value), widths));
        self.record(Entry::Beside { all: all.map(|x| x.id), widths, out: out.id });
        out
    }

    fn head_products(&self, all: &Vec<Rc<Matrix>>, x: &Node) -> Node {
        let out = self.node(backend::heads(all.iter().map(|m| &m.forward), &x.value));
        self.record(Entry::HeadProducts { heads: all.clone(), x: x.clone(), out: out.id });
        out
    }

    fn write(&self, pages: &mut RecordedPages, layer: usize, step: &Self::Step, keys: &Node, values: &Node) {
        Cpu.write(&mut pages.pool, layer, step, &keys.value, &values.value);
        pages.written = Some([keys.clone(), values.clone()]);
    }

    fn attend(&self, how: &Attention, pages: &RecordedPages, layer: usize, step: &Self::Step, q: &Node) -> Node {
        let out = self.node(Cpu.attend(how, &pages.pool, layer, step, &q.value));
        let [k, v] = pages.written.clone().expect("keys and values are written before they are read");
        let head_dim = pages.pool.layout().head_dim;
        let read = [q.clone(), k, v];
        self.record(Entry::Attend { how: how.clone(), layer, head_dim, read, y: out.clone() });
        out
    }

    fn weigh(
        &self,
        how: &Attention,
        pages: &RecordedPages,
        layer: usize,
        step: &Self::Step,
        q: &Node,
        mass: &mut [Mass],
    ) {
        // A statistic: it has no gradient.
        Cpu.weigh(how, &pages.pool, layer, step, &q.value, mass);
    }

    fn route(&self, logits: &Node, choice: Experts, correction: Option<&Node>, scale: Option<&Node>) -> RecordedRoutes {
        let mut p = Cpu.copy(&logits.value);
        // The correction chooses and weighs nothing: it has no gradient.
        let (correction, factors) = (correction.map(|c| c.value.data()), scale.map(|s| s.value.data()));
        let routes = Rc::new(backend::route(&mut p, choice, correction, factors));
        let weights = self.node(Lent::new(0, 0)).id;
        self.record(Entry::Route {
            p: Rc::new(p),
            routes: routes.clone(),
            choice,
            scale: scale.cloned(),
            logits: logits.id,
            weights,
        });
        RecordedRoutes { routes, weights }
    }

    fn gather(&self, x: &Node, routes: &RecordedRoutes) -> Node {
        let out = self.node(Cpu.gather(&x.value, &routes.routes));
        if routes.routes.weigh_inputs {
            let (kept, weights) = (routes.routes.clone(), routes.weights);
            self.record(Entry::Gather { x: x.clone(), routes: kept, weights, out: out.id });
            return out;
        }
        let rows = routes.routes.rows.clone();
        self.record(Entry::Pick { x: x.id, of: x.value.rows(), rows, out: out.id });
        out
    }

    fn expert_products<const N: usize>(
        &self,
        all: [&Vec<Rc<Matrix>>; N],
        x: &Node,
        routes: &RecordedRoutes,
    ) -> [Node; N] {
        let forward = all.map(|experts| experts.iter().map(|m| &m.forward));
        let out = backend::grouped(forward, &x.value, &routes.routes);
        let out = out.map(|y| self.node(y));
        let ids = out.each_ref().map(|y| y.id).to_vec();
        let experts = all.map(Vec::clone).to_vec();
        self.record(Entry::ExpertProducts { experts, x: x.clone(), routes: routes.routes.clone(), out: ids });
        out
    }

    fn scatter(&self, y: &Node, routes: &RecordedRoutes) -> Node {
        let out = self.node(Cpu.scatter(&y.value, &routes.routes));
        let (kept, weights) = (routes.routes.clone(), routes.weights);
        self.record(Entry::Scatter { y: y.clone(), routes: kept, weights, out: out.id });
        out
    }

    fn argmax(&self, x: &Node) -> Self::Ids {
        Cpu.argmax(&x.value)
    }
}

/// Gradients of values, by their numbers.
#[derive(Default)]
pub(super) struct Gradients(HashMap<usize, Lent>);

impl Gradients {
    pub(super) fn of(id: usize, d: Lent) -> Gradients {
        Gradients(HashMap::from([(id, d)]))
    }

    /// Takes a value's: everything that reads it has been walked back.
    pub(super) fn take(&mut self, id: usize) -> Option<Lent> {
        self.0.remove(&id)
    }

    /// A value's so far, of that shape.
    pub(super) fn so_far(&mut self, id: usize, rows: usize, cols: usize) -> &mut Lent {
        self.0.entry(id).or_insert_with(|| super::rows::zeros(rows, cols))
    }

    /// Adds to a value's.
    pub(super) fn add(&mut self, id: usize, d: Lent) {
        match self.0.entry(id) {
            std::collections::hash_map::Entry::Vacant(empty) => {
                empty.insert(d);
            }
            std::collections::hash_map::Entry::Occupied(mut sum) => Cpu.add(sum.get_mut(), &d),
        }
    }
}
