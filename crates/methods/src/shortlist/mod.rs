//! Shortlists: which tokens does the model still need?

pub(crate) mod lexical_shortlist;

use lacuna_contract::{MethodError, Vocabulary};

/// Tokens that stay, closed under their pieces.
pub(crate) struct Kept<'a> {
    vocabulary: &'a Vocabulary,
    stays: Vec<bool>,
    count: usize,
}

impl<'a> Kept<'a> {
    /// Those that must stay; refused where they are more than `most`, or where the lists contradict each other.
    pub fn new(vocabulary: &'a Vocabulary, most: usize) -> Result<Kept<'a>, MethodError> {
        let n = vocabulary.counts.len();
        let lengths = [vocabulary.bytes.len(), vocabulary.must.len(), vocabulary.pieces.len()];
        if lengths.iter().any(|l| *l != n) {
            return Err(MethodError::new(format!("{n} counts for lists of {lengths:?} tokens")));
        }
        if let Some(id) = vocabulary.pieces.iter().position(|p| p.iter().any(|p| *p as usize >= n)) {
            return Err(MethodError::new(format!("a piece of token {id} is beyond the {n} tokens")));
        }
        let mut kept = Kept { vocabulary, stays: vec![false; n], count: 0 };
        for id in (0..n).filter(|&id| vocabulary.must[id]) {
            kept.add(id, n);
        }
        if kept.count > most {
            return Err(MethodError::new(format!(
                "{most} tokens may stay, and {} must: special and added tokens, bytes, those of the chat template, and \
                 their pieces",
                kept.count
            )));
        }
        Ok(kept)
    }

    /// Adds a token with its pieces, theirs and so on, where all of them fit into `most`.
    pub fn add(&mut self, id: usize, most: usize) -> bool {
        let (mut fresh, mut open) = (Vec::new(), vec![id]);
        while let Some(id) = open.pop() {
            if std::mem::replace(&mut self.stays[id], true) {
                continue;
            }
            fresh.push(id);
            if self.count + fresh.len() > most {
                fresh.iter().for_each(|&id| self.stays[id] = false);
                return false;
            }
            open.extend(self.vocabulary.pieces[id].iter().map(|&p| p as usize));
        }
        self.count += fresh.len();
        true
    }

    /// Their ids, rising.
    pub fn ids(&self) -> Vec<usize> {
        (0..self.stays.len()).filter(|&id| self.stays[id]).collect()
    }
}
