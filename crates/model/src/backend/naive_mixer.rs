//! Recurrent mixers in f64, straight from their definitions ([`Mixer`]).

use lacuna_spec::{Delta, Mamba, Mixer, Ssd};

use super::MixerVectors;

/// A mixer and its vectors.
pub struct NaiveMixer {
    mixer: Mixer,
    channels: usize,
    vectors: [Vec<f64>; 4],
}

fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// `x / sqrt(|x|^2 + 1e-6)`.
fn unit(x: &[f64]) -> Vec<f64> {
    let length = (x.iter().map(|x| x * x).sum::<f64>() + 1e-6).sqrt();
    x.iter().map(|x| x / length).collect()
}

impl NaiveMixer {
    pub(super) fn new(mixer: &Mixer, hidden: usize, v: MixerVectors) -> NaiveMixer {
        let vectors = [v.conv, v.bias, v.a, v.d].map(|v| v.into_iter().map(f64::from).collect());
        NaiveMixer { mixer: mixer.clone(), channels: mixer.channels(hidden), vectors }
    }

    /// One row's convolution; the state takes its input up.
    pub(super) fn convolve(&self, state: &mut [f64], row: &[f64]) -> Vec<f64> {
        let (n, kernel, [conv, bias, ..]) = (self.channels, self.mixer.kernel(), &self.vectors);
        let short = matches!(self.mixer, Mixer::ShortConv(_));
        let own: Vec<f64> = match &self.mixer {
            Mixer::ShortConv(_) => (0..n).map(|c| row[c] * row[2 * n + c]).collect(),
            Mixer::Ssd(Ssd { factors: Some(f), heads, head_dim, groups, state, .. }) => {
                let (x, each) = (heads * head_dim, groups * state);
                let factor = |c: usize| f64::from(f[if c < x { 1 } else { 2 + (c - x) / each }]);
                (0..n).map(|c| row[c] * factor(c)).collect()
            }
            _ => row.to_vec(),
        };
        let before = &mut state[..(kernel - 1) * n];
        let seen: Vec<f64> = before.iter().chain(&own).copied().collect();
        before.copy_from_slice(&seen[n..]);
        let channel = |c: usize| {
            let sum: f64 = (0..kernel).map(|j| conv[c * kernel + j] * seen[j * n + c]).sum();
            let y = sum + bias.get(c).copied().unwrap_or(0.0);
            if short { y * row[n + c] } else { y }
        };
        (0..n).map(channel).collect()
    }

    /// One row's heads, over what its convolution and activation put out.
    pub(super) fn heads(&self, state: &mut [f64], x: &[f64], dt: &[f64], beta: Option<&[f64]>) -> Vec<f64> {
        let Some((heads, high, wide)) = self.mixer.heads() else { return Vec::new() };
        let state = &mut state[(self.mixer.kernel() - 1) * self.channels..];
        if let Mixer::Mamba(m) = &self.mixer {
            return self.mamba(m, state, x, dt);
        }
        let head = |h: usize| {
            let state = &mut state[h * high * wide..][..high * wide];
            match &self.mixer {
                Mixer::Ssd(m) => self.ssd(m, h, state, x, dt[h]),
                Mixer::Delta(m) => self.delta(m, h, state, x, dt[h], beta.map_or(0.0, |b| b[h])),
                Mixer::ShortConv(_) | Mixer::Mamba(_) => Vec::new(),
            }
        };
        (0..heads).flat_map(head).collect()
    }

    /// Channel by channel; a state lies as `[state, channels]`.
    fn mamba(&self, m: &Mamba, state: &mut [f64], row: &[f64], dt: &[f64]) -> Vec<f64> {
        let (x, rest) = row.split_at(m.channels);
        let (b, c) = rest.split_at(m.state);
        let channel = |i: usize| {
            let dt = softplus(dt[i]);
            let mut y = self.vectors[3][i] * x[i];
            for k in 0..m.state {
                let s = &mut state[k * m.channels + i];
                *s = self.decay(m.log, i * m.state + k, dt) * *s + dt * x[i] * b[k];
                y += c[k] * *s;
            }
            y
        };
        (0..m.channels).map(channel).collect()
    }

    /// `exp(a dt)`.
    fn decay(&self, log: bool, head: usize, dt: f64) -> f64 {
        let a = self.vectors[2][head];
        ((if log { -a.exp() } else { a }) * dt).exp()
    }

    fn ssd(&self, m: &Ssd, head: usize, state: &mut [f64], row: &[f64], dt: f64) -> Vec<f64> {
        let most = m.dt_limit.1.map_or(f64::INFINITY, f64::from);
        let dt = softplus(dt).clamp(m.dt_limit.0.into(), most);
        let decay = self.decay(m.log, head, dt);
        let (wide, group) = (m.head_dim, head / (m.heads / m.groups));
        let (x, rest) = row.split_at(m.heads * wide);
        let (b, c) = rest.split_at(m.groups * m.state);
        let of_group = |v: &'_ [f64]| v[group * m.state..][..m.state].to_vec();
        let (x, b, c) = (&x[head * wide..][..wide], of_group(b), of_group(c));
        let mut y: Vec<f64> = x.iter().map(|x| self.vectors[3][head] * x).collect();
        for (k, s) in state.chunks_mut(wide).enumerate() {
            for i in 0..wide {
                s[i] = decay * s[i] + dt * b[k] * x[i];
                y[i] += c[k] * s[i];
            }
        }
        y
    }

    fn delta(&self, m: &Delta, head: usize, state: &mut [f64], row: &[f64], dt: f64, beta: f64) -> Vec<f64> {
        let decay = self.decay(m.log, head, softplus(dt));
        let (high, wide) = (m.key_dim, m.value_dim);
        let key = if m.tiled { head % m.key_heads } else { head / (m.value_heads / m.key_heads) };
        let keys = m.key_heads * high;
        let (q, k) = (unit(&row[key * high..][..high]), unit(&row[keys + key * high..][..high]));
        let v = &row[2 * keys + head * wide..][..wide];
        state.iter_mut().for_each(|s| *s *= decay);
        let column = |i: usize| {
            let told: f64 = (0..high).map(|j| k[j] * state[j * wide + i]).sum();
            (0..high).for_each(|j| state[j * wide + i] += k[j] * sigmoid(beta) * (v[i] - told));
            (0..high).map(|j| q[j] * state[j * wide + i]).sum::<f64>() / (high as f64).sqrt()
        };
        (0..wide).map(column).collect()
    }
}
