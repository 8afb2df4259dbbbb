//! The project's files as git knows them: tracked, or new and not ignored.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// The working tree.
pub struct Tree {
    root: PathBuf,
    files: Vec<String>,
}

impl Tree {
    /// The tree this xtask was built from.
    pub fn open() -> Result<Tree> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("xtask lies in no workspace")?.to_owned();
        let out = Command::new("git")
            .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
            .current_dir(&root)
            .output()
            .context("git did not start; the laws are held over the files that git tracks")?;
        if !out.status.success() {
            bail!("git ls-files failed in {}: {}", root.display(), String::from_utf8_lossy(&out.stderr).trim());
        }
        let names = String::from_utf8(out.stdout).context("a tracked file's name is not UTF-8")?;
        let files = names.split('\0').filter(|f| !f.is_empty() && root.join(f).is_file()).map(str::to_owned).collect();
        Ok(Tree { root, files })
    }

    /// A tree of the files below `root`, without git.
    #[cfg(test)]
    pub fn of(root: &Path, files: &[&str]) -> Tree {
        Tree { root: root.to_owned(), files: files.iter().map(|f| (*f).to_owned()).collect() }
    }

    /// Its top folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Paths from the top, with `/`.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        self.files.iter().map(String::as_str)
    }

    /// Rust files.
    pub fn rust(&self) -> impl Iterator<Item = &str> {
        self.files().filter(|f| f.ends_with(".rs"))
    }

    /// Whether there is such a file.
    pub fn has(&self, file: &str) -> bool {
        self.files().any(|f| f == file)
    }

    /// The text of a file.
    pub fn read(&self, file: &str) -> Result<String> {
        std::fs::read_to_string(self.root.join(file)).with_context(|| format!("cannot read {file}"))
    }

    /// The lines `PATH — REASON` of a list of exceptions; comments start with `#`. Each must name a file that exists.
    pub fn exceptions(&self, list: &str) -> Result<Vec<String>> {
        let mut paths = vec![];
        for (i, line) in self.read(list)?.lines().enumerate() {
            if line.trim().is_empty() || line.starts_with('#') {
                continue;
            }
            let Some((path, reason)) = line.split_once(" — ") else {
                bail!("{list}:{}: write `PATH — REASON`, not '{line}'", i + 1);
            };
            if reason.trim().is_empty() {
                bail!("{list}:{}: {path} stands here without its reason", i + 1);
            }
            if !self.has(path.trim()) {
                bail!("{list}:{}: there is no file {path}; take the line out", i + 1);
            }
            paths.push(path.trim().to_owned());
        }
        Ok(paths)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exception_needs_a_file_and_a_reason() {
        let dir = tempfile::tempdir().unwrap();
        let list = |text: &str| {
            std::fs::write(dir.path().join("list"), text).unwrap();
            Tree::of(dir.path(), &["a.rs", "list"]).exceptions("list").map_err(|e| e.to_string())
        };
        assert_eq!(list("# note\n\na.rs — it maps files\n"), Ok(vec!["a.rs".to_owned()]));
        assert!(list("a.rs — \n").unwrap_err().contains("without its reason"));
        assert!(list("a.rs\n").unwrap_err().contains("list:1"));
        assert!(list("b.rs — gone\n").unwrap_err().contains("no file b.rs"));
    }
}
