//! Weights as another layout wants them: rows of q and k in its order, norms with or without the one, missing parts as
//! zeros.

use std::sync::Arc;

use lacuna_arch::{self as arch, Target, Whole};
use lacuna_base::{Mat, MatMut};
use lacuna_format::{Float, GgufType, Pattern, Stored, Values, Weights};
use lacuna_spec::{AttnSpec, Delta, Mixer, Part, Place, Role, RopeStyle, Spec, SpecError};
use rayon::prelude::*;

use super::{Loss, Sink};
use crate::SaveError;

/// Values decoded at a time.
const CHUNK_VALUES: usize = 1 << 21;

/// How a tensor is to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Encoding {
    Float(Float),
    Block(GgufType),
}

impl Encoding {
    /// The format's own name.
    pub fn name(self) -> String {
        match self {
            Encoding::Float(f) => format!("{f:?}").to_uppercase(),
            Encoding::Block(b) => format!("{b:?}"),
        }
    }

    /// Bytes of `n` values, whole blocks.
    pub fn bytes(self, n: usize) -> usize {
        match self {
            Encoding::Float(f) => n * f.bytes(),
            Encoding::Block(b) => n / b.block() * b.block_bytes(),
        }
    }

    fn encode(self, values: &[f32]) -> Result<Vec<u8>, String> {
        if let Some(bad) = values.iter().find(|x| !x.is_finite()) {
            return Err(format!("a value is {bad}"));
        }
        match self {
            Encoding::Float(f) => f.encode(values).map_err(|i| self.beyond(values[i])),
            Encoding::Block(b) if !b.is_written() => Err(format!(
                "{b:?} is read, not written, and here its blocks do not go along as they are; --type f16 of gguf holds them"
            )),
            Encoding::Block(b) => {
                if let Some(v) = values.iter().find(|v| v.abs() > largest(b)) {
                    return Err(self.beyond(*v));
                }
                Ok(b.encode(values))
            }
        }
    }

    fn beyond(self, value: f32) -> String {
        format!("{value} is beyond {}; --type f32 of gguf and hf holds it", self.name())
    }

    fn decode(self, bytes: &[u8], out: &mut [f32]) {
        match self {
            Encoding::Float(f) => f.decode(bytes, out),
            Encoding::Block(b) => b.decode(bytes, out),
        }
    }
}

/// The largest magnitude that a block type meets with a scale that is an f16: what is beyond would be cut down in
/// silence.
fn largest(block: GgufType) -> f32 {
    let scale = 65504.0;
    match block {
        GgufType::Q4_0 => 8.0 * scale,
        GgufType::Q5_0 => 16.0 * scale,
        GgufType::Q8_0 => 127.0 * scale,
        // Minima are 6 bits under an f16; the values above them reach further.
        GgufType::Q4_K => 63.0 * scale,
        GgufType::Q6_K => 32.0 * 127.0 * scale,
        // A minimum that is an f16 itself.
        GgufType::Q4_1 | GgufType::Q5_1 => scale,
        GgufType::Q2_K => 15.0 * scale,
        GgufType::Q3_K => 3.0 * 31.0 * scale,
        GgufType::Q5_K => 63.0 * scale,
        GgufType::IQ4_NL => 113.0 * scale,
        GgufType::IQ4_XS => 113.0 * 31.0 * scale,
        // Only read.
        _ => 0.0,
    }
}

/// A model's weights in the arrangement of another layout.
pub(crate) struct Arranged<'a> {
    pub weights: &'a dyn Weights,
    /// The network as the layout holds it.
    pub spec: Spec,
    /// For each of its layers the source's.
    layers: Vec<usize>,
}

