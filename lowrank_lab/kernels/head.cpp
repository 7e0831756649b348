// Cross-entropy of a linear head, float32: logits = h Wᵀ, their softmax, and the gradients of h and W.
//
// A few rows at a time go through all of it, so that their logits stay in a core's cache.
// d = hidden, V = vocabulary; both are multiples of 16. W is (V×d).
#include "halves.h"
#include "losses.h"

// Floats after a row of logits: rows that are a power of 2 apart would share few sets of a cache.
constexpr n_t GAP = 16;

extern "C" n_t head_scratch(n_t rows, n_t d, n_t V, int slopes, int threads) {  // floats
    Weight weight{nullptr, V, d};
    n_t units = units_of(rows, UNIT, threads), logits = units * (slopes ? UNIT : PIECE) * (V + GAP);
    return weight.forward() + logits + slopes * (weight.backward() + units * Sum::size(d, UNIT));
}

// losses (rows); with `slopes` dh (rows×d) and dW (V×d) of their sum. Returns the number of targets
// that are no column.
extern "C" int head_losses(const float *h, const float *W, const int64_t *targets, float *out, float *dh,
                           float *dW, float *scratch, n_t rows, n_t d, n_t V, int slopes, int threads) {
    Weight weight{W, V, d};
    n_t ldl = V + GAP, units = units_of(rows, UNIT, threads);
    n_t kept = slopes ? UNIT : PIECE;  // rows of logits in a unit
    float *forward = scratch, *logits = forward + weight.forward(), *backward = logits + units * kept * ldl;
    Sum sum = {V, d, UNIT, ldl, backward + weight.backward()};
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int thread = 0; thread < threads; thread++) {
        weight.pack_forward(forward, thread, threads);
        if (slopes) weight.pack_backward(backward, thread, threads);
    }
    int wrong = 0;
    for (n_t first = 0; first < rows; first += units * UNIT) {
        n_t taken = least(units * UNIT, rows - first);
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : wrong) if (threads > 1)
        for (int unit = 0; unit < units; unit++) {
            for (n_t at_row = 0; at_row < least(UNIT, taken - unit * UNIT); at_row += PIECE) {
                n_t from = first + unit * UNIT + at_row, count = least(PIECE, rows - from);
                float *l = logits + (unit * kept + slopes * at_row) * ldl;
                layer<false>(count, h + from * d, d, d, forward, l, V, ldl);
                for (n_t r = 0; r < count; r++)
                    wrong += !loss_row(l + r * ldl, targets[from + r], out + from + r, V, slopes);
                if (!slopes) continue;
                layer<false>(count, l, V, ldl, backward, dh + from * d, d, d);
                sum.pack(unit, at_row, h + from * d, count);
            }
        }
        if (!slopes) continue;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
        for (int thread = 0; thread < units; thread++) sum.add(taken, logits, dW, first, thread, units);
    }
    return wrong;
}
