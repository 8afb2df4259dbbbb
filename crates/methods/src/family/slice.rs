//! `slice`: the residual stream gets other axes and loses some of them; every matrix around it is folded.
//!
//! With `Q` `[D, d]`: matrices that read the stream become `W diag(scale) Q`, matrices that write it `Qᵀ W` (their
//! biases `Qᵀ b`), embedding rows `e Q`; the norms' scales become 1 and their divisor stays `D`, since `d` numbers now
//! stand under a root that was made for `D` (files that know no divisor get the scale `sqrt(D / d)` and `eps D / d`). A
//! tied head is untied: it reads behind the last norm's scale, the embedding does not.
//!
//! `basis = "one"`: the same `Q` everywhere, and a plain narrower model is left. `basis = "layer"`: every reader `s` of
//! the stream (attentions, FFNs, the head) has its own `Q_s`, found front to back on a stream that the cuts before it
//! have already changed, and the shortcut from one to the next is the matrix `Q_sᵀ Q_{s+1}`, `[d, d]`. Such a model is
//! kept in the packed format only.

use std::sync::Arc;

use lacuna_base::dense::{matmul_nn, matmul_nn_f64, matmul_tn, matmul_tn_f64};
use lacuna_base::units::show_bytes;
use lacuna_base::{Mat, Mat64};
use lacuna_contract::{
    Ask, Basis, Edit, Family, Finished, LayerWork, Made, Making, MethodError, ModelWide, Reader, Site, Step, Turn,
    Walker,
};
use lacuna_format::Unpacked;
use lacuna_spec::{NormKind, NormVectors, Order, Part, Place, Positions, Role, Spec};
use serde::Deserialize;

use super::keys::{Fraction, Whole};
use super::{plain_blocks, wrong};
use crate::make;

/// Who shares a basis.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Of {
    /// All layers.
    One,
    /// Every attention, every FFN and the head has its own.
    Layer,
}

/// What the methods share.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Keys {
    /// Fraction of the residual stream's width that stays.
    keep: Fraction,
    /// The width that stays is a multiple of this, where it is not the whole.
    align: Whole<1, 4096>,
    /// Who shares a basis: "one" for all, "layer" for one a part.
    basis: Of,
}

impl Default for Keys {
    fn default() -> Keys {
        Keys { keep: Fraction(0.75), align: Whole(32), basis: Of::One }
    }
}

pub(crate) fn family() -> Family {
    Family { verb: "slice", keys: make::keys::<Keys>, make: slice }
}

#[derive(Clone)]
struct Slice {
    keep: f64,
    align: usize,
    basis: Of,
    by: Arc<dyn Basis>,
}

fn slice(making: &Making<'_>) -> Result<Step, MethodError> {
    let (keys, made) = make::split::<Keys>(making)?;
    let Made::Basis(by) = made else { return Err(wrong(making, &made)) };
    let (keep, align) = (keys.keep.0, keys.align.0);
    Ok(Step::Model(Box::new(Slice { keep, align, basis: keys.basis, by: by.into() })))
}

/// The matrix of a layer that every token's FFN input meets.
fn ffn_reader(spec: &Spec, layer: usize) -> Option<Role> {
    let ffn = spec.layers[layer].ffn.as_ref()?;
    Some(match (ffn.experts, ffn.gated) {
        (Some(_), _) => Role::Router,
        (None, true) => Role::Gate,
        (None, false) => Role::Up,
    })
}

/// The norm before a matrix that reads the residual stream; `None` for one that does not.
fn norm_of(place: &Place) -> Option<Place> {
    let role = match place.role {
        Role::Q | Role::K | Role::V => Role::AttnNorm,
        Role::Gate | Role::Up | Role::Router => Role::FfnNorm,
        Role::SharedGate | Role::SharedUp | Role::SharedRouter => Role::FfnNorm,
        Role::Head => Role::FinalNorm,
        _ => return None,
    };
    Some(Place { role, expert: None, ..*place })
}

impl Slice {
    fn width(&self, hidden: usize) -> usize {
        let units = (self.keep * hidden as f64 / self.align as f64).round() as usize;
        (units * self.align).clamp(self.align.min(hidden), hidden)
    }
}

