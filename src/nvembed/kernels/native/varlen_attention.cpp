// Attention over the segments of a flat batch, forward and backward, float32, on a CPU.
//
// One item of work is a segment with one key head and all query heads that share it. Queries are
// taken in blocks. A block's scores with all keys of its segment stand in a scratch buffer that
// fits the L2 cache; the backward pass computes them again from the saved logarithm of the sums,
// so nothing of the size of the scores is ever kept. Every item is computed by one thread in one
// order: the same input gives the same bits, whatever the number of threads.
//
// All products go through `multiply`: tiles of rows x vectors that stay in registers, a number of
// the left operand broadcast against vectors of the right one. Softmax runs to the base 2, with
// the factor log2(e) put on the queries.
//
// Compiled on first use by kernels/attention_float32.py. Vectors are those of GCC and Clang.
//
// Letters: L tokens of a segment, E head width.

#include <math.h>
#include <stdlib.h>

#include "vectors.h"

namespace {

#if defined(__AVX512F__)
constexpr int kColumns = 4, kAccumulators = 24;
#elif defined(__AVX__)
constexpr int kColumns = 2, kAccumulators = 12;
#elif defined(__aarch64__)
constexpr int kColumns = 4, kAccumulators = 24;
#else
constexpr int kColumns = 2, kAccumulators = 12;
#endif
constexpr int kMaxRows = 8;
constexpr int64_t kPanel = kLanes * kColumns;  // keys of one panel of a transposed operand
constexpr int64_t kDepth = 128;                // of a product between two writes of its result
constexpr int64_t kScoreBytes = 400 << 10;     // of both score buffers of a block

// A matrix on the left: element (row, step) lies at data[row * row_stride + step * step_stride].
struct Left {
    const float *data;
    int64_t row_stride, step_stride;
};

// C (rows x columns vectors) = or += A (rows x depth) times B (depth x columns vectors).
template <int kRows, int kWide>
inline void tile(Left a, const float *b, int64_t b_stride, float *c, int64_t c_stride,
                 int64_t depth, bool add) {
    Vector total[kRows][kWide];
#pragma GCC unroll 8
    for (int row = 0; row < kRows; row++)
#pragma GCC unroll 4
        for (int wide = 0; wide < kWide; wide++)
            total[row][wide] = add ? load(c + row * c_stride + wide * kLanes) : Vector{};
    for (int64_t step = 0; step < depth; step++) {
        Vector right[kWide];
#pragma GCC unroll 4
        for (int wide = 0; wide < kWide; wide++)
            right[wide] = load(b + step * b_stride + wide * kLanes);
#pragma GCC unroll 8
        for (int row = 0; row < kRows; row++) {
            const Vector left = all(a.data[row * a.row_stride + step * a.step_stride]);
#pragma GCC unroll 4
            for (int wide = 0; wide < kWide; wide++) total[row][wide] += left * right[wide];
        }
    }
#pragma GCC unroll 8
    for (int row = 0; row < kRows; row++)
#pragma GCC unroll 4
        for (int wide = 0; wide < kWide; wide++)
            store(c + row * c_stride + wide * kLanes, total[row][wide]);
}

constexpr int rows_of(int wide) {
    return kAccumulators / wide < kMaxRows ? kAccumulators / wide : kMaxRows;
}

template <int kRows, int kWide>
void last_rows(int64_t rows, Left a, const float *b, int64_t b_stride, float *c, int64_t c_stride,
               int64_t depth, bool add) {
    if constexpr (kRows > 0) {
        if (rows == kRows)
            tile<kRows, kWide>(a, b, b_stride, c, c_stride, depth, add);
        else
            last_rows<kRows - 1, kWide>(rows, a, b, b_stride, c, c_stride, depth, add);
    }
}

template <int kWide>
void strip(int64_t rows, Left a, const float *b, int64_t b_stride, float *c, int64_t c_stride,
           int64_t depth, bool add) {
    constexpr int kRows = rows_of(kWide);
    for (; rows >= kRows; rows -= kRows) {
        tile<kRows, kWide>(a, b, b_stride, c, c_stride, depth, add);
        a.data += kRows * a.row_stride;
        c += kRows * c_stride;
    }
    last_rows<kRows - 1, kWide>(rows, a, b, b_stride, c, c_stride, depth, add);
}

// One strip of up to kColumns vectors.
void strip_of(int64_t wide, int64_t rows, Left a, const float *b, int64_t b_stride, float *c,
              int64_t c_stride, int64_t depth, bool add) {
    switch (wide) {
        case 1: return strip<1>(rows, a, b, b_stride, c, c_stride, depth, add);
        case 2: return strip<2>(rows, a, b, b_stride, c, c_stride, depth, add);
#if !defined(__AVX__) || defined(__AVX512F__)
        case 3: return strip<kColumns >= 3 ? 3 : 1>(rows, a, b, b_stride, c, c_stride, depth, add);
        case 4: return strip<kColumns >= 4 ? 4 : 1>(rows, a, b, b_stride, c, c_stride, depth, add);
#endif
    }
}

inline int64_t least(int64_t one, int64_t other) { return one < other ? one : other; }
inline int64_t up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// B has E columns, row after row.
void multiply(int64_t rows, Left a, const float *b, int64_t width, float *c, int64_t depth,
              bool add) {
    for (int64_t first = 0; first < depth; first += kDepth) {
        const int64_t steps = least(kDepth, depth - first);
        const Left part = {a.data + first * a.step_stride, a.row_stride, a.step_stride};
        for (int64_t column = 0; column < width; column += kPanel)
            strip_of(least(kPanel, width - column) / kLanes, rows, part, b + first * width + column,
                     width, c + column, width, steps, add || first);
    }
}

// B is a transposed operand in panels, of `columns` columns (a multiple of kLanes).
void multiply_panels(int64_t rows, Left a, const float *panels, int64_t columns, float *c,
                     int64_t c_stride, int64_t depth) {
    for (int64_t column = 0; column < columns; column += kPanel)
        strip_of(least(kPanel, columns - column) / kLanes, rows, a, panels + column * depth, kPanel,
                 c + column, c_stride, depth, false);
}

// Rows of a strided matrix, times a factor, end to end.
void gather(float *to, const float *from, int64_t stride, int64_t rows, int64_t width,
            float factor) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t at = 0; at < width; at += kLanes)
            store(to + row * width + at, load(from + row * stride + at) * factor);
}

