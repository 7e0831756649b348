// The attention half of a block, float32: y = x + o(attention(q(n), k(n), v(n))) with n = RMSNorm(x).
//
// One sequence at a time goes through all of it, so that what is between stays in a core's cache.
// B = batch, T = sequence, H = heads, D = head size, d = H·D. Weights are (d×d).
#include "attention.h"
#include "halves.h"

struct SelfAttention {  // `units`: sequences that are worked on at a time, one for each thread
    n_t T, D, d, units;
    SelfAttention(n_t T, n_t H, n_t D, n_t units) : T(T), D(D), d(H * D), units(units) {}
    n_t weight() const { return Weight{nullptr, d, d}.forward(); }  // floats of its panels
    n_t forward_unit() const { return T * d + Memory<float>::forward(T, D); }
    n_t backward_unit() const { return 2 * T * d + Memory<float>::backward(T, D); }
    n_t packed() const { return units * Sum::size(d, T); }
    n_t forward() const { return 4 * weight() + units * forward_unit(); }
    n_t backward() const { return 4 * weight() + units * (d + 3 * T * d + backward_unit()) + 2 * packed(); }
};

extern "C" n_t self_attention_scratch(n_t B, n_t T, n_t H, n_t D, int backward, int threads) {  // floats
    SelfAttention half(T, H, D, least(threads, B));
    return backward ? half.backward() : half.forward();
}

extern "C" void self_attention_forward(const float *x, const float *w, const float *Wq, const float *Wk,
                                       const float *Wv, const float *Wo, const float *cos,
                                       const float *sin, float *y, float *s, float *q, float *k,
                                       float *v, float *mixed, float *lse, float *scratch, n_t B,
                                       n_t T, n_t H, n_t D, float eps, int threads) {
    SelfAttention half(T, H, D, least(threads, B));
    n_t d = half.d, size = half.weight();
    const float *weights[] = {Wq, Wk, Wv, Wo};
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int thread = 0; thread < threads; thread++)
        for (int i = 0; i < 4; i++) Weight{weights[i], d, d}.pack_forward(scratch + i * size, thread, threads);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int thread = 0; thread < half.units; thread++) {
        float *n = scratch + 4 * size + thread * half.forward_unit(), *head_scratch = n + T * d;
        for (n_t b = share(B, thread, half.units); b < share(B, thread + 1, half.units); b++) {
            n_t at_b = b * T * d;
            const float *a = x + at_b;
            float *to[] = {q + at_b, k + at_b, v + at_b}, *m = mixed + at_b, *o = y + at_b;
            for (n_t t = 0; t < T; t++) s[b * T + t] = norm_row(a + t * d, w, n + t * d, d, eps);
            for (int i = 0; i < 3; i++) layer<false>(T, n, d, scratch + i * size, to[i], d);
            rotate_heads(to[0], T, H, D, cos, sin, 1 / std::sqrt((float)D), 1);
            rotate_heads(to[1], T, H, D, cos, sin, 1, 1);
            for (n_t h = 0, e = 0; h < H; h++, e += D)
                forward_rotated<float>({to[0] + e, d}, {to[1] + e, d}, {to[2] + e, d}, m + e, d, lse + (b * H + h) * T,
                                      Memory<float>(head_scratch, T, D));
            memcpy(o, a, 4 * T * d);
            layer<true>(T, m, d, scratch + 3 * size, o, d);
        }
    }
}

extern "C" void self_attention_backward(const float *x, const float *w, const float *s, const float *q,
                                        const float *k, const float *v, const float *mixed,
                                        const float *lse, const float *cos, const float *sin,
                                        const float *dy, const float *Wq, const float *Wk,
                                        const float *Wv, const float *Wo, float *dx, float *dw,
                                        float *dWq, float *dWk, float *dWv, float *dWo, float *scratch,
                                        n_t B, n_t T, n_t H, n_t D, int threads) {
    SelfAttention half(T, H, D, least(threads, B));
    n_t d = half.d, units = half.units, size = half.weight(), X = T * d;
    const float *weights[] = {Wq, Wk, Wv, Wo};
    float *sums_w = scratch + 4 * size, *rest = sums_w + units * d;
    float *all_dq = rest + units * half.backward_unit(), *all_dk = all_dq + units * X, *all_dv = all_dk + units * X;
    float *panels = all_dv + units * X;
    Sum sum_qkv = {d, d, T, d, panels}, sum_o = {d, d, T, d, panels + half.packed()};
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int thread = 0; thread < threads; thread++)
        for (int i = 0; i < 4; i++) Weight{weights[i], d, d}.pack_backward(scratch + i * size, thread, threads);
    memset(dw, 0, 4 * d);
    for (n_t first = 0; first < B; first += units) {
        n_t count = least(units, B - first);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
        for (int unit = 0; unit < count; unit++) {
            float *n = rest + unit * half.backward_unit(), *dm = n + X, *sum_w = sums_w + unit * d;
            float *dq = all_dq + unit * X, *dk = all_dk + unit * X, *dv = all_dv + unit * X, *head_scratch = dm + X;
            n_t b = first + unit;
            const float *a = x + b * X, *o = dy + b * X;
            layer<false>(T, o, d, scratch + 3 * size, dm, d);
            for (n_t h = 0; h < H; h++) {
                n_t e = h * D, i = b * X + e;
                backward_rotated<float>({q + i, d}, {k + i, d}, {v + i, d}, {dm + e, d}, lse + (b * H + h) * T, dq + e,
                                       dk + e, dv + e, d, Memory<float>(head_scratch, T, D));
            }
            rotate_heads(dq, T, H, D, cos, sin, 1 / std::sqrt((float)D), -1);
            rotate_heads(dk, T, H, D, cos, sin, 1, -1);
            norm_rows_again(a, w, s + b * T, n, T, d);
            sum_qkv.pack(unit, 0, n, T);
            sum_o.pack(unit, 0, mixed + b * X, T);
            layer<false>(T, dq, d, scratch, dm, d);
            layer<true>(T, dk, d, scratch + size, dm, d);
            layer<true>(T, dv, d, scratch + 2 * size, dm, d);
            memset(sum_w, 0, 4 * d);
            for (n_t t = 0; t < T; t++) {
                norm_row_backward(a + t * d, w, s[b * T + t], dm + t * d, dm + t * d, sum_w, d);
                for (n_t i = t * d; i < (t + 1) * d; i += W) store(dx + b * X + i, load(dm + i) + load(o + i));
            }
        }
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
        for (int thread = 0; thread < units; thread++) {
            sum_qkv.add(count * T, all_dq, dWq, first, thread, units);
            sum_qkv.add(count * T, all_dk, dWk, first, thread, units);
            sum_qkv.add(count * T, all_dv, dWv, first, thread, units);
            sum_o.add(count * T, dy + first * X, dWo, first, thread, units);
        }
        add_rows(sums_w, count, d, dw);
    }
}
