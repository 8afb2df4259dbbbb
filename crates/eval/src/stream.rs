//! Many sequences through a network one block at a time: one block's weights in memory, every sequence's residual
//! stream in one buffer, or in a scratch file where memory is short.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use lacuna_base::{Mat, MatRef};
use lacuna_format::Weights;
use lacuna_kernels::Activations;
use lacuna_model::{Batch, Block, ContiguousKv, Embedding, Head, ModelError, NoTap};
use lacuna_spec::{Place, Role};
use rayon::prelude::*;

use crate::{EvalError, finite};

/// Positions that go through a block together, unless one sequence alone is longer.
const BATCH_TOKENS: usize = 2048;

/// Bytes of logits held at once.
const LOGITS_BYTES: u64 = 64 << 20;

/// How an evaluation computes: how much memory it may take, where it puts what does not fit, and how exactly.
#[derive(Clone, Debug, Default)]
pub struct Means {
    /// Bytes, beside what the process held before. Absent: as many as it takes.
    pub max_ram: Option<u64>,
    /// The folder for a scratch file; absent: the system's folder for temporary files.
    pub scratch: Option<PathBuf>,
    /// How activations meet integer codes; by default as they are, which judges the weights and not this machine's
    /// shortcuts.
    pub activations: Activations,
}