impl ModelWide for Slice {
    fn needs(&self, spec: &Spec, layer: usize) -> Vec<(Site, Ask)> {
        let Some(here) = spec.layers.get(layer) else {
            return vec![(Site::Matrix(Place::global(Role::Head)), Ask::InputGram)];
        };
        let attention = here.attn.as_ref().map(|_| Role::Q);
        let roles = attention.into_iter().chain(ffn_reader(spec, layer));
        roles.map(|role| (Site::Matrix(Place::layer(layer, role)), Ask::InputGram)).collect()
    }

    fn scratch_bytes(&self, spec: &Spec) -> u64 {
        let (d, vocab) = (spec.hidden as u64, spec.vocab as u64);
        // In f64 the signals, what the eigenvectors are made of, two bases and a map; the embedding as it was, folded
        // and packed, and a head beside it.
        8 * 8 * d * d + 14 * vocab * d
    }

    fn turns(&self) -> bool {
        self.basis == Of::Layer
    }

    fn check(&self, spec: &Spec) -> Result<(), MethodError> {
        plain_blocks(spec)?;
        let no =
            |what: &str| Err(MethodError::new(format!("{}: {what}; the residual stream cannot be turned", spec.arch)));
        if spec.norm.kind != NormKind::Rms {
            return no("its norms subtract the mean (LayerNorm)");
        }
        if spec.norm.vectors != NormVectors::All {
            return no("its norms have no scales that could be folded");
        }
        if !matches!(spec.positions, Positions::None) {
            return no("learned positions are added to the stream");
        }
        if spec.embed_norm {
            return no("a norm stands behind the embedding");
        }
        if spec.layers.iter().any(|l| l.order != Order::Sequential) {
            return no("attention and FFN stand side by side");
        }
        let bare = |l: &lacuna_spec::LayerSpec| {
            l.attn.as_ref().is_some_and(|a| !a.pre_norm) || l.ffn.as_ref().is_some_and(|f| !f.pre_norm)
        };
        if spec.layers.iter().any(bare) {
            return no("parts read the stream without a norm before them");
        }
        let post = |l: &lacuna_spec::LayerSpec| {
            l.attn.as_ref().is_some_and(|a| a.post_norm) || l.ffn.as_ref().is_some_and(|f| f.post_norm)
        };
        if spec.layers.iter().any(post) {
            return no("norms stand behind attention or FFN (post-norm)");
        }
        if spec.layers.iter().any(|l| l.attn.as_ref().is_some_and(|a| a.latent.is_some())) {
            return no("queries and keys are made from latents");
        }
        if !spec.final_norm {
            return no("no norm stands before the head");
        }
        if let Some(place) = spec.first_shortcut() {
            return no(&format!("it was turned layer by layer before ({place})"));
        }
        Ok(())
    }

    fn reshapes(&self) -> bool {
        true
    }

    fn begin(&self, spec: &Spec) -> Result<Box<dyn Walker>, MethodError> {
        let (slice, n) = (self.clone(), spec.hidden);
        Ok(match self.basis {
            Of::One => Box::new(Watch { slice, sum: Mat64::zeros(n, n) }),
            Of::Layer => Box::new(Each { slice, last: None, shortcuts: 0, least: 1.0, all: 0.0, readers: 0 }),
        })
    }
}

/// A norm's scale as it multiplies.
fn scale(work: &dyn LayerWork, norm: &Place) -> Result<Vec<f32>, MethodError> {
    let offset = work.spec().norm.offset;
    Ok(work.weight(norm)?.into_vec().into_iter().map(|s| s + offset).collect())
}

/// The mean outer product of a reader's signals, the norm's scale taken out: it goes into the matrices, and the basis
/// is that of what comes before it. What the scale mutes says nothing.
fn signals(work: &dyn LayerWork, reader: &Place) -> Result<Mat64, MethodError> {
    let Some(norm) = norm_of(reader) else { return Err(MethodError::new(format!("{reader} reads behind no norm"))) };
    let mut gram = make::gram(&work.stats(Site::Matrix(*reader)), work.spec().hidden)?.mean();
    let inverse: Vec<f64> =
        scale(work, &norm)?.iter().map(|s| if *s == 0.0 { 0.0 } else { 1.0 / f64::from(*s) }).collect();
    for r in 0..gram.rows() {
        gram.row_mut(r).iter_mut().zip(&inverse).for_each(|(v, c)| *v *= inverse[r] * c);
    }
    Ok(gram)
}

