//! What a file is, by its first bytes: its name only says what somebody called it.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::gguf;
use crate::json::without_mark;
use crate::safetensors::{self, MAX_HEADER};
use crate::{OpenError, TensorInfo};

/// Bytes looked at.
const HEAD: usize = 512;

/// What a file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Content {
    Gguf,
    Safetensors,
    Json,
    /// Text that is nothing else.
    Text,
    /// A zip archive or a bare pickle: what PyTorch writes.
    Pickle,
    /// Something that is known and not read.
    Other(&'static str),
    Unknown,
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Content::Gguf => "a GGUF file",
            Content::Safetensors => "a safetensors file",
            Content::Json => "JSON text",
            Content::Text => "a text",
            Content::Pickle => {
                "a zip archive or a file of Python pickles, as PyTorch's .bin, .pt and .pth are, which may run code \
                 and are not read; load the model \
                 where it came from and save it as safetensors"
            }
            Content::Other(what) => what,
            Content::Unknown => "of no known kind",
        })
    }
}

/// What the file at `path` holds.
pub(crate) fn look(path: &Path) -> Result<Content, OpenError> {
    let io = |source| OpenError::Io { file: path.display().to_string(), source };
    if path.is_dir() {
        return Err(OpenError::bad(path, "a directory, where a file is expected"));
    }
    let mut head = Vec::with_capacity(HEAD);
    File::open(path).and_then(|f| f.take(HEAD as u64).read_to_end(&mut head)).map_err(io)?;
    Ok(of(&head))
}

/// The files of a directory that could be weights, and what each holds; those of an adapter and hidden ones apart.
fn files(dir: &Path) -> Result<Vec<(PathBuf, Content)>, OpenError> {
    let io = |source| OpenError::Io { file: dir.display().to_string(), source };
    let mut out = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(io)? {
        let path = entry.map_err(io)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if path.is_file() && !name.starts_with('.') && !name.starts_with("adapter_") {
            let content = look(&path)?;
            out.push((path, content));
        }
    }
    out.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(out)
}

/// The only file of a directory that holds `content`; several are an error, since nobody can tell which is meant.
pub(crate) fn only(dir: &Path, content: Content) -> Result<Option<PathBuf>, OpenError> {
    let mut found: Vec<PathBuf> = files(dir)?.into_iter().filter(|f| f.1 == content).map(|f| f.0).collect();
    match found.len() {
        0 | 1 => Ok(found.pop()),
        n => {
            if content == Content::Gguf
                && let Some(first) = gguf::first_of(&found)
            {
                return Ok(Some(first.clone()));
            }
            let first = found[0].file_name().unwrap_or_default().to_string_lossy();
            let help = match (first.contains("-of-"), content) {
                (true, Content::Safetensors) => {
                    "model.safetensors.index.json, which says what lies in which, is missing"
                }
                _ => "name the one that is meant",
            };
            Err(OpenError::bad(dir, format!("{n} files here are each {content}, {first} the first; {help}")))
        }
    }
}

/// What a directory holds in the place of weights, in words: the first file that is known and not read.
pub(crate) fn others(dir: &Path) -> Result<Option<String>, OpenError> {
    let named = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let known = files(dir)?.into_iter().find(|f| matches!(f.1, Content::Pickle | Content::Other(_)));
    Ok(known.map(|(path, content)| format!("{} is {content}", named(&path))))
}

/// The tensors of the safetensors file at `path`, whose bytes are `file`; where it is something else, the error says
/// what.
pub(crate) fn safetensors(path: &Path, file: &[u8]) -> Result<Vec<TensorInfo>, OpenError> {
    safetensors::parse(file).map_err(|e| match of(file) {
        Content::Safetensors | Content::Unknown => OpenError::bad(path, e),
        other => OpenError::bad(path, format!("this is no safetensors file but {other}")),
    })
}

