//! `factor`: two thin matrices instead of one, or beside what earlier steps left, for its error.

use lacuna_base::{Mat, Rng};
use lacuna_contract::{Ability, Ask, Card, Edit, Factor, Family, Left, Local, Made, Making, MethodError, Step, Work};
use lacuna_format::{Unpacked, UnpackedPiece, UnpackedTerm};
use lacuna_spec::Place;
use serde::Deserialize;

use super::keys::{Fraction, Whole};
use super::{finite, one_by_one, wants_floats, wrong};
use crate::make;

/// What the methods share.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Keys {
    /// Fraction of the matrix's parameters that the thin ones have: rank = floor(keep · mn / (m + n)), at least 1.
    keep: Fraction,
    /// The rank, instead of `keep`.
    rank: Option<Whole<1, 65536>>,
    /// What is factored.
    of: Of,
}

#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq)]
#[serde(rename_all = "snake_case")]
enum Of {
    /// The matrix, which the product replaces.
    #[default]
    Matrix,
    /// What earlier steps lost of it: the product stands beside their terms.
    Error,
}

impl Default for Keys {
    fn default() -> Keys {
        Keys { keep: Fraction(0.8), rank: None, of: Of::Matrix }
    }
}

pub(crate) fn family() -> Family {
    Family { verb: "factor", keys: make::keys::<Keys>, make: factor }
}

struct Thin {
    keep: f64,
    rank: Option<usize>,
    of: Of,
    by: Box<dyn Factor>,
    card: Card,
}

fn factor(making: &Making<'_>) -> Result<Step, MethodError> {
    let (keys, made) = make::split::<Keys>(making)?;
    let Made::Factor(by) = made else { return Err(wrong(making, &made)) };
    let card = making.method.card.clone();
    if keys.of == Of::Error && !card.can(Ability::Error) {
        return Err(MethodError::new(format!("{} does not factor an error", card.name)));
    }
    if keys.rank.is_some() && making.keys.contains_key("keep") {
        return Err(MethodError::new("keep and rank say the same thing twice; give one of them"));
    }
    let rank = keys.rank.map(|r| r.0);
    Ok(Step::Local(Box::new(Thin { keep: keys.keep.0, rank, of: keys.of, by, card })))
}

impl Thin {
    fn rank(&self, (rows, cols): (usize, usize)) -> usize {
        let rank = match self.rank {
            Some(rank) => rank,
            None => ((self.keep * (rows * cols) as f64) / (rows + cols) as f64).floor() as usize,
        };
        rank.clamp(1, rows.min(cols).max(1))
    }

    /// Puts the thin matrices where they belong.
    fn put(&self, m: &mut Unpacked, a: Mat, b: Mat) -> Result<(), MethodError> {
        finite(&a)?;
        finite(&b)?;
        let product = UnpackedTerm::Product(Box::new((UnpackedPiece::dense(a), UnpackedPiece::dense(b))));
        match self.of {
            Of::Matrix => m.main = product,
            Of::Error => m.aside.push(product),
        }
        Ok(())
    }

    fn apply(&self, w: &mut Work<'_>) -> Result<(), MethodError> {
        let shape = w.matrix.shape();
        let of = match self.of {
            Of::Matrix => w.matrix.main.to_mat(),
            Of::Error => {
                let source = w.matrix.turned(w.source.to_mat());
                let mut error = source.map_err(|e| MethodError::new(e.what))?;
                let now = w.matrix.sum();
                error.data_mut().iter_mut().zip(now.data()).for_each(|(e, n)| *e -= n);
                error
            }
        };
        let (a, b) = self.by.factor(of.view(), &w.stats, self.rank(shape))?;
        self.put(&mut w.matrix, a, b)
    }
}

impl Local for Thin {
    fn together(&self) -> bool {
        false
    }

    fn needs(&self, _: &Place) -> Vec<Ask> {
        self.card.needs.to_vec()
    }

    fn check(&self, _: (usize, usize), earlier: &[Left]) -> Result<Left, MethodError> {
        if self.of == Of::Error {
            return match earlier {
                _ if earlier.iter().all(|l| matches!(l, Left::Mapped { .. })) => Err(MethodError::new(
                    "of = \"error\" and nothing before has made one; put it after the other steps",
                )),
                _ => Ok(Left::Corrected),
            };
        }
        wants_floats("factoring", earlier)?;
        if earlier.iter().any(|l| matches!(l, Left::Masked | Left::Aside)) {
            return Err(MethodError::new("factoring would fill the zeros of an earlier step; put it first"));
        }
        Ok(Left::Factored)
    }

    fn foretell(&self, mut sample: Unpacked, seed: u64) -> Result<Unpacked, MethodError> {
        let (rows, cols) = sample.shape();
        let rank = self.rank((rows, cols));
        let mut rng = Rng::new(seed);
        let mut random = |r, c| Mat::from_fn(r, c, |_, _| rng.normal());
        let (a, b) = (random(rows, rank), random(rank, cols));
        self.put(&mut sample, a, b)?;
        Ok(sample)
    }

    fn scratch_bytes(&self, (rows, cols): (usize, usize)) -> u64 {
        32 * (cols as u64) * (cols as u64) + 48 * (rows as u64) * (cols as u64)
    }

    fn edit(&self, work: Vec<Work<'_>>) -> Result<Vec<Edit>, MethodError> {
        one_by_one(work, |w| self.apply(w))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rank_holds_the_asked_fraction_of_parameters() {
        let registry = crate::registry();
        let method = registry.method("svd").expect("listed").clone();
        let thin = |keep: f64| Thin {
            keep,
            rank: None,
            of: Of::Matrix,
            by: match (method.make)(serde_json::Value::Null) {
                Ok(Made::Factor(f)) => f,
                _ => unreachable!("svd factors"),
            },
            card: method.card.clone(),
        };
        for (rows, cols) in [(1, 1), (576, 1536), (1536, 576), (7, 300)] {
            for keep in [0.1, 0.5, 0.8] {
                let rank = thin(keep).rank((rows, cols));
                let fraction = (rank * (rows + cols)) as f64 / (rows * cols) as f64;
                assert!(rank == 1 || fraction <= keep, "{rows} {cols} {keep}: {fraction}");
                assert!(((rank + 1) * (rows + cols)) as f64 > keep * (rows * cols) as f64);
            }
        }
    }
}
