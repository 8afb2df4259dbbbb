//! `prune`: weights are set to zero, by a score or by a solver that makes up for them.

use std::collections::BTreeMap;

use lacuna_base::Mat;
use lacuna_contract::{
    Ability, Ask, Card, Edit, Family, FfnAsk, FfnMatrix, Left, Local, Made, Making, MethodError, PruneAsk, Scope,
    Score, Solve, SolveAsk, SolveFfn, Solved, Sparsity, Stats, Step, Work,
};
use lacuna_format::{Layout, Mask, Unpacked, UnpackedPiece};
use lacuna_spec::{Activation, FfnSpec, Place, Role};
use serde::Deserialize;

use super::keys::{Fraction, Pattern};
use super::select::{Scored, select};
use super::{chance, finite, floats, one_by_one, solver_bytes, wants_floats, wrong};
use crate::make;

/// What the methods share.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Keys {
    /// Fraction of zeros; N:M patterns state their own.
    sparsity: Fraction,
    /// Which zeros.
    pattern: Pattern,
    /// Which weights compete when the lowest scores go; as the paper says where absent.
    scope: Option<Scope>,
}

impl Default for Keys {
    fn default() -> Keys {
        Keys { sparsity: Fraction(0.5), pattern: Pattern(Sparsity::Unstructured), scope: None }
    }
}

pub(crate) fn family() -> Family {
    Family { verb: "prune", keys: make::keys::<Keys>, make: prune }
}

enum By {
    Score(Box<dyn Score>),
    Solve(Box<dyn Solve>),
}

struct Prune {
    ask: PruneAsk,
    scope: Option<Scope>,
    by: By,
    card: Card,
}

fn prune(making: &Making<'_>) -> Result<Step, MethodError> {
    let (keys, made) = make::split::<Keys>(making)?;
    let by = match made {
        Made::Score(score) => By::Score(score),
        Made::Solve(solve) => By::Solve(solve),
        other => return Err(wrong(making, &other)),
    };
    let card = making.method.card.clone();
    let pattern = keys.pattern.0;
    let (needed, what) = match pattern {
        Sparsity::Unstructured => (Ability::Unstructured, "single weights"),
        Sparsity::Nm { .. } => (Ability::Nm, "n of m"),
        Sparsity::Block { .. } => (Ability::Blocks, "blocks"),
    };
    if !card.can(needed) {
        return Err(MethodError::new(format!("{} does not prune {what}", card.name)));
    }
    if keys.scope.is_some() && matches!(by, By::Solve(_)) {
        return Err(MethodError::new(format!("{} chooses as it walks: scope has no meaning for it", card.name)));
    }
    let sparsity = match pattern {
        Sparsity::Nm { n, m } => 1.0 - n as f64 / m as f64,
        _ => keys.sparsity.0,
    };
    Ok(Step::Local(Box::new(Prune { ask: PruneAsk { sparsity, pattern }, scope: keys.scope, by, card })))
}

impl Prune {
    fn scope(&self) -> Scope {
        match &self.by {
            By::Score(s) => self.scope.unwrap_or(s.scope()),
            By::Solve(_) => Scope::Matrix,
        }
    }

    /// The lowest scores go, of matrices that compete where there are several.
    fn lowest(&self, scored: Vec<(&mut UnpackedPiece, Mat)>) -> Result<(), MethodError> {
        let list: Vec<Scored<'_>> = scored
            .iter()
            .map(|(p, s)| Scored { scores: s, before: p.mask.as_ref(), sparsity: self.ask.sparsity })
            .collect();
        let masks = select(&list, self.ask.pattern, self.scope()).map_err(MethodError::new)?;
        drop(list);
        for ((piece, _), mask) in scored.into_iter().zip(masks) {
            keep(piece, mask, self.ask.pattern);
        }
        Ok(())
    }
}

fn keep(piece: &mut UnpackedPiece, mask: Mask, pattern: Sparsity) {
    piece.layout = Layout::Cheapest(match pattern {
        Sparsity::Block { height, width } => Some((height, width)),
        _ => None,
    });
    piece.keep(mask);
}

fn solve(solver: &dyn Solve, m: &mut Unpacked, stats: &Stats<'_>, ask: PruneAsk) -> Result<(), MethodError> {
    let piece = floats(m)?;
    let solved = solver.solve(&SolveAsk {
        w: piece.w.view(),
        stats,
        mask: piece.mask.as_ref(),
        prune: Some(ask),
        round: None,
    })?;
    take(piece, solved, ask.pattern)
}

