//! `pull`: fetch, list, remove.

use std::path::Path;
use std::process::ExitCode;

use lacuna_base::units::show_bytes;
use serde_json::json;

use crate::cli::{Global, Pull, PullWhat};
use crate::common::{self, Usage};

/// What `pull list` and `pull rm` call the rounded models that the gate keeps.
const BASELINES: &str = "baselines";

/// Runs the verb.
pub fn run(g: &Global, a: &Pull) -> anyhow::Result<ExitCode> {
    match (&a.what, &a.model) {
        (Some(PullWhat::List), _) => {
            let all = lacuna_pull::list(g.cache_dir.as_deref())?;
            let rows: Vec<_> =
                all.iter().map(|c| json!({ "name": c.name, "path": c.path, "bytes": c.bytes })).collect();
            let (path, bytes) = lacuna_judge::kept_baselines(&common::cache_dir(g)?);
            let out = json!({ "models": rows, "baselines": { "path": path, "bytes": bytes } });
            common::print(g, &out, || {
                let line = |name: &str, bytes, path: &Path| {
                    format!("{name:<32} {:>10}  {}\n", show_bytes(bytes), path.display())
                };
                let mut page: String = all.iter().map(|c| line(&c.name, c.bytes, &c.path)).collect();
                if bytes > 0 {
                    page += &line(BASELINES, bytes, &path);
                }
                if all.is_empty() {
                    page += "no model is in the cache; try: lacuna pull smollm2-135m-instruct\n";
                }
                page
            })?;
        }
        (Some(PullWhat::Rm { name }), _) => {
            let bytes = match name.as_str() {
                BASELINES => lacuna_judge::remove_baselines(&common::cache_dir(g)?)?,
                name => lacuna_pull::remove(g.cache_dir.as_deref(), name)?,
            };
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