/// What a file holds that begins with, or is, `bytes`.
pub(crate) fn of(bytes: &[u8]) -> Content {
    let head = &bytes[..bytes.len().min(HEAD)];
    if let Some((n, rest)) = head.split_first_chunk::<8>()
        && u64::from_le_bytes(*n) <= MAX_HEADER as u64
        && rest.first() == Some(&b'{')
    {
        return Content::Safetensors;
    }
    let known = MAGIC.iter().find(|(magic, _)| head.starts_with(magic)).map(|m| m.1);
    if let Some(content) = known {
        return content;
    }
    let text = without_mark(head).trim_ascii_start();
    if text.is_empty() {
        return Content::Other("an empty file");
    }
    let begins = |word: &str| text.get(..word.len()).is_some_and(|t| t.eq_ignore_ascii_case(word.as_bytes()));
    if begins("version https://git-lfs") {
        return Content::Other("a git-LFS pointer to the file and not the file; git lfs pull fetches that");
    }
    if ["<!doctype html", "<html", "<head", "<?xml"].into_iter().any(begins) {
        return Content::Other("an HTML page, perhaps an error or a login that was saved under this name");
    }
    if head.get(257..262) == Some(b"ustar") {
        return Content::Other("a tar archive; unpack it");
    }
    match text[0] {
        b'{' | b'[' => Content::Json,
        _ if text.iter().all(|c| *c >= b' ' || c.is_ascii_whitespace()) => Content::Text,
        _ => Content::Unknown,
    }
}

const ARCHIVE: Content = Content::Other("a compressed archive; unpack it");
const OLD: Content = Content::Other("a GGML file from before GGUF; convert the model anew with today's llama.cpp");

/// How files begin.
const MAGIC: &[(&[u8], Content)] = &[
    (b"GGUF", Content::Gguf),
    // Of a big-endian machine.
    (b"FUGG", Content::Gguf),
    (b"lmgg", OLD),
    (b"fmgg", OLD),
    (b"tjgg", OLD),
    (b"PK\x03\x04", Content::Pickle),
    (b"\x80\x02", Content::Pickle),
    (b"\x80\x03", Content::Pickle),
    (b"\x80\x04", Content::Pickle),
    (b"\x80\x05", Content::Pickle),
    (b"\x1f\x8b", ARCHIVE),
    (b"\xfd7zXZ\0", ARCHIVE),
    (b"\x28\xb5\x2f\xfd", ARCHIVE),
    (b"BZh", ARCHIVE),
    (b"7z\xbc\xaf\x27\x1c", ARCHIVE),
    (
        b"\x89HDF\r\n",
        Content::Other("an HDF5 file, which is not read; load the model where it came from and save it as safetensors"),
    ),
    (b"\x93NUMPY", Content::Other("a NumPy array, which is no model")),
    (b"\xff\xfe", Content::Other("text in UTF-16; save it as UTF-8")),
    (b"\xfe\xff", Content::Other("text in UTF-16; save it as UTF-8")),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_known_by_how_they_begin() {
        let safetensors = [&20u64.to_le_bytes()[..], b"{\"__metadata__\":{}}  "].concat();
        assert_eq!(of(&safetensors), Content::Safetensors);
        assert_eq!(of(b"GGUF\x03\0\0\0"), Content::Gguf);
        assert_eq!(of(b"\xef\xbb\xbf \n{\"a\": 1}"), Content::Json);
        assert_eq!(of("Grüße\n".as_bytes()), Content::Text);
        assert_eq!(of(b"\x01\x02\x03"), Content::Unknown);
        // A header too long for any safetensors file.
        assert_eq!(of(b"\xff\xfe\xfd\xfc\xfb\xfa\xf9\xf8{"), Content::Other("text in UTF-16; save it as UTF-8"));
        let mut tar = vec![b'a'; 600];
        tar[257..262].copy_from_slice(b"ustar");
        for (bytes, word) in [
            (&b""[..], "empty"),
            (b" \n", "empty"),
            (b"PK\x03\x04\x14\0", "zip"),
            (b"\x80\x02}q\0", "pickle"),
            (b"\x1f\x8b\x08", "archive"),
            (b"version https://git-lfs.example/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
            (b"\n<!DOCTYPE HTML><html>", "HTML"),
            (b"<html lang=\"en\">", "HTML"),
            (&tar, "tar"),
            (b"lmgg\0", "before GGUF"),
        ] {
            let said = of(bytes).to_string();
            assert!(said.contains(word), "{said}");
        }
    }
}
