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
