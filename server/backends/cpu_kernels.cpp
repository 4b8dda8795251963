// What a CPU's decoder computes between and in its products, for AVX-512, and for the tiles of AMX in bfloat16.
//
// A plain C interface for `cpu_kernels.py`, which compiles this file: no Python and no torch in here. Matrices are
// row-major. The one product that all is made of is 32 rows times a panel: 32 columns of the other matrix, laid out so
// that it is read from front to back. Every row is computed for itself and in one order, so its result does not depend
// on its neighbours.

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

namespace {

using bf16 = uint16_t;

constexpr int BLOCK = 32;       // rows of a product, and columns of a panel
constexpr int LINE = 64;        // bytes of a cache line
constexpr int MOST_KEYS = 256;  // whose scores are held at once: 32 KB of them
constexpr int MOST_ROWS = 256;  // that go through a layer at once: they stay in the second cache
constexpr int MOST_DEPTH = 2048, PART_DEPTH = 1024, GROUP = 512;  // see `multiply_all`

template <class T>
struct Buffer {  // aligned, and what is read of it must have been written
    struct Free {
        void operator()(T* p) const { std::free(p); }
    };
    std::unique_ptr<T, Free> data;
    explicit Buffer(size_t count)
        : data(static_cast<T*>(std::aligned_alloc(LINE, (count * sizeof(T) + LINE - 1) / LINE * LINE))) {
        if (!data) throw std::bad_alloc();
    }
    T* get() const { return data.get(); }
};

long up(long count, long step) { return (count + step - 1) / step * step; }

// ---- sixteen numbers at once

__mmask16 first(long count) { return static_cast<__mmask16>(count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1); }

const __m512i COUNT = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);

void store(float* p, __m512 x) { _mm512_storeu_ps(p, x); }
void store(bf16* p, __m512 x) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x)); }

// 2^x, and 2^-126 for all below it: the whole part goes to the exponent, for the rest there is a polynomial.
template <size_t N>
__m512 power_of_two(__m512 x, const float (&polynomial)[N]) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-126.f));
    const __m512 rest = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 sum = _mm512_set1_ps(polynomial[0]);
    for (size_t i = 1; i < N; i++) sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(polynomial[i]));
    return _mm512_scalef_ps(sum, x);
}

// 2^x from 0 to 1, fitted for the least relative error: 8e-8, and 3e-6 for what becomes bfloat16.
constexpr float EXACT[] = {2.17022549e-4f, 1.24396884e-3f, 9.67884064e-3f, 5.54833412e-2f,
                           2.4022983e-1f,  6.93147004e-1f, 1.f};
constexpr float ROUGH[] = {1.35341669e-2f, 5.20114601e-2f, 2.41442755e-1f, 6.93003833e-1f, 1.00000262f};
constexpr float LOG2_E = 1.44269504f;

__m512 swish(__m512 x) {  // for bfloat16
    const __m512 power = _mm512_min_ps(_mm512_mul_ps(x, _mm512_set1_ps(-LOG2_E)), _mm512_set1_ps(126.f));
    const __m512 below = _mm512_add_ps(power_of_two(power, ROUGH), _mm512_set1_ps(1.f));
    return _mm512_mul_ps(x, _mm512_rcp14_ps(below));
}

// A row divided by the root of its mean square.
template <class T>
void unit_row(const float* x, long width, float eps, T* out) {
    __m512 sums = _mm512_setzero_ps();
    for (long i = 0; i < width; i += 16) {
        const __m512 v = _mm512_maskz_loadu_ps(first(width - i), x + i);
        sums = _mm512_fmadd_ps(v, v, sums);
    }
    const __m512 scale = _mm512_set1_ps(1.f / std::sqrt(_mm512_reduce_add_ps(sums) / width + eps));
    for (long i = 0; i < width; i += 16) store(out + i, _mm512_mul_ps(_mm512_loadu_ps(x + i), scale));
}

