//! Checkpoints of other tools decode to what their own tools decode, bit for bit; damaged ones are refused by name. See
//! tests/golden/README.md for how they were made.

mod damage;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use damage::{Damaged, F16};
use lacuna_arch as arch;
use lacuna_base::float::{round_bf16, round_f16};
use lacuna_checkpoint::save::{GgufKind, save_gguf};
use lacuna_checkpoint::{Adapter, Checkpoint, OpenError, examine, mendable, open, repair};
use lacuna_format::{Term, Weights};
use lacuna_spec::{Part, Place, Role};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

fn foreign(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/foreign").join(name)
}

fn golden(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(foreign(name).join("golden.json")).unwrap()).unwrap()
}

fn codecs(c: &Checkpoint) -> BTreeMap<String, String> {
    let matrix = |p: &Place| p.role.is_linear() && p.part == Part::Weight;
    let places = c.spec().places().into_iter().filter(matrix);
    places.map(|p| (p.role.name().to_owned(), c.get(&p).unwrap().unwrap().codec_name())).collect()
}

/// Every matrix against the digest of what its own tool decoded, in that tool's type.
fn same_values(c: &Checkpoint, name: &str) {
    let golden = golden(name);
    let round: fn(f32) -> f32 = match golden["dtype"].as_str().unwrap() {
        "float32" => |x| x,
        "float16" => round_f16,
        _ => round_bf16,
    };
    let mut compared = 0;
    for place in c.spec().places() {
        let sources = arch::sources(c.spec(), &place);
        let Some(want) = sources.iter().find_map(|s| golden["sha256"][&s.name].as_str()) else { continue };
        let stored = c.get(&place).unwrap().unwrap();
        stored.check().unwrap();
        // A zero has no sign here: which one a product of zero has is nobody's business.
        let values: Vec<f32> = stored.to_mat().into_vec().into_iter().map(|x| round(x) + 0.0).collect();
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        let have: String = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
        let first = sources.iter().find_map(|s| golden["first"].get(&s.name));
        assert_eq!(have, want, "{name}: {place}: {:?}, expected {first:?}", &values[..8]);
        // In part as in whole.
        let mut some = lacuna_base::Mat::zeros(2, stored.cols);
        stored.decode_rows(3, 5, some.view_mut());
        let part: Vec<f32> = some.into_vec().into_iter().map(|x| round(x) + 0.0).collect();
        assert_eq!(part, values[3 * stored.cols..5 * stored.cols], "{name}: {place}");
        compared += 1;
    }
    assert_eq!(compared, golden["sha256"].as_object().unwrap().len(), "{name}");
}

#[test]
fn values_are_those_of_their_own_tools() {
    let all: &[(&str, &[(&str, &str)])] = &[
        (
            "pack_stream",
            &[
                ("attn.q", "int3 g16"),
                ("attn.k", "int5 g8 zero"),
                ("attn.v", "int6 row zero"),
                ("attn.o", "int7 row"),
                ("ffn.gate", "int2 g8 zero"),
                ("ffn.up", "int8 row"),
                ("ffn.down", "int4 g32"),
            ],
        ),
        ("pack_words", &[("attn.q", "int3 g16"), ("attn.k", "int5 g8 zero"), ("attn.o", "int7 row")]),
        ("pack_int4_bf16", &[("attn.q", "int4 row"), ("ffn.down", "int4 g32")]),
        ("pack_actorder", &[("attn.q", "int4 g16 zero"), ("ffn.down", "int4 g16 by index zero")]),
        ("int8", &[("attn.q", "int8 row"), ("attn.v", "int8 row"), ("ffn.up", "int8 row zero")]),
        ("naive_int8", &[("ffn.down", "int8 g16")]),
        ("fp8", &[("attn.q", "table8 row"), ("ffn.down", "table8 g16")]),
        ("sparse_bitmask", &[("attn.q", "bitmask bf16"), ("ffn.down", "bitmask bf16")]),
        ("sparse24", &[("attn.q", "2:4 f16"), ("ffn.down", "2:4 f16")]),
        ("sparse24_int8", &[("attn.q", "2:4 int8 row")]),
        ("marlin24", &[("attn.q", "2:4 int8 row"), ("ffn.up", "2:4 int4 row"), ("ffn.down", "2:4 int4 g128")]),
        ("gptq4", &[("attn.q", "int4 g16 by index zero")]),
        ("gptq4_v2_sym", &[("attn.q", "int4 row"), ("ffn.down", "int4 g32")]),
        ("gptq3", &[("ffn.down", "int3 row zero")]),
        ("gptq2", &[("ffn.down", "int2 g16 zero")]),
        ("gptq8", &[("ffn.down", "int8 g16 zero")]),
        ("awq_gemm", &[("ffn.down", "int4 g16 zero")]),
        ("awq_gemv", &[("ffn.down", "int4 g32 zero")]),
        ("fp8_blocks", &[("attn.q", "table8 g16"), ("attn.o", "bf16")]),
        ("modelopt_fp8", &[("ffn.down", "table8 row")]),
        ("fbgemm_fp8", &[("ffn.down", "table8 row")]),
        ("ct_nvfp4", &[("ffn.down", "table4 g16")]),
        ("modelopt_nvfp4", &[("ffn.down", "table4 g16")]),
        ("ct_mxfp4", &[("attn.q", "table4 row"), ("ffn.up", "table4 row"), ("ffn.down", "table4 g32")]),
        // Blocks of 64 over rows of 32: one scale a row of each two.
        ("bnb_nf4", &[("attn.q", "table4 row"), ("attn.v", "f16"), ("ffn.down", "table4 row")]),
        ("bnb_fp4", &[("ffn.down", "table4 row")]),
        ("bnb_int8", &[("ffn.down", "int8 row")]),
        (
            "mlx_mixed",
            &[
                ("attn.q", "int2 row min f16"),
                ("attn.k", "int3 row min f16"),
                ("attn.v", "bf16"),
                ("attn.o", "int6 row min f16"),
                ("ffn.gate", "int8 row min f16"),
                ("ffn.up", "int5 row min f16"),
                ("ffn.down", "int4 g32 min f16"),
            ],
        ),
        ("mlx_f16", &[("ffn.down", "int4 g32 min f16")]),
        ("mlx_mxfp4", &[("ffn.down", "table4 g32")]),
        ("auto_round_gptq", &[("attn.k", "int8 row zero"), ("attn.v", "f16"), ("ffn.down", "int4 g16 zero")]),
        ("auto_round_awq", &[("ffn.down", "int4 g16 zero")]),
        ("auto_round_own", &[("attn.k", "int8 row zero"), ("ffn.down", "int4 g16 zero")]),
    ];
    for (name, stored) in all {
        let c = open(foreign(name)).unwrap_or_else(|e| panic!("{e}"));
        same_values(&c, name);
        let codecs = codecs(&c);
        for (role, codec) in *stored {
            assert_eq!(codecs[*role], *codec, "{name}: {role}");
        }
        let unused: Vec<_> = c.unused().iter().map(|t| &t.name).filter(|n| !n.ends_with(".bias")).collect();
        assert!(unused.is_empty(), "{name}: {unused:?}");
        assert!(c.quantized().is_some());
        // Asked for twice, put together once; let go of, and the same again.
        let q = Place::layer(0, Role::Q);
        let (a, b) = (c.get(&q).unwrap().unwrap(), c.get(&q).unwrap().unwrap());
        assert!(std::sync::Arc::ptr_eq(&a, &b), "{name}");
        let before = a.to_mat();
        drop((a, b));
        c.release(&q);
        assert_eq!(c.get(&q).unwrap().unwrap().to_mat(), before, "{name}");
    }
}

