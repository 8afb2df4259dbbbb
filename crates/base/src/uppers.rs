//! Clean upper halves of vector registers behind products.
//!
//! The library's products are assembly that leaves the upper halves of wide registers as they are. While these are not
//! zero, every instruction compiled for SSE2 on the same thread waits for the one before it that wrote the register:
//! a softmax behind a product took several times as long.

/// Zeroes the upper halves when it goes.
pub(crate) struct Uppers;

impl Drop for Uppers {
    #[inline]
    fn drop(&mut self) {
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx") {
            // SAFETY: the processor has AVX.
            unsafe { zero() };
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx")]
fn zero() {
    std::arch::x86_64::_mm256_zeroupper();
}
