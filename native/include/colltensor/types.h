// The numbers that pass between Python and the core, and have their twins there: operations, dtypes, ops, outcomes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace colltensor {

// colltensor.types.DType.code; codes from kMovesOnly on are known by their size alone.
enum class DType : std::uint8_t {
  kBool, kInt8, kInt16, kInt32, kInt64, kUInt8, kUInt16, kUInt32, kUInt64,
  kFloat16, kBFloat16, kFloat32, kFloat64, kComplex64, kComplex128, kMovesOnly,
};

// colltensor.types.ReduceOp.
enum class ReduceOp : std::uint8_t { kSum, kProduct, kMin, kMax, kAverage, kBAnd, kBOr, kBXor, kNone = 255 };

// What a request asks for (colltensor.backends.shm.requests).
enum class Operation : std::uint8_t {
  kBarrier, kAllReduce, kReduce, kBroadcast, kAllGather, kGather, kReduceScatter, kScatter, kAllToAll, kTransfer,
};

// How a call ended. No user memory was written unless it is kDone or kFailed.
enum class Outcome : std::int32_t {
  kDone = 0,
  kPending = 1,   // begun; resume() ends it
  kLarge = 2,     // not begun: call again without the interpreter lock
  kRefused = 3,   // not begun: the call needs the slow path
  kMismatch = 4,  // the ranks disagree; all of them see it, and the group goes on
  kFailed = 5,    // the group is broken; failure() says why
  kStopped = 6,   // a check of the caller's asked to stop; the group is not marked broken yet
  kSignalled = 7, // the interpreter has a signal's exception; the group is not marked broken yet
  kClosed = 8,    // the group is closed, is being closed, or is the parent process's
  kBusy = 9,      // another thread is in a call, or one is pending
  kInterrupted = 10,  // a check of the caller's raised, as a signal's handler may; the group is not marked broken yet
  kInside = 11,   // this very thread is in a call, and was asked something in it, or has left one pending
};

// Why a group is broken; the first failure wins. kGone is a rank that died or left, as the caller has found.
enum class Failure : std::uint32_t {
  kNone = 0, kClaimed = 1, kLost = 2, kLate = 3, kBroken = 4, kLeft = 5, kGone = 6, kUnreadable = 7,
};

constexpr int kMaxRanks = 256;
constexpr int kNoRank = -1;
constexpr std::size_t kLine = 64;       // of the caches of x86-64; arm64's are 64 or 128
constexpr std::size_t kInline = 4096;   // bytes of a message that travels beside its signature
constexpr std::size_t kFew = 24;        // bytes that travel in the very line of the signature

struct RankSet {
  std::uint64_t words[kMaxRanks / 64] = {};
  void add(int rank) { words[rank / 64] |= std::uint64_t{1} << (rank % 64); }
  bool has(int rank) const { return (words[rank / 64] >> (rank % 64)) & 1; }
  RankSet and_(const RankSet& other) const {
    RankSet both;
    for (int word = 0; word < kMaxRanks / 64; ++word) both.words[word] = words[word] & other.words[word];
    return both;
  }
  RankSet without(const RankSet& other) const {
    RankSet rest;
    for (int word = 0; word < kMaxRanks / 64; ++word) rest.words[word] = words[word] & ~other.words[word];
    return rest;
  }
  bool empty() const { return !(words[0] | words[1] | words[2] | words[3]); }
};

// What all ranks of a call must agree on: 24 bytes of the caller's and the number of the transfer within the call.
struct Signature {
  std::uint64_t words[4] = {};
  bool operator==(const Signature& other) const {
    return ((words[0] ^ other.words[0]) | (words[1] ^ other.words[1]) | (words[2] ^ other.words[2]) |
            (words[3] ^ other.words[3])) == 0;
  }
};

}  // namespace colltensor
