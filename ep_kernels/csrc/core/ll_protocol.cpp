#include "core/ll_protocol.h"

#include "core/check.h"

namespace ep {
namespace {

constexpr const char* kFieldNames[kNumLlFields] = {
    "low-latency operation",
    "num_max_tokens_per_rank",
    "hidden",
    "row format (use_fp8, round_scale, use_ue8m0)",
    "handle (number of the dispatch that made it)",
    "wire_format",
};

std::string field_text(int field, int64_t value) {
  constexpr const char* kOps[] = {"none", "dispatch", "combine", "barrier", "a refused call"};
  constexpr const char* kFormats[] = {"bf16", "fp8", "fp8 with rounded scales", "fp8 with ue8m0"};
  if (field == kLlFieldOp && value >= 0 && value < 5) return kOps[value];
  if ((field == kLlFieldFormat || field == kLlFieldWire) && value >= 0 && value < 4)
    return kFormats[value];
  return std::to_string(value);
}

}  // namespace

std::string ll_disagreement(int field, int a, int64_t value_of_a, int b, int64_t value_of_b) {
  return concat("ranks disagree on the ", kFieldNames[field], ": rank ", a, " has ",
                field_text(field, value_of_a), ", rank ", b, " has ",
                field_text(field, value_of_b));
}

}  // namespace ep
