//! The HTML report of a compression.

use std::path::Path;

use anyhow::Context;
use lacuna_eval::html::{Part, Point, Report};

use crate::compress::{Done, TIMED_AS, source_is_coarse, table, timed};

/// Writes the report; `samples` are (who, prompt, what followed).
pub fn write(
    path: &Path,
    model: &str,
    recipe: &str,
    d: &Done,
    samples: &[(String, String, String)],
) -> anyhow::Result<()> {
    let mut parts = vec![Part::Text(format!(
        "{model}, compressed by the recipe {recipe} in {:.0} s: {:.1} MB became {:.1} MB, {:.2} bits a weight.",
        d.seconds,
        d.source_bytes as f64 / 1e6,
        d.outcomes.bytes as f64 / 1e6,
        8.0 * d.outcomes.bytes as f64 / d.parameters.max(1) as f64
    ))];
    if let Some(v) = &d.verdict {
        parts.push(Part::Heading("Does it pay?".into()));
        parts.push(Part::Text(if v.pays {
            "Yes: against every baseline that is as good, it is smaller or faster.".into()
        } else {
            "No: at least one baseline that is as good is not beaten.".into()
        }));
        if source_is_coarse(d) {
            parts.push(Part::Text(
                "The source itself has under 9 bits a weight: comparisons with low-bit rounding on it are weak evidence.".into(),
            ));
        }
        parts.push(Part::Table(table(d)));
        if timed(d) {
            parts.push(Part::Text(TIMED_AS.into()));
        }
        let mut points: Vec<Point> = v
            .against
            .iter()
            .map(|a| &a.baseline)
            .filter(|b| b.name != "token frequencies")
            .map(|b| Point { label: b.name.clone(), bytes: b.bytes, ppl: b.ppl, baseline: true })
            .collect();
        if let Some(m) = &d.measured {
            points.push(Point { label: m.name.clone(), bytes: m.bytes, ppl: m.ppl, baseline: false });
        }
        parts.push(Part::Heading("Size against perplexity".into()));
        parts.push(Part::Scatter(points));
    }
    parts.push(Part::Heading("Error by layer".into()));
    parts.push(Part::Layers { y: "relative output error".into(), series: errors(d) });
    if !samples.is_empty() {
        parts.push(Part::Heading("The same prompt".into()));
        parts.push(Part::Samples(samples.to_vec()));
    }
    let html = Report { title: format!("Lacuna: {model} by {recipe}"), parts }.html();
    lacuna_base::unfinished::write(path, html.as_bytes())
        .with_context(|| format!("{}: cannot be written", path.display()))
}

/// By role, the error in each layer.
fn errors(d: &Done) -> Vec<(String, Vec<f64>)> {
    let layers = d.outcomes.spec.layers.len();
    let mut out: Vec<(String, Vec<f64>)> = Vec::new();
    for t in &d.outcomes.tensors {
        let (Some(l), Some(e)) = (t.place.layer, t.error) else { continue };
        let name = t.place.role.name();
        let i = out.iter().position(|(n, _)| n == name).unwrap_or_else(|| {
            out.push((name.to_owned(), vec![0.0; layers]));
            out.len() - 1
        });
        // Experts of one layer: the worst of them.
        let slot = &mut out[i].1[l as usize];
        *slot = slot.max(e);
    }
    out
}
