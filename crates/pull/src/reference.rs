//! What a MODEL argument may say.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::pinned::{self, Pinned};
use crate::{Error, cache};

/// A parsed MODEL argument.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelRef {
    /// A name from the pinned list.
    Pinned(&'static Pinned),
    /// `hf:org/repo[@revision][:file]`.
    Hub(HubRef),
    /// `pypi:package==version`.
    Package {
        /// The package's name.
        package: String,
        /// Its exact version.
        version: String,
    },
    /// A file or directory of this machine.
    Path(PathBuf),
}

/// A repository of the hub, or one file of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubRef {
    /// `org/repo`.
    pub repo: String,
    /// Branch, tag or commit; `main` where none was given.
    pub revision: Option<String>,
    /// One file; where none was given, the set of files a checkpoint needs.
    pub file: Option<String>,
}

impl ModelRef {
    /// Reads a MODEL argument. A path that exists wins over every other reading; a text with a slash or an
    /// extension is a path; another bare word must be a pinned name.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let bad = |why: &str| Error::BadReference { text: text.to_string(), why: why.to_string() };
        if text.is_empty() {
            return Err(bad("it is empty"));
        }
        if Path::new(text).exists() {
            return Ok(Self::Path(text.into()));
        }
        if let Some((scheme, address)) = text.split_once("://")
            && ["http", "https"].contains(&scheme)
        {
            return Err(bad(&match of_address(address) {
                Some(hub) => format!("it is an address; this repository of the hub is written {hub}"),
                None => {
                    "it is an address; a repository of the hub is written hf:org/repo[@revision][:file], any other \
                 file has to be \
                         downloaded first"
                        .to_string()
                }
            }));
        }
        if let Some(rest) = text.strip_prefix("hf:") {
            return parse_hub(rest).map(Self::Hub).map_err(bad);
        }
        if let Some(rest) = text.strip_prefix("pypi:") {
            let (package, version) =
                rest.split_once("==").ok_or_else(|| bad("write pypi:package==version, with an exact version"))?;
            // These go onto another program's command line: nothing that could read as an option or a second
            // requirement.
            if !is_word(package, "._-") {
                return Err(bad(
                    "the package's name may hold letters, digits and . _ - and starts with a letter or digit",
                ));
            }
            if !is_word(version, "._-+!") {
                return Err(bad(
                    "the version may hold letters, digits and . _ - + ! and starts with a letter or digit",
                ));
            }
            return Ok(Self::Package { package: package.into(), version: version.into() });
        }
        if let Some(model) = pinned::by_name(text) {
            return Ok(Self::Pinned(model));
        }
        if text.contains(['/', '\\']) || Path::new(text).extension().is_some() {
            return Ok(Self::Path(text.into()));
        }
        let known = pinned::PINNED.iter().map(|model| model.name).collect::<Vec<_>>().join(", ");
        Err(Error::UnknownName { name: text.to_string(), known })
    }

    /// The folder's name in the cache: readable, and distinct for distinct references.
    /// `None` for a path, which is never copied into the cache.
    pub fn cache_name(&self) -> Option<String> {
        match self {
            Self::Pinned(model) => Some(model.name.to_string()),
            Self::Path(_) => None,
            Self::Hub(_) | Self::Package { .. } => {
                let text = self.to_string();
                let keep = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' };
                let readable: String = text.chars().map(keep).take(100).collect();
                Some(format!("{readable}-{}", &cache::sha256_of_bytes(text.as_bytes())[..8]))
            }
        }
    }
}

impl fmt::Display for ModelRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pinned(model) => f.write_str(model.name),
            Self::Hub(hub) => hub.fmt(f),
            Self::Package { package, version } => write!(f, "pypi:{package}=={version}"),
            Self::Path(path) => path.display().fmt(f),
        }
    }
}

impl fmt::Display for HubRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "hf:{}", self.repo)?;
        if let Some(revision) = &self.revision {
            write!(f, "@{revision}")?;
        }
        if let Some(file) = &self.file {
            write!(f, ":{file}")?;
        }
        Ok(())
    }
}

