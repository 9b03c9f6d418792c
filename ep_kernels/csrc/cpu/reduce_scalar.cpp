#include "cpu/reduce_scalar.h"

namespace ep::cpu::scalar {
namespace {

template <typename Element>
void reduce(const ReduceArgs& args) {
  args.weights ? reduce_elements<Element, true>(args, 0) : reduce_elements<Element, false>(args, 0);
}

}  // namespace

ReduceFn reduce_fn(RowType type) {
  switch (type) {
    case RowType::kBF16:
      return reduce<BF16>;
    case RowType::kFP16:
      return reduce<FP16>;
    case RowType::kFP32:
      return reduce<FP32>;
    case RowType::kFP64:
      return reduce<FP64>;
    case RowType::kFP8:
      break;
  }
  return nullptr;
}

}  // namespace ep::cpu::scalar
