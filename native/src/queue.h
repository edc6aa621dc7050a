// The asynchronous calls of a group, in the order in which they were issued. Whoever issues puts them here, one thread
// serves them, without the interpreter lock, and anybody waits. A call is known by its number, which counts from 1.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <set>

#include "colltensor/platform.h"

namespace colltensor {

class Queue {
 public:
  // Makes a call, from taking the turn to giving it back, and returns its code, 0 for success.
  using Job = std::function<std::int64_t()>;
  // What serve() returns when no call failed.
  static constexpr std::int64_t kLookAround = 0, kNotified = -1;

  std::int64_t issued() const { return issued_.load(std::memory_order_relaxed); }
  std::int64_t ended() const { return ended_.load(std::memory_order_acquire); }

  // Returns the number of the call; 0 if the queue is closed.
  std::int64_t push(Job job);

  // Makes calls until one ends with something other than success: returns its code, and the call, which is number
  // ended() + 1, ends with the next serve(). kNotified after a call that notify() was told of. kLookAround when no call
  // is left: unless `patient` at once, else after a kick(), a close(), or where many have ended since the last time. One
  // thread at a time.
  std::int64_t serve(bool patient);
  void kick();

  // Waits until the call has ended: false at the deadline, or where `signalled`, asked every 50 ms, says so.
  bool wait(std::int64_t number, std::int64_t deadline_ns, bool (*signalled)(), bool& interrupted) const;

  // Has serve() return when the call has ended; false if it has.
  bool notify(std::int64_t number);

  // Drops the calls that are not begun, and returns the number of the first one; they have not ended before cancel(),
  // and then do when the one that is made has.
  std::int64_t close();
  void cancel();

  bool foreign() const { return fork_generation_ != fork_generation(); }

 private:
  void end(std::int64_t number);  // with the lock

  std::mutex mutex_;
  std::deque<Job> jobs_;
  std::set<std::int64_t> notified_;
  bool kicked_ = false, closed_ = false, cancelled_ = false;
  bool running_ = false;  // or ended with a failure that nobody has dealt with yet
  bool failed_ = false;
  std::int64_t seen_ = 0;  // how many calls had ended when serve() last had Python look around
  std::atomic<std::int64_t> issued_{0}, ended_{0};
  mutable std::atomic<std::uint32_t> endings_{0}, waiters_{0};  // endings_ and calls_ are futex words
  std::atomic<std::uint32_t> calls_{0}, idle_{0};
  const std::uint32_t fork_generation_ = fork_generation();
};

}  // namespace colltensor
