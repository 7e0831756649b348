// The attention half of a block, float32: y = x + o(attention(q(n), k(n), v(n))) with n = RMSNorm(x).
//
// One sequence at a time goes through all of it, so that what is between stays in a core's cache.
// B = batch, T = sequence, H = heads, D = head size, d = H·D. Weights are (d×d).
#include "attention.h"
#include "halves.h"

struct Scratch {  // in floats, for each thread
    n_t forward, backward;
    Scratch(n_t T, n_t H, n_t D)
        : forward(T * H * D + Memory<float>::forward(T, D)), backward(5 * T * H * D + Memory<float>::backward(T, D)) {}
};

extern "C" n_t self_attention_scratch(n_t T, n_t H, n_t D, int backward, int threads) {  // floats
    n_t d = H * D;
    if (!backward) return 4 * d * d + threads * Scratch(T, H, D).forward;
    return 4 * d * d + threads * Scratch(T, H, D).backward + PARTS * (4 * d * d + d);
}

extern "C" void self_attention_forward(const float *x, const float *w, const float *Wq, const float *Wk,
                                       const float *Wv, const float *Wo, const float *cos,
                                       const float *sin, float *y, float *s, float *q, float *k,
                                       float *v, float *mixed, float *lse, float *scratch, n_t B,
                                       n_t T, n_t H, n_t D, float eps, int threads) {
    n_t d = H * D, size = d * d;
    const float *weights[] = {Wq, Wk, Wv, Wo};
    for (int i = 0; i < 4; i++) Weight{weights[i], d, d}.pack_forward(scratch + i * size);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int thread = 0; thread < threads; thread++) {
        float *n = scratch + 4 * size + thread * Scratch(T, H, D).forward, *head_scratch = n + T * d;
        for (n_t b = B * thread / threads; b < B * (thread + 1) / threads; b++) {
            n_t at_b = b * T * d;
            const float *a = x + at_b;
            float *to[] = {q + at_b, k + at_b, v + at_b}, *m = mixed + at_b, *o = y + at_b;
            for (n_t t = 0; t < T; t++) s[b * T + t] = norm_row(a + t * d, w, n + t * d, d, eps);
            for (int i = 0; i < 3; i++) layer<false>(T, n, d, scratch + i * size, to[i], d);
            for (n_t h = 0, e = 0; h < H; h++, e += D)
                forward_head<float, float>({to[0] + e, d}, {to[1] + e, d}, {to[2] + e, d}, cos, sin, m + e, d,
                                           lse + (b * H + h) * T, head_scratch, T, D);
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
    n_t d = H * D, size = d * d, own = 4 * size + d, X = T * d;
    const float *weights[] = {Wq, Wk, Wv, Wo};
    for (int i = 0; i < 4; i++) Weight{weights[i], d, d}.pack_backward(scratch + i * size);
    float *sums = scratch + 4 * size, *rest = sums + PARTS * own;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int thread = 0; thread < threads; thread++) {
        float *n = rest + thread * Scratch(T, H, D).backward, *dm = n + X;
        float *dq = dm + X, *dk = dq + X, *dv = dk + X, *head_scratch = dv + X;
        for (n_t part = PARTS * thread / threads; part < PARTS * (thread + 1) / threads; part++) {
            float *sum = sums + part * own, *sum_w = sum + 4 * size;
            memset(sum, 0, 4 * own);
            for (n_t b = B * part / PARTS; b < B * (part + 1) / PARTS; b++) {
                const float *a = x + b * X, *o = dy + b * X;
                norm_rows_again(a, w, s + b * T, n, T, d);
                layer<false>(T, o, d, scratch + 3 * size, dm, d);
                add_transposed(T, o, d, mixed + b * X, d, sum + 3 * size);
                for (n_t h = 0; h < H; h++) {
                    n_t e = h * D, i = b * X + e;
                    backward_head<float, float>({q + i, d}, {k + i, d}, {v + i, d}, cos, sin, lse + (b * H + h) * T,
                                                {dm + e, d}, dq + e, dk + e, dv + e, d, head_scratch, T, D);
                }
                const float *grads[] = {dq, dk, dv};
                for (int i = 0; i < 3; i++) add_transposed(T, grads[i], d, n, d, sum + i * size);
                layer<false>(T, dq, d, scratch, dm, d);
                layer<true>(T, dk, d, scratch + size, dm, d);
                layer<true>(T, dv, d, scratch + 2 * size, dm, d);
                for (n_t t = 0; t < T; t++) {
                    norm_row_backward(a + t * d, w, s[b * T + t], dm + t * d, dm + t * d, sum_w, d);
                    for (n_t i = t * d; i < (t + 1) * d; i += W) at(dx + b * X + i) = at(dm + i) + at(o + i);
                }
            }
        }
    }
    float *found[] = {dWq, dWk, dWv, dWo};
    for (int i = 0; i < 4; i++) sum_parts(sums + i * size, own, found[i], size);
    sum_parts(sums + 4 * size, own, dw, d);
}
