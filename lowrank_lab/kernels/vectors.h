// Vectors of W floats, of which compilers make the registers of any CPU, and their exponential.
// bfloat16 is the upper half of a float: it is read as one, and written rounded to the nearest.
#pragma once
#include <cstdint>

constexpr int W = 8;
typedef int64_t n_t;
typedef float vec __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint32_t uvec __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint16_t hvec __attribute__((vector_size(2 * W), aligned(2), may_alias));
struct bf16 {
    uint16_t bits;
};
#define INLINE static inline __attribute__((always_inline))

INLINE vec splat(float x) { return x - vec{}; }
INLINE vec &at(float *p) { return *(vec *)p; }
INLINE const vec &at(const float *p) { return *(const vec *)p; }
INLINE constexpr n_t up(n_t x, n_t m) { return (x + m - 1) / m * m; }

// The bits of a bfloat16 as the upper half of each number; ties go to the even one, NaN stays.
INLINE uvec rounded(vec x) {
    uvec bits = (uvec)x;
    bits += 0x7fff + (bits >> 16 & 1);
    return x == x ? bits & 0xffff0000 : uvec{} + 0x7fc00000;
}

INLINE vec load(const float *p) { return at(p); }
INLINE vec load(const bf16 *p) { return (vec)(__builtin_convertvector(*(const hvec *)p, uvec) << 16); }
INLINE void store(float *p, vec x) { at(p) = x; }
INLINE void store(bf16 *p, vec x) { *(hvec *)p = __builtin_convertvector(rounded(x) >> 16, hvec); }

INLINE float sum_of(vec x) {
    float total = 0;
    for (int j = 0; j < W; j++) total += x[j];
    return total;
}

INLINE float largest_of(vec x) {
    float top = x[0];
    for (int j = 1; j < W; j++) top = x[j] > top ? x[j] : top;
    return top;
}

// e^x to 2 units in the last place for -87 ≤ x ≤ 88, to which x is clamped; NaN stays.
// x = n ln 2 + r, |r| ≤ ln 2 / 2: 2^n is added to the exponent of e^r, a Taylor-like polynomial.
INLINE vec exp_of(vec x) {
    x = x < -87.0f ? splat(-87.0f) : x;
    x = x > 88.0f ? splat(88.0f) : x;
    vec n = x * 1.44269504088896341f + 12582912.0f;  // 1.5 · 2^23: the sum is rounded to integers
    ivec exponent = (ivec)n << 23;
    n -= 12582912.0f;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts
    vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    vec y = (vec)((ivec)p + exponent);
    return x == x ? y : x;  // the bits of some NaNs would become those of a number
}
