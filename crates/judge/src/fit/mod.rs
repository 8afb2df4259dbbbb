//! `fit`: which level for each matrix? A database of levels is foretold by errors times measured slopes, solved as a
//! knapsack, measured along its front, and improved in races.
//!
//! Protocol. Three texts share no token: one gave the statistics, one is searched on, one judges in the end and is read
//! once. Trials are measured as KL(source || trial) on the text of the search, on few windows first and on more for
//! those that lead.

pub mod knapsack;
mod race;

use std::collections::{BTreeMap, BTreeSet};

use lacuna_compress::{AtLevel, Choice, Levels};
use lacuna_spec::Role;

use knapsack::Item;

/// A level for each choice.
pub type Assignment = Vec<usize>;

/// What is tried. All but races are what races have to beat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strategy {
    /// The knapsack's front, then offspring of its answer.
    Races,
    /// The knapsack's front alone.
    Knapsack,
    /// As many trials as races have, drawn by lot within the budget.
    Random,
    /// The same level everywhere.
    Uniform,
}

/// How the search goes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Effort {
    /// What is tried.
    pub strategy: Strategy,
    /// Most trials, each of them one assignment measured on one run of windows.
    pub trials: usize,
    /// Windows of a first look, of a second, and of the last.
    pub windows: [usize; 3],
    /// Bands of layers whose matrices of one role share a slope; 0: all matrices of the blocks share one.
    pub bands: usize,
    /// Points of the front that are measured.
    pub front: usize,
    /// Where randomness comes from.
    pub seed: u64,
}

/// What every level takes of that which the budget bounds: bytes, or time.
#[derive(Clone, Debug, PartialEq)]
pub struct Meter {
    /// What all takes that does not change.
    pub rest: u64,
    /// What a choice's levels take.
    pub levels: Vec<Vec<u64>>,
}

impl Meter {
    /// Bytes.
    pub fn bytes(levels: &Levels<'_>) -> Meter {
        let of = |c: &Choice| c.levels.iter().map(|l| l.bytes).collect();
        Meter { rest: levels.rest_bytes, levels: levels.choices.iter().map(of).collect() }
    }

    /// What a whole assignment takes.
    pub fn of(&self, assignment: &[usize]) -> u64 {
        self.rest + self.levels.iter().zip(assignment).map(|(c, &l)| c[l]).sum::<u64>()
    }
}

/// What is wanted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Budget {
    /// The most that the whole model may take, as the meter reads it.
    Within(u64),
    /// Most KL, nats a token.
    Loss(f64),
    /// Where the front bends.
    Knee,
}

/// One assignment, measured.
#[derive(Clone, Debug, PartialEq)]
pub struct Point {
    /// What it is.
    pub assignment: Assignment,
    /// Bytes of the whole model.
    pub bytes: u64,
    /// What it takes as the meter reads it.
    pub takes: u64,
    /// KL(source || it) on the text of the search, nats a token, window by window.
    pub kl: Vec<f64>,
    /// Who found it.
    pub by: &'static str,
}

impl Point {
    /// The mean over windows.
    pub fn mean(&self) -> f64 {
        mean(&self.kl)
    }
}

fn mean(x: &[f64]) -> f64 {
    x.iter().sum::<f64>() / x.len().max(1) as f64
}

/// The standard error of the mean difference of two losses, window by window, nats.
pub fn paired_error(a: &[f64], b: &[f64]) -> f64 {
    let d: Vec<f64> = a.iter().zip(b).map(|(x, y)| x - y).collect();
    let n = d.len() as f64;
    if n < 2.0 {
        return f64::INFINITY;
    }
    let mean = d.iter().sum::<f64>() / n;
    (d.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0) / n).sqrt()
}

/// What a search came to.
#[derive(Clone, Debug)]
pub struct Found {
    /// The assignment that is to be made.
    pub chosen: Point,
    /// The knapsack's own, where a race's was chosen or tried.
    pub knapsack: Point,
    /// Measured points of the front, by falling bytes.
    pub front: Vec<Point>,
    /// Nats that a unit of relative error costs, by group of matrices.
    pub slopes: Vec<(String, f64)>,
    /// Trials spent.
    pub trials: usize,
    /// What was decided, in words.
    pub notes: Vec<String>,
}

