// Sixteen floats as one value, in the widest registers that the including file is compiled for.
//
// Every file that includes this gets its own copy (internal linkage), as the same function compiled
// for another instruction set must never stand in for it; so such files use no templates of the
// standard library. A lane's result is the same with AVX2 as with AVX-512; without a fused
// multiply-add in hardware `fma` rounds twice.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace expertfleet {
namespace {

constexpr int64_t kLanes = 16;

inline float from_bf16(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// To nearest, ties to even; a NaN stays one.
inline uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#if defined(__AVX512F__)

struct Lanes {
  __m512 v;
};

inline Lanes broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Lanes a) { _mm512_storeu_ps(p, a.v); }
inline Lanes add(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Lanes sub(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Lanes max(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }

// A product that the compiler may not fuse with an addition.
inline Lanes mul(Lanes a, Lanes b) {
  __m512 product = _mm512_mul_ps(a.v, b.v);
  asm("" : "+v"(product));
  return {product};
}

// Lanes whose bit in `mask` is set; the others are `other`.
inline Lanes select(uint32_t mask, Lanes a, Lanes other) {
  return {_mm512_mask_mov_ps(other.v, static_cast<__mmask16>(mask), a.v)};
}

// a where x >= bound or x is NaN, else 0.
inline Lanes zero_below(Lanes a, Lanes x, Lanes bound) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, bound.v, _CMP_NLT_UQ), a.v)};
}

inline Lanes round_to_integer(Lanes a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

// a * 2^n for whole n in [-126, 127].
inline Lanes scale_by_power(Lanes a, Lanes n) {
  const __m512i exponent = _mm512_slli_epi32(_mm512_cvtps_epi32(n.v), 23);
  const __m512i power = _mm512_add_epi32(exponent, _mm512_set1_epi32(0x3f800000));
  return {_mm512_mul_ps(a.v, _mm512_castsi512_ps(power))};
}

inline Lanes load_bf16(const uint16_t* p) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16))};
}

inline void store_bf16(uint16_t* p, Lanes a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  const __m256i halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves);
}

inline __m256 fold(Lanes a, bool upper) {
  return upper ? _mm512_extractf32x8_ps(a.v, 1) : _mm512_castps512_ps256(a.v);
}

inline void transpose(Lanes rows[kLanes]) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
    a[i + 1] = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm512_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm512_shuffle_f32x4(b[i], b[i + 4], 0x88);
    a[i + 4] = _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd);
    a[i + 8] = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0x88);
    a[i + 12] = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i].v = _mm512_shuffle_f32x4(a[i], a[i + 8], 0x88);
    rows[i + 4].v = _mm512_shuffle_f32x4(a[i + 4], a[i + 12], 0x88);
    rows[i + 8].v = _mm512_shuffle_f32x4(a[i], a[i + 8], 0xdd);
    rows[i + 12].v = _mm512_shuffle_f32x4(a[i + 4], a[i + 12], 0xdd);
  }
}

#elif defined(__AVX2__)

struct Lanes {
  __m256 lo, hi;
};

inline Lanes broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Lanes load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Lanes a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
inline Lanes add(Lanes a, Lanes b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
inline Lanes sub(Lanes a, Lanes b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
inline Lanes fma(Lanes a, Lanes b, Lanes c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline Lanes max(Lanes a, Lanes b) {
  return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
}

// A product that the compiler may not fuse with an addition.
inline Lanes mul(Lanes a, Lanes b) {
  __m256 lo = _mm256_mul_ps(a.lo, b.lo), hi = _mm256_mul_ps(a.hi, b.hi);
  asm("" : "+x"(lo), "+x"(hi));
  return {lo, hi};
}

inline __m256 half_mask(uint32_t mask) {
  const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i chosen = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(mask)), bits);
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(chosen, bits));
}

// Lanes whose bit in `mask` is set; the others are `other`.
inline Lanes select(uint32_t mask, Lanes a, Lanes other) {
  return {_mm256_blendv_ps(other.lo, a.lo, half_mask(mask)),
          _mm256_blendv_ps(other.hi, a.hi, half_mask(mask >> 8))};
}

