//! Weights that are counted as somebody reads them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use lacuna_format::{Stored, Weights, WeightsError};
use lacuna_spec::{Place, Spec};

/// The same weights; what was asked for is counted once, in bytes as it is stored, as `inspect` counts.
pub struct Counted<'a> {
    of: &'a dyn Weights,
    seen: Mutex<HashMap<Place, u64>>,
}

impl<'a> Counted<'a> {
    /// Nothing was read yet.
    pub fn new(of: &'a dyn Weights) -> Counted<'a> {
        Counted { of, seen: Mutex::default() }
    }

    /// Bytes of all that was read.
    pub fn bytes(&self) -> u64 {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).values().sum()
    }
}

impl Weights for Counted<'_> {
    fn spec(&self) -> &Spec {
        self.of.spec()
    }

    fn get(&self, place: &Place) -> Result<Option<Arc<Stored>>, WeightsError> {
        let found = self.of.get(place)?;
        if let Some(stored) = &found {
            self.seen.lock().unwrap_or_else(PoisonError::into_inner).insert(*place, stored.bytes());
        }
        Ok(found)
    }

    fn release(&self, place: &Place) {
        self.of.release(place);
    }
}
