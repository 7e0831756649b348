// Causal attention with rotary embeddings, float32, forward and backward, one head at a time.
//
// B = batch, H = heads, T = sequence, D = head size (a multiple of 2·W).
#include "attention.h"

struct Head {  // where a head's rows are in a tensor (B, T, H, D) with the given strides
    n_t b, h;
    template <class F> F *in(F *x, const n_t *strides) const { return x + b * strides[0] + h * strides[2]; }
    Rows rows(const float *x, const n_t *strides) const { return {in(x, strides), strides[1]}; }
};

extern "C" n_t forward_scratch(n_t T, n_t D) { return forward_floats(T, D); }  // floats per thread

extern "C" n_t backward_scratch(n_t T, n_t D) { return backward_floats(T, D); }

// out (B, T, H, D) contiguous and lse (B, H, T) from q, k, v with strides[0:3], [3:6], [6:9].
extern "C" void attention_forward(const float *q, const float *k, const float *v, const float *cos,
                                  const float *sin, float *out, float *lse, float *scratch, n_t B,
                                  n_t T, n_t H, n_t D, const n_t *strides, int threads) {
    n_t row = H * D, own[] = {T * row, row, D};
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int part = 0; part < threads; part++) {
        float *own_scratch = scratch + part * forward_floats(T, D);
        for (n_t i = B * H * part / threads; i < B * H * (part + 1) / threads; i++) {
            Head head{i / H, i % H};
            forward_head(head.rows(q, strides), head.rows(k, strides + 3), head.rows(v, strides + 6), cos, sin,
                         head.in(out, own), row, lse + i * T, own_scratch, T, D);
        }
    }
}

// dq, dk, dv (B, T, H, D) contiguous from the gradient of out, with strides[9:12].
extern "C" void attention_backward(const float *q, const float *k, const float *v, const float *cos,
                                   const float *sin, const float *lse, const float *grad,
                                   float *dq, float *dk, float *dv, float *scratch,
                                   n_t B, n_t T, n_t H, n_t D, const n_t *strides, int threads) {
    n_t row = H * D, own[] = {T * row, row, D};
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int part = 0; part < threads; part++) {
        float *own_scratch = scratch + part * backward_floats(T, D);
        for (n_t i = B * H * part / threads; i < B * H * (part + 1) / threads; i++) {
            Head head{i / H, i % H};
            backward_head(head.rows(q, strides), head.rows(k, strides + 3), head.rows(v, strides + 6), cos, sin,
                          lse + i * T, head.rows(grad, strides + 9), head.in(dq, own), head.in(dk, own),
                          head.in(dv, own), row, own_scratch, T, D);
        }
    }
}
