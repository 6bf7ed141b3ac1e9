// Attention over the segments of a flat batch, forward only, bfloat16, on a CPU that multiplies it.
//
// As varlen_attention.cpp: one item of work is a segment with one key head and all query heads that
// share it, queries are taken in blocks, a block's scores stay in the L2 cache. Products take pairs
// of bfloat16 numbers and sum in float32; softmax is float32, to the base 2. Each item is computed
// by one thread in one order.
//
// Pairs are what one instruction multiplies: of neighbouring columns for the scores (queries and
// keys lie so), of neighbouring keys for the sums (weights lie so, values are interleaved).
//
// Compiled on first use by kernels/build.py.
//
// Letters: L tokens of a segment, E head width (a multiple of 32).

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "vectors.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#include <immintrin.h>

namespace {

constexpr int kColumns = 4, kRows = 6;
constexpr int64_t kPanel = kLanes * kColumns;
constexpr int64_t kBlock = 48;  // queries of a block; a multiple of kRows

inline int64_t least(int64_t one, int64_t other) { return one < other ? one : other; }
inline int64_t up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

inline __m512bh pairs(const uint32_t *from) { return (__m512bh)_mm512_loadu_si512(from); }

// C (kHigh x kWide vectors) = A (kHigh x depth pairs) times B (depth pairs x kWide vectors).
template <int kHigh, int kWide>
inline void tile(const uint32_t *a, int64_t a_stride, const uint32_t *b, int64_t b_stride, float *c,
                 int64_t c_stride, int64_t depth) {
    __m512 total[kHigh][kWide];
#pragma GCC unroll 6
    for (int row = 0; row < kHigh; row++)
#pragma GCC unroll 4
        for (int wide = 0; wide < kWide; wide++) total[row][wide] = _mm512_setzero_ps();
    for (int64_t step = 0; step < depth; step++) {
        __m512bh right[kWide];
#pragma GCC unroll 4
        for (int wide = 0; wide < kWide; wide++)
            right[wide] = pairs(b + step * b_stride + wide * kLanes);
#pragma GCC unroll 6
        for (int row = 0; row < kHigh; row++) {
            const __m512bh left = (__m512bh)_mm512_set1_epi32(a[row * a_stride + step]);
#pragma GCC unroll 4
            for (int wide = 0; wide < kWide; wide++)
                total[row][wide] = _mm512_dpbf16_ps(total[row][wide], left, right[wide]);
        }
    }
#pragma GCC unroll 6
    for (int row = 0; row < kHigh; row++)
#pragma GCC unroll 4
        for (int wide = 0; wide < kWide; wide++)
            _mm512_storeu_ps(c + row * c_stride + wide * kLanes, total[row][wide]);
}

template <int kHigh, int kWide>
void last_rows(int64_t rows, const uint32_t *a, int64_t a_stride, const uint32_t *b,
               int64_t b_stride, float *c, int64_t c_stride, int64_t depth) {
    if constexpr (kHigh > 0) {
        if (rows == kHigh)
            tile<kHigh, kWide>(a, a_stride, b, b_stride, c, c_stride, depth);
        else
            last_rows<kHigh - 1, kWide>(rows, a, a_stride, b, b_stride, c, c_stride, depth);
    }
}

template <int kWide>
void strip(int64_t rows, const uint32_t *a, int64_t a_stride, const uint32_t *b, int64_t b_stride,
           float *c, int64_t c_stride, int64_t depth) {
    for (; rows >= kRows; rows -= kRows, a += kRows * a_stride, c += kRows * c_stride)
        tile<kRows, kWide>(a, a_stride, b, b_stride, c, c_stride, depth);
    last_rows<kRows - 1, kWide>(rows, a, a_stride, b, b_stride, c, c_stride, depth);
}

// One strip of up to kColumns vectors.
void strip_of(int64_t wide, int64_t rows, const uint32_t *a, int64_t a_stride, const uint32_t *b,
              int64_t b_stride, float *c, int64_t c_stride, int64_t depth) {
    switch (wide) {
        case 1: return strip<1>(rows, a, a_stride, b, b_stride, c, c_stride, depth);
        case 2: return strip<2>(rows, a, a_stride, b, b_stride, c, c_stride, depth);
        case 3: return strip<3>(rows, a, a_stride, b, b_stride, c, c_stride, depth);
        case 4: return strip<4>(rows, a, a_stride, b, b_stride, c, c_stride, depth);
    }
}

// A row of E numbers is E / 2 pairs. The transpose in panels of kPanel rows: pair (row, at) lies
// at panel(row) + at * kPanel + row % kPanel. Rows up to the next multiple of kLanes become zero.
void gather_transposed(uint32_t *to, const uint16_t *from, int64_t stride, int64_t rows,
                       int64_t width) {
    for (int64_t first = 0; first < rows; first += kLanes) {
        uint32_t *block = to + first / kPanel * kPanel * width + first % kPanel;
        const int64_t count = least(kLanes, rows - first);
        for (int64_t at = 0; at < width; at += kLanes) {
            uint32_t line[kLanes][kLanes] = {};
            for (int64_t row = 0; row < count; row++)
                memcpy(line[row], from + (first + row) * stride + 2 * at, sizeof line[row]);
            const __m512i places = _mm512_mullo_epi32(
                _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                _mm512_set1_epi32(kLanes));
            for (int64_t column = 0; column < kLanes; column++)
                _mm512_storeu_si512(block + (at + column) * kPanel,
                                    _mm512_i32gather_epi32(places, &line[0][column], 4));
        }
    }
}

// Values of keys 2j and 2j + 1 side by side; an odd last key gets zeros beside it.
void gather_interleaved(uint32_t *to, const uint16_t *from, int64_t stride, int64_t rows,
                        int64_t width) {
    for (int64_t row = 0; row < rows; row += 2)
        for (int64_t at = 0; at < width; at += kLanes) {
            const uint16_t *here = from + row * stride + at;
            const __m512i one = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)here));
            __m512i other = _mm512_setzero_si512();
            if (row + 1 < rows)
                other = _mm512_cvtepu16_epi32(
                    _mm256_loadu_si256((const __m256i *)(here + stride)));
            _mm512_storeu_si512(to + row / 2 * width + at,
                                _mm512_or_si512(one, _mm512_slli_epi32(other, 16)));
        }
}

