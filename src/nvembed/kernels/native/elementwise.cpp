// RMS norm, the gate of a gated MLP, rotary positions and dropout on a CPU: one pass over memory.
//
// Compiled on first use by kernels/build.py. `wide` says that numbers are float32, else bfloat16;
// in between they are float32. Counts are in numbers, widths in multiples of 16.

#include <math.h>
#include <string.h>

#include "vectors.h"

namespace {

constexpr int64_t kChunk = 4096, kLongestRow = 1024;

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

// `hat` is x / root(mean of x^2 + eps): with `inverse`, all that the way back needs.
template <typename Number, typename Out>
void norm_forward(const Number *x, const Number *weight, Out *hat, Out *out, float *inverse,
                  int64_t rows, int64_t width, float eps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        const Number *from = x + row * width;
        Out *to = hat + row * width;
        Vector squares = {};
        for (int64_t at = 0; at < width; at += kLanes) squares += get(from + at) * get(from + at);
        const float factor = 1.0f / sqrtf(sum(squares) / width + eps);
        inverse[row] = factor;
        for (int64_t at = 0; at < width; at += kLanes) {
            put(to + at, get(from + at) * factor);
            put(out + row * width + at, get(weight + at) * get(to + at));
        }
    }
}

template <typename Number, typename Out>
void norm_again(const Out *hat, const Number *weight, Out *out, int64_t rows, int64_t width,
                int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t at = 0; at < width; at += kLanes)
            put(out + row * width + at, get(weight + at) * get(hat + row * width + at));
}

template <typename Number, typename Out>
void norm_backward(const Out *hat, const Number *weight, const float *inverse, const Out *d_out,
                   Number *d_x, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        const Out *from = hat + row * width, *d = d_out + row * width;
        Vector both = {};
        for (int64_t at = 0; at < width; at += kLanes)
            both += get(d + at) * get(weight + at) * get(from + at);
        const float factor = inverse[row], along = sum(both) / width;
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

// All bits of a number depend on all of x (the constants are those of lowbias32, C. Wellons).
inline Bits mixed(Bits x) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ (x >> 16);
}

// A number stays, times `scale`, where a hash of its place and the seed is not below `limit`.
template <typename Number>
void dropped(const Number *x, Number *out, int64_t count, uint64_t seed, uint32_t limit,
             float scale, int threads) {
    const Bits low = Bits{} + (uint32_t)seed, high = Bits{} + (uint32_t)(seed >> 32);
    Bits lanes = {};
    for (int lane = 0; lane < kLanes; lane++) lanes[lane] = lane;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t first = 0; first < count; first += kChunk)
        for (int64_t at = first; at < least(first + kChunk, count); at += kLanes) {
            const Bits hash = mixed(mixed((lanes + (uint32_t)at) ^ low) + high);
            put(out + at, (Integers)(hash < limit) ? Vector{} : get(x + at) * scale);
        }
}

inline float get_one(uint16_t bits) {
    const uint32_t wide = (uint32_t)bits << 16;
    float found;
    memcpy(&found, &wide, sizeof found);
    return found;
}

inline Vector get_first(const uint16_t *from, int64_t count, float otherwise) {
    if (count >= kLanes) return get(from);
    Vector found = all(otherwise);
    for (int64_t lane = 0; lane < count; lane++)
        found[lane] = get_one(from[lane]);
    return found;
}

inline void put_first(uint16_t *to, Vector value, int64_t count) {
    uint16_t all_of_them[kLanes];
    if (count >= kLanes) return put(to, value);
    put(all_of_them, value);
    for (int64_t lane = 0; lane < count; lane++) to[lane] = all_of_them[lane];
}

