// A piece of a matrix product whose result stays in registers.
#pragma once
#include "vectors.h"

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = W;
#endif

// What a product adds up: floats or, with AVX-512's dot products, pairs of bfloat16; in the CPU's widest
// vectors. Sums of a tile are 16 of AVX-512's 32 vectors, or 12 of AVX2's 16.
template <class G> struct Group;

template <> struct Group<float> {
    static constexpr int size = 1, lanes = LANES, rows = LANES == 16 ? 8 : 6;
    typedef float sums __attribute__((vector_size(4 * lanes), aligned(4), may_alias));
    static inline __attribute__((always_inline)) sums plus(sums c, float a, sums b) { return c + (a - sums{}) * b; }
};

#ifdef __AVX512BF16__
typedef uint32_t pair;  // the first number is the lower half

template <> struct Group<pair> {
    static constexpr int size = 2, lanes = 16, rows = 8;
    typedef float sums __attribute__((vector_size(64), aligned(4), may_alias));
    static inline __attribute__((always_inline)) sums plus(sums c, pair a, sums b) {
        return (sums)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
    }
};
#endif

// C (rows × vectors·lanes) = A B, or += with `add`: A[r, k] is A[r·ra + k·ka], B[k] a row of groups.
template <int rows, bool add, class G, int vectors = 2>
INLINE void tile(n_t K, const G *A, n_t ra, n_t ka, const G *B, n_t ldb, float *C, n_t ldc) {
    typedef typename Group<G>::sums sums;
    constexpr int lanes = Group<G>::lanes;
    sums c[rows][vectors] = {};
    for (n_t k = 0; k < K; k++) {
        sums b[vectors];
        for (int j = 0; j < vectors; j++) b[j] = *(const sums *)(B + k * ldb + j * lanes);
        for (int r = 0; r < rows; r++) {
            G a = A[r * ra + k * ka];
            for (int j = 0; j < vectors; j++) c[r][j] = Group<G>::plus(c[r][j], a, b[j]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < vectors; j++) {
            sums *to = (sums *)(C + r * ldc + j * lanes);
            *to = add ? *to + c[r][j] : c[r][j];
        }
}

// A tile of W×W, transposed: rows that are 4, 2 and 1 apart exchange halves.
INLINE void transpose_tile(vec *x) {
    for (int j = 0; j < 4; j++) {
        vec a = x[j], b = x[j + 4];
        x[j] = SHUFFLED(a, b, 0, 1, 2, 3, 8, 9, 10, 11);
        x[j + 4] = SHUFFLED(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
    }
    for (int i = 0; i < 4; i++) {
        int j = i % 2 + 4 * (i / 2);
        vec a = x[j], b = x[j + 2];
        x[j] = SHUFFLED(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
        x[j + 2] = SHUFFLED(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
    }
    for (int j = 0; j < W; j += 2) {
        vec a = x[j], b = x[j + 1];
        x[j] = SHUFFLED(a, b, 0, 8, 2, 10, 4, 12, 6, 14);
        x[j + 1] = SHUFFLED(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
    }
}
