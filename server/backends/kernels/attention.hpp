// Attention of texts that stand in one row, some of which follow a prompt that stands elsewhere.
#pragma once

#include <vector>

#include "products.hpp"

namespace {

constexpr int MOST_KEYS = 256;  // whose scores are held at once: 32 KB of them

struct Heads {  // a row has the queries' heads, then the keys', then the values'
    int64_t queries, keys, width;
    float scale;
};

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
    const int64_t width_, whole_;  // of a head, and in whole panels: zeros make up the difference
    const int64_t most_;           // keys of any segment, in whole panels
    const float scale_;            // of scores, as powers of two are taken of them
    Buffer<T> keys_, values_;  // panels of keys, of depth `whole`; of columns, of depth `most`
    Buffer<T> query_, shares_;
    Buffer<float> scores_, sums_;
    Soon nothing_;

   public:
    Attention(const Heads& heads, int64_t most)
        : width_(heads.width),
          whole_(up(heads.width, P::WIDTH)),
          most_(up(most, P::WIDTH)),
          scale_(heads.scale * LOG2_E),
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
    void put(const Piece& piece, int64_t head, int64_t at) {
        const T* key = static_cast<const T*>(piece.keys) + head * piece.key_head;
        const T* value = static_cast<const T*>(piece.values) + head * piece.value_head;
        for (int64_t i = 0; i < piece.length; i++, at++, key += piece.key_row, value += piece.value_row) {
            T* panel = keys_.get() + at / P::WIDTH * P::WIDTH * whole_;
            for (int64_t d = 0; d < width_; d += 16) {
                P::put_column(panel, d, at % P::WIDTH, key + d);
                P::put_row(value_at(d), at, d % P::WIDTH, value + d);
            }
        }
    }

    // What stands behind the last key, up to a whole panel, weighs nothing, but must be a number for that.
    void end(int64_t at) {
        const T zeros[16] = {};
        for (; at % P::WIDTH; at++)
            for (int64_t d = 0; d < width_; d += 16) P::put_row(value_at(d), at, d % P::WIDTH, zeros);
    }

    // One head of up to 32 queries, the first of which sees `seen` keys and each other one more.
    void read(const T* query, int64_t stride, int64_t rows, int64_t seen, T* out, int64_t stride_out) {
        for (int64_t row = 0; row < rows; row++)
            std::memcpy(query_.get() + row * whole_, query + row * stride, width_ * sizeof(T));
        float top[BLOCK], total[BLOCK];
        std::fill_n(top, BLOCK, -INFINITY);
        std::fill_n(total, BLOCK, 0.f);
        const int64_t all = seen + rows - 1;
        for (int64_t start = 0; start < all; start += MOST_KEYS) {
            const int64_t count = up(std::min<int64_t>(all - start, MOST_KEYS), BLOCK);
            for (int64_t k = 0; k < count; k += P::WIDTH)
                P::multiply(query_.get(), whole_, rows, keys_.get() + (start + k) * whole_, whole_, scores_.get() + k,
                            MOST_KEYS, false, nothing_);
            for (int row = 0; row < BLOCK; row++) {
                const int64_t here = row < rows ? std::clamp<int64_t>(seen + row - start, 0, count) : 0;
                weigh(row, here, count, start > 0, top[row], total[row]);
            }
            for (int64_t d = 0; d < whole_; d += P::WIDTH)
                P::multiply(shares_.get(), MOST_KEYS, rows, value_at(d) + start * P::WIDTH, count,
                            sums_.get() + d, whole_, start > 0, nothing_);
        }
        for (int64_t row = 0; row < rows; row++) {
            const __m512 scaling = _mm512_set1_ps(1.f / total[row]);
            for (int64_t d = 0; d < width_; d += 16)
                store(out + row * stride_out + d, _mm512_mul_ps(_mm512_loadu_ps(sums_.get() + row * whole_ + d), scaling));
        }
    }

   private:
    T* value_at(int64_t d) const { return values_.get() + d / P::WIDTH * P::WIDTH * most_; }

    // A row of scores becomes what each key weighs, beside the highest score so far; earlier sums are brought in line.
    void weigh(int64_t row, int64_t here, int64_t count, bool earlier, float& top, float& total) {
        const float* scores = scores_.get() + row * MOST_KEYS;
        T* shares = shares_.get() + row * MOST_KEYS;
        __m512 highest = _mm512_set1_ps(-INFINITY), sums = _mm512_setzero_ps();
        for (int64_t k = 0; k < here; k += 16)
            highest = _mm512_mask_max_ps(highest, first(here - k), highest, _mm512_loadu_ps(scores + k));
        const float now = here ? std::max(top, scale_ * _mm512_reduce_max_ps(highest)) : top;
        const __m512 scaling = _mm512_set1_ps(scale_), shift = _mm512_set1_ps(now);
        int64_t k = 0;
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
            for (int64_t d = 0; d < width_; d += 16) {
                float* sum = sums_.get() + row * whole_ + d;
                store(sum, _mm512_mul_ps(_mm512_loadu_ps(sum), _mm512_set1_ps(factor)));
            }
        }
        top = now;
        total += _mm512_reduce_add_ps(sums);
    }
};

// query: rows of queries, `stride` apart; out likewise, of the rows that belong to segments.
template <class P>
void attend(const typename P::T* query, int64_t stride, const Heads& heads, const Segment* segments, int64_t count,
            const Piece* pieces, typename P::T* out, int64_t stride_out) {
    const auto keys_of = [&](const Segment& segment) {
        int64_t sum = 0;
        for (int64_t i = segment.first; i < segment.last; i++) sum += pieces[i].length;
        return sum;
    };
    int64_t most = 0;
    for (int64_t i = 0; i < count; i++) most = std::max(most, keys_of(segments[i]));
    const int64_t sharing = heads.queries / heads.keys;
    const int64_t tasks = heads.queries * count;
    const int threads = static_cast<int>(std::clamp<int64_t>(tasks, 1, omp_get_max_threads()));
    std::vector<Attention<P>> each;
    for (int i = 0; i < threads; i++) each.emplace_back(heads, most);
    std::atomic<int64_t> taken{0};
#pragma omp parallel num_threads(threads)
    {
        const typename P::Use use;
        Attention<P>& attention = each[omp_get_thread_num()];
        const Segment* before = nullptr;  // whose keys and values stand there
        int64_t its = 0;                  // and of which head
        for (int64_t task; (task = taken++) < tasks;) {
            const int64_t head = task / (sharing * count), of = head * sharing + task % sharing;
            const Segment* segment = segments + task / sharing % count;
            if (head != its) before = nullptr;
            int64_t at = 0, i = segment->first;
            // What the one before saw too, as a prompt is seen by all its responses, stands there already.
            for (int64_t j = before ? before->first : 0; before && i < segment->last && j < before->last; i++, j++) {
                if (!(pieces[i] == pieces[j])) break;
                at += pieces[i].length;
            }
            for (; i < segment->last; at += pieces[i++].length) attention.put(pieces[i], head, at);
            attention.end(at);
            before = segment, its = head;
            const int64_t tokens = segment->stop - segment->start;
            for (int64_t token = 0; token < tokens; token += BLOCK) {
                const int64_t row = segment->start + token, rows = std::min<int64_t>(BLOCK, tokens - token);
                attention.read(query + row * stride + of * heads.width, stride, rows, at - tokens + token + 1,
                               out + row * stride_out + of * heads.width, stride_out);
            }
        }
    }
}

}  // namespace
