#include "registry.h"

#include <pthread.h>

#include <chrono>
#include <mutex>
#include <thread>

namespace colltensor {
namespace {

constexpr int kIndexBits = 12;
constexpr std::uint64_t kBusy = 1, kClosed = 2, kFlags = 3;
constexpr int kCloseLimitMs = 3000;
constexpr int kLookUs = 50, kLooksPerSignal = 50'000 / kLookUs;

struct Slot {
  std::atomic<std::uint64_t> state{kClosed};  // the use's number, and above which it is busy or closed
  std::atomic<std::uint32_t> guests{0};    // threads that look at the member without a turn
  std::unique_ptr<Member> member;
};

// Never destroyed: threads may still be in a call when the process ends.
Slot* const slots = new Slot[std::size_t{1} << kIndexBits];
std::mutex* const opening = new std::mutex;

// A child forked while another thread opens or closes a group must not find the lock taken for ever.
struct ForkGuard {
  ForkGuard() {
    pthread_atfork([] { opening->lock(); }, [] { opening->unlock(); }, [] { opening->unlock(); });
  }
} fork_guard;

Slot& slot_of(std::int64_t handle) { return slots[handle & ((1 << kIndexBits) - 1)]; }
std::uint64_t use_of(std::int64_t handle) { return static_cast<std::uint64_t>(handle) >> kIndexBits << 2; }

}  // namespace

std::int64_t add_member(std::unique_ptr<Member> member) {
  const std::lock_guard<std::mutex> lock(*opening);
  for (std::int64_t index = 0; index < (1 << kIndexBits); ++index) {
    Slot& slot = slots[index];
    const std::uint64_t state = slot.state.load(std::memory_order_acquire);
    if ((state & kFlags) != kClosed || slot.member != nullptr) continue;
    const std::uint64_t use = (state >> 2) + 1;
    slot.member = std::move(member);
    slot.state.store(use << 2, std::memory_order_release);
    return static_cast<std::int64_t>(use << kIndexBits) | index;
  }
  return -1;
}

std::uint64_t* member_nonces(std::int64_t handle) { return slot_of(handle).member->nonce; }

bool remove_member(std::int64_t handle) {
  if (handle < 0) return true;
  Slot& slot = slot_of(handle);
  std::uint64_t state = slot.state.load(std::memory_order_acquire);
  do {
    if ((state & ~kFlags) != use_of(handle) || (state & kClosed) != 0) return true;
  } while (!slot.state.compare_exchange_weak(state, state | kClosed, std::memory_order_acq_rel));
  slot.member->group->leave();
  const auto used = [&] {
    return (slot.state.load(std::memory_order_acquire) & kBusy) != 0 ||
           slot.guests.load(std::memory_order_acquire) != 0;
  };
  full_fence();  // against Guest, which counts itself and then looks whether the slot is closed
  for (int waited = 0; used(); ++waited) {
    if (slot.member->group->cancel()) {  // its thread finds it gone
      release_member(handle);
      continue;
    }
    // The slot and its memory are never used again.
    if (waited == kCloseLimitMs || slot.member->group->foreign()) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  std::unique_ptr<Member> gone;  // freed without the lock: its context may run code of the interpreter's
  const std::lock_guard<std::mutex> lock(*opening);
  gone = std::move(slot.member);
  return true;
}

Turn::Turn(std::int64_t handle) : outcome_(Outcome::kClosed) {
  if (handle < 0) return;
  Slot& slot = slot_of(handle);
  std::uint64_t idle = use_of(handle);
  const std::uint64_t use = idle;
  if (slot.state.compare_exchange_strong(idle, use | kBusy, std::memory_order_acquire)) {
    state_ = &slot.state;
    group_ = slot.member->group.get();
    outcome_ = Outcome::kDone;
  } else if (idle == (use | kBusy)) {
    outcome_ = Outcome::kBusy;
  }
}

Turn::~Turn() {
  if (state_ != nullptr) state_->fetch_and(~kBusy, std::memory_order_release);
}

Outcome hold_member(std::int64_t handle, std::int64_t deadline_ns, bool (*signalled)()) {
  for (int looks = 1;; ++looks) {
    Turn turn(handle);
    if (turn.outcome() == Outcome::kDone) turn.keep();
    if (turn.outcome() != Outcome::kBusy || now_ns() >= deadline_ns) return turn.outcome();
    if (const Guest group(handle); group && (group->pending() || group->asking())) return Outcome::kInside;
    if (looks % kLooksPerSignal == 0 && signalled != nullptr && signalled()) return Outcome::kSignalled;
    std::this_thread::sleep_for(std::chrono::microseconds(kLookUs));
  }
}

void release_member(std::int64_t handle) { slot_of(handle).state.fetch_and(~kBusy, std::memory_order_release); }

bool is_busy(std::int64_t handle) {
  return handle >= 0 && slot_of(handle).state.load(std::memory_order_acquire) == (use_of(handle) | kBusy);
}

Group* held_member(std::int64_t handle) {
  if (handle < 0) return nullptr;
  Slot& slot = slot_of(handle);
  const std::uint64_t state = slot.state.load(std::memory_order_acquire);
  return (state & ~kClosed) == (use_of(handle) | kBusy) ? slot.member->group.get() : nullptr;
}

Group* claim_member(std::int64_t handle, const void* owner) {
  const Guest group(handle);  // until this thread has the turn again, which keeps the group
  return group && group->claim(owner) ? held_member(handle) : nullptr;
}

std::shared_ptr<Queue> member_queue(std::int64_t handle) {
  const Guest group(handle);
  return group ? slot_of(handle).member->queue : nullptr;
}

Guest::Guest(std::int64_t handle) {
  if (handle < 0) return;
  Slot& slot = slot_of(handle);
  guests_ = &slot.guests;
  guests_->fetch_add(1, std::memory_order_relaxed);
  full_fence();  // against remove_member()
  const std::uint64_t state = slot.state.load(std::memory_order_acquire);
  if ((state & ~kFlags) == use_of(handle) && (state & kClosed) == 0) group_ = slot.member->group.get();
}

Guest::~Guest() {
  if (guests_ != nullptr) guests_->fetch_sub(1, std::memory_order_release);
}

}  // namespace colltensor
