// Random collectives over meshes of 2 to 4 ranks that are threads of one process, so that the sanitizers see every
// access of every rank; the connections go over the loopback interface.
//
//   colltensor_gloo_stress [seconds] [seed]
//
// At first connections are reset (gloo_resets.cpp) and a rank leaves over a slow link (gloo_farewell.cpp). Every result
// is compared with one computed alone. In every second mesh a rank leaves, is closed by another thread, is stopped or is
// interrupted while the others call: all their calls must end by themselves, and Gloo may touch nothing of theirs
// afterwards. Exits with 1 if anything was not as expected.
#include <gloo/transport/tcp/device.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <sstream>
#include <stdexcept>

#include "collectives.h"
#include "gloo_farewell.h"
#include "gloo_resets.h"
#include "reference.h"
#include "tcp_link.h"

namespace colltensor {
namespace tests {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::seconds kHang{30};  // a call as long is a defect
constexpr int kCalls = 40;                 // of a mesh

std::atomic<int> failures{0};
std::atomic<long> calls_made{0}, calls_ended{0};

enum class Kind : int { kAllReduce, kReduce, kReduceScatter, kBroadcast, kExchange, kKinds };
enum class End : int { kNone, kLeaves, kIsClosed, kIsStopped, kIsInterrupted, kEnds };

struct Hangs : std::exception {};
struct Interrupted : std::exception {};

struct Plan {
  Kind kind;
  DType dtype;
  ReduceOp op;
  std::size_t count;
  std::vector<int> ranks;  // that take part
  int root;                // a position among them
};

Plan planned(unsigned seed, int number, int size) {
  static constexpr std::size_t kCounts[] = {0, 1, 3, 100, 1500, 5000, 20000, 70001, 300000};
  std::mt19937 random(seed * 100003 + static_cast<unsigned>(number));
  Plan made;
  made.kind = static_cast<Kind>(random() % static_cast<unsigned>(Kind::kKinds));
  made.dtype = static_cast<DType>(random() % kDTypes);
  do {
    made.op = static_cast<ReduceOp>(random() % kOps);
  } while (!defined(made.dtype, made.op));
  made.count = kCounts[random() % 3 == 0 ? random() % 9 : random() % 6];
  const auto left_out = static_cast<int>(random() % 3 == 0 ? random() % static_cast<unsigned>(size) : size);
  for (int rank = 0; rank < size; ++rank) {
    if (rank != left_out) made.ranks.push_back(rank);
  }
  made.root = static_cast<int>(random() % made.ranks.size());
  return made;
}

// One rank's part in one call. Its memory lives no longer than the call.
class Call {
 public:
  Call(const Plan& plan, unsigned number, int rank) : plan_(plan), number_(number), part_{plan.ranks, 0} {
    while (plan.ranks[static_cast<std::size_t>(part_.position)] != rank) ++part_.position;
    item_ = nbytes_of(plan.dtype);
    own_ = of(part_.position, 0);
    for (int position = 0; position < part_.size(); ++position) {
      parts_.push_back(of(part_.position, position));
      outputs_.emplace_back(own_.size(), 77);
    }
  }

  void make(Mesh& mesh, const Check& check) {
    mesh.run(check, [&] { in(mesh); });
  }

  bool right() const {
    const auto same_as = [&](const Bytes& found, const Bytes& wanted) { return same(plan_.dtype, found, wanted); };
    switch (plan_.kind) {
      case Kind::kAllReduce: return same_as(own_, combination(0));
      case Kind::kReduce: return part_.position == plan_.root ? same_as(own_, combination(0)) : own_ == of(part_.position, 0);
      case Kind::kReduceScatter: return same_as(outputs_[0], combination(part_.position));
      case Kind::kBroadcast: return own_ == of(plan_.root, 0);
      default: break;
    }
    for (int other = 0; other < part_.size(); ++other) {
      if (other != part_.position && outputs_[static_cast<std::size_t>(other)] != of(other, part_.position)) return false;
    }
    return true;
  }

