// Vectors of the width of this CPU's registers, as GCC and Clang have them, and 2^x of them.

#pragma once

#include <stdint.h>

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr float kLog2e = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;

typedef float Vector __attribute__((vector_size(kLanes * 4)));
typedef float Loose __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(kLanes * 4)));

inline Vector load(const float *from) { return *reinterpret_cast<const Loose *>(from); }
inline void store(float *to, Vector value) { *reinterpret_cast<Loose *>(to) = value; }
inline Vector all(float value) { return Vector{} + value; }

inline float sum(Vector value) {
    float total = 0;
    for (int lane = 0; lane < kLanes; lane++) total += value[lane];
    return total;
}

inline float largest(Vector value) {
    float best = value[0];
    for (int lane = 1; lane < kLanes; lane++) best = value[lane] > best ? value[lane] : best;
    return best;
}

// 2^x for x <= 0, to two units of the last place; what would be denormal becomes about 1e-38.
// Rounding by a large number puts the whole part into the low bits, from where it is added to the
// exponent. NaN stays NaN: the low bits of one may hold anything, so it is not added to.
inline Vector power_of_two(Vector x) {
    const Vector low = all(-126.0f), large = all(12582912.0f);
    x = x < low ? low : x;
    const Vector shifted = x + large;
    const Vector f = x - (shifted - large);  // -0.5 to 0.5
    Vector p = all(1.5403530393381609954e-4f);
    p = p * f + 1.3333558146428443423e-3f;
    p = p * f + 9.6181291076284771619e-3f;
    p = p * f + 5.5504108664821579953e-2f;
    p = p * f + 2.4022650695910071233e-1f;
    p = p * f + 6.9314718055994530942e-1f;
    p = p * f + 1.0f;
    const Integers is_number = x == x;
    return (Vector)((Integers)p + (((Integers)shifted << 23) & is_number));
}

}  // namespace
