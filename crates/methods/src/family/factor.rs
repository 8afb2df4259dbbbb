//! `factor`: two thin matrices instead of one, or beside what earlier steps left, for its error.
//!
//! A method that answers with ranks sees the singular values of all matrices of attentions and FFNs first; then those
//! that it gave a rank become thin and the others stay as they are.

use std::collections::BTreeMap;
use std::sync::Arc;

use lacuna_base::{Mat, Mat64, Rng, factor};
use lacuna_contract::{
    Ability, Ask, Card, Edit, Factor, Family, Finished, LayerWork, Left, Local, Made, Making, MethodError, ModelWide,
    Ranks, Site, Spectrum, Step, Walker, Work,
};
use lacuna_format::{Unpacked, UnpackedPiece, UnpackedTerm};
use lacuna_spec::{Part, Place, Role, Spec};
use serde::Deserialize;

use super::keys::{Fraction, Whole};
use super::{finite, one_by_one, wants_floats, wrong};
use crate::factor::svd::halves;
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
    Family { verb: "factor", keys: make::keys::<Keys>, make: thin }
}

struct Thin {
    keep: f64,
    rank: Option<usize>,
    of: Of,
    by: Box<dyn Factor>,
    card: Card,
}

fn thin(making: &Making<'_>) -> Result<Step, MethodError> {
    let (keys, made) = make::split::<Keys>(making)?;
    let by = match made {
        Made::Factor(by) => by,
        Made::Ranks(by) => return uneven(&keys, making, by.into()),
        other => return Err(wrong(making, &other)),
    };
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
        let product = product(a, b)?;
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

    fn scratch_bytes(&self, shape: (usize, usize)) -> u64 {
        self.by.scratch_bytes(shape)
    }

    fn edit(&self, work: Vec<Work<'_>>) -> Result<Vec<Edit>, MethodError> {
        one_by_one(work, |w| self.apply(w))
    }
}

fn product(a: Mat, b: Mat) -> Result<UnpackedTerm, MethodError> {
    finite(&a)?;
    finite(&b)?;
    Ok(UnpackedTerm::Product(Box::new((UnpackedPiece::dense(a), UnpackedPiece::dense(b)))))
}

/// Ranks that differ from matrix to matrix, found over the whole model.
#[derive(Clone)]
struct Uneven {
    keep: f64,
    by: Arc<dyn Ranks>,
}

fn uneven(keys: &Keys, making: &Making<'_>, by: Arc<dyn Ranks>) -> Result<Step, MethodError> {
    let name = making.method.card.name;
    if keys.rank.is_some() {
        return Err(MethodError::new(format!("{name} finds the ranks; give keep")));
    }
    if keys.of == Of::Error {
        return Err(MethodError::new(format!("{name} does not factor an error")));
    }
    Ok(Step::Model(Box::new(Uneven { keep: keys.keep.0, by })))
}

/// The matrices of a layer that may become thin.
fn candidates(spec: &Spec, layer: usize) -> Vec<Place> {
    let matrix =
        |p: &Place| p.part == Part::Weight && p.role.is_linear() && !p.role.is_shortcut() && p.role != Role::Router;
    spec.layer_places(layer).into_iter().filter(matrix).collect()
}

impl ModelWide for Uneven {
    fn needs(&self, _: &Spec, _: usize) -> Vec<(Site, Ask)> {
        Vec::new()
    }

    fn check(&self, _: &Spec) -> Result<(), MethodError> {
        Ok(())
    }

    fn begin(&self, _: &Spec) -> Result<Box<dyn Walker>, MethodError> {
        Ok(Box::new(Listen { step: self.clone(), spectra: Vec::new() }))
    }

    fn scratch_bytes(&self, spec: &Spec) -> u64 {
        // All matrices of a layer at once: two copies in f64, the shorter side's Gram matrix and what its eigenvectors
        // take; later the decompositions.
        let one = |p: &Place| spec.shape(p).map_or(0, |(m, n)| 64 * (m * n) as u64);
        (0..spec.layers.len()).map(|l| candidates(spec, l).iter().map(one).sum()).max().unwrap_or(0)
    }
}

