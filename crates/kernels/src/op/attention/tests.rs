//! Against f64, in any company, in every format.

use super::*;
use crate::kv::{KvFormat, KvPage};
use lacuna_base::Mat;
use lacuna_base::testkit::{max_abs_diff, random};

fn pages(layout: KvLayout, format: KvFormat, k: &Mat, v: &Mat) -> Vec<Arc<KvPage>> {
    let mut pages: Vec<KvPage> =
        (0..k.rows().div_ceil(layout.page_tokens)).map(|_| KvPage::new(layout, format)).collect();
    for p in 0..k.rows() {
        pages[p / layout.page_tokens].write(p % layout.page_tokens, k.row(p), v.row(p));
    }
    pages.into_iter().map(Arc::new).collect()
}

fn reference(a: &Attention, kv_heads: usize, q: &Mat, positions: &[usize], k: &Mat, v: &Mat) -> Mat {
    let dim = k.cols() / kv_heads;
    let mut out = Mat::zeros(q.rows(), q.cols());
    for (r, &p) in positions.iter().enumerate() {
        for h in 0..a.heads {
            let g = h / (a.heads / kv_heads);
            let low = a.window.map_or(0, |w| (p + 1).saturating_sub(w));
            let scores: Vec<f64> = (low..=p)
                .map(|t| {
                    let dot: f64 =
                        (0..dim).map(|d| f64::from(q[(r, h * dim + d)]) * f64::from(k[(t, g * dim + d)])).sum();
                    let x = dot * f64::from(a.scale);
                    a.softcap.map_or(x, |c| f64::from(c) * (x / f64::from(c)).tanh())
                })
                .collect();
            let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let total: f64 = scores.iter().map(|x| (x - top).exp()).sum();
            for d in 0..dim {
                let y: f64 = scores
                    .iter()
                    .enumerate()
                    .map(|(i, x)| (x - top).exp() * f64::from(v[(low + i, g * dim + d)]))
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
        let a = Attention { heads, scale: 0.3, window, softcap };
        let layout = KvLayout { kv_heads, head_dim: dim, page_tokens: 64 };
        let (q, k, v) =
            (random(tokens, heads * dim, 1), random(tokens, kv_heads * dim, 2), random(tokens, kv_heads * dim, 3));
        let all: Vec<usize> = (0..tokens).collect();
        for format in [KvFormat::F32, KvFormat::F16, KvFormat::Q8] {
            let pages = pages(layout, format, &k, &v);
            let view = KvView { pages: &pages, tokens };
            // Exact attention over what the cache holds.
            let (mut held_k, mut held_v) = (k.clone(), v.clone());
            for p in 0..tokens {
                pages[p / 64].read(p % 64, held_k.row_mut(p), held_v.row_mut(p));
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
                a.run_on(isa, q.view(), &all, &view, whole.view_mut());
                let off = max_abs_diff(whole.view(), want.view());
                assert!(off < 2e-5, "{isa} {format:?} {heads} {dim}: {off}");
                for step in [1, 7, 33] {
                    // Of a long text only the end alone: it has every part that the rest has.
                    let mut from = if step == 1 { tokens.saturating_sub(40) } else { 0 };
                    while from < tokens {
                        let to = (from + step).min(tokens);
                        let mut part = Mat::zeros(to - from, heads * dim);
                        a.run_on(isa, q.view().rows_range(from, to), &all[from..to], &view, part.view_mut());
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
fn a_path_of_a_tree_is_a_text() {
    // Node: parent. Three drafts that part after the first and second token.
    let parents = [None, Some(0), Some(0), Some(1), Some(2), Some(1), Some(5)];
    let paths: Vec<Vec<usize>> = (0..parents.len())
        .map(|node| {
            let mut path: Vec<usize> = std::iter::successors(Some(node), |&n| parents[n]).collect();
            path.reverse();
            path
        })
        .collect();
    let paths: Vec<&[usize]> = paths.iter().map(Vec::as_slice).collect();
    for (base, window) in [(0, None), (61, None), (64, Some(9)), (126, Some(40)), (700, None)] {
        let a = Attention { heads: 6, scale: 0.3, window, softcap: None };
        let layout = KvLayout { kv_heads: 2, head_dim: 20, page_tokens: 64 };
        let tokens = base + parents.len();
        let (q, k, v) = (random(parents.len(), 120, 1), random(tokens, 40, 2), random(tokens, 40, 3));
        for format in [KvFormat::F32, KvFormat::F16, KvFormat::Q8] {
            let all = pages(layout, format, &k, &v);
            for isa in Isa::here() {
                let mut got = Mat::zeros(q.rows(), q.cols());
                a.run_tree_on(isa, q.view(), base, &paths, &KvView { pages: &all, tokens }, got.view_mut());
                for (r, path) in paths.iter().enumerate() {
                    let at = |p: usize| if p < base { p } else { base + path[p - base] };
                    let n = base + path.len();
                    let text = |m: &Mat| Mat::from_fn(n, 40, |p, c| m[(at(p), c)]);
                    let alone = pages(layout, format, &text(&k), &text(&v));
                    let mut want = Mat::zeros(1, 120);
                    let view = KvView { pages: &alone, tokens: n };
                    a.run_on(isa, q.view().rows_range(r, r + 1), &[n - 1], &view, want.view_mut());
                    assert_eq!(got.row(r), want.row(0), "{isa} {format:?} node {r} after {base}");
                }
            }
        }
    }
}

#[test]
fn later_positions_cannot_leak() {
    let a = Attention { heads: 2, scale: 1.0, window: None, softcap: None };
    let layout = KvLayout { kv_heads: 1, head_dim: 16, page_tokens: 32 };
    let (q, k, v) = (random(20, 32, 1), random(20, 16, 2), random(20, 16, 3));
    let (mut k2, mut v2) = (k.clone(), v.clone());
    k2.row_mut(19).fill(f32::NAN);
    v2.row_mut(19).fill(f32::NAN);
    let run = |k: &Mat, v: &Mat| {
        let pages = pages(layout, KvFormat::F32, k, v);
        let mut out = Mat::zeros(20, 32);
        let view = KvView { pages: &pages, tokens: 20 };
        a.run(q.view(), &(0..20).collect::<Vec<_>>(), &view, out.view_mut());
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
    let pages = pages(layout, KvFormat::F32, &k, &v);
    let (mut a, mut b) = (vec![0.0; 15], vec![0.0; 15]);
    for p in 0..64 {
        pages[0].read(p, &mut a, &mut b);
        assert_eq!((&a[..], &b[..]), (k.row(p), v.row(p)));
    }
    assert_eq!(layout.page_bytes(KvFormat::F16), 2 * 3 * 64 * (5 + 16));
    assert_eq!(layout.page_bytes(KvFormat::Q8), 3 * 64 * (5 + 16 + 8));
    assert_eq!((layout.token_bytes(KvFormat::F16), layout.token_bytes(KvFormat::Q8)), (60, 54));
}
