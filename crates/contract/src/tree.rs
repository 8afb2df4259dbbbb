//! A tree of drafted tokens.

use crate::card::MethodError;

/// Tokens that may come next: each continues the text's last token or another node. A node's parent stands before it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tree {
    /// The token of each node.
    pub tokens: Vec<u32>,
    /// The node that each continues; none: the text.
    pub parents: Vec<Option<usize>>,
}

/// What verifying a tree gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Accepted {
    /// The nodes that are committed, in the order of the text.
    pub nodes: Vec<usize>,
    /// The token that the model chose behind them.
    pub next: u32,
}

impl Tree {
    /// A tree without branches.
    pub fn chain(tokens: &[u32]) -> Tree {
        Tree { tokens: tokens.to_vec(), parents: (0..tokens.len()).map(|i| i.checked_sub(1)).collect() }
    }

    /// Nodes.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether nothing is drafted.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Adds a node and gives its number.
    pub fn push(&mut self, token: u32, parent: Option<usize>) -> usize {
        self.tokens.push(token);
        self.parents.push(parent);
        self.tokens.len() - 1
    }

    /// Forgets all but the first `nodes`.
    pub fn truncate(&mut self, nodes: usize) {
        self.tokens.truncate(nodes);
        self.parents.truncate(nodes);
    }

    /// How many tokens behind the text each node stands, 1 for those that continue it. For trees that pass
    /// [`Tree::check`].
    pub fn depths(&self) -> Vec<usize> {
        let mut depths: Vec<usize> = Vec::with_capacity(self.len());
        for parent in &self.parents {
            let above = parent.and_then(|p| depths.get(p)).copied();
            depths.push(above.unwrap_or(0) + 1);
        }
        depths
    }

    /// The nodes from the text to `node`, itself last. For trees that pass [`Tree::check`].
    pub fn path(&self, node: usize) -> Vec<usize> {
        let mut path = vec![node];
        let mut at = node;
        // A parent that stands behind its child would lead round in a circle.
        while let Some(up) = self.parents.get(at).copied().flatten().filter(|p| *p < at) {
            path.push(up);
            at = up;
        }
        path.reverse();
        path
    }

    /// [`Tree::path`] of every node.
    pub fn paths(&self) -> Vec<Vec<usize>> {
        (0..self.len()).map(|node| self.path(node)).collect()
    }

    /// Whether it is a tree of at most `most` tokens below `vocab`, parents before children, no two children of a node
    /// alike; the error names the node.
    pub fn check(&self, vocab: usize, most: usize) -> Result<(), MethodError> {
        let n = self.len();
        if self.parents.len() != n {
            return Err(MethodError::new(format!("a draft of {n} tokens with {} parents", self.parents.len())));
        }
        if n > most {
            return Err(MethodError::new(format!("a draft of {n} tokens where {most} were asked for")));
        }
        let mut children = std::collections::HashSet::with_capacity(n);
        for (i, (&token, &parent)) in self.tokens.iter().zip(&self.parents).enumerate() {
            if token as usize >= vocab {
                return Err(MethodError::new(format!("node {i} of a draft is token {token} of {vocab}")));
            }
            if let Some(p) = parent.filter(|p| *p >= i) {
                return Err(MethodError::new(format!(
                    "node {i} of a draft continues node {p}, which stands behind it"
                )));
            }
            if !children.insert((parent, token)) {
                let of = parent.map_or_else(|| "the text".to_owned(), |p| format!("node {p}"));
                return Err(MethodError::new(format!("node {i} of a draft: {of} is continued by token {token} twice")));
            }
        }
        Ok(())
    }

