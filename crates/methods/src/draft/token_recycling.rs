//! Token Recycling: what was likely after a token before may come after it again.
//!
//! **Paper.** Xianzhen Luo, Yixuan Wang, Qingfu Zhu, Zhiming Zhang, Xuanyu Zhang, Qing Yang, Dongliang Xu, "Turning
//! Trash into Treasure: Accelerating Inference of Large Language Models with Token Recycling", 2024, arXiv 2408.08696.
//!
//! **Idea.** A matrix `M` `[vocab, k]` holds, for each token, the `k` most likely tokens of the last time that one was
//! looked at; `M[t]` is overwritten at every position that the model computes, those of refused drafts included. A
//! draft is a tree of fixed form: a node `(r_1, …, r_d)` is the `r_d`-th follower of its parent's token. The form
//! holds the `nodes` with the largest `Π 1 / ((r_i + 1)(r_i + 2))`: likely followers get more and deeper branches.
//!
//! **Shapes and units.** Token ids; `M` in u32; at most `most` nodes a draft, best ones first.
//!
//! **Cost.** A row of `k` ids copied a position, and at most `nodes` look-ups a draft. `4 · vocab · k` bytes a text
//! (1.6 MB for 49,152 tokens), of which only rows that were written are touched.
//!
//! **Departs.** The paper lists a tree of 80 nodes that it found by trial; the rule here makes one of any size, and at
//! 80 shares 70 nodes with it (nodes by depth 8, 21, 25, 19, 6, 1 for 8, 21, 25, 15, 8, 3). Nodes stand best first and
//! not depth by depth, so that a beginning of a draft is a draft. The paper keeps `M` from text to text; here it
//! belongs to the text, and a token that was not seen yet has no followers, where the paper's has token 0.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;

use lacuna_contract::{Card, Draft, Drafting, MadeRunning, RunMethod, TopK, Tree};
use serde::{Deserialize, Serialize};

use crate::family::keys::Whole;
use crate::make;

/// The form of the tree.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
struct TokenRecycling {
    /// Followers kept of each token, 1 to 32.
    k: Whole<1, 32>,
    /// Nodes of a draft at the most, 1 to 1024.
    nodes: Whole<1, 1024>,
    /// Tokens that a draft may be long, 1 to 16.
    depth: Whole<1, 16>,
}

impl Default for TokenRecycling {
    fn default() -> TokenRecycling {
        TokenRecycling { k: Whole(8), nodes: Whole(80), depth: Whole(6) }
    }
}

pub(crate) fn method() -> RunMethod {
    RunMethod {
        card: Card {
            name: "token-recycling",
            paper: "Luo, Wang, Zhu, Zhang, Zhang, Yang, Xu: Turning Trash into Treasure: Accelerating Inference of \
                    Large Language Models with Token Recycling, 2024",
            arxiv: "2408.08696",
            summary: "Drafts a tree of the tokens that were likely after each token the last time.",
            system: None,
            verb: "draft",
            needs: &[],
            abilities: &[],
        },
        keys: make::keys::<TokenRecycling>,
        defaults: make::defaults::<TokenRecycling>,
        make: |given, _| {
            Ok(MadeRunning::Draft(Box::new(make::parameters::<TokenRecycling>("token-recycling", given)?)))
        },
    }
}

/// A node of the tree's form: its parent, and which follower of the parent's token it is.
type Branch = (Option<usize>, usize);

impl TokenRecycling {
    /// The form, best nodes first. A child is half as likely as its parent at the most, and so stands behind it.
    fn form(&self) -> Vec<Branch> {
        let mut form: Vec<Branch> = Vec::with_capacity(self.nodes.0);
        let part = |rank: usize| ((rank + 1) * (rank + 2)) as u128;
        // By one over its chance, then by ranks; each brings its next sibling and its first child.
        let mut open = BinaryHeap::new();
        open.push(Reverse((part(0), vec![0usize], None, 1u128)));
        while form.len() < self.nodes.0 {
            let Some(Reverse((rare, path, parent, above))) = open.pop() else { break };
            let rank = path[path.len() - 1];
            if rank + 1 < self.k.0 {
                let mut next = path.clone();
                next[path.len() - 1] = rank + 1;
                open.push(Reverse((above.saturating_mul(part(rank + 1)), next, parent, above)));
            }
            if path.len() < self.depth.0 {
                let mut child = path;
                child.push(0);
                open.push(Reverse((rare.saturating_mul(part(0)), child, Some(form.len()), rare)));
            }
            form.push((parent, rank));
        }
        form
    }
}

