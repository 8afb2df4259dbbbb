//! Whole commands on a tiny model with random weights and a real tokenizer: exit statuses, JSON, files, refusals.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use lacuna_base::Rng;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use tempfile::TempDir;

const HIDDEN: usize = 32;
const FFN: usize = 48;
const VOCAB: usize = 603;
const CONTEXT: usize = 2048;

/// A directory that lives as long as the tests, with a tiny model in it.
fn home() -> &'static Path {
    static HOME: OnceLock<TempDir> = OnceLock::new();
    HOME.get_or_init(|| {
        let dir = TempDir::new().unwrap();
        make_model(&dir.path().join("tiny"));
        dir
    })
    .path()
}

/// A Llama of two layers in the Hugging Face layout, with the golden byte-level tokenizer.
fn make_model(dir: &Path) {
    std::fs::create_dir_all(dir).unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizers/bytelevel");
    for file in ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"] {
        std::fs::copy(golden.join(file), dir.join(file)).unwrap();
    }
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": HIDDEN, "intermediate_size": FFN,
        "max_position_embeddings": CONTEXT, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": true, "vocab_size": VOCAB, "torch_dtype": "float32",
    });
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let mut rng = Rng::new(3);
    let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = vec![];
    let mut add = |name: String, shape: &[usize], norm: bool| {
        let n = shape.iter().product();
        let values = (0..n).flat_map(|_| (if norm { 1.0 } else { 0.2 * rng.normal() }).to_le_bytes()).collect();
        tensors.push((name, shape.to_vec(), values));
    };
    add("model.embed_tokens.weight".into(), &[VOCAB, HIDDEN], false);
    add("model.norm.weight".into(), &[HIDDEN], true);
    for layer in 0..2 {
        for (name, rows, cols) in [
            ("self_attn.q_proj", HIDDEN, HIDDEN),
            ("self_attn.k_proj", HIDDEN / 2, HIDDEN),
            ("self_attn.v_proj", HIDDEN / 2, HIDDEN),
            ("self_attn.o_proj", HIDDEN, HIDDEN),
            ("mlp.gate_proj", FFN, HIDDEN),
            ("mlp.up_proj", FFN, HIDDEN),
            ("mlp.down_proj", HIDDEN, FFN),
        ] {
            add(format!("model.layers.{layer}.{name}.weight"), &[rows, cols], false);
        }
        for name in ["input_layernorm", "post_attention_layernorm"] {
            add(format!("model.layers.{layer}.{name}.weight"), &[HIDDEN], true);
        }
    }
    let views = tensors.iter().map(|(n, s, b)| (n.clone(), TensorView::new(Dtype::F32, s.clone(), b).unwrap()));
    safetensors::serialize_to_file(views, None, &dir.join("model.safetensors")).unwrap();
}

fn tiny() -> String {
    home().join("tiny").display().to_string()
}

fn fresh(name: &str) -> PathBuf {
    let path = home().join(name);
    assert!(!path.exists(), "two tests write {name}");
    path
}

fn lacuna(args: &[&str]) -> Output {
    let cache = home().join("cache");
    let cache = cache.to_str().unwrap();
    Command::new(env!("CARGO_BIN_EXE_lacuna")).args(args).args(["--cache-dir", cache, "--offline"]).output().unwrap()
}

/// What a command with `--json` printed: one object, nothing else, and the status that was expected.
fn object(status: i32, args: &[&str]) -> Value {
    let out = lacuna(&[args, &["--json"]].concat());
    let said = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(status), "{args:?}: {said}");
    let text = String::from_utf8(out.stdout).unwrap();
    assert_eq!(text.lines().count(), 1, "{args:?} printed {text}");
    let mut seen = std::collections::HashSet::new();
    said.lines().for_each(|l| assert!(seen.insert(l), "'{l}' is said twice: {said}"));
    let value: Value = serde_json::from_str(&text).unwrap();
    assert!(value.is_object());
    value
}

/// What a command that must fail said.
fn refusal(status: i32, args: &[&str]) -> String {
    let out = lacuna(args);
    let said = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(status), "{args:?}: {said}");
    assert!(out.stdout.is_empty(), "{args:?} printed {}", String::from_utf8_lossy(&out.stdout));
    assert!(!said.contains("panicked"), "{said}");
    said
}

