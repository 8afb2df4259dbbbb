//! CopySpec: where the last tokens stood before, what followed them there may follow again.
//!
//! **Paper.** Razvan-Gabriel Dumitru, Minglai Yang, Vikas Yadav, Mihai Surdeanu, "CopySpec: Accelerating LLMs with
//! Speculative Copy-and-Paste Without Compromising Quality", 2025, arXiv 2502.08923.
//!
//! **Idea.** A table from the hash of every `γ` consecutive tokens of the text, kept up to date by a rolling hash, to
//! where they stood. If the last `γ` tokens stood somewhere before, the `block` tokens behind them there are the
//! draft.
//!
//! **Shapes and units.** Token ids; a draft is a chain of at most `block` tokens.
//!
//! **Cost.** A few operations and a table's entry a token; less than 64 bytes a position.
//!
//! **Departs.** Tokens are compared where hashes agree: a wrong draft would cost rows and prove nothing. The paper
//! copies from the first place; `latest = true` takes the newest instead.

use std::collections::HashMap;

use lacuna_contract::{Card, Draft, Drafting, MadeRunning, RunMethod, TopK, Tree};
use serde::{Deserialize, Serialize};

use crate::family::keys::Whole;
use crate::make;

/// What is looked for and copied.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
struct CopySpec {
    /// Tokens that must have stood together before (γ), 1 to 64.
    gamma: Whole<1, 64>,
    /// Tokens of a draft at the most, 1 to 256.
    block: Whole<1, 256>,
    /// Whether to copy from the newest place and not from the first.
    latest: bool,
}

impl Default for CopySpec {
    fn default() -> CopySpec {
        CopySpec { gamma: Whole(3), block: Whole(10), latest: false }
    }
}

pub(crate) fn method() -> RunMethod {
    RunMethod {
        card: Card {
            name: "copyspec",
            paper: "Dumitru, Yang, Yadav, Surdeanu: CopySpec: Accelerating LLMs with Speculative Copy-and-Paste \
                    Without Compromising Quality, 2025",
            arxiv: "2502.08923",
            summary: "Drafts what followed the last few tokens where they stood in the text before.",
            system: Some(317),
            verb: "draft",
            needs: &[],
            abilities: &[],
        },
        keys: make::keys::<CopySpec>,
        defaults: make::defaults::<CopySpec>,
        make: |given, _| Ok(MadeRunning::Draft(Box::new(make::parameters::<CopySpec>("copyspec", given)?))),
    }
}

/// The base of the rolling hash, modulo 2^64.
const BASE: u64 = 0x9E37_79B9_7F4A_7C15;

impl CopySpec {
    fn state(&self, vocab: usize) -> Copies {
        let (gamma, block) = (self.gamma.0, self.block.0);
        let out = (0..gamma).fold(1u64, |p, _| p.wrapping_mul(BASE));
        Copies { vocab, gamma, block, latest: self.latest, out, hash: 0, read: 0, ends: HashMap::new() }
    }
}

impl Draft for CopySpec {
    fn top(&self) -> usize {
        0
    }

    fn bytes(&self, _: usize, context: usize) -> u64 {
        // 17 bytes an entry, a table up to 16/7 times its entries, and half of that again while it grows.
        64 * (context as u64 + 1)
    }

    fn begin(&self, vocab: usize) -> Box<dyn Drafting> {
        Box::new(self.state(vocab))
    }
}

/// What is known of one text.
struct Copies {
    vocab: usize,
    gamma: usize,
    block: usize,
    latest: bool,
    /// `BASE^γ`.
    out: u64,
    /// Of the last γ tokens read.
    hash: u64,
    /// Tokens of the text that are in the hash.
    read: usize,
    /// Where tokens with a hash end: the first or the newest place.
    ends: HashMap<u64, u32>,
}

impl Copies {
    /// Takes the token at `read` into the hash.
    fn roll(&mut self, text: &[u32]) {
        let term = |t: u32| u64::from(t) + 1;
        self.hash = self.hash.wrapping_mul(BASE).wrapping_add(term(text[self.read]));
        if let Some(gone) = self.read.checked_sub(self.gamma) {
            self.hash = self.hash.wrapping_sub(self.out.wrapping_mul(term(text[gone])));
        }
        self.read += 1;
    }

    /// Remembers where the tokens in the hash end.
    fn enter(&mut self) {
        let Ok(end) = u32::try_from(self.read) else { return };
        if self.read >= self.gamma {
            let known = self.ends.entry(self.hash).or_insert(end);
            if self.latest {
                *known = end;
            }
        }
    }
}

