//! Models that lost tokens: the same logits for those that stay, in every layout, and losses told by the byte.

mod support;

use std::path::{Path, PathBuf};

use lacuna_checkpoint::save::{GgufKind, save_gguf, save_hf};
use lacuna_checkpoint::{Adapter, Checkpoint, Tokenizer, open};
use lacuna_compress::{CompressError, Options, Outcomes, Quiet, Recipe, compress};
use lacuna_eval::{Eval, Speaker};
use lacuna_format::{Float, Weights};
use safetensors::{Dtype, serialize_to_file, tensor::TensorView};
use serde_json::json;
use support::{families, greedy, logits, logits_of, make};
use tempfile::TempDir;

/// What the models here are for.
const TEXT: &str = "The river takes the bridge again. The bridge takes the river, and the river is wide.\n";
/// What they are not for.
const OTHER: &str =
    "In 1969, 12 people of 1234567 said: it's 3.14159; Größe, naïve, 今日は 😀 def area(w, h):\n  return w\n";

const STEP: &str = "version = 1\nrest = \"source\"\n[[step]]\nmethod = \"lexical-shortlist\"\n";

fn run(source: &Checkpoint, tokens: &[u32], text: &str, out: &Path) -> Result<Outcomes, CompressError> {
    let sets = ["calibration.samples=4".to_owned(), "calibration.seq_len=16".to_owned()];
    let recipe = Recipe::parse(text, &lacuna_methods::registry(), &sets).unwrap();
    let options = Options {
        out,
        overwrite: false,
        resume: false,
        scratch: None,
        max_ram: None,
        bos: None,
        imatrix: None,
        source: json!("made"),
    };
    compress(source, tokens, &recipe, &options, &mut Quiet)
}

fn family(home: &TempDir, name: &str, vocab: usize) -> PathBuf {
    let (_, mut config) = families().into_iter().find(|f| f.0 == name).unwrap();
    config["vocab_size"] = json!(vocab);
    let dir = home.path().join(name);
    make(&dir, &config);
    dir
}

fn renamed(kept: &[usize], ids: &[u32]) -> Vec<u32> {
    ids.iter().map(|&id| kept.binary_search(&(id as usize)).unwrap() as u32).collect()
}

/// A shorter model beside the one it was made from, on tokens that it has.
fn same_for_kept(name: &str, source: &Path, done: &Outcomes, ids: &[u32]) {
    let kept = done.kept.as_ref().unwrap();
    let want: Vec<Vec<f32>> =
        logits_of(source, ids).iter().map(|row| kept.iter().map(|&id| row[id]).collect()).collect();
    let have = logits_of(&done.path, &renamed(kept, ids));
    let bits = |all: &[Vec<f32>]| all.iter().flatten().map(|x| x.to_bits()).collect::<Vec<u32>>();
    assert!(bits(&want) == bits(&have), "{name}: logits of tokens that stay changed");
}

#[test]
fn tokens_that_stay_keep_their_logits_and_their_text() {
    let home = TempDir::new().unwrap();
    for name in ["llama", "llama3", "gpt2", "gemma3"] {
        let dir = family(&home, name, 603);
        let source = open(&dir).unwrap();
        let tokenizer = Tokenizer::open(&source).unwrap();
        let prompt = tokenizer.encode(TEXT, false).unwrap();
        let answer = greedy(&dir, &prompt, 12);
        // Rows beyond the tokenizer's last token are nobody's; an answer of random weights may hit them.
        let answer: Vec<u32> = answer.into_iter().take_while(|id| (*id as usize) < tokenizer.vocab_size()).collect();
        let seen = [prompt.clone(), answer.clone()].concat();
        let done = run(&source, &seen, STEP, &home.path().join(format!("{name}-short"))).unwrap();
        let kept = done.kept.clone().unwrap();
        assert!(kept.len() < 450 && done.spec.vocab == kept.len(), "{name}: {} tokens stay", kept.len());
        assert!(done.notes.iter().any(|n| n.contains("with 100.000%")), "{:?}", done.notes);
        same_for_kept(name, &dir, &done, &seen);
        assert_eq!(greedy(&done.path, &renamed(&kept, &prompt), answer.len()), renamed(&kept, &answer), "{name}");

        let short = open(&done.path).unwrap();
        let own = Tokenizer::open(&short).unwrap();
        assert_eq!(own.encode(TEXT, true).unwrap(), renamed(&kept, &tokenizer.encode(TEXT, true).unwrap()));
        assert_eq!(own.decode(&own.encode(OTHER, false).unwrap()), OTHER);

        // In the layouts of other programs it is the same model with the same tokens.
        let (hf, gguf) = (home.path().join(format!("{name}-hf")), home.path().join(format!("{name}.gguf")));
        save_hf(&short, &hf, Some(Float::F32), false, &mut |_, _| {}).unwrap();
        save_gguf(&short, &gguf, GgufKind::F32, false, &mut |_, _| {}).unwrap();
        let want = logits(&short, &renamed(&kept, &seen));
        for path in [&hf, &gguf] {
            let written = open(path).unwrap();
            assert_eq!(written.spec().vocab, kept.len());
            let theirs = Tokenizer::open(&written).unwrap();
            assert_eq!((theirs.bos(), theirs.eos_set()), (own.bos(), own.eos_set()), "{name}");
            for text in [TEXT, OTHER] {
                assert_eq!(theirs.encode(text, false).unwrap(), own.encode(text, false).unwrap(), "{name}: {text}");
            }
            let off = support::apart(&logits(&written, &renamed(&kept, &seen)), &want);
            assert!(off < 2e-3, "{name}: {} lies {off} apart", path.display());
        }
        // And from a GGUF file, whose tokenizer lies within.
        if name == "llama" {
            let whole = home.path().join("whole.gguf");
            save_gguf(&source, &whole, GgufKind::Q8_0, false, &mut |_, _| {}).unwrap();
            let again = run(&open(&whole).unwrap(), &seen, STEP, &home.path().join("of-gguf")).unwrap();
            assert_eq!(again.kept.as_ref(), Some(&kept));
            same_for_kept("of a GGUF file", &whole, &again, &seen);
            let back = home.path().join("back.gguf");
            save_gguf(&open(&again.path).unwrap(), &back, GgufKind::Source, false, &mut |_, _| {}).unwrap();
            let theirs = Tokenizer::open(&open(&back).unwrap()).unwrap();
            assert_eq!(theirs.encode(TEXT, false).unwrap(), own.encode(TEXT, false).unwrap());
        }
    }
}