// Pairs of neighbours turned as complex numbers. cos and sin: for each of the 16, sin with the sign that its place asks.
__m512 turned(__m512 x, const float* cos, const float* sin) {
    const __m512 swapped = _mm512_permute_ps(x, 0b10110001);
    return _mm512_fmadd_ps(x, _mm512_loadu_ps(cos), _mm512_mul_ps(swapped, _mm512_loadu_ps(sin)));
}

// ---- the product of up to 32 rows and a panel: c[32][stride_c] = or += a[rows][stride_a] panel[depth][32]

struct Vectors {
    using T = float;

    static __m512 power(__m512 x) { return power_of_two(x, EXACT); }

    // A panel's row k, 16 columns from `column` on: one number each.
    static void put_row(T* panel, long k, long column, const T* numbers) {
        store(panel + k * BLOCK + column, _mm512_loadu_ps(numbers));
    }

    // A panel's column, 16 numbers from row k on.
    static void put_column(T* panel, long k, long column, const T* numbers) {
        const __m512i rows = _mm512_mullo_epi32(COUNT, _mm512_set1_epi32(BLOCK));
        _mm512_i32scatter_ps(panel + k * BLOCK + column, rows, _mm512_loadu_ps(numbers), 4);
    }

    static void multiply(const T* a, long stride_a, int rows, const T* panel, int depth, float* c, long stride_c, bool add) {
        for (int row = 0; row < rows; row += 8) {
            __m512 sums[8][2];
            for (int i = 0; i < 8; i++)
                for (int j = 0; j < 2; j++)
                    sums[i][j] = add ? _mm512_loadu_ps(c + (row + i) * stride_c + 16 * j) : _mm512_setzero_ps();
            for (int k = 0; k < depth; k++) {
                const __m512 left = _mm512_loadu_ps(panel + k * BLOCK), right = _mm512_loadu_ps(panel + k * BLOCK + 16);
                for (int i = 0; i < 8; i++) {
                    const __m512 x = _mm512_set1_ps(a[(row + i) * stride_a + k]);
                    sums[i][0] = _mm512_fmadd_ps(x, left, sums[i][0]);
                    sums[i][1] = _mm512_fmadd_ps(x, right, sums[i][1]);
                }
            }
            for (int i = 0; i < 8; i++)
                for (int j = 0; j < 2; j++) _mm512_storeu_ps(c + (row + i) * stride_c + 16 * j, sums[i][j]);
        }
    }
};

// Tiles 0 to 3 are sums, 4 and 5 rows, 6 and 7 columns; two numbers of a column that follow one another stand together.
struct Tiles {
    using T = bf16;

    static __m512 power(__m512 x) { return power_of_two(x, ROUGH); }

