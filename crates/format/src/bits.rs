//! Streams of small codes: `bits` bits each, least significant bit first, and base 3, five to a byte.

/// Bytes of `count` codes of `bits` bits; `None` beyond the range of `usize`.
pub fn packed_len(count: usize, bits: u8) -> Option<usize> {
    Some(count.checked_mul(usize::from(bits))?.div_ceil(8))
}

/// One stream of codes of `bits` (1 to 8) bits. Panics where a code needs more.
#[track_caller]
pub fn pack(codes: &[u8], bits: u8) -> Vec<u8> {
    assert!((1..=8).contains(&bits), "codes of {bits} bits");
    let mut out = Vec::with_capacity((codes.len() * usize::from(bits)).div_ceil(8));
    let (mut word, mut filled) = (0u32, 0);
    for &c in codes {
        assert!(u32::from(c) >> bits == 0, "code {c} does not fit {bits} bits");
        word |= u32::from(c) << filled;
        filled += u32::from(bits);
        while filled >= 8 {
            out.push(word as u8);
            word >>= 8;
            filled -= 8;
        }
    }
    if filled > 0 {
        out.push(word as u8);
    }
    out
}

/// Codes `start..start + out.len()` of a stream of `bits` (1 to 8) bits each. Panics where the stream is too short.
#[track_caller]
pub fn unpack(stream: &[u8], bits: u8, start: usize, out: &mut [u8]) {
    unpack_map(stream, bits, start, out, |c| c);
}

/// As [`unpack`], each code passed through `f`.
#[track_caller]
pub(crate) fn unpack_map<T>(stream: &[u8], bits: u8, start: usize, out: &mut [T], f: impl Fn(u8) -> T) {
    match bits {
        1 => go::<1, T>(stream, start, out, f),
        2 => go::<2, T>(stream, start, out, f),
        3 => go::<3, T>(stream, start, out, f),
        4 => go::<4, T>(stream, start, out, f),
        5 => go::<5, T>(stream, start, out, f),
        6 => go::<6, T>(stream, start, out, f),
        7 => go::<7, T>(stream, start, out, f),
        8 => go::<8, T>(stream, start, out, f),
        _ => panic!("codes of {bits} bits"),
    }
}

#[inline(always)]
fn go<const BITS: usize, T>(stream: &[u8], start: usize, out: &mut [T], f: impl Fn(u8) -> T) {
    let need = ((start + out.len()) * BITS).div_ceil(8);
    assert!(stream.len() >= need, "a stream of {} bytes, {need} needed", stream.len());
    let mask = ((1u16 << BITS) - 1) as u8;
    let mut at = start * BITS;
    for chunk in out.chunks_mut(8) {
        // Eight codes and a shift of at most 7 bits fit a word: at 8 bits a code the shift is 0.
        let byte = at / 8;
        let word = match stream.get(byte..byte + 8) {
            Some(b) => u64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]),
            None => stream[byte..].iter().rev().fold(0, |w, &b| w << 8 | u64::from(b)),
        } >> (at % 8);
        let code = |j: usize| f((word >> (j * BITS)) as u8 & mask);
        // The whole chunk apart, so that its loop has a known length and unrolls.
        match <&mut [T; 8]>::try_from(&mut *chunk) {
            Ok(eight) => eight.iter_mut().enumerate().for_each(|(j, o)| *o = code(j)),
            Err(_) => chunk.iter_mut().enumerate().for_each(|(j, o)| *o = code(j)),
        }
        at += 8 * BITS;
    }
}

/// -1, 0 and 1 (as they are) packed five to a byte in base 3, digit = value + 1. Panics for any other value.
#[track_caller]
pub fn pack_trits(values: &[i8]) -> Vec<u8> {
    let digit = |v: &i8| {
        assert!((-1..=1).contains(v), "{v} is no ternary value");
        (v + 1) as u8
    };
    values.chunks(5).map(|c| c.iter().rev().fold(0, |b, v| b * 3 + digit(v))).collect()
}

/// The five values of every byte below 243; higher bytes are refused by `check` and read as zeros here.
const TRITS: [[i8; 5]; 256] = {
    let mut t = [[0i8; 5]; 256];
    let mut b = 0;
    while b < 243 {
        let (mut rest, mut i) = (b, 0);
        while i < 5 {
            t[b][i] = (rest % 3) as i8 - 1;
            rest /= 3;
            i += 1;
        }
        b += 1;
    }
    t
};

/// Values `start..start + out.len()` of a base-3 stream. Panics where the stream is too short.
#[track_caller]
pub fn unpack_trits(stream: &[u8], start: usize, out: &mut [f32]) {
    let need = (start + out.len()).div_ceil(5);
    assert!(stream.len() >= need, "a stream of {} bytes, {need} needed", stream.len());
    let head = ((5 - start % 5) % 5).min(out.len());
    let (first, rest) = out.split_at_mut(head);
    for (j, o) in first.iter_mut().enumerate() {
        *o = f32::from(TRITS[usize::from(stream[start / 5])][start % 5 + j]);
    }
    let from = start.div_ceil(5);
    for (chunk, &b) in rest.chunks_mut(5).zip(&stream[from.min(stream.len())..]) {
        for (o, &t) in chunk.iter_mut().zip(&TRITS[usize::from(b)]) {
            *o = f32::from(t);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::Rng;

    #[test]
    fn any_range_of_any_width_comes_back() {
        let mut rng = Rng::new(1);
        for bits in 1..=8u8 {
            for n in [0, 1, 7, 8, 9, 63, 64, 100] {
                let codes: Vec<u8> = (0..n).map(|_| rng.below(1 << bits) as u8).collect();
                let stream = pack(&codes, bits);
                assert_eq!(Some(stream.len()), packed_len(n, bits));
                for from in 0..=n {
                    let to = from + rng.below(n - from + 1);
                    let mut out = vec![0; to - from];
                    unpack(&stream, bits, from, &mut out);
                    assert_eq!(out, codes[from..to], "{bits} bits, {from}..{to} of {n}");
                }
            }
        }
        assert_eq!(pack(&[1, 2, 3], 4), [0x21, 0x03]);
        assert_eq!(pack(&[5, 6, 7], 3), [0b1111_0101, 0b1]);
    }

    #[test]
    fn trits() {
        let mut rng = Rng::new(2);
        let values: Vec<i8> = (0..53).map(|_| rng.below(3) as i8 - 1).collect();
        let stream = pack_trits(&values);
        assert_eq!(stream.len(), 11);
        for from in 0..=53 {
            for to in from..=53 {
                let mut out = vec![0.0; to - from];
                unpack_trits(&stream, from, &mut out);
                assert!(out.iter().zip(&values[from..to]).all(|(a, b)| *a == f32::from(*b)));
            }
        }
        assert_eq!(pack_trits(&[1, -1, 0]), [2 + 9]);
    }
}
