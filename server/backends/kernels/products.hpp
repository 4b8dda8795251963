// The product that all others are made of: c[rows][stride_c] = or += a[rows][stride_a] panel[depth][WIDTH], for up to 32
// rows. In tiles there are 32 in any case, of both a and c.
//
// A panel is some columns of a matrix, laid out so that it is read from front to back. Every row is computed for itself
// and in one order, so its result does not depend on the rows beside it. A matrix has PARTS numbers for each of its own,
// written by `put`: 16 of a row, whose stride is `row_of`. Queries, keys, values and what attention finds are of type Out.
#pragma once

#include "numbers.hpp"

namespace {

// See `multiply_all`.
constexpr int64_t GROUP = 512, TASKS = 16;

// Memory that is needed next: while something else is computed, a bit of it is fetched into the second cache.
struct Soon {
    const char *at = nullptr, *end = nullptr;
    int64_t lines = 0;  // of the cache, while 32 rows are multiplied by 32 of the depth

    void fetch(int64_t count) {
        for (int64_t i = 0; i < count && at < end; i++, at += LINE) _mm_prefetch(at, _MM_HINT_T1);
    }
};

// In float32: sixteen columns are a vector.
struct Vectors {
    using T = float;
    using Out = float;
    static constexpr int64_t WIDTH = 64, PARTS = 1, DEPTH = 1024;

    struct Use {
        Use() {}
    };

    static __m512 power(__m512 x) { return power_of_two(x, EXACT); }
    static __m512 reciprocal(__m512 x) { return _mm512_div_ps(_mm512_set1_ps(1.f), x); }
    static void put(T* row, int64_t, int64_t column, __m512 x) { store(row + column, x); }

    // A panel's row k, 16 columns from `column` on.
    static void put_row(T* panel, int64_t k, int64_t column, const T* numbers) {
        store(panel + k * WIDTH + column, _mm512_loadu_ps(numbers));
    }

    // A panel's column, 16 numbers from row k on.
    static void put_column(T* panel, int64_t k, int64_t column, const T* numbers) {
        const __m512i rows = _mm512_mullo_epi32(COUNT, _mm512_set1_epi32(WIDTH));
        _mm512_i32scatter_ps(panel + k * WIDTH + column, rows, _mm512_loadu_ps(numbers), 4);
    }

    static void multiply(const T* a, int64_t stride_a, int64_t rows, const T* panel, int64_t depth, float* c,
                         int64_t stride_c, bool more, Soon& soon) {
        constexpr decltype(&multiply_rows<1>) of[] = {multiply_rows<1>, multiply_rows<2>, multiply_rows<3>,
                                                      multiply_rows<4>, multiply_rows<5>, multiply_rows<6>};
        const int64_t times = up(rows, 6) / 6;  // sums of six rows fill the registers
        for (int64_t i = 0; i < times; i++) {
            const int64_t from = rows * i / times, count = rows * (i + 1) / times - from;
            of[count - 1](a + from * stride_a, stride_a, panel, depth, c + from * stride_c, stride_c, more, soon);
        }
    }

   private:
    template <int ROWS>
    static void multiply_rows(const T* a, int64_t stride_a, const T* panel, int64_t depth, float* c, int64_t stride_c,
                              bool more, Soon& soon) {
        constexpr int64_t STEP = 8, PARTS = 32 / STEP * (BLOCK / ROWS);
        const int64_t lines = up(soon.lines, PARTS) / PARTS;
        __m512 sums[ROWS][4] = {};
        for (int64_t from = 0; from < depth; from += STEP) {
            soon.fetch(lines);
            for (int64_t k = from; k < from + STEP; k++) {
                __m512 columns[4];
                for (int j = 0; j < 4; j++) columns[j] = _mm512_loadu_ps(panel + k * WIDTH + 16 * j);
                for (int i = 0; i < ROWS; i++) {
                    const __m512 x = _mm512_set1_ps(a[i * stride_a + k]);
                    for (int j = 0; j < 4; j++) sums[i][j] = _mm512_fmadd_ps(x, columns[j], sums[i][j]);
                }
            }
        }
        for (int i = 0; i < ROWS; i++)
            for (int j = 0; j < 4; j++) {
                float* to = c + i * stride_c + 16 * j;
                // Added at the end: one long chain of sums would lose digits with every key.
                store(to, more ? _mm512_add_ps(_mm512_loadu_ps(to), sums[i][j]) : sums[i][j]);
            }
    }
};

// Tiles 0 to 3 are sums, 4 and 5 rows, 6 and 7 columns.
class TileRegisters {
    struct alignas(LINE) Shapes {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };

   public:
    class Use {  // leaves the thread's tiles in the shapes that others gave them
        Shapes before_;

