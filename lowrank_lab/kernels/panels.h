// Products whose right operand is packed into panels of N columns, so that a tile reads it in order.
#pragma once
#include <cstring>
#include "tile.h"

constexpr n_t ROWS = 96;  // of the left operand at a time, a multiple of M: they stay in cache

// Panels of B's rows [from, from + depth): panel p is (depth×N), with zeros after B's last column.
static void pack(const float *B, n_t rb, n_t cb, n_t from, n_t depth, n_t n, float *panels) {
    for (n_t c = 0; c < n; c += N) {
        float *to = panels + c * depth;
        n_t count = n - c < N ? n - c : N;
        if (count < N) memset(to, 0, 4 * depth * N);
        if (cb == 1)
            for (n_t k = 0; k < depth; k++) memcpy(to + k * N, B + (from + k) * rb + c, 4 * count);
        else
            for (n_t j = 0; j < count; j++)
                for (n_t k = 0; k < depth; k++) to[k * N + j] = B[(from + k) * rb + (c + j) * cb];
    }
}

// C (rows×columns) = A B, or += with `add`; B[k] is a row of N floats, of which `columns` count.
template <int rows, bool add>
INLINE void piece(n_t K, const float *A, n_t ra, n_t ka, const float *B, n_t ldb, float *C, n_t ldc,
                  n_t columns) {
    if (columns >= N) return tile<rows, add>(K, A, ra, ka, B, ldb, C, ldc);
    float part[rows * N];
    for (int r = 0; r < rows; r++)
        for (n_t c = 0; c < columns; c++) part[r * N + c] = add ? C[r * ldc + c] : 0;
    tile<rows, add>(K, A, ra, ka, B, ldb, part, N);
    for (int r = 0; r < rows; r++) memcpy(C + r * ldc, part + r * N, 4 * columns);
}

// The same for any number of rows.
template <bool add>
static void strip(n_t rows, n_t K, const float *A, n_t ra, n_t ka, const float *B, n_t ldb, float *C,
                  n_t ldc, n_t columns) {
    n_t r = 0;
    for (; r + M <= rows; r += M) {
        if (ra == 1) piece<M, add>(K, A + r, 1, ka, B, ldb, C + r * ldc, ldc, columns);
        else piece<M, add>(K, A + r * ra, ra, 1, B, ldb, C + r * ldc, ldc, columns);
    }
    A += r * ra, C += r * ldc;
    switch (rows - r) {
        case 1: return piece<1, add>(K, A, ra, ka, B, ldb, C, ldc, columns);
        case 2: return piece<2, add>(K, A, ra, ka, B, ldb, C, ldc, columns);
        case 3: return piece<3, add>(K, A, ra, ka, B, ldb, C, ldc, columns);
        case 4: return piece<4, add>(K, A, ra, ka, B, ldb, C, ldc, columns);
        case 5: return piece<5, add>(K, A, ra, ka, B, ldb, C, ldc, columns);
    }
}

// C (rows×n) = A (rows×K) · B in panels.
template <bool add>
static void times_panels(n_t rows, n_t K, const float *A, n_t ra, n_t ka, const float *panels, float *C,
                         n_t n) {
    for (n_t c = 0; c < n; c += N)
        strip<add>(rows, K, A, ra, ka, panels + c * K, N, C + c, n, n - c);
}

// C (m×n) += Aᵀ B with A (rows×m) and B (rows×n), both contiguous; n is a multiple of N.
static void add_transposed(n_t rows, const float *A, n_t m, const float *B, n_t n, float *C) {
    for (n_t c = 0; c < n; c += N) strip<true>(m, rows, A, 1, m, B + c, n, C + c, n, N);
}
