// Exchanges between threads through the rings of a lane: PEs are blocks of memory, blocks of a
// kernel are threads, puts are copies. Prints "ok", or what is wrong.
//
//   lane_ring NUM_PES NUM_CHANNELS NUM_SLOTS STAGING_BYTES SEED

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "core/lane_stream.h"

namespace {

using ep::LaneStream;
using ep::Readiness;
using ep::RingLayout;

constexpr int64_t kBytes[ep::kMaxLaneSections] = {48, 4, 0, 7};
constexpr int64_t kRowBytes = 48 + 4 + 7;
constexpr int kNumExchanges = 12;

std::atomic<const char*> problem{nullptr};

void check(bool is_right, const char* text) {
  if (!is_right) problem = text;
}

uint64_t load(const uint8_t* word) {
  return __atomic_load_n(reinterpret_cast<const uint64_t*>(word), __ATOMIC_ACQUIRE);
}

void store(uint8_t* word, uint64_t value) {
  const uint64_t before = __atomic_exchange_n(reinterpret_cast<uint64_t*>(word), value,  //
                                              __ATOMIC_RELEASE);
  check(before < value, "a word did not grow");
}

struct Pe {
  std::vector<uint8_t> heap;
  std::vector<uint64_t> sent, received;  // [channel][place]
};

struct World {
  RingLayout layout;
  std::vector<Pe> pes;
  std::vector<std::vector<std::vector<int64_t>>> counts;  // [exchange][from][to]
};

/// The byte that PE `from` sends to PE `to` in a place of a token.
uint8_t expected_byte(int exchange, int from, int to, int64_t token, int64_t place) {
  return static_cast<uint8_t>(exchange * 31 + from * 7 + to * 13 + token * 3 + place);
}

/// One channel of one PE: what a block of the kernel does.
struct Block {
  World& world;
  int pe, channel;
  std::mt19937 random;

  const RingLayout& layout() const { return world.layout; }
  Pe& own() { return world.pes[pe]; }

  uint8_t* word(int owner, size_t region, int peer, uint64_t n) {
    const int place = RingLayout::place_of(owner, peer);
    return world.pes[owner].heap.data() + region +
           sizeof(uint64_t) * layout().slot(place, channel, n);
  }
  uint8_t* slot(int owner, size_t region, int peer, uint64_t n) {
    const int place = RingLayout::place_of(owner, peer);
    return world.pes[owner].heap.data() + region +
           static_cast<size_t>(layout().slot_bytes) * layout().slot(place, channel, n);
  }

  void send(int exchange, int peer, const LaneStream& stream, int64_t num_tokens, int64_t per) {
    const int64_t index = channel + stream.done * layout().num_channels;
    const ep::Range range = ep::tokens_of_piece(index, num_tokens, per);
    const ep::PieceLayout piece(kBytes, range.end - range.begin);
    uint8_t* staged = slot(pe, layout().staged, peer, stream.next());
    const ep::PieceHeader header{piece.num_bytes, range.end - range.begin};
    std::memcpy(staged, &header, sizeof(header));
    for (int64_t token = range.begin; token < range.end; ++token)
      for (int i = 0, place = 0; i < ep::kMaxLaneSections; ++i)
        for (int64_t byte = 0; byte < kBytes[i]; ++byte, ++place)
          staged[piece.sections[i] + (token - range.begin) * kBytes[i] + byte] =
              expected_byte(exchange, pe, peer, token, place);
    check(piece.num_bytes <= layout().slot_bytes, "a piece is larger than its slot");
    std::memcpy(slot(peer, layout().received, pe, stream.next()), staged, piece.num_bytes);
    store(word(peer, layout().arrived, pe, stream.next()), ep::told_of(stream.next()));
  }

  void receive(int exchange, int peer, const LaneStream& stream, int64_t num_tokens, int64_t per) {
    const int64_t index = channel + stream.done * layout().num_channels;
    const ep::Range range = ep::tokens_of_piece(index, num_tokens, per);
    const ep::PieceLayout piece(kBytes, range.end - range.begin);
    const uint8_t* arrived = slot(pe, layout().received, peer, stream.next());
    ep::PieceHeader header{};
    std::memcpy(&header, arrived, sizeof(header));
    check(range.begin < range.end && range.end <= num_tokens,
          "a piece has tokens that are not there");
    check(header.num_bytes == piece.num_bytes, "a piece has other bytes than expected");
    check(header.num_tokens == range.end - range.begin, "a piece has other tokens than expected");
    if (random() % 8 == 0) std::this_thread::yield();
    for (int64_t token = range.begin; token < range.end; ++token)
      for (int i = 0, place = 0; i < ep::kMaxLaneSections; ++i)
        for (int64_t byte = 0; byte < kBytes[i]; ++byte, ++place)
          check(arrived[piece.sections[i] + (token - range.begin) * kBytes[i] + byte] ==
                    expected_byte(exchange, peer, pe, token, place),
                "a byte is wrong");
    store(word(peer, layout().credit, pe, stream.next()), ep::told_of(stream.next()));
  }

