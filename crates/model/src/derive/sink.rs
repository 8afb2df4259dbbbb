//! Who is shown gradients.

use lacuna_base::MatRef;
use lacuna_spec::Place;

use crate::ModelError;

/// Someone who is shown gradients on the way back. Each sequence's loss is its own mean: gradients of several sequences are not averaged here.
///
/// The order: parts from the last to the first (the head, then the blocks), in each part all sequences, one after the other.
pub trait GradientSink {
    /// Whether what belongs to `place` is to be shown: a matrix, a norm's scale, or a bias. Everything by default.
    fn wants(&self, place: &Place) -> bool {
        let _ = place;
        true
    }

    /// What the matrix at `place` multiplied, `x` `[rows, inputs]`, and the gradients of what came out, `dy` `[rows, outputs]`: the gradient of the
    /// matrix is the sum of `dyᵀ · x` over all calls up to the sequence's end. The head is shown in several calls of some rows each; an expert sees
    /// the rows routed to it, and none where there are none.
    fn gradient(&mut self, place: &Place, x: MatRef<'_>, dy: MatRef<'_>);

    /// The gradient of a norm's scale or of a bias, of one sequence; of the head's norm once.
    fn vector(&mut self, place: &Place, gradient: &[f32]) {
        let _ = (place, gradient);
    }

    /// All of one sequence in the present part has been shown.
    fn end_of_sequence(&mut self) {}

    /// All sequences in block `layer` (the head: `None`) have been shown: what was gathered of it is whole.
    fn end_of_part(&mut self, layer: Option<usize>) -> Result<(), ModelError> {
        let _ = layer;
        Ok(())
    }
}

/// Several at once, in order.
impl GradientSink for Vec<&mut dyn GradientSink> {
    fn wants(&self, place: &Place) -> bool {
        self.iter().any(|s| s.wants(place))
    }
    fn gradient(&mut self, place: &Place, x: MatRef<'_>, dy: MatRef<'_>) {
        self.iter_mut().filter(|s| s.wants(place)).for_each(|s| s.gradient(place, x, dy));
    }
    fn vector(&mut self, place: &Place, gradient: &[f32]) {
        self.iter_mut().filter(|s| s.wants(place)).for_each(|s| s.vector(place, gradient));
    }
    fn end_of_sequence(&mut self) {
        self.iter_mut().for_each(|s| s.end_of_sequence());
    }
    fn end_of_part(&mut self, layer: Option<usize>) -> Result<(), ModelError> {
        self.iter_mut().try_for_each(|s| s.end_of_part(layer))
    }
}
