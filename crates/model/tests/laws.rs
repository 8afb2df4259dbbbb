//! A row never sees its company; a cut-back store continues as if nothing had been; bad weights harm nobody else.

mod common;

use std::ops::Range;
use std::sync::Arc;

use common::{Memory, specs, stored};
use lacuna_base::Mat;
use lacuna_format::Weights;
use lacuna_kernels::KvFormat;
use lacuna_model::{
    Batch, Block, BlockPart, ContiguousKv, Decoder, Embedding, Head, LoadOptions, ModelError, NoTap, Shown, Tap,
};
use lacuna_spec::{Place, Role};

fn bits(m: &Mat) -> Vec<u32> {
    m.data().iter().map(|x| x.to_bits()).collect()
}

fn tokens(n: usize, salt: usize) -> Vec<u32> {
    (0..n).map(|i| ((i * i * 7 + i * 3 + salt * 11) % 75) as u32).collect()
}

fn run(d: &Decoder, tokens: &[u32], batch: &Batch, kv: &mut ContiguousKv) -> Mat {
    let h = d.forward(tokens, batch, kv, &mut NoTap).unwrap();
    d.logits(h.view()).into_mat()
}

fn whole(d: &Decoder, tokens: &[u32], format: KvFormat) -> Mat {
    run(d, tokens, &Batch::one(0, 0..tokens.len()), &mut ContiguousKv::with_format(&d.spec, 1, format))
}

/// Some positions of a text of `length` tokens.
fn part(sequence: usize, positions: Range<usize>, length: usize) -> Batch {
    let mut batch = Batch::new();
    batch.push_part(sequence, positions, length);
    batch
}

#[test]
fn whole_in_chunks_in_a_batch_and_one_by_one() {
    for (i, spec) in specs().into_iter().enumerate() {
        let d = Decoder::load(&Memory::random(spec, i as u64), &LoadOptions::default()).unwrap();
        for format in [KvFormat::F32, KvFormat::F16, KvFormat::Q8] {
            let (a, b) = (tokens(150, 1), tokens(61, 2));
            let (la, lb) = (whole(&d, &a, format), whole(&d, &b, format));
            assert!(la.data().iter().all(|x| x.is_finite()));
            for step in [1, 5, 16, 33, 128] {
                let mut kv = ContiguousKv::with_format(&d.spec, 1, format);
                for from in (0..a.len()).step_by(step) {
                    let to = (from + step).min(a.len());
                    let got = run(&d, &a[from..to], &part(0, from..to, a.len()), &mut kv);
                    assert_eq!(bits(&got), bits(&la.view().rows_range(from, to).to_mat()), "spec {i} step {step}");
                }
                assert_eq!(kv.len(0), a.len());
            }
            // Both sequences in one call: the second half of a, all of b.
            let mut kv = ContiguousKv::with_format(&d.spec, 3, format);
            run(&d, &a[..70], &part(2, 0..70, 150), &mut kv);
            let mut batch = Batch::one(2, 70..150);
            batch.push(0, 0..61);
            let both = run(&d, &[&a[70..], &b[..]].concat(), &batch, &mut kv);
            assert_eq!(bits(&both.view().rows_range(0, 80).to_mat()), bits(&la.view().rows_range(70, 150).to_mat()));
            assert_eq!(bits(&both.view().rows_range(80, 141).to_mat()), bits(&lb));
            assert!(kv.is_empty(1) && kv.len(2) == 150);
        }
    }
}

