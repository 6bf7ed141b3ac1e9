// Vectors of the width of this CPU's registers, as GCC and Clang have them: float32 or bfloat16 in
// memory, float32 in between; 2^x and the sigmoid of them.

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

typedef uint16_t Short __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
typedef uint32_t Bits __attribute__((vector_size(kLanes * 4)));

inline Vector get(const float *from) { return load(from); }
inline Vector get(const uint16_t *from) {
    const Bits bits = __builtin_convertvector(*reinterpret_cast<const Short *>(from), Bits);
    return (Vector)(bits << 16);
}

inline void put(float *to, Vector value) { store(to, value); }
// To the nearest, ties to even. NaN keeps its sign and gets a bit that rounding cannot carry away.
inline void put(uint16_t *to, Vector value) {
    const Bits bits = (Bits)value;
    const Bits rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    const Bits chosen = (Bits)(value != value) ? (bits | 0x400000u) : rounded;
    *reinterpret_cast<Short *>(to) = __builtin_convertvector(chosen >> 16, Short);
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

inline Vector sigmoid(Vector x) {
    const Vector exponent = x * -kLog2e, high = all(126.0f);
    return 1.0f / (1.0f + power_of_two(exponent > high ? high : exponent));
}

}  // namespace
