//! What a config.json leaves out means what transformers' own classes mean by it: see `tests/golden/make_defaults.py`.

use std::path::Path;

use lacuna_arch as arch;
use lacuna_spec::{Norm, NormKind, Positions, RopeScaling, Spec};
use serde_json::{Map, Value, json};

fn golden() -> Map<String, Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/defaults.json");
    let all: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let mut all = all.as_object().unwrap().clone();
    all.remove("made_with").unwrap();
    all
}

fn read(config: &Value) -> Spec {
    arch::from_config(config).unwrap_or_else(|e| panic!("{e}: {config}"))
}

/// Equal neighbours once, with their count.
fn runs(items: impl Iterator<Item = Value>) -> Value {
    let mut out: Vec<(usize, Value)> = Vec::new();
    for item in items {
        match out.last_mut() {
            Some((n, last)) if *last == item => *n += 1,
            _ => out.push((1, item)),
        }
    }
    json!(out)
}

/// The network in the golden file's words.
fn network(spec: &Spec, keys: &Value) -> Value {
    let attn = |l: usize| spec.layers[l].attn.as_ref().unwrap();
    let ffn = |l: usize| spec.layers[l].ffn.as_ref().unwrap();
    let layers = 0..spec.layers.len();
    let (a, f) = (attn(0), ffn(0));
    let Norm { kind, eps, .. } = spec.norm;
    let mut rope = Map::new();
    for l in layers.clone() {
        let Some(r) = &attn(l).rope else { continue };
        let scaling = match r.scaling {
            RopeScaling::Default => "default",
            RopeScaling::Yarn { .. } => "yarn",
            ref other => panic!("{other:?}"),
        };
        let kind = if attn(l).window.is_some() { "sliding_attention" } else { "full_attention" };
        rope.insert(kind.into(), json!([r.theta, r.dims, scaling]));
    }
    let mut out = json!({
        "layers": spec.layers.len(), "tied": spec.tied, "context": spec.context, "embed": [spec.vocab, spec.hidden],
        "positions": match spec.positions {
            Positions::None => Value::Null,
            Positions::Learned { offset } => json!(spec.context + offset),
        },
        "norm": [if kind == NormKind::Rms { "rms" } else { "layer" }, eps], "final_norm": spec.final_norm,
        "heads": a.heads, "kv_heads": a.kv_heads, "head_dim": a.head_dim, "scale": a.scale, "qkv_bias": a.qkv_bias,
        "o_bias": a.o_bias, "qk_norm": a.qk_norm, "softcap": a.softcap, "act": f.act, "ffn_bias": f.bias,
        "windows": runs(layers.clone().map(|l| json!(attn(l).window))),
        "ffn": runs(layers.map(|l| {
            json!([ffn(l).width, ffn(l).experts.map(|e| json!([e.count, e.used, e.normalize]))])
        })),
    });
    for (key, v) in
        [("rope", json!(rope)), ("embed_scale", json!(spec.embed_scale)), ("logit_softcap", json!(spec.logit_softcap))]
    {
        if keys.get(key).is_some() {
            out[key] = v;
        }
    }
    out
}

/// Compares numbers as the f32s that they are.
fn same(path: &str, ours: &Value, theirs: &Value) {
    match (ours, theirs) {
        (Value::Object(a), Value::Object(b)) => {
            let names = |o: &Map<String, Value>| {
                let mut names: Vec<String> = o.keys().cloned().collect();
                names.sort();
                names
            };
            assert_eq!(names(a), names(b), "{path}");
            a.iter().for_each(|(k, v)| same(&format!("{path}.{k}"), v, &b[k]));
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            a.iter().zip(b).enumerate().for_each(|(i, (x, y))| same(&format!("{path}.{i}"), x, y));
        }
        (Value::Number(a), Value::Number(b)) => {
            assert_eq!(a.as_f64().map(|x| x as f32), b.as_f64().map(|x| x as f32), "{path}");
        }
        _ => assert_eq!(ours, theirs, "{path}"),
    }
}

#[test]
fn a_model_type_alone_is_the_network_that_transformers_builds() {
    let all = golden();
    assert!(all.len() >= 15, "{} classes", all.len());
    for (name, said) in &all {
        let spec = read(&json!({"model_type": name}));
        same(name, &network(&spec, &said["network"]), &said["network"]);
    }
}

#[test]
fn each_key_at_its_default_is_as_good_as_absent() {
    let mut keys = 0;
    for (name, said) in &golden() {
        let bare = read(&json!({"model_type": name}));
        for version in ["v4", "v5"] {
            let full = &said[version];
            assert_eq!(read(full), bare, "{name} as {version} writes every default");
            for key in full.as_object().unwrap().keys().filter(|k| *k != "model_type") {
                let mut less = full.clone();
                less.as_object_mut().unwrap().remove(key);
                assert_eq!(read(&less), bare, "{name} as {version} writes it, without {key}");
                let alone = json!({"model_type": name, key: full[key]});
                assert_eq!(read(&alone), bare, "{name} with {key} alone, as {version} writes it");
                keys += 1;
            }
        }
    }
    assert!(keys > 250, "{keys} keys");
}

