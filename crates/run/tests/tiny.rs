//! The engine on tiny checkpoints: what must not depend on chunks, reuse, stop texts or the clock.

mod common;

use std::ops::ControlFlow;
use std::sync::Arc;

use common::{after, scheduler, tokenizer};
use lacuna_checkpoint::{ChatTemplate, Tokenizer, Vocabulary};
use lacuna_kernels::KvFormat;
use lacuna_run::{
    BLOCK_TOKENS, BenchOptions, Chat, Engine, Generated, Generation, Job, Request, RunError, Sampling, Session, Stop,
    bench,
};

fn engine(name: &str) -> Arc<Engine> {
    Arc::new(common::engine(name))
}

fn session(e: &Arc<Engine>) -> Session {
    Session::new(Arc::clone(e), tokenizer())
}

fn go(s: &mut Session, g: &Generation) -> Generated {
    let mut seen = String::new();
    let out = s.generate(g, &mut |t| {
        seen += t;
        ControlFlow::Continue(())
    });
    let out = out.unwrap();
    assert_eq!(seen, out.text, "what was streamed is the answer");
    out
}

fn run(e: &Arc<Engine>, g: &Generation) -> Generated {
    go(&mut session(e), g)
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

/// One of each mechanism that came later: parts side by side, norms behind them and over all heads, a scale for each head,
/// cuts, a factor by position, xIELU, ALiBi, norms behind RoPE, inputs of layers, keys of other layers, several streams.
const LATER: [&str; 10] = [
    "olmo",
    "olmo3",
    "cohere_norms",
    "cohere2",
    "ministral3",
    "apertus",
    "bloom",
    "hunyuan_v1_dense",
    "gemma4",
    "gemma3n",
];

/// Room for keys and values comes in blocks; between them nothing is asked of the system.
#[test]
fn a_step_allocates_nothing() {
    for name in ["llama", "gemma3", "gpt2", "phi3", "qwen2", "opt"].into_iter().chain(LATER) {
        let mut s = scheduler(engine(name), 1, 512, 9, true);
        s.submit(1, Request::new(vec![5], Job::Forced((6..40).collect()))).unwrap();
        let mut step = || assert_eq!(s.step(&mut |_, event| panic!("{event:?}")).logits_rows, 1);
        (0..4).for_each(|_| step());
        let seen = allocation_counter::measure(|| (4..25).for_each(|_| step()));
        assert_eq!(seen.count_total, 0, "{name}: {} bytes", seen.bytes_total);
    }
}

#[test]
fn same_request_same_answer() {
    for name in ["llama", "gemma3", "gpt2", "llama_rope_longrope", "qwen3_moe"].into_iter().chain(LATER) {
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
    for name in ["llama", "gemma3", "gpt2", "llama_rope_longrope", "qwen3_moe"].into_iter().chain(LATER) {
        let whole = engine(name);
        let expected = run(&whole, &drawn(3)).tokens;
        let prompt = request(0).prompt;
        let (bits, _) = after(&mut scheduler(Arc::clone(&whole), 1, 512, 9, false), &prompt).unwrap();
        for chunk in [1, 7, 39, 40] {
            let mut s = Session::with_chunk(Arc::clone(&whole), tokenizer(), chunk);
            assert_eq!(go(&mut s, &drawn(3)).tokens, expected, "{name} in chunks of {chunk}");
            let (chunked, _) = after(&mut scheduler(Arc::clone(&whole), 1, chunk, 9, false), &prompt).unwrap();
            assert_eq!(chunked, bits, "{name}: the same bits");
        }
        // A session that went another way comes back to the common beginning.
        let mut s = session(&whole);
        let mut other = drawn(3);
        other.prompt.truncate(30);
        other.prompt.extend([9, 9, 9, 9, 9]);
        go(&mut s, &other);
        let again = go(&mut s, &drawn(3));
        assert_eq!(again.tokens, expected, "{name} after another text");
        assert_eq!(again.stats.reused_tokens, 30, "{name}");
        // The whole prompt known: its last token is read again for its logits.
        let again = go(&mut s, &drawn(3));
        assert_eq!((again.tokens, again.stats.reused_tokens), (expected, 39), "{name}");
    }
}

/// Beginnings of every length, in both kinds of block: those of blocks that are full and of tails.
#[test]
fn a_text_takes_over_what_it_has_in_common_to_the_token() {
    for (name, format) in ["llama", "gemma3"].into_iter().flat_map(|n| [(n, KvFormat::F32), (n, KvFormat::Q8)]) {
        let e = Arc::new(common::engine(name).with_context(256).with_kv(format));
        let text: Vec<u32> = (0..90).map(|i| 3 + i * 7 % 90).collect();
        let mut fresh = scheduler(Arc::clone(&e), 1, 512, 16, false);
        for n in [1, 2, 31, 32, 33, 50, 63, 64, 65, 80, 89] {
            let mut s = scheduler(Arc::clone(&e), 1, 512, 16, true);
            after(&mut s, &text).unwrap();
            // As far as the first text, then elsewhere.
            let other = [&text[..n], &[4, 4, 4]].concat();
            let expected = (after(&mut fresh, &other).unwrap().0, n);
            assert_eq!(after(&mut s, &other).unwrap(), expected, "{name} {format:?}: {n} of 90");
            // What was published for the first one is as it was.
            let all = (after(&mut fresh, &text).unwrap().0, text.len() - 1);
            assert_eq!(after(&mut s, &text).unwrap(), all, "{name} {format:?}: after {n}");
            let blocks = s.gauges().blocks;
            assert_eq!((blocks.used, blocks.free + blocks.cached), (0, 16));
        }
    }
}

/// A session has room for what its text may become, and holds what it became.
#[test]
fn room_grows_with_the_text() {
    let e = Arc::new(common::engine("llama").with_context(1 << 20));
    let block = lacuna_run::BlockStore::new(&e.model().spec, KvFormat::F32, usize::MAX).block_bytes();
    let mut s = session(&e);
    assert_eq!(s.kv_bytes(), 0);
    let small = Generation { max_tokens: 1 << 19, ..request(0) };
    let stop = |n: usize| {
        let mut seen = 0;
        move |t: &str| {
            seen += t.len();
            if seen < n { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        }
    };
    s.generate(&small, &mut stop(8)).unwrap();
    assert_eq!(s.kv_bytes(), 2 * block, "40 tokens and some");
    s.generate(&small, &mut stop(40)).unwrap();
    assert!(s.kv_bytes() <= 4 * block, "{} bytes", s.kv_bytes());
    // A shorter text gives back what it cannot need: two blocks of its own, and one beside.
    go(&mut s, &Generation { prompt: vec![7; 20], ..request(20) });
    assert!(s.kv_bytes() <= 3 * block, "{} bytes", s.kv_bytes());
}

#[test]
fn one_text_says_alone_what_it_says_among_eight() {
    for name in ["llama", "gemma3", "gpt2", "llama_rope_longrope", "qwen3_moe"].into_iter().chain(LATER) {
        let e = engine(name);
        let all: Vec<Generation> = (0..8)
            .map(|i| {
                let g = if i % 2 == 0 { request(20) } else { drawn(i) };
                let prompt = g.prompt[..40 - i as usize].iter().map(|t| t + i as u32 % 3).collect();
                Generation { prompt, ..g }
            })
            .collect();
        let mut s = scheduler(Arc::clone(&e), 8, 64, 99, true);
        all.iter().zip(0..).for_each(|(g, id)| s.submit(id, Request::generate(g.clone())).unwrap());
        let mut ends = vec![None; 8];
        while !s.is_idle() {
            s.step(&mut |id, event| match event {
                lacuna_run::Event::Finished(f) => ends[id as usize] = Some(f),
                lacuna_run::Event::Failed(e) => panic!("{name}: {e}"),
                _ => {}
            });
        }
        let mut one = session(&e);
        for (g, end) in all.iter().zip(ends) {
            let (alone, end) = (go(&mut one, g), end.unwrap());
            assert_eq!((alone.tokens, alone.stats.stop), (end.ids, end.stop), "{name}");
        }
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
    let out = go(&mut Session::new(Arc::clone(&e), t), &g);
    assert_eq!((out.tokens.as_slice(), out.stats.stop), (&all.tokens[..at], Stop::EndToken(end)));
    // The caller, and the context.
    let mut left = session(&e);
    let out = left.generate(&request(20), &mut |_| ControlFlow::Break(())).unwrap();
    assert_eq!((out.stats.stop, out.stats.tokens), (Stop::Caller, 1));
    assert_eq!(go(&mut left, &request(20)).tokens, all.tokens, "and it can go on");
    let small = Arc::new(common::engine("llama").with_context(50));
    let out = run(&small, &request(20));
    assert_eq!((out.tokens.as_slice(), out.stats.stop), (&all.tokens[..10], Stop::Context));
    let mut full = session(&Arc::new(common::engine("llama").with_context(40)));
    let error = full.generate(&request(1), &mut |_| ControlFlow::Continue(()));
    assert!(matches!(error, Err(RunError::Context { tokens: 40, context: 40, .. })));
    let none = Generation { prompt: Vec::new(), ..request(1) };
    let error = left.generate(&none, &mut |_| ControlFlow::Continue(()));
    assert!(matches!(error, Err(RunError::Empty)));
    let hot = Generation { sampling: Sampling { temperature: -1.0, ..Sampling::default() }, ..request(1) };
    assert!(matches!(left.check(&hot), Err(RunError::Setting { .. })) && left.check(&request(1)).is_ok());
    // A token the model lacks: an error, and the session stays usable.
    let foreign = Generation { prompt: vec![5, 4000], ..request(1) };
    let error = left.generate(&foreign, &mut |_| ControlFlow::Continue(())).unwrap_err();
    assert!(error.to_string().contains("4000"), "{error}");
    assert_eq!(go(&mut left, &request(20)).tokens, all.tokens);
    assert_eq!(go(&mut left, &request(0)).stats.stop, Stop::MaxTokens);
}

/// Beyond the positions that were learned, which a longer context allows to ask for.
#[test]
fn a_model_that_fails_leaves_a_session_that_can_go_on() {
    let learned = engine("gpt2").context();
    let e = Arc::new(common::engine("gpt2").with_context(4 * learned));
    let fresh = run(&e, &request(8));
    let mut s = session(&e);
    let mut told = String::new();
    let error = s.generate(&request(3 * learned), &mut |t| {
        told += t;
        ControlFlow::Continue(())
    });
    let error = error.unwrap_err().to_string();
    assert!(error.contains(&learned.to_string()) && told.starts_with(&fresh.text), "{error}");
    let again = go(&mut s, &request(8));
    assert_eq!((again.tokens, again.stats.reused_tokens), (fresh.tokens.clone(), 39));
    // A prompt that is too long fails at once, and leaves what was there.
    let long = Generation { prompt: vec![7; 2 * learned], ..request(8) };
    assert!(s.generate(&long, &mut |_| ControlFlow::Continue(())).is_err());
    assert_eq!(go(&mut s, &request(8)).tokens, fresh.tokens);
}

#[test]
fn a_conversation_reuses_what_was_said_and_refuses_what_does_not_fit() {
    let e = Arc::new(common::engine("llama").with_context(64));
    let template = ChatTemplate::new(
        "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt \
         %}<|im_start|>{% endif %}",
    )
    .unwrap();
    let mut chat = Chat::new(session(&e), &template);
    chat.system("be");
    let g = Generation { max_tokens: 8, ..Generation::default() };
    let say = |chat: &mut Chat<'_>, text: &str| chat.say(text, &g, &mut |_| ControlFlow::Continue(()));
    let first = say(&mut chat, "hello").unwrap();
    assert_eq!(first.stats.prompt_tokens, 4 + 7 + 1);
    assert_eq!(chat.messages().len(), 3);
    let second = say(&mut chat, "why").unwrap();
    // The first prompt, and what was said of the answer if it comes back as the same tokens: no whole block is needed.
    assert!(second.stats.prompt_tokens < BLOCK_TOKENS && second.stats.reused_tokens >= 12, "{:?}", second.stats);
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
    let o = BenchOptions { prompt_tokens: 32, gen_tokens: 8, depth: 16, reps: 3, seed: 0, profile: true };
    let mut last = (0, 0);
    let b = bench(Arc::clone(&e), &o, &mut |done, of| last = (done, of)).unwrap();
    assert_eq!((b.prefill_all_tok_s.len(), b.decode_all_tok_s.len(), last), (3, 3, (6, 6)));
    assert!(b.prefill_tok_s.unwrap() > 0.0 && b.decode_tok_s.unwrap() > 0.0);
    assert_eq!(b.token_bytes, b.weights_bytes + b.kv_bytes);
    assert!(b.weights_bytes > 0 && b.kv_bytes > 0);
    // The head once for a prompt, and once for every token that is written.
    let heads = |spent: &[lacuna_run::Spent]| spent.iter().find(|s| s.name == "head").map(|s| s.calls);
    assert_eq!((heads(&b.prefill_profile), heads(&b.decode_profile)), (Some(1), Some(8)));
    assert!(bench(Arc::clone(&e), &BenchOptions { depth: 1000, ..o.clone() }, &mut |_, _| ()).is_err());
    assert!(bench(e, &BenchOptions { prompt_tokens: 0, gen_tokens: 0, ..o }, &mut |_, _| ()).is_err());
}

/// Given tokens cost what chosen ones do: a row with logits each, and those of the prompt's last token.
#[test]
fn forced_tokens_are_read_one_by_one() {
    let e = engine("llama");
    let mut s = lacuna_run::Scheduler::without_text(
        Arc::clone(&e),
        lacuna_run::Limits { batch: 1, prefill_rows: 16, kv_bytes: 1 << 20, reuse: true },
    );
    assert!(s.submit(0, Request::generate(request(1))).is_err(), "there is no tokenizer");
    assert!(s.submit(0, Request::new(vec![3], Job::Forced(vec![4000]))).is_err());
    for round in 0..3 {
        // The same depth, and other tokens behind it.
        let prompt: Vec<u32> = (5..40).collect();
        s.submit(round, Request::new(prompt, Job::Forced(vec![50 + round as u32; 6]))).unwrap();
        let (mut steps, mut end) = (Vec::new(), None);
        while !s.is_idle() {
            let step = s.step(&mut |_, event| end = Some(event));
            steps.push((step.prefill_rows, step.decode_rows, step.logits_rows));
        }
        let prompt: &[_] = if round == 0 { &[(16, 0, 0), (16, 0, 0), (3, 0, 1)] } else { &[(0, 1, 1)] };
        assert_eq!(steps, [prompt, &[(0, 1, 1); 6]].concat(), "round {round}");
        let Some(lacuna_run::Event::Finished(f)) = end else { panic!("{end:?}") };
        assert_eq!((f.ids, f.stop), (vec![50 + round as u32; 6], Stop::MaxTokens));
    }
}
