//! The model hub: what its own tools have cached on this machine, and downloads over HTTP.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;

use lacuna_base::json;
use serde_json::Value;

use crate::cache::{self, FileEntry, Slot};
use crate::http::{Fault, Http, Want};
use crate::{HubRef, Progress};

const ENDPOINT: &str = "https://huggingface.co";
const INDEX: &str = "model.safetensors.index.json";
/// What a checkpoint needs beside its weights, as far as a repository has it.
const COMPANIONS: &[&str] = &[
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "quantize_config.json",
    "quant_config.json",
    "hf_quant_config.json",
];
/// What an adapter is made of: its configuration and one of these, the first that is there.
const ADAPTER: &str = "adapter_config.json";
const ADAPTER_WEIGHTS: [&str; 2] = ["adapter_model.safetensors", "adapter_model.bin"];

/// How the hub's own tools are set up on this machine; their variables mean here what they mean there.
#[derive(Debug, Clone)]
pub(crate) struct Hub {
    pub(crate) endpoint: String,
    pub(crate) cache: Option<PathBuf>,
    pub(crate) token: Option<String>,
    pub(crate) offline: bool,
}

impl Hub {
    pub(crate) fn new(variable: impl Fn(&str) -> Option<String>, home: Option<PathBuf>) -> Self {
        let get = |name: &str| variable(name).map(|text| text.trim().to_string()).filter(|text| !text.is_empty());
        let caches = get("XDG_CACHE_HOME").map(PathBuf::from).or_else(|| Some(home?.join(".cache")));
        let hf_home = get("HF_HOME").map(PathBuf::from).or_else(|| Some(caches?.join("huggingface")));
        let cache = get("HF_HUB_CACHE").or_else(|| get("HUGGINGFACE_HUB_CACHE")).map(PathBuf::from);
        let token_file = get("HF_TOKEN_PATH").map(PathBuf::from).or_else(|| Some(hf_home.as_ref()?.join("token")));
        let stored = || fs::read_to_string(token_file?).ok();
        let token = get("HF_TOKEN").or_else(|| get("HUGGING_FACE_HUB_TOKEN")).or_else(stored);
        Self {
            endpoint: get("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.into()).trim_end_matches('/').into(),
            cache: cache.or_else(|| Some(hf_home?.join("hub"))),
            token: token.map(|text| text.trim().to_string()).filter(|text| !text.is_empty()),
            offline: get("HF_HUB_OFFLINE")
                .is_some_and(|on| ["1", "ON", "YES", "TRUE"].contains(&on.to_uppercase().as_str())),
        }
    }

    /// The folder of the hub's own cache that holds everything needed, and the files' names.
    pub(crate) fn cached(&self, model: &HubRef) -> Option<(PathBuf, Vec<String>)> {
        let repo = self.cache.as_ref()?.join(format!("models--{}", model.repo.replace('/', "--")));
        let revision = model.revision.as_deref().unwrap_or("main");
        let commit = fs::read_to_string(repo.join("refs").join(revision)).unwrap_or_else(|_| revision.to_string());
        let commit = commit.trim();
        if !cache::is_flat_name(commit) {
            return None;
        }
        let dir = repo.join("snapshots").join(commit);
        if let Some(file) = &model.file {
            // One part of a model stands for all, where all are there.
            let whole = parts(file).unwrap_or_else(|| vec![file.clone()]);
            return whole.iter().all(|file| dir.join(file).is_file()).then(|| (dir, vec![file.clone()]));
        }
        // A link whose target is gone, or not there yet, is not a file.
        let entries = fs::read_dir(&dir).ok()?.flatten().filter(|entry| entry.path().is_file());
        let mut names: BTreeSet<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        let templates = fs::read_dir(dir.join(cache::TEMPLATES)).into_iter().flatten().flatten();
        let templates = templates.filter(|entry| entry.path().is_file());
        names.extend(templates.filter_map(|t| Some(format!("{}/{}", cache::TEMPLATES, t.file_name().to_str()?))));
        let files = select(&names, None, || fs::read(dir.join(INDEX)).map_err(|error| error.to_string())).ok()?;
        // A configuration that another tool fetched alone is not a checkpoint yet.
        let whole = |name: &String| {
            name.starts_with("tokenizer.") || name.ends_with(".gguf") || ADAPTER_WEIGHTS.contains(&name.as_str())
        };
        let whole = files.iter().any(whole);
        whole.then_some((dir, files))
    }

    /// Downloads what is needed and says at which commit.
    pub(crate) fn fetch(
        &self,
        http: &Http,
        model: &HubRef,
        slot: &Slot,
        progress: &dyn Progress,
    ) -> Result<(String, Vec<FileEntry>), String> {
        let token = self.token.as_deref();
        let refused = |fault: Fault| match fault {
            Fault::Status(401 | 403) if token.is_some() => {
                format!(
                    "{fault}: the token given has no access to {} (is it gated? accept its terms on its page)",
                    model.repo
                )
            }
            Fault::Status(401 | 403) => {
                format!("{fault}: {} is private, gated or does not exist; a token in HF_TOKEN may help", model.repo)
            }
            Fault::Status(404) => format!("{fault}: no repository {} or no such revision or file", model.repo),
            other => other.to_string(),
        };
        let revision = model.revision.as_deref().unwrap_or("main");
        let url =
            format!("{}/api/models/{}/revision/{}?blobs=true", self.endpoint, model.repo, escape(revision, false));
        let info = http.json(&url, token).map_err(refused)?;
        let known = read_listing(&info);
        if known.is_empty() {
            return Err(format!("the hub's answer for {} lists no files", model.repo));
        }
        // One commit for all files, even if the branch moves meanwhile.
        let commit = info["sha"].as_str().filter(|sha| sha.len() == 40 && sha.bytes().all(|c| c.is_ascii_hexdigit()));
        let commit = commit.unwrap_or(revision);

        let mut done: Vec<FileEntry> = Vec::new();
        let get = |path: &str| -> Result<FileEntry, String> {
            let (bytes, sha256) = known.get(path).cloned().unwrap_or_default();
            let name = if is_template(path) { path } else { path.rsplit('/').next().unwrap_or(path) };
            if let Some(entry) = sha256.as_deref().and_then(|sha256| slot.present(name, sha256)) {
                return Ok(entry);
            }
            let url =
                format!("{}/{}/resolve/{}/{}", self.endpoint, model.repo, escape(commit, false), escape(path, true));
            let temporary = slot.temporary(path, sha256.as_deref());
            let want = Want { url: &url, token, name, bytes };
            http.download(&want, &temporary, progress).map_err(|fault| format!("{name}: {}", refused(fault)))?;
            slot.install(&temporary, name, bytes, sha256.as_deref())
        };
        let names = known.keys().cloned().collect();
        let files = select(&names, model.file.as_deref(), || {
            done.push(get(INDEX)?);
            fs::read(slot.dir.join(INDEX)).map_err(|error| error.to_string())
        })?;
        for path in files.into_iter().filter(|path| done.is_empty() || path != INDEX).collect::<Vec<_>>() {
            done.push(get(&path)?);
        }
        done.sort_by(|a, b| a.name.cmp(&b.name));
        Ok((format!("hf:{}@{commit}", model.repo), done))
    }
}

/// The repository's files with their sizes and, for the large ones, their sha256.
fn read_listing(info: &Value) -> BTreeMap<String, (Option<u64>, Option<String>)> {
    let files = info["siblings"].as_array().into_iter().flatten();
    let facts = files.filter_map(|file| {
        let name = file["rfilename"].as_str()?;
        let sha256 = file["lfs"]["sha256"].as_str().filter(|sha| cache::is_sha256(sha)).map(str::to_string);
        let bytes = file["lfs"]["size"].as_u64().or_else(|| file["size"].as_u64());
        name.split('/').all(cache::is_flat_name).then(|| (name.to_string(), (bytes, sha256)))
    });
    facts.collect()
}

/// The files wanted of those a repository has: the one named, or else a safetensors checkpoint, or else its only GGUF
/// file.
fn select(
    names: &BTreeSet<String>,
    file: Option<&str>,
    read_index: impl FnOnce() -> Result<Vec<u8>, String>,
) -> Result<Vec<String>, String> {
    let ending = |end: &str| -> Vec<String> { names.iter().filter(|name| name.ends_with(end)).cloned().collect() };
    let ggufs = ending(".gguf");
    if let Some(file) = file {
        let models = [ggufs, ending(".safetensors")].concat();
        return match names.contains(file) {
            true => all_parts(names, file),
            false => Err(format!("there is no file {file}; the model files there: {}", some_of(&models))),
        };
    }
    let adapter = ADAPTER_WEIGHTS.into_iter().find(|name| names.contains(*name));
    if let Some(weights) = adapter.filter(|_| names.contains(ADAPTER) && !names.contains("config.json")) {
        return Ok([ADAPTER, weights].map(str::to_string).to_vec());
    }
    let weights: Vec<String> = if names.contains(INDEX) {
        let index = read_index()?;
        let index = json::strict(json::without_mark(&index)).map_err(|error| format!("{INDEX}: {error}"))?;
        let index: Value = serde_json::from_slice(&index).map_err(|error| format!("{INDEX}: {error}"))?;
        let map = index["weight_map"].as_object().ok_or_else(|| format!("{INDEX} holds no weight_map"))?;
        let shards: BTreeSet<&str> = map.values().filter_map(Value::as_str).collect();
        if let Some(missing) = shards.iter().find(|shard| !names.contains(**shard) || !cache::is_flat_name(shard)) {
            return Err(format!("{INDEX} names {missing}, which is not there"));
        }
        shards.into_iter().map(str::to_string).chain([INDEX.to_string()]).collect()
    } else if names.contains("model.safetensors") {
        vec!["model.safetensors".into()]
    } else {
        let weights: Vec<String> = ending(".safetensors").into_iter().filter(|name| !name.contains('/')).collect();
        if weights.iter().any(|name| name.contains("-of-")) {
            return Err(format!("the weights are in parts ({}) without {INDEX}", some_of(&weights)));
        }
        weights
    };
    if names.contains("config.json") && !weights.is_empty() {
        let companions = COMPANIONS.iter().map(|name| name.to_string()).filter(|name| names.contains(name));
        let templates = names.iter().filter(|name| is_template(name)).cloned();
        return Ok(companions.chain(templates).chain(weights).collect());
    }
    match ggufs.as_slice() {
        [one] => Ok(vec![one.clone()]),
        [first, rest @ ..] if parts(first).is_some_and(|all| rest.iter().all(|file| all.contains(file))) => {
            all_parts(names, first)
        }
        [] => Err("there is neither a config.json with *.safetensors nor a .gguf file".into()),
        many => Err(format!("there are {} GGUF files; name one, as hf:org/repo:FILE: {}", many.len(), some_of(many))),
    }
}

/// All parts of a model of which `file` is one by its name, `NAME-00001-of-00003.gguf`.
fn parts(file: &str) -> Option<Vec<String>> {
    let rest = file.strip_suffix(".gguf")?;
    let (rest, count) = rest.rsplit_once("-of-")?;
    let (start, number) = rest.rsplit_once('-')?;
    let five = |text: &str| text.len() == 5 && text.bytes().all(|c| c.is_ascii_digit());
    let all = count.parse::<u32>().ok().filter(|_| five(count) && five(number))?;
    Some((1..=all).map(|i| format!("{start}-{i:05}-of-{count}.gguf")).collect())
}

/// The file, or all parts of the model of which it is one.
fn all_parts(names: &BTreeSet<String>, file: &str) -> Result<Vec<String>, String> {
    let all = parts(file).unwrap_or_else(|| vec![file.into()]);
    match all.iter().find(|part| !names.contains(*part)) {
        None => Ok(all),
        Some(missing) => Err(format!("{missing} is not there, and the model is in {} parts", all.len())),
    }
}

/// Whether this is one of the chat templates that lie in a folder of their own.
fn is_template(name: &str) -> bool {
    name.ends_with(".jinja") && cache::is_name(name) && !cache::is_flat_name(name)
}

fn some_of(names: &[String]) -> String {
    let more = if names.len() > 12 { format!(" and {} more", names.len() - 12) } else { String::new() };
    if names.is_empty() { "none".into() } else { format!("{}{more}", names[..names.len().min(12)].join(", ")) }
}

fn escape(text: &str, slash: bool) -> String {
    let plain = |c: u8| c.is_ascii_alphanumeric() || b"-._~".contains(&c) || (slash && c == b'/');
    text.bytes().map(|c| if plain(c) { (c as char).to_string() } else { format!("%{c:02X}") }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adapters_and_what_lies_beside_quantized_models() {
        let of = |names: &[&str]| {
            let names = names.iter().map(|name| name.to_string()).collect();
            select(&names, None, || Err("there is no index".into())).map(|files| files.join(" "))
        };
        let adapter = ["README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"];
        assert_eq!(of(&adapter).as_deref(), Ok("adapter_config.json adapter_model.safetensors"));
        let gptq = ["config.json", "model.safetensors", "quantize_config.json"];
        assert_eq!(of(&gptq).as_deref(), Ok("config.json quantize_config.json model.safetensors"));
        let old = ["adapter_config.json", "adapter_model.bin"];
        assert_eq!(of(&old).as_deref(), Ok("adapter_config.json adapter_model.bin"));
        assert_eq!(of(&[old[1], adapter[1], adapter[2]]).as_deref(), of(&adapter).as_deref());
        // A pickle of a whole model is nothing to fetch.
        assert!(of(&["config.json", "pytorch_model.bin"]).is_err());
        assert!(of(&["config.json", "adapter_model.bin"]).is_err());
    }

    #[test]
    fn one_part_of_a_model_stands_for_all() {
        let part = |i: usize| format!("a/m-{i:05}-of-00002.gguf");
        let of = |names: &[String], file: Option<&str>| {
            select(&names.iter().cloned().collect(), file, || Err("there is no index".into()))
        };
        let both = [part(1), part(2)];
        assert_eq!(of(&both, Some(&part(2))).as_deref(), Ok(&both[..]));
        assert_eq!(of(&both, None).as_deref(), Ok(&both[..]));
        let more = [part(1), part(2), "other.gguf".into()];
        assert!(of(&more, None).unwrap_err().contains("name one"));
        assert_eq!(of(&more, Some("other.gguf")).as_deref(), Ok(&more[2..]));
        assert!(of(&both[..1], Some(&part(1))).unwrap_err().contains("m-00002-of-00002.gguf"));
    }

    #[test]
    fn templates_lie_in_a_folder() {
        let names = [
            "config.json",
            "model.safetensors",
            "additional_chat_templates/tool_use.jinja",
            "additional_chat_templates/notes.txt",
            "additional_chat_templates/a/b.jinja",
            "other/x.jinja",
        ];
        let names = names.iter().map(|name| name.to_string()).collect();
        let files = select(&names, None, || Err("there is no index".into())).unwrap();
        assert_eq!(files, ["config.json", "additional_chat_templates/tool_use.jinja", "model.safetensors"]);
    }

    /// A byte order mark, and numbers that only Python writes.
    #[test]
    fn an_index_is_read_as_python_reads_it() {
        let text = "\u{feff}{\"metadata\": {\"total_size\": NaN}, \"weight_map\": {\"a\": \"w-1.safetensors\"}}";
        let names = ["config.json", INDEX, "w-1.safetensors"].iter().map(|name| name.to_string()).collect();
        let files = select(&names, None, || Ok(text.into())).unwrap();
        assert_eq!(files, ["config.json", "w-1.safetensors", INDEX]);
        let broken = select(&names, None, || Ok(b"{\"weight_map\": nan}".to_vec())).unwrap_err();
        assert!(broken.starts_with(INDEX), "{broken}");
    }
}
