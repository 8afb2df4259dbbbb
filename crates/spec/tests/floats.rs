//! A saved network is read back bit for bit: every float of it is part of what the model computes.

use lacuna_spec::{Rope, RopeScaling, RopeStyle};
use proptest::prelude::*;

proptest! {
    #[test]
    fn floats_of_a_network_are_read_back_bit_for_bit(bits in prop::collection::vec(any::<u32>(), 1..200)) {
        let floats: Vec<f32> = bits.into_iter().map(f32::from_bits).filter(|x| x.is_finite()).collect();
        let rope = Rope {
            theta: floats.first().copied().unwrap_or(1.0),
            dims: 2 * floats.len(),
            style: RopeStyle::Half,
            scaling: RopeScaling::Factors { factors: floats },
        };
        // As the packed model's config.json is written and read, and by way of a value, as a report is.
        let text = serde_json::to_vec_pretty(&rope).unwrap();
        let value = serde_json::to_value(&rope).unwrap().to_string();
        for read in [serde_json::from_slice(&text), serde_json::from_str(&value)] {
            let read: Rope = read.unwrap();
            prop_assert_eq!(read.theta.to_bits(), rope.theta.to_bits());
            prop_assert_eq!(bits_of(&read), bits_of(&rope));
        }
    }
}

fn bits_of(rope: &Rope) -> Vec<u32> {
    match &rope.scaling {
        RopeScaling::Factors { factors } => factors.iter().map(|x| x.to_bits()).collect(),
        other => panic!("{other:?}"),
    }
}