// a where x >= bound or x is NaN, else 0.
inline Lanes zero_below(Lanes a, Lanes x, Lanes bound) {
  return {_mm256_and_ps(a.lo, _mm256_cmp_ps(x.lo, bound.lo, _CMP_NLT_UQ)),
          _mm256_and_ps(a.hi, _mm256_cmp_ps(x.hi, bound.hi, _CMP_NLT_UQ))};
}

inline Lanes round_to_integer(Lanes a) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, kNearest), _mm256_round_ps(a.hi, kNearest)};
}

inline __m256 power_of_two(__m256 n) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(exponent, _mm256_set1_epi32(0x3f800000)));
}

// a * 2^n for whole n in [-126, 127].
inline Lanes scale_by_power(Lanes a, Lanes n) {
  return {_mm256_mul_ps(a.lo, power_of_two(n.lo)), _mm256_mul_ps(a.hi, power_of_two(n.hi))};
}

inline __m256 half_from_bf16(const uint16_t* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}

inline Lanes load_bf16(const uint16_t* p) { return {half_from_bf16(p), half_from_bf16(p + 8)}; }

inline __m256i half_to_bf16(__m256 a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, nan), 16);
}

inline void store_bf16(uint16_t* p, Lanes a) {
  const __m256i packed = _mm256_packus_epi32(half_to_bf16(a.lo), half_to_bf16(a.hi));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}

inline __m256 fold(Lanes a, bool upper) { return upper ? a.hi : a.lo; }

inline void transpose8(__m256 r[8]) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
}

inline void transpose(Lanes rows[kLanes]) {
  __m256 quarter[4][8];
  for (int i = 0; i < 8; ++i) {
    quarter[0][i] = rows[i].lo;
    quarter[1][i] = rows[i].hi;
    quarter[2][i] = rows[i + 8].lo;
    quarter[3][i] = rows[i + 8].hi;
  }
  for (auto& part : quarter) transpose8(part);
  for (int i = 0; i < 8; ++i) {
    rows[i] = {quarter[0][i], quarter[2][i]};
    rows[i + 8] = {quarter[1][i], quarter[3][i]};
  }
}

#else

struct Lanes {
  float v[kLanes];
};

template <class Function>
inline Lanes each_lane(Function function) {
  Lanes result;
  for (int i = 0; i < kLanes; ++i) result.v[i] = function(i);
  return result;
}