#[test]
fn nothing_is_copied_where_words_are_the_stored_form() {
    let c = open(foreign("pack_int4_bf16")).unwrap();
    let file = std::fs::read(foreign("pack_int4_bf16").join("model.safetensors")).unwrap();
    let st = safetensors::SafeTensors::deserialize(&file).unwrap();
    let words = st.tensor("model.layers.0.mlp.down_proj.weight_packed").unwrap().data().to_vec();
    let stored = c.get(&Place::layer(0, Role::Down)).unwrap().unwrap();
    let Term::Piece(p) = &stored.terms[0] else { panic!("no piece") };
    let lacuna_format::Values::Int { codes, .. } = &p.values else { panic!("no codes") };
    assert_eq!(codes.as_ref(), words);
}

#[test]
fn adapters_change_what_peft_changes() {
    for (name, changed) in [("peft_lora", 3), ("peft_patterns", 7)] {
        for merge in [false, true] {
            let adapter = Adapter::open(foreign(name)).unwrap();
            assert!(Adapter::is_at(&foreign(name)) && adapter.base() == Some("../peft_base"));
            let c = open(foreign("peft_base")).unwrap().with_adapter(adapter, merge).unwrap();
            let golden = golden(name);
            let mut lowrank = 0;
            for place in c.spec().places() {
                let sources = arch::sources(c.spec(), &place);
                let Some(first) = sources.iter().find_map(|s| golden["first"].get(&s.name)) else { continue };
                let stored = c.get(&place).unwrap().unwrap();
                lowrank += usize::from(stored.codec_name().contains("lowrank"));
                for (have, want) in stored.to_mat().into_vec().iter().zip(first.as_array().unwrap()) {
                    // PEFT sums in another order.
                    let want = want.as_f64().unwrap();
                    assert!((f64::from(*have) - want).abs() < 2e-6, "{name}: {place}: {have}, expected {want}");
                }
            }
            assert_eq!(lowrank, if merge { 0 } else { changed }, "{name}");
            assert!(c.remarks()[0].contains(&format!("changes {changed} matrices")), "{:?}", c.remarks());
        }
    }
}

#[test]
fn adapters_that_compute_something_else_are_refused() {
    let refuse = |change: &dyn Fn(&mut Value), words: &[&str]| {
        let d = Damaged::copy(&foreign("peft_lora"));
        d.config("adapter_config.json", change);
        let base = open(foreign("peft_base")).unwrap();
        let e = Adapter::open(d.path()).and_then(|a| base.with_adapter(a, false)).unwrap_err().to_string();
        assert!(words.iter().all(|w| e.contains(w)), "{words:?} not in: {e}");
    };
    refuse(&|c| c["use_dora"] = json!(true), &["lora_magnitude_vector", "use_dora"]);
    refuse(&|c| c["peft_type"] = json!("LOHA"), &["LOHA"]);
    refuse(&|c| c["bias"] = json!("some"), &["bias"]);
    refuse(&|c| (c["use_dora"], c["lora_bias"]) = (json!(true), json!(true)), &["use_dora and lora_bias"]);
    refuse(&|c| c["layer_replication"] = json!([[0, 1]]), &["layer_replication"]);
    refuse(&|c| c["alora_invocation_tokens"] = json!([1]), &["alora_invocation_tokens"]);
    refuse(&|c| c["init_lora_weights"] = json!("pissa_niter_4"), &["pissa_niter_4"]);
    refuse(&|c| c["of_tomorrow"] = json!({"x": 1}), &["of_tomorrow"]);
    refuse(&|c| c["r"] = json!(5), &["rank 4", "the configuration 5"]);
    refuse(&|c| c["r"] = json!(-1), &["r is -1"]);
    refuse(&|c| c["rank_pattern"] = json!([1]), &["rank_pattern"]);
    // How a number that is not finite is kept is nobody's business.
    let nan = json!({"__float__": "NaN"});
    refuse(&|c| c["use_rslora"] = nan.clone(), &["use_rslora is NaN"]);
    refuse(&|c| c["rank_pattern"] = json!({"q_proj": nan}), &["rank_pattern: q_proj is NaN"]);
    refuse(&|c| c["trainable_token_indices"] = json!({"embed_tokens": [-1]}), &["trainable_token_indices"]);
    refuse(&|c| c["target_parameters"] = json!("x"), &["target_parameters"]);
    let d = Damaged::copy(&foreign("peft_lora"));
    std::fs::rename(d.path().join("adapter_model.safetensors"), d.path().join("adapter_model.bin")).unwrap();
    Adapter::open(d.path()).expect("safetensors under the older name");
    let e = open(foreign("pack_stream")).unwrap().with_adapter(Adapter::open(foreign("peft_lora")).unwrap(), false);
    e.expect("an adapter goes on a quantized base as well");
    let other = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tiny/gpt2");
    let e = open(other).unwrap().with_adapter(Adapter::open(foreign("peft_lora")).unwrap(), false).unwrap_err();
    assert!(e.to_string().contains("belongs to nothing in the base"), "{e}");
}

