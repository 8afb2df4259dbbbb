//! The baselines: plain rounding of the same source to 8, 6, 5, 4 and 3 bits, f16, the source as it came, and a table
//! of word frequencies; for a result of 3 bits or fewer, plain rounding to as many, too, with the embedding and the head
//! at 8 bits and at the result's own: leaving something out there alone is no merit of a method.
//!
//! Rounded files and losses are made once and kept in a cache, for the source's files as they are and the program as it
//! is: of another revision nothing is taken, since its rounding, its kernels or its evaluation may be others.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use lacuna_base::unfinished;
use lacuna_checkpoint::{Checkpoint, OpenError};
use lacuna_compress::{CompressError, Options, Progress, Recipe, compress, fingerprint, revision};
use lacuna_contract::Registry;
use lacuna_eval::{Eval, EvalError};
use lacuna_format::{Weights, WeightsError};
use lacuna_spec::{Part, Role};
use serde_json::{Value, json};

use crate::gate::Measured;
use crate::shelf::Set;

/// A baseline that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum BaselineError {
    /// Making it failed.
    #[error("baseline {name}: {source}")]
    Make {
        /// Which.
        name: String,
        /// Why.
        source: CompressError,
    },
    /// What was made cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A tensor cannot be had.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// It cannot be evaluated.
    #[error(transparent)]
    Eval(#[from] EvalError),
    /// The cache cannot be written.
    #[error("{path}: {source}")]
    Cache {
        /// The file.
        path: String,
        /// The system's reason.
        source: std::io::Error,
    },
}

/// A measured baseline, and where its file lies if it has one to be timed.
pub struct Baseline {
    /// Its numbers.
    pub measured: Measured,
    /// Its model.
    pub path: Option<PathBuf>,
}

/// All baselines of a result. Their files stay in the cache as long as this does.
pub struct Baselines {
    /// One by one.
    pub all: Vec<Baseline>,
    /// Those that this source does not have, and why, a sentence each: its weights are beyond what they can say.
    pub left_out: Vec<String>,
    _set: Set,
}

/// Where and on what baselines are measured.
pub struct Bench<'a> {
    /// The model that is compressed.
    pub source: &'a Checkpoint,
    /// Every method there is.
    pub registry: &'a Registry,
    /// Where baselines are kept.
    pub cache: &'a Path,
    /// Held-out tokens.
    pub held_out: &'a [u32],
    /// Calibration tokens, for the word frequencies alone.
    pub calibration: &'a [u32],
    /// How to judge.
    pub eval: &'a Eval<'a>,
    /// Ceiling of memory.
    pub max_ram: Option<u64>,
    /// Bits of a result that rounds to few.
    pub own: Option<OwnBits>,
}

/// The name of the baseline that is the source itself.
pub const SOURCE: &str = "source as it came";

/// The name of the baseline that is no model: [`frequencies`].
pub const TOKEN_FREQUENCIES: &str = "token frequencies";
/// Bits of the rounded baselines.
const BITS: [u8; 5] = [8, 6, 5, 4, 3];

/// Bits of a result that rounds to few: the baselines that it has beside the usual ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OwnBits {
    /// Bits of a code, 2 or 3, of plain rounding that takes about as much for the matrices of the blocks.
    pub body: u8,
    /// The same, 2 to 8, for the embedding and the head.
    pub ends: u8,
}

impl OwnBits {
    /// Those of a result; `None` where its blocks take more than plain rounding to 3 bits does.
    pub fn of(weights: &dyn Weights) -> Result<Option<OwnBits>, WeightsError> {
        let (mut body, mut ends) = ((0u64, 0u64), (0u64, 0u64));
        for p in weights.spec().places() {
            let end = matches!(p.role, Role::Embed | Role::LayerInputs | Role::Head);
            if p.part != Part::Weight || !(end || p.role.is_linear()) {
                continue;
            }
            if let Some(s) = weights.get(&p)? {
                let sum = if end { &mut ends } else { &mut body };
                *sum = (sum.0 + s.bytes(), sum.1 + s.rows as u64 * s.cols as u64);
            }
            weights.release(&p);
        }
        // Groups of 32 share a scale of 16 bits.
        let code = |(bytes, n): (u64, u64)| 8.0 * bytes as f64 / n.max(1) as f64 - 0.5;
        let (body, ends) = (code(body), code(ends));
        let whole = |bits: f64, most: f64| bits.round().clamp(2.0, most) as u8;
        Ok((body < 3.5).then(|| OwnBits { body: whole(body, 3.0), ends: whole(ends, 8.0) }))
    }

    /// Baselines by name and recipe: plain rounding to as many bits, with the ends at 8 and at the result's own.
    fn recipes(self) -> Vec<(String, String)> {
        let mut out = Vec::new();
        if !BITS.contains(&self.body) {
            out.push((format!("int{} g32", self.body), recipe(self.body, 8)));
        }
        if self.ends != 8 {
            out.push((format!("int{} g32 ends int{}", self.body, self.ends), recipe(self.body, self.ends)));
        }
        out
    }
}