/// Puts a solver's answer in a piece's place.
fn take(piece: &mut UnpackedPiece, solved: Solved, pattern: Sparsity) -> Result<(), MethodError> {
    let mask = solved.mask.ok_or_else(|| MethodError::new("the method pruned nothing"))?;
    finite(&solved.w)?;
    piece.w = solved.w;
    keep(piece, mask, pattern);
    Ok(())
}

/// The matrices of every FFN that is there whole, in their order, and all others.
fn ffns(work: Vec<Work<'_>>) -> (Vec<Vec<Work<'_>>>, Vec<Work<'_>>) {
    let mut found: BTreeMap<Option<u32>, Vec<Work<'_>>> = BTreeMap::new();
    let mut rest = Vec::new();
    for w in work {
        match w.place.role {
            Role::Gate | Role::Up | Role::Down => found.entry(w.place.expert).or_default().push(w),
            _ => rest.push(w),
        }
    }
    let whole = |of: &Vec<Work<'_>>| ffn_spec(&of[0]).is_some_and(|f| of.len() == if f.gated { 3 } else { 2 });
    let (mut all, parts): (Vec<_>, Vec<_>) = found.into_values().partition(whole);
    rest.extend(parts.into_iter().flatten());
    all.iter_mut().for_each(|of| of.sort_by_key(|w| w.place.role));
    (all, rest)
}

fn ffn_spec<'a>(w: &Work<'a>) -> Option<&'a FfnSpec> {
    w.spec.layers.get(w.place.layer? as usize)?.ffn.as_ref()
}

