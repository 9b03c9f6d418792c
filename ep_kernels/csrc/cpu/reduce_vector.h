#pragma once

#include "cpu/reduce_scalar.h"

// The reduction a vector at a time, for any instruction set. A vector type V has
//   Element, kWidth, Register, zero(), load(const Storage*), add(a, b), store(Storage*, sum).
// In an unnamed namespace for the reason given in reduce_scalar.h.

namespace ep::cpu {
namespace {

template <typename V>
void reduce_vectors(const ReduceArgs& args) {
  using Storage = typename V::Element::Storage;
  constexpr int kUnroll = 4;
  constexpr int64_t kStep = kUnroll * V::kWidth;

  const auto accumulate = [](typename V::Register(&sum)[kUnroll], const void* row, int64_t i) {
    const Storage* elements = static_cast<const Storage*>(row) + i;
    for (int u = 0; u < kUnroll; ++u) sum[u] = V::add(sum[u], V::load(elements + u * V::kWidth));
  };
  int64_t i = 0;
  for (; i + kStep <= args.hidden; i += kStep) {
    typename V::Register sum[kUnroll];
    for (int u = 0; u < kUnroll; ++u) sum[u] = V::zero();
    for (int row = 0; row < args.num_rows; ++row) accumulate(sum, args.rows[row], i);
    for (int bias = 0; bias < args.num_biases; ++bias) accumulate(sum, args.biases[bias], i);
    for (int u = 0; u < kUnroll; ++u)
      V::store(static_cast<Storage*>(args.out) + i + u * V::kWidth, sum[u]);
  }
  reduce_elements<typename V::Element>(args, i);
}

}  // namespace
}  // namespace ep::cpu
