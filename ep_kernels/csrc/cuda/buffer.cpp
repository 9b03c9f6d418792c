// The calls: which kernels each enqueues, in which order.

#include "cuda/buffer.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>

#include "core/check.h"
#include "cuda/check_cuda.h"
#include "cuda/kernels.h"

namespace ep::cuda {
namespace {

using Clock = std::chrono::steady_clock;

/// An event that measures time.
class CudaEvent {
 public:
  CudaEvent() { EP_CHECK_CUDA(cudaEventCreate(&event_)); }
  CudaEvent(const CudaEvent&) = delete;
  CudaEvent& operator=(const CudaEvent&) = delete;
  ~CudaEvent() { cudaEventDestroy(event_); }
  cudaEvent_t get() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

Offer recv_offer(const HtDispatchArgs& args) {
  return {0,
          args.recv_x,
          args.recv_scales,
          args.recv_topk_idx,
          args.recv_topk_weights,
          args.recv_chain};
}

}  // namespace

PostArgs Buffer::make_post(Op op, const HtSizes& sizes) const {
  PostArgs post{};
  fill_fields(op, sizes, post.fields);
  post.capacity = sizes.capacity;
  return post;
}

void Buffer::launch_routing(int64_t call, const HtDispatchArgs& args, const PostArgs& post) {
  launch_notify(group_, args, post, scratch_, record_of(call), stream_of_call_);
  launch_plan(group_, args, scratch_, stream_of_call_);
}

void Buffer::move_rows(int64_t call, const HtDispatchArgs& args) {
  launch_send(group_, args, record_of(call), stream_of_call_);
  if (args.recv_chain >= 0) launch_copies(group_, args, record_of(call), stream_of_call_);
}

int64_t Buffer::dispatch_fresh(HtDispatchArgs args, const CallOrder& order, Received* received) {
  check_usable();
  validate(args);
  DeviceGuard guard(config_.device);
  take_scratch(args.sizes.num_tokens, order);
  const int64_t call = begin_call(order, args.wait_recv_cost_stats);
  launch_routing(call, args, make_post(Op::kDispatch, args.sizes));
  if (!wait_for_sizes(call)) {
    finish_call(call, order);
    wait(call);
    throw DeviceError("the exchange of counts ended without a result");
  }
  std::string problem;
  try {
    received->allocate(pool_, args.sizes, record_of(call)->recv_sizes[0], chains_rows());
  } catch (const DeviceError& error) {  // every rank has to learn of it
    problem = error.what();
  }
  follow_freed(order.follows_caller ? order.caller : nullptr);  // may have been freed meanwhile
  args.recv_x = received->x.offset;
  args.recv_scales = received->scales.offset;
  args.recv_topk_idx = received->topk_idx.offset;
  args.recv_topk_weights = received->topk_weights.offset;
  args.recv_chain = received->chain.offset;
  Offer offer = recv_offer(args);
  offer.failed = !problem.empty();
  launch_offer(group_, offer, record_of(call), stream_of_call_);
  move_rows(call, args);
  end_call(call, order);
  if (problem.empty()) return call;
  EP_CHECK_CUDA(cudaEventSynchronize(end_event(call)));
  throw DeviceError(problem);
}

/// Blocks the host until the kernels have told how many rows come. False: they have returned
/// without, or nothing moves.
bool Buffer::wait_for_sizes(int64_t call) const {
  const CallRecord& record = *record_of(call);
  const auto start = Clock::now();
  const auto deadline = start + std::chrono::microseconds(3 * config_.timeout_us);
  constexpr auto kSpin = std::chrono::microseconds(2000);
  while (__atomic_load_n(&record.has_sizes, __ATOMIC_ACQUIRE) == 0) {
    const auto now = Clock::now();
    if (now - start < kSpin) continue;
    std::this_thread::sleep_for(std::chrono::microseconds(20));
    const cudaError_t state = cudaStreamQuery(stream_of_call_);
    if (state == cudaErrorNotReady && now < deadline) continue;
    if (state != cudaSuccess && state != cudaErrorNotReady) EP_CHECK_CUDA(state);
    break;
  }
  return __atomic_load_n(&record.has_sizes, __ATOMIC_ACQUIRE) == kSizesValid;
}

int64_t Buffer::dispatch(const HtDispatchArgs& args, const CallOrder& order) {
  check_usable();
  validate(args);
  DeviceGuard guard(config_.device);
  const bool is_fresh = args.sizes.handle_seq < 0;
  if (is_fresh) take_scratch(args.sizes.num_tokens, order);
  const int64_t call = begin_call(order, args.wait_recv_cost_stats);
  PostArgs post = make_post(is_fresh ? Op::kDispatch : Op::kCachedDispatch, args.sizes);
  post.offer = recv_offer(args);
  if (is_fresh) {
    launch_routing(call, args, post);
  } else {
    launch_post(group_, post, record_of(call), stream_of_call_);
  }
  move_rows(call, args);
  end_call(call, order);
  return call;
}

int64_t Buffer::combine(const HtCombineArgs& args, const CallOrder& order) {
  check_usable();
  validate(args);
  DeviceGuard guard(config_.device);
  const int64_t call = begin_call(order, args.wait_recv_cost_stats);
  const bool by_expert = static_cast<Layout>(args.sizes.layout) == Layout::kExpertMajor;
  const int64_t weights_per_row = by_expert ? 1 : args.sizes.num_topk;
  const auto stage = [&](int64_t offset, const uint8_t* from, int64_t row_bytes) {
    if (args.num_rows > 0)
      EP_CHECK_CUDA(cudaMemcpyAsync(pool_base() + offset, from,
                                    static_cast<size_t>(args.num_rows * row_bytes),
                                    cudaMemcpyDeviceToDevice, stream_of_call_));
  };
  if (args.stage_x) stage(args.pool_x, args.x, args.sizes.row_bytes);
  if (args.stage_topk_weights)
    stage(args.pool_topk_weights, args.topk_weights, weights_per_row * args.sizes.weight_bytes);
  PostArgs post = make_post(Op::kCombine, args.sizes);
  post.offer.x = args.pool_x;
  post.offer.topk_weights = args.pool_topk_weights;
  launch_post(group_, post, record_of(call), stream_of_call_);
  launch_reduce(group_, args, record_of(call), stream_of_call_);
  end_call(call, order);
  return call;
}

int64_t Buffer::barrier(const CallOrder& order) {
  check_usable();
  DeviceGuard guard(config_.device);
  const int64_t call = begin_call(order);
  launch_post(group_, make_post(Op::kBarrier, HtSizes{}), record_of(call), stream_of_call_);
  finish_call(call, order);
  return call;
}

int64_t Buffer::refuse(const std::string& reason, const CallOrder& order) {
  check_usable();
  DeviceGuard guard(config_.device);
  const int64_t call = begin_call(order);
  PostArgs post{};
  post.fields[kFieldOp] = static_cast<int64_t>(Op::kRefused);
  post.has_text = 1;
  std::memcpy(post.text, reason.data(), std::min(reason.size(), size_t{kMaxText - 1}));
  launch_post(group_, post, record_of(call), stream_of_call_);
  finish_call(call, order);
  return call;
}

double Buffer::copy_rate(int num_blocks, int64_t num_bytes, int64_t offset,
                         const CallOrder& order) {
  EP_CHECK(num_bytes > 0 && num_bytes % kCopyUnit == 0, "num_bytes=", num_bytes,
           " is no positive multiple of ", kCopyUnit);
  barrier(order);
  DeviceGuard guard(config_.device);
  const int next = (config_.rank + 1) % config_.num_ranks;
  const CudaEvent begin, end;
  EP_CHECK_CUDA(cudaEventRecord(begin.get(), stream_of_call_));
  launch_copy(group_.pool(next) + offset + num_bytes, group_.pool(config_.rank) + offset, num_bytes,
              num_blocks, stream_of_call_);
  EP_CHECK_CUDA(cudaEventRecord(end.get(), stream_of_call_));
  wait(barrier(order));
  float milliseconds = 0;
  EP_CHECK_CUDA(cudaEventElapsedTime(&milliseconds, begin.get(), end.get()));
  return static_cast<double>(num_bytes) / (1e-3 * static_cast<double>(milliseconds));
}

}  // namespace ep::cuda