/// The model with an adapter on its base.
fn adapted(dir: &Path, merge: bool) -> Result<Checkpoint, OpenError> {
    let adapter = Adapter::open(dir)?;
    let base = foreign("peft_lora").join(adapter.base().unwrap());
    open(base)?.with_adapter(adapter, merge)
}

/// Every place of a model, decoded.
fn everything(c: &Checkpoint) -> BTreeMap<Place, lacuna_base::Mat> {
    let places = c.spec().places();
    places.into_iter().map(|p| (p, c.get(&p).unwrap().unwrap_or_else(|| panic!("no {p}")).to_mat())).collect()
}

/// What PEFT can say in an adapter: how it is kept, what is told. That it computes the same is held in `crates/model`.
#[test]
fn adapters_of_every_form() {
    let tied = |c: &Checkpoint| c.spec().tied;
    for (name, lowrank, told) in [
        ("peft_tied_embed", 2, "2 tensors are its own instead of the base's; the head is no longer the embedding"),
        ("peft_tied_head", 2, "the head is no longer the embedding"),
        ("peft_tied_both", 1, "changes 1 matrices"),
        ("peft_embed_head", 2, "2 tensors are its own"),
        ("peft_resized", 1, "the vocabulary has 70 rows now"),
        ("peft_dora", 0, "DoRA rescales 3 of them, which are merged for that"),
        ("peft_dora_fused", 0, "DoRA rescales 8 of them"),
        ("peft_bias", 4, "6 tensors are its own"),
        ("peft_bias_lora_only", 4, "2 tensors are its own"),
        ("peft_lora_bias", 6, "6 biases are moved"),
        ("peft_experts", 26, "changes 26 matrices"),
        ("peft_experts_down", 10, "changes 10 matrices"),
        ("peft_experts_apart", 26, "changes 26 matrices"),
        ("peft_tokens", 1, "3 rows of single tokens are its own"),
        ("peft_tokens_two", 2, "3 rows of single tokens"),
        ("peft_modules", 1, "4 tensors are its own"),
        ("peft_bin", 2, "changes 2 matrices"),
    ] {
        let c = adapted(&foreign(name), false).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(c.remarks()[0].contains(told), "{name}: {:?}", c.remarks());
        let kept = |c: &Checkpoint| {
            let kept = |p: &Place| c.get(p).unwrap().is_some_and(|s| s.codec_name().contains("lowrank"));
            c.spec().places().iter().filter(|p| kept(p)).count()
        };
        assert_eq!(kept(&c), lowrank, "{name}");
        // What changes one of two that are one parts them; of what changes neither or both, they stay one.
        let base = open(foreign(name).join(Adapter::open(foreign(name)).unwrap().base().unwrap())).unwrap();
        let parted = ["peft_tied_embed", "peft_tied_head", "peft_dora", "peft_modules"].contains(&name);
        assert_eq!(tied(&c), tied(&base) && !parted, "{name}");
        let merged = adapted(&foreign(name), true).unwrap();
        assert_eq!(kept(&merged), 0, "{name}");
        let (apart, merged) = (everything(&c), everything(&merged));
        assert_eq!(apart.len(), merged.len());
        for (place, m) in apart {
            let off = m.data().iter().zip(merged[&place].data()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(off < 1e-5, "{name}: {place}: {off}");
        }
    }
    let c = adapted(&foreign("peft_tokens"), false).unwrap();
    let embed = c.get(&Place::global(Role::Embed)).unwrap().unwrap();
    assert!(embed.codec_name().contains("csr"), "{}", embed.codec_name());
}

#[test]
fn tokens_have_the_rows_that_the_file_says() {
    let file = std::fs::read(foreign("peft_tokens").join("adapter_model.safetensors")).unwrap();
    let st = safetensors::SafeTensors::deserialize(&file).unwrap();
    let rows = st.tensor("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta").unwrap();
    let rows: Vec<f32> = rows.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    let (c, base) = (adapted(&foreign("peft_tokens"), false).unwrap(), open(foreign("peft_base")).unwrap());
    let of = |c: &Checkpoint| c.get(&Place::global(Role::Embed)).unwrap().unwrap().to_mat();
    let (have, before) = (of(&c), of(&base));
    // As the configuration lists them.
    for row in 0..have.rows() {
        match [42, 3, 17].iter().position(|t| *t == row) {
            Some(i) => {
                let want = &rows[i * 32..][..32];
                assert!(have.row(row).iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-6), "{row}");
            }
            None => assert_eq!(have.row(row), before.row(row), "{row}"),
        }
    }
}