#[test]
fn where_every_token_stays_nothing_changes() {
    let home = TempDir::new().unwrap();
    let source = open(family(&home, "llama", 600)).unwrap();
    let tokens = Tokenizer::open(&source).unwrap().encode(TEXT, false).unwrap();
    let (plain, all) = (home.path().join("plain"), home.path().join("all"));
    run(&source, &tokens, "version = 1\nrest = \"source\"\n", &plain).unwrap();
    let done = run(&source, &tokens, &format!("{STEP}min_count = 0\n"), &all).unwrap();
    assert!(done.kept.is_none());
    for file in ["model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"] {
        let read = |dir: &Path| std::fs::read(dir.join(file)).unwrap();
        assert!(read(&plain) == read(&all), "{file} changed");
    }
}

#[test]
fn later_steps_calibrate_in_the_tokens_that_are_left() {
    let home = TempDir::new().unwrap();
    let source = open(family(&home, "llama", 603)).unwrap();
    let tokenizer = Tokenizer::open(&source).unwrap();
    // More of the text than the tokens that may stay: it is cut anew, by smaller ones.
    let tokens = tokenizer.encode(&[TEXT, OTHER].concat().repeat(3), false).unwrap();
    let must = tokenizer.lexicon(&source, 603).unwrap().must.iter().filter(|m| **m).count();
    let text = format!(
        "{STEP}count = {}\n[[step]]\nmethod = \"wanda\"\nsparsity = 0.5\n[[step]]\nmethod = \"rtn\"\ntargets = \
         [\"embed\", \"head\"]\nbits = 8\n",
        must + 8
    );
    let done = run(&source, &tokens, &text, &home.path().join("short")).unwrap();
    let kept = done.kept.clone().unwrap();
    assert!(kept.len() <= must + 8 && kept.len() > must, "{} of {must} and 8", kept.len());
    let own = Tokenizer::open(&open(&done.path).unwrap()).unwrap();
    let ids = own.encode(TEXT, false).unwrap();
    assert!(logits_of(&done.path, &ids).iter().flatten().all(|x| x.is_finite()));

    let refused = |text: &str| run(&source, &tokens, text, &home.path().join("none")).err().unwrap().to_string();
    let said = refused(&format!("{STEP}count = 20\n"));
    assert!(said.contains("20 tokens may stay") && said.contains("must"), "{said}");
    let said = refused(&format!("{STEP}[[step]]\nname = \"again\"\nmethod = \"lexical-shortlist\"\n"));
    assert!(said.contains("again") && said.contains("earlier step"), "{said}");
    std::fs::remove_file(source.dir().join("tokenizer.json")).unwrap();
    assert!(refused(STEP).contains("no tokenizer"));
}

