//! Lexical shortlisting: the tokens of one corpus, or of some scripts, are all that one language or task needs.
//!
//! **Paper.** Nikolay Bogoychev, Pinzhen Chen, Barry Haddow, Alexandra Birch, "Large Language Model Inference with
//! Lexical Shortlisting", 2023, arXiv 2311.09709 (later "The Ups and Downs of Large Language Model Inference with
//! Vocabulary Trimming by Language Heuristics").
//!
//! **Idea.** From the vocabulary `V` a sub-vocabulary `V' ⊂ V` is chosen once, before anything runs, and the embedding
//! and the output layer keep its rows alone. By corpus: `V'` are the tokens that stand in a text of the target language
//! or domain, `count(v) >= min_count`. By script: `V'` are the tokens all of whose letters belong to the target's
//! writing systems, by their ranges in Unicode.
//!
//! **Shapes and units.** By id: counts, bytes of text, whether it must stay, and its pieces; the answer are ids, rising.
//!
//! **Cost.** One pass over the vocabulary, sorted once.
//!
//! **Departs.** What the tokenizer needs stays in any case: special tokens, bytes, what the chat template writes, and
//! of each token the pieces by which merges reach it; so every text can still be written, and a text of kept tokens is
//! cut as before. A bound on their number, where one is given, is filled in falling frequency (equal ones by their ids),
//! each with its pieces; the paper has none. Letters that all scripts share (digits, punctuation, spaces, combining
//! marks) belong to each. A run of bytes that is no whole letter belongs to no script, and stays where a token that
//! stays is made of it.

use fancy_regex::Regex;
use lacuna_contract::{Card, Made, Method, MethodError, Shortlist, ShortlistAsk, Vocabulary};
use serde::Deserialize;

use super::Kept;
use crate::make;

/// What makes a token wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum By {
    /// It stands in the calibration text.
    Corpus,
    /// Its letters are of the scripts.
    Script,
}

/// The paper's two ways.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Lexical {
    /// "corpus" or "script".
    by: By,
    /// By corpus: how often a token must stand in the calibration text; 0: every token is wanted.
    min_count: u64,
    /// By script: Unicode's names of the scripts, such as "Latin", "Cyrillic", "Han".
    scripts: Vec<String>,
}

impl Default for Lexical {
    fn default() -> Lexical {
        Lexical { by: By::Corpus, min_count: 1, scripts: vec!["Latin".into()] }
    }
}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "lexical-shortlist",
            paper: "Bogoychev, Chen, Haddow, Birch: Large Language Model Inference with Lexical Shortlisting, 2023",
            arxiv: "2311.09709",
            summary: "Tokens that a corpus lacks, or that other scripts write, lose their rows of embedding and head.",
            system: None,
            verb: "vocabulary",
            needs: &[],
            abilities: &[],
        },
        keys: make::keys::<Lexical>,
        make: |given| {
            for (key, of, by) in [("min_count", By::Script, "corpus"), ("scripts", By::Corpus, "script")] {
                let way = given.get("by").and_then(|v| v.as_str()).unwrap_or("corpus");
                if given.get(key).is_some() && (way == "script") == (of == By::Script) {
                    return Err(MethodError::new(format!(
                        "{key} goes with by = \"{by}\"; here tokens are chosen by {way}"
                    )));
                }
            }
            let made = make::parameters::<Lexical>("lexical-shortlist", given)?;
            if made.by == By::Script && made.scripts.is_empty() {
                return Err(MethodError::new("scripts is empty; name at least one, for example \"Latin\""));
            }
            made.letters()?;
            Ok(Made::Shortlist(Box::new(made)))
        },
    }
}

impl Lexical {
    /// What texts of the scripts look like.
    fn letters(&self) -> Result<Regex, MethodError> {
        let fail = |name: &str| {
            MethodError::new(format!(
                "scripts: {name:?} is no script of Unicode; write it as Unicode does, for example \"Latin\", \"Cyrillic\" or \"Han\""
            ))
        };
        let mut all = String::from(r"\p{Common}\p{Inherited}");
        for name in &self.scripts {
            let plain = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphabetic() || c == '_');
            let class = format!(r"\p{{Script={name}}}");
            if !plain || Regex::new(&class).is_err() {
                return Err(fail(name));
            }
            all += &class;
        }
        Regex::new(&format!("^[{all}]+$")).map_err(|_| fail("the list"))
    }

    /// Ids that are wanted, most frequent first.
    fn wanted(&self, v: &Vocabulary) -> Result<Vec<usize>, MethodError> {
        let letters = self.letters()?;
        let written = |id: usize| match std::str::from_utf8(&v.bytes[id]) {
            Ok(text) => letters.is_match(text).unwrap_or(false),
            Err(_) => false,
        };
        let wants = |&id: &usize| match self.by {
            By::Corpus => !v.bytes[id].is_empty() && v.counts[id] >= self.min_count,
            By::Script => !v.bytes[id].is_empty() && written(id),
        };
        let mut ids: Vec<usize> = (0..v.counts.len()).filter(wants).collect();
        // Stable: equal ones stay in the order of their ids.
        ids.sort_by_key(|&id| std::cmp::Reverse(v.counts[id]));
        Ok(ids)
    }
}

