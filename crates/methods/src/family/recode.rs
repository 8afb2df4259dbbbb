//! `recode`: the codes of a rounded matrix stay, the numbers beside them are written in another way.

use lacuna_base::Mat;
use lacuna_contract::Ask;
use lacuna_contract::{Edit, Family, Left, Local, Made, Making, MethodError, Recode as Question, Step, Work};
use lacuna_format::{Code, PatternKind, Stored, Unpacked, UnpackedPiece, UnpackedTerm, pack_scales};
use lacuna_format::{Group, Pattern, Piece, ScaleCodec, Values, Zeros, bits};
use lacuna_spec::Place;
use serde::Deserialize;

use super::wrong;
use crate::make;

/// The family has no keys of its own.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Keys {}

pub(crate) fn family() -> Family {
    Family { verb: "recode", keys: make::keys::<Keys>, make: recode }
}

struct Recode {
    by: Box<dyn Question>,
}

fn recode(making: &Making<'_>) -> Result<Step, MethodError> {
    let (_, made) = make::split::<Keys>(making)?;
    let Made::Recode(by) = made else { return Err(wrong(making, &made)) };
    Ok(Step::Local(Box::new(Recode { by })))
}

/// The matrix on its way, packed already.
fn packed(stored: Stored) -> Result<Unpacked, MethodError> {
    let piece = stored.single().filter(|p| p.pattern.kind() == PatternKind::Dense).cloned();
    let piece = piece.ok_or_else(|| {
        MethodError::new("the matrix is a sum of terms, or sparse: there are no scales of one piece to recode")
    })?;
    let w = stored.to_mat();
    let main = UnpackedPiece { code: Code::Packed(Box::new(piece)), ..UnpackedPiece::dense(w) };
    Ok(Unpacked { main: UnpackedTerm::Piece(main), aside: Vec::new(), input: Vec::new() })
}

impl Recode {
    fn of(&self, stored: &Stored) -> Result<Unpacked, MethodError> {
        packed(self.by.recode(stored)?.unwrap_or_else(|| stored.clone()))
    }
}

/// A matrix of random codes of 4 bits with f16 scales and minima for every 32: what a rounded source most often is.
fn sample((rows, cols): (usize, usize)) -> Result<Stored, MethodError> {
    let groups = cols.div_ceil(32);
    let halves = pack_scales(&Mat::from_fn(rows, groups, |r, g| 1.0 + ((r + g) % 7) as f32), ScaleCodec::F16);
    let halves = halves.map_err(|e| MethodError::new(e.what))?;
    let codes: Vec<u8> = (0..rows * cols).map(|i| (i * 7 % 16) as u8).collect();
    let zeros = Some(Zeros::Minima(halves.clone()));
    let codes = bits::pack(&codes, 4).into();
    let values = Values::Int { bits: 4, codes, scales: halves, zeros, group: Group::Run(32) };
    Ok(Stored::from_piece(Piece { rows, cols, pattern: Pattern::Dense, values }))
}

impl Local for Recode {
    fn together(&self) -> bool {
        false
    }

    fn needs(&self, _: &Place) -> Vec<Ask> {
        Vec::new()
    }

    fn check(&self, _: (usize, usize), earlier: &[Left]) -> Result<Left, MethodError> {
        if !earlier.is_empty() {
            let what = "recoding takes the matrix as it came; leave out the steps before it, or this one";
            return Err(MethodError::new(what));
        }
        Ok(Left::Rounded)
    }

    fn foretell(&self, matrix: Unpacked, _: u64) -> Result<Unpacked, MethodError> {
        self.of(&sample(matrix.shape())?)
    }

    fn foretell_of(&self, source: &Stored) -> Option<Result<Unpacked, MethodError>> {
        Some(self.of(source))
    }

    fn scratch_bytes(&self, shape: (usize, usize)) -> u64 {
        8 * shape.0 as u64 * shape.1 as u64
    }

    fn edit(&self, work: Vec<Work<'_>>) -> Result<Vec<Edit>, MethodError> {
        work.into_iter().map(|w| Ok(Edit::Matrix(w.place, self.of(w.source)?))).collect()
    }
}