/// Measures an assignment on the first `n` windows of the search's text, from window `from` on: KL of each.
pub trait Measure {
    /// The error of a measurement.
    type Error;
    /// KL of the windows `from..from + n`, as far as the text has them.
    fn kl(&mut self, assignment: &[usize], from: usize, n: usize) -> Result<Vec<f64>, Self::Error>;
    /// Windows that there are.
    fn windows(&self) -> usize;
    /// Told of every trial.
    fn tell(&mut self, trial: usize, bytes: u64, kl: f64);
}

/// The group whose matrices share a slope.
fn group(choice: &Choice, layers: usize, bands: usize) -> String {
    let Some(layer) = choice.place.layer else { return choice.place.role.name().to_owned() };
    if bands == 0 {
        return "blocks".into();
    }
    let band = layer as usize * bands / layers.max(1);
    format!("{} in band {} of {bands}", choice.place.role.name(), band + 1)
}

/// Whether a choice stands outside the blocks.
pub fn is_end(choice: &Choice) -> bool {
    matches!(choice.place.role, Role::Embed | Role::Head)
}

/// A search at work.
pub(crate) struct Run<'a, M> {
    pub(crate) levels: &'a Levels<'a>,
    pub(crate) measure: &'a mut M,
    pub(crate) meter: &'a Meter,
    pub(crate) effort: Effort,
    pub(crate) spent: usize,
}

impl<M: Measure> Run<'_, M> {
    pub(crate) fn point(&mut self, a: &[usize], windows: usize, by: &'static str) -> Result<Point, M::Error> {
        let kl = self.measure.kl(a, 0, windows)?;
        self.spent += 1;
        let point = Point { assignment: a.to_vec(), bytes: self.levels.bytes(a), takes: self.meter.of(a), kl, by };
        self.measure.tell(self.spent, point.bytes, point.mean());
        Ok(point)
    }

    /// More windows for a point.
    pub(crate) fn more(&mut self, point: &mut Point, windows: usize) -> Result<(), M::Error> {
        let have = point.kl.len();
        if have < windows.min(self.measure.windows()) {
            let more = self.measure.kl(&point.assignment, have, windows - have)?;
            point.kl.extend(more);
            self.spent += 1;
            self.measure.tell(self.spent, point.bytes, point.mean());
        }
        Ok(())
    }

    fn left(&self) -> usize {
        self.effort.trials.saturating_sub(self.spent)
    }
}

/// The level whose relative error lies nearest the middle of those there are: where a slope is read.
fn middle(choice: &Choice) -> usize {
    let mut order: Vec<usize> = (0..choice.levels.len()).collect();
    order.sort_by(|&a, &b| choice.levels[a].error.total_cmp(&choice.levels[b].error));
    order[order.len() / 2]
}

