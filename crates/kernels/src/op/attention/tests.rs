//! Against f64, in any company, in every format.

use super::*;
use crate::kv::{KeyPool, KvFormat, KvPool};
use lacuna_base::Mat;
use lacuna_base::testkit::{max_abs_diff, random};

/// A pool with the keys and values of one sequence, in pages that lie in no order.
fn pages(layout: KvLayout, format: KvFormat, k: &Mat, v: &Mat) -> (KvPool, Vec<u32>) {
    let mut pool = KvPool::new(layout, format);
    let n = k.rows().div_ceil(layout.page_tokens) as u32;
    let blocks: Vec<u32> = (0..n).map(|i| (i * 7 + 3) % (n.next_power_of_two() * 2)).collect();
    blocks.iter().for_each(|&b| pool.reserve(b));
    for p in 0..k.rows() {
        let page = pool.page_mut(blocks[p / layout.page_tokens]);
        page.write(p % layout.page_tokens, k.row(p), v.row(p));
    }
    (pool, blocks)
}

/// ALiBi's slope from the definition: the list for a power of 2 of heads, then every second one of the next list.
fn exact_slope(a: &Attention, head: usize) -> f64 {
    let Some(most) = a.alibi else { return 0.0 };
    let list = |n: usize| (1..=n).map(move |i| 0.5f64.powf(f64::from(most) * i as f64 / n as f64));
    let below = (0..).map(|i| 1usize << i).take_while(|n| *n <= a.heads).last().unwrap();
    list(below).chain(list(2 * below).step_by(2)).nth(head).unwrap()
}

fn reference(a: &Attention, kv_heads: usize, q: &Mat, positions: &[usize], k: &Mat, v: &Mat) -> Mat {
    reference_of(a, kv_heads, q, positions, k, v, |_, _, _| true)
}

/// The same over what `seen(row, key head, position)` says.
fn reference_of(
    a: &Attention,
    kv_heads: usize,
    q: &Mat,
    positions: &[usize],
    k: &Mat,
    v: &Mat,
    seen: impl Fn(usize, usize, usize) -> bool,
) -> Mat {
    let dim = k.cols() / kv_heads;
    let mut out = Mat::zeros(q.rows(), q.cols());
    for (r, &p) in positions.iter().enumerate() {
        for h in 0..a.heads {
            let g = h / (a.heads / kv_heads);
            let low = a.window.map_or(0, |w| (p + 1).saturating_sub(w));
            let low = (low..=p).find(|t| a.chunk.is_none_or(|c| t / c == p / c)).unwrap_or(p);
            let seen: Vec<usize> = (low..=p).filter(|t| seen(r, g, *t)).collect();
            let scores: Vec<f64> = (seen.iter())
                .map(|&t| {
                    let dot: f64 =
                        (0..dim).map(|d| f64::from(q[(r, h * dim + d)]) * f64::from(k[(t, g * dim + d)])).sum();
                    let x = dot * f64::from(a.scale);
                    let x = a.softcap.map_or(x, |c| f64::from(c) * (x / f64::from(c)).tanh());
                    x - exact_slope(a, h) * (p - t) as f64
                })
                .collect();
            let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sink = a.sink(h).map_or(0.0, |s| (f64::from(s) - top).exp());
            let total: f64 = sink + scores.iter().map(|x| (x - top).exp()).sum::<f64>();
            for d in 0..dim {
                let y: f64 = scores
                    .iter()
                    .enumerate()
                    .map(|(i, x)| (x - top).exp() * f64::from(v[(seen[i], g * dim + d)]))
                    .sum();
                out[(r, h * dim + d)] = (y / total) as f32;
            }
        }
    }
    out
}