 private:
  Bytes of(int position, int part) const {
    return elements(plan_.dtype, plan_.count, number_ * 1009 + static_cast<unsigned>(position * 31 + part + 1));
  }
  Bytes combination(int part) const {
    std::vector<Bytes> all;
    for (int position = 0; position < part_.size(); ++position) all.push_back(of(position, part));
    return combined(plan_.dtype, plan_.op, all);
  }

  void in(Mesh& mesh) {
    const Reduction reduction = find_reduction(plan_.dtype, plan_.op);
    switch (plan_.kind) {
      case Kind::kAllReduce: return allreduce(mesh, part_, own_.data(), plan_.count, item_, reduction);
      case Kind::kReduce: return reduce(mesh, part_, own_.data(), plan_.count, item_, reduction, plan_.root);
      case Kind::kBroadcast: return broadcast(mesh, part_, own_.data(), own_.size(), plan_.root);
      case Kind::kReduceScatter: {
        std::vector<const char*> sources;
        for (const Bytes& bytes : parts_) sources.push_back(bytes.data());
        return reducescatter(mesh, part_, outputs_[0].data(), sources.data(), plan_.count, item_, reduction);
      }
      default: break;
    }
    std::vector<Transfer> receives, sends;
    for (int other = 0; other < part_.size(); ++other) {
      if (other == part_.position) continue;
      const auto transfer = [&](Bytes& bytes) {
        return Transfer{plan_.ranks[static_cast<std::size_t>(other)], reinterpret_cast<std::int64_t>(bytes.data()),
                        static_cast<std::int64_t>(bytes.size())};
      };
      receives.push_back(transfer(outputs_[static_cast<std::size_t>(other)]));
      sends.push_back(transfer(parts_[static_cast<std::size_t>(other)]));
    }
    exchange(mesh, receives.data(), receives.size(), sends.data(), sends.size());
  }