#[test]
fn a_cut_store_continues_with_the_same_bits() {
    for (i, spec) in specs().into_iter().enumerate() {
        let d = Decoder::load(&Memory::random(spec, 7), &LoadOptions::default()).unwrap();
        let (a, b) = (tokens(140, 1), tokens(140, 3));
        let mut kv = ContiguousKv::new(&d.spec, 1);
        run(&d, &a, &Batch::one(0, 0..140), &mut kv);
        let full = kv.bytes();
        kv.truncate(0, 37);
        // A state cannot go back: such a text is read again.
        let left = if d.spec.first_mixer().is_some() { 0 } else { 37 };
        assert!(kv.len(0) == left && kv.bytes() < full, "spec {i}");
        let changed = [&a[..37], &b[37..]].concat();
        let want = whole(&d, &changed, KvFormat::F32);
        let got = run(&d, &changed[left..], &Batch::one(0, left..140), &mut kv);
        assert_eq!(bits(&got), bits(&want.view().rows_range(left, 140).to_mat()));
    }
}

#[test]
fn threads_change_nothing() {
    for i in [1, 3, 4, 5] {
        let d = Decoder::load(&Memory::random(specs().remove(i), 7), &LoadOptions::default()).unwrap();
        let a = tokens(90, 1);
        let pool = |n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
        let one = pool(1).install(|| whole(&d, &a, KvFormat::F32));
        assert_eq!(bits(&pool(3).install(|| whole(&d, &a, KvFormat::F32))), bits(&one), "spec {i}");
    }
}

#[derive(Default)]
struct Watch {
    inputs: Vec<(String, usize, usize)>,
    parts: Vec<(usize, BlockPart)>,
    last: Option<Mat>,
    /// Each block predicts the stream that it computes on from several, which are one again behind the last.
    predicts: bool,
}

impl Tap for Watch {
    fn input(&mut self, place: &Place, x: Shown<'_>) -> Result<(), ModelError> {
        self.inputs.push((place.to_string(), x.rows(), x.cols()));
        Ok(())
    }
    fn residual(
        &mut self,
        layer: usize,
        part: BlockPart,
        before: Shown<'_>,
        after: Shown<'_>,
    ) -> Result<(), ModelError> {
        assert_eq!((before.rows(), before.cols()), (after.rows(), after.cols()));
        self.parts.push((layer, part));
        if part == BlockPart::Block {
            if let Some(last) = self.last.as_ref().filter(|_| !self.predicts) {
                let before = before.download()?.view().to_mat();
                assert_eq!(bits(last), bits(&before), "a block begins where the one before ended");
            }
            self.last = Some(after.download()?.view().to_mat());
        }
        Ok(())
    }
}

#[test]
fn a_tap_sees_every_matrix_once_and_changes_nothing() {
    for (i, spec) in specs().into_iter().enumerate() {
        let weights = Memory::random(spec, 7);
        let d = Decoder::load(&weights, &LoadOptions::default()).unwrap();
        let a = tokens(30, 1);
        let mut watch = Watch { predicts: d.spec.altup.is_some(), ..Watch::default() };
        let h = d.forward(&a, &Batch::one(0, 0..30), &mut ContiguousKv::new(&d.spec, 1), &mut watch).unwrap();
        assert_eq!(bits(&d.logits(h.view())), bits(&whole(&d, &a, KvFormat::F32)));
        assert!(watch.predicts || bits(watch.last.as_ref().unwrap()) == bits(&h), "description {i}");
        let mut names: Vec<&str> = watch.inputs.iter().map(|(p, ..)| p.as_str()).collect();
        // AltUp's router is asked before a block, and behind it again.
        names.retain(|n| !n.ends_with(".altup.router"));
        names.sort_unstable();
        let total = names.len();
        names.dedup();
        assert_eq!(names.len(), total, "once each");
        for place in (0..d.spec.layers.len()).flat_map(|l| d.spec.layer_places(l)) {
            if !place.role.is_linear() || place.part == lacuna_spec::Part::Bias {
                continue;
            }
            let cols = d.spec.shape(&place).unwrap().1;
            match watch.inputs.iter().find(|(p, ..)| *p == place.to_string()) {
                Some((_, rows, c)) => assert!(*c == cols && (*rows == 30 || place.expert.is_some()), "{place}"),
                None => assert!(place.expert.is_some(), "{place} was not shown"),
            }
        }
        // Two of five experts for each of 30 rows.
        if i == 1 {
            let routed: usize = watch
                .inputs
                .iter()
                .filter(|(p, ..)| p.starts_with("layers.0.") && p.ends_with(".up"))
                .map(|x| x.1)
                .sum();
            assert_eq!(routed, 60);
        }
        let has = |l: u32| watch.parts.contains(&(l as usize, BlockPart::Attention));
        let alone = |l: usize| d.spec.layers[l].attn.is_some() && d.spec.layers[l].mixer.is_none();
        let layers = d.spec.layers.len();
        assert!((0..layers).all(|l| has(l as u32) == alone(l)), "description {i}");
        let last = (layers - 1, BlockPart::Block);
        assert!(watch.parts.contains(&last), "a block without parts still passes the stream on");

        // The pieces loaded one by one are the model.
        let positions: Vec<usize> = (0..30).collect();
        let mut x = Embedding::load(&weights).unwrap().rows(&a, &positions).unwrap();
        let mut kv = ContiguousKv::new(weights.spec(), 1);
        for l in 0..weights.spec().layers.len() {
            Block::load(&weights, l).unwrap().forward(&mut x, &Batch::one(0, 0..30), &mut kv, &mut NoTap).unwrap();
        }
        assert_eq!(bits(&Head::load(&weights).unwrap().logits(x.view())), bits(&d.logits(h.view())));
    }
}

