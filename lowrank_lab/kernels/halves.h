// What both halves of a block share: weights in panels, and sums over all rows.
#pragma once
#include <cstring>
#include "panels.h"
#include "pointwise.h"

constexpr n_t PIECE = 96;        // rows that go through all of a kernel
constexpr n_t UNIT = 2 * PIECE;  // rows of a thread before weights' gradients grow by them

struct Weight {  // of a layer: (out×in), contiguous
    const float *W;
    n_t out, in;
    n_t forward() const { return up(out, NR) * in; }  // floats of its panels
    n_t backward() const { return up(in, NR) * out; }
    void pack_forward(float *panels, n_t thread, n_t threads) const {
        pack(W, 1, in, 0, in, out, panels, thread, threads);
    }
    void pack_backward(float *panels, n_t thread, n_t threads) const {
        pack(W, in, 1, 0, out, in, panels, thread, threads);
    }
};

// Y (rows×out) = X Wᵀ, or +=, with W packed forward; dX (rows×in) = dY W with W packed backward. Rows
// of X and Y are ldx and ldy apart.
template <bool add>
static void layer(n_t rows, const float *x, n_t in, n_t ldx, const float *panels, float *y, n_t out,
                  n_t ldy) {
    for (n_t r = 0; r < rows; r += MC, x += MC * ldx, y += MC * ldy)
        for (n_t k = 0; k < in; k += KC) {
            n_t count = least(MC, rows - r), depth = least(KC, in - k), step = MR * ldx;
            if (add || k) times_panels<true>(count, depth, x + k, ldx, 1, step, panels + k * NR, in * NR, y, ldy, out);
            else times_panels<false>(count, depth, x, ldx, 1, step, panels, in * NR, y, ldy, out);
        }
}

template <bool add>
static void layer(n_t rows, const float *x, n_t in, const float *panels, float *y, n_t out) {
    layer<add>(rows, x, in, in, panels, y, out, out);
}

// The units of rows that are worked on at a time: one for each thread, if there are so many.
INLINE n_t units_of(n_t rows, n_t depth, n_t threads) { return least(threads, (rows + depth - 1) / depth); }

// A sum of Aᵀ B over all rows, C (m×n), a few units of `depth` rows at a time. A (rows lda apart) and B,
// which is packed while it is in a cache, are those of all units; each thread adds them, one unit after
// another, to its own rows of C. So C doesn't depend on the number of threads.
struct Sum {
    n_t m, n, depth, lda;
    float *panels;

    // A cache's line has 16 floats. Tiles whose width doesn't divide it share lines, and those of long rows
    // read from another page of memory in each: both read a copy of A, if they read it often enough.
    bool copies() const { return (16 % MR || lda >= 1024) && n >= 8 * NR; }
    static n_t size(n_t n, n_t depth) { return (up(n, NR) + MC) * depth; }  // floats of a unit, with its copy
    void pack(n_t unit, n_t first, const float *B, n_t rows) const {
        pack_rows<NR>(B, n, rows, n, first, depth, panels + unit * size(n, depth));
    }
    // The share of one of so many threads, at most one for each unit; `again` if C has a sum already.
    void add(n_t rows, const float *A, float *C, bool again, n_t thread, n_t threads) const {
        n_t tiles = (m + MR - 1) / MR, end = least(m, MR * share(tiles, thread + 1, threads));
        float *copy = panels + thread * size(n, depth) + up(n, NR) * depth;
        for (n_t r = MR * share(tiles, thread, threads); r < end; r += MC)
            for (n_t unit = 0, from = 0; from < rows; unit++, from += depth) {
                n_t K = least(depth, rows - from), count = least(MC, end - r), ka = lda, step = MR;
                const float *a = A + from * lda + r, *b = panels + unit * size(n, depth);
                if (copies()) {
                    pack_rows<MR>(a, lda, K, count, 0, K, copy);
                    a = copy, ka = MR, step = MR * K;
                }
                if (again || unit) times_panels<true>(count, K, a, 1, ka, step, b, NR * depth, C + r * n, n, n);
                else times_panels<false>(count, K, a, 1, ka, step, b, NR * depth, C + r * n, n, n);
            }
    }
};

INLINE void norm_rows_again(const float *x, const float *w, const float *s, float *y, n_t rows, n_t d) {
    for (n_t r = 0; r < rows; r++)
#pragma omp simd
        for (n_t i = 0; i < d; i++) y[r * d + i] = x[r * d + i] * s[r] * w[i];
}

// out (d) += the rows of sums (rows×d).
INLINE void add_rows(const float *sums, n_t rows, n_t d, float *out) {
    for (n_t r = 0; r < rows; r++)
        for (n_t i = 0; i < d; i++) out[i] += sums[r * d + i];
}
