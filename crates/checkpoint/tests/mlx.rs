//! Experts as MLX stacks them, `[experts, outputs, words]` with scales and biases, in files that the test writes itself:
//! every expert decodes to what its codes, scales and biases say, and what does not fit is refused by name.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use half::{bf16, f16};
use lacuna_arch as arch;
use lacuna_base::Rng;
use lacuna_checkpoint::open;
use lacuna_format::Weights;
use lacuna_spec::{Part, Place, Role, Spec};
use serde_json::{Map, Value, json};

/// Type, shape and bytes.
type Tensor = (&'static str, Vec<usize>, Vec<u8>);

/// A file in the making, and what each place must decode to.
#[derive(Default)]
struct Written {
    tensors: BTreeMap<String, Tensor>,
    values: HashMap<Place, Vec<f32>>,
}

fn save(dir: &Path, config: &Value, tensors: &BTreeMap<String, Tensor>) {
    let (mut header, mut data) = (Map::new(), Vec::new());
    for (name, (dtype, shape, bytes)) in tensors {
        let from = data.len();
        data.extend_from_slice(bytes);
        header.insert(name.clone(), json!({ "dtype": dtype, "shape": shape, "data_offsets": [from, data.len()] }));
    }
    let header = Value::Object(header).to_string();
    let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
    std::fs::write(dir.join("model.safetensors"), file).unwrap();
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
}

/// Codes one after the other, the lowest bits first.
fn words(codes: &[u32], bits: usize) -> Vec<u8> {
    let mut out = vec![0u8; codes.len() * bits / 8];
    for (i, code) in codes.iter().enumerate() {
        for b in 0..bits {
            let at = i * bits + b;
            out[at / 8] |= (((code >> b) & 1) as u8) << (at % 8);
        }
    }
    out
}

/// Random matrices below each other, as weight, scales and biases, and their values.
fn affine(rng: &mut Rng, rows: usize, cols: usize, bits: usize, group: usize) -> ([Vec<u8>; 3], Vec<f32>) {
    let codes: Vec<u32> = (0..rows * cols).map(|_| rng.below(1 << bits) as u32).collect();
    let groups = rows * cols / group;
    // Of one size, so that a product and a sum lose nothing in f32.
    let mut number = || f16::from_f32((1.0 + rng.below(1024) as f32 / 1024.0) / 16.0);
    let scales: Vec<f16> = (0..groups).map(|i| if i % 3 == 0 { -number() } else { number() }).collect();
    let biases: Vec<f16> = (0..groups).map(|i| if i % 2 == 0 { -number() } else { number() }).collect();
    let value = |(i, code): (usize, &u32)| scales[i / group].to_f32() * *code as f32 + biases[i / group].to_f32();
    let bytes = |all: &[f16]| all.iter().flat_map(|x| x.to_le_bytes()).collect();
    ([words(&codes, bits), bytes(&scales), bytes(&biases)], codes.iter().enumerate().map(value).collect())
}

/// The same in MXFP4: two codes a byte, the low one first, and powers of two for 32 columns.
fn mxfp4(rng: &mut Rng, rows: usize, cols: usize) -> ([Vec<u8>; 2], Vec<f32>) {
    let e2m1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let codes: Vec<u32> = (0..rows * cols).map(|_| rng.below(16) as u32).collect();
    let exponents: Vec<u8> = (0..rows * cols / 32).map(|_| 120 + rng.below(9) as u8).collect();
    let value = |(i, code): (usize, &u32)| {
        let sign = if code & 8 > 0 { -1.0 } else { 1.0 };
        sign * e2m1[(code & 7) as usize] * 2f32.powi(i32::from(exponents[i / 32]) - 127)
    };
    ([words(&codes, 4), exponents.clone()], codes.iter().enumerate().map(value).collect())
}

fn floats(rng: &mut Rng, n: usize) -> (Vec<u8>, Vec<f32>) {
    let all: Vec<bf16> = (0..n).map(|_| bf16::from_f32(rng.f32() - 0.5)).collect();
    (all.iter().flat_map(|x| x.to_le_bytes()).collect(), all.iter().map(|x| x.to_f32()).collect())
}

/// How the experts are stored.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Form {
    Affine(usize, usize),
    Mxfp4,
    Plain,
}

