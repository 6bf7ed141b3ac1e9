// RMS norm and the gate of a gated MLP, float32, on a CPU: one pass over memory each way.
//
// Compiled on first use by kernels/build.py. Counts are in numbers, widths in multiples of 16.

#include <math.h>

#include "vectors.h"

namespace {

constexpr int64_t kChunk = 4096;

inline int64_t least(int64_t one, int64_t other) { return one < other ? one : other; }

inline Vector sigmoid(Vector x) {
    const Vector exponent = x * -kLog2e, high = all(126.0f);
    return 1.0f / (1.0f + power_of_two(exponent > high ? high : exponent));
}

}  // namespace

extern "C" {

// out = gate * sigmoid(gate) * up
void nvembed_gate_forward(const float *gate, const float *up, float *out, int64_t count,
                          int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t first = 0; first < count; first += kChunk)
        for (int64_t at = first; at < least(first + kChunk, count); at += kLanes) {
            const Vector x = load(gate + at);
            store(out + at, x * sigmoid(x) * load(up + at));
        }
}

void nvembed_gate_backward(const float *gate, const float *up, const float *d_out, float *d_gate,
                           float *d_up, int64_t count, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t first = 0; first < count; first += kChunk)
        for (int64_t at = first; at < least(first + kChunk, count); at += kLanes) {
            const Vector x = load(gate + at), open = sigmoid(x), d = load(d_out + at);
            store(d_up + at, d * x * open);
            store(d_gate + at, d * load(up + at) * open * (1.0f + x * (1.0f - open)));
        }
}

// out = weight * x / root(mean of x^2 + eps), a row at a time; `inverse` is one over the root.
void nvembed_norm_forward(const float *x, const float *weight, float *out, float *inverse,
                          int64_t rows, int64_t width, float eps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        const float *from = x + row * width;
        Vector squares = {};
        for (int64_t at = 0; at < width; at += kLanes) squares += load(from + at) * load(from + at);
        const float factor = 1.0f / sqrtf(sum(squares) / width + eps);
        inverse[row] = factor;
        for (int64_t at = 0; at < width; at += kLanes)
            store(out + row * width + at, load(weight + at) * (load(from + at) * factor));
    }
}

void nvembed_norm_backward(const float *x, const float *weight, const float *inverse,
                           const float *d_out, float *d_x, int64_t rows, int64_t width,
                           int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        const float *from = x + row * width, *d = d_out + row * width;
        Vector both = {};
        for (int64_t at = 0; at < width; at += kLanes)
            both += load(d + at) * load(weight + at) * load(from + at);
        const float factor = inverse[row];
        const float along = sum(both) / width * factor * factor;
        for (int64_t at = 0; at < width; at += kLanes)
            store(d_x + row * width + at,
                  factor * (load(d + at) * load(weight + at) - load(from + at) * along));
    }
}

}  // extern "C"
