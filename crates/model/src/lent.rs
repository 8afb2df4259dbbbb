//! Matrices lent for a part of a forward pass and taken back: a step allocates nothing once its sizes have been seen.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};
use std::thread::LocalKey;

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

/// What can be used again when it is cleared.
pub trait Reuse: Default + 'static {
    /// A thread's store of such.
    fn store() -> &'static LocalKey<RefCell<Vec<Self>>>;

    /// Empties it, its memory kept.
    fn clear(&mut self);
}

/// What a step needs beside matrices: empty at first, its memory a dropped one's.
#[derive(Debug)]
pub struct Reused<T: Reuse>(T);

impl<T: Reuse> Default for Reused<T> {
    fn default() -> Reused<T> {
        Reused(T::store().with_borrow_mut(Vec::pop).unwrap_or_default())
    }
}

impl<T: Reuse> Drop for Reused<T> {
    fn drop(&mut self) {
        let mut used = std::mem::take(&mut self.0);
        used.clear();
        let _ = T::store().try_with(|free| free.borrow_mut().push(used));
    }
}

impl<T: Reuse> Deref for Reused<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T: Reuse> DerefMut for Reused<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.0
    }
}

impl Reuse for Vec<u32> {
    fn store() -> &'static LocalKey<RefCell<Vec<Vec<u32>>>> {
        thread_local!(static FREE: RefCell<Vec<Vec<u32>>> = const { RefCell::new(Vec::new()) });
        &FREE
    }
    fn clear(&mut self) {
        Vec::clear(self);
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