#[test]
fn adapters_that_lie() {
    let refuse = |name: &str, change: &dyn Fn(&Damaged), words: &[&str]| {
        let d = Damaged::copy(&foreign(name));
        change(&d);
        let read =
            |c: Checkpoint| c.spec().places().iter().try_for_each(|p| c.get(p).map(drop).map_err(|e| e.to_string()));
        let e =
            adapted(d.path(), false).map_err(|e| e.to_string()).and_then(read).expect_err("a damaged adapter was read");
        assert!(words.iter().all(|w| e.contains(w)), "{name}: {words:?} not in: {e}");
    };
    let said = |key: &'static str, v: Value| move |d: &Damaged| d.config("adapter_config.json", |c| c[key] = v.clone());
    let shape = |tensor: &'static str, shape: Value| {
        move |d: &Damaged| {
            d.header_of("adapter_model.safetensors", |h| {
                h[format!("base_model.model.{tensor}")]["shape"] = shape.clone()
            });
        }
    };
    refuse(
        "peft_tokens",
        &said("trainable_token_indices", json!([42, 3])),
        &["trainable_tokens_delta", "[3, 32] for 2"],
    );
    refuse("peft_tokens", &said("trainable_token_indices", json!([42, 3, 64])), &["token 64", "none of 64"]);
    refuse("peft_tokens", &said("trainable_token_indices", json!([42, 3, 3])), &["token 3 stands twice"]);
    refuse("peft_tokens", &said("trainable_token_indices", json!({"head": [1, 2, 3]})), &["does not say which rows"]);
    refuse("peft_experts", &said("target_parameters", json!([])), &["experts", "belongs to nothing in the base"]);
    refuse(
        "peft_experts",
        &said("rank_pattern", json!({"down_proj": 4})),
        &["rank 12", "the configuration 4 for each of 4"],
    );
    refuse("peft_experts_down", &said("target_parameters", json!(["mlp.experts.gate_up_proj"])), &["experts.lora_B"]);
    refuse("peft_dora", &said("use_dora", json!(false)), &["lora_magnitude_vector", "belongs to nothing"]);
    refuse("peft_bias", &shape("model.layers.0.self_attn.k_proj.bias", json!([4, 4])), &["k_proj.bias", "[4, 4]"]);
    refuse("peft_lora_bias", &shape("model.layers.0.self_attn.q_proj.lora_B.bias", json!([32, 1])), &["lora_B.bias"]);
    refuse(
        "peft_modules",
        &shape("lm_head.weight", json!([32, 64])),
        &["lm_head.weight", "[32, 64]", "head is (64, 32)"],
    );
    // Only one of two was resized.
    refuse("peft_resized", &shape("lm_head.weight", json!([35, 64])), &["[70, 32]", "(64, 32)"]);
    let zero = |d: &Damaged| {
        for half in ["A", "B"] {
            d.fill_in(
                "adapter_model.safetensors",
                &format!("base_model.model.model.embed_tokens.lora_embedding_{half}"),
                &[0],
            );
        }
        d.fill_in("adapter_model.safetensors", "base_model.model.model.embed_tokens.base_layer.weight", &[0]);
    };
    refuse("peft_dora", &zero, &["lora_magnitude_vector", "length 0"]);
    let cut = |d: &Damaged| {
        let path = d.path().join("adapter_model.bin");
        let file = std::fs::read(&path).unwrap();
        std::fs::write(path, &file[..file.len() / 2]).unwrap();
    };
    refuse("peft_bin", &cut, &["adapter_model.bin", "cut short"]);
    let other = |d: &Damaged| std::fs::write(d.path().join("adapter_model.bin"), b"\x80\x02}.").unwrap();
    refuse("peft_bin", &other, &["adapter_model.bin", "PyTorch 1.6"]);
    let none = |d: &Damaged| {
        std::fs::write(d.path().join("adapter_model.safetensors"), b"\x08\0\0\0\0\0\0\0{}      ").unwrap();
    };
    refuse("peft_lora", &none, &["adapter_model.safetensors", "holds no tensors"]);
}

/// A change to a copy of a checkpoint, and words of the refusal; opening and reading both count.
fn refused(name: &str, change: &dyn Fn(&Damaged), words: &[&str]) {
    let d = Damaged::copy(&foreign(name));
    change(&d);
    let read = |c: Checkpoint| c.spec().places().iter().try_for_each(|p| c.get(p).map(drop).map_err(|e| e.to_string()));
    let e = open(d.path()).map_err(|e| e.to_string()).and_then(read).expect_err("a damaged checkpoint was read");
    assert!(words.iter().all(|w| e.contains(w)), "{name}: {words:?} not in: {e}");
}

const Q: &str = "model.layers.0.self_attn.q_proj";

#[test]
fn packed_tensors_that_lie() {
    let q = |suffix: &str| format!("{Q}.{suffix}");
    let shape = |s: &'static str, shape: Value| move |d: &Damaged| d.header(|h| h[q(s)]["shape"] = shape.clone());
    refused("pack_int4_bf16", &shape("weight_packed", json!([16, 8])), &["q_proj.weight_packed", "16 rows"]);
    refused("pack_int4_bf16", &|d| d.i64s(&q("weight_shape"), &[32, -1]), &["weight_shape", "-1"]);
    refused("pack_int4_bf16", &|d| d.i64s(&q("weight_shape"), &[1 << 40, 1 << 40]), &["weight_shape", "no shape"]);
    refused(
        "pack_int4_bf16",
        &|d| d.i64s(&q("weight_shape"), &[32, 64]),
        &["weight_packed", "64 columns", "contradicts"],
    );
    refused("pack_int4_bf16", &|d| d.drop(&q("weight_scale")), &["weight_packed", "weight_scale", "missing"]);
    refused("pack_int4_bf16", &|d| d.drop(&q("weight_shape")), &["weight_shape", "missing"]);
    refused("pack_int4_bf16", &|d| d.fill(&q("weight_scale"), &[0x80, 0x7f]), &["q_proj", "not finite"]);
    refused(
        "pack_actorder",
        &|d| d.i32s("model.layers.0.mlp.up_proj.weight_g_idx", 3, 2),
        &["up_proj.weight_g_idx", "group 2 of column 3", "0 to 1"],
    );
    refused("pack_actorder", &|d| d.i32s("model.layers.0.mlp.up_proj.weight_g_idx", 3, -7), &["group -7 of column 3"]);
    refused("pack_actorder", &|d| d.drop(&q("weight_zero_point")), &["weight_zero_point", "missing"]);
    let bits = |d: &Damaged| {
        d.config("config.json", |c| {
            c["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = json!(6);
        })
    };
    refused("pack_int4_bf16", &bits, &["weight_packed", "[6] bits", "4 bits", "contradicts"]);
    refused("int8", &|d| d.drop(&q("weight_scale")), &["q_proj.weight: I8", "weight_scale is missing"]);
    refused("fp8", &|d| d.fill(&q("weight"), &[0x7f]), &["q_proj.weight", "value 0 is not finite"]);
}

#[test]
fn sparse_tensors_that_lie() {
    let q = |suffix: &str| format!("{Q}.{suffix}");
    refused("sparse_bitmask", &|d| d.fill(&q("bitmask"), &[0xff]), &["q_proj.compressed", "keeps 1024"]);
    refused("sparse_bitmask", &|d| d.i64s(&q("row_offsets"), &[0, 9999]), &["row_offsets", "row 1 begins at 9999"]);
    refused("sparse_bitmask", &|d| d.i64s(&q("row_offsets"), &[-1]), &["row_offsets", "row 0 begins at -1"]);
    refused("sparse_bitmask", &|d| d.i64s(&q("shape"), &[32, 1 << 50]), &["q_proj.shape"]);
    refused("sparse_bitmask", &|d| d.i64s(&q("shape"), &[32, 40]), &["q_proj.bitmask", "[32, 5]"]);
    refused("sparse24", &|d| d.fill(&q("bitmask"), &[0x01]), &["q_proj.compressed", "keeps 128"]);
    refused("sparse24", &|d| d.drop(&q("compressed")), &["q_proj.bitmask", "compressed should lie beside it"]);
    refused("marlin24", &|d| d.fill(&q("meta"), &[0]), &["q_proj.meta", "expected two that rise"]);
    refused("marlin24", &|d| d.header(|h| h[q("meta")]["shape"] = json!([4, 64])), &["q_proj.meta", "[4, 64]"]);
    refused("marlin24", &|d| d.fill(&q("scale_packed"), &F16), &["q_proj.weight_packed", "not finite"]);
}

#[test]
fn gptq_and_awq_tensors_that_lie() {
    let q = |suffix: &str| format!("{Q}.{suffix}");
    refused("gptq4", &|d| d.i32s(&q("g_idx"), 5, 2), &["q_proj.g_idx", "group 2 of column 5"]);
    refused("gptq4", &|d| d.i32s(&q("g_idx"), 5, -1), &["q_proj.g_idx", "group -1"]);
    refused("gptq4", &|d| d.drop(&q("qzeros")), &["q_proj.qweight", "qzeros"]);
    refused("gptq4", &|d| d.fill(&q("bias"), &[1, 0]), &["q_proj.bias", "not zero"]);
    refused("gptq4", &|d| d.header(|h| h[q("scales")]["shape"] = json!([4, 16])), &["q_proj.scales", "[4, 16]"]);
    refused("gptq2", &|d| d.header(|h| h[q("qweight")]["shape"] = json!([64, 1])), &["q_proj"]);
    refused("awq_gemm", &|d| d.header(|h| h[q("qzeros")]["shape"] = json!([4, 2])), &["q_proj.qzeros", "[4, 2]"]);
    refused("awq_gemm", &|d| d.drop(&q("scales")), &["q_proj.qweight", "scales"]);
    let config = |key: &'static str, value: Value| {
        move |d: &Damaged| {
            d.config("config.json", |c| c["quantization_config"][key] = value.clone());
        }
    };
    refused("awq_gemm", &config("bits", json!(3)), &["config.json", "AWQ of 3 bits"]);
    // The tensors say something else than the configuration: with an order of columns, and without.
    refused("gptq4", &config("bits", json!(8)), &["qweight", "4 bits", "says 8"]);
    refused("gptq4_v2_sym", &config("bits", json!(8)), &["qweight", ": 4 bits", "says 8"]);
    refused("gptq8", &config("bits", json!(4)), &["qweight", ": 8 bits", "says 4"]);
    for bits in [3, 4, 8] {
        refused("gptq2", &config("bits", json!(bits)), &["qweight", "are 2 bits", &format!("says {bits}")]);
    }
    // Unless it says that some modules have their own.
    let d = Damaged::copy(&foreign("gptq4"));
    d.config("config.json", |c| {
        c["quantization_config"]["bits"] = json!(8);
        c["quantization_config"]["dynamic"] = json!({"+:.*": {"bits": 4}});
    });
    same_values(&open(d.path()).unwrap(), "gptq4");
    refused("awq_gemm", &config("version", json!("marlin")), &["config.json", "marlin"]);
    refused("gptq4", &config("checkpoint_format", json!("bitblas")), &["config.json", "bitblas"]);
    refused("gptq4", &config("quant_method", json!("bitsandbytes")), &["config.json", "bitsandbytes"]);
    refused("gptq4", &config("group_size", json!(0)), &["group_size is 0"]);
    refused("pack_stream", &config("format", json!("mxfp8-quantized")), &["mxfp8-quantized"]);
    let rotated = json!({"config_groups": {"u": {"type": "hadamard"}}});
    refused("pack_stream", &config("transform_config", rotated), &["transform_config"]);
}

