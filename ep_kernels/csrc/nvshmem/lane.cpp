#include "nvshmem/lane.h"

#include <nvshmem_host.h>

#include <atomic>

#include "core/lane_stream.h"
#include "cuda/check_cuda.h"

namespace ep::nvshmem {
namespace {

/// Shared memory of a block without asking for more holds so many streams, two per peer.
constexpr int kMaxNodes = (48 << 10) / (2 * sizeof(LaneStream)) + 1;

/// What a node waited for, for people.
std::string awaited_text(LaneStatus status, const LaneRecord& record) {
  const auto words = concat(" (channel ", record.channel, ": expected ", record.expected, ", seen ",
                            record.seen, ")");
  if (status == LaneStatus::kNoCredit) return concat("to read what was sent to it", words);
  return concat("to send rows", words);
}

RingLayout layout_of(const Lane::Config& config) {
  EP_CHECK(config.num_nodes >= 2, "num_nodes=", config.num_nodes, " is less than 2");
  EP_CHECK(config.num_channels >= 1, "num_blocks=", config.num_channels, " is less than 1");
  EP_CHECK(config.num_slots >= 1, "num_slots=", config.num_slots, " is less than 1");
  const int64_t slot_bytes = slot_bytes_within(config.staging_bytes, config.num_nodes,
                                               config.num_channels, config.num_slots);
  EP_CHECK(slot_bytes > 0, "staging_bytes=", config.staging_bytes, " is too little for ",
           2 * (config.num_nodes - 1), " rings of ", config.num_channels, " channels and ",
           config.num_slots, " slots");
  EP_CHECK(config.num_nodes <= kMaxNodes, "num_nodes=", config.num_nodes, " exceeds ", kMaxNodes);
  return {config.num_nodes, config.num_channels, config.num_slots, slot_bytes};
}

}  // namespace

Lane::Lane(const Config& config)
    : config_(config), device_{{}, {}, {}, {}, {}, layout_of(config), 0, 0, 0} {
  EP_CHECK_CUDA(cudaSetDevice(config.device));
  const RingLayout& layout = device_.layout;
  device_.timeout_ns = static_cast<uint64_t>(config.timeout_us) * 1000;
  device_.node = config.node;
  device_.is_direct = config.is_direct ? 1 : 0;
  device_.heap = static_cast<uint8_t*>(nvshmem_align(128, layout.num_bytes));
  if (device_.heap == nullptr)
    throw DeviceError(concat("the symmetric heap has no ", layout.num_bytes,
                             " bytes left; set NVSHMEM_SYMMETRIC_SIZE before the first buffer"));
  EP_CHECK_CUDA(cudaMemset(device_.heap, 0, layout.word_bytes()));
  const size_t num_states = static_cast<size_t>(layout.num_channels) * layout.num_peers();
  EP_CHECK_CUDA(
      cudaMalloc(reinterpret_cast<void**>(&device_.channels), num_states * sizeof(ChannelState)));
  EP_CHECK_CUDA(cudaMemset(device_.channels, 0, num_states * sizeof(ChannelState)));
  EP_CHECK_CUDA(cudaMalloc(reinterpret_cast<void**>(&device_.failed), sizeof(uint32_t)));
  EP_CHECK_CUDA(cudaMemset(device_.failed, 0, sizeof(uint32_t)));
  EP_CHECK_CUDA(cudaHostAlloc(reinterpret_cast<void**>(&device_.record), sizeof(LaneRecord),
                              cudaHostAllocMapped));
  *device_.record = {};
  const size_t pes_bytes = config.pes.size() * sizeof(int32_t);
  EP_CHECK_CUDA(cudaMalloc(reinterpret_cast<void**>(&pes_), pes_bytes));
  EP_CHECK_CUDA(cudaMemcpy(pes_, config.pes.data(), pes_bytes, cudaMemcpyHostToDevice));
  device_.pes = pes_;
  EP_CHECK_CUDA(cudaDeviceSynchronize());
}

Lane::~Lane() {
  if (is_destroyed_) return;
  // NOTE: symmetric memory is given back by destroy() only, as that needs all PEs.
  free_own_memory();
}

void Lane::exchange(const LaneExchangeArgs& args, cudaStream_t stream) {
  start(args, false, stream);
}

void Lane::exchange_bytes(const LaneExchangeArgs& args, cudaStream_t stream) {
  start(args, true, stream);
}

void Lane::start(const LaneExchangeArgs& args, bool is_bytes, cudaStream_t stream) {
  EP_CHECK(!is_destroyed_, "the lane was destroyed");
  check();
  int64_t bytes[kMaxLaneSections], largest = 0;
  for (int i = 0; i < kMaxLaneSections; ++i) {
    bytes[i] = args.sections[i].bytes;
    EP_CHECK(bytes[i] >= 0, "bytes=", bytes[i], " of section ", i, " are negative");
    largest += bytes[i];
  }
  EP_CHECK(largest > 0, "an exchange without sections");
  const int64_t tokens_per_piece = tokens_that_fit(bytes, device_.layout.slot_bytes);
  EP_CHECK(tokens_per_piece > 0, "staging_bytes=", config_.staging_bytes, " make slots of ",
           device_.layout.slot_bytes, " bytes; a token takes ", PieceLayout(bytes, 1).num_bytes);
  launch_exchange(device_, args, tokens_per_piece, is_bytes, stream);
}

bool Lane::has_failed() const {
  return reinterpret_cast<const std::atomic<uint32_t>&>(device_.record->status)
             .load(std::memory_order_acquire) != 0;
}

void Lane::check() const {
  if (is_destroyed_ || !has_failed()) return;
  const LaneRecord& record = *device_.record;
  const auto status = static_cast<LaneStatus>(record.status);
  const int rank = config_.ranks[config_.node], peer = config_.ranks[record.peer];
  if (status == LaneStatus::kMismatch)
    throw DisagreementError(concat("rank ", peer, " sent a piece of ", record.seen,
                                   " bytes to rank ", rank, ", which expected ", record.expected));
  const TimeoutRecord known{rank, 4, config_.ranks[record.culprit], record.expected, record.seen};
  std::string text =
      concat("rank ", rank, " waited for rank ", peer, " ", awaited_text(status, record));
  if (status == LaneStatus::kFarewell)
    text += concat("; rank ", peer, " gave up on rank ", known.peer);
  else
    text += concat("; nothing came for ", static_cast<double>(config_.timeout_us) / 1e6, " s");
  throw TimeoutError(text, known);
}

void Lane::free_own_memory() {
  cudaFree(device_.channels);
  cudaFree(device_.failed);
  cudaFree(pes_);
  cudaFreeHost(device_.record);
}

void Lane::destroy() {
  if (is_destroyed_) return;
  EP_CHECK_CUDA(cudaSetDevice(config_.device));
  EP_CHECK_CUDA(cudaDeviceSynchronize());
  const bool is_collective = !has_failed();
  is_destroyed_ = true;
  free_own_memory();
  if (is_collective) nvshmem_free(device_.heap);
}

}  // namespace ep::nvshmem
