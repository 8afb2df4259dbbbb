//! What every backend must do alike, and what a step may not do: bring anything to the host that nobody asked for.

mod common;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use common::{Memory, specs};
use lacuna_base::MatRef;
use lacuna_format::{Stored, Weights};
use lacuna_kernels::{Activations, Attention, KvFormat, KvLayout, Mass};
use lacuna_model::backend::{Host, Measure, MixerVectors, NO_CHOICE, Xielu};
use lacuna_model::{
    Backend, Batch, ContiguousKv, Cpu, Decoder, LoadOptions, ModelError, Naive, NoTap, Shown, Tables, Tap, Wants,
};
use lacuna_spec::{Activation, Experts, Mixer, Norm, Place, Rope, Temperature};

/// Counts what crosses the seam, by operation.
#[derive(Clone, Default)]
struct Counting<B> {
    inner: B,
    calls: Rc<RefCell<BTreeMap<&'static str, usize>>>,
}

impl<B> Counting<B> {
    fn count(&self, what: &'static str) -> &B {
        *self.calls.borrow_mut().entry(what).or_default() += 1;
        &self.inner
    }

    /// What was counted since the last call.
    fn take(&self) -> BTreeMap<&'static str, usize> {
        std::mem::take(&mut self.calls.borrow_mut())
    }

    fn waits(&self) -> usize {
        let waits = ["finish", "download", "download_ids", "download_starts"];
        self.calls.borrow().iter().filter(|(name, _)| waits.contains(name)).map(|(_, n)| n).sum()
    }
}

impl<B: Backend> Backend for Counting<B> {
    type Matrix = B::Matrix;
    type Experts = B::Experts;
    type Norm = B::Norm;
    type Table = B::Table;
    type Rope = B::Rope;
    type Rows = B::Rows;
    type Ids = B::Ids;
    type Routes = B::Routes;
    type Pages = B::Pages;
    type Mixer = B::Mixer;
    type States = B::States;
    type Step = B::Step;