#[test]
fn floats_and_blocks_that_lie() {
    let q = |suffix: &str| format!("{Q}.{suffix}");
    let shape = |suffix: &str, shape: Value| {
        let name = q(suffix);
        move |d: &Damaged| d.header(|h| h[&name]["shape"] = shape.clone())
    };
    let config = |key: &'static str, value: Value| {
        move |d: &Damaged| {
            d.config("config.json", |c| {
                let at = if c["quantization"].is_object() { "quantization" } else { "quantization_config" };
                c[at][key] = value.clone();
            });
        }
    };
    refused("fp8_blocks", &shape("weight_scale_inv", json!([4, 1])), &["q_proj.weight_scale_inv", "[4, 1]"]);
    refused("fp8_blocks", &|d| d.drop(&q("weight_scale_inv")), &["q_proj.weight", "weight_scale_inv"]);
    refused("fp8_blocks", &config("weight_block_size", json!([0, 16])), &["weight_block_size"]);
    refused("fp8_blocks", &config("fmt", json!("e5m2")), &["fmt"]);
    refused("modelopt_fp8", &config("quant_algo", json!("W4A8_AWQ")), &["W4A8_AWQ"]);
    let awq = |d: &Damaged| {
        d.header(|h| {
            let entry = h.as_object_mut().unwrap().remove(&q("input_scale")).unwrap();
            h[q("pre_quant_scale")] = entry;
        });
    };
    refused("modelopt_fp8", &awq, &["q_proj.pre_quant_scale"]);
    refused(
        "modelopt_nvfp4",
        &|d| d.fill(&q("weight_scale_2"), &[0, 0, 0xc0, 0x7f]),
        &["q_proj.weight_scale_2", "NaN"],
    );
    refused("modelopt_nvfp4", &|d| d.fill(&q("weight_scale"), &[0x7f]), &["q_proj.weight"]);
    refused("modelopt_nvfp4", &shape("weight_scale", json!([16, 4])), &["q_proj.weight_scale", "[32, 2]"]);
    refused("ct_nvfp4", &|d| d.fill(&q("weight_global_scale"), &[0]), &["q_proj.weight_global_scale", "0"]);
    refused("ct_nvfp4", &|d| d.drop(&q("weight_scale")), &["q_proj.weight_packed", "weight_scale"]);
    refused("ct_mxfp4", &|d| d.fill(&q("weight_scale"), &[255]), &["q_proj.weight_scale", "255"]);
    let state = "weight.quant_state.bitsandbytes__nf4";
    refused("bnb_nf4", &|d| d.drop(&q(state)), &["q_proj.weight", "quant_state"]);
    refused("bnb_nf4", &|d| d.fill(&q(state), b"{"), &["q_proj.weight.quant_state"]);
    refused("bnb_nf4", &|d| d.drop(&q("weight.nested_quant_map")), &["nested_quant_map"]);
    refused("bnb_fp4", &|d| d.fill(&q("weight.absmax"), &[0, 0, 0xc0, 0x7f]), &["q_proj.weight"]);
    refused("bnb_int8", &|d| d.drop(&q("SCB")), &["q_proj.weight", "SCB"]);
    refused("bnb_int8", &|d| d.fill(&q("weight_format"), &[2]), &["q_proj.weight_format"]);
    refused("bnb_int8", &config("load_in_4bit", json!(true)), &["load_in_4bit"]);
    refused("mlx_mixed", &|d| d.drop(&q("biases")), &["q_proj.weight", "biases"]);
    refused("mlx_mixed", &|d| d.drop(&q("scales")), &["q_proj.weight", "scales"]);
    refused("mlx_mixed", &config("group_size", json!(48)), &["scales", "48"]);
    refused("mlx_mixed", &config("mode", json!("round")), &["mode", "round"]);
    refused("mlx_mxfp4", &|d| d.fill(&q("scales"), &[255]), &["q_proj.scales", "255"]);
    refused("auto_round_gptq", &config("packing_format", json!("auto_round:fp8")), &["auto_round:fp8"]);
    refused("auto_round_gptq", &config("data_type", json!("nv_fp")), &["nv_fp"]);
}

