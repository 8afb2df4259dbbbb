//! The whole walk on tiny real checkpoints: every carried recipe, resumed runs, ceilings, refusals.

use std::fs;
use std::path::{Path, PathBuf};

use lacuna_base::Rng;
use lacuna_checkpoint::{Checkpoint, open};
use lacuna_compress::{CompressError, Options, Outcomes, Progress, Quiet, Recipe, Shaped, compress, forms};
use lacuna_format::Weights;
use lacuna_model::{Batch, ContiguousKv, Decoder, LoadOptions, NoTap};
use lacuna_spec::{Part, Place, QkNorm, Role, Spec};
use proptest::prelude::*;
use serde_json::json;

fn tiny(name: &str) -> Checkpoint {
    open(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tiny").join(name)).unwrap()
}

fn tokens(vocab: usize) -> Vec<u32> {
    let mut rng = Rng::new(5);
    (0..400).map(|_| rng.below(vocab) as u32).collect()
}

fn recipe(text: &str) -> Recipe {
    let sets = ["calibration.samples=6".to_owned(), "calibration.seq_len=32".to_owned()];
    Recipe::parse(text, &lacuna_methods::registry(), &sets).unwrap()
}

fn options(out: &Path) -> Options<'_> {
    Options {
        out,
        overwrite: false,
        resume: false,
        scratch: None,
        max_ram: None,
        bos: None,
        imatrix: None,
        source: json!("tiny"),
    }
}

fn run(model: &Checkpoint, text: &str, out: &Path) -> Result<Outcomes, CompressError> {
    compress(model, &tokens(model.spec().vocab), &recipe(text), &options(out), &mut Quiet)
}

fn step(body: &str) -> String {
    format!("version = 1\n[[step]]\n{body}\n")
}

fn files(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut v: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|f| f.unwrap().path())
        .map(|p| (p.file_name().unwrap().to_string_lossy().into_owned(), fs::read(&p).unwrap()))
        .collect();
    v.sort();
    v
}

#[test]
fn every_carried_recipe_saves_a_model_that_opens() {
    let dir = tempfile::tempdir().unwrap();
    let recipes = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes");
    let mut names: Vec<PathBuf> = fs::read_dir(recipes).unwrap().map(|f| f.unwrap().path()).collect();
    names.sort();
    for path in names {
        // The FFNs here are narrower than the multiples of channels that real models keep, and than groups of a row.
        let mut text = fs::read_to_string(&path)
            .unwrap()
            .replace("align = 32", "align = 4")
            .replace("1x16", "1x8")
            .replace("16x1", "8x1");
        // Nor do they divide into blocks of 256, and `ffn.down` not into those of 32.
        if text.contains("\ntype = ") {
            text = ["q2_k", "q4_k"].iter().fold(text, |t, k| t.replace(k, "q5_1"));
            let aimed = |step: &str| match step.contains("\ntype = ") && !step.contains("\ntargets = ") {
                true => format!("{step}\ntargets = [\"attn.*\", \"ffn.up\"]\n"),
                false => step.to_owned(),
            };
            text = text.split("[[step]]").map(aimed).collect::<Vec<_>>().join("[[step]]");
        }
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        for model in ["llama", "qwen3_moe", "gpt2"] {
            let source = tiny(model);
            let out = dir.path().join(format!("{model}-{name}"));
            let done = match run(&source, &text, &out) {
                // Named by the family: norms that subtract the mean do not commute with rotations.
                Err(e) if model == "gpt2" && e.to_string().contains("cannot be turned") => continue,
                // These models have no tokenizer that could lose tokens; `tests/vocabulary.rs` has some.
                Err(e) if e.to_string().contains("the vocabulary cannot change: no tokenizer") => continue,
                done => done.unwrap_or_else(|e| panic!("{name} on {model}: {e}")),
            };
            let packed = open(&done.path).unwrap();
            let steps = recipe(&text);
            // What whole parts dropped save is not told, nor which experts no token reaches.
            if !steps.steps.iter().any(|s| s.is_model_wide()) && model != "qwen3_moe" {
                let told = forms(&source, &steps).unwrap();
                let told: f64 = told.iter().map(|f| f.sample.bytes() as f64 * f.scale * f.matrices as f64).sum();
                let matrix = |p: &&Place| p.part == Part::Weight && (p.role.is_linear() || p.role == Role::Embed);
                let made: u64 = done.tensors.iter().filter(|t| matrix(&&t.place)).map(|t| t.bytes_after).sum();
                // FineQuant's groups may be larger than the smallest allowed, which is told.
                let most = if name.starts_with("finequant") { 1.15 } else { 1.05 };
                let ratio = told / made as f64;
                assert!(ratio > 0.95 && ratio < most, "{name} on {model}: told {told}, made {made}");
            }
            for place in done.spec.places() {
                let s = packed.get(&place).unwrap().unwrap();
                assert!(s.to_mat().data().iter().all(|x| x.is_finite()), "{name} on {model}: {place}");
            }
            assert_eq!(
                done.bytes,
                done.spec.places().iter().map(|p| packed.get(p).unwrap().unwrap().bytes()).sum::<u64>()
            );
        }
    }
}

