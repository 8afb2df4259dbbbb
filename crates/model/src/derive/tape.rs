//! What a recorded step leaves behind, and the walk back over it: the adjoint of each operation, the last one first.

use std::collections::HashMap;
use std::rc::Rc;

use lacuna_base::{MatMut, MatRef};
use lacuna_kernels::{Attention, RopeTable};
use lacuna_spec::{Activation, Experts, Place, Role};

use super::activation::xielu_numbers;
use super::recorder::{Gradients, Matrix, PlacedNorm, RecordedMixer};
use super::recurrent::{Scanned, convolution, scan};
use super::rows::{copy, dot, zeros};
use super::sink::GradientSink;
use super::streams::{cut_off, match_magnitude, mix, scale_columns};
use super::{
    activation, attention, bias, clip, gated_activation, norm, product, rope, routing, softcap, weigh_rows, xielu,
};
use crate::Lent;
use crate::backend::{Backend, Cpu, Routes, Xielu};

/// A value and its number. It does not change while several hold it.
#[derive(Clone)]
pub(crate) struct Node {
    pub(super) id: usize,
    pub(super) value: Rc<Lent>,
}

impl Node {
    fn view(&self) -> MatRef<'_> {
        self.value.view()
    }

    /// Rows of a product's input that belong to one expert.
    fn part(&self, rows: &std::ops::Range<usize>) -> MatRef<'_> {
        self.view().rows_range(rows.start, rows.end)
    }
}

/// An operation: what its adjoint reads, and the numbers of what went in and came out.
pub(super) enum Entry {
    Products {
        matrices: Vec<Rc<Matrix>>,
        x: Node,
        out: Vec<usize>,
    },
    ExpertProducts {
        experts: Vec<Vec<Rc<Matrix>>>,
        x: Node,
        routes: Rc<Routes>,
        out: Vec<usize>,
    },
    Norm {
        norm: Rc<PlacedNorm>,
        x: Node,
        out: usize,
    },
    NormPieces {
        norm: Rc<PlacedNorm>,
        pieces: usize,
        x: Node,
        out: usize,
    },
    Convolve {
        mixer: Rc<RecordedMixer>,
        x: Node,
        out: usize,
    },
    Scan {
        mixer: Rc<RecordedMixer>,
        x: Node,
        dt: Node,
        beta: Option<Node>,
        out: usize,
    },
    Rope {
        table: RopeTable,
        head_dim: usize,
        at: Vec<(usize, usize)>,
        x: usize,
        out: usize,
    },
    Activate {
        act: Activation,
        x: Node,
        up: Option<Node>,
        out: usize,
    },
    Xielu {
        of: Xielu,
        x: Node,
        out: usize,
    },
    Clip {
        by: f32,
        x: Node,
        out: usize,
    },
    /// Rows times a factor each.
    Temper {
        by: Vec<f32>,
        x: usize,
        out: usize,
    },
    Add {
        x: usize,
        y: usize,
        out: usize,
    },
    Scale {
        x: usize,
        by: f32,
        out: usize,
    },
    Softcap {
        x: usize,
        cap: f32,
        y: Rc<Lent>,
        out: usize,
    },
    /// Rows times sigmoids, and what these are of.
    WeighRows {
        x: Node,
        by: Node,
        out: usize,
    },
    /// Streams out of others, by weights of each row.
    Mix {
        x: Node,
        ins: usize,
        by: Node,
        out: usize,
    },
    /// Rows times a vector.
    ScaleColumns {
        place: Place,
        x: Node,
        by: Node,
        out: usize,
    },
    MatchMagnitude {
        x: Node,
        like: Node,
        out: usize,
    },
    CutOff {
        x: Node,
        by: f32,
        out: usize,
    },
    /// Of pieces of `width` columns some.
    Columns {
        x: usize,
        width: usize,
        which: std::ops::Range<usize>,
        out: usize,
    },
    /// Pieces of two values side by side.
    Beside {
        all: [usize; 2],
        widths: [usize; 2],
        out: usize,
    },
    HeadProducts {
        heads: Vec<Rc<Matrix>>,
        x: Node,
        out: usize,
    },
    Attend {
        how: Attention,
        layer: usize,
        head_dim: usize,
        read: [Node; 3],
        y: Node,
    },
    Route {
        p: Rc<Lent>,
        routes: Rc<Routes>,
        choice: Experts,
        scale: Option<Node>,
        logits: usize,
        weights: usize,
    },
    /// Rows that experts read, times their weights.
    Gather {
        x: Node,
        routes: Rc<Routes>,
        weights: usize,
        out: usize,
    },
    /// Rows of a value of `of` rows.
    Pick {
        x: usize,
        of: usize,
        rows: Vec<usize>,
        out: usize,
    },
    Scatter {
        y: Node,
        routes: Rc<Routes>,
        weights: usize,
        out: usize,
    },
}