#[test]
fn errors_name_what_is_wrong() {
    let spec = specs().remove(2);
    let mut weights = Memory::random(spec, 7);
    let d = Decoder::load(&weights, &LoadOptions::default()).unwrap();
    let mut kv = ContiguousKv::new(&d.spec, 1);
    let forward = |t: &[u32], b: Batch, kv: &mut ContiguousKv| d.forward(t, &b, kv, &mut NoTap).unwrap_err();
    assert!(matches!(forward(&[75], Batch::one(0, 0..1), &mut kv), ModelError::Token { token: 75, vocab: 75 }));
    assert!(matches!(
        forward(&[1], Batch::one(0, 256..257), &mut kv),
        ModelError::Position { position: 256, rows: 256 }
    ));
    assert!(matches!(forward(&[1], Batch::one(0, 3..4), &mut kv), ModelError::Store { .. }));
    assert!(matches!(forward(&[1], Batch::one(4, 0..1), &mut kv), ModelError::Store { .. }));
    let q = Place::layer(0, Role::Q);
    weights.tensors.insert(q, Arc::new(stored(1, 1, &[0.0])));
    let e = Block::load(&weights, 0).err().unwrap().to_string();
    assert!(e.contains("layers.0.attn.q") && e.contains("1 x 1") && e.contains("40 x 40"), "{e}");
    weights.tensors.remove(&q.bias());
    weights.tensors.insert(q, Arc::new(stored(40, 40, &[0.0; 1600])));
    assert!(matches!(Block::load(&weights, 0), Err(ModelError::Missing { .. })));
}

#[test]
fn poisoned_weights_panic_nowhere_and_progress_is_told() {
    for spec in specs() {
        let mut weights = Memory::random(spec, 7);
        for place in weights.spec.places() {
            let (rows, cols) = weights.spec.shape(&place).unwrap();
            let bad = |i: usize| [f32::NAN, f32::INFINITY, -1.0][i % 3];
            weights.tensors.insert(place, Arc::new(stored(rows, cols, &(0..rows * cols).map(bad).collect::<Vec<_>>())));
        }
        let told = std::cell::RefCell::new(Vec::new());
        let progress = |done, of| told.borrow_mut().push((done, of));
        let d = Decoder::load(&weights, &LoadOptions { progress: Some(&progress), ..LoadOptions::default() }).unwrap();
        let parts = d.spec.layers.len() + 2;
        assert_eq!(told.borrow().first(), Some(&(0, parts)));
        assert_eq!(told.borrow().last(), Some(&(parts, parts)));
        assert!(d.weights_bytes() > 0);
        whole(&d, &tokens(40, 1), KvFormat::F16);
    }
}
