//! Whole commands on checkpoints of other tools: a GPTQ model and a LoRA adapter of random numbers, with a real
//! tokenizer.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use lacuna_base::Rng;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use tempfile::TempDir;

const HIDDEN: usize = 32;
const FFN: usize = 64;
const VOCAB: usize = 603;

type Tensors = Vec<(String, Dtype, Vec<usize>, Vec<u8>)>;

fn golden(what: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(what)
}

fn add_tokenizer(dir: &Path) {
    for file in ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"] {
        std::fs::copy(golden("tokenizers/bytelevel").join(file), dir.join(file)).unwrap();
    }
}

fn save(path: &Path, tensors: &Tensors) {
    let views = tensors.iter().map(|(n, d, s, b)| (n.clone(), TensorView::new(*d, s.clone(), b).unwrap()));
    safetensors::serialize_to_file(views, None, path).unwrap();
}

fn floats(rng: &mut Rng, n: usize, spread: f32) -> Vec<u8> {
    (0..n).flat_map(|_| (spread * rng.normal()).to_le_bytes()).collect()
}

/// Tensors of one matrix by suffix: `(outputs, inputs)`.
type Matrix = fn(&mut Rng, usize, usize) -> Vec<(&'static str, Dtype, Vec<usize>, Vec<u8>)>;

/// A Llama of one layer whose matrices are as another tool stores them.
fn make(dir: &Path, (key, quantization): (&str, Value), matrix: Matrix) {
    std::fs::create_dir_all(dir).unwrap();
    add_tokenizer(dir);
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": HIDDEN, "intermediate_size": FFN,
        "max_position_embeddings": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": true, "vocab_size": VOCAB, "torch_dtype": "float16",
    });
    config[key] = quantization;
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let mut rng = Rng::new(5);
    let mut tensors: Tensors = vec![];
    tensors.push((
        "model.embed_tokens.weight".into(),
        Dtype::F32,
        vec![VOCAB, HIDDEN],
        floats(&mut rng, VOCAB * HIDDEN, 0.3),
    ));
    let ones: Vec<u8> = (0..HIDDEN).flat_map(|_| 1f32.to_le_bytes()).collect();
    for name in ["norm", "layers.0.input_layernorm", "layers.0.post_attention_layernorm"] {
        tensors.push((format!("model.{name}.weight"), Dtype::F32, vec![HIDDEN], ones.clone()));
    }
    for (name, outputs, inputs) in [
        ("self_attn.q_proj", HIDDEN, HIDDEN),
        ("self_attn.k_proj", HIDDEN / 2, HIDDEN),
        ("self_attn.v_proj", HIDDEN / 2, HIDDEN),
        ("self_attn.o_proj", HIDDEN, HIDDEN),
        ("mlp.gate_proj", FFN, HIDDEN),
        ("mlp.up_proj", FFN, HIDDEN),
        ("mlp.down_proj", HIDDEN, FFN),
    ] {
        for (suffix, dtype, shape, bytes) in matrix(&mut rng, outputs, inputs) {
            tensors.push((format!("model.layers.0.{name}.{suffix}"), dtype, shape, bytes));
        }
    }
    save(&dir.join("model.safetensors"), &tensors);
}

fn bytes(rng: &mut Rng, n: usize) -> Vec<u8> {
    (0..n).map(|_| rng.below(256) as u8).collect()
}

/// GPTQ's, of 4 bits with an order of columns.
fn make_gptq(dir: &Path) {
    let q = json!({"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": true, "sym": true});
    make(dir, ("quantization_config", q), |rng, outputs, inputs| {
        let groups = inputs / 16;
        let order = (0..inputs).flat_map(|c| ((c % groups) as i32).to_le_bytes()).collect();
        vec![
            ("qweight", Dtype::I32, vec![inputs / 8, outputs], bytes(rng, inputs * outputs / 2)),
            ("qzeros", Dtype::I32, vec![groups, outputs / 8], vec![0x77; groups * outputs / 2]),
            // 0.0391 in f16.
            ("scales", Dtype::F16, vec![groups, outputs], [0x01, 0x29].repeat(groups * outputs)),
            ("g_idx", Dtype::I32, vec![inputs], order),
        ]
    });
}

