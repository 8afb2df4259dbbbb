//! A GGUF file in several parts, `NAME-00001-of-00003.gguf` and so on: the first holds the metadata, each some of the
//! tensors, and keys in each say which part it is.

use std::path::{Path, PathBuf};

use super::{Gguf, GgufError, Metadata, fail};

/// Most parts: what five digits can say.
const MOST: u64 = 99_999;

/// What a part says about itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Part {
    /// `split.no`, from 0 on.
    pub number: usize,
    /// `split.count`.
    pub count: usize,
    /// `split.tensors.count`: of all parts together.
    pub tensors: u64,
}

impl Part {
    /// Of a file's keys; `None` for a file that is whole.
    pub fn of(metadata: &Metadata) -> Result<Option<Part>, GgufError> {
        let Some(count) = metadata.get_u64("split.count")?.filter(|n| *n > 1) else { return Ok(None) };
        let need = |key: &str| match metadata.get_u64(key)? {
            Some(n) => Ok(n),
            None => fail(format!("one of {count} parts of a split GGUF file without {key}")),
        };
        let (number, tensors) = (need("split.no")?, need("split.tensors.count")?);
        if count > MOST || number >= count {
            return fail(format!(
                "split.no is {number} and split.count {count}; parts are counted from 0, at most {MOST}"
            ));
        }
        Ok(Some(Part { number: number as usize, count: count as usize, tensors }))
    }
}

/// The beginning of a name of the form `NAME-00002-of-00003.gguf`, and its two numbers.
fn named(name: &str) -> Option<(&str, usize, usize)> {
    let rest = name.strip_suffix(".gguf")?;
    let (rest, count) = rest.rsplit_once("-of-")?;
    let (start, number) = rest.rsplit_once('-')?;
    let five = |text: &str| -> Option<usize> {
        (text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit())).then(|| text.parse().ok())?
    };
    Some((start, five(number)?, five(count)?))
}

/// Where all parts lie of which the file at `path` is one, the first first.
pub(crate) fn siblings(path: &Path, part: Part) -> Result<Vec<PathBuf>, GgufError> {
    let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    let Part { number, count, .. } = part;
    let Some((start, _, _)) = named(name).filter(|n| (n.1, n.2) == (number + 1, count)) else {
        let want = format!("-{:05}-of-{count:05}.gguf", number + 1);
        return fail(format!(
            "part {} of {count} of a split GGUF file: by its name, which would end in {want}, the others cannot be \
             found; name all parts as they were",
            number + 1
        ));
    };
    Ok((1..=count).map(|i| path.with_file_name(format!("{start}-{i:05}-of-{count:05}.gguf"))).collect())
}

impl Gguf {
    /// Checks that this is the `number`-th part of what `first` begins.
    pub(crate) fn must_be(&self, number: usize, first: Part) -> Result<(), GgufError> {
        match Part::of(&self.metadata)? {
            Some(p) if p == (Part { number, ..first }) => Ok(()),
            Some(p) => fail(format!(
                "split.no {}, split.count {} and split.tensors.count {}, where {number}, {} and {} are expected: a \
                 part of something else",
                p.number, p.count, p.tensors, first.count, first.tensors
            )),
            None => fail(format!("no split.count in part {} of {}", number + 1, first.count)),
        }
    }
}

/// The first of `files` where all of them are parts of one model by their names.
pub(crate) fn first_of(files: &[PathBuf]) -> Option<&PathBuf> {
    let named_all: Option<Vec<_>> = files.iter().map(|f| named(f.file_name()?.to_str()?)).collect();
    let all = named_all?;
    let (start, _, count) = *all.first()?;
    if all.iter().any(|(s, _, c)| (*s, *c) != (start, count)) {
        return None;
    }
    let least = (0..all.len()).min_by_key(|i| all[*i].1)?;
    files.get(least)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_parts() {
        assert_eq!(named("a-b-00002-of-00003.gguf"), Some(("a-b", 2, 3)));
        for bad in ["a-2-of-3.gguf", "a-00002-of-00003.bin", "a-of-00003.gguf", "a-+0002-of-00003.gguf", "gguf"] {
            assert_eq!(named(bad), None, "{bad}");
        }
        let part = Part { number: 1, count: 3, tensors: 9 };
        let all = siblings(Path::new("/m/x-00002-of-00003.gguf"), part).unwrap();
        assert_eq!(all[2], Path::new("/m/x-00003-of-00003.gguf"));
        assert!(siblings(Path::new("/m/x-00003-of-00003.gguf"), part).unwrap_err().what.contains("-00002-of-00003"));
        let files: Vec<PathBuf> = ["x-00002-of-00003.gguf", "x-00001-of-00003.gguf"].map(PathBuf::from).to_vec();
        assert_eq!(first_of(&files), Some(&files[1]));
        let files: Vec<PathBuf> = ["x-00002-of-00003.gguf", "y-00001-of-00003.gguf"].map(PathBuf::from).to_vec();
        assert_eq!(first_of(&files), None);
    }
}
