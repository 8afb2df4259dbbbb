//! Races: offspring of the best assignment so far, measured on few windows; those that lead go on to more.

use lacuna_base::Rng;

use super::knapsack::{Item, sum};
use super::{Assignment, Measure, Point, Run};

/// Offspring of a generation, and how many of them get a second look.
const OFFSPRING: usize = 8;
const SECOND: usize = 3;

/// An offspring: some choices go a level down and others up, within the budget. `None` where no change was found.
fn offspring(items: &[Vec<Item>], parent: &[usize], budget: u64, rng: &mut Rng) -> Option<Assignment> {
    for _ in 0..64 {
        let mut a = parent.to_vec();
        for _ in 0..1 + rng.below(3) {
            let i = rng.below(a.len().max(1));
            if items[i].len() > 1 {
                a[i] = rng.below(items[i].len());
            }
        }
        // Whatever is over the budget is paid for by choices drawn at random.
        for _ in 0..4 * a.len() {
            if sum(items, &a).0 <= budget {
                break;
            }
            let i = rng.below(a.len());
            let smaller: Vec<usize> =
                (0..items[i].len()).filter(|&l| items[i][l].bytes < items[i][a[i]].bytes).collect();
            if !smaller.is_empty() {
                a[i] = smaller[rng.below(smaller.len())];
            }
        }
        // What is left is given back where one step up fits.
        for _ in 0..a.len() {
            let (bytes, _) = sum(items, &a);
            let i = rng.below(a.len());
            let up = (0..items[i].len())
                .filter(|&l| items[i][l].bytes > items[i][a[i]].bytes)
                .filter(|&l| bytes - items[i][a[i]].bytes + items[i][l].bytes <= budget)
                .max_by_key(|&l| items[i][l].bytes);
            if let Some(l) = up {
                a[i] = l;
            }
        }
        if a != parent && sum(items, &a).0 <= budget {
            return Some(a);
        }
    }
    None
}

/// The best that generations of offspring of `start` come to within `bytes` of a whole model, measured on all windows of
/// the last look.
pub(super) fn race<M: Measure>(
    run: &mut Run<'_, M>,
    items: &[Vec<Item>],
    start: Point,
    bytes: u64,
) -> Result<Point, M::Error> {
    let mut rng = Rng::new(run.effort.seed);
    let budget = bytes.saturating_sub(run.levels.rest_bytes);
    let [first, second, last] = run.effort.windows;
    let mut parent = start;
    run.more(&mut parent, second)?;
    while run.left() > OFFSPRING + SECOND {
        let mut young = Vec::new();
        for _ in 0..OFFSPRING {
            if let Some(a) = offspring(items, &parent.assignment, budget, &mut rng) {
                young.push(run.point(&a, first, "race")?);
            }
        }
        if young.is_empty() {
            break;
        }
        young.sort_by(|a, b| a.mean().total_cmp(&b.mean()));
        young.truncate(SECOND);
        for p in &mut young {
            run.more(p, second)?;
        }
        let best = young.into_iter().min_by(|a, b| a.mean().total_cmp(&b.mean()));
        if let Some(best) = best
            && best.mean() < parent.mean()
        {
            parent = best;
        }
    }
    run.more(&mut parent, last)?;
    Ok(parent)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offspring_stay_within_the_budget_and_the_seed_tells_them() {
        let items: Vec<Vec<Item>> = (0..9)
            .map(|i| (0..4).map(|l| Item { bytes: 10 * (l + 1) + i, cost: 1.0 / (l + 1) as f64 }).collect())
            .collect();
        let parent = vec![1; 9];
        let budget = sum(&items, &parent).0;
        let draw = |seed| {
            let mut rng = Rng::new(seed);
            (0..20).map(|_| offspring(&items, &parent, budget, &mut rng).expect("one")).collect::<Vec<_>>()
        };
        let all = draw(3);
        assert!(all.iter().all(|a| *a != parent && sum(&items, a).0 <= budget));
        assert_eq!(all, draw(3));
        assert_ne!(all, draw(4));
        let fixed = vec![vec![Item { bytes: 1, cost: 0.0 }]; 3];
        assert_eq!(offspring(&fixed, &[0; 3], 3, &mut Rng::new(1)), None);
    }
}