/// Takes rows: the text, the position of the first row, and the residual stream behind the last block of a network,
/// `[tokens, hidden]`.
pub type TakeRows<'a> = &'a mut dyn FnMut(usize, usize, MatRef<'_>) -> Result<(), EvalError>;

/// Who reads texts in a model's place: an engine does, under what it leaves out while it runs. Every row of every text
/// is handed over.
pub type Reader<'a> = &'a dyn Fn(&[Vec<u32>], TakeRows<'_>) -> Result<(), EvalError>;

/// Rows of f32, `[rows, width]`.
enum Rows {
    Memory(Vec<f32>),
    File(File),
}

impl Rows {
    fn new(len: usize, spill: bool, room: &Means) -> Result<Rows, EvalError> {
        if !spill {
            return Ok(Rows::Memory(vec![0.0; len]));
        }
        let dir = room.scratch.clone().unwrap_or_else(std::env::temp_dir);
        let file = tempfile::tempfile_in(&dir).and_then(|f| f.set_len(len as u64 * 4).map(|()| f));
        file.map(Rows::File).map_err(|e| scratch(&dir, len as u64 * 4, &e))
    }

    fn read(&mut self, at: Range<usize>, out: &mut [f32]) -> Result<(), EvalError> {
        match self {
            Rows::Memory(all) => out.copy_from_slice(&all[at]),
            Rows::File(f) => {
                let bytes = bytemuck::cast_slice_mut(out);
                let done = f.seek(SeekFrom::Start(at.start as u64 * 4)).and_then(|_| f.read_exact(bytes));
                done.map_err(|e| scratch(Path::new(""), at.len() as u64 * 4, &e))?;
            }
        }
        Ok(())
    }

    fn write(&mut self, start: usize, values: &[f32]) -> Result<(), EvalError> {
        match self {
            Rows::Memory(all) => all[start..start + values.len()].copy_from_slice(values),
            Rows::File(f) => {
                let done =
                    f.seek(SeekFrom::Start(start as u64 * 4)).and_then(|_| f.write_all(bytemuck::cast_slice(values)));
                done.map_err(|e| scratch(Path::new(""), values.len() as u64 * 4, &e))?;
            }
        }
        Ok(())
    }
}

fn scratch(dir: &Path, bytes: u64, e: &std::io::Error) -> EvalError {
    let at = if dir.as_os_str().is_empty() { String::new() } else { format!(" in {}", dir.display()) };
    EvalError::new(format!("the scratch file{at} ({bytes} bytes at once): {e}"))
}

/// What sequences have become after the last block of a network.
pub struct Streams {
    rows: Rows,
    width: usize,
    /// Where each sequence begins, and the end.
    starts: Vec<usize>,
    activations: Activations,
}

impl Streams {
    /// Runs `sequences` through every block of `weights`. `step` is called after each batch of each block.
    pub fn run(
        weights: &dyn Weights,
        sequences: &[Vec<u32>],
        spill: bool,
        room: &Means,
        step: &mut dyn FnMut(),
    ) -> Result<Streams, EvalError> {
        let spec = weights.spec();
        let width = spec.carried();
        let mut starts = vec![0];
        for s in sequences {
            starts.push(starts[starts.len() - 1] + s.len());
        }
        let total = starts[sequences.len()];
        let mut rows = Rows::new(total * width, spill, room)?;
        let batches = batches(sequences);
        let embed = Embedding::load(weights)?;
        for b in &batches {
            for s in b.clone() {
                let positions: Vec<usize> = (0..sequences[s].len()).collect();
                let x = embed.rows(&sequences[s], &positions)?;
                if let Some(r) = finite::first(x.view()) {
                    return Err(finite::embedding(weights, sequences[s][r]));
                }
                rows.write(starts[s] * width, x.data())?;
            }
        }
        drop(embed);
        weights.release(&Place::global(Role::Embed));
        weights.release(&Place::global(Role::LayerInputs));
        for layer in 0..spec.layers.len() {
            let block = Block::load_with(weights, layer, room.activations)?;
            for b in &batches {
                let (from, to) = (starts[b.start], starts[b.end]);
                let mut batch = Batch::new();
                for (i, s) in b.clone().enumerate() {
                    batch.push(i, 0..sequences[s].len());
                }
                let mut x = Mat::zeros(to - from, width);
                rows.read(from * width..to * width, x.data_mut())?;
                block.forward(&mut x, &batch, &mut ContiguousKv::new(spec, b.len()), &mut NoTap)?;
                if let Some(r) = finite::first(x.view()) {
                    let mut watch = finite::Watch::default();
                    rows.read(from * width..to * width, x.data_mut())?;
                    block.forward(&mut x, &batch, &mut ContiguousKv::new(spec, b.len()), &mut watch)?;
                    let s = b.clone().rfind(|s| starts[*s] <= from + r).unwrap_or(b.start);
                    return Err(watch.error(weights, layer, s, from + r - starts[s]));
                }
                rows.write(from * width, x.data())?;
                step();
            }
            drop(block);
            release(weights, layer);
        }
        Ok(Streams { rows, width, starts, activations: room.activations })
    }

    /// What `reader` makes of `sequences`, a network of the shape of `weights`.
    pub fn read(
        weights: &dyn Weights,
        sequences: &[Vec<u32>],
        spill: bool,
        room: &Means,
        reader: Reader<'_>,
    ) -> Result<Streams, EvalError> {
        let width = weights.spec().hidden;
        let mut starts = vec![0];
        for s in sequences {
            starts.push(starts[starts.len() - 1] + s.len());
        }
        let total = starts[sequences.len()];
        let mut rows = Rows::new(total * width, spill, room)?;
        let mut told = 0;
        reader(sequences, &mut |s, from, x| {
            let fits = sequences.get(s).is_some_and(|s| from + x.rows() <= s.len()) && x.cols() == width;
            if !fits {
                let (n, cols) = (x.rows(), x.cols());
                return Err(EvalError::new(format!("{n} rows of {cols} channels at position {from} of text {s}")));
            }
            if let Some(r) = finite::first(x) {
                let what = format!("text {s}: the row at position {} is not finite behind the last block", from + r);
                return Err(EvalError { what, not_finite: true });
            }
            told += x.rows();
            (0..x.rows()).try_for_each(|r| rows.write((starts[s] + from + r) * width, x.row(r)))
        })?;
        if told != total {
            return Err(EvalError::new(format!("{told} rows of {total} were handed over")));
        }
        Ok(Streams { rows, width, starts, activations: room.activations })
    }

    /// The row of position `position` of sequence `sequence`.
    pub fn row(&self, sequence: usize, position: usize) -> usize {
        let row = self.starts[sequence] + position;
        assert!(row < self.starts[sequence + 1], "position {position} of sequence {sequence}");
        row
    }

    fn gather(&mut self, wanted: &[usize]) -> Result<Mat, EvalError> {
        let w = self.width;
        let mut out = Mat::zeros(wanted.len(), w);
        let mut i = 0;
        while i < wanted.len() {
            let run = wanted[i..].iter().zip(wanted[i]..).take_while(|(a, b)| **a == *b).count();
            self.rows.read(wanted[i] * w..(wanted[i] + run) * w, &mut out.data_mut()[i * w..(i + run) * w])?;
            i += run;
        }
        Ok(out)
    }
}

/// Sequences that go through a block together.
fn batches(sequences: &[Vec<u32>]) -> Vec<Range<usize>> {
    let (mut out, mut first, mut tokens) = (Vec::new(), 0, 0);
    for (i, s) in sequences.iter().enumerate() {
        if i > first && tokens + s.len() > BATCH_TOKENS {
            out.push(first..i);
            (first, tokens) = (i, 0);
        }
        tokens += s.len();
    }
    if first < sequences.len() {
        out.push(first..sequences.len());
    }
    out
}

/// Steps that [`Streams::run`] reports.
pub fn steps(weights: &dyn Weights, sequences: &[Vec<u32>]) -> usize {
    weights.spec().layers.len() * batches(sequences).len()
}

/// Every tensor of a block.
fn places(weights: &dyn Weights, layer: usize) -> Vec<Place> {
    weights.spec().places().into_iter().filter(|p| p.layer == Some(layer as u32)).collect()
}

fn release(weights: &dyn Weights, layer: usize) {
    places(weights, layer).iter().for_each(|p| weights.release(p));
}

/// What evaluating takes beside the residual streams: the largest block or the head, and a batch at work. An estimate
/// from above for weights that kernels take as they are stored.
pub fn floor_bytes(weights: &dyn Weights, sequences: &[Vec<u32>]) -> Result<u64, EvalError> {
    let spec = weights.spec();
    let stored = |p: &Place| -> Result<u64, EvalError> {
        Ok(weights.get(p).map_err(ModelError::from)?.map_or(0, |s| s.bytes()))
    };
    let mut largest = stored(&Place::global(if spec.tied { Role::Embed } else { Role::Head }))?;
    let mut widest = 0;
    for (l, layer) in spec.layers.iter().enumerate() {
        let mut bytes = 0;
        for p in places(weights, l) {
            bytes += stored(&p)?;
        }
        largest = largest.max(bytes);
        let attention = layer.attn.as_ref().map_or(0, |a| (2 * a.heads + 4 * a.kv_heads) * a.head_dim);
        let ffn = layer.ffn.as_ref().map_or(0, |f| 3 * f.width);
        widest = widest.max(attention.max(ffn) + mixer_values(layer, spec.hidden));
    }
    let rows = batches(sequences).iter().map(|b| sequences[b.clone()].iter().map(Vec::len).sum::<usize>()).max();
    let work = rows.unwrap_or(0) as u64 * (3 * spec.hidden + 2 * spec.carried() + widest) as u64 * 4;
    Ok(largest + work.max(LOGITS_BYTES))
}

/// Values of a row that a recurrent mixer makes at once.
fn mixer_values(layer: &lacuna_spec::LayerSpec, hidden: usize) -> usize {
    layer.mixer.as_ref().map_or(0, |m| 3 * m.channels(hidden) + 4 * m.width(hidden))
}

/// Bytes of the residual streams of `sequences`.
pub fn stream_bytes(weights: &dyn Weights, sequences: &[Vec<u32>]) -> u64 {
    sequences.iter().map(Vec::len).sum::<usize>() as u64 * weights.spec().carried() as u64 * 4
}

/// Whether the residual streams of all `nets` must leave memory; an error where even that does not help.
pub fn must_spill(nets: &[&dyn Weights], sequences: &[Vec<u32>], room: &Means) -> Result<bool, EvalError> {
    let Some(max) = room.max_ram else { return Ok(false) };
    let mut floor = 0;
    for net in nets {
        floor = floor.max(floor_bytes(*net, sequences)?);
    }
    if floor > max {
        return Err(EvalError::new(format!("evaluating takes at least {floor} bytes of memory, {max} are allowed")));
    }
    Ok(floor + nets.iter().map(|n| stream_bytes(*n, sequences)).sum::<u64>() > max)
}

/// Calls `f(i, logits)` for the `i`-th of the `wanted` rows with the logits that each network gives it, some rows at a
/// time so that logits never take more than 64 MB; the results in the order of `wanted`.
pub fn score<T: Send>(
    nets: &mut [(&dyn Weights, &mut Streams)],
    wanted: &[usize],
    f: impl Fn(usize, &[&[f32]]) -> T + Sync,
) -> Result<Vec<T>, EvalError> {
    let heads = nets.iter().map(|n| Head::load_with(n.0, n.1.activations)).collect::<Result<Vec<_>, _>>()?;
    let vocab: u64 = nets.iter().map(|n| n.0.spec().vocab as u64).sum();
    let chunk = (LOGITS_BYTES / (vocab.max(1) * 4)).clamp(1, BATCH_TOKENS as u64) as usize;
    let mut out = Vec::with_capacity(wanted.len());
    for (c, rows) in wanted.chunks(chunk).enumerate() {
        let mut logits = Vec::with_capacity(nets.len());
        for ((weights, streams), head) in nets.iter_mut().zip(&heads) {
            let x = streams.gather(rows)?;
            let l = head.logits(x.view());
            if (0..l.rows()).into_par_iter().any(|r| l.row(r).iter().any(|v| !v.is_finite())) {
                return Err(finite::logits(*weights, head, x.view()));
            }
            logits.push(l);
        }
        let one = |i: usize| f(c * chunk + i, &logits.iter().map(|l| l.row(i)).collect::<Vec<_>>());
        out.par_extend((0..rows.len()).into_par_iter().map(one));
    }
    Ok(out)
}