#[test]
fn cut_short_anywhere_is_refused() {
    for name in ["pack_stream", "sparse_bitmask", "marlin24", "gptq4", "awq_gemm", "ct_nvfp4", "bnb_nf4", "mlx_mixed"] {
        let d = Damaged::copy(&foreign(name));
        let path = d.path().join("model.safetensors");
        let file = std::fs::read(&path).unwrap();
        for i in 0..16 {
            std::fs::write(&path, &file[..file.len() * i / 16]).unwrap();
            assert!(open(d.path()).unwrap_err().to_string().contains("model.safetensors"));
        }
    }
}

/// What a description leaves out of its own layers, and scales or orders that are gone, would make another network.
#[test]
fn what_would_be_another_network_is_refused_by_tensor() {
    let tiny = |name: &str| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tiny").join(name);
    let said = |d: &Damaged| open(d.path()).map(|_| ()).unwrap_err().to_string();
    let gate = "model.layers.0.mlp.gate_proj";
    for (name, tensor) in
        [("ct_nvfp4", "weight_global_scale"), ("modelopt_nvfp4", "weight_scale_2"), ("gptq4", "g_idx")]
    {
        let d = Damaged::copy(&foreign(name));
        if name == "gptq4" {
            d.config("config.json", |c| c["quantization_config"]["desc_act"] = json!(true));
        }
        d.drop(&format!("{gate}.{tensor}"));
        let e = said(&d);
        assert!(e.contains(&format!("{gate}.{tensor}")) && e.contains("missing"), "{name}: {e}");
    }
    let d = Damaged::copy(&foreign("fp8_blocks"));
    d.config("config.json", |c| drop(c.as_object_mut().unwrap().remove("quantization_config")));
    let e = said(&d);
    assert!(e.contains("scales the weight beside it") && e.contains("no quantization_config"), "{e}");
    let d = Damaged::copy(&tiny("qwen3"));
    d.config("config.json", |c| c["model_type"] = json!("llama"));
    let c = open(d.path()).unwrap();
    assert!(
        c.remarks().iter().any(|r| r.contains("not part of the network") && r.contains("q_norm")),
        "{:?}",
        c.remarks()
    );
    let d = Damaged::copy(&tiny("llama"));
    d.config("config.json", |c| c["num_hidden_layers"] = json!(0));
    assert!(said(&d).contains("0 layers"), "{}", said(&d));
}

#[test]
fn the_oldest_spellings_are_read() {
    let d = Damaged::copy(&foreign("sparse_bitmask"));
    d.config("config.json", |c| {
        let sparsity = &mut c["compression_config"]["sparsity_config"];
        assert_eq!(
            (sparsity["format"].clone(), sparsity["global_sparsity"].clone()),
            (json!("sparse_bitmask"), json!("0.5"))
        );
        sparsity["format"] = json!("dense_sparsity");
    });
    let c = open(d.path()).unwrap();
    assert_eq!(c.quantized().unwrap().sparsity_format.as_deref(), Some("dense"));
    same_values(&c, "sparse_bitmask");
}

#[test]
fn what_is_odd_is_told_with_what_helps() {
    let tiny = |name: &str| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tiny").join(name);
    let told = |d: &Damaged| -> Vec<(String, bool)> {
        let c = examine(d.path()).unwrap();
        c.problems()
            .iter()
            .map(|p| (format!("{} / {}", p.what, p.help.clone().unwrap_or_default()), p.broken))
            .collect()
    };
    assert_eq!(told(&Damaged::copy(&tiny("llama"))), []);
    assert_eq!(told(&Damaged::copy(&foreign("sparse24"))), []);
    assert_eq!(told(&Damaged::copy(&foreign("gptq4"))), []);
    let d = Damaged::copy(&tiny("llama"));
    d.config("config.json", |c| {
        c["quantization_config"] = json!({"quant_method": "compressed-tensors", "sparsity_config": {
            "format": "dense", "targets": ["Linear"], "global_sparsity": 0.5, "sparsity_structure": "2:4"}});
    });
    open(d.path()).expect("a dead sparsity_config keeps nobody from reading");
    let t = told(&d);
    assert!(t.len() == 1 && !t[0].1 && t[0].0.contains("sparsity_config") && t[0].0.contains("lacuna repair"), "{t:?}");
    let d = Damaged::copy(&tiny("llama"));
    d.config("config.json", |c| c["num_hidden_layers"] = json!(4));
    let e = open(d.path()).unwrap_err().to_string();
    assert!(e.contains("counts 4 layers") && e.contains("there for 2") && e.contains("missing: 2, 3"), "{e}");
    let t = told(&d);
    assert!(t.len() == 1 && t[0].1 && t[0].0.contains("lacuna repair"), "{t:?}");
    let d = Damaged::copy(&tiny("llama"));
    d.config("config.json", |c| c["num_hidden_layers"] = json!(1));
    let t = told(&d);
    assert!(t.len() == 1 && !t[0].1 && t[0].0.contains("more: 1") && t[0].0.contains("raise the count"), "{t:?}");
    let d = Damaged::copy(&tiny("llama"));
    d.drop("model.layers.1.mlp.up_proj.weight");
    d.header(|h| h["model.layers.0.self_attn.q_proj.weight"]["shape"] = json!([16, 64]));
    let t = told(&d);
    assert!(t.len() == 2 && t.iter().all(|p| p.1), "{t:?}");
    assert!(t[0].0.contains("[16, 64]") && t[1].0.contains("layers.1.ffn.up is missing"), "{t:?}");
    let d = Damaged::copy(&tiny("llama_sharded"));
    std::fs::remove_file(d.path().join("model-00003-of-00003.safetensors")).unwrap();
    let t = told(&d);
    assert!(t[0].1 && t[0].0.contains("model-00003-of-00003.safetensors") && t[0].0.contains("copy it there"), "{t:?}");
    let d = Damaged::copy(&tiny("llama"));
    d.config("config.json", |c| c["tie_word_embeddings"] = json!(true));
    let t = told(&d);
    assert!(t.len() == 1 && !t[0].1 && t[0].0.contains("differs") && t[0].0.contains("tie_word_embeddings"), "{t:?}");
    let d = Damaged::copy(&tiny("llama"));
    d.config("config.json", |c| {
        c["quantization_config"] = json!({"quant_method": "gptq", "bits": 4, "group_size": 128});
    });
    let t = told(&d);
    assert!(t.len() == 1 && t[0].0.contains("stored as plain numbers"), "{t:?}");
}

