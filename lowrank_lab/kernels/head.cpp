// Cross-entropy of a linear head, float32: logits = h Wᵀ, their softmax, and the gradients of h and W.
//
// A few rows at a time go through all of it, so that their logits stay in a core's cache.
// d = hidden, V = vocabulary; both are multiples of N. W is (V×d).
#include "halves.h"
#include "losses.h"

constexpr n_t HEAD_ROWS = 48;  // in a piece

extern "C" n_t head_scratch(n_t d, n_t V, int slopes, int threads) {  // floats
    n_t pieces = threads * HEAD_ROWS * V;
    return slopes ? 2 * V * d + pieces + PARTS * V * d : V * d + pieces;
}

// losses (rows); with `slopes` dh (rows×d) and dW (V×d) of their sum. Returns the number of targets
// that are no column.
extern "C" int head_losses(const float *h, const float *W, const int64_t *targets, float *out, float *dh,
                           float *dW, float *scratch, n_t rows, n_t d, n_t V, int slopes, int threads) {
    n_t size = V * d, pieces = (rows + HEAD_ROWS - 1) / HEAD_ROWS;
    float *forward = scratch, *backward = forward + size, *sums = backward + slopes * size;
    float *logits = sums + slopes * PARTS * size;
    Weight{W, V, d}.pack_forward(forward);
    if (slopes) Weight{W, V, d}.pack_backward(backward);
    int wrong = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : wrong) if (threads > 1)
    for (int thread = 0; thread < threads; thread++) {
        float *l = logits + thread * HEAD_ROWS * V;
        for (n_t part = PARTS * thread / threads; part < PARTS * (thread + 1) / threads; part++) {
            float *sum = sums + part * size;
            if (slopes) memset(sum, 0, 4 * size);
            for (n_t p = pieces * part / PARTS; p < pieces * (part + 1) / PARTS; p++) {
                n_t from = p * HEAD_ROWS, count = rows - from < HEAD_ROWS ? rows - from : HEAD_ROWS;
                layer<false>(count, h + from * d, d, forward, l, V);
                for (n_t r = 0; r < count; r++)
                    wrong += !loss_row(l + r * V, targets[from + r], out + from + r, V, slopes);
                if (!slopes) continue;
                layer<false>(count, l, V, backward, dh + from * d, d);
                add_transposed(count, l, V, h + from * d, d, sum);
            }
        }
    }
    if (slopes) sum_parts(sums, size, dW, size);
    return wrong;
}
