//! Gram matrices of output gradients.

use std::collections::{BTreeMap, BTreeSet};

use lacuna_base::{Gram, MatRef};
use lacuna_spec::Place;

use crate::derive::GradientSink;

/// `dYᵀ · dY` of each matrix, `[outputs, outputs]`, summed in f64 over all rows of all sequences and not divided by
/// their number.
#[derive(Clone, Debug)]
pub struct OutputGrams {
    places: BTreeSet<Place>,
    grams: BTreeMap<Place, Gram>,
}

impl OutputGrams {
    /// For the matrices at `places`.
    pub fn new(places: impl IntoIterator<Item = Place>) -> OutputGrams {
        OutputGrams { places: places.into_iter().collect(), grams: BTreeMap::new() }
    }

    /// That of the matrix at `place`; `None` where no row reached it.
    pub fn get(&self, place: &Place) -> Option<&Gram> {
        self.grams.get(place)
    }

    /// Takes out everything so far.
    pub fn take(&mut self) -> BTreeMap<Place, Gram> {
        std::mem::take(&mut self.grams)
    }
}

impl GradientSink for OutputGrams {
    fn wants(&self, place: &Place) -> bool {
        self.places.contains(place)
    }

    fn gradient(&mut self, place: &Place, _: MatRef<'_>, dy: MatRef<'_>) {
        if self.places.contains(place) {
            self.grams.entry(*place).or_insert_with(|| Gram::new(dy.cols())).add(dy);
        }
    }
}