#[test]
fn what_a_family_writes_says_all_that_it_reads() {
    for name in golden().keys().filter(|n| *n != "gemma3") {
        let mut spec = read(&json!({"model_type": name}));
        spec.layers.truncate(6);
        let written = arch::to_config(&spec).unwrap();
        assert_eq!(read(&written), spec, "{name}");
    }
}

#[test]
fn a_mistral_whose_layers_differ_is_written_by_layer() {
    let config = json!({"model_type": "mistral", "num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]});
    let spec = read(&config);
    let windows: Vec<_> = spec.layers.iter().map(|l| l.attn.as_ref().unwrap().window).collect();
    assert_eq!(windows, [None, Some(4096)]);
    let written = arch::to_config(&spec).unwrap();
    assert_eq!(read(&written), spec);
    assert_eq!(written["layer_types"], config["layer_types"]);
    assert!(arch::to_config(&read(&json!({"model_type": "mistral"}))).unwrap().get("layer_types").is_none());
}

#[test]
fn what_transformers_derives_is_derived() {
    let head = |config: Value| {
        let a = read(&config).layers[0].attn.clone().unwrap();
        (a.heads, a.kv_heads, a.head_dim)
    };
    for (name, default_kv) in [("llama", 16), ("phi3", 16), ("mistral", 8), ("mixtral", 8)] {
        let config = json!({"model_type": name, "hidden_size": 512, "num_attention_heads": 16});
        assert_eq!(head(config.clone()), (16, default_kv, 32), "{name}");
        let mut null = config;
        null["num_key_value_heads"] = Value::Null;
        assert_eq!(head(null), (16, 16, 32), "{name}");
    }
    // Not derived: a number of its own, as published files that leave it out rely on.
    let qwen3 = json!({"model_type": "qwen3", "hidden_size": 512, "num_attention_heads": 32});
    assert_eq!(head(qwen3), (32, 32, 128));
    let gpt2 = read(&json!({"model_type": "gpt2", "n_embd": 96}));
    assert_eq!(gpt2.layers[0].ffn.as_ref().unwrap().width, 384);
}

#[test]
fn the_outer_words_of_a_model_that_sees_images() {
    let of = |outer: Value, text: Value| {
        let mut config = outer;
        config["model_type"] = json!("gemma3");
        config["text_config"] = text;
        read(&config)
    };
    let plain = of(json!({}), json!({}));
    // hidden is 2304: its root is exact in every dtype; 640's is not.
    let odd = |outer: Value, text: Value| {
        let mut text = text;
        text["hidden_size"] = json!(640);
        of(outer, text).embed_scale
    };
    let (bf16, f32) = (odd(json!({"dtype": "bfloat16"}), json!({})), odd(json!({}), json!({})));
    assert_ne!(bf16, f32);
    assert_eq!(odd(json!({"torch_dtype": "bfloat16"}), json!({"dtype": "float32"})), bf16);
    assert_eq!(odd(json!({}), json!({"torch_dtype": "bfloat16"})), bf16);
    assert_eq!(of(json!({}), json!({"final_logit_softcapping": 4.0})), plain);
    assert!(of(json!({"tie_word_embeddings": true}), json!({"tie_word_embeddings": false})).tied);
    assert!(!of(json!({"tie_word_embeddings": false}), json!({})).tied);
    assert!(!of(json!({}), json!({"tie_word_embeddings": false})).tied);
}

#[test]
fn what_would_change_every_layer_is_refused() {
    for (key, v) in [
        ("is_causal", json!(false)),
        ("is_causal", json!(null)),
        ("per_layer_config", json!({"0": {"intermediate_size": 8}})),
        ("num_hidden_layers", json!(null)),
        ("rms_norm_eps", json!(null)),
    ] {
        for config in [json!({"model_type": "llama", key: v}), json!({"model_type": "gemma3", "text_config": {key: v}})]
        {
            let e = arch::from_config(&config).unwrap_err().what;
            assert!(e.contains(key), "{e}");
        }
    }
    assert!(arch::from_config(&json!({"model_type": "llama", "per_layer_config": {}})).is_ok());
}

/// Networks with recurrent mixers: every key at its default is as good as absent.
#[test]
fn defaults_of_recurrent_classes() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/defaults_recurrent.json");
    let all: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let mut keys = 0;
    for (name, full) in all.as_object().unwrap().iter().filter(|(name, _)| *name != "made_with") {
        let bare = read(&json!({"model_type": name}));
        assert_eq!(read(full), bare, "{name} as transformers writes every default");
        for key in full.as_object().unwrap().keys().filter(|k| *k != "model_type") {
            let mut less = full.clone();
            less.as_object_mut().unwrap().remove(key);
            assert_eq!(read(&less), bare, "{name} without {key}");
            keys += 1;
        }
        assert!(bare.first_mixer().is_some() || name == "lfm2" || name == "mpt", "{name}");
        let mut spec = bare.clone();
        spec.layers.truncate(8);
        // All layers of a bare LFM2 attend, and none of a bare Bamba or Granite 4: such networks are nobody's.
        if name != "bamba" && name != "granitemoehybrid" {
            assert_eq!(read(&arch::to_config(&spec).unwrap()), spec, "{name}");
        }
    }
    assert!(keys > 80, "{keys} keys");
}
