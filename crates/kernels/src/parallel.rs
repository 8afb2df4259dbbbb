//! Cutting work into tasks for the current rayon pool. No result depends on the cut.

use rayon::prelude::*;

/// Least arithmetic (fused multiply-adds) worth a task of its own.
const TASK: usize = 1 << 15;

/// Calls `f(from, to)` over ranges that cover `0..n`: whole multiples of `unit` (the last one aside), at most `most` long, each worth a
/// task at `cost` multiply-adds an item.
pub(crate) fn ranges(n: usize, unit: usize, most: usize, cost: usize, f: impl Fn(usize, usize) + Sync) {
    let threads = rayon::current_num_threads();
    let least = (TASK / cost.max(1)).max(1).next_multiple_of(unit);
    // Four tasks a thread, so that one that starts late does not hold up the rest.
    let fair = if threads == 1 { n } else { n.div_ceil(4 * threads) };
    let step = fair.max(least).next_multiple_of(unit).min(most.max(unit));
    let tasks = n.div_ceil(step.max(1));
    let call = |i: usize| f(i * step, ((i + 1) * step).min(n));
    if threads == 1 || tasks < 2 || n * cost < 4 * TASK {
        (0..tasks).for_each(call);
    } else {
        (0..tasks).into_par_iter().with_max_len(1).for_each(call);
    }
}
