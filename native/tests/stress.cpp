// Random collectives between ranks that are threads of one process over one mapping, so that the sanitizers see every
// access of every rank. Every result is compared with one computed alone; now and then a rank disagrees on purpose.
//
//   colltensor_stress [ranks] [calls] [seed]
#include <sys/mman.h>

#include <atomic>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "colltensor/group.h"
#include "colltensor/segment.h"

namespace {

using namespace colltensor;

constexpr std::uint64_t kHalf = 1 << 16, kDirect = 1 << 14, kChunk = 1 << 13;
constexpr std::int64_t kForever = INT64_MAX;

std::atomic<int> failures{0};

// The elements of one rank's argument in one call.
template <class T>
std::vector<T> values(int call, int rank, int part, std::size_t count) {
  std::vector<T> found(count);
  std::uint32_t state = 2654435761u * static_cast<std::uint32_t>(call * 1009 + rank * 31 + part + 1);
  for (T& value : found) {
    state = state * 1664525u + 1013904223u;
    value = static_cast<T>(state >> 24);
  }
  return found;
}

// A tensor that may lie scattered in memory; what lies between its elements must keep its value.
template <class T>
class Tensor {
 public:
  Tensor(const std::vector<T>& elements, int stride)
      : stride_(stride), memory_(elements.size() * stride + 1, kGap), count_(elements.size()) {
    for (std::size_t i = 0; i < count_; ++i) memory_[i * stride] = elements[i];
    shape_ = static_cast<std::int64_t>(count_);
  }
  View view() {
    const std::int64_t stride = stride_;
    return stride == 1 ? View(memory_.data(), sizeof(T)) : View(memory_.data(), sizeof(T), 1, &shape_, &stride);
  }
  bool holds(const std::vector<T>& elements) const {
    for (std::size_t i = 0; i < memory_.size(); ++i) {
      const bool element = i % stride_ == 0 && i / stride_ < count_;
      const T wanted = element ? elements[i / stride_] : kGap;
      if (std::memcmp(&memory_[i], &wanted, sizeof(T)) != 0) return false;
    }
    return true;
  }

