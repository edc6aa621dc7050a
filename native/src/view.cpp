#include "colltensor/view.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <algorithm>
#include <cstdlib>
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

// Four by four elements of four bytes: `to` has rows, `from` columns.
inline void transpose_four(void* to, std::size_t to_rows, const char* from, std::int64_t from_columns) {
#if defined(__SSE2__)
  __m128 column[4];
  for (int j = 0; j < 4; ++j) column[j] = _mm_loadu_ps(reinterpret_cast<const float*>(from + j * from_columns));
  _MM_TRANSPOSE4_PS(column[0], column[1], column[2], column[3]);
  for (int i = 0; i < 4; ++i) {
    _mm_storeu_ps(reinterpret_cast<float*>(static_cast<char*>(to) + static_cast<std::size_t>(i) * to_rows), column[i]);
  }
#else
  for (int j = 0; j < 4; ++j) {
    for (int i = 0; i < 4; ++i) {
      std::memcpy(static_cast<char*>(to) + static_cast<std::size_t>(i) * to_rows + 4 * j, from + j * from_columns + 4 * i, 4);
    }
  }
#endif
}

// to[i * to_rows + j * to_columns] = from[i * from_rows + j * from_columns], all strides in bytes, where a row of the one
// and a column of the other are the closer elements. Square tiles of a cache line's width, by way of a small buffer: each
// line is read or written at once, because lines that are a power of two apart would drive each other out of the cache.
template <std::size_t kItem>
void transpose(char* to, std::int64_t to_rows, std::int64_t to_columns, const char* from, std::int64_t from_rows,
               std::int64_t from_columns, std::size_t rows, std::size_t columns) {
  constexpr std::size_t kTile = kItem >= 16 ? 8 : 64 / kItem;
  struct Item {
    char bytes[kItem];
  };
  Item tile[kTile][kTile];
  for (std::size_t row = 0; row < rows; row += kTile) {
    const std::size_t height = std::min(kTile, rows - row);
    for (std::size_t column = 0; column < columns; column += kTile) {
      const std::size_t width = std::min(kTile, columns - column);
      const char* source = from + static_cast<std::int64_t>(row) * from_rows + static_cast<std::int64_t>(column) * from_columns;
      if (kItem == 4 && from_rows == 4 && height == kTile && width == kTile) {
        for (std::size_t j = 0; j < kTile; j += 4, source += 4 * from_columns) {
          for (std::size_t i = 0; i < kTile; i += 4) transpose_four(&tile[i][j], sizeof tile[0], source + 4 * i, from_columns);
        }
      } else {
        for (std::size_t j = 0; j < width; ++j, source += from_columns) {
          const char* next = source;
          for (std::size_t i = 0; i < height; ++i, next += from_rows) std::memcpy(&tile[i][j], next, kItem);
        }
      }
      char* target = to + static_cast<std::int64_t>(row) * to_rows + static_cast<std::int64_t>(column) * to_columns;
      if (to_columns == static_cast<std::int64_t>(kItem) && height == kTile && width == kTile) {
        // Of a size that the compiler knows: a call for each line takes half of the time.
        for (std::size_t i = 0; i < kTile; ++i, target += to_rows) std::memcpy(target, tile[i], sizeof tile[i]);
        continue;
      }
      for (std::size_t i = 0; i < height; ++i, target += to_rows) {
        if (to_columns == static_cast<std::int64_t>(kItem)) {
          std::memcpy(target, tile[i], width * kItem);
          continue;
        }
        char* next = target;
        for (std::size_t j = 0; j < width; ++j, next += to_columns) std::memcpy(next, &tile[i][j], kItem);
      }
    }
  }
}

bool is_tiled(std::size_t item) { return item == 1 || item == 2 || item == 4 || item == 8 || item == 16; }

