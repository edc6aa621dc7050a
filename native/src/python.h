// Python's own objects, read by the functions of its C API whose addresses Python passes: nothing is linked to a Python.
#pragma once

#include <dlpack/dlpack.h>

#include <cstdint>

namespace colltensor {

// What is used of the stable ABI. All but restore_thread() need the interpreter lock.
struct PythonApi {
  std::int64_t (*list_size)(void* list);
  void* (*list_item)(void* list, std::int64_t index);  // borrowed
  void (*clear_error)();
  void* (*save_thread)();
  void (*restore_thread)(void* state);
};

// Null until Python has passed it.
const PythonApi* python_api();

// For as long as it lives, this thread is without the interpreter lock.
class WithoutLock {
 public:
  WithoutLock() : state_(python_api()->save_thread()) {}
  ~WithoutLock() { python_api()->restore_thread(state_); }
  WithoutLock(const WithoutLock&) = delete;
  WithoutLock& operator=(const WithoutLock&) = delete;

 private:
  void* state_;
};

// Says where a tensor lies, as DLPackDLTensorFromPyObjectNoSync does: what it writes stays until it is called again in
// this thread, or the tensor changes. Returns another number than 0 with or without a Python error.
using Reader = int (*)(void* object, DLTensor* tensor);

// The type of an object, as Py_TYPE.
inline void* type_of(void* object) { return static_cast<void**>(object)[1]; }

}  // namespace colltensor
