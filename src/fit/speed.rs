//! A budget of time: what every level takes of a token, from this machine's cost table.

use std::collections::HashMap;
use std::sync::Arc;

use lacuna_compress::{Levels, Recipe, forms, uses};
use lacuna_contract::Registry;
use lacuna_format::{Stored, Weights};
use lacuna_judge::fit::{Meter, smallest};
use lacuna_judge::{CostTable, Footprint, Products};

use crate::cli::Global;
use crate::common::{self, Model};
use crate::compress::{LOADED, products};

/// The meter of a token's products, in bytes that plain 4-bit products read meanwhile, and how many of those there are
/// time for at so many tokens a second. What tokens take beside their products is in the rest, where the source is
/// small enough to be loaded for it.
pub fn meter(g: &Global, source: &Model, levels: &Levels<'_>, tok_s: f64) -> anyhow::Result<(Meter, u64)> {
    let spec = source.checkpoint.spec();
    let mut table = CostTable::open(&common::cache_dir(g)?);
    let as_it_came = forms(&source.checkpoint, &Recipe::parse("version = 1", &Registry::default(), &[])?)?;
    let before = products(&as_it_came);
    let (most, bytes) = (levels.bytes(&vec![0; levels.choices.len()]), Meter::bytes(levels));
    let least = levels.bytes(&smallest(&bytes));
    // The result lies somewhere between.
    let footprint = Footprint::of((most + least) / 2);
    // One matrix of each form, by its level and shape.
    let mut samples: HashMap<(usize, usize), Arc<Stored>> = HashMap::new();
    let mut names: HashMap<String, (usize, usize)> = HashMap::new();
    let mut form = Vec::new();
    for (i, c) in levels.choices.iter().enumerate() {
        let mut mine = Vec::new();
        for (l, level) in c.levels.iter().enumerate() {
            let name = format!("{:?} {:?} {}", spec.shape(&c.place), level.recipe, level.bytes);
            let at = *names.entry(name).or_insert((i, l));
            if at == (i, l) {
                samples.insert(at, levels.stored(i, l)?);
            }
            mine.push(at);
        }
        form.push(mine);
    }
    let all: Vec<(&Stored, f64)> = samples.values().map(|s| (s.as_ref(), 1.0)).collect();
    table.learn(&[&Products { forms: all, footprint }, &before])?;
    let mut takes = Vec::new();
    for (c, at) in levels.choices.iter().zip(&form) {
        let used = uses(spec, &c.place).unwrap_or(0.0);
        let mut mine = Vec::new();
        for at in at {
            let forms = vec![(samples[at].as_ref(), used)];
            mine.push(table.products(&Products { forms, footprint })?.round() as u64);
        }
        takes.push(mine);
    }
    let read = table.products(&before)?;
    let beside = if source.checkpoint.source_bytes() <= LOADED {
        table.beside(&source.checkpoint, before.footprint, read)?
    } else {
        common::say("note: what tokens take beside products is not counted: the source is too large to be timed");
        0.0
    };
    let pace = table.pace(footprint);
    table.save();
    // What does not change, as the source has it.
    let changing: f64 = takes.iter().map(|c| c[0] as f64).sum();
    let rest = (read - changing).max(0.0) + beside * pace;
    let time = pace / tok_s;
    if rest >= time {
        anyhow::bail!(
            "--min-decode-tok-s {tok_s}: what no level changes takes {:.2} ms of a token here, which allow {:.0} tok/s at \
             the most",
            1e3 * rest / pace,
            pace / rest
        );
    }
    common::say(format!(
        "a token may take {:.2} ms, {:.2} of them outside the matrices that can change, while plain 4-bit products read \
         {:.0} GB/s as now",
        1e3 / tok_s,
        1e3 * rest / pace,
        pace / 1e9
    ));
    Ok((Meter { rest: rest as u64, levels: takes }, time as u64))
}