/// The fraction of `gram`'s energy that lies along the columns of `q`.
fn share(gram: &Mat64, q: &Mat64) -> f64 {
    let all: f64 = (0..gram.rows()).map(|i| gram[(i, i)]).sum();
    let along = matmul_nn_f64(gram, q);
    let kept: f64 = along.data().iter().zip(q.data()).map(|(a, b)| a * b).sum();
    kept / all.max(f64::MIN_POSITIVE)
}

/// The new network, but for its shortcuts.
fn narrower(spec: &Spec, width: usize) -> Spec {
    let mut new = spec.clone();
    let divisor = spec.norm.divisor.unwrap_or(spec.hidden);
    (new.hidden, new.tied) = (width, false);
    new.norm.divisor = (divisor != width).then_some(divisor);
    new
}

/// The first walk: what the stream carries.
struct Watch {
    slice: Slice,
    /// Mean outer products of normalised signals, summed over the places seen.
    sum: Mat64,
}

impl Walker for Watch {
    fn visit(&mut self, layer: usize, work: &dyn LayerWork) -> Result<Vec<Edit>, MethodError> {
        for (site, _) in self.slice.needs(work.spec(), layer) {
            let Site::Matrix(place) = site else { continue };
            let gram = signals(work, &place)?;
            self.sum.data_mut().iter_mut().zip(gram.data()).for_each(|(sum, v)| *sum += v);
        }
        Ok(Vec::new())
    }

    fn finish(self: Box<Self>, work: &dyn LayerWork) -> Result<Finished, MethodError> {
        let spec = work.spec();
        let (hidden, width) = (spec.hidden, self.slice.width(spec.hidden));
        let q = self.slice.by.basis(&self.sum, width)?;
        let share = 100.0 * share(&self.sum, &q);
        let note =
            format!("kept {width} of {hidden} axes of the residual stream, with {share:.2}% of its normalised energy");
        Ok(Finished { edits: Vec::new(), note, again: Some(Box::new(Fold { q: q.to_f32() })) })
    }
}

/// `W diag(scale) Q`, `[out, d]`.
fn reads(w: Mat, scale: &[f32], q: &Mat) -> Mat {
    let mut w = w;
    for r in 0..w.rows() {
        w.row_mut(r).iter_mut().zip(scale).for_each(|(v, s)| *v *= s);
    }
    matmul_nn(w.view(), q.view())
}

/// Whether what is at `place` writes the stream; what does not reads it, or stands beside it.
fn writes(place: &Place) -> bool {
    matches!(place.role, Role::O | Role::Down | Role::SharedDown | Role::Embed)
}

/// The tensor at `place` around a stream with the axes `q`, `[D, d]`; `None` where it stays as it is.
fn folded(place: Place, q: &Mat, work: &dyn LayerWork) -> Result<Option<Edit>, MethodError> {
    let weight = || work.weight(&place);
    let norm = matches!(place.role, Role::AttnNorm | Role::FfnNorm | Role::FinalNorm);
    Ok(match (place.part, place.role) {
        (Part::Weight, _) if norm => Some(Edit::Vector(place, vec![1.0 - work.spec().norm.offset; q.cols()])),
        (Part::Weight, Role::O | Role::Down | Role::SharedDown) => {
            Some(Edit::Matrix(place, Unpacked::dense(matmul_tn(q.view(), weight()?.view()))))
        }
        (Part::Bias, Role::O | Role::Down | Role::SharedDown) => {
            Some(Edit::Vector(place, matmul_nn(weight()?.view(), q.view()).into_vec()))
        }
        (Part::Weight, Role::Embed) => {
            Some(Edit::Matrix(place, Unpacked::dense(matmul_nn(weight()?.view(), q.view()))))
        }
        (Part::Weight, _) => match norm_of(&place) {
            Some(norm) => Some(Edit::Matrix(place, Unpacked::dense(reads(weight()?, &scale(work, &norm)?, q)))),
            None => None,
        },
        (Part::Bias, _) => None,
    })
}

/// A tied head, untied: it reads behind the last norm, the embedding stands before the first; from here on they differ.
fn untied(q: &Mat, work: &dyn LayerWork) -> Result<Edit, MethodError> {
    let norm = scale(work, &Place::global(Role::FinalNorm))?;
    let w = reads(work.weight(&Place::global(Role::Embed))?, &norm, q);
    Ok(Edit::Matrix(Place::global(Role::Head), Unpacked::dense(w)))
}

/// The second walk with one basis: every matrix around the stream.
struct Fold {
    /// `[D, d]`.
    q: Mat,
}