/// What to do with an advice.
enum Advice {
    /// `repair` is recommended, and mends it.
    Repair,
    /// An edit is recommended (words of it), and mends it.
    Edit(&'static str, fn(&Damaged)),
    /// Nothing that a program could do is recommended.
    Nothing,
}
use Advice::{Edit, Nothing, Repair};

fn set(key: &'static str, value: Value) -> impl Fn(&Damaged) {
    move |d| d.config("config.json", |c| c[key] = value.clone())
}

fn renamed(d: &Damaged, from: &str, to: &str) {
    d.header(|h| {
        let old = std::mem::take(h.as_object_mut().unwrap());
        h.as_object_mut().unwrap().extend(old.into_iter().map(|(k, v)| (k.replace(from, to), v)));
    });
}

#[test]
fn what_is_recommended_works() {
    let tiny = |name: &str| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tiny").join(name);
    let sparsity = json!({"quant_method": "compressed-tensors", "sparsity_config": {
        "format": "dense", "targets": ["Linear"], "global_sparsity": 0.5, "sparsity_structure": "2:4"}});
    let tie: fn(&Damaged) = |d| set("tie_word_embeddings", json!(true))(d);
    type Damage = Vec<Box<dyn Fn(&Damaged)>>;
    let count = |n: usize| -> Box<dyn Fn(&Damaged)> { Box::new(set("num_hidden_layers", json!(n))) };
    let gap = || -> Box<dyn Fn(&Damaged)> { Box::new(|d| renamed(d, "layers.1.", "layers.5.")) };
    let headless = || -> Box<dyn Fn(&Damaged)> { Box::new(|d| d.drop("lm_head.weight")) };
    let second: fn(&Damaged) = |d| {
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tiny/llama_sharded");
        let name = "model-00002-of-00003.safetensors";
        std::fs::copy(from.join(name), d.path().join(name)).unwrap();
    };
    let unequal = json!(["sliding_attention", "full_attention", "full_attention"]);
    let table: Vec<(&str, &str, Damage, Advice)> = vec![
        ("a dead sparsity_config", "llama", vec![Box::new(set("quantization_config", sparsity))], Repair),
        ("too high a count", "llama", vec![count(4)], Repair),
        ("layers gone from the middle", "llama", vec![count(6), gap()], Repair),
        ("a gap that the count does not know", "llama", vec![count(2), gap()], Nothing),
        ("layers gone, nobody knows which", "gemma2", vec![count(3), Box::new(set("layer_types", unequal))], Nothing),
        ("no head", "llama", vec![headless()], Edit("\"tie_word_embeddings\": true", tie)),
        ("no head, and too high a count", "llama", vec![headless(), count(4)], Nothing),
        ("the same, once the head is tied", "llama", vec![headless(), count(4), Box::new(tie)], Repair),
        (
            "layers that are not counted",
            "llama",
            vec![count(1)],
            Edit("raise the count", |d| set("num_hidden_layers", json!(2))(d)),
        ),
        ("layers that are not counted, with a gap", "llama", vec![count(1), gap()], Nothing),
        (
            "a head beside the embedding that it is said to be",
            "llama",
            vec![Box::new(tie)],
            Edit("\"tie_word_embeddings\": false", |d| set("tie_word_embeddings", json!(false))(d)),
        ),
        (
            "a quantization_config over plain numbers",
            "llama",
            vec![Box::new(set("quantization_config", json!({"quant_method": "gptq", "bits": 4, "group_size": 128})))],
            Edit("take quantization_config out", |d| set("quantization_config", json!(null))(d)),
        ),
        (
            "a shard that is not there",
            "llama_sharded",
            vec![Box::new(|d| std::fs::remove_file(d.path().join("model-00002-of-00003.safetensors")).unwrap())],
            Edit("copy it there", second),
        ),
    ];
    for (what, model, damage, advice) in table {
        let d = Damaged::copy(&tiny(model));
        damage.iter().for_each(|f| f(&d));
        let problems = examine(d.path()).unwrap_or_else(|e| panic!("{what}: {e}")).problems().to_vec();
        assert!(!problems.is_empty(), "{what}");
        let told = |words: &str| problems.iter().any(|p| p.help.as_deref().is_some_and(|h| h.contains(words)));
        let broken = problems.iter().any(|p| p.broken);
        let out = tempfile::tempdir().unwrap();
        let mended = repair(d.path(), &out.path().join("out"), false, &mut |_, _| {});
        assert_eq!(mendable(d.path()).is_ok(), mended.is_ok(), "{what}");
        // Advised by both who look, or by neither.
        let opened = open(d.path()).map_err(|e| e.to_string());
        assert_eq!(opened.is_err(), broken, "{what}");
        if let Err(e) = opened {
            assert_eq!(e.contains("lacuna repair"), matches!(advice, Repair), "{what}: {e}");
        }
        assert_eq!(told("lacuna repair"), matches!(advice, Repair), "{what}: {problems:?}");
        match advice {
            Repair => {
                mended.unwrap_or_else(|e| panic!("{what}: {e}"));
                let c = examine(out.path().join("out")).unwrap();
                assert_eq!(c.problems(), [], "{what}");
            }
            Edit(words, follow) => {
                assert!(mended.is_err() && told(words), "{what}: {problems:?}");
                follow(&d);
                assert_eq!(examine(d.path()).unwrap().problems(), [], "{what}");
                open(d.path()).unwrap_or_else(|e| panic!("{what}: {e}"));
            }
            Nothing => assert!(mended.is_err(), "{what}"),
        }
    }
}

#[test]
fn what_is_recommended_for_gguf_files_works() {
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tiny/llama");
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("m.gguf");
    save_gguf(&open(tiny).unwrap(), &file, GgufKind::F16, false, &mut |_, _| {}).unwrap();
    let bytes = std::fs::read(&file).unwrap();
    let find = |what: &[u8]| bytes.windows(what.len()).position(|w| w == what).unwrap();
    // The count lies behind its key and type.
    let count = find(b"llama.block_count") + b"llama.block_count".len() + 4;
    for (what, gone, works) in [("too high a count", None, true), ("and no embedding", Some(b"token_embd"), false)] {
        let mut bytes = bytes.clone();
        assert_eq!(bytes[count], 2);
        bytes[count] = 5;
        if let Some(name) = gone {
            bytes[find(name)] = b'x';
        }
        let broken = dir.path().join("broken.gguf");
        std::fs::write(&broken, bytes).unwrap();
        let told = examine(&broken).map(|c| c.problems().to_vec()).unwrap_or_default();
        let told = told.iter().any(|p| p.help.as_deref().is_some_and(|h| h.contains("lacuna repair")));
        let e = open(&broken).unwrap_err().to_string();
        assert_eq!((told, e.contains("lacuna repair")), (works, works), "{what}: {e}");
        let out = dir.path().join("mended.gguf");
        assert_eq!(repair(&broken, &out, true, &mut |_, _| {}).is_ok(), works, "{what}");
        assert!(!works || examine(&out).unwrap().problems().is_empty(), "{what}");
    }
}

/// GGUF files of Gemma keep a norm's scale, adapters what it differs from one by.
#[test]
fn a_norm_that_the_base_keeps_in_another_way_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tiny/gemma3_linear");
    let file = dir.path().join("m.gguf");
    save_gguf(&open(&tiny).unwrap(), &file, GgufKind::F16, false, &mut |_, _| {}).unwrap();
    let saved = std::fs::read(foreign("peft_modules").join("adapter_model.safetensors")).unwrap();
    let st = safetensors::SafeTensors::deserialize(&saved).unwrap();
    let name = "base_model.model.model.norm.weight";
    let one = safetensors::serialize([(name, st.tensor(name).unwrap())], None).unwrap();
    std::fs::write(dir.path().join("adapter_model.safetensors"), one).unwrap();
    std::fs::copy(foreign("peft_modules").join("adapter_config.json"), dir.path().join("adapter_config.json")).unwrap();
    let on = |base: &Path| open(base).unwrap().with_adapter(Adapter::open(dir.path()).unwrap(), false);
    on(&tiny).unwrap();
    let e = on(&file).unwrap_err().to_string();
    assert!(e.contains(name) && e.contains("in another way") && e.contains("safetensors"), "{e}");
}