// Scores of one row into weights, in bfloat16; what lies from `seen` to `columns` gets weight 0.
// Returns the sum of the weights.
float softmax(float *score, uint32_t *weights, int64_t seen, int64_t columns, float scale) {
    for (int64_t at = seen; at < columns; at++) score[at] = -INFINITY;
    Vector most = load(score);
    for (int64_t at = kLanes; at < columns; at += kLanes) {
        const Vector next = load(score + at);
        most = next > most ? next : most;
    }
    const float top = largest(most) * scale;
    Vector total = {};
    for (int64_t at = 0; at < columns; at += kLanes) {
        const Vector weight = power_of_two(load(score + at) * scale - top);
        total += weight;
        _mm256_storeu_si256((__m256i *)(weights + at / 2),
                            (__m256i)_mm512_cvtneps_pbh((__m512)weight));
    }
    return sum(total);
}

struct Matrices {  // of one tensor: (token, head, E), strides in numbers, E without gaps
    const uint16_t *data;
    int64_t token, head;
};

struct Job {
    Matrices query, key, value;
    const int32_t *starts;
    int64_t segments, heads, key_heads, width;
    float scale;
    bool causal;
    uint16_t *out;  // (T, H, E)
};

// Memory that a thread keeps, since fresh pages cost more than what is done in them.
struct Scratch {
    uint32_t *data = nullptr;
    int64_t size = 0, used = 0;
    ~Scratch() { free(data); }
    bool reserve(int64_t numbers) {
        used = 0;
        if (numbers <= size) return true;
        free(data);
        size = 0;
        void *fresh = nullptr;
        data = posix_memalign(&fresh, 64, numbers * 4) ? nullptr : static_cast<uint32_t *>(fresh);
        if (data) size = numbers;
        return data;
    }
    uint32_t *take(int64_t numbers) {
        uint32_t *part = data + used;
        used += up(numbers, 16);
        return part;
    }
};