void scatter(float *to, int64_t stride, const float *from, int64_t rows, int64_t width,
             float factor) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t at = 0; at < width; at += kLanes)
            store(to + row * stride + at, load(from + row * width + at) * factor);
}

// The transpose in panels of kPanel rows: element (row, at) lies at
// panel(row) + at * kPanel + row % kPanel. Rows up to the next multiple of kLanes become zero.
void gather_transposed(float *to, const float *from, int64_t stride, int64_t rows, int64_t width) {
    for (int64_t first = 0; first < up(rows, kLanes); first += kLanes) {
        float *block = to + first / kPanel * kPanel * width + first % kPanel;
        const int64_t count = least(kLanes, rows - first);
        for (int64_t at = 0; at < width; at += kLanes) {
            Vector line[kLanes];
            for (int64_t row = 0; row < kLanes; row++)
                line[row] = row < count ? load(from + (first + row) * stride + at) : Vector{};
            const float *numbers = reinterpret_cast<const float *>(line);
            for (int64_t column = 0; column < kLanes; column++) {
                Vector turned;
                for (int64_t row = 0; row < kLanes; row++)
                    turned[row] = numbers[row * kLanes + column];
                store(block + (at + column) * kPanel, turned);
            }
        }
    }
}

struct Matrices {  // of one tensor: (token, head, E), strides in numbers, E without gaps
    const float *data;
    int64_t token, head;
};

struct Job {
    Matrices query, key, value;
    const int32_t *starts;
    int64_t segments, heads, key_heads, width;
    float scale;
};

// Memory that a thread keeps, since fresh pages cost more than what is done in them.
class Scratch {
  public:
    ~Scratch() { free(data_); }
    bool reserve(int64_t numbers) {
        used_ = 0;
        if (numbers <= size_) return true;
        free(data_);
        size_ = 0;
        void *fresh = nullptr;
        if (posix_memalign(&fresh, 64, numbers * sizeof(float))) {
            data_ = nullptr;
            return false;
        }
        data_ = static_cast<float *>(fresh);
        size_ = numbers;
        return true;
    }
    float *take(int64_t numbers) {
        float *part = data_ + used_;
        used_ += up(numbers, 16);
        return part;
    }

