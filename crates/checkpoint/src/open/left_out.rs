//! Tensors of a file that no place of the network uses.

use std::collections::HashSet;

use super::{Checkpoint, OpenError};
use crate::tensor::TensorInfo;

/// Names told of a note's tensors.
const NAMED: usize = 3;

/// The name of a tensor's layer, its number included: `model.layers.3.`
fn layer(name: &str) -> Option<&str> {
    let mut end = 0;
    for part in name.split_inclusive('.') {
        end += part.len();
        if part.strip_suffix('.').is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit())) {
            return Some(&name[..end]);
        }
    }
    None
}

impl Checkpoint {
    /// Refuses matrices that lie in the network's own layers and are not part of it as it is described, and scales
    /// beside weights that nothing explains: what would be computed is another network. Tells what else is left out.
    pub(super) fn left_out(&mut self) -> Result<(), OpenError> {
        // Who examines a model is shown all that is odd, and refused nothing.
        if self.problems.is_some() {
            return Ok(());
        }
        let says = if self.metadata.is_some() { "the file's metadata" } else { "config.json" };
        if self.spec.layers.is_empty() {
            return Err(OpenError::bad(&self.path, format!("by {says} it is a network of 0 layers")));
        }
        let used = self.used();
        let layers: HashSet<&str> = used.iter().filter_map(|&i| layer(&self.tensors[i].1.name)).collect();
        // A head that is the embedding may lie there twice.
        let again = |name: &str| self.spec.tied && ["lm_head.weight", "output.weight"].contains(&name);
        let unused: Vec<&TensorInfo> = self.unused().into_iter().filter(|t| !again(&t.name)).collect();
        for t in &unused {
            let beside = ["_scale_inv", "_scale", "_scale_2", "_packed", "_global_scale"].iter().any(|end| {
                t.name.strip_suffix(end).is_some_and(|weight| {
                    self.tensors.iter().enumerate().any(|(i, u)| u.1.name == weight && used.contains(&i))
                })
            });
            if beside && self.quantized.is_none() {
                let what = format!(
                    "tensor {} scales the weight beside it, and {says} has no quantization_config that says how: it \
                     came with the model and was lost",
                    t.name
                );
                return Err(OpenError::bad(&self.path, what));
            }
            let matrix = t.shape.iter().filter(|n| **n > 1).count() > 1;
            // Older files hold the latents' matrix as it came beside its two halves.
            let again = t.name.ends_with("attn_kv_b.weight");
            if matrix && !again && self.quantized.is_none() && layer(&t.name).is_some_and(|l| layers.contains(l)) {
                let what = format!(
                    "tensor {} (shape {:?}) lies in a layer of the network and is no part of it as {says} describes \
                     it: that is another network",
                    t.name, t.shape
                );
                return Err(OpenError::bad(&self.path, what));
            }
        }
        if unused.is_empty() {
            return Ok(());
        }
        let (n, named) = (unused.len(), unused.iter().take(NAMED).map(|t| t.name.as_str()).collect::<Vec<_>>());
        let more = if n > NAMED { format!(" and {} more (`inspect` lists them)", n - NAMED) } else { String::new() };
        let what = format!("not part of the network as {says} describes it: {}{more}", named.join(", "));
        self.notes.push(what);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_is_named_to_its_number() {
        assert_eq!(layer("model.layers.12.mlp.up_proj.weight"), Some("model.layers.12."));
        assert_eq!(layer("blk.0.attn_q.weight"), Some("blk.0."));
        assert_eq!(layer("h.3.mlp.4.weight"), Some("h.3."));
        assert_eq!((layer("lm_head.weight"), layer("a..b"), layer("")), (None, None, None));
    }
}
