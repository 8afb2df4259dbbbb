//! Every tiny checkpoint opens, every place has its tensor, and config.json goes there and back.

use std::path::{Path, PathBuf};

use lacuna_arch as arch;
use lacuna_checkpoint::{Checkpoint, Kind, open};
use lacuna_format::Weights;
use lacuna_spec::{Place, Role, RopeScaling};
use serde_json::{Value, json};

fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tiny")
}

fn all() -> Vec<PathBuf> {
    let mut dirs: Vec<_> = std::fs::read_dir(tiny()).unwrap().map(|e| e.unwrap().path()).collect();
    dirs.retain(|d| d.join("config.json").is_file());
    dirs.sort();
    assert!(dirs.len() >= 20, "{dirs:?}");
    dirs
}

fn config(dir: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap()
}

fn dense(c: &Checkpoint, place: Place) -> Vec<f32> {
    let stored = c.get(&place).unwrap().unwrap_or_else(|| panic!("no {place}"));
    stored.to_mat().into_vec()
}

#[test]
fn every_place_has_its_tensor_and_every_tensor_its_place() {
    for dir in all() {
        let c = open(&dir).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(c.kind(), Kind::HuggingFace);
        let places = c.spec().places();
        for place in &places {
            let stored = c.get(place).unwrap().unwrap_or_else(|| panic!("{}: no {place}", dir.display()));
            assert_eq!(Some((stored.rows, stored.cols)), c.spec().shape(place), "{place}");
            stored.check().unwrap();
            c.release(place);
            assert_eq!(c.get(place).unwrap().unwrap(), stored, "{place} after its pages were let go");
        }
        assert!(c.unused().is_empty(), "{}: {:?}", dir.display(), c.unused());
        // Constants that xIELU's module keeps beside what it learned.
        let learned = |n: &str| !n.ends_with("act_fn.beta") && !n.ends_with("act_fn.eps");
        let tensors = c.tensors().filter(|t| learned(&t.name));
        let parameters: usize = tensors.map(|t| t.shape.iter().product::<usize>()).sum();
        assert_eq!(c.spec().parameters(), parameters as u64, "{}", dir.display());
        assert!(c.source_bytes() > 0);
    }
}

#[test]
fn configurations_go_there_and_back() {
    for dir in all() {
        let spec = arch::from_config(&config(&dir)).unwrap();
        let written = arch::to_config(&spec).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
        assert_eq!(arch::from_config(&written).unwrap(), spec, "{}", dir.display());
    }
}

