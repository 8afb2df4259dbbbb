//! The HTML report of a compression.

use std::path::Path;

use anyhow::Context;
use lacuna_base::units::show_bytes;
use lacuna_eval::html::{Answer, Element, Point, Report};
use lacuna_judge::{Measured, TOKEN_FREQUENCIES, Verdict};

use crate::compress::{Done, SOURCE_IS_COARSE, TIMED_AS, source_is_coarse, timed};
use crate::told::{self, quality, table};

/// Writes the report; `samples` are (who, prompt, what followed), `front` what a search measured: name, bytes, KL.
pub fn write(
    path: &Path,
    model: &str,
    recipe: &str,
    d: &Done,
    samples: &[(String, String, String)],
    front: &[(String, u64, f64)],
) -> anyhow::Result<()> {
    let mut parts = Vec::new();
    if let (Some(v), Some(m)) = (&d.verdict, &d.measured) {
        parts.push(Element::Answer(answer(d, v, m)));
        if source_is_coarse(d) {
            parts.push(Element::Text(SOURCE_IS_COARSE.into()));
        }
        parts.push(Element::Heading("Beside plain rounding".into()));
        parts.push(Element::Table(table(d)));
        if d.across.is_some() {
            parts.push(Element::Text(crate::across::NO_KL.into()));
        }
        if timed(d) {
            parts.push(Element::Text(TIMED_AS.into()));
        }
        let mut points: Vec<Point> = v
            .against
            .iter()
            .map(|a| &a.baseline)
            .filter(|b| b.name != TOKEN_FREQUENCIES)
            .map(|b| Point { label: b.name.clone(), bytes: b.bytes, ppl: b.ppl, baseline: true })
            .collect();
        points.push(Point { label: m.name.clone(), bytes: m.bytes, ppl: m.ppl, baseline: false });
        parts.push(Element::Heading("Size against perplexity".into()));
        parts.push(Element::Scatter(points));
    }
    if d.judged.is_some() {
        parts.push(Element::Heading("How far from the source".into()));
        parts.push(Element::Table(quality(d)));
    }
    if !front.is_empty() {
        parts.push(Element::Heading("The front of the search".into()));
        let mut t = lacuna_eval::Table::new(["", "size", "KL, nats a token"]);
        front.iter().for_each(|(name, bytes, kl)| {
            t.row([name.clone(), show_bytes(*bytes), format!("{kl:.4}")]);
        });
        parts.push(Element::Table(t));
    }
    if !samples.is_empty() {
        parts.push(Element::Heading("The same prompt".into()));
        parts.push(Element::Samples(samples.to_vec()));
    }
    let series = errors(d);
    if series.iter().any(|(_, v)| v.iter().any(|e| e.is_finite() && *e > 0.0)) {
        parts.push(Element::Heading("Error by layer".into()));
        parts.push(Element::Layers { y: "relative output error".into(), series });
    }
    let html = Report { title: format!("Lacuna: {model} by {recipe}"), parts }.html();
    lacuna_base::unfinished::write(path, html.as_bytes())
        .with_context(|| format!("{}: cannot be written", path.display()))
}

/// The report's first lines: whether it pays, and what became of size, loss and speed.
fn answer(d: &Done, v: &Verdict, m: &Measured) -> Answer {
    let before = |bytes: u64| format!("{} before", show_bytes(bytes));
    let mut figures = vec![
        ["size".into(), show_bytes(m.bytes), before(d.source_bytes)],
        ["bits a weight".into(), format!("{:.2}", d.bits(m.bytes)), format!("{:.2} before", d.bits(d.source_bytes))],
    ];
    if let Some(x) = d.judged.as_ref().and_then(|j| j.against.as_ref()) {
        figures.push(["perplexity".into(), format!("{:.2}", m.ppl), format!("{:.2} before", x.ppl_dense)]);
    }
    if let Some(x) = &d.across {
        let before = format!("{:.4} before", x.dense.nats_a_byte);
        figures.push(["nats a byte".into(), format!("{:.4}", x.model.nats_a_byte), before]);
    }
    if let Some(s) = m.speed {
        let source = v.against.iter().find(|a| a.baseline.name == lacuna_judge::SOURCE).and_then(|a| a.baseline.speed);
        let was = source.map_or_else(String::new, |s| format!("{:.0} before", s.median));
        figures.push(["tokens a second".into(), format!("{:.0}", s.median), was]);
    }
    let best = v.against.iter().find(|a| a.competes && !a.beaten);
    let (words, why) = match best {
        _ if v.pays => ("It pays", "Smaller or faster than every baseline that is as good.".to_owned()),
        Some(a) => {
            let why = a.why.strip_prefix("not beaten: ").unwrap_or(&a.why);
            let said = match a.baseline.name.as_str() {
                TOKEN_FREQUENCIES => told::take(TOKEN_FREQUENCIES),
                name => format!("Take {name} instead: beside it this is {why}."),
            };
            ("It does not pay", said)
        }
        None => ("It does not pay", "Its loss is no number.".to_owned()),
    };
    Answer { yes: v.pays, words: words.into(), why, figures }
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
