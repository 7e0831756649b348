// C (m×n) = A (m×k) · B (k×n), float32, for products with many tokens and a small weight.
//
// A piece of A's rows (or of the common dimension, if that is long) and a panel of B stay in the
// first two caches.
#include "panels.h"

constexpr n_t DEPTH = 128;  // of the common dimension at a time

// A[r, k] is A[r·ra + k·ka], with ra or ka 1, and B[k, c] is B[k·rb + c·cb]; C is contiguous.
// `panels` has DEPTH·(n rounded up to N) floats.
extern "C" void product(const float *A, n_t ra, n_t ka, const float *B, n_t rb, n_t cb, float *C,
                        float *panels, n_t m, n_t k, n_t n, int threads) {
    for (n_t from = 0; from < k; from += DEPTH) {
        n_t depth = k - from < DEPTH ? k - from : DEPTH;
        pack(B, rb, cb, from, depth, n, panels);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
        for (n_t r = 0; r < m; r += ROWS) {
            n_t rows = m - r < ROWS ? m - r : ROWS;
            const float *piece = A + r * ra + from * ka;
            if (from) times_panels<true>(rows, depth, piece, ra, ka, panels, C + r * n, n);
            else times_panels<false>(rows, depth, piece, ra, ka, panels, C + r * n, n);
        }
    }
}
