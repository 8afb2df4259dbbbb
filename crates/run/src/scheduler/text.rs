//! One text in a scheduler: where it stands, what is made of it, and the choice of its next token.

use std::collections::VecDeque;

use lacuna_base::MatRef;
use lacuna_checkpoint::{Decoder as TextDecoder, Tokenizer};
use lacuna_model::{Head, PromptPass};
use rayon::prelude::*;

use super::HEAD_ROWS;
use super::draft::Drafter;
use crate::generate::StopFilter;
use crate::request::{Event, Finished, Grammar, Picked, Pooling};
use crate::sampler::broken;
use crate::{Generation, Probability, RunError, Sampler, Stop};

/// A text and where it stands.
pub(super) struct Active {
    pub id: u64,
    /// The prompt and what was generated.
    pub tokens: Vec<u32>,
    pub prompt_tokens: usize,
    /// Where its keys and values are; none while it waits.
    pub slot: Option<usize>,
    /// Tokens whose keys and values are written.
    pub read: usize,
    /// Of the tokens behind those, how many a draft brought, whose keys and values are there but not their state: they
    /// are read once more.
    pub again: usize,
    /// Tokens that it may become.
    pub extent: usize,
    /// The class of its keys.
    pub class: u32,
    /// Tokens taken over at its first admission.
    pub reused: Option<usize>,
    /// Where the prompt's own tokens are to be told with their probabilities.
    pub score: Option<Scoring>,
    pub work: Work,
    /// Its prompt on its way through the layers, where that is read whole.
    pub pass: Option<PromptPass>,
    /// What drafts for it.
    pub drafter: Option<Box<Drafter>>,
    /// What was chosen of this step's logits, until it is told: a token behind each row that led to the next.
    pub chosen: Vec<Choice>,
    /// Why nothing more could be chosen.
    pub failed: Option<RunError>,
}

/// How far a prompt's tokens have been told with their probabilities.
pub(super) struct Scoring {
    /// Rivals of each.
    pub top: usize,
    /// Tokens told, the first among them: nothing says how probable that was.
    pub done: usize,
}

impl Scoring {
    /// The tokens of `prompt` that the rows of positions from `from` on predict and that were not told before. A text
    /// that is read again tells nothing twice. An error where the model computed no numbers.
    pub fn score(
        &mut self,
        head: &Head,
        prompt: &[u32],
        from: usize,
        rows: MatRef<'_>,
    ) -> Result<Vec<Picked>, RunError> {
        // The row of the last token predicts what is no part of the prompt.
        let to = (from + rows.rows()).min(prompt.len() - 1);
        let mut out = Vec::new();
        while self.done <= to && self.done > from {
            let (first, next) = (self.done - 1, to.min(self.done - 1 + HEAD_ROWS));
            let logits = head.logits(rows.rows_range(first - from, next - from));
            let (logits, top) = (logits.view(), self.top);
            for r in 0..next - first {
                if let Some(token) = broken(logits.row(r)) {
                    return Err(RunError::Logits { token, value: logits.row(r)[token], tokens: first + r + 1 });
                }
            }
            out.par_extend((0..next - first).into_par_iter().map(|r| {
                let id = prompt[first + r + 1];
                Picked { id, probability: Some(Probability::of(logits.row(r), id, top)) }
            }));
            self.done = next + 1;
        }
        Ok(out)
    }
}

/// What is made of a text. State that lives from token to token is kept here.
pub(super) enum Work {
    Generate(Box<Writing>),
    /// The tokens to come, in order.
    Forced(std::vec::IntoIter<u32>),
    Embed {
        pooling: Pooling,
        sum: Vec<f64>,
    },
    /// Its rows are told; so many were.
    Read {
        told: usize,
    },
}

/// An answer in the making.
pub(super) struct Writing {
    generation: Generation,
    logprobs: Option<usize>,
    grammar: Option<Box<dyn Grammar>>,
    sampler: Sampler,
    tokenizer: Tokenizer,
    decoder: TextDecoder,
    filter: StopFilter,
    /// Bytes of text decoded, and of those that are certain.
    decoded: usize,
    certain: usize,
    /// Tokens that were not told yet, with the byte at which their text begins.
    held: VecDeque<(usize, Picked)>,
    /// The token that ended it, where it has a probability.
    end: Option<Picked>,
}