fn has_numbers(value: &Value, keys: &[&str]) {
    for key in keys {
        assert!(value[*key].is_number(), "'{key}' in {value}");
    }
}

#[test]
fn compress_then_inspect_eval_generate_bench() {
    let out = fresh("int4");
    let out = out.to_str().unwrap();
    let recipe = ["-r", "rtn", "--set", "quantize.group=16", "-o", out, "--gate", "off"];
    let done = object(0, &[&["compress", &tiny()], &recipe[..]].concat());
    has_numbers(&done, &["source_bytes", "bytes_f16", "bytes_after", "bits_per_weight", "seconds", "peak_rss_bytes"]);
    assert!(done["pays"].is_null() && done["bytes_after"].as_u64() < done["source_bytes"].as_u64());

    let seen = object(0, &["inspect", out]);
    assert_eq!(seen["bytes"], done["bytes_after"]);
    assert_eq!(seen["broken"], json!([]));
    assert!(seen["approximations"][0].as_str().unwrap().contains("rtn"));

    let eval = object(0, &["eval", out, "--ctx", "128", "--windows", "2", "--against", &tiny()]);
    has_numbers(
        &eval,
        &["ppl", "nll", "tokens", "ctx", "windows", "kl_mean", "top1_agree", "seconds", "peak_rss_bytes"],
    );
    assert_eq!(eval["tokens"], 2 * 127);
    let kl = eval["kl_mean"].as_f64().unwrap();
    assert!(kl > 0.0 && kl < 1.0, "{kl}");
    let same = object(0, &["eval", &tiny(), "--ctx", "128", "--windows", "2", "--against", &tiny()]);
    assert!(same["kl_mean"].as_f64().unwrap().abs() < 1e-6 && same["top1_agree"] == 1.0);

    let generate = ["generate", out, "-p", "The sea", "-n", "12", "--temp", "0"];
    let (a, b) = (object(0, &generate), object(0, &[&generate[..], &["--threads", "1"]].concat()));
    let numbers =
        ["tokens", "prompt_tokens", "prefill_tok_s", "decode_tok_s", "weights_bytes", "kv_bytes", "tokenizer_bytes"];
    has_numbers(&a, &numbers);
    assert!(a["text"].is_string() && a["token_ids"] == b["token_ids"]);
    // That activations are rounded is said where they are: not with floats, nor in groups of 16.
    let wide = fresh("int4-of-32");
    let wide = wide.to_str().unwrap();
    object(0, &["compress", &tiny(), "-r", "rtn", "-o", wide, "--gate", "off"]);
    let rounds = |model: &str| {
        let out = lacuna(&["generate", model, "-p", "The sea", "-n", "1"]);
        String::from_utf8(out.stderr).unwrap().contains("8-bit activations")
    };
    assert!(rounds(wide) && !rounds(out) && !rounds(&tiny()));

    let bench = object(0, &["bench", out, "--prompt", "16", "--gen", "4", "--reps", "1", "--profile", "--kv", "q8"]);
    let keys =
        ["prefill_tok_s", "decode_tok_s", "weights_bytes", "roofline_fraction", "arithmetic_fraction", "threads"];
    has_numbers(&bench, &keys);
    for profile in ["prefill_profile", "decode_profile"] {
        let named: Vec<&str> = bench[profile].as_array().unwrap().iter().map(|s| s["name"].as_str().unwrap()).collect();
        for name in ["attn.q, k, v", "attention", "head", "everything else"] {
            assert!(named.contains(&name), "{name} is not among {named:?}");
        }
    }
    let said = refusal(2, &["bench", "--shape", "gpt-17"]);
    assert!(said.contains("gpt-17") && said.contains("llama-3.2-1b"), "{said}");
    assert!(refusal(2, &["bench"]).contains("MODEL"));
    assert!(refusal(2, &["bench", "--shape", "smollm2-135m", "--isa", "mmx"]).contains("portable"));
}