inline float fused(float a, float b, float c) {
#if defined(__FP_FAST_FMAF)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

inline Lanes broadcast(float x) {
  return each_lane([&](int) { return x; });
}
inline Lanes load(const float* p) {
  return each_lane([&](int i) { return p[i]; });
}
inline void store(float* p, Lanes a) { std::memcpy(p, a.v, sizeof a.v); }
inline Lanes add(Lanes a, Lanes b) {
  return each_lane([&](int i) { return a.v[i] + b.v[i]; });
}
inline Lanes sub(Lanes a, Lanes b) {
  return each_lane([&](int i) { return a.v[i] - b.v[i]; });
}
inline Lanes fma(Lanes a, Lanes b, Lanes c) {
  return each_lane([&](int i) { return fused(a.v[i], b.v[i], c.v[i]); });
}
inline Lanes max(Lanes a, Lanes b) {
  return each_lane([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}

// A product that the compiler may not fuse with an addition.
inline Lanes mul(Lanes a, Lanes b) {
  Lanes product = each_lane([&](int i) { return a.v[i] * b.v[i]; });
#if defined(__FP_FAST_FMAF)
  asm("" : "+m"(product));
#endif
  return product;
}

// Lanes whose bit in `mask` is set; the others are `other`.
inline Lanes select(uint32_t mask, Lanes a, Lanes other) {
  return each_lane([&](int i) { return mask >> i & 1 ? a.v[i] : other.v[i]; });
}

// a where x >= bound or x is NaN, else 0.
inline Lanes zero_below(Lanes a, Lanes x, Lanes bound) {
  return each_lane([&](int i) { return x.v[i] < bound.v[i] ? 0.0f : a.v[i]; });
}

// For |a| < 2^22; adding 1.5 * 2^23 leaves no bits for a fraction.
inline Lanes round_to_integer(Lanes a) {
  constexpr float kShift = 12582912.0f;
  return each_lane([&](int i) { return (a.v[i] + kShift) - kShift; });
}

// a * 2^n for whole n in [-126, 127].
inline Lanes scale_by_power(Lanes a, Lanes n) {
  return each_lane([&](int i) {
    const float whole = n.v[i] >= -126.0f && n.v[i] <= 127.0f ? n.v[i] : 0.0f;
    const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(whole) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return a.v[i] * power;
  });
}

inline Lanes load_bf16(const uint16_t* p) {
  return each_lane([&](int i) { return from_bf16(p[i]); });
}
inline void store_bf16(uint16_t* p, Lanes a) {
  for (int i = 0; i < kLanes; ++i) p[i] = to_bf16(a.v[i]);
}

inline void transpose(Lanes rows[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const float kept = rows[i].v[j];
      rows[i].v[j] = rows[j].v[i];
      rows[j].v[i] = kept;
    }
  }
}

#endif

// Lanes i and i + 8, then i and i + 4, and so on: the same tree for every instruction set.
#if defined(__AVX2__)
inline float sum(Lanes a) {
  const __m256 eight = _mm256_add_ps(fold(a, false), fold(a, true));
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline float largest(Lanes a) {
  const __m256 eight = _mm256_max_ps(fold(a, false), fold(a, true));
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
#else
inline float sum(Lanes a) {
  for (int width = 8; width; width /= 2) {
    for (int i = 0; i < width; ++i) a.v[i] = a.v[i] + a.v[i + width];
  }
  return a.v[0];
}
inline float largest(Lanes a) {
  for (int width = 8; width; width /= 2) {
    for (int i = 0; i < width; ++i) a.v[i] = a.v[i] > a.v[i + width] ? a.v[i] : a.v[i + width];
  }
  return a.v[0];
}
#endif

// e^x for x <= 0, relative error below 2^-23; 0 below -87.3, where e^x is near the smallest normal
// float; NaN for NaN. x = n ln 2 + r; e^r by the polynomial of Cephes' expf (Moshier), degree 7.
inline Lanes exp_nonpositive(Lanes x) {
  const Lanes n = round_to_integer(mul(x, broadcast(1.44269504088896341f)));
  Lanes r = fma(n, broadcast(-0.693359375f), x);
  r = fma(n, broadcast(2.12194440e-4f), r);
  Lanes p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  p = add(fma(mul(r, r), p, r), broadcast(1.0f));
  return zero_below(scale_by_power(p, n), x, broadcast(-87.3f));
}

inline float exp_nonpositive(float x) {
  float lanes[kLanes];
  store(lanes, exp_nonpositive(broadcast(x)));
  return lanes[0];
}

// `count` values of a row and zeros behind them.
inline Lanes load_some(const float* p, int64_t count) {
  float values[kLanes] = {};
  std::memcpy(values, p, static_cast<size_t>(count) * sizeof(float));
  return load(values);
}
inline Lanes load_some(const uint16_t* p, int64_t count) {
  uint16_t values[kLanes] = {};
  std::memcpy(values, p, static_cast<size_t>(count) * sizeof(uint16_t));
  return load_bf16(values);
}

// The same names for both element types (bf16 values are uint16_t).
inline Lanes load_row(const float* p) { return load(p); }
inline Lanes load_row(const uint16_t* p) { return load_bf16(p); }
inline void store_row(float* p, Lanes a) { store(p, a); }
inline void store_row(uint16_t* p, Lanes a) { store_bf16(p, a); }

}  // namespace
}  // namespace expertfleet
