//! What an adapter does to a matrix.

use std::sync::{Arc, PoisonError};

use bytes::Bytes;
use lacuna_base::Mat;
use lacuna_format::{Float, Pattern, PatternKind, Piece, Stored, Term, Values, WeightsError, pack_float};
use lacuna_spec::{Part, Place};

use super::decoded;
use super::fit::{Change, Fitted, Halves, Product};
use crate::open::transpose;

impl Fitted {
    /// The matrix of a place with its change, where there is one. `base`: what [`Fitted::base_of`] names, where it is
    /// needed.
    pub fn apply(&self, place: &Place, base: Option<Arc<Stored>>) -> Result<Option<Arc<Stored>>, WeightsError> {
        let Some(change) = self.changes.get(place) else { return Ok(base) };
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(made) = held.get(place).and_then(std::sync::Weak::upgrade) {
            return Ok(Some(made));
        }
        let made = Arc::new(self.make(place, change, base)?);
        if let Err(e) = made.check() {
            return self.adapter.bad(&place.to_string(), e.what);
        }
        held.insert(*place, Arc::downgrade(&made));
        Ok(Some(made))
    }

    fn make(&self, place: &Place, change: &Change, base: Option<Arc<Stored>>) -> Result<Stored, WeightsError> {
        let shape = self.spec.shape(place);
        let mut sum = match (&change.instead, base, shape) {
            (Some(name), _, Some((rows, cols))) => self.instead(name, change, rows, cols)?,
            (None, Some(base), _) => Stored::clone(&base),
            (None, None, Some((rows, cols))) if place.part == Part::Bias => Stored::new(rows, cols, Vec::new()),
            _ => return self.adapter.bad(&place.to_string(), "the base has nothing there to be changed"),
        };
        let float = match &sum.terms[..] {
            [Term::Piece(Piece { values: Values::Float(f @ (Float::F32 | Float::F16 | Float::Bf16), _), .. })] => *f,
            _ => Float::F16,
        };
        if let Some((name, scale)) = &change.shift {
            let moved = self.entries(name, change, sum.cols)?;
            let values = sum.to_mat().into_vec().into_iter().zip(moved).map(|(b, m)| b + scale * m).collect();
            sum = Stored::from_piece(dense(sum.rows, sum.cols, Float::F32, bytes(values)));
        }
        // A term stands between a matrix's maps, what an adapter adds does not.
        if sum.has_maps() && (change.adds.is_some() || change.tokens.is_some()) {
            sum = Stored::from_piece(dense(sum.rows, sum.cols, Float::F32, bytes(sum.to_mat().into_vec())));
        }
        if let Some(product) = &change.adds {
            let (left, right) = self.halves(product, change)?;
            sum.terms.push(Term::Product(left, right));
        }
        if let Some((name, tokens)) = &change.tokens {
            let piece = self.tokens(name, tokens, &sum)?;
            sum.terms.push(Term::Piece(piece));
        }
        let merged = match &change.magnitudes {
            Some(name) => self.rescaled(name, change, sum.to_mat())?,
            None if self.merge && (change.adds.is_some() || change.tokens.is_some()) => sum.to_mat(),
            None => return Ok(sum),
        };
        // In the base's own floats; f16 where the base has codes.
        match pack_float(merged.view(), None, PatternKind::Dense, float) {
            Ok(p) => Ok(Stored::from_piece(p)),
            Err(e) => self.adapter.bad(&place.to_string(), e.what),
        }
    }

    /// A tensor that stands in the base's stead, or the part of it that is meant.
    fn instead(&self, name: &str, change: &Change, rows: usize, cols: usize) -> Result<Stored, WeightsError> {
        let (float, _, data) = self.adapter.floats(name)?;
        let (size, from) = (float.bytes(), change.rows.as_ref().map_or(0, |r| r.start));
        // The rows of a vector are its entries.
        let (wide, n) = if rows == 1 { (size, cols) } else { (cols * size, rows) };
        let data = match change.paired {
            _ if change.transposed && rows > 1 => transpose(&data, rows, cols, from, size),
            None => data.slice(from * wide..(from + n) * wide),
            Some(dim) => {
                let mut some = data[from * wide..(from + n) * wide].to_vec();
                some.chunks_mut(dim * wide).for_each(|head| pair(head, wide));
                some.into()
            }
        };
        Ok(Stored::from_piece(dense(rows, cols, float, data)))
    }

