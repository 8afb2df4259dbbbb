//! A saved network is read back bit for bit: every float of it is part of what the model computes.

use lacuna_spec::{Place, Role, Rope, RopeScaling, RopeStyle, Spec};
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

/// A model saved before there was a bias on down alone is read, and one without it is written as before.
#[test]
fn a_bias_on_down_alone_is_said_only_where_it_is() {
    let config = serde_json::json!({
        "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 4, "max_position_embeddings": 128,
    });
    let mut spec = lacuna_arch::from_config(&config).unwrap();
    let plain = serde_json::to_string(&spec).unwrap();
    assert!(!plain.contains("down_bias"), "{plain}");
    assert_eq!(serde_json::from_str::<Spec>(&plain).unwrap(), spec);
    let bias = Place::layer(0, Role::Down).bias();
    assert_eq!(spec.shape(&bias), None);
    let ffn = spec.layers[0].ffn.as_mut().unwrap();
    ffn.down_bias = true;
    assert_eq!((spec.shape(&bias), spec.shape(&Place::layer(0, Role::Up).bias())), (Some((1, 32)), None));
    assert_eq!(serde_json::from_str::<Spec>(&serde_json::to_string(&spec).unwrap()).unwrap(), spec);
    assert!(serde_json::from_str::<Spec>(&plain.replace("\"gated\"", "\"gaited\":true,\"gated\"")).is_err());
    spec.layers[0].ffn.as_mut().unwrap().bias = true;
    assert!(spec.check().unwrap_err().what.contains("layer 0: a bias on down is said twice"));
}

/// A model saved before there were shortcuts and divisors is read, and one without them is written as before.
#[test]
fn shortcuts_and_divisors_are_said_only_where_they_are() {
    let config = serde_json::json!({
        "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 128,
    });
    let mut spec = lacuna_arch::from_config(&config).unwrap();
    let plain = serde_json::to_string(&spec).unwrap();
    assert!(!plain.contains("shortcut") && !plain.contains("divisor"), "{plain}");
    assert_eq!(serde_json::from_str::<Spec>(&plain).unwrap(), spec);
    let before = spec.places().len();
    (spec.layers[0].ffn_shortcut, spec.layers[1].attn_shortcut, spec.norm.divisor) = (true, true, Some(40));
    spec.check().unwrap();
    assert_eq!(serde_json::from_str::<Spec>(&serde_json::to_string(&spec).unwrap()).unwrap(), spec);
    let (ffn, attn) = (Place::layer(0, Role::FfnShortcut), Place::layer(1, Role::AttnShortcut));
    assert_eq!((spec.shape(&ffn), spec.shape(&attn)), (Some((32, 32)), Some((32, 32))));
    assert_eq!((spec.shape(&Place::layer(0, Role::AttnShortcut)), spec.shape(&ffn.bias())), (None, None));
    assert_eq!((spec.places().len(), spec.first_shortcut()), (before + 2, Some(ffn)));
    // It outlives the part that it goes around.
    spec.layers[0].ffn = None;
    assert_eq!(spec.shape(&ffn), Some((32, 32)));
    for (divisor, word) in [(0, "norm.divisor is 0"), (usize::MAX, "norm.divisor is")] {
        spec.norm.divisor = Some(divisor);
        assert!(spec.check().unwrap_err().what.contains(word));
    }
    (spec.norm.divisor, spec.norm.kind) = (Some(40), lacuna_spec::NormKind::Layer);
    assert!(spec.check().unwrap_err().what.contains("only RMS norms"));
}

fn bits_of(rope: &Rope) -> Vec<u32> {
    match &rope.scaling {
        RopeScaling::Factors { factors } => factors.iter().map(|x| x.to_bits()).collect(),
        other => panic!("{other:?}"),
    }
}
