// A header that Gloo's own headers include and that it does not install (its CMakeLists.txt does not list it). What they
// need to be compiled is here: that the types exist, and their size. Found only where there is no other.
#pragma once

#include <memory>

namespace gloo {

template <typename T>
class NonOwningPtr;
template <typename T>
class ShareableNonOwningPtr;

template <typename T>
class WeakNonOwningPtr {
 private:
  std::weak_ptr<T> kept_;
};

}  // namespace gloo
