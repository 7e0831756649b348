// Causal attention of one head with rotary embeddings, float32, forward and backward.
//
// T = sequence, D = head size (a multiple of 2·W), P = T padded. A block of query rows meets only
// keys up to its last one, so its scores stay in the first two caches. All products are made of
// `tile`, whose result stays in registers.
#pragma once
#include <cmath>
#include <cstring>
#include "tile.h"

constexpr int R = 2 * M;  // query rows in a block of the backward pass
constexpr n_t PAD = 48;   // a common multiple of R and N

// C (M×columns) = A B with A (M×K).
static void rows_times(n_t K, const float *A, n_t lda, const float *B, n_t ldb, float *C, n_t ldc,
                       n_t columns) {
    for (n_t c = 0; c < columns; c += N) tile<M, false>(K, A, lda, 1, B + c, ldb, C + c, ldc);
}

// C (rows×D) += Aᵀ B with A (R×rows) and B (R×D).
static void add_transposed_times(const float *A, n_t lda, const float *B, n_t D, float *C, n_t rows) {
    for (n_t r = 0; r < rows; r += M)
        for (n_t d = 0; d < D; d += N) tile<M, true>(R, A + r, 1, lda, B + d, D, C + r * D + d, D);
}

// The rotation by cos and sin (T×D/2) of rows of D, scaled; `sign` −1 is its inverse.
static void rotate(const float *x, n_t ldx, float *out, n_t ldo, n_t T, n_t D, const float *cos,
                   const float *sin, float scale, float sign) {
    n_t h = D / 2;
    for (n_t t = 0; t < T; t++) {
        const float *a = x + t * ldx, *b = a + h;
        float *o = out + t * ldo;
        for (n_t d = 0; d < h; d += W) {
            vec c = at(cos + t * h + d) * scale, s = at(sin + t * h + d) * (scale * sign);
            vec first = at(a + d), second = at(b + d);
            at(o + d) = first * c - second * s;
            at(o + h + d) = second * c + first * s;
        }
    }
}

static void copy(const float *x, n_t ldx, float *out, n_t ldo, n_t T, n_t D) {
    for (n_t t = 0; t < T; t++) memcpy(out + t * ldo, x + t * ldx, 4 * D);
}

// x (P×D) with zeros in its rows from T on, and its transpose.
static void pad(float *x, n_t T, n_t P, n_t D) { memset(x + T * D, 0, 4 * (P - T) * D); }

static void transpose(const float *x, float *out, n_t P, n_t D) {
    for (n_t t = 0; t < P; t += W)
        for (n_t d = 0; d < D; d += W) {
            vec rows[W];
            for (int j = 0; j < W; j++) rows[j] = at(x + (t + j) * D + d);
            transpose_tile(rows);
            for (int j = 0; j < W; j++) at(out + (d + j) * P + t) = rows[j];
        }
}

// Softmax of a row's first n scores, without its division: returns 1 / sum, and the log of the sum.
static float exponentials(float *s, n_t n, n_t end, float *log_sum) {
    for (n_t c = n; c < end; c++) s[c] = -1e30f;
    vec tops = at(s), sums = {};
    for (n_t c = W; c < end; c += W) tops = at(s + c) > tops ? at(s + c) : tops;
    float top = largest_of(tops);
    for (n_t c = 0; c < end; c += W) sums += at(s + c) = exp_of(at(s + c) - top);
    float sum = sum_of(sums);
    *log_sum = top + std::log(sum);
    return 1 / sum;
}

// P = exp(S − log_sum) and dS = P ∘ (dP − sum(P ∘ dP)) for the first n keys, in place of S and dP.
static void slopes(float *S, float *dP, n_t n, n_t end, float log_sum) {
    for (n_t c = n; c < end; c++) S[c] = -1e30f;
    vec sums = {};
    for (n_t c = 0; c < end; c += W) {
        vec p = at(S + c) = exp_of(at(S + c) - log_sum);
        sums += p * at(dP + c);
    }
    float sum = sum_of(sums);
    for (n_t c = 0; c < end; c += W) at(dP + c) = at(S + c) * (at(dP + c) - sum);
}

