// The MLP half of a block, float32: y = x + down(silu(gate(n)) ∘ up(n)) with n = RMSNorm(x).
//
// A few rows at a time go through all of it, so that what is between stays in a core's cache.
// d = hidden, f = the width between; both are multiples of N. Weights are (out×in).
#include "halves.h"

constexpr n_t PIECE = 48;  // rows

extern "C" n_t mlp_scratch(n_t d, n_t f, int backward, int threads) {  // floats
    if (!backward) return 3 * d * f + threads * PIECE * (d + f);
    return 3 * d * f + threads * PIECE * (2 * d + 3 * f) + PARTS * (3 * d * f + d);
}

extern "C" void mlp_forward(const float *x, const float *w, const float *Wg, const float *Wu,
                            const float *Wd, float *y, float *s, float *gate, float *up,
                            float *scratch, n_t rows, n_t d, n_t f, float eps, int threads) {
    n_t size = d * f;
    float *g_panels = scratch, *u_panels = g_panels + size, *d_panels = u_panels + size;
    Weight{Wg, f, d}.pack_forward(g_panels);
    Weight{Wu, f, d}.pack_forward(u_panels);
    Weight{Wd, d, f}.pack_forward(d_panels);
    n_t pieces = (rows + PIECE - 1) / PIECE;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int thread = 0; thread < threads; thread++) {
        float *n = d_panels + size + thread * PIECE * (d + f), *h = n + PIECE * d;
        for (n_t p = pieces * thread / threads; p < pieces * (thread + 1) / threads; p++) {
            n_t from = p * PIECE, count = rows - from < PIECE ? rows - from : PIECE;
            const float *a = x + from * d;
            float *o = y + from * d, *g = gate + from * f, *u = up + from * f;
            for (n_t r = 0; r < count; r++) s[from + r] = norm_row(a + r * d, w, n + r * d, d, eps);
            layer<false>(count, n, d, g_panels, g, f);
            layer<false>(count, n, d, u_panels, u, f);
            for (n_t i = 0; i < count * f; i += W) swiglu(at(g + i), at(u + i), &at(h + i));
            memcpy(o, a, 4 * count * d);
            layer<true>(count, h, f, d_panels, o, d);
        }
    }
}

extern "C" void mlp_backward(const float *x, const float *w, const float *s, const float *gate,
                             const float *up, const float *dy, const float *Wg, const float *Wu,
                             const float *Wd, float *dx, float *dw, float *dWg, float *dWu,
                             float *dWd, float *scratch, n_t rows, n_t d, n_t f, int threads) {
    n_t size = d * f, own = 3 * size + d, pieces = (rows + PIECE - 1) / PIECE;
    float *g_panels = scratch, *u_panels = g_panels + size, *d_panels = u_panels + size;
    float *sums = d_panels + size, *rest = sums + PARTS * own;
    Weight{Wg, f, d}.pack_backward(g_panels);
    Weight{Wu, f, d}.pack_backward(u_panels);
    Weight{Wd, d, f}.pack_backward(d_panels);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int thread = 0; thread < threads; thread++) {
        float *n = rest + thread * PIECE * (2 * d + 3 * f), *dn = n + PIECE * d, *h = dn + PIECE * d;
        float *dg = h + PIECE * f, *du = dg + PIECE * f;
        for (n_t part = PARTS * thread / threads; part < PARTS * (thread + 1) / threads; part++) {
            float *sum_g = sums + part * own, *sum_u = sum_g + size, *sum_d = sum_u + size;
            memset(sum_g, 0, 4 * own);
            for (n_t p = pieces * part / PARTS; p < pieces * (part + 1) / PARTS; p++) {
                n_t from = p * PIECE, count = rows - from < PIECE ? rows - from : PIECE;
                const float *a = x + from * d, *g = gate + from * f, *u = up + from * f, *o = dy + from * d;
                norm_rows_again(a, w, s + from, n, count, d);
                layer<false>(count, o, d, d_panels, h, f);
                for (n_t i = 0; i < count * f; i += W) {
                    vec dh = at(h + i);
                    swiglu(at(g + i), at(u + i), &at(h + i));
                    swiglu_slopes(at(g + i), at(u + i), dh, &at(dg + i), &at(du + i));
                }
                add_transposed(count, o, d, h, f, sum_d);
                add_transposed(count, dg, f, n, d, sum_g);
                add_transposed(count, du, f, n, d, sum_u);
                layer<false>(count, dg, f, g_panels, dn, d);
                layer<true>(count, du, f, u_panels, dn, d);
                for (n_t r = 0; r < count; r++) {
                    norm_row_backward(a + r * d, w, s[from + r], dn + r * d, dn + r * d, sum_d + size, d);
                    for (n_t i = r * d; i < (r + 1) * d; i += W) at(dx + from * d + i) = at(dn + i) + at(o + i);
                }
            }
        }
    }
    sum_parts(sums, own, dWg, size);
    sum_parts(sums + size, own, dWu, size);
    sum_parts(sums + 2 * size, own, dWd, size);
    sum_parts(sums + 3 * size, own, dw, d);
}