#[test]
fn other_vocabularies_are_told_by_the_byte() {
    let home = TempDir::new().unwrap();
    let dir = family(&home, "llama", 603);
    let source = open(&dir).unwrap();
    let tokenizer = Tokenizer::open(&source).unwrap();
    let tokens = tokenizer.encode(&TEXT.repeat(6), false).unwrap();
    let done = run(&source, &tokens, STEP, &home.path().join("short")).unwrap();
    let kept = done.kept.unwrap();
    let short = open(&done.path).unwrap();
    let own = Tokenizer::open(&short).unwrap();
    let (model, dense) =
        (Speaker { weights: &short, tokenizer: &own }, Speaker { weights: &source, tokenizer: &tokenizer });
    let eval = Eval { ctx: 24, windows: Some(4), ..Eval::default() };

    let mut reference = eval.reference(&tokens, &source).unwrap();
    let said = eval.against(&short, &mut reference).unwrap_err().to_string();
    assert!(said.contains("no KL") && said.contains("nats a byte"), "{said}");

    let x = eval.across(&tokens, model, dense).unwrap();
    let alone = eval.judge(&tokens, &source).unwrap();
    assert!((x.dense.nll - alone.nll).abs() < 1e-12 && x.dense.tokens == alone.tokens);
    // The same tokens: the same bytes, and the model saves what the dense one gives to those that went.
    assert_eq!((x.model.tokens, x.model.bytes, x.windows), (x.dense.tokens, x.dense.bytes, 4));
    assert_eq!(x.missing, 603 - kept.len());
    let (mut mass, mut saved, mut n) = (0.0, 0.0, 0.0);
    for w in tokens.chunks(24).take(4) {
        for row in &logits(&source, w)[..23] {
            let e: Vec<f64> = row.iter().map(|x| f64::from(*x).exp()).collect();
            let gone = 1.0 - kept.iter().map(|&id| e[id]).sum::<f64>() / e.iter().sum::<f64>();
            (mass, saved, n) = (mass + gone, saved - (1.0 - gone).ln(), n + 1.0);
        }
    }
    assert!((x.missing_mass - mass / n).abs() < 1e-5 && mass / n > 0.1, "{} {}", x.missing_mass, mass / n);
    assert!((x.dense.nll - x.model.nll - saved / n).abs() < 1e-5);
    let by_hand = x.model.nll * x.model.tokens as f64 / x.model.bytes as f64;
    assert!((x.model.nats_a_byte - by_hand).abs() < 1e-12);
    assert!((x.nll_in_dense_tokens() - x.model.nll).abs() < 1e-12);

    // A text with tokens that went: more tokens for the same bytes, but for letters that windows cut through.
    let tokens = tokenizer.encode(&OTHER.repeat(6), false).unwrap();
    let x = eval.across(&tokens, model, dense).unwrap();
    assert!(x.model.tokens > x.dense.tokens && x.model.bytes.abs_diff(x.dense.bytes) <= 4 * 6, "{x:?}");
    assert!(x.model.nats_a_byte.is_finite() && x.nll_in_dense_tokens() > x.model.nll);
    // Each window begins with BOS, which both have.
    let with_bos = Eval { bos: tokenizer.bos().or(Some(1)), ..eval.clone() };
    let x = with_bos.across(&tokens, model, dense).unwrap();
    assert!(x.model.bytes.abs_diff(x.dense.bytes) <= 4 * 6, "{x:?}");
}

#[test]
fn a_text_of_nothing_and_keys_of_the_other_way_are_refused() {
    let home = TempDir::new().unwrap();
    let source = open(family(&home, "llama", 603)).unwrap();
    let said = run(&source, &[], STEP, &home.path().join("none")).err().expect("no text").to_string();
    assert!(said.contains("the calibration text has 0 tokens"), "{said}");
    for (keys, want) in [
        ("by = \"script\"\nmin_count = 3\n", "min_count goes with by = \"corpus\""),
        ("scripts = [\"Greek\"]\n", "scripts goes with by = \"script\""),
        ("by = \"script\"\nscripts = []\n", "scripts is empty"),
    ] {
        let said = Recipe::parse(&format!("{STEP}{keys}"), &lacuna_methods::registry(), &[]).err().expect("refused");
        assert!(said.what.contains(want), "{}", said.what);
    }
}

#[test]
fn an_adapter_with_rows_for_the_source_is_refused_on_what_lost_tokens() {
    let home = TempDir::new().unwrap();
    let dir = family(&home, "llama", 603);
    let source = open(&dir).unwrap();
    let tokens = Tokenizer::open(&source).unwrap().encode(TEXT, false).unwrap();
    let done = run(&source, &tokens, STEP, &home.path().join("short")).unwrap();
    let adapter = home.path().join("adapter");
    std::fs::create_dir(&adapter).unwrap();
    let config = json!({"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens", "lm_head"]});
    std::fs::write(adapter.join("adapter_config.json"), config.to_string()).unwrap();
    let zeros = vec![0u8; 4 * 603 * source.spec().hidden];
    let table = || TensorView::new(Dtype::F32, vec![603, source.spec().hidden], &zeros).unwrap();
    let tensors =
        [("base_model.model.model.embed_tokens.weight", table()), ("base_model.model.lm_head.weight", table())];
    serialize_to_file(tensors, None, &adapter.join("adapter_model.safetensors")).unwrap();
    let put = |model: Checkpoint| model.with_adapter(Adapter::open(&adapter).unwrap(), false);
    assert!(put(source).is_ok());
    let said = put(open(&done.path).unwrap()).expect_err("refused").to_string();
    assert!(said.contains("603 rows") && said.contains("before it loses tokens"), "{said}");
}
