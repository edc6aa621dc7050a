// The ways in which a call can end without a result: late and departed ranks, a closed group, the caller's own reasons;
// and the table of groups. Ranks are threads; each waits long enough to sleep.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <memory>
#include <thread>

#include "check.h"
#include "registry.h"

namespace colltensor {
namespace tests {
namespace {

constexpr std::int64_t kShortMs = 80, kLongMs = 10'000, kSoonMs = 1500;
constexpr std::size_t kSmallCount = 10, kLargeCount = 100'000;
constexpr int kAbsent = 2, kRanks = 3;

enum Kind { kBarrier, kAllReduce, kReduce, kBroadcast, kAllGather, kGather, kScatter, kAllToAll, kReduceScatter, kSend,
            kReceive, kBrief, kBriefTransfer, kKinds };

RankSet only(int rank) {
  RankSet set;
  set.add(rank);
  return set;
}

std::unique_ptr<Group> member(const SharedMemory& memory, int rank, Hooks hooks = counting_hooks()) {
  return std::make_unique<Group>(memory.base(), Place{rank, memory.ranks(), Descriptors(), hooks});
}

// A call of `kind` with everybody, or the rank that does not come.
Outcome call(Group& group, int kind, std::size_t count, std::int64_t deadline) {
  std::vector<std::vector<float>> memory(kRanks, std::vector<float>(count, 1.0f));
  std::vector<View> views;
  for (auto& floats : memory) views.emplace_back(floats.data(), sizeof(float));
  std::vector<float> own(count, 1.0f);
  const View view(own.data(), sizeof(float));
  const Signature signature;
  Group::Transfer transfer{&view, count, sizeof(float), kAbsent, signature};
  switch (kind) {
    case kBarrier: return group.barrier(signature, deadline);
    case kAllReduce: return group.allreduce(view, count, DType::kFloat32, ReduceOp::kSum, signature, deadline);
    case kReduce: return group.reduce(view, count, DType::kFloat32, ReduceOp::kSum, 0, signature, deadline);
    case kBroadcast: return group.broadcast(view, count, sizeof(float), 0, signature, deadline);
    case kAllGather: return group.allgather(views.data(), view, count, sizeof(float), signature, deadline);
    case kGather: return group.gather(views.data(), view, count, sizeof(float), 0, signature, deadline);
    case kScatter: return group.scatter(view, views.data(), count, sizeof(float), 0, signature, deadline);
    case kAllToAll: return group.alltoall(views.data(), views.data(), count, sizeof(float), signature, deadline);
    case kReduceScatter:
      return group.reducescatter(view, views.data(), count, DType::kFloat32, ReduceOp::kSum, signature, deadline);
    case kSend: return group.transfer(&transfer, nullptr, deadline);
    case kReceive: return group.transfer(nullptr, &transfer, deadline);
    default: {
      Group::Transfer back = transfer;
      back.view = &views[0];
      const auto make = [&](std::int64_t until) {
        if (kind == kBriefTransfer) return group.transfer(&transfer, &back, until);
        return group.allreduce(view, kSmallCount, DType::kFloat32, ReduceOp::kSum, signature, until);
      };
      const Outcome begun = make(Group::kBrief);
      if (begun != Outcome::kPending) return begun;
      group.postpone([&](std::int64_t until, std::int64_t&) { return make(until); });
      expect(group.claim(), "a pending call is nobody's");
      std::int64_t none = 0;
      return group.resume(deadline, none);
    }
  }
}

void expect_failure(const Group& group, Failure kind, const RankSet& ranks, const char* what) {
  const FailureReport report = group.failure();
  expect(report.kind == kind, "%s: rank %d sees failure %d", what, group.rank(), static_cast<int>(report.kind));
  for (int rank = 0; rank < kRanks; ++rank) {
    expect(report.ranks.has(rank) == ranks.has(rank), "%s: rank %d %s rank %d", what, group.rank(),
           report.ranks.has(rank) ? "names" : "does not name", rank);
  }
}

void late(int kind, std::size_t count) {
  const SharedMemory memory(kRanks, kind % 2 == 0 ? 1 : kRanks, kSmall);
  const std::unique_ptr<Group> absent = member(memory, kAbsent);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < kAbsent; ++rank) {
    threads.emplace_back([&memory, rank, kind, count] {
      this_rank = rank;
      const std::unique_ptr<Group> group = member(memory, rank);
      const std::int64_t began = now_ns();
      const Outcome outcome = call(*group, kind, count, in_ms(kShortMs));
      const std::int64_t took = (now_ns() - began) / 1'000'000;
      expect(outcome == Outcome::kFailed, "late: kind %d ended with outcome %d", kind, static_cast<int>(outcome));
      expect(took < kSoonMs, "late: kind %d took %d ms", kind, static_cast<int>(took));
      expect_failure(*group, Failure::kLate, only(kAbsent), "late");
      expect(call(*group, kind, count, in_ms(kLongMs)) == Outcome::kFailed, "a broken group goes on, kind %d", kind);
    });
  }
  for (std::thread& thread : threads) thread.join();
  expect(call(*absent, kBarrier, 0, in_ms(kLongMs)) == Outcome::kFailed, "the late rank is not told");
}

// One rank waits for another, which does `act` meanwhile.
template <class Act>
Outcome wait_for_other(Group& group, Act act) {
  std::thread other([&act] {
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    act();
  });
  const std::int64_t began = now_ns();
  const Outcome outcome = call(group, kAllReduce, kLargeCount, in_ms(kLongMs));
  expect(now_ns() - began < kSoonMs * 1'000'000, "a wait did not end soon: outcome %d", static_cast<int>(outcome));
  other.join();
  return outcome;
}

void departed() {
  const SharedMemory memory(2, 2, kSmall);
  const std::unique_ptr<Group> stays = member(memory, 0), leaves = member(memory, 1);
  this_rank = 0;
  expect(wait_for_other(*stays, [&] { leaves->leave(); }) == Outcome::kFailed, "a rank that left is waited for");
  expect_failure(*stays, Failure::kLeft, only(1), "departed");
  expect(call(*leaves, kBarrier, 0, in_ms(kLongMs)) == Outcome::kClosed, "a rank that left can call");
}

// A short send ends when its receiver has come. What that has not taken is there for it even when the sender has left,
// is not overwritten, and is waited for in time; and when a third rank has found that the sender is gone.
void untaken(bool sender_leaves) {
  const SharedMemory memory(kRanks, kRanks, kSmall);
  const std::unique_ptr<Group> sender = member(memory, 0), receiver = member(memory, 1), other = member(memory, 2);
  const Signature signature;
  std::array<float, 4> given{1, 2, 3, 4}, taken{}, more{5, 6, 7, 8};
  const View from(given.data(), sizeof(float)), to(taken.data(), sizeof(float)), next(more.data(), sizeof(float));
  Group::Transfer recv{&to, given.size(), sizeof(float), 0, signature};
  const auto receive = [&](std::int64_t deadline) { return receiver->transfer(nullptr, &recv, deadline); };
  expect(receive(Group::kBrief) == Outcome::kPending, "nothing was sent");
  receiver->postpone([&](std::int64_t deadline, std::int64_t&) { return receive(deadline); });

  Group::Transfer send{&from, given.size(), sizeof(float), 1, signature};
  expect(sender->transfer(&send, nullptr, in_ms(kLongMs)) == Outcome::kDone, "the receiver has come");
  Group::Transfer to_other{&next, more.size(), sizeof(float), kAbsent, signature};
  expect(sender->transfer(&to_other, nullptr, Group::kBrief) == Outcome::kLarge, "what was not taken is overwritten");
  if (sender_leaves) {
    sender->leave();
    expect(other->barrier(signature, in_ms(kLongMs)) == Outcome::kFailed, "a rank that left is waited for");
  } else {
    expect(sender->transfer(&to_other, nullptr, in_ms(kShortMs)) == Outcome::kFailed, "nobody takes what was sent");
    expect_failure(*sender, Failure::kLate, only(1), "untaken");
  }
  std::int64_t none = 0;
  const Outcome ended = receiver->claim() ? receiver->resume(in_ms(kLongMs), none) : Outcome::kBusy;
  expect(ended == Outcome::kDone && taken == given, "what was sent is gone");
}

void closed_by_another_thread() {
  const SharedMemory memory(2, 2, kSmall);
  const std::unique_ptr<Group> group = member(memory, 0), peer = member(memory, 1);
  expect(wait_for_other(*group, [&] { group->leave(); }) == Outcome::kClosed, "closing does not end a call");
  // It has arrived, but it will not go on.
  expect(call(*peer, kAllReduce, kLargeCount, in_ms(kLongMs)) == Outcome::kFailed, "a closed rank is waited for");
  expect_failure(*peer, Failure::kLeft, only(0), "closed");
}

void stopped() {
  const SharedMemory memory(2, 2, kSmall);
  std::atomic<bool> wanted{false};
  Hooks hooks = counting_hooks();
  hooks.context = &wanted;
  hooks.stop = [](void* context) {
    return static_cast<std::atomic<bool>*>(context)->load() ? Hooks::kStop : Hooks::kGoOn;
  };
  const std::unique_ptr<Group> group = member(memory, 0, hooks), peer = member(memory, 1);
  expect(wait_for_other(*group, [&] { wanted = true; }) == Outcome::kStopped, "the caller cannot stop a call");
  expect(group->failure().kind == Failure::kNone, "a stopped call breaks the group by itself");
  std::thread waits([&] {
    expect(call(*peer, kReduce, kLargeCount, in_ms(kLongMs)) == Outcome::kFailed, "a broken group is waited for");
    expect_failure(*peer, Failure::kBroken, {}, "broken");
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  group->fail(Failure::kBroken, {});
  group->fail(Failure::kLate, only(1));  // too late: the first failure stays
  waits.join();
  expect_failure(*group, Failure::kBroken, {}, "broken");
}

void signalled() {
  const SharedMemory memory(2, 2, kSmall);
  const std::unique_ptr<Group> group = member(memory, 0), peer = member(memory, 1);
  this_rank = 0;
  expect(wait_for_other(*group, [] { signalled_rank = 0; }) == Outcome::kSignalled, "a signal does not end a call");
  signalled_rank = kNoRank;
}

// A rank that sleeps is woken, and does not merely look around after its slice of 50 ms, 20 ms later.
void wakes(int kind) {
  std::int64_t quickest = kLongMs * 1'000'000;
  for (int attempt = 0; attempt < 5; ++attempt) {
    const SharedMemory memory(kRanks, 1, kSmall);
    std::atomic<std::int64_t> arrived{0};
    std::thread sleeps([&memory, &arrived, &quickest, kind] {
      const std::unique_ptr<Group> group = member(memory, 0);
      expect(call(*group, kind, kSmallCount, in_ms(kLongMs)) == Outcome::kDone, "a sleeper's call");
      quickest = std::min(quickest, now_ns() - arrived.load());
    });
    std::vector<std::thread> threads;
    if (kind != kReceive) {
      threads.emplace_back([&memory, kind] {
        expect(call(*member(memory, 1), kind, kSmallCount, in_ms(kLongMs)) == Outcome::kDone, "a sleeper's call");
      });
    }
    const std::unique_ptr<Group> wakes = member(memory, kAbsent);
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    arrived = now_ns();
    if (kind == kReceive) {
      const std::vector<float> given(kSmallCount);
      const View view(const_cast<float*>(given.data()), sizeof(float));
      Group::Transfer send{&view, kSmallCount, sizeof(float), 0, Signature()};
      expect(wakes->transfer(&send, nullptr, in_ms(kLongMs)) == Outcome::kDone, "the call of who wakes");
    } else {
      expect(call(*wakes, kind, kSmallCount, in_ms(kLongMs)) == Outcome::kDone, "the call of who wakes");
    }
    sleeps.join();
    for (std::thread& thread : threads) thread.join();
  }
  expect(quickest < 10'000'000, "a sleeper was woken after %d us at best, kind %d", static_cast<int>(quickest / 1000),
         kind);
}

// A group as Python has it: its memory is mapped once for each rank.
std::int64_t open(int fd, std::uint64_t nbytes, int rank) {
  auto opened = std::make_unique<Member>();
  expect(opened->mapping.map(fd, nbytes), "the segment cannot be mapped");
  expect(check_segment(opened->mapping.base(), nbytes, 2), "the segment is refused");
  opened->group = std::make_unique<Group>(opened->mapping.base(), Place{rank, 2, Descriptors(), counting_hooks()});
  return add_member(std::move(opened));
}

// Two ranks of a segment in this process.
std::array<std::int64_t, 2> both_handles() {
  const std::uint64_t nbytes = segment_nbytes(2, kSmall.half);
  const int fd = memfd_create("colltensor-test", MFD_CLOEXEC);
  expect(fd >= 0 && ftruncate(fd, static_cast<off_t>(nbytes)) == 0, "no memory of its own");
  {
    Mapping mapping;
    expect(mapping.map(fd, nbytes), "the segment cannot be mapped");
    format_segment(mapping.base(), 2, 2, kSmall.half, kSmall.direct, kSmall.chunk, kSmall.read, kSmall.cache);
  }
  const std::array<std::int64_t, 2> handles = {open(fd, nbytes, 0), open(fd, nbytes, 1)};
  close(fd);
  expect(handles[0] >= 0 && handles[1] >= 0 && handles[0] != handles[1], "no handles");
  return handles;
}

// A pending call is its thread's alone; one that is never resumed keeps nobody from closing the group.
void left_pending() {
  const std::array<std::int64_t, 2> handles = both_handles();
  float element = 1.0f;
  const View view(&element, sizeof element);
  const Signature signature;
  const auto begin = [&] {
    Turn turn(handles[0]);
    Group& group = *turn;
    const Outcome begun = group.allreduce(view, 1, DType::kFloat32, ReduceOp::kSum, signature, Group::kBrief);
    expect(begun == Outcome::kPending, "a brief call with nobody ends with outcome %d", static_cast<int>(begun));
    turn.keep();
    group.postpone([&, &group = *turn](std::int64_t until, std::int64_t&) {
      return group.allreduce(view, 1, DType::kFloat32, ReduceOp::kSum, signature, until);
    });
  };
  begin();
  std::thread([&] {
    expect(!Guest(handles[0])->pending() && claim_member(handles[0]) == nullptr, "another thread's call is claimed");
    expect(hold_member(handles[0], in_ms(kShortMs)) == Outcome::kBusy, "two threads have a turn at once");
  }).join();
  std::int64_t began = now_ns();
  expect(hold_member(handles[0], in_ms(kLongMs)) == Outcome::kInside, "a thread has a turn twice");
  expect(now_ns() - began < kSoonMs * 1'000'000, "a thread waits for itself");
  std::thread([&] {
    float theirs = 2.0f;
    Turn turn(handles[1]);
    expect(turn->allreduce(View(&theirs, sizeof theirs), 1, DType::kFloat32, ReduceOp::kSum, signature,
                           in_ms(kLongMs)) == Outcome::kDone, "the other rank's call");
  }).join();
  Group* const group = claim_member(handles[0]);
  expect(group != nullptr && claim_member(handles[0]) == nullptr, "a pending call is not its thread's, or twice");
  std::int64_t none = 0;
  expect(group->resume(in_ms(kLongMs), none) == Outcome::kDone, "a pending call does not end");
  expect(element == 3.0f, "a pending call has another result");
  release_member(handles[0]);
  begin();
  began = now_ns();
  std::thread([&] { expect(remove_member(handles[0]), "a pending call keeps its group open"); }).join();
  expect(now_ns() - began < kSoonMs * 1'000'000, "closing waits for a pending call");
  expect(claim_member(handles[0]) == nullptr, "a pending call of a closed group is claimed");
  expect(remove_member(handles[1]), "the other rank cannot be closed");
}

// Calls of a queue: in order, one left pending and handed over among them; what fails, and what a close drops.
void queued() {
  const std::array<std::int64_t, 2> handles = both_handles();
  const std::shared_ptr<Queue> queue = member_queue(handles[0]);
  constexpr int kCalls = 300, kFails = 200;
  float element = 1.0f;
  const View view(&element, sizeof element);
  const Signature signature;
  const auto made = [&](Group& group, std::int64_t until) {
    return group.allreduce(view, 1, DType::kFloat32, ReduceOp::kMax, signature, until);
  };
  std::atomic<int> ended_badly{0};
  std::atomic<bool> closing{false};
  std::thread server([&] {
    while (!queue->foreign()) {
      const std::int64_t code = queue->serve(true);
      if (code == Queue::kLookAround && closing) return;
      if (code == 7) ended_badly += queue->ended() + 1 == kFails;
    }
  });
  std::thread peer([&] {
    for (int i = 1; i <= kCalls; ++i) {
      if (i == kFails) continue;
      float theirs = static_cast<float>(i);
      Turn turn(handles[1]);
      expect(turn->allreduce(View(&theirs, sizeof theirs), 1, DType::kFloat32, ReduceOp::kMax, signature,
                             in_ms(kLongMs)) == Outcome::kDone, "the other rank's call");
    }
  });
  bool interrupted = false;
  for (int i = 1; i <= kCalls; ++i) {
    std::int64_t number = 0;
    if (i == kFails) {
      number = queue->push([] { return std::int64_t{7}; });
    } else if (queue->ended() + 1 == i) {  // as in the caller's thread
      Turn turn(handles[0]);
      if (!expect(turn.outcome() == Outcome::kDone, "no turn of a queue at rest")) break;
      Group& group = *turn;
      const Outcome begun = made(group, Group::kBrief);
      if (begun == Outcome::kPending) {
        turn.keep();
        group.postpone([&](std::int64_t until, std::int64_t&) { return made(group, until); });
        expect(group.hand_over(queue.get()) && !group.pending(), "a pending call is not handed over");
        number = queue->push([&] {
          Group* const claimed = claim_member(handles[0], queue.get());
          std::int64_t none = 0;
          if (claimed == nullptr) return std::int64_t{1};
          const Outcome outcome = claimed->resume(in_ms(kLongMs), none);
          release_member(handles[0]);
          return static_cast<std::int64_t>(outcome);
        });
      } else {
        expect(begun == Outcome::kDone, "a brief call");
        number = queue->push([] { return std::int64_t{0}; });
      }
    } else {
      number = queue->push([&] {
        if (hold_member(handles[0], in_ms(kLongMs)) != Outcome::kDone) return std::int64_t{1};
        const Outcome outcome = made(*held_member(handles[0]), in_ms(kLongMs));
        release_member(handles[0]);
        return static_cast<std::int64_t>(outcome);
      });
    }
    expect(number == i, "call %d has number %ld", i, static_cast<long>(number));
    if (i % 50 == 0) expect(queue->wait(i, in_ms(kLongMs), nullptr, interrupted), "call %d does not end", i);
  }
  expect(queue->wait(kCalls, in_ms(kLongMs), nullptr, interrupted) && !interrupted, "the calls do not end");
  expect(ended_badly == 1, "a failure is told %d times", ended_badly.load());
  expect(element == kCalls, "the calls have another result");
  peer.join();
  std::atomic<bool> go{false}, begun{false};
  queue->push([&] {
    begun = true;
    while (!go) std::this_thread::yield();
    return std::int64_t{0};
  });
  while (!begun) std::this_thread::yield();
  queue->push([&] {
    expect(false, "a call that was dropped is made");
    return std::int64_t{0};
  });
  closing = true;
  expect(queue->close() == kCalls + 2 && queue->push([] { return std::int64_t{0}; }) == 0, "a closed queue");
  queue->cancel();
  expect(!queue->wait(kCalls + 2, in_ms(kShortMs), nullptr, interrupted), "what is dropped ends before what is made");
  go = true;
  expect(queue->wait(kCalls + 2, in_ms(kLongMs), nullptr, interrupted), "what is dropped does not end");
  server.join();
  for (const std::int64_t handle : handles) expect(remove_member(handle), "a queue keeps its group open");
}

void table_of_groups() {
  const std::array<std::int64_t, 2> handles = both_handles();
  std::vector<std::thread> threads;
  std::atomic<int> busy{0}, begun{0};
  for (const std::int64_t handle : handles) {
    threads.emplace_back([&, handle] {
      for (int i = 0; i < 200; ++i) {
        Turn turn(handle);
        begun.fetch_add(1);
        if (!expect(turn.outcome() == Outcome::kDone, "no turn")) return;
        expect(call(*turn, i % 2 == 0 ? kBarrier : kBrief, kSmallCount, in_ms(kLongMs)) == Outcome::kDone, "a call");
      }
      if (handle == handles[1]) return;
      Turn turn(handle);
      if (turn.outcome() == Outcome::kClosed) return;  // on a busy machine the group is closed before this call
      expect(call(*turn, kBarrier, 0, in_ms(kLongMs)) == Outcome::kClosed, "closing does not end a call");
    });
    if (handle == handles[0]) {  // alone in its first call, so that it has the turn
      while (begun.load() == 0) std::this_thread::yield();
      for (int i = 0; i < 50; ++i) busy += Turn(handle).outcome() == Outcome::kBusy;
      expect(busy.load() > 0, "two threads have a turn at once");
    }
  }
  threads[1].join();
  expect(remove_member(handles[0]), "a call did not end when its group was closed");
  threads[0].join();
  for (const std::int64_t handle : handles) expect(remove_member(handle) && remove_member(handle), "closed twice");
  expect(Turn(handles[0]).outcome() == Outcome::kClosed && !Guest(handles[0]), "an old handle works");
  expect(Turn(-1).outcome() == Outcome::kClosed && !Guest(-1) && remove_member(-1), "no handle works");
}

// All ranks send to all, each transfer in a thread of its own, in numbers and sizes that staging does not hold at once.
void beside() {
  constexpr int kTimes = 20;
  const SharedMemory memory(kRanks, kRanks, kSmall);
  std::vector<std::unique_ptr<Group>> groups;
  for (int rank = 0; rank < kRanks; ++rank) groups.push_back(member(memory, rank));
  std::vector<std::thread> threads;
  for (int rank = 0; rank < kRanks; ++rank) {
    for (int peer = 0; peer < kRanks; ++peer) {
      for (const bool sends : {true, false}) {
        if (peer == rank) continue;
        threads.emplace_back([&group = *groups[rank], rank, peer, sends] {
          this_rank = rank;
          for (int number = 0; number < kTimes; ++number) {
            const std::size_t count = number % 3 == 0 ? 20'000 : 5;
            const float value = static_cast<float>(100 * (sends ? rank : peer) + number);
            std::vector<float> own(count, sends ? value : -1.0f);
            const View view(own.data(), sizeof(float));
            Group::Transfer transfer{&view, count, sizeof(float), peer, Signature()};
            if (number == 7) transfer.signature.words[0] = sends ? 1 : 2;
            const Outcome outcome = group.transfer_beside(transfer, sends, in_ms(kLongMs));
            expect(outcome == (number == 7 ? Outcome::kMismatch : Outcome::kDone), "beside: outcome %d",
                   static_cast<int>(outcome));
            const float wanted = number == 7 && !sends ? -1.0f : value;
            expect(std::all_of(own.begin(), own.end(), [&](float found) { return found == wanted; }),
                   "beside: transfer %d moved something else", number);
          }
        });
      }
    }
  }
  for (std::thread& thread : threads) thread.join();
}

// Two ranks that both send, or both receive, are told at once and go on.
void crossed(bool sends) {
  const SharedMemory memory(2, 2, kSmall);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < 2; ++rank) {
    threads.emplace_back([&memory, rank, sends] {
      this_rank = rank;
      const std::unique_ptr<Group> group = member(memory, rank);
      for (int number = 0; number < 10; ++number) {
        std::vector<float> own(number % 2 == 0 ? 5 : 20'000, static_cast<float>(rank));
        const View view(own.data(), sizeof(float));
        Group::Transfer transfer{&view, own.size(), sizeof(float), 1 - rank, Signature()};
        const auto make = [&](bool send) {
          return group->transfer(send ? &transfer : nullptr, send ? nullptr : &transfer, in_ms(kLongMs));
        };
        const std::int64_t began = now_ns();
        expect(make(sends) == Outcome::kMismatch, "crossed: two wait for each other");
        expect(now_ns() - began < kSoonMs * 1'000'000, "crossed: not at once");
        expect(own[0] == static_cast<float>(rank), "crossed: something was moved");
        expect(make(rank == 0) == Outcome::kDone, "crossed: the group does not go on");
        expect(own[0] == 0.0f, "crossed: the next message");
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

void test_failures() {
  beside();
  crossed(true);
  crossed(false);
  for (int kind = 0; kind < kKinds; ++kind) late(kind, kSmallCount);
  for (int kind = 0; kind < kBrief; ++kind) late(kind, kLargeCount);
  wakes(kBarrier);
  wakes(kReceive);
  departed();
  for (const bool leaves : {false, true}) untaken(leaves);
  closed_by_another_thread();
  stopped();
  signalled();
  table_of_groups();
  left_pending();
  queued();
}

}  // namespace tests
}  // namespace colltensor
