//! Copies of checkpoints to be damaged.

use std::fs;
use std::path::Path;

use serde_json::Value;

/// Infinity in f16.
pub const F16: [u8; 2] = [0x00, 0x7c];
/// The usual file.
const MODEL: &str = "model.safetensors";
/// Bytes of a 32-bit number.
const I32: usize = 4;

/// A copy in a directory of its own.
pub struct Damaged(tempfile::TempDir);

impl Damaged {
    pub fn copy(from: &Path) -> Damaged {
        let dir = tempfile::tempdir().unwrap();
        for entry in fs::read_dir(from).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
        }
        Damaged(dir)
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Changes a JSON file.
    pub fn config(&self, name: &str, change: impl Fn(&mut Value)) {
        let path = self.path().join(name);
        let mut v: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        change(&mut v);
        fs::write(path, v.to_string()).unwrap();
    }

    fn parts(&self, name: &str) -> (Value, Vec<u8>) {
        let file = fs::read(self.path().join(name)).unwrap();
        let n = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        (serde_json::from_slice(&file[8..8 + n]).unwrap(), file[8 + n..].to_vec())
    }

    fn write(&self, name: &str, header: &Value, data: &[u8]) {
        let header = header.to_string();
        let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat();
        fs::write(self.path().join(name), file).unwrap();
    }

    /// Changes the header and keeps the data.
    pub fn header(&self, change: impl Fn(&mut Value)) {
        self.header_of(MODEL, change);
    }

    /// The same for another file.
    pub fn header_of(&self, name: &str, change: impl Fn(&mut Value)) {
        let (mut header, data) = self.parts(name);
        change(&mut header);
        self.write(name, &header, &data);
    }

    /// Takes a tensor's name away; its bytes stay under another one.
    pub fn drop(&self, name: &str) {
        self.header(|h| {
            let entry = h.as_object_mut().unwrap().remove(name).expect("a tensor of that name");
            h["somebody.else"] = entry;
        });
    }

    fn patch(&self, name: &str, change: impl Fn(&mut [u8])) {
        self.patch_in(MODEL, name, change);
    }

    fn patch_in(&self, file: &str, name: &str, change: impl Fn(&mut [u8])) {
        let (header, mut data) = self.parts(file);
        let at = |i: usize| header[name]["data_offsets"][i].as_u64().expect("a tensor of that name") as usize;
        change(&mut data[at(0)..at(1)]);
        self.write(file, &header, &data);
    }

    /// Fills a tensor with a pattern.
    pub fn fill(&self, name: &str, pattern: &[u8]) {
        self.fill_in(MODEL, name, pattern);
    }

    /// The same in another file.
    pub fn fill_in(&self, file: &str, name: &str, pattern: &[u8]) {
        self.patch_in(file, name, |b| b.iter_mut().zip(pattern.iter().cycle()).for_each(|(b, p)| *b = *p));
    }

    /// Overwrites the first numbers of an I64 tensor.
    pub fn i64s(&self, name: &str, numbers: &[i64]) {
        self.patch(name, |b| {
            for (out, n) in b.chunks_exact_mut(8).zip(numbers) {
                out.copy_from_slice(&n.to_le_bytes());
            }
        });
    }

    /// Overwrites one number of an I32 tensor.
    pub fn i32s(&self, name: &str, at: usize, number: i32) {
        self.patch(name, |b| b[I32 * at..I32 * at + I32].copy_from_slice(&number.to_le_bytes()));
    }
}