  const Plan& plan_;
  const unsigned number_;
  Part part_;
  std::size_t item_;
  Bytes own_;
  std::vector<Bytes> parts_, outputs_;
};

// How one mesh ends: as `victim` is about to make the call `at`, or is in it.
struct Fate {
  End end;
  int victim, at;
};

class Rank {
 public:
  Rank(unsigned seed, int rank, int size, const Fate& fate)
      : mesh(gloo::transport::tcp::CreateDevice(gloo::transport::tcp::attr("127.0.0.1")), rank, size,
             std::chrono::milliseconds(20'000)),
        seed_(seed), fate_(fate), random_(seed * 7919 + static_cast<unsigned>(rank)) {}

  Mesh mesh;

  void live() {
    try {
      // Who survives goes on until a call has to do with the victim.
      const int calls = fate_.end == End::kNone ? kCalls : 10'000;
      for (int number = 0; number < calls && failures == 0; ++number) {
        if (!call(number)) break;
      }
      if (fate_.end != End::kNone && !is_victim()) judge(false, "a survivor made all its calls", "");
    } catch (const Hangs&) {
      judge(false, "a call hung", "");
    } catch (const std::exception& error) {
      calls_ended.fetch_add(1, std::memory_order_relaxed);
      judge(fate_.end != End::kNone, "a call failed", error.what());
    }
    mesh.close();  // at once: what others still wait for has been sent
  }

 private:
  bool is_victim() const { return mesh.rank() == fate_.victim; }

  Check patient() const {
    const auto began = Clock::now();
    return [began]() -> bool {
      if (Clock::now() - began > kHang) throw Hangs();
      return false;
    };
  }

  // Returns whether to go on.
  bool call(int number) {
    const Plan plan = planned(seed_, number, mesh.size());
    const bool last = number == fate_.at && fate_.end != End::kNone;
    if (last && !is_victim()) std::this_thread::sleep_for(std::chrono::milliseconds(random_() % 250));
    if (last && is_victim() && fate_.end == End::kLeaves) return false;
    bool takes_part = false;
    for (int rank : plan.ranks) takes_part = takes_part || rank == mesh.rank();
    if (last && is_victim()) return be_ended(plan, static_cast<unsigned>(number), takes_part);
    if (!takes_part) return true;
    Call made(plan, static_cast<unsigned>(number), mesh.rank());
    made.make(mesh, patient());
    calls_made.fetch_add(1, std::memory_order_relaxed);
    judge(made.right(), "a result is wrong", describe(plan, number));
    return true;
  }

  bool be_ended(const Plan& plan, unsigned number, bool takes_part) {
    std::thread closer;
    if (fate_.end == End::kIsClosed) {
      closer = std::thread([this, pause = random_() % 20'000] {
        std::this_thread::sleep_for(std::chrono::microseconds(pause));
        mesh.close();
      });
    }
    try {
      if (takes_part) Call(plan, number, mesh.rank()).make(mesh, ending());
    } catch (const std::exception&) {
      calls_ended.fetch_add(1, std::memory_order_relaxed);
    }
    if (closer.joinable()) closer.join();
    return false;
  }

  Check ending() const {
    if (fate_.end == End::kIsClosed) return patient();
    const bool throws = fate_.end == End::kIsInterrupted;
    return [throws]() -> bool {
      if (throws) throw Interrupted();
      return true;
    };
  }

  static std::string describe(const Plan& plan, int number) {
    std::ostringstream words;
    words << "call " << number << ": kind " << static_cast<int>(plan.kind) << ", dtype " << static_cast<int>(plan.dtype)
          << ", op " << static_cast<int>(plan.op) << ", " << plan.count << " elements, " << plan.ranks.size()
          << " ranks, root " << plan.root;
    return words.str();
  }

  void judge(bool truth, const char* what, const std::string& more) const {
    if (truth || failures.fetch_add(1) >= 20) return;
    std::fprintf(stderr, "FAILED: %s: seed %u, rank %d of %d, end %d of rank %d at call %d: %s\n", what, seed_, mesh.rank(),
                 mesh.size(), static_cast<int>(fate_.end), fate_.victim, fate_.at, more.c_str());
  }

  const unsigned seed_;
  const Fate fate_;
  std::mt19937 random_;
};

void stress(unsigned seed) {
  std::mt19937 random(seed);
  const int size = 2 + static_cast<int>(random() % 3);
  Fate fate{End::kNone, static_cast<int>(random() % static_cast<unsigned>(size)), static_cast<int>(random() % 15)};
  if (seed % 2 == 1) fate.end = static_cast<End>(1 + seed / 2 % (static_cast<unsigned>(End::kEnds) - 1));
  static constexpr Limits kLimits[] = {Limits(), {0, 4096, 1, 0}, {0, 64, 3, 0}, {1000, 100'000, 2, 0}};
  const Limits limits = kLimits[random() % 4];
  std::vector<std::unique_ptr<Rank>> ranks;
  for (int rank = 0; rank < size; ++rank) {
    ranks.push_back(std::make_unique<Rank>(seed, rank, size, fate));
    ranks.back()->mesh.limits = limits;
  }
  for (int low = 0; low < size; ++low) {
    for (int high = low + 1; high < size; ++high) {
      const TcpLink ends = tcp_link();
      ranks[static_cast<std::size_t>(low)]->mesh.link(high, ends.accepted);
      ranks[static_cast<std::size_t>(high)]->mesh.link(low, ends.dialled);
    }
  }
  std::vector<std::thread> threads;
  for (const auto& rank : ranks) threads.emplace_back([&rank] { rank->live(); });
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
}  // namespace tests
}  // namespace colltensor

int main(int argc, char** argv) {
  using namespace colltensor::tests;
  const int seconds = argc > 1 ? std::atoi(argv[1]) : 10;
  const auto first = static_cast<unsigned>(argc > 2 ? std::atoi(argv[2]) : 1);
  std::signal(SIGPIPE, SIG_IGN);  // as in Python: Gloo writes to connections that their other end has left
  alarm(static_cast<unsigned>(10 * seconds + 120));  // whoever hangs is ended by the signal
  const auto end = Clock::now() + std::chrono::seconds(seconds);
  if (!resets() || !farewell()) return 1;
  unsigned seed = first;
  do {
    stress(seed++);
  } while ((Clock::now() < end || seed < first + 10) && failures == 0);
  std::printf("%ld calls, %ld ended by a rank that left, seeds %u to %u: %s\n", calls_made.load(), calls_ended.load(),
              first, seed - 1, failures == 0 ? "passed" : "FAILED");
  return failures == 0 ? 0 : 1;
}