#[test]
fn random_weights_in_a_shape_have_the_recipes_forms() {
    for model in ["llama", "qwen3_moe", "gpt2"] {
        let spec = tiny(model).spec().clone();
        let text =
            step("method = \"rtn\"\ntargets = [\"ffn.*\"]\nbits = 4\ngroup = 8\nsymmetric = true\nscale = \"f16\"");
        let shaped = Shaped::new(spec.clone(), &recipe(&text)).unwrap();
        for place in spec.places() {
            let s = shaped.get(&place).unwrap().unwrap();
            assert_eq!(Some((s.rows, s.cols)), spec.shape(&place), "{model}: {place}");
            let touched = place.part == Part::Weight && matches!(place.role, Role::Gate | Role::Up | Role::Down);
            assert_eq!(s.codec_name().contains("int4"), touched, "{model}: {place} is {}", s.codec_name());
            assert!(s.to_mat().data().iter().all(|x| x.is_finite()));
        }
        // What would be left out of the clock in silence is refused.
        let drop = recipe(&step("name = \"away\"\nmethod = \"llm-drop\"\npart = \"block\"\ncount = 1"));
        let said = Shaped::new(spec, &drop).err().expect("refused").to_string();
        assert!(said.contains("away") && said.contains("real model"), "{said}");
    }
}

#[test]
fn untouched_tensors_keep_their_bytes_and_pruned_ones_their_zeros() {
    let dir = tempfile::tempdir().unwrap();
    let source = tiny("llama_bf16");
    let text = "version = 1\n[[step]]\nmethod = \"wanda\"\ntargets = [\"ffn.*\"]\nsparsity = 0.5\n\
                [[step]]\nmethod = \"gptq\"\ntargets = [\"ffn.*\"]\nbits = 4\ngroup = 16\n";
    let done = run(&source, text, &dir.path().join("m")).unwrap();
    let packed = open(&done.path).unwrap();
    for place in source.spec().places() {
        let (a, b) = (source.get(&place).unwrap().unwrap(), packed.get(&place).unwrap().unwrap());
        if matches!(place.role, Role::Gate | Role::Up | Role::Down) {
            let w = b.to_mat();
            for r in 0..w.rows() {
                let zeros = w.row(r).iter().filter(|x| **x == 0.0).count();
                assert!(zeros >= w.cols() / 2, "{place} row {r}: {zeros} zeros");
            }
            assert!(b.codec_name().contains("int4"), "{}", b.codec_name());
        } else {
            assert_eq!(a, b, "{place}");
        }
    }
}

#[test]
fn the_same_bytes_whatever_the_threads_and_the_ceiling() {
    let dir = tempfile::tempdir().unwrap();
    let source = tiny("llama");
    let text = step("method = \"sparsegpt\"\nsparsity = 0.5");
    let plain = run(&source, &text, &dir.path().join("a")).unwrap();
    let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let alone = one.install(|| run(&source, &text, &dir.path().join("b"))).unwrap();
    assert_eq!(files(&plain.path), files(&alone.path));
    // The floor is refused with a number; that number works, and spills.
    let tokens = tokens(source.spec().vocab);
    let recipe = recipe(&text);
    let out = dir.path().join("c");
    let low = Options { max_ram: Some(1 << 20), ..options(&out) };
    let floor = match compress(&source, &tokens, &recipe, &low, &mut Quiet) {
        Err(CompressError::Memory { floor, .. }) => lacuna_base::units::parse_bytes(&floor).unwrap(),
        other => panic!("a ceiling of 1 MiB: {:?}", other.map(|o| o.path)),
    };
    let at_floor = Options { max_ram: Some(floor + (8 << 20)), ..options(&out) };
    let spilled = compress(&source, &tokens, &recipe, &at_floor, &mut Quiet).unwrap();
    assert_eq!(files(&plain.path), files(&spilled.path));
}

/// Stops the walk, as a signal would, once so many blocks are done.
struct StopAfter(u64);

impl Progress for StopAfter {
    fn phase(&mut self, _: &str, _: u64) {}
    fn step(&mut self, done: u64, _: &str) {
        assert!(done < self.0, "stopped");
    }
}

#[test]
fn a_killed_run_resumes_to_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let source = tiny("llama");
    let text = step("method = \"sparsegpt\"\nsparsity = 0.5");
    let whole = run(&source, &text, &dir.path().join("whole")).unwrap();
    let tokens = tokens(source.spec().vocab);
    let recipe = recipe(&text);
    let out = dir.path().join("cut");
    let killed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let _ = compress(&source, &tokens, &recipe, &options(&out), &mut StopAfter(1));
    }));
    assert!(killed.is_err() && !out.exists());
    let resume = Options { resume: true, ..options(&out) };
    let other = self::recipe(&step("method = \"sparsegpt\"\nsparsity = 0.6"));
    let refused = compress(&source, &tokens, &other, &resume, &mut Quiet).err().unwrap();
    assert!(refused.to_string().contains("another recipe"), "{refused}");
    let done = compress(&source, &tokens, &recipe, &resume, &mut Quiet).unwrap();
    assert_eq!(files(&whole.path), files(&done.path));
}

#[test]
fn later_blocks_see_the_stored_form_of_earlier_ones() {
    let dir = tempfile::tempdir().unwrap();
    let source = tiny("llama");
    // Ruining the first block must change what the second is calibrated on.
    let second = "method = \"sparsegpt\"\ntargets = [\"layers.1.*\"]\nsparsity = 0.5\n";
    let alone = run(&source, &step(second), &dir.path().join("a")).unwrap();
    let both = format!(
        "{}[[step]]\nname = \"ruin\"\nmethod = \"magnitude\"\ntargets = [\"layers.0.*\"]\nsparsity = 0.9\n",
        step(second)
    );
    let ruined = run(&source, &both, &dir.path().join("b")).unwrap();
    let q = Place::layer(1, Role::Q);
    let get = |o: &Outcomes| open(&o.path).unwrap().get(&q).unwrap().unwrap();
    assert_ne!(get(&alone), get(&ruined));
}