/// The first walk: singular values.
struct Listen {
    step: Uneven,
    spectra: Vec<(Place, Spectrum)>,
}

/// The matrices at some places, in f64.
fn weights(work: &dyn LayerWork, places: Vec<Place>) -> Result<Vec<(Place, Mat64)>, MethodError> {
    let one = |p: Place| {
        let w = work.weight(&p)?;
        make::finite(w.view()).map_err(|e| MethodError::new(format!("{p}: {}", e.what)))?;
        Ok((p, Mat64::from_f32(w.view())))
    };
    places.into_iter().map(one).collect()
}

impl Walker for Listen {
    fn visit(&mut self, layer: usize, work: &dyn LayerWork) -> Result<Vec<Edit>, MethodError> {
        let all = weights(work, candidates(work.spec(), layer))?;
        self.spectra.extend(factor::side_by_side(&all, |(p, w)| {
            let values = factor::singular_values(w).map_err(|e| MethodError::new(format!("{p}: {e}")))?;
            Ok::<_, MethodError>((*p, Spectrum { shape: (w.rows(), w.cols()), values }))
        })?);
        Ok(Vec::new())
    }

    fn finish(self: Box<Self>, _: &dyn LayerWork) -> Result<Finished, MethodError> {
        let (places, spectra): (Vec<Place>, Vec<Spectrum>) = self.spectra.into_iter().unzip();
        let ranks = self.step.by.ranks(&spectra, self.step.keep)?;
        if ranks.len() != places.len() {
            return Err(MethodError::new(format!("{} ranks for {} matrices", ranks.len(), places.len())));
        }
        let note = told(&places, &spectra, &ranks);
        let all: Vec<(Place, Option<usize>)> = places.into_iter().zip(ranks).collect();
        let ranks = all.into_iter().filter_map(|(p, rank)| Some((p, rank?))).collect();
        Ok(Finished { edits: Vec::new(), note, again: Some(Box::new(Cut { ranks })) })
    }
}

/// Which became thin, kind by kind.
fn told(places: &[Place], spectra: &[Spectrum], ranks: &[Option<usize>]) -> String {
    let (mut held, mut whole) = (0, 0);
    let mut kinds: BTreeMap<Role, Vec<String>> = BTreeMap::new();
    for ((place, s), rank) in places.iter().zip(spectra).zip(ranks) {
        let (m, n) = s.shape;
        whole += m * n;
        held += rank.map_or(m * n, |r| r * (m + n));
        if let (Some(rank), Some(layer)) = (rank, place.layer) {
            let expert = place.expert.map_or_else(String::new, |e| format!(".{e}"));
            kinds.entry(place.role).or_default().push(format!("{layer}{expert} (rank {rank})"));
        }
    }
    let thin = ranks.iter().flatten().count();
    let kinds: Vec<String> =
        kinds.into_iter().map(|(role, layers)| format!("{} of layers {}", role.name(), layers.join(", "))).collect();
    format!(
        "{thin} of {} matrices became low-rank, {:.2}% of all parameters stay{}{}",
        places.len(),
        100.0 * held as f64 / whole.max(1) as f64,
        if thin > 0 { ": " } else { "" },
        kinds.join("; ")
    )
}

/// The second walk: those with a rank become thin.
struct Cut {
    ranks: BTreeMap<Place, usize>,
}

impl Walker for Cut {
    fn visit(&mut self, layer: usize, work: &dyn LayerWork) -> Result<Vec<Edit>, MethodError> {
        let mine = candidates(work.spec(), layer).into_iter().filter(|p| self.ranks.contains_key(p)).collect();
        factor::side_by_side(&weights(work, mine)?, |(p, w)| {
            let (a, b) = halves(w, self.ranks[p]).map_err(|e| MethodError::new(format!("{p}: {}", e.what)))?;
            Ok(Edit::Matrix(
                *p,
                Unpacked { main: product(a.to_f32(), b.to_f32())?, aside: Vec::new(), input: Vec::new() },
            ))
        })
    }

