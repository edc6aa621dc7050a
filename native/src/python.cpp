#include "python.h"

#include <tvm/ffi/function.h>

#include <array>
#include <atomic>
#include <cstring>

namespace colltensor {
namespace {

PythonApi api;
std::atomic<bool> passed{false};

// The functions of PythonApi, in its order, at `words`.
void set_python_api(std::int64_t words) {
  static_assert(sizeof api == 5 * sizeof(std::int64_t));
  std::memcpy(&api, reinterpret_cast<const void*>(words), sizeof api);
  passed.store(true, std::memory_order_release);
}

// An array as numpy's public headers lay it out (PyArrayObject_fields), and its type (PyArray_Descr) as far as numpy 1
// and 2 have it alike.
struct NumpyType {
  void* head[2];
  void* scalar_type;
  char kind, character, byte_order, flags;
  int number;
};
struct NumpyArray {
  void* head[2];
  char* data;
  int axes;
  std::int64_t* shape;
  std::int64_t* strides;  // in bytes
  void* base;
  NumpyType* type;
  int flags;
};
constexpr int kWriteable = 0x0400;

struct Known {
  int number;
  DLDataType type;
};
std::array<Known, 64> numbers;
std::size_t known = 0;

// Like numpy's __dlpack__ it takes no read-only memory, no foreign byte order, and strides of whole elements alone.
int read_numpy(void* object, DLTensor* tensor) {
  constexpr int kMostAxes = 64;
  static thread_local std::int64_t strides[kMostAxes];
  const auto* array = static_cast<const NumpyArray*>(object);
  const NumpyType& type = *array->type;
  if ((array->flags & kWriteable) == 0 || array->axes > kMostAxes) return -1;
  if (type.byte_order != '=' && type.byte_order != '|') return -1;
  std::size_t place = 0;
  while (place < known && numbers[place].number != type.number) ++place;
  if (place == known) return -1;
  tensor->dtype = numbers[place].type;
  const std::int64_t item = tensor->dtype.bits / 8;
  for (int axis = 0; axis < array->axes; ++axis) {
    if (array->strides[axis] % item != 0) return -1;
    strides[axis] = array->strides[axis] / item;
  }
  tensor->data = array->data;
  tensor->device = {kDLCPU, 0};
  tensor->ndim = array->axes;
  tensor->shape = array->shape;
  tensor->strides = strides;
  tensor->byte_offset = 0;
  return 0;
}

// The reader of arrays that lie as numpy's do. At `words`: how many element types there are, then of each numpy's
// number, and DLPack's code and bits.
std::int64_t numpy_reader(std::int64_t words) {
  const auto* next = reinterpret_cast<const std::int64_t*>(words);
  const auto count = static_cast<std::size_t>(*next++);
  if (count > numbers.size()) return 0;
  for (std::size_t place = 0; place < count; ++place, next += 3) {
    numbers[place] = {static_cast<int>(next[0]),
                      {static_cast<std::uint8_t>(next[1]), static_cast<std::uint8_t>(next[2]), 1}};
  }
  known = count;
  return reinterpret_cast<std::int64_t>(&read_numpy);
}

// What a reader says of an object, for those who try it: whether it takes it, and at `words` its address, DLPack's code
// and bits, the number of axes, the extents and the strides.
bool read_one(std::int64_t reader, std::int64_t object, std::int64_t words) {
  DLTensor tensor{};
  if (reinterpret_cast<Reader>(reader)(reinterpret_cast<void*>(object), &tensor) != 0) {
    api.clear_error();
    return false;
  }
  auto* next = reinterpret_cast<std::int64_t*>(words);
  *next++ = reinterpret_cast<std::int64_t>(tensor.data) + static_cast<std::int64_t>(tensor.byte_offset);
  *next++ = tensor.dtype.code;
  *next++ = tensor.dtype.bits;
  *next++ = tensor.ndim;
  for (int axis = 0; axis < tensor.ndim; ++axis) *next++ = tensor.shape[axis];
  for (int axis = 0; axis < tensor.ndim; ++axis) *next++ = tensor.strides[axis];
  return true;
}

}  // namespace

const PythonApi* python_api() { return passed.load(std::memory_order_acquire) ? &api : nullptr; }

}  // namespace colltensor

TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_set_python_api, colltensor::set_python_api)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_numpy_reader, colltensor::numpy_reader)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_read_one, colltensor::read_one)
