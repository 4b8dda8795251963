// What a CPU's decoder computes, in float32 with AVX-512 or with the tiles of AMX, and in bfloat16 with tiles.
//
// A plain C interface for `cpu_kernels.py`, which compiles this file: no Python and no torch in here. Matrices are
// row-major; columns of layers are multiples of a panel's, depths of 32, widths of heads of 16. Functions give 0 where
// there was no memory. They use as many threads as torch was told in the calling one: both have one OpenMP.

#include <sys/syscall.h>
#include <unistd.h>

#include "attention.hpp"

namespace {

constexpr int64_t MOST_ROWS = 256;  // that go through a layer at once: a small model's stay in the second cache

struct Linear {  // panels of the weights, [columns] biases
    const void* panels;
    const float* bias;
    int64_t depth, columns;
};

struct Rotation {  // [rows][width] each, see `turned`; of the first `columns` of a row, in heads of `width`
    const float *cos, *sin;
    int64_t width, columns;

    __m512 turn(__m512 x, int64_t row, int64_t column) const {
        const int64_t at = row * width + column % width;
        return turned(x, cos + at, sin + at);
    }
};

// Shares of whole blocks, as equal as can be.
int64_t rows_at_once(int64_t rows) {
    const int64_t shares = std::max<int64_t>(1, up(rows, MOST_ROWS) / MOST_ROWS);
    return up(up(rows, shares) / shares, BLOCK);
}

template <class Run>
int finished(Run run) {
    try {
        run();
        return 1;
    } catch (const std::bad_alloc&) {
        return 0;
    }
}

template <class P, class Done>
void multiply_all(const typename P::T* a, int64_t stride, int64_t rows, const Linear& by, const Done& done) {
    multiply_all<P>(a, stride, rows, static_cast<const typename P::T*>(by.panels), by.depth, by.columns, done);
}

template <class P>
void unit_rows(const float* hidden, int64_t rows, int64_t width, float eps, typename P::T* out, int64_t stride) {
#pragma omp parallel for
    for (int64_t row = 0; row < rows; row++) {
        typename P::T* to = out + row * stride;
        unit_row(hidden + row * width, width, eps, [&](int64_t i, __m512 x) { P::put(to, stride, i, x); });
    }
}

// A norm, then queries, keys and values with their rotation: out [rows][columns] of hidden [rows][depth].
template <class P>
void project(const float* hidden, int64_t rows, float eps, const Linear& qkv, const Rotation& rotation,
             typename P::Out* out) {
    const int64_t stride = row_of<P>(qkv.depth);
    const int64_t step = rows_at_once(rows);
    const Buffer<typename P::T> unit(step * stride);
    for (int64_t from = 0; from < rows; from += step) {
        const int64_t count = std::min(step, rows - from);
        unit_rows<P>(hidden + from * qkv.depth, count, qkv.depth, eps, unit.get(), stride);
        const auto done = [&](int64_t row, int64_t column, const float* sums, int64_t here) {
            for (int64_t i = 0, at = from + row; i < here; i++, at++)
                for (int64_t j = 0; j < P::WIDTH; j += 16) {
                    const int64_t place = column + j;
                    const __m512 sum = _mm512_loadu_ps(sums + i * P::WIDTH + j);
                    const __m512 x = _mm512_add_ps(sum, _mm512_loadu_ps(qkv.bias + place));
                    store(out + at * qkv.columns + place, place < rotation.columns ? rotation.turn(x, at, place) : x);
                }
        };
        multiply_all<P>(unit.get(), stride, count, qkv, done);
    }
}

// hidden += the layer's result
template <class P>
void add(const typename P::T* a, int64_t stride, int64_t rows, const Linear& linear, float* hidden) {
    multiply_all<P>(a, stride, rows, linear, [&](int64_t row, int64_t column, const float* sums, int64_t here) {
        for (int64_t i = 0; i < here; i++)
            for (int64_t j = 0; j < P::WIDTH; j += 16) {
                float* to = hidden + (row + i) * linear.columns + column + j;
                const __m512 sum = _mm512_loadu_ps(sums + i * P::WIDTH + j);
                const __m512 more = _mm512_add_ps(sum, _mm512_loadu_ps(linear.bias + column + j));
                store(to, _mm512_add_ps(_mm512_loadu_ps(to), more));
            }
    });
}

template <class P>
__m512 swish(__m512 x) {
    const __m512 power = P::power(_mm512_mul_ps(x, _mm512_set1_ps(-LOG2_E)));
    return _mm512_mul_ps(x, P::reciprocal(_mm512_add_ps(power, _mm512_set1_ps(1.f))));
}

// Rows that attention found, as products read them: in parts, where they are not yet.
template <class P>
const typename P::T* in_parts(const typename P::Out* x, int64_t& stride, int64_t rows, int64_t width, typename P::T* out) {
    if constexpr (P::PARTS == 1) {
        return x;
    } else {
        const int64_t apart = row_of<P>(width);
#pragma omp parallel for
        for (int64_t row = 0; row < rows; row++)
            for (int64_t i = 0; i < width; i += 16)
                P::put(out + row * apart, apart, i, _mm512_loadu_ps(x + row * stride + i));
        stride = apart;
        return out;
    }
}

// What follows attention: hidden += output; hidden += down(swish(gate) * up) of its norm. attended [rows; in bfloat16 up
// to a multiple of 32][stride]; gate's and up's columns stand by turns in `gated`, 16 and 16.
template <class P>
void finish(const typename P::Out* attended, int64_t stride, float* hidden, int64_t rows, float eps, const Linear& output,
            const Linear& gated, const Linear& down) {
    const int64_t width = gated.depth, unit_apart = row_of<P>(width), product_apart = row_of<P>(down.depth);
    const int64_t step = rows_at_once(rows);
    const Buffer<typename P::T> unit(step * std::max(unit_apart, row_of<P>(output.depth))), product(step * product_apart);
    for (int64_t from = 0; from < rows; from += step) {
        const int64_t count = std::min(step, rows - from);
        float* states = hidden + from * width;
        int64_t apart = stride;
        const auto* found = in_parts<P>(attended + from * stride, apart, count, output.depth, unit.get());
        add<P>(found, apart, count, output, states);
        unit_rows<P>(states, count, width, eps, unit.get(), unit_apart);
        const auto done = [&](int64_t row, int64_t column, const float* sums, int64_t here) {
            for (int64_t j = 0; j < P::WIDTH; j += 32) {
                const __m512 gate_bias = _mm512_loadu_ps(gated.bias + column + j);
                const __m512 up_bias = _mm512_loadu_ps(gated.bias + column + j + 16);
                for (int64_t i = 0; i < here; i++) {
                    const float* sum = sums + i * P::WIDTH + j;
                    const __m512 gate = _mm512_add_ps(_mm512_loadu_ps(sum), gate_bias);
                    const __m512 by = _mm512_add_ps(_mm512_loadu_ps(sum + 16), up_bias);
                    typename P::T* to = product.get() + (row + i) * product_apart;
                    P::put(to, product_apart, (column + j) / 2, _mm512_mul_ps(swish<P>(gate), by));
                }
            }
        };
        multiply_all<P>(unit.get(), unit_apart, count, gated, done);
        add<P>(product.get(), product_apart, count, down, states);
    }
}

}  // namespace

