//! What `quantize` does where a GGUF block type is asked for.

use lacuna_base::MatRef;
use lacuna_contract::{Ability, Left, Made, Making, MethodError, Stats};
use lacuna_format::{Code, GgufType, Pattern, Piece, UnpackedPiece, Values};

use super::finite;
use crate::{blocks, make};

/// Keys that say what a block type says already.
const EXCLUDED: [&str; 5] = ["bits", "group", "symmetric", "scale", "grid"];

/// Weights in blocks of a GGUF type.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Blocks {
    pub kind: GgufType,
    /// Errors count as much as the mean squares of their inputs, where no solver does better.
    pub importance: bool,
}

impl Blocks {
    /// From a step's keys.
    pub fn of(
        making: &Making<'_>,
        kind: Option<GgufType>,
        importance: bool,
        made: &Made,
    ) -> Result<Option<Blocks>, MethodError> {
        let fail = |what: String| Err(MethodError::new(what));
        let card = &making.method.card;
        let Some(kind) = kind else {
            if importance {
                return fail("importance weighs the errors of a GGUF block type; write type = \"q4_k\", too".into());
            }
            return Ok(None);
        };
        let name = format!("{kind:?}").to_lowercase();
        if let Some(key) = EXCLUDED.iter().find(|key| making.keys.contains_key(**key)) {
            return fail(format!("type = \"{name}\" says what {key} says; leave {key} out"));
        }
        if !card.can(Ability::BlockTypes) {
            return fail(format!("{} does not round to GGUF block types; gptq and rtn do", card.name));
        }
        if importance && matches!(made, Made::Solve(_)) {
            return fail(format!("{} knows its inputs better than by their sizes; leave importance out", card.name));
        }
        Ok(Some(Blocks { kind, importance }))
    }

    /// Refuses what blocks cannot hold.
    pub fn check(&self, cols: usize, earlier: &[Left], factors: bool) -> Result<(), MethodError> {
        // What was set aside leaves zeros, too.
        if earlier.iter().any(|l| matches!(l, Left::Masked | Left::Aside)) {
            let name = format!("{:?}", self.kind).to_lowercase();
            return Err(MethodError::new(format!(
                "blocks of {name} hold every weight and cannot keep the zeros of an earlier step; use bits instead of type"
            )));
        }
        // Thin matrices have widths of their own, which only the work itself shows.
        if factors { Ok(()) } else { blocks::fits(self.kind, cols) }
    }

    /// Each weight to the nearest value of its run.
    pub fn nearest(&self, w: MatRef<'_>, stats: &Stats<'_>) -> Result<Piece, MethodError> {
        make::finite(w)?;
        let (rows, cols) = (w.rows(), w.cols());
        blocks::fits(self.kind, cols)?;
        // A sample, or a thin matrix, has no statistics of its own.
        let squares = if self.importance && stats.tokens > 0 { Some(stats.squares()?) } else { None };
        if let Some(squares) = squares
            && (squares.len() != cols || squares.iter().any(|x| !x.is_finite()))
        {
            return Err(MethodError::new(format!(
                "squares of {} inputs, which must be finite numbers, for a matrix of {cols}",
                squares.len()
            )));
        }
        let most = squares.map_or(0.0, |s| s.iter().fold(0.0f64, |a, b| a.max(*b)));
        let weights: Vec<f32> = match squares {
            Some(squares) if most > 0.0 => squares.iter().map(|x| (x / most) as f32).collect(),
            _ => Vec::new(),
        };
        let bytes: Vec<Vec<u8>> = blocks::each_row(w, |row| self.kind.encode_weighted(row, &weights));
        Ok(Piece { rows, cols, pattern: Pattern::Dense, values: Values::Gguf(self.kind, bytes.concat().into()) })
    }

    /// A sample's form: one row is rounded and stands for all.
    pub fn foretell(&self, piece: &mut UnpackedPiece) -> Result<(), MethodError> {
        let (rows, one) = (piece.w.rows(), piece.w.view().rows_range(0, piece.w.rows().min(1)));
        let mut first = self.nearest(one, &Stats::default())?;
        if let Values::Gguf(_, bytes) = &mut first.values {
            *bytes = bytes.repeat(rows).into();
        }
        self.write(piece, Piece { rows, ..first })
    }

    /// Puts blocks in a piece's place.
    pub fn write(&self, piece: &mut UnpackedPiece, blocks: Piece) -> Result<(), MethodError> {
        if piece.mask.is_some() {
            return Err(MethodError::new("GGUF blocks cannot keep the zeros of an earlier step"));
        }
        piece.w = blocks.to_mat();
        piece.code = Code::Packed(Box::new(blocks));
        finite(&piece.w)
    }
}

#[cfg(test)]
mod tests {
    use lacuna_base::testkit::random;
    use lacuna_base::{Gram, Mat};
    use lacuna_contract::{Ask, Edit, Gathered, Step, Work};
    use lacuna_format::gguf::WRITTEN;
    use lacuna_format::{Float, Stored, Unpacked};
    use lacuna_spec::{Place, Role};
    use serde_json::{Value, json};

    use super::*;

    fn step(method: &str, keys: Value) -> Result<Step, MethodError> {
        let registry = crate::registry();
        let method = registry.method(method).expect("listed");
        let family = registry.family("quantize").expect("listed");
        let keys = keys.as_object().expect("a table").clone();
        (family.make)(&Making { method, keys: &keys, registry: &registry })
    }

