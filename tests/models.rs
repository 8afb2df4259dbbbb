//! The real models against independent programs: token ids, logits and losses of `tests/golden`.
//!
//! The cache is asked for each model, then its sources, once. Where neither has it, its tests are reported ignored,
//! with the reason; with `--require-models` that is a failure.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};

use lacuna_checkpoint::{Checkpoint, Tokenizer, open};
use lacuna_model::{Batch, ContiguousKv, Decoder, LoadOptions, NoTap};
use lacuna_pull::{ModelRef, Options, pull};
use libtest_mimic::{Arguments, Failed, Trial};
use serde_json::Value;

/// A pinned model with the logits and losses that an independent program computed for it.
const MODELS: [&str; 2] = ["smollm2-135m-instruct", "gemma-3-270m"];
const TEXTS: [&str; 3] = ["prose", "code", "dialogue"];

/// The model on which the gate is tried.
const JUDGED: &str = "smollm2-135m-instruct";

/// Furthest a logit may lie from its golden value.
const LOGIT_TOLERANCE: f32 = 1e-2;
/// Furthest the mean loss of a text may lie from its golden value, in nats.
const LOSS_TOLERANCE: f64 = 1e-3;

type Tested<T> = Result<T, Box<dyn Error>>;

fn main() -> ExitCode {
    let mut given: Vec<String> = std::env::args().collect();
    let before = given.len();
    given.retain(|a| a != "--require-models");
    let required = given.len() < before;
    let args = Arguments::from_iter(given);
    let trials = MODELS.iter().flat_map(|name| trials(name, required, args.list)).collect();
    libtest_mimic::run(&args, trials).exit_code()
}

/// The tests of one model, or as many that say why there is none.
fn trials(name: &'static str, required: bool, only_listed: bool) -> Vec<Trial> {
    let found = if only_listed { Err("not looked for".to_owned()) } else { find(name) };
    let names = std::iter::once(format!("{name}::tokens"))
        .chain(std::iter::once(format!("{name}::any_cut_of_a_prompt_gives_the_same_bits")))
        .chain((name == JUDGED).then(|| format!("{name}::the_gate_gives_its_known_answers")))
        .chain(TEXTS.iter().map(|text| format!("{name}::logits::{text}")));
    let path = match found {
        Ok(path) => path,
        Err(why) if required => {
            let failed = move |test| {
                let why = why.clone();
                Trial::test(test, move || Err(Failed::from(why)))
            };
            return names.map(failed).collect();
        }
        Err(why) => {
            return names
                .map(|test| Trial::test(test, || Ok(())).with_ignored_flag(true).with_kind(why.clone()))
                .collect();
        }
    };
    let model = Arc::new(Model { name, path, loaded: OnceLock::new() });
    names
        .map(|test| {
            let model = Arc::clone(&model);
            let what = test.clone();
            Trial::test(test, move || run(&model, &what).map_err(|e| Failed::from(e.to_string())))
        })
        .collect()
}

/// The model's file: from the cache, or fetched.
fn find(name: &str) -> Result<PathBuf, String> {
    let model = ModelRef::parse(name).map_err(|e| e.to_string())?;
    let cached = Options { offline: true, ..Options::default() };
    let found = pull(&model, &cached).or_else(|_| pull(&model, &Options::default()));
    found.map(|pulled| pulled.path).map_err(|e| e.to_string())
}

struct Model {
    name: &'static str,
    path: PathBuf,
    loaded: OnceLock<Result<Loaded, String>>,
}

struct Loaded {
    tokenizer: Tokenizer,
    decoder: Decoder,
}

impl Model {
    /// Loaded once for all its tests.
    fn loaded(&self) -> Tested<&Loaded> {
        let load = || -> Tested<Loaded> {
            let checkpoint: Checkpoint = open(&self.path)?;
            let metadata = checkpoint.metadata().ok_or("a pinned model is a GGUF file")?;
            let tokenizer = Tokenizer::from_gguf(metadata)?;
            let decoder = Decoder::load(&checkpoint, &LoadOptions::default())?;
            Ok(Loaded { tokenizer, decoder })
        };
        self.loaded.get_or_init(|| load().map_err(|e| e.to_string())).as_ref().map_err(|e| e.clone().into())
    }

    fn golden(&self, folder: &str) -> Tested<Value> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{folder}/{}.json", self.name));
        Ok(serde_json::from_slice(&std::fs::read(path)?)?)
    }
}

fn run(model: &Model, test: &str) -> Tested<()> {
    match test.rsplit("::").next() {
        Some("tokens") => tokens(model),
        Some("any_cut_of_a_prompt_gives_the_same_bits") => cuts(model),
        Some("the_gate_gives_its_known_answers") => gate(model),
        Some(text) => logits(model, text),
        None => Ok(()),
    }
}

/// Ids and texts as the model's own tokenizer gives them.
fn tokens(model: &Model) -> Tested<()> {
    let golden = model.golden("tokenizers")?;
    let tokenizer = &model.loaded()?.tokenizer;
    let cases = golden["cases"].as_array().ok_or("no cases")?;
    for (i, case) in cases.iter().enumerate() {
        let text = case["text"].as_str().ok_or("no text")?;
        let want: Vec<u32> = serde_json::from_value(case["ids"].clone())?;
        let got = tokenizer.encode(text, false)?;
        if got != want {
            return Err(format!("case {i}, {text:?}: ids {got:?}, golden {want:?}").into());
        }
        let decoded = tokenizer.decode_with_special(&got);
        if Some(decoded.as_str()) != case["decoded"].as_str() {
            return Err(format!("case {i}: decoded {decoded:?}, golden {}", case["decoded"]).into());
        }
    }
    Ok(())
}

