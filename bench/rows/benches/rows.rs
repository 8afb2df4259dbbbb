//! Every kernel row: one token, a small batch and a prompt, on a matrix that caches hold. Weights a second, so that
//! rows compare.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use lacuna_base::Mat;
use lacuna_bench_rows::ROWS;
use std::hint::black_box;
use std::time::Duration;

/// 1 MB at 4 bits, 4 MB at 16.
const SHAPE: (usize, usize) = (1024, 2048);

fn rows(c: &mut Criterion) {
    let mut group = c.benchmark_group("product");
    group.sample_size(20).warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_millis(600));
    for row in ROWS {
        let linear = row.linear(SHAPE.0, SHAPE.1);
        for tokens in [1, 8, 128] {
            let x = Mat::from_fn(tokens, SHAPE.1, |r, c| ((r * 31 + c * 17) % 101) as f32 / 50.0 - 1.0);
            let mut out = Mat::zeros(tokens, SHAPE.0);
            group.throughput(Throughput::Elements((SHAPE.0 * SHAPE.1 * tokens) as u64));
            group.bench_function(BenchmarkId::new(row.name, tokens), |b| {
                b.iter(|| linear.forward(black_box(x.view()), out.view_mut()));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, rows);
criterion_main!(benches);