#[test]
fn the_gate_says_no_with_status_3_and_the_model_is_there() {
    let out = fresh("f16");
    let out = out.to_str().unwrap();
    let judging = ["--gate", "size", "--ctx", "128", "--windows", "2"];
    let tiny = tiny();
    let done = object(3, &[&["compress", &tiny, "-r", "f16", "-o", out], &judging[..]].concat());
    assert_eq!(done["pays"], false);
    has_numbers(&done, &["ppl", "ppl_dense", "kl_mean"]);
    let names: Vec<&str> =
        done["baselines"].as_array().unwrap().iter().map(|b| b["baseline"]["name"].as_str().unwrap()).collect();
    for name in ["int8 g32", "int6 g32", "int5 g32", "int4 g32", "int3 g32", "f16", "source as it came"] {
        assert!(names.contains(&name), "{name} is not among {names:?}");
    }
    assert_eq!(object(0, &["inspect", out])["broken"], json!([]));
    // The baselines are kept, and `pull` looks after them.
    let kept = object(0, &["pull", "list"])["baselines"].clone();
    let sets: Vec<PathBuf> =
        std::fs::read_dir(kept["path"].as_str().unwrap()).unwrap().map(|e| e.unwrap().path()).collect();
    assert!(kept["bytes"].as_u64().unwrap() > 0 && sets.len() == 1, "{kept}, {sets:?}");
    let judged = sets[0].join("int8-g32/config.json");
    let made = std::fs::metadata(&judged).unwrap().modified().unwrap();
    let again = [&["compress", &tiny, "-r", "f16", "-o", out, "--overwrite", "--accept"], &judging[..]].concat();
    assert_eq!(object(0, &again)["pays"], false);
    assert_eq!(
        std::fs::metadata(&judged).unwrap().modified().unwrap(),
        made,
        "the same program makes no baseline twice"
    );
    let removed = object(0, &["pull", "rm", "baselines"]);
    // Another test may be using them, and then they stay.
    assert!(removed["removed"] == "baselines" && removed["bytes"].is_number(), "{removed}");
}

#[test]
fn what_is_there_is_not_lost() {
    let out = fresh("precious");
    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("diary.txt"), "dear").unwrap();
    let args = ["compress", &tiny(), "-r", "rtn", "-o", out.to_str().unwrap(), "--gate", "off"];
    let said = refusal(1, &args);
    assert!(said.contains("precious") && said.contains("--overwrite"), "{said}");
    assert_eq!(std::fs::read_to_string(out.join("diary.txt")).unwrap(), "dear");
}

#[test]
fn wrong_usage_is_status_2_and_says_what_to_do() {
    let out = fresh("never");
    let out = out.to_str().unwrap();
    let compress = |more: &[&str]| refusal(2, &[&["compress", &tiny(), "-o", out, "--gate", "off"], more].concat());
    assert!(compress(&["-r", "no-such-recipe"]).contains("no-such-recipe"));
    assert!(compress(&["-r", "rtn", "--set", "quantize.bitz=4"]).contains("bitz"));
    assert!(compress(&["-r", "rtn", "--set", "quantize.bits=77"]).contains("77"));
    assert!(compress(&["-r", "rtn", "--max-ram", "lots"]).contains("lots"));
    assert!(refusal(2, &["eval", &tiny(), "--ctx", "4096"]).contains("2048"));
    assert!(refusal(2, &["frobnicate"]).contains("frobnicate"));
    let generate = |more: &[&str]| refusal(2, &[&["generate", &tiny(), "-p", "x", "--template-arg"], more].concat());
    assert!(generate(&["a=1"]).contains("--chat"));
    assert!(generate(&["zzz=1", "--chat"]).contains("'zzz'"));
    assert!(generate(&["a", "--chat"]).contains("KEY=VALUE"));
    assert!(refusal(2, &["serve", &tiny(), "--port", "0", "--cors", "example.org"]).contains("example.org"));
    assert!(!Path::new(out).exists());
}

