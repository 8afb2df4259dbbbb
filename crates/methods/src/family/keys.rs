//! Values that recipe keys take: each says in its error what it wants.

use lacuna_contract::Sparsity;
use lacuna_format::gguf::{self, WRITTEN};
use lacuna_format::{Float, GgufType};
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize};

/// A fraction from 0 to 1.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Fraction(pub f64);

impl<'de> Deserialize<'de> for Fraction {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Fraction, D::Error> {
        match f64::deserialize(d) {
            Ok(x) if (0.0..=1.0).contains(&x) => Ok(Fraction(x)),
            _ => Err(D::Error::custom("write a fraction from 0 to 1")),
        }
    }
}

/// A whole number from `LOW` to `HIGH`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Whole<const LOW: usize, const HIGH: usize>(pub usize);

impl<'de, const LOW: usize, const HIGH: usize> Deserialize<'de> for Whole<LOW, HIGH> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        match usize::deserialize(d) {
            Ok(n) if (LOW..=HIGH).contains(&n) => Ok(Whole(n)),
            _ => Err(D::Error::custom(format!("write a whole number from {LOW} to {HIGH}"))),
        }
    }
}

/// Which zeros: "unstructured", "2:4", "block:8x1".
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Pattern(pub Sparsity);

impl<'de> Deserialize<'de> for Pattern {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Pattern, D::Error> {
        String::deserialize(d)?.parse().map(Pattern).map_err(D::Error::custom)
    }
}

/// A GGUF block type: "q4_k", or as llama.cpp writes it, "Q4_K".
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct BlockType(pub GgufType);

impl<'de> Deserialize<'de> for BlockType {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<BlockType, D::Error> {
        let said = String::deserialize(d)?.to_lowercase();
        let named = |t: &GgufType| format!("{t:?}").to_lowercase();
        WRITTEN.into_iter().find(|t| named(t) == said).map(BlockType).ok_or_else(|| {
            let all: Vec<String> = WRITTEN.iter().map(|t| format!("\"{}\"", named(t))).collect();
            let read = gguf::ALL.iter().any(|t| named(t) == said);
            let why = if read { format!("{said} is read, not written; ") } else { String::new() };
            D::Error::custom(format!("{why}write one of {}", all.join(", ")))
        })
    }
}

/// How scales are written: "f32" or "f16".
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Scale(pub Float);

impl<'de> Deserialize<'de> for Scale {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Scale, D::Error> {
        match String::deserialize(d)?.as_str() {
            "f32" => Ok(Scale(Float::F32)),
            "f16" => Ok(Scale(Float::F16)),
            _ => Err(D::Error::custom("write \"f32\" or \"f16\"")),
        }
    }
}