#[test]
fn dropped_parts_leave_the_network() {
    let dir = tempfile::tempdir().unwrap();
    let source = tiny("llama");
    let done =
        run(&source, &step("method = \"llm-drop\"\npart = \"attention\"\ncount = 1"), &dir.path().join("m")).unwrap();
    let packed = open(&done.path).unwrap();
    assert_eq!(packed.spec().layers.iter().filter(|l| l.attn.is_none()).count(), 1);
    assert!(done.notes.iter().any(|n| n.contains("dropped")));
}

/// The logits of a text.
fn logits(model: &Checkpoint) -> Vec<f32> {
    let decoder = Decoder::load(model, &LoadOptions::default()).unwrap();
    let ids: Vec<u32> = (0..24).map(|i| i * 7 % model.spec().vocab as u32).collect();
    let mut kv = ContiguousKv::new(model.spec(), 1);
    let hidden = decoder.forward(&ids, &Batch::one(0, 0..ids.len()), &mut kv, &mut NoTap).unwrap();
    decoder.logits(hidden.view()).data().to_vec()
}

fn structures() -> Vec<&'static str> {
    let methods = lacuna_methods::registry().methods.into_iter();
    methods.filter(|m| m.card.verb == "structure").map(|m| m.card.name).collect()
}

fn structure(method: &str, sparsity: f64, keys: &str) -> String {
    step(&format!("method = \"{method}\"\nsparsity = {sparsity:?}\n{keys}"))
}

fn architectures() -> Vec<String> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tiny");
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|f| f.unwrap().file_name().to_string_lossy().into_owned()).collect();
    // Networks with recurrent mixers, and those whose layers read more than the stream, keep their structure: such
    // steps refuse them by name.
    names.retain(|name| {
        let spec = tiny(name).spec().clone();
        let blocks = spec.layers.iter().all(|l| {
            let plain = l.attn.as_ref().is_none_or(|a| a.kv_from.is_none() && !a.v_is_k && !a.gate);
            plain && l.mixer.is_none() && l.laurel.is_none() && !l.output_scale
        });
        blocks && spec.layer_inputs.is_none() && spec.altup.is_none()
    });
    names.sort();
    names
}

/// What a structure step may take: of some networks no heads, and that is said. Whole recipes ask for both.
fn parts(source: &Checkpoint, dir: &Path) -> &'static str {
    let bound = |a: &lacuna_spec::AttnSpec| {
        (a.qk_norm && !matches!(a.qk_norm_over, QkNorm::Head | QkNorm::Plain)) || a.alibi.is_some()
    };
    if !source.spec().layers.iter().any(|l| l.attn.as_ref().is_some_and(bound)) {
        return "";
    }
    let said = run(source, &structure("random", 0.2, "align = 2"), &dir.join("refused")).err().expect("refused");
    assert!(said.to_string().contains("heads cannot go"), "{said}");
    "parts = [\"channels\"]\n"
}

/// What heads and channels have in all: their matrices and what belongs to them of biases.
fn of_units(spec: &Spec) -> f64 {
    let mine = |p: &&Place| match p.role {
        Role::Q | Role::K | Role::V | Role::Gate | Role::Up => true,
        Role::O | Role::Down => p.part == Part::Weight,
        _ => false,
    };
    spec.places().iter().filter(mine).map(|p| spec.shape(p).unwrap()).map(|(r, c)| (r * c) as f64).sum()
}

/// Every matrix of a latent, of a head's own, of experts and the shared one, of a layer's input is met by its own inputs, and by nothing else
/// of what its method asks for.
#[test]
fn latents_shared_experts_and_heads_are_quantized_and_pruned() {
    let dir = tempfile::tempdir().unwrap();
    let mixtures = ["qwen2_moe", "gpt_oss", "glm4_moe", "deepseek_v2", "deepseek_v3", "ernie4_5_moe"];
    for name in mixtures.into_iter().chain(["llama4", "gemma4", "gemma4_moe", "gemma3n"]) {
        let source = tiny(name);
        let want = logits(&source);
        let quantize = |method: &str| step(&format!("method = \"{method}\"\nbits = 8\ngroup = 2"));
        for (kind, text) in [
            ("rtn", quantize("rtn")),
            ("gptq", quantize("gptq")),
            ("wanda", step("method = \"wanda\"\nsparsity = 0.5")),
            ("sparsegpt", step("method = \"sparsegpt\"\nsparsity = 0.5")),
        ] {
            let out = dir.path().join(format!("{name}-{kind}"));
            let done = run(&source, &text, &out).unwrap_or_else(|e| panic!("{kind} on {name}: {e}"));
            let packed = open(&done.path).unwrap();
            for place in source.spec().places() {
                let aimed = place.layer.is_some() && place.part == Part::Weight && place.role.is_linear();
                if !aimed || place.role.is_by_name_only() {
                    continue;
                }
                let stored = packed.get(&place).unwrap().unwrap();
                if kind == "rtn" || kind == "gptq" {
                    assert!(stored.codec_name().contains("int8"), "{name}: {place} is {}", stored.codec_name());
                } else {
                    let m = stored.to_mat();
                    let zeros = m.data().iter().filter(|x| **x == 0.0).count() as f64 / m.data().len() as f64;
                    assert!(zeros >= 0.4, "{kind} on {name}: {zeros} of {place} are zeros");
                }
            }
            // A token that another expert takes moves far; most stay where they were.
            let mut off: Vec<f32> = logits(&packed).iter().zip(&want).map(|(a, b)| (a - b).abs()).collect();
            off.sort_by(f32::total_cmp);
            let half = off[off.len() / 2];
            assert!(off.iter().all(|x| x.is_finite()), "{kind} on {name}");
            assert!(half < 0.1 || text.contains("sparsity"), "{kind} on {name}: half of all logits are {half} off");
        }
    }
}

