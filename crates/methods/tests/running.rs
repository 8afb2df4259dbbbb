//! The laws that every method of run time keeps, over the registry: a new one is held to them by being listed.

use std::collections::HashSet;
use std::sync::Arc;

use lacuna_base::testkit::random;
use lacuna_base::{Mat, Rng};
use lacuna_contract::{
    Draft, Drafting, Gate, Keep, KeepHead, MadeRunning, MethodError, Pool, Pooled, PromptAsk, RunMethod, Select,
    SelectAsk, SelectPrompt, SelectScope, Selector, TopK,
};
use lacuna_methods::registry;
use proptest::prelude::*;
use serde_json::{Value, json};

fn of<T>(question: &str, take: fn(MadeRunning) -> Option<T>, keys: Value) -> Vec<(&'static str, T)> {
    // Those that have all of the keys.
    let asked: Vec<String> = keys.as_object().into_iter().flat_map(|k| k.keys().cloned()).collect();
    let knows = |m: &RunMethod| asked.iter().all(|k| (m.keys)().contains(&k.as_str()));
    let methods = registry().running.into_iter().filter(|m| m.card.verb == question && knows(m));
    let made: Vec<(&str, T)> = methods
        .map(|m| {
            let made = (m.make)(keys.clone(), 1).unwrap_or_else(|e| panic!("{}: {e}", m.card.name));
            (m.card.name, take(made).unwrap_or_else(|| panic!("{} answers another question", m.card.name)))
        })
        .collect();
    assert!(!made.is_empty(), "nobody answers '{question}'");
    made
}

fn drafts() -> Vec<(&'static str, Box<dyn Draft>)> {
    of("draft", |m| if let MadeRunning::Draft(d) = m { Some(d) } else { None }, Value::Null)
}

fn keepers(keys: Value) -> Vec<(&'static str, Box<dyn Keep>)> {
    of("keep", |m| if let MadeRunning::Keep(k) = m { Some(k) } else { None }, keys)
}

fn selectors(keys: Value) -> Vec<(&'static str, Selector)> {
    of("select", |m| if let MadeRunning::Select(s) = m { Some(s) } else { None }, keys)
}

fn of_rows(keys: Value) -> Vec<(&'static str, Arc<dyn Select>)> {
    let rows = |(name, by)| if let Selector::Rows(by) = by { Some((name, by)) } else { None };
    selectors(keys).into_iter().filter_map(rows).collect()
}

fn of_prompts(keys: Value) -> Vec<(&'static str, Arc<dyn SelectPrompt>)> {
    let prompts = |(name, by)| if let Selector::Prompt(by) = by { Some((name, by)) } else { None };
    selectors(keys).into_iter().filter_map(prompts).collect()
}

fn gates(keys: Value) -> Vec<(&'static str, Arc<dyn Gate>)> {
    of("gate", |m| if let MadeRunning::Gate(g) = m { Some(g) } else { None }, keys)
}

