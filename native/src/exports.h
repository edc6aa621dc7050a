// What the files of exported functions share.
#pragma once

#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>

#include <cstdint>

#include "colltensor/group.h"

namespace colltensor {

// For as long as it lives, this thread's waits do not ask the interpreter for signals.
class InsideXla {
 public:
  InsideXla() { inside = true; }
  ~InsideXla() { inside = false; }
  InsideXla(const InsideXla&) = delete;
  InsideXla& operator=(const InsideXla&) = delete;

  static inline thread_local bool inside = false;
};

inline bool signalled() { return !InsideXla::inside && TVMFFIEnvCheckSignals() != 0; }

// The code of an outcome for Python. A signal's exception is thrown on; the group is broken by it.
inline std::int64_t result(Group& group, Outcome outcome) {
  if (outcome == Outcome::kSignalled) {
    group.fail(Failure::kBroken, {});
    throw tvm::ffi::EnvErrorAlreadySet();
  }
  return static_cast<std::int64_t>(outcome);
}

}  // namespace colltensor