  void run() {
    const int64_t per = ep::tokens_that_fit(kBytes, layout().slot_bytes);
    const int num_peers = layout().num_peers();
    for (int exchange = 0; exchange < kNumExchanges; ++exchange) {
      const auto& counts = world.counts[exchange];
      std::vector<LaneStream> streams(2 * num_peers);
      for (int s = 0; s < 2 * num_peers; ++s) {
        const bool is_send = s < num_peers;
        const int place = s % num_peers, peer = RingLayout::peer_at(pe, place);
        const int64_t num_tokens = is_send ? counts[pe][peer] : counts[peer][pe];
        const int64_t total =
            ep::pieces_of_channel(ep::num_pieces(num_tokens, per), channel, layout().num_channels);
        const size_t state = channel * num_peers + place;
        streams[s] = {is_send ? own().sent[state] : own().received[state], total, 0, 0};
      }
      while (!exchange_some(exchange, streams, per))
        if (problem) return;
      for (int place = 0; place < num_peers; ++place) {
        own().sent[channel * num_peers + place] = streams[place].next();
        own().received[channel * num_peers + place] = streams[num_peers + place].next();
      }
    }
  }

  /// Does what can be done; true when nothing is left.
  bool exchange_some(int exchange, std::vector<LaneStream>& streams, int64_t per) {
    const int num_peers = layout().num_peers();
    const auto& counts = world.counts[exchange];
    bool is_finished = true;
    for (int i = 0; i < 2 * num_peers; ++i) {
      const int s = static_cast<int>((random() + i) % streams.size());
      const bool is_send = s < num_peers;
      const int peer = RingLayout::peer_at(pe, s % num_peers);
      const size_t region = is_send ? layout().credit : layout().arrived;
      const auto look = [&](uint64_t n) { return load(word(pe, region, peer, n)); };
      const Readiness found = is_send ? ep::look_at_send(streams[s], layout().num_slots, look)
                                      : ep::look_at_recv(streams[s], look);
      if (found != Readiness::kReady) continue;
      if (is_send)
        send(exchange, peer, streams[s], counts[pe][peer], per);
      else
        receive(exchange, peer, streams[s], counts[peer][pe], per);
      ++streams[s].done;
    }
    for (int s = 0; s < 2 * num_peers; ++s) {
      const int peer = RingLayout::peer_at(pe, s % num_peers);
      const size_t region = s < num_peers ? layout().credit : layout().arrived;
      const auto look = [&](uint64_t n) { return load(word(pe, region, peer, n)); };
      const Readiness found = s < num_peers ? ep::look_at_send(streams[s], layout().num_slots, look)
                                            : ep::look_at_recv(streams[s], look);
      is_finished &= found == Readiness::kFinished;
    }
    if (!is_finished) std::this_thread::yield();
    return is_finished;
  }
};

World make_world(int num_pes, int num_channels, int num_slots, int64_t staging_bytes,
                 std::mt19937& random) {
  const int64_t slot_bytes = ep::slot_bytes_within(staging_bytes, num_pes, num_channels, num_slots);
  World world{{num_pes, num_channels, num_slots, slot_bytes}, {}, {}};
  const int64_t beside_words =
      static_cast<int64_t>(world.layout.num_bytes - world.layout.word_bytes());
  check(beside_words <= staging_bytes, "the rings take more than staging_bytes");
  const size_t num_states = static_cast<size_t>(num_channels) * (num_pes - 1);
  for (int pe = 0; pe < num_pes; ++pe)
    world.pes.push_back({std::vector<uint8_t>(world.layout.num_bytes),
                         std::vector<uint64_t>(num_states), std::vector<uint64_t>(num_states)});
  const int64_t per = ep::tokens_that_fit(kBytes, slot_bytes);
  check(per > 0, "a slot holds no token");
  const int64_t ring = per * num_channels * num_slots;
  const int64_t sizes[] = {0, 1, per, per + 1, ring - 1, ring, ring + 1, 5 * ring + 3};
  world.counts.resize(kNumExchanges);
  for (auto& counts : world.counts) {
    counts.assign(num_pes, std::vector<int64_t>(num_pes));
    for (auto& row : counts)
      for (auto& count : row) count = sizes[random() % std::size(sizes)];
  }
  return world;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 6) return 2;
  const auto number = [&](int i) { return std::atoll(argv[i]); };
  std::mt19937 random(static_cast<unsigned>(number(5)));
  World world = make_world(static_cast<int>(number(1)), static_cast<int>(number(2)),
                           static_cast<int>(number(3)), number(4), random);
  std::vector<std::thread> threads;
  for (int pe = 0; pe < world.layout.num_nodes && !problem; ++pe)
    for (int channel = 0; channel < world.layout.num_channels; ++channel)
      threads.emplace_back([&world, pe, channel, seed = random()] {
        Block{world, pe, channel, std::mt19937(static_cast<unsigned>(seed))}.run();
      });
  for (auto& thread : threads) thread.join();
  std::puts(problem ? problem.load() : "ok");
  return problem ? 1 : 0;
}
