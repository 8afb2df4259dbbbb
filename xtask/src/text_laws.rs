//! Laws that a look at each file's text can hold.

use anyhow::Result;

use crate::finding::Finding;
use crate::source::{Source, is_test_file};
use crate::tree::Tree;

/// Files that may be long, each with its reason.
const LONG_FILES: &str = "xtask/long-files.txt";
/// Files outside the kernels that may say `unsafe`, each with its reason.
const UNSAFE_FILES: &str = "xtask/unsafe-files.txt";
/// The most lines of code in a file.
const MOST_LINES: usize = 500;

fn each_rust(tree: &Tree, mut law: impl FnMut(&str, &Source) -> Vec<Finding>) -> Result<Vec<Finding>> {
    let mut found = vec![];
    for file in tree.rust() {
        found.extend(law(file, &Source::parse(file, &tree.read(file)?)));
    }
    Ok(found)
}

/// Files stay short.
pub fn length(tree: &Tree) -> Result<Vec<Finding>> {
    let may = tree.exceptions(LONG_FILES)?;
    each_rust(tree, |file, source| too_long(file, source, &may))
}

fn too_long(file: &str, source: &Source, may: &[String]) -> Vec<Finding> {
    let lines = source.code_lines();
    if lines <= MOST_LINES || may.iter().any(|f| f == file) {
        return vec![];
    }
    let cure = format!("split it where it holds two ideas, or give {LONG_FILES} a line `{file} — REASON`");
    let what = format!("{lines} lines of code (comments, blanks and tests apart); {MOST_LINES} are the limit");
    vec![Finding::new(file, 0, "length", what, cure)]
}

/// `unsafe` lives in the kernels.
pub fn unsafe_code(tree: &Tree) -> Result<Vec<Finding>> {
    let may = tree.exceptions(UNSAFE_FILES)?;
    each_rust(tree, |file, source| unsafe_outside(file, source, &may))
}

fn unsafe_outside(file: &str, source: &Source, may: &[String]) -> Vec<Finding> {
    if file.starts_with("crates/kernels/") || may.iter().any(|f| f == file) {
        return vec![];
    }
    let cure =
        format!("do it in safe code, move it to crates/kernels, or give {UNSAFE_FILES} a line `{file} — REASON`");
    let what = "`unsafe` outside crates/kernels";
    source.find("unsafe").into_iter().map(|line| Finding::new(file, line, "unsafe", what, &cure)).collect()
}

/// Nothing unfinished and nothing silenced.
pub fn silenced(tree: &Tree) -> Result<Vec<Finding>> {
    each_rust(tree, unfinished)
}

fn unfinished(file: &str, source: &Source) -> Vec<Finding> {
    let laws = [
        ("todo!(", "finish it, or leave the feature out: a room without content is not built"),
        ("unimplemented!(", "finish it, or make the type system rule the case out"),
        ("dbg!(", "take it out, or make it a `tracing` event"),
        ("#[ignore", "a test either runs or is reported ignored with its reason by tests/models.rs"),
    ];
    let mut found = vec![];
    for (pattern, cure) in laws {
        let what = format!("`{pattern}` in committed code");
        found.extend(source.find(pattern).into_iter().map(|l| Finding::new(file, l, "silenced", what.clone(), cure)));
    }
    found
}

/// No tracked file names a machine's own folders or a private mirror of a registry.
pub fn machine_paths(tree: &Tree) -> Result<Vec<Finding>> {
    let mut found = vec![];
    for file in tree.files() {
        let bytes = std::fs::read(tree.root().join(file))?;
        // Binary files hold tensors; a NUL early on is git's own test.
        if !bytes[..bytes.len().min(8000)].contains(&0) {
            found.extend(names_a_machine(file, &String::from_utf8_lossy(&bytes)));
        }
    }
    Ok(found)
}

