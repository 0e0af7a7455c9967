// The passes of kernels/quantize.py over matrices on a CPU, each one loop that a compiler turns into vector
// instructions. Same results to the bit as the passes in plain torch; a NaN stays one.
#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

template <class To, class From> To bits(From value) {
    To result;
    std::memcpy(&result, &value, sizeof result);
    return result;
}

struct BFloat16 {
    uint16_t value;
};

inline float wide(float x) { return x; }
inline float wide(BFloat16 x) { return bits<float>(uint32_t(x.value) << 16); }

inline void narrow(float x, float *out) { *out = x; }
inline void narrow(float x, BFloat16 *out) {
    uint32_t b = bits<uint32_t>(x);
    uint32_t rounded = (b + 0x7FFF + ((b >> 16) & 1)) >> 16;
    out->value = uint16_t(x != x ? 0x7FC0 : rounded);
}

// A float with MANTISSA bits of mantissa and an exponent of bias BIAS, in eight bits.
template <int MANTISSA, int BIAS> struct Format {
    static constexpr int SHIFT = 23 - MANTISSA;
    static constexpr int32_t OFFSET = (127 - BIAS) << MANTISSA;
    static constexpr float LARGEST = MANTISSA == 3 ? 448.0f : 57344.0f;
    static constexpr int32_t LARGEST_CODE = MANTISSA == 3 ? 0x7E : 0x7B;

    static float power(int exponent) { return bits<float>(uint32_t(127 + exponent) << 23); }

    // To nearest, of two the even one, by the bits of a normal number; below those, by adding a number whose unit in
    // the last place is the step of the subnormal ones.
    static uint8_t encode(float y) {
        uint32_t sign = (bits<uint32_t>(y) >> 24) & 0x80;
        float a = bits<float>(bits<uint32_t>(y) & 0x7FFFFFFF);
        a = a > LARGEST ? LARGEST : a;
        int32_t b = bits<int32_t>(a);
        int32_t normal = ((b + ((1 << (SHIFT - 1)) - 1) + ((b >> SHIFT) & 1)) >> SHIFT) - OFFSET;
        const float magic = power(24 - BIAS - MANTISSA);
        int32_t small = bits<int32_t>(a + magic) - bits<int32_t>(magic);
        int32_t code = a < power(1 - BIAS) ? small : normal;
        code = a != a ? 0x7F : code;
        return uint8_t(code | int32_t(sign));
    }

    static float decode(uint8_t code) {
        int32_t magnitude = code & 0x7F;
        float normal = bits<float>((magnitude + OFFSET) << SHIFT);
        float small = float(magnitude) * power(1 - BIAS - MANTISSA);
        float a = magnitude < (1 << MANTISSA) ? small : normal;
        a = magnitude > LARGEST_CODE ? bits<float>(0x7FC00000) : a;
        return bits<float>(bits<uint32_t>(a) | (uint32_t(code & 0x80) << 24));
    }
};

using E4M3 = Format<3, 7>;
using E5M2 = Format<2, 15>;

template <class T> void peaks(const T *x, float *out, int64_t rows, int64_t columns, int64_t tile) {
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t start = 0; start < columns; start += tile) {
            const T *from = x + row * columns + start;
            int64_t width = std::min(tile, columns - start);
            int32_t peak = 0;  // the bits of magnitudes are ordered as they are, with NaN above all
            for (int64_t i = 0; i < width; ++i) {
                int32_t magnitude = bits<int32_t>(wide(from[i])) & 0x7FFFFFFF;
                peak = magnitude > peak ? magnitude : peak;
            }
            *out++ = bits<float>(peak);
        }
}

template <class F, class T>
void encode(const T *x, const float *scales, uint8_t *codes, int64_t rows, int64_t columns, int64_t tile) {
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t start = 0; start < columns; start += tile) {
            int64_t at = row * columns + start, width = std::min(tile, columns - start);
            float scale = *scales++;
            for (int64_t i = 0; i < width; ++i) codes[at + i] = F::encode(wide(x[at + i]) / scale);
        }
}

