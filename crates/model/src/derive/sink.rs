//! Who is shown gradients.

use lacuna_base::MatRef;
use lacuna_spec::Place;

use crate::ModelError;

/// Someone who is shown gradients on the way back. Each sequence's loss is its own mean: gradients of several sequences
/// are not averaged here.
///
/// The order: parts from the last to the first (the head, then the blocks), in each part all sequences, one after the
/// other.
pub trait GradientSink {
    /// Whether what belongs to `place` is to be shown: a matrix, a norm's scale, or a bias. Everything by default.
    fn wants(&self, place: &Place) -> bool {
        let _ = place;
        true
    }

    /// What the matrix at `place` multiplied, `x` `[rows, inputs]`, and the gradients of what came out, `dy`
    /// `[rows, outputs]`: the gradient of the matrix is the sum of `dyᵀ · x` over all calls up to the sequence's end.
    /// The head is shown in several calls of some rows each; an expert sees the rows routed to it, and none where there
    /// are none.
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

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::testkit::random;
    use lacuna_spec::Role;

    #[derive(Default)]
    struct Seen {
        only: Option<Place>,
        calls: Vec<String>,
    }

    impl GradientSink for Seen {
        fn wants(&self, place: &Place) -> bool {
            self.only.is_none_or(|p| p == *place)
        }
        fn gradient(&mut self, place: &Place, _: MatRef<'_>, _: MatRef<'_>) {
            self.calls.push(place.to_string());
        }
        fn vector(&mut self, place: &Place, _: &[f32]) {
            self.calls.push(place.to_string());
        }
        fn end_of_sequence(&mut self) {
            self.calls.push("sequence".into());
        }
        fn end_of_part(&mut self, layer: Option<usize>) -> Result<(), ModelError> {
            self.calls.push(format!("{layer:?}"));
            Ok(())
        }
    }

    #[test]
    fn each_of_several_sees_what_it_wants() {
        let [q, norm] = [Role::Q, Role::AttnNorm].map(|role| Place::layer(0, role));
        let (mut a, mut b) = (Seen { only: Some(q), ..Seen::default() }, Seen { only: Some(norm), ..Seen::default() });
        {
            let mut both: Vec<&mut dyn GradientSink> = vec![&mut a, &mut b];
            assert!(both.wants(&q) && both.wants(&norm) && !both.wants(&q.bias()));
            let m = random(2, 3, 1);
            both.gradient(&q, m.view(), m.view());
            both.vector(&norm, &[1.0]);
            both.end_of_sequence();
            both.end_of_part(Some(0)).unwrap();
        }
        assert_eq!(a.calls, ["layers.0.attn.q", "sequence", "Some(0)"]);
        assert_eq!(b.calls, ["layers.0.attn.norm", "sequence", "Some(0)"]);
    }
}