#[test]
fn matches_f64_and_does_not_see_its_company() {
    for (heads, kv_heads, dim, tokens, window, softcap) in [
        (1, 1, 1, 1, None, None),
        (3, 1, 5, 40, None, None),
        (4, 2, 16, 100, Some(10), Some(3.0)),
        (9, 3, 64, 130, None, None),
        (2, 2, 80, 97, Some(33), None),
        (8, 1, 36, 70, None, Some(1.0)),
        (3, 1, 8, 1300, None, None),
        (100, 1, 4, 600, Some(520), None),
    ] {
        let alibi = (tokens % 20 == 0).then_some(6.0);
        // One far above all scores among those of every other case.
        let sinks = (heads % 2 == 1).then(|| (0..heads).map(|h| [0.5, -3.0, 40.0, 1.5][h % 4]).collect());
        let chunk = (tokens % 130 == 0).then(|| tokens / 2 - 1);
        let a = Attention { heads, scale: 0.3, window, chunk, softcap, alibi, sinks };
        let layout = KvLayout { kv_heads, head_dim: dim, page_tokens: 64 };
        let (q, k, v) =
            (random(tokens, heads * dim, 1), random(tokens, kv_heads * dim, 2), random(tokens, kv_heads * dim, 3));
        let all: Vec<usize> = (0..tokens).collect();
        for format in [KvFormat::F32, KvFormat::F16, KvFormat::Q8] {
            let (pool, blocks) = pages(layout, format, &k, &v);
            let view = KvView { pool: &pool, blocks: &blocks, tokens };
            // Exact attention over what the cache holds.
            let (mut held_k, mut held_v) = (k.clone(), v.clone());
            for p in 0..tokens {
                pool.page(blocks[p / 64]).read(p % 64, held_k.row_mut(p), held_v.row_mut(p));
            }
            let coarse = max_abs_diff(held_k.view(), k.view()).max(max_abs_diff(held_v.view(), v.view()));
            assert!(
                coarse
                    <= match format {
                        KvFormat::F32 => 0.0,
                        KvFormat::F16 => 2e-3,
                        KvFormat::Q8 => 2e-2,
                    }
            );
            let want = reference(&a, kv_heads, &q, &all, &held_k, &held_v);
            for isa in Isa::here() {
                let mut whole = Mat::zeros(tokens, heads * dim);
                a.run_on(isa, q.view(), &all, [(0..tokens, view)], None, whole.view_mut());
                let off = max_abs_diff(whole.view(), want.view());
                assert!(off < 2e-5, "{isa} {format:?} {heads} {dim}: {off}");
                for step in [1, 7, 33] {
                    // Of a long text only the end alone: it has every part that the rest has.
                    let mut from = if step == 1 { tokens.saturating_sub(40) } else { 0 };
                    while from < tokens {
                        let to = (from + step).min(tokens);
                        let mut part = Mat::zeros(to - from, heads * dim);
                        let mine = [(0..to - from, view)];
                        a.run_on(isa, q.view().rows_range(from, to), &all[from..to], mine, None, part.view_mut());
                        assert_eq!(
                            part.view().to_mat(),
                            whole.view().rows_range(from, to).to_mat(),
                            "{isa} step {step}"
                        );
                        from = to;
                    }
                }
            }
        }
    }
}

#[test]
fn all_sequences_of_a_call_are_as_each_alone() {
    // A prompt, texts being continued (one of several segments, alone cut into them), an empty part.
    let (heads, kv_heads, dim) = (6, 2, 20);
    let layout = KvLayout { kv_heads, head_dim: dim, page_tokens: 64 };
    for (window, format) in [(None, KvFormat::F32), (Some(600), KvFormat::F16), (None, KvFormat::Q8)] {
        let alibi = window.map(|_| 8.0);
        let a =
            Attention { heads, scale: 0.3, window, chunk: window.map(|w| w / 2), softcap: None, alibi, sinks: None };
        let lengths = [(0..70, 70), (1299..1300, 1300), (40..40, 40), (5..6, 6), (500..530, 530), (699..700, 700)];
        let mut pool = KvPool::new(layout, format);
        let mut tables: Vec<Vec<u32>> = Vec::new();
        let mut next = 0;
        for (s, (_, tokens)) in lengths.iter().enumerate() {
            let (k, v) = (random(*tokens, 40, 10 + s as u64), random(*tokens, 40, 20 + s as u64));
            let table: Vec<u32> = (0..tokens.div_ceil(64) as u32).map(|i| next + i).collect();
            next += table.len() as u32;
            table.iter().for_each(|&b| pool.reserve(b));
            (0..*tokens).for_each(|p| pool.page_mut(table[p / 64]).write(p % 64, k.row(p), v.row(p)));
            tables.push(table);
        }
        let positions: Vec<usize> = lengths.iter().flat_map(|(p, _)| p.clone()).collect();
        let q = random(positions.len(), heads * dim, 1);
        let mut sequences = Vec::new();
        for ((p, tokens), blocks) in lengths.iter().zip(&tables) {
            let from = sequences.last().map_or(0, |(r, _): &(Range<usize>, KvView<'_>)| r.end);
            sequences.push((from..from + p.len(), KvView { pool: &pool, blocks, tokens: *tokens }));
        }
        for threads in [1, 3, 40] {
            let workers = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let run = |q: MatRef<'_>, positions: &[usize], of: &[(Range<usize>, KvView<'_>)]| {
                let mut out = Mat::zeros(q.rows(), q.cols());
                workers.install(|| a.run(q, positions, of.iter().cloned(), out.view_mut()));
                out
            };
            let together = run(q.view(), &positions, &sequences);
            for (rows, kv) in &sequences {
                let mine = q.view().rows_range(rows.start, rows.end);
                let alone = run(mine, &positions[rows.clone()], &[(0..rows.len(), *kv)]);
                assert_eq!(together.view().rows_range(rows.start, rows.end).to_mat(), alone, "{format:?} {rows:?}");
            }
        }
    }
}