/// A model with its experts under `holder` in each layer.
fn write(spec: &Spec, holder: &str, form: Form) -> Written {
    let (mut out, mut rng) = (Written::default(), Rng::new(11));
    let mut done: Vec<(u32, Role, Part)> = Vec::new();
    for place in spec.places() {
        let (rows, cols) = spec.shape(&place).unwrap();
        let Some(_) = place.expert else {
            let name = arch::sources(spec, &place).swap_remove(0).name;
            let (bytes, values) = floats(&mut rng, rows * cols);
            let shape = if rows == 1 { vec![cols] } else { vec![rows, cols] };
            out.tensors.insert(name, ("BF16", shape, bytes));
            out.values.insert(place, values);
            continue;
        };
        let layer = place.layer.unwrap();
        if done.contains(&(layer, place.role, place.part)) {
            continue;
        }
        done.push((layer, place.role, place.part));
        let part = match place.role {
            Role::Gate => "gate_proj",
            Role::Up => "up_proj",
            _ => "down_proj",
        };
        let name = |end: &str| format!("model.layers.{layer}.{holder}.{part}.{end}");
        let experts = spec.layers[layer as usize].ffn.as_ref().unwrap().experts.unwrap().count;
        let high = experts * rows;
        let values = match form {
            _ if place.part == Part::Bias => {
                let (bytes, values) = floats(&mut rng, high * cols);
                out.tensors.insert(name("bias"), ("BF16", vec![experts, cols], bytes));
                values
            }
            Form::Plain => {
                let (bytes, values) = floats(&mut rng, high * cols);
                out.tensors.insert(name("weight"), ("BF16", vec![experts, rows, cols], bytes));
                values
            }
            Form::Affine(bits, group) => {
                let ([weight, scales, biases], values) = affine(&mut rng, high, cols, bits, group);
                out.tensors.insert(name("weight"), ("U32", vec![experts, rows, cols * bits / 32], weight));
                out.tensors.insert(name("scales"), ("F16", vec![experts, rows, cols / group], scales));
                out.tensors.insert(name("biases"), ("F16", vec![experts, rows, cols / group], biases));
                values
            }
            Form::Mxfp4 => {
                let ([weight, scales], values) = mxfp4(&mut rng, high, cols);
                out.tensors.insert(name("weight"), ("U32", vec![experts, rows, cols / 8], weight));
                out.tensors.insert(name("scales"), ("U8", vec![experts, rows, cols / 32], scales));
                values
            }
        };
        for (e, values) in values.chunks(rows * cols).enumerate() {
            out.values.insert(Place { expert: Some(e as u32), ..place }, values.to_vec());
        }
    }
    out
}

/// A tiny model's configuration with widths that MLX's groups divide.
fn config(name: &str, form: Form) -> Value {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tiny").join(name);
    let mut c: Value = serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap();
    let key = if name == "qwen3_moe" { "moe_intermediate_size" } else { "intermediate_size" };
    (c[key], c["hidden_size"]) = (json!(64), json!(32));
    // What GPT-OSS's own files say of their experts is not so here.
    c.as_object_mut().unwrap().remove("quantization_config");
    match form {
        Form::Plain => {}
        Form::Affine(bits, group) => c["quantization"] = json!({ "group_size": group, "bits": bits }),
        Form::Mxfp4 => c["quantization"] = json!({ "group_size": 32, "bits": 4, "mode": "mxfp4" }),
    }
    c
}

