// C (m×n) = A (m×k) · B (k×n), float32.
//
// B is packed in blocks that all threads share, A if it is transposed. Each thread has its own rows of
// C, whose sums don't depend on the number of threads.
#include "panels.h"

constexpr n_t NC = 2048;  // columns of B in a block

extern "C" n_t product_scratch(n_t k, n_t n, int threads) {  // floats
    return least(k, KC) * (up(least(n, NC), NR) + threads * MC);
}

struct Block {  // of B, in panels
    const float *panels;
    n_t depth, columns;
};

// Rows [r, end) of C (+)= A B for A's columns of a block, whose first one A points to.
template <bool add>
static void times_block(const float *A, n_t ra, n_t ka, Block b, float *C, n_t ldc, n_t r, n_t end,
                        float *copy) {
    for (; r < end; r += MC) {
        n_t rows = least(MC, end - r), a_row = ra, a_k = 1, step = MR * ra;
        const float *a = A + r * ra;
        if (ka != 1) {
            pack_rows<MR>(a, ka, b.depth, rows, 0, b.depth, copy);
            a = copy, a_row = 1, a_k = MR, step = MR * b.depth;
        }
        times_panels<add>(rows, b.depth, a, a_row, a_k, step, b.panels, b.depth * NR, C + r * ldc, ldc, b.columns);
    }
}

// A[r, k] is A[r·ra + k·ka], with ra or ka 1, and B[k, c] is B[k·rb + c·cb], with rb or cb 1.
extern "C" void product(const float *A, n_t ra, n_t ka, const float *B, n_t rb, n_t cb, float *C,
                        float *panels, n_t m, n_t k, n_t n, int threads) {
    n_t blocks = (k + KC - 1) / KC, tiles = (m + MR - 1) / MR;
    float *copies = panels + least(k, KC) * up(least(n, NC), NR);
    for (n_t c = 0; c < n; c += NC)
        for (n_t i = 0; i < blocks; i++) {
            n_t from = k * i / blocks;
            Block b = {panels, k * (i + 1) / blocks - from, least(NC, n - c)};
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
            for (n_t t = 0; t < threads; t++)
                pack(B + c * cb, rb, cb, from, b.depth, b.columns, panels, t, threads);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
            for (n_t t = 0; t < threads; t++) {
                n_t r = MR * share(tiles, t, threads), end = least(m, MR * share(tiles, t + 1, threads));
                float *copy = copies + t * b.depth * MC;
                if (from) times_block<true>(A + from * ka, ra, ka, b, C + c, n, r, end, copy);
                else times_block<false>(A + from * ka, ra, ka, b, C + c, n, r, end, copy);
            }
        }
}