  private:
    float *data_ = nullptr;
    int64_t size_ = 0, used_ = 0;
};

thread_local Scratch scratch;

int64_t score_stride(int64_t length) { return up(length, kLanes) + 16; }  // + 16: other cache sets

int64_t block_rows(int64_t length) {
    const int64_t fitting = kScoreBytes / (2 * sizeof(float) * score_stride(length)) / 24 * 24;
    return fitting < 24 ? 24 : least(fitting, 48);
}

int64_t scratch_numbers(int64_t length, int64_t width) {
    const int64_t blocks = block_rows(length) * (2 * score_stride(length) + 3 * width + 32);
    return 5 * up(length, kPanel) * width + blocks + 256;
}

bool forward_item(const Job &job, int64_t segment, int64_t key_head, float *out, float *log_sum) {
    const int64_t start = job.starts[segment], length = job.starts[segment + 1] - start;
    const int64_t width = job.width, group = job.heads / job.key_heads;
    const int64_t tokens = job.starts[job.segments], columns = up(length, kLanes);
    const int64_t stride = score_stride(length), block = block_rows(length);
    if (!scratch.reserve(scratch_numbers(length, width))) return false;
    float *keys = scratch.take(up(length, kPanel) * width);
    float *values = scratch.take(length * width);
    float *queries = scratch.take(block * width), *sums = scratch.take(block * width);
    float *scores = scratch.take(block * stride);
    const Matrices &k = job.key, &v = job.value, &q = job.query;
    gather_transposed(keys, k.data + start * k.token + key_head * k.head, k.token, length, width);
    gather(values, v.data + start * v.token + key_head * v.head, v.token, length, width, 1.0f);
    for (int64_t head = key_head * group; head < (key_head + 1) * group; head++)
        for (int64_t first = 0; first < length; first += block) {
            const int64_t rows = least(block, length - first), token = start + first;
            gather(queries, q.data + token * q.token + head * q.head, q.token, rows, width,
                   job.scale * kLog2e);
            multiply_panels(rows, {queries, width, 1}, keys, columns, scores, stride, width);
            float factors[48];
            for (int64_t row = 0; row < rows; row++) {
                float *score = scores + row * stride;
                for (int64_t at = length; at < columns; at++) score[at] = -INFINITY;
                Vector most = load(score);
                for (int64_t at = kLanes; at < columns; at += kLanes) {
                    const Vector next = load(score + at);
                    most = next > most ? next : most;
                }
                const float top = largest(most);
                Vector total = {};
                for (int64_t at = 0; at < columns; at += kLanes) {
                    const Vector weight = power_of_two(load(score + at) - top);
                    store(score + at, weight);
                    total += weight;
                }
                const float whole = sum(total);
                factors[row] = 1.0f / whole;
                log_sum[head * tokens + token + row] = top + log2f(whole);
            }
            multiply(rows, {scores, stride, 1}, values, width, sums, length, false);
            for (int64_t row = 0; row < rows; row++)
                scatter(out + ((token + row) * job.heads + head) * width, 0, sums + row * width, 1,
                        width, factors[row]);
        }
    return true;
}

struct Gradients {
    const float *out, *log_sum;    // of the forward pass: (T, H, E) and (H, T)
    Matrices d_out;
    float *query, *key, *value;    // (T, H, E), (T, K, E), (T, K, E)
};

