//! No crate lists a dependency that its code never names.

use anyhow::{Context, Result};
use cargo_metadata::{DependencyKind, MetadataCommand};

use crate::finding::Finding;
use crate::source::Source;
use crate::tree::Tree;

/// Folders of a crate whose code may name a dependency, and those that may name one of its tests'.
const CODE: [&str; 2] = ["src/", "build.rs"];
const TESTS: [&str; 4] = ["src/", "tests/", "benches/", "examples/"];

/// Compares every manifest with the code beside it.
pub fn check(tree: &Tree) -> Result<Vec<Finding>> {
    let metadata = MetadataCommand::new()
        .manifest_path(tree.root().join("Cargo.toml"))
        .no_deps()
        .exec()
        .context("cargo metadata failed")?;
    let mut found = vec![];
    for package in &metadata.packages {
        let manifest = package.manifest_path.strip_prefix(&metadata.workspace_root).unwrap_or(&package.manifest_path);
        let folder = manifest.as_str().strip_suffix("Cargo.toml").unwrap_or_default();
        let text = tree.read(manifest.as_str())?;
        for (folders, tests) in [(&CODE[..], false), (&TESTS[..], true)] {
            let mut code = vec![];
            for file in tree.rust() {
                let inside = file.strip_prefix(folder).is_some_and(|f| folders.iter().any(|d| f.starts_with(d)));
                if inside {
                    code.push(Source::parse(file, &tree.read(file)?));
                }
            }
            let of_tests = |kind| kind == DependencyKind::Development;
            for dep in package.dependencies.iter().filter(|d| of_tests(d.kind) == tests) {
                let name = dep.rename.as_deref().unwrap_or(&dep.name);
                let line = text.lines().position(|l| l.starts_with(name));
                // One that stands for its features says so on its line.
                if line.is_some_and(|l| text.lines().nth(l).is_some_and(|l| l.contains("# for its feature"))) {
                    continue;
                }
                let word = name.replace('-', "_");
                if code.iter().all(|source| source.find(&word).is_empty()) {
                    let what = format!("{} depends on {name}, which its code never names", package.name);
                    let cure = "take it out of the manifest, or say on its line `# for its feature: ...`";
                    found.push(Finding::new(manifest.as_str(), line.map_or(0, |l| l + 1), "unused", what, cure));
                }
            }
        }
    }
    Ok(found)
}
