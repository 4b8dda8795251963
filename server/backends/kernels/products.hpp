// The product that all others are made of: c[32][stride_c] = or += a[rows][stride_a] panel[depth][32].
//
// A panel is 32 columns of a matrix, laid out so that it is read from front to back. Every row is computed for itself and
// in one order, so its result does not depend on the rows beside it.
#pragma once

#include "numbers.hpp"

namespace {

constexpr int64_t WHOLE = 2048, PART = 1024, GROUP = 512;  // see `multiply_all`

// In float32: sixteen columns are a vector.
struct Vectors {
    using T = float;

    struct Use {
        Use() {}
    };

    static __m512 power(__m512 x) { return power_of_two(x, EXACT); }

    // A panel's row k, 16 columns from `column` on: one number each.
    static void put_row(T* panel, int64_t k, int64_t column, const T* numbers) {
        store(panel + k * BLOCK + column, _mm512_loadu_ps(numbers));
    }

    // A panel's column, 16 numbers from row k on.
    static void put_column(T* panel, int64_t k, int64_t column, const T* numbers) {
        const __m512i rows = _mm512_mullo_epi32(COUNT, _mm512_set1_epi32(BLOCK));
        _mm512_i32scatter_ps(panel + k * BLOCK + column, rows, _mm512_loadu_ps(numbers), 4);
    }

    static void multiply(const T* a, int64_t stride_a, int64_t rows, const T* panel, int64_t depth, float* c,
                         int64_t stride_c, bool more) {
        for (int64_t row = 0; row < rows; row += 8, a += 8 * stride_a, c += 8 * stride_c) {
            __m512 sums[8][2] = {};
            for (int64_t k = 0; k < depth; k++) {
                const __m512 left = _mm512_loadu_ps(panel + k * BLOCK), right = _mm512_loadu_ps(panel + k * BLOCK + 16);
                for (int i = 0; i < 8; i++) {
                    const __m512 x = _mm512_set1_ps(a[i * stride_a + k]);
                    sums[i][0] = _mm512_fmadd_ps(x, left, sums[i][0]);
                    sums[i][1] = _mm512_fmadd_ps(x, right, sums[i][1]);
                }
            }
            for (int i = 0; i < 8; i++)
                for (int j = 0; j < 2; j++) {
                    float* to = c + i * stride_c + 16 * j;
                    // Added at the end: one long chain of sums would lose digits with every key.
                    store(to, more ? _mm512_add_ps(_mm512_loadu_ps(to), sums[i][j]) : sums[i][j]);
                }
        }
    }
};

// Tiles 0 to 3 are sums, 4 and 5 rows, 6 and 7 columns; two numbers of a column that follow one another stand together.
struct Tiles {
    using T = bf16;

    static __m512 power(__m512 x) { return power_of_two(x, ROUGH); }

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

    struct alignas(LINE) Shapes {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };

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

    // `ahead`: memory that is soon needed, `lines` cache lines of it for every 32 of the depth.
    static void multiply(const T* a, int64_t stride_a, int64_t, const T* panel, int64_t depth, float* c, int64_t stride_c,
                         bool more, const char* ahead = nullptr, int64_t lines = 0) {
        written();
        more ? load(c, stride_c) : zero();
        const T* lower = a + 16 * stride_a;
        for (int64_t k = 0; k < depth; k += 32) {
            _tile_loadd(4, a + k, 2 * stride_a);
            _tile_loadd(6, panel + k * BLOCK, LINE);
            _tile_loadd(5, lower + k, 2 * stride_a);
            _tile_loadd(7, panel + k * BLOCK + 512, LINE);
            for (int64_t i = 0; i < lines; i++, ahead += LINE) _mm_prefetch(ahead, _MM_HINT_T1);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        keep(c, stride_c);
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

    static void keep(float* c, int64_t stride) {
        _tile_stored(0, c, 4 * stride);
        _tile_stored(1, c + 16, 4 * stride);
        _tile_stored(2, c + 16 * stride, 4 * stride);
        _tile_stored(3, c + 16 * stride + 16, 4 * stride);
    }

    static void zero() {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
};

// Rows an odd number of cache lines apart do not meet in one place of the cache.
int64_t apart(int64_t width) { return width / 32 % 2 ? width : width + 32; }

// Panels [columns / 32] times a [rows][stride]. `done(row, column, sums, rows)` takes 32 columns of up to 32 rows. `a` has
// rows up to a multiple of 32; what stands in those that nobody asked for does not matter. A wide `a` is taken in parts of
// its columns: each stays in the second cache for a group of panels.
template <class Done>
void multiply_all(const bf16* a, int64_t stride, int64_t rows, const bf16* panels, int64_t depth, int64_t columns,
                  const Done& done) {
    const int64_t blocks = up(rows, BLOCK) / BLOCK;
    const bool whole = depth <= WHOLE;
    const int64_t part = whole ? depth : PART, group = whole ? BLOCK : GROUP;
    const int threads = static_cast<int>(std::min<int64_t>(omp_get_max_threads(), up(columns, group) / group));
    const int64_t held = blocks * group * BLOCK;
    const Buffer<float> all(threads * held);
    // The next panel is fetched while this one is used: so many cache lines for every block and 32 of the depth.
    const int64_t lines = up(BLOCK, blocks) / blocks;
#pragma omp parallel num_threads(threads)
    {
        const Tiles::Use use;
        float* mine = all.get() + omp_get_thread_num() * held;
#pragma omp for schedule(static)
        for (int64_t from = 0; from < columns; from += group)
            for (int64_t k = 0; k < depth; k += part) {
                const int64_t here = std::min(part, depth - k);
                for (int64_t column = from; column < std::min(from + group, columns); column += BLOCK) {
                    const bf16* panel = panels + column * depth + k * BLOCK;
                    const char* next = reinterpret_cast<const char*>(panel + BLOCK * depth);
                    float* sums = mine + (column - from) * blocks * BLOCK;
                    for (int64_t row = 0; row < rows; row += BLOCK, sums += BLOCK * BLOCK) {
                        const int64_t count = std::min(BLOCK, rows - row);
                        Tiles::multiply(a + row * stride + k, stride, count, panel, here, sums, BLOCK, k > 0, next, lines);
                        next += here / 32 * lines * LINE;
                        if (k + here == depth) done(row, column, sums, count);
                    }
                }
            }
    }
}

}  // namespace