    // A panel's row k, 16 columns from `column` on. If k is even, the row after it becomes 0.
    static void put_row(T* panel, long k, long column, const T* numbers) {
        T* line = panel + k / 32 * 1024 + column / 16 * 512 + k % 32 / 2 * 32;
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)numbers));
        const __m512i both = _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_loadu_si512(line), _mm512_slli_epi32(wide, 16));
        _mm512_storeu_si512(line, k % 2 ? both : wide);
    }

    // A panel's column, 16 numbers from row k on, a multiple of 16.
    static void put_column(T* panel, long k, long column, const T* numbers) {
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
            _tile_storeconfig(&before_);
            static const Shapes shapes;
            _tile_loadconfig(&shapes);
        }
        ~Use() { before_.palette ? _tile_loadconfig(&before_) : _tile_release(); }
    };

    static void multiply(const T* a, long stride_a, int, const T* panel, int depth, float* c, long stride_c, bool add) {
        add ? load(c, stride_c) : zero();
        sum(a, stride_a, panel, depth, nullptr, 0);
        keep(c, stride_c);
    }

    static void load(const float* c, long stride) {
        _tile_loadd(0, c, 4 * stride);
        _tile_loadd(1, c + 16, 4 * stride);
        _tile_loadd(2, c + 16 * stride, 4 * stride);
        _tile_loadd(3, c + 16 * stride + 16, 4 * stride);
    }

    static void keep(float* c, long stride) {
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

    // `ahead`: memory that is soon needed, `lines` cache lines of it for every 32 of the depth.
    static void sum(const T* a, long stride_a, const T* panel, int depth, const char* ahead, int lines) {
        const T* lower = a + 16 * stride_a;
        for (int k = 0; k < depth; k += 32) {
            _tile_loadd(4, a + k, 2 * stride_a);
            _tile_loadd(6, panel + k * BLOCK, LINE);
            _tile_loadd(5, lower + k, 2 * stride_a);
            _tile_loadd(7, panel + k * BLOCK + 512, LINE);
            for (int i = 0; i < lines; i++, ahead += LINE) _mm_prefetch(ahead, _MM_HINT_T1);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }

};

// ---- attention

struct Piece {  // keys and values of some tokens, of all heads; strides in elements
    const void *keys, *values;
    int64_t key_head, key_row, value_head, value_row, length;
    bool operator==(const Piece& o) const { return !std::memcmp(this, &o, sizeof o); }
};

struct Segment {  // rows [start, stop) of the queries, which see the pieces [first, last), the last of which is their own
    int64_t start, stop, first, last;
};

template <class P>
class Attention {
    using T = typename P::T;
    const int width_, whole_;  // of a head, and in whole panels: zeros make up the difference
    const long most_;          // keys of any segment, in whole panels
    Buffer<T> keys_, values_;  // [keys / 32] panels of depth `whole`; [whole / 32] panels of depth `most`
    Buffer<T> query_, shares_;
    Buffer<float> scores_, sums_;

   public:
    Attention(int width, long most)
        : width_(width),
          whole_(static_cast<int>(up(width, BLOCK))),
          most_(up(most, BLOCK)),
          keys_(most_ * whole_),
          values_(most_ * whole_),
          query_(BLOCK * whole_),
          shares_(BLOCK * MOST_KEYS),
          scores_(BLOCK * MOST_KEYS),
          sums_(BLOCK * whole_) {
        std::memset(keys_.get(), 0, most_ * whole_ * sizeof(T));
        std::memset(values_.get(), 0, most_ * whole_ * sizeof(T));
        std::memset(query_.get(), 0, BLOCK * whole_ * sizeof(T));
    }

    // Keys and values of one head of a piece, from a place on.
    void put(const Piece& piece, int head, long at) {
        const T* key = static_cast<const T*>(piece.keys) + head * piece.key_head;
        const T* value = static_cast<const T*>(piece.values) + head * piece.value_head;
        for (long i = 0; i < piece.length; i++, at++, key += piece.key_row, value += piece.value_row) {
            T* panel = keys_.get() + at / BLOCK * BLOCK * whole_;
            for (int d = 0; d < width_; d += 16) {
                P::put_column(panel, d, at % BLOCK, key + d);
                P::put_row(values_.get() + d / BLOCK * BLOCK * most_, at, d % BLOCK, value + d);
            }
        }
    }

    // What stands behind the last key, up to a whole panel, weighs nothing, but must be a number for that.
    void end(long at) {
        const T zeros[16] = {};
        for (; at % BLOCK; at++)
            for (int d = 0; d < width_; d += 16) P::put_row(values_.get() + d / BLOCK * BLOCK * most_, at, d % BLOCK, zeros);
    }

    // One head of up to 32 queries, the first of which sees `seen` keys and each other one more.
    void read(const T* query, long stride, int rows, long seen, float scale, T* out, long stride_out) {
        for (int row = 0; row < rows; row++)
            std::memcpy(query_.get() + row * whole_, query + row * stride, width_ * sizeof(T));
        float top[BLOCK], total[BLOCK];
        std::fill_n(top, BLOCK, -INFINITY);
        std::fill_n(total, BLOCK, 0.f);
        const long all = seen + rows - 1;
        for (long start = 0; start < all; start += MOST_KEYS) {
            const int count = static_cast<int>(up(std::min<long>(all - start, MOST_KEYS), BLOCK));
            for (int k = 0; k < count; k += BLOCK)
                P::multiply(query_.get(), whole_, rows, keys_.get() + (start + k) * whole_, whole_, scores_.get() + k,
                            MOST_KEYS, false);
            for (int row = 0; row < BLOCK; row++) {
                const long here = row < rows ? std::clamp<long>(seen + row - start, 0, count) : 0;
                weigh(row, static_cast<int>(here), count, scale * LOG2_E, start > 0, top[row], total[row]);
            }
            for (int d = 0; d < whole_; d += BLOCK)
                P::multiply(shares_.get(), MOST_KEYS, rows, values_.get() + d * most_ + start * BLOCK, count,
                            sums_.get() + d, whole_, start > 0);
        }
        for (int row = 0; row < rows; row++) {
            const __m512 scaling = _mm512_set1_ps(1.f / total[row]);
            for (int d = 0; d < width_; d += 16)
                store(out + row * stride_out + d, _mm512_mul_ps(_mm512_loadu_ps(sums_.get() + row * whole_ + d), scaling));
        }
    }

   private:
    // A row of scores becomes what each key weighs, beside the highest score so far; earlier sums are brought in line.
    void weigh(int row, int here, int count, float scale, bool earlier, float& top, float& total) {
        const float* scores = scores_.get() + row * MOST_KEYS;
        T* shares = shares_.get() + row * MOST_KEYS;
        __m512 highest = _mm512_set1_ps(-INFINITY), sums = _mm512_setzero_ps();
        for (int k = 0; k < here; k += 16)
            highest = _mm512_mask_max_ps(highest, first(here - k), highest, _mm512_loadu_ps(scores + k));
        const float now = here ? std::max(top, scale * _mm512_reduce_max_ps(highest)) : top;
        const __m512 scaling = _mm512_set1_ps(scale), shift = _mm512_set1_ps(now);
        int k = 0;
        for (; k < here; k += 16) {
            const __m512 weight = P::power(_mm512_fmsub_ps(_mm512_loadu_ps(scores + k), scaling, shift));
            const __m512 seen = _mm512_maskz_mov_ps(first(here - k), weight);
            sums = _mm512_add_ps(sums, seen);
            store(shares + k, seen);
        }
        for (; k < count; k += 16) store(shares + k, _mm512_setzero_ps());
        if (earlier && now > top) {
            const float factor = std::exp2(top - now);
            total *= factor;
            for (int d = 0; d < width_; d += 16) {
                float* sum = sums_.get() + row * whole_ + d;
                store(sum, _mm512_mul_ps(_mm512_loadu_ps(sum), _mm512_set1_ps(factor)));
            }
        }
        top = now;
        total += _mm512_reduce_add_ps(sums);
    }
};

template <class P>
void attend(const typename P::T* query, int64_t stride, int heads, int key_heads, int width, float scale,
            const Segment* segments, int count, const Piece* pieces, typename P::T* out, int64_t stride_out) {
    const auto keys_of = [&](const Segment& s) {
        long sum = 0;
        for (long i = s.first; i < s.last; i++) sum += pieces[i].length;
        return sum;
    };
    long most = 0;
    for (int s = 0; s < count; s++) most = std::max(most, keys_of(segments[s]));
    Attention<P> attention(width, most);
    for (int head = 0; head < key_heads; head++) {
        const Segment* before = nullptr;
        for (const Segment* segment = segments; segment != segments + count; before = segment++) {
            long at = 0, i = segment->first;
            // What the segment before saw too, as a prompt is seen by all its responses, stands there already.
            for (long j = before ? before->first : 0; before && i < segment->last && j < before->last; i++, j++) {
                if (!(pieces[i] == pieces[j])) break;
                at += pieces[i].length;
            }
            for (; i < segment->last; at += pieces[i++].length) attention.put(pieces[i], head, at);
            attention.end(at);
            const long tokens = segment->stop - segment->start;
            for (int of = head * heads / key_heads; of < (head + 1) * heads / key_heads; of++)
                for (long token = 0; token < tokens; token += BLOCK) {
                    const long row = segment->start + token;
                    attention.read(query + row * stride + of * width, stride,
                                   static_cast<int>(std::min<long>(BLOCK, tokens - token)), at - tokens + token + 1, scale,
                                   out + row * stride_out + of * width, stride_out);
                }
        }
    }
}

// ---- a layer's products in tiles

// `done(row, column, sums, rows)` takes 32 columns of up to 32 rows. Rows of `a` are there up to a multiple of 32.
// A wide `a` is taken in parts of its columns, each of which stays in the second cache for a group of panels.
template <class Done>
void multiply_all(const bf16* a, long stride, long rows, const bf16* panels, int depth, int columns, Done done) {
    const long blocks = (rows + BLOCK - 1) / BLOCK;
    const bool whole = depth <= MOST_DEPTH;
    const int part = whole ? depth : PART_DEPTH, group = whole ? BLOCK : GROUP;
    const Buffer<float> all(blocks * group * BLOCK);
    // The next panel is fetched while this one is used.
    const int lines = static_cast<int>((BLOCK + blocks - 1) / blocks);
    for (int from = 0; from < columns; from += group)
        for (int k = 0; k < depth; k += part) {
            const int here = std::min(part, depth - k);
            for (int column = from; column < std::min(from + group, columns); column += BLOCK) {
                const bf16* panel = panels + static_cast<long>(column) * depth + k * BLOCK;
                const char* next = reinterpret_cast<const char*>(panel + static_cast<long>(BLOCK) * depth);
                float* sums = all.get() + (column - from) * blocks * BLOCK;
                for (long row = 0; row < rows; row += BLOCK, sums += BLOCK * BLOCK) {
                    k ? Tiles::load(sums, BLOCK) : Tiles::zero();
                    Tiles::sum(a + row * stride + k, stride, panel, here, next, lines);
                    next += static_cast<long>(here) / 32 * lines * LINE;
                    Tiles::keep(sums, BLOCK);
                    if (k + here == depth) done(row, column, sums, static_cast<int>(std::min<long>(BLOCK, rows - row)));
                }
            }
        }
}

// Rows an odd number of cache lines apart do not meet in one place of the cache.
long apart(long width) { return width / 32 % 2 ? width : width + 32; }

void unit_rows(const float* hidden, long rows, int width, float eps, bf16* out) {
    for (long row = 0; row < up(rows, BLOCK); row++)
        if (row < rows)
            unit_row(hidden + row * width, width, eps, out + row * apart(width));
        else
            std::memset(out + row * apart(width), 0, width * sizeof(bf16));
}

// hidden += a panels + bias
void add_product(const bf16* a, long stride, long rows, const bf16* panels, const float* bias, int depth, int width,
                 float* hidden) {
    multiply_all(a, stride, rows, panels, depth, width, [&](long row, int column, const float* sums, int count) {
        for (int i = 0; i < count; i++)
            for (int j = 0; j < BLOCK; j += 16) {
                float* to = hidden + (row + i) * width + column + j;
                const __m512 more = _mm512_add_ps(_mm512_load_ps(sums + i * BLOCK + j), _mm512_loadu_ps(bias + column + j));
                store(to, _mm512_add_ps(_mm512_loadu_ps(to), more));
            }
    });
}

}  // namespace

