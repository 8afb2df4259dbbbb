//! One paper, one file, in one order.

use anyhow::Result;

use crate::finding::Finding;
use crate::source::Source;
use crate::text_laws::is_method_file;
use crate::tree::Tree;

/// The lines of a header, in order.
const HEADER: [&str; 5] = ["Paper", "Idea", "Shapes", "Cost", "Departs"];

/// The questions whose answer makes a file a method.
const QUESTIONS: [&str; 20] = [
    "Recode",
    "Stack",
    "Score",
    "Grid",
    "Solve",
    "Table",
    "Factor",
    "Ranks",
    "Transform",
    "Basis",
    "Structure",
    "Shortlist",
    "Search",
    "Select",
    "SelectPrompt",
    "Keep",
    "Gate",
    "Draft",
    "Update",
    "Dictionary",
];

/// Folders of questions that are asked while a model runs.
const RUN_TIME: [&str; 4] = ["draft", "keep", "select", "gate"];

/// Holds the laws over every file of a method.
pub fn check(tree: &Tree) -> Result<Vec<Finding>> {
    let mut found = vec![];
    for file in tree.files().filter(|f| is_method_file(f)) {
        let text = tree.read(file)?;
        found.extend(in_file(file, &text));
        // What runs beside a model, not before it, is named by a run plan, not by a recipe.
        let runs = RUN_TIME.iter().any(|q| file.contains(&format!("/{q}/")));
        if let Some((line, name)) = card_name(&text).filter(|_| !runs) {
            let recipe = format!("recipes/{name}.toml");
            let text = if tree.has(&recipe) { Some(tree.read(&recipe)?) } else { None };
            found.extend(recipe_names(file, line, &name, text.as_deref()));
        }
    }
    Ok(found)
}

/// Header, order and proof of one file.
pub fn in_file(file: &str, text: &str) -> Vec<Finding> {
    let source = Source::parse(file, text);
    let finding = |line, what: String, cure: &str| Finding::new(file, line, "methods", what, cure);

    let code = |hit: &dyn Fn(&str) -> bool| {
        let lines = source.code.iter().zip(&source.in_test).enumerate();
        lines.filter(|(_, (l, test))| !**test && hit(l)).map(|(i, _)| i + 1).next()
    };
    let sections = [
        ("the parameters' struct", code(&|l| l.contains("struct "))),
        ("the card", code(&|l| l.contains("Card {") || l.contains("Card =") || l.contains("-> Card"))),
        ("the answer (`impl QUESTION for ...`)", code(&|l| QUESTIONS.iter().any(|q| l.contains(&format!("{q} for "))))),
        ("the tests (`#[cfg(test)]`)", source.find("#[cfg(test)]").first().copied()),
    ];
    if sections[1].1.is_none() && sections[2].1.is_none() {
        // What the methods of a family share; it answers no question itself.
        return vec![];
    }
    let mut found = header(file, text);
    let cure = "keep the order: header, parameters, card, answer, tests";
    for (name, line) in &sections {
        if line.is_none() {
            found.push(finding(0, format!("{name} is missing"), cure));
        }
    }
    for pair in sections.windows(2) {
        if let [(first, Some(a)), (second, Some(b))] = pair
            && a > b
        {
            found.push(finding(*b, format!("{second} stands before {first}"), cure));
        }
    }
    if !text.contains("deny_unknown_fields") {
        let cure = "put `#[serde(default, deny_unknown_fields)]` on the parameters' struct, even if it is empty";
        found.push(finding(sections[0].1.unwrap_or(0), "unknown keys of a recipe would pass unseen".into(), cure));
    }
    let words = |l: &str| ["brute", "definition"].iter().any(|w| l.to_lowercase().contains(w));
    let proof = text.lines().zip(&source.in_test).any(|(l, test)| *test && words(l));
    if sections[3].1.is_some() && !proof {
        let cure = "write the definition out slowly in a test (its name or comment says `brute` or `definition`) and \
         compare on small shapes";
        found.push(finding(sections[3].1.unwrap_or(0), "no test compares with a brute-force version".into(), cure));
    }
    if let Some((line, name)) = card_name(text)
        && !file.ends_with(&format!("/{}.rs", name.replace('-', "_")))
    {
        found.push(finding(line, format!("the card says \"{name}\", the file another name"), "let both say the same"));
    }
    found
}

/// The `//!` lines on top.
fn header(file: &str, text: &str) -> Vec<Finding> {
    let head: Vec<&str> = text.lines().map_while(|l| l.strip_prefix("//!")).map(str::trim).collect();
    let starts = |l: &str, word: &str| l.trim_start_matches(['*', '#', '-', ' ']).starts_with(word);
    let cure = format!("start a `//!` line with each of {}, in this order", HEADER.join(", "));
    let mut found = vec![];
    let mut before = 0;
    for word in HEADER {
        match head.iter().position(|l| starts(l, word)) {
            None => found.push((1, format!("the header's line '{word}' is missing"))),
            Some(i) if i < before => found.push((i + 1, format!("the header's line '{word}' stands out of order"))),
            Some(i) => before = i,
        }
    }
    let mut found: Vec<Finding> =
        found.into_iter().map(|(line, what)| Finding::new(file, line, "methods", what, &cure)).collect();
    if head.first().is_none_or(|l| l.is_empty() || HEADER.iter().any(|w| l.starts_with(w))) {
        let cure = "say in one sentence on the first `//!` line what the method does";
        found.push(Finding::new(file, 1, "methods", "the header does not start with a sentence", cure));
    }
    found
}

