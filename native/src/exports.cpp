// What Python calls, through tvm-ffi's C ABI: one library for every version of Python.
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/string.h>

#include <cerrno>
#include <cstring>

#include "colltensor/kernels.h"
#include "registry.h"
#include "request.h"

namespace colltensor {
namespace {

namespace ffi = tvm::ffi;

constexpr std::int64_t kInterface = 2;  // grows with every change that Python must know of

// Beyond this size copying takes longer than giving up the interpreter lock and taking it again.
constexpr std::size_t kBriefNbytes = 16384;

bool signalled() { return TVMFFIEnvCheckSignals() != 0; }

// The interpreter may handle a signal while it answers: what that raises is either kept by the callee, which answers
// 2, or arrives here.
Hooks::Answer stop(void* context) {
  try {
    return static_cast<Hooks::Answer>((*static_cast<ffi::Function*>(context))().cast<std::int64_t>());
  } catch (const ffi::Error&) {
    return Hooks::kRaised;
  }
}

std::int64_t result(Outcome outcome) {
  if (outcome == Outcome::kSignalled) throw ffi::EnvErrorAlreadySet();
  return static_cast<std::int64_t>(outcome);
}

std::int64_t nbytes(std::int64_t world_size, std::int64_t half_nbytes) {
  return static_cast<std::int64_t>(segment_nbytes(static_cast<int>(world_size), half_nbytes));
}

std::int64_t half_nbytes(std::int64_t world_size) {
  return static_cast<std::int64_t>(default_half_nbytes(static_cast<int>(world_size)));
}

// Writes the header of a new segment; 0, or errno.
std::int64_t format(std::int64_t fd, std::int64_t world_size, std::int64_t cores, std::int64_t half,
                    std::int64_t direct, std::int64_t chunk) {
  Mapping mapping;
  if (!mapping.map(static_cast<int>(fd), segment_nbytes(static_cast<int>(world_size), half))) return errno;
  format_segment(mapping.base(), static_cast<int>(world_size), static_cast<int>(cores), half, direct, chunk);
  return 0;
}

// Maps a segment; its handle, or -errno. Pidfds, an address of `world_size` 32-bit numbers, become the group's.
std::int64_t open(std::int64_t fd, std::int64_t size, std::int64_t rank, std::int64_t world_size, std::int64_t pidfds,
                  ffi::Function check) {
  const auto* numbers = reinterpret_cast<const std::int32_t*>(pidfds);
  Descriptors descriptors({numbers, numbers + world_size});
  auto member = std::make_unique<Member>();
  if (!member->mapping.map(static_cast<int>(fd), static_cast<std::uint64_t>(size))) return -errno;
  if (!check_segment(member->mapping.base(), static_cast<std::uint64_t>(size), static_cast<int>(world_size))) {
    return -EPROTO;
  }
  auto context = std::make_shared<ffi::Function>(std::move(check));
  Place place{static_cast<int>(rank), static_cast<int>(world_size), std::move(descriptors),
              {context.get(), stop, signalled}};
  member->group = std::make_unique<Group>(member->mapping.base(), std::move(place));
  member->context = std::move(context);
  const std::int64_t handle = add_member(std::move(member));
  return handle < 0 ? -EMFILE : handle;
}

bool close(std::int64_t handle) { return remove_member(handle); }

// A rank's half of a proof that all map one memory: writes its number, or reads another's.
void write_nonce(std::int64_t handle, std::int64_t low, std::int64_t high) {
  const Guest group(handle);
  if (!group) return;
  RankLine& line = group->layout().rank(group->rank());
  line.nonce[0].store(static_cast<std::uint64_t>(low), std::memory_order_release);
  line.nonce[1].store(static_cast<std::uint64_t>(high), std::memory_order_release);
}

bool has_nonce(std::int64_t handle, std::int64_t rank, std::int64_t low, std::int64_t high) {
  const Guest group(handle);
  if (!group) return false;
  const RankLine& line = group->layout().rank(static_cast<int>(rank));
  return line.nonce[0].load(std::memory_order_acquire) == static_cast<std::uint64_t>(low) &&
         line.nonce[1].load(std::memory_order_acquire) == static_cast<std::uint64_t>(high);
}

std::int64_t run(std::int64_t handle, std::int64_t request, std::int64_t deadline_ns) {
  Turn group(handle);
  if (group.outcome() != Outcome::kDone) return result(group.outcome());
  return result(run_request(*group, reinterpret_cast<std::int64_t*>(request), deadline_ns));
}

std::int64_t resume(std::int64_t handle, std::int64_t deadline_ns) {
  Turn group(handle);
  return result(group.outcome() == Outcome::kDone ? group->resume(deadline_ns) : group.outcome());
}

// The dtype of what DLPack calls so, or kMovesOnly.
DType dtype_of(DLDataType type) {
  if (type.lanes != 1) return DType::kMovesOnly;
  const int log = type.bits == 8 ? 0 : type.bits == 16 ? 1 : type.bits == 32 ? 2 : type.bits == 64 ? 3 : 4;
  const auto step = [&](DType first, int from) { return static_cast<DType>(static_cast<int>(first) + log - from); };
  switch (type.code) {
    case kDLInt: return log < 4 ? step(DType::kInt8, 0) : DType::kMovesOnly;
    case kDLUInt: return log < 4 ? step(DType::kUInt8, 0) : DType::kMovesOnly;
    case kDLFloat:
      if (log == 1) return DType::kFloat16;
      return log == 2 || log == 3 ? step(DType::kFloat32, 2) : DType::kMovesOnly;
    case kDLBfloat: return log == 1 ? DType::kBFloat16 : DType::kMovesOnly;
    case kDLComplex:
      if (type.bits == 64) return DType::kComplex64;
      return type.bits == 128 ? DType::kComplex128 : DType::kMovesOnly;
    case kDLBool: return log == 0 ? DType::kBool : DType::kMovesOnly;
    default: return DType::kMovesOnly;
  }
}

// Byte for byte what colltensor.engine.Call.signature packs for a tensor of its own, after the sequence number.
Signature allreduce_signature(std::uint8_t op, std::uint64_t count, DType dtype) {
  constexpr std::uint8_t kAllReduceCode = 1;
  constexpr std::int16_t kNoRoot = -1;
  const std::uint64_t leaves = static_cast<std::uint64_t>(dtype);
  unsigned char bytes[32] = {kAllReduceCode, op, 0, 0, 1};
  std::memcpy(bytes + 2, &kNoRoot, sizeof kNoRoot);
  std::memcpy(bytes + 5, &count, sizeof count);
  std::memcpy(bytes + 13, &leaves, sizeof leaves);
  Signature signature;
  std::memcpy(signature.words, bytes, sizeof bytes);
  return signature;
}

// The allreduce of a tensor as it comes from the framework. With deadline_ns 0 the caller holds the interpreter
// lock: the call copies little and waits for microseconds only.
std::int64_t allreduce_tensor(std::int64_t handle, ffi::TensorView tensor, std::int64_t op, std::int64_t deadline_ns) {
  if (tensor.device().device_type != kDLCPU || !tensor.IsContiguous()) return result(Outcome::kRefused);
  const DType dtype = dtype_of(tensor.dtype());
  const Reduction reduction = find_reduction(dtype, static_cast<ReduceOp>(op));
  if (reduction == nullptr) return result(Outcome::kRefused);
  const auto count = static_cast<std::size_t>(tensor.numel());
  const std::size_t size = count * item_size(dtype);
  if (deadline_ns == 0 && size > kBriefNbytes) return result(Outcome::kLarge);
  Turn group(handle);
  if (group.outcome() != Outcome::kDone) return result(group.outcome());
  void* data = static_cast<char*>(tensor.data_ptr()) + tensor.byte_offset();
  const Signature signature = allreduce_signature(static_cast<std::uint8_t>(op), count, dtype);
  if (deadline_ns == 0) {
    if (size > group->direct_nbytes()) return result(Outcome::kLarge);
    return result(group->begin_allreduce(data, count, size, reduction, signature));
  }
  return result(
      group->allreduce(View(data, item_size(dtype)), count, dtype, static_cast<ReduceOp>(op), signature, deadline_ns));
}

// Why the group is broken: [kind, rank that found it, 4 words of the ranks concerned], at `report`.
void failure(std::int64_t handle, std::int64_t report) {
  auto* words = reinterpret_cast<std::int64_t*>(report);
  std::memset(words, 0, 6 * sizeof *words);
  const Guest group(handle);
  if (!group || group->foreign()) return;
  const FailureReport found = group->failure();
  words[0] = static_cast<std::int64_t>(found.kind);
  words[1] = found.origin;
  for (int i = 0; i < 4; ++i) words[2 + i] = static_cast<std::int64_t>(found.ranks.words[i]);
}

// Breaks the group for every rank. Of kBroken the others look for the reason on the control plane; `ranks` is the
// address of 4 words of the ranks concerned.
void fail(std::int64_t handle, std::int64_t kind, std::int64_t ranks) {
  const Guest group(handle);
  if (!group || group->foreign()) return;
  RankSet set;
  std::memcpy(set.words, reinterpret_cast<const void*>(ranks), sizeof set.words);
  group->fail(static_cast<Failure>(kind), set);
}

ffi::String instructions() { return instruction_set(); }
bool limit_instructions(ffi::String name) { return limit_instruction_set(name.c_str()); }
std::int64_t interface_version() { return kInterface; }

}  // namespace
}  // namespace colltensor

TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_interface, colltensor::interface_version)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_nbytes, colltensor::nbytes)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_half_nbytes, colltensor::half_nbytes)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_format, colltensor::format)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_open, colltensor::open)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_close, colltensor::close)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_write_nonce, colltensor::write_nonce)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_has_nonce, colltensor::has_nonce)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_run, colltensor::run)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_resume, colltensor::resume)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_allreduce_tensor, colltensor::allreduce_tensor)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_failure, colltensor::failure)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_fail, colltensor::fail)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_instructions, colltensor::instructions)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_limit_instructions, colltensor::limit_instructions)