impl Drafting for Copies {
    fn observe(&mut self, _: &[u32], _: Option<TopK<'_>>) {
        // The text itself is read when a draft is wanted.
    }

    fn propose(&mut self, text: &[u32], most: usize) -> Tree {
        if text.len() < self.read {
            self.ends.clear();
            (self.hash, self.read) = (0, 0);
        }
        // The last tokens are entered only when others have come behind them.
        while self.read < text.len() {
            self.enter();
            self.roll(text);
        }
        let Some(&end) = self.ends.get(&self.hash) else { return Tree::default() };
        let (end, last) = (end as usize, text.len());
        if last < self.gamma || end >= last || text[end - self.gamma..end] != text[last - self.gamma..] {
            return Tree::default();
        }
        let copied = &text[end..last.min(end + self.block.min(most))];
        let known = copied.iter().take_while(|t| (**t as usize) < self.vocab).count();
        Tree::chain(&copied[..known])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::Rng;

    /// Straight from the definition: try every place.
    fn brute(text: &[u32], gamma: usize, block: usize, latest: bool, most: usize) -> Vec<u32> {
        let n = text.len();
        let mut places = (gamma..n).filter(|&e| text[e - gamma..e] == text[n - gamma..]);
        let place = if latest { places.next_back() } else { places.next() };
        place.map_or(vec![], |e| text[e..].iter().take(block.min(most)).copied().collect())
    }

    #[test]
    fn drafts_agree_with_brute_force_over_all_places() {
        let mut drafted = 0;
        for seed in 0..300 {
            let mut rng = Rng::new(seed);
            let (vocab, gamma, block) = (1 + rng.below(4), 1 + rng.below(4), 1 + rng.below(6));
            let latest = rng.below(2) == 0;
            let made = CopySpec { gamma: Whole(gamma), block: Whole(block), latest };
            let mut state = made.begin(vocab);
            let mut text: Vec<u32> = Vec::new();
            for _ in 0..20 {
                text.extend((0..rng.below(5)).map(|_| rng.below(vocab) as u32));
                for most in [0, 1, 99] {
                    let tree = state.propose(&text, most);
                    tree.check(vocab, most).expect("a tree");
                    let want = if text.len() < gamma { vec![] } else { brute(&text, gamma, block, latest, most) };
                    assert_eq!(tree, Tree::chain(&want), "seed {seed}: {text:?}");
                    drafted += want.len();
                }
            }
            // A text that became shorter is read anew.
            text.truncate(text.len() / 2);
            let want = if text.len() < gamma { vec![] } else { brute(&text, gamma, block, latest, 9) };
            assert_eq!(state.propose(&text, 9), Tree::chain(&want), "seed {seed}: shorter");
        }
        assert!(drafted > 1000, "{drafted}");
    }

    #[test]
    fn the_papers_example_of_a_second_turn_is_copied() {
        // A text, other words, and the text again: all but its beginning comes from the first.
        let mut rng = Rng::new(7);
        let first: Vec<u32> = (0..100).map(|_| rng.below(5000) as u32).collect();
        let mut text = first.clone();
        text.extend([7, 8, 9]);
        let begun = text.len();
        text.extend(&first[..3]);
        let mut state = CopySpec::default().begin(5000);
        let mut steps = 0;
        while text.len() < begun + first.len() {
            let at = text.len() - begun;
            let draft = state.propose(&text, 99).tokens;
            assert_eq!(draft, text[at..at + 10], "after {at} tokens");
            // All of it is accepted, and one more token by the model itself.
            text.extend(&first[at..(at + 11).min(first.len())]);
            steps += 1;
        }
        assert_eq!(steps, 9);
    }

    #[test]
    fn a_hash_that_lies_drafts_nothing() {
        let made = CopySpec { gamma: Whole(2), ..CopySpec::default() };
        let text = [1, 2, 3, 1, 2];
        let mut state = made.state(10);
        assert_eq!(state.propose(&text, 9), Tree::chain(&[3, 1, 2]));
        // Other tokens of the same hash, or a place that no text has any more.
        for end in [3, 4, 5, 77] {
            state.ends.insert(state.hash, end);
            assert!(state.propose(&text, 9).is_empty(), "{end}");
        }
        // A token beyond the vocabulary ends a draft.
        assert_eq!(made.begin(10).propose(&[1, 2, 3, 77, 1, 2], 9), Tree::chain(&[3]));
    }
}
