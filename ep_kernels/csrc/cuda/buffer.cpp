#include "cuda/buffer.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>

#include "core/check.h"
#include "core/ll_layout.h"
#include "core/math.h"
#include "cuda/check_cuda.h"
#include "cuda/kernels.h"

namespace ep::cuda {
namespace {

using Clock = std::chrono::steady_clock;

template <typename T>
void allocate_device(T** memory, size_t num_bytes) {
  void* address = nullptr;
  EP_CHECK_CUDA(cudaMalloc(&address, num_bytes));
  *memory = static_cast<T*>(address);
}

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
  return {0, args.recv_x, args.recv_scales, args.recv_topk_idx, args.recv_topk_weights};
}

std::string bad_choice(const CallRecord& record, int num_experts) {
  const auto& [token, k, expert, unused] = record.detail;
  (void)unused;
  if (static_cast<CallStatus>(record.status) == CallStatus::kTwice)
    return concat("topk_idx[", token, "] chooses expert ", expert,
                  " twice, the second time at position ", k);
  return concat("topk_idx[", token, ", ", k, "]=", expert,
                " is outside [-1, num_experts=", num_experts, ")");
}

}  // namespace

DeviceGuard::DeviceGuard(int device) {
  EP_CHECK_CUDA(cudaGetDevice(&previous_));
  if (previous_ != device) EP_CHECK_CUDA(cudaSetDevice(device));
}

DeviceGuard::~DeviceGuard() { cudaSetDevice(previous_); }

Pool::Pool(int on_device, int64_t control_bytes, int64_t pool_bytes)
    : device(on_device), allocator(pool_bytes) {
  DeviceGuard guard(device);
  // NOTE: peers map an allocation of any other size with small pages, at half the write rate.
  constexpr int64_t kPageBytes = int64_t{2} << 20;
  const int64_t num_bytes = align_up(control_bytes + pool_bytes, kPageBytes);
  allocate_device(&segment, static_cast<size_t>(num_bytes));
  EP_CHECK_CUDA(cudaMemset(segment, 0, static_cast<size_t>(control_bytes)));
}

Pool::~Pool() {
  int previous = 0;
  cudaGetDevice(&previous);
  cudaSetDevice(device);
  cudaFree(segment);
  cudaSetDevice(previous);
}

void Received::allocate(const std::shared_ptr<Pool>& pool, const RowBytes& row_bytes,
                        int64_t num_rows) {
  const auto take = [&](Block& block, int64_t bytes_per_row) {
    if (bytes_per_row >= 0) block.allocate(pool, num_rows * bytes_per_row);
  };
  take(x, row_bytes.x);
  take(scales, row_bytes.scales);
  take(topk_idx, row_bytes.topk_idx);
  take(topk_weights, row_bytes.topk_weights);
}

Buffer::Buffer(const Config& config) : config_(config) {
  EP_CHECK(config.num_ranks <= kMaxRanks, "group: ", config.num_ranks, " ranks, the limit is ",
           kMaxRanks);
  DeviceGuard guard(config.device);
  control_bytes_ = static_cast<int64_t>(ControlLayout(config.num_ranks, num_experts()).num_bytes);
  pool_ = std::make_shared<Pool>(config.device, control_bytes_, config.pool_bytes);
  const LlControlLayout words(config.num_ranks, num_experts());
  const int64_t num_words =
      std::min(config.low_latency_bytes, static_cast<int64_t>(words.num_bytes));
  EP_CHECK_CUDA(cudaMemset(pool_->segment + control_bytes_, 0, static_cast<size_t>(num_words)));
  EP_CHECK_CUDA(cudaDeviceSynchronize());

  std::vector<int32_t> tables(config.expert_rank), num_local(config.num_ranks, 0);
  for (const int32_t rank : config.expert_rank) tables.push_back(num_local[rank]++);
  EP_CHECK(num_local[config.rank] <= kMaxLocalExperts, "num_experts=", num_experts(), ": rank ",
           config.rank, " owns ", num_local[config.rank], ", the limit is ", kMaxLocalExperts);
  allocate_device(&expert_tables_, tables.size() * sizeof(int32_t));
  EP_CHECK_CUDA(cudaMemcpy(expert_tables_, tables.data(), tables.size() * sizeof(int32_t),
                           cudaMemcpyHostToDevice));
  LocalState state{};
  state.bad_choice[0] = INT64_MAX;
  allocate_device(&group_.state, sizeof(LocalState));
  EP_CHECK_CUDA(cudaMemcpy(group_.state, &state, sizeof(LocalState), cudaMemcpyHostToDevice));
  void* records = nullptr;
  EP_CHECK_CUDA(cudaHostAlloc(&records, kNumRecords * sizeof(CallRecord), cudaHostAllocMapped));
  records_ = static_cast<CallRecord*>(records);
  for (int i = 0; i < kNumRecords; ++i) {
    records_[i] = CallRecord{};
    records_[i].status = static_cast<int32_t>(CallStatus::kOk);
  }

  int lowest_priority = 0, highest_priority = 0;
  EP_CHECK_CUDA(cudaDeviceGetStreamPriorityRange(&lowest_priority, &highest_priority));
  // Few blocks that peers wait for go before the many of a GEMM.
  EP_CHECK_CUDA(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, highest_priority));
  EP_CHECK_CUDA(cudaEventCreateWithFlags(&begin_event_, cudaEventDisableTiming));
  end_events_.resize(kNumRecords);
  for (cudaEvent_t& event : end_events_)
    EP_CHECK_CUDA(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));

  group_.rank = config.rank;
  group_.num_ranks = config.num_ranks;
  group_.num_experts = num_experts();
  group_.num_local_experts = num_local[config.rank];
  group_.placement = {expert_tables_, expert_tables_ + num_experts()};
  group_.timeout_ns = static_cast<uint64_t>(config.timeout_us) * 1000;
  group_.segments[config.rank] = pool_->segment;
}

