// RMSNorm, SwiGLU and the softmax of the loss in one pass each; float32, contiguous.
#include <cstring>
#include "losses.h"
#include "pointwise.h"

// `rows` rows of RMSNorm, and their s.
extern "C" void norm_forward(const float *x, const float *w, float *y, float *s, n_t rows, n_t d,
                             float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (n_t r = 0; r < rows; r++) s[r] = norm_row(x + r * d, w, y + r * d, d, eps);
}

// dx, and dw in `parts` rows of `sums`.
extern "C" void norm_backward(const float *x, const float *w, const float *s, const float *g,
                              float *dx, float *sums, n_t rows, n_t d, n_t parts, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (n_t part = 0; part < parts; part++) {
        float *dw = sums + part * d;
        memset(dw, 0, 4 * d);
        for (n_t r = rows * part / parts; r < rows * (part + 1) / parts; r++)
            norm_row_backward(x + r * d, w, s[r], g + r * d, dx + r * d, dw, d);
    }
}

INLINE vec some(const float *x, n_t count) {  // the first of a vector; zeros after them
    vec out = {};
    memcpy(&out, x, 4 * count);
    return out;
}

extern "C" void swiglu_forward(const float *g, const float *u, float *y, n_t count, int threads) {
    n_t whole = count / W * W, rest = count - whole;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (n_t i = 0; i < whole; i += W) store(y + i, swiglu(load(g + i), load(u + i)));
    vec last = swiglu(some(g + whole, rest), some(u + whole, rest));
    memcpy(y + whole, &last, 4 * rest);
}

extern "C" void swiglu_backward(const float *g, const float *u, const float *dy, float *dg,
                                float *du, n_t count, int threads) {
    n_t whole = count / W * W, rest = count - whole;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (n_t i = 0; i < whole; i += W) {
        SwiGLU again(load(g + i), load(u + i), load(dy + i));
        store(dg + i, again.dg), store(du + i, again.du);
    }
    SwiGLU last(some(g + whole, rest), some(u + whole, rest), some(dy + whole, rest));
    memcpy(dg + whole, &last.dg, 4 * rest), memcpy(du + whole, &last.du, 4 * rest);
}

// The losses of rows of V logits, and with `slopes` their gradients in place of the logits. Returns
// the number of targets that are no column; their rows are left alone.
extern "C" int losses(float *logits, const int64_t *targets, float *losses, n_t rows, n_t V,
                      int slopes, int threads) {
    int wrong = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : wrong) if (threads > 1)
    for (n_t r = 0; r < rows; r++) wrong += !loss_row(logits + r * V, targets[r], losses + r, V, slopes);
    return wrong;
}
