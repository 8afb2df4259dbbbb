//! A matrix on its way through a recipe: terms whose values are plain matrices, packed once when the last step is done.

use lacuna_base::{Mat, MatRef, dense};

use crate::{
    Axes, Codebook, Float, FormatError, Integers, Map, Mask, PatternKind, Piece, ScaleCodec, Signed, Stored, Term,
    cheapest_pattern, pack_codebook, pack_float, pack_integers,
};

/// How the values of a piece will be written.
#[derive(Clone, Debug)]
pub enum Code {
    /// Floats: f16 where that says every value.
    Float,
    /// Grouped integers, whose decoded values are the piece's.
    Integers(Integers, ScaleCodec),
    /// Codes into tables of floats of that type, whose decoded values are the piece's.
    Codebook(Codebook, Float, ScaleCodec),
    /// As this dense piece, whose decoded values are the piece's: GGUF blocks, codes kept from the source.
    Packed(Box<Piece>),
}

/// Where the values of a piece will lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// The pattern of fewest bytes that the mask allows; blocks are tried where the mask was made of `(height, width)`.
    Cheapest(Option<(usize, usize)>),
    /// This one.
    Fixed(PatternKind),
}

/// A piece that is not packed yet.
#[derive(Clone, Debug)]
pub struct UnpackedPiece {
    /// The values, `[rows, cols]`: what the codes decode to; floats before they are rounded to their codec.
    pub w: Mat,
    /// What is kept; the rest of `w` is zero. `None`: everything.
    pub mask: Option<Mask>,
    /// Where the values will lie.
    pub layout: Layout,
    /// How they will be written.
    pub code: Code,
}

/// A summand that is not packed yet.
// A handful of terms a matrix, as of `Term`.
#[allow(clippy::large_enum_variant)]
#[derive(Clone, Debug)]
pub enum UnpackedTerm {
    /// A piece as it is.
    Piece(UnpackedPiece),
    /// `left · right`: `[rows, rank] · [rank, cols]`.
    Product(Box<(UnpackedPiece, UnpackedPiece)>),
    /// Signs times such a product.
    Signed(Box<UnpackedSigned>),
}

/// Signs times a product that is not packed yet.
#[derive(Clone, Debug)]
pub struct UnpackedSigned {
    /// Where the sign is not the product's, `[rows, cols]`.
    pub turned: Mask,
    /// `[rows, rank]`.
    pub left: UnpackedPiece,
    /// `[rank, cols]`.
    pub right: UnpackedPiece,
}

impl UnpackedSigned {
    /// The values, `[rows, cols]`.
    pub fn to_mat(&self) -> Mat {
        let mut w = dense::matmul_nn(self.left.w.view(), self.right.w.view());
        for r in 0..w.rows() {
            let turned = self.turned.row(r);
            let turn = |(c, v): (usize, &mut f32)| {
                *v = f32::from_bits(v.to_bits() ^ (((turned[c / 64] >> (c % 64) & 1) as u32) << 31));
            };
            w.row_mut(r).iter_mut().enumerate().for_each(turn);
        }
        w
    }
}

/// A matrix that is not packed yet: the sum of the term that steps work on and of those set aside, times the maps of
/// its input.
///
/// With `M` all maps together, the terms are those of `W' = W M⁻¹`, so that `W' (M x) = W x`.
#[derive(Clone, Debug)]
pub struct Unpacked {
    /// The term that the next step works on.
    pub main: UnpackedTerm,
    /// Terms that earlier steps set aside: outliers, corrections of an error.
    pub aside: Vec<UnpackedTerm>,
    /// Maps of its input, in the order in which they are applied.
    pub input: Vec<Map>,
}

impl UnpackedPiece {
    /// Floats, all of them kept.
    pub fn dense(w: Mat) -> UnpackedPiece {
        UnpackedPiece { w, mask: None, layout: Layout::Cheapest(None), code: Code::Float }
    }

    /// Sets what `mask` drops to zero and keeps the mask.
    pub fn keep(&mut self, mask: Mask) {
        let cols = self.w.cols().max(1);
        for (r, row) in self.w.data_mut().chunks_mut(cols).enumerate() {
            row.iter_mut().enumerate().filter(|(c, _)| !mask.get(r, *c)).for_each(|(_, v)| *v = 0.0);
        }
        self.mask = Some(mask);
    }

    /// Packs. Floats that f16 cannot say are written as `wide`.
    pub fn pack(&self, wide: Float) -> Result<Piece, FormatError> {
        let mask = self.mask.as_ref();
        match &self.code {
            Code::Float => {
                let kind = |float: Float| self.kind(8.0 * float.bytes() as f64);
                pack_float(self.w.view(), mask, kind(Float::F16), Float::F16)
                    .or_else(|_| pack_float(self.w.view(), mask, kind(wide), wide))
            }
            Code::Integers(q, scale) => pack_integers(q, mask, self.kind(f64::from(q.bits)), *scale),
            Code::Codebook(q, tables, scale) => {
                let shape = (self.w.rows(), self.w.cols());
                pack_codebook(shape, q, mask, self.kind(f64::from(q.bits)), *tables, *scale)
            }
            Code::Packed(piece) => Ok(piece.as_ref().clone()),
        }
    }

