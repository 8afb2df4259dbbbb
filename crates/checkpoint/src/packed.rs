//! The packed model's config.json.
//!
//! A packed model is a directory of safetensors files whose tensors are named `<place>.<suffix>` (suffixes as in
//! [`Stored::to_parts`](lacuna_format::Stored::to_parts)), a config.json with everything else, and the source's
//! tokenizer files unchanged.

use std::collections::BTreeMap;

use lacuna_format::Descriptor;
use lacuna_spec::{Place, Spec};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use crate::safetensors::{Unique, plain_name};

/// The value of `format` by which a packed model is known.
pub const FORMAT: &str = "lacuna-packed";

/// The last version; later ones are refused. A model is written with the first version that has all that its matrices
/// are made of ([`Descriptor::version`]) and its network says, so that older programs read it where they can.
pub const VERSION: u32 = 7;

/// The first version that can say all of a model: 3 for shortcuts with a matrix and for a norm's divisor, 6 for layers
/// that share weights.
pub(crate) fn version_of(spec: &Spec, weights: &BTreeMap<Place, Descriptor>) -> u32 {
    let of_spec = match (spec.first_like(), spec.first_shortcut().is_some() || spec.norm.divisor.is_some()) {
        (Some(_), _) => 6,
        (None, true) => 3,
        (None, false) => 1,
    };
    weights.values().map(Descriptor::version).max().unwrap_or(1).max(of_spec)
}

/// config.json of a packed model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PackedConfig {
    /// Always [`FORMAT`].
    pub format: String,
    /// [`VERSION`] or earlier.
    pub version: u32,
    /// The network, uneven layers and all.
    pub spec: Spec,
    /// The recipe that made it, as it ran.
    pub recipe: Value,
    /// What it was made from.
    pub source: Value,
    /// Everything that makes its results differ from the source's, a sentence each.
    pub approximations: Vec<String>,
    /// The weight files, in order.
    pub files: Vec<String>,
    /// How each tensor of the network is stored.
    #[serde(deserialize_with = "unique")]
    pub weights: BTreeMap<Place, Descriptor>,
}

fn unique<'de, D: Deserializer<'de>>(d: D) -> Result<BTreeMap<Place, Descriptor>, D::Error> {
    let Unique(pairs) = Unique::<Descriptor>::deserialize(d)?;
    let place = |(key, desc): (String, Descriptor)| Ok((key.parse().map_err(serde::de::Error::custom)?, desc));
    pairs.into_iter().map(place).collect()
}

/// Parses and verifies config.json. The error is a sentence without the file's name.
pub fn parse(json: &[u8]) -> Result<PackedConfig, String> {
    // The version first: a later one may look different altogether, and the error should say so.
    #[derive(Deserialize)]
    struct Head {
        format: String,
        version: u32,
    }
    let head: Head = crate::json::parse(json)?;
    if head.format != FORMAT {
        return Err(format!("format is '{}', not '{FORMAT}'", head.format));
    }
    if head.version == 0 || head.version > VERSION {
        return Err(format!("version {} of the packed format; this program reads up to {VERSION}", head.version));
    }
    let config: PackedConfig = crate::json::parse(json)?;
    config.spec.check().map_err(|e| format!("spec: {e}"))?;
    for file in &config.files {
        plain_name(file)?;
    }
    let places = config.spec.places();
    for place in &places {
        match (config.weights.get(place), config.spec.shape(place)) {
            (None, _) => return Err(format!("weights lack {place}")),
            (Some(d), Some((rows, cols))) if !fits(place, (d.rows, d.cols), (rows, cols)) => {
                return Err(format!(
                    "{place} is stored as [{}, {}], the network wants [{rows}, {cols}]",
                    d.rows, d.cols
                ));
            }
            _ => {}
        }
    }
    if config.weights.len() != places.len() {
        let extra = config.weights.keys().find(|p| config.spec.shape(p).is_none());
        return Err(format!(
            "weights have {}, which the network lacks",
            extra.map_or("a place".into(), Place::to_string)
        ));
    }
    Ok(config)
}

/// Whether a matrix of shape `have` serves as the tensor of a place: learned positions may have spare rows.
pub(crate) fn fits(place: &Place, have: (usize, usize), want: (usize, usize)) -> bool {
    have == want || (place.role == lacuna_spec::Role::Positions && have.1 == want.1 && have.0 > want.0)
}