extern "C" {

// Whether this process may use tiles. The system has to be asked once.
int dvpo_allow_tiles() {
    constexpr long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

// Rows of hidden [rows][width] divided by the roots of their mean squares.
int dvpo_unit(const float* hidden, int64_t rows, int64_t width, float eps, float* out) {
    unit_rows<Vectors>(hidden, rows, width, eps, out, width);
    return 1;
}

// The first columns of every row of x, rotated in place.
int dvpo_rotate(float* x, int64_t stride, int64_t rows, const Rotation* rotation) {
#pragma omp parallel for
    for (int64_t row = 0; row < rows; row++)
        for (int64_t column = 0; column < rotation->columns; column += 16) {
            float* at = x + row * stride + column;
            store(at, rotation->turn(_mm512_loadu_ps(at), row, column));
        }
    return 1;
}

int dvpo_attend_float32(const float* query, int64_t stride, const Heads* heads, const Segment* segments, int64_t count,
                        const Piece* pieces, float* out, int64_t stride_out) {
    return finished([&] { attend<Vectors>(query, stride, *heads, segments, count, pieces, out, stride_out); });
}

int dvpo_attend_tiles(const bf16* query, int64_t stride, const Heads* heads, const Segment* segments, int64_t count,
                      const Piece* pieces, bf16* out, int64_t stride_out) {
    return finished([&] { attend<Tiles>(query, stride, *heads, segments, count, pieces, out, stride_out); });
}

int dvpo_project_float32(const float* hidden, int64_t rows, float eps, const Linear* qkv, const Rotation* rotation,
                         float* out) {
    return finished([&] { project<Vectors>(hidden, rows, eps, *qkv, *rotation, out); });
}

int dvpo_project_split(const float* hidden, int64_t rows, float eps, const Linear* qkv, const Rotation* rotation,
                       float* out) {
    return finished([&] { project<SplitTiles>(hidden, rows, eps, *qkv, *rotation, out); });
}

int dvpo_project_tiles(const float* hidden, int64_t rows, float eps, const Linear* qkv, const Rotation* rotation,
                       bf16* out) {
    return finished([&] { project<Tiles>(hidden, rows, eps, *qkv, *rotation, out); });
}

int dvpo_finish_float32(const float* attended, int64_t stride, float* hidden, int64_t rows, float eps,
                        const Linear* output, const Linear* gated, const Linear* down) {
    return finished([&] { finish<Vectors>(attended, stride, hidden, rows, eps, *output, *gated, *down); });
}

int dvpo_finish_split(const float* attended, int64_t stride, float* hidden, int64_t rows, float eps,
                      const Linear* output, const Linear* gated, const Linear* down) {
    return finished([&] { finish<SplitTiles>(attended, stride, hidden, rows, eps, *output, *gated, *down); });
}

int dvpo_finish_tiles(const bf16* attended, int64_t stride, float* hidden, int64_t rows, float eps, const Linear* output,
                      const Linear* gated, const Linear* down) {
    return finished([&] { finish<Tiles>(attended, stride, hidden, rows, eps, *output, *gated, *down); });
}

}  // extern "C"
