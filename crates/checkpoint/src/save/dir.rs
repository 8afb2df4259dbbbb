//! A directory of safetensors and JSON: written under a temporary name, the weights shard by shard.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use lacuna_base::unfinished::{self, Temporary};
use serde_json::{Map, Value, json};

use super::Sink;
use crate::SaveError;
use crate::files::sync_dir;
use crate::writer::{beside, bring_back, clear, into_place, io_at};

/// Bytes of weights after which a new file begins.
pub(crate) const SHARD_BYTES: u64 = 5_000_000_000;

/// A directory being written; unless it is finished, nothing of it stays.
pub(crate) struct OutDir {
    out: PathBuf,
    dir: PathBuf,
    /// None for a directory inside another one.
    partial: Option<Temporary>,
}

impl OutDir {
    /// Begins a directory at `out`. What stands there is refused unless `overwrite` is set and it is empty or holds a
    /// model or an adapter.
    pub fn create(out: &Path, overwrite: bool) -> Result<OutDir, SaveError> {
        let show = out.display();
        bring_back(out)?;
        if out.exists() {
            if !overwrite {
                return Err(SaveError::Refused(format!("{show} exists; --overwrite replaces it")));
            }
            let known = ["config.json", "adapter_config.json"].iter().any(|n| out.join(n).is_file());
            let empty = fs::read_dir(out).is_ok_and(|mut d| d.next().is_none());
            if !(known || empty) {
                return Err(SaveError::Refused(format!("{show} is no model's directory and will not be overwritten")));
            }
        }
        let dir = beside(out, "partial")?;
        clear(out)?;
        let partial = Some(Temporary::new(dir.clone()));
        fs::create_dir_all(&dir).map_err(io_at(&dir))?;
        Ok(OutDir { out: out.to_owned(), dir, partial })
    }

    /// A directory inside; it goes along when this one is finished.
    pub fn inner(&self, name: &str) -> Result<OutDir, SaveError> {
        let dir = self.dir.join(name);
        fs::create_dir_all(&dir).map_err(io_at(&dir))?;
        Ok(OutDir { out: dir.clone(), dir, partial: None })
    }

    /// Where a file of this directory is written.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Writes a small file.
    pub fn file(&self, name: &str, bytes: &[u8]) -> Result<(), SaveError> {
        let path = self.dir.join(name);
        let mut file = File::create(&path).map_err(io_at(&path))?;
        file.write_all(bytes).and_then(|()| file.sync_all()).map_err(io_at(&path))
    }

    /// Writes a JSON file as people read it.
    pub fn json(&self, name: &str, value: &Value) -> Result<(), SaveError> {
        let mut text = serde_json::to_vec_pretty(value).map_err(|e| SaveError::Refused(e.to_string()))?;
        text.push(b'\n');
        self.file(name, &text)
    }