    fn matrix(
        &self,
        place: &Place,
        stored: &Stored,
        bias: Option<Vec<f32>>,
        activations: Activations,
        release: &dyn Fn(),
    ) -> Result<B::Matrix, ModelError> {
        self.count("matrix").matrix(place, stored, bias, activations, release)
    }
    fn experts(&self, all: Vec<B::Matrix>) -> B::Experts {
        self.count("experts").experts(all)
    }
    fn measure(&self, matrix: &B::Matrix) -> Measure {
        self.inner.measure(matrix)
    }
    fn norm_of(
        &self,
        place: &Place,
        norm: Norm,
        width: usize,
        scale: Option<Vec<f32>>,
        bias: Option<Vec<f32>>,
    ) -> B::Norm {
        self.count("norm_of").norm_of(place, norm, width, scale, bias)
    }
    fn table(&self, stored: Arc<Stored>) -> B::Table {
        self.count("table").table(stored)
    }
    fn rope_of(&self, rope: &Rope) -> B::Rope {
        self.count("rope_of").rope_of(rope)
    }
    fn pages(&self, layout: KvLayout, format: KvFormat) -> B::Pages {
        self.count("pages").pages(layout, format)
    }
    fn mixer_of(&self, place: &Place, mixer: &Mixer, hidden: usize, vectors: MixerVectors) -> B::Mixer {
        self.count("mixer_of").mixer_of(place, mixer, hidden, vectors)
    }
    fn states(&self, mixer: &Mixer, hidden: usize) -> B::States {
        self.count("states").states(mixer, hidden)
    }
    fn norm_pieces(&self, norm: &B::Norm, pieces: usize, x: &B::Rows) -> B::Rows {
        self.count("norm_pieces").norm_pieces(norm, pieces, x)
    }
    fn convolve(&self, mixer: &B::Mixer, states: &mut B::States, layer: usize, step: &B::Step, x: &B::Rows) -> B::Rows {
        self.count("convolve").convolve(mixer, states, layer, step, x)
    }
    fn scan(
        &self,
        mixer: &B::Mixer,
        states: &mut B::States,
        layer: usize,
        step: &B::Step,
        read: [&B::Rows; 2],
        beta: Option<&B::Rows>,
    ) -> B::Rows {
        self.count("scan").scan(mixer, states, layer, step, read, beta)
    }
    fn begin(&self, batch: &Batch, tables: Tables) -> B::Step {
        self.count("begin").begin(batch, tables)
    }
    fn finish(&self) -> Result<(), ModelError> {
        self.count("finish").finish()
    }
    fn upload(&self, x: MatRef<'_>) -> B::Rows {
        self.count("upload").upload(x)
    }
    fn upload_ids(&self, ids: &[u32]) -> B::Ids {
        self.count("upload_ids").upload_ids(ids)
    }
    fn download<'a>(&self, x: &'a B::Rows, rows: Range<usize>) -> Result<Host<'a>, ModelError> {
        self.count("download").download(x, rows)
    }
    fn download_ids(&self, ids: &B::Ids) -> Result<Vec<u32>, ModelError> {
        self.count("download_ids").download_ids(ids)
    }
    fn download_starts(&self, routes: &B::Routes) -> Result<Vec<usize>, ModelError> {
        self.count("download_starts").download_starts(routes)
    }
    fn shape(&self, x: &B::Rows) -> (usize, usize) {
        self.inner.shape(x)
    }
    fn copy(&self, x: &B::Rows) -> B::Rows {
        self.count("copy").copy(x)
    }
    fn pick(&self, x: &B::Rows, rows: &[usize]) -> B::Rows {
        self.count("pick").pick(x, rows)
    }
    fn embed(&self, table: &B::Table, ids: &B::Ids) -> B::Rows {
        self.count("embed").embed(table, ids)
    }
    fn products<const N: usize>(&self, all: [&B::Matrix; N], x: &B::Rows) -> [B::Rows; N] {
        self.count("products").products(all, x)
    }
    fn norm(&self, norm: &B::Norm, x: &B::Rows) -> B::Rows {
        self.count("norm").norm(norm, x)
    }
    fn rope<const N: usize>(&self, rope: &B::Rope, head_dim: usize, step: &B::Step, x: [&mut B::Rows; N]) {
        self.count("rope").rope(rope, head_dim, step, x);
    }
    fn activate(&self, act: Activation, x: &mut B::Rows, up: Option<&B::Rows>) {
        self.count("activate").activate(act, x, up);
    }
    fn xielu(&self, of: Xielu, x: &mut B::Rows) {
        self.count("xielu").xielu(of, x);
    }
    fn clip(&self, x: &mut B::Rows, by: f32) {
        self.count("clip").clip(x, by);
    }
    fn temper(&self, by: Temperature, step: &B::Step, x: &mut B::Rows) {
        self.count("temper").temper(by, step, x);
    }
    fn add(&self, x: &mut B::Rows, y: &B::Rows) {
        self.count("add").add(x, y);
    }
    fn scale(&self, x: &mut B::Rows, by: f32) {
        self.count("scale").scale(x, by);
    }
    fn softcap(&self, x: &mut B::Rows, cap: f32) {
        self.count("softcap").softcap(x, cap);
    }
    fn write(&self, pages: &mut B::Pages, layer: usize, step: &B::Step, keys: &B::Rows, values: &B::Rows) {
        self.count("write").write(pages, layer, step, keys, values);
    }
    fn attend(&self, how: &Attention, pages: &B::Pages, layer: usize, step: &B::Step, q: &B::Rows) -> B::Rows {
        self.count("attend").attend(how, pages, layer, step, q)
    }
    fn weigh(&self, how: &Attention, pages: &B::Pages, layer: usize, step: &B::Step, q: &B::Rows, mass: &mut [Mass]) {
        self.count("weigh").weigh(how, pages, layer, step, q, mass);
    }
    fn weigh_rows(&self, x: &mut B::Rows, by: &B::Rows) {
        self.count("weigh_rows").weigh_rows(x, by);
    }
    fn mix(&self, x: &B::Rows, ins: usize, by: &B::Rows) -> B::Rows {
        self.count("mix").mix(x, ins, by)
    }
    fn scale_columns(&self, place: &Place, x: &mut B::Rows, by: &B::Rows) {
        self.count("scale_columns").scale_columns(place, x, by);
    }
    fn match_magnitude(&self, x: &mut B::Rows, like: &B::Rows) {
        self.count("match_magnitude").match_magnitude(x, like);
    }
    fn cut_off(&self, x: &mut B::Rows, by: f32) {
        self.count("cut_off").cut_off(x, by);
    }
    fn columns(&self, x: &B::Rows, width: usize, which: Range<usize>) -> B::Rows {
        self.count("columns").columns(x, width, which)
    }
    fn beside(&self, all: [&B::Rows; 2], widths: [usize; 2]) -> B::Rows {
        self.count("beside").beside(all, widths)
    }
    fn head_products(&self, all: &B::Experts, x: &B::Rows) -> B::Rows {
        self.count("head_products").head_products(all, x)
    }
    fn route(
        &self,
        logits: &B::Rows,
        choice: Experts,
        correction: Option<&B::Rows>,
        scale: Option<&B::Rows>,
    ) -> B::Routes {
        self.count("route").route(logits, choice, correction, scale)
    }
    fn gather(&self, x: &B::Rows, routes: &B::Routes) -> B::Rows {
        self.count("gather").gather(x, routes)
    }
    fn expert_products<const N: usize>(&self, all: [&B::Experts; N], x: &B::Rows, routes: &B::Routes) -> [B::Rows; N] {
        self.count("expert_products").expert_products(all, x, routes)
    }
    fn scatter(&self, y: &B::Rows, routes: &B::Routes) -> B::Rows {
        self.count("scatter").scatter(y, routes)
    }
    fn argmax(&self, x: &B::Rows) -> B::Ids {
        self.count("argmax").argmax(x)
    }
}

