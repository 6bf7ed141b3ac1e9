// Rows of numbers in 8 bits with a scale each, and sums of products of these as numbers again.
//
// Compiled on first use by kernels/build.py. `wide` says that numbers are float32, else bfloat16.

#include <math.h>

#include "vectors.h"

namespace {

typedef int8_t Bytes __attribute__((vector_size(kLanes), aligned(1), may_alias));
typedef int32_t Sums __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

template <typename Number>
void to_int8(const Number *x, int8_t *out, float *scale, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        const Number *from = x + row * width;
        Vector most = {};
        for (int64_t at = 0; at < width; at += kLanes) {
            const Vector value = get(from + at), other = -value;
            const Vector size = value < other ? other : value;
            most = size > most ? size : most;
        }
        const float top = largest(most), factor = top > 0 ? 127.0f / top : 0.0f;
        scale[row] = top / 127.0f;
        const Vector large = all(12582912.0f);  // adding it rounds to the nearest
        for (int64_t at = 0; at < width; at += kLanes) {
            const Integers bits = (Integers)(get(from + at) * factor + large);
            const Integers whole = bits - (Integers)large;
            *reinterpret_cast<Bytes *>(out + row * width + at) =
                __builtin_convertvector(whole, Bytes);
        }
    }
}

template <typename Number>
void from_sums(const int32_t *sums, const float *row_scale, const float *scale, const float *bias,
               Number *out, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t at = 0; at < width; at += kLanes) {
            const Sums sum = *reinterpret_cast<const Sums *>(sums + row * width + at);
            Vector value = __builtin_convertvector(sum, Vector) * row_scale[row] * load(scale + at);
            if (bias) value += load(bias + at);
            put(out + row * width + at, value);
        }
}

}  // namespace

extern "C" {

void nvembed_to_int8(const void *x, int8_t *out, float *scale, int wide, int64_t rows,
                     int64_t width, int threads) {
    if (wide)
        to_int8((const float *)x, out, scale, rows, width, threads);
    else
        to_int8((const uint16_t *)x, out, scale, rows, width, threads);
}

void nvembed_from_sums(const int32_t *sums, const float *row_scale, const float *scale,
                       const float *bias, void *out, int wide, int64_t rows, int64_t width,
                       int threads) {
    if (wide)
        from_sums(sums, row_scale, scale, bias, (float *)out, rows, width, threads);
    else
        from_sums(sums, row_scale, scale, bias, (uint16_t *)out, rows, width, threads);
}

}  // extern "C"
