// Causal attention of one head with rotary embeddings, forward and backward.
//
// T = sequence, D = head size (a multiple of 16), P = T padded to whole vectors. A block of query rows meets
// only keys up to its last one, so its scores stay in the first two caches. All products are made of
// `tile`, whose result stays in registers; G is what they add up, E the tensors' elements.
#pragma once
#include <cmath>
#include <cstring>
#include <type_traits>
#include "tile.h"

template <class G> constexpr n_t R = 2 * Group<G>::rows;  // query rows in a block of the backward pass

template <class E> struct Rows {  // rows of a matrix, `stride` elements apart
    const E *x;
    n_t stride;
    const E *row(n_t r) const { return x + r * stride; }
};

// C (rows×columns) = A B, or += with `add`; whole vectors of columns are read and written.
template <int rows, bool add, class G>
INLINE void tiles(n_t K, const G *A, n_t ra, n_t ka, Rows<G> B, float *C, n_t ldc, n_t columns) {
    constexpr n_t lanes = Group<G>::lanes;
    n_t c = 0;
    for (; c + lanes < columns; c += 2 * lanes) tile<rows, add, G>(K, A, ra, ka, B.x + c, B.stride, C + c, ldc);
    if (c < columns) tile<rows, add, G, 1>(K, A, ra, ka, B.x + c, B.stride, C + c, ldc);
}

// C (rows×columns) = A B with A (rows×K), of up to a tile's rows.
template <class G>
static void rows_times(n_t rows, n_t K, Rows<G> A, Rows<G> B, float *C, n_t ldc, n_t columns) {
    constexpr int M = Group<G>::rows;
    if (rows == M) return tiles<M, false, G>(K, A.x, A.stride, 1, B, C, ldc, columns);
    for (n_t r = 0; r < rows; r++) tiles<1, false, G>(K, A.row(r), 0, 1, B, C + r * ldc, ldc, columns);
}

// C (rows×D) += Aᵀ B with A (K×rows) and B (K×D), both grouped over K.
template <class G>
static void add_transposed_times(n_t rows, n_t K, Rows<G> A, Rows<G> B, float *C, n_t ldc, n_t D) {
    constexpr int M = Group<G>::rows;
    n_t r = 0;
    for (; r + M <= rows; r += M) tiles<M, true, G>(K, A.x + r, 1, A.stride, B, C + r * ldc, ldc, D);
    for (; r < rows; r++) tiles<1, true, G>(K, A.x + r, 1, A.stride, B, C + r * ldc, ldc, D);
}

// The rotation by cos and sin (D/2) of a row of D, scaled; `sign` −1 is its inverse. out may be x.
template <class From, class To>
INLINE void rotate_row(const From *x, To *out, n_t D, const float *cos, const float *sin, float scale, float sign) {
    for (n_t d = 0, h = D / 2; d < h; d += W) {
        vec c = load(cos + d) * scale, s = load(sin + d) * (scale * sign);
        vec first = load(x + d), second = load(x + h + d);
        store(out + d, first * c - second * s);
        store(out + h + d, second * c + first * s);
    }
}

// The rotations of all heads' rows (T×H·D, contiguous), in place.
static void rotate_heads(float *x, n_t T, n_t H, n_t D, const float *cos, const float *sin, float scale, float sign) {
    for (n_t t = 0; t < T; t++, cos += D / 2, sin += D / 2)
        for (n_t h = 0; h < H; h++, x += D) rotate_row(x, x, D, cos, sin, scale, sign);
}

template <class From, class To>
static void rotate(Rows<From> x, To *out, n_t ldo, n_t T, n_t D, const float *cos, const float *sin,
                   float scale, float sign) {
    for (n_t t = 0; t < T; t++)
        rotate_row(x.row(t), out + t * ldo, D, cos + t * (D / 2), sin + t * (D / 2), scale, sign);
}

template <class From, class To> static void copy(Rows<From> x, To *out, n_t ldo, n_t T, n_t D) {
    for (n_t t = 0; t < T; t++)
        for (n_t d = 0; d < D; d += W) store(out + t * ldo + d, load(x.row(t) + d));
}

// The transpose (D×P) of x (T×D), whose entries are 4 bytes; zeros from T on.
template <class Entry> static void transpose(Rows<Entry> x, Entry *out, n_t T, n_t P, n_t D) {
    for (n_t t = 0; t < P; t += W)
        for (n_t d = 0; d < D; d += W) {
            vec rows[W];
            for (int j = 0; j < W; j++) rows[j] = t + j < T ? load((const float *)(x.row(t + j) + d)) : vec{};
            transpose_tile(rows);
            for (int j = 0; j < W; j++) store((float *)(out + (d + j) * P + t), rows[j]);
        }
}

// Rows of floats, grouped along a row: (rows×columns/size); or grouped over rows: (rows/size×columns).
// Floats are their own groups, and stay where they are.
INLINE Rows<float> along(Rows<float> x, float *, n_t, n_t) { return x; }
INLINE Rows<float> over(Rows<float> x, float *, n_t, n_t) { return x; }

