// One rank's part in a group that shares a segment: its position in the protocol, waiting, and failure.
//
// The protocol. Every collective has a fixed number of steps, the same on all ranks; each rank counts the steps it
// has finished in its `progress` word, and everything anyone waits for is "rank q has finished step k". The first
// step is the arrival: the rank posts the call's signature, with the data of a small message beside it, or its first
// block in its staging, and waits for all others to have arrived. Then everybody compares all signatures, and only
// then writes to user memory. A step is published with a release store and seen with an acquire load, so that what
// was written before the one is read after the other on every memory model.
//
// Staging is two halves a rank. Before its arrival a rank writes only to the half of the call's parity, and only
// once all others have finished the step after which nobody reads that half (`half_free`), a step that they finish
// without hearing from this rank again: so that wait ends. It also waits for short messages in that half whose receivers
// have come and not taken them yet (`untaken`), which they do without hearing from it either.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "colltensor/kernels.h"
#include "colltensor/layout.h"
#include "colltensor/platform.h"
#include "colltensor/types.h"
#include "colltensor/view.h"

namespace colltensor {

// What the caller is asked while a call waits. Either may be null.
struct Hooks {
  enum Answer { kGoOn = 0, kStop = 1, kRaised = 2 };
  void* context = nullptr;
  Answer (*stop)(void* context) = nullptr; // every 100 ms: ends the call with kStopped or kInterrupted
  bool (*signalled)() = nullptr;           // every 50 ms and on a signal: true ends it with kSignalled
  void* agreed_context = nullptr;
  void (*agreed)(void* context) = nullptr; // once in a call, when the ranks agree and before user memory is written
};

struct Place {
  int rank;
  int world_size;
  Descriptors pidfds;  // by rank, -1 where there is none
  Hooks hooks;
};

// Something that other ranks do, and who has yet to do it.
class Condition {
 public:
  virtual bool ready() const = 0;
  // Whether one of those that have yet to do it was last seen on this processor, and so needs it.
  virtual bool needs_cpu(std::uint32_t cpu) const = 0;
  virtual RankSet missing() const = 0;

 protected:
  ~Condition() = default;
};

struct FailureReport {
  Failure kind = Failure::kNone;
  int origin = 0;
  RankSet ranks;
};

class Group {
 public:
  // `base` is the mapped segment, whose header is filled in. The group does not unmap it.
  Group(char* base, Place place);
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;

  int rank() const { return rank_; }
  int world_size() const { return world_size_; }
  const Layout& layout() const { return layout_; }

  // All ranks. One thread at a time.
  Outcome barrier(const Signature& signature, std::int64_t deadline_ns);
  Outcome allreduce(const View& data, std::size_t count, DType dtype, ReduceOp op, const Signature& signature,
                    std::int64_t deadline_ns);
  Outcome reduce(const View& data, std::size_t count, DType dtype, ReduceOp op, int root, const Signature& signature,
                 std::int64_t deadline_ns);
  Outcome broadcast(const View& data, std::size_t count, std::size_t item, int root, const Signature& signature,
                    std::int64_t deadline_ns);
  // `outputs` may be null where this rank gets nothing, `sources` where it gives nothing.
  Outcome allgather(const View* outputs, const View& source, std::size_t count, std::size_t item,
                    const Signature& signature, std::int64_t deadline_ns);
  Outcome gather(const View* outputs, const View& source, std::size_t count, std::size_t item, int root,
                 const Signature& signature, std::int64_t deadline_ns);
  Outcome scatter(const View& target, const View* sources, std::size_t count, std::size_t item, int root,
                  const Signature& signature, std::int64_t deadline_ns);
  Outcome alltoall(const View* outputs, const View* sources, std::size_t count, std::size_t item,
                   const Signature& signature, std::int64_t deadline_ns);
  Outcome reducescatter(const View& target, const View* sources, std::size_t count, DType dtype, ReduceOp op,
                        const Signature& signature, std::int64_t deadline_ns);

  // One direction of a transfer, and its signature; the peer calls with the other direction.
  struct Transfer {
    const View* view;
    std::size_t count;
    std::size_t item;
    int peer;
    Signature signature;
    bool mismatch = false;  // out
    bool bound = true;      // see Slip
    const std::function<void()>* agreed = nullptr;  // called in place of the group's
  };
  // Either may be null. kMismatch where one of them differs; the other one is made all the same. Where both ranks only
  // send to each other, or only receive, that is a mismatch, too.
  Outcome transfer(Transfer* send, Transfer* recv, std::int64_t deadline_ns);
  // One transfer, while other threads are in here with transfers of the other direction or with other peers; nothing
  // else runs meanwhile.
  Outcome transfer_beside(Transfer& transfer, bool sends, std::int64_t deadline_ns);

