//! The start of a new method: its file in the fixed order, its line in the lists, its recipe. It compiles; its test
//! fails until it is filled.

use anyhow::{Context, Result, bail};

use crate::tree::Tree;

/// What a question's methods are asked, in the words of `lacuna_contract`.
struct Question {
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

const QUESTIONS: [Question; 6] = [
    Question {
        name: "score",
        question: "Score",
        verb: "prune",
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
    Question {
        name: "grid",
        question: "Grid",
        verb: "quantize",
        uses: &["GridAsk"],
        answer: "    fn fit(&self, values: &[f32], ask: &GridAsk) -> Result<Affine, MethodError> {
        EMPTY
    }",
        call: "fit(&[-1.0, 0.5], &GridAsk { bits: 4, symmetric: true, scale: Float::F32 })",
        step: "bits = 4\ngroup = 64\nsymmetric = true\nscale = \"f16\"\n",
    },
    Question {
        name: "solve",
        question: "Solve",
        verb: "prune",
        uses: &["SolveAsk", "Solved"],
        answer: "    fn solve(&self, ask: &SolveAsk<'_>) -> Result<Solved, MethodError> {
        EMPTY
    }",
        call: "solve(&SolveAsk { w: random(3, 4, 1).view(), stats: &Stats::default(), mask: None, prune: None, round: \
         None })",
        step: "sparsity = 0.5\npattern = \"unstructured\"\n",
    },
    Question {
        name: "factor",
        question: "Factor",
        verb: "factor",
        uses: &["Stats"],
        answer:
            "    fn factor(&self, w: MatRef<'_>, stats: &Stats<'_>, rank: usize) -> Result<(Mat, Mat), MethodError> {
        EMPTY
    }",
        call: "factor(random(3, 4, 1).view(), &Stats::default(), 2)",
        step: "keep = 0.8\n",
    },
    Question {
        name: "structure",
        question: "Structure",
        verb: "structure",
        uses: &["Compete", "StructureAsk"],
        answer: "    fn score(&self, ask: &StructureAsk<'_>) -> Result<Vec<f64>, MethodError> {
        EMPTY
    }

    fn compete(&self) -> Compete {
        Compete::Layer
    }

    fn keeps_means(&self) -> bool {
        false
    }",
        call: "score(&StructureAsk { unit: Unit::Channel, layer: 0, count: 4, width: 1, reader: None, writers: &[], \
         stats: Stats::default() })",
        step: "sparsity = 0.2\n",
    },
    Question {
        name: "search",
        question: "Search",
        verb: "search",
        uses: &["Assignment", "Lab", "SearchAsk"],
        answer: "    fn search(&self, lab: &mut dyn Lab, ask: &SearchAsk) -> Result<Assignment, MethodError> {
        EMPTY
    }",
        call: "search(&mut Bench::new(3, 4, 1), &SearchAsk { budget_bytes: 2000, trials: 9, tokens: 2, seed: 0 })",
        step: "step = \"prune\"\nkey = \"sparsity\"\nvalues = [0.4, 0.5, 0.6]\ntarget = 0.5\n\n[[step]]\nname = \
         \"prune\"\nmethod = \"wanda\"\nsparsity = 0.5\n",
    },
];

/// Writes the method's file and recipe and puts it into the two lists.
pub fn write(tree: &Tree, question: &str, name: &str) -> Result<()> {
    if question == "family" {
        return write_family(tree, name);
    }
    let known = QUESTIONS.iter().find(|f| f.name == question).with_context(|| {
        let names: Vec<&str> = QUESTIONS.iter().map(|f| f.name).collect();
        format!("'{question}' is no question that can be started; these are: {}, and family", names.join(", "))
    })?;
    check_name(name)?;
    let module = name.replace('-', "_");
    let folder = format!("crates/methods/src/{question}");
    let (file, list, registry) =
        (format!("{folder}/{module}.rs"), format!("{folder}/mod.rs"), "crates/methods/src/lib.rs");
    let recipe = format!("recipes/{name}.toml");
    let list_text = tree.read(&list)? + &format!("pub(crate) mod {module};\n");
    let registry_text = registered(&tree.read(registry)?, "methods", &format!("{question}::{module}::method(),"))?;
    write_all(
        tree,
        &[
            (&file, method(known, name), true),
            (&recipe, recipe_text(known, name), true),
            (&list, list_text, false),
            (registry, registry_text, false),
        ],
    )?;
    println!("next: fill {file}, then `cargo test --workspace --lib {module}`");
    Ok(())
}

