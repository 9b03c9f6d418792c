// The steps of a call over several nodes that touch rows: addresses from offers, then a kernel.

#include "cuda/lane.h"

#include "core/check.h"
#include "core/types.h"
#include "cuda/check_cuda.h"

namespace ep::cuda {

Lane::Lane(const Buffer& buffer, const Config& config)
    : buffer_(buffer),
      num_local_(config.num_local_ranks),
      local_rank_(config.rank % config.num_local_ranks) {
  EP_CHECK(buffer.group().num_ranks == num_local_, "num_local_ranks=", num_local_,
           ", but the memory is that of ", buffer.group().num_ranks, " ranks");
  DeviceGuard guard(buffer.device());
  std::vector<int32_t> local_of;
  std::vector<int32_t> num_of_rank;
  for (const int32_t rank : config.expert_rank) {
    if (rank >= static_cast<int32_t>(num_of_rank.size())) num_of_rank.resize(rank + 1, 0);
    local_of.push_back(num_of_rank[rank]++);
  }
  node_.first_rank = config.rank - local_rank_;
  const bool has_experts = config.rank < static_cast<int>(num_of_rank.size());
  node_.num_local_experts = has_experts ? num_of_rank[config.rank] : 0;
  const size_t num_bytes = local_of.size() * sizeof(int32_t);
  void* memory = nullptr;
  EP_CHECK_CUDA(cudaMalloc(&memory, num_bytes));
  table_ = static_cast<int32_t*>(memory);
  node_.local_of = table_;
  EP_CHECK_CUDA(cudaMemcpy(table_, local_of.data(), num_bytes, cudaMemcpyHostToDevice));
}

Lane::~Lane() {
  int previous = 0;
  cudaGetDevice(&previous);
  cudaSetDevice(buffer_.device());
  cudaFree(table_);
  cudaSetDevice(previous);
}

void Lane::pack(const LanePackArgs& args, cudaStream_t stream) const {
  DeviceGuard guard(buffer_.device());
  launch_lane_pack(args, stream);
}

void Lane::send_rows(const HtDispatchArgs& args, const Offer* offers, cudaStream_t stream) const {
  DeviceGuard guard(buffer_.device());
  Destinations to{};
  for (int local = 0; local < num_local_; ++local) {
    const Offer& offer = offers[node_.first_rank + local];
    const auto at = [&](int64_t offset) { return offset < 0 ? nullptr : pool(local) + offset; };
    to.x[local] = at(offer.x);
    to.scales[local] = at(offer.scales);
    to.topk_weights[local] = at(offer.topk_weights);
    to.topk_idx[local] = reinterpret_cast<int64_t*>(at(offer.topk_idx));
  }
  launch_lane_send(node_, args, to, stream);
}

void Lane::fill_padding(const HtDispatchArgs& args, cudaStream_t stream) const {
  DeviceGuard guard(buffer_.device());
  launch_lane_padding(node_, args, pool(local_rank_), stream);
}

void Lane::stage_rows(const HtCombineArgs& args, cudaStream_t stream) const {
  DeviceGuard guard(buffer_.device());
  const bool by_expert = static_cast<Layout>(args.sizes.layout) == Layout::kExpertMajor;
  const int64_t weights_per_row = by_expert ? 1 : args.sizes.num_topk;
  uint8_t* own = pool(local_rank_);
  if (args.stage_x) copy(own + args.pool_x, args.x, args.num_rows * args.sizes.row_bytes, stream);
  if (args.stage_topk_weights)
    copy(own + args.pool_topk_weights, args.topk_weights,
         args.num_rows * weights_per_row * args.sizes.weight_bytes, stream);
}

void Lane::reduce_rows(const HtCombineArgs& args, const Offer* offers, cudaStream_t stream) const {
  DeviceGuard guard(buffer_.device());
  Sources from{};
  from.first_rank = node_.first_rank;
  for (int local = 0; local < num_local_; ++local) {
    const Offer& offer = offers[node_.first_rank + local];
    from.x[local] = pool(local) + offer.x;
    from.topk_weights[local] = pool(local) + offer.topk_weights;
  }
  from.x[local_rank_] = args.x;
  from.topk_weights[local_rank_] = args.topk_weights;
  launch_lane_reduce(args, from, stream);
}

void Lane::merge(const LaneMergeArgs& args, cudaStream_t stream) const {
  EP_CHECK(args.num_nodes <= kMaxNodes, "group: ", args.num_nodes, " nodes, the limit is ",
           kMaxNodes);
  DeviceGuard guard(buffer_.device());
  NodeSums sums{};
  for (int node = 0; node < args.num_nodes; ++node) sums.of[node] = args.nodes[node];
  sums.of[args.own_node] = {};
  launch_lane_merge(args, sums, stream);
}

void Lane::copy(void* to, const void* of, int64_t num_bytes, cudaStream_t stream) const {
  if (num_bytes == 0) return;
  DeviceGuard guard(buffer_.device());
  EP_CHECK_CUDA(cudaMemcpyAsync(to, of, static_cast<size_t>(num_bytes), cudaMemcpyDefault, stream));
}

}  // namespace ep::cuda