/// Operations in the order in which they were done.
pub(super) struct Tape(Vec<Entry>);

impl Tape {
    pub(super) fn new(entries: Vec<Entry>) -> Tape {
        Tape(entries)
    }

    /// Bytes of the values that it holds.
    pub(super) fn bytes(&self) -> u64 {
        let all = self.0.iter().flat_map(|e| -> Vec<&Rc<Lent>> {
            match e {
                Entry::Products { x, .. }
                | Entry::ExpertProducts { x, .. }
                | Entry::HeadProducts { x, .. }
                | Entry::Norm { x, .. } => vec![&x.value],
                Entry::WeighRows { x, by, .. } | Entry::Mix { x, by, .. } => vec![&x.value, &by.value],
                Entry::MatchMagnitude { x, like, .. } => vec![&x.value, &like.value],
                Entry::ScaleColumns { x, .. } | Entry::CutOff { x, .. } => vec![&x.value],
                Entry::NormPieces { x, .. } | Entry::Convolve { x, .. } => vec![&x.value],
                Entry::Scan { x, dt, beta, .. } => [x, dt].into_iter().chain(beta).map(|n| &n.value).collect(),
                Entry::Activate { x, up, .. } => [x].into_iter().chain(up).map(|n| &n.value).collect(),
                Entry::Attend { read, y, .. } => read.iter().chain([y]).map(|n| &n.value).collect(),
                Entry::Softcap { y, .. } => vec![y],
                Entry::Xielu { x, .. } | Entry::Clip { x, .. } => vec![&x.value],
                Entry::Route { p, .. } => vec![p],
                Entry::Scatter { y: x, .. } | Entry::Gather { x, .. } => vec![&x.value],
                Entry::Rope { .. }
                | Entry::Temper { .. }
                | Entry::Add { .. }
                | Entry::Scale { .. }
                | Entry::Columns { .. }
                | Entry::Beside { .. }
                | Entry::Pick { .. } => Vec::new(),
            }
        });
        let once: HashMap<*const Lent, u64> = all.map(|v| (Rc::as_ptr(v), 4 * v.data().len() as u64)).collect();
        once.values().sum()
    }

    /// Walks back from the gradients of what came out to those of what went in. `sink` is shown what it wants.
    pub(super) fn back(&self, d: &mut Gradients, sink: &mut dyn GradientSink) {
        self.0.iter().rev().for_each(|entry| entry.back(d, sink));
    }
}