bool backward_item(const Job &job, int64_t segment, int64_t key_head, const Gradients &to) {
    const int64_t start = job.starts[segment], length = job.starts[segment + 1] - start;
    const int64_t width = job.width, group = job.heads / job.key_heads;
    const int64_t tokens = job.starts[job.segments], columns = up(length, kLanes);
    const int64_t stride = score_stride(length), block = block_rows(length);
    if (!scratch.reserve(scratch_numbers(length, width))) return false;
    float *keys_turned = scratch.take(up(length, kPanel) * width);
    float *values_turned = scratch.take(up(length, kPanel) * width);
    float *keys = scratch.take(length * width);
    float *d_keys = scratch.take(length * width), *d_values = scratch.take(length * width);
    float *queries = scratch.take(block * width), *d_queries = scratch.take(block * width);
    float *d_outs = scratch.take(block * width);
    float *weights = scratch.take(block * stride), *d_scores = scratch.take(block * stride);
    const Matrices &k = job.key, &v = job.value, &q = job.query, &d = to.d_out;
    const float *key = k.data + start * k.token + key_head * k.head;
    gather_transposed(keys_turned, key, k.token, length, width);
    gather(keys, key, k.token, length, width, 1.0f);
    gather_transposed(values_turned, v.data + start * v.token + key_head * v.head, v.token, length,
                      width);
    bool started = false;
    for (int64_t head = key_head * group; head < (key_head + 1) * group; head++)
        for (int64_t first = 0; first < length; first += block) {
            const int64_t rows = least(block, length - first), token = start + first;
            gather(queries, q.data + token * q.token + head * q.head, q.token, rows, width,
                   job.scale * kLog2e);
            gather(d_outs, d.data + token * d.token + head * d.head, d.token, rows, width, 1.0f);
            multiply_panels(rows, {queries, width, 1}, keys_turned, columns, weights, stride,
                            width);
            multiply_panels(rows, {d_outs, width, 1}, values_turned, columns, d_scores, stride,
                            width);
            for (int64_t row = 0; row < rows; row++) {
                const float *out = to.out + ((token + row) * job.heads + head) * width;
                Vector both = {};
                for (int64_t at = 0; at < width; at += kLanes)
                    both += load(out + at) * load(d_outs + row * width + at);
                const float mean = sum(both), top = to.log_sum[head * tokens + token + row];
                float *weight = weights + row * stride, *d_score = d_scores + row * stride;
                for (int64_t at = 0; at < columns; at += kLanes) {
                    const Vector part = power_of_two(load(weight + at) - top);
                    store(weight + at, part);
                    store(d_score + at, part * (load(d_score + at) - mean));
                }
            }
            multiply(length, {weights, 1, stride}, d_outs, width, d_values, rows, started);
            multiply(length, {d_scores, 1, stride}, queries, width, d_keys, rows, started);
            multiply(rows, {d_scores, stride, 1}, keys, width, d_queries, length, false);
            scatter(to.query + (token * job.heads + head) * width, job.heads * width, d_queries,
                    rows, width, job.scale);
            started = true;
        }
    const int64_t place = (start * job.key_heads + key_head) * width;
    const int64_t apart = job.key_heads * width;
    // The queries carry scale * log2(e) already.
    scatter(to.key + place, apart, d_keys, length, width, kLn2);
    scatter(to.value + place, apart, d_values, length, width, 1.0f);
    return true;
}

}  // namespace

extern "C" {

// Both return 0, or 1 where memory ran out. Strides are those of a token and of a head.

int nvembed_attention_forward(const float *query, const float *key, const float *value,
                              const int64_t *strides, const int32_t *starts, int64_t segments,
                              int64_t heads, int64_t key_heads, int64_t width, float scale,
                              int threads, float *out, float *log_sum) {
    const Job job = {{query, strides[0], strides[1]}, {key, strides[2], strides[3]},
                     {value, strides[4], strides[5]}, starts, segments, heads, key_heads, width,
                     scale};
    int failed = 0;
#pragma omp parallel for schedule(dynamic) num_threads(threads) reduction(| : failed)
    for (int64_t item = 0; item < segments * key_heads; item++)
        failed |= !forward_item(job, item / key_heads, item % key_heads, out, log_sum);
    return failed;
}

int nvembed_attention_backward(const float *query, const float *key, const float *value,
                               const float *d_out, const int64_t *strides, const int32_t *starts,
                               int64_t segments, int64_t heads, int64_t key_heads, int64_t width,
                               float scale, int threads, const float *out, const float *log_sum,
                               float *d_query, float *d_key, float *d_value) {
    const Job job = {{query, strides[0], strides[1]}, {key, strides[2], strides[3]},
                     {value, strides[4], strides[5]}, starts, segments, heads, key_heads, width,
                     scale};
    const Gradients to = {out, log_sum, {d_out, strides[6], strides[7]}, d_query, d_key, d_value};
    int failed = 0;
#pragma omp parallel for schedule(dynamic) num_threads(threads) reduction(| : failed)
    for (int64_t item = 0; item < segments * key_heads; item++)
        failed |= !backward_item(job, item / key_heads, item % key_heads, to);
    return failed;
}

}  // extern "C"
