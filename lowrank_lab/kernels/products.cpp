// C (m×n) = A (m×k) · B (k×n), float32, for products with many tokens and a small weight.
//
// B is packed into panels of N columns, so that a tile reads it in order. A piece of A's rows (or of
// the common dimension, if that is long) and a panel stay in the first two caches.
#include <cstring>
#include "tile.h"

constexpr n_t DEPTH = 128;  // of the common dimension at a time
constexpr n_t ROWS = 96;    // of A at a time, a multiple of M

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

template <int rows, bool add>
INLINE void piece(n_t K, const float *A, n_t ra, n_t ka, const float *panel, float *C, n_t n, n_t columns) {
    if (columns >= N) return tile<rows, add>(K, A, ra, ka, panel, N, C, n);
    float part[rows * N];
    for (int r = 0; r < rows; r++)
        for (n_t c = 0; c < columns; c++) part[r * N + c] = add ? C[r * n + c] : 0;
    tile<rows, add>(K, A, ra, ka, panel, N, part, N);
    for (int r = 0; r < rows; r++) memcpy(C + r * n, part + r * N, 4 * columns);
}

template <bool add>
static void last_rows(n_t rows, n_t K, const float *A, n_t ra, n_t ka, const float *panel, float *C,
                      n_t n, n_t columns) {
    switch (rows) {
        case 1: return piece<1, add>(K, A, ra, ka, panel, C, n, columns);
        case 2: return piece<2, add>(K, A, ra, ka, panel, C, n, columns);
        case 3: return piece<3, add>(K, A, ra, ka, panel, C, n, columns);
        case 4: return piece<4, add>(K, A, ra, ka, panel, C, n, columns);
        case 5: return piece<5, add>(K, A, ra, ka, panel, C, n, columns);
    }
}

template <bool add>
static void panels_times(n_t from, n_t to, n_t K, const float *A, n_t ra, n_t ka, const float *panels,
                         float *C, n_t n) {
    for (n_t c = 0; c < n; c += N) {
        const float *panel = panels + c * K;
        n_t r = from, columns = n - c;
        for (; r + M <= to; r += M) {
            if (ra == 1) piece<M, add>(K, A + r, 1, ka, panel, C + r * n + c, n, columns);
            else piece<M, add>(K, A + r * ra, ra, 1, panel, C + r * n + c, n, columns);
        }
        last_rows<add>(to - r, K, A + r * ra, ra, ka, panel, C + r * n + c, n, columns);
    }
}

// A[r, k] is A[r·ra + k·ka], with ra or ka 1, and B[k, c] is B[k·rb + c·cb]; C is contiguous.
// `panels` has DEPTH·(n rounded up to N) floats.
extern "C" void product(const float *A, n_t ra, n_t ka, const float *B, n_t rb, n_t cb, float *C,
                        float *panels, n_t m, n_t k, n_t n, int threads) {
    for (n_t from = 0; from < k; from += DEPTH) {
        n_t depth = k - from < DEPTH ? k - from : DEPTH;
        pack(B, rb, cb, from, depth, n, panels);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
        for (n_t r = 0; r < m; r += ROWS) {
            n_t to = r + ROWS < m ? r + ROWS : m;
            if (from) panels_times<true>(r, to, depth, A + from * ka, ra, ka, panels, C, n);
            else panels_times<false>(r, to, depth, A, ra, ka, panels, C, n);
        }
    }
}