    /// Writes `tensors` into as many files as `shard_bytes` asks for, with an index where they are several;
    /// `write(i, sink)` hands the bytes of the `i`-th over, in order. The bytes of all files together.
    pub fn safetensors(
        &self,
        stem: &str,
        tensors: &[Entry],
        shard_bytes: u64,
        write: &mut dyn FnMut(usize, Sink<'_>) -> Result<(), SaveError>,
    ) -> Result<u64, SaveError> {
        let mut shards: Vec<std::ops::Range<usize>> = Vec::new();
        let (mut from, mut size) = (0, 0);
        for (i, t) in tensors.iter().enumerate() {
            if i > from && size + t.bytes > shard_bytes {
                shards.push(from..i);
                (from, size) = (i, 0);
            }
            size += t.bytes;
        }
        shards.push(from..tensors.len());
        let name = |s: usize| match shards.len() {
            1 => format!("{stem}.safetensors"),
            n => format!("{stem}-{:05}-of-{n:05}.safetensors", s + 1),
        };
        let (mut map, mut total) = (Map::new(), 0);
        for (s, range) in shards.iter().enumerate() {
            let path = self.dir.join(name(s));
            let mut header = Map::new();
            header.insert("__metadata__".into(), json!({"format": "pt"}));
            let mut at = 0;
            for t in &tensors[range.clone()] {
                let entry = json!({"dtype": t.dtype, "shape": t.shape, "data_offsets": [at, at + t.bytes]});
                if header.insert(t.name.clone(), entry).is_some() {
                    return Err(SaveError::Refused(format!("tensor {} stands twice", t.name)));
                }
                map.insert(t.name.clone(), json!(name(s)));
                at += t.bytes;
            }
            let mut header = Value::Object(header).to_string().into_bytes();
            header.resize(header.len().next_multiple_of(8), b' ');
            let mut file = BufWriter::with_capacity(1 << 20, File::create(&path).map_err(io_at(&path))?);
            let io = io_at(&path);
            file.write_all(&(header.len() as u64).to_le_bytes()).map_err(&io)?;
            file.write_all(&header).map_err(&io)?;
            for i in range.clone() {
                let mut had = 0;
                write(i, &mut |bytes| {
                    had += bytes.len() as u64;
                    file.write_all(bytes).map_err(&io)
                })?;
                if had != tensors[i].bytes {
                    let (name, want) = (&tensors[i].name, tensors[i].bytes);
                    return Err(SaveError::Refused(format!("tensor {name} gave {had} bytes, {want} were announced")));
                }
            }
            let file = file.into_inner().map_err(|e| io(e.into_error()))?;
            file.sync_all().map_err(&io)?;
            total += at;
        }
        if shards.len() > 1 {
            let index = json!({"metadata": {"total_size": total}, "weight_map": map});
            self.json(&format!("{stem}.safetensors.index.json"), &index)?;
        }
        Ok(total)
    }

    /// Brings everything to the disk and gives the directory its name.
    pub fn finish(self) -> Result<PathBuf, SaveError> {
        sync_dir(&self.dir)?;
        if self.partial.is_some() {
            unfinished::undisturbed(|| into_place(&self.out))?;
            clear(&self.out)?;
        }
        Ok(self.out)
    }

    /// Runs `work`, then finishes.
    pub fn write_with<T>(self, work: impl FnOnce(&OutDir) -> Result<T, SaveError>) -> Result<(PathBuf, T), SaveError> {
        let t = work(&self)?;
        Ok((self.finish()?, t))
    }
}

/// A tensor of a safetensors file, before its bytes.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub name: String,
    pub dtype: &'static str,
    pub shape: Vec<usize>,
    pub bytes: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_and_their_index_read_back() {
        let home = tempfile::tempdir().unwrap();
        let entry = |name: &str, n: usize| Entry { name: name.into(), dtype: "U8", shape: vec![n], bytes: n as u64 };
        let tensors = [entry("a", 30), entry("b", 50), entry("c", 30), entry("d", 200)];
        let out = home.path().join("m");
        let (path, total) = OutDir::create(&out, false)
            .unwrap()
            .write_with(|dir| {
                dir.json("config.json", &json!({}))?;
                dir.safetensors("model", &tensors, 100, &mut |i, sink| sink(&vec![i as u8; tensors[i].bytes as usize]))
            })
            .unwrap();
        assert_eq!(total, 310);
        let index = std::fs::read(path.join("model.safetensors.index.json")).unwrap();
        let map = crate::safetensors::parse_index(&index).unwrap();
        assert_eq!(map[0], ("a".into(), "model-00001-of-00003.safetensors".into()));
        assert_eq!(map[2].1, "model-00002-of-00003.safetensors");
        let file = std::fs::read(path.join("model-00003-of-00003.safetensors")).unwrap();
        let t = crate::safetensors::parse(&file).unwrap();
        assert!(t.len() == 1 && file[t[0].bytes.clone()].iter().all(|b| *b == 3));
        // A second time: refused, then replaced; what is no model is never replaced, and a failed attempt leaves
        // nothing.
        assert!(OutDir::create(&out, false).is_err_and(|e| e.to_string().contains("--overwrite")));
        let failed = OutDir::create(&out, true)
            .unwrap()
            .write_with(|dir| dir.safetensors("model", &tensors, 100, &mut |_, sink| sink(&[0; 7])).map(drop));
        assert!(failed.is_err_and(|e| e.to_string().contains("tensor a gave 7 bytes, 30 were announced")));
        assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 1);
        let other = home.path().join("photos");
        std::fs::create_dir(&other).unwrap();
        std::fs::write(other.join("one.jpg"), b"x").unwrap();
        assert!(OutDir::create(&other, true).is_err_and(|e| e.to_string().contains("will not be overwritten")));
    }
}