/// What is refused leaves nothing on standard output, the prompt included, and nobody is asked for a message that
/// nothing can be made of.
#[test]
fn what_cannot_be_generated_shows_nothing() {
    let long = "hello ".repeat(CONTEXT);
    let m = &tiny();
    for (flags, why) in [
        (&["-p", "hello", "--top-p", "2"][..], "top_p is 2"),
        (&["-p", "hello", "--repeat-penalty", "0"], "repetition_penalty is 0"),
        (&["-p", &long], "tokens"),
    ] {
        let said = refusal(1, &[&["generate", m, "-n", "2"], flags].concat());
        assert!(said.contains(why), "{said}");
    }
    let dir = fresh("no-template");
    std::fs::create_dir(&dir).unwrap();
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::copy(home().join("tiny").join(file), dir.join(file)).unwrap();
    }
    let said = refusal(1, &["chat", dir.to_str().unwrap()]);
    assert!(said.contains("no chat template") && !said.contains("type a message"), "{said}");
}

#[test]
fn bad_files_are_named() {
    assert!(refusal(1, &["inspect", "/no/such/place"]).contains("/no/such/place"));
    let cut = fresh("cut");
    make_model(&cut);
    let file = cut.join("model.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    std::fs::write(&file, &bytes[..bytes.len() - 100]).unwrap();
    assert!(refusal(1, &["eval", cut.to_str().unwrap()]).contains("model.safetensors"));
    let text = home().join("latin1.txt");
    std::fs::write(&text, b"caf\xe9").unwrap();
    assert!(refusal(1, &["eval", &tiny(), "--text", text.to_str().unwrap()]).contains("latin1.txt"));
}

#[test]
fn below_the_floor_memory_is_refused_with_the_floor() {
    let out = fresh("floor");
    let args =
        ["compress", &tiny(), "-r", "sparsegpt", "-o", out.to_str().unwrap(), "--gate", "off", "--max-ram", "1MiB"];
    let said = refusal(1, &args);
    assert!(said.contains("MB") || said.contains("MiB"), "{said}");
    assert!(!out.exists());
}

#[test]
fn tasks_give_accuracies() {
    let file = home().join("items.jsonl");
    let items = [
        json!({ "id": 1, "ctx": "one two", "choices": [" three", " xylophone"], "label": 0 }),
        json!({ "id": 2, "ctx": "a b", "choices": [" c", " quarrel"], "label": 1 }),
    ];
    std::fs::write(&file, format!("{}\n{}\n", items[0], items[1])).unwrap();
    let done = object(0, &["eval", &tiny(), "--tasks", file.to_str().unwrap()]);
    has_numbers(&done, &["acc", "acc_norm"]);
    std::fs::write(&file, "{\"id\": 1, \"ctx\": \"x\", \"choices\": [\" y\"], \"label\": 7}\n").unwrap();
    assert!(refusal(1, &["eval", &tiny(), "--tasks", file.to_str().unwrap()]).contains("items.jsonl"));
}

#[test]
fn the_machine_the_methods_and_the_cache_are_told() {
    let doctor = object(0, &["doctor"]);
    has_numbers(&doctor, &["threads", "read_bytes_per_second"]);
    let methods = object(0, &["methods"]).to_string();
    for method in lacuna_methods::registry().methods {
        assert!(methods.contains(method.card.name), "{} is not told", method.card.name);
    }
    // Some of them, by words and by family; a page that fits a terminal.
    let page = |args: &[&str]| {
        let out = lacuna(args);
        assert!(out.status.success(), "{args:?}");
        String::from_utf8(out.stdout).unwrap()
    };
    let all = page(&["methods"]);
    assert!(all.lines().all(|l| l.chars().count() <= 100), "{all}");
    assert!(all.contains("copyspec") && !all.contains("arXiv 2502.08923"));
    let one = page(&["methods", "CopySpec"]);
    assert!(
        one.contains("arXiv 2502.08923") && !one.contains("wanda") && one.lines().all(|l| l.chars().count() <= 100)
    );
    let names = |v: Value| v["methods"].as_array().unwrap().iter().map(|m| m["name"].clone()).collect::<Vec<_>>();
    assert_eq!(names(object(0, &["methods", "--family", "gate"])), [json!("wina")]);
    assert_eq!(names(object(0, &["methods", "heavy", "--family", "keep"])), [json!("h2o")]);
    assert_eq!(names(object(0, &["methods"])).len(), {
        let all = lacuna_methods::registry();
        all.methods.len() + all.running.len()
    });
    assert!(refusal(2, &["methods", "--family", "keepers"]).contains("keep"));
    assert!(refusal(2, &["methods", "no-such-thing"]).contains("no-such-thing"));
    // A verb's own flags stand apart from those of all.
    let help = page(&["generate", "--help"]);
    let (own, global) = help.split_once("Options of every verb:").unwrap();
    assert!(own.contains("--temp") && !own.contains("--cache-dir") && global.contains("--cache-dir"), "{help}");
    assert_eq!(object(0, &["pull", "list"])["models"], json!([]));
    assert!(refusal(1, &["pull", "smollm2-135m-instruct"]).contains("smollm2-135m-instruct"));
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_lacuna"));
    let child = child.arg("methods").stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let mut child = child.spawn().unwrap();
    drop(child.stdout.take());
    let out = child.wait_with_output().unwrap();
    assert!(out.status.success() && out.stderr.is_empty(), "{}", String::from_utf8_lossy(&out.stderr));
}

#[test]
fn quickstart_tells_the_whole_story() {
    let (out, report) = (fresh("quick"), fresh("report.html"));
    let args = ["quickstart", &tiny(), "-o", out.to_str().unwrap(), "--report", report.to_str().unwrap()];
    let done = object(0, &args);
    assert!(done["pays"].is_boolean());
    let page = std::fs::read_to_string(&report).unwrap();
    assert!(page.contains("<svg") && page.contains("int4 g32"));
    assert!(!page.contains("src=") && !page.contains("href="), "the page needs nothing beside itself");
    assert_eq!(done["samples"].as_array().unwrap().len(), 2);
}

#[test]
fn fit_keeps_to_a_budget_and_its_recipe_makes_the_model_again() {
    let (out, again) = (fresh("fitted"), fresh("fitted-again"));
    let fit = |more: &[&str]| {
        let model = tiny();
        let args = ["fit", &model, "-o", out.to_str().unwrap(), "--effort", "quick", "--gate", "off", "--samples", "4"];
        [&args[..], more].concat().iter().map(|a| (*a).to_owned()).collect::<Vec<String>>()
    };
    let done = |args: &[String]| object(0, &args.iter().map(String::as_str).collect::<Vec<_>>());
    let dry = done(&fit(&["--dry-run"]));
    assert!(!out.exists(), "a dry run writes nothing");
    let sizes: Vec<u64> = dry["front"].as_array().unwrap().iter().map(|p| p["bytes"].as_u64().unwrap()).collect();
    assert!(sizes.len() > 2 && sizes.windows(2).all(|w| w[0] >= w[1]), "{sizes:?}");
    let budget = (sizes[0] + 2 * sizes[sizes.len() - 1]) / 3;
    let made = done(&fit(&["--max-bytes", &budget.to_string()]));
    assert!(made["bytes_after"].as_u64().unwrap() <= budget, "{made}");
    assert!(out.join("README.md").is_file());
    let recipe = out.with_file_name("fitted.recipe.toml");
    let args = ["compress", &tiny(), "--recipe", recipe.to_str().unwrap(), "-o", again.to_str().unwrap()];
    object(0, &[&args[..], &["--gate", "off"]].concat());
    let weights = |dir: &Path| std::fs::read(dir.join("model.safetensors")).unwrap();
    assert!(weights(&out) == weights(&again), "the recipe makes another model");
    let fails = |args: &[String]| refusal(1, &args.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(fails(&fit(&["--overwrite", "--max-bytes", "1kB"])).contains("the smallest"));
    let usage = |args: &[String]| refusal(2, &args.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(usage(&fit(&["--overwrite", "--keep", "attn.v=nothing"])).contains("no level is called 'nothing'"));
    assert!(usage(&fit(&["--overwrite", "--max-bytes", "1MB", "--max-loss", "0.1"])).contains("exclude each other"));
    assert!(usage(&fit(&["--overwrite", "--for", "gguf"])).contains("ends in .gguf"));
    assert!(usage(&fit(&["--overwrite", "--min-decode-tok-s", "0"])).contains("--min-decode-tok-s 0"));
    assert!(usage(&fit(&["--overwrite", "--beside", &tiny()])).contains("nothing is judged"));
    assert!(recipe.is_file(), "what failed left the recipe of the model that is there");
}

/// What a search's end needs is looked at before it begins, and folders are never taken for files.
#[test]
fn fit_refuses_at_once_what_could_only_fail_in_the_end() {
    let kept = fresh("kept");
    std::fs::create_dir(&kept).unwrap();
    std::fs::write(kept.join("mine.txt"), "precious").unwrap();
    let (kept, out) = (kept.display().to_string(), fresh("never").display().to_string());
    let model = tiny();
    let fit = |more: &[&str]| refusal(2, &[&["fit", &model, "--effort", "quick"][..], more].concat());
    assert!(fit(&["-o", &out, "--report", &kept]).contains("name a file"));
    assert!(fit(&["-o", &format!("{out}/deep/er")]).contains("there is no folder"));
    let one = refusal(1, &["fit", &model, "-o", &kept, "--overwrite"]);
    assert!(one.contains("no packed model"), "{one}");
    assert!(refusal(1, &["fit", &model, "-o", &out, "--beside", "no-such-model"]).contains("no-such-model"));
    let same = ["compress", &model, "--recipe", "rtn", "-o", &out, "--report", &kept];
    assert!(refusal(2, &same).contains("name a file"));
    assert_eq!(std::fs::read_to_string(Path::new(&kept).join("mine.txt")).unwrap(), "precious");
    assert!(!Path::new(&out).exists());
}

/// A text of another domain is judged as the held-out one is, and decides nothing.
#[test]
fn results_are_judged_on_other_domains_too() {
    let at = |name: &str| fresh(name).display().to_string();
    let (out, text, model, report) = (at("domains"), at("recipes.txt"), tiny(), at("domains.html"));
    std::fs::write(&text, "Take two eggs, a cup of flour and some milk. Stir well and let it rest. ".repeat(60))
        .unwrap();
    let args = ["compress", &model, "--recipe", "rtn", "-o", &out, "--gate", "size", "--ctx", "64", "--overwrite"];
    let also = object(3, &[&args[..], &["--domain", &text, "--windows", "9", "--report", &report]].concat());
    let domain = &also["domains"][0];
    assert_eq!(domain["text"], "recipes");
    let judged = object(3, &[&args[..], &["--eval", &text, "--windows", "9"]].concat());
    for key in ["ppl", "kl_mean", "kl_p99", "top1_agree", "ppl_dense"] {
        assert_eq!(domain["judged"][key], judged[key], "{key}");
    }
    assert_eq!((&judged["domains"], domain["judged"]["windows"].as_u64()), (&json!([]), Some(9)));
    assert!(std::fs::read_to_string(&report).unwrap().contains("How far from the source"));
    let off = ["compress", &model, "--recipe", "rtn", "-o", &out, "--gate", "off", "--overwrite", "--domain", &text];
    assert!(refusal(2, &off).contains("nothing is judged"));
    assert!(refusal(1, &[&args[..], &["--domain", "no-such.txt"]].concat()).contains("no-such.txt"));
}

/// Texts by weight, conversations, and squares of inputs from a file.
#[test]
fn calibration_comes_from_several_texts_and_from_an_imatrix() {
    let at = |name: &str| fresh(name).display().to_string();
    let (plain, chats, empty, imatrix) = (at("plain.txt"), at("chats.jsonl"), at("empty.txt"), at("squares.dat"));
    std::fs::write(&plain, "A plain text of words, and words again. ".repeat(200)).unwrap();
    let said =
        json!({ "messages": [{ "role": "user", "content": "Hello?" }, { "role": "assistant", "content": "Yes." }] });
    std::fs::write(&chats, format!("{said}\n").repeat(300)).unwrap();
    std::fs::write(&empty, "").unwrap();
    let mut file = 2i32.to_le_bytes().to_vec();
    for name in ["blk.0.attn_q.weight", "blk.1.attn_q.weight"] {
        file.extend((name.len() as i32).to_le_bytes());
        file.extend(name.as_bytes());
        file.extend(4i32.to_le_bytes());
        file.extend((HIDDEN as i32).to_le_bytes());
        (0..HIDDEN).for_each(|i| file.extend((i as f32 + 1.0).to_le_bytes()));
    }
    std::fs::write(&imatrix, file).unwrap();
    let weights = |name: &str, more: &[&str]| {
        let (model, out) = (tiny(), fresh(name));
        let args = ["compress", &model, "--recipe", "weighted-rtn", "-o", out.to_str().unwrap(), "--gate", "off"];
        object(0, &[&args[..], &["--samples", "4", "--seq-len", "32", "--set", "quantize.group=16"], more].concat());
        std::fs::read(out.join("model.safetensors")).unwrap()
    };
    let of = |text: &str| ["--calibration".to_owned(), text.to_owned()];
    let [a, b] = of(&plain);
    let one = weights("of-plain", &[&a, &b]);
    let [c, d] = of(&format!("{chats}=3"));
    assert!(one != weights("of-both", &[&a, &b, &c, &d]), "the conversations change nothing");
    assert!(one != weights("of-squares", &[&a, &b, "--imatrix", &imatrix]), "the imatrix changes nothing");
    let out = at("of-nothing");
    let args = ["compress", &tiny(), "--recipe", "weighted-rtn", "-o", &out, "--gate", "off"];
    let [e, f] = of(&empty);
    assert!(refusal(1, &[&args[..], &[&a, &b, &e, &f]].concat()).contains("empty.txt: 0 tokens"));
    assert!(refusal(1, &[&args[..], &["--imatrix", &plain]].concat()).contains("importance matrix"));
    let rtn = ["compress", &tiny(), "--recipe", "rtn", "-o", &out, "--gate", "off", "--imatrix", &imatrix];
    assert!(refusal(1, &rtn).contains("no step of the recipe reads"));
    // A search by it, and the recipe's own words make the model again.
    let (fitted, again) = (at("by-squares"), at("by-squares-again"));
    let model = tiny();
    let quick = ["fit", &model, "-o", &fitted, "--effort", "quick", "--gate", "off", "--samples", "4"];
    object(0, &[&quick[..], &["--imatrix", &imatrix]].concat());
    let recipe = format!("{fitted}.recipe.toml");
    assert!(std::fs::read_to_string(&recipe).unwrap().contains(&format!("THIS --imatrix {imatrix}")));
    let same = ["compress", &model, "--recipe", &recipe, "-o", &again, "--gate", "off", "--imatrix", &imatrix];
    object(0, &same);
    let read = |dir: &str| std::fs::read(Path::new(dir).join("model.safetensors")).unwrap();
    assert!(read(&fitted) == read(&again), "the recipe makes another model");
}

#[test]
fn serve_says_where_it_is_answers_and_ends_when_told() {
    use std::io::{BufRead, BufReader, Read, Write};
    use std::process::Stdio;
    let mut child = Command::new(env!("CARGO_BIN_EXE_lacuna"))
        .args(["serve", &tiny(), "--port", "0", "--json", "--offline", "--log-format", "json", "--kv-memory", "8MiB"])
        .args(["--served-name", "small", "--drain-timeout", "5"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let told: Value = serde_json::from_str(&line).unwrap();
    let port = told["port"].as_u64().unwrap();
    assert_eq!(told["address"], format!("http://127.0.0.1:{port}"));
    let ask = |text: &str| {
        let mut s = std::net::TcpStream::connect(("127.0.0.1", port as u16)).unwrap();
        s.write_all(text.as_bytes()).unwrap();
        let mut answer = String::new();
        s.read_to_string(&mut answer).unwrap();
        answer
    };
    let card = ask("GET /api/card HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
    assert!(card.contains("\"model\":\"small\"") && card.contains("\"architecture\":\"llama\""), "{card}");
    let (card, seen): (Value, Value) =
        (serde_json::from_str(card.split("\r\n\r\n").nth(1).unwrap()).unwrap(), object(0, &["inspect", &tiny()]));
    for key in ["bytes", "file_bytes", "parameters", "bits_per_weight"] {
        assert_eq!(card[key], seen[key], "{key}");
    }
    let body = r#"{"model": "small", "prompt": "a secret prompt", "max_tokens": 5}"#;
    let answer = ask(&format!(
        "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: \
         close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    ));
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("\"finish_reason\""), "{answer}");
    let foreign = ask("GET /v1/models HTTP/1.1\r\nhost: evil.example\r\nconnection: close\r\n\r\n");
    assert!(foreign.starts_with("HTTP/1.1 403"), "{foreign}");
    assert!(Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap().success());
    let out = child.wait_with_output().unwrap();
    let log = String::from_utf8(out.stderr).unwrap();
    assert!(out.status.success(), "{log}");
    let lines: Vec<Value> = log.lines().filter_map(|l| serde_json::from_str(l).ok()).collect();
    assert!(lines.iter().any(|l| l["path"] == "/v1/completions" && l["status"] == 200), "{log}");
    assert!(lines.iter().any(|l| l["message"] == "answered" && l["tokens"].is_number()), "{log}");
    assert!(!log.contains("secret"), "prompts are not for logs");
}

#[test]
fn serve_refuses_what_cannot_be() {
    for (flags, status) in [
        (vec!["--ctx", "4096"], 2),
        (vec!["--kv-memory", "10"], 2),
        (vec!["--max-batch", "0"], 2),
        (vec!["--client-timeout", "-1"], 2),
        (vec!["--api-key-file", "no-such-file"], 1),
        (vec!["--host", "203.0.113.1"], 1),
    ] {
        let tiny = tiny();
        let out = lacuna(&[&["serve", &tiny, "--port", "0"], &flags[..]].concat());
        assert_eq!(out.status.code(), Some(status), "{flags:?}: {}", String::from_utf8_lossy(&out.stderr));
        assert!(!out.stderr.is_empty());
    }
    let script = lacuna(&["completions", "bash"]);
    assert!(script.status.success() && String::from_utf8_lossy(&script.stdout).contains("complete -F"));
}

/// `--gate` names a gate: all kept says what is said without it, over floats and over codes; what keeps less is told as
/// an approximation, and reads less.
#[test]
fn channels_are_skipped_by_a_flag_or_a_file() {
    let int8 = fresh("int8-to-skip");
    let int8 = int8.to_str().unwrap();
    let recipe = ["-r", "rtn", "--set", "quantize.bits=8", "--set", "quantize.group=32"];
    object(0, &[&["compress", &tiny(), "-o", int8, "--gate", "off"], &recipe[..]].concat());
    let plan = fresh("skip.toml");
    std::fs::write(&plan, "version = 1\n[gate]\nmethod = \"wina\"\nkeep = 0.1\ntargets = [\"ffn.*\"]\n").unwrap();
    for model in [tiny().as_str(), int8] {
        let say =
            |more: &[&str]| object(0, &[&["generate", model, "-p", "abc", "-n", "20", "--temp", "0"], more].concat());
        let (plain, all) = (say(&[]), say(&["--gate", "wina:keep=1.0"]));
        assert_eq!(plain["text"], all["text"], "{model}");
        assert!(plain["run"].is_null() && all["run"]["lossless"] == json!(false), "{all}");
        let half = say(&["--run", plan.to_str().unwrap(), "--gate", "wina:keep=0.3"]);
        assert_eq!(half["run"]["methods"][0]["question"], "gate");
        assert!(say(&["--run", plan.to_str().unwrap(), "--gate", "none"])["run"].is_null());
        let bench = |more: &[&str]| {
            object(0, &[&["bench", model, "--prompt", "8", "--gen", "4", "--reps", "1"], more].concat())
        };
        let (plain, some) = (bench(&[]), bench(&["--run", plan.to_str().unwrap()]));
        let bytes = |b: &Value| b["weights_bytes"].as_u64().unwrap();
        assert!(bytes(&some) < bytes(&plain), "{plain} {some}");
        assert_eq!(bytes(&bench(&["--gate", "wina:keep=1.0"])), bytes(&plain));
    }
    let said = refusal(2, &["generate", &tiny(), "-p", "a", "--gate", "wina:keep=0"]);
    assert!(said.contains("--gate wina:keep=0") && said.contains("above 0"), "{said}");
    // What is found out only when the model is there is the command line's fault as well.
    let said = refusal(2, &["generate", &tiny(), "-p", "a", "--gate", "wina:targets=ffn.nothing"]);
    assert!(said.contains("gate"), "{said}");
    let said = refusal(2, &["generate", &tiny(), "-p", "a", "--run", "no-such-plan.toml"]);
    assert!(said.contains("--run no-such-plan.toml") && said.contains("No such file"), "{said}");
}
