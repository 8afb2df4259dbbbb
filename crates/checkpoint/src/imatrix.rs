//! Importance matrices as llama.cpp writes them: of every matrix the mean square of each input channel over a
//! calibration text, in a file of its own. Both forms: GGUF (`NAME.in_sum2` and `NAME.counts`) and the older `.dat`.

use std::collections::HashMap;
use std::path::Path;

use bytes::Bytes;
use lacuna_arch as arch;
use lacuna_spec::{Part, Place, Spec};

use crate::gguf;
use crate::map::Mapped;
use crate::open::OpenError;
use crate::tensor::TensorType;
use lacuna_format::Float;

/// Σ x² of the input channels of a network's matrices, and over how many tokens.
#[derive(Clone, Debug, Default)]
pub struct Imatrix {
    squares: HashMap<Place, (u64, Vec<f64>)>,
    left: usize,
}

/// Of one tensor of the file: sums, matrix by matrix (experts) or of one, and tokens of each.
struct Entry {
    name: String,
    sums: Vec<f64>,
    counts: Vec<u64>,
}

impl Imatrix {
    /// Reads a file for a network; an error where it is none, or where it is of a network of other shapes.
    pub fn open(path: &Path, spec: &Spec) -> Result<Imatrix, OpenError> {
        let file = Mapped::open(path)?;
        let bad = |what: String| OpenError::Bad { file: path.display().to_string(), what };
        let entries = if [b"GGUF", b"FUGG"].iter().any(|magic| file.bytes().starts_with(*magic)) {
            of_gguf(file.bytes())
        } else {
            of_dat(file.bytes())
        };
        let entries = entries.map_err(&bad)?;
        let targets = arch::gguf_spec(spec).and_then(|s| arch::gguf_targets(&s)).map_err(|e| bad(e.what))?;
        let names: HashMap<&str, &Vec<Place>> = targets.iter().map(|t| (t.name.as_str(), &t.parts)).collect();
        let (mut squares, mut left) = (HashMap::new(), 0);
        for e in &entries {
            let Some(parts) = names.get(e.name.as_str()) else {
                left += 1;
                continue;
            };
            // Parts of a fused matrix read one input; experts of a stack have theirs, one after the other.
            let stacked = parts.iter().any(|p| p.expert.is_some());
            for (i, place) in parts.iter().enumerate().filter(|(_, p)| p.part == Part::Weight) {
                let inputs = spec.shape(place).map_or(0, |s| s.1);
                let (at, want) = if stacked { (i, parts.len() * inputs) } else { (0, inputs) };
                if e.sums.len() != want || inputs == 0 {
                    let had = e.sums.len();
                    return Err(bad(format!("{}: {had} channels, this model's {place} needs {want}", e.name)));
                }
                let tokens = if e.counts.len() == parts.len() { e.counts[i] } else { e.counts[0] };
                if tokens > 0 {
                    squares.insert(*place, (tokens, e.sums[at * inputs..(at + 1) * inputs].to_vec()));
                }
            }
        }
        if squares.is_empty() {
            return Err(bad("none of its tensors is one of this model's".into()));
        }
        Ok(Imatrix { squares, left })
    }

    /// Tokens and `Σ x²` of each input channel of a matrix.
    pub fn get(&self, place: &Place) -> Option<&(u64, Vec<f64>)> {
        self.squares.get(place)
    }

    /// All of them, in the order of their places.
    pub fn all(&self) -> Vec<(Place, &(u64, Vec<f64>))> {
        let mut all: Vec<_> = self.squares.iter().map(|(p, s)| (*p, s)).collect();
        all.sort_by_key(|(p, _)| *p);
        all
    }

    /// Matrices that it tells of, and tensors of the file that are none of this network's.
    pub fn counted(&self) -> (usize, usize) {
        (self.squares.len(), self.left)
    }
}

