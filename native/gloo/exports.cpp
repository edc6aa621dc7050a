// What Python calls, through tvm-ffi's C ABI: one library for every version of Python.
#include <gloo/config.h>
#include <gloo/transport/tcp/device.h>
#if GLOO_HAVE_TRANSPORT_IBVERBS && __has_include(<infiniband/verbs.h>)
#include <gloo/transport/ibverbs/device.h>
#define COLLTENSOR_IBVERBS 1
#endif
#include <pthread.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/string.h>
#include <unistd.h>

#include <cstring>
#include <map>

#include "collectives.h"

namespace colltensor {
namespace {

namespace ffi = tvm::ffi;

constexpr std::int64_t kInterface = 4;  // grows with every change of these functions, and of what the ranks send

// How a call ended, if not by an exception.
enum Outcome : std::int64_t { kDone = 0, kStopped = 1, kClosed = 2 };

// The open connections by number. A forked child has none of them: their threads are its parent's.
struct Registry {
  std::mutex mutex;
  std::map<std::int64_t, std::shared_ptr<Mesh>> meshes;
  std::int64_t last = 0;
};
Registry* registry = [] {
  pthread_atfork(nullptr, nullptr, [] { registry = new Registry; });
  return new Registry;
}();

std::shared_ptr<Mesh> find(std::int64_t handle) {
  const std::lock_guard<std::mutex> lock(registry->mutex);
  const auto found = registry->meshes.find(handle);
  return found == registry->meshes.end() ? nullptr : found->second;
}

// An error for Python, without the trace of C++ that TVM_FFI_THROW collects: to read the symbols of a process that has
// torch takes half a second of the processor.
ffi::Error told(const std::exception& error) {
  return ffi::Error("RuntimeError", std::string("gloo: ") + error.what(), std::string());
}

// No exception of Gloo's may pass to another library: its message goes on as a RuntimeError.
template <class Body>
std::int64_t guarded(std::int64_t handle, Body body) {
  const std::shared_ptr<Mesh> mesh = find(handle);
  if (mesh == nullptr) return kClosed;
  try {
    body(*mesh);
    return kDone;
  } catch (const ffi::Error&) {
    throw;  // the interpreter has a signal's exception
  } catch (const Stopped&) {
    return kStopped;
  } catch (const Closed&) {
    return kClosed;
  } catch (const std::exception& error) {
    throw told(error);
  }
}

// The caller's check keeps what it raises. The interpreter may handle a signal before it can, or after.
Check asks(const ffi::Function& check) {
  return [&check] {
    if (TVMFFIEnvCheckSignals() != 0) throw ffi::EnvErrorAlreadySet();
    try {
      return check().cast<std::int64_t>() != 0;
    } catch (const ffi::Error&) {
      return true;
    }
  };
}

template <class Body>
std::int64_t run(std::int64_t handle, const ffi::Function& check, Body body, bool beside = false) {
  return guarded(handle, [&](Mesh& mesh) {
    const Check asked = asks(check);
    mesh.run(asked, [&] { body(mesh); }, beside);
  });
}

// `members` is the address of `count` 64-bit ranks.
Part part_of(const Mesh& mesh, std::int64_t members, std::int64_t count) {
  const auto* ranks = reinterpret_cast<const std::int64_t*>(members);
  Part part{{ranks, ranks + count}, 0};
  while (part.ranks[static_cast<std::size_t>(part.position)] != mesh.rank()) ++part.position;
  return part;
}

#if COLLTENSOR_IBVERBS
std::shared_ptr<gloo::transport::Device> ibverbs_device(const std::string& name, std::int64_t port) {
  return gloo::transport::ibverbs::CreateDevice({name, static_cast<int>(port), 0});
}
#endif

// Opens a connection, not connected yet, at a host's own address, or with `port` above 0 on a device of ibverbs.
std::int64_t open(std::int64_t rank, std::int64_t size, ffi::String place, std::int64_t port, std::int64_t timeout_ms) {
  try {
    std::shared_ptr<gloo::transport::Device> device;
#if COLLTENSOR_IBVERBS
    if (port > 0) device = ibverbs_device(place, port);
#endif
    if (port == 0) device = gloo::transport::tcp::CreateDevice(gloo::transport::tcp::attr(place.c_str()));
    auto mesh = std::make_shared<Mesh>(std::move(device), static_cast<int>(rank), static_cast<int>(size),
                                       std::chrono::milliseconds(timeout_ms));
    const std::lock_guard<std::mutex> lock(registry->mutex);
    registry->meshes[++registry->last] = std::move(mesh);
    return registry->last;
  } catch (const std::exception& error) {
    throw told(error);
  }
}

// The names of this machine's ibverbs devices, separated by commas.
ffi::String ibverbs_names() {
  std::string names;
#if COLLTENSOR_IBVERBS
  try {
    for (const std::string& name : gloo::transport::ibverbs::getDeviceNames()) {
      names += (names.empty() ? "" : ",") + name;
    }
  } catch (const std::exception&) {
    return "";  // libibverbs is there, and the kernel's part is not
  }
#endif
  return names;
}

// Takes a socket, connected to `peer` over TCP; on failure too.
std::int64_t link(std::int64_t handle, std::int64_t peer, std::int64_t fd) {
  if (find(handle) == nullptr) ::close(static_cast<int>(fd));
  return guarded(handle, [&](Mesh& mesh) { mesh.link(static_cast<int>(peer), static_cast<int>(fd)); });
}

// Not over TCP: where this rank waits for `peer`.
ffi::Bytes address(std::int64_t handle, std::int64_t peer) {
  const std::shared_ptr<Mesh> mesh = find(handle);
  if (mesh == nullptr) return {};
  const std::vector<char> bytes = mesh->address(static_cast<int>(peer));
  return ffi::Bytes(bytes.data(), bytes.size());
}

// Not over TCP: connects to all ranks; `addresses` are theirs for this one, each with its size in 4 bytes before it.
std::int64_t connect(std::int64_t handle, ffi::Bytes addresses, ffi::Function check) {
  return guarded(handle, [&](Mesh& mesh) {
    std::vector<std::vector<char>> all;
    const char* at = addresses.data();
    for (int peer = 0; peer < mesh.size(); ++peer) {
      std::uint32_t nbytes;
      std::memcpy(&nbytes, at, sizeof nbytes);
      at += sizeof nbytes;
      all.emplace_back(at, at + nbytes);
      at += nbytes;
    }
    mesh.connect(all, asks(check));
  });
}

void limit(std::int64_t handle, std::int64_t direct_nbytes, std::int64_t block_nbytes, std::int64_t depth) {
  const std::shared_ptr<Mesh> mesh = find(handle);
  if (mesh == nullptr) return;
  mesh->limits = {static_cast<std::size_t>(direct_nbytes), static_cast<std::size_t>(block_nbytes),
                  static_cast<std::size_t>(depth), 0};
}

// `transfers` is the address of triples of 64-bit numbers: rank, address, bytes; first those to receive. One alone may run
// beside others, in other threads, each of another peer or direction.
std::int64_t move(std::int64_t handle, std::int64_t transfers, std::int64_t receives, std::int64_t sends,
                  ffi::Function check) {
  const auto* first = reinterpret_cast<const Transfer*>(transfers);
  return run(handle, check, [&](Mesh& mesh) {
    exchange(mesh, first, static_cast<std::size_t>(receives), first + receives, static_cast<std::size_t>(sends));
  }, receives + sends == 1);
}

std::int64_t allreduce_of(std::int64_t handle, std::int64_t members, std::int64_t size, std::int64_t data,
                          std::int64_t count, std::int64_t dtype, std::int64_t op, ffi::Function check) {
  const auto type = static_cast<DType>(dtype);
  return run(handle, check, [&](Mesh& mesh) {
    allreduce(mesh, part_of(mesh, members, size), reinterpret_cast<char*>(data), static_cast<std::size_t>(count),
              item_size(type), find_reduction(type, static_cast<ReduceOp>(op)));
  });
}

std::int64_t reduce_of(std::int64_t handle, std::int64_t members, std::int64_t size, std::int64_t data,
                       std::int64_t count, std::int64_t dtype, std::int64_t op, std::int64_t root,
                       ffi::Function check) {
  const auto type = static_cast<DType>(dtype);
  return run(handle, check, [&](Mesh& mesh) {
    reduce(mesh, part_of(mesh, members, size), reinterpret_cast<char*>(data), static_cast<std::size_t>(count),
           item_size(type), find_reduction(type, static_cast<ReduceOp>(op)), static_cast<int>(root));
  });
}

// `sources` is the address of one address for each member.
std::int64_t reducescatter_of(std::int64_t handle, std::int64_t members, std::int64_t size, std::int64_t target,
                              std::int64_t sources, std::int64_t count, std::int64_t dtype, std::int64_t op,
                              ffi::Function check) {
  const auto type = static_cast<DType>(dtype);
  return run(handle, check, [&](Mesh& mesh) {
    reducescatter(mesh, part_of(mesh, members, size), reinterpret_cast<char*>(target),
                  reinterpret_cast<const char* const*>(sources), static_cast<std::size_t>(count), item_size(type),
                  find_reduction(type, static_cast<ReduceOp>(op)));
  });
}

std::int64_t broadcast_of(std::int64_t handle, std::int64_t members, std::int64_t size, std::int64_t data,
                          std::int64_t nbytes, std::int64_t root, ffi::Function check) {
  return run(handle, check, [&](Mesh& mesh) {
    broadcast(mesh, part_of(mesh, members, size), reinterpret_cast<char*>(data), static_cast<std::size_t>(nbytes),
              static_cast<int>(root));
  });
}

// Combines `size` contributions of equal size, which lie one behind the other, into `target`.
void combine(std::int64_t target, ffi::Bytes contributions, std::int64_t size, std::int64_t dtype, std::int64_t op) {
  const auto type = static_cast<DType>(dtype);
  const std::size_t nbytes = contributions.size() / static_cast<std::size_t>(size);
  std::vector<const void*> sources;
  for (std::int64_t rank = 0; rank < size; ++rank) {
    sources.push_back(contributions.data() + static_cast<std::size_t>(rank) * nbytes);
  }
  find_reduction(type, static_cast<ReduceOp>(op))(reinterpret_cast<void*>(target), sources.data(),
                                                  static_cast<int>(size), nbytes / item_size(type));
}

// Ends a call in another thread within a tick, then closes.
void close(std::int64_t handle) {
  const std::shared_ptr<Mesh> mesh = find(handle);
  if (mesh == nullptr) return;
  {
    const std::lock_guard<std::mutex> lock(registry->mutex);
    registry->meshes.erase(handle);
  }
  mesh->close();
}

std::int64_t interface_version() { return kInterface; }
std::int64_t gloo_version() { return GLOO_VERSION; }

}  // namespace
}  // namespace colltensor

TVM_FFI_DLL_EXPORT_TYPED_FUNC(gloo_interface, colltensor::interface_version)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gloo_version, colltensor::gloo_version)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gloo_ibverbs_names, colltensor::ibverbs_names)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gloo_open, colltensor::open)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gloo_link, colltensor::link)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gloo_address, colltensor::address)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gloo_connect, colltensor::connect)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gloo_limit, colltensor::limit)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gloo_move, colltensor::move)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gloo_allreduce, colltensor::allreduce_of)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gloo_combine, colltensor::combine)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gloo_reduce, colltensor::reduce_of)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gloo_reducescatter, colltensor::reducescatter_of)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gloo_broadcast, colltensor::broadcast_of)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gloo_close, colltensor::close)