/// Searches.
pub fn search<M: Measure>(
    levels: &Levels<'_>,
    measure: &mut M,
    meter: &Meter,
    budget: Budget,
    effort: Effort,
) -> Result<Found, M::Error> {
    let mut run = Run { levels, measure, meter, effort, spent: 0 };
    let [first, second, last] = effort.windows;
    let layers = levels.choices.iter().filter_map(|c| c.place.layer).max().map_or(0, |l| l as usize + 1);
    let mut groups: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for (i, c) in levels.choices.iter().enumerate() {
        groups.entry(group(c, layers, effort.bands)).or_default().push(i);
    }
    // What a unit of error costs: one trial a group, all of its matrices at a middle level and the others as they came.
    let source: Assignment = vec![0; levels.choices.len()];
    let mut items: Vec<Vec<Item>> = vec![Vec::new(); levels.choices.len()];
    let mut slopes = Vec::new();
    for (name, members) in &groups {
        let mut a = source.clone();
        members.iter().for_each(|&i| a[i] = middle(&levels.choices[i]));
        let error: f64 = members.iter().map(|&i| levels.choices[i].levels[a[i]].error).sum();
        let slope = if error > 0.0 { (run.point(&a, first, "slope")?.mean() / error).max(1e-9) } else { 1e-9 };
        slopes.push((name.clone(), slope));
        for &i in members {
            let of = |(l, &takes): (&AtLevel, &u64)| Item { takes, cost: slope * l.error };
            items[i] = levels.choices[i].levels.iter().zip(&meter.levels[i]).map(of).collect();
        }
    }
    let chain = match effort.strategy {
        Strategy::Uniform => uniform(levels, meter),
        _ => knapsack::chain(&items),
    };
    let mut front = Vec::new();
    let points = effort.front.min(run.left().saturating_sub(1)).clamp(1, chain.len());
    for at in evenly(&chain.iter().map(|a| meter.of(a)).collect::<Vec<u64>>(), points) {
        let untouched = |(c, &l): (&Choice, &usize)| c.levels[l].recipe.is_none();
        let all_as_it_came = levels.choices.iter().zip(&chain[at]).all(untouched);
        let point = if all_as_it_came {
            let (bytes, takes) = (levels.bytes(&chain[at]), meter.of(&chain[at]));
            let kl = vec![0.0; first.min(run.measure.windows())];
            Point { assignment: chain[at].clone(), bytes, takes, kl, by: "source" }
        } else {
            run.point(&chain[at], first, "knapsack")?
        };
        front.push(point);
    }
    let mut notes = Vec::new();
    // The best of the strategy that no trial is needed for.
    let within = |most: u64| match effort.strategy {
        Strategy::Uniform => chain.iter().find(|a| meter.of(a) <= most).cloned(),
        _ => knapsack::within(&items, most.checked_sub(meter.rest)?),
    };
    let target = match budget {
        Budget::Within(most) => most,
        Budget::Loss(most) => {
            // The smallest of the front that is good enough, and then between it and the next smaller one.
            let good = front.iter().rposition(|p| p.mean() <= most).unwrap_or(0);
            let mut takes = front[good].takes;
            if let Some(next) = front.get(good + 1) {
                let (mut high, mut low) = (takes, next.takes);
                while run.left() > 1 && high > low && high - low > high / 200 {
                    let mid = low + (high - low) / 2;
                    let Some(a) = within(mid) else { break };
                    let point = run.point(&a, first, "knapsack")?;
                    if point.takes >= high || point.takes <= low {
                        break;
                    }
                    if point.mean() <= most {
                        high = point.takes
                    } else {
                        low = point.takes
                    }
                    front.push(point);
                }
                takes = high;
            }
            takes
        }
        Budget::Knee => {
            let at = knee(&front);
            notes.push(format!("no budget was given: the front bends at {} bytes", front[at].bytes));
            front[at].takes
        }
    };
    let least = within(target).unwrap_or_else(|| smallest(meter));
    let mut knapsack = match front.iter().find(|p| p.assignment == least) {
        Some(p) => p.clone(),
        None => {
            let p = run.point(&least, first, "knapsack")?;
            front.push(p.clone());
            p
        }
    };
    let mut chosen = knapsack.clone();
    if effort.strategy == Strategy::Random && run.left() < 8 {
        notes.push("too few trials are left to draw by lot: the knapsack's answer stands; give more effort".into());
    }
    if run.left() >= 8 && matches!(effort.strategy, Strategy::Races | Strategy::Random) {
        let mut best = race::race(&mut run, &items, knapsack.clone(), target)?;
        run.more(&mut knapsack, last)?;
        best.retain(|p| p.assignment != knapsack.assignment);
        // Compared on windows that no choice so far has looked at, where the text has as many.
        let fresh = if knapsack.kl.len() > second { second } else { 0 };
        if let Some(leader) = race::leader(&best, fresh) {
            let (mine, theirs) = (mean(&leader.kl[fresh..]), mean(&knapsack.kl[fresh..]));
            let error = paired_error(&leader.kl[fresh..], &knapsack.kl[fresh..]);
            let stands = effort.strategy == Strategy::Races && !(mine <= 0.95 * theirs && theirs - mine > 2.0 * error);
            if stands {
                notes.push(format!(
                    "the knapsack's answer stands: the best of the races has KL {mine:.4}, it {theirs:.4} (±{error:.4})"
                ));
            } else {
                let who = if effort.strategy == Strategy::Random { "the best by lot has" } else { "a race found" };
                notes.push(format!("{who} KL {mine:.4} where the knapsack has {theirs:.4} (±{error:.4})"));
                front.push(leader.clone());
                chosen = leader.clone();
            }
        }
        if chosen.assignment == knapsack.assignment {
            chosen = knapsack.clone();
        }
    }
    front.sort_by(|a, b| b.bytes.cmp(&a.bytes).then(a.mean().total_cmp(&b.mean())));
    Ok(Found { chosen, knapsack, front, slopes, trials: run.spent, notes })
}