// softmax of scale times each row, in place.
void softmax(uint16_t *scores, int64_t rows, int64_t width, float scale, int threads) {
    const float factor = scale * kLog2e;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        Vector kept[kLongestRow / kLanes], most = all(-INFINITY), total = {};
        uint16_t *x = scores + row * width;
        for (int64_t at = 0, i = 0; at < width; at += kLanes, i++) {
            kept[i] = get_first(x + at, width - at, -INFINITY) * factor;
            most = kept[i] > most ? kept[i] : most;
        }
        const Vector top = all(largest(most));
        for (int64_t at = 0, i = 0; at < width; at += kLanes, i++) {
            kept[i] = power_of_two(kept[i] - top);
            total += kept[i];
        }
        const float share = 1.0f / sum(total);
        for (int64_t at = 0, i = 0; at < width; at += kLanes, i++)
            put_first(x + at, kept[i] * share, width - at);
    }
}

// `d` holds the gradient of the softmax, and then that of the rows.
void softmax_backward(const uint16_t *weights, uint16_t *d, int64_t rows, int64_t width,
                      float scale, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        const uint16_t *w = weights + row * width;
        uint16_t *to = d + row * width;
        Vector along = {};
        for (int64_t at = 0; at < width; at += kLanes)
            along += get_first(w + at, width - at, 0) * get_first(to + at, width - at, 0);
        const Vector mean = all(sum(along));
        for (int64_t at = 0; at < width; at += kLanes) {
            const Vector open = get_first(w + at, width - at, 0) * scale;
            put_first(to + at, open * (get_first(to + at, width - at, 0) - mean), width - at);
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

// out = weight * hat, hat = x / root(mean of x^2 + eps), a row at a time; `inverse` is one over the
// root. `wide` is of x and the weight, `wide_out` of all others but `inverse`.
void nvembed_norm_forward(const void *x, const void *weight, void *hat, void *out, float *inverse,
                          int wide, int wide_out, int64_t rows, int64_t width, float eps,
                          int threads) {
    if (wide_out)
        norm_forward(floats(x), floats(weight), floats(hat), floats(out), inverse, rows, width,
                     eps, threads);
    else if (wide)
        norm_forward(floats(x), floats(weight), shorts(hat), shorts(out), inverse, rows, width,
                     eps, threads);
    else
        norm_forward(shorts(x), shorts(weight), shorts(hat), shorts(out), inverse, rows, width,
                     eps, threads);
}

void nvembed_norm_again(const void *hat, const void *weight, void *out, int wide, int wide_out,
                        int64_t rows, int64_t width, int threads) {
    if (wide_out)
        norm_again(floats(hat), floats(weight), floats(out), rows, width, threads);
    else if (wide)
        norm_again(shorts(hat), floats(weight), shorts(out), rows, width, threads);
    else
        norm_again(shorts(hat), shorts(weight), shorts(out), rows, width, threads);
}

void nvembed_norm_backward(const void *hat, const void *weight, const float *inverse,
                           const void *d_out, void *d_x, int wide, int wide_out, int64_t rows,
                           int64_t width, int threads) {
    if (wide_out)
        norm_backward(floats(hat), floats(weight), inverse, floats(d_out), floats(d_x), rows,
                      width, threads);
    else if (wide)
        norm_backward(shorts(hat), floats(weight), inverse, shorts(d_out), floats(d_x), rows,
                      width, threads);
    else
        norm_backward(shorts(hat), shorts(weight), inverse, shorts(d_out), shorts(d_x), rows,
                      width, threads);
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

void nvembed_dropped(const void *x, void *out, int wide, int64_t count, int64_t seed, int64_t limit,
                     float scale, int threads) {
    if (wide)
        dropped(floats(x), floats(out), count, seed, limit, scale, threads);
    else
        dropped(shorts(x), shorts(out), count, seed, limit, scale, threads);
}

// Of bfloat16, rows of up to kLongestRow numbers.
void nvembed_softmax(void *scores, int64_t rows, int64_t width, float scale, int threads) {
    softmax(shorts(scores), rows, width, scale, threads);
}

void nvembed_softmax_backward(const void *weights, void *d, int64_t rows, int64_t width,
                              float scale, int threads) {
    softmax_backward(shorts(weights), shorts(d), rows, width, scale, threads);
}

}  // extern "C"
