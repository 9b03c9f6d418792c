#pragma once

#include <cstdint>
#include <cstring>

#include "core/macros.h"

// The FP8 cast of low-latency mode, one element or one scale at a time: the definition of its bits.
// Branches are selections, so that compilers turn loops over these functions into vector code.
//
// NOTE: in an unnamed namespace, because each instruction set compiles its own copy and the linker
// must not replace one by another.

namespace ep {
namespace {

template <typename To, typename From>
EP_HOST_DEVICE To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "same_bits keeps the size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

EP_HOST_DEVICE float bf16_to_float(uint16_t bits) {
  return same_bits<float>(static_cast<uint32_t>(bits) << 16);
}

/// Nearest even; every NaN becomes 0x7fc0.
EP_HOST_DEVICE uint16_t float_to_bf16(float value) {
  const uint32_t bits = same_bits<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

/// Magnitude of a bf16 as an integer that orders like it; NaN counts as 0.
EP_HOST_DEVICE int16_t bf16_magnitude(uint16_t bits) {
  const auto magnitude = static_cast<int16_t>(bits & 0x7fff);
  return magnitude > 0x7f80 ? int16_t{0} : magnitude;
}

/// Nearest even; 464 and more becomes NaN, every NaN 0x7f.
EP_HOST_DEVICE uint8_t float_to_e4m3(float value) {
  const uint32_t bits = same_bits<uint32_t>(value), magnitude = bits & 0x7fffffff;
  // Subnormal: the fp32 adder rounds to a multiple of 2^-9, whose count ends in the last bits.
  const float shifted = same_bits<float>(magnitude) + 0x1p14f;
  const uint32_t subnormal = same_bits<uint32_t>(shifted) - 0x46800000;
  // Normal: round at bit 20, then change the exponent's bias from 127 to 7.
  const uint32_t normal = (magnitude + 0x7ffff + (magnitude >> 20 & 1) - (120u << 23)) >> 20;
  const uint32_t finite = magnitude < (121u << 23) ? subnormal : normal;
  const uint32_t sign = bits >> 24 & 0x80;
  return static_cast<uint8_t>(magnitude >= 0x43e80000 ? 0x7f : finite | sign);
}

EP_HOST_DEVICE float e4m3_to_float(uint8_t bits) {
  const uint32_t magnitude = bits & 0x7f, sign = static_cast<uint32_t>(bits & 0x80) << 24;
  const uint32_t normal = (magnitude << 20) + (120u << 23);
  const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-9f;
  uint32_t result = magnitude < 8 ? same_bits<uint32_t>(subnormal) : normal;
  result = magnitude == 0x7f ? 0x7fc00000 : result;
  return same_bits<float>(result | sign);
}

/// How a group of channels is scaled: element = e4m3(x * inverse), x is about element * scale.
struct Fp8Scale {
  float scale, inverse;
};

/// From the largest magnitude of the group, a bf16 without sign.
EP_HOST_DEVICE Fp8Scale make_fp8_scale(int16_t magnitude, bool is_rounded) {
  const float largest = bf16_to_float(static_cast<uint16_t>(magnitude)),
              amax = largest > 1e-4f ? largest : 1e-4f;
  const float scale = amax / 448.0f;
  if (!is_rounded) return {scale, 448.0f / amax};
  const uint32_t bits = same_bits<uint32_t>(scale);
  const uint32_t exponent = (bits + 0x7fffff) >> 23;  // up, unless it is a power of two
  return {same_bits<float>(exponent << 23),
          same_bits<float>(exponent >= 254 ? 0u : (254 - exponent) << 23)};
}

/// The exponent byte of a scale that is a power of two.
EP_HOST_DEVICE uint8_t ue8m0(float scale) {
  return static_cast<uint8_t>(same_bits<uint32_t>(scale) >> 23);
}

}  // namespace
}  // namespace ep