/// What may have been meant by a path that leads nowhere.
pub(crate) fn meant(path: &Path) -> Option<HubRef> {
    let text = path.to_str()?;
    let file = ["gguf", "safetensors", "bin", "pt", "pth", "json"];
    let is_file = path.extension().is_some_and(|end| file.iter().any(|f| end.eq_ignore_ascii_case(f)));
    let repository = || parse_hub(text).ok().filter(|hub| hub.file.is_some() || !is_file);
    let host = text.split('/').next().is_some_and(|host| host.contains('.') && !host.starts_with('.'));
    of_address(text).filter(|_| host).or_else(repository)
}

/// The repository, or its file, that a web address without its scheme shows: `host/org/repo`, `.../tree/revision`,
/// `.../blob/revision/file` and the like.
fn of_address(address: &str) -> Option<HubRef> {
    let path = address.split(['?', '#']).next()?.split_once('/')?.1.trim_end_matches('/');
    let parts: Vec<String> = path.split('/').map(decoded).collect::<Option<_>>()?;
    let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
    let (org, repo, revision, file) = match parts.as_slice() {
        ["datasets" | "spaces" | "api" | "models", ..] => return None,
        [org, repo] => (org, repo, "main", None),
        [org, repo, "tree", revision, ..] => (org, repo, *revision, None),
        [org, repo, "blob" | "resolve" | "raw", revision, file @ ..] if !file.is_empty() => {
            (org, repo, *revision, Some(file.join("/")))
        }
        _ => return None,
    };
    let revision = if revision == "main" { String::new() } else { format!("@{revision}") };
    let file = file.map_or_else(String::new, |file| format!(":{file}"));
    // What is told to be written must be readable.
    parse_hub(&format!("{org}/{repo}{revision}{file}")).ok()
}

/// A part of an address with its `%2F` and the like read.
fn decoded(part: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(part.len());
    let mut rest = part.as_bytes();
    while let Some((&c, after)) = rest.split_first() {
        let escaped = (c == b'%').then(|| after.first_chunk::<2>()).flatten();
        let value = escaped.and_then(|two| u8::from_str_radix(std::str::from_utf8(two).ok()?, 16).ok());
        bytes.push(value.unwrap_or(c));
        rest = if value.is_some() { &after[2..] } else { after };
    }
    String::from_utf8(bytes).ok()
}

fn parse_hub(rest: &str) -> Result<HubRef, &'static str> {
    let (place, file) = match rest.split_once(':') {
        Some((place, file)) => (place, Some(file)),
        None => (rest, None),
    };
    let (repo, revision) = match place.split_once('@') {
        Some((repo, revision)) => (repo, Some(revision)),
        None => (place, None),
    };
    let (org, name) = repo.split_once('/').ok_or("write hf:org/repo, hf:org/repo@revision or hf:org/repo:file")?;
    if !is_word(org, "._-") || !is_word(name, "._-") {
        return Err(
            "an organisation and a repository may hold letters, digits and . _ - and start with a letter or digit",
        );
    }
    let segments_are_words = |text: &str| text.split('/').all(|part| is_word(part, "._-"));
    if !revision.is_none_or(segments_are_words) {
        return Err("the revision is a branch, a tag or a commit, of letters, digits and . _ - /");
    }
    if !file.is_none_or(|file| file.split('/').all(cache::is_flat_name)) {
        return Err("the file is a path inside the repository, without empty parts, . or ..");
    }
    Ok(HubRef { repo: repo.into(), revision: revision.map(Into::into), file: file.map(Into::into) })
}

