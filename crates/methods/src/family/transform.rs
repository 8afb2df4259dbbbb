//! `transform`: a matrix's inputs are mapped and its weights turned to match, before any step that writes them smaller.
//!
//! The product stays what it was, `W x = (W M⁻¹)(M x)`. The steps that follow work on `W M⁻¹`, on statistics of `M x`.

use lacuna_contract::{Ask, Card, Edit, Family, Left, Local, Made, Making, MethodError, Step, Transform, Work};
use lacuna_format::{MOST_MAPS, Map, Unpacked};
use lacuna_spec::Place;
use serde::Deserialize;

use super::{floats, one_by_one, wrong};
use crate::make;

/// The methods share nothing that recipes choose.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Keys {}

pub(crate) fn family() -> Family {
    Family { verb: "transform", keys: make::keys::<Keys>, make: transform }
}

struct Mapping {
    by: Box<dyn Transform>,
    card: Card,
}

fn transform(making: &Making<'_>) -> Result<Step, MethodError> {
    let (_, made) = make::split::<Keys>(making)?;
    let Made::Transform(by) = made else { return Err(wrong(making, &made)) };
    Ok(Step::Local(Box::new(Mapping { by, card: making.method.card.clone() })))
}

fn turn(m: &mut Unpacked, maps: Vec<Map>) -> Result<(), MethodError> {
    m.turn(maps).map_err(|e| MethodError::new(e.what))
}

impl Local for Mapping {
    fn together(&self) -> bool {
        false
    }

    fn needs(&self, _: &Place) -> Vec<Ask> {
        self.card.needs.to_vec()
    }

    fn check(&self, (_, cols): (usize, usize), earlier: &[Left]) -> Result<Left, MethodError> {
        if earlier.iter().any(|left| !matches!(left, Left::Mapped { .. })) {
            return Err(MethodError::new(
                "mapping the inputs of a matrix that an earlier step pruned, rounded or took apart would undo that; \
                 put it before",
            ));
        }
        let maps = self.by.form(cols)?;
        if earlier.len() + maps.len() > MOST_MAPS {
            return Err(MethodError::new(format!("a matrix has at most {MOST_MAPS} maps at its input")));
        }
        Ok(Left::Mapped { mixes: !maps.iter().all(Map::moves_only) })
    }

    fn foretell(&self, mut sample: Unpacked, _: u64) -> Result<Unpacked, MethodError> {
        let maps = self.by.form(sample.shape().1)?;
        turn(&mut sample, maps)?;
        Ok(sample)
    }

    fn scratch_bytes(&self, (rows, cols): (usize, usize)) -> u64 {
        16 * rows as u64 * cols as u64 + if self.card.needs.is_empty() { 0 } else { 4 * cols as u64 * cols as u64 }
    }

    fn edit(&self, work: Vec<Work<'_>>) -> Result<Vec<Edit>, MethodError> {
        one_by_one(work, |w| {
            let maps = self.by.maps(floats(&mut w.matrix)?.w.view(), &w.stats)?;
            turn(&mut w.matrix, maps)
        })
    }
}
