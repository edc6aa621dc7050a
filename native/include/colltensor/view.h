// One tensor's memory as the core sees it: elements in row-major order, wherever they lie.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace colltensor {

// How what is written is stored: into the caches, or past them into the memory, which spares the processor to read what
// it overwrites, and is of use where the caches could not keep it anyway.
enum class Store { kCached, kStreamed };

class View {
 public:
  View() = default;
  View(void* data, std::size_t item_nbytes) : data_(static_cast<char*>(data)), item_(item_nbytes) {}
  // Strides count elements. Axes that lie behind each other without a gap are joined.
  View(void* data, std::size_t item_nbytes, int axes, const std::int64_t* shape, const std::int64_t* strides);

  // The same layout at another address, where the elements have been moved.
  void rebase(void* data) { data_ = static_cast<char*>(data); }

  bool contiguous() const { return shape_.empty(); }
  char* data() const { return data_; }
  std::size_t item_nbytes() const { return item_; }

  // The address of an element of a contiguous view.
  char* at(std::size_t element) const { return data_ + element * item_; }

  // Copies `count` elements from `first` on, in row-major order, to or from contiguous memory.
  void read(std::size_t first, std::size_t count, void* to) const;
  void write(std::size_t first, std::size_t count, const void* from, Store store = Store::kCached) const;

 private:
  template <class Move>
  void walk(std::size_t first, std::size_t count, Move move) const;

  char* data_ = nullptr;
  std::size_t item_ = 1;
  std::vector<std::int64_t> shape_, strides_;  // strides in bytes; both empty for a contiguous view
};

}  // namespace colltensor
