//! Rows that multiply a matrix: so many at the most, each row seen as likely to be among them as any other.

use lacuna_base::{Mat, Rng};
use lacuna_contract::Gathered;

use super::{Event, Reducer};

/// Where the lots come from: the same rows in every run.
const SEED: u64 = 0x726f_7773;

pub(super) struct InputRows {
    most: usize,
    seen: usize,
    cols: usize,
    kept: Vec<f32>,
    rng: Rng,
}

impl InputRows {
    pub fn new(most: usize) -> InputRows {
        InputRows { most, seen: 0, cols: 0, kept: Vec::new(), rng: Rng::new(SEED) }
    }
}

impl Reducer for InputRows {
    fn see(&mut self, event: &Event<'_>) {
        let Event::Input(x) = event else { return };
        self.cols = x.cols();
        for r in 0..x.rows() {
            self.seen += 1;
            if self.seen <= self.most {
                self.kept.extend_from_slice(x.row(r));
                continue;
            }
            // Vitter's reservoir: row `i` takes the place of one kept before with the chance `most / i`.
            let at = self.rng.below(self.seen);
            if at < self.most {
                self.kept[at * self.cols..(at + 1) * self.cols].copy_from_slice(x.row(r));
            }
        }
    }

    fn gathered(self: Box<Self>) -> Gathered {
        Gathered::Matrix(Mat::from_vec(self.seen.min(self.most), self.cols, self.kept))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of rows that say their own number, cut into calls of `at_once`.
    fn kept(most: usize, rows: usize, at_once: usize) -> Vec<usize> {
        let x = Mat::from_fn(rows, 2, |r, c| (2 * r + c) as f32);
        let mut made = Box::new(InputRows::new(most));
        for from in (0..rows).step_by(at_once) {
            made.see(&Event::Input(x.view().rows_range(from, (from + at_once).min(rows))));
        }
        let Gathered::Matrix(m) = made.gathered() else { panic!("rows") };
        assert_eq!(m.rows(), rows.min(most));
        (0..m.rows())
            .map(|r| {
                assert_eq!(m[(r, 1)], m[(r, 0)] + 1.0, "rows stay whole");
                m[(r, 0)] as usize / 2
            })
            .collect()
    }

    #[test]
    fn all_rows_where_they_fit_and_else_an_even_draw_that_no_cut_changes() {
        assert_eq!(kept(9, 7, 3), (0..7).collect::<Vec<_>>());
        assert_eq!(kept(0, 7, 3), Vec::<usize>::new());
        let drawn = kept(500, 4000, 64);
        assert_eq!(drawn, kept(500, 4000, 1));
        let mut once = drawn.clone();
        once.sort_unstable();
        once.dedup();
        assert_eq!(once.len(), 500, "no row twice");
        let late = drawn.iter().filter(|r| **r >= 2000).count();
        assert!((200..300).contains(&late), "{late} of 500 from the second half");
    }
}
