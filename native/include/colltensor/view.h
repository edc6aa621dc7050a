// One tensor's memory as the core sees it, or several tensors', one after the other: elements in row-major order,
// wherever they lie.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "colltensor/copy.h"

namespace colltensor {

class View {
 public:
  View() = default;
  View(void* data, std::size_t item_nbytes) : data_(static_cast<char*>(data)), item_(item_nbytes) {}
  // Strides count elements. Axes that lie behind each other without a gap are joined.
  View(void* data, std::size_t item_nbytes, int axes, const std::int64_t* shape, const std::int64_t* strides);

  // The elements of several views of one item size, each with its number of elements, one after the other.
  View(std::vector<View> parts, const std::vector<std::size_t>& counts);

  // The same layout at another address, where the elements have been moved.
  void rebase(void* data) { data_ = static_cast<char*>(data); }
  // The same for one of several parts, also in every copy of the view.
  void rebase_part(std::size_t part, void* data) { parts_->views[part].rebase(data); }

  bool contiguous() const { return shape_.empty() && parts_ == nullptr; }
  char* data() const { return data_; }
  std::size_t item_nbytes() const { return item_; }

  bool strided() const { return !shape_.empty(); }

  // What tells the order in which the elements lie in memory, where they lie without gaps but not in row-major order:
  // the same for two views that have their elements in the same places. 0 for all others.
  std::uint64_t order() const;
  // All elements of such a view in the order in which they lie.
  View straightened() const { return View(data_, item_); }

  // The address of an element of a contiguous view.
  char* at(std::size_t element) const { return data_ + element * item_; }

  // The address of `count` elements from `first` on where they lie one after the other in memory, else null.
  char* straight(std::size_t first, std::size_t count) const;
  // How many of `count` elements from `first` on are in the same part as the first one.
  std::size_t in_part(std::size_t first, std::size_t count) const;

  // Copies `count` elements from `first` on, in row-major order, to or from contiguous memory.
  void read(std::size_t first, std::size_t count, void* to) const;
  void write(std::size_t first, std::size_t count, const void* from, Store store = Store::kCached) const;

 private:
  struct Parts {
    std::vector<View> views;
    std::vector<std::size_t> ends;  // of each view, in elements of all
  };

  // Calls move(row, stride, run) for runs of elements along the last axis, and plane(row, rows) for several whole rows,
  // where the elements of a column lie closer to each other than those of a row.
  template <class Move, class Plane>
  void walk(std::size_t first, std::size_t count, Move move, Plane plane) const;
  void advance(char*& row, std::vector<std::int64_t>& index) const;
  // Calls move(part, first, count) for the elements of each part among these.
  template <class Move>
  void each_part(std::size_t first, std::size_t count, Move move) const;

  char* data_ = nullptr;
  std::size_t item_ = 1;
  std::vector<std::int64_t> shape_, strides_;  // strides in bytes; both empty for a contiguous view
  std::shared_ptr<Parts> parts_;               // of several tensors
};

}  // namespace colltensor