/// Whether heads can be cut: not those of latent attention, nor those with sinks.
fn heads_can_go(spec: &Spec) -> bool {
    !spec.layers.iter().filter_map(|l| l.attn.as_ref()).any(|a| a.latent.is_some() || a.sinks)
}

#[test]
fn heads_that_share_a_key_or_have_sinks_stay_and_channels_go() {
    let dir = tempfile::tempdir().unwrap();
    let mut seen = 0;
    for name in architectures() {
        let source = tiny(&name);
        if heads_can_go(source.spec()) {
            continue;
        }
        seen += 1;
        let e = run(&source, &structure("flap", 0.2, ""), &dir.path().join("none")).err().expect("refused").to_string();
        assert!(e.contains("layer 0 has") && e.contains("channels"), "{name}: {e}");
        let out = dir.path().join(&name);
        let done = run(&source, &structure("flap", 0.2, "parts = [\"channels\"]\nalign = 2"), &out).unwrap();
        let packed = open(&done.path).unwrap();
        assert_eq!(packed.spec().layers[0].attn, source.spec().layers[0].attn, "{name}");
        assert!(packed.spec().parameters() < source.spec().parameters(), "{name}");
        assert!(logits(&packed).iter().all(|x| x.is_finite()), "{name}");
    }
    assert!(seen >= 5, "{seen}");
}

#[test]
fn structure_of_nothing_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    for name in architectures() {
        let source = tiny(&name);
        if !heads_can_go(source.spec()) {
            continue;
        }
        for method in structures() {
            let out = dir.path().join(format!("{name}-{method}"));
            let text = structure(method, 0.0, parts(&source, dir.path()));
            let done = run(&source, &text, &out).unwrap_or_else(|e| panic!("{method} on {name}: {e}"));
            let packed = open(&done.path).unwrap();
            assert_eq!(packed.spec(), source.spec(), "{method} on {name}");
            assert_eq!(logits(&packed), logits(&source), "{method} on {name}");
        }
    }
}

#[test]
fn structure_meets_its_fraction_on_every_architecture() {
    let dir = tempfile::tempdir().unwrap();
    for name in architectures() {
        let source = tiny(&name);
        if !heads_can_go(source.spec()) {
            continue;
        }
        let before = of_units(source.spec());
        // Fractions are those of heads and channels together.
        if !parts(&source, dir.path()).is_empty() {
            continue;
        }
        for method in structures() {
            let out = dir.path().join(format!("{name}-{method}"));
            let done = run(&source, &structure(method, 0.2, "scope = \"model\"\nalign = 2"), &out)
                .unwrap_or_else(|e| panic!("{method} on {name}: {e}"));
            let packed = open(&done.path).unwrap();
            // A unit is two channels (of every expert) or a head with what reads it; it may lie half of it off.
            let unit = source.spec().layers.iter().map(|l| {
                let (a, f) = (l.attn.as_ref().unwrap(), l.ffn.as_ref().unwrap());
                let (h, group) = (source.spec().hidden + 1, a.heads / a.kv_heads);
                let channels = 2 * 3 * h * f.experts.map_or(1, |e| e.count);
                channels.max(if a.kv_heads > 1 { (2 * group + 2) * a.head_dim * h } else { 0 })
            });
            let (unit, gone) = (unit.max().unwrap() as f64, before - of_units(packed.spec()));
            assert!((gone - 0.2 * before).abs() <= unit / 2.0, "{method} on {name}: {gone} of {before}, unit {unit}");
            assert!(logits(&packed).iter().all(|x| x.is_finite()), "{method} on {name}");
            assert!(done.notes.iter().any(|n| n.contains("are gone")), "{:?}", done.notes);
            // Equal layers stay equal where each loses its own fraction.
            let even = "scope = \"layer\"\nalign = 2\nparts = [\"channels\"]";
            let out = dir.path().join(format!("{name}-{method}-even"));
            let done = run(&source, &structure(method, 0.2, even), &out).unwrap();
            let mut off = 0.0;
            for (a, b) in source.spec().layers.iter().zip(&done.spec.layers) {
                let (a, b) = (a.ffn.as_ref().unwrap().width, b.ffn.as_ref().unwrap().width);
                off += b as f64 - 0.8 * a as f64;
                // Shares of its own are for the method to give; on average they are what was asked.
                let own = (b as f64 - 0.8 * a as f64).abs() <= 1.0 || method == "cfsp";
                assert!(b.is_multiple_of(2) && own, "{method} on {name}: {a} {b}");
            }
            // A dense layer before mixtures has other channels: a method's own shares are of parameters there.
            let widths = source.spec().layers.iter().filter_map(|l| l.ffn.as_ref()).map(|f| f.width);
            let alike = widths.collect::<std::collections::BTreeSet<_>>().len() == 1;
            let most = source.spec().layers.len() as f64;
            assert!(!alike || off.abs() <= most, "{method} on {name}: {off} channels off in all");
        }
    }
}