impl Walker for Fold {
    fn visit(&mut self, layer: usize, work: &dyn LayerWork) -> Result<Vec<Edit>, MethodError> {
        let mut places = work.spec().layer_places(layer);
        let mut edits = Vec::new();
        if layer == 0 {
            places.extend(work.spec().places().into_iter().filter(|p| p.layer.is_none()));
            if work.spec().tied {
                edits.push(untied(&self.q, work)?);
            }
        }
        for place in places {
            edits.extend(folded(place, &self.q, work)?);
        }
        Ok(edits)
    }

    fn finish(self: Box<Self>, work: &dyn LayerWork) -> Result<Finished, MethodError> {
        let spec = work.spec();
        let note = if spec.tied { "; the head is untied from the embedding" } else { "" };
        let edits = vec![Edit::Spec(Box::new(narrower(spec, self.q.cols())))];
        Ok(Finished { edits, note: note.into(), again: None })
    }
}

/// The one walk with a basis a reader: what lies between two readers is folded as soon as both bases are known.
struct Each {
    slice: Slice,
    /// The reader before, with its basis `[D, d]`.
    last: Option<(Reader, Mat64)>,
    /// Matrices in shortcuts.
    shortcuts: u64,
    /// Shares of the readers' energy: the least and their sum.
    least: f64,
    all: f64,
    readers: u64,
}

/// The matrix in whose name a reader's inputs are gathered.
fn named(spec: &Spec, reader: Reader) -> Result<Place, MethodError> {
    let role = match reader {
        Reader::Attention(l) => Some(Place::layer(l, Role::Q)),
        Reader::Ffn(l) => ffn_reader(spec, l).map(|role| Place::layer(l, role)),
        Reader::Head => Some(Place::global(Role::Head)),
    };
    role.ok_or_else(|| MethodError::new(format!("{reader:?} is not there")))
}

/// The tensors of a reader: its norm, what reads behind it and what writes for it.
fn places_of(spec: &Spec, reader: Reader) -> Vec<Place> {
    let ffn = |p: &Place| p.role.name().starts_with("ffn.");
    match reader {
        Reader::Attention(l) => spec.layer_places(l).into_iter().filter(|p| !ffn(p)).collect(),
        Reader::Ffn(l) => spec.layer_places(l).into_iter().filter(ffn).collect(),
        Reader::Head => [Role::FinalNorm, Role::Head].map(Place::global).into_iter().collect(),
    }
}

impl Walker for Each {
    fn visit(&mut self, _: usize, _: &dyn LayerWork) -> Result<Vec<Edit>, MethodError> {
        Err(MethodError::new("a basis a layer is found at its readers"))
    }

    fn turn(&mut self, before: Reader, work: &dyn LayerWork) -> Result<Turn, MethodError> {
        let spec = work.spec();
        // Of the stream itself, not of what the norm makes of it: that is what is cut.
        let gram = make::gram(&work.stats(Site::Matrix(named(spec, before)?)), spec.hidden)?.mean();
        let next = self.slice.by.basis(&gram, self.slice.width(spec.hidden))?;
        let share = share(&gram, &next);
        (self.least, self.all, self.readers) = (self.least.min(share), self.all + share, self.readers + 1);
        let q = next.to_f32();
        // What writes the stream that this reader reads, then the reader.
        let mut places = match &self.last {
            None => vec![Place::global(Role::Embed)],
            Some((last, _)) => places_of(spec, *last).into_iter().filter(writes).collect(),
        };
        places.extend(places_of(spec, before).into_iter().filter(|p| spec.shape(p).is_some() && !writes(p)));
        let mut edits = Vec::new();
        for place in places {
            edits.extend(folded(place, &q, work)?);
        }
        if before == Reader::Head && spec.tied {
            edits.push(untied(&q, work)?);
        }
        let shortcut = match &self.last {
            Some((Reader::Attention(l), q)) => Some((Place::layer(*l, Role::AttnShortcut), q)),
            Some((Reader::Ffn(l), q)) => Some((Place::layer(*l, Role::FfnShortcut), q)),
            _ => None,
        };
        if let Some((place, last)) = shortcut {
            // Rows x become x Q_sᵀ Q_{s+1}; a stored matrix has its outputs in rows.
            let w = matmul_tn_f64(&next, last).to_f32();
            edits.push(Edit::Matrix(place, Unpacked::dense(w)));
            self.shortcuts += 1;
        }
        // The rest of the walk sees the stream in its old axes, less what was cut off.
        let map = Some(matmul_nn_f64(&next, &next.transpose()).to_f32());
        self.last = Some((before, next));
        Ok(Turn { map, edits })
    }