       public:
        Use() {
            static const Shapes shapes;
            written();
            _tile_storeconfig(&before_);
            _tile_loadconfig(&shapes);
        }
        ~Use() {
            written();
            before_.palette ? _tile_loadconfig(&before_) : _tile_release();
        }
        Use(const Use&) = delete;
    };

   protected:
    static void begin(const float* c, int64_t stride, bool more) {
        written();
        more ? load(c, stride) : zero();
    }

    static void rows(const bf16* a, int64_t stride) {
        _tile_loadd(4, a, 2 * stride);
        _tile_loadd(5, a + 16 * stride, 2 * stride);
    }

    static void columns(const bf16* panel) {
        _tile_loadd(6, panel, LINE);
        _tile_loadd(7, panel + 512, LINE);
    }

    static void multiply_tiles() {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }

    static void keep(float* c, int64_t stride) {
        _tile_stored(0, c, 4 * stride);
        _tile_stored(1, c + 16, 4 * stride);
        _tile_stored(2, c + 16 * stride, 4 * stride);
        _tile_stored(3, c + 16 * stride + 16, 4 * stride);
    }

   private:
    // The compiler's tile instructions do not say that they read memory: what was meant to be there must be there.
    static void written() { asm volatile("" ::: "memory"); }

    static void load(const float* c, int64_t stride) {
        _tile_loadd(0, c, 4 * stride);
        _tile_loadd(1, c + 16, 4 * stride);
        _tile_loadd(2, c + 16 * stride, 4 * stride);
        _tile_loadd(3, c + 16 * stride + 16, 4 * stride);
    }

    static void zero() {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
};

// In bfloat16; two numbers of a column that follow one another stand together.
struct Tiles : TileRegisters {
    using T = bf16;
    using Out = bf16;
    static constexpr int64_t WIDTH = 32, PARTS = 1, DEPTH = 1024;

    static __m512 power(__m512 x) { return power_of_two(x, ROUGH); }
    static __m512 reciprocal(__m512 x) { return _mm512_rcp14_ps(x); }
    static void put(T* row, int64_t, int64_t column, __m512 x) { store(row + column, x); }

    // A panel's row k, 16 columns from `column` on. If k is even, the row after it becomes 0.
    static void put_row(T* panel, int64_t k, int64_t column, const T* numbers) {
        T* line = panel + k / 32 * 1024 + column / 16 * 512 + k % 32 / 2 * 32;
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)numbers));
        const __m512i both = _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_loadu_si512(line), _mm512_slli_epi32(wide, 16));
        _mm512_storeu_si512(line, k % 2 ? both : wide);
    }

    // A panel's column, 16 numbers from row k on, a multiple of 16.
    static void put_column(T* panel, int64_t k, int64_t column, const T* numbers) {
        T* at = panel + k / 32 * 1024 + column / 16 * 512 + k % 32 / 2 * 32 + column % 16 * 2;
        const __m256i lines = _mm256_mullo_epi32(_mm512_castsi512_si256(COUNT), _mm256_set1_epi32(16));
        _mm256_i32scatter_epi32(at, lines, _mm256_loadu_si256((const __m256i*)numbers), 4);
    }

    static void multiply(const T* a, int64_t stride_a, int64_t, const T* panel, int64_t depth, float* c, int64_t stride_c,
                         bool more, Soon& soon) {
        begin(c, stride_c, more);
        for (int64_t k = 0; k < depth; k += 32) {
            rows(a + k, stride_a);
            columns(panel + k * WIDTH);
            soon.fetch(soon.lines);
            multiply_tiles();
        }
        keep(c, stride_c);
    }
};

// In float32 by tiles: a number is the sum of three of bfloat16, each 2^-8 of the one before or less. Of nine products
// the three least are left out, together some 2^-24 of the whole, as much as one rounding of float32. A row has all first
// parts, then all second ones, then all third ones; a panel these of every 32 rows. What is infinite, or rounds to it
// (above 3.39e38), becomes no number; parts below 2^-126 count as 0.
struct SplitTiles : TileRegisters {
    using T = bf16;
    using Out = float;
    static constexpr int64_t WIDTH = 32, PARTS = 3, DEPTH = 512, PART = 32 * WIDTH;

    static __m512 power(__m512 x) { return Vectors::power(x); }
    static __m512 reciprocal(__m512 x) { return Vectors::reciprocal(x); }

