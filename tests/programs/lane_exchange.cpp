// The exchange of an NVSHMEM lane (csrc/nvshmem/exchange.cuh) on the CPU, with what stands in for a
// GPU and for NVSHMEM in gpu_stand_in/. Prints "ok", or what is wrong.
//
//   lane_exchange NUM_PES NUM_CHANNELS NUM_SLOTS STAGING_BYTES rows|bytes staged|direct SEED
//   [SILENT]

#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "nvshmem/rows.cuh"

namespace {

using namespace ep::nvshmem;
using Bytes = std::vector<uint8_t>;

constexpr int kNumExchanges = 4;
constexpr int64_t kNumTokens = 50;
using SectionBytes = int64_t[ep::kMaxLaneSections];
constexpr SectionBytes kBytesOfRows = {160, 0, 12, 3}, kBytesOfByte = {1, 0, 0, 0};
constexpr unsigned kNumThreads = 64;

std::atomic<bool> is_wrong{false};

void check(bool is_right, const std::string& text) {
  if (!is_right && !is_wrong.exchange(true)) std::puts(text.c_str());
}

/// One PE: its memory, and what it sends and receives in one exchange.
struct Pe {
  Bytes heap;
  std::vector<ChannelState> channels;
  uint32_t failed = 0;
  LaneRecord record{};
  std::vector<int32_t> pes;
  Bytes sources[ep::kMaxLaneSections], received[ep::kMaxLaneSections];
  std::vector<int32_t> tokens;
  std::vector<LaneCounts> counts;
};

struct Settings {
  int num_pes, num_channels, num_slots;
  int64_t staging_bytes;
  bool is_bytes, is_direct;
  int silent;