    /// Those entries of a vector that are meant, in the base's order.
    fn entries(&self, name: &str, change: &Change, n: usize) -> Result<Vec<f32>, WeightsError> {
        let (float, _, data) = self.adapter.floats(name)?;
        let from = change.rows.as_ref().map_or(0, |r| r.start);
        let mut out = decoded(float, &data[from * float.bytes()..(from + n) * float.bytes()]);
        if let Some(dim) = change.paired {
            out.chunks_mut(dim).for_each(|head| pair(head, 1));
        }
        Ok(out)
    }

    /// `[rows, rank]` with the factor in it, and `[rank, cols]`.
    pub(super) fn halves(&self, p: &Product, change: &Change) -> Result<(Piece, Piece), WeightsError> {
        let (fa, a0, a1, a) = self.adapter.matrix(&p.down)?;
        let (fb, b0, b1, b) = self.adapter.matrix(&p.up)?;
        let rows = p.rows.clone();
        let (mut left, right, rank) = match p.form {
            Halves::Embedding => {
                let right = dense(b1, b0, Float::F32, bytes(turned(&decoded(fb, &b), b0, b1)));
                (turned(&decoded(fa, &a), a0, a1), right, a0)
            }
            Halves::Plain => {
                let size = b1 * fb.bytes();
                (decoded(fb, &b[rows.start * size..rows.end * size]), dense(a0, a1, fa, a), a0)
            }
            Halves::Expert { index, of } => {
                let (rank, size) = (p.rank, p.rank * a1 * fa.bytes());
                let all = decoded(fb, &b[rows.start * b1 * fb.bytes()..rows.end * b1 * fb.bytes()]);
                let left = all.chunks_exact(b1).flat_map(|row| (0..rank).map(|k| row[k * of + index])).collect();
                (left, dense(rank, a1, fa, a.slice(index * size..(index + 1) * size)), rank)
            }
        };
        if let Some(dim) = change.paired {
            left.chunks_mut(dim * rank).for_each(|head| pair(head, rank));
        }
        left.iter_mut().for_each(|v| *v *= p.scale);
        Ok((dense(left.len() / rank, rank, Float::F32, bytes(left)), right))
    }

    /// DoRA: every row brought to the length that its magnitude says; in an embedding every column.
    fn rescaled(&self, name: &str, change: &Change, mut w: Mat) -> Result<Mat, WeightsError> {
        let by_column = change.adds.as_ref().is_some_and(|p| p.form == Halves::Embedding);
        let (rows, cols) = (w.rows(), w.cols());
        let n = if by_column { cols } else { rows };
        let magnitudes = if by_column { self.adapter.vector(name, cols)? } else { self.entries(name, change, rows)? };
        let mut squares = vec![0f64; n];
        for r in 0..rows {
            for (c, v) in w.row(r).iter().enumerate() {
                squares[if by_column { c } else { r }] += f64::from(*v) * f64::from(*v);
            }
        }
        if let Some(i) = squares.iter().position(|s| !(s.is_finite() && *s > 0.0)) {
            return self.adapter.bad(name, format!("magnitude {i} scales what has the length {}", squares[i].sqrt()));
        }
        let factors: Vec<f32> =
            magnitudes.iter().zip(&squares).map(|(m, s)| (f64::from(*m) / s.sqrt()) as f32).collect();
        for r in 0..rows {
            for (c, v) in w.row_mut(r).iter_mut().enumerate() {
                *v *= factors[if by_column { c } else { r }];
            }
        }
        Ok(w)
    }

    /// What has to be added to a matrix so that some of its rows are others.
    fn tokens(&self, name: &str, tokens: &[usize], sum: &Stored) -> Result<Piece, WeightsError> {
        let (float, n, cols, data) = self.adapter.matrix(name)?;
        if u32::try_from(n.saturating_mul(cols)).is_err() {
            return self.adapter.bad(name, format!("{n} rows of {cols} are too many for rows of single tokens"));
        }
        let mut values = decoded(float, &data);
        let mut order: Vec<(usize, usize)> = tokens.iter().copied().zip(0..).collect();
        order.sort_unstable();
        let mut base = Mat::zeros(1, cols);
        let mut sorted = Vec::with_capacity(values.len());
        for (token, i) in &order {
            sum.decode_rows(*token, token + 1, base.view_mut());
            let row = &mut values[i * cols..(i + 1) * cols];
            row.iter_mut().zip(base.row(0)).for_each(|(v, b)| *v -= b);
            sorted.extend_from_slice(row);
        }
        let before = |row: usize| (order.partition_point(|(token, _)| *token < row) * cols) as u32;
        let starts: Vec<u8> = (0..=sum.rows).flat_map(|row| before(row).to_le_bytes()).collect();
        let column = |c: usize| {
            if cols <= 1 << 16 { (c as u16).to_le_bytes().to_vec() } else { (c as u32).to_le_bytes().to_vec() }
        };
        let columns: Vec<u8> = (0..cols).flat_map(column).collect::<Vec<u8>>().repeat(n);
        let pattern = Pattern::Csr { starts: starts.into(), columns: columns.into() };
        Ok(Piece { rows: sum.rows, cols, pattern, values: Values::Float(Float::F32, bytes(sorted)) })
    }
}