    fn kind(&self, bits: f64) -> PatternKind {
        match (self.layout, &self.mask) {
            (Layout::Fixed(kind), _) => kind,
            (Layout::Cheapest(_), None) => PatternKind::Dense,
            (Layout::Cheapest(blocks), Some(mask)) => cheapest_pattern(mask, bits, blocks),
        }
    }
}

impl UnpackedTerm {
    /// The values, `[rows, cols]`.
    pub fn to_mat(&self) -> Mat {
        match self {
            UnpackedTerm::Piece(p) => p.w.clone(),
            UnpackedTerm::Product(p) => dense::matmul_nn(p.0.w.view(), p.1.w.view()),
            UnpackedTerm::Signed(s) => s.to_mat(),
        }
    }

    fn pack(&self, wide: Float) -> Result<Term, FormatError> {
        Ok(match self {
            UnpackedTerm::Piece(p) => Term::Piece(p.pack(wide)?),
            UnpackedTerm::Product(p) => Term::Product(p.0.pack(wide)?, p.1.pack(wide)?),
            UnpackedTerm::Signed(s) => Term::Signed(Signed::new(&s.turned, s.left.pack(wide)?, s.right.pack(wide)?)),
        })
    }
}

impl Unpacked {
    /// One dense term.
    pub fn dense(w: Mat) -> Unpacked {
        Unpacked { main: UnpackedTerm::Piece(UnpackedPiece::dense(w)), aside: Vec::new(), input: Vec::new() }
    }

    /// `[rows, cols]`.
    pub fn shape(&self) -> (usize, usize) {
        match &self.main {
            UnpackedTerm::Piece(p) => (p.w.rows(), p.w.cols()),
            UnpackedTerm::Product(p) => (p.0.w.rows(), p.1.w.cols()),
            UnpackedTerm::Signed(s) => (s.left.w.rows(), s.right.w.cols()),
        }
    }

    /// All terms, the main one first.
    pub fn terms(&self) -> impl Iterator<Item = &UnpackedTerm> {
        std::iter::once(&self.main).chain(&self.aside)
    }

    /// All pieces.
    pub fn pieces(&self) -> impl Iterator<Item = &UnpackedPiece> {
        self.terms().flat_map(|t| match t {
            UnpackedTerm::Piece(p) => vec![p],
            UnpackedTerm::Product(p) => vec![&p.0, &p.1],
            UnpackedTerm::Signed(s) => vec![&s.left, &s.right],
        })
    }

    /// More maps of the input, behind those there are: the weights become those of the inputs as mapped. Refused for
    /// anything but floats of which nothing was dropped or set aside.
    pub fn turn(&mut self, maps: Vec<Map>) -> Result<(), FormatError> {
        match &mut self.main {
            UnpackedTerm::Piece(p) if matches!(p.code, Code::Float) && p.mask.is_none() && self.aside.is_empty() => {
                turned(&maps, &mut p.w)?;
            }
            _ => return Err(FormatError::new("only floats, all of them kept in one term, get maps")),
        }
        self.input.extend(maps);
        Ok(())
    }

    /// `w`, weights of the inputs as they come, as weights of the inputs as mapped.
    pub fn turned(&self, mut w: Mat) -> Result<Mat, FormatError> {
        turned(&self.input, &mut w)?;
        Ok(w)
    }

    /// The whole matrix, `[rows, cols]`: the sum of the terms times the maps.
    pub fn to_mat(&self) -> Mat {
        let mut sum = self.sum();
        if !self.input.is_empty() {
            let axes = Axes::of(&self.input, sum.cols()).expect("maps were checked when they were taken in");
            (0..sum.rows()).for_each(|r| axes.back(sum.row_mut(r)));
        }
        sum
    }

    /// The sum of the terms, `[rows, cols]`: what meets the inputs as mapped.
    pub fn sum(&self) -> Mat {
        let mut sum = self.main.to_mat();
        for term in &self.aside {
            match term {
                UnpackedTerm::Piece(p) => add(&mut sum, p.w.view()),
                UnpackedTerm::Product(_) | UnpackedTerm::Signed(_) => add(&mut sum, term.to_mat().view()),
            }
        }
        sum
    }

    /// Packs every term. Floats that f16 cannot say are written as `wide`. Errors name the row, the column and the
    /// number.
    pub fn pack(&self, wide: Float) -> Result<Stored, FormatError> {
        let (rows, cols) = self.shape();
        let terms = self.terms().map(|t| t.pack(wide)).collect::<Result<_, _>>()?;
        let stored = Stored::new(rows, cols, terms).with_maps(self.input.clone(), Vec::new());
        stored.check()?;
        Ok(stored)
    }
}

