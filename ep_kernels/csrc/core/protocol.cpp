#include "core/protocol.h"

#include "core/check.h"

namespace ep {
namespace {

constexpr const char* kFieldNames[kNumPostFields] = {
    "operation",
    "layout",
    "dtype",
    "bytes per row of x",
    "bytes of scales per row",
    "dtype of scales",
    "num_topk",
    "bytes of one topk_weight (0 = none given)",
    "expert_alignment",
    "capacity given",
    "handle (number of the dispatch that made it)",
};

const char* op_name(int64_t op) {
  switch (static_cast<Op>(op)) {
    case Op::kDispatch:
      return "dispatch";
    case Op::kCachedDispatch:
      return "dispatch with a cached handle";
    case Op::kCombine:
      return "combine";
    case Op::kBarrier:
      return "barrier";
    case Op::kRefused:
      return "a refused call";
  }
  return "unknown";
}

}  // namespace

std::string field_value(int field, int64_t value) {
  constexpr const char* kTypes[] = {"bfloat16", "float16", "float32", "float64", "float8_e4m3fn"};
  constexpr const char* kScaleTypes[] = {"none", "float32", "int32"};
  if (field == kFieldOp) return op_name(value);
  if (field == kFieldLayout) return value == 0 ? "RANK_MAJOR" : "EXPERT_MAJOR";
  if (field == kFieldHasCapacity) return value == 0 ? "no" : "yes";
  if (field == kFieldRowType && value >= 0 && value < 5) return kTypes[value];
  if (field == kFieldScaleType && value >= 0 && value < 3) return kScaleTypes[value];
  return std::to_string(value);
}

std::string disagreement(int field, int64_t value_of_first, int src, int64_t value) {
  return concat("ranks disagree on the ", kFieldNames[field], ": rank 0 has ",
                field_value(field, value_of_first), ", rank ", src, " has ",
                field_value(field, value));
}

void fill_fields(Op op, const HtSizes& sizes, int64_t (&fields)[kNumPostFields]) {
  const bool by_expert = static_cast<Layout>(sizes.layout) == Layout::kExpertMajor;
  fields[kFieldOp] = static_cast<int64_t>(op);
  fields[kFieldLayout] = sizes.layout;
  fields[kFieldRowType] = sizes.row_type;
  fields[kFieldRowBytes] = sizes.row_bytes;
  fields[kFieldScaleBytes] = sizes.scale_bytes;
  fields[kFieldScaleType] = sizes.scale_type;
  fields[kFieldNumTopk] = by_expert ? 0 : sizes.num_topk;  // own matter in expert-major
  fields[kFieldWeightBytes] = sizes.weight_bytes;
  fields[kFieldAlignment] = sizes.expert_alignment;
  fields[kFieldHasCapacity] = sizes.capacity >= 0;
  fields[kFieldHandle] = sizes.handle_seq;
}

}  // namespace ep
