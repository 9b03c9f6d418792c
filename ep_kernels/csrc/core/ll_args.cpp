#include "core/ll_args.h"

#include "core/check.h"

namespace ep {

void validate(const LlDispatchArgs& args) {
  const LlSizes& sizes = args.sizes;
  EP_CHECK(sizes.num_max_tokens_per_rank >= 1,
           "num_max_tokens_per_rank=", sizes.num_max_tokens_per_rank, " is not positive");
  EP_CHECK(sizes.num_tokens >= 0 && sizes.num_tokens <= sizes.num_max_tokens_per_rank, "x has ",
           sizes.num_tokens,
           " tokens, more than num_max_tokens_per_rank=", sizes.num_max_tokens_per_rank);
  EP_CHECK(sizes.hidden > 0 && sizes.hidden % 8 == 0, "x has hidden=", sizes.hidden, ": a row of ",
           2 * sizes.hidden, " bytes, expected a positive multiple of 16");
  EP_CHECK(sizes.num_topk >= 1, "topk_idx has num_topk=", sizes.num_topk, ", not positive");
  EP_CHECK(sizes.num_threads >= 1, "num_sms=", sizes.num_threads, " is not positive");
  const auto format = static_cast<LlFormat>(sizes.format);
  EP_CHECK(format == LlFormat::kBF16 || sizes.hidden % kScaleGroup == 0,
           "x has hidden=", sizes.hidden, ", which use_fp8 needs to be a multiple of ",
           kScaleGroup);
  EP_CHECK(format != LlFormat::kFP8UE8M0 || sizes.hidden % (4 * kScaleGroup) == 0,
           "x has hidden=", sizes.hidden, ", which use_ue8m0 needs to be a multiple of ",
           4 * kScaleGroup);
}

void validate(const LlCombineArgs& args, const LlSizes& sizes) {
  const auto wire = static_cast<LlWire>(args.wire);
  EP_CHECK(wire != LlWire::kFP8 || sizes.hidden % kScaleGroup == 0, "x has hidden=", sizes.hidden,
           ", which wire_format fp8 needs to be a multiple of ", kScaleGroup);
  EP_CHECK(wire != LlWire::kFP8 || args.is_zero_copy == 0,
           "zero_copy=True needs wire_format bf16: compressed rows are copied");
}

void check_routing(const LlCombineArgs& args, const LlSizes& sizes) {
  for (int64_t i = 0; i < sizes.num_tokens * sizes.num_topk; ++i)
    EP_CHECK(args.topk_idx[i] == args.experts[i], "topk_idx[", i / sizes.num_topk, ", ",
             i % sizes.num_topk, "]=", args.topk_idx[i], ", but this handle dispatched ",
             args.experts[i]);
}

}  // namespace ep
