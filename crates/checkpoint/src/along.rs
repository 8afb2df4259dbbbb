//! What a model takes along beside its weights: the tokenizer's files, chat templates, settings of generation.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use crate::template::{DIR_OF_NAMED, named_files};
use crate::tokenizer::shortened_files;
use crate::writer::io_at;
use crate::{Checkpoint, Kind, SaveError};

/// Files beside the weights that a model takes along, unchanged where all its tokens stay.
pub(crate) const SIDE_FILES: &[&str] = &[
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
];

/// Files for a packed model: names and contents. `kept`: the source's tokens that stay, where not all do; of a GGUF file
/// its tokenizer's metadata alone.
pub(crate) fn files(source: &Checkpoint, kept: Option<&[usize]>) -> Result<Vec<(String, Vec<u8>)>, SaveError> {
    if let Some(kept) = kept {
        return shortened_files(source, kept, false).map_err(|e| SaveError::Refused(e.to_string()));
    }
    let mut out: Vec<(String, Vec<u8>)> = Vec::new();
    out.extend(source.tokenizer_gguf()?.map(|bytes| ("tokenizer.gguf".into(), bytes)));
    if source.kind() == Kind::Gguf {
        return Ok(out);
    }
    for name in SIDE_FILES {
        let path = source.dir().join(name);
        if path.is_file() {
            out.push(((*name).into(), fs::read(&path).map_err(io_at(&path))?));
        }
    }
    Ok(out)
}

/// The templates that have files of their own in one directory, into another.
pub(crate) fn copy_named_templates(from: &Path, to: &Path) -> Result<(), SaveError> {
    let files = named_files(from).map_err(io_at(&from.join(DIR_OF_NAMED)))?;
    let to = to.join(DIR_OF_NAMED);
    for (i, (name, path)) in files.iter().enumerate() {
        if i == 0 {
            fs::create_dir_all(&to).map_err(io_at(&to))?;
        }
        let target = to.join(format!("{name}.jinja"));
        let copy = || -> io::Result<()> {
            fs::copy(path, &target)?;
            File::open(&target)?.sync_all()
        };
        copy().map_err(io_at(path))?;
    }
    Ok(())
}