/// Indices of `n` of these, falling, that lie about evenly between the first and the last.
fn evenly(bytes: &[u64], n: usize) -> Vec<usize> {
    let (Some(&high), Some(&low)) = (bytes.first(), bytes.last()) else { return Vec::new() };
    let wanted = |i: usize| if n < 2 { low } else { high - (high - low) * i as u64 / (n as u64 - 1) };
    let nearest = |w: u64| (0..bytes.len()).min_by_key(|&k| bytes[k].abs_diff(w)).unwrap_or(0);
    let mut out: Vec<usize> = (0..n).map(|i| nearest(wanted(i))).collect();
    out.dedup();
    out
}

/// The smallest level everywhere.
pub fn smallest(meter: &Meter) -> Assignment {
    let least = |c: &Vec<u64>| (0..c.len()).min_by_key(|&l| c[l]).unwrap_or(0);
    meter.levels.iter().map(least).collect()
}

/// One recipe's level wherever there is one, recipe by recipe, by falling takes.
fn uniform(levels: &Levels<'_>, meter: &Meter) -> Vec<Assignment> {
    let recipes: BTreeSet<Option<usize>> =
        levels.choices.iter().flat_map(|c| c.levels.iter().map(|l| l.recipe)).collect();
    let of = |r: &Option<usize>| {
        levels.choices.iter().map(|c| c.levels.iter().position(|l| l.recipe == *r).unwrap_or(0)).collect()
    };
    let mut all: Vec<Assignment> = recipes.iter().map(of).collect();
    all.sort_by_key(|a| std::cmp::Reverse(meter.of(a)));
    all
}

/// Where the front bends: the point farthest below the line between its ends, bytes and KL each as a fraction of their
/// range. A front of two points has its knee at the smaller one.
pub fn knee(front: &[Point]) -> usize {
    let (Some(a), Some(b)) = (front.first(), front.last()) else { return 0 };
    let (bytes, kl) = ((a.bytes as f64 - b.bytes as f64).max(1.0), (b.mean() - a.mean()).max(f64::MIN_POSITIVE));
    let below = |p: &Point| (a.bytes as f64 - p.bytes as f64) / bytes - (p.mean() - a.mean()) / kl;
    (0..front.len()).rev().max_by(|&i, &j| below(&front[i]).total_cmp(&below(&front[j]))).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(bytes: u64, kl: &[f64]) -> Point {
        Point { assignment: vec![], bytes, takes: bytes, kl: kl.to_vec(), by: "test" }
    }

    #[test]
    fn the_knee_is_where_bytes_stop_being_cheap() {
        let front: Vec<Point> = [(100, 0.0), (90, 0.001), (80, 0.003), (70, 0.01), (60, 0.2), (50, 1.0)]
            .map(|(b, k)| point(b, &[k]))
            .into();
        assert_eq!(front[knee(&front)].bytes, 60);
        assert_eq!(knee(&front[..1]), 0);
        assert_eq!(knee(&[]), 0);
    }

    #[test]
    fn the_front_is_looked_at_evenly_in_bytes() {
        assert_eq!(evenly(&[100, 99, 98, 97, 60, 20], 3), [0, 4, 5]);
        assert_eq!(evenly(&[100, 20], 5), [0, 1]);
        assert_eq!(evenly(&[7], 1), [0]);
        assert!(evenly(&[], 4).is_empty());
    }

    #[test]
    fn paired_errors_leave_out_what_windows_share() {
        let a = [1.0, 5.0, 3.0, 9.0];
        assert!(paired_error(&a, &[1.5, 5.5, 3.5, 9.5]) < 1e-12);
        let c = [2.0, 5.0, 3.0, 9.0];
        let d = [1.0f64, 0.0, 0.0, 0.0];
        let mean = 0.25;
        let want = (d.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / 3.0 / 4.0).sqrt();
        assert!((paired_error(&c, &a) - want).abs() < 1e-12);
        assert!(paired_error(&[1.0], &[1.0]).is_infinite());
    }
}
