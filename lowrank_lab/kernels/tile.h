// A piece of a matrix product whose result stays in registers: 12 vectors, as AVX2 has 16.
#pragma once
#include "vectors.h"

constexpr int M = 6;      // rows of a tile
constexpr int N = 2 * W;  // columns of a tile

// C (rows×N) = A B, or += with `add`: A[r, k] is A[r·ra + k·ka], B[k] a row of N floats.
template <int rows, bool add>
INLINE void tile(n_t K, const float *A, n_t ra, n_t ka, const float *B, n_t ldb, float *C, n_t ldc) {
    vec c[rows][2] = {};
    for (n_t k = 0; k < K; k++) {
        vec b0 = at(B + k * ldb), b1 = at(B + k * ldb + W);
        for (int r = 0; r < rows; r++) {
            vec a = splat(A[r * ra + k * ka]);
            c[r][0] += a * b0;
            c[r][1] += a * b1;
        }
    }
    for (int r = 0; r < rows; r++) {
        float *row = C + r * ldc;
        at(row) = add ? at(row) + c[r][0] : c[r][0];
        at(row + W) = add ? at(row + W) + c[r][1] : c[r][1];
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
