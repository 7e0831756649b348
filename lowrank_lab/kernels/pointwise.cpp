// RMSNorm, SwiGLU and the softmax of the loss in one pass each; float32, contiguous.
#include <cmath>
#include <cstring>
#include "vectors.h"

// y = x · s · w with s = 1/√(mean x² + ε), for rows of d.
extern "C" void norm_forward(const float *x, const float *w, float *y, float *s, n_t rows, n_t d,
                             float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (n_t r = 0; r < rows; r++) {
        const float *a = x + r * d;
        float *o = y + r * d, squares = 0;
#pragma omp simd reduction(+ : squares)
        for (n_t i = 0; i < d; i++) squares += a[i] * a[i];
        float own = s[r] = 1 / std::sqrt(squares / d + eps);
#pragma omp simd
        for (n_t i = 0; i < d; i++) o[i] = a[i] * own * w[i];
    }
}

// dx = s (g∘w − x̂ mean(g∘w∘x̂)) with x̂ = x·s, and dw = Σ g∘x̂: `parts` rows of `sums`.
extern "C" void norm_backward(const float *x, const float *w, const float *s, const float *g,
                              float *dx, float *sums, n_t rows, n_t d, n_t parts, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (n_t part = 0; part < parts; part++) {
        float *dw = sums + part * d;
        memset(dw, 0, 4 * d);
        for (n_t r = rows * part / parts; r < rows * (part + 1) / parts; r++) {
            const float *a = x + r * d, *b = g + r * d;
            float *o = dx + r * d, own = s[r], mean = 0;
#pragma omp simd reduction(+ : mean)
            for (n_t i = 0; i < d; i++) mean += b[i] * w[i] * a[i];
            mean *= own * own / d;
#pragma omp simd
            for (n_t i = 0; i < d; i++) {
                o[i] = own * (b[i] * w[i] - a[i] * mean);
                dw[i] += b[i] * a[i] * own;
            }
        }
    }
}

INLINE vec sigmoid(vec x) { return 1.0f / (1.0f + exp_of(-x)); }

// y = u · g σ(g).
INLINE void swiglu(vec g, vec u, vec *y) { *y = u * g * sigmoid(g); }

// dg = dy · u · σ(g) (1 + g (1 − σ(g))) and du = dy · g σ(g).
INLINE void swiglu_slopes(vec g, vec u, vec dy, vec *dg, vec *du) {
    vec s = sigmoid(g);
    *dg = dy * u * s * (1.0f + g * (1.0f - s));
    *du = dy * g * s;
}

INLINE vec some(const float *x, n_t count) {  // the first of a vector; zeros after them
    vec out = {};
    memcpy(&out, x, 4 * count);
    return out;
}

extern "C" void swiglu_forward(const float *g, const float *u, float *y, n_t count, int threads) {
    n_t whole = count / W * W, rest = count - whole;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (n_t i = 0; i < whole; i += W) swiglu(at(g + i), at(u + i), &at(y + i));
    vec last;
    swiglu(some(g + whole, rest), some(u + whole, rest), &last);
    memcpy(y + whole, &last, 4 * rest);
}

extern "C" void swiglu_backward(const float *g, const float *u, const float *dy, float *dg,
                                float *du, n_t count, int threads) {
    n_t whole = count / W * W, rest = count - whole;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (n_t i = 0; i < whole; i += W)
        swiglu_slopes(at(g + i), at(u + i), at(dy + i), &at(dg + i), &at(du + i));
    vec a, b;
    swiglu_slopes(some(g + whole, rest), some(u + whole, rest), some(dy + whole, rest), &a, &b);
    memcpy(dg + whole, &a, 4 * rest), memcpy(du + whole, &b, 4 * rest);
}

// losses = log Σ exp(l) − l[target] for rows l of V logits; with `slopes`, softmax − one_hot(target)
// takes their place. Returns the number of targets that are no column; their rows are left alone.
extern "C" int losses(float *logits, const int64_t *targets, float *losses, n_t rows, n_t V,
                      int slopes, int threads) {
    int wrong = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : wrong) if (threads > 1)
    for (n_t r = 0; r < rows; r++) {
        if (targets[r] < 0 || targets[r] >= V) {
            wrong++;
            continue;
        }
        float *l = logits + r * V, own = l[targets[r]], rest[W];
        n_t whole = V / W * W;
        for (int j = 0; j < W; j++) rest[j] = whole + j < V ? l[whole + j] : -INFINITY;
        vec tops = at(rest), sums = {};
        for (n_t c = 0; c < whole; c += W) tops = at(l + c) > tops ? at(l + c) : tops;
        float top = largest_of(tops);
        for (n_t c = 0; c < whole; c += W) {
            vec e = exp_of(at(l + c) - top);
            sums += e;
            if (slopes) at(l + c) = e;
        }
        float sum = sum_of(sums);
        vec e = exp_of(at(rest) - top);
        for (n_t c = whole; c < V; c++) {
            sum += e[c - whole];
            if (slopes) l[c] = e[c - whole];
        }
        losses[r] = top + std::log(sum) - own;
        if (!slopes) continue;
#pragma omp simd
        for (n_t c = 0; c < V; c++) l[c] *= 1 / sum;
        l[targets[r]] -= 1;
    }
    return wrong;
}