/// A sum must be a number that no matrix product can make of nothing: finite and not negative.
fn sound(name: &str, sums: &[f64]) -> Result<(), String> {
    match sums.iter().position(|s| !s.is_finite() || *s < 0.0) {
        Some(at) => Err(format!("{name}: the sum of squares of channel {at} is {}", sums[at])),
        None if sums.iter().all(|s| *s == 0.0) => Err(format!("{name}: all sums of squares are 0: it saw no text")),
        None => Ok(()),
    }
}

fn of_gguf(file: &[u8]) -> Result<Vec<Entry>, String> {
    let parsed = gguf::parse(file).map_err(|e| e.to_string())?;
    let floats = |name: &str| -> Result<Vec<f64>, String> {
        let t = parsed.tensors.iter().find(|t| t.name == name).ok_or(format!("there is no tensor {name}"))?;
        if t.dtype != TensorType::Float(Float::F32) {
            return Err(format!("{name}: {:?}, where f32 is expected", t.dtype));
        }
        let bytes = file.get(t.bytes.clone()).ok_or(format!("{name} lies outside the file"))?;
        let bytes = match parsed.turned {
            Some(_) => gguf::little(t.dtype, &Bytes::copy_from_slice(bytes)),
            None => Bytes::copy_from_slice(bytes),
        };
        Ok(bytes.as_chunks::<4>().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect())
    };
    let mut out = Vec::new();
    for t in &parsed.tensors {
        let Some(name) = t.name.strip_suffix(".in_sum2") else { continue };
        let (sums, counts) = (floats(&t.name)?, floats(&format!("{name}.counts"))?);
        sound(name, &sums)?;
        // Counts are whole numbers written as floats; what is none becomes 0, and the matrix unknown.
        let counts: Vec<u64> = counts.iter().map(|c| *c as u64).collect();
        if counts.iter().all(|c| *c == 0) {
            return Err(format!("{name}.counts says of how many tokens the sums are, and has no number above 0"));
        }
        out.push(Entry { name: name.to_owned(), sums, counts });
    }
    if out.is_empty() {
        return Err("no importance matrix: no tensor's name ends in .in_sum2".into());
    }
    Ok(out)
}