fn load<B: Backend>(backend: &B, weights: &dyn Weights) -> Decoder<B> {
    Decoder::load_on(backend, weights, &LoadOptions::default()).unwrap()
}

fn store<B: Backend>(backend: &B, weights: &dyn Weights, sequences: usize) -> ContiguousKv<B> {
    ContiguousKv::on(backend, weights.spec(), sequences, KvFormat::F32)
}

fn tokens(n: usize, vocab: usize, salt: usize) -> Vec<u32> {
    (0..n).map(|i| ((i * i * 7 + i * 3 + salt * 11) % vocab) as u32).collect()
}

/// Logits of two texts in one batch, the first read in two parts.
fn logits<B: Backend>(backend: &B, weights: &dyn Weights) -> Vec<f32> {
    let (d, mut kv, vocab) = (load(backend, weights), store(backend, weights, 2), weights.spec().vocab);
    let (a, b) = (tokens(45, vocab, 1), tokens(7, vocab, 2));
    let mut first = Batch::new();
    first.push_part(1, 0..40, 45);
    d.forward(&a[..40], &first, &mut kv, &mut NoTap).unwrap();
    let mut batch = Batch::one(1, 40..45);
    batch.push(0, 0..7);
    let hidden = d.forward(&[&a[40..], &b].concat(), &batch, &mut kv, &mut NoTap).unwrap();
    let out = d.head.project(&d.head.normed(&hidden));
    let out = backend.download(&out, 0..12).unwrap();
    (0..12).flat_map(|r| out.view().row(r).to_vec()).collect()
}

#[test]
fn the_processor_agrees_with_the_slow_twin() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tiny");
    let mut models: Vec<(String, Box<dyn Weights>)> = Vec::new();
    for (i, spec) in specs().into_iter().enumerate() {
        models.push((format!("description {i}"), Box::new(Memory::random(spec, i as u64))));
    }
    for entry in std::fs::read_dir(root).unwrap() {
        let dir = entry.unwrap().path();
        if dir.join("golden.json").is_file() {
            models.push((dir.display().to_string(), Box::new(lacuna_checkpoint::open(&dir).unwrap())));
        }
    }
    assert!(models.len() >= 24, "{} models", models.len());
    for (name, weights) in models {
        let (cpu, naive) = (logits(&Cpu, &*weights), logits(&Naive, &*weights));
        let size = naive.iter().fold(1.0f32, |m, x| m.max(x.abs()));
        let off = cpu.iter().zip(&naive).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(off <= 2e-5 * size, "{name}: off by {off} of {size}");
    }
}