/// MLX's, of 4 bits in groups of 32, and ModelOpt's nvfp4.
fn make_mlx(dir: &Path) {
    make(dir, ("quantization", json!({"group_size": 32, "bits": 4})), |rng, outputs, inputs| {
        let groups = outputs * inputs / 32;
        vec![
            ("weight", Dtype::U32, vec![outputs, inputs / 8], bytes(rng, outputs * inputs / 2)),
            ("scales", Dtype::BF16, vec![outputs, inputs / 32], [0x20, 0x3d].repeat(groups)),
            // -0.3 and its neighbours.
            ("biases", Dtype::BF16, vec![outputs, inputs / 32], [0x9a, 0xbe].repeat(groups)),
        ]
    });
}

fn make_nvfp4(dir: &Path) {
    let q = json!({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16});
    make(dir, ("quantization_config", q), |rng, outputs, inputs| {
        vec![
            ("weight", Dtype::U8, vec![outputs, inputs / 2], bytes(rng, outputs * inputs / 2)),
            ("weight_scale", Dtype::F8_E4M3, vec![outputs, inputs / 16], vec![0x38; outputs * inputs / 16]),
            ("weight_scale_2", Dtype::F32, vec![], 0.1f32.to_le_bytes().to_vec()),
        ]
    });
}

/// An adapter of rank 2 for q and down.
fn make_adapter(dir: &Path, base: &str) {
    std::fs::create_dir_all(dir).unwrap();
    let config = json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": 2, "lora_alpha": 4,
        "bias": "none", "target_modules": ["q_proj", "down_proj"],
    });
    std::fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
    let mut rng = Rng::new(6);
    let mut tensors: Tensors = vec![];
    for (name, outputs, inputs) in [("self_attn.q_proj", HIDDEN, HIDDEN), ("mlp.down_proj", HIDDEN, FFN)] {
        let module = format!("base_model.model.model.layers.0.{name}");
        let mut add = |half: &str, rows, cols, bytes| {
            tensors.push((format!("{module}.{half}.weight"), Dtype::F32, vec![rows, cols], bytes));
        };
        add("lora_A", 2, inputs, floats(&mut rng, 2 * inputs, 0.3));
        add("lora_B", outputs, 2, floats(&mut rng, 2 * outputs, 0.3));
    }
    save(&dir.join("adapter_model.safetensors"), &tensors);
}

struct Home(TempDir);

