// Cross-entropy of a row of logits, float32.
#pragma once
#include <cmath>
#include "vectors.h"

// loss = log Σ exp(l) − l[target] for a row l of V logits; with `slopes`, softmax − one_hot(target)
// takes its place. False, and nothing done, if the target is no column.
static bool loss_row(float *l, int64_t target, float *loss, n_t V, int slopes) {
    if (target < 0 || target >= V) return false;
    float own = l[target], rest[W];
    n_t whole = V / W * W;
    for (int j = 0; j < W; j++) rest[j] = whole + j < V ? l[whole + j] : -INFINITY;
    vec tops = load(rest), sums = {};
    for (n_t c = 0; c < whole; c += W) tops = larger(load(l + c), tops);
    float top = largest_of(tops);
    for (n_t c = 0; c < whole; c += W) {
        vec e = exp_of(load(l + c) - top);
        sums += e;
        if (slopes) store(l + c, e);
    }
    float sum = sum_of(sums);
    vec e = exp_of(load(rest) - top);
    for (n_t c = whole; c < V; c++) {
        sum += e[c - whole];
        if (slopes) l[c] = e[c - whole];
    }
    *loss = std::log(sum) + (top - own);  // in this order: large logits leave the digits of the first
    if (!slopes) return true;
#pragma omp simd
    for (n_t c = 0; c < V; c++) l[c] *= 1 / sum;
    l[target] -= 1;
    return true;
}
