#pragma once
#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};
inline float __half2float(__half x) {
  const uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16, rest = (uint32_t)(x.bits & 0x7fff) << 13;
  const bool finite = (x.bits & 0x7c00) != 0x7c00;
  uint32_t wide = finite ? rest : rest | 0x7f800000;
  float y;
  memcpy(&y, &wide, 4);
  if (finite) y *= 0x1p112f;  // the exponents' biases differ by 112; exact for subnormal values too
  memcpy(&wide, &y, 4);
  wide |= sign;
  memcpy(&y, &wide, 4);
  return y;
}
inline __half __float2half_rn(float x) {
  uint32_t wide;
  memcpy(&wide, &x, 4);
  const uint16_t sign = (uint16_t)(wide >> 16 & 0x8000);
  wide &= 0x7fffffff;
  if (wide > 0x7f800000) return {(uint16_t)(sign | 0x7fff)};
  if (wide >= 0x477ff000) return {(uint16_t)(sign | 0x7c00)};  // 65520 and more round to infinity
  if (wide < 0x38800000) {                                     // subnormal: adding 1/2 leaves multiples of 2^-24
    float y;
    memcpy(&y, &wide, 4);
    y += 0.5f;
    memcpy(&wide, &y, 4);
    return {(uint16_t)(sign | (wide - 0x3f000000))};
  }
  wide += 0xfff + (wide >> 13 & 1);  // to nearest, ties to even
  return {(uint16_t)(sign | ((wide - 0x38000000) >> 13))};
}