static n_t forward_floats(n_t T, n_t D) {  // of scratch memory
    n_t P = up(T, PAD);
    return 3 * P * D + M * P + M * D;
}

static n_t backward_floats(n_t T, n_t D) {
    n_t P = up(T, PAD);
    return 9 * P * D + 2 * R * P;
}

struct Rows {  // rows of a head, `stride` floats apart
    const float *x;
    n_t stride;
};

// out (T×D, rows ldo apart) and lse (T) = log Σ exp(scores).
static void forward_head(Rows q, Rows k, Rows v, const float *cos, const float *sin, float *out, n_t ldo,
                         float *lse, float *scratch, n_t T, n_t D) {
    n_t P = up(T, PAD);
    float scale = 1 / std::sqrt((float)D);
    float *Q = scratch, *K = Q + P * D, *KT = K + P * D, *S = KT + P * D, *O = S + M * P;
    rotate(q.x, q.stride, Q, D, T, D, cos, sin, scale, 1);
    rotate(k.x, k.stride, K, D, T, D, cos, sin, 1, 1);
    pad(Q, T, P, D), pad(K, T, P, D), transpose(K, KT, P, D);
    for (n_t first = 0; first < T; first += M) {
        n_t rows = T - first < M ? T - first : M, keys = first + rows;
        rows_times(D, Q + first * D, D, KT, P, S, P, keys);
        float norm[M];
        for (n_t r = 0; r < rows; r++)
            norm[r] = exponentials(S + r * P, first + r + 1, up(keys, W), lse + first + r);
        rows_times(keys, S, P, v.x, v.stride, O, D, D);
        for (n_t r = 0; r < rows; r++)
            for (n_t d = 0; d < D; d += W) at(out + (first + r) * ldo + d) = at(O + r * D + d) * norm[r];
    }
}

// dq, dk, dv (T×D, rows ldo apart) from the gradient of out.
static void backward_head(Rows q, Rows k, Rows v, const float *cos, const float *sin, const float *lse,
                          Rows grad, float *dq, float *dk, float *dv, n_t ldo, float *scratch, n_t T, n_t D) {
    n_t P = up(T, PAD), X = P * D;
    float scale = 1 / std::sqrt((float)D);
    float *Q = scratch, *K = Q + X, *KT = K + X, *V = KT + X, *VT = V + X, *dO = VT + X, *dQ = dO + X;
    float *dK = dQ + X, *dV = dK + X, *S = dV + X, *dP = S + R * P;
    rotate(q.x, q.stride, Q, D, T, D, cos, sin, scale, 1);
    rotate(k.x, k.stride, K, D, T, D, cos, sin, 1, 1);
    copy(v.x, v.stride, V, D, T, D);
    copy(grad.x, grad.stride, dO, D, T, D);
    pad(Q, T, P, D), pad(K, T, P, D), pad(V, T, P, D), pad(dO, T, P, D);
    transpose(K, KT, P, D), transpose(V, VT, P, D);
    memset(dK, 0, 4 * 2 * X);
    for (n_t first = 0; first < T; first += R) {
        n_t keys = first + R;
        for (n_t r = 0; r < R; r += M) {
            rows_times(D, Q + (first + r) * D, D, KT, P, S + r * P, P, keys);
            rows_times(D, dO + (first + r) * D, D, VT, P, dP + r * P, P, keys);
        }
        for (n_t r = 0, t = first; r < R; r++, t++)
            slopes(S + r * P, dP + r * P, t + 1, up(keys, W), t < T ? lse[t] : 0);
        for (n_t r = 0; r < R; r += M) rows_times(keys, dP + r * P, P, K, D, dQ + (first + r) * D, D, D);
        add_transposed_times(S, P, dO + first * D, D, dV, keys);
        add_transposed_times(dP, P, Q + first * D, D, dK, keys);
    }
    rotate(dQ, D, dq, ldo, T, D, cos, sin, scale, -1);
    rotate(dK, D, dk, ldo, T, D, cos, sin, 1, -1);
    copy(dV, D, dv, ldo, T, D);
}