extern "C" {

// Whether this process may use tiles. The system has to be asked once.
int dvpo_allow_tiles() {
    constexpr long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

// Rows of hidden [rows][width] divided by the roots of their mean squares.
void dvpo_unit(const float* hidden, int64_t rows, int64_t width, float eps, float* out) {
    for (int64_t row = 0; row < rows; row++) unit_row(hidden + row * width, width, eps, out + row * width);
}

// The first `columns` of every row of x are rotated in place. cos, sin [rows][width], see `turned`; `width` of a head.
void dvpo_rotate(float* x, int64_t stride, int64_t rows, int64_t columns, int64_t width, const float* cos,
                 const float* sin) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t column = 0; column < columns; column += 16) {
            float* at = x + row * stride + column;
            const int64_t place = row * width + column % width;
            store(at, turned(_mm512_loadu_ps(at), cos + place, sin + place));
        }
}

void dvpo_attend_float32(const float* query, int64_t stride, int heads, int key_heads, int width, float scale,
                         const Segment* segments, int count, const Piece* pieces, float* out, int64_t stride_out) {
    attend<Vectors>(query, stride, heads, key_heads, width, scale, segments, count, pieces, out, stride_out);
}

void dvpo_attend_tiles(const bf16* query, int64_t stride, int heads, int key_heads, int width, float scale,
                       const Segment* segments, int count, const Piece* pieces, bf16* out, int64_t stride_out) {
    const Tiles::Use use;
    attend<Tiles>(query, stride, heads, key_heads, width, scale, segments, count, pieces, out, stride_out);
}

