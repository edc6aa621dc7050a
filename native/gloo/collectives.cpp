#include "collectives.h"

#include <algorithm>
#include <cstring>

namespace colltensor {
namespace {

constexpr std::size_t kWholeNbytes = 64 << 10;  // a reduce sends up to this size to its root as a whole
constexpr std::size_t kWidestNbytes = 8 << 20;    // of a block, whatever the number of ranks: memory is kept for several
constexpr int kEveryone = -1;

// The least that a rank sends another of a block.
std::size_t part_nbytes(const Mesh& mesh, const Part& part) {
  return std::max(std::min(mesh.limits.part_nbytes, kWidestNbytes / part.ranks.size() / kLine * kLine), kLine);
}

// Begins block after block, with at most `depth` begun and not ended.
template <class Begin, class End>
void pipeline(std::size_t blocks, std::size_t depth, Begin begin, End end) {
  for (std::size_t block = 0; block < blocks + depth - 1; ++block) {
    if (block < blocks) begin(block);
    if (block + 1 >= depth && block + 1 - depth < blocks) end(block + 1 - depth);
  }
}

// What is on its way for one block.
struct Step {
  std::vector<Message> inputs;   // contributions
  std::vector<Message> results;  // what was made of them
};

// A buffer divided into blocks, and memory for what the others contribute to those on their way.
class Blocks {
 public:
  Blocks(Mesh& mesh, const Part& part, std::size_t count, std::size_t item, std::size_t most_nbytes,
         std::size_t received_nbytes)
      : mesh_(mesh), part_(part), count_(count), item_(item), most_(std::max<std::size_t>(most_nbytes / item, 1)),
        room_((received_nbytes + kLine - 1) / kLine * kLine), steps_(mesh.limits.depth) {
    if (room_ != 0) staging_ = mesh.scratch(room_ * steps_.size() * (part.ranks.size() - 1));
  }

  std::size_t size() const { return (count_ + most_ - 1) / most_; }
  std::size_t first(std::size_t block) const { return block * most_; }
  std::size_t count(std::size_t block) const { return std::min(most_, count_ - first(block)); }
  std::size_t offset(std::size_t block) const { return first(block) * item_; }
  std::size_t nbytes(std::size_t block) const { return count(block) * item_; }
  Step& step(std::size_t block) { return steps_[block % steps_.size()]; }

  // Where the contribution of another rank to a block lies.
  char* place(std::size_t block, int position) const {
    const auto other = static_cast<std::size_t>(position - (position > part_.position));
    return staging_ + room_ * ((block % steps_.size()) * (part_.ranks.size() - 1) + other);
  }

  void send(std::vector<Message>& messages, int position, const void* data, std::size_t nbytes, int channel = 0) {
    messages.push_back(mesh_.send(part_.ranks[position], data, nbytes, channel));
  }
  void receive(std::vector<Message>& messages, int position, void* data, std::size_t nbytes, int channel = 0) {
    messages.push_back(mesh_.receive(part_.ranks[position], data, nbytes, channel));
  }
  void receive_inputs(std::size_t block, std::size_t nbytes) {
    for (int other : others()) receive(step(block).inputs, other, place(block, other), nbytes);
  }

  // Combines this rank's own elements and what the others contributed, in the order of the ranks.
  void combine(std::size_t block, void* target, const void* own, std::size_t nbytes, Reduction reduction) const {
    if (nbytes == 0) return;
    std::vector<const void*> sources(part_.ranks.size());
    for (int position = 0; position < part_.size(); ++position) {
      sources[position] = position == part_.position ? own : place(block, position);
    }
    reduction(target, sources.data(), part_.size(), nbytes / item_);
  }

  // The other ranks, beginning after this one, so that not all turn to the same one first.
  std::vector<int> others() const {
    std::vector<int> positions;
    for (int i = 1; i < part_.size(); ++i) positions.push_back((part_.position + i) % part_.size());
    return positions;
  }

  template <class Begin, class End>
  void run(Begin begin, End end) {
    pipeline(size(), steps_.size(), begin, end);
    for (Step& step : steps_) mesh_.finish(step.results);
  }

