// Causal attention of one head with rotary embeddings, forward and backward.
//
// T = sequence, D = head size (a multiple of 2·lanes), P = T padded. A block of query rows meets only
// keys up to its last one, so its scores stay in the first two caches. All products are made of
// `tile`, whose result stays in registers; G is what they add up, E the tensors' elements.
#pragma once
#include <cmath>
#include <cstring>
#include "tile.h"

constexpr int R = 2 * M;  // query rows in a block of the backward pass

template <class G> constexpr n_t columns_of = 2 * Group<G>::lanes;               // of a tile
template <class G> constexpr n_t pad_of = columns_of<G> == 32 ? 96 : 48;         // a common multiple with R

// C (M×columns) = A B with A (M×K).
template <class G>
static void rows_times(n_t K, const G *A, n_t lda, const G *B, n_t ldb, float *C, n_t ldc, n_t columns) {
    for (n_t c = 0; c < columns; c += columns_of<G>) tile<M, false, G>(K, A, lda, 1, B + c, ldb, C + c, ldc);
}

// C (rows×D) += Aᵀ B with A (R×rows) and B (R×D), both grouped over R.
template <class G>
static void add_transposed_times(const G *A, n_t lda, const G *B, n_t D, float *C, n_t rows) {
    for (n_t r = 0; r < rows; r += M)
        for (n_t d = 0; d < D; d += columns_of<G>)
            tile<M, true, G>(R / Group<G>::size, A + r, 1, lda, B + d, D, C + r * D + d, D);
}

// The rotation by cos and sin (T×D/2) of rows of D, scaled; `sign` −1 is its inverse.
template <class From, class To>
static void rotate(const From *x, n_t ldx, To *out, n_t ldo, n_t T, n_t D, const float *cos,
                   const float *sin, float scale, float sign) {
    n_t h = D / 2;
    for (n_t t = 0; t < T; t++) {
        const From *a = x + t * ldx, *b = a + h;
        To *o = out + t * ldo;
        for (n_t d = 0; d < h; d += W) {
            vec c = at(cos + t * h + d) * scale, s = at(sin + t * h + d) * (scale * sign);
            vec first = load(a + d), second = load(b + d);
            store(o + d, first * c - second * s);
            store(o + h + d, second * c + first * s);
        }
    }
}

template <class From, class To>
static void copy(const From *x, n_t ldx, To *out, n_t ldo, n_t T, n_t D) {
    for (n_t t = 0; t < T; t++)
        for (n_t d = 0; d < D; d += W) store(out + t * ldo + d, load(x + t * ldx + d));
}

// The transpose of x (P×D), whose entries are 4 bytes.
template <class G> static void transpose(const G *x, G *out, n_t P, n_t D) {
    for (n_t t = 0; t < P; t += W)
        for (n_t d = 0; d < D; d += W) {
            vec rows[W];
            for (int j = 0; j < W; j++) rows[j] = at((const float *)x + (t + j) * D + d);
            transpose_tile(rows);
            for (int j = 0; j < W; j++) at((float *)out + (d + j) * P + t) = rows[j];
        }
}

// Rows of floats, grouped along a row: (rows×columns/size); or grouped over rows: (rows/size×columns).
// Floats are their own groups, and stay where they are.
static const float *along(const float *x, n_t, float *, n_t, n_t) { return x; }
static const float *over(const float *x, n_t, float *, n_t, n_t) { return x; }

#ifdef __AVX512BF16__
static const pair *along(const float *x, n_t ldx, pair *to, n_t rows, n_t columns) {
    for (n_t r = 0; r < rows; r++)
        for (n_t c = 0; c < columns; c += W) store((bf16 *)(to + r * (ldx / 2)) + c, at(x + r * ldx + c));
    return to;
}

static const pair *over(const float *x, n_t ldx, pair *to, n_t rows, n_t columns) {
    for (n_t r = 0; r < rows; r += 2)
        for (n_t c = 0; c < columns; c += W) {
            uvec first = rounded(at(x + r * ldx + c)), second = rounded(at(x + (r + 1) * ldx + c));
            *(uvec *)(to + r / 2 * ldx + c) = second | first >> 16;
        }
    return to;
}
#endif

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

// The scratch memory of a head: matrices (P×D) of floats, and of groups made of them.
template <class G> struct Memory {
    n_t P, D, T;
    float *next, *latest = nullptr;
    static constexpr n_t size = Group<G>::size;
    static n_t padded(n_t T) { return up(T, pad_of<G>); }
    Memory(float *scratch, n_t T, n_t D) : P(padded(T)), D(D), T(T), next(scratch) {}

    float *floats(n_t count) {
        float *found = next;
        next += count;
        return found;
    }
    G *groups(n_t numbers) { return (G *)floats(numbers / size); }
    // A matrix to fill, with zeros in its rows from T on; groups are copies: the next one may reuse it.
    float *matrix() {
        if (size == 1 || !latest) latest = floats(P * D);
        memset(latest + T * D, 0, 4 * (P - T) * D);
        return latest;
    }
    const G *rows(const float *x) { return along(x, D, size == 1 ? (G *)x : groups(P * D), P, D); }
    const G *columns(const float *x) { return over(x, D, size == 1 ? (G *)x : groups(P * D), P, D); }
    const G *transposed(const float *x) {
        G *to = groups(P * D), *own = groups(size == 1 ? 0 : P * D);
        transpose(along(x, D, own, P, D), to, P, D / size);
        return to;
    }
    // What a pass takes, in floats: see the functions below.
    static n_t forward(n_t T, n_t D) {
        n_t X = padded(T) * D, of_rows = M * padded(T);
        return size == 1 ? 4 * X + of_rows + M * D : 3 * X + of_rows + of_rows / 2 + M * D;
    }
    static n_t backward(n_t T, n_t D) {
        n_t X = padded(T) * D, of_rows = R * padded(T);
        return size == 1 ? 9 * X + 2 * of_rows : 8 * X + X / 2 + 2 * of_rows + 3 * of_rows / 2;
    }
};