impl Home {
    fn new() -> Home {
        Home(TempDir::new().unwrap())
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    fn lacuna(&self, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lacuna"));
        command.args(args).args(["--cache-dir", &self.path("cache"), "--offline"]).output().unwrap()
    }

    /// The one JSON object that a command printed, and the status that was expected.
    fn object(&self, status: i32, args: &[&str]) -> Value {
        let out = self.lacuna(&[args, &["--json"]].concat());
        assert_eq!(out.status.code(), Some(status), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
        serde_json::from_slice(&out.stdout).unwrap()
    }

    fn refusal(&self, status: i32, args: &[&str]) -> String {
        let out = self.lacuna(args);
        let said = String::from_utf8(out.stderr).unwrap();
        assert_eq!(out.status.code(), Some(status), "{args:?}: {said}");
        said
    }
}

#[test]
fn every_verb_takes_a_gptq_model() {
    let home = Home::new();
    let (gptq, out) = (home.path("gptq"), home.path("out"));
    make_gptq(Path::new(&gptq));
    let seen = home.object(0, &["inspect", &gptq]);
    assert_eq!(seen["broken"], json!([]));
    assert_eq!(seen["problems"], json!([]), "zeros in the middle are what symmetry means");
    assert_eq!(seen["quantized"]["producer"], "gptq");
    assert_eq!(seen["roles"]["attn.q"]["codecs"], json!({"int4 g16 by index": 1}));
    // One of sixteen codes is zero.
    let sparsity = seen["roles"]["ffn.down"]["sparsity"].as_f64().unwrap();
    assert!((0.03..0.1).contains(&sparsity), "{sparsity}");
    let ppl = |args: &[&str]| {
        let all = [&["eval"], args, &["--ctx", "64", "--windows", "2"]].concat();
        home.object(0, &all)["ppl"].as_f64().unwrap()
    };
    let dense = ppl(&[&gptq]);
    assert!(dense.is_finite());
    let text = home.object(0, &["generate", &gptq, "-p", "a", "-n", "4", "--temp", "0"]);
    assert!(text["tokens"].as_u64().unwrap() > 0);
    let bench = home.object(0, &["bench", &gptq, "--prompt", "8", "--gen", "4", "--reps", "1"]);
    assert!(bench["decode_tok_s"].as_f64().unwrap() > 0.0);
    // What no step touches keeps its codes: the compressed model is the same one.
    let steps = [
        "-r",
        "rtn",
        "--set",
        "quantize.targets=[\"embed\"]",
        "--set",
        "quantize.bits=8",
        "--set",
        "quantize.group=16",
        "--gate",
        "off",
    ];
    home.object(0, &[&["compress", &gptq, "-o", &out], &steps[..]].concat());
    let after = home.object(0, &["inspect", &out]);
    assert_eq!(after["roles"]["attn.q"]["codecs"], json!({"int4 g16 by index": 1}));
    assert!((ppl(&[&out]) / dense - 1.0).abs() < 0.05);
}

#[test]
fn models_of_other_tools_run_and_convert() {
    let home = Home::new();
    for (name, make, codec) in [("mlx", make_mlx as fn(&Path), "int4 row min f16"), ("nvfp4", make_nvfp4, "table4 g16")]
    {
        let (dir, out) = (home.path(name), home.path(&format!("{name}.gguf")));
        make(Path::new(&dir));
        let seen = home.object(0, &["inspect", &dir]);
        assert_eq!((&seen["broken"], &seen["problems"]), (&json!([]), &json!([])), "{name}");
        assert_eq!(seen["roles"]["attn.q"]["codecs"], json!({codec: 1}), "{name}");
        let text = home.object(0, &["generate", &dir, "-p", "a", "-n", "4", "--temp", "0"]);
        assert!(text["tokens"].as_u64().unwrap() > 0, "{name}");
        let ppl =
            |model: &str| home.object(0, &["eval", model, "--ctx", "64", "--windows", "2"])["ppl"].as_f64().unwrap();
        home.object(0, &["convert", &dir, "--to", "gguf", "--type", "f32", "-o", &out, "--no-kl"]);
        assert!((ppl(&out) / ppl(&dir) - 1.0).abs() < 1e-3, "{name}");
    }
    // A model in parts becomes one.
    let (parts, one) = (golden("gguf/parts-00002-of-00003.gguf").display().to_string(), home.path("one.gguf"));
    home.object(0, &["convert", &parts, "--to", "gguf", "-o", &one, "--no-kl"]);
    let seen = home.object(0, &["inspect", &one]);
    assert_eq!(seen["roles"]["ffn.up"]["codecs"], json!({"table4 row": 2}));
    assert_eq!(seen["roles"]["ffn.down"]["codecs"], json!({"q4_k": 1, "q6_k": 1}));
}

#[test]
fn an_adapter_goes_on_any_model() {
    let home = Home::new();
    let (base, adapter, lost) = (home.path("base"), home.path("adapter"), home.path("lost"));
    make_gptq(Path::new(&base));
    make_adapter(Path::new(&adapter), "../base");
    make_adapter(Path::new(&lost), "somebody/else");
    let ppl = |args: &[&str]| home.object(0, &[&["eval", "--ctx", "64", "--windows", "2"], args].concat());
    let number = |v: &Value, key: &str| v[key].as_f64().unwrap();
    let kept = ppl(&[&base, "--adapter", &adapter, "--against", &base]);
    assert!(number(&kept, "kl_mean") > 1e-3, "the adapter changes the model, and not the one it is set beside: {kept}");
    let merged = ppl(&[&base, "--adapter", &adapter, "--merge"]);
    let by_name = ppl(&[&adapter]);
    assert_eq!(kept["ppl"], by_name["ppl"]);
    assert!((number(&merged, "ppl") / number(&kept, "ppl") - 1.0).abs() < 1e-2, "{merged} {kept}");
    let seen = home.object(0, &["inspect", &adapter]);
    assert_eq!(seen["roles"]["attn.q"]["codecs"], json!({"int4 g16 by index + lowrank 2 (f32)": 1}));
    let seen = home.object(0, &["inspect", &adapter, "--merge"]);
    assert_eq!(seen["roles"]["attn.q"]["codecs"], json!({"f16": 1}));
    let said = home.refusal(2, &["inspect", &lost]);
    assert!(said.contains("somebody/else") && said.contains("--adapter"), "{said}");
    assert!(home.refusal(2, &["inspect", &adapter, "--adapter", &adapter]).contains("is an adapter"));
    assert!(home.refusal(2, &["inspect", &base, "--merge"]).contains("no adapter"));
    assert!(home.refusal(2, &["doctor", "--adapter", &adapter]).contains("no model"));
}

#[test]
fn inspect_tells_what_is_wrong() {
    let home = Home::new();
    let copy = |from: &str, name: &str| {
        let to = PathBuf::from(home.path(name));
        std::fs::create_dir_all(&to).unwrap();
        for file in ["config.json", "model.safetensors"] {
            std::fs::copy(golden(from).join(file), to.join(file)).unwrap();
        }
        to
    };
    let path = |p: &Path| p.display().to_string();
    // A tokenizer of 600 tokens beside an embedding of 64 rows.
    let small = copy("foreign/sparse24", "small");
    add_tokenizer(&small);
    let seen = home.object(0, &["inspect", &path(&small)]);
    assert_eq!(seen["broken"], json!([]));
    let what = seen["problems"][0]["what"].as_str().unwrap();
    assert!(what.contains("600 tokens") && what.contains("64 rows"), "{what}");
    assert_eq!(seen["roles"]["ffn.up"]["pattern"], "2:4");
    assert_eq!(seen["roles"]["ffn.up"]["sparsity"], 0.5);
    assert_eq!(seen["roles"]["attn.norm"]["pattern"], Value::Null);
    // A value that is not finite.
    let sick = copy("foreign/peft_base", "sick");
    let file = std::fs::read(sick.join("model.safetensors")).unwrap();
    let st = safetensors::SafeTensors::deserialize(&file).unwrap();
    let at = st.tensor("model.layers.0.mlp.up_proj.weight").unwrap().data().as_ptr() as usize - file.as_ptr() as usize;
    let mut bad = file.clone();
    bad[at + 4 * 33..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(sick.join("model.safetensors"), bad).unwrap();
    let seen = home.object(1, &["inspect", &path(&sick)]);
    let what = seen["broken"][0].as_str().unwrap();
    assert!(what.contains("layers.0.ffn.up") && what.contains("row 1, column 1"), "{what}");
    assert_eq!(home.object(0, &["inspect", &path(&sick), "--quick"])["broken"], json!([]));
    // Layers that were counted before some were taken out.
    let cut = copy("tiny/llama", "cut");
    let mut config: Value = serde_json::from_slice(&std::fs::read(cut.join("config.json")).unwrap()).unwrap();
    config["num_hidden_layers"] = json!(3);
    std::fs::write(cut.join("config.json"), config.to_string()).unwrap();
    let seen = home.object(1, &["inspect", &path(&cut)]);
    assert_eq!(seen["problems"].as_array().unwrap().len(), 1, "{}", seen["problems"]);
    assert!(seen["problems"][0]["help"].as_str().unwrap().contains("lacuna repair"));
    let out = home.lacuna(&["inspect", &path(&cut)]);
    let words = String::from_utf8(out.stdout).unwrap();
    assert!(words.contains("what helps: lacuna repair") && words.contains(&path(&cut)), "{words}");
}