fn dense(rows: usize, cols: usize, float: Float, data: Bytes) -> Piece {
    Piece { rows, cols, pattern: Pattern::Dense, values: Values::Float(float, data) }
}

fn bytes(values: Vec<f32>) -> Bytes {
    values.into_iter().flat_map(f32::to_le_bytes).collect::<Vec<u8>>().into()
}

/// The transpose of `[high, wide]`.
fn turned(v: &[f32], high: usize, wide: usize) -> Vec<f32> {
    (0..wide).flat_map(|c| (0..high).map(move |r| v[r * wide + c])).collect()
}

/// Brings the rows of a head, `wide` entries each, from halves to pairs.
fn pair<T: Copy>(head: &mut [T], wide: usize) {
    let (old, half) = (head.to_vec(), head.len() / wide / 2);
    for (r, row) in head.chunks_exact_mut(wide).enumerate() {
        let from = r / 2 + r % 2 * half;
        row.copy_from_slice(&old[from * wide..][..wide]);
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use lacuna_spec::{Role, RopeStyle, Spec};

    use super::*;
    use crate::Adapter;

    fn golden() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden")
    }

    /// The two orders hold the same channels: those that turn together are `i` and `i + d/2` in one, `2i` and `2i + 1`
    /// in the other.
    #[test]
    fn rows_of_a_gguf_base_are_paired() {
        for (base, adapter) in [
            ("foreign/peft_base", "peft_lora"),
            ("foreign/peft_base", "peft_dora"),
            ("tiny/qwen2", "peft_bias"),
            ("tiny/qwen2", "peft_lora_bias"),
        ] {
            let base = crate::open(golden().join(base)).unwrap();
            let half = base.spec_of().clone();
            let mut pairs = half.clone();
            pairs.layers[0].attn.as_mut().unwrap().rope.as_mut().unwrap().style = RopeStyle::Interleaved;
            let dim = half.layers[0].attn.as_ref().unwrap().head_dim;
            let zeros = |place: &Place, spec: &Spec| {
                let (rows, cols) = spec.shape(place).unwrap();
                Some(Arc::new(Stored::new(rows, cols, vec![])))
            };
            let delta = |spec: &Spec, place: Place| {
                let adapter = Adapter::open(golden().join("foreign").join(adapter)).unwrap();
                let fitted = Fitted::new(adapter, spec, false).unwrap();
                fitted.apply(&place, zeros(&place, &fitted.spec)).unwrap().unwrap().to_mat()
            };
            let q = Place::layer(0, Role::Q);
            let mut places = vec![q];
            places.extend(half.shape(&q.bias()).map(|_| q.bias()));
            for place in places {
                let (a, b) = (delta(&half, place), delta(&pairs, place));
                // The entries of a vector are its rows.
                let (high, wide) = if a.rows() == 1 { (a.cols(), 1) } else { (a.rows(), a.cols()) };
                let row = |m: &Mat, r: usize| m.data()[r * wide..(r + 1) * wide].to_vec();
                for head in 0..high / dim {
                    for i in 0..dim / 2 {
                        assert_eq!(row(&b, head * dim + 2 * i), row(&a, head * dim + i), "{adapter} {place}");
                        assert_eq!(
                            row(&b, head * dim + 2 * i + 1),
                            row(&a, head * dim + i + dim / 2),
                            "{adapter} {place}"
                        );
                    }
                }
                assert!(adapter == "peft_bias" || a != b, "{adapter} {place}");
            }
            let v = Place::layer(0, Role::V);
            assert_eq!(delta(&half, v), delta(&pairs, v));
        }
    }
}