#[test]
fn stacked_experts_are_read_exactly() {
    let models = [
        ("qwen3_moe", "mlp.switch_mlp"),
        ("mixtral", "block_sparse_moe.switch_mlp"),
        ("olmoe", "mlp.switch_mlp"),
        ("granitemoe", "block_sparse_moe.switch_mlp"),
        ("gpt_oss", "mlp.experts"),
    ];
    for (name, holder) in models {
        for form in [Form::Affine(4, 32), Form::Affine(3, 32), Form::Affine(8, 16), Form::Mxfp4, Form::Plain] {
            let said = config(name, form);
            let spec = arch::from_config(&said).unwrap();
            let written = write(&spec, holder, form);
            let dir = tempfile::tempdir().unwrap();
            save(dir.path(), &said, &written.tensors);
            let c = open(dir.path()).unwrap_or_else(|e| panic!("{name}, {form:?}: {e}"));
            assert!(c.unused().is_empty() && c.remarks().is_empty(), "{name}, {form:?}: {:?}", c.remarks());
            let mut experts = 0;
            for (place, want) in &written.values {
                let stored = c.get(place).unwrap().unwrap();
                stored.check().unwrap();
                let have = stored.to_mat().into_vec();
                let same = have.iter().zip(want).all(|(a, b)| a == b);
                assert!(same && have.len() == want.len(), "{name}, {form:?}: {place}");
                let codes = place.expert.is_some() && place.part == Part::Weight && form != Form::Plain;
                if codes {
                    let codec = stored.codec_name();
                    let want = if form == Form::Mxfp4 { "table4" } else { "int" };
                    assert!(codec.starts_with(want), "{name}, {form:?}: {place} is {codec}: codes stay codes");
                }
                experts += usize::from(place.expert.is_some());
            }
            assert!(experts >= 24, "{experts}");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let form = Form::Affine(4, 32);
    let said = config("qwen3_moe", form);
    let spec = arch::from_config(&said).unwrap();
    let written = write(&spec, "mlp.switch_mlp", form);
    let refused = |said: &Value, change: &dyn Fn(&mut BTreeMap<String, Tensor>), words: &[&str]| {
        let mut tensors = written.tensors.clone();
        change(&mut tensors);
        let dir = tempfile::tempdir().unwrap();
        save(dir.path(), said, &tensors);
        let e = open(dir.path()).unwrap_err().to_string();
        assert!(words.iter().all(|w| e.contains(w)), "{e}: {words:?}");
    };
    let name = |end: &str| format!("model.layers.1.mlp.switch_mlp.up_proj.{end}");
    let shape = |end: &'static str, shape: &'static [usize]| {
        move |t: &mut BTreeMap<String, Tensor>| t.get_mut(&name(end)).unwrap().1 = shape.to_vec()
    };
    // 4 experts of 64 rows and 32 columns.
    refused(&said, &|t| drop(t.remove(&name("scales"))), &["up_proj.weight", "scales"]);
    refused(&said, &|t| drop(t.remove(&name("biases"))), &["up_proj.weight", "biases"]);
    refused(&said, &shape("weight", &[256, 4]), &["up_proj"]);
    refused(&said, &shape("scales", &[2, 128, 1]), &["up_proj.scales", "4 experts"]);
    refused(&said, &shape("biases", &[256, 1]), &["up_proj.biases", "4 experts"]);
    // As many values with the axes in another order.
    let turned = |t: &mut BTreeMap<String, Tensor>| {
        shape("weight", &[64, 4, 4])(t);
        shape("scales", &[64, 4, 1])(t);
        shape("biases", &[64, 4, 1])(t);
    };
    refused(&said, &turned, &["up_proj.weight", "[64, 4, 32]", "[64, 32]"]);
    for count in [3usize, 5] {
        let mut other = said.clone();
        other["num_experts"] = json!(count);
        // With a router of as many experts.
        let router = |t: &mut BTreeMap<String, Tensor>| {
            for layer in 0..2 {
                let name = format!("model.layers.{layer}.mlp.gate.weight");
                t.insert(name, ("BF16", vec![count, 32], vec![0; count * 64]));
            }
        };
        refused(&other, &router, &["switch_mlp"]);
    }
    // A stack where one matrix is meant.
    let one = |t: &mut BTreeMap<String, Tensor>| {
        let q = "model.layers.0.self_attn.q_proj".to_owned();
        let (rows, cols) = spec.shape(&Place::layer(0, Role::Q)).unwrap();
        let ([weight, scales, biases], _) = affine(&mut Rng::new(3), rows, cols, 4, 32);
        t.insert(format!("{q}.weight"), ("U32", vec![2, rows / 2, cols / 8], weight));
        t.insert(format!("{q}.scales"), ("F16", vec![2, rows / 2, cols / 32], scales));
        t.insert(format!("{q}.biases"), ("F16", vec![2, rows / 2, cols / 32], biases));
    };
    refused(&said, &one, &["q_proj.weight", "[2, 16, 32]", "[32, 32]"]);
    // No bytes at all are no reason to panic.
    refused(&said, &|t| *t.get_mut(&name("weight")).unwrap() = ("U32", vec![0, 64, 4], Vec::new()), &["up_proj"]);
}