#[test]
fn later_steps_see_what_a_structure_step_left() {
    let dir = tempfile::tempdir().unwrap();
    let source = tiny("llama");
    let cut = structure("flap", 0.2, "align = 16");
    let text = format!("{cut}[[step]]\nmethod = \"rtn\"\nbits = 4\ngroup = 16\n");
    let done = run(&source, &text, &dir.path().join("m")).unwrap();
    let packed = open(&done.path).unwrap();
    let down = |l: usize| packed.get(&Place::layer(l, Role::Down)).unwrap().unwrap();
    assert!((0..2).all(|l| down(l).codec_name().contains("int4")));
    assert!(done.spec.layers.iter().any(|l| l.ffn.as_ref().unwrap().width < 48));
    // Shapes that the later step cannot work on are refused once they are known.
    let text = format!(
        "{}[[step]]\nmethod = \"magnitude\"\npattern = \"4:8\"\n",
        structure("flap", 0.2, "align = 1\nparts = [\"channels\"]")
    );
    let said = run(&source, &text, &dir.path().join("n")).err().expect("refused").to_string();
    assert!(said.contains("step 'prune'") && said.contains("do not divide"), "{said}");
}

proptest! {
    #[test]
    fn a_recipes_numbers_are_the_ones_written(bits in any::<u64>()) {
        // A fraction of any size: the sign and the top of the exponent are taken away.
        let x = f64::from_bits(bits & 0x3fef_ffff_ffff_ffff);
        let place = Place::layer(0, Role::Q);
        let registry = lacuna_methods::registry();
        let prune = |text: &str, sets: &[String]| {
            let recipe = Recipe::parse(text, &registry, sets).unwrap_or_else(|e| panic!("{text}: {e}"));
            assert!(recipe.steps[0].local(&place).is_some());
            (recipe.resolved["step"][0]["sparsity"].as_float().unwrap().to_bits(), recipe.resolved)
        };
        let text = format!("version = 1\n[[step]]\nmethod = \"magnitude\"\nsparsity = {x:?}\n");
        let (read, resolved) = prune(&text, &[]);
        prop_assert_eq!(read, x.to_bits());
        // Set on the command line; written as TOML again; kept in a model's config.json and in the identity of a run.
        let zero = text.replace(&format!("{x:?}"), "0.0");
        prop_assert_eq!(prune(&zero, &[format!("prune.sparsity={x:?}")]).0, x.to_bits());
        prop_assert_eq!(prune(&resolved.to_string(), &[]).0, x.to_bits());
        let kept = serde_json::to_value(&resolved).unwrap();
        let again: serde_json::Value = serde_json::from_str(&kept.to_string()).unwrap();
        prop_assert_eq!(again["step"][0]["sparsity"].as_f64().unwrap().to_bits(), x.to_bits());
        prop_assert_eq!(again, kept);
    }

    #[test]
    fn any_number_survives_toml(bits in any::<u64>()) {
        let x = f64::from_bits(bits);
        prop_assume!(x.is_finite());
        let table: toml::Table = [("x".to_owned(), toml::Value::Float(x))].into_iter().collect();
        let read: toml::Table = table.to_string().parse().unwrap();
        prop_assert_eq!(read["x"].as_float().unwrap().to_bits(), x.to_bits());
        let single = x as f32;
        let read: toml::Table = format!("x = {single:?}").parse().unwrap();
        prop_assert!(single.is_infinite() || (read["x"].as_float().unwrap() as f32).to_bits() == single.to_bits());
    }
}

#[test]
fn recipes_that_cannot_be_followed_are_refused_with_the_key() {
    let registry = lacuna_methods::registry();
    let fails = |text: &str| match Recipe::parse(text, &registry, &[]) {
        Err(e) => e.what,
        Ok(_) => panic!("accepted: {text}"),
    };
    for (text, word) in [
        ("", "version"),
        ("version = 2", "version = 2"),
        ("version = 1\ncolour = 3", "colour"),
        ("version = 1\ncalibration = { samples = 0 }", "0 samples"),
        (&step("method = \"nosuch\""), "nosuch"),
        (&step("sparsity = 0.5"), "method"),
        (&step("method = \"wanda\"\nsparsity = 1.5"), "sparsity = 1.5"),
        (&step("method = \"wanda\"\npattern = \"5:4\""), "5:4"),
        (&step("method = \"wanda\"\nbits = 4"), "bits"),
        (&step("method = \"gptq\"\nbits = 9"), "bits = 9"),
        (&step("method = \"wanda\"\nverb = \"factor\""), "cannot use"),
        (&step("method = \"rtn\"\nbit = 4"), "did you mean 'bits'"),
        (&step("method = \"rtn\"\nmehtod = 4"), "did you mean 'method'"),
        (&step("method = \"gptq\"\ndampening = 0.1"), "did you mean 'damping'"),
        (&step("method = \"gptq\"\nverb = \"prune\""), "gptq does not prune"),
        (&step("method = \"gptq\"\ngrid = \"wanda\""), "no grid"),
        (&step("method = \"rtn\"\ngrid = \"rtn\""), "a grid itself"),
        (&step("method = \"sparsegpt\"\nscope = \"row\""), "scope"),
        (&step("method = \"svd\"\nkeep = 0.5\nrank = 3"), "twice"),
        (&step("method = \"flap\"\nparts = []"), "parts = []"),
        (&step("method = \"flap\"\nparts = [\"rows\"]"), "rows"),
        (&step("method = \"flap\"\nscope = \"row\""), "scope"),
        (&step("method = \"flap\"\nalign = 0"), "align = 0"),
        (&step("method = \"wanda\"\nverb = \"structure\""), "cannot use"),
        (&step("method = \"uniform\"\nkey = \"sparsity\""), "target"),
        (&step("method = \"uniform\"\nvalues = [0.4]\ntarget = 0.5"), "not among"),
        (&step("method = \"uniform\"\ntarget = 0.5"), "a step called 'prune'"),
        (&step("method = \"wanda\"\nexcept = [{ sparsity = 0.1 }]"), "targets"),
        (&format!("{}[[step]]\nmethod = \"wanda\"\n", step("method = \"wanda\"")), "two steps"),
        (&format!("{}[[step]]\nmethod = \"llm-drop\"\n", step("method = \"wanda\"")), "must come before"),
        ("version = 1\n[[step", "TOML"),
    ] {
        assert!(fails(text).contains(word), "{text}: {}", fails(text));
    }
    let set = |s: &str| Recipe::parse(&step("method = \"wanda\""), &registry, &[s.to_owned()]);
    assert!(set("prune.sparsity=0.7").is_ok());
    assert!(set("quantize.bits=4").err().unwrap().what.contains("no step is called"));
    assert!(set("nonsense").is_err());
    let prune = set("prune.sparsity=0.7").unwrap();
    assert_eq!(prune.resolved["step"][0]["sparsity"].as_float(), Some(0.7));
}

