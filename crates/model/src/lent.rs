//! Matrices lent for a part of a forward pass and taken back: a step allocates nothing once its sizes have been seen.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

use lacuna_base::Mat;

thread_local! {
    static FREE: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// A matrix whose memory goes back to its thread's store when it is dropped.
#[derive(Debug)]
pub struct Lent(Mat);

impl Lent {
    /// `[rows, cols]` of unspecified content.
    pub fn new(rows: usize, cols: usize) -> Lent {
        let len = rows * cols;
        let mut data = FREE.with_borrow_mut(|free| {
            // The smallest that is large enough; else the largest, which grows.
            let fit =
                |v: &Vec<f32>| if v.capacity() >= len { (0, v.capacity()) } else { (1, usize::MAX - v.capacity()) };
            let best = (0..free.len()).min_by_key(|&i| fit(&free[i]));
            best.map(|i| free.swap_remove(i)).unwrap_or_default()
        });
        if data.capacity() < len {
            // Nothing of it is worth copying.
            data.clear();
        }
        data.resize(len, 0.0);
        Lent(Mat::from_vec(rows, cols, data))
    }

    /// The matrix itself, to keep.
    pub fn into_mat(mut self) -> Mat {
        std::mem::take(&mut self.0)
    }
}

/// A matrix's own memory, lent from now on.
impl From<Mat> for Lent {
    fn from(m: Mat) -> Lent {
        Lent(m)
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let data = std::mem::take(&mut self.0).into_vec();
        if data.capacity() == 0 {
            return;
        }
        // A thread that ends has no store any more.
        let _ = FREE.try_with(|free| free.borrow_mut().push(data));
    }
}

impl Deref for Lent {
    type Target = Mat;
    fn deref(&self) -> &Mat {
        &self.0
    }
}

impl DerefMut for Lent {
    fn deref_mut(&mut self) -> &mut Mat {
        &mut self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_comes_back() {
        let (a, b) = (Lent::new(3, 50), Lent::new(2, 10));
        let (pa, pb) = (a.data().as_ptr(), b.data().as_ptr());
        drop((a, b));
        assert_eq!(Lent::new(20, 1).data().as_ptr(), pb);
        let c = Lent::new(7, 9);
        assert_eq!((c.data().as_ptr(), c.rows(), c.cols()), (pa, 7, 9));
    }
}
