// What both halves of a block share: weights in panels, and sums over parts of the rows.
#pragma once
#include <cstring>
#include "panels.h"
#include "pointwise.h"

constexpr n_t PARTS = 8;  // partial sums of gradients: results don't depend on the number of threads

struct Weight {  // of a layer: (out×in), contiguous
    const float *W;
    n_t out, in;
    n_t size() const { return out * in; }
    void pack_forward(float *panels) const { pack(W, 1, in, 0, in, out, panels); }
    void pack_backward(float *panels) const { pack(W, in, 1, 0, out, in, panels); }
};

// Y (rows×out) = X Wᵀ, or +=, with W packed forward; dX (rows×in) = dY W with W packed backward.
template <bool add>
static void layer(n_t rows, const float *x, n_t in, const float *panels, float *y, n_t out) {
    for (n_t r = 0; r < rows; r += ROWS) {
        n_t count = rows - r < ROWS ? rows - r : ROWS;
        times_panels<add>(count, in, x + r * in, in, 1, panels, y + r * out, out);
    }
}

static void norm_rows_again(const float *x, const float *w, const float *s, float *y, n_t rows, n_t d) {
    for (n_t r = 0; r < rows; r++)
#pragma omp simd
        for (n_t i = 0; i < d; i++) y[r * d + i] = x[r * d + i] * s[r] * w[i];
}

// out (count) = the sum of PARTS rows, `stride` floats apart; count is a multiple of N.
static void sum_parts(const float *sums, n_t stride, float *out, n_t count) {
    for (n_t i = 0; i < count; i += W) {
        vec total = at(sums + i);
        for (n_t part = 1; part < PARTS; part++) total += at(sums + part * stride + i);
        at(out + i) = total;
    }
}