/// The matrices of an FFN: gate, where there is one, up and down.
fn solve_ffn(by: &dyn SolveFfn, of: &mut [Work<'_>], prune: PruneAsk) -> Result<(), MethodError> {
    let Some(act) = of.first().and_then(ffn_spec).map(|f| f.act) else {
        return Err(MethodError::new("the network has no FFN here"));
    };
    if act == Activation::SwigluOai {
        return Err(MethodError::new("an FFN of swiglu_oai, which cuts what it multiplies with, is not pruned whole"));
    }
    let biases: Vec<Vec<f32>> = of.iter().map(|w| w.bias.map_or_else(Vec::new, |b| b.to_mat().into_vec())).collect();
    let mut pieces = Vec::new();
    for w in of {
        pieces.push((floats(&mut w.matrix)?, &w.stats));
    }
    let matrices: Vec<FfnMatrix<'_>> = pieces
        .iter()
        .zip(&biases)
        .map(|((p, stats), bias)| {
            let ask = SolveAsk { w: p.w.view(), stats, mask: p.mask.as_ref(), prune: Some(prune), round: None };
            FfnMatrix { ask, bias }
        })
        .collect();
    let (gate, up, down) = match matrices[..] {
        [gate, up, down] => (Some(gate), up, down),
        [up, down] => (None, up, down),
        _ => return Err(MethodError::new(format!("an FFN of {} matrices", matrices.len()))),
    };
    let solved = by.solve(&FfnAsk { gate, up, down, act })?;
    pieces.into_iter().zip(solved).try_for_each(|((piece, _), solved)| take(piece, solved, prune.pattern))
}

impl Prune {
    /// Who prunes FFNs whole, if anybody.
    fn of_ffn(&self) -> Option<&dyn SolveFfn> {
        match &self.by {
            By::Score(_) => None,
            By::Solve(solver) => solver.of_ffn(),
        }
    }
}

impl Local for Prune {
    fn together(&self) -> bool {
        self.scope() == Scope::Layer || self.of_ffn().is_some()
    }

    fn needs(&self, place: &Place) -> Vec<Ask> {
        let also: &[Ask] = match &self.by {
            By::Score(score) => score.also_needs(),
            By::Solve(solver) => solver.also_needs(),
        };
        let mut asks = [self.card.needs, also].concat();
        if let (Some(by), Role::Gate | Role::Up) = (self.of_ffn(), place.role) {
            asks.push(Ask::InputRows(by.rows()));
        }
        asks
    }

    fn check(&self, (rows, cols): (usize, usize), earlier: &[Left]) -> Result<Left, MethodError> {
        wants_floats("pruning", earlier)?;
        if earlier.contains(&Left::Masked) && !self.card.can(Ability::FixedMask) {
            return Err(MethodError::new(format!("{} cannot keep the zeros of an earlier step", self.card.name)));
        }
        if self.of_ffn().is_some() && earlier.iter().any(|l| matches!(l, Left::Aside | Left::Mapped { .. })) {
            let what =
                "prunes an FFN for what it puts out, and cannot follow a step that maps inputs or sets weights aside";
            return Err(MethodError::new(format!("{} {what}", self.card.name)));
        }
        match self.ask.pattern {
            Sparsity::Nm { m, .. } if cols % m != 0 => {
                Err(MethodError::new(format!("{cols} columns do not divide into runs of {m}")))
            }
            Sparsity::Block { height, width } if rows % height != 0 || cols % width != 0 => Err(MethodError::new(
                format!("a {rows} x {cols} matrix does not divide into blocks of {height} x {width}"),
            )),
            _ => Ok(Left::Masked),
        }
    }

    fn foretell(&self, mut sample: Unpacked, seed: u64) -> Result<Unpacked, MethodError> {
        let piece = floats(&mut sample)?;
        let scores = chance(piece.w.rows(), piece.w.cols(), seed);
        let one = Scored { scores: &scores, before: piece.mask.as_ref(), sparsity: self.ask.sparsity };
        let mask = select(&[one], self.ask.pattern, Scope::Row).map_err(MethodError::new)?.remove(0);
        keep(piece, mask, self.ask.pattern);
        Ok(sample)
    }

    fn scratch_bytes(&self, shape: (usize, usize)) -> u64 {
        match self.by {
            By::Score(_) => 24 * shape.0 as u64 * shape.1 as u64,
            By::Solve(_) if self.card.needs.contains(&Ask::OutputGradientGram) => {
                // As much of the outputs as of the inputs, and f64 copies of the matrix.
                let (rows, cols) = (shape.0 as u64, shape.1 as u64);
                solver_bytes(shape) + 24 * rows * rows + 40 * rows * cols
            }
            By::Solve(_) => match self.of_ffn() {
                // Sums over activations beside those of the solver, and what the matrix puts out.
                Some(by) => 2 * solver_bytes(shape) + 4 * by.rows() as u64 * shape.0 as u64,
                None => solver_bytes(shape),
            },
        }
    }

    fn edit(&self, mut work: Vec<Work<'_>>) -> Result<Vec<Edit>, MethodError> {
        match &self.by {
            By::Solve(solver) => {
                let (mut whole, rest) = match solver.of_ffn() {
                    Some(_) => ffns(work),
                    None => (Vec::new(), work),
                };
                if let Some(by) = solver.of_ffn() {
                    for of in &mut whole {
                        let at = of.first().map_or_else(String::new, |w| w.place.to_string());
                        let named = |e: MethodError| MethodError::new(format!("the FFN of {at}: {}", e.what));
                        solve_ffn(by, of, self.ask).map_err(named)?;
                    }
                }
                let mut edits = one_by_one(rest, |w| solve(solver.as_ref(), &mut w.matrix, &w.stats, self.ask))?;
                edits.extend(one_by_one(whole.into_iter().flatten().collect(), |_| Ok(()))?);
                Ok(edits)
            }
            By::Score(score) => {
                let mut scored = Vec::new();
                for w in &mut work {
                    let piece = floats(&mut w.matrix)?;
                    let scores = score.score(piece.w.view(), &w.stats)?;
                    scored.push((piece, scores));
                }
                self.lowest(scored)?;
                one_by_one(work, |_| Ok(()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use lacuna_base::Gram;
    use lacuna_base::testkit::random;
    use lacuna_contract::Gathered;
    use lacuna_format::{Float, Stored, UnpackedTerm};
    use lacuna_spec::{Part, Spec};
    use serde_json::{Value, json};

    fn local(method: &str, keys: Value) -> Box<dyn Local> {
        let registry = crate::registry();
        let method = registry.method(method).expect("listed");
        let keys = keys.as_object().expect("a table").clone();
        match prune(&Making { method, keys: &keys, registry: &registry }).expect("made") {
            Step::Local(local) => local,
            other => panic!("{other:?}"),
        }
    }

    fn network(name: &str) -> Spec {
        lacuna_arch::from_config(&json!({
            "model_type": name, "vocab_size": 20, "hidden_size": 8, "intermediate_size": 22, "num_hidden_layers": 1,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16, "head_dim": 2,
            "num_local_experts": 3, "num_experts_per_tok": 2,
        }))
        .expect("a network")
    }

    /// What a step makes of those matrices of a block that `aimed` names, by place.
    fn run(local: &dyn Local, spec: &Spec, aimed: impl Fn(&Place) -> bool) -> HashMap<Place, Unpacked> {
        let places: Vec<Place> =
            spec.layer_places(0).into_iter().filter(|p| p.part == Part::Weight && aimed(p)).collect();
        let made = |(i, p): (usize, &Place)| {
            let (rows, cols) = spec.shape(p).expect("a shape");
            // One input for all that read the same, as the driver has it.
            let x = random(40, cols, cols as u64);
            let mut gram = Gram::new(cols);
            gram.add(x.view());
            let mut found = vec![(Ask::InputGram, Gathered::Gram(gram))];
            let rows_of = |a: &Ask| if let Ask::InputRows(n) = a { Some(*n) } else { None };
            found.extend(local.needs(p).iter().find_map(rows_of).map(|n| (Ask::InputRows(n), Gathered::Matrix(x))));
            (random(rows, cols, i as u64), found)
        };
        let given: Vec<(Mat, Vec<(Ask, Gathered)>)> = places.iter().enumerate().map(made).collect();
        let sources: Vec<Stored> =
            given.iter().map(|(w, _)| Unpacked::dense(w.clone()).pack(Float::F32).expect("packs")).collect();
        let work = places.iter().zip(&given).zip(&sources).map(|((place, (w, found)), source)| Work {
            place: *place,
            matrix: Unpacked::dense(w.clone()),
            source,
            stats: Stats { tokens: 40, found, ..Stats::default() },
            bias: None,
            spec,
        });
        let edits = local.edit(work.collect()).expect("edits");
        assert_eq!(edits.len(), places.len());
        let one = |e| if let Edit::Matrix(p, m) = e { (p, m) } else { panic!("a matrix") };
        edits.into_iter().map(one).collect()
    }

    #[test]
    fn an_ffn_that_is_there_whole_is_pruned_together_and_all_else_alone() {
        let (plain, joint) = (json!({ "sparsity": 0.5 }), json!({ "sparsity": 0.5, "iterations": 3 }));
        let (alone, whole) = (local("sparsegpt", plain), local("sparsellm", joint));
        assert!(!alone.together() && whole.together());
        type Aim = (&'static str, fn(&Place) -> bool, bool);
        let aims: [Aim; 4] = [
            ("llama", |p| p.role != Role::Router, true),
            ("llama", |p| p.role != Role::Gate, false),
            ("mixtral", |p| p.role != Role::Router, true),
            ("mixtral", |p| p.role != Role::Router && (p.role, p.expert) != (Role::Down, Some(1)), true),
        ];
        for (name, aimed, joint) in aims {
            let spec = network(name);
            let (alone, whole) = (run(alone.as_ref(), &spec, aimed), run(whole.as_ref(), &spec, aimed));
            let mut others = 0;
            for (p, m) in &whole {
                let w = m.to_mat();
                let UnpackedTerm::Piece(piece) = &m.main else { panic!("a piece") };
                let mask = piece.mask.as_ref().expect("a mask");
                assert_eq!(2 * mask.kept(), w.rows() * w.cols(), "{p}");
                let same = w == alone[p].to_mat();
                others += usize::from(!same);
                let ffn = matches!(p.role, Role::Gate | Role::Up | Role::Down);
                assert!(same || ffn && joint, "{name} {p}");
                assert!(same || p.expert != Some(1) || aimed(&Place { role: Role::Down, ..*p }), "{name} {p}");
            }
            assert_eq!(others > 0, joint, "{name}");
        }
    }

    #[test]
    fn rows_are_asked_of_what_an_ffn_reads_and_what_maps_inputs_goes_not_before() {
        let local = local("sparsellm", json!({ "rows": 77 }));
        let asks = |role| local.needs(&Place::layer(0, role));
        assert_eq!(asks(Role::Up), [Ask::InputGram, Ask::InputRows(77)]);
        assert_eq!((asks(Role::Q), asks(Role::Down)), (vec![Ask::InputGram], vec![Ask::InputGram]));
        for left in [Left::Aside, Left::Mapped { mixes: false }] {
            assert!(local.check((4, 8), &[left]).expect_err("refused").what.contains("sparsellm"));
        }
        assert_eq!(local.check((4, 8), &[Left::Masked]), Ok(Left::Masked));
    }
}
