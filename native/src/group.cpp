// What every collective begins and ends with.
#include "colltensor/group.h"

#include <cstring>

namespace colltensor {
namespace {

// Where every rank has a core: 20 us of pauses, then more than 100 us of offering the core to whoever wants it, because
// waking a sleeper takes about 60 us on a virtual machine, and a wait that gives up sooner than that makes the
// other rank sleep too, call after call. Where ranks share cores a pause only keeps them from running.
constexpr int kSpins = 1000, kSpinsCrowded = 0;
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
}

Outcome Group::enter() const {
  if (foreign() || closing_.load(std::memory_order_acquire)) return Outcome::kClosed;
  if (pending()) return Outcome::kBusy;
  return layout_.failure().state.load(std::memory_order_acquire) != 0 ? Outcome::kFailed : Outcome::kDone;
}

Outcome Group::wait_for_half(unsigned which, std::int64_t deadline_ns) {
  return wait_for_all(half_free_[which], deadline_ns);
}

bool Group::signatures_agree(const Signature& signature) const {
  for (int rank = 0; rank < world_size_; ++rank) {
    if (!(layout_.post(rank, parity()).signature == signature)) return false;
  }
  return true;
}

// After a call whose data everybody read from the posts or one half, while arriving nowhere else: that half is free
// once all have arrived at the next call.
void Group::finish_direct(std::uint32_t arrival) {
  half_free_[parity()] = arrival + 1;
  ++calls_;
}

void Group::finish_large(std::uint32_t last) {
  half_free_[0] = half_free_[1] = last;
  ++calls_;
}

}  // namespace colltensor