// Norm, then queries, keys and values with their rotation: out [rows][columns] of hidden [rows][width].
void dvpo_project_tiles(const float* hidden, int64_t rows, int width, float eps, const bf16* panels, const float* bias,
                        int columns, int turning, int head, const float* cos, const float* sin, bf16* out) {
    const Tiles::Use use;
    const Buffer<bf16> unit(MOST_ROWS * apart(width));
    for (int64_t from = 0; from < rows; from += MOST_ROWS) {
        const int64_t count = std::min<int64_t>(MOST_ROWS, rows - from);
        unit_rows(hidden + from * width, count, width, eps, unit.get());
        multiply_all(unit.get(), apart(width), count, panels, width, columns,
                     [&](long row, int column, const float* sums, int here) {
                         for (int i = 0; i < here; i++)
                             for (int j = 0; j < BLOCK; j += 16) {
                                 const int64_t at = from + row + i;
                                 const int place = column + j;
                                 __m512 x = _mm512_add_ps(_mm512_load_ps(sums + i * BLOCK + j), _mm512_loadu_ps(bias + place));
                                 if (place < turning)
                                     x = turned(x, cos + at * head + place % head, sin + at * head + place % head);
                                 store(out + at * columns + place, x);
                             }
                     });
    }
}

// What follows attention: hidden [rows][width] += output; hidden += down(swish(gate) * up) of its norm.
// attended [rows up to a multiple of 32][stride]; gate's and up's columns stand by turns, 16 and 16.
void dvpo_finish_tiles(const bf16* attended, int64_t stride, int depth, float* hidden, int64_t rows, int width, float eps,
                       const bf16* output, const float* output_bias, const bf16* gated, const float* gated_bias, int inner,
                       const bf16* down, const float* down_bias) {
    const Tiles::Use use;
    const Buffer<bf16> unit(MOST_ROWS * apart(width)), product(MOST_ROWS * apart(inner));
    for (int64_t from = 0; from < rows; from += MOST_ROWS) {
        const int64_t count = std::min<int64_t>(MOST_ROWS, rows - from);
        float* here = hidden + from * width;
        add_product(attended + from * stride, stride, count, output, output_bias, depth, width, here);
        unit_rows(here, count, width, eps, unit.get());
        multiply_all(unit.get(), apart(width), count, gated, width, 2 * inner,
                     [&](long row, int column, const float* sums, int) {
                         for (int i = 0; i < BLOCK; i++) {
                             const float *sum = sums + i * BLOCK, *bias = gated_bias + column;
                             const __m512 gate = _mm512_add_ps(_mm512_load_ps(sum), _mm512_loadu_ps(bias));
                             const __m512 by = _mm512_add_ps(_mm512_load_ps(sum + 16), _mm512_loadu_ps(bias + 16));
                             store(product.get() + (row + i) * apart(inner) + column / 2, _mm512_mul_ps(swish(gate), by));
                         }
                     });
        add_product(product.get(), apart(inner), count, down, down_bias, inner, width, here);
    }
}

}  // extern "C"
