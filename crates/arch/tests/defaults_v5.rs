//! What a config.json of the later architectures leaves out means what transformers 5 means by it, and their tensors
//! have its names and shapes: see `tests/golden/make_defaults_v5.py`.

use std::collections::BTreeMap;
use std::path::Path;

use lacuna_arch as arch;
use lacuna_spec::Spec;
use serde_json::{Map, Value, json};

fn golden() -> Map<String, Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/defaults_v5.json");
    let all: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let mut all = all.as_object().unwrap().clone();
    all.remove("made_with").unwrap();
    all
}

fn read(config: &Value) -> Spec {
    arch::from_config(config).unwrap_or_else(|e| panic!("{e}: {config}"))
}

/// What the golden file was made of.
fn bare(name: &str) -> Value {
    match name {
        "nemotron" => json!({"model_type": name, "num_key_value_heads": 8}),
        _ => json!({"model_type": name}),
    }
}

#[test]
fn each_key_at_its_default_is_as_good_as_absent() {
    let mut keys = 0;
    for (name, said) in &golden() {
        let (least, full) = (bare(name), &said["values"]);
        let spec = read(&least);
        assert_eq!(spec.layers.len() as u64, said["layers"], "{name}");
        assert_eq!(read(full), spec, "{name} with every default written");
        for key in full.as_object().unwrap().keys().filter(|k| least.get(k.as_str()).is_none()) {
            let mut less = full.clone();
            less.as_object_mut().unwrap().remove(key);
            assert_eq!(read(&less), spec, "{name} without {key}");
            let mut alone = least.clone();
            alone[key] = full[key].clone();
            assert_eq!(read(&alone), spec, "{name} with {key} alone");
            keys += 1;
        }
    }
    assert!(keys > 250, "{keys} keys");
}

#[test]
fn tensors_have_the_names_and_shapes_of_the_classes() {
    for (name, said) in &golden() {
        let spec = read(&bare(name));
        // What lies outside the blocks, and in the first one.
        let first = |name: &str| !(name.contains(".layers.") || name.contains(".h.")) || name.contains(".0.");
        let targets = arch::hf_targets(&spec).unwrap().into_iter();
        let ours: BTreeMap<String, Vec<usize>> =
            targets.filter(|t| first(&t.name)).map(|t| (t.name, t.shape)).collect();
        let mut theirs: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for (tensor, shape) in said["tensors"].as_object().unwrap() {
            // Constants of xIELU; a head that the files name otherwise than the class.
            if tensor.ends_with("act_fn.beta") || tensor.ends_with("act_fn.eps") {
                continue;
            }
            let neox = name == "gpt_neox" && tensor == "lm_head.weight";
            let tensor = if neox { "embed_out.weight" } else { tensor };
            theirs.insert(tensor.to_owned(), serde_json::from_value(shape.clone()).unwrap());
        }
        assert_eq!(ours, theirs, "{name}");
    }
}

#[test]
fn what_a_family_writes_says_all_that_it_reads() {
    for name in golden().keys() {
        let mut spec = read(&bare(name));
        // Of Gemma 4 the last layer sees everything.
        spec.layers.truncate(if name == "gemma4_text" { 6 } else { 8 });
        let written = arch::to_config(&spec).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(read(&written), spec, "{name}");
    }
}