/// Writes a family's file and puts it into the two lists.
fn write_family(tree: &Tree, name: &str) -> Result<()> {
    check_name(name)?;
    let module = name.replace('-', "_");
    let (file, list, registry) = (
        format!("crates/methods/src/family/{module}.rs"),
        "crates/methods/src/family/mod.rs",
        "crates/methods/src/lib.rs",
    );
    let list_text = tree.read(list)?;
    let Some(at) = list_text.find("pub(crate) mod ") else { bail!("{list} has no list of modules") };
    let list_text = format!("{}pub(crate) mod {module};\n{}", &list_text[..at], &list_text[at..]);
    let registry_text = registered(&tree.read(registry)?, "families", &format!("family::{module}::family(),"))?;
    write_all(tree, &[(&file, family(name), true), (list, list_text, false), (registry, registry_text, false)])?;
    println!("next: fill {file}, then start a method whose card says verb: \"{name}\"");
    Ok(())
}

fn check_name(name: &str) -> Result<()> {
    if name.is_empty()
        || !name.starts_with(|c: char| c.is_ascii_lowercase())
        || !name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
    {
        bail!(
            "'{name}' is no name for a method: a small letter, then small letters, digits and hyphens, like \"svd-llm\""
        );
    }
    Ok(())
}

/// Writes files, each with whether it must be new; nothing is written where one is in the way.
fn write_all(tree: &Tree, all: &[(&str, String, bool)]) -> Result<()> {
    for (path, _, fresh) in all {
        if *fresh && tree.root().join(path).exists() {
            bail!("{path} exists already");
        }
    }
    for (path, text, _) in all {
        std::fs::write(tree.root().join(path), text).with_context(|| format!("cannot write {path}"))?;
        println!("wrote {path}");
    }
    Ok(())
}

/// The registry with one more line at the end of one of its lists.
fn registered(text: &str, list: &str, line: &str) -> Result<String> {
    let from = text.find(&format!("        {list}: vec![\n"));
    let end = from.and_then(|from| Some(from + text[from..].find("\n        ],")?));
    let end = end.with_context(|| format!("the registry has no list `{list}: vec![ ... ]`"))?;
    Ok(format!("{}\n            {line}{}", &text[..end], &text[end..]))
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

fn method(asked: &Question, name: &str) -> String {
    let (kind, question) = (type_name(name), asked.question);
    let empty = format!("Err(MethodError::new(\"{name} has no answer yet\"))");
    let answer = asked.answer.replace("EMPTY", &empty);
    let mut uses = vec!["Card", "Made", "Method", "MethodError", question];
    uses.extend(asked.uses);
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
    if asked.call.contains("random(") {
        test_imports += "    use lacuna_base::testkit::random;\n";
    }
    if asked.call.contains("Stats::default()") && !asked.uses.contains(&"Stats") {
        test_imports += "    use lacuna_contract::Stats;\n";
    }
    if asked.call.contains("Bench::") {
        test_imports += "    use crate::search::testkit::Bench;\n";
    }
    if asked.call.contains("Unit::") {
        test_imports += "    use lacuna_contract::Unit;\n";
    }
    if asked.call.contains("Float::") {
        test_imports += "    use lacuna_format::Float;\n";
    }
    let (verb, call) = (asked.verb, asked.call);
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
            system: None,
            verb: \"{verb}\",
            needs: &[],
            abilities: &[],
        }},
        keys: make::keys::<{kind}>,
        make: |given| Ok(Made::{question}(Box::new(make::parameters::<{kind}>(\"{name}\", given)?))),
    }}
}}

impl {question} for {kind} {{
{answer}
}}