#[test]
fn later_positions_cannot_leak() {
    let a = Attention { heads: 2, scale: 1.0, window: None, chunk: None, softcap: None, alibi: None, sinks: None };
    let layout = KvLayout { kv_heads: 1, head_dim: 16, page_tokens: 32 };
    let (q, k, v) = (random(20, 32, 1), random(20, 16, 2), random(20, 16, 3));
    let (mut k2, mut v2) = (k.clone(), v.clone());
    k2.row_mut(19).fill(f32::NAN);
    v2.row_mut(19).fill(f32::NAN);
    let run = |k: &Mat, v: &Mat| {
        let (pool, blocks) = pages(layout, KvFormat::F32, k, v);
        let mut out = Mat::zeros(20, 32);
        let view = KvView { pool: &pool, blocks: &blocks, tokens: 20 };
        a.run(q.view(), &(0..20).collect::<Vec<_>>(), [(0..20, view)], out.view_mut());
        out
    };
    let (clean, dirty) = (run(&k, &v), run(&k2, &v2));
    assert_eq!(clean.view().rows_range(0, 19).to_mat(), dirty.view().rows_range(0, 19).to_mat());
    assert!(dirty.row(19).iter().all(|x| x.is_nan()));
}

#[test]
fn pages_read_back() {
    let layout = KvLayout { kv_heads: 3, head_dim: 5, page_tokens: 64 };
    let (k, v) = (random(64, 15, 1), random(64, 15, 2));
    let (pool, blocks) = pages(layout, KvFormat::F32, &k, &v);
    let (mut a, mut b) = (vec![0.0; 15], vec![0.0; 15]);
    for p in 0..64 {
        pool.page(blocks[0]).read(p, &mut a, &mut b);
        assert_eq!((&a[..], &b[..]), (k.row(p), v.row(p)));
    }
    assert_eq!(layout.page_bytes(KvFormat::F16), 2 * 3 * 64 * (5 + 16));
    assert_eq!(layout.page_bytes(KvFormat::Q8), 3 * 64 * (5 + 16 + 8));
    assert_eq!((layout.token_bytes(KvFormat::F16), layout.token_bytes(KvFormat::Q8)), (60, 54));
}

/// Rows that read some key blocks: as f64 over those positions alone, and in any company; all blocks are the dense bits.
#[test]
fn chosen_blocks_are_read_and_no_others() {
    for (heads, kv_heads, dim, tokens, window, softcap) in [
        (4, 2, 16, 700, None, None),
        (9, 3, 20, 1300, None, Some(2.0)),
        (3, 1, 8, 2200, None, None),
        (2, 2, 64, 200, Some(90), None),
    ] {
        let alibi = (tokens == 200).then_some(8.0);
        let sinks = (heads % 2 == 0).then(|| (0..heads).map(|h| h as f32 - 1.0).collect());
        let chunk = (tokens == 2200).then_some(600);
        let a = Attention { heads, scale: 0.3, window, chunk, softcap, alibi, sinks };
        let layout = KvLayout { kv_heads, head_dim: dim, page_tokens: 32 };
        let (q, k, v) =
            (random(tokens, heads * dim, 1), random(tokens, kv_heads * dim, 2), random(tokens, kv_heads * dim, 3));
        let mut rng = lacuna_base::Rng::new(4);
        // One in eight blocks, so that whole tiles and segments are left out; some rows read all, some their own alone.
        let lists: Vec<Vec<usize>> = (0..tokens * kv_heads)
            .map(|i| {
                let (own, most) = (i / kv_heads / KEY_BLOCK, [8, 8, 1, 1000][i / kv_heads % 4]);
                (0..own).filter(|_| rng.below(most) == 0).collect()
            })
            .collect();
        let chosen = |rows: Range<usize>, all: bool| {
            let mut c = Chosen::new(kv_heads);
            for r in rows {
                for list in &lists[r * kv_heads..(r + 1) * kv_heads] {
                    if all { c.push(r, 0..r / KEY_BLOCK) } else { c.push(r, list.iter().copied()) }
                }
            }
            c
        };
        for format in [KvFormat::F32, KvFormat::F16, KvFormat::Q8] {
            let (pool, blocks) = pages(layout, format, &k, &v);
            let view = KvView { pool: &pool, blocks: &blocks, tokens };
            let (mut held_k, mut held_v) = (k.clone(), v.clone());
            for p in 0..tokens {
                pool.page(blocks[p / 32]).read(p % 32, held_k.row_mut(p), held_v.row_mut(p));
            }
            // The last rows, over several segments.
            let rows = tokens - 100..tokens;
            let positions: Vec<usize> = rows.clone().collect();
            let mine = q.view().rows_range(rows.start, rows.end).to_mat();
            let want = reference_of(&a, kv_heads, &mine, &positions, &held_k, &held_v, |r, head, t| {
                let at = rows.start + r;
                t / KEY_BLOCK == at / KEY_BLOCK || lists[at * kv_heads + head].contains(&(t / KEY_BLOCK))
            });
            for isa in Isa::here() {
                for threads in [1, 40] {
                    let workers = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                    let run = |rows: Range<usize>, chosen: Option<&Chosen>| {
                        let mut out = Mat::zeros(rows.len(), heads * dim);
                        let (q, n) = (q.view().rows_range(rows.start, rows.end), rows.len());
                        let positions: Vec<usize> = rows.collect();
                        workers.install(|| a.run_on(isa, q, &positions, [(0..n, view)], chosen, out.view_mut()));
                        out
                    };
                    let whole = run(rows.clone(), Some(&chosen(rows.clone(), false)));
                    let off = max_abs_diff(whole.view(), want.view());
                    assert!(off < 2e-5, "{isa} {format:?} {heads} {dim}: {off}");
                    for (from, to) in [(0, 1), (1, 2), (2, 9), (50, 100), (99, 100)] {
                        let of = rows.start + from..rows.start + to;
                        let part = run(of.clone(), Some(&chosen(of, false)));
                        assert_eq!(part, whole.view().rows_range(from, to).to_mat(), "{isa} {format:?} {from} {to}");
                    }
                    assert_eq!(run(rows.clone(), Some(&chosen(rows.clone(), true))), run(rows.clone(), None), "{isa}");
                }
            }
        }
    }
}

