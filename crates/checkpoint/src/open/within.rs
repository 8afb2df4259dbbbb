//! Loading as much of a stacked model as a budget holds.

use std::collections::HashMap;

use lacuna_base::units::show_bytes;
use lacuna_format::terms_within;

use super::{Checkpoint, OpenError};

impl Checkpoint {
    /// The same model whose weights take at most `budget_bytes`: of each matrix that is a stack
    /// ([`Stored::stack`](lacuna_format::Stored::stack)) as many terms from the first on as [`terms_within`] gives it.
    /// Nothing is written, and of terms that are left out the factors alone are read. Refused where no matrix is a stack,
    /// or where the first terms of all take more.
    pub fn within(mut self, budget_bytes: u64) -> Result<Checkpoint, OpenError> {
        let (mut stacks, mut places, mut rest) = (Vec::new(), Vec::new(), 0);
        for place in self.spec.places() {
            let Some(stored) = self.stored(&place)? else { continue };
            match stored.stack() {
                Some(stack) => {
                    rest += stored.bytes() - stack.iter().map(|(_, b)| b).sum::<u64>();
                    stacks.push(stack);
                    places.push(place);
                }
                None => rest += stored.bytes(),
            }
        }
        if stacks.is_empty() {
            let what = "no matrix is a stack of blocks, so that it can only be loaded whole (recipes/bitstack.toml \
                        makes a model of stacks)";
            return Err(OpenError::bad(&self.path, what));
        }
        let terms = terms_within(&stacks, budget_bytes.saturating_sub(rest)).map_err(|least| {
            let (asked, least) = (show_bytes(budget_bytes), show_bytes(rest + least));
            OpenError::bad(&self.path, format!("{asked} hold no block of each matrix: the least is {least}"))
        })?;
        let count = |of: &dyn Fn(usize) -> usize| (0..stacks.len()).map(of).sum::<usize>();
        let bytes: u64 = stacks.iter().zip(&terms).flat_map(|(s, n)| &s[..*n]).map(|(_, b)| b).sum();
        let (now, all) = (count(&|i| terms[i]), count(&|i| stacks[i].len()));
        let what = format!("{now} of {all} blocks are loaded, {} of weights in all", show_bytes(rest + bytes));
        if now < all {
            self.notes.push(what);
        }
        self.loaded = places.into_iter().zip(terms).collect::<HashMap<_, _>>();
        Ok(self)
    }
}