/// The name on the card, with its line.
fn card_name(text: &str) -> Option<(usize, String)> {
    let line = |l: &str| Some(l.trim().strip_prefix("name: \"")?.split_once('"')?.0.to_owned());
    text.lines().enumerate().find_map(|(i, l)| line(l).map(|name| (i + 1, name)))
}

/// A method's recipe exists and uses it.
fn recipe_names(file: &str, line: usize, name: &str, recipe: Option<&str>) -> Vec<Finding> {
    let what = match recipe {
        None => format!("there is no recipes/{name}.toml"),
        Some(text) if !text.contains(&format!("method = \"{name}\"")) => {
            format!("recipes/{name}.toml has no step with method = \"{name}\"")
        }
        Some(_) => return vec![],
    };
    let cure = format!("write recipes/{name}.toml with a step that uses it");
    vec![Finding::new(file, line, "methods", what, cure)]
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"//! Keeps what is large.
//!
//! Paper: A. Author, 2020, arXiv:0000.00000.
//! Idea: S = |W|.
//! Shapes: W is [out, in].
//! Cost: O(out * in).
//! Departs: nowhere.

/// Parameters: none.
#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Large {}

/// The card.
pub const CARD: Card = Card {
    name: "large",
};

impl Score for Large {}

#[cfg(test)]
mod tests {
    fn brute_force() {}
}
"#;
    const FILE: &str = "crates/methods/src/score/large.rs";

    fn what(text: &str) -> Vec<String> {
        in_file(FILE, text).iter().map(|f| f.brief().1.to_owned()).collect()
    }

    #[test]
    fn a_file_in_order_passes() {
        assert_eq!(what(GOOD), Vec::<String>::new());
        let markdown = GOOD.replace("//! Paper:", "//! * **Paper**:");
        assert_eq!(what(&markdown), Vec::<String>::new());
    }

    #[test]
    fn the_header_has_its_five_lines_in_order() {
        assert_eq!(what(&GOOD.replace("//! Cost: O(out * in).\n", "")), ["the header's line 'Cost' is missing"]);
        let moved =
            GOOD.replace("//! Cost: O(out * in).\n", "").replace("//! Paper", "//! Cost: O(out * in).\n//! Paper");
        assert_eq!(what(&moved), ["the header's line 'Cost' stands out of order"]);
        assert_eq!(
            what(&GOOD.replace("//! Keeps what is large.\n//!\n", "")),
            ["the header does not start with a sentence"]
        );
    }

    #[test]
    fn sections_stand_in_order() {
        let card_last = GOOD.replace("pub const CARD: Card = Card {\n    name: \"large\",\n};\n\n", "").replace(
            "impl Score for Large {}\n",
            "impl Score for Large {}\n\npub const CARD: Card = Card {\n    name: \"large\",\n};\n",
        );
        assert_eq!(what(&card_last), ["the answer (`impl QUESTION for ...`) stands before the card"]);
        assert_eq!(
            what(&GOOD.replace("impl Score for", "impl Colour of")),
            ["the answer (`impl QUESTION for ...`) is missing"]
        );
        assert_eq!(what(&GOOD.replace(", deny_unknown_fields", "")), ["unknown keys of a recipe would pass unseen"]);
    }

    #[test]
    fn what_methods_share_is_no_method() {
        assert_eq!(what("//! The walk that two methods share.\n\npub fn walk() {}\n"), Vec::<String>::new());
    }

    #[test]
    fn proof_is_by_brute_force() {
        assert_eq!(what(&GOOD.replace("brute_force", "smoke")), ["no test compares with a brute-force version"]);
        let without = GOOD.split("#[cfg(test)]").next().unwrap();
        assert_eq!(what(without), ["the tests (`#[cfg(test)]`) is missing"]);
    }

    #[test]
    fn card_file_and_recipe_agree() {
        assert_eq!(what(&GOOD.replace("\"large\"", "\"huge\"")), ["the card says \"huge\", the file another name"]);
        assert!(recipe_names(FILE, 1, "large", Some("method = \"large\"")).is_empty());
        assert_eq!(recipe_names(FILE, 1, "large", None)[0].brief().1, "there is no recipes/large.toml");
        let other = recipe_names(FILE, 1, "large", Some("method = \"larger\""));
        assert_eq!(other[0].brief().1, "recipes/large.toml has no step with method = \"large\"");
    }
}
