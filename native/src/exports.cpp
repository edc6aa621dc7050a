// What Python calls, through tvm-ffi's C ABI: one library for every version of Python.
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>
#include <tvm/ffi/string.h>

#include <cerrno>
#include <cstring>
#include <functional>

#include "colltensor/kernels.h"
#include "exports.h"
#include "registry.h"
#include "request.h"

namespace colltensor {
namespace {

namespace ffi = tvm::ffi;

constexpr std::int64_t kInterface = 18;  // grows with every change that Python must know of

// The interpreter may handle a signal while it answers: what that raises is either kept by the callee, which answers
// 2, or arrives here.
Hooks::Answer stop(void* context) {
  try {
    return static_cast<Hooks::Answer>((*static_cast<ffi::Function*>(context))().cast<std::int64_t>());
  } catch (const ffi::Error&) {
    return Hooks::kRaised;
  }
}

std::int64_t nbytes(std::int64_t world_size, std::int64_t half_nbytes) {
  return static_cast<std::int64_t>(segment_nbytes(static_cast<int>(world_size), half_nbytes));
}

std::int64_t half_nbytes(std::int64_t world_size) {
  return static_cast<std::int64_t>(default_half_nbytes(static_cast<int>(world_size)));
}

// Writes the header of a new segment; 0, or errno.
std::int64_t format(std::int64_t fd, std::int64_t world_size, std::int64_t cores, std::int64_t half,
                    std::int64_t direct, std::int64_t chunk, std::int64_t read) {
  Mapping mapping;
  if (!mapping.map(static_cast<int>(fd), staging_offset(static_cast<int>(world_size)))) return errno;
  format_segment(mapping.base(), static_cast<int>(world_size), static_cast<int>(cores), half, direct, chunk, read,
                 last_level_cache_nbytes());
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
  member_nonces(handle)[0] = static_cast<std::uint64_t>(low);
  member_nonces(handle)[1] = static_cast<std::uint64_t>(high);
  line.own_nonce.store(reinterpret_cast<std::uint64_t>(member_nonces(handle)), std::memory_order_release);
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

// Whether this rank can read the memory of all others, once all have written their nonce; pids as in `open`.
bool try_reading(std::int64_t handle, std::int64_t pids) {
  const Guest group(handle);
  return group && group->try_reading(reinterpret_cast<const std::int32_t*>(pids));
}

// Lets the ranks read each other's memory; all or none.
void allow_reading(std::int64_t handle, bool allowed) {
  const Guest group(handle);
  if (group) group->allow_reading(allowed);
}

// Takes the turn of a group for one call of several steps; waits while another thread has it.
std::int64_t hold(std::int64_t handle, std::int64_t deadline_ns) {
  const Outcome outcome = hold_member(handle, deadline_ns, signalled);
  if (outcome == Outcome::kSignalled) throw ffi::EnvErrorAlreadySet();
  return static_cast<std::int64_t>(outcome);
}
void release(std::int64_t handle) { release_member(handle); }

// Whether the calling thread is in a call of the group, and was asked something in it.
bool inside(std::int64_t handle) {
  const Guest group(handle);
  return group && group->asking();
}

// Whether the calling thread has left a call pending.
bool pending(std::int64_t handle) {
  const Guest group(handle);
  return group && group->pending();
}

// Lets calls that begin from now on, and are not given a deadline, wait so long.
void set_timeout(std::int64_t handle, std::int64_t timeout_ns) {
  const Guest group(handle);
  if (group) group->set_timeout(timeout_ns);
}

// Runs a request; the caller holds the turn. `agreed` is called before this rank's memory is written.
std::int64_t run(std::int64_t handle, std::int64_t request, std::int64_t deadline_ns,
                 ffi::Optional<ffi::Function> agreed) {
  Group* group = held_member(handle);
  if (group == nullptr) return static_cast<std::int64_t>(Outcome::kClosed);
  std::function<void()> moved;
  if (agreed.has_value()) moved = [&] { (*agreed)(); };
  return result(*group, run_request(*group, reinterpret_cast<std::int64_t*>(request), deadline_ns, moved));
}

// How many collectives this rank has taken part in; the same on all ranks that have come equally far.
std::int64_t calls(std::int64_t handle) {
  const Guest group(handle);
  return !group ? 0 : group->calls();
}

// How many transfers there were from one rank to another, as one of the two counts.
std::int64_t transfers(std::int64_t handle, std::int64_t source, std::int64_t destination) {
  const Guest group(handle);
  return !group ? 0 : group->transfers(static_cast<int>(source), static_cast<int>(destination));
}

// The other ranks of the transfer for which this rank's call waits; see Group.
std::int64_t peers(std::int64_t handle) {
  const Guest group(handle);
  return !group ? 0 : group->peers();
}

// -1 while no call runs, else a number that grows from call to call.
std::int64_t progress(std::int64_t handle) {
  if (!is_busy(handle)) return -1;
  const Guest group(handle);
  return !group ? -1 : group->progress();
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

// Copies all elements of a strided view to contiguous memory, or from there. At `words`: whether from there, the address
// of the contiguous memory, that of the view, bytes of an element, their number, the number of axes, shape, strides.
void copy_elements(std::int64_t words) {
  const auto* word = reinterpret_cast<const std::int64_t*>(words);
  const View view(reinterpret_cast<void*>(word[2]), static_cast<std::size_t>(word[3]), static_cast<int>(word[5]),
                  word + 6, word + 6 + word[5]);
  const auto count = static_cast<std::size_t>(word[4]);
  if (word[0] == 0) {
    view.read(0, count, reinterpret_cast<void*>(word[1]));
  } else {
    view.write(0, count, reinterpret_cast<const void*>(word[1]));
  }
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
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_try_reading, colltensor::try_reading)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_allow_reading, colltensor::allow_reading)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_run, colltensor::run)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_hold, colltensor::hold)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_release, colltensor::release)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_inside, colltensor::inside)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_pending, colltensor::pending)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_set_timeout, colltensor::set_timeout)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_calls, colltensor::calls)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_transfers, colltensor::transfers)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_peers, colltensor::peers)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_progress, colltensor::progress)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_failure, colltensor::failure)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_fail, colltensor::fail)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_copy, colltensor::copy_elements)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_instructions, colltensor::instructions)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_limit_instructions, colltensor::limit_instructions)
