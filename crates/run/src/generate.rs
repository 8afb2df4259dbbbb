//! Continuing a prompt: what is asked, why it ends, and which text is certain.

use serde::Serialize;

use crate::Sampling;

/// What to generate.
#[derive(Clone, Debug, Default)]
pub struct Generation {
    /// The prompt, its special tokens included.
    pub prompt: Vec<u32>,
    /// Most tokens to generate.
    pub max_tokens: usize,
    /// Texts that end the answer; they are not part of it.
    pub stop: Vec<String>,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Go on past the model's end tokens (for measurements).
    pub ignore_end: bool,
}

/// Why a generation ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stop {
    /// The model ended its answer with this token.
    EndToken(u32),
    /// This stop text came.
    StopText(String),
    /// The asked number of tokens is there.
    MaxTokens,
    /// The context is full.
    Context,
    /// What the grammar describes is complete.
    Grammar,
    /// The caller had enough.
    Caller,
}

/// Holds back text that may be the beginning of a stop text.
pub(crate) struct StopFilter {
    stops: Vec<String>,
    held: String,
}

impl StopFilter {
    pub(crate) fn new(stops: &[String]) -> StopFilter {
        StopFilter { stops: stops.iter().filter(|s| !s.is_empty()).cloned().collect(), held: String::new() }
    }

    /// Takes a piece; returns the text that is certain, and the stop text if one came.
    pub(crate) fn push(&mut self, piece: &str) -> (String, Option<String>) {
        self.held.push_str(piece);
        // The match that ends first counts, so that the answer does not depend on how the text was cut into pieces.
        let hit = |s: &String| self.held.find(s.as_str()).map(|at| (at + s.len(), at, s.clone()));
        if let Some((_, at, stop)) = self.stops.iter().filter_map(hit).min() {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), Some(stop));
        }
        let open = |&at: &usize| self.stops.iter().any(|s| s.starts_with(&self.held[at..]));
        let at = self.held.char_indices().map(|(at, _)| at).find(open).unwrap_or(self.held.len());
        let rest = self.held.split_off(at);
        (std::mem::replace(&mut self.held, rest), None)
    }

    pub(crate) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::Rng;

    /// What a reader sees, and the stop text, for a text cut at `cuts`.
    fn run(text: &str, stops: &[String], mut cut: impl FnMut(usize) -> bool) -> (String, Option<String>) {
        let mut filter = StopFilter::new(stops);
        let (mut seen, mut from) = (String::new(), 0);
        for (at, _) in text.char_indices().skip(1).chain([(text.len(), ' ')]) {
            if at < text.len() && !cut(at) {
                continue;
            }
            let (certain, stop) = filter.push(&text[from..at]);
            seen += &certain;
            from = at;
            if stop.is_some() {
                return (seen, stop);
            }
        }
        (seen + &filter.finish(), None)
    }

    #[test]
    fn stop_texts_do_not_depend_on_token_borders() {
        let mut rng = Rng::new(3);
        for round in 0..2000 {
            let word = |rng: &mut Rng, n: usize| {
                (0..1 + rng.below(n)).map(|_| ['a', 'b', 'é'][rng.below(3)]).collect::<String>()
            };
            let text = word(&mut rng, 30);
            let stops: Vec<String> = (0..rng.below(4)).map(|_| word(&mut rng, 4)).collect();
            let whole = run(&text, &stops, |_| false);
            let single = run(&text, &stops, |_| true);
            let random = run(&text, &stops, |_| rng.below(2) == 0);
            assert_eq!(whole, single, "{round}: {text} {stops:?}");
            assert_eq!(whole, random, "{round}: {text} {stops:?}");
            assert!(stops.iter().all(|s| whole.1.is_some() || !text.contains(s.as_str())));
        }
    }

    #[test]
    fn nothing_certain_is_held_back() {
        let stops = ["\n\n".to_owned(), "END".to_owned()];
        let mut filter = StopFilter::new(&stops);
        assert_eq!(filter.push("one\n"), ("one".to_owned(), None));
        assert_eq!(filter.push("two E"), ("\ntwo ".to_owned(), None));
        assert_eq!(filter.push("N"), (String::new(), None));
        assert_eq!(filter.push("D!"), (String::new(), Some("END".to_owned())));
    }
}
