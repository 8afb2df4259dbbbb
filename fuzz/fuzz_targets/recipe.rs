//! Recipes: any text is a recipe or an error, and a recipe written out and read again says the same.
#![no_main]

use std::sync::OnceLock;

use lacuna_compress::Recipe;
use lacuna_contract::Registry;
use libfuzzer_sys::fuzz_target;

static REGISTRY: OnceLock<Registry> = OnceLock::new();

// The first line, where it begins with `#!`, is an override as `--set` gives it; the rest is the recipe.
fuzz_target!(|data: &str| {
    let registry = REGISTRY.get_or_init(lacuna_methods::registry);
    let (sets, text) = match data.strip_prefix("#!").and_then(|rest| rest.split_once('\n')) {
        Some((set, text)) => (vec![set.to_owned()], text),
        None => (vec![], data),
    };
    let Ok(recipe) = Recipe::parse(text, registry, &sets) else { return };
    let resolved = toml::to_string(&recipe.resolved).expect("what was read can be written");
    let again = Recipe::parse(&resolved, registry, &[]).expect("a resolved recipe parses");
    assert_eq!(again.resolved, recipe.resolved);
    assert_eq!(again.steps.len(), recipe.steps.len());
});