/// How a text goes on.
pub(super) enum Choice {
    /// By this token.
    Token {
        picked: Picked,
        /// Whether the grammar allows nothing behind it.
        complete: bool,
    },
    /// The model ends it with this token.
    End(Picked),
    /// Nothing is left to go on with.
    Nothing,
}

impl Active {
    /// Where a text at work keeps its keys and values.
    #[track_caller]
    pub fn slot(&self) -> usize {
        self.slot.expect("a text at work has a slot")
    }

    /// Tokens that are not read yet.
    pub fn unread(&self) -> usize {
        self.tokens.len() - self.read
    }

    /// Whether it is being continued: all that is left is to read its last token, behind those to be read again.
    pub fn goes_on(&self) -> bool {
        self.unread() == 1 + self.again
    }

    /// Whether every row of it is needed, so that nothing can be taken over.
    pub fn needs_all_rows(&self) -> bool {
        self.score.is_some() || matches!(self.work, Work::Embed { pooling: Pooling::Mean, .. } | Work::Read { .. })
    }

    /// Whether all that was asked is that the prompt be read.
    pub fn is_answered(&self) -> bool {
        matches!(&self.work, Work::Generate(w) if w.max_tokens() == 0)
    }

    /// The tokens that may be taken over: all but the last, whose row is needed.
    pub fn known(&self) -> &[u32] {
        &self.tokens[..self.tokens.len() - 1]
    }

    /// How much work choosing its next token is, in logits looked at once.
    pub fn choice_cost(&self, vocab: usize) -> usize {
        match &self.work {
            // Exponentials, and an order of some of them.
            Work::Generate(w) if !w.sampler.is_greedy() || w.logprobs.is_some() => 16 * vocab,
            Work::Generate(_) => vocab,
            Work::Forced(_) | Work::Embed { .. } | Work::Read { .. } => 0,
        }
    }

    /// Chooses the next token by the logits of the rows that wanted some, `[1 + nodes, vocab]`: those behind the text,
    /// and behind each node of its draft. As long as a drafted token is the one that is chosen, its row says what
    /// follows. Texts choose independently, on any thread; what comes of it is told by [`Active::advance`].
    pub fn choose(&mut self, logits: MatRef<'_>) {
        let Active { work, tokens, drafter, chosen, failed, prompt_tokens, .. } = self;
        match work {
            Work::Generate(w) => {
                let whole = tokens.len();
                let mut row = 0;
                loop {
                    match w.choose(logits.row(row), tokens, *prompt_tokens) {
                        Err(e) => *failed = Some(e),
                        Ok(choice) => {
                            let next = match (&choice, &mut *drafter) {
                                (Choice::Token { picked, complete: false }, Some(d)) => d.take(row, picked.id),
                                _ => None,
                            };
                            if let (Choice::Token { picked, .. }, Some(next)) = (&choice, next) {
                                // The text as it is for what is chosen next; it is told later.
                                tokens.push(picked.id);
                                row = next;
                                chosen.push(choice);
                                continue;
                            }
                            chosen.push(choice);
                        }
                    }
                    break;
                }
                tokens.truncate(whole);
            }
            Work::Forced(rest) => {
                let next = rest.next().map(|id| Picked { id, probability: None });
                chosen.push(next.map_or(Choice::Nothing, |picked| Choice::Token { picked, complete: false }));
            }
            Work::Embed { .. } | Work::Read { .. } => chosen.push(Choice::Nothing),
        }
        if let Some(d) = drafter {
            d.look(logits);
        }
    }

    /// Goes on by what was chosen and tells the text that became certain; true where the text is over, which has been
    /// told. `most`: tokens that a text may have.
    pub fn advance(&mut self, most: usize, on: &mut dyn FnMut(u64, Event)) -> bool {
        let mut chosen = std::mem::take(&mut self.chosen);
        let mut stop = None;
        for choice in chosen.drain(..) {
            stop = self.go_on(choice, most, on);
            if stop.is_some() {
                break;
            }
        }
        self.chosen = chosen;
        match (stop, self.failed.take()) {
            (Some(stop), _) => {
                on(self.id, Event::Finished(self.finished(stop)));
                true
            }
            (None, Some(e)) => {
                on(self.id, Event::Failed(e));
                true
            }
            (None, None) => false,
        }
    }

