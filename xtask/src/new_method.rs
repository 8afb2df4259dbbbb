//! The start of a new method: its file in the fixed order, its line in the lists, its recipe. It compiles; its test fails until it is filled.

use anyhow::{Context, Result, bail};

use crate::tree::Tree;

/// What a family asks, in the words of `lacuna_contract`.
struct Family {
    name: &'static str,
    question: &'static str,
    verb: &'static str,
    /// What the answer's signature uses.
    uses: &'static [&'static str],
    /// The question's functions, answering with an error.
    answer: &'static str,
    /// A test's call, giving a `Result`.
    call: &'static str,
    /// Keys of a recipe's step.
    step: &'static str,
}

const TARGETS: &str = "targets = [\"attn.*\", \"ffn.*\"]\n";

const FAMILIES: [Family; 6] = [
    Family {
        name: "score",
        question: "Score",
        verb: "Prune",
        uses: &["Scope", "Stats"],
        answer: "    fn score(&self, w: MatRef<'_>, stats: &Stats<'_>) -> Result<Mat, MethodError> {
        EMPTY
    }

    fn scope(&self) -> Scope {
        Scope::Row
    }",
        call: "score(random(3, 4, 1).view(), &Stats::default())",
        step: "sparsity = 0.5\npattern = \"unstructured\"\n",
    },
    Family {
        name: "grid",
        question: "Grid",
        verb: "Quantize",
        uses: &["GridAsk"],
        answer: "    fn fit(&self, values: &[f32], ask: &GridAsk) -> Result<Affine, MethodError> {
        EMPTY
    }",
        call: "fit(&[-1.0, 0.5], &GridAsk { bits: 4, symmetric: true, scale: Float::F32 })",
        step: "bits = 4\ngroup = 64\nsymmetric = true\nscale = \"f16\"\n",
    },
    Family {
        name: "solve",
        question: "Solve",
        verb: "Prune",
        uses: &["SolveAsk", "Solved"],
        answer: "    fn solve(&self, ask: &SolveAsk<'_>) -> Result<Solved, MethodError> {
        EMPTY
    }",
        call: "solve(&SolveAsk { w: random(3, 4, 1).view(), stats: &Stats::default(), mask: None, prune: None, round: None })",
        step: "sparsity = 0.5\npattern = \"unstructured\"\n",
    },
    Family {
        name: "factor",
        question: "Factor",
        verb: "Factor",
        uses: &["Stats"],
        answer: "    fn factor(&self, w: MatRef<'_>, stats: &Stats<'_>, rank: usize) -> Result<(Mat, Mat), MethodError> {
        EMPTY
    }",
        call: "factor(random(3, 4, 1).view(), &Stats::default(), 2)",
        step: "keep = 0.8\n",
    },
    Family {
        name: "drop",
        question: "Drop",
        verb: "Drop",
        uses: &["DropPart", "DropStats"],
        answer: "    fn drop(&self, part: DropPart, count: usize, stats: &DropStats<'_>) -> Result<Vec<usize>, MethodError> {
        EMPTY
    }",
        call: "drop(DropPart::Block, 1, &DropStats { similarity: &[Some(0.5), Some(0.9)] })",
        step: "part = \"block\"\ncount = 1\n",
    },
    Family {
        name: "budget",
        question: "Budget",
        verb: "Budget",
        uses: &["Outcome", "Slot"],
        answer: "    fn ask(&mut self, slots: &[Slot], target: f64) -> Result<Option<Vec<f64>>, MethodError> {
        EMPTY
    }

    fn tell(&mut self, assignment: &[f64], outcome: &Outcome) {}",
        call: "ask(&[], 0.5)",
        step: "step = \"prune\"\n\n[[step]]\nname = \"prune\"\nmethod = \"wanda\"\nsparsity = 0.5\n",
    },
];

/// Writes the method's file and recipe and puts it into the two lists.
pub fn write(tree: &Tree, family: &str, name: &str) -> Result<()> {
    let known = FAMILIES.iter().find(|f| f.name == family).with_context(|| {
        let names: Vec<&str> = FAMILIES.iter().map(|f| f.name).collect();
        format!("'{family}' is no family that can be started; these are: {}", names.join(", "))
    })?;
    if name.is_empty()
        || !name.starts_with(|c: char| c.is_ascii_lowercase())
        || !name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
    {
        bail!(
            "'{name}' is no name for a method: a small letter, then small letters, digits and hyphens, like \"svd-llm\""
        );
    }
    let module = name.replace('-', "_");
    let folder = format!("crates/methods/src/{family}");
    let (file, list, registry) =
        (format!("{folder}/{module}.rs"), format!("{folder}/mod.rs"), "crates/methods/src/lib.rs");
    let recipe = format!("recipes/{name}.toml");
    for there in [&file, &recipe] {
        if tree.root().join(there).exists() {
            bail!("{there} exists already");
        }
    }
    let list_text = tree.read(&list)? + &format!("pub(crate) mod {module};\n");
    let registry_text = registered(&tree.read(registry)?, &format!("{family}::{module}::method(),"))
        .with_context(|| format!("{registry} has no list that ends with `    ]`"))?;
    for (path, text) in [
        (&file, method(known, name)),
        (&recipe, recipe_text(known, name)),
        (&list, list_text),
        (&registry.to_owned(), registry_text),
    ] {
        std::fs::write(tree.root().join(path), text).with_context(|| format!("cannot write {path}"))?;
        println!("wrote {path}");
    }
    println!("next: fill {file}, then `cargo test -p lacuna-methods {module}`");
    Ok(())
}

/// The registry with one more line at its end.
fn registered(text: &str, line: &str) -> Option<String> {
    let end = text.rfind("\n    ]\n")?;
    Some(format!("{}\n        {line}{}", &text[..end], &text[end..]))
}

