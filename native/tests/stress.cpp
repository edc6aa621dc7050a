// Random collectives between ranks that are threads of one process over one mapping, so that the sanitizers see every
// access of every rank; then the kernels, the ways in which a call can fail, and ranks that are processes.
//
//   colltensor_stress [seconds] [seed]
//
// Every operation, dtype, reduce op and layout in turn; every result is compared with one computed alone, and now and
// then a rank disagrees on purpose. Exits with 1 if anything was not as expected.
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <thread>

#include "check.h"
#include "request.h"
#include "tensor.h"

namespace colltensor {
namespace tests {

namespace {

std::atomic<long> calls_made{0};

constexpr int kOperations = static_cast<int>(Operation::kTransfer) + 1;

struct Plan {
  Operation operation;
  bool brief;
  DType dtype;
  ReduceOp op;
  std::size_t count;
  int root, odd;  // odd: the rank that disagrees, or -1
};

Plan planned(std::mt19937& random, int ranks, bool may_disagree) {
  static constexpr std::size_t kCounts[] = {0, 1, 3, 30, 100, 500, 1024, 1500, 2100, 5000, 20000, 70001};
  Plan made;
  made.operation = static_cast<Operation>(random() % kOperations);
  made.brief = random() % 3 == 0;
  made.dtype = static_cast<DType>(random() % kDTypes);
  do {
    made.op = static_cast<ReduceOp>(random() % kOps);
  } while (!defined(made.dtype, made.op));
  const std::size_t size = random() % 12;
  made.count = kCounts[random() % 4 == 0 ? size : size % 9] + random() % 3 * 30 % 31;
  made.root = static_cast<int>(random() % ranks);
  made.odd = may_disagree && ranks > 1 && random() % 16 == 0 ? static_cast<int>(random() % ranks) : -1;
  return made;
}

// One rank's part in one call.
class Call {
 public:
  Call(Group& group, int number, const Plan& plan, unsigned layouts)
      : group_(group), rank_(group.rank()), ranks_(group.world_size()), number_(number), plan_(plan),
        zeros_(plan.count * nbytes_of(plan.dtype)), given_(of(rank_, 0)), own_(plan.dtype, given_, layouts),
        target_(plan.dtype, zeros_, layouts / 7) {
    for (int part = 0; part < ranks_; ++part) {
      parts_.emplace_back(plan.dtype, of(rank_, part), layouts / 3 + part);
      outputs_.emplace_back(plan.dtype, zeros_, layouts / 5 + part);
    }
    signature_.words[0] = static_cast<std::uint64_t>(plan.operation) << 8 | static_cast<std::uint64_t>(plan.root);
    signature_.words[1] = plan.count;
    if (plan.odd == rank_) signature_.words[2] = 1;
  }

  Outcome make(bool packed) {
    if (plan_.operation == Operation::kTransfer) {
      if (ranks_ == 1) return Outcome::kDone;
      return number_ % 2 == 0 ? transfer(packed) : sends_of_root();
    }
    const Outcome outcome = plan_.brief ? brief([this](std::int64_t deadline) { return direct(deadline); })
                            : packed    ? run_request(group_, request().data(), in_ms(kHangMs))
                                        : direct(in_ms(kHangMs));
    if (outcome == Outcome::kDone && plan_.odd < 0) check(done(), "result");
    if (plan_.odd >= 0 && outcome != Outcome::kFailed) {
      check(outcome == Outcome::kMismatch, "outcome of ranks that disagree");
      check(untouched(), "memory was written in spite of a mismatch");
    }
    return outcome;
  }

 private:
  Bytes of(int rank, int part) const {
    return elements(plan_.dtype, plan_.count, static_cast<std::uint32_t>(number_ * 1009 + rank * 31 + part + 1));
  }
  Bytes combination(int part) const {
    std::vector<Bytes> all;
    for (int rank = 0; rank < ranks_; ++rank) all.push_back(of(rank, part));
    return combined(plan_.dtype, plan_.op, all);
  }
  void check(bool truth, const char* what) const {
    expect(truth, "%s: call %d, rank %d of %d: operation %d%s, dtype %d, op %d, %zu elements, root %d, odd %d", what,
           number_, rank_, ranks_, static_cast<int>(plan_.operation), plan_.brief ? " (brief)" : "",
           static_cast<int>(plan_.dtype), static_cast<int>(plan_.op), plan_.count, plan_.root, plan_.odd);
  }

