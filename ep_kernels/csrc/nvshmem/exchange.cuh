#pragma once

#include <nvshmem.h>
#include <nvshmemx.h>

#include "nvshmem/streams.cuh"

// The exchange of a lane: every block serves one channel, until all pieces of all peers have moved.
//
//   begin    pieces of this exchange, by peer and direction
//   choose   a stream that can go on; the deadline, if none can
//   send     producer fills a slot, put with signal                     (arrived = n + 1 at the
//   peer) receive  consumer reads a slot, credit                               (credit = n + 1 at
//   the peer) end      all is sent and read by the peers
//
// A producer is called by all threads of a block as producer(piece, payload) and fills the sections
// of a piece; a consumer as consumer(piece, payload) and reads them. The consumer may do more than
// copy: write rows to their final places in other memory, or add them up.
//
// NOTE: slots are written by peers while the kernel runs, so a consumer reads them past the
// first-level cache; one that reads them by bulk copies has to order these behind the arrival by a
// proxy fence.

namespace ep::nvshmem {

constexpr int kExchangeThreads = 512;

/// What travels together.
struct Piece {
  const LaneExchangeArgs& args;
  PieceLayout layout;
  int node;             ///< the other end
  int64_t first_entry;  ///< of `tokens` (producer), row of `dst` (consumer)
  int64_t num_tokens;
};

/// All threads.
__device__ inline Piece next_piece(const Channel& channel, int s, const LaneExchangeArgs& args,
                                   int64_t tokens_per_piece) {
  const LaneCounts& counts = args.counts[channel.peer(s)];
  const bool is_send = channel.is_send(s);
  const int64_t index = channel.index + channel.streams[s].done * channel.lane.layout.num_channels;
  const Range range =
      tokens_of_piece(index, is_send ? counts.num_sent : counts.num_received, tokens_per_piece);
  int64_t bytes[kMaxLaneSections];
  for (int i = 0; i < kMaxLaneSections; ++i) bytes[i] = args.sections[i].bytes;
  const int64_t first = (is_send ? counts.send_first : counts.recv_first) + range.begin;
  const int64_t num_tokens = range.end - range.begin;
  return {args, PieceLayout(bytes, num_tokens), channel.peer(s), first, num_tokens};
}

/// One thread: gives up for all blocks of this exchange and says so to the peers. The first counts.
__device__ inline void give_up(const Channel& channel, LaneStatus status, int peer, int culprit,
                               const Awaited& what) {
  const DeviceLane& lane = channel.lane;
  if (atomicExch(lane.failed, 1u) != 0) return;
  LaneRecord& record = *lane.record;
  record.peer = peer;
  record.culprit = culprit;
  record.channel = channel.index;
  record.expected = what.expected;
  record.seen = what.seen;
  store_word(&record.status, static_cast<uint32_t>(status));
  for (int place = 0; place < channel.num_peers(); ++place) {
    const int to = RingLayout::peer_at(lane.node, place);
    nvshmemx_signal_op(channel.word_at(lane.layout.farewells, RingLayout::place_of(to, lane.node)),
                       static_cast<uint64_t>(culprit) + 1, NVSHMEM_SIGNAL_SET, lane.pes[to]);
  }
}

/// One thread, while stream `s` waits: whether it may go on waiting.
__device__ inline bool may_wait(const Channel& channel, int s, uint64_t waiting_since) {
  const DeviceLane& lane = channel.lane;
  if (load_word(lane.failed) != 0) return false;
  for (int place = 0; place < channel.num_peers(); ++place) {
    const uint64_t said = load_flag(channel.word_at(lane.layout.farewells, place));
    if (said == 0) continue;
    const int peer = RingLayout::peer_at(lane.node, place);
    give_up(channel, LaneStatus::kFarewell, peer, static_cast<int>(said - 1), awaited(channel, s));
    return false;
  }
  if (now_ns() - waiting_since < lane.timeout_ns) return true;
  const auto status = channel.is_send(s) ? LaneStatus::kNoCredit : LaneStatus::kNoArrival;
  give_up(channel, status, channel.peer(s), channel.peer(s), awaited(channel, s));
  return false;
}

constexpr int kNoStream = -1;

/// All threads: a stream that can go on, `after` the one before so that none is left out; kNoStream
/// when all are finished or the exchange was given up.
__device__ inline int choose_stream(const Channel& channel, int after) {
  constexpr int kNone = INT32_MAX;
  constexpr int kLooksPerClock = 16;
  __shared__ int ready, waiting, is_over;
  const int num_streams = channel.num_streams();
  const uint64_t since = now_ns();
  for (int look = 1;; ++look) {
    if (threadIdx.x == 0) ready = waiting = kNone, is_over = 0;
    __syncthreads();
    for (int s = threadIdx.x; s < num_streams; s += blockDim.x) {
      const Readiness found = look_at(channel, s);
      if (found == Readiness::kReady)
        atomicMin(&ready, (s - after - 1 + num_streams) % num_streams);
      if (found == Readiness::kWaiting) atomicMin(&waiting, s);
    }
    __syncthreads();
    if (threadIdx.x == 0 && ready == kNone && waiting != kNone && look % kLooksPerClock == 0)
      is_over = !may_wait(channel, waiting, since);
    __syncthreads();
    const int distance = ready;
    const bool is_last = is_over != 0 || waiting == kNone;
    __syncthreads();
    if (distance != kNone) return (after + 1 + distance) % num_streams;
    if (is_last) return kNoStream;
  }
}

/// All threads: puts one piece. Readers of the staged bytes are this node's network card or copy.
template <typename Producer>
__device__ inline void send_piece(const Channel& channel, int s, const Piece& piece,
                                  const Producer& producer) {
  const DeviceLane& lane = channel.lane;
  const uint64_t n = channel.streams[s].next();
  const int pe = lane.pes[piece.node];
  const size_t slot_there = channel.slot_at_peer(s, n);
  uint8_t* there = channel.slot_bytes(lane.layout.received, slot_there);
  uint64_t* arrived = channel.word_at(lane.layout.arrived, slot_there);
  uint8_t* direct = lane.is_direct ? static_cast<uint8_t*>(nvshmem_ptr(there, pe)) : nullptr;
  uint8_t* staged =
      channel.slot_bytes(lane.layout.staged, lane.layout.slot(channel.place(s), channel.index, n));
  uint8_t* packed = direct ? direct : staged;
  producer(piece, packed);
  if (threadIdx.x == 0)
    *reinterpret_cast<PieceHeader*>(packed) = {piece.layout.num_bytes, piece.num_tokens};
  // Order: each thread's stores, its fence, the barrier; then the put or the signal.
  __threadfence_system();
  __syncthreads();
  if (!direct) {
    nvshmemx_putmem_signal_nbi_block(there, staged, piece.layout.num_bytes, arrived, told_of(n),
                                     NVSHMEM_SIGNAL_SET, pe);
  } else if (threadIdx.x == 0) {
    nvshmemx_signal_op(arrived, told_of(n), NVSHMEM_SIGNAL_SET, pe);
  }
}

/// All threads: reads one piece that has arrived; false if it is not what was expected.
template <typename Consumer>
__device__ inline bool receive_piece(const Channel& channel, int s, const Piece& piece,
                                     const Consumer& consumer) {
  const DeviceLane& lane = channel.lane;
  const uint64_t n = channel.streams[s].next();
  const size_t slot_here = lane.layout.slot(channel.place(s), channel.index, n);
  const uint8_t* arrived = channel.slot_bytes(lane.layout.received, slot_here);
  __shared__ int is_expected;
  if (threadIdx.x == 0) {
    // NOTE: the word has the value already. NVSHMEM's test of it gives the order of bytes which a
    // network card wrote; its wait for a signal does not.
    nvshmem_uint64_test(channel.word(s, n), NVSHMEM_CMP_GE, told_of(n));
    load_flag(channel.word(s, n));
    const longlong2 header = __ldcg(reinterpret_cast<const longlong2*>(arrived));
    is_expected = header.x == piece.layout.num_bytes && header.y == piece.num_tokens;
    if (!is_expected)
      give_up(channel, LaneStatus::kMismatch, piece.node, piece.node,
              {piece.layout.num_bytes, header.x});
  }
  __syncthreads();
  if (!is_expected) return false;
  consumer(piece, arrived);
  // Order: each thread's loads, the barrier, a fence; then the credit.
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence_system();
    nvshmemx_signal_op(channel.word_at(lane.layout.credit, channel.slot_at_peer(s, n)), told_of(n),
                       NVSHMEM_SIGNAL_SET, lane.pes[piece.node]);
  }
  return true;
}

/// All threads of a block: its channel's part of an exchange.
template <typename Producer, typename Consumer>
__device__ inline void exchange_channel(const Channel& channel, const LaneExchangeArgs& args,
                                        int64_t tokens_per_piece, const Producer& producer,
                                        const Consumer& consumer) {
  if (load_word(channel.lane.failed) != 0) return;
  begin_streams(channel, args.counts, tokens_per_piece);
  int s = channel.num_streams() - 1;
  while ((s = choose_stream(channel, s)) != kNoStream) {
    const Piece piece = next_piece(channel, s, args, tokens_per_piece);
    if (channel.is_send(s))
      send_piece(channel, s, piece, producer);
    else if (!receive_piece(channel, s, piece, consumer))
      break;
    __syncthreads();
    if (threadIdx.x == 0) ++channel.streams[s].done;
  }
  __syncthreads();
  end_streams(channel);
}

}  // namespace ep::nvshmem