fn recipe(bits: u8, ends: u8) -> String {
    let step = |name: &str, targets: &str, bits: u8| {
        format!(
            "[[step]]\nname = \"{name}\"\nmethod = \"rtn\"\ntargets = [{targets}]\nbits = {bits}\ngroup = \
             32\nsymmetric = true\nscale = \"f16\"\n"
        )
    };
    format!(
        "version = 1\nrest = \"source\"\n{}{}",
        step("body", "\"attn.*\", \"mixer.*\", \"ffn.*\"", bits),
        step("ends", "\"embed\", \"head\"", ends)
    )
}

/// Bytes and held-out loss of a model.
pub fn measure(
    name: &str,
    weights: &dyn Weights,
    held_out: &[u32],
    eval: &Eval<'_>,
) -> Result<Measured, BaselineError> {
    let (loss, ppl) = match eval.judge(held_out, weights) {
        Ok(judged) => (judged.nll, judged.ppl),
        // A form that cannot hold the source's numbers is a baseline that nothing has to beat.
        Err(e) if e.not_finite => (f64::INFINITY, f64::INFINITY),
        Err(e) => return Err(e.into()),
    };
    Ok(Measured { name: name.into(), bytes: bytes(weights)?, loss, nats_a_byte: None, ppl, kl: None, speed: None })
}

/// Bytes of every tensor as stored.
fn bytes(weights: &dyn Weights) -> Result<u64, WeightsError> {
    let mut sum = 0;
    for p in weights.spec().places() {
        if let Some(s) = weights.get(&p)? {
            sum += s.bytes();
        }
        weights.release(&p);
    }
    Ok(sum)
}

/// The loss of a table of token frequencies of the calibration text (each count plus one), f16: what a model that reads
/// nothing of the context reaches. A compressed model that is no better is worth no more than its two bytes a word.
pub fn frequencies(calibration: &[u32], held_out: &[u32], vocab: usize) -> Measured {
    let mut counts: HashMap<u32, u64> = HashMap::new();
    for t in calibration {
        *counts.entry(*t).or_default() += 1;
    }
    let all = (calibration.len() + vocab) as f64;
    let nats = |t: &u32| -((counts.get(t).copied().unwrap_or(0) + 1) as f64 / all).ln();
    let loss = held_out.iter().map(nats).sum::<f64>() / held_out.len().max(1) as f64;
    let (name, bytes) = (TOKEN_FREQUENCIES.into(), 2 * vocab as u64);
    Measured { name, bytes, loss, nats_a_byte: None, ppl: loss.exp(), kl: None, speed: None }
}

/// Makes (or finds) and measures every baseline.
pub fn baselines(bench: &Bench<'_>, progress: &mut dyn Progress) -> Result<Baselines, BaselineError> {
    let io = |source| BaselineError::Cache { path: bench.cache.join("baselines").display().to_string(), source };
    let set = Set::open(bench.cache, &set_key(bench.source, revision())).map_err(io)?;
    let made = set.make().map_err(io)?;
    let (dir, key) = (set.dir().to_owned(), text_key(bench));
    let (mut out, mut left_out) = (Vec::new(), Vec::new());
    let mut recipes: Vec<(String, String)> = BITS.iter().map(|b| (format!("int{b} g32"), recipe(*b, 8))).collect();
    recipes.extend(bench.own.into_iter().flat_map(OwnBits::recipes));
    recipes.push(("f16".into(), "version = 1\nrest = \"f16\"\n".into()));
    for (name, text) in recipes {
        let path = dir.join(name.replace(' ', "-"));
        if !path.join("config.json").is_file() {
            let fail = |source| BaselineError::Make { name: name.clone(), source };
            let recipe = Recipe::parse(&text, bench.registry, &[]).map_err(|e| fail(e.into()))?;
            let options = Options {
                out: &path,
                overwrite: true,
                resume: false,
                scratch: None,
                max_ram: bench.max_ram,
                bos: None,
                imatrix: None,
                source: json!("baseline"),
            };
            progress.phase(&format!("baseline {name}"), 1);
            // Half a baseline is of no use to anybody: it is made anew, and fast.
            let _partial = unfinished::Temporary::new(unfinished::beside(&path, "partial"));
            match compress(bench.source, &[], &recipe, &options, progress) {
                Err(e @ CompressError::Method { .. }) => {
                    left_out.push(format!("there is no baseline {name}: {e}"));
                    continue;
                }
                done => drop(done.map_err(fail)?),
            }
        }
        let model = lacuna_checkpoint::open(&path)?;
        let measured = cached(&dir, &name, &key, progress, || measure(&name, &model, bench.held_out, bench.eval))?;
        out.push(Baseline { measured, path: Some(path) });
    }
    let name = SOURCE;
    let measured = cached(&dir, name, &key, progress, || measure(name, bench.source, bench.held_out, bench.eval))?;
    out.push(Baseline { measured, path: Some(bench.source.path().to_owned()) });
    let windows = lacuna_eval::cut(bench.held_out, bench.eval.ctx, bench.eval.windows, bench.eval.bos)?;
    let judged: Vec<u32> = windows.into_iter().flat_map(|w| w.into_iter().skip(1)).collect();
    out.push(Baseline { measured: frequencies(bench.calibration, &judged, bench.source.spec().vocab), path: None });
    drop(made);
    Ok(Baselines { all: out, left_out, _set: set })
}