  Outcome direct(std::int64_t deadline) {
    const std::size_t count = plan_.count, item = nbytes_of(plan_.dtype);
    const auto views = [](std::vector<Tensor>& tensors) {
      std::vector<View> found;
      for (Tensor& tensor : tensors) found.push_back(tensor.view());
      return found;
    };
    const std::vector<View> to = views(outputs_), from = views(parts_);
    const int root = plan_.root;
    switch (plan_.operation) {
      case Operation::kBarrier: return group_.barrier(signature_, deadline);
      case Operation::kAllReduce:
        return group_.allreduce(own_.view(), count, plan_.dtype, plan_.op, signature_, deadline);
      case Operation::kReduce:
        return group_.reduce(own_.view(), count, plan_.dtype, plan_.op, root, signature_, deadline);
      case Operation::kBroadcast: return group_.broadcast(own_.view(), count, item, root, signature_, deadline);
      case Operation::kAllGather: return group_.allgather(to.data(), own_.view(), count, item, signature_, deadline);
      case Operation::kGather: return group_.gather(to.data(), own_.view(), count, item, root, signature_, deadline);
      case Operation::kScatter:
        return group_.scatter(target_.view(), from.data(), count, item, root, signature_, deadline);
      case Operation::kReduceScatter:
        return group_.reducescatter(target_.view(), from.data(), count, plan_.dtype, plan_.op, signature_, deadline);
      default: return group_.alltoall(to.data(), from.data(), count, item, signature_, deadline);
    }
  }

  // The call as Python packs it, in memory that ends where it ends.
  std::vector<std::int64_t> request() {
    std::vector<std::int64_t> words(kViewsField);
    words[kOperationField] = static_cast<std::int64_t>(plan_.operation);
    words[kReduceOpField] = static_cast<std::int64_t>(plan_.op);
    words[kDTypeField] = static_cast<std::int64_t>(plan_.dtype);
    words[kItemField] = static_cast<std::int64_t>(nbytes_of(plan_.dtype));
    words[kRootField] = plan_.root;
    words[kCountField] = static_cast<std::int64_t>(plan_.count);
    for (int i = 0; i < 4; ++i) words[kSignatureField + i] = static_cast<std::int64_t>(signature_.words[i]);
    const auto add_all = [&](std::vector<Tensor>& tensors) {
      for (Tensor& tensor : tensors) tensor.pack(words);
    };
    const bool root = plan_.root == rank_;
    switch (plan_.operation) {
      case Operation::kBarrier: break;
      case Operation::kAllGather: add_all(outputs_); own_.pack(words); break;
      case Operation::kGather:
        if (root) add_all(outputs_);
        own_.pack(words);
        break;
      case Operation::kScatter:
        target_.pack(words);
        if (root) add_all(parts_);
        break;
      case Operation::kReduceScatter: target_.pack(words); add_all(parts_); break;
      case Operation::kAllToAll: add_all(outputs_); add_all(parts_); break;
      default: own_.pack(words); break;
    }
    words.shrink_to_fit();
    return words;
  }

  // As Python makes a call while it holds the interpreter lock.
  template <class Make>
  Outcome brief(Make make) {
    Outcome outcome = make(Group::kBrief);
    if (outcome == Outcome::kPending) {
      group_.postpone([&](std::int64_t deadline, std::int64_t&) { return make(deadline); });
      check(group_.barrier(signature_, in_ms(0)) == Outcome::kBusy, "a call beside a pending one");
      check(group_.pending() && group_.claim() && !group_.pending() && !group_.claim(), "a pending call's claim");
      std::int64_t none = 0;
      outcome = group_.resume(in_ms(kHangMs), none);
    }
    return outcome == Outcome::kLarge ? make(in_ms(kHangMs)) : outcome;
  }

