//! Lists the recipes that the binary carries: every file of `recipes/`.

use std::fmt::Write;
use std::path::Path;
use std::{env, fs};

fn main() {
    let dir = Path::new(&env::var("CARGO_MANIFEST_DIR").expect("cargo says where the package lies")).join("recipes");
    println!("cargo::rerun-if-changed={}", dir.display());
    let mut names: Vec<String> = fs::read_dir(&dir)
        .expect("recipes/ can be read")
        .filter_map(|f| Some(f.ok()?.file_name().to_str()?.strip_suffix(".toml")?.to_owned()))
        .collect();
    names.sort();
    let mut list = String::from("&[");
    for name in names {
        let path = dir.join(format!("{name}.toml"));
        write!(list, "({name:?}, include_str!({path:?})),").expect("text grows");
    }
    let out = Path::new(&env::var("OUT_DIR").expect("cargo says where output goes")).join("recipes.rs");
    fs::write(out, list + "]").expect("the list can be written");
}