    /// The longest path on which the model would have gone by itself. `chosen[0]` is the token that it chose behind the
    /// text, `chosen[1 + i]` the one behind node `i`.
    pub fn accept(&self, chosen: &[u32]) -> Result<Accepted, MethodError> {
        if chosen.len() != self.len() + 1 {
            let (n, want) = (chosen.len(), self.len() + 1);
            return Err(MethodError::new(format!("{n} chosen tokens for a draft that needs {want}")));
        }
        let (mut nodes, mut next) = (Vec::new(), chosen[0]);
        for (i, (token, parent)) in self.tokens.iter().zip(&self.parents).enumerate() {
            if *parent == nodes.last().copied() && *token == next {
                nodes.push(i);
                next = chosen[1 + i];
            }
        }
        Ok(Accepted { nodes, next })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::Rng;

    /// A random tree over few tokens, siblings apart.
    pub(crate) fn random_tree(nodes: usize, vocab: usize, rng: &mut Rng) -> Tree {
        let mut tree = Tree::default();
        for _ in 0..nodes {
            let parent = rng.below(tree.len() + 1).checked_sub(1);
            let token = rng.below(vocab) as u32;
            let twin = tree.tokens.iter().zip(&tree.parents).any(|(t, p)| (*t, *p) == (token, parent));
            if !twin {
                tree.push(token, parent);
            }
        }
        tree
    }

    /// Straight from the definition: decode greedily by a function of the whole text, and see how far the tree has it.
    #[test]
    fn what_is_accepted_is_what_greedy_decoding_writes() {
        let mut taken = 0;
        for seed in 0..500 {
            let mut rng = Rng::new(seed);
            let vocab = 1 + rng.below(4);
            let nodes = rng.below(24);
            let tree = random_tree(nodes, vocab, &mut rng);
            tree.check(vocab, nodes).expect("a tree");
            let salt = rng.below(1 << 20) as u64;
            let model = |text: &[u32]| -> u32 {
                let mixed = text.iter().fold(salt, |h, t| h.wrapping_mul(31).wrapping_add(u64::from(*t) + 7));
                Rng::new(mixed).below(vocab) as u32
            };
            let text: Vec<u32> = vec![0, 1];
            let with =
                |path: &[usize]| text.iter().copied().chain(path.iter().map(|&i| tree.tokens[i])).collect::<Vec<_>>();
            let chosen: Vec<u32> =
                std::iter::once(model(&text)).chain((0..tree.len()).map(|i| model(&with(&tree.path(i))))).collect();
            let accepted = tree.accept(&chosen).expect("as many as nodes");
            let mut greedy = text.clone();
            let mut at = None;
            let mut nodes = Vec::new();
            loop {
                let next = model(&greedy);
                let child = (0..tree.len()).find(|&i| tree.parents[i] == at && tree.tokens[i] == next);
                let Some(child) = child else {
                    assert_eq!(accepted, Accepted { nodes: nodes.clone(), next }, "seed {seed}");
                    break;
                };
                nodes.push(child);
                greedy.push(next);
                at = Some(child);
            }
            taken += nodes.len();
            assert!(tree.accept(&chosen[1..]).is_err());
        }
        assert!(taken > 100, "{taken}");
    }

    #[test]
    fn depths_are_lengths_of_paths() {
        let mut rng = Rng::new(3);
        for _ in 0..100 {
            let tree = random_tree(20, 3, &mut rng);
            let lengths: Vec<usize> = tree.paths().iter().map(Vec::len).collect();
            assert_eq!(tree.depths(), lengths);
            for (i, path) in tree.paths().iter().enumerate() {
                assert_eq!(path.last(), Some(&i));
                assert_eq!(tree.parents[path[0]], None);
                assert!(path.windows(2).all(|w| tree.parents[w[1]] == Some(w[0])));
            }
        }
        assert_eq!(Tree::chain(&[5, 6, 7]).depths(), [1, 2, 3]);
    }

    #[test]
    fn what_is_no_tree_is_refused_with_its_numbers() {
        let refused = |tokens: &[u32], parents: &[Option<usize>]| {
            Tree { tokens: tokens.to_vec(), parents: parents.to_vec() }.check(10, 3).expect_err("refused").what
        };
        assert!(refused(&[1, 2], &[None]).contains("2 tokens with 1 parents"));
        assert!(refused(&[1; 4], &[None, Some(0), Some(1), Some(2)]).contains("4 tokens where 3"));
        assert!(refused(&[10], &[None]).contains("token 10 of 10"));
        assert!(refused(&[1, 2], &[None, Some(1)]).contains("node 1 of a draft continues node 1"));
        assert!(refused(&[1, 2], &[Some(1), None]).contains("continues node 1"));
        assert!(refused(&[1, 1], &[None, None]).contains("the text is continued by token 1 twice"));
        assert!(refused(&[1, 2, 2], &[None, Some(0), Some(0)]).contains("node 0 is continued by token 2 twice"));
        // Circles do not keep a path from ending.
        let circle = Tree { tokens: vec![1, 2], parents: vec![Some(1), Some(0)] };
        assert_eq!((circle.path(1), circle.depths()), (vec![0, 1], vec![1, 2]));
    }
}
