//! The instructions of a pickle that a dictionary of tensors is made of, followed without running anything.
//!
//! Values are small and copied; tuples and dictionaries lie in lists and are named by their index there, so that
//! nothing is nested and everything together is no larger than a few times the pickle.

use std::collections::{HashMap, HashSet};

use super::{STORAGES, View};

/// Most axes of a tensor, and most values with which something is called.
const MAX_AXES: usize = 8;

/// Most values that may be there at a time, and places to keep them: some tens of millions of bytes. A tensor needs
/// about 35.
const MAX_VALUES: usize = 2_000_000;

/// What stands for a value. All that the result does not hang on is `Other`.
#[derive(Debug, Clone, Copy)]
enum Value<'a> {
    Other,
    Int(i64),
    Text(&'a str),
    Known(Known),
    Tuple(usize),
    Dict(usize),
    Storage { key: &'a str, class: usize, length: usize },
    Tensor(usize),
}

/// The names that may be used.
#[derive(Debug, Clone, Copy)]
enum Known {
    OrderedDict,
    Tensor,
    Parameter,
    /// Index into [`STORAGES`].
    Storage(usize),
}

impl Known {
    fn of(module: &str, name: &str) -> Result<Known, String> {
        let storage = || STORAGES.iter().position(|s| s.0 == name).map(Known::Storage);
        let known = match (module, name) {
            ("collections", "OrderedDict") => Some(Known::OrderedDict),
            ("torch._utils", "_rebuild_tensor_v2") => Some(Known::Tensor),
            ("torch._utils", "_rebuild_parameter") => Some(Known::Parameter),
            ("torch", _) => storage(),
            _ => None,
        };
        known.ok_or_else(|| format!("it asks for {module:?} {name:?}, which is no part of a dictionary of tensors"))
    }
}

struct Machine<'a> {
    data: &'a [u8],
    at: usize,
    stack: Vec<Value<'a>>,
    marks: Vec<usize>,
    memo: HashMap<u32, Value<'a>>,
    tuples: Vec<Vec<Value<'a>>>,
    dicts: Vec<Vec<(Value<'a>, Value<'a>)>>,
    views: Vec<View<'a>>,
    /// Places taken for good: tuples and dictionaries with what is in them, and tensors.
    taken: usize,
}

/// The tensors of the dictionary that a pickle makes, by name.
pub(super) fn tensors(data: &[u8]) -> Result<Vec<(&str, View<'_>)>, String> {
    let mut m = Machine {
        data,
        at: 0,
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
        tuples: Vec::new(),
        dicts: Vec::new(),
        views: Vec::new(),
        taken: 0,
    };
    let Value::Dict(made) = m.follow()? else { return Err("it makes something else than a dictionary".into()) };
    let mut seen = HashSet::new();
    let mut out = Vec::new();
    for (key, value) in &m.dicts[made] {
        let Value::Text(name) = *key else { return Err("a key of the dictionary is no text".into()) };
        let Value::Tensor(view) = *value else { return Err(format!("{name} is no tensor")) };
        if !seen.insert(name) {
            return Err(format!("{name} stands twice"));
        }
        out.push((name, m.views[view].clone()));
    }
    Ok(out)
}

