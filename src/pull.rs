//! `pull`: fetch, list, remove.

use std::process::ExitCode;

use lacuna_base::units::show_bytes;
use lacuna_pull::Cached;
use serde_json::json;

use crate::cli::{Global, Pull, PullWhat};
use crate::common::{self, Usage};

/// Runs the verb.
pub fn run(g: &Global, a: &Pull) -> anyhow::Result<ExitCode> {
    match (&a.what, &a.model) {
        (Some(PullWhat::List), _) => {
            let all = lacuna_pull::list(g.cache_dir.as_deref())?;
            let rows: Vec<_> =
                all.iter().map(|c| json!({ "name": c.name, "path": c.path, "bytes": c.bytes })).collect();
            common::print(g, &json!({ "models": rows }), || {
                if all.is_empty() {
                    return "the cache is empty; try: lacuna pull smollm2-135m-instruct\n".into();
                }
                let line = |c: &Cached| format!("{:<32} {:>10}  {}\n", c.name, show_bytes(c.bytes), c.path.display());
                all.iter().map(line).collect()
            })?;
        }
        (Some(PullWhat::Rm { name }), _) => {
            let bytes = lacuna_pull::remove(g.cache_dir.as_deref(), name)?;
            common::print(g, &json!({ "removed": name, "bytes": bytes }), || {
                format!("removed {name}, {}\n", show_bytes(bytes))
            })?;
        }
        (None, Some(model)) => {
            let p = common::pull(g, model)?;
            let out = json!({ "model": model, "path": p.path, "files": p.files, "from_cache": p.from_cache, "source": p.source });
            common::print(g, &out, || format!("{}\n", p.path.display()))?;
        }
        (None, None) => return Err(Usage("which model? for example: lacuna pull smollm2-135m-instruct".into()).into()),
    }
    Ok(ExitCode::SUCCESS)
}
