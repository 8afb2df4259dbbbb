//! What a compression came to, as tables and in words.

use lacuna_base::units::show_bytes;
use lacuna_eval::Table;
use lacuna_judge::{Measured, TOKEN_FREQUENCIES};

use crate::across;
use crate::compress::{Done, SOURCE_IS_COARSE, TIMED_AS, foretold, source_is_coarse, timed};

/// The comparison as a table.
pub fn table(d: &Done) -> Table {
    let mut t = Table::new(["", "size", "bits/weight", "perplexity", "KL", "decode tok/s", "verdict"]);
    let mut row = |m: &Measured, why: &str| {
        t.row([
            m.name.clone(),
            show_bytes(m.bytes),
            format!("{:.2}", d.bits(m.bytes)),
            if m.ppl < 1e5 { format!("{:.2}", m.ppl) } else { format!("{:.2e}", m.ppl) },
            m.kl.map_or_else(String::new, |kl| format!("{kl:.4}")),
            m.speed.map_or_else(String::new, |s| format!("{:.1} ±{:.0}%", s.median, 50.0 * s.spread)),
            why.to_owned(),
        ]);
    };
    if let (Some(m), Some(v)) = (&d.measured, &d.verdict) {
        row(m, if v.pays { "pays" } else { "does not pay" });
        for a in &v.against {
            row(&a.baseline, &a.why);
        }
    }
    t
}

/// Quality beside the source, a row for the held-out text and one for each text of another domain.
pub fn quality(d: &Done) -> Table {
    let mut t = Table::new(["text", "perplexity", "source", "KL", "99 of 100 below", "another first choice"]);
    let held_out = d.judged.iter().map(|j| ("held-out", j));
    for (name, j) in held_out.chain(d.domains.iter().map(|(name, j)| (name.as_str(), j))) {
        let Some(x) = &j.against else { continue };
        t.row([
            name.to_owned(),
            format!("{:.3}", j.ppl),
            format!("{:.3}", x.ppl_dense),
            format!("{:.4}", x.kl_mean),
            format!("{:.3}", x.kl_p99),
            format!("{:.1}%", 100.0 * (1.0 - x.top1_agree)),
        ]);
    }
    t
}

/// What to take where a result does not pay.
pub fn take(instead: &str) -> String {
    if instead == TOKEN_FREQUENCIES {
        // That is no model: nobody is to take it.
        return "it predicts no better than a table of how often each token comes, which is smaller: the model is ruined, \
                leave out less."
            .to_owned();
    }
    format!("take {instead} instead.")
}

/// The result in words.
pub fn words(d: &Done) -> String {
    let mut out = format!(
        "{}: {} -> {} ({:.2} bits a weight), {:.0} s\n",
        d.outcomes.path.display(),
        show_bytes(d.source_bytes),
        show_bytes(d.outcomes.bytes),
        d.bits(d.outcomes.bytes),
        d.seconds
    );
    if d.judged.is_some() || d.across.is_some() {
        out.extend(d.across.as_ref().map(across::words));
        if let Some(x) = d.judged.as_ref().and_then(|j| j.against.as_ref()) {
            out += &format!(
                "held-out perplexity {:.3} (dense {:.3}), KL {:.4} nats a token, same first choice {:.1}%\n\n",
                d.judged.as_ref().map_or(f64::NAN, |j| j.ppl),
                x.ppl_dense,
                x.kl_mean,
                100.0 * x.top1_agree
            );
        }
        if !d.domains.is_empty() {
            out += &format!("{}\n", quality(d).text());
        }
        out += &table(d).text();
        if timed(d) {
            out += &format!("{TIMED_AS}\n");
        }
        if let Some((tok_s, s)) = foretold(d) {
            out += &format!(
                "Foretold by the plan, at the {:.0} GB/s that plain 4-bit products read between those runs: {tok_s:.1} \
                 tok/s, {:.0}% {} than what came.\n",
                s.pace / 1e9,
                100.0 * (tok_s / s.median - 1.0).abs(),
                if tok_s < s.median { "less" } else { "more" }
            );
        }
    }
    if let Some(v) = &d.verdict {
        let beaten_by = v.against.iter().filter(|a| a.competes && !a.beaten).map(|a| &a.baseline);
        let instead = beaten_by.min_by_key(|b| b.bytes).map_or("the source", |b| b.name.as_str());
        out += &if v.pays {
            "\nIt pays: smaller or faster than every baseline that is as good.\n".to_owned()
        } else {
            format!("\nIt does not pay: {}\n", take(instead))
        };
        if source_is_coarse(d) {
            out += &format!("{SOURCE_IS_COARSE}\n");
        }
    }
    out
}