thread_local Scratch scratch;

bool forward_item(const Job &job, int64_t segment, int64_t key_head) {
    const int64_t start = job.starts[segment], length = job.starts[segment + 1] - start;
    const int64_t width = job.width, group = job.heads / job.key_heads;
    const int64_t full = up(length, kLanes), stride = full + 16;  // + 16: other cache sets
    const int64_t needed = up(length, kPanel) * width / 2 + up(length, 2) / 2 * width +
                           kBlock * (width + stride + stride / 2 + width / 2) + 256;
    if (!scratch.reserve(needed)) return false;
    uint32_t *keys = scratch.take(up(length, kPanel) * width / 2);
    uint32_t *values = scratch.take(up(length, 2) / 2 * width);
    float *scores = reinterpret_cast<float *>(scratch.take(kBlock * stride));
    uint32_t *weights = scratch.take(kBlock * stride / 2);
    float *sums = reinterpret_cast<float *>(scratch.take(kBlock * width));
    uint32_t *queries = scratch.take(kBlock * width / 2);
    const Matrices &k = job.key, &v = job.value, &q = job.query;
    gather_transposed(keys, k.data + start * k.token + key_head * k.head, k.token, length,
                      width / 2);
    gather_interleaved(values, v.data + start * v.token + key_head * v.head, v.token, length,
                       width);
    for (int64_t head = key_head * group; head < (key_head + 1) * group; head++)
        for (int64_t first = 0; first < length; first += kBlock) {
            const int64_t rows = least(kBlock, length - first), token = start + first;
            const int64_t visible = job.causal ? first + rows : length;
            const int64_t columns = up(visible, kLanes);
            for (int64_t row = 0; row < rows; row++)
                memcpy(queries + row * width / 2, q.data + (token + row) * q.token + head * q.head,
                       width * 2);
            for (int64_t column = 0; column < columns; column += kPanel)
                strip_of(least(kPanel, columns - column) / kLanes, rows, queries, width / 2,
                         keys + column * width / 2, kPanel, scores + column, stride, width / 2);
            float factors[kBlock];
            for (int64_t row = 0; row < rows; row++)
                factors[row] = 1.0f / softmax(scores + row * stride, weights + row * stride / 2,
                                              job.causal ? first + row + 1 : length, columns,
                                              job.scale * kLog2e);
            for (int64_t column = 0; column < width; column += kPanel)
                strip_of(least(kPanel, width - column) / kLanes, rows, weights, stride / 2,
                         values + column, width, sums + column, width, up(visible, 2) / 2);
            for (int64_t row = 0; row < rows; row++) {
                uint16_t *out = job.out + ((token + row) * job.heads + head) * width;
                for (int64_t at = 0; at < width; at += kLanes)
                    _mm256_storeu_si256(
                        (__m256i *)(out + at),
                        (__m256i)_mm512_cvtneps_pbh(
                            (__m512)(load(sums + row * width + at) * factors[row])));
            }
        }
    return true;
}

}  // namespace

extern "C" {

int nvembed_bfloat16_supported() { return 1; }

// Returns 0, or 1 where memory ran out. Strides are those of a token and of a head.
int nvembed_bfloat16_attention(const uint16_t *query, const uint16_t *key, const uint16_t *value,
                               const int64_t *strides, const int32_t *starts, int64_t segments,
                               int64_t heads, int64_t key_heads, int64_t width, float scale,
                               int causal, int threads, uint16_t *out) {
    const Job job = {{query, strides[0], strides[1]}, {key, strides[2], strides[3]},
                     {value, strides[4], strides[5]}, starts, segments, heads, key_heads, width,
                     scale, causal != 0, out};
    int failed = 0;
#pragma omp parallel for schedule(dynamic) num_threads(threads) reduction(| : failed)
    for (int64_t item = 0; item < segments * key_heads; item++)
        failed |= !forward_item(job, item / key_heads, item % key_heads);
    return failed;
}

}  // extern "C"

#else

extern "C" {

int nvembed_bfloat16_supported() { return 0; }

}  // extern "C"

#endif