#[test]
fn mxfp4_experts_are_what_their_codes_and_scales_say() {
    let dir = foreign("gpt_oss_mxfp4");
    let c = open(&dir).unwrap();
    assert!(c.unused().is_empty(), "{:?}", c.unused());
    let bytes = std::fs::read(dir.join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let table = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let mut compared = 0;
    for place in c.spec().places().into_iter().filter(|p| p.expert.is_some() && p.part == Part::Weight) {
        let (l, e) = (place.layer.unwrap(), place.expert.unwrap() as usize);
        let (name, from, step) = match place.role {
            Role::Gate => ("gate_up_proj", 0, 2),
            Role::Up => ("gate_up_proj", 1, 2),
            _ => ("down_proj", 0, 1),
        };
        let of = |end: &str| file.tensor(&format!("model.layers.{l}.mlp.experts.{name}_{end}")).unwrap();
        let (blocks, scales) = (of("blocks"), of("scales"));
        let (high, runs) = (blocks.shape()[1], blocks.shape()[2]);
        let m = c.get(&place).unwrap().unwrap().to_mat();
        assert_eq!(m.cols(), 32 * runs, "{place}");
        for r in 0..m.rows() {
            for col in 0..m.cols() {
                let run = (e * high + from + step * r) * runs + col / 32;
                let byte = blocks.data()[run * 16 + col % 32 / 2];
                let code = if col % 2 == 0 { byte & 15 } else { byte >> 4 };
                let size = table[usize::from(code & 7)] * 2f64.powi(i32::from(scales.data()[run]) - 127);
                let want = if code > 7 { -size } else { size };
                assert_eq!(f64::from(m[(r, col)]), want, "{place} {r} {col}");
                compared += 1;
            }
        }
    }
    assert!(compared > 10_000, "{compared}");
    // A file without the scales of one tensor, and one with a scale that is no number.
    let mangled = |name: &str, change: &dyn Fn(&mut Vec<u8>)| {
        let at = tempfile::tempdir().unwrap();
        let mut all: Vec<(String, safetensors::Dtype, Vec<usize>, Vec<u8>)> =
            file.tensors().into_iter().map(|(n, t)| (n, t.dtype(), t.shape().to_vec(), t.data().to_vec())).collect();
        all.iter_mut().filter(|t| t.0.ends_with(name)).for_each(|t| change(&mut t.3));
        all.retain(|t| !t.3.is_empty());
        let views =
            all.iter().map(|(n, d, s, b)| (n.clone(), safetensors::tensor::TensorView::new(*d, s.clone(), b).unwrap()));
        std::fs::write(at.path().join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
        std::fs::copy(dir.join("config.json"), at.path().join("config.json")).unwrap();
        at
    };
    let name = "layers.0.mlp.experts.down_proj_scales";
    let e = open(mangled(name, &|b| b.clear()).path()).err().unwrap().to_string();
    assert!(e.contains("down_proj_scales should lie beside it"), "{e}");
    let broken = mangled(name, &|b| b[3] = 255);
    let c = open(broken.path()).unwrap();
    let e = c.get(&Place::expert(0, Role::Down, 0)).unwrap_err().to_string();
    assert!(e.contains("is no number") && e.contains("down_proj_scales"), "{e}");
}