  // A ring.
  Outcome transfer(bool packed) {
    const int next = (rank_ + 1) % ranks_, before = (rank_ + ranks_ - 1) % ranks_;
    const std::size_t item = nbytes_of(plan_.dtype);
    Signature plain = signature_;
    plain.words[2] = 0;
    const View mine = own_.view(), theirs = target_.view();
    Group::Transfer send{&mine, plan_.count, item, next, signature_}, recv{&theirs, plan_.count, item, before, plain};
    Outcome outcome;
    int differs;
    if (packed) {
      std::vector<std::int64_t> words = request();
      words[kRootField] = next;
      words[kSourceField] = before;
      words[kSourceItemField] = words[kItemField];
      words[kSourceCountField] = words[kCountField];
      for (int i = 0; i < 4; ++i) words[kSourceSignatureField + i] = static_cast<std::int64_t>(plain.words[i]);
      target_.pack(words);
      outcome = run_request(group_, words.data(), in_ms(kHangMs));
      differs = static_cast<int>(words[kDetailField]);
    } else {
      const auto make = [&](std::int64_t deadline) { return group_.transfer(&send, &recv, deadline); };
      outcome = plan_.brief ? brief(make) : make(in_ms(kHangMs));
      differs = (send.mismatch ? 1 : 0) | (recv.mismatch ? 2 : 0);
    }
    if (outcome == Outcome::kFailed) return outcome;
    const int wanted = (plan_.odd == rank_ ? 1 : 0) | (plan_.odd == before ? 2 : 0);
    check(differs == wanted, "which half of a transfer differs");
    check(outcome == (wanted != 0 ? Outcome::kMismatch : Outcome::kDone), "outcome of a transfer");
    check(target_.holds(plan_.odd == before ? zeros_ : of(before, 0)), "transfer");
    check(own_.holds(given_), "what was sent");
    return Outcome::kDone;
  }

  // The root sends to each of the others, now and then twice; what one has not taken yet lies where the next one's goes.
  Outcome sends_of_root() {
    const std::size_t item = nbytes_of(plan_.dtype);
    for (int turn = 0; turn < 2 * ranks_; ++turn) {
      const int other = turn / 2;
      if (other == plan_.root || (rank_ != plan_.root && rank_ != other)) continue;
      if (turn % 2 == 1 && (number_ + other) % 3 != 0) continue;
      const View view = rank_ == plan_.root ? parts_[other].view() : target_.view();
      Group::Transfer side{&view, plan_.count, item, rank_ == plan_.root ? other : plan_.root, signature_};
      const auto make = [&](std::int64_t deadline) {
        return rank_ == plan_.root ? group_.transfer(&side, nullptr, deadline)
                                   : group_.transfer(nullptr, &side, deadline);
      };
      const Outcome outcome = plan_.brief ? brief(make) : make(in_ms(kHangMs));
      if (outcome == Outcome::kFailed) return outcome;
      const bool differs = plan_.odd == plan_.root || plan_.odd == other;
      check(outcome == (differs ? Outcome::kMismatch : Outcome::kDone), "outcome of a send");
      if (rank_ == other) check(target_.holds(differs ? zeros_ : of(plan_.root, other)), "what was sent one way");
    }
    return Outcome::kDone;
  }

  bool done() {
    const bool root = plan_.root == rank_;
    bool right = true;
    switch (plan_.operation) {
      case Operation::kBarrier: return untouched();
      case Operation::kAllReduce: return own_.holds(combination(0));
      case Operation::kReduce: return own_.holds(root ? combination(0) : given_);
      case Operation::kBroadcast: return own_.holds(of(plan_.root, 0));
      case Operation::kScatter: return target_.holds(of(plan_.root, rank_));
      case Operation::kReduceScatter: return target_.holds(combination(rank_));
      case Operation::kAllGather:
        for (int other = 0; other < ranks_; ++other) right = right && outputs_[other].holds(of(other, 0));
        return right && own_.holds(given_);
      case Operation::kGather:
        for (int other = 0; other < ranks_; ++other) {
          right = right && outputs_[other].holds(root ? of(other, 0) : zeros_);
        }
        return right && own_.holds(given_);
      default:
        for (int other = 0; other < ranks_; ++other) right = right && outputs_[other].holds(of(other, rank_));
        return right;
    }
  }

