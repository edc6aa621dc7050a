// Reading the memory of another rank's process, with the kernel's help: large messages need no staging then, which
// spares each byte two crossings between the processors' caches. Between whom it is allowed is tried out when the
// group is made (ptrace's rules decide); whether this very memory can be read, by its owner in each call.
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "colltensor/group.h"

namespace colltensor {
namespace {

constexpr std::size_t kPieceNbytes = std::size_t{1} << 20;  // between two looks at what else happens
constexpr std::size_t kAsideNbytes = (std::size_t{128} << 10) + CopyWay::kPage;  // stays in the second-level cache

// Reads `nbytes` of a process's memory; false where it does not let us.
bool read_process(int pid, std::uint64_t address, void* to, std::size_t nbytes) {
  char* target = static_cast<char*>(to);
  while (nbytes != 0) {
    const iovec local{target, nbytes}, remote{reinterpret_cast<void*>(address), nbytes};
    const ssize_t got = process_vm_readv(pid, &local, 1, &remote, 1, 0);
    if (got <= 0) {
      if (got < 0 && errno == EINTR) continue;
      return false;
    }
    target += got;
    address += static_cast<std::uint64_t>(got);
    nbytes -= static_cast<std::size_t>(got);
  }
  return true;
}

// True if others can read this memory: not so what a device driver has mapped.
bool is_readable(const char* data, std::size_t nbytes) {
  char byte;
  const auto first = reinterpret_cast<std::uint64_t>(data);
  return read_process(getpid(), first, &byte, 1) && read_process(getpid(), first + nbytes - 1, &byte, 1);
}

}  // namespace

CopyWay kernel_way([](void* to, const void* from, std::size_t nbytes) {
  read_process(getpid(), reinterpret_cast<std::uint64_t>(from), to, nbytes);
});

bool Group::try_reading(const std::int32_t* pids) {
  pids_.assign(pids, pids + world_size_);
  for (int rank = 0; rank < world_size_; ++rank) {
    std::uint64_t found[2];
    const RankLine& line = *lines_[rank];
    if (pids_[rank] <= 0 || !read_process(pids_[rank], line.own_nonce.load(std::memory_order_acquire), found, 16)) {
      return false;
    }
    if (found[0] != line.nonce[0].load(std::memory_order_acquire) ||
        found[1] != line.nonce[1].load(std::memory_order_acquire)) {
      return false;
    }
  }
  return true;
}

Choice* Group::choice(Kind kind, std::size_t nbytes) {
  // In a post the times lie where a message of kInline does.
  return reading_ && nbytes >= read_nbytes_ && nbytes > kInline ? &choices_.of(kind, nbytes) : nullptr;
}

// Every rank has put its times into its post, so that all come to the same, and to the same call.
void Group::settle(Choice* choice) {
  if (choice == nullptr || !choice->ripe()) return;
  Choice::Times slowest = {0, 0};
  for (int rank = 0; rank < world_size_; ++rank) {
    const Choice::Times& best = layout_.post(rank, parity()).times();
    for (int way = 0; way < Choice::kWays; ++way) slowest[way] = std::max(slowest[way], best[way]);
  }
  choice->settle(slowest);
}

void Group::offer(const View* sources, int count, std::size_t nbytes) {
  Post& post = own_post();
  post.readable = 1;
  for (int i = 0; i < count; ++i) {
    if (!can_be_read(sources[i], nbytes)) post.readable = 0;
  }
}

// Not before the ranks agree, because memory may be another from then on.
void Group::tell(const View* sources, int count) {
  for (int i = 0; i < count; ++i) {
    own_post().addresses()[i] = reinterpret_cast<std::uint64_t>(sources[i].data());
  }
}

bool Group::can_be_read(const View& view, std::size_t nbytes) {
  return view.contiguous() && is_readable(view.data(), nbytes);
}

bool Group::all_readable() const {
  for (int rank = 0; rank < world_size_; ++rank) {
    if (layout_.post(rank, parity()).readable == 0) return false;
  }
  return true;
}

// Where the kernel's copies are uneven, to the same place in a page as the memory that is read has, and then on.
bool Group::read_piece(int pid, std::uint64_t address, char* to, std::size_t nbytes) {
  if (nbytes < kLargeCopyNbytes || kernel_way.suits(to, reinterpret_cast<const void*>(address))) {
    return read_process(pid, address, to, nbytes);
  }
  if (aside_ == nullptr) aside_.reset(static_cast<char*>(std::aligned_alloc(CopyWay::kPage, kAsideNbytes)));
  char* const aside = aside_.get() + address % CopyWay::kPage;
  for (std::size_t start = 0, n; start < nbytes; start += n) {
    n = std::min(kAsideNbytes - CopyWay::kPage, nbytes - start);
    if (!read_process(pid, address + start, aside, n)) return false;
    copy(to + start, aside, n);
  }
  return true;
}

Outcome Group::read(int rank, std::uint64_t address, void* to, std::size_t nbytes) {
  char* target = static_cast<char*>(to);
  for (std::size_t start = 0; start < nbytes; start += kPieceNbytes) {
    if (closing_.load(std::memory_order_acquire)) return Outcome::kClosed;
    if (layout_.failure().state.load(std::memory_order_acquire) != 0) return Outcome::kFailed;
    if (!read_piece(pids_[rank], address + start, target + start, std::min(kPieceNbytes, nbytes - start))) {
      RankSet whose;
      whose.add(rank);
      fail(lost_ranks().has(rank) || errno == ESRCH ? Failure::kLost : Failure::kUnreadable, whose);
      return Outcome::kFailed;
    }
  }
  return Outcome::kDone;
}

// Reads elements [first, first + count) of contiguous memory into a view of any layout.
Outcome Group::read_into(const View& target, int rank, std::uint64_t address, std::size_t first, std::size_t count,
                         std::size_t item) {
  if (target.contiguous()) return read(rank, address + first * item, target.at(first), count * item);
  const std::size_t most = std::max<std::size_t>(1, kScratchNbytes / item);
  for (std::size_t start = 0; start < count; start += most) {
    const std::size_t n = std::min(most, count - start);
    const Outcome outcome = read(rank, address + (first + start) * item, scratch(n * item), n * item);
    if (outcome != Outcome::kDone) return outcome;
    target.write(first + start, n, scratch(n * item));
  }
  return Outcome::kDone;
}

char* Group::scratch(std::size_t nbytes) {
  if (scratch_nbytes_ < nbytes) {
    scratch_nbytes_ = (nbytes + 4095) / 4096 * 4096;
    scratch_.reset(static_cast<char*>(std::aligned_alloc(4096, scratch_nbytes_)));
  }
  return scratch_.get();
}

}  // namespace colltensor