#[cfg(test)]
mod tests {{
{test_imports}
    /// Replace this by a brute-force version straight from the definition, on small random shapes with ties, zero
    /// columns and one column.
    #[test]
    fn agrees_with_brute_force() {{
        let answer = {kind} {{}}.{call};
        assert!(answer.is_ok(), \"{{:?}}\", answer.err());
    }}
}}
"
    )
}

/// A family that works on single matrices, as most do.
fn family(name: &str) -> String {
    let kind = type_name(name);
    format!(
        "\
//! `{name}`: one sentence, what it does with its methods' answers.

use lacuna_contract::{{Ask, Card, Edit, Family, Left, Local, Making, MethodError, Step, Work}};
use lacuna_format::Unpacked;
use lacuna_spec::Place;
use serde::Deserialize;

use crate::make;

/// What the methods share, each with its unit and range.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Keys {{}}

pub(crate) fn family() -> Family {{
    Family {{ verb: \"{name}\", keys: make::keys::<Keys>, make: make_step }}
}}

struct {kind} {{
    card: Card,
}}

fn make_step(making: &Making<'_>) -> Result<Step, MethodError> {{
    let (Keys {{}}, _answers) = make::split::<Keys>(making)?;
    Ok(Step::Local(Box::new({kind} {{ card: making.method.card.clone() }})))
}}

impl Local for {kind} {{
    fn together(&self) -> bool {{
        false
    }}

    fn needs(&self, _: &Place) -> Vec<Ask> {{
        self.card.needs.to_vec()
    }}

    fn check(&self, _: (usize, usize), _: &[Left]) -> Result<Left, MethodError> {{
        Err(MethodError::new(\"{name} has no edit yet\"))
    }}

    fn foretell(&self, sample: Unpacked, _: u64) -> Result<Unpacked, MethodError> {{
        Ok(sample)
    }}

    fn scratch_bytes(&self, (rows, cols): (usize, usize)) -> u64 {{
        8 * rows as u64 * cols as u64
    }}

    fn edit(&self, work: Vec<Work<'_>>) -> Result<Vec<Edit>, MethodError> {{
        Ok(work.into_iter().map(|w| Edit::Matrix(w.place, w.matrix)).collect())
    }}
}}
"
    )
}

fn recipe_text(family: &Question, name: &str) -> String {
    let verb = family.verb;
    format!(
        "# One sentence: what the result is.
version = 1
calibration = {{ samples = 32, seq_len = 1024, seed = 0 }}
rest = \"source\"

[[step]]
name = \"{verb}\"
method = \"{name}\"
{}",
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
        let lists =
            ["crates/methods/src/factor/mod.rs", "crates/methods/src/lib.rs", "crates/methods/src/family/mod.rs"];
        std::fs::write(dir.path().join(lists[0]), "//! Factors.\n\npub(crate) mod svd;\n").unwrap();
        let registry = "pub fn registry() -> Registry {\n    Registry {\n        methods: vec![\n            \
         factor::svd::method(),\n        ],\n        \
                        families: vec![\n            family::factor::family(),\n        ],\n    }\n}\n";
        std::fs::write(dir.path().join(lists[1]), registry).unwrap();
        std::fs::create_dir_all(dir.path().join("crates/methods/src/family")).unwrap();
        std::fs::write(dir.path().join(lists[2]), "//! Families.\n\npub(crate) mod factor;\nmod keys;\n").unwrap();
        let tree = Tree::of(dir.path(), &lists);
        (dir, tree)
    }

    #[test]
    fn a_started_method_keeps_the_laws_of_its_file() {
        for family in &QUESTIONS {
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
        let line = "            factor::svd::method(),\n            factor::new_one::method(),\n        ],";
        assert!(registry.contains(line), "{registry}");
        // A family: its file and its two lines, nothing else.
        write(&tree, "family", "fold-away").unwrap();
        assert!(read("crates/methods/src/family/fold_away.rs").contains("impl Local for FoldAway"));
        let list = read("crates/methods/src/family/mod.rs");
        assert!(list.contains("pub(crate) mod fold_away;\npub(crate) mod factor;"), "{list}");
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