Buffer::~Buffer() {
  try {
    destroy();
  } catch (const Error&) {
    // A dead context cannot be left in better order.
  }
}

cudaIpcMemHandle_t Buffer::memory_handle() const {
  DeviceGuard guard(config_.device);
  cudaIpcMemHandle_t handle;
  EP_CHECK_CUDA(cudaIpcGetMemHandle(&handle, pool_->segment));
  return handle;
}

void Buffer::attach(const cudaIpcMemHandle_t* handles) {
  DeviceGuard guard(config_.device);
  for (int peer = 0; peer < config_.num_ranks; ++peer) {
    if (peer == config_.rank) continue;
    void* segment = nullptr;
    EP_CHECK_CUDA(cudaIpcOpenMemHandle(&segment, handles[peer], cudaIpcMemLazyEnablePeerAccess));
    group_.segments[peer] = static_cast<uint8_t*>(segment);
  }
}

void Buffer::destroy() {
  if (is_destroyed_) return;
  is_destroyed_ = true;
  DeviceGuard guard(config_.device);
  EP_CHECK_CUDA(cudaDeviceSynchronize());
  const ControlLayout layout = group_.layout();
  const uint32_t departed = 1;
  const size_t offset =
      layout.peer_lines + config_.rank * sizeof(PeerLine) + offsetof(PeerLine, departed);
  for (int peer = 0; peer < config_.num_ranks; ++peer) {
    uint8_t* segment = group_.segments[peer];
    if (peer == config_.rank || segment == nullptr) continue;
    EP_CHECK_CUDA(
        cudaMemcpy(segment + offset, &departed, sizeof(departed), cudaMemcpyHostToDevice));
    EP_CHECK_CUDA(cudaIpcCloseMemHandle(segment));
    group_.segments[peer] = nullptr;
  }
  for (cudaEvent_t event : end_events_) EP_CHECK_CUDA(cudaEventDestroy(event));
  for (const auto& [stream, freed] : freed_) EP_CHECK_CUDA(cudaEventDestroy(freed.event));
  EP_CHECK_CUDA(cudaEventDestroy(begin_event_));
  EP_CHECK_CUDA(cudaStreamDestroy(stream_));
  EP_CHECK_CUDA(cudaFree(scratch_));
  EP_CHECK_CUDA(cudaFree(group_.state));
  EP_CHECK_CUDA(cudaFree(expert_tables_));
  EP_CHECK_CUDA(cudaFreeHost(records_));
}

void Buffer::check_usable() const {
  EP_CHECK(!is_destroyed_, "this buffer was destroyed and cannot be used any more");
  if (!failure_.empty())
    throw DeviceError("this buffer failed and cannot be used any more: " + failure_);
}

void Buffer::fail(const std::string& why) {
  if (failure_.empty()) failure_ = why;
}

