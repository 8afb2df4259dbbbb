//! What the parts of a block read, and queries, keys and values of attention whose heads have their own.

use crate::ModelError;
use crate::backend::Backend;
use crate::block::{AttentionPart, normed};
use crate::parts::Projection;
use crate::profile::span;
use crate::tap::Look;

/// What a part's matrices read: rows that are normalised already, or the stream through the part's norm, where it has
/// one.
pub(crate) fn read<'a, B: Backend>(
    backend: &B,
    norm: Option<&B::Norm>,
    (x, shared): (&'a B::Rows, Option<&'a B::Rows>),
    own: &'a mut Option<B::Rows>,
) -> &'a B::Rows {
    match (shared, norm) {
        (Some(h), _) => h,
        (None, Some(n)) => own.insert(normed(backend, n, x)),
        (None, None) => x,
    }
}

impl<B: Backend> AttentionPart<B> {
    /// Queries, and keys and values, where they are this block's own; each by a matrix of its own, or values from k.
    #[allow(clippy::type_complexity)]
    pub(crate) fn plain(
        &self,
        (pq, pk, pv): (&Projection<B>, Option<&Projection<B>>, Option<&Projection<B>>),
        h: &B::Rows,
        step: &B::Step,
        look: &mut Look<'_, B>,
    ) -> Result<(B::Rows, Option<(B::Rows, Option<B::Rows>)>), ModelError> {
        let (backend, gated) = (look.backend, self.gated[0].as_ref());
        let read = || [Some(pq), pk, pv].into_iter().flatten();
        look.input(read().map(|p| &p.place), h)?;
        let (mut q, mut k, mut v) = match (pk, pv) {
            (Some(pk), Some(pv)) => {
                let [q, k, v] = Projection::gated(backend, [pq, pk, pv], gated, h)?;
                (q, Some(k), Some(v))
            }
            (Some(pk), None) => {
                let [q, k] = Projection::gated(backend, [pq, pk], gated, h)?;
                (q, Some(k), None)
            }
            (None, _) => {
                let [q] = Projection::gated(backend, [pq], gated, h)?;
                (q, None, None)
            }
        };
        for (p, y) in read().zip([Some(&q), k.as_ref(), v.as_ref()].into_iter().flatten()) {
            look.output(&p.place, y)?;
        }
        if let Some(by) = self.clip {
            [Some(&mut q), k.as_mut(), v.as_mut()].into_iter().flatten().for_each(|x| backend.clip(x, by));
        }
        v = match (&self.v_norm, k.as_ref().map(|k| v.as_ref().unwrap_or(k))) {
            (Some(n), Some(v)) => Some(normed(backend, n, v)),
            (None, Some(k)) if v.is_none() => Some(backend.copy(k)),
            _ => v,
        };
        let norms = |q: &mut B::Rows, k: &mut Option<B::Rows>, now: bool| {
            let Some((qn, kn)) = self.qk_norm.as_ref().filter(|_| now) else { return };
            *q = normed(backend, qn, q);
            if let (Some(k), Some(kn)) = (k, kn) {
                *k = normed(backend, kn, k);
            }
        };
        norms(&mut q, &mut k, !self.norm_after_rope);
        if let Some(rope) = &self.rope {
            span("rope", || match &mut k {
                Some(k) => backend.rope(rope, self.head_dim, step, [&mut q, k]),
                None => backend.rope(rope, self.head_dim, step, [&mut q]),
            });
        }
        norms(&mut q, &mut k, self.norm_after_rope);
        if let Some(t) = self.temperature {
            backend.temper(t, step, &mut q);
        }
        Ok((q, k.map(|k| (k, v))))
    }
}