    fn finish(self: Box<Self>, _: &dyn LayerWork) -> Result<Finished, MethodError> {
        Ok(Finished::default())
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

    /// Two layers of square matrices in memory, some of low rank.
    struct Network {
        spec: Spec,
        weights: BTreeMap<Place, Mat>,
    }

    impl LayerWork for Network {
        fn spec(&self) -> &Spec {
            &self.spec
        }
        fn weight(&self, place: &Place) -> Result<Mat, MethodError> {
            Ok(self.weights[place].clone())
        }
        fn stats(&self, _: Site) -> lacuna_contract::Stats<'_> {
            lacuna_contract::Stats::default()
        }
        fn vocabulary(&self) -> Option<&lacuna_contract::Vocabulary> {
            None
        }
    }

    #[test]
    fn ranks_over_the_whole_model_cut_what_has_a_tail_and_leave_the_rest() {
        let config = serde_json::json!({
            "model_type": "llama", "vocab_size": 50, "hidden_size": 24, "intermediate_size": 40,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
            "max_position_embeddings": 16, "rms_norm_eps": 1e-5,
        });
        let spec = lacuna_arch::from_config(&config).expect("a network");
        let mut weights = BTreeMap::new();
        for (l, place) in (0..spec.layers.len()).flat_map(|l| candidates(&spec, l).into_iter().map(move |p| (l, p))) {
            let (m, n) = spec.shape(&place).expect("a shape");
            let full = lacuna_base::testkit::random(m, n, 7 + l as u64 + place.role as u64);
            let rank_one = Mat::from_fn(m, n, |r, c| full[(r, 0)] * full[(0, c)] + 1e-3 * full[(r, c)]);
            weights.insert(place, if place.role == Role::O { rank_one } else { full });
        }
        let network = Network { spec, weights };
        let registry = crate::registry();
        let keys = [("keep".to_owned(), serde_json::json!(0.9))].into_iter().collect();
        let making = Making { method: registry.method("welore").expect("listed"), keys: &keys, registry: &registry };
        let Ok(Step::Model(step)) = thin(&making) else { panic!("a step on the whole model") };
        let layers = network.spec.layers.len();
        let mut walker = step.begin(&network.spec).expect("begins");
        for l in 0..layers {
            assert!(walker.visit(l, &network).expect("looks").is_empty());
        }
        let finished = walker.finish(&network).expect("decides");
        assert!(finished.note.contains("attn.o of layers 0 (rank "), "{}", finished.note);
        let (mut held, mut whole, mut again) = (0, 0, finished.again.expect("a second walk"));
        for l in 0..layers {
            let edits = again.visit(l, &network).expect("cuts");
            for place in candidates(&network.spec, l) {
                let w = &network.weights[&place];
                whole += w.rows() * w.cols();
                let thin = edits.iter().find_map(|e| match e {
                    Edit::Matrix(p, m) if *p == place => Some(m),
                    _ => None,
                });
                assert_eq!(thin.is_some(), thin.is_some() && finished.note.contains(place.role.name()));
                held += match thin {
                    None => w.rows() * w.cols(),
                    Some(m) => m.pieces().map(|p| p.w.rows() * p.w.cols()).sum(),
                };
                if place.role == Role::O {
                    let near = thin.expect("a heavy tail").to_mat();
                    assert!(lacuna_base::testkit::max_abs_diff(near.view(), w.view()) < 0.05);
                }
            }
        }
        assert!(held as f64 <= 0.9 * whole as f64, "{held} of {whole}");
        for (key, value) in [("rank", serde_json::json!(3)), ("of", serde_json::json!("error"))] {
            let keys = [(key.to_owned(), value)].into_iter().collect();
            let refused = thin(&Making { keys: &keys, ..making }).expect_err("refused").what;
            assert!(refused.contains("welore"), "{refused}");
        }
    }
}
