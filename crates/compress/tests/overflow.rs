//! Weights that are no finite numbers, or that a form cannot say: what is saved decodes to finite numbers, or nothing
//! is saved.

use std::fs;
use std::path::{Path, PathBuf};

use lacuna_checkpoint::{Checkpoint, open};
use lacuna_compress::{CompressError, Options, Outcomes, Quiet, Recipe, compress};
use lacuna_format::Weights;
use lacuna_spec::{Place, Role};
use serde_json::json;

const UP: &str = "model.layers.0.mlp.up_proj.weight";
const NORM: &str = "model.norm.weight";

/// `llama` (f32) or `llama_bf16` in a directory of its own, with one value of one tensor replaced.
fn spoiled(dir: &Path, model: &str, tensor: &str, at: usize, value: f32) -> Checkpoint {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tiny").join(model);
    fs::create_dir_all(dir).unwrap();
    fs::copy(golden.join("config.json"), dir.join("config.json")).unwrap();
    let mut bytes = fs::read(golden.join("model.safetensors")).unwrap();
    let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + n]).unwrap();
    let from = 8 + n + header[tensor]["data_offsets"][0].as_u64().unwrap() as usize;
    match header[tensor]["dtype"].as_str().unwrap() {
        "F32" => bytes[from + 4 * at..][..4].copy_from_slice(&value.to_le_bytes()),
        "BF16" => bytes[from + 2 * at..][..2].copy_from_slice(&value.to_le_bytes()[2..]),
        other => panic!("{other}"),
    }
    fs::write(dir.join("model.safetensors"), bytes).unwrap();
    open(dir).unwrap()
}

fn run(source: &Checkpoint, text: &str, out: &Path) -> Result<Outcomes, CompressError> {
    let sets = ["calibration.samples=4".to_owned(), "calibration.seq_len=32".to_owned()];
    let recipe = Recipe::parse(text, &lacuna_methods::registry(), &sets).unwrap();
    let tokens: Vec<u32> = (0..200).map(|i| i * 7 % source.spec().vocab as u32).collect();
    let options = Options {
        out,
        overwrite: true,
        resume: false,
        scratch: None,
        max_ram: None,
        bos: None,
        imatrix: None,
        source: json!("tiny"),
    };
    compress(source, &tokens, &recipe, &options, &mut Quiet)
}

fn step(body: &str) -> String {
    format!("version = 1\n[[step]]\n{body}\n")
}

const RTN: &str = "method = \"rtn\"\ntargets = [\"ffn.*\"]\nbits = 4\ngroup = 16\n";

/// Whatever the weight and the recipe: an error that names the matrix and the number, or a model of finite numbers.
#[test]
fn no_recipe_saves_what_is_not_finite() {
    let home = tempfile::tempdir().unwrap();
    let recipes = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes");
    let mut names: Vec<PathBuf> = fs::read_dir(recipes).unwrap().map(|f| f.unwrap().path()).collect();
    names.sort();
    let mut texts: Vec<(String, String)> =
        names.iter().map(|p| (p.display().to_string(), fs::read_to_string(p).unwrap())).collect();
    for symmetric in [false, true] {
        let name = format!("f32 scales, symmetric: {symmetric}");
        texts.push((name, step(&format!("{RTN}scale = \"f32\"\nsymmetric = {symmetric}"))));
    }
    let mut saved = 0;
    for value in [1e5, 1e7, 1e30, f32::MAX, f32::NAN, f32::NEG_INFINITY] {
        let source = spoiled(&home.path().join("source"), "llama", UP, 37, value);
        for (name, text) in &texts {
            let out = home.path().join("out");
            match run(&source, text, &out) {
                Err(e) => {
                    let said = e.to_string();
                    // These models have no tokenizer that could lose tokens.
                    if said.contains("the vocabulary cannot change: no tokenizer") {
                        continue;
                    }
                    // Nor rows that are whole blocks.
                    if said.contains("are not whole blocks") {
                        continue;
                    }
                    // What a whole layer comes to is finite no more where a product of two weights is not.
                    let layer = value == f32::MAX && (said.contains("layer 0") || said.starts_with("layers.0:"));
                    assert!(said.contains("layers.0.ffn") || layer, "{value:e} by {name}: {said}");
                    assert!(!out.exists(), "{value:e} by {name}");
                }
                Ok(done) => {
                    assert!(value.is_finite(), "{value:e} by {name}");
                    let model = open(&done.path).unwrap();
                    for place in done.spec.places() {
                        let w = model.get(&place).unwrap().unwrap().to_mat();
                        assert!(w.data().iter().all(|x| x.is_finite()), "{value:e} by {name}: {place}");
                    }
                    saved += 1;
                    fs::remove_dir_all(&out).unwrap();
                }
            }
        }
    }
    assert!(saved > 10, "only {saved} of all were saved");
}

