//! Mixtures of experts as data.

use serde::{Deserialize, Serialize};

use crate::spec::SpecError;

/// A mixture of experts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Experts {
    /// How many there are.
    pub count: usize,
    /// How many a token uses.
    pub used: usize,
    /// Whether the weights of the used ones are made to sum to 1.
    pub normalize: bool,
    /// What a router's logits become.
    #[serde(default, skip_serializing_if = "RouterScore::is_softmax")]
    pub score: RouterScore,
    /// A bias behind the router.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub router_bias: bool,
    /// A number for each expert that is added to its score where experts are chosen, and is no part of its weight.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub correction: bool,
    /// Experts come from the best groups of them alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub groups: Option<ExpertGroups>,
    /// Factor on the weights (1 for most).
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub scale: f32,
    /// An FFN beside the experts that every token goes through.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shared: Option<SharedExpert>,
}

/// One expert, plainly chosen: for the fields that a mapping does not name.
impl Default for Experts {
    fn default() -> Experts {
        Experts {
            count: 1,
            used: 1,
            normalize: false,
            score: RouterScore::Softmax,
            router_bias: false,
            correction: false,
            groups: None,
            scale: 1.0,
            shared: None,
        }
    }
}

/// What a router's logits become before experts are chosen and weighed by it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RouterScore {
    /// The softmax over all experts.
    #[default]
    Softmax,
    /// `1 / (1 + e^-x)` of each.
    Sigmoid,
}

impl RouterScore {
    fn is_softmax(&self) -> bool {
        *self == RouterScore::Softmax
    }
}

/// Groups of experts: `count` runs of equal length, of which a token chooses from `used`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpertGroups {
    /// How many there are.
    pub count: usize,
    /// How many a token may choose from.
    pub used: usize,
    /// Of how many of its best experts a group's scores are summed, corrections included (DeepSeek-V2: 1, V3: 2).
    pub by: usize,
}

/// The expert of every token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SharedExpert {
    /// Its inner width.
    pub width: usize,
    /// Whether its output is multiplied by the sigmoid of a number that the token gives.
    pub gate: bool,
}

fn one() -> f32 {
    1.0
}

fn is_one(x: &f32) -> bool {
    *x == 1.0
}

impl Experts {
    /// What layer `l` says of its experts at odds with itself.
    pub(crate) fn check(&self, l: usize) -> Result<(), SpecError> {
        let fail = |what: String| Err(SpecError { what: format!("layer {l}: {what}") });
        if self.count == 0 || self.count > 65536 || self.used == 0 || self.used > self.count {
            return fail(format!("{} of {} experts", self.used, self.count));
        }
        if !(self.scale.is_finite() && self.scale > 0.0) {
            return fail(format!("weights of experts times {}", self.scale));
        }
        if let Some(g) = self.groups {
            if g.count == 0 || g.used == 0 || g.used > g.count || !self.count.is_multiple_of(g.count) {
                return fail(format!("{} of {} groups of {} experts", g.used, g.count, self.count));
            }
            let each = self.count / g.count;
            if g.by == 0 || g.by > each {
                return fail(format!("groups of {each} experts are compared by their best {}", g.by));
            }
            if self.used > g.used * each {
                return fail(format!("{} experts from {} groups of {each}", self.used, g.used));
            }
        }
        match self.shared {
            Some(s) if s.width == 0 || s.width > crate::spec::MAX_DIM => {
                fail(format!("the shared expert's width is {}", s.width))
            }
            _ => Ok(()),
        }
    }
}