/// A family that nobody knows: the nearest one is named, and whether its tensors are there.
#[test]
fn an_unknown_family_is_told_what_it_could_be_read_as() {
    let dir = tempfile::tempdir().unwrap();
    let said = |name: &str, change: &dyn Fn(&mut Value)| {
        let from = tiny().join(name);
        std::fs::copy(from.join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
        let mut config = config(&from);
        change(&mut config);
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        open(dir.path()).map(|_| ()).unwrap_err().to_string()
    };
    let e = said("qwen3", &|c| c["model_type"] = json!("qwen3_omni"));
    assert!(e.contains("nearest known one is \"qwen3\"") && e.contains("--as qwen3 would read it: all"), "{e}");
    let like = lacuna_checkpoint::open_like(dir.path(), "qwen3").unwrap();
    assert_eq!(like.spec(), open(tiny().join("qwen3")).unwrap().spec());
    assert!(like.remarks().iter().any(|r| r.contains("qwen3_omni")), "{:?}", like.remarks());
    // Its norms of heads would be left over, or one is looked for that is not there.
    let e = lacuna_checkpoint::open_like(dir.path(), "llama").map(|_| ()).unwrap_err().to_string();
    assert!(e.contains("_norm.weight unused"), "{e}");
    // Where the nearest name does not fit, another may.
    let e = said("llama", &|c| c["model_type"] = json!("olmo9"));
    assert!(e.contains("nearest known one is \"olmo\"") && e.contains("--as llama would read it: all"), "{e}");
    assert!(e.contains("(known are llama, "), "{e}");
    let e = said("llama", &|c| {
        c["model_type"] = json!("olmo9");
        c["vocab_size"] = json!(97);
    });
    assert!(e.contains("--as olmo would not fit") && e.contains("[96, 32], but embed is [97, 32]"), "{e}");
    let e = lacuna_checkpoint::open_like(dir.path(), "nobody").map(|_| ()).unwrap_err().to_string();
    assert!(e.contains("--as nobody") && e.contains("the nearest known one is"), "{e}");
}

#[test]
fn fused_and_transposed_matrices_come_apart() {
    let c = open(tiny().join("gpt2")).unwrap();
    let file = std::fs::read(tiny().join("gpt2/model.safetensors")).unwrap();
    let st = safetensors::SafeTensors::deserialize(&file).unwrap();
    let floats = |name: &str| -> Vec<f32> {
        let data = st.tensor(name).unwrap().data();
        data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    };
    let fused = floats("transformer.h.1.attn.c_attn.weight");
    let bias = floats("transformer.h.1.attn.c_attn.bias");
    for (i, role) in [Role::Q, Role::K, Role::V].into_iter().enumerate() {
        let m = dense(&c, Place::layer(1, role));
        let b = dense(&c, Place::layer(1, role).bias());
        for r in 0..32 {
            assert_eq!(b[r], bias[32 * i + r]);
            for col in 0..32 {
                assert_eq!(m[r * 32 + col], fused[col * 96 + 32 * i + r]);
            }
        }
    }
    let c = open(tiny().join("phi3")).unwrap();
    let file = std::fs::read(tiny().join("phi3/model.safetensors")).unwrap();
    let st = safetensors::SafeTensors::deserialize(&file).unwrap();
    let data = st.tensor("model.layers.0.self_attn.qkv_proj.weight").unwrap().data();
    let fused: Vec<f32> = data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    assert_eq!(dense(&c, Place::layer(0, Role::K)), fused[32 * 32..48 * 32]);
    assert_eq!(dense(&c, Place::layer(0, Role::V)), fused[48 * 32..]);
}

#[test]
fn shards_and_dtypes_hold_the_same_model() {
    let whole = open(tiny().join("llama")).unwrap();
    let shards = open(tiny().join("llama_sharded")).unwrap();
    for place in whole.spec().places() {
        assert_eq!(dense(&whole, place), dense(&shards, place), "{place}");
    }
    assert!(open(tiny().join("llama/model.safetensors")).is_ok());
}

#[test]
fn windows_and_rope_by_layer() {
    let spec = |name: &str| arch::from_config(&config(&tiny().join(name))).unwrap();
    let windows =
        |s: &lacuna_spec::Spec| -> Vec<_> { s.layers.iter().map(|l| l.attn.as_ref().unwrap().window).collect() };
    assert_eq!(windows(&spec("mistral")), [Some(10); 2]);
    assert_eq!(windows(&spec("gemma2")), [Some(10), None]);
    assert_eq!(windows(&spec("gemma3")), [Some(10), None, Some(10)]);
    let g = spec("gemma3_linear");
    assert_eq!(windows(&g), [Some(10), None, Some(10)]);
    let rope = |l: usize| g.layers[l].attn.as_ref().unwrap().rope.clone().unwrap();
    assert_eq!((rope(0).theta, rope(0).scaling), (100.0, RopeScaling::Default));
    assert_eq!((rope(1).theta, rope(1).scaling), (20000.0, RopeScaling::Linear { factor: 8.0 }));
    assert_eq!(g.embed_scale, 32f32.sqrt());
    assert_eq!(g.norm.offset, 1.0);
}

#[test]
fn what_transformers_5_writes_is_the_same_network() {
    let mut read = 0;
    for dir in all() {
        let Ok(text) = std::fs::read(dir.join("config.v5.json")) else { continue };
        let new = arch::from_config(&serde_json::from_slice(&text).unwrap())
            .unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
        assert_eq!(new, arch::from_config(&config(&dir)).unwrap(), "{}", dir.display());
        read += 1;
    }
    assert!(read >= 20, "{read} of them");
}

/// transformers 5 can save all experts of a layer in two tensors: gate above up, and down.
#[test]
fn stacked_experts_come_apart() {
    for (name, width) in [("mixtral_stacked", 8), ("qwen3_moe_stacked", 12)] {
        let dir = tiny().join(name);
        let c = open(&dir).unwrap();
        let file = std::fs::read(dir.join("model.safetensors")).unwrap();
        let st = safetensors::SafeTensors::deserialize(&file).unwrap();
        let floats = |name: &str| -> Vec<f32> {
            let data = st.tensor(name).unwrap().data();
            data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
        };
        let (both, down) =
            (floats("model.layers.1.mlp.experts.gate_up_proj"), floats("model.layers.1.mlp.experts.down_proj"));
        let one = width * 16;
        for e in 0..4 {
            let of = |role| dense(&c, Place::expert(1, role, e));
            assert_eq!(of(Role::Gate), both[2 * e * one..(2 * e + 1) * one], "{name} {e}");
            assert_eq!(of(Role::Up), both[(2 * e + 1) * one..(2 * e + 2) * one], "{name} {e}");
            assert_eq!(of(Role::Down), down[e * one..(e + 1) * one], "{name} {e}");
        }
        // An expert too many, or too few, for the file.
        for count in [3, 5] {
            let mut said = config(&dir);
            said["num_local_experts"] = json!(count);
            let other = tempfile::tempdir().unwrap();
            std::fs::write(other.path().join("config.json"), said.to_string()).unwrap();
            std::fs::copy(dir.join("model.safetensors"), other.path().join("model.safetensors")).unwrap();
            assert!(open(other.path()).unwrap_err().to_string().contains("model.layers.0.mlp"), "{name} {count}");
        }
    }
}

/// transformers 5 writes one `rope_parameters` where 4 wrote two keys.
#[test]
fn both_generations_of_configurations_mean_the_same() {
    for (name, new) in [
        ("llama", json!({"rope_type": "default", "rope_theta": 500.0})),
        ("llama_rope_linear", json!({"rope_type": "linear", "rope_theta": 500.0, "factor": 2.5})),
        (
            "llama_rope_longrope",
            json!({"rope_type": "longrope", "rope_theta": 500.0, "short_factor": [1.0, 1.1, 1.3, 1.6],
                   "long_factor": [1.0, 2.0, 3.5, 4.0], "factor": 4.0, "original_max_position_embeddings": 32}),
        ),
        (
            "gemma3_linear",
            json!({"full_attention": {"rope_type": "linear", "rope_theta": 20000.0, "factor": 8.0},
                   "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}),
        ),
    ] {
        let old = config(&tiny().join(name));
        let mut changed = old.clone();
        let o = changed.as_object_mut().unwrap();
        for key in ["rope_theta", "rope_scaling", "rope_local_base_freq", "original_max_position_embeddings"] {
            o.remove(key);
        }
        o.insert("rope_parameters".into(), new);
        assert_eq!(arch::from_config(&changed).unwrap(), arch::from_config(&old).unwrap(), "{name}");
    }
}

#[test]
fn what_the_decoder_would_get_wrong_is_refused_by_name() {
    let refuse = |name: &str, key: &str, value: Value, words: &[&str]| {
        let mut c = config(&tiny().join(name));
        c[key] = value;
        let e = arch::from_config(&c).unwrap_err().what;
        assert!(words.iter().all(|w| e.contains(w)), "{e}");
    };
    refuse("llama", "model_type", json!("mamba"), &["\"mamba\"", "nearest known one is \"mamba2\""]);
    refuse("llama", "hidden_act", json!("xielu"), &["hidden_act", "xielu"]);
    refuse("llama", "hidden_size", json!("32"), &["hidden_size is \"32\""]);
    refuse("llama", "num_key_value_heads", json!(3), &["4 query heads", "3 groups"]);
    refuse("llama", "rope_scaling", json!({"rope_type": "dynamic", "factor": 2.0}), &["dynamic"]);
    refuse("llama", "rope_scaling", json!({"rope_type": "linear"}), &["factor is missing"]);
    refuse("llama", "rope_scaling", json!({"rope_type": "default", "mrope_section": [1]}), &["mrope_section"]);
    refuse("llama", "num_hidden_layers", json!(u64::MAX), &["num_hidden_layers"]);
    refuse("opt", "do_layer_norm_before", json!(false), &["do_layer_norm_before is false"]);
    refuse("opt", "word_embed_proj_dim", json!(16), &["word_embed_proj_dim"]);
    refuse("gemma3", "use_bidirectional_attention", json!(true), &["use_bidirectional_attention"]);
    refuse("gemma3", "layer_types", json!(vec!["chunked_attention"; 3]), &["chunked_attention"]);
    refuse("gemma3", "layer_types", json!(vec!["full_attention"; 2]), &["2 entries for 3 layers"]);
    refuse("mixtral", "num_local_experts", json!(1u64 << 40), &["experts"]);
    refuse("llama_rope_longrope", "head_dim", json!(16), &["4 factors for 16 channels"]);
}

#[test]
fn a_network_that_a_configuration_cannot_say_is_refused_by_layer() {
    let mut spec = arch::from_config(&config(&tiny().join("llama"))).unwrap();
    spec.layers[1].ffn.as_mut().unwrap().width = 40;
    let e = arch::to_config(&spec).unwrap_err().what;
    assert!(e.contains("layer 1: ffn.width is 40, the file would say 48"), "{e}");
    spec.layers[1].ffn = None;
    assert!(arch::to_config(&spec).unwrap_err().what.contains("layer 1"));
}

/// transformers 5 runs a head that is stored beside the embedding and differs, whatever the configuration says, and
/// either of two that are one.
#[test]
fn a_head_that_is_said_to_be_the_embedding() {
    let copy = |head: Option<&str>| {
        let dir = tempfile::tempdir().unwrap();
        let mut c = config(&tiny().join("llama"));
        c["tie_word_embeddings"] = json!(true);
        std::fs::write(dir.path().join("config.json"), c.to_string()).unwrap();
        let file = std::fs::read(tiny().join("llama/model.safetensors")).unwrap();
        let st = safetensors::SafeTensors::deserialize(&file).unwrap();
        let mut tensors: Vec<_> = st.tensors();
        let find = |name: &str| st.tensor(name).unwrap();
        match head {
            // As it is: another one.
            None => {}
            Some("same") => tensors
                .iter_mut()
                .filter(|t| t.0 == "lm_head.weight")
                .for_each(|t| t.1 = find("model.embed_tokens.weight")),
            Some(gone) => tensors.retain(|t| t.0 != gone),
        }
        let file = safetensors::serialize(tensors.iter().map(|(n, t)| (n.as_str(), t)), None).unwrap();
        std::fs::write(dir.path().join("model.safetensors"), file).unwrap();
        dir
    };
    let (embed, head) = (Place::global(Role::Embed), Place::global(Role::Head));
    let llama = open(tiny().join("llama")).unwrap();
    let dir = copy(None);
    let c = open(dir.path()).unwrap();
    assert!(!c.spec().tied && c.remarks().len() == 1 && c.remarks()[0].contains("transformers 5"), "{:?}", c.remarks());
    assert_eq!(dense(&c, head), dense(&llama, head));
    assert_ne!(dense(&c, head), dense(&c, embed));
    for (gone, of) in [("same", embed), ("lm_head.weight", embed), ("model.embed_tokens.weight", head)] {
        let dir = copy(Some(gone));
        let c = open(dir.path()).unwrap_or_else(|e| panic!("{gone}: {e}"));
        assert!(c.spec().tied && c.remarks().is_empty(), "{gone}");
        assert_eq!(dense(&c, embed), dense(&llama, of), "{gone}");
    }
    // The same values in another type are the same.
    let dir = copy(Some("same"));
    let path = dir.path().join("model.safetensors");
    let file = std::fs::read(&path).unwrap();
    let st = safetensors::SafeTensors::deserialize(&file).unwrap();
    let half = |v: &[u8]| -> Vec<u8> {
        v.as_chunks::<4>().0.iter().flat_map(|b| half::f16::from_f32(f32::from_le_bytes(*b)).to_le_bytes()).collect()
    };
    let rounded = |v: &[u8]| -> Vec<u8> {
        v.as_chunks::<4>()
            .0
            .iter()
            .flat_map(|b| half::f16::from_f32(f32::from_le_bytes(*b)).to_f32().to_le_bytes())
            .collect()
    };
    for (differs, tied) in [(false, true), (true, false)] {
        let source = st.tensor("model.embed_tokens.weight").unwrap();
        let (small, mut wide) = (half(source.data()), rounded(source.data()));
        if differs {
            *wide.last_mut().unwrap() ^= 1;
        }
        let shape = source.shape().to_vec();
        let view = |dtype, data| safetensors::tensor::TensorView::new(dtype, shape.clone(), data).unwrap();
        let mut tensors: Vec<_> = st.tensors();
        for t in &mut tensors {
            match t.0.as_str() {
                "lm_head.weight" => t.1 = view(safetensors::Dtype::F16, &small),
                "model.embed_tokens.weight" => t.1 = view(safetensors::Dtype::F32, &wide),
                _ => {}
            }
        }
        let file = safetensors::serialize(tensors.iter().map(|(n, t)| (n.as_str(), t)), None).unwrap();
        std::fs::write(&path, file).unwrap();
        assert_eq!(open(dir.path()).unwrap().spec().tied, tied);
    }
}