impl Shortlist for Lexical {
    fn shortlist(&self, ask: &ShortlistAsk<'_>) -> Result<Vec<usize>, MethodError> {
        let mut kept = Kept::new(ask.vocabulary, ask.most)?;
        for id in self.wanted(ask.vocabulary)? {
            kept.add(id, ask.most);
        }
        Ok(kept.ids())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::Rng;
    use std::collections::BTreeSet;

    /// Random words of Latin, Cyrillic and shared letters; pieces are shorter ids, some are holes or broken UTF-8.
    fn vocabulary(n: usize, seed: u64) -> Vocabulary {
        let mut rng = Rng::new(seed);
        let letters = ["a", "é", "ж", "7", " ", "漢"];
        let word = |rng: &mut Rng| match rng.below(8) {
            0 => Vec::new(),
            1 => vec![0xC3],
            _ => (0..1 + rng.below(3)).flat_map(|_| letters[rng.below(letters.len())].bytes()).collect(),
        };
        let pieces = |id: usize, rng: &mut Rng| match (id > 4, rng.below(3)) {
            (true, 0) => vec![rng.below(id) as u32, rng.below(id) as u32],
            _ => Vec::new(),
        };
        Vocabulary {
            counts: (0..n).map(|_| rng.below(4) as u64).collect(),
            bytes: (0..n).map(|_| word(&mut rng)).collect(),
            must: (0..n).map(|_| rng.below(9) == 0).collect(),
            pieces: (0..n).map(|id| pieces(id, &mut rng)).collect(),
        }
    }

    /// Everything a token needs, itself included, by going over all pieces until nothing is new.
    fn closure(v: &Vocabulary, ids: &BTreeSet<usize>) -> BTreeSet<usize> {
        let mut all = ids.clone();
        loop {
            let more: BTreeSet<usize> = all.iter().flat_map(|&i| v.pieces[i].iter().map(|p| *p as usize)).collect();
            let before = all.len();
            all.extend(more);
            if all.len() == before {
                return all;
            }
        }
    }

    /// Latin or shared, by the ranges themselves.
    fn latin(bytes: &[u8]) -> bool {
        let shared = |c: char| c == ' ' || c.is_ascii_digit();
        std::str::from_utf8(bytes).is_ok_and(|t| {
            !t.is_empty() && t.chars().all(|c| shared(c) || c.is_ascii_alphabetic() || ('À'..='ÿ').contains(&c))
        })
    }

    #[test]
    fn agrees_with_brute_force_choice_by_frequency_and_by_script() {
        for seed in 0..200 {
            let v = vocabulary(1 + seed as usize % 40, seed);
            let n = v.counts.len();
            let must = closure(&v, &(0..n).filter(|&i| v.must[i]).collect());
            for by in [By::Corpus, By::Script] {
                for (min_count, most) in [(1, n), (0, n), (2, n / 2), (9, n)] {
                    let made = Lexical { by, min_count, ..Lexical::default() };
                    let ask = ShortlistAsk { vocabulary: &v, most };
                    if must.len() > most {
                        assert!(made.shortlist(&ask).is_err());
                        continue;
                    }
                    // Again and again the most frequent of what is left, the first of equals, with all it needs.
                    let wants = |i: usize| match by {
                        By::Corpus => !v.bytes[i].is_empty() && v.counts[i] >= min_count,
                        By::Script => latin(&v.bytes[i]),
                    };
                    let mut left: Vec<usize> = (0..n).filter(|&i| wants(i)).collect();
                    let mut want = must.clone();
                    while let Some(&best) = left.iter().min_by_key(|&&i| (u64::MAX - v.counts[i], i)) {
                        left.retain(|&i| i != best);
                        let mut with = want.clone();
                        with.insert(best);
                        let with = closure(&v, &with);
                        if with.len() <= most {
                            want = with;
                        }
                    }
                    let have = made.shortlist(&ask).expect("chosen");
                    assert_eq!(have, want.into_iter().collect::<Vec<_>>(), "{seed} {by:?} {min_count} {most}");
                }
            }
        }
    }

    #[test]
    fn unknown_scripts_and_torn_lists_are_refused() {
        let made = |scripts: &str| (method().make)(serde_json::json!({ "by": "script", "scripts": [scripts] }));
        assert!(made("Han").is_ok());
        for wrong in ["Klingon", "Latin}x", ""] {
            assert!(made(wrong).expect_err("refused").what.contains("no script"), "{wrong}");
        }
        let v = Vocabulary { pieces: vec![vec![7]; 5], ..vocabulary(5, 1) };
        assert!(Lexical::default().shortlist(&ShortlistAsk { vocabulary: &v, most: 5 }).is_err());
        let v = Vocabulary { must: vec![true; 4], ..vocabulary(5, 1) };
        assert!(Lexical::default().shortlist(&ShortlistAsk { vocabulary: &v, most: 5 }).is_err());
    }
}