  bool untouched() {
    bool clean = own_.holds(given_) && target_.holds(zeros_);
    for (int rank = 0; rank < ranks_; ++rank) {
      clean = clean && outputs_[rank].holds(zeros_) && parts_[rank].holds(of(rank_, rank));
    }
    return clean;
  }

  Group& group_;
  const int rank_, ranks_, number_;
  const Plan plan_;
  const Bytes zeros_, given_;
  Tensor own_, target_;
  std::vector<Tensor> parts_, outputs_;
  Signature signature_;
};

// A rank of several groups, which it uses by turns.
void be_rank(const std::vector<std::unique_ptr<SharedMemory>>& memories, int rank, bool reads, int calls, unsigned seed) {
  this_rank = rank;
  std::vector<std::unique_ptr<Group>> groups;
  std::vector<RandomCalls> random;
  for (const auto& memory : memories) {
    groups.push_back(
        std::make_unique<Group>(memory->base(), Place{rank, memory->ranks(), Descriptors(), counting_hooks()}));
    if (reads) {
      const std::vector<std::int32_t> pids(memory->ranks(), getpid());
      groups.back()->allow_reading(expect(groups.back()->try_reading(pids.data()), "this process cannot be read"));
    }
    random.emplace_back(seed + static_cast<unsigned>(random.size()), rank, true);
  }
  std::mt19937 turns(seed);
  for (int call = 0; call < calls && failures.load() == 0; ++call) {
    const std::size_t which = turns() % groups.size();
    const Outcome outcome = random[which].make(*groups[which]);
    expect(outcome == Outcome::kDone || outcome == Outcome::kMismatch, "rank %d: call %d ended with outcome %d", rank,
           call, static_cast<int>(outcome));
  }
}

}  // namespace

// False where the kernel has no such call, as in qemu's user mode.
bool has_process_reads() {
  char from = 1, to = 0;
  const iovec local{&to, 1}, remote{&from, 1};
  return process_vm_readv(getpid(), &local, 1, &remote, 1, 0) == 1 || errno != ENOSYS;
}

bool expect(bool truth, const char* what, ...) {
  if (!truth && failures.fetch_add(1) < 20) {
    char line[512];
    va_list arguments;
    va_start(arguments, what);
    std::vsnprintf(line, sizeof line, what, arguments);
    va_end(arguments);
    std::fprintf(stderr, "FAILED: %s\n", line);
  }
  return truth;
}

std::int64_t in_ms(std::int64_t milliseconds) { return now_ns() + milliseconds * 1'000'000; }

SharedMemory::SharedMemory(int ranks, int cores, const Sizes& sizes)
    : nbytes_(segment_nbytes(ranks, sizes.half)), ranks_(ranks) {
  void* base = mmap(nullptr, nbytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) std::abort();
  base_ = static_cast<char*>(base);
  expect(!check_segment(base_, nbytes_, ranks), "a segment of zeros is taken for one");
  format_segment(base_, ranks, cores, sizes.half, sizes.direct, sizes.chunk, sizes.read, sizes.cache);
  expect(check_segment(base_, nbytes_, ranks), "a new segment is refused");
  expect(!check_segment(base_, nbytes_, ranks + 1), "a segment for another number of ranks is taken");
}

SharedMemory::~SharedMemory() { munmap(base_, nbytes_); }

Hooks counting_hooks() {
  Hooks hooks;
  hooks.signalled = [] {
    naps.fetch_add(1, std::memory_order_relaxed);
    return signalled_rank.load() == this_rank;
  };
  return hooks;
}

RandomCalls::RandomCalls(unsigned seed, int rank, bool may_disagree)
    : seed_(seed), own_(seed * 7919 + static_cast<unsigned>(rank)), may_disagree_(may_disagree) {}

Outcome RandomCalls::make(Group& group) {
  std::mt19937 shared(seed_ * 100003 + static_cast<unsigned>(call_)), own(own_ * 100019 + static_cast<unsigned>(call_));
  const Plan plan = planned(shared, group.world_size(), may_disagree_);
  if (own() % 64 == 0) std::this_thread::sleep_for(std::chrono::microseconds(own() % 3000));
  Call call(group, call_++, plan, static_cast<unsigned>(own()));
  const Outcome outcome = call.make(own() % 2 == 0);
  calls_made.fetch_add(1, std::memory_order_relaxed);
  return outcome;
}

long RandomCalls::made() { return calls_made.load(); }

void stress(unsigned seed) {
  static constexpr int kRanks[] = {2, 3, 4, 1, 5, 8};
  const int ranks = kRanks[seed % 6];
  const int cores = seed % 4 == 3 ? ranks : static_cast<int>(std::thread::hardware_concurrency());
  const Sizes& sizes = seed % 5 == 4 ? kUsual : kSmall;
  // Where ranks read each other's memory, they first find these numbers there.
  static const std::uint64_t nonce[2] = {0, 0};
  const bool reads = seed % 3 != 1 && has_process_reads();
  const bool uneven = (seed + seed / 6) % 2 != 0;  // every number of ranks in turn
  memcpy_way.assume(uneven);
  kernel_way.assume(uneven);
  // Two sets of threads, each with two groups that no other thread uses.
  std::vector<std::vector<std::unique_ptr<SharedMemory>>> memories(2);
  for (auto& set : memories) {
    for (int group = 0; group < 2; ++group) {
      set.push_back(std::make_unique<SharedMemory>(ranks, cores, sizes));
      for (int rank = 0; rank < ranks; ++rank) {
        Layout(set.back()->base(), ranks).rank(rank).own_nonce.store(reinterpret_cast<std::uint64_t>(nonce));
      }
    }
  }
  std::vector<std::thread> threads;
  for (std::size_t set = 0; set < memories.size(); ++set) {
    for (int rank = 0; rank < ranks; ++rank) {
      threads.emplace_back(be_rank, std::cref(memories[set]), rank, reads, 300 / ranks,
                           static_cast<unsigned>(seed * 10 + 4 * set));
    }
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace tests
}  // namespace colltensor

int main(int argc, char** argv) {
  using namespace colltensor;
  using namespace colltensor::tests;
  const int seconds = argc > 1 ? std::atoi(argv[1]) : 10;
  const auto first = static_cast<unsigned>(argc > 2 ? std::atoi(argv[2]) : 1);
  alarm(static_cast<unsigned>(10 * seconds + 120));  // whoever hangs is ended by the signal
  const auto step = [](const char* name, auto run) {
    const std::int64_t began = now_ns();
    run();
    std::printf("%-10s %5.1f s\n", name, static_cast<double>(now_ns() - began) / 1e9);
    std::fflush(stdout);
  };
  const std::int64_t end = in_ms(1000 * seconds);
  step("processes", [&] { test_processes(first); });  // first: they are forked, and there is no thread yet
  step("choices", test_choices);
  step("copies", test_copies);
  step("kernels", test_kernels);
  step("failures", test_failures);
  unsigned seed = first;
  step("stress", [&] {
    do {
      stress(seed++);
    } while ((now_ns() < end || seed < first + 6) && failures.load() == 0);
  });
  expect(naps.load() > 100, "only %ld waits came to sleep", naps.load());
  if (!has_process_reads()) std::printf("no process_vm_readv here: reading other ranks' memory was not tested\n");
  std::printf("%ld calls, %ld waits that slept, seeds %u to %u, %s: %s\n", RandomCalls::made(), naps.load(), first,
              seed - 1, instruction_set(), failures.load() == 0 ? "passed" : "FAILED");
  return failures.load() == 0 ? 0 : 1;
}
