// The shared segment, byte by byte: what the ranks write, who writes it, and where.
//
//   Header | FailureLine | RankLine x n | Post x 2n | Mailbox x n*n | (page) staging x n
//
// Everything but the failure is written by one rank only. Atomics are lock-free and address-free, so that they
// work between processes; 32-bit ones double as futex words.
#pragma once

#include <atomic>
#include <cstdint>

#include "colltensor/choice.h"
#include "colltensor/types.h"

namespace colltensor {

static_assert(std::atomic<std::uint32_t>::is_always_lock_free && std::atomic<std::uint64_t>::is_always_lock_free);

constexpr std::uint64_t kMagic = 0x35726f736e65746c;  // "ltensor5"; another one with every change of this file

// Where every count of steps begins: so short before it wraps around that every group soon has, and every test sees it.
constexpr std::uint32_t kFirstStep = 0xffffffffu - 99;

// Written by the rank that makes the segment, before the others map it.
struct alignas(kLine) Header {
  std::uint64_t magic;
  std::uint32_t world_size;
  std::uint32_t cores;           // that the ranks may run on, together
  std::uint64_t nbytes;          // of the whole segment
  std::uint64_t staging_offset;
  std::uint64_t half_nbytes;     // of one of the two halves of a rank's staging
  std::uint64_t direct_nbytes;   // up to which size every rank reduces everything
  std::uint64_t chunk_nbytes;    // of an allreduce's blocks
  std::uint64_t read_nbytes;     // from which size on ranks read each other's memory, where they may
  std::uint64_t cache_nbytes;    // what the last-level cache keeps
};

struct alignas(kLine) FailureLine {
  std::atomic<std::uint32_t> state;  // Failure, and above 8 bits the rank that found it
  std::atomic<std::uint64_t> ranks[kMaxRanks / 64];
};

struct alignas(2 * kLine) RankLine {
  // Steps this rank has finished, of all collectives since the start; only ever grows (modulo 2^32).
  std::atomic<std::uint32_t> progress;
  std::atomic<std::uint32_t> sleepers;  // ranks that may sleep on `progress`
  std::atomic<std::uint32_t> cpu;      // 1 + the processor on which it last published; 0 before that

  alignas(kLine) std::atomic<std::int64_t> heartbeat;  // when it last looked around while waiting, now_ns()
  std::atomic<std::uint64_t> nonce[2];
  std::atomic<std::uint64_t> own_nonce;  // the address of two such words in the rank's own memory
  std::atomic<std::uint32_t> waiting;   // its threads that wait for others
  std::atomic<std::uint32_t> left;      // 1 once it has closed the group
  std::atomic<std::uint32_t> door;      // futex word: counts what peers have put into its mailboxes while it slept
  std::atomic<std::uint32_t> dozing;    // its threads that may sleep on `door`

  alignas(kLine) std::atomic<std::uint64_t> awaited[kMaxRanks / 64];  // those it waited for when it last looked around
};

// What a rank says on arrival, by the parity of the call's number. It is overwritten two calls later: by then every
// rank has arrived at the call between, and so has read it.
struct alignas(kLine) Post {
  std::atomic<std::uint32_t> arrived;  // the step of the arrival, stored last: with a few bytes, one line says it all
  std::atomic<std::uint16_t> cpu;     // 1 + the processor on which it arrived, which others ask for at the next call
  std::uint16_t readable;              // of a large message: 1 if `many` holds the addresses of what this rank gives
  Signature signature;
  unsigned char few[kFew];
  unsigned char many[kInline];

  unsigned char* data(std::size_t nbytes) { return nbytes <= kFew ? few : many; }
  std::uint64_t* addresses() { return reinterpret_cast<std::uint64_t*>(many); }
  // Of a large message that may be read: this rank's best times, see choice.h. Behind all addresses.
  Choice::Times& times() { return *reinterpret_cast<Choice::Times*>(many + kInline - sizeof(Choice::Times)); }
  // Of a large allreduce: in which order this rank's elements lie (View::order). Before the times.
  std::uint64_t& order() { return *reinterpret_cast<std::uint64_t*>(&times() - 1); }
};
static_assert(sizeof(Post) == kLine + kInline);
static_assert(kMaxRanks * sizeof(std::uint64_t) + 2 * sizeof(Choice::Times) <= kInline);

// What one side of a transfer says, in one line.
struct alignas(kLine) Slip {
  std::atomic<std::uint32_t> count;  // steps of this side, of all transfers since the start; stored last
  std::uint32_t half;                // the sender's: which half of its staging it uses
  std::uint64_t address;             // the sender's: of its memory, if the receiver is to read that; else 0
  Signature signature;
  std::uint32_t bound;               // 1 if the rank will do nothing else with this peer before this has ended
};
static_assert(sizeof(Slip) == kLine);

// Transfers from one rank to one other; the data are in the sender's staging. By the parity of a transfer's number: it
// is overwritten two transfers later, when the other side, which has arrived at the one between, has read it.
struct Mailbox {
  Slip sender[2];
  Slip receiver[2];
};

class Layout {
 public:
  Layout(char* base, int world_size) : base_(base), world_size_(world_size) {}

  Header& header() const { return *reinterpret_cast<Header*>(base_); }
  FailureLine& failure() const { return *reinterpret_cast<FailureLine*>(base_ + sizeof(Header)); }
  RankLine& rank(int rank) const { return reinterpret_cast<RankLine*>(base_ + ranks_offset())[rank]; }
  Post& post(int rank, unsigned parity) const {
    return reinterpret_cast<Post*>(base_ + posts_offset())[2 * rank + (parity & 1)];
  }
  Mailbox& mailbox(int source, int destination) const {
    return reinterpret_cast<Mailbox*>(base_ + mailboxes_offset())[source * world_size_ + destination];
  }

  std::uint64_t control_nbytes() const {
    return mailboxes_offset() + sizeof(Mailbox) * static_cast<std::uint64_t>(world_size_) * world_size_;
  }

 private:
  static std::uint64_t ranks_offset() {
    constexpr std::uint64_t before = sizeof(Header) + sizeof(FailureLine);
    return (before + alignof(RankLine) - 1) / alignof(RankLine) * alignof(RankLine);
  }
  std::uint64_t posts_offset() const { return ranks_offset() + sizeof(RankLine) * world_size_; }
  std::uint64_t mailboxes_offset() const { return posts_offset() + 2 * sizeof(Post) * world_size_; }

  char* base_;
  int world_size_;
};

}  // namespace colltensor
