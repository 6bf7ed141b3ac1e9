// What lies between the matrix products of a decoder layer when nothing is trained: float32 or
// bfloat16 numbers in and out, float32 in between, one pass over memory each.
//
// Compiled on first use by kernels/build.py. `wide` says that numbers are float32, else
// bfloat16. Counts are in numbers, widths in multiples of 16.

#include <math.h>
#include <string.h>

#include "vectors.h"

namespace {

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

inline Vector sigmoid(Vector x) {
    const Vector exponent = x * -kLog2e, high = all(126.0f);
    return 1.0f / (1.0f + power_of_two(exponent > high ? high : exponent));
}

template <typename Number>
void add_norm(float *residual, const Number *added, const float *weight, Number *out, int64_t rows,
              int64_t width, float eps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        float *sums = residual + row * width;
        Vector squares = {};
        for (int64_t at = 0; at < width; at += kLanes) {
            Vector x = load(sums + at);
            if (added) {
                x += get(added + row * width + at);
                store(sums + at, x);
            }
            squares += x * x;
        }
        const float factor = 1.0f / sqrtf(sum(squares) / width + eps);
        for (int64_t at = 0; at < width; at += kLanes)
            put(out + row * width + at, load(weight + at) * (load(sums + at) * factor));
    }
}

template <typename Number>
void gate(const Number *gates, const Number *up, Number *out, int64_t count, int threads) {
    constexpr int64_t kChunk = 4096;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t first = 0; first < count; first += kChunk)
        for (int64_t at = first; at < (first + kChunk < count ? first + kChunk : count);
             at += kLanes) {
            const Vector x = get(gates + at);
            put(out + at, x * sigmoid(x) * get(up + at));
        }
}

// `angles` numbers lie between the angles of two tokens; the first E / 2 of them are read.
template <typename Number, typename Out>
void rotate(const Number *from, const Number *cosine, const Number *sine, Out *out, int64_t tokens,
            int64_t heads, int64_t width, int64_t angles, int threads) {
    const int64_t half = width / 2;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t token = 0; token < tokens; token++)
        for (int64_t head = 0; head < heads; head++) {
            const Number *x = from + (token * heads + head) * width;
            Out *to = out + (token * heads + head) * width;
            for (int64_t at = 0; at < half; at += kLanes) {
                const Vector c = get(cosine + token * angles + at);
                const Vector s = get(sine + token * angles + at);
                const Vector a = get(x + at), b = get(x + half + at);
                put(to + at, a * c - b * s);
                put(to + half + at, b * c + a * s);
            }
        }
}

template <typename Number>
void add(float *residual, const Number *added, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t at = row * width; at < (row + 1) * width; at += kLanes)
            store(residual + at, load(residual + at) + get(added + at));
}

}  // namespace

extern "C" {

// residual += added (unless null); out = weight * residual / root(mean of its squares + eps)
void nvembed_add_norm(float *residual, const void *added, const float *weight, void *out, int wide,
                      int64_t rows, int64_t width, float eps, int threads) {
    if (wide)
        add_norm(residual, static_cast<const float *>(added), weight, static_cast<float *>(out),
                 rows, width, eps, threads);
    else
        add_norm(residual, static_cast<const uint16_t *>(added), weight,
                 static_cast<uint16_t *>(out), rows, width, eps, threads);
}

// out = gate * sigmoid(gate) * up
void nvembed_gate(const void *gates, const void *up, void *out, int wide, int64_t count,
                  int threads) {
    if (wide)
        gate(static_cast<const float *>(gates), static_cast<const float *>(up),
             static_cast<float *>(out), count, threads);
    else
        gate(static_cast<const uint16_t *>(gates), static_cast<const uint16_t *>(up),
             static_cast<uint16_t *>(out), count, threads);
}

// The halves of every head turned by the angles of its token. `wide_out` is of `out` alone.
void nvembed_rotate(const void *from, const void *cosine, const void *sine, void *out, int wide,
                    int wide_out, int64_t tokens, int64_t heads, int64_t width, int64_t angles,
                    int threads) {
    const auto floats = [](const void *data) { return static_cast<const float *>(data); };
    const auto shorts = [](const void *data) { return static_cast<const uint16_t *>(data); };
    if (wide)
        rotate(floats(from), floats(cosine), floats(sine), static_cast<float *>(out), tokens,
               heads, width, angles, threads);
    else if (wide_out)
        rotate(shorts(from), shorts(cosine), shorts(sine), static_cast<float *>(out), tokens,
               heads, width, angles, threads);
    else
        rotate(shorts(from), shorts(cosine), shorts(sine), static_cast<uint16_t *>(out), tokens,
               heads, width, angles, threads);
}

// residual += added
void nvembed_add(float *residual, const void *added, int wide, int64_t rows, int64_t width,
                 int threads) {
    if (wide)
        add(residual, static_cast<const float *>(added), rows, width, threads);
    else
        add(residual, static_cast<const uint16_t *>(added), rows, width, threads);
}

}  // extern "C"