  // The deadline of a call that holds the interpreter lock: it moves little, and waits no longer than a short spin.
  // kLarge: nothing was begun, it would take longer. kPending: this rank has arrived, and postpone() must follow with
  // what makes the call once more, then claim() and resume() in the same thread. Until then the memory must stay.
  static constexpr std::int64_t kBrief = 0;
  // `detail` says which directions of a transfer differ: 1 for the send, 2 for the receive.
  using Rest = std::function<Outcome(std::int64_t deadline_ns, std::int64_t& detail)>;
  // The last that whoever has the turn does: from now on another thread may cancel() the call.
  void postpone(Rest rest) {
    rest_ = std::move(rest);
    pending_.store(this_thread(), std::memory_order_release);
  }
  // Whether this thread's call is pending; another thread's is no business of its.
  bool pending() const { return pending_.load(std::memory_order_relaxed) == this_thread(); }
  // Whether this thread is in a call that asks the caller something: what the caller begins meanwhile (a signal's handler
  // may) cannot wait for the turn.
  bool asking() const { return asking_.load(std::memory_order_relaxed) == this_thread(); }
  // Leaves this thread's pending call to whoever claims it as `owner`; false if there is none, or it was cancelled.
  bool hand_over(const void* owner) {
    const void* own = this_thread();
    return pending_.compare_exchange_strong(own, owner, std::memory_order_acq_rel);
  }
  // Makes a pending call this thread's own again, or its own; false if there is none, or it was cancelled.
  bool claim(const void* owner = this_thread());
  Outcome resume(std::int64_t deadline_ns, std::int64_t& detail);
  // Takes a pending call from its thread, in a group that is closed; true once, if there was one.
  bool cancel() { return pending_.exchange(nullptr, std::memory_order_acq_rel) != nullptr; }

  // Whether this rank can read the memory of all ranks, whose processes have these numbers (0: another namespace). Each
  // has put the address of its nonce into the segment. `allow_reading` needs the same answer on all ranks.
  bool try_reading(const std::int32_t* pids);
  void allow_reading(bool allowed) { reading_ = allowed && world_size_ > 1; }

  // Breaks the group for every rank; the first failure stays.
  void fail(Failure kind, const RankSet& ranks);
  FailureReport failure() const;

  // Tells the others that this rank is gone, and ends a call of another thread with kClosed.
  void leave();

  // Called in every call, once the ranks agree and before this rank's memory is written; null for nothing.
  void on_agreed(void (*agreed)(void*), void* context) {
    hooks_.agreed = agreed;
    hooks_.agreed_context = context;
  }

  // How long calls wait that are not given a deadline: a computation of XLA's.
  void set_timeout(std::int64_t timeout_ns) { timeout_ns_.store(timeout_ns, std::memory_order_relaxed); }
  std::int64_t timeout_ns() const { return timeout_ns_.load(std::memory_order_relaxed); }

  std::int64_t calls() const { return calls_; }
  // Grows with every collective and transfer.
  std::int64_t progress() const {
    std::int64_t sum = calls_;
    for (int rank = 0; rank < world_size_; ++rank) sum += sends_[rank] + receives_[rank];
    return sum;
  }
  std::int64_t transfers(int source, int destination) const {
    return source == rank_ ? sends_[destination] : receives_[source];
  }
  // The other ranks of the transfer for which a call waits: 1 more than the one that it sends to, times 65536, and 1 more
  // than the one that it receives from; 0 for none. Read by any thread.
  std::int64_t peers() const { return peers_.load(std::memory_order_relaxed); }

  bool foreign() const { return fork_generation_ != fork_generation(); }

 private:
  // What a brief call spins, about 4 us, and the most that it copies or combines on a rank: beyond this size copying takes
  // longer than giving up the interpreter lock and taking it again.
  static constexpr int kBriefSpins = 200;
  static constexpr std::size_t kBriefNbytes = 16384;

  friend class Exchange;
  friend class PairSide;
  friend class Sender;
  friend class Receiver;
  friend class StepCondition;
  friend class PairCondition;
  friend class BesideCondition;
  friend class TakenCondition;

  // For as long as it lives, this thread is in one of the hooks.
  class Asking {
   public:
    explicit Asking(Group& group) : group_(group) { group_.asking_.store(this_thread(), std::memory_order_relaxed); }
    ~Asking() { group_.asking_.store(nullptr, std::memory_order_relaxed); }
    Asking(const Asking&) = delete;
    Asking& operator=(const Asking&) = delete;

   private:
    Group& group_;
  };