impl Entry {
    /// The adjoint: takes the gradients of what came out and adds to those of what went in. What nobody read has none.
    fn back(&self, d: &mut Gradients, sink: &mut dyn GradientSink) {
        match self {
            Entry::Products { matrices, x, out } => {
                for (m, out) in matrices.iter().zip(out) {
                    let Some(dy) = d.take(*out) else { continue };
                    let (rows, cols) = (x.value.rows(), x.value.cols());
                    through(m, x.view(), dy.view(), d.so_far(x.id, rows, cols).view_mut(), sink);
                }
            }
            Entry::ExpertProducts { experts, x, routes, out } => {
                for (experts, out) in experts.iter().zip(out) {
                    let Some(dy) = d.take(*out) else { continue };
                    let cols = x.value.cols();
                    let dx = d.so_far(x.id, x.value.rows(), cols);
                    for (e, rows) in routes.busy() {
                        let part = &mut dx.data_mut()[rows.start * cols..rows.end * cols];
                        let dy = dy.view().rows_range(rows.start, rows.end);
                        through(&experts[e], x.part(&rows), dy, MatMut::new(rows.len(), cols, part), sink);
                    }
                }
            }
            Entry::Norm { norm, x, out } => {
                let Some(dy) = d.take(*out) else { return };
                let dx = d.so_far(x.id, x.value.rows(), x.value.cols());
                // Heads lie one after the other.
                let dim = norm.of.width;
                let heads = dy.data().len() / dim;
                through_norm(
                    norm,
                    MatRef::new(heads, dim, x.value.data()),
                    MatRef::new(heads, dim, dy.data()),
                    MatMut::new(heads, dim, dx.data_mut()),
                    sink,
                );
            }
            Entry::NormPieces { norm, pieces, x, out } => {
                let Some(dy) = d.take(*out) else { return };
                let (rows, cols) = (x.value.rows(), x.value.cols());
                let dx = d.so_far(x.id, rows, cols);
                through_pieces(norm, *pieces, x.view(), dy.view(), dx.view_mut(), sink);
            }
            Entry::Convolve { mixer, x, out } => {
                let Some(dy) = d.take(*out) else { return };
                let of = convolution(&mixer.mixer, mixer.channels, &mixer.vectors, x.view(), dy.view());
                d.add(x.id, of.x);
                show(sink, &mixer.place, &of.conv);
                show(sink, &mixer.place.bias(), &of.bias);
            }
            Entry::Scan { mixer, x, dt, beta, out } => {
                let Some(dy) = d.take(*out) else { return };
                let beta_view = beta.as_ref().map(Node::view);
                let read = Scanned { x: x.view(), dt: dt.view(), beta: beta_view, dy: dy.view() };
                let of = scan(&mixer.mixer, &mixer.vectors, read);
                d.add(x.id, of.x);
                d.add(dt.id, of.dt);
                if let (Some(beta), Some(db)) = (beta, of.beta) {
                    d.add(beta.id, db);
                }
                show(sink, &Place { role: Role::MixerA, ..mixer.place }, &of.a);
                show(sink, &Place { role: Role::MixerD, ..mixer.place }, &of.d);
            }
            Entry::Rope { table, head_dim, at, x, out } => {
                let Some(mut dy) = d.take(*out) else { return };
                rope(table, at.iter().copied(), *head_dim, [dy.view_mut()]);
                d.add(*x, dy);
            }
            Entry::Activate { act, x, up, out } => {
                let Some(dy) = d.take(*out) else { return };
                let mut dx = Lent::new(dy.rows(), dy.cols());
                if let Some(up) = up {
                    let mut dup = Lent::new(dy.rows(), dy.cols());
                    gated_activation(*act, x.view(), up.view(), dy.view(), dx.view_mut(), dup.view_mut());
                    d.add(up.id, dup);
                } else {
                    activation(*act, x.view(), dy.view(), dx.view_mut());
                }
                d.add(x.id, dx);
            }
            Entry::Xielu { of, x, out } => {
                let Some(dy) = d.take(*out) else { return };
                let places = [Role::ActAbove, Role::ActBelow].map(|role| Place::layer(of.layer, role));
                for (place, g) in places.iter().zip(xielu_numbers(of, x.view(), dy.view())) {
                    if sink.wants(place) {
                        sink.vector(place, &[g]);
                    }
                }
                let mut dx = Lent::new(dy.rows(), dy.cols());
                xielu(of, x.view(), dy.view(), dx.view_mut());
                d.add(x.id, dx);
            }
            Entry::Clip { by, x, out } => {
                let Some(mut dy) = d.take(*out) else { return };
                clip(*by, x.value.data(), dy.data_mut());
                d.add(x.id, dy);
            }
            Entry::Temper { by, x, out } => {
                let Some(mut dy) = d.take(*out) else { return };
                by.iter().enumerate().for_each(|(r, by)| dy.row_mut(r).iter_mut().for_each(|d| *d *= by));
                d.add(*x, dy);
            }
            Entry::Add { x, y, out } => {
                let Some(dy) = d.take(*out) else { return };
                d.add(*y, copy(dy.view()));
                d.add(*x, dy);
            }
            Entry::Scale { x, by, out } => {
                let Some(mut dy) = d.take(*out) else { return };
                dy.data_mut().iter_mut().for_each(|d| *d *= by);
                d.add(*x, dy);
            }
            Entry::Softcap { x, cap, y, out } => {
                let Some(mut dy) = d.take(*out) else { return };
                softcap(*cap, y.data(), dy.data_mut());
                d.add(*x, dy);
            }
            Entry::WeighRows { x, by, out } => {
                let Some(dy) = d.take(*out) else { return };
                let (dx, dby) = weigh_rows(x.view(), by.view(), dy.view());
                d.add(x.id, dx);
                d.add(by.id, dby);
            }
            Entry::Mix { x, ins, by, out } => {
                let Some(dy) = d.take(*out) else { return };
                let (dx, dby) = mix(x.view(), *ins, by.view(), dy.view());
                d.add(x.id, dx);
                d.add(by.id, dby);
            }
            Entry::ScaleColumns { place, x, by, out } => {
                let Some(mut dy) = d.take(*out) else { return };
                let dby = scale_columns(x.view(), by.view(), &mut dy);
                d.add(x.id, dy);
                show(sink, place, dby.data());
            }
            Entry::MatchMagnitude { x, like, out } => {
                let Some(dy) = d.take(*out) else { return };
                let (dx, dlike) = match_magnitude(x.view(), like.view(), dy.view());
                d.add(x.id, dx);
                d.add(like.id, dlike);
            }
            Entry::CutOff { x, by, out } => {
                let Some(dy) = d.take(*out) else { return };
                d.add(x.id, cut_off(x.view(), *by, dy.view()));
            }
            Entry::Columns { x, width, which, out } => {
                let Some(dy) = d.take(*out) else { return };
                let dx = d.so_far(*x, dy.rows(), dy.cols() / which.len() * width);
                for r in 0..dy.rows() {
                    let pieces = dy.row(r).chunks_exact(which.len());
                    dx.row_mut(r).chunks_exact_mut(*width).zip(pieces).for_each(|(to, from)| {
                        to[which.clone()].iter_mut().zip(from).for_each(|(x, y)| *x += y);
                    });
                }
            }
            Entry::Beside { all, widths: [a, b], out } => {
                let Some(dy) = d.take(*out) else { return };
                for (x, which) in all.iter().zip([0..*a, *a..a + b]) {
                    d.add(*x, Cpu.columns(&dy, a + b, which));
                }
            }
            Entry::HeadProducts { heads, x, out } => {
                let Some(dy) = d.take(*out) else { return };
                let (inputs, outputs) = (x.value.cols() / heads.len(), dy.cols() / heads.len());
                let dx = d.so_far(x.id, x.value.rows(), x.value.cols());
                for (h, m) in heads.iter().enumerate() {
                    let (from, to) = (h * inputs, (h + 1) * inputs);
                    let mine = copy(x.view().columns(from, to));
                    let dy = copy(dy.view().columns(h * outputs, (h + 1) * outputs));
                    let mut part = zeros(mine.rows(), inputs);
                    through(m, mine.view(), dy.view(), part.view_mut(), sink);
                    for r in 0..mine.rows() {
                        dx.row_mut(r)[from..to].iter_mut().zip(part.row(r)).for_each(|(x, p)| *x += p);
                    }
                }
            }
            Entry::Attend { how, layer, head_dim, read, y } => {
                let Some(dy) = d.take(y.id) else { return };
                let of = attention(how, *head_dim, read.each_ref().map(Node::view), y.view(), dy.view());
                let place = Place::layer(*layer, Role::Sinks);
                if !of.sinks.is_empty() && sink.wants(&place) {
                    sink.vector(&place, &of.sinks);
                }
                for (node, dx) in read.iter().zip([of.q, of.k, of.v]) {
                    d.add(node.id, dx);
                }
            }
            Entry::Route { p, routes, choice, scale, logits, weights } => {
                let Some(dw) = d.take(*weights) else { return };
                let scale = scale.as_ref().map(|s| s.value.data());
                d.add(*logits, Lent::from(routing(p.view(), routes, dw.data(), *choice, scale)));
            }
            Entry::Gather { x, routes, weights, out } => {
                let Some(dy) = d.take(*out) else { return };
                let mut dw = zeros(1, routes.rows.len());
                let dx = d.so_far(x.id, x.value.rows(), dy.cols());
                for (i, (&r, &weight)) in routes.rows.iter().zip(&routes.weights).enumerate() {
                    dx.row_mut(r).iter_mut().zip(dy.row(i)).for_each(|(x, y)| *x += weight * y);
                    dw.row_mut(0)[i] = dot(x.value.row(r), dy.row(i));
                }
                d.add(*weights, dw);
            }
            Entry::Pick { x, of, rows, out } => {
                let Some(dy) = d.take(*out) else { return };
                let dx = d.so_far(*x, *of, dy.cols());
                for (i, &r) in rows.iter().enumerate() {
                    dx.row_mut(r).iter_mut().zip(dy.row(i)).for_each(|(x, y)| *x += y);
                }
            }
            Entry::Scatter { y, routes, weights, out } => {
                let Some(dout) = d.take(*out) else { return };
                let mut dy = zeros(routes.rows.len(), dout.cols());
                if routes.weigh_inputs {
                    routes.rows.iter().enumerate().for_each(|(i, &r)| dy.row_mut(i).copy_from_slice(dout.row(r)));
                    d.add(y.id, dy);
                    return;
                }
                let mut dw = zeros(1, routes.rows.len());
                for (i, (&r, &weight)) in routes.rows.iter().zip(&routes.weights).enumerate() {
                    dy.row_mut(i).iter_mut().zip(dout.row(r)).for_each(|(y, d)| *y = weight * d);
                    dw.row_mut(0)[i] = dot(dout.row(r), y.value.row(i));
                }
                d.add(y.id, dy);
                d.add(*weights, dw);
            }
        }
    }
}

