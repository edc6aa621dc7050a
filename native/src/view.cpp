#include "colltensor/view.h"

#include <algorithm>
#include <cstring>

namespace colltensor {
namespace {

template <std::size_t kItem>
void gather(char* to, const char* from, std::int64_t stride, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i, to += kItem, from += stride) std::memcpy(to, from, kItem);
}

template <std::size_t kItem>
void scatter(char* to, const char* from, std::int64_t stride, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i, to += stride, from += kItem) std::memcpy(to, from, kItem);
}

void gather_any(char* to, const char* from, std::int64_t stride, std::size_t count, std::size_t item) {
  switch (item) {
    case 1: return gather<1>(to, from, stride, count);
    case 2: return gather<2>(to, from, stride, count);
    case 4: return gather<4>(to, from, stride, count);
    case 8: return gather<8>(to, from, stride, count);
    case 16: return gather<16>(to, from, stride, count);
    default:
      for (std::size_t i = 0; i < count; ++i, to += item, from += stride) std::memcpy(to, from, item);
  }
}

void scatter_any(char* to, const char* from, std::int64_t stride, std::size_t count, std::size_t item) {
  switch (item) {
    case 1: return scatter<1>(to, from, stride, count);
    case 2: return scatter<2>(to, from, stride, count);
    case 4: return scatter<4>(to, from, stride, count);
    case 8: return scatter<8>(to, from, stride, count);
    case 16: return scatter<16>(to, from, stride, count);
    default:
      for (std::size_t i = 0; i < count; ++i, to += stride, from += item) std::memcpy(to, from, item);
  }
}

}  // namespace

View::View(void* data, std::size_t item_nbytes, int axes, const std::int64_t* shape, const std::int64_t* strides)
    : data_(static_cast<char*>(data)), item_(item_nbytes) {
  const auto item = static_cast<std::int64_t>(item_nbytes);
  for (int axis = 0; axis < axes; ++axis) {
    if (shape[axis] == 1) continue;
    const std::int64_t stride = strides[axis] * item;
    if (!shape_.empty() && strides_.back() == shape[axis] * stride) {
      shape_.back() *= shape[axis];
      strides_.back() = stride;
    } else {
      shape_.push_back(shape[axis]);
      strides_.push_back(stride);
    }
  }
  if (shape_.empty() || (shape_.size() == 1 && strides_[0] == item)) {
    shape_.clear();
    strides_.clear();
  }
}

View::View(std::vector<View> parts, const std::vector<std::size_t>& counts) : item_(parts.front().item_) {
  auto all = std::make_shared<Parts>();
  std::size_t end = 0;
  for (std::size_t count : counts) all->ends.push_back(end += count);
  all->views = std::move(parts);
  parts_ = std::move(all);
}

template <class Move>
void View::each_part(std::size_t first, std::size_t count, Move move) const {
  const std::vector<std::size_t>& ends = parts_->ends;
  auto part = static_cast<std::size_t>(std::upper_bound(ends.begin(), ends.end(), first) - ends.begin());
  std::size_t start = part == 0 ? 0 : ends[part - 1];
  for (; count != 0; start = ends[part++]) {
    const std::size_t n = std::min(count, ends[part] - first);
    if (n != 0) move(parts_->views[part], first - start, n);
    first += n;
    count -= n;
  }
}

char* View::straight(std::size_t first, std::size_t count) const {
  if (contiguous()) return at(first);
  if (parts_ == nullptr) return nullptr;
  const std::vector<std::size_t>& ends = parts_->ends;
  const auto part = static_cast<std::size_t>(std::upper_bound(ends.begin(), ends.end(), first) - ends.begin());
  if (part == ends.size() || ends[part] - first < count) return nullptr;
  return parts_->views[part].straight(first - (part == 0 ? 0 : ends[part - 1]), count);
}

template <class Move>
void View::walk(std::size_t first, std::size_t count, Move move) const {
  const int last = static_cast<int>(shape_.size()) - 1;
  std::vector<std::int64_t> index(shape_.size());
  char* row = data_;
  for (int axis = last; axis >= 0; --axis) {
    index[axis] = static_cast<std::int64_t>(first) % shape_[axis];
    first /= static_cast<std::size_t>(shape_[axis]);
    row += index[axis] * strides_[axis];
  }
  while (count != 0) {
    const auto run = std::min(count, static_cast<std::size_t>(shape_[last] - index[last]));
    move(row, strides_[last], run);
    count -= run;
    row -= index[last] * strides_[last];
    index[last] = 0;
    for (int axis = last - 1; axis >= 0; --axis) {
      row += strides_[axis];
      if (++index[axis] < shape_[axis]) break;
      row -= shape_[axis] * strides_[axis];
      index[axis] = 0;
    }
  }
}

void View::read(std::size_t first, std::size_t count, void* to) const {
  if (count == 0) return;
  if (contiguous()) {
    copy(to, at(first), count * item_);
    return;
  }
  char* target = static_cast<char*>(to);
  if (parts_ != nullptr) {
    each_part(first, count, [&](const View& part, std::size_t start, std::size_t n) {
      part.read(start, n, target);
      target += n * item_;
    });
    return;
  }
  walk(first, count, [&](const char* row, std::int64_t stride, std::size_t run) {
    if (stride == static_cast<std::int64_t>(item_)) {
      copy(target, row, run * item_);
    } else {
      gather_any(target, row, stride, run, item_);
    }
    target += run * item_;
  });
}

void View::write(std::size_t first, std::size_t count, const void* from, Store store) const {
  if (count == 0) return;
  if (contiguous()) {
    copy(at(first), from, count * item_, store);
    return;
  }
  const char* source = static_cast<const char*>(from);
  if (parts_ != nullptr) {
    each_part(first, count, [&](const View& part, std::size_t start, std::size_t n) {
      part.write(start, n, source, store);
      source += n * item_;
    });
    return;
  }
  walk(first, count, [&](char* row, std::int64_t stride, std::size_t run) {
    if (stride == static_cast<std::int64_t>(item_)) {
      copy(row, source, run * item_);
    } else {
      scatter_any(row, source, stride, run, item_);
    }
    source += run * item_;
  });
}

}  // namespace colltensor
