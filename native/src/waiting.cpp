// Publishing a step, waiting for the steps of others, and finding out why they do not come.
//
// A wait spins, then offers the processor to others, then sleeps on a futex; how long, see group.cpp. Where others keep an
// offered processor for long it sleeps at once: whoever sleeps is preferred when woken, whoever offers queues behind every
// busy thread of the machine, each time anew, and is deaf to the clock and to signals meanwhile. In slices of
// 50 ms it looks around: for a failure that another rank has found, for ranks that died or left, for signals, for the
// caller's own reasons to stop, and at the clock.
#include <poll.h>

#include <algorithm>

#include "colltensor/group.h"

namespace colltensor {
namespace {

constexpr std::int64_t kSliceNs = 50'000'000;   // the longest sleep between two looks around
constexpr std::int64_t kStopNs = 100'000'000;   // between two questions to the caller
// A processor that was offered comes back so late where others want it: a busy thread keeps it for 1.5 to 4 ms. Where the
// ranks alone are more than the processors, one of them may be at work for 1 ms.
constexpr std::int64_t kLongYieldNs = 1'000'000, kLongYieldCrowdedNs = 3'000'000;
// For so long it is not offered again: twice as long each time that it comes back late, half as long when it does not.
constexpr std::int64_t kLeastRestNs = 1'000'000, kMostRestNs = 512'000'000;
constexpr std::int64_t kSilentNs = 500'000'000; // without a heartbeat for so long a waiting rank counts as stopped

}  // namespace

void Group::publish(std::uint32_t step) {
  RankLine& line = *lines_[rank_];
  done_ = step;
  line.progress.store(step, std::memory_order_release);
  wake_sleepers();
}

void Group::wake_sleepers() {
  RankLine& line = *lines_[rank_];
  // Against the sleeper, which counts itself and then looks at `progress`: one of the two sees the other.
  full_fence();
  if (line.sleepers.load(std::memory_order_relaxed) != 0) futex_wake_all(&line.progress);
}

void Group::knock(int peer) {
  RankLine& line = *lines_[peer];
  full_fence();  // as in publish()
  if (line.dozing.load(std::memory_order_relaxed) != 0) {
    line.door.fetch_add(1, std::memory_order_release);
    futex_wake_all(&line.door);
  }
}

bool Group::is_there(std::uint32_t step) const {
  for (int rank = 0; rank < world_size_; ++rank) {
    if (!reached(progress_of(rank), step)) return false;
  }
  return true;
}

bool Group::spin_for_arrivals(std::uint32_t arrival, int spins) const {
  for (int rank : others_) {
    const Post& post = layout_.post(rank, parity());
    if (post.arrived.load(std::memory_order_acquire) == arrival) continue;
    const auto cpu = static_cast<std::uint16_t>(lines_[rank_]->cpu.load(std::memory_order_relaxed));
    if (layout_.post(rank, parity() ^ 1).cpu.load(std::memory_order_relaxed) == cpu) return false;
    while (post.arrived.load(std::memory_order_acquire) != arrival) {
      if (spins-- <= 0) return false;
      relax_processor();
    }
  }
  return true;
}

bool Group::spin_for(const Condition& condition, int& spins) {
  while (!condition.ready()) {
    if (spins-- <= 0 || condition.needs_cpu(current_cpu())) return false;
    relax_processor();
  }
  return true;
}

class StepCondition final : public Condition {
 public:
  StepCondition(const Group& group, int rank, std::uint32_t step) : group_(group), rank_(rank), step_(step) {}
  bool ready() const override { return Group::reached(group_.progress_of(rank_), step_); }
  bool needs_cpu(std::uint32_t cpu) const override {
    for (int rank = 0; rank < group_.world_size_; ++rank) {
      if (group_.is_on(rank, cpu) && !Group::reached(group_.progress_of(rank), step_)) return true;
    }
    return false;
  }
  RankSet missing() const override { return group_.lagging(step_); }