#[test]
fn a_step_brings_nothing_to_the_host_that_nobody_asked_for() {
    for (i, spec) in specs().into_iter().enumerate() {
        let weights = Memory::random(spec, i as u64);
        let backend = Counting::<Cpu>::default();
        let d = load(&backend, &weights);
        let mut kv = store(&backend, &weights, 2);
        assert_eq!(backend.waits(), 0, "loading");
        let (a, vocab) = (tokens(30, weights.spec.vocab, 3), weights.spec.vocab);
        let mut batch = Batch::one(0, 0..20);
        batch.push(1, 0..10);
        backend.take();
        let mut hidden = d.forward(&a, &batch, &mut kv, &mut NoTap).unwrap();
        let learned = usize::from(matches!(weights.spec.positions, lacuna_spec::Positions::Learned { .. }));
        assert_eq!(backend.waits(), 0, "description {i}");
        {
            let calls = backend.calls.borrow();
            assert_eq!(
                (calls["begin"], calls["upload_ids"]),
                (1, 1 + learned),
                "what a step reads is handed over once"
            );
            // A factor of time steps stands before their bias: what they read is scaled apart.
            let scaled = |l: &lacuna_spec::LayerSpec| matches!(&l.mixer, Some(Mixer::Ssd(m)) if m.factors.is_some());
            let copies = weights.spec.layers.iter().filter(|l| scaled(l)).count();
            assert!(!calls.contains_key("upload") && calls.get("copy").copied().unwrap_or(0) == copies);
        }
        // Two texts go on by what is likeliest: ids go from step to step where they are.
        let mut ids = d.greedy(&hidden, &[19, 29]);
        let mut said = vec![backend.inner.download_ids(&ids).unwrap()];
        for step in 0..5 {
            let mut batch = Batch::one(0, 20 + step..21 + step);
            batch.push(1, 10 + step..11 + step);
            hidden = d.forward_ids(&ids, &batch, &mut kv, &mut NoTap).unwrap();
            ids = d.greedy(&hidden, &[0, 1]);
            said.push(backend.inner.download_ids(&ids).unwrap());
        }
        assert_eq!(backend.waits(), 0, "description {i}");
        // Each alone, by the logits on the host.
        for (s, text) in [&a[..20], &a[20..]].into_iter().enumerate() {
            let d = Decoder::load(&weights, &LoadOptions::default()).unwrap();
            let (mut text, mut kv) = (text.to_vec(), ContiguousKv::new(&weights.spec, 1));
            for step in &said {
                let from = kv.len(0);
                let hidden = d.forward(&text[from..], &Batch::one(0, from..text.len()), &mut kv, &mut NoTap).unwrap();
                let row = d.logits(hidden.view().rows_range(hidden.rows() - 1, hidden.rows()));
                let best = (0..vocab).max_by(|&x, &y| row[(0, x)].total_cmp(&row[(0, y)]).then(y.cmp(&x))).unwrap();
                assert_eq!(step[s] as usize, best, "description {i}, text {s}");
                text.push(best as u32);
            }
        }
    }
}

/// Wants everything and downloads one place's.
struct One(Option<Place>, usize);

impl<B: Backend> Tap<B> for One {
    fn wants(&self) -> Wants {
        Wants { inputs: true, outputs: true, residuals: true }
    }
    fn input(&mut self, place: &Place, x: Shown<'_, B>) -> Result<(), ModelError> {
        if self.0 == Some(*place) {
            let rows = x.download()?;
            assert_eq!((rows.view().rows(), rows.view().cols()), (x.rows(), x.cols()));
            self.1 += 1;
        }
        Ok(())
    }
}

#[test]
fn a_tap_downloads_what_it_takes() {
    let weights = Memory::random(specs().remove(1), 7);
    let backend = Counting::<Cpu>::default();
    let d = load(&backend, &weights);
    let a = tokens(30, weights.spec.vocab, 3);
    let batch = Batch::one(0, 0..30);
    for (wanted, downloads) in [(None, 0), (Some("layers.0.attn.o"), 1), (Some("layers.1.ffn.experts.0.down"), 1)] {
        let place = wanted.map(|p| p.parse().unwrap());
        backend.take();
        let mut tap = One(place, 0);
        d.forward(&a, &batch, &mut store(&backend, &weights, 1), &mut tap).unwrap();
        let calls = backend.take();
        assert_eq!((tap.1, calls.get("download").copied().unwrap_or(0)), (downloads, downloads), "{wanted:?}");
        // Where each expert's rows are, for both mixtures.
        assert_eq!(calls["download_starts"], 2);
    }
}

#[test]
fn nothing_is_chosen_by_numbers_that_are_none() {
    let rows = [[1.0, 3.0, 3.0], [f32::NAN, 0.0, 1.0], [0.0, f32::INFINITY, 1.0], [f32::NEG_INFINITY, -2.0, -3.0]];
    let x = MatRef::new(4, 3, rows.as_flattened());
    let want = [1, NO_CHOICE, NO_CHOICE, 1];
    assert_eq!(Cpu.argmax(&Cpu.upload(x))[..], want);
    assert_eq!(Naive.argmax(&Naive.upload(x)), want);
}
