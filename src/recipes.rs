//! The recipes that the binary carries.

use std::path::Path;

use anyhow::{Context, Result};

use crate::common::Usage;

/// Name and text of each, by name: the files of `recipes/`.
pub const CARRIED: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/recipes.rs"));

/// Names of the carried recipes.
pub fn names() -> Vec<&'static str> {
    CARRIED.iter().map(|(n, _)| *n).collect()
}

/// Whether a name means a carried recipe.
pub fn is_carried(name: &str) -> bool {
    !Path::new(name).is_file() && names().contains(&name)
}

/// The text of a recipe: a file where one is at that path, else a carried one.
pub fn text(name: &str) -> Result<String> {
    let path = Path::new(name);
    if path.is_file() {
        return std::fs::read_to_string(path).with_context(|| format!("{name}: cannot be read"));
    }
    match CARRIED.iter().find(|(n, _)| *n == name) {
        Some((_, t)) => Ok((*t).to_owned()),
        None => {
            Err(Usage(format!("'{name}' is neither a file nor a carried recipe; there are {}", names().join(", ")))
                .into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_recipe_file_is_carried_and_parses() {
        let registry = lacuna_methods::registry();
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes");
        let mut n = 0;
        for f in std::fs::read_dir(dir).unwrap() {
            let path = f.unwrap().path();
            let name = path.file_stem().unwrap().to_string_lossy().into_owned();
            assert!(names().contains(&name.as_str()), "{name} is not carried");
            lacuna_compress::Recipe::parse(&text(&name).unwrap(), &registry, &[])
                .unwrap_or_else(|e| panic!("{name}: {e}"));
            n += 1;
        }
        assert_eq!(n, CARRIED.len());
    }
}
