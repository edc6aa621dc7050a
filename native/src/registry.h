// The groups of this process by number, so that a number used too late is refused and never a dangling pointer.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "colltensor/group.h"
#include "colltensor/segment.h"
#include "queue.h"

namespace colltensor {

struct Member {
  Mapping mapping;
  std::unique_ptr<Group> group;
  std::shared_ptr<void> context;  // of the group's hooks
  std::uint64_t nonce[2] = {};    // what other ranks try to read
  std::shared_ptr<Queue> queue = std::make_shared<Queue>();  // of asynchronous calls
};

std::uint64_t* member_nonces(std::int64_t handle);

// Returns the number of the new member, or -1 if there are too many.
std::int64_t add_member(std::unique_ptr<Member> member);

// Leaves the group, waits for a call of another thread to notice, and frees everything. True if that call ended; one
// that is pending is cancelled.
bool remove_member(std::int64_t handle);

// The right to use a group, of one thread at a time: taken at once or not at all.
class Turn {
 public:
  explicit Turn(std::int64_t handle);
  ~Turn();
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

  Outcome outcome() const { return outcome_; }  // kDone, kBusy or kClosed
  void keep() { state_ = nullptr; }             // until release_member()
  Group* operator->() const { return group_; }
  Group& operator*() const { return *group_; }

 private:
  std::atomic<std::uint64_t>* state_ = nullptr;
  Group* group_ = nullptr;
  Outcome outcome_;
};

// Takes the turn for longer than one call, waiting for a thread that has it: kDone, kClosed, or kBusy at the deadline;
// kInside at once where this thread itself is in a call or has left one pending. kSignalled if `signalled`, which is asked every 50 ms, says so.
Outcome hold_member(std::int64_t handle, std::int64_t deadline_ns, bool (*signalled)() = nullptr);
void release_member(std::int64_t handle);

// Whether a thread has the turn.
bool is_busy(std::int64_t handle);

// The group, whose turn the calling thread has as long as its pending call is not resumed; null if it has none. With an
// `owner` the call is one that was handed over to it.
Group* claim_member(std::int64_t handle, const void* owner = this_thread());

// The queue of the group's asynchronous calls, which may outlive it; null if there is no such group.
std::shared_ptr<Queue> member_queue(std::int64_t handle);

// The group, whose turn the calling thread holds; null if it does not.
Group* held_member(std::int64_t handle);

// The group without a turn, for what any thread may do at any time and in no time; it is not freed meanwhile.
class Guest {
 public:
  explicit Guest(std::int64_t handle);
  ~Guest();
  Guest(const Guest&) = delete;
  Guest& operator=(const Guest&) = delete;

  explicit operator bool() const { return group_ != nullptr; }  // false: there is none
  Group* operator->() const { return group_; }

 private:
  std::atomic<std::uint32_t>* guests_ = nullptr;
  Group* group_ = nullptr;
};

}  // namespace colltensor
