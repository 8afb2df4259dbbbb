//! From wished values (sparsities) to levels that a lab has, within a budget of bytes.

use lacuna_contract::{Assignment, Lab, MethodError};

/// The value of `target`'s level: the one that, taken everywhere, has most bytes within the budget.
pub(super) fn target(lab: &dyn Lab, budget_bytes: u64) -> Result<Assignment, MethodError> {
    super::uniform::uniform(lab, budget_bytes)
        .ok_or_else(|| MethodError::new(format!("no level taken everywhere stays within {budget_bytes} bytes")))
}

/// The levels whose values are nearest to the `wished` ones. While they are too many bytes, the slot that lies lowest
/// below its wish (the first of those alike) goes up a level; while bytes are left, the one that lies highest above it
/// and has room goes down. Bytes must not rise with values.
pub(super) fn nearest(lab: &dyn Lab, wished: &[f64], budget_bytes: u64) -> Result<Assignment, MethodError> {
    let slots = lab.slots().len();
    let mut order: Vec<Vec<usize>> = Vec::with_capacity(slots);
    for s in 0..slots {
        let levels = lab.levels(s);
        let mut rising: Vec<usize> = (0..levels.len()).collect();
        rising.sort_by(|&a, &b| levels[a].value.total_cmp(&levels[b].value));
        let bad = rising.windows(2).find(|p| levels[p[0]].bytes < levels[p[1]].bytes);
        if let Some(&[a, b]) = bad.map(|p| [p[0], p[1]]).as_ref() {
            return Err(MethodError::new(format!(
                "{}: {} bytes at {}, more than {} at {}; only a key whose bytes fall as it rises can be divided so, \
                 like sparsity",
                lab.slots()[s].name,
                levels[b].bytes,
                levels[b].value,
                levels[a].bytes,
                levels[a].value
            )));
        }
        if rising.is_empty() || wished.get(s).is_none_or(|w| !w.is_finite()) {
            return Err(MethodError::new(format!("{} has no levels, or no wish", lab.slots()[s].name)));
        }
        order.push(rising);
    }
    let level = |s: usize, rung: usize| &lab.levels(s)[order[s][rung]];
    let off = |s: usize, rung: usize| level(s, rung).value - wished[s];
    let near = |s: usize| {
        let all = 0..order[s].len();
        all.min_by(|&a, &b| off(s, a).abs().total_cmp(&off(s, b).abs())).unwrap_or(0)
    };
    let mut at: Vec<usize> = (0..slots).map(near).collect();
    let mut size: u64 = (0..slots).map(|s| level(s, at[s]).bytes).sum();
    while size > budget_bytes {
        let free = (0..slots).filter(|&s| at[s] + 1 < order[s].len());
        let Some(s) = free.min_by(|&a, &b| off(a, at[a]).total_cmp(&off(b, at[b]))) else {
            return Err(MethodError::new(format!("the fewest bytes are {size}, above the budget of {budget_bytes}")));
        };
        at[s] += 1;
        size = size - level(s, at[s] - 1).bytes + level(s, at[s]).bytes;
    }
    loop {
        let after = |s: usize| size - level(s, at[s]).bytes + level(s, at[s] - 1).bytes;
        let free = (0..slots).filter(|&s| at[s] > 0 && after(s) <= budget_bytes);
        // Of those alike the first: `max_by` would take the last.
        let Some(s) = free.rev().max_by(|&a, &b| off(a, at[a]).total_cmp(&off(b, at[b]))) else { break };
        (size, at[s]) = (after(s), at[s] - 1);
    }
    Ok(at.iter().enumerate().map(|(s, &rung)| order[s][rung]).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::search::testkit::Bench;

    #[test]
    fn wishes_are_met_where_bytes_allow_and_bytes_are_used_up() {
        for seed in 0..30 {
            let lab = Bench::new(5, 6, seed);
            let wished = [0.2, 4.6, 2.0, 3.4, 1.0];
            let free = nearest(&lab, &wished, lab.bytes(&[0, 5, 2, 3, 1])).expect("fits");
            assert_eq!(free, [0, 5, 2, 3, 1], "seed {seed}");
            for budget in [lab.bytes(&[5; 5]), lab.bytes(&[3; 5]), lab.bytes(&[0; 5])] {
                let got = nearest(&lab, &wished, budget).expect("fits");
                assert!(lab.bytes(&got) <= budget);
                for s in (0..5).filter(|&s| got[s] > 0) {
                    let mut more = got.clone();
                    more[s] -= 1;
                    assert!(lab.bytes(&more) > budget, "seed {seed}: bytes left over");
                }
            }
            assert!(nearest(&lab, &wished, lab.bytes(&[5; 5]) - 1).is_err());
            assert!(nearest(&lab, &[f64::NAN; 5], u64::MAX).is_err());
        }
    }
}
