#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/reduce.h"

// Element conversions, and the reduction one element at a time: the definition of the result, and
// the tail of the vector variants.
//
// NOTE: everything is in an unnamed namespace, because each instruction set compiles its own copy
// and the linker must not replace one by another.

namespace ep::cpu {
namespace {

template <typename To, typename From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

struct BF16 {
  using Storage = uint16_t;
  using Acc = float;
  static float load(Storage bits) { return bit_cast<float>(uint32_t{bits} << 16); }
  static Storage store(float value) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    if (std::isnan(value)) return 0x7fc0;
    return static_cast<Storage>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
};

struct FP16 {
  using Storage = uint16_t;
  using Acc = float;

  static float load(Storage bits) {
    const uint32_t sign = uint32_t{bits & 0x8000u} << 16, magnitude = bits & 0x7fffu;
    if (magnitude >= 0x7c00) return bit_cast<float>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    // Exact for subnormals too: place the bits in an fp32 of the wrong exponent and rescale.
    const float scaled = bit_cast<float>(magnitude << 13) * 0x1p112f;
    return bit_cast<float>(bit_cast<uint32_t>(scaled) | sign);
  }

  static Storage store(float value) {
    if (std::isnan(value)) return 0x7e00;
    const uint32_t bits = bit_cast<uint32_t>(value), sign = bits >> 16 & 0x8000;
    const uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude >= 0x477ff000) return static_cast<Storage>(sign | 0x7c00);  // rounds to infinity
    if (magnitude < 0x38800000) {  // subnormal: the fp32 adder rounds to a multiple of 2^-24
      const float rounded = bit_cast<float>(magnitude) + 0.5f;
      return static_cast<Storage>(sign | (bit_cast<uint32_t>(rounded) - 0x3f000000));
    }
    const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
    return static_cast<Storage>(sign | ((rounded - 0x38000000) >> 13));
  }
};

struct FP32 {
  using Storage = float;
  using Acc = float;
  static float load(float value) { return value; }
  static float store(float value) {
    return std::isnan(value) ? bit_cast<float>(uint32_t{0x7fc00000}) : value;
  }
};

struct FP64 {
  using Storage = double;
  using Acc = double;
  static double load(double value) { return value; }
  static double store(double value) {
    return std::isnan(value) ? bit_cast<double>(uint64_t{0x7ff8000000000000}) : value;
  }
};

/// Elements [begin, hidden) of the reduction.
template <typename Element, bool kIsWeighted>
void reduce_elements(const ReduceArgs& args, int64_t begin) {
  using Storage = typename Element::Storage;
  const auto element = [](const void* row, int64_t i) {
    return Element::load(static_cast<const Storage*>(row)[i]);
  };
  for (int64_t i = begin; i < args.hidden; ++i) {
    typename Element::Acc sum = 0;
    for (int row = 0; row < args.num_rows; ++row) {
      const typename Element::Acc value = element(args.rows[row], i);
      sum += kIsWeighted ? value * args.weights[row] : value;
    }
    for (int bias = 0; bias < args.num_biases; ++bias) sum += element(args.biases[bias], i);
    static_cast<Storage*>(args.out)[i] = Element::store(sum);
  }
}

}  // namespace
}  // namespace ep::cpu
