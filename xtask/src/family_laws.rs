//! A family is known where it is made, and nowhere else.

use anyhow::Result;

use crate::finding::Finding;
use crate::source::Source;
use crate::tree::Tree;

const FAMILIES: &str = "crates/methods/src/family/";

const METHODS: &str = "crates/methods/";

/// Who works on recipes and could know a verb. (Elsewhere its letters are other words: RoPE has a `factor`.)
const WATCHED: [&str; 5] = ["crates/compress/", "crates/contract/", "crates/eval/", "crates/judge/", "src/"];

/// The verb that a family's file registers.
fn verb(text: &str) -> Option<&str> {
    let at = text.find("Family {")?;
    Some(text[at..].split_once("verb: \"")?.1.split_once('"')?.0)
}

/// The files outside a family's own and its methods' that must change for it.
fn touched(tree: &Tree, file: &str, verb: &str) -> Result<Vec<(String, usize)>> {
    let module = file.trim_start_matches(FAMILIES).trim_end_matches(".rs");
    // Literals are blank in `code`, so the verb is looked for in the lines themselves.
    let (literal, module) = (format!("\"{verb}\""), [format!("family::{module}::"), format!("mod {module};")]);
    let mut found = vec![];
    for other in tree.rust().filter(|f| *f != file) {
        let lists = other == "crates/methods/src/lib.rs" || other == format!("{FAMILIES}mod.rs");
        if !lists && (!WATCHED.iter().any(|w| other.starts_with(w)) || other.contains("/tests/")) {
            continue;
        }
        let text = tree.read(other)?;
        let source = Source::parse(other, &text);
        let hit = |((line, code), test): ((&str, &String), &bool)| {
            let named = lists && module.iter().any(|n| code.contains(n));
            let literal = line.find(&literal).is_some_and(|at| !line[..at].contains("//"));
            !test && (named || (literal && !lists))
        };
        if let Some(line) = text.lines().zip(&source.code).zip(&source.in_test).position(hit) {
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
        for (other, line) in touched(tree, file, verb)?.into_iter().filter(|(f, _)| !f.starts_with(METHODS)) {
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
