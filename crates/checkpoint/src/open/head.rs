//! A head that is said to be the embedding, and is stored all the same.

use lacuna_arch as arch;
use lacuna_format::Float;
use lacuna_spec::{Place, Role, Spec};

use super::Checkpoint;
use crate::tensor::{TensorInfo, TensorType};

impl Checkpoint {
    /// Where a head that differs is stored beside the embedding, it is the head, whatever the configuration says:
    /// transformers 5 does so and warns; transformers 4 ran the embedding. A stored copy of the embedding is nothing to
    /// speak of.
    pub(super) fn untie(&mut self) {
        if !self.spec.tied {
            return;
        }
        let untied = Spec { tied: false, ..self.spec.clone() };
        let find = |role: Role| {
            let names = arch::sources(&untied, &Place::global(role));
            names.iter().find_map(|s| self.tensors.iter().position(|t| t.1.name == s.name))
        };
        let (Some(head), Some(embed)) = (find(Role::Head), find(Role::Embed)) else { return };
        let of = |t: usize| match &self.tensors[t].1 {
            TensorInfo { dtype: TensorType::Float(f), shape, .. } if *shape == [untied.vocab, untied.hidden] => {
                Some(*f)
            }
            _ => None,
        };
        let (Some(a), Some(b)) = (of(head), of(embed)) else { return };
        let same = self.same_values((head, a), (embed, b));
        [head, embed].into_iter().for_each(|t| self.let_go(t));
        if !same {
            self.spec = untied;
            let what = "the configuration says that the head is the embedding, but a head that differs is stored \
                        beside it: the stored head is used, as transformers 5 does (transformers 4 used the embedding)";
            let help = "\"tie_word_embeddings\": false in config.json says the same, and this is no longer told";
            self.remark(what.into(), Some(help));
        }
    }

    fn same_values(&self, (a, fa): (usize, Float), (b, fb): (usize, Float)) -> bool {
        let (a, b) = (self.data(a), self.data(b));
        if fa == fb {
            return a == b;
        }
        const SOME: usize = 1 << 14;
        let mut chunks = a.chunks(SOME * fa.bytes()).zip(b.chunks(SOME * fb.bytes()));
        chunks.all(|(a, b)| {
            let values = |f: Float, bytes: &[u8]| {
                let mut out = vec![0.0; bytes.len() / f.bytes()];
                f.decode(bytes, &mut out);
                out
            };
            values(fa, a) == values(fb, b)
        })
    }
}
