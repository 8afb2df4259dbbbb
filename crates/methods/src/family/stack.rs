//! `stack`: a matrix becomes a sum of one-bit blocks, each of what those before it leave; how many of them are loaded can
//! be decided when the model is.

use lacuna_contract::{Ask, Card, Edit, Family, Left, Local, Made, Making, MethodError, Stack, Step, Work};
use lacuna_format::{MOST_MAPS, Map, Unpacked, UnpackedSigned, UnpackedTerm};
use lacuna_spec::Place;
use serde::Deserialize;

use super::keys::Whole;
use super::{finite, floats, one_by_one, wrong};
use crate::make;

/// What the methods share.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Keys {
    /// Blocks of each matrix.
    blocks: Whole<1, 16>,
}

impl Default for Keys {
    fn default() -> Keys {
        Keys { blocks: Whole(6) }
    }
}

pub(crate) fn family() -> Family {
    Family { verb: "stack", keys: make::keys::<Keys>, make: stack }
}

struct Apart {
    blocks: usize,
    by: Box<dyn Stack>,
    card: Card,
}

fn stack(making: &Making<'_>) -> Result<Step, MethodError> {
    let (keys, made) = make::split::<Keys>(making)?;
    let Made::Stack(by) = made else { return Err(wrong(making, &made)) };
    Ok(Step::Local(Box::new(Apart { blocks: keys.blocks.0, by, card: making.method.card.clone() })))
}

/// The matrix becomes the blocks that `of` makes of its values behind the maps.
fn put(
    m: &mut Unpacked,
    maps: Vec<Map>,
    of: impl FnOnce(&mut Unpacked) -> Result<Vec<UnpackedSigned>, MethodError>,
) -> Result<(), MethodError> {
    m.turn(maps).map_err(|e| MethodError::new(e.what))?;
    let blocks = of(m)?;
    for block in &blocks {
        finite(&block.left.w)?;
        finite(&block.right.w)?;
    }
    let mut terms = blocks.into_iter().map(|b| UnpackedTerm::Signed(Box::new(b)));
    m.main = terms.next().ok_or_else(|| MethodError::new("a stack of no blocks"))?;
    m.aside = terms.collect();
    Ok(())
}

impl Local for Apart {
    fn together(&self) -> bool {
        false
    }

    fn needs(&self, _: &Place) -> Vec<Ask> {
        self.card.needs.to_vec()
    }

    fn check(&self, (_, cols): (usize, usize), earlier: &[Left]) -> Result<Left, MethodError> {
        if earlier.iter().any(|left| !matches!(left, Left::Mapped { .. })) {
            return Err(MethodError::new(
                "a stack of what an earlier step pruned, rounded or took apart would undo that; put it before, or \
                 leave one of them out",
            ));
        }
        if earlier.len() + self.by.maps(cols, None)?.len() > MOST_MAPS {
            return Err(MethodError::new(format!("a matrix has at most {MOST_MAPS} maps at its input")));
        }
        Ok(Left::Rounded)
    }

    fn foretell(&self, mut sample: Unpacked, seed: u64) -> Result<Unpacked, MethodError> {
        let shape = sample.shape();
        put(&mut sample, self.by.maps(shape.1, None)?, |_| self.by.form(shape, self.blocks, seed))?;
        Ok(sample)
    }

    fn scratch_bytes(&self, (rows, cols): (usize, usize)) -> u64 {
        // The residual, its magnitudes and a block's values; signs of all blocks; thin matrices of a few dozen columns.
        16 * rows as u64 * cols as u64 + self.blocks as u64 * (rows * cols / 8) as u64 + 2048 * (rows + cols) as u64
    }

    fn edit(&self, work: Vec<Work<'_>>) -> Result<Vec<Edit>, MethodError> {
        one_by_one(work, |w| {
            let maps = self.by.maps(w.matrix.shape().1, Some(&w.stats))?;
            put(&mut w.matrix, maps, |m| self.by.blocks(floats(m)?.w.view(), self.blocks))
        })
    }
}
