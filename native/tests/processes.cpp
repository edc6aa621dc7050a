// Ranks that are processes: the results, a rank killed at a random moment, and a child that uses its parent's group.
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <memory>
#include <random>

#include "check.h"

namespace colltensor {
namespace tests {
namespace {

constexpr int kMost = 4;
constexpr int kKills = 12;
constexpr std::int64_t kNoticedMs = 2000;

// What the parent and the ranks tell each other.
struct Board {
  std::atomic<std::int32_t> pids[kMost];
  std::atomic<std::int32_t> ready;
  std::atomic<std::int64_t> killed_ns;
};

template <class Truth>
bool wait_until(Truth truth, std::int64_t limit_ms) {
  const std::int64_t limit = in_ms(limit_ms);
  while (!truth()) {
    if (now_ns() > limit) return false;
    usleep(200);
  }
  return true;
}

Descriptors watch(const Board& board, int own, int ranks) {
  std::vector<int> pidfds;
  for (int rank = 0; rank < ranks; ++rank) {
    pidfds.push_back(rank == own ? -1 : static_cast<int>(syscall(SYS_pidfd_open, board.pids[rank].load(), 0)));
    expect(rank == own || pidfds.back() >= 0, "no pidfd of rank %d", rank);
  }
  return Descriptors(std::move(pidfds));
}

// The life of one rank: `calls` calls, or until `victim` has been killed. Its exit code says whether all was well.
int be_rank(const SharedMemory& memory, Board& board, int rank, unsigned seed, int calls, int victim) {
  this_rank = rank;
  alarm(60);
  const int ranks = memory.ranks();
  const auto all_started = [&] {
    for (int other = 0; other < ranks; ++other) {
      if (board.pids[other].load() == 0) return false;
    }
    return true;
  };
  if (!expect(wait_until(all_started, kHangMs), "the ranks did not start")) return 1;
  Group group(memory.base(), Place{rank, ranks, watch(board, rank, ranks), counting_hooks()});
  RandomCalls random(seed, rank, true);
  board.ready.fetch_add(1);
  for (int call = 0; victim >= 0 || call < calls; ++call) {
    const Outcome outcome = random.make(group);
    if (outcome == Outcome::kDone || outcome == Outcome::kMismatch) continue;
    const double took = static_cast<double>(now_ns() - board.killed_ns.load()) / 1e6;
    const FailureReport report = group.failure();
    expect(victim >= 0 && outcome == Outcome::kFailed && report.kind == Failure::kLost && report.ranks.has(victim),
           "rank %d: outcome %d, failure %d, and rank %d was killed", rank, static_cast<int>(outcome),
           static_cast<int>(report.kind), victim);
    for (int other = 0; other < ranks; ++other) {
      expect(other == victim || !report.ranks.has(other), "rank %d: rank %d is named too", rank, other);
    }
    expect(board.killed_ns.load() != 0 && took < kNoticedMs, "rank %d: noticed after %.0f ms", rank, took);
    break;
  }
  // Not before the others have done: a rank that is gone would be the one they name.
  board.ready.fetch_sub(1);
  wait_until([&] { return board.ready.load() <= (victim >= 0 ? 1 : 0); }, kNoticedMs);
  return failures.load() == 0 ? 0 : 1;
}

void run_processes(int ranks, unsigned seed, int calls, int victim) {
  const SharedMemory memory(ranks, seed % 2 == 0 ? ranks : 1, kSmall);
  void* page = mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (page == MAP_FAILED) std::abort();
  Board& board = *new (page) Board{};
  std::fflush(stdout);
  std::vector<pid_t> pids;
  for (int rank = 0; rank < ranks; ++rank) {
    const pid_t pid = fork();
    if (pid == 0) _exit(be_rank(memory, board, rank, seed, calls, victim));
    pids.push_back(pid);
    board.pids[rank] = pid;
  }
  if (victim >= 0) {
    expect(wait_until([&] { return board.ready.load() == ranks; }, kHangMs), "the ranks did not begin");
    usleep(std::mt19937(seed)() % 30000);
    board.killed_ns = now_ns();
    kill(pids[victim], SIGKILL);
  }
  for (int rank = 0; rank < ranks; ++rank) {
    int status = 0;
    waitpid(pids[rank], &status, 0);
    if (rank == victim) continue;
    expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "process of rank %d of %d, seed %u: status %d", rank, ranks,
           seed, status);
  }
  munmap(page, sizeof(Board));
}

// A child does not own its parent's rank: it cannot call, and leaving does not reach the others.
void test_fork() {
  const SharedMemory memory(1, 1, kSmall);
  Group group(memory.base(), Place{0, 1, Descriptors(), Hooks()});
  const pid_t pid = fork();
  if (pid == 0) {
    const bool refused = group.barrier(Signature(), in_ms(kHangMs)) == Outcome::kClosed;
    group.leave();
    _exit(refused && group.foreign() ? 0 : 1);
  }
  int status = 0;
  waitpid(pid, &status, 0);
  expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a child can use its parent's group");
  expect(group.barrier(Signature(), in_ms(kHangMs)) == Outcome::kDone, "a child has closed its parent's group");
}

}  // namespace

void test_processes(unsigned seed) {
  test_fork();
  for (int ranks = 2; ranks <= kMost; ++ranks) run_processes(ranks, seed + static_cast<unsigned>(ranks), 200, -1);
  for (int kill = 0; kill < kKills; ++kill) {
    const int ranks = 2 + kill % (kMost - 1);
    run_processes(ranks, seed + static_cast<unsigned>(kill), 0, static_cast<int>(seed + kill) % ranks);
  }
}

}  // namespace tests
}  // namespace colltensor