impl<'a> Machine<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], String> {
        let rest = self.data.get(self.at..).and_then(|r| r.get(..n));
        let taken = rest.ok_or_else(|| format!("it ends at byte {}, where {n} more should follow", self.data.len()))?;
        self.at += n;
        Ok(taken)
    }

    fn number<const N: usize>(&mut self) -> Result<[u8; N], String> {
        self.take(N)?.try_into().map_err(|_| "a number is cut short".to_owned())
    }

    fn text(&mut self, n: usize) -> Result<&'a str, String> {
        let from = self.at;
        std::str::from_utf8(self.take(n)?).map_err(|_| format!("the text at byte {from} is no UTF-8"))
    }

    fn line(&mut self) -> Result<&'a str, String> {
        let n = self.data[self.at..].iter().take(256).position(|b| *b == b'\n');
        let line = self.text(n.ok_or("a name does not end")?)?;
        self.at += 1;
        Ok(line)
    }

    fn pop(&mut self) -> Result<Value<'a>, String> {
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return Err(format!("the instruction before byte {} takes a value where none is", self.at));
        }
        self.stack.pop().ok_or_else(|| "no value is left".into())
    }

    /// Everything above the last mark.
    fn above(&mut self) -> Result<Vec<Value<'a>>, String> {
        let mark = self.marks.pop().ok_or_else(|| format!("no mark before byte {}", self.at))?;
        Ok(self.stack.split_off(mark))
    }

    fn tuple(&mut self, of: Vec<Value<'a>>) {
        self.taken += 1 + of.len();
        self.tuples.push(of);
        self.stack.push(Value::Tuple(self.tuples.len() - 1));
    }

    fn dict(&mut self) -> Value<'a> {
        // One with a pair has room for four.
        self.taken += 4;
        self.dicts.push(Vec::new());
        Value::Dict(self.dicts.len() - 1)
    }

    fn keep(&mut self, at: u32) -> Result<(), String> {
        let top = *self.stack.last().ok_or("nothing is there to be kept")?;
        self.memo.insert(at, top);
        Ok(())
    }

    fn kept(&mut self, at: u32) -> Result<(), String> {
        let value = *self.memo.get(&at).ok_or_else(|| format!("value {at} was never kept"))?;
        self.stack.push(value);
        Ok(())
    }

    /// Puts pairs into the dictionary on top.
    fn put(&mut self, pairs: &[Value<'a>]) -> Result<(), String> {
        self.taken += pairs.len();
        let (pairs, odd) = pairs.as_chunks::<2>();
        match self.stack.last() {
            Some(Value::Dict(d)) if odd.is_empty() => self.dicts[*d].extend(pairs.iter().map(|p| (p[0], p[1]))),
            _ => return Err(format!("pairs before byte {} belong to no dictionary", self.at)),
        }
        Ok(())
    }

    fn follow(&mut self) -> Result<Value<'a>, String> {
        loop {
            // An instruction of one byte may make a value of a hundred.
            if self.taken + self.stack.len() + self.marks.len() + self.memo.len() > MAX_VALUES {
                return Err(format!("more than {MAX_VALUES} values at byte {}", self.at));
            }
            let op = self.take(1)?[0];
            match op {
                0x80 => match self.take(1)?[0] {
                    2..=5 => {}
                    n => return Err(format!("pickle protocol {n}; 2 to 5 are read")),
                },
                0x95 => drop(self.take(8)?),
                b'.' => return self.pop(),
                b'(' => self.marks.push(self.stack.len()),
                b'}' => {
                    let made = self.dict();
                    self.stack.push(made);
                }
                // What is in a list, is true or a fraction, does not matter here.
                b']' | b'N' | 0x88 | 0x89 => self.stack.push(Value::Other),
                b'G' => {
                    self.take(8)?;
                    self.stack.push(Value::Other);
                }
                b'a' => drop(self.pop()?),
                b'e' => drop(self.above()?),
                b')' => self.tuple(Vec::new()),
                b't' => {
                    let of = self.above()?;
                    self.tuple(of);
                }
                0x85..=0x87 => {
                    let mut of = Vec::new();
                    for _ in 0x84..op {
                        of.insert(0, self.pop()?);
                    }
                    self.tuple(of);
                }
                b'J' => {
                    let n = i32::from_le_bytes(self.number()?);
                    self.stack.push(Value::Int(n.into()));
                }
                b'K' => {
                    let n = self.take(1)?[0];
                    self.stack.push(Value::Int(n.into()));
                }
                b'M' => {
                    let n = u16::from_le_bytes(self.number()?);
                    self.stack.push(Value::Int(n.into()));
                }
                0x8a => self.long()?,
                b'X' => {
                    let n = u32::from_le_bytes(self.number()?);
                    let text = self.text(n as usize)?;
                    self.stack.push(Value::Text(text));
                }
                0x8c => {
                    let n = self.take(1)?[0];
                    let text = self.text(n.into())?;
                    self.stack.push(Value::Text(text));
                }
                b'c' => {
                    let (module, name) = (self.line()?, self.line()?);
                    self.stack.push(Value::Known(Known::of(module, name)?));
                }
                0x93 => {
                    let (Value::Text(name), Value::Text(module)) = (self.pop()?, self.pop()?) else {
                        return Err("a name that is no text".into());
                    };
                    self.stack.push(Value::Known(Known::of(module, name)?));
                }
                b'q' => {
                    let at = self.take(1)?[0];
                    self.keep(at.into())?;
                }
                b'r' => {
                    let at = u32::from_le_bytes(self.number()?);
                    self.keep(at)?;
                }
                0x94 => self.keep(u32::try_from(self.memo.len()).map_err(|e| e.to_string())?)?,
                b'h' => {
                    let at = self.take(1)?[0];
                    self.kept(at.into())?;
                }
                b'j' => {
                    let at = u32::from_le_bytes(self.number()?);
                    self.kept(at)?;
                }
                b'Q' => self.storage()?,
                b'R' => self.call()?,
                b's' => {
                    let (value, key) = (self.pop()?, self.pop()?);
                    self.put(&[key, value])?;
                }
                b'u' => {
                    let pairs = self.above()?;
                    self.put(&pairs)?;
                }
                // The state of an ordered dictionary: remarks of its maker.
                b'b' => {
                    self.pop()?;
                    if !matches!(self.stack.last(), Some(Value::Dict(_))) {
                        return Err(format!("byte {} gives a state to something else than a dictionary", self.at - 1));
                    }
                }
                _ => {
                    let at = self.at - 1;
                    return Err(format!(
                        "the instruction {op:#04x} at byte {at} is none that a dictionary of tensors needs"
                    ));
                }
            }
        }
    }

    /// A number of up to eight bytes.
    fn long(&mut self) -> Result<(), String> {
        let n = usize::from(self.take(1)?[0]);
        if n > 8 {
            return Err(format!("a number of {n} bytes"));
        }
        let bytes = self.take(n)?;
        let mut whole = [if bytes.last().is_some_and(|b| b & 0x80 != 0) { 0xff } else { 0 }; 8];
        whole[..n].copy_from_slice(bytes);
        self.stack.push(Value::Int(i64::from_le_bytes(whole)));
        Ok(())
    }

    /// The values of a tuple with which something is called or named: few.
    fn with(&mut self) -> Result<Vec<Value<'a>>, String> {
        match self.pop()? {
            Value::Tuple(t) if self.tuples[t].len() <= MAX_AXES => Ok(self.tuples[t].clone()),
            _ => Err(format!("byte {} needs a short tuple", self.at - 1)),
        }
    }

    /// `("storage", class, key, device, values)`.
    fn storage(&mut self) -> Result<(), String> {
        let of = self.with()?;
        let [
            Value::Text("storage"),
            Value::Known(Known::Storage(class)),
            Value::Text(key),
            Value::Text(_),
            Value::Int(n),
        ] = of[..]
        else {
            return Err(format!("what is named at byte {} is no storage that is read", self.at - 1));
        };
        let length = usize::try_from(n).map_err(|_| format!("a storage of {n} values"))?;
        self.stack.push(Value::Storage { key, class, length });
        Ok(())
    }

    fn sizes(&self, v: Value<'a>) -> Option<Vec<usize>> {
        let Value::Tuple(t) = v else { return None };
        let of = self.tuples.get(t).filter(|t| t.len() <= MAX_AXES)?;
        let size = |v: &Value| if let Value::Int(n) = v { usize::try_from(*n).ok() } else { None };
        of.iter().map(size).collect()
    }

    fn call(&mut self) -> Result<(), String> {
        let with = self.with()?;
        let Value::Known(known) = self.pop()? else {
            return Err(format!("byte {} calls what is no name", self.at - 1));
        };
        let made = match (known, &with[..]) {
            (Known::OrderedDict, []) => self.dict(),
            (Known::Parameter, [tensor @ Value::Tensor(_), ..]) => *tensor,
            (Known::Tensor, [Value::Storage { key, class, length }, Value::Int(offset), shape, strides, ..]) => {
                let (shape, strides) = (self.sizes(*shape), self.sizes(*strides));
                let (Some(shape), Some(strides), Ok(offset)) = (shape, strides, usize::try_from(*offset)) else {
                    return Err(format!("the tensor made at byte {} has no axes that make sense", self.at - 1));
                };
                if shape.len() != strides.len() {
                    return Err(format!("a tensor of {} axes and {} strides", shape.len(), strides.len()));
                }
                self.taken += 1 + 2 * shape.len();
                self.views.push(View { key, class: *class, length: *length, offset, shape, strides });
                Value::Tensor(self.views.len() - 1)
            }
            _ => return Err(format!("the call at byte {} is none that makes a tensor", self.at - 1)),
        };
        self.stack.push(made);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(pickle: &[u8], words: &str) {
        let e = tensors(pickle).unwrap_err();
        assert!(e.contains(words), "{words}: {e}");
    }

    #[test]
    fn nothing_is_run() {
        refused(b"\x80\x02cos\nsystem\nX\x02\0\0\0ls\x85R.", "\"os\" \"system\"");
        refused(b"\x80\x04\x8c\x02os\x8c\x06system\x93)R.", "\"os\" \"system\"");
        refused(b"\x80\x02cbuiltins\neval\n)R.", "eval");
        refused(b"\x80\x02ctorch\nload\n)R.", "load");
        refused(b"\x80\x02(ios\nsystem\n.", "0x69");
        refused(b"\x80\x02}X\x01\0\0\0aK\x01s.", "a is no tensor");
        refused(b"\x80\x02ccollections\nOrderedDict\n}\x81.", "0x81");
        refused(b"\x80\x02ccollections\nOrderedDict\n(X\x01\0\0\0atR.", "is none that makes a tensor");
        refused(b"\x80\x02ccollections\nOrderedDict\n}b.", "state");
    }

    #[test]
    fn what_is_no_pickle() {
        refused(b"", "ends");
        refused(b"\x80\x02", "ends");
        refused(b"\x80\x01}.", "protocol 1");
        refused(b"\x80\x02}", "ends");
        refused(b"\x80\x02K\x01.", "dictionary");
        refused(b"\x80\x02.", "takes a value");
        refused(b"\x80\x02u.", "no mark");
        refused(b"\x80\x02}(K\x01u.", "belong to no dictionary");
        refused(b"\x80\x02}(.", "takes a value");
        refused(b"\x80\x02h\x07.", "never kept");
        refused(b"\x80\x02\x8a\x09\0\0\0\0\0\0\0\0\0.", "9 bytes");
        refused(b"\x80\x02X\xff\xff\xff\xff.", "ends");
        refused(b"\x80\x02X\x01\0\0\0\xff.", "UTF-8");
        refused(b"\x80\x02}Q.", "short tuple");
        refused(b"\x80\x02)Q.", "no storage");
        refused(b"\x80\x02}K\x01K\x02s.", "no text");
    }

    /// A tuple of a tuple of a tuple, and values kept and kept again, take no more than their instructions do.
    #[test]
    fn deep_and_wide_stays_small() {
        let deep = [b"\x80\x02)".to_vec(), vec![0x85; 1 << 19], b".".to_vec()].concat();
        refused(&deep, "dictionary");
        let doubled = [b"\x80\x02)".to_vec(), b"q\x00h\x00\x86".repeat(1 << 16), b".".to_vec()].concat();
        refused(&doubled, "dictionary");
    }

    /// Short pickles that would take a hundred times their length in memory.
    #[test]
    fn more_values_than_any_file_needs() {
        let n = MAX_VALUES;
        let kept = (0..n as u32).flat_map(|i| [&b"r"[..], &i.to_le_bytes()].concat()).collect();
        let again = [&b")"[..], b"}", b"N", b"(", b"(NNNNNNNNt", b"}K\x01K\x02s"].map(|bomb| bomb.repeat(n));
        for many in again.into_iter().chain([kept]) {
            refused(&[b"\x80\x02]", &many[..], b"."].concat(), "more than 2000000 values");
        }
    }

    #[test]
    fn an_empty_dictionary_with_remarks() {
        let pickle = b"\x80\x02ccollections\nOrderedDict\nq\x00)Rq\x01}q\x02X\x09\0\0\0_metadataq\x03h\x00)Rq\x04sb.";
        assert!(tensors(pickle).unwrap().is_empty());
    }
}
