// Products whose operands are packed, so that a tile reads them in order.
//
// A right operand B (depth×n) is packed into panels of NR columns, a left one, transposed, into panels
// of MR: panel p has `depth` rows of the columns from p·NR (p·MR) on.
#pragma once
#include <cstring>
#include "tile.h"

constexpr int MR = Group<float>::rows;  // rows of a tile
constexpr int NR = 2 * LANES;           // columns of a tile
constexpr n_t KC = 256;  // of the common dimension at a time: its part of a panel stays in the first cache
constexpr n_t MC = 96;   // of the left operand's rows at a time: they stay in the second
static_assert(MC % MR == 0, "a copy of MC rows fills whole panels");

// `count` columns of a panel from as many rows of Bᵀ, cb apart; `depth` numbers of each.
static void pack_transposed(const float *B, n_t cb, n_t depth, n_t count, float *to) {
    n_t k = 0;
    for (; k + W <= depth; k += W)
        for (n_t j = 0; j + W <= count; j += W) {
            vec rows[W];
            for (int i = 0; i < W; i++) rows[i] = load(B + (j + i) * cb + k);
            transpose_tile(rows);
            for (int i = 0; i < W; i++) store(to + (k + i) * NR + j, rows[i]);
        }
    for (n_t j = 0; j < count; j++)
        for (n_t i = j < count / W * W ? k : 0; i < depth; i++) to[i * NR + j] = B[j * cb + i];
}

// A thread's share of the panels of B's rows [from, from + depth), with zeros after B's last column;
// B[k, c] is B[k·rb + c·cb], and rb or cb is 1.
static void pack(const float *B, n_t rb, n_t cb, n_t from, n_t depth, n_t n, float *panels, n_t thread,
                 n_t threads) {
    n_t count = (n + NR - 1) / NR;
    for (n_t p = share(count, thread, threads); p < share(count, thread + 1, threads); p++) {
        n_t c = p * NR, columns = least(NR, n - c);
        const float *x = B + from * rb + c * cb;
        float *to = panels + c * depth;
        if (columns < NR) memset(to, 0, 4 * depth * NR);
        if (cb != 1) pack_transposed(x, cb, depth, columns, to);
        else if (columns == NR)
            for (n_t k = 0; k < depth; k++) memcpy(to + k * NR, x + k * rb, 4 * NR);
        else
            for (n_t k = 0; k < depth; k++) memcpy(to + k * NR, x + k * rb, 4 * columns);
    }
}

// Rows of x (rows×n, ldx apart) as rows `first` and following of panels that are `depth` deep.
template <int width>
static void pack_rows(const float *x, n_t ldx, n_t rows, n_t n, n_t first, n_t depth, float *panels) {
    n_t whole = n / width * width;
    for (n_t r = 0; r < rows; r++) {
        float *to = panels + (first + r) * width;
        for (n_t c = 0; c < whole; c += width) memcpy(to + c * depth, x + r * ldx + c, 4 * width);
        memcpy(to + whole * depth, x + r * ldx + whole, 4 * (n - whole));
    }
}

// C (rows×columns) = A B, or += with `add`; B is a panel, of whose columns the first ones count.
template <int rows, bool add>
INLINE void piece(n_t K, const float *A, n_t ra, n_t ka, const float *B, float *C, n_t ldc, n_t columns) {
    for (int r = 0; r < rows; r++)
        for (n_t c = 0; c < NR; c += 16) __builtin_prefetch(C + r * ldc + c, 1);
    if (columns >= NR) return tile<rows, add, float>(K, A, ra, ka, B, NR, C, ldc);
    if (columns == LANES) return tile<rows, add, float, 1>(K, A, ra, ka, B, NR, C, ldc);
    float part[rows * NR];
    for (int r = 0; r < rows; r++)
        for (n_t c = 0; c < NR; c++) part[r * NR + c] = add && c < columns ? C[r * ldc + c] : 0;
    tile<rows, add, float>(K, A, ra, ka, B, NR, part, NR);
    for (int r = 0; r < rows; r++) memcpy(C + r * ldc, part + r * NR, 4 * columns);
}

// The same for the next rows after the first r, if so many are left.
template <int count, bool add>
static void few(n_t rows, n_t &r, n_t K, const float *&A, n_t ra, n_t ka, const float *B, float *C, n_t ldc,
                n_t columns) {
    if (rows - r < count) return;
    piece<count, add>(K, A, ra, ka, B, C + r * ldc, ldc, columns);
    A += count * ra, r += count;
}

// C (rows×n, ldc apart) = A B, or +=. `step` is from MR rows of A to the next, `panel` from one of B's
// panels to the next, of which K rows count.
template <bool add>
static void times_panels(n_t rows, n_t K, const float *A, n_t ra, n_t ka, n_t step, const float *B,
                         n_t panel, float *C, n_t ldc, n_t n) {
    for (n_t c = 0; c < n; c += NR, B += panel) {
        const float *a = A;
        n_t r = 0;
        for (; r + MR <= rows; r += MR, a += step) {
            if (ka == 1) piece<MR, add>(K, a, ra, 1, B, C + r * ldc + c, ldc, n - c);
            else piece<MR, add>(K, a, 1, ka, B, C + r * ldc + c, ldc, n - c);
        }
        few<4, add>(rows, r, K, a, ra, ka, B, C + c, ldc, n - c);
        few<2, add>(rows, r, K, a, ra, ka, B, C + c, ldc, n - c);
        few<1, add>(rows, r, K, a, ra, ka, B, C + c, ldc, n - c);
    }
}
