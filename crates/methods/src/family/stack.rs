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

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::testkit::{max_abs_diff, random};
    use lacuna_contract::{Gathered, Stats};
    use lacuna_format::{Float, Stored};
    use lacuna_spec::{Part, Role};
    use serde_json::{Value, json};

    fn step(keys: Value) -> Result<Box<dyn Local>, MethodError> {
        let registry = crate::registry();
        let Value::Object(keys) = keys else { panic!("a table") };
        let making = Making { method: registry.method("bitstack").expect("listed"), keys: &keys, registry: &registry };
        match stack(&making)? {
            Step::Local(local) => Ok(local),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_matrix_becomes_a_stack_of_as_many_bytes_as_foretold() {
        let (rows, cols) = (24, 40);
        let w = random(rows, cols, 1);
        let place = Place { layer: Some(0), role: Role::Up, part: Part::Weight, expert: None };
        let squares = (0..cols).map(|c| 0.1 + c as f64).collect();
        let found = [(Ask::InputSquares, Gathered::Vector(squares))];
        let stats = Stats { tokens: 9, found: &found, gradients: &[], sequences: 0, worked: None };
        let mut last = f32::INFINITY;
        for blocks in [1, 3, 6] {
            let local = step(json!({ "blocks": blocks })).expect("made");
            assert_eq!(
                (local.check((rows, cols), &[]), local.needs(&place)),
                (Ok(Left::Rounded), vec![Ask::InputSquares])
            );
            let source = Unpacked::dense(w.clone()).pack(Float::F32).expect("packs");
            let config = serde_json::json!({
                "model_type": "llama", "vocab_size": 20, "hidden_size": 8, "intermediate_size": 22, "num_hidden_layers": 1,
                "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16,
            });
            let spec = &lacuna_arch::from_config(&config).expect("a network");
            let work = Work { place, matrix: Unpacked::dense(w.clone()), source: &source, stats, bias: None, spec };
            let Ok([Edit::Matrix(_, made)]) = local.edit(vec![work]).map(|e| <[Edit; 1]>::try_from(e).expect("one"))
            else {
                panic!("a matrix")
            };
            let made: Stored = made.pack(Float::F32).expect("packs");
            let told = local.foretell(Unpacked::dense(random(rows, cols, 2)), 3).expect("told");
            assert_eq!(made.bytes(), told.pack(Float::F32).expect("packs").bytes());
            assert_eq!((made.terms.len(), made.stack().map(|s| s.len()), made.input.len()), (blocks, Some(blocks), 1));
            let off = max_abs_diff(made.to_mat().view(), w.view());
            assert!(off < last, "{blocks} blocks are off by {off}");
            last = off;
            // Any number of terms from the first on is what fewer blocks would have been.
            let first = made.first_terms(1);
            assert!(first.check().is_ok() && first.bytes() < made.bytes() || blocks == 1);
        }
    }

    #[test]
    fn what_cannot_come_before_or_be_asked_is_refused() {
        let local = step(json!({})).expect("made");
        for left in [Left::Masked, Left::Rounded, Left::Factored, Left::Aside] {
            assert!(local.check((4, 8), &[left]).expect_err("refused").what.contains("put it before"));
        }
        assert!(local.check((4, 8), &[Left::Mapped { mixes: false }; MOST_MAPS]).is_err());
        for keys in [json!({ "blocks": 0 }), json!({ "blocks": 17 }), json!({ "block": 2 })] {
            assert!(step(keys).is_err());
        }
    }
}