    fn go_on(&mut self, choice: Choice, most: usize, on: &mut dyn FnMut(u64, Event)) -> Option<Stop> {
        let Work::Generate(w) = &mut self.work else {
            if let Choice::Token { picked, .. } = choice {
                self.tokens.push(picked.id);
                return None;
            }
            return Some(Stop::MaxTokens);
        };
        let mut stop = None;
        match choice {
            Choice::Nothing => stop = Some(Stop::MaxTokens),
            Choice::End(picked) => {
                stop = Some(Stop::EndToken(picked.id));
                w.end = Some(picked).filter(|p| p.probability.is_some());
            }
            Choice::Token { picked, complete } => {
                let id = picked.id;
                self.tokens.push(id);
                w.held.push_back((w.decoded, picked));
                let piece = w.decoder.push(id).unwrap_or_default();
                w.decoded += piece.len();
                let (certain, stopped) = w.filter.push(&piece);
                w.tell(self.id, certain, false, on);
                if let Some(text) = stopped {
                    return Some(Stop::StopText(text));
                } else if complete {
                    stop = Some(Stop::Grammar);
                } else if self.tokens.len() - self.prompt_tokens == w.generation.max_tokens {
                    stop = Some(Stop::MaxTokens);
                } else if self.tokens.len() == most {
                    stop = Some(Stop::Context);
                }
            }
        }
        if stop.is_some() {
            let mut rest = w.filter.finish();
            rest.extend(w.decoder.finish());
            w.tell(self.id, rest, true, on);
        }
        stop
    }

    /// How it ended.
    pub fn finished(&self, stop: Stop) -> Finished {
        Finished {
            stop,
            prompt_tokens: self.prompt_tokens,
            reused_tokens: self.reused.unwrap_or(0),
            tokens: self.tokens.len() - self.prompt_tokens,
            ids: self.tokens[self.prompt_tokens..].to_vec(),
            end: if let Work::Generate(w) = &self.work { w.end.clone() } else { None },
        }
    }
}

impl Writing {
    pub fn new(
        generation: Generation,
        logprobs: Option<usize>,
        grammar: Option<Box<dyn Grammar>>,
        special: bool,
        tokenizer: &Tokenizer,
    ) -> Result<Writing, RunError> {
        let decoder = tokenizer.decoder().continuing();
        Ok(Writing {
            sampler: Sampler::new(&generation.sampling)?,
            decoder: if special { decoder.with_special() } else { decoder },
            filter: StopFilter::new(&generation.stop),
            tokenizer: tokenizer.clone(),
            logprobs,
            grammar,
            generation,
            decoded: 0,
            certain: 0,
            held: VecDeque::new(),
            end: None,
        })
    }

    /// Most tokens of the answer.
    pub fn max_tokens(&self) -> usize {
        self.generation.max_tokens
    }

    fn choose(&mut self, logits: &[f32], text: &[u32], prompt_tokens: usize) -> Result<Choice, RunError> {
        let allowed = self.grammar.as_mut().map(|g| g.allowed()).transpose()?;
        let id = self.sampler.pick(logits, text, prompt_tokens, allowed)?;
        let probability = self.logprobs.map(|top| Probability::of(logits, id, top));
        if !self.generation.ignore_end && self.tokenizer.eos_set().contains(&id) {
            return Ok(Choice::End(Picked { id, probability }));
        }
        let complete = match &mut self.grammar {
            Some(g) => g.accept(id)?,
            None => false,
        };
        Ok(Choice::Token { picked: Picked { id, probability }, complete })
    }

    /// Tells text that is certain, with the tokens that begin in it; at the end, with all that are left.
    fn tell(&mut self, id: u64, text: String, end: bool, on: &mut dyn FnMut(u64, Event)) {
        self.certain += text.len();
        let mut tokens = Vec::new();
        while self.held.front().is_some_and(|(start, _)| end || *start < self.certain) {
            tokens.extend(self.held.pop_front().map(|(_, picked)| picked));
        }
        if !text.is_empty() || !tokens.is_empty() {
            on(id, Event::Text { text, tokens });
        }
    }
}
