// Elements of a rank's argument that may lie scattered in memory, at any address; what lies between them must stay.
#pragma once

#include <cstring>
#include <numeric>

#include "colltensor/view.h"
#include "reference.h"

namespace colltensor {
namespace tests {

class Tensor {
 public:
  static constexpr int kLayouts = 7;

  Tensor(DType dtype, const Bytes& elements, unsigned layout)
      : dtype_(dtype), item_(nbytes_of(dtype)), count_(elements.size() / item_) {
    arrange(static_cast<int>(layout % kLayouts));
    for (std::size_t i = 0; i < count_; ++i) std::memcpy(address(i), elements.data() + i * item_, item_);
  }

  // Valid while the tensor is where it is.
  View view() {
    char* first = memory_.data() + origin_;
    return shape_.empty() ? View(first, item_)
                          : View(first, item_, static_cast<int>(shape_.size()), shape_.data(), strides_.data());
  }
  // The same as a request has it.
  void pack(std::vector<std::int64_t>& words) {
    words.push_back(reinterpret_cast<std::int64_t>(memory_.data() + origin_));
    words.push_back(static_cast<std::int64_t>(shape_.size()));
    words.insert(words.end(), shape_.begin(), shape_.end());
    words.insert(words.end(), strides_.begin(), strides_.end());
  }
  bool contiguous() const { return shape_.empty(); }
  void* data() { return memory_.data() + origin_; }

  bool holds(const Bytes& elements) {
    Bytes found(count_ * item_), rest = memory_;
    for (std::size_t i = 0; i < count_; ++i) {
      std::memcpy(found.data() + i * item_, address(i), item_);
      std::memset(rest.data() + (address(i) - memory_.data()), kGap, item_);
    }
    return same(dtype_, found, elements) && rest == Bytes(rest.size(), kGap);
  }

 private:
  static constexpr char kGap = 77;

  void arrange(int layout) {
    const auto count = static_cast<std::int64_t>(count_);
    const std::int64_t rows = count % 3 == 0 ? 3 : count % 5 == 0 ? 5 : 2, columns = count / rows;
    if (count == 0 || (layout >= 4 && count % (2 * rows) != 0)) layout %= 2;
    switch (layout) {
      case 0: break;
      case 1: origin_ = 1; break;  // off every alignment
      case 2: set({count}, {3}); break;
      case 3: set({count}, {-1}); break;
      case 6: set({rows, columns}, {1, rows}); break;  // transposed, without one
      case 4: set({rows, columns}, {1, rows + 1}); break;  // transposed, with a gap behind each column
      default: set({rows, 2, columns / 2}, {-(columns + 8), columns / 2 + 3, 1}); break;
    }
    std::int64_t low = 0, high = 0;
    for (std::size_t axis = 0; axis < shape_.size(); ++axis) {
      const std::int64_t reach = (shape_[axis] - 1) * strides_[axis];
      (reach < 0 ? low : high) += reach;
    }
    const std::int64_t span = shape_.empty() ? count : high - low + 1;
    origin_ += static_cast<std::size_t>(-low) * item_;
    memory_.assign(static_cast<std::size_t>(span) * item_ + 2, kGap);
  }
  void set(std::vector<std::int64_t> shape, std::vector<std::int64_t> strides) {
    shape_ = std::move(shape);
    strides_ = std::move(strides);
  }
  char* address(std::size_t element) {
    auto at = static_cast<std::int64_t>(element), offset = std::int64_t{0};
    if (shape_.empty()) offset = at;
    for (std::size_t axis = shape_.size(); axis-- > 0; at /= shape_[axis]) offset += at % shape_[axis] * strides_[axis];
    return memory_.data() + static_cast<std::int64_t>(origin_) + offset * static_cast<std::int64_t>(item_);
  }

  DType dtype_;
  std::size_t item_, count_, origin_ = 0;
  std::vector<std::int64_t> shape_, strides_;
  Bytes memory_;
};

}  // namespace tests
}  // namespace colltensor
