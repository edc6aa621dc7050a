// What every collective begins and ends with.
#include "colltensor/group.h"

#include <algorithm>
#include <cstring>

namespace colltensor {
namespace {

// Pauses before the core is offered to whoever wants it, and how often that is done before the rank sleeps. Nobody
// pauses while a rank that it waits for was last seen on the very core. Waking a sleeper takes about 60 us on a virtual
// machine, and a wait that gives up sooner makes the other rank sleep too, call after call.
constexpr int kSpins = 1000, kSpinsCrowded = 200;
constexpr int kYields = 300, kYieldsCrowded = 64;

}  // namespace

Group::Group(char* base, Place place)
    : layout_(base, place.world_size),
      rank_(place.rank),
      world_size_(place.world_size),
      staging_(base + layout_.header().staging_offset),
      half_nbytes_(layout_.header().half_nbytes),
      direct_nbytes_(layout_.header().direct_nbytes),
      chunk_nbytes_(layout_.header().chunk_nbytes),
      read_nbytes_(layout_.header().read_nbytes),
      cache_nbytes_(layout_.header().cache_nbytes),
      crowded_(static_cast<std::uint32_t>(place.world_size) > layout_.header().cores),
      spins_(crowded_ ? kSpinsCrowded : kSpins),
      yields_(crowded_ ? kYieldsCrowded : kYields),
      pidfds_(std::move(place.pidfds)),
      hooks_(place.hooks),
      fork_generation_(fork_generation()),
      sent_(place.world_size, kFirstStep),
      received_(place.world_size, kFirstStep),
      taken_(place.world_size, kFirstStep),
      given_(place.world_size, kFirstStep),
      sends_(place.world_size),
      receives_(place.world_size) {
  for (int rank = 0; rank < world_size_; ++rank) lines_.push_back(&layout_.rank(rank));
  for (int next = 1; next < world_size_; ++next) others_.push_back((rank_ + next) % world_size_);
}

Outcome Group::enter() const {
  if (foreign() || closing_.load(std::memory_order_acquire)) return Outcome::kClosed;
  if (pending_.load(std::memory_order_relaxed) != nullptr) return Outcome::kBusy;
  if (resumed_) return Outcome::kDone;  // what it waits for may have come before the failure
  return layout_.failure().state.load(std::memory_order_acquire) != 0 ? Outcome::kFailed : Outcome::kDone;
}

class TakenCondition final : public Condition {
 public:
  TakenCondition(const Group& group, const Group::Untaken& message) : group_(group), message_(message) {}
  bool ready() const override {
    return Group::reached(message_.receiver->count.load(std::memory_order_acquire), message_.step);
  }
  bool needs_cpu(std::uint32_t cpu) const override { return group_.is_on(message_.peer, cpu); }
  RankSet missing() const override {
    RankSet set;
    if (!ready()) set.add(message_.peer);
    return set;
  }

 private:
  const Group& group_;
  const Group::Untaken& message_;
};

Outcome Group::wait_for_half(unsigned which, std::int64_t deadline_ns, int but) {
  const Outcome outcome = wait_for_all(half_free_[which], deadline_ns);
  if (outcome != Outcome::kDone || is_half_free(which, but)) return outcome;
  RankLine& own = *lines_[rank_];
  for (const Untaken& message : untaken_[which]) {
    if (message.peer == but) continue;
    const Outcome waited = wait_until(TakenCondition(*this, message), own.door, own.dozing, deadline_ns);
    if (waited != Outcome::kDone) return waited;
  }
  return Outcome::kDone;
}

void Group::forget_untaken(int peer) {
  for (std::vector<Untaken>& messages : untaken_) {
    const auto end = std::remove_if(messages.begin(), messages.end(),
                                    [peer](const Untaken& message) { return message.peer == peer; });
    messages.erase(end, messages.end());
  }
}

bool Group::is_half_free(unsigned which, int but) const {
  for (const Untaken& message : untaken_[which]) {
    if (message.peer != but && !TakenCondition(*this, message).ready()) return false;
  }
  return is_there(half_free_[which]);
}

// Not before the caller is to wait for others are sleepers looked for, or at the end of a brief call that need not: the
// fence is cheap once the stores have left the processor. Until then nobody looks at more of this rank than its post,
// whose line goes to them and is not asked for again, so that the next stores find the others in this core's cache.
void Group::arrive(std::uint32_t arrival, const Signature& signature) {
  Post& post = own_post();
  const std::uint32_t cpu = current_cpu();
  post.signature = signature;
  post.cpu.store(static_cast<std::uint16_t>(cpu), std::memory_order_relaxed);
  post.arrived.store(arrival, std::memory_order_release);
  done_ = arrival;
  lines_[rank_]->cpu.store(cpu, std::memory_order_relaxed);
  lines_[rank_]->progress.store(arrival, std::memory_order_release);
}

Outcome Group::agree(std::uint32_t arrival, const Signature& signature, std::int64_t deadline_ns) {
  const bool brief = deadline_ns == kBrief;
  const bool all = (brief || (!crowded_ && !resumed_)) && spin_for_arrivals(arrival, kBriefSpins);
  if (!brief || !all) wake_sleepers();
  if (!all) {
    if (brief) return Outcome::kPending;
    const Outcome outcome = wait_for_all(arrival, deadline_ns);
    if (outcome != Outcome::kDone) return outcome;
  }
  if (!signatures_agree(signature)) {
    if (brief) wake_sleepers();
    ++calls_;
    return Outcome::kMismatch;
  }
  if (hooks_.agreed != nullptr) {
    const Asking asking(*this);
    hooks_.agreed(hooks_.agreed_context);
  }
  return Outcome::kDone;
}

bool Group::claim(const void* owner) {
  return pending_.compare_exchange_strong(owner, nullptr, std::memory_order_acq_rel);
}

Outcome Group::resume(std::int64_t deadline_ns, std::int64_t& detail) {
  const Rest rest = std::move(rest_);
  resumed_ = true;
  const Outcome outcome = rest(deadline_ns, detail);
  resumed_ = false;
  return outcome;
}

bool Group::signatures_agree(const Signature& signature) const {
  for (int rank : others_) {
    if (!(layout_.post(rank, parity()).signature == signature)) return false;
  }
  return true;
}

// After a call whose data everybody read from the posts or one half, while arriving nowhere else: that half is free
// once all have arrived at the next call.
void Group::finish_fast(std::uint32_t arrival, bool brief) {
  if (brief) wake_sleepers();
  half_free_[parity()] = arrival + 1;
  ++calls_;
}

void Group::finish_large(std::uint32_t last) {
  half_free_[0] = half_free_[1] = last;
  ++calls_;
}

}  // namespace colltensor
