//! What a matrix may become, by the program that is to read the result.

use lacuna_spec::{Place, Role, Spec};
use serde_json::Value as Json;
use toml::{Table, Value};

use crate::cli::{Effort, Reader};

/// A level: a name, and the steps that lead to it, without targets.
pub struct Candidate {
    /// What the front calls it.
    pub name: String,
    /// Keys of the step on matrices whose inputs are known.
    solver: Table,
    /// Keys of the step on an embedding that is no head.
    plain: Table,
    /// Whether it is for the embedding and the head alone, or for the blocks alone; `None`: for all.
    ends: Option<bool>,
}

/// Roles that steps aim at outside the blocks.
fn ends(spec: &Spec) -> (Vec<String>, Vec<String>) {
    let (embed, head) = (Role::Embed.name().to_owned(), Role::Head.name().to_owned());
    if spec.tied { (vec![embed], Vec::new()) } else { (vec![head], vec![embed]) }
}

fn table(keys: &[(&str, Json)]) -> Table {
    let one = |(k, v): &(&str, Json)| Some(((*k).to_owned(), Value::try_from(v).ok()?));
    keys.iter().filter_map(one).collect()
}

impl Candidate {
    fn new(name: &str, solver: Table, plain: Table, ends: Option<bool>) -> Candidate {
        Candidate { name: name.into(), solver, plain, ends }
    }

    /// The recipe that makes everything so.
    pub fn recipe(&self, spec: &Spec, calibration: &Table) -> String {
        let (with_inputs, without) = ends(spec);
        let mut solved: Vec<String> = Vec::new();
        if self.ends != Some(true) {
            solved.extend(["attn.*", "mixer.*", "ffn.*"].map(str::to_owned));
        }
        let mut plain = Vec::new();
        if self.ends != Some(false) {
            solved.extend(with_inputs);
            plain = without;
        }
        let steps = [(&self.solver, solved, "solved"), (&self.plain, plain, "plain")];
        let steps =
            steps.into_iter().filter(|s| !s.1.is_empty()).map(|(keys, targets, name)| step(keys, name, targets));
        recipe(calibration, steps.collect())
    }

    /// The steps that bring just these places to this level.
    pub fn steps(&self, spec: &Spec, places: &[Place], targets: Vec<String>) -> Vec<Table> {
        let unread = |p: &Place| p.role == Role::Embed && !spec.tied;
        let (plain, solved): (Vec<_>, Vec<_>) =
            targets.into_iter().partition(|t| *t == Role::Embed.name() && places.iter().any(unread));
        let mut out = Vec::new();
        if !solved.is_empty() {
            out.push(step(&self.solver, &self.name, solved));
        }
        if !plain.is_empty() {
            out.push(step(&self.plain, &format!("{} of the embedding", self.name), plain));
        }
        out
    }
}

fn step(keys: &Table, name: &str, targets: Vec<String>) -> Table {
    let mut step = Table::new();
    step.insert("name".into(), Value::String(name.into()));
    step.extend(keys.clone());
    step.insert("targets".into(), Value::Array(targets.into_iter().map(Value::String).collect()));
    step
}

/// A recipe of steps.
pub fn recipe(calibration: &Table, steps: Vec<Table>) -> String {
    let mut root = Table::new();
    root.insert("version".into(), Value::Integer(1));
    root.insert("calibration".into(), Value::Table(calibration.clone()));
    root.insert("step".into(), Value::Array(steps.into_iter().map(Value::Table).collect()));
    root.to_string()
}

/// Grouped integers of the house: `bits`, columns that share a scale.
fn grouped(bits: u8, group: usize, symmetric: bool, solver: bool, ends: Option<bool>) -> Candidate {
    let keys = |method: &str| {
        table(&[
            ("method", method.into()),
            ("bits", bits.into()),
            ("group", group.into()),
            ("symmetric", symmetric.into()),
            ("scale", "f16".into()),
        ])
    };
    let name = format!("int{bits} g{group}{}", if symmetric { "" } else { " zero" });
    Candidate::new(&name, keys(if solver { "gptq" } else { "rtn" }), keys("rtn"), ends)
}

/// A GGUF block type.
fn blocks(kind: &str, solver: bool, ends: Option<bool>) -> Candidate {
    let keys = |method: &str| table(&[("method", method.into()), ("type", kind.into())]);
    Candidate::new(kind, keys(if solver { "gptq" } else { "rtn" }), keys("rtn"), ends)
}