#[test]
fn steps_that_do_not_fit_a_model_or_each_other_are_refused_before_work_begins() {
    let source = tiny("llama");
    let fails = |text: &str| recipe(text).check(source.spec()).expect_err(text).what;
    let two = |a: &str, b: &str| format!("{}[[step]]\nname = \"second\"\n{b}\n", step(a));
    let rtn = "method = \"rtn\"\nbits = 4\ngroup = 16";
    for (text, word) in [
        (step("method = \"wanda\"\ntargets = [\"embed\"]"), "nothing is multiplied with this matrix"),
        (step("method = \"wanda\"\npattern = \"3:7\""), "do not divide into runs of 7"),
        (step("method = \"sparsegpt\"\npattern = \"block:7x1\""), "does not divide"),
        (two(rtn, "method = \"wanda\""), "after rounding"),
        (two(rtn, rtn), "already rounded"),
        (two("method = \"svd\"", "method = \"magnitude\""), "after factoring"),
        (two("method = \"magnitude\"", "method = \"svd\""), "would fill the zeros"),
        (two("method = \"svd\"", "method = \"gptq\""), "cannot round factors"),
        (two("method = \"svd\"", "method = \"rtn\"\npart = \"weights\""), "was factored"),
        (step("method = \"rtn\"\npart = \"factors\""), "no factors"),
        (step("method = \"svd\"\nof = \"error\""), "nothing before"),
        (
            two("method = \"magnitude\"", "method = \"svd\"\nof = \"error\"") + "[[step]]\nname = \"third\"\n" + rtn,
            "correction",
        ),
        (step("method = \"llm-drop\"\ncount = 99"), "99 to drop"),
        (step("method = \"llm-drop\"\nverb = \"structure\"\nsparsity = 0.99"), "can go"),
    ] {
        let said = fails(&text);
        assert!(said.contains(word) && said.contains("step '"), "{text}: {said}");
    }
    // The same from the verb itself, with nothing written.
    let dir = tempfile::tempdir().unwrap();
    let said = run(&source, &two(rtn, rtn), &dir.path().join("m")).err().expect("refused").to_string();
    assert!(said.contains("already rounded") && fs::read_dir(dir.path()).unwrap().count() == 0, "{said}");
}

#[test]
fn an_error_gets_a_term_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let source = tiny("llama");
    let text = step("method = \"magnitude\"\nsparsity = 0.5")
        + "[[step]]\nmethod = \"rtn\"\nbits = 4\ngroup = 16\n"
        + "[[step]]\nname = \"correct\"\nmethod = \"svd-llm\"\nof = \"error\"\nrank = 4\n"
        + "[[step]]\nname = \"thin\"\nmethod = \"rtn\"\npart = \"factors\"\nbits = 8\ngroup = 0\n";
    let done = run(&source, &text, &dir.path().join("m")).unwrap();
    let short = text.split("[[step]]\nname = \"correct\"").next().unwrap().to_owned();
    let plain = run(&source, &short, &dir.path().join("p")).unwrap();
    let (packed, bare) = (open(&done.path).unwrap(), open(&plain.path).unwrap());
    for t in done.tensors.iter().filter(|t| t.error.is_some()) {
        let (a, b) = (packed.get(&t.place).unwrap().unwrap(), bare.get(&t.place).unwrap().unwrap());
        assert_eq!((a.terms.len(), &a.terms[0]), (2, &b.terms[0]), "{}", t.place);
        let before = plain.tensors.iter().find(|p| p.place == t.place).unwrap();
        assert!(t.error < before.error, "{}: {:?} {:?}", t.place, t.error, before.error);
    }
}

/// Two levels of sparsity, searched by every listed search.
fn searched(method: &str, extra: &str) -> String {
    format!(
        "version = 1\n[[step]]\nname = \"search\"\nmethod = \"{method}\"\nkey = \"sparsity\"\nvalues = [0.25, 0.5, \
         0.75]\ntarget = 0.5\n\
         tokens = 64\n{extra}\n[[step]]\nmethod = \"wanda\"\nsparsity = 0.1\n"
    )
}

