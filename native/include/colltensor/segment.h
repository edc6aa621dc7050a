// The shared memory of a group: how large it is, how it is laid out, and its mapping into this process.
#pragma once

#include <cstddef>
#include <cstdint>

namespace colltensor {

// Bytes before the ranks' staging, of the header and all that the ranks tell each other.
std::uint64_t staging_offset(int world_size);

// Bytes of the segment of a group; half_nbytes is what one half of a rank's staging has.
std::uint64_t segment_nbytes(int world_size, std::uint64_t half_nbytes);

// The half that suits a group of so many ranks: large enough to hide the steps' cost, small enough to stay in the
// caches and not to cost a big group too much memory.
std::uint64_t default_half_nbytes(int world_size);

// A mapping; unmapped by the destructor, but not in a forked child, which never has it.
class Mapping {
 public:
  Mapping() = default;
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping() { unmap(); }

  bool map(int fd, std::uint64_t nbytes);  // false: errno says why
  void unmap();
  char* base() const { return base_; }
  std::uint64_t nbytes() const { return nbytes_; }

 private:
  char* base_ = nullptr;
  std::uint64_t nbytes_ = 0;
  std::uint32_t generation_ = 0;
};

// Writes the header of a new segment, which is all zeros.
void format_segment(char* base, int world_size, int cores, std::uint64_t half_nbytes, std::uint64_t direct_nbytes,
                    std::uint64_t chunk_nbytes, std::uint64_t read_nbytes, std::uint64_t cache_nbytes);

// True if the mapping holds a segment of this version and size for so many ranks.
bool check_segment(const char* base, std::uint64_t nbytes, int world_size);

}  // namespace colltensor