 private:
  Mesh& mesh_;
  const Part& part_;
  const std::size_t count_, item_, most_, room_;
  std::vector<Step> steps_;
  char* staging_ = nullptr;
};

// Everyone sends everything to everyone, and combines all of it: one step.
void combine_everywhere(Mesh& mesh, const Part& part, char* data, std::size_t count, std::size_t item,
                        Reduction reduction, std::size_t most) {
  Blocks blocks(mesh, part, count, item, most, std::min(most, count * item));
  blocks.run(
      [&](std::size_t block) {
        blocks.receive_inputs(block, blocks.nbytes(block));
        for (int other : blocks.others()) {
          blocks.send(blocks.step(block).inputs, other, data + blocks.offset(block), blocks.nbytes(block));
        }
      },
      [&](std::size_t block) {
        mesh.finish(blocks.step(block).inputs);
        char* const own = data + blocks.offset(block);
        blocks.combine(block, own, own, blocks.nbytes(block), reduction);
      });
}

// Sends everything to the root, which combines it.
void combine_at_root(Mesh& mesh, const Part& part, char* data, std::size_t count, std::size_t item,
                     Reduction reduction, int root) {
  const bool takes = part.position == root;
  const std::size_t most = mesh.limits.block_nbytes;
  Blocks blocks(mesh, part, count, item, most, takes ? std::min(most, count * item) : 0);
  blocks.run(
      [&](std::size_t block) {
        char* const own = data + blocks.offset(block);
        if (takes) {
          blocks.receive_inputs(block, blocks.nbytes(block));
        } else {
          blocks.send(blocks.step(block).inputs, root, own, blocks.nbytes(block));
        }
      },
      [&](std::size_t block) {
        mesh.finish(blocks.step(block).inputs);
        char* const own = data + blocks.offset(block);
        if (takes) blocks.combine(block, own, own, blocks.nbytes(block), reduction);
      });
}

// Each rank combines its part of every block, and sends it to the root or to everyone. A rank that does not get the
// result leaves its memory as it was.
void combine_in_parts(Mesh& mesh, const Part& part, char* data, std::size_t count, std::size_t item,
                      Reduction reduction, int root) {
  const auto size = static_cast<std::size_t>(part.size());
  const std::size_t most = std::max(mesh.limits.block_nbytes, part_nbytes(mesh, part) * size);
  const auto step_nbytes = [&](std::size_t nbytes) { return (nbytes + size * kLine - 1) / (size * kLine) * kLine; };
  Blocks blocks(mesh, part, count, item, most, step_nbytes(std::min(most, count * item)));
  const bool takes = root == kEveryone || root == part.position;
  struct Piece {
    char* data;
    std::size_t nbytes;
  };
  const auto piece = [&](std::size_t block, int position) {
    const std::size_t nbytes = blocks.nbytes(block), width = step_nbytes(nbytes);
    const std::size_t start = std::min(width * static_cast<std::size_t>(position), nbytes);
    return Piece{data + blocks.offset(block) + start, std::min(width, nbytes - start)};
  };
  blocks.run(
      [&](std::size_t block) {
        Step& step = blocks.step(block);
        mesh.finish(step.results);  // of the block that had this place before
        blocks.receive_inputs(block, piece(block, part.position).nbytes);
        for (int other : blocks.others()) {
          const Piece theirs = piece(block, other);
          blocks.send(step.inputs, other, theirs.data, theirs.nbytes);
          // A result comes when its maker has got this rank's contribution: what it overwrites has been sent.
          if (takes) blocks.receive(step.results, other, theirs.data, theirs.nbytes, 1);
        }
      },
      [&](std::size_t block) {
        Step& step = blocks.step(block);
        mesh.finish(step.inputs);
        const Piece own = piece(block, part.position);
        char* const target = takes ? own.data : blocks.place(block, root);
        blocks.combine(block, target, own.data, own.nbytes, reduction);
        for (int other : blocks.others()) {
          if (root == kEveryone || root == other) blocks.send(step.results, other, target, own.nbytes, 1);
        }
      });
}

}  // namespace

void exchange(Mesh& mesh, const Transfer* receives, std::size_t receive_count, const Transfer* sends,
              std::size_t send_count) {
  std::vector<Message> messages;
  messages.reserve(receive_count + send_count);
  for (const Transfer* item = receives; item != receives + receive_count; ++item) {
    void* const data = reinterpret_cast<void*>(item->pointer);
    messages.push_back(mesh.receive(static_cast<int>(item->peer), data, static_cast<std::size_t>(item->nbytes)));
  }
  for (const Transfer* item = sends; item != sends + send_count; ++item) {
    const void* const data = reinterpret_cast<const void*>(item->pointer);
    messages.push_back(mesh.send(static_cast<int>(item->peer), data, static_cast<std::size_t>(item->nbytes)));
  }
  mesh.finish(messages);
}

void allreduce(Mesh& mesh, const Part& part, char* data, std::size_t count, std::size_t item, Reduction reduction) {
  if (part.size() == 1) return;
  const std::size_t most = mesh.limits.block_nbytes;
  if (part.size() == 2 && mesh.size() > 2) {
    // One on each of two hosts, whose other ranks keep the cores busy: to combine all of it takes less time than a
    // second step, and large blocks less than many.
    combine_everywhere(mesh, part, data, count, item, reduction, 4 * most);
  } else if (count * item * static_cast<std::size_t>(part.size() - 1) <= mesh.limits.direct_nbytes) {
    combine_everywhere(mesh, part, data, count, item, reduction, most);
  } else {
    combine_in_parts(mesh, part, data, count, item, reduction, kEveryone);
  }
}

void reduce(Mesh& mesh, const Part& part, char* data, std::size_t count, std::size_t item, Reduction reduction,
            int root) {
  if (part.size() == 1) return;
  if (part.size() == 2 || count * item <= std::min(kWholeNbytes, mesh.limits.direct_nbytes)) {
    combine_at_root(mesh, part, data, count, item, reduction, root);
  } else {
    combine_in_parts(mesh, part, data, count, item, reduction, root);
  }
}

void reducescatter(Mesh& mesh, const Part& part, char* target, const char* const* sources, std::size_t count,
                   std::size_t item, Reduction reduction) {
  const std::size_t most = std::max(mesh.limits.block_nbytes / part.ranks.size(), part_nbytes(mesh, part));
  Blocks blocks(mesh, part, count, item, most, std::min(most, count * item));
  blocks.run(
      [&](std::size_t block) {
        blocks.receive_inputs(block, blocks.nbytes(block));
        for (int other : blocks.others()) {
          blocks.send(blocks.step(block).inputs, other, sources[other] + blocks.offset(block), blocks.nbytes(block));
        }
      },
      [&](std::size_t block) {
        mesh.finish(blocks.step(block).inputs);
        const std::size_t offset = blocks.offset(block);
        blocks.combine(block, target + offset, sources[part.position] + offset, blocks.nbytes(block), reduction);
      });
}

void broadcast(Mesh& mesh, const Part& part, char* data, std::size_t nbytes, int root) {
  // Down a binomial tree; a rank hands a block on while the next one comes.
  const int size = part.size(), turned = (part.position - root + size) % size;
  int span = 1;
  while (span < size && (turned & span) == 0) span <<= 1;
  const auto at = [&](int position) { return (position + root) % size; };
  const std::size_t most = size == 2 ? nbytes : mesh.limits.block_nbytes;
  Blocks blocks(mesh, part, nbytes, 1, most, 0);
  std::vector<Message> sent;
  blocks.run(
      [&](std::size_t block) {
        char* const to = data + blocks.offset(block);
        if (turned != 0) blocks.receive(blocks.step(block).inputs, at(turned - span), to, blocks.nbytes(block));
      },
      [&](std::size_t block) {
        mesh.finish(blocks.step(block).inputs);
        for (int step = span >> 1; step != 0; step >>= 1) {
          if (turned + step < size) {
            blocks.send(sent, at(turned + step), data + blocks.offset(block), blocks.nbytes(block));
          }
        }
      });
  mesh.finish(sent);
}

}  // namespace colltensor
