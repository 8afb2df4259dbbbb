//! What a model thinks before it answers: how its template marks it, and how it is told apart from the answer.

use crate::channels::{CHANNEL, Channels, FINAL};

/// What a model writes around its thoughts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marks {
    open: &'static str,
    close: &'static str,
}

/// Channels have a mark for each of them.
const CHANNELS: Marks = Marks { open: CHANNEL, close: "<|end|>" };

const KNOWN: [Marks; 4] = [
    Marks { open: "<think>", close: "</think>" },
    Marks { open: "<seed:think>", close: "</seed:think>" },
    Marks { open: "[THINK]", close: "[/THINK]" },
    CHANNELS,
];

impl Marks {
    /// The marks that a chat template names; none where the model does not think aloud.
    pub fn of(template: &str) -> Option<Marks> {
        // What ends a channel's text ends others' turns.
        let names = |m: &Marks| template.contains(m.open) || (*m != CHANNELS && template.contains(m.close));
        KNOWN.into_iter().find(names)
    }

    /// What begins thoughts.
    pub fn opening(self) -> &'static str {
        self.open
    }

    /// Whether answers come in channels.
    pub fn in_channels(self) -> bool {
        self == CHANNELS
    }

    /// What leads from a prompt to an answer without thoughts; `open`: the prompt ends within some.
    pub fn passing_over(self, open: bool) -> String {
        match (self.in_channels(), open) {
            (true, false) => FINAL.to_owned(),
            (true, true) => format!("{}<|start|>assistant{FINAL}", self.close),
            (false, true) => format!("\n{}\n\n", self.close),
            (false, false) => String::new(),
        }
    }

    /// Whether a prompt ends where thoughts begin.
    pub fn are_open(self, prompt: &str) -> bool {
        let mark = if self.in_channels() { "<|channel|>analysis<|message|>" } else { self.open };
        prompt.trim_end().ends_with(mark)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nothing but white space was seen.
    Before,
    /// Thoughts; nothing of them was told yet.
    Opened,
    Inside,
    /// Thoughts are over, and nothing but white space came.
    Behind,
    Answer,
}

/// Parts an answer, as it comes, into thoughts and what is said.
#[derive(Debug)]
pub struct Thoughts {
    marks: Marks,
    state: State,
    held: String,
    channels: Option<Channels>,
}

impl Thoughts {
    /// At the beginning of an answer. `open`: the prompt ends with the opening mark; `calls`: calls are looked for in
    /// what is said.
    pub fn new(marks: Marks, open: bool, calls: bool) -> Thoughts {
        let channels = marks.in_channels().then(|| Channels::new(open, calls));
        Thoughts { marks, state: if open { State::Opened } else { State::Before }, held: String::new(), channels }
    }

    /// Whether the model is thinking.
    pub fn are_open(&self) -> bool {
        match &self.channels {
            Some(channels) => channels.are_open(),
            None => matches!(self.state, State::Opened | State::Inside),
        }
    }

    /// Takes more of the answer; returns what is thought and what is said for certain. Only thoughts at the beginning
    /// are some, but for those in channels: a mark further on is text.
    pub fn push(&mut self, piece: &str) -> (String, String) {
        if let Some(channels) = &mut self.channels {
            return channels.push(piece);
        }
        self.held.push_str(piece);
        let (mut thought, mut said) = (String::new(), String::new());
        loop {
            match self.state {
                State::Before => {
                    let begun = self.held.trim_start();
                    if let Some(rest) = begun.strip_prefix(self.marks.open) {
                        self.held = rest.to_owned();
                        self.state = State::Opened;
                        continue;
                    }
                    if self.marks.open.starts_with(begun) {
                        break;
                    }
                    self.state = State::Answer;
                }
                State::Opened | State::Inside => {
                    if self.state == State::Opened {
                        self.held = self.held.trim_start().to_owned();
                    }
                    if let Some(at) = self.held.find(self.marks.close) {
                        thought += self.held[..at].trim_end();
                        self.held.drain(..at + self.marks.close.len());
                        self.state = State::Behind;
                        continue;
                    }
                    // The end may be the beginning of the mark, and white space before that is no thought.
                    let open = |at: &usize| self.marks.close.starts_with(self.held[*at..].trim_start());
                    let cut = self.held.char_indices().map(|(at, _)| at).find(open).unwrap_or(self.held.len());
                    let rest = self.held.split_off(cut);
                    let certain = std::mem::replace(&mut self.held, rest);
                    if !certain.is_empty() {
                        self.state = State::Inside;
                    }
                    thought += &certain;
                    break;
                }
                State::Behind => {
                    self.held = self.held.trim_start().to_owned();
                    if self.held.is_empty() {
                        break;
                    }
                    self.state = State::Answer;
                }
                State::Answer => {
                    said += &std::mem::take(&mut self.held);
                    break;
                }
            }
        }
        (thought, said)
    }

