#pragma once

#include <cstddef>
#include <cstdint>

#include "core/layout.h"
#include "core/macros.h"
#include "core/math.h"

// Rings between the nodes of a lane, one rank on each: bounded memory through which messages of any
// length pass in pieces. Only arithmetic; nvshmem/exchange.cuh moves the bytes.
//
// From every node to every other go `num_channels` rings of `num_slots` slots. Piece i of a message
// goes through channel i mod num_channels, and each channel is served by one block at either end.
// Pieces of a channel are numbered n = 0, 1, ... for as long as the lane lives; n uses slot
// n mod num_slots, whose two words only grow:
//
//   arrived[slot] = n + 1   at the receiver, written by the sender with the bytes of piece n
//   credit[slot]  = n + 1   at the sender, written by the receiver when it has read piece n
//
// A slot is written again only after its credit, so each word has one store under way at a time and
// needs no order among stores to different slots.

namespace ep {

constexpr size_t kPieceAlignment = 16;
constexpr int kMaxLaneSections = 4;

/// What a sender says about a piece, at its beginning.
struct PieceHeader {
  int64_t num_bytes;  ///< with this header
  int64_t num_tokens;
};
static_assert(sizeof(PieceHeader) == kPieceAlignment);

/// Value of `arrived` and of `credit` that tells of piece n.
EP_HOST_DEVICE constexpr uint64_t told_of(uint64_t n) { return n + 1; }

/// Least value of the slot's `credit` that lets piece n be written: that of piece n - num_slots.
/// Example: 4 slots; pieces 0 to 3 need 0, piece 4 needs told_of(0) = 1.
EP_HOST_DEVICE constexpr uint64_t credit_for(uint64_t n, int num_slots) {
  const auto window = static_cast<uint64_t>(num_slots);
  return n < window ? 0 : told_of(n - window);
}

/// Pieces that a message has.
EP_HOST_DEVICE constexpr int64_t num_pieces(int64_t num_tokens, int64_t tokens_per_piece) {
  return ceil_div(num_tokens, tokens_per_piece);
}

/// Those of them that go through `channel`.
/// Example: 5 pieces, 2 channels: pieces 0, 2, 4 through channel 0 and 1, 3 through channel 1.
EP_HOST_DEVICE constexpr int64_t pieces_of_channel(int64_t num_pieces, int channel,
                                                   int num_channels) {
  return num_pieces <= channel ? 0 : ceil_div<int64_t>(num_pieces - channel, num_channels);
}

/// Tokens of piece `index` of a message, the last piece may be short.
EP_HOST_DEVICE constexpr Range tokens_of_piece(int64_t index, int64_t num_tokens,
                                               int64_t tokens_per_piece) {
  const int64_t begin = index * tokens_per_piece, end = begin + tokens_per_piece;
  return {begin, end < num_tokens ? end : num_tokens};
}

/// Byte offsets inside a piece of `num_tokens` tokens:
///
///   | header | section 0 [num_tokens, bytes 0] | section 1 [num_tokens, bytes 1] | ...
struct PieceLayout {
  int64_t sections[kMaxLaneSections];
  int64_t num_bytes;

  EP_HOST_DEVICE constexpr PieceLayout(const int64_t (&bytes)[kMaxLaneSections], int64_t num_tokens)
      : sections{}, num_bytes(0) {
    Carver carve;
    carve.take(sizeof(PieceHeader), kPieceAlignment);
    for (int i = 0; i < kMaxLaneSections; ++i)
      sections[i] =
          static_cast<int64_t>(carve.take(static_cast<size_t>(bytes[i] * num_tokens), 16));
    num_bytes = static_cast<int64_t>(align_up(carve.end, kPieceAlignment));
  }
};

/// The most tokens that fit into a slot; 0 if not even one does.
constexpr int64_t tokens_that_fit(const int64_t (&bytes)[kMaxLaneSections], int64_t slot_bytes) {
  int64_t per_token = 0;
  for (const int64_t section : bytes) per_token += section;
  if (per_token == 0) return 0;
  int64_t num_tokens = slot_bytes / per_token;
  while (num_tokens > 0 && PieceLayout(bytes, num_tokens).num_bytes > slot_bytes) --num_tokens;
  return num_tokens;
}

/// Byte offsets of the memory that every node has for its rings, the same on all of them. P peers,
/// C channels, S slots:
///
///   | arrived [P][C][S] | credit [P][C][S] | farewells [P] | received [P][C][S] | staged ... |
///
/// "received" is written by the peers; in "staged" a node packs what it sends.
struct RingLayout {
  int num_nodes, num_channels, num_slots;
  int64_t slot_bytes;
  size_t arrived, credit, farewells, received, staged, num_bytes;

  EP_HOST_DEVICE constexpr RingLayout(int nodes, int channels, int slots, int64_t bytes_of_slot)
      : num_nodes(nodes),
        num_channels(channels),
        num_slots(slots),
        slot_bytes(bytes_of_slot),
        arrived(0),
        credit(0),
        farewells(0),
        received(0),
        staged(0),
        num_bytes(0) {
    const size_t num_all = static_cast<size_t>(num_peers()) * num_channels * num_slots;
    Carver carve;
    arrived = carve.take(sizeof(uint64_t) * num_all);
    credit = carve.take(sizeof(uint64_t) * num_all);
    farewells = carve.take(sizeof(uint64_t) * num_peers());
    received = carve.take(static_cast<size_t>(slot_bytes) * num_all, 128);
    staged = carve.take(static_cast<size_t>(slot_bytes) * num_all, 128);
    num_bytes = align_up(carve.end, size_t{128});
  }

  EP_HOST_DEVICE constexpr int num_peers() const { return num_nodes - 1; }

  /// Bytes of words, which have to be zero at first.
  EP_HOST_DEVICE constexpr size_t word_bytes() const { return received; }

  /// Place of `peer` among the peers of `owner`, and its inverse.
  /// Example: of 4 nodes, node 1 has the peers 0, 2 and 3 at the places 0, 1 and 2.
  EP_HOST_DEVICE static constexpr int place_of(int owner, int peer) {
    return peer < owner ? peer : peer - 1;
  }
  EP_HOST_DEVICE static constexpr int peer_at(int owner, int place) {
    return place < owner ? place : place + 1;
  }

  /// Index of the slot of piece n, among all slots.
  EP_HOST_DEVICE constexpr size_t slot(int place, int channel, uint64_t n) const {
    const size_t ring = static_cast<size_t>(place) * num_channels + channel;
    return ring * num_slots + n % static_cast<uint64_t>(num_slots);
  }
};

/// Bytes of a slot so that all rings of a node together, both directions, take at most
/// `staging_bytes` beside their words, whatever the number of nodes.
constexpr int64_t slot_bytes_within(int64_t staging_bytes, int num_nodes, int num_channels,
                                    int num_slots) {
  const int64_t num_all = int64_t{2} * (num_nodes - 1) * num_channels * num_slots;
  return num_all == 0 ? 0 : staging_bytes / num_all / 128 * 128;
}

}  // namespace ep
