#include "queue.h"

#include <algorithm>
#include <utility>

namespace colltensor {
namespace {

constexpr std::int64_t kSliceNs = 50'000'000;    // between two questions for signals
constexpr std::int64_t kIdleNs = 3'600'000'000'000;
constexpr int kYields = 100;  // before a waiter sleeps, whom to wake takes longer
constexpr std::int64_t kLongYieldNs = 1'000'000;  // others want the processor: whoever sleeps is preferred when woken
constexpr std::int64_t kEndedUnseen = 15;         // calls whose tensors Python is not told of

}  // namespace

std::int64_t Queue::push(Job job) {
  std::int64_t number = 0;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (closed_) return 0;
    jobs_.push_back(std::move(job));
    number = issued() + 1;
    issued_.store(number, std::memory_order_relaxed);
    calls_.fetch_add(1, std::memory_order_relaxed);
  }
  full_fence();  // against serve(), which says that it is idle and then looks at `calls_`
  if (idle_.load(std::memory_order_relaxed) != 0) futex_wake_all(&calls_);
  return number;
}

void Queue::kick() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    kicked_ = true;
    calls_.fetch_add(1, std::memory_order_relaxed);
  }
  futex_wake_all(&calls_);
}

void Queue::end(std::int64_t number) {
  ended_.store(number, std::memory_order_release);
  endings_.fetch_add(1, std::memory_order_relaxed);
  full_fence();  // against wait()
  if (waiters_.load(std::memory_order_relaxed) != 0) futex_wake_all(&endings_);
}

std::int64_t Queue::serve(bool patient) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (failed_) {
    failed_ = running_ = false;
    const std::int64_t number = ended() + 1;
    end(cancelled_ ? issued() : number);
    if (notified_.erase(number) != 0) return kNotified;
  }
  for (;;) {
    while (jobs_.empty()) {
      const bool unseen = ended() - seen_ >= kEndedUnseen;
      if (std::exchange(kicked_, false) || closed_ || !patient || unseen) {
        seen_ = ended();
        return kLookAround;
      }
      const std::uint32_t seen = calls_.load(std::memory_order_relaxed);
      lock.unlock();
      idle_.store(1, std::memory_order_relaxed);
      full_fence();
      if (calls_.load(std::memory_order_relaxed) == seen) futex_wait(&calls_, seen, kIdleNs);
      idle_.store(0, std::memory_order_relaxed);
      lock.lock();
    }
    Job job = std::move(jobs_.front());
    jobs_.pop_front();
    running_ = true;
    lock.unlock();
    const std::int64_t code = job();
    job = nullptr;
    lock.lock();
    if (code != 0) {
      failed_ = true;
      return code;
    }
    running_ = false;
    const std::int64_t number = ended() + 1;
    end(cancelled_ ? issued() : number);
    if (!notified_.empty() && notified_.erase(number) != 0) return kNotified;
  }
}

bool Queue::wait(std::int64_t number, std::int64_t deadline_ns, bool (*signalled)(), bool& interrupted) const {
  std::int64_t last = now_ns();
  for (int yields = kYields; yields > 0 && ended() < number && last < deadline_ns; --yields) {
    const std::int64_t before = last;
    yield_processor();
    last = now_ns();
    if (last - before > kLongYieldNs) break;
  }
  while (ended() < number) {
    const std::int64_t now = now_ns();
    if (now >= deadline_ns) return false;
    waiters_.fetch_add(1, std::memory_order_relaxed);
    full_fence();
    const std::uint32_t seen = endings_.load(std::memory_order_acquire);
    bool signal = false;
    if (ended() < number) signal = futex_wait(&endings_, seen, std::min(kSliceNs, deadline_ns - now));
    waiters_.fetch_sub(1, std::memory_order_relaxed);
    if (ended() >= number) return true;
    if ((signal || now_ns() - now >= kSliceNs) && signalled != nullptr && signalled()) {
      interrupted = true;
      return false;
    }
  }
  return true;
}

bool Queue::notify(std::int64_t number) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (ended() >= number) return false;
  notified_.insert(number);
  return true;
}

std::int64_t Queue::close() {
  std::deque<Job> dropped;  // freed without the lock
  std::int64_t first = 0;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    closed_ = true;
    dropped.swap(jobs_);
    first = issued() - static_cast<std::int64_t>(dropped.size()) + 1;
    calls_.fetch_add(1, std::memory_order_relaxed);
  }
  futex_wake_all(&calls_);
  return first;
}

void Queue::cancel() {
  const std::lock_guard<std::mutex> lock(mutex_);
  cancelled_ = true;
  if (!running_) end(issued());
}

}  // namespace colltensor
