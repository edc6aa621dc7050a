#include "colltensor/segment.h"

#include <sys/mman.h>

#include <algorithm>

#include "colltensor/layout.h"
#include "colltensor/platform.h"

namespace colltensor {
namespace {

constexpr std::uint64_t kPage = 65536;  // a multiple of every page size in use

}  // namespace

std::uint64_t staging_offset(int world_size) {
  const std::uint64_t control = Layout(nullptr, world_size).control_nbytes();
  return (control + kPage - 1) / kPage * kPage;
}

std::uint64_t segment_nbytes(int world_size, std::uint64_t half_nbytes) {
  return staging_offset(world_size) + 2 * half_nbytes * static_cast<std::uint64_t>(world_size);
}

std::uint64_t default_half_nbytes(int world_size) {
  std::uint64_t half = std::uint64_t{1} << 20;
  for (int ranks = world_size; ranks > 16 && half > (std::uint64_t{1} << 18); ranks /= 2) half /= 2;
  return half;
}

bool Mapping::map(int fd, std::uint64_t nbytes) {
  void* base = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
  if (base == MAP_FAILED) return false;
  madvise(base, nbytes, MADV_DONTFORK);  // a child shares neither the memory nor the rank
  madvise(base, nbytes, MADV_HUGEPAGE);  // where the host allows it for shared memory
  base_ = static_cast<char*>(base);
  nbytes_ = nbytes;
  generation_ = fork_generation();
  return true;
}

void Mapping::unmap() {
  if (base_ != nullptr && generation_ == fork_generation()) munmap(base_, nbytes_);
  base_ = nullptr;
}

void format_segment(char* base, int world_size, int cores, std::uint64_t half_nbytes, std::uint64_t direct_nbytes,
                    std::uint64_t chunk_nbytes, std::uint64_t read_nbytes, std::uint64_t cache_nbytes) {
  Header& header = Layout(base, world_size).header();
  header.world_size = static_cast<std::uint32_t>(world_size);
  header.cores = static_cast<std::uint32_t>(cores);
  header.nbytes = segment_nbytes(world_size, half_nbytes);
  header.staging_offset = staging_offset(world_size);
  header.half_nbytes = half_nbytes;
  header.direct_nbytes = std::min(direct_nbytes, half_nbytes);
  header.chunk_nbytes = std::min(chunk_nbytes, half_nbytes);
  header.read_nbytes = std::max(read_nbytes, header.direct_nbytes + 1);
  header.cache_nbytes = cache_nbytes;
  const Layout layout(base, world_size);
  for (int rank = 0; rank < world_size; ++rank) {
    layout.rank(rank).progress.store(kFirstStep, std::memory_order_relaxed);
    for (unsigned parity = 0; parity < 2; ++parity) {
      layout.post(rank, parity).arrived.store(kFirstStep, std::memory_order_relaxed);
    }
    for (int peer = 0; peer < world_size; ++peer) {
      for (unsigned parity = 0; parity < 2; ++parity) {
        layout.mailbox(rank, peer).sender[parity].count.store(kFirstStep, std::memory_order_relaxed);
        layout.mailbox(rank, peer).receiver[parity].count.store(kFirstStep, std::memory_order_relaxed);
      }
    }
  }
  header.magic = kMagic;
}

bool check_segment(const char* base, std::uint64_t nbytes, int world_size) {
  const Header& header = Layout(const_cast<char*>(base), world_size).header();
  return nbytes >= sizeof(Header) && header.magic == kMagic &&
         header.world_size == static_cast<std::uint32_t>(world_size) && header.nbytes == nbytes &&
         header.nbytes == segment_nbytes(world_size, header.half_nbytes) &&
         header.chunk_nbytes != 0 && header.half_nbytes % header.chunk_nbytes == 0;
}

}  // namespace colltensor