#ifdef __AVX512BF16__
INLINE Rows<pair> along(Rows<float> x, pair *to, n_t rows, n_t columns) {
    for (n_t r = 0; r < rows; r++)
        for (n_t c = 0; c < columns; c += W) store((bf16 *)(to + r * (columns / 2)) + c, load(x.row(r) + c));
    return {to, columns / 2};
}

INLINE Rows<pair> over(Rows<float> x, pair *to, n_t rows, n_t columns) {
    for (n_t r = 0; r < rows; r += 2)
        for (n_t c = 0; c < columns; c += W) {
            uvec first = rounded(load(x.row(r) + c)), second = {};
            if (r + 1 < rows) second = rounded(load(x.row(r + 1) + c));
            *(uvec *)(to + r / 2 * columns + c) = second | first >> 16;
        }
    return {to, columns};
}
#endif

// Softmax of a row's first n scores, without its division: returns 1 / sum, and the log of the sum.
static float exponentials(float *s, n_t n, n_t end, float *log_sum) {
    for (n_t c = n; c < end; c++) s[c] = -1e30f;
    vec tops = load(s), sums = {};
    for (n_t c = W; c < end; c += W) tops = larger(load(s + c), tops);
    float top = largest_of(tops);
    for (n_t c = 0; c < end; c += W) {
        vec e = exp_of(load(s + c) - top);
        store(s + c, e);
        sums += e;
    }
    float sum = sum_of(sums);
    *log_sum = top + std::log(sum);
    return 1 / sum;
}

// P = exp(S − log_sum) and dS = P ∘ (dP − sum(P ∘ dP)) for the first n keys, in place of S and dP.
static void slopes(float *S, float *dP, n_t n, n_t end, float log_sum) {
    for (n_t c = n; c < end; c++) S[c] = -1e30f;
    vec sums = {};
    for (n_t c = 0; c < end; c += W) {
        vec p = exp_of(load(S + c) - log_sum);
        store(S + c, p);
        sums += p * load(dP + c);
    }
    float sum = sum_of(sums);
    for (n_t c = 0; c < end; c += W) store(dP + c, load(S + c) * (load(dP + c) - sum));
}

// The scratch memory of a head: matrices of floats, and of groups made of them.
template <class G> struct Memory {
    static constexpr n_t size = Group<G>::size, M = Group<G>::rows;
    n_t T, D, P;
    float *next;
    Memory(float *scratch, n_t T, n_t D) : T(T), D(D), P(padded(T)), next(scratch) {}
    static n_t padded(n_t T) { return up(T, Group<G>::lanes); }

    float *floats(n_t count) {
        float *found = next;
        next += count;
        return found;
    }
    // Room for groups of a matrix of so many numbers, if they aren't the floats themselves.
    G *groups(n_t numbers) { return size == 1 ? nullptr : (G *)floats(numbers / size); }
    Rows<G> rows(Rows<float> x) { return along(x, groups(P * D), T, D); }
    Rows<G> columns(Rows<float> x) { return over(x, groups(P * D), T, D); }
    Rows<G> transposed(Rows<float> x) {
        G *to = (G *)floats(P * D / size);
        transpose(rows(x), to, T, P, D / size);
        return {to, P};
    }
    template <class E>
    Rows<float> rotated(Rows<E> x, const float *cos, const float *sin, float scale) {
        float *to = floats(T * D);
        rotate(x, to, D, T, D, cos, sin, scale, 1);
        return {to, D};
    }
    Rows<float> plain(Rows<float> x) { return x; }
    Rows<float> plain(Rows<bf16> x) {
        float *to = floats(T * D);
        copy(x, to, D, T, D);
        return {to, D};
    }
    // The most that a pass takes, in floats: see the functions below.
    static n_t forward(n_t T, n_t D) { return 5 * padded(T) * D + 2 * M * padded(T) + M * D; }
    static n_t backward(n_t T, n_t D) { return 9 * padded(T) * D + 4 * R<G> * padded(T); }
};

// out (T×D, rows ldo apart) and lse (T) = log Σ exp(scores), of q that is rotated and scaled and rotated k.
template <class G, class E>
static void forward_rotated(Rows<float> q, Rows<float> k, Rows<float> v, E *out, n_t ldo, float *lse,
                            Memory<G> memory) {
    constexpr n_t size = Group<G>::size, M = Group<G>::rows;
    n_t T = memory.T, D = memory.D, P = memory.P;
    Rows<G> Q = memory.rows(q), KT = memory.transposed(k), V = memory.columns(v);
    float *S = memory.floats(M * P), *O = memory.floats(M * D);
    G *own = memory.groups(M * P);
    for (n_t first = 0; first < T; first += M) {
        n_t rows = least(M, T - first), keys = first + rows, end = up(keys, W);
        rows_times<G>(rows, D / size, {Q.row(first), Q.stride}, KT, S, P, keys);
        float norm[M];
        for (n_t r = 0; r < rows; r++) norm[r] = exponentials(S + r * P, first + r + 1, end, lse + first + r);
        rows_times<G>(rows, up(keys, size) / size, along({S, P}, own, rows, end), V, O, D, D);
        for (n_t r = 0; r < rows; r++)
            for (n_t d = 0; d < D; d += W) store(out + (first + r) * ldo + d, load(O + r * D + d) * norm[r]);
    }
}

