// The collectives over a Mesh. Memory is contiguous; `part` names the ranks that take part, all of which call.
// Elements are combined in the order of the part's ranks, so that all get the same bits.
#pragma once

#include "colltensor/kernels.h"
#include "mesh.h"

namespace colltensor {

// Some of a mesh's ranks, this one among them. Roots are positions among them.
struct Part {
  std::vector<int> ranks;
  int position;
  int size() const { return static_cast<int>(ranks.size()); }
};

struct Transfer {
  std::int64_t peer;
  std::int64_t pointer;
  std::int64_t nbytes;
};

// Does all transfers at once.
void exchange(Mesh& mesh, const Transfer* receives, std::size_t receive_count, const Transfer* sends,
              std::size_t send_count);

// Combines in place on every rank.
void allreduce(Mesh& mesh, const Part& part, char* data, std::size_t count, std::size_t item, Reduction reduction);

// Combines in place on `root`; elsewhere the memory is only read.
void reduce(Mesh& mesh, const Part& part, char* data, std::size_t count, std::size_t item, Reduction reduction,
            int root);

// Combines all ranks' sources[position] into `target`; each of `count` elements.
void reducescatter(Mesh& mesh, const Part& part, char* target, const char* const* sources, std::size_t count,
                   std::size_t item, Reduction reduction);

// Overwrites with the root's bytes.
void broadcast(Mesh& mesh, const Part& part, char* data, std::size_t nbytes, int root);

}  // namespace colltensor