    fn local(method: &str, keys: Value) -> Box<dyn lacuna_contract::Local> {
        match step(method, keys).expect("made") {
            Step::Local(local) => local,
            other => panic!("{other:?}"),
        }
    }

    /// Inputs of very different sizes.
    fn gram(n: usize) -> Gram {
        let (a, b) = (random(600, n, 2), random(600, 1, 3));
        let mut gram = Gram::new(n);
        gram.add(
            Mat::from_fn(600, n, |t, c| (a[(t, c)] + b[(t, 0)]) * (1 + 7 * usize::from(c % 9 == 4)) as f32).view(),
        );
        gram
    }

    fn run(local: &dyn lacuna_contract::Local, w: &Mat) -> Stored {
        let gram = gram(w.cols());
        let found =
            [(Ask::InputGram, Gathered::Gram(gram.clone())), (Ask::InputSquares, Gathered::Vector(gram.diag()))];
        let stats = Stats { tokens: 600, found: &found, gradients: &[], sequences: 0, worked: None };
        let matrix = Unpacked::dense(w.clone());
        let source = matrix.pack(Float::F32).expect("packs");
        let config = serde_json::json!({
            "model_type": "llama", "vocab_size": 20, "hidden_size": 8, "intermediate_size": 22, "num_hidden_layers": 1,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16,
        });
        let spec = &lacuna_arch::from_config(&config).expect("a network");
        let work = Work { place: Place::layer(0, Role::Q), matrix, source: &source, stats, bias: None, spec };
        let mut edits = local.edit(vec![work]).expect("edits");
        let Some(Edit::Matrix(_, made)) = edits.pop() else { panic!("a matrix") };
        let stored = made.pack(Float::F32).expect("packs");
        assert_eq!(stored.to_mat(), made.to_mat(), "what later steps see is what is stored");
        stored
    }

    #[test]
    fn every_type_by_every_method_is_stored_in_blocks_of_foretold_bytes_and_better_ones_err_less() {
        let w = random(6, 256, 1);
        let h = gram(256).mean();
        let error = |new: &Mat| -> f64 {
            let off = |r: usize, c: usize| f64::from(w[(r, c)] - new[(r, c)]);
            let at = |r: usize, i: usize| off(r, i) * (0..256).map(|j| h[(i, j)] * off(r, j)).sum::<f64>();
            (0..6).flat_map(|r| (0..256).map(move |i| (r, i))).map(|(r, i)| at(r, i)).sum()
        };
        for kind in WRITTEN {
            let name = format!("{kind:?}");
            let mut errors = Vec::new();
            for (method, keys) in [
                ("gptq", json!({ "type": name })),
                ("rtn", json!({ "type": name, "importance": true })),
                ("rtn", json!({ "type": name.to_lowercase() })),
            ] {
                let local = local(method, keys);
                assert_eq!(local.check((6, 256), &[]), Ok(Left::Rounded));
                let stored = run(local.as_ref(), &w);
                let sample = local.foretell(Unpacked::dense(random(6, 256, 9)), 1).expect("foretold");
                assert_eq!(sample.pack(Float::F32).expect("packs").bytes(), stored.bytes(), "{name}");
                let piece = stored.single().expect("one piece");
                assert!(matches!(piece.values, Values::Gguf(k, _) if k == kind), "{method} {name}");
                errors.push(error(&stored.to_mat()));
            }
            assert!(errors[0] < 0.8 * errors[1] && errors[1] < errors[2], "{name}: {errors:?}");
        }
        assert_eq!(local("rtn", json!({ "type": "q4_k" })).needs(&Place::layer(0, Role::Q)), []);
        let asks = local("rtn", json!({ "type": "q4_k", "importance": true })).needs(&Place::layer(0, Role::Q));
        assert_eq!(asks, [Ask::InputSquares]);
    }

    #[test]
    fn what_does_not_go_with_a_type_is_refused() {
        let fails = |method: &str, keys: Value| step(method, keys).expect_err("refused").what;
        for key in EXCLUDED {
            let value = match key {
                "symmetric" => json!(true),
                "scale" => json!("f16"),
                "grid" => json!("rtn"),
                _ => json!(4),
            };
            let said = fails("gptq", json!({ "type": "q4_k", key: value }));
            assert!(said.contains(key) && said.contains("q4_k"), "{said}");
        }
        assert!(fails("gptq", json!({ "type": "q9_k" })).contains("\"iq4_xs\""));
        for method in ["sparsegpt", "spqr", "squeezellm"] {
            assert!(fails(method, json!({ "type": "q4_k" })).contains("gptq and rtn do"), "{method}");
        }
        assert!(fails("rtn", json!({ "importance": true })).contains("type"));
        assert!(fails("gptq", json!({ "type": "q4_k", "importance": true })).contains("leave importance out"));
        let local = local("gptq", json!({ "type": "Q4_K" }));
        let said = local.check((4, 576), &[]).expect_err("refused").what;
        assert!(said.contains("576") && said.contains("q4_0"), "{said}");
        assert!(local.check((4, 512), &[Left::Aside]).is_err());
        let said = local.check((4, 512), &[Left::Masked]).expect_err("refused").what;
        assert!(said.contains("zeros"), "{said}");
        assert!(local.check((4, 512), &[Left::Rounded]).is_err());
    }
}