  static bool reached(std::uint32_t value, std::uint32_t target) {
    return static_cast<std::int32_t>(value - target) >= 0;
  }
  std::uint32_t progress_of(int rank) const { return lines_[rank]->progress.load(std::memory_order_acquire); }

  // Publishing and waiting (waiting.cpp).
  void publish(std::uint32_t step);
  void wake_sleepers();
  bool is_there(std::uint32_t step) const;
  bool spin_for_arrivals(std::uint32_t arrival, int spins) const;
  static bool spin_for(const Condition& condition, int& spins);
  Outcome wait_for(int rank, std::uint32_t step, std::int64_t deadline_ns);
  Outcome wait_for_all(std::uint32_t step, std::int64_t deadline_ns);
  bool is_on(int rank, std::uint32_t cpu) const {
    return rank != rank_ && lines_[rank]->cpu.load(std::memory_order_relaxed) == cpu;
  }
  // Notes how an offered processor came back.
  void rest(bool late, std::int64_t now);
  Outcome wait_until(const Condition& condition, const std::atomic<std::uint32_t>& word,
                     std::atomic<std::uint32_t>& sleepers, std::int64_t deadline_ns);
  Outcome sleep_until(const Condition& condition, const std::atomic<std::uint32_t>& word,
                      std::atomic<std::uint32_t>& sleepers, std::int64_t deadline_ns);
  Outcome look_around(const Condition& condition, std::int64_t deadline_ns, std::int64_t& next_stop_ns);
  RankSet lost_ranks() const;
  RankSet late_ranks(const RankSet& lagging) const;
  RankSet lagging(std::uint32_t step) const;
  void knock(int peer);

  // Arrival (group.cpp).
  Outcome enter() const;
  // Until a half of this rank's staging may be overwritten; but for what lies there for the rank `but`, which the next
  // message to it does not touch.
  Outcome wait_for_half(unsigned half, std::int64_t deadline_ns, int but = kNoRank);
  bool is_half_free(unsigned half, int but) const;
  void arrive(std::uint32_t arrival, const Signature& signature);
  Outcome agree(std::uint32_t arrival, const Signature& signature, std::int64_t deadline_ns);
  bool signatures_agree(const Signature& signature) const;
  Post& own_post() const { return layout_.post(rank_, parity()); }
  unsigned parity() const { return calls_ & 1; }
  char* half(int rank, unsigned which) const {
    return staging_ + (2 * static_cast<std::size_t>(rank) + which) * half_nbytes_;
  }
  void finish_fast(std::uint32_t arrival, bool brief);
  void finish_large(std::uint32_t last);

  // Reading the others' memory (reading.cpp).
  static constexpr std::size_t kScratchNbytes = 262144;
  enum Kind {
    kAllReduceKind, kReduceScatterKind, kAllGatherKind, kGatherKind, kScatterKind, kAllToAllKind, kPairKind, kKinds
  };
  // Which way the messages of a call go; null where they are not to be read.
  Choice* choice(Kind kind, std::size_t nbytes);
  Choice* allreduce_choice(std::size_t nbytes);
  void settle(Choice* choice);  // once the ranks agree
  void offer(const View* sources, int count, std::size_t nbytes);
  void tell(const View* sources, int count);
  bool all_readable() const;
  static bool can_be_read(const View& view, std::size_t nbytes);
  std::uint64_t address(int rank, int source) const { return layout_.post(rank, parity()).addresses()[source]; }
  Outcome read(int rank, std::uint64_t address, void* to, std::size_t nbytes);
  bool read_piece(int pid, std::uint64_t address, char* to, std::size_t nbytes);
  Outcome read_into(const View& target, int rank, std::uint64_t address, std::size_t first, std::size_t count,
                    std::size_t item);
  // Reads a slice of all other ranks and combines it with this rank's into `target`, in pieces.
  Outcome read_and_combine(const View& target, const View& own, int source, std::size_t first, std::size_t count,
                           std::size_t item, Reduction reduction);
  char* scratch(std::size_t nbytes);
  template <class Read>
  Outcome read_others(Read read) {
    for (int rank : others()) {
      const Outcome outcome = read(rank);
      if (outcome != Outcome::kDone) return outcome;
    }
    return Outcome::kDone;
  }

