#pragma once

#include "cpu/reduce_scalar.h"

// The reduction a vector at a time, for any instruction set. A vector type V has
//   Element, kWidth, Register, zero(), load(const Storage*), add(a, b), store(Storage*, sum),
//   scale(a, float).
// In an unnamed namespace for the reason given in reduce_scalar.h.

namespace ep::cpu {
namespace {

template <typename V, bool kIsWeighted>
void reduce_rows(const ReduceArgs& args) {
  using Storage = typename V::Element::Storage;
  constexpr int kUnroll = 4;
  constexpr int64_t kStep = kUnroll * V::kWidth;

  const auto accumulate = [](typename V::Register(&sum)[kUnroll], const void* row, int64_t i) {
    const Storage* elements = static_cast<const Storage*>(row) + i;
    for (int u = 0; u < kUnroll; ++u) sum[u] = V::add(sum[u], V::load(elements + u * V::kWidth));
  };
  [[maybe_unused]] const auto add_weighted = [](typename V::Register(&sum)[kUnroll],
                                                const void* row, float weight, int64_t i) {
    const Storage* elements = static_cast<const Storage*>(row) + i;
    for (int u = 0; u < kUnroll; ++u)
      sum[u] = V::add(sum[u], V::scale(V::load(elements + u * V::kWidth), weight));
  };
  int64_t i = 0;
  for (; i + kStep <= args.hidden; i += kStep) {
    typename V::Register sum[kUnroll];
    for (int u = 0; u < kUnroll; ++u) sum[u] = V::zero();
    for (int row = 0; row < args.num_rows; ++row) {
      if constexpr (kIsWeighted) {
        add_weighted(sum, args.rows[row], args.weights[row], i);
      } else {
        accumulate(sum, args.rows[row], i);
      }
    }
    for (int bias = 0; bias < args.num_biases; ++bias) accumulate(sum, args.biases[bias], i);
    for (int u = 0; u < kUnroll; ++u)
      V::store(static_cast<Storage*>(args.out) + i + u * V::kWidth, sum[u]);
  }
  reduce_elements<typename V::Element, kIsWeighted>(args, i);
}

template <typename V>
void reduce_vectors(const ReduceArgs& args) {
  args.weights ? reduce_rows<V, true>(args) : reduce_rows<V, false>(args);
}

}  // namespace
}  // namespace ep::cpu
