//! A model's tokens for the steps that take some away, and the calibration text in those that stay.

use lacuna_checkpoint::{Checkpoint, Tokenizer};
use lacuna_contract::{MethodError, Vocabulary};

use crate::account::CompressError;
use crate::drive::Walk;
use crate::sequences;

fn told(e: impl std::fmt::Display) -> MethodError {
    MethodError::new(format!("the vocabulary cannot change: {e}"))
}

/// The tokens of `source`, which has `rows` rows, with how often each stands in the calibration text.
fn read(source: &Checkpoint, tokens: &[u32], rows: usize) -> Result<Vocabulary, MethodError> {
    if tokens.len() < 2 {
        return Err(told(format!("the calibration text has {} tokens; at least 2 are needed", tokens.len())));
    }
    let tokenizer = Tokenizer::open(source).map_err(told)?;
    let lexicon = tokenizer.lexicon(source, rows).map_err(told)?;
    let mut counts = vec![0; rows];
    for &t in tokens {
        let count = counts.get_mut(t as usize);
        *count.ok_or_else(|| told(format!("the text has token {t}, the model {rows} rows")))? += 1;
    }
    Ok(Vocabulary { counts, bytes: lexicon.bytes, must: lexicon.must, pieces: lexicon.pieces })
}

impl Walk<'_> {
    /// The tokens that a step chooses from.
    pub(crate) fn vocabulary(&self, rows: usize) -> Result<Vocabulary, MethodError> {
        match self.kept {
            Some(_) => Err(told("an earlier step has changed it; one step chooses for all")),
            None => read(self.source, self.tokens, rows),
        }
    }

    /// From here on the model has the tokens `kept` alone: the calibration text is cut anew, in those.
    pub(crate) fn shorten(&mut self, kept: Vec<usize>) -> Result<(), MethodError> {
        let old = Tokenizer::open(self.source).map_err(told)?;
        let new = old.shortened(self.source, &kept).map_err(told)?;
        if !self.sequences.is_empty() {
            let tokens = new.encode(&old.decode_with_special(self.tokens), false).map_err(told)?;
            let bos = self.options.bos.and_then(|b| kept.binary_search(&(b as usize)).ok()).map(|b| b as u32);
            let cut = sequences::cut(&tokens, self.recipe, bos, &mut Vec::new());
            let most = self.sequences.len();
            self.sequences = cut.map_err(|e: CompressError| told(e))?;
            // Memory was planned for so many.
            self.sequences.truncate(most);
        }
        self.kept = Some(kept);
        Ok(())
    }
}