impl<'a> Arranged<'a> {
    /// `as_held` turns a network without holes into the layout's own.
    pub fn new(
        weights: &'a dyn Weights,
        as_held: fn(&Spec) -> Result<Spec, SpecError>,
    ) -> Result<(Arranged<'a>, Vec<String>), SaveError> {
        let refused = |e: SpecError| SaveError::Refused(e.what);
        let Whole { spec, layers, left_out, filled } = arch::whole(weights.spec()).map_err(refused)?;
        let mut notes = Vec::new();
        if !left_out.is_empty() {
            notes.push(format!("layers {left_out:?} have no part left and are left out altogether"));
        }
        if !filled.is_empty() {
            notes.push(format!(
                "layers {filled:?} lack a part, which no file of this format can say: it is written as zeros, which \
                 add nothing but bytes"
            ));
        }
        let held = as_held(&spec).map_err(refused)?;
        // Where the layout has the factor in the weights nothing is lost.
        let folded = arch::fold(&spec, None, &held, &Place::global(Role::Embed), 0) != 1.0;
        if held.embed_scale != spec.embed_scale && !folded {
            notes.push(format!(
                "the embedding's factor becomes {}, as readers of this format compute it; it was {}",
                held.embed_scale, spec.embed_scale
            ));
        }
        let added = held.places().iter().filter(|p| p.part == Part::Bias && spec.shape(p).is_none()).count();
        if added > 0 {
            notes.push(format!(
                "{added} biases of zeros are added, which change nothing: a configuration says the biases of several \
                 matrices in one word"
            ));
        }
        Ok((Arranged { weights, spec: held, layers }, notes))
    }