    fn finish(self: Box<Self>, work: &dyn LayerWork) -> Result<Finished, MethodError> {
        let spec = work.spec();
        let width = self.slice.width(spec.hidden);
        let mut new = narrower(spec, width);
        for layer in &mut new.layers {
            (layer.attn_shortcut, layer.ffn_shortcut) = (layer.attn.is_some(), layer.ffn.is_some());
        }
        let halves = |n: usize| show_bytes(2 * n as u64);
        let note = format!(
            "kept {width} of {} axes of the residual stream at each of {} readers, with {:.2}% of its \
             energy, at the least {:.2}%; {} matrices in shortcuts take {} in f16{}",
            spec.hidden,
            self.readers,
            100.0 * self.all / self.readers.max(1) as f64,
            100.0 * self.least,
            self.shortcuts,
            halves(self.shortcuts as usize * width * width),
            if spec.tied {
                format!("; the head is untied from the embedding and takes {}", halves(spec.vocab * width))
            } else {
                String::new()
            }
        );
        Ok(Finished { edits: vec![Edit::Spec(Box::new(new))], note, again: None })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::basis::{axes, slicegpt};
    use lacuna_base::testkit::random;
    use lacuna_base::{Gram, Rng};
    use lacuna_contract::{Gathered, Method, Stats};
    use serde_json::json;
    use std::collections::HashMap;

    /// A network in memory, over texts of one token each: attention is then what `v` and `o` make of it.
    struct Network {
        spec: Spec,
        weights: HashMap<Place, Mat>,
        found: Vec<(Ask, Gathered)>,
    }

    impl LayerWork for Network {
        fn spec(&self) -> &Spec {
            &self.spec
        }
        fn weight(&self, place: &Place) -> Result<Mat, MethodError> {
            self.weights.get(place).cloned().ok_or_else(|| MethodError::new(format!("no {place}")))
        }
        fn stats(&self, _: Site) -> Stats<'_> {
            Stats { tokens: self.spec.vocab as u64, found: &self.found, gradients: &[], sequences: 0, worked: None }
        }
        fn vocabulary(&self) -> Option<&lacuna_contract::Vocabulary> {
            None
        }
    }

    impl Network {
        fn new(more: &serde_json::Value) -> Network {
            let mut config = json!({
                "model_type": "llama", "vocab_size": 50, "hidden_size": 12, "intermediate_size": 10,
                "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 2,
                "max_position_embeddings": 16, "rms_norm_eps": 1e-2,
            });
            more.as_object().expect("keys").iter().for_each(|(k, v)| config[k] = v.clone());
            let mut spec = lacuna_arch::from_config(&config).expect("a network");
            // One layer of each kind of hole.
            (spec.layers[1].attn, spec.layers[2].ffn) = (None, None);
            let mut rng = Rng::new(3);
            let all = spec.places().into_iter().enumerate().map(|(i, place)| {
                let (rows, cols) = spec.shape(&place).expect("a shape");
                let norm = rows == 1 && place.part == Part::Weight;
                let scale = (0..cols).map(|_| 1.0 + 0.5 * rng.normal()).collect();
                (place, if norm { Mat::from_vec(1, cols, scale) } else { random(rows, cols, i as u64) })
            });
            let weights = all.collect();
            Network { spec, weights, found: Vec::new() }
        }

        fn mat(&self, place: Place) -> Mat64 {
            Mat64::from_f32(self.weights[&place].view())
        }

        /// Rows over the root of their mean square, times the scale.
        fn norm(&self, place: Place, x: &Mat64) -> Mat64 {
            let scale = self.mat(place);
            let n = self.spec.norm.divisor.unwrap_or(x.cols()) as f64;
            let root =
                |r: usize| (x.row(r).iter().map(|v| v * v).sum::<f64>() / n + f64::from(self.spec.norm.eps)).sqrt();
            Mat64::from_fn(x.rows(), x.cols(), |r, c| x[(r, c)] / root(r) * scale[(0, c)])
        }