template <class E> struct Rows {  // rows of a head, `stride` elements apart
    const E *x;
    n_t stride;
};

// out (T×D, rows ldo apart) and lse (T) = log Σ exp(scores).
template <class G, class E>
static void forward_head(Rows<E> q, Rows<E> k, Rows<E> v, const float *cos, const float *sin, E *out,
                         n_t ldo, float *lse, float *scratch, n_t T, n_t D) {
    constexpr n_t size = Group<G>::size;
    Memory<G> memory(scratch, T, D);
    n_t P = memory.P;
    float scale = 1 / std::sqrt((float)D), *x;
    rotate(q.x, q.stride, x = memory.matrix(), D, T, D, cos, sin, scale, 1);
    const G *Q = memory.rows(x);
    rotate(k.x, k.stride, x = memory.matrix(), D, T, D, cos, sin, 1, 1);
    const G *KT = memory.transposed(x);
    copy(v.x, v.stride, x = memory.matrix(), D, T, D);
    const G *V = memory.columns(x);
    float *S = memory.floats(M * P), *O = memory.floats(M * D);
    G *own = memory.groups(size == 1 ? 0 : M * P);
    for (n_t first = 0; first < T; first += M) {
        n_t rows = T - first < M ? T - first : M, keys = first + rows, end = up(keys, W);
        rows_times(D / size, Q + first * D / size, D / size, KT, P, S, P, keys);
        float norm[M];
        for (n_t r = 0; r < rows; r++) norm[r] = exponentials(S + r * P, first + r + 1, end, lse + first + r);
        rows_times(up(keys, size) / size, along(S, P, own, rows, end), P / size, V, D, O, D, D);
        for (n_t r = 0; r < rows; r++)
            for (n_t d = 0; d < D; d += W) store(out + (first + r) * ldo + d, at(O + r * D + d) * norm[r]);
    }
}

// dq, dk, dv (T×D, rows ldo apart) from the gradient of out.
template <class G, class E>
static void backward_head(Rows<E> q, Rows<E> k, Rows<E> v, const float *cos, const float *sin,
                          const float *lse, Rows<E> grad, E *dq, E *dk, E *dv, n_t ldo, float *scratch,
                          n_t T, n_t D) {
    constexpr n_t size = Group<G>::size;
    Memory<G> memory(scratch, T, D);
    n_t P = memory.P, X = P * D;
    float scale = 1 / std::sqrt((float)D), *x;
    rotate(q.x, q.stride, x = memory.matrix(), D, T, D, cos, sin, scale, 1);
    const G *Q = memory.rows(x), *Q_over = memory.columns(x);
    rotate(k.x, k.stride, x = memory.matrix(), D, T, D, cos, sin, 1, 1);
    const G *KT = memory.transposed(x), *K_over = memory.columns(x);
    copy(v.x, v.stride, x = memory.matrix(), D, T, D);
    const G *VT = memory.transposed(x);
    copy(grad.x, grad.stride, x = memory.matrix(), D, T, D);
    const G *dO = memory.rows(x), *dO_over = memory.columns(x);
    float *dQ = memory.floats(X), *dK = memory.floats(2 * X), *dV = dK + X;
    float *S = memory.floats(2 * R * P), *dP = S + R * P;
    G *own = memory.groups(size == 1 ? 0 : 3 * R * P);
    memset(dK, 0, 4 * 2 * X);
    for (n_t first = 0; first < T; first += R) {
        n_t keys = first + R, end = up(keys, W);
        for (n_t r = 0; r < R; r += M) {
            rows_times(D / size, Q + (first + r) * D / size, D / size, KT, P, S + r * P, P, keys);
            rows_times(D / size, dO + (first + r) * D / size, D / size, VT, P, dP + r * P, P, keys);
        }
        for (n_t r = 0, t = first; r < R; r++, t++)
            slopes(S + r * P, dP + r * P, t + 1, end, t < T ? lse[t] : 0);
        const G *dS = along(dP, P, own, R, end), *dS_over = over(dP, P, own + R * P / size, R, end);
        const G *S_over = over(S, P, own + 2 * R * P / size, R, end);
        for (n_t r = 0; r < R; r += M)
            rows_times(keys / size, dS + r * P / size, P / size, K_over, D, dQ + (first + r) * D, D, D);
        add_transposed_times(S_over, P, dO_over + first * D / size, D, dV, keys);
        add_transposed_times(dS_over, P, Q_over + first * D / size, D, dK, keys);
    }
    rotate(dQ, D, dq, ldo, T, D, cos, sin, scale, -1);
    rotate(dK, D, dk, ldo, T, D, cos, sin, 1, -1);
    copy(dV, D, dv, ldo, T, D);
}
