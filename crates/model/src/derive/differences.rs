//! Derivatives by finite differences, of the slow f64 forms of the decoder's operations
//! ([`naive`](crate::backend::naive)).

/// Compares gradients with central differences of `forward` in f64: `of` are the arguments with their gradients under
/// test, `dy` the gradient of what comes out. `forward` is given all arguments.
#[track_caller]
pub(crate) fn check(name: &str, dy: &[f32], of: &[(&[f32], &[f32])], forward: impl Fn(&[Vec<f64>]) -> Vec<f64>) {
    let mut args: Vec<Vec<f64>> = of.iter().map(|(v, _)| v.iter().map(|&x| f64::from(x)).collect()).collect();
    let along = |y: Vec<f64>| {
        assert_eq!(y.len(), dy.len(), "{name}: outputs and their gradients");
        y.iter().zip(dy).map(|(y, d)| y * f64::from(*d)).sum::<f64>()
    };
    for (a, (values, gradient)) in of.iter().enumerate() {
        assert_eq!(values.len(), gradient.len(), "{name}: argument {a} and its gradient");
        let size = gradient.iter().fold(1.0f64, |m, g| m.max(f64::from(g.abs())));
        for i in 0..values.len() {
            let (x, h) = (args[a][i], 1e-5);
            args[a][i] = x + h;
            let up = along(forward(&args));
            args[a][i] = x - h;
            let down = along(forward(&args));
            args[a][i] = x;
            let want = (up - down) / (2.0 * h);
            let got = f64::from(gradient[i]);
            assert!((got - want).abs() <= 2e-5 * size, "{name}: argument {a}, entry {i}: {got}, exact {want}");
        }
    }
}