    /// The answer is over: what is left of thoughts and of what is said.
    pub fn finish(mut self) -> (String, String) {
        if let Some(channels) = self.channels.take() {
            return channels.finish();
        }
        let left = std::mem::take(&mut self.held);
        if self.are_open() { (left.trim_end().to_owned(), String::new()) } else { (String::new(), left) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(open: bool, text: &str, step: usize) -> (String, String) {
        let mut t = Thoughts::new(KNOWN[0], open, false);
        let chars: Vec<char> = text.chars().collect();
        let (mut thought, mut said) = (String::new(), String::new());
        for piece in chars.chunks(step) {
            let (a, b) = t.push(&piece.iter().collect::<String>());
            thought += &a;
            said += &b;
        }
        let (a, b) = t.finish();
        (thought + &a, said + &b)
    }

    #[test]
    fn thoughts_are_found_however_the_answer_is_cut() {
        for (open, text, thought, said) in [
            (false, "<think>\nLet me see.\n\nYes.\n</think>\n\nIt is.", "Let me see.\n\nYes.", "It is."),
            (true, "\nLet me </see>.\n</think>It is.\n", "Let me </see>.", "It is.\n"),
            (false, "<think>\n\n</think>\n\nIt is.", "", "It is."),
            (false, "\n It is <think>x</think>.", "", "\n It is <think>x</think>."),
            (false, "<thin air", "", "<thin air"),
            (false, "<think", "", "<think"),
            (false, "<think>no end </thi", "no end </thi", ""),
            (true, "no end \n", "no end", ""),
            (true, "é</think>é <think>", "é", "é <think>"),
            (true, "", "", ""),
            (false, " \n", "", " \n"),
        ] {
            for step in [1, 2, 3, 5, 8, 1000] {
                assert_eq!(split(open, text, step), (thought.to_owned(), said.to_owned()), "{text:?} by {step}");
            }
        }
    }

    #[test]
    fn templates_tell_the_marks() {
        assert_eq!(Marks::of("{% if '</think>' in content %}"), Some(KNOWN[0]));
        assert_eq!(Marks::of("[THINK]"), Some(KNOWN[2]));
        assert_eq!(Marks::of("<|im_start|>"), None);
        assert_eq!(Marks::of("<|assistant|>{{ m }}<|end|>"), None);
        let channels = Marks::of("<|start|>assistant<|channel|>final<|message|>").unwrap();
        assert_eq!(channels, CHANNELS);
        assert!(!channels.are_open("<|start|>assistant") && channels.are_open("<|channel|>analysis<|message|>"));
        assert_eq!(channels.passing_over(false), "<|channel|>final<|message|>");
        assert_eq!((KNOWN[0].passing_over(true), KNOWN[0].passing_over(false)), ("\n</think>\n\n".into(), "".into()));
        assert!(KNOWN[0].are_open("<|assistant|><think>\n") && !KNOWN[0].are_open("<think>\n\n</think>\n\n"));
    }
}