template <class F, class T>
void decode(const uint8_t *codes, const float *scales, T *out, int64_t rows, int64_t columns, int64_t tile) {
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t start = 0; start < columns; start += tile) {
            int64_t at = row * columns + start, width = std::min(tile, columns - start);
            float scale = *scales++;
            for (int64_t i = 0; i < width; ++i) narrow(F::decode(codes[at + i]) * scale, out + at + i);
        }
}

// Encode and decode with a scale for each column of each group of rows.
template <class F, class T>
void round_columns(const T *x, const float *scales, T *out, const int64_t *ends, int64_t first, int64_t last,
                   int64_t columns) {
    for (int64_t group = first; group < last; ++group)
        for (int64_t row = group ? ends[group - 1] : 0; row < ends[group]; ++row)
            for (int64_t i = 0; i < columns; ++i) {
                float scale = scales[group * columns + i];
                narrow(F::decode(F::encode(wide(x[row * columns + i]) / scale)) * scale, out + row * columns + i);
            }
}

template <class T>
void column_peaks(const T *x, float *out, const int64_t *ends, int64_t first, int64_t last, int64_t columns) {
    for (int64_t group = first; group < last; ++group) {
        int32_t *peak = reinterpret_cast<int32_t *>(out + group * columns);
        std::fill(peak, peak + columns, 0);
        for (int64_t row = group ? ends[group - 1] : 0; row < ends[group]; ++row)
            for (int64_t i = 0; i < columns; ++i) {
                int32_t magnitude = bits<int32_t>(wide(x[row * columns + i])) & 0x7FFFFFFF;
                peak[i] = magnitude > peak[i] ? magnitude : peak[i];
            }
    }
}

}  // namespace

#define EXPORT(T, NAME)                                                                                              \
    extern "C" void peaks_##NAME(const T *x, float *out, int64_t r, int64_t c, int64_t t) { peaks(x, out, r, c, t); } \
    extern "C" void encode_e4m3_##NAME(const T *x, const float *s, uint8_t *q, int64_t r, int64_t c, int64_t t) {     \
        encode<E4M3>(x, s, q, r, c, t);                                                                              \
    }                                                                                                                \
    extern "C" void encode_e5m2_##NAME(const T *x, const float *s, uint8_t *q, int64_t r, int64_t c, int64_t t) {     \
        encode<E5M2>(x, s, q, r, c, t);                                                                              \
    }                                                                                                                \
    extern "C" void decode_e4m3_##NAME(const uint8_t *q, const float *s, T *x, int64_t r, int64_t c, int64_t t) {     \
        decode<E4M3>(q, s, x, r, c, t);                                                                              \
    }                                                                                                                \
    extern "C" void decode_e5m2_##NAME(const uint8_t *q, const float *s, T *x, int64_t r, int64_t c, int64_t t) {     \
        decode<E5M2>(q, s, x, r, c, t);                                                                              \
    }                                                                                                                \
    extern "C" void column_peaks_##NAME(const T *x, float *o, const int64_t *e, int64_t f, int64_t l, int64_t c) {    \
        column_peaks(x, o, e, f, l, c);                                                                              \
    }                                                                                                                \
    extern "C" void round_columns_e4m3_##NAME(const T *x, const float *s, T *o, const int64_t *e, int64_t f,          \
                                              int64_t l, int64_t c) {                                                \
        round_columns<E4M3>(x, s, o, e, f, l, c);                                                                    \
    }                                                                                                                \
    extern "C" void round_columns_e5m2_##NAME(const T *x, const float *s, T *o, const int64_t *e, int64_t f,          \
                                              int64_t l, int64_t c) {                                                \
        round_columns<E5M2>(x, s, o, e, f, l, c);                                                                    \
    }

EXPORT(float, float32)
EXPORT(BFloat16, bfloat16)