/// What a set of baselines is known by.
fn set_key(source: &Checkpoint, revision: &str) -> String {
    let (mut source, revision) = (fingerprint(source), &revision[..revision.len().min(16)]);
    source.truncate(16);
    source + "-" + revision
}

fn text_key(bench: &Bench<'_>) -> String {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut h = DefaultHasher::new();
    bench.held_out.hash(&mut h);
    (bench.eval.ctx, bench.eval.windows, bench.eval.bos).hash(&mut h);
    format!("{:016x}", h.finish())
}

/// A measurement from the cache, or made and kept.
fn cached(
    dir: &Path,
    name: &str,
    key: &str,
    progress: &mut dyn Progress,
    make: impl FnOnce() -> Result<Measured, BaselineError>,
) -> Result<Measured, BaselineError> {
    let path = dir.join(format!("{}.{key}.json", name.replace(' ', "-")));
    if let Ok(text) = std::fs::read(&path)
        && let Ok(m) = serde_json::from_slice::<Measured>(&text)
    {
        return Ok(m);
    }
    progress.phase(&format!("judging {name}"), 1);
    let m = make()?;
    progress.step(1, name);
    let io = |source| BaselineError::Cache { path: path.display().to_string(), source };
    let text = serde_json::to_value(&m).unwrap_or(Value::Null).to_string();
    unfinished::write(&path, text.as_bytes()).map_err(io)?;
    Ok(m)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frequencies_of_a_known_text() {
        let m = frequencies(&[0, 0, 1], &[0, 2], 4);
        let want = -((3.0f64 / 7.0).ln() + (1.0f64 / 7.0).ln()) / 2.0;
        assert!((m.loss - want).abs() < 1e-12 && m.bytes == 8);
    }

    #[test]
    fn few_bits_have_baselines_of_their_own() {
        let names = |body, ends| OwnBits { body, ends }.recipes().into_iter().map(|r| r.0).collect::<Vec<_>>();
        assert_eq!(names(2, 6), ["int2 g32", "int2 g32 ends int6"]);
        assert_eq!(names(3, 4), ["int3 g32 ends int4"]);
        assert!(names(3, 8).is_empty());
        let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tiny/llama");
        let model = lacuna_checkpoint::open(&tiny).unwrap();
        assert_eq!(OwnBits::of(&model).unwrap(), None, "floats");
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("two");
        let registry = lacuna_methods::registry();
        let text = recipe(2, 4);
        let recipe = Recipe::parse(&text, &registry, &[]).unwrap();
        let options = Options {
            out: &out,
            overwrite: false,
            resume: false,
            scratch: None,
            max_ram: None,
            bos: None,
            imatrix: None,
            source: json!(null),
        };
        compress(&model, &[], &recipe, &options, &mut lacuna_compress::Quiet).unwrap();
        let two = lacuna_checkpoint::open(&out).unwrap();
        assert_eq!(OwnBits::of(&two).unwrap(), Some(OwnBits { body: 2, ends: 4 }));
    }

    #[test]
    fn another_source_and_another_revision_have_a_set_of_their_own() {
        let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tiny/llama");
        let dir = tempfile::tempdir().unwrap();
        for file in ["config.json", "model.safetensors"] {
            std::fs::copy(tiny.join(file), dir.path().join(file)).unwrap();
        }
        let key = |revision: &str| set_key(&lacuna_checkpoint::open(dir.path()).unwrap(), revision);
        let one = key(&"0123456789abcdef".repeat(4));
        assert_eq!(one, key(&"0123456789abcdef".repeat(4)));
        assert_ne!(one, key(&"f123456789abcdef".repeat(4)), "another program");
        let weights = std::fs::File::options().write(true).open(dir.path().join("model.safetensors")).unwrap();
        weights.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        assert_ne!(one, key(&"0123456789abcdef".repeat(4)), "other weights");
    }

    #[test]
    fn baseline_recipes_state_every_matrix() {
        for b in BITS {
            let t: toml::Table = recipe(b, 8).parse().unwrap();
            assert_eq!(t["step"].as_array().unwrap().len(), 2);
        }
    }
}