/// `n`; n times: length and bytes of a name, calls, number of values, values (each a mean times the calls).
fn of_dat(file: &[u8]) -> Result<Vec<Entry>, String> {
    let mut rest = file;
    let mut take = |n: usize, what: &str| -> Result<&[u8], String> {
        let (head, tail) =
            rest.split_at_checked(n).ok_or(format!("no importance matrix, or a broken one: it ends within {what}"))?;
        rest = tail;
        Ok(head)
    };
    let mut out: Vec<Entry> = Vec::new();
    let number = |b: &[u8]| -> Result<usize, String> {
        let n = i32::from_le_bytes(b.try_into().map_err(|_| "a number that is none".to_owned())?);
        usize::try_from(n).map_err(|_| format!("a count of {n}: this is no importance matrix"))
    };
    for _ in 0..number(take(4, "the number of entries")?)? {
        let len = number(take(4, "the length of a name")?)?;
        let name = String::from_utf8(take(len, "a name")?.to_vec())
            .map_err(|_| "a name that is no UTF-8: this is no importance matrix".to_owned())?;
        let calls = number(take(4, &name)?)?;
        let n = number(take(4, &name)?)?;
        let bytes = take(n.checked_mul(4).ok_or(format!("{name}: {n} values"))?, &name)?;
        let sums: Vec<f64> = bytes.as_chunks::<4>().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect();
        sound(&name, &sums)?;
        // A value of the oldest files is a plain sum; a channel's share of its matrix is the same in all of them.
        out.push(Entry { name, sums, counts: vec![calls.max(1) as u64] });
    }
    if out.is_empty() {
        return Err("an importance matrix of nothing".into());
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dat(entries: &[(&str, i32, &[f32])]) -> Vec<u8> {
        let mut out = (entries.len() as i32).to_le_bytes().to_vec();
        for (name, calls, values) in entries {
            out.extend((name.len() as i32).to_le_bytes());
            out.extend(name.as_bytes());
            out.extend(calls.to_le_bytes());
            out.extend((values.len() as i32).to_le_bytes());
            values.iter().for_each(|v| out.extend(v.to_le_bytes()));
        }
        out
    }

    /// The same as GGUF: a header, a table of tensors, data at multiples of 32.
    fn gguf(entries: &[(&str, i32, &[f32])]) -> Vec<u8> {
        let mut head = b"GGUF".to_vec();
        head.extend(3u32.to_le_bytes());
        head.extend((2 * entries.len() as u64).to_le_bytes());
        head.extend(0u64.to_le_bytes());
        let mut data: Vec<u8> = Vec::new();
        for (name, calls, values) in entries {
            for (end, values) in [(".in_sum2", values.to_vec()), (".counts", vec![*calls as f32])] {
                data.resize(data.len().next_multiple_of(32), 0);
                gguf::put_info(&mut head, &format!("{name}{end}"), &[values.len()], 0, data.len() as u64);
                values.iter().for_each(|v| data.extend(v.to_le_bytes()));
            }
        }
        head.resize(head.len().next_multiple_of(32), 0);
        [head, data].concat()
    }

    fn spec() -> Spec {
        let config = serde_json::json!({
            "model_type": "llama", "vocab_size": 8, "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16,
        });
        arch::from_config(&config).unwrap()
    }

    fn read(bytes: &[u8]) -> Result<Imatrix, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("imatrix");
        std::fs::write(&path, bytes).unwrap();
        Imatrix::open(&path, &spec()).map_err(|e| e.to_string())
    }

    #[test]
    fn both_forms_say_the_same() {
        let entries: [(&str, i32, &[f32]); 3] = [
            ("blk.0.attn_q.weight", 7, &[1.0, 2.0, 3.0, 4.0]),
            ("blk.0.ffn_down.weight", 7, &[0.0, 1.0, 0.5, 2.0, 3.0, 8.0]),
            ("blk.9.attn_q.weight", 7, &[1.0; 4]),
        ];
        for bytes in [dat(&entries), gguf(&entries)] {
            let m = read(&bytes).unwrap();
            assert_eq!(m.counted(), (2, 1));
            let q = Place::layer(0, lacuna_spec::Role::Q);
            assert_eq!(m.get(&q), Some(&(7, vec![1.0, 2.0, 3.0, 4.0])));
            assert_eq!(m.get(&Place::layer(0, lacuna_spec::Role::K)), None);
        }
    }

    #[test]
    fn what_is_no_imatrix_is_told_and_takes_no_memory() {
        let one = |name: &'static str, v: &'static [f32]| dat(&[(name, 1, v)]);
        let says = |bytes: &[u8], what: &str| {
            let e = read(bytes).unwrap_err();
            assert!(e.contains(what), "{e}");
        };
        says(&one("blk.0.attn_q.weight", &[1.0, 2.0]), "2 channels");
        says(&one("blk.0.attn_q.weight", &[1.0, -2.0, 0.0, 0.0]), "channel 1 is -2");
        says(&one("blk.0.attn_q.weight", &[1.0, f32::NAN, 0.0, 0.0]), "channel 1 is NaN");
        says(&one("blk.0.attn_q.weight", &[0.0; 4]), "saw no text");
        says(&one("elsewhere", &[1.0]), "none of its tensors");
        says(&[], "ends within");
        says(&i32::MAX.to_le_bytes(), "ends within");
        says(&(-3i32).to_le_bytes(), "a count of -3");
        let whole = one("blk.0.attn_q.weight", &[1.0; 4]);
        (0..whole.len()).for_each(|n| assert!(read(&whole[..n]).is_err()));
        let whole = gguf(&[("blk.0.attn_q.weight", 1, &[1.0; 4])]);
        (0..whole.len()).for_each(|n| assert!(read(&whole[..n]).is_err()));
    }
}