        fn times(&self, place: Place, x: &Mat64) -> Mat64 {
            let w = self.mat(place);
            let bias = self.spec.shape(&place.bias()).map(|_| self.mat(place.bias()));
            Mat64::from_fn(x.rows(), w.rows(), |r, o| {
                x.row(r).iter().zip(w.row(o)).map(|(x, w)| x * w).sum::<f64>()
                    + bias.as_ref().map_or(0.0, |b| b[(0, o)])
            })
        }

        fn part(&self, reader: Reader, x: &Mat64) -> Mat64 {
            match reader {
                Reader::Attention(l) => {
                    let at = |role| Place::layer(l, role);
                    let v = self.times(at(Role::V), &self.norm(at(Role::AttnNorm), x));
                    // Two query heads of two channels read one head of values.
                    let mixed = Mat64::from_fn(x.rows(), 8, |r, c| v[(r, c / 4 * 2 + c % 2)]);
                    self.times(at(Role::O), &mixed)
                }
                Reader::Ffn(l) => {
                    let at = |role| Place::layer(l, role);
                    let h = self.norm(at(Role::FfnNorm), x);
                    let (g, up) = (self.times(at(Role::Gate), &h), self.times(at(Role::Up), &h));
                    let silu = |g: f64| g / (1.0 + (-g).exp());
                    let inner = Mat64::from_fn(g.rows(), g.cols(), |r, c| silu(g[(r, c)]) * up[(r, c)]);
                    self.times(at(Role::Down), &inner)
                }
                Reader::Head => {
                    let role = if self.spec.tied { Role::Embed } else { Role::Head };
                    self.times(Place::global(role), &self.norm(Place::global(Role::FinalNorm), x))
                }
            }
        }

        fn readers(&self) -> Vec<Reader> {
            let of = |(l, layer): (usize, &lacuna_spec::LayerSpec)| {
                let attention = layer.attn.as_ref().map(|_| Reader::Attention(l));
                attention.into_iter().chain(layer.ffn.as_ref().map(|_| Reader::Ffn(l))).collect::<Vec<_>>()
            };
            self.spec.layers.iter().enumerate().flat_map(of).chain([Reader::Head]).collect()
        }

        /// Logits of every token, with what `before` makes of the stream before each reader.
        fn logits(&self, before: &mut dyn FnMut(Reader, Mat64) -> Mat64) -> Mat64 {
            let mut x = self.mat(Place::global(Role::Embed));
            for reader in self.readers() {
                x = before(reader, x);
                let y = self.part(reader, &x);
                let shortcut = match reader {
                    Reader::Attention(l) => Place::layer(l, Role::AttnShortcut),
                    Reader::Ffn(l) => Place::layer(l, Role::FfnShortcut),
                    Reader::Head => return y,
                };
                let kept = if self.weights.contains_key(&shortcut) { self.times(shortcut, &x) } else { x };
                x = Mat64::from_fn(y.rows(), y.cols(), |r, c| kept[(r, c)] + y[(r, c)]);
            }
            unreachable!("the head comes last")
        }

        /// Walks over this network and answers with the sliced one and the projections that it saw on the way.
        fn sliced(&mut self, slice: &Slice) -> (Network, Vec<Mat64>, String) {
            slice.check(&self.spec).expect("can be turned");
            assert!(slice.turns());
            let mut walker = slice.begin(&self.spec).expect("begins");
            let (mut edits, mut maps) = (Vec::new(), Vec::new());
            let mut x = self.mat(Place::global(Role::Embed));
            for reader in self.readers() {
                let norm = norm_of(&named(&self.spec, reader).expect("there")).expect("behind a norm");
                let mut gram = Gram::new(self.spec.hidden);
                gram.add(self.norm(norm, &x).to_f32().view());
                self.found = vec![(Ask::InputGram, Gathered::Gram(gram))];
                let turn = walker.turn(reader, self).expect("turns");
                edits.extend(turn.edits);
                let map = Mat64::from_f32(turn.map.expect("a map").view());
                x = matmul_nn_f64(&x, &map);
                maps.push(map);
                if reader != Reader::Head {
                    let y = self.part(reader, &x);
                    x.data_mut().iter_mut().zip(y.data()).for_each(|(x, y)| *x += y);
                }
            }
            let finished = walker.finish(self).expect("ends");
            let mut new = Network { spec: self.spec.clone(), weights: self.weights.clone(), found: Vec::new() };
            for edit in edits.into_iter().chain(finished.edits) {
                match edit {
                    Edit::Matrix(place, m) => new.weights.insert(place, m.to_mat()),
                    Edit::Vector(place, v) => new.weights.insert(place, Mat::from_vec(1, v.len(), v)),
                    Edit::Spec(spec) => {
                        new.spec = *spec;
                        None
                    }
                    other => panic!("{other:?}"),
                };
            }
            new.spec.check().expect("a network");
            for place in new.spec.places() {
                let w = &new.weights[&place];
                assert_eq!(new.spec.shape(&place), Some((w.rows(), w.cols())), "{place}");
            }
            (new, maps, finished.note)
        }
    }