  // How the results of a call are stored that reads and writes so much memory on all ranks together: past the caches
  // where four fifths of the last one do not hold that and the staging. With 2 ranks on 2 cores (EPYC, 32 MiB of
  // last-level cache), cached and streamed: of 16 MiB allgather 2560 and 1680 us, all-to-all 2930 and 2140, gather 1630
  // and 1390, scatter 1450 and 1260, transfers both ways 1260 and 890; of just the cache's size all-to-all (4 MiB) 370 and
  // 250, gather (8 MiB) 740 and 330, scatter 640 and 460, transfers both ways 560 and 330. Between four fifths and all of
  // the cache it depends on where arrays begin (Zen 5, 0 and 16 bytes into a page): gather of 5 MiB 349 and 466 cached,
  // 201 streamed at both; all-to-all of 3 MiB 235 and 248, 197; scatter of 6 MiB 453 and 438, 312. Below, scatter with
  // one root takes 1.4 times as long if streamed (4 MiB), and so does gather (3 MiB).
  Store storing(std::size_t nbytes) const { return storing(nbytes, cache_nbytes_ / 5 * 4); }
  // Of a broadcast, all of the cache: of 12 MiB 312 us cached, 525 streamed. Transfers one way are slower up to 64 MiB.
  Store storing_broadcast(std::size_t nbytes) const { return storing(nbytes, cache_nbytes_); }
  Store storing(std::size_t nbytes, std::size_t held_nbytes) const {
    const std::size_t staging = 2 * half_nbytes_ * static_cast<std::size_t>(world_size_);
    return nbytes + staging > held_nbytes ? Store::kStreamed : Store::kCached;
  }

  // The other ranks, the next one first, so that not all turn to one rank at once.
  const std::vector<int>& others() const { return others_; }

  Outcome allreduce_reading(const View& data, std::size_t count, std::size_t item, Reduction reduction,
                            std::uint32_t arrival, std::int64_t deadline_ns);
  Outcome allreduce_blocks(const View& data, std::size_t count, DType dtype, Reduction reduction,
                           const Signature& signature, std::int64_t deadline_ns);

  struct Pair;  // a rank's sides of a transfer (pairs.cpp)
  Outcome transfer(Pair& pair, Transfer* send, Transfer* recv, std::int64_t deadline_ns);
  template <class Side>
  Outcome finish_beside(Side& side, std::unique_lock<std::mutex>& lock, std::int64_t deadline_ns);
  // Whether a peer only sends to this rank, or only receives from it, and will do nothing else before that has ended.
  bool only_sends(int peer) const;
  bool only_receives(int peer) const;
  // Ends the peer's transfer in a mismatch, as this rank's ends.
  void refuse_send(int peer);
  void refuse_recv(int peer);

  Layout layout_;
  const int rank_;
  const int world_size_;
  char* staging_;
  std::size_t half_nbytes_;
  std::size_t direct_nbytes_;
  std::size_t chunk_nbytes_;
  std::size_t read_nbytes_;
  std::size_t cache_nbytes_;  // of the last-level cache
  bool reading_ = false;   // each other's memory
  Choices<kKinds> choices_;
  std::vector<std::int32_t> pids_;
  std::unique_ptr<char, void (*)(void*)> scratch_{nullptr, std::free};
  std::size_t scratch_nbytes_ = 0;
  std::unique_ptr<char, void (*)(void*)> aside_{nullptr, std::free};
  bool crowded_;           // more ranks than cores
  int spins_, yields_;
  std::atomic<std::int64_t> wanted_until_ns_{0}, rest_ns_{1'000'000};  // until then others want the processors
  std::vector<RankLine*> lines_;
  std::vector<int> others_;
  Descriptors pidfds_;
  Hooks hooks_;
  const std::uint32_t fork_generation_;

  std::uint32_t done_ = kFirstStep;    // this rank's progress
  std::uint32_t calls_ = 0;            // collectives so far
  std::uint32_t half_free_[2] = {kFirstStep, kFirstStep};
  // Messages of one piece that their receivers, who have come, may not have taken: until their slip has reached `step`.
  struct Untaken {
    int peer;
    const Slip* receiver;
    std::uint32_t step;
  };
  std::vector<Untaken> untaken_[2];    // by half
  void forget_untaken(int peer);
  // Steps of mailboxes, by peer: of this rank's side as sender and as receiver, and of the peers' other sides.
  std::vector<std::uint32_t> sent_, received_, taken_, given_;
  std::vector<std::uint32_t> sends_, receives_;  // transfers so far
  std::atomic<const void*> pending_{nullptr};  // the thread whose brief call has arrived
  bool resumed_ = false;                       // it is made once more
  Rest rest_;
  std::shared_ptr<Pair> pair_;         // of a pending transfer
  std::atomic<bool> closing_{false};
  std::mutex beside_;                  // of what transfers of several threads share
  bool sending_ = false;               // one of them uses the staging
  std::atomic<const void*> asking_{nullptr};  // the thread whose call asks one of the hooks
  std::atomic<std::int64_t> timeout_ns_{0};
  std::atomic<std::int64_t> peers_{0};
};

}  // namespace colltensor
