// Sixteen float32 at once, memory, and what is done to single rows.
#pragma once

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace {

using bf16 = uint16_t;

constexpr int64_t BLOCK = 32;  // rows of a product
constexpr int LINE = 64;       // bytes of a cache line

template <class T>
struct Buffer {  // aligned, uninitialised
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

int64_t up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

// The first so many of sixteen.
__mmask16 first(int64_t count) { return static_cast<__mmask16>(count >= 16 ? 0xffff : (1u << count) - 1); }

const __m512i COUNT = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);

void store(float* p, __m512 x) { _mm512_storeu_ps(p, x); }
void store(bf16* p, __m512 x) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x)); }

// 2^x, and 2^-126 for all below it; what is no number stays none. The whole part goes to the exponent, for the rest there is a polynomial.
template <size_t N>
__m512 power_of_two(__m512 x, const float (&polynomial)[N]) {
    x = _mm512_max_ps(_mm512_set1_ps(-126.f), x);  // the second, if either is no number
    const __m512 rest = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 sum = _mm512_set1_ps(polynomial[0]);
    for (size_t i = 1; i < N; i++) sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(polynomial[i]));
    return _mm512_scalef_ps(sum, x);
}

// 2^x for x from 0 to 1, fitted for the least relative error: 8e-8, and 3e-6 for what becomes bfloat16.
constexpr float EXACT[] = {2.17022549e-4f, 1.24396884e-3f, 9.67884064e-3f, 5.54833412e-2f,
                           2.4022983e-1f,  6.93147004e-1f, 1.f};
constexpr float ROUGH[] = {1.35341669e-2f, 5.20114601e-2f, 2.41442755e-1f, 6.93003833e-1f, 1.00000262f};
constexpr float LOG2_E = 1.44269504f;

// A row divided by the root of its mean square, 16 numbers at a time: `put(i, x)`. Its width is a multiple of 16.
template <class Put>
void unit_row(const float* x, int64_t width, float eps, const Put& put) {
    __m512 sums = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += 16) {
        const __m512 v = _mm512_loadu_ps(x + i);
        sums = _mm512_fmadd_ps(v, v, sums);
    }
    const __m512 scale = _mm512_set1_ps(1.f / std::sqrt(_mm512_reduce_add_ps(sums) / width + eps));
    for (int64_t i = 0; i < width; i += 16) put(i, _mm512_mul_ps(_mm512_loadu_ps(x + i), scale));
}

// Pairs of neighbours turned as complex numbers. cos and sin: for each of the 16, sin with the sign that its place asks.
__m512 turned(__m512 x, const float* cos, const float* sin) {
    const __m512 swapped = _mm512_permute_ps(x, 0b10110001);
    return _mm512_fmadd_ps(x, _mm512_loadu_ps(cos), _mm512_mul_ps(swapped, _mm512_loadu_ps(sin)));
}

}  // namespace
