// Sums around a residual in float32 when nothing is trained: float32 or bfloat16 numbers are added,
// and the norm is taken in the same pass over memory.
//
// Compiled on first use by kernels/build.py. `wide` says that numbers are float32, else
// bfloat16. Counts are in numbers, widths in multiples of 16.

#include <math.h>

#include "vectors.h"

namespace {

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

// residual += added
void nvembed_add(float *residual, const void *added, int wide, int64_t rows, int64_t width,
                 int threads) {
    if (wide)
        add(residual, static_cast<const float *>(added), rows, width, threads);
    else
        add(residual, static_cast<const uint16_t *>(added), rows, width, threads);
}

}  // extern "C"
