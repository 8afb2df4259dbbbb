//! What is asked of a scheduler, and what it answers.

use lacuna_base::Mat;

use crate::{Generation, Probability, RunError, Stop};

/// A grammar that an answer must follow, token by token.
pub trait Grammar: Send {
    /// A bit for each token that may come next, ends of the text among them where it may end here.
    fn allowed(&mut self) -> Result<&[u32], RunError>;

    /// Goes on by a token that was allowed and is no end. True where the text is complete and nothing may follow.
    fn accept(&mut self, token: u32) -> Result<bool, RunError>;
}

/// How the rows of a text become one vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pooling {
    /// Their mean.
    Mean,
    /// The last one.
    Last,
}

/// One text to work on.
pub struct Request {
    /// Its tokens, special ones included.
    pub prompt: Vec<u32>,
    /// What to do with it.
    pub job: Job,
    /// Whether each token of the prompt is told with its probability, and with how many rivals. All of the prompt is
    /// then read: nothing is taken over from other texts.
    pub score: Option<usize>,
}

/// What to do with a text.
pub enum Job {
    /// Continue it. The generation's own prompt is not looked at.
    Generate {
        /// How far, and how tokens are chosen.
        generation: Generation,
        /// Whether each token comes with its probability, and with how many rivals.
        logprobs: Option<usize>,
        /// What the answer must look like.
        grammar: Option<Box<dyn Grammar>>,
        /// Whether special tokens are written out: some models mark calls of tools with them.
        special: bool,
    },
    /// Continue it by these tokens, as if each had been chosen by the logits that are computed before it, and compute
    /// those after the last one, too: measurements do so. Nothing is told but the end, [`Stop::MaxTokens`].
    Forced(Vec<u32>),
    /// Turn it into a vector of length 1: the rows that would be multiplied by the head, pooled.
    Embed(Pooling),
    /// Read it, and tell what each of its tokens becomes: measurements compare them with another model's.
    Read,
}

impl Request {
    /// A text and what to do with it.
    pub fn new(prompt: Vec<u32>, job: Job) -> Request {
        Request { prompt, job, score: None }
    }

    /// The same, with the probabilities of the prompt's tokens and of each one's `top` likeliest rivals.
    pub fn scored(self, top: usize) -> Request {
        Request { score: Some(top), ..self }
    }

    /// A plain continuation.
    pub fn generate(generation: Generation) -> Request {
        let prompt = generation.prompt.clone();
        Request::new(prompt, Job::Generate { generation, logprobs: None, grammar: None, special: false })
    }
}

/// A token of an answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Picked {
    /// Its id.
    pub id: u32,
    /// How probable it was, where that was asked.
    pub probability: Option<Probability>,
}

/// How a continuation ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Finished {
    /// Why.
    pub stop: Stop,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Of these, tokens whose keys and values were there already.
    pub reused_tokens: usize,
    /// Tokens generated, an end token not counted.
    pub tokens: usize,
    /// These. After a stop text they may hold a little more than the answer.
    pub ids: Vec<u32>,
    /// The token by which the model ended its answer, where probabilities were asked for.
    pub end: Option<Picked>,
}

/// What becomes of a request. [`Event::Finished`], [`Event::Embedding`] and [`Event::Failed`] come last, one of them
/// once.
#[derive(Debug)]
pub enum Event {
    /// The next tokens of the prompt with their probabilities, where [`Request::score`] asked for them: all but the
    /// first, in order, before any of the answer.
    Read(Vec<Picked>),
    /// More of the answer: whole characters, nothing that may yet turn out to be a stop text; and the tokens that end
    /// in it.
    Text {
        /// The text.
        text: String,
        /// The tokens.
        tokens: Vec<Picked>,
    },
    /// The answer is complete.
    Finished(Finished),
    /// The vector is there.
    Embedding {
        /// Its values.
        vector: Vec<f32>,
        /// Tokens of the text.
        tokens: usize,
    },
    /// The residual stream behind the last block of the next tokens of the text, for [`Job::Read`]: all in order.
    Rows {
        /// The position of the first.
        from: usize,
        /// `[tokens, hidden]`.
        rows: Mat,
    },
    /// It could not be done.
    Failed(RunError),
}

impl Event {
    /// Whether nothing more is told of the request.
    pub fn is_last(&self) -> bool {
        !matches!(self, Event::Read(_) | Event::Text { .. } | Event::Rows { .. })
    }
}