/// `w <- w M⁻¹`.
fn turned(maps: &[Map], w: &mut Mat) -> Result<(), FormatError> {
    if maps.is_empty() {
        return Ok(());
    }
    let axes = Axes::of(maps, w.cols())?;
    (0..w.rows()).try_for_each(|r| axes.weights(w.row_mut(r)))
}

fn add(sum: &mut Mat, w: MatRef<'_>) {
    let cols = w.cols().max(1);
    for (r, row) in sum.data_mut().chunks_mut(cols).enumerate() {
        row.iter_mut().zip(w.row(r)).for_each(|(a, b)| *a += b);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::testkit::{max_abs_diff, random};

    #[test]
    fn the_sum_of_terms_packs_and_decodes() {
        let (rows, cols) = (6, 16);
        let half = |m: Mat| Mat::from_fn(m.rows(), m.cols(), |r, c| half::f16::from_f32(m[(r, c)]).to_f32());
        let mut main = UnpackedPiece::dense(half(random(rows, cols, 1)));
        main.keep(Mask::from_fn(rows, cols, |r, c| (r + c) % 3 != 0));
        let mut out = UnpackedPiece::dense(half(random(rows, cols, 2)));
        out.keep(Mask::from_fn(rows, cols, |r, c| (r * 5 + c) % 11 == 0));
        out.layout = Layout::Fixed(PatternKind::Csr);
        let thin = (UnpackedPiece::dense(half(random(rows, 2, 3))), UnpackedPiece::dense(half(random(2, cols, 4))));
        let all = Unpacked {
            main: UnpackedTerm::Piece(main),
            aside: vec![UnpackedTerm::Piece(out), UnpackedTerm::Product(Box::new(thin))],
            input: Vec::new(),
        };
        let stored = all.pack(Float::F32).unwrap();
        assert_eq!((stored.terms.len(), all.pieces().count()), (3, 4));
        assert!(max_abs_diff(stored.to_mat().view(), all.to_mat().view()) < 1e-5);
        // Beyond f16: the wide codec.
        let big = Unpacked::dense(Mat::from_fn(1, 2, |_, _| 1e6));
        assert_eq!(big.pack(Float::F32).unwrap().to_mat().data(), [1e6, 1e6]);
    }

    #[test]
    fn maps_turn_the_weights_and_leave_the_matrix() {
        let (w, x) = (random(5, 24, 1), random(1, 24, 2));
        let signs: Vec<bool> = (0..24).map(|i| i % 5 < 2).collect();
        let index: Vec<u32> = (0..24).map(|i| i * 7 % 24).collect();
        let d: Vec<f32> = (0..24).map(|i| 0.25 + i as f32 / 8.0).collect();
        let mut m = Unpacked::dense(w.clone());
        m.turn(vec![Map::diagonal(&d, Float::F16).unwrap()]).unwrap();
        m.turn(vec![Map::hadamard(12, Some(&signs)), Map::permutation(&index)]).unwrap();
        assert!(max_abs_diff(m.to_mat().view(), w.view()) < 1e-5);
        assert!(max_abs_diff(m.turned(w.clone()).unwrap().view(), m.sum().view()) == 0.0);
        // The definition: the sum of terms times the mapped input is the matrix times the input.
        let mut y: Vec<f64> = x.data().iter().map(|v| f64::from(*v)).collect();
        Axes::of(&m.input, 24).unwrap().inputs(&mut y);
        for r in 0..5 {
            let want: f64 = w.row(r).iter().zip(x.data()).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
            let got: f64 = m.sum().row(r).iter().zip(&y).map(|(a, b)| f64::from(*a) * b).sum();
            assert!((got - want).abs() < 1e-5, "row {r}: {got} {want}");
        }
        let stored = m.pack(Float::F32).unwrap();
        assert_eq!(stored.input.len(), 3);
        assert!(max_abs_diff(stored.to_mat().view(), w.view()) < 2e-3);
        assert_eq!(stored.bytes(), 5 * 24 * 2 + 24 * 2 + 24 / 8 + 24 * 4);
        // What has no inverse, what does not fit, what is no longer plain floats.
        let zero = Map::diagonal(&[0.0; 24], Float::F32).unwrap();
        assert!(m.clone().turn(vec![zero]).unwrap_err().what.contains("value 0 is 0"));
        let dense = Map::dense(2, &[1.0, 0.0, 0.0, 1.0], Float::F32).unwrap();
        assert!(m.clone().turn(vec![dense]).unwrap_err().what.contains("inverse"));
        assert!(m.clone().turn(vec![Map::hadamard(16, None)]).unwrap_err().what.contains("runs of 16"));
        let UnpackedTerm::Piece(p) = &mut m.main else { unreachable!() };
        p.keep(Mask::from_fn(5, 24, |r, _| r > 0));
        assert!(m.turn(vec![Map::hadamard(8, None)]).unwrap_err().what.contains("floats"));
    }
}