#[test]
fn searches_stay_within_their_budget_and_resume() {
    let source = tiny("llama");
    for method in lacuna_methods::registry().methods.iter().filter(|m| m.card.verb == "search") {
        let (name, dir) = (method.card.name, tempfile::tempdir().unwrap());
        let uniform = run(&source, &step("method = \"wanda\"\nsparsity = 0.5"), &dir.path().join("u")).unwrap();
        let text = searched(name, "trials = 40");
        let done = run(&source, &text, &dir.path().join("a")).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(done.bytes <= uniform.bytes, "{name}: {} above {}", done.bytes, uniform.bytes);
        assert!(done.notes.iter().any(|n| n.contains("chose prune.sparsity")), "{name}: {:?}", done.notes);
        // Stopped in the blocks, after the search: what was measured is known, and the bytes are the same.
        let (tokens, recipe) = (tokens(source.spec().vocab), recipe(&text));
        let out = dir.path().join("b");
        let killed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _ = compress(&source, &tokens, &recipe, &options(&out), &mut StopInBlocks(false));
        }));
        assert!(killed.is_err() && !out.exists(), "{name}");
        let resume = Options { resume: true, ..options(&out) };
        let again = compress(&source, &tokens, &recipe, &resume, &mut Quiet).unwrap();
        assert_eq!(files(&done.path), files(&again.path), "{name}");
        let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|f| f.unwrap().file_name()).collect();
        assert_eq!(left.len(), 3, "{name}: {left:?}");
        // Without text there is nothing to measure on.
        let none = compress(&source, &[], &recipe, &options(&dir.path().join("c")), &mut Quiet).err().expect("refused");
        assert!(none.to_string().contains("calibration text"), "{none}");
    }
}

/// Bytes at 16 bits that a token is multiplied with.
fn read_bytes(spec: &Spec) -> f64 {
    let head = if spec.tied { Role::Embed } else { Role::Head };
    let mine = |p: &&Place| p.layer.is_some() || p.role == head;
    let bytes = |p: &Place| {
        let e = p.layer.and_then(|l| spec.layers[l as usize].ffn.as_ref()).and_then(|f| f.experts);
        let used = e.filter(|_| p.expert.is_some()).map_or(1.0, |e| e.used as f64 / e.count as f64);
        spec.shape(p).map_or(0.0, |(r, c)| 2.0 * used * (r * c) as f64)
    };
    spec.places().iter().filter(mine).map(bytes).sum()
}

#[test]
fn sizes_meet_the_time_asked_and_a_search_beats_the_same_everywhere() {
    let dir = tempfile::tempdir().unwrap();
    let text = |method: &str, speedup: f64, extra: &str| {
        step(&format!("method = \"{method}\"\nspeedup = {speedup}\nalign = 2\ntokens = 64\n{extra}"))
    };
    for name in architectures() {
        let source = tiny(&name);
        if !heads_can_go(source.spec()) {
            let e =
                run(&source, &text("uniform", 1.1, ""), &dir.path().join("none")).err().expect("refused").to_string();
            assert!(e.contains("cannot be searched"), "{name}: {e}");
            continue;
        }
        if !parts(&source, dir.path()).is_empty() {
            let said = run(&source, &text("uniform", 1.1, ""), &dir.path().join("heads")).err().expect("refused");
            assert!(said.to_string().contains("heads cannot go"), "{said}");
            continue;
        }
        for method in ["ziplm", "uniform", "evopress"] {
            let out = dir.path().join(format!("{name}-{method}"));
            let extra = if method == "ziplm" { "trials = 12" } else { "" };
            let done = run(&source, &text(method, 1.1, extra), &out).unwrap_or_else(|e| panic!("{method} {name}: {e}"));
            let faster = read_bytes(source.spec()) / read_bytes(&done.spec);
            assert!(faster >= 1.1, "{method} on {name}: {faster}");
            assert!(logits(&open(&done.path).unwrap()).iter().all(|x| x.is_finite()), "{method} on {name}");
            let said = format!("a token {faster:.3} times as fast by the bytes it reads, asked were 1.1");
            assert!(done.notes.iter().any(|n| n.contains(&said)), "{said}: {:?}", done.notes);
        }
    }
    // Times of the user's own, and the same bytes for any number of threads; a later step sees what is left.
    let source = tiny("llama");
    let times =
        "trials = 8\ntimes = { heads = [[0, 0], [8, 80.0]], channels = [[0, 0], [20, 30.0], [48, 30.0]], rest = 5 }";
    let after = "[[step]]\nmethod = \"rtn\"\nbits = 4\ngroup = 2\n";
    let text = format!("{}{after}", text("ziplm", 1.3, times));
    let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let a = one.install(|| run(&source, &text, &dir.path().join("a"))).unwrap();
    let b = run(&source, &text, &dir.path().join("b")).unwrap();
    assert_eq!(files(&a.path), files(&b.path));
    assert!(a.notes.iter().any(|n| n.contains("by the times given")), "{:?}", a.notes);
    // More than everything cannot go, unknown sizes have no time, and gradients of the source would not fit.
    for (text, word) in [
        (step("method = \"ziplm\"\nspeedup = 900"), "at most"),
        (step("method = \"ziplm\"\nspeedup = 1.1\ntimes = { heads = [[0, 0]] }"), "says nothing"),
    ] {
        let said = run(&source, &text, &dir.path().join("c")).err().expect("refused").to_string();
        assert!(said.contains(word), "{said}");
    }
    let registry = lacuna_methods::registry();
    for (text, word) in [
        (step("method = \"ziplm\"\nspeedup = 0.5"), "speedup = 0.5"),
        (step("method = \"ziplm\"\nspeedup = 2\ntarget = 0.5"), "target exclude"),
        (step("method = \"uniform\"\nspeedup = 2\nshrink = \"wanda\""), "wanda"),
        (format!("{}[[step]]\nmethod = \"fisher\"\n", step("method = \"ziplm\"\nspeedup = 2")), "gradients"),
    ] {
        let said = Recipe::parse(&text, &registry, &[]).err().expect("refused").what;
        assert!(said.contains(word), "{said}");
    }
}

