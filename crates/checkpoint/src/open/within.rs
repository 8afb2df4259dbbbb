//! Loading a part of a model: of a stacked one as much as a budget holds, of nested codes the high bits.

use std::collections::HashMap;
use std::sync::OnceLock;

use lacuna_base::units::show_bytes;
use lacuna_format::terms_within;

use super::{Checkpoint, Located, OpenError};

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

    /// The same model with codes into tables cut to their `bits` high bits
    /// ([`Stored::narrowed`](lacuna_format::Stored::narrowed)), 1 to 8: the smaller models within one of Any-Precision's.
    /// Nothing is written. Refused where no matrix has codes of more bits.
    pub fn narrowed(mut self, bits: u8) -> Result<Checkpoint, OpenError> {
        if !(1..=8).contains(&bits) {
            return Err(OpenError::bad(&self.path, format!("{bits} bits a code asked for; there are 1 to 8")));
        }
        let mut cut = 0;
        for place in self.spec.places() {
            cut += usize::from(self.stored(&place)?.is_some_and(|s| s.code_bits() > Some(bits)));
        }
        if cut == 0 {
            let what = format!(
                "no matrix has codes of more than {bits} bits into tables, so that there is nothing to cut \
                 (recipes/any-precision.toml makes a model of such)"
            );
            return Err(OpenError::bad(&self.path, what));
        }
        self.bits = Some(bits);
        for located in self.places.values_mut() {
            if let Located::Packed { whole, .. } = located {
                // What was just looked at is not what is loaded from now on.
                *whole = OnceLock::new();
            }
        }
        self.notes.push(format!("codes of {cut} matrices are loaded at {bits} bits"));
        Ok(self)
    }
}
