// A row of RMSNorm, and SwiGLU of a vector; float32.
#pragma once
#include <cmath>
#include "vectors.h"

// y = x · s · w with s = 1/√(mean x² + ε), for a row of d; returns s.
INLINE float norm_row(const float *x, const float *w, float *y, n_t d, float eps) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (n_t i = 0; i < d; i++) squares += x[i] * x[i];
    float s = 1 / std::sqrt(squares / d + eps);
#pragma omp simd
    for (n_t i = 0; i < d; i++) y[i] = x[i] * s * w[i];
    return s;
}

// dx = s (g∘w − x̂ mean(g∘w∘x̂)) with x̂ = x·s, and dw += g∘x̂; dx may be g.
INLINE void norm_row_backward(const float *x, const float *w, float s, const float *g, float *dx,
                              float *dw, n_t d) {
    float mean = 0;
#pragma omp simd reduction(+ : mean)
    for (n_t i = 0; i < d; i++) mean += g[i] * w[i] * x[i];
    mean *= s * s / d;
#pragma omp simd
    for (n_t i = 0; i < d; i++) {
        float own = g[i];
        dx[i] = s * (own * w[i] - x[i] * mean);
        dw[i] += own * x[i] * s;
    }
}

INLINE vec sigmoid(vec x) {
    vec s = 1.0f / (1.0f + exp_of(-x));
    return x < -88.0f ? vec{} : s;  // so that x · s is NaN at −∞, as torch has it
}

// u · g σ(g).
INLINE vec swiglu(vec g, vec u) { return u * g * sigmoid(g); }

// It again, y, with dg = dy · u · σ(g) (1 + g (1 − σ(g))) and du = dy · g σ(g).
struct SwiGLU {
    vec y, dg, du;
    SwiGLU(vec g, vec u, vec dy) {
        vec s = sigmoid(g);
        y = u * g * s;
        dg = dy * u * s * (1.0f + g * (1.0f - s));
        du = dy * g * s;
    }
};
