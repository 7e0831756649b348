// A piece of a matrix product whose result stays in registers: 12 vectors, as AVX2 has 16.
#pragma once
#include "vectors.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

constexpr int M = 6;      // rows of a tile
constexpr int N = 2 * W;  // columns of a tile of floats

// What a product adds up: floats or, with AVX-512's dot products, pairs of bfloat16.
template <class G> struct Group;

template <> struct Group<float> {
    static constexpr int size = 1, lanes = W;
    typedef vec sums;
    static inline __attribute__((always_inline)) void add(vec &c, float a, const float *b) { c += splat(a) * at(b); }
};

#ifdef __AVX512BF16__
typedef uint32_t pair;  // the first number is the lower half

template <> struct Group<pair> {
    static constexpr int size = 2, lanes = 16;
    typedef float sums __attribute__((vector_size(64), aligned(4), may_alias));
    static inline __attribute__((always_inline)) void add(sums &c, pair a, const pair *b) {
        c = (sums)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32(a), (__m512bh)_mm512_loadu_si512(b));
    }
};
#endif

// C (rows×2·lanes) = A B, or += with `add`: A[r, k] is A[r·ra + k·ka], B[k] a row of as many groups.
template <int rows, bool add, class G>
INLINE void tile(n_t K, const G *A, n_t ra, n_t ka, const G *B, n_t ldb, float *C, n_t ldc) {
    typedef typename Group<G>::sums sums;
    constexpr int lanes = Group<G>::lanes;
    sums c[rows][2] = {};
    for (n_t k = 0; k < K; k++)
        for (int r = 0; r < rows; r++) {
            G a = A[r * ra + k * ka];
            Group<G>::add(c[r][0], a, B + k * ldb);
            Group<G>::add(c[r][1], a, B + k * ldb + lanes);
        }
    for (int r = 0; r < rows; r++) {
        sums *row = (sums *)(C + r * ldc), *rest = (sums *)(C + r * ldc + lanes);
        *row = add ? *row + c[r][0] : c[r][0];
        *rest = add ? *rest + c[r][1] : c[r][1];
    }
}

// A tile of W×W, transposed: rows that are 4, 2 and 1 apart exchange halves.
INLINE void transpose_tile(vec *x) {
    for (int j = 0; j < 4; j++) {
        vec a = x[j], b = x[j + 4];
        x[j] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11);
        x[j + 4] = __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
    }
    for (int i = 0; i < 4; i++) {
        int j = i % 2 + 4 * (i / 2);
        vec a = x[j], b = x[j + 2];
        x[j] = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
        x[j + 2] = __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
    }
    for (int j = 0; j < W; j += 2) {
        vec a = x[j], b = x[j + 1];
        x[j] = __builtin_shufflevector(a, b, 0, 8, 2, 10, 4, 12, 6, 14);
        x[j + 1] = __builtin_shufflevector(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
    }
}
