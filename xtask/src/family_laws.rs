//! A family is known where it is made, and nowhere else.

use anyhow::Result;

use crate::finding::Finding;
use crate::source::Source;
use crate::tree::Tree;

const FAMILIES: &str = "crates/methods/src/family/";

/// Who may name a verb beside the methods: the writer of new methods, and those that print what is registered.
const MAY: [&str; 2] = ["crates/methods/", "xtask/"];

/// The verb that a family's file registers.
fn verb(text: &str) -> Option<&str> {
    let at = text.find("Family {")?;
    Some(text[at..].split_once("verb: \"")?.1.split_once('"')?.0)
}

/// The files outside a family's own and its methods' that must change for it.
fn touched(tree: &Tree, file: &str, verb: &str) -> Result<Vec<(String, usize)>> {
    let module = file.trim_start_matches(FAMILIES).trim_end_matches(".rs");
    let names = [format!("\"{verb}\""), format!("family::{module}::"), format!("mod {module};")];
    let mut found = vec![];
    for other in tree.rust().filter(|f| *f != file) {
        let in_methods = other.starts_with(MAY[0]);
        let lists = other == "crates/methods/src/lib.rs" || other == format!("{FAMILIES}mod.rs");
        if other.starts_with(MAY[1]) || (in_methods && !lists) || other.contains("/tests/") || other.contains("fuzz/") {
            continue;
        }
        let source = Source::parse(other, &tree.read(other)?);
        let hit = |(line, test): (&String, &bool)| !test && names.iter().any(|n| line.contains(n));
        if let Some(line) = source.code.iter().zip(&source.in_test).position(hit) {
            found.push((other.to_owned(), line + 1));
        }
    }
    Ok(found)
}

/// No code outside `methods` names a verb of recipes.
pub fn check(tree: &Tree) -> Result<Vec<Finding>> {
    let mut found = vec![];
    for file in tree.rust().filter(|f| f.starts_with(FAMILIES)) {
        let text = tree.read(file)?;
        let Some(verb) = verb(&text) else { continue };
        for (other, line) in touched(tree, file, verb)?.into_iter().filter(|(f, _)| !f.starts_with(MAY[0])) {
            let cure = "let the family answer through its step, its card or its edits";
            found.push(Finding::new(&other, line, "families", format!("it knows the verb \"{verb}\""), cure));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_family_touches_two_lists_beside_its_own_file() {
        let tree = Tree::open().unwrap();
        let mut families = 0;
        for file in tree.rust().filter(|f| f.starts_with(FAMILIES)) {
            let text = tree.read(file).unwrap();
            let Some(verb) = verb(&text) else { continue };
            families += 1;
            let files: Vec<String> = touched(&tree, file, verb).unwrap().into_iter().map(|(f, _)| f).collect();
            assert_eq!(files, [&format!("{FAMILIES}mod.rs"), "crates/methods/src/lib.rs"], "{verb}");
        }
        assert!(families >= 8, "{families} families");
    }

    #[test]
    fn a_verb_elsewhere_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let write = |file: &str, text: &str| {
            let path = folder.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        let (family, driver) = ("crates/methods/src/family/cut.rs", "crates/compress/src/drive.rs");
        write(family, "pub fn family() -> Family {\n    Family { verb: \"cut\", keys, make }\n}\n");
        write(driver, "// \"cut\" in a comment is no knowledge\nfn f() -> bool {\n    verb == \"cut\"\n}\n");
        let tree = Tree::of(folder.path(), &[family, driver]);
        let found = check(&tree).unwrap();
        assert_eq!(found.len(), 1);
        assert!(format!("{found:?}").contains("drive.rs"), "{found:?}");
    }
}