#[test]
fn pooled_keys_are_those_of_the_keys_that_are_read() {
    let layout = KvLayout { kv_heads: 3, head_dim: 5, page_tokens: 64 };
    let (k, v) = (random(128, 15, 1), random(128, 15, 2));
    for format in [KvFormat::F32, KvFormat::F16, KvFormat::Q8] {
        for pool in [KeyPool::Mean, KeyPool::Bounds] {
            let mut pages = KvPool::new(layout, format);
            pages.pool_keys(pool);
            [7, 2, 4].iter().for_each(|&b| pages.reserve(b));
            let table = [7, 2];
            // Written twice: what was first there does not count.
            for x in [&v, &k] {
                (0..128).for_each(|p| pages.page_mut(table[p / 64]).write(p % 64, x.row(p), v.row(p)));
            }
            pages.copy(2, 4);
            assert_eq!(
                pages.page_bytes(),
                layout.page_bytes(format) + 4 * 2 * 15 * (1 + usize::from(pool == KeyPool::Bounds))
            );
            let check = |pages: &KvPool, table: [u32; 2], tokens: usize| {
                let (mut held, mut value) = (Mat::zeros(128, 15), vec![0.0; 15]);
                (0..tokens).for_each(|p| pages.page(table[p / 64]).read(p % 64, held.row_mut(p), &mut value));
                let view = KvView { pool: pages, blocks: &table, tokens };
                for (head, block) in (0..3).flat_map(|h| (0..tokens / 32).map(move |b| (h, b))) {
                    let keys = |d: usize| (block * 32..block * 32 + 32).map(move |p| (p, head * 5 + d));
                    let pooled = view.pooled(head, block).unwrap();
                    for d in 0..5 {
                        let of = keys(d).map(|at| held[at]);
                        if pool == KeyPool::Mean {
                            assert!((pooled[d] - of.sum::<f32>() / 32.0).abs() < 1e-6);
                        } else {
                            let (least, most) = (of.clone().fold(f32::MAX, f32::min), of.fold(f32::MIN, f32::max));
                            assert_eq!((pooled[d], pooled[5 + d]), (least, most));
                        }
                    }
                    assert_eq!(pooled.len(), if pool == KeyPool::Mean { 5 } else { 10 });
                }
            };
            check(&pages, [7, 2], 128);
            check(&pages, [7, 4], 128);
            // Slots that move, each head's own ones: what is whole behind it is pooled anew, the rest once it is.
            let kept = [0, 1, 2].map(|h| (0..128).filter(|p| (p * 7 + h) % 3 != 0).take(75).collect::<Vec<usize>>());
            for (i, &block) in table.iter().enumerate() {
                let part = [0, 1, 2].map(|h| &kept[h][i * 64..75.min((i + 1) * 64)]);
                pages.gather(&table, block, &part);
            }
            check(&pages, [7, 2], 75);
            (75..128).for_each(|p| pages.page_mut(table[p / 64]).write(p % 64, v.row(p), k.row(p)));
            check(&pages, [7, 2], 128);
        }
    }
}
