// The MLP half of a block, float32: y = x + down(silu(gate(n)) ∘ up(n)) with n = RMSNorm(x).
//
// A few rows at a time go through all of it, so that what is between stays in a core's cache.
// d = hidden, f = the width between; both are multiples of 16. Weights are (out×in).
#include "halves.h"

struct MLP {
    n_t d, f;
    Weight gate, up, down;
    MLP(const float *Wg, const float *Wu, const float *Wd, n_t d, n_t f)
        : d(d), f(f), gate{Wg, f, d}, up{Wu, f, d}, down{Wd, d, f} {}
    n_t forward(n_t units) const {
        return gate.forward() + up.forward() + down.forward() + units * PIECE * (d + f);
    }
    n_t backward(n_t units) const {
        n_t panels = gate.backward() + up.backward() + down.backward();
        n_t of_unit = 2 * UNIT * f + Sum::size(d, UNIT) + Sum::size(f, UNIT);
        return panels + units * (PIECE * (2 * d + f) + d + of_unit);
    }
};

extern "C" n_t mlp_scratch(n_t rows, n_t d, n_t f, int backward, int threads) {  // floats
    MLP mlp(nullptr, nullptr, nullptr, d, f);
    return backward ? mlp.backward(units_of(rows, UNIT, threads)) : mlp.forward(units_of(rows, PIECE, threads));
}

extern "C" void mlp_forward(const float *x, const float *w, const float *Wg, const float *Wu,
                            const float *Wd, float *y, float *s, float *gate, float *up,
                            float *scratch, n_t rows, n_t d, n_t f, float eps, int threads) {
    MLP mlp(Wg, Wu, Wd, d, f);
    float *g_panels = scratch, *u_panels = g_panels + mlp.gate.forward(), *d_panels = u_panels + mlp.up.forward();
    float *rest = d_panels + mlp.down.forward();
    n_t pieces = (rows + PIECE - 1) / PIECE, units = units_of(rows, PIECE, threads);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int thread = 0; thread < threads; thread++) {
        mlp.gate.pack_forward(g_panels, thread, threads);
        mlp.up.pack_forward(u_panels, thread, threads);
        mlp.down.pack_forward(d_panels, thread, threads);
    }
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int unit = 0; unit < units; unit++) {
        float *n = rest + unit * PIECE * (d + f), *h = n + PIECE * d;
        for (n_t p = share(pieces, unit, units); p < share(pieces, unit + 1, units); p++) {
            n_t from = p * PIECE, count = least(PIECE, rows - from);
            const float *a = x + from * d;
            float *o = y + from * d, *g = gate + from * f, *u = up + from * f;
            for (n_t r = 0; r < count; r++) s[from + r] = norm_row(a + r * d, w, n + r * d, d, eps);
            layer<false>(count, n, d, g_panels, g, f);
            layer<false>(count, n, d, u_panels, u, f);
            for (n_t i = 0; i < count * f; i += W) store(h + i, swiglu(load(g + i), load(u + i)));
            memcpy(o, a, 4 * count * d);
            layer<true>(count, h, f, d_panels, o, d);
        }
    }
}

extern "C" void mlp_backward(const float *x, const float *w, const float *s, const float *gate,
                             const float *up, const float *dy, const float *Wg, const float *Wu,
                             const float *Wd, float *dx, float *dw, float *dWg, float *dWu,
                             float *dWd, float *scratch, n_t rows, n_t d, n_t f, int threads) {
    MLP mlp(Wg, Wu, Wd, d, f);
    n_t units = units_of(rows, UNIT, threads);
    float *g_panels = scratch, *u_panels = g_panels + mlp.gate.backward(), *d_panels = u_panels + mlp.up.backward();
    float *sums_w = d_panels + mlp.down.backward(), *rest = sums_w + units * d;
    float *all_dg = rest + units * PIECE * (2 * d + f), *all_du = all_dg + units * UNIT * f;
    float *n_packed = all_du + units * UNIT * f, *h_packed = n_packed + units * Sum::size(d, UNIT);
    Sum sum_gu = {f, d, UNIT, f, n_packed}, sum_d = {d, f, UNIT, d, h_packed};
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int thread = 0; thread < threads; thread++) {
        mlp.gate.pack_backward(g_panels, thread, threads);
        mlp.up.pack_backward(u_panels, thread, threads);
        mlp.down.pack_backward(d_panels, thread, threads);
    }
    memset(dw, 0, 4 * d);
    for (n_t first = 0; first < rows; first += units * UNIT) {
        n_t taken = least(units * UNIT, rows - first);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
        for (int unit = 0; unit < units; unit++) {
            float *n = rest + unit * PIECE * (2 * d + f), *dn = n + PIECE * d, *h = dn + PIECE * d;
            float *sum_w = sums_w + unit * d;
            memset(sum_w, 0, 4 * d);
            for (n_t at_row = 0; at_row < least(UNIT, taken - unit * UNIT); at_row += PIECE) {
                n_t row = unit * UNIT + at_row, from = first + row, count = least(PIECE, rows - from);
                float *dg = all_dg + row * f, *du = all_du + row * f;
                const float *a = x + from * d, *g = gate + from * f, *u = up + from * f, *o = dy + from * d;
                norm_rows_again(a, w, s + from, n, count, d);
                layer<false>(count, o, d, d_panels, h, f);
                for (n_t i = 0; i < count * f; i += W) {
                    SwiGLU again(load(g + i), load(u + i), load(h + i));
                    store(h + i, again.y), store(dg + i, again.dg), store(du + i, again.du);
                }
                layer<false>(count, dg, f, g_panels, dn, d);
                layer<true>(count, du, f, u_panels, dn, d);
                sum_gu.pack(unit, at_row, n, count);
                sum_d.pack(unit, at_row, h, count);
                for (n_t r = 0; r < count; r++) {
                    norm_row_backward(a + r * d, w, s[from + r], dn + r * d, dn + r * d, sum_w, d);
                    for (n_t i = r * d; i < (r + 1) * d; i += W) store(dx + from * d + i, load(dn + i) + load(o + i));
                }
            }
        }
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
        for (int thread = 0; thread < units; thread++) {
            sum_gu.add(taken, all_dg, dWg, first, thread, units);
            sum_gu.add(taken, all_du, dWu, first, thread, units);
            sum_d.add(taken, dy + first * d, dWd, first, thread, units);
        }
        add_rows(sums_w, units, d, dw);
    }
}
