//! The knapsack: a level for each choice so that the sum of costs is least within a budget of bytes.
//!
//! Costs of choices add up and bytes do, so the assignments of least cost for each number of bytes on the lower hull are
//! found one after the other: from the cheapest level of every choice on, always the step that costs least for each byte
//! it saves. What a budget leaves over is filled with the steps back that still fit.

/// A level: what it takes of the budget, and what it costs (nats, as foretold).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Item {
    /// Bytes, or whatever the budget bounds.
    pub takes: u64,
    /// Cost, not negative.
    pub cost: f64,
}

/// The levels of one choice on its lower hull, by falling bytes and rising cost: indices.
fn hull(levels: &[Item]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..levels.len()).filter(|&i| levels[i].cost.is_finite()).collect();
    order.sort_by(|&a, &b| {
        let by_cost = levels[a].cost.total_cmp(&levels[b].cost);
        by_cost.then(levels[a].takes.cmp(&levels[b].takes)).then(a.cmp(&b))
    });
    let mut out: Vec<usize> = Vec::new();
    for i in order {
        if out.last().is_some_and(|&l| levels[i].takes >= levels[l].takes) {
            continue;
        }
        // A corner that lies above the line past it is none.
        while let [.., a, b] = out[..] {
            let (a, b, c) = (levels[a], levels[b], levels[i]);
            if price(a, b) < price(a, c) {
                break;
            }
            out.pop();
        }
        out.push(i);
    }
    out
}

/// Cost for each byte saved from `a` to the smaller `b`.
fn price(a: Item, b: Item) -> f64 {
    (b.cost - a.cost) / (a.takes - b.takes) as f64
}

/// Assignments of least cost, by falling bytes: the first has every choice at its cheapest level. `choices` have a level
/// of finite cost each.
pub fn chain(choices: &[Vec<Item>]) -> Vec<Vec<usize>> {
    let mut steps: Vec<(f64, usize, usize)> = Vec::new();
    let mut now = Vec::with_capacity(choices.len());
    for (i, levels) in choices.iter().enumerate() {
        let hull = hull(levels);
        now.push(hull.first().copied().unwrap_or(0));
        steps.extend(hull.windows(2).map(|w| (price(levels[w[0]], levels[w[1]]), i, w[1])));
    }
    // Prices of one choice rise along its hull, so that its steps stay in their order.
    steps.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let mut out = vec![now.clone()];
    for (_, i, level) in steps {
        now[i] = level;
        out.push(now.clone());
    }
    out
}

/// Bytes and cost of an assignment.
pub fn sum(choices: &[Vec<Item>], assignment: &[usize]) -> (u64, f64) {
    let all = choices.iter().zip(assignment).map(|(c, &l)| c[l]);
    all.fold((0, 0.0), |(bytes, cost), i| (bytes + i.takes, cost + i.cost))
}

/// The assignment of least cost within `budget` bytes that is found so; `None` where not even the smallest fits.
pub fn within(choices: &[Vec<Item>], budget: u64) -> Option<Vec<usize>> {
    let chain = chain(choices);
    let mut found = chain.into_iter().find(|a| sum(choices, a).0 <= budget).or_else(|| {
        // Levels off the hull may be smaller still.
        let smallest = |c: &Vec<Item>| (0..c.len()).min_by_key(|&l| c[l].takes).unwrap_or(0);
        let all: Vec<usize> = choices.iter().map(smallest).collect();
        (sum(choices, &all).0 <= budget).then_some(all)
    })?;
    // What is left over: the step back that saves most cost, again and again.
    loop {
        let left = budget - sum(choices, &found).0;
        let mut best: Option<(f64, usize, usize)> = None;
        for (i, levels) in choices.iter().enumerate() {
            let here = levels[found[i]];
            for (l, item) in levels.iter().enumerate() {
                let gain = here.cost - item.cost;
                if gain > 0.0 && item.takes <= here.takes + left && best.is_none_or(|b| gain > b.0) {
                    best = Some((gain, i, l));
                }
            }
        }
        match best {
            Some((_, i, l)) => found[i] = l,
            None => return Some(found),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::Rng;

    fn random(choices: usize, levels: usize, seed: u64) -> Vec<Vec<Item>> {
        let mut rng = Rng::new(seed);
        let one = |rng: &mut Rng| Item { takes: 10 + rng.below(90) as u64, cost: f64::from(rng.f32()) };
        (0..choices).map(|_| (0..levels).map(|_| one(&mut rng)).collect()).collect()
    }

    fn every(choices: &[Vec<Item>]) -> Vec<Vec<usize>> {
        let mut all = vec![vec![]];
        for c in choices {
            all = all.iter().flat_map(|a| (0..c.len()).map(|l| [&a[..], &[l]].concat())).collect();
        }
        all
    }

    /// No assignment has fewer bytes and less cost than one of the chain, and a budget's answer is no worse than the
    /// chain's and within what the largest single step costs of the best there is.
    #[test]
    fn agrees_with_all_assignments() {
        for seed in 0..40 {
            let choices = random(5, 4, seed);
            let all: Vec<(u64, f64)> = every(&choices).iter().map(|a| sum(&choices, a)).collect();
            for a in chain(&choices) {
                let (bytes, cost) = sum(&choices, &a);
                assert!(!all.iter().any(|o| o.0 <= bytes && o.1 < cost - 1e-12), "seed {seed}: {a:?}");
            }
            for budget in [60, 150, 250, 400] {
                let best = all.iter().filter(|o| o.0 <= budget).map(|o| o.1).min_by(f64::total_cmp);
                let found = within(&choices, budget);
                assert_eq!(found.is_some(), best.is_some(), "seed {seed}, {budget}");
                let (Some(found), Some(best)) = (found, best) else { continue };
                let (bytes, cost) = sum(&choices, &found);
                assert!(bytes <= budget && cost >= best - 1e-12 && cost <= best + 1.0, "{cost} for {best}");
            }
        }
    }

    #[test]
    fn ties_single_levels_and_levels_that_are_no_numbers() {
        let one = |takes, cost| Item { takes, cost };
        let choices = vec![vec![one(5, 0.0)], vec![one(9, 0.0), one(4, f64::NAN), one(7, 0.0), one(7, 0.0)]];
        assert_eq!(chain(&choices), [vec![0, 2]]);
        assert_eq!(within(&choices, 12), Some(vec![0, 2]));
        assert_eq!(within(&[], 0), Some(vec![]));
    }
}