// dQ, dK, dV (T×D, rows ld apart), of q that is rotated and scaled and rotated k, from the gradient of out.
template <class G>
static void backward_rotated(Rows<float> q, Rows<float> k, Rows<float> v, Rows<float> grad, const float *lse,
                             float *dQ, float *dK, float *dV, n_t ld, Memory<G> memory) {
    constexpr n_t size = Group<G>::size, M = Group<G>::rows, R = ::R<G>;
    n_t T = memory.T, D = memory.D, P = memory.P;
    Rows<G> Q = memory.rows(q), Q_over = memory.columns(q), KT = memory.transposed(k), K_over = memory.columns(k);
    Rows<G> VT = memory.transposed(v), dO = memory.rows(grad), dO_over = memory.columns(grad);
    float *S = memory.floats(2 * R * P), *dP = S + R * P;
    G *own[] = {memory.groups(R * P), memory.groups(R * P), memory.groups(R * P)};
    for (n_t t = 0; t < T; t++) memset(dK + t * ld, 0, 4 * D), memset(dV + t * ld, 0, 4 * D);
    for (n_t first = 0; first < T; first += R) {
        n_t count = least(R, T - first), K = up(count, size) / size;
        n_t keys = first + count, end = up(keys, W);
        for (n_t r = 0; r < count; r += M) {
            n_t t = first + r, rows = least(M, count - r);
            rows_times<G>(rows, D / size, {Q.row(t), Q.stride}, KT, S + r * P, P, keys);
            rows_times<G>(rows, D / size, {dO.row(t), dO.stride}, VT, dP + r * P, P, keys);
        }
        for (n_t r = 0; r < count; r++) slopes(S + r * P, dP + r * P, first + r + 1, end, lse[first + r]);
        Rows<G> dS = along({dP, P}, own[0], count, end), dS_over = over({dP, P}, own[1], count, end);
        Rows<G> S_over = over({S, P}, own[2], count, end);
        for (n_t r = 0; r < count; r += M)
            rows_times<G>(least(M, count - r), up(keys, size) / size, {dS.row(r), dS.stride}, K_over,
                          dQ + (first + r) * ld, ld, D);
        add_transposed_times<G>(keys, K, S_over, {dO_over.row(first / size), dO_over.stride}, dV, ld, D);
        add_transposed_times<G>(keys, K, dS_over, {Q_over.row(first / size), Q_over.stride}, dK, ld, D);
    }
}

// out (T×D, rows ldo apart) and lse (T) = log Σ exp(scores).
template <class G, class E>
static void forward_head(Rows<E> q, Rows<E> k, Rows<E> v, const float *cos, const float *sin, E *out,
                         n_t ldo, float *lse, float *scratch, n_t T, n_t D) {
    Memory<G> memory(scratch, T, D);
    Rows<float> Q = memory.rotated(q, cos, sin, 1 / std::sqrt((float)D)), K = memory.rotated(k, cos, sin, 1);
    forward_rotated<G>(Q, K, memory.plain(v), out, ldo, lse, memory);
}

// dq, dk, dv (T×D, rows ldo apart) from the gradient of out.
template <class G, class E>
static void backward_head(Rows<E> q, Rows<E> k, Rows<E> v, const float *cos, const float *sin,
                          const float *lse, Rows<E> grad, E *dq, E *dk, E *dv, n_t ldo, float *scratch,
                          n_t T, n_t D) {
    Memory<G> memory(scratch, T, D);
    float scale = 1 / std::sqrt((float)D);
    Rows<float> Q = memory.rotated(q, cos, sin, scale), K = memory.rotated(k, cos, sin, 1), V = memory.plain(v);
    Rows<float> dO = memory.plain(grad);
    float *dQ, *dK, *dV;
    n_t ld;
    if constexpr (std::is_same<E, float>::value) dQ = dq, dK = dk, dV = dv, ld = ldo;
    else if (Group<G>::size > 1) dQ = (float *)Q.x, dK = (float *)K.x, dV = (float *)V.x, ld = D;  // read no more
    else dQ = memory.floats(T * D), dK = memory.floats(T * D), dV = memory.floats(T * D), ld = D;
    backward_rotated<G>(Q, K, V, dO, lse, dQ, dK, dV, ld, memory);
    rotate<float>({dQ, ld}, dq, ldo, T, D, cos, sin, scale, -1);
    rotate<float>({dK, ld}, dk, ldo, T, D, cos, sin, 1, -1);
    if constexpr (!std::is_same<E, float>::value) copy<float>({dV, ld}, dv, ldo, T, D);
}