/// Logits of `ids` row by row, handed to `see` with the position; the prompt comes in pieces of the given lengths, then
/// the rest.
fn forward(decoder: &Decoder, ids: &[u32], pieces: &[usize], mut see: impl FnMut(usize, &[f32])) -> Tested<()> {
    let mut kv = ContiguousKv::new(&decoder.spec, 1);
    let mut at = 0;
    for n in pieces.iter().copied().chain(std::iter::once(ids.len())) {
        let end = (at + n).min(ids.len());
        if end == at {
            continue;
        }
        let hidden = decoder.forward(&ids[at..end], &Batch::one(0, at..end), &mut kv, &mut NoTap)?;
        // A vocabulary of 262144 times all rows would be a large matrix: one row at a time.
        for r in 0..end - at {
            see(at + r, decoder.logits(hidden.view().rows_range(r, r + 1)).row(0));
        }
        at = end;
    }
    Ok(())
}

/// The five best, the logits at the golden indices, and the mean loss.
fn logits(model: &Model, text: &str) -> Tested<()> {
    let golden = model.golden("real")?;
    let indices: Vec<usize> = serde_json::from_value(golden["indices"].clone())?;
    let golden = &golden[text];
    let ids: Vec<u32> = serde_json::from_value(golden["ids"].clone())?;
    let want: Vec<Vec<f32>> = serde_json::from_value(golden["logits"].clone())?;
    let top_ids: Vec<Vec<usize>> = serde_json::from_value(golden["top5_ids"].clone())?;
    let top_logits: Vec<Vec<f32>> = serde_json::from_value(golden["top5_logits"].clone())?;
    let want_loss = golden["nll_mean"].as_f64().ok_or("no mean loss")?;

    let mut faults = Vec::new();
    let mut loss = 0.0;
    forward(&model.loaded()?.decoder, &ids, &[], |p, row| {
        if let Some(want) = want.get(p) {
            let pairs = indices.iter().zip(want).chain(top_ids[p].iter().zip(&top_logits[p]));
            for (&id, &want) in pairs.filter(|&(&id, &want)| (row[id] - want).abs() > LOGIT_TOLERANCE) {
                faults.push(format!("position {p}, token {id}: logit {}, golden {want}", row[id]));
            }
            let mut order: Vec<usize> = (0..row.len()).collect();
            order.select_nth_unstable_by(5, |&a, &b| row[b].total_cmp(&row[a]));
            order.truncate(5);
            order.sort_unstable_by(|&a, &b| row[b].total_cmp(&row[a]));
            if order != top_ids[p] {
                faults.push(format!("position {p}: best {order:?}, golden {:?}", top_ids[p]));
            }
        }
        if let Some(&next) = ids.get(p + 1) {
            let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f64 = row.iter().map(|&v| f64::from(v - most).exp()).sum();
            loss += sum.ln() - f64::from(row[next as usize] - most);
        }
    })?;
    let loss = loss / (ids.len() - 1) as f64;
    if (loss - want_loss).abs() > LOSS_TOLERANCE {
        faults.push(format!("mean loss {loss}, golden {want_loss}"));
    }
    if faults.is_empty() {
        Ok(())
    } else {
        Err(format!("{} faults: {}", faults.len(), faults[..faults.len().min(5)].join("; ")).into())
    }
}

/// A row's result does not depend on its company.
fn cuts(model: &Model) -> Tested<()> {
    let golden = model.golden("real")?;
    let ids: Vec<u32> = serde_json::from_value(golden["prose"]["ids"].clone())?;
    let ids = &ids[..ids.len().min(40)];
    let decoder = &model.loaded()?.decoder;
    let bits = |pieces: &[usize]| -> Tested<Vec<u32>> {
        let mut all = Vec::new();
        forward(decoder, ids, pieces, |_, row| all.extend(row.iter().step_by(97).map(|v| v.to_bits())))?;
        Ok(all)
    };
    let whole = bits(&[])?;
    for pieces in [&[1, 1, 1, 1][..], &[7, 16, 3], &[39]] {
        if bits(pieces)? != whole {
            return Err(format!("cut into {pieces:?} and the rest, the logits have other bits").into());
        }
    }
    Ok(())
}

/// Omissions known not to pay are refused with status 3, whatever their size.
fn gate(model: &Model) -> Tested<()> {
    let here = Path::new(env!("CARGO_TARGET_TMPDIR"));
    for recipe in ["f16", "magnitude-90", "rtn-2"] {
        let out = here.join(format!("known-{recipe}"));
        let done = std::process::Command::new(env!("CARGO_BIN_EXE_lacuna"))
            .args(["compress", &model.path.to_string_lossy(), "-r", recipe, "--overwrite", "--json", "--gate", "size"])
            .args(["--ctx", "256", "--windows", "2", "-o"])
            .args([&out, Path::new("--cache-dir"), &here.join("known-cache")])
            .output()?;
        let said = String::from_utf8_lossy(&done.stderr);
        if done.status.code() != Some(3) {
            return Err(format!("{recipe}: {}, not 3: {said}", done.status).into());
        }
        let report: Value = serde_json::from_slice(&done.stdout)?;
        if report["pays"] != false {
            return Err(format!("{recipe}: pays = {}", report["pays"]).into());
        }
        // What was refused is there all the same.
        open(&out)?;
        std::fs::remove_dir_all(&out)?;
    }
    Ok(())
}