/// Takes a record, chooses the stream of the call, and makes it wait for what the call has to come
/// after: the call before it, the caller's work, and work that uses memory which is free since.
int64_t Buffer::begin_call(const CallOrder& order) {
  CallRecord& record = *record_of(num_calls_);
  wait_for_record(record);
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  EP_CHECK_CUDA(cudaStreamIsCapturing(order.caller, &capture));
  const bool is_captured = capture != cudaStreamCaptureStatusNone;
  // NOTE: a call that its caller waits for anyway runs on the caller's stream: each of the two hops
  // between streams would cost as much as a launch.
  const cudaStream_t stream = order.is_async || !order.follows_caller ? stream_ : order.caller;
  if (num_calls_ > 0 && last_.stream != stream && last_.is_captured == is_captured)
    EP_CHECK_CUDA(cudaStreamWaitEvent(stream, end_event(num_calls_ - 1), 0));
  if (order.previous) EP_CHECK_CUDA(cudaStreamWaitEvent(stream, order.previous, 0));
  if (order.follows_caller && stream != order.caller) {
    EP_CHECK_CUDA(cudaEventRecord(begin_event_, order.caller));
    EP_CHECK_CUDA(cudaStreamWaitEvent(stream, begin_event_, 0));
  }
  for (auto& [freeing, freed] : freed_) {
    // What was freed before a capture began is not in use any more when its graph runs.
    if (!freed.is_pending || is_captured || (freeing == order.caller && order.follows_caller))
      continue;
    EP_CHECK_CUDA(cudaStreamWaitEvent(stream, freed.event, 0));
    freed.is_pending = false;
  }
  last_ = {stream, is_captured};
  record.has_sizes = 0;
  std::fill_n(record.stamps, kNumStamps, uint64_t{0});
  if (!is_captured)  // it runs when its graph does, if ever
    __atomic_store_n(&record.status, static_cast<int32_t>(CallStatus::kRunning), __ATOMIC_RELEASE);
  return num_calls_++;
}

