//! Reading a checkpoint as another family's, and rows that lie in groups.

use std::path::Path;

use lacuna_arch as arch;
use lacuna_format::{Pattern, Piece, Stored, Values};
use serde_json::{Value, json};

use super::{Checkpoint, OpenError, open_as};
use crate::tensor::TensorType;
use crate::{json, packed};

/// As [`open`], a directory in the Hugging Face layout read as if its `model_type` were `family`. What it holds need not
/// be that: only names and shapes of its tensors are compared.
pub fn open_like(path: impl AsRef<Path>, family: &str) -> Result<Checkpoint, OpenError> {
    let path = path.as_ref();
    let config_path = path.join("config.json");
    if !config_path.is_file() {
        return Err(OpenError::bad(path, "another family's reading needs a directory with a config.json"));
    }
    let mut config: Value = json::parse(&json::bytes(&config_path)?).map_err(|e| OpenError::bad(&config_path, e))?;
    if !config.is_object() || config.get("format").and_then(Value::as_str) == Some(packed::FORMAT) {
        return Err(OpenError::bad(&config_path, "no configuration of a family; it cannot be read as another's"));
    }
    let known = json!({ "model_type": family });
    if let Some(near) = arch::nearest_to(&known) {
        let what = format!("--as {family}: no architecture has that model_type; the nearest known one is {near}");
        return Err(OpenError::bad(path, what));
    }
    let said = config["model_type"].as_str().unwrap_or("none").to_owned();
    config["model_type"] = family.into();
    let mut c = open_as(path, path, None, &config, &str::to_owned, None)?;
    let unused = c.unused().first().map(|t| t.name.clone());
    if let Some(name) = unused {
        return Err(OpenError::bad(
            path,
            format!("as {family} it would leave tensor {name} unused: it is another network"),
        ));
    }
    if said != family {
        c.notes
            .push(format!("read as {family}; its configuration calls it {said}, which may mean another computation"));
    }
    Ok(c)
}

/// Whether a directory of an unknown family could be read as another one, in words: the one whose name is `nearest`, or
/// else the first that fits.
pub(super) fn would_fit(path: &Path, nearest: &str) -> String {
    let fits = |family: &str, c: &Checkpoint| {
        format!(
            "; --as {family} would read it: all {} tensors of that architecture are there with their shapes, and no \
             others",
            c.spec.places().len()
        )
    };
    let why = match open_like(path, nearest) {
        Ok(c) => return fits(nearest, &c),
        Err(e) => e,
    };
    let other = arch::FAMILIES.iter().flat_map(|f| f.model_types).find_map(|f| Some((f, open_like(path, f).ok()?)));
    match other {
        Some((family, c)) => fits(family, &c),
        None => format!("; --as {nearest} would not fit: {why}"),
    }
}

impl Checkpoint {
    /// Rows (or the entries of a vector) that lie in groups, each with its share of them.
    pub(super) fn grouped(&self, tensor: usize, rows: usize, cols: usize, (groups, from): (usize, usize)) -> Stored {
        let (file, t) = &self.tensors[tensor];
        let data = self.files[*file].part(t.dtype, t.bytes.clone());
        let of_one = if t.shape.len() == 1 { cols } else { rows };
        let (share, at) = (of_one / groups, from / groups);
        let (all, unit) = (t.shape[0] / groups, data.len() / t.shape[0].max(1));
        let mine = |g: usize| &data[(g * all + at) * unit..(g * all + at + share) * unit];
        let bytes: Vec<u8> = (0..groups).flat_map(mine).copied().collect();
        let values = match t.dtype {
            TensorType::Float(f) => Values::Float(f, bytes.into()),
            TensorType::Block(b) => Values::Gguf(b, bytes.into()),
            TensorType::Uint(_) | TensorType::Grid(_) | TensorType::Other(_) => {
                unreachable!("refused when the file was opened")
            }
        };
        Stored::from_piece(Piece { rows, cols, pattern: Pattern::Dense, values })
    }
}
