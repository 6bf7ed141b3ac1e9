// RMS norm, the gate of a gated MLP and rotary positions on a CPU: one pass over memory each way.
//
// Compiled on first use by kernels/build.py. `wide` says that numbers are float32, else bfloat16;
// in between they are float32. Counts are in numbers, widths in multiples of 16.

#include <math.h>

#include "vectors.h"

namespace {

constexpr int64_t kChunk = 4096;

inline int64_t least(int64_t one, int64_t other) { return one < other ? one : other; }

template <typename Number>
void gate_forward(const Number *gate, const Number *up, Number *out, int64_t count, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t first = 0; first < count; first += kChunk)
        for (int64_t at = first; at < least(first + kChunk, count); at += kLanes) {
            const Vector x = get(gate + at);
            put(out + at, x * sigmoid(x) * get(up + at));
        }
}

template <typename Number>
void gate_backward(const Number *gate, const Number *up, const Number *d_out, Number *d_gate,
                   Number *d_up, int64_t count, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t first = 0; first < count; first += kChunk)
        for (int64_t at = first; at < least(first + kChunk, count); at += kLanes) {
            const Vector x = get(gate + at), open = sigmoid(x), d = get(d_out + at);
            put(d_up + at, d * x * open);
            put(d_gate + at, d * get(up + at) * open * (1.0f + x * (1.0f - open)));
        }
}

template <typename Number>
void norm_forward(const Number *x, const Number *weight, Number *out, float *inverse, int64_t rows,
                  int64_t width, float eps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        const Number *from = x + row * width;
        Vector squares = {};
        for (int64_t at = 0; at < width; at += kLanes) squares += get(from + at) * get(from + at);
        const float factor = 1.0f / sqrtf(sum(squares) / width + eps);
        inverse[row] = factor;
        for (int64_t at = 0; at < width; at += kLanes)
            put(out + row * width + at, get(weight + at) * (get(from + at) * factor));
    }
}

template <typename Number>
void norm_backward(const Number *x, const Number *weight, const float *inverse, const Number *d_out,
                   Number *d_x, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        const Number *from = x + row * width, *d = d_out + row * width;
        Vector both = {};
        for (int64_t at = 0; at < width; at += kLanes)
            both += get(d + at) * get(weight + at) * get(from + at);
        const float factor = inverse[row];
        const float along = sum(both) / width * factor * factor;
        for (int64_t at = 0; at < width; at += kLanes)
            put(d_x + row * width + at,
                factor * (get(d + at) * get(weight + at) - get(from + at) * along));
    }
}

// `angles` numbers lie between the angles of two tokens; the first E / 2 of them are read. `way` is
// 1, or -1 for the other direction, which is the gradient's.
template <typename Number, typename Out>
void rotate(const Number *from, const Number *cosine, const Number *sine, Out *out, int64_t tokens,
            int64_t heads, int64_t width, int64_t angles, float way, int threads) {
    const int64_t half = width / 2;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t token = 0; token < tokens; token++)
        for (int64_t head = 0; head < heads; head++) {
            const Number *x = from + (token * heads + head) * width;
            Out *to = out + (token * heads + head) * width;
            for (int64_t at = 0; at < half; at += kLanes) {
                const Vector c = get(cosine + token * angles + at);
                const Vector s = get(sine + token * angles + at) * way;
                const Vector a = get(x + at), b = get(x + half + at);
                put(to + at, a * c - b * s);
                put(to + half + at, b * c + a * s);
            }
        }
}

const float *floats(const void *data) { return static_cast<const float *>(data); }
float *floats(void *data) { return static_cast<float *>(data); }
const uint16_t *shorts(const void *data) { return static_cast<const uint16_t *>(data); }
uint16_t *shorts(void *data) { return static_cast<uint16_t *>(data); }

}  // namespace

extern "C" {

// out = gate * sigmoid(gate) * up
void nvembed_gate_forward(const void *gate, const void *up, void *out, int wide, int64_t count,
                          int threads) {
    if (wide)
        gate_forward(floats(gate), floats(up), floats(out), count, threads);
    else
        gate_forward(shorts(gate), shorts(up), shorts(out), count, threads);
}

void nvembed_gate_backward(const void *gate, const void *up, const void *d_out, void *d_gate,
                           void *d_up, int wide, int64_t count, int threads) {
    if (wide)
        gate_backward(floats(gate), floats(up), floats(d_out), floats(d_gate), floats(d_up), count,
                      threads);
    else
        gate_backward(shorts(gate), shorts(up), shorts(d_out), shorts(d_gate), shorts(d_up), count,
                      threads);
}

// out = weight * x / root(mean of x^2 + eps), a row at a time; `inverse` is one over the root.
void nvembed_norm_forward(const void *x, const void *weight, void *out, float *inverse, int wide,
                          int64_t rows, int64_t width, float eps, int threads) {
    if (wide)
        norm_forward(floats(x), floats(weight), floats(out), inverse, rows, width, eps, threads);
    else
        norm_forward(shorts(x), shorts(weight), shorts(out), inverse, rows, width, eps, threads);
}

void nvembed_norm_backward(const void *x, const void *weight, const float *inverse,
                           const void *d_out, void *d_x, int wide, int64_t rows, int64_t width,
                           int threads) {
    if (wide)
        norm_backward(floats(x), floats(weight), inverse, floats(d_out), floats(d_x), rows, width,
                      threads);
    else
        norm_backward(shorts(x), shorts(weight), inverse, shorts(d_out), shorts(d_x), rows, width,
                      threads);
}

// The halves of every head turned by the angles of its token. `wide_out` is of `out` alone.
void nvembed_rotate(const void *from, const void *cosine, const void *sine, void *out, int wide,
                    int wide_out, int64_t tokens, int64_t heads, int64_t width, int64_t angles,
                    float way, int threads) {
    if (wide)
        rotate(floats(from), floats(cosine), floats(sine), floats(out), tokens, heads, width,
               angles, way, threads);
    else if (wide_out)
        rotate(shorts(from), shorts(cosine), shorts(sine), floats(out), tokens, heads, width,
               angles, way, threads);
    else
        rotate(shorts(from), shorts(cosine), shorts(sine), shorts(out), tokens, heads, width,
               angles, way, threads);
}

}  // extern "C"