#[test]
fn a_source_that_is_not_finite_is_refused_and_the_old_model_stays() {
    let home = tempfile::tempdir().unwrap();
    let out = home.path().join("out");
    let good = open(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tiny/llama")).unwrap();
    run(&good, &step(RTN), &out).unwrap();
    let before = fs::read(out.join("model.safetensors")).unwrap();
    // A tensor that no step touches, and one that a step would.
    for (tensor, place, value) in [(NORM, "norm", f32::NAN), (UP, "layers.0.ffn.up", f32::INFINITY)] {
        let source = spoiled(&home.path().join("source"), "llama", tensor, 5, value);
        let said = run(&source, &step(RTN), &out).err().expect("refused").to_string();
        assert!(said.starts_with(place) && said.contains(&format!("column 5 is {value}")), "{said}");
        assert_eq!(fs::read(out.join("model.safetensors")).unwrap(), before);
    }
}

#[test]
fn a_scale_beyond_f16_is_refused_with_the_key_that_holds_it() {
    let home = tempfile::tempdir().unwrap();
    let source = spoiled(&home.path().join("source"), "llama", UP, 5, -3e6);
    let out = home.path().join("out");
    let said = run(&source, &step(RTN), &out).err().expect("refused").to_string();
    assert!(
        said.contains("layers.0.ffn.up") && said.contains("the scale 2") && said.contains("scale = \"f32\""),
        "{said}"
    );
    assert!(!out.exists());
    let done = run(&source, &step(&format!("{RTN}scale = \"f32\"")), &out).unwrap();
    let w = open(&done.path).unwrap().get(&Place::layer(0, Role::Up)).unwrap().unwrap().to_mat();
    assert!((w.data()[5] / -3e6 - 1.0).abs() < 0.05, "{}", w.data()[5]);
}

/// No recipe says in which floats a matrix is kept that was changed and not rounded: f16 where that holds it.
#[test]
fn values_beyond_f16_are_kept_in_wider_floats() {
    let home = tempfile::tempdir().unwrap();
    let prune = "method = \"magnitude\"\ntargets = [\"ffn.up\"]\nsparsity = 0.5";
    let outliers = "verb = \"outliers\"\nmethod = \"magnitude\"\ntargets = [\"ffn.up\"]\nfraction = 0.01";
    let place = Place::layer(0, Role::Up);
    for (model, text, codec) in
        [("llama", prune, "f32"), ("llama_bf16", prune, "bf16"), ("llama", outliers, "f32"), ("llama", prune, "f16")]
    {
        let value = if codec == "f16" { 1e4 } else { 1048576.0 };
        let source = spoiled(&home.path().join("source"), model, UP, 5, value);
        let out = home.path().join("out");
        let done = run(&source, &step(text), &out).unwrap_or_else(|e| panic!("{model}, {text}: {e}"));
        let stored = open(&done.path).unwrap().get(&place).unwrap().unwrap();
        assert_eq!(stored.to_mat().data()[5], value, "{model}, {text}");
        assert!(stored.codec_name().contains(codec), "{model}, {text}: {}", stored.codec_name());
        let said = done.notes.iter().any(|n| n.contains("layers.0.ffn.up") && n.contains("beyond f16"));
        assert_eq!(said, codec != "f16", "{:?}", done.notes);
    }
    // Where the recipe asks for f16, it is an error.
    let source = spoiled(&home.path().join("source"), "llama", UP, 5, 1e6);
    let said = run(&source, "version = 1\nrest = \"f16\"\n", &home.path().join("f16")).err().expect("refused");
    let said = said.to_string();
    assert!(said.contains("layers.0.ffn.up") && said.contains("1000000 is beyond f16"), "{said}");
    assert!(said.contains("rest = \"source\""), "{said}");
}