#[test]
fn names_are_unique_and_unknown_keys_are_refused_with_the_nearest() {
    let registry = registry();
    let mut names: HashSet<&str> = registry.methods.iter().map(|m| m.card.name).collect();
    for m in &registry.running {
        let name = m.card.name;
        assert!(names.insert(name), "{name} twice");
        assert!(name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-'), "{name}");
        assert!(!m.card.summary.is_empty() && !m.card.paper.is_empty(), "{name}");
        let made = (m.make)(Value::Null, 0).expect("made from nothing");
        assert_eq!(made.question(), m.card.verb, "{name}");
        let refused = (m.make)(json!({ "no_such_key": 1 }), 0).expect_err("refused").what;
        assert!(refused.contains("no_such_key") && refused.contains(name), "{refused}");
        for key in (m.keys)() {
            let near = format!("{key}x");
            let refused = (m.make)(json!({ near.as_str(): 1 }), 0).expect_err("refused").what;
            assert!(refused.contains(&format!("did you mean '{key}'")), "{refused}");
            let refused = (m.make)(json!({ *key: { "a": 1 } }), 0).expect_err("refused").what;
            assert!(refused.starts_with(key), "{refused}");
        }
    }
}

#[test]
fn the_registry_finds_by_question_and_says_who_there_is() {
    let registry = registry();
    let what = |e: Option<MethodError>| e.expect("refused").what;
    for m in &registry.running {
        let (name, null) = (m.card.name, || Value::Null);
        let found = [
            ("draft", registry.draft(name, null(), 1).err()),
            ("keep", registry.keep(name, null(), 1).err()),
            ("select", registry.select(name, null(), 1).err()),
            ("gate", registry.gate(name, null(), 1).err()),
        ];
        for (question, refused) in found {
            if question == m.card.verb {
                assert!(refused.is_none(), "{name}");
            } else {
                let said = what(refused);
                assert!(said.contains(m.card.verb) && said.contains(question), "{said}");
            }
        }
    }
    let said = what(registry.draft("nobody", Value::Null, 1).err());
    assert!(said.contains("'nobody'") && drafts().iter().all(|(name, _)| said.contains(name)), "{said}");
    assert!(what(registry.keep("h2o", json!({ "budgt": 4 }), 1).err()).contains("did you mean 'budget'"));
}

/// Ids of `k` tokens after each of some positions, told apart by where they are asked.
fn followers(tokens: &[u32], k: usize, vocab: usize, rng: &mut Rng) -> Vec<u32> {
    let mut ids = Vec::new();
    for _ in tokens {
        let first = rng.below(vocab);
        ids.extend((0..k).map(|i| ((first + i) % vocab) as u32));
    }
    ids
}

/// Tells a state one step: the tokens committed, and the same ones with others as looked at.
fn tell(draft: &dyn Draft, state: &mut dyn Drafting, committed: &[u32], vocab: usize, seed: u64) {
    let (k, mut rng) = (draft.top().min(vocab), Rng::new(seed));
    let mut tokens = committed.to_vec();
    tokens.extend((0..rng.below(3)).map(|_| rng.below(vocab) as u32));
    let ids = followers(&tokens, k, vocab, &mut rng);
    let top = TopK { tokens: &tokens, ids: &ids, k };
    state.observe(committed, (k > 0).then_some(top));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    /// Also for tiny vocabularies, empty texts and no room at all: a tree, within what was asked, the same for the same
    /// observations, and the beginning of it where less is asked.
    #[test]
    fn drafts_are_trees_and_their_beginnings_are_drafts(
        vocab in 1usize..9,
        steps in prop::collection::vec(prop::collection::vec(0u32..9, 0..6), 0..8),
        seed in 0u64..1000,
    ) {
        for (name, draft) in drafts() {
            let (mut state, mut twin) = (draft.begin(vocab), draft.begin(vocab));
            let mut text: Vec<u32> = Vec::new();
            prop_assert!(state.propose(&text, 80).is_empty(), "{} out of nothing", name);
            for (i, step) in steps.iter().enumerate() {
                let committed: Vec<u32> = step.iter().map(|t| t % vocab as u32).collect();
                text.extend(&committed);
                for state in [&mut state, &mut twin] {
                    tell(draft.as_ref(), state.as_mut(), &committed, vocab, seed + i as u64);
                }
                let whole = state.propose(&text, 4096);
                prop_assert!(whole.check(vocab, 4096).is_ok(), "{}: {:?}", name, whole.check(vocab, 4096));
                // The twin is asked once, and for less first: what was asked before changes nothing.
                let _ = twin.propose(&text, 1);
                prop_assert_eq!(&twin.propose(&text, 4096), &whole, "{}", name);
                for most in [0, 1, 2, 7, 80] {
                    let part = state.propose(&text, most);
                    prop_assert!(part.check(vocab, most).is_ok(), "{}", name);
                    let mut beginning = whole.clone();
                    beginning.truncate(most);
                    prop_assert_eq!(part, beginning, "{}: {} nodes", name, most);
                }
            }
        }
    }

    /// Greedy text is that of plain decoding, whatever the model and however wrong the drafts.
    #[test]
    fn drafts_never_change_greedy_text(vocab in 1usize..12, salt in 0u64..1000, reach in 1usize..4, most in 0usize..20) {
        // A model whose choice hangs on the last `reach` tokens: it repeats itself sooner or later.
        let logits = |text: &[u32]| -> Vec<f32> {
            let from = text.len().saturating_sub(reach);
            let mixed = text[from..].iter().fold(salt, |h, t| h.wrapping_mul(31).wrapping_add(u64::from(*t) + 7));
            let mut rng = Rng::new(mixed);
            (0..vocab).map(|_| rng.below(4) as f32).collect()
        };
        let top = |text: &[u32], k: usize| -> Vec<u32> {
            let scores = logits(text);
            let mut ids: Vec<u32> = (0..vocab as u32).collect();
            ids.sort_by(|&a, &b| scores[b as usize].total_cmp(&scores[a as usize]).then(a.cmp(&b)));
            ids.truncate(k);
            ids
        };
        let prompt = vec![0u32; 3];
        let mut plain = prompt.clone();
        while plain.len() < 60 {
            plain.push(top(&plain, 1)[0]);
        }
        for (name, draft) in drafts() {
            let k = draft.top().min(vocab);
            let mut state = draft.begin(vocab);
            let mut text = prompt.clone();
            state.observe(&text, None);
            let mut steps = 0;
            while text.len() < 60 {
                let tree = state.propose(&text, most);
                let at = |node: Option<usize>| -> Vec<u32> {
                    let path = node.map_or(vec![], |n| tree.path(n));
                    text.iter().copied().chain(path.into_iter().map(|i| tree.tokens[i])).collect()
                };
                let places: Vec<Option<usize>> = std::iter::once(None).chain((0..tree.len()).map(Some)).collect();
                let chosen: Vec<u32> = places.iter().map(|p| top(&at(*p), 1)[0]).collect();
                let accepted = tree.accept(&chosen).expect("as many as nodes");
                let looked: Vec<u32> = places.iter().map(|p| at(*p)[at(*p).len() - 1]).collect();
                let ids: Vec<u32> = places.iter().flat_map(|p| top(&at(*p), k)).collect();
                let mut committed: Vec<u32> = accepted.nodes.iter().map(|&n| tree.tokens[n]).collect();
                committed.push(accepted.next);
                state.observe(&committed, (k > 0).then_some(TopK { tokens: &looked, ids: &ids, k }));
                text.extend(&committed);
                steps += 1;
            }
            text.truncate(60);
            prop_assert_eq!(&text, &plain, "{}", name);
            prop_assert!(steps <= 57, "{}", name);
            // A model that goes by the last token alone is soon known by heart.
            if reach == 1 && most >= 4 && vocab <= 6 {
                prop_assert!(steps <= 45, "{}: {} steps", name, steps);
            }
        }
    }

    /// With room for all, all stay, in order; with less, no more than the budget, in order, and the same again.
    #[test]
    fn keepers_stay_within_their_budget(
        slots in prop::collection::vec((1usize..4, 0u8..4), 0..40),
        heads in 1usize..4,
        budget in 1usize..50,
    ) {
        let positions: Vec<usize> = slots.iter().scan(0, |at, (step, _)| { *at += step; Some(*at - 1) }).collect();
        let mass: Vec<f32> = slots.iter().map(|(_, m)| f32::from(*m)).collect();
        for (name, by) in keepers(Value::Null) {
            let plan = by.plan();
            prop_assert!(plan.every > 0 && plan.budget > 0, "{}", name);
            let mass: &[f32] = if plan.mass { &mass } else { &[] };
            let heads: Vec<KeepHead<'_>> =
                (0..heads).map(|head| KeepHead { layer: 1, head, positions: &positions, mass }).collect();
            let all: Vec<usize> = (0..slots.len()).collect();
            for room in [slots.len(), slots.len() + 1, 1 << 30] {
                let kept = by.keep(&heads, room).expect("keeps");
                prop_assert!(kept.len() == heads.len() && kept.iter().all(|k| *k == all), "{}", name);
            }
            let kept = by.keep(&heads, budget).expect("keeps");
            prop_assert_eq!(kept.len(), heads.len(), "{}", name);
            prop_assert!(kept.iter().map(Vec::len).sum::<usize>() <= budget * heads.len(), "{}", name);
            for k in &kept {
                prop_assert!(k.windows(2).all(|w| w[0] < w[1]) && k.iter().all(|i| *i < slots.len()), "{}", name);
                // What was just written has to be there for the next query.
                prop_assert!(slots.is_empty() || k.contains(&(slots.len() - 1)), "{}", name);
            }
            prop_assert_eq!(by.keep(&heads, budget).expect("again"), kept, "{}", name);
        }
        for (name, by) in keepers(json!({ "budget": 7, "every": 3 })) {
            prop_assert_eq!((by.plan().budget, by.plan().every), (7, 3), "{}", name);
        }
    }

    /// With a budget for all blocks all are read, in order; with less, no more than it, in order, and the same again,
    /// whatever the pools and however many are alike.
    #[test]
    fn selectors_stay_within_their_budget(blocks in 0usize..30, queries in 1usize..5, seed in 0u64..1000, ties: bool) {
        let d = 12;
        let make = |rows: usize, seed: u64| {
            let m = random(rows, d, seed);
            if ties { Mat::from_fn(rows, d, |r, c| m[(r % 2, c)].signum()) } else { m }
        };
        let q = make(queries.max(2), seed);
        let (low, wide) = (make(blocks.max(2), seed + 1), make(blocks.max(2), seed + 2));
        let high = Mat::from_fn(low.rows(), d, |r, c| low[(r, c)] + wide[(r, c)].abs());
        for budget in [1usize, 64, 1 << 30] {
            for (name, by) in of_rows(json!({ "budget": budget })) {
                let plan = by.plan();
                prop_assert!(plan.block > 0, "{}", name);
                prop_assert!(plan.scope != SelectScope::Tile(0), "{}", name);
                let pooled = match plan.pool {
                    Pool::Mean => Pooled::Mean(low.view().rows_range(0, blocks)),
                    Pool::Bounds => Pooled::Bounds {
                        low: low.view().rows_range(0, blocks),
                        high: high.view().rows_range(0, blocks),
                    },
                };
                let ask = SelectAsk { layer: 9, head: 0, queries: q.view().rows_range(0, queries), pooled };
                let read = by.select(&ask).expect("selects");
                let most = budget.div_ceil(plan.block);
                if blocks <= most {
                    prop_assert_eq!(&read, &(0..blocks).collect::<Vec<_>>(), "{}", name);
                }
                prop_assert!(read.len() <= most.min(blocks), "{}", name);
                prop_assert!(read.windows(2).all(|w| w[0] < w[1]) && read.iter().all(|b| *b < blocks), "{}", name);
                prop_assert_eq!(by.select(&ask).expect("again"), read, "{}", name);
            }
        }
    }

    /// A tile of a prompt reads tiles before it alone, in order, the same again; all of the attention is in all of them.
    #[test]
    fn selectors_of_prompts_look_back(tokens in 1usize..90, heads in 1usize..4, seed in 0u64..1000, ties: bool) {
        let d = 5;
        let make = |cols: usize, seed: u64| {
            let m = random(tokens, cols, seed);
            if ties { Mat::from_fn(tokens, cols, |r, c| m[(r % 2, c)].signum()) } else { m }
        };
        let (queries, keys) = (make(heads * d, seed), make(d, seed + 1));
        let ask = PromptAsk { layer: 9, head: 0, scale: 0.4, queries: queries.view(), keys: keys.view() };
        for gamma in [0.2, 0.95, 1.0] {
            for (name, by) in of_prompts(json!({ "gamma": gamma, "tile": 8, "min_budget": 0 })) {
                let read = by.select(&ask).expect("selects");
                prop_assert_eq!(by.tile(), 8);
                prop_assert_eq!(read.len(), tokens.div_ceil(8), "{}", name);
                for (i, row) in read.iter().enumerate() {
                    prop_assert!(row.windows(2).all(|w| w[0] < w[1]) && row.iter().all(|b| *b < i), "{}", name);
                    prop_assert!(gamma < 1.0 || row.len() == i, "{}", name);
                }
                prop_assert_eq!(by.select(&ask).expect("again"), read, "{}", name);
            }
        }
    }

    /// A gate that keeps all keeps all, in order; one that keeps a part keeps that part, and the same again.
    #[test]
    fn gates_keep_what_they_are_told(x in prop::collection::vec(-3i8..4, 1..50), rows in 1usize..5, keep in 0.01f64..1.0) {
        let n = x.len();
        let activations: Vec<f32> = x.iter().map(|v| f32::from(*v)).collect();
        let w = Mat::from_fn(rows, n, |r, c| ((r * 7 + c * 5) % 4) as f32);
        for (part, whole) in [(keep, false), (1.0, true)] {
            for (name, by) in gates(json!({ "keep": part })) {
                prop_assert!(!by.plan().targets.is_empty(), "{}", name);
                let norms = by.norms(&[w.view()]).expect("norms");
                prop_assert_eq!(norms.len(), n, "{}", name);
                let kept = by.channels(&activations, &norms).expect("channels");
                prop_assert!(kept.windows(2).all(|w| w[0] < w[1]) && kept.iter().all(|c| (*c as usize) < n), "{}", name);
                prop_assert!(!whole || kept == (0..n as u32).collect::<Vec<_>>(), "{}", name);
                prop_assert!((kept.len() as f64 - part * n as f64).abs() <= 1.0, "{}: {} of {}", name, kept.len(), n);
                prop_assert_eq!(by.channels(&activations, &norms).expect("again"), kept, "{}", name);
            }
        }
    }
}