 private:
  const Group& group_;
  const int rank_;
  const std::uint32_t step_;
};

Outcome Group::wait_for(int rank, std::uint32_t step, std::int64_t deadline_ns) {
  if (reached(progress_of(rank), step)) return Outcome::kDone;
  RankLine& line = *lines_[rank];
  return wait_until(StepCondition(*this, rank, step), line.progress, line.sleepers, deadline_ns);
}

Outcome Group::wait_for_all(std::uint32_t step, std::int64_t deadline_ns) {
  for (int rank : others_) {
    const Outcome outcome = wait_for(rank, step, deadline_ns);
    if (outcome != Outcome::kDone) return outcome;
  }
  return Outcome::kDone;
}

Outcome Group::wait_until(const Condition& condition, const std::atomic<std::uint32_t>& word,
                          std::atomic<std::uint32_t>& sleepers, std::int64_t deadline_ns) {
  int spins = spins_, yields = yields_;
  while (yields > 0) {
    if (condition.ready()) return Outcome::kDone;
    if (spins > 0 && !condition.needs_cpu(current_cpu())) {
      --spins;
      relax_processor();
    } else {
      if (yields == yields_ && now_ns() < wanted_until_ns_.load(std::memory_order_relaxed)) break;
      const std::int64_t before = now_ns();
      yield_processor();
      const std::int64_t after = now_ns();
      const bool late = after - before > (crowded_ ? kLongYieldCrowdedNs : kLongYieldNs);
      if (late || (yields == yields_ && rest_ns_.load(std::memory_order_relaxed) > kLeastRestNs)) rest(late, after);
      --yields;
      if (late) break;
    }
  }
  if (condition.ready()) return Outcome::kDone;
  RankLine& own = *lines_[rank_];
  own.heartbeat.store(now_ns(), std::memory_order_relaxed);
  own.waiting.fetch_add(1, std::memory_order_relaxed);
  const Outcome outcome = sleep_until(condition, word, sleepers, deadline_ns);
  own.waiting.fetch_sub(1, std::memory_order_relaxed);
  return outcome;
}

// Two threads of a rank may do this at once; what is lost then is a doubling.
void Group::rest(bool late, std::int64_t now) {
  const std::int64_t rest = rest_ns_.load(std::memory_order_relaxed);
  if (late) wanted_until_ns_.store(now + rest, std::memory_order_relaxed);
  rest_ns_.store(late ? std::min(2 * rest, kMostRestNs) : std::max(rest / 2, kLeastRestNs), std::memory_order_relaxed);
}

Outcome Group::sleep_until(const Condition& condition, const std::atomic<std::uint32_t>& word,
                           std::atomic<std::uint32_t>& sleepers, std::int64_t deadline_ns) {
  std::int64_t next_look_ns = 0, next_stop_ns = 0;
  for (;;) {
    const std::int64_t now = now_ns();
    if (now >= next_look_ns) {
      const Outcome outcome = look_around(condition, deadline_ns, next_stop_ns);
      // What the others did counts more than how they went; but an exception of the caller's must reach it.
      const bool raised = outcome == Outcome::kSignalled || outcome == Outcome::kInterrupted;
      if (outcome != Outcome::kDone) return !raised && condition.ready() ? Outcome::kDone : outcome;
      next_look_ns = now + kSliceNs;
    }
    sleepers.fetch_add(1, std::memory_order_relaxed);
    full_fence();  // against publish() and knock()
    const std::uint32_t seen = word.load(std::memory_order_acquire);
    bool signal = false;
    if (!condition.ready()) signal = futex_wait(&word, seen, std::min(next_look_ns, deadline_ns) - now);
    sleepers.fetch_sub(1, std::memory_order_relaxed);
    if (condition.ready()) return Outcome::kDone;
    if (signal) next_look_ns = 0;
    if (deadline_ns < next_look_ns) next_look_ns = deadline_ns;
  }
}

Outcome Group::look_around(const Condition& condition, std::int64_t deadline_ns, std::int64_t& next_stop_ns) {
  const std::int64_t now = now_ns();
  lines_[rank_]->heartbeat.store(now, std::memory_order_relaxed);
  if (closing_.load(std::memory_order_acquire)) return Outcome::kClosed;
  if (layout_.failure().state.load(std::memory_order_acquire) != 0) return Outcome::kFailed;
  const RankSet dead = lost_ranks();
  RankSet left;
  for (int rank = 0; rank < world_size_; ++rank) {
    if (lines_[rank]->left.load(std::memory_order_acquire) != 0) left.add(rank);
  }
  // Only now: what a rank published before it went counts.
  const RankSet missing = condition.missing();
  for (int word = 0; word < kMaxRanks / 64; ++word) {
    lines_[rank_]->awaited[word].store(missing.words[word], std::memory_order_relaxed);
  }
  // A rank that died before it left comes first: the others may have left because of it.
  const RankSet lost = missing.and_(dead).without(left), gone = missing.and_(left);
  if (!lost.empty() || !gone.empty()) {
    fail(lost.empty() ? Failure::kLeft : Failure::kLost, lost.empty() ? gone : lost);
    return Outcome::kFailed;
  }
  const Asking asking(*this);
  if (hooks_.signalled != nullptr && hooks_.signalled()) return Outcome::kSignalled;
  if (hooks_.stop != nullptr && now >= next_stop_ns) {
    next_stop_ns = now + kStopNs;
    const Hooks::Answer answer = hooks_.stop(hooks_.context);
    if (answer != Hooks::kGoOn) return answer == Hooks::kStop ? Outcome::kStopped : Outcome::kInterrupted;
  }
  if (now < deadline_ns || condition.ready()) return Outcome::kDone;
  fail(Failure::kLate, late_ranks(condition.missing()));
  return Outcome::kFailed;
}

RankSet Group::lagging(std::uint32_t step) const {
  RankSet set;
  for (int rank = 0; rank < world_size_; ++rank) {
    if (rank != rank_ && !reached(progress_of(rank), step)) set.add(rank);
  }
  return set;
}

// Those to blame for ranks that have not come: whoever waits for somebody else itself is not, but whom it waits for, and
// so on; unless they all wait for each other.
RankSet Group::late_ranks(const RankSet& lagging) const {
  const std::int64_t now = now_ns();
  RankSet idle, last, known = lagging;
  known.add(rank_);
  std::vector<int> chain;
  std::uint32_t least = done_;
  for (int rank = 0; rank < world_size_; ++rank) {
    if (!lagging.has(rank)) continue;
    chain.push_back(rank);
    if (!reached(progress_of(rank), least)) least = progress_of(rank);
  }
  while (!chain.empty()) {
    const int rank = chain.back();
    chain.pop_back();
    const RankLine& line = *lines_[rank];
    const bool waits = line.waiting.load(std::memory_order_relaxed) != 0;
    if (!waits || now - line.heartbeat.load(std::memory_order_relaxed) > kSilentNs) {
      idle.add(rank);
      continue;
    }
    for (int next = 0; next < world_size_; ++next) {
      const bool awaited = (line.awaited[next / 64].load(std::memory_order_relaxed) >> (next % 64)) & 1;
      if (!awaited || known.has(next)) continue;
      known.add(next);
      chain.push_back(next);
    }
  }
  if (!idle.empty()) return idle;
  for (int rank = 0; rank < world_size_; ++rank) {
    if (lagging.has(rank) && reached(least, progress_of(rank))) last.add(rank);
  }
  return last.empty() ? lagging : last;
}

RankSet Group::lost_ranks() const {
  RankSet dead;
  std::vector<pollfd> watched;
  watched.reserve(pidfds_.numbers().size());
  for (int pidfd : pidfds_.numbers()) watched.push_back({pidfd, POLLIN, 0});  // poll skips negative ones
  if (poll(watched.data(), watched.size(), 0) <= 0) return dead;
  for (std::size_t rank = 0; rank < watched.size(); ++rank) {
    if (watched[rank].revents != 0) dead.add(static_cast<int>(rank));
  }
  return dead;
}

void Group::fail(Failure kind, const RankSet& ranks) {
  FailureLine& line = layout_.failure();
  std::uint32_t none = 0;
  const auto origin = static_cast<std::uint32_t>(rank_) << 8;
  if (!line.state.compare_exchange_strong(none, static_cast<std::uint32_t>(Failure::kClaimed) | origin,
                                          std::memory_order_acq_rel)) {
    return;
  }
  for (int word = 0; word < kMaxRanks / 64; ++word) {
    line.ranks[word].store(ranks.words[word], std::memory_order_relaxed);
  }
  line.state.store(static_cast<std::uint32_t>(kind) | origin, std::memory_order_release);
  for (RankLine* other : lines_) {  // a sleeper that has just looked wakes at the end of its slice
    futex_wake_all(&other->progress);
    futex_wake_all(&other->door);
  }
}

FailureReport Group::failure() const {
  const FailureLine& line = layout_.failure();
  std::uint32_t state = line.state.load(std::memory_order_acquire);
  FailureReport report;
  if (state == 0) return report;
  const std::int64_t limit = now_ns() + 100'000'000;
  while ((state & 0xff) == static_cast<std::uint32_t>(Failure::kClaimed) && now_ns() < limit) {
    yield_processor();
    state = line.state.load(std::memory_order_acquire);
  }
  report.origin = static_cast<int>(state >> 8);
  report.kind = static_cast<Failure>(state & 0xff);
  if (report.kind == Failure::kClaimed) {  // killed between two stores: then it is the one that is lost
    report.kind = Failure::kLost;
    report.ranks.add(report.origin);
    return report;
  }
  for (int word = 0; word < kMaxRanks / 64; ++word) {
    report.ranks.words[word] = line.ranks[word].load(std::memory_order_relaxed);
  }
  return report;
}

void Group::leave() {
  if (foreign()) return;  // the memory is the parent's, and so is the rank
  closing_.store(true, std::memory_order_release);
  RankLine& own = *lines_[rank_];
  own.left.store(1, std::memory_order_release);
  for (RankLine* other : lines_) {
    futex_wake_all(&other->progress);
    futex_wake_all(&other->door);
  }
}

}  // namespace colltensor
