// Vectors of W floats, of which compilers make the registers of any CPU, and their exponential.
// bfloat16 is the upper half of a float: it is read as one, and written rounded to the nearest.
#pragma once
#include <cstdint>
#ifdef __AVX__
#include <immintrin.h>
#endif

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
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLED(a, b, ...) __builtin_shuffle(a, b, ivec{__VA_ARGS__})
#endif

INLINE vec splat(float x) { return x - vec{}; }
INLINE constexpr n_t up(n_t x, n_t m) { return (x + m - 1) / m * m; }
INLINE n_t least(n_t a, n_t b) { return a < b ? a : b; }
// Where a thread's share of so many begins.
INLINE n_t share(n_t count, n_t thread, n_t threads) { return count * thread / threads; }

// The bits of a bfloat16 as the upper half of each number; ties go to the even one, NaN stays.
INLINE uvec rounded(vec x) {
    uvec bits = (uvec)x;
    bits += 0x7fff + (bits >> 16 & 1);
    return x == x ? bits & 0xffff0000 : uvec{} + 0x7fc00000;
}

// A reference to a vec would do for both, but clang forgets its alignment.
INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE vec load(const bf16 *p) { return (vec)(__builtin_convertvector(*(const hvec *)p, uvec) << 16); }
INLINE void store(float *p, vec x) { *(vec *)p = x; }
INLINE void store(bf16 *p, vec x) { *(hvec *)p = __builtin_convertvector(rounded(x) >> 16, hvec); }

// The larger and the smaller number of each lane; b's if one is NaN.
#ifdef __AVX__
INLINE vec larger(vec a, vec b) { return (vec)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE vec smaller(vec a, vec b) { return (vec)_mm256_min_ps((__m256)a, (__m256)b); }
#else
INLINE vec larger(vec a, vec b) { return a > b ? a : b; }
INLINE vec smaller(vec a, vec b) { return a < b ? a : b; }
#endif

// All lanes in one: halves, quarters and neighbours.
template <class Of> INLINE float reduced(vec x, Of of) {
    x = of(x, SHUFFLED(x, x, 4, 5, 6, 7, 0, 1, 2, 3));
    x = of(x, SHUFFLED(x, x, 2, 3, 0, 1, 6, 7, 4, 5));
    x = of(x, SHUFFLED(x, x, 1, 0, 3, 2, 5, 4, 7, 6));
    return x[0];
}
INLINE float sum_of(vec x) { return reduced(x, [](vec a, vec b) { return a + b; }); }
INLINE float largest_of(vec x) { return reduced(x, larger); }

// e^x to 2 units in the last place for -87 ≤ x ≤ 88, to which x is clamped; NaN stays.
// x = n ln 2 + r, |r| ≤ ln 2 / 2: 2^n times e^r, a Taylor-like polynomial.
INLINE vec exp_of(vec x) {
    x = smaller(splat(88.0f), larger(splat(-87.0f), x));
    vec n = x * 1.44269504088896341f + 12583039.0f;  // 1.5 · 2^23 + 127: the last bits are n + 127
    vec power = (vec)((ivec)n << 23);
    n -= 12583039.0f;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts
    vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r + 1.0f;
    return (p * r + 1.0f) * power;
}
