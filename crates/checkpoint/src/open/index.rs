//! The files of a directory in the Hugging Face layout, by their index or without one.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use lacuna_arch as arch;

use super::{Checkpoint, OpenError};
use crate::json;
use crate::safetensors;

/// How many names stand for many.
const SHOWN: usize = 3;

impl Checkpoint {
    /// Maps the weight files. `rename`: what each tensor is called from now on.
    pub(super) fn add_safetensors(
        &mut self,
        dir: &Path,
        only: Option<&Path>,
        rename: &dyn Fn(&str) -> String,
    ) -> Result<(), OpenError> {
        let (index_path, one) = (dir.join("model.safetensors.index.json"), dir.join("model.safetensors"));
        match only {
            Some(path) => self.add_file(path, |_| true)?,
            None if index_path.is_file() => self.add_indexed(dir, &index_path, rename)?,
            None if one.is_file() => self.add_file(&one, |_| true)?,
            None => {
                let what =
                    "there is no model.safetensors and no index of shards; other formats (.bin, .pth) are not read";
                return Err(OpenError::bad(dir, what));
            }
        }
        self.tensors.iter_mut().for_each(|t| t.1.name = rename(&t.1.name));
        Ok(())
    }

    fn add_indexed(&mut self, dir: &Path, path: &Path, rename: &dyn Fn(&str) -> String) -> Result<(), OpenError> {
        let index = safetensors::parse_index(&json::list_bytes(path)?).map_err(|e| OpenError::bad(path, e))?;
        let of: HashMap<&str, &str> = index.iter().map(|(t, f)| (t.as_str(), f.as_str())).collect();
        let asked = self.asked();
        let needed = |t: &str| {
            let t = rename(t);
            let of_module = || t.rsplit_once('.').filter(|(_, end)| *end != "bias").map(|(m, _)| format!("{m}.weight"));
            asked.contains(&t) || self.quantized.is_some() && of_module().is_some_and(|m| asked.contains(&m))
        };
        let needed: HashSet<&str> = of.keys().copied().filter(|t| needed(t)).collect();
        let (mut seen, mut absent, mut nowhere) = (HashSet::new(), HashSet::new(), Vec::new());
        for (_, name) in &index {
            if !seen.insert(name) {
                continue;
            }
            // What the index gives to another shard is not this one's; what it does not know stays, like elsewhere.
            let Err(e) = self.add_file(&dir.join(name), |t| of.get(t).is_none_or(|f| f == name)) else { continue };
            let held: Vec<&str> = of.iter().filter(|(_, f)| *f == name).map(|(t, _)| *t).collect();
            absent.insert(name.as_str());
            if !dir.join(name).exists() && !held.iter().any(|t| needed.contains(t)) {
                nowhere.extend(held);
                continue;
            }
            let help =
                "the file has to lie beside the index: copy it there, or fetch the model anew (lacuna pull NAME)";
            self.fault(e, Some(help))?;
        }
        let have: HashSet<&str> = self.tensors.iter().map(|t| t.1.name.as_str()).collect();
        let lacks = |(t, f): &&(String, String)| !have.contains(t.as_str()) && !absent.contains(f.as_str());
        let (missing, idle): (Vec<_>, Vec<_>) =
            index.iter().filter(lacks).partition(|(t, _)| needed.contains(t.as_str()));
        nowhere.extend(idle.iter().map(|(t, _)| t.as_str()));
        if let Some((tensor, file)) = missing.first() {
            let what = format!("tensor {tensor} should lie in {file}, which lacks it");
            self.fault(OpenError::bad(path, what), None)?;
        }
        if !nowhere.is_empty() {
            nowhere.sort_unstable();
            let shown = nowhere[..nowhere.len().min(SHOWN)].join(", ");
            let more = if nowhere.len() > SHOWN { ", ..." } else { "" };
            let n = nowhere.len();
            let what = format!(
                "the index names {n} tensors that lie in no file and that this network does not use ({shown}{more})"
            );
            self.remark(what, None);
        }
        Ok(())
    }

    /// Every name under which the network looks for a tensor.
    fn asked(&self) -> HashSet<String> {
        self.spec.places().iter().flat_map(|p| arch::sources(&self.spec, p)).map(|s| s.name).collect()
    }
}
