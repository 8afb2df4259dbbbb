//! Races: offspring of the best assignment so far, measured on few windows; those that lead go on to more.

use lacuna_base::Rng;

use super::knapsack::{Item, sum};
use super::{Assignment, Measure, Point, Run, Strategy, mean, paired_error};

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
                (0..items[i].len()).filter(|&l| items[i][l].takes < items[i][a[i]].takes).collect();
            if !smaller.is_empty() {
                a[i] = smaller[rng.below(smaller.len())];
            }
        }
        // What is left is given back where one step up fits.
        for _ in 0..a.len() {
            let (bytes, _) = sum(items, &a);
            let i = rng.below(a.len());
            let up = (0..items[i].len())
                .filter(|&l| items[i][l].takes > items[i][a[i]].takes)
                .filter(|&l| bytes - items[i][a[i]].takes + items[i][l].takes <= budget)
                .max_by_key(|&l| items[i][l].takes);
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

/// How many of the best are measured again on fresh windows.
const AGAIN: usize = 5;

/// The best that generations of offspring of `start` come to within `most` of a whole model, `start` among them,
/// measured on all windows of the last look. Drawn by lot, every one is an offspring of none.
pub(super) fn race<M: Measure>(
    run: &mut Run<'_, M>,
    items: &[Vec<Item>],
    start: Point,
    most: u64,
) -> Result<Vec<Point>, M::Error> {
    let mut rng = Rng::new(run.effort.seed);
    let budget = most.saturating_sub(run.meter.rest);
    let [first, second, last] = run.effort.windows;
    let by_lot = run.effort.strategy == Strategy::Random;
    let mut parent = start;
    run.more(&mut parent, second)?;
    let mut best = vec![parent.clone()];
    while run.left() > OFFSPRING + SECOND + AGAIN {
        let mut young: Vec<Point> = Vec::new();
        for _ in 0..OFFSPRING {
            let from = if by_lot { lot(items, budget, &mut rng) } else { Some(parent.assignment.clone()) };
            let child = from.and_then(|p| offspring(items, &p, budget, &mut rng));
            if let Some(a) = child.filter(|a| young.iter().chain(&best).all(|p| p.assignment != *a)) {
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
        best.extend(young);
        best.sort_by(|a, b| a.mean().total_cmp(&b.mean()));
        best.truncate(AGAIN);
        parent = best[0].clone();
    }
    for p in &mut best {
        run.more(p, last)?;
    }
    Ok(best)
}

/// Any level of every choice, within the budget.
fn lot(items: &[Vec<Item>], budget: u64, rng: &mut Rng) -> Option<Assignment> {
    let mut a: Assignment = items.iter().map(|levels| rng.below(levels.len().max(1))).collect();
    for _ in 0..64 * a.len() {
        if sum(items, &a).0 <= budget {
            return Some(a);
        }
        let i = rng.below(a.len());
        let smaller: Vec<usize> = (0..items[i].len()).filter(|&l| items[i][l].takes < items[i][a[i]].takes).collect();
        if !smaller.is_empty() {
            a[i] = smaller[rng.below(smaller.len())];
        }
    }
    None
}

/// Who leads on the windows from `fresh` on: of those within two standard errors of the best, the smallest.
pub(super) fn leader(best: &[Point], fresh: usize) -> Option<&Point> {
    let of = |p: &Point| mean(&p.kl[fresh..]);
    let first = best.iter().min_by(|a, b| of(a).total_cmp(&of(b)))?;
    let tied = |p: &&Point| of(p) - of(first) <= 2.0 * paired_error(&p.kl[fresh..], &first.kl[fresh..]);
    best.iter().filter(|p| p.assignment == first.assignment || tied(p)).min_by_key(|p| p.takes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offspring_stay_within_the_budget_and_the_seed_tells_them() {
        let items: Vec<Vec<Item>> = (0..9)
            .map(|i| (0..4).map(|l| Item { takes: 10 * (l + 1) + i, cost: 1.0 / (l + 1) as f64 }).collect())
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
        let fixed = vec![vec![Item { takes: 1, cost: 0.0 }]; 3];
        assert_eq!(offspring(&fixed, &[0; 3], 3, &mut Rng::new(1)), None);
    }
}