    static void put(T* row, int64_t stride, int64_t column, __m512 x) {
        for (T* to = row + column; to < row + stride; to += stride / PARTS) {
            const __m256i part = (__m256i)_mm512_cvtneps_pbh(x);
            _mm256_storeu_si256((__m256i*)to, part);
            x = _mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(part), 16)));
        }
    }

    static void multiply(const T* a, int64_t stride_a, int64_t, const T* panel, int64_t depth, float* c, int64_t stride_c,
                         bool more, Soon& soon) {
        begin(c, stride_c, more);
        const int64_t next = stride_a / PARTS;
        for (int64_t k = 0; k < depth; k += 32) {
            const T *row = a + k, *column = panel + k * WIDTH * PARTS;
            rows(row + 2 * next, stride_a);
            columns(column);
            soon.fetch(soon.lines);
            multiply_tiles();  // third parts of rows, first ones of columns
            rows(row, stride_a);
            multiply_tiles();  // first, first
            columns(column + 2 * PART);
            multiply_tiles();  // first, third
            columns(column + PART);
            multiply_tiles();  // first, second
            rows(row + next, stride_a);
            multiply_tiles();  // second, second
            columns(column);
            multiply_tiles();  // second, first
        }
        keep(c, stride_c);
    }
};

// Rows an odd number of cache lines apart do not meet in one place of the cache.
template <class P>
int64_t row_of(int64_t width) {
    constexpr int64_t line = LINE / sizeof(typename P::T);
    return P::PARTS * (width / line % 2 ? width : width + line);
}

// Panels [columns / WIDTH] times a [rows][stride]. `done(row, column, sums, rows)` takes WIDTH columns of up to 32 rows.
// In tiles `a` has rows up to a multiple of 32; what stands in those that nobody asked for does not matter. A wide `a` is
// taken in parts of DEPTH columns: each stays in the second cache for a group of panels.
//
// Threads take task by task, each as fast as it can, as cores that others use too are not equally fast. A task is a group
// of panels, with some of the rows only where there would be too few tasks.
template <class P, class Done>
void multiply_all(const typename P::T* a, int64_t stride, int64_t rows, const typename P::T* panels, int64_t depth,
                  int64_t columns, const Done& done) {
    constexpr int64_t WIDTH = P::WIDTH;
    const int64_t most = omp_get_max_threads(), wanted = most > 1 ? TASKS * most : 1;
    const bool whole = depth <= 2 * P::DEPTH;
    const int64_t part = whole ? depth : P::DEPTH;
    const int64_t group = whole ? WIDTH : std::min(GROUP, up(up(columns, wanted) / wanted, WIDTH));
    const int64_t groups = up(columns, group) / group, cuts = std::max<int64_t>(1, wanted / groups);
    const int64_t piece = up(up(rows, cuts) / cuts, BLOCK), pieces = up(rows, piece) / piece, tasks = groups * pieces;
    const int threads = static_cast<int>(std::min(most, tasks));
    const Buffer<float> all(threads * piece * group);
    std::atomic<int64_t> taken{0};
#pragma omp parallel num_threads(threads)
    {
        const typename P::Use use;
        float* mine = all.get() + omp_get_thread_num() * piece * group;
        bool reserved;
        for (int64_t task = taken++, next; task < tasks; task = reserved ? next : taken++) {
            // To be fetched ahead, the next task has to be known; near the end it is only guessed, so that none waits.
            next = taken.load(std::memory_order_relaxed);
            reserved = next + threads <= tasks;
            if (reserved) next = taken++;
            const int64_t from = task / pieces * group, to = std::min(from + group, columns);
            const int64_t top = task % pieces * piece, bottom = std::min(top + piece, rows);
            const int64_t blocks = up(bottom - top, BLOCK) / BLOCK;
            for (int64_t k = 0; k < depth; k += part) {
                const int64_t here = std::min(part, depth - k);
                for (int64_t column = from; column < to; column += WIDTH) {
                    // What follows is the group's next panel, else its first one's next part, else the next group.
                    const bool panel = column + WIDTH < to, deeper = k + here < depth;
                    const int64_t then = panel ? column + WIDTH : deeper ? from : next / pieces * group;
                    const int64_t start = panel ? k : deeper ? k + here : 0;
                    Soon soon;
                    if (then < columns) {
                        soon.at = reinterpret_cast<const char*>(panels + (then * depth + start * WIDTH) * P::PARTS);
                        soon.end = soon.at + std::min(part, depth - start) * WIDTH * P::PARTS * sizeof(typename P::T);
                        soon.lines = up(soon.end - soon.at, LINE * blocks * here / 32) / (LINE * blocks * here / 32);
                    }
                    float* sums = mine + (column - from) * blocks * BLOCK;
                    for (int64_t row = top; row < bottom; row += BLOCK, sums += BLOCK * WIDTH) {
                        const int64_t count = std::min(BLOCK, bottom - row);
                        const auto* panel = panels + (column * depth + k * WIDTH) * P::PARTS;
                        P::multiply(a + row * stride + k, stride, count, panel, here, sums, WIDTH, k > 0, soon);
                        if (k + here == depth) done(row, column, sums, count);
                    }
                }
            }
        }
    }
}

}  // namespace