fn is_word(text: &str, also: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || also.contains(c))
        && !text.contains("..")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hub(text: &str) -> HubRef {
        match ModelRef::parse(text) {
            Ok(ModelRef::Hub(hub)) => hub,
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn every_form_is_read_and_written_back() {
        for text in [
            "smollm2-135m-instruct",
            "gemma-3-270m",
            "hf:org/repo",
            "hf:org/repo@v1.0",
            "hf:org/repo:sub/a.gguf",
            "hf:org/repo@refs/pr/1:a.gguf",
            "pypi:some-package==1.0.0",
            "no/such/file",
            "model.gguf",
        ] {
            assert_eq!(ModelRef::parse(text).unwrap().to_string(), text);
        }
        let full = hub("hf:a/b.c@dev:x y.gguf");
        assert_eq!((full.repo.as_str(), full.revision.as_deref()), ("a/b.c", Some("dev")));
        assert_eq!(full.file.as_deref(), Some("x y.gguf"));
    }

    #[test]
    fn an_unknown_word_lists_what_is_known() {
        let message = ModelRef::parse("gemma").unwrap_err().to_string();
        for part in ["`gemma`", "smollm2-135m-instruct", "gemma-3-270m", "hf:org/repo", "pypi:", "path"] {
            assert!(message.contains(part), "{message}");
        }
    }

    #[test]
    fn what_people_paste_is_told_how_to_write() {
        for (address, written) in [
            ("org/name", "hf:org/name"),
            ("org/name/", "hf:org/name"),
            ("org/name/tree/main", "hf:org/name"),
            ("org/name/tree/v1.0/sub", "hf:org/name@v1.0"),
            ("org/name/tree/refs%2Fpr%2F1", "hf:org/name@refs/pr/1"),
            ("org/name/resolve/main/a-Q4_K_M.gguf?download=true", "hf:org/name:a-Q4_K_M.gguf"),
            ("org/name/blob/0123abc/sub/x%20y.gguf#L1", "hf:org/name@0123abc:sub/x y.gguf"),
        ] {
            let at = |scheme: &str| format!("{scheme}hub.example/{address}");
            for scheme in ["https://", "http://"] {
                let said = ModelRef::parse(&at(scheme)).unwrap_err().to_string();
                assert!(said.ends_with(&format!(" written {written}")), "{said}");
            }
            assert_eq!(meant(Path::new(&at(""))).unwrap().to_string(), written);
            assert_eq!(ModelRef::parse(written).unwrap().to_string(), written);
        }
        for other in
            ["datasets/org/name", "org", "", "org/name/discussions/1", "org/name/blob/main", "-x/name", "a/%ff"]
        {
            let said = ModelRef::parse(&format!("https://hub.example/{other}")).unwrap_err().to_string();
            assert!(said.contains("hf:org/repo[@revision][:file]"), "{said}");
        }
        let said = |path: &str| crate::local(Path::new(path)).unwrap_err().to_string();
        assert!(said("meta-llama/Llama-3.2-1B").ends_with("write hf:meta-llama/Llama-3.2-1B"));
        assert!(said("org/name:q8.gguf").ends_with("write hf:org/name:q8.gguf"));
        for path in ["models/x.gguf", "no/such/file", "./x", "/no/such"] {
            assert!(!said(path).contains("hf:"), "{path}");
        }
    }

    #[test]
    fn unusable_texts_are_refused() {
        for text in [
            "",
            "hf:repo",
            "hf:",
            "hf:a/",
            "hf:/b",
            "hf:a/b/c",
            "hf:a/..",
            "hf:a/b@",
            "hf:a/b@..",
            "hf:a/b@x/../y",
            "hf:a/b:",
            "hf:a/b:../x",
            "hf:a/b:/etc/passwd",
            "hf:a/b:x\\..\\y",
            "pypi:a",
            "pypi:a==",
            "pypi:==1",
            "pypi:-r==1",
            "pypi:a b==1",
            "pypi:a==1 --index-url",
            "pypi:a>=1",
        ] {
            assert!(matches!(ModelRef::parse(text), Err(Error::BadReference { .. })), "{text}");
        }
    }

    #[test]
    fn an_existing_path_wins() {
        // Tests run in the crate's folder.
        assert_eq!(ModelRef::parse("src").unwrap(), ModelRef::Path("src".into()));
    }

    #[test]
    fn cache_names_are_flat_and_distinct() {
        let name = |text: &str| ModelRef::parse(text).unwrap().cache_name().unwrap();
        assert_ne!(name("hf:a/b-c"), name("hf:a-b/c"));
        assert_ne!(name("hf:a/b"), name("hf:a/b@main"));
        assert!(cache::is_flat_name(&name("hf:a/b@refs/pr/1:x/y.gguf")));
        assert_eq!(name("gemma-3-270m"), "gemma-3-270m");
    }

    proptest! {
        #[test]
        fn parsing_never_panics(text in "(hf:|pypi:|https://h/)?[%/@:.\\PC]{0,40}") {
            if let Ok(model) = ModelRef::parse(&text) {
                prop_assert!(model.cache_name().is_none_or(|name| cache::is_flat_name(&name)));
            }
        }
    }
}
