//! The source's weights with some replaced, and small things that the walk does with weights.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use lacuna_base::Mat;
use lacuna_checkpoint::PackedWriter;
use lacuna_format::{Float, FormatError, PatternKind, Stored, Term, Values, Weights, WeightsError, pack_float};
use lacuna_model::{Batch, Block, ContiguousKv, Tap};
use lacuna_spec::{Place, Spec};

use crate::account::{CompressError, TensorReport};
use crate::rows::whole_rows;
use crate::scratch::Scratch;

/// Weights of the source with some tensors, and perhaps the network, replaced.
pub(crate) struct Overlay<'a> {
    pub(crate) base: &'a dyn Weights,
    pub(crate) spec: Spec,
    /// Tensors of the block at hand, and of what stands outside the blocks.
    pub(crate) new: HashMap<Place, Arc<Stored>>,
    /// What model-wide steps changed.
    changed: HashMap<Place, Change>,
    scratch: Option<Mutex<Scratch>>,
}

/// A tensor that a model-wide step changed.
#[derive(Clone, Debug)]
enum Change {
    /// Rows and columns of the source's that stay.
    Kept(Option<Vec<usize>>, Option<Vec<usize>>),
    /// Another, in the scratch file.
    Spilled(usize),
}

/// `of[i]` for each `i` of `then`.
fn composed(of: Option<Vec<usize>>, then: Option<Vec<usize>>) -> Option<Vec<usize>> {
    match (of, then) {
        (Some(of), Some(then)) => Some(then.iter().map(|&i| of[i]).collect()),
        (of, then) => of.or(then),
    }
}

impl<'a> Overlay<'a> {
    /// The source as it is.
    pub(crate) fn new(base: &'a dyn Weights) -> Overlay<'a> {
        Overlay { base, spec: base.spec().clone(), new: HashMap::new(), changed: HashMap::new(), scratch: None }
    }

    /// Keeps some rows and columns of a tensor from now on. The indices are within it.
    pub(crate) fn keep(
        &mut self,
        place: Place,
        rows: Option<Vec<usize>>,
        cols: Option<Vec<usize>>,
        dir: &Path,
    ) -> Result<(), CompressError> {
        let change = match self.changed.remove(&place) {
            None => Change::Kept(rows, cols),
            Some(Change::Kept(r, c)) => Change::Kept(composed(r, rows), composed(c, cols)),
            Some(Change::Spilled(number)) => {
                let cut = sliced(&*self.spilled(number, &place)?, rows.as_deref(), cols.as_deref());
                return self.replace(place, &cut.map_err(|e| packing(&place, e))?, dir);
            }
        };
        self.changed.insert(place, change);
        Ok(())
    }

    /// Puts another tensor in the place of one, by way of the scratch file.
    pub(crate) fn replace(&mut self, place: Place, stored: &Stored, dir: &Path) -> Result<(), CompressError> {
        let number = self.set_aside(stored, dir)?;
        self.put_in_place(place, number);
        Ok(())
    }

    /// Puts a tensor that was set aside in the place of one.
    pub(crate) fn put_in_place(&mut self, place: Place, number: usize) {
        self.changed.insert(place, Change::Spilled(number));
    }

    /// Keeps a tensor in the scratch file, for later.
    pub(crate) fn set_aside(&mut self, stored: &Stored, dir: &Path) -> Result<usize, CompressError> {
        let fault = |source| CompressError::Scratch { dir: dir.display().to_string(), source };
        let scratch = match &mut self.scratch {
            Some(s) => s,
            empty => empty.insert(Mutex::new(Scratch::new(dir).map_err(fault)?)),
        };
        scratch.get_mut().unwrap_or_else(PoisonError::into_inner).put(stored).map_err(fault)
    }

    fn spilled(&self, number: usize, place: &Place) -> Result<Arc<Stored>, WeightsError> {
        let bad = |what: String| WeightsError::Bad { file: "scratch".into(), tensor: place.to_string(), what };
        let Some(scratch) = &self.scratch else { return Err(bad("there is no scratch file".into())) };
        let mut scratch = scratch.lock().unwrap_or_else(PoisonError::into_inner);
        scratch.get(number).map(Arc::new).map_err(|e| bad(e.to_string()))
    }
}

impl Weights for Overlay<'_> {
    fn spec(&self) -> &Spec {
        &self.spec
    }

    fn get(&self, place: &Place) -> Result<Option<Arc<Stored>>, WeightsError> {
        if let Some(s) = self.new.get(place) {
            return Ok(Some(s.clone()));
        }
        match self.changed.get(place) {
            None => self.base.get(place),
            Some(Change::Spilled(number)) => self.spilled(*number, place).map(Some),
            Some(Change::Kept(rows, cols)) => {
                let Some(whole) = self.base.get(place)? else { return Ok(None) };
                let cut = sliced(&whole, rows.as_deref(), cols.as_deref());
                self.base.release(place);
                cut.map(|s| Some(Arc::new(s))).map_err(|e| WeightsError::bad("the source", place.to_string(), e))
            }
        }
    }

    fn release(&self, place: &Place) {
        self.base.release(place);
    }
}

/// The weights with another network, and some tensors replaced: one trial's layer, one part of a layer.
pub(crate) struct Stitched<'a> {
    pub(crate) base: &'a Overlay<'a>,
    pub(crate) spec: &'a Spec,
    pub(crate) new: HashMap<Place, Arc<Stored>>,
}

