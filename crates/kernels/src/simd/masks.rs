//! What instruction sets without masks look up for eight lanes: bytes of shuffles, in which 0x80 leaves a lane empty.

/// For every byte of mask: the places of its set bits, then 0x80.
pub(super) static COMPRESS: [[u8; 8]; 256] = {
    let mut t = [[0x80u8; 8]; 256];
    let mut m = 0;
    while m < 256 {
        let (mut i, mut n) = (0, 0);
        while i < 8 {
            if m >> i & 1 == 1 {
                t[m][n] = i as u8;
                n += 1;
            }
            i += 1;
        }
        m += 1;
    }
    t
};

/// For every byte of mask: the rank of each set bit, 0x80 for the others.
pub(super) static EXPAND: [[u8; 8]; 256] = {
    let mut t = [[0x80u8; 8]; 256];
    let mut m = 0;
    while m < 256 {
        let (mut i, mut n) = (0, 0);
        while i < 8 {
            if m >> i & 1 == 1 {
                t[m][i] = n;
                n += 1;
            }
            i += 1;
        }
        m += 1;
    }
    t
};

/// `EXPAND` for values of two bytes.
pub(super) static EXPAND_PAIRS: [[u8; 16]; 256] = {
    let mut t = [[0x80u8; 16]; 256];
    let mut m = 0;
    while m < 256 {
        let mut i = 0;
        while i < 8 {
            if EXPAND[m][i] < 8 {
                t[m][2 * i] = 2 * EXPAND[m][i];
                t[m][2 * i + 1] = 2 * EXPAND[m][i] + 1;
            }
            i += 1;
        }
        m += 1;
    }
    t
};
