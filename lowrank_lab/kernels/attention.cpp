// Causal attention with rotary embeddings, forward and backward, one head at a time.
//
// B = batch, H = heads, T = sequence, D = head size (a multiple of 2·W). Tensors are float32 or bfloat16;
// products of the latter are AVX-512's dot products where the CPU has them, else float32.
#include "attention.h"

struct Head {  // where a head's rows are in a tensor (B, T, H, D) with the given strides
    n_t b, h;
    template <class F> F *in(F *x, const n_t *strides) const { return x + b * strides[0] + h * strides[2]; }
    template <class E> Rows<E> rows(const E *x, const n_t *strides) const { return {in(x, strides), strides[1]}; }
};

// task(head, its number, scratch memory) for each head.
template <class Task>
static void for_heads(n_t B, n_t H, float *scratch, n_t of_thread, int threads, Task task) {
    n_t heads = B * H, parts = least(threads, heads);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (n_t part = 0; part < parts; part++)
        for (n_t i = share(heads, part, parts); i < share(heads, part + 1, parts); i++)
            task(Head{i / H, i % H}, i, scratch + part * of_thread);
}

// out (B, T, H, D) contiguous and lse (B, H, T) from q, k, v with strides[0:3], [3:6], [6:9].
template <class G, class E>
static void forward(const E *q, const E *k, const E *v, const float *cos, const float *sin, E *out,
                    float *lse, float *scratch, n_t B, n_t T, n_t H, n_t D, const n_t *strides, int threads) {
    n_t row = H * D, own[] = {T * row, row, D};
    for_heads(B, H, scratch, Memory<G>::forward(T, D), threads, [&](Head head, n_t i, float *memory) {
        forward_head<G>(head.rows(q, strides), head.rows(k, strides + 3), head.rows(v, strides + 6), cos, sin,
                        head.in(out, own), row, lse + i * T, memory, T, D);
    });
}

// dq, dk, dv (B, T, H, D) contiguous from the gradient of out, with strides[9:12].
template <class G, class E>
static void backward(const E *q, const E *k, const E *v, const float *cos, const float *sin,
                     const float *lse, const E *grad, E *dq, E *dk, E *dv, float *scratch, n_t B, n_t T,
                     n_t H, n_t D, const n_t *strides, int threads) {
    n_t row = H * D, own[] = {T * row, row, D};
    for_heads(B, H, scratch, Memory<G>::backward(T, D), threads, [&](Head head, n_t i, float *memory) {
        backward_head<G>(head.rows(q, strides), head.rows(k, strides + 3), head.rows(v, strides + 6), cos, sin,
                         lse + i * T, head.rows(grad, strides + 9), head.in(dq, own), head.in(dk, own),
                         head.in(dv, own), row, memory, T, D);
    });
}

// call(group) with what products of bfloat16 heads of size D add up.
template <class Call> static auto with_group(n_t D, Call call) {
#ifdef __AVX512BF16__
    if (D % (2 * Group<pair>::lanes) == 0) return call(pair{});
#endif
    return call(float{});
}

extern "C" n_t attention_forward_scratch(n_t heads, n_t T, n_t D, int is_bf16, int threads) {  // floats
    if (!is_bf16) return least(threads, heads) * Memory<float>::forward(T, D);
    return least(threads, heads) * with_group(D, [&](auto group) { return Memory<decltype(group)>::forward(T, D); });
}

extern "C" n_t attention_backward_scratch(n_t heads, n_t T, n_t D, int is_bf16, int threads) {
    if (!is_bf16) return least(threads, heads) * Memory<float>::backward(T, D);
    return least(threads, heads) * with_group(D, [&](auto group) { return Memory<decltype(group)>::backward(T, D); });
}

extern "C" void attention_forward(const float *q, const float *k, const float *v, const float *cos,
                                  const float *sin, float *out, float *lse, float *scratch, n_t B,
                                  n_t T, n_t H, n_t D, const n_t *strides, int threads) {
    forward<float>(q, k, v, cos, sin, out, lse, scratch, B, T, H, D, strides, threads);
}

extern "C" void attention_backward(const float *q, const float *k, const float *v, const float *cos,
                                   const float *sin, const float *lse, const float *grad,
                                   float *dq, float *dk, float *dv, float *scratch,
                                   n_t B, n_t T, n_t H, n_t D, const n_t *strides, int threads) {
    backward<float>(q, k, v, cos, sin, lse, grad, dq, dk, dv, scratch, B, T, H, D, strides, threads);
}

extern "C" void attention_forward_bf16(const bf16 *q, const bf16 *k, const bf16 *v, const float *cos,
                                       const float *sin, bf16 *out, float *lse, float *scratch, n_t B,
                                       n_t T, n_t H, n_t D, const n_t *strides, int threads) {
    with_group(D, [&](auto group) {
        forward<decltype(group)>(q, k, v, cos, sin, out, lse, scratch, B, T, H, D, strides, threads);
    });
}

extern "C" void attention_backward_bf16(const bf16 *q, const bf16 *k, const bf16 *v, const float *cos,
                                        const float *sin, const float *lse, const bf16 *grad,
                                        bf16 *dq, bf16 *dk, bf16 *dv, float *scratch,
                                        n_t B, n_t T, n_t H, n_t D, const n_t *strides, int threads) {
    with_group(D, [&](auto group) {
        backward<decltype(group)>(q, k, v, cos, sin, lse, grad, dq, dk, dv, scratch, B, T, H, D, strides, threads);
    });
}