fn type_name(name: &str) -> String {
    let mut up = true;
    let mut out = String::new();
    for c in name.chars() {
        if c == '-' {
            up = true;
        } else {
            out.push(if up { c.to_ascii_uppercase() } else { c });
            up = false;
        }
    }
    out
}

fn method(family: &Family, name: &str) -> String {
    let (kind, question) = (type_name(name), family.question);
    let empty = format!("Err(MethodError::new(\"{name} has no answer yet\"))");
    let answer = family.answer.replace("EMPTY", &empty);
    let mut uses = vec!["Card", "Made", "Method", "MethodError", "Needs", question, "Verb"];
    uses.extend(family.uses);
    uses.sort_unstable();
    let needs = |word: &str| answer.contains(word);
    let mut imports = String::new();
    match (needs("Mat,"), needs("MatRef")) {
        (true, _) => imports += "use lacuna_base::{Mat, MatRef};\n",
        (_, true) => imports += "use lacuna_base::MatRef;\n",
        _ => {}
    }
    imports += &format!("use lacuna_contract::{{{}}};\n", uses.join(", "));
    if needs("Affine") {
        imports += "use lacuna_format::Affine;\n";
    }
    let mut test_imports = String::from("    use super::*;\n");
    if family.call.contains("random(") {
        test_imports += "    use lacuna_base::testkit::random;\n";
    }
    if family.call.contains("Stats::default()") && !family.uses.contains(&"Stats") {
        test_imports += "    use lacuna_contract::Stats;\n";
    }
    if family.call.contains("Float::") {
        test_imports += "    use lacuna_format::Float;\n";
    }
    let (verb, call) = (family.verb, family.call);
    format!(
        "\
//! One sentence: what {name} does.
//!
//! **Paper.** Authors, \"title\", year, arXiv id.
//!
//! **Idea.** The formula, letters as in the paper.
//!
//! **Shapes and units.** Of every input and output.
//!
//! **Cost.** In time and in memory.
//!
//! **Departs.** Each difference from the paper, and why.

{imports}use serde::Deserialize;

use crate::make;

/// The paper's parameters, each with its unit and range.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct {kind} {{}}

pub(crate) fn method() -> Method {{
    Method {{
        card: Card {{
            name: \"{name}\",
            paper: \"\",
            arxiv: \"\",
            summary: \"\",
            verb: Verb::{verb},
            needs: Needs::default(),
        }},
        make: |given| Ok(Made::{question}(Box::new(make::parameters::<{kind}>(\"{name}\", given)?))),
    }}
}}

impl {question} for {kind} {{
{answer}
}}

#[cfg(test)]
mod tests {{
{test_imports}
    /// Replace this by a brute-force version straight from the definition, on small random shapes with ties, zero columns and one column.
    #[test]
    fn agrees_with_brute_force() {{
        let answer = {kind} {{}}.{call};
        assert!(answer.is_ok(), \"{{:?}}\", answer.err());
    }}
}}
"
    )
}

fn recipe_text(family: &Family, name: &str) -> String {
    let verb = family.verb.to_lowercase();
    let targets = if ["drop", "budget"].contains(&family.name) { "" } else { TARGETS };
    format!(
        "# One sentence: what the result is.
version = 1
calibration = {{ samples = 32, seq_len = 1024, seed = 0 }}
rest = \"source\"

[[step]]
name = \"{verb}\"
method = \"{name}\"
{targets}{}",
        family.step
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::method_laws;

    fn house() -> (tempfile::TempDir, Tree) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("crates/methods/src/factor")).unwrap();
        std::fs::create_dir_all(dir.path().join("recipes")).unwrap();
        let lists = ["crates/methods/src/factor/mod.rs", "crates/methods/src/lib.rs"];
        std::fs::write(dir.path().join(lists[0]), "//! Factors.\n\npub(crate) mod svd;\n").unwrap();
        let registry = "pub fn registry() -> Vec<Method> {\n    vec![\n        factor::svd::method(),\n    ]\n}\n";
        std::fs::write(dir.path().join(lists[1]), registry).unwrap();
        let tree = Tree::of(dir.path(), &lists);
        (dir, tree)
    }

    #[test]
    fn a_started_method_keeps_the_laws_of_its_file() {
        for family in &FAMILIES {
            let file = format!("crates/methods/src/{}/new_one.rs", family.name);
            assert_eq!(method_laws::in_file(&file, &method(family, "new-one")), [], "{}", family.name);
            assert!(recipe_text(family, "new-one").contains("method = \"new-one\""));
        }
    }

    #[test]
    fn file_recipe_and_both_lists_are_written_once() {
        let (dir, tree) = house();
        write(&tree, "factor", "new-one").unwrap();
        let read = |f: &str| std::fs::read_to_string(dir.path().join(f)).unwrap();
        assert!(read("crates/methods/src/factor/new_one.rs").contains("impl Factor for NewOne"));
        assert!(read("recipes/new-one.toml").contains("keep = 0.8"));
        assert!(read("crates/methods/src/factor/mod.rs").ends_with("pub(crate) mod svd;\npub(crate) mod new_one;\n"));
        let registry = read("crates/methods/src/lib.rs");
        assert!(registry.contains("factor::svd::method(),\n        factor::new_one::method(),\n    ]"), "{registry}");
        assert!(write(&tree, "factor", "new-one").unwrap_err().to_string().contains("exists already"));
    }

    #[test]
    fn wrong_names_are_refused() {
        let (_dir, tree) = house();
        for (family, name) in [("cellar", "x"), ("factor", "X"), ("factor", ""), ("factor", "../x"), ("factor", "-x")] {
            assert!(write(&tree, family, name).is_err(), "{family} {name}");
        }
    }
}