impl Draft for TokenRecycling {
    fn top(&self) -> usize {
        self.k.0
    }

    fn bytes(&self, vocab: usize, _: usize) -> u64 {
        (size_of::<u32>() * self.k.0) as u64 * vocab as u64 + (size_of::<Branch>() * self.nodes.0) as u64
    }

    fn begin(&self, vocab: usize) -> Box<dyn Drafting> {
        let k = self.k.0;
        Box::new(Matrix { k, form: self.form().into(), followers: vec![0; vocab * k] })
    }
}

/// The matrix of one text.
struct Matrix {
    k: usize,
    form: Arc<[Branch]>,
    /// `[vocab, k]`: the follower's id plus one; 0 where there is none.
    followers: Vec<u32>,
}

impl Matrix {
    fn vocab(&self) -> usize {
        self.followers.len() / self.k
    }

    fn follower(&self, token: u32, rank: usize) -> Option<u32> {
        let row = self.followers.chunks_exact(self.k).nth(token as usize)?;
        row.get(rank)?.checked_sub(1)
    }
}

impl Drafting for Matrix {
    fn observe(&mut self, _: &[u32], top: Option<TopK<'_>>) {
        let (vocab, k) = (self.vocab(), self.k);
        for (token, ids) in top.iter().flat_map(TopK::rows) {
            let Some(row) = self.followers.chunks_exact_mut(k).nth(token as usize) else { continue };
            row.fill(0);
            let mut n = 0;
            for &id in ids.iter().filter(|id| (**id as usize) < vocab) {
                // No two children of a node are alike.
                if n < k && !row[..n].contains(&(id + 1)) {
                    row[n] = id + 1;
                    n += 1;
                }
            }
        }
    }