 private:
  static constexpr T kGap = static_cast<T>(77);
  int stride_;
  std::vector<T> memory_;
  std::size_t count_;
  std::int64_t shape_;
};

template <class T>
std::vector<T> sums(int call, int ranks, int part, std::size_t count) {
  std::vector<T> total = values<T>(call, 0, part, count);
  for (int rank = 1; rank < ranks; ++rank) {
    const std::vector<T> next = values<T>(call, rank, part, count);
    for (std::size_t i = 0; i < count; ++i) total[i] = static_cast<T>(total[i] + next[i]);
  }
  return total;
}

void expect(bool truth, int call, int rank, const char* what) {
  if (truth) return;
  std::fprintf(stderr, "call %d, rank %d: %s\n", call, rank, what);
  failures.fetch_add(1);
}

template <class T>
std::vector<View> views(std::vector<Tensor<T>>& tensors) {
  std::vector<View> found;
  for (Tensor<T>& tensor : tensors) found.push_back(tensor.view());
  return found;
}

struct Plan {
  int operation;
  std::size_t count;
  int stride, root, odd;  // odd: the rank that disagrees, or -1
  bool wide;
};

Plan plan(std::mt19937& random, int ranks) {
  static constexpr std::size_t kCounts[] = {0, 1, 3, 100, 1024, 1500, 5000, 20000, 70001};
  Plan made;
  made.operation = static_cast<int>(random() % 11);
  made.count = kCounts[random() % 9] + random() % 3;
  made.stride = random() % 4 == 0 ? 2 + static_cast<int>(random() % 2) : 1;
  made.root = static_cast<int>(random() % ranks);
  made.odd = random() % 16 == 0 ? static_cast<int>(random() % ranks) : -1;
  made.wide = random() % 2;
  return made;
}

template <class T>
void run(Group& group, int call, const Plan& plan, DType dtype) {
  const int rank = group.rank(), ranks = group.world_size(), root = plan.root;
  const std::size_t count = plan.count;
  Signature signature;
  signature.words[0] = static_cast<std::uint64_t>(plan.operation) << 8 | static_cast<std::uint64_t>(root);
  signature.words[1] = count;
  const bool disagrees = plan.odd == rank, mismatch = plan.odd >= 0 && ranks > 1;
  if (disagrees) signature.words[2] = 1;
  const std::vector<T> given = values<T>(call, rank, 0, count), zeros(count);
  Tensor<T> own(given, plan.stride), target(zeros, plan.stride);
  std::vector<Tensor<T>> outputs(ranks, Tensor<T>(zeros, plan.stride)), parts;
  for (int part = 0; part < ranks; ++part) parts.emplace_back(values<T>(call, rank, part, count), plan.stride);
  const std::vector<View> to = views(outputs), of = views(parts);
  Outcome outcome = Outcome::kDone;
  const auto check = [&](bool truth, const char* what) { expect(truth, call, rank, what); };
  const auto untouched = [&] {
    bool clean = own.holds(given) && target.holds(zeros);
    for (const Tensor<T>& output : outputs) clean = clean && output.holds(zeros);
    return clean;
  };
  switch (plan.operation) {
    case 0:
      outcome = group.barrier(signature, kForever);
      break;
    case 1:
    case 2:
      outcome = group.allreduce(own.view(), count, dtype, ReduceOp::kSum, signature, kForever);
      if (!mismatch) check(own.holds(sums<T>(call, ranks, 0, count)), "allreduce");
      break;
    case 3:
      outcome = group.reduce(own.view(), count, dtype, ReduceOp::kSum, root, signature, kForever);
      if (!mismatch) check(own.holds(rank == root ? sums<T>(call, ranks, 0, count) : given), "reduce");
      break;
    case 4:
      outcome = group.broadcast(own.view(), count, sizeof(T), root, signature, kForever);
      if (!mismatch) check(own.holds(values<T>(call, root, 0, count)), "broadcast");
      break;
    case 5:
      outcome = group.allgather(to.data(), own.view(), count, sizeof(T), signature, kForever);
      for (int other = 0; !mismatch && other < ranks; ++other) {
        check(outputs[other].holds(values<T>(call, other, 0, count)), "allgather");
      }
      break;
    case 6:
      outcome = group.gather(to.data(), own.view(), count, sizeof(T), root, signature, kForever);
      for (int other = 0; !mismatch && other < ranks; ++other) {
        check(outputs[other].holds(rank == root ? values<T>(call, other, 0, count) : zeros), "gather");
      }
      break;
    case 7:
      outcome = group.scatter(target.view(), of.data(), count, sizeof(T), root, signature, kForever);
      if (!mismatch) check(target.holds(values<T>(call, root, rank, count)), "scatter");
      break;
    case 8:
      outcome = group.alltoall(to.data(), of.data(), count, sizeof(T), signature, kForever);
      for (int other = 0; !mismatch && other < ranks; ++other) {
        check(outputs[other].holds(values<T>(call, other, rank, count)), "alltoall");
      }
      break;
    case 9:
      outcome = group.reducescatter(target.view(), of.data(), count, dtype, ReduceOp::kSum, signature, kForever);
      if (!mismatch) check(target.holds(sums<T>(call, ranks, rank, count)), "reducescatter");
      break;
    default: {
      if (ranks == 1) return;
      const int next = (rank + 1) % ranks, before = (rank + ranks - 1) % ranks;
      const View mine = own.view(), theirs = target.view();
      Signature plain = signature;
      plain.words[2] = 0;
      Group::Transfer send{&mine, count, sizeof(T), next, signature}, recv{&theirs, count, sizeof(T), before, plain};
      outcome = group.transfer(&send, &recv, kForever);
      const bool wrong = plan.odd == before;
      check(target.holds(wrong ? zeros : values<T>(call, before, 0, count)), "transfer");
      check(outcome == (wrong || disagrees ? Outcome::kMismatch : Outcome::kDone), "outcome of a transfer");
      return;
    }
  }
  check(outcome == (mismatch ? Outcome::kMismatch : Outcome::kDone), "outcome");
  if (mismatch) check(untouched(), "memory was written in spite of a mismatch");
}

// The allreduce that Python begins while it holds the interpreter lock.
void run_brief(Group& group, int call, std::size_t count) {
  std::vector<float> data = values<float>(call, group.rank(), 0, count);
  Signature signature;
  signature.words[0] = 99;
  Outcome outcome = group.begin_allreduce(data.data(), count, count * sizeof(float),
                                          find_reduction(DType::kFloat32, ReduceOp::kSum), signature);
  if (outcome == Outcome::kPending) outcome = group.resume(kForever);
  if (outcome == Outcome::kLarge) {
    const View view(data.data(), sizeof(float));
    outcome = group.allreduce(view, count, DType::kFloat32, ReduceOp::kSum, signature, kForever);
  }
  expect(outcome == Outcome::kDone, call, group.rank(), "outcome of a brief call");
  expect(data == sums<float>(call, group.world_size(), 0, count), call, group.rank(), "brief allreduce");
}

void be_rank(char* base, int rank, int ranks, int calls, unsigned seed) {
  Group group(base, Place{rank, ranks, {}, {}});
  std::mt19937 shared(seed), own(seed * 7919 + static_cast<unsigned>(rank));
  for (int call = 0; call < calls && failures.load() == 0; ++call) {
    const Plan next = plan(shared, ranks);
    if (own() % 64 == 0) std::this_thread::sleep_for(std::chrono::microseconds(own() % 2000));
    if (call % 5 == 4) {
      run_brief(group, call, next.count % 3000);
    } else if (next.wide) {
      run<float>(group, call, next, DType::kFloat32);
    } else {
      run<std::uint8_t>(group, call, next, DType::kUInt8);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int ranks = argc > 1 ? std::atoi(argv[1]) : 4;
  const int calls = argc > 2 ? std::atoi(argv[2]) : 2000;
  const unsigned seed = argc > 3 ? static_cast<unsigned>(std::atoi(argv[3])) : 1;
  const std::uint64_t nbytes = segment_nbytes(ranks, kHalf);
  void* base = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) return 2;
  const int cores = static_cast<int>(std::thread::hardware_concurrency());
  format_segment(static_cast<char*>(base), ranks, cores, kHalf, kDirect, kChunk);
  if (!check_segment(static_cast<char*>(base), nbytes, ranks)) return 2;
  std::vector<std::thread> threads;
  for (int rank = 0; rank < ranks; ++rank) {
    threads.emplace_back(be_rank, static_cast<char*>(base), rank, ranks, calls, seed);
  }
  for (std::thread& thread : threads) thread.join();
  std::printf("%d ranks, %d calls, seed %u, %s: %s\n", ranks, calls, seed, instruction_set(),
              failures.load() == 0 ? "passed" : "FAILED");
  munmap(base, nbytes);
  return failures.load() == 0 ? 0 : 1;
}