void transpose_any(char* to, std::int64_t to_rows, std::int64_t to_columns, const char* from, std::int64_t from_rows,
                   std::int64_t from_columns, std::size_t rows, std::size_t columns, std::size_t item) {
  const auto run = [&](auto function) { function(to, to_rows, to_columns, from, from_rows, from_columns, rows, columns); };
  switch (item) {
    case 1: return run(transpose<1>);
    case 2: return run(transpose<2>);
    case 4: return run(transpose<4>);
    case 8: return run(transpose<8>);
    default: return run(transpose<16>);
  }
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

std::size_t View::in_part(std::size_t first, std::size_t count) const {
  if (parts_ == nullptr) return count;
  const std::vector<std::size_t>& ends = parts_->ends;
  const auto end = std::upper_bound(ends.begin(), ends.end(), first);
  return end == ends.end() ? count : std::min(count, *end - first);
}

std::uint64_t View::order() const {
  if (shape_.empty()) return 0;
  std::vector<std::size_t> axes(shape_.size());
  for (std::size_t axis = 0; axis < axes.size(); ++axis) axes[axis] = axis;
  std::sort(axes.begin(), axes.end(), [&](std::size_t a, std::size_t b) { return strides_[a] < strides_[b]; });
  auto next = static_cast<std::int64_t>(item_);
  for (std::size_t axis : axes) {
    if (strides_[axis] != next) return 0;
    next *= shape_[axis];
  }
  std::uint64_t hash = 0x9e3779b97f4a7c15u + shape_.size();
  const auto mix = [&](std::int64_t number) {
    hash = (hash ^ static_cast<std::uint64_t>(number)) * 0xbf58476d1ce4e5b9u;
    hash ^= hash >> 29;
  };
  for (std::size_t axis = 0; axis < axes.size(); ++axis) {
    mix(shape_[axis]);
    mix(strides_[axis]);
  }
  return hash | 1;
}

template <class Move, class Plane>
void View::walk(std::size_t first, std::size_t count, Move move, Plane plane) const {
  const int last = static_cast<int>(shape_.size()) - 1;
  std::vector<std::int64_t> index(shape_.size());
  char* row = data_;
  for (int axis = last; axis >= 0; --axis) {
    index[axis] = static_cast<std::int64_t>(first) % shape_[axis];
    first /= static_cast<std::size_t>(shape_[axis]);
    row += index[axis] * strides_[axis];
  }
  const auto length = static_cast<std::size_t>(shape_[last]);
  const bool columns = last > 0 && is_tiled(item_) && std::abs(strides_[last - 1]) < std::abs(strides_[last]);
  while (count != 0) {
    if (columns && index[last] == 0) {
      const auto left = static_cast<std::size_t>(shape_[last - 1] - index[last - 1]);
      if (const std::size_t rows = std::min(count / length, left); rows > 1) {
        plane(row, rows);
        count -= rows * length;
        row += static_cast<std::int64_t>(rows - 1) * strides_[last - 1];
        index[last - 1] += static_cast<std::int64_t>(rows - 1);
        advance(row, index);
        continue;
      }
    }
    const auto run = std::min(count, length - static_cast<std::size_t>(index[last]));
    move(row, strides_[last], run);
    count -= run;
    row -= index[last] * strides_[last];
    index[last] = 0;
    advance(row, index);
  }
}

// From the beginning of a row to that of the next one.
void View::advance(char*& row, std::vector<std::int64_t>& index) const {
  for (int axis = static_cast<int>(shape_.size()) - 2; axis >= 0; --axis) {
    row += strides_[axis];
    if (++index[axis] < shape_[axis]) break;
    row -= shape_[axis] * strides_[axis];
    index[axis] = 0;
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
  const auto move = [&](const char* row, std::int64_t stride, std::size_t run) {
    if (stride == static_cast<std::int64_t>(item_)) {
      copy(target, row, run * item_);
    } else {
      gather_any(target, row, stride, run, item_);
    }
    target += run * item_;
  };
  walk(first, count, move, [&](const char* corner, std::size_t rows) {
    const auto length = static_cast<std::size_t>(shape_.back());
    const auto item = static_cast<std::int64_t>(item_);
    transpose_any(target, static_cast<std::int64_t>(length) * item, item, corner, *(strides_.end() - 2), strides_.back(),
                  rows, length, item_);
    target += rows * length * item_;
  });
}

void View::write(std::size_t first, std::size_t count, const void* from, Store store) const {
  if (count == 0) return;
  if (contiguous()) {
    copy(at(first), static_cast<const char*>(from), count * item_, store);
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
  const auto move = [&](char* row, std::int64_t stride, std::size_t run) {
    if (stride == static_cast<std::int64_t>(item_)) {
      copy(row, source, run * item_);
    } else {
      scatter_any(row, source, stride, run, item_);
    }
    source += run * item_;
  };
  walk(first, count, move, [&](char* corner, std::size_t rows) {
    const auto length = static_cast<std::size_t>(shape_.back());
    const auto item = static_cast<std::int64_t>(item_);
    transpose_any(corner, strides_.back(), *(strides_.end() - 2), source, item, static_cast<std::int64_t>(length) * item,
                  length, rows, item_);
    source += rows * length * item_;
  });
}

}  // namespace colltensor