/// Shows a gradient, where there is one and it is wanted.
fn show(sink: &mut dyn GradientSink, place: &Place, gradient: &[f32]) {
    if !gradient.is_empty() && sink.wants(place) {
        sink.vector(place, gradient);
    }
}

/// The adjoint of a norm of equal pieces of each row, whose scale goes over the whole row.
fn through_pieces(
    n: &PlacedNorm,
    pieces: usize,
    x: MatRef<'_>,
    dy: MatRef<'_>,
    mut dx: MatMut<'_>,
    sink: &mut dyn GradientSink,
) {
    let (rows, cols, stride) = (x.rows(), x.cols(), dx.stride());
    let wide = cols / pieces;
    let wanted = sink.wants(&n.place);
    let mut all = Vec::with_capacity(cols);
    for from in (0..cols).step_by(wide.max(1)).filter(|_| rows > 0) {
        let scale = &n.of.scale[from..from + wide];
        let part = MatMut::with_stride(rows, wide, stride, &mut dx.raw_mut()[from..]);
        let (x, dy) = (x.columns(from, from + wide), dy.columns(from, from + wide));
        if let Some(vectors) = norm(n.of.norm, scale, x, dy, part, wanted) {
            all.extend(vectors.scale);
        }
    }
    show(sink, &n.place, &all);
}

/// The adjoint of one matrix and its bias: shows both, and adds to the gradient of the input.
fn through(m: &Matrix, x: MatRef<'_>, dy: MatRef<'_>, dx: MatMut<'_>, sink: &mut dyn GradientSink) {
    if sink.wants(&m.place) {
        sink.gradient(&m.place, x, dy);
    }
    if m.forward.bias.is_some() && sink.wants(&m.place.bias()) {
        sink.vector(&m.place.bias(), &bias(dy));
    }
    product(&m.back, dy, dx);
}

/// The adjoint of a norm with its constants: adds to `dx`, and shows the gradients of its vectors.
fn through_norm(n: &PlacedNorm, x: MatRef<'_>, dy: MatRef<'_>, dx: MatMut<'_>, sink: &mut dyn GradientSink) {
    let (scale, bias) = (n.scaled && sink.wants(&n.place), n.of.bias.is_some() && sink.wants(&n.place.bias()));
    let Some(vectors) = norm(n.of.norm, &n.of.scale, x, dy, dx, scale || bias) else { return };
    if scale {
        sink.vector(&n.place, &vectors.scale);
    }
    if bias {
        sink.vector(&n.place.bias(), &vectors.bias);
    }
}