    fn step(keep: f64, method: fn() -> Method) -> Slice {
        let Made::Basis(by) = (method().make)(serde_json::Value::Null).expect("made") else { panic!("no basis") };
        Slice { keep, align: 1, basis: Of::Layer, by: by.into() }
    }

    fn off(a: &Mat64, b: &Mat64) -> f64 {
        let most = a.data().iter().fold(0.0f64, |m, v| m.max(v.abs()));
        a.data().iter().zip(b.data()).fold(0.0f64, |m, (a, b)| m.max((a - b).abs())) / most
    }

    fn variants() -> [serde_json::Value; 3] {
        [
            json!({}),
            json!({"tie_word_embeddings": true}),
            json!({"attention_bias": true, "mlp_bias": true, "tie_word_embeddings": true}),
        ]
    }

    /// What is folded into f32 matrices and shortcuts is the source with a projection before every reader.
    #[test]
    fn agrees_with_projections_written_out() {
        for (i, more) in variants().iter().enumerate() {
            for (method, keep) in [
                (slicegpt::method as fn() -> Method, 0.5),
                (slicegpt::method, 0.75),
                (axes::method, 0.5),
                (slicegpt::method, 0.08),
            ] {
                let mut network = Network::new(more);
                let (new, maps, note) = network.sliced(&step(keep, method));
                let width = (12.0 * keep).round() as usize;
                assert_eq!((new.spec.hidden, new.spec.norm.divisor, new.spec.tied), (width, Some(12), false));
                let mut at = 0;
                let want = network.logits(&mut |_, x| {
                    at += 1;
                    matmul_nn_f64(&x, &maps[at - 1])
                });
                let worst = off(&want, &new.logits(&mut |_, x| x));
                assert!(worst < 2e-5, "variant {i} at {keep}: {worst}");
                assert!(off(&want, &network.logits(&mut |_, x| x)) > 0.01, "variant {i} at {keep} cuts nothing");
                assert!(note.contains("4 matrices in shortcuts") && note.contains("5 readers"), "{note}");
                assert_eq!(note.contains("untied"), network.spec.tied, "{note}");
                let both: Vec<_> = new.spec.layers.iter().map(|l| (l.attn_shortcut, l.ffn_shortcut)).collect();
                assert_eq!(both, [(true, true), (false, true), (true, false)]);
            }
        }
    }

    /// Turned by whole rotations, f32 rounding apart, every logit stays.
    #[test]
    fn every_axis_kept_changes_nothing() {
        for more in &variants() {
            let mut network = Network::new(more);
            let (new, _, note) = network.sliced(&step(1.0, slicegpt::method));
            assert_eq!((new.spec.norm, new.spec.hidden), (network.spec.norm, 12));
            let worst = off(&network.logits(&mut |_, x| x), &new.logits(&mut |_, x| x));
            assert!(worst < 2e-5 && note.contains("100.00%"), "{worst}: {note}");
            let shortcut = &new.weights[&Place::layer(0, Role::AttnShortcut)];
            let trace: f32 = (0..12).map(|i| shortcut[(i, i)].abs()).sum();
            assert!(trace < 11.0, "hardly turned: {trace}");
        }
    }

    #[test]
    fn what_cannot_be_turned_is_refused_by_name() {
        let refused = |spec: &Spec| step(0.5, slicegpt::method).check(spec).expect_err("refused").what;
        let spec = Network::new(&json!({})).spec;
        let mut post = spec.clone();
        post.layers[0].attn.as_mut().expect("there").post_norm = true;
        assert!(refused(&post).contains("llama: norms stand behind attention or FFN (post-norm)"));
        let mut twice = spec;
        twice.layers[2].ffn_shortcut = true;
        assert!(refused(&twice).contains("llama: it was turned layer by layer before (layers.2.ffn.shortcut)"));
    }
}