  const SectionBytes& bytes() const { return is_bytes ? kBytesOfByte : kBytesOfRows; }
};

/// Random sources, counts and tokens for all PEs.
void prepare(std::vector<Pe>& pes, const Settings& settings, int64_t tokens_per_ring,
             std::mt19937& random) {
  const int num_pes = static_cast<int>(pes.size());
  const int64_t sizes[] = {0, 1, tokens_per_ring, tokens_per_ring + 1, 3 * tokens_per_ring + 2};
  std::vector<std::vector<int64_t>> counts(num_pes, std::vector<int64_t>(num_pes));
  for (int src = 0; src < num_pes; ++src)
    for (int dst = 0; dst < num_pes; ++dst)
      if (src != dst) counts[src][dst] = sizes[random() % std::size(sizes)];
  for (int pe = 0; pe < num_pes; ++pe) {
    Pe& own = pes[pe];
    own.counts.assign(num_pes, {});
    int64_t num_sent = 0, num_received = 0;
    for (int peer = 0; peer < num_pes; ++peer) {
      own.counts[peer] = {num_sent, counts[pe][peer], num_received, counts[peer][pe]};
      num_sent += counts[pe][peer];
      num_received += counts[peer][pe];
    }
    own.tokens.resize(num_sent);
    for (int64_t entry = 0; entry < num_sent; ++entry)
      own.tokens[entry] = static_cast<int32_t>(settings.is_bytes ? entry : random() % kNumTokens);
    const int64_t num_sources = settings.is_bytes ? num_sent : kNumTokens;
    for (int i = 0; i < ep::kMaxLaneSections; ++i) {
      own.sources[i].resize(num_sources * settings.bytes()[i]);
      for (uint8_t& byte : own.sources[i]) byte = static_cast<uint8_t>(random());
      own.received[i].assign(num_received * settings.bytes()[i] + 1, 0xEE);
    }
  }
}

DeviceLane lane_of(Pe& own, int pe, const Settings& settings, const ep::RingLayout& layout) {
  const uint64_t timeout_ns = settings.silent < 0 ? 10'000'000'000ull : 300'000'000ull;
  return {own.heap.data(), own.channels.data(), &own.failed, &own.record,       own.pes.data(),
          layout,          timeout_ns,          pe,          settings.is_direct};
}

/// All blocks of one PE.
void exchange(Pe& own, int pe, const Settings& settings, const ep::RingLayout& layout) {
  LaneExchangeArgs args{};
  for (int i = 0; i < ep::kMaxLaneSections; ++i)
    args.sections[i] = {own.sources[i].data(), own.received[i].data(), settings.bytes()[i]};
  args.tokens = own.tokens.data();
  args.counts = own.counts.data();
  const int64_t per = ep::tokens_that_fit(settings.bytes(), layout.slot_bytes);
  std::vector<std::thread> blocks;
  for (int channel = 0; channel < layout.num_channels; ++channel)
    blocks.emplace_back([&, channel] {
      own_pe = pe;
      const DeviceLane lane = lane_of(own, pe, settings, layout);
      std::vector<ep::LaneStream> streams(2 * layout.num_peers());
      Fibers().run(kNumThreads, [&] {
        const Channel own_channel{lane, streams.data(), channel};
        if (settings.is_bytes)
          exchange_channel(own_channel, args, per, PackBytes{}, UnpackBytes{});
        else
          exchange_channel(own_channel, args, per, Gather{}, CopyOut{});
      });
    });
  for (std::thread& block : blocks) block.join();
}

void check_received(const std::vector<Pe>& pes, const Settings& settings, int pe) {
  const Pe& own = pes[pe];
  check(own.record.status == 0,
        "PE " + std::to_string(pe) + " gave up: status " + std::to_string(own.record.status));
  for (int i = 0; i < ep::kMaxLaneSections; ++i) {
    Bytes expected;
    for (size_t src = 0; src < pes.size(); ++src) {
      const LaneCounts& sent = pes[src].counts[pe];
      for (int64_t entry = 0; entry < sent.num_sent; ++entry) {
        const int64_t size = settings.bytes()[i];
        const auto row =
            pes[src].sources[i].begin() + pes[src].tokens[sent.send_first + entry] * size;
        expected.insert(expected.end(), row, row + size);
      }
    }
    expected.push_back(0xEE);
    check(own.received[i] == expected,
          "section " + std::to_string(i) + " of PE " + std::to_string(pe) + " is wrong");
  }
}

/// Exchanges in which one PE takes no part: the others name it.
void check_silence(const std::vector<Pe>& pes, int silent) {
  for (int pe = 0; pe < static_cast<int>(pes.size()); ++pe) {
    if (pe == silent) continue;
    const LaneRecord& record = pes[pe].record;
    check(record.status != 0, "PE " + std::to_string(pe) + " did not give up");
    check(record.culprit == silent,
          "PE " + std::to_string(pe) + " blames PE " + std::to_string(record.culprit));
    check(record.expected > record.seen, "what was expected had been seen");
  }
}

void run(const Settings& settings, std::mt19937& random) {
  const int64_t slot_bytes = ep::slot_bytes_within(settings.staging_bytes, settings.num_pes,
                                                   settings.num_channels, settings.num_slots);
  const ep::RingLayout layout(settings.num_pes, settings.num_channels, settings.num_slots,
                              slot_bytes);
  const int64_t per = ep::tokens_that_fit(settings.bytes(), slot_bytes);
  check(per > 0, "a slot holds no token");
  std::vector<Pe> pes(settings.num_pes);
  Network::get().heaps.clear();
  for (Pe& own : pes) {
    own.heap.resize(layout.num_bytes);
    for (int pe = 0; pe < settings.num_pes; ++pe) own.pes.push_back(pe);
    own.channels.resize(static_cast<size_t>(layout.num_channels) * layout.num_peers());
    Network::get().heaps.push_back(own.heap.data());
  }
  Network::get().start(static_cast<unsigned>(random()));
  const int num_exchanges = settings.silent < 0 ? kNumExchanges : 1;
  for (int i = 0; i < num_exchanges && !is_wrong; ++i) {
    do prepare(pes, settings, per * layout.num_channels * layout.num_slots, random);
    while (settings.silent >= 0 && pes[settings.silent].tokens.empty());
    std::vector<std::thread> gpus;
    for (int pe = 0; pe < settings.num_pes; ++pe)
      if (pe != settings.silent)
        gpus.emplace_back([&, pe] { exchange(pes[pe], pe, settings, layout); });
    for (std::thread& gpu : gpus) gpu.join();
    for (int pe = 0; pe < settings.num_pes && settings.silent < 0; ++pe)
      check_received(pes, settings, pe);
  }
  Network::get().stop();
  if (settings.silent >= 0) check_silence(pes, settings.silent);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 8) return 2;
  const auto number = [&](int i) { return std::atoi(argv[i]); };
  const auto is = [&](int i, const char* word) { return std::string(argv[i]) == word; };
  std::mt19937 random(static_cast<unsigned>(number(7)));
  run({number(1), number(2), number(3), number(4), is(5, "bytes"), is(6, "direct"),
       argc > 8 ? number(8) : -1},
      random);
  if (!is_wrong) std::puts("ok");
  return is_wrong ? 1 : 0;
}