void Buffer::wait_for_record(const CallRecord& record) const {
  const auto deadline = Clock::now() + std::chrono::microseconds(2 * config_.timeout_us);
  while (__atomic_load_n(&record.status, __ATOMIC_ACQUIRE) ==
         static_cast<int32_t>(CallStatus::kRunning)) {
    if (Clock::now() > deadline)
      throw DeviceError(concat("call ", num_calls_ - kNumRecords, " is still under way after ",
                               2e-6 * static_cast<double>(config_.timeout_us),
                               " s and holds a record that a new call needs"));
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
}

void Buffer::finish_call(int64_t call, const CallOrder& order) {
  launch_finish(group_, record_of(call), last_.stream);
  end_call(call, order);
}

/// The kernel that finishes the call has been launched.
void Buffer::end_call(int64_t call, const CallOrder& order) {
  EP_CHECK_CUDA(cudaEventRecord(end_event(call), last_.stream));
  if (!order.is_async && last_.stream != order.caller)
    EP_CHECK_CUDA(cudaStreamWaitEvent(order.caller, end_event(call), 0));
}

void Buffer::note_free(cudaStream_t stream) {
  if (is_destroyed_) return;
  DeviceGuard guard(config_.device);
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  EP_CHECK_CUDA(cudaStreamIsCapturing(stream, &capture));
  if (capture != cudaStreamCaptureStatusNone) return;
  Freed& freed = freed_[stream];
  if (!freed.event) EP_CHECK_CUDA(cudaEventCreateWithFlags(&freed.event, cudaEventDisableTiming));
  EP_CHECK_CUDA(cudaEventRecord(freed.event, stream));
  freed.is_pending = true;
}

void Buffer::wait_for_freed(cudaStream_t stream) {
  if (is_destroyed_) return;
  DeviceGuard guard(config_.device);
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  EP_CHECK_CUDA(cudaStreamIsCapturing(stream, &capture));
  if (capture != cudaStreamCaptureStatusNone) return;
  for (const auto& [freeing, freed] : freed_)
    if (freeing != stream) EP_CHECK_CUDA(cudaStreamWaitEvent(stream, freed.event, 0));
}

int32_t* Buffer::scratch(int64_t num_tokens) {
  const int64_t needed = (num_chunks(num_tokens) + 1) * (config_.num_ranks + num_experts());
  if (needed > scratch_elements_) {
    EP_CHECK_CUDA(cudaDeviceSynchronize());
    EP_CHECK_CUDA(cudaFree(scratch_));
    allocate_device(&scratch_, static_cast<size_t>(needed) * sizeof(int32_t));
    scratch_elements_ = needed;
  }
  return scratch_;
}

PostArgs Buffer::make_post(Op op, const HtSizes& sizes) const {
  PostArgs post{};
  fill_fields(op, sizes, post.fields);
  post.capacity = sizes.capacity;
  return post;
}

void Buffer::launch_routing(int64_t call, const HtDispatchArgs& args, const PostArgs& post) {
  int32_t* memory = scratch(args.sizes.num_tokens);
  launch_notify(group_, args, post, memory, record_of(call), last_.stream);
  launch_plan(group_, args, memory, last_.stream);
}

int64_t Buffer::dispatch_fresh(HtDispatchArgs args, const RowBytes& row_bytes,
                               const CallOrder& order, Received* received) {
  check_usable();
  validate(args);
  DeviceGuard guard(config_.device);
  const int64_t call = begin_call(order);
  launch_routing(call, args, make_post(Op::kDispatch, args.sizes));
  if (!wait_for_sizes(call)) {
    finish_call(call, order);
    wait(call);
    throw DeviceError("the exchange of counts ended without a result");
  }
  std::string problem;
  try {
    received->allocate(pool_, row_bytes, record_of(call)->recv_sizes[0]);
  } catch (const DeviceError& error) {  // every rank has to learn of it
    problem = error.what();
  }
  args.recv_x = received->x.offset;
  args.recv_scales = received->scales.offset;
  args.recv_topk_idx = received->topk_idx.offset;
  args.recv_topk_weights = received->topk_weights.offset;
  Offer offer = recv_offer(args);
  offer.failed = !problem.empty();
  launch_offer(group_, offer, record_of(call), last_.stream);
  launch_send(group_, args, record_of(call), last_.stream);
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
    const cudaError_t state = cudaStreamQuery(last_.stream);
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
  const int64_t call = begin_call(order);
  const bool is_fresh = args.sizes.handle_seq < 0;
  PostArgs post = make_post(is_fresh ? Op::kDispatch : Op::kCachedDispatch, args.sizes);
  post.offer = recv_offer(args);
  if (is_fresh) {
    launch_routing(call, args, post);
  } else {
    launch_post(group_, post, record_of(call), last_.stream);
  }
  launch_send(group_, args, record_of(call), last_.stream);
  end_call(call, order);
  return call;
}

int64_t Buffer::combine(const HtCombineArgs& args, const CallOrder& order) {
  check_usable();
  validate(args);
  DeviceGuard guard(config_.device);
  const int64_t call = begin_call(order);
  const bool by_expert = static_cast<Layout>(args.sizes.layout) == Layout::kExpertMajor;
  const int64_t weights_per_row = by_expert ? 1 : args.sizes.num_topk;
  const auto stage = [&](int64_t offset, const uint8_t* from, int64_t row_bytes) {
    if (args.num_rows > 0)
      EP_CHECK_CUDA(cudaMemcpyAsync(pool_base() + offset, from,
                                    static_cast<size_t>(args.num_rows * row_bytes),
                                    cudaMemcpyDeviceToDevice, last_.stream));
  };
  if (args.stage_x) stage(args.pool_x, args.x, args.sizes.row_bytes);
  if (args.stage_topk_weights)
    stage(args.pool_topk_weights, args.topk_weights, weights_per_row * args.sizes.weight_bytes);
  PostArgs post = make_post(Op::kCombine, args.sizes);
  post.offer.x = args.pool_x;
  post.offer.topk_weights = args.pool_topk_weights;
  launch_post(group_, post, record_of(call), last_.stream);
  launch_reduce(group_, args, record_of(call), last_.stream);
  end_call(call, order);
  return call;
}

int64_t Buffer::barrier(const CallOrder& order) {
  check_usable();
  DeviceGuard guard(config_.device);
  const int64_t call = begin_call(order);
  launch_post(group_, make_post(Op::kBarrier, HtSizes{}), record_of(call), last_.stream);
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
  launch_post(group_, post, record_of(call), last_.stream);
  finish_call(call, order);
  return call;
}

double Buffer::copy_rate(int num_blocks, int64_t num_bytes, int64_t offset,
                         const CallOrder& order) {
  barrier(order);
  DeviceGuard guard(config_.device);
  const int next = (config_.rank + 1) % config_.num_ranks;
  const CudaEvent begin, end;
  EP_CHECK_CUDA(cudaEventRecord(begin.get(), last_.stream));
  launch_copy(group_.pool(next) + offset + num_bytes, group_.pool(config_.rank) + offset, num_bytes,
              num_blocks, last_.stream);
  EP_CHECK_CUDA(cudaEventRecord(end.get(), last_.stream));
  wait(barrier(order));
  float milliseconds = 0;
  EP_CHECK_CUDA(cudaEventElapsedTime(&milliseconds, begin.get(), end.get()));
  return static_cast<double>(num_bytes) / (1e-3 * static_cast<double>(milliseconds));
}

bool Buffer::is_finished(int64_t call) const {
  return is_destroyed_ || is_too_old(call) ||
         __atomic_load_n(&record_of(call)->status, __ATOMIC_ACQUIRE) !=
             static_cast<int32_t>(CallStatus::kRunning);
}

void Buffer::wait(int64_t call) {
  if (is_destroyed_ || is_too_old(call)) return;
  DeviceGuard guard(config_.device);
  EP_CHECK_CUDA(cudaEventSynchronize(end_event(call)));
  check(call);
}

void Buffer::stamps(int64_t call, uint64_t (&out)[kNumStamps]) const {
  std::fill_n(out, kNumStamps, uint64_t{0});
  if (!is_destroyed_ && !is_too_old(call)) std::copy_n(record_of(call)->stamps, kNumStamps, out);
}

void Buffer::make_stream_wait(int64_t call, cudaStream_t stream) {
  if (is_destroyed_ || is_too_old(call)) return;
  DeviceGuard guard(config_.device);
  EP_CHECK_CUDA(cudaStreamWaitEvent(stream, end_event(call), 0));
}

void Buffer::check(int64_t call) {
  if (is_destroyed_ || is_too_old(call)) return;
  const CallRecord& record = *record_of(call);
  const auto status = static_cast<CallStatus>(__atomic_load_n(&record.status, __ATOMIC_ACQUIRE));
  if (status != CallStatus::kOk && status != CallStatus::kRunning) throw_error(record);
}

void Buffer::throw_error(const CallRecord& record) {
  const bool is_own = record.rank == config_.rank;
  const std::string who = is_own ? "" : concat("rank ", record.rank, " refused this call: ");
  switch (static_cast<CallStatus>(record.status)) {
    case CallStatus::kDisagree:
      throw DisagreementError(disagreement(static_cast<int>(record.detail[0]), record.detail[1],
                                           record.rank, record.detail[2]));
    case CallStatus::kRefused:
      throw DisagreementError(who + record.text);
    case CallStatus::kBadExpert:
    case CallStatus::kTwice:
      throw DisagreementError(who + bad_choice(record, num_experts()));
    case CallStatus::kTooManyRows:
      throw DisagreementError(concat("rank ", record.rank, " would receive ", record.detail[0],
                                     " rows; 2^31 is the limit"));
    case CallStatus::kNoMemory:
      throw DeviceError(
          concat("rank ", record.rank, " has no memory for its rows: its pool is full"));
    case CallStatus::kTimeout: {
      const TimeoutRecord& timeout = record.timeout;
      const std::string message =
          concat(peer_problem(timeout.peer), "rank ", timeout.rank, " waited up to ",
                 static_cast<double>(config_.timeout_us) * 1e-6, " s for rank ", timeout.peer, " ",
                 phase_name(static_cast<Phase>(timeout.phase)), ": expected ", timeout.expected,
                 ", seen ", timeout.seen);
      failure_ = message;
      throw TimeoutError(message, timeout);
    }
    default:
      throw DeviceError("this buffer failed and cannot be used any more: " + failure_);
  }
}

/// What peers have said that explains why a wait for `culprit` ended, or nothing.
std::string Buffer::peer_problem(int culprit) const {
  std::vector<PeerLine> lines(config_.num_ranks);
  EP_CHECK_CUDA(cudaMemcpy(lines.data(), pool_->segment + group_.layout().peer_lines,
                           lines.size() * sizeof(PeerLine), cudaMemcpyDeviceToHost));
  if (lines[culprit].departed) return concat("rank ", culprit, " has destroyed its buffer; ");
  for (int peer = 0; peer < config_.num_ranks; ++peer) {
    const PeerLine& line = lines[peer];
    if (peer != config_.rank && line.failed && line.culprit == culprit)
      return concat("rank ", peer, " gave up on rank ", culprit, ", which it had asked ",
                    phase_name(static_cast<Phase>(line.culprit_phase)), "; ");
  }
  return "";
}

}  // namespace ep::cuda