impl Weights for Stitched<'_> {
    fn spec(&self) -> &Spec {
        self.spec
    }

    fn get(&self, place: &Place) -> Result<Option<Arc<Stored>>, WeightsError> {
        match self.new.get(place) {
            Some(s) => Ok(Some(s.clone())),
            None => self.base.get(place),
        }
    }

    fn release(&self, place: &Place) {
        self.base.release(place);
    }
}

/// Some rows and columns of a tensor: as it is stored where whole rows of one plain piece stay, else as its own floats
/// where it is one piece of them, else as f16 (a vector as f32).
pub(crate) fn sliced(stored: &Stored, rows: Option<&[usize]>, cols: Option<&[usize]>) -> Result<Stored, FormatError> {
    if let (Some(rows), None) = (rows, cols)
        && let Some(cut) = whole_rows(stored, rows)
    {
        return cut;
    }
    let own = match stored.terms.as_slice() {
        [Term::Piece(p)] => match p.values {
            Values::Float(f, _) => Some(f),
            _ => None,
        },
        _ => None,
    };
    let float = own.unwrap_or(if stored.rows == 1 { Float::F32 } else { Float::F16 });
    let w = stored.to_mat();
    let at = |list: Option<&[usize]>, i: usize| list.map_or(i, |l| l[i]);
    let (m, n) = (rows.map_or(w.rows(), <[usize]>::len), cols.map_or(w.cols(), <[usize]>::len));
    let cut = Mat::from_fn(m, n, |r, c| w[(at(rows, r), at(cols, c))]);
    Ok(Stored::from_piece(pack_float(cut.view(), None, PatternKind::Dense, float)?))
}

pub(crate) fn packing(place: &Place, e: FormatError) -> CompressError {
    CompressError::Method { place: place.to_string(), step: "pack".into(), what: e.what }
}

pub(crate) fn need(weights: &dyn Weights, place: &Place) -> Result<Arc<Stored>, CompressError> {
    weights.get(place)?.ok_or_else(|| {
        CompressError::Weights(WeightsError::Missing {
            file: "the model".into(),
            place: place.to_string(),
            hint: String::new(),
        })
    })
}

/// Values decoded at a time.
const CHUNK: usize = 1 << 20;

/// Refuses a matrix that does not decode to finite numbers alone; `whose` says what it is.
pub(crate) fn finite(place: &Place, stored: &Stored, whose: &str) -> Result<(), CompressError> {
    let step = (CHUNK / stored.cols.max(1)).max(1);
    for from in (0..stored.rows).step_by(step) {
        let to = (from + step).min(stored.rows);
        let mut m = Mat::zeros(to - from, stored.cols);
        stored.decode_rows(from, to, m.view_mut());
        finite_rows(place, &m, from, whose)?;
    }
    Ok(())
}

/// The same for decoded rows, the first of which is row `from` of the matrix.
pub(crate) fn finite_rows(place: &Place, m: &Mat, from: usize, whose: &str) -> Result<(), CompressError> {
    match m.data().iter().position(|x| !x.is_finite()) {
        None => Ok(()),
        Some(i) => {
            let (r, c, v) = (from + i / m.cols(), i % m.cols(), m.data()[i]);
            let what = format!("{whose} at row {r}, column {c} is {v}, not a finite number");
            Err(CompressError::NotFinite { place: place.to_string(), what })
        }
    }
}

pub(crate) fn read_back(
    writer: Option<&PackedWriter>,
    places: &[Place],
) -> Result<Vec<(Place, Arc<Stored>)>, CompressError> {
    let mut out = Vec::new();
    if let Some(w) = writer {
        for p in places {
            if let Some(s) = w.read(p)? {
                out.push((*p, Arc::new(s)));
            }
        }
    }
    Ok(out)
}

pub(crate) fn release_layer(weights: &dyn Weights, l: usize) {
    for p in weights.spec().layer_places(l) {
        weights.release(&p);
    }
}

/// One sequence through one block.
pub(crate) fn forward(spec: &Spec, block: &Block, x: &mut Mat, tap: &mut dyn Tap) -> Result<(), CompressError> {
    let batch = Batch::one(0, 0..x.rows());
    let mut kv = ContiguousKv::new(spec, 1);
    block.forward(x, &batch, &mut kv, tap)?;
    Ok(())
}

pub(crate) fn report(place: &Place, before: &Arc<Stored>, after: &Arc<Stored>, error: Option<f64>) -> TensorReport {
    TensorReport {
        place: *place,
        parameters: before.rows as u64 * before.cols as u64,
        bytes_before: before.bytes(),
        bytes_after: after.bytes(),
        codec: after.codec_name(),
        sparsity: after.sparsity(),
        error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::testkit::random;
    use lacuna_format::Unpacked;

    #[test]
    fn rows_and_columns_that_stay() {
        let stored = Unpacked::dense(random(5, 6, 1)).pack(Float::F32).unwrap();
        let w = stored.to_mat();
        let cut = sliced(&stored, Some(&[0, 3]), Some(&[1, 2, 5])).unwrap().to_mat();
        assert_eq!((cut.rows(), cut.cols()), (2, 3));
        assert!((0..2).all(|r| (0..3).all(|c| cut[(r, c)] == w[([0, 3][r], [1, 2, 5][c])])));
        assert_eq!(composed(Some(vec![1, 4, 7]), Some(vec![0, 2])), Some(vec![1, 7]));
        assert_eq!(composed(None, Some(vec![3])), Some(vec![3]));
        assert_eq!(composed(None, None), None);
    }
}
