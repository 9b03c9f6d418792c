#include "core/ht_args.h"

#include "core/check.h"
#include "core/types.h"

namespace ep {
namespace {

void validate_sizes(const HtSizes& sizes) {
  EP_CHECK(sizes.num_tokens >= 0, "num_tokens=", sizes.num_tokens, " is negative");
  EP_CHECK(sizes.row_bytes > 0 && sizes.row_bytes % 16 == 0, "x: a row has ", sizes.row_bytes,
           " bytes, which is not a positive multiple of 16");
  EP_CHECK(sizes.num_topk >= 0, "num_topk=", sizes.num_topk, " is negative");
  EP_CHECK(sizes.weight_bytes == 0 || sizes.weight_bytes == 4 || sizes.weight_bytes == 8,
           "topk_weights: an element has ", sizes.weight_bytes, " bytes, expected 4 or 8");
  EP_CHECK(sizes.layout == 0 || sizes.layout == 1, "layout=", sizes.layout, " is unknown");
  EP_CHECK(sizes.expert_alignment >= 1, "expert_alignment=", sizes.expert_alignment,
           " is not positive");
  EP_CHECK(sizes.num_threads >= 1, "num_sms=", sizes.num_threads, " is not positive");
}

}  // namespace

void validate(const HtDispatchArgs& args) {
  validate_sizes(args.sizes);
  EP_CHECK(args.sizes.scale_bytes == 0 || args.scales != nullptr || args.sizes.num_tokens == 0,
           "scales: none given, but a row has ", args.sizes.scale_bytes, " bytes of them");
}

void validate(const HtCombineArgs& args) {
  validate_sizes(args.sizes);
  EP_CHECK(static_cast<RowType>(args.sizes.row_type) != RowType::kFP8,
           "x: FP8 rows cannot be combined");
  EP_CHECK(args.num_rows >= 0, "num_rows=", args.num_rows, " is negative");
}

}  // namespace ep