fn names_a_machine(file: &str, text: &str) -> Vec<Finding> {
    // In two halves each, so that this file keeps its own law.
    let patterns = [["/wo", "rk/"], ["/ro", "ot/"], ["/ho", "me/"], ["arti", "factory"]].map(|p| p.concat());
    let cure = "use a path from the top of the repository, a flag, or the package's public name";
    let mut found = vec![];
    for (i, line) in text.lines().enumerate() {
        let hit = patterns.iter().find(|p| {
            // A web address or a path of the repository may contain the same letters behind a name (`docs/home/x`).
            line.match_indices(p.as_str()).any(|(at, _)| !p.starts_with('/') || !line[..at].ends_with(is_name))
        });
        if let Some(p) = hit {
            found.push(Finding::new(file, i + 1, "paths", format!("'{p}' belongs to one machine"), cure));
        }
    }
    found
}

fn is_name(c: char) -> bool {
    c.is_alphanumeric() || "._-~".contains(c)
}

/// Whether the methods' laws should look at a file.
pub fn is_method_file(file: &str) -> bool {
    let mut parts = file.split('/');
    let head = [parts.next(), parts.next(), parts.next()];
    let (family, name) = (parts.next(), parts.next());
    head == [Some("crates"), Some("methods"), Some("src")]
        && parts.next().is_none()
        && family.is_some()
        && name.is_some_and(|n| n.ends_with(".rs") && n != "mod.rs")
        && !is_test_file(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(found: &[Finding]) -> Vec<usize> {
        found.iter().map(|f| f.brief().0).collect()
    }

    #[test]
    fn long_files_need_a_reason() {
        let text = "let x = 1;\n".repeat(501) + "\n// words\n";
        let source = Source::parse("a.rs", &text);
        assert_eq!(at(&too_long("a.rs", &source, &[])), [0]);
        assert!(too_long("a.rs", &source, &["a.rs".into()]).is_empty());
        assert!(too_long("a.rs", &Source::parse("a.rs", &"let x = 1;\n// why\n\n".repeat(500)), &[]).is_empty());
    }

    #[test]
    fn unsafe_stays_in_the_kernels() {
        let source = Source::parse("a.rs", "// unsafe\nfn f() {\n    unsafe { g() }\n}\n");
        assert_eq!(at(&unsafe_outside("crates/base/src/a.rs", &source, &[])), [3]);
        assert!(unsafe_outside("crates/kernels/src/a.rs", &source, &[]).is_empty());
        assert!(unsafe_outside("a.rs", &source, &["a.rs".into()]).is_empty());
        let denied = Source::parse("a.rs", "#![deny(unsafe_op_in_unsafe_fn)]\n#![forbid(unsafe_code)]\n");
        assert!(unsafe_outside("a.rs", &denied, &[]).is_empty());
    }

    #[test]
    fn nothing_unfinished() {
        let text = "fn f() {\n    todo!()\n}\n#[test]\n#[ignore = \"slow\"]\nfn t() {\n    dbg!(1);\n    \
         unimplemented!(\"x\")\n}\n";
        assert_eq!(at(&unfinished("a.rs", &Source::parse("a.rs", text))), [2, 8, 7, 5]);
        assert!(unfinished("a.rs", &Source::parse("a.rs", "// todo!() is refused\nlet s = \"dbg!(\";")).is_empty());
    }

    #[test]
    fn no_machine_is_named() {
        let home = ["see /ho", "me/me/model.gguf"].concat();
        let found = names_a_machine("README.md", &format!("fine\n{home}\n"));
        assert_eq!(at(&found), [2]);
        let elsewhere = ["docs/ho", "me/index.html and https://example.org/wo", "rk/x"].concat();
        assert!(names_a_machine("README.md", &elsewhere).is_empty());
        assert_eq!(at(&names_a_machine("a", &["(\"/wo", "rk/x\")"].concat())), [1]);
    }

    #[test]
    fn method_files_are_told_from_the_rest() {
        assert!(is_method_file("crates/methods/src/score/wanda.rs"));
        for other in [
            "crates/methods/src/lib.rs",
            "crates/methods/src/score/mod.rs",
            "crates/methods/tests/laws/a.rs",
            "src/main.rs",
        ] {
            assert!(!is_method_file(other), "{other}");
        }
    }
}