/// Stops the walk in its first block.
struct StopInBlocks(bool);

impl Progress for StopInBlocks {
    fn phase(&mut self, name: &str, _: u64) {
        self.0 = name == "compressing";
    }

    fn step(&mut self, _: u64, _: &str) {
        assert!(!self.0, "stopped");
    }
}

#[test]
fn sparse_four_bits_are_smaller_by_what_arithmetic_says() {
    let dir = tempfile::tempdir().unwrap();
    let source = tiny("llama");
    let quant = "method = \"rtn\"\nbits = 4\ngroup = 16\nsymmetric = true\nscale = \"f16\"";
    let dense = run(&source, &step(quant), &dir.path().join("d")).unwrap();
    let both = format!("{}[[step]]\n{quant}\n", step("method = \"wanda\"\nsparsity = 0.5"));
    let sparse = run(&source, &both, &dir.path().join("s")).unwrap();
    for (a, b) in dense.tensors.iter().zip(&sparse.tensors).filter(|(a, _)| a.error.is_some()) {
        let n = a.parameters as f64;
        // Half the codes go, a bit for each weight and four bytes a row come.
        let rows = source.spec().shape(&a.place).unwrap().0 as f64;
        let want = n * 4.0 / 8.0 * 0.5 - n / 8.0 - 4.0 * (rows + 1.0);
        let saved = a.bytes_after as f64 - b.bytes_after as f64;
        assert!((saved - want.max(0.0)).abs() <= 8.0 || saved >= want, "{}: saved {saved}, arithmetic {want}", a.place);
    }
}

/// Networks with recurrent mixers: steps on matrices reach theirs, and what asks for a structure refuses.
#[test]
fn recurrent_mixers_are_compressed_by_matrix() {
    let dir = tempfile::tempdir().unwrap();
    for model in ["lfm2", "qwen3_5", "mamba2", "bamba", "falcon_h1", "jamba"] {
        let source = tiny(model);
        let mut errors = Vec::new();
        for method in ["rtn", "gptq"] {
            let out = dir.path().join(format!("{model}-{method}"));
            let text = step(&format!("method = \"{method}\"\nbits = 8\ngroup = 8"));
            let done = run(&source, &text, &out).unwrap_or_else(|e| panic!("{method} on {model}: {e}"));
            let packed = open(&done.path).unwrap();
            assert_eq!(packed.spec(), source.spec());
            for place in source.spec().places() {
                let (s, was) = (packed.get(&place).unwrap().unwrap(), source.get(&place).unwrap().unwrap());
                let tiny = place.role.is_by_name_only();
                let aimed = place.part == Part::Weight && place.role.is_linear() && place.layer.is_some() && !tiny;
                assert_eq!(s.codec_name().contains("int8"), aimed, "{model}: {place} is {}", s.codec_name());
                assert!(aimed || s.to_mat().data() == was.to_mat().data(), "{model}: {place} is as it was");
            }
            let (a, b) = (logits(&source), logits(&packed));
            // A state carries on what was rounded, so that single logits move far; all of them together do not.
            let length = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
            let off = length(&mut a.iter().zip(&b).map(|(x, y)| x - y)) / length(&mut a.iter().copied());
            assert!(off > 0.0 && off < 0.1, "{method} on {model}: {off}");
            // What 8 bits in groups of 8 leave: a 255th of twice the largest, evenly spread.
            let found: Vec<f64> = done.tensors.iter().filter_map(|t| t.error).collect();
            assert!(found.iter().all(|e| *e < 1.5e-5), "{method} on {model}: {found:?}");
            errors.push(found.iter().sum::<f64>());
        }
        assert!(errors[1] < 0.9 * errors[0], "{model}: {errors:?}, where GPTQ is to leave less than rounding");
        let refused = |body: &str| {
            let out = dir.path().join("refused");
            run(&source, &step(body), &out).err().unwrap_or_else(|| panic!("{body} on {model}")).to_string()
        };
        let named = if model == "bamba" || model == "qwen3_5" { "layers.0.mixer.in" } else { "mixer.in" };
        for body in [
            "method = \"wanda-sp\"\nsparsity = 0.2\nalign = 4",
            "method = \"slicegpt\"\nkeep = 0.8\nalign = 4",
            "method = \"llm-drop\"\npart = \"attention\"\ncount = 1",
        ] {
            let said = refused(body);
            assert!(said.contains(named), "{said}");
        }
        // Gradients go through the mixers.
        let out = dir.path().join(format!("{model}-gblm"));
        let done = run(&source, &step("method = \"gblm\"\nsparsity = 0.5"), &out);
        let done = done.unwrap_or_else(|e| panic!("gblm on {model}: {e}"));
        let into = open(&done.path).unwrap().get(&Place::layer(0, Role::MixerIn)).unwrap().unwrap().to_mat();
        assert_eq!(into.data().iter().filter(|x| **x == 0.0).count(), into.data().len() / 2, "{model}");
    }
}