    /// The weights as they are: for a source of the same layout.
    pub fn as_it_is(weights: &'a dyn Weights) -> Arranged<'a> {
        let spec = weights.spec().clone();
        Arranged { weights, layers: (0..spec.layers.len()).collect(), spec }
    }

    /// The source's name for a place.
    fn source(&self, place: &Place) -> Place {
        // A head that a layout wants apart from the embedding.
        if place.role == Role::Head && self.weights.spec().tied {
            return Place { role: Role::Embed, ..*place };
        }
        Place { layer: place.layer.map(|l| self.layers[l as usize] as u32), ..*place }
    }

    /// What the source stores at a place; `None` for a part that it lacks, all zeros.
    pub fn stored(&self, place: &Place) -> Result<Option<Arc<Stored>>, SaveError> {
        Ok(self.weights.get(&self.source(place))?)
    }

    pub fn release(&self, place: &Place) {
        self.weights.release(&self.source(place));
    }

    fn attn(spec: &Spec, layer: usize) -> Option<&AttnSpec> {
        spec.layers.get(layer)?.attn.as_ref()
    }

    /// Rows (entries of a bias) that move only among themselves, and the source's row of each.
    fn moves(&self, place: &Place) -> Option<Vec<usize>> {
        let l = place.layer.filter(|_| matches!(place.role, Role::Q | Role::K))? as usize;
        let to = Self::attn(&self.spec, l)?;
        let from = Self::attn(self.weights.spec(), self.layers[l])?;
        let (a, b) = (from.rope.as_ref()?, to.rope.as_ref()?);
        if a.style == b.style {
            return None;
        }
        let half = b.dims / 2;
        let moved = |j: usize| match b.style {
            _ if j >= b.dims => j,
            RopeStyle::Interleaved => j / 2 + j % 2 * half,
            RopeStyle::Half => j % half * 2 + j / half,
        };
        Some((0..to.head_dim).map(moved).collect())
    }

    fn mixers(&self, place: &Place) -> Option<[&Mixer; 2]> {
        let l = place.layer? as usize;
        let of = |spec: &'_ Spec, l: usize| spec.layers.get(l).map(|layer| layer.mixer.is_some());
        let from = self.layers[l];
        of(self.weights.spec(), from).zip(of(&self.spec, l)).filter(|(a, b)| *a && *b)?;
        Some([self.weights.spec().layers[from].mixer.as_ref()?, self.spec.layers[l].mixer.as_ref()?])
    }

    /// Where value heads of the delta rule stand in another order: of each row (entry of a vector) of a place the
    /// source's; of `mixer.out`, of each column.
    fn heads_moved(&self, place: &Place) -> Option<Vec<usize>> {
        let [Mixer::Delta(from), Mixer::Delta(to)] = self.mixers(place)? else { return None };
        if from.tiled == to.tiled {
            return None;
        }
        let Delta { key_heads, value_heads, key_dim, value_dim, .. } = *to;
        let each = value_heads / key_heads;
        // Value head `h` here is the source's.
        let head = |h: usize| {
            if to.tiled { h % key_heads * each + h / key_heads } else { h % each * key_heads + h / each }
        };
        let (before, wide) = match place.role {
            Role::MixerIn | Role::MixerConv => (2 * key_heads * key_dim, value_dim),
            Role::MixerZ | Role::MixerOut => (0, value_dim),
            Role::MixerDt | Role::MixerBeta | Role::MixerA => (0, 1),
            _ => return None,
        };
        let behind = (0..value_heads).flat_map(|h| (0..wide).map(move |i| before + head(h) * wide + i));
        Some((0..before).chain(behind).collect())
    }

    /// Whether `ln A` becomes `-A` (true), or the other way round.
    fn log_taken(&self, place: &Place) -> Option<bool> {
        let log = |m: &Mixer| match m {
            Mixer::Ssd(m) => m.log,
            Mixer::Delta(m) => m.log,
            Mixer::Mamba(m) => m.log,
            Mixer::ShortConv(_) => false,
        };
        let [from, to] = self.mixers(place)?.map(log);
        (place.role == Role::MixerA && from != to).then_some(from)
    }

    /// What a stored value is multiplied with, and what is added to it: norms lie less one in some layouts, and none
    /// has a divisor of its own.
    fn rescale(&self, place: &Place) -> (f32, f32) {
        let own = place.role.is_mixer() && place.role != Role::MixerNorm;
        let own = own || matches!(place.role, Role::ActAbove | Role::ActBelow | Role::Sinks | Role::Correction);
        if place.role.is_table() || own || place.part == Part::Bias {
            return (1.0, 0.0);
        }
        let from = self.weights.spec();
        let factor = if self.spec.norm.divisor.is_none() { arch::norm_factor(from, place) } else { 1.0 };
        (factor, from.norm.offset * factor - self.spec.norm.offset)
    }

    /// What a row is multiplied with where the layout has factors in the weights that stand beside them here, or the
    /// other way round.
    fn fold(&self, place: &Place, row: usize) -> f32 {
        let layer = place.layer.map(|l| self.layers[l as usize]);
        arch::fold(self.weights.spec(), layer, &self.spec, place, row)
    }

    /// Rows `from..to` of a place, decoded, in the layout's order. Where rows move, `from` and `to` are at the bounds
    /// of heads.
    pub fn decode(&self, place: &Place, stored: Option<&Stored>, from: usize, to: usize) -> Mat {
        let (_, cols) = self.spec.shape(place).unwrap_or_default();
        let mut m = Mat::zeros(to - from, cols);
        let Some(stored) = stored else { return m };
        match self.heads_moved(place) {
            // Rows come one by one.
            Some(moved) if is_matrix(place) && place.role != Role::MixerOut => {
                for (i, r) in (from..to).enumerate() {
                    stored.decode_rows(moved[r], moved[r] + 1, MatMut::new(1, cols, m.row_mut(i)));
                }
            }
            moved => {
                stored.decode_rows(from, to, m.view_mut());
                for r in 0..moved.as_ref().map_or(0, |_| m.rows()) {
                    let was = m.row(r).to_vec();
                    m.row_mut(r).iter_mut().zip(moved.iter().flatten()).for_each(|(x, c)| *x = was[*c]);
                }
            }
        }
        match self.log_taken(place) {
            Some(true) => m.data_mut().iter_mut().for_each(|a| *a = -a.exp()),
            Some(false) => m.data_mut().iter_mut().for_each(|a| *a = (-*a).ln()),
            None => {}
        }
        let (factor, shift) = self.rescale(place);
        if (factor, shift) != (1.0, 0.0) {
            m.data_mut().iter_mut().for_each(|x| *x = *x * factor + shift);
        }
        for r in 0..m.rows() {
            let by = self.fold(place, from + r);
            if by != 1.0 {
                m.row_mut(r).iter_mut().for_each(|x| *x *= by);
            }
        }
        let Some(moves) = self.moves(place) else { return m };
        if place.part == Part::Bias {
            let was = m.clone();
            let out = m.row_mut(0);
            (0..cols).for_each(|c| out[c] = was.row(0)[c / moves.len() * moves.len() + moves[c % moves.len()]]);
            return m;
        }
        let mut out = Mat::zeros(to - from, cols);
        for r in 0..to - from {
            out.row_mut(r).copy_from_slice(m.row(r / moves.len() * moves.len() + moves[r % moves.len()]));
        }
        out
    }

    /// The source's row behind row `r`.
    pub fn row_of(&self, place: &Place, r: usize) -> usize {
        if let Some(moved) = self.heads_moved(place).filter(|_| is_matrix(place) && place.role != Role::MixerOut) {
            return moved[r];
        }
        match self.moves(place).filter(|_| place.part == Part::Weight) {
            Some(moves) => r / moves.len() * moves.len() + moves[r % moves.len()],
            None => r,
        }
    }

    /// Runs of rows that are decoded together.
    pub fn chunks(&self, place: &Place) -> Vec<(usize, usize)> {
        let (rows, cols) = self.spec.shape(place).unwrap_or_default();
        let unit = self.moves(place).map_or(1, |m| m.len());
        let step = (CHUNK_VALUES / cols.max(1) / unit).max(1) * unit;
        (0..rows).step_by(step).map(|from| (from, (from + step).min(rows))).collect()
    }

    /// How the source stores a tensor, in words.
    pub fn codec(&self, target: &Target) -> Result<String, SaveError> {
        let mut names = Vec::new();
        for place in &target.parts {
            let name = self.stored(place)?.map_or("zeros".to_owned(), |s| s.codec_name());
            if !names.contains(&name) {
                names.push(name);
            }
        }
        Ok(names.join(", "))
    }

    /// Writes a tensor in `form`; `sink` gets its bytes in order. Codes and scales that the form can hold as they are
    /// are never rounded.
    pub fn write(&self, target: &Target, form: Encoding, sink: Sink<'_>) -> Result<Loss, SaveError> {
        let fault = |what: String| SaveError::Refused(format!("tensor {}: {what}", target.name));
        let mut loss = Loss::default();
        if target.transposed || target.step > 1 {
            return self.write_rearranged(target, form, sink);
        }
        if target.groups > 1 {
            return self.write_grouped(target, form, sink);
        }
        // Each part after the other, or rows of several by turns.
        let mut runs: Vec<(usize, Vec<(usize, usize)>)> = Vec::new();
        match target.order.is_empty() {
            true => runs.extend(target.parts.iter().map(|p| self.chunks(p)).enumerate()),
            false => runs.extend(target.order.iter().map(|&(part, from, to)| (part, vec![(from, to)]))),
        }
        let mut last = None;
        for (part, chunks) in runs {
            let place = &target.parts[part];
            let stored = match last.take() {
                Some((same, stored)) if same == place => stored,
                _ => self.stored(place)?,
            };
            if target.turned[part] {
                let (rows, _) = self.spec.shape(place).unwrap_or_default();
                let m = self.decode(place, stored.as_deref(), 0, rows).transpose();
                for r in 0..m.rows() {
                    let (bytes, one) = encode(form, m.row(r)).map_err(fault)?;
                    loss.add(&one);
                    sink(&bytes)?;
                }
                continue;
            }
            for (from, to) in chunks {
                let cols = self.spec.shape(place).unwrap_or_default().1;
                if let Some(bytes) = stored.as_deref().and_then(|s| self.as_they_are(place, s, form, from, to)) {
                    loss.values += ((to - from) * cols) as u64;
                    sink(&bytes)?;
                    continue;
                }
                let m = self.decode(place, stored.as_deref(), from, to);
                let rows: Vec<(Vec<u8>, Loss)> = m
                    .data()
                    .par_chunks(cols.max(1))
                    .map(|row| encode(form, row))
                    .collect::<Result<_, _>>()
                    .map_err(fault)?;
                for (bytes, one) in rows {
                    loss.add(&one);
                    sink(&bytes)?;
                }
            }
            if target.order.is_empty() {
                self.release(place);
            } else {
                last = Some((place, stored));
            }
        }
        Ok(loss)
    }

    /// Group after group, each with its share of every part: rows, or entries of a bias.
    fn write_grouped(&self, target: &Target, form: Encoding, sink: Sink<'_>) -> Result<Loss, SaveError> {
        let fault = |what: String| SaveError::Refused(format!("tensor {}: {what}", target.name));
        let mut loss = Loss::default();
        for g in 0..target.groups {
            for place in &target.parts {
                let stored = self.stored(place)?;
                let (rows, cols) = self.spec.shape(place).unwrap_or_default();
                if place.part == Part::Bias {
                    let all = self.decode(place, stored.as_deref(), 0, 1);
                    let share = cols / target.groups;
                    let (bytes, one) = encode(form, &all.row(0)[g * share..(g + 1) * share]).map_err(fault)?;
                    loss.add(&one);
                    sink(&bytes)?;
                    continue;
                }
                let share = rows / target.groups;
                let (from, to) = (g * share, (g + 1) * share);
                if let Some(bytes) = stored.as_deref().and_then(|s| self.as_they_are(place, s, form, from, to)) {
                    loss.values += (share * cols) as u64;
                    sink(&bytes)?;
                    continue;
                }
                let m = self.decode(place, stored.as_deref(), from, to);
                for r in 0..share {
                    let (bytes, one) = encode(form, m.row(r)).map_err(fault)?;
                    loss.add(&one);
                    sink(&bytes)?;
                }
            }
        }
        target.parts.iter().for_each(|p| self.release(p));
        Ok(loss)
    }

    /// What lies the other way round, or whose rows (entries of a bias) take turns, a slice at a time.
    fn write_rearranged(&self, target: &Target, form: Encoding, sink: Sink<'_>) -> Result<Loss, SaveError> {
        let fault = |what: String| SaveError::Refused(format!("tensor {}: {what}", target.name));
        let bias = target.parts[0].part == Part::Bias;
        let slices = if target.shape.len() == if bias { 2 } else { 3 } { target.shape[0] } else { 1 };
        let mut loss = Loss::default();
        for places in target.parts.chunks(target.parts.len() / slices) {
            let mut parts = Vec::new();
            for place in places {
                let stored = self.stored(place)?;
                let rows = self.spec.shape(place).unwrap_or_default().0;
                let m = self.decode(place, stored.as_deref(), 0, rows);
                // A vector's entries are rows here.
                parts.push(if bias { m.transpose() } else { m });
            }
            let mut all = Mat::zeros(parts.iter().map(Mat::rows).sum(), parts[0].cols());
            let high = parts[0].rows();
            for (i, part) in parts.iter().enumerate() {
                for r in 0..part.rows() {
                    let to = if target.step > 1 { r * target.step + i } else { i * high + r };
                    all.row_mut(to).copy_from_slice(part.row(r));
                }
            }
            let all = if target.transposed || bias { all.transpose() } else { all };
            for r in 0..all.rows() {
                let (bytes, one) = encode(form, all.row(r)).map_err(fault)?;
                loss.add(&one);
                sink(&bytes)?;
            }
            places.iter().for_each(|p| self.release(p));
        }
        Ok(loss)
    }

    /// The bytes of rows that the form can hold without decoding them.
    fn as_they_are(&self, place: &Place, stored: &Stored, form: Encoding, from: usize, to: usize) -> Option<Vec<u8>> {
        if self.rescale(place) != (1.0, 0.0) || (place.part == Part::Bias && self.moves(place).is_some()) {
            return None;
        }
        let other = self.heads_moved(place).is_some() && (place.role == Role::MixerOut || !is_matrix(place));
        if other || self.log_taken(place).is_some() || (from..to).any(|r| self.fold(place, r) != 1.0) {
            return None;
        }
        if let Some(piece) = stored.single()
            && piece.pattern == Pattern::Dense
        {
            let bytes = match (&piece.values, form) {
                (Values::Gguf(a, bytes), Encoding::Block(b)) if *a == b => Some(bytes),
                (Values::Float(a, bytes), Encoding::Float(b)) if *a == b => Some(bytes),
                _ => None,
            };
            if let Some(bytes) = bytes {
                let size = form.bytes(piece.cols);
                let row = |r: usize| self.row_of(place, r) * size;
                return Some((from..to).flat_map(|r| &bytes[row(r)..row(r) + size]).copied().collect());
            }
        }
        let Encoding::Block(kind) = form else { return None };
        let ints = stored.integers()?;
        let rows: Option<Vec<Vec<u8>>> =
            (from..to).into_par_iter().map(|r| ints.row_as_blocks(self.row_of(place, r), kind)).collect();
        Some(rows?.concat())
    }
}

/// Whether a place has rows, and is no vector.
fn is_matrix(place: &Place) -> bool {
    place.role.is_table() && place.part == Part::Weight
}

fn encode(form: Encoding, row: &[f32]) -> Result<(Vec<u8>, Loss), String> {
    let bytes = form.encode(row)?;
    let (mut back, mut loss) = (vec![0.0; row.len()], Loss::default());
    form.decode(&bytes, &mut back);
    loss.count(row, &back);
    Ok((bytes, loss))
}

impl From<lacuna_format::WeightsError> for SaveError {
    fn from(e: lacuna_format::WeightsError) -> SaveError {
        SaveError::Source(crate::OpenError::Tensor(e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_type_cannot_reach_is_refused_and_not_cut_down() {
        for kind in lacuna_format::gguf::WRITTEN {
            let top = largest(kind);
            let mut v: Vec<f32> = (0..256).map(|i| top * (1.0 - (i / 2) as f32 / 64.0) * [-1.0, 1.0][i % 2]).collect();
            let bytes = Encoding::Block(kind).encode(&v).unwrap();
            let mut back = vec![0.0; 256];
            Encoding::Block(kind).decode(&bytes, &mut back);
            // Half a step of four bits, or one where the extreme of the other sign has no code.
            let off = v.iter().zip(&back).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(off <= top / 7.5, "{kind:?}: {off} of {top}");
            v[77] = 1.01 * top;
            let said = Encoding::Block(kind).encode(&v).unwrap_err();
            assert!(said.contains(&v[77].to_string()) && said.contains(&format!("{kind:?}")), "{said}");
        }
        let said = Encoding::Block(GgufType::IQ3_S).encode(&[0.0; 256]).unwrap_err();
        assert!(said.contains("IQ3_S is read, not written"), "{said}");
        let said = Encoding::Float(Float::F16).encode(&[1.0, 1e6]).unwrap_err();
        assert!(said.contains("1000000 is beyond F16"), "{said}");
        assert!(Encoding::Float(Float::Bf16).encode(&[1e6]).is_ok());
    }
}