    fn propose(&mut self, text: &[u32], most: usize) -> Tree {
        let mut tree = Tree::default();
        let Some(&last) = text.last() else { return tree };
        // The node of the tree that stands for each node of the form.
        let mut nodes: Vec<Option<usize>> = Vec::with_capacity(self.form.len());
        for &(parent, rank) in self.form.iter() {
            if tree.len() >= most {
                break;
            }
            let at = match parent {
                None => Some((None, last)),
                Some(p) => nodes[p].map(|n| (Some(n), tree.tokens[n])),
            };
            let follower = at.and_then(|(up, token)| Some((up, self.follower(token, rank)?)));
            nodes.push(follower.map(|(up, token)| tree.push(token, up)));
        }
        tree
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::Rng;
    use std::collections::BTreeMap;

    fn made(k: usize, nodes: usize, depth: usize) -> TokenRecycling {
        TokenRecycling { k: Whole(k), nodes: Whole(nodes), depth: Whole(depth) }
    }

    /// All paths of ranks, straight from the definition: ordered by how rare they are.
    fn brute_form(k: usize, nodes: usize, depth: usize) -> Vec<Vec<usize>> {
        let mut all: Vec<Vec<usize>> = vec![vec![]];
        let mut paths = Vec::new();
        for _ in 0..depth {
            all = all.iter().flat_map(|p| (0..k).map(move |r| [p.as_slice(), &[r]].concat())).collect();
            paths.extend(all.clone());
        }
        let rare = |p: &Vec<usize>| p.iter().map(|r| ((r + 1) * (r + 2)) as u128).product::<u128>();
        paths.sort_by_key(|p| (rare(p), p.clone()));
        paths.truncate(nodes);
        paths
    }

    fn paths(form: &[Branch]) -> Vec<Vec<usize>> {
        let mut paths: Vec<Vec<usize>> = Vec::new();
        for (parent, rank) in form {
            let above = parent.map_or(vec![], |p| paths[p].clone());
            paths.push([above, vec![*rank]].concat());
        }
        paths
    }

    #[test]
    fn the_form_is_the_likeliest_by_brute_force() {
        for (k, nodes, depth) in [(8, 80, 5), (3, 20, 4), (1, 9, 4), (4, 1, 3), (2, 1000, 5)] {
            assert_eq!(paths(&made(k, nodes, depth).form()), brute_form(k, nodes, depth), "{k} {nodes} {depth}");
        }
        let depths = |n: usize| paths(&made(8, 80, 6).form()).iter().filter(|p| p.len() == n).count();
        assert_eq!([1, 2, 3, 4, 5, 6].map(depths), [8, 21, 25, 19, 6, 1]);
    }

    /// The tokens along a path of ranks, looked up one by one in a map from token to its last followers.
    fn walk(map: &BTreeMap<u32, Vec<u32>>, last: u32, ranks: &[usize]) -> Option<Vec<u32>> {
        let (mut at, mut tokens) = (last, Vec::new());
        for &r in ranks {
            at = *map.get(&at)?.get(r)?;
            tokens.push(at);
        }
        Some(tokens)
    }

    #[test]
    fn trees_agree_with_the_definition() {
        for seed in 0..200 {
            let mut rng = Rng::new(seed);
            let (vocab, k) = (1 + rng.below(7), 1 + rng.below(4));
            let draft = made(k, 30, 4);
            let (mut state, mut map) = (draft.begin(vocab), BTreeMap::new());
            assert!(state.propose(&[0], 30).is_empty());
            for _ in 0..6 {
                let n = rng.below(5);
                let tokens: Vec<u32> = (0..n).map(|_| rng.below(vocab) as u32).collect();
                let width = k.min(vocab);
                let ids: Vec<u32> = (0..n).flat_map(|_| distinct(width, vocab, &mut rng)).collect();
                state.observe(&tokens, Some(TopK { tokens: &tokens, ids: &ids, k: width }));
                for (t, row) in tokens.iter().zip(ids.chunks(width)) {
                    map.insert(*t, row.to_vec());
                }
                let last = rng.below(vocab) as u32;
                let known = brute_form(k, 30, 4).into_iter().filter_map(|p| walk(&map, last, &p));
                let want: Vec<Vec<u32>> = known.collect();
                for most in [0, 1, 2, 7, 30, 99] {
                    let tree = state.propose(&[0, last], most);
                    tree.check(vocab, most).expect("a tree");
                    let have: Vec<Vec<u32>> =
                        tree.paths().iter().map(|p| p.iter().map(|&i| tree.tokens[i]).collect()).collect();
                    assert_eq!(have, want[..want.len().min(most)], "seed {seed}");
                }
            }
        }
    }

    fn distinct(n: usize, below: usize, rng: &mut Rng) -> Vec<u32> {
        let mut ids: Vec<u32> = (0..below as u32).collect();
        for i in 0..n {
            let j = i + rng.below(below - i);
            ids.swap(i, j);
        }
        ids.truncate(n);
        ids
    }

    #[test]
    fn rows_that_no_model_gives_do_no_harm() {
        let mut state = made(3, 10, 2).begin(4);
        // An id twice, ids and tokens beyond the vocabulary, a width of nothing, rows that are cut short.
        let tokens = [0, 9, 1];
        state.observe(&[], Some(TopK { tokens: &tokens, ids: &[2, 2, 7, 1, 1, 1, 3], k: 3 }));
        state.observe(&[], Some(TopK { tokens: &tokens, ids: &[], k: 0 }));
        state.observe(&[5], None);
        let tree = state.propose(&[0], 10);
        tree.check(4, 10).expect("a tree");
        assert_eq!(tree.tokens, [2]);
        assert!(state.propose(&[1], 10).is_empty() && state.propose(&[9], 10).is_empty());
        assert!(state.propose(&[], 10).is_empty());
        assert_eq!(made(8, 80, 6).bytes(49_152, 0), 4 * 8 * 49_152 + 80 * size_of::<Branch>() as u64);
    }
}