/// Codes as they came, scales as integers.
fn recoded() -> Candidate {
    let keys = table(&[("method", "double-quantization".into()), ("bits", 8.into()), ("per", 32.into())]);
    Candidate::new("scales in 8 bits", keys.clone(), keys, Some(false))
}

/// The levels to choose from. A `coarse` source is itself rounded to few bits: its blocks' codes stay as they are.
pub fn candidates(reader: Reader, coarse: bool, effort: Effort, imatrix: bool) -> Vec<Candidate> {
    let mut all = usual(reader, coarse, effort);
    if imatrix {
        // Squares of inputs weigh errors; feeding errors back takes more than that.
        for c in all.iter_mut().filter(|c| c.solver.get("method").is_some_and(|m| m.as_str() == Some("gptq"))) {
            let blocks = c.solver.contains_key("type");
            c.solver.insert("method".into(), if blocks { "rtn" } else { "weighted-rtn" }.into());
            if blocks {
                c.solver.insert("importance".into(), true.into());
            }
        }
    }
    all
}

fn usual(reader: Reader, coarse: bool, effort: Effort) -> Vec<Candidate> {
    let solver = effort != Effort::Quick;
    let (body, ends) = (Some(false), Some(true));
    let block = |kinds: &[&str], ends| kinds.iter().map(|k| blocks(k, true, ends)).collect::<Vec<_>>();
    match (reader, coarse) {
        (Reader::Lacuna, true) => {
            let mut all = vec![recoded()];
            all.extend([6, 5, 4].map(|bits| grouped(bits, 32, true, solver, ends)));
            all
        }
        (Reader::Gguf, true) => block(&["q6_k", "q5_k", "q5_0", "iq4_nl"], ends),
        // Its readers take no rounded embeddings.
        (Reader::CompressedTensors, true) => Vec::new(),
        (Reader::Lacuna, false) => {
            let mut all = block(&["q6_k", "q5_k", "q4_k", "q3_k", "q2_k", "iq4_xs", "iq4_nl"], None);
            all.extend([8, 6, 5, 4].map(|bits| grouped(bits, 32, true, true, None)));
            all.extend([(3, 32), (3, 64), (2, 32), (2, 64)].map(|(bits, n)| grouped(bits, n, false, true, body)));
            all
        }
        (Reader::Gguf, false) => {
            block(&["q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "iq4_xs", "iq4_nl", "q4_0", "q3_k", "q2_k"], None)
        }
        (Reader::CompressedTensors, false) => {
            [8, 4].into_iter().map(|bits| grouped(bits, 128, true, true, body)).collect()
        }
    }
}

/// Targets of `places`, short where a role's matrices are all among them (`all` are those that can change).
pub fn targets(places: &[Place], all: &[Place]) -> Vec<String> {
    let mut out = Vec::new();
    for role in Role::ALL {
        let of = |list: &[Place]| list.iter().filter(|p| p.role == role).copied().collect::<Vec<_>>();
        let (mine, every) = (of(places), of(all));
        if mine.is_empty() {
            continue;
        }
        if mine.len() == every.len() {
            out.push(role.name().to_owned());
        } else {
            out.extend(mine.iter().map(Place::to_string));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_compress::Recipe;

    #[test]
    fn every_candidate_is_a_recipe() {
        let registry = lacuna_methods::registry();
        let tiny = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny/llama");
        let model = lacuna_checkpoint::open(&tiny).unwrap();
        use lacuna_format::Weights;
        for reader in [Reader::Lacuna, Reader::Gguf, Reader::CompressedTensors] {
            for (coarse, effort) in [(true, Effort::Quick), (false, Effort::Normal)] {
                let all = candidates(reader, coarse, effort, false);
                assert_eq!(all.is_empty(), coarse && reader == Reader::CompressedTensors);
                for c in all.into_iter().chain(candidates(reader, coarse, effort, true)) {
                    let text = c.recipe(model.spec(), &Table::new());
                    Recipe::parse(&text, &registry, &[]).unwrap_or_else(|e| panic!("{}: {e}\n{text}", c.name));
                }
            }
        }
    }

    #[test]
    fn targets_are_short_where_they_can_be() {
        let all: Vec<Place> = (0..3).flat_map(|l| [Place::layer(l, Role::Q), Place::layer(l, Role::Up)]).collect();
        let some: Vec<Place> = all.iter().copied().filter(|p| p.role == Role::Up || p.layer == Some(1)).collect();
        assert_eq!(targets(&some, &all), ["layers.1.attn.q", "ffn.up"]);
    }
}
