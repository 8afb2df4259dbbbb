//! The engine on tiny checkpoints: what must not depend on chunks, reuse, stop texts or the clock.

mod common;

use std::ops::ControlFlow;

use common::{engine, tokenizer};
use lacuna_checkpoint::{ChatTemplate, Tokenizer, Vocabulary};
use lacuna_run::{BenchOptions, Chat, Engine, Generated, Generation, RunError, Sampler, Sampling, Stop};

fn run(e: &Engine, g: &Generation) -> Generated {
    let mut seen = String::new();
    let out = e
        .generate(&mut e.sequence(), &tokenizer(), g, &mut |t| {
            seen += t;
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!(seen, out.text, "what was streamed is the answer");
    out
}

fn request(tokens: usize) -> Generation {
    Generation { prompt: (5..45).collect(), max_tokens: tokens, ignore_end: true, ..Generation::default() }
}

fn drawn(seed: u64) -> Generation {
    let sampling = Sampling {
        temperature: 1.0,
        top_k: 50,
        top_p: 0.95,
        min_p: 0.001,
        repetition_penalty: 1.1,
        seed,
        ..Sampling::default()
    };
    Generation { sampling, ..request(24) }
}

/// Room for keys and values comes in steps of 128 positions; between them nothing is asked of the system.
#[test]
fn a_step_allocates_nothing() {
    for name in ["llama", "gemma3", "gpt2", "phi3", "qwen2", "opt"] {
        let e = engine(name);
        let mut seq = e.sequence();
        e.reuse(&mut seq, &[], 60);
        let mut sampler = Sampler::new(&drawn(1).sampling).unwrap();
        let mut step = |token: u32| {
            let logits = e.extend(&mut seq, &[token]).unwrap();
            sampler.pick(logits, &[], 0, None).unwrap();
        };
        (5..9).for_each(&mut step);
        let seen = allocation_counter::measure(|| (9..30).for_each(step));
        assert_eq!(seen.count_total, 0, "{name}: {} bytes", seen.bytes_total);
    }
}

#[test]
fn same_request_same_answer() {
    for name in ["llama", "gemma3", "gpt2", "llama_rope_longrope", "qwen3_moe"] {
        let e = engine(name);
        let first = run(&e, &request(20));
        assert_eq!(first.tokens.len(), 20, "{name}");
        assert_eq!((&first.stats.stop, first.stats.prompt_tokens, first.stats.tokens), (&Stop::MaxTokens, 40, 20));
        assert_eq!(run(&e, &request(20)).tokens, first.tokens, "{name}: greedy twice");
        assert_eq!(run(&e, &drawn(1)).tokens, run(&e, &drawn(1)).tokens, "{name}: one seed");
        assert_ne!(run(&e, &drawn(1)).tokens, run(&e, &drawn(2)).tokens, "{name}: two seeds");
    }
}

#[test]
fn chunks_and_reuse_change_nothing() {
    for name in ["llama", "gemma3", "gpt2", "llama_rope_longrope", "qwen3_moe"] {
        let whole = engine(name);
        let expected = run(&whole, &drawn(3)).tokens;
        let logits = whole.extend(&mut whole.sequence(), &request(0).prompt).unwrap().to_vec();
        for chunk in [1, 7, 39, 40] {
            let e = engine(name).with_chunk(chunk);
            assert_eq!(run(&e, &drawn(3)).tokens, expected, "{name} in chunks of {chunk}");
            assert_eq!(e.extend(&mut e.sequence(), &request(0).prompt).unwrap(), logits, "{name}: the same bits");
        }
        // A sequence that went another way comes back to the common beginning.
        let mut seq = whole.sequence();
        let mut other = drawn(3);
        other.prompt.truncate(30);
        other.prompt.extend([9, 9, 9, 9, 9]);
        let t = tokenizer();
        whole.generate(&mut seq, &t, &other, &mut |_| ControlFlow::Continue(())).unwrap();
        let again = whole.generate(&mut seq, &t, &drawn(3), &mut |_| ControlFlow::Continue(())).unwrap();
        assert_eq!(again.tokens, expected, "{name} after another text");
        assert_eq!(again.stats.reused_tokens, 30, "{name}");
        // The whole prompt known: its last token is read again for its logits.
        let again = whole.generate(&mut seq, &t, &drawn(3), &mut |_| ControlFlow::Continue(())).unwrap();
        assert_eq!((again.tokens, again.stats.reused_tokens), (expected, 39), "{name}");
    }
}

#[test]
fn generation_ends_where_it_should() {
    let e = engine("llama");
    let all = run(&e, &request(20));
    // A stop text from the middle of the answer: everything before it, nothing of it.
    let stop: String = all.text.chars().skip(6).take(3).collect();
    let before = &all.text[..all.text.find(&stop).unwrap()];
    let cut = run(&e, &Generation { stop: vec!["nowhere".into(), stop.clone()], ..request(20) });
    assert_eq!((cut.text.as_str(), cut.stats.stop), (before, Stop::StopText(stop)));
    // An end token, made one by naming it so.
    let end = all.tokens[9];
    let at = all.tokens.iter().position(|&t| t == end).unwrap();
    let mut v = Vocabulary { model: "gpt2".into(), pre: Some("gpt-2".into()), ..Vocabulary::default() };
    v.tokens = (0..96).map(|id| tokenizer().token_text(id).unwrap().to_owned()).collect();
    v.more_eos = vec![end];
    let t = Tokenizer::from_vocabulary(v).unwrap();
    let g = Generation { ignore_end: false, ..request(20) };
    let out = e.generate(&mut e.sequence(), &t, &g, &mut |_| ControlFlow::Continue(())).unwrap();
    assert_eq!((out.tokens.as_slice(), out.stats.stop), (&all.tokens[..at], Stop::EndToken(end)));
    // The caller, and the context.
    let out = e.generate(&mut e.sequence(), &tokenizer(), &request(20), &mut |_| ControlFlow::Break(())).unwrap();
    assert_eq!(out.stats.stop, Stop::Caller);
    let small = engine("llama").with_context(50);
    let out = run(&small, &request(20));
    assert_eq!((out.tokens.as_slice(), out.stats.stop), (&all.tokens[..10], Stop::Context));
    let full = engine("llama").with_context(40);
    let error = full.generate(&mut full.sequence(), &tokenizer(), &request(1), &mut |_| ControlFlow::Continue(()));
    assert!(matches!(error, Err(RunError::Context { tokens: 40, context: 40, .. })));
    let none = Generation { prompt: Vec::new(), ..request(1) };
    let error = e.generate(&mut e.sequence(), &tokenizer(), &none, &mut |_| ControlFlow::Continue(()));
    assert!(matches!(error, Err(RunError::Empty)));
    // A token the model lacks: an error, and the sequence stays usable.
    let mut seq = e.sequence();
    assert!(e.extend(&mut seq, &[5, 6, 7]).is_ok() && e.extend(&mut seq, &[8, 4000]).is_err());
    assert_eq!(seq.tokens(), [5, 6, 7]);
    let logits = e.extend(&mut e.sequence(), &[5, 6, 7, 8]).unwrap().to_vec();
    assert_eq!(e.extend(&mut seq, &[8]).unwrap(), logits);
}

#[test]
fn a_conversation_reuses_what_was_said_and_refuses_what_does_not_fit() {
    let (e, t) = (engine("llama").with_context(64), tokenizer());
    let template = ChatTemplate::new(
        "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt \
         %}<|im_start|>{% endif %}",
    )
    .unwrap();
    let mut chat = Chat::new(&e, &t, &template);
    chat.system("be");
    let g = Generation { max_tokens: 8, ..Generation::default() };
    let say = |chat: &mut Chat<'_>, text: &str| chat.say(text, &g, &mut |_| ControlFlow::Continue(()));
    let first = say(&mut chat, "hello").unwrap();
    assert_eq!(first.stats.prompt_tokens, 4 + 7 + 1);
    assert_eq!(chat.messages().len(), 3);
    let second = say(&mut chat, "why").unwrap();
    assert!(second.stats.reused_tokens >= 12, "{:?}", second.stats);
    let before = chat.messages().to_vec();
    let error = say(&mut chat, &"x".repeat(60)).unwrap_err();
    assert!(matches!(error, RunError::Context { .. }), "{error}");
    assert_eq!(chat.messages(), before);
    assert!(say(&mut chat, "and").is_ok());
    chat.reset();
    assert_eq!(chat.messages().len(), 1);
}

#[test]
fn a_bench_counts_its_bytes() {
    let e = engine("gemma3");
    let o = BenchOptions { prompt_tokens: 32, gen_tokens: 8, depth: 16, reps: 3, seed: 0, profile: false };
    let mut last = (0, 0);
    let b = e.bench(&o, &mut |done, of| last = (done, of)).unwrap();
    assert_eq!((b.prefill_all_tok_s.len(), b.decode_all_tok_s.len(), last), (3, 3, (6, 6)));
    assert!(b.prefill_tok_s.unwrap() > 0.0 && b.decode_tok_s.unwrap() > 0.0);
    assert_eq!(b.token_bytes, b.weights_bytes + b.kv_bytes);
    assert!(b.weights_bytes > 0 && b.kv_bytes > 0);
    assert!(e.bench(&BenchOptions { depth: 1000, ..o.clone() }, &mut |_, _| ()).is_err());
    assert!(e.bench(&BenchOptions { prompt_tokens: 0, gen_tokens: 0, ..o }, &mut |_, _| ()).is_err());
}
