#pragma once

#include "core/lane_stream.h"
#include "cuda/device/sync.cuh"
#include "nvshmem/lane.h"

// What a block of an exchange has to do for each peer, and which of it can be done now.
//
// A block serves its channel towards all peers, in both directions, and waits for none of them
// alone: it does whatever is ready. So ranks make progress as long as one block of each is running,
// and blocks that are not yet on an SM hold up only their own channel.

namespace ep::nvshmem {

using cuda::load_flag;
using cuda::load_word;
using cuda::now_ns;
using cuda::store_word;

/// A block's view of a lane; `streams` in shared memory. Streams 0 to P-1 send to the peer at that
/// place, P to 2 P - 1 receive.
struct Channel {
  const DeviceLane& lane;
  LaneStream* streams;
  int index;

  __device__ __forceinline__ int num_peers() const { return lane.layout.num_peers(); }
  __device__ __forceinline__ int num_streams() const { return 2 * num_peers(); }
  __device__ __forceinline__ bool is_send(int stream) const { return stream < num_peers(); }
  __device__ __forceinline__ int place(int stream) const { return stream % num_peers(); }
  __device__ __forceinline__ int peer(int stream) const {
    return RingLayout::peer_at(lane.node, place(stream));
  }
  /// Word in this node's memory for piece n of a stream: the credit of a send, the arrival of a
  /// recv.
  __device__ __forceinline__ uint64_t* word(int stream, uint64_t n) const {
    const RingLayout& layout = lane.layout;
    const size_t region = is_send(stream) ? layout.credit : layout.arrived;
    return reinterpret_cast<uint64_t*>(lane.heap + region) + layout.slot(place(stream), index, n);
  }
  /// Byte offset of the slot that a peer uses for what it exchanges with this node.
  __device__ __forceinline__ size_t slot_at_peer(int stream, uint64_t n) const {
    return lane.layout.slot(RingLayout::place_of(peer(stream), lane.node), index, n);
  }
  __device__ __forceinline__ uint8_t* slot_bytes(size_t region, size_t slot) const {
    return lane.heap + region + slot * lane.layout.slot_bytes;
  }
  __device__ __forceinline__ uint64_t* word_at(size_t region, size_t slot) const {
    return reinterpret_cast<uint64_t*>(lane.heap + region) + slot;
  }
  __device__ __forceinline__ ChannelState& state(int stream) const {
    return lane.channels[index * num_peers() + place(stream)];
  }
};

/// All threads: what this exchange brings to the channel.
__device__ inline void begin_streams(const Channel& channel, const LaneCounts* counts,
                                     int64_t tokens_per_piece) {
  for (int s = threadIdx.x; s < channel.num_streams(); s += blockDim.x) {
    const LaneCounts& count = counts[channel.peer(s)];
    const ChannelState& state = channel.state(s);
    const int64_t num_tokens = channel.is_send(s) ? count.num_sent : count.num_received;
    const int64_t num_all = num_pieces(num_tokens, tokens_per_piece);
    channel.streams[s] = {
        channel.is_send(s) ? state.sent : state.received,
        pieces_of_channel(num_all, channel.index, channel.lane.layout.num_channels), 0, 0};
  }
  __syncthreads();
}

/// All threads, at the end: where the next exchange goes on.
__device__ inline void end_streams(const Channel& channel) {
  for (int s = threadIdx.x; s < channel.num_streams(); s += blockDim.x) {
    const LaneStream& stream = channel.streams[s];
    ChannelState& state = channel.state(s);
    (channel.is_send(s) ? state.sent : state.received) = stream.first + stream.done;
  }
}

/// Reads the word of a piece in this node's memory.
struct LoadWord {
  const Channel& channel;
  int stream;
  __device__ __forceinline__ uint64_t operator()(uint64_t n) const {
    return load_flag(channel.word(stream, n));
  }
};

/// One thread per stream.
__device__ inline Readiness look_at(const Channel& channel, int s) {
  const LoadWord load{channel, s};
  LaneStream& stream = channel.streams[s];
  return channel.is_send(s) ? look_at_send(stream, channel.lane.layout.num_slots, load)
                            : look_at_recv(stream, load);
}

/// What a waiting stream waits for, and what its word says.
__device__ inline Awaited awaited(const Channel& channel, int s) {
  return awaited_by(channel.streams[s], channel.is_send(s), channel.lane.layout.num_slots,
                    LoadWord{channel, s});
}

}  // namespace ep::nvshmem
